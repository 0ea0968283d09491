"""Turn a Hugging Face checkpoint into ``lit_model.pth`` and ``lit_config.json``, written beside it.

Reads ``.safetensors`` or, where there are none, ``.bin`` files, in one piece or in shards. Weights keep the type they
are stored in unless ``--dtype`` says otherwise. The files are memory-mapped and the result is written tensor by
tensor: memory holds no more than one of them, whatever the model's size. Converting again gives the same files. Of a
model of more than text (Gemma 3, Mistral Small 3) the part that is one of text is converted.

    python scripts/convert_hf_checkpoint.py --checkpoint_dir checkpoints/meta-llama/Llama-2-7b-hf
"""

import re
import sys
from collections import Counter
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

import torch
from safetensors.torch import load, load_file

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # runs from any folder

from lit_gpt.checkpoint import CONFIG, WEIGHTS, hub_name, load_state
from lit_gpt.cli import main
from lit_gpt.config import UNQUANTIZED, Config, check_supported
from lit_gpt.errors import UserError, command, reading
from lit_gpt.files import map_or_read, read_json, staged_dir, write_json
from lit_gpt.hf import EMBEDDING, HEAD, State, Stored, hf_modules, write_lit

NOT_TEXT = re.compile(r"(model\.)?(vision_tower|multi_modal_projector|vision_embed_tokens)\b")
"""The beginning of the names of what a multimodal model has beside its model of text."""
BUFFER = re.compile(r"\.(rotary_emb\.inv_freq|attention\.(masked_)?bias)$")
"""Constants that older transformers wrote beside the weights, and that the model computes for itself."""
FLOATS = (torch.float32, torch.float16, torch.bfloat16, torch.float64)


def setup(*, checkpoint_dir: Path, dtype: Stored | None = None, model_name: str | None = None) -> None:
    """Convert a Hugging Face checkpoint for finetuning, chat and evaluation.

    Args:
        checkpoint_dir: the folder with config.json, the weights and the tokenizer.
        dtype: the type to store weights in; as they are when not given.
        model_name: the name to remember the model by; the folder's name when not given.
    """
    again = f"get them with: {command('scripts/download.py', repo_id=hub_name(checkpoint_dir) or 'ORG/NAME')}"
    path = checkpoint_dir / "config.json"
    if not path.is_file():
        raise FileNotFoundError(f"{checkpoint_dir} has no config.json of Hugging Face; {again}")
    config = check_supported(read_json(path), model_name or checkpoint_dir.resolve().name)
    weights = text_weights(weight_files(checkpoint_dir, again))
    config = settle_ties(weights, config)
    stored = getattr(torch, dtype) if dtype else None
    blanks = {key: tensor.to("meta", stored) for key, tensor in weights.items()}
    with staged_dir(checkpoint_dir, overwrite=True) as staging:
        lit = write_lit(blanks, weights.__getitem__, config, staging / WEIGHTS)
        write_json(staging / CONFIG, config.to_dict())
    count = sum(tensor.numel() for tensor in {id(tensor): tensor for tensor in lit.values()}.values())
    print(f"{config.name}: {config.architecture}, {count:,} parameters -> {checkpoint_dir / WEIGHTS}")
    print(f"next: {command('chat/base.py', checkpoint_dir=checkpoint_dir)}")


def weight_files(checkpoint_dir: Path, again: str) -> list[Path]:
    """Return the weights' files of a Hugging Face folder: the whole one, those an index names, or all of one kind.

    Raises:
        FileNotFoundError: no weights, or a shard is missing; ends in ``again``, the way to get them.
    """
    for whole in (checkpoint_dir / "model.safetensors", checkpoint_dir / "pytorch_model.bin"):
        index = checkpoint_dir / f"{whole.name}.index.json"
        if whole.is_file():  # before an index, as in transformers
            if index.is_file():
                print(f"note: {checkpoint_dir} holds {whole.name} and an index of shards; the whole file is read")
            return [whole]
        if index.is_file():
            with reading(index):
                shards = sorted({*read_json(index).get("weight_map", {}).values()})
                if outside := [name for name in shards if Path(name).name != name]:
                    raise UserError(f"{index} names {outside[0]}, outside the folder: nothing is read there; {again}")
            absent = [name for name in shards if not (checkpoint_dir / name).is_file()]
            if absent or not shards:
                raise FileNotFoundError(f"{index} names files that are not there ({', '.join(absent)}); {again}")
            return [checkpoint_dir / name for name in shards]
        # Not every *.safetensors: some repos hold the same weights twice (consolidated.safetensors), or an adapter's.
        if found := sorted(checkpoint_dir.glob(f"{whole.stem}*{whole.suffix}")):
            return found
    raise FileNotFoundError(f"{checkpoint_dir} has neither model*.safetensors nor pytorch_model*.bin; {again}")


def read_weights(path: Path) -> State:
    """Memory-map the tensors of one file.

    Raises:
        ValueError: the file is corrupt or truncated.
    """
    if path.suffix == ".safetensors":
        with reading(path, "download it again"):
            return map_or_read(lambda: load_file(path), lambda: load(path.read_bytes()))
    state = load_state(path)
    for name, tensor in state.items():
        if not (isinstance(name, str) and isinstance(tensor, torch.Tensor) and tensor.layout == torch.strided):
            raise UserError(f"{path} holds {name!r}, expected names and dense tensors: save the model's own state_dict")
    return state


def text_weights(files: Iterable[Path]) -> State:
    """Memory-map the weights of all files; of a model of more than text its text part, named as a model of text is.

    Raises:
        ValueError: a file is corrupt, two tensors have one name, or one is quantized, whatever config.json says.
    """
    weights, left_out = {}, Counter()
    for file in files:
        for name, tensor in read_weights(file).items():
            if BUFFER.search(name):
                continue
            if part := NOT_TEXT.match(name):
                left_out[part[0]] += 1
                continue
            if tensor.dtype not in FLOATS:
                raise UserError(f"{name} is {tensor.dtype}: the weights are quantized; {UNQUANTIZED}")
            name = re.sub(r"^(model\.)?language_model\.", r"\1", name)
            if name in weights:
                raise UserError(f"{file} holds {name}, which is there already: remove the files of an older upload")
            weights[name] = tensor
    if left_out:
        parts = ", ".join(f"{count} tensors of {part}" for part, count in left_out.items())
        print(f"note: the model of text alone is converted, without {parts}")
    return weights


def settle_ties(weights: State, config: Config) -> Config:
    """Leave the embedding alone of a tied pair, by whichever name it is there.

    Where config.json ties head and embedding and they differ, the weights are believed, as in transformers.
    """
    head, embedding = (f"{hf_modules(config)[key.removesuffix('.weight')][0]}.weight" for key in (HEAD, EMBEDDING))
    if config.tie_embeddings and head in weights:
        if not torch.equal(weights.setdefault(embedding, weights[head]), weights[head]):
            print("note: config.json ties head and embedding, but the file holds two different ones: both are kept")
            return replace(config, tie_embeddings=False)
        del weights[head]
    return config


if __name__ == "__main__":
    main(setup)
