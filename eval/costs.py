"""Count what a training step costs with an adapter, on tensors without data, or time it side by side.

A step is the forward and backward pass of one sequence in which every position has a target. It is compared with the
*floor*: the frozen model with one trained scalar, added to the embedding's output, so that gradients flow through every
layer and nothing else is computed. (An adapter on outputs alone may fall below: the first layer's input then needs no
gradient.)

Notable choices:
- Matrix products are counted on the meta device, where attention is spelt out in them.
- Saved for the backward pass is what lives after the forward pass, weights excluded. Fake tensors tell, as the kernels
  of a CPU save it: attention is fused there, as in a real run.
- Times are taken in turns, on one set of random weights that all adapters share: a machine that slows down does so for
  all, and memory holds the model once.
"""

import os
import random
from collections.abc import Mapping, Sequence
from dataclasses import replace
from statistics import median
from time import perf_counter
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode
from tqdm import tqdm

from lit_gpt.adapter import TARGETS, AdapterConfig, adapter_layers, adapter_parameters
from lit_gpt.adapter_files import make_trainable
from lit_gpt.checkpoint import meta_model
from lit_gpt.config import Config
from lit_gpt.errors import UserError
from lit_gpt.ether import METHODS, EtherConfig, check_blocks
from lit_gpt.live_bytes import LiveBytes
from lit_gpt.lora import LoraConfig
from lit_gpt.memory import share_weights, spread_evenly
from lit_gpt.model import GPT
from lit_gpt.quantize import quantize_model
from lit_gpt.train import compile_blocks

FLOOR, LORA = "frozen model", "LoRA r=8"
METHOD_NAMES = {"ether": "ETHER", "etherplus": "ETHER+ one-sided", "etherplusHH": "ETHER+ two-sided", "oft": "OFT"}
RATIOS = {"time_x_floor": FLOOR, "time_x_lora": LORA}
Rows = dict[str, dict[str, Any]]
"""By label, values by name."""
Adapter = AdapterConfig | None
"""None for the floor."""
Variants = Mapping[str, Adapter]
"""By label."""


def choose_variants(
    config: Config, *, targets: Sequence[str], blocks: Sequence[int], oft_blocks: Sequence[int],
    methods: Sequence[str] = tuple(METHOD_NAMES),
) -> tuple[dict[str, Adapter], list[str]]:  # fmt: skip
    """Return floor, LoRA, and each method at every n that divides the model's sizes; a line for each that does not."""
    chosen = {target: target in targets for target in TARGETS}
    variants: dict[str, Adapter] = {FLOOR: None, LORA: LoraConfig(r=8, **chosen)}
    left_out, model = [], meta_model(replace(config, n_layer=1))
    for method in methods:
        for n in oft_blocks if METHODS[method].matrices else blocks:
            adapter = EtherConfig(Htype=method, nb=n, **chosen)
            try:
                check_blocks(model, adapter)
                variants[f"{METHOD_NAMES[method]} n={n}"] = adapter
            except UserError as error:
                left_out.append(f"{METHOD_NAMES[method]} n={n} is left out: {error}")
    return variants, left_out


def attach(model: GPT, adapter: Adapter) -> GPT:
    """Give the model its adapter, or the floor's scalar, freeze the rest, and return it."""
    if adapter is None:
        weight = model.requires_grad_(False).transformer.wte.weight
        model.shift = nn.Parameter(torch.zeros((), device=weight.device, dtype=weight.dtype))
        model.transformer.wte.register_forward_hook(lambda module, inputs, output: output + model.shift)
    else:
        make_trainable(model, adapter)
    return model


def step_loss(model: nn.Module, idx: Tensor) -> Tensor:
    """Return the loss of a step, ``model(idx, targets=idx)``, in one piece; the model may be transformers'.

    Picking the positions with a target, as ours does, needs their number, which the meta device does not have.
    """
    logits = model(idx)
    logits = getattr(logits, "logits", logits).flatten(0, 1).float()  # (T, vocabulary)
    return F.cross_entropy(logits, idx.flatten(), reduction="sum")


# ----------------------------------------------------------------------------------------------------------- counting
def count(config: Config, adapter: Adapter, *, seq_length: int, dtype: torch.dtype = torch.float32) -> dict[str, int]:
    """Return what a step of one sequence costs, as ``count_model``.

    Every layer after the first costs the same, so models of one and of two layers tell it for any depth, exactly.
    """
    one, two = (count_model(replace(config, n_layer=depth), adapter, seq_length, dtype) for depth in (1, 2))
    return {name: one[name] + (config.n_layer - 1) * (two[name] - one[name]) for name in one}


def count_model(config: Config, adapter: Adapter, seq_length: int, dtype: torch.dtype) -> dict[str, int]:
    """Count trained parameters, adapter bytes, FLOPs of products and of the rest, bytes saved for the backward pass."""
    base = meta_model(config, dtype)
    model = attach(share_weights(base), adapter)
    spread_evenly(model)
    with FlopCounterMode(display=False) as products:
        step_loss(model, torch.empty(1, seq_length, dtype=torch.long, device="meta")).backward()
    with FakeTensorMode():
        fake = attach(share_weights(base, "cpu"), adapter)
        spread_evenly(fake)
        with LiveBytes(fake.parameters()) as live:
            loss = step_loss(fake, torch.zeros(1, seq_length, dtype=torch.long))
            saved = live.now - loss.nbytes  # all that lives now lives for the backward pass
    of_experts = config.n_expert_per_token / max(1, config.n_expert)
    rest = (
        layer.elementwise_flops(seq_length * (of_experts if ".experts." in name else 1))
        for name, layer in adapter_layers(model)
    )
    return {
        "trained_parameters": sum(p.numel() for p in model.parameters() if p.requires_grad),
        "adapter_bytes": sum(p.nbytes for p in adapter_parameters(model).values()),
        "product_flops": products.get_total_flops(),
        "elementwise_flops": round(sum(rest)),
        "saved_bytes": saved,
    }


# ------------------------------------------------------------------------------------------------------------- timing
def random_base(config: Config, *, dtype: torch.dtype, device: torch.device, scheme: str | None = None) -> GPT:
    """Return a frozen model with random weights, which ``scheme`` quantizes."""
    base = meta_model(config, dtype).requires_grad_(False).to_empty(device=device)
    for parameter in base.parameters():
        parameter.normal_(std=0.02)
    base.tie_weights()
    if scheme is not None:
        quantize_model(base, scheme, base.state_dict(), dtype=dtype, device=device)
    return base


def random_models(config: Config, variants: Variants, *, compiled: bool = False, **options: Any) -> dict[str, GPT]:
    """Return by label a model for each variant, all on one ``random_base``."""
    base = random_base(config, **options)
    models = {label: attach(share_weights(base), adapter) for label, adapter in variants.items()}
    for model in models.values() if compiled else ():
        compile_blocks(model)
    return models


def peft_models(config: Config, *, dtype: torch.dtype, device: torch.device) -> dict[str, nn.Module]:
    """Return transformers' Llama of these sizes with PEFT's LoRA and OFT on q and v, on one set of random weights."""
    import peft
    import transformers

    sizes = transformers.LlamaConfig(
        vocab_size=config.padded_vocab_size, hidden_size=config.n_embd, intermediate_size=config.intermediate_size,
        num_hidden_layers=config.n_layer, num_attention_heads=config.n_head, num_key_value_heads=config.n_query_groups,
        max_position_embeddings=config.block_size, use_cache=False,
    )  # fmt: skip
    with torch.device(device):
        base = transformers.AutoModelForCausalLM.from_config(sizes, dtype=dtype)
    adapters = {
        f"PEFT {LORA}": peft.LoraConfig(target_modules=["q_proj", "v_proj"], r=8, lora_alpha=16),
        "PEFT OFT b=16": peft.OFTConfig(target_modules=["q_proj", "v_proj"], r=0, oft_block_size=16),
    }
    return {label: peft.get_peft_model(share_weights(base), adapter).train() for label, adapter in adapters.items()}


def measure(models: Mapping[str, nn.Module], idx: Tensor, rounds: int) -> Rows:
    """Return for each model its ``seconds`` of a step, ``step_loss`` and its gradients, in each round.

    The models take turns, in another order each round; a round before the first is discarded. On a GPU also the
    ``peak_bytes`` of the last round: what the weights, which all share, this one adapter and a step take together.
    """
    trained = {label: [p for p in model.parameters() if p.requires_grad] for label, model in models.items()}
    n_bytes = {label: sum(p.nbytes for p in parameters) for label, parameters in trained.items()}
    wait = torch.cuda.synchronize if idx.is_cuda else lambda: None
    rows: Rows = {label: {"seconds": []} for label in models}
    shared = torch.cuda.memory_allocated() - sum(n_bytes.values())
    for turn in tqdm(range(rounds + 1), desc="rounds", leave=False, disable=None):
        for label in random.Random(turn).sample(list(models), len(models)):
            wait()
            if idx.is_cuda:
                torch.cuda.reset_peak_memory_stats()
            held, start = torch.cuda.memory_allocated(), perf_counter()
            # An expert that no token reaches has no gradient.
            torch.autograd.grad(step_loss(models[label], idx), trained[label], allow_unused=True)
            wait()
            rows[label]["seconds"] += [perf_counter() - start] * (turn > 0)
            if idx.is_cuda:
                rows[label]["peak_bytes"] = torch.cuda.max_memory_allocated() - held + shared + n_bytes[label]
    return rows


def add_ratios(rows: Rows) -> None:
    """Give each row its times as ratios to the floor's and to LoRA's of the same round: median and range."""
    for row in rows.values():
        for name, other in RATIOS.items():
            ratios = [own / its for own, its in zip(row["seconds"], rows[other]["seconds"], strict=True)]
            row[name] = {"median": median(ratios), "min": min(ratios), "max": max(ratios)}


def time_columns(row: Mapping[str, Any]) -> dict[str, float | str]:
    """Return for people how long a step takes, median and range of the ratios, and on a GPU its peak memory."""
    columns: dict[str, float | str] = {"step, ms": 1e3 * median(row["seconds"])}
    for name, other in RATIOS.items():
        columns[f"x {other}"] = "{median:.3f} ({min:.3f} to {max:.3f})".format(**row[name])
    return columns | ({"peak, GB": row["peak_bytes"] / 1e9} if "peak_bytes" in row else {})


def fitting(config: Config, dtype: torch.dtype, device: torch.device) -> float:
    """Return how many times a model's weights fit a device's memory."""
    on_gpu = device.type == "cuda"
    have = torch.cuda.mem_get_info()[0] if on_gpu else os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return have / sum(parameter.nbytes for parameter in meta_model(config, dtype).parameters())


def describe(device: torch.device) -> str:
    """Return a device in words."""
    if device.type != "cuda":
        return f"a CPU with {torch.get_num_threads()} threads"
    card = torch.cuda.get_device_properties(device)
    return f"{card.name}, {card.total_memory / 1e9:.0f} GB, capability {card.major}.{card.minor}"


def table(rows: Mapping[str, Mapping[str, float | str]]) -> str:
    """Return rows by label as an aligned Markdown table: numbers with three figures, the first column flush left."""

    def cell(value: float | str) -> str:
        if isinstance(value, str):
            return " ".join(value.split()).replace("|", r"\|")
        return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"

    names = list(dict.fromkeys(name for row in rows.values() for name in row))
    lines = [["", *names], *([label, *(row.get(name, "") for name in names)] for label, row in rows.items())]
    lines = [list(map(cell, line)) for line in lines]
    first, *others = (max(map(len, column)) for column in zip(*lines, strict=True))
    lines.insert(1, ["-" * first, *("-" * (width - 1) + ":" for width in others)])
    return "\n".join(f"| {' | '.join([line[0].ljust(first), *map(str.rjust, line[1:], others)])} |" for line in lines)
