"""LoRA (Hu et al., 2106.09685) behind the same five verbs as ETHER: configure, add, mark, merge, filter.

The baseline that ETHER is compared with: y = W x + b + (alpha / r) B A x. Parameter names are Lit-GPT's; in the fused
q, k, v the A of the adapted parts are stacked (r rows each) in ``lora_A``, and so are their B in ``lora_B``.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lit_gpt import adapter
from lit_gpt.adapter import AdapterConfig, AdapterLayer, Part
from lit_gpt.errors import UserError
from lit_gpt.model import GPT, QKVLinear


@dataclass
class LoraConfig(AdapterConfig):
    """Settings of LoRA."""

    kind: ClassVar[str] = "lora"

    r: int = 8
    """Rank."""
    alpha: float = 16
    """The update is scaled by alpha / r."""
    dropout: float = 0.0
    """Dropout on the input of the low-rank branch."""

    def __post_init__(self) -> None:
        if self.r < 1:
            raise UserError(f"the rank must be at least 1, got {self.r}")
        if not 0.0 <= self.dropout < 1.0:
            raise UserError(f"dropout must be in [0, 1), got {self.dropout}")


class LoraLayer(AdapterLayer):
    """A Linear with a low-rank branch beside each adapted part."""

    def make_parameters(self) -> None:
        """Register A, drawn as a Linear's weight, and B = 0: the branch starts at nothing."""
        r, adapted = self.adapter_config.r, [part for part in self.parts if part.adapted]
        rows = sum(part.size for part in adapted)
        self.scaling = self.adapter_config.alpha / r
        self.lora_A = nn.Parameter(torch.empty(r * len(adapted), self.in_features, **self.factory))
        self.lora_B = nn.Parameter(torch.zeros(rows, r, **self.factory))
        nn.init.kaiming_uniform_(self.lora_A, a=math.sqrt(5))

    def factors(self) -> dict[str, tuple[Tensor, Tensor]]:
        """Return A (r, in) and B (rows, r) of each adapted part, by its suffix."""
        adapted = [part for part in self.parts if part.adapted]
        a = self.lora_A.split(self.adapter_config.r)
        b = self.lora_B.split([part.size for part in adapted])
        return {part.suffix: pair for part, pair in zip(adapted, zip(a, b, strict=True), strict=True)}

    def adapted(self, x: Tensor) -> list[Tensor]:
        """Return W x + b plus the branch of each part; the adapter's fp32 parameters multiply in x's dtype."""
        outputs = [self.product(part, x) for part in self.parts]
        x = F.dropout(x, self.adapter_config.dropout, self.training)
        down = iter(F.linear(x, self.lora_A.to(x.dtype)).split(self.adapter_config.r, dim=-1))  # one product for all
        branches = self.factors()
        for index, part in enumerate(self.parts):
            if part.adapted:
                up = F.linear(next(down), branches[part.suffix][1].to(x.dtype))
                outputs[index] = outputs[index] + up * self.scaling
        return outputs

    def merged_rows(self, part: Part, rows: Tensor) -> Tensor:
        """Return W + (alpha / r) B A of one part."""
        a, b = self.factors()[part.suffix]
        return rows + self.scaling * (b @ a).to(rows.dtype)

    def low_rank(self, part: Part, rows: Tensor) -> tuple[Tensor, Tensor]:
        """Return A and (alpha / r) B of one part."""
        a, b = self.factors()[part.suffix]
        return a, self.scaling * b

    def elementwise_flops(self, positions: float) -> float:
        """Return the FLOPs of a step outside of matrix products, forward and backward.

        For each output and position, the branch is scaled and added, its gradient scaled (3); its gradient is added to
        the input's (1 an input).
        """
        return positions * (self.in_features + 3 * self.lora_B.size(0))


class LoraLinear(LoraLayer):
    """Any Linear but the fused q, k, v."""


class LoraQKVLinear(LoraLayer, QKVLinear):
    """The fused q, k, v, each with a branch of its own."""


def add_lora(model: GPT, config: LoraConfig) -> None:
    """Put LoRA layers in the place of the Linears that the config's targets name; works on the meta device."""
    adapter.replace_targets(model, config, plain=LoraLinear, fused=LoraQKVLinear)


def set_lora_strength(state: Mapping[str, Tensor], _: LoraConfig, strength: float) -> dict[str, Tensor]:
    """Return an adapter's tensors with its branches scaled by ``strength``."""
    return {name: strength * tensor if name.endswith("lora_B") else tensor for name, tensor in state.items()}


def lora_filter(name: str, _: Any = None) -> bool:
    """Return True for names of LoRA parameters."""
    return ".lora_" in name


mark_only_lora_as_trainable = adapter.mark_only_adapter_as_trainable
merge_lora_weights = adapter.merge_adapter_weights
