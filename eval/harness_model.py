"""A GPT as the lm-evaluation-harness wants to see it: log-likelihoods of texts, and text that goes on.

Notable choices:
- Text is cut into tokens by the rules of the harness's Hugging Face backend (a context's trailing spaces belong to the
  answer, BOS where the tokenizer adds it, too long a text loses its beginning), so that the numbers are the same.
- The head runs on the scored positions alone, and log-probabilities are fp32 whatever the model's precision.
- What prompts have in common is computed once: requests whose input is the same share one row, and the answers to one
  question, or questions behind the same examples, share the keys and values of their common beginning.

Shapes: B batch, T tokens, d n_embd, V padded vocabulary.
"""

import json
import sys
from collections import defaultdict
from collections.abc import Iterator, Sequence
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.defaults import DEFAULT_MAX_GEN_TOKS, DEFAULT_OTHER_SEED
from lm_eval.models.utils import handle_stop_sequences, normalize_gen_kwargs, postprocess_generated_text
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
from torch import Tensor
from tqdm import tqdm

from lit_gpt.errors import UserError
from lit_gpt.generate import generate
from lit_gpt.model import GPT
from lit_gpt.tokenizer import Tokenizer

HEAD_ROWS = 512
"""Positions whose logits are in memory at once; a vocabulary of 128k takes 256 MB in fp32."""

CONTINUE_HERE = "CONTINUE_HERE "
"""Marks the end of an answer's beginning in a rendered conversation; its space tells whether the template strips."""


class Input(NamedTuple):
    """One row for the model: ``head + tail``. The states of the tail's tokens are what gets scored."""

    head: tuple[int, ...]
    tail: tuple[int, ...]
    requests: list[int]


class HarnessModel(TemplateLM):
    """A GPT and its tokenizer as the harness wants to see them.

    Args:
        model: with or without adapters, in evaluation mode.
        tokenizer: the model's.
        batch_size: rows in a batch.
    """

    def __init__(self, model: GPT, tokenizer: Tokenizer, *, batch_size: int = 8) -> None:
        super().__init__()
        self.model, self.tokenizer, self.batch_size = model, tokenizer, batch_size
        self.max_length = model.config.block_size
        self._device = next(model.parameters()).device
        self.prefix_text = tokenizer.decode([self.prefix_token_id], skip_special=False)
        self.generator = torch.Generator(self._device).manual_seed(DEFAULT_OTHER_SEED)
        # Every answer to a question is encoded with the question, and behind it
        self._encode = lru_cache(maxsize=64)(self._encode)
        self.n_requests = 0
        self.left_out_system = False

    # Text to tokens, as the Hugging Face backend does it

    @property
    def eot_token_id(self) -> int:
        """The id that ends a text."""
        return self.tokenizer.eos_id

    @property
    def prefix_token_id(self) -> int:
        """What stands before a text that has no context: BOS, or EOS where there is no BOS."""
        return self.tokenizer.eos_id if self.tokenizer.bos_id is None else self.tokenizer.bos_id

    @property
    def tokenizer_name(self) -> str:
        """Only names the harness's request cache, which is not used here."""
        return ""

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs: Any) -> list[int]:
        """Ids of a text; None adds what the tokenizer adds by itself, unless the text begins with BOS already."""
        if add_special_tokens is None and string.startswith(self.prefix_text):
            add_special_tokens = False
        return list(self._encode(string, add_special_tokens))

    def _encode(self, string: str, bos: bool | None) -> list[int]:
        return self.tokenizer.encode(string, bos=bos)

    def checked(self, ids: list[int]) -> list[int]:
        """The ids, which the model has rows for."""
        self.tokenizer.check_ids(ids, self.model.config.padded_vocab_size)
        return ids

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """The text of a conversation; without the generation prompt, it ends within the last message, to go on.

        A template that refuses the conversation is asked again without its system message (a task's description), as
        the Hugging Face backend does.
        """
        try:
            return self._render(chat_history, add_generation_prompt)
        except UserError as error:
            without = [message for message in chat_history if message["role"] != "system"]
            if len(without) == len(chat_history):
                raise
            if not self.left_out_system:
                print(f"note: {error}; it is asked without the system message (the description)", file=sys.stderr)
            self.left_out_system = True
            return self._render(without, add_generation_prompt)

    def _render(self, messages: list[dict[str, str]], add_generation_prompt: bool) -> str:
        if add_generation_prompt:
            return self.tokenizer.render_chat(messages, add_generation_prompt=True)
        *before, last = messages
        text = self.tokenizer.render_chat([*before, {**last, "content": last["content"] + CONTINUE_HERE}])
        head, found, tail = text.rpartition(CONTINUE_HERE.strip())
        if not found:
            raise UserError(f"the chat template of {self.tokenizer.dir} leaves out the beginning of an answer")
        return head if tail.startswith(" ") else head.rstrip()  # a template that strips the message strips its space

    # Log-likelihoods

    def loglikelihood(self, requests: list[Instance], disable_tqdm: bool = True) -> list[tuple[float, bool]]:
        """For each (context, continuation): the continuation's log-probability, and whether greedy would give it."""
        return super().loglikelihood(requests, disable_tqdm=True)  # its bar counts tokenizing

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:
        """For each (text,): its log-probability, in windows as long as the context that share one token."""
        windows, owners = [], []
        for number, request in enumerate(requests):
            pairs = get_rolling_token_windows(
                token_list=self.tok_encode(request.args[0]),
                prefix_token=self.prefix_token_id,
                max_seq_len=self.max_length,
                context_len=1,
            )
            windows += [(None, *make_disjoint_window(pair)) for pair in pairs]
            owners += [number] * (len(windows) - len(owners))
        totals = [0.0] * len(requests)
        for number, (log_prob, _) in zip(owners, self._loglikelihood_tokens(windows), strict=True):
            totals[number] += log_prob
        return totals

    @torch.no_grad()
    def _loglikelihood_tokens(
        self, requests: list[tuple[Any, list[int], list[int]]], **kwargs: Any
    ) -> list[tuple[float, bool]]:
        """For each (_, context ids, continuation ids) its log-probability and whether it is greedy."""
        self.n_requests += len(requests)
        continuations = [continuation for _, _, continuation in requests]
        results: list[tuple[float, bool]] = [(0.0, True)] * len(requests)
        shared, separate = split_by_gain(self.make_inputs(requests))
        with progress_bar(len(requests)) as bar:
            for rows in (self.run_shared(shared), self.run_separate(separate)):
                for inputs, states in rows:
                    numbers = [number for row in inputs for number in row.requests]
                    for number, result in zip(numbers, self.score(inputs, states, continuations), strict=True):
                        results[number] = result
                    bar.update(len(numbers))
        return results

    def make_inputs(self, requests: list[tuple[Any, list[int], list[int]]]) -> list[Input]:
        """The distinct rows that the requests need, cut on the left to the model's context."""
        requests_of, tail_length = defaultdict(list), defaultdict(int)
        for number, (_, context, continuation) in enumerate(requests):
            if len(continuation) > self.max_length:
                raise UserError(
                    f"a continuation of {len(continuation)} tokens can't be scored by a model whose context holds "
                    f"{self.max_length}"
                )
            # The last token is only predicted; one more than the context holds can be scored
            tokens = tuple((self.checked(context) + self.checked(continuation))[-(self.max_length + 1) : -1])
            requests_of[tokens].append(number)
            tail_length[tokens] = max(tail_length[tokens], len(continuation))
        cuts = {tokens: len(tokens) - tail_length[tokens] for tokens in requests_of}
        return [Input(tokens[: cuts[tokens]], tokens[cuts[tokens] :], requests_of[tokens]) for tokens in requests_of]

    def run_separate(self, inputs: list[Input]) -> Iterator[tuple[list[Input], list[Tensor]]]:
        """Batches of rows of like length, longest first, with the states of their tails, (len(tail), d) each."""
        inputs = sorted(inputs, key=lambda row: -len(row.head) - len(row.tail))
        for batch in batches(inputs, self.batch_size):
            hidden = self.model.hidden(self.pad([row.head + row.tail for row in batch]))  # (B, T, d)
            ends = [len(row.head) + len(row.tail) for row in batch]
            yield batch, [hidden[i, end - len(batch[i].tail) : end] for i, end in enumerate(ends)]

    def run_shared(self, families: dict[tuple[int, ...], list[Input]]) -> Iterator[tuple[list[Input], list[Tensor]]]:
        """The same for rows grouped by their head, which the cache holds once for all of them.

        Heads come in lexicographic order: neighbours have most in common, and only where one leaves its predecessor
        does it need new keys and values.
        """
        if not families:
            return
        longest = max(len(head) + max(len(row.tail) for row in rows) for head, rows in families.items())
        self.model.set_kv_cache(min(self.batch_size, max(map(len, families.values()))), longest)
        try:
            cached: tuple[int, ...] = ()
            for head in sorted(families):
                start = common_length(cached, head)
                if start < len(head):  # one sequence, stored in every row of the cache
                    self.model.hidden(self.pad([head[start:]]), input_pos=start)
                cached = head
                for batch in batches(families[head], self.batch_size):
                    hidden = self.model.hidden(self.pad([row.tail for row in batch]), input_pos=len(head))  # (B, T, d)
                    yield batch, [hidden[i, : len(row.tail)] for i, row in enumerate(batch)]
        finally:
            self.model.clear_kv_cache()

    def pad(self, rows: Sequence[Sequence[int]]) -> Tensor:
        """(B, T) ids, padded on the right, where a causal model's other positions don't see it."""
        T = max(map(len, rows))
        return torch.tensor([[*row, *[0] * (T - len(row))] for row in rows], device=self._device)

    def score(
        self, inputs: list[Input], states: list[Tensor], continuations: list[list[int]]
    ) -> Iterator[tuple[float, bool]]:
        """Log-probability and greediness of each request of the inputs, in their order."""
        wanted = [continuations[number] for row in inputs for number in row.requests]
        # A request's continuation is predicted by the last states of its row
        hidden = torch.cat(
            [
                state[len(state) - len(continuations[number]) :]
                for row, state in zip(inputs, states, strict=True)
                for number in row.requests
            ]
        )  # (N, d), N tokens in all
        targets = torch.tensor([token for tokens in wanted for token in tokens], device=self._device)  # (N,)
        log_probs, greedy = [], []
        for part, target in zip(hidden.split(HEAD_ROWS), targets.split(HEAD_ROWS), strict=True):
            logits = self.model.lm_head(part).float()  # (n, V)
            log_probs.append(logits.log_softmax(dim=-1).gather(1, target[:, None])[:, 0])
            greedy.append(logits.argmax(dim=-1) == target)
        lengths = [len(tokens) for tokens in wanted]
        for values, hits in zip(torch.cat(log_probs).split(lengths), torch.cat(greedy).split(lengths), strict=True):
            yield values.sum().item(), bool(hits.all())

    # Generation

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """For each (context, options): the text that follows, up to the first of the options' stop strings."""
        self.n_requests += len(requests)
        answers: dict[str, str] = {}
        results = []
        with progress_bar(len(requests)) as bar:
            for context, options in (request.args for request in requests):
                settings = normalize_gen_kwargs(options, DEFAULT_MAX_GEN_TOKS)
                key = json.dumps([context, settings], default=str)
                if key not in answers or settings.get("temperature", 0.0) > 0:
                    answers[key] = self.answer(context, settings)
                results.append(answers[key])
                bar.update(1)
        return results

    def answer(self, context: str, settings: dict[str, Any]) -> str:
        """One generated text; the context is cut on the left so that the longest answer fits behind it."""
        stops = handle_stop_sequences(settings["until"], self.tokenizer.decode([self.eot_token_id], skip_special=False))
        stops = [stop for stop in stops if stop]
        room = self.max_length - settings["max_gen_toks"]
        if room < 1:
            raise UserError(
                f"the task generates up to {settings['max_gen_toks']} tokens, which leaves no room for its prompt in "
                f"the model's context of {self.max_length}"
            )
        tokens: list[int] = []
        for token in generate(
            self.model,
            self.checked(self.tok_encode(context)[-room:]),
            max_new_tokens=settings["max_gen_toks"],
            temperature=settings.get("temperature", 0.0),
            top_k=settings.get("top_k") or None,
            top_p=settings.get("top_p"),
            stop_ids=self.tokenizer.eos_ids,  # where the Hugging Face backend stops: not at every end of a turn
            generator=self.generator,
        ):
            tokens.append(token)
            text = self.tokenizer.decode(tokens, skip_special=False)  # a stop string may be a special token
            if any(stop in text for stop in stops):
                break
        text = self.tokenizer.decode(tokens)
        return postprocess_generated_text(text, stop=stops, think_end_token=None)


def split_by_gain(inputs: list[Input]) -> tuple[dict[tuple[int, ...], list[Input]], list[Input]]:
    """Part rows into families with one head, where sharing it at least halves the tokens to compute, and the rest.

    Sharing pays less where it saves less than that: a family is a batch of its own, which may be small.
    """
    families = defaultdict(list)
    for row in inputs:
        families[row.head].append(row)
    heads = sorted(families)
    shared, separate = {}, []
    for i, head in enumerate(heads):
        neighbours = heads[max(0, i - 1) : i] + heads[i + 1 : i + 2]
        known = max((common_length(head, other) for other in neighbours), default=0)
        tails = sum(len(row.tail) for row in families[head])
        if 2 * (len(head) - known + tails) <= len(families[head]) * len(head) + tails:
            shared[head] = families[head]
        else:
            separate += families[head]
    return shared, separate


def common_length(a: Sequence[int], b: Sequence[int]) -> int:
    """How many tokens two sequences have in common at their beginnings."""
    for i, (x, y) in enumerate(zip(a, b, strict=False)):
        if x != y:
            return i
    return min(len(a), len(b))


def batches(rows: list[Input], size: int) -> Iterator[list[Input]]:
    """The rows in order, ``size`` at a time."""
    for start in range(0, len(rows), size):
        yield rows[start : start + size]


def progress_bar(total: int) -> tqdm:
    """One line on a terminal, and in a log file one line a minute."""
    live = sys.stderr.isatty()
    return tqdm(total=total, unit="request", leave=False, mininterval=0.5 if live else 60, delay=1 if live else 60)
