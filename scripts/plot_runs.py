"""Compare runs in one picture: their validation losses over the steps.

    python scripts/plot_runs.py logs/RUN_A logs/RUN_B --out compare.png

Works on unfinished runs too: it reads their metrics.csv.
"""

import json
import math
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # runs from any folder

from lit_gpt.cli import main
from lit_gpt.errors import UserError
from lit_gpt.files import refuse_existing
from lit_gpt.plots import compare_runs, points_of
from lit_gpt.report import METRICS, read_metrics


def setup(
    *, runs: list[str], out: str = "compare.png", column: str = "val_response_loss", overwrite: bool = False
) -> None:
    """Draw the validation curves of several runs.

    Args:
        runs: Run folders, each with a metrics.csv; they may stand first, without the flag.
        out: The picture to write.
        column: What to draw, a column of metrics.csv: val_response_loss, val_loss, loss, grad_norm or learning_rate.
        overwrite: Replace a picture that is there.
    """
    refuse_existing([Path(out)], overwrite)
    curves = {}
    for folder in runs:
        path = Path(folder) / METRICS
        curves[folder] = points_of(read_metrics(path), column)
        if not curves[folder]:
            raise UserError(f"{path} has no {column} yet; let the run reach one, or give another --column")
    compare_runs(out, curves, ylabel=column + " (nats per token)" * ("loss" in column))
    for name, points in sorted(curves.items(), key=lambda item: (math.isnan(item[1][-1][1]), item[1][-1][1])):
        print(f"{name:<{max(map(len, curves))}} {points[0][1]:.4f} -> {points[-1][1]:.4f} at step {points[-1][0]:.0f}")
    print(f"wrote {out}: {column}")


def as_flag(args: list[str]) -> list[str]:
    """Return a command line whose first words, the run folders, are given as --runs."""
    count = next((i for i, word in enumerate(args) if word.startswith("-")), len(args))
    return [*(["--runs", json.dumps(args[:count])] if count else []), *args[count:]]


if __name__ == "__main__":
    sys.argv[1:] = as_flag(sys.argv[1:])
    main(setup)
