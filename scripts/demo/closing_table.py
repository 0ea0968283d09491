"""Print the quickstart's closing table from the files of its run.

python scripts/demo/closing_table.py --run_dir logs/quickstart
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # runs from any folder

from lit_gpt.cli import main
from lit_gpt.files import read_json


def accuracy(path: Path) -> str:
    """Return ARC's accuracy and its standard error in per cent, from a results file of eval/lm_eval_harness.py."""
    scores = read_json(path)["results"]["arc_challenge"]
    return f"{100 * scores['acc,none']:.1f} ± {100 * scores['acc_stderr,none']:.1f} %"


def rows(run_dir: Path) -> list[tuple[str, ...]]:
    """Return the table's rows: what, and one value or those before and after training."""
    summary = read_json(run_dir / "run" / "summary.json")
    questions = read_json(run_dir / "arc_before.json")["n-samples"]["arc_challenge"]["effective"]
    losses = (summary[f"val_response_loss_{when}"] for when in ("before", "after"))
    return [
        ("", "before", "after"),
        ("validation loss", *("none" if loss is None else f"{loss:.4f}" for loss in losses)),  # null: it was not finite
        (f"ARC accuracy ({questions} questions)", *(accuracy(run_dir / f"arc_{t}.json") for t in ("before", "after"))),
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
        print(f"  {what:<28} {' '.join(f'{value:<22}' for value in values)}".rstrip())


if __name__ == "__main__":
    main(setup)
