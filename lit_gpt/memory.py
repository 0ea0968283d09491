"""Estimate the memory of training by training without memory.

An optimizer step runs on fake tensors, which have shapes and storages but no data, while every storage is followed
from its birth to its end. So there is no formula for each method, precision, loss or way of checkpointing: what the
code does is what is counted. That is exact for what tensors take; what an allocator keeps of freed blocks is not
counted, so that a process on a CPU takes more.
"""

import copy
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from lit_gpt.adapter_files import make_trainable
from lit_gpt.checkpoint import meta_model
from lit_gpt.devices import is_sharded, weights_dtype
from lit_gpt.loss import IGNORE_INDEX, chunked_cross_entropy
from lit_gpt.model import GPT, LLaMAMoE
from lit_gpt.quantize import quantization_saves
from lit_gpt.settings import Plan

if TYPE_CHECKING:  # see devices.py
    from lightning.fabric import Fabric


REMEDIES = (
    "lower --train.micro_batch_size or give --train.activation_checkpointing true (the result stays the same), or take "
    "--precision bf16-true, under an adapter --quantize bnb.nf4, or data prepared with a smaller --max_seq_length"
)
"""Ways to take less memory, in words."""
_working: dict[str, int] = {}
"""Bytes that a step works with, by all that they follow from: the runs of a sweep are a few such cases."""


@dataclass(frozen=True)
class Memory:
    """Bytes of tensors.

    Attributes:
        frozen: of the weights that do not train.
        trained: of those that do, their gradients and AdamW's two moments.
        working: of everything else at the peak, mostly activations kept for the backward pass.
        device: where they are.
    """

    frozen: int
    trained: int
    working: int
    device: torch.device

    @property
    def total(self) -> int:
        """Return the sum."""
        return self.frozen + self.trained + self.working

    def __str__(self) -> str:
        known = "at least" if self.device.type == "cpu" else "about"
        total, *parts = (f"{n / 2**30:.2f}" for n in (self.total, self.frozen, self.trained, self.working))
        return f"{known} {total} GiB (frozen {parts[0]}, trained {parts[1]}, working {parts[2]})"


def estimate_memory(plan: Plan, batch: tuple[Tensor, Tensor, list[int] | None], *, fabric: "Fabric") -> Memory | None:
    """Return what a run needs in one process.

    Args:
        plan: what is trained, and how.
        batch: ids, targets and lengths of the largest pass, as ``Batching.collate`` gives them.
        fabric: gives device, mixed precision and sharding.

    Returns:
        None, after a line that says why, where this PyTorch cannot do it or an operator needs data to be followed.
    """
    settings, (idx, targets, lengths) = plan.settings, batch
    model = meta_model(plan.config, weights_dtype(settings.precision, mixed=True))
    saved, largest = quantization_saves(model, settings.quantize) if settings.quantize else (0, 0)
    step = dict(lengths=lengths, n_losses=int((targets != IGNORE_INDEX).sum()))
    step["accumulates"] = len(lengths or idx) < settings.train.global_batch_size // fabric.world_size
    checkpointing, facts = settings.train.activation_checkpointing, (settings.precision, idx.shape, step, fabric.device)
    key = repr((plan.config, settings.adapter, checkpointing, *facts))
    if key not in _working:
        try:
            from torch._subclasses.fake_tensor import FakeTensorMode  # a private name, like those of live_bytes.py

            # Without a fallback: it would run an operator that needs data on real zeros of the same size.
            with FakeTensorMode(allow_fallback_kernels=False), torch.device(fabric.device):
                fake = share_weights(model, fabric.device)
                make_trainable(fake, settings.adapter)
                fake.activation_checkpointing = checkpointing
                spread_evenly(fake)
                idx = torch.zeros(idx.shape, dtype=torch.long)
                _working[key] = working_bytes(fake.train(), idx, fabric=fabric, **step)
        except (ImportError, RuntimeError) as error:  # what fake tensors raise are RuntimeErrors
            fabric.print(f"memory: no estimate ({' '.join(str(error).split())[:160]})")
            return None
    make_trainable(model, settings.adapter)
    frozen = frozen_bytes(model, fabric.world_size if is_sharded(fabric) else 1)
    trained = 4 * sum(p.nbytes for p in model.parameters() if p.requires_grad)
    return Memory(frozen - saved, trained, _working[key] + largest, fabric.device)


def working_bytes(
    model: GPT, idx: Tensor, *, lengths: list[int] | None, n_losses: int, accumulates: bool, fabric: "Fabric"
) -> int:
    """Return the peak of a step on fake tensors, above weights, gradients and moments.

    Args:
        model: in training mode.
        idx: (B, T) ids of the largest pass.
        lengths: of the samples that are packed into its only row.
        n_losses: how many of its positions have a target.
        accumulates: earlier passes of the step have left their gradients.
        fabric: gives device and mixed precision.
    """
    from lit_gpt.live_bytes import LiveBytes

    parameters = [p for p in model.parameters() if p.requires_grad]
    with LiveBytes(model.parameters()) as live:
        for parameter in parameters if accumulates else ():
            parameter.grad = torch.zeros_like(parameter)
        with fabric.autocast():
            x = model.hidden(idx, lengths=lengths).flatten(0, 1)  # (B T, d)
            # As many rows as have a target; which ones, fake tensors cannot tell.
            chosen = torch.arange(n_losses)
            loss = chunked_cross_entropy(model.lm_head, x[chosen], torch.zeros_like(chosen), finish=model.finish_logits)
        loss.backward()
        del x, loss
        in_pass, live.most = live.most, live.now
        torch.optim.AdamW(parameters, foreach=idx.device.type == "cuda").step()
    trained = sum(p.nbytes for p in parameters)
    # A pass has the moments beside it from the second step on.
    return max(0, max(in_pass + 2 * trained, live.most) - 3 * trained)


def frozen_bytes(model: GPT, n_shards: int) -> int:
    """Return the bytes of the frozen weights of a process that holds one of so many shards."""
    total, *blocks = (
        sum(p.nbytes for p in module.parameters() if not p.requires_grad) for module in (model, *model.transformer.h)
    )
    if n_shards == 1:
        return total
    # Collected from the other shards: embedding and head for the whole pass, a block, and the next one meanwhile.
    return total // n_shards + total - sum(blocks) + 2 * max(blocks)


def share_weights(base: GPT, device: torch.device | str | None = None) -> GPT:
    """Return a copy of the modules over the same weights; with a device, over empty ones of the same kind there."""

    def weight(parameter: nn.Parameter) -> nn.Parameter:
        if device is None:
            return parameter
        # Not empty_like: fake tensors refuse those of the meta device.
        return nn.Parameter(torch.empty(parameter.shape, dtype=parameter.dtype, device=device), requires_grad=False)

    shared = {id(parameter): weight(parameter) for parameter in base.parameters()}
    # What bitsandbytes keeps beside a quantized weight. At the first product int8's scales leave the shared weight for
    # the layer's state: a copy with a state of its own would take the quantized numbers for the weight.
    scales = [p.quant_state for p in base.parameters() if hasattr(p, "quant_state")]
    scales += [layer.state for layer in base.modules() if hasattr(layer, "state")]
    return copy.deepcopy(base, shared | {id(scale): scale for scale in scales})


def spread_evenly(model: GPT) -> None:
    """Let mixtures of experts give each expert its equal share of the positions: without data there is no routing."""
    for block in model.transformer.h:
        if isinstance(block.mlp, LLaMAMoE):
            block.mlp.forward = partial(even_mixture, block.mlp)


def even_mixture(mixture: LLaMAMoE, x: Tensor) -> Tensor:
    """Return a mixture's output for tokens spread evenly over its experts: (B, T, d) to (B, T, d)."""
    k = mixture.n_expert_per_token
    tokens = x.flatten(0, -2)  # (B * T, d)
    weights = mixture.gate(tokens).float().topk(k, dim=-1).values.softmax(dim=-1).to(x.dtype)  # (B * T, k)
    shares = tokens.repeat_interleave(k, dim=0).tensor_split(len(mixture.experts))
    outputs = torch.cat([expert(share) for expert, share in zip(mixture.experts, shares, strict=True)])
    return (outputs.unflatten(0, (-1, k)) * weights.unsqueeze(-1)).sum(dim=1).view_as(x)
