"""Parts a to c of ``gpu_report.py``, and what all parts share: where they run, what they yield, how they time.

- Parts are generators of ``Row`` and of notes (one line, for people). A row comes as soon as it is measured, so that a
  part which is stopped keeps what it has.
- Weights are random; nothing is downloaded. Without a GPU, and with --short, everything is tiny.
- Optional libraries are imported in the part that needs them.
"""

import copy
import os
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from itertools import product
from time import monotonic, perf_counter
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from eval.costs import LORA, attach
from lit_gpt.batches import Batching
from lit_gpt.config import Config
from lit_gpt.data import Sample
from lit_gpt.devices import choose_device
from lit_gpt.ether import METHODS, EtherConfig
from lit_gpt.lora import LoraConfig
from lit_gpt.model import GPT
from lit_gpt.reflections import FORMS, reflect, reflect_plus, rotate, unit, use_form
from lit_gpt.train import compile_blocks

TINY = Config(
    name="a tiny model", n_layer=2, n_head=4, n_embd=64, n_query_groups=2, intermediate_size=96, vocab_size=512,
    block_size=256, qkv_bias=True,
)  # fmt: skip
BARS = {torch.float32: 2e-5, torch.bfloat16: 0.05, torch.float16: 0.01}
"""Largest relative error of logits and gradients in part b: some roundings, far below a wrong formula's."""
LATE = "left out for want of time"


@dataclass(frozen=True)
class Row:
    """Some columns of one line of a table; lines of the same label grow together."""

    table: str
    label: str
    values: dict[str, float | str]


Found = Iterator[Row | str]


@dataclass(frozen=True)
class Card:
    """The device of a part, its sizes and its deadline."""

    device: torch.device
    dtype: torch.dtype
    """Of 16 bits, what the device multiplies fast."""
    short: bool
    deadline: float = float("inf")

    @classmethod
    def detect(cls, *, short: bool, seconds: float) -> "Card":
        """Return the GPU, or else the CPU, where everything is short."""
        device = choose_device()
        old = device.type == "cuda" and torch.cuda.get_device_capability()[0] < 8
        dtype = torch.float16 if old else torch.bfloat16
        return cls(device, dtype, short or device.type == "cpu", monotonic() + seconds)

    @property
    def on_gpu(self) -> bool:
        """True where the device is a GPU."""
        return self.device.type == "cuda"

    @property
    def left(self) -> float:
        """Return the seconds until the part should end."""
        return self.deadline - monotonic()

    @property
    def precision(self) -> str:
        """Return ``dtype`` as ``--precision`` names it; fp32 on a CPU, as many are slow in 16 bits."""
        return "32-true" if not self.on_gpu else {torch.bfloat16: "bf16-true", torch.float16: "16-true"}[self.dtype]

    @property
    def forms(self) -> tuple[str, ...]:
        """Return the forms of reflections that run here."""
        return FORMS if self.on_gpu and self.kernel_fault is None else FORMS[1:]

    @property
    def kernel_fault(self) -> str | None:
        """Return the reason why Triton's kernels do not run here; None where they do."""
        try:
            from lit_gpt.kernels import try_on

            try_on(self.device)
        except Exception as error:  # of Triton, the driver or a compiler
            return explain(error)
        return None

    def sizes(self, name: str) -> Config:
        """Return a known model's sizes, or the tiny ones."""
        return replace(TINY, qkv_bias=False) if self.short else Config.from_name(name)

    def wait(self) -> None:
        """Wait until the device is done."""
        if self.on_gpu:
            torch.cuda.synchronize()


def in_turn(card: Card, tasks: Mapping[str, Callable[[], Found]], *, seconds: float = 0.0) -> Found:
    """Yield what each finds; a line in place of one that fails, lacks a package, or, but the first, finds no time."""
    for index, (name, task) in enumerate(tasks.items()):
        try:
            if index and card.left < seconds:
                yield f"{LATE}: {', '.join(list(tasks)[index:])}"
                return
            if name.endswith("nf4"):
                import bitsandbytes  # noqa: F401  only to see that it is here
            yield from task()
        except Exception as error:
            yield f"{name}: {explain(error)}"


def explain(error: BaseException) -> str:
    """Return an error in one line."""
    if isinstance(error, ModuleNotFoundError):
        return f"left out: needs {error.name}, which is not installed"
    return f"failed: {type(error).__name__}: {' '.join(str(error).split())[:200]}"


# ------------------------------------------------------------------------------------------------------------- timing
def seconds_of(card: Card, calls: Sequence[Callable[[], Any]], *, repeats: int = 5) -> float:
    """Return the seconds of one of these calls: those of the fastest turn through all of them, by their number.

    On a GPU the turn is captured as a graph first, so that what a CPU needs to start kernels is left out. Calls on
    different data of more bytes than the cache holds make it read memory; all results of a turn are kept until its end,
    so that each has an address of its own: one that is freed would be written over by the next call, in the cache.
    """

    def turn() -> list[Any]:
        return [call() for call in calls]

    turn()
    play, times = turn, 1
    if card.on_gpu:
        graph, stream = torch.cuda.CUDAGraph(), torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            turn()
        torch.cuda.current_stream().wait_stream(stream)
        with torch.cuda.graph(graph):
            turn()
        play, times = graph.replay, 10  # one after another, so that waiting for the end hardly counts
    found = []
    for _ in range(repeats + 1):
        card.wait()
        start = perf_counter()
        for _ in range(times):
            play()
        card.wait()
        found.append(perf_counter() - start)
    return min(found[1:]) / len(calls) / times


def copy_bandwidth(card: Card) -> float:
    """Return the bytes a second, read and written, of a large copy."""
    x = torch.empty(2**21 if card.short else 2**29, dtype=torch.bfloat16, device=card.device)
    y = torch.empty_like(x)
    return 2 * x.nbytes / seconds_of(card, [lambda: y.copy_(x)])


def machine(card: Card) -> Found:
    """Say what the machine is, and measure what it does: memory's and the products' rate."""
    yield from describe(card)
    yield Row("", "copy", {"rate": copy_bandwidth(card) / 1e9, "unit": "GB/s"})
    n = 256 if card.short else 8192
    a, b = (torch.randn(n, n, device=card.device, dtype=card.dtype) for _ in range(2))
    seconds = seconds_of(card, [lambda: a @ b])
    yield Row("", f"product, {name_of(card.dtype)}", {"rate": 2 * n**3 / seconds / 1e12, "unit": "TFLOP/s"})


def describe(card: Card) -> Iterator[str]:
    """Yield a line on the device, one on the software, and one on each thing that figures suffer from."""
    capability, (free, total) = (0, 0), (0, 0)
    if card.on_gpu:
        capability, (free, total) = torch.cuda.get_device_capability(), torch.cuda.mem_get_info()
        yield f"{torch.cuda.get_device_name()}, {total / 1e9:.0f} GB, capability {capability[0]}.{capability[1]}"
    else:
        n = torch.get_num_threads()
        yield f"no GPU: tiny sizes on a CPU with {n} thread{'s' * (n > 1)}, which say nothing about a GPU"
    packages = ("lightning", "triton", "transformers", "peft", "bitsandbytes")
    yield f"torch {torch.__version__}, " + ", ".join(f"{name} {installed(name)}" for name in packages)
    if card.on_gpu and card.kernel_fault:
        yield f"Triton's kernels are left out: {card.kernel_fault}"
    if card.on_gpu and capability < (8, 0):
        yield f"capability {capability[0]}.{capability[1]}: bf16 is emulated, fp16 takes its place"
    if total - free > 2e9:
        yield f"another process holds {(total - free) / 1e9:.1f} GB of the card: times may be too long"
    if not any(name and shutil.which(name) for name in (os.environ.get("CC"), "cc", "gcc", "clang")):
        yield "no C compiler: Triton cannot build its launcher; its kernels and what is compiled may be missing"


def installed(package: str) -> str:
    """Return a package's version, or that it is missing."""
    try:
        return version(package)
    except PackageNotFoundError:
        return "missing"


def name_of(dtype: torch.dtype) -> str:
    """Return the name that people write."""
    return {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}[dtype]


# ---------------------------------------------------------------------------------------------------------- exactness
def adapters() -> dict[str, EtherConfig | LoraConfig]:
    """Return every method, side and layout, on every Linear."""
    every = dict.fromkeys(("query", "key", "value", "projection", "mlp", "head"), True)
    found: dict[str, EtherConfig | LoraConfig] = {"LoRA": LoraConfig(r=4, **every)}
    for method, kind in METHODS.items():
        found[method] = EtherConfig(method, nb=4, **every)
        found[f"{method}, published layout"] = EtherConfig(method, nb=4, block_layout="published", **every)
        if not kind.two_sided:
            found[f"{method}, flipped"] = EtherConfig(method, nb=4, flip_side=True, **every)
    return found


def exactness(card: Card) -> Found:
    """Compare the device with the CPU in fp64: a tiny model's logits and gradients; and packed with padded."""
    torch.backends.cuda.matmul.allow_tf32 = False
    dtypes = [torch.float32, card.dtype] + [torch.float16] * (card.on_gpu and card.dtype != torch.float16)
    cases = [(label, dtype, "eager") for dtype in dtypes for label in adapters()]
    cases += [(label, card.dtype, form) for form in card.forms[1:] for label in ("ether", "etherplus", "etherplusHH")]
    yield from in_turn(card, {" ".join(map(str, case)): partial(compare, card, *case) for case in cases}, seconds=2)
    yield from in_turn(card, {"packing": partial(packing, card)})
    compiled = ("etherplusHH",) if card.short else ("etherplusHH", "oft", "LoRA", "ether")
    tasks = {f"{label} compiled": partial(compare, card, label, card.dtype, "compiled") for label in compiled}
    yield from in_turn(card, tasks, seconds=15)  # the first one takes longest


def compare(card: Card, label: str, dtype: torch.dtype, how: str) -> Found:
    """Yield one case: the largest errors of logits and gradients, relative to the largest value of each tensor."""
    exact, model = twins(card, adapters()[label], dtype)
    if how == "compiled":
        torch._dynamo.reset()  # the graphs of earlier cases
        compile_blocks(model)
    idx = torch.randint(TINY.vocab_size, (2, 48), generator=torch.Generator().manual_seed(1))
    results = []
    for one in (exact, model):
        with use_form(how) if how in FORMS and one is model else nullcontext():
            logits = one(idx.to(one.lm_head.weight.device))
            logits.backward(torch.linspace(-1, 1, logits.numel()).view(logits.shape).to(logits))
        results.append([logits, *(p.grad for p in one.parameters() if p.requires_grad)])
    yield from judge(label, dtype, how, *results)


def judge(label: str, dtype: torch.dtype, how: str, exact: Sequence[Tensor], found: Sequence[Tensor]) -> Found:
    """Yield the largest errors, of logits or a loss, which come first, and of gradients; a note where too large."""
    errors = [largest_error(exact[part], found[part]) for part in (slice(1), slice(1, None))]
    yield Row("", label, {f"{name_of(dtype)}, {how}": " / ".join(f"{error:.0e}" for error in errors)})
    if not all(error <= BARS[dtype] for error in errors):
        yield f"{label}, {name_of(dtype)}, {how}: WRONG by {' and '.join(f'{error:.2g}' for error in errors)}"


def largest_error(exact: Sequence[Tensor], found: Sequence[Tensor]) -> float:
    """Return the largest error of any tensor, relative to the largest value of each; NaN where there is one."""
    pairs = [(a.detach().double().cpu(), b.detach().double().cpu()) for a, b in zip(exact, found, strict=True)]
    return torch.stack([(b - a).abs().max() / a.abs().max() for a, b in pairs]).max().item()


def twins(card: Card, adapter: EtherConfig | LoraConfig, dtype: torch.dtype) -> tuple[GPT, GPT]:
    """Return one random model, all weights exact in ``dtype``, as fp64 on the CPU and as ``dtype`` on the device."""
    torch.manual_seed(0)
    model = attach(GPT(replace(TINY, sliding_window=32)).to(dtype), adapter)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:  # away from the start, where several terms are zero
                parameter += 0.3 * parameter.std() + 0.05 * torch.randn_like(parameter)
    return copy.deepcopy(model).double(), model.to(card.device)


def packing(card: Card) -> Found:
    """Compare samples packed into one row with the same samples padded: loss and gradients."""
    samples = random_samples([40, 17, 64, 5], TINY.vocab_size)
    for label, dtype in product(("LoRA", *METHODS), (torch.float32, card.dtype)):
        model, results = twins(card, adapters()[label], dtype)[1], []
        for batching in (Batching(4), Batching(4, n_tokens=128)):
            idx, targets, lengths = batching.collate(samples, card.device)
            loss = model(idx, lengths=lengths, targets=targets)
            grads = torch.autograd.grad(loss, [p for p in model.parameters() if p.requires_grad])
            results.append([loss, *grads])
        yield from judge(label, dtype, "packed", *results)


def random_samples(lengths: Sequence[int], vocab_size: int) -> list[Sample]:
    """Return samples of these lengths whose every token is learned, the response's from the middle on."""
    generator, made = torch.Generator().manual_seed(3), []
    for n in lengths:
        ids = torch.randint(vocab_size, (n,), generator=generator, dtype=torch.int32)
        made.append({"input_ids": ids, "labels": ids, "response": torch.arange(n) >= n // 2})
    return made


# ------------------------------------------------------------------------------------------------------------ kernels
def kernels(card: Card) -> Found:
    """Time each form of a reflection beside a copy, LoRA's branch and OFT's rotation, on the same activations.

    Bandwidth counts what must move: forward x in and y out (LoRA's branch also reads W x); backward the gradient and
    what was kept in, the gradient of x out.
    """
    T, d, n = (32, 64, 4) if card.short else (2048, 4096, 32)
    cache = torch.cuda.get_device_properties(card.device).L2_cache_size if card.on_gpu else 0
    sets = max(2, 4 * cache // (T * d * card.dtype.itemsize))  # more than the cache holds
    xs, gs, outs = ([torch.randn(T, d, device=card.device).to(card.dtype) for _ in range(sets)] for _ in range(3))
    copied = seconds_of(card, [partial(out.copy_, x) for out, x in zip(outs, xs, strict=True)])
    title = f"x ({T}, {d}), {name_of(card.dtype)}, n = {n}; a copy moves {2 * xs[0].nbytes / copied / 1e9:,.0f} GB/s"

    def timed(label: str, function: Callable[..., Tensor], parameters: Sequence[Tensor], form: str) -> Found:
        def step(x: Tensor, g: Tensor) -> tuple[Tensor, ...]:
            x = x.detach().requires_grad_()
            y = function(x, *parameters)
            return (y.detach(), *torch.autograd.grad(y, (x, *parameters), g))

        with use_form(form):
            forward = seconds_of(card, [partial(torch.no_grad()(function), x, *parameters) for x in xs])
            both = seconds_of(card, [partial(step, x, g) for x, g in zip(xs, gs, strict=True)])
        passes, backward = 1.5 if label.startswith(LORA) else 1, max(1e-9, both - forward)
        values = {"forward, µs": forward * 1e6, "forward, of copy": f"{passes * copied / forward:.0%}"}
        values |= {"backward, µs": backward * 1e6, "backward, of copy": f"{1.5 * copied / backward:.0%}"}
        yield Row(title, label, values)

    tasks = {}
    for label, function, shapes, form in kernel_cases(card, d, n):
        parameters = [torch.randn(shape, device=card.device, requires_grad=True) for shape in shapes]
        tasks[label] = partial(timed, label, function, parameters, form)
    yield from in_turn(card, tasks, seconds=3)


def kernel_cases(card: Card, d: int, n: int) -> list[tuple[str, Callable[..., Tensor], list[tuple[int, ...]], str]]:
    """Return what ``kernels`` times: a name, a function of x and parameters, their shapes, the form of reflections."""
    u, first = (n, d // n), card.forms[0]

    def in_blocks(function: Callable[..., Tensor], x: Tensor, *parameters: Tensor) -> Tensor:
        return function(x.unflatten(-1, (len(parameters[0]), -1)), *parameters).flatten(-2)

    def branch(x: Tensor, down: Tensor, up: Tensor) -> Tensor:
        return x + F.linear(F.linear(x, down.to(x.dtype)), up.to(x.dtype)) * 2

    def plain(x: Tensor, *vectors: Tensor) -> Tensor:  # as the formula is written, with autograd's own backward pass
        units = [unit(vector) for vector in vectors]
        terms = [w * (w * x.float()).sum(-1, keepdim=True) for w in units]
        return (x.float() - 2 * terms[0] if len(terms) == 1 else x.float() + terms[1] - terms[0]).to(x.dtype)

    found = [(f"{LORA} branch", branch, [(8, d), (d, 8)], first)]
    found += [(f"OFT n={8 * n}, R x", partial(in_blocks, rotate), [(8 * n, d // n // 8, d // n // 8)], first)]
    for name, function, shapes in (("ETHER", reflect, [u]), ("ETHER+", reflect_plus, [u, u])):
        found += [(f"{name}, {form}", partial(in_blocks, function), shapes, form) for form in card.forms]
        found += [(f"{name}, as written", partial(in_blocks, plain), shapes, first)]
    return [*found, ("ETHER+, as written, compiled", torch.compile(found[-1][1]), *found[-1][2:])]
