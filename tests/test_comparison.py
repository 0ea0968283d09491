"""The report that compares models, and the script that makes the paper's table with it."""

import json
import math
import os
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from helpers import ADAPTER, ROOT, edit_json, refusal, sample_text, save_samples, script, train
from lm_eval.api.instance import Instance

from eval import lm_eval_harness, report, tasks
from eval.harness_model import HarnessModel
from eval.report import TASKS, accuracy, read_documents, sample_numbers, task_numbers, with_mean
from lit_gpt.checkpoint import load_model
from lit_gpt.cli import main
from lit_gpt.data import load_split
from lit_gpt.files import locked
from lit_gpt.merge import merge_adapter
from lit_gpt.tokenizer import Tokenizer

REPORT = "eval/report.py"


pytestmark = pytest.mark.usefixtures("own_datasets_cache")


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory) -> Path:
    """A few rows of made-up ARC, laid out like the Hub."""
    root, texts = tmp_path_factory.mktemp("hub"), sample_text(200)
    folder = root / "allenai/ai2_arc/ARC-Challenge"
    folder.mkdir(parents=True)
    for split in ("train", "validation", "test"):
        choices = [{"text": texts[4 * i : 4 * i + 4], "label": list("ABCD")} for i in range(5)]
        rows = [
            {"id": str(i), "question": f"{texts[-i]}?", "choices": c, "answerKey": "A"} for i, c in enumerate(choices)
        ]
        (folder / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    files = [f"  - {{split: {s}, path: ARC-Challenge/{s}.jsonl}}\n" for s in ("train", "validation", "test")]
    head = "---\nconfigs:\n- config_name: ARC-Challenge\n  data_files:\n"
    (folder.parent / "README.md").write_text(head + "".join(files) + "---\n")
    return root


@pytest.fixture(scope="module")
def runs(work, tmp_path_factory) -> Path:
    """A folder with runs of ETHER and ETHER+, the latter merged, and unseen text."""
    folder = tmp_path_factory.mktemp("runs")
    for method in ("ether", "etherplusHH"):
        train(work, method, folder / method)
    merge_adapter("ether", folder / "etherplusHH" / ADAPTER, checkpoint_dir=work / "base", precision="32-true")
    (folder / "text.txt").write_text("\n\n".join(" ".join(sample_text(3, seed=seed)) for seed in range(12)))
    return folder


def flags(work: Path, runs: Path, out: Path, *more: str, **models: Path) -> list[str]:
    """Return the command line of a report on these models."""
    named = {"untuned": work / "base"} | models
    given = {"out_dir": out, "checkpoint_dir": work / "base", "text": f"['{runs / 'text.txt'}']"}
    given |= {"models": json.dumps({name: str(path) for name, path in named.items()})}
    return [word for name, value in given.items() for word in (f"--{name}", str(value))] + list(more)


def numbers(out: Path) -> dict[tuple[str, float], dict[str, dict]]:
    """Return report.json's numbers by column, of each model and strength."""
    return {
        (line["model"], line["strength"]): line["numbers"]
        for line in json.loads((out / "report.json").read_text())["models"]
    }


def test_the_report_measures_what_the_parts_measure(work, runs, data_dir, tmp_path, monkeypatch, capsys):
    """Its oracles: the run's own validation, the harness's rolling log-likelihood, the merged model, the base."""
    out, plus = tmp_path / "out", runs / "etherplusHH"
    more = ["--eval_tasks", "['arc_challenge']", "--data_dir", str(data_dir), "--val_data_dir", str(work / "data")]
    models = dict(plus=plus / ADAPTER, merged=plus / "merged", ether=runs / "ether" / ADAPTER)
    more += ["--strengths", "[0, 0.5, 1, 2]"]
    main(script(REPORT), arguments := flags(work, runs, out, *more, **models))
    found, text = numbers(out), (out / "report.md").read_text()
    plain = [("untuned", 1), ("merged", 1), ("ether", 1)]
    assert [*found] == [plain[0], *(("plus", strength) for strength in (1, 0, 0.5, 2)), *plain[1:]]
    assert {path.name for path in out.iterdir()} == {"results", "report.json", "report.md", "forgetting.png"}
    assert "| plus x 0.5 " in text and "| chance " in text and "not measured" not in text
    summary = json.loads((plus / "summary.json").read_text())
    for model, when in (("untuned", "before"), ("plus", "after"), ("merged", "after")):
        loss = math.log(found[model, 1]["perplexity on held-out rows"]["value"])
        assert loss == pytest.approx(summary[f"val_response_loss_{when}"], rel=1e-5)
    for column, number in found["plus", 1].items():
        if column == "trained":
            continue
        assert found["merged", 1][column]["value"] == pytest.approx(number["value"], abs=1e-5, rel=1e-4), column
        if "change" in column:
            assert found["plus", 0][column]["value"] == 0 != found["plus", 0.5][column]["value"]
            assert number["low"] < number["value"] < number["high"]
    base = HarnessModel(load_model(work / "base"), Tokenizer(work / "base"))
    texts = read_documents([str(runs / "text.txt")])
    rolling = base.loglikelihood_rolling([Instance("loglikelihood_rolling", {}, (each,), 0) for each in texts])
    per_token = -sum(rolling) / sum(len(base.tok_encode(each)) for each in texts)
    assert len(texts) == 12 and math.log(found["untuned", 1]["perplexity on text"]["value"]) == pytest.approx(
        per_token, rel=1e-5
    )
    assert found["plus", 1]["trained"]["value"] == summary["trainable_parameters"]
    line = next(line for line in json.loads((out / "report.json").read_text())["models"] if line["model"] == "plus")
    again = [word for name, value in line["flags"].items() for word in (f"--{name}", str(value))]
    again += [*more[:4], "--precision", "32-true", "--save_filepath", str(tmp_path / "again.json")]
    main(script("eval/lm_eval_harness.py"), again)
    again = json.loads((tmp_path / "again.json").read_text())["results"]["arc_challenge"]
    assert again["acc,none"] == found["plus", 1]["ARC"]["value"]
    assert again["acc_stderr,none"] == found["plus", 1]["ARC"]["error"]

    tasks = []
    monkeypatch.setattr(lm_eval_harness, "setup", lambda **options: tasks.append(options) or setup(**options))
    monkeypatch.setattr("eval.report.load_adapted_model", None)  # what was measured is not measured again
    setup = script("eval/lm_eval_harness.py")
    main(script(REPORT), arguments)
    assert not tasks and (out / "report.md").read_text() == text
    monkeypatch.setattr(lm_eval_harness, "setup", lambda **options: tasks.append(options) or fail(**options))

    def fail(**options):
        if options["checkpoint_dir"].name == "merged":
            raise torch.OutOfMemoryError("no room")
        setup(**options)

    line = refusal(capsys, REPORT, [*arguments, "--limit", "2"])
    assert line == "error: 1 measurements failed, first merged on arc_challenge: no room"
    assert [options["limit"] for options in tasks] == [2] * 4
    assert "ARC" not in numbers(out)["merged", 1] and "ARC" in numbers(out)["ether", 1], "the others went on"
    assert "- not measured: merged on arc_challenge: no room" in (out / "report.md").read_text()


def test_a_group_is_averaged_over_questions_and_over_subjects(capsys):
    def values(accuracy: float, error: float, n: int) -> dict:
        return {"acc,none": accuracy, "acc_stderr,none": error, "sample_len": n}

    leaves = {"mmlu_a": values(0.2, 0.03, 100), "mmlu_b": values(0.5, 0.04, 200), "mmlu_c": values(0.8, 0.12, 10)}
    tops = {
        "mmlu": values(0.41, 0.02, 310),
        "mmlu_stem": values(0.4, 0.1, 300),
        "truthfulqa_mc1": values(0.3, "N/A", 1),
    }
    children = {"mmlu": ["mmlu_stem", "mmlu_c"], "mmlu_stem": ["mmlu_a", "mmlu_b"]}
    found = task_numbers({"results": {**tops, **leaves}, "group_subtasks": children})
    assert {column: number["shown"] for column, number in found.items()} == {
        "MMLU": "41.00 ± 2.00", "MMLU over subjects": "50.00 ± 4.33", "TruthfulQA-1": "30.00",
    }  # fmt: skip
    four = {
        column: accuracy(share, 0.1) for share, (column, _) in zip((0.2, 0.4, 0.3, 0.5), TASKS.values(), strict=True)
    }
    assert with_mean(four)["mean"]["shown"] == "35.00" and [*with_mean(four)][:-1] == [*four]
    assert "mean" not in with_mean({"MMLU": four["MMLU"]})
    with pytest.raises(ValueError, match="odd has no accuracy"):
        task_numbers({"results": {"odd": {"bleu,none": 1.0}}, "group_subtasks": {}})


def test_the_interval_is_that_of_paired_differences():
    torch.manual_seed(0)
    first, noise = 100 + 30 * torch.randn(400), torch.randn(400)
    one = {"losses": first.tolist(), "tokens": [20] * 400, "key": 1}
    other = {"losses": (first + 1 + noise).tolist(), "tokens": [20] * 400, "key": 2}
    change = sample_numbers("text", other, one)["change on text"]
    assert change["value"] == pytest.approx((1 + noise.mean().item()) / 20, rel=1e-4)
    width = 2 * 1.96 * noise.std().item() / 20 / math.sqrt(400)  # the spread of the documents themselves drops out
    assert change["high"] - change["low"] == pytest.approx(width, rel=0.1)
    assert sample_numbers("text", one, one)["change on text"]["shown"] == ""
    assert "change on text" not in sample_numbers("text", other, None)
    with pytest.raises(ValueError, match="tokenizer or context differs"):  # the pairs were those of like length
        sample_numbers("text", {"losses": one["losses"], "tokens": [20] * 399 + [21]}, one)


def test_what_cannot_be_measured_is_refused_in_one_line(work, runs, tmp_path, capsys):
    (tmp_path / "rows.jsonl").write_text('{"text": "a"}\n{"content": "b"}\n')
    (tmp_path / "blank.txt").write_text(" \n\n ")
    for more, message in (
        (["--text", "null"], "give --models, and --eval_tasks, --text or --val_data_dir"),
        (["--text", f"['{tmp_path / 'rows.jsonl'}']"], "rows.jsonl does not hold what it should (KeyError: 'text')"),
        (["--text", f"['{tmp_path / 'blank.txt'}']"], "blank.txt: there is no text in it"),
        (["--text", "['none.txt']"], "No such file or directory: 'none.txt'"),
        (["--val_data_dir", str(tmp_path)], "holds no data_config.json; make it with"),
        (["--checkpoint_dir", "null"], "is an adapter: give the folder of its base model"),
    ):
        models = dict(plus=runs / "etherplusHH" / ADAPTER, gone=tmp_path / "gone.pth")
        line = refusal(capsys, REPORT, flags(work, runs, tmp_path / "out", *more, **models))
        assert message in line and "gone.pth is not a file" in line
    assert not (tmp_path / "out").exists()


def test_settings_are_checked_before_anything_is_measured(work, runs, tmp_path, capsys, monkeypatch):
    """A misspelt task was found after hours of the others; a strength that is no number as well."""
    common = tasks.task_manager(every_task=False)  # the index of all takes six seconds
    monkeypatch.setattr(tasks, "task_manager", lambda **_: common)
    plus = runs / "etherplusHH" / ADAPTER
    for more, models, message in (
        (["--eval_tasks", "['arc_chalenge']"], {}, "no task matches 'arc_chalenge'; the nearest: arc_challenge"),
        (["--limit", "0"], {}, '"limit": '),
        (["--strengths", "[0, .nan]"], {}, "--strength nan: expected a number"),
        (["--strengths", "[0]", "--text", "null"], {}, "--strengths is of no use without --text or --val_data_dir"),
        ([], {"run": plus.parent}, f"did you mean {plus} or {plus.parent / 'merged'}?"),
        (["--out_dir", str(plus)], {}, "is a file, a folder was expected"),
        (["--text", str(runs / "text.txt")], {}, 'a list, even of one, is written "[a, b]"'),
        (["--models", "plus=here"], {}, 'names are given as "{name: value, name: value}"'),
    ):
        named = {"plus": plus} | models
        assert message in refusal(capsys, REPORT, flags(work, runs, tmp_path / "out", *more, **named))
    assert not (tmp_path / "out").exists()


def test_any_name_and_a_damaged_measurement_leave_the_others_alone(work, runs, tmp_path, capsys):
    """A name of 200 letters was no file's, "$" began a formula, "_" a line without a legend, "|" a column."""
    names, out = ["x" * 200, "_a|b", "$\\frac$", "ä" * 40], tmp_path / "it's here"
    arguments = flags(work, runs, out, "--val_data_dir", str(work / "data"), **dict.fromkeys(names, work / "base"))
    arguments[arguments.index("--models") + 1] = json.dumps(
        dict.fromkeys(names, str(work / "base")), ensure_ascii=False
    )
    main(report.setup, arguments)
    lines = (out / "report.md").read_text().split("\n")
    assert [line.count(" | ") for line in lines[:6]] == [lines[0].count(" | ")] * 6 and "_a\\|b" in lines[3]
    assert (out / "forgetting.png").is_file() and len([*(out / "results").iterdir()]) == 2 * len(names)
    first, other = (next((out / "results").glob(f"{start}*-text-*")) for start in ("x", "_a"))
    for bad in ("", "null", "{}", '{"losses": [1]}', '{"results": {}}'):
        other.write_text(bad)
        line = refusal(capsys, REPORT, arguments)
        assert (
            line.startswith("error: 1 measurements failed, first _a|b on text: ") and "move it away: the same" in line
        )
        assert other.read_text() == bad and ("$\\frac$", 1) in numbers(out)
    first.write_text("[]")
    other.unlink()
    assert "1 measurements failed, first xxx" in refusal(capsys, REPORT, arguments)
    (out / "results" / ".ether-tmp-left").write_text("")  # of a report that was killed
    first.unlink()
    main(report.setup, arguments)
    assert not [*(out / "results").glob(".*")] and not [*out.glob(".*")]
    with locked(out, option="--out_dir"):
        assert "is in use by process" in refusal(capsys, REPORT, arguments)


def test_rows_without_a_response_count_for_nothing(work, runs, tmp_path, capsys):
    """A batch of them ended in a traceback."""
    data = shutil.copytree(work / "data", tmp_path / "data")
    rows = load_split(work / "data" / "test.pt")
    blank = [row | {"response": torch.zeros_like(row["response"])} for row in rows]
    found = []
    for samples in (rows, rows + blank, blank):
        (data / "test.pt").unlink()
        save_samples(samples, data / "test.pt")
        arguments = flags(work, runs, tmp_path / str(len(found)), "--val_data_dir", str(data), "--batch_size", "1")
        if samples is blank:
            assert "untuned on held-out rows: there is no token to predict" in refusal(capsys, REPORT, arguments)
        else:
            main(report.setup, arguments)
            found.append(numbers(tmp_path / str(len(found)))["untuned", 1]["perplexity on held-out rows"])
    assert found[0] == found[1]


def test_texts_are_cut_at_the_context_and_a_loss_beyond_all_numbers_is_shown(work, runs, tmp_path, capsys):
    (tmp_path / "text.txt").write_bytes(b"\xef\xbb\xbf" + b"a b c " * 400 + b"\r\n\r\nshort")
    assert [text[:1] for text in read_documents([str(tmp_path / "text.txt")])] == ["a", "s"], "no byte order mark"
    main(report.setup, flags(work, runs, tmp_path / "out", "--text", f"['{tmp_path / 'text.txt'}']"))
    assert "1 of 2 documents of --text are longer than the context: cut to 128 tokens" in capsys.readouterr().out
    found = sample_numbers("text", {"losses": [1e6], "tokens": [2]}, None)
    assert math.isfinite(found["perplexity on text"]["value"])


def test_measurements_are_kept_for_each_name_and_made_anew_where_the_model_changed(work, runs, tmp_path, monkeypatch):
    """ "a b" and "a_b" had one file; a changed lit_config.json was not seen."""
    base = shutil.copytree(work / "base", tmp_path / "base")
    models = {"a b": base, "a_b": work / "base", "ä/b": base}
    arguments, made = flags(work, runs, tmp_path / "out", untuned=base, **models), []
    load = report.load_adapted_model
    monkeypatch.setattr(
        report, "load_adapted_model", lambda *given, **more: made.append(given[0]) or load(*given, **more)
    )
    for expected in (4, 0):
        made.clear()
        main(report.setup, arguments)
        assert len(made) == expected
    edit_json(base / "lit_config.json", norm_eps=0.5)
    main(report.setup, arguments)
    assert made == [base] * 3
    values = {
        line["model"]: line["numbers"]["perplexity on text"]["value"]
        for line in json.loads((tmp_path / "out/report.json").read_text())["models"]
    }
    assert values["a b"] == values["ä/b"] != values["a_b"]


def test_the_papers_table_is_reproduced_row_by_row_and_goes_on(work, runs, data_dir, tmp_path, capsys):
    """The shell script's own commands, run in this process; finished rows are not run again, nor taken for others."""
    (tmp_path / "python").write_text('#!/usr/bin/env bash\nprintf "%s\\0" "$@" $\'\\n\' >>"$LOG"\n')
    (tmp_path / "python").chmod(0o755)
    out, text = tmp_path / "table \"5\\it's", shutil.copy(runs / "text.txt", tmp_path / "a \"text\\it's.txt")
    settings = dict(
        PYTHON=tmp_path / "python", LOG=tmp_path / "log", CHECKPOINT=work / "base", DATA=work / "data", OUT=out
    )
    settings |= dict(STEPS=2, ETHER_N=2, OFT_N=2, EVAL_DATA=data_dir, TASKS="['arc_challenge']", PRECISION="32-true")
    settings["TEXT"] = text

    def commands() -> list[list[str]]:
        (tmp_path / "log").write_text("")
        environment = os.environ | {name: str(value) for name, value in settings.items()}
        subprocess.run(
            ["bash", str(ROOT / "scripts/reproduce_table5.sh")], env=environment, check=True, capture_output=True
        )
        return [line.strip("\0").split("\0") for line in (tmp_path / "log").read_text().split("\n\0")[:-1]]

    for argument, code in (("--help", 0), ("--steps", 1)):  # --help began a day of training
        asked = subprocess.run(["bash", str(ROOT / "scripts/reproduce_table5.sh"), argument], capture_output=True)
        assert asked.returncode == code and b"set any of these:" in asked.stdout
    wanted = commands()
    rates = [command[command.index("--train.learning_rate") + 1] for command in wanted[1:-1:2]]
    assert rates == ["5e-4", "5e-4", "2e-3", "5e-3"]
    for name, *arguments in wanted:
        main(script(name), arguments)
        if name == wanted[0][0]:  # what it asks for can be had, which is seen before the training
            assert ("untuned", 1) in numbers(out / "report")
    assert [*numbers(out / "report")] == [(name, 1) for name in ("untuned", "LoRA", "OFT", "ETHER", "ETHER+")]
    assert commands() == [wanted[0], *wanted[1:-1:2], wanted[-1]]
    capsys.readouterr()
    main(script(wanted[1][0]), wanted[1][1:])
    assert "LoRA holds a finished run: nothing to do" in capsys.readouterr().out
    settings["STEPS"] = 3
    _, (name, *arguments), *_ = commands()
    line = refusal(capsys, name, arguments)
    assert "LoRA holds a finished run with other settings: train.max_steps was 2, is 3. " in line
    settings["STEPS"] = ""
    _, epoch, *_ = commands()
    assert epoch[epoch.index("--train.epochs") :][:4] == ["--train.epochs", "1", "--train.lr_warmup_steps", "1000"]
