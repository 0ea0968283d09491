"""Measure this machine and choose how the quickstart trains: precision, and the steps that fit its time.

Some CPUs multiply bf16 matrices several times faster than fp32, others only emulate it: a product of the model's size
decides. Then a forward and backward pass of the real work (model, adapter, rows of the data) says how many steps fit.
The answer is one line, "PRECISION STEPS", in a file, so that an interrupted quickstart goes on with the same plan.

    python scripts/demo/choose_steps.py --data_dir checkpoints/ORG/NAME/requests --out_file logs/quickstart/plan.txt
"""

import sys
import timeit
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # runs from any folder

import torch

from lit_gpt.batches import collate
from lit_gpt.checkpoint import load_model
from lit_gpt.cli import main
from lit_gpt.data import load_split, read_data_config
from lit_gpt.devices import choose_device
from lit_gpt.ether import EtherConfig, add_ether, mark_only_ether_as_trainable
from lit_gpt.files import atomic_write

TRAINING_SECONDS = 240  # of ten minutes; the rest is for the evaluations, the answers, the validations and the merge
ROWS_PER_STEP, MICRO_BATCH = 16, 8
SHORT_STEPS = 4


def fastest(action: Callable[[], torch.Tensor], *, repeat: int) -> float:
    """Return the shortest of `repeat` runs of `action`, in seconds; a GPU has finished when a number is here."""
    return min(timeit.repeat(lambda: action().sum().item(), number=1, repeat=repeat))


def choose_precision(device: torch.device) -> str:
    """Return bf16-true where a matrix product of the model's size is faster in bf16, else 32-true."""
    seconds = {}
    for precision, dtype in (("32-true", torch.float32), ("bf16-true", torch.bfloat16)):
        x, weight = torch.ones(512, 576, device=device, dtype=dtype), torch.ones(1536, 576, device=device, dtype=dtype)
        seconds[precision] = fastest(lambda x=x, weight=weight: x @ weight.T, repeat=10)
    return min(seconds, key=seconds.get)


def seconds_per_row(checkpoint_dir: str, samples: list, *, precision: str, device: torch.device) -> float:
    """Time the forward and backward pass of one training row, on average over `samples`."""
    model = load_model(checkpoint_dir, precision)
    add_ether(model, EtherConfig(Htype="etherplusHH", nb=4))
    mark_only_ether_as_trainable(model)
    model.to(device)
    idx, targets = collate(samples, device)

    def step() -> torch.Tensor:
        loss = model(idx, targets=targets)
        loss.backward()
        return loss.detach()

    return fastest(step, repeat=3) / len(samples)


def setup(*, data_dir: str, out_file: str, short: bool = False) -> None:
    """Choose precision and number of steps for the quickstart.

    Args:
        data_dir: the folder that prepare_json.py wrote.
        out_file: where the one line "PRECISION STEPS" goes.
        short: a few steps only.
    """
    torch.manual_seed(0)
    device = choose_device()
    precision = choose_precision(device)
    samples = load_split(Path(data_dir) / "train.pt")
    checkpoint_dir = read_data_config(data_dir)["checkpoint_dir"]
    cost = seconds_per_row(checkpoint_dir, samples[:MICRO_BATCH], precision=precision, device=device)
    one_epoch = len(samples) // ROWS_PER_STEP
    fitting = int(TRAINING_SECONDS / (cost * ROWS_PER_STEP))
    steps = SHORT_STEPS if short else max(10, min(one_epoch, fitting))
    print(f"   {precision} is the faster precision on {device}; a row takes {cost:.2f} s")
    print(f"   {steps} steps of {ROWS_PER_STEP} rows ({one_epoch} steps would be one epoch)")
    with atomic_write(Path(out_file)) as path:
        path.write_text(f"{precision} {steps}\n", encoding="utf-8")


if __name__ == "__main__":
    main(setup)
