"""How much memory training will take, found by training without memory.

An optimizer step runs on fake tensors, which have shapes and storages but no data, while every storage is followed
from its birth to its end. So there is no formula for each method, precision, loss or way of checkpointing: what the
code does is what is counted.
"""

import copy
import math
import weakref
from collections.abc import Iterable
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from lightning.fabric import Fabric
from torch import Tensor, nn
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensorMode,
    UnsupportedFakeTensorException,
    UnsupportedOperatorException,
)
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from lit_gpt.adapter_files import make_trainable
from lit_gpt.checkpoint import meta_model
from lit_gpt.devices import compiles_each_size, is_sharded, weights_dtype
from lit_gpt.loss import IGNORE_INDEX, MULTIPLE, chunked_cross_entropy
from lit_gpt.model import GPT, LLaMAMoE
from lit_gpt.plan import Job, Plan
from lit_gpt.quantize import quantization_saves

NOT_FAKE = (
    DataDependentOutputException,
    DynamicOutputShapeException,
    UnsupportedFakeTensorException,
    UnsupportedOperatorException,
)
"""What an operator raises that cannot do without data."""
MAPPED = 2**25
"""On a CPU, glibc maps blocks from this size on one by one, and gives them back when they end; smaller ones never."""
HEAP_HOLES = 2.2
"""Resident memory for each byte of the smaller ones: 1.9 to 2.6 in runs of 15 to 235 steps (SmolLM2-135M, glibc 2.36).

glibc cuts a block that is aligned to 64 bytes out of a larger one. The small piece in front of it goes to the thread's
cache and from there to small objects, which live until the backward pass and keep freed neighbours from merging: most
temporaries leave a hole. GLIBC_TUNABLES=glibc.malloc.tcache_max=0:glibc.malloc.mxfast=0 in the environment takes a
quarter off the peak at the same speed; it is read when a process starts, so nothing here can set it. Giving holes back
to the system as they arise, by mallopt or malloc_trim, makes steps 14 to 40% longer.
"""
COMPILED = 2**24
"""What oneDNN keeps of each length in 16 bits: about so much, whatever the model's size (``loss.MULTIPLE``)."""


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


def estimate_memory(
    job: Job, plan: Plan, batch: tuple[Tensor, Tensor, list[int] | None], *, fabric: Fabric
) -> Memory | None:
    """What a run needs in one process.

    Args:
        job: what is trained.
        plan: how.
        batch: ids, targets and lengths of the largest pass, as ``Batching.collate`` gives them.
        fabric: gives device, mixed precision and sharding.

    Returns:
        None where the model has an operator that cannot be followed without data.
    """
    base = meta_model(plan.config, weights_dtype(plan.precision, mixed=True))
    idx, targets, lengths = batch
    n_losses = int((targets != IGNORE_INDEX).sum())
    accumulates = len(lengths or idx) < plan.train.global_batch_size // fabric.world_size
    try:
        # Without a fallback: it would run such an operator on real zeros of the same size.
        with FakeTensorMode(allow_fallback_kernels=False), torch.device(fabric.device):
            model = fake_model(base, job, plan, fabric.device)
            idx = torch.zeros(idx.shape, dtype=torch.long)
            working = working_bytes(
                model, idx, lengths=lengths, n_losses=n_losses, accumulates=accumulates, fabric=fabric
            )
    except NOT_FAKE:
        return None
    frozen = frozen_bytes(model, fabric.world_size if is_sharded(fabric) else 1)
    if compiles_each_size(fabric, plan.precision):
        working += COMPILED * max(lengths or idx.shape[1:]) // MULTIPLE
    if plan.quantize is not None:
        saved, largest = quantization_saves(base, plan.quantize)
        frozen, working = frozen - saved, working + largest
    return Memory(frozen, 4 * sum(p.nbytes for p in model.parameters() if p.requires_grad), working)


def kinds_of_blocks(device: torch.device) -> tuple[tuple[int, float, float], ...]:
    """Smallest size, smallest one beyond, and the memory that a device holds for each byte of such blocks' peak."""
    if device.type == "cpu":
        return (0, MAPPED, HEAP_HOLES), (MAPPED, math.inf, 1.0)
    return ((0, math.inf, 1.0),)


def working_bytes(
    model: GPT, idx: Tensor, *, lengths: list[int] | None, n_losses: int, accumulates: bool, fabric: Fabric
) -> int:
    """What a device holds for the peak of a step on fake tensors, above weights, gradients and moments.

    Args:
        model: in training mode.
        idx: (B, T) ids of the largest pass.
        lengths: of the samples that are packed into its only row.
        n_losses: how many of its positions have a target.
        accumulates: earlier passes of the step have left their gradients.
        fabric: gives device and mixed precision.
    """
    parameters, kinds = [p for p in model.parameters() if p.requires_grad], kinds_of_blocks(fabric.device)
    with ExitStack() as stack:
        lives = [
            stack.enter_context(LiveBytes(model.parameters(), at_least=at_least, below=below))
            for at_least, below, _ in kinds
        ]
        for parameter in parameters if accumulates else ():
            parameter.grad = torch.zeros_like(parameter)
        with fabric.autocast():
            x = model.hidden(idx, lengths=lengths).flatten(0, 1)  # (B T, d)
            # As many rows as have a target; which ones, fake tensors cannot tell.
            chosen = torch.arange(n_losses)
            loss = chunked_cross_entropy(model.lm_head, x[chosen], torch.zeros_like(chosen))
        loss.backward()
        del x, loss
        in_pass = [live.most for live in lives]
        for live in lives:
            live.most = live.now
        torch.optim.AdamW(parameters, foreach=idx.device.type == "cuda").step()
    total = 0.0
    for live, most, (at_least, below, held) in zip(lives, in_pass, kinds, strict=True):
        trained = sum(p.nbytes for p in parameters if at_least <= p.nbytes < below)
        # With the moments, which are there from the first step on.
        total += held * max(0, max(most + 2 * trained, live.most) - 3 * trained)
    return round(total)


def frozen_bytes(model: GPT, n_shards: int) -> int:
    """Bytes of the frozen weights of a process that holds one of so many shards."""
    total, *blocks = (
        sum(p.nbytes for p in module.parameters() if not p.requires_grad) for module in (model, *model.transformer.h)
    )
    if n_shards == 1:
        return total
    # Collected from the other shards: embedding and head for the whole pass, a block, and the next one meanwhile.
    return total // n_shards + total - sum(blocks) + 2 * max(blocks)


def remedies(job: Job, plan: Plan, *, fabric: Fabric) -> str:
    """What takes less memory than this run does, in words; what changes nothing else comes first."""
    same = ["lower --train.micro_batch_size"] if plan.train.micro_batch_size > 1 else []
    same += [] if plan.train.activation_checkpointing else ["give --train.activation_checkpointing true"]
    rougher = ["--precision bf16-true"] if plan.precision == "32-true" else []
    quantizable = job.adapter is not None and "mixed" not in plan.precision and not is_sharded(fabric)
    rougher += ["--quantize bnb.nf4"] if quantizable and plan.quantize is None else []
    found = [" or ".join(same) + " (the result stays the same)"] if same else []
    found += ["take " + " or ".join(rougher)] if rougher else []
    return ", or ".join([*found, "prepare the data with a smaller --max_seq_length"])


def fake_model(base: GPT, job: Job, plan: Plan, device: torch.device) -> GPT:
    """The model of a run on a base without data."""
    model = share_weights(base, device)
    make_trainable(model, job.kind, job.adapter)
    model.activation_checkpointing = plan.train.activation_checkpointing
    spread_evenly(model)
    return model.train()


def share_weights(base: GPT, device: torch.device | str | None = None) -> GPT:
    """A copy of the modules over the same weights; with a device, over empty ones of the same kind there."""

    def weight(parameter: nn.Parameter) -> nn.Parameter:
        if device is None:
            return parameter
        return nn.Parameter(torch.empty(parameter.shape, dtype=parameter.dtype, device=device), requires_grad=False)

    scales = [p.quant_state for p in base.parameters() if hasattr(p, "quant_state")]  # of a quantized weight
    shared = {id(parameter): weight(parameter) for parameter in base.parameters()}
    return copy.deepcopy(base, shared | {id(scale): scale for scale in scales})


class LiveBytes(TorchDispatchMode):
    """Follows the storages of the tensors that are made inside.

    Args:
        ignored: tensors that are there already, and do not count.
        at_least: count storages of so many bytes or more,
        below: and of less than so many.

    Attributes:
        now: bytes of those that live.
        most: the largest that ``now`` has been.
    """

    def __init__(self, ignored: Iterable[Tensor] = (), *, at_least: int = 0, below: float = math.inf) -> None:
        super().__init__()
        self.at_least, self.below = at_least, below
        self.now = self.most = 0
        self._known: dict[int, weakref.ref] = {}
        for tensor in ignored:
            self._follow(tensor.untyped_storage())
        self.now = self.most = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        for leaf in (result,) if isinstance(result, Tensor) else tree_leaves(result):
            if isinstance(leaf, Tensor):
                self._follow(leaf.untyped_storage())
        return result

    def _follow(self, storage: torch.UntypedStorage) -> None:
        key, size = storage._cdata, storage.nbytes()
        if key in self._known or not self.at_least <= size < self.below:
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
