"""Finetune with LoRA, the baseline.

python finetune/lora.py --io.train_data_dir checkpoints/ORG/NAME/alpaca --lora_r 8 --train.learning_rate 5e-4
"""

import sys
from collections.abc import Collection
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # runs from any folder

from lit_gpt.cli import main
from lit_gpt.lora import LoraConfig
from lit_gpt.settings import Settings, TrainArgs
from lit_gpt.train import finetune


def setup(
    *, adapter: LoraConfig, train: TrainArgs = TrainArgs(learning_rate=5e-4), given: Collection[str] = (), **options
) -> None:
    """Finetune with LoRA.

    Args:
        adapter: No flag: the fields of the config are (--lora_r, --lora_alpha, ...).
        train: How to train; the rate that suits LoRA is lower than ETHER's.
        given: No flag: the names of those that were given.
    """
    finetune(Settings(adapter=adapter, train=train, **options), given=given)


if __name__ == "__main__":
    main(setup)
