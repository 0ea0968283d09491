"""What a run is for: the adapter file or, of full finetuning, the folder final/; written, read back, and used next."""

from pathlib import Path

import torch

from lit_gpt.adapter import adapter_parameters
from lit_gpt.adapter_files import KINDS, load_adapter, save_adapter
from lit_gpt.checkpoint import WEIGHTS, copy_side_files, load_state, save_prompt_style, save_state
from lit_gpt.errors import command
from lit_gpt.files import staged_dir
from lit_gpt.model import GPT
from lit_gpt.plan import Job, Plan
from lit_gpt.resume import FINAL
from lit_gpt.tokenizer import list_answer_end


def save_result(model: GPT, folder: Path, *, job: Job, plan: Plan) -> int:
    """Write what was trained so far into a folder; returns its bytes."""
    style = plan.data["prompt_style"]
    if job.adapter is not None:
        path = folder / KINDS[job.kind].file_name
        save_adapter(path, model, kind=job.kind, config=job.adapter, base=plan.base, prompt_style=style)
        return path.stat().st_size
    with staged_dir(folder / FINAL, overwrite=True) as staging:
        copy_side_files(plan.base_dir, staging)
        save_prompt_style(staging, style)
        list_answer_end(staging, style)
        save_state(model.state_dict(), staging / WEIGHTS)
    return (folder / FINAL / WEIGHTS).stat().st_size


@torch.no_grad()
def load_result(model: GPT, folder: Path, *, job: Job) -> None:
    """Put what ``save_result`` wrote, of the same job, back into the model."""
    if job.adapter is None:
        model.load_state_dict(load_state(folder / FINAL / WEIGHTS))
        return
    saved = load_adapter(folder / KINDS[job.kind].file_name, job.kind).state
    for name, parameter in adapter_parameters(model).items():
        parameter.copy_(saved[name])


def next_command(job: Job, plan: Plan) -> str:
    """What to type when a run has ended."""
    if job.adapter is None:
        return command("chat/base.py", checkpoint_dir=plan.run_dir / FINAL)
    path = plan.run_dir / KINDS[job.kind].file_name
    flags = {"checkpoint_dir": plan.base_dir, f"{job.kind}_path": path}
    return command(f"scripts/merge_{job.kind}.py", **flags)
