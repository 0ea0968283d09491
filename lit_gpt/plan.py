"""What a run is asked to do, checked and worked out before any weight is loaded.

The argument dataclasses become the command line's groups (--io.*, --train.*, --eval.*), the sentence under a field its
help. ``make_plan`` checks all of them together and works out the rest.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

import torch

from lit_gpt.adapter_files import KINDS, load_adapter
from lit_gpt.checkpoint import check_checkpoint_dir, load_config, prepare_out_dir, weights_dtype
from lit_gpt.config import Config
from lit_gpt.data import Sample, load_split, read_data_config
from lit_gpt.ether import METHODS
from lit_gpt.model import GPT
from lit_gpt.quantize import SCHEMES, check_quantize, quantize_model
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
    save_interval: int | None = None
    """Save the adapter every so many steps; at the end alone by default."""


@dataclass
class EvalArgs:
    """When to validate; before and after training in any case."""

    interval: int = 100
    """Validate every so many steps."""


@dataclass
class Job:
    """What one kind of finetuning differs in.

    Attributes:
        method: its name, for people.
        kind: a key of ``adapter_files.KINDS``, or ``full``.
        adapter: the adapter's config; None for full finetuning.
        weight_decay: the default.
        init_from: an adapter file to continue from.
    """

    method: str
    kind: str
    adapter: Any = None
    weight_decay: float = 0.01
    init_from: str | None = None


@dataclass
class Plan:
    """What was worked out from the arguments and the data, before any weight is loaded."""

    base_dir: Path
    run_dir: Path
    data: dict[str, Any]
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
    base: dict[str, str] | None = None
    """Name and fingerprint of the base, known once it is loaded."""


class Problems(list[str]):
    """What is wrong with a run's settings, gathered so that it can be said at once."""

    def attempt(self, function: Callable[..., Any], *args: Any, **options: Any) -> Any:
        """The function's result; None after a user's error, whose text is kept."""
        try:
            return function(*args, **options)
        except (ValueError, OSError) as error:
            self.append(str(error))
            return None


def make_plan(
    job: Job,
    *,
    io: IOArgs,
    train: TrainArgs,
    eval: EvalArgs,
    precision: str,
    quantize: str | None,
    processes: int,
    overwrite: bool,
) -> Plan:
    """Check all arguments together and work out the rest.

    Raises:
        ValueError: with every problem found.
    """
    problems = Problems()
    data = problems.attempt(read_data_config, io.train_data_dir) or {}
    train_set = problems.attempt(load_split, Path(io.train_data_dir) / "train.pt") if data else []
    val_set = problems.attempt(load_split, Path(io.val_data_dir or io.train_data_dir) / "test.pt") if data else []
    base_dir, config = None, None
    if io.checkpoint_dir or data:
        base_dir = problems.attempt(check_checkpoint_dir, io.checkpoint_dir or data["checkpoint_dir"])
    if base_dir:
        config = problems.attempt(load_config, base_dir)
    problems.attempt(weights_dtype, precision, mixed=True)
    problems.attempt(check_quantize, quantize, precision, full=job.adapter is None)
    name = f"{base_dir and base_dir.name}-{Path(io.train_data_dir).name}-{job.method}-{io.jobnum or timestamp()}"
    run_dir = problems.attempt(prepare_out_dir, io.out_dir or Path(io.log_dir) / name, overwrite)
    n_samples = train.epochs * (train.epoch_size or len(train_set or []))
    n_steps = math.ceil(n_samples / max(1, train.global_batch_size))
    if train.max_steps is not None:
        n_steps = min(n_steps, train.max_steps)
    n_warmup = min(1000, n_steps // 10) if train.lr_warmup_steps is None else train.lr_warmup_steps
    problems += check_train_args(train, n_steps=n_steps if train_set else None, n_warmup=n_warmup, processes=processes)
    if config and train_set and val_set:
        problems.attempt(check_fit, base_dir, config, data=data, samples=train_set + val_set)
    if config and job.adapter is not None:
        problems.attempt(check_adapter, job, config, quantize)
    if problems:
        raise ValueError("; ".join(dict.fromkeys(problems)))
    return Plan(
        base_dir=base_dir,
        run_dir=run_dir,
        data=data,
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
    )


def timestamp() -> str:
    """Now, for the name of a folder."""
    return datetime.now().strftime("%Y%m%d-%H%M%S")


def check_fit(base_dir: Path, config: Config, *, data: dict[str, Any], samples: list[Sample]) -> None:
    """Raise where the data was not made for this model: another tokenizer, or samples beyond its context."""
    if Tokenizer(base_dir).sha256 != data["tokenizer_sha256"]:
        raise ValueError(
            f"the data was prepared with the tokenizer of {data['checkpoint_dir']}, {base_dir} has another one; "
            f"prepare it again with --checkpoint_dir {base_dir}"
        )
    longest = max(len(sample["input_ids"]) for sample in samples)
    if longest > config.block_size:
        raise ValueError(f"samples of {longest} tokens do not fit {base_dir.name}'s context of {config.block_size}")


def check_adapter(job: Job, config: Config, quantize: str | None) -> None:
    """Raise where the targets or the blocks do not suit the model; on the meta device, before any weight is read."""
    with torch.device("meta"):
        model = GPT(config)
        if quantize in SCHEMES:
            quantize_model(model, quantize, model.state_dict(), dtype=torch.float32, device="meta")
        KINDS[job.kind].add(model, job.adapter)
    if job.init_from:
        found = load_adapter(job.init_from, job.kind).config
        if found != job.adapter:
            raise ValueError(f"{job.init_from} is {found}; the flags ask for {job.adapter}")


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
    ):
        value = getattr(train, name)
        if value is not None and value <= 0:
            problems.append(f"--train.{name} must be positive, got {value}")
    if not problems and train.global_batch_size % (train.micro_batch_size * processes):
        problems.append(
            f"--train.global_batch_size {train.global_batch_size} is not a multiple of --train.micro_batch_size "
            f"{train.micro_batch_size} times {processes} process(es)"
        )
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
