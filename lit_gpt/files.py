"""Files and folders, written so that nothing is lost: atomic writes, staging, JSON, hashes; and the bar of long work.

Knows nothing of tensors and models. Notable choices:
- A file is written under a temporary name, flushed and renamed: a reader sees the old one or the new one.
- What is there already is written over only with ``overwrite``; what is cleaned up carries our prefix (``TEMPORARY``).
- A file system that refuses a service (fsync, rename, locks) costs that service and one line, never the file.
"""

import errno
import fcntl
import hashlib
import json
import os
import secrets
import shutil
import socket
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, TypeVar

from tqdm import tqdm

from lit_gpt.errors import UserError

T = TypeVar("T")
WEIGHTS = "lit_model.pth"
# What marks a folder as somebody's result: not to be written into without --overwrite.
RESULTS = (WEIGHTS, "lit_model_*_finetuned.pth", "*.safetensors", "pytorch_model*.bin", "train.pt")
TEMPORARY = ".ether-tmp-"
"""The beginning of our temporary files' and folders' names."""
STAGING = f"{TEMPORARY}staging."
LOCK = ".ether-lock"
"""The file that keeps other processes out of a folder."""

# How file systems (NFS, CIFS, Lustre, FUSE, mounted buckets) refuse what they do not do. A full or broken disk is none.
REFUSALS = {
    errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, errno.EINVAL, errno.EPERM, errno.EACCES, errno.ENOLCK, errno.EBADF,
    errno.ENOTTY, errno.EISDIR, errno.ENODEV,
}  # fmt: skip


# ------------------------------------------------------------------------------------------------- progress
class Progress(tqdm):
    """A bar on a terminal, gone when the work is done; elsewhere a line a minute. Work that takes less shows nothing.

    To be used in a ``with``, so that an error's line does not end up behind a bar:

        with Progress(desc="converting", total=n_bytes, unit="B") as bar:
            bar.update(n)
    """

    def __init__(self, *args: Any, **options: Any) -> None:
        self.live = sys.stderr.isatty()
        pace = {"delay": 1, "mininterval": 0.5} if self.live else {"delay": 60, "mininterval": 60, "ncols": 0}
        super().__init__(*args, **{"leave": False, "miniters": 1, "unit_scale": True, **pace, **options})

    def display(self, msg: str | None = None, pos: int | None = None) -> bool | None:
        """Draw the bar, or print it as a line of its own; tqdm takes an old bar away with an empty text."""
        if self.live:
            return super().display(msg, pos)
        if msg != "":
            print(self if msg is None else msg, file=self.fp, flush=True)
        return None


# --------------------------------------------------------------------------------------- what may be refused
@cache  # so that a text is said once
def say_once(text: str) -> None:
    """Print a line on stderr, the first time only."""
    print(f"warning: {text}", file=sys.stderr)


@contextmanager
def optional(service: str, *, without: str) -> Iterator[None]:
    """Go on where the file system refuses what is done inside, and say once what is missing then."""
    try:
        yield
    except OSError as error:
        if error.errno not in REFUSALS:
            raise
        say_once(f"this file system refuses {service} ({os.strerror(error.errno)}): {without}")


def flush(path: Path) -> None:
    """See to it that a file's bytes, or a folder's names, are on the disk."""
    with optional("fsync", without="a power cut may lose what was written last"):
        handle = os.open(path, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def move(source: Path, target: Path) -> None:
    """Rename a file or a folder; where that is refused, copy the file, or move what the folder holds."""
    try:
        source.replace(target)
        return
    except OSError as error:
        if error.errno not in {*REFUSALS, errno.EXDEV, errno.EMFILE}:  # mounted buckets count a folder's files
            raise
        say_once(f"this file system refuses a rename ({error.strerror}): a kill may leave a file half-written")
    if source.is_dir():
        target.mkdir(exist_ok=True)
        for path in sorted(source.iterdir()):
            move(path, target / path.name)
        with suppress(OSError):  # what had to be copied is still there
            source.rmdir()
    else:
        shutil.copyfile(source, target)
        flush(target)


def map_or_read(mapped: Callable[[], T], whole: Callable[[], T]) -> T:
    """Return what ``mapped`` gives, or ``whole`` where the file system refuses to map a file into memory."""
    try:
        return mapped()
    except (OSError, RuntimeError) as error:  # safetensors' and torch's have the system's text, and no number
        if not any(os.strerror(number) in str(error) for number in REFUSALS):
            raise
        result = whole()
        say_once("this file system refuses to map files (mmap): they are read whole, which takes more memory")
        return result


@contextmanager
def locked(folder: Path, *, lock: str = LOCK, option: str = "folder") -> Iterator[bool]:
    """Keep other processes out of a folder, which is made where there is none; yield False where nothing keeps them.

    Args:
        folder: the folder.
        lock: name of the file that keeps them out: those alone that ask for the same.
        option: of the command line, which the others have to change.

    Raises:
        ValueError: another process has it.
        OSError: the folder cannot be written.
    """
    settled_folder(folder).mkdir(parents=True, exist_ok=True)
    path, held, refused = folder / lock, False, False
    try:  # a link of that name would lead to somebody's own file
        handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o666)
    except PermissionError:
        if not path.exists():
            raise
        handle = os.open(path, os.O_RDONLY | os.O_NOFOLLOW)  # a colleague's: who may read it may lock it
    try:
        with optional("locks", without="nothing keeps a second process out of this folder"):
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
                held = True
            except OSError as error:
                refused = error.errno in (errno.EAGAIN, errno.EACCES)  # the second is CIFS's word for it
                if not refused:
                    raise
        # Another process may have had it, and removed it between our opening and locking it.
        if refused or not path.exists() or not os.path.samestat(os.fstat(handle), path.stat()):
            owner = os.read(handle, 1000).decode(errors="replace") or "another process"
            raise UserError(f"{folder} is in use by {owner}; wait for it, or give another {option}")
        with suppress(OSError):  # a colleague's file
            os.ftruncate(handle, 0)
            os.write(handle, f"process {os.getpid()} on {socket.gethostname()}".encode())
        try:
            yield held
        finally:
            with suppress(OSError):
                path.unlink()
    finally:
        os.close(handle)


# ------------------------------------------------------------------------------------------------- writing
def settled(path: Path | str) -> Path:
    """Return a path without "..": `missing/../here` is not seen until `missing` is made, and then it is `here`."""
    path = Path(path)
    return path.resolve() if ".." in path.parts else path


def settled_folder(path: Path | str) -> Path:
    """Return the ``settled`` path of a folder that is there or can be made.

    Raises:
        FileExistsError: a file or a dangling link is in its place, or where a folder above it is to be.
    """
    folder = settled(path)
    found = next((each for each in (folder, *folder.parents) if os.path.lexists(each)), Path())
    if not found.is_dir():
        what = "a file" if found.exists() else f"a link to {os.readlink(found)}, which is not there"
        raise FileExistsError(f"{found} is {what}, a folder was expected")
    return folder


def remove(path: Path) -> None:
    """Remove a file, a folder with all that it holds, or a link, whose target stays."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def remove_leftovers(*folders: Path) -> None:
    """Remove the temporary files and folders that a process which was killed has left; for who alone writes there."""
    for path in (path for folder in folders for path in folder.glob(f"{TEMPORARY}*")):
        remove(path)


@contextmanager
def atomic_write(path: Path | str) -> Iterator[Path]:
    """Yield a temporary path beside ``path``; it is flushed and renamed at the end, removed after an error."""
    path = settled(path)
    settled_folder(path.parent).mkdir(parents=True, exist_ok=True)
    # torch.save stores what is before the last dot.
    temporary = path.with_name(f"{TEMPORARY}{path.name}.{secrets.token_hex(4)}")
    temporary.touch(exist_ok=False)
    try:
        yield temporary
        flush(temporary)
        move(temporary, path)
        flush(path.parent)  # the new name, too
    except OSError as error:
        if error.errno and not error.filename:  # "No space left on device" does not say which
            error.filename = str(path)
        raise
    finally:
        temporary.unlink(missing_ok=True)


def check_space(path: Path, needed: int) -> None:
    """Raise unless the disk of ``path`` has room for ``needed`` bytes."""
    free = shutil.disk_usage(path).free
    if free < needed:
        raise UserError(
            f"{path.parent} is on a disk with {free / 1e9:.2f} GB free, {needed / 1e9:.2f} GB are needed; "
            "make room there or choose a folder on another disk"
        )


def refuse_existing(paths: Iterable[Path], overwrite: bool) -> None:
    """Raise where a file that is to be written is there and ``overwrite`` is not set, or a folder has its name."""
    for path in map(settled, paths):
        if path.is_dir():
            raise FileExistsError(f"{path} is a folder, and a file of that name is to be written; move it away")
        if os.path.lexists(path) and not overwrite:
            raise FileExistsError(
                f"{path.parent} already holds {path.name}; choose another place or give --overwrite true"
            )


def prepare_out_dir(
    out_dir: Path | str, overwrite: bool = False, *, names: Iterable[str] = (), source: Path | str | None = None
) -> Path:
    """Return a folder, ``settled``, that may be written into; it is made when the first file is.

    Args:
        out_dir: the folder.
        overwrite: what is to be written may replace what has the same names.
        names: of the files to be written.
        source: the checkpoint folder that is read, which stays as it is in any case.

    Raises:
        FileExistsError: it holds such a file, a model, an adapter or prepared data, and ``overwrite`` is not set.
        ValueError: it is the source.
    """
    folder = settled_folder(out_dir)
    if source is not None and folder.resolve() == Path(source).resolve():
        raise UserError(f"--out_dir {folder} is the checkpoint folder itself; name another folder")
    results = [] if overwrite else sorted(path for pattern in RESULTS for path in folder.glob(pattern))
    refuse_existing([*results, *(folder / name for name in names)], overwrite)
    return folder


@contextmanager
def staged_dir(out_dir: Path | str, overwrite: bool = False) -> Iterator[Path]:
    """Yield an empty folder whose files move to ``out_dir`` when all of them are complete, weights last.

    It lies in ``out_dir``, which may be a disk of its own. What must not be replaced is best found before the work, by
    ``prepare_out_dir`` with the files' names; here it is looked for once more. One process at a time writes there: what
    one that was killed has left is removed.
    """
    folder = prepare_out_dir(out_dir, overwrite)
    made = [each for each in (folder, *folder.parents) if not each.exists()]
    try:
        with locked(folder) as held:
            for leftover in folder.glob(f"{STAGING}*") if held else ():  # else it may be at work
                with suppress(OSError):  # a colleague's
                    remove(leftover)
            with TemporaryDirectory(prefix=STAGING, dir=folder, ignore_cleanup_errors=True) as staging:
                yield Path(staging)
                # A folder with a tokenizer.json has the whole tokenizer, one with weights has everything.
                order = {"tokenizer.json": 1, WEIGHTS: 2}
                files = sorted(Path(staging).iterdir(), key=lambda path: order.get(path.name, 0))
                refuse_existing([folder / path.name for path in files], overwrite)
                for path in files:
                    move(path, folder / path.name)
    finally:
        for each in made:
            with suppress(OSError):  # it holds the result
                each.rmdir()


# ------------------------------------------------------------------------------------------------- JSON, hashes
def write_text(path: Path | str, text: str) -> None:
    """Write a text, atomically."""
    with atomic_write(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_json(path: Path | str, content: Any) -> None:
    """Write JSON, atomically; what JSON has no number for (NaN, an infinity) becomes null."""
    write_text(path, json.dumps(finite(content), indent=2, ensure_ascii=False) + "\n")


def finite(content: Any) -> Any:
    """Return plain types with None for numbers that JSON does not have: NaN and the infinities."""
    return json.loads(json.dumps(content), parse_constant=lambda name: None)


def read_json(path: Path | str) -> Any:
    """Read JSON; an error is one line that names the file."""
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:  # no JSON, no text, a number or nesting beyond all measure
        raise UserError(f"{path} is not valid JSON: {error}") from error


def file_sha256(path: Path | str) -> str:
    """Return the SHA-256 of a file's bytes, in hex."""
    path, digest = Path(path), hashlib.sha256()
    size = path.stat().st_size
    with path.open("rb") as file, Progress(desc=f"hashing {path.name}", total=size, unit="B") as bar:
        while block := file.read(1 << 20):
            digest.update(block)
            bar.update(len(block))
    return digest.hexdigest()
