"""Finetune with ETHER, OFT, LoRA or all weights: ``finetune``, behind all front ends, and its loop, the ``Trainer``.

A run leaves a folder: its result (lit_model_ether_finetuned.pth, or of full finetuning final/, a base-shaped folder),
hparams.yaml, metrics.csv, loss.png, monitor.csv (--train.monitor true), checkpoints/step-N/ (--train.save_interval N),
and last of all summary.json: a finished run has it.

- The loss is summed over the target tokens of the whole optimizer step and divided once, so that any split into
  micro-batches and processes gives the same gradient.
- A checkpoint holds all that the rest of the run depends on: it goes on to the very bits that it would have had.
- Exit codes: 0 when the run is done or --train.max_time is over; 128 plus its number after a signal (143 SIGTERM, 130
  SIGINT, 138 SIGUSR1, 129 SIGHUP), when a checkpoint is written; 1 for what cannot go on.
"""

import math
import os
import shlex
import signal
import time
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING

import torch
import yaml

from lit_gpt import run_folder
from lit_gpt.adapter import adapter_state, adapters_off
from lit_gpt.adapter_files import KINDS, fill_adapter, load_adapter, make_trainable, save_adapter
from lit_gpt.batches import Batching, add_response_targets, n_targets, round_up, sample_order
from lit_gpt.checkpoint import WEIGHTS, copy_side_files, load_state, save_prompt_style, save_state
from lit_gpt.data import Sample, length
from lit_gpt.devices import average_gradients, gather, is_sharded, share_start, together, unsharded
from lit_gpt.errors import Problems, UserError, command
from lit_gpt.files import staged_dir, write_text
from lit_gpt.generate import generate
from lit_gpt.loss import MULTIPLE
from lit_gpt.memory import REMEDIES, estimate_memory, share_weights
from lit_gpt.model import GPT
from lit_gpt.monitor import measure
from lit_gpt.quantize import load_base, n_parameters
from lit_gpt.report import Reporter, held_memory_bytes, peak_memory_bytes, write_summary
from lit_gpt.settings import Plan, Settings
from lit_gpt.tokenizer import Tokenizer, list_answer_end

if TYPE_CHECKING:  # see devices.py
    from lightning.fabric import Fabric


class Diverged(UserError):
    """The loss or its gradient is not finite, in more steps than --train.skip_nonfinite allows."""


def finetune(settings: Settings, *, given: Collection[str] = (), base: GPT | None = None) -> None:
    """Train one adapter (or the whole model) and leave a run folder.

    Args:
        settings: what the flags say.
        given: names of the flags that were given, which the ``init_from`` file must not contradict.
        base: the settings' base model on this process's device, as ``load_base`` gives it, for many runs over the same
            frozen weights; by default it is loaded.

    Raises:
        ValueError, FileNotFoundError, FileExistsError: a setting, file or combination that cannot work; nothing is
            written then.
        SystemExit: 128 plus the signal's number, after a signal and the checkpoint that it asked for.
    """
    from lit_gpt.launch import check_alike, check_compiler, check_launch, launch_fabric  # here: Lightning comes along

    started = time.perf_counter()
    if settings.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # without it products on a GPU refuse to be so
    torch.use_deterministic_algorithms(settings.deterministic)
    problems = Problems()
    keeps_base = settings.adapter and settings.strategy != "fsdp"
    problems.expect(keeps_base or not base, "full finetuning and --strategy fsdp would change a base in memory")
    problems.attempt(check_launch, settings)
    if not problems:  # connected first, so that no process waits for one that finds a problem; else Plan raises them
        fabric = launch_fabric(settings)
    plan = together(lambda: Plan(settings, given=given, problems=problems))
    # The first process alone writes the run folder; by default a folder of the time, which no other may have read.
    plan.run_dir = gather(plan.run_dir)[0]
    together(lambda: check_alike(run_folder.flatten(plan.hparams | {"io": {}})))
    if settings.compile:
        together(lambda: check_compiler(fabric.device))
    may = dict(resume=settings.resume, overwrite=settings.overwrite)
    with run_folder.open_run(fabric, plan.run_dir, plan.hparams, **may) as (finished, checkpoint):
        if finished:
            fabric.print(f"{plan.run_dir} holds a finished run: nothing to do")
            return
        trainer = Trainer(fabric, plan, base=base, deadline=started + plan.max_seconds)
        with run_folder.explain_faults(plan.run_dir, tried=trainer.describe(), remedies=REMEDIES):
            trainer.set_up()
            trainer.begin(checkpoint)
            with run_folder.stop_signal() as stop:
                if trainer.train(stop):
                    with run_folder.stop_signal():  # nothing stops a run that is done while its result is written
                        trainer.finish()


# --------------------------------------------------------------------------------------- before the first step
def make_batching(plan: Plan, fabric: "Fabric") -> Batching:
    """Return how this process cuts samples into passes."""
    train = plan.settings.train
    compiles_each_size = fabric.device.type == "cpu" and plan.settings.precision != "32-true"  # see ``loss.MULTIPLE``
    fits = plan.config.block_size % MULTIPLE == 0  # also a sample as long as the context
    multiple = MULTIPLE if compiles_each_size and fits else 1
    n_tokens = train.micro_batch_size * round_up(plan.longest, multiple) if train.packing else None
    return Batching(train.micro_batch_size, n_tokens, fabric.global_rank, fabric.world_size, multiple)


def build_model(plan: Plan, device: torch.device, base: GPT | None = None) -> GPT:
    """Return the base, its weights shared with one in memory, with its adapter; only what trains requires gradients.

    The frozen weights are cast here, not by Fabric's ``bf16-true``, which would cast the adapter's fp32 masters too.
    """
    settings = plan.settings
    form = (settings.precision, settings.quantize)
    model = share_weights(base) if base else load_base(plan.base_dir, *form, device=device)
    make_trainable(model, settings.adapter)
    if plan.init_adapter:
        fill_adapter(model, plan.init_adapter)
    model.activation_checkpointing = settings.train.activation_checkpointing
    return model.to(device)


def compile_blocks(model: GPT) -> None:
    """Compile each block, for batches of any length: as they are alike, the work is that of one."""
    torch._dynamo.config.recompile_limit = 64  # graphs with and without gradients, adapters, a mask, a single row
    for block in model.transformer.h:
        block.compile(dynamic=True)


# ----------------------------------------------------------------------------------------------------- the loop
def learning_rate(step: int, *, peak: float, n_warmup: int, n_steps: int) -> float:
    """Return a step's rate, counted from 0: linear warm-up to ``peak``, then a cosine to zero; no step's rate is 0."""
    if step < n_warmup:
        return peak * (step + 1) / n_warmup
    progress = (step - n_warmup) / (n_steps - n_warmup)
    return peak * 0.5 * (1 + math.cos(math.pi * progress))


@dataclass
class Position:
    """The position of a run; a checkpoint holds all of it. Losses are those over all targets and over responses."""

    step: int = 0
    samples: int = 0
    tokens: int = 0
    """Tokens trained on, padding not counted."""
    padded: int = 0
    """Tokens that this process has computed, padding counted."""
    seconds: float = 0.0
    """Seconds of training: everything but validations and samples."""
    computing: float = 0.0
    """Seconds of training spent in forward and backward passes."""
    skipped: int = 0
    """Steps left out because their loss or gradient was not finite."""
    first_losses: tuple[float, float] = (math.nan, math.nan)
    """Validation losses before training."""
    last_losses: tuple[float, float] = (math.nan, math.nan)
    """Validation losses of the last validation."""
    best_losses: tuple[float, float] = (math.nan, math.nan)
    """Validation losses of the best step, under --train.patience."""
    best_step: int = 0
    since_best: int = 0
    """Number of validations in a row without a lower loss, under --train.patience."""


class Trainer:
    """A run's loop: takes steps, validates, saves, and leaves the result."""

    def __init__(self, fabric: "Fabric", plan: Plan, *, deadline: float, base: GPT | None = None) -> None:
        self.fabric, self.plan, self.deadline, self.base = fabric, plan, deadline, base
        self.settings, self.train_args = plan.settings, plan.settings.train
        self.batching = make_batching(plan, fabric)
        self.largest_batch = self.batching.collate(self.batching.largest(plan.train_set), fabric.device)
        self.memory = estimate_memory(plan, self.largest_batch, fabric=fabric)
        self.order = sample_order(len(plan.train_set), plan.n_samples, seed=plan.settings.seed)
        self.position = Position()
        self.reporter: Reporter | None = None  # of the first process
        self.start: dict[str, torch.Tensor] = {}  # the adapter that training started from, for the monitor
        self.tokenizer = Tokenizer(plan.base_dir) if plan.settings.eval.sample_interval else None

    def describe(self) -> str:
        """Return what a pass takes, in words."""
        size, precision, device = self.train_args.micro_batch_size, self.settings.precision, self.fabric.device
        memory = f", {self.memory} in all" if self.memory else ""
        return f"micro-batches of {size} samples of up to {self.plan.longest} tokens, {precision}, {device}{memory}"

    def set_up(self) -> None:
        """Build the model and the optimizer of what trains, say what they are, and try them on the largest batch."""
        fabric, device = self.fabric, self.fabric.device
        fabric.seed_everything(self.settings.seed, verbose=False)
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)  # an earlier run of this process may have taken more
        self.held_memory = held_memory_bytes()
        # Sharding moves a block at a time to a device that may be too small for all of them.
        model = build_model(self.plan, torch.device("cpu") if is_sharded(fabric) else device, self.base)
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        self.n_trained = sum(parameter.numel() for parameter in trained)
        self.announce(model)
        self.model = fabric.setup_module(model)
        if self.settings.compile:
            fabric.print("compiling the model's blocks: a minute or more")
            compile_blocks(model)
        share_start(trained)
        optimizer = torch.optim.AdamW(trained, lr=self.train_args.learning_rate, weight_decay=self.plan.weight_decay)
        self.optimizer = fabric.setup_optimizers(optimizer)
        # A trial pass on the largest batch: what lacks memory fails now, not at step 900.
        idx, targets, lengths = self.largest_batch
        with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
            self.model.train()
            fabric.backward(self.model(idx, lengths=lengths, targets=targets))
        for parameter in model.parameters():
            parameter.grad = None

    def announce(self, model: GPT) -> None:
        """Say what was worked out, before it costs anything."""
        plan, settings, options, say = self.plan, self.settings, self.train_args, self.fabric.print
        say(
            f"{settings.method} on {plan.base_dir}: {self.n_trained:,} of {n_parameters(model):,} parameters train, "
            f"{settings.precision}\n{len(plan.train_set)} samples to train on, {len(plan.val_set)} held out; "
            f"{plan.n_steps} steps of {options.global_batch_size} samples, {plan.n_warmup} of them warm-up to "
            f"{options.learning_rate:g}, weight decay {plan.weight_decay:g}\nrun folder: {plan.run_dir}"
        )
        if plan.n_steps < (options.max_steps or 0):
            say(f"the data ends before --train.max_steps {options.max_steps}: more --train.epochs make a longer run")
        if settings.method == "ether":
            say("ETHER starts at a reflection, not at the identity: the first losses are above the base model's")
        if self.memory:
            say(f"memory: {self.memory}, estimated{' for blocks that are not compiled' if settings.compile else ''}")

    def begin(self, checkpoint: Path | None) -> None:
        """Start, or take up a checkpoint's weights, optimizer, position, random state and metrics."""
        fabric, plan, reported = self.fabric, self.plan, None
        if checkpoint:
            state = load_state(checkpoint / run_folder.STATE)
            load_result(self.model.module, checkpoint, self.settings)
            self.optimizer.load_state_dict(state["optimizer"])
            fabric.strategy.precision.load_state_dict(state["precision"])
            self.position, self.start, reported = Position(**state["position"]), state["start"], state["reporter"]
            run_folder.restore_random_state(state["random"][fabric.global_rank])
            fabric.print(f"going on from {checkpoint}")
        else:
            if self.train_args.monitor:
                self.start = adapter_state(self.model.module)
            # From here on processes draw differently: each has a dropout of its own.
            fabric.seed_everything(self.settings.seed + fabric.global_rank, verbose=False)
        if fabric.is_global_zero:
            if checkpoint:
                run_folder.note_environment(state["environment"])
            else:
                run_folder.clear_run(plan.run_dir)
            write_text(plan.run_dir / run_folder.SETTINGS, yaml.safe_dump(plan.hparams, sort_keys=False))
            progress = dict(n_steps=plan.n_steps, step=self.position.step, state=reported)
            self.reporter = Reporter(plan.run_dir, settings=plan.hparams, **progress)

    def train(self, stop: SimpleNamespace) -> bool:
        """Validate the model that training starts from (the base, not ETHER's first reflection), then train.

        Return True where the run is complete; False where it was stopped and is to be resumed.
        """
        position, options, n_steps = self.position, self.train_args, self.plan.n_steps
        if position.step == 0:
            with nullcontext() if self.settings.init_from else adapters_off(self.model):
                position.first_losses = position.last_losses = self.validate()
        while position.step < n_steps and position.since_best < (options.patience or math.inf):
            position.step += 1
            with self.clock("seconds"):
                values = self.train_step()
            with self.clock("seconds"):
                self.record(**values)
            improved = False
            if position.step % self.settings.eval.interval == 0 or position.step == n_steps:
                position.last_losses = self.validate()
                improved = options.patience is not None and self.compare_with_best()
            if self.tokenizer and position.step % self.settings.eval.sample_interval == 0:
                self.show_sample(self.tokenizer)
            reason = self.reason_to_stop(stop)
            due = options.save_interval and position.step % options.save_interval == 0
            if due or improved or reason:
                with self.clock("seconds"):
                    self.save_checkpoint()
            if reason and position.step < n_steps:
                self.leave(reason)
                return False
        return True

    # ------------------------------------------------------------------------------------------------- one step
    def train_step(self) -> dict[str, float]:
        """Take one optimizer step; return its mean loss, learning rate and gradient norm (before it is clipped)."""
        position, plan, size = self.position, self.plan, self.train_args.global_batch_size
        schedule = dict(peak=self.train_args.learning_rate, n_warmup=plan.n_warmup, n_steps=plan.n_steps)
        rate = learning_rate(position.step - 1, **schedule)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        rows = self.order[(position.step - 1) * size : position.step * size]
        batch = [plan.train_set[i] for i in rows]
        total = self.forward_backward(batch)
        with self.clock("computing"):
            norm = self.fabric.clip_gradients(
                self.model, self.optimizer, max_norm=self.train_args.max_grad_norm or math.inf, error_if_nonfinite=False
            )
            total = self.fabric.all_reduce(total, reduce_op="sum")
            loss, grad_norm = torch.stack([total.float(), norm.float()]).tolist()  # waits for the device
        values = dict(loss=loss, learning_rate=rate, grad_norm=grad_norm)
        # fp16's loss scale is found by overflowing: its scaler leaves such a step out and lowers the scale.
        scaler = getattr(self.fabric.strategy.precision, "scaler", None)
        overflow = scaler is not None and math.isfinite(loss) and scaler.get_scale() > 1
        if overflow or (math.isfinite(loss) and math.isfinite(grad_norm)):
            self.optimizer.step()
        else:
            self.skip(values, rows)
            if scaler is not None:
                scaler.update()  # its scale, without the step
        self.optimizer.zero_grad()
        position.samples += len(batch)
        position.tokens += sum(map(length, batch))
        return values

    def forward_backward(self, batch: Sequence[Sample]) -> torch.Tensor:
        """Leave the gradient of a step's mean loss; return this process's share of that loss."""
        micros, n_micros = self.batching.local_micro_batches(batch)
        n_targets_in_all = n_targets(batch)
        total = torch.zeros((), device=self.fabric.device)
        for index, micro in enumerate(micros):
            idx, targets, lengths = self.batching.collate(micro, self.fabric.device)
            with self.clock("computing"), self.fabric.no_backward_sync(self.model, enabled=index + 1 < len(micros)):
                loss = self.model(idx, lengths=lengths, targets=targets)
                if self.train_args.loss_average == "token":
                    share = loss / n_targets_in_all
                else:
                    share = loss / max(1, n_targets(micro)) / n_micros
                # Data-parallel processes average their gradients; ours are shares of one sum.
                self.fabric.backward(share * self.fabric.world_size)
            total += share.detach()
            self.position.padded += idx.numel()
        if is_sharded(self.fabric):
            average_gradients(self.fabric, self.model)
        return total

    def skip(self, values: dict[str, float], rows: Sequence[int]) -> None:
        """Count a step that cannot be used; raise where there were enough of them."""
        position, allowed = self.position, self.train_args.skip_nonfinite
        position.skipped += 1
        text = (
            f"step {position.step} has a loss of {values['loss']:.4g} and a gradient of norm {values['grad_norm']:.4g},"
            f" at a learning rate of {values['learning_rate']:.3g}, on rows {', '.join(map(str, rows))} of train.pt"
        )
        if position.skipped > allowed:
            raise Diverged(
                f"{text}; lower the rate, look at these rows (counted from 0), or give --train.skip_nonfinite "
                f"{position.skipped}; {run_folder.last_checkpoint(self.plan.run_dir)}"
            )
        self.say(f"{text}: left out ({position.skipped} of {allowed} such steps)")

    @contextmanager
    def clock(self, name: str) -> Iterator[None]:
        """Add what passes inside to ``seconds`` or ``computing``."""
        started = time.perf_counter()
        yield
        setattr(self.position, name, getattr(self.position, name) + time.perf_counter() - started)

    # ---------------------------------------------------------------------------------------- between the steps
    @torch.no_grad()
    def validate(self) -> tuple[float, float]:
        """Report and return the mean loss over all held-out targets, and over the tokens of responses alone."""
        self.model.eval()
        sums = torch.zeros(2, 2, dtype=torch.float64)  # loss and count, of all targets and of the responses'
        for batch in self.batching.local_micro_batches(self.plan.val_set)[0]:
            samples, groups = add_response_targets(batch)
            idx, targets, lengths = self.batching.collate(samples, self.fabric.device)
            losses = self.model(idx, lengths=lengths, targets=targets, reduction="none").cpu().double()  # (N,)
            for i, group in enumerate(groups):
                sums[i] += torch.stack([losses[group].sum(), group.sum()])
        self.model.train()
        if self.fabric.world_size > 1:
            sums = self.fabric.all_reduce(sums.to(self.fabric.device), reduce_op="sum").cpu()
        of_all, of_responses = (sums[:, 0] / sums[:, 1]).tolist()  # nan where every response was cut away
        self.record(val_loss=of_all, val_response_loss=of_responses)
        if self.train_args.monitor and self.reporter:
            self.reporter.record_monitor(self.position.step, list(measure(self.model.module, self.start)))
        return of_all, of_responses

    def compare_with_best(self) -> bool:
        """Return True where the last validation is the best one; by the responses, where there are any."""
        position = self.position
        which = 1 if math.isfinite(position.last_losses[1]) else 0
        loss = position.last_losses[which]
        if not math.isfinite(loss) or loss >= position.best_losses[which]:  # never of nan: none is best yet
            position.since_best += 1
            return False
        position.best_losses, position.best_step, position.since_best = position.last_losses, position.step, 0
        return True

    @torch.no_grad()
    def show_sample(self, tokenizer: Tokenizer) -> None:
        """Show what the model answers now; greedy, so that no random number is drawn, in every process alike."""
        model, limit = self.model.module, self.settings.eval.sample_tokens
        # A token at a time suits no graph that was compiled for training.
        with self.fabric.autocast(), torch.compiler.set_stance("force_eager"), unsharded(model):
            ids = generate(model, self.plan.sample_ids, max_new_tokens=limit, stop_ids=tokenizer.stop_ids)
            answer = tokenizer.decode(list(ids))
        self.say(f"step {self.position.step} answers: {answer.strip()}")

    def record(self, **values: float) -> None:
        """Write a row of metrics.csv."""
        if self.reporter:
            at = {name: getattr(self.position, name) for name in ("step", "samples", "tokens", "seconds")}
            self.reporter.record(**at, **values)

    def say(self, text: str) -> None:
        """Print a line, once."""
        if self.reporter:
            self.reporter.say(text)

    # ------------------------------------------------------------------------------------------- saving and leaving
    def reason_to_stop(self, stop: SimpleNamespace) -> str:
        """Return the name of the signal that came to any process, or that the time is over; "" to go on."""
        asked = torch.tensor([stop.received, time.perf_counter() >= self.deadline], device=self.fabric.device)
        received, over = self.fabric.all_reduce(asked, reduce_op="max").tolist()
        if received:
            return signal.Signals(received).name
        return f"--train.max_time {self.train_args.max_time} is over" if over else ""

    def save_checkpoint(self) -> None:
        """Write checkpoints/step-N, from which ``begin`` resumes to the same bits."""
        state = dict(
            position=vars(self.position),
            start=self.start,
            optimizer=self.optimizer.state_dict(),
            precision=self.fabric.strategy.precision.state_dict(),
            random=gather(run_folder.random_state()),
            environment=run_folder.environment(),
        )
        if self.reporter is None:
            return
        state["reporter"] = self.reporter.state()
        step, keep, best = self.position.step, self.train_args.keep_checkpoints, self.position.best_step
        with run_folder.new_checkpoint(self.plan.run_dir, step, keep=keep, best=best) as folder:
            save_result(self.model.module, folder, self.plan)
            save_state(state, folder / run_folder.STATE)

    def leave(self, reason: str) -> None:
        """Say how to go on; the first process exits with a signal's code, after the others are through."""
        self.fabric.barrier()
        if self.reporter is None:
            return
        self.reporter.close()
        run_dir = self.plan.run_dir
        print(
            f"{reason}: saved {run_folder.checkpoint_folder(run_dir, self.position.step)}; the same command with "
            f"--io.out_dir {shlex.quote(str(run_dir))} --resume true goes on from there"
        )
        if reason in signal.Signals.__members__:
            raise SystemExit(128 + signal.Signals[reason])

    def take_best(self) -> None:
        """Go back to the best step's result."""
        position, folder = self.position, run_folder.checkpoint_folder(self.plan.run_dir, self.position.best_step)
        kept = f"step {position.step}, as there is no checkpoint of a better one"  # none was finite, or it is damaged
        if run_folder.find_damage(folder) is None:
            load_result(self.model.module, folder, self.settings)
            position.last_losses = position.best_losses
            kept = f"step {position.best_step}, the best"
        since = position.since_best
        ended = f"no lower response loss in {since} validation(s): " if since == self.train_args.patience else ""
        self.say(f"{ended}the result is that of {kept}")

    def finish(self) -> None:
        """Save the result and say what came of it."""
        if self.train_args.patience is not None:
            self.take_best()
        if self.reporter is None:
            return
        self.reporter.close()
        position, n_bytes = self.position, save_result(self.model.module, self.plan.run_dir, self.plan)
        peak = peak_memory_bytes()
        summary = dict(
            method=self.settings.method,
            trainable_parameters=self.n_trained,
            adapter_bytes=n_bytes,
            val_loss_before=position.first_losses[0],
            val_loss_after=position.last_losses[0],
            val_response_loss_before=position.first_losses[1],
            val_response_loss_after=position.last_losses[1],
            steps=position.step,
            skipped_steps=position.skipped,
            samples=position.samples,
            tokens=position.tokens,
            padding=1 - position.tokens / self.fabric.world_size / max(1, position.padded),
            seconds=position.seconds,
            overhead=1 - position.computing / max(position.seconds, 1e-9),
            tokens_per_second=position.tokens / max(position.seconds, 1e-9),
            peak_memory_bytes=peak,
            run_memory_bytes=peak - self.held_memory,
            estimated_memory_bytes=self.memory and self.memory.total,
        )
        write_summary(self.plan.run_dir, summary, self.reporter.metrics)
        print(f"next: {next_command(self.plan)}")


# --------------------------------------------------------------------------------------------------- the result
def result_file(folder: Path, settings: Settings) -> Path:
    """Return the path of a result in a run's or a checkpoint's folder: of the adapter, or of all weights."""
    return folder / (KINDS[settings.kind].file_name if settings.adapter else f"{run_folder.FINAL}/{WEIGHTS}")


def save_result(model: GPT, folder: Path, plan: Plan) -> int:
    """Write the adapter file or, of full finetuning, the folder final/; return the bytes of what trained."""
    settings, path, style = plan.settings, result_file(folder, plan.settings), plan.prompt_style
    if settings.adapter:
        save_adapter(path, model, kind=settings.kind, config=settings.adapter, base=plan.base, prompt_style=style)
        return path.stat().st_size
    with staged_dir(path.parent, overwrite=True) as staging:
        copy_side_files(plan.base_dir, staging)
        save_prompt_style(staging, style)
        list_answer_end(staging, style)
        save_state(model.state_dict(), staging / WEIGHTS)
    return path.stat().st_size


def load_result(model: GPT, folder: Path, settings: Settings) -> None:
    """Put what ``save_result`` wrote, of the same settings, back into the model."""
    path = result_file(folder, settings)
    if settings.adapter:
        fill_adapter(model, load_adapter(path, settings.kind))
    else:
        model.load_state_dict(load_state(path))


def next_command(plan: Plan) -> str:
    """Return what to type when a run has ended."""
    kind, result = plan.settings.kind, result_file(plan.run_dir, plan.settings)
    if plan.settings.adapter:
        trained = plan.settings.precision  # merged in fewer bits, a run in fp32 would lose its last digits unasked
        flags = {"checkpoint_dir": plan.base_dir, f"{kind}_path": result}
        flags |= {} if trained.startswith("bf16") else {"precision": trained.replace("mixed", "true")}
        return command(f"scripts/merge_{kind}.py", **flags)
    return command("chat/base.py", checkpoint_dir=result.parent)
