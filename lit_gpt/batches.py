"""Turn samples into forward passes: their order, the cut into micro-batches, and tensors, padded or packed.

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

EMPTY_MICRO_BATCH = [
    {"input_ids": torch.zeros(2), "labels": torch.full((2,), IGNORE_INDEX), "response": torch.zeros(2).bool()}
]
"""A pass without a target, hence without a gradient: of processes that wait for others."""


def sample_order(n_data: int, n_samples: int, *, seed: int) -> list[int]:
    """Return the samples' indices in training order: permutations of the data, one after another, to ``n_samples``."""
    generator = torch.Generator().manual_seed(seed)
    order: list[int] = []
    while len(order) < n_samples:
        order += torch.randperm(n_data, generator=generator).tolist()
    return order[:n_samples]


def round_up(n: int, multiple: int) -> int:
    """Return the smallest multiple that is not below ``n``."""
    return -(-n // multiple) * multiple


def n_targets(samples: Sequence[Sample]) -> int:
    """Count the tokens with a loss; a sample's first token is never predicted."""
    return sum(int((sample["labels"][1:] != IGNORE_INDEX).sum()) for sample in samples)


def packs(samples: Sequence[Sample], n_tokens: int, *, size: Callable[[Sample], int] = length) -> list[list[Sample]]:
    """Cut samples into packs of at most ``n_tokens`` together: the longest first, each where it leaves least room."""
    found: list[list[Sample]] = []
    open_packs: list[tuple[int, int, list[Sample]]] = []  # sorted: room, -turn of its last sample, pack
    for turn, sample in enumerate(sorted(samples, key=length, reverse=True)):
        needed = size(sample)
        index = bisect_left(open_packs, (needed,))
        if index == len(open_packs):
            room, pack = n_tokens, []
            found.append(pack)
        else:
            room, _, pack = open_packs.pop(index)
        pack.append(sample)
        insort(open_packs, (room - needed, -turn, pack))
    return found


def add_response_targets(samples: Sequence[Sample]) -> tuple[list[Sample], Tensor]:
    """Make targets of the responses' tokens, whatever the labels say.

    Returns:
        The samples, and for their N targets in order, (2, N) bool: which have labels, and which are a response's.
    """
    groups = [torch.stack([sample["labels"] != IGNORE_INDEX, sample["response"]])[:, 1:] for sample in samples]
    either = torch.cat(groups, dim=1)  # (2, positions that follow another)
    wider = [s | {"labels": torch.where(s["response"], s["input_ids"], s["labels"])} for s in samples]
    return wider, either[:, either.any(dim=0)]


def collate(samples: Sequence[Sample], device: torch.device | str | None = None) -> tuple[Tensor, Tensor]:
    """Return ids and targets of a batch that is padded to its longest sample, as ``Batching.collate`` gives them."""
    return Batching(len(samples)).collate(samples, device)[:2]


@dataclass(frozen=True)
class Batching:
    """A way to cut samples into forward passes."""

    size: int  # samples of a micro-batch
    n_tokens: int | None = None  # packed, the most tokens of a pass; None for padded micro-batches
    rank: int = 0  # which process this is,
    n_processes: int = 1  # of so many that share the samples
    pad_to_multiple_of: int = 1  # lengths are rounded up to it

    def rounded(self, sample: Sample) -> int:
        """Return the number of tokens that a sample takes."""
        return round_up(length(sample), self.pad_to_multiple_of)

    def cut(self, samples: Sequence[Sample]) -> list[list[Sample]]:
        """Cut samples into passes, padded ones of similar length."""
        if self.n_tokens is None:
            ordered = sorted(samples, key=length)
            return [ordered[start : start + self.size] for start in range(0, len(ordered), self.size)]
        return packs(samples, self.n_tokens, size=self.rounded)

    def local_micro_batches(self, samples: Sequence[Sample]) -> tuple[list[list[Sample]], int]:
        """Return this process's micro-batches, as many as any process has (some may be empty), and how many all have.

        Processes wait for each other in every pass of a sharded model, and in the last one of a copied model.
        """
        cuts = [self.cut(samples[rank :: self.n_processes]) for rank in range(self.n_processes)]
        mine = cuts[self.rank]
        return mine + [EMPTY_MICRO_BATCH] * (max(map(len, cuts)) - len(mine)), sum(map(len, cuts))

    def largest(self, samples: Sequence[Sample]) -> list[Sample]:
        """Return a pass as large as any can be: of the longest sample, again and again."""
        return [max(samples, key=length)] * self.size

    def collate(
        self, samples: Sequence[Sample], device: torch.device | str | None = None
    ) -> tuple[Tensor, Tensor, list[int] | None]:
        """Make a batch of B samples: a row for each, padded on the right, or, packed, one row of all behind each other.

        Returns:
            The ids, 0 where padded, and the targets, -100 where there is none: `targets[:, t]` is what follows
            `idx[:, t]`. Both (B, T) int64, T the longest sample's length, or (1, T), T the sum of the lengths; and,
            packed, the lengths, which the model is to be told.
        """
        packed = self.n_tokens is not None
        sizes = [self.rounded(sample) for sample in samples]
        filled_to = sizes if packed else [max(sizes)] * len(sizes)

        def join(rows: Iterable[Tensor], value: int) -> Tensor:
            filled = [F.pad(row.long(), (0, n - len(row)), value=value) for row, n in zip(rows, filled_to, strict=True)]
            return (torch.cat(filled)[None] if packed else torch.stack(filled)).to(device)

        idx = join((sample["input_ids"] for sample in samples), 0)
        targets = join((sample["labels"][1:] for sample in samples), IGNORE_INDEX)
        return idx, targets, sizes if packed else None
