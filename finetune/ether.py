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
from lit_gpt.settings import Settings
from lit_gpt.train import finetune


def setup(*, adapter: EtherConfig, given: Collection[str] = (), **options) -> None:
    """Finetune with ETHER, ETHER+ or OFT.

    Args:
        adapter: No flag: the fields of the config are (--Htype, --ether_nb, ...).
        given: No flag: the names of those that were given.
    """
    finetune(Settings(adapter=adapter, **options), given=given)


if __name__ == "__main__":
    main(setup)
