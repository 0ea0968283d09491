"""Attention of a sequence to itself or to cached keys, and of samples that are packed one after another into one row.

Packed samples need no mask of T by T and no work on pairs from different samples: where PyTorch's flash attention
takes them whole (16 bits on an NVIDIA GPU), one call attends in all of them; elsewhere each sample is a call.
To ``torch.compile`` both are one operator: a block has no graph break, and is not compiled anew for other lengths.

Shapes: B batch, T tokens, H query heads, G key/value groups, S head size.
"""

from collections.abc import Sequence
from functools import partial
from itertools import accumulate
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from lit_gpt.config import Config
from lit_gpt.errors import UserError

# PyTorch prefers cuDNN's attention on an H100 and newer cards. cuDNN builds a plan for every new shape and set of
# strides, forward and backward, in 50 to 500 ms each; lengths that vary, packed ones above all, are always new.
# Flash attention takes any length at once.
torch.backends.cuda.enable_cudnn_sdp(False)
HAS_GQA = torch.__version__ >= (2, 12)
"""PyTorch's attention of packed samples takes keys and values that several query heads share."""

Lengths = Sequence[int] | None
"""Of samples, one after another."""
Trees = Sequence[tuple[int, Sequence[int]]] | None
"""Of trees, one after another: the lengths of a trunk and of the branches that continue it."""


def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, cap: float = 0.0, *, is_causal: bool) -> Tensor:
    """Return the attention of (B, H, T, S) queries to (B, G, T', S) keys and values; a mask replaces causality.

    With a cap, scores are bent by a tanh to stay below it (Gemma 2); no fused kernel of PyTorch does that.
    """
    if cap:
        k, v = (tensor.repeat_interleave(q.size(1) // k.size(1), dim=1) for tensor in (k, v))
        scores = cap * torch.tanh(q @ k.mT / (cap * q.size(-1) ** 0.5))  # (B, H, T, T')
        if mask is None and is_causal:
            mask = torch.ones(scores.shape[-2:], dtype=torch.bool, device=q.device).tril()
        if mask is not None:
            scores = scores.masked_fill(~mask, -torch.inf)
        return scores.softmax(dim=-1, dtype=torch.float32).to(q.dtype) @ v
    # While a block is compiled, comparisons of sizes are symbols, which this function refuses: the graph would break.
    flags = dict(is_causal=bool(is_causal) and mask is None, enable_gqa=bool(q.size(1) != k.size(1)))
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, **flags)


def attention_mask(
    window: int | None, start: int, trunk: int, device: torch.device, branches: Sequence[int] = ()
) -> Tensor | None:
    """Return (T, start + T), true where a query may look; None where plain causal attention says the same.

    T are the positions of a trunk from ``start`` on and then of its branches, if any, which do not see one another.
    """
    fork = start + trunk
    if not branches and (start == 0 or trunk == 1) and (window is None or fork <= window):
        return None
    spans = [(0, fork), *((fork, fork + length) for length in branches)]
    runs = [torch.arange(*span, device=device) for span in spans]
    positions = torch.cat(runs)  # (start + T,)
    branch = torch.cat([torch.full_like(run, number) for number, run in enumerate(runs)])  # 0 in the trunk
    mask = (positions <= positions[start:, None]) & ((branch == 0) | (branch == branch[start:, None]))
    return mask if window is None else mask & (positions > positions[start:, None] - window)


class KVCache:
    """Keys and values of the positions seen so far, of shape (B, G, longest, S) each."""

    def __init__(self, shape: tuple[int, int, int, int], device: torch.device, dtype: torch.dtype) -> None:
        self.k = torch.zeros(shape, device=device, dtype=dtype)
        self.v = torch.zeros(shape, device=device, dtype=dtype)

    def update(self, k: Tensor, v: Tensor, *, start: int) -> tuple[Tensor, Tensor]:
        """Store (B, G, T, S) keys and values at ``start`` and return all up to ``start + T``."""
        end = start + k.size(2)
        if end > self.k.size(2):
            raise UserError(f"position {end} does not fit the cache of {self.k.size(2)} positions")
        self.k[:, :, start:end] = k
        self.v[:, :, start:end] = v
        return self.k[:, :, :end].to(k.dtype), self.v[:, :, :end].to(v.dtype)

    def followed_by(self, k: Tensor, v: Tensor, *, start: int) -> tuple[Tensor, Tensor]:
        """Return the first ``start`` keys and values and then (B, G, T, S) others, which are not stored."""
        before = self.k[:, :, :start].to(k.dtype), self.v[:, :, :start].to(v.dtype)
        return torch.cat([before[0], k], dim=2), torch.cat([before[1], v], dim=2)


class Packing:
    """Samples of these lengths, one after another along T; made once a pass, read by every layer.

    An object, not a list: ``torch.compile`` would compile anew for lists of other lengths.

    Attributes:
        fused: one call attends in all samples, and needs no mask for a sliding window.
        mask: of the longest sample, where it needs one.
        spans: first position and end of each sample.
    """

    def __init__(
        self, lengths: Sequence[int], config: Config, window: int | None, *, device: torch.device, dtype: torch.dtype
    ) -> None:
        kind = device.type
        self.lengths, self.longest = list(lengths), max(lengths)
        self.dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else dtype
        self.fused = not config.attention_softcap and runs_fused(device, self.dtype, config.head_size)
        # A window of w ends at the token itself: flash attention counts the w - 1 before it, and -1 for all of them.
        self.window = (-1 if window is None else window - 1, 0)
        bounds = torch.tensor([0, *accumulate(lengths)], dtype=torch.int32, device="cpu")
        self.bounds = bounds.to(device, non_blocking=True) if self.fused else bounds
        self.mask = None if self.fused else attention_mask(window, 0, self.longest, device)
        self.spans = [(0, length) for length in lengths]

    def attend(self, q: Tensor, k: Tensor, v: Tensor, cap: float = 0.0) -> Tensor:
        """Return the causal attention inside each sample, (1, H, T, S), of q (1, H, T, S), k and v (1, G, T, S)."""
        q, k, v = (tensor.to(self.dtype) for tensor in (q, k, v))  # rotated q and k are fp32 under autocast
        if self.fused:
            # Here: it imports the compiler, which would double the time that a script takes to start.
            from torch.nn.attention.varlen import varlen_attn

            options: dict[str, Any] = {"enable_gqa": True} if HAS_GQA else {}
            if not HAS_GQA:  # every query head gets a copy of its group's keys and values
                k, v = (tensor.repeat_interleave(q.size(1) // k.size(1), dim=1) for tensor in (k, v))
            rows = (tensor.transpose(1, 2).squeeze(0) for tensor in (q, k, v))  # (T, H or G, S)
            sizes = (self.bounds, self.bounds, self.longest, self.longest)  # of queries and of keys
            return varlen_attn(*rows, *sizes, window_size=self.window, **options).transpose(0, 1).unsqueeze(0)
        if torch.compiler.is_compiling():
            return attend_packed(q, k, v, self.mask, cap, self.bounds)
        return attend_each(q, k, v, self.mask, cap, lengths=self.lengths)


class Forest:
    """Trees, one after another along T: each a trunk and branches that continue it and do not see one another.

    Evaluation's: a question and its answers. All continue the same ``start`` positions of the cache.

    Attributes:
        lengths: of the trees.
        spans: first position and end of each trunk and branch.
    """

    def __init__(self, trees: Trees, window: int | None, start: int, device: torch.device) -> None:
        self.lengths = [trunk + sum(branches) for trunk, branches in trees]
        self.masks = [attention_mask(window, start, trunk, device, branches) for trunk, branches in trees]
        self.spans: list[tuple[int, int]] = []
        for trunk, branches in trees:
            fork = start + trunk
            self.spans += [(start, fork), *((fork, fork + length) for length in branches)]

    def attend(self, q: Tensor, k: Tensor, v: Tensor, cap: float = 0.0) -> Tensor:
        """Return the attention inside each tree, (1, H, T, S), of q (1, H, T, S) to k and v (1, G, start + T, S)."""
        start = k.size(2) - q.size(2)
        (before_k, *ks), (before_v, *vs) = (tensor.split([start, *self.lengths], dim=2) for tensor in (k, v))
        found = []
        for own_q, own_k, own_v, mask in zip(q.split(self.lengths, dim=2), ks, vs, self.masks, strict=True):
            if start:
                own_k, own_v = torch.cat([before_k, own_k], dim=2), torch.cat([before_v, own_v], dim=2)
            found.append(attend(own_q, own_k, own_v, mask, cap, is_causal=own_q.size(2) > 1))
        return torch.cat(found, dim=2)


def runs_fused(device: torch.device, dtype: torch.dtype, head_size: int) -> bool:
    """Return True where PyTorch's flash attention takes packed samples of this kind, backward pass included."""
    return (
        device.type == "cuda"
        and torch.version.hip is None  # sliding windows are missing there
        and torch.backends.cuda.is_flash_attention_available()
        and torch.cuda.get_device_capability(device) >= (8, 0)
        and dtype in (torch.bfloat16, torch.float16)
        and head_size % 8 == 0
        and head_size <= 192  # larger ones have no backward pass on consumer cards
    )


def attend_each(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, cap: float, *, lengths: list[int]) -> Tensor:
    """``attend`` inside one sample after the other."""
    parts = zip(*(tensor.split(lengths, dim=2) for tensor in (q, k, v)), strict=True)
    masks = (None if mask is None else mask[:length, :length] for length in lengths)
    return torch.cat([attend(*part, own, cap, is_causal=True) for part, own in zip(parts, masks, strict=True)], dim=2)


@torch.library.custom_op("lit_gpt::attend_packed", mutates_args=())
def attend_packed(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, cap: float, bounds: Tensor) -> Tensor:
    """``attend_each`` as a single operator for ``torch.compile``; bounds (n + 1,) on the CPU."""
    return attend_each(q, k, v, mask, cap, lengths=bounds.diff().tolist()).contiguous()


@torch.library.custom_op("lit_gpt::attend_packed_backward", mutates_args=())
def attend_packed_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, cap: float, bounds: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of q, k and v; the forward pass is computed once more for them."""
    _, pull_back = torch.func.vjp(partial(attend_each, mask=mask, cap=cap, lengths=bounds.diff().tolist()), q, k, v)
    dq, dk, dv = pull_back(grad)
    return dq.contiguous(), dk.contiguous(), dv.contiguous()


def _save_inputs(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    *qkv, mask, ctx.cap, bounds = inputs
    ctx.save_for_backward(*qkv, mask, bounds)


def _gradients(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    *tensors, bounds = ctx.saved_tensors
    return *attend_packed_backward(grad, *tensors, ctx.cap, bounds), None, None, None


attend_packed.register_fake(lambda q, *rest: q.new_empty(q.shape))
attend_packed.register_autograd(_gradients, setup_context=_save_inputs)
attend_packed_backward.register_fake(lambda grad, *qkv: tuple(tensor.new_empty(tensor.shape) for tensor in qkv[:3]))
