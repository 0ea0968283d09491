"""Finetune with ETHER, ETHER+ or OFT.

    python finetune/ether.py --io.train_data_dir checkpoints/ORG/NAME/alpaca --Htype etherplusHH --ether_nb 4 \
        --train.learning_rate 5e-3 --precision bf16-true
"""

import sys
from collections.abc import Collection
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # runs from any folder

from lit_gpt.cli import main
from lit_gpt.ether import EtherConfig
from lit_gpt.plan import Job, default_weight_decay
from lit_gpt.train import finetune


def setup(
    *,
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
    given: Collection[str] = (),
    **options,
) -> None:
    """Finetune with ETHER, ETHER+ or OFT.

    Args:
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
        init_from: An adapter file to continue from, ours or the original code's; its settings are used,
            and a flag that says otherwise is refused.
        given: No flag: the names of those that were given.
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
    finetune(Job(Htype, "ether", config, default_weight_decay(Htype), init_from, given), **options)


if __name__ == "__main__":
    main(setup)
