"""Prepare your own instruction data for finetuning.

A .json file is one list, a .jsonl file has one row a line, a .csv file has a header. A row is either

    {"instruction": "...", "input": "...", "output": "..."}                     (input may be missing)
    {"messages": [{"role": "user", "content": "..."}, {"role": "assistant", "content": "..."}, ...]}

A conversation (system, user, assistant; any number of turns; .json and .jsonl only) is rendered with the model's own
chat template. Learned are the assistant's answers alone, each with its end token, behind exactly what chat would send;
not those marked "weight": 0 (or "train" or "loss": false), nor a greeting before the first user message. Where the
template renders earlier turns differently (reasoning models do), every answer becomes a sample of its own.

    python scripts/prepare_json.py --data_file_path my_data.jsonl --destination_path data/mine \
        --checkpoint_dir checkpoints/HuggingFaceTB/SmolLM2-135M-Instruct --max_seq_length 512
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # runs from any folder

from lit_gpt.cli import main
from lit_gpt.data import prepare


def setup(*, data_file_path: str, **options) -> None:
    """Prepare your own instruction data or conversations for finetuning.

    Args:
        data_file_path: a .json, .jsonl or .csv file, or the https address of one.
    """
    prepare(data_file_path, **options)


if __name__ == "__main__":
    main(setup)
