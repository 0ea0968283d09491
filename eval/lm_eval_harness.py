"""Evaluate a model on the tasks of EleutherAI's lm-evaluation-harness, in process and, if need be, offline.

    python eval/lm_eval_harness.py --checkpoint_dir path/to/model --precision bf16-true \
        --eval_tasks "['arc_challenge', 'truthfulqa_mc', 'hendrycksTest-*']" --save_filepath results.json

Task definitions and metrics are the harness's own, and the numbers are those of its Hugging Face backend; there is no
second copy of the weights, and transformers is not needed. ``harness_model.py`` is the model's side of it, ``tasks.py``
finds tasks and data; ``evaluate`` does the same for a model in memory.
"""

import json
import sys
import time
from collections.abc import Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # runs from any folder

import lm_eval
import torch
from lm_eval import evaluator
from lm_eval.utils import make_table

from eval.harness_model import HarnessModel
from eval.tasks import isolated_harness, load_tasks
from lit_gpt.adapter_files import load_adapted_model, open_adapter
from lit_gpt.checkpoint import check_checkpoint_dir
from lit_gpt.cli import main
from lit_gpt.devices import choose_device, weights_dtype
from lit_gpt.errors import Problems, UserError
from lit_gpt.files import settled, write_json
from lit_gpt.generate import evaluation_mode
from lit_gpt.model import GPT
from lit_gpt.quantize import check_quantize
from lit_gpt.tokenizer import Tokenizer


def evaluate(
    model: GPT,
    tokenizer: Tokenizer,
    *,
    tasks: Sequence[str] | dict[str, Any],
    data_dir: Path | str | None = None,
    include_path: Path | str | None = None,
    num_fewshot: int | None = None,
    limit: float | None = None,
    batch_size: int = 8,
    apply_chat_template: bool = False,
    confirm_run_unsafe_code: bool = False,
) -> dict[str, Any]:
    """Evaluate a model in memory; ``setup`` documents the arguments.

    The model is in evaluation mode meanwhile, and as it was afterwards; global random states are left alone.

    Args:
        model: with or without an adapter.
        tokenizer: the model's.
        tasks: names, or what ``load_tasks`` returned for them.

    Returns:
        The harness's ``results`` (by task, keys like ``acc,none`` and ``acc_stderr,none``), ``groups``, ``versions``,
        ``n-shot``, ``n-samples`` and so on, with ``requests`` and ``seconds`` added; plain types alone.
    """
    if not isinstance(tasks, dict):
        folders = {"data_dir": data_dir, "include_path": include_path}
        tasks = load_tasks(tasks, **folders, num_fewshot=num_fewshot, run_code=confirm_run_unsafe_code)
    start = time.perf_counter()
    harness = HarnessModel(model, tokenizer, batch_size=batch_size)
    with evaluation_mode(model), isolated_harness():
        options = {"apply_chat_template": apply_chat_template, "fewshot_as_multiturn": apply_chat_template}
        options |= {"confirm_run_unsafe_code": True}  # load_tasks has asked
        results = evaluator.evaluate(harness, tasks, limit=limit, log_samples=False, **options)
    results.pop("configs")  # holds functions; name and version say the same
    results |= {"requests": harness.n_requests, "seconds": round(time.perf_counter() - start, 3)}
    return json.loads(json.dumps(results, default=lambda value: value.item()))  # NumPy's numbers to Python's


def print_results(results: dict[str, Any]) -> None:
    """Print the harness's tables of tasks, and of groups where there are any; no standard errors of few documents."""
    for column in ("results", "groups"):
        shown = {
            task: {key: value for key, value in values.items() if "_stderr" not in key or values["sample_len"] >= 30}
            for task, values in results.get(column, {}).items()
        }
        if shown:
            print(make_table({**results, column: shown}, column))
    print(f"{results['requests']} requests in {results['seconds']:.1f} s")


def setup(
    *,
    checkpoint_dir: Path,
    eval_tasks: list[str],
    ether_path: Path | None = None,
    lora_path: Path | None = None,
    precision: str = "32-true",
    quantize: str | None = None,
    save_filepath: Path | None = None,
    overwrite: bool = False,
    num_fewshot: int | None = None,
    limit: float | None = None,
    batch_size: int = 8,
    data_dir: Path | None = None,
    include_path: Path | None = None,
    apply_chat_template: bool = False,
    confirm_run_unsafe_code: bool = False,
) -> None:
    """Evaluate a model on tasks of the lm-evaluation-harness.

    Args:
        checkpoint_dir: the model: a folder with lit_model.pth, lit_config.json and a tokenizer.
        eval_tasks: names of tasks or groups, or patterns; old names (truthfulqa_mc, hendrycksTest-*) are understood.
        ether_path: an ETHER, ETHER+ or OFT adapter to evaluate the model with, unmerged.
        lora_path: a LoRA adapter to evaluate the model with, unmerged.
        precision: 32-true, bf16-true or 16-true.
        quantize: bnb.nf4, bnb.nf4-dq, bnb.fp4, bnb.fp4-dq or bnb.int8, as the adapter may have been trained.
        save_filepath: write the results to this JSON file.
        overwrite: let it replace a file that is there.
        num_fewshot: examples before each question; by default each task's own number.
        limit: evaluate only the first so many documents of each task, or below 1 this share of them. For trying out.
        batch_size: rows computed at once.
        data_dir: read data sets from this folder, laid out like the Hub, instead of from the internet.
        include_path: a folder with the .yaml files of tasks of one's own.
        apply_chat_template: ask in the model's chat format, examples as turns.
        confirm_run_unsafe_code: allow tasks that run what the model writes, on this machine and without a sandbox.
    """
    problems = Problems()
    problems.expect(limit is None or limit > 0, f"--limit {limit}: expected a number of documents or a share below 1")
    problems.expect(num_fewshot is None or num_fewshot >= 0, f"--num_fewshot {num_fewshot}: expected 0 or more")
    problems.expect(batch_size >= 1, f"--batch_size {batch_size}: expected 1 or more")
    problems.attempt(check_results_path, save_filepath, overwrite)
    problems.attempt(weights_dtype, precision)
    problems.attempt(check_quantize, quantize, precision)
    problems.attempt(check_checkpoint_dir, checkpoint_dir)
    adapter = problems.attempt(open_adapter, ether_path, lora_path)
    problems.check()
    tokenizer = Tokenizer(checkpoint_dir)
    if apply_chat_template and tokenizer.chat_template is None:
        raise UserError(f"--apply_chat_template: the tokenizer of {checkpoint_dir} has no chat template")
    folders = {"data_dir": data_dir, "include_path": include_path}
    tasks = load_tasks(eval_tasks, **folders, num_fewshot=num_fewshot, run_code=confirm_run_unsafe_code)
    device = choose_device()
    model = load_adapted_model(checkpoint_dir, precision, quantize=quantize, device=device, adapter=adapter)
    options = {"limit": limit, "batch_size": batch_size, "apply_chat_template": apply_chat_template}
    results = evaluate(model, tokenizer, tasks=tasks, **options)
    adapted = f"with {adapter.path}" if adapter else "no adapter"
    print(f"{checkpoint_dir}, {adapted}" + (f", --limit {limit:g}" if limit else ""))
    print_results(results)
    if save_filepath is not None:
        settings = {"checkpoint_dir": checkpoint_dir, "adapter": adapter and adapter.path, **folders}
        settings |= {"precision": precision, "quantize": quantize, "eval_tasks": eval_tasks, "num_fewshot": num_fewshot}
        save_results(save_filepath, results, {**settings, **options, "device": str(device)})


def save_results(file: Path, results: dict[str, Any], settings: dict[str, Any]) -> None:
    """Write the results as JSON, with the settings that they come from (paths absolute), versions and date."""
    config = {name: str(value.resolve()) if isinstance(value, Path) else value for name, value in settings.items()}
    config |= {"lm_eval_version": lm_eval.__version__, "torch_version": torch.__version__}
    config |= {"date": datetime.now(timezone.utc).isoformat(timespec="seconds")}
    write_json(file, {**results, "config": config})
    print(f"Saved to {file}")


def check_results_path(save_filepath: Path | None, overwrite: bool) -> None:
    """Raise ValueError where the results can't be saved there."""
    path = save_filepath and settled(save_filepath)
    if path and path.is_dir():
        raise UserError(f"--save_filepath {path} is a folder: expected a file name")
    if path and path.exists() and not overwrite:
        raise UserError(f"{path} exists; choose another --save_filepath or give --overwrite true")


if __name__ == "__main__":
    main(setup)
