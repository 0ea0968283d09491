"""The run folder: whose it is, what may be in it, the checkpoints, and how a run ends before its time.

A checkpoint is a folder, checkpoints/step-N/, with the result so far (the adapter file, or final/), state.pth (all else
that the rest of the run depends on) and manifest.json (size and SHA-256 of each file).

- It is written under a temporary name, flushed to the disk and renamed: a kill or a full disk leaves the one before.
- A checkpoint that does not fit its manifest is never used: the newest intact one is, and a line says so.
- A run folder belongs to one process at a time, by a lock that the kernel drops with the process.
"""

import errno
import fcntl
import os
import re
import secrets
import shutil
import signal
import socket
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from types import FrameType, SimpleNamespace
from typing import Any

import torch
import yaml

from lit_gpt import files
from lit_gpt.adapter_files import KINDS
from lit_gpt.checkpoint import load_state
from lit_gpt.devices import gather, is_lost_process, together
from lit_gpt.errors import UserError, out_of_memory, reading

CHECKPOINTS, STATE, MANIFEST, LOCK = "checkpoints", "state.pth", "manifest.json", ".ether-lock"
FINAL = "final"
"""The folder of a full finetuning's result."""
SETTINGS = "hparams.yaml"
"""The first file that a run writes: what has it, with our settings, is a run folder of ours."""
SUMMARY = "summary.json"
"""The last file that a run writes: what has it is finished."""
METRICS, MONITOR, LOSS_CURVE, TENSORBOARD = "metrics.csv", "monitor.csv", "loss.png", "tensorboard"
RUN_RESULTS = ("lit_model_*_finetuned.pth", f"{FINAL}/{files.WEIGHTS}", SUMMARY)
"""Results of a run: none of them is replaced without --overwrite."""
RESUME_MAY_CHANGE = (
    "io.", "eval.sample_", "train.save_interval", "train.keep_checkpoints", "train.max_time", "train.skip_nonfinite",
)  # fmt: skip
"""Beginnings of the names of settings that a resumed run may change: they do not alter its result."""
REMOVED = {"train.group_by_length": False}
"""Options of earlier versions, which their checkpoints hold, with the value that every run has now."""
REPEATED = 2.0
"""Seconds after which the same signal ends the run; one that comes earlier is a launcher's echo."""


# ---------------------------------------------------------------------------------------------- whose folder it is
def is_run(folder: Path) -> bool:
    """Return True for a folder that a run of ours has begun to fill."""
    try:
        settings = yaml.safe_load((folder / SETTINGS).read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError):
        return False
    match settings:  # other tools' hparams.yaml may have some of these keys
        case {"method": _, "adapter": _, "precision": _, "io": {"train_data_dir": _}, "train": {"micro_batch_size": _}}:
            return True
    return False


def check_run_folder(folder: Path, *, may_hold_run: bool, sources: Iterable[Path | str | None] = ()) -> None:
    """Raise unless a run may begin in a folder or be resumed there: it is new, empty, or ``may_hold_run`` and does.

    Raises:
        FileExistsError: says what the folder holds, and which flag allows to go on with that.
        ValueError: one of the ``sources``, which the run reads, lies in the folder.
    """
    files.settled_folder(folder)
    # Hidden files are never ours to replace; a batch system's logs are there before the run.
    held = sorted(path.name for path in folder.glob("[!.]*") if path.suffix not in (".log", ".out", ".err"))
    if held and not is_run(folder):
        listed = ", ".join(held[:3]) + (", ..." if len(held) > 3 else "")
        raise FileExistsError(
            f"{folder} is not empty and not a run's folder (it holds {listed}): give another --io.out_dir, a new or an "
            "empty one"
        )
    results = [str(path.relative_to(folder)) for name in RUN_RESULTS for path in sorted(folder.glob(name))]
    if results and not may_hold_run:
        raise FileExistsError(f"{folder} already holds {results[0]}; choose another folder or give --overwrite true")
    if checkpoint_folders(folder) and not may_hold_run:
        raise FileExistsError(
            f"{folder} holds checkpoints of a run: --resume true goes on with it, --overwrite true starts it anew"
        )
    for source in filter(None, sources):
        if folder.resolve() in Path(source).resolve().parents:
            raise UserError(f"{source} lies in {folder}, which this run fills anew: give another --io.out_dir")


@contextmanager
def locked(run_dir: Path, *, lock: str = LOCK, option: str = "--io.out_dir") -> Iterator[None]:
    """Keep other processes out of a folder, which is made where there is none.

    Args:
        run_dir: the folder.
        lock: name of the file that keeps them out: those alone that ask for the same.
        option: of the command line, which the others have to change.

    Raises:
        ValueError: another process has it.
        OSError: the folder cannot be written.
    """
    files.settled_folder(run_dir).mkdir(parents=True, exist_ok=True)
    path, refused = run_dir / lock, False
    with path.open("a+", encoding="utf-8") as file:
        with files.optional("locks", without="nothing keeps a second run out of this folder"):
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError as error:
                refused = error.errno in (errno.EAGAIN, errno.EACCES)  # the second is CIFS's word for it
                if not refused:
                    raise
        # Another process may have had it, and removed it between our opening and locking it.
        if refused or not path.exists() or not os.path.samestat(os.fstat(file.fileno()), path.stat()):
            file.seek(0)
            owner = file.read() or "another process"
            raise UserError(f"{run_dir} is in use by {owner}; wait for it, or give another {option}")
        file.truncate(0)
        file.write(f"process {os.getpid()} on {socket.gethostname()}")
        file.flush()
        try:
            yield
        finally:
            path.unlink(missing_ok=True)


@contextmanager
def open_run(
    fabric: Any, run_dir: Path, *, settings: dict[str, Any], input_hashes: dict[str, str], resume: bool
) -> Iterator[Path | None]:
    """Keep the run folder for this run, and yield the checkpoint to go on from, or None for a start.

    The first process looks, and the others hear of it.

    Raises:
        ValueError, OSError: the folder is in use, or its run cannot be continued exactly.
    """
    with ExitStack() as stack:

        def take() -> Path | None:
            if not fabric.is_global_zero:
                return None
            stack.enter_context(locked(run_dir))
            files.remove_leftovers(run_dir, run_dir / CHECKPOINTS, run_dir / FINAL)
            checkpoint = newest_checkpoint(run_dir) if resume else None
            if checkpoint:
                check_same_run(checkpoint, settings, input_hashes)
            return checkpoint

        def look() -> None:
            if checkpoint and not (checkpoint / MANIFEST).is_file():
                raise FileNotFoundError(
                    f"{checkpoint} is not there: every machine goes on from it, so --io.out_dir must be on a file "
                    "system that all of them share"
                )

        checkpoint, *_ = gather(together(take))
        together(look)
        yield checkpoint


def clear_run(run_dir: Path) -> None:
    """Remove what a run of ours leaves, so that a new one's settings stand beside nothing that they did not make."""
    if not is_run(run_dir):
        return
    for folder in checkpoint_folders(run_dir):
        files.remove(folder)
    for name in (SUMMARY, METRICS, MONITOR, LOSS_CURVE, *(kind.file_name for kind in KINDS.values())):
        (run_dir / name).unlink(missing_ok=True)
    for folder, names in ((run_dir / FINAL, files.WEIGHTS), (run_dir / TENSORBOARD, "events.out.tfevents*")):
        for path in [folder] if folder.is_symlink() else folder.glob(names):  # what a link leads to is somebody's own
            path.unlink()


# --------------------------------------------------------------------------------------------------- checkpoints
def checkpoint_folder(run_dir: Path, step: int) -> Path:
    """Return the folder of a step's checkpoint."""
    return run_dir / CHECKPOINTS / f"step-{step:06d}"


def checkpoint_folders(run_dir: Path) -> list[Path]:
    """Return the checkpoints of a run, oldest first, whole or not.

    Folders of other names (copies), and those without our files, are ignored.
    """
    found = (run_dir / CHECKPOINTS).glob("step-*") if is_run(run_dir) else ()
    named = [path for path in found if re.fullmatch(r"step-\d{6,}", path.name)]
    ours = [path for path in named if (path / MANIFEST).is_file() or (path / STATE).is_file()]
    return sorted(ours, key=lambda path: (len(path.name), path.name))


def last_checkpoint(run_dir: Path) -> str:
    """Say which checkpoint a run can go on from."""
    folders = checkpoint_folders(run_dir)
    return f"the last checkpoint is {folders[-1]}: --resume true goes on from it" if folders else "no checkpoint yet"


def rename_damaged(folder: Path) -> Path:
    """Give what has a checkpoint's name another one, which no checkpoint has; return the new path."""
    target = folder.with_name(f"aside-{folder.name}.{secrets.token_hex(2)}")
    files.move(folder, target)
    return target


@contextmanager
def new_checkpoint(run_dir: Path, step: int, *, keep: int, best: int = 0) -> Iterator[Path]:
    """Yield an empty folder that becomes checkpoints/step-N; then the ``keep`` newest stay, and the ``best`` step's."""
    folder = checkpoint_folder(run_dir, step)
    folder.parent.mkdir(parents=True, exist_ok=True)
    staging = files.temporary_name(folder)
    staging.mkdir()
    try:
        yield staging
        written = [path for path in sorted(staging.rglob("*")) if path.is_file()]
        listed = {
            str(path.relative_to(staging)): {"bytes": path.stat().st_size, "sha256": files.file_sha256(path)}
            for path in written
        }
        files.write_json(staging / MANIFEST, listed)
        for path in (*staging.rglob("*"), staging):
            files.flush(path)
        if os.path.lexists(folder):  # somebody's own
            print(f"{folder} is no checkpoint of this run: it is {rename_damaged(folder).name} now")
        files.move(staging, folder)
        files.flush(folder.parent)
    finally:
        shutil.rmtree(staging, ignore_errors=True)
    for old in checkpoint_folders(run_dir)[:-keep]:
        if old != checkpoint_folder(run_dir, best):  # no checkpoint is of step 0
            files.remove(old)


def find_damage(folder: Path) -> str | None:
    """Say what is wrong with a checkpoint's files; None where they are as they were written."""
    try:
        for name, written in files.read_json(folder / MANIFEST).items():
            if (folder / name).stat().st_size != written["bytes"]:
                return f"{name} has another size"
            if files.file_sha256(folder / name) != written["sha256"]:
                return f"{name} holds other bytes"
    except (OSError, ValueError, AttributeError, KeyError, TypeError) as error:
        return f"{MANIFEST} or what it lists cannot be read: {' '.join(str(error).split())}"
    return None


def newest_checkpoint(run_dir: Path) -> Path | None:
    """Return the newest undamaged checkpoint, or None where there is none at all; name and set aside damaged ones.

    Raises:
        ValueError: all of them are damaged.
    """
    damaged: dict[Path, str] = {}
    for folder in reversed(checkpoint_folders(run_dir)):
        problem = find_damage(folder)
        if problem is None:
            for bad, why in damaged.items():
                now = rename_damaged(bad).name
                print(f"{bad} is damaged ({why}): going on from {folder.name} instead; it is {now} now")
            return folder
        damaged[folder] = problem
    if damaged:
        reasons = "; ".join(f"{folder.name}: {problem}" for folder, problem in damaged.items())
        raise UserError(f"no checkpoint of {run_dir} is whole ({reasons}): remove it, or give --overwrite true")
    return None


def check_same_run(folder: Path, settings: dict[str, Any], input_hashes: dict[str, str]) -> None:
    """Raise where going on from a checkpoint would not give what the run was to give.

    Raises:
        ValueError: names each setting and input that has changed, with both values.
    """
    state = load_state(folder / STATE)
    if changed := changes(flatten(state["settings"]) | state["facts"], flatten(settings) | input_hashes):
        raise UserError(f"{folder} cannot be continued exactly: {changed}. Set them back, or start another run")
    here = environment()
    for name, value in state["environment"].items():
        if value != here[name]:
            print(f"{name} was {value} and is {here[name]} now: the last digits may differ from an unbroken run's")


def check_finished(run_dir: Path, settings: dict[str, Any], input_hashes: dict[str, str]) -> None:
    """Raise UserError where a finished run had other settings, data or base than the command that asks for it."""
    before = yaml.safe_load((run_dir / SETTINGS).read_text(encoding="utf-8")) if is_run(run_dir) else {}
    with reading(run_dir / SUMMARY):
        inputs = dict(files.read_json(run_dir / SUMMARY).get("inputs", {}))  # earlier versions did not write them
    if changed := changes(flatten(before) | inputs, flatten(settings) | input_hashes):
        raise UserError(f"{run_dir} holds a finished run with other settings: {changed}. Give another --io.out_dir")


def changes(before: dict[str, Any], now: dict[str, Any]) -> str:
    """Return which settings changed that decide a run's result, with both values; empty where none did."""
    now = REMOVED | now
    return "; ".join(  # an option that the earlier run does not know is newer than it
        f"{name} was {then}, is {now.get(name)}"
        for name, then in before.items()
        if not name.startswith(RESUME_MAY_CHANGE) and then != now.get(name)
    )


def flatten(settings: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return nested settings by dotted names, as flags have them."""
    flat: dict[str, Any] = {}
    for name, value in settings.items():
        flat |= flatten(value, f"{prefix}{name}.") if isinstance(value, dict) else {prefix + name: value}
    return flat


def environment() -> dict[str, str]:
    """Return what the last digits of a result depend on beside its settings."""
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"
    return {"torch": str(torch.__version__), "threads": str(torch.get_num_threads()), "device": device}


def random_state() -> dict[str, Any]:
    """Return the state of the generators that training draws from, in this process."""
    return {"torch": torch.get_rng_state(), "cuda": torch.cuda.get_rng_state() if torch.cuda.is_available() else None}


def restore_random_state(state: Mapping[str, Any]) -> None:
    """Set the generators of this process to a ``random_state``."""
    torch.set_rng_state(state["torch"])
    if state["cuda"] is not None and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])


# -------------------------------------------------------------------------------------------- signals and faults
@contextmanager
def explain_faults(run_dir: Path, *, tried: str, remedies: str) -> Iterator[None]:
    """Turn a lack of memory or of disk, and the end of another process, into one line that says what to do.

    For memory, it says what was ``tried``, and what takes less.
    """
    try:
        yield
    except (RuntimeError, MemoryError, OSError) as error:
        text, on = " ".join(str(error).split()), last_checkpoint(run_dir)
        if out_of_memory(error):
            raise UserError(f"out of memory with {tried}: {remedies}; {on} ({text[:120]})") from error
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise OSError(f"cannot write {run_dir} ({text}): free some space; {on}") from error
        if isinstance(error, RuntimeError) and is_lost_process(error):
            what = "does not answer" if "imed out" in text else "has ended, see its message"
            raise UserError(f"another process of this run {what}; {on} ({text[:120]})") from error
        raise


@contextmanager
def stop_signal() -> Iterator[SimpleNamespace]:
    """Inside, the first signal that asks for an end is noted in ``received``; again, it ends the process at once."""
    first = SimpleNamespace(received=0, at=0.0)

    def note(number: int, frame: FrameType | None) -> None:
        now = time.monotonic()
        if not first.received:
            first.received, first.at = number, now
            signal.signal(signal.SIGINT, signal.SIG_DFL)
            # os.write: print is not safe inside a signal handler that may have interrupted a print.
            name = signal.Signals(number).name
            os.write(2, f"{name}: saving at the end of this step; once more ends at once, without saving\n".encode())
        # Launchers pass on what each process has got itself, and batch systems warn by one signal and end by another.
        elif number == first.received and now - first.at > REPEATED:
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)

    asking = [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1]  # SLURM warns with the last
    asking += [] if signal.getsignal(signal.SIGHUP) == signal.SIG_IGN else [signal.SIGHUP]  # ignored under nohup
    before = {number: signal.signal(number, note) for number in asking}
    try:
        yield first
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
