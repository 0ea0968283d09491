"""How samples become forward passes: their order, the cut into micro-batches, and tensors, padded or packed.

- The order depends on the seed alone: successive seeded permutations of the data.
- Micro-batches hold samples of similar length, or, packed, as many as fit a number of tokens: neither changes a
  gradient, since the loss is summed over the whole optimizer step.
"""

from bisect import bisect_left, insort
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from lit_gpt.data import Sample, length
from lit_gpt.loss import IGNORE_INDEX

WINDOW = 50
"""Optimizer steps among which ``group_by_length`` sorts."""
EMPTY_MICRO_BATCH = [
    {"input_ids": torch.zeros(2), "labels": torch.full((2,), IGNORE_INDEX), "response": torch.zeros(2).bool()}
]
"""A pass without a target, hence without a gradient: of processes that wait for others."""


def sample_order(n_data: int, n_samples: int, *, seed: int) -> list[int]:
    """Indices of the samples in training order: permutations of the data, one after another, cut at ``n_samples``."""
    generator = torch.Generator().manual_seed(seed)
    order: list[int] = []
    while len(order) < n_samples:
        order += torch.randperm(n_data, generator=generator).tolist()
    return order[:n_samples]


def group_by_length(order: Sequence[int], lengths: Sequence[int], *, size: int, seed: int) -> list[int]:
    """Make the samples of an optimizer step alike in length: less padding, at the price of less mixed steps.

    Args:
        order: indices in training order.
        lengths: of the samples, by index.
        size: samples of an optimizer step.
        seed: of the order of the steps.

    Returns:
        The same indices, sorted by length among ``WINDOW`` steps at a time, whose steps then come in random order.
    """
    generator = torch.Generator().manual_seed(seed)
    grouped: list[int] = []
    for start in range(0, len(order), WINDOW * size):
        window = sorted(order[start : start + WINDOW * size], key=lambda index: lengths[index])
        steps = [window[i : i + size] for i in range(0, len(window), size)]
        *whole, last = range(len(steps))  # the last step of all may be short: it stays the last
        for i in [whole[i] for i in torch.randperm(len(whole), generator=generator).tolist()] + [last]:
            grouped += steps[i]
    return grouped


def round_up(n: int, multiple: int) -> int:
    """The smallest multiple that is not below ``n``."""
    return -(-n // multiple) * multiple


def n_targets(samples: Sequence[Sample]) -> int:
    """Tokens with a loss; a sample's first token is never predicted."""
    return sum(int((sample["labels"][1:] != IGNORE_INDEX).sum()) for sample in samples)


def micro_batches(samples: Sequence[Sample], size: int) -> list[list[Sample]]:
    """Cut samples into micro-batches of similar length."""
    ordered = sorted(samples, key=length)
    return [ordered[start : start + size] for start in range(0, len(ordered), size)]


def packs(samples: Sequence[Sample], n_tokens: int, *, size: Callable[[Sample], int] = length) -> list[list[Sample]]:
    """Cut samples into packs of at most ``n_tokens`` together: the longest first, each where it leaves least room."""
    found: list[list[Sample]] = []
    by_room: dict[int, list[list[Sample]]] = {}  # packs by the tokens that still fit into them
    rooms: list[int] = []  # the sorted keys that have a pack: never more than n_tokens, however many samples
    for sample in sorted(samples, key=length, reverse=True):
        needed = size(sample)
        at = bisect_left(rooms, needed)
        if at < len(rooms):
            room = rooms[at]
            pack = by_room[room].pop()
            if not by_room[room]:
                del rooms[at]
        else:
            room, pack = n_tokens, []
            found.append(pack)
        pack.append(sample)
        alike = by_room.setdefault(room - needed, [])
        if not alike:
            insort(rooms, room - needed)
        alike.append(pack)
    return found


def collate(
    samples: Sequence[Sample],
    device: torch.device | str | None = None,
    *,
    packed: bool = False,
    response_only: bool = False,
    pad_to_multiple_of: int = 1,
) -> tuple[Tensor, Tensor]:
    """Make a batch, a row for each sample, padded on the right to the longest, or one row of all, one after another.

    Args:
        samples: B of them.
        device: where the batch is to be.
        packed: put them into one row; the model needs their ``lengths`` then.
        response_only: target the response's tokens, whatever the labels say.
        pad_to_multiple_of: round the length of each sample up to it.

    Returns:
        The ids, 0 where padded, and the targets, -100 where there is none: `targets[:, t]` is what follows
        `idx[:, t]`. Both (B, T) int64, T the longest sample's length, or (1, T), T the sum of the lengths.
    """
    ids = [sample["input_ids"].long() for sample in samples]
    labels = (
        torch.where(sample["response"], own, IGNORE_INDEX) if response_only else sample["labels"].long()
        for sample, own in zip(samples, ids, strict=True)
    )
    sizes = [round_up(len(own), pad_to_multiple_of) for own in ids]
    if not packed:
        sizes = [max(sizes)] * len(sizes)

    def join(rows: Iterable[Tensor], value: int) -> Tensor:
        filled = [F.pad(row, (0, size - len(row)), value=value) for row, size in zip(rows, sizes, strict=True)]
        return (torch.cat(filled)[None] if packed else torch.stack(filled)).to(device)

    return join(ids, 0), join((own[1:] for own in labels), IGNORE_INDEX)


@dataclass(frozen=True)
class Batching:
    """How samples are cut into forward passes.

    Attributes:
        size: samples of a micro-batch.
        n_tokens: packed, the most tokens of a pass; None for padded micro-batches.
        rank: which process this is,
        n_processes: of so many that share the samples.
        pad_to_multiple_of: lengths are rounded up to it.
    """

    size: int
    n_tokens: int | None = None
    rank: int = 0
    n_processes: int = 1
    pad_to_multiple_of: int = 1

    def rounded(self, sample: Sample) -> int:
        """How many tokens a sample takes."""
        return round_up(length(sample), self.pad_to_multiple_of)

    def cut(self, samples: Sequence[Sample]) -> list[list[Sample]]:
        """The passes of all these samples."""
        if self.n_tokens is None:
            return micro_batches(samples, self.size)
        return packs(samples, self.n_tokens, size=self.rounded)

    def local_micro_batches(self, samples: Sequence[Sample]) -> tuple[list[list[Sample]], int]:
        """Return this process's micro-batches, as many as any process has (some may be empty), and how many all have.

        Processes wait for each other in every pass of a sharded model, and in the last one of a copied model.
        """
        cuts = [self.cut(samples[rank :: self.n_processes]) for rank in range(self.n_processes)]
        mine = cuts[self.rank]
        return mine + [EMPTY_MICRO_BATCH] * (max(map(len, cuts)) - len(mine)), sum(map(len, cuts))

    def largest(self, samples: Sequence[Sample], n_samples: int) -> list[Sample]:
        """A pass that is as large as any can be, of at most ``n_samples``."""
        ordered = sorted(samples, key=length, reverse=True)
        if self.n_tokens is None:
            return ordered[: self.size]
        chosen, room = [], self.n_tokens
        for sample in ordered:
            if self.rounded(sample) <= room and len(chosen) < n_samples:
                chosen.append(sample)
                room -= self.rounded(sample)
        return chosen

    def collate(
        self, samples: Sequence[Sample], device: torch.device | str | None = None, *, response_only: bool = False
    ) -> tuple[Tensor, Tensor, list[int] | None]:
        """Ids, targets and, packed, the lengths that the model is to be told."""
        packed = self.n_tokens is not None
        how = dict(packed=packed, response_only=response_only, pad_to_multiple_of=self.pad_to_multiple_of)
        return *collate(samples, device, **how), list(map(self.rounded, samples)) if packed else None
