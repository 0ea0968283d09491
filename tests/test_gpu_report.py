"""The GPU report loses nothing: what fails, hangs, dies or lacks something gives a line, and the others go on.

The cases themselves run in CI, by `scripts/gpu.sh --short`.
"""

import json
import os
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import pytest
import torch
from helpers import ROOT

from eval import gpu_cases, gpu_report
from eval.gpu_cases import Card, seconds_of
from eval.gpu_report import setup, show
from lit_gpt import GPT, Config

CPU = Card(torch.device("cpu"), "32-true", short=True)
GPU_CARD = Card(torch.device("cuda"), "bf16-true", short=False)


@pytest.fixture(autouse=True)
def own_signals():
    """Give SIGTERM back: the report's handler, left in this process, kept the pools of later tests from ending."""
    before = signal.getsignal(signal.SIGTERM)
    yield
    signal.signal(signal.SIGTERM, before)


def two_rows(card, name):
    """A case that works."""
    yield "", "first", {"ms": 1234.5}
    yield "", "first", {"of copy": "85%"}
    yield "", "second", {"ms": 0.012345}


def one_row_and(then):
    """A case that measures one row, and then does what it should not."""

    def measure(card, name):
        yield "", "kept", {"ms": 1.0}
        then()

    return measure


def fails() -> None:
    raise ValueError("no such\nthing")


def needs_a_module() -> None:
    raise ModuleNotFoundError("no", name="bitsandbytes")


def dies() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def hangs() -> None:
    subprocess.run(["sleep", "60"])


def report(monkeypatch, out_dir, parts, *flags: str) -> tuple[int, list[dict]]:
    """Run a report of these parts, each of weight 1; return its exit code and its lines."""
    monkeypatch.setattr(gpu_report, "PARTS", {name: (1.0, cases) for name, cases in parts.items()})
    code = 0
    try:
        setup(["--out_dir", str(out_dir), *flags])
    except SystemExit as end:
        code = end.code
    return code, list(map(json.loads, (out_dir / "report.jsonl").read_text().splitlines()))


def test_what_goes_wrong_gives_a_line_keeps_its_rows_and_the_others_go_on(tmp_path, capfd, monkeypatch):
    bad = {"b": fails, "c": needs_a_module, "d": dies, "e": hangs}
    parts = {name: {"one": one_row_and(then), "two": two_rows} for name, then in bad.items()} | {"g": {"one": two_rows}}
    start = time.monotonic()
    code, lines = report(monkeypatch, tmp_path, parts, "--minutes", "0.25")
    assert time.monotonic() - start < 15 and code == 1
    said = {line["part"]: line.get("note") or line["fault"] for line in lines if {"note", "fault"} & {*line}}
    assert said["b"] == "ValueError: no such thing"
    assert said["c"] == "left out: needs bitsandbytes, which is not installed"
    assert said["d"] == "exit code -9, without one; two"
    assert said["e"].startswith("stopped after") and said["e"].endswith(", without one; two")
    assert [line["part"] for line in lines if "fault" in line] == ["b", "d"]  # what is missing or late is no fault
    labels = {part: [line["label"] for line in lines if line["part"] == part and "label" in line] for part in parts}
    assert labels["d"] == labels["e"] == ["kept"] and labels["b"] == labels["c"] == ["kept", "first", "first", "second"]
    shown, told = capfd.readouterr()
    assert all(text in shown for text in said.values())
    assert "Wrong here:\n   b, one: ValueError: no such thing\n   d, end: exit code -9" in told


def test_rows_are_on_the_disk_at_once_and_what_is_stopped_leaves_no_process(tmp_path, monkeypatch):
    """A part that overran its time once lost what it had found."""

    def reads(card, name):
        yield "", (tmp_path / "report.jsonl").read_text(), {}

    marker = "61.25"
    slow = {"read": reads, "hang": one_row_and(lambda: subprocess.run(["sleep", marker])), "late": two_rows}
    code, lines = report(monkeypatch, tmp_path, {"a": {"first": two_rows, **slow}}, "--minutes", "0.05")
    (seen,) = [line["label"] for line in lines if line["case"] == "read" and "label" in line]
    assert seen.count("label") == 3 and code == 0
    assert lines[-1]["note"] == "stopped after 3 s, without hang; late" and lines[-2]["label"] == "kept"
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        with suppress(OSError):  # a process that has ended since
            assert marker.encode() not in path.read_bytes()


def test_an_earlier_report_is_never_written_over(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(gpu_report, "PARTS", {"a": (1.0, {"one": two_rows})})
    monkeypatch.chdir(tmp_path)
    setup([])
    (made,) = Path("logs/gpu").iterdir()
    assert (made / "report.jsonl").is_file() and f"results go to {made}" in capsys.readouterr().out
    with pytest.raises(SystemExit) as end:
        setup(["--out_dir", str(made)])
    assert end.value.code == 2 and f"{made} holds a report" in capsys.readouterr().err


def test_a_part_without_time_is_said(tmp_path, monkeypatch):
    code, lines = report(monkeypatch, tmp_path, {"a": {"one": two_rows}}, "--minutes", "0")
    assert code == 0 and lines[-1]["note"] == "stopped after 0 s, without one"


def test_time_that_a_part_leaves_goes_to_the_later_ones(tmp_path, monkeypatch, capsys):
    report(monkeypatch, tmp_path, {"a": {}, "b": {}}, "--minutes", "1")
    shown = capsys.readouterr().out
    assert "a (at most 30 s)" in shown and ("b (at most 60 s)" in shown or "b (at most 59 s)" in shown)


def test_rows_of_one_label_become_one_line():
    rows = [{"table": title, "label": label, "values": values} for title, label, values in two_rows(CPU, "")]
    assert show(rows).split("\n\n")[-1].splitlines() == [
        "|        |     ms | of copy |",
        "| ------ | -----: | ------: |",
        "| first  |  1,234 |     85% |",
        "| second | 0.0123 |         |",
    ]


def test_an_old_card_takes_fp16(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (7, 5))
    card = Card.detect(short=False, folder=Path())
    assert (card.options["dtype"], card.precision, card.short) == (torch.float16, "16-true", False)


def test_a_model_that_does_not_fit_loses_layers_and_says_so(monkeypatch):
    config = Config(name="narrow", n_layer=32, n_head=2, n_embd=16, intermediate_size=32, vocab_size=16)
    n_bytes = 2 * sum(parameter.numel() for parameter in GPT(config).parameters())
    monkeypatch.setattr(Config, "from_name", lambda name: config)
    for share, n_layer, name in ((12.5 / 32, 12, "12 layers of narrow"), (2.0, 32, "narrow")):
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda share=share: (1.8 * share * n_bytes, 0))
        assert (GPU_CARD.sizes().n_layer, GPU_CARD.sizes().name) == (n_layer, name)


def test_tests_that_fail_are_told(monkeypatch):
    failing = {"some": ("pytest", "tests/test_gpu.py", "-k", "no_such_test")}
    monkeypatch.setattr(gpu_cases, "TESTS", failing)
    with pytest.raises(RuntimeError, match="WRONG: tests failed"):
        list(gpu_cases.run_tests(CPU, "some"))


def test_time_of_a_call_is_its_share_of_a_turn():
    assert 0.01 <= seconds_of(CPU, [lambda: time.sleep(0.01)] * 3) < 0.1


def test_results_of_a_turn_are_kept_until_its_end():
    """A result that is freed is written over by the next call, in the cache: no memory would be written."""
    alive, most = set(), []

    class Result:
        def __init__(self):
            alive.add(id(self))
            most.append(len(alive))

        def __del__(self):
            alive.discard(id(self))

    seconds_of(CPU, [Result] * 3)
    assert max(most) == 3 and not alive


def test_every_part_names_its_cases():
    for weight, cases in gpu_cases.PARTS.values():
        assert weight > 0 and cases and all(map(callable, cases.values()))


def test_a_report_that_is_terminated_takes_its_part_with_it(tmp_path):
    code = "import os, pathlib, subprocess\nfrom eval import gpu_report as report\n"
    code += f"begun = pathlib.Path({str(tmp_path / 'begun')!r})\n"
    code += "def hangs(card, name):\n    begun.write_text(str(os.getpid()))\n    subprocess.run(['sleep', '60'])\n"
    code += "report.PARTS = {'a': (1.0, {'one': hangs})}\n"
    code += f"report.setup(['--parts', 'a', '--out_dir', {str(tmp_path / 'out')!r}])"
    running = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.DEVNULL)
    while not (tmp_path / "begun").exists() or not (pid := (tmp_path / "begun").read_text()):
        assert running.poll() is None
        time.sleep(0.05)
    running.terminate()
    assert running.wait() == 143
    with pytest.raises(ProcessLookupError):
        os.kill(int(pid), 0)


def test_report_needs_no_more_than_torch_and_lightning():
    """Its cases may; a line says what is missing."""
    optional = "jsonargparse sentencepiece lm_eval peft bitsandbytes datasets triton".split()
    code = f"import sys\nsys.modules |= dict.fromkeys({optional})\nimport torch\n"
    # A process that has asked the driver for GPUs leaves its children without them.
    code += "def asked(*_): raise SystemExit('asked for GPUs')\n"
    code += "torch.cuda.is_available = torch.cuda.device_count = asked\nimport eval.gpu_report"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_unknown_parts_are_refused(capsys):
    with pytest.raises(SystemExit) as end:
        setup(["--parts", "steps", "x"])
    assert end.value.code == 2 and "invalid choice: 'x'" in capsys.readouterr().err


def test_the_rows_that_runs_train_on_are_there():
    rows = [json.loads(line) for line in gpu_cases.REQUESTS.read_text(encoding="utf-8").splitlines()]
    assert len(rows) > 1000 and all(row["messages"][1]["role"] == "user" for row in rows)
