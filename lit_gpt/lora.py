"""LoRA (Hu et al., 2106.09685) behind the same five verbs as ETHER: configure, add, mark, merge, filter.

The baseline that ETHER is compared with: y = W x + b + (alpha / r) B A x. Parameter names are Lit-GPT's; in the fused
q, k, v the A of the adapted parts are stacked (r rows each) in ``lora_A``, and so are their B in ``lora_B``.
"""

import math
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lit_gpt.adapter import (
    AdapterConfig,
    AdapterLayer,
    Part,
    mark_only_adapter_as_trainable,
    merge_adapter_weights,
    replace_targets,
)
from lit_gpt.errors import UserError
from lit_gpt.model import GPT, QKVLinear


@dataclass
class LoraConfig(AdapterConfig):
    """What is adapted, and how."""

    kind: ClassVar[str] = "lora"

    r: int = 8
    """Rank."""
    alpha: float = 16
    """The update is scaled by alpha / r."""
    dropout: float = 0.0
    """Dropout on the input of the low-rank branch."""
    query: bool = True
    """Adapt the query projections."""
    key: bool = False
    """Adapt the key projections."""
    value: bool = True
    """Adapt the value projections."""
    projection: bool = False
    """Adapt the attention's output projections."""
    mlp: bool = False
    """Adapt the MLPs."""
    head: bool = False
    """Adapt the language model's head."""

    def __post_init__(self) -> None:
        if self.r < 1:
            raise UserError(f"the rank must be at least 1, got {self.r}")
        if not math.isfinite(self.alpha) or self.r >= 2**31:
            raise UserError(f"rank {self.r} and alpha {self.alpha} make no scale")
        if not 0.0 <= self.dropout < 1.0:
            raise UserError(f"dropout must be in [0, 1), got {self.dropout}")


class LoraLayer(AdapterLayer):
    """A Linear with a low-rank branch beside each adapted part."""

    def set_up(self, base: nn.Linear, config: LoraConfig, targets: set[str]) -> None:
        """Adopt ``base`` and make A and B."""
        self.adopt(base, targets)
        self.lora_config = config
        self.scaling = config.alpha / config.r
        adapted = [part for part in self.parts if part.adapted]
        rows = sum(part.size for part in adapted)
        self.lora_A = nn.Parameter(torch.empty(config.r * len(adapted), self.in_features, **self.factory))
        self.lora_B = nn.Parameter(torch.empty(rows, config.r, **self.factory))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """A as a Linear starts, B = 0: the branch starts at nothing."""
        if hasattr(self, "lora_A"):  # nn.Linear's constructor calls this before there is anything to draw
            nn.init.kaiming_uniform_(self.lora_A, a=math.sqrt(5))
            nn.init.zeros_(self.lora_B)

    def factors(self) -> dict[str, tuple[Tensor, Tensor]]:
        """A (r, in) and B (rows, r) of each adapted part, by its suffix."""
        adapted = [part for part in self.parts if part.adapted]
        a = self.lora_A.split(self.lora_config.r)
        b = self.lora_B.split([part.size for part in adapted])
        return {part.suffix: pair for part, pair in zip(adapted, zip(a, b, strict=True), strict=True)}

    def adapted(self, x: Tensor) -> list[Tensor]:
        """W x + b plus the branch of each part; the adapter's fp32 parameters multiply in x's dtype."""
        outputs = [self.product(part, x) for part in self.parts]
        x = F.dropout(x, self.lora_config.dropout, self.training)
        down = iter(F.linear(x, self.lora_A.to(x.dtype)).split(self.lora_config.r, dim=-1))  # one product for all
        branches = self.factors()
        for index, part in enumerate(self.parts):
            if part.adapted:
                up = F.linear(next(down), branches[part.suffix][1].to(x.dtype))
                outputs[index] = outputs[index] + up * self.scaling
        return outputs

    def merged_rows(self, part: Part, rows: Tensor) -> Tensor:
        """W + (alpha / r) B A of one part."""
        a, b = self.factors()[part.suffix]
        return rows + self.scaling * (b @ a).to(rows.dtype)


class LoraLinear(LoraLayer):
    """Any Linear but the fused q, k, v."""

    def __init__(self, base: nn.Linear, config: LoraConfig, targets: set[str]) -> None:
        super().__init__(base.in_features, base.out_features, bias=base.bias is not None, device="meta")
        self.set_up(base, config, targets)


class LoraQKVLinear(LoraLayer, QKVLinear):
    """The fused q, k, v, each with a branch of its own."""

    def __init__(self, base: QKVLinear, config: LoraConfig, targets: set[str]) -> None:
        QKVLinear.__init__(self, base.config, device="meta")
        self.set_up(base, config, targets)


def add_lora(model: GPT, config: LoraConfig) -> None:
    """Put LoRA layers in the place of the Linears that the config's targets name; works on the meta device."""
    replace_targets(model, config, plain=LoraLinear, fused=LoraQKVLinear)


def lora_filter(name: str, _: Any = None) -> bool:
    """Whether a parameter's name is a LoRA parameter's."""
    return ".lora_" in name


mark_only_lora_as_trainable = mark_only_adapter_as_trainable
merge_lora_weights = merge_adapter_weights
