"""Every method on the device that there is, against the same model in fp64 on the CPU: logits and gradients.

On a GPU scripts/gpu.sh runs this file, without conftest.py: it needs no more than torch and lightning.
"""

import copy

import pytest
import torch

from eval.costs import attach
from lit_gpt.adapter import TARGETS, adapter_parameters
from lit_gpt.batches import Batching
from lit_gpt.config import Config
from lit_gpt.devices import PRECISIONS, choose_device
from lit_gpt.ether import METHODS, EtherConfig
from lit_gpt.lora import LoraConfig
from lit_gpt.loss import IGNORE_INDEX
from lit_gpt.model import GPT
from lit_gpt.reflections import FORMS, use_form
from lit_gpt.train import compile_blocks

TINY = Config(
    name="a tiny model", n_layer=2, n_head=4, n_embd=64, n_query_groups=2, intermediate_size=96, vocab_size=4096,
    block_size=256, sliding_window=32, qkv_bias=True,
)  # fmt: skip
BARS = {"32-true": 2e-5, "bf16-true": 0.05, "16-true": 0.01}
"""Largest relative error of logits and gradients: rounding stays below it, a wrong formula does not."""
EVERY = dict.fromkeys(TARGETS, True)
WAYS = {"": {}, " published": {"block_layout": "published"}, " flipped": {"flip_side": True}}
ADAPTERS = {"LoRA": LoraConfig(r=4, **EVERY)} | {
    method + way: EtherConfig(method, nb=4, **EVERY, **options)
    for method, kind in METHODS.items()
    for way, options in WAYS.items()
    if not (kind.two_sided and "flip_side" in options)
}
CASES = [(label, precision, "eager") for precision in PRECISIONS for label in ADAPTERS]
CASES += [(label, precision, "packed") for precision in PRECISIONS for label in ("LoRA", *METHODS)]
CASES += [(label, "bf16-true", "products") for label, kind in METHODS.items() if not kind.matrices]
CASES += [(label, "bf16-true", "compiled") for label in ("etherplusHH", "LoRA", "ether", "oft")]
DEVICE = choose_device()


@pytest.mark.parametrize(("label", "precision", "how"), CASES)
def test_logits_and_gradients_are_those_of_fp64(label, precision, how):
    """Errors are relative to the largest value of each tensor."""
    if how == "compiled" and DEVICE.type == "cpu":
        pytest.skip("test_packing.py and test_speed.py compile on a CPU")
    torch.manual_seed(0)
    model = attach(GPT(TINY).to(PRECISIONS[precision]), ADAPTERS[label])
    for parameter in adapter_parameters(model).values():
        # away from the start, where several terms are zero
        parameter.data += 0.3 * parameter.std() + 0.05 * torch.randn_like(parameter)
    exact = copy.deepcopy(model).double()
    if how == "compiled":
        compile_blocks(model)
    ids, results = [torch.randint(TINY.vocab_size, (n,)) for n in (40, 17, 64, 5)], []
    for one, n_tokens in ((exact, None), (model.to(DEVICE), 128 if how == "packed" else None)):
        samples = [{"input_ids": row, "labels": row} for row in ids]
        idx, targets, lengths = Batching(4, n_tokens).collate(samples, one.lm_head.weight.device)
        with use_form(how if how in FORMS else FORMS[0]):
            logits = one(idx, lengths=lengths)[targets != IGNORE_INDEX]  # (N, V), the same padded and packed
            logits.backward(torch.linspace(-1, 1, logits.numel()).view(logits.shape).to(logits))
        results.append([logits, *(p.grad for p in adapter_parameters(one).values())])
    pairs = [(a.detach(), b.detach().double().cpu()) for a, b in zip(*results, strict=True)]
    errors = torch.stack([(b - a).abs().max() / a.abs().max() for a, b in pairs])
    print(f"{label}, {precision}, {how}: logits {errors[0]:.0e}, gradients {errors[1:].max():.0e}")
    assert (errors <= BARS[precision]).all(), errors  # NaN is above any bar
