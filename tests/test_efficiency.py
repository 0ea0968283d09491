"""The cost of a step: DESIGN's numbers for Llama-2-7B, and that the counts are those of whole models and real tensors.

Times are never asserted.
"""

import json
from dataclasses import replace
from functools import partial

import pytest
import torch
from helpers import ROOT, load_script
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from eval.costs import FLOOR, LORA, attach, choose_variants, count, count_model, measure, random_models, step_loss
from lit_gpt.adapter import AdapterConfig
from lit_gpt.checkpoint import meta_model
from lit_gpt.cli import main
from lit_gpt.config import Config
from lit_gpt.ether import EtherConfig
from lit_gpt.lora import LoraConfig
from lit_gpt.memory import even_mixture, share_weights
from lit_gpt.model import GPT, LLaMAMoE

LLAMA = Config.from_name("Llama-2-7b-hf")
TINY = Config(
    name="tiny", n_layer=2, n_head=4, n_embd=32, n_query_groups=2, intermediate_size=48, vocab_size=64, block_size=64
)
TWO_SIDED = EtherConfig(Htype="etherplusHH", nb=4)
FLOOR_TFLOPS = 6.843
"""The issue's floor: the trained scalar stands below the first attention, behind the first q, k and v."""


def llama_variants() -> dict[str, AdapterConfig | None]:
    return choose_variants(LLAMA, targets=("query", "value"), blocks=(1, 4, 32), oft_blocks=(256,))[0]


@pytest.fixture(scope="module")
def llama() -> dict[str, dict[str, int]]:
    """The costs of a Llama-2-7B step of 256 tokens, by label."""
    return {label: count(LLAMA, adapter, seq_length=256) for label, adapter in llama_variants().items()}


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
    [
        ("ETHER n=1", 262_144),
        ("ETHER n=32", 262_144),
        ("ETHER+ one-sided n=32", 524_288),
        ("ETHER+ two-sided n=32", 1_048_576),
        ("OFT n=256", 4_194_304),
        (LORA, 4_194_304),
        (FLOOR, 1),
    ],
)
def test_trained_parameters_are_exactly_the_known_numbers(llama, method, trained):
    assert llama[method]["trained_parameters"] == trained
    assert llama[method]["adapter_bytes"] == (4 * trained if method != FLOOR else 0)


def test_what_is_saved_grows_with_the_sides_and_not_with_n(llama):
    saved = {label: costs["saved_bytes"] for label, costs in llama.items()}
    for name in ("ETHER", "ETHER+ one-sided", "ETHER+ two-sided"):
        sizes = [saved[f"{name} n={n}"] for n in (1, 4, 32)]
        assert max(sizes) < 1.01 * min(sizes), name  # a number a block and position may be kept, nothing larger
    for n in (1, 4, 32):
        assert saved[FLOOR] < saved[f"ETHER n={n}"] <= saved[f"ETHER+ one-sided n={n}"] < 1.005 * saved[LORA]
        assert saved[f"ETHER+ one-sided n={n}"] < saved[f"ETHER+ two-sided n={n}"] < 1.15 * saved[LORA]


def test_two_layers_save_no_more_than_the_issue_allows():
    """PEERS (f): two Llama-2-7B-wide layers in fp32, where litgpt's LoRA saved 193 MB."""
    two = replace(LLAMA, n_layer=2)
    saved = {label: count(two, it, seq_length=256)["saved_bytes"] for label, it in llama_variants().items()}
    assert max(saved.values()) <= 193e6, saved


def test_depth_is_continued_exactly():
    """Most layers are never built: the whole model, once, must say the same."""
    adapter = EtherConfig(Htype="etherplusHH", nb=32)
    assert count(LLAMA, adapter, seq_length=256) == count_model(LLAMA, adapter, 256, torch.float32)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("adapter", [None, LoraConfig(), EtherConfig(nb=2), TWO_SIDED, EtherConfig("oft", 4)])
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
    assert count(TINY, adapter, seq_length=40, dtype=dtype)["saved_bytes"] == real


ARITHMETIC = {"add": 1, "sub": 1, "rsub": 1, "mul": 1, "div": 1, "neg": 1, "sum": 1, "linalg_vector_norm": 2}


class CountElements(TorchDispatchMode):
    """FLOPs outside of matrix products: one for each element written, or read where a sum is taken."""

    def __init__(self):
        super().__init__()
        self.total = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        each = ARITHMETIC.get(func.overloadpacket.__name__.rstrip("_"), 0)
        if each:
            self.total += each * max(t.numel() for t in (*args, out) if isinstance(t, torch.Tensor))
        return out


def elements(layer: torch.nn.Module, positions: int) -> int:
    x = torch.empty(positions, layer.in_features, device="meta", requires_grad=True)
    with CountElements() as counter:
        outputs = layer(x)
        torch.autograd.backward(outputs, [torch.empty_like(output) for output in outputs])
    return counter.total


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(
    "adapter",
    [LoraConfig(), EtherConfig(nb=2), EtherConfig("etherplus", 4), TWO_SIDED, EtherConfig("oft", 8)],
)
def test_elementwise_formula_is_what_the_operators_do(adapter, bias):
    config = replace(TINY, n_layer=1, n_embd=256, head_size=64, qkv_bias=bias)
    base = meta_model(config, torch.float32).requires_grad_(False)
    plain = elements(base.transformer.h[0].attn.attn, 512)
    layer = attach(base, adapter).transformer.h[0].attn.attn
    formula, counted = layer.elementwise_flops(512), elements(layer, 512) - plain
    if isinstance(adapter, EtherConfig) and adapter.Htype == "oft":  # the solves are no element-wise operators
        formula -= sum(8 / 3 * p.size(-1) * p.numel() for p in layer.own_parameters().values())
    assert 0.98 * counted < formula < 1.1 * counted


def test_an_even_mixture_costs_what_a_routed_one_does():
    config = replace(TINY, mlp_class="LLaMAMoE", n_expert=4, n_expert_per_token=2)
    mixture, x = LLaMAMoE(config), torch.randn(1, 24, config.n_embd)
    costs = []
    for forward in (mixture, partial(even_mixture, mixture)):
        with FlopCounterMode(display=False) as counter:
            assert forward(x).shape == x.shape
        costs.append(counter.get_total_flops())
    assert costs[0] == costs[1]
    assert (
        count(config, TWO_SIDED, seq_length=24)["product_flops"]
        > count(TINY, TWO_SIDED, seq_length=24)["product_flops"]
    )


def test_n_that_does_not_divide_is_left_out_and_said():
    variants, left_out = choose_variants(TINY, targets=("query", "value"), blocks=(2, 32), oft_blocks=(7,))
    assert list(variants)[2:] == ["ETHER n=2", "ETHER+ one-sided n=2", "ETHER+ two-sided n=2"]
    assert len(left_out) == 4 and all("is left out: " in line and "legal" in line for line in left_out)


def test_variants_share_the_weights_and_train_their_adapter_alone():
    base = GPT(TINY)
    before = {name: p.clone() for name, p in base.named_parameters()}
    for adapter in (None, LoraConfig(), TWO_SIDED):
        model = attach(share_weights(base), adapter)
        step_loss(model, torch.arange(16)[None]).backward()
        trained = {name for name, p in model.named_parameters() if p.grad is not None}
        assert trained and not trained & set(before)
        shared = {p.data_ptr() for p in base.parameters()}
        assert shared <= {p.data_ptr() for p in model.parameters()}
    assert all(torch.equal(p, before[name]) for name, p in base.named_parameters())
    assert not any("lora" in name or "ether" in name for name, _ in base.named_parameters())


def test_quantized_random_models_share_their_weights_and_scales():
    variants = {LORA: LoraConfig(), "two-sided": TWO_SIDED}
    models = random_models(TINY, variants, dtype=torch.float32, device=torch.device("cpu"), scheme="bnb.nf4")
    one, other = (model.transformer.h[1].mlp.fc_1.quantized[0] for model in models.values())
    assert one.weight is other.weight and one.weight.quant_state is other.quant_state
    assert len({layer.weight.data.sum().item() for layer in models[LORA].transformer.h[0].attn.attn.quantized}) == 3
    assert [len(row["seconds"]) for row in measure(models, torch.arange(12)[None], rounds=2).values()] == [2, 2]


def test_step_loss_is_the_models_own():
    model, idx = GPT(TINY), torch.arange(20)[None]
    torch.testing.assert_close(step_loss(model, idx), model(idx, targets=idx))


def efficiency(*flags: str) -> None:
    main(load_script(ROOT / "eval" / "efficiency.py").setup, [*flags])


def test_script_writes_its_two_files_and_no_others(tmp_path, capsys):
    flags = ["--model_name", "pythia-14m", "--n_layer", "1", "--seq_length", "16", "--out_dir", str(tmp_path / "out")]
    efficiency(*flags, "--time", "true", "--rounds", "2", "--blocks", "[2]", "--oft_blocks", "[8,3]")
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"efficiency.json", "flops.png"}
    assert (tmp_path / "out" / "flops.png").read_bytes().startswith(b"\x89PNG")
    found = json.loads((tmp_path / "out" / "efficiency.json").read_text())
    labels = [FLOOR, LORA, "ETHER n=2", "ETHER+ one-sided n=2", "ETHER+ two-sided n=2", "OFT n=8"]
    assert [row["label"] for row in found["rows"]] == labels
    assert all(len(row["seconds"]) == 2 and row["product_flops"] > 0 for row in found["rows"])
    assert found["rows"][0]["time_x_floor"] == {"median": 1.0, "min": 1.0, "max": 1.0}
    text = capsys.readouterr().out
    assert "OFT n=3 is left out" in text and "published" not in text
    assert len([line for line in text.splitlines() if line.startswith("| ETHER+ two-sided n=2 ")]) == 2
    with pytest.raises(SystemExit):
        efficiency(*flags)
    assert "already holds efficiency.json" in capsys.readouterr().err


def test_pefts_adapters_are_timed_beside(tmp_path, capsys):
    flags = ["--model_name", "SmolLM2-135M", "--n_layer", "1", "--seq_length", "8", "--out_dir", str(tmp_path)]
    efficiency(*flags, "--methods", "[]", "--time", "true", "--rounds", "1", "--peft", "true")
    rows = json.loads((tmp_path / "efficiency.json").read_text())["rows"]
    assert [row["label"] for row in rows] == [FLOOR, LORA, f"PEFT {LORA}", "PEFT OFT b=16"]
    assert all(row["time_x_lora"]["median"] > 0 for row in rows)


def test_published_figures_stand_beside_the_models_they_belong_to(tmp_path, capsys):
    script = load_script(ROOT / "eval" / "efficiency.py")
    qv = ("query", "value")
    assert script.published_figures(LLAMA, qv)[1]["ETHER+ two-sided n=1"] == 51.65
    assert script.published_figures(Config.from_name("Llama-2-7b-chat-hf"), qv)[0] == 256
    assert script.published_figures(Config.from_name("microsoft/phi-1_5"), qv)[1]["ETHER n=32"] == 6.71
    for config, targets in ((replace(LLAMA, n_layer=2), qv), (LLAMA, ("key",)), (Config.from_name("pythia-1b"), qv)):
        assert script.published_figures(config, targets) == (0, {})
    efficiency("--model_name", "phi-1_5", "--seq_length", "1024", "--blocks", "[4]", "--out_dir", str(tmp_path))
    row = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("| ETHER n=4 "))
    assert row.rstrip(" |").endswith(" 7.07")


def test_the_length_of_the_phi_figures_is_the_papers():
    """Nothing in the paper says it; LoRA's figure is met at one length only."""
    phi, lora = Config.from_name("phi-1_5"), LoraConfig(r=8)
    counted = {T: round(count(phi, lora, seq_length=T)["product_flops"] / 1e12, 2) for T in (1044, 1045, 1046)}
    assert [T for T, tflops in counted.items() if tflops == 6.04] == [1045]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ([], "give --model_name NAME"),
        (["--model_name", "pythia-14m", "--checkpoint_dir", "x"], "give --model_name NAME"),
        (["--model_name", "gpt-5"], "not a known model"),
        (["--checkpoint_dir", "nowhere"], "nowhere is not a folder"),
        (["--model_name", "pythia-14m", "--seq_length", "4096"], "--seq_length 4096: pythia-14m takes at most 2048"),
        (["--model_name", "pythia-14m", "--rounds", "0"], '"rounds": Not of type PositiveInt: 0'),
        (["--model_name", "pythia-14m", "--targets", "[q]"], "'mlp', 'head']. Got value: q"),
        (["--model_name", "pythia-14m", "--blocks", "[0]"], "must be at least 1, got 0"),
        (["--model_name", "pythia-14m", "--precision", "fp8"], "Got value: fp8"),
        (["--model_name", "Llama-2-70b-hf", "--time", "true"], "time fewer layers"),
        (["--model_name", "pythia-14m", "--quantize", "bnb.nf4"], "--peft say what is timed: give --time true too"),
    ],
)
def test_mistakes_end_in_one_line(flags, message, tmp_path, capsys):
    with pytest.raises(SystemExit) as end:
        efficiency(*flags, "--out_dir", str(tmp_path / "out"))
    text = capsys.readouterr().err
    assert end.value.code != 0 and message in text and len(text.splitlines()) == 1
    assert not (tmp_path / "out").exists()
