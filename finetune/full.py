"""Finetune every weight; the result is a folder like a base model's, final/ in the run folder.

python finetune/full.py --io.train_data_dir checkpoints/ORG/NAME/alpaca --train.learning_rate 2e-5
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # runs from any folder

from lit_gpt.cli import main
from lit_gpt.settings import Settings, TrainArgs
from lit_gpt.train import finetune


def setup(*, train: TrainArgs = TrainArgs(learning_rate=2e-5), precision: str = "bf16-mixed", **options) -> None:
    """Finetune every weight.

    Args:
        train: How to train; all weights ask for a lower rate than an adapter.
        precision: 32-true, bf16-true, 16-true, bf16-mixed or 16-mixed; small updates are lost in bf16-true.
    """
    finetune(Settings(adapter=None, init_from=None, train=train, precision=precision, **options))


if __name__ == "__main__":
    main(setup)
