"""How much memory training will take, found by training without memory.

An optimizer step runs on fake tensors, which have shapes and storages but no data, while every storage is followed
from its birth to its end. So there is no formula for each method, precision, loss or way of checkpointing: what the
code does is what is counted.
"""

import copy
import weakref
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from lightning.fabric import Fabric
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from lit_gpt.adapter import mark_only_adapter_as_trainable
from lit_gpt.adapter_files import KINDS
from lit_gpt.batches import length, n_targets
from lit_gpt.checkpoint import load_config, weights_dtype
from lit_gpt.config import Config
from lit_gpt.data import Sample
from lit_gpt.loss import chunked_cross_entropy
from lit_gpt.model import GPT, LLaMAMoE
from lit_gpt.plan import Job, Plan
from lit_gpt.quantize import quantization_saves

HEAP_HOLES = 1.45
"""Resident memory for each byte of a pass on a CPU: the C library leaves holes between aligned blocks that it frees.
Measured on SmolLM2-135M: 1.3 to 1.6. (Given back at once, the bytes agree to 4 %, but each step takes 40 % longer.)"""


@dataclass(frozen=True)
class Memory:
    """Bytes.

    Attributes:
        frozen: of the weights that do not train.
        trained: of those that do, their gradients and AdamW's two moments.
        working: of everything else at the peak, mostly activations kept for the backward pass.
    """

    frozen: int
    trained: int
    working: int

    @property
    def total(self) -> int:
        """Of all."""
        return self.frozen + self.trained + self.working

    def __str__(self) -> str:
        parts = ", ".join(f"{name} {value / 2**30:.2f}" for name, value in vars(self).items())
        return f"about {self.total / 2**30:.2f} GiB ({parts})"


def estimate_memory(job: Job, plan: Plan, batch: list[Sample], *, lengths: list[int] | None, fabric: Fabric) -> Memory:
    """What a run needs on one process that holds the whole base.

    Args:
        job: what is trained.
        plan: how.
        batch: the samples of the largest pass.
        lengths: theirs, where they are packed into one row.
        fabric: gives device and mixed precision.
    """
    shape = (1, sum(lengths)) if lengths else (len(batch), max(map(length, batch)))
    n_losses = n_targets(batch)
    base = meta_model(load_config(plan.base_dir), weights_dtype(plan.precision, mixed=True))
    with FakeTensorMode(), LiveBytes() as live, torch.device(fabric.device):
        model = fake_model(base, job, plan, fabric.device)
        parameters = [p for p in model.parameters() if p.requires_grad]
        with fabric.autocast():
            x = model.hidden(torch.zeros(shape, dtype=torch.long), lengths=lengths).flatten(0, 1)  # (B T, d)
            # As many rows as have a target; which ones, fake tensors cannot tell.
            chosen = torch.arange(n_losses)
            loss = chunked_cross_entropy(model.lm_head, x[chosen], torch.zeros_like(chosen))
        loss.backward()
        del x, loss
        moments = 2 * sum(p.nbytes for p in parameters)  # from the first step on
        in_pass, live.most = live.most + moments, live.now
        torch.optim.AdamW(parameters).step()
        most = max(in_pass, live.most)
        trained = 2 * moments
        frozen = sum(p.nbytes for p in model.parameters() if not p.requires_grad)
    working = max(0, most - frozen - trained)
    if fabric.device.type == "cpu":
        working = round(working * HEAP_HOLES)
    if plan.quantize is None:
        return Memory(frozen, trained, working)
    saved, largest = quantization_saves(base, plan.quantize)
    return Memory(frozen - saved, trained, working + largest)


def fake_model(base: GPT, job: Job, plan: Plan, device: torch.device) -> GPT:
    """The model of a run on a base without data."""
    model = twin(base, device)
    if job.adapter is None:
        model.requires_grad_(True)
    else:
        KINDS[job.kind].add(model, job.adapter)
        mark_only_adapter_as_trainable(model)
    model.activation_checkpointing = plan.train.activation_checkpointing
    spread_evenly(model)
    return model.train()


def meta_model(config: Config, dtype: torch.dtype) -> GPT:
    """A model without data."""
    with torch.device("meta"):
        return GPT(config).to(dtype)


def twin(base: GPT, device: torch.device | str | None = None) -> GPT:
    """A copy of the modules over the same weights; with a device, over empty ones of the same kind there."""

    def weight(parameter: nn.Parameter) -> nn.Parameter:
        if device is None:
            return parameter
        return nn.Parameter(torch.empty(parameter.shape, dtype=parameter.dtype, device=device), requires_grad=False)

    return copy.deepcopy(base, {id(parameter): weight(parameter) for parameter in base.parameters()})


class LiveBytes(TorchDispatchMode):
    """Follows the storages of the tensors that are made inside.

    Attributes:
        now: bytes of those that live.
        most: the largest that ``now`` has been.
    """

    def __init__(self) -> None:
        super().__init__()
        self.now = self.most = 0
        self._known: dict[int, weakref.ref] = {}

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        for leaf in (result,) if isinstance(result, Tensor) else tree_leaves(result):
            if isinstance(leaf, Tensor):
                self._follow(leaf.untyped_storage())
        return result

    def _follow(self, storage: torch.UntypedStorage) -> None:
        key, size = storage._cdata, storage.nbytes()
        if key in self._known:
            return

        def end(_: weakref.ref) -> None:
            del self._known[key]
            self.now -= size

        self._known[key] = weakref.ref(storage, end)
        self.now += size
        self.most = max(self.most, self.now)


def spread_evenly(model: GPT) -> None:
    """Let mixtures of experts give each expert its equal share of the positions: without data there is no routing."""
    for block in model.transformer.h:
        if isinstance(block.mlp, LLaMAMoE):
            block.mlp.forward = partial(even_mixture, block.mlp)


def even_mixture(mixture: LLaMAMoE, x: Tensor) -> Tensor:
    """A mixture whose tokens are spread evenly over its experts: (B, T, d) to (B, T, d)."""
    k = mixture.n_expert_per_token
    tokens = x.flatten(0, -2)  # (B * T, d)
    weights = mixture.gate(tokens).float().topk(k, dim=-1).values.softmax(dim=-1).to(x.dtype)  # (B * T, k)
    shares = tokens.repeat_interleave(k, dim=0).tensor_split(len(mixture.experts))
    outputs = torch.cat([expert(share) for expert, share in zip(mixture.experts, shares, strict=True)])
    return (outputs.unflatten(0, (-1, k)) * weights.unsqueeze(-1)).sum(dim=1).view_as(x)
