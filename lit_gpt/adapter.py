"""What ETHER and LoRA have in common: which Linears are adapted, and layers that take their place.

An adapter layer *is* the layer that it replaces (a subclass of ``nn.Linear`` or ``QKVLinear`` that adopts its weight
and bias), so base checkpoints load under unchanged keys and a merged file is one without the adapter's keys. Merging
is an explicit call, never a side effect of ``train()`` or ``eval()``.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import accumulate
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lit_gpt.errors import UserError
from lit_gpt.model import GPT, QKVLinear
from lit_gpt.reflections import working_dtype

TARGETS = ("query", "key", "value", "projection", "mlp", "head")
"""What can be adapted; adapter configs have a boolean field of each name."""
QKV_SUFFIX = {"query": "q", "key": "k", "value": "v"}


class AdapterConfig:
    """Settings of an adapter; a dataclass, whose fields are the flags of its finetune script.

    ``kind`` names the family of adapters, and begins the flags of all fields but ``unprefixed``.
    """

    kind: ClassVar[str]
    unprefixed: ClassVar[tuple[str, ...]] = ()

    @classmethod
    def flag(cls, name: str) -> str:
        """Return the name of a field's flag."""
        return name if name in cls.unprefixed else f"{cls.kind}_{name}"


@dataclass(frozen=True)
class Part:
    """Some rows of a Linear with an adapter of their own: all of them, or those of q, k or v.

    ``suffix`` ends the names of its parameters: ``""`` for a plain Linear, ``q``, ``k`` or ``v`` in a fused one.
    """

    suffix: str
    start: int
    stop: int
    adapted: bool

    @property
    def rows(self) -> slice:
        """Where in the weight."""
        return slice(self.start, self.stop)

    @property
    def index(self) -> int:
        """Its place among the parts of its Linear."""
        return "qkv".index(self.suffix)  # torch.compile cannot look it up in a tuple of parts

    @property
    def size(self) -> int:
        """How many."""
        return self.stop - self.start


class AdapterLayer(nn.Linear):
    """A Linear with an adapter; subclasses say what the adapter does.

    ``active`` is false once merged, and while ``adapters_off``: the layer is then a plain Linear.
    """

    parts: tuple[Part, ...]
    quantized: Any  # a quantize.QuantizedWeight in the place of the weight, or None
    active: bool = True
    merged: bool = False

    def adopt(self, base: nn.Linear, targets: set[str]) -> None:
        """Take over the weight and bias of ``base`` and cut its rows into parts, those in ``targets`` adapted."""
        self.weight, self.bias, self.quantized = base.weight, base.bias, getattr(base, "quantized", None)
        if not isinstance(base, QKVLinear):
            self.parts = (Part("", 0, base.out_features, True),)
            return
        stops = tuple(accumulate(base.sizes))
        self.parts = tuple(
            Part(suffix, stop - size, stop, target in targets)
            for (target, suffix), stop, size in zip(QKV_SUFFIX.items(), stops, base.sizes, strict=True)
        )

    @property
    def factory(self) -> dict[str, Any]:
        """Device and dtype of the adapter's parameters: fp64 over fp64 (gradient checks), else fp32 masters."""
        weight = self.weight if self.quantized is None else self.quantized[0].weight
        return {"device": weight.device, "dtype": working_dtype(weight.dtype)}

    def own_parameters(self) -> dict[str, nn.Parameter]:
        """The adapter's parameters, by name."""
        return {name: p for name, p in self.named_parameters(recurse=False) if name not in ("weight", "bias")}

    def forward(self, x: Tensor) -> Tensor | tuple[Tensor, ...]:
        """(..., in) to (..., out), or to q, k and v apart."""
        outputs = self.adapted(x) if self.active else [self.product(part, x) for part in self.parts]
        return outputs[0] if len(outputs) == 1 else tuple(outputs)

    def product(self, part: Part, x: Tensor) -> Tensor:
        """W x + b of one part."""
        if self.quantized is not None:
            return self.quantized.product(part.index, x, self.bias_of(part))
        return F.linear(x, self.weight[part.rows], self.bias_of(part))

    def weight_of(self, part: Part) -> Tensor:
        """The (rows, in) weight of one part, to look at; a quantized one is dequantized for it."""
        return self.weight[part.rows] if self.quantized is None else self.quantized.dequantized(part.index)

    def bias_of(self, part: Part) -> Tensor | None:
        """One part's share of the bias."""
        return None if self.bias is None else self.bias[part.rows]

    def adapted(self, x: Tensor) -> list[Tensor]:
        """The output of each part with its adapter in place."""
        raise NotImplementedError

    def merged_rows(self, part: Part, rows: Tensor) -> Tensor:
        """The adapted weight of one part, from its (rows, in) weight in fp32 or fp64."""
        raise NotImplementedError

    @torch.no_grad()
    def merge(self) -> None:
        """Put the adapter into the weight, computed in fp32 (fp64 for fp64) and cast once; twice is once."""
        if self.merged:
            return
        if self.quantized is not None:
            raise UserError("a quantized weight cannot take an adapter; merge its file into the unquantized base")
        wide = working_dtype(self.weight.dtype)
        rows = [
            self.merged_rows(part, self.weight[part.rows].to(wide)) if part.adapted else self.weight[part.rows]
            for part in self.parts
        ]
        weight = torch.cat([part.to(self.weight.dtype) for part in rows])
        if not torch.isfinite(weight).all():
            raise UserError(
                "merging gives weights that are not finite: the adapter holds a zero vector, NaN or infinity"
            )
        self.weight = nn.Parameter(weight, requires_grad=self.weight.requires_grad)
        self.merged, self.active = True, False


def linear_targets(model: GPT, config: Any) -> Iterator[tuple[str, nn.Module, str, nn.Linear, set[str]]]:
    """Every Linear that the config's targets name: (full name, parent, attribute, the Linear, its targets).

    A mixture's router is never adapted.
    """
    wanted = {target for target in TARGETS if getattr(config, target)}
    for name, parent in model.named_modules():
        for attribute, child in parent.named_children():
            if not isinstance(child, nn.Linear):
                continue
            targets = wanted & _targets_of(f"{name}.{attribute}".strip("."))
            if targets:
                yield f"{name}.{attribute}".strip("."), parent, attribute, child, targets


def _targets_of(name: str) -> set[str]:
    if name == "lm_head":
        return {"head"}
    if name.endswith("attn.attn"):
        return set(QKV_SUFFIX)
    if name.endswith("attn.proj"):
        return {"projection"}
    if name.endswith("mlp.gate") or ".quantized." in name:  # what a quantized Linear consists of
        return set()
    return {"mlp"}


def replace_targets(model: GPT, config: Any, *, plain: type[AdapterLayer], fused: type[AdapterLayer]) -> None:
    """Put an adapter layer, ``plain`` or ``fused`` (q, k, v), in the place of every Linear that the config names."""
    if any(isinstance(module, AdapterLayer) for module in model.modules()):
        raise UserError("the model already has an adapter; merge it first")
    found = list(linear_targets(model, config))
    if not found:
        raise UserError(f"no adapter target is enabled; enable at least one of {', '.join(TARGETS)}")
    for _, parent, attribute, linear, targets in found:
        layer = fused if isinstance(linear, QKVLinear) else plain
        setattr(parent, attribute, layer(linear, config, targets))


def adapter_layers(model: nn.Module) -> Iterator[tuple[str, AdapterLayer]]:
    """The adapter layers of a model, by name."""
    return ((name, module) for name, module in model.named_modules() if isinstance(module, AdapterLayer))


def adapter_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters of a model's adapters, by full name."""
    return {
        f"{name}.{own}": parameter
        for name, layer in adapter_layers(model)
        for own, parameter in layer.own_parameters().items()
    }


def adapter_state(model: nn.Module) -> dict[str, Tensor]:
    """A copy of the adapters' parameters on the CPU, each in a storage of its own."""
    return {name: p.detach().to("cpu", copy=True) for name, p in adapter_parameters(model).items()}


def mark_only_adapter_as_trainable(model: nn.Module) -> None:
    """Freeze everything but the adapters."""
    model.requires_grad_(False)
    for parameter in adapter_parameters(model).values():
        parameter.requires_grad_(True)


def merge_adapter_weights(model: GPT) -> None:
    """Merge every adapter layer. A tied head that was adapted is untied: the embedding stays as it is."""
    for name, layer in adapter_layers(model):
        try:
            layer.merge()
        except UserError as error:
            raise UserError(f"{name}: {error}") from error
        if name == "lm_head":
            model.config.tie_embeddings = False


@contextmanager
def adapters_off(model: nn.Module) -> Iterator[None]:
    """Inside, the model is its base."""
    layers = [layer for _, layer in adapter_layers(model) if not layer.merged]
    for layer in layers:
        layer.active = False
    try:
        yield
    finally:
        for layer in layers:
            layer.active = True
