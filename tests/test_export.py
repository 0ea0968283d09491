"""Adapters as PEFT LoRA folders: PEFT computes what our unmerged model computes, and what is no LoRA is refused."""

import re
import shlex
from pathlib import Path

import peft
import pytest
import torch
import transformers
from helpers import export_adapter, make_adapter, path_option, relative
from huggingface_hub import ModelCard
from safetensors.torch import load_file

from lit_gpt import Config
from lit_gpt.adapter import adapter_parameters, merge_adapter_weights
from lit_gpt.adapter_files import load_adapted_model, load_adapter, open_adapter
from lit_gpt.checkpoint import fingerprint, load_model, load_state, save_prompt_style, save_state
from lit_gpt.cli import main
from lit_gpt.export import Export
from lit_gpt.files import read_json, write_json
from lit_gpt.hf import lit_to_hf
from lit_gpt.merge import merge_adapter
from lit_gpt.reflections import reflection_factors, side_factors
from lit_gpt.serving import lora_commands, lora_limits
from scripts import convert_lit_checkpoint, export_lora

TARGETS = ("query", "key", "value", "projection", "mlp", "head")
IDX = torch.arange(2 * 20).remainder(160).view(2, 20)


def in_peft(adapter: Path, out: Path) -> peft.PeftModel:
    model = transformers.AutoModelForCausalLM.from_pretrained(adapter.parent / "base", dtype=torch.float32)
    return peft.PeftModel.from_pretrained(model, out).eval()


# ---- the same function in PEFT

ETHER, PLUS, BOTH = dict(Htype="ether", nb=2), dict(Htype="etherplus", nb=2), dict(Htype="etherplusHH", nb=1)
BLOCKS, LORA = dict(Htype="etherplusHH", nb=2), dict(r=3, alpha=5.0, scale=0.3)
PUBLISHED = dict(Htype="ether", nb=4, block_layout="published", targets=("query", "value"))
EXPORTS = {
    "ether": ("llama", ETHER),
    "etherplus": ("llama", PLUS),
    "etherplusHH": ("llama", BOTH),
    "lora": ("llama", LORA),
    "flip_side": ("llama_mqa_odd_head", dict(**PLUS, flip_side=True, targets=("projection", "mlp"))),
    "published, output side": ("llama", PUBLISHED),
    "gqa, tied head": ("llama_tied_gqa", BOTH),
    "gqa, tied head, lora": ("llama_tied_gqa", LORA),
    "mqa, odd heads": ("llama_mqa_odd_head", BOTH),
    "biases": ("llama_biases", BOTH),
    "gqa, wide heads, two blocks": ("llama3_rope", BLOCKS),
    "mistral": ("mistral_window", PLUS),
    "qwen2": ("qwen2_tied", BOTH),
    "qwen3": ("qwen3", BOTH),
    "stablelm": ("stablelm_biases", BOTH),
    "starcoder2": ("starcoder2", PLUS),
    "mixtral's attention": ("mixtral", dict(**ETHER, targets=("query", "key", "value", "projection", "head"))),
    "neox, ether": ("neox_parallel", ETHER),
    "neox, etherplusHH": ("neox_parallel", BOTH),
    "neox, q and v": ("neox_sequential", dict(**PLUS, targets=("query", "value"))),
    "neox, lora": ("neox_sequential", LORA),
    "neox, tied head": ("neox_tied_tanh", PLUS),
    "phi": ("phi", BLOCKS),
    "phi, gqa, four blocks": ("phi_gqa", dict(Htype="etherplusHH", nb=4)),
    "phi, lora": ("phi_gqa", LORA),
    "phi-3": ("phi3", BOTH),
    "phi-3, q and v": ("phi3_longrope", dict(**PLUS, targets=("query", "value"))),
    "gemma": ("gemma", PLUS),
    "gemma 2": ("gemma2", BOTH),
    "gemma 3": ("gemma3", ETHER),
    "falcon 7b": ("falcon_7b", PLUS),
    "falcon 40b": ("falcon_40b", BOTH),
    "olmo": ("olmo", BOTH),
    "olmo 2": ("olmo2", PLUS),
    "olmo 3": ("olmo3", LORA),
    "smollm 3": ("smollm3_listed", BOTH),
    "granite": ("granite", PLUS),
    "stablelm 2": ("stablelm2_12b", BOTH),
    "ministral": ("ministral", PLUS),
    "qwen3 moe's attention": ("qwen3_moe", dict(**ETHER, targets=("query", "key", "value", "projection", "head"))),
}


@pytest.mark.filterwarnings("ignore:Model (with|has) `tie_word_embeddings=True`")
@pytest.mark.parametrize("name", EXPORTS)
def test_peft_computes_what_our_unmerged_model_computes_and_merges_alike(name, tmp_path, bpe_dir):
    case, fields = EXPORTS[name]
    adapter = make_adapter(tmp_path, case, bpe_dir, **fields)
    ours = load_adapted_model(tmp_path / "base", adapter=open_adapter(**path_option(adapter)))
    theirs = in_peft(adapter, export_adapter(adapter))
    with torch.no_grad():
        expected = ours(IDX)
        assert relative(load_model(tmp_path / "base")(IDX), expected) > 1e-2, "the adapter does nothing"
        assert relative(theirs(IDX).logits, expected) < 1e-5
        tied = ours.config.tie_embeddings
        merge_adapter_weights(ours)
        own = adapter_parameters(ours)
        base = {key: tensor for key, tensor in ours.state_dict().items() if key not in own}
        names, make = lit_to_hf(base, ours.config)
        weights = {name: make(name) for name in names}
        merged = theirs.merge_and_unload().state_dict()
    for on_disk, in_memory in (("embed_out", "lm_head"), ("block_sparse_moe.gate", "mlp.gate")):
        weights = {key.replace(on_disk, in_memory): tensor for key, tensor in weights.items()}
    # PEFT merges a tied head into the embedding too, which is what the export warns of.
    apart = (
        ("lm_head.weight", "embed_in.weight", "embed_tokens.weight", "word_embeddings.weight")
        if tied
        else (".experts.",)
    )
    compared = {key for key in weights if not any(name in key for name in apart)}
    assert compared <= merged.keys()
    for key in compared:
        assert relative(merged[key], weights[key]) < 1e-5, key


def test_half_the_strength_is_exported_as_it_is_computed(tmp_path, bpe_dir):
    adapter = make_adapter(tmp_path, "llama", bpe_dir, **BOTH)
    ours = load_adapted_model(tmp_path / "base", adapter=open_adapter(**path_option(adapter), strength=0.5))
    theirs = in_peft(adapter, export_adapter(adapter, strength=0.5))
    with torch.no_grad():
        assert relative(theirs(IDX).logits, ours(IDX)) < 1e-5


def test_a_base_in_bf16_is_multiplied_in_fp32(tmp_path, bpe_dir):
    adapter = make_adapter(tmp_path, "llama", bpe_dir, dtype="bfloat16", **BOTH)
    out = export_adapter(adapter)
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "base", dtype=torch.bfloat16).float()
    with torch.no_grad():
        theirs = peft.PeftModel.from_pretrained(model, out)(IDX).logits
        assert (
            relative(theirs, load_adapted_model(tmp_path / "base", adapter=load_adapter(adapter, "ether"))(IDX)) < 1e-5
        )


# ---- what is written


def test_the_folder_holds_two_files_that_say_what_they_are(tmp_path, bpe_dir, capsys):
    adapter = make_adapter(tmp_path, "llama3_rope", bpe_dir, **BLOCKS, targets=("query", "value"))
    out = export_adapter(adapter)
    assert {path.name for path in out.iterdir()} == {"adapter_config.json", "adapter_model.safetensors", "README.md"}
    assert len({path.stat().st_mode for path in out.iterdir()}) == 1
    base = str(tmp_path / "base")
    config = read_json(out / "adapter_config.json")
    assert config["base_model_name_or_path"] == base and config["target_modules"] == ["q_proj", "v_proj"]
    assert (config["r"], config["lora_alpha"]) == (8, 8)
    tensors = load_file(out / "adapter_model.safetensors")
    assert len(tensors) == 2 * 2 * 2 and {tensor.dtype for tensor in tensors.values()} == {torch.float32}
    prefix = "base_model.model.model.layers.1.self_attn.v_proj"
    assert tensors[f"{prefix}.lora_A.weight"].shape == (8, 24) and tensors[f"{prefix}.lora_B.weight"].shape == (32, 8)
    lines = capsys.readouterr().out.splitlines()
    size = sum(tensor.nbytes for tensor in tensors.values())
    about = f"etherplusHH with n = 2 on query, value, prompt style alpaca, as a LoRA of {base}"
    assert lines[-8:] == [
        f"{out}: {adapter}, {about}",
        f"rank 8 (q_proj 8, v_proj 8), {size / 1e6:.1f} MB in fp32",
        lines[-6],
        "prompt style alpaca does not travel with these files: a server renders messages with the base's chat "
        "template; send it a text that is rendered already, as lit_gpt/prompts.py does",
        "vLLM casts fp32 weights to bf16 unless told --dtype float32: log-probabilities of SmolLM2-135M moved by up to "
        "0.4, with and without an adapter",
        f"PEFT: AutoPeftModelForCausalLM.from_pretrained('{out}')",
        f"vLLM: vllm serve {base} --enable-lora --max-lora-rank 8 --lora-modules out={out}",
        f"llama.cpp: python convert_lora_to_gguf.py {out} --base {base}",
    ]
    assert re.fullmatch(r"exact in fp32; on a server in bf16 its rounded .* by \d\.\de-0\d", lines[-6])


def test_one_rank_for_every_module_since_llama_cpp_knows_one_a_file(tmp_path, bpe_dir, capsys):
    """Ranks of 24 and 8 in a GPT-NeoX were converted silently, with one scale for both: logits were off by 1.85."""
    adapter = make_adapter(tmp_path, "neox_parallel", bpe_dir, **BOTH, targets=TARGETS)
    out = export_adapter(adapter)
    config, tensors = read_json(out / "adapter_config.json"), load_file(out / "adapter_model.safetensors")
    assert (config["r"], config["lora_alpha"]) == (12, 12) and not [key for key in config if "pattern" in key]
    shapes = {name: factor.shape["lora_B" in name] for name, factor in tensors.items()}
    assert {*shapes.values()} == {12}
    own = {"lm_head": 4, "query_key_value": 12, "dense": 4, "dense_h_to_4h": 4, "dense_4h_to_h": 4}
    listed = ", ".join(f"{name} {rank}" for name, rank in own.items())
    assert f"rank 12 ({listed}, filled up with zeros)" in capsys.readouterr().out
    for name, factor in tensors.items():
        zeros = (factor == 0).all(dim=0 if "lora_B" in name else 1)
        assert zeros.sum() == 12 - own[name.split(".")[-3]], name


@pytest.mark.parametrize("folder, known", [("checkpoints/tiny/llama", True), ("models/tiny/llama", False)])
def test_the_base_is_named_so_that_peft_finds_it(folder, known, tmp_path, bpe_dir, monkeypatch):
    """AutoPeftModel and llama.cpp's converter looked a bare folder name up on the Hub, and failed."""
    adapter = make_adapter(tmp_path, "llama", bpe_dir, **PLUS)
    base = tmp_path / folder
    base.parent.mkdir(parents=True)
    (tmp_path / "base").rename(base)
    monkeypatch.chdir(tmp_path)
    export_lora.setup(checkpoint_dir=Path(folder), ether_path=adapter, out_dir=Path("my lora"))
    named = read_json(tmp_path / "my lora" / "adapter_config.json")["base_model_name_or_path"]
    assert named == ("tiny/llama" if known else str(base))
    card = (tmp_path / "my lora" / "README.md").read_text()
    assert ('base_model: "tiny/llama"' in card.split("---")[1]) == known
    assert f"convert_lora_to_gguf.py . --base{'-model-id' if known else ''} {named}`" in card
    if not known:
        model = peft.AutoPeftModelForCausalLM.from_pretrained("my lora")
        ours = load_adapted_model(base, adapter=load_adapter(adapter, "ether"))
        with torch.no_grad():
            assert relative(model(IDX).logits, ours(IDX)) < 1e-5


def test_commands_are_quoted_for_a_shell(tmp_path, bpe_dir, capsys):
    folder = tmp_path / "it's mine"
    folder.mkdir()
    export_adapter(make_adapter(folder, "llama", bpe_dir, **PLUS))
    peft_line, vllm, llama = capsys.readouterr().out.splitlines()[-3:]
    base, out = str(folder / "base"), str(folder / "out")
    assert eval(peft_line.removeprefix("PEFT: AutoPeftModelForCausalLM.from_pretrained")) == out
    words = ["vllm", "serve", base, "--enable-lora", "--max-lora-rank", "8", "--lora-modules", f"out={out}"]
    assert shlex.split(vllm.removeprefix("vLLM: ")) == words
    assert shlex.split(llama.removeprefix("llama.cpp: ")) == ["python", "convert_lora_to_gguf.py", out, "--base", base]


@pytest.mark.parametrize("change", ["no Hugging Face weights", "multimodal"])
def test_the_base_is_what_convert_lit_checkpoint_writes_where_servers_cannot_read_this_one(
    change, tmp_path, bpe_dir, capsys
):
    adapter = make_adapter(tmp_path, "gemma3", bpe_dir, **ETHER, targets=("query", "value"))
    base, converted = tmp_path / "base", tmp_path / "base-hf"
    if change == "multimodal":
        text = read_json(base / "config.json")
        whole = {"architectures": ["Gemma3ForConditionalGeneration"], "model_type": "gemma3", "text_config": text}
        write_json(base / "config.json", whole)
    else:
        (base / "model.safetensors").unlink()
    out = export_adapter(adapter)
    lines = capsys.readouterr().out.splitlines()
    assert read_json(out / "adapter_config.json")["base_model_name_or_path"] == str(converted)
    command = f"python scripts/convert_lit_checkpoint.py --checkpoint_dir {base} --out_dir {converted}"
    assert f"next: {command}" in lines and f"vLLM: vllm serve {converted} " in lines[-2]
    convert_lit_checkpoint.setup(checkpoint_dir=base, out_dir=converted)
    ours = load_adapted_model(base, adapter=load_adapter(adapter, "ether"))
    with torch.no_grad():
        assert relative(peft.AutoPeftModelForCausalLM.from_pretrained(out)(IDX).logits, ours(IDX)) < 1e-5


def test_one_linear_for_q_k_and_v_gets_one_stack(tmp_path, bpe_dir):
    out = export_adapter(make_adapter(tmp_path, "neox_parallel", bpe_dir, **PLUS, targets=("query", "value", "mlp")))
    tensors = load_file(out / "adapter_model.safetensors")
    b = tensors["base_model.model.gpt_neox.layers.0.attention.query_key_value.lora_B.weight"].view(4, 3, 8, 8)
    assert (b[:, 1] == 0).all(), "k is not adapted: head by head its rows are zero"
    assert (b[:, 0, :, 4:] == 0).all() and (b[:, 2, :, :4] == 0).all(), "q and v have ranks of their own"


def test_what_starts_as_the_identity_is_exported_as_nothing(tmp_path, bpe_dir, capsys):
    out = export_adapter(make_adapter(tmp_path, "llama", bpe_dir, scale=0.0, **BOTH))
    assert all((b == 0).all() for name, b in load_file(out / "adapter_model.safetensors").items() if "lora_B" in name)
    assert "change the weight update by 0.0e+00" in capsys.readouterr().out


LIMITS = {
    "tied head": ("llama_tied_gqa", ("query", "head"), [], ["llama.cpp takes no LoRA of a tied head"]),
    "phi's head": ("phi", ("head",), ["llama.cpp"], ["vLLM takes no LoRA of the head of a PhiForCausalLM"]),
    "neox's head": ("neox_parallel", ("head",), ["llama.cpp"], ["vLLM takes no LoRA of the head of a GPTNeoXFor"]),
    "neox": (
        "neox_parallel",
        ("query",),
        ["vLLM", "llama.cpp"],
        ["vLLM takes a LoRA on a GPTNeoXForCausalLM from ver"],
    ),
    "falcon": ("falcon_7b", ("query",), ["llama.cpp"], ["vLLM takes no LoRA on a FalconForCausalLM"]),
    "qwen 2's tied head": (
        "qwen2_tied",
        ("head",),
        [],
        ["vLLM takes no LoRA of the", "llama.cpp takes no LoRA of a t"],
    ),
}


@pytest.mark.parametrize("name", LIMITS)
def test_what_a_server_does_not_take_is_merged_for_it(name, tmp_path, bpe_dir, capsys):
    case, targets, programs, told = LIMITS[name]
    adapter = make_adapter(tmp_path, case, bpe_dir, **PLUS, targets=targets)
    out = export_adapter(adapter)
    printed, card = capsys.readouterr().out, (out / "README.md").read_text()
    merge = f"merge: python scripts/merge_ether.py --checkpoint_dir {tmp_path / 'base'} --ether_path {adapter}\n"
    for sentence in told:
        assert sentence in printed and f"- {sentence}" in card
    assert (merge in printed) == ("takes no" in printed) == ("merge for it" in printed)
    assert ("PEFT's merge_and_unload would change it too" in printed) == ("tied" in name)
    if name != "tied head":
        assert re.findall(r"^(vLLM|llama.cpp): ", printed, re.M) == programs
        assert re.findall(r"^- (vLLM|llama.cpp): ", card, re.M) == programs


@pytest.mark.parametrize("rank, limit", [(1, 8), (16, 16), (17, 32), (257, 320), (513, None)])
def test_the_smallest_setting_of_vllm_is_named(rank, limit):
    assert lora_limits(Config(), rank, head=False) == ({} if limit else {"vLLM": "no rank above 512"})
    assert f"-rank {limit} " in lora_commands("base", Path("out"), name="out", rank=rank)["vLLM"]


# ---- what a folder's page says


def test_the_card_says_what_was_printed_and_how_to_load_the_folder(tmp_path, bpe_dir, capsys):
    out = export_adapter(make_adapter(tmp_path, "llama", bpe_dir, **LORA, targets=("query", "mlp")))
    card = ModelCard((out / "README.md").read_text())
    tags = {"library_name": "peft", "pipeline_tag": "text-generation", "tags": ["ether"]}
    assert card.data.to_dict() == tags, "the Hub refuses a base_model that is a folder"
    about, *notes = capsys.readouterr().out.splitlines()[-8:-3]
    assert (
        about.partition(", ")[2]
        == f"LoRA of rank 3 on query, mlp, prompt style alpaca, as a LoRA of {tmp_path / 'base'}"
    )
    assert f"# out\n\n{about.partition(', ')[2]}. It computes the same function.\n" in card.text
    assert "\n".join(f"- {note}" for note in notes) in card.text and len(notes) == 4
    assert "- PEFT: `AutoPeftModelForCausalLM.from_pretrained('.')`\n- vLLM: `vllm serve" in card.text


@pytest.mark.parametrize("style", ["alpaca", "chat", None])
def test_a_converted_model_has_a_card_where_it_was_finetuned(style, tmp_path, bpe_dir, capsys):
    adapter = make_adapter(tmp_path, "llama", bpe_dir, **PLUS)
    folder = tmp_path / "base"
    if style:
        folder = tmp_path / "merged"
        merge_adapter("ether", adapter, checkpoint_dir=tmp_path / "base", out_dir=folder, precision="32-true")
        save_prompt_style(folder, style)
    capsys.readouterr()
    convert_lit_checkpoint.setup(checkpoint_dir=folder, out_dir=tmp_path / "my hf")
    _, *notes, transformers_line, vllm, llama = capsys.readouterr().out.splitlines()
    assert transformers_line == f"transformers: AutoModelForCausalLM.from_pretrained('{tmp_path / 'my hf'}')"
    assert shlex.split(vllm) == ["vLLM:", "vllm", "serve", str(tmp_path / "my hf")]
    assert shlex.split(llama) == ["llama.cpp:", "python", "convert_hf_to_gguf.py", str(tmp_path / "my hf")]
    assert [note.partition(" ")[0] for note in notes] == ["prompt"] * (style == "alpaca") + ["vLLM"]
    card = tmp_path / "my hf" / "README.md"
    assert card.exists() == bool(style)
    if style:
        text = card.read_text()
        assert ModelCard(text).data.library_name == "transformers"
        assert all(f"- {note}\n" in text for note in notes) and "vLLM: `vllm serve .`" in text


def test_a_readme_of_the_user_s_is_never_replaced(tmp_path, bpe_dir, capsys):
    adapter = make_adapter(tmp_path, "llama", bpe_dir, **PLUS)
    merge_adapter("ether", adapter, checkpoint_dir=tmp_path / "base", out_dir=tmp_path / "merged")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "README.md").write_text("mine")
    export_adapter(adapter)
    for _ in range(2):
        export_adapter(adapter, overwrite=True)
        convert_lit_checkpoint.setup(checkpoint_dir=tmp_path / "merged", out_dir=tmp_path / "out", overwrite=True)
    assert (tmp_path / "out" / "README.md").read_text() == "mine"
    assert f"{tmp_path / 'out' / 'README.md'} stays as it is" in capsys.readouterr().out


# ---- the mathematics


@pytest.mark.parametrize("n", [1, 3])
@pytest.mark.parametrize("plus", [False, True])
@pytest.mark.parametrize("sides", [("input",), ("output",), ("input", "output")])
def test_factors_equal_the_dense_formula(sides, plus, n):
    torch.manual_seed(0)
    weight = torch.randn(18, 30, dtype=torch.float64)
    sizes, adapted, vectors = {"input": 30, "output": 18}, weight, {}
    for side in sides:
        drawn = [torch.randn(n, sizes[side] // n, dtype=torch.float64) for _ in range(1 + plus)]
        hats = [vector / vector.norm(dim=-1, keepdim=True) for vector in drawn]
        outer = [torch.block_diag(*(torch.outer(block, block) for block in hat)) for hat in hats]
        r = torch.eye(sizes[side]).double() + (outer[1] - outer[0] if plus else -2 * outer[0])
        adapted = adapted @ r if side == "input" else r @ adapted
        vectors[side] = tuple(drawn)
    a, b = reflection_factors(weight, **vectors)
    assert a.shape == (n * (1 + plus) * len(sides), 30)
    torch.testing.assert_close(weight + b @ a, adapted, rtol=0, atol=1e-12)
    assert torch.linalg.matrix_rank(adapted - weight) == len(a), "no smaller rank would do"


@pytest.mark.parametrize("angle", [1e-1, 1e-3, 1e-5])
def test_rounding_to_bf16_costs_an_update_its_own_precision_however_small(angle):
    u = torch.randn(2, 12, dtype=torch.float64)
    v = -u + angle * torch.randn(2, 12, dtype=torch.float64)
    left, right = side_factors(u, v)
    exact = left @ right
    rounded = left.bfloat16().double() @ right.bfloat16().double()
    assert (rounded - exact).norm() / exact.norm() < 2**-8


def test_the_reported_rounding_is_that_of_the_dense_update():
    export, update, change = Export(), [], []
    for name in ("h.0.q_proj", "h.0.v_proj"):
        a, b = torch.randn(3, 20), torch.randn(30, 3)
        export.add(name, a, b)
        update.append(b @ a)
        change.append(b.bfloat16().float() @ a.bfloat16().float() - b @ a)
    expected = torch.stack(change).norm() / torch.stack(update).norm()
    assert export.rounding == pytest.approx(expected.item(), rel=1e-5)


# ---- refusals: one line, nothing written

MERGE = r"merge instead: python scripts/merge_ether.py --checkpoint_dir \S+ --ether_path \S+$"
REFUSALS = {
    "oft": ("llama", dict(Htype="oft", nb=2), "rotates all of a weight.*" + MERGE),
    "published": ("llama", dict(**ETHER, block_layout="published"), r"published block layout .* n = 2; " + MERGE),
    "published, both sides": ("llama", dict(**{**PUBLISHED, **BLOCKS}), "published block layout"),
    "experts": ("mixtral", ETHER, "experts of a MixtralForCausalLM as plain parameters.*" + MERGE),
    "size": ("llama", dict(Htype="etherplusHH", nb=3, targets=("key",)), "rank 12 .*k_proj itself, 24 x 24; " + MERGE),
    "size of a lora": ("llama_tied_gqa", dict(r=8), r"rank 8 .*k_proj itself, 12 x 24; .*merge_lora.py .* --lora_path"),
}


@pytest.mark.parametrize("name", REFUSALS)
def test_what_is_no_lora_is_refused(name, tmp_path, bpe_dir, capsys):
    case, fields, message = REFUSALS[name]
    adapter = make_adapter(tmp_path, case, bpe_dir, **fields)
    assert re.search(message, failure(adapter, capsys))
    assert {path.name for path in tmp_path.iterdir()} == {"base", adapter.name}


def failure(adapter: Path, capsys, **options) -> str:
    """The one line with which the command line fails."""
    folder = adapter.parent
    options = {"checkpoint_dir": folder / "base", "out_dir": folder / "out", **path_option(adapter), **options}
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        main(export_lora.setup, [f"--{name}={value}" for name, value in options.items()])
    lines = capsys.readouterr().err.strip().splitlines()
    assert stop.value.code == 1 and len(lines) == 1 and lines[0].startswith("error: "), lines
    return lines[0]


def test_other_refusals(tmp_path, bpe_dir, capsys):
    adapter = make_adapter(tmp_path, "llama", bpe_dir, **BOTH)
    assert "is the checkpoint folder itself" in failure(adapter, capsys, out_dir=tmp_path / "base")
    assert "not both" in failure(adapter, capsys, lora_path=adapter)
    out = export_adapter(adapter)
    assert "--overwrite true" in failure(adapter, capsys)
    export_adapter(adapter, overwrite=True)
    with pytest.raises(ValueError, match="give an adapter file"):
        export_lora.setup(checkpoint_dir=tmp_path / "base", out_dir=tmp_path / "other")
    state = torch.load(adapter, weights_only=True)
    next(iter(state["model"].values())).zero_()
    torch.save(state, adapter)
    assert f"{adapter.name}: lm_head.ether_R holds a zero vector" in failure(
        adapter, capsys, out_dir=tmp_path / "other"
    )
    state["config"]["base"]["fingerprint"] = "another"
    torch.save(state, adapter)
    assert "belongs to another base model" in failure(adapter, capsys, out_dir=tmp_path / "other")
    assert {path.name for path in tmp_path.iterdir()} == {"base", adapter.name, out.name}


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_an_update_that_is_not_finite_is_refused(value, tmp_path, bpe_dir, capsys):
    """The largest of zero and NaN is zero: of a broken base came a LoRA of NaN, and nothing was said."""
    adapter, weights = make_adapter(tmp_path, "llama", bpe_dir, **BOTH), tmp_path / "base" / "lit_model.pth"
    base, state = load_state(weights), torch.load(adapter, weights_only=True)
    base["transformer.h.0.attn.attn.weight"][0] = value
    save_state(base, weights)
    state["config"]["base"]["fingerprint"] = fingerprint(base)
    torch.save(state, adapter)
    assert "NaN or infinity in the update" in failure(adapter, capsys)
    assert not (tmp_path / "out").exists()
