"""The GPU report loses nothing: what fails, hangs, dies or lacks something gives a line, and the others go on.

A stand-in for python plays the commands here; CI runs them, by `scripts/gpu.sh --short`.
"""

import json
import os
import re
import signal
import subprocess
import time
from pathlib import Path

import pytest
import torch
from helpers import ROOT, script

from eval.bandwidth import seconds_of
from lit_gpt.checkpoint import load_model
from lit_gpt.cli import main
from lit_gpt.data import prepare

CPU = torch.device("cpu")
STAND_IN = """#!/bin/bash
case "$*" in
*find_spec*) exit 0 ;;
*get_device_capability*) [ -n "$CARD" ] && echo "$CARD" ;;
*bandwidth.py*) echo kept; exit 3 ;;
*"--peft true"*) echo "ModuleNotFoundError: No module named 'peft'"; exit 1 ;;
*--compile*) echo kept; kill -9 $$ ;;
*nf4*) echo "error: --quantize needs bitsandbytes: pip install it"; exit 1 ;;
*make_random_base*) touch "$BEGUN"; sleep "${HANG:-0}" ;;
*) echo "ran $*" ;;
esac
"""


@pytest.fixture
def environment(tmp_path) -> dict[str, str]:
    """An environment whose python plays the commands; CARD is a GPU's capability and free MiB, HANG seconds."""
    python = tmp_path / "python"
    python.write_text(STAND_IN)
    python.chmod(0o755)
    return os.environ | {"PYTHON": str(python), "CARD": "", "BEGUN": str(tmp_path / "begun")}


def report(environment: dict[str, str], out_dir: Path, *flags: str) -> subprocess.CompletedProcess:
    """Run a report; its lines are in report.txt."""
    command = ["bash", str(ROOT / "scripts" / "gpu.sh"), "--out_dir", str(out_dir), *flags]
    return subprocess.run(command, env=environment, capture_output=True, text=True)


def test_what_goes_wrong_gives_a_line_keeps_its_output_and_the_others_go_on(environment, tmp_path):
    done = report(environment, tmp_path / "out", "--short")
    said = dict(line.split(": ") for line in (tmp_path / "out" / "report.txt").read_text().splitlines())
    assert said["kernels"].startswith("FAILED with 3")
    assert said["compiled"].startswith("FAILED with 137")
    assert said["peft"].startswith("left out, a package") and said["nf4"].startswith("left out, a package")
    assert all(
        said[name].startswith("done after") for name in ("eager", "base", "data", "fp64", "packed-checkpointing")
    )
    assert (tmp_path / "out" / "kernels.txt").read_text() == (tmp_path / "out" / "compiled.txt").read_text() == "kept\n"
    assert done.returncode == 1 and "error: failed, see their .txt: kernels compiled" in done.stderr
    assert all(f"{name}: {text}" in done.stdout for name, text in said.items()) and "kept" in done.stdout


def test_parts_are_chosen(environment, tmp_path):
    done = report(environment, tmp_path / "out", "--short", "--parts", "training", "exactness", "--minutes", "1")
    said = [line.split(": ")[0] for line in (tmp_path / "out" / "report.txt").read_text().splitlines()]
    assert done.returncode == 0 and said == ["base", "data", "packed-checkpointing", "fp64"]


@pytest.mark.parametrize(
    ("card", "told"),
    [
        ("9 80000", "--model_name Llama-2-7b-hf --n_layer 32 .*--precision bf16-true"),
        ("7 15000", "--model_name Llama-2-7b-hf --n_layer 20 .*--precision 16-true"),  # old and small
        ("", "--model_name SmolLM2-135M-Instruct --n_layer 1 .*--precision 32-true"),
    ],
)
def test_the_card_decides_sizes_and_precision(environment, tmp_path, card, told):
    report(environment | {"CARD": card}, tmp_path / "out", "--parts", "steps")
    assert any(re.search(told, path.read_text()) for path in (tmp_path / "out").glob("*.txt"))


def test_an_earlier_report_is_never_written_over(environment, tmp_path):
    report(environment, tmp_path / "out", "--short", "--parts", "exactness")
    done = report(environment, tmp_path / "out", "--short", "--parts", "kernels")
    assert done.returncode == 1 and f"{tmp_path / 'out'} holds a report" in done.stderr
    assert not (tmp_path / "out" / "kernels.txt").exists()


def test_a_step_that_hangs_is_stopped_with_what_it_started(environment, tmp_path):
    """Time is what is left of all: a step has 150 seconds at most."""
    slow = tmp_path / "gpu.sh"
    (tmp_path / "environment.sh").write_text((ROOT / "scripts" / "environment.sh").read_text())
    slow.write_text((ROOT / "scripts" / "gpu.sh").read_text().replace("limit=150", "limit=2"))
    command = ["bash", str(slow), "--short", "--parts", "training", "--out_dir", str(tmp_path / "out")]
    done = subprocess.run(command, env=environment | {"HANG": "61.5"}, capture_output=True, text=True)
    base, data, _ = (tmp_path / "out" / "report.txt").read_text().splitlines()
    assert base.startswith("base: stopped, too slow, after") and data.startswith("data: done") and done.returncode == 0
    assert not subprocess.run(["pgrep", "-f", "sleep 61.5"], capture_output=True).stdout


def test_steps_without_time_are_said(environment, tmp_path):
    done = report(environment, tmp_path / "out", "--short", "--minutes", "0")
    lines = (tmp_path / "out" / "report.txt").read_text().splitlines()
    assert done.returncode == 0 and len(lines) == 9 and all("not run, the time is over" in line for line in lines)


@pytest.mark.parametrize(
    ("flags", "told"),
    [
        (["--parts", "steps", "x"], "no part x of the report"),
        (["--minutes", "x"], "--minutes takes a whole number"),
        (["--tiny"], "unknown argument --tiny"),
    ],
)
def test_mistakes_end_in_one_line(environment, tmp_path, flags, told):
    done = report(environment, tmp_path / "out", *flags)
    assert done.returncode == 1 and told in done.stderr and len(done.stderr.splitlines()) == 1
    assert not (tmp_path / "out").exists()


def test_a_report_that_is_terminated_takes_its_step_with_it(environment, tmp_path):
    command = ["bash", str(ROOT / "scripts" / "gpu.sh"), "--short", "--parts", "training", "--out_dir", str(tmp_path)]
    running = subprocess.Popen(command, env=environment | {"HANG": "61.25"}, stdout=subprocess.DEVNULL)
    while not (tmp_path / "begun").exists():
        assert running.poll() is None
        time.sleep(0.05)
    running.send_signal(signal.SIGTERM)
    assert running.wait(timeout=20) == 143
    assert not subprocess.run(["pgrep", "-f", "sleep 61.25"], capture_output=True).stdout


def test_time_of_a_call_is_its_share_of_a_turn():
    assert 0.01 <= seconds_of([lambda: time.sleep(0.01)] * 3, CPU) < 0.1


def test_results_of_a_turn_are_kept_until_its_end():
    """A result that is freed is written over by the next call, in the cache: no memory would be written."""
    alive, most = set(), []

    class Result:
        def __init__(self):
            alive.add(id(self))
            most.append(len(alive))

        def __del__(self):
            alive.discard(id(self))

    seconds_of([Result] * 3, CPU)
    assert max(most) == 3 and not alive


def test_the_random_base_can_be_trained_on(tmp_path, capsys):
    flags = ["--model_name", "pythia-14m", "--precision", "32-true", "--out_dir", str(tmp_path)]
    main(script("scripts/demo/make_random_base.py"), flags)
    assert load_model(tmp_path).config.n_layer == 6
    assert len(json.loads((tmp_path / "rows.json").read_text())) > 1000
    prepare(tmp_path / "rows.json", destination_path=tmp_path / "data", checkpoint_dir=tmp_path, max_seq_length=256)
    assert (tmp_path / "data" / "train.pt").is_file()
