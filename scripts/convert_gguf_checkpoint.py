"""Turn a llama.cpp GGUF file into a base-shaped folder: weights, configs and tokenizer, with no other source.

Weights are dequantized (what the quantization lost stays lost), one tensor at a time: memory holds the largest one in
fp32, whatever the model's size. Of a model in several files any one may be named. GGUF stores the rows of q and k in
the order in which llama.cpp rotates them, neighbours in pairs; they go back to Hugging Face's, where the first half of
a head pairs with the second. The tokenizer is rebuilt from the metadata: a GGUF names its pre-tokenizer
(``tokenizer.ggml.pre``) but does not hold it, so the table below holds those that are known here. A tokenizer,
config.json or generation_config.json that the folder has already is kept.

    python scripts/convert_gguf_checkpoint.py --gguf_path SmolLM2-135M-Instruct.Q4_1.gguf \
        --checkpoint_dir checkpoints/HuggingFaceTB/SmolLM2-135M-Instruct
"""

import json
import re
import shutil
import sys
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # runs from any folder

from lit_gpt.checkpoint import CONFIG, TOKENIZERS, WEIGHTS, stream_state
from lit_gpt.cli import main
from lit_gpt.config import Config
from lit_gpt.errors import UserError, command, reading
from lit_gpt.files import map_or_read, prepare_out_dir, read_json, settled_folder, staged_dir, write_json
from lit_gpt.hf import hf_config, hf_to_lit, lit_tensor
from lit_gpt.model import scale_frequencies

# llama.cpp's names of tensors, and those of a LlamaForCausalLM.
TENSORS = {
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "output": "lm_head",
    "attn_norm": "model.layers.{i}.input_layernorm",
    "ffn_norm": "model.layers.{i}.post_attention_layernorm",
    "attn_q": "model.layers.{i}.self_attn.q_proj",
    "attn_k": "model.layers.{i}.self_attn.k_proj",
    "attn_v": "model.layers.{i}.self_attn.v_proj",
    "attn_output": "model.layers.{i}.self_attn.o_proj",
    "ffn_gate": "model.layers.{i}.mlp.gate_proj",
    "ffn_up": "model.layers.{i}.mlp.up_proj",
    "ffn_down": "model.layers.{i}.mlp.down_proj",
}
ROPE_FACTORS = "rope_freqs.weight"
CUT_SHORT = (ValueError, IndexError, KeyError, OverflowError, MemoryError)  # what NumPy says of a short file
SPLIT_NAME = re.compile(r"-\d{5}-of-(\d{5})\.gguf$")
# Kinds of token in tokenizer.ggml.token_type that are matched whole, before the text is split.
CONTROL, USER_DEFINED = 3, 4


def setup(
    *,
    gguf_path: Path,
    checkpoint_dir: Path,
    dtype: Literal["float32", "bfloat16", "float16"] = "float32",
    overwrite: bool = False,
) -> None:
    """Convert a GGUF file of the llama architecture for finetuning, chat and evaluation.

    Args:
        gguf_path: the .gguf file.
        checkpoint_dir: the folder to write lit_model.pth, the configs and the tokenizer into.
        dtype: the type to store weights in.
        overwrite: replace the model and the configs that are already in checkpoint_dir.
    """
    checkpoint_dir = settled_folder(checkpoint_dir)
    keep_tokenizer = any((checkpoint_dir / name).is_file() for name in TOKENIZERS)
    names = [WEIGHTS, CONFIG] + ([] if keep_tokenizer else ["tokenizer_config.json", "tokenizer.json"])
    prepare_out_dir(checkpoint_dir, overwrite, names=names)
    metadata, tensors = read_gguf(gguf_path)
    architecture = metadata.get("general.architecture")
    if architecture != "llama" or metadata.get("llama.expert_count", 0):
        kind = "llama with experts" if architecture == "llama" else architecture
        raise UserError(f"{gguf_path}: GGUF architecture {kind} is not supported (llama is); convert its HF folder")
    with reading(gguf_path):
        config = model_config(metadata, tensors, gguf_path)
        config.name = checkpoint_dir.resolve().name  # general.name is whatever the uploader's folder was called
        described = {
            "config.json": {**hf_config(config), **special_ids(metadata), "torch_dtype": dtype},
            "generation_config.json": generation_config(metadata),
        }
        tokenizer = None if keep_tokenizer else build_tokenizer(metadata, gguf_path)
        settings = {} if keep_tokenizer else tokenizer_config(metadata, config)
        names = hf_tensor_names(tensors, gguf_path)
    if not overwrite:  # as the tokenizer, those of the model's Hugging Face folder are kept
        if (checkpoint_dir / "config.json").is_file():
            note_other_model(checkpoint_dir / "config.json", config)
        described = {name: text for name, text in described.items() if not (checkpoint_dir / name).is_file()}
    shapes = {name: tensors[theirs].shape.tolist()[::-1] for name, theirs in names.items()}
    blanks = {name: torch.empty(shape, dtype=getattr(torch, dtype), device="meta") for name, shape in shapes.items()}
    template = hf_to_lit(blanks, config)

    def make(key: str) -> torch.Tensor:
        return lit_tensor(key, lambda name: dequantized(tensors[names[name]], config), config).to(getattr(torch, dtype))

    with staged_dir(checkpoint_dir, overwrite) as staging:
        stream_state(template, make, staging / WEIGHTS)
        write_json(staging / CONFIG, config.to_dict())
        for name, content in described.items():
            write_json(staging / name, content)
        if tokenizer is not None:
            write_json(staging / "tokenizer_config.json", settings)
            (staging / "tokenizer.json").write_text(tokenizer_json(tokenizer), encoding="utf-8")
    print(f"{config.name}: {len(tensors)} tensors of {gguf_path.name} -> {checkpoint_dir / WEIGHTS} in {dtype}")
    print(f"next: {command('chat/base.py', checkpoint_dir=checkpoint_dir)}")


def note_other_model(path: Path, config: Config) -> None:
    """Say so where a config.json that is kept describes a model of other sizes: only an export would read it."""
    theirs = Config.from_hf(read_json(path), name=config.name)
    for name in ("n_layer", "n_embd", "n_head", "n_query_groups", "intermediate_size", "padded_vocab_size"):
        if getattr(theirs, name) != getattr(config, name):
            print(
                f"note: {path} is kept, and describes another model ({name} is {getattr(theirs, name)}, in the GGUF "
                f"file {getattr(config, name)}); --overwrite true replaces it"
            )
            return


def read_gguf(path: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """The metadata of a GGUF file in plain types, and its tensors (memory-mapped, quantized) by name.

    Of a model in several files all are read, whichever is named; the first one's metadata describe it.

    Raises:
        FileNotFoundError, ValueError: one line that names the file.
    """
    import gguf

    def read_copy(part: Path) -> gguf.GGUFReader:
        with tempfile.TemporaryDirectory() as folder:  # what is mapped stays after its name has gone
            return gguf.GGUFReader(shutil.copyfile(part, Path(folder) / part.name))

    if not path.is_file():
        raise FileNotFoundError(f"{path} is not a file; a .gguf file was expected")
    metadata: dict[str, Any] = {}
    tensors: dict[str, Any] = {}
    for part in gguf_parts(path):
        try:
            reader = map_or_read(partial(gguf.GGUFReader, part), partial(read_copy, part))
            metadata = {key: field.contents() for key, field in reader.fields.items()} | metadata
            tensors |= {tensor.name: tensor for tensor in reader.tensors}
        except CUT_SHORT as error:
            raise UserError(f"{part} is not a GGUF file, or cut short ({error}); get it again") from error
    expected = metadata.get("split.tensors.count", len(tensors))
    if len(tensors) != expected or (metadata.get("split.count", 1) > 1 and not SPLIT_NAME.search(path.name)):
        raise UserError(
            f"{path} is part {metadata.get('split.no', 0) + 1} of {metadata['split.count']} of a model: give all parts "
            "their own names again (NAME-00001-of-00003.gguf and so on), in one folder"
        )
    return metadata, tensors


def gguf_parts(path: Path) -> list[Path]:
    """Return all files of the model, by their names.

    Raises:
        FileNotFoundError: the name says that there are more files than there are.
    """
    match = SPLIT_NAME.search(path.name)
    if not match:
        return [path]
    numbers = range(1, int(match[1]) + 1)
    parts = [path.with_name(f"{path.name[: match.start()]}-{i:05}-of-{match[1]}.gguf") for i in numbers]
    missing = ", ".join(part.name for part in parts if not part.is_file())
    if missing:
        raise FileNotFoundError(f"{path} is one of {len(parts)} parts, {missing} missing beside it; get all parts")
    return parts


def model_config(metadata: dict[str, Any], tensors: dict[str, Any], path: Path) -> Config:
    """The sizes of the model, from ``llama.*`` and the tensors' shapes."""

    def value(key: str, default: Any = None) -> Any:
        found = metadata.get(f"llama.{key}", default)
        if found is None:
            raise UserError(f"{path} has no llama.{key}: it is not complete, get it again")
        return found

    rows = int(tensors["token_embd.weight"].shape[1]) if "token_embd.weight" in tensors else 0
    n_head, n_embd = value("attention.head_count"), value("embedding_length")
    return Config(
        block_size=value("context_length"),
        vocab_size=rows,
        n_layer=value("block_count"),
        n_head=n_head,
        n_embd=n_embd,
        n_query_groups=value("attention.head_count_kv", n_head),
        head_size=value("attention.key_length", value("rope.dimension_count", n_embd // n_head)),
        intermediate_size=value("feed_forward_length"),
        # Metadata are fp32: the shortest decimal that names the same fp32 is what the model's own config said.
        norm_eps=shortest(value("attention.layer_norm_rms_epsilon")),
        rope_base=shortest(value("rope.freq_base", 10000.0)),
        rope_scaling=rope_scaling(metadata, tensors, path),
        qkv_bias="blk.0.attn_q.bias" in tensors,
        proj_bias="blk.0.attn_output.bias" in tensors,
        mlp_bias="blk.0.ffn_up.bias" in tensors,
        tie_embeddings="output.weight" not in tensors,
    )


def shortest(number: float) -> float:
    """The shortest decimal that rounds to the same fp32: 1e-05 for 9.99999974e-06."""
    import numpy

    return float(str(numpy.float32(number)))


def rope_scaling(metadata: dict[str, Any], tensors: dict[str, Any], path: Path) -> dict[str, Any] | None:
    """Hugging Face's ``rope_scaling``.

    A GGUF of Llama 3.1 and later holds no parameters of the scaling, only the divisor of each frequency. Their
    published parameters are tried, and taken where they give the same divisors.
    """
    kind = metadata.get("llama.rope.scaling.type", "none")
    if kind == "linear":
        return {"rope_type": "linear", "factor": shortest(metadata["llama.rope.scaling.factor"])}
    if kind != "none":
        raise UserError(f"{path}: rope scaling {kind} is not supported (linear and llama3 are)")
    if ROPE_FACTORS not in tensors:
        return None
    divisors = torch.from_numpy(tensors[ROPE_FACTORS].data.copy())
    base, size = metadata["llama.rope.freq_base"], 2 * len(divisors)
    frequencies = 1.0 / base ** (torch.arange(0, size, 2).float() / size)
    scaling = {"rope_type": "llama3", "factor": float(divisors.max()), "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    scaling["original_max_position_embeddings"] = 8192
    if not torch.allclose(frequencies / scale_frequencies(frequencies, scaling), divisors, rtol=1e-4):
        raise UserError(f"{path}: its rope_freqs are not those of Llama 3's scaling; convert its HF folder instead")
    return scaling


def hf_tensor_names(tensors: dict[str, Any], path: Path) -> dict[str, str]:
    """The names of a ``LlamaForCausalLM``'s tensors, each with the GGUF's name of it."""
    names = {}
    for name in tensors:
        if name == ROPE_FACTORS:
            continue
        layer, _, rest = name.removeprefix("blk.").partition(".") if name.startswith("blk.") else ("", "", name)
        module, _, kind = rest.rpartition(".")
        if module not in TENSORS:
            raise UserError(f"{path}: tensor {name} is not known in a llama GGUF; convert its HF folder instead")
        names[f"{TENSORS[module].format(i=layer)}.{kind}"] = name
    return names


def dequantized(tensor: Any, config: Config) -> torch.Tensor:
    """A tensor of the file in fp32, rows of q and k in the order of a ``LlamaForCausalLM``."""
    import gguf

    try:
        array = gguf.dequantize(tensor.data, tensor.tensor_type)
    except NotImplementedError as error:
        raise UserError(f"tensor {tensor.name}: {error}; convert the model's HF folder instead") from error
    values = torch.from_numpy(array if array.flags.writeable else array.copy())  # fp32 comes as the mapped file itself
    heads = {"attn_q": config.n_head, "attn_k": config.n_query_groups}
    part = tensor.name.split(".")[-2]
    return undo_permutation(values, heads[part]) if part in heads else values


def undo_permutation(rows: torch.Tensor, n_head: int) -> torch.Tensor:
    """Rows of q or k, or their bias, from llama.cpp's order (pairs side by side) to Hugging Face's (halves)."""
    pairs = rows.unflatten(0, (n_head, -1, 2))  # (heads, S/2, 2, ...)
    return pairs.transpose(1, 2).flatten(0, 2)  # (heads * S, ...)


def _digits_and_gpt2() -> list[Any]:
    from tokenizers import pre_tokenizers

    digits = pre_tokenizers.Digits(individual_digits=True)
    return [digits, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)]


def _gpt2() -> list[Any]:
    from tokenizers import pre_tokenizers

    return [pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)]


def _llama3() -> list[Any]:
    from tokenizers import Regex, pre_tokenizers

    # Llama 3's own pattern (tiktoken's cl100k_base with digits in groups of at most three).
    pattern = (
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}|"
        r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    )
    split = pre_tokenizers.Split(Regex(pattern), behavior="isolated")
    return [split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]


# How text is cut before BPE, by the name in tokenizer.ggml.pre.
PRE_TOKENIZERS: dict[str, Callable[[], list[Any]]] = {
    "smollm": _digits_and_gpt2,
    "gpt-2": _gpt2,
    "llama-bpe": _llama3,
}


def build_tokenizer(metadata: dict[str, Any], path: Path) -> Any:
    """A ``tokenizers.Tokenizer`` with the vocabulary, merges and special tokens of the metadata."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors

    kind, pre = metadata.get("tokenizer.ggml.model"), metadata.get("tokenizer.ggml.pre")
    if kind != "gpt2" or pre not in PRE_TOKENIZERS:
        raise UserError(
            f"{path}: tokenizer {kind}/{pre} can't be rebuilt (gpt2 with {', '.join(PRE_TOKENIZERS)} can); "
            "put the original's tokenizer.json into --checkpoint_dir first"
        )
    tokens = metadata["tokenizer.ggml.tokens"]
    merges = [tuple(merge.split(" ")) for merge in metadata["tokenizer.ggml.merges"]]
    vocabulary = {token: index for index, token in enumerate(tokens)}
    tokenizer = Tokenizer(models.BPE(vocabulary, merges, ignore_merges=pre == "llama-bpe"))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(PRE_TOKENIZERS[pre]())
    tokenizer.decoder = decoders.ByteLevel()
    for token, type_ in zip(tokens, metadata.get("tokenizer.ggml.token_type", []), strict=False):
        if type_ == CONTROL:
            tokenizer.add_special_tokens([AddedToken(token, normalized=False, special=True)])
        elif type_ == USER_DEFINED:
            tokenizer.add_tokens([AddedToken(token, normalized=False, special=False)])
    # Older files of Llama 3 do not say it; llama.cpp takes it for granted there, and the original does it.
    if metadata.get("tokenizer.ggml.add_bos_token", pre == "llama-bpe"):
        bos = tokens[metadata["tokenizer.ggml.bos_token_id"]]
        ids = [(bos, vocabulary[bos])]
        tokenizer.post_processor = processors.TemplateProcessing(single=f"{bos} $A", special_tokens=ids)
    return tokenizer


def tokenizer_json(tokenizer: Any) -> str:
    """The text of a tokenizer.json, a merge as "a b" as most files on the Hub have it (all versions read that).

    SmolLM2's comes out byte for byte as its original, which is how we know that its ids are the original's.
    """
    content = json.loads(tokenizer.to_str())
    content["model"]["merges"] = [" ".join(merge) for merge in content["model"]["merges"]]
    return json.dumps(content, indent=2, ensure_ascii=False)


def special_ids(metadata: dict[str, Any]) -> dict[str, int]:
    """bos, eos and pad ids, those that the file has."""
    names = {"bos_token_id": "bos_token_id", "eos_token_id": "eos_token_id", "pad_token_id": "padding_token_id"}
    keys = {name: f"tokenizer.ggml.{key}" for name, key in names.items()}
    return {name: metadata[key] for name, key in keys.items() if key in metadata}


def generation_config(metadata: dict[str, Any]) -> dict[str, Any]:
    """The special ids again, with the end of a turn beside the end of text where they differ (Llama 3)."""
    ids, end_of_turn = special_ids(metadata), metadata.get("tokenizer.ggml.eot_token_id")
    eos = ids.get("eos_token_id")
    return ids if eos is None or end_of_turn in (None, eos) else {**ids, "eos_token_id": [eos, end_of_turn]}


def tokenizer_config(metadata: dict[str, Any], config: Config) -> dict[str, Any]:
    """A ``tokenizer_config.json``; its class is the one that takes tokenizer.json as it stands."""
    tokens = metadata["tokenizer.ggml.tokens"]
    ids = special_ids(metadata)
    if "tokenizer.ggml.unknown_token_id" in metadata:
        ids["unk_token_id"] = metadata["tokenizer.ggml.unknown_token_id"]
    template = metadata.get("tokenizer.chat_template")
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": config.block_size,
        "clean_up_tokenization_spaces": False,
        **{name.removesuffix("_id"): tokens[index] for name, index in ids.items()},
        **({"chat_template": template} if template else {}),
    }


if __name__ == "__main__":
    main(setup)
