"""Packed attention on a GPU, as far as a CPU can tell, and compiled blocks: how often they compile, and no graph break.

PyTorch's operator for packed samples is real up to its kernel, which is CUDA's: Python wrapper, shapes for compiling and
autograd formula. A kernel for the CPU, which follows the operator's documentation, takes that one's place.
"""

import math

import pytest
import torch
from test_speed import ARCHITECTURES, PACKED, PADDED, assert_same_step, build, samples_of, step
from torch import Tensor

from lit_gpt import attention

CALLS: list[dict] = []
"""What the kernel was called with."""


def documented(q, k, v, bounds_q, bounds_k, max_q, max_k, is_causal, scale, window, **unused) -> Tensor:
    """Attention of (T, H, S) to (T, G, S) as the operator's documentation states it, by a mask of T by T."""
    assert bounds_q.dtype == bounds_k.dtype == torch.int32 and q.stride(-1) == k.stride(-1) == v.stride(-1) == 1
    assert max_q == bounds_q.diff().max() and max_k == bounds_k.diff().max() and scale is None
    assert is_causal == (window == [-1, 0])
    at = torch.arange(len(q))
    sample = torch.bucketize(at, bounds_q, right=True)
    seen = (sample[:, None] == sample) & (at <= at[:, None])  # the right side of the window is 0
    if window[0] >= 0:
        seen &= at >= at[:, None] - window[0]
    k, v = (tensor.repeat_interleave(q.size(1) // k.size(1), dim=1) for tensor in (k, v))
    scores = torch.einsum("qhs,khs->hqk", q, k) / math.sqrt(q.size(-1))
    return torch.einsum("hqk,khs->qhs", scores.masked_fill(~seen, -math.inf).softmax(dim=-1), v)


def kernel(q, k, v, *rest):
    """Forward: the output, and two results for the backward pass."""
    bounds_q, bounds_k, max_q, max_k, is_causal, scale, window, *_ = rest
    CALLS.append({"bounds": bounds_q, "longest": max_q, "window": window, "dtype": q.dtype})
    out = documented(q, k, v, bounds_q, bounds_k, max_q, max_k, is_causal, scale, window)
    return out, q.new_zeros(q.size(1), len(q), dtype=torch.float32), torch.zeros(2, dtype=torch.uint64)


def backward_kernel(grad, q, k, v, out, lse, bounds_q, bounds_k, max_q, max_k, is_causal, rng, scale, window):
    """Backward, by the derivative of ``documented``."""
    rest = (bounds_q, bounds_k, max_q, max_k, is_causal, scale, window)
    return torch.func.vjp(lambda *qkv: documented(*qkv, *rest), q, k, v)[1](grad)


@pytest.fixture
def fused(monkeypatch):
    """Packed samples go through PyTorch's operator, here in fp32 on a CPU."""
    monkeypatch.setattr(attention, "runs_fused", lambda device, dtype, head_size: True)
    CALLS.clear()
    with torch.library._scoped_library("torch_attn", "IMPL") as library:
        library.impl("_varlen_attn", kernel, "CPU")
        library.impl("_varlen_attn_backward", backward_kernel, "CPU")
        yield


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_one_call_for_all_packed_samples_has_the_loss_and_the_gradients_of_padded_ones(fused, architecture):
    model, samples = build(**ARCHITECTURES[architecture]), samples_of(5, 20, 11, 13)
    assert_same_step(step(model, samples, PADDED), step(model, samples, PACKED))
    assert len(CALLS) == 2  # layers
    assert CALLS[0]["bounds"].tolist() == [0, 5, 25, 36, 49] and CALLS[0]["longest"] == 20
    assert CALLS[0]["bounds"].data_ptr() == CALLS[1]["bounds"].data_ptr()  # made once a pass
