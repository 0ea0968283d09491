"""Instruction data: rows encoded with the mask of what is learned, saved and read back.

- A row becomes parts of text, the response's (or the assistant's turns) and the others', and each part is encoded by
  itself: no token reaches across the start of a response, so what is trained on begins with exactly the ids that the
  model gets when it is asked (in one string, `Response:` and a response's first quotation mark are one token).
- A sample is `{"input_ids", "labels", "response"}`: ids (T,) int32; the same with -100 where nothing is learned (not
  shifted); (T,) bool, true on the response or the assistant's turns, whose loss is reported by itself.
"""

import random
from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path

import torch
from torch import Tensor

from lit_gpt.checkpoint import (
    CONFIG,
    load_config,
    load_state,
    prepare_out_dir,
    read_json,
    save_state,
    staged_dir,
    write_json,
)
from lit_gpt.errors import UserError
from lit_gpt.loss import IGNORE_INDEX
from lit_gpt.prompts import CHAT, check_style, plain, render_prompt
from lit_gpt.rows import FIELDS, read_rows
from lit_gpt.tokenizer import Tokenizer

Sample = dict[str, Tensor]
Part = tuple[str, bool]  # a text, and whether it is the response's

TEST_FRACTION = 0.04
"""Near the 2,000 of 52,000 rows that Alpaca's followers hold out."""
MANY_CUT = 0.05
PREVIEW_CHARACTERS = 1500
TRAIN_FILE, TEST_FILE, DATA_CONFIG = "train.pt", "test.pt", "data_config.json"
NAMES = ("input_ids", "labels", "response")
HOW_TO_PREPARE = "make it with `python scripts/prepare_json.py --destination_path DIR --checkpoint_dir DIR`"


def length(sample: Sample) -> int:
    """Its tokens."""
    return len(sample["input_ids"])


# ---------------------------------------------------------------------------------------------------- encoding
def conversation_parts(tokenizer: Tokenizer, messages: Sequence[dict]) -> tuple[list[Part], bool]:
    """A conversation's rendering, cut at the beginnings and ends of the assistant's turns.

    An assistant's turn begins where a prompt for it would end, and includes its end-of-turn token, but not the white
    space behind that.

    Returns:
        The parts, and whether EOS must be added because the template ends the last turn with nothing.

    Raises:
        ValueError: the template refuses the conversation, or renders its beginning differently when it goes on.
    """
    whole = tokenizer.render_chat(messages)
    parts, done, open_end = [], 0, False
    for i, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        before = tokenizer.render_chat(messages[:i], add_generation_prompt=True)
        until = whole if i + 1 == len(messages) else tokenizer.render_chat(messages[: i + 1])
        if not (until.startswith(before) and whole.startswith(until)):
            raise ValueError(
                f"the chat template of {tokenizer.dir} renders what comes before message {i + 1} or {i + 2} "
                "differently in the whole conversation, so the assistant's turns can't be told apart; use rows of "
                "instruction and output, or a template without that"
            )
        trimmed = until.rstrip()
        ended = trimmed.endswith(tokenizer.stop_tokens) and len(trimmed) > len(before)
        end = len(trimmed) if ended else len(until)
        parts += [(whole[done : len(before)], False), (whole[len(before) : end], True)]
        done, open_end = end, not ended and i + 1 == len(messages)
    return [*parts, (whole[done:], False)], open_end


def row_parts(tokenizer: Tokenizer, row: Mapping, *, style: str) -> tuple[list[Part], bool]:
    """The parts of any row, and whether EOS comes after them."""
    if "messages" in row:
        return conversation_parts(tokenizer, row["messages"])
    if style == CHAT:
        user = {"role": "user", "content": plain(row["instruction"], row["input"])}
        return conversation_parts(tokenizer, [user, {"role": "assistant", "content": row["output"]}])
    prompt = render_prompt(style, row["instruction"], row["input"])
    return [(prompt, False), (row["output"], True)], True


def encode_rows(
    tokenizer: Tokenizer, rows: Sequence[Mapping], *, style: str, mask_inputs: bool, source: Path | str = "data"
) -> list[Sample]:
    """Encode all rows in one batch.

    Args:
        tokenizer: the model's.
        rows: as `read_rows` gives them.
        style: the prompt style; "chat" for conversations.
        mask_inputs: learn the response alone; of conversations only the assistant's turns are learned anyway.
        source: what errors call the file.

    Raises:
        ValueError: a row's text can't be made; the message names the row.
    """
    parts, ends = [], []
    for number, row in enumerate(rows, start=1):
        try:
            row_part, end = row_parts(tokenizer, row, style=style)
        except ValueError as error:
            raise ValueError(f"{source}, row {number}: {error}") from error
        parts.append(row_part)
        ends.append(end)
    first = tokenizer.encode_batch([row_part[0][0] for row_part in parts])
    later = iter(tokenizer.encode_batch([text for p in parts for text, _ in p[1:]], continues=True))
    bos = [tokenizer.bos_id] if tokenizer.adds_bos and style != CHAT else []
    pieces, learned, sizes = [], [], []
    for row, row_part, head, end in zip(rows, parts, first, ends, strict=True):
        own = [(bos + head, row_part[0][1])] + [(next(later), is_response) for _, is_response in row_part[1:]]
        own += [([tokenizer.eos_id], True)] * end
        pieces += own
        learned += [is_response or not (mask_inputs or "messages" in row) for _, is_response in own]
        sizes.append(sum(len(ids) for ids, _ in own))
    return _make_samples(pieces, learned, sizes=sizes)


def _make_samples(
    pieces: Sequence[tuple[list[int], bool]], learned: Sequence[bool], *, sizes: Sequence[int]
) -> list[Sample]:
    """Samples of `sizes` tokens each, as views of one long tensor a name: quicker than three tensors a sample."""
    lengths = torch.tensor([len(ids) for ids, _ in pieces])
    ids = torch.tensor([i for ids, _ in pieces for i in ids], dtype=torch.int32)
    response = torch.tensor([is_response for _, is_response in pieces]).repeat_interleave(lengths)
    labels = ids.masked_fill(~torch.tensor(learned).repeat_interleave(lengths), IGNORE_INDEX)
    columns = [column.split(list(sizes)) for column in (ids, labels, response)]
    return [dict(zip(NAMES, values, strict=True)) for values in zip(*columns, strict=True)]


def cut(samples: Sequence[Sample], max_seq_length: int) -> tuple[list[Sample], int, int]:
    """The samples cut at `max_seq_length`, those with nothing left to learn dropped; how many were cut, and dropped."""
    n_cut = sum(length(sample) > max_seq_length for sample in samples)
    short = [{name: values[:max_seq_length] for name, values in sample.items()} for sample in samples]
    # The first position has nothing before it to be predicted from
    kept = [sample for sample in short if bool((sample["labels"][1:] != IGNORE_INDEX).any())]
    return kept, n_cut, len(short) - len(kept)


# ---------------------------------------------------------------------------------------------------- preparing
def prepare(
    data_file_path: Path | str,
    *,
    destination_path: Path,
    checkpoint_dir: Path,
    prompt_style: str | None = None,
    test_split_fraction: float | None = None,
    test_data_file_path: Path | None = None,
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
        prompt_style: alpaca (the default), plain, or chat (the model's chat template, which messages always take).
        test_split_fraction: the share of rows that are held out for validation, drawn by seed; 0.04 by default.
        test_data_file_path: a file with the rows to hold out, instead of a drawn share.
        mask_inputs: learn the response alone, not the prompt. Of messages only the assistant's turns are learned.
        max_seq_length: samples are cut to so many tokens; by default the model's context.
        seed: draws the held-out rows.
        overwrite: write into a folder that holds prepared data.
        fields: what the file calls instruction, input and output.

    Raises:
        FileNotFoundError, FileExistsError, ConnectionError, ValueError: one line that says what to do.
    """
    prepare_out_dir(destination_path, overwrite)
    tokenizer = Tokenizer(checkpoint_dir)
    _check_arguments(
        tokenizer,
        prompt_style,
        max_seq_length=max_seq_length,
        fraction=test_split_fraction,
        test_file=test_data_file_path,
    )
    sources = [data_file_path] + [test_data_file_path] * (test_data_file_path is not None)
    files = [read_rows(source, fields) for source in sources]
    style = _choose_style([row for rows in files for row in rows], prompt_style, tokenizer)
    mask_inputs = mask_inputs or "messages" in files[0][0]
    encoded = [
        encode_rows(tokenizer, rows, style=style, mask_inputs=mask_inputs, source=source)
        for rows, source in zip(files, sources, strict=True)
    ]
    facts = {
        **{"checkpoint_dir": str(tokenizer.dir.resolve()), "base_name": tokenizer.dir.resolve().name},
        **{"prompt_style": style, "mask_inputs": mask_inputs, "seed": seed, "tokenizer_sha256": tokenizer.sha256},
        **{"source": str(data_file_path), "test_source": str(test_data_file_path) if test_data_file_path else None},
        "max_seq_length": max_seq_length or load_config(checkpoint_dir).block_size,
        "test_split_fraction": None if test_data_file_path else test_split_fraction or TEST_FRACTION,
    }
    train, test = _select(encoded, facts)
    with staged_dir(destination_path, overwrite) as folder:
        save_split(train, folder / TRAIN_FILE)
        save_split(test, folder / TEST_FILE)
        write_json(folder / DATA_CONFIG, facts)
    _report(facts, tokenizer, train[0], destination_path)


def _select(encoded: Sequence[list[Sample]], facts: dict) -> tuple[list[Sample], list[Sample]]:
    """Cut the samples and hold some out, or take the second list for that; the counts are added to `facts`."""
    lengths = sorted(length(sample) for samples in encoded for sample in samples)
    kept, n_cut, n_dropped = zip(*(cut(samples, facts["max_seq_length"]) for samples in encoded), strict=True)
    fraction = facts["test_split_fraction"]
    train, test = split(kept[0], fraction, seed=facts["seed"]) if fraction else kept
    if not train or not test:
        raise ValueError(
            f"{facts['source']}: of {len(lengths)} rows {len(train)} are left to train on and {len(test)} to test "
            f"with at --max_seq_length {facts['max_seq_length']} ({sum(n_dropped)} have nothing to learn there), "
            "expected one of each at least; give more rows or a larger length"
        )
    facts |= {"n_rows": len(lengths), "n_train": len(train), "n_test": len(test)}
    facts |= {"n_cut": sum(n_cut), "n_dropped": sum(n_dropped), "lengths": percentiles(lengths)}
    return train, test


def _check_arguments(
    tokenizer: Tokenizer,
    style: str | None,
    *,
    max_seq_length: int | None,
    fraction: float | None,
    test_file: Path | None,
) -> None:
    """Raise ValueError with all that is wrong with the arguments, before any data is read."""
    problems = []
    has_config = (tokenizer.dir / CONFIG).is_file()
    context = load_config(tokenizer.dir).block_size if has_config else None
    if max_seq_length is None and context is None:
        problems.append(f"{tokenizer.dir} has no {CONFIG} that tells the model's context: give --max_seq_length")
    if max_seq_length is not None and not 2 <= max_seq_length <= (context or max_seq_length):
        problems.append(f"--max_seq_length {max_seq_length}: expected 2 to {context or 'the model context'}")
    if fraction is not None and not 0 < fraction < 1:
        problems.append(f"--test_split_fraction {fraction}: expected a number between 0 and 1")
    if fraction is not None and test_file is not None:
        problems.append("--test_split_fraction and --test_data_file_path exclude each other: give one")
    if tokenizer.eos_id is None:
        problems.append(f"the tokenizer of {tokenizer.dir} has no EOS token: name one in tokenizer_config.json")
    if style is not None:
        try:
            check_style(style, tokenizer)
        except ValueError as error:
            problems.append(str(error))
    if problems:
        raise ValueError("; ".join(problems))


def _choose_style(rows: Sequence[Mapping], style: str | None, tokenizer: Tokenizer) -> str:
    """The prompt style to use: conversations take the chat template, other rows Alpaca's where none was chosen."""
    n_chat = sum("messages" in row for row in rows)
    if n_chat not in (0, len(rows)):
        raise ValueError("one data file holds messages and the other instructions; give two of one kind")
    if n_chat and style not in (None, CHAT):
        raise ValueError(f"--prompt_style {style} is for rows of instruction and output; messages take chat")
    return check_style(style or (CHAT if n_chat else "alpaca"), tokenizer)


def split(samples: Sequence[Sample], fraction: float, *, seed: int) -> tuple[list[Sample], list[Sample]]:
    """Hold out a share of the samples, at least one, drawn by `seed`; both lists keep the order of the file."""
    n_test = min(len(samples), max(1, round(len(samples) * fraction)))
    held_out = set(random.Random(seed).sample(range(len(samples)), n_test))
    train = [sample for i, sample in enumerate(samples) if i not in held_out]
    return train, [samples[i] for i in sorted(held_out)]


def percentiles(lengths: Sequence[int]) -> dict[str, int]:
    """The 50th, 90th and 99th percentile and the largest of sorted lengths (each one of them, by nearest rank)."""
    last = len(lengths) - 1
    return {f"p{p}": lengths[round(last * p / 100)] for p in (50, 90, 99)} | {"max": lengths[last]}


def _report(facts: Mapping, tokenizer: Tokenizer, sample: Sample, destination_path: Path) -> None:
    """Say on the terminal what became of the rows, and show one of them."""
    lengths, limit = facts["lengths"], facts["max_seq_length"]
    print(f"{facts['n_rows']} rows: {facts['n_train']} to train on, {facts['n_test']} to test with")
    print(f"tokens a row: {', '.join(f'{name} {length}' for name, length in lengths.items())}")
    print(f"cut at {limit} tokens: {facts['n_cut']}; dropped, because nothing to learn was left: {facts['n_dropped']}")
    if facts["n_cut"] > MANY_CUT * facts["n_rows"]:
        share = facts["n_cut"] / facts["n_rows"]
        print(f"{share:.0%} of the rows were cut; --max_seq_length {lengths['p99']} would keep 99% whole")
    shown = mark_masked(tokenizer, sample)
    print(f"the first sample, prompt style {facts['prompt_style']}:\n{shown[:PREVIEW_CHARACTERS]}")
    if len(shown) > PREVIEW_CHARACTERS:
        print(f"... ({len(shown) - PREVIEW_CHARACTERS} more characters)")
    print(f"wrote {destination_path}")


def mark_masked(tokenizer: Tokenizer, sample: Sample) -> str:
    """The text of a sample, special tokens included, with what is not learned inside [[masked: ...]]."""
    ids, masked = sample["input_ids"].tolist(), (sample["labels"] == IGNORE_INDEX).tolist()
    borders = [0, *(i for i in range(1, len(ids)) if masked[i] != masked[i - 1]), len(ids)]
    # Differences of longer and longer texts, since a run decoded alone may lose its first space
    texts = [tokenizer.decode(ids[:border], skip_special=False) for border in borders]
    runs = [text[len(before) :] for before, text in pairwise(texts)]
    return "".join(f"[[masked: {run}]]" if masked[i] else run for i, run in zip(borders, runs, strict=False))


# ---------------------------------------------------------------------------------------------------- reading back
def save_split(samples: Sequence[Sample], path: Path | str) -> None:
    """Write samples as one long tensor a name, and their lengths: 50,000 load in a tenth of a second so, not in 20."""
    columns = {name: torch.cat([sample[name] for sample in samples]) for name in NAMES}
    save_state(columns | {"lengths": torch.tensor(list(map(length, samples)))}, path)


def load_split(path: Path | str) -> list[Sample]:
    """The samples of `train.pt` or `test.pt`, memory-mapped.

    Raises:
        FileNotFoundError, ValueError: there is no such file, or it holds something else.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f"{path} is not a file; {HOW_TO_PREPARE}")
    content = load_state(path)
    try:
        sizes = content["lengths"].tolist()
        columns = [content[name].split(sizes) for name in NAMES]
    except (LookupError, AttributeError, RuntimeError, TypeError, ValueError) as error:
        raise UserError(f"{path} does not hold prepared data; {HOW_TO_PREPARE}") from error
    return [dict(zip(NAMES, values, strict=True)) for values in zip(*columns, strict=True)]


def read_data_config(data_dir: Path | str) -> dict:
    """What `prepare` noted in `data_config.json`.

    Raises:
        FileNotFoundError: the folder holds no prepared data.
    """
    path = Path(data_dir) / DATA_CONFIG
    if not path.is_file():
        raise FileNotFoundError(f"{data_dir} holds no {DATA_CONFIG}; {HOW_TO_PREPARE}")
    facts = read_json(path)
    texts = ("prompt_style", "checkpoint_dir", "tokenizer_sha256")
    if not isinstance(facts, dict) or not all(isinstance(facts.get(name), str) for name in texts):
        raise UserError(f"{path} does not say what prepared data is; {HOW_TO_PREPARE}")
    return facts
