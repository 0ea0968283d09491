"""Packed attention on a GPU, as far as a CPU can tell; compiled blocks: how often they compile, and no graph break.

PyTorch's operator for packed samples is real up to its kernel, which is CUDA's: Python wrapper, shapes for compiling,
autograd formula. A kernel for the CPU, which follows the operator's documentation, takes that one's place.
"""

import math

import pytest
import torch
from helpers import ARCHITECTURES, PACKED, PADDED, assert_same_step, etherplus_model, samples_of, step, tiny_model
from torch import Tensor
from torch._dynamo.utils import counters

from lit_gpt import GPT, attention
from lit_gpt.adapter import mark_only_adapter_as_trainable
from lit_gpt.attention import runs_fused
from lit_gpt.ether import EtherConfig, add_ether
from lit_gpt.launch import check_compiler
from lit_gpt.lora import LoraConfig, add_lora
from lit_gpt.quantize import quantize_model

CALLS: list[dict] = []
"""The kernel's arguments."""


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
    out = torch.empty_like(q).copy_(documented(q, k, v, bounds_q, bounds_k, max_q, max_k, is_causal, scale, window))
    return out, q.new_zeros(q.size(1), len(q), dtype=torch.float32), torch.zeros(2, dtype=torch.uint64)


def backward_kernel(grad, q, k, v, out, lse, bounds_q, bounds_k, max_q, max_k, is_causal, rng, scale, window):
    """Backward, by the derivative of ``documented``."""
    rest = (bounds_q, bounds_k, max_q, max_k, is_causal, scale, window)
    gradients = torch.func.vjp(lambda *qkv: documented(*qkv, *rest), q, k, v)[1](grad)
    return tuple(torch.empty_like(x).copy_(gradient) for x, gradient in zip((q, k, v), gradients, strict=True))


@pytest.fixture
def fused(monkeypatch):
    """Packed samples go through PyTorch's operator, here in fp32 on a CPU."""
    monkeypatch.setattr(attention, "runs_fused", lambda device, dtype, head_size: True)
    CALLS.clear()
    with torch.library._scoped_library("torch_attn", "IMPL") as library:
        library.impl("_varlen_attn", kernel, "CPU")
        library.impl("_varlen_attn_backward", backward_kernel, "CPU")
        yield


@pytest.mark.parametrize("has_gqa", [True, False])  # False: PyTorch 2.11's operator
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_one_call_for_all_packed_samples_has_the_loss_and_the_gradients_of_padded_ones(
    fused, architecture, has_gqa, monkeypatch
):
    monkeypatch.setattr(attention, "HAS_GQA", has_gqa)
    model, samples = etherplus_model(**ARCHITECTURES[architecture]), samples_of(5, 20, 11, 13)
    assert_same_step(step(model, samples, PADDED), step(model, samples, PACKED))
    assert len(CALLS) == 2  # layers
    assert CALLS[0]["bounds"].tolist() == [0, 5, 25, 36, 49] and CALLS[0]["longest"] == 20
    assert CALLS[0]["bounds"].data_ptr() == CALLS[1]["bounds"].data_ptr()  # made once a pass


METHODS = {
    "ether": EtherConfig(Htype="ether", nb=2, projection=True, block_dropout=0.1),
    "etherplus": EtherConfig(Htype="etherplus", nb=2, projection=True),
    "oft": EtherConfig(Htype="oft", nb=2, projection=True),
    "lora": LoraConfig(r=2, projection=True, dropout=0.1),
    "full": None,
}


def compiled(kind: str, quantize: str | None = None) -> GPT:
    """A tiny model of one block, compiled for a method; its base quantized where asked for."""
    model = tiny_model(n_layer=1)
    if quantize:
        quantize_model(model, quantize, model.state_dict(), dtype=torch.float32, device="cpu")
    if METHODS[kind] is not None:
        (add_lora if kind == "lora" else add_ether)(model, METHODS[kind])
        mark_only_adapter_as_trainable(model)
    torch._dynamo.reset()
    counters.clear()
    model.transformer.h[0].compile(dynamic=True, backend="aot_eager")
    return model


@pytest.mark.parametrize("way", ["as on a GPU", "as on a CPU"])
def test_a_compiled_block_has_no_graph_break_and_is_compiled_once_for_all_lengths(request, way):
    if way == "as on a GPU":
        request.getfixturevalue("fused")
    model = compiled("etherplus")
    batches = [(PACKED, (9, 14)), (PADDED, (9, 14)), (PACKED, (5, 6, 7, 8)), (PADDED, (20, 3, 4))]
    with torch.compiler.set_stance("force_eager"):
        expected = [step(model, samples_of(*lengths), batching) for batching, lengths in batches]
    found = [step(model, samples_of(*lengths), batching) for batching, lengths in batches]
    for one, other in zip(expected, found, strict=True):
        assert_same_step(one, other)
    assert counters["stats"]["unique_graphs"] == 2 and not counters["graph_break"]  # packed and padded


@pytest.mark.parametrize("kind", METHODS)
def test_each_method_compiles_a_block_once_with_checkpointing(kind):
    model = compiled(kind)
    model.activation_checkpointing = True
    step(model, samples_of(9, 14), PACKED)
    with torch.compiler.set_stance("fail_on_recompile"):
        step(model, samples_of(5, 6, 7, 8), PACKED)
    assert counters["stats"]["unique_graphs"] == 1 and not counters["graph_break"]


def test_on_a_base_in_nf4_a_block_is_compiled_once():
    model = compiled("ether", "bnb.nf4")
    step(model, samples_of(9, 14), PADDED)
    with torch.compiler.set_stance("fail_on_recompile"):
        step(model, samples_of(5, 6, 7, 8), PADDED)
    assert counters["stats"]["unique_graphs"] == 1 and not counters["graph_break"]


def test_no_attention_builds_a_plan_for_each_length():
    """An H100 spent over 1 s a pass on cuDNN's plans for packed samples: 677 tokens/s of a model of 1.2B."""
    assert not torch.backends.cuda.cudnn_sdp_enabled()


def test_where_packed_samples_are_one_call(monkeypatch):
    gpu, bf16 = torch.device("cuda"), torch.bfloat16
    assert not runs_fused(torch.device("cpu"), bf16, 64)
    monkeypatch.setattr(torch.backends.cuda, "is_flash_attention_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    assert runs_fused(gpu, bf16, 64) and runs_fused(gpu, torch.float16, 128)
    assert not runs_fused(gpu, torch.float32, 64)  # exact
    assert not runs_fused(gpu, bf16, 12) and not runs_fused(gpu, bf16, 256)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    assert not runs_fused(gpu, bf16, 64)


def test_under_autocast_packed_queries_keys_and_values_are_of_one_dtype(fused):
    model = etherplus_model()
    with torch.autocast("cpu", torch.bfloat16):
        step(model, samples_of(9, 14), PACKED)
    assert {call["dtype"] for call in CALLS} == {torch.bfloat16}


def test_without_a_compiler_compiling_is_refused_in_one_line(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))  # what was compiled before, here or in another run
    torch._dynamo.reset()
    with pytest.raises(ValueError, match=r"--compile true cannot compile for cpu: .*--compile false") as refusal:
        check_compiler(torch.device("cpu"))
    assert "\n" not in str(refusal.value)
