"""The one training loop, for ETHER, OFT, LoRA and full finetuning.

``finetune`` checks everything, loads the base, puts the adapter on, trains, and leaves a run folder:

    lit_model_ether_finetuned.pth   the adapter alone (full finetuning: final/, a base-shaped folder)
    hparams.yaml                    every setting of the run
    metrics.csv, loss.png           losses by step
    summary.json                    what the closing lines say
    checkpoints/step-N/             the adapter every --train.save_interval steps

Notable choices:
- The loss is summed over the target tokens of the whole optimizer step and divided once, so that micro-batches of any
  size give the same gradient; they are formed by length, which wastes little on padding.
- The order of the samples depends on the seed alone: successive seeded permutations of the data.
- Validation is the whole held-out set, in order, over all target tokens and over the response's alone.
"""

import math
import time
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from pathlib import Path

import torch
import yaml
from lightning.fabric import Fabric
from torch import nn

from lit_gpt.adapter import adapters_off, mark_only_adapter_as_trainable
from lit_gpt.adapter_files import KINDS, attach_adapter, check_base, load_adapter, save_adapter
from lit_gpt.checkpoint import (
    WEIGHTS,
    atomic_write,
    copy_side_files,
    fingerprint,
    load_model,
    load_state,
    save_prompt_style,
    save_state,
    staged_dir,
)
from lit_gpt.data import Sample, collate
from lit_gpt.model import GPT, IGNORE_INDEX
from lit_gpt.plan import EvalArgs, IOArgs, Job, Plan, TrainArgs, make_plan
from lit_gpt.quantize import describe_size, load_quantized_model, n_parameters
from lit_gpt.report import Metrics, peak_memory_bytes, write_summary


def finetune(
    job: Job,
    *,
    io: IOArgs,
    train: TrainArgs = TrainArgs(),  # noqa: B008  (the command line is read off this signature, defaults included)
    eval: EvalArgs = EvalArgs(),  # noqa: B008
    precision: str = "bf16-true",
    quantize: str | None = None,
    devices: int = 1,
    num_nodes: int = 1,
    seed: int = 1337,
    overwrite: bool = False,
) -> None:
    """Train one adapter (or the whole model) and leave a run folder.

    Args:
        job: what is trained.
        io: where things are.
        train: how to train.
        eval: when to validate.
        precision: 32-true, bf16-true, 16-true, bf16-mixed or 16-mixed; adapters stay fp32 in any case.
        quantize: keep the base's weights in fewer bits: bnb.nf4, bnb.nf4-dq, bnb.fp4, bnb.fp4-dq or bnb.int8.
        devices: processes on this machine.
        num_nodes: machines.
        seed: fixes the start of the adapter, the order of the data and dropout.
        overwrite: write into a run folder that already holds a finished run.

    Raises:
        ValueError, FileNotFoundError, FileExistsError: a setting, file or combination that cannot work; nothing is
            written then.
    """
    processes = devices * num_nodes
    plan = make_plan(
        job,
        io=io,
        train=train,
        eval=eval,
        precision=precision,
        quantize=quantize,
        processes=processes,
        overwrite=overwrite,
    )
    fabric = Fabric(devices=devices, num_nodes=num_nodes, precision=precision if "mixed" in precision else "32-true")
    fabric.launch()
    fabric.seed_everything(seed, verbose=False)
    model = build_model(job, plan, fabric.device)
    announce(job, plan, model, fabric=fabric)
    optimizer = torch.optim.AdamW(
        (p for p in model.parameters() if p.requires_grad), lr=train.learning_rate, weight_decay=plan.weight_decay
    )
    wrapped, optimizer = fabric.setup(model, optimizer)
    rehearse(fabric, wrapped, plan.train_set, size=train.micro_batch_size)
    plan.run_dir.mkdir(parents=True, exist_ok=True)
    settings = dict(method=job.method, adapter=job.adapter and vars(job.adapter), io=vars(io), train=vars(train))
    settings |= dict(eval=vars(eval), precision=precision, quantize=quantize, devices=devices, num_nodes=num_nodes)
    settings |= dict(seed=seed)
    if fabric.is_global_zero:
        with atomic_write(plan.run_dir / "hparams.yaml") as temporary:
            temporary.write_text(yaml.safe_dump(settings, sort_keys=False), encoding="utf-8")
    run = Run(fabric, wrapped, optimizer=optimizer, job=job, plan=plan, seed=seed)
    run.train_all()
    run.finish()


def build_model(job: Job, plan: Plan, device: torch.device) -> GPT:
    """The base with its adapter, only what trains requiring gradients; notes the base's fingerprint in the plan.

    The frozen weights are cast here, not by Fabric's ``bf16-true``, which would cast the adapter's fp32 masters too.
    """
    plan.base = {"name": plan.base_dir.name, "fingerprint": fingerprint(load_state(plan.base_dir / WEIGHTS))}
    if plan.quantize is None:
        model = load_model(plan.base_dir, plan.precision, mixed=True)
    else:
        plan.base["quantize"] = plan.quantize
        model = load_quantized_model(plan.base_dir, plan.precision, plan.quantize, device=device)
    if job.adapter is None:
        model.requires_grad_(True)
    elif job.init_from:
        adapter = load_adapter(job.init_from, job.kind)
        check_base(adapter, plan.base_dir, source=job.init_from)
        attach_adapter(model, adapter, source=job.init_from)
        mark_only_adapter_as_trainable(model)
    else:
        KINDS[job.kind].add(model, job.adapter)
        mark_only_adapter_as_trainable(model)
    return model.to(device)


def announce(job: Job, plan: Plan, model: nn.Module, *, fabric: Fabric) -> None:
    """Say what was worked out, before it costs anything."""
    trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
    if plan.quantize is not None:
        fabric.print(describe_size(model, plan.quantize, plan.precision))
    fabric.print(
        f"{job.method} on {plan.base_dir}: {trainable:,} of {n_parameters(model):,} parameters train, "
        f"{plan.precision}\n"
        f"{len(plan.train_set)} samples to train on, {len(plan.val_set)} held out; {plan.n_steps} steps of "
        f"{plan.train.global_batch_size} samples, {plan.n_warmup} of them warm-up to {plan.train.learning_rate:g}, "
        f"weight decay {plan.weight_decay:g}\nrun folder: {plan.run_dir}"
    )
    if job.method == "ether":
        fabric.print("ETHER starts at a reflection, not at the identity: the first losses are above the base model's")


def rehearse(fabric: Fabric, model: nn.Module, samples: Sequence[Sample], *, size: int) -> None:
    """One discarded forward and backward on the largest batch there can be: a lack of memory shows at once."""
    largest = sorted(samples, key=lambda sample: len(sample["input_ids"]))[-size:]
    idx, targets = collate(largest, fabric.device)
    with torch.random.fork_rng(devices=[fabric.device] if fabric.device.type == "cuda" else []):
        model.train()
        fabric.backward(model(idx, targets=targets))
    for parameter in model.parameters():
        parameter.grad = None


def learning_rate(step: int, *, peak: float, n_warmup: int, n_steps: int) -> float:
    """Linear warm-up to ``peak``, then a cosine to zero. ``step`` counts from 0; no step is wasted at a rate of 0."""
    if step < n_warmup:
        return peak * (step + 1) / n_warmup
    progress = (step - n_warmup) / (n_steps - n_warmup)
    return peak * 0.5 * (1 + math.cos(math.pi * progress))


def sample_order(n_data: int, n_samples: int, *, seed: int) -> list[int]:
    """Indices of the samples in training order: permutations of the data, one after another, cut at ``n_samples``."""
    generator = torch.Generator().manual_seed(seed)
    order: list[int] = []
    while len(order) < n_samples:
        order += torch.randperm(n_data, generator=generator).tolist()
    return order[:n_samples]


def micro_batches(samples: Sequence[Sample], size: int) -> Iterator[list[Sample]]:
    """Cut a step's samples into micro-batches of similar length."""
    ordered = sorted(samples, key=lambda sample: len(sample["input_ids"]))
    for start in range(0, len(ordered), size):
        yield ordered[start : start + size]


def n_targets(samples: Sequence[Sample]) -> int:
    """Tokens with a loss; a sample's first token is never predicted."""
    return sum(int((sample["labels"][1:] != IGNORE_INDEX).sum()) for sample in samples)


@torch.no_grad()
def validate(fabric: Fabric, model: nn.Module, samples: Sequence[Sample], *, size: int) -> tuple[float, float]:
    """Mean loss over all target tokens of the samples, and over the tokens of their responses alone."""
    model.eval()
    sums = torch.zeros(4, dtype=torch.float64)  # loss and count, of all targets and of the responses'
    for batch in micro_batches(samples, size):
        idx, targets = collate(batch, fabric.device)
        _, responses = collate(batch, fabric.device, response_only=True)
        both = torch.where(targets == IGNORE_INDEX, responses, targets)
        losses = model(idx, targets=both, reduction="none").double().cpu()  # one for each target in ``both``
        wanted = both != IGNORE_INDEX
        for slot, part in ((0, targets), (2, responses)):
            chosen = (part[wanted] != IGNORE_INDEX).cpu()
            sums[slot] += losses[chosen].sum()
            sums[slot + 1] += chosen.sum()
    model.train()
    return (sums[0] / sums[1]).item(), (sums[2] / sums[3]).item()  # nan where every response was cut away


class Run:
    """A training run: its position, its counters, and what it writes."""

    def __init__(
        self, fabric: Fabric, model: nn.Module, *, optimizer: torch.optim.Optimizer, job: Job, plan: Plan, seed: int
    ) -> None:
        self.fabric, self.model, self.optimizer, self.job, self.plan = fabric, model, optimizer, job, plan
        self.args = plan.train
        self.order = sample_order(len(plan.train_set), plan.n_samples, seed=seed)
        self.metrics = Metrics(plan.run_dir / "metrics.csv") if fabric.is_global_zero else None
        self.samples = self.tokens = self.targets = self.padded = 0
        self.train_seconds = 0.0
        self.before = self.after = (math.nan, math.nan)  # validation losses: all targets, responses

    def train_all(self) -> None:
        """Validate the model that training starts from (the base, not ETHER's first reflection), train, validate."""
        with adapters_off(self.model) if self.job.init_from is None else nullcontext():
            self.before = self.after = self.validate(0)
        for step in range(1, self.plan.n_steps + 1):
            started = time.perf_counter()
            loss, rate = self.train_step(step)
            self.train_seconds += time.perf_counter() - started
            if not math.isfinite(loss):
                raise ValueError(f"the loss of step {step} is {loss} at a learning rate of {rate:.3g}; lower the rate")
            self.log(step, loss=loss, learning_rate=rate)
            if step % self.plan.eval.interval == 0 or step == self.plan.n_steps:
                self.after = self.validate(step)
            if self.args.save_interval and step % self.args.save_interval == 0:
                self.save(self.plan.run_dir / "checkpoints" / f"step-{step:06d}")

    def train_step(self, step: int) -> tuple[float, float]:
        """One optimizer step; returns its mean loss and its learning rate."""
        rate = learning_rate(
            step - 1, peak=self.args.learning_rate, n_warmup=self.plan.n_warmup, n_steps=self.plan.n_steps
        )
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        size = self.args.global_batch_size
        batch = [self.plan.train_set[i] for i in self.order[(step - 1) * size : step * size]]
        mine = batch[self.fabric.global_rank :: self.fabric.world_size]
        micros = list(micro_batches(mine, self.args.micro_batch_size))
        total, in_all = torch.zeros((), device=self.fabric.device), n_targets(batch)
        for index, micro in enumerate(micros):
            idx, targets = collate(micro, self.fabric.device)
            with self.fabric.no_backward_sync(self.model, enabled=index + 1 < len(micros)):
                loss = self.model(idx, targets=targets)
                if self.args.loss_average == "token":
                    share = loss / in_all
                else:
                    share = loss / n_targets(micro) / (len(micros) * self.fabric.world_size)
                # Data-parallel processes average their gradients; ours are shares of one sum.
                self.fabric.backward(share * self.fabric.world_size)
            total += share.detach()
            self.padded += idx.numel()
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.count(batch, in_all)
        return self.fabric.all_reduce(total, reduce_op="sum").item(), rate

    def count(self, batch: Sequence[Sample], n_targets: int) -> None:
        """Keep the books: samples, real tokens, targets."""
        self.samples += len(batch)
        self.tokens += sum(len(sample["input_ids"]) for sample in batch)
        self.targets += n_targets

    def validate(self, step: int) -> tuple[float, float]:
        """Validate and log; returns the losses over all targets and over responses."""
        losses = validate(self.fabric, self.model, self.plan.val_set, size=self.args.micro_batch_size)
        self.log(step, val_loss=losses[0], val_response_loss=losses[1])
        return losses

    def log(self, step: int, **values: float) -> None:
        """Write a row of metrics.csv and a line on the screen."""
        if self.metrics is None:
            return
        seconds = self.train_seconds
        self.metrics.write(step=step, samples=self.samples, tokens=self.tokens, seconds=seconds, **values)
        if "val_loss" in values:
            text = f"validation {values['val_loss']:.4f}, responses {values['val_response_loss']:.4f}"
        elif step == 1 or step % 10 == 0:
            speed = self.tokens / max(seconds, 1e-9)
            left = seconds / step * (self.plan.n_steps - step)
            text = (
                f"loss {values['loss']:.4f}  lr {values['learning_rate']:.2e}  {speed:.0f} tokens/s  {left:.0f} s left"
            )
        else:
            return
        print(f"step {step}/{self.plan.n_steps}  {text}", flush=True)

    def save(self, folder: Path) -> int:
        """Write the result (the adapter, or the whole model as ``final/``) into a folder; returns its bytes."""
        if not self.fabric.is_global_zero:
            return 0
        model, style = self.model.module, self.plan.data["prompt_style"]
        if self.job.adapter is not None:
            path = folder / KINDS[self.job.kind].file_name
            save_adapter(
                path, model, kind=self.job.kind, config=self.job.adapter, base=self.plan.base, prompt_style=style
            )
            return path.stat().st_size
        with staged_dir(folder / "final", overwrite=True) as staging:
            copy_side_files(self.plan.base_dir, staging)
            save_prompt_style(staging, style)
            save_state(model.state_dict(), staging / WEIGHTS)
        return (folder / "final" / WEIGHTS).stat().st_size

    def finish(self) -> None:
        """Save the result and say what came of it."""
        size = self.save(self.plan.run_dir)
        if self.metrics is None:
            return
        self.metrics.close()
        seconds = self.train_seconds
        summary = dict(
            method=self.job.method,
            learning_rate=self.args.learning_rate,
            trainable_parameters=sum(p.numel() for p in self.model.parameters() if p.requires_grad),
            adapter_bytes=size,
            val_loss_before=self.before[0],
            val_loss_after=self.after[0],
            val_response_loss_before=self.before[1],
            val_response_loss_after=self.after[1],
            steps=self.plan.n_steps,
            samples=self.samples,
            tokens=self.tokens,
            target_tokens=self.targets,
            padding=1 - self.tokens / self.fabric.world_size / max(1, self.padded),
            seconds=seconds,
            tokens_per_second=self.tokens / max(seconds, 1e-9),
            peak_memory_bytes=peak_memory_bytes(),
            precision=self.plan.precision,
        )
        write_summary(self.plan.run_dir, summary, self.metrics)
        self.next_commands()

    def next_commands(self) -> None:
        """Say what to type next."""
        if self.job.adapter is None:
            print(f"next: python chat/base.py --checkpoint_dir {self.plan.run_dir / 'final'}")
            return
        path = self.plan.run_dir / KINDS[self.job.kind].file_name
        print(
            f"next: python scripts/merge_{self.job.kind}.py --checkpoint_dir {self.plan.base_dir} "
            f"--{self.job.kind}_path {path}"
        )
