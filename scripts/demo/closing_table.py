"""Print what came of the quickstart from the files of its run: answers side by side, and a table.

python scripts/demo/closing_table.py --run_dir logs/quickstart
"""

import json
import math
import sys
from pathlib import Path
from textwrap import shorten
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # runs from any folder

from lit_gpt.cli import main
from lit_gpt.files import read_json

KINDS = 8
WIDTHS = (42, 22, 26, 22)
SCORES = ("acc,none", "acc_stderr,none")


def answers(folder: Path) -> list[dict[str, Any]]:
    """Return the newest samples of the task in which the model answers itself: request, right kind, answer."""
    path = max(folder.glob("samples_request_answers_*.jsonl"))
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def percent(value: float, error: float) -> str:
    """Return a share and its standard error in per cent."""
    return f"{100 * value:.1f} ± {100 * error:.1f} %"


def rows(run_dir: Path) -> list[tuple[str, ...]]:
    """Return the table's rows: what, and one value or those before and after training."""
    summary = read_json(run_dir / "run" / "summary.json")
    found = [read_json(run_dir / when / "results.json") for when in ("before", "after")]
    held_out = found[0]["n-samples"]["request_kinds"]["effective"]
    shares, errors = ([result["results"]["request_kinds"][name] for result in found] for name in SCORES)
    rise, error = shares[1] - shares[0], max(math.hypot(*errors), 1e-9)
    losses = (summary[f"val_response_loss_{when}"] for when in ("before", "after"))
    return [
        ("", "before", "after"),
        (f"right of {held_out} held-out requests", *map(percent, shares, errors)),
        ("by chance", f"{100 / KINDS:.1f} %"),
        ("rise", f"{100 * rise:.1f} ± {100 * error:.1f} points: {rise / error:.1f} standard errors"),
        ("validation loss", *("none" if loss is None else f"{loss:.4f}" for loss in losses)),  # null: it was not finite
        ("trainable parameters", f"{summary['trainable_parameters']:,}"),
        ("adapter file", f"{summary['adapter_bytes']:,} bytes"),
        ("trained on", f"{summary['samples']:,} rows, in {summary['steps']} steps of {summary['method']}"),
        ("peak memory", f"{summary['peak_memory_bytes'] / 2**30:.2f} GiB"),
        ("loss curve", f"{run_dir}/run/loss.png"),
    ]


def setup(*, run_dir: str) -> None:
    """Print the answers and the closing table of a quickstart.

    Args:
        run_dir: the quickstart's folder.
    """
    folder = Path(run_dir)
    lines = [("the first held-out request of each kind", "its kind", "before", "after")]
    for before, after in zip(answers(folder / "before"), answers(folder / "after"), strict=True):
        told = (sample["filtered_resps"][0] for sample in (before, after))
        lines.append((before["doc"]["messages"][1]["content"], before["target"], *told))
    for cells in lines:
        short = (shorten(text, width, placeholder="...") for text, width in zip(cells, WIDTHS, strict=True))
        print(" ", *(f"{text:<{width}} " for text, width in zip(short, WIDTHS, strict=True)))
    print()
    for what, *values in rows(folder):
        print(f"  {what:<34} {' '.join(f'{value:<22}' for value in values)}".rstrip())


if __name__ == "__main__":
    main(setup)
