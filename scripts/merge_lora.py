"""Merge a LoRA adapter into its base model.

    python scripts/merge_lora.py --checkpoint_dir checkpoints/ORG/NAME --lora_path RUN/lit_model_lora_finetuned.pth

The result is a folder like a base model's: chat with it, evaluate it, convert it, finetune it again.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # runs from any folder

from lit_gpt.cli import main
from lit_gpt.merge import merge_adapter


def setup(*, lora_path: Path, **options) -> None:
    """Merge a LoRA adapter into its base model.

    Args:
        lora_path: the adapter file.
    """
    merge_adapter("lora", lora_path, **options)


if __name__ == "__main__":
    main(setup)
