"""Rows to samples: ids, the mask of what is learned, and which of it is a response.

It knows rows and the tokenizer, and neither files nor models. Rows are encoded one by one, into arrays: beyond the
result, a million rows take no more memory than one.
"""

from array import array
from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence

import torch
from torch import Tensor

from lit_gpt.conversations import Piece, check_stops, encode_answers, find_answers
from lit_gpt.errors import UserError
from lit_gpt.loss import IGNORE_INDEX
from lit_gpt.rows import BadRows
from lit_gpt.tokenizer import Tokenizer

Sample = dict[str, Tensor]

NAMES = ("input_ids", "labels", "response")
SEVERAL = (
    "an answer each is a sample, since the chat template does not render earlier turns as it did when they were last"
)


class Samples:
    """Samples one behind another in two long columns, 5 bytes a token, cut at a length; none that learns nothing."""

    def __init__(self, max_seq_length: int | None = None, *, learn_all: bool = False) -> None:
        """Make an empty one. `max_seq_length` cuts the samples that are added; `learn_all` learns the prompts, too."""
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
    tokenizer: Tokenizer, rows: Iterable[tuple[int, Mapping]], *, style: str, samples: Samples, problems: BadRows
) -> None:
    """Encode numbered rows of one kind, one by one.

    Args:
        tokenizer: the model's.
        rows: as `read_rows` gives them.
        style: the prompt style; "chat" for conversations.
        samples: gets those of the rows, which are counted from 0; it may hold those of another file.
        problems: gets the rows that the chat template refuses, and those with the end of an answer inside one.
    """
    for number, row in rows:
        try:
            answers = find_answers(tokenizer, row, style)
            found = encode_answers(tokenizer, answers, style)
            check_stops(tokenizer, found)
        except UserError as error:
            problems.rows.append((number, str(error)))
            continue
        for pieces in found:
            samples.add(samples.n_rows, pieces)
        samples.n_rows += 1
        samples.n_dropped += not found
        samples.notes.update(dict.fromkeys((note for answer in answers for note in answer.notes), 1))
        samples.notes.update([SEVERAL] * (len(found) > 1))
