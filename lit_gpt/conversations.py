"""Rows as prompts and answers: what stands before each answer, and what is learned of it.

It knows a row's texts, prompt styles and the tokenizer, and nothing of files or masks.

- An answer is learned behind exactly the ids that the model gets when it is asked, and with the token that ends it. No
  token reaches across its start (in one string, `Response:` and a response's first quotation mark are one token).
- Templates rewrite the past: they drop reasoning, move the system message, open `<think>` in the prompt alone. So the
  answers of a conversation share a sample only where each next prompt goes on from the last answer, id for id.
- Not learned: an answer that its row marks so, and what the assistant says before the user does, since chat never asks
  for that.
"""

import re
from collections.abc import Collection, Mapping, Sequence
from itertools import islice
from typing import NamedTuple

from lit_gpt.errors import UserError
from lit_gpt.prompts import CHAT, plain, render_prompt
from lit_gpt.rows import LEARN_KEYS
from lit_gpt.tokenizer import PROBE, Tokenizer, render_tail

Piece = tuple[list[int], bool]  # ids, and whether they are a response's

REASONING_KEYS = ("reasoning_content", "reasoning", "thinking")
"""Where data sets keep reasoning apart from the content."""
OPENING_TAG = re.compile(r"<[^<>\s]+>\s*$")
AS_WRITTEN = (
    "the chat template shows answers otherwise than they stand here (its prompt opens the reasoning, or it leaves text "
    "out); they are learned as they stand here, behind the prompt that chat sends"
)
LEFT_OUT = "the chat template leaves out what the {} says, in training as in chat"


class Answer(NamedTuple):
    """An answer that is learned."""

    prompt: str
    """What the model gets when it is asked for it."""
    text: str
    """What the model is to write, the token that ends the turn included."""
    eos: bool
    """EOS comes behind the text, since the template ends the turn with no token."""


def find_answers(tokenizer: Tokenizer, row: Mapping, style: str) -> tuple[list[Answer], set[str]]:
    """Return the answers of a row that are learned, and notes on what the chat template does to it.

    Raises:
        ValueError: the template refuses the conversation, or leaves out reasoning that is kept apart from the content;
            an answer to be learned stands right behind another.
    """
    if style != CHAT:
        return [Answer(render_prompt(style, row["instruction"], row["input"]), row["output"], eos=True)], set()
    messages = row.get("messages") or [
        {"role": "user", "content": plain(row["instruction"], row["input"])},
        {"role": "assistant", "content": row["output"]},
    ]
    answers, notes, asked = [], set(), False
    for i, message in enumerate(messages):
        asked |= message["role"] == "user"
        marked = any(message.get(key) not in (None, 1) for key in LEARN_KEYS)
        if message["role"] != "assistant" or not asked or marked:
            continue
        if messages[i - 1]["role"] == "assistant":
            raise UserError(
                f"messages {i} and {i + 1} are both the assistant's, and chat never asks for a second answer: join "
                'them, or mark the second "weight": 0'
            )
        prompt = tokenizer.render_chat(messages[:i], add_generation_prompt=True)
        answer, as_written = _make_answer(tokenizer, messages[:i], message, prompt=prompt)
        answers.append(answer)
        notes |= {AS_WRITTEN} if as_written else set()
        notes |= {LEFT_OUT.format(role) for role in hidden_roles(messages[:i], prompt)}
    return answers, notes


def hidden_roles(messages: Sequence[dict], prompt: str) -> set[str]:
    """Return whose messages, the system's or the user's, do not stand in a prompt."""
    shown = _squeeze(prompt)
    return {m["role"] for m in messages if m["role"] != "assistant" and _squeeze(m["content"]) not in shown}


def written(tokenizer: Tokenizer, before: Sequence[dict], text: str) -> str:
    """Return a decoded answer without what the template itself writes around one, as its row would have it."""
    probe = {"role": "assistant", "content": PROBE}
    prompt = tokenizer.render_chat(before, add_generation_prompt=True)
    answer, _ = _make_answer(tokenizer, before, probe, prompt=prompt)
    ((_, (ids, _)),) = encode_answers(tokenizer, [[answer]], CHAT)[0]
    # Decoded, since that drops special tokens, and SentencePiece's first space
    head, _, tail = tokenizer.decode(ids).partition(PROBE)
    return text.removeprefix(head).removesuffix(tail)


def _make_answer(tokenizer: Tokenizer, before: Sequence[dict], message: dict, *, prompt: str) -> tuple[Answer, bool]:
    """Return the answer behind its prompt, and whether its text is the row's because the template's can't be used."""
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
            raise UserError(
                f"the chat template of {tokenizer.dir} does not show the {key} of message {len(before) + 1} where the "
                "model is to write it; put it into content, between <think> and </think>"
            )
    return Answer(prompt, body + tail[: min(ends, default=0)], eos=not ends), as_written


def encode_answers(
    tokenizer: Tokenizer, conversations: Collection[Sequence[Answer]], style: str
) -> list[list[list[Piece]]]:
    """Return the samples of each conversation, as pieces that alternate between what stands before and an answer."""
    answers = [answer for conversation in conversations for answer in conversation]
    prompts = tokenizer.encode_batch([answer.prompt for answer in answers])
    texts = tokenizer.encode_batch([answer.text for answer in answers], continues=True)
    if style == CHAT:
        joined = tokenizer.encode_batch([answer.prompt + answer.text for answer in answers])
        for i, (prompt, both) in enumerate(zip(prompts, joined, strict=True)):
            if both[: len(prompt)] == prompt:  # otherwise the answer's beginning merges with the prompt's end
                texts[i] = both[len(prompt) :]
    elif tokenizer.adds_bos:
        prompts = [[tokenizer.bos_id, *prompt] for prompt in prompts]
    encoded = zip(answers, prompts, texts, strict=True)
    results = []
    for conversation in conversations:
        samples: list[list[Piece]] = []
        so_far: list[int] = []
        for answer, prompt, ids in islice(encoded, len(conversation)):
            ids += [tokenizer.eos_id] * answer.eos
            if not samples or prompt[: len(so_far)] != so_far:
                samples, so_far = [*samples, []], []
            samples[-1] += [(prompt[len(so_far) :], False), (ids, True)]
            so_far = prompt + ids
        results.append(samples)
    return results


def early_stop(tokenizer: Tokenizer, samples: Sequence[Sequence[Piece]]) -> str | None:
    """Return a token that ends answers and stands inside one: learned, it would end answers in the middle."""
    ids = (i for pieces in samples for answer, learned in pieces if learned for i in answer[:-1])
    stop = next(filter(tokenizer.stop_ids.__contains__, ids), None)
    return None if stop is None else tokenizer.decode([stop], skip_special=False)


def _squeeze(text: str) -> str:
    """Return the text without white space, which templates strip and add."""
    return "".join(text.split())
