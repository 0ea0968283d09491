"""Turn an ETHER, ETHER+ or LoRA adapter into a PEFT LoRA folder: the same function, hosted without merging.

    python scripts/export_lora.py --checkpoint_dir checkpoints/ORG/NAME --out_dir path/to/lora \\
        --ether_path RUN/lit_model_ether_finetuned.pth

Nothing is approximated (lit_gpt/export.py says why); what no LoRA can hold is refused, with the command to merge it.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # runs from any folder

from lit_gpt.cli import main
from lit_gpt.export import export_adapter


def setup(
    *,
    checkpoint_dir: Path,
    out_dir: Path,
    ether_path: Path | None = None,
    lora_path: Path | None = None,
    overwrite: bool = False,
) -> None:
    """Write an adapter as a PEFT LoRA folder (adapter_config.json, adapter_model.safetensors).

    Args:
        checkpoint_dir: the base model's folder.
        out_dir: the folder to write.
        ether_path: an ETHER or ETHER+ adapter file, ours or the original code's; or
        lora_path: a LoRA adapter file.
        overwrite: replace an adapter that is already in out_dir.
    """
    export_adapter(
        checkpoint_dir=checkpoint_dir,
        out_dir=out_dir,
        ether_path=ether_path,
        lora_path=lora_path,
        overwrite=overwrite,
    )


if __name__ == "__main__":
    main(setup)
