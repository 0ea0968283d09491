"""Runs that are killed, stopped, starved and tampered with: the scripts' own setup, in processes of their own."""

import os
import random
import shutil
import signal
import subprocess
import time
from pathlib import Path

import pytest
import torch
import yaml
from helpers import (
    ADAPTER,
    Training,
    command,
    losses_of,
    refusal,
    same_result,
    save_samples,
    script,
    train,
    two_processes,
    unfinished,
    wait_for,
    write_base,
)

from lit_gpt import launch
from lit_gpt import train as train_module
from lit_gpt.checkpoint import load_model
from lit_gpt.cli import main
from lit_gpt.data import load_split
from lit_gpt.files import locked, write_text
from lit_gpt.run_folder import (
    OUR_SETTINGS,
    REPEATED,
    check_same_run,
    checkpoint_folders,
    find_damage,
    flatten,
    stop_signal,
)
from lit_gpt.train import Trainer

DROPOUT = ["--Htype", "etherplusHH", "--ether_dropout", "0.2", "--ether_block_dropout", "0.1"]
LONG = [*DROPOUT, "--train.epochs", "9", "--train.max_steps", "60", "--train.save_interval", "4"]
LONG += ["--eval.interval", "7", "--deterministic", str(torch.cuda.is_available()).lower()]


def kill_until_done(work, out, *more, n_kills: int, seed: int) -> tuple[int, int]:
    """Kill -9 at random moments of the training, go on, and so on; returns the kills, and those inside a save."""
    rng, hits, in_save = random.Random(seed), 0, 0
    metrics = out / "metrics.csv"
    for _ in range(n_kills):
        before = metrics.stat().st_ino if metrics.exists() else 0
        training = Training(work, out, *more, "--resume", "true")
        while training.alive and (not metrics.exists() or metrics.stat().st_ino == before):
            time.sleep(0.005)
        time.sleep(rng.uniform(0, 0.4))
        hits += training.alive
        training.end(signal.SIGKILL)
        in_save += any((out / "checkpoints").glob(".ether-tmp-*"))
    code, text = Training(work, out, *more, "--resume", "true").end()
    assert code == 0, text
    return hits, in_save


@pytest.fixture(scope="module")
def whole(work, tmp_path_factory) -> Path:
    """A run that nothing interrupts: 60 steps, checkpoints every 4, validations every 7, dropout on."""
    out = tmp_path_factory.mktemp("whole") / "run"
    train(work, "etherplusHH", out, *LONG)
    return out


def test_a_run_that_is_killed_again_and_again_ends_with_the_same_bits(work, whole, tmp_path):
    hits, _ = kill_until_done(work, tmp_path / "run", *LONG, n_kills=4, seed=0)
    assert hits >= 2
    assert same_result(tmp_path / "run", whole)
    assert not [path for path in (tmp_path / "run").rglob(".*") if path.name != ".lock"]


@pytest.mark.parametrize(
    ("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130), (signal.SIGUSR1, 138), (signal.SIGHUP, 129)]
)
def test_a_signal_saves_and_ends_and_the_run_goes_on(work, whole, tmp_path, number, code):
    out = tmp_path / "run"
    training = Training(work, out, *LONG, "--train.save_interval", "1000")
    wait_for(lambda: (out / "metrics.csv").exists() and "\n1," in (out / "metrics.csv").read_text())
    ended, text = training.end(number)
    assert ended == code, text
    assert f"{signal.Signals(number).name}: saved {out}/checkpoints/step-0" in text and "--resume true" in text
    assert len(checkpoint_folders(out)) == 1
    train(work, "etherplusHH", out, *LONG, "--resume", "true")
    assert same_result(out, whole)


def test_one_request_to_end_may_come_as_several_signals():
    """torchrun passes on what its processes have got themselves; SLURM sends SIGUSR1, and SIGTERM later."""
    with stop_signal() as stop:
        for number in (signal.SIGUSR1, signal.SIGUSR1, signal.SIGTERM):
            os.kill(os.getpid(), number)
        assert stop.received == signal.SIGUSR1
    child = os.fork()
    if child == 0:
        with stop_signal() as stop:
            os.kill(os.getpid(), signal.SIGTERM)
            stop.at -= REPEATED
            os.kill(os.getpid(), signal.SIGTERM)
        os._exit(0)
    assert os.WTERMSIG(os.waitpid(child, 0)[1]) == signal.SIGTERM


def test_under_nohup_the_end_of_the_terminal_is_not_a_request(monkeypatch):
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with stop_signal() as stop:
            os.kill(os.getpid(), signal.SIGHUP)
        assert not stop.received
    finally:
        signal.signal(signal.SIGHUP, before)


def test_a_signal_while_the_result_is_written_does_not_lose_it(work, tmp_path, monkeypatch):
    """A run without checkpoints has nothing else to go on from."""
    write = train_module.write_summary

    def signalled(*args) -> None:
        os.kill(os.getpid(), signal.SIGTERM)
        write(*args)

    monkeypatch.setattr(train_module, "write_summary", signalled)
    assert train(work, "ether", tmp_path / "run")["steps"] == 6


def test_a_second_signal_after_the_last_step_does_not_lose_the_result(work, tmp_path, monkeypatch):
    """The first came in the last step, so that the run was done; the second ended it before anything was written."""
    step, finish = Trainer.train_step, Trainer.finish

    def last_step(self: Trainer) -> dict[str, float]:
        if self.position.step == self.plan.n_steps:
            os.kill(os.getpid(), signal.SIGTERM)
        return step(self)

    def signalled(self: Trainer) -> None:
        os.kill(os.getpid(), signal.SIGTERM)
        finish(self)

    monkeypatch.setattr("lit_gpt.run_folder.REPEATED", 0.0)
    monkeypatch.setattr(Trainer, "train_step", last_step)
    monkeypatch.setattr(Trainer, "finish", signalled)
    assert train(work, "ether", tmp_path / "run")["steps"] == 6


def test_a_run_that_ended_meanwhile_is_not_cleared(work, tmp_path, monkeypatch, capsys):
    """Two commands named one folder: the second had looked at it before the first had its result."""
    out, alike = tmp_path / "run", launch.check_alike

    def slow(settings: dict) -> None:
        alike(settings)
        monkeypatch.setattr(launch, "check_alike", alike)
        train(work, "ether", out)

    monkeypatch.setattr(launch, "check_alike", slow)
    name, arguments = command(work, "ether", out)
    assert "already holds lit_model_ether_finetuned.pth" in refusal(capsys, name, arguments)
    assert (out / "summary.json").is_file() and not [*out.glob(".ether-*")]


def test_a_finished_run_is_only_looked_at(work, tmp_path, monkeypatch, capsys):
    """A lock cannot be made on a read-only disk."""
    train(work, "ether", tmp_path / "run")
    monkeypatch.setattr("lit_gpt.run_folder.locked", None)
    name, arguments = command(work, "ether", tmp_path / "run", "--resume", "true")
    main(script(name), arguments)
    assert "holds a finished run: nothing to do" in capsys.readouterr().out


def test_a_resume_says_that_the_machine_is_another(work, tmp_path, capsys):
    """The bits are promised for the same threads and device alone."""
    train(work, "ether", tmp_path / "run", "--train.save_interval", "3")
    (tmp_path / "run" / "summary.json").unlink()
    before = torch.get_num_threads()
    torch.set_num_threads(before + 1)
    train(work, "ether", tmp_path / "run", "--train.save_interval", "3", "--resume", "true")
    torch.set_num_threads(before)
    assert f"threads was {before} and is {before + 1} now: the last digits may differ" in capsys.readouterr().out


def test_damaged_checkpoints_are_passed_over_and_named(work, whole, tmp_path, capsys):
    """A flipped byte and a file cut short cost the steps since the checkpoint before, and nothing else."""
    out = tmp_path / "run"
    stopped_at(work, out, 13)
    *_, good, cut, flipped = checkpoint_folders(out)
    data = bytearray((flipped / ADAPTER).read_bytes())
    data[len(data) // 2] ^= 1
    (flipped / ADAPTER).write_bytes(data)
    os.truncate(cut / "state.pth", 100)
    assert "other bytes" in find_damage(flipped) and "other bytes" in find_damage(cut) and find_damage(good) is None
    capsys.readouterr()
    train(work, "etherplusHH", out, *LONG, "--resume", "true")
    told = capsys.readouterr().out
    assert f"{flipped} is damaged ({ADAPTER} holds other bytes): going on from {good.name}" in told
    aside = {path.name.partition(".")[0]: path for path in (out / "checkpoints").glob("aside-*")}
    assert (
        set(aside) == {f"aside-{cut.name}", f"aside-{flipped.name}"}
        and f"it is {aside[f'aside-{cut.name}'].name} now" in told
    )
    assert (aside[f"aside-{flipped.name}"] / ADAPTER).read_bytes() == data
    assert same_result(out, whole)


def test_rotation_and_resume_leave_what_is_not_a_checkpoint_of_ours(work, tmp_path):
    """A user's own folders of such names, and one of ours that was moved away and linked."""
    out, away = tmp_path / "run", tmp_path / "away"
    unfinished(work, out)
    checkpoints = out / "checkpoints"
    shutil.move(checkpoints / "step-000003", away)
    (checkpoints / "step-000003").symlink_to(away)
    for name in ("step-000002", "step-000006", "step-000999"):
        (checkpoints / name).mkdir()
        (checkpoints / name / "mine").write_text(name)
    train(work, "ether", out, "--train.save_interval", "3", "--train.keep_checkpoints", "1", "--resume", "true")
    assert {path.parent.name.partition(".")[0] for path in checkpoints.glob("*/mine")} == {
        "step-000002", "aside-step-000006", "step-000999"
    }  # fmt: skip
    assert [path.name for path in checkpoint_folders(out)] == ["step-000006"]
    assert (away / "state.pth").is_file() and not os.path.lexists(checkpoints / "step-000003")


def stopped_at(work, out: Path, n_checkpoints: int) -> None:
    """Let LONG run up to so many checkpoints, all kept, then stop it."""
    training = Training(work, out, *LONG, "--train.keep_checkpoints", "99")
    wait_for(lambda: len(checkpoint_folders(out)) >= n_checkpoints)
    training.end(signal.SIGKILL)


def test_where_every_checkpoint_is_damaged_nothing_is_started(work, tmp_path, capsys):
    train(work, "ether", tmp_path / "run", "--train.save_interval", "3")
    (tmp_path / "run" / "summary.json").unlink()
    for folder, content in zip(checkpoint_folders(tmp_path / "run"), ("null", "[]"), strict=True):
        (folder / "manifest.json").write_text(content)
    name, arguments = command(work, "ether", tmp_path / "run", "--resume", "true")
    assert "is whole (step-000006: manifest.json or what it lists" in refusal(capsys, name, arguments)


def test_a_resumed_run_refuses_what_would_change_its_result(work, tmp_path, capsys):
    out = tmp_path / "run"
    unfinished(work, out)
    more = ["--train.learning_rate", "0.5", "--seed", "7", "--ether_nb", "4", "--io.jobnum", "x", "--resume", "true"]
    name, arguments = command(work, "ether", out, *more)
    line = refusal(capsys, name, arguments)
    assert "adapter.nb was 2, is 4; train.learning_rate was 0.01, is 0.5; seed was 1337, is 7. Set them" in line
    assert "jobnum" not in line
    train(work, "ether", out, "--train.save_interval", "2", "--eval.sample_interval", "3", "--resume", "true")


def test_a_resumed_run_refuses_other_data_and_another_base(work, tmp_path, capsys, bpe_dir):
    out, data = tmp_path / "run", tmp_path / "data"
    unfinished(work, out)
    data.mkdir()
    for file in (work / "data").iterdir():
        (data / file.name).write_bytes(file.read_bytes())
    same = ["--io.train_data_dir", str(data), "--resume", "true"]
    save_samples(load_split(work / "data" / "train.pt")[1:], data / "train.pt")
    name, arguments = command(work, "ether", out, *same)
    assert "train.pt was" in refusal(capsys, name, arguments)
    other = write_base(tmp_path / "other", bpe_dir, n_embd=64)
    name, arguments = command(work, "ether", out, "--io.checkpoint_dir", str(other), "--resume", "true")
    assert "base model was" in refusal(capsys, name, arguments)


def test_a_run_is_neither_restarted_nor_overwritten_by_accident(work, tmp_path, capsys):
    out = tmp_path / "run"
    unfinished(work, out)
    (out / ADAPTER).unlink()
    name, arguments = command(work, "ether", out)
    assert "holds checkpoints of a run: --resume true goes on with it" in refusal(capsys, name, arguments)
    assert "give one of them" in refusal(capsys, name, [*arguments, "--resume", "true", "--overwrite", "true"])
    without = [a for a in arguments if a not in ("--io.out_dir", str(out))]
    assert "--io.out_dir DIR" in refusal(capsys, name, [*without, "--resume", "true"])
    train(work, "ether", out, "--resume", "true")
    before = (out / ADAPTER).stat().st_mtime_ns
    main(script(name), [*arguments, "--resume", "true"])
    assert "holds a finished run: nothing to do" in capsys.readouterr().out
    data = shutil.copytree(work / "data", tmp_path / "data")
    shutil.copyfile(data / "test.pt", data / "train.pt")
    more = ["--resume", "true", "--seed", "1", "--io.jobnum", "2", "--io.train_data_dir", str(data)]
    line = refusal(capsys, name, [*arguments, *more])
    assert "run holds a finished run with other settings: seed was 1337, is 1; train.pt was " in line
    assert (out / ADAPTER).stat().st_mtime_ns == before
    train(work, "ether", out, "--overwrite", "true")
    assert not checkpoint_folders(out)


def test_one_run_folder_is_for_one_process(work, tmp_path, capsys):
    name, arguments = command(work, "ether", tmp_path / "run")
    with locked(tmp_path / "run"):
        assert f"is in use by process {os.getpid()} on" in refusal(capsys, name, arguments)
    main(script(name), arguments)


def test_full_finetuning_resumes_to_the_same_weights(work, tmp_path):
    flags = ["--train.learning_rate", "1e-3", "--train.save_interval", "3", "--precision", "bf16-true"]
    train(work, "full", tmp_path / "run", *flags)
    once = load_model(tmp_path / "run" / "final").state_dict()
    (tmp_path / "run" / "summary.json").unlink()
    for name in ("checkpoints/step-000006", "final"):
        shutil.rmtree(tmp_path / "run" / name)
    train(work, "full", tmp_path / "run", *flags, "--resume", "true")
    again = load_model(tmp_path / "run" / "final").state_dict()
    assert all(torch.equal(once[name], again[name]) for name in once)


@pytest.mark.skipif(os.name != "posix" or os.getuid() != 0, reason="mounting needs root")
def test_a_full_disk_leaves_the_checkpoint_before(work, whole, tmp_path):
    """A small disk fills up during a save: one line, nothing half-written, and the run goes on with room."""
    disk = tmp_path / "disk"
    disk.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=400k", "tmpfs", str(disk)]).returncode:
        pytest.skip("cannot mount here")
    try:
        more = [*LONG, "--train.keep_checkpoints", "99"]
        code, text = Training(work, tmp_path / "run", *more, "--io.out_dir", str(disk / "run")).end()
        assert code == 1 and "Traceback" not in text
        assert f"cannot write {disk / 'run'}" in text.splitlines()[-1]
        folders = checkpoint_folders(disk / "run")
        assert str(folders[-1]) in text and all(find_damage(folder) is None for folder in folders)
        assert not list((disk / "run" / "checkpoints").glob(".*"))
        subprocess.run(["mount", "-o", "remount,size=8m", str(disk)], check=True)
        code, text = Training(
            work, tmp_path / "run", *more, "--io.out_dir", str(disk / "run"), "--resume", "true"
        ).end()
        assert code == 0 and f"going on from {folders[-1]}" in text
        assert same_result(disk / "run", whole)
    finally:
        subprocess.run(["umount", str(disk)], check=True)


def test_two_processes_train_as_one(work, tmp_path):
    """Losses, gradients and validations, through the script, on gloo."""
    more = ["--train.epoch_size", "33", "--train.max_steps", "9"]  # one has no last sample
    more += ["--train.save_interval", "4"]
    train(work, "etherplusHH", tmp_path / "one", *more)
    for training in two_processes(work, tmp_path / "two", *more):
        code, text = training.end()
        assert code == 0, text
    for column in ("loss", "grad_norm", "val_loss", "val_response_loss", "tokens"):
        one, two = (losses_of(tmp_path / name, column) for name in ("one", "two"))
        assert two == pytest.approx(one, rel=1e-5), column


def test_a_process_that_dies_or_is_stopped_ends_the_others_and_they_go_on_together(work, tmp_path):
    whole, out = tmp_path / "whole", tmp_path / "run"
    more = [*LONG, "--train.save_interval", "10"]
    for training in two_processes(work, whole, *more):
        assert training.end()[0] == 0
    for number, expected, told in (
        (signal.SIGKILL, 1, "another process of this run has ended, see its message; the last checkpoint is"),
        (signal.SIGTERM, 143, "SIGTERM: saved"),
    ):
        first, second = two_processes(work, out, *more, "--resume", "true")
        before = len(checkpoint_folders(out))
        wait_for(lambda before=before: len(checkpoint_folders(out)) > before)
        second.end(number)
        code, text = first.end()
        assert code == expected and told in text.splitlines()[-1], text
    for training in two_processes(work, out, *more, "--resume", "true"):
        assert training.end()[0] == 0
    assert same_result(out, whole)


def test_settings_have_the_names_of_their_flags():
    assert flatten({"seed": 1, "train": {"epochs": 2}, "adapter": None}) == {
        "seed": 1, "train.epochs": 2, "adapter": None
    }  # fmt: skip


def test_an_option_newer_than_a_checkpoint_does_not_forbid_to_go_on(tmp_path):
    """A new field of an adapter's config made every earlier run unresumable."""
    before = dict.fromkeys(OUR_SETTINGS) | {"adapter": {"nb": 2}, "train.pt": "a"}
    write_text(tmp_path / "hparams.yaml", yaml.safe_dump(before))
    check_same_run(tmp_path, before | {"adapter": {"nb": 2, "new": False}})
    with pytest.raises(ValueError, match=r"adapter.nb was 2, is 4; train.pt was a, is b"):
        check_same_run(tmp_path, before | {"adapter": {"nb": 4, "new": False}, "train.pt": "b"})
