"""The sweep of learning rates: what counts as usable, and a sweep that stops, goes on, and keeps its settings."""

import json
import math
import shutil
from pathlib import Path

import pytest
import torch
from helpers import edit_json, refusal, same_result

from eval import lr_sweep
from eval.lr_sweep import degrees_per_step, mean_curve, setup, summarise, usable_decades
from lit_gpt.cli import main
from lit_gpt.ether import EtherConfig
from lit_gpt.files import locked
from lit_gpt.quantize import load_base
from lit_gpt.reflections import axis_angle
from lit_gpt.settings import IOArgs, Settings, TrainArgs


def test_decades_are_counted_along_straight_lines_between_the_rates():
    curve = {1e-4: 3.0, 1e-3: 2.0, 1e-2: 2.0, 1e-1: 4.0}
    assert usable_decades(curve, 2.0) == pytest.approx(1.0)
    assert usable_decades(curve, 2.5) == pytest.approx(0.5 + 1.0 + 0.25)
    assert usable_decades(curve, 9.0) == pytest.approx(3.0) and usable_decades(curve, 1.9) == 0.0
    for limit in (2.0, math.inf):  # nothing is known of the way to a run that diverged
        assert usable_decades({1e-3: 2.0, 1e-2: math.inf, 1e-1: math.inf}, limit) == 0.0


def test_a_step_turns_u_by_what_steps_of_the_rate_across_it_do():
    """At a rate of 0.1 it said 238 degrees."""
    torch.manual_seed(0)
    u = torch.empty(500, 144).uniform_(-1 / 24, 1 / 24)  # four blocks of a projection of 576
    across = torch.randn_like(u)
    across -= u * (u * across).sum(-1, keepdim=True) / (u * u).sum(-1, keepdim=True)
    for rate in (1e-3, 1e-2, 1e-1):
        turned = axis_angle(u, u - rate * across.sign()).rad2deg().mean()
        assert degrees_per_step("ether", rate, 576) == pytest.approx(turned.item(), rel=0.01)


def test_a_method_is_measured_by_the_best_of_all_and_by_its_own():
    losses = {("lora", 1e-3): [1.9, 2.1], ("lora", 1e-2): [2.0, None], ("oft", 1e-3): [2.5], ("oft", 1e-2): [2.52]}
    runs = [
        dict(method=method, rate=rate, seed=seed, response_loss=loss, loss=loss and loss / 2, untuned=3.0)
        | {"diverged": not loss}
        for (method, rate), values in losses.items()
        for seed, loss in enumerate(values)
    ]
    curves = {method: mean_curve(runs, method, "response_loss") for method in ("lora", "oft")}
    assert curves == {"lora": {1e-3: 2.0, 1e-2: math.inf}, "oft": {1e-3: 2.5, 1e-2: 2.52}}
    *_, lora, oft = summarise(runs).splitlines()
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in (lora, oft)]
    assert cells[0] == ["LoRA", "0.001", "2.0000", "1.900 to 2.100", "1.0000", "2", "0.0", "0.0"]
    assert cells[1] == ["OFT", "0.001", "2.5000", "2.500 to 2.500", "1.2500", "1", "0.0", "1.0"]


def flags(work: Path, out: Path, *more: str) -> list[str]:
    """Return the command line of a sweep of LoRA at one rate, two steps long."""
    given = ["--data_dir", str(work / "data"), "--out_dir", str(out), "--precision", "32-true", "--batch_size", "2"]
    given += ["--max_steps", "2", "--ether_nb", "2", "--oft_nb", "2", "--seeds", "[0]"]
    return [*given, "--methods", '["lora"]', "--rates", "[0.01]", *more]


def test_a_sweep_goes_on_adds_what_is_new_and_refuses_other_settings(work, tmp_path, capsys, monkeypatch):
    def sweep(*more: str) -> list[dict]:
        main(setup, flags(work, tmp_path / "out", *more))
        return json.loads((tmp_path / "out" / "runs.json").read_text())

    first = sweep("--methods", '["ether", "lora"]', "--rates", "[0.01]")
    assert [(run["method"], run["rate"]) for run in first] == [("ether", 0.01), ("lora", 0.01)]
    assert first[0]["degrees_per_step"] > 0 and first[1]["degrees_per_step"] is None
    trained = []
    loads = [lr_sweep.load_base]
    monkeypatch.setattr(lr_sweep, "load_base", lambda *given, **more: loads.append(1) or loads[0](*given, **more))
    monkeypatch.setattr(lr_sweep, "finetune", lambda its, **more: trained.append(its) or finetune(its, **more))
    both = sweep("--methods", '["ether", "lora"]', "--rates", "[0.01, 1e30]")  # fp32 overflows
    assert both[:2] == first and len(trained) == 2  # what was there did not run again
    assert loads[1:] == [1], "one base for all runs"
    assert [run["diverged"] for run in both[2:]].count(True) >= 1
    out = tmp_path / "out"
    assert {"loss.png", "weight_change.png", "sweep.csv", "sweep.md"} <= {path.name for path in out.iterdir()}
    assert len((out / "sweep.csv").read_text().splitlines()) == 5
    (out / "runs.json").write_text(json.dumps(both[:1]))  # stopped before the second run was noted
    assert sweep("--methods", '["ether", "lora"]', "--rates", "[0.01]") == both[:2]
    sweep("--methods", '["lora"]', "--rates", "[1e30]", "--out_dir", str(tmp_path / "lost"))
    assert (tmp_path / "lost" / "sweep.md").read_text() == "Every run diverged.\n"
    capsys.readouterr()
    with pytest.raises(SystemExit) as end:
        sweep("--methods", '["ether"]', "--max_steps", "3")
    assert end.value.code == 1 and "was begun with other settings: max_steps was 2, is 3. " in capsys.readouterr().err


finetune = lr_sweep.finetune


def test_what_cannot_be_swept_is_refused_before_the_first_run(work, tmp_path, capsys):
    """A rate of 0 was found after hours of other rates; what was written then refused the right command."""
    out = tmp_path / "out"
    for more, message in (
        (["--seeds", "[-1]"], '"seeds": Not of type NonNegativeInt: -1'),
        (["--methods", '["loar"]'], "'oft', 'lora']. Got value: loar"),
        (["--rates", "[0.01, 0, -1]"], '"rates": Not of type PositiveFloat: 0 does not conform to restriction v>0'),
        (["--rates", "[.inf]", "--seeds", "[4294967296]"], "--train.learning_rate must be positive, got inf; --seed"),
        (["--methods", '["lora", "ether"]', "--ether_nb", "7"], "7 blocks do not divide"),
        (["--max_steps", "1000"], "--max_steps 1000: the rows of "),
        (["--data_dir", str(tmp_path)], "holds no data_config.json"),
        (["--out_dir", str(work / "rows.json")], "rows.json is a file, a folder was expected"),
    ):
        assert message in refusal(capsys, "eval/lr_sweep.py", flags(work, out, *more))
    assert not out.exists()


def test_a_run_counts_once_and_one_that_diverges_in_its_last_step_counts_as_lost(work, tmp_path):
    """A rate or method given twice was counted twice, and 0.01 and 0.01000001 were one run."""
    out = tmp_path / "out"
    main(setup, flags(work, out, "--methods", '["lora", "lora"]', "--rates", "[1e-2, 0.01, 0.01000001]"))
    rows = [line.split(",") for line in (out / "sweep.csv").read_text().splitlines()[1:]]
    assert [row[1] for row in rows] == ["0.01", "0.01000001"] and rows[0][6] != rows[1][6]
    (out / "sweep.md").unlink()  # stopped between the run's note and its table
    main(setup, flags(work, out))
    assert "2 runs" in (out / "sweep.md").read_text()
    main(setup, flags(work, tmp_path / "lost", "--rates", "[1e30]", "--max_steps", "1"))
    assert (tmp_path / "lost" / "sweep.md").read_text() == "Every run diverged.\n"


def test_damaged_files_and_a_second_sweep_are_refused(work, tmp_path, capsys):
    out = tmp_path / "out"
    main(setup, flags(work, out))
    for name in ("runs.json", "settings.json"):
        good = (out / name).read_text()
        (out / name).write_text("")
        line = refusal(capsys, "eval/lr_sweep.py", flags(work, out, "--rates", "[0.02]"))
        assert f"{name} is not valid JSON" in line and (out / name).read_text() == ""
        (out / name).write_text(good)
    with locked(out, option="--out_dir"):
        line = refusal(capsys, "eval/lr_sweep.py", flags(work, out))
    assert "out is in use by process" in line and "give another --out_dir" in line
    data = shutil.copytree(work / "data", tmp_path / "data")
    edit_json(data / "data_config.json", n_rows=41)
    main(setup, flags(work, out, "--data_dir", str(data)))  # the same rows, elsewhere
    shutil.copy(data / "test.pt", data / "train.pt")
    line = refusal(capsys, "eval/lr_sweep.py", flags(work, out, "--data_dir", str(data), "--max_steps", "1"))
    assert "was begun with other settings: max_steps was 2, is 1; train.pt was " in line
    assert [path.name for path in (out / "runs").iterdir()] == ["lora-0.01-0"]


def test_runs_over_one_base_in_memory_leave_it_alone_and_are_those_that_load_their_own(work, tmp_path):
    base = load_base(work / "base", "32-true", None)
    before = {name: tensor.clone() for name, tensor in base.state_dict().items()}

    def run(name: str, adapter, **more) -> Path:
        io = IOArgs(train_data_dir=str(work / "data"), out_dir=str(tmp_path / name))
        train = TrainArgs(learning_rate=0.01, max_steps=3, global_batch_size=4, micro_batch_size=2)
        finetune(Settings(adapter=adapter, io=io, train=train, precision="32-true"), **more)
        return tmp_path / name

    for method in ("etherplusHH", "oft"):
        adapter = EtherConfig(method, 2)
        assert same_result(run(f"{method}-shared", adapter, base=base), run(f"{method}-own", adapter))
    assert base.state_dict().keys() == before.keys()
    assert all(torch.equal(base.state_dict()[name], tensor) for name, tensor in before.items())
    with pytest.raises(ValueError, match="full finetuning and --strategy fsdp would change a base in memory"):
        run("full", None, base=base)
