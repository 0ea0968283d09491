"""Finetune every weight; the result is a folder like a base model's, final/ in the run folder.

python finetune/full.py --io.train_data_dir checkpoints/ORG/NAME/alpaca --train.learning_rate 2e-5
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # runs from any folder

from lit_gpt.cli import run
from lit_gpt.train import EvalArgs, IOArgs, Job, TrainArgs, default_weight_decay, finetune


def setup(
    *,
    io: IOArgs,
    train: TrainArgs = TrainArgs(learning_rate=2e-5),
    eval: EvalArgs = EvalArgs(),
    precision: str = "bf16-mixed",
    devices: int = 1,
    num_nodes: int = 1,
    seed: int = 1337,
    overwrite: bool = False,
) -> None:
    """Finetune every weight.

    Args:
        io: Where things are.
        train: How to train.
        eval: When to validate.
        precision: 32-true, bf16-true, 16-true, bf16-mixed or 16-mixed; small updates are lost in bf16-true.
        devices: Processes on this machine.
        num_nodes: Machines.
        seed: Fixes the order of the data.
        overwrite: Write into a run folder that already holds a finished run.
    """
    finetune(
        Job("full", "full", None, default_weight_decay("full")),
        io=io,
        train=train,
        eval=eval,
        precision=precision,
        devices=devices,
        num_nodes=num_nodes,
        seed=seed,
        overwrite=overwrite,
    )


if __name__ == "__main__":
    run(setup)
