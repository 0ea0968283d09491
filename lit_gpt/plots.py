"""Pictures of runs, one run's losses and several runs beside each other, and the paper for any other picture.

matplotlib is imported when a picture is drawn: it takes as long as the rest of the package.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from statistics import fmean
from typing import Any

from lit_gpt.files import atomic_write

Points = list[tuple[float, float]]
"""Optimizer steps with a value each."""


def draw_losses(path: Path, rows: list[dict[str, float]], *, names: Mapping[str, str], title: str) -> None:
    """Draw training and validation losses; ``names`` are those of the validations, by their column in ``rows``."""
    losses = points_of(rows, "loss")
    means = [(step, fmean(loss for _, loss in losses[max(0, i - 9) : i + 1])) for i, (step, _) in enumerate(losses)]
    with picture(path) as axes:
        axes.plot(*zip(*losses, strict=True), label="training, each step", color="0.8", linewidth=1)
        axes.plot(*zip(*means, strict=True), label="training, mean of ten steps", color="0.5")
        for name, label in names.items():
            axes.plot(*zip(*points_of(rows, name), strict=True), label=label, marker="o")
        axes.set(xlabel="optimizer step", ylabel="cross entropy (nats per token)", title=title)


def compare_runs(path: Path | str, runs: Mapping[str, Points], *, ylabel: str, xlabel: str = "optimizer step") -> None:
    """Draw a curve of each run, by name."""
    with picture(path) as axes:
        for name, points in runs.items():
            # No formula; and behind a space of no width, since names that begin with "_" are left out.
            label = "\u200b" + name.replace("$", r"\$")
            axes.plot(*zip(*points, strict=True), label=label, marker="o", markersize=3)
        axes.set(xlabel=xlabel, ylabel=ylabel)
        axes.grid(alpha=0.3)


def points_of(rows: list[dict[str, float]], column: str) -> Points:
    """Return the steps at which a column of metrics.csv has a value, with it."""
    return [(row["step"], row[column]) for row in rows if column in row]


@contextmanager
def picture(path: Path | str, *, size: tuple[float, float] = (7, 4)) -> Iterator[Any]:
    """Yield axes to draw into, and write the picture with a legend below."""
    from matplotlib.figure import Figure  # without pyplot: no display is asked for

    figure = Figure(figsize=size, layout="constrained")
    axes = figure.subplots()
    yield axes
    names = axes.get_legend_handles_labels()[1]
    figure.legend(loc="outside lower center", ncols=2 if max(map(len, names)) < 50 else 1, fontsize="small")
    with atomic_write(path) as temporary:
        figure.savefig(temporary, format="png", dpi=110)
