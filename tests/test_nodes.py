"""Runs on several machines: launchers' variables, what one process tells the others, torchrun agents that die."""

import os
import re
import signal
import socket
from datetime import timedelta
from pathlib import Path

import pytest
from helpers import (
    PROCESSES,
    ROOT,
    Training,
    command,
    free_port,
    in_process,
    losses_of,
    refusal,
    same_result,
    train,
    wait_for,
)

from lit_gpt.launch import PATIENCE, launch_variables
from lit_gpt.run_folder import checkpoint_folders

LONG = ["--train.max_steps", "60", "--train.epochs", "9", "--train.save_interval", "10", "--eval.interval", "7"]
NODES = ["--devices", "1", "--num_nodes", "2"]
STEP = {"JOB_ID": "7", "NTASKS": "2", "STEP_ID": "0", "STEP_NUM_TASKS": "2", "STEP_NUM_NODES": "1", "NODEID": "0"}
STEP |= {"STEP_NODELIST": "127.0.0.1"}
ENDED = r"error: another process of this run has ended, see its message; the last checkpoint is \S+: --resume true"


def srun(**changes: str) -> dict[str, str]:
    """The variables of a task of srun's."""
    return {f"SLURM_{name}": value for name, value in (STEP | {"PROCID": "0", "LOCALID": "0"} | changes).items()}


class Agent(Training):
    """A torchrun agent, which starts one process of a run on two machines."""

    def __init__(self, work, out: Path, *more: str, node: str, port: str) -> None:
        self.log = out.with_suffix(f".agent{node}")
        name, arguments = command(work, "etherplusHH", out, *NODES, *more)
        flags = ["--nnodes", "2", "--nproc-per-node", "1", "--rdzv-backend", "c10d"]
        flags += ["--rdzv-endpoint", f"127.0.0.1:{port}", "--rdzv-id", "test", str(ROOT / name), *arguments]
        self.process = PROCESSES.Process(target=torchrun, args=(flags, self.log))
        self.process.start()

    def kill(self) -> None:
        """Kill the agent and its worker, as the end of their machine would."""
        pid = self.process.pid
        children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
        for each in (pid, *map(int, children)):
            os.kill(each, signal.SIGKILL)


def torchrun(flags: list[str], log: Path) -> None:
    """Run as an agent's process."""
    os.environ["OMP_NUM_THREADS"] = "1"
    with log.open("w") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    from torch.distributed.run import main

    main(flags)


def agents(work, out: Path, *more: str) -> list[Agent]:
    """Two of them, which meet on the loopback address."""
    port = free_port()
    return [Agent(work, out, *more, node=node, port=port) for node in ("0", "1")]


def node_process(cwd: Path, patience: float, *arguments) -> None:
    """Run as a process of a machine of its own: in its own folder, with so many seconds of patience."""
    os.chdir(cwd)
    PATIENCE["ether"] = timedelta(seconds=patience)
    in_process(*arguments)


class Node(Training):
    """The process of one of two machines, started by hand."""

    def __init__(self, work, out: Path, *more: str, node: str, port: str, cwd: Path, patience: float) -> None:
        self.log = cwd / f"{out.name}.node{node}"
        variables = {"NODE_RANK": node, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "OMP_NUM_THREADS": "1"}
        arguments = (cwd, patience, *command(work, "etherplusHH", out, *NODES, *more), self.log, variables)
        self.process = PROCESSES.Process(target=node_process, args=arguments)
        self.process.start()


def nodes(work, out: Path, *more: str, second: tuple[str, ...] = (), folders=None, patience: float = 60) -> list[Node]:
    """Both machines' processes.

    Args:
        work: base and data.
        out: the run folder.
        more: flags of both,
        second: and of the second one.
        folders: where they run.
        patience: seconds for which they wait for each other.
    """
    port, folders = free_port(), folders or (out.parent, out.parent)
    return [
        Node(work, out, *more, *(second if node == "1" else ()), node=node, port=port, cwd=cwd, patience=patience)
        for node, cwd in zip("01", folders, strict=True)
    ]


def assert_equal_losses(one: Path, other: Path) -> None:
    """Losses, gradients and validations agree to 1e-5."""
    for column in ("loss", "grad_norm", "val_loss", "val_response_loss", "tokens"):
        assert losses_of(other, column) == pytest.approx(losses_of(one, column), rel=1e-5), column


# ------------------------------------------------------------------------------------------------- two machines
@pytest.mark.skipif(not Path("/proc/self").exists(), reason="looks for the agent's worker in /proc")
def test_an_agent_that_dies_ends_the_other_and_both_go_on_to_the_same_bits(work, tmp_path):
    """DDP; the result is that of two machines which nothing happened to, and to 1e-5 that of one process."""
    one, out, whole = (tmp_path / name for name in ("one", "run", "whole"))
    train(work, "etherplusHH", one, *LONG)
    first, second = agents(work, out, *LONG)
    wait_for(lambda: checkpoint_folders(out), 300)  # fresh processes, all their imports included
    second.kill()
    code, text = first.end()
    assert code == 1
    told = re.findall(r"^error: .*", text, re.M) + re.findall(r"^error: .*", second.log.read_text(), re.M)
    assert len(told) == 1 and re.match(ENDED, told[0]), text
    (tmp_path / "elsewhere").mkdir()
    folders, more = (tmp_path, tmp_path / "elsewhere"), [*LONG, "--resume", "true"]
    ended = [process.end() for process in nodes(work, Path("run"), *more, folders=folders)]
    assert [code for code, _ in ended] == [1, 1]
    assert f"{checkpoint_folders(out)[-1].name}/state.pth is not a file" in ended[1][1]
    for run in (out, whole):
        more = ["--resume", "true"] if run == out else []
        for process in nodes(work, run, *LONG, *more):
            code, text = process.end()
            assert code == 0, text
    assert same_result(out, whole)
    assert_equal_losses(one, out)


def test_a_sharded_base_trains_on_two_machines_as_on_one(work, tmp_path):
    train(work, "etherplusHH", tmp_path / "one")
    for process in nodes(work, tmp_path / "two", "--strategy", "fsdp"):
        code, text = process.end()
        assert code == 0, text
    assert_equal_losses(tmp_path / "one", tmp_path / "two")


def test_what_one_machine_cannot_do_ends_both_in_one_line(work, tmp_path):
    host, out, same = socket.gethostname(), tmp_path / "run", "give every machine the same command, .*"
    for second, told in (
        (("--io.checkpoint_dir", "nowhere"), rf"error: on {host}: nowhere is not a folder.*"),
        (("--seed", "7"), rf"error: seed is 7 on {host} \(rank 1\), 1337 on {host} \(rank 0\): {same}"),
    ):
        ended = [process.end() for process in nodes(work, out, *LONG, second=second)]
        assert [code for code, _ in ended] == [1, 1]
        found = [line for _, text in ended for line in text.splitlines() if line.startswith("error: ")]
        assert len(found) == 1 and re.fullmatch(told, found[0]), ended
    assert not out.exists()


def test_a_machine_that_falls_silent_is_given_up(work, tmp_path):
    out = tmp_path / "run"
    first, second = nodes(work, out, *LONG, patience=10)
    wait_for(lambda: checkpoint_folders(out))
    os.kill(second.process.pid, signal.SIGSTOP)
    code, text = first.end()
    second.end(signal.SIGKILL)
    assert code == 1
    assert re.match("error: another process of this run does not answer; the last checkpoint is", text.splitlines()[-1])


# ------------------------------------------------------------------------------------------------------- launchers
def test_tasks_of_srun_train_together_and_its_warning_saves(work, tmp_path):
    out = tmp_path / "run"
    step = {"JOB_ID": str(os.getpid())}
    both = [
        Training(
            work, out, "--devices", "2", *LONG, rank=rank, environment=srun(PROCID=rank, LOCALID=rank, **step)
        )
        for rank in ("0", "1")
    ]  # fmt: skip
    wait_for(lambda: checkpoint_folders(out))
    for training in both:
        os.kill(training.process.pid, signal.SIGUSR1)
    (code, text), (other, _) = (training.end() for training in both)
    assert (code, other) == (138, 0) and "SIGUSR1: saved" in text


def test_what_srun_says_is_taken_over(monkeypatch):
    for name, value in srun(STEP_NUM_NODES="2", NODEID="1", STEP_NODELIST="gpu[07-08]").items():
        monkeypatch.setenv(name, value)
    said = launch_variables()
    port = int(said.pop("MASTER_PORT"))
    assert said == {
        "LOCAL_RANK": "0",
        "NODE_RANK": "1",
        "WORLD_SIZE": "2",
        "GROUP_WORLD_SIZE": "2",
        "MASTER_ADDR": "gpu07",
    }
    monkeypatch.setenv("SLURM_STEP_ID", "1")
    assert 15000 <= port < 25000 and int(launch_variables()["MASTER_PORT"]) != port


def test_a_batch_script_without_srun_is_one_process(work, tmp_path, monkeypatch):
    for name, value in srun().items():
        if "STEP" not in name:
            monkeypatch.setenv(name, value)
    assert train(work, "ether", tmp_path / "run")["steps"] == 6


TORCHRUN = {"TORCHELASTIC_RUN_ID": "x", "RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "2", "GROUP_RANK": "0"}


@pytest.mark.parametrize(
    ("variables", "flags", "message"),
    [
        (srun(), [], "--devices 1 --num_nodes 1 does not suit the processes"),
        (srun(), NODES, "(GROUP_WORLD_SIZE is 1)"),
        (srun(STEP_NUM_NODES="2", LOCALID="1"), NODES, "(LOCAL_RANK is 1)"),
        (TORCHRUN, [], "(WORLD_SIZE is 2)"),
        (TORCHRUN | {"LOCAL_WORLD_SIZE": "2"}, NODES, "(LOCAL_WORLD_SIZE is 2)"),
        (TORCHRUN, NODES, "--devices 1 --num_nodes 2: MASTER_ADDR, MASTER_PORT not set in the environment"),
        ({"WORLD_SIZE": "4"}, ["--devices", "2"], "(WORLD_SIZE is 4)"),
        ({"MASTER_ADDR": "127.0.0.1"}, NODES, "NODE_RANK, MASTER_PORT not set in the environment"),
        ({}, [*NODES, "--train.epochs", "0"], "torchrun --nnodes 2 --nproc-per-node 1 --rdzv-backend c10d"),
        ({}, [*NODES, "--train.epochs", "0"], "; --train.epochs must be positive, got 0"),
    ],
)
def test_what_a_launcher_and_the_flags_do_not_agree_on_is_one_line(
    work, tmp_path, capsys, monkeypatch, variables, flags, message
):
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    name, arguments = command(work, "ether", tmp_path / "run", *flags)
    assert message in refusal(capsys, name, arguments)
    assert not (tmp_path / "run").exists()


def test_a_machine_that_no_one_joins_gives_up_in_one_line(work, tmp_path):
    first = Node(work, tmp_path / "run", node="0", port=free_port(), cwd=tmp_path, patience=1)
    code, text = first.end()
    assert code == 1
    assert text.splitlines()[-1].startswith("error: the 2 processes of this run did not all meet at 127.0.0.1:")
