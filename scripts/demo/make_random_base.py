"""Write what the GPU report trains: a known model's sizes with random weights, a small tokenizer, and rows.

python scripts/demo/make_random_base.py --model_name Llama-3.2-1B --precision bf16-true --out_dir BASE
"""

import json
import sys
from itertools import pairwise
from pathlib import Path
from typing import Literal

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # runs from any folder

import torch
from tokenizers import ByteLevelBPETokenizer

from lit_gpt.checkpoint import meta_model, save_state
from lit_gpt.cli import main
from lit_gpt.config import Config
from lit_gpt.devices import PRECISIONS, choose_device
from lit_gpt.files import prepare_out_dir, write_json

REQUESTS = Path(__file__).parent / "requests" / "train.jsonl"


def setup(*, model_name: str, out_dir: str, precision: Literal[tuple(PRECISIONS)] = "bf16-true") -> None:
    """Write a base with random weights, and rows.json for scripts/prepare_json.py.

    Args:
        model_name: a known model.
        out_dir: the folder to write.
        precision: of the weights: 32-true, bf16-true or 16-true.
    """
    folder, config = prepare_out_dir(out_dir), Config.from_name(model_name)
    model = meta_model(config, PRECISIONS[precision]).to_empty(device=choose_device())
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.02)
    with REQUESTS.open(encoding="utf-8") as file:
        texts = [json.loads(line)["messages"][1]["content"] for line in file]
    tokenizer = ByteLevelBPETokenizer()
    tokenizer.train_from_iterator(texts, 4000, special_tokens=["</s>"], show_progress=False)
    save_state(model.cpu().state_dict(), folder / "lit_model.pth")
    write_json(folder / "lit_config.json", config.to_dict())
    tokenizer.save(str(folder / "tokenizer.json"))
    write_json(folder / "tokenizer_config.json", {"eos_token": "</s>"})
    # Their own answers are a word each: a request answers the one before it, for samples of all lengths.
    write_json(folder / "rows.json", [{"instruction": text, "output": after} for text, after in pairwise(texts)])


if __name__ == "__main__":
    main(setup)
