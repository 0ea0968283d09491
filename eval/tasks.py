"""Find and load the harness's tasks: by their names, old and new, with data sets from the Hub or a folder.

Knows nothing of models. Notable choices:
- Names of the harness's first versions, which papers still print, stand for their successors.
- A data folder is laid out like the Hub (``DIR/allenai/ai2_arc``), so `hf download` makes one; tasks and groups are
  loaded by the harness itself, and only the place that it reads a data set from changes.
- Indexing all 15,000 tasks takes the harness ten seconds. The tasks of the paper are looked up alone first.
"""

import difflib
import fnmatch
import hashlib
import logging
import os
import random
import shlex
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import datasets
import lm_eval.api.model
import lm_eval.api.task
import lm_eval.evaluator
import lm_eval.tasks
import numpy as np
import torch
from lm_eval.defaults import DEFAULT_OTHER_SEED, DEFAULT_RANDOM_SEED
from lm_eval.loggers.utils import get_commit_from_path
from lm_eval.tasks import TaskManager
from lm_eval.tasks._factory import TaskFactory
from lm_eval.tasks._index import Entry
from lm_eval.tasks._yaml_loader import load_yaml

from lit_gpt.cli import one_line
from lit_gpt.errors import UserError

COMMON_FOLDERS = ("arc", "truthfulqa", "mmlu/default")
"""Folders of the harness that hold the tasks of the paper."""
OLD_NAMES = {"truthfulqa_mc": ["truthfulqa_mc1", "truthfulqa_mc2"]}
OLD_NAMES |= {name: ["mmlu"] for name in ("hendrycksTest", "hendrycksTest*", "hendrycksTest-*")}
OLD_MMLU = "hendrycksTest-"
VERSIONS = {"lm_eval_version": lm_eval.__version__, "torch_version": torch.__version__}
REPLACED = (
    (lm_eval.api.task, "tqdm", lambda items, **options: items),  # a bar for each task
    (lm_eval.api.model, "tqdm", lambda items, **options: items),  # that counts tokenizing
    (lm_eval.evaluator, "add_env_info", lambda results: results.update(VERSIONS)),  # runs pip, for seconds
    # Of this code: the harness asks git for that of the current folder, and git complains where that is no repository.
    (lm_eval.evaluator, "get_git_commit_hash", partial(get_commit_from_path, Path(__file__).resolve().parents[1])),
)
"""Parts of the harness that are others meanwhile: module, name, value."""


def load_tasks(
    names: Sequence[str],
    *,
    data_dir: Path | str | None = None,
    include_path: Path | str | None = None,
    run_code: bool = False,
) -> dict:
    """Load tasks and their data.

    Args:
        names: tasks, groups, tags, or patterns with ``*``, by their names of today or of old.
        data_dir: read data sets from this folder instead of the Hub.
        include_path: a folder with tasks of one's own, which come before the harness's of the same name.
        run_code: load tasks that run what the model writes, too.

    Returns:
        What the harness's ``TaskManager.load`` returns: ``tasks`` and ``groups`` by name.

    Raises:
        ValueError: names that match nothing, with the nearest that exist; no names; data that is not there, with the
            command that gets it, or doesn't fit the task; a task that can't be loaded, or that runs code unasked.
    """
    if include_path is not None:
        check_own_tasks(Path(include_path))
    if run_code:
        os.environ["HF_ALLOW_CODE_EVAL"] = "1"  # what the metric of tasks that run code asks for
    with isolated_harness(data_dir):
        manager, resolved = resolve_names(names, include_path)
        manager._factory = Factory(run_code)
        return manager.load(resolved)


class Factory(TaskFactory):
    """The harness's, with errors that name the task, and that come before a task's own code is imported."""

    def __init__(self, run_code: bool) -> None:
        super().__init__()
        self.run_code = run_code

    def _build_task(self, entry: Entry, overrides: dict[str, Any] | None) -> Any:
        described = load_yaml(entry.yaml_path, resolve_func=False) if entry.yaml_path else {}
        if described.get("unsafe_code") and not self.run_code:
            raise UserError(
                f"task {entry.name} runs the code that the model writes, on this machine: give "
                "--confirm_run_unsafe_code true where that may happen, or leave the task out"
            )
        try:
            return super()._build_task(entry, overrides)
        except Exception as error:  # tasks are code of others, which raises anything for want of a package or a file
            raise UserError(f"task {entry.name} can't be loaded: {one_line(error)}") from error


def check_own_tasks(folder: Path) -> None:
    """Raise UserError where a folder has no tasks, or files that can't be read: the harness skips those silently."""
    files = sorted(folder.rglob("*.yaml"))
    if not files:
        raise UserError(f"--include_path {folder}: expected a folder with the .yaml files of tasks")
    for file in files:
        try:
            load_yaml(file, resolve_func=False)
        except Exception as error:  # YAML's own, and whatever its includes raise
            raise UserError(f"{file} is not a task: {one_line(error)}") from error


@lru_cache
def task_manager(*, every_task: bool, include_path: Path | str | None = None) -> TaskManager:
    """Return the harness's index of its tasks, or of the common ones alone, and of those in a folder of one's own."""
    root = Path(lm_eval.tasks.__file__).parent
    folders = [] if every_task else [root / folder for folder in COMMON_FOLDERS]
    return TaskManager(include_defaults=every_task, include_path=[*folders, *([include_path] if include_path else [])])


def resolve_names(names: Sequence[str], include_path: Path | str | None = None) -> tuple[TaskManager, list[str]]:
    """Turn names of old and patterns into names that the returned manager can load; each once, in order."""
    wanted = [modern for name in names for modern in modern_names(name)]
    index = task_manager if include_path is None else task_manager.__wrapped__  # a folder of one's own may change
    manager = index(every_task=False, include_path=include_path)
    if not all(name in manager.task_index for name in wanted):
        manager = index(every_task=True, include_path=include_path)
    resolved, problems = [], []
    for name in wanted:
        # A pattern means tasks; groups and tags, which hold the same tasks again, only where no task matches.
        found = fnmatch.filter(manager.all_subtasks, name) or fnmatch.filter(manager.all_tasks, name)
        if not found:
            near = difflib.get_close_matches(name, manager.all_tasks, n=3)
            problems.append(f"no task matches {name!r}" + (f"; the nearest: {', '.join(near)}" if near else ""))
        resolved += found
    if problems:
        raise UserError("; ".join(problems) + " (`lm-eval ls tasks` lists all)")
    if not resolved:
        raise UserError("no tasks to evaluate: give --eval_tasks \"['arc_challenge', 'truthfulqa_mc']\"")
    return manager, list(dict.fromkeys(resolved))


def modern_names(name: str) -> list[str]:
    """Return what a name of the harness's first versions is called today; other names stay."""
    if name in OLD_NAMES or not name.startswith(OLD_MMLU):
        return OLD_NAMES.get(name, [name])
    subject = "mmlu_" + name.removeprefix(OLD_MMLU)
    return fnmatch.filter(task_manager(every_task=False).all_subtasks, subject) or [subject]


class Splits(datasets.DatasetDict):
    """The splits of a data set, with an error that names the source where one is missing."""

    source: str

    def __missing__(self, split: str) -> Any:
        raise UserError(f"{self.source} has no split {split!r}, which the task needs; it has {', '.join(self)}")


def load_data_set(
    original: Callable, data_dir: Path | str | None, path: str, name: str | None = None, **options: Any
) -> Any:
    """Load a data set of the Hub from a folder; without one, only explain what can't be reached.

    Args:
        original: `datasets.load_dataset`, which this function takes the place of.
        data_dir: the folder.
        path: the data set's name on the Hub; a folder, or a file format, is read as ever.
        name: its configuration.
        options: the other arguments of `datasets.load_dataset`.
    """
    if "data_files" in options or Path(path).is_dir():
        return original(path, name, **options)
    folder = Path("DIR" if data_dir is None else data_dir) / path
    command = f"hf download {path} --repo-type dataset --local-dir {shlex.quote(str(folder))}"
    source = path
    if data_dir is not None:
        if not folder.is_dir():
            raise FileNotFoundError(f"data set folder {folder} is missing; where there is internet: `{command}`")
        source, options["cache_dir"] = str(folder), cache_of(folder)
        copy = folder / (name or "default")
        if copy.is_dir() and not (folder / "README.md").is_file():  # the Hub's own parquet copy names nothing
            source, name = str(copy), None
    what = f"data set {source}{f' ({name})' if name else ''}"
    try:
        found = original(source, name, **options)
    except (OSError, ValueError, RuntimeError, datasets.exceptions.DatasetsError) as error:
        if any(sign in str(error) for sign in ("ataset script", "trust_remote_code")):
            command += " --revision refs/convert/parquet"  # the Hub's copy of data that a script makes
        reason = one_line(error.__cause__ or error)  # `datasets` often says only that there was an error
        advice = f"get it where there is internet, into an empty folder for --data_dir: `{command}`"
        raise UserError(f"{what} can't be read: {reason}; {advice}") from error
    if isinstance(found, datasets.DatasetDict):
        found = Splits(found)
        found.source = what
    return found


def cache_of(folder: Path) -> str:
    """Return a cache for what a folder holds now.

    `datasets` tells local folders apart by the text of their README alone, and would serve the rows of another copy,
    or of an older state of this one.
    """
    files = [(str(path), path.stat()) for path in sorted(folder.resolve().rglob("*")) if path.is_file()]
    key = repr([(name, stat.st_size, stat.st_mtime_ns) for name, stat in files])
    return str(Path(datasets.config.HF_DATASETS_CACHE) / f"folder-{hashlib.sha256(key.encode()).hexdigest()[:16]}")


@contextmanager
def isolated_harness(data_dir: Path | str | None = None) -> Iterator[None]:
    """Let the harness and the libraries under it print errors alone, and leave no trace in global random states.

    They are seeded as the harness does it, since some tasks shuffle. Data sets come from ``data_dir``. The bars of
    `datasets` stay off.
    """
    with ExitStack() as undo, torch.random.fork_rng():
        undo.callback(random.setstate, random.getstate())
        undo.callback(np.random.set_state, np.random.get_state())
        undo.callback(logging.disable, logging.root.manager.disable)
        data_sets = (datasets, "load_dataset", partial(load_data_set, datasets.load_dataset, data_dir))
        for module, name, value in (*REPLACED, data_sets):
            undo.callback(setattr, module, name, getattr(module, name))
            setattr(module, name, value)
        random.seed(DEFAULT_RANDOM_SEED)
        np.random.seed(DEFAULT_OTHER_SEED)
        torch.manual_seed(DEFAULT_OTHER_SEED)
        logging.disable(logging.WARNING)
        datasets.disable_progress_bars()
        yield
