"""Check and measure on this machine's GPU all that the README claims of one: bash scripts/gpu.sh [--short]

Prints tables in Markdown and writes report.json, report.png and log.txt (what libraries print).

- Each part is a process of its own: one that fails, hangs, or leaves the GPU in a bad state costs no other part. Rows
  come one by one and the JSON is written anew after each part, so what was measured is kept.
- The time that is left is shared by weight among the parts that are left; one that needs less leaves more.
- The command line is plain argparse: a machine may have torch and lightning, and no jsonargparse.
"""

import argparse
import multiprocessing
import os
import signal
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from importlib.util import find_spec
from multiprocessing.connection import Connection
from pathlib import Path
from time import monotonic, strftime
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # runs from any folder

from eval import gpu_parts, gpu_runs
from eval.costs import LORA, table
from eval.gpu_parts import LATE, Card, Found, Row, explain
from lit_gpt.files import atomic_write, write_json

RESULTS, PICTURE, LOG = "report.json", "report.png", "log.txt"
SOFT = 0.85
"""Share of its time after which a part begins nothing new; at the end of it, it is stopped."""
FAULTS = ("failed: ", "WRONG", "ended early")
"""Words of the notes on faults: with one of them the command ends with exit code 1, after all parts."""
UNFINISHED = (LATE, "stopped after", "left out: no time")
"""Words of the notes on what merely took too long."""


@dataclass(frozen=True)
class Part:
    """One part of the report: its title, what yields its rows and notes, its share of the time, packages it needs."""

    title: str
    measure: Callable[[Card], Found]
    weight: float
    needs: tuple[str, ...] = ()

    @property
    def missing(self) -> list[str]:
        """Return those of ``needs`` that are not here."""
        return [name for name in self.needs if find_spec(name) is None]


PARTS = {
    "a": Part("What the machine does", gpu_parts.machine, 2),
    "b": Part("Exactness: error against fp64 on the CPU, logits / gradients", gpu_parts.exactness, 12),
    "c": Part("Reflections: time, and bandwidth as a share of a copy's", gpu_parts.kernels, 6),
    "d": Part("Training steps; ratios are medians of the rounds' own", gpu_runs.steps, 42),
    "e": Part("Beside PEFT on transformers", gpu_runs.beside_peft, 6, ("peft", "transformers")),
    "f": Part("Training with finetune/ether.py", gpu_runs.training, 42, ("jsonargparse", "tokenizers")),
    "g": Part("Generation", gpu_runs.generation, 6),
    "h": Part("Evaluation", gpu_runs.evaluation, 6, ("lm_eval", "tokenizers")),
}


# ------------------------------------------------------------------------------------------------------ running parts
def receive(part: Part, *, seconds: float, short: bool, log: Path) -> Found:
    """Yield what the part's process sends until it or its time is over, and a note on an early end."""
    if part.missing:
        yield f"left out: needs {', '.join(part.missing)}; pip install -r requirements.txt -r tests/requirements.txt"
        return
    if seconds < 1:
        yield "left out: no time; give more --minutes"
        return
    end, fork = monotonic() + seconds, multiprocessing.get_context("fork")  # all is imported; CUDA starts in the child
    receiver, sender = fork.Pipe(duplex=False)
    process = fork.Process(target=work, args=(part, sender, log), kwargs=dict(seconds=SOFT * seconds, short=short))
    process.start()
    sender.close()
    try:
        while receiver.poll(max(0.0, end - monotonic())):
            yield receiver.recv()
        yield f"stopped after {seconds:.0f} s; what was measured until then is kept"
    except EOFError:  # the process is through
        process.join()
        if process.exitcode:
            yield f"ended early, exit code {process.exitcode}; what was measured until then is kept, see {log}"
    finally:
        with suppress(ProcessLookupError):  # with all that it has started
            os.killpg(process.pid, signal.SIGKILL)
        process.kill()
        process.join()


def work(part: Part, sender: Connection, log: Path, *, seconds: float, short: bool) -> None:
    """Measure a part and send what it finds; of an error, one line. The body of a process."""
    os.setsid()
    with log.open("a", encoding="utf-8") as file:
        for stream in (1, 2):
            os.dup2(file.fileno(), stream)
    try:
        for found in part.measure(Card.detect(short=short, seconds=seconds)):
            sender.send(found)
    except Exception as error:
        sender.send(explain(error))
    sender.close()
    os._exit(0)  # a broken GPU context may hang or abort an orderly end


# ----------------------------------------------------------------------------------------------------------- showing
def tables(rows: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, dict[str, Any]]]:
    """Return by table and label the values of rows; those of one label are joined."""
    found: dict[str, dict[str, dict[str, Any]]] = {}
    for row in rows:
        found.setdefault(row["table"], {}).setdefault(row["label"], {}).update(row["values"])
    return found


def show(rows: Sequence[Mapping[str, Any]]) -> str:
    """Return the tables of a part in Markdown."""
    texts = []
    for title, lines in tables(rows).items():
        columns = list(dict.fromkeys(name for values in lines.values() for name in values))
        cells = [[label, *(cell(values.get(name, "")) for name in columns)] for label, values in lines.items()]
        texts.append(f"{title}\n\n" * bool(title) + table(["", *columns], cells))
    return "\n\n".join(texts)


def cell(value: float | str) -> str:
    """Return a value for people: three figures."""
    if isinstance(value, str):
        return value
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"


PICTURED = {"c": "forward, µs", "d": f"x {LORA}", "e": "tokens/s", "f": "peak, GiB"}
"""The column of each of these parts that the picture shows."""


def draw(path: Path, report: Mapping[str, Any]) -> None:
    """Draw bars of one column for each of four parts; of several tables the last that has it."""
    os.environ.setdefault("MPLBACKEND", "Agg")
    from matplotlib.figure import Figure

    figure = Figure(figsize=(13, 9), layout="constrained")
    for axes, (name, column) in zip(figure.subplots(2, 2).flat, PICTURED.items(), strict=True):
        axes.set_title(f"{column}: nothing to show")
        for title, lines in tables(report["parts"].get(name, {}).get("rows", [])).items():
            values = {label: row[column] for label, row in lines.items() if column in row}
            if values:
                axes.clear()
                axes.bar_label(axes.barh(list(values), list(values.values())), list(map(cell, values.values())))
                axes.set_title(f"{column}\n{title}", fontsize=9)
                axes.invert_yaxis()
                axes.margins(x=0.12)
    figure.suptitle(report["machine"], fontsize=10)
    with atomic_write(path) as temporary:
        figure.savefig(temporary, format="png", dpi=90)


# --------------------------------------------------------------------------------------------------------------- all
def report_on(parts: Mapping[str, Part], out_dir: Path, *, minutes: float, short: bool) -> dict[str, Any]:
    """Run the parts, print and save what they find as it comes, and return it."""
    end = monotonic() + 60 * minutes
    out_dir.mkdir(parents=True, exist_ok=True)
    (out_dir / LOG).write_text("", encoding="utf-8")
    report: dict[str, Any] = {"short": short, "machine": "", "parts": {}}
    for position, (name, part) in enumerate(parts.items()):
        later = [other.weight for other in list(parts.values())[position + 1 :] if not other.missing]
        seconds = (end - monotonic()) * part.weight / (part.weight + sum(later))
        print(f"\n== {name}. {part.title} (at most {max(0, seconds):.0f} s)", flush=True)
        start, rows, notes = monotonic(), [], []
        for found in receive(part, seconds=seconds, short=short, log=out_dir / LOG):
            if isinstance(found, Row):
                rows.append(asdict(found))
            else:
                notes.append(found)
                print(f"   {found}", flush=True)
        report["parts"][name] = {"title": part.title, "seconds": monotonic() - start, "rows": rows, "notes": notes}
        if name == "a":
            report["machine"] = "\n".join(notes[:2])
        print(f"\n{show(rows)}\n\n   {monotonic() - start:.0f} s", flush=True)
        write_json(out_dir / RESULTS, report)
    try:
        draw(out_dir / PICTURE, report)
    except Exception as error:  # of matplotlib: what was measured is saved
        print(f"picture {explain(error)}")
    print(f"\nSaved to {out_dir}: {', '.join(path.name for path in sorted(out_dir.iterdir()))}")
    return report


def notes_on(kinds: Sequence[str], report: Mapping[str, Any]) -> list[str]:
    """Return the notes that hold one of ``FAULTS``, or of ``UNFINISHED``, with the parts' names."""
    notes = [f"{name}. {note}" for name, part in report["parts"].items() for note in part["notes"]]
    return [note for note in notes if any(kind in note for kind in kinds)]


def setup(arguments: Sequence[str] | None = None) -> None:
    """Read the command line and report."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], allow_abbrev=False)
    parser.add_argument("--short", action="store_true", help="Tiny sizes, to see that everything works.")
    parser.add_argument("--parts", default="".join(PARTS), help=f"Letters of the parts to run, of {''.join(PARTS)}.")
    parser.add_argument("--minutes", type=float, default=8.0, help="The most time that all parts take together.")
    parser.add_argument("--out_dir", type=Path, help="Where the results go; a new folder under logs/gpu by default.")
    given = parser.parse_args(arguments)
    if unknown := set(given.parts) - set(PARTS):
        parser.error(f"--parts {given.parts}: {', '.join(sorted(unknown))} unknown, expected some of {''.join(PARTS)}")
    out_dir = given.out_dir or Path("logs/gpu", strftime("%Y%m%d-%H%M%S"))
    if (out_dir / RESULTS).exists():
        parser.error(f"{out_dir} holds a report, perhaps of another card: choose another --out_dir")
    print(f"results go to {out_dir}")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # the part that runs, in a session of its own, ends too
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ["HF_HUB_OFFLINE"] = "1"
    report = report_on({name: PARTS[name] for name in given.parts}, out_dir, minutes=given.minutes, short=given.short)
    if late := notes_on(UNFINISHED, report):
        print("\nNot finished (give more --minutes):", *late, sep="\n   ", file=sys.stderr)
    if wrong := notes_on(FAULTS, report):
        print("\nWrong here:", *wrong, sep="\n   ", file=sys.stderr)
        raise SystemExit(1)


if __name__ == "__main__":
    setup()
