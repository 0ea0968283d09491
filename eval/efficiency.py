"""Print what a training step costs with each method, beside LoRA and the frozen model; write JSON and a bar chart.

    python eval/efficiency.py --model_name Llama-2-7b-hf --seq_length 256
    python eval/efficiency.py --model_name Llama-2-7b-hf --n_layer 2 --time true

Counting takes seconds and needs neither weights nor memory; ``costs.py`` says how it is done. Timing takes random
weights, which must fit the memory: where they do not, ``--n_layer`` times some of the layers.
"""

import gc
import math
import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # runs from any folder

import torch
from jsonargparse.typing import PositiveInt

from eval import costs
from eval.costs import FLOOR, LORA, METHOD_NAMES, Rows, choose_variants
from lit_gpt.adapter import TARGETS
from lit_gpt.checkpoint import check_checkpoint_dir, load_config
from lit_gpt.cli import main
from lit_gpt.config import Config
from lit_gpt.devices import PRECISIONS, choose_device, warn_of_slow_products
from lit_gpt.errors import UserError
from lit_gpt.files import prepare_out_dir, write_json
from lit_gpt.plots import picture
from lit_gpt.quantize import SCHEMES, check_quantize

# Table 1 of the paper (2405.20271): TFLOPs of a step of the published code, q and v adapted, and the length in tokens.
# It says "longest sample" for Phi-1.5; 1045 tokens is the one length at which our count of LoRA gives its 6.04, too.
PUBLISHED_TARGETS = ("query", "value")
PUBLISHED_LABELS = (LORA, "OFT n=256", *(f"{name} n={n}" for name in ("ETHER", "ETHER+ two-sided") for n in (1, 4, 32)))
PUBLISHED_TFLOPS = {
    "Llama-2-7b-hf": (256, (6.85, 25.26, 25.26, 12.07, 8.22, 51.65, 18.66, 9.04)),
    "phi-1_5": (1045, (6.04, 9.13, 9.13, 7.07, 6.71, 10.78, 7.69, 6.79)),
}
RESULTS, PICTURE = "efficiency.json", "flops.png"


def published_figures(config: Config, targets: Sequence[str]) -> tuple[int, dict[str, float]]:
    """Return the paper's length and TFLOPs by label; nothing where this is not a model, whole, that it counted."""
    for name, (length, figures) in PUBLISHED_TFLOPS.items():
        whole = config == replace(Config.from_name(name), name=config.name)
        if whole and {*targets} == {*PUBLISHED_TARGETS}:
            return length, dict(zip(PUBLISHED_LABELS, figures, strict=True))
    return 0, {}


def cost_columns(row: Mapping[str, Any], rows: Rows, length: int) -> dict[str, str]:
    """Return for people what was counted of a method, beside the floor, LoRA, and the paper's figure at its length."""
    floor, lora = rows[FLOOR], rows[LORA]
    return {
        "trained": f"{row['trained_parameters']:,}",
        "TFLOPs": f"{row['product_flops'] / 1e12:#.4g}",
        "of floor": f"{row['product_flops'] / floor['product_flops']:.2%}",
        "element-wise": f"{row['elementwise_flops'] / floor['product_flops']:.3%}",
        "saved, MB": f"{row['saved_bytes'] / 1e6:,.0f}",
        f"x {LORA}": f"{row['saved_bytes'] / lora['saved_bytes']:.3f}",
    } | ({f"published, T = {length}": str(row["published_tflops"] or "")} if length else {})


def draw_flops(path: Path, rows: Rows, *, title: str, published: bool) -> None:
    """Draw bars of a step's FLOPs: ours, and the published code's where they are of the same length."""
    rows = dict(rows)
    floor = rows.pop(FLOOR)["product_flops"] / 1e12
    series = {"this repository": [(row["product_flops"] + row["elementwise_flops"]) / 1e12 for row in rows.values()]}
    if published:
        series["the paper's code (its Table 1)"] = [row["published_tflops"] or math.nan for row in rows.values()]
    digits, thickness = 2 if floor >= 1 else 4, 0.8 / len(series)
    with picture(path, size=(7.5, 1.1 + 0.4 * len(rows))) as axes:
        for index, (name, values) in enumerate(series.items()):
            middles = [row - 0.4 + thickness * (index + 0.5) for row in range(len(rows))]
            axes.bar_label(axes.barh(middles, values, thickness, label=name), fmt=f"%.{digits}f", padding=3, fontsize=8)
        axes.axvline(floor, color="0.25", linestyle="--", linewidth=1, label=f"{FLOOR}: {floor:.{digits}f}")
        axes.set_yticks(range(len(rows)), list(rows))
        axes.set(xlabel="TFLOPs of a training step (forward and backward)", title=title)
        axes.invert_yaxis()
        axes.margins(x=0.1, y=0.01)


def read_config(model_name: str | None, checkpoint_dir: Path | None, n_layer: int | None, length: int) -> Config:
    """Return the sizes of the model that is asked for; raise UserError where there is none that takes the length."""
    if (model_name is None) == (checkpoint_dir is None):
        raise UserError("give --model_name NAME (`python scripts/download.py` lists them) or --checkpoint_dir DIR")
    config = Config.from_name(model_name) if model_name else load_config(check_checkpoint_dir(checkpoint_dir))
    if length > config.block_size:
        raise UserError(f"--seq_length {length}: {config.name} takes at most {config.block_size} tokens")
    return config if n_layer is None else replace(config, n_layer=n_layer)


def setup(
    *,
    model_name: str | None = None,
    checkpoint_dir: Path | None = None,
    seq_length: PositiveInt = 256,
    n_layer: int | None = None,
    targets: tuple[Literal[TARGETS], ...] = PUBLISHED_TARGETS,
    methods: tuple[Literal[tuple(METHOD_NAMES)], ...] = tuple(METHOD_NAMES),
    blocks: tuple[int, ...] = (1, 4, 32),
    oft_blocks: tuple[int, ...] = (256,),
    precision: Literal[tuple(PRECISIONS)] = "32-true",
    time: bool = False,
    rounds: PositiveInt = 15,
    compile: bool = False,
    quantize: Literal[tuple(SCHEMES)] | None = None,
    peft: bool = False,
    out_dir: Path | None = None,
    overwrite: bool = False,
) -> None:
    """Count, and time if asked, what a training step costs with each method, beside LoRA and the frozen model.

    Args:
        model_name: a known model, such as Llama-2-7b-hf or microsoft/phi-1_5; its weights are not needed.
        checkpoint_dir: in its place a converted model, whose sizes are read.
        seq_length: tokens of a step's one sequence.
        n_layer: layers, where not all of the model's; two of Llama-2-7B can be timed on a CPU.
        targets: what is adapted: some of query, key, value, projection, mlp, head.
        methods: some of ether, etherplus, etherplusHH, oft.
        blocks: the n of ETHER and ETHER+; one that does not divide the model's sizes is left out.
        oft_blocks: the n of OFT.
        precision: of the weights: 32-true, bf16-true or 16-true.
        time: also time steps, with random weights, and on a GPU measure peak memory.
        rounds: how often every method is timed, in turns.
        compile: time the step with compiled blocks, as training compiles them.
        quantize: time it with the base in 4 or 8 bits, as finetune/ether.py's flag; counts are of the whole base.
        peft: time PEFT's LoRA and OFT beside, on transformers' model; needs both, and a model like Llama.
        out_dir: gets efficiency.json and flops.png; by default logs/efficiency/NAME.
        overwrite: let it replace an efficiency.json and a flops.png that are there.
    """
    config = read_config(model_name, checkpoint_dir, n_layer, seq_length)
    factory = {"dtype": PRECISIONS[precision], "device": choose_device()}
    if time:
        check_timing(config, precision, quantize, **factory)
    elif compile or quantize or peft:
        raise UserError("--compile, --quantize and --peft say what is timed: give --time true too")
    folder = prepare_out_dir(out_dir or Path("logs/efficiency") / config.name, overwrite, names=(RESULTS, PICTURE))
    variants, left_out = choose_variants(config, targets=targets, methods=methods, blocks=blocks, oft_blocks=oft_blocks)
    title = f"{config.name}, layers: {config.n_layer}, T = {seq_length}, {' and '.join(targets)} adapted"
    print("\n".join((f"{title}, {precision}", *left_out, "")))
    rows, length = count_steps(config, variants, seq_length, dtype=factory["dtype"], targets=targets)
    draw_flops(folder / PICTURE, rows, title=title, published=length == seq_length)
    how = {"compiled": compile, "quantize": quantize}
    if time:
        for label, row in time_steps(config, variants, seq_length, rounds, peft=peft, **how, **factory).items():
            rows.setdefault(label, {"label": label}).update(row)
    settings = {"model": config.to_dict(), "seq_length": seq_length, "targets": targets, "precision": precision, **how}
    settings |= {"timed_on": costs.describe(factory["device"]) if time else None, "torch": torch.__version__}
    settings |= {"published_length": length, "left_out": left_out}
    write_json(folder / RESULTS, settings | {"rows": [*rows.values()]})
    print(f"\nSaved to {folder}: {RESULTS}, {PICTURE}")


def check_timing(config: Config, precision: str, quantize: str | None, **factory: Any) -> None:
    """Raise UserError where steps cannot be timed; ``factory``: dtype and device."""
    warn_of_slow_products(precision, factory["device"])
    check_quantize(quantize, precision)
    if costs.fitting(config, **factory) < 1:  # on a CPU the system would end the process without a word
        raise UserError("--time true: the weights do not fit the memory here; time fewer layers, with --n_layer 2")


def count_steps(
    config: Config, variants: costs.Variants, T: int, *, dtype: torch.dtype, targets: Sequence[str]
) -> tuple[Rows, int]:
    """Count a step of T tokens with each variant, print the table, and return its rows and the paper's length."""
    length, published = published_figures(config, targets)
    rows: Rows = {label: {"label": label, "published_tflops": published.get(label)} for label in variants}
    for label, adapter in variants.items():
        rows[label] |= costs.count(config, adapter, seq_length=T, dtype=dtype)
    print(costs.table({label: cost_columns(row, rows, length) for label, row in rows.items()}))
    print(
        f"\nfloor: the {costs.FLOOR} and one trained number, added to the embedding's output, so that each layer has a "
        "backward pass; an adapter on outputs alone needs none below the first layer, and may cost less"
    )
    return rows, length


def time_steps(
    config: Config, variants: costs.Variants, T: int, rounds: int, *, peft: bool, compiled: bool, quantize: str | None,
    **factory: Any,
) -> Rows:  # fmt: skip
    """Time a step of T tokens with each variant, print the table, return its rows; ``factory``: dtype and device."""
    idx = torch.randint(config.vocab_size, (1, T), device=factory["device"])
    models = costs.random_models(config, variants, compiled=compiled, scheme=quantize, **factory)
    times = costs.measure(models, idx, rounds)
    if peft:
        del models
        gc.collect()  # hooks make circles of them; one base at a time is to be on the device
        times |= costs.measure(costs.peft_models(config, **factory), idx, rounds)
    costs.add_ratios(times)
    how = f"{costs.describe(idx.device)}, {'compiled' if compiled else 'eager'}{', ' + quantize if quantize else ''}"
    print(f"\nForward and backward on {how}, medians (ranges) of {rounds} rounds in turns:\n")
    print(costs.table({label: costs.time_columns(row) for label, row in times.items()}))
    return times


if __name__ == "__main__":
    main(setup)
