"""Measure adapters at validation steps (``--train.monitor true``): distance from I, angles, how far weights would move.

    ETHER   |R - I|_F is 2 for any u; how far u has turned from its start says what was learned
    ETHER+  |R - I|_F = sqrt(2) sin(angle between the axes of u and v), so at most sqrt(2)
    OFT     |R - I|_F, at most 2 sqrt(b)
    all     |W' - W|_F / |W|_F, how far the weights themselves would move if the adapter were merged now

One part's weight is transformed at a time and let go: nothing of a weight's size is kept.
"""

import math
from collections.abc import Iterator, Mapping
from statistics import fmean
from typing import Any

import torch
from torch import Tensor, nn

from lit_gpt.adapter import AdapterLayer, Part, adapter_layers
from lit_gpt.ether import EtherLayer
from lit_gpt.reflections import axis_angle, working_dtype

COLUMNS = (
    "step", "part", "side", "distance_mean", "distance_max", "angle_mean", "angle_max", "weight_change",
)  # fmt: skip
"""Of monitor.csv: |R - I|_F and an angle in degrees over the blocks of one side; the relative change of the weight."""


@torch.no_grad()
def measure(model: nn.Module, start: Mapping[str, Tensor]) -> Iterator[dict[str, Any]]:
    """Yield a row of ``COLUMNS`` (without the step) for each adapted part and side; LoRA has no sides.

    Args:
        model: with its adapter, unmerged.
        start: the ``adapter_state`` that training started from; ETHER's angles are measured from it.
    """
    for name, layer in adapter_layers(model):
        for part in (part for part in layer.parts if part.adapted):
            row = {"part": f"{name} {part.suffix}".strip(), "weight_change": weight_change(layer, part)}
            if not layer.sides:
                yield row
            for side in layer.sides:
                first = start[f"{name}.{layer.names(part, side)[0]}"].flatten(0, len(layer.lead))
                yield row | {"side": side} | block_figures(layer, part, side, first)


def weight_change(layer: AdapterLayer, part: Part) -> float:
    """Return |W' - W|_F / |W|_F of one part."""
    rows = layer.weight_of(part)
    rows = rows.to(working_dtype(rows.dtype))
    return ((layer.merged_rows(part, rows) - rows).norm() / rows.norm()).item()


def block_figures(layer: EtherLayer, part: Part, side: str, start: Tensor) -> dict[str, float]:
    """Return the mean and the largest over the blocks of |R - I|_F where it varies, and of the angle of vectors."""
    first, *rest = (vector.cpu() for vector in layer.vectors(part, side))
    figures = {}
    if layer.method.matrices:
        figures["distance"] = (layer.method.rotation(first) - torch.eye(first.size(-1))).norm(dim=(-2, -1))
    else:
        angle = axis_angle(first, rest[0] if rest else start)
        figures["angle"] = angle.rad2deg()
        if rest:
            figures["distance"] = math.sqrt(2) * angle.sin()
    return {
        f"{name}_{kind}": value.item()
        for name, values in figures.items()
        for kind, value in (("mean", values.mean()), ("max", values.max()))
    }


def summarise(rows: list[dict[str, Any]]) -> str:
    """Return one line for the screen."""
    most = max(rows, key=lambda row: row["weight_change"])
    mean = fmean(row["weight_change"] for row in rows)
    text = f"weights moved {mean:.2%}, at most {most['weight_change']:.2%} ({most['part']})"
    for column, label in (("distance_max", "|R - I|"), ("angle_max", "degrees")):
        if found := [row[column] for row in rows if column in row]:
            text += f"; {label} at most {max(found):.3g}"
    return text
