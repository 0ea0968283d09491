"""Prompt styles: how an instruction and its input become the text before the response. The only copy of each.

Alpaca's two texts are those of Stanford Alpaca (https://github.com/tatsu-lab/stanford_alpaca). A conversation has no
style of its own: "chat" stands for the template that the model's tokenizer brings along.
"""

from collections.abc import Callable

from lit_gpt.errors import UserError
from lit_gpt.tokenizer import Tokenizer

CHAT = "chat"
"""The style that renders with the chat template of the model."""


def alpaca(instruction: str, input: str) -> str:
    """Return Stanford Alpaca's prompt, in its form with an input or the one without."""
    if input:
        opening = "an instruction that describes a task, paired with an input that provides further context."
        task = f"### Instruction:\n{instruction}\n\n### Input:\n{input}"
    else:
        opening = "an instruction that describes a task."
        task = f"### Instruction:\n{instruction}"
    request = "Write a response that appropriately completes the request."
    return f"Below is {opening} {request}\n\n{task}\n\n### Response:"


def plain(instruction: str, input: str) -> str:
    """Return the instruction as it is, and the input on the next line."""
    return f"{instruction}\n{input}" if input else instruction


PROMPT_STYLES: dict[str, Callable[[str, str], str]] = {"alpaca": alpaca, "plain": plain}
"""The styles that need no tokenizer, by the name that `--prompt_style` takes."""


def check_style(style: str, tokenizer: Tokenizer | None = None) -> str:
    """Return `style`.

    Raises:
        ValueError: there is no such style, or it is "chat" and `tokenizer` has no chat template.
    """
    if style != CHAT and style not in PROMPT_STYLES:
        raise UserError(f"unknown prompt style {style!r}; choices: {', '.join([*PROMPT_STYLES, CHAT])}")
    if style == CHAT and (tokenizer is None or tokenizer.chat_template is None):
        where = "no tokenizer was given" if tokenizer is None else f"{tokenizer.dir} has no chat template"
        raise UserError(f"prompt style chat: {where}; choose one of {', '.join(PROMPT_STYLES)}")
    return style


def render_prompt(style: str, instruction: str, input: str = "", tokenizer: Tokenizer | None = None) -> str:
    """Return the text that comes before the response.

    Args:
        style: a key of `PROMPT_STYLES`, or "chat".
        instruction: what to do.
        input: what to do it with; may be empty.
        tokenizer: the model's, whose template "chat" needs.

    Raises:
        ValueError: as `check_style`.
    """
    check_style(style, tokenizer)
    if style == CHAT:
        messages = [{"role": "user", "content": plain(instruction, input)}]
        return tokenizer.render_chat(messages, add_generation_prompt=True)
    return PROMPT_STYLES[style](instruction, input)


def encode_prompt(tokenizer: Tokenizer, style: str, *, instruction: str, input: str = "") -> list[int]:
    """Return the ids that stand before the response, the same in training data as when the model is asked.

    BOS goes in front where the tokenizer puts it, except before a chat, whose template writes it itself.
    """
    text = render_prompt(style, instruction, input, tokenizer)
    return tokenizer.encode(text, bos=tokenizer.adds_bos and style != CHAT)
