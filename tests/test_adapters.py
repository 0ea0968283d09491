"""ETHER, ETHER+, OFT and LoRA: exact against the dense formula and the original code, and the laws each must keep.

Legend: d in, f out, n blocks, b block size.
"""

import json
from pathlib import Path

import pytest
import torch
from helpers import MODELS, SIZES, TARGETS, adapted_model, dense, relative
from safetensors.torch import load_file
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from lit_gpt import GPT, Config
from lit_gpt.adapter import (
    adapter_layers,
    adapter_parameters,
    adapter_state,
    adapters_off,
    mark_only_adapter_as_trainable,
)
from lit_gpt.adapter_files import (
    AdapterFile,
    attach_adapter,
    infer_ether_config,
    load_adapter,
    save_adapter,
    set_strength,
)
from lit_gpt.ether import (
    METHODS,
    EtherConfig,
    add_ether,
    ether_filter,
    mark_only_ether_as_trainable,
    merge_ether_weights,
)
from lit_gpt.lora import LoraConfig, add_lora, lora_filter, merge_lora_weights
from lit_gpt.model import QKVLinear
from lit_gpt.reflections import axis_angle, cayley, reflect, rotate, thin_factors, turn, unit

GOLDEN = Path(__file__).parent / "golden"
IDX = torch.arange(2 * 12).remainder(48).view(2, 12)


ALL = [*METHODS, "lora"]
IDENTITY_START = [name for name in ALL if name != "ether"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("method", IDENTITY_START)
def test_starts_as_the_base_bit_for_bit(method, model, dtype):
    torch.manual_seed(0)
    base = GPT(Config(**SIZES, **MODELS[model])).to(dtype).eval()
    gpt = adapted_model(model, method, dtype=dtype, started=True)
    with torch.no_grad():
        assert torch.equal(gpt(IDX), base(IDX))
        with adapters_off(gpt):
            assert torch.equal(gpt(IDX), base(IDX))


@pytest.mark.parametrize("method", ["etherplus", "etherplusHH", "oft"])
def test_starts_as_the_base_in_the_published_layout(method):
    gpt = adapted_model("gqa_tied", method, started=True, block_layout="published")
    with torch.no_grad(), adapters_off(gpt):
        base = gpt(IDX)
    with torch.no_grad():
        # OFT's row groups are multiplied one by one there, and their sums may take another order than the whole's.
        assert relative(gpt(IDX), base) < 1e-6 if method == "oft" else torch.equal(gpt(IDX), base)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_ether_plus_is_the_identity_bit_for_bit_at_its_start(dtype):
    x, u = torch.randn(5, 3, 7).to(dtype), torch.randn(3, 7)
    assert torch.equal(reflect(x, u, -u), x)


@pytest.mark.parametrize(("dtype", "digits"), [(torch.bfloat16, 2**-6), (torch.float16, 2**-8)])
@pytest.mark.parametrize("angle", [1.0, 1e-1, 1e-2, 1e-3])
def test_16_bits_cost_an_update_its_last_digits_however_small_it_is(dtype, digits, angle):
    """u and v in 16 bits would differ by their rounding, which at an angle of 0.001 is larger than the update itself.

    Projections and gradients likewise: relative to the same in fp64, for x and vectors that 16 bits hold exactly.
    """
    torch.manual_seed(0)
    x, g = (torch.randn(64, 4, 128).to(dtype).double() for _ in range(2))
    u = torch.nn.functional.normalize(torch.randn(4, 128).double(), dim=-1)
    v = -u + angle * torch.nn.functional.normalize(torch.randn(4, 128).double(), dim=-1)
    found = []
    for wide in (torch.float64, torch.float32):
        vectors = [vector.to(wide).requires_grad_() for vector in (u, v)]
        left, right = thin_factors(*vectors)
        inside = torch.float64 if wide == torch.float64 else dtype
        update = (x.to(inside).transpose(0, 1) @ right.to(inside).mT) @ left.to(inside)  # before it is added to x
        found.append([update.detach()])
        for options in ({}, dict(save_output=True, center=x[0].to(inside))):
            y = reflect(x.to(inside), *vectors, **options)
            found[-1] += torch.autograd.grad(y, vectors, g.to(inside))
    for rough, exact in zip(found[1], found[0], strict=True):
        assert relative(rough.double(), exact.double()) < digits


MERGING_ERROR = {torch.float64: 1e-12, torch.float32: 1e-5, torch.float16: 1e-2, torch.bfloat16: 0.1}
"""Largest relative difference of logits; in half precision the two round different numbers, in two random layers."""
LAW_CASES = [(target, torch.float64) for target in TARGETS] + [("all", dtype) for dtype in MERGING_ERROR]


@pytest.mark.parametrize(("target", "dtype"), LAW_CASES, ids=lambda value: str(value).removeprefix("torch."))
@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize(
    ("method", "layout"), [(m, layout) for m in METHODS for layout in ("diagonal", "published")] + [("lora", None)]
)
def test_laws(method, model, layout, target, dtype):
    """Off is the base; only the adapter trains, and all of it; saved is loaded; merged is unmerged; twice is once."""
    options = {} if layout is None else dict(block_layout=layout)
    options["targets"] = TARGETS if target == "all" else (target,)
    gpt = adapted_model(model, method, dtype=dtype, **options)
    torch.manual_seed(0)
    base = GPT(Config(**SIZES, **MODELS[model])).to(dtype).eval()
    mark_only_ether_as_trainable(gpt)
    gpt(IDX, targets=IDX).backward()
    with_gradient = {name for name, p in gpt.named_parameters() if p.grad is not None and p.grad.abs().sum() > 0}
    assert with_gradient == set(adapter_parameters(gpt))
    assert all(ether_filter(name) or lora_filter(name) for name in with_gradient)
    assert not any("mlp.gate" in name for name in with_gradient)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    assert {p.dtype for p in adapter_parameters(gpt).values()} == {wide}
    with torch.no_grad():
        unmerged = gpt(IDX)
        assert unmerged.dtype == dtype
        with adapters_off(gpt):
            assert torch.equal(gpt(IDX), base(IDX))
        assert relative(unmerged, base(IDX)) > 1e-4, "the adapter does nothing"
        reloaded = adapted_model(model, method, dtype=dtype, started=True, **options)
        reloaded.load_state_dict(gpt.state_dict())
        assert torch.equal(reloaded(IDX), unmerged)
        merge_ether_weights(gpt)
        assert relative(gpt(IDX), unmerged) < MERGING_ERROR[dtype]
        state = {name: tensor.clone() for name, tensor in gpt.state_dict().items()}
        merge_lora_weights(gpt)  # the same verb
    assert all(torch.equal(tensor, state[name]) for name, tensor in gpt.state_dict().items())
    assert {p.dtype for name, p in gpt.named_parameters() if name not in with_gradient} == {dtype}


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("nb", [1, 2, 4])
def test_equals_the_dense_block_diagonal_formula(method, nb):
    """W' = R_out W R_in with R = torch.block_diag(R_1 .. R_n), written out from the paper's equations."""
    gpt = adapted_model("gqa_tied", method, dtype=torch.float64, nb=nb)
    for name, layer in adapter_layers(gpt):
        for part in layer.parts:
            weight = layer.weight[part.rows]
            for side in layer.sides:
                vectors = layer.vectors(part, side)
                blocks = [dense(method, [vector[r] for vector in vectors]) for r in range(nb)]
                r = torch.block_diag(*blocks)
                weight = weight @ r if side == "input" else r @ weight
            merged = layer.merged_rows(part, layer.weight[part.rows])
            torch.testing.assert_close(merged, weight, rtol=1e-10, atol=1e-12, msg=f"{name}{part.suffix}")


@pytest.mark.parametrize("save_output", [False, True])
@pytest.mark.parametrize("dropped", [False, True])
@pytest.mark.parametrize("centred", [False, True])
def test_gradients_of_the_reflections_are_exact(save_output, dropped, centred):
    x = torch.randn(3, 2, 4, dtype=torch.float64, requires_grad=True)
    u, v = (torch.randn(2, 4, dtype=torch.float64, requires_grad=True) for _ in range(2))
    options = dict(save_output=save_output)
    options["block_mask"] = torch.tensor([[1.0], [0.0]], dtype=torch.float64) if dropped else None
    options["center"] = torch.randn(2, 4, dtype=torch.float64) if centred else None
    if centred:  # a bias that trains, beside the adapter
        center = options["center"].clone().requires_grad_()
        rest = {name: value for name, value in options.items() if name != "center"}
        assert torch.autograd.gradcheck(lambda x, c, u: reflect(x, u, center=c, **rest), (x, center, u))
    assert torch.autograd.gradcheck(lambda x, u: reflect(x, u, **options), (x, u))
    assert torch.autograd.gradcheck(lambda x, u, v: reflect(x, u, v, **options), (x, u, v))
    a = torch.randn(2, 4, 4, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x, a: rotate(x, cayley(a), center=options["center"]), (x, a))


class LargestStorage(TorchDispatchMode):
    """Notes how many elements the largest storage has that an operation makes."""

    largest = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        given = {t.untyped_storage().data_ptr() for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)}
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor) and tensor.untyped_storage().data_ptr() not in given:
                self.largest = max(self.largest, tensor.untyped_storage().nbytes() // tensor.element_size())
        return result


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("layout", ["diagonal", "published"])
@pytest.mark.parametrize("attention", [dict(n_query_groups=4), dict(n_query_groups=2), dict(qkv_bias=True)])
@pytest.mark.parametrize(
    ("method", "nb"), [(m, n) for m in METHODS for n in (1, 4) if n > 1 or not METHODS[m].matrices]
)
def test_nothing_of_a_weights_size_is_made(method, nb, attention, layout, dtype):
    """Neither forward nor backward; the sequence is shorter than every side of a weight."""
    sizes = dict(n_layer=1, n_head=4, n_embd=64, intermediate_size=80, vocab_size=96, block_size=32)
    gpt = GPT(Config(**sizes, **attention)).to(dtype)
    add_ether(gpt, EtherConfig(method, nb, **dict.fromkeys(TARGETS, True), block_layout=layout))
    mark_only_adapter_as_trainable(gpt)
    smallest = min(layer.in_features * part.size for _, layer in adapter_layers(gpt) for part in layer.parts)
    idx = torch.arange(16)[None]
    with LargestStorage() as seen:
        gpt(idx, targets=idx).backward()
    assert 0 < seen.largest < smallest


@pytest.mark.parametrize("layout", ["diagonal", "published"])
@pytest.mark.parametrize("method", METHODS)
def test_compiles_without_a_graph_break(method, layout):
    """With every target adapted."""
    torch.compiler.reset()  # each method compiles the same code anew
    gpt = adapted_model("gqa_tied", method, block_layout=layout)
    gpt.transformer.h = gpt.transformer.h[:1]  # a second block is traced like the first
    mark_only_ether_as_trainable(gpt)
    parameters = list(adapter_parameters(gpt).values())
    results = []
    # Tracing and the joint backward graph are what may break; a C++ or Triton compiler is not needed for that.
    for model in (gpt, torch.compile(gpt, fullgraph=True, backend="aot_eager")):
        loss = model(IDX).square().mean()
        results.append([loss.detach(), *torch.autograd.grad(loss, parameters)])
    for eager, compiled in zip(*results, strict=True):
        assert relative(compiled, eager) < 1e-5


@pytest.mark.parametrize("layout", ["diagonal", "published"])
@pytest.mark.parametrize("method", METHODS)
def test_gradients_equal_those_through_the_merged_weight(method, layout):
    """The activations' side and the weight's side are the same function of the adapter's parameters."""
    gpt = adapted_model("gqa_tied", method, dtype=torch.float64, block_layout=layout, targets=("query", "mlp"))
    layer = dict(adapter_layers(gpt))[
        "transformer.h.0.attn.attn" if METHODS[method].two_sided else "transformer.h.0.mlp.fc_1"
    ]
    x = torch.randn(5, layer.in_features, dtype=torch.float64)
    parameters = list(layer.own_parameters().values())
    weight = torch.cat(
        [layer.merged_rows(p, layer.weight[p.rows]) if p.adapted else layer.weight[p.rows] for p in layer.parts]
    )
    y = layer(x)
    y = torch.cat(y, dim=-1) if isinstance(y, tuple) else y
    ours = torch.autograd.grad(y.square().sum(), parameters)
    theirs = torch.autograd.grad((x @ weight.T).square().sum(), parameters)
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-11)


def test_ether_and_oft_are_orthogonal_and_ether_plus_is_bounded():
    x = torch.eye(6, dtype=torch.float64).unsqueeze(1)  # each row a unit vector: the result is R's columns
    u, v, a = torch.randn(1, 6).double(), torch.randn(1, 6).double(), torch.randn(1, 6, 6).double()
    for y in (reflect(x, u).squeeze(1), rotate(x, cayley(a)).squeeze(1)):
        torch.testing.assert_close(y @ y.T, torch.eye(6, dtype=torch.float64))
    gap = (reflect(x, u, v).squeeze(1) - torch.eye(6)).norm()
    cosine = (unit(u) * unit(v)).sum()
    torch.testing.assert_close(gap, (2 * (1 - cosine**2)).sqrt())
    torch.testing.assert_close(reflect(reflect(x, u), u), x)


def test_start_of_u_is_drawn_as_the_original_draws_it():
    gpt = adapted_model("mha_bias", "ether", started=True)
    for name, layer in adapter_layers(gpt):
        for own, parameter in layer.own_parameters().items():
            fused = isinstance(layer, QKVLinear)
            bound = (parameter.size(-1) * (parameter.size(-2) if fused else 1)) ** -0.5
            assert parameter.abs().max() <= bound, f"{name}.{own}"
            assert parameter.abs().max() > 0.8 * bound, f"{name}.{own}"


def test_head_adapter_leaves_a_tied_embedding_alone():
    gpt = adapted_model("gqa_tied", "etherplusHH", targets=("head",))
    embedding = gpt.transformer.wte.weight.clone()
    assert gpt.lm_head.weight is gpt.transformer.wte.weight
    merge_ether_weights(gpt)
    assert torch.equal(gpt.transformer.wte.weight, embedding)
    assert not torch.equal(gpt.lm_head.weight, embedding)
    assert not gpt.config.tie_embeddings


def test_works_on_the_meta_device_under_unchanged_base_keys():
    with torch.device("meta"):
        gpt = GPT(Config.from_name("Llama-2-7b-hf"))
        base = set(gpt.state_dict())
        add_ether(gpt, EtherConfig(Htype="etherplusHH", nb=32))
    mark_only_adapter_as_trainable(gpt)
    assert set(gpt.state_dict()) - set(adapter_parameters(gpt)) == base
    assert sum(p.numel() for p in gpt.parameters() if p.requires_grad) == 1_048_576


@pytest.mark.parametrize(
    ("config", "count"),
    [(EtherConfig("ether", nb=32), 262_144), (EtherConfig("oft", nb=256), 4_194_304), (LoraConfig(r=8), 4_194_304)],
)
def test_parameter_counts_of_llama_2_7b(config, count):
    with torch.device("meta"):
        gpt = GPT(Config.from_name("Llama-2-7b-hf"))
        (add_lora if isinstance(config, LoraConfig) else add_ether)(gpt, config)
    assert sum(p.numel() for p in adapter_parameters(gpt).values()) == count


@pytest.mark.parametrize("block_dropout", [0.0, 0.5])
def test_dropout_acts_in_training_alone(block_dropout):
    gpt = adapted_model("gqa_tied", "etherplusHH", dropout=0.5 - block_dropout, block_dropout=block_dropout)
    with torch.no_grad():
        evaluated = gpt(IDX)
        assert torch.equal(gpt(IDX), evaluated)
        assert not torch.equal(gpt.train()(IDX), evaluated)


def test_an_adapter_file_carries_itself(tmp_path):
    config = EtherConfig("etherplusHH", nb=2, query=False, key=True, value=False, mlp=True)
    gpt = adapted_model("gqa_tied", "etherplusHH", targets=("key", "mlp"))
    save_adapter(
        tmp_path / "a.pth",
        gpt,
        kind="ether",
        config=config,
        base=dict(name="x", fingerprint="y"),
        prompt_style="alpaca",
    )
    adapter = load_adapter(tmp_path / "a.pth", "ether")
    assert (adapter.config, adapter.prompt_style) == (config, "alpaca")
    torch.manual_seed(0)
    other = GPT(Config(**SIZES, **MODELS["gqa_tied"])).eval()
    attach_adapter(other, adapter)
    assert torch.equal(other(IDX), gpt(IDX))
    with pytest.raises(ValueError, match="holds an ETHER adapter; a LoRA one was expected"):
        load_adapter(tmp_path / "a.pth", "lora")
    (tmp_path / "a.pth").write_bytes((tmp_path / "a.pth").read_bytes()[:700])
    with pytest.raises(ValueError, match=r"a\.pth is corrupt, cut short"):
        load_adapter(tmp_path / "a.pth", "ether")


DIALS = [(method, layout) for method in METHODS if method != "ether" for layout in ("diagonal", "published")]


def at_strength(method: str, layout: str | None, strength: float, *, dtype=torch.float32) -> tuple[GPT, GPT]:
    """Return an adapter's model, its parameters moved a little from their start, and the same at a strength."""
    options = {} if layout is None else dict(block_layout=layout)
    gpt = adapted_model("gqa_tied", method, dtype=dtype, started=True, **options)
    with torch.no_grad():
        for parameter in adapter_parameters(gpt).values():
            parameter += 0.1 * torch.randn_like(parameter)
    config = next(layer.adapter_config for _, layer in adapter_layers(gpt))
    adapter = AdapterFile(Path("a.pth"), config.kind, config, adapter_state(gpt), {}, None)
    torch.manual_seed(0)
    other = GPT(Config(**SIZES, **MODELS["gqa_tied"])).to(dtype).eval()
    attach_adapter(other, set_strength(adapter, strength))
    return gpt, other


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("method", "layout"), [*DIALS, ("lora", None)])
@torch.no_grad()
def test_strength_0_is_the_base_and_1_the_adapter_bit_for_bit(method, layout, dtype):
    torch.manual_seed(0)
    base = GPT(Config(**SIZES, **MODELS["gqa_tied"])).to(dtype).eval()
    gpt, none = at_strength(method, layout, 0.0, dtype=dtype)
    if (method, layout) == ("oft", "published"):  # its row groups are multiplied one by one: sums in another order
        base = adapted_model("gqa_tied", method, dtype=dtype, started=True, block_layout=layout)
    assert not torch.equal(gpt(IDX), base(IDX))
    assert torch.equal(none(IDX), base(IDX))
    assert torch.equal(at_strength(method, layout, 1.0, dtype=dtype)[1](IDX), gpt(IDX))


@pytest.mark.parametrize(("method", "layout"), [*DIALS, ("lora", None)])
@torch.no_grad()
def test_weights_move_on_with_the_strength_and_merge_to_the_same_logits(method, layout):
    moved = []
    for strength in (0.0, 0.25, 0.5, 1.0, 1.5):
        _, gpt = at_strength(method, layout, strength)
        unmerged, before = gpt(IDX), {name: layer.weight.clone() for name, layer in adapter_layers(gpt)}
        merge_ether_weights(gpt)
        assert relative(gpt(IDX), unmerged) < 1e-5
        moved.append([(layer.weight - before[name]).norm().item() for name, layer in adapter_layers(gpt)])
    for of_layer in zip(*moved, strict=True):
        assert of_layer[0] == 0 and list(of_layer) == sorted(set(of_layer))


def test_v_turns_in_its_plane_with_u_by_the_share_of_their_angle():
    torch.manual_seed(0)
    u, v = torch.randn(2, 3, 8, dtype=torch.float64), torch.randn(2, 3, 8, dtype=torch.float64)
    full = torch.atan2(torch.sin(axis_angle(u, v)), -(unit(u) * unit(v)).sum(-1))  # of v to -u, up to pi
    for strength in (-0.5, 0.3, 0.5, 1.2):
        turned = unit(turn(u, v, strength))
        assert torch.allclose((turned * -unit(u)).sum(-1), torch.cos(strength * full))
        planes = torch.stack([unit(u), unit(v), turned], dim=-2)
        assert torch.linalg.matrix_rank(planes, tol=1e-9).eq(2).all()
    assert torch.allclose(unit(turn(u, v, 1.0)), unit(v))
    assert torch.equal(turn(u, v, 0.0), -u)
    for along in (u, -u, 3 * u):  # R is the identity: at every strength
        x = torch.randn(5, 3, 8, dtype=torch.float64)
        assert torch.equal(reflect(x, u[0], turn(u, along, 0.5)[0]), x)
    for damage, kept in ((0.0, torch.zeros(8)), (torch.nan, torch.full((8,), torch.nan))):  # is found when it is put on
        v[0, 0] = damage
        assert torch.equal(turn(u, v, 0.5)[0, 0].isnan(), kept.isnan()) and not turn(u, v, 0.5)[0, 0].nansum()


@pytest.mark.parametrize("strength", [0.0, 0.5])
def test_strength_is_refused_where_it_means_nothing(strength):
    config = EtherConfig("ether", nb=2)
    adapter = AdapterFile(Path("a.pth"), "ether", config, adapter_state(adapted_model("gqa_tied", "ether")), {}, None)
    with pytest.raises(ValueError, match="plain ETHER cannot be scaled towards the base; ETHER"):
        set_strength(adapter, strength)
    assert set_strength(adapter, 1.0) is adapter
    for number in (float("nan"), float("inf")):
        with pytest.raises(ValueError, match="expected a number; 0 is the base model"):
            set_strength(adapter, number)


CASES = sorted(path.parent for path in GOLDEN.glob("*/*/hparams.json"))


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_reads_the_original_codes_files_and_reproduces_its_logits(case):
    made = json.loads((case / "hparams.json").read_text())
    adapter = load_adapter(case / "lit_model_ether_finetuned.pth", "ether")
    flags = (adapter.config.Htype, adapter.config.nb, adapter.config.flip_side, adapter.config.block_layout)
    assert flags == (made["Htype"], made["ether_nb"], made["flip_side"], "published")
    gpt = GPT(Config.from_json(case.parent / "lit_config.json")).eval()
    gpt.load_state_dict(torch.load(case.parent / "lit_model.pth", weights_only=True))
    attach_adapter(gpt, adapter)
    expected = load_file(case / "logits.safetensors")
    with torch.no_grad():
        assert relative(gpt(expected["input_ids"]), expected["logits"]) < 1e-5
        merge_ether_weights(gpt)
        assert relative(gpt(expected["input_ids"]), expected["merged_logits"]) < 1e-5


@pytest.mark.parametrize("model", ["mha_bias", "gqa_tied"])
@pytest.mark.parametrize("method", ["ether", "etherplus", "etherplusHH", "oft"])  # those of the original code
@pytest.mark.parametrize("targets", [TARGETS, ("head",), ("head", "query"), ("query",), ("projection", "mlp")])
def test_what_an_original_file_is_follows_from_any_of_its_tensors(model, method, targets):
    """With the head's tensor first, which has one dimension less than q's, OFT was read as ETHER."""
    state = adapter_state(adapted_model(model, method, targets=targets))
    for names in (sorted(state), sorted(state, reverse=True)):
        found = infer_ether_config({name: state[name] for name in names})
        assert (found.Htype, found.nb) == (method, 2)
        assert {target for target in TARGETS if getattr(found, target)} == {*targets}


def test_refusals_say_what_to_do():
    with pytest.raises(ValueError, match="choices: ether, etherplus, etherplusHH, oft"):
        EtherConfig(Htype="etherplusH")
    with pytest.raises(
        ValueError, match=r"5 blocks do not divide .* of size .*; legal for all chosen targets: 1, 2, 4, 8"
    ):
        adapted_model("mha_bias", "ether", nb=5)
    with pytest.raises(ValueError, match="no adapter target is enabled"):
        adapted_model("mha_bias", "ether", targets=())
    with pytest.raises(ValueError, match="already has an adapter"):
        add_lora(adapted_model("mha_bias", "ether"), LoraConfig())
    gpt = adapted_model("mha_bias", "ether")
    next(iter(adapter_parameters(gpt).values())).data.zero_()
    with pytest.raises(ValueError, match="zero vector"):
        merge_ether_weights(gpt)
