"""The estimate of a run's memory: storages followed exactly, and what changes a run changes it."""

import re
import sys

import pytest
import torch
from helpers import ARCHITECTURES, train, write_base
from lightning.fabric import Fabric
from torch._subclasses.fake_tensor import DataDependentOutputException, DynamicOutputShapeException, FakeTensorMode

from lit_gpt import GPT, Config, memory
from lit_gpt.checkpoint import load_model, meta_model
from lit_gpt.ether import EtherConfig, add_ether, mark_only_ether_as_trainable
from lit_gpt.live_bytes import LiveBytes
from lit_gpt.memory import (
    Memory,
    estimate_memory,
    frozen_bytes,
    share_weights,
    spread_evenly,
    working_bytes,
)
from lit_gpt.quantize import SCHEMES, load_base, quantization_saves
from lit_gpt.settings import IOArgs, Plan, Settings, TrainArgs
from lit_gpt.train import make_batching


def planned(work, *, adapter=True, base="base", precision="32-true", quantize=None, **how) -> Plan:
    """A run of ETHER+, or of full finetuning."""
    config = EtherConfig(Htype="etherplusHH", nb=2) if adapter else None
    io = IOArgs(str(work / "data"), checkpoint_dir=str(work / base), out_dir=str(work / "nowhere"))
    settings = dict(io=io, train=TrainArgs(**how), precision=precision, quantize=quantize)
    return Plan(Settings(adapter=config, **settings))


def one_process() -> Fabric:
    """Fabric on this CPU."""
    return Fabric(devices=1, accelerator="cpu")


def estimate(work, **what) -> Memory:
    """Of a ``planned`` run."""
    plan = planned(work, **what)
    batching = make_batching(plan, one_process())
    largest = batching.collate(batching.largest(plan.train_set))
    return estimate_memory(plan, largest, fabric=one_process())


def test_live_bytes_follow_each_storage_once_until_it_ends():
    with LiveBytes() as live:
        a = torch.zeros(1000)  # 4000 bytes
        b = a.view(10, 100) + 1
        assert live.now == live.most == 8000
        del a
        assert live.now == 4000
        b.mul_(2)
        c = b.t()
        del b
        assert live.now == 4000 and live.most == 8000
        del c
        assert live.now == 0
    held = torch.zeros(1000)
    with LiveBytes([held]) as live:
        held.view(10, 100).t()
        assert live.now == live.most == 0


def test_weights_and_what_trains_are_counted_exactly(work):
    n = sum(p.numel() for p in load_model(work / "base").parameters())
    adapter, full = estimate(work), estimate(work, adapter=False)
    assert (adapter.frozen, full.frozen) == (4 * n, 0)
    assert full.trained == 4 * 4 * n  # weights, gradients, two moments
    assert adapter.trained == 4 * 4 * 2 * 2 * (32 + 32 + 32 + 16)  # 2 layers; u and v of q's and v's two sides
    assert estimate(work, precision="bf16-true").frozen == 2 * n


def test_the_estimate_follows_the_settings(work):
    usual = estimate(work)
    assert estimate(work, micro_batch_size=1).working < 0.5 * usual.working
    assert estimate(work, activation_checkpointing=True).working < 0.8 * usual.working
    assert estimate(work, precision="bf16-true").working < usual.working
    assert 0.7 * usual.working < estimate(work, packing=True).working < 1.1 * usual.working


def test_gradients_of_earlier_passes_count(work):
    """A step of one pass has no gradients yet while its activations are there; one of several has all of them."""
    one, several = (estimate(work, adapter=False, micro_batch_size=4, global_batch_size=size) for size in (4, 8))
    assert (one.frozen, one.trained) == (several.frozen, several.trained)
    assert several.working - one.working == pytest.approx(several.trained / 4, rel=0.2)


@pytest.mark.parametrize("adapter", [True, False])
def test_a_step_without_data_peaks_where_one_with_data_does(adapter):
    config = Config(name="tiny", vocab_size=400, n_layer=2, n_head=2, n_embd=16, intermediate_size=32)
    base, how = meta_model(config, torch.float32), dict(lengths=None, n_losses=30, accumulates=True)

    def peak() -> int:
        model = share_weights(base, "cpu")
        if adapter:
            add_ether(model, EtherConfig(Htype="etherplusHH", nb=2))
            mark_only_ether_as_trainable(model)
        else:
            model.requires_grad_(True)
        return working_bytes(model.train(), torch.zeros(2, 16, dtype=torch.long), fabric=one_process(), **how)

    with FakeTensorMode(allow_fallback_kernels=False):
        without_data = peak()
    assert without_data == peak()


def test_a_sharded_base_counts_its_share_and_what_is_collected():
    model = GPT(Config(name="tiny", vocab_size=100, n_layer=3, n_head=2, n_embd=8)).requires_grad_(False)
    whole, block = sum(p.nbytes for p in model.parameters()), sum(p.nbytes for p in model.transformer.h[0].parameters())
    assert frozen_bytes(model, 1) == whole
    assert frozen_bytes(model, 4) == whole // 4 + (whole - 3 * block) + 2 * block
    model.transformer.ln_f.requires_grad_(True)
    assert frozen_bytes(model, 1) == whole - sum(p.nbytes for p in model.transformer.ln_f.parameters())


def test_what_depends_on_data_ends_the_estimate_and_not_the_run():
    """A mixture that is not spread evenly asks which tokens go where."""
    sizes = dict(n_layer=1, n_head=2, n_embd=8, intermediate_size=16, n_expert=4, n_expert_per_token=2)
    base = meta_model(Config(name="tiny", vocab_size=400, mlp_class="LLaMAMoE", **sizes), torch.float32)
    how = dict(lengths=None, n_losses=20, accumulates=False, fabric=one_process())
    with FakeTensorMode(allow_fallback_kernels=False):
        model, idx = share_weights(base, "cpu").requires_grad_(True), torch.zeros(2, 16, dtype=torch.long)
        with pytest.raises((DataDependentOutputException, DynamicOutputShapeException)):
            working_bytes(model, idx, **how)
        spread_evenly(model)
        assert working_bytes(model, idx, **how) > 0


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_every_architecture_can_be_estimated(work, bpe_dir, architecture):
    write_base(work / architecture, bpe_dir, **{"tie_embeddings": False, **ARCHITECTURES[architecture]})
    assert estimate(work, base=architecture).working > 0


@pytest.mark.parametrize("scheme", SCHEMES)
def test_what_quantization_saves_is_what_it_saves(work, bpe_dir, scheme):
    sizes = dict(n_embd=256, intermediate_size=512, n_layer=1)  # blocks of 64 and of 256 are full
    folder = work / f"wide-{scheme}"
    write_base(folder, bpe_dir, **sizes)
    plain, small = load_model(folder), load_base(folder, "32-true", scheme)
    held = sum({t.data_ptr(): t.nbytes for t in small.state_dict().values()}.values())
    whole = sum(p.nbytes for p in plain.parameters())
    assert whole - quantization_saves(plain, scheme)[0] == pytest.approx(held, rel=0.02)


def test_a_run_tells_estimate_and_measure(work, tmp_path, capsys):
    summary = train(work, "etherplusHH", tmp_path / "run")
    told = capsys.readouterr().out
    assert re.search(r"memory: at least 0\.\d\d GiB \(frozen 0\.00, trained 0\.00, working 0\.\d\d\), estimated", told)
    assert re.search(r"peak memory +\d.\d\d GiB, \d\.\d\d of them for this run \(estimated: at least \d\.\d\d\)", told)
    assert 0 < summary["estimated_memory_bytes"] < summary["peak_memory_bytes"]
    assert 0 <= summary["run_memory_bytes"] < summary["peak_memory_bytes"]


def test_without_pytorchs_private_names_there_is_no_estimate_and_training_goes_on(work, tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "lit_gpt.live_bytes", None)  # the module that imports them
    monkeypatch.setattr(memory, "_working", {})
    summary = train(work, "ether", tmp_path / "run")
    assert "memory: no estimate (import of lit_gpt.live_bytes halted" in capsys.readouterr().out
    assert summary["estimated_memory_bytes"] is None and summary["val_loss_after"] > 0
