"""The monitor's figures equal what the dense matrices say."""

import math

import pytest
import torch
from helpers import adapted_model, dense

from lit_gpt.adapter import adapter_layers, adapter_state
from lit_gpt.ether import METHODS, EtherLayer
from lit_gpt.monitor import COLUMNS, measure, summarise


@pytest.mark.parametrize("method", [*METHODS, "lora"])
def test_figures_are_those_of_the_dense_matrices(method):
    start = adapter_state(adapted_model("gqa_tied", method, started=True))
    gpt = adapted_model("gqa_tied", method)
    layers = dict(adapter_layers(gpt))
    rows = list(measure(gpt, start))
    assert {name for row in rows for name in row} <= set(COLUMNS)
    for row in rows:
        name, _, suffix = row["part"].partition(" ")
        layer = layers[name]
        part = next(part for part in layer.parts if part.suffix == suffix)
        weight = layer.weight[part.rows]
        change = (layer.merged_rows(part, weight) - weight).norm() / weight.norm()
        assert row["weight_change"] == pytest.approx(change.item(), rel=1e-6)
        if not isinstance(layer, EtherLayer):
            continue
        vectors = layer.vectors(part, row["side"])
        blocks = [dense(method, [vector[r].double() for vector in vectors]) for r in range(2)]
        distances = [(block - torch.eye(len(block))).norm().item() for block in blocks]
        if method == "ether":
            assert distances == pytest.approx([2.0, 2.0])
            now, before = vectors[0], start[f"{name}.{layer.names(part, row['side'])[0]}"].flatten(0, len(layer.lead))
            cosines = torch.cosine_similarity(now, before, dim=-1).abs()
            assert row["angle_max"] == pytest.approx(math.degrees(cosines.detach().min().arccos()), rel=1e-4)
        else:
            assert row["distance_max"] == pytest.approx(max(distances), rel=1e-4)
            assert row["distance_mean"] == pytest.approx(sum(distances) / 2, rel=1e-4)
        if METHODS[method].tensors == 2:
            assert row["distance_max"] == pytest.approx(math.sqrt(2) * math.sin(math.radians(row["angle_max"])))
    assert summarise(rows).startswith("weights moved ")


def test_nothing_has_moved_at_the_start():
    gpt = adapted_model("mha_bias", "etherplusHH", started=True)
    rows = list(measure(gpt, adapter_state(gpt)))
    assert {row["weight_change"] for row in rows} == {0.0}
    assert max(row["distance_max"] for row in rows) < 1e-6
