"""Files that are never lost: a user's own, and ours on file systems that refuse a service."""

import errno
import fcntl
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from helpers import (
    ADAPTER,
    ROOT,
    command,
    export_adapter,
    make_adapter,
    refusal,
    same_result,
    script,
    train,
    unfinished,
    write_llama_config,
)
from hf_models import save

from lit_gpt.checkpoint import load_state, save_state
from lit_gpt.cli import main
from lit_gpt.data import prepare
from lit_gpt.files import (
    LOCK,
    TEMPORARY,
    Progress,
    locked,
    map_or_read,
    move,
    prepare_out_dir,
    refuse_existing,
    say_once,
    staged_dir,
    write_json,
)
from lit_gpt.run_folder import checkpoint_folders
from scripts import convert_lit_checkpoint, export_lora


@pytest.fixture(autouse=True)
def nothing_said() -> None:
    """Let texts that were said once be said again."""
    say_once.cache_clear()


def own_files(folder: Path, *names: str) -> dict[Path, str]:
    """Write a user's files; returns what they hold."""
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(f"my own {name}")
    return {folder / name: f"my own {name}" for name in names}


def untouched(files: dict[Path, str]) -> bool:
    return all(path.read_text() == text for path, text in files.items())


def entries(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*")}


# -------------------------------------------------------------------------------------------------- run folders
@pytest.mark.parametrize("how", [[], ["--resume", "true"], ["--overwrite", "true"]], ids=["", "resume", "overwrite"])
def test_a_folder_that_holds_anything_but_a_run_is_refused_and_stays_as_it_is(work, tmp_path, capsys, how):
    """Training removed checkpoints/ (every model that was ever downloaded) and all hidden names with a second dot."""
    project = tmp_path / "project"
    files = own_files(
        project, "checkpoints/meta/Llama/lit_model.pth", "checkpoints/.keep.me", "checkpoints/step-000002/x",
        ".pre-commit-config.yaml", ".cache.d/x", ".lock", "train.py", "summary.json", "hparams.yaml",
    )  # fmt: skip
    before = entries(project)
    for method in ("ether", "full"):
        name, arguments = command(work, method, project, *how)
        assert "is not empty and not a run's folder (it holds checkpoints, hparams.yaml" in refusal(
            capsys, name, arguments
        )
    assert untouched(files) and entries(project) == before


def test_hidden_files_logs_and_what_a_user_adds_to_a_run_stay(work, tmp_path):
    out = tmp_path / "run"
    files = own_files(out, ".env.local", ".lock", ".cache.d/x", "slurm-7.out")
    train(work, "ether", out, "--train.save_interval", "2")
    copy = "checkpoints/step-000004-copy"
    shutil.copytree(out / "checkpoints" / "step-000004", out / copy)
    files |= own_files(out, "notes.txt", "merged/lit_model.pth", "checkpoints/best/x", f"{copy}/notes", ".old.step.x")
    (out / f"{TEMPORARY}lit_model.pth.0").write_text("half")
    train(work, "ether", out, "--train.save_interval", "1", "--train.keep_checkpoints", "1", "--overwrite", "true")
    assert untouched(files) and (out / copy / ADAPTER).is_file()
    assert [path.name for path in checkpoint_folders(out)] == ["step-000006"]
    assert not list(out.rglob(f"{TEMPORARY}*"))


def test_a_finished_full_finetuning_is_not_replaced(work, tmp_path, capsys):
    out = tmp_path / "run"
    train(work, "full", out)
    weights, summary = out / "final" / "lit_model.pth", out / "summary.json"
    before = weights.read_bytes(), summary.read_bytes()
    for method in ("full", "ether"):
        name, arguments = command(work, method, out, "--train.learning_rate", "0.1")
        assert "already holds final/lit_model.pth; choose another folder or give --overwrite true" in refusal(
            capsys, name, arguments
        )
    shutil.rmtree(out / "final")
    assert "already holds summary.json" in refusal(capsys, name, arguments)
    shutil.copytree(work / "base", out / "final")
    name, arguments = command(work, "full", out, "--io.checkpoint_dir", str(out / "final"), "--overwrite", "true")
    assert "final lies in" in refusal(capsys, name, arguments)
    assert summary.read_bytes() == before[1]
    train(work, "full", out, "--train.learning_rate", "0.1", "--overwrite", "true")
    assert weights.read_bytes() != before[0]


def test_overwrite_removes_what_a_run_of_ours_wrote_and_nothing_else(work, tmp_path):
    """Another method's adapter stayed beside the new settings; what is linked (a checkpoint moved away) stays."""
    out, away = tmp_path / "run", tmp_path / "away"
    train(work, "ether", out, "--train.save_interval", "2", "--train.monitor", "true", "--train.keep_checkpoints", "9")
    shutil.move(out / "checkpoints" / "step-000002", away)
    (out / "checkpoints" / "step-000002").symlink_to(away)
    shutil.copytree(work / "base", tmp_path / "model")
    (out / "final").symlink_to(tmp_path / "model")
    files = own_files(out, "checkpoints/step-000001/x", "lit_model_ether_best_finetuned.pth", "tensorboard/mine")
    (out / "tensorboard" / "events.out.tfevents.0").touch()
    before = entries(away) | entries(tmp_path / "model")
    train(work, "lora", out, "--overwrite", "true")
    assert untouched(files) and entries(away) | entries(tmp_path / "model") == before
    results = {"hparams.yaml", "metrics.csv", "loss.png", "summary.json", "lit_model_lora_finetuned.pth"}
    own = {str(path.relative_to(out)) for path in files} | {"checkpoints", "checkpoints/step-000001", "tensorboard"}
    assert entries(out) == results | own


@pytest.mark.parametrize("how", ["overwrite", "resume"])
def test_a_run_does_not_train_over_its_own_base_or_data(work, tmp_path, capsys, how):
    """The base that data_config.json names was not looked at, nor --resume, which starts anew without checkpoints."""
    out = tmp_path / "run"
    train(work, "full", out)
    (out / "summary.json").unlink()
    weights = (out / "final" / "lit_model.pth").read_bytes()
    rows, options = work / "rows.json", {"checkpoint_dir": out / "final", "max_seq_length": 128}
    prepare(rows, destination_path=tmp_path / "data", **options)
    shutil.copytree(work / "data", out / "data")
    shutil.copytree(work / "base", tmp_path / "linked")
    (tmp_path / "linked" / "lit_model.pth").unlink()
    (tmp_path / "linked" / "lit_model.pth").symlink_to(out / "final" / "lit_model.pth")
    for more, told in (
        (["--io.train_data_dir", str(tmp_path / "data")], "final lies in"),
        (["--io.train_data_dir", str(out / "data")], "train.pt lies in"),
        (["--io.val_data_dir", str(out / "data")], "test.pt lies in"),
        (["--io.checkpoint_dir", str(tmp_path / "linked")], "linked/lit_model.pth lies in"),
    ):
        name, arguments = command(work, "full", out, *more, f"--{how}", "true")
        assert f"{told} {out}, which this run fills anew: give another --io.out_dir" in refusal(capsys, name, arguments)
    assert (out / "final" / "lit_model.pth").read_bytes() == weights


def test_a_missing_folder_in_a_path_hides_nothing(work, tmp_path, bpe_dir, capsys):
    """`missing/../here` was not there when looked at, and there once the missing folder was made."""
    files = own_files(tmp_path / "mine", "hparams.yaml", "model-00001-of-00002.safetensors", "picture.png")
    hidden = tmp_path / "missing" / ".." / "mine"
    name, arguments = command(work, "ether", hidden)
    assert "is not empty and not a run's folder" in refusal(capsys, name, arguments)
    adapter = make_adapter(tmp_path, "llama_tied_gqa", bpe_dir, Htype="ether")
    flags = [f"--checkpoint_dir={tmp_path / 'base'}", f"--out_dir={hidden}"]
    for name, more in (
        ("scripts/merge_ether.py", [f"--ether_path={adapter}"]),
        ("scripts/export_lora.py", [f"--ether_path={adapter}"]),
        ("scripts/convert_lit_checkpoint.py", []),
    ):
        assert "mine already holds model-00001-of-00002.safetensors" in refusal(capsys, name, [*flags, *more]), name
    with pytest.raises(FileExistsError, match="mine already holds picture"):
        refuse_existing([hidden / "picture.png"], overwrite=False)
    write_json(hidden / "new.json", {})
    convert_lit_checkpoint.setup(checkpoint_dir=tmp_path / "base", out_dir=hidden / "hf")
    assert untouched(files) and not (tmp_path / "missing").exists()
    assert (tmp_path / "mine" / "new.json").is_file() and (tmp_path / "mine" / "hf" / "model.safetensors").is_file()


def test_a_file_or_a_link_to_nothing_in_the_place_of_a_folder_is_one_line(work, tmp_path, capsys):
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    own_files(tmp_path, "file")
    for folder in ("link", "link/run", "file", "file/run"):
        kind = "a file" if "file" in folder else f"a link to {tmp_path / 'nowhere'}, which is not there"
        name, arguments = command(work, "ether", tmp_path / folder)
        told = f"{tmp_path / folder.partition('/')[0]} is {kind}, a folder was expected"
        assert refusal(capsys, name, arguments) == f"error: {told}"
        with pytest.raises(FileExistsError, match=f"^{told}$"):
            prepare_out_dir(tmp_path / folder)


def test_settings_of_another_tool_are_no_run(work, tmp_path, capsys):
    files = own_files(tmp_path, "loss.png", "hparams.yaml")
    theirs = {tmp_path / "hparams.yaml": "method: sgd\nio: x\ntrain: {lr: 1}\nadapter: no\nprecision: 16\n"}
    (tmp_path / "hparams.yaml").write_text(theirs[tmp_path / "hparams.yaml"])
    name, arguments = command(work, "ether", tmp_path, "--overwrite", "true")
    assert "not a run's folder (it holds hparams.yaml, loss.png)" in refusal(capsys, name, arguments)
    assert untouched(files | theirs)


# ------------------------------------------------------------------------------------- folders of other scripts
def test_a_users_config_is_not_written_over_and_backups_stay(work, tmp_path, bpe_dir, capsys):
    """Merge, export, the conversions and prepare; --overwrite true replaces what has the same name, and no more."""
    adapter = make_adapter(tmp_path, "llama_tied_gqa", bpe_dir, Htype="ether")
    base, both = tmp_path / "base", {"checkpoint_dir": tmp_path / "base", "out_dir": tmp_path / "out"}
    flags = [f"--{name}={path}" for name, path in both.items()]
    rows, data = work / "rows.json", {"checkpoint_dir": work / "base", "max_seq_length": 128}
    writers = {
        "config.json": lambda more: main(script("scripts/merge_ether.py"), [*flags, f"--ether_path={adapter}", *more]),
        "generation_config.json": lambda more: convert_lit_checkpoint.setup(**both, overwrite=bool(more)),
        "adapter_config.json": lambda more: export_lora.setup(**both, ether_path=adapter, overwrite=bool(more)),
        "data_config.json": lambda more: prepare(rows, destination_path=both["out_dir"], **data, overwrite=bool(more)),
    }
    for name, write in writers.items():
        files = own_files(tmp_path / "out", name)
        backups = own_files(tmp_path / "out", f"{name}.bak", "model_old.safetensors.bak", "tokenizer_mine.json", ".x.y")
        with pytest.raises((FileExistsError, SystemExit)) as error:
            write([])
        assert f"already holds {name}" in f"{error.value}{capsys.readouterr().err}"
        assert untouched(files | backups) and len(entries(tmp_path / "out")) == 5
        write(["--overwrite", "true"])
        assert untouched(backups) and not untouched(files)
        own = own_files(tmp_path / "out", "model-old.safetensors") if name == "generation_config.json" else {}
        write(["--overwrite", "true"])
        assert untouched(backups | own), name
        shutil.rmtree(tmp_path / "out")
    before = (base / "lit_model.pth").read_bytes()
    more = [f"--ether_path={adapter}", f"--checkpoint_dir={base}", f"--out_dir={base}", "--overwrite", "true"]
    assert "is the checkpoint folder itself" in refusal(capsys, "scripts/merge_ether.py", more)
    assert (base / "lit_model.pth").read_bytes() == before


def test_a_folder_where_a_file_is_to_go_is_refused_before_the_work(tmp_path, bpe_dir):
    adapter = make_adapter(tmp_path, "llama_tied_gqa", bpe_dir, Htype="ether")
    (tmp_path / "out" / "adapter_config.json").mkdir(parents=True)
    with pytest.raises(FileExistsError, match=r"adapter_config\.json is a folder"):
        export_adapter(adapter, overwrite=True)


def test_a_picture_is_replaced_only_when_told(work, tmp_path, capsys):
    train(work, "ether", tmp_path / "run")
    files = own_files(tmp_path, "mine.png")
    flags = ["--runs", json.dumps([str(tmp_path / "run")]), "--out", str(tmp_path / "mine.png")]
    assert "already holds mine.png" in refusal(capsys, "scripts/plot_runs.py", flags)
    assert untouched(files)
    main(script("scripts/plot_runs.py"), [*flags, "--overwrite", "true"])


def test_a_staged_folder_leaves_nothing_after_an_error_and_what_was_there(tmp_path):
    files = own_files(tmp_path / "out", "notes")
    for folder in (tmp_path / "out", tmp_path / "new" / "deep"):
        with pytest.raises(RuntimeError), staged_dir(folder) as staging:
            (staging / "a").touch()
            raise RuntimeError
    with pytest.raises(FileExistsError, match="already holds notes"), staged_dir(tmp_path / "out") as staging:
        (staging / "notes").touch()  # somebody else put one there in the meantime
    assert untouched(files) and entries(tmp_path) == {"out", "out/notes"}


@pytest.mark.skipif(os.name != "posix" or os.getuid() != 0, reason="mounting needs root")
def test_a_folder_may_be_a_disk_of_its_own(tmp_path):
    """Staged beside it, the files could not be renamed into it, and the finished work was thrown away."""
    disk = tmp_path / "disk"
    disk.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(disk)]).returncode:
        pytest.skip("cannot mount here")
    try:
        with staged_dir(disk) as staging:
            write_json(staging / "a.json", {})
        assert entries(disk) == {"a.json"}
    finally:
        subprocess.run(["umount", str(disk)], check=True)


# ------------------------------------------------------------------------------- file systems that refuse things
def refuse(number: int):
    def refused(*args, **options):
        raise OSError(number, os.strerror(number))

    return refused


def refuse_all(monkeypatch, number: int) -> None:
    """No locks, no modes, no fsync, and no renaming of folders."""
    replace = Path.replace
    for owner, name in ((fcntl, "flock"), (os, "chmod"), (os, "fchmod"), (Path, "chmod"), (os, "fsync")):
        monkeypatch.setattr(owner, name, refuse(number))
    monkeypatch.setattr(
        Path, "replace", lambda path, target: refuse(number)() if path.is_dir() else replace(path, target)
    )


@pytest.mark.parametrize("number", [errno.ENOTSUP, errno.EPERM, errno.ENOSYS, errno.EINVAL], ids=os.strerror)
def test_a_run_without_locks_modes_fsync_and_renamed_folders_ends_well(work, tmp_path, capsys, monkeypatch, number):
    """Trains, goes on from a checkpoint and gives the bits of a run on a file system that has them all."""
    train(work, "ether", tmp_path / "whole", "--train.save_interval", "3")
    refuse_all(monkeypatch, number)
    capsys.readouterr()
    unfinished(work, tmp_path / "run")
    train(work, "ether", tmp_path / "run", "--train.save_interval", "3", "--resume", "true")
    told = capsys.readouterr()
    assert "going on from" in told.out and "Traceback" not in told.err
    for service in ("locks", "fsync", "a rename"):
        lines = [
            line for line in told.err.splitlines() if line.startswith("warning: this file system refuses " + service)
        ]
        assert len(lines) == 1 and os.strerror(number) in lines[0], told.err
    assert same_result(tmp_path / "run", tmp_path / "whole")
    assert not list((tmp_path / "run").rglob(".*"))


def test_full_finetuning_merging_and_converting_without_them(work, tmp_path, bpe_dir, monkeypatch):
    refuse_all(monkeypatch, errno.ENOTSUP)
    train(work, "full", tmp_path / "run", "--train.save_interval", "3")
    assert (tmp_path / "run" / "checkpoints" / "step-000006" / "final" / "lit_model.pth").is_file()
    write_llama_config(tmp_path / "run" / "final")
    convert_lit_checkpoint.setup(checkpoint_dir=tmp_path / "run" / "final", out_dir=tmp_path / "hf")
    assert (tmp_path / "hf" / "model.safetensors").is_file()
    export_adapter(make_adapter(tmp_path, "llama_tied_gqa", bpe_dir, Htype="ether"))


def test_a_lock_that_another_process_holds_still_refuses(tmp_path, monkeypatch):
    for number in (errno.EAGAIN, errno.EACCES):
        monkeypatch.setattr(fcntl, "flock", refuse(number))
        with pytest.raises(ValueError, match="is in use by another process"), locked(tmp_path):
            pass


def test_without_locks_two_commands_may_stage_in_one_folder(tmp_path, monkeypatch):
    """The second removed what the first was writing, as a leftover of one that had been killed."""
    monkeypatch.setattr(fcntl, "flock", refuse(errno.ENOLCK))
    with staged_dir(tmp_path) as one:
        (one / "a.txt").write_text("a")
        with staged_dir(tmp_path) as two:
            (two / "b.txt").write_text("b")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.txt", "b.txt"]


def test_a_link_in_the_place_of_a_lock_is_not_followed(tmp_path):
    """Its target was written over with the process that held the lock."""
    (tmp_path / "own.txt").write_text("mine")
    (tmp_path / LOCK).symlink_to(tmp_path / "own.txt")
    with pytest.raises(OSError, match=LOCK), locked(tmp_path):
        pass
    assert (tmp_path / "own.txt").read_text() == "mine"


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EIO, errno.EDQUOT], ids=os.strerror)
def test_a_full_or_broken_disk_is_no_refusal(tmp_path, monkeypatch, number):
    monkeypatch.setattr(os, "fsync", refuse(number))
    with pytest.raises(OSError, match=os.strerror(number)):
        write_json(tmp_path / "a.json", {})
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("number", [errno.EXDEV, errno.EPERM, errno.EMFILE], ids=os.strerror)
def test_where_nothing_can_be_renamed_files_are_copied(tmp_path, monkeypatch, number):
    monkeypatch.setattr(Path, "replace", refuse(number))
    save_state({"a": torch.ones(3)}, tmp_path / "a.pth")
    assert torch.equal(load_state(tmp_path / "a.pth")["a"], torch.ones(3))
    own_files(tmp_path / "folder", "one", "sub/two")
    move(tmp_path / "folder", tmp_path / "other")
    assert entries(tmp_path / "other") == {"one", "sub", "sub/two"}


def test_an_export_has_the_mode_that_the_umask_gives(tmp_path, bpe_dir):
    """safetensors puts a file of its own, for the owner alone, in the place of the one that it is given."""
    out = export_adapter(make_adapter(tmp_path, "llama_tied_gqa", bpe_dir, Htype="ether"))
    umask = os.umask(0)
    os.umask(umask)
    assert {path.stat().st_mode & 0o777 for path in out.iterdir()} == {0o666 & ~umask}


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("unable to mmap 9 bytes from file <f>: No such device (19)"),
        OSError("No such device (os error 19)"),
    ],
    ids=["torch", "safetensors"],
)
def test_where_files_cannot_be_mapped_they_are_read(error, capsys):
    def mapped():
        raise error

    assert map_or_read(mapped, lambda: 5) == 5
    assert "warning: this file system refuses to map files" in capsys.readouterr().err
    with pytest.raises(RuntimeError, match="failed finding central directory"):
        map_or_read(lambda: (_ for _ in ()).throw(RuntimeError("failed finding central directory")), lambda: 5)


NO_MAP = """
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>
void *mmap(void *a, size_t n, int p, int f, int fd, off_t o) {
    void *(*real)(void *, size_t, int, int, int, off_t) = dlsym(RTLD_NEXT, "mmap");
    char link[64], name[4096];
    snprintf(link, 64, "/proc/self/fd/%d", fd);
    ssize_t size = fd < 0 ? -1 : readlink(link, name, 4095);
    if (size > 0 && !strncmp(name, getenv("NO_MAP"), strlen(getenv("NO_MAP")))) { errno = ENODEV; return MAP_FAILED; }
    return real(a, n, p, f, fd, o);
}
void *mmap64(void *a, size_t n, int p, int f, int fd, off_t o) { return mmap(a, n, p, f, fd, o); }
"""


@pytest.mark.skipif(shutil.which("gcc") is None, reason="the stand-in for such a file system is written in C")
def test_scripts_read_a_folder_that_cannot_be_mapped(work, tmp_path):
    """safetensors in, then torch's files: weights, an adapter, prepared data, a checkpoint."""
    (tmp_path / "no_map.c").write_text(NO_MAP)
    subprocess.run(["gcc", "-shared", "-fPIC", "-o", "no_map.so", "no_map.c", "-ldl"], cwd=tmp_path, check=True)
    environment = {**os.environ, "LD_PRELOAD": str(tmp_path / "no_map.so"), "NO_MAP": str(tmp_path / "files")}
    save("llama_tied_gqa", tmp_path / "files" / "llama")
    shutil.copytree(work, tmp_path / "files" / "work")
    name, arguments = command(tmp_path / "files" / "work", "ether", tmp_path / "files" / "run")
    arguments += ["--io.checkpoint_dir", str(tmp_path / "files" / "work" / "base")]
    for script_name, flags in (
        ("scripts/convert_hf_checkpoint.py", ["--checkpoint_dir", str(tmp_path / "files" / "llama")]),
        (name, arguments),
    ):
        done = subprocess.run(
            [sys.executable, str(ROOT / script_name), *flags], env=environment, capture_output=True, text=True
        )
        assert done.returncode == 0 and "refuses to map files" in done.stderr, done.stderr
    assert load_state(tmp_path / "files" / "llama" / "lit_model.pth")
    assert (tmp_path / "files" / "run" / ADAPTER).is_file()


def test_progress_is_a_line_a_minute_off_a_terminal_and_a_bar_on_one(monkeypatch, capsys):
    """Work of three minutes, by a clock that runs: three lines, or a bar that is gone at the end."""
    clock = [0.0]
    monkeypatch.setattr("tqdm.std.time", lambda: clock[0])

    def work(seconds: int) -> str:
        with Progress(desc="writing", total=seconds * 10**8, unit="B") as bar:
            for _ in range(seconds // 10):
                clock[0] += 10
                bar.update(10**9)
        return capsys.readouterr().err

    assert work(50) == ""
    assert work(180).splitlines() == [
        "writing:  33% 6.00G/18.0G [01:00<02:00, 100MB/s]",
        "writing:  67% 12.0G/18.0G [02:00<01:00, 100MB/s]",
        "writing: 100% 18.0G/18.0G [03:00<00:00, 100MB/s]",
    ]
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    bar = work(180)
    assert "\n" not in bar and bar.endswith(" \r") and bar.count("writing") > 10
    assert list(Progress(range(3), desc="rows")) == [0, 1, 2]
