"""Turn a llama.cpp GGUF file (Llama, Qwen2, Qwen3) into a base-shaped folder.

Weights are dequantized (what the quantization lost stays lost) and take Hugging Face's names, so that ``lit_gpt.hf``
converts them like any checkpoint, tensor by tensor: memory holds a few tensors of the result, whatever the model's
size. Of a model in several files any one may be named. A tokenizer that is byte-level BPE is rebuilt from the
metadata, where its pre-tokenizer, which a GGUF names and does not hold, is in the table below. The tokenizer's files,
config.json and generation_config.json that the folder has already are the original's, and kept.

    python scripts/convert_gguf_checkpoint.py --gguf_path SmolLM2-135M-Instruct.Q4_1.gguf \
        --checkpoint_dir checkpoints/HuggingFaceTB/SmolLM2-135M-Instruct
"""

import json
import re
import sys
from pathlib import Path
from typing import Any

import gguf
import numpy
import torch
from gguf import TokenType
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, processors
from tokenizers.pre_tokenizers import ByteLevel, Digits, Sequence, Split

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # runs from any folder

from lit_gpt.checkpoint import CONFIG, TOKENIZERS, WEIGHTS
from lit_gpt.cli import main
from lit_gpt.config import Config
from lit_gpt.errors import UserError, command, reading
from lit_gpt.files import prepare_out_dir, settled_folder, staged_dir, write_json
from lit_gpt.hf import Stored, hf_layout, write_lit
from lit_gpt.rope import scaled_frequencies

# The classes that these architectures are of in transformers.
ARCHITECTURES = {"llama": "LlamaForCausalLM", "qwen2": "Qwen2ForCausalLM", "qwen3": "Qwen3ForCausalLM"}
FILES = ("config.json", "generation_config.json", "tokenizer_config.json")
HF_ROUTE = "convert the original instead: `python scripts/download.py --repo_id ORG/NAME`"
ROPE_FACTORS = "rope_freqs.weight"
SPECIAL = {"bos": "ggml.bos_token_id", "eos": "ggml.eos_token_id", "pad": "ggml.padding_token_id"}
UNKNOWN = {"unk": "ggml.unknown_token_id"}
# Tokens that are matched before the text is split, and special but for the last kind.
MATCHED = (TokenType.UNKNOWN, TokenType.CONTROL, TokenType.USER_DEFINED)
SPLIT_NAME = re.compile(r"-\d{5}-of-(\d{5})\.gguf$")
# Pattern of Llama 3 (tiktoken's cl100k_base) and of Qwen, which differ in how many digits stand together.
CL100K = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}%s|"
    r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
GPT2, BYTES = (ByteLevel(add_prefix_space=False, use_regex=use_regex) for use_regex in (True, False))
# How text is cut before BPE, by the name in tokenizer.ggml.pre.
PRE_TOKENIZERS = {
    "smollm": [Digits(individual_digits=True), GPT2],
    "gpt-2": [GPT2],
    "llama-bpe": [Split(Regex(CL100K % "{1,3}"), behavior="isolated"), BYTES],
    "qwen2": [Split(Regex(CL100K % ""), behavior="isolated"), BYTES],
}


def setup(*, gguf_path: Path, checkpoint_dir: Path, dtype: Stored = "float32", overwrite: bool = False) -> None:
    """Convert a GGUF file for finetuning, chat and evaluation.

    Args:
        gguf_path: the .gguf file.
        checkpoint_dir: the folder to write lit_model.pth, the configs and the tokenizer into.
        dtype: the type to store weights in.
        overwrite: replace the model and the config.json that are already in checkpoint_dir.
    """
    checkpoint_dir = settled_folder(checkpoint_dir)
    prepare_out_dir(checkpoint_dir, overwrite, names=(WEIGHTS, CONFIG))
    # With --overwrite the config.json is no longer the original's to keep
    kept = {name for name in (*FILES[overwrite:], *TOKENIZERS) if (checkpoint_dir / name).is_file()}
    metadata, tensors = read_gguf(gguf_path)
    with reading(gguf_path):
        described = config_json(metadata, tensors, gguf_path)
        config = Config.from_hf(described, name=checkpoint_dir.resolve().name)
        words = section(metadata, "tokenizer.")
        ids = {f"{name}_token_id": words[key] for name, key in SPECIAL.items() if key in words}
        # Llama 3 has several tokens that end an answer
        ends = [words[f"ggml.{name}_token_id"] for name in ("eos", "eot", "eom") if f"ggml.{name}_token_id" in words]
        generation = {**ids, "eos_token_id": list(dict.fromkeys(ends)) or None}
        files = {"config.json": {**described, **ids, "torch_dtype": dtype}, "generation_config.json": generation}
        if not kept & {*TOKENIZERS}:
            files |= tokenizer_files(words, config, gguf_path)
    sources, stored = hf_tensors(tensors, config), getattr(torch, dtype)
    blanks = {name: torch.empty(t.shape.tolist()[::-1], dtype=stored, device="meta") for name, t in sources.items()}
    with staged_dir(checkpoint_dir, overwrite) as staging:
        write_lit(blanks, lambda name: dequantized(sources[name], blanks[name], config), config, staging / WEIGHTS)
        write_json(staging / CONFIG, config.to_dict())
        for name in files.keys() - kept:
            write_json(staging / name, files[name])
    print(f"{config.name}: {len(tensors)} tensors of {gguf_path.name} -> {checkpoint_dir / WEIGHTS} in {dtype}")
    print(f"next: {command('chat/base.py', checkpoint_dir=checkpoint_dir)}")


def read_gguf(path: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return the metadata of a GGUF file in plain types, and its tensors (memory-mapped, quantized) by name.

    Of a model in several files all are read, whichever is named; the first one's metadata describe it.

    Raises:
        FileNotFoundError, ValueError: one line that names the file.
    """
    split = SPLIT_NAME.search(path.name)
    count = int(split[1]) if split else 1
    parts = [path.with_name(SPLIT_NAME.sub(f"-{i:05}-of-{count:05}.gguf", path.name)) for i in range(1, count + 1)]
    metadata, tensors = dict[str, Any](), dict[str, Any]()
    for part in parts:
        if not part.is_file():
            raise FileNotFoundError(f"{part} not found; a .gguf file was expected, of a model in parts all of them")
        with reading(part):
            reader = gguf.GGUFReader(part)
            metadata = {key: field.contents() for key, field in reader.fields.items()} | metadata
            tensors |= {tensor.name: tensor for tensor in reader.tensors}
    return metadata, tensors


def section(metadata: dict[str, Any], prefix: str) -> dict[str, Any]:
    """Return the metadata whose keys begin with ``prefix``, without it."""
    return {key.removeprefix(prefix): value for key, value in metadata.items() if key.startswith(prefix)}


def config_json(metadata: dict[str, Any], tensors: dict[str, Any], path: Path) -> dict[str, Any]:
    """Return the model's ``config.json``, from the metadata and the tensors' shapes."""
    kind = metadata.get("general.architecture")
    sizes = section(metadata, f"{kind}.")
    if kind not in ARCHITECTURES or sizes.get("expert_count", 0):
        what = f"GGUF architecture {kind}{' with experts' if kind in ARCHITECTURES else ''} is not supported"
        raise UserError(f"{path}: {what} ({', '.join(ARCHITECTURES)} are); {HF_ROUTE}")
    width, heads = int(sizes["embedding_length"]), int(sizes["attention.head_count"])
    return dict(
        architectures=[ARCHITECTURES[kind]], model_type=kind, hidden_act="silu",
        vocab_size=int(tensors["token_embd.weight"].shape[1]), max_position_embeddings=int(sizes["context_length"]),
        num_hidden_layers=int(sizes["block_count"]), num_attention_heads=heads,
        hidden_size=width, intermediate_size=int(sizes["feed_forward_length"]),
        num_key_value_heads=sizes.get("attention.head_count_kv", heads),
        head_dim=sizes.get("attention.key_length", sizes.get("rope.dimension_count", width // heads)),
        rms_norm_eps=shortest(sizes["attention.layer_norm_rms_epsilon"]),
        rope_theta=shortest(sizes.get("rope.freq_base", 10000.0)), rope_scaling=rope_scaling(sizes, tensors, path),
        attention_bias="blk.0.attn_q.bias" in tensors, mlp_bias="blk.0.ffn_up.bias" in tensors,
        tie_word_embeddings="output.weight" not in tensors,
    )  # fmt: skip


def shortest(number: float) -> float:
    """Return the shortest decimal that rounds to the same fp32, 1e-05 for 9.99999974e-06: what config.json said."""
    return number if isinstance(number, int) else float(str(numpy.float32(number)))


def rope_scaling(sizes: dict[str, Any], tensors: dict[str, Any], path: Path) -> dict[str, Any] | None:
    """Return Hugging Face's ``rope_scaling`` of Llama 3.1 and later; no other is read.

    A GGUF of Llama 3.1 and later holds no parameters of the scaling, only the divisor of each frequency. Their
    published parameters are tried, and taken where they give the same divisors.
    """
    factor, kind = sizes.get("rope.scaling.factor", sizes.get("rope.scale_linear", 1.0)), sizes.get("rope.scaling.type")
    if factor not in (0.0, 1.0) and kind != "none":
        raise UserError(
            f"{path}: its rope scaling ({kind or 'linear'}, factor {factor:g}) is not read here; {HF_ROUTE}"
        )
    if ROPE_FACTORS not in tensors:
        return None
    divisors = torch.from_numpy(tensors[ROPE_FACTORS].data.copy())
    base, n = sizes["rope.freq_base"], 2 * len(divisors)
    scaling = {"rope_type": "llama3", "factor": float(divisors.max()), "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    scaling["original_max_position_embeddings"] = 8192
    plain, scaled = (scaled_frequencies(base, n, each)[0] for each in (None, scaling))
    if not torch.allclose(plain / scaled, divisors, rtol=1e-5):
        raise UserError(f"{path}: its rope_freqs are not those of Llama 3's scaling; {HF_ROUTE}")
    return scaling


def hf_tensors(tensors: dict[str, Any], config: Config) -> dict[str, Any]:
    """Return the tensors by Hugging Face's names; one without keeps its own, which ``write_lit`` refuses."""
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.QWEN3, config.n_layer)  # the others have some of these
    known = {names.get_name(name, (".weight", ".bias")): name for name in hf_layout(config).theirs}
    return {known.get(name, name): tensor for name, tensor in tensors.items() if name != ROPE_FACTORS}


def dequantized(tensor: Any, blank: torch.Tensor, config: Config) -> torch.Tensor:
    """Return a tensor of the file in the dtype of ``blank``, rows of q and k in the order of Hugging Face."""
    values = torch.empty_like(blank, device="cpu")
    with reading(f"tensor {tensor.name}"):
        for i in range(0, len(values), 1024):  # an embedding in fp32 is as large as a small model
            values[i : i + 1024] = torch.tensor(gguf.dequantize(tensor.data[i : i + 1024], tensor.tensor_type))
    heads = {"attn_q": config.n_head, "attn_k": config.n_query_groups}.get(tensor.name.split(".")[-2])
    if heads and config.architecture == "LlamaForCausalLM":
        # llama.cpp rotates pairs of rows that lie side by side; in Hugging Face's order a head's halves pair up.
        values = values.unflatten(0, (heads, -1, 2)).transpose(1, 2).flatten(0, 2)  # by way of (heads, 2, S / 2, ...)
    return values


def tokenizer_files(words: dict[str, Any], config: Config, path: Path) -> dict[str, Any]:
    """Return what tokenizer.json and tokenizer_config.json hold: vocabulary, merges and kinds of token are metadata.

    SmolLM2's tokenizer.json comes out as its original, which is how we know that its ids are the original's.
    """
    model, pre, tokens = words.get("ggml.model"), words.get("ggml.pre"), words.get("ggml.tokens", [])
    if model != "gpt2" or pre not in PRE_TOKENIZERS:
        raise UserError(
            f"{path}: tokenizer {model}/{pre} can't be rebuilt (gpt2/{', gpt2/'.join(PRE_TOKENIZERS)} "
            "can); put the original's into --checkpoint_dir first: scripts/download.py --tokenizer_only true gets it"
        )
    types = dict(enumerate(words.get("ggml.token_type", [])))
    # llama.cpp fills up the rows that stand for no token with [PAD151669] and so on
    unused = {f"[PAD{index}]" for index in types if types[index] == TokenType.UNUSED}
    vocabulary = {token: index for index, token in enumerate(tokens) if token not in unused}
    merges = [tuple(merge.split(" ")) for merge in words["ggml.merges"]]
    tokenizer = Tokenizer(models.BPE(vocabulary, merges, ignore_merges=pre == "llama-bpe"))
    tokenizer.pre_tokenizer, tokenizer.decoder = Sequence(PRE_TOKENIZERS[pre]), decoders.ByteLevel()
    if pre == "qwen2":
        tokenizer.normalizer = normalizers.NFC()
    for token, index in vocabulary.items():
        if (type_ := types.get(index)) in MATCHED:
            tokenizer.add_tokens([AddedToken(token, normalized=False, special=type_ != TokenType.USER_DEFINED)])
    named = {f"{name}_token": tokens[words[key]] for name, key in (SPECIAL | UNKNOWN).items() if key in words}
    if words.get("ggml.add_bos_token", pre == "llama-bpe"):  # older files do not say it of Llama 3
        bos = (named["bos_token"], words[SPECIAL["bos"]])
        tokenizer.post_processor = processors.TemplateProcessing(single=[bos[0], "$A"], special_tokens=[bos])
    content = json.loads(tokenizer.to_str())
    content["model"]["merges"] = [" ".join(merge) for merge in content["model"]["merges"]]  # all versions read that
    # The class that takes tokenizer.json as it stands
    shown = {"tokenizer_class": "PreTrainedTokenizerFast", "model_max_length": config.block_size, **named}
    shown |= {"clean_up_tokenization_spaces": False, "chat_template": words.get("chat_template")}
    return {"tokenizer.json": content, "tokenizer_config.json": shown}


if __name__ == "__main__":
    main(setup)
