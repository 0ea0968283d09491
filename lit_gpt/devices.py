"""One process, copies of the model on several, or a base that is sharded over them; Fabric starts and connects them.

A base is sharded by PyTorch's FSDP2, block by block: each process holds a part of every frozen weight and collects the
others' parts as its forward and backward pass come by. The adapter is small and in another precision: every process
has all of it, and its gradients are averaged once a step.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from lightning.fabric import Fabric
from lightning.fabric.strategies import ModelParallelStrategy
from lightning.fabric.utilities.exceptions import MisconfigurationException
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, fully_shard

STRATEGIES = ("auto", "ddp", "fsdp")


def build_fabric(*, strategy: str, devices: int, num_nodes: int, precision: str) -> Fabric:
    """Fabric as the flags ask for it; not launched.

    Raises:
        ValueError: there are not so many devices.
    """
    chosen: str | ModelParallelStrategy = strategy
    if strategy == "fsdp":
        chosen = ModelParallelStrategy(shard, data_parallel_size=devices * num_nodes, tensor_parallel_size=1)
    try:
        return Fabric(
            strategy=chosen,
            devices=devices,
            num_nodes=num_nodes,
            precision=precision if "mixed" in precision else "32-true",  # weights are cast where they are loaded
        )
    except MisconfigurationException as error:
        raise ValueError(f"--devices {devices} --num_nodes {num_nodes}: {error}") from error


def compiles_each_size(fabric: Fabric, precision: str) -> bool:
    """Whether products are compiled for each size, and kept: in 16 bits on a CPU (``loss.MULTIPLE``)."""
    return fabric.device.type == "cpu" and precision != "32-true"


def shard(model: nn.Module, mesh: DeviceMesh) -> nn.Module:
    """Shard what is frozen; copy the rest to this process's device, to which sharding moves its own alone."""
    replicated = {parameter for parameter in model.parameters() if parameter.requires_grad}
    for parameter in replicated:
        parameter.data = parameter.to(mesh.device_type)
    for module in (*model.transformer.h, model):
        fully_shard(module, mesh=mesh["data_parallel"], ignored_params=replicated)
    return model


@contextmanager
def whole_ends(model: nn.Module) -> Iterator[None]:
    """Inside, embedding and head can be used outside of ``forward``, which collects their shards otherwise."""
    if not isinstance(model, FSDPModule):
        yield
        return
    model.unshard()
    try:
        yield
    finally:
        model.reshard()


def is_sharded(fabric: Fabric) -> bool:
    """Whether the base is."""
    return isinstance(fabric.strategy, ModelParallelStrategy)


def average_gradients(fabric: Fabric, model: nn.Module) -> None:
    """Average the gradients of the replicated parameters over the processes, all in one message."""
    gradients = [parameter.grad for parameter in model.parameters() if parameter.requires_grad]
    together = fabric.all_reduce(torch.cat([gradient.flatten() for gradient in gradients]), reduce_op="mean")
    sizes = [gradient.numel() for gradient in gradients]
    for gradient, averaged in zip(gradients, together.split(sizes), strict=True):
        gradient.copy_(averaged.view_as(gradient))
