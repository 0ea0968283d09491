"""Choose dtype and device; let processes tell each other things, and share a base that is too large for one.

A base is sharded by PyTorch's FSDP2, block by block: each process holds a part of every frozen weight and collects the
others' parts as its forward and backward pass come by. The adapter is small and in another precision: every process
has all of it, and its gradients are averaged once a step.
"""

import socket
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh

from lit_gpt.errors import UserError

if TYPE_CHECKING:  # what does not train starts without it: it takes seconds, brings torchmetrics and transformers
    from lightning.fabric import Fabric

T = TypeVar("T")


# ---------------------------------------------------------------------------------------- what processes tell others
def is_lost_process(error: RuntimeError) -> bool:
    """Return True where a collective operation fails because another process has ended, or does not answer."""
    return isinstance(error, dist.DistError) or "gloo" in str(error).lower() or "by peer" in str(error)


def gather(value: T) -> list[T]:
    """Return everyone's value, by rank.

    Raises:
        ValueError: another process has ended.
    """
    if not dist.is_initialized():
        return [value]
    values = [value] * dist.get_world_size()
    try:
        dist.all_gather_object(values, value)
    except RuntimeError as error:
        if not is_lost_process(error):
            raise
        raise UserError("another process of this run has ended, see its message") from error
    return values


def together(function: Callable[[], T]) -> T:
    """Return the function's value; where it fails in any process, end all of them, and the first says why.

    Without this the others would wait for one that has ended until their patience is over.

    Raises:
        ValueError, OSError: in the first process.
        SystemExit: in the others.
    """
    value: T | None = None
    problem: Exception | None = None
    try:
        value = function()
    except (ValueError, OSError) as error:
        problem = error
    told = gather(problem and f"on {socket.gethostname()}: {problem}")
    failed = [text for text in told if text]
    if not failed:
        return value
    if dist.is_initialized() and dist.get_rank():
        raise SystemExit(1)  # once is enough to say it
    raise problem or UserError("; ".join(dict.fromkeys(failed)))


def share_start(parameters: Iterable[Tensor]) -> None:
    """Give every process the first one's values of what trains; the rest is read from files that are alike."""
    for parameter in parameters if dist.is_initialized() else ():
        dist.broadcast(parameter.data, 0)


# ------------------------------------------------------------------------------------------------ dtype and device
PRECISIONS = {"32-true": torch.float32, "bf16-true": torch.bfloat16, "16-true": torch.float16}
"""Choices of ``--precision``, with the dtype of the weights."""
MIXED_PRECISIONS = ("bf16-mixed", "16-mixed")
"""For training also: fp32 weights, products in half precision."""


def weights_dtype(precision: str, *, mixed: bool = False) -> torch.dtype:
    """Return the dtype of the weights under ``precision``; ``mixed`` allows the mixed ones, whose weights are fp32."""
    known = PRECISIONS | (dict.fromkeys(MIXED_PRECISIONS, torch.float32) if mixed else {})
    if precision not in known:
        raise UserError(f"--precision {precision} is unknown here; choices: {', '.join(known)}")
    return known[precision]


def choose_device() -> torch.device:
    """Return a GPU where there is one, else the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def warn_of_slow_products(precision: str, device: torch.device) -> None:
    """Say so where this CPU has no instructions for the precision: its products then take 10 times as long and more."""
    # Private names, absent from builds without oneDNN: nothing is said there.
    probes = {"bf16": "_is_mkldnn_bf16_supported", "16": "_is_mkldnn_fp16_supported"}
    supported = getattr(torch.ops.mkldnn, probes.get(precision.split("-")[0], ""), None)
    if device.type == "cpu" and supported is not None and not supported():
        print(
            f"this CPU has no {precision} products and is slow at them; --precision 32-true is faster", file=sys.stderr
        )


# --------------------------------------------------------------------------------------------------------- sharding
def shard(model: nn.Module, mesh: DeviceMesh) -> nn.Module:
    """Shard what is frozen; copy the rest to this process's device, to which sharding moves its own alone."""
    from torch.distributed.fsdp import fully_shard  # here: with what it brings, a fifth of a script's start

    replicated = {parameter for parameter in model.parameters() if parameter.requires_grad}
    for parameter in replicated:
        parameter.data = parameter.to(mesh.device_type)
    for module in (*model.transformer.h, model):
        fully_shard(module, mesh=mesh["data_parallel"], ignored_params=replicated)
    return model


@contextmanager
def unsharded(model: nn.Module) -> Iterator[None]:
    """Inside, embedding and head can be used outside of ``forward``, which collects their shards otherwise."""
    from torch.distributed.fsdp import FSDPModule

    if not isinstance(model, FSDPModule):
        yield
        return
    model.unshard()
    try:
        yield
    finally:
        model.reshard()


def is_sharded(fabric: "Fabric") -> bool:
    """Return True where each process holds a part of every frozen weight."""
    from lightning.fabric.strategies import ModelParallelStrategy

    return isinstance(fabric.strategy, ModelParallelStrategy)


def average_gradients(fabric: "Fabric", model: nn.Module) -> None:
    """Average the gradients of the replicated parameters over the processes, all in one message."""
    gradients = [parameter.grad for parameter in model.parameters() if parameter.requires_grad]
    averaged = fabric.all_reduce(torch.cat([gradient.flatten() for gradient in gradients]), reduce_op="mean")
    sizes = [gradient.numel() for gradient in gradients]
    for gradient, average in zip(gradients, averaged.split(sizes), strict=True):
        gradient.copy_(average.view_as(gradient))
