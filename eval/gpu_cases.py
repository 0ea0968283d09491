"""The measurements of ``gpu_report.py``: for each part its cases by name, the most important first.

- A case is a function of the card and of its own name that yields rows: a table's title, a line's label, values by
  column. It raises where something is wrong.
- Weights are random; nothing is downloaded. Without a GPU, and with --short, everything is tiny.
- Optional libraries are imported in the case that needs them.
"""

import json
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from eval import costs
from eval.costs import LORA, random_base
from lit_gpt.checkpoint import save_state
from lit_gpt.config import Config
from lit_gpt.data import prepare
from lit_gpt.devices import PRECISIONS, choose_device
from lit_gpt.files import read_json, write_json
from lit_gpt.reflections import FORMS, reflect, rotate, use_form
from lit_gpt.report import read_metrics
from lit_gpt.run_folder import METRICS, SUMMARY

ROOT = Path(__file__).resolve().parents[1]
REQUESTS = ROOT / "scripts" / "demo" / "requests" / "train.jsonl"
TINY = Config(
    name="a tiny model", n_layer=2, n_head=4, n_embd=64, n_query_groups=2, intermediate_size=96, vocab_size=4096,
    block_size=256,
)  # fmt: skip
Found = Iterator[tuple[str, str, dict[str, float | str]]]


@dataclass(frozen=True)
class Card:
    """The device that is measured, and the sizes there.

    Attributes:
        precision: on a GPU the one of 16 bits that it multiplies fast.
        short: everything is tiny.
        folder: for files, which are removed when the part is over.
    """

    device: torch.device
    precision: str
    short: bool
    folder: Path = Path()

    @classmethod
    def detect(cls, *, short: bool, folder: Path) -> "Card":
        """Return the GPU, or else the CPU, where everything is short."""
        if choose_device().type == "cpu":
            return cls(torch.device("cpu"), "32-true", True, folder)
        old = torch.cuda.get_device_capability() < (8, 0)
        return cls(torch.device("cuda"), "16-true" if old else "bf16-true", short, folder)

    @property
    def options(self) -> dict[str, Any]:
        """Return device and dtype, as what builds models and tensors takes them."""
        return {"device": self.device, "dtype": PRECISIONS[self.precision]}

    def sizes(self, name: str = "Llama-2-7b-hf") -> Config:
        """Return a known model's sizes, with as many layers as fit the memory that is free; or the tiny ones."""
        config = TINY if self.short else Config.from_name(name)
        n = int(config.n_layer * min(1, costs.fitting(config, **self.options) / 1.8))  # 0.8 for a step's activations
        return config if n == config.n_layer else replace(config, n_layer=n, name=f"{n} layers of {config.name}")


def seconds_of(card: Card, calls: Sequence[Callable[[], Any]]) -> float:
    """Return the seconds of one of these calls: those of a turn through all of them, by their number.

    On a GPU turns are captured as a graph, so that what a CPU needs to start kernels is left out. Calls on different
    data of more bytes than the cache holds make it read memory; all results of a turn are kept until its end, so that
    each has an address of its own: one that is freed would be written over by the next call, in the cache.
    """

    def turn() -> list[Any]:
        return [call() for call in calls]

    if card.device.type == "cuda":
        from triton.testing import do_bench_cudagraph

        return do_bench_cudagraph(turn, return_mode="median") / 1e3 / len(calls)
    return median(costs.timed({"": turn}, card.device, rounds=5)[""]["seconds"]) / len(calls)


def machine(card: Card, name: str) -> Found:
    """Say what figures depend on, and measure the rates of memory and of products."""
    title, n = costs.describe(card.device), 256 if card.short else 8192
    for package in ("torch", "lightning", "triton", "transformers", "peft", "bitsandbytes"):
        with suppress(PackageNotFoundError):
            yield title, package, {"": version(package)}
    a, b, c = (torch.randn(n, n, **card.options) for _ in range(3))
    yield title, "copy, GB/s", {"": 2 * a.nbytes / seconds_of(card, [lambda: a.copy_(b), lambda: b.copy_(c)]) / 1e9}
    yield title, f"product, {card.precision}, TFLOP/s", {"": 2 * n**3 / seconds_of(card, [lambda: a @ b]) / 1e12}


# ----------------------------------------------------------------------------------------------------------- training
PACKED = ("--train.packing", "true")
RUNS = {
    "packed": PACKED,
    "packed, compiled": (*PACKED, "--compile", "true"),
    "padded": (),
    "packed, checkpointing": (*PACKED, "--train.activation_checkpointing", "true"),
    "packed, nf4": (*PACKED, "--quantize", "bnb.nf4"),
}


def make_base_and_data(card: Card, name: str) -> Found:
    """Write what runs start from: a base-shaped folder with random weights and a BPE, and prepared data."""
    from tokenizers import ByteLevelBPETokenizer

    base, config, tokenizer = card.folder / "base", card.sizes("meta-llama/Llama-3.2-1B"), ByteLevelBPETokenizer()
    with REQUESTS.open(encoding="utf-8") as file:
        texts = [json.loads(line)["messages"][1]["content"] for line in file]
    # Their own answers are a word each: a request answers the one before it, for samples of all lengths.
    rows = [{"instruction": text, "output": after} for text, after in pairwise(texts)]
    write_json(card.folder / "rows.json", rows)
    tokenizer.train_from_iterator(texts, 4000, special_tokens=["</s>"], show_progress=False)
    save_state(random_base(config, **card.options).cpu().state_dict(), base / "lit_model.pth")
    write_json(base / "lit_config.json", config.to_dict())
    tokenizer.save(str(base / "tokenizer.json"))
    write_json(base / "tokenizer_config.json", {"eos_token": "</s>"})
    folders = {"destination_path": card.folder / "data", "checkpoint_dir": base}
    prepare(card.folder / "rows.json", **folders, max_seq_length=256)
    yield from ()


def finetune(card: Card, name: str, *more: str) -> list[str]:
    """Return the command that trains two-sided ETHER+; what it writes goes to ``card.folder / name``."""
    import_module("jsonargparse")
    micro, batch, n_steps, n = (2, 4, 6, 4) if card.short else (8, 32, 24, 32)
    flags = f"--Htype etherplusHH --ether_nb {n} --train.micro_batch_size {micro} --train.global_batch_size {batch}"
    flags += f" --precision {card.precision} --train.epochs 9 --train.max_steps {n_steps} --eval.interval 1000"
    folders = ["--io.train_data_dir", str(card.folder / "data"), "--io.out_dir", str(card.folder / name)]
    return [sys.executable, str(ROOT / "finetune" / "ether.py"), *flags.split(), *folders, *more]


def train(card: Card, name: str) -> Found:
    """Train for a minute at most: the rate in the second half, when all is compiled, and the memory estimate."""
    if card.short and name != "packed, checkpointing":
        return
    folder = card.folder / name.replace(", ", "-")
    subprocess.run(finetune(card, folder.name, "--train.max_time", "1", *RUNS[name]), check=True)
    rows = [{"tokens": 0, "seconds": 0}, *(row for row in read_metrics(folder / METRICS) if "loss" in row)]
    half, end = rows[(len(rows) - 1) // 2], rows[-1]
    rate = (end["tokens"] - half["tokens"]) / (end["seconds"] - half["seconds"])
    values = {"steps": f"{len(rows) - 1}", "real tokens/s": rate}
    if (folder / SUMMARY).exists():  # all steps were taken within the minute
        summary = read_json(folder / SUMMARY)
        measured, estimated = summary["run_memory_bytes"], summary["estimated_memory_bytes"] or 0
        values |= {"padding": f"{summary['padding']:.0%}", "peak, GB": measured / 1e9, "estimated": estimated / 1e9}
    yield f"finetune/ether.py, {card.precision}", name, values


# -------------------------------------------------------------------------------------------------------------- steps
FIRST = ("frozen", "LoRA", "two-sided")
STEPS = {  # lengths, words of the methods' labels, options of the models
    "eager": ((2048, 256), ("",), {}),
    "compiled": ((2048, 256), FIRST, {"compiled": True}),
    "nf4": ((512,), FIRST, {"scheme": "bnb.nf4"}),
    "compiled, the others": ((2048, 256), ("frozen", "LoRA", "ETHER n", "one-sided", "OFT"), {"compiled": True}),
}
PEFT = {
    f"PEFT {LORA}": ("LoraConfig", {"r": 8, "lora_alpha": 16}),
    "PEFT OFT b=16": ("OFTConfig", {"r": 0, "oft_block_size": 16}),
}


def our_steps(card: Card, name: str) -> Found:
    """Time steps of some of the methods in turns, on one set of weights."""
    if card.short and name == "compiled, the others":
        return
    lengths, words, options = STEPS[name]
    config, (n, oft) = card.sizes(), (4, 8) if card.short else (32, 256)
    variants, _ = costs.choose_variants(config, targets=("query", "value"), blocks=(n,), oft_blocks=(oft,))
    variants = {label: adapter for label, adapter in variants.items() if any(word in label for word in words)}
    models = costs.random_models(config, variants, **options, **card.options)
    for T in lengths:
        yield from step_rows(card, f"{config.name}, {name}", models, T)


def peft_steps(card: Card, name: str) -> Found:
    """Time the same of transformers' Llama with PEFT's adapters; their defaults otherwise."""
    import peft
    import transformers

    config, (kind, settings) = card.sizes(), PEFT[name]
    sizes = transformers.LlamaConfig(
        vocab_size=config.padded_vocab_size, hidden_size=config.n_embd, intermediate_size=config.intermediate_size,
        num_hidden_layers=config.n_layer, num_attention_heads=config.n_head, num_key_value_heads=config.n_query_groups,
        max_position_embeddings=config.block_size, rms_norm_eps=config.norm_eps, use_cache=False,
    )  # fmt: skip
    with torch.device(card.device):
        base = transformers.AutoModelForCausalLM.from_config(sizes, dtype=PRECISIONS[card.precision])
    model = peft.get_peft_model(base, getattr(peft, kind)(target_modules=["q_proj", "v_proj"], **settings)).train()
    loss = {"loss": lambda model, idx: model(input_ids=idx, labels=idx).loss}
    yield from step_rows(card, f"{config.name}, eager", {name: model}, 2048, **loss)


def step_rows(card: Card, what: str, models: Mapping[str, nn.Module], T: int, **loss: Any) -> Found:
    """Yield each model's time and peak memory of a step, also as ratios to LoRA's where it is among them."""
    T, rounds = (T // 40, 2) if card.short else (T, 8)
    rows = costs.measure(models, torch.randint(4096, (1, T), device=card.device), rounds=rounds, **loss)
    for label, row in rows.items():
        yield f"{what}, {card.precision}, q and v, T = {T}", label, costs.time_columns(row)


# ------------------------------------------------------------------------------------------------------------ kernels
def lora_branch(x: Tensor, down: Tensor, up: Tensor) -> Tensor:
    """Return x with LoRA's branch added."""
    return x + F.linear(F.linear(x, down.to(x.dtype)), up.to(x.dtype)) * 2


def kernel(card: Card, name: str) -> Found:
    """Time a reflection, LoRA's branch, OFT's rotation or a copy of an activation, forward and backward.

    A reflection moves as much as a copy forward, x in and y out (LoRA's branch 1.5 times that: it also reads W x), and
    1.5 times that backward, the gradient and what was kept in, the gradient of x out.
    """
    kind, _, form = name.partition(", ")
    if form == FORMS[0]:  # products would take its place in silence
        if card.device.type == "cpu":
            return
        import_module("lit_gpt.kernels").try_on(card.device)
    T, d, n = (32, 64, 4) if card.short else (2048, 4096, 32)
    size = d // n
    function, shape, *shapes = {  # the shape of x without T, and those of the parameters
        "copy": (torch.clone, (d,)),
        LORA: (lora_branch, (d,), (8, d), (d, 8)),
        "OFT": (rotate, (8 * n, size // 8), (8 * n, size // 8, size // 8)),
        "ETHER": (reflect, (n, size), (n, size)),
        "ETHER+": (reflect, (n, size), (n, size), (n, size)),
    }[kind]
    parameters = [torch.randn(each, device=card.device, requires_grad=True) for each in shapes]
    sets = range(2 if card.short else 16)  # 256 MiB, more than a cache holds
    xs, gs = ([torch.randn(T, *shape, **card.options) for _ in sets] for _ in range(2))

    def step(x: Tensor, g: Tensor) -> tuple[Tensor, ...]:
        x = x.detach().requires_grad_()
        y = function(x, *parameters)
        return (y.detach(), *torch.autograd.grad(y, (x, *parameters), g))

    with use_form(form if form in FORMS else FORMS[0]):
        forward = seconds_of(card, [partial(torch.no_grad()(function), x, *parameters) for x in xs])
        both = seconds_of(card, [partial(step, x, g) for x, g in zip(xs, gs, strict=True)])
    values = {"forward, µs": 1e6 * forward, "backward, µs": 1e6 * (both - forward)}
    yield f"x ({T}, {d}), {card.precision}, n = {n}, of OFT {8 * n}", name, values


# -------------------------------------------------------------------------------------------------------------- tests
TESTS = {  # a package that they need, arguments of pytest
    "logits and gradients against fp64": ("pytest", "tests/test_gpu.py", "--noconftest"),
    "killed and resumed": ("jsonargparse", "tests/test_resume.py", "-k", "killed_again_and_again"),
}


def run_tests(card: Card, name: str) -> Found:
    """Run tests on this device, on a CPU the first ones; raise where one fails. The log has them by name."""
    package, *arguments = TESTS[name]
    import_module(package)
    if card.short and package != "pytest":
        return
    if subprocess.run([sys.executable, "-m", "pytest", "-vs", *arguments], cwd=ROOT).returncode:
        raise RuntimeError("WRONG: tests failed, the log says which")
    yield "Tests on this device", name, {"": "passed"}


KERNELS = ["copy", LORA, "OFT", *(f"{kind}, {form}" for form in FORMS for kind in ("ETHER", "ETHER+"))]
PARTS: dict[str, tuple[float, dict[str, Callable[[Card, str], Found]]]] = {
    "machine": (2, {"rates": machine}),
    "training": (38, {"base and data": make_base_and_data} | dict.fromkeys(RUNS, train)),
    "steps": (42, dict.fromkeys(STEPS, our_steps) | dict.fromkeys(PEFT, peft_steps)),
    "kernels": (6, dict.fromkeys(KERNELS, kernel)),
    "exactness": (16, dict.fromkeys(TESTS, run_tests)),
}
"""By name of a part, its share of the time and its cases."""
