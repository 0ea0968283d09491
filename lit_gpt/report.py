"""Show a run to people: progress and metrics.csv while it goes, summary.json and loss.png at the end.

metrics.csv is always written; TensorBoard and Weights & Biases get the same numbers where they are asked for.
"""

import csv
import io
import resource
import sys
import uuid
from collections.abc import Mapping, Sequence
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from tqdm import tqdm

from lit_gpt import monitor
from lit_gpt.errors import UserError
from lit_gpt.files import write_json, write_text
from lit_gpt.plots import draw_losses
from lit_gpt.run_folder import LOSS_CURVE, METRICS, MONITOR, SUMMARY, TENSORBOARD

if TYPE_CHECKING:  # see devices.py
    from lightning.fabric.loggers import Logger

COLUMNS = (
    "step", "samples", "tokens", "loss", "learning_rate", "grad_norm", "seconds", "val_loss", "val_response_loss",
)  # fmt: skip
NAMES = ("part", "side")
"""Columns of words, of monitor.csv."""
VALIDATIONS = {"val_loss": "validation loss, all targets", "val_response_loss": "validation loss, responses"}
"""Names of the validation losses, by column of metrics.csv."""
PLAIN_EVERY = 10


class Metrics:
    """A CSV file of rows, each on the disk once it is written: what was measured survives whatever comes next.

    Args:
        path: of the file; what it held is gone.
        text: what it is to hold already, of an earlier ``Metrics``.
        columns: its first line.

    Attributes:
        rows: those written so far, empty values left out.
    """

    def __init__(self, path: Path, text: str = "", columns: Sequence[str] = COLUMNS) -> None:
        self.path, self.rows = path, parse_metrics(text)
        write_text(path, text or ",".join(columns) + "\n")
        # Stays open: a run goes on also where its folder is renamed.
        self._file = path.open("a", newline="", encoding="utf-8", buffering=1)  # a row is written with its end of line
        self._writer = csv.DictWriter(self._file, columns, lineterminator="\n")

    def write(self, **values: Any) -> None:
        """Add a row; columns that are not given stay empty."""
        self.rows.append(values)
        # Words, and counters to the last digit; six digits of what was measured.
        row = {name: f"{value:.6g}" if isinstance(value, float) else value for name, value in values.items()}
        self._writer.writerow(row)

    def text(self) -> str:
        """Return the file's content."""
        return self.path.read_text(encoding="utf-8")


def parse_metrics(text: str) -> list[dict[str, Any]]:
    """Return the rows of such a file, empty values left out."""
    return [
        {name: value if name in NAMES else float(value) for name, value in row.items() if value}
        for row in csv.DictReader(io.StringIO(text))
    ]


def read_metrics(path: Path) -> list[dict[str, float]]:
    """Read a run's metrics.csv.

    Raises:
        FileNotFoundError, ValueError: there is no such file, or it is another.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path} is not a file; a run folder holds one from its first validation on")
    try:
        return parse_metrics(path.read_text(encoding="utf-8"))
    except (ValueError, TypeError) as error:
        raise UserError(f"{path} is not a run's {METRICS}: {error}") from error


class Reporter:
    """Tells one run's numbers to the screen, to metrics.csv and to the loggers that were asked for.

    Args:
        run_dir: where the files go.
        settings: of the run; under "io" it says which loggers.
        n_steps: length of the run.
        state: of an earlier reporter, to go on from; ``step`` is where that was.
        step: steps done.
    """

    def __init__(
        self, run_dir: Path, *, settings: dict[str, Any], n_steps: int,
        state: dict[str, str] | None = None, step: int = 0,
    ) -> None:  # fmt: skip
        before = state or {"run_id": uuid.uuid4().hex[:8], "metrics": "", "monitor": ""}
        self.n_steps, self.run_id = n_steps, before["run_id"]
        self.metrics = Metrics(run_dir / METRICS, before["metrics"])
        monitors = settings["train"]["monitor"]
        self.monitor = Metrics(run_dir / MONITOR, before["monitor"], monitor.COLUMNS) if monitors else None
        self.loggers = open_loggers(run_dir, settings["io"], run_id=self.run_id, step=step)
        for logger in self.loggers:
            logger.log_hyperparams(settings)
        # A bar would fill a file with carriage returns: plain lines there.
        self.bar = tqdm(total=n_steps, initial=step, unit="step", disable=not sys.stderr.isatty())

    def state(self) -> dict[str, str]:
        """Return what another reporter needs to go on from here."""
        monitored = self.monitor.text() if self.monitor else ""
        return {"run_id": self.run_id, "metrics": self.metrics.text(), "monitor": monitored}

    def record(self, **values: float) -> None:
        """Write and show a step's or a validation's row of metrics.csv."""
        self.metrics.write(**values)
        step = int(values["step"])
        for logger in self.loggers:
            logger.log_metrics({name: value for name, value in values.items() if name != "step"}, step=step)
        if "val_loss" in values:
            losses = f"loss {values['val_loss']:.4f}, responses {values['val_response_loss']:.4f}"
            self.say(f"step {step}/{self.n_steps}  validation{' of the base' if step == 0 else ''} {losses}")
            return
        speed = values["tokens"] / max(values["seconds"], 1e-9)
        text = f"loss {values['loss']:.4f}  lr {values['learning_rate']:.2e}  {speed:.0f} tokens/s"
        self.bar.set_postfix_str(text, refresh=False)
        self.bar.update()
        if self.bar.disable and (step == 1 or step % PLAIN_EVERY == 0):
            left = values["seconds"] / step * (self.n_steps - step)
            print(f"step {step}/{self.n_steps}  {text}  {left:.0f} s left", flush=True)

    def record_monitor(self, step: int, rows: list[dict[str, Any]]) -> None:
        """Write and show what ``monitor.measure`` gave at a step."""
        for row in rows:
            self.monitor.write(step=step, **row)
        self.say(f"step {step}/{self.n_steps}  {monitor.summarise(rows)}")

    def say(self, text: str) -> None:
        """Print a line, above the bar where there is one."""
        self.bar.write(text)
        sys.stdout.flush()

    def close(self) -> None:
        """Finish the bar and the loggers; metrics.csv has each row already."""
        self.bar.close()
        for logger in self.loggers:
            logger.finalize("success")


def check_logger(package: str) -> None:
    """Raise UserError unless a logger's package can be imported."""
    try:
        if import_module(package).__file__ is None:  # W&B leaves folders of its own name behind
            raise ImportError("a folder of that name")
    except ImportError as error:
        raise UserError(f"--io.{package} true cannot import {package} ({error}): pip install {package}") from error


def open_loggers(run_dir: Path, wanted: Mapping[str, Any], *, run_id: str, step: int) -> "list[Logger]":
    """Return the loggers that were asked for; after a resume they go on behind ``step``.

    Raises:
        ValueError: Weights & Biases does not let us in.
    """
    loggers: list[Logger] = []
    if wanted["tensorboard"]:
        from lightning.fabric.loggers import TensorBoardLogger  # here: optional

        purge_step = step + 1 if step else None  # hides what was logged after the checkpoint
        loggers.append(TensorBoardLogger(run_dir, name=TENSORBOARD, version="", purge_step=purge_step))
    if wanted["wandb"]:
        import wandb
        from lightning.pytorch.loggers import WandbLogger

        try:
            loggers.append(WandbLogger(name=run_dir.name, save_dir=run_dir, id=run_id, resume="allow"))
            _ = loggers[-1].experiment  # connects now
        except wandb.errors.Error as error:
            raise UserError(
                f"Weights & Biases: {error}; run `wandb login`, or set WANDB_MODE=offline and `wandb sync` later"
            ) from error
    return loggers


def peak_memory_bytes() -> int:
    """Return a GPU's allocator's peak; on a CPU the largest resident size of this process."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    unit = 1 if sys.platform == "darwin" else 1024  # macOS counts bytes, Linux kibibytes
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def held_memory_bytes() -> int:
    """Return what the process has now, counted as ``peak_memory_bytes``."""
    if torch.cuda.is_available():
        return torch.cuda.memory_allocated()
    try:
        pages = Path("/proc/self/statm").read_text(encoding="ascii").split()[1]
    except OSError:  # not Linux: what it has had at most comes nearest
        return peak_memory_bytes()
    return int(pages) * resource.getpagesize()


def write_summary(run_dir: Path, summary: dict[str, Any], metrics: Metrics) -> None:
    """Draw the loss curves, write summary.json, the last file of a run, and print the lines that matter."""
    draw_losses(run_dir / LOSS_CURVE, metrics.rows, names=VALIDATIONS, title=str(summary["method"]))
    write_json(run_dir / SUMMARY, summary)
    peak, of_run, estimated = ((summary[f"{what}_memory_bytes"] or 0) / 2**30 for what in ("peak", "run", "estimated"))
    least = "" if torch.cuda.is_available() else "at least "
    lines = {
        label: f"{summary[f'{name}_before']:.4f} -> {summary[f'{name}_after']:.4f}"
        for name, label in VALIDATIONS.items()
    }
    lines |= {
        "trained": f"{summary['trainable_parameters']:,} parameters, {summary['adapter_bytes']:,} bytes on disk",
        "time": f"{summary['seconds']:.0f} s for {summary['steps']} steps, {summary['tokens_per_second']:.0f} real "
        f"tokens/s, {summary['padding']:.0%} padding, {summary['overhead']:.1%} outside forward and backward",
        "peak memory": f"{peak:.2f} GiB, {of_run:.2f} of them for this run"
        + (f" (estimated: {least}{estimated:.2f})" if estimated else ""),
        "loss curve": run_dir / LOSS_CURVE,
    }
    for name, text in lines.items():
        print(f"{name:<32} {text}")
