"""One token stream for training samples, chat and evaluation, and the text stream made of it.

- The prompt is prefilled in one pass, which computes the logits of its last position alone; each further token is one
  step on the key/value cache.
- Greedy decoding is a named branch (``temperature == 0``), not a division by something tiny. Sampling draws from a
  ``torch.Generator`` of its own, so a sample taken during training leaves the order of the data untouched.
- Ids that only pad the embedding (``config.vocab_size`` and above) are never chosen.
- Whoever stops listening early, by ``break`` or by an exception, leaves the model as it was.
"""

from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from lit_gpt.errors import Problems, UserError
from lit_gpt.model import GPT

if TYPE_CHECKING:  # a machine that only generates ids (scripts/gpu.sh) needs no package of a tokenizer
    from lit_gpt.tokenizer import Tokenizer

REPLACEMENT = "\N{REPLACEMENT CHARACTER}"


def generate(
    model: GPT,
    prompt_ids: list[int],
    *,
    max_new_tokens: int,
    temperature: float = 0.0,
    top_k: int | None = None,
    top_p: float | None = None,
    stop_ids: Collection[int] = (),
    seed: int = 1234,
    generator: torch.Generator | None = None,
    cached: list[int] | None = None,
) -> Iterator[int]:
    """Yield the ids that follow a prompt, one by one.

    The stream ends before a stop id, after ``max_new_tokens``, or where prompt and answer together fill the context.

    Args:
        model: a GPT, with or without adapters. While the stream is open it is in eval mode and owns the model's cache.
        prompt_ids: at least one id.
        max_new_tokens: the most ids to yield.
        temperature: 0 takes the likeliest id; above, logits are divided by it.
        top_k: draw from this many likeliest ids.
        top_p: draw from the smallest set of likeliest ids that holds this much probability.
        stop_ids: ids that end the answer; they are not yielded.
        seed: of a fresh generator, where none is given.
        generator: source of randomness on the model's device, for several answers in a row.
        cached: for a conversation: the ids that the model's cache holds, an empty list at first, kept up to date. The
            cache then stays when the stream ends, and the next prompt is computed from where it differs.

    Raises:
        ValueError: at once, not at the first id: an empty prompt, one longer than the context, a setting out of range.
    """
    context, prompt = model.config.block_size, list(prompt_ids)
    if not prompt:
        raise UserError("the prompt is empty: it needs at least one token")
    if len(prompt) > context:
        raise UserError(f"the prompt has {len(prompt)} tokens, the model's context holds {context}: shorten it")
    check_sampling(max_new_tokens=max_new_tokens, temperature=temperature, top_k=top_k, top_p=top_p, seed=seed)
    if generator is None:
        generator = torch.Generator(next(model.parameters()).device).manual_seed(seed)
    choose = partial(sample, temperature=temperature, top_k=top_k, top_p=top_p, generator=generator)
    limit = min(max_new_tokens, context - len(prompt))
    return _stream(model, prompt, choose=choose, limit=limit, stop_ids=stop_ids, cached=cached)


def check_sampling(
    *, max_new_tokens: int, temperature: float, top_k: int | None, top_p: float | None, seed: int = 0
) -> None:
    """Raise one ``ValueError`` that names every setting out of range."""
    problems = Problems()
    problems.expect(max_new_tokens >= 0, f"max_new_tokens must be 0 or more, not {max_new_tokens}")
    positive = 0 <= temperature < float("inf")
    problems.expect(positive, f"temperature must be 0 (greedy) or a positive number, not {temperature}")
    problems.expect(top_k is None or top_k >= 1, f"top_k must be 1 or more, not {top_k}")
    problems.expect(top_p is None or 0 < top_p <= 1, f"top_p must be above 0 and at most 1, not {top_p}")
    problems.expect(0 <= seed < 2**64, f"seed must be 0 or more and below 2^64, not {seed}")
    problems.check()


@contextmanager
def evaluation_mode(model: nn.Module) -> Iterator[None]:
    """Put a model in evaluation mode; at the end each of its modules is in the mode that it was in before."""
    training = [module for module in model.modules() if module.training]  # adapters may differ from the rest
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True


@torch.no_grad()  # on a generator function torch holds it only while the body runs, never while the consumer does
def _stream(
    model: GPT, prompt: list[int], *, choose: Callable, limit: int, stop_ids: Collection[int], cached: list[int] | None
) -> Iterator[int]:
    """Yield the ids that ``choose`` takes; every argument is checked."""
    stretch, cache, need = model.config.rope_stretch, model.transformer.h[0].attn.kv_cache, len(prompt) + limit
    ids, held = list(prompt), [] if cached is None else cached  # the cache holds the keys of the second
    with evaluation_mode(model):
        try:
            fits = held and cache is not None and cache.k.size(2) >= need
            if not fits or stretch(len(held)) != stretch(len(prompt)):
                # Twice what is needed from the second time on: a conversation that grows is seldom computed anew.
                model.set_kv_cache(batch_size=1, max_seq_length=min(model.config.block_size, need * (2 if held else 1)))
                held.clear()
            del held[common_length(held, prompt[:-1]) :]
            for _ in range(limit):
                if stretch(len(held)) != stretch(len(ids)):
                    held.clear()  # its keys were rotated for a shorter text
                new = torch.tensor([ids[len(held) :]], device=model.transformer.wte.weight.device)  # (1, T)
                hidden = model.hidden(new, input_pos=len(held))  # (1, T, d)
                held += ids[len(held) :]
                token = choose(model.logits(hidden[:, -1])[0, : model.config.vocab_size]).item()
                if token in stop_ids:
                    return
                ids.append(token)
                yield token
        finally:
            if cached is None:
                model.clear_kv_cache()


def common_length(a: Sequence[int], b: Sequence[int]) -> int:
    """Return how many tokens two sequences have in common at their beginnings."""
    differ = (i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y)
    return next(differ, min(len(a), len(b)))


def sample(
    logits: Tensor,
    *,
    temperature: float = 0.0,
    top_k: int | None = None,
    top_p: float | None = None,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Choose one id from logits (V,), as a tensor of one element."""
    if temperature == 0:
        return logits.argmax()
    logits, ids = logits.float() / temperature, None
    if top_k is not None or top_p is not None:
        logits, ids = logits.topk(min(top_k or len(logits), len(logits)))  # likeliest first
    if top_p is not None:
        logits = keep_top_p(logits, top_p)
    pick = torch.multinomial(logits.softmax(dim=-1), 1, generator=generator)
    return pick if ids is None else ids[pick]


def keep_top_p(logits: Tensor, top_p: float) -> Tensor:
    """Keep the smallest set of likeliest ids that holds ``top_p`` of the probability; the rest become -inf.

    Args:
        logits: (K,), in descending order.
    """
    probs = logits.softmax(dim=-1)
    before = probs.cumsum(dim=-1) - probs  # probability of everything likelier
    return logits.masked_fill(before >= top_p, -torch.inf)


def stream_text(tokenizer: "Tokenizer", tokens: Iterable[int]) -> Iterator[str]:
    """Turn a stream of ids into pieces of text whose concatenation is ``tokenizer.decode`` of all ids.

    All ids so far are decoded anew each time (a tokenizer's first space, special tokens and merged bytes depend on
    what stands before), and only text that no later id can change is shown: a character spread over several ids
    comes when it is complete, and text from byte-fallback ids when their run has ended.
    """
    ids: list[int] = []
    shown, text = "", ""
    for token in tokens:
        ids.append(token)
        before, text = text, tokenizer.decode(ids)
        unfinished = text.endswith(REPLACEMENT) or token in tokenizer.byte_ids
        if text not in (before, shown) and not unfinished and text.startswith(shown):
            yield text[len(shown) :]
            shown = text
    if len(text) > len(shown):
        yield text[len(shown) :]
