"""Ask a model the quickstart's first held-out request of each kind, and show its answers beside the right ones.

    python scripts/demo/ask.py --checkpoint_dir logs/quickstart/merged --out_file logs/quickstart/answers_after.json \
        --before logs/quickstart/answers_before.json

Nothing is picked by hand, and the answer is what chat gives, greedily: the likeliest token each time.
"""

import json
import sys
from pathlib import Path
from textwrap import shorten

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # runs from any folder

from lit_gpt.checkpoint import load_model
from lit_gpt.cli import main
from lit_gpt.devices import choose_device
from lit_gpt.files import read_json, write_json
from lit_gpt.generate import generate
from lit_gpt.tokenizer import Tokenizer

HELD_OUT = Path(__file__).parent / "requests" / "test.jsonl"
WIDTHS = (44, 22, 22, 22)


def setup(*, checkpoint_dir: str, out_file: Path, before: Path | None = None, precision: str = "32-true") -> None:
    """Ask a model one request of each kind.

    Args:
        checkpoint_dir: the model.
        out_file: where its answers go, as JSON, by kind.
        before: such a file of another model, to show beside.
        precision: 32-true, bf16-true or 16-true.
    """
    rows = [json.loads(line)["messages"] for line in HELD_OUT.read_text(encoding="utf-8").splitlines()]
    first = {kind["content"]: prompt for *prompt, kind in reversed(rows)}  # the first of a kind stays
    tokenizer, model = Tokenizer(checkpoint_dir), load_model(checkpoint_dir, precision, device=choose_device())
    columns = {"before": read_json(before), "after": {}} if before else {"before": {}}
    answers = [*columns.values()][-1]
    print_row("request", "its kind", *columns)
    for kind, prompt in sorted(first.items()):
        ids = tokenizer.encode(tokenizer.render_chat(prompt, add_generation_prompt=True), bos=False)
        answers[kind] = tokenizer.decode(list(generate(model, ids, max_new_tokens=24, stop_ids=tokenizer.stop_ids)))
        print_row(prompt[-1]["content"], kind, *(answered[kind] for answered in columns.values()))
    write_json(out_file, answers)


def print_row(*cells: str) -> None:
    """Print texts in columns, each on one line and cut where it is too long."""
    for text, width in zip(cells, WIDTHS, strict=False):
        print(f"  {shorten(text, width, placeholder='...'):<{width}}", end="")
    print(flush=True)


if __name__ == "__main__":
    main(setup)
