"""Compute the cross entropy without ever holding the logits of all positions.

At a vocabulary of 128,000, 2,048 positions have a gigabyte of fp32 logits, of which a plain cross entropy holds several
copies at its peak: often more than all else that a step of finetuning needs. Here some positions at a time go through
the head, and their part of the gradient is taken at once, while their logits are there: no logits are kept, and none
are computed twice.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

CHUNK_ENTRIES = 2**25
"""Logits at a time; 128 MiB in fp32."""
MULTIPLE = 16
"""The number of rows of a product is rounded up to it.

On a CPU oneDNN computes products in 16 bits. It compiles them anew for each number of rows and keeps what it compiled
for as long as the process lives: 0.8 MB a product, 5 to 11 MB for attention's backward pass (torch 2.13, two threads).
A run whose batches had every length never stopped growing.
"""
Finish = Callable[[Tensor], Tensor]
IGNORE_INDEX = -100
"""A target with this value has no loss."""


def chunked_cross_entropy(
    head: nn.Module, x: Tensor, targets: Tensor, *, reduction: str = "sum", finish: Finish = lambda logits: logits
) -> Tensor:
    """Return the cross entropy of ``finish(head(x))``, in fp32.

    Args:
        head: (N, d) states to (N, V) logits, row by row. Its dropout, if it has any, draws for each chunk.
        x: (N, d).
        targets: (N,) ids.
        reduction: ``sum``, or ``none`` for the N losses.
        finish: maps what the head gives to logits, row by row.

    Returns:
        A scalar or (N,). The sum can be differentiated once.
    """
    if reduction == "sum" and torch.is_grad_enabled():
        return _SummedLoss.apply(head, finish, x, targets, *(p for p in head.parameters() if p.requires_grad))
    losses = [_loss(head, finish, x[rows], targets[rows], reduction) for rows in _chunks(head, len(x))]
    return torch.cat(losses)[: len(x)] if reduction == "none" else torch.stack(losses).sum()


def _chunks(head: nn.Module, n_rows: int) -> list[slice]:
    """Return slices of rows, whose logits are computed at a time."""
    size = max(1, CHUNK_ENTRIES // head.out_features // MULTIPLE) * MULTIPLE
    return [slice(start, start + size) for start in range(0, n_rows, size)]


def _loss(head: nn.Module, finish: Finish, x: Tensor, targets: Tensor, reduction: str) -> Tensor:
    """Return the loss of some rows, filled up to ``MULTIPLE`` by rows without a target, whose loss is 0."""
    fill = -len(x) % MULTIPLE
    x, targets = F.pad(x, (0, 0, 0, fill)), F.pad(targets, (0, fill), value=IGNORE_INDEX)
    return F.cross_entropy(finish(head(x)).float(), targets, reduction=reduction)


class _SummedLoss(torch.autograd.Function):
    """The summed loss; the forward pass takes the gradients of x and of the head's parameters with it."""

    @staticmethod
    def forward(
        ctx: Any, head: nn.Module, finish: Finish, x: Tensor, targets: Tensor, *parameters: nn.Parameter
    ) -> Tensor:
        total = x.new_zeros((), dtype=torch.float32)
        of_x, *of_parameters = (torch.zeros_like(tensor) for tensor in (x, *parameters))
        for rows in _chunks(head, len(x)):
            with torch.enable_grad():
                part = x[rows].detach().requires_grad_()
                loss = _loss(head, finish, part, targets[rows], "sum")
            of_x[rows], *of_this = torch.autograd.grad(loss, (part, *parameters))
            for gradient, more in zip(of_parameters, of_this, strict=True):
                gradient += more
            total += loss.detach()
        ctx.save_for_backward(of_x, *of_parameters)
        return total

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        of_x, *of_parameters = (gradient * upstream for gradient in ctx.saved_tensors)
        return None, None, of_x, None, *of_parameters
