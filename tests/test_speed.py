"""Cheaper training gives the same result: packing, the chunked loss, checkpointing, compiling, sharding."""

import os
import time
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from helpers import (
    ARCHITECTURES,
    PACKED,
    PADDED,
    assert_same_step,
    etherplus_model,
    losses_of,
    refusal,
    samples_of,
    step,
    train,
    two_processes,
    write_base,
)
from torch import nn

from lit_gpt import loss as loss_module
from lit_gpt.batches import EMPTY_MICRO_BATCH, Batching, n_targets, packs, round_up
from lit_gpt.data import length
from lit_gpt.loss import chunked_cross_entropy
from lit_gpt.train import compile_blocks


# ------------------------------------------------------------------------------------------------------- packing
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_packed_and_padded_samples_have_the_same_loss_a_token_and_the_same_gradients(architecture):
    model, samples = etherplus_model(**ARCHITECTURES[architecture]), samples_of(5, 20, 11, 13)
    each = []
    for batching in (PADDED, PACKED):
        idx, targets, lengths = batching.collate(samples)
        with torch.no_grad():
            each.append(model(idx, lengths=lengths, targets=targets, reduction="none"))
    assert each[0].shape == (n_targets(samples),)
    torch.testing.assert_close(each[1], each[0], rtol=1e-5, atol=0)
    assert_same_step(step(model, samples, PADDED), step(model, samples, PACKED))


def test_a_packed_sample_does_not_see_its_neighbours():
    model, (a, b, other) = etherplus_model(), samples_of(9, 14, 9)
    logits = []
    for first in (a, other):
        idx, _, lengths = PACKED.collate([first, b])
        with torch.no_grad():
            logits.append(model(idx, lengths=lengths)[0, 9:])
    assert torch.equal(*logits)


@pytest.mark.parametrize("multiple", [1, 16])
def test_packs_hold_each_sample_once_within_their_tokens(multiple):
    samples = samples_of(*range(3, 30))
    found = Batching(4, 64, pad_to_multiple_of=multiple).cut(samples)
    assert sorted(length(sample) for pack in found for sample in pack) == list(range(3, 30))
    sizes = [[round_up(length(sample), multiple) for sample in pack] for pack in found]
    assert max(map(sum, sizes)) <= 64
    assert len(found) <= 1.25 * sum(map(sum, sizes)) / 64


def first_fit(lengths: list[int], n_tokens: int) -> list[int]:
    """The tokens of each pack where samples go, the longest first, into the first pack that has room."""
    filled: list[int] = []
    for n in sorted(lengths, reverse=True):
        at = next((i for i, tokens in enumerate(filled) if tokens + n <= n_tokens), None)
        if at is None:
            filled.append(n)
        else:
            filled[at] += n
    return filled


@pytest.mark.parametrize("n_tokens", [256, 512, 1024])
def test_packs_are_as_few_as_first_fit_makes(n_tokens):
    lengths = [20 + int(n) for n in torch.rand(1500, generator=torch.Generator().manual_seed(n_tokens)) * 236]
    found = packs([{"input_ids": torch.empty(n)} for n in lengths], n_tokens)
    assert len(found) <= 1.001 * len(first_fit(lengths, n_tokens))


def test_packing_as_many_samples_as_alpaca_has_takes_no_minute():
    """It took the square of their number: a quarter of an hour, at every validation too."""
    kinds = [{"input_ids": torch.empty(n)} for n in range(20, 513)]
    samples = [kinds[37 * i % len(kinds)] for i in range(50_000)]
    started = time.process_time()
    found = packs(samples, 2048)
    assert time.process_time() - started < 2  # 0.15 to 0.4 s
    assert sum(map(len, found)) == 50_000 and max(sum(map(length, pack)) for pack in found) <= 2048


@pytest.mark.parametrize("n_tokens", [None, 40])
def test_processes_make_equally_many_passes_and_share_every_sample(n_tokens):
    samples = samples_of(5, 30, 8, 9, 10)
    shares = [Batching(2, n_tokens, rank, 3).local_micro_batches(samples) for rank in range(3)]
    assert len({len(mine) for mine, _ in shares}) == 1
    real = [micro for mine, _ in shares for micro in mine if micro is not EMPTY_MICRO_BATCH]
    assert {total for _, total in shares} == {len(real)}
    assert sorted(length(sample) for micro in real for sample in micro) == [5, 8, 9, 10, 30]


def test_an_idle_pass_has_neither_loss_nor_gradient():
    value, gradients = step(etherplus_model(), EMPTY_MICRO_BATCH, PADDED)
    assert value == 0 and not any(gradient.any() for gradient in gradients.values())


def test_the_rehearsed_pass_is_the_largest_there_can_be():
    samples = samples_of(30, 30, 12, 8, 8, 8)
    for batching in (PADDED, PACKED):
        largest = batching.collate(batching.largest(samples))[0]
        assert all(batching.collate(micro)[0].numel() <= largest.numel() for micro in batching.cut(samples))


def test_packing_trains_as_padding_does(work, tmp_path):
    more = ["--train.global_batch_size", "8", "--train.max_steps", "4"]
    padded, packed = (
        train(work, "etherplusHH", tmp_path / name, *more, "--train.packing", name) for name in ("false", "true")
    )
    for column in ("loss", "grad_norm", "val_loss", "val_response_loss"):
        assert losses_of(tmp_path / "true", column) == pytest.approx(losses_of(tmp_path / "false", column), rel=1e-5)
    assert packed["padding"] == 0 < padded["padding"]


# ------------------------------------------------------------------------------------------------------- rounding
@pytest.mark.parametrize("n_tokens", [None, 96])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_rounded_lengths_change_neither_loss_nor_gradients(architecture, n_tokens):
    model, samples = etherplus_model(**ARCHITECTURES[architecture]), samples_of(5, 20, 11, 16)
    rounded = Batching(4, n_tokens, pad_to_multiple_of=16)
    idx, targets, lengths = rounded.collate(samples)
    assert idx.shape == targets.shape == ((4, 32) if n_tokens is None else (1, 80))
    assert lengths == (None if n_tokens is None else [16, 32, 16, 16])
    assert_same_step(step(model, samples, PADDED), step(model, samples, rounded))


@pytest.mark.parametrize("packing", ["false", "true"])
def test_in_16_bits_on_a_cpu_products_have_few_sizes(work, tmp_path, monkeypatch, packing):
    """oneDNN keeps compiled code for each size that there ever was."""
    rows, product = set(), F.linear

    def counted(x: torch.Tensor, *rest) -> torch.Tensor:
        rows.add(x.numel() // x.size(-1))
        return product(x, *rest)

    monkeypatch.setattr(F, "linear", counted)
    summary = train(work, "etherplusHH", tmp_path / "run", "--precision", "bf16-true", "--train.packing", packing)
    assert rows and all(n % 16 == 0 for n in rows)
    assert summary["padding"] > 0


def test_lengths_stay_where_a_rounded_one_could_pass_the_context(work, tmp_path, bpe_dir):
    base = write_base(tmp_path / "base", bpe_dir, block_size=107)  # the longest sample
    more = ["--io.checkpoint_dir", str(base), "--precision", "bf16-true", "--train.packing", "true"]
    assert train(work, "etherplusHH", tmp_path / "run", *more)["padding"] == 0


# ---------------------------------------------------------------------------------------------------- the loss
@pytest.mark.parametrize("rows", [1, 7, 1000])
@pytest.mark.parametrize("trained", [True, False])
def test_the_chunked_loss_is_the_plain_one(monkeypatch, rows, trained):
    monkeypatch.setattr(loss_module, "CHUNK_ENTRIES", rows * 50)
    torch.manual_seed(0)
    head = nn.Linear(16, 50).requires_grad_(trained)
    x, targets = torch.randn(23, 16, requires_grad=True), torch.randint(50, (23,))
    wanted = [x, *head.parameters()] if trained else [x]
    plain = F.cross_entropy(head(x), targets, reduction="sum")
    ours = chunked_cross_entropy(head, x, targets)
    torch.testing.assert_close(ours, plain, rtol=1e-5, atol=0)
    for mine, its in zip(torch.autograd.grad(3 * ours, wanted), torch.autograd.grad(3 * plain, wanted), strict=True):
        assert (mine - its).abs().max() <= 1e-5 * its.abs().max()
    with torch.no_grad():
        each = chunked_cross_entropy(head, x, targets, reduction="none")
        torch.testing.assert_close(each, F.cross_entropy(head(x), targets, reduction="none"))


def test_never_more_logits_than_a_chunk(monkeypatch):
    monkeypatch.setattr(loss_module, "CHUNK_ENTRIES", 16 * 400)
    model, seen = etherplus_model(), []
    model.lm_head.register_forward_hook(lambda module, inputs, output: seen.append(len(output)))
    value, _ = step(model, samples_of(40, 40), PADDED)
    assert max(seen) == 16 and sum(seen) == round_up(n_targets(samples_of(40, 40)), 16) and value > 0


# ------------------------------------------------------------------------------------- checkpointing and compiling
def test_checkpointing_keeps_less_and_computes_the_same():
    samples, kept, steps = samples_of(20, 31), [], []
    for checkpointing in (False, True):
        model, sizes = etherplus_model(), []
        model.activation_checkpointing = checkpointing
        with torch.autograd.graph.saved_tensors_hooks(lambda t, sizes=sizes: sizes.append(t.numel()) or t, lambda t: t):
            steps.append(step(model, samples, PACKED))
        kept.append(sum(sizes))
    assert_same_step(*steps)
    assert kept[1] < kept[0] / 2


def test_checkpointing_draws_dropout_once(work, tmp_path):
    more = ["--ether_dropout", "0.2", "--ether_block_dropout", "0.1"]
    for name in ("false", "true"):
        train(work, "etherplusHH", tmp_path / name, *more, "--train.activation_checkpointing", name)
    assert losses_of(tmp_path / "true") == pytest.approx(losses_of(tmp_path / "false"), rel=1e-5)


def test_compiled_blocks_compute_the_same_for_any_lengths():
    model = etherplus_model()
    expected = [step(model, samples_of(*lengths), PACKED) for lengths in ((9, 14), (5, 6, 7, 8))]
    compile_blocks(model)
    torch._dynamo.reset()
    found = [step(model, samples_of(9, 14), PACKED)]
    with torch.compiler.set_stance("fail_on_recompile"):
        found.append(step(model, samples_of(5, 6, 7, 8), PACKED))
    for one, other in zip(expected, found, strict=True):
        assert_same_step(one, other)


# ----------------------------------------------------------------------------------------------------- sharding
def test_a_sharded_base_trains_as_a_whole_one(work, tmp_path):
    """FSDP2 in two processes on gloo, through the script: packing, a sample, a checkpoint and a short last step."""
    more = ["--train.epoch_size", "13", "--train.max_steps", "9", "--train.save_interval", "2"]  # 13 = 3 x 4 + 1
    more += ["--train.packing", "true"]
    more += ["--eval.sample_interval", "2", "--eval.sample_tokens", "4", "--train.activation_checkpointing", "true"]
    train(work, "etherplusHH", tmp_path / "one", *more)
    for training in two_processes(work, tmp_path / "two", *more, "--strategy", "fsdp"):
        code, text = training.end()
        assert code == 0, text
    for column in ("loss", "grad_norm", "val_loss", "val_response_loss", "tokens"):
        one, two = (losses_of(tmp_path / name, column) for name in ("one", "two"))
        assert two == pytest.approx(one, rel=1e-5), column


@mock.patch.dict(os.environ)  # sharding starts a group of processes, and says so there
def test_what_cannot_be_sharded_is_refused(work, tmp_path, capsys):
    base = ["--io.train_data_dir", str(work / "data"), "--io.out_dir", str(tmp_path / "run"), "--strategy"]
    told = "\"strategy\": Expected a typing.Literal['auto', 'ddp', 'fsdp']. Got value: zero"
    assert told in refusal(capsys, "finetune/ether.py", [*base, "zero"])
    assert "shards a frozen base" in refusal(capsys, "finetune/full.py", [*base, "fsdp"])
    more = ["fsdp", "--quantize", "bnb.nf4", "--train.monitor", "true"]
    line = refusal(capsys, "finetune/ether.py", [*base, *more])
    assert "cannot shard a quantized base" in line and "--train.monitor needs whole weights" in line


def test_micro_batches_of_a_step_are_of_similar_length(work):
    assert [len(micro) for micro in Batching(2).cut(samples_of(4, 9, 5, 8, 7))] == [2, 2, 1]
