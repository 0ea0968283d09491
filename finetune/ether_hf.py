"""Finetune any causal model of transformers with ETHER or ETHER+, through PEFT and transformers' own Trainer.

    python scripts/prepare_json.py --data_file_path rows.json --checkpoint_dir path/to/hf_model \\
        --destination_path data --max_seq_length 512
    python finetune/ether_hf.py --checkpoint_dir path/to/hf_model --train_data_dir data --out_dir path/to/adapter \\
        --Htype etherplusHH --ether_nb 4 --learning_rate 5e-3

For the models that no class of ours holds. Rows, their order, loss, schedule and defaults are those of
finetune/ether.py, so a model that both hold takes the same steps in both; what a run records and where it can go on
are the Trainer's. The folder it writes loads in PEFT after ``import lit_gpt.peft_ether``.
"""

import math
import sys
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch.optim.lr_scheduler import LambdaLR

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # runs from any folder

from lit_gpt.batches import collate, sample_order
from lit_gpt.cli import main
from lit_gpt.data import TRAIN_FILE, Sample, load_split
from lit_gpt.errors import UserError
from lit_gpt.files import prepare_out_dir
from lit_gpt.loss import IGNORE_INDEX
from lit_gpt.settings import TrainArgs
from lit_gpt.train import learning_rate as rate


def setup(
    *,
    checkpoint_dir: str,
    train_data_dir: Path,
    out_dir: Path,
    Htype: str = "ether",
    ether_nb: int = 1,
    target_modules: str | list[str] | None = None,
    learning_rate: float = TrainArgs.learning_rate,
    global_batch_size: int = TrainArgs.global_batch_size,
    micro_batch_size: int = TrainArgs.micro_batch_size,
    epochs: int = TrainArgs.epochs,
    max_steps: int | None = None,
    activation_checkpointing: bool = False,
    dtype: str = "bfloat16",
    seed: int = 1337,
    resume: bool = False,
) -> None:
    """Finetune any causal model of transformers with ETHER or ETHER+.

    Args:
        checkpoint_dir: a Hugging Face folder or a repo id.
        train_data_dir: a folder that a prepare script wrote with this model's tokenizer.
        out_dir: the PEFT folder to write; the Trainer's checkpoints go in there, too.
        Htype: ether, etherplus (one-sided) or etherplusHH (two-sided, the paper's ETHER+).
        ether_nb: number of diagonal blocks, n.
        target_modules: names of the Linears to adapt, or all-linear; by default the query and value projections.
        learning_rate: peak rate, reached after a tenth of the steps (at most 1000); then a cosine to zero.
        global_batch_size: samples of an optimizer step, of all processes.
        micro_batch_size: samples of one forward and backward pass.
        epochs: how often to go through the data.
        max_steps: stop after this many optimizer steps; the schedule ends there too.
        activation_checkpointing: compute activations again in the backward pass.
        dtype: of the base model (bfloat16, float32, or auto: its files'); the adapter's vectors are fp32 in any case.
        seed: of the rows' order and the adapter's start.
        resume: go on from the last checkpoint in out_dir where there is one.
    """
    import transformers

    out_dir = prepare_out_dir(out_dir, resume, names=["adapter_config.json"])
    samples = load_split(train_data_dir / TRAIN_FILE)
    n_samples = min(epochs * len(samples), (max_steps or math.inf) * global_batch_size)
    n_steps = math.ceil(n_samples / global_batch_size)
    more = {"gradient_checkpointing": True} if activation_checkpointing else {}  # newer versions warn of the name
    args = transformers.TrainingArguments(  # the rows are in our order already
        str(out_dir), max_steps=n_steps, seed=seed, per_device_train_batch_size=micro_batch_size, logging_steps=1,
        report_to=[], remove_unused_columns=False, train_sampling_strategy="sequential", max_grad_norm=0.0, **more
    )  # fmt: skip
    args.gradient_accumulation_steps, left = divmod(global_batch_size, micro_batch_size * args.world_size)
    if left or not args.gradient_accumulation_steps:
        raise UserError(f"--global_batch_size {global_batch_size} is no multiple of all processes' micro batches")
    transformers.set_seed(seed)
    model = adapted_model(checkpoint_dir, dtype, samples, method=Htype, n=ether_nb, target_modules=target_modules)
    rows = [samples[i] for i in sample_order(len(samples), n_samples, seed=seed)]
    trainer = transformers.Trainer(model, args, batch, rows, optimizers=optimizers(model, learning_rate, n_steps))
    trainer.train(resume_from_checkpoint=resume and any(out_dir.glob("checkpoint-*")))
    trainer.save_model()
    if trainer.is_world_process_zero():
        load = f"AutoPeftModelForCausalLM.from_pretrained({str(out_dir)!r})"
        print(f"adapter: {out_dir}\nPEFT, after import lit_gpt.peft_ether: {load}; its merge_and_unload() merges")


def optimizers(model: Any, learning_rate: float, n_steps: int) -> tuple[torch.optim.Optimizer, LambdaLR]:
    """Return AdamW over what trains, and the schedule of its rate: that of finetune/ether.py."""
    trained = (parameter for parameter in model.parameters() if parameter.requires_grad)
    optimizer = torch.optim.AdamW(trained, lr=learning_rate, weight_decay=0.0)
    steps = {"peak": 1.0, "n_warmup": min(1000, n_steps // 10), "n_steps": n_steps}
    return optimizer, LambdaLR(optimizer, lambda step: rate(step, **steps))


def adapted_model(checkpoint_dir: str, dtype: str, samples: list[Sample], **settings: Any) -> Any:
    """Return the base with a new adapter on; raise UserError where the data or the targets are not the model's."""
    import peft
    import transformers

    from lit_gpt.peft_ether import EtherPeftConfig

    config = EtherPeftConfig(**settings, task_type="CAUSAL_LM")
    model = transformers.AutoModelForCausalLM.from_pretrained(checkpoint_dir, dtype=dtype)
    largest, known = max(int(s["input_ids"].max()) for s in samples), model.get_input_embeddings().num_embeddings
    if largest >= known:
        raise UserError(f"the data holds token {largest}, {checkpoint_dir} has {known}: prepare it with this model")
    try:
        return peft.get_peft_model(model, config)
    except ValueError as error:  # whatever PEFT has to say of the targets
        raise UserError(f"--target_modules {config.target_modules}: {error}") from error


def batch(samples: list[Sample]) -> dict[str, torch.Tensor]:
    """Return ids and labels, (B, T) each; the model shifts labels by itself, our targets are shifted already."""
    idx, targets = collate(samples)
    return {"input_ids": idx, "labels": F.pad(targets[:, :-1], (1, 0), value=IGNORE_INDEX)}


if __name__ == "__main__":
    main(setup)
