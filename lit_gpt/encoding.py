"""Rows to samples: ids, the mask of what is learned, and which of it is a response.

It knows rows and the tokenizer, and neither files nor models. Rows are encoded a slice at a time, into arrays: beyond
the result, a million rows take no more memory than a thousand.
"""

from array import array
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence

import torch
from torch import Tensor

from lit_gpt.conversations import Piece, early_stop, encode_answers, find_answers
from lit_gpt.errors import UserError
from lit_gpt.loss import IGNORE_INDEX
from lit_gpt.rows import Problems
from lit_gpt.tokenizer import Tokenizer

Sample = dict[str, Tensor]

NAMES = ("input_ids", "labels", "response")
SLICE = 1000
CHARACTERS = 2_000_000
"""Rows that are encoded at a time, and their characters: of a conversation, all before each turn."""
SEVERAL = (
    "an answer each is a sample, since the chat template does not render earlier turns as it did when they were last"
)


class Samples:
    """Samples one behind another in two long columns, 5 bytes a token, cut at a length; none that learns nothing."""

    def __init__(self, max_seq_length: int | None = None, *, learn_all: bool = False) -> None:
        """`max_seq_length` cuts the samples that are added; `learn_all` learns the prompts, too."""
        self.max_seq_length, self.learn_all = max_seq_length, learn_all
        self.ids, self.response = array("i"), bytearray()
        self.sizes, self.rows = array("i"), array("i")  # of each sample, and the number of its row
        self.full_sizes = array("i")  # of all samples, before they were cut
        self.n_rows = self.n_cut = self.n_dropped = 0
        self.notes: Counter[str] = Counter()  # on what the chat template does, and in how many rows

    def __len__(self) -> int:
        return len(self.sizes)

    def __getitem__(self, i: int) -> Sample:
        start, size = sum(self.sizes[:i]), self.sizes[i]
        return self.columns(start, start + size)

    def add(self, row: int, pieces: Sequence[Piece]) -> None:
        """Append a sample of a row, unless nothing of it is learned."""
        ids = [i for piece, _ in pieces for i in piece]
        response = b"".join(bytes([is_response]) * len(piece) for piece, is_response in pieces)
        limit = min(self.max_seq_length or len(ids), len(ids))
        self.full_sizes.append(len(ids))
        self.n_cut += limit < len(ids)
        # The first position has nothing before it to be predicted from
        if limit > 1 and (self.learn_all or 1 in response[1:limit]):
            self._append(row, ids[:limit], response[:limit])
        else:
            self.n_dropped += 1

    def _append(self, row: int, ids: Sequence[int], response: bytes) -> None:
        self.ids.extend(ids)
        self.response += response
        self.sizes.append(len(ids))
        self.rows.append(row)

    def split(self, rows: Collection[int]) -> tuple["Samples", "Samples"]:
        """Move the samples out: return those of other rows, and those of these rows."""
        parts, start = (Samples(learn_all=self.learn_all), Samples(learn_all=self.learn_all)), 0
        for row, size in zip(self.rows, self.sizes, strict=True):
            end = start + size
            parts[row in rows]._append(row, self.ids[start:end], self.response[start:end])
            start = end
        for column in (self.ids, self.response, self.sizes, self.rows):
            del column[:]
        return parts

    def columns(self, start: int = 0, end: int | None = None) -> dict[str, Tensor]:
        """Return the columns, or a part of them, as tensors of the same memory, the labels made of it."""
        ids = torch.frombuffer(self.ids, dtype=torch.int32)[start:end]
        response = torch.frombuffer(self.response, dtype=torch.bool)[start:end]
        labels = ids.where(response | self.learn_all, IGNORE_INDEX)
        return dict(zip(NAMES, (ids, labels, response), strict=True))


def encode_rows(
    tokenizer: Tokenizer,
    rows: Iterable[tuple[int, Mapping]],
    *,
    style: str,
    mask_inputs: bool,
    max_seq_length: int | None = None,
    problems: Problems | None = None,
    samples: Samples | None = None,
) -> Samples:
    """Encode numbered rows of one kind, a slice of them at a time; the rows of the samples are counted from 0.

    Args:
        tokenizer: the model's.
        rows: as `read_rows` gives them.
        style: the prompt style; "chat" for conversations.
        mask_inputs: learn the response alone; of conversations only the answers are learned anyway.
        max_seq_length: cut the samples to so many tokens.
        problems: takes the rows that the chat template refuses, and those with the end of an answer inside one; without
            it, they are raised at the end.
        samples: those of another file, to which these are added.
    """
    samples = Samples(max_seq_length) if samples is None else samples
    refused = problems or Problems("data")
    for part in _slices(rows):
        answers = {}
        for number, row in part:
            samples.learn_all = not mask_inputs and "messages" not in row
            try:
                answers[number], notes = find_answers(tokenizer, row, style)
            except UserError as error:
                refused.rows.append((number, str(error)))
            else:
                samples.notes.update(notes)
        for number, found in zip(answers, encode_answers(tokenizer, answers.values(), style), strict=True):
            if stop := early_stop(tokenizer, found):
                what = f"an answer holds {stop}, which ends answers; take it out, or leave the row out"
                refused.rows.append((number, what))
                continue
            samples.n_dropped += not found
            samples.notes.update([SEVERAL] * (len(found) > 1))
            for pieces in found:
                samples.add(samples.n_rows, pieces)
            samples.n_rows += 1
    if problems is None and refused.rows:
        raise UserError(str(refused))
    return samples


def _slices(rows: Iterable[tuple[int, Mapping]]) -> Iterator[list[tuple[int, Mapping]]]:
    """Yield the rows in lists that take little memory to encode."""
    part, characters = [], 0
    for number, row in rows:
        part.append((number, row))
        turns = row.get("messages", ())
        characters += len(turns) * sum(len(turn["content"]) for turn in turns)
        if len(part) == SLICE or characters > CHARACTERS:
            yield part
            part, characters = [], 0
    if part:
        yield part
