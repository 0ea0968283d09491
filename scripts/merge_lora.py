"""Merge a LoRA adapter into its base model.

    python scripts/merge_lora.py --checkpoint_dir checkpoints/ORG/NAME --lora_path RUN/lit_model_lora_finetuned.pth

The result is a folder like a base model's: chat with it, evaluate it, convert it, finetune it again.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # runs from any folder

from lit_gpt.adapter_files import merge_adapter
from lit_gpt.cli import run


def setup(
    *,
    checkpoint_dir: str,
    lora_path: str,
    out_dir: str | None = None,
    precision: str = "bf16-true",
    overwrite: bool = False,
) -> None:
    """Merge a LoRA adapter into its base model.

    Args:
        checkpoint_dir: The base model's folder.
        lora_path: The adapter file.
        out_dir: The folder to write; merged/ beside the adapter file by default.
        precision: Of the written weights: 32-true, bf16-true or 16-true. Merging itself is done in fp32.
        overwrite: Write into a folder that already holds a model.
    """
    merge_adapter(
        kind="lora",
        path=lora_path,
        checkpoint_dir=checkpoint_dir,
        out_dir=out_dir,
        precision=precision,
        overwrite=overwrite,
    )


if __name__ == "__main__":
    run(setup)
