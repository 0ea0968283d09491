"""Start a run's processes on one machine or many, and connect them through Fabric.

Everything that would leave processes waiting for each other in vain is refused before they connect. What they tell
each other later is in ``devices.py``.
"""

import os
import socket
from collections.abc import Mapping
from datetime import timedelta
from typing import Any
from zlib import crc32

import torch
from lightning.fabric import Fabric
from lightning.fabric.plugins.environments import LightningEnvironment, SLURMEnvironment
from lightning.fabric.strategies import DDPStrategy, ModelParallelStrategy
from lightning.fabric.utilities.exceptions import MisconfigurationException

from lit_gpt.devices import MIXED_PRECISIONS, gather, is_lost_process, shard
from lit_gpt.errors import UserError
from lit_gpt.settings import Settings

PATIENCE = {"ether": timedelta(minutes=10), "lora": timedelta(minutes=10), "full": timedelta(minutes=30)}
"""For how long processes wait for each other: the first one may be writing all weights and their optimizer's state."""
VARIABLES = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "GROUP_WORLD_SIZE", "NODE_RANK")
SLURM_VARIABLES = {"LOCALID": "LOCAL_RANK", "NODEID": "NODE_RANK"}
SLURM_VARIABLES |= {"STEP_NUM_TASKS": "WORLD_SIZE", "STEP_NUM_NODES": "GROUP_WORLD_SIZE"}


def launch_variables() -> dict[str, str]:
    """Return what the launcher says of the processes that it started, srun's words in torchrun's names.

    A batch script has the variables of its first task, too, but runs outside of any step: it is one process.
    """
    said = {name: os.environ[name] for name in (*VARIABLES, "MASTER_ADDR", "MASTER_PORT") if name in os.environ}
    slurm = {name[6:]: value for name, value in os.environ.items() if name.startswith("SLURM_")}
    if "LOCAL_RANK" in said or slurm.get("STEP_NUM_TASKS", "1") == "1":
        return said
    step = {ours: slurm[theirs] for theirs, ours in SLURM_VARIABLES.items() if theirs in slurm}
    step["MASTER_ADDR"] = SLURMEnvironment.resolve_root_node_address(slurm.get("STEP_NODELIST", "127.0.0.1"))
    # Steps of one job may share a machine, and jobs, too: a port for each.
    step["MASTER_PORT"] = str(15000 + crc32(f"{slurm.get('JOB_ID')}.{slurm.get('STEP_ID')}".encode()) % 10000)
    return step | said


def check_launch(settings: Settings) -> None:
    """Raise ValueError unless the flags suit the processes that were started, and these can connect."""
    devices, num_nodes, processes = settings.devices, settings.num_nodes, settings.n_processes
    flags = f"--devices {devices} --num_nodes {num_nodes}"
    if devices < 1 or num_nodes < 1 or processes >= 1 << 31:
        raise UserError(f"--devices times --num_nodes must be positive and below 2^31, got {devices} times {num_nodes}")
    if settings.precision == "16-mixed" and not torch.cuda.is_available():  # Fabric would take bf16, and say so aside
        raise UserError("--precision 16-mixed needs a GPU: take bf16-mixed or 32-true")
    said = launch_variables()
    fitting = {"WORLD_SIZE": [processes], "LOCAL_WORLD_SIZE": [devices], "GROUP_WORLD_SIZE": [num_nodes]}
    fitting |= {"LOCAL_RANK": range(devices), "NODE_RANK": range(num_nodes)}
    wrong = [f"{name} is {said[name]}" for name in fitting if name in said and int(said[name]) not in fitting[name]]
    if wrong:
        raise UserError(
            f"{flags} does not suit the processes that torchrun, srun or the environment tells of ({', '.join(wrong)}):"
            " give --devices the processes on each machine and --num_nodes the machines"
        )
    needed = ["MASTER_ADDR", "MASTER_PORT"]
    if num_nodes > 1 and "GROUP_RANK" not in os.environ:  # torchrun's word for it
        needed = ["NODE_RANK", *needed]
    missing = [name for name in needed if name not in said]
    if missing and processes > 1 and (num_nodes > 1 or "LOCAL_RANK" in said):  # else Fabric starts the others itself
        raise UserError(
            f"{flags}: {', '.join(missing)} not set in the environment, so the machines would wait for each other in "
            f"vain; start all of them with srun, or each with torchrun --nnodes {num_nodes} --nproc-per-node {devices} "
            "--rdzv-backend c10d --rdzv-endpoint FIRST_MACHINE:29500"
        )


def launch_fabric(settings: Settings) -> Fabric:
    """Return a Fabric as the settings ask for it, whose processes are connected; ``check_launch`` has seen them.

    Raises:
        ValueError: there are not so many devices, or the processes do not find each other.
    """
    processes, patience, strategy = settings.n_processes, PATIENCE[settings.kind], "auto"
    if settings.strategy == "fsdp":
        strategy = ModelParallelStrategy(shard, data_parallel_size=processes, tensor_parallel_size=1, timeout=patience)
    elif processes > 1:
        # Every process reads the base itself: the first one does not send it to the others.
        strategy = DDPStrategy(timeout=patience, init_sync=False)
    os.environ.update(launch_variables())  # what Fabric goes by; alone it takes a batch script for a task of srun's
    # Weights are cast where they are loaded.
    precision = settings.precision if settings.precision in MIXED_PRECISIONS else "32-true"
    options = dict(strategy=strategy, precision=precision, plugins=[LightningEnvironment()])
    try:
        fabric = Fabric(devices=settings.devices, num_nodes=settings.num_nodes, **options)
        fabric.launch()
    except MisconfigurationException as error:
        raise UserError(f"--devices {settings.devices} --num_nodes {settings.num_nodes}: {error}") from error
    except RuntimeError as error:
        if not is_lost_process(error):
            raise
        address = ":".join(os.environ.get(name, "?") for name in ("MASTER_ADDR", "MASTER_PORT"))
        raise UserError(
            f"the {processes} processes of this run did not all meet at {address}: see the others' messages, whether "
            f"each machine can reach this address, and whether the port is free ({' '.join(str(error).split())[:200]})"
        ) from error
    return fabric


def check_alike(mine: Mapping[str, Any]) -> None:
    """Raise ValueError, which names what differs and where, unless all processes were given the same."""
    (first_host, first), *others = gather((socket.gethostname(), mine))
    differences = {
        f"{name} is {other.get(name)} on {host} (rank {rank}), {first.get(name)} on {first_host} (rank 0)"
        for rank, (host, other) in enumerate(others, 1)
        for name in first | other
        if first.get(name) != other.get(name)
    }
    if differences:
        raise UserError(f"{'; '.join(sorted(differences))}: give every machine the same command, data and base model")


def check_compiler(device: torch.device) -> None:
    """Raise ValueError unless ``torch.compile`` works on the device: it needs Triton, a C or C++ compiler, headers."""
    try:
        torch.compile(torch.sin)(torch.ones(16, device=device))  # seconds, whose preparations the blocks need too
    except Exception as error:  # whatever is missing: each backend has exceptions of its own
        reason = " ".join(str(error).split("\n\n")[0].split())  # then follow PyTorch's switches for its developers
        raise UserError(
            f"--compile true cannot compile for {device}: {reason}; install what is missing, or use --compile false"
        ) from error
