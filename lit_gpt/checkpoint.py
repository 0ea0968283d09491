"""Checkpoint folders: check, load, save.

Notable choices:
- Weights are loaded memory-mapped and ``weights_only``; a load never half-succeeds (exact keys and shapes).
- A file larger than memory can be written too, one tensor at a time (``stream_state``, ``stream_safetensors``).
- A base-shaped folder holds ``lit_model.pth``, ``lit_config.json`` and a tokenizer; what a merge or a full finetuning
  writes has the same shape, so that every script takes either.
"""

import errno
import hashlib
import json
import os
import shutil
import struct
import zipfile
import zlib
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO

import numpy
import torch
from torch import Tensor

from lit_gpt.config import Config
from lit_gpt.devices import warn_of_slow_products, weights_dtype
from lit_gpt.errors import UserError, command
from lit_gpt.files import WEIGHTS, Progress, atomic_write, check_space, map_or_read, read_json, write_json
from lit_gpt.model import GPT
from lit_gpt.tokenizer_files import NAMES

CONFIG = "lit_config.json"
PROMPT_STYLE = "prompt_style.json"
TOKENIZERS = ("tokenizer.json", "tokenizer.model")

SAFETENSORS_DTYPES = {torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}
"""Types that a model's weights may have, with their names in the format."""

# What a base-shaped folder holds beside its weights, and what a copy of it needs.
SIDE_FILES = (*NAMES, CONFIG, PROMPT_STYLE)


def hub_name(folder: Path | str) -> str | None:
    """Return ORG/NAME of a folder that lies where download.py puts it, below checkpoints/; None of others."""
    name = Path(folder).resolve()
    return f"{name.parent.name}/{name.name}" if name.parent.parent.name == "checkpoints" else None


def check_checkpoint_dir(checkpoint_dir: Path | str) -> Path:
    """Return the folder as a ``Path``.

    Raises:
        FileNotFoundError: where it is not a base-shaped folder; says what is missing and the command that makes it.
    """
    folder = Path(checkpoint_dir)
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder} is not a folder; get one: python scripts/download.py --repo_id ORG/NAME")
    missing = [name for name in (WEIGHTS, CONFIG) if not (folder / name).is_file()]
    if not any((folder / name).is_file() for name in TOKENIZERS):
        missing.append(" or ".join(TOKENIZERS))
    if missing:
        # A run's folder has them.
        inside = [*folder.glob("lit_model_*_finetuned.pth"), *(path.parent for path in folder.glob(f"*/{WEIGHTS}"))]
        make = command("scripts/convert_hf_checkpoint.py", checkpoint_dir=folder)
        meant = f"did you mean {' or '.join(map(str, sorted(inside)))}?"
        remedy = meant if inside else f"make it with `{make}` from Hugging Face files"
        raise FileNotFoundError(f"{folder} is not a checkpoint folder: {', '.join(missing)} missing; {remedy}")
    return folder


def load_config(checkpoint_dir: Path | str) -> Config:
    """Read the ``Config`` of a base-shaped folder."""
    return Config.from_json(Path(checkpoint_dir) / CONFIG)


def meta_model(config: Config, dtype: torch.dtype = torch.float32) -> GPT:
    """Return a model on the meta device, which has shapes and no data."""
    with torch.device("meta"):
        return GPT(config).to(dtype)


def load_state(path: Path | str) -> dict[str, Any]:
    """Load a ``.pth`` file memory-mapped, tensors and plain types only; torch's old format is read whole.

    Raises:
        FileNotFoundError, ValueError: one line that names the file.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f"{path} is not a file")
    load = partial(torch.load, path, map_location="cpu", weights_only=True)
    try:
        state = map_or_read(partial(load, mmap=zipfile.is_zipfile(path)), load)
    except Exception as error:  # torch raises whatever its readers stumble on: RuntimeError, UnpicklingError, KeyError
        reason = str(error).split("\n")[0][:120]
        raise UserError(f"{path} is corrupt, cut short, or not a PyTorch file ({reason}); make it again") from error
    if not isinstance(state, dict):
        raise UserError(f"{path} holds a {type(state).__name__}, a dict of tensors was expected; make it again")
    return state


def load_model(checkpoint_dir: Path | str, precision: str = "32-true", *, device: torch.device | str = "cpu") -> GPT:
    """Load the model of a base-shaped folder, in evaluation mode; under a mixed precision its weights are fp32."""
    dtype = weights_dtype(precision, mixed=True)
    warn_of_slow_products(precision, torch.device(device))
    model, _ = open_model(checkpoint_dir)
    return model.to(device=device, dtype=dtype).eval()


def open_model(
    checkpoint_dir: Path | str, place: Callable[[str, Tensor], Tensor] = lambda name, tensor: tensor
) -> tuple[GPT, dict[str, Tensor]]:
    """Return the model of a base-shaped folder, and the memory-mapped weights of its file.

    Args:
        checkpoint_dir: the folder.
        place: gives what the model gets of a weight, from its name and the file's tensor.

    Raises:
        FileNotFoundError, ValueError: it is no such folder, or keys or shapes do not fit exactly.
    """
    folder = check_checkpoint_dir(checkpoint_dir)
    model, state = meta_model(load_config(folder)), load_state(folder / WEIGHTS)
    try:
        model.load_state_dict({name: place(name, t) for name, t in state.items()}, strict=True, assign=True)
    except RuntimeError as error:
        reason = " ".join(str(error).split())[:400]
        raise UserError(f"{folder / WEIGHTS} does not hold the weights that {CONFIG} describes: {reason}") from error
    model.tie_weights()
    return model, state


def fingerprint(state: Mapping[str, Tensor]) -> str:
    """Return a short hash of a model's weights, which tells base models apart.

    Names, shapes and three runs of 256 values of each tensor: a memory-mapped file of any size takes a moment.
    """
    digest = hashlib.sha256()
    for name in sorted(state):
        flat = state[name].detach().flatten()
        digest.update(f"{name} {tuple(state[name].shape)}".encode())
        for start in (0, flat.numel() // 2, max(0, flat.numel() - 256)):
            digest.update(flat[start : start + 256].float().cpu().numpy().tobytes())
    return digest.hexdigest()[:16]


def save_state(state: Mapping[str, Any], path: Path | str) -> None:
    """Write tensors and plain types with ``torch.save``, atomically; shared storage is stored once.

    Raises:
        OSError: they could not be written, most often for want of space.
    """
    with atomic_write(path) as temporary:
        _torch_save(dict(state), temporary)


def _torch_save(state: dict[str, Any], path: Path) -> None:
    try:
        torch.save(state, path)
    except RuntimeError as error:  # PyTorch's writer does not say what the system said
        free = shutil.disk_usage(path.parent).free
        raise OSError(
            errno.ENOSPC, f"writing failed with {free:,} bytes free on the disk (full, or the size of files limited?)"
        ) from error


def stream_state(template: Mapping[str, Tensor], make: Callable[[str], Tensor], path: Path | str) -> None:
    """Write the file that ``save_state`` would write, holding one tensor at a time.

    Args:
        template: what to write, as tensors on the meta device: names, shapes, dtypes. One under two names (tied
            weights) is stored once.
        make: gives the tensor of a name; called in the template's order, with the first of a tensor's names.
        path: the file.

    Raises:
        OSError: there is no room for it.
    """
    owners: dict[int, str] = {}  # the first names
    for name, tensor in template.items():
        owners.setdefault(id(tensor), name)
    # Never touched, so there is no memory behind them.
    blanks = {name: torch.empty(template[name].shape, dtype=template[name].dtype) for name in owners.values()}
    with atomic_write(path) as temporary:
        check_space(temporary, sum(blank.nbytes for blank in blanks.values()))
        with torch.serialization.skip_data():  # all of the file but the tensors' bytes
            _torch_save({name: blanks[owners[id(tensor)]] for name, tensor in template.items()}, temporary)
        with zipfile.ZipFile(temporary, "a") as archive, temporary.open("rb+") as file:
            records = {record.filename.partition("/")[2]: record for record in archive.infolist()}
            for index, data in enumerate(_bytes_of(blanks, make, path)):  # as torch numbers storages
                _fill_record(file, records[f"data/{index}"], data)
            archive.comment = b""  # counts as a change: closing writes the archive's directory anew, checksums included


def _fill_record(file: BinaryIO, record: zipfile.ZipInfo, data: numpy.ndarray) -> None:
    """Write bytes where an archive has left room for them, and their checksum behind them and into ``record``."""
    assert record.file_size == data.nbytes
    file.seek(record.header_offset + 26)  # the last four of a header's 30 bytes are the lengths of what follows it
    file.seek(sum(struct.unpack("<HH", file.read(4))), os.SEEK_CUR)
    file.write(data)
    record.CRC = zlib.crc32(data)
    if data.nbytes:
        file.seek(4, os.SEEK_CUR)  # a signature
        file.write(struct.pack("<I", record.CRC))


def _bytes_of(
    template: Mapping[str, Tensor], make: Callable[[str], Tensor], path: Path | str
) -> Iterator[numpy.ndarray]:
    """Yield the bytes of one tensor after the other, each as it is made, under a bar."""
    with Progress(desc=f"writing {Path(path).name}", total=sum(t.nbytes for t in template.values()), unit="B") as bar:
        for name, blank in template.items():
            tensor = make(name)
            assert (tensor.shape, tensor.dtype) == (blank.shape, blank.dtype), name
            yield tensor.detach().contiguous().flatten().view(torch.uint8).numpy()
            bar.update(tensor.nbytes)


def stream_safetensors(template: Mapping[str, Tensor], make: Callable[[str], Tensor], path: Path | str) -> None:
    """Write the file that ``safetensors.torch.save_file`` would write, holding one tensor at a time.

    The format: the header's length in eight bytes, the header as JSON, the tensors' bytes. Those of the wider types
    come first, so that each begins at a multiple of its own size.

    Args:
        template: what to write, as tensors on the meta device: names, shapes, dtypes.
        make: gives the tensor of a name.
        path: the file.
    """
    blanks = dict(sorted(template.items(), key=lambda item: (-item[1].itemsize, item[0])))
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, blank in blanks.items():
        start, end = end, end + blank.nbytes
        about = {"dtype": SAFETENSORS_DTYPES[blank.dtype], "shape": list(blank.shape)}
        header[name] = about | {"data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    with atomic_write(path) as temporary, temporary.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for data in _bytes_of(blanks, make, path):
            file.write(data)


def side_files(folder: Path | str) -> list[str]:
    """Return the names of what a base-shaped folder holds beside its weights."""
    return sorted(path.name for pattern in SIDE_FILES for path in Path(folder).glob(pattern) if path.is_file())


def copy_side_files(source: Path | str, destination: Path | str) -> None:
    """Copy what a base-shaped folder holds beside its weights."""
    for name in side_files(source):
        shutil.copyfile(Path(source) / name, Path(destination) / name)


def save_prompt_style(checkpoint_dir: Path | str, style: str) -> None:
    """Record the prompt style that a model was finetuned with."""
    write_json(Path(checkpoint_dir) / PROMPT_STYLE, {"style": style})


def load_prompt_style(checkpoint_dir: Path | str) -> str:
    """Return the prompt style recorded with a model; else its chat template where it has one; else the bare text."""
    folder = Path(checkpoint_dir)
    if (folder / PROMPT_STYLE).is_file():
        return read_json(folder / PROMPT_STYLE)["style"]
    settings = folder / "tokenizer_config.json"
    template = settings.is_file() and read_json(settings).get("chat_template")
    return "chat" if template or (folder / "chat_template.jinja").is_file() else "plain"
