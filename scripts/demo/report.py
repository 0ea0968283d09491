"""Print the quickstart's closing table from the files of its run.

python scripts/demo/report.py --run_dir logs/quickstart
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # runs from any folder

from lit_gpt.cli import main
from lit_gpt.files import read_json


def accuracy(path: Path) -> str:
    """ARC's accuracy and its standard error in per cent, from a results file of eval/lm_eval_harness.py."""
    scores = read_json(path)["results"]["arc_challenge"]
    return f"{100 * scores['acc,none']:.1f} ± {100 * scores['acc_stderr,none']:.1f} %"


def change(summary: dict, name: str) -> tuple[str, str]:
    """The values before and after training of the summary's `name`."""
    values = (summary[f"{name}_{when}"] for when in ("before", "after"))
    return tuple("none" if value is None else f"{value:.4f}" for value in values)  # null: it was not finite


def rows(run_dir: Path) -> list[tuple[str, str, str]]:
    """The table: (what, before, after); the last column is empty where there is one value."""
    summary = read_json(run_dir / "run" / "summary.json")
    questions = read_json(run_dir / "arc_before.json")["n-samples"]["arc_challenge"]["effective"]
    return [
        ("", "before", "after"),
        ("validation loss", *change(summary, "val_response_loss")),
        (f"ARC accuracy ({questions} questions)", *(accuracy(run_dir / f"arc_{t}.json") for t in ("before", "after"))),
        ("method", str(summary["method"]), ""),
        ("trainable parameters", f"{summary['trainable_parameters']:,}", ""),
        ("adapter file", f"{summary['adapter_bytes']:,} bytes", ""),
        ("steps, rows", f"{summary['steps']}, {summary['samples']}", ""),
        ("training speed", f"{summary['tokens_per_second']:,.0f} real tokens/s", ""),
        ("peak memory", f"{summary['peak_memory_bytes'] / 2**30:.2f} GiB", ""),
    ]


def setup(*, run_dir: str) -> None:
    """Print the closing table of a quickstart.

    Args:
        run_dir: the quickstart's folder.
    """
    for what, before, after in rows(Path(run_dir)):
        print(f"  {what:<28} {before:<22} {after}".rstrip())
    print(f"  {'loss curve':<28} {run_dir}/run/loss.png")


if __name__ == "__main__":
    main(setup)
