"""Prepare databricks-dolly-15k, or a file of the same shape, for finetuning.

Its rows (CC BY-SA 3.0, https://huggingface.co/datasets/databricks/databricks-dolly-15k) call the input "context" and
the output "response". HF_ENDPOINT names another host than huggingface.co.

    python scripts/prepare_dolly.py --destination_path data/dolly \
        --checkpoint_dir checkpoints/meta-llama/Llama-2-7b-hf --max_seq_length 512
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # runs from any folder

from huggingface_hub import hf_hub_url

from lit_gpt.cli import main
from lit_gpt.data import prepare

DOLLY = hf_hub_url("databricks/databricks-dolly-15k", "databricks-dolly-15k.jsonl", repo_type="dataset")
FIELDS = {"instruction": "instruction", "input": "context", "output": "response"}


def setup(*, data_file_path: str = DOLLY, **options) -> None:
    """Prepare databricks-dolly-15k, or a file of the same shape, for finetuning.

    Args:
        data_file_path: a .json, .jsonl or .csv file with instruction, context and response, or the address of one.
    """
    prepare(data_file_path, fields=FIELDS, **options)


if __name__ == "__main__":
    main(setup)
