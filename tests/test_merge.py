"""Merging through the scripts' own setup: bit for bit what the whole model in memory gives, bounded, and safe."""

import copy
import json
import os
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import torch
from helpers import file_size_limit, refusal, script, tiny_model, write_base
from torch import nn

from lit_gpt import GPT, Config
from lit_gpt.adapter import adapter_parameters, merge_adapter_weights
from lit_gpt.adapter_files import KINDS, attach_adapter, load_adapted_model, load_adapter, save_adapter, set_strength
from lit_gpt.checkpoint import fingerprint, load_config, load_model, load_state, save_state, stream_state
from lit_gpt.cli import main
from lit_gpt.data import load_split, prepare
from lit_gpt.devices import PRECISIONS
from lit_gpt.ether import METHODS, EtherConfig
from lit_gpt.files import write_json
from lit_gpt.lora import LoraConfig
from lit_gpt.merge import PROBE, compare_logits
from lit_gpt.tokenizer import Tokenizer

TARGETS = ("query", "key", "value", "projection", "mlp", "head")
ALL = dict.fromkeys(TARGETS, True)
WIDTHS = dict(n_embd=24, intermediate_size=40)
MODELS = {
    "mha_bias": dict(
        norm_class="LayerNorm", mlp_class="GptNeoxMLP", qkv_bias=True, proj_bias=True, mlp_bias=True, lm_head_bias=True,
        n_query_groups=4, tie_embeddings=False, **WIDTHS,
    ),
    "gqa_tied": dict(**WIDTHS),
    "mqa_odd_head": dict(n_query_groups=1, head_size=8, **WIDTHS),
    "moe": dict(mlp_class="LLaMAMoE", n_expert=3, n_expert_per_token=2, tie_embeddings=False, **WIDTHS),
}  # fmt: skip
CASES = {f"{method}-{layout}": EtherConfig(method, nb=2, block_layout=layout, **ALL)
         for method in METHODS for layout in ("diagonal", "published")}  # fmt: skip
CASES |= {
    "flipped": EtherConfig("etherplus", nb=2, flip_side=True, **ALL),
    "query": EtherConfig("ether", nb=2, value=False),
    "lora": LoraConfig(r=3, **ALL),
}


def write_adapter(path: Path, base: Path, config, *, fill: float | None = None, style: str | None = "alpaca") -> str:
    """An adapter file of random values (or of one) for a base; returns its kind."""
    kind = "lora" if isinstance(config, LoraConfig) else "ether"
    with torch.device("meta"):
        model = GPT(load_config(base))
        KINDS[kind].add(model, config)
    torch.manual_seed(1)
    for name, parameter in adapter_parameters(model).items():
        layer, _, own = name.rpartition(".")
        tensor = torch.randn(parameter.shape) * (0.1 if kind == "lora" else 1)
        setattr(
            model.get_submodule(layer), own, nn.Parameter(tensor if fill is None else torch.full_like(tensor, fill))
        )
    facts = {"name": base.name, "fingerprint": fingerprint(load_state(base / "lit_model.pth"))}
    save_adapter(path, model, kind=kind, config=config, base=facts, prompt_style=style)
    return kind


def flags(base: Path, path: Path, kind: str, *more: str) -> tuple[str, list[str]]:
    """The script of a kind and its command line."""
    return f"scripts/merge_{kind}.py", ["--checkpoint_dir", str(base), f"--{kind}_path", str(path), *more]


def merge(base: Path, path: Path, kind: str, *more: str) -> Path:
    """Merge through the script; returns the folder."""
    name, arguments = flags(base, path, kind, *more)
    main(script(name), [*arguments, "--overwrite", "true"])
    return path.parent / "merged"


def merged_in_memory(base: Path, path: Path, kind: str, precision: str) -> tuple[dict[str, torch.Tensor], dict]:
    """Merge the whole model in fp32 and cast it; return the weights and the model's config."""
    model = load_model(base)
    attach_adapter(model, load_adapter(path, kind))
    merge_adapter_weights(model)
    own = adapter_parameters(model)
    model.to(PRECISIONS[precision])
    return {name: t for name, t in model.state_dict().items() if name not in own}, model.config.to_dict()


def storages(state: dict[str, torch.Tensor]) -> int:
    """Count the storages that hold the tensors."""
    return len({tensor.untyped_storage().data_ptr() for tensor in state.values()})


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("case", CASES)
def test_merged_weights_are_those_of_a_merge_in_memory_bit_for_bit(bpe_dir, tmp_path, case, model):
    base, path = write_base(tmp_path / "base", bpe_dir, **MODELS[model]), tmp_path / "adapter.pth"
    for stored, precision in (("32-true", "32-true"), ("32-true", "16-true"), ("bf16-true", "bf16-true")):
        state = {name: tensor.to(PRECISIONS[stored]) for name, tensor in load_state(base / "lit_model.pth").items()}
        save_state(state, base / "lit_model.pth")
        kind = write_adapter(path, base, CASES[case])
        folder = merge(base, path, kind, "--precision", precision)
        expected, config = merged_in_memory(base, path, kind, precision)
        found = load_state(folder / "lit_model.pth")
        assert list(found) == list(expected)
        for name, tensor in found.items():
            assert tensor.dtype == expected[name].dtype and torch.equal(tensor, expected[name]), name
        assert json.loads((folder / "lit_config.json").read_text()) == config
    assert {p.name for p in folder.iterdir()} == {p.name for p in base.iterdir()} | {"prompt_style.json"}


@pytest.mark.parametrize(("head", "tied"), [(False, True), (True, False)], ids=["tied", "head adapted"])
def test_the_file_is_like_one_of_torch_save(bpe_dir, tmp_path, head, tied):
    """Also for readers that check a zip archive's checksums, and tied weights are stored once."""
    base, path = write_base(tmp_path / "base", bpe_dir), tmp_path / "adapter.pth"
    kind = write_adapter(path, base, EtherConfig("etherplusHH", nb=2, head=head), style=None)
    file = merge(base, path, kind) / "lit_model.pth"
    assert not (file.parent / "prompt_style.json").exists()
    state = torch.load(file, weights_only=True)
    assert all(torch.equal(tensor, state[name]) for name, tensor in load_state(file).items())
    assert storages(state) == storages(load_state(file)) == len(state) - tied
    assert torch.equal(state["lm_head.weight"], state["transformer.wte.weight"]) == tied
    assert json.loads((file.parent / "lit_config.json").read_text())["tie_embeddings"] == tied
    save_state(state, tmp_path / "whole.pth")
    with zipfile.ZipFile(file) as ours, zipfile.ZipFile(tmp_path / "whole.pth") as theirs:
        assert ours.testzip() is None
        sizes = [
            [(i.filename.split("/", 1)[1], i.CRC) for i in z.infolist() if "/data/" in i.filename]
            for z in (ours, theirs)
        ]
        assert sizes[0] == sizes[1]
    assert os.stat(file).st_mode == os.stat(base / "lit_config.json").st_mode


def test_a_streamed_file_holds_what_it_was_given(tmp_path):
    tensors = {"a": torch.randn(3, 5), "none": torch.empty(0, 2), "one": torch.tensor(2.0), "t": torch.randn(4, 3).T}
    template = {name: torch.empty_like(tensor, device="meta") for name, tensor in tensors.items()}
    asked = []
    stream_state(template | {"again": template["a"]}, lambda n: asked.append(n) or tensors[n], tmp_path / "s.pth")
    state = torch.load(tmp_path / "s.pth", weights_only=True)
    assert asked == list(tensors)
    assert list(state) == [*tensors, "again"]
    assert all(torch.equal(state[name], tensor) for name, tensor in (tensors | {"again": tensors["a"]}).items())
    assert zipfile.ZipFile(tmp_path / "s.pth").testzip() is None


def test_a_merge_says_how_far_the_weights_moved(bpe_dir, tmp_path, capsys):
    base, path = write_base(tmp_path / "base", bpe_dir), tmp_path / "adapter.pth"
    merge(base, path, write_adapter(path, base, EtherConfig("etherplus", nb=2, query=False, value=False, mlp=True)))
    low, high, middle, rounding = map(float, re.findall(r"\d\.\de[+-]\d\d", capsys.readouterr().out))
    exact, _ = merged_in_memory(base, path, "ether", "32-true")
    cast, _ = merged_in_memory(base, path, "ether", "bf16-true")
    before = load_state(base / "lit_model.pth")
    mlp = [name for name in before if ".mlp." in name]
    moved = sorted(((exact[name] - before[name]).norm() / before[name].norm()).item() for name in mlp)
    assert (low, high) == pytest.approx((moved[0], moved[-1]), rel=0.06)
    assert middle == pytest.approx((moved[2] + moved[3]) / 2, rel=0.06)
    lost = sorted(((cast[name].float() - exact[name]).norm() / before[name].norm()).item() for name in mlp)
    assert rounding == pytest.approx((lost[2] + lost[3]) / 2, rel=0.06)


# ------------------------------------------------------------------------------------------------- verification
def expected_gaps(base: Path, path: Path, kind: str, rows: list[torch.Tensor]) -> tuple[float, float, float]:
    """The logits' largest difference, the relative one and the KL, from both models whole in memory."""
    unmerged = load_adapted_model(base, adapter=load_adapter(path, kind))
    merged = load_model(path.parent / "merged")
    gap = scale = divergence = 0.0
    with torch.no_grad():
        for row in rows:
            p, q = unmerged(row[None]).double(), merged(row[None]).double()
            gap, scale = max(gap, (p - q).abs().max().item()), max(scale, p.abs().max().item())
            divergence += torch.nn.functional.kl_div(
                q.log_softmax(-1), p.log_softmax(-1), log_target=True, reduction="sum"
            ).item()
    return gap, gap / scale, divergence / sum(map(len, rows))


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("case", ["etherplusHH-published", "oft-diagonal", "lora"])
def test_verification_reports_the_gap_of_whole_models(bpe_dir, tmp_path, capsys, case, model):
    base, path = write_base(tmp_path / "base", bpe_dir, **MODELS[model]), tmp_path / "adapter.pth"
    rows = [{"instruction": f"name colour {i}", "input": "", "output": "the river " * (1 + i % 4)} for i in range(40)]
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    prepare(tmp_path / "rows.json", destination_path=tmp_path / "data", checkpoint_dir=base, test_split_fraction=0.2)
    kind = write_adapter(path, base, CASES[case])
    held_out = [sample["input_ids"].long() for sample in load_split(tmp_path / "data" / "test.pt")[:4]]
    sentence = [torch.tensor(Tokenizer(base).encode(PROBE))]
    settings = {"io": {"train_data_dir": str(tmp_path / "data"), "val_data_dir": None}}
    for said, ids in (("a sentence", sentence), (f"4 rows of {tmp_path / 'data' / 'test.pt'}", held_out)):
        merge(base, path, kind, "--verify", "true")
        line = re.search(rf"verified on {said}.*", capsys.readouterr().out).group()
        found = [float(number) for number in re.findall(r"\d\.\de[+-]\d\d", line)]
        assert found == pytest.approx(expected_gaps(base, path, kind, ids), rel=0.06)
        write_json(tmp_path / "hparams.yaml", settings)
    merge(base, path, kind, "--verify", "true", "--precision", "32-true")
    found = re.findall(r"\d\.\de[+-]\d\d", capsys.readouterr().out.split("verified on")[1])
    assert float(found[1]) < 1e-5 and abs(float(found[2])) < 1e-9
    shutil.rmtree(tmp_path / "data")
    merge(base, path, kind, "--verify", "true")
    assert "verified on a sentence" in capsys.readouterr().out


# ------------------------------------------------------------------------------------------------- faults
def edit_base(base: Path, **tensors: torch.Tensor | None) -> None:
    """Replace tensors of a base by dotted name (with __ for a dot), or drop them."""
    state = dict(load_state(base / "lit_model.pth"))
    for name, tensor in tensors.items():
        state.pop(name.replace("__", "."))
        if tensor is not None:
            state[name.replace("__", ".")] = tensor
    save_state({name: tensor.clone() for name, tensor in state.items()}, base / "lit_model.pth")


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def large_key(base: Path) -> None:
    """Make a row of the first head's key, which no adapter of q and v changes, too large for fp16."""
    weight = load_state(base / "lit_model.pth")[QKV.replace("__", ".")].clone()
    config = Config.from_json(base / "lit_config.json")
    weight[config.q_size // config.n_query_groups] = 1e6  # in files a group's rows of q come first, then its k
    edit_base(base, **{QKV: weight})


NORM, FC = "transformer__h__1__norm_1__weight", "transformer__h__1__mlp__fc_1__weight"
QKV = "transformer__h__1__attn__attn__weight"
FAULTS = {  # before the adapter is written; what it is filled with; after; what the line says
    "zero vector": (None, 0.0, None, r"transformer.h.0.attn.attn.ether_Rq holds a zero vector, which has no direction"),
    "NaN": (None, float("nan"), None, r"adapter.pth: transformer.h.0.attn.attn.ether_Rq is not finite"),
    "infinity": (None, float("inf"), None, r"is not finite; the run that wrote it diverged"),
    "NaN in the base": (lambda b: edit_base(b, **{FC: torch.full((48, 32), torch.nan)}), None, None,
                        r"transformer.h.1.mlp.fc_1.weight of the base model holds NaN or infinity"),
    "too large": (lambda b: edit_base(b, **{FC: torch.full((48, 32), 1e6)}), None, None,
                  r"transformer.h.1.mlp.fc_1.weight has values too large for --precision 16-true"),
    "too large, not adapted": (lambda b: large_key(b), None, None,
                               r"attn.attn.weight has values too large for torch.float16; --precision bf16"),
    "no object": (None, None, lambda b: (b / "lit_config.json").write_text("[]"),
                  r"lit_config.json does not hold what it should"),
    "truncated base": (None, None, lambda b: cut(b / "lit_model.pth"), r"lit_model.pth is corrupt, cut short"),
    "truncated adapter": (None, None, lambda b: cut(b.parent / "adapter.pth"), r"adapter.pth is corrupt, cut short"),
    "another base": (None, None, lambda b: edit_base(b, **{NORM: torch.ones(32) * 2}), "belongs to another base model"),
    "tensor missing": (None, None, lambda b: edit_base(b, **{NORM: None}), r"belongs to another base model"),
    "config of another": (None, None, lambda b: write_json(b / "lit_config.json", Config(n_embd=64).to_dict()),
                          r"lit_model.pth does not hold the weights that lit_config.json describes"),
    "no base": (None, None, shutil.rmtree, r"base is not a folder"),
}  # fmt: skip


def left(folder: Path) -> set[str]:
    """Return the names in a folder, hidden ones too."""
    return {path.name for path in folder.iterdir()} - {"base", "adapter.pth"}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_ends_in_one_line_and_leaves_nothing(bpe_dir, tmp_path, capsys, fault):
    before, fill, after, message = FAULTS[fault]
    base, path = write_base(tmp_path / "base", bpe_dir), tmp_path / "adapter.pth"
    if before:
        before(base)
    kind = write_adapter(path, base, EtherConfig("ether", nb=2), fill=fill)
    if after:
        after(base)
    assert re.search(message, refusal(capsys, *flags(base, path, kind, "--precision", "16-true")))
    assert not left(tmp_path)


@pytest.mark.parametrize("case", ["etherplusHH-published", "oft-diagonal", "lora"])
def test_a_strength_merges_a_share_of_the_adapter_and_0_nothing(bpe_dir, tmp_path, case):
    base, path = write_base(tmp_path / "base", bpe_dir), tmp_path / "adapter.pth"
    kind = write_adapter(path, base, CASES[case])
    idx = torch.arange(40).view(2, 20)
    half = set_strength(load_adapter(path, kind), 0.5)
    with torch.no_grad():
        expected, whole = (load_adapted_model(base, adapter=a)(idx) for a in (half, load_adapter(path, kind)))
        merged = load_model(merge(base, path, kind, "--strength", "0.5", "--precision", "32-true"))(idx)
        assert (merged - expected).abs().max() / expected.abs().max() < 1e-5 < (merged - whole).abs().max()
    none = load_state(merge(base, path, kind, "--strength", "0", "--precision", "32-true") / "lit_model.pth")
    assert all(torch.equal(tensor, none[name]) for name, tensor in load_state(base / "lit_model.pth").items())


def test_flags_that_cannot_work_are_refused(bpe_dir, tmp_path, capsys):
    base, path = write_base(tmp_path / "base", bpe_dir), tmp_path / "adapter.pth"
    kind = write_adapter(path, base, LoraConfig(r=2))
    for more, message in ((["--precision", "8"], "choices: 32-true, bf16-true, 16-true"),):
        assert message in refusal(capsys, *flags(base, path, kind, *more))
    kind = write_adapter(path, base, CASES["ether-diagonal"])
    assert "cannot be scaled towards the base" in refusal(capsys, *flags(base, path, kind, "--strength", "0.5"))
    assert not left(tmp_path)


@pytest.mark.parametrize("room", [20_000, 60_000])
def test_files_that_may_not_grow_end_in_one_line(bpe_dir, tmp_path, capsys, room):
    base, path = write_base(tmp_path / "base", bpe_dir), tmp_path / "adapter.pth"
    kind = write_adapter(path, base, LoraConfig(r=2))
    with file_size_limit(room):
        line = refusal(capsys, *flags(base, path, kind))
    assert re.search(r"(File too large|writing failed).*/", line)
    assert not left(tmp_path)


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() != 0, reason="mounting a small disk takes root")
def test_a_disk_without_room_is_refused_with_what_is_needed(bpe_dir, tmp_path, capsys):
    base, path = write_base(tmp_path / "base", bpe_dir, n_layer=6), tmp_path / "adapter.pth"
    kind = write_adapter(path, base, LoraConfig(r=2))
    disk = tmp_path / "disk"
    disk.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "none", str(disk)], capture_output=True).returncode:
        pytest.skip("mounting is not allowed here")
    try:
        line = refusal(capsys, *flags(base, path, kind, "--out_dir", str(disk / "merged")))
        assert not list(disk.iterdir())
    finally:
        subprocess.run(["umount", str(disk)], check=True)
    assert re.search(r"GB free, .* GB are needed; make room", line)


def test_torchs_old_format_is_read_whole(bpe_dir, tmp_path):
    base, path = write_base(tmp_path / "base", bpe_dir), tmp_path / "adapter.pth"
    kind = write_adapter(path, base, EtherConfig("oft", nb=2))
    expected = load_state(merge(base, path, kind) / "lit_model.pth")
    state = {name: tensor.clone() for name, tensor in load_state(base / "lit_model.pth").items()}
    torch.save(state, base / "lit_model.pth", _use_new_zipfile_serialization=False)
    found = load_state(merge(base, path, kind) / "lit_model.pth")
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())


# ------------------------------------------------------------------------------------------------- memory
PEAK = """
import sys, threading, time
sys.path.insert(0, sys.argv[1])
from pathlib import Path
from lit_gpt.merge import merge_adapter

def anonymous():
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("RssAnon")) / 1e3

start = peak = anonymous()
done = threading.Event()
def watch():
    global peak
    while not done.wait(0.002):
        peak = max(peak, anonymous())
watcher = threading.Thread(target=watch)
watcher.start()
merge_adapter(sys.argv[2], sys.argv[3], checkpoint_dir=Path(sys.argv[4]), verify=True)
done.set()
watcher.join()
print("grew by", peak - start, "MB")
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads Linux's /proc")
@pytest.mark.parametrize("config", [EtherConfig("etherplusHH", nb=4), LoraConfig()], ids=["ether", "lora"])
def test_memory_does_not_grow_with_the_model(bpe_dir, tmp_path, config):
    """140 MB of bf16 weights, in fp32 280; the largest Linear has 2.8 MB."""
    base, path = write_base(tmp_path / "base", bpe_dir, n_layer=1), tmp_path / "adapter.pth"
    sizes = dict(n_layer=23, n_head=8, n_query_groups=4, n_embd=512, intermediate_size=1408, vocab_size=400)
    shape = Config(block_size=128, tie_embeddings=True, **sizes)
    write_json(base / "lit_config.json", shape.to_dict())
    with torch.device("meta"):
        template = {n: torch.empty_like(t, dtype=torch.bfloat16) for n, t in GPT(shape).state_dict().items()}
    template["lm_head.weight"] = template["transformer.wte.weight"]
    noise = (torch.randn(1_000_000) * 0.02).bfloat16()
    stream_state(template, lambda n: noise[: template[n].numel()].view(template[n].shape), base / "lit_model.pth")
    assert (base / "lit_model.pth").stat().st_size > 130e6
    kind = write_adapter(path, base, config)
    done = subprocess.run(
        [sys.executable, "-c", PEAK, str(Path(__file__).resolve().parents[1]), kind, str(path), str(base)],
        capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert float(re.search(r"grew by (\S+) MB", done.stdout).group(1)) < 100


def test_logits_that_are_not_finite_are_no_difference_of_zero():
    """The largest of zero and NaN is zero: a broken model would be reported as exact."""
    model, rows = tiny_model().eval(), [torch.arange(5)]
    broken = copy.deepcopy(model)
    broken.transformer.h[0].mlp.proj.weight.data[0, 0] = torch.inf
    assert compare_logits(model, model, rows)[0] == 0
    with pytest.raises(ValueError, match="not finite"):
        compare_logits(model, broken, rows)
