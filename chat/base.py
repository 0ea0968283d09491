"""Talk to a model in the terminal: a base model, a merged one, or a base with an unmerged adapter.

    python chat/base.py --checkpoint_dir checkpoints/HuggingFaceTB/SmolLM2-135M-Instruct
    echo "What is the capital of France?" | python chat/base.py --checkpoint_dir DIR --temperature 0

- The answer streams token by token and stops at the end-of-text or end-of-turn token.
- The prompt style is the one the model was finetuned with (it travels with the files), or ``--prompt_style``.
  "chat", the model's own template, keeps the conversation; any other style makes every prompt a new one.
- Where stdin is no terminal, all of it is one prompt: the answer goes to stdout, everything else to stderr.
- Ctrl-C stops an answer; at the prompt it quits, as Ctrl-D does.
"""

import os
import select
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import redirect_stdout, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # runs from any folder

import torch

from lit_gpt.adapter_files import load_adapted_model, open_adapter
from lit_gpt.checkpoint import check_checkpoint_dir, load_prompt_style
from lit_gpt.cli import main
from lit_gpt.devices import PRECISIONS, choose_device
from lit_gpt.encoding import LEFT_OUT, hidden_roles, written
from lit_gpt.errors import Problems, UserError
from lit_gpt.generate import check_sampling, generate, stream_text
from lit_gpt.model import GPT
from lit_gpt.prompts import CHAT, encode_prompt
from lit_gpt.tokenizer import Tokenizer

PROMPT = ">> "
CONTEXT_ENDS, INTERRUPTED = "cut where the model's context ends", "interrupted"
PASTE_SECONDS = 0.05  # between two lines of a paste; by hand nobody is so quick
Message = dict[str, str]  # "role" and "content"


class Reply(NamedTuple):
    """An answer and how it came about.

    Attributes:
        text: the answer, without the token that ended it.
        tokens: of the answer.
        prompt_tokens: of all that it answers.
        seconds: that prompt and answer took.
        end: the reason for its end; empty where the model ended it.
    """

    text: str
    tokens: int
    prompt_tokens: int
    seconds: float
    end: str

    def summary(self) -> str:
        """Return one line on the speed, and on an end that was not the model's."""
        rate = self.tokens / max(self.seconds, 1e-9)
        end = f"; {self.end}" if self.end else ""
        return f"[{self.tokens} tokens, {rate:.1f} tokens/s; prompt: {self.prompt_tokens} tokens{end}]"


def encode(tokenizer: Tokenizer, style: str, messages: Sequence[Message]) -> list[int]:
    """Return the ids of a conversation up to the next answer's beginning; of one prompt where the style is not chat."""
    if style == CHAT:
        return tokenizer.encode(tokenizer.render_chat(messages, add_generation_prompt=True), bos=False)
    (prompt,) = messages
    return encode_prompt(tokenizer, style, instruction=prompt["content"])


def with_system(system: str | None, turns: list[Message]) -> list[Message]:
    """Return the turns behind the system message, where there is one."""
    return turns if system is None else [{"role": "system", "content": system}, *turns]


@dataclass
class Conversation:
    """The conversation so far; the oldest turns go where it outgrows the context."""

    model: GPT
    tokenizer: Tokenizer
    style: str
    system: str | None = None
    sampling: dict[str, Any] = field(default_factory=dict)
    """``max_new_tokens`` and what ``generate`` takes."""
    turns: list[Message] = field(default_factory=list)
    """User and assistant by turns."""
    cached: list[int] = field(default_factory=list)
    """The ids that the model's cache holds: a turn costs its own tokens and not the whole conversation's."""

    def ask(self, text: str, write: Callable[[str], Any] = lambda piece: None) -> Reply:
        """Answer the next prompt, and remember both where the style is "chat".

        Args:
            text: the prompt.
            write: called with each piece of the answer as soon as it is known.

        Raises:
            ValueError: the prompt alone does not fit the context; the conversation stays as it was.
        """
        start, context, longest = time.perf_counter(), self.model.config.block_size, self.sampling["max_new_tokens"]
        turns, prompt = self.fitting([*self.turns, {"role": "user", "content": text}])
        self.tokenizer.check_ids(prompt, self.model.config.padded_vocab_size)
        if len(prompt) >= context:
            raise UserError(
                f"the prompt has {len(prompt)} tokens, the model's context holds {context} with its answer: shorten it"
            )
        answer, tokens, end = "", [], ""

        def listed() -> Iterator[int]:
            stops = self.tokenizer.stop_ids
            for token in generate(self.model, prompt, stop_ids=stops, cached=self.cached, **self.sampling):
                tokens.append(token)
                yield token

        try:
            for piece in stream_text(self.tokenizer, listed()):
                answer += piece
                write(piece)
            end = {context - len(prompt): CONTEXT_ENDS, longest: "cut at --max_new_tokens"}.get(len(tokens), "")
        except KeyboardInterrupt:
            end = INTERRUPTED
        if self.style == CHAT and (answer or end != INTERRUPTED):
            # The next prompt is the one of a training row with this answer.
            content = written(self.tokenizer, with_system(self.system, turns), answer)
            self.turns = [*turns, {"role": "assistant", "content": content}]
        return Reply(answer, len(tokens), len(prompt), time.perf_counter() - start, end)

    def fitting(self, turns: list[Message]) -> tuple[list[Message], list[int]]:
        """Drop the oldest turns, a question with its answer, until a quarter of the context or a whole answer fits.

        Returns:
            The turns that are left, and their ids.
        """
        context, n_turns = self.model.config.block_size, len(turns)
        longest = context - min(self.sampling["max_new_tokens"], context // 4)
        while len(ids := encode(self.tokenizer, self.style, with_system(self.system, turns))) > longest:
            if len(turns) == 1:
                break
            turns = turns[2:]
        if dropped := (n_turns - len(turns)) // 2:
            print(f"[the conversation outgrew the context: {dropped} oldest turns dropped]", file=sys.stderr)
        return turns, ids


def show_answer(conversation: Conversation, text: str) -> None:
    """Answer a prompt on stdout, piece by piece, and summarize on stderr."""
    reply = conversation.ask(text, lambda piece: print(piece, end="", flush=True))
    print(flush=True)
    print(reply.summary(), file=sys.stderr)


def chat_terminal(conversation: Conversation) -> None:
    """Answer prompts from the terminal until Ctrl-C or Ctrl-D."""
    with suppress(ImportError):  # Python may have been built without it
        import readline  # gives ``input`` its line editing and history

        if os.environ.get("TERM", "dumb") != "dumb":  # let the terminal mark a paste: it may come slowly
            readline.parse_and_bind("set enable-bracketed-paste on")

    for text in read_prompts():
        try:
            show_answer(conversation, text)
        except KeyboardInterrupt:  # before the answer began, or after it ended
            print()
        except UserError as error:
            print(f"error: {error}", file=sys.stderr)


def read_prompts() -> Iterator[str]:
    """Yield what is typed or pasted; lines that wait when the first one ends belong to it."""
    with suppress(EOFError, KeyboardInterrupt):
        while True:
            text = input(PROMPT)
            with suppress(EOFError):  # it may end within a paste
                while text.strip() and select.select([sys.stdin], [], [], PASTE_SECONDS)[0]:
                    text += "\n" + input()  # not sys.stdin's, which would keep lines for itself, and knows no readline
            if text.strip():
                yield text
    print()


def read_pipe() -> str:
    """Read all of stdin, without the newline that ``echo`` adds."""
    text = sys.stdin.read().rstrip("\n")
    if not text.strip():
        raise UserError('stdin is empty, a prompt was expected: echo "..." | python chat/base.py --checkpoint_dir DIR')
    return text


def check_settings(tokenizer: Tokenizer, *, style: str, system: str | None, **sampling: Any) -> None:
    """Raise one ValueError with all that is wrong before weights are loaded; say if the template hides ``system``."""
    problems, asked = Problems(), with_system(system if style == CHAT else None, [{"role": "user", "content": "?"}])
    problems.expect(system is None or style == CHAT, f"--system needs --prompt_style chat, the prompt style is {style}")
    problems.attempt(check_sampling, **sampling)
    problems.attempt(encode, tokenizer, style, asked)  # finds out if there is such a style, and runs the template
    problems.check()
    if system is not None and hidden_roles(asked, tokenizer.render_chat(asked, add_generation_prompt=True)):
        print(f"[--system: {LEFT_OUT.format('system')}]", file=sys.stderr)


def setup(
    *,
    checkpoint_dir: Path,
    ether_path: Path | None = None,
    lora_path: Path | None = None,
    strength: float = 1.0,
    precision: Literal[tuple(PRECISIONS)] | None = None,
    quantize: str | None = None,
    prompt_style: str | None = None,
    system: str | None = None,
    max_new_tokens: int = 512,
    temperature: float = 0.8,
    top_k: int | None = 200,
    top_p: float | None = None,
    seed: int = 1234,
) -> None:
    """Talk to a model in the terminal, or answer the prompt that comes through a pipe.

    Args:
        checkpoint_dir: folder of a base or merged model.
        ether_path: an unmerged ETHER or OFT adapter of this model.
        lora_path: an unmerged LoRA adapter of this model.
        strength: of the adapter, 0 (the base model) to 1 (all that it learned) and beyond.
        precision: 32-true, bf16-true or 16-true; by default bf16-true on a GPU, 32-true elsewhere.
        quantize: bnb.nf4, bnb.nf4-dq, bnb.fp4, bnb.fp4-dq or bnb.int8: less memory, rougher weights.
        prompt_style: chat (the model's chat template) or a style such as alpaca; by default the one recorded with the
            adapter or the model.
        system: the system message of a conversation; only with the chat template.
        max_new_tokens: the most tokens of an answer.
        temperature: 0 always takes the likeliest token; higher is more varied.
        top_k: draw each token from this many likeliest ones (null: from all).
        top_p: draw each token from the likeliest ones that together have this much probability.
        seed: of the draws.
    """
    folder, device = check_checkpoint_dir(checkpoint_dir), choose_device()
    tokenizer = Tokenizer(folder)
    precision = precision or ("bf16-true" if device.type == "cuda" else "32-true")
    adapter = open_adapter(ether_path, lora_path, strength)
    style = prompt_style or (adapter and adapter.prompt_style) or load_prompt_style(folder)
    sampling = {"max_new_tokens": max_new_tokens, "temperature": temperature, "top_k": top_k, "top_p": top_p}
    check_settings(tokenizer, style=style, system=system, seed=seed, **sampling)
    sys.stdin.reconfigure(errors="replace")  # every tokenizer takes U+FFFD
    text = None if sys.stdin.isatty() else read_pipe()
    with redirect_stdout(sys.stderr):  # stdout is for answers
        model = load_adapted_model(folder, precision, quantize=quantize, device=device, adapter=adapter)
    sampling["generator"] = torch.Generator(device).manual_seed(seed)
    conversation = Conversation(model, tokenizer, style, system=system, sampling=sampling)
    kept = "the conversation is kept" if style == CHAT else "every prompt stands alone"
    how = f"temperature {temperature}" if temperature else "greedy"
    print(f"[{folder.resolve().name}, {precision} on {device}, {how}; prompt style {style}: {kept}]", file=sys.stderr)
    if text is not None:
        show_answer(conversation, text)
    else:
        print("[Ctrl-C stops an answer; at the prompt it quits, as Ctrl-D does]", file=sys.stderr)
        chat_terminal(conversation)


if __name__ == "__main__":
    main(setup)
