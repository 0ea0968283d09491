"""The mathematics of ETHER, ETHER+ and OFT: tensors in, tensors out, and nothing else (2405.20271).

Per block, with u^ for the unit vector u / |u|:

    ETHER   R(u)    = I - 2 u^ u^T                      a Householder reflection
    ETHER+  R(u, v) = I - u^ u^T + v^ v^T               the identity where v = -u
    OFT     R(A)    = (I + S)(I - S)^-1, S = (A - A^T)/2     Cayley's rotation

For ETHER and ETHER+ R - I has rank 1 or 2 in each block, so R x is two thin products (``thin_factors``) and R is never
built. OFT's R is built, block by block.
Forward passes apply R to activations; merging applies it to the rows or the columns of a weight, with these same
functions:

    W R_in: every row r of W becomes R_in^T r         R_out W: every column c of W becomes R_out c

Reflections are symmetric, so R^T = R; for OFT ``rotate`` is given the transpose.

Shapes: x (..., n, b), already cut into n blocks of b by ``unflatten``; vectors (n, b). Products are taken in x's dtype,
norms and differences of vectors in fp32 (fp64 for fp64).
"""

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from lit_gpt.errors import UserError

Vectors = tuple[Tensor, ...]
"""The parameters of one side of a weight: u, or u and v, (n, b) each; of a rotation A alone, (n, b, b)."""


def unit(u: Tensor) -> Tensor:
    """Return vectors scaled to length one over the last dimension, in fp32 (fp64 for fp64)."""
    u = u.to(working_dtype(u.dtype))
    return u / torch.linalg.vector_norm(u, dim=-1, keepdim=True)


def working_dtype(dtype: torch.dtype) -> torch.dtype:
    """Return fp32, but fp64 for fp64."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def reflect(
    x: Tensor,
    *vectors: Tensor,
    center: Tensor | None = None,
    block_mask: Tensor | None = None,
    save_output: bool = False,
) -> Tensor:
    """Reflect block by block; x itself, bit for bit, where v = -u.

    ETHER gives x - 2 u^ (u^ . x), ETHER+ x - u^ (u^ . x) + v^ (v^ . x).

    Args:
        x: (..., n, b).
        vectors: u for ETHER, u and v for ETHER+, (n, b) each, of any length but zero.
        center: (n, b), the point that R leaves where it is, so that the result is R(x - center) + center: a layer's
            bias, which is not transformed; the origin where it is None.
        block_mask: (n, 1) of ones and zeros; a block with zero is left as it is (multiplicative dropout, 2311.06243).
        save_output: keep the result for the backward pass in place of x, where others keep the result too.
    """
    return _Reflection.apply(x, center, block_mask, save_output, _kernels_take(x), *vectors)


def cayley(a: Tensor) -> Tensor:
    """Return OFT's rotations (..., b, b) from free matrices (..., b, b): Cayley's (I + S)(I - S)^-1."""
    return _Cayley.apply(a)


def rotate(x: Tensor, rotation: Tensor, *, center: Tensor | None = None) -> Tensor:
    """Return R x, block by block, or x + (R - I)(x - center), which for R = I is x bit for bit.

    Args:
        x: (..., n, b).
        rotation: (n, b, b).
        center: (n, b), the point that R leaves where it is; the origin where it is None.
    """
    if center is not None:
        identity = torch.eye(rotation.size(-1), device=rotation.device, dtype=rotation.dtype)
        return x + rotate(x - center, rotation - identity)
    rotation = rotation.to(x.dtype)  # a product of this size belongs to the dtype that the weights multiply in
    return torch.einsum("...nb,ncb->...nc", x, rotation)


def axis_angle(u: Tensor, v: Tensor) -> Tensor:
    """Return the angle between the axes of vectors (..., b), 0 to pi / 2: (...); exact for small angles too."""
    u, v = unit(u), unit(v)
    along = _dot(u, v)
    return torch.atan2(torch.linalg.vector_norm(v - along * u, dim=-1), along.squeeze(-1).abs())


def turn(u: Tensor, v: Tensor, strength: float) -> Tensor:
    """Return v at a share of its way from -u, where ETHER+ is the identity: a vector at ``strength`` times their angle.

    Args:
        u, v: (..., b).
        strength: 0 gives -u exactly and 1 the direction of v; beyond them the vector turns on, in the plane of both.

    Returns:
        (..., b) in v's dtype, as long as u; a zero v, which has no direction, stays what it is.
    """
    wide_u, unit_u, unit_v = u.double(), unit(u.double()), unit(v.double())
    along = _dot(unit_u, unit_v)
    across = unit_v - along * unit_u
    length, distance = (torch.linalg.vector_norm(vector, dim=-1, keepdim=True) for vector in (wide_u, across))
    angle = strength * torch.atan2(distance, -along)
    turned = angle.sin() * length * F.normalize(across, dim=-1) - angle.cos() * wide_u
    turned = torch.where(distance < 1e-12, -wide_u, turned)  # v on u's axis: R is I, and there is no plane to turn in
    return torch.where(v.any(dim=-1, keepdim=True), turned.to(v.dtype), v)


def _dot(x: Tensor, y: Tensor) -> Tensor:
    return (x * y).sum(dim=-1, keepdim=True)


def thin_factors(*vectors: Tensor) -> tuple[Tensor, Tensor]:
    """Return R - I as thin factors: R x = x + sum over k of left_k (right_k . x) in each block.

    ETHER has the pair (-2 u^, u^). ETHER+ is written with the sum and the difference of its unit vectors,

        v^ v^T - u^ u^T = -1/2 [(u^ + v^)(u^ - v^)^T + (u^ - v^)(u^ + v^)^T],

    because u^ and v^ themselves nearly cancel where a block has learnt little: rounding them to 16 bits could exceed
    the update. Rounding the sum, which is exactly zero at the start v = -u, costs no more than its own last bits.

    Args:
        vectors: u for ETHER, u and v for ETHER+, (n, b) each.

    Returns:
        left and right, (n, k, b) in fp32 (fp64 for fp64), k the number of vectors.
    """
    left, right = _left_and_right(_factor_rows(unit(torch.stack(vectors, dim=-2))), len(vectors))
    return _coefficient(len(vectors)) * left, right


def _coefficient(k: int) -> float:
    """Return c of R - I = c sum over k of left_k right_k^T: -2 for ETHER (k = 1), -1/2 for ETHER+ (k = 2)."""
    # A function and no table: torch.compile takes a global number for a variable, and fails at its second use.
    return -2.0 if k == 1 else -0.5


def _factor_rows(units: Tensor) -> Tensor:
    """Return left and right in one tensor, of which they are slices: u^, or s, d, s; (n, 1 or 3, b).

    For ETHER both are u^. For ETHER+, with s = u^ + v^ and d = u^ - v^, right is s, d and left is d, s.
    """
    if units.size(-2) == 1:
        return units
    u, v = units.unbind(-2)
    s = u + v
    return torch.stack([s, u - v, s], dim=-2)


def _left_and_right(rows: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Return left and right, (n, k, b) each, from their common ``_factor_rows``."""
    return rows[:, -k:], rows[:, :k]


def _apply(
    x: Tensor, rows: Tensor, k: int, *, center: Tensor | None, block_mask: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Return R(x - center) + center, (N, n, b), and the projections right_k . (x - center), (n, N, k)."""
    left, right = _left_and_right(rows, k)
    projections = torch.bmm(x.transpose(0, 1), right.mT)
    if center is not None:
        projections = projections - torch.bmm(center.unsqueeze(1), right.mT)
    if block_mask is not None:
        projections = projections * block_mask.unsqueeze(-1).to(x.dtype)
    return torch.add(x, torch.bmm(projections, left).transpose(0, 1), alpha=_coefficient(k)), projections


def _products(x: Tensor, center: Tensor | None, block_mask: Tensor | None, vectors: Vectors) -> tuple[Tensor, ...]:
    """Return R(x - center) + center, and what the backward pass needs of it."""
    stacked = torch.stack(vectors, dim=-2)
    stacked = stacked.to(working_dtype(stacked.dtype))  # (n, k, b)
    lengths = torch.linalg.vector_norm(stacked, dim=-1, keepdim=True)
    units = stacked / lengths
    rows = _factor_rows(units).to(x.dtype)
    y, projections = _apply(x.reshape(-1, *x.shape[-2:]), rows, len(vectors), center=center, block_mask=block_mask)
    return y.view_as(x), projections.to(x.dtype), units, lengths, rows  # autocast takes the products in 16 bits


def _products_backward(
    grad: Tensor, saved: Tensor, center: Tensor | None, block_mask: Tensor | None, save_output: bool, kept: list[Tensor]
) -> tuple[Tensor, Tensor]:
    """Return the gradients of x and of the vectors (k, n, b); ``kept`` is what ``_products`` returned beside y."""
    projections, units, lengths, rows = kept
    k = units.size(-2)
    g, saved = (tensor.reshape(-1, *tensor.shape[-2:]) for tensor in (grad, saved))  # (N, n, b)
    grad_x, grad_projections = _apply(g, rows, k, center=None, block_mask=block_mask)
    grad_projections = grad_projections.mT  # (n, k, N)
    sums = torch.bmm(projections.mT, g.transpose(0, 1))
    sums = torch.baddbmm(sums, grad_projections, saved.transpose(0, 1))  # (n, k, b)
    if save_output:  # x = y - c sum_k a_k left_k, and of that sum only its products with g count
        left, _ = _left_and_right(rows, k)
        sums = torch.baddbmm(sums, grad_projections @ projections, left, alpha=-_coefficient(k))
    if center is not None:
        sums = torch.baddbmm(sums, grad_projections.sum(-1, keepdim=True), center.unsqueeze(1), alpha=-1)
    of_units = sums.to(units.dtype)
    if k == 2:  # the first sum is the gradient of d = u^ - v^, the second one that of s = u^ + v^
        of_d, of_s = of_units.unbind(-2)
        of_units = torch.stack([of_s + of_d, of_s - of_d], dim=-2)
    tangential = torch.addcmul(of_units, units, _dot(units, of_units), value=-1)
    return grad_x.view_as(grad), (tangential * (_coefficient(k) / lengths)).transpose(0, 1)


class _Reflection(torch.autograd.Function):
    """Saves x or R x, and k numbers a block and position; autograd's own graph would keep several tensors of x's size.

    With a_k = right_k . (x - center) and g the incoming gradient:
        y = x + c sum_k a_k left_k
        dL/dx = R g, dL/dcenter = sum over positions of (I - R) g
        dL/dleft_k = c sum over positions of a_k g + (right_k . g) (x - center), left and right being the same vectors
        dL/du = (dL/du^ - u^ (u^ . dL/du^)) / |u|, for u^ = u / |u|

    Few operators, too: in small batches a GPU waits for their launches.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, center: Tensor | None, block_mask: Tensor | None, save_output: bool, fused: bool,
        *vectors: Tensor, unused: None = None
    ) -> Tensor:  # fmt: skip
        # ``unused``: without gradients Dynamo leaves ctx out of a call with as many arguments as there are names.
        if fused:
            from lit_gpt import kernels

            y, projections = kernels.reflect(x, center, block_mask, save_output, vectors)
            kept = (projections, *vectors)
        else:
            y, *kept = _products(x, center, block_mask, vectors)
        ctx.save_output, ctx.fused = save_output, fused
        ctx.save_for_backward(y if save_output else x, center, block_mask, *kept)
        return y

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        saved, center, block_mask, *kept = ctx.saved_tensors
        of_center = ctx.needs_input_grad[1]
        need_grad_x = ctx.needs_input_grad[0] or of_center
        if ctx.fused:
            from lit_gpt import kernels

            options = (center, block_mask, ctx.save_output, need_grad_x)
            grad_x, grad_vectors = kernels.reflect_backward(grad, saved, kept[0], *options, kept[1:])
        else:
            grad_x, grad_vectors = _products_backward(grad, saved, center, block_mask, ctx.save_output, kept)
        grad_center = (grad - grad_x).unsqueeze(0).flatten(0, -3).sum(0) if of_center else None
        return grad_x if need_grad_x else None, grad_center, None, None, None, *grad_vectors.unbind()


class _Cayley(torch.autograd.Function):
    """Saves R alone: dR = (I + R) dS (I + R) / 2, since (I - S)^-1 = (I + R) / 2, so that nothing is solved twice."""

    @staticmethod
    def forward(ctx: Any, a: Tensor) -> Tensor:
        wide = a.to(working_dtype(a.dtype))
        s = (wide - wide.mT) / 2
        identity = torch.eye(a.size(-1), device=a.device, dtype=s.dtype)
        # The two factors commute, so the inverse can stand on the left, where a solver puts it. I - S always has an
        # inverse: `solve_ex` does not make a GPU wait to check it.
        rotation = torch.linalg.solve_ex(identity - s, identity + s).result
        ctx.save_for_backward(rotation)
        ctx.dtype = a.dtype
        return rotation

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        (rotation,) = ctx.saved_tensors
        right = rotation.mT + torch.eye(rotation.size(-1), device=grad.device, dtype=grad.dtype)
        of_s = right @ grad @ right / 2
        return ((of_s - of_s.mT) / 2).to(ctx.dtype)


def published_update(x: Tensor, weight: Tensor, *vectors: Tensor) -> Tensor:
    """Return (W (reflected in the ``published`` layout) - W) x, without a tensor of W's size.

    The original code multiplies row group r of W (f/n rows) by I_n (x) R_r: every chunk j of the input meets the same
    R_r. With R_r = I + sum_k left_k right_k^T this adds sum_jk [W_r (e_j (x) left_k)] (right_k . x_j) to y_r, so the
    products in brackets, one vector for each r, k and j, are all that has to be known of W.

    Args:
        x: (..., d).
        weight: (f, d).
        vectors: u for ETHER, u and v for ETHER+, (n, b) each.

    Returns:
        (..., f).
    """
    left, right = (factor.to(x.dtype) for factor in thin_factors(*vectors))  # (n, k, b)
    n, k, b = left.shape
    projections = torch.einsum("...jb,rkb->...rkj", x.unflatten(-1, (n, b)), right)
    groups = weight.view(n, -1, b)  # (r, f/n * n, b): the chunks of each row of a group one after another
    products = torch.stack([torch.bmm(groups, w.to(weight.dtype).unsqueeze(-1)) for w in left.unbind(1)], dim=1)
    columns = products.view(n, k, -1, n).transpose(2, 3)  # (r, k, j, i)
    return torch.einsum("...rkj,rkji->...ri", projections, columns).flatten(-2)


def published_rotate(x: Tensor, weight: Tensor, rotation: Tensor) -> Tensor:
    """Return W (rotated in the ``published`` layout) x: row group r of W meets I_n (x) R_r.

    Args:
        x: (..., d).
        weight: (f, d).
        rotation: (n, b, b).

    Returns:
        (..., f).
    """
    n, b, _ = rotation.shape
    blocks, rotation = x.unflatten(-1, (n, b)), rotation.to(x.dtype)
    # One row group after another: all rotated copies of x at once could be larger than W.
    groups = zip(weight.chunk(n), rotation, strict=True)
    return torch.cat([F.linear(F.linear(blocks, r).flatten(-2), rows) for rows, r in groups], dim=-1)


def side_factors(*vectors: Tensor) -> tuple[Tensor, Tensor]:
    """Return R - I as a product of two thin matrices, for an export.

    The factors are those of ``thin_factors``, with right's vectors scaled to length one and their lengths in left, as a
    server may round them to fp16, where the sum u^ + v^ itself could be too small.

    Args:
        vectors: u for ETHER, u and v for ETHER+, (n, b) each.

    Returns:
        left (n b, m) and right (m, n b) in fp64, m = n for ETHER and 2n for ETHER+, with R - I = left @ right.
    """
    left, right = thin_factors(*(vector.double() for vector in vectors))  # (n, k, b)
    size = torch.linalg.vector_norm(right, dim=-1, keepdim=True)
    sides = (left * size, F.normalize(right, dim=-1))
    left, right = (torch.cat([torch.block_diag(*w.split(1)) for w in side.unbind(1)]) for side in sides)  # (m, n b)
    return left.T, right


def reflection_factors(
    weight: Tensor, *, output: tuple[Tensor, ...] = (), input: tuple[Tensor, ...] = ()
) -> tuple[Tensor, Tensor]:
    """Return what reflecting a weight adds to it, as a LoRA: R_out W R_in - W = B A.

    R_out W R_in - W = (R_out - I) (W R_in) + W (R_in - I): each side adds its own rank, and in general no fewer do.

    Args:
        weight: W, (f, d).
        output, input: each side's u, or u and v, (n, b); none where the side is not reflected.

    Returns:
        A (r, d) and B (f, r) in W's dtype, r the sum of both sides' n (ETHER) or 2n (ETHER+).
    """
    down, up = [], []
    if input:
        left, right = (factor.to(weight.dtype) for factor in side_factors(*input))
        down, up = [right], [weight @ left]
    if output:
        left_out, right_out = (factor.to(weight.dtype) for factor in side_factors(*output))
        rows = right_out @ weight
        down.append(rows + (rows @ left) @ right if input else rows)
        up.append(left_out)
    return torch.cat(down), torch.cat(up, dim=1)


# ---- which form takes a reflection: kernels or products

FORMS = ("triton", "products")
"""Ways to take a reflection: the fused kernels of ``kernels.py`` where they run, or thin products; the result is one.

On an H100 the kernels take a third of the products' time, and less than a LoRA branch: README, "What a step costs"."""
_chosen = {"form": os.environ.get("ETHER_REFLECTIONS", FORMS[0])}


def check_form() -> None:
    """Raise UserError unless the chosen form is one of ``FORMS``."""
    if _chosen["form"] not in FORMS:
        raise UserError(f"ETHER_REFLECTIONS is {_chosen['form']!r} in the environment; choices: {', '.join(FORMS)}")


@contextmanager
def use_form(name: str) -> Iterator[None]:
    """Take reflections in one of ``FORMS`` inside; elsewhere the environment's ETHER_REFLECTIONS decides."""
    before, _chosen["form"] = _chosen["form"], name
    try:
        yield
    finally:
        _chosen["form"] = before


def _kernels_take(x: Tensor) -> bool:
    """Return True where the kernels take a reflection of x: they run there, and products are not asked for."""
    if _chosen["form"] == "products" or not _kernels_run_on(x.device):
        return False
    from lit_gpt.kernels import LARGEST_BLOCK

    return x.size(-1) <= LARGEST_BLOCK


def _kernels_run_on(device: torch.device) -> bool:
    interpreted = device.type == "cpu" and os.environ.get("TRITON_INTERPRET") == "1"
    return (device.type == "cuda" or interpreted) and _try_kernels(device)


# Dynamo would ignore the cache below and trace into what it keeps. This attribute is all that
# ``torch.compiler.assume_constant_result`` sets, but that imports the compiler first: every script would take a second
# longer to start. A torch without the attribute traces the trial, which fails, says so in one line, and takes products.
_kernels_run_on._dynamo_marked_constant = True


@cache
def _try_kernels(device: torch.device) -> bool:
    """Return whether the kernels run on a device; where they do not, say so on stderr."""
    try:
        from lit_gpt.kernels import try_on

        try_on(device)
    except Exception as error:  # whatever Triton, a driver or a compiler raises: the products need none of them
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        print(f"no Triton kernels on {device} ({reason}): reflections are taken as thin products", file=sys.stderr)
        return False
    return True
