"""Compare finetuned models: the paper's table, what they forgot, and learning against forgetting over the strength.

    python eval/report.py --out_dir reports/alpaca --checkpoint_dir checkpoints/ORG/NAME \
        --models "{untuned: checkpoints/ORG/NAME, ETHER+: logs/RUN/lit_model_ether_finetuned.pth}" \
        --eval_tasks "['hendrycksTest-*', 'arc_challenge', 'truthfulqa_mc']" --text "[unseen.txt]"

- A *measurement* is one model, at one strength, on one task, on the texts or on held-out rows. Its file under results/
  tells all that decides it and the command that made it: the same command goes on where it was stopped, and measures
  anew what has changed.
- A measurement that fails is listed; the others go on, and the script fails at the end.
- Losses on samples are compared with the first model's by a bootstrap over samples, drawn alike for both.
"""

import json
import math
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from statistics import fmean
from typing import Any
from urllib.parse import quote

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # runs from any folder

import numpy as np
import torch

from eval import lm_eval_harness
from eval.costs import table
from lit_gpt.adapter_files import AdapterFile, load_adapted_model, load_adapter, set_strength
from lit_gpt.batches import Batching, n_targets
from lit_gpt.checkpoint import CONFIG, WEIGHTS, check_checkpoint_dir, fingerprint, load_state
from lit_gpt.cli import main, one_line
from lit_gpt.data import TEST_FILE, Sample, check_fit, load_split, read_data_config
from lit_gpt.devices import choose_device, weights_dtype
from lit_gpt.errors import Problems, UserError, command, out_of_memory, reading
from lit_gpt.files import atomic_write, file_sha256, read_json, write_json
from lit_gpt.loss import IGNORE_INDEX
from lit_gpt.model import GPT
from lit_gpt.plots import picture
from lit_gpt.run_folder import SUMMARY
from lit_gpt.tokenizer import Tokenizer

TASKS = {"mmlu": ("MMLU", 0.25), "arc_challenge": ("ARC", 0.2502)}
TASKS |= {"truthfulqa_mc1": ("TruthfulQA-1", 0.2261), "truthfulqa_mc2": ("TruthfulQA-2", 0.4484)}
"""The paper's tasks: their columns, and what equally likely answers get, computed from the whole data sets."""
ACCURACY = ("acc,none", "acc_stderr,none")
OVER_SUBJECTS, MEAN = " over subjects", "mean"
TEXT, HELD_OUT = "text", "held-out rows"
PERPLEXITY, CHANGE = "perplexity on {}", "change on {}"
DRAWS = 2000
NOTES = """Accuracies in %, ± standard error: of other questions, not of another run. ARC is `acc`. A change is the loss
minus the first model's in nats per token, with a 95% interval; above 0 is worse. report.json names the command that
made each number."""
Found = dict[str, Any]
"""A measurement, as it lies in its file."""
Plan = Mapping[str, tuple[Any, Callable[..., Found]]]
Number = dict[str, Any]
"""A ``value``, as it is ``shown``, an accuracy's standard ``error``, and the ``command`` that made it."""


@dataclass
class Line:
    """A model at a strength, a line of the table: its folder, its unmerged adapter, and its numbers by column."""

    name: str
    path: Path
    strength: float = 1.0
    folder: Path | None = None
    adapter: AdapterFile | None = None
    trained: int | None = None
    numbers: dict[str, Number] = field(default_factory=dict)

    def open(self, base: Path | None) -> list[Any]:
        """Find folder, adapter and the number of trained parameters; return what tells the weights from others."""
        if self.path.is_dir():
            self.folder = check_checkpoint_dir(self.path)
            if (summary := self.path.resolve().parent / SUMMARY).is_file():  # merged/ or final/ in a run's folder
                self.trained = read_json(summary)["trainable_parameters"]
            return self.identity()
        with reading(self.path):
            kind = (load_state(self.path).get("config") or {"kind": "ether"})["kind"]  # the original code writes none
        if base is None:
            raise UserError(f"{self.path} is an adapter: give the folder of its base model with --checkpoint_dir")
        self.folder, saved = check_checkpoint_dir(base), load_adapter(self.path, kind)
        self.adapter, self.trained = set_strength(saved, self.strength), sum(t.numel() for t in saved.state.values())
        return [*self.identity(), fingerprint(saved.state), asdict(saved.config), self.strength]

    def identity(self) -> list[str]:
        """Return what tells the folder's model from others."""
        return [fingerprint(load_state(self.folder / WEIGHTS)), file_sha256(self.folder / CONFIG)]


# ---------------------------------------------------------------------------------------------------- measurements
def on_task(line: Line, file: Path, **options: Any) -> Found:
    """Return the harness's results on a task, as its script writes them to a file."""
    flags = {"checkpoint_dir": line.folder, **options}
    if line.adapter:
        flags |= {f"{line.adapter.kind}_path": line.path, "strength": line.strength}
    lm_eval_harness.setup(**flags, save_filepath=file, overwrite=True)
    given = {name: value for name, value in flags.items() if value is not None}
    return read_json(file) | {"command": command("eval/lm_eval_harness.py", **given)}


@torch.no_grad()
def on_samples(
    line: Line,
    _: Path,
    *,
    make: Callable[[GPT, Tokenizer], list[Sample]],
    precision: str,
    batch_size: int,
    command: str,
) -> Found:
    """Return the summed loss of each sample's targets and their number, shortest sample first."""
    device, losses, counts = choose_device(), [], []
    gpt = load_adapted_model(line.folder, precision, adapter=line.adapter, device=device)
    for batch in Batching(batch_size).cut(make(gpt, Tokenizer(line.folder))):
        idx, targets, _ = Batching(batch_size).collate(batch, device)
        sizes = [n_targets([sample]) for sample in batch]
        counts += sizes
        losses += [part.double().sum().item() for part in gpt(idx, targets=targets, reduction="none").split(sizes)]
    if not math.isfinite(sum(losses)):
        raise UserError(f"the loss of {line.path} is not finite")
    return {"losses": losses, "tokens": counts, "command": command}


def document_samples(gpt: GPT, tokenizer: Tokenizer, documents: Sequence[str]) -> list[Sample]:
    """Return texts as samples: behind BOS, or EOS where there is no BOS, and cut at the context."""
    first = tokenizer.eos_id if tokenizer.bos_id is None else tokenizer.bos_id
    rows = [torch.tensor([first, *tokenizer.encode(text, bos=False)][: gpt.config.block_size]) for text in documents]
    return [{"input_ids": ids, "labels": ids, "response": torch.ones_like(ids).bool()} for ids in rows]


def held_out_samples(gpt: GPT, tokenizer: Tokenizer, data_dir: Path) -> list[Sample]:
    """Return the held-out rows of prepared data, with the tokens of their responses as targets."""
    samples = load_split(data_dir / TEST_FILE)
    check_fit(tokenizer.dir, gpt.config, data=read_data_config(data_dir), samples=samples)
    return [s | {"labels": torch.where(s["response"], s["input_ids"], IGNORE_INDEX)} for s in samples]


def read_documents(files: Sequence[str]) -> list[str]:
    """Return texts: the field "text" of each row of JSONL files, and of plain files what blank lines part."""
    found: list[str] = []
    for file in map(Path, files):
        with reading(file):
            content = file.read_text(encoding="utf-8")
            rows = (json.loads(line)["text"] for line in content.split("\n") if line.strip())
            found += map(str.strip, rows if file.suffix == ".jsonl" else re.split(r"\n\s*\n", content))
    if not any(found):
        raise UserError(f"--text {', '.join(files)}: there is no text in it")
    return [document for document in found if document]


def measure_line(line: Line, plan: Plan, *, base: Path | None, folder: Path, first: dict, failures: list) -> Line:
    """Fill in the numbers of a line, and return it.

    Args:
        line: a path of --models.
        plan: what is measured, by name: what decides it beside the model, and what makes it.
        base: the adapters' base model.
        folder: of the measurements' files.
        first: the first line's measurements, which the others are compared with; is filled in by that line.
        failures: takes what could not be measured.
    """
    for measure, (key, make) in plan.items():
        try:
            identity = line.open(base)
            name = quote(f"{line.name}-{line.strength:g}-{measure}", safe=" +")
            found = kept(folder / f"{name}.json", [*identity, key], partial(make, line))
            first.setdefault(measure, found)
            numbers = task_numbers(found) if "results" in found else sample_numbers(measure, found, first[measure])
            line.numbers |= {column: number | {"command": found["command"]} for column, number in numbers.items()}
        except Exception as error:
            if not (isinstance(error, UserError | OSError) or out_of_memory(error)):
                raise
            first.setdefault(measure, None)
            failures.append(
                {"model": line.name, "strength": line.strength, "measure": measure, "error": one_line(error)}
            )
            print(f"not measured: {line.name}, {measure}: {one_line(error)}", file=sys.stderr)
    return line


def kept(file: Path, key: Any, make: Callable[[Path], Found]) -> Found:
    """Return a measurement from its file; where there is none, or one with another key, make it and keep it.

    ``make`` may write to the path that it is given; it is the same one after an interruption.
    """
    if not file.exists() or read_json(file).get("key") != key:
        part = file.with_suffix(".part")
        write_json(file, make(part) | {"key": key})
        part.unlink(missing_ok=True)
    return read_json(file)


# ----------------------------------------------------------------------------------------------------------- numbers
def leaves(found: Found, name: str) -> list[str]:
    """Return the tasks of a group and of its groups; a task itself."""
    below = found["group_subtasks"].get(name)
    return [leaf for child in below for leaf in leaves(found, child)] if below else [name]


def task_numbers(found: Found) -> dict[str, Number]:
    """Return the accuracies of the harness's results: of tasks, of groups over all questions and over their tasks."""
    inner = {child for below in found["group_subtasks"].values() for child in below}
    columns = {}
    for name in (name for name in found["results"] if name not in inner):
        label, tasks = TASKS.get(name, [name])[0], leaves(found, name)
        for column, names in {label: [name], label + OVER_SUBJECTS: tasks}.items():
            scores = [found["results"][each] for each in names]
            if any(values.get("acc,none") is None for values in scores):  # NaN is null in JSON
                raise UserError(f"{name} has no accuracy, or one that is no number")
            if column == label or tasks != [name]:
                columns[column] = mean_of(*([values.get(key) for values in scores] for key in ACCURACY))
    return columns


def accuracy(value: float, error: float | None = None) -> Number:
    """Return a number for the table, of an accuracy from 0 to 1."""
    shown = f"{100 * value:.2f}" + ("" if error is None else f" ± {100 * error:.2f}")
    return {"value": value, "error": error, "shown": shown}


def mean_of(values: Sequence[float], errors: Sequence[Any]) -> Number:
    """Return the mean of accuracies, with its standard error where all have one (the harness's may be "N/A")."""
    known = all(isinstance(error, float) for error in errors)
    return accuracy(fmean(values), math.hypot(*errors) / len(errors) if known else None)


def sample_numbers(name: str, found: Found, first: Found | None) -> dict[str, Number]:
    """Return the perplexity on samples, and the loss per token minus that of the first model, with its interval."""
    n = len(found["tokens"])
    drawn = np.random.default_rng(0).multinomial(n, [1 / n] * n, size=DRAWS)  # how often each sample is drawn
    counts = np.vstack([np.ones(n), drawn])
    loss, of_first = ((counts @ each["losses"]) / (counts @ each["tokens"]) for each in (found, first or found))
    columns = {PERPLEXITY.format(name): {"value": math.exp(loss[0]), "shown": f"{math.exp(loss[0]):.5g}"}}
    if first:
        more, (low, high) = float(loss[0] - of_first[0]), np.quantile((loss - of_first)[1:], (0.025, 0.975)).tolist()
        shown = f"{more:+.4f} [{low:+.4f}, {high:+.4f}]" if found["key"] != first["key"] else ""
        columns[CHANGE.format(name)] = {"value": more, "low": low, "high": high, "shown": shown}
    return columns


# ------------------------------------------------------------------------------------------------------------ report
def write_report(out_dir: Path, lines: list[Line], failures: list[dict[str, Any]]) -> str:
    """Write the numbers as JSON, the table as Markdown, which is returned, and the pictures."""
    columns = list(dict.fromkeys(column for line in lines for column in line.numbers))
    accuracies = [column for column in columns if any("error" in line.numbers.get(column, {}) for line in lines)]
    averaged = [column for column in accuracies if not column.endswith(OVER_SUBJECTS)]
    chance = {column: accuracy(share) for column, share in TASKS.values() if column in averaged}
    lines = [*lines, Line("chance", Path(), numbers=chance)]
    for numbers in (line.numbers for line in lines if len(averaged) > 1 and {*averaged} <= line.numbers.keys()):
        numbers[MEAN] = mean_of(*([numbers[column][key] for column in averaged] for key in ("value", "error")))
    columns = [*accuracies, MEAN, *(column for column in columns if column not in accuracies)]
    columns = [column for column in columns if any(column in line.numbers for line in lines)]
    shown = {
        line.name + f" x {line.strength:g}" * (line.strength != 1): {
            "trained": f"{line.trained:,}" if line.trained else ""
        }
        | {column: line.numbers.get(column, {"shown": ""})["shown"] for column in columns}
        for line in lines
    }
    missing = [f"- not measured: {f['model']} x {f['strength']:g} on {f['measure']}: {f['error']}" for f in failures]
    text = "\n".join([table(shown), "", NOTES, "", *missing])
    plain = [{"model": x.name, "path": str(x.path), "strength": x.strength, "trained": x.trained, "numbers": x.numbers}
             for x in lines]  # fmt: skip
    write_json(out_dir / "report.json", {"models": plain, "failures": failures})
    with atomic_write(out_dir / "report.md") as temporary:
        temporary.write_text(text + "\n", encoding="utf-8")
    if accuracies:
        draw_accuracies(out_dir / "accuracies.png", [line for line in lines if line.strength == 1], accuracies)
    learned = [column for column in (CHANGE.format(HELD_OUT), *accuracies) if column in columns]
    if learned and any(line.strength != 1 for line in lines) and CHANGE.format(TEXT) in columns:
        draw_strengths(out_dir / "strengths.png", lines, CHANGE.format(TEXT), learned[0])
    return text


def draw_accuracies(path: Path, lines: list[Line], columns: Sequence[str]) -> None:
    """Draw the accuracies with their standard errors, model beside model."""
    with picture(path, size=(7.5, 4.5)) as axes:
        for index, line in enumerate(lines):
            found = [(x, line.numbers[column]) for x, column in enumerate(columns) if column in line.numbers]
            values, errors = ([100 * (number[key] or 0) for _, number in found] for key in ("value", "error"))
            places = [x + 0.6 * (index + 0.5) / len(lines) - 0.3 for x, _ in found]
            axes.errorbar(places, values, errors, fmt="o" if line.folder else "_", capsize=3, label=line.name)
        axes.set_xticks(range(len(columns)), columns, fontsize="small")
        axes.set_ylabel("accuracy (%)")


def draw_strengths(path: Path, lines: list[Line], x: str, y: str) -> None:
    """Draw two columns against each other, a curve for each model, its points marked with their strengths."""
    with picture(path, size=(7.5, 4.5)) as axes:
        found = sorted((line for line in lines if {x, y} <= line.numbers.keys()), key=lambda line: line.strength)
        for name in dict.fromkeys(line.name for line in lines if line in found):
            points = {
                line.strength: (line.numbers[x]["value"], line.numbers[y]["value"])
                for line in found
                if line.name == name
            }
            axes.plot(*zip(*points.values(), strict=True), marker="o", ms=4, label=name)
            for strength, point in points.items():
                axes.annotate(f"{strength:g}", point, (3, 3), textcoords="offset points", fontsize="x-small")
        axes.set(xlabel=f"{x}, nats per token", ylabel=y)


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
    num_fewshot: int | None = None,
    limit: float | None = None,
    precision: str = "32-true",
    batch_size: int = 8,
) -> None:
    """Compare finetuned models on tasks, by what they forgot, and over their adapters' strengths.

    Args:
        out_dir: folder of the report: report.md, report.json, pictures, and a file a measurement under results/.
        models: lines of the table, a name and a path each: a model's folder, base or merged, or an adapter file. The
            others are compared with the first, which should be the untuned one.
        checkpoint_dir: the adapters' base model.
        eval_tasks: as in eval/lm_eval_harness.py; each is measured by itself.
        text: files of documents that finetuning never saw: JSONL, "text" in each row, or plain, with blank lines
            between documents.
        val_data_dir: prepared data, on whose held-out responses the loss is measured.
        strengths: more strengths of the adapters, for a picture of learning against forgetting: there --text is
            measured, and the held-out rows or, without them, the first task.
        data_dir: read the tasks' data from this folder, laid out like the Hub.
        num_fewshot: examples before each question; by default each task's own number.
        limit: only the first so many documents of each task. For trying out.
        precision: 32-true, bf16-true or 16-true.
        batch_size: rows computed at once.
    """
    given = command("eval/report.py", **{name: value for name, value in locals().items() if value})
    harness = {"data_dir": data_dir and str(data_dir.resolve()), "num_fewshot": num_fewshot, "limit": limit}
    problems, common = Problems(), {"precision": precision, "batch_size": batch_size}
    problems.attempt(weights_dtype, precision)
    plan = {t: ([precision, harness], partial(on_task, eval_tasks=[t], **harness, **common)) for t in eval_tasks or ()}
    on_all = partial(on_samples, **common, command=given)
    if text and (documents := problems.attempt(read_documents, text)):
        samples = partial(document_samples, documents=documents)
        plan[TEXT] = ([precision, *map(file_sha256, text)], partial(on_all, make=samples))
    if val_data_dir and (digest := problems.attempt(file_sha256, val_data_dir / TEST_FILE)):
        plan[HELD_OUT] = ([precision, digest], partial(on_all, make=partial(held_out_samples, data_dir=val_data_dir)))
    problems.expect(bool(models and (plan or problems)), "give --models, and --eval_tasks, --text or --val_data_dir")
    problems.check()
    lines, failures, first = [], [], {}
    measured = partial(measure_line, base=checkpoint_dir, folder=out_dir / "results", first=first, failures=failures)
    dialled = (TEXT, HELD_OUT if val_data_dir else next(iter(plan), TEXT))
    dial = {name: plan[name] for name in dialled if name in plan}
    for name, path in models.items():
        lines.append(measured(Line(name, Path(path)), plan))
        if lines[-1].adapter and getattr(lines[-1].adapter.config, "Htype", None) != "ether":  # no way to the identity
            lines += [measured(Line(name, Path(path), s), dial) for s in dict.fromkeys(strengths or ()) if s != 1]
    print(f"\n{write_report(out_dir, lines, failures)}\nwrote {out_dir}")
    if failures:
        raise UserError(
            f"{len(failures)} measurements failed, {failures[0]['model']} on {failures[0]['measure']} first"
        )


if __name__ == "__main__":
    main(setup)
