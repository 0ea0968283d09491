"""Rows to samples: what stands before each answer and what is learned of it, as ids with a mask.

It knows a row's texts, prompt styles and the tokenizer, and neither files nor models. Rows are encoded one by one, into
arrays: beyond the result, a million rows take no more memory than one.

- An answer is learned behind exactly the ids that the model gets when it is asked, and with the token that ends it. No
  token reaches across its start (in one string, `Response:` and a response's first quotation mark are one token).
- Templates rewrite the past: they drop reasoning, move the system message, open `<think>` in the prompt alone. So the
  answers of a conversation share a sample only where each next prompt goes on from the last answer, id for id.
- Not learned: an answer that its row marks so, and what the assistant says before the user does, since chat never asks
  for that.
"""

import re
from array import array
from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from lit_gpt.errors import UserError
from lit_gpt.loss import IGNORE_INDEX
from lit_gpt.prompts import CHAT, encode_prompts, plain, render_prompt
from lit_gpt.rows import LEARN_KEYS, BadRows
from lit_gpt.tokenizer import PROBE, Tokenizer, render_tail

Piece = tuple[list[int], bool]  # ids, and whether they are a response's
Sample = dict[str, Tensor]
NAMES = ("input_ids", "labels", "response")

REASONING_KEYS = ("reasoning_content", "reasoning", "thinking")
"""Keys under which data sets keep reasoning apart from the content."""
OPENING_TAG = re.compile(r"<[^<>\s]+>\s*$")
AS_WRITTEN = (
    "the chat template shows answers otherwise than they stand here (its prompt opens the reasoning, or it leaves text "
    "out); they are learned as they stand here, behind the prompt that chat sends"
)
SEVERAL = "an answer each is a sample, since the chat template renders turns otherwise once they are not the last"
LEFT_OUT = "the chat template leaves out what the {} says, in training as in chat"


class Answer(NamedTuple):
    """An answer that is learned."""

    prompt: str
    """The text that the model gets when it is asked for the answer."""
    text: str
    """The text that the model is to write, with the token that ends the turn."""
    eos: bool
    """EOS comes behind the text, since the template ends the turn with no token."""
    notes: tuple[str, ...] = ()
    """Notes on what the chat template does to the conversation."""


def find_answers(tokenizer: Tokenizer, row: Mapping, style: str) -> list[Answer]:
    """Return the answers of a row that are learned.

    Raises:
        ValueError: the template refuses the conversation, or leaves out reasoning that is kept apart from the content;
            an answer to be learned stands right behind another.
    """
    if style != CHAT:
        return [Answer(render_prompt(style, row["instruction"], row["input"]), row["output"], eos=True)]
    messages = row.get("messages") or [
        {"role": "user", "content": plain(row["instruction"], row["input"])},
        {"role": "assistant", "content": row["output"]},
    ]
    answers, asked = [], False
    for i, message in enumerate(messages):
        asked |= message["role"] == "user"
        marked = any(message.get(key) not in (None, 1) for key in LEARN_KEYS)
        if message["role"] != "assistant" or not asked or marked:
            continue
        if messages[i - 1]["role"] == "assistant":
            twice = f"messages {i} and {i + 1} are both the assistant's, and chat never asks for a second answer"
            raise UserError(f'{twice}: join them, or mark the second "weight": 0')
        answers.append(_make_answer(tokenizer, messages[:i], message))
    return answers


def hidden_roles(messages: Sequence[dict], prompt: str) -> set[str]:
    """Return whose messages, the system's or the user's, do not stand in a prompt."""
    shown = _squeeze(prompt)
    return {m["role"] for m in messages if m["role"] != "assistant" and _squeeze(m["content"]) not in shown}


def written(tokenizer: Tokenizer, before: Sequence[dict], text: str) -> str:
    """Return a decoded answer without what the template itself writes around one, as its row would have it."""
    answer = _make_answer(tokenizer, before, {"role": "assistant", "content": PROBE})
    ((_, (ids, _)),) = encode_answers(tokenizer, [answer], CHAT)
    # Decoded, since that drops special tokens, and SentencePiece's first space
    head, _, tail = tokenizer.decode(ids).partition(PROBE)
    return text.removeprefix(head).removesuffix(tail)


def _make_answer(tokenizer: Tokenizer, before: Sequence[dict], message: dict) -> Answer:
    """Return the answer behind its prompt: as the template shows it, or as it stands where that can't be used."""
    prompt = tokenizer.render_chat(before, add_generation_prompt=True)
    shown = tokenizer.render_chat([*before, message])
    tail = render_tail(tokenizer, tuple(turn["role"] for turn in before))
    ends = [tail.index(token) + len(token) for token in tokenizer.stop_tokens if token in tail]
    text = message["content"]
    if tag := OPENING_TAG.search(prompt):  # what the prompt has opened is not opened again
        opened = next((tag for tag in (tag.group(), tag.group().strip()) if text.startswith(tag)), "")
        text = text.removeprefix(opened)
    start = prompt
    if not shown.startswith(prompt):  # templates move the system message: compare from the last turn's text on
        probed = [*before[:-1], {**before[-1], "content": PROBE}]
        start = tokenizer.render_chat(probed, add_generation_prompt=True).rpartition(PROBE)[2]
        shown = tokenizer.render_chat([*probed, message]).rpartition(PROBE)[2]
    body = shown[len(start) : len(shown) - len(tail)]
    as_written = not (shown.startswith(start) and shown.endswith(tail) and _squeeze(text) in _squeeze(body))
    body = text if as_written else body
    for key in REASONING_KEYS:
        if isinstance(message.get(key), str) and _squeeze(message[key]) not in _squeeze(body):
            hidden = f"the chat template of {tokenizer.dir} does not show the {key} of message {len(before) + 1}"
            raise UserError(f"{hidden} where it is to be written; put it into content, between <think> and </think>")
    notes = (AS_WRITTEN,) * as_written + tuple(map(LEFT_OUT.format, sorted(hidden_roles(before, prompt))))
    return Answer(prompt, body + tail[: min(ends, default=0)], eos=not ends, notes=notes)


def encode_answers(tokenizer: Tokenizer, answers: Sequence[Answer], style: str) -> list[list[Piece]]:
    """Return the samples of a row, as pieces that alternate between what stands before and an answer.

    Raises:
        ValueError: a token that ends answers stands inside one: learned, it would end them in the middle.
    """
    prompts = encode_prompts(tokenizer, style, [answer.prompt for answer in answers])
    texts = tokenizer.encode_batch([answer.text for answer in answers], continues=True)
    joined = tokenizer.encode_batch([answer.prompt + answer.text for answer in answers]) if style == CHAT else texts
    samples: list[list[Piece]] = []
    so_far: list[int] = []
    for answer, prompt, ids, both in zip(answers, prompts, texts, joined, strict=True):
        if style == CHAT and both[: len(prompt)] == prompt:  # else the answer's beginning merges with the prompt's end
            ids = both[len(prompt) :]
        ids += [tokenizer.eos_id] * answer.eos
        if stop := tokenizer.stop_ids.intersection(ids[:-1]):
            end = tokenizer.decode([min(stop, key=ids.index)], skip_special=False)
            raise UserError(f"an answer holds {end}, which ends answers; take it out, or leave the row out")
        if not samples or prompt[: len(so_far)] != so_far:
            samples, so_far = [*samples, []], []
        samples[-1] += [(prompt[len(so_far) :], False), (ids, True)]
        so_far = prompt + ids
    return samples


def _squeeze(text: str) -> str:
    """Return the text without white space, which templates strip and add."""
    return "".join(text.split())


# ----------------------------------------------------------------------------------------------------- samples
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
        parts, end = (Samples(learn_all=self.learn_all), Samples(learn_all=self.learn_all)), 0
        for row, size in zip(self.rows, self.sizes, strict=True):
            end += size
            parts[row in rows]._append(row, self.ids[end - size : end], self.response[end - size : end])
        self.ids, self.response, self.sizes, self.rows = array("i"), bytearray(), array("i"), array("i")
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
        samples: gets those of the rows, which are counted from 0.
        problems: gets the rows that the chat template refuses, and those with the end of an answer inside one.
    """
    for number, row in rows:
        try:
            answers = find_answers(tokenizer, row, style)
            found = encode_answers(tokenizer, answers, style)
        except UserError as error:
            problems.add(number, error)
            continue
        for pieces in found:
            samples.add(samples.n_rows, pieces)
        samples.n_rows += 1
        samples.n_dropped += not found
        samples.notes.update(dict.fromkeys((note for answer in answers for note in answer.notes), 1))
        samples.notes.update([SEVERAL] * (len(found) > 1))
