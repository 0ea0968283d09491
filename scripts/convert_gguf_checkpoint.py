"""Turn a llama.cpp GGUF file into a base-shaped folder: weights, configs and tokenizer, with no other source.

Weights are dequantized (what the quantization lost stays lost) and take Hugging Face's names, so that ``lit_gpt.hf``
converts them like any checkpoint, tensor by tensor: memory holds a layer's attention in fp32, whatever the model's
size. Of a model in several files any one may be named. The tokenizer is rebuilt from the metadata: a GGUF names its
pre-tokenizer (``tokenizer.ggml.pre``) but does not hold it, so the table below holds those that are known here. A
tokenizer, config.json or generation_config.json that the folder has already is kept.

    python scripts/convert_gguf_checkpoint.py --gguf_path SmolLM2-135M-Instruct.Q4_1.gguf \
        --checkpoint_dir checkpoints/HuggingFaceTB/SmolLM2-135M-Instruct
"""

import json
import re
import shutil
import sys
import tempfile
from functools import partial
from pathlib import Path
from typing import Any, Literal

import gguf
import numpy
import torch
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, processors
from tokenizers.pre_tokenizers import ByteLevel, Digits, Sequence, Split

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # runs from any folder

from lit_gpt.checkpoint import CONFIG, TOKENIZERS, WEIGHTS
from lit_gpt.cli import main
from lit_gpt.config import Config
from lit_gpt.errors import UserError, command, reading
from lit_gpt.files import map_or_read, prepare_out_dir, read_json, settled_folder, staged_dir, write_json
from lit_gpt.hf import hf_names, write_lit
from lit_gpt.model import scale_frequencies

ROPE_FACTORS = "rope_freqs.weight"
CUT_SHORT = (ValueError, IndexError, KeyError, OverflowError, MemoryError)  # what NumPy says of a short file
SPLIT_NAME = re.compile(r"-\d{5}-of-(\d{5})\.gguf$")
# Kinds of token in tokenizer.ggml.token_type that are matched whole, before the text is split.
CONTROL, USER_DEFINED = 3, 4
# Llama 3's own pattern (tiktoken's cl100k_base with digits in groups of at most three).
LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}|"
    r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
GPT2 = ByteLevel(add_prefix_space=False, use_regex=True)
# How text is cut before BPE, by the name in tokenizer.ggml.pre.
PRE_TOKENIZERS = {
    "smollm": [Digits(individual_digits=True), GPT2],
    "gpt-2": [GPT2],
    "llama-bpe": [Split(Regex(LLAMA3), behavior="isolated"), ByteLevel(add_prefix_space=False, use_regex=False)],
}


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
    with reading(gguf_path):
        config = model_config(metadata, tensors, gguf_path, name=checkpoint_dir.resolve().name)
        words = section(metadata, "tokenizer.ggml.")
        described = {
            "config.json": {**config.to_hf(), **special_ids(words), "torch_dtype": dtype},
            "generation_config.json": generation_config(words),
        }
        if not keep_tokenizer:
            tokenizer = tokenizer_json(words, gguf_path)
            described["tokenizer_config.json"] = tokenizer_config(
                words, metadata.get("tokenizer.chat_template"), config
            )
    if not overwrite:  # as the tokenizer, those of the model's Hugging Face folder are kept
        note_other_model(checkpoint_dir / "config.json", config)
        described = {name: content for name, content in described.items() if not (checkpoint_dir / name).is_file()}
    sources = hf_tensors(tensors, config)
    stored = partial(torch.empty, dtype=getattr(torch, dtype), device="meta")
    blanks = {name: stored(tensor.shape.tolist()[::-1]) for name, tensor in sources.items()}
    with staged_dir(checkpoint_dir, overwrite) as staging:
        write_lit(blanks, lambda name: dequantized(sources[name], config), config, staging / WEIGHTS)
        write_json(staging / CONFIG, config.to_dict())
        for name, content in described.items():
            write_json(staging / name, content)
        if not keep_tokenizer:
            (staging / "tokenizer.json").write_text(tokenizer, encoding="utf-8")
    print(f"{config.name}: {len(tensors)} tensors of {gguf_path.name} -> {checkpoint_dir / WEIGHTS} in {dtype}")
    print(f"next: {command('chat/base.py', checkpoint_dir=checkpoint_dir)}")


def note_other_model(path: Path, config: Config) -> None:
    """Say so where a config.json that is kept describes a model of other sizes: only an export would read it."""
    theirs = Config.from_hf(read_json(path), name=config.name) if path.is_file() else config
    for name in ("n_layer", "n_embd", "n_head", "n_query_groups", "intermediate_size", "padded_vocab_size"):
        if getattr(theirs, name) != getattr(config, name):
            print(
                f"note: {path} is kept, and describes another model ({name} is {getattr(theirs, name)}, in the GGUF "
                f"file {getattr(config, name)}); --overwrite true replaces it"
            )
            return


def read_gguf(path: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return the metadata of a GGUF file in plain types, and its tensors (memory-mapped, quantized) by name.

    Of a model in several files all are read, whichever is named; the first one's metadata describe it.

    Raises:
        FileNotFoundError, ValueError: one line that names the file.
    """

    def read_copy(part: Path) -> gguf.GGUFReader:
        with tempfile.TemporaryDirectory() as folder:  # what is mapped stays after its name has gone
            return gguf.GGUFReader(shutil.copyfile(part, Path(folder) / part.name))

    if not path.is_file():
        raise FileNotFoundError(f"{path} is not a file; a .gguf file was expected")
    parts, split = [path], SPLIT_NAME.search(path.name)
    if split:
        stem, count = path.name[: split.start()], int(split[1])
        parts = [path.with_name(f"{stem}-{i:05}-of-{count:05}.gguf") for i in range(1, count + 1)]
    missing = ", ".join(part.name for part in parts if not part.is_file())
    if missing:
        raise FileNotFoundError(f"{path} is one of {len(parts)} parts, {missing} missing beside it; get all parts")
    metadata: dict[str, Any] = {}
    tensors: dict[str, Any] = {}
    for part in parts:
        try:
            reader = map_or_read(partial(gguf.GGUFReader, part), partial(read_copy, part))
            metadata = {key: field.contents() for key, field in reader.fields.items()} | metadata
            tensors |= {tensor.name: tensor for tensor in reader.tensors}
        except CUT_SHORT as error:
            raise UserError(f"{part} is not a GGUF file, or cut short ({error}); get it again") from error
    if len(tensors) != metadata.get("split.tensors.count", len(tensors)):
        raise UserError(
            f"{path} is part {metadata.get('split.no', 0) + 1} of {metadata['split.count']} of a model: give all parts "
            "their own names again (NAME-00001-of-00003.gguf and so on), in one folder"
        )
    return metadata, tensors


def section(metadata: dict[str, Any], prefix: str) -> dict[str, Any]:
    """Return the metadata whose keys begin with ``prefix``, without it."""
    return {key.removeprefix(prefix): value for key, value in metadata.items() if key.startswith(prefix)}


def model_config(metadata: dict[str, Any], tensors: dict[str, Any], path: Path, *, name: str) -> Config:
    """Return the config that the ``config.json`` of the model would give, from ``llama.*`` and the tensors' shapes."""
    kind = metadata.get("general.architecture")
    if kind != "llama" or metadata.get("llama.expert_count", 0):
        kind = "llama with experts" if kind == "llama" else kind
        raise UserError(f"{path}: GGUF architecture {kind} is not supported (llama is); convert its HF folder")
    sizes = section(metadata, "llama.")
    described = {
        "architectures": "LlamaForCausalLM",
        "vocab_size": int(tensors["token_embd.weight"].shape[1]),
        "max_position_embeddings": int(sizes["context_length"]),
        "hidden_size": int(sizes["embedding_length"]),
        "num_hidden_layers": int(sizes["block_count"]),
        "intermediate_size": int(sizes["feed_forward_length"]),
        "num_attention_heads": int(sizes["attention.head_count"]),
        "num_key_value_heads": sizes.get("attention.head_count_kv"),
        "head_dim": sizes.get("attention.key_length", sizes.get("rope.dimension_count")),
        "rms_norm_eps": shortest(sizes["attention.layer_norm_rms_epsilon"]),
        "rope_theta": shortest(sizes.get("rope.freq_base", 10000.0)),
        "rope_scaling": rope_scaling(sizes, tensors, path),
        "attention_bias": "blk.0.attn_q.bias" in tensors,
        "mlp_bias": "blk.0.ffn_up.bias" in tensors,
        "tie_word_embeddings": "output.weight" not in tensors,
    }
    return Config.from_hf(described, name)


def shortest(number: float) -> float:
    """Return the shortest decimal that rounds to the same fp32, 1e-05 for 9.99999974e-06: what config.json said."""
    return float(str(numpy.float32(number)))


def rope_scaling(sizes: dict[str, Any], tensors: dict[str, Any], path: Path) -> dict[str, Any] | None:
    """Return Hugging Face's ``rope_scaling``.

    A GGUF of Llama 3.1 and later holds no parameters of the scaling, only the divisor of each frequency. Their
    published parameters are tried, and taken where they give the same divisors.
    """
    kind = sizes.get("rope.scaling.type", "none")
    if kind == "linear":
        return {"rope_type": "linear", "factor": shortest(sizes["rope.scaling.factor"])}
    if kind != "none":
        raise UserError(f"{path}: rope scaling {kind} is not supported (linear and llama3 are)")
    if ROPE_FACTORS not in tensors:
        return None
    divisors = torch.from_numpy(tensors[ROPE_FACTORS].data.copy())
    exponents = torch.arange(0, 2 * len(divisors), 2).float() / (2 * len(divisors))
    frequencies = 1.0 / sizes["rope.freq_base"] ** exponents
    scaling = {"rope_type": "llama3", "factor": float(divisors.max()), "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    scaling["original_max_position_embeddings"] = 8192
    if not torch.allclose(frequencies / scale_frequencies(frequencies, scaling), divisors, rtol=1e-4):
        raise UserError(f"{path}: its rope_freqs are not those of Llama 3's scaling; convert its HF folder instead")
    return scaling


def hf_tensors(tensors: dict[str, Any], config: Config) -> dict[str, Any]:
    """Return the tensors by Hugging Face's names; one without keeps its own, which ``write_lit`` refuses."""
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config.n_layer)
    known = {names.get_name(name, (".weight", ".bias")): name for group in hf_names(config).values() for name in group}
    return {known.get(name, name): tensor for name, tensor in tensors.items() if name != ROPE_FACTORS}


def dequantized(tensor: Any, config: Config) -> torch.Tensor:
    """Return a tensor of the file in fp32, rows of q and k in the order of a ``LlamaForCausalLM``."""
    try:
        array = gguf.dequantize(tensor.data, tensor.tensor_type)
    except NotImplementedError as error:
        raise UserError(f"tensor {tensor.name}: {error}; convert the model's HF folder instead") from error
    values = torch.from_numpy(array if array.flags.writeable else array.copy())  # fp32 comes as the mapped file itself
    heads = {"attn_q": config.n_head, "attn_k": config.n_query_groups}.get(tensor.name.split(".")[-2])
    if (
        heads
    ):  # llama.cpp rotates pairs that lie side by side; Hugging Face's first half of a head pairs with the second
        values = (
            values.unflatten(0, (heads, -1, 2)).transpose(1, 2).flatten(0, 2)
        )  # (heads, S / 2, 2, ...) to (rows, ...)
    return values


def tokenizer_json(words: dict[str, Any], path: Path) -> str:
    """Return the text of a tokenizer.json, from the metadata's vocabulary, merges and kinds of token.

    SmolLM2's comes out byte for byte as its original, which is how we know that its ids are the original's.
    """
    kind, pre = words.get("model"), words.get("pre")
    if kind != "gpt2" or pre not in PRE_TOKENIZERS:
        raise UserError(
            f"{path}: tokenizer {kind}/{pre} can't be rebuilt (gpt2 with {', '.join(PRE_TOKENIZERS)} can); "
            "put the original's tokenizer.json into --checkpoint_dir first"
        )
    vocabulary = {token: index for index, token in enumerate(words["tokens"])}
    merges = [tuple(merge.split(" ")) for merge in words["merges"]]
    tokenizer = Tokenizer(models.BPE(vocabulary, merges, ignore_merges=pre == "llama-bpe"))
    tokenizer.pre_tokenizer = Sequence(PRE_TOKENIZERS[pre])
    tokenizer.decoder = decoders.ByteLevel()
    for token, type_ in zip(words["tokens"], words.get("token_type", []), strict=False):
        if type_ in (CONTROL, USER_DEFINED):
            tokenizer.add_tokens([AddedToken(token, normalized=False, special=type_ == CONTROL)])
    # Older files of Llama 3 do not say it; llama.cpp takes it for granted there, and the original does it.
    if words.get("add_bos_token", pre == "llama-bpe"):
        bos = words["tokens"][words["bos_token_id"]]
        ids = [(bos, vocabulary[bos])]
        tokenizer.post_processor = processors.TemplateProcessing(single=f"{bos} $A", special_tokens=ids)
    content = json.loads(tokenizer.to_str())
    content["model"]["merges"] = words["merges"]  # "a b", as most files on the Hub have it: all versions read that
    return json.dumps(content, indent=2, ensure_ascii=False)


def special_ids(words: dict[str, Any]) -> dict[str, int]:
    """Return the bos, eos and pad ids, those that the file has."""
    keys = {"bos_token_id": "bos_token_id", "eos_token_id": "eos_token_id", "pad_token_id": "padding_token_id"}
    return {name: words[key] for name, key in keys.items() if key in words}


def generation_config(words: dict[str, Any]) -> dict[str, Any]:
    """Return the special ids again, with the end of a turn beside the end of text where they differ (Llama 3)."""
    ids, end_of_turn = special_ids(words), words.get("eot_token_id")
    eos = ids.get("eos_token_id")
    return ids if eos is None or end_of_turn in (None, eos) else {**ids, "eos_token_id": [eos, end_of_turn]}


def tokenizer_config(words: dict[str, Any], template: str | None, config: Config) -> dict[str, Any]:
    """Return a ``tokenizer_config.json``; its class is the one that takes tokenizer.json as it stands."""
    ids = special_ids(words) | ({"unk_token_id": words["unknown_token_id"]} if "unknown_token_id" in words else {})
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": config.block_size,
        "clean_up_tokenization_spaces": False,
        **{name.removesuffix("_id"): words["tokens"][index] for name, index in ids.items()},
        **({"chat_template": template} if template else {}),
    }


if __name__ == "__main__":
    main(setup)
