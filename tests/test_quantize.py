"""Quantized bases with bitsandbytes' real layers on a CPU: what adapters compute, memory, refusals."""

import copy
import ctypes
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from helpers import ROOT, refusal, script, train, write_base
from torch.utils._python_dispatch import TorchDispatchMode

from lit_gpt import GPT, Config
from lit_gpt.adapter import adapter_parameters, adapters_off, mark_only_adapter_as_trainable, merge_adapter_weights
from lit_gpt.adapter_files import load_adapted_model, load_adapter
from lit_gpt.batches import collate
from lit_gpt.checkpoint import load_model, load_state, save_state
from lit_gpt.cli import main
from lit_gpt.data import load_split
from lit_gpt.ether import EtherConfig, add_ether
from lit_gpt.lora import LoraConfig, add_lora
from lit_gpt.memory import share_weights
from lit_gpt.monitor import weight_change
from lit_gpt.quantize import (
    SCHEMES,
    load_base,
    n_parameters,
    quantizable,
    quantization_error,
    quantization_saves,
    quantize_model,
)

SIZES = dict(name="tiny", vocab_size=96, n_layer=2, n_head=4, n_embd=32, intermediate_size=48, block_size=32)
MODELS = {
    "gqa": dict(n_query_groups=2, tie_embeddings=True),
    "bias": dict(
        qkv_bias=True,
        proj_bias=True,
        mlp_bias=True,
        mlp_class="GptNeoxMLP",
        norm_class="LayerNorm",
        parallel_residual=True,
    ),
    "moe": dict(n_query_groups=1, mlp_class="LLaMAMoE", n_expert=3, n_expert_per_token=2),
}
EVERYTHING = dict(key=True, projection=True, mlp=True, head=True)
IDX = torch.arange(2 * 12).remainder(96).view(2, 12)


def pair(scheme: str, name: str) -> tuple[GPT, GPT]:
    """A quantized model, and an unquantized one whose weights are what the first one's products show its own to be."""
    torch.manual_seed(5)
    model = GPT(Config(**SIZES, **MODELS[name]))
    plain = copy.deepcopy(model)
    quantize_model(model, scheme, model.state_dict(), dtype=torch.float32, device="cpu")
    for full, linear in quantizable(plain).items():
        held, eye = model.get_submodule(full).quantized, torch.eye(linear.in_features)
        rows = [held.product(index, eye, None).T for index in range(len(held))]
        for index, seen in enumerate(rows):
            torch.testing.assert_close(held.dequantized(index), seen, rtol=1e-6, atol=0)
        linear.weight = torch.nn.Parameter(torch.cat(rows))
    return model, plain


def adapt(model: GPT, method: str) -> None:
    """Add an adapter of that method to every target, the same for the same model."""
    torch.manual_seed(7)
    if method == "lora":
        add_lora(model, LoraConfig(r=2, **EVERYTHING))
    else:
        add_ether(model, EtherConfig(Htype=method, nb=2, **EVERYTHING))
    mark_only_adapter_as_trainable(model)


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("method", ["etherplusHH", "lora"])
def test_adapters_act_on_the_quantized_weight(scheme, name, method):
    """They start as the base, bit for bit; trained, outputs and gradients are those over the dequantized weight."""
    model, plain = pair(scheme, name)
    base = model(IDX).detach()
    for one in (model, plain):
        adapt(one, method)
    assert torch.equal(model(IDX), base)
    assert torch.equal(model.eval()(IDX), base)
    losses = []
    for one in (model.train(), plain):
        torch.manual_seed(9)
        for parameter in adapter_parameters(one).values():
            parameter.data += 0.1 * torch.randn_like(parameter)
        losses.append(one(IDX, targets=IDX.roll(1, 1)))
        losses[-1].backward()
    assert losses[0].item() == pytest.approx(losses[1].item(), rel=1e-6)
    expected = {name: parameter.grad for name, parameter in adapter_parameters(plain).items()}
    assert {name for name, parameter in model.named_parameters() if parameter.grad is not None} == set(expected)
    scale = max(gradient.abs().max() for gradient in expected.values())
    for name, parameter in adapter_parameters(model).items():
        torch.testing.assert_close(parameter.grad, expected[name], rtol=1e-4, atol=1e-6 * scale.item())
    with adapters_off(model):
        assert torch.equal(model(IDX), base)


def test_embedding_head_norms_and_router_stay_as_they_are():
    model = GPT(Config(**SIZES, **MODELS["moe"]))
    before = dict(model.named_parameters())
    quantize_model(model, "bnb.nf4", model.state_dict(), dtype=torch.float32, device="cpu")
    kept = {name for name, parameter in model.named_parameters() if parameter is before.get(name)}
    norms = {name for name in before if "norm" in name or "ln_f" in name}
    routers = {f"transformer.h.{layer}.mlp.gate.weight" for layer in range(2)}
    assert kept == {"lm_head.weight", "transformer.wte.weight"} | norms | routers
    assert len([module for module in model.modules() if type(module).__name__ == "Linear4bit"]) == 2 * (4 + 3 * 3)


@pytest.mark.parametrize("scheme", ["bnb.nf4-dq", "bnb.int8"])
def test_products_in_half_precision_leave_the_adapter_in_fp32(scheme):
    model = GPT(Config(**SIZES, **MODELS["gqa"])).bfloat16()
    quantize_model(model, scheme, model.state_dict(), dtype=torch.bfloat16, device="cpu")
    models = [share_weights(model), share_weights(model)]  # of int8 the second one gave noise
    base = model(IDX)
    for each in models:
        assert torch.equal(each(IDX), base)
    adapt(model, "etherplusHH")
    assert base.dtype == torch.bfloat16 and torch.equal(model(IDX), base)
    assert {parameter.dtype for parameter in adapter_parameters(model).values()} == {torch.float32}


@pytest.mark.parametrize(("scheme", "bits"), [("bnb.nf4", 4.5), ("bnb.nf4-dq", 4.127), ("bnb.int8", 8)])
def test_memory_is_what_the_scheme_promises(scheme, bits):
    config = Config(**SIZES | dict(n_embd=512, intermediate_size=1024, n_head=8))
    plain = GPT(config)
    linears = sum(linear.weight.numel() for linear in quantizable(plain).values())
    model = copy.deepcopy(plain)
    quantize_model(model, scheme, model.state_dict(), dtype=torch.float32, device="cpu")
    assert n_parameters(model) == n_parameters(plain) == sum(p.numel() for p in plain.parameters())
    saved, _ = quantization_saves(plain, scheme)
    assert 4 * linears - saved == pytest.approx(linears * bits / 8, rel=0.03)


class AnonymousMemory(TorchDispatchMode):
    """The most memory that the process held while operators ran, mapped files and free heap aside; in bytes."""

    peak = 0
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # glibc's

    def __torch_dispatch__(self, function, types, arguments=(), keywords=None):
        result = function(*arguments, **keywords or {})
        self.trim(0)
        status = Path("/proc/self/status").read_text()
        self.peak = max(self.peak, 1024 * int(re.search(r"RssAnon:\s+(\d+)", status).group(1)))
        return result


@pytest.mark.skipif(AnonymousMemory.trim is None, reason="asks glibc and /proc")
def test_loading_never_holds_the_whole_model_unquantized(tmp_path, bpe_dir):
    sizes = dict(n_layer=12, n_embd=512, n_head=8, n_query_groups=4, intermediate_size=1536)
    folder = write_base(tmp_path / "base", bpe_dir, **sizes)
    model = load_base(folder, "32-true", "bnb.nf4")  # what is allocated once, is
    with AnonymousMemory() as memory:
        torch.empty(0)  # an operator, at which memory is read
        start = memory.peak
        again = load_base(folder, "32-true", "bnb.nf4")
    whole = (folder / "lit_model.pth").stat().st_size
    assert memory.peak - start < 0.3 * whole  # 4.5 bits of 32 stay, one weight of 1/50 comes and goes
    assert torch.equal(again(IDX), model(IDX))
    in_memory = load_model(folder)
    quantize_model(in_memory, "bnb.nf4", in_memory.state_dict(), dtype=torch.float32, device="cpu")
    assert torch.equal(in_memory(IDX), model(IDX))


def test_a_file_that_does_not_fit_is_refused(tmp_path, bpe_dir):
    folder = write_base(tmp_path / "base", bpe_dir)
    state = dict(load_state(folder / "lit_model.pth"))
    state["transformer.h.1.mlp.proj.weight"] = torch.zeros(3, 3)
    save_state(state, folder / "lit_model.pth")
    with pytest.raises(ValueError, match=r"does not hold the weights .*h\.1\.mlp\.proj\.weight"):
        load_base(folder, "32-true", "bnb.nf4")


@pytest.mark.parametrize("scheme", SCHEMES)
def test_trains_saves_and_merges_into_the_unquantized_base(work, tmp_path, capsys, scheme):
    method = "lora" if scheme == "bnb.fp4" else "etherplusHH"
    kind = "lora" if method == "lora" else "ether"
    summary = train(work, method, tmp_path / "run", "--quantize", scheme)
    assert summary["val_loss_after"] < summary["val_loss_before"]
    path = tmp_path / "run" / f"lit_model_{kind}_finetuned.pth"
    content = load_state(path)
    assert content["config"]["base"]["quantize"] == scheme
    assert all(".lora_" in name or ".ether_R" in name for name in content["model"])

    samples = load_split(work / "data" / "test.pt")
    idx, targets = collate(samples, torch.device("cpu"))
    adapter = load_adapter(path, kind)
    model = load_adapted_model(work / "base", quantize=scheme, adapter=adapter)
    assert model(idx, targets=targets, reduction="none").mean().item() == pytest.approx(
        summary["val_loss_after"], rel=1e-5
    )

    flags = ["--checkpoint_dir", str(work / "base"), f"--{kind}_path", str(path), "--precision", "32-true"]
    main(script(f"scripts/merge_{kind}.py"), flags)
    said = re.search(
        f"trained on a {scheme} base, merged into the unquantized one: .* by (.*) \\(median", capsys.readouterr().out
    )
    state = load_state(work / "base" / "lit_model.pth")
    weights = [state[f"{name}.weight"] for name in quantizable(load_model(work / "base"))]
    assert float(said.group(1)) == pytest.approx(quantization_error(scheme, weights), rel=0.06)
    merged = load_model(tmp_path / "run" / "merged")(IDX)
    unmerged = load_adapted_model(work / "base", adapter=adapter)(IDX)
    assert (merged - unmerged).abs().max() < 1e-5 * unmerged.abs().max()


def test_the_error_is_that_of_the_products():
    weight = torch.randn(64, 128)
    linear = {"bnb.nf4": (0.085, 0.1), "bnb.fp4": (0.11, 0.14), "bnb.int8": (0.004, 0.01)}
    for scheme, (low, high) in linear.items():
        assert low < quantization_error(scheme, [weight]) < high


@pytest.mark.parametrize(
    ("method", "more", "message"),
    [
        ("ether", ["--quantize", "nf4"], "--quantize nf4 is unknown; choices: bnb.nf4, bnb.nf4-dq, bnb.fp4"),
        ("ether", ["--quantize", "bnb.nf4", "--precision", "bf16-mixed"], "keeps no fp32 weights for bf16-mixed"),
        ("full", ["--quantize", "bnb.nf4"], "freezes the weights, full finetuning trains them"),
        ("etherplusHH", ["--quantize", "bnb.int8", "--ether_block_layout", "published"], "needs the weight itself"),
    ],
)
def test_what_cannot_work_is_refused_before_weights_load(work, tmp_path, capsys, method, more, message):
    name = "full" if method == "full" else "ether"
    flags = ["--io.train_data_dir", str(work / "data"), "--io.out_dir", str(tmp_path / "run"), "--precision", "32-true"]
    flags += [] if method == "full" else ["--Htype", method, "--ether_nb", "2"]
    assert message in refusal(capsys, f"finetune/{name}.py", [*flags, *more])
    assert not (tmp_path / "run").exists()


def test_kernels_that_bitsandbytes_lacks_are_no_noise():
    """On a CPU with AVX512-BF16 its import advised to install a package that nothing here needs."""
    code = "import sys; sys.modules['kernels'] = None\nfrom lit_gpt.quantize import check_quantize\n"
    code += "check_quantize('bnb.nf4', '32-true')"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_missing_bitsandbytes_is_told_with_the_command(work, tmp_path, capsys, monkeypatch):
    train(work, "ether", tmp_path / "run", "--quantize", "bnb.nf4")
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    flags = ["--io.train_data_dir", str(work / "data"), "--io.out_dir", str(tmp_path / "other"), "--quantize"]
    message = refusal(capsys, "finetune/ether.py", [*flags, "bnb.nf4", "--precision", "32-true"])
    assert message == "error: --quantize needs bitsandbytes: pip install 'bitsandbytes>=0.50'"
    assert not (tmp_path / "other").exists()
    path = tmp_path / "run" / "lit_model_ether_finetuned.pth"
    main(script("scripts/merge_ether.py"), ["--checkpoint_dir", str(work / "base"), "--ether_path", str(path)])
    assert "can be said where bitsandbytes is installed" in capsys.readouterr().out


def test_what_needs_the_weight_itself():
    model, plain = pair("bnb.nf4", "gqa")
    add_ether(model, EtherConfig(nb=2, block_layout="published"))  # one-sided on q and v: the layouts agree
    layer = model.transformer.h[0].attn.attn
    torch.manual_seed(7)
    add_ether(plain, EtherConfig(nb=2))
    for parameter, same in zip(adapter_parameters(model).values(), adapter_parameters(plain).values(), strict=True):
        same.data.copy_(parameter)
    expected = weight_change(plain.transformer.h[0].attn.attn, layer.parts[0])
    assert weight_change(layer, layer.parts[0]) == pytest.approx(expected, rel=1e-5)
    with pytest.raises(ValueError, match=r"attn\.attn: a quantized weight cannot take an adapter"):
        merge_adapter_weights(model)
