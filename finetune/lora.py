"""Finetune with LoRA, the baseline.

python finetune/lora.py --io.train_data_dir checkpoints/ORG/NAME/alpaca --lora_r 8 --train.learning_rate 5e-4
"""

import sys
from collections.abc import Collection
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # runs from any folder

from lit_gpt.cli import main
from lit_gpt.lora import LoraConfig
from lit_gpt.plan import Job, TrainArgs, default_weight_decay
from lit_gpt.train import finetune


def setup(
    *,
    train: TrainArgs = TrainArgs(learning_rate=5e-4),
    lora_r: int = 8,
    lora_alpha: float = 16,
    lora_dropout: float = 0.0,
    lora_query: bool = True,
    lora_key: bool = False,
    lora_value: bool = True,
    lora_projection: bool = False,
    lora_mlp: bool = False,
    lora_head: bool = False,
    init_from: str | None = None,
    given: Collection[str] = (),
    **options,
) -> None:
    """Finetune with LoRA.

    Args:
        train: How to train; the rate that suits LoRA is lower than ETHER's.
        lora_r: Rank.
        lora_alpha: The update is scaled by alpha / r.
        lora_dropout: Dropout on the input of the low-rank branch.
        lora_query: Adapt the query projections.
        lora_key: Adapt the key projections.
        lora_value: Adapt the value projections.
        lora_projection: Adapt the attention's output projections.
        lora_mlp: Adapt the MLPs.
        lora_head: Adapt the language model's head.
        init_from: An adapter file to continue from; its settings are used, and a flag that says otherwise is refused.
        given: No flag: the names of those that were given.
    """
    config = LoraConfig(
        r=lora_r,
        alpha=lora_alpha,
        dropout=lora_dropout,
        query=lora_query,
        key=lora_key,
        value=lora_value,
        projection=lora_projection,
        mlp=lora_mlp,
        head=lora_head,
    )
    finetune(Job("lora", "lora", config, default_weight_decay("lora"), init_from, given), train=train, **options)


if __name__ == "__main__":
    main(setup)
