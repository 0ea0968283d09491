"""One process, copies of the model on several, or a base that is sharded over them; Fabric starts and connects them.

A base is sharded by PyTorch's FSDP2, block by block: each process holds a part of every frozen weight and collects the
others' parts as its forward and backward pass come by. The adapter is small and in another precision: every process
has all of it, and its gradients are averaged once a step.
"""

import os
import socket
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, TypeVar
from zlib import crc32

import torch
import torch.distributed as dist
from lightning.fabric import Fabric
from lightning.fabric.plugins.environments import (
    LightningEnvironment,
    LSFEnvironment,
    MPIEnvironment,
    SLURMEnvironment,
)
from lightning.fabric.strategies import DDPStrategy, ModelParallelStrategy
from lightning.fabric.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, fully_shard

from lit_gpt.errors import UserError

STRATEGIES = ("auto", "ddp", "fsdp")
T = TypeVar("T")


# ------------------------------------------------------------------------------------------- starting the processes
def launch_variables() -> dict[str, str]:
    """Return what the launcher says of the processes that it started, srun's words in torchrun's names.

    A batch script has the variables of its first task, too, but runs outside of any step: it is one process.
    """
    names = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "GROUP_WORLD_SIZE", "NODE_RANK")
    said = {name: os.environ[name] for name in (*names, "MASTER_ADDR", "MASTER_PORT") if name in os.environ}
    slurm = {name[6:]: value for name, value in os.environ.items() if name.startswith("SLURM_")}
    if "LOCAL_RANK" in said or slurm.get("STEP_NUM_TASKS", "1") == "1":
        return said
    pairs = {"LOCALID": "LOCAL_RANK", "NODEID": "NODE_RANK", "STEP_NUM_TASKS": "WORLD_SIZE"}
    pairs |= {"STEP_NUM_NODES": "GROUP_WORLD_SIZE"}
    step = {ours: slurm[theirs] for theirs, ours in pairs.items() if theirs in slurm}
    step["MASTER_ADDR"] = SLURMEnvironment.resolve_root_node_address(slurm.get("STEP_NODELIST", "127.0.0.1"))
    # Steps of one job may share a machine, and jobs, too: a port for each.
    step["MASTER_PORT"] = str(15000 + crc32(f"{slurm.get('JOB_ID')}.{slurm.get('STEP_ID')}".encode()) % 10000)
    return step | said


def check_launch(devices: int, num_nodes: int) -> list[str]:
    """Return every reason why the flags do not suit the processes that were started, or these cannot connect."""
    flags, processes = f"--devices {devices} --num_nodes {num_nodes}", devices * num_nodes
    if devices < 1 or num_nodes < 1 or processes >= 1 << 31:
        return [f"--devices times --num_nodes must be positive and below 2^31, got {devices} times {num_nodes}"]
    if LSFEnvironment.detect() or MPIEnvironment.detect():  # they have words of their own, which Fabric knows
        return []
    said = launch_variables()
    numbers = {name: value for name, value in said.items() if name != "MASTER_ADDR"}
    bad = [f"{name} is {value!r}" for name, value in numbers.items() if not value.isdecimal()]
    if bad:
        return [f"{', '.join(bad)} in the environment: expected a whole number; set it right, or unset it"]
    equal = {"WORLD_SIZE": processes, "LOCAL_WORLD_SIZE": devices, "GROUP_WORLD_SIZE": num_nodes}
    below = {"LOCAL_RANK": devices, "NODE_RANK": num_nodes}
    wrong = [name for name, number in equal.items() if int(said.get(name, number)) != number]
    wrong += [name for name, number in below.items() if int(said.get(name, 0)) >= number]
    if wrong:
        started = ", ".join(f"{name} is {said[name]}" for name in wrong)
        return [
            f"{flags} does not suit the processes that torchrun, srun or the environment tells of ({started}): give "
            "--devices the processes on each machine and --num_nodes the machines"
        ]
    needed = []
    if processes > 1 and (num_nodes > 1 or "LOCAL_RANK" in said):
        by_torchrun = "TORCHELASTIC_RUN_ID" in os.environ
        needed = ["RANK", "LOCAL_RANK", "WORLD_SIZE"] if by_torchrun else ["NODE_RANK"] if num_nodes > 1 else []
        needed += ["MASTER_ADDR", "MASTER_PORT"]
    missing = [name for name in needed if name not in said]
    return missing and [
        f"{flags}: {', '.join(missing)} not set in the environment, so the machines would wait for each other in vain; "
        f"start all of them with srun, or each with torchrun --nnodes {num_nodes} --nproc-per-node {devices} "
        "--rdzv-backend c10d --rdzv-endpoint FIRST_MACHINE:29500"
    ]


def launch_fabric(*, strategy: str, devices: int, num_nodes: int, precision: str, patience: timedelta) -> Fabric:
    """Return a Fabric as the flags ask for it, whose processes are connected.

    Args:
        strategy: one of ``STRATEGIES``; anything else is as auto, for ``make_plan`` to refuse.
        devices: processes on each machine,
        num_nodes: machines; both as ``check_launch`` wants them.
        precision: as in ``finetune``.
        patience: for how long a process waits for the others, when they start and later, before it gives them up.

    Raises:
        ValueError: there are not so many devices, or the processes do not find each other.
    """
    processes, chosen = devices * num_nodes, "auto"
    if strategy == "fsdp":
        chosen = ModelParallelStrategy(shard, data_parallel_size=processes, tensor_parallel_size=1, timeout=patience)
    elif processes > 1:
        # Every process reads the base itself: the first one does not send it to the others.
        chosen = DDPStrategy(timeout=patience, init_sync=False)
    os.environ.update(launch_variables())
    # Fabric takes a batch script for one of srun's tasks; what srun says is in the environment by now.
    by_slurm = "SLURM_NTASKS" in os.environ and "TORCHELASTIC_RUN_ID" not in os.environ
    try:
        fabric = Fabric(
            strategy=chosen,
            devices=devices,
            num_nodes=num_nodes,
            plugins=[LightningEnvironment()] if by_slurm else None,
            # Weights are cast where they are loaded.
            precision=precision if precision in ("bf16-mixed", "16-mixed") else "32-true",
        )
        fabric.launch()
    except MisconfigurationException as error:
        raise UserError(f"--devices {devices} --num_nodes {num_nodes}: {error}") from error
    except RuntimeError as error:
        if not is_lost_process(error):
            raise
        address = ":".join(os.environ.get(name, "?") for name in ("MASTER_ADDR", "MASTER_PORT"))
        raise UserError(
            f"the {processes} processes of this run did not all meet at {address}: see the others' messages, whether "
            f"each machine can reach this address, and whether the port is free ({' '.join(str(error).split())[:200]})"
        ) from error
    return fabric


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


def check_alike(mine: Mapping[str, Any]) -> None:
    """Raise unless all processes have the same settings and read the same files.

    Raises:
        ValueError: names what differs, and where.
    """
    (first_host, first), *others = gather((socket.gethostname(), mine))
    differences = {
        f"{name} is {other.get(name)} on {host} (rank {rank}), {first.get(name)} on {first_host} (rank 0)"
        for rank, (host, other) in enumerate(others, 1)
        for name in first | other
        if first.get(name) != other.get(name)
    }
    if differences:
        raise UserError(f"{'; '.join(sorted(differences))}: give every machine the same command, data and base model")


# ------------------------------------------------------------------------------------------------ dtype and device
PRECISIONS = {"32-true": torch.float32, "bf16-true": torch.bfloat16, "16-true": torch.float16}
"""What ``--precision`` may say, and the dtype of the weights."""
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
def unsharded(model: nn.Module) -> Iterator[None]:
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
