"""The mathematics of ETHER, ETHER+ and OFT: tensors in, tensors out, and nothing else (2405.20271).

Per block, with hats for unit vectors:

    ETHER   R(u)    = I - 2 u^ u^T                      a Householder reflection
    ETHER+  R(u, v) = I - u^ u^T + v^ v^T               the identity where v = -u
    OFT     R(A)    = (I + S)(I - S)^-1, S = (A - A^T)/2     Cayley's rotation

A block-diagonal R is never built for the reflections: R x costs one dot product and one axpy a block. Forward passes
apply R to activations; merging applies it to the rows or the columns of a weight, with these same functions:

    W R_in: every row r of W becomes R_in^T r         R_out W: every column c of W becomes R_out c

Reflections are symmetric, so R^T = R; for OFT ``rotate`` is given the transpose.

Shapes: x (..., n, b), already cut into n blocks of b by ``unflatten``; vectors broadcast against it, (n, b) as a rule.
Half precision is computed in fp32 and rounded once; the result has x's dtype.
"""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


def unit(u: Tensor) -> Tensor:
    """Vectors scaled to length one over the last dimension, in fp32 (fp64 for fp64)."""
    u = u.to(working_dtype(u.dtype))
    return u / torch.linalg.vector_norm(u, dim=-1, keepdim=True)


def working_dtype(dtype: torch.dtype) -> torch.dtype:
    """fp32, but fp64 for fp64."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def reflect(
    x: Tensor, u: Tensor, *, about: Tensor | None = None, keep: Tensor | None = None, save_output: bool = False
) -> Tensor:
    """ETHER: x - 2 u^ (u^ . x), block by block.

    Args:
        x: (..., n, b).
        u: (n, b), of any length but zero.
        about: (n, b), the point that R leaves where it is, so that the result is R(x - about) + about: a layer's bias,
            which is not transformed; the origin where it is None.
        keep: (n, 1) of ones and zeros; a block with zero is left as it is (multiplicative dropout, 2311.06243).
        save_output: keep the result for the backward pass in place of x, where others keep the result too.
    """
    return _Reflection.apply(x, about, keep, save_output, u)


def reflect_plus(
    x: Tensor,
    u: Tensor,
    v: Tensor,
    *,
    about: Tensor | None = None,
    keep: Tensor | None = None,
    save_output: bool = False,
) -> Tensor:
    """ETHER+: x + (v^ (v^ . x) - u^ (u^ . x)), block by block; x itself, bit for bit, where v = -u.

    Args: as for ``reflect``, with a second vector.
    """
    return _Reflection.apply(x, about, keep, save_output, u, v)


def cayley(a: Tensor) -> Tensor:
    """OFT's rotations (..., b, b) from free matrices (..., b, b): Cayley's (I + S)(I - S)^-1."""
    a = a.to(working_dtype(a.dtype))
    s = (a - a.mT) / 2
    identity = torch.eye(a.size(-1), device=a.device, dtype=a.dtype)
    # The two factors commute, so the inverse can stand on the left, where `solve` puts it.
    return torch.linalg.solve(identity - s, identity + s)


def rotate(x: Tensor, rotation: Tensor, *, about: Tensor | None = None) -> Tensor:
    """R x, block by block, or x + (R - I)(x - about), which for R = I is x bit for bit.

    Args:
        x: (..., n, b).
        rotation: (n, b, b).
        about: (n, b), the point that R leaves where it is; the origin where it is None.
    """
    if about is not None:
        identity = torch.eye(rotation.size(-1), device=rotation.device, dtype=rotation.dtype)
        return x + rotate(x - about, rotation - identity)
    rotation = rotation.to(x.dtype)  # a product of this size belongs to the dtype that the weights multiply in
    return torch.einsum("...nb,ncb->...nc", x, rotation)


def axis_angle(u: Tensor, v: Tensor) -> Tensor:
    """The angle between the axes of vectors (..., b), 0 to pi / 2: (...); exact for small angles too."""
    u, v = unit(u), unit(v)
    along = _dot(u, v)
    return torch.atan2(torch.linalg.vector_norm(v - along * u, dim=-1), along.squeeze(-1).abs())


def _dot(x: Tensor, y: Tensor) -> Tensor:
    return (x * y).sum(dim=-1, keepdim=True)


def _factors_and_units(vectors: Sequence[Tensor]) -> tuple[tuple[float, Tensor], ...]:
    """The factors and unit vectors w of R = I + sum of factor w w^T."""
    units = [unit(vector) for vector in vectors]
    return ((-2.0, units[0]),) if len(units) == 1 else ((-1.0, units[0]), (1.0, units[1]))


class _Reflection(torch.autograd.Function):
    """Saves x or R x, and a number a block; autograd's own graph would keep several tensors of x's size.

    With R = I + sum_k s_k w_k w_k^T, c the point that it leaves alone, a_k = w_k . (x - c) and g the incoming gradient:
        y = x + sum_k s_k a_k w_k
        dL/dx = R g
        dL/dw_k = s_k sum over positions of a_k g + (w_k . g) (x - c)
        dL/du = (dL/dw - w (w . dL/dw)) / |u|, for w = u / |u|
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, about: Tensor | None, keep: Tensor | None, save_output: bool, *vectors: Tensor
    ) -> Tensor:
        alongs, update = _update(x, about, keep, vectors)
        y = (x.to(update.dtype) + update).to(x.dtype)
        ctx.save_output = save_output
        ctx.save_for_backward(y if save_output else x, about, keep, *alongs, *vectors)
        return y

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, about, keep, *rest = ctx.saved_tensors
        alongs, vectors = rest[: len(rest) // 2], rest[len(rest) // 2 :]
        updates = _factors_and_units(vectors)
        grad_alongs, grad_update = _update(grad, None, keep, vectors)
        grad_x = (grad.to(grad_update.dtype) + grad_update).to(grad.dtype) if ctx.needs_input_grad[0] else None
        x, grad = x.to(grad_update.dtype), grad.to(grad_update.dtype)
        if ctx.save_output:
            for along, (factor, w) in zip(alongs, updates, strict=True):
                x = x - factor * along * w
        grad_vectors = []
        for vector, along, grad_along, (factor, w) in zip(vectors, alongs, grad_alongs, updates, strict=True):
            grad_w = (along * grad + grad_along * x).sum_to_size(w.shape)
            if about is not None:
                grad_w = grad_w - grad_along.sum_to_size(len(w), 1) * about
            length = torch.linalg.vector_norm(vector.to(w.dtype), dim=-1, keepdim=True)
            grad_vectors.append(((grad_w - w * _dot(w, grad_w)) * (factor / length)).to(vector.dtype))
        return grad_x, None, None, None, *grad_vectors


def _update(
    x: Tensor, about: Tensor | None, keep: Tensor | None, vectors: Sequence[Tensor]
) -> tuple[list[Tensor], Tensor]:
    """The dot products a_k = w_k . (x - about), zero where a block is dropped, and the update sum_k s_k a_k w_k.

    The terms are summed before x is added, each product rounded alone: they cancel exactly at v = -u.
    """
    x = x.to(working_dtype(x.dtype))
    alongs, update = [], None
    for factor, w in _factors_and_units(vectors):
        along = _dot(x, w) if about is None else _dot(x, w) - _dot(about.to(w.dtype), w)
        alongs.append(along if keep is None else along * keep)
        term = factor * alongs[-1] * w
        update = term if update is None else update + term
    return alongs, update


def published_columns(weight: Tensor, w: Tensor) -> Tensor:
    """What the ``published`` block layout needs of a weight: W_r (e_j (x) w_r), one vector for each r and j.

    The original code multiplies row group r of W (f/n rows) by I_n (x) R_r: every chunk j of the input meets the same
    R_r. With R_r = I + s w w^T this adds s sum_j [W_r (e_j (x) w_r)] (w_r . x_j) to y_r, so the products in brackets
    are all that has to be known.

    Args:
        weight: (f, d), row-major.
        w: (n, b) unit vectors, b = d / n.

    Returns:
        (n, n, f/n): [r, j, i].
    """
    f, _ = weight.shape
    n, b = w.shape
    products = torch.bmm(weight.view(n, f, b), w.to(weight.dtype).unsqueeze(-1))  # (n, f/n * n, 1): r; i, j
    return products.view(n, f // n, n).transpose(1, 2)


def published_update(x: Tensor, weight: Tensor, *vectors: Tensor) -> Tensor:
    """(W (reflected in the ``published`` layout) - W) x, without a tensor of W's size.

    Args:
        x: (..., d).
        weight: (f, d).
        vectors: u for ETHER, u and v for ETHER+, (n, b) each.

    Returns:
        (..., f).
    """
    update: Tensor | None = None
    for factor, w in _factors_and_units(vectors):
        along = torch.einsum("...jb,rb->...rj", x.unflatten(-1, w.shape), w.to(x.dtype))  # (..., r, j)
        term = factor * torch.einsum("...rj,rji->...ri", along, published_columns(weight, w)).flatten(-2)
        update = term if update is None else update + term
    return update


def published_rotate(x: Tensor, weight: Tensor, rotation: Tensor) -> Tensor:
    """W (rotated in the ``published`` layout) x: row group r of W meets I_n (x) R_r.

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


def low_rank(*vectors: Tensor) -> tuple[Tensor, Tensor]:
    """R - I as a product of two thin matrices.

    ETHER's is -2 u^ u^T. ETHER+'s is written with the unit vectors c along u^ + v^ and e along v^ - u^:

        v^ v^T - u^ u^T = sin(angle between u and v) (e c^T + c e^T)

    u^ and v^ themselves would do, but they nearly cancel where a block has learnt little: rounding them to bf16 could
    exceed the update, while rounding these costs it no more than bf16's own precision.

    Args:
        vectors: u for ETHER, u and v for ETHER+, (n, b) each.

    Returns:
        left (n b, m) and right (m, n b) in fp64, m = n for ETHER and 2n for ETHER+, with R - I = left @ right.
    """
    u, *rest = (unit(vector.double()) for vector in vectors)
    if not rest:
        left, right = (-2 * u,), (u,)
    else:
        v = rest[0] * torch.where(_dot(u, rest[0]) < 0, -1.0, 1.0)  # the sign of v is free
        total, difference = u + v, v - u
        c, e = F.normalize(total, dim=-1), F.normalize(difference, dim=-1)
        sine = torch.linalg.vector_norm(total, dim=-1) * torch.linalg.vector_norm(difference, dim=-1) / 2
        left, right = (sine[:, None] * e, sine[:, None] * c), (c, e)
    spread = [torch.cat([torch.block_diag(*side.split(1)) for side in sides]) for sides in (left, right)]  # (m, n b)
    return spread[0].T, spread[1]


def reflection_factors(
    weight: Tensor, *, output: tuple[Tensor, ...] = (), input: tuple[Tensor, ...] = ()
) -> tuple[Tensor, Tensor]:
    """What reflecting a weight adds to it, as a LoRA: R_out W R_in - W = B A.

    R_out W R_in - W = (R_out - I) (W R_in) + W (R_in - I): each side adds its own rank, and in general no fewer do.

    Args:
        weight: W, (f, d).
        output, input: each side's u, or u and v, (n, b); none where the side is not reflected.

    Returns:
        A (r, d) and B (f, r) in W's dtype, r the sum of both sides' n (ETHER) or 2n (ETHER+).
    """
    down, up = [], []
    if input:
        left, right = (factor.to(weight.dtype) for factor in low_rank(*input))
        down, up = [right], [weight @ left]
    if output:
        left_out, right_out = (factor.to(weight.dtype) for factor in low_rank(*output))
        rows = right_out @ weight
        down.append(rows + (rows @ left) @ right if input else rows)
        up.append(left_out)
    return torch.cat(down), torch.cat(up, dim=1)
