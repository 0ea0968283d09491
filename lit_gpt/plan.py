"""What a run is asked to do, checked and worked out before any weight is loaded.

The argument dataclasses become the command line's groups (--io.*, --train.*, --eval.*), the sentence under a field its
help. ``make_plan`` checks all of them together and works out the rest.
"""

import math
import shlex
from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from datetime import datetime
from importlib import import_module
from pathlib import Path
from typing import Any

import torch

from lit_gpt.adapter_files import KINDS, load_adapter
from lit_gpt.checkpoint import WEIGHTS, check_checkpoint_dir, fingerprint, load_config, load_state
from lit_gpt.config import Config
from lit_gpt.data import TEST_FILE, TRAIN_FILE, Sample, check_ids, length, load_split, read_data_config
from lit_gpt.devices import STRATEGIES, weights_dtype
from lit_gpt.errors import Problems, UserError
from lit_gpt.ether import METHODS
from lit_gpt.files import file_sha256, settled
from lit_gpt.model import GPT
from lit_gpt.prompts import encode_prompt
from lit_gpt.quantize import SCHEMES, check_quantize, quantize_model
from lit_gpt.reflections import check_form
from lit_gpt.resume import check_run_folder
from lit_gpt.tokenizer import Tokenizer


@dataclass
class IOArgs:
    """Where things are."""

    train_data_dir: str
    """Folder that a prepare script wrote: train.pt, test.pt, data_config.json."""
    val_data_dir: str | None = None
    """Folder whose test.pt validates; train_data_dir by default."""
    checkpoint_dir: str | None = None
    """The base model; by default the one the data was prepared with."""
    log_dir: str = "logs"
    """New run folders are made in here."""
    out_dir: str | None = None
    """The run folder itself; by default a new one under log_dir, named for people."""
    jobnum: str | None = None
    """Ends the name of the new run folder; the time by default."""
    tensorboard: bool = False
    """Log to TensorBoard too, in tensorboard/ in the run folder."""
    wandb: bool = False
    """Log to Weights & Biases too; its own variables (WANDB_PROJECT, WANDB_MODE=offline) say how."""


@dataclass
class TrainArgs:
    """How to train."""

    learning_rate: float = 1e-3
    """Peak learning rate, reached after the warm-up; then a cosine to zero."""
    global_batch_size: int = 16
    """Samples of an optimizer step."""
    micro_batch_size: int = 4
    """Samples of one forward and backward pass; changes memory and speed, not the result."""
    epochs: int = 1
    """How often to go through epoch_size samples."""
    epoch_size: int | None = None
    """Samples of an epoch; all of the training data by default."""
    max_steps: int | None = None
    """Stop after this many optimizer steps; the schedule ends there too."""
    lr_warmup_steps: int | None = None
    """Steps of linear warm-up; by default a tenth of the run, at most 1000."""
    weight_decay: float | None = None
    """AdamW's; by default 0 for ETHER and ETHER+, 0.01 for the others."""
    loss_average: str = "token"
    """token: over the target tokens of a step; sequence: the mean of micro-batch means, as published."""
    packing: bool = False
    """Put samples into rows without padding, each attending to itself alone, of as many tokens as micro_batch_size of
    the longest; changes speed, not the result."""
    group_by_length: bool = False
    """Sort samples by length among fifty steps at a time; changes the order of the samples, and so the result."""
    activation_checkpointing: bool = False
    """Keep the inputs of the model's blocks alone for the backward pass, which computes the rest again."""
    max_grad_norm: float | None = None
    """Scale a step's gradient down to this norm where it is longer."""
    skip_nonfinite: int = 0
    """Leave out up to so many steps whose loss or gradient is not finite; one more ends the run."""
    monitor: bool = False
    """Write monitor.csv at validations: |R - I| and angles of the blocks, and how far the weights would move."""
    save_interval: int | None = None
    """Write a checkpoint, from which --resume true goes on, every so many steps."""
    keep_checkpoints: int = 2
    """How many checkpoints stay, the newest ones; and the best one's under --train.patience."""
    patience: int | None = None
    """End after this many validations in a row without a lower response loss, and keep the best step's result."""
    max_time: str | float | None = None
    """Write a checkpoint and end after so many minutes, or h:m:s; --resume true goes on."""


@dataclass
class EvalArgs:
    """When to validate, before and after training in any case, and to show what the model writes."""

    interval: int = 100
    """Validate every so many steps."""
    sample_interval: int | None = None
    """Show an answer, greedily generated, every so many steps; never by default."""
    sample_prompt: str | None = None
    """What it answers, rendered in the data's prompt style; the first held-out sample's prompt by default."""
    sample_tokens: int = 64
    """The most tokens of such an answer."""


@dataclass
class Job:
    """What one kind of finetuning differs in.

    Attributes:
        method: its name, for people.
        kind: a key of ``adapter_files.KINDS``, or ``full``.
        adapter: the adapter's config; None for full finetuning.
        weight_decay: the default.
        init_from: an adapter file to continue from.
        given: names of the flags that were given, which ``init_from`` must not contradict.
    """

    method: str
    kind: str
    adapter: Any = None
    weight_decay: float = 0.01
    init_from: str | None = None
    given: Collection[str] = ()


@dataclass
class Plan:
    """What was worked out from the arguments and the data, before any weight is loaded."""

    base_dir: Path
    base: dict[str, str]
    """Name and fingerprint of the base."""
    config: Config
    """The base's."""
    run_dir: Path
    data: dict[str, Any]
    facts: dict[str, str]
    """Hashes of the base and of the data, which a resumed run must find unchanged."""
    train_set: list[Sample]
    val_set: list[Sample]
    n_samples: int
    n_steps: int
    n_warmup: int
    weight_decay: float
    precision: str
    quantize: str | None
    train: TrainArgs
    eval: EvalArgs
    max_seconds: float
    sample_ids: list[int]
    """The prompt of sample generations."""


def make_plan(
    job: Job,
    *,
    io: IOArgs,
    train: TrainArgs,
    eval: EvalArgs,
    precision: str,
    quantize: str | None,
    processes: int,
    strategy: str,
    overwrite: bool,
    resume: bool = False,
    unfit: Sequence[str] = (),
    seed: int = 0,
) -> Plan:
    """Check all arguments together and work out the rest; ``unfit`` are problems that were found before.

    Raises:
        ValueError: with every problem found.
    """
    problems = Problems(unfit)
    data = problems.attempt(read_data_config, io.train_data_dir) or {}
    train_file, val_file = Path(io.train_data_dir) / TRAIN_FILE, Path(io.val_data_dir or io.train_data_dir) / TEST_FILE
    train_set = problems.attempt(load_split, train_file) if data else []
    val_set = problems.attempt(load_split, val_file) if data else []
    base_dir, config, state = None, None, None
    if io.checkpoint_dir or data:
        base_dir = problems.attempt(check_checkpoint_dir, io.checkpoint_dir or data["checkpoint_dir"])
    if base_dir:
        config = problems.attempt(load_config, base_dir)
        state = problems.attempt(load_state, base_dir / WEIGHTS)  # mapped: nothing is read but what is asked for
    problems.attempt(check_form)
    problems.attempt(weights_dtype, precision, mixed=True)
    problems.attempt(check_quantize, quantize, precision, full=job.adapter is None)
    name = f"{base_dir and base_dir.name}-{Path(io.train_data_dir).name}-{job.method}-{io.jobnum or timestamp()}"
    run_dir = settled(io.out_dir or Path(io.log_dir) / name)
    sources = [job.init_from, *([base_dir, base_dir / WEIGHTS] if base_dir else []), train_file, val_file]
    problems.attempt(check_run_dir, run_dir, io, sources=sources, overwrite=overwrite, resume=resume)
    n_samples = train.epochs * (train.epoch_size or len(train_set or []))
    if n_samples >= 2**31:  # their order is drawn at once
        problems.append(f"--train.epochs times --train.epoch_size are {n_samples} samples, expected less than 2^31")
    n_steps = math.ceil(n_samples / max(1, train.global_batch_size))
    if train.max_steps is not None:
        n_steps = min(n_steps, train.max_steps)
    n_warmup = min(1000, n_steps // 10) if train.lr_warmup_steps is None else train.lr_warmup_steps
    problems += check_train_args(train, n_steps=n_steps if train_set else None, n_warmup=n_warmup, processes=processes)
    if not 0 <= seed <= 2**32 - max(1, processes):  # each process draws from a seed of its own
        problems.append(f"--seed must be 0 or more and below 2^32, got {seed}")
    problems += check_reporting(io, eval)
    problems += check_strategy(job, strategy, quantize=quantize, monitor=train.monitor)
    max_seconds = problems.attempt(parse_duration, train.max_time)
    sample_ids: list[int] = []
    if config and train_set and val_set:
        problems.attempt(check_fit, base_dir, config, data=data, samples=train_set + val_set)
        problems.attempt(check_validation, io, data)
        sample_ids = problems.attempt(
            sample_prompt, eval, base_dir, style=data["prompt_style"], samples=val_set, rows=config.padded_vocab_size
        )
        if len(sample_ids or []) >= config.block_size:
            problems.append(f"--eval.sample_prompt has {len(sample_ids)} tokens; the context is {config.block_size}")
    if train.monitor and job.adapter is None:
        problems.append("--train.monitor watches an adapter; full finetuning has none")
    if config and job.adapter is not None:
        problems.attempt(check_adapter, job, config, quantize)
    problems.check()
    base = {"name": base_dir.name, "fingerprint": fingerprint(state)} | ({"quantize": quantize} if quantize else {})
    hashes = {TRAIN_FILE: file_sha256(train_file), TEST_FILE: file_sha256(val_file)}
    return Plan(
        base_dir=base_dir,
        base=base,
        config=config,
        run_dir=run_dir,
        data=data,
        facts={"base model": base["fingerprint"], **hashes},
        train_set=train_set,
        val_set=val_set,
        n_samples=n_samples,
        n_steps=n_steps,
        n_warmup=n_warmup,
        weight_decay=job.weight_decay if train.weight_decay is None else train.weight_decay,
        precision=precision,
        quantize=quantize,
        train=train,
        eval=eval,
        max_seconds=max_seconds,
        sample_ids=sample_ids,
    )


def timestamp() -> str:
    """Now, for the name of a folder."""
    return datetime.now().strftime("%Y%m%d-%H%M%S")


def check_run_dir(
    folder: Path, io: IOArgs, *, sources: Sequence[Path | str | None], overwrite: bool, resume: bool
) -> None:
    """Raise where the run folder holds something that neither --resume nor --overwrite allows to go on or to go."""
    if resume and overwrite:
        raise UserError("--resume true goes on with a run, --overwrite true starts it anew: give one of them")
    if resume and not io.out_dir and not io.jobnum:
        raise UserError("--resume true needs to know the run folder: give --io.out_dir DIR")
    check_run_folder(folder, overwrite=overwrite, resume=resume)
    for source in filter(None, sources):
        if folder.resolve() in Path(source).resolve().parents:
            raise UserError(f"{source} lies in {folder}, which this run fills anew: give another --io.out_dir")


def check_reporting(io: IOArgs, eval: EvalArgs) -> list[str]:
    """Every setting of logs, validation and samples that cannot work."""
    problems = []
    for package in ("tensorboard", "wandb"):
        if getattr(io, package):
            try:
                reason = "a folder of that name" if import_module(package).__file__ is None else ""
            except ImportError as error:
                reason = str(error)
            if reason:
                problems.append(f"--io.{package} true cannot import {package} ({reason}): pip install {package}")
    for name in ("interval", "sample_interval", "sample_tokens"):
        value = getattr(eval, name)
        if value is not None and value <= 0:
            problems.append(f"--eval.{name} must be positive, got {value}")
    return problems


def check_strategy(job: Job, strategy: str, *, quantize: str | None, monitor: bool) -> list[str]:
    """Every reason why several processes cannot share the work so."""
    if strategy not in STRATEGIES:
        return [f"--strategy {strategy} is unknown; choices: {', '.join(STRATEGIES)}"]
    problems = []
    if strategy == "fsdp":
        if job.adapter is None:
            problems.append("--strategy fsdp shards a frozen base; full finetuning has none: take ddp")
        if quantize:
            problems.append(f"--strategy fsdp cannot shard a quantized base: drop --quantize {quantize}, or take ddp")
        if monitor:
            problems.append("--train.monitor needs whole weights, which --strategy fsdp has nowhere")
    return problems


def parse_duration(text: str | float | None) -> float:
    """Seconds of a number of minutes or of h:m:s; infinity for None."""
    if text is None:
        return math.inf
    try:
        parts = [float(part) for part in str(text).split(":")]
    except ValueError:
        parts = []
    seconds = {1: (60,), 3: (3600, 60, 1)}.get(len(parts), ())
    total = sum(part * unit for part, unit in zip(parts, seconds, strict=False))
    if not 0 < total < math.inf:
        raise UserError(f"--train.max_time {text}: expected minutes, as 90, or hours, minutes and seconds, as 1:30:00")
    return total


def sample_prompt(eval: EvalArgs, base_dir: Path, *, style: str, samples: list[Sample], rows: int) -> list[int]:
    """The ids that sample generations answer: of --eval.sample_prompt, or of a held-out sample up to its response."""
    if eval.sample_prompt is not None:
        tokenizer = Tokenizer(base_dir)
        ids = encode_prompt(tokenizer, style, instruction=eval.sample_prompt)
        tokenizer.check_ids(ids, rows)
        return ids
    for sample in samples:
        ids, response = sample["input_ids"].tolist(), sample["response"].tolist()
        if any(response[1:]):
            return ids[: response.index(True)] or ids[:1]
    return samples[0]["input_ids"].tolist()[:1]


def check_fit(base_dir: Path, config: Config, *, data: dict[str, Any], samples: list[Sample]) -> None:
    """Raise where the data was not made for this model: another tokenizer, ids or samples beyond what it holds."""
    tokenizer = Tokenizer(base_dir)
    if tokenizer.sha256 != data["tokenizer_sha256"]:
        raise UserError(
            f"the data was prepared with the tokenizer of {data['checkpoint_dir']}, {base_dir} has another one; "
            f"prepare it again with --checkpoint_dir {shlex.quote(str(base_dir))}"
        )
    check_ids((sample["input_ids"] for sample in samples), tokenizer, config)
    longest = max(map(length, samples))
    if longest > config.block_size:
        raise UserError(f"samples of {longest} tokens do not fit {base_dir.name}'s context of {config.block_size}")


def check_validation(io: IOArgs, data: dict[str, Any]) -> None:
    """Raise where --io.val_data_dir was prepared otherwise than the training data: its losses would mean nothing."""
    other = read_data_config(io.val_data_dir or io.train_data_dir)
    for key, what in (("tokenizer_sha256", "tokenizer"), ("prompt_style", "prompt style")):
        if other[key] != data[key]:
            values = f" ({other[key]}, not {data[key]})" if key == "prompt_style" else ""
            raise UserError(
                f"--io.val_data_dir {io.val_data_dir} was prepared with another {what}{values} than "
                f"--io.train_data_dir {io.train_data_dir}; prepare it again as that was"
            )


def settle_adapter(job: Job) -> Job:
    """The job with the settings of its ``init_from`` file, which no flag has to repeat; dropout is the flags'.

    Raises:
        ValueError, FileNotFoundError: a flag that was set says otherwise, or there is no such adapter.
    """
    if not job.init_from:
        return job
    found = load_adapter(job.init_from, job.kind).config
    default, chosen = vars(type(found)()), vars(job.adapter)
    dropouts = {name: value for name, value in chosen.items() if name.endswith("dropout")}
    given = {flag.removeprefix(f"{job.kind}_") for flag in job.given}
    for name, value in vars(found).items():
        meant = name in given or chosen[name] != default[name]
        if meant and name not in dropouts and chosen[name] != value:
            raise UserError(
                f"{job.init_from} was trained with {name} = {value}, a flag says {chosen[name]}; leave the flag out: "
                "the file's own settings are used"
            )
    adapter = replace(found, **dropouts)
    method = getattr(adapter, "Htype", job.method)
    return replace(job, adapter=adapter, method=method, weight_decay=default_weight_decay(method))


def check_adapter(job: Job, config: Config, quantize: str | None) -> None:
    """Raise where the targets or the blocks do not suit the model; on the meta device, before any weight is read."""
    with torch.device("meta"):
        model = GPT(config)
        if quantize in SCHEMES:
            quantize_model(model, quantize, model.state_dict(), dtype=torch.float32, device="meta")
        KINDS[job.kind].add(model, job.adapter)


def check_train_args(train: TrainArgs, *, n_steps: int | None, n_warmup: int, processes: int) -> list[str]:
    """Every setting that cannot work; ``n_steps`` is None where the data could not be read."""
    problems = []
    for name in (
        "learning_rate",
        "global_batch_size",
        "micro_batch_size",
        "epochs",
        "epoch_size",
        "max_steps",
        "save_interval",
        "keep_checkpoints",
        "max_grad_norm",
        "patience",
    ):
        value = getattr(train, name)
        if value is not None and not 0 < value < math.inf:
            problems.append(f"--train.{name} must be positive, got {value}")
    if not problems and train.global_batch_size % (train.micro_batch_size * max(1, processes)):
        problems.append(
            f"--train.global_batch_size {train.global_batch_size} is not a multiple of --train.micro_batch_size "
            f"{train.micro_batch_size} times {processes} process(es)"
        )
    if train.weight_decay is not None and not 0 <= train.weight_decay < math.inf:
        problems.append(f"--train.weight_decay must be 0 or more, got {train.weight_decay}")
    if train.skip_nonfinite < 0:
        problems.append(f"--train.skip_nonfinite must be 0 or more, got {train.skip_nonfinite}")
    if n_steps is not None and not 0 <= n_warmup < max(1, n_steps):
        problems.append(
            f"--train.lr_warmup_steps {n_warmup} must be shorter than the run of {n_steps} steps; "
            "lower it or train longer"
        )
    if train.loss_average not in ("token", "sequence"):
        problems.append(f"--train.loss_average {train.loss_average} is unknown; choices: token, sequence")
    return problems


def default_weight_decay(method: str) -> float:
    """0 for ETHER and ETHER+, whose vectors' lengths mean nothing; 0.01 for everything else."""
    return 0.0 if method in METHODS and not METHODS[method].matrices else 0.01
