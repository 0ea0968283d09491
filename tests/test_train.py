"""The training loop and the merge scripts, through the scripts' own setup functions on a tiny model, nothing mocked."""

import csv
import importlib.util
import json
import math
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from helpers import ROOT, command, losses_of, refusal, save_samples, script, train, write_base, write_llama_config

from lit_gpt.adapter import adapter_parameters
from lit_gpt.adapter_files import load_adapted_model, load_adapter, save_adapter
from lit_gpt.batches import Batching, n_targets, sample_order
from lit_gpt.checkpoint import fingerprint, load_model, load_state, save_state
from lit_gpt.cli import main
from lit_gpt.data import load_split
from lit_gpt.lora import LoraConfig, add_lora
from lit_gpt.reflections import use_form
from lit_gpt.train import Position, Trainer, learning_rate

METHODS = ("ether", "etherplus", "etherplusHH", "oft", "lora")


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="limits the address space")
def test_out_of_memory_is_one_line(work, tmp_path):
    """In a process of its own, whose address space ends a little above what it has when the run starts."""
    name, arguments = command(work, "etherplusHH", tmp_path / "run", "--train.global_batch_size", "2048")
    arguments += ["--train.micro_batch_size", "2048"]
    data = load_split(work / "data" / "train.pt")
    shutil.copytree(work / "data", tmp_path / "data")
    save_samples(data * 60, tmp_path / "data" / "train.pt")
    limit = (
        "import resource, sys; import lit_gpt.launch, lit_gpt.train; from helpers import main, script;"
        "size = 4096 * int(open('/proc/self/statm').read().split()[0]) + 2**27;"
        "resource.setrlimit(resource.RLIMIT_AS, (size, size)); main(script(sys.argv[1]), sys.argv[2:])"
    )
    arguments += ["--io.train_data_dir", str(tmp_path / "data")]
    folders = {"PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}"}
    done = subprocess.run(
        [sys.executable, "-c", limit, name, *arguments], capture_output=True, text=True, env={**os.environ, **folders}
    )
    last = done.stderr.splitlines()[-1]
    assert done.returncode == 1 and last.startswith("error: out of memory with micro-batches of 2048 samples of up to")
    assert "lower --train.micro_batch_size" in last


@pytest.mark.parametrize("method", METHODS)
def test_trains_saves_and_merges_to_the_same_logits(work, tmp_path, method):
    summary = train(work, method, tmp_path / "run", "--seed", "1")
    assert summary["val_loss_after"] < summary["val_loss_before"]
    kind = "lora" if method == "lora" else "ether"
    files = {"hparams.yaml", "metrics.csv", "summary.json", "loss.png", f"lit_model_{kind}_finetuned.pth"}
    assert {path.name for path in (tmp_path / "run").iterdir()} == files

    path = tmp_path / "run" / f"lit_model_{kind}_finetuned.pth"
    flags = ["--checkpoint_dir", str(work / "base"), f"--{kind}_path", str(path), "--precision", "32-true"]
    main(script(f"scripts/merge_{kind}.py"), flags)
    merged = tmp_path / "run" / "merged"
    base_files = {p.name for p in (work / "base").iterdir()}
    assert {p.name for p in merged.iterdir()} == base_files | {"prompt_style.json"}
    assert not any(p.is_symlink() for p in merged.iterdir())

    idx = torch.arange(60)[None]
    unmerged = load_adapted_model(work / "base", adapter=load_adapter(path, kind))(idx)
    relative = (load_model(merged)(idx) - unmerged).abs().max() / unmerged.abs().max()
    assert relative < 1e-5
    assert "already holds lit_model.pth" in _refused_merge(kind, flags)


def _refused_merge(kind: str, flags: list[str]) -> str:
    with pytest.raises(FileExistsError) as error:
        main(script(f"scripts/merge_{kind}.py"), [*flags, "--debug"])
    return str(error.value)


def test_full_finetuning_leaves_a_base_shaped_folder(work, tmp_path):
    summary = train(work, "full", tmp_path / "run", "--train.learning_rate", "1e-3")
    assert summary["trainable_parameters"] == sum(p.numel() for p in load_model(work / "base").parameters())
    final = load_model(tmp_path / "run" / "final")
    assert final.lm_head.weight is final.transformer.wte.weight
    again = train(work, "ether", tmp_path / "again", "--io.checkpoint_dir", str(tmp_path / "run" / "final"))
    assert again["val_loss_before"] == pytest.approx(summary["val_loss_after"], rel=1e-5)


def test_metrics_hold_every_step_and_validation(work, tmp_path):
    summary = train(work, "etherplusHH", tmp_path / "run")
    rows = list(csv.DictReader((tmp_path / "run" / "metrics.csv").open()))
    assert [row["step"] for row in rows if row["loss"]] == [str(step) for step in range(1, 7)]
    validations = [row for row in rows if row["val_loss"]]
    assert [row["step"] for row in validations] == ["0", "3", "6"]
    assert float(validations[0]["val_loss"]) == pytest.approx(summary["val_loss_before"], rel=1e-4)
    assert float(validations[-1]["val_response_loss"]) == pytest.approx(summary["val_response_loss_after"], rel=1e-4)
    assert summary["samples"] == 24


def adapter_of(out: Path) -> dict[str, torch.Tensor]:
    """The tensors that a run of an ETHER method leaves."""
    return load_adapter(out / "lit_model_ether_finetuned.pth", "ether").state


@pytest.mark.parametrize("method", ["etherplusHH", "oft", "lora"])
def test_the_split_into_micro_batches_changes_nothing(work, tmp_path, method):
    """The loss is averaged over the target tokens of the step; a mean of micro-batch means would differ."""
    whole = ["--train.global_batch_size", "8", "--train.max_steps", "4"]
    train(work, method, tmp_path / "8", *whole, "--train.micro_batch_size", "8")
    for size in ("1", "2", "4"):
        train(work, method, tmp_path / size, *whole, "--train.micro_batch_size", size)
        for column in ("loss", "grad_norm"):
            expected = losses_of(tmp_path / "8", column)
            assert losses_of(tmp_path / size, column) == pytest.approx(expected, rel=1e-5)


def test_same_seed_gives_the_same_adapter_and_another_seed_another(work, tmp_path):
    for name, seed in (("a", "5"), ("b", "5"), ("c", "6")):
        train(work, "ether", tmp_path / name, "--seed", seed, "--ether_dropout", "0.1")
    one, same, other = (load_adapter(tmp_path / n / "lit_model_ether_finetuned.pth", "ether").state for n in "abc")
    assert all(torch.equal(one[name], same[name]) for name in one)
    assert not any(torch.equal(one[name], other[name]) for name in one)


def test_adapters_stay_fp32_over_a_bf16_base(work, tmp_path):
    train(work, "etherplusHH", tmp_path / "run", "--precision", "bf16-true")
    state = load_adapter(tmp_path / "run" / "lit_model_ether_finetuned.pth", "ether").state
    assert {tensor.dtype for tensor in state.values()} == {torch.float32}
    moved = [t for name, t in state.items() if (t + state.get(name.replace("R2", "R"), t)).abs().max() > 0]
    assert moved, "nothing has moved from its start"


def test_training_continues_from_an_adapter_file(work, tmp_path):
    first = train(work, "etherplusHH", tmp_path / "one")
    path = tmp_path / "one" / "lit_model_ether_finetuned.pth"
    second = train(work, "etherplusHH", tmp_path / "two", "--init_from", str(path))
    assert second["val_loss_before"] == pytest.approx(first["val_loss_after"], rel=1e-6)


def test_an_interval_saves_adapters_that_load(work, tmp_path):
    train(work, "lora", tmp_path / "run", "--train.save_interval", "3")
    saved = sorted(path.name for path in (tmp_path / "run" / "checkpoints").iterdir())
    assert saved == ["step-000003", "step-000006"]
    assert load_adapter(tmp_path / "run/checkpoints/step-000003/lit_model_lora_finetuned.pth", "lora").state


def test_lora_loses_as_peft_loses(work, tmp_path):
    """Same start, rows, order and schedule: our loop on our model against PEFT on transformers, fp32."""
    from peft_oracle import peft_losses

    base = Path(shutil.copytree(work / "base", tmp_path / "base"))
    write_llama_config(base)
    spec = importlib.util.spec_from_file_location("to_hf", ROOT / "scripts" / "convert_lit_checkpoint.py")
    to_hf = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(to_hf)
    to_hf.setup(checkpoint_dir=base, out_dir=tmp_path / "hf")
    model = load_model(base)
    add_lora(model, LoraConfig(r=4))
    base_facts = {"name": "tiny", "fingerprint": fingerprint(load_state(base / "lit_model.pth"))}
    start = tmp_path / "start.pth"
    save_adapter(start, model, kind="lora", config=LoraConfig(r=4), base=base_facts, prompt_style="plain")
    train(work, "lora", tmp_path / "run", "--lora_r", "4", "--init_from", str(start))
    rows = csv.DictReader((tmp_path / "run" / "metrics.csv").open())
    ours = [float(row["loss"]) for row in rows if row["loss"]]
    theirs = peft_losses(
        tmp_path / "hf", adapter_parameters(model), load_split(work / "data" / "train.pt"), n_steps=6, size=4, peak=1e-2
    )
    assert ours == pytest.approx(theirs, rel=1e-5)


def test_learning_rate_warms_up_and_ends_near_zero():
    rates = [learning_rate(step, peak=1.0, n_warmup=4, n_steps=20) for step in range(20)]
    assert rates[:5] == [0.25, 0.5, 0.75, 1.0, 1.0]
    assert rates[4:] == sorted(rates[4:], reverse=True) and 0 < rates[-1] < 0.02


def test_every_sample_comes_once_before_any_comes_twice():
    order = sample_order(10, 25, seed=0)
    assert len(order) == 25
    assert sorted(order[:10]) == sorted(order[10:20]) == list(range(10))
    assert order[:10] != order[10:20]
    assert order[:15] == sample_order(10, 15, seed=0)


def test_micro_batches_hold_each_sample_once_and_similar_lengths(work):
    samples = load_split(work / "data" / "train.pt")[:10]
    batches = Batching(4).cut(samples)
    assert [len(batch) for batch in batches] == [4, 4, 2]
    assert sum(map(n_targets, batches)) == n_targets(samples)
    lengths = [len(sample["input_ids"]) for batch in batches for sample in batch]
    assert lengths == sorted(lengths)


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--train.micro_batch_size", "3"], "global_batch_size 4 is not a multiple of"),
        (["--train.lr_warmup_steps", "6"], "lr_warmup_steps 6 must be shorter than the run of 6 steps"),
        (["--train.learning_rate", "-1", "--train.epochs", "0"], "learning_rate must be positive, got -1.0; "),
        (["--train.loss_average", "x"], "Expected a typing.Literal['token', 'sequence']. Got value: x"),
        (["--precision", "fp32", "--ether_nb", "3"], "16-mixed; 3 blocks do not divide"),
        (["--Htype", "ether+"], "choices: ether, etherplus, etherplusHH, oft"),
        (["--ether_nb", "3"], "legal for all chosen targets: 1, 2, 4, 8"),
        (["--ether_query", "false", "--ether_value", "false"], "no adapter target is enabled"),
        (["--precision", "fp32"], "choices: 32-true, bf16-true, 16-true, bf16-mixed, 16-mixed"),
        (["--precision", "16-mixed"], "16-mixed needs a GPU: take bf16-mixed"),
        (["--io.checkpoint_dir", "nowhere"], "nowhere is not a folder"),
        (["--io.train_data_dir", "nowhere"], "nowhere"),
        (["--train.learning_rat", "1"], "learning_rat"),
        (["--init_from", "nothing.pth"], "nothing.pth is not a file"),
        (["--eval.interval", "0"], "--eval.interval must be positive, got 0"),
        (["--train.learning_rate", "nan"], "Got value: nan"),
        (["--train.max_time", "soon"], "--train.max_time soon: expected minutes, as 90, or hours, minutes and"),
        (
            ["--train.skip_nonfinite", "-1", "--train.patience", "0"],
            "--train.skip_nonfinite must be 0 or more, got -1; --train.patience must be positive, got 0",
        ),
        (["--eval.sample_prompt", "river " * 200], "tokens; the context is 128"),
        (["--devices", "0"], "--devices times --num_nodes must be positive and below 2^31, got 0"),
        (["--ether_head", "true", "--io.checkpoint_dir", "nowhere", "--train.epochs", "0"], "; --train.epochs must be"),
    ],
)
def test_what_cannot_work_is_refused_in_one_line_before_anything_is_written(work, tmp_path, capsys, more, message):
    name, arguments = command(work, "ether", tmp_path / "run", *more)
    assert message in refusal(capsys, name, arguments)
    assert not (tmp_path / "run").exists()


def test_a_mistyped_form_of_reflections_is_refused_before_anything_is_written(work, tmp_path, capsys):
    """ETHER_REFLECTIONS=tritn left an empty run folder."""
    name, arguments = command(work, "ether", tmp_path / "run")
    with use_form("tritn"):
        assert "ETHER_REFLECTIONS is 'tritn'" in refusal(capsys, name, arguments)
    assert not (tmp_path / "run").exists()


def test_data_that_ends_before_the_steps_asked_for_is_told(work, tmp_path, capsys):
    """--train.max_steps 12 on data for 8 steps ran 8 without a word."""
    told = "the data ends before --train.max_steps 7: more --train.epochs make a longer run"
    epoch = ("--train.epoch_size", "8")  # two steps
    assert train(work, "lora", tmp_path / "one", *epoch, "--train.max_steps", "7")["steps"] == 2
    assert told in capsys.readouterr().out
    train(work, "lora", tmp_path / "two", *epoch, "--train.max_steps", "2")
    assert "the data ends" not in capsys.readouterr().out


def test_data_for_another_tokenizer_is_refused(work, tmp_path, capsys, spm_dir):
    other = write_base(tmp_path / "other", spm_dir)
    name, arguments = command(work, "ether", tmp_path / "run", "--io.checkpoint_dir", str(other))
    assert "has another one; prepare it again with --checkpoint_dir" in refusal(capsys, name, arguments)


def test_a_finished_run_is_not_written_into(work, tmp_path, capsys):
    train(work, "ether", tmp_path / "run")
    name, arguments = command(work, "ether", tmp_path / "run")
    assert "already holds lit_model_ether_finetuned.pth" in refusal(capsys, name, arguments)
    main(script(name), [*arguments, "--overwrite", "true"])


def test_a_diverging_run_stops_with_its_step_and_rate(work, tmp_path, capsys):
    name, arguments = command(work, "full", tmp_path / "run", "--train.learning_rate", "1e30")
    assert "lower the rate" in refusal(capsys, name, arguments)


@pytest.fixture(scope="module")
def poisoned(work, bpe_dir) -> tuple[list[str], int]:
    """Flags of a base and data that give NaN on one row of train.pt alone, and the row."""
    base = write_base(work / "poisoned", bpe_dir, tie_embeddings=False)
    samples, row = load_split(work / "data" / "train.pt"), sample_order(38, 36, seed=1337)[9]
    unused = max(set(range(400)) - {token for sample in samples for token in sample["input_ids"].tolist()})
    state = {name: tensor.clone() for name, tensor in load_state(base / "lit_model.pth").items()}
    state["transformer.wte.weight"][unused] = math.nan
    save_state(state, base / "lit_model.pth")
    shutil.copytree(work / "data", work / "poisoned_data")
    samples[row]["input_ids"][0] = unused
    save_samples(samples, work / "poisoned_data" / "train.pt")
    return ["--io.checkpoint_dir", str(base), "--io.train_data_dir", str(work / "poisoned_data")], row


def test_a_loss_that_is_not_finite_is_told_with_its_rows_or_left_out(work, tmp_path, capsys, poisoned):
    flags, row = poisoned
    more = [*flags, "--train.max_steps", "9", "--train.save_interval", "1"]
    name, arguments = command(work, "etherplusHH", tmp_path / "run", *more)
    line = refusal(capsys, name, arguments)
    rows = sample_order(38, 36, seed=1337)[8:12]
    assert row in rows and "step 3 has a loss of nan and a gradient of norm nan, at a learning rate of" in line
    assert f"on rows {', '.join(map(str, rows))} of train.pt; lower the rate" in line
    assert "step-000002: --resume true goes on from it" in line
    summary = train(work, "etherplusHH", tmp_path / "run", *more, "--resume", "true", "--train.skip_nonfinite", "1")
    assert summary["skipped_steps"] == 1 and summary["steps"] == 9
    assert "left out (1 of 1 such steps)" in capsys.readouterr().out
    assert all(torch.isfinite(tensor).all() for tensor in adapter_of(tmp_path / "run").values())


def test_clipping_bounds_the_gradient_and_none_changes_nothing(work, tmp_path):
    for name, bound in (
        ("none", []),
        ("high", ["--train.max_grad_norm", "1e9"]),
        ("low", ["--train.max_grad_norm", "1"]),
    ):
        train(work, "etherplusHH", tmp_path / name, *bound)
    norms = losses_of(tmp_path / "none", "grad_norm")
    assert min(norms) > 1 and losses_of(tmp_path / "low", "grad_norm")[0] == norms[0]
    none, high, low = (adapter_of(tmp_path / name) for name in ("none", "high", "low"))
    assert all(torch.equal(none[n], high[n]) for n in none) and not all(torch.equal(none[n], low[n]) for n in none)


def test_early_stopping_keeps_the_best_step(work, tmp_path, capsys):
    more = ["--train.patience", "1", "--eval.interval", "1", "--train.learning_rate", "0.3", "--train.max_steps", "9"]
    summary = train(work, "full", tmp_path / "run", *more, "--train.keep_checkpoints", "1")
    validations = losses_of(tmp_path / "run", "val_response_loss")[1:]
    best = min(range(len(validations)), key=validations.__getitem__)
    assert summary["steps"] == len(validations) == best + 2 < 9
    assert summary["val_response_loss_after"] == pytest.approx(validations[best], rel=1e-5)
    told = f"no lower response loss in 1 validation(s): the result is that of step {best + 1}, the best"
    assert told in capsys.readouterr().out
    kept = load_model(tmp_path / f"run/checkpoints/step-{best + 1:06d}/final").state_dict()
    result = load_model(tmp_path / "run" / "final").state_dict()
    assert all(torch.equal(kept[name], tensor) for name, tensor in result.items())


NAN, INF = math.nan, math.inf


@pytest.mark.parametrize(
    ("validations", "best", "worse"),
    [
        ([NAN, 4, 3, 2], 4, 0), ([NAN, 4, NAN, 5], 2, 2), ([INF, NAN], 0, 2), ([3, NAN, INF, 2.5], 4, 0),
        ([-INF, 3], 2, 0), ([3, 3, 2, 4], 3, 1),
    ],
)  # fmt: skip
def test_a_loss_that_is_not_finite_is_never_the_best(validations, best, worse):
    """Nothing is lower than NaN: a first validation of NaN stayed the best, and the run ended early with its result."""
    at = Position()
    for at.step, loss in enumerate(validations, 1):
        at.last_losses = (loss, loss)
        better = Trainer.compare_with_best(SimpleNamespace(position=at))
        assert better == (at.best_step == at.step)
    assert (at.best_step, at.since_best) == (best, worse)


def test_time_is_over_and_the_run_goes_on_later(work, tmp_path, capsys):
    more = ["--train.max_steps", "9", "--ether_dropout", "0.2"]
    train(work, "ether", tmp_path / "whole", *more)
    name, arguments = command(work, "ether", tmp_path / "run", *more, "--train.max_time", "0:0:0.01")
    main(script(name), arguments)
    assert "--train.max_time 0:0:0.01 is over: saved" in capsys.readouterr().out
    assert losses_of(tmp_path / "run") == losses_of(tmp_path / "whole")[:1]
    train(work, "ether", tmp_path / "run", *more, "--resume", "true")
    one, other = adapter_of(tmp_path / "whole"), adapter_of(tmp_path / "run")
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_samples_and_checkpoints_leave_the_result_as_it_is(work, tmp_path, capsys):
    dropout = ["--ether_dropout", "0.2", "--ether_block_dropout", "0.2"]
    train(work, "etherplusHH", tmp_path / "plain", *dropout)
    capsys.readouterr()
    more = ["--eval.sample_interval", "1", "--eval.sample_tokens", "5", "--train.save_interval", "1"]
    train(work, "etherplusHH", tmp_path / "shown", *dropout, *more)
    assert len(re.findall(r"^step \d answers: ", capsys.readouterr().out, re.M)) == 6
    train(work, "etherplusHH", tmp_path / "asked", *dropout, *more, "--eval.sample_prompt", "name colour 3")
    plain = adapter_of(tmp_path / "plain")
    for name in ("shown", "asked"):
        assert all(torch.equal(plain[n], tensor) for n, tensor in adapter_of(tmp_path / name).items())
        assert losses_of(tmp_path / "plain", "val_loss") == losses_of(tmp_path / name, "val_loss")


def test_a_logger_that_is_not_installed_is_told_before_anything_is_loaded(work, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(sys, "path", [str(ROOT)])
    monkeypatch.delitem(sys.modules, "wandb", raising=False)
    name, arguments = command(work, "ether", tmp_path / "run", "--io.wandb", "true")
    told = "--io.wandb true cannot import wandb (No module named 'wandb'): pip install wandb"
    assert told in refusal(capsys, name, arguments)


def test_tensorboard_has_the_numbers_of_metrics_csv(work, tmp_path):
    event_accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    train(work, "ether", tmp_path / "run", "--io.tensorboard", "true")
    events = event_accumulator.EventAccumulator(str(tmp_path / "run" / "tensorboard")).Reload()
    assert [event.step for event in events.Scalars("loss")] == list(range(1, 7))
    assert [event.value for event in events.Scalars("loss")] == pytest.approx(losses_of(tmp_path / "run"), rel=1e-5)


def test_an_adapter_of_another_base_or_kind_is_refused(work, tmp_path, capsys, bpe_dir):
    train(work, "ether", tmp_path / "run")
    path = str(tmp_path / "run" / "lit_model_ether_finetuned.pth")
    other = write_base(tmp_path / "other", bpe_dir, n_layer=1)
    flags = ["--checkpoint_dir", str(other), "--ether_path", path]
    assert "belongs to another base model: base" in refusal(capsys, "scripts/merge_ether.py", flags)
    flags = ["--checkpoint_dir", str(work / "base"), "--lora_path", path]
    assert "holds an ETHER adapter; a LoRA one was expected" in refusal(capsys, "scripts/merge_lora.py", flags)
    assert not (tmp_path / "run" / "merged").exists()
    assert math.isfinite(float(json.loads((tmp_path / "run" / "summary.json").read_text())["val_loss_after"]))
