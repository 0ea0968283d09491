"""Our model computes what transformers computes on the same weights, through the real converter."""

import copy

import pytest
import torch
from helpers import TARGETS, relative
from hf_models import CASES, save

from lit_gpt.adapter import adapter_parameters, merge_adapter_weights
from lit_gpt.checkpoint import load_config, load_state
from lit_gpt.ether import METHODS, EtherConfig, add_ether, mark_only_ether_as_trainable
from lit_gpt.families import FAMILIES
from lit_gpt.generate import generate
from lit_gpt.lora import LoraConfig, add_lora
from lit_gpt.model import GPT
from scripts import convert_hf_checkpoint


@pytest.fixture(scope="module", params=CASES)
def pair(request, tmp_path_factory):
    """(transformers' model, ours) with the same weights."""
    folder = tmp_path_factory.mktemp(request.param)
    theirs = save(request.param, folder)
    convert_hf_checkpoint.setup(checkpoint_dir=folder)
    ours = GPT(load_config(folder))
    ours.load_state_dict(load_state(folder / "lit_model.pth"))
    return theirs, ours.eval()


def prompts(n: int, length: int) -> torch.Tensor:
    return torch.randint(160, (n, length), generator=torch.Generator().manual_seed(7))


def test_every_architecture_has_a_case():
    import transformers

    cased = {getattr(transformers, kind).model_type for kind, _ in CASES.values()}
    assert cased == {family.model_type for family in FAMILIES.values()}


@torch.inference_mode()
def test_logits_equal_those_of_transformers(pair):
    """Beyond every window, and beyond the context that a scaled rotary embedding was trained with."""
    theirs, ours = pair
    for length in (20, 40):
        idx = prompts(2, length)
        torch.testing.assert_close(ours(idx), theirs(idx).logits)


@torch.inference_mode()
def test_greedy_tokens_are_the_same_with_and_without_cache_and_in_transformers(pair):
    theirs, ours = pair
    rows, n = prompts(4, 11), 30
    cached = [list(generate(ours, row.tolist(), max_new_tokens=n)) for row in rows]
    whole = expected = rows
    for _ in range(n):
        whole = torch.cat([whole, ours(whole)[:, -1:].argmax(dim=-1)], dim=1)
    if ours.config.rope_stretch(99):  # transformers' cache keeps keys at the angles of a shorter text
        for _ in range(n):
            expected = torch.cat([expected, theirs(expected).logits[:, -1:].argmax(dim=-1)], dim=1)
    else:
        expected = theirs.generate(rows, max_new_tokens=n, do_sample=False, pad_token_id=0)
    assert whole.tolist() == expected.tolist()
    assert whole[:, 11:].tolist() == cached
    assert whole[:, 11:].unique().numel() > 3, "the model repeats itself: this test would see little"


@torch.inference_mode()
def test_cached_logits_equal_those_of_one_pass(pair):
    """In pieces of several tokens too, which need a mask of their own."""
    _, ours = pair
    idx = prompts(2, 24)
    whole = ours(idx)
    ours.set_kv_cache(2, 24)
    pieces = [ours(idx[:, a:b], input_pos=a) for a, b in ((0, 9), (9, 10), (10, 17), (17, 24))]
    ours.clear_kv_cache()
    torch.testing.assert_close(torch.cat(pieces, dim=1), whole)


@torch.inference_mode()
def test_packed_samples_have_the_logits_of_each_alone(pair):
    _, ours = pair
    lengths = [15, 3, 40, 20]  # some beyond windows, and beyond the context before scaling
    row = prompts(1, sum(lengths))
    packed = ours(row, lengths=lengths).split(lengths, dim=1)
    for sample, logits in zip(row.split(lengths, dim=1), packed, strict=True):
        torch.testing.assert_close(logits, ours(sample))


@torch.inference_mode()
@pytest.mark.parametrize("held", [0, 7])
def test_branches_of_a_tree_have_the_logits_of_each_path_alone(pair, held):
    """Trunks go on from what the cache holds, which stays; longer paths than windows, a trunk of nothing, of one."""
    _, ours = pair
    trees = [(8, [5, 1, 9]), (0, [4, 2]), (1, [3, 3]), (16, []), (1, [])]
    before, row = prompts(1, held), prompts(1, sum(trunk + sum(branches) for trunk, branches in trees))
    if held:
        ours.set_kv_cache(1, held)
        ours.hidden(before, input_pos=0)
    found = ours.logits(ours.hidden(row, input_pos=held or None, trees=trees))
    again = ours.logits(ours.hidden(row, input_pos=held or None, trees=trees))
    ours.clear_kv_cache()
    assert torch.equal(found, again)
    offset = 0
    for trunk, branches in trees:
        ids, logits, fork = row[:, offset:], found[:, offset:], trunk
        for length in branches or [0]:
            path = torch.cat([before, ids[:, :trunk], ids[:, fork : fork + length]], dim=1)
            alone = ours(path)[:, held:]
            own = torch.cat([logits[:, :trunk], logits[:, fork : fork + length]], dim=1)
            torch.testing.assert_close(own, alone, atol=1e-4, rtol=1e-4)  # another order of summation
            fork += length
        offset += trunk + sum(branches)


ONE_OF_EACH = [*{kind: case for case, (kind, _) in reversed(CASES.items())}.values()]


@pytest.mark.parametrize("pair", ONE_OF_EACH, indirect=True)
@pytest.mark.parametrize("method", [*METHODS, "lora"])
def test_every_method_trains_on_every_family_and_merges_to_its_own_logits(method, pair):
    ours = copy.deepcopy(pair[1])
    targets = dict.fromkeys(TARGETS, True)
    torch.manual_seed(0)
    if method == "lora":
        add_lora(ours, LoraConfig(r=2, **targets))
    else:
        add_ether(ours, EtherConfig(method, nb=2, **targets))
    mark_only_ether_as_trainable(ours)
    base = {name: p.detach().clone() for name, p in ours.named_parameters() if not p.requires_grad}
    own = adapter_parameters(ours)
    optimizer = torch.optim.AdamW(own.values(), lr=0.1)
    idx = prompts(2, 12)
    for _ in range(2):  # LoRA's A has a gradient from the second step on
        before = {name: p.detach().clone() for name, p in own.items()}
        optimizer.zero_grad()
        ours(idx, targets=idx).backward()
        optimizer.step()
    touched = {name for name, p in own.items() if not torch.equal(p, before[name])}
    assert touched == set(own)
    assert all(torch.equal(p, base[name]) for name, p in ours.named_parameters() if name in base)
    with torch.inference_mode():
        unmerged = ours(idx)
        assert relative(unmerged, pair[1](idx)) > 1e-3
        merge_adapter_weights(ours)
        assert relative(ours(idx), unmerged) < 1e-5


def test_loss_is_the_sum_over_targets(pair):
    theirs, ours = pair
    idx = prompts(2, 12)
    targets = idx.roll(-1, dims=1).clone()
    targets[:, -1] = targets[0, :5] = -100
    expected = torch.nn.functional.cross_entropy(theirs(idx).logits.flatten(0, 1), targets.flatten(), reduction="sum")
    torch.testing.assert_close(ours(idx, targets=targets), expected)
