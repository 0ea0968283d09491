"""Finetuning with ETHER, OFT, LoRA or all weights: one function behind all front ends.

``finetune`` checks everything, loads the base, puts the adapter on, trains, and leaves a run folder:

    lit_model_ether_finetuned.pth   the adapter alone (full finetuning: final/, a base-shaped folder)
    hparams.yaml                    every setting of the run
    metrics.csv, loss.png           losses by step
    monitor.csv                     with --train.monitor true, what lit_gpt/monitor.py measures at validations
    summary.json                    what the closing lines say; the last file of a run, so a finished one has it
    checkpoints/step-N/             the same result and all that --resume true needs, every --train.save_interval steps

``run.py`` is the loop; here is what is built before it.

Exit codes: 0 when the run is done or --train.max_time is over, 128 plus its number after a signal (143 SIGTERM, 130
SIGINT, 138 SIGUSR1, 129 SIGHUP; a checkpoint is written first), 1 for what cannot go on.
"""

import os
import time
from datetime import timedelta

import torch
from lightning.fabric import Fabric
from torch import Tensor, nn

from lit_gpt.adapter_files import check_base, fill_adapter, load_adapter, make_trainable
from lit_gpt.batches import Batching, round_up
from lit_gpt.checkpoint import load_model
from lit_gpt.data import length
from lit_gpt.devices import (
    check_alike,
    check_launch,
    compiles_each_size,
    gather,
    is_sharded,
    launch_fabric,
    share_start,
    together,
)
from lit_gpt.errors import UserError
from lit_gpt.loss import MULTIPLE
from lit_gpt.memory import Memory, estimate_memory, remedies
from lit_gpt.model import GPT
from lit_gpt.plan import EvalArgs, IOArgs, Job, Plan, TrainArgs, make_plan, settle_adapter
from lit_gpt.quantize import describe_size, load_quantized_model, n_parameters
from lit_gpt.report import held_memory_bytes
from lit_gpt.resume import SUMMARY, StopSignal, explain_faults, flatten, open_run
from lit_gpt.run import Run

PATIENCE = {"ether": timedelta(minutes=10), "lora": timedelta(minutes=10), "full": timedelta(minutes=30)}
"""For how long processes wait for each other: the first one may be writing all weights and their optimizer's state."""


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
    strategy: str = "auto",
    compile: bool = False,
    seed: int = 1337,
    deterministic: bool = False,
    resume: bool = False,
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
        strategy: ddp, a copy of the model in each process; fsdp, the frozen base sharded over them; auto is ddp.
        compile: compile the model's blocks; worth its minute in long runs on a GPU.
        seed: fixes the start of the adapter, the order of the data and dropout.
        deterministic: on a GPU, the same bits for the same seed, by slower kernels; a CPU gives them anyway.
        resume: go on from the newest good checkpoint of the run folder, or start where there is none.
        overwrite: write into a run folder that already holds a run, and start anew.

    Raises:
        ValueError, FileNotFoundError, FileExistsError: a setting, file or combination that cannot work; nothing is
            written then.
        SystemExit: 128 plus the signal's number, after a signal and the checkpoint that it asked for.
    """
    started = time.perf_counter()
    if deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # without it products on a GPU refuse to be so
    torch.use_deterministic_algorithms(deterministic)
    shared = dict(strategy=strategy, precision=precision)
    unfit = check_launch(devices, num_nodes)
    if precision == "16-mixed" and not torch.cuda.is_available():  # Fabric would take bf16, and say so in passing
        unfit.append("--precision 16-mixed needs a GPU: take bf16-mixed or 32-true")
    if not unfit:  # connected first, so that no process waits for one that finds a problem and ends
        fabric = launch_fabric(**shared, devices=devices, num_nodes=num_nodes, patience=PATIENCE[job.kind])
    shared |= dict(io=io, train=train, eval=eval, quantize=quantize, overwrite=overwrite, resume=resume, seed=seed)
    job = together(lambda: settle_adapter(job))
    plan = together(lambda: make_plan(job, **shared, processes=devices * num_nodes, unfit=unfit))
    # The first process alone writes the run folder; by default a folder of the time, which no other may have read.
    plan.run_dir, finished = gather((plan.run_dir, resume and (plan.run_dir / SUMMARY).is_file()))[0]
    if finished:
        fabric.print(f"{plan.run_dir} holds a finished run: nothing to do")
        return
    settings = dict(method=job.method, adapter=job.adapter and vars(job.adapter), init_from=job.init_from)
    settings |= dict(io=vars(io), train=vars(train), eval=vars(eval), precision=precision, devices=devices)
    settings |= dict(num_nodes=num_nodes, strategy=strategy, compile=compile, seed=seed, deterministic=deterministic)
    settings |= dict(quantize=quantize)
    together(lambda: check_alike(plan.facts | flatten(settings | {"io": {}})))
    if compile:
        together(lambda: check_compiler(fabric.device))
    with open_run(fabric, plan.run_dir, settings=settings, facts=plan.facts, resume=resume) as checkpoint:
        batching = make_batching(plan, fabric)
        largest = batching.collate(
            batching.largest(plan.train_set, train.global_batch_size // fabric.world_size), fabric.device
        )
        memory = estimate_memory(job, plan, largest, fabric=fabric)
        size, longest = train.micro_batch_size, max(map(length, plan.train_set))
        tried = f"micro-batches of {size} samples of up to {longest} tokens, {precision}, {fabric.device}"
        tried += f", {memory} in all" if memory else ""
        with explain_faults(plan.run_dir, tried=tried, remedies=remedies(job, plan, fabric=fabric)):
            fabric.seed_everything(seed, verbose=False)
            held = held_memory_bytes()
            model, optimizer = set_up(fabric, job, plan, memory=memory, compile=compile)
            rehearse(fabric, model, largest)
            run = Run(
                fabric,
                model,
                optimizer=optimizer,
                batching=batching,
                job=job,
                plan=plan,
                settings=settings,
                deadline=started + plan.max_seconds,
                held=held,
                estimated=memory and memory.total,
            )
            run.begin(checkpoint)
            if run.train_all():
                with StopSignal():  # nothing stops a run that is done while its result is written
                    run.finish()


def make_batching(plan: Plan, fabric: Fabric) -> Batching:
    """How the samples are cut into passes."""
    fits = plan.config.block_size % MULTIPLE == 0  # also a sample as long as the context
    multiple = MULTIPLE if compiles_each_size(fabric, plan.precision) and fits else 1
    size, longest = plan.train.micro_batch_size, round_up(max(map(length, plan.train_set)), multiple)
    return Batching(
        size,
        size * longest if plan.train.packing else None,
        rank=fabric.global_rank,
        n_processes=fabric.world_size,
        pad_to_multiple_of=multiple,
    )


def set_up(
    fabric: Fabric, job: Job, plan: Plan, *, memory: Memory | None, compile: bool
) -> tuple[nn.Module, torch.optim.Optimizer]:
    """The model with its adapter, and the optimizer of what trains, as Fabric wraps them; says what they are."""
    # Sharding moves a block at a time to a device that may be too small for all of them.
    model = build_model(job, plan, torch.device("cpu") if is_sharded(fabric) else fabric.device)
    announce(job, plan, model, fabric=fabric)
    if memory:
        fabric.print(f"memory: {memory}, estimated{' for blocks that are not compiled' if compile else ''}")
    wrapped = fabric.setup_module(model)
    if compile:
        fabric.print("compiling the model's blocks: a minute or more")
        compile_blocks(model)
    trained = [p for p in model.parameters() if p.requires_grad]
    share_start(trained)
    optimizer = torch.optim.AdamW(trained, lr=plan.train.learning_rate, weight_decay=plan.weight_decay)
    return wrapped, fabric.setup_optimizers(optimizer)


def build_model(job: Job, plan: Plan, device: torch.device) -> GPT:
    """The base with its adapter, only what trains requiring gradients.

    The frozen weights are cast here, not by Fabric's ``bf16-true``, which would cast the adapter's fp32 masters too.
    """
    if plan.quantize is None:
        model = load_model(plan.base_dir, plan.precision, mixed=True)
    else:
        model = load_quantized_model(plan.base_dir, plan.precision, plan.quantize, device=device)
    make_trainable(model, job.kind, job.adapter)
    if job.init_from:
        adapter = load_adapter(job.init_from, job.kind)
        check_base(adapter, plan.base_dir)
        fill_adapter(model, adapter)
    model.activation_checkpointing = plan.train.activation_checkpointing
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
    if plan.n_steps < (plan.train.max_steps or 0):
        fabric.print(
            f"the data ends before --train.max_steps {plan.train.max_steps}: more --train.epochs make a longer run"
        )
    if job.method == "ether":
        fabric.print("ETHER starts at a reflection, not at the identity: the first losses are above the base model's")


def compile_blocks(model: GPT) -> None:
    """Compile each block, for batches of any length: as they are alike, the work is that of one."""
    torch._dynamo.config.recompile_limit = 64  # graphs with and without gradients, adapters, a mask, a single row
    for block in model.transformer.h:
        block.compile(dynamic=True)


def check_compiler(device: torch.device) -> None:
    """Raise ValueError unless ``torch.compile`` works on the device: it needs Triton, a C or C++ compiler, headers."""
    try:
        torch.compile(torch.sin)(torch.ones(16, device=device))  # seconds, whose preparations the blocks need too
    except Exception as error:  # whatever is missing: each backend has exceptions of its own
        reason = " ".join(str(error).split("\n\n")[0].split())  # then follow PyTorch's switches for its developers
        raise UserError(
            f"--compile true cannot compile for {device}: {reason}; install what is missing, or use --compile false"
        ) from error


def rehearse(fabric: Fabric, model: nn.Module, batch: tuple[Tensor, Tensor, list[int] | None]) -> None:
    """One discarded forward and backward on the largest batch there can be: a lack of memory shows at once."""
    idx, targets, lengths = batch
    with torch.random.fork_rng(devices=[fabric.device] if fabric.device.type == "cuda" else []):
        model.train()
        fabric.backward(model(idx, lengths=lengths, targets=targets))
    for parameter in model.parameters():
        parameter.grad = None
