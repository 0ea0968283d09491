"""Hugging Face to ours and back: every format of file, bit for bit, and a clear refusal of whatever is not one."""

import copy
import itertools
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from helpers import ROOT, file_size_limit
from hf_models import CASES, SIZES, build, save
from safetensors.torch import load_file, save_file

from lit_gpt.checkpoint import load_config, load_model, load_state, save_state
from lit_gpt.config import KNOWN_MODELS, Config
from lit_gpt.errors import UserError
from lit_gpt.families import FAMILIES
from lit_gpt.files import LOCK, TEMPORARY, read_json, staged_dir, write_json
from lit_gpt.hf import hf_modules, lit_to_hf, parameter_shapes
from lit_gpt.model import deinterleave_qkv
from scripts import convert_hf_checkpoint, convert_lit_checkpoint

# Fields that the original code's lit_config.json has under our names.
ORIGINAL_FIELDS = (
    "name block_size vocab_size padded_vocab_size n_layer n_head head_size n_embd rotary_percentage parallel_residual "
    "lm_head_bias n_query_groups shared_attention_norm norm_eps gelu_approximate intermediate_size rope_base n_expert "
    "n_expert_per_token"
).split()


def convert(folder: Path, **options) -> dict[str, torch.Tensor]:
    convert_hf_checkpoint.setup(checkpoint_dir=folder, **options)
    return load_state(folder / "lit_model.pth")


def export(folder: Path, out: Path, tokenizer: Path, **options) -> None:
    for file in tokenizer.iterdir():
        shutil.copyfile(file, folder / file.name)
    convert_lit_checkpoint.setup(checkpoint_dir=folder, out_dir=out, **options)


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(a[k].dtype == b[k].dtype and torch.equal(a[k], b[k]) for k in a)


@pytest.fixture
def llama(tmp_path) -> Path:
    """A folder with a small Llama as transformers saves it."""
    save("llama_tied_gqa", tmp_path / "llama")
    return tmp_path / "llama"


# ---- there and back


@pytest.mark.parametrize("case", CASES)
def test_round_trip_is_bit_exact_and_loads_in_transformers(case, tmp_path, bpe_dir):
    import transformers

    theirs, folder, out = save(case, tmp_path / "hf"), tmp_path / "hf", tmp_path / "out"
    convert(folder)
    export(folder, out, bpe_dir)
    assert (out / "model.safetensors").read_bytes() == (folder / "model.safetensors").read_bytes()
    loaded, info = transformers.AutoModelForCausalLM.from_pretrained(out, output_loading_info=True)
    assert not any(info.values()), info
    assert same(loaded.state_dict(), theirs.state_dict())
    assert loaded.config.to_dict() | {"_name_or_path": ""} == theirs.config.to_dict() | {"_name_or_path": ""}
    transformers.AutoTokenizer.from_pretrained(out)


def test_export_writes_a_hugging_face_folder_and_nothing_else(llama, tmp_path, bpe_dir):
    convert(llama)
    export(llama, tmp_path / "out", bpe_dir)
    expected = {"model.safetensors", "config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json"}
    assert {path.name for path in (tmp_path / "out").iterdir()} == expected
    modes = {path.stat().st_mode for path in (tmp_path / "out").iterdir()}
    assert len(modes) == 1, "safetensors alone would write a file that only its owner can read"


def test_export_corrects_dtype_and_ties_that_no_longer_hold(llama, tmp_path, bpe_dir):
    """As after a merge in bf16 with a head adapter: the base's config.json would load the wrong model."""
    import transformers

    state = {key: tensor.bfloat16() for key, tensor in convert(llama).items()}
    state["lm_head.weight"] = state["lm_head.weight"] + 1
    save_state(state, llama / "lit_model.pth")
    export(llama, tmp_path / "out", bpe_dir)
    described = read_json(tmp_path / "out" / "config.json")
    assert described["tie_word_embeddings"] is False and described["dtype"] == "bfloat16"
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert torch.equal(model.lm_head.weight, state["lm_head.weight"]) and model.dtype == torch.bfloat16
    assert torch.equal(model.model.embed_tokens.weight, state["transformer.wte.weight"])


def test_export_without_a_config_json_is_refused(llama, tmp_path, bpe_dir):
    convert(llama)
    (llama / "config.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"has no config.json; copy that of the base model there"):
        export(llama, tmp_path / "out", bpe_dir)
    assert not (tmp_path / "out").exists()


ORIGINAL_CASES = "llama llama_tied_gqa mixtral neox_parallel phi gemma falcon_7b falcon_40b".split()


def original_config(folder: Path, **changes) -> None:
    """Make a folder one of the original code's, by its lit_config.json."""
    config = load_config(folder).to_dict()
    stored = {key: config[key] for key in ORIGINAL_FIELDS} | {"bias": config["qkv_bias"], "rope_condense_ratio": 1}
    gemma = config["mlp_class"] == "GemmaMLP"
    stored |= {"_norm_class": "RMSNorm" if gemma else config["norm_class"], "_mlp_class": config["mlp_class"]}
    stored |= {"scale_embeddings": gemma} | ({"gelu_approximate": "none"} if gemma else {})
    write_json(folder / "lit_config.json", stored | changes)


@pytest.mark.parametrize("case", ORIGINAL_CASES)
@torch.inference_mode()
def test_a_folder_of_the_original_code_goes_to_the_class_that_it_is(case, tmp_path, bpe_dir):
    """Its config.json tells the class, which its lit_config.json does not."""
    import transformers

    theirs = save(case, tmp_path / "hf")
    convert(tmp_path / "hf")
    original_config(tmp_path / "hf")
    assert load_config(tmp_path / "hf").architecture == ""
    export(tmp_path / "hf", tmp_path / "out", bpe_dir)
    loaded, info = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not any(info.values()), info
    idx = torch.arange(1, 30)[None]
    torch.testing.assert_close(loaded(idx).logits, theirs(idx).logits, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(load_model(tmp_path / "hf")(idx), theirs(idx).logits)


def test_rows_of_padding_that_config_json_does_not_count_are_left_out(tmp_path, bpe_dir, capsys):
    """160 rows of 150 ids: the original code counts both, config.json one of them."""
    import transformers

    folder = tmp_path / "hf"
    theirs = save("phi", folder)
    described = read_json(folder / "config.json")
    convert(folder)
    for rows, message in ((152, "8 rows of padding are left out"), (160, ""), (149, None)):
        original_config(folder, vocab_size=150)
        write_json(folder / "config.json", described | {"vocab_size": rows})
        if message is None:
            with pytest.raises(ValueError, match=r"has shape \(160, 32\); the model's config asks for \(149, 32\)"):
                export(folder, tmp_path / "out", bpe_dir, overwrite=True)
            continue
        export(folder, tmp_path / "out", bpe_dir, overwrite=True)
        assert message in capsys.readouterr().out
        loaded, info = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out", output_loading_info=True)
        assert not any(info.values()) and loaded.config.vocab_size == rows
        for name in ("model.embed_tokens.weight", "lm_head.weight", "lm_head.bias"):
            assert torch.equal(loaded.state_dict()[name], theirs.state_dict()[name][:rows])


def test_an_original_config_is_read_and_does_not_tell_the_hugging_face_class(llama):
    weights = convert(llama)
    original_config(llama, rope_condense_ratio=4)
    config = load_config(llama)
    assert config.rope_scaling == {"rope_type": "linear", "factor": 4.0}
    with pytest.raises(UserError, match="the original code's, which does not tell the Hugging Face class; convert the"):
        lit_to_hf(weights, config)


def test_export_in_shards_loads_and_replaces_what_was_there(llama, tmp_path, bpe_dir, monkeypatch):
    import transformers

    convert(llama)
    out = tmp_path / "out"
    monkeypatch.setattr(convert_lit_checkpoint, "SHARD_SIZE", "10KB")
    export(llama, out, bpe_dir)
    assert (out / "model.safetensors.index.json").is_file() and not (out / "model.safetensors").exists()
    sharded = transformers.AutoModelForCausalLM.from_pretrained(out).state_dict()
    assert same(sharded, build("llama_tied_gqa").state_dict())
    with pytest.raises(FileExistsError, match="--overwrite true"):
        export(llama, out, bpe_dir)
    monkeypatch.undo()
    export(llama, out, bpe_dir, overwrite=True)
    assert [path.name for path in out.glob("model*")] == ["model.safetensors"]


def test_export_into_its_own_folder_is_refused(llama, bpe_dir):
    convert(llama)
    with pytest.raises(ValueError, match="is the checkpoint folder itself"):
        export(llama, llama, bpe_dir, overwrite=True)


def test_export_of_weights_with_an_adapter_is_refused(llama):
    state = dict(convert(llama))
    state["transformer.h.0.attn.attn.ether_Rq"] = torch.zeros(1, 2, 12)
    with pytest.raises(ValueError, match="ether_Rq"):
        lit_to_hf(state, load_config(llama))


# ---- fused tensors, norms head by head, models of more than text


@pytest.mark.parametrize("dtype", [None, "bfloat16"])
def test_a_name_listed_more_than_once_is_one_tensor_of_these_rows(tmp_path, bpe_dir, dtype):
    """Phi-3's q, k and v, and its gate and up: split on the way in, stacked on the way back."""
    folder, out = tmp_path / "hf", tmp_path / "out"
    stored = save("phi3", folder).to(getattr(torch, dtype or "float32")).state_dict()
    state = convert(folder, dtype=dtype)
    gate, up = stored["model.layers.1.mlp.gate_up_proj.weight"].chunk(2)
    assert torch.equal(state["transformer.h.1.mlp.fc_1.weight"], gate)
    assert torch.equal(state["transformer.h.1.mlp.fc_2.weight"], up)
    qkv = deinterleave_qkv(state["transformer.h.1.attn.attn.weight"], load_config(folder))
    assert torch.equal(qkv, stored["model.layers.1.self_attn.qkv_proj.weight"])
    export(folder, out, bpe_dir)
    assert same(load_file(out / "model.safetensors"), stored)
    change(folder, **{"model.layers.0.mlp.gate_up_proj.weight": torch.zeros(79, 24)})
    with pytest.raises(ValueError, match=r"gate_up_proj.weight has shape \(79, 24\).* \(80, 24\)"):
        convert(folder)
    change(folder, "model.layers.0.mlp.gate_up_proj.weight")
    with pytest.raises(ValueError, match=r"a Phi3ForCausalLM: 1 missing .model.layers.0.mlp.gate_up_proj.weight"):
        convert(folder)


# As it is now in memory, as it is in files, and as older versions wrote it.
NESTED = ("model.language_model.", "language_model.model.")
VISION = dict(
    hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, patch_size=4, image_size=16
)  # fmt: skip


def with_vision(folder: Path, kind: str, nested: str, *, text_type: str, **fields) -> torch.nn.Module:
    """Save a model that sees; ``nested`` is the name of its text part in files."""
    import transformers

    text = dict(SIZES, num_key_value_heads=2, head_dim=8, model_type=text_type)
    config = getattr(transformers, f"{kind}Config")(text_config=text, vision_config=VISION, **fields)
    torch.manual_seed(1)
    whole = getattr(transformers, f"{kind}ForConditionalGeneration")(config)
    whole.save_pretrained(folder)
    weights = {}
    for name, tensor in load_file(folder / "model.safetensors").items():
        if nested == "model.language_model.":
            name = re.sub(r"^language_model.model", "model.language_model", name).replace("language_model.lm", "lm")
            name = re.sub(r"^(vision_tower|multi)", r"model.\1", name)
        weights[name] = tensor
    assert any(name.startswith(nested) for name in weights)
    save_file(weights, folder / "model.safetensors")
    return whole


@pytest.mark.parametrize(
    ("kind", "text_type", "tied"),
    [("Mistral3", "mistral", False), ("Mistral3", "mistral", True), ("Gemma3", "gemma3_text", True)],
)
@pytest.mark.parametrize("nested", NESTED)
@torch.inference_mode()
def test_of_a_model_that_sees_the_text_is_converted(tmp_path, bpe_dir, capsys, nested, kind, text_type, tied):
    import transformers

    folder, out = tmp_path / "hf", tmp_path / "out"
    whole = with_vision(folder, kind, nested, text_type=text_type, tie_word_embeddings=tied)
    edit_config(folder, eos_token_id=7)
    capsys.readouterr()
    convert(folder)
    prefix = nested.partition("language_model.")[0]
    said = capsys.readouterr().out
    assert re.search(rf"without \d tensors of {prefix}multi_modal_projector, \d+ tensors of {prefix}vision_tower", said)
    export(folder, out, bpe_dir)
    loaded, info = transformers.AutoModelForCausalLM.from_pretrained(out, output_loading_info=True)
    assert not any(info.values()), info
    idx = torch.arange(1, 30)[None]
    torch.testing.assert_close(loaded(idx).logits, whole(idx).logits)
    torch.testing.assert_close(load_model(folder)(idx), whole(idx).logits)
    assert loaded.config.eos_token_id == 7


def test_a_multimodal_config_that_leaves_out_the_defaults_of_its_text_model_is_read():
    """As google/gemma-3-4b-it was published."""
    import transformers

    text = dict(hidden_size=2560, intermediate_size=10240, num_hidden_layers=34, sliding_window=1024)
    text |= dict(model_type="gemma3_text", rope_scaling=dict(factor=8.0, rope_type="linear"))
    full = transformers.Gemma3TextConfig(**text).to_dict() | {"architectures": ["Gemma3ForCausalLM"]}
    whole = dict(architectures=["Gemma3ForConditionalGeneration"], model_type="gemma3", text_config=text)
    assert Config.from_hf(whole) == Config.from_hf(full)


# ---- formats


def test_files_written_beside_the_hugging_face_ones(llama):
    before = {path.name for path in llama.iterdir()}
    convert(llama)
    assert {path.name for path in llama.iterdir()} - before == {"lit_model.pth", "lit_config.json"}


def test_converting_again_gives_the_same_bytes(llama):
    convert(llama)
    first = (llama / "lit_model.pth").read_bytes()
    convert(llama)
    assert (llama / "lit_model.pth").read_bytes() == first


def test_sharded_safetensors_with_an_index(llama, tmp_path):
    save("llama_tied_gqa", tmp_path / "shards", max_shard_size="10KB")
    assert len(list((tmp_path / "shards").glob("model-*.safetensors"))) > 2
    assert same(convert(tmp_path / "shards"), convert(llama))


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "old format"])
def test_pytorch_bin(llama, tmp_path, zipped):
    """`.bin` holds tied weights twice, and here a buffer of older transformers."""
    folder = tmp_path / "bin"
    folder.mkdir()
    shutil.copyfile(llama / "config.json", folder / "config.json")
    state = build("llama_tied_gqa").state_dict()
    assert "lm_head.weight" in state
    state["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.zeros(3)
    torch.save(state, folder / "pytorch_model.bin", _use_new_zipfile_serialization=zipped)
    torch.save({"lr": 1}, folder / "training_args.bin")
    assert same(convert(folder), convert(llama))


def test_pytorch_bin_in_shards(llama, tmp_path):
    folder = tmp_path / "bin"
    folder.mkdir()
    shutil.copyfile(llama / "config.json", folder / "config.json")
    items = sorted(build("llama_tied_gqa").state_dict().items())
    shards = {
        "pytorch_model-00001-of-00002.bin": dict(items[::2]),
        "pytorch_model-00002-of-00002.bin": dict(items[1::2]),
    }
    for name, part in shards.items():
        torch.save(part, folder / name)
    weight_map = {key: name for name, part in shards.items() for key in part}
    write_json(folder / "pytorch_model.bin.index.json", {"weight_map": weight_map})
    assert same(convert(folder), convert(llama))


def test_mixtral_keeps_its_experts_apart_on_disk(tmp_path):
    """transformers 5 stacks experts in memory; the files, ours to read and to write, hold w1, w2 and w3 of each."""
    model = save("mixtral", tmp_path)
    stacked = model.model.layers[1].mlp.experts
    state = convert(tmp_path)
    gate, up = stacked.gate_up_proj[3].chunk(2)
    assert torch.equal(state["transformer.h.1.mlp.experts.3.fc_1.weight"], gate)
    assert torch.equal(state["transformer.h.1.mlp.experts.3.fc_2.weight"], up)
    assert torch.equal(state["transformer.h.1.mlp.experts.3.proj.weight"], stacked.down_proj[3])


def test_attention_rows_lie_interleaved_by_group(llama):
    """For each KV group its query heads, then its key, then its value."""
    state, config, model = convert(llama), load_config(llama), build("llama_tied_gqa")
    attention, size = model.model.layers[1].self_attn, config.head_size
    rows = state["transformer.h.1.attn.attn.weight"].split(size)
    q, k, v = (getattr(attention, f"{part}_proj").weight.split(size) for part in "qkv")
    expected = [q[0], q[1], k[0], v[0], q[2], q[3], k[1], v[1]]
    assert all(torch.equal(a, b) for a, b in zip(rows, expected, strict=True))
    parts = deinterleave_qkv(state["transformer.h.1.attn.attn.weight"], config).split(config.qkv_sizes)
    assert all(torch.equal(part, torch.cat(heads)) for part, heads in zip(parts, (q, k, v), strict=True))


def test_tied_embeddings_are_stored_once(llama):
    state = convert(llama)
    assert state["lm_head.weight"].data_ptr() == state["transformer.wte.weight"].data_ptr()
    parameters = sum(p.numel() for p in build("llama_tied_gqa").parameters())
    assert (llama / "lit_model.pth").stat().st_size < 4 * parameters + 20_000
    assert load_config(llama).tie_embeddings


def test_a_tied_file_that_holds_only_the_head(llama):
    expected = convert(llama)
    weights = load_file(llama / "model.safetensors")
    weights["lm_head.weight"] = weights.pop("model.embed_tokens.weight")
    save_file(weights, llama / "model.safetensors")
    assert same(convert(llama), expected)


def test_head_and_embedding_that_differ_stay_two_whatever_config_json_says(llama, capsys):
    """transformers does the same; tying them would throw one away."""
    weights = load_file(llama / "model.safetensors")
    weights["lm_head.weight"] = weights["model.embed_tokens.weight"] + 1
    save_file(weights, llama / "model.safetensors")
    state = convert(llama)
    assert torch.equal(state["lm_head.weight"], weights["lm_head.weight"])
    assert not load_config(llama).tie_embeddings
    assert "two different ones" in capsys.readouterr().out


def test_dtype_casts_and_by_default_keeps_what_is_stored(llama):
    assert {tensor.dtype for tensor in convert(llama).values()} == {torch.float32}
    assert {tensor.dtype for tensor in convert(llama, dtype="bfloat16").values()} == {torch.bfloat16}
    weights = {key: tensor.half() for key, tensor in load_file(llama / "model.safetensors").items()}
    save_file(weights, llama / "model.safetensors")
    assert {tensor.dtype for tensor in convert(llama).values()} == {torch.float16}


def test_one_architecture_may_stand_without_its_list(llama):
    expected = Config.from_hf(read_json(llama / "config.json"))
    edit_config(llama, architectures="LlamaForCausalLM")
    assert Config.from_hf(read_json(llama / "config.json")) == expected


def test_model_name_is_recorded(llama):
    convert(llama)
    assert load_config(llama).name == "llama"
    convert(llama, model_name="my-model")
    assert load_config(llama).name == "my-model"


def test_a_model_that_nobody_listed_works_from_the_command_line(llama):
    command = [sys.executable, str(ROOT / "scripts" / "convert_hf_checkpoint.py"), "--checkpoint_dir", str(llama)]
    done = subprocess.run(command, cwd=llama.parent, capture_output=True, text=True)
    assert done.returncode == 0 and "next: python" in done.stdout, done.stderr
    assert load_config(llama).n_query_groups == 2


def test_older_buffers_of_gpt_neox_are_passed_over(tmp_path):
    save("neox_parallel", tmp_path)
    expected = convert(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    for name in ("bias", "masked_bias", "rotary_emb.inv_freq"):
        weights[f"gpt_neox.layers.0.attention.{name}"] = torch.zeros(3)
    save_file(weights, tmp_path / "model.safetensors")
    assert same(convert(tmp_path), expected)


def test_names_of_every_architecture_are_distinct_and_complete():
    for fields in (
        dict(),
        dict(architecture="MixtralForCausalLM", mlp_class="LLaMAMoE", n_expert=3, n_expert_per_token=2),
    ):
        config = Config(n_layer=2, n_embd=32, n_head=4, vocab_size=8, intermediate_size=8, **fields)
        modules = hf_modules(config)
        names = [name for group in modules.values() for name in group]
        assert len(names) == len(set(names))
        assert {key.rpartition(".")[0] for key in parameter_shapes(config)} == set(modules)


@pytest.mark.parametrize("kind", sorted({kind for kind, _ in CASES.values()}))
def test_what_config_json_leaves_out_means_what_it_means_to_transformers(kind):
    """Older files hold only what differs from the class's defaults."""
    import transformers

    default = getattr(transformers, kind)()
    left_out = (
        "rms_norm_eps layer_norm_eps rope_parameters head_dim num_key_value_heads sliding_window attention_bias "
        "mlp_bias hidden_act tie_word_embeddings num_local_experts num_experts_per_tok qk_layernorm "
        "use_parallel_residual partial_rotary_factor rotary_pct rope_theta rope_scaling dtype query_pre_attn_scalar "
        "attn_logit_softcapping final_logit_softcapping layer_types no_rope_layers embedding_multiplier "
        "residual_multiplier attention_multiplier logits_scaling clip_qkv activation bias num_kv_heads multi_query "
        "num_ln_in_parallel_attn new_decoder_architecture ffn_hidden_size norm_topk_prob num_experts use_bias "
        "norm_epsilon layer_norm_epsilon use_qkv_bias hidden_activation use_sliding_window rope_local_base_freq"
    ).split()
    architecture = next(name for name, family in FAMILIES.items() if family.model_type == default.model_type)
    full = {**default.to_dict(), "architectures": [architecture]}
    short = {key: value for key, value in full.items() if key not in left_out}
    assert Config.from_hf(short) == Config.from_hf(full)


WINDOWS = dict(num_hidden_layers=32, use_sliding_window=True, sliding_window=64)
YARN_BY_HAND = dict(rope_scaling=dict(type="yarn", factor=4.0, original_max_position_embeddings=32768))
PUBLISHED = {
    "GemmaForCausalLM": [dict(hidden_act="gelu", hidden_activation=None, tie_word_embeddings=True)],
    "Qwen2ForCausalLM": [WINDOWS, dict(WINDOWS, max_window_layers=20), dict(YARN_BY_HAND)],
    "Qwen3ForCausalLM": [WINDOWS, dict(YARN_BY_HAND, max_position_embeddings=40960)],
    "Qwen3MoeForCausalLM": [dict(WINDOWS, max_window_layers=20)],
    "SmolLM3ForCausalLM": [dict(WINDOWS, max_window_layers=28), dict(WINDOWS, no_rope_layers=[1, 0] * 16)],
    "Phi3ForCausalLM": [
        dict(
            original_max_position_embeddings=4096,
            max_position_embeddings=131072,
            partial_rotary_factor=0.75,
            rope_scaling=dict(type=word, short_factor=[1.0] * 36, long_factor=[2.0] * 36),
        )
        for word in ("su", "yarn", "longrope")
    ],
    "LlamaForCausalLM": [dict(sliding_window_pattern=4, no_rope_layer_interval=4)],
    "Gemma3ForCausalLM": [dict(sliding_window_pattern=3), dict(rope_local_base_freq=2e4, rope_theta=3e5)],
}
"""Keys that config.json of a class has had somewhere, beside those of all."""


@pytest.mark.parametrize("architecture", PUBLISHED)
def test_old_words_mean_what_they_mean_to_transformers(architecture):
    import transformers

    model_type = FAMILIES[architecture].model_type
    for told in PUBLISHED[architecture]:
        plain = transformers.AutoConfig.for_model(model_type).to_dict()
        rows = {key: plain[key] for key in hf_sizes(plain)}
        asked = copy.deepcopy({**rows, **told})
        if "su" in str(told):  # transformers 5 reads this word no more
            asked["rope_scaling"]["type"] = "longrope"
        full = transformers.AutoConfig.for_model(model_type, **asked).to_dict()
        ours = Config.from_hf({"architectures": [architecture], **rows, **told})
        assert ours == Config.from_hf({**full, "architectures": [architecture]})


def hf_sizes(described: dict) -> list[str]:
    """Return the keys of the sizes that every config.json tells."""
    told = "vocab_size hidden_size intermediate_size num_hidden_layers num_attention_heads max_position_embeddings"
    return [key for key in told.split() if key in described]


def test_a_context_before_scaling_is_not_taken_for_the_longest():
    """As lmsys/vicuna-7b-v1.5-16k was published."""
    config = KNOWN_MODELS["meta-llama/Llama-2-7b-hf"]
    told = dict(max_sequence_length=16384, rope_scaling=dict(factor=4.0, type="linear"))
    assert Config.from_hf({**config, **told}).block_size == 16384


# ---- refusals: one line, nothing written


NO_MODEL = [
    *(("sliding_window", value, "sliding_window") for value in (0, -3, "5", 5.0, True, [4])),
    *(
        ("layer_types", value, "layers|layer_types|does not hold")
        for value in ([], ["full_attention"], "full_attention", 5)
    ),
    *(("attn_logit_softcapping", value, "attention_softcap") for value in (-1, "x", [1], float("nan"))),
    *(("rms_norm_eps", value, "norm_eps") for value in (-1, True, float("inf"))),
    *(("rope_theta", value, "rope_base") for value in (0, -1.0, "many")),
    *(("partial_rotary_factor", value, "rotated|rotary_percentage") for value in (-1, 0.0, 0.4, 1.5, float("nan"))),
    *(("rope_scaling", dict(rope_type="linear", factor=value), "factor") for value in (0, -2.0, "8", [2.0], None)),
    (
        "rope_scaling",
        dict(
            rope_type="longrope",
            factor=2.0,
            short_factor=[1.0] * 4,
            long_factor=[1.0],
            original_max_position_embeddings=8,
        ),
        "long_factor",
    ),
    ("rope_scaling", "yarn", "does not hold"),
    ("vocab_size", True, "vocab_size"),
]


@pytest.mark.parametrize(("key", "value", "message"), NO_MODEL)
def test_a_config_json_of_no_model_is_refused_in_a_line(key, value, message):
    sizes = dict(vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=4, num_attention_heads=4)
    told = {**sizes, "max_position_embeddings": 64, "num_key_value_heads": 2, "head_dim": 8, key: value}
    architecture = "Gemma2ForCausalLM" if key in ("layer_types", "attn_logit_softcapping") else "MistralForCausalLM"
    with pytest.raises(UserError, match=message) as refusal:
        Config.from_hf({"architectures": [architecture], **told}, "tiny")
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize("told", [dict(num_local_experts=None), dict(num_local_experts=0), dict(num_experts_per_tok=9)])
def test_a_mixture_that_lacks_experts_is_refused(told):
    config = KNOWN_MODELS["mistralai/Mixtral-8x7B-v0.1"]
    with pytest.raises(UserError, match=r"experts|n_expert"):
        Config.from_hf({**config, **told})


def edit_config(folder: Path, **fields) -> None:
    write_json(folder / "config.json", {**read_json(folder / "config.json"), **fields})


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-100])


def bin_instead(folder: Path) -> Path:
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    return folder / "pytorch_model.bin"


def change(folder: Path, drop: str = "", **add: torch.Tensor) -> None:
    weights = load_file(folder / "model.safetensors")
    weights = {key: tensor for key, tensor in weights.items() if key != drop}
    save_file({**weights, **add}, folder / "model.safetensors")


def first_shard(folder: Path) -> Path:
    (folder / "model.safetensors").unlink()
    save("llama_tied_gqa", folder, max_shard_size="10KB")
    return sorted(folder.glob("model-*"))[0]


def lie(path: Path, old: str, new: str, *, longer: int = 0) -> None:
    """Change a safetensors file's header, or the length that it is said to have; the tensors' bytes stay."""
    content = path.read_bytes()
    size = int.from_bytes(content[:8], "little")
    header = content[8 : 8 + size].replace(old.encode(), new.encode(), 1)
    assert header != content[8 : 8 + size] or longer
    path.write_bytes((len(header) + longer).to_bytes(8, "little") + header + content[8 + size :])


class Code:
    """Runs when it is unpickled by whoever lets it."""

    def __reduce__(self):
        return Path.touch, (Path("code_has_run"),)


def bin_with_code(folder: Path) -> None:
    torch.save(load_file(folder / "model.safetensors") | {"a": Code()}, bin_instead(folder))


NORM = "model.layers.0.input_layernorm.weight"
GPTQ, FP8 = {"quant_method": "gptq", "bits": 4}, torch.float8_e4m3fn
INDEX = "model.safetensors.index.json"


def only_an_index(folder: Path, content: object) -> None:
    """Write an index of shards, in the place of the whole file, which would count."""
    (folder / "model.safetensors").rename(folder / "model-00001-of-00001.safetensors")
    write_json(folder / INDEX, content)


REFUSALS = {
    "no folder": (lambda d: shutil.rmtree(d), "has no config.json.*download.py"),
    "no config": (lambda d: (d / "config.json").unlink(), "no config.json.*download.py --repo_id"),
    "no weights": (lambda d: (d / "model.safetensors").unlink(), r"neither model\*.safetensors nor .*download.py"),
    "config is not JSON": (lambda d: (d / "config.json").write_text("{"), "config.json is not valid JSON"),
    "config is a list": (lambda d: (d / "config.json").write_text("[1]"), "config.json of .* does not hold what it sh"),
    "sizes are words": (lambda d: edit_config(d, hidden_size="large"), "n_embd is 'large', expected int above 0"),
    "negative heads": (
        lambda d: edit_config(d, num_key_value_heads=-1),
        "n_query_groups is -1, expected int, 0 or more",
    ),
    "nested too deep": (lambda d: (d / "config.json").write_text("[" * 99999), "config.json is not valid JSON"),
    "index is a list": (lambda d: only_an_index(d, [1]), f"{INDEX} does not hold what it should"),
    "index of numbers": (lambda d: only_an_index(d, {"weight_map": {"a": 1}}), f"{INDEX} does not hold what it should"),
    "architecture": (
        lambda d: edit_config(d, architectures=["OPTForCausalLM"]),
        "OPTForCausalLM is not supported; supported: LlamaForCausalLM, .*PhiForCausalLM",
    ),
    "no architecture": (lambda d: edit_config(d, architectures=None), "not supported; supported: Llama"),
    "kinds of layers": (
        lambda d: edit_config(d, architectures=["Qwen2ForCausalLM"], use_sliding_window=True, layer_types=["linear"]),
        "layers of type linear are not supported",
    ),
    "rope scaling": (lambda d: edit_config(d, rope_parameters={"rope_type": "mrope", "factor": 2.0}), "mrope"),
    "incomplete rope scaling": (
        lambda d: edit_config(d, rope_parameters={"rope_type": "longrope", "short_factor": [1.0]}),
        "short_factor of rope scaling 'longrope' is .1.0., expected 3 positive",
    ),
    "alibi": (lambda d: edit_config(d, architectures=["FalconForCausalLM"], alibi=True), "falcon-rw"),
    "truncated safetensors": (
        lambda d: cut(d / "model.safetensors"),
        r"model.safetensors does not hold",
    ),
    "empty safetensors": (
        lambda d: (d / "model.safetensors").write_bytes(b""),
        "model.safetensors does not hold",
    ),
    "truncated bin": (lambda d: cut(bin_instead(d)), "pytorch_model.bin is corrupt"),
    "text for bin": (lambda d: bin_instead(d).write_text("<html>not found</html>"), "pytorch_model.bin is corrupt"),
    "pickled object": (lambda d: torch.save({"a": Path}, bin_instead(d)), "pytorch_model.bin is corrupt"),
    "a checkpoint for bin": (
        lambda d: torch.save({"state_dict": {}}, bin_instead(d)),
        r"bin holds 'state_dict', expected",
    ),
    "numbers for names": (lambda d: torch.save({1: torch.ones(2)}, bin_instead(d)), "bin holds 1, expected names and"),
    "code in a bin": (bin_with_code, "pytorch_model.bin is corrupt, cut short, or not a PyTorch file"),
    "sparse": (
        lambda d: torch.save({NORM: torch.ones(24).to_sparse()}, bin_instead(d)),
        f"bin holds '{NORM}', expected names and dense",
    ),
    "shard missing": (lambda d: first_shard(d).unlink(), "names files that are not there .model-00001.*download.py"),
    "shard truncated": (lambda d: cut(first_shard(d)), "model-00001-of-.*.safetensors does not hold"),
    "shard outside": (lambda d: only_an_index(d, {"weight_map": {"a": "../x"}}), f"{INDEX} names ../x, outside the"),
    "shard elsewhere": (lambda d: only_an_index(d, {"weight_map": {"a": "/etc/x"}}), f"{INDEX} names /etc/x, outside"),
    "sizes that lie": (
        lambda d: lie(d / "model.safetensors", "[24]", "[25]"),
        "safetensors does not hold",
    ),
    "offsets that lie": (
        lambda d: lie(d / "model.safetensors", "[0,", "[8,"),
        "safetensors does not hold",
    ),
    "a header too long": (lambda d: lie(d / "model.safetensors", "", "", longer=2**40), "safetensors does not hold"),
    "tensor twice": (
        lambda d: change(d, **{f"language_model.{NORM}": torch.ones(24)}),
        f"holds {NORM}, which is there",
    ),
    "tensor missing": (lambda d: change(d, NORM), f"1 missing .{NORM}"),
    "tensor unknown": (lambda d: change(d, **{"model.norm.bias": torch.zeros(24)}), "1 not known .model.norm.bias"),
    "shape": (lambda d: change(d, **{NORM: torch.zeros(5)}), rf"{NORM} has shape \(5,\); .* \(24,\)"),
    "heads": (lambda d: edit_config(d, num_key_value_heads=4), r"k_proj.weight has shape \(12, 24\); .* \(24, 24\)"),
    "quantized": (lambda d: edit_config(d, quantization_config=GPTQ), r"quantized .gptq.; get the unquantized model"),
    "quantized, other files": (
        lambda d: (edit_config(d, quantization_config={"load_in_4bit": True}), (d / "model.safetensors").unlink()),
        r"quantized .bitsandbytes.; get the unquantized",
    ),
    "compressed": (lambda d: edit_config(d, compression_config={"quant_method": "x"}), r"quantized .x.; get the"),
    "int8": (lambda d: change(d, **{NORM: torch.ones(24, dtype=torch.int8)}), rf"{NORM} is torch.int8.*quantized"),
    "fp8": (lambda d: change(d, **{NORM: torch.ones(24).to(FP8)}), "is torch.float8_e4m3fn: .*quantized; get"),
    "AWQ": (
        lambda d: change(d, **{"a.qweight": torch.ones(2, dtype=torch.int32)}),
        "qweight is torch.int32: .*quantized",
    ),
    "bitsandbytes": (
        lambda d: change(d, **{NORM: torch.ones(9, dtype=torch.uint8), f"{NORM}.absmax": torch.ones(1)}),
        r"is torch.uint8: the weights are quantized; get the unquantized model",
    ),
    "MXFP4": (
        lambda d: change(d, **{"a.w_blocks": torch.ones(2, dtype=torch.uint8)}),
        r"a.w_blocks is torch.uint8: .*quantized; get the",
    ),
    "layers": (lambda d: edit_config(d, num_hidden_layers=1), "9 not known"),
}


@pytest.mark.parametrize("case", REFUSALS)
def test_refusal(case, llama, capsys):
    from lit_gpt.cli import main

    break_it, message = REFUSALS[case]
    break_it(llama)
    capsys.readouterr()
    before = {path.name for path in llama.iterdir()} if llama.exists() else set()
    with pytest.raises(SystemExit) as stop:
        main(convert_hf_checkpoint.setup, ["--checkpoint_dir", str(llama)])
    lines = capsys.readouterr().err.strip().splitlines()
    assert stop.value.code == 1 and len(lines) == 1, lines
    assert lines[0].startswith("error: ")
    assert re.search(message, lines[0]), lines[0]
    assert not Path("code_has_run").exists()
    assert ({path.name for path in llama.iterdir()} if llama.exists() else set()) == before


def test_a_full_disk_leaves_what_was_there(llama, tmp_path, bpe_dir, capsys):
    """Files of 37 kB and more may grow to 4 kB, or to 20 kB, on the way in and on the way back."""
    from lit_gpt.cli import main

    convert(llama, dtype="float16")
    export(llama, tmp_path / "out", bpe_dir)
    before = {path: path.read_bytes() for folder in (llama, tmp_path / "out") for path in folder.iterdir()}
    back = ["--checkpoint_dir", str(llama), "--out_dir", str(tmp_path / "out"), "--overwrite", "true"]
    for setup, arguments in ((convert_hf_checkpoint.setup, back[:2]), (convert_lit_checkpoint.setup, back)):
        for room in (4_000, 20_000):
            with file_size_limit(room), pytest.raises(SystemExit):
                main(setup, arguments)
            assert re.search(r"error: .*(File too large|writing failed).*/", capsys.readouterr().err)
            assert {
                path: path.read_bytes() for folder in {p.parent for p in before} for path in folder.iterdir()
            } == before


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT])
def test_an_interrupted_conversion_leaves_nothing_that_the_next_one_does_not_remove(llama, monkeypatch, number):
    """The process ends half-way through the weights; while one is at work in a folder, another is refused."""
    from lit_gpt import checkpoint
    from lit_gpt.cli import main

    before = {path.name for path in llama.iterdir()}
    child = os.fork()
    if not child:
        fill, calls = checkpoint._fill_record, itertools.count()

        def end_at_the_sixth(*record) -> None:
            fill(*record)
            if next(calls) == 5:
                os.kill(os.getpid(), number)

        with monkeypatch.context() as patch:
            patch.setattr(checkpoint, "_fill_record", end_at_the_sixth)
            try:
                main(convert_hf_checkpoint.setup, ["--checkpoint_dir", str(llama)])
            except SystemExit as stop:
                os._exit(stop.code)
        os._exit(0)
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    assert status == (130 if number == signal.SIGINT else -number)
    left = {path.name for path in llama.iterdir()} - before
    assert len(left - {LOCK}) == (number == signal.SIGKILL)
    assert all(name.startswith(TEMPORARY) for name in left - {LOCK})
    with staged_dir(llama, overwrite=True) as another:
        with pytest.raises(UserError, match="is in use by process"):
            convert(llama)
        assert another.is_dir()
    convert(llama)
    assert {path.name for path in llama.iterdir()} - before == {"lit_model.pth", "lit_config.json"}


def test_refusals_of_the_way_back(tmp_path, llama, bpe_dir):
    with pytest.raises(FileNotFoundError, match=r"lit_model.pth.*convert_hf_checkpoint.py"):
        convert_lit_checkpoint.setup(checkpoint_dir=llama, out_dir=tmp_path / "out")
    convert(llama)
    cut(llama / "lit_model.pth")
    with pytest.raises(ValueError, match=r"lit_model.pth is corrupt"):
        export(llama, tmp_path / "out", bpe_dir)
    for state, message in (
        ({}, r"lit_model.pth does not hold what it should"),
        (dict.fromkeys(("lm_head.weight", "transformer.wte.weight"), torch.ones(160, 24)), r"15 missing .*norm_1"),
    ):
        save_state(state, llama / "lit_model.pth")
        with pytest.raises(ValueError, match=message):
            export(llama, tmp_path / "out", bpe_dir)
    assert not (tmp_path / "out").exists()


def test_unknown_dtype_names_the_choices(llama, capsys):
    from lit_gpt.cli import main

    with pytest.raises(SystemExit):
        main(convert_hf_checkpoint.setup, ["--checkpoint_dir", str(llama), "--dtype", "int3"])
    assert "bfloat16" in capsys.readouterr().err


def test_a_folder_below_checkpoints_names_the_repo_to_download(tmp_path):
    folder = tmp_path / "checkpoints" / "ORG2" / "NAME2"
    with pytest.raises(FileNotFoundError, match=r"download.py --repo_id ORG2/NAME2$"):
        convert(folder)


def test_index_that_names_nothing(llama):
    only_an_index(llama, {"weight_map": {}})
    with pytest.raises(FileNotFoundError, match="names files"):
        convert(llama)


@pytest.mark.parametrize("shards", [True, False])
@pytest.mark.parametrize("kind", ["safetensors", "bin"])
def test_the_whole_file_counts_and_not_an_older_uploads_index(llama, tmp_path, kind, shards, capsys):
    """With the older shards there, they were converted in silence; without, the folder was refused."""
    import transformers

    expected = convert(llama)
    weights = load_file(llama / "model.safetensors")
    name = {"safetensors": "model", "bin": "pytorch_model"}[kind]
    if kind == "bin":
        bin_instead(llama)
    older = f"{name}-00001-of-00001.{kind}"
    write_json(llama / f"{name}.{kind}.index.json", {"metadata": {}, "weight_map": dict.fromkeys(weights, older)})
    if shards:
        zeros = {key: tensor * 0 for key, tensor in weights.items()}
        (torch.save if kind == "bin" else save_file)(zeros, llama / older)
    capsys.readouterr()
    assert same(convert(llama), expected)
    assert f"{name}.{kind} and an index" in capsys.readouterr().out
    theirs = transformers.AutoModelForCausalLM.from_pretrained(llama).state_dict()
    assert torch.equal(theirs["model.norm.weight"], expected["transformer.ln_f.weight"])


def test_two_files_with_the_same_tensor_are_refused(llama):
    """Shards of two uploads without an index: the last one's would count."""
    weights = load_file(llama / "model.safetensors")
    (llama / "model.safetensors").unlink()
    save_file(weights, llama / "model-00001-of-00001.safetensors")
    save_file({NORM: weights[NORM] * 0}, llama / "model-00002-of-00002.safetensors")
    with pytest.raises(ValueError, match=rf"00002.safetensors holds {NORM}, which is there already"):
        convert(llama)
