"""Finetune with ETHER, ETHER+ or OFT.

    python finetune/ether.py --io.train_data_dir checkpoints/ORG/NAME/alpaca --Htype etherplusHH --ether_nb 4 \
        --train.learning_rate 5e-3 --precision bf16-true
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # runs from any folder

from lit_gpt.cli import run
from lit_gpt.ether import EtherConfig
from lit_gpt.train import EvalArgs, IOArgs, Job, TrainArgs, default_weight_decay, finetune


def setup(
    *,
    io: IOArgs,
    train: TrainArgs = TrainArgs(),
    eval: EvalArgs = EvalArgs(),
    Htype: str = "ether",
    ether_nb: int = 1,
    ether_query: bool = True,
    ether_key: bool = False,
    ether_value: bool = True,
    ether_projection: bool = False,
    ether_mlp: bool = False,
    ether_head: bool = False,
    ether_dropout: float = 0.0,
    ether_block_dropout: float = 0.0,
    flip_side: bool = False,
    ether_block_layout: str = "diagonal",
    init_from: str | None = None,
    precision: str = "bf16-true",
    devices: int = 1,
    num_nodes: int = 1,
    seed: int = 1337,
    overwrite: bool = False,
) -> None:
    """Finetune with ETHER, ETHER+ or OFT.

    Args:
        io: Where things are.
        train: How to train.
        eval: When to validate.
        Htype: ether, etherplus (one-sided), etherplusHH (two-sided, the paper's ETHER+) or oft.
        ether_nb: Number of diagonal blocks, n.
        ether_query: Adapt the query projections.
        ether_key: Adapt the key projections.
        ether_value: Adapt the value projections.
        ether_projection: Adapt the attention's output projections.
        ether_mlp: Adapt the MLPs.
        ether_head: Adapt the language model's head.
        ether_dropout: Dropout on the input of adapted layers.
        ether_block_dropout: Probability with which a block's R is replaced by I while training; no small change for
            ether, whose R is never near I.
        flip_side: Move the one-sided transform of a non-square Linear to its smaller side.
        ether_block_layout: diagonal (the paper's), or published (what the original code does for n > 1).
        init_from: An adapter file to continue from, ours or the original code's; its settings must be the flags'.
        precision: 32-true, bf16-true, 16-true, bf16-mixed or 16-mixed; adapters stay fp32 in any case.
        devices: Processes on this machine.
        num_nodes: Machines.
        seed: Fixes the start of the adapter, the order of the data and dropout.
        overwrite: Write into a run folder that already holds a finished run.
    """
    config = EtherConfig(
        Htype=Htype,
        nb=ether_nb,
        query=ether_query,
        key=ether_key,
        value=ether_value,
        projection=ether_projection,
        mlp=ether_mlp,
        head=ether_head,
        dropout=ether_dropout,
        block_dropout=ether_block_dropout,
        flip_side=flip_side,
        block_layout=ether_block_layout,
    )
    job = Job(Htype, "ether", config, default_weight_decay(Htype), init_from)
    finetune(
        job,
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
