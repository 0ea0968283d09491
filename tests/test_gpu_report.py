"""The GPU report loses nothing: parts that fail, hang, die or lack something each give a line, and the others go on.

The parts themselves run in CI, by `scripts/gpu.sh --short`.
"""

import json
import math
import os
import signal
import subprocess
import sys
import time
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from helpers import ROOT

from eval import gpu_report
from eval.gpu_parts import BARS, Card, Row, compare, describe, in_turn, largest_error, seconds_of
from eval.gpu_report import FAULTS, PARTS, UNFINISHED, Part, draw, notes_on, receive, report_on, setup, show
from eval.gpu_runs import at_fitting_size, step_tables
from lit_gpt import GPT, Config

CPU = Card(torch.device("cpu"), torch.bfloat16, short=True)
GPU_CARD = Card(torch.device("cuda"), torch.bfloat16, short=False)


def two_rows(card):
    """A part that works."""
    yield Row("", "first", {"ms": 1234.5})
    yield Row("", "first", {"of copy": "85%"})
    yield "a note"
    yield Row("", "second", {"ms": 0.012345})


def one_row_and(then):
    """A part that measures one row, and then does what it should not."""

    def measure(card):
        yield Row("", "kept", {"ms": 1.0})
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


def test_a_part_that_goes_wrong_gives_a_line_keeps_its_rows_and_the_others_go_on(tmp_path, capfd):
    bad = {"b": fails, "c": needs_a_module, "d": dies, "e": hangs}
    parts = {name: Part(name, one_row_and(then), 1.0) for name, then in bad.items()}
    parts |= {"f": Part("f", two_rows, 1.0, ("no_such_package", "torch")), "g": Part("g", two_rows, 1.0)}
    start = time.monotonic()
    report = report_on(parts, tmp_path, minutes=0.25, short=True)
    assert time.monotonic() - start < 15
    notes = {name: part["notes"] for name, part in report["parts"].items()}
    assert notes["b"] == ["failed: ValueError: no such thing"]
    assert notes["c"] == ["left out: needs bitsandbytes, which is not installed"]
    assert len(notes["d"]) == len(notes["e"]) == len(notes["f"]) == 1
    assert "exit code -9" in notes["d"][0] and "stopped after" in notes["e"][0]
    assert notes["f"][0].startswith("left out: needs no_such_package; pip install")
    for name in bad:
        assert [row["label"] for row in report["parts"][name]["rows"]] == ["kept"], name
    assert len(report["parts"]["g"]["rows"]) == 3 and notes["g"] == ["a note"]
    assert [line[0] for line in notes_on(FAULTS, report)] == ["b", "d"]  # what is left out is no fault
    assert [line[0] for line in notes_on(UNFINISHED, report)] == ["e"]
    assert json.loads((tmp_path / "report.json").read_text()) == report
    shown = capfd.readouterr().out
    assert all(note in shown for part in notes.values() for note in part)


def test_the_json_is_there_after_each_part_and_what_is_stopped_leaves_no_process(tmp_path):
    """The second part looks at the file; the first one's sleeping child must be gone."""

    def reads(card):
        yield (tmp_path / "report.json").read_text()

    marker = "61.25"
    parts = {"a": Part("a", one_row_and(lambda: subprocess.run(["sleep", marker])), 1.0), "b": Part("b", reads, 4.0)}
    report = report_on(parts, tmp_path, minutes=0.1, short=True)
    assert json.loads(report["parts"]["b"]["notes"][0])["parts"]["a"]["rows"][0]["label"] == "kept"
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        with suppress(OSError):  # a process that has ended since
            assert marker.encode() not in path.read_bytes()


def test_what_merely_took_too_long_is_no_fault_and_is_named(tmp_path, monkeypatch, capsys):
    """Parts that were out of time stood under "Wrong here", with exit code 1 and without a word on what was missing."""
    tasks = {"packed": lambda: two_rows(None), "kill and resume": lambda: one_row_and(hangs)(None), "padded": fails}
    slow = Part("slow", lambda card: in_turn(card, tasks, seconds=0), 1.0)
    late = Part("late", lambda card: in_turn(replace(card, deadline=0.0), tasks, seconds=20), 1.0)
    monkeypatch.setattr(gpu_report, "PARTS", {"a": slow, "b": late})
    setup(["--minutes", "0.1", "--out_dir", str(tmp_path)])
    told = capsys.readouterr().err
    assert "Not finished (give more --minutes):" in told and "Wrong" not in told
    assert "a. stopped after 3 s; what" in told
    assert "b. left out for want of time: kill and resume, padded" in told


def test_an_earlier_report_is_never_written_over(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(gpu_report, "PARTS", {"a": Part("a", two_rows, 1.0)})
    monkeypatch.chdir(tmp_path)
    setup([])
    (made,) = Path("logs/gpu").iterdir()
    assert (made / "report.json").is_file() and f"results go to {made}" in capsys.readouterr().out
    with pytest.raises(SystemExit) as end:
        setup(["--out_dir", str(made)])
    assert end.value.code == 2 and f"{made} holds a report" in capsys.readouterr().err


def test_no_time_is_said():
    notes = list(receive(PARTS["a"], seconds=0.0, short=True, log=Path(os.devnull)))
    assert notes == ["left out: no time; give more --minutes"]


def test_rows_of_one_label_become_one_line():
    rows = [{"table": "", "label": row.label, "values": row.values} for row in two_rows(CPU) if isinstance(row, Row)]
    assert show(rows).splitlines() == [
        "|        |     ms | of copy |",
        "| ------ | -----: | ------: |",
        "| first  |  1,234 |     85% |",
        "| second | 0.0123 |         |",
    ]


def test_picture_says_of_what_it_is(tmp_path, monkeypatch):
    titles = []
    monkeypatch.setattr("matplotlib.axes.Axes.set_title", lambda axes, text, **_: titles.append(text))
    rows = [{"table": f"T = {T}", "label": "LoRA", "values": {"x LoRA r=8": 1.0}} for T in (256, 2048)]
    draw(tmp_path / "report.png", {"machine": "m", "parts": {"d": {"rows": rows}}})
    assert (tmp_path / "report.png").read_bytes().startswith(b"\x89PNG")
    assert titles[0] == "forward, µs: nothing to show" and "x LoRA r=8\nT = 2048" in titles


def test_an_old_card_takes_fp16_and_says_so(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (7, 5))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "an old card")
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (10e9, 16e9))
    monkeypatch.setattr("shutil.which", lambda name: None)
    card = Card.detect(short=False, seconds=9)
    assert (card.dtype, card.precision, card.short) == (torch.float16, "16-true", False)
    lines = list(describe(card))
    assert any("capability 7.5: bf16 is emulated" in line for line in lines)
    assert any("another process holds 6.0 GB" in line for line in lines)
    assert any("no C compiler" in line for line in lines)


def test_a_model_that_does_not_fit_loses_layers_and_says_so(monkeypatch):
    for name in ("empty_cache", "reset_peak_memory_stats"):
        monkeypatch.setattr(torch.cuda, name, lambda: None)
    config = Config(name="narrow", n_layer=32, n_head=2, n_embd=16, intermediate_size=32, vocab_size=16)
    n_bytes = 2 * sum(parameter.numel() for parameter in GPT(config).parameters())

    def measure(config):
        if config.n_layer > 6:
            raise torch.OutOfMemoryError
        yield Row("", config.name, {"layers": config.n_layer})

    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (12.5 / 32 * n_bytes / 0.85, 0))
    *notes, row = at_fitting_size(GPU_CARD, config, measure)
    assert [int(note.split()[0]) for note in notes] == [12, 6] and row.values == {"layers": 6}
    *_, last = at_fitting_size(GPU_CARD, config, lambda config: measure(replace(config, n_layer=7)))
    assert last == "not even one layer of narrow fits the memory that is free"


def test_exactness_is_measured_and_an_error_above_the_bar_is_told(monkeypatch):
    cases = [("ether", torch.float32, "eager"), ("oft, published layout", torch.bfloat16, "eager")]
    found = [row for case in cases for row in compare(CPU, *case)]
    assert [row.label for row in found] == [label for label, *_ in cases]
    errors = [float(text) for row in found for value in row.values.values() for text in value.split(" / ")]
    assert 0 < max(errors[:2]) < BARS[torch.float32] < min(errors[2:])  # of each its dtype's roundings
    monkeypatch.setitem(BARS, torch.float32, 1e-9)
    assert "ether, fp32, eager: WRONG by" in list(compare(CPU, *cases[0]))[-1]


def test_an_error_that_is_not_a_number_is_the_largest():
    one, nan = torch.ones(2), torch.tensor([1.0, torch.nan])
    assert math.isnan(largest_error([one, one], [nan, one])) and math.isnan(largest_error([one, one], [one, nan]))
    assert largest_error([one, 4 * one], [one, 5 * one]) == 0.25


def test_time_of_a_call_is_the_fastest_turns_share():
    assert 0.01 <= seconds_of(CPU, [lambda: time.sleep(0.01)] * 3, repeats=2) < 0.1


def test_results_of_a_turn_are_kept_until_its_end():
    """A result that is freed is written over by the next call, in the cache: no memory would be written."""
    alive, most = set(), []

    class Result:
        def __init__(self):
            alive.add(id(self))
            most.append(len(alive))

        def __del__(self):
            alive.discard(id(self))

    seconds_of(CPU, [Result] * 3, repeats=1)
    assert max(most) == 3 and not alive


def test_methods_that_cannot_be_compiled_in_time_are_named_and_nothing_is_lost():
    tiny = Config(name="tiny", n_layer=1, n_head=2, n_embd=16, intermediate_size=32, vocab_size=16)
    *rows, note = step_tables(replace(CPU, deadline=time.monotonic() + 20), tiny, lengths=(8,))
    assert note == "compiled: left out for want of time: frozen model, LoRA r=8, ETHER+ two-sided n=4"
    assert len(rows) == 6 and all(row.table.endswith("T = 8, eager") for row in rows)


def test_parts_that_cannot_run_hold_back_no_time(tmp_path, capsys):
    parts = {"a": Part("a", two_rows, 1.0), "b": Part("b", two_rows, 99.0, ("no_such_package",))}
    report_on(parts, tmp_path, minutes=1, short=True)
    assert "a. a (at most 60 s)" in capsys.readouterr().out


def test_a_report_that_is_terminated_takes_its_part_with_it(tmp_path):
    code = "import os, pathlib, subprocess\nfrom eval import gpu_report as report\n"
    code += f"begun = pathlib.Path({str(tmp_path / 'begun')!r})\n"
    code += "def hangs(card):\n    begun.write_text(str(os.getpid()))\n    yield str(subprocess.run(['sleep', '60']))\n"
    code += "report.PARTS = {'a': report.Part('a', hangs, 1.0)}\n"
    code += f"report.setup(['--parts', 'a', '--out_dir', {str(tmp_path)!r}])"
    running = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.DEVNULL)
    while not (tmp_path / "begun").exists() or not (pid := (tmp_path / "begun").read_text()):
        assert running.poll() is None
        time.sleep(0.05)
    running.terminate()
    assert running.wait() == 143
    with pytest.raises(ProcessLookupError):
        os.kill(int(pid), 0)


def test_report_needs_no_more_than_torch_and_lightning():
    """Its parts may; the first line of each says what is missing."""
    optional = "jsonargparse sentencepiece lm_eval peft bitsandbytes datasets triton".split()
    code = f"import sys\nsys.modules |= dict.fromkeys({optional})\nimport torch\n"
    # A process that has asked the driver for GPUs leaves its children without them.
    code += "def asked(*_): raise SystemExit('asked for GPUs')\n"
    code += "torch.cuda.is_available = torch.cuda.device_count = asked\nimport eval.gpu_report"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_unknown_parts_are_refused(capsys):
    with pytest.raises(SystemExit) as end:
        setup(["--parts", "axz"])
    assert end.value.code == 2 and "x, z unknown, expected some of abcdefgh" in capsys.readouterr().err
