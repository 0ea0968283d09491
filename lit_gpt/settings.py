"""A run's settings: its options, each listed once, the checks of all of them together, and what follows from them.

The dataclasses become the command line (--io.*, --train.*, --eval.*), the sentence under a field its help, their values
hparams.yaml, and what a resumed run is compared by. ``Plan`` checks them and works out the rest before any weight
is loaded; nothing here trains.
"""

import math
from collections.abc import Collection, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from datetime import datetime
from pathlib import Path
from typing import Literal

import torch

from lit_gpt.adapter import AdapterConfig
from lit_gpt.adapter_files import KINDS, AdapterFile, check_base, load_adapter
from lit_gpt.checkpoint import WEIGHTS, check_checkpoint_dir, fingerprint, load_config, load_state
from lit_gpt.config import Config
from lit_gpt.data import TEST_FILE, TRAIN_FILE, Sample, check_fit, check_val_data, length, load_split, read_data_config
from lit_gpt.devices import weights_dtype
from lit_gpt.errors import Problems, UserError
from lit_gpt.ether import METHODS
from lit_gpt.files import file_sha256, settled
from lit_gpt.model import GPT
from lit_gpt.prompts import encode_prompt
from lit_gpt.quantize import SCHEMES, check_quantize, quantize_model
from lit_gpt.reflections import check_form
from lit_gpt.report import check_logger
from lit_gpt.run_folder import check_run_folder, flatten
from lit_gpt.tokenizer import Tokenizer

MAY_BE_ZERO = ("train.weight_decay", "train.skip_nonfinite", "train.lr_warmup_steps")
"""All other numbers of --train and --eval are positive."""


# -------------------------------------------------------------------------------------------------------- options
@dataclass
class IOArgs:
    """Files and folders of a run."""

    train_data_dir: str
    """Folder that a prepare script wrote: train.pt, test.pt, data_config.json."""
    val_data_dir: str | None = None
    """Folder whose test.pt validates; train_data_dir by default."""
    checkpoint_dir: str | None = None
    """The base model; by default the one the data was prepared with."""
    log_dir: str = "logs"
    """New run folders are made in here."""
    out_dir: str | None = None
    """The run folder itself; by default a new one under log_dir, named base-data-method-time."""
    jobnum: str | None = None
    """Ends the name of the new run folder; the time by default."""
    tensorboard: bool = False
    """Log to TensorBoard too, in tensorboard/ in the run folder."""
    wandb: bool = False
    """Log to Weights & Biases too; its own variables (WANDB_PROJECT, WANDB_MODE=offline) say how."""


@dataclass
class TrainArgs:
    """The course of training."""

    learning_rate: float = 1e-3
    """Peak learning rate, reached after the warm-up; then a cosine to zero."""
    global_batch_size: int = 16
    """Samples of an optimizer step."""
    micro_batch_size: int = 4
    """Samples of one forward and backward pass; changes memory and speed, not the result (of loss_average token)."""
    epochs: int = 1
    """Passes over epoch_size samples."""
    epoch_size: int | None = None
    """Samples of an epoch; all of the training data by default."""
    max_steps: int | None = None
    """Stop after this many optimizer steps; the schedule ends there too."""
    lr_warmup_steps: int | None = None
    """Steps of linear warm-up; by default a tenth of the run, at most 1000."""
    weight_decay: float | None = None
    """AdamW's; by default 0 for ETHER and ETHER+, 0.01 for the others."""
    loss_average: Literal["token", "sequence"] = "token"
    """A step's loss: the mean over its target tokens (token), or of micro-batch means, as published (sequence)."""
    packing: bool = False
    """Put samples into rows without padding, each attending to itself alone, of as many tokens as micro_batch_size of
    the longest; changes speed, not the result."""
    activation_checkpointing: bool = False
    """Keep the inputs of the model's blocks alone for the backward pass, which computes the rest again."""
    max_grad_norm: float | None = None
    """Clip a step's gradient to this norm."""
    skip_nonfinite: int = 0
    """Skip up to this many steps whose loss or gradient is not finite; one more ends the run."""
    monitor: bool = False
    """Write monitor.csv at validations: |R - I| and angles of the blocks, and how far the weights would move."""
    save_interval: int | None = None
    """Write a checkpoint, from which --resume true goes on, every N steps."""
    keep_checkpoints: int = 2
    """Checkpoints to keep, the newest ones; and the best one's under --train.patience."""
    patience: int | None = None
    """End after this many validations in a row without a lower response loss, and keep the best step's result."""
    max_time: str | float | None = None
    """Write a checkpoint and end after this many minutes, or h:m:s; --resume true goes on."""


@dataclass
class EvalArgs:
    """Validations, besides those before and after training, and answers shown on the way."""

    interval: int = 100
    """Validate every N steps."""
    sample_interval: int | None = None
    """Show an answer, greedily generated, every N steps; never by default."""
    sample_prompt: str | None = None
    """The prompt to answer, rendered in the data's prompt style; the first held-out sample's prompt by default."""
    sample_tokens: int = 64
    """The most tokens of such an answer."""


@dataclass(kw_only=True)
class Settings:
    """All options of a run."""

    adapter: AdapterConfig | None = None
    """None for full finetuning."""
    init_from: str | None = None
    """An adapter file to continue from, of ETHER the original code's too; its settings are used, and a flag that says
    otherwise is refused."""
    io: IOArgs
    train: TrainArgs = field(default_factory=TrainArgs)
    eval: EvalArgs = field(default_factory=EvalArgs)
    precision: str = "bf16-true"
    """32-true, bf16-true, 16-true, bf16-mixed or 16-mixed; adapters stay fp32 in any case."""
    devices: int = 1
    """Processes on this machine."""
    num_nodes: int = 1
    """Machines."""
    strategy: Literal["auto", "ddp", "fsdp"] = "auto"
    """ddp, a copy of the model in each process; fsdp, the frozen base sharded over them; auto is ddp."""
    compile: bool = False
    """Compile the model's blocks; worth its minute in long runs on a GPU."""
    seed: int = 1337
    """Fixes the start of the adapter, the order of the data and dropout."""
    deterministic: bool = False
    """On a GPU, the same bits for the same seed, by slower kernels; a CPU gives them anyway."""
    quantize: str | None = None
    """Keep the base's weights in fewer bits: bnb.nf4, bnb.nf4-dq, bnb.fp4, bnb.fp4-dq or bnb.int8."""
    resume: bool = False
    """Go on from the newest good checkpoint of the run folder, or start where there is none."""
    overwrite: bool = False
    """Write into a run folder that already holds a run, and start anew."""

    @property
    def kind(self) -> str:
        """Return the family of methods: ether, lora or full."""
        return self.adapter.kind if self.adapter else "full"

    @property
    def method(self) -> str:
        """Return the name for people: one of ``ether.METHODS``, lora or full."""
        return getattr(self.adapter, "Htype", self.kind)

    @property
    def n_processes(self) -> int:
        """Return the number of processes on all machines."""
        return self.devices * self.num_nodes


# ----------------------------------------------------------------------------------------------- what follows from them
class Plan:
    """A run's settings, checked together, and all that follows from them and from the data."""

    def __init__(self, settings: Settings, *, given: Collection[str] = (), problems: Sequence[str] = ()) -> None:
        """Check all settings together and work out the rest.

        Args:
            settings: as the flags say.
            given: names of the flags that were given, which the ``init_from`` file must not contradict.
            problems: those that were found before.

        Raises:
            ValueError: with every problem found.
        """
        problems, io = Problems(problems), settings.io
        self.init_adapter = settings.init_from and problems.attempt(load_adapter, settings.init_from, settings.kind)
        if self.init_adapter:
            settings = problems.attempt(settle_adapter, settings, self.init_adapter, given) or settings
        self.settings = settings  # those of the init_from file among them
        data = problems.attempt(read_data_config, io.train_data_dir) or {}
        val_data_dir = io.val_data_dir or io.train_data_dir
        train_file, val_file = Path(io.train_data_dir) / TRAIN_FILE, Path(val_data_dir) / TEST_FILE
        self.train_set = (data and problems.attempt(load_split, train_file)) or []
        self.val_set = (data and problems.attempt(load_split, val_file)) or []
        self.longest = max(map(length, self.train_set), default=0)  # in tokens
        checkpoint_dir = io.checkpoint_dir or data.get("checkpoint_dir")
        base_dir = self.base_dir = checkpoint_dir and problems.attempt(check_checkpoint_dir, checkpoint_dir)
        self.config = base_dir and problems.attempt(load_config, base_dir)
        weights = base_dir and problems.attempt(load_state, base_dir / WEIGHTS)  # mapped: read where it is asked for
        jobnum = io.jobnum or f"{datetime.now():%Y%m%d-%H%M%S}"
        name = [base_dir and base_dir.name, Path(io.train_data_dir).name, settings.method, jobnum]
        self.run_dir = settled(io.out_dir or Path(io.log_dir) / "-".join(map(str, name)))
        sources = [settings.init_from, base_dir, base_dir and base_dir / WEIGHTS, train_file, val_file]
        may_hold_run = settings.resume or settings.overwrite
        problems.attempt(check_run_folder, self.run_dir, may_hold_run=may_hold_run, sources=sources)
        self.count_steps(settings.train, problems)
        check_values(settings, problems)
        self.max_seconds = problems.attempt(parse_duration, settings.train.max_time)
        if self.config and self.train_set and self.val_set:
            problems.attempt(check_fit, base_dir, self.config, data=data, samples=self.train_set + self.val_set)
            problems.attempt(check_val_data, val_data_dir, io.train_data_dir)
            style = self.prompt_style = data["prompt_style"]
            self.sample_ids = problems.attempt(sample_prompt, settings.eval, base_dir, self.config, style, self.val_set)
        problems.attempt(weights_dtype, settings.precision, mixed=True)
        problems.attempt(check_form)
        if self.config and settings.adapter:
            problems.attempt(check_adapter, settings, self.config)
        if weights and self.init_adapter:
            problems.attempt(check_base, self.init_adapter, base_dir)
        problems.check()
        self.base = {"name": base_dir.name, "fingerprint": fingerprint(weights)}
        self.input_hashes = {"base model": self.base["fingerprint"]}
        self.input_hashes |= {file.name: file_sha256(file) for file in (train_file, val_file)}
        # Of hparams.yaml; a resumed run must find unchanged what decides its result.
        self.hparams = {"method": settings.method} | asdict(settings) | self.input_hashes
        if settings.quantize:
            self.base["quantize"] = settings.quantize

    def count_steps(self, train: TrainArgs, problems: Problems) -> None:
        """Work out samples, steps, warm-up and weight decay."""
        self.n_samples = train.epochs * (train.epoch_size or len(self.train_set))  # repeated ones counted
        self.n_steps = math.ceil(self.n_samples / max(1, train.global_batch_size))
        if train.max_steps is not None:
            self.n_steps = min(self.n_steps, train.max_steps)
        self.n_warmup = min(1000, self.n_steps // 10) if train.lr_warmup_steps is None else train.lr_warmup_steps
        # R depends on the direction of ETHER's and ETHER+'s vectors alone: decay would not change it.
        no_decay = self.settings.kind == "ether" and not METHODS[self.settings.method].matrices
        usual = 0.0 if no_decay else 0.01
        self.weight_decay = usual if train.weight_decay is None else train.weight_decay
        problems.expect(  # their order is drawn at once
            self.n_samples < 2**31,
            f"--train.epochs times --train.epoch_size are {self.n_samples} samples, expected less than 2^31",
        )
        problems.expect(
            not self.train_set or 0 <= self.n_warmup < max(1, self.n_steps),
            f"--train.lr_warmup_steps {self.n_warmup} must be shorter than the run of {self.n_steps} steps; "
            "lower it or train longer",
        )


def settle_adapter(settings: Settings, found: AdapterFile, given: Collection[str]) -> Settings:
    """Return the settings with those of the ``init_from`` file, which no flag has to repeat; dropout is the flags'.

    Raises:
        ValueError: a flag that was set says otherwise.
    """
    chosen = settings.adapter
    kept = {each.name: each.default for each in fields(chosen) if not each.name.endswith("dropout")}
    for name, default in kept.items():
        flag, own = getattr(chosen, name), getattr(found.config, name)
        if flag != own and (flag != default or chosen.flag(name) in given):
            raise UserError(
                f"{settings.init_from} was trained with {name} = {own}, a flag says {flag}; leave the flag out: "
                "the file's own settings are used"
            )
    return replace(settings, adapter=replace(chosen, **{name: getattr(found.config, name) for name in kept}))


def check_values(settings: Settings, problems: Problems) -> None:
    """Note every setting that cannot work, whatever the data and the base are."""
    io, train, adapter = settings.io, settings.train, settings.adapter
    for name, value in flatten({"train": asdict(train), "eval": asdict(settings.eval)}).items():
        if type(value) in (int, float):
            fits, wanted = (value >= 0, "0 or more") if name in MAY_BE_ZERO else (value > 0, "positive")
            problems.expect(fits and value < math.inf, f"--{name} must be {wanted}, got {value}")
    per_pass = train.micro_batch_size * settings.n_processes
    problems.expect(
        per_pass < 1 or train.global_batch_size % per_pass == 0,
        f"--train.global_batch_size {train.global_batch_size} is not a multiple of --train.micro_batch_size "
        f"{train.micro_batch_size} times {settings.n_processes} process(es)",
    )
    problems.expect(  # each process draws from a seed of its own
        0 <= settings.seed <= 2**32 - max(1, settings.n_processes),
        f"--seed must be 0 or more and below 2^32, got {settings.seed}",
    )
    problems.expect(
        not (settings.resume and settings.overwrite),
        "--resume true goes on with a run, --overwrite true starts it anew: give one of them",
    )
    known = io.out_dir or io.jobnum or not settings.resume
    problems.expect(known, "--resume true needs to know the run folder: give --io.out_dir DIR")
    problems.attempt(check_quantize, settings.quantize, settings.precision, full=adapter is None)
    for package in ("tensorboard", "wandb"):
        if getattr(io, package):
            problems.attempt(check_logger, package)
    problems.expect(adapter or not train.monitor, "--train.monitor watches an adapter; full finetuning has none")
    if settings.strategy == "fsdp":
        problems.expect(adapter, "--strategy fsdp shards a frozen base; full finetuning has none: take ddp")
        problems.expect(not train.monitor, "--train.monitor needs whole weights, which --strategy fsdp shards")
        quantized = f"--strategy fsdp cannot shard a quantized base: drop --quantize {settings.quantize}, or take ddp"
        problems.expect(not settings.quantize, quantized)


def parse_duration(text: str | float | None) -> float:
    """Return the seconds of a number of minutes or of h:m:s; infinity for None."""
    if text is None:
        return math.inf
    parts = str(text).split(":")
    units = {1: (60,), 3: (3600, 60, 1)}.get(len(parts), ())
    try:
        total = sum(float(part) * unit for part, unit in zip(parts, units, strict=True))
    except ValueError:  # no number, or too few or many of them
        total = math.nan
    if not 0 < total < math.inf:
        raise UserError(f"--train.max_time {text}: expected minutes, as 90, or hours, minutes and seconds, as 1:30:00")
    return total


def sample_prompt(eval: EvalArgs, base_dir: Path, config: Config, style: str, samples: list[Sample]) -> list[int]:
    """Return the ids that sample generations answer: of --eval.sample_prompt, or of a sample up to its response."""
    if eval.sample_prompt is None:
        sample = next((each for each in samples if each["response"][1:].any()), samples[0])
        start = int(sample["response"].int().argmax())  # of its response
        return sample["input_ids"][: max(1, start)].tolist()
    tokenizer = Tokenizer(base_dir)
    ids = encode_prompt(tokenizer, style, instruction=eval.sample_prompt)
    tokenizer.check_ids(ids, config.padded_vocab_size)
    if len(ids) >= config.block_size:
        raise UserError(f"--eval.sample_prompt has {len(ids)} tokens; the context is {config.block_size}")
    return ids


def check_adapter(settings: Settings, config: Config) -> None:
    """Raise where the targets or the blocks do not suit the model; on the meta device, before any weight is read."""
    with torch.device("meta"):
        model = GPT(config)
        if settings.quantize in SCHEMES:
            quantize_model(model, settings.quantize, model.state_dict(), dtype=torch.float32, device="meta")
        KINDS[settings.kind].add(model, settings.adapter)
