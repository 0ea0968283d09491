"""Put adapters on a model, ETHER or LoRA: choose the Linears, take their place, freeze, merge.

An adapter layer *is* the layer that it replaces (a subclass of ``nn.Linear`` or ``QKVLinear`` that adopts its weight
and bias), so base checkpoints load under unchanged keys and a merged file is one without the adapter's keys. Merging
is an explicit call, never a side effect of ``train()`` or ``eval()``. Nothing here knows what a method computes, or
how files look.
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
from lit_gpt.model import GPT, QKVLinear, deinterleave_qkv
from lit_gpt.reflections import working_dtype

QKV = ("query", "key", "value")
TARGETS = (*QKV, "projection", "mlp", "head")
"""Parts of a model that can be adapted; adapter configs have a boolean field of each name."""


@dataclass(kw_only=True)
class AdapterConfig:
    """Settings of an adapter, and the flags of its finetune script: those of every adapter.

    ``kind`` names the family of adapters, and begins the flags of all fields but ``unprefixed``.
    """

    kind: ClassVar[str]
    unprefixed: ClassVar[tuple[str, ...]] = ()

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

    @classmethod
    def flag(cls, name: str) -> str:
        """Return the name of a field's flag."""
        return name if name in cls.unprefixed else f"{cls.kind}_{name}"


@dataclass(frozen=True)
class Part:
    """Some rows of a Linear with an adapter of their own: all of them, or those of the query, key or value.

    Attributes:
        target: one of ``QKV`` in a fused Linear, else "".
        index: its place among the Linear's parts.
        rows: in the weight.
        size: the number of its rows.
        adapted: false for those of q, k and v that stay as they are.
    """

    target: str
    index: int
    rows: slice
    size: int
    adapted: bool

    @property
    def suffix(self) -> str:
        """Return the end of its parameters' names: q, k or v in a fused Linear, else ""."""
        return self.target[:1]


def cut_parts(linear: nn.Linear, targets: set[str]) -> tuple[Part, ...]:
    """Return the parts of a Linear's rows; of a fused one's, those in ``targets`` are adapted."""
    if not isinstance(linear, QKVLinear):
        return (Part("", 0, slice(0, linear.out_features), linear.out_features, adapted=True),)
    stops = accumulate(linear.sizes)
    return tuple(
        Part(target, index, slice(stop - size, stop), size, adapted=target in targets)
        for index, (target, size, stop) in enumerate(zip(QKV, linear.sizes, stops, strict=True))
    )


def rows_in_memory(linear: nn.Linear, weight: Tensor) -> Tensor:
    """Return a file's weight in the row order that the Linear has in memory: q, k and v are interleaved in files."""
    return deinterleave_qkv(weight, linear.config) if isinstance(linear, QKVLinear) else weight


class SplitLinear(nn.Linear):
    """A Linear in another's place, with its weight and bias, which computes its parts one by one.

    Args:
        base: the Linear that it replaces.
        quantized: a ``quantize.QuantizedWeight`` that multiplies in the place of the weight.
        targets: the parts that are adapted.
    """

    def __init__(self, base: nn.Linear, *, quantized: Any = None, targets: set[str] = frozenset()) -> None:
        nn.Module.__init__(self)  # nn.Linear's own would make a weight
        self.in_features, self.out_features = base.in_features, base.out_features
        self.quantized, self.bias = quantized or getattr(base, "quantized", None), base.bias
        self.weight = None if quantized else base.weight
        if isinstance(base, QKVLinear):
            self.sizes, self.config = base.sizes, base.config
        self.parts = cut_parts(base, targets)

    def forward(self, x: Tensor) -> Tensor | tuple[Tensor, ...]:
        """Map (..., in) to (..., out), or to q, k and v apart."""
        outputs = self.outputs(x)
        return outputs[0] if len(outputs) == 1 else tuple(outputs)

    def outputs(self, x: Tensor) -> list[Tensor]:
        """Return the output of each part."""
        return [self.product(part, x) for part in self.parts]

    def product(self, part: Part, x: Tensor) -> Tensor:
        """Return W x + b of one part."""
        if self.quantized is not None:
            return self.quantized.product(part.index, x, self.bias_of(part))
        return F.linear(x, self.weight[part.rows], self.bias_of(part))

    def weight_of(self, part: Part) -> Tensor:
        """Return the (rows, in) weight of one part, to look at; a quantized one is dequantized for it."""
        return self.weight[part.rows] if self.quantized is None else self.quantized.dequantized(part.index)

    def bias_of(self, part: Part) -> Tensor | None:
        """Return one part's share of the bias."""
        return None if self.bias is None else self.bias[part.rows]


class AdapterLayer(SplitLinear):
    """A Linear with an adapter; subclasses say what the adapter does, by these methods:

        make_parameters()          register the adapter's parameters, with the values that training starts from
        adapted(x)                 return the output of each part, with its adapter in place
        merged_rows(part, rows)    return the adapted weight of one part, from its (rows, in) weight in fp32 or fp64
        low_rank(part, rows)       return A (r, in) and B (rows, r) with W' = W + B A of one part
        elementwise_flops(n)       return the FLOPs outside of matrix products that a step adds at n positions

    ``active`` is false once merged, and while ``adapters_off``: the layer is then a plain Linear.
    """

    active: bool = True
    merged: bool = False
    sides: tuple[str, ...] = ()
    """Sides of the weight that are transformed; none where the adapter is a branch beside it."""
    full_rank: str | None = None
    """The reason why ``low_rank`` is impossible, in words; None where it is possible."""

    def __init__(self, base: nn.Linear, config: Any, targets: set[str]) -> None:
        super().__init__(base, targets=targets)
        self.adapter_config = config
        self.make_parameters()

    @property
    def factory(self) -> dict[str, Any]:
        """Return device and dtype of the adapter's parameters: fp64 over fp64 (gradient checks), else fp32 masters."""
        weight = self.weight if self.quantized is None else self.quantized[0].weight
        return {"device": weight.device, "dtype": working_dtype(weight.dtype)}

    def own_parameters(self) -> dict[str, nn.Parameter]:
        """Return the adapter's parameters, by name."""
        return {name: p for name, p in self.named_parameters(recurse=False) if name not in ("weight", "bias")}

    def outputs(self, x: Tensor) -> list[Tensor]:
        """Return the output of each part, with its adapter in place."""
        return self.adapted(x) if self.active else super().outputs(x)

    @torch.no_grad()
    def merged_weight(self, name: str, weight: Tensor, dtype: torch.dtype) -> tuple[Tensor, list[tuple[float, float]]]:
        """Return the adapted weight, computed in fp32 (fp64 for fp64) part by part and cast once.

        Args:
            name: of the layer, for messages.
            weight: (out, in), rows in the order that they have in memory.
            dtype: of the result.

        Returns:
            The weight, and for each adapted part |W' - W| / |W| and how far the cast moved W', relative to |W| too.

        Raises:
            ValueError: it is not finite.
        """
        merged, moved = torch.empty(weight.shape, dtype=dtype, device=weight.device), []
        for part in self.parts:
            kept, before = merged[part.rows], weight[part.rows]
            if not part.adapted:
                kept.copy_(before)
            else:
                before = before.to(working_dtype(before.dtype))
                after = self.merged_rows(part, before)
                kept.copy_(after)
                size = before.norm().clamp(min=torch.finfo(before.dtype).tiny)
                moved.append((((before - after).norm() / size).item(), ((after - kept).norm() / size).item()))
            if not is_finite(kept):
                raise UserError(
                    f"{name} has values too large for {dtype}; --precision bf16-true can hold them. Or it has NaN: the "
                    "adapter holds a zero vector, or its run diverged"
                )
        return merged, moved


def is_finite(tensor: Tensor) -> bool:
    """Return True where no element is NaN or infinite, at a thirtieth of the time of ``isfinite().all()``."""
    return tensor.numel() == 0 or all(extreme.isfinite() for extreme in tensor.aminmax())


def linear_targets(model: GPT, config: Any) -> Iterator[tuple[str, nn.Linear, set[str]]]:
    """Yield every Linear that the config's targets name: its name, itself, and which of the targets it holds."""
    wanted = {target for target in TARGETS if getattr(config, target)}
    held = {"lm_head": {"head"}, "attn.attn": {*QKV}, "attn.proj": {"projection"}, "mlp.gate": set()}  # gate: a router
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) and ".quantized." not in name:  # what a quantized Linear consists of
            targets = wanted & next((held[end] for end in held if name.endswith(end)), {"mlp"})
            if targets:
                yield name, module, targets


def replace_targets(model: GPT, config: Any, *, plain: type[AdapterLayer], fused: type[AdapterLayer]) -> None:
    """Put an adapter layer, ``plain`` or ``fused`` (q, k, v), in the place of every Linear that the config names."""
    if any(adapter_layers(model)):
        raise UserError("the model already has an adapter; merge it first")
    found = list(linear_targets(model, config))
    if not found:
        raise UserError(f"no adapter target is enabled; enable at least one of {', '.join(TARGETS)}")
    for name, linear, targets in found:
        layer = fused if isinstance(linear, QKVLinear) else plain
        model.set_submodule(name, layer(linear, config, targets))


def adapter_layers(model: nn.Module) -> Iterator[tuple[str, AdapterLayer]]:
    """Yield the adapter layers of a model, with their names."""
    return ((name, module) for name, module in model.named_modules() if isinstance(module, AdapterLayer))


def adapter_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """Return the parameters of a model's adapters, by full name."""
    return {
        f"{name}.{own}": parameter
        for name, layer in adapter_layers(model)
        for own, parameter in layer.own_parameters().items()
    }


def adapter_state(model: nn.Module) -> dict[str, Tensor]:
    """Return a copy of the adapters' parameters on the CPU, each in a storage of its own."""
    return {name: p.detach().to("cpu", copy=True) for name, p in adapter_parameters(model).items()}


def mark_only_adapter_as_trainable(model: nn.Module) -> None:
    """Freeze everything but the adapters."""
    model.requires_grad_(False)
    for parameter in adapter_parameters(model).values():
        parameter.requires_grad_(True)


def merge_adapter_weights(model: GPT) -> None:
    """Put every adapter into its layer's weight; twice is once.

    A tied head that was adapted is untied: the embedding stays as it is.
    """
    for name, layer in adapter_layers(model):
        if layer.merged:
            continue
        if layer.quantized is not None:
            raise UserError(
                f"{name}: a quantized weight cannot take an adapter; merge its file into the unquantized base"
            )
        weight, _ = layer.merged_weight(name, layer.weight, layer.weight.dtype)
        layer.weight = nn.Parameter(weight, requires_grad=layer.weight.requires_grad)
        layer.merged, layer.active = True, False
        if name == "lm_head":
            model.config.tie_embeddings = False


@contextmanager
def adapters_off(model: nn.Module) -> Iterator[None]:
    """Turn the adapters off inside: the model is its base."""
    layers = [layer for _, layer in adapter_layers(model) if not layer.merged]
    for layer in layers:
        layer.active = False
    try:
        yield
    finally:
        for layer in layers:
            layer.active = True
