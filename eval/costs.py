"""Count what a training step costs with an adapter, on tensors without data, or time it side by side.

A step is the forward and backward pass of one sequence in which every position has a target. It is compared with the
*floor*: the frozen model with one trained scalar, added to the embedding's output, so that gradients flow through every
layer and nothing else is computed. (An adapter on outputs alone may fall below: the first layer's input then needs no
gradient.)

Notable choices:
- Matrix products are counted on the meta device, where attention is spelt out in them.
- What is saved for the backward pass are the storages that PyTorch's graph keeps, each once, weights excluded. Fake
  tensors tell, as the kernels of a CPU save it: attention is fused there, as in a real run.
- Times are taken in turns, on one set of random weights that all adapters share: a machine that slows down does so for
  all, and memory holds the model once.
"""

import random
from collections.abc import Sequence
from dataclasses import dataclass, replace
from statistics import median
from time import perf_counter
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils.flop_counter import FlopCounterMode
from tqdm import tqdm

from lit_gpt.adapter import TARGETS, adapter_layers, adapter_parameters
from lit_gpt.adapter_files import make_trainable
from lit_gpt.checkpoint import meta_model
from lit_gpt.config import Config
from lit_gpt.errors import UserError
from lit_gpt.ether import METHODS, EtherConfig, check_blocks
from lit_gpt.lora import LoraConfig
from lit_gpt.memory import share_weights, spread_evenly
from lit_gpt.model import GPT
from lit_gpt.quantize import quantize_model
from lit_gpt.train import compile_blocks

FLOOR, LORA = "frozen model", "LoRA r=8"
METHOD_NAMES = {"ether": "ETHER", "etherplus": "ETHER+ one-sided", "etherplusHH": "ETHER+ two-sided", "oft": "OFT"}


@dataclass(frozen=True)
class Variant:
    """A name, and the adapter that the model gets; None for the floor."""

    label: str
    adapter: EtherConfig | LoraConfig | None


def choose_variants(
    config: Config, *, targets: Sequence[str], blocks: Sequence[int], oft_blocks: Sequence[int]
) -> tuple[list[Variant], list[str]]:
    """Return floor, LoRA, and every method at every n that divides the model's sizes; a line for each that does not."""
    chosen = {target: target in targets for target in TARGETS}
    variants, left_out = [Variant(FLOOR, None), Variant(LORA, LoraConfig(r=8, **chosen))], []
    model = meta_model(replace(config, n_layer=1))
    for method, name in METHOD_NAMES.items():
        for n in oft_blocks if METHODS[method].matrices else blocks:
            adapter = EtherConfig(Htype=method, nb=n, **chosen)
            try:
                check_blocks(model, adapter)
            except UserError as error:
                left_out.append(f"{name} n={n} is left out: {error}")
            else:
                variants.append(Variant(f"{name} n={n}", adapter))
    return variants, left_out


def attach(model: GPT, adapter: EtherConfig | LoraConfig | None) -> GPT:
    """Give the model its adapter, or the floor's scalar, freeze the rest, and return it."""
    if adapter is None:
        weight = model.requires_grad_(False).transformer.wte.weight
        model.shift = nn.Parameter(torch.zeros((), device=weight.device, dtype=weight.dtype))
        model.transformer.wte.register_forward_hook(lambda module, inputs, output: output + model.shift)
    else:
        make_trainable(model, "lora" if isinstance(adapter, LoraConfig) else "ether", adapter)
    return model


def step_loss(model: GPT, idx: Tensor) -> Tensor:
    """Return the loss of a step, ``model(idx, targets=idx)``, in one piece.

    Picking the positions with a target, as the model does, needs their number, which the meta device does not have.
    """
    return F.cross_entropy(model(idx).flatten(0, 1).float(), idx.flatten(), reduction="sum")


def count(config: Config, variant: Variant, *, seq_length: int, dtype: torch.dtype = torch.float32) -> dict[str, int]:
    """Return what a step of one sequence costs, as ``count_model``.

    Every layer after the first costs the same, so models of one and of two layers tell it for any depth, exactly.
    """
    one, two = (count_model(replace(config, n_layer=depth), variant, seq_length, dtype) for depth in (1, 2))
    return {name: one[name] + (config.n_layer - 1) * (two[name] - one[name]) for name in one}


def count_model(config: Config, variant: Variant, seq_length: int, dtype: torch.dtype) -> dict[str, int]:
    """Count trained parameters, adapter bytes, FLOPs of products and of the rest, bytes saved for the backward pass."""
    base = meta_model(config, dtype)
    model = attach(share_weights(base), variant.adapter)
    return {
        "trained_parameters": sum(p.numel() for p in model.parameters() if p.requires_grad),
        "adapter_bytes": sum(p.nbytes for p in adapter_parameters(model).values()),
        "product_flops": product_flops(model, seq_length),
        "elementwise_flops": elementwise_flops(model, seq_length),
        "saved_bytes": saved_bytes(base, variant.adapter, seq_length),
    }


def product_flops(model: GPT, seq_length: int) -> int:
    """Count the FLOPs of the matrix products of a step, for a model on the meta device."""
    spread_evenly(model)
    with FlopCounterMode(display=False) as counter:
        step_loss(model, torch.empty(1, seq_length, dtype=torch.long, device="meta")).backward()
    return counter.get_total_flops()


def elementwise_flops(model: GPT, seq_length: int) -> int:
    """Return the FLOPs that a model's adapters add to a step outside of matrix products."""
    total = 0.0
    for name, layer in adapter_layers(model):
        share = model.config.n_expert_per_token / model.config.n_expert if ".experts." in name else 1
        total += layer.elementwise_flops(seq_length * share)
    return round(total)


def saved_bytes(base: GPT, adapter: EtherConfig | LoraConfig | None, seq_length: int) -> int:
    """Count the bytes that the forward pass keeps for the backward pass."""
    storages: dict[StorageWeakRef, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        storages[StorageWeakRef(storage)] = storage.nbytes()  # the reference keeps the identity from being used again
        return tensor

    with FakeTensorMode():
        model = attach(share_weights(base, "cpu"), adapter)
        spread_evenly(model)
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            step_loss(model, torch.zeros(1, seq_length, dtype=torch.long))
        weights = {StorageWeakRef(parameter.untyped_storage()) for parameter in model.parameters()}
    return sum(size for storage, size in storages.items() if storage not in weights)


def random_models(
    config: Config,
    variants: Sequence[Variant],
    *,
    dtype: torch.dtype,
    device: torch.device,
    compiled: bool = False,
    scheme: str | None = None,
) -> list[GPT]:
    """Return a model for each variant, all on one set of random weights, which ``scheme`` quantizes."""
    base = meta_model(config, dtype).requires_grad_(False)

    def draw(parameter: Tensor) -> Tensor:
        return torch.empty_like(parameter, device=device).normal_(std=0.02)

    class RandomState(dict):
        """A model's weights by name, drawn when they are asked for: never all of them unquantized."""

        def __getitem__(self, name: str) -> Tensor:
            return draw(super().__getitem__(name))

    if scheme is not None:
        quantize_model(base, scheme, RandomState(base.state_dict()), dtype=dtype, device=device)
    for module in base.modules():
        for name, parameter in module.named_parameters(recurse=False):
            if parameter.is_meta:
                setattr(module, name, nn.Parameter(draw(parameter), requires_grad=False))
    base.tie_weights()
    models = [attach(share_weights(base), variant.adapter) for variant in variants]
    for model in models if compiled else ():
        compile_blocks(model)
    return models


def measure(models: Sequence[GPT], *, seq_length: int, rounds: int) -> list[dict[str, Any]]:
    """Return for each of ``random_models`` the ``seconds`` of a step in each round; on a GPU also ``peak_bytes``.

    A round before the first is discarded. A peak is what the weights, this one adapter and a step took together.
    """
    device = models[0].lm_head.weight.device
    trained = [sum(p.nbytes for p in model.parameters() if p.requires_grad) for model in models]
    held = torch.cuda.memory_allocated() - sum(trained) if device.type == "cuda" else 0
    idx = torch.randint(models[0].config.vocab_size, (1, seq_length), device=device)
    found: list[dict[str, Any]] = [{"seconds": []} for _ in models]
    for turn in tqdm(range(rounds + 1), desc="rounds", leave=False):
        for index in random.Random(turn).sample(range(len(models)), len(models)):
            seconds, peak = timed_step(models[index], idx)
            if turn > 0:
                found[index]["seconds"].append(seconds)
                found[index] |= {} if peak is None else {"peak_bytes": held + trained[index] + peak}
    return found


def timed_step(model: GPT, idx: Tensor) -> tuple[float, int | None]:
    """Return the seconds of a forward and backward pass, and on a GPU the bytes beyond those held before."""
    on_gpu = idx.device.type == "cuda"
    if on_gpu:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        held = torch.cuda.memory_allocated()
    start = perf_counter()
    step_loss(model, idx).backward()
    if on_gpu:
        torch.cuda.synchronize()
    seconds = perf_counter() - start
    model.zero_grad()
    return seconds, torch.cuda.max_memory_allocated() - held if on_gpu else None


def add_ratios(rows: list[dict[str, Any]]) -> None:
    """Add each row's time over the floor's and LoRA's: median and range over the rounds of the ratio within a round."""
    for row in rows:
        for name, other in zip(("time_x_floor", "time_x_lora"), rows[:2], strict=True):
            each = [own / its for own, its in zip(row["seconds"], other["seconds"], strict=True)]
            row[name] = {"median": median(each), "min": min(each), "max": max(each)}


def table(header: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    """Return an aligned Markdown table, its first column flush left."""
    widths = [max(map(len, column)) for column in zip(header, *lines, strict=True)]
    rule = ["-" * widths[0], *("-" * (width - 1) + ":" for width in widths[1:])]
    padded = ([cells[0].ljust(widths[0]), *map(str.rjust, cells[1:], widths[1:])] for cells in (header, rule, *lines))
    return "\n".join(f"| {' | '.join(cells)} |" for cells in padded)
