"""Print the quickstart's closing table from the files of its run.

python scripts/demo/closing_table.py --run_dir logs/quickstart
"""

import math
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # runs from any folder

from lit_gpt.cli import main
from lit_gpt.files import read_json

KINDS = 8
SCORES = ("acc,none", "acc_stderr,none")


def percent(value: float, error: float) -> str:
    """Return a share and its standard error in per cent."""
    return f"{100 * value:.1f} ± {100 * error:.1f} %"


def rows(run_dir: Path) -> list[tuple[str, ...]]:
    """Return the table's rows: what, and one value or those before and after training."""
    summary = read_json(run_dir / "run" / "summary.json")
    found = [read_json(run_dir / f"accuracy_{when}.json") for when in ("before", "after")]
    held_out = found[0]["n-samples"]["request_kinds"]["effective"]
    shares, errors = zip(
        *([result["results"]["request_kinds"][name] for name in SCORES] for result in found), strict=True
    )
    rise, error = shares[1] - shares[0], math.hypot(*errors)
    losses = (summary[f"val_response_loss_{when}"] for when in ("before", "after"))
    return [
        ("", "before", "after"),
        (f"right of {held_out} held-out requests", *map(percent, shares, errors)),
        ("by chance", f"{100 / KINDS:.1f} %"),
        ("rise", f"{100 * rise:.1f} ± {100 * error:.1f} points: {rise / error:.1f} standard errors"),
        ("validation loss", *("none" if loss is None else f"{loss:.4f}" for loss in losses)),  # null: it was not finite
        ("method", str(summary["method"])),
        ("trainable parameters", f"{summary['trainable_parameters']:,}"),
        ("adapter file", f"{summary['adapter_bytes']:,} bytes"),
        ("steps, rows", f"{summary['steps']}, {summary['samples']}"),
        ("training speed", f"{summary['tokens_per_second']:,.0f} real tokens/s"),
        ("peak memory", f"{summary['peak_memory_bytes'] / 2**30:.2f} GiB"),
        ("loss curve", f"{run_dir}/run/loss.png"),
    ]


def setup(*, run_dir: str) -> None:
    """Print the closing table of a quickstart.

    Args:
        run_dir: the quickstart's folder.
    """
    for what, *values in rows(Path(run_dir)):
        print(f"  {what:<34} {' '.join(f'{value:<22}' for value in values)}".rstrip())


if __name__ == "__main__":
    main(setup)
