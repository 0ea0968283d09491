"""Measure this machine and choose how the quickstart trains: precision, and the steps that fit its time.

Some CPUs multiply bf16 matrices several times faster than fp32, others only emulate it: a forward and backward pass of
the real work (model, adapter, four rows of the data) in both tells which to take, and how many steps fit. The answer is
one line, "PRECISION STEPS", in a file, so that an interrupted quickstart goes on with the same plan.

    python scripts/demo/choose_steps.py --data_dir checkpoints/ORG/NAME/requests --out_file logs/quickstart/plan.txt
"""

import sys
import timeit
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # runs from any folder

import torch

from lit_gpt.adapter_files import make_trainable
from lit_gpt.batches import collate
from lit_gpt.checkpoint import load_model
from lit_gpt.cli import main
from lit_gpt.data import load_split, read_data_config
from lit_gpt.devices import choose_device
from lit_gpt.ether import EtherConfig
from lit_gpt.files import write_text

TRAINING_SECONDS = 240  # of ten minutes; the rest is for the evaluations, the answers, the validations and the merge
ROWS_PER_STEP = 16
SHORT_STEPS = 4


def seconds_per_row(checkpoint_dir: str, samples: list, *, precision: str, device: torch.device) -> float:
    """Time the forward and backward pass of one training row, on average over `samples`."""
    model = load_model(checkpoint_dir, precision)
    make_trainable(model, EtherConfig(Htype="etherplusHH", nb=4))
    model.to(device)
    idx, targets = collate(samples, device)

    def step() -> None:
        loss = model(idx, targets=targets)
        loss.backward()
        loss.item()  # a GPU has finished when the number is here

    return min(timeit.repeat(step, number=1, repeat=3)) / len(samples)


def setup(*, data_dir: str, out_file: str, short: bool = False) -> None:
    """Choose precision and number of steps for the quickstart.

    Args:
        data_dir: the folder that prepare_json.py wrote.
        out_file: where the one line "PRECISION STEPS" goes.
        short: a few steps only.
    """
    torch.manual_seed(0)
    device = choose_device()
    samples = load_split(Path(data_dir) / "train.pt")
    checkpoint_dir = read_data_config(data_dir)["checkpoint_dir"]
    measured = partial(seconds_per_row, checkpoint_dir, samples[:4], device=device)
    cost, precision = min((measured(precision=each), each) for each in ("32-true", "bf16-true"))
    one_epoch = len(samples) // ROWS_PER_STEP
    fitting = int(TRAINING_SECONDS / (cost * ROWS_PER_STEP))
    steps = SHORT_STEPS if short else max(10, min(one_epoch, fitting))
    print(f"   {precision} is the faster precision on {device}; a row takes {cost:.2f} s")
    print(f"   {steps} steps of {ROWS_PER_STEP} rows ({one_epoch} steps would be one epoch)")
    write_text(out_file, f"{precision} {steps}\n")


if __name__ == "__main__":
    main(setup)
