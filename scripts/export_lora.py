"""Turn an ETHER, ETHER+ or LoRA adapter into a PEFT LoRA folder: the same function, hosted without merging.

    python scripts/export_lora.py --checkpoint_dir checkpoints/ORG/NAME --out_dir path/to/lora \\
        --ether_path RUN/lit_model_ether_finetuned.pth

Nothing is approximated (lit_gpt/export.py says why); what no LoRA can hold is refused, with the command to merge it.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # runs from any folder

from lit_gpt.cli import main
from lit_gpt.export import export_adapter as setup

if __name__ == "__main__":
    main(setup)
