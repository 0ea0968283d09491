"""Prepare the Alpaca instruction data set, or a file of the same shape, for finetuning.

The default is the cleaned Alpaca (https://github.com/gururise/AlpacaDataCleaned, CC BY-NC 4.0 as the original), rows
of instruction, input and output, in Alpaca's own prompt style. Only the file differs from the other prepare scripts.

    python scripts/prepare_alpaca.py --destination_path checkpoints/meta-llama/Llama-2-7b-hf/alpaca-t256 \
        --checkpoint_dir checkpoints/meta-llama/Llama-2-7b-hf --max_seq_length 256
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # runs from any folder

from lit_gpt.cli import main
from lit_gpt.data import prepare

ALPACA = "https://raw.githubusercontent.com/tloen/alpaca-lora/main/alpaca_data_cleaned_archive.json"


def setup(*, data_file_path: str = ALPACA, **options) -> None:
    """Prepare Alpaca, or a file of the same shape, for finetuning.

    Args:
        data_file_path: a .json, .jsonl or .csv file with instruction, input and output, or the https address of one.
    """
    prepare(data_file_path, **options)


if __name__ == "__main__":
    main(setup)
