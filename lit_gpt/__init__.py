"""The parts of a finetuning run: a GPT, its adapters, its files, its data and its loop."""

from typing import TYPE_CHECKING, Any

from lit_gpt.config import Config

if TYPE_CHECKING:
    from lit_gpt.model import GPT

__all__ = ["GPT", "Config"]


def __getattr__(name: str) -> Any:
    # Importing torch takes seconds, which `download.py` (a list of names) should not cost.
    if name == "GPT":
        from lit_gpt.model import GPT

        return GPT
    raise AttributeError(f"module 'lit_gpt' has no attribute '{name}'")
