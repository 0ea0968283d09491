"""Check and measure on this machine's GPU all that the README claims of one: bash scripts/gpu.sh [--short]

Prints tables in Markdown and writes report.jsonl, a line for each row and each fault, and log.txt (what libraries
print, and tracebacks). ``gpu_cases.py`` says what is measured.

- Each part is a process of its own: one that fails, hangs, or leaves the GPU in a bad state costs no other part. It
  writes its rows as they come, so that what was measured is kept.
- The time that is left is shared by weight among the parts that are left; one that needs less leaves more.
- The command line is plain argparse: a machine may have torch and lightning, and no jsonargparse.
"""

import argparse
import gc
import json
import multiprocessing
import os
import signal
import sys
import tempfile
import traceback
from collections.abc import Sequence
from contextlib import suppress
from functools import partial
from importlib import import_module
from pathlib import Path
from time import monotonic, strftime
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # runs from any folder

import torch

from eval.costs import Rows, table
from eval.gpu_cases import PARTS, Card

RESULTS, LOG = "report.jsonl", "log.txt"


def tell(path: Path, **line: Any) -> None:
    """Add a line to a file, as JSON."""
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(line) + "\n")


def work(part: str, out_dir: Path, folder: Path, *, short: bool) -> None:
    """Measure a part, case by case. The body of a process, with all that it starts in a session of its own."""
    os.setsid()
    with (out_dir / LOG).open("a", encoding="utf-8") as log:
        for stream in (1, 2):
            os.dup2(log.fileno(), stream)
    card = Card.detect(short=short, folder=folder)
    for name, case in PARTS[part][1].items():
        write = partial(tell, out_dir / RESULTS, part=part, case=name)
        start = monotonic()
        try:
            if "nf4" in name:
                import_module("bitsandbytes")
            for title, label, values in case(card, name):
                write(table=title, label=label, values=values)
        except ModuleNotFoundError as error:
            write(note=f"left out: needs {error.name}, which is not installed")
        except Exception as error:
            traceback.print_exc()
            write(fault=f"{type(error).__name__}: {' '.join(str(error).split())[-200:]}")
        write(seconds=monotonic() - start)
        if "compiled" in name:
            torch._dynamo.reset()  # it keeps models, whose memory the next case needs
        gc.collect()
        torch.cuda.empty_cache()
    sys.stdout.flush()
    os._exit(0)  # a broken GPU context may hang or abort an orderly end


def run(part: str, out_dir: Path, *, seconds: float, short: bool) -> list[dict[str, Any]]:
    """Run a part in its process, at most so long; return its lines, the last one on what it did not come to."""
    fork = multiprocessing.get_context("fork")  # all is imported; CUDA starts in the child
    with tempfile.TemporaryDirectory(prefix="gpu-report-", ignore_cleanup_errors=True) as folder:
        process = fork.Process(target=work, args=(part, out_dir, Path(folder)), kwargs={"short": short})
        process.start()
        try:
            process.join(seconds)
        finally:
            code = process.exitcode
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.kill()
            process.join()
    lines = [line for line in map(json.loads, (out_dir / RESULTS).open(encoding="utf-8")) if line["part"] == part]
    if code != 0:
        missing = [name for name in PARTS[part][1] if name not in {line["case"] for line in lines if "seconds" in line}]
        kind, text = ("note", f"stopped after {seconds:.0f} s") if code is None else ("fault", f"exit code {code}")
        lines.append({"part": part, "case": "end", kind: f"{text}, without {'; '.join(missing)}"})
        tell(out_dir / RESULTS, **lines[-1])
    return lines


def show(lines: Sequence[dict[str, Any]]) -> str:
    """Return the notes and tables of a part."""
    texts = [f"   {line['case']}: {line[kind]}" for line in lines for kind in ("note", "fault") if kind in line]
    tables: dict[str, Rows] = {}
    for line in lines:
        if "values" in line:
            tables.setdefault(line["table"], {}).setdefault(line["label"], {}).update(line["values"])
    return "\n\n".join(["\n".join(texts), *(f"{title}\n\n{table(rows)}" for title, rows in tables.items())])


def setup(arguments: Sequence[str] | None = None) -> None:
    """Read the command line, run the parts, and exit with code 1 where something is wrong."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], allow_abbrev=False)
    parser.add_argument("--short", action="store_true", help="Tiny sizes, to see that everything works.")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS), help="The parts to run.")
    parser.add_argument("--minutes", type=float, default=8.0, help="The most time that all parts take together.")
    parser.add_argument(
        "--out_dir", type=Path, default=Path("logs/gpu", strftime("%Y%m%d-%H%M%S")), help="For results."
    )
    given = parser.parse_args(arguments)
    if (given.out_dir / RESULTS).exists():
        parser.error(f"{given.out_dir} holds a report, perhaps of another card: choose another --out_dir")
    given.out_dir.mkdir(parents=True, exist_ok=True)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # the part that runs, in a session of its own, ends too
    os.environ |= {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    print(f"results go to {given.out_dir}")
    end, lines = monotonic() + 60 * given.minutes, []
    (given.out_dir / RESULTS).touch()
    for position, part in enumerate(given.parts):
        weights = [PARTS[name][0] for name in given.parts[position:]]
        start, seconds = monotonic(), max(0, end - monotonic()) * weights[0] / sum(weights)
        print(f"\n== {part} (at most {seconds:.0f} s)", flush=True)
        found = run(part, given.out_dir, seconds=seconds, short=given.short)
        print(f"{show(found)}\n\n   {monotonic() - start:.0f} s", flush=True)
        lines += found
    if wrong := [f"   {line['part']}, {line['case']}: {line['fault']}" for line in lines if "fault" in line]:
        print("\nWrong here:", *wrong, sep="\n", file=sys.stderr)
        raise SystemExit(1)


if __name__ == "__main__":
    setup()
