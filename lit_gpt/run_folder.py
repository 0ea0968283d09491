"""The run folder: whose it is, what may be in it, the checkpoints, and how a run ends before its time.

A checkpoint is a folder, checkpoints/step-N/, with the result so far (the adapter file, or final/), state.pth (all else
that the rest of the run depends on) and manifest.json (the SHA-256 of each file).

- It is written under a temporary name, flushed to the disk and renamed: a kill or a full disk leaves the one before.
- A checkpoint that does not fit its manifest is never used: the newest intact one is, and a line says so.
- A run folder belongs to one process at a time, by a lock that the kernel drops with the process.
"""

import errno
import os
import re
import secrets
import signal
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from types import FrameType, SimpleNamespace
from typing import Any

import torch
import yaml

from lit_gpt import files
from lit_gpt.adapter_files import KINDS
from lit_gpt.devices import gather, is_lost_process, together
from lit_gpt.errors import UserError, out_of_memory
from lit_gpt.files import locked

CHECKPOINTS, STATE, MANIFEST = "checkpoints", "state.pth", "manifest.json"
FINAL = "final"
"""The folder of a full finetuning's result."""
SETTINGS = "hparams.yaml"
"""The first file that a run writes, its settings and the hashes of its inputs: what has it is a run folder of ours."""
OUR_SETTINGS = {"method", "adapter", "init_from", "io", "train", "num_nodes", "deterministic"}
"""Keys of our hparams.yaml: other tools write files of that name, too."""
SUMMARY = "summary.json"
"""The last file that a run writes: what has it is finished."""
METRICS, MONITOR, LOSS_CURVE, TENSORBOARD = "metrics.csv", "monitor.csv", "loss.png", "tensorboard"
RUN_RESULTS = ("lit_model_*_finetuned.pth", f"{FINAL}/{files.WEIGHTS}", SUMMARY)
"""Results of a run: none of them is replaced without --overwrite."""
RESUME_MAY_CHANGE = (
    "io.", "eval.sample_", "train.save_interval", "train.keep_checkpoints", "train.max_time", "train.skip_nonfinite",
    "resume", "overwrite",
)  # fmt: skip
"""Beginnings of the names of settings that a resumed run may change: they do not alter its result."""
REPEATED = 2.0
"""Seconds after which the same signal ends the run; one that comes earlier is a launcher's echo."""


# ---------------------------------------------------------------------------------------------- whose folder it is
def read_settings(folder: Path) -> dict[str, Any]:
    """Return the hparams.yaml of a run of ours; an empty dict where there is none."""
    try:
        found = yaml.safe_load((folder / SETTINGS).read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError):
        return {}
    return found if isinstance(found, dict) and found.keys() >= OUR_SETTINGS else {}


def check_run_folder(folder: Path, *, may_hold_run: bool, sources: Iterable[Path | str | None] = ()) -> None:
    """Raise unless a run may begin in a folder or be resumed there: it is new, empty, or ``may_hold_run`` and does.

    Raises:
        FileExistsError: says what the folder holds, and which flag allows to go on with that.
        ValueError: one of the ``sources``, which the run reads, lies in the folder.
    """
    files.settled_folder(folder)
    # Hidden files are never ours to replace; a batch system's logs are there before the run.
    held = sorted(path.name for path in folder.glob("[!.]*") if path.suffix not in (".log", ".out", ".err"))
    if held and not read_settings(folder):
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
def open_run(
    fabric: Any, run_dir: Path, hparams: dict[str, Any], *, resume: bool, overwrite: bool
) -> Iterator[tuple[bool, Path | None]]:
    """Keep the run folder for this run; yield whether it is finished, and the checkpoint to go on from, if any.

    The first process looks, and the others hear of it.

    Raises:
        ValueError, OSError: the folder is in use, or its run cannot be continued exactly.
    """
    with ExitStack() as stack:

        def take() -> tuple[bool, Path | None] | None:
            if not fabric.is_global_zero:
                return None
            summary = run_dir / SUMMARY
            if not (resume and summary.is_file()):  # a finished run is only looked at, on a read-only disk, too
                stack.enter_context(locked(run_dir, option="--io.out_dir"))
                check_run_folder(run_dir, may_hold_run=resume or overwrite)  # another run may have ended here since
                files.remove_leftovers(run_dir, run_dir / CHECKPOINTS, run_dir / FINAL)
            finished = resume and summary.is_file()
            checkpoint = newest_checkpoint(run_dir) if resume and not finished else None
            if finished or checkpoint:
                check_same_run(run_dir, hparams, finished=finished)
            return finished, checkpoint

        yield gather(together(take))[0]


def check_same_run(run_dir: Path, hparams: dict[str, Any], *, finished: bool = False) -> None:
    """Raise UserError, which names what has changed, where a folder's run had other settings, data or base."""
    if changed := changes(flatten(read_settings(run_dir)), flatten(hparams)):
        found = "a finished run" if finished else "a run"
        remedy = "Set them back, or give another --io.out_dir"
        raise UserError(f"{run_dir} holds {found} with other settings: {changed}. {remedy}")


def changes(before: dict[str, Any], now: dict[str, Any]) -> str:
    """Return which settings changed that decide a run's result, with both values; empty where none did."""
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


def clear_run(run_dir: Path) -> None:
    """Remove what a run of ours leaves, so that a new one's settings stand beside nothing that they did not make."""
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
    named = [path for path in (run_dir / CHECKPOINTS).glob("step-*") if re.fullmatch(r"step-\d{6,}", path.name)]
    ours = [path for path in named if (path / MANIFEST).is_file() or (path / STATE).is_file()]
    return sorted(ours, key=lambda path: int(path.name.removeprefix("step-")))


def last_checkpoint(run_dir: Path) -> str:
    """Say which checkpoint a run can go on from."""
    folders = checkpoint_folders(run_dir)
    return f"the last checkpoint is {folders[-1]}: --resume true goes on from it" if folders else "no checkpoint yet"


def set_aside(folder: Path) -> Path:
    """Give what has a checkpoint's name another one, which no checkpoint has; return the new path."""
    target = folder.with_name(f"aside-{folder.name}.{secrets.token_hex(2)}")
    files.move(folder, target)
    return target


@contextmanager
def new_checkpoint(run_dir: Path, step: int, *, keep: int, best: int = 0) -> Iterator[Path]:
    """Yield an empty folder that becomes checkpoints/step-N; then the ``keep`` newest stay, and the ``best`` step's."""
    folder = checkpoint_folder(run_dir, step)
    folder.parent.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(prefix=files.TEMPORARY, dir=folder.parent, ignore_cleanup_errors=True) as temporary:
        staging = Path(temporary) / folder.name  # inside: the temporary folder is its owner's alone
        staging.mkdir()
        yield staging
        written = [path for path in sorted(staging.rglob("*")) if path.is_file()]
        hashes = {str(path.relative_to(staging)): files.file_sha256(path) for path in written}
        files.write_json(staging / MANIFEST, hashes)
        for path in (*staging.rglob("*"), staging):
            files.flush(path)
        if os.path.lexists(folder):  # somebody's own
            print(f"{folder} is no checkpoint of this run: it is {set_aside(folder).name} now")
        files.move(staging, folder)
        files.flush(folder.parent)
    for old in checkpoint_folders(run_dir)[:-keep]:
        if old != checkpoint_folder(run_dir, best):  # no checkpoint is of step 0
            files.remove(old)


def find_damage(folder: Path) -> str | None:
    """Say what is wrong with a checkpoint's files; None where they are as they were written."""
    try:
        for name, written in files.read_json(folder / MANIFEST).items():
            if files.file_sha256(folder / name) != written:
                return f"{name} holds other bytes"
    except (OSError, ValueError, AttributeError, TypeError) as error:
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
                now = set_aside(bad).name
                print(f"{bad} is damaged ({why}): going on from {folder.name} instead; it is {now} now")
            return folder
        damaged[folder] = problem
    if damaged:
        reasons = "; ".join(f"{folder.name}: {problem}" for folder, problem in damaged.items())
        raise UserError(f"no checkpoint of {run_dir} is whole ({reasons}): remove it, or give --overwrite true")
    return None


def environment() -> dict[str, str]:
    """Return what the last digits of a result depend on beside its settings."""
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"
    return {"torch": str(torch.__version__), "threads": str(torch.get_num_threads()), "device": device}


def note_environment(before: Mapping[str, str]) -> None:
    """Say where the ``environment`` is another than before."""
    for name, now in environment().items():
        if now != before[name]:
            print(f"{name} was {before[name]} and is {now} now: the last digits may differ from an unbroken run's")


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
