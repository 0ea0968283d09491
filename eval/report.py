r"""Compare finetuned models: the paper's table, what they forgot, and learning against forgetting over the strength.

    python eval/report.py --out_dir reports/alpaca --checkpoint_dir checkpoints/ORG/NAME \
        --models "{untuned: checkpoints/ORG/NAME, ETHER+: logs/RUN/lit_model_ether_finetuned.pth}" \
        --eval_tasks "['hendrycksTest-*', 'arc_challenge', 'truthfulqa_mc']" --text "[unseen.txt]"

- A *measurement* is one model, at one strength, on one task, on the texts or on held-out rows. The name of its file
  under results/ has a hash of all that decides it: the same command, given again, measures what is missing or changed.
- A measurement that fails is listed. The others go on, and the script fails at the end.
- Losses on samples are compared with the first model's by a paired bootstrap: each draw takes the same samples of both.
"""

import json
import math
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from hashlib import sha256
from pathlib import Path
from typing import Any, Literal
from urllib.parse import quote

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # runs from any folder

import numpy as np
import torch
from jsonargparse.typing import NonNegativeInt, PositiveFloat, PositiveInt

from eval import lm_eval_harness
from eval.costs import table
from eval.tasks import resolve_names
from lit_gpt.adapter_files import check_base, load_adapted_model, load_adapter, open_adapter, set_strength
from lit_gpt.batches import Batching, n_targets
from lit_gpt.checkpoint import CONFIG, WEIGHTS, check_checkpoint_dir, fingerprint, load_state
from lit_gpt.cli import main, one_line
from lit_gpt.data import TEST_FILE, Sample, check_fit, load_split, read_data_config
from lit_gpt.devices import PRECISIONS, choose_device
from lit_gpt.errors import Problems, UserError, command, reading
from lit_gpt.files import file_sha256, locked, remove_leftovers, write_json, write_text
from lit_gpt.loss import IGNORE_INDEX
from lit_gpt.model import GPT
from lit_gpt.plots import compare_runs
from lit_gpt.tokenizer import Tokenizer

TASKS = {"mmlu": ("MMLU", 0.25), "arc_challenge": ("ARC", 0.2502)}
TASKS |= {"truthfulqa_mc1": ("TruthfulQA-1", 0.2261), "truthfulqa_mc2": ("TruthfulQA-2", 0.4484)}
"""The paper's tasks: their columns, and what equally likely answers get, computed from the whole data sets."""
TEXT, HELD_OUT = "text", "held-out rows"
DRAWS = 2000
MOST = 700
"""Nats a token beyond which a perplexity is no number of a computer's any more: it is cut there."""
NOTES = """Accuracies in %, ± standard error: of other questions, not of another run. ARC is `acc`. A change is the loss
minus the first model's in nats per token, with a 95% interval; above 0 is worse."""
Found = dict[str, Any]
"""A measurement as its file holds it, or, by column, the numbers that it gives.

A number has a ``value``, and how it is ``shown``; an accuracy its standard ``error``, a change ``low`` and ``high``.
"""


@dataclass
class Line:
    """A model at a strength, a line of the table.

    Attributes:
        model, strength: its name in --models, and the strength of its adapter.
        flags: those of eval/lm_eval_harness.py that name it: its folder, or its base's and the adapter.
        weights: tells the folder's model and the adapter from others.
        numbers: by column.
    """

    model: str
    strength: float
    flags: dict[str, Any]
    weights: str
    numbers: Found = field(default_factory=dict)

    @property
    def label(self) -> str:
        """Return the name, with the strength where it is not 1."""
        return self.model + f" x {self.strength:g}" * (self.strength != 1)


def open_model(name: str, path: Path, *, base: Path | None, strengths: Sequence[float]) -> list[Line]:
    """Return the line of a model, and one for each other strength that its adapter can have.

    Raises:
        UserError, OSError: it is no model, or an adapter of another base.
    """
    adapter = None if path.is_dir() else load_adapter(path)
    folder = base if adapter else path
    if folder is None:
        raise UserError(f"{path} is an adapter: give the folder of its base model with --checkpoint_dir")
    flags = {"checkpoint_dir": check_checkpoint_dir(folder)}
    weights = f"{fingerprint(load_state(folder / WEIGHTS))} {file_sha256(folder / CONFIG)}"
    if adapter is None:
        return [Line(name, 1.0, flags, weights)]
    check_base(adapter, folder)
    flags, weights = flags | {f"{adapter.kind}_path": path}, f"{weights} {fingerprint(adapter.state)} {adapter.config}"
    count = sum(tensor.numel() for tensor in adapter.state.values())
    trained = {"value": count, "shown": f"{count:,}"}
    others = () if getattr(adapter.config, "Htype", None) == "ether" else strengths  # a reflection stays one
    for strength in others:
        set_strength(adapter, strength)  # refuses what is no number
    chosen = {s: flags | {"strength": s} for s in (1.0, *others)}
    return [Line(name, s, given, f"{weights} {s}", {"trained": trained}) for s, given in chosen.items()]


# ---------------------------------------------------------------------------------------------------- measurements
@torch.no_grad()
def on_samples(
    source: list[str] | Path, *, checkpoint_dir: Path, precision: str, batch_size: int, save_filepath: Path, **adapter
) -> None:
    """Write the summed loss of each sample's targets and their number to a file, shortest sample first.

    Args:
        source: texts, or a folder of prepared data, whose held-out rows are meant.
        checkpoint_dir, precision, batch_size, save_filepath, adapter: flags as of eval/lm_eval_harness.py.
    """
    device, batching, losses, counts = choose_device(), Batching(batch_size), [], []
    gpt = load_adapted_model(checkpoint_dir, precision, adapter=open_adapter(**adapter), device=device)
    # A row may have been cut before its response.
    samples = [each for each in make_samples(source, gpt, Tokenizer(checkpoint_dir)) if n_targets([each])]
    for batch in batching.cut(samples):
        idx, targets, _ = batching.collate(batch, device)
        sizes = [n_targets([sample]) for sample in batch]
        parts = gpt(idx, targets=targets, reduction="none").split(sizes)
        losses += [part.double().sum().item() for part in parts]
        counts += sizes
    if not (samples and math.isfinite(sum(losses))):
        raise UserError("the loss is not finite" if samples else "there is no token to predict")
    write_json(save_filepath, {"losses": losses, "tokens": counts})


def make_samples(source: list[str] | Path, gpt: GPT, tokenizer: Tokenizer) -> list[Sample]:
    """Return the held-out rows of prepared data, with the tokens of their responses as targets, or texts as samples.

    Texts stand behind BOS, or EOS where there is no BOS, and are cut at the context.
    """
    if isinstance(source, Path):
        samples = load_split(source / TEST_FILE)
        check_fit(tokenizer.dir, gpt.config, data=read_data_config(source), samples=samples)
        return [s | {"labels": torch.where(s["response"], s["input_ids"], IGNORE_INDEX)} for s in samples]
    first = [token for token in (tokenizer.bos_id, tokenizer.eos_id) if token is not None][:1]
    rows = [torch.tensor(first + tokenizer.encode(text, bos=False)) for text in source]
    limit = gpt.config.block_size
    if n_cut := sum(len(ids) > limit for ids in rows):
        print(f"{n_cut} of {len(rows)} documents of --text are longer than the context: cut to {limit} tokens")
    return [{"input_ids": ids[:limit], "labels": ids[:limit]} for ids in rows]


def read_documents(files: Sequence[str]) -> list[str]:
    """Return texts: the field "text" of each row of JSONL files, and what blank lines separate in other files."""
    found = []
    for file in map(Path, files):
        with reading(file):
            content = file.read_text(encoding="utf-8-sig")  # Windows' editors begin a file with a mark
            rows = (json.loads(line)["text"] for line in content.split("\n") if line.strip())
            found += map(str.strip, rows if file.suffix == ".jsonl" else re.split(r"\n\s*\n", content))
    if not any(found):
        raise UserError(f"--text {', '.join(files)}: there is no text in it")
    return [document for document in found if document]


def measure(lines: Sequence[Line], name: str, key: Any, make: Callable[..., None], folder: Path) -> list[str]:
    """Fill in the numbers of lines on one thing to measure, from files or anew.

    Args:
        lines: the first is the one that the others are compared with.
        name: of what is measured.
        key: what decides the measurement beside the model.
        make: writes it to ``save_filepath``, from the flags of a line.
        folder: of the files.

    Returns:
        What could not be measured, and why.
    """
    first, failures = None, []
    for line in lines:
        plain = f"{quote(line.label, safe=' +')[:80]}-{quote(name, safe=' +')}"
        file = folder / f"{plain}-{sha256(f'{line.weights} {key}'.encode()).hexdigest()[:12]}.json"
        try:
            if not file.exists():
                make(**line.flags, save_filepath=file)
            with reading(file, "move it away: the same command measures it again"):
                found = json.loads(file.read_text(encoding="utf-8"))
                one = found if line is lines[0] else first
                line.numbers |= task_numbers(found) if "results" in found else sample_numbers(name, found, one)
                first = one
        except (UserError, OSError, RuntimeError, MemoryError) as error:  # a GPU's memory may end, too
            failures.append(f"{line.label} on {name}: {one_line(error)}")
    return failures


# ----------------------------------------------------------------------------------------------------------- numbers
def leaves(groups: Mapping[str, list[str]], name: str) -> list[str]:
    """Return the tasks of a group and of the groups in it; a task itself."""
    return [leaf for child in groups[name] for leaf in leaves(groups, child)] if groups.get(name) else [name]


def task_numbers(found: Found) -> Found:
    """Return the accuracies of the harness's results: of tasks, of groups over all questions and over their tasks."""
    groups, columns = found["group_subtasks"], {}
    inner = {child for below in groups.values() for child in below}
    for name in (name for name in found["results"] if name not in inner):
        column, tasks = TASKS.get(name, [name])[0], leaves(groups, name)
        columns[column] = mean_accuracy(found, [name])
        if tasks != [name]:
            columns[f"{column} over subjects"] = mean_accuracy(found, tasks)
    return columns


def mean_accuracy(found: Found, tasks: Sequence[str]) -> Found:
    """Return the mean accuracy of tasks, with its standard error where all have one (the harness's may be "N/A")."""
    values, errors = ([found["results"][task].get(f"{key},none") for task in tasks] for key in ("acc", "acc_stderr"))
    if None in values:  # NaN is null in JSON
        raise UserError(f"{tasks[values.index(None)]} has no accuracy, or one that is no number")
    known = all(isinstance(error, float) for error in errors)
    return accuracy(sum(values) / len(values), math.hypot(*errors) / len(errors) if known else None)


def accuracy(value: float, error: float | None = None) -> Found:
    """Return a share as a number in %."""
    shown = f"{100 * value:.2f}" + ("" if error is None else f" ± {100 * error:.2f}")
    return {"value": value, "error": error, "shown": shown}


def with_mean(numbers: Found) -> Found:
    """Return the numbers with the mean of the paper's four, where all are there.

    It has no error: two of them are on the same questions.
    """
    four = [numbers[column]["value"] for column, _ in TASKS.values() if column in numbers]
    return numbers | ({"mean": accuracy(sum(four) / len(four))} if len(four) == len(TASKS) else {})


def sample_numbers(name: str, found: Found, first: Found | None) -> Found:
    """Return the perplexity on samples, and the loss per token minus that of the first model, with its interval.

    Raises:
        ValueError: the samples were cut into other tokens than the first model's.
    """
    if first and first["tokens"] != found["tokens"]:
        raise UserError("its tokenizer or context differs from the first model's: losses per token cannot be compared")
    n = len(found["tokens"])
    drawn = np.random.default_rng(0).multinomial(n, [1 / n] * n, size=DRAWS)  # how often each sample is drawn
    counts = np.vstack([np.ones(n), drawn])
    sums = ((counts @ each["losses"], counts @ each["tokens"]) for each in (found, first or found))
    loss, of_first = (losses / tokens for losses, tokens in sums)
    perplexity = math.exp(min(loss[0], MOST))
    numbers = {f"perplexity on {name}": {"value": perplexity, "shown": f"{perplexity:.5g}"}}
    if first:
        change, (low, high) = float(loss[0] - of_first[0]), np.quantile((loss - of_first)[1:], (0.025, 0.975)).tolist()
        shown = "" if found is first else f"{change:+.4f} [{low:+.4f}, {high:+.4f}]"
        numbers[f"change on {name}"] = {"value": change, "low": low, "high": high, "shown": shown}
    return numbers


# ------------------------------------------------------------------------------------------------------------ report
def write_report(out_dir: Path, lines: Sequence[Line], failures: Sequence[str], given: str) -> str:
    """Write the numbers and the command as JSON, the table as Markdown, which is returned, and the picture."""
    numbers = {line.label: with_mean(line.numbers) for line in lines}
    measured = {column for line in lines for column in line.numbers}
    if chance := {column: accuracy(share) for column, share in TASKS.values() if column in measured}:
        numbers["chance"] = with_mean(chance)
    rows = {name: {column: number["shown"] for column, number in its.items()} for name, its in numbers.items()}
    text = "\n".join([table(rows), "", NOTES, "", *(f"- not measured: {failure}" for failure in failures)])
    models = [asdict(line) | {"flags": {name: str(value) for name, value in line.flags.items()}} for line in lines]
    write_json(out_dir / "report.json", {"command": given, "models": models, "failures": failures})
    write_text(out_dir / "report.md", text + "\n")
    curves, x, y = {}, f"change on {TEXT}", f"change on {HELD_OUT}"
    for line in sorted(lines, key=lambda line: line.strength):
        if {x, y} <= line.numbers.keys():
            curves.setdefault(line.model, []).append((line.numbers[x]["value"], line.numbers[y]["value"]))
    if curves:
        compare_runs(out_dir / "forgetting.png", curves, xlabel=f"{x} (nats per token)", ylabel=y)
    return text


def setup(
    *,
    out_dir: Path,
    models: dict[str, str],
    checkpoint_dir: Path | None = None,
    eval_tasks: list[str] | None = None,
    text: list[str] | None = None,
    val_data_dir: Path | None = None,
    strengths: list[float] | None = None,
    data_dir: Path | None = None,
    num_fewshot: NonNegativeInt | None = None,
    limit: PositiveFloat | None = None,
    precision: Literal[tuple(PRECISIONS)] = "32-true",
    batch_size: PositiveInt = 8,
) -> None:
    """Compare finetuned models on tasks, by what they forgot, and over their adapters' strengths.

    Args:
        out_dir: folder of the report: report.md, report.json, forgetting.png, and a file a measurement under results/.
        models: lines of the table, "{name: path, name: path}", each a model's folder, base or merged, or an adapter
            file. The others are compared with the first, which should be the untuned one.
        checkpoint_dir: the adapters' base model.
        eval_tasks: as in eval/lm_eval_harness.py; each is measured by itself.
        text: files of documents that finetuning never saw: JSONL, "text" in each row, or plain, with blank lines
            between documents. What is longer than the context is cut.
        val_data_dir: prepared data, on whose held-out responses the loss is measured.
        strengths: more strengths of the adapters, on --text and held-out rows alone: learning against forgetting.
        data_dir: read the tasks' data from this folder, laid out like the Hub.
        num_fewshot: examples before each question; by default each task's own number.
        limit: only the first documents, this many, of each task. For trying out.
        precision: 32-true, bf16-true or 16-true.
        batch_size: rows computed at once.
    """
    given = command("eval/report.py", **{name: value for name, value in locals().items() if value is not None})
    harness = {"data_dir": data_dir and str(data_dir.resolve()), "num_fewshot": num_fewshot, "limit": limit}
    common = {"precision": precision, "batch_size": batch_size}
    problems = Problems()
    if eval_tasks:
        problems.attempt(resolve_names, eval_tasks)
    on_task = partial(lm_eval_harness.setup, **harness, **common)
    plan = {task: ([precision, harness], partial(on_task, eval_tasks=[task])) for task in eval_tasks or ()}
    if text and (documents := problems.attempt(read_documents, text)):
        plan[TEXT] = ([precision, documents], partial(on_samples, documents, **common))
    if val_data_dir and problems.attempt(read_data_config, val_data_dir):
        digest = problems.attempt(file_sha256, val_data_dir / TEST_FILE)
        plan[HELD_OUT] = ([precision, digest], partial(on_samples, val_data_dir, **common))
    problems.expect(bool(models and (plan or problems)), "give --models, and --eval_tasks, --text or --val_data_dir")
    problems.expect(text or val_data_dir or not strengths, "--strengths is of no use without --text or --val_data_dir")
    opened = partial(problems.attempt, open_model, base=checkpoint_dir, strengths=strengths or ())
    lines = [line for name, path in models.items() for line in opened(name, Path(path)) or ()]
    problems.check()
    failures, results = [], out_dir / "results"
    with locked(out_dir, option="--out_dir"):
        remove_leftovers(out_dir, results)
        for name, (key, make) in plan.items():
            chosen = [line for line in lines if line.strength == 1 or name in (TEXT, HELD_OUT)]
            failures += measure(chosen, name, key, make, results)
        print(f"\n{write_report(out_dir, lines, failures, given)}\nwrote {out_dir}")
    if failures:
        raise UserError(f"{len(failures)} measurements failed, first {failures[0]}")


if __name__ == "__main__":
    main(setup)
