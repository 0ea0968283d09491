"""Instruction data: rows encoded with the mask of what is learned, saved and read back.

It knows files, settings and samples; rows.py reads rows, encoding.py makes samples of them, batches.py uses them.

- Rows are encoded one by one, into arrays. Of a .json the whole list is read first (rows.py).
- A sample is `{"input_ids", "labels", "response"}`: ids (T,) int32; the same with -100 where nothing is learned (not
  shifted); (T,) bool, true on the response or the assistant's turns, whose loss is reported by itself.
"""

import random
import shlex
from collections.abc import Iterable, Mapping, Sequence
from itertools import chain, pairwise
from pathlib import Path

import torch
from torch import Tensor

from lit_gpt.checkpoint import CONFIG, load_config, load_state, save_state
from lit_gpt.config import Config
from lit_gpt.encoding import NAMES, Sample, Samples, encode_rows
from lit_gpt.errors import Problems, UserError, reading
from lit_gpt.files import Progress, prepare_out_dir, read_json, staged_dir, write_json
from lit_gpt.loss import IGNORE_INDEX
from lit_gpt.prompts import CHAT, check_style
from lit_gpt.rows import FIELDS, BadRows, read_rows
from lit_gpt.tokenizer import Tokenizer

BLANK = "left out, since they are blank"
PREVIEW_CHARACTERS = 1500
TRAIN_FILE, TEST_FILE, DATA_CONFIG = "train.pt", "test.pt", "data_config.json"
HOW_TO_PREPARE = "make it with `python scripts/prepare_json.py --destination_path DIR --checkpoint_dir DIR`"


def length(sample: Sample) -> int:
    """Return how many tokens a sample has."""
    return len(sample["input_ids"])


def check_ids(columns: Iterable[Tensor], tokenizer: Tokenizer, config: Config) -> None:
    """Raise ValueError where ids are among these that the model has no row for; a token in no text may have one."""
    rows = config.padded_vocab_size
    if tokenizer.vocab_size > rows:
        tokenizer.check_ids(chain.from_iterable(ids[ids >= rows].tolist() for ids in columns), rows)


# ---------------------------------------------------------------------------------------------------- preparing
def prepare(
    data_file_path: Path | str,
    *,
    destination_path: Path,
    checkpoint_dir: Path,
    prompt_style: str | None = None,
    test_split_fraction: float = 0.04,  # near the 2,000 of 52,000 rows that Alpaca's followers hold out
    mask_inputs: bool = False,
    max_seq_length: int | None = None,
    seed: int = 42,
    overwrite: bool = False,
    fields: Mapping[str, str] = FIELDS,
) -> None:
    """Write `train.pt`, `test.pt` and `data_config.json`, and say what became of the rows.

    Args:
        data_file_path: a .json, .jsonl or .csv file, or the https address of one.
        destination_path: the folder to write.
        checkpoint_dir: the model's folder, whose tokenizer encodes the data.
        prompt_style: a name of lit_gpt/prompts.py, alpaca by default; or chat, the model's template, as of messages.
        test_split_fraction: the share of rows that are held out for validation, drawn by seed. Rows of another file
            are prepared into a folder of their own, for --io.val_data_dir, with 0.999999: all rows but one.
        mask_inputs: learn the response alone, not the prompt. Of messages only the assistant's turns are learned.
        max_seq_length: samples are cut to this many tokens; by default the model's context.
        seed: draws the held-out rows.
        overwrite: write into a folder that holds prepared data.
        fields: what the file calls instruction, input and output.
    """
    destination_path = prepare_out_dir(destination_path, overwrite, names=(TRAIN_FILE, TEST_FILE, DATA_CONFIG))
    tokenizer = Tokenizer(checkpoint_dir)
    folder = tokenizer.dir.resolve()
    config = load_config(checkpoint_dir) if (folder / CONFIG).is_file() else None
    settings = {"checkpoint_dir": str(folder), "base_name": folder.name, "prompt_style": prompt_style}
    settings |= {"mask_inputs": mask_inputs, "max_seq_length": max_seq_length, "seed": seed}
    settings |= {"tokenizer_sha256": tokenizer.sha256, "source": str(data_file_path)}
    settings["test_split_fraction"] = test_split_fraction
    _fill_in(settings, tokenizer, context=config and config.block_size)
    samples = _encode_file(settings, tokenizer, fields)
    if config is not None and samples:
        check_ids([torch.frombuffer(samples.ids, dtype=torch.int32)], tokenizer, config)
    train, test = _select(settings, samples)
    with staged_dir(destination_path, overwrite) as staging:
        save_split(train, staging / TRAIN_FILE)
        save_split(test, staging / TEST_FILE)
        write_json(staging / DATA_CONFIG, settings)
    _report(settings, samples, mark_masked(tokenizer, train[0]))
    print(f"wrote {destination_path}")


def _fill_in(settings: dict, tokenizer: Tokenizer, *, context: int | None) -> None:
    """Put the defaults into the settings of a data folder, or raise ValueError with all that is wrong with them."""
    problems = Problems()
    length, fraction, style = (settings[name] for name in ("max_seq_length", "test_split_fraction", "prompt_style"))
    if length is None and context is None:
        problems.append(f"{tokenizer.dir} has no {CONFIG} that tells the model's context: give --max_seq_length")
    if length is not None and not 2 <= length <= (context or length):
        problems.append(f"--max_seq_length {length}: expected 2 to {context or 'the model context'}")
    if not 0 < fraction < 1:
        problems.append(f"--test_split_fraction {fraction}: expected a number between 0 and 1")
    if tokenizer.eos_id is None:
        problems.append(f"the tokenizer of {tokenizer.dir} has no EOS token: name one in tokenizer_config.json")
    if style is not None:
        problems.attempt(check_style, style, tokenizer)
    problems.check()
    settings["max_seq_length"] = length or context


def _encode_file(settings: dict, tokenizer: Tokenizer, fields: Mapping[str, str]) -> Samples:
    """Return the samples of all rows; the settings get the prompt style and the mask that the first row asks for.

    Raises:
        ValueError: rows that cannot be used, all of them.
    """
    problems, style = BadRows(settings["source"]), settings["prompt_style"]
    rows = read_rows(problems, fields)
    if first := next(rows, None):
        chat = "messages" in first[1]
        if chat and style not in (None, CHAT):
            raise UserError(f"--prompt_style {style} is for rows of instruction and output; messages take chat")
        settings["prompt_style"] = style = check_style(style or (CHAT if chat else "alpaca"), tokenizer)
        settings["mask_inputs"] |= chat
        samples = Samples(settings["max_seq_length"], learn_all=not settings["mask_inputs"])
        with Progress(chain([first], rows), desc="encoding", unit=" rows") as bar:
            encode_rows(tokenizer, bar, style=style, samples=samples, problems=problems)
        samples.notes[BLANK] += problems.blank
    if problems.rows:
        raise UserError(str(problems))
    return samples


def _select(settings: dict, samples: Samples) -> tuple[Samples, Samples]:
    """Return the samples to train on and to test with; the counts are added to the settings."""
    held_out = draw(list(dict.fromkeys(samples.rows)), settings["test_split_fraction"], seed=settings["seed"])
    train, test = samples.split(held_out)
    if not train or not test:
        left = f"of {samples.n_rows} rows {len(train)} are left to train on and {len(test)} to test with"
        limit = f"--max_seq_length {settings['max_seq_length']}"
        raise UserError(f"{settings['source']}: {left} at {limit}; give more rows or a larger length")
    settings |= {"n_rows": samples.n_rows, "n_train": len(train), "n_test": len(test)}
    lengths = percentiles(sorted(samples.full_sizes))
    settings |= {"n_cut": samples.n_cut, "n_dropped": samples.n_dropped, "lengths": lengths}
    return train, test


def draw(rows: Sequence[int], fraction: float, *, seed: int) -> set[int]:
    """Return a share of the rows, drawn by `seed`: at least one, and of several not all."""
    n_drawn = max(min(len(rows), 1), min(len(rows) - 1, round(len(rows) * fraction)))
    return {rows[i] for i in random.Random(seed).sample(range(len(rows)), n_drawn)}


def percentiles(lengths: Sequence[int]) -> dict[str, int]:
    """Return the 50th, 90th and 99th percentile and the largest of sorted lengths, by nearest rank."""
    last = len(lengths) - 1
    return {f"p{p}": lengths[round(last * p / 100)] for p in (50, 90, 99)} | {"max": lengths[last]}


def _report(settings: Mapping, samples: Samples, shown: str) -> None:
    """Say on the terminal what became of the rows, and show one of them."""
    limit, n_cut, n_dropped = (settings[name] for name in ("max_seq_length", "n_cut", "n_dropped"))
    print(f"{settings['n_rows']} rows: {settings['n_train']} to train on, {settings['n_test']} to test with")
    for note, count in (+samples.notes).items():
        print(f"{count} rows: {note}")
    print(f"tokens a row: {', '.join(f'{name} {length}' for name, length in settings['lengths'].items())}")
    print(f"cut at {limit} tokens: {n_cut}; dropped, because nothing to learn was left: {n_dropped}")
    print(f"the first sample, prompt style {settings['prompt_style']}:\n{shown[:PREVIEW_CHARACTERS]}")


def mark_masked(tokenizer: Tokenizer, sample: Sample) -> str:
    """Return the text of a sample, special tokens included, with what is not learned inside [[masked: ...]]."""
    ids, masked = sample["input_ids"].tolist(), (sample["labels"] == IGNORE_INDEX).tolist()
    borders = [0, *(i for i in range(1, len(ids)) if masked[i] != masked[i - 1]), len(ids)]
    # Differences of longer and longer texts, since a run decoded alone may lose its first space
    texts = [tokenizer.decode(ids[:border], skip_special=False) for border in borders]
    runs = [text[len(before) :] for before, text in pairwise(texts)]
    return "".join(f"[[masked: {run}]]" if masked[i] else run for i, run in zip(borders, runs, strict=False))


# ---------------------------------------------------------------------------------------------------- reading back
def save_split(samples: Samples, path: Path | str) -> None:
    """Write samples as one long tensor a name, and their lengths: 50,000 load in a tenth of a second so, not in 20."""
    save_state(samples.columns() | {"lengths": torch.tensor(samples.sizes).long()}, path)


def load_split(path: Path | str) -> list[Sample]:
    """Return the samples of `train.pt` or `test.pt`, memory-mapped.

    Raises:
        FileNotFoundError, ValueError: there is no such file, or it holds something else.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f"{path} is not a file; {HOW_TO_PREPARE}")
    content = load_state(path)
    with reading(path, HOW_TO_PREPARE):
        sizes = content["lengths"].tolist()
        columns = [content[name].split(sizes) for name in NAMES]
    return [dict(zip(NAMES, values, strict=True)) for values in zip(*columns, strict=True)]


def read_data_config(data_dir: Path | str) -> dict:
    """Return the settings that `prepare` wrote to `data_config.json`.

    Raises:
        FileNotFoundError: the folder holds no prepared data.
    """
    path = Path(data_dir) / DATA_CONFIG
    if not path.is_file():
        raise FileNotFoundError(f"{data_dir} holds no {DATA_CONFIG}; {HOW_TO_PREPARE}")
    return read_json(path)


def check_fit(base_dir: Path, config: Config, *, data: Mapping, samples: list[Sample]) -> None:
    """Raise where the data was not made for this model: another tokenizer, ids or samples beyond what it holds."""
    tokenizer = Tokenizer(base_dir)
    if tokenizer.sha256 != data["tokenizer_sha256"]:
        problem = f"the data was prepared with the tokenizer of {data['checkpoint_dir']}, {base_dir} has another one"
        raise UserError(f"{problem}; prepare it again with --checkpoint_dir {shlex.quote(str(base_dir))}")
    check_ids((sample["input_ids"] for sample in samples), tokenizer, config)
    longest = max(map(length, samples))
    if longest > config.block_size:
        raise UserError(f"samples of {longest} tokens do not fit {base_dir.name}'s context of {config.block_size}")


def check_val_data(val_data_dir: Path | str, train_data_dir: Path | str) -> None:
    """Raise where --io.val_data_dir was prepared otherwise than the training data: its losses would mean nothing."""
    data, other = read_data_config(train_data_dir), read_data_config(val_data_dir)
    styles = f"prompt style ({other['prompt_style']}, not {data['prompt_style']})"
    for key, what in {"tokenizer_sha256": "tokenizer", "prompt_style": styles}.items():
        if other[key] != data[key]:
            problem = f"--io.val_data_dir {val_data_dir} was prepared with another {what}"
            raise UserError(f"{problem} than --io.train_data_dir {train_data_dir}; prepare it again as that was")
