"""The reflections of reflections.py fused for a GPU (Triton): an activation is read once and written once.

``reflections.py`` stays the definition and chooses these kernels; nothing else calls them. What they move of x's size:

    forward    read x; write R x                                              1 read, 1 write
    backward   read the gradient and what was saved; write x's gradient       2 reads, 1 write

The rest is small: the vectors, once a program; k numbers a block and position where the output is saved in place of x;
in the backward pass one partial sum of the vectors' gradients a program, added up in a fixed order (no atomics).
Neither the grid nor that order depends on the card, so the same input gives the same bits.

Shapes: x (M, n, b), M positions of n blocks of b. A program owns BLOCKS whole blocks and walks down the positions, ROWS
at a time: its tile is (ROWS, BLOCKS, B), B the power of two from b on; offsets take 64 bits.
``TRITON_INTERPRET=1`` runs all this on CPU tensors.
"""

from functools import cache
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes

from lit_gpt.reflections import working_dtype

LARGEST_BLOCK = 16384
"""Larger blocks do not fit a program's registers; those above 8192 already use some of the cache in their place."""


@triton.jit
def _dot(x, w):
    """Return dot products over each block: (ROWS, BLOCKS, B) and (1, BLOCKS, B) to (ROWS, BLOCKS, 1)."""
    return tl.sum(x * w, axis=2, keep_dims=True)


@triton.jit
def _unit(U, offsets, inside, WORK: tl.constexpr):
    """Return the unit vectors (1, BLOCKS, B) and lengths (1, BLOCKS, 1) of a program's blocks."""
    u = tl.load(U + offsets, mask=inside, other=0.0).to(WORK)
    length = tl.sqrt(_dot(u, u))
    return u / length, length


@triton.jit
def _update(a_u, u, a_v, v, PLUS: tl.constexpr):
    """Return R z - z from the projections a = w . z: (ROWS, BLOCKS, B).

    At v = -u the two products are equal and their difference is zero, provided that each is rounded by itself. A fused
    multiply-add would round but one of them, so these kernels are compiled without (``enable_fp_fusion=False``). By the
    code for an H100, 15 instructions an element forward and 32 backward, they still wait for memory: it could issue
    twice as many in the time that its memory takes.
    """
    if PLUS:
        update = a_v * v - a_u * u
    else:
        update = -2.0 * a_u * u
    return update


@triton.jit(do_not_specialize=["M"])  # lengths vary from batch to batch: one compilation serves them all
def _forward(
    X, Y, PROJECTIONS, M, x_row, x_block, x_element, U, V, CENTER, BLOCK_MASK, n,
    b: tl.constexpr, PLUS: tl.constexpr, HAS_CENTER: tl.constexpr, HAS_BLOCK_MASK: tl.constexpr,
    SAVE_OUTPUT: tl.constexpr, WORK: tl.constexpr, ROWS: tl.constexpr, BLOCKS: tl.constexpr, B: tl.constexpr
):  # fmt: skip
    block = (tl.program_id(1).to(tl.int64) * BLOCKS + tl.arange(0, BLOCKS))[None, :, None]  # (1, BLOCKS, 1)
    i = tl.arange(0, B)[None, None, :]  # (1, 1, B)
    inside = (block < n) & (i < b)
    u, _ = _unit(U, block * b + i, inside, WORK)
    v, _ = _unit(V, block * b + i, inside, WORK) if PLUS else (u, _)
    center = tl.load(CENTER + block * b + i, mask=inside, other=0.0).to(WORK) if HAS_CENTER else 0.0
    block_mask = tl.load(BLOCK_MASK + block, mask=block < n, other=0.0).to(WORK) if HAS_BLOCK_MASK else 1.0
    start = tl.program_id(0) * ROWS
    while start < M:  # the same code as a range, whose bounds Triton 3.6's interpreter cannot take with numpy 2.4
        row = (start + tl.arange(0, ROWS)).to(tl.int64)[:, None, None]  # (ROWS, 1, 1)
        here = inside & (row < M)
        x = tl.load(X + row * x_row + block * x_block + i * x_element, mask=here, other=0.0).to(WORK)  # the one read
        a_u = _dot(x - center, u) * block_mask
        a_v = _dot(x - center, v) * block_mask if PLUS else a_u
        y = x + _update(a_u, u, a_v, v, PLUS)
        tl.store(Y + (row * n + block) * b + i, y, mask=here)  # the one write
        if SAVE_OUTPUT:  # (M, n, K): R may not be invertible, so R x alone would not give x back
            at = PROJECTIONS + (row * n + block) * (2 if PLUS else 1)
            tl.store(at, a_u, mask=(block < n) & (row < M))
            if PLUS:
                tl.store(at + 1, a_v, mask=(block < n) & (row < M))
        start += tl.num_programs(0) * ROWS


@triton.jit(do_not_specialize=["M"])
def _backward(
    GRAD, SAVED, PROJECTIONS, GRAD_X, PARTIALS, M, g_row, g_block, g_element, s_row, s_block, s_element,
    U, V, CENTER, BLOCK_MASK, n,
    b: tl.constexpr, PLUS: tl.constexpr, HAS_CENTER: tl.constexpr, HAS_BLOCK_MASK: tl.constexpr,
    SAVE_OUTPUT: tl.constexpr, NEED_GRAD_X: tl.constexpr, WORK: tl.constexpr,
    ROWS: tl.constexpr, BLOCKS: tl.constexpr, B: tl.constexpr
):  # fmt: skip
    block = (tl.program_id(1).to(tl.int64) * BLOCKS + tl.arange(0, BLOCKS))[None, :, None]
    i = tl.arange(0, B)[None, None, :]
    inside = (block < n) & (i < b)
    u, u_length = _unit(U, block * b + i, inside, WORK)
    v, v_length = _unit(V, block * b + i, inside, WORK) if PLUS else (u, u_length)
    center = tl.load(CENTER + block * b + i, mask=inside, other=0.0).to(WORK) if HAS_CENTER else 0.0
    block_mask = tl.load(BLOCK_MASK + block, mask=block < n, other=0.0).to(WORK) if HAS_BLOCK_MASK else 1.0
    sum_u = tl.full((ROWS, BLOCKS, B), 0.0, WORK)  # dL/du^ of this program's positions, up to R's factor
    sum_v = sum_u
    start = tl.program_id(0) * ROWS
    while start < M:
        row = (start + tl.arange(0, ROWS)).to(tl.int64)[:, None, None]
        here = inside & (row < M)
        # The two reads: the gradient g, and x or R x.
        g = tl.load(GRAD + row * g_row + block * g_block + i * g_element, mask=here, other=0.0).to(WORK)
        z = tl.load(SAVED + row * s_row + block * s_block + i * s_element, mask=here, other=0.0).to(WORK)
        g_u = _dot(g, u) * block_mask
        g_v = _dot(g, v) * block_mask if PLUS else g_u
        if NEED_GRAD_X:  # R g; the one write
            grad_x = g + _update(g_u, u, g_v, v, PLUS)
            tl.store(GRAD_X + (row * n + block) * b + i, grad_x, mask=here)
        # z becomes x - center. Rows past M hold -center there; their g is zero, and with it all that they add.
        if SAVE_OUTPUT:
            at = PROJECTIONS + (row * n + block) * (2 if PLUS else 1)
            a_u = tl.load(at, mask=(block < n) & (row < M), other=0.0)
            a_v = tl.load(at + 1, mask=(block < n) & (row < M), other=0.0) if PLUS else a_u
            z = z - _update(a_u, u, a_v, v, PLUS) - center
        else:
            z = z - center
            a_u = _dot(z, u) * block_mask
            a_v = _dot(z, v) * block_mask if PLUS else a_u
        sum_u += a_u * g + g_u * z
        if PLUS:
            sum_v += a_v * g + g_v * z
        start += tl.num_programs(0) * ROWS
    # dL/du of these positions: through u^ = u / |u|, which is linear, so the partial results can be added up later.
    at = PARTIALS + tl.program_id(0) * n * b * (2 if PLUS else 1) + block * b + i  # (programs, K, n, b)
    sum_u = tl.sum(sum_u, axis=0, keep_dims=True)  # (1, BLOCKS, B)
    tl.store(at, (sum_u - u * _dot(u, sum_u)) * ((-1.0 if PLUS else -2.0) / u_length), mask=inside)
    if PLUS:
        sum_v = tl.sum(sum_v, axis=0, keep_dims=True)
        tl.store(at + n * b, (sum_v - v * _dot(v, sum_v)) / v_length, mask=inside)


FORWARD, BACKWARD = dict(programs=1024, rows=4), dict(programs=512, rows=16)
"""The programs that fill a card (132 multiprocessors hold 10 and 4 of them), and the fewest positions that are worth a
program's reading the vectors and writing its sums. Constants: the order of the sums must not depend on the card."""


@cache  # Triton's helpers are slow, and every layer asks the same
def _plan(M: int, n: int, b: int, *, programs: int, rows: int) -> tuple[tuple[int, int], dict[str, int]]:
    """Return the grid and the tile for x (M, n, b)."""
    B = triton.next_power_of_2(b)
    BLOCKS = min(triton.next_power_of_2(n), max(1, 256 // B))  # 512 bytes of a row in 16 bits, or a whole block
    ROWS = max(1, 2048 // (BLOCKS * B))  # 2048 numbers: 16 a thread
    groups = triton.cdiv(n, BLOCKS)
    programs = max(1, min(triton.cdiv(M, max(rows, ROWS)), triton.cdiv(programs, groups)))
    num_warps = min(max(BLOCKS * B * ROWS // 512, 4), 16)
    return (programs, groups), dict(ROWS=ROWS, BLOCKS=BLOCKS, B=B, num_warps=num_warps)


def _arguments(
    center: Tensor | None, block_mask: Tensor | None, vectors: list[Tensor], dtype: torch.dtype
) -> dict[str, Any]:
    """Return the arguments that both kernels take."""
    tensors = dict(U=vectors[0], V=vectors[-1], CENTER=center, BLOCK_MASK=block_mask)
    tensors = {name: None if tensor is None else tensor.contiguous() for name, tensor in tensors.items()}
    flags = dict(PLUS=len(vectors) == 2, HAS_CENTER=center is not None, HAS_BLOCK_MASK=block_mask is not None)
    WORK = tl.float64 if dtype == torch.float64 else tl.float32
    return dict(n=vectors[0].size(0), b=vectors[0].size(1), WORK=WORK, enable_fp_fusion=False, **flags, **tensors)


def _work(x: Tensor, vectors: list[Tensor]) -> torch.dtype:
    return torch.promote_types(working_dtype(x.dtype), working_dtype(vectors[0].dtype))


def _reflect_fake(
    x: Tensor, center: Tensor | None, block_mask: Tensor | None, save_output: bool, vectors: list[Tensor]
) -> tuple[Tensor, Tensor]:
    """Return what ``_reflect`` returns, not computed."""
    projections = (*x.shape[:-1], len(vectors)) if save_output else (0,)
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)  # contiguous, whatever x is
    return y, x.new_empty(projections, dtype=_work(x, vectors))


def _reflect(
    x: Tensor, center: Tensor | None, block_mask: Tensor | None, save_output: bool, vectors: list[Tensor]
) -> tuple[Tensor, Tensor]:
    """Return R(x - center) + center and, for ``save_output``, the projections (..., n, k)."""
    y, projections = _reflect_fake(x, center, block_mask, save_output, vectors)
    x = x.reshape(-1, *vectors[0].shape)  # a view, unless the leading dimensions have no common stride
    grid, tile = _plan(*x.shape, **FORWARD)
    arguments = _arguments(center, block_mask, vectors, projections.dtype)
    with torch.cuda.device_of(x):  # Triton launches on the current device
        _forward[grid](x, y, projections, len(x), *x.stride(), SAVE_OUTPUT=save_output, **arguments, **tile)
    return y, projections


def _reflect_backward_fake(
    grad: Tensor, saved: Tensor, projections: Tensor, center: Tensor | None, block_mask: Tensor | None,
    save_output: bool, need_grad_x: bool, vectors: list[Tensor]
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Return what ``_reflect_backward`` returns, not computed."""
    grad_x = torch.empty(grad.shape if need_grad_x else (0,), dtype=grad.dtype, device=grad.device)
    return grad_x, grad.new_empty((len(vectors), *vectors[0].shape), dtype=_work(grad, vectors))


def _reflect_backward(
    grad: Tensor, saved: Tensor, projections: Tensor, center: Tensor | None, block_mask: Tensor | None,
    save_output: bool, need_grad_x: bool, vectors: list[Tensor]
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Return the gradients of x and of the vectors (k, n, b)."""
    grad_x, grad_vectors = _reflect_backward_fake(
        grad, saved, projections, center, block_mask, save_output, need_grad_x, vectors
    )
    grad, saved = (tensor.reshape(-1, *vectors[0].shape) for tensor in (grad, saved))
    grid, tile = _plan(*grad.shape, **BACKWARD)
    partials = grad_vectors.new_empty(grid[0], *grad_vectors.shape)
    arguments = _arguments(center, block_mask, vectors, partials.dtype)
    flags = dict(SAVE_OUTPUT=save_output, NEED_GRAD_X=need_grad_x)
    with torch.cuda.device_of(grad):
        _backward[grid](
            grad, saved, projections, grad_x, partials, len(grad), *grad.stride(), *saved.stride(),
            **flags, **arguments, **tile
        )  # fmt: skip
    return grad_x, torch.sum(partials, dim=0, out=grad_vectors)


# Operators, which torch.compile and tensors without data take as they are.
_LIBRARY = torch.library.Library("ether", "DEF")
for _operator, _fake in ((_reflect, _reflect_fake), (_reflect_backward, _reflect_backward_fake)):
    _LIBRARY.define(_operator.__name__[1:] + torch.library.infer_schema(_operator, mutates_args=()))
    _LIBRARY.impl(_operator.__name__[1:], _operator, "CompositeExplicitAutograd")
    torch.library.register_fake(f"ether::{_operator.__name__[1:]}", _fake, lib=_LIBRARY)


def _is_plain(x: Tensor) -> bool:
    """Return True where the function behind an operator can be called itself, which saves a CPU 10 us a call.

    That counts: 3 TB/s move 2048 positions of 4096 in bf16 in 11 us, and in small batches a GPU waits for the CPU.
    """
    return type(x) is Tensor and not torch.compiler.is_compiling()


def reflect(x: Tensor, *options: Any) -> tuple[Tensor, Tensor]:
    """Return what ``_reflect`` does, from the same arguments."""
    return (_reflect if _is_plain(x) else torch.ops.ether.reflect)(x, *options)


def reflect_backward(grad: Tensor, *options: Any) -> tuple[Tensor, Tensor]:
    """Return what ``_reflect_backward`` does, from the same arguments."""
    return (_reflect_backward if _is_plain(grad) else torch.ops.ether.reflect_backward)(grad, *options)


def try_on(device: torch.device) -> None:
    """Reflect one vector there: no driver, no C compiler and too old a card all raise here, and not in training."""
    with _disable_current_modes():  # not on tensors without data, with which the memory of a step is estimated
        _reflect(torch.ones(1, 1, 2, device=device), None, None, False, [torch.ones(1, 2, device=device)])
