"""What a run leaves for people: metrics.csv while it goes, summary.json and loss.png when it ends."""

import csv
import os
import resource
import sys
from pathlib import Path
from typing import Any

import torch

from lit_gpt.checkpoint import atomic_write, write_json

COLUMNS = (
    "step", "samples", "tokens", "loss", "learning_rate", "seconds", "val_loss", "val_response_loss",
)  # fmt: skip


class Metrics:
    """Appends rows to metrics.csv, each flushed: what was measured survives whatever comes next.

    Attributes:
        rows: those written so far, empty values left out.
    """

    def __init__(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self.rows: list[dict[str, float]] = []
        self._file = path.open("w", newline="", encoding="utf-8")
        self._writer = csv.DictWriter(self._file, COLUMNS)
        self._writer.writeheader()

    def write(self, **values: float) -> None:
        """Add a row; columns that are not given stay empty."""
        self.rows.append(values)
        self._writer.writerow({name: f"{value:.6g}" for name, value in values.items()})
        self._file.flush()

    def close(self) -> None:
        """Close the file."""
        self._file.close()


def peak_memory_bytes() -> int:
    """On a GPU the allocator's peak; on a CPU the largest resident size of this process."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    unit = 1 if sys.platform == "darwin" else 1024  # macOS counts bytes, Linux kibibytes
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def write_summary(run_dir: Path, summary: dict[str, Any], metrics: Metrics) -> None:
    """Write summary.json and the loss curves, and print the lines that matter."""
    write_json(run_dir / "summary.json", summary)
    draw_losses(run_dir / "loss.png", metrics.rows, title=str(summary["method"]))
    for name, label in (("val_loss", "validation loss"), ("val_response_loss", "  on responses alone")):
        print(f"{label:<22} {summary[f'{name}_before']:.4f} -> {summary[f'{name}_after']:.4f}")
    print(f"{'trained':<22} {summary['trainable_parameters']:,} parameters, {summary['adapter_bytes']:,} bytes on disk")
    print(
        f"{'time':<22} {summary['seconds']:.0f} s for {summary['steps']} steps, "
        f"{summary['tokens_per_second']:.0f} real tokens/s, {summary['padding']:.0%} padding"
    )
    print(f"{'peak memory':<22} {summary['peak_memory_bytes'] / 2**30:.2f} GiB")
    print(f"{'loss curve':<22} {run_dir / 'loss.png'}")


def draw_losses(path: Path, rows: list[dict[str, float]], *, title: str) -> None:
    """Draw training and validation losses over the steps."""
    os.environ.setdefault("MPLBACKEND", "Agg")
    from matplotlib.figure import Figure  # here: importing it takes as long as the rest of the package

    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    for name, label, style in (
        ("loss", "training, each step", {"color": "0.7", "linewidth": 1}),
        ("val_loss", "validation, all target tokens", {"color": "tab:blue", "marker": "o"}),
        ("val_response_loss", "validation, response tokens", {"color": "tab:orange", "marker": "o"}),
    ):
        points = [(row["step"], row[name]) for row in rows if name in row]
        axes.plot(*zip(*points, strict=True), label=label, **style)
    axes.set(xlabel="optimizer step", ylabel="cross entropy (nats per token)", title=title)
    axes.legend()
    with atomic_write(path) as temporary:
        figure.savefig(temporary, format="png", dpi=110)
