"""A run as people see it: metrics.csv, progress, pictures."""

import io
import json
import sys
from pathlib import Path

import pytest
from helpers import refusal, script

from lit_gpt.checkpoint import write_json
from lit_gpt.cli import main
from lit_gpt.report import COLUMNS, Metrics, Reporter, read_metrics

SETTINGS = {"io": {"tensorboard": False, "wandb": False}, "train": {"monitor": False}}


def write_run(folder: Path, losses: list[float]) -> Path:
    """A run folder with a validation every ten steps."""
    folder.mkdir(parents=True)
    metrics = Metrics(folder / "metrics.csv")
    for index, loss in enumerate(losses):
        metrics.write(step=10 * index, samples=0, tokens=0, seconds=0.0, val_loss=loss + 1, val_response_loss=loss)
    return folder


def test_metrics_are_written_on_where_the_folder_is_renamed(tmp_path):
    """A run ended at its next row."""
    folder = tmp_path / "run"
    folder.mkdir()
    metrics = Metrics(folder / "metrics.csv")
    metrics.write(step=1, loss=2.0)
    folder.rename(tmp_path / "renamed")
    metrics.write(step=2, loss=1.0)
    assert [row["step"] for row in read_metrics(tmp_path / "renamed" / "metrics.csv")] == [1, 2]


def test_metrics_are_cut_back_to_what_a_checkpoint_held(tmp_path):
    metrics = Metrics(tmp_path / "metrics.csv")
    metrics.write(step=1, loss=2.5, grad_norm=float("nan"))
    kept = metrics.text()
    metrics.write(step=2, loss=2.25)
    again = Metrics(tmp_path / "metrics.csv", kept)
    assert again.text() == kept and [row["step"] for row in again.rows] == [1]
    again.write(step=2, val_loss=2.0, val_response_loss=1.0)
    assert read_metrics(tmp_path / "metrics.csv")[1] == {"step": 2, "val_loss": 2.0, "val_response_loss": 1.0}
    assert again.text().splitlines()[0] == ",".join(COLUMNS)


def test_counters_keep_all_their_digits(tmp_path):
    metrics = Metrics(tmp_path / "metrics.csv")
    metrics.write(step=1234567, samples=12345678, tokens=2345678901, seconds=1.5, loss=1.23456789)
    assert metrics.text().splitlines()[1] == "1234567,12345678,2345678901,1.23457,,,1.5,,"
    row = read_metrics(tmp_path / "metrics.csv")[0]
    assert (row["step"], row["samples"], row["tokens"]) == (1234567, 12345678, 2345678901)


def test_json_holds_null_where_a_number_is_not_finite(tmp_path):
    """NaN is no JSON: other readers refuse the whole file."""
    write_json(tmp_path / "a.json", {"a": float("nan"), "b": [float("-inf"), 1, True, None, 0.1], "é": {"c": "NaN"}})
    content = json.loads((tmp_path / "a.json").read_text(encoding="utf-8"), parse_constant=pytest.fail)
    assert content == {"a": None, "b": [None, 1, True, None, 0.1], "é": {"c": "NaN"}}


def record(reporter: Reporter) -> None:
    """Twelve steps and a validation."""
    for step in range(1, 13):
        reporter.record(
            step=step, samples=step, tokens=100 * step, seconds=2.0 * step, loss=1.5, learning_rate=1e-3, grad_norm=1.0
        )
    reporter.record(step=12, samples=12, tokens=1200, seconds=24.0, val_loss=1.25, val_response_loss=1.0)
    reporter.close()


def test_without_a_terminal_progress_is_plain_lines(tmp_path, capsys):
    record(Reporter(tmp_path, settings=SETTINGS, n_steps=24))
    told, errors = capsys.readouterr()
    assert told.splitlines() == [
        "step 1/24  loss 1.5000  lr 1.00e-03  50 tokens/s  46 s left",
        "step 10/24  loss 1.5000  lr 1.00e-03  50 tokens/s  28 s left",
        "step 12/24  validation loss 1.2500, responses 1.0000",
    ]
    assert not errors


class Terminal(io.StringIO):
    """A stream that says it is one."""

    def isatty(self) -> bool:
        """Yes."""
        return True


def test_on_a_terminal_progress_is_a_bar(tmp_path, capsys, monkeypatch):
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    record(Reporter(tmp_path, settings=SETTINGS, n_steps=24))
    last = terminal.getvalue().split("\r")[-1]
    assert "12/24" in last and "loss 1.5000  lr 1.00e-03  50 tokens/s" in last
    assert capsys.readouterr().out.strip() == "step 12/24  validation loss 1.2500, responses 1.0000"


def test_runs_are_compared_in_one_picture(tmp_path, capsys):
    folders = [write_run(tmp_path / name, losses) for name, losses in (("a", [3.0, 2.0]), ("b", [3.0, 1.5]))]
    folders.append(write_run(tmp_path / "other" / "a", [3.0, 2.5]))
    picture = tmp_path / "compare.png"
    main(script("scripts/plot_runs.py"), ["--runs", json.dumps([*map(str, folders)]), "--out", str(picture)])
    told = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in told[:3]] == [str(folders[i]) for i in (1, 0, 2)]
    assert told[0].endswith("3.0000 -> 1.5000 at step 10")
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_the_folders_may_stand_first():
    as_flag = sys.modules[script("scripts/plot_runs.py").__module__].as_flag
    assert as_flag(["a", "b", "--out", "c.png"]) == ["--runs", '["a", "b"]', "--out", "c.png"]
    assert as_flag(["--help"]) == ["--help"]


@pytest.mark.parametrize(
    ("text", "message"),
    [(None, "is not a file; a run folder holds one"), ("a,b\n1,x\n", "is not a run's metrics.csv"),
     ("step,loss\n1,2\n", "has no val_response_loss yet")],
)  # fmt: skip
def test_what_is_no_run_is_refused(tmp_path, capsys, text, message):
    if text is not None:
        (tmp_path / "metrics.csv").write_text(text)
    assert message in refusal(capsys, "scripts/plot_runs.py", ["--runs", json.dumps([str(tmp_path)])])
