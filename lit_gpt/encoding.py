"""Rows to samples: ids, the mask of what is learned, and which of it is a response.

- Rows are encoded a slice at a time, into arrays: beyond the result, a million rows take no more memory than a
  thousand.
- No token reaches across the start of a response: what is trained on begins with exactly the ids that the model gets
  when it is asked (in one string, `Response:` and a response's first quotation mark are one token).
"""

from array import array
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence

import torch
from torch import Tensor

from lit_gpt.conversations import Piece, early_stop, encode_answers, find_answers
from lit_gpt.errors import UserError
from lit_gpt.loss import IGNORE_INDEX
from lit_gpt.prompts import CHAT, plain, render_prompt
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
    """Samples one behind another in three long columns, 6 bytes a token, cut at a length; none that learns nothing."""

    def __init__(self, max_seq_length: int | None = None) -> None:
        """`max_seq_length` cuts the samples that are added."""
        self.max_seq_length = max_seq_length
        self.ids, self.learned, self.response = array("i"), bytearray(), bytearray()
        self.sizes, self.rows = array("i"), array("i")  # of each sample, and the number of its row
        self.full_sizes = array("i")  # of all samples, before they were cut
        self.n_rows = self.n_cut = self.n_dropped = 0
        self.notes: Counter[str] = Counter()  # on what the chat template does, and in how many rows

    def __len__(self) -> int:
        return len(self.sizes)

    def __getitem__(self, i: int) -> Sample:
        start, size = sum(self.sizes[:i]), self.sizes[i]
        columns = (column[start : start + size] for column in (self.ids, self.learned, self.response))
        return dict(zip(NAMES, _tensors(*columns), strict=True))

    def add(self, row: int, pieces: Sequence[Piece], *, learn_all: bool = False) -> None:
        """Append a sample. Its answers are learned, all of it with `learn_all`."""
        ids = [i for piece, _ in pieces for i in piece]
        response = b"".join(bytes([is_response]) * len(piece) for piece, is_response in pieces)
        learned = b"\1" * len(ids) if learn_all else response
        limit = min(self.max_seq_length or len(ids), len(ids))
        self.full_sizes.append(len(ids))
        self.n_cut += limit < len(ids)
        # The first position has nothing before it to be predicted from
        if 1 not in learned[1:limit]:
            self.n_dropped += 1
            return
        self.ids.extend(ids[:limit])
        self.learned += learned[:limit]
        self.response += response[:limit]
        self.sizes.append(limit)
        self.rows.append(row)

    def take(self, rows: Collection[int]) -> "Samples":
        """Move the samples of some rows into samples of their own; the columns are not copied, but closed up."""
        taken, end, start, n_kept = Samples(), 0, 0, 0
        for i, (size, row) in enumerate(zip(self.sizes, self.rows, strict=True)):
            if row in rows:
                for name in ("ids", "learned", "response"):
                    getattr(taken, name).extend(getattr(self, name)[start : start + size])
                taken.sizes.append(size)
                taken.rows.append(row)
            else:
                if end < start:
                    for column in (self.ids, self.learned, self.response):
                        column[end : end + size] = column[start : start + size]
                self.sizes[n_kept], self.rows[n_kept] = self.sizes[i], row
                end, n_kept = end + size, n_kept + 1
            start += size
        for column in (self.ids, self.learned, self.response):
            del column[end:]
        del self.sizes[n_kept:], self.rows[n_kept:]
        return taken

    def columns(self) -> dict[str, Tensor]:
        """Return the columns as tensors of the same memory, the labels made of it."""
        return dict(zip(NAMES, _tensors(self.ids, self.learned, self.response), strict=True))


def _tensors(ids: array, learned: bytearray, response: bytearray) -> tuple[Tensor, Tensor, Tensor]:
    """Return ids, labels and the response's mask."""
    ids = torch.frombuffer(ids, dtype=torch.int32)
    learned, response = (torch.frombuffer(column, dtype=torch.bool) for column in (learned, response))
    return ids, ids.where(learned, IGNORE_INDEX), response


def encode_rows(
    tokenizer: Tokenizer,
    rows: Iterable[tuple[int, Mapping]],
    *,
    style: str,
    mask_inputs: bool,
    max_seq_length: int | None = None,
    problems: Problems | None = None,
) -> Samples:
    """Encode numbered rows, a slice of them at a time.

    Args:
        tokenizer: the model's.
        rows: as `read_rows` gives them.
        style: the prompt style; "chat" for conversations.
        mask_inputs: learn the response alone; of conversations only the answers are learned anyway.
        max_seq_length: cut the samples to so many tokens.
        problems: takes the rows that the chat template refuses, and those with the end of an answer inside one; without
            it, they are raised at the end.
    """
    samples, refused = Samples(max_seq_length), problems or Problems("data")
    for part in _slices(rows):
        if style == CHAT:
            part, encoded = _encode_chat(tokenizer, part, problems=refused, notes=samples.notes)
        else:
            encoded = _encode_instructions(tokenizer, [row for _, row in part], style)
        samples.n_rows += len(part)
        for (number, row), found in zip(part, encoded, strict=True):
            if stop := early_stop(tokenizer, found):
                refused.add(number, f"an answer holds {stop}, which ends answers; take it out, or leave the row out")
                continue
            samples.n_dropped += not found
            for pieces in found:
                samples.add(number, pieces, learn_all=not (mask_inputs or "messages" in row))
    if problems is None:
        refused.check()
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


def _encode_chat(
    tokenizer: Tokenizer, part: Sequence[tuple[int, Mapping]], *, problems: Problems, notes: Counter[str]
) -> tuple[list[tuple[int, Mapping]], list[list[list[Piece]]]]:
    """Return the rows that the chat template takes, and the samples of each."""
    good, answers = [], []
    for number, row in part:
        asked = {"role": "user", "content": "messages" not in row and plain(row["instruction"], row["input"])}
        messages = row.get("messages") or [asked, {"role": "assistant", "content": row["output"]}]
        try:
            found, own_notes = find_answers(tokenizer, messages)
        except UserError as error:
            problems.add(number, error)
            continue
        good.append((number, row))
        answers.append(found)
        notes.update(own_notes)
    encoded = encode_answers(tokenizer, answers)
    notes.update(SEVERAL for samples in encoded if len(samples) > 1)
    return good, encoded


def _encode_instructions(tokenizer: Tokenizer, rows: Sequence[Mapping], style: str) -> list[list[list[Piece]]]:
    """Return the one sample of each row: prompt, response, EOS."""
    bos = [tokenizer.bos_id] if tokenizer.adds_bos else []
    prompts = tokenizer.encode_batch([render_prompt(style, row["instruction"], row["input"]) for row in rows])
    responses = tokenizer.encode_batch([row["output"] for row in rows], continues=True)
    pairs = zip(prompts, responses, strict=True)
    return [[[(bos + prompt, False), ([*response, tokenizer.eos_id], True)]] for prompt, response in pairs]
