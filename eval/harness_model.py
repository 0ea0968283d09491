"""Answer the lm-evaluation-harness's requests with a GPT: log-likelihoods of texts, and text that goes on.

Knows nothing of tasks and their data (``tasks.py``). Notable choices:
- Text is cut into tokens by the rules of the harness's Hugging Face backend (a context's trailing spaces belong to the
  answer, BOS where the tokenizer adds it, too long a text loses its beginning), so that the numbers are the same.
- The head runs on the scored positions alone, and log-probabilities are fp32 whatever the model's precision.
- What prompts have in common is computed once: requests whose input is the same share one row, the answers to a
  question are branches of one tree, and questions behind the same examples share their cached keys and values.
- A batch is one long row of such trees: nothing is padded, and few tokens at a time would wait for the weights.

Shapes: B batch, T tokens, d n_embd, V padded vocabulary.
"""

import atexit
import os
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from functools import lru_cache
from itertools import chain, islice
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.defaults import DEFAULT_MAX_GEN_TOKS
from lm_eval.models.utils import chunks, handle_stop_sequences, normalize_gen_kwargs, postprocess_generated_text
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
from torch import Tensor

from lit_gpt.devices import choose_device, gather
from lit_gpt.errors import UserError, out_of_memory
from lit_gpt.files import Progress, say_once
from lit_gpt.generate import common_length, generate
from lit_gpt.model import GPT
from lit_gpt.tokenizer import Tokenizer

HEAD_ROWS = 512
"""Positions whose logits are in memory at once; a vocabulary of 128k takes 256 MB in fp32."""

WORTH_A_PASS = 256
"""Tokens that a common beginning has to save before it gets a pass of its own."""
BRANCHES_TOKENS = 512
"""Tokens that a tree's branches may have beyond its trunk's: attention computes their masked scores, too."""
AUTO_ROWS = {"cuda": 64}
"""Rows that ``--batch_size auto`` begins with, else 8: a CPU gains nothing by more."""
SETTINGS = {"until", "max_gen_toks", "do_sample", "temperature", "top_k", "top_p"}
"""Settings that ``generate_until`` follows, under the harness's normal names."""

CONTINUE_HERE = "CONTINUE_HERE "
"""Marks the end of an answer's beginning in a rendered conversation; its space tells whether the template strips."""

Head = tuple[int, ...]


class Row(NamedTuple):
    """A row for the model, ``head + tail``: the states of the tail's tokens predict a continuation as long as it."""

    head: Head
    tail: tuple[int, ...]
    requests: list[int]


Tree = list[Row]
"""Rows with one head: the answers to a question."""


class HarnessModel(TemplateLM):
    """A GPT and its tokenizer as the harness wants to see them.

    Args:
        model: with or without adapters, in evaluation mode.
        tokenizer: the model's.
        batch_size: rows whose tokens a batch may have; auto takes fewer where memory ends.
        seed: of drawn answers.
    """

    tokenizer_name = ""  # the harness names its cache of requests by it, which is not used here

    def __init__(self, model: GPT, tokenizer: Tokenizer, *, batch_size: int | str = 8, seed: int = 1234) -> None:
        super().__init__()
        self.model, self.tokenizer = model, tokenizer
        self.max_length = model.config.block_size
        self._device = next(model.parameters()).device
        self.prefix_text = tokenizer.decode([self.prefix_token_id], skip_special=False)
        self.may_halve = batch_size == "auto"
        self.batch_size = AUTO_ROWS.get(self._device.type, 8) if self.may_halve else batch_size
        self.generator = torch.Generator(self._device).manual_seed(seed)
        if dist.is_initialized():
            self._rank, self._world_size = dist.get_rank(), dist.get_world_size()
        # Every answer's question is encoded twice: alone, and with the answer.
        self._encode = lru_cache(maxsize=64)(tokenizer.encode)
        self.n_requests = self.n_truncated = 0

    # Several processes

    def all_gather(self, tensor: Tensor) -> Tensor:
        """Return every process's number, by rank."""
        return torch.tensor(gather(tensor.item()))

    def gather_object(self, obj: Any, dst: int = 0) -> list[Any]:
        """Return every process's object, by rank."""
        return gather(obj)

    def barrier(self) -> None:
        """Wait for the other processes."""
        gather(None)

    # Text to tokens, as the Hugging Face backend does it

    @property
    def eot_token_id(self) -> int:
        """Return the id that ends a text."""
        return self.tokenizer.eos_id

    @property
    def prefix_token_id(self) -> int:
        """Return what stands before a text that has no context: BOS, or EOS where there is no BOS."""
        return self.tokenizer.eos_id if self.tokenizer.bos_id is None else self.tokenizer.bos_id

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs: Any) -> list[int]:
        """Encode a text; None adds what the tokenizer adds by itself, unless the text begins with BOS already."""
        if add_special_tokens is None and string.startswith(self.prefix_text):
            add_special_tokens = False
        return list(self._encode(string, bos=add_special_tokens))

    def checked(self, ids: list[int]) -> list[int]:
        """Return the ids; raise ValueError where the model has no rows for some of them."""
        self.tokenizer.check_ids(ids, self.model.config.padded_vocab_size)
        return ids

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """Return a conversation's text; without the generation prompt it ends within the last message, to go on."""
        if add_generation_prompt:
            return self._render(chat_history, add_generation_prompt=True)
        *before, last = chat_history
        text = self._render([*before, {**last, "content": last["content"] + CONTINUE_HERE}])
        head, found, tail = text.rpartition(CONTINUE_HERE.strip())
        if not found:
            raise UserError(f"the chat template of {self.tokenizer.dir} leaves out the beginning of an answer")
        return head if tail.startswith(" ") else head.rstrip()  # a template that strips the message strips its space

    def _render(self, messages: list[dict[str, str]], **options: bool) -> str:
        try:
            return self.tokenizer.render_chat(messages, **options)
        except UserError as error:
            # As the Hugging Face backend does, ask again without the system message, which is a task's description.
            others = [message for message in messages if message["role"] != "system"]
            if len(others) == len(messages):
                raise
            say_once(f"{error}; it is asked without the system message (the description)")
            return self.tokenizer.render_chat(others, **options)

    # Log-likelihoods

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:
        """Return each (text,)'s log-probability, in windows as long as the context that share one token."""
        sizes = {"prefix_token": self.prefix_token_id, "max_seq_len": self.max_length, "context_len": 1}
        results: list[float] = []
        for part in chunks([request.args for request in requests], 4 * self.batch_size):
            windows = [list(get_rolling_token_windows(self.tok_encode(text), **sizes)) for (text,) in part]
            disjoint = [(None, *make_disjoint_window(window)) for window in chain.from_iterable(windows)]
            scores = iter(self._loglikelihood_tokens(disjoint))
            for args, own in zip(part, windows, strict=True):
                results.append(sum((log_prob for log_prob, _ in islice(scores, len(own))), start=0.0))
                self.cache_hook.add_partial("loglikelihood_rolling", args, results[-1])
        return results

    @torch.no_grad()
    def _loglikelihood_tokens(
        self, requests: list[tuple[Any, list[int], list[int]]], **kwargs: Any
    ) -> list[tuple[float, bool]]:
        """Return for each (_, context ids, continuation ids) its log-probability, and True where it is greedy."""
        self.n_requests += len(requests)
        results: list[tuple[float, bool]] = [(0.0, True)] * len(requests)
        rows = self.make_rows(requests)
        with Progress(total=len(requests), unit=" requests", disable=self.rank > 0) as bar:
            for batch in self.run(rows):
                numbers = [number for row, _ in batch for number in row.requests]
                states = torch.cat([states for row, states in batch for _ in row.requests])
                scores = self.score(states, [requests[number][2] for number in numbers])
                for number, result in zip(numbers, scores, strict=True):
                    results[number] = result
                    if requests[number][0] is not None:
                        self.cache_hook.add_partial("loglikelihood", requests[number][0], result)
                bar.update(len(numbers))
        return results

    def make_rows(self, requests: list[tuple[Any, list[int], list[int]]]) -> list[Row]:
        """Return the distinct rows that the requests need, cut on the left to the model's context."""
        found, longest = defaultdict(list), self.max_length
        for number, (_, context, continuation) in enumerate(requests):
            context = context or [self.prefix_token_id]  # of blanks alone, which belong to the answer
            if len(continuation) > longest:
                raise UserError(f"a continuation of {len(continuation)} tokens does not fit the context of {longest}")
            # The last token is only predicted; one more than the context holds can be scored
            self.n_truncated += len(context) + len(continuation) > longest + 1
            tokens = tuple(self.checked(context + continuation)[-(longest + 1) : -1])
            cut = len(tokens) - len(continuation)
            found[tokens[:cut], tokens[cut:]].append(number)
        return [Row(*parts, numbers) for parts, numbers in found.items()]

    def run(self, rows: list[Row]) -> Iterator[list[tuple[Row, Tensor]]]:
        """Yield batches of (row, the states (T, d) of its tail); what rows begin with is computed once."""
        # Where the angles of all positions depend on how long the text is, nothing can be shared.
        alone = [[row] for row in rows if self.stretch(row)]
        groups = [((), alone), *clusters(make_trees([row for row in rows if not self.stretch(row)]))]
        try:
            for prefix, trees in groups:
                self.model.clear_kv_cache()
                if prefix:
                    self.model.set_kv_cache(1, len(prefix))
                    self.model.hidden(self.ids(prefix), input_pos=0)
                yield from self.in_batches(len(prefix), sorted(trees, key=longest_row, reverse=True))
        finally:
            self.model.clear_kv_cache()

    def in_batches(self, start: int, trees: list[Tree]) -> Iterator[list[tuple[Row, Tensor]]]:
        """Yield the states of one batch of trees after another; smaller ones where memory ends.

        A batch has no more tokens than ``batch_size`` rows of the longest length would have. The first ``start`` tokens
        of every row, which the cache holds, do not count.
        """
        done = 0
        while done < len(trees):
            batch, room = [], self.batch_size * (longest_row(trees[done]) - start)
            for tree in islice(trees, done, None):
                room -= len(tree[0].head) - start + sum(len(row.tail) for row in tree)
                if batch and room < 0:
                    break
                batch.append(tree)
            try:
                found = self.run_batch(start, batch)
            except (RuntimeError, MemoryError) as error:
                if not (self.may_halve and out_of_memory(error) and sum(map(len, batch)) > 1):
                    raise
                if len(batch) > 1:
                    self.batch_size //= 2
                else:
                    trees[done : done + 1] = batch[0][::2], batch[0][1::2]
            else:
                yield found
                done += len(batch)

    def run_batch(self, start: int, trees: list[Tree]) -> list[tuple[Row, Tensor]]:
        """Return the states of the tails of these trees' rows, whose first ``start`` tokens the cache holds."""
        parts, lengths = [], []
        for rows in trees:
            trunk, tails = rows[0].head[start:], [len(row.tail) for row in rows]
            parts += [(None, trunk), *((row, row.tail) for row in rows)]
            lengths.append((len(trunk), tails) if len(rows) > 1 else (len(trunk) + tails[0], []))  # one has no branches
        ids = self.ids(list(chain.from_iterable(tokens for _, tokens in parts)))
        hidden = self.model.hidden(ids, input_pos=start or None, trees=lengths)[0]  # (T, d)
        states = hidden.split([len(tokens) for _, tokens in parts])
        return [(row, found) for (row, _), found in zip(parts, states, strict=True) if row is not None]

    def stretch(self, row: Row) -> int:
        """Return the same number for all rows whose positions are rotated alike; 0 as short ones are."""
        return self.model.config.rope_stretch(len(row.head) + len(row.tail))

    def ids(self, tokens: Sequence[int]) -> Tensor:
        """Return (1, T) ids."""
        return torch.tensor([tokens], device=self._device)

    def score(self, hidden: Tensor, continuations: list[list[int]]) -> list[tuple[float, bool]]:
        """Return log-probability and greediness of each continuation, whose tokens (N, d) states predict in turn."""
        targets = torch.tensor([token for tokens in continuations for token in tokens], device=self._device)  # (N,)
        log_probs, greedy = [], []
        for part, target in zip(hidden.split(HEAD_ROWS), targets.split(HEAD_ROWS), strict=True):
            logits = self.model.logits(part).float()  # (n, V)
            log_probs.append(logits.log_softmax(dim=-1).gather(1, target[:, None])[:, 0])
            greedy.append(logits.argmax(dim=-1) == target)
        lengths = [len(tokens) for tokens in continuations]
        found = zip(torch.cat(log_probs).split(lengths), torch.cat(greedy).split(lengths), strict=True)
        return [(values.sum().item(), bool(hits.all())) for values, hits in found]

    # Generation

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """Return for each (context, options) the text that follows, up to the first of the options' stop strings."""
        self.n_requests += len(requests)
        results = []
        with Progress(total=len(requests), unit=" requests", disable=self.rank > 0) as bar:
            for context, options in (request.args for request in requests):
                settings = normalize_gen_kwargs(options, DEFAULT_MAX_GEN_TOKS)
                check_settings(settings)
                results.append(self.answer(context, settings))
                if not settings["do_sample"]:
                    self.cache_hook.add_partial("generate_until", (context, options), results[-1])
                bar.update(1)
        return results

    def answer(self, context: str, settings: dict[str, Any]) -> str:
        """Return one generated text; the context is cut on the left so that the longest answer fits behind it."""
        eos = self.tokenizer.decode([self.eot_token_id], skip_special=False)
        stops = [stop for stop in handle_stop_sequences(settings["until"], eos) if stop]
        length = settings["max_gen_toks"]
        room = self.max_length - length
        if room < 1:
            raise UserError(f"the task's answers of up to {length} tokens leave no room in the context for its prompt")
        ids = self.checked(self.tok_encode(context)) or [self.prefix_token_id]
        self.n_truncated += len(ids) > room
        prompt = ids[-room:]
        sampling = {"temperature": settings.get("temperature", 0.0), "generator": self.generator}
        sampling |= {"top_k": settings.get("top_k") or None, "top_p": settings.get("top_p")}
        stop_ids = self.tokenizer.eos_ids  # where the Hugging Face backend stops: not at every end of a turn
        tokens: list[int] = []
        for token in generate(self.model, prompt, max_new_tokens=length, stop_ids=stop_ids, **sampling):
            tokens.append(token)
            text = self.tokenizer.decode(tokens, skip_special=False)  # a stop string may be a special token
            if any(stop in text for stop in stops):
                break
        return postprocess_generated_text(self.tokenizer.decode(tokens), stop=stops, think_end_token=None)


def longest_row(tree: Tree) -> int:
    """Return the length of a tree's longest row."""
    return max(len(row.head) + len(row.tail) for row in tree)


def make_trees(rows: list[Row]) -> list[Tree]:
    """Part rows into those with the same head, in lexicographic order; many tokens of tails are several trees."""
    trees: list[Tree] = []
    for row in sorted(rows, key=lambda row: row.head):
        same = row.head and trees and trees[-1][0].head == row.head
        if same and sum(len(other.tail) for other in (*trees[-1], row)) <= len(row.head) + BRANCHES_TOKENS:
            trees[-1].append(row)
        else:
            trees.append([row])
    return trees


def clusters(trees: list[Tree]) -> list[tuple[Head, list[Tree]]]:
    """Part trees where their heads begin alike; return the beginnings with their trees, and what is left behind none.

    In lexicographic order neighbours have most in common, and the first and last of a group least. A beginning is half
    of its heads or more.
    """
    groups: list[list[Tree]] = []
    for tree in trees:
        head = tree[0].head
        if groups and 2 * common_length(groups[-1][0][0].head, head) >= len(head) > 0:
            groups[-1].append(tree)
        else:
            groups.append([tree])
    found: list[tuple[Head, list[Tree]]] = [((), [])]
    for group in groups:
        first, last = group[0][0].head, group[-1][0].head
        common = common_length(first, last)
        if common * (len(group) - 1) >= WORTH_A_PASS:
            found.append((first[:common], group))
        else:
            found[0][1].extend(group)
    return found


def check_settings(settings: Iterable[str]) -> None:
    """Raise UserError where settings of generation are among these that nothing here follows."""
    if unknown := sorted({*settings} - SETTINGS):
        raise UserError(f"generation does not know {', '.join(unknown)}; it knows {', '.join(sorted(SETTINGS))}")


def join_processes() -> torch.device:
    """Connect this process to the others that torchrun started, if any, and return its device."""
    device = choose_device()
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        if device.type == "cuda":
            torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))  # which "cuda" means from here on
        dist.init_process_group()
        atexit.register(dist.destroy_process_group)
    return device
