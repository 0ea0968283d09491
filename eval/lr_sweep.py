"""Sweep the learning rate of several methods, with seeds, on one model and data set: which rates work, and how many.

    python eval/lr_sweep.py --data_dir checkpoints/ORG/NAME/alpaca --out_dir sweeps/alpaca \
        --methods "['ether', 'etherplusHH', 'oft', 'lora']" --rates "[1e-3, 3.16e-3, 1e-2]" --seeds "[0, 1, 2]"

Each run is one of ``finetune``, in a folder under runs/ and with the same rows in the same order for one seed. The same
command goes on where it was stopped, and may name further methods, rates and seeds. From runs.json, which grows by an
entry a run, come sweep.csv, sweep.md and two pictures.

A method's *usable range* are the decades of learning rate in which a run keeps at least 90% of the best loss reduction
of all methods, along straight lines between the measured rates (mean over seeds, logarithm of the rate); its *own
range* is the same for the method's own best. A run that diverges keeps nothing.
"""

import math
import sys
from collections.abc import Mapping, Sequence
from itertools import pairwise, product
from pathlib import Path
from statistics import fmean
from typing import Any, Literal

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # runs from any folder

from jsonargparse.typing import NonNegativeInt, PositiveFloat

from eval.costs import METHOD_NAMES, table
from lit_gpt.cli import main
from lit_gpt.devices import choose_device
from lit_gpt.errors import Problems, UserError, reading
from lit_gpt.ether import METHODS, EtherConfig
from lit_gpt.files import finite, locked, read_json, remove_leftovers, write_json, write_text
from lit_gpt.lora import LoraConfig
from lit_gpt.model import GPT
from lit_gpt.plots import picture
from lit_gpt.quantize import load_base
from lit_gpt.report import read_metrics
from lit_gpt.run_folder import MONITOR, SUMMARY, changes, flatten
from lit_gpt.settings import EvalArgs, IOArgs, Plan, Settings, TrainArgs
from lit_gpt.train import Diverged, finetune

RUNS, SETTINGS, TABLE, CSV = "runs.json", "settings.json", "sweep.md", "sweep.csv"
PICTURES = {
    "response_loss": ("loss.png", "response loss after training (nats per token)"),
    "weight_change": ("weight_change.png", "relative change of the adapted weights"),
}
LOSSES = {"untuned": "val_response_loss_before", "response_loss": "val_response_loss_after", "loss": "val_loss_after"}
COLUMNS = ("method", "rate", "seed", "degrees_per_step", "response_loss", "loss", "weight_change", "diverged")
KEPT = 0.9
"""Share of the best loss reduction that a usable rate keeps."""
NAMES = METHOD_NAMES | {"lora": "LoRA"}
Method = Literal[tuple(NAMES)]
Run = Mapping[str, Any]


def setup(
    *,
    data_dir: str,
    out_dir: Path,
    checkpoint_dir: str | None = None,
    methods: tuple[Method, ...] = ("ether", "etherplusHH", "oft", "lora"),
    rates: tuple[PositiveFloat, ...] = (1e-4, 3.16e-4, 1e-3, 3.16e-3, 1e-2, 3.16e-2, 1e-1),
    seeds: tuple[NonNegativeInt, ...] = (0, 1, 2),
    max_steps: int = 150,
    batch_size: int = 8,
    ether_nb: int = 4,
    oft_nb: int = 4,
    lora_r: int = 8,
    precision: str = "bf16-true",
) -> None:
    """Sweep the learning rate of several methods.

    Args:
        data_dir: Folder that a prepare script wrote.
        out_dir: Folder of the sweep; one that was begun goes on.
        checkpoint_dir: The base model; by default the one the data was prepared with.
        methods: Of ether, etherplus, etherplusHH, oft and lora.
        rates: Peak learning rates.
        seeds: Each starts the adapters and orders the data another way.
        max_steps: Optimizer steps of a run.
        batch_size: Samples of a step, in one pass.
        ether_nb: Blocks of ETHER and ETHER+.
        oft_nb: Blocks of OFT.
        lora_r: Rank of LoRA.
        precision: As in finetune/ether.py.
    """
    rates, seeds = [*map(float, rates)], [*map(int, seeds)]  # YAML does not know jsonargparse's kinds of number
    adapters: dict[str, Any] = {"lora": LoraConfig(r=lora_r)}
    adapters |= {name: EtherConfig(name, oft_nb if kind.matrices else ether_nb) for name, kind in METHODS.items()}
    train = dict(max_steps=max_steps, global_batch_size=batch_size, micro_batch_size=batch_size, monitor=True)
    common = dict(eval=EvalArgs(interval=max_steps), precision=precision, resume=True)
    every: dict[tuple[str, float, int], Settings] = {}
    for seed, rate, method in product(seeds, rates, methods):
        folder = str(out_dir / "runs" / f"{method}-{rate}-{seed}")
        io = IOArgs(train_data_dir=data_dir, checkpoint_dir=checkpoint_dir, out_dir=folder)
        own = dict(adapter=adapters[method], train=TrainArgs(learning_rate=rate, **train), io=io, seed=seed)
        every[method, rate, seed] = Settings(**own, **common)

    problems = Problems()  # all of them, before the first run
    plan, *_ = [problems.attempt(Plan, every[method, rates[0], seeds[0]]) for method in methods]
    enough = not plan or plan.n_steps == max_steps
    problems.expect(enough, f"--max_steps {max_steps}: the rows of {data_dir} end before; give fewer, or prepare more")
    problems.check()
    fixed = dict(precision=precision, **train) | plan.input_hashes | {name: vars(adapters[name]) for name in methods}
    with locked(out_dir, option="--out_dir"):
        remove_leftovers(out_dir)
        before = read_json(out_dir / SETTINGS) if (out_dir / SETTINGS).exists() else {}
        if changed := changes(flatten(before), flatten(before | fixed)):
            raise UserError(f"{out_dir} was begun with other settings: {changed}. Choose another --out_dir")
        write_json(out_dir / SETTINGS, before | fixed)
        print(f"\n{run_missing(out_dir, every, plan.base_dir)}\nwrote {out_dir}")


def run_missing(out_dir: Path, every: Mapping[tuple[str, float, int], Settings], base_dir: Path) -> str:
    """Make the runs that are not noted yet, over one base in memory; return the table of all.

    Args:
        out_dir: of the sweep.
        every: settings of the runs that are asked for, by method, rate and seed.
        base_dir: folder of the base.
    """
    runs = read_json(out_dir / RUNS) if (out_dir / RUNS).exists() else []
    done = {(run["method"], run["rate"], run["seed"]) for run in runs}
    wanted = {key: settings for key, settings in every.items() if key not in done}
    base = None
    for number, ((method, rate, seed), settings) in enumerate(wanted.items(), start=1):
        base = base or load_base(base_dir, settings.precision, None, device=choose_device())
        print(f"\nrun {number} of {len(wanted)}: {NAMES[method]}, rate {rate:g}, seed {seed}", flush=True)
        run = dict(method=method, rate=rate, seed=seed)
        run["degrees_per_step"] = degrees_per_step(method, rate, base.config.q_size)
        runs.append(finite(run | train_once(settings, base)))
        write_json(out_dir / RUNS, runs)
        report(out_dir, runs)
    return report(out_dir, runs)


def degrees_per_step(method: str, rate: float, q_size: int) -> float | None:
    """Return the degrees by which one Adam step at this rate turns a query's u at its start; None without vectors.

    Adam moves each entry by about the rate, so a block of b by rate sqrt(b), across u; u is drawn from (-1/sqrt(s),
    1/sqrt(s)), s the projection's size, so its block is sqrt(b / 3s) long. The block's size cancels.
    """
    has_vectors = method in METHODS and not METHODS[method].matrices
    return math.degrees(math.atan(rate * math.sqrt(3 * q_size))) if has_vectors else None


def train_once(settings: Settings, base: GPT) -> dict[str, Any]:
    """Train over a base in memory; return what runs.json says: losses, mean change of the adapted weights."""
    folder = Path(str(settings.io.out_dir))
    try:
        finetune(settings, base=base)  # a run that is done is not done again: the sweep was stopped before noting it
    except Diverged as error:
        print(f"diverged: {error}")
        return dict.fromkeys((*LOSSES, "weight_change")) | {"diverged": True}
    with reading(folder):
        summary, moved = read_json(folder / SUMMARY), read_metrics(folder / MONITOR)
        found = {name: summary[its] for name, its in LOSSES.items()}
        found["weight_change"] = fmean(row["weight_change"] for row in moved if row["step"] == moved[-1]["step"])
    if found["untuned"] is None:
        raise UserError(f"{folder}: the untuned model has no response loss; are there responses in the held-out rows?")
    return found | {"diverged": found["response_loss"] is None}  # no number, in the last step alone


# ------------------------------------------------------------------------------------------------------- reporting
def by_rate(runs: Sequence[Run], method: str, column: str) -> dict[float, list[Any]]:
    """Return a method's values, one a seed, by rate, in order; None where a run diverged."""
    rates = sorted({run["rate"] for run in runs if run["method"] == method})
    return {r: [run[column] for run in runs if (run["method"], run["rate"]) == (method, r)] for r in rates}


def mean_curve(runs: Sequence[Run], method: str, column: str) -> dict[float, float]:
    """Return a method's mean over seeds by rate, in order; infinite where a run diverged."""
    return {r: math.inf if None in values else fmean(values) for r, values in by_rate(runs, method, column).items()}


def usable_decades(curve: Mapping[float, float], limit: float) -> float:
    """Return the decades of learning rate along which a curve, straight between its points, is at most ``limit``."""
    total = 0.0
    for (left, a), (right, b) in pairwise(sorted(curve.items())):
        low, high = sorted((a, b))
        if math.isfinite(high):  # nothing is known of the way to a run that diverged
            # from the good end to where the line crosses the limit
            share = 1.0 if high <= limit else (limit - low) / (high - low or 1)
            total += max(0.0, share) * math.log10(right / left)
    return total


def report(out_dir: Path, runs: Sequence[Run]) -> str:
    """Write table, CSV file and pictures of the runs there are; return the table."""
    summary = summarise(runs)
    write_text(out_dir / CSV, as_csv(runs) + "\n")
    write_text(out_dir / TABLE, summary + "\n")
    kept = [run for run in runs if not run["diverged"]]
    for column, (name, label) in PICTURES.items() if kept else ():
        draw(out_dir / name, runs, column=column, label=label, top=kept[0]["untuned"])
    return summary


def as_csv(runs: Sequence[Run]) -> str:
    """Return a line a run."""
    cells = [["" if run[name] is None else str(run[name]) for name in COLUMNS] for run in runs]
    return "\n".join(map(",".join, [COLUMNS, *cells]))


def summarise(runs: Sequence[Run]) -> str:
    """Return a line a method in Markdown: its best rate and loss there, seeds, usable range and own range."""
    untuned = next((run["untuned"] for run in runs if not run["diverged"]), None)
    if untuned is None:
        return "Every run diverged."
    losses = {method: mean_curve(runs, method, "response_loss") for method in dict.fromkeys(r["method"] for r in runs)}
    best, lines = min(min(curve.values()) for curve in losses.values()), {}
    for method, curve in losses.items():
        rate = min(curve, key=curve.__getitem__)
        at_best, of_all = (by_rate(runs, method, column)[rate] for column in ("response_loss", "loss"))
        line = {"best rate": f"{rate:g}", "response loss": "diverged"}
        if None not in at_best:
            line |= {"response loss": f"{curve[rate]:.4f}", "over seeds": f"{min(at_best):.3f} to {max(at_best):.3f}"}
            line["loss"] = f"{fmean(of_all):.4f}"
        line["seeds"] = f"{len(at_best)}"
        for column, loss in {"usable, decades": best, "own range, decades": curve[rate]}.items():
            line[column] = f"{usable_decades(curve, untuned - KEPT * (untuned - loss)):.1f}"
        lines[NAMES[method]] = line
    return f"Response loss, untuned {untuned:.4f}; {len(runs)} runs\n\n{table(lines)}"


def draw(path: Path, runs: Sequence[Run], *, column: str, label: str, top: float) -> None:
    """Draw a column against the learning rate: mean over seeds, a band from the least to the most."""
    with picture(path, size=(7.5, 4.5)) as axes:
        for method in dict.fromkeys(run["method"] for run in runs):
            kept = {rate: values for rate, values in by_rate(runs, method, column).items() if None not in values}
            mean, least, most = ([*map(reduce, kept.values())] for reduce in (fmean, min, max))
            (line,) = axes.plot(list(kept), mean, marker="o", ms=4, label=NAMES[method])
            axes.fill_between(list(kept), least, most, color=line.get_color(), alpha=0.2)
        axes.set(xscale="log", xlabel="peak learning rate", ylabel=label)
        if column == "weight_change":
            axes.set_yscale("log")
        else:  # how far above the untuned model a run ends says nothing
            axes.axhline(top, color="grey", lw=1, ls="--", label="untuned")
            least = min(run[column] for run in runs if run[column] is not None)
            if least < top:
                axes.set_ylim(least - 0.05 * (top - least), top + 0.15 * (top - least))


if __name__ == "__main__":
    main(setup)
