"""Pictures of runs, one run's losses and several runs beside each other, and the paper for any other picture.

matplotlib is imported when a picture is drawn: it takes as long as the rest of the package.
"""

import os
from collections.abc import Iterable, Iterator, Mapping
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
    curves = [
        (losses, dict(label="training, each step", color="0.8", linewidth=1)),
        (means, dict(label="training, mean of ten steps", color="0.5")),
    ]
    for (name, label), color in zip(names.items(), ("tab:blue", "tab:orange"), strict=False):
        curves.append((points_of(rows, name), dict(label=label, color=color, marker="o")))
    draw(path, curves, ylabel="cross entropy (nats per token)", title=title)


def compare_runs(path: Path | str, runs: Mapping[str, Points], *, ylabel: str) -> None:
    """Draw a curve of each run, by name."""
    curves = []
    for index, (name, points) in enumerate(runs.items()):
        # After ten runs the colours come again, in another style.
        line = dict(color=f"C{index % 10}", linestyle=("-", "--", ":")[index // 10 % 3])
        curves.append((points, dict(label=name, marker="o" if len(points) < 40 else None, markersize=4, **line)))
    draw(path, curves, ylabel=ylabel, grid=True)


def points_of(rows: list[dict[str, float]], name: str) -> Points:
    """Return the steps at which a column of metrics.csv has a value, with it."""
    return [(row["step"], row[name]) for row in rows if name in row]


def draw(
    path: Path | str,
    curves: Iterable[tuple[Points, dict[str, Any]]],
    *,
    ylabel: str,
    title: str = "",
    grid: bool = False,
) -> None:
    """Write a picture of curves, each with matplotlib's options for its line, over a legend."""
    with picture(path) as axes:
        for points, options in curves:
            axes.plot(*zip(*points, strict=True), **options)
        axes.set(xlabel="optimizer step", ylabel=ylabel, title=title)
        if grid:
            axes.grid(alpha=0.3)


@contextmanager
def picture(path: Path | str, *, size: tuple[float, float] = (7, 4)) -> Iterator[Any]:
    """Yield axes to draw into, and write the picture with a legend below."""
    os.environ.setdefault("MPLBACKEND", "Agg")
    from matplotlib.figure import Figure

    figure = Figure(figsize=size, layout="constrained")
    axes = figure.subplots()
    yield axes
    names = axes.get_legend_handles_labels()[1]
    figure.legend(loc="outside lower center", ncols=2 if max(map(len, names)) < 50 else 1, fontsize="small")
    with atomic_write(path) as temporary:
        figure.savefig(temporary, format="png", dpi=110)
