"""Measure what a device can do, and how near a reflection comes to a copy of its activation: rates and microseconds.

    python eval/bandwidth.py                                                                # on a GPU
    python eval/bandwidth.py --rows 32 --width 64 --blocks 4 --precision 32-true            # to see that it works

A reflection moves as much as a copy forward, x in and y out (LoRA's branch 1.5 times that: it also reads W x), and 1.5
times that backward: the gradient and what was kept in, the gradient of x out.
"""

import sys
import timeit
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Literal

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # runs from any folder

import torch
import torch.nn.functional as F
from jsonargparse.typing import PositiveInt
from torch import Tensor

from eval.costs import LORA, describe
from lit_gpt.cli import main
from lit_gpt.devices import PRECISIONS, choose_device
from lit_gpt.reflections import FORMS, reflect, rotate, use_form

N_SETS = 16
"""Activations that take turns: 256 MiB of (2048, 4096) in 16 bits, more than a cache holds."""


def seconds_of(calls: Sequence[Callable[[], Any]], device: torch.device) -> float:
    """Return the seconds of one of these calls: those of a turn through all of them, by their number.

    On a GPU turns are captured as a graph, so that what a CPU needs to start kernels is left out. Calls on different
    data of more bytes than the cache holds make it read memory; all results of a turn are kept until its end, so that
    each has an address of its own: one that is freed would be written over by the next call, in the cache.
    """

    def turn() -> list[Any]:
        return [call() for call in calls]

    if device.type == "cuda":
        from triton.testing import do_bench_cudagraph

        return do_bench_cudagraph(turn, return_mode="median") / 1e3 / len(calls)
    return min(timeit.repeat(turn, number=1, repeat=5)) / len(calls)


def lora_branch(x: Tensor, down: Tensor, up: Tensor) -> Tensor:
    """Return x with LoRA's branch added."""
    return x + F.linear(F.linear(x, down.to(x.dtype)), up.to(x.dtype)) * 2


def time_both(function: Callable[..., Tensor], xs: list[Tensor], *shapes: tuple[int, ...]) -> tuple[float, float]:
    """Return the seconds of a function of x and of parameters of these shapes: forward, backward."""
    parameters = [torch.randn(shape, device=xs[0].device, requires_grad=True) for shape in shapes]
    gradients = [torch.randn_like(x) for x in xs]

    def step(x: Tensor, gradient: Tensor) -> tuple[Tensor, ...]:
        x = x.detach().requires_grad_()
        y = function(x, *parameters)
        return (y.detach(), *torch.autograd.grad(y, (x, *parameters), gradient))

    forward = seconds_of([partial(torch.no_grad()(function), x, *parameters) for x in xs], xs[0].device)
    both = seconds_of([partial(step, *pair) for pair in zip(xs, gradients, strict=True)], xs[0].device)
    return forward, both - forward


def setup(
    *,
    rows: PositiveInt = 2048,
    width: PositiveInt = 4096,
    blocks: PositiveInt = 32,
    precision: Literal[tuple(PRECISIONS)] = "bf16-true",
) -> None:
    """Print the rates of copies and products, and the time of reflections, OFT's rotation and LoRA's branch.

    Args:
        rows: positions of the activation.
        width: its entries a position.
        blocks: the n of ETHER and ETHER+; OFT has eight times as many.
        precision: of the activation: 32-true, bf16-true or 16-true.
    """
    device = choose_device()
    factory = {"device": device, "dtype": PRECISIONS[precision]}
    n, oft = 2 * width, 8 * blocks
    a, b, c = (torch.randn(n, n, **factory) for _ in range(3))
    print(f"{describe(device)}, {precision}")
    print(f"copy: {2e-9 * a.nbytes / seconds_of([lambda: a.copy_(b), lambda: b.copy_(c)], device):.3g} GB/s")
    print(f"product: {2e-12 * n**3 / seconds_of([lambda: a @ b], device):.3g} TFLOP/s")
    print(f"\nx ({rows}, {width}), n = {blocks}, of OFT {oft}: microseconds forward, backward", flush=True)
    cases = {  # the form of reflections, the function, the shape of x without its rows, those of the parameters
        "copy": (FORMS[0], torch.clone, (width,)),
        LORA: (FORMS[0], lora_branch, (width,), (8, width), (width, 8)),
        "OFT": (FORMS[0], rotate, (oft, width // oft), (oft, width // oft, width // oft)),
    }
    for form in FORMS if device.type == "cuda" else ("products",):
        cases[f"ETHER, {form}"] = (form, reflect, *[(blocks, width // blocks)] * 2)
        cases[f"ETHER+, {form}"] = (form, reflect, *[(blocks, width // blocks)] * 3)
    for name, (form, function, shape, *shapes) in cases.items():
        xs = [torch.randn(rows, *shape, **factory) for _ in range(N_SETS)]
        with use_form(form):  # where the kernels are missing, a line on stderr says that products take their place
            forward, backward = time_both(function, xs, *shapes)
        print(f"{name:<20} {1e6 * forward:>8.1f} {1e6 * backward:>8.1f}", flush=True)


if __name__ == "__main__":
    main(setup)
