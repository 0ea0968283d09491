"""Merge an ETHER, ETHER+ or OFT adapter into its base model.

    python scripts/merge_ether.py --checkpoint_dir checkpoints/ORG/NAME --ether_path RUN/lit_model_ether_finetuned.pth

The result is a folder like a base model's: chat with it, evaluate it, convert it, finetune it again.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # runs from any folder

from lit_gpt.cli import main
from lit_gpt.merge import merge_adapter


def setup(*, ether_path: Path, **options) -> None:
    """Merge an ETHER, ETHER+ or OFT adapter into its base model.

    Args:
        ether_path: the adapter file, ours or the original code's.
    """
    merge_adapter("ether", ether_path, **options)


if __name__ == "__main__":
    main(setup)
