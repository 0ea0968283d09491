"""The estimate of a run's memory: storages followed exactly, and what changes a run changes it."""

import re

import pytest
import torch
from lightning.fabric import Fabric
from test_speed import ARCHITECTURES
from test_train import train, write_base, write_work

from lit_gpt.batches import Batching, length
from lit_gpt.checkpoint import load_model
from lit_gpt.ether import EtherConfig
from lit_gpt.memory import LiveBytes, Memory, estimate_memory
from lit_gpt.plan import EvalArgs, IOArgs, Job, TrainArgs, make_plan
from lit_gpt.quantize import SCHEMES, load_quantized_model, quantization_saves


@pytest.fixture(scope="module")
def work(tmp_path_factory, bpe_dir):
    """A base and data."""
    return write_work(tmp_path_factory.mktemp("memory"), bpe_dir)


def estimate(work, *, adapter=True, base="base", precision="32-true", quantize=None, **how) -> Memory:
    """Of a run of ETHER+, or of full finetuning."""
    job = Job("etherplusHH", "ether", EtherConfig(Htype="etherplusHH", nb=2)) if adapter else Job("full", "full")
    io = IOArgs(str(work / "data"), checkpoint_dir=str(work / base), out_dir=str(work / "nowhere"))
    settings = dict(io=io, train=TrainArgs(**how), eval=EvalArgs(), precision=precision, quantize=quantize)
    plan = make_plan(job, **settings, processes=1, strategy="auto", overwrite=False)
    longest = max(map(length, plan.train_set))
    batching = Batching(
        plan.train.micro_batch_size, longest * plan.train.micro_batch_size if how.get("packing") else None
    )
    largest = batching.largest(plan.train_set, 16)
    lengths = list(map(length, largest)) if how.get("packing") else None
    return estimate_memory(job, plan, largest, lengths=lengths, fabric=Fabric(devices=1, accelerator="cpu"))


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


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_every_architecture_can_be_estimated(work, bpe_dir, architecture):
    write_base(work / architecture, bpe_dir, **{"tie_embeddings": False, **ARCHITECTURES[architecture]})
    assert estimate(work, base=architecture).working > 0


@pytest.mark.parametrize("scheme", SCHEMES)
def test_what_quantization_saves_is_what_it_saves(work, bpe_dir, scheme):
    sizes = dict(n_embd=256, intermediate_size=512, n_layer=1)  # blocks of 64 and of 256 are full
    folder = work / f"wide-{scheme}"
    write_base(folder, bpe_dir, **sizes)
    plain, small = load_model(folder), load_quantized_model(folder, "32-true", scheme)
    held = sum({t.data_ptr(): t.nbytes for t in small.state_dict().values()}.values())
    whole = sum(p.nbytes for p in plain.parameters())
    assert whole - quantization_saves(plain, scheme)[0] == pytest.approx(held, rel=0.02)


def test_a_run_tells_estimate_and_measure(work, tmp_path, capsys):
    summary = train(work, "etherplusHH", tmp_path / "run")
    told = capsys.readouterr().out
    assert re.search(r"memory: about 0\.\d\d GiB \(frozen 0\.00, trained 0\.00, working 0\.\d\d\), estimated", told)
    assert re.search(r"peak memory +\d.\d\d GiB, \d\.\d\d of them for this run \(estimated \d\.\d\d\)", told)
    assert 0 < summary["estimated_memory_bytes"] < summary["peak_memory_bytes"]
    assert 0 <= summary["run_memory_bytes"] < summary["peak_memory_bytes"]
