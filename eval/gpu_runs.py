"""Parts d to h of ``gpu_report.py``: whole models, in training steps, beside PEFT, in runs, generating, evaluated."""

import gc
import json
import random
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from statistics import median
from time import perf_counter, sleep

import torch
from torch import nn

from eval.costs import FLOOR, LORA, METHOD_NAMES, Variant, add_ratios, choose_variants, measure, random_models
from eval.gpu_parts import LATE, Card, Found, Row, copy_bandwidth, in_turn, name_of, random_samples
from lit_gpt.checkpoint import load_state, meta_model, save_state
from lit_gpt.config import Config
from lit_gpt.data import DATA_CONFIG, TEST_FILE, TRAIN_FILE, save_split
from lit_gpt.ether import EtherConfig
from lit_gpt.files import read_json, write_json
from lit_gpt.generate import generate
from lit_gpt.lora import LoraConfig
from lit_gpt.model import GPT
from lit_gpt.report import read_metrics
from lit_gpt.run_folder import checkpoint_folders
from lit_gpt.train import compile_blocks

REPO = Path(__file__).resolve().parents[1]
QUESTIONS = REPO / "scripts/demo/eval/allenai/ai2_arc/ARC-Challenge/test.jsonl"
CHECKPOINTING = ("--train.activation_checkpointing", "true")
Loss = Callable[[torch.Tensor], torch.Tensor]


def free_memory(card: Card) -> None:
    """Give back what is no longer used, and count peaks from here on."""
    gc.collect()
    if card.on_gpu:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def at_fitting_size(
    card: Card, config: Config, measure_it: Callable[[Config], Found], *, itemsize: float = 2.0
) -> Found:
    """Measure a model of as many layers as the memory takes; says so where these are not all."""
    layers = config.n_layer
    free_memory(card)
    if card.on_gpu:
        free = 0.85 * torch.cuda.mem_get_info()[0]  # the rest is for activations
        need = itemsize * sum(p.numel() for p in meta_model(config, card.dtype).parameters())
        layers = config.n_layer if need < free else max(1, int(config.n_layer * free / need))
    while layers:
        if layers < config.n_layer:
            yield f"{layers} of {config.n_layer} layers of {config.name}: more do not fit the memory that is free"
        try:
            yield from measure_it(replace(config, n_layer=layers))
            return
        except torch.OutOfMemoryError:
            layers //= 2
        free_memory(card)
    yield f"not even one layer of {config.name} fits the memory that is free"


def on_llama(measure_it: Callable[[Card, Config], Found]) -> Callable[[Card], Found]:
    """Return a part that measures Llama-2-7B, or as many of its layers as fit."""
    return lambda card: at_fitting_size(card, card.sizes("Llama-2-7b-hf"), partial(measure_it, card))


# -------------------------------------------------------------------------------------------------------------- steps
def steps(card: Card) -> Found:
    """Time forward and backward passes of every method in turns: in nf4, eager, and compiled, which takes longest."""
    lengths, nf4_lengths = ((20, 50), (50,)) if card.short else ((256, 2048), (512,))
    fitting = partial(at_fitting_size, card, card.sizes("Llama-2-7b-hf"))
    quantized = partial(step_tables, card, lengths=nf4_lengths, scheme="bnb.nf4")
    tasks = {"steps in nf4": partial(fitting, quantized, itemsize=0.8)}
    tasks["steps"] = partial(fitting, partial(step_tables, card, lengths=lengths))
    yield from in_turn(card, tasks)


def step_tables(card: Card, config: Config, *, lengths: Sequence[int], scheme: str | None = None) -> Found:
    """Yield rows for each length, of models on one set of weights; compiled too, where these are not quantized."""
    n, oft = (4, 8) if card.short else (32, 256)
    variants, left_out = choose_variants(config, targets=("query", "value"), blocks=(n,), oft_blocks=(oft,))
    yield from left_out
    # The paper's method comes right after LoRA: there may be no time to compile all.
    variants.sort(key=lambda v: v.label not in (FLOOR, LORA) and 1 + (METHOD_NAMES["etherplusHH"] not in v.label))
    models = random_models(config, variants, dtype=card.dtype, device=card.device, scheme=scheme)
    title = f"{config.name}, {scheme or name_of(card.dtype)}, q and v"
    for T in lengths:
        yield from timed_steps(card, f"{title}, T = {T}, eager", variants, models, T)
    if scheme is not None:
        return
    n_compiled, most = 0, 3 if card.short else len(models)
    while n_compiled < most and card.left > 20:
        compile_blocks(models[n_compiled])
        for T in lengths:
            measure(models[n_compiled : n_compiled + 1], seq_length=T, rounds=0)  # a step compiles it
        n_compiled += 1
    if n_compiled < most:
        yield f"compiled: {LATE}: {', '.join(variant.label for variant in variants[n_compiled:most])}"
    for T in lengths if n_compiled >= 2 else ():
        yield from timed_steps(card, f"{title}, T = {T}, compiled", variants, models[:n_compiled], T)


def timed_steps(card: Card, title: str, variants: list[Variant], models: list[GPT], T: int) -> Found:
    """Yield a row for each model: its step's time and peak memory, also as ratios to the floor's and LoRA's."""
    rows = measure(models, seq_length=T, rounds=2 if card.short else 8)
    add_ratios(rows)
    for variant, row in zip(variants, rows, strict=False):
        values = {"step, ms": 1e3 * median(row["seconds"])}
        values |= {f"x {FLOOR}": row["time_x_floor"]["median"], f"x {LORA}": row["time_x_lora"]["median"]}
        if "peak_bytes" in row:
            values |= {"peak, GB": row["peak_bytes"] / 1e9}
            values |= {f"peak x {LORA}": row["peak_bytes"] / rows[1]["peak_bytes"]}
        yield Row(title, variant.label, values)


# --------------------------------------------------------------------------------------------------------------- PEFT
@on_llama
def beside_peft(card: Card, config: Config) -> Found:
    """Time optimizer steps of transformers' Llama with PEFT's adapters, and of ours."""
    n, oft, T = (1, 8, 64) if card.short else (32, 256, 2048)
    title = f"{config.name}, {name_of(card.dtype)}, q and v, T = {T}, eager, with AdamW"
    peft, ours = partial(peft_loss, card, config), partial(our_loss, card, config)
    makers = {  # what matters most first: time may be short
        f"PEFT {LORA}": partial(peft, "LoraConfig", {"r": 8, "lora_alpha": 16}),
        f"ours, {LORA}": partial(ours, LoraConfig(r=8)),
        f"ours, ETHER+ two-sided n={n}": partial(ours, EtherConfig("etherplusHH", nb=n)),
        f"PEFT OFT n={oft}": partial(peft, "OFTConfig", {"r": 0, "oft_block_size": config.n_embd // oft}),
        f"ours, OFT n={oft}": partial(ours, EtherConfig("oft", nb=oft)),
    }
    tasks = {label: partial(optimizer_steps, card, title, label, make, T) for label, make in makers.items()}
    yield from in_turn(card, tasks)


def our_loss(card: Card, config: Config, adapter: EtherConfig | LoraConfig) -> tuple[nn.Module, Loss]:
    """Return a model of ours, and its loss of (1, T) ids."""
    (model,) = random_models(config, [Variant("", adapter)], dtype=card.dtype, device=card.device)
    return model, lambda idx: model(idx, targets=idx.roll(-1, 1))


def peft_loss(card: Card, config: Config, kind: str, settings: dict[str, int]) -> tuple[nn.Module, Loss]:
    """Return the same of transformers and PEFT; their defaults otherwise."""
    import peft
    import transformers

    sizes = transformers.AutoConfig.for_model(**config.to_hf(), use_cache=False)
    with torch.device(card.device):
        base = transformers.AutoModelForCausalLM.from_config(sizes, dtype=card.dtype)
    model = peft.get_peft_model(base, getattr(peft, kind)(target_modules=["q_proj", "v_proj"], **settings))
    return model.train(), lambda idx: model(input_ids=idx, labels=idx).loss


def optimizer_steps(card: Card, title: str, label: str, make: Callable[[], tuple[nn.Module, Loss]], T: int) -> Found:
    """Measure time and memory of whole steps, the first two discarded."""
    free_memory(card)
    model, loss = make()
    free_memory(card)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-4)
    idx = torch.randint(512, (1, T), device=card.device)
    seconds = []
    for _ in range(3 if card.short else 8):
        card.wait()
        start = perf_counter()
        loss(idx).backward()
        optimizer.step()
        optimizer.zero_grad()
        card.wait()
        seconds.append(perf_counter() - start)
    values = {"trained": f"{sum(p.numel() for p in trained):,}", "tokens/s": T / median(seconds[2:])}
    peak = {"peak, GB": torch.cuda.max_memory_allocated() / 1e9} if card.on_gpu else {}
    yield Row(title, label, values | peak)


# ----------------------------------------------------------------------------------------------------------- training
def training(card: Card) -> Found:
    """Train through finetune/ether.py, each run a process of its own, then kill one and let it go on."""
    with tempfile.TemporaryDirectory(prefix="gpu-report-") as name:
        work = Path(name)
        config = card.sizes("meta-llama/Llama-3.2-1B")
        make_work(card, work, config)
        train = partial(run_training, card, work, f"{config.name}, {card.precision}, ETHER+ two-sided")
        packed = ("--train.packing", "true")
        cases = {"packed": packed, "padded": (), "packed, checkpointing": (*packed, *CHECKPOINTING)}
        cases |= {"packed, nf4": (*packed, "--quantize", "bnb.nf4"), "packed, compiled": (*packed, "--compile", "true")}
        cases = {"packed, checkpointing": cases["packed, checkpointing"]} if card.short else cases
        tasks = {label: partial(train, label, *flags) for label, flags in cases.items()}
        yield from in_turn(card, {"kill and resume": partial(kill_and_resume, card, work)} | tasks, seconds=20)


def make_work(card: Card, work: Path, config: Config) -> None:
    """Write a base-shaped folder with random weights, and rows of Alpaca's lengths, into ``work``."""
    from lit_gpt.tokenizer import Tokenizer

    base, data = work / "base", work / "data"
    write_tokenizer(base, vocab_size=400)
    (model,) = random_models(config, [Variant(FLOOR, None)], dtype=card.dtype, device=card.device)
    del model.shift  # of the floor
    save_state(model.cpu().state_dict(), base / "lit_model.pth")
    write_json(base / "lit_config.json", config.to_dict())
    draw = random.Random(0)  # Llama 3's tokens of 7,000 rows: 52, 88 and 167 at the 10th, 50th and 90th percentile
    lengths = [min(256, int(36 + draw.lognormvariate(3.95, 0.75))) for _ in range(24 if card.short else 1024)]
    samples = random_samples(lengths, config.vocab_size)
    save_split(samples[16:], data / TRAIN_FILE)
    save_split(samples[:16], data / TEST_FILE)
    facts = {"checkpoint_dir": str(base), "prompt_style": "plain", "tokenizer_sha256": Tokenizer(base).sha256}
    write_json(data / DATA_CONFIG, facts)
    free_memory(card)


def write_tokenizer(folder: Path, *, vocab_size: int) -> None:
    """Write a byte-level BPE, trained on the bundled questions."""
    from tokenizers import ByteLevelBPETokenizer

    tokenizer, lines = ByteLevelBPETokenizer(), QUESTIONS.read_text(encoding="utf-8").splitlines()
    tokenizer.train_from_iterator(lines, vocab_size, special_tokens=["</s>"], show_progress=False)
    folder.mkdir(parents=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    write_json(folder / "tokenizer_config.json", {"eos_token": "</s>"})


def training_command(card: Card, work: Path, name: str, *flags: str) -> list[str]:
    """Return a command line of finetune/ether.py; what it writes goes to ``work / name``."""
    micro, batch, n_steps, n = ("2", "4", "6", "4") if card.short else ("8", "32", "24", "32")
    command = [sys.executable, str(REPO / "finetune" / "ether.py"), "--io.train_data_dir", str(work / "data")]
    command += ["--io.out_dir", str(work / name), "--precision", card.precision, "--Htype", "etherplusHH"]
    command += ["--ether_nb", n, "--train.micro_batch_size", micro, "--train.global_batch_size", batch]
    return [*command, "--train.max_steps", n_steps, "--train.epochs", "9", "--eval.interval", "1000", *flags]


def run_training(card: Card, work: Path, title: str, label: str, *flags: str) -> Found:
    """Run once: its rate in the second half, when all is compiled, and the memory estimate against the peak."""
    name = label.replace(", ", "-")
    finish(start(training_command(card, work, name, *flags)))
    summary, rows = read_json(work / name / "summary.json"), read_metrics(work / name / "metrics.csv")
    rows = [row for row in rows if "loss" in row]
    half, end = rows[len(rows) // 2 - 1], rows[-1]
    rate = (end["tokens"] - half["tokens"]) / max(1e-9, end["seconds"] - half["seconds"])
    values = {"real tokens/s": rate, "padding": f"{summary['padding']:.0%}"}
    measured, estimated = summary["run_memory_bytes"], summary["estimated_memory_bytes"]
    values |= {"peak, GiB": measured / 2**30}
    if estimated:
        values |= {"estimated, GiB": estimated / 2**30, "off by": f"{estimated / measured - 1:+.0%}"}
    yield Row(title, label, values)


def start(command: Sequence[str]) -> subprocess.Popen:
    """Begin a run; of what it says only the errors are kept."""
    nothing, pipe = subprocess.DEVNULL, subprocess.PIPE
    return subprocess.Popen(command, stdin=nothing, stdout=nothing, stderr=pipe, text=True)


def finish(process: subprocess.Popen) -> None:
    """Wait for a run; raise with its last line where it fails."""
    _, errors = process.communicate()
    if process.returncode:
        raise RuntimeError(([*errors.strip().splitlines()] or [f"exit code {process.returncode}"])[-1])


def kill_and_resume(card: Card, work: Path) -> Found:
    """Kill a run that cannot notice, let it go on, and compare with an unbroken one, bit by bit."""
    command = partial(training_command, card, work)
    flags = ("--deterministic", "true", "--train.max_steps", "12", "--train.save_interval", "2")
    finish(start(command("unbroken", *flags)))
    killed = start(command("killed", *flags))
    while killed.poll() is None and not checkpoint_folders(work / "killed"):
        sleep(0.005)
    killed.send_signal(signal.SIGKILL)
    killed.communicate()
    if (work / "killed" / "summary.json").exists():
        yield "kill and resume: the run ended before it could be killed; nothing is shown"
        return
    finish(start(command("killed", *flags, "--resume", "true")))
    one, other = (load_state(work / name / "lit_model_ether_finetuned.pth")["model"] for name in ("unbroken", "killed"))
    same = one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)
    verdict = "equals" if same else "is WRONG: not"
    yield f"killed with SIGKILL and resumed: the adapter {verdict} an unbroken run's, bit by bit"


# --------------------------------------------------------------------------------------------- generation, evaluation
@on_llama
def generation(card: Card, config: Config) -> Found:
    """Measure the tokens a second of one conversation, against the rate at which the weights can be read."""
    n = 4 if card.short else 32
    variants = [Variant("base, or merged", None), Variant(f"ETHER+ two-sided n={n}", EtherConfig("etherplusHH", nb=n))]
    models = random_models(config, variants, dtype=card.dtype, device=card.device)
    read = sum(p.nbytes for p in models[0].parameters()) - models[0].transformer.wte.weight.nbytes  # of it one row
    limit = copy_bandwidth(card) / read
    for variant, model in zip(variants, models, strict=True):
        for _ in range(2):  # the first one warms up
            start, ends = perf_counter(), []
            for _ in generate(model, list(range(100)), max_new_tokens=8 if card.short else 100):
                ends.append(perf_counter())
        rate = (len(ends) - 1) / (ends[-1] - ends[0])
        values = {"tokens/s": rate}
        values |= {"limit": limit, "of limit": f"{rate / limit:.0%}"} if card.on_gpu else {}
        values |= {"first token, ms": 1e3 * (ends[0] - start)}
        yield Row(f"{config.name}, {name_of(card.dtype)}, eager, 100 tokens of prompt", variant.label, values)


@on_llama
def evaluation(card: Card, config: Config) -> Found:
    """Measure the requests a second of ARC's bundled questions through the model that lm-eval sees."""
    from lm_eval.api.instance import Instance

    from eval.harness_model import HarnessModel
    from lit_gpt.tokenizer import Tokenizer

    config = replace(config, vocab_size=max(4000, config.vocab_size), padded_vocab_size=0)
    (model,) = random_models(config, [Variant("", None)], dtype=card.dtype, device=card.device)
    rows = list(map(json.loads, QUESTIONS.read_text(encoding="utf-8").splitlines()))[: 4 if card.short else None]
    pairs = [(f"Question: {row['question']}\nAnswer:", f" {text}") for row in rows for text in row["choices"]["text"]]
    requests = [Instance("loglikelihood", {}, pair, index) for index, pair in enumerate(pairs)]
    with tempfile.TemporaryDirectory(prefix="gpu-report-") as name:
        write_tokenizer(Path(name) / "base", vocab_size=4000)
        tokenizer = Tokenizer(Path(name) / "base")
        for batch_size in (8,) if card.short else (8, 32):
            harness = HarnessModel(model.eval(), tokenizer, batch_size=batch_size)
            harness.loglikelihood(requests[:32])
            card.wait()
            start = perf_counter()
            harness.loglikelihood(requests)
            rate = len(requests) / (perf_counter() - start)
            title = f"{config.name}, {name_of(card.dtype)}, {len(requests)} requests of ARC-Challenge, 0-shot"
            yield Row(title, f"batch size {batch_size}", {"requests/s": rate})
