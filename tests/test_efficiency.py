"""What a step costs: DESIGN's numbers for Llama-2-7B, and that the counts are those of whole models and real tensors.

Times are never asserted.
"""

import json
from collections import Counter
from dataclasses import replace

import pytest
import torch
from test_house import ROOT, load_script
from torch.utils._python_dispatch import TorchDispatchMode

from eval.costs import (
    FLOOR,
    LORA,
    Variant,
    attach,
    choose_variants,
    count,
    count_model,
    elementwise_flops,
    even_mixture,
    meta_model,
    step_loss,
)
from lit_gpt.cli import run
from lit_gpt.config import Config
from lit_gpt.ether import EtherConfig, add_ether
from lit_gpt.lora import LoraConfig
from lit_gpt.model import GPT, LLaMAMoE

LLAMA = Config.from_name("Llama-2-7b-hf")
TINY = Config(
    name="tiny", n_layer=2, n_head=4, n_embd=32, n_query_groups=2, intermediate_size=48, vocab_size=64, block_size=64
)
TWO_SIDED = Variant("ETHER+ two-sided n=4", EtherConfig(Htype="etherplusHH", nb=4))
FLOOR_TFLOPS = 6.843
"""The issue's floor: the trained scalar stands below the first attention, behind the first q, k and v."""


def llama_variants() -> list[Variant]:
    return choose_variants(LLAMA, targets=("query", "value"), blocks=(1, 4, 32), oft_blocks=(256,))[0]


@pytest.fixture(scope="module")
def llama() -> dict[str, dict[str, int]]:
    """The costs of a Llama-2-7B step of 256 tokens, by label."""
    return {variant.label: count(LLAMA, variant, seq_length=256) for variant in llama_variants()}


def test_the_floor_is_the_known_one(llama):
    first_qkv = 2 * 256 * 3 * 4096**2  # the gradient of the first layer's input
    assert (llama[FLOOR]["product_flops"] - first_qkv) / 1e12 == pytest.approx(FLOOR_TFLOPS, abs=5e-4)
    assert llama[LORA]["product_flops"] / 1e12 == pytest.approx(6.85, abs=5e-3)  # the paper's figure


def test_every_method_costs_what_the_frozen_model_costs(llama):
    methods = set(llama) - {FLOOR, LORA}
    assert len(methods) == 3 * 3 + 1
    for label in methods:
        products, rest = llama[label]["product_flops"] / 1e12, llama[label]["elementwise_flops"] / 1e12
        assert abs(products / FLOOR_TFLOPS - 1) < 0.006, label
        assert abs(products * 1e12 / llama[FLOOR]["product_flops"] - 1) < 0.006, label
        assert 0 < rest / FLOOR_TFLOPS < 0.005, label


@pytest.mark.parametrize(
    ("method", "trained"),
    [("ETHER n=1", 262_144), ("ETHER n=32", 262_144), ("ETHER+ one-sided n=32", 524_288)]
    + [("ETHER+ two-sided n=32", 1_048_576), ("OFT n=256", 4_194_304), (LORA, 4_194_304), (FLOOR, 1)],
)
def test_trained_parameters_are_exactly_the_known_numbers(llama, method, trained):
    assert llama[method]["trained_parameters"] == trained
    assert llama[method]["adapter_bytes"] == (4 * trained if method != FLOOR else 0)


def test_what_is_saved_grows_with_the_sides_and_not_with_n(llama):
    saved = {label: costs["saved_bytes"] for label, costs in llama.items()}
    for name in ("ETHER", "ETHER+ one-sided", "ETHER+ two-sided"):
        # Unit vectors and coefficients may be kept, one number a position and block; nothing larger.
        spread = max(saved[f"{name} n={n}"] for n in (1, 4, 32)) - min(saved[f"{name} n={n}"] for n in (1, 4, 32))
        assert spread < 0.01 * saved[f"{name} n=1"], name
    for n in (1, 4, 32):
        one_sided = saved[f"ETHER n={n}"], saved[f"ETHER+ one-sided n={n}"]
        assert one_sided[0] <= one_sided[1] <= saved[f"ETHER+ two-sided n={n}"]
    # At most one tensor of each adapted side's size more than LoRA keeps: nothing near a weight's.
    assert max(saved.values()) - saved[LORA] <= LLAMA.n_layer * 4 * 256 * 4096 * 4


def test_depth_is_continued_exactly():
    """Nine in ten layers are never built: the whole model, once, must say the same."""
    variant = Variant("ETHER+ two-sided n=32", EtherConfig(Htype="etherplusHH", nb=32))
    assert count(LLAMA, variant, seq_length=256) == count_model(LLAMA, variant, 256, torch.float32)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("adapter", [None, LoraConfig(), EtherConfig(nb=2), TWO_SIDED.adapter, EtherConfig("oft", 4)])
def test_saved_bytes_are_those_of_real_tensors(adapter, dtype):
    model = attach(GPT(TINY).to(dtype), adapter)
    weights = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    kept = {}

    def keep(tensor):
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        step_loss(model, torch.arange(40)[None])
    real = sum(storage.nbytes() for pointer, storage in kept.items() if pointer not in weights)
    assert count(TINY, Variant("", adapter), seq_length=40, dtype=dtype)["saved_bytes"] == real


class CountElements(TorchDispatchMode):
    """Elements that arithmetic reads or writes outside of matrix products, whichever are more, operator by operator."""

    ARITHMETIC = {"add", "sub", "mul", "div", "neg", "sum", "linalg_vector_norm"}

    def __init__(self):
        super().__init__()
        self.found = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        name = func.overloadpacket.__name__
        if name.rstrip("_") in self.ARITHMETIC:
            self.found[name] += max(t.numel() for t in (*args, out) if isinstance(t, torch.Tensor))
        return out
