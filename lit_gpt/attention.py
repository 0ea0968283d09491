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

from lit_gpt.config import Config, LayerKind
from lit_gpt.errors import UserError
from lit_gpt.rope import rope_angles

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


def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, cap: float = 0.0) -> Tensor:
    """Return the attention of (B, H, T, S) queries to (B, G, T', S) keys and values, causal where there is no mask.

    With a cap, scores are bent by a tanh to stay below it (Gemma 2); no fused kernel of PyTorch does that.
    """
    shape, is_causal = q.shape, mask is None
    if q.size(2) == 1:
        # The query heads of a group become queries that read its keys once: bf16 on a CPU, 4 times as fast.
        q, is_causal = q.reshape(q.size(0), k.size(1), -1, q.size(-1)), False  # (B, G, H / G, S)
    if cap:
        k, v = (tensor.repeat_interleave(q.size(1) // k.size(1), dim=1) for tensor in (k, v))
        scores = cap * torch.tanh(q @ k.mT / (cap * q.size(-1) ** 0.5))  # (B, H, T, T')
        if is_causal:
            mask = torch.ones(scores.shape[-2:], dtype=torch.bool, device=q.device).tril()
        if mask is not None:
            scores = scores.masked_fill(~mask, -torch.inf)
        return (scores.softmax(dim=-1, dtype=torch.float32).to(q.dtype) @ v).reshape(shape)
    # While a block is compiled, a comparison of sizes is a symbol, which this function refuses: the graph would break.
    gqa = bool(q.size(1) != k.size(1))
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=is_causal, enable_gqa=gqa).reshape(shape)


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


class AttentionContext:
    """The input of attention beside x: who sees whom, and the positions; made once a pass for a kind of layer.

    Each row is one sequence. Or the only row is packed with trees, one after another along T: each a trunk, and
    branches that continue it and do not see one another. Training's samples are trunks alone, evaluation's trees are
    questions with their answers. All sequences and trunks begin at position ``start``, behind what the cache holds.

    An object, not lists: ``torch.compile`` would compile anew for lists of other lengths.

    Attributes:
        start: None goes without the cache.
        packed: false for one sequence a row.
        lengths: of the trees.
        rope: cosines and sines of the positions; None where the layer knows no positions.
        fused: one call attends in all trees, and needs no masks.
        masks: of the trees, where they need one.
    """

    def __init__(
        self, config: Config, kind: LayerKind, x: Tensor, start: int | None, lengths: Lengths, trees: Trees
    ) -> None:
        self.window, self.cap, self.start = kind.window, config.attention_softcap or 0.0, start
        self.packed = bool(lengths or trees)
        first, device = start or 0, x.device
        trees = trees or [(length, ()) for length in lengths or [x.size(1)]]
        spans: list[tuple[int, int]] = []  # first position and end of each trunk and branch
        for trunk, branches in trees:
            fork = first + trunk
            spans += [(first, fork), *((fork, fork + length) for length in branches)]
        if (end := max(end for _, end in spans)) > config.block_size:
            raise UserError(f"{end} tokens do not fit the model's context of {config.block_size}")
        flags = dict(device=device, dtype=x.dtype, local=kind.rope == "local")
        self.rope = None if kind.rope == "none" else rope_angles(config, spans, **flags)
        self.lengths = [trunk + sum(branches) for trunk, branches in trees]
        self.longest = max(self.lengths)
        autocast = self.packed and torch.is_autocast_enabled(device.type)  # the meta device has none, and raises
        self.dtype = torch.get_autocast_dtype(device.type) if autocast else x.dtype
        self.fused = bool(lengths) and not self.cap and runs_fused(device, self.dtype, config.head_size)
        if lengths:
            bounds = torch.tensor([0, *accumulate(lengths)], dtype=torch.int32, device="cpu")
            self.bounds = bounds.to(device, non_blocking=True) if self.fused else bounds
        masked = [] if self.fused else trees
        self.masks = [attention_mask(kind.window, first, trunk, device, branches) for trunk, branches in masked]

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Return the attention (B, H, T, S) of q (B, H, T, S) to k and v (B, G, start + T, S)."""
        if not self.packed:
            return attend(q, k, v, self.masks[0], self.cap)
        q, k, v = (tensor.to(self.dtype) for tensor in (q, k, v))  # rotated q and k are fp32 under autocast
        if self.fused:
            # Here: it imports the compiler, which would double the time that a script takes to start.
            from torch.nn.attention.varlen import varlen_attn

            options: dict[str, Any] = {"enable_gqa": True} if HAS_GQA else {}
            if not HAS_GQA:  # every query head gets a copy of its group's keys and values
                k, v = (tensor.repeat_interleave(q.size(1) // k.size(1), dim=1) for tensor in (k, v))
            # A window of w ends at the token itself: flash attention counts the w - 1 before it, and -1 for all.
            options["window_size"] = (-1 if self.window is None else self.window - 1, 0)
            rows = (tensor.transpose(1, 2).squeeze(0) for tensor in (q, k, v))  # (T, H or G, S)
            sizes = (self.bounds, self.bounds, self.longest, self.longest)  # of queries and of keys
            return varlen_attn(*rows, *sizes, **options).transpose(0, 1).unsqueeze(0)
        if torch.compiler.is_compiling():
            return attend_samples(q, k, v, self.bounds, self.window, self.cap)
        return attend_trees(q, k, v, self.lengths, self.masks, self.cap)


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


def attend_trees(
    q: Tensor, k: Tensor, v: Tensor, lengths: list[int], masks: Sequence[Tensor | None], cap: float
) -> Tensor:
    """``attend`` inside one tree after the other, each behind the keys and values that stand before all of them."""
    start = k.size(2) - q.size(2)
    (before_k, *ks), (before_v, *vs) = (tensor.split([start, *lengths], dim=2) for tensor in (k, v))
    found = []
    for own_q, own_k, own_v, mask in zip(q.split(lengths, dim=2), ks, vs, masks, strict=True):
        if start:
            own_k, own_v = torch.cat([before_k, own_k], dim=2), torch.cat([before_v, own_v], dim=2)
        found.append(attend(own_q, own_k, own_v, mask, cap))
    return torch.cat(found, dim=2)


# ------------------------------------------------------------------------- packed samples as an operator, to compile
def attend_bounded(q: Tensor, k: Tensor, v: Tensor, *, bounds: Tensor, window: int | None, cap: float) -> Tensor:
    """``attend_trees`` for trunks alone between these bounds (n + 1,), which are on the CPU."""
    lengths = bounds.diff().tolist()
    return attend_trees(q, k, v, lengths, [attention_mask(window, 0, length, q.device) for length in lengths], cap)


@torch.library.custom_op("lit_gpt::attend_samples", mutates_args=())
def attend_samples(q: Tensor, k: Tensor, v: Tensor, bounds: Tensor, window: int | None, cap: float) -> Tensor:
    """``attend_bounded``."""
    return attend_bounded(q, k, v, bounds=bounds, window=window, cap=cap).contiguous()


@torch.library.custom_op("lit_gpt::attend_samples_backward", mutates_args=())
def attend_samples_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, bounds: Tensor, window: int | None, cap: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of q, k and v; the forward pass is computed once more for them."""
    _, pull_back = torch.func.vjp(partial(attend_bounded, bounds=bounds, window=window, cap=cap), q, k, v)
    dq, dk, dv = pull_back(grad)
    return dq.contiguous(), dk.contiguous(), dv.contiguous()


def _save_inputs(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    *tensors, ctx.window, ctx.cap = inputs
    ctx.save_for_backward(*tensors)


def _gradients(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    return *attend_samples_backward(grad, *ctx.saved_tensors, ctx.window, ctx.cap), None, None, None


attend_samples.register_fake(lambda q, *rest: q.new_empty(q.shape))
attend_samples.register_autograd(_gradients, setup_context=_save_inputs)
attend_samples_backward.register_fake(lambda grad, *qkv: tuple(tensor.new_empty(tensor.shape) for tensor in qkv[:3]))
