"""A training run: where it stands, and what moves it on, step by step.

- The loss is summed over the target tokens of the whole optimizer step and divided once, so that any split into
  micro-batches and processes gives the same gradient.
- Validation is the whole held-out set, over all target tokens and over the response's alone.
- A checkpoint holds all that the rest of the run depends on: it goes on to the very bits that it would have had.
"""

import math
import shlex
import signal
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml
from lightning.fabric import Fabric
from torch import nn

from lit_gpt.adapter import adapter_state, adapters_off
from lit_gpt.batches import Batching, group_by_length, n_targets, sample_order
from lit_gpt.checkpoint import load_state, save_state
from lit_gpt.data import Sample, length
from lit_gpt.devices import average_gradients, gather, is_sharded, unsharded
from lit_gpt.errors import UserError
from lit_gpt.files import atomic_write
from lit_gpt.generate import generate
from lit_gpt.loss import IGNORE_INDEX
from lit_gpt.monitor import measure
from lit_gpt.plan import Job, Plan
from lit_gpt.report import Reporter, peak_memory_bytes, write_summary
from lit_gpt.result import load_result, next_command, save_result
from lit_gpt.resume import (
    SETTINGS,
    STATE,
    StopSignal,
    checkpoint_folder,
    clear_run,
    damage,
    environment,
    last_checkpoint,
    new_checkpoint,
    random_state,
    restore_random_state,
)
from lit_gpt.tokenizer import Tokenizer


def learning_rate(step: int, *, peak: float, n_warmup: int, n_steps: int) -> float:
    """Linear warm-up to ``peak``, then a cosine to zero. ``step`` counts from 0; no step is wasted at a rate of 0."""
    if step < n_warmup:
        return peak * (step + 1) / n_warmup
    progress = (step - n_warmup) / (n_steps - n_warmup)
    return peak * 0.5 * (1 + math.cos(math.pi * progress))


@torch.no_grad()
def validate(fabric: Fabric, model: nn.Module, samples: Sequence[Sample], batching: Batching) -> tuple[float, float]:
    """Mean loss over all target tokens of the samples, and over the tokens of their responses alone."""
    model.eval()
    sums = torch.zeros(4, dtype=torch.float64)  # loss and count, of all targets and of the responses'
    for batch in batching.local_micro_batches(samples)[0]:
        idx, targets, lengths = batching.collate(batch, fabric.device)
        _, responses, _ = batching.collate(batch, fabric.device, response_only=True)
        both = torch.where(targets == IGNORE_INDEX, responses, targets)
        losses = model(idx, lengths=lengths, targets=both, reduction="none").cpu().double()  # a target in ``both`` each
        wanted = both != IGNORE_INDEX
        for slot, part in ((0, targets), (2, responses)):
            chosen = (part[wanted] != IGNORE_INDEX).cpu()
            sums[slot] += losses[chosen].sum()
            sums[slot + 1] += chosen.sum()
    model.train()
    if fabric.world_size > 1:
        sums = fabric.all_reduce(sums.to(fabric.device), reduce_op="sum").cpu()
    return (sums[0] / sums[1]).item(), (sums[2] / sums[3]).item()  # nan where every response was cut away


@dataclass
class Position:
    """Where a run stands; a checkpoint holds all of it."""

    step: int = 0
    samples: int = 0
    tokens: int = 0
    """Real ones, padding aside."""
    targets: int = 0
    padded: int = 0
    """Tokens that this process has computed, padding among them."""
    seconds: float = 0.0
    """Of training: everything but validations and samples."""
    computing: float = 0.0
    """Of these, in forward and backward passes."""
    skipped: int = 0
    """Steps left out because their loss or gradient was not finite."""
    before: tuple[float, float] = (math.nan, math.nan)
    """Validation losses, over all targets and over responses, before training."""
    after: tuple[float, float] = (math.nan, math.nan)
    """The last ones."""
    best: tuple[float, float] = (math.nan, math.nan)
    """Those of the best step, under --train.patience."""
    best_step: int = 0
    worse: int = 0
    """Validations in a row since then."""


class Run:
    """A training run: where it stands, and what moves it on."""

    def __init__(
        self,
        fabric: Fabric,
        model: nn.Module,
        *,
        optimizer: torch.optim.Optimizer,
        batching: Batching,
        job: Job,
        plan: Plan,
        settings: dict[str, Any],
        deadline: float,
        held: int,
        estimated: int | None,
    ) -> None:
        self.batching, self.held, self.estimated = batching, held, estimated
        self.fabric, self.model, self.optimizer, self.job, self.plan = fabric, model, optimizer, job, plan
        self.settings, self.deadline, self.args = settings, deadline, plan.train
        self.order = sample_order(len(plan.train_set), plan.n_samples, seed=settings["seed"])
        if self.args.group_by_length:
            lengths = list(map(length, plan.train_set))
            size, seed = self.args.global_batch_size, settings["seed"]
            self.order = group_by_length(self.order, lengths, size=size, seed=seed)
        self.at = Position()
        self.reporter: Reporter | None = None  # of the first process
        self.start: dict[str, torch.Tensor] = {}  # the adapter that training started from, for the monitor
        self.tokenizer = Tokenizer(plan.base_dir) if plan.eval.sample_interval else None

    # -------------------------------------------------------------------------------------------- from start to end
    def begin(self, checkpoint: Path | None) -> None:
        """Start, or take up a checkpoint's weights, optimizer, position, random state and metrics."""
        state = load_state(checkpoint / STATE) if checkpoint else None
        if state:
            self.start = state["start"]
            load_result(self.model.module, checkpoint, job=self.job)
            self.optimizer.load_state_dict(state["optimizer"])
            self.fabric.strategy.precision.load_state_dict(state["precision"])
            self.at = Position(**state["position"])
            restore_random_state(state["random"][self.fabric.global_rank])
            self.fabric.print(f"going on from {checkpoint}")
        else:
            if self.args.monitor:
                self.start = adapter_state(self.model.module)
            # From here on processes draw differently: each has a dropout of its own.
            self.fabric.seed_everything(self.settings["seed"] + self.fabric.global_rank, verbose=False)
        if not self.fabric.is_global_zero:
            return
        run_dir = self.plan.run_dir
        if not state:
            clear_run(run_dir)
        with atomic_write(run_dir / SETTINGS) as temporary:
            temporary.write_text(yaml.safe_dump(self.settings, sort_keys=False), encoding="utf-8")
        self.reporter = Reporter(
            run_dir, settings=self.settings, n_steps=self.plan.n_steps, step=self.at.step,
            state=state and state["reporter"],
        )  # fmt: skip

    def train_all(self) -> bool:
        """Validate the model that training starts from (the base, not ETHER's first reflection), then train.

        Returns:
            Whether the run is complete; false where it was stopped and is to be resumed.
        """
        at = self.at
        with StopSignal() as stop:
            if at.step == 0:
                with adapters_off(self.model) if self.job.init_from is None else nullcontext():
                    at.before = at.after = self.validate()
            while at.step < self.plan.n_steps and (self.args.patience is None or at.worse < self.args.patience):
                at.step += 1
                with self.clock("seconds"):
                    values = self.train_step()
                with self.clock("seconds"):
                    self.record(**values)
                improved = False
                if at.step % self.plan.eval.interval == 0 or at.step == self.plan.n_steps:
                    at.after = self.validate()
                    improved = self.args.patience is not None and self.compare_with_best()
                if self.tokenizer and at.step % self.plan.eval.sample_interval == 0:
                    self.show_sample(self.tokenizer)
                reason = self.reason_to_leave(stop)
                if (
                    reason is not None
                    or improved
                    or (self.args.save_interval and at.step % self.args.save_interval == 0)
                ):
                    with self.clock("seconds"):
                        self.save_checkpoint()
                if reason is not None and at.step < self.plan.n_steps:
                    self.leave(reason)
                    return False
        return True

    def finish(self) -> None:
        """Save the result and say what came of it."""
        if self.args.patience is not None:
            self.take_best()
        if self.reporter is None:
            return
        self.reporter.close()
        at, n_bytes = self.at, save_result(self.model.module, self.plan.run_dir, job=self.job, plan=self.plan)
        peak = peak_memory_bytes()
        summary = dict(
            method=self.job.method,
            learning_rate=self.args.learning_rate,
            trainable_parameters=sum(p.numel() for p in self.model.parameters() if p.requires_grad),
            adapter_bytes=n_bytes,
            val_loss_before=at.before[0],
            val_loss_after=at.after[0],
            val_response_loss_before=at.before[1],
            val_response_loss_after=at.after[1],
            steps=at.step,
            skipped_steps=at.skipped,
            samples=at.samples,
            tokens=at.tokens,
            target_tokens=at.targets,
            padding=1 - at.tokens / self.fabric.world_size / max(1, at.padded),
            seconds=at.seconds,
            overhead=1 - at.computing / max(at.seconds, 1e-9),
            tokens_per_second=at.tokens / max(at.seconds, 1e-9),
            peak_memory_bytes=peak,
            run_memory_bytes=peak - self.held,
            estimated_memory_bytes=self.estimated,
            precision=self.plan.precision,
        )
        write_summary(self.plan.run_dir, summary, self.reporter.metrics)
        print(f"next: {next_command(self.job, self.plan)}")

    # ------------------------------------------------------------------------------------------------- one step
    def train_step(self) -> dict[str, float]:
        """One optimizer step; returns its mean loss, learning rate and gradient norm (before it is clipped)."""
        at, plan, size = self.at, self.plan, self.args.global_batch_size
        rate = learning_rate(at.step - 1, peak=self.args.learning_rate, n_warmup=plan.n_warmup, n_steps=plan.n_steps)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        rows = self.order[(at.step - 1) * size : at.step * size]
        batch = [plan.train_set[i] for i in rows]
        targets = n_targets(batch)
        total = self.forward_backward(batch, targets)
        with self.clock("computing"):
            norm = self.fabric.clip_gradients(
                self.model, self.optimizer, max_norm=self.args.max_grad_norm or math.inf, error_if_nonfinite=False
            )
            total = self.fabric.all_reduce(total, reduce_op="sum")
            loss, grad_norm = torch.stack([total.float(), norm.float()]).tolist()  # waits for the device
        values = dict(loss=loss, learning_rate=rate, grad_norm=grad_norm)
        # fp16's loss scale is found by overflowing: its scaler leaves such a step out and lowers the scale.
        scaler = getattr(self.fabric.strategy.precision, "scaler", None)
        overflow = scaler is not None and math.isfinite(loss) and scaler.get_scale() > 1
        usable = (math.isfinite(loss) and math.isfinite(grad_norm)) or overflow
        if not usable:
            self.skip(values, rows)
        if usable:
            self.optimizer.step()
        elif scaler is not None:
            scaler.update()  # its scale, without the step
        self.optimizer.zero_grad()
        at.samples += len(batch)
        at.tokens += sum(map(length, batch))
        at.targets += targets
        return values

    def forward_backward(self, batch: Sequence[Sample], targets_in_all: int) -> torch.Tensor:
        """Leave the gradient of a step's mean loss; returns this process's share of that loss."""
        micros, in_all = self.batching.local_micro_batches(batch)
        total = torch.zeros((), device=self.fabric.device)
        for index, micro in enumerate(micros):
            idx, targets, lengths = self.batching.collate(micro, self.fabric.device)
            with self.clock("computing"), self.fabric.no_backward_sync(self.model, enabled=index + 1 < len(micros)):
                loss = self.model(idx, lengths=lengths, targets=targets)
                if self.args.loss_average == "token":
                    share = loss / targets_in_all
                else:
                    share = loss / max(1, n_targets(micro)) / in_all
                # Data-parallel processes average their gradients; ours are shares of one sum.
                self.fabric.backward(share * self.fabric.world_size)
            total += share.detach()
            self.at.padded += idx.numel()
        if is_sharded(self.fabric):
            average_gradients(self.fabric, self.model)
        return total

    def skip(self, values: dict[str, float], rows: Sequence[int]) -> None:
        """Count a step that cannot be used; raise where there were enough of them."""
        self.at.skipped += 1
        text = (
            f"step {self.at.step} has a loss of {values['loss']:.4g} and a gradient of norm {values['grad_norm']:.4g}, "
            f"at a learning rate of {values['learning_rate']:.3g}, on rows {', '.join(map(str, rows))} of train.pt"
        )
        if self.at.skipped > self.args.skip_nonfinite:
            raise UserError(
                f"{text}; lower the rate, look at these rows (counted from 0), or give --train.skip_nonfinite "
                f"{self.at.skipped}; {last_checkpoint(self.plan.run_dir)}"
            )
        self.say(f"{text}: left out ({self.at.skipped} of {self.args.skip_nonfinite} such steps)")

    @contextmanager
    def clock(self, name: str) -> Iterator[None]:
        """Add what passes inside to ``seconds`` or ``computing``."""
        started = time.perf_counter()
        yield
        setattr(self.at, name, getattr(self.at, name) + time.perf_counter() - started)

    # ---------------------------------------------------------------------------------------- between the steps
    def validate(self) -> tuple[float, float]:
        """Validate and report; returns the losses over all targets and over responses."""
        losses = validate(self.fabric, self.model, self.plan.val_set, self.batching)
        self.record(val_loss=losses[0], val_response_loss=losses[1])
        if self.args.monitor and self.reporter:
            self.reporter.record_monitor(self.at.step, list(measure(self.model.module, self.start)))
        return losses

    def compare_with_best(self) -> bool:
        """Whether the last validation is the best one; by the responses, where there are any."""
        at = self.at
        which = 1 if math.isfinite(at.after[1]) else 0
        if not math.isfinite(at.after[which]) or at.after[which] >= at.best[which]:  # never of nan: none is best yet
            at.worse += 1
            return False
        at.best, at.best_step, at.worse = at.after, at.step, 0
        return True

    def take_best(self) -> None:
        """Go back to the best step's result."""
        folder, at = checkpoint_folder(self.plan.run_dir, self.at.best_step), self.at
        if not at.best_step:
            self.say(f"no validation gave a finite loss: the result is that of step {at.step}")
            return
        problem = damage(folder)
        if problem is None:
            load_result(self.model.module, folder, job=self.job)
            at.after = at.best
        kept = f"step {at.best_step}, the best" if problem is None else f"step {at.step}, since {folder} is damaged"
        ended = f"no lower response loss in {at.worse} validation(s): " if at.worse == self.args.patience else ""
        self.say(f"{ended}the result is that of {kept}")

    @torch.no_grad()
    def show_sample(self, tokenizer: Tokenizer) -> None:
        """Show what the model answers now; greedy, so that no random number is drawn, in every process alike."""
        # A token at a time suits no graph that was compiled for training.
        with self.fabric.autocast(), torch.compiler.set_stance("force_eager"), unsharded(self.model.module):
            ids = generate(
                self.model.module,
                self.plan.sample_ids,
                max_new_tokens=self.plan.eval.sample_tokens,
                stop_ids=tokenizer.stop_ids,
            )
            answer = tokenizer.decode(list(ids))
        self.say(f"step {self.at.step} answers: {answer.strip()}")

    def record(self, **values: float) -> None:
        """A row of metrics.csv."""
        if self.reporter:
            at = self.at
            self.reporter.record(step=at.step, samples=at.samples, tokens=at.tokens, seconds=at.seconds, **values)

    def say(self, text: str) -> None:
        """A line on the screen, once."""
        if self.reporter:
            self.reporter.say(text)

    def reason_to_leave(self, stop: StopSignal) -> int | None:
        """The signal that came, to any process; 0 where --train.max_time is over; None to go on."""
        asked = torch.tensor([stop.received, time.perf_counter() >= self.deadline], device=self.fabric.device)
        received, over = self.fabric.all_reduce(asked, reduce_op="max").tolist()
        return received or (0 if over else None)

    def save_checkpoint(self) -> None:
        """Write checkpoints/step-N, from which ``begin`` goes on as if nothing had been."""
        state = dict(
            position=vars(self.at),
            start=self.start,
            optimizer=self.optimizer.state_dict(),
            precision=self.fabric.strategy.precision.state_dict(),
            random=gather(random_state()),
            settings=self.settings,
            facts=self.plan.facts,
            environment=environment(),
        )
        if self.reporter is None:
            return
        state["reporter"] = self.reporter.state()
        keep, best = self.args.keep_checkpoints, self.at.best_step
        with new_checkpoint(self.plan.run_dir, self.at.step, keep=keep, best=best) as folder:
            save_result(self.model.module, folder, job=self.job, plan=self.plan)
            save_state(state, folder / STATE)

    def leave(self, received: int) -> None:
        """Say how to go on; the first process exits with the signal's code, after the others are through."""
        self.fabric.barrier()
        if self.reporter is None:
            return
        self.reporter.close()
        why = signal.Signals(received).name if received else f"--train.max_time {self.args.max_time} is over"
        print(
            f"{why}: saved {checkpoint_folder(self.plan.run_dir, self.at.step)}; the same command with "
            f"--io.out_dir {shlex.quote(str(self.plan.run_dir))} --resume true goes on from there"
        )
        if received:
            raise SystemExit(128 + received)
