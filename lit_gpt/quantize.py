"""Base weights in 4 or 8 bit while an adapter trains on them (QLoRA, Dettmers et al., 2305.14314).

Notable choices:
- bitsandbytes' own layers hold the weights and multiply; q, k and v have one each. Adapters act around the product, so
  no weight is dequantized to be transformed. Fabric's precision plugin would replace the adapters' Linears too.
- Attention's and the MLPs' Linears are quantized. The embedding is looked up, and often is the head as well; the head's
  error would go straight into the logits; norms and a mixture's router are tiny.
- A weight is quantized when its turn comes, from the memory-mapped file: the whole model is never there unquantized.
- Validation and training see the same function: see ``QuantizedWeight.train``.
"""

import logging
from collections.abc import Iterable, Mapping
from pathlib import Path
from statistics import median
from types import ModuleType, SimpleNamespace

import torch
from torch import Tensor, nn

from lit_gpt.adapter import TARGETS, SplitLinear, linear_targets, rows_in_memory
from lit_gpt.checkpoint import check_checkpoint_dir, load_config, load_model, meta_model, open_model
from lit_gpt.devices import PRECISIONS, warn_of_slow_products, weights_dtype
from lit_gpt.errors import UserError
from lit_gpt.model import GPT, QKVLinear

SCHEMES = {"bnb.nf4": 4.5, "bnb.nf4-dq": 4.127, "bnb.fp4": 4.5, "bnb.fp4-dq": 4.127, "bnb.int8": 8.0}
"""Values of ``--quantize``, with the bits of a weight: 64 weights have a scale of 32 bits. With -dq it has 8, and 256
scales have one of 32; int8 has one for each row."""
INT8_OUTLIERS = 6.0  # activations above this stay in half precision: the threshold of LLM.int8(), 2208.07339
ERROR_ROWS = 256


def check_quantize(scheme: str | None, precision: str, *, full: bool = False) -> None:
    """Raise where a quantized base cannot work; loads nothing but bitsandbytes.

    Args:
        scheme: one of ``SCHEMES``, or None, which always works.
        precision: of the products and of what is not quantized.
        full: the base itself is to be trained.

    Raises:
        ValueError: one line that says what to do.
    """
    if scheme is None:
        return
    if scheme not in SCHEMES:
        raise UserError(f"--quantize {scheme} is unknown; choices: {', '.join(SCHEMES)}")
    if full:
        raise UserError(f"--quantize {scheme} freezes the weights, full finetuning trains them; leave it out")
    if "mixed" in precision:
        raise UserError(f"--quantize {scheme} keeps no fp32 weights for {precision}; choices: {', '.join(PRECISIONS)}")
    import_bitsandbytes()


def import_bitsandbytes() -> ModuleType:
    """Return the module, an optional dependency; quiet about casts of activations to fp16, which are what int8 is."""
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # first: its import warns of kernels that it lacks
    try:
        import bitsandbytes
    except ModuleNotFoundError as error:
        raise UserError("--quantize needs bitsandbytes: pip install 'bitsandbytes>=0.50'") from error
    return bitsandbytes


class QuantizedWeight(nn.ModuleList):
    """A weight in bitsandbytes' layers, one for each part of its rows: one part, or q, k and v."""

    def product(self, index: int, x: Tensor, bias: Tensor | None) -> Tensor:
        """Return W x + b of one part."""
        y = self[index](x)
        return y if bias is None else y + bias

    def dequantized(self, index: int) -> Tensor:
        """Return the (rows, in) weight of one part that the products are taken with."""
        layer = self[index]
        if hasattr(layer, "quant_state"):
            return import_bitsandbytes().functional.dequantize_4bit(layer.weight.data, layer.weight.quant_state)
        scales = layer.state.SCB if layer.weight.SCB is None else layer.weight.SCB  # they move at the first product
        return layer.weight.data * (scales / 127)[:, None]

    def train(self, mode: bool = True) -> "QuantizedWeight":
        """Do nothing: on a CPU bitsandbytes' layers take rougher products (int8, bf16) when they are not training."""
        return self


class QuantizedQKVLinear(SplitLinear, QKVLinear):
    """The fused query, key and value projection, each quantized by itself."""


def quantize_rows(rows: Tensor, scheme: str, *, device: torch.device | str = "cpu") -> nn.Module:
    """Return bitsandbytes' layer for a (rows, in) weight; its products are in the dtype of ``rows``."""
    bnb = import_bitsandbytes()
    shape = {"input_features": rows.size(1), "output_features": rows.size(0), "bias": False, "device": "meta"}
    if scheme == "bnb.int8":
        layer = bnb.nn.Linear8bitLt(**shape, has_fp16_weights=False, threshold=INT8_OUTLIERS)
        weight = bnb.nn.Int8Params(rows, requires_grad=False)
    else:
        how = {"quant_type": scheme[4:7], "compress_statistics": scheme.endswith("-dq")}
        layer = bnb.nn.Linear4bit(**shape, compute_dtype=rows.dtype, **how)
        weight = bnb.nn.Params4bit(rows, requires_grad=False, module=layer, **how)
    layer.weight = weight.to(device=device)  # quantizes there; on the meta device it stays a shape
    return layer


def quantizable(model: GPT) -> dict[str, nn.Linear]:
    """Return the Linears to quantize, by name."""
    everything = SimpleNamespace(**dict.fromkeys(TARGETS, True) | {"head": False})
    return {name: linear for name, linear, _ in linear_targets(model, everything)}


def quantize_model(
    model: GPT, scheme: str, state: Mapping[str, Tensor], *, dtype: torch.dtype, device: torch.device | str
) -> None:
    """Put quantized Linears in the place of a model's, one after the other, before it gets an adapter.

    Args:
        model: everything but the weights to quantize is there.
        scheme: one of ``SCHEMES``.
        state: gives the weights, in the files' row order.
        dtype: of the products.
        device: where the weights go; the meta device tries out what would fit.
    """
    for name, linear in quantizable(model).items():
        kind = QuantizedQKVLinear if isinstance(linear, QKVLinear) else SplitLinear
        parts = rows_in_memory(linear, state[f"{name}.weight"]).split(getattr(linear, "sizes", linear.out_features))
        quantized = QuantizedWeight(quantize_rows(rows.to(dtype), scheme, device=device) for rows in parts)
        model.set_submodule(name, kind(linear, quantized=quantized))


def load_base(
    checkpoint_dir: Path | str, precision: str, scheme: str | None, *, device: torch.device | str = "cpu"
) -> GPT:
    """Load the model of a base-shaped folder, its weights quantized where a scheme is given; in evaluation mode.

    Args:
        checkpoint_dir: the folder.
        precision: of the products and of what is not quantized; a quantized model has no mixed one.
        scheme: one of ``SCHEMES``, or None. A quantized model cannot be moved afterwards.
        device: where the weights go.
    """
    if scheme is None:
        return load_model(checkpoint_dir, precision, device=device)
    check_quantize(scheme, precision)
    dtype = weights_dtype(precision)
    warn_of_slow_products(precision, torch.device(device))
    config = load_config(check_checkpoint_dir(checkpoint_dir))
    later = {f"{name}.weight" for name in quantizable(meta_model(config))}

    def place(name: str, tensor: Tensor) -> Tensor:
        return tensor.to("meta") if name in later else tensor.to(device, dtype)

    model, state = open_model(checkpoint_dir, place)
    quantize_model(model, scheme, state, dtype=dtype, device=device)
    return model.eval()


def n_parameters(model: nn.Module) -> int:
    """Return the number of a model's parameters; those of a quantized weight are its elements, not its bytes."""
    layers = [layer for module in model.modules() if isinstance(module, QuantizedWeight) for layer in module]
    packed = {layer.weight: layer.in_features * layer.out_features for layer in layers}
    return sum(packed.get(parameter, parameter.numel()) for parameter in model.parameters())


def quantization_saves(model: GPT, scheme: str) -> tuple[int, int]:
    """Return the bytes that quantizing a model will save, and those of its largest weight when it is unpacked."""
    weights = [linear.weight for linear in quantizable(model).values()]
    saved = sum(weight.nbytes - weight.numel() * SCHEMES[scheme] / 8 for weight in weights)
    return round(saved), max(weight.nbytes for weight in weights)


@torch.no_grad()
def quantization_error(scheme: str, weights: Iterable[Tensor]) -> float:
    """Return the median over weights of |Q(W) - W|_F / |W|_F, measured on the first rows of each."""
    errors = []
    for weight in weights:
        rows = weight[:ERROR_ROWS].float()
        quantized = QuantizedWeight([quantize_rows(rows, scheme)]).dequantized(0)
        errors.append(((quantized - rows).norm() / rows.norm()).item())
    return median(errors)


def describe_merge(scheme: str, model: GPT, state: Mapping[str, Tensor]) -> str:
    """Return one line on merging an adapter that was trained on a base in ``scheme`` into that base unquantized."""
    try:
        error = quantization_error(scheme, (state[f"{name}.weight"] for name in quantizable(model)))
        how_far = f"its weights had moved by {error:.1e} (median of |Q(W)-W|/|W|)"
    except UserError:
        how_far = "how far that is from it can be said where bitsandbytes is installed"
    return f"trained on a {scheme} base, merged into the unquantized one: {how_far}"
