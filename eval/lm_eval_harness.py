"""Evaluate a model on the tasks of EleutherAI's lm-evaluation-harness, in process and, if need be, offline.

    python eval/lm_eval_harness.py --checkpoint_dir path/to/model --precision bf16-true \
        --eval_tasks "['arc_challenge', 'truthfulqa_mc', 'hendrycksTest-*']" --save_filepath results.json

    torchrun --nproc-per-node 8 eval/lm_eval_harness.py ...    # a copy of the model, a share of the documents each

Task definitions, metrics and the files of results are the harness's own, and the numbers are those of its Hugging Face
backend; there is no second copy of the weights, and transformers is not needed. ``harness_model.py`` is the model's
side of it, ``tasks.py`` finds tasks and data; ``evaluate`` does the same for a model in memory.

With --save_filepath, answered requests are kept in an SQLite file beside it, by the harness's own cache, until the
results are there: the same command goes on after an interruption. The file's name has a hash of weights and adapter.
"""

import json
import os
import sqlite3
import sys
import time
from collections.abc import Sequence
from contextlib import closing, nullcontext
from glob import escape
from hashlib import sha256
from pathlib import Path
from tempfile import TemporaryDirectory
from types import SimpleNamespace
from typing import Any, Literal

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # runs from any folder

from jsonargparse.typing import NonNegativeInt, PositiveFloat, PositiveInt
from lm_eval import evaluator
from lm_eval.loggers import EvaluationTracker
from lm_eval.utils import handle_non_serializable, make_table

from eval.harness_model import HarnessModel, check_settings, join_processes
from eval.tasks import isolated_harness, load_tasks
from lit_gpt.adapter_files import load_adapted_model, open_adapter
from lit_gpt.checkpoint import check_checkpoint_dir, fingerprint
from lit_gpt.cli import main
from lit_gpt.devices import PRECISIONS
from lit_gpt.errors import Problems, UserError
from lit_gpt.files import LOCK, TEMPORARY, finite, locked, move, refuse_existing
from lit_gpt.generate import evaluation_mode
from lit_gpt.model import GPT
from lit_gpt.quantize import check_quantize
from lit_gpt.tokenizer import Tokenizer

SEEDS = {"random_seed": 0, "numpy_random_seed": 1234, "torch_random_seed": 1234, "fewshot_random_seed": 1234}
"""The harness's own."""


def evaluate(
    model: GPT,
    tokenizer: Tokenizer,
    *,
    tasks: Sequence[str] | dict[str, Any],
    data_dir: Path | str | None = None,
    include_path: Path | str | None = None,
    num_fewshot: NonNegativeInt | None = None,
    limit: PositiveFloat | None = None,
    batch_size: PositiveInt | Literal["auto"] = 8,
    apply_chat_template: bool = False,
    system_instruction: str | None = None,
    gen_kwargs: dict[str, Any] | None = None,
    seed: int | None = None,
    confirm_run_unsafe_code: bool = False,
    use_cache: Path | str | None = None,
    tracker: EvaluationTracker | None = None,
) -> dict[str, Any]:
    """Evaluate a model in memory, which is in evaluation mode meanwhile; global random states are left alone.

    Args:
        model: with or without an adapter.
        tokenizer: the model's.
        tasks: names, or what ``load_tasks`` returned for them.
        data_dir: read data sets from this folder, laid out like the Hub, instead of from the internet.
        include_path: a folder with the .yaml files of tasks of one's own.
        num_fewshot: examples before each question; by default each task's own number.
        limit: evaluate only the first documents of each task, this many, or below 1 this share of them. For trying out.
        batch_size: rows computed at once; auto takes many on a GPU, and fewer where memory ends.
        apply_chat_template: ask in the model's chat format, examples as turns.
        system_instruction: stands before each prompt, with the chat format as the system message.
        gen_kwargs: settings of tasks that generate, such as "{temperature: 0.7, do_sample: true}".
        seed: of what is drawn, few-shot examples and answers; by default the harness's own seeds.
        confirm_run_unsafe_code: allow tasks that run what the model writes, on this machine and without a sandbox.
        use_cache: beginning of the name of a file for answered requests, from which a later call goes on.
        tracker: the harness's, which can write them.

    Returns:
        The harness's results, of plain types: ``results`` (by task, keys like ``acc,none`` and ``acc_stderr,none``) and
        all else; ``requests`` and ``truncated``, counts of this call's, and ``seconds``. Empty in other processes.
    """
    if not isinstance(tasks, dict):
        tasks = load_tasks(tasks, data_dir=data_dir, include_path=include_path, run_code=confirm_run_unsafe_code)
    start = time.perf_counter()
    seeds = SEEDS if seed is None else dict.fromkeys(SEEDS, seed)
    harness = HarnessModel(model, tokenizer, batch_size=batch_size, seed=seeds["torch_random_seed"])
    asked = dict(num_fewshot=num_fewshot, limit=limit, batch_size=batch_size, gen_kwargs=gen_kwargs)
    asked |= dict(system_instruction=system_instruction, evaluation_tracker=tracker, device=str(harness.device))
    asked |= dict(apply_chat_template=apply_chat_template, fewshot_as_multiturn=apply_chat_template)
    asked |= dict(use_cache=use_cache and str(use_cache), confirm_run_unsafe_code=True)  # load_tasks has asked
    loaded = SimpleNamespace(load=lambda names: tasks, task_index=())
    with evaluation_mode(model), isolated_harness():
        results = evaluator.simple_evaluate(harness, tasks=[None], task_manager=loaded, **asked, **seeds)
    counts = harness.gather_object((harness.n_requests, harness.n_truncated))
    if results is None:
        return {}
    results["requests"], results["truncated"] = map(sum, zip(*counts, strict=True))
    results["seconds"] = round(time.perf_counter() - start, 3)
    samples = results.pop("samples")  # many, and of plain types already
    return json.loads(json.dumps(results, default=handle_non_serializable)) | {"samples": samples}


def print_results(results: dict[str, Any]) -> None:
    """Print the harness's tables of tasks, and of groups where there are any."""
    for column in ("results", "groups"):
        if results.get(column):
            print(make_table(results, column))
    print(f"this call: {results['requests']} requests in {results['seconds']:.1f} s")
    if results["truncated"]:
        print(f"{results['truncated']} of them lost their beginning: they are longer than the model's context")


def setup(
    *,
    checkpoint_dir: Path,
    eval_tasks: list[str],
    ether_path: Path | None = None,
    lora_path: Path | None = None,
    strength: float = 1.0,
    precision: Literal[tuple(PRECISIONS)] = "32-true",
    quantize: str | None = None,
    save_filepath: Path | None = None,
    log_samples: bool = False,
    overwrite: bool = False,
    **options,
) -> None:
    """Evaluate a model on tasks of the lm-evaluation-harness; with torchrun on several GPUs.

    Args:
        checkpoint_dir: the model: a folder with lit_model.pth, lit_config.json and a tokenizer.
        eval_tasks: names of tasks or groups, or patterns; old names (truthfulqa_mc, hendrycksTest-*) are understood.
        ether_path: an ETHER, ETHER+ or OFT adapter to evaluate the model with, unmerged.
        lora_path: a LoRA adapter to evaluate the model with, unmerged.
        strength: of the adapter, 0 (the base model) to 1 (all that it learned) and beyond.
        precision: 32-true, bf16-true or 16-true.
        quantize: bnb.nf4, bnb.nf4-dq, bnb.fp4, bnb.fp4-dq or bnb.int8, as the adapter may have been trained.
        save_filepath: write the results to this JSON file.
        log_samples: write each document with its prompts and answers beside it, too, a JSONL file a task.
        overwrite: let it replace files that are there.
    """
    problems = Problems()  # a caller in Python may leave out options that the command line fills in
    problems.attempt(check_settings, options.get("gen_kwargs") or ())
    problems.expect(save_filepath or not log_samples, "--log_samples true: give --save_filepath, too")
    problems.attempt(refuse_existing, [save_filepath] if save_filepath else [], overwrite)
    problems.attempt(check_quantize, quantize, precision)
    problems.attempt(check_checkpoint_dir, checkpoint_dir)
    adapter = problems.attempt(open_adapter, ether_path, lora_path, strength)
    problems.check()
    tokenizer = Tokenizer(checkpoint_dir)
    if options.get("apply_chat_template") and tokenizer.chat_template is None:
        raise UserError(f"--apply_chat_template: the tokenizer of {checkpoint_dir} has no chat template")
    folders = {name: options.get(name) for name in ("data_dir", "include_path")}
    tasks = load_tasks(eval_tasks, **folders, run_code=bool(options.get("confirm_run_unsafe_code")))
    device, tracker = join_processes(), EvaluationTracker()
    writes = save_filepath and os.environ.get("RANK", "0") == "0"
    lock = {"lock": f"{LOCK}-{save_filepath.name}", "option": "--save_filepath"} if writes else {}
    with locked(save_filepath.parent, **lock) if writes else nullcontext():
        model = load_adapted_model(checkpoint_dir, precision, quantize=quantize, device=device, adapter=adapter)
        adapted = adapter and {"path": str(adapter.path), "kind": adapter.kind, **vars(adapter.config)}
        model_args = {"pretrained": str(checkpoint_dir.resolve()), "precision": precision, "quantize": quantize}
        model_args |= {"strength": strength, "tokenizer_sha256": tokenizer.sha256, "adapter": adapted}
        model_args["fingerprint"] = fingerprint(model.state_dict())
        # Beside the model, wherever its folder is, a seed decides answers that are drawn.
        also = {"pretrained": None, "config": vars(model.config), "device": device.type, "seed": options.get("seed")}
        cache = save_filepath and unfinished(save_filepath, model_args | also)
        if results := evaluate(model, tokenizer, tasks=tasks, use_cache=cache, tracker=tracker, **options):
            results["config"]["model_args"] = model_args
            used, limit = f"{adapter.path}, --strength {strength:g}" if adapter else "no adapter", options.get("limit")
            print(f"{checkpoint_dir}, {used}, {precision}" + (f", --limit {limit:g}" if limit else ""))
            print_results(results)
            if save_filepath:
                save_results(save_filepath, results, tracker, log_samples)


def unfinished(save_filepath: Path, model: dict[str, Any]) -> Path | None:
    """Return the beginning of the name of the file for answers, this model's alone; None where there can't be one."""
    key = sha256(json.dumps(model, default=str).encode()).hexdigest()[:16]
    cache = save_filepath.with_name(f"{save_filepath.name}.{key}")
    rank = os.environ.get("RANK", "0")
    own = Path(f"{cache}_rank{rank}.db")  # another process may have begun to write its own
    if rank == "0" and own.exists() and own.stat().st_size:
        print("going on from the answers of a call that was interrupted")
    cache.parent.mkdir(parents=True, exist_ok=True)
    try:
        with closing(sqlite3.connect(own)) as file:
            file.execute("BEGIN EXCLUSIVE")
    except sqlite3.Error as error:  # a file system without locks
        print(f"note: answers are not kept for an interruption, SQLite can't write there: {error}", file=sys.stderr)
        return None
    return cache


def save_results(file: Path, results: dict[str, Any], tracker: EvaluationTracker, log_samples: bool) -> None:
    """Let the harness write the results, and each task's samples beside them; the answers of unfinished calls go."""
    samples = results.pop("samples")
    # Not ``staged_dir``: calls with other results may write into this folder at the same time.
    with TemporaryDirectory(dir=file.parent, prefix=TEMPORARY) as folder:
        tracker.output_path = f"{folder}/results.json"
        tracker.save_results_aggregated(finite(results), samples)
        for task in samples if log_samples else ():
            tracker.save_results_samples(f"{task}_{file.stem}", samples[task])  # a name for the file
        written = sorted(Path(folder).iterdir(), reverse=True)  # the results come last: who sees them has all
        if len(written) != 1 + log_samples * len(samples):  # the harness goes on without what it cannot write
            raise OSError(f"the results could not be written to {file.parent}: is there room?")
        for path in written:
            move(path, file if path.name.startswith("results_") else file.parent / path.name)
    for left in file.parent.glob(f"{escape(file.name)}.*_rank*.db"):
        left.unlink()
    print(f"Saved to {file}" + (f", and {len(samples)} files of samples beside it" if log_samples else ""))


if __name__ == "__main__":
    main(setup)
