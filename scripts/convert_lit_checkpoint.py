"""Turn a base-shaped folder (a base model, a merged one, one trained in full) into a Hugging Face checkpoint.

The folder it writes loads in transformers, vLLM and llama.cpp's converter: ``model.safetensors`` (in shards with an
index where it is large), ``config.json``, ``generation_config.json`` and the tokenizer's files. Converting a Hugging
Face checkpoint there and back gives the same tensors, bit for bit.

    python scripts/convert_lit_checkpoint.py --checkpoint_dir path/to/merged_model --out_dir path/to/hf_model
"""

import re
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch
from huggingface_hub import split_torch_state_dict_into_shards

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # runs from any folder

from lit_gpt import checkpoint
from lit_gpt.cli import main
from lit_gpt.config import Config
from lit_gpt.errors import reading
from lit_gpt.files import check_space, prepare_out_dir, read_json, staged_dir, write_json
from lit_gpt.hf import EMBEDDING, HEAD, State, lit_to_hf
from lit_gpt.hf_config import text_config
from lit_gpt.serving import model_commands, serving_notes, write_card
from lit_gpt.tokenizer import list_answer_end

SHARD_SIZE = "5GB"
OUR_WEIGHTS = r"model(-\d{5}-of-\d{5})?\.safetensors(\.index\.json)?"
"""The names that ``write_weights`` gives its files."""


def setup(*, checkpoint_dir: Path, out_dir: Path, overwrite: bool = False) -> None:
    """Write a model in the format of Hugging Face.

    Args:
        checkpoint_dir: a folder with lit_model.pth and lit_config.json.
        out_dir: the folder to write.
        overwrite: replace a model that is already in out_dir.
    """
    checkpoint.check_checkpoint_dir(checkpoint_dir)
    if not (checkpoint_dir / "config.json").is_file():
        raise FileNotFoundError(f"{checkpoint_dir} has no config.json; copy that of the base model there")
    out_dir = prepare_out_dir(out_dir, overwrite, names=checkpoint.side_files(checkpoint_dir), source=checkpoint_dir)
    config, weights = checkpoint.load_config(checkpoint_dir), checkpoint.load_state(checkpoint_dir / checkpoint.WEIGHTS)
    described = text_config(read_json(checkpoint_dir / "config.json"), config.name)
    theirs = Config.from_hf(described, name=config.name)
    with reading(checkpoint_dir / checkpoint.WEIGHTS):
        weights = cut_padding(weights, config.vocab_size, theirs.vocab_size)
        shared = weights[HEAD].data_ptr() == weights[EMBEDDING].data_ptr()  # the original code's configs do not tell
        tied = (config.tie_embeddings or shared) and torch.equal(weights[HEAD], weights[EMBEDDING])
    config = replace(theirs, tie_embeddings=tied)
    (hf_weights, make), dtype = lit_to_hf(weights, config), weights[EMBEDDING].dtype
    dtype_key = "dtype" if "dtype" in described else "torch_dtype"  # transformers 5's spelling and every other's
    described |= {"tie_word_embeddings": tied, dtype_key: str(dtype).removeprefix("torch.")}
    with staged_dir(out_dir, overwrite) as staging:
        checkpoint.copy_side_files(checkpoint_dir, staging)
        (staging / checkpoint.CONFIG).unlink(missing_ok=True)  # it describes a lit_model.pth, and here is none
        write_json(staging / "config.json", described)
        style = checkpoint.load_prompt_style(staging) if (staging / checkpoint.PROMPT_STYLE).is_file() else None
        if style:
            list_answer_end(staging, style)
        notes = serving_notes(staging, style, dtype)
        if style:
            about = f"{config.name}, finetuned with prompt style {style}. Weights are exactly those that were saved."
            load = model_commands(Path())
            write_card(staging, out_dir, library="transformers", about=about, notes=notes, load=load)
        write_weights(hf_weights, make, staging)
        current = {path.name for path in staging.iterdir()}
    for path in out_dir.iterdir():
        if re.fullmatch(OUR_WEIGHTS, path.name) and path.name not in current:
            path.unlink()  # of a larger model that was here before: transformers would mix them
    load = [f"{program}: {line}" for program, line in model_commands(out_dir).items()]
    print(f"{config.name}: {config.architecture} -> {out_dir}", *notes, *load, sep="\n")


def cut_padding(weights: State, used: int, rows: int) -> State:
    """Return the weights without rows of padding that config.json does not count, and say so.

    Args:
        weights: of a ``lit_model.pth``, whose embedding and head may be padded, as the original code did.
        used: ids that the tokenizer uses: rows that are no padding.
        rows: that config.json counts.
    """
    found = len(weights[EMBEDDING])
    if not used <= rows < found:
        return weights
    print(f"note: {found - rows} rows of padding are left out: config.json has a vocabulary of {rows}")
    return {key: t[:rows] if key in (HEAD, EMBEDDING, "lm_head.bias") else t for key, t in weights.items()}


def write_weights(weights: State, make: Callable[[str], torch.Tensor], folder: Path) -> None:
    """Write ``model.safetensors``, or shards of it and their index, of what ``lit_to_hf`` returns."""
    check_space(folder, sum(tensor.nbytes for tensor in weights.values()))
    split = split_torch_state_dict_into_shards(weights, max_shard_size=SHARD_SIZE)
    for name, keys in split.filename_to_tensors.items():
        checkpoint.stream_safetensors({key: weights[key] for key in keys}, make, folder / name)
    if split.is_sharded:
        index = {"metadata": split.metadata, "weight_map": split.tensor_to_filename}
        write_json(folder / "model.safetensors.index.json", index)


if __name__ == "__main__":
    main(setup)
