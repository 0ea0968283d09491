"""What a run leaves for people: metrics.csv while it goes, summary.json and loss.png when it ends."""

import csv
import os
import resource
import sys
from pathlib import Path
from statistics import fmean
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
    for name, label in curves(metrics.rows).items():
        print(f"{label + ' loss':<32} {summary[f'{name}_before']:.4f} -> {summary[f'{name}_after']:.4f}")
    print(f"{'trained':<32} {summary['trainable_parameters']:,} parameters, {summary['adapter_bytes']:,} bytes on disk")
    print(
        f"{'time':<32} {summary['seconds']:.0f} s for {summary['steps']} steps, "
        f"{summary['tokens_per_second']:.0f} real tokens/s, {summary['padding']:.0%} padding"
    )
    print(f"{'peak memory':<32} {summary['peak_memory_bytes'] / 2**30:.2f} GiB")
    print(f"{'loss curve':<32} {run_dir / 'loss.png'}")


def curves(rows: list[dict[str, float]]) -> dict[str, str]:
    """The validation losses that a run has, by column, with their names; one where only responses are learned."""
    if all(row["val_loss"] == row["val_response_loss"] for row in rows if "val_loss" in row):
        return {"val_response_loss": "validation"}
    return {"val_loss": "validation, all target tokens", "val_response_loss": "validation, response tokens"}


def draw_losses(path: Path, rows: list[dict[str, float]], *, title: str) -> None:
    """Draw training and validation losses over the steps."""
    os.environ.setdefault("MPLBACKEND", "Agg")
    from matplotlib.figure import Figure  # here: importing it takes as long as the rest of the package

    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    steps = [row["step"] for row in rows if "loss" in row]
    losses = [row["loss"] for row in rows if "loss" in row]
    axes.plot(steps, losses, label="training, each step", color="0.8", linewidth=1)
    means = [fmean(losses[max(0, i - 9) : i + 1]) for i in range(len(losses))]
    axes.plot(steps, means, label="training, mean of ten steps", color="0.5")
    for (name, label), color in zip(curves(rows).items(), ("tab:blue", "tab:orange"), strict=False):
        points = [(row["step"], row[name]) for row in rows if name in row]
        axes.plot(*zip(*points, strict=True), label=label, color=color, marker="o")
    axes.set(xlabel="optimizer step", ylabel="cross entropy (nats per token)", title=title)
    figure.legend(loc="outside lower center", ncols=2)
    with atomic_write(path) as temporary:
        figure.savefig(temporary, format="png", dpi=110)
