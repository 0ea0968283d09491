"""Preparing data: rows of every kind and format, the mask, the counts, the files, and every refusal."""

import contextlib
import csv
import http.client
import json
import random
import shutil
import tracemalloc
import urllib.error
import urllib.request

import pytest
import torch
from helpers import encode_rows, sample_text, save_samples

from lit_gpt.batches import add_response_targets
from lit_gpt.batches import collate as make_batch
from lit_gpt.cli import main
from lit_gpt.data import draw, load_split, mark_masked, prepare, read_data_config
from lit_gpt.encoding import Samples
from lit_gpt.errors import UserError
from lit_gpt.loss import IGNORE_INDEX
from lit_gpt.prompts import encode_prompt, render_prompt
from lit_gpt.rows import BadRows, read_rows
from lit_gpt.tokenizer import Tokenizer
from scripts import prepare_alpaca, prepare_dolly, prepare_json

ROWS = [
    {"instruction": "Name the river.", "input": "", "output": "the stone"},
    {"instruction": "Add.", "input": "1 and 2", "output": '"three"'},
    {"instruction": "Keep quiet.", "input": "", "output": ""},
]
CHAT = [
    {"role": "system", "content": "You are old."},
    {"role": "user", "content": "the"},
    {"role": "assistant", "content": "two"},
    {"role": "user", "content": "a"},
    {"role": "assistant", "content": "new"},
]
LLAMA_2 = (
    "{% for m in messages %}{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('roles must alternate') }}{% endif %}"
    "{% if m.role == 'user' %}{{ bos_token + '[INST] ' + m.content + ' [/INST]' }}"
    "{% else %}{{ ' ' + m.content + ' ' + eos_token }}{% endif %}{% endfor %}"
)


def many_rows(n, *, seed=0):
    """`n` rows of made-up text."""
    rng, lines = random.Random(seed), sample_text(300, seed=seed)
    return [{"instruction": rng.choice(lines), "input": rng.choice(["", *lines[:3]]), "output": rng.choice(lines)}
            for _ in range(n)]  # fmt: skip


def write(path, rows):
    """Write rows as the file's suffix says."""
    if path.suffix == ".json":
        path.write_text(json.dumps(rows))
    elif path.suffix == ".jsonl":
        path.write_text("\n".join(map(json.dumps, rows)) + "\n\n")
    else:
        with path.open("w", newline="") as file:
            writer = csv.DictWriter(file, list(rows[0]))
            writer.writeheader()
            writer.writerows(rows)
    return path


def call(script, *flags):
    """Run a script's `setup` behind the real command line."""
    main(script.setup, [str(flag) for flag in flags])


def failure(capsys, script, *flags):
    """The one line on stderr with which a script refuses."""
    with pytest.raises(SystemExit) as end:
        call(script, *flags)
    assert end.value.code in (1, 2)
    text = capsys.readouterr().err
    assert text.count("\n") == 1
    return text


def read(path, *args):
    """The rows of a file; raises what is wrong with any."""
    problems = BadRows(path)
    rows = [row for _, row in read_rows(problems, *args)]
    if problems.rows:
        raise UserError(str(problems))
    return rows


def encode(tokenizer, rows, **options):
    """The samples of rows."""
    return list(encode_rows(tokenizer, enumerate(rows, start=1), **options))


def targets_text(tokenizer, sample):
    """Return the part that is learned, as text."""
    return tokenizer.decode(sample["labels"][sample["labels"] != IGNORE_INDEX], skip_special=False)


# ---------------------------------------------------------------------------------------------------- rows
@pytest.mark.parametrize("suffix", ["json", "jsonl", "csv"])
def test_all_formats_give_the_same_rows(tmp_path, suffix):
    rows = [*ROWS, {"instruction": "a\n\nb, 'c' \u2028 d", "input": 'é, "x"\ny', "output": "z" * 200_000}]
    assert read(write(tmp_path / f"data.{suffix}", rows)) == rows


def test_input_may_be_missing_or_null_and_other_names_may_be_told(tmp_path):
    path = write(tmp_path / "data.json", [{"q": "the", "a": "two", "category": 1}, {"q": "a", "input": None, "a": ""}])
    assert read(path, {"instruction": "q", "output": "a"}) == [
        {"instruction": "the", "input": "", "output": "two"},
        {"instruction": "a", "input": "", "output": ""},
    ]


def test_a_mapped_field_must_occur_and_two_take_no_column_together(tmp_path):
    """A typo emptied the input of every row."""
    path = write(tmp_path / "d.json", [{"instruction": "a", "context": "b", "output": "c"}])
    with pytest.raises(UserError, match=r"d.json: no row has 'contxt', which --fields names"):
        read(path, {"input": "contxt"})
    chat = write(tmp_path / "c.json", [{"messages": [{"role": "user", "content": "a"}]}])
    with pytest.raises(UserError, match=r"c.json: no row has 'q', which --fields names"):
        read(chat, {"instruction": "q"})
    row = {"instruction": "a", "output": "c"}
    some = write(tmp_path / "s.json", [row, row | {"b": "b"}])
    assert [row["input"] for row in read(some, {"input": "b"})] == ["", "b"]
    for fields in ({"input": "output"}, {"input": "q", "output": "q"}, {"instruction": "input", "input": "input"}):
        with pytest.raises(UserError, match="--fields takes two texts from one column"):
            read(path, fields)
    path = write(tmp_path / "f.json", [{"input": "d", "output": "e", "system": ""}])
    assert read(path, {"instruction": "input"}) == [{"instruction": "d", "input": "", "output": "e"}]
    path = write(tmp_path / "g.json", [{"instruction": "d", "output": "e", "system": "f"}])
    assert read(path, {"input": "system"}) == [{"instruction": "d", "input": "f", "output": "e"}]


def test_parts_of_text_and_sharegpts_names_are_read(tmp_path):
    parts = [{"type": "text", "text": text} for text in ("a", " b")]
    row = {"conversations": [{"from": "system", "value": "s"}, {"from": "human", "value": parts},
                             {"from": "gpt", "value": "c", "weight": 0}]}  # fmt: skip
    (found,) = read(write(tmp_path / "d.json", [row]))
    assert [(m["role"], m["content"]) for m in found["messages"]] == [
        *(("system", "s"), ("user", "a b"), ("assistant", "c"))
    ]
    assert found["messages"][2]["weight"] == 0


def test_a_carriage_return_alone_ends_a_line_of_csv(tmp_path):
    """Excel writes "CSV (Macintosh)" so; inside quotation marks it is text."""
    (tmp_path / "d.csv").write_bytes(b'instruction,output\rthe,two\r"a\rb","c\r\nd"\r')
    rows = [("the", "two"), ("a\rb", "c\r\nd")]
    assert [(row["instruction"], row["output"]) for row in read(tmp_path / "d.csv")] == rows


def test_blank_lines_before_the_header_are_passed_over(tmp_path):
    (tmp_path / "d.csv").write_text("\n\ninstruction,output\nthe,two\n")
    assert read(tmp_path / "d.csv") == [{"instruction": "the", "input": "", "output": "two"}]


@pytest.mark.parametrize("address", ["https://[a/d.json", "https://a.invalid/é.json", "https://[::1]a/d.json"])
def test_an_address_that_is_none_is_a_users_error(address):
    with pytest.raises(ConnectionError, match="cannot download"):
        read(address)


def test_a_byte_order_mark_is_no_part_of_the_first_name(tmp_path):
    path = tmp_path / "data.csv"
    path.write_bytes(b"\xef\xbb\xbfinstruction,output\r\nthe,two\r\n")
    assert read(path) == [{"instruction": "the", "input": "", "output": "two"}]


@pytest.mark.parametrize(
    "name, content, message",
    [
        ("d.json", "[]", "d.json holds no rows"),
        ("d.jsonl", "\n", "d.jsonl holds no rows"),
        ("d.json", '{"instruction": "a"}', "holds a dict, expected a list of rows"),
        ("d.json", '[{"instruction": "a"', "not valid JSON, or cut short"),
        ("d.json", '{"instruction": "a"}\n{"instruction": "b"}', "one row a line is to be named .jsonl"),
        ("d.jsonl", '{"instruction": "a", "output": ""}\n{"instr', "d.jsonl, row 2: line 2 is not valid JSON"),
        ("d.txt", "the", "unknown kind of data file '.txt'; choices: .json, .jsonl, .csv"),
        (
            "d.json",
            '[{"instruction": "a", "output": ""}, {"instruction": "b"}]',
            r"row 2: has no output \(it has",
        ),
        ("d.json", '[{"text": "a"}]', r"row 1: has no instruction and no output \(it has text\)"),
        ("d.json", '["a"]', "row 1: is a str, expected an object with instruction, input, output"),
        ("d.json", '[{"instruction": 3, "output": ""}]', "row 1: instruction is a int, expected text"),
        ("d.json", '[{"instruction": "a", "output": null}]', "row 1: output is a NoneType, expected text"),
        ("d.csv", "instruction,output\na\n", "row 1: has no output"),
        ("d.csv", 'instruction,output\na,"b', r"row 1: is not valid CSV \(line 2\)"),
        ("d.json", '[{"messages": []}]', r"row 1: has no messages, expected a list of \{role, content\}"),
        ("d.json", '[{"messages": [{"role": "user"}]}]', "row 1: message 1 has no text under content"),
        (
            "d.json",
            '[{"messages": [{"role": "bot", "content": "a"}]}]',
            "has the role 'bot', expected system, user",
        ),
        ("d.json", '[{"messages": [{"role": "user", "content": "a"}]}, {"output": ""}]', "row 2: has no messages"),
        ("d.json", '[{"instruction": "a", "output": ""}] [', "not valid JSON, or cut short: Extra data: line 1"),
        ("d.json", "[" * 100_000, "not valid JSON, or cut short"),
        ("d.jsonl", "[" * 100_000, "row 1: line 1 is not valid JSON"),
        ("d.json", '[{"instruction": "a", "output": "", "output": "b"}]', "row 1: the key 'output' stands twice"),
        ("d.jsonl", '{"instruction": "a", "output": "\\ud83d"}', r"row 1: output holds half a character \(U\+D83D at"),
        ("d.csv", "instruction,output\nhi,Hello, you\n", "row 1: 3 fields, the header has 2; quote a text that holds"),
        ("d.csv", "instruction,output,output\na,b,\n", "the header has 'output' twice; give every column its own name"),
        ("d.csv", "instruction,output\n,\n , \n", "d.csv holds no rows with text"),
        ("d.json", '[{"messages": [{"role": "user", "content": " "}]}]', "d.json holds no rows with text"),
        (
            "d.jsonl",
            '{"mess\n{"messages": [{"role": "user", "content": "a"}]}',
            "row 1: line 1 is not valid JSON[^;]*$",
        ),
        (
            "d.json",
            '[{"messages": [{"role": "assistant", "content": "", "tool_calls": [{"type": "function"}]}]}]',
            "row 1: message 1 has tool_calls: chat offers no tools, so they can't be learned; leave the row out",
        ),
        (
            "d.json",
            '[{"messages": [{"role": "user", "content": "a"}], "tools": [{}]}]',
            "row 1: the row has tools: chat",
        ),
        ("d.json", '[{"messages": [{"role": "user", "content": "a", "weight": 0.5}]}]', "weight 0.5, expected 0 or 1"),
        ("d.json", '[{"messages": [{"role": "user", "content": "\\udc00"}]}]', "message 1, content holds half a char"),
        ("d.json", '[{"messages": ["a"]}]', r"message 1 is a str, expected \{role, content\}"),
        (
            "d.json",
            '[{"system": "Be kind", "history": [1], "messages": [{"role": "user", "content": "a"}]}]',
            "row 1: has system and history, which would be left out; put it into messages",
        ),
        ("d.jsonl", '{"instruction": "a", "output": "", "system_prompt": "b"}', "row 1: has system_prompt, which"),
        (
            "d.json",
            '[{"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}]',
            "row 1: message 1 has no text under content, expected a string or parts of text",
        ),
        ("d.json", '[{"messages": [{"role": "user", "content": ["a"]}]}]', "has no text under content"),
        ("d.json", '[{"conversations": [{"from": "tool", "value": "a"}]}]', "has the role 'tool', expected system"),
        ("d.json", '[{"conversations": [{"from": [], "value": 1}]}]', "message 1 has no text under content"),
        ("d.json", str([*range(25)]), r"row 1, row 2, .*, row 10 and 15 more: is a int[^;]*$"),
        ("d.json", json.dumps([{f"x{i}": ""} for i in range(25)]), r"row 1: has .*; row 20: has .*; and 5 more rows$"),
    ],
)
def test_bad_data_is_named_with_its_row(tmp_path, name, content, message):
    (tmp_path / name).write_text(content)
    with pytest.raises(ValueError, match=message) as error:
        read(tmp_path / name)
    assert str(tmp_path / name) in str(error.value)


def test_blank_rows_are_left_out_and_counted(bpe_dir, tmp_path, capsys):
    (tmp_path / "d.csv").write_text("instruction,input,output\na,,b\n,,\n , ,\nc,,d\n,,\n,,,\n")
    call(prepare_json, "--data_file_path", tmp_path / "d.csv", "--destination_path", tmp_path / "out",
         "--checkpoint_dir", bpe_dir, "--max_seq_length", 200, "--test_split_fraction", 0.5)  # fmt: skip
    assert (len(load_split(tmp_path / "out" / "train.pt")), len(load_split(tmp_path / "out" / "test.pt"))) == (1, 1)
    assert "4 rows: left out, since they are blank" in capsys.readouterr().out


def test_a_line_with_an_integer_that_python_does_not_convert_is_told(tmp_path):
    path = write(
        tmp_path / "d.jsonl", [{"instruction": "a", "output": "b"}, {"instruction": "c", "output": "d", "id": 1}]
    )
    path.write_text(path.read_text().replace('"id": 1', '"id": ' + "9" * 5000))
    with pytest.raises(UserError, match=r"d.jsonl, row 2: line 2 is not valid JSON: Exceeds the limit"):
        read(path)


def test_all_rows_that_cannot_be_used_are_told_at_once(bpe_dir, tmp_path, capsys):
    """Those of a wrong shape, and those that the chat template refuses."""
    shutil.copytree(bpe_dir, tmp_path / "model")
    (tmp_path / "model" / "chat_template.jinja").write_text(LLAMA_2)
    rows = [{"messages": CHAT[1:]} for _ in range(60)]
    rows[9] = {"messages": CHAT[:3]}
    rows[19] = {"messages": [{"role": "tool", "content": ""}]}
    rows[29:] = [3] * 31
    path = write(tmp_path / "d.jsonl", rows)
    text = failure(capsys, prepare_json, "--data_file_path", path, "--destination_path", tmp_path / "out",
                   "--checkpoint_dir", tmp_path / "model", "--max_seq_length", 200)  # fmt: skip
    assert "d.jsonl, row 10: the chat template of" in text and "; row 20: message 1 has the role 'tool'" in text
    assert "; row 30, row 31, " in text and ", row 39 and 21 more: has no messages" in text and "row 11" not in text


def test_a_conversations_samples_are_held_out_together(bpe_dir, tmp_path, capsys):
    """Each holds the others' answers; one of them among the training data would tell the others'."""
    shutil.copytree(bpe_dir, tmp_path / "model")
    template = "{% for m in messages %}{{ m.content + '\n' }}{% endfor %}"
    (tmp_path / "model" / "chat_template.jinja").write_text(template)
    rows = [{"messages": [{**m, "content": f"{m['content']} {i}"} for m in CHAT[1:]]} for i in range(20)]
    call(prepare_json, "--data_file_path", write(tmp_path / "d.jsonl", rows), "--destination_path", tmp_path / "out",
         "--checkpoint_dir", tmp_path / "model", "--max_seq_length", 200, "--test_split_fraction", 0.25)  # fmt: skip
    tokenizer = Tokenizer(tmp_path / "model")
    train, test = (
        [tokenizer.decode(sample["input_ids"]).split("\n")[0] for sample in load_split(tmp_path / "out" / name)]
        for name in ("train.pt", "test.pt")
    )
    assert (len(train), len(test), len(set(test))) == (30, 10, 5) and not set(train) & set(test)
    facts = read_data_config(tmp_path / "out")
    assert (facts["n_rows"], facts["n_train"], facts["n_test"]) == (20, 30, 10)
    assert "20 rows: an answer each is a sample" in capsys.readouterr().out


def test_bytes_that_are_no_text_are_named_with_their_line(tmp_path):
    (tmp_path / "d.jsonl").write_bytes(b'{"instruction": "a", "output": "b"}\n{"instruction": "\xff"}')
    with pytest.raises(ValueError, match=r"d.jsonl is not UTF-8 text \(line 2\)"):
        read(tmp_path / "d.jsonl")


# ---------------------------------------------------------------------------------------------------- encoding
def test_one_masked_sample_by_hand(bpe_dir):
    """ids of prompt, response and EOS; the labels hide the prompt alone."""
    tokenizer = Tokenizer(bpe_dir)
    row = {"instruction": "a", "input": "", "output": "the"}
    (sample,) = encode(tokenizer, [row], style="plain", mask_inputs=True)
    the, a = tokenizer.encode("the"), tokenizer.encode("a")
    assert the == [86, 74, 71] and a == [67]
    assert sample["input_ids"].tolist() == [67, 86, 74, 71, 2]
    assert sample["labels"].tolist() == [-100, 86, 74, 71, 2]
    assert sample["response"].tolist() == [False, True, True, True, True]
    assert {name: values.dtype for name, values in sample.items()} == {
        **{"input_ids": torch.int32, "labels": torch.int32, "response": torch.bool}
    }
    (unmasked,) = encode(tokenizer, [row], style="plain", mask_inputs=False)
    assert unmasked["labels"].tolist() == [67, 86, 74, 71, 2]
    assert torch.equal(unmasked["response"], sample["response"])


@pytest.mark.parametrize("kind", ["bpe_dir", "spm_dir"])
@pytest.mark.parametrize("style", ["alpaca", "plain"])
def test_a_sample_begins_with_the_ids_the_model_is_asked_with(request, kind, style):
    """Also where the response opens with what would merge with the prompt's last token."""
    tokenizer = Tokenizer(request.getfixturevalue(kind))
    rows = [*ROWS, *many_rows(50), {"instruction": "a", "input": "", "output": " 12\n"}]
    for row, sample in zip(rows, encode(tokenizer, rows, style=style, mask_inputs=True), strict=True):
        prompt = encode_prompt(tokenizer, style, instruction=row["instruction"], input=row["input"])
        ids = sample["input_ids"].tolist()
        assert ids[: len(prompt)] == prompt
        assert sample["labels"].tolist() == [IGNORE_INDEX] * len(prompt) + ids[len(prompt) :]
        assert sample["response"].tolist() == [False] * len(prompt) + [True] * (len(ids) - len(prompt))
        text = render_prompt(style, row["instruction"], row["input"]) + row["output"]
        assert tokenizer.decode(ids) == text and ids[-1] == tokenizer.eos_id
        assert ids.count(tokenizer.bos_id) == (kind == "spm_dir")


def test_only_the_assistants_turns_are_learned_end_tokens_included(bpe_dir):
    tokenizer = Tokenizer(bpe_dir)
    (sample,) = encode(tokenizer, [{"messages": CHAT}], style="chat", mask_inputs=False)
    assert sample["input_ids"].tolist() == tokenizer.encode(tokenizer.render_chat(CHAT).rstrip("\n"), bos=False)
    assert targets_text(tokenizer, sample) == "two<|im_end|>new<|im_end|>"
    assert torch.equal(sample["response"], sample["labels"] != IGNORE_INDEX)
    assert mark_masked(tokenizer, sample) == (
        "[[masked: <|im_start|>system\nYou are old.<|im_end|>\n<|im_start|>user\nthe<|im_end|>\n"
        "<|im_start|>assistant\n]]two<|im_end|>[[masked: \n<|im_start|>user\na<|im_end|>\n"
        "<|im_start|>assistant\n]]new<|im_end|>"
    )


def test_a_conversation_is_encoded_as_transformers_encodes_it(bpe_dir, spm_dir):
    from transformers import AutoTokenizer

    for folder, template, messages in ((bpe_dir, None, CHAT), (spm_dir, LLAMA_2, CHAT[1:])):
        tokenizer, oracle = Tokenizer(folder), AutoTokenizer.from_pretrained(str(folder))
        tokenizer.chat_template = template or tokenizer.chat_template
        (sample,) = encode(tokenizer, [{"messages": messages}], style="chat", mask_inputs=True)
        expected = oracle.apply_chat_template(messages, chat_template=template, return_dict=False)
        ids = sample["input_ids"].tolist()
        # A sample ends with the last token that is learned
        assert ids == expected[: len(ids)] and not tokenizer.decode(expected[len(ids) :]).strip()


def test_instructions_in_chat_style_are_what_the_chat_is_asked(bpe_dir):
    tokenizer = Tokenizer(bpe_dir)
    for row, sample in zip(ROWS, encode(tokenizer, ROWS, style="chat", mask_inputs=True), strict=True):
        prompt = encode_prompt(tokenizer, "chat", instruction=row["instruction"], input=row["input"])
        assert sample["input_ids"].tolist()[: len(prompt)] == prompt
        assert targets_text(tokenizer, sample) == row["output"] + "<|im_end|>"


def test_cutting_counts_what_it_cuts_and_drops():
    samples = Samples(max_seq_length=3)
    for row, masked in enumerate([1, 2, 3], start=1):
        samples.add(row, [([1, 2, 3][:masked], False), ([4, 5], True)])
    samples.add(4, [([1], True), ([2, 3], False)])  # has a label only where nothing stands before it
    assert [s["input_ids"].tolist() for s in samples] == [[1, 4, 5], [1, 2, 4]]
    assert samples[1]["labels"].tolist() == [-100, -100, 4] and samples[1]["response"].tolist() == [False, False, True]
    assert (samples.n_cut, samples.n_dropped, list(samples.full_sizes)) == (2, 2, [3, 4, 5, 3])


INSTRUCTION = {"instruction": "the river " * 20, "input": "", "output": "a stone " * 20}
LONG = {"messages": [{"role": role, "content": "the river " * 10} for role in ("user", "assistant")] * 20}


@pytest.mark.parametrize(
    "style, row, numbers",
    [("plain", INSTRUCTION, (150, 900)), ("chat", INSTRUCTION, (150, 900)), ("chat", LONG, (3, 15))],
)
def test_memory_grows_by_the_ids_and_a_mask(bpe_dir, style, row, numbers):
    """It was 200 bytes a token: a million rows of 200 tokens would have taken 40 GB.

    Of long conversations, each answer has all before it in its prompt: 1,000 of 40 turns were encoded at once.
    """
    tokenizer, peaks, tokens = Tokenizer(bpe_dir), [], []
    for n in numbers:
        tracemalloc.start()
        samples = encode_rows(tokenizer, ((i, row) for i in range(n)), style=style, mask_inputs=True)
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
        tokens.append(sum(samples.sizes))
    assert (peaks[1] - peaks[0]) / (tokens[1] - tokens[0]) < 10


def test_the_held_out_rows_follow_from_the_seed():
    rows = range(100, 200)
    drawn = draw(rows, 0.04, seed=1)
    assert len(drawn) == 4 and drawn <= set(rows)
    assert draw(rows, 0.04, seed=1) == drawn != draw(rows, 0.04, seed=2)
    assert [len(draw(range(n), 0.04, seed=1)) for n in (5, 1)] == [1, 1]
    assert len(draw(range(300), 0.999, seed=1)) == 299


def test_holding_rows_out_keeps_the_order_and_all_samples_of_a_row_together():
    samples = Samples()
    for row in range(1, 41):
        for part in range(row % 3):
            samples.add(row, [([row, part], False), ([row] * (row % 5), True), ([9], True)])
    before = [{name: values.tolist() for name, values in sample.items()} for sample in samples]
    drawn = draw(range(1, 41), 0.3, seed=0)
    for part, inside in zip(samples.split(drawn), (False, True), strict=True):
        expected = [sample for sample in before if (sample["input_ids"][0] in drawn) == inside]
        assert [{name: values.tolist() for name, values in sample.items()} for sample in part] == expected
        assert len(part) == len(expected) > 5
        columns = {name: values.tolist() for name, values in part.columns().items()}
        assert columns == {name: [i for sample in expected for i in sample[name]] for name in columns}


# ---------------------------------------------------------------------------------------------------- batches
def test_a_batch_is_padded_to_its_longest_and_its_targets_are_shifted():
    def sample(ids, labels, response):
        return dict(zip(("input_ids", "labels", "response"), map(torch.tensor, (ids, labels, response)), strict=True))

    a = sample([5, 6, 7], [5, 6, 7], [False, True, True])
    b = sample([8, 9], [-100, 9], [False, True])
    idx, targets = make_batch([a, b])
    assert idx.tolist() == [[5, 6, 7], [8, 9, 0]] and idx.dtype == torch.int64
    assert targets.tolist() == [[6, 7, -100], [9, -100, -100]] and targets.dtype == torch.int64
    assert make_batch([b])[0].shape == (1, 2)
    c = sample([5, 6, 7], [5, 6, 7], [False, False, True])
    d = sample([5, 6, 7], [5, 6, -100], [False, False, True])
    samples, groups = add_response_targets([c, d])
    assert make_batch(samples)[1].tolist() == [[6, 7, -100], [6, 7, -100]]
    assert groups.tolist() == [[True, True, True, False], [False, True, False, True]]


def test_samples_survive_the_file(bpe_dir, tmp_path):
    samples = encode(Tokenizer(bpe_dir), many_rows(20), style="alpaca", mask_inputs=True)
    save_samples(samples, tmp_path / "train.pt")
    loaded = load_split(tmp_path / "train.pt")
    assert len(loaded) == 20
    for ours, read in zip(samples, loaded, strict=True):
        assert ours.keys() == read.keys() and all(torch.equal(ours[name], read[name]) for name in ours)


def test_what_is_no_prepared_data_is_refused(bpe_dir, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"train.pt is not a file; make it with .*prepare_json.py"):
        load_split(tmp_path / "train.pt")
    with pytest.raises(FileNotFoundError, match=r"holds no data_config.json; make it with"):
        read_data_config(tmp_path)
    torch.save([1, 2], tmp_path / "train.pt")
    with pytest.raises(ValueError, match=r"train.pt holds a list, a dict of tensors was expected; make it again"):
        load_split(tmp_path / "train.pt")
    for content in ({"weight": torch.ones(2)}, {"lengths": torch.tensor([3]), "input_ids": torch.ones(2)}):
        torch.save(content, tmp_path / "train.pt")
        with pytest.raises(ValueError, match=r"train.pt does not hold what it should \(.*\); make it with"):
            load_split(tmp_path / "train.pt")
    save_samples(encode(Tokenizer(bpe_dir), ROWS, style="alpaca", mask_inputs=True), tmp_path / "train.pt")
    (tmp_path / "train.pt").write_bytes((tmp_path / "train.pt").read_bytes()[:700])
    with pytest.raises(ValueError, match=r"train.pt is corrupt"):
        load_split(tmp_path / "train.pt")


# ---------------------------------------------------------------------------------------------------- the scripts
def test_prepare_alpaca_writes_three_files_that_say_what_they_are(bpe_dir, tmp_path, capsys):
    path, out, tokenizer = write(tmp_path / "data.json", many_rows(50)), tmp_path / "out", Tokenizer(bpe_dir)
    samples = encode(tokenizer, read(path), style="alpaca", mask_inputs=False)
    true_lengths = sorted(len(s["input_ids"]) for s in samples)
    limit = true_lengths[40]
    call(prepare_alpaca, "--data_file_path", path, "--destination_path", out, "--checkpoint_dir", bpe_dir,
         "--max_seq_length", limit, "--test_split_fraction", 0.1, "--seed", 3)  # fmt: skip
    assert sorted(p.name for p in out.iterdir()) == ["data_config.json", "test.pt", "train.pt"]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["data.json", "out"]
    train, test = load_split(out / "train.pt"), load_split(out / "test.pt")
    assert all(torch.equal(sample["input_ids"], sample["labels"]) for sample in train)
    facts = read_data_config(out)
    lengths = facts.pop("lengths")
    assert lengths["max"] == true_lengths[-1] and lengths["p50"] in true_lengths[24:26]
    n_cut = sum(length > limit for length in true_lengths)
    assert 0 < n_cut < 10
    assert facts == {
        "checkpoint_dir": str(bpe_dir.resolve()),
        "base_name": bpe_dir.name,
        "prompt_style": "alpaca",
        "mask_inputs": False,
        "max_seq_length": limit,
        "seed": 3,
        "test_split_fraction": 0.1,
        "source": str(path),
        **{"n_rows": 50, "n_train": len(train), "n_test": len(test), "n_cut": n_cut, "n_dropped": 0},
        "tokenizer_sha256": tokenizer.sha256,
    }
    assert (len(train), len(test)) == (45, 5)
    printed = capsys.readouterr().out
    assert "50 rows: 45 to train on, 5 to test with" in printed
    assert f"p50 {lengths['p50']}, p90 {lengths['p90']}, p99 {lengths['p99']}, max {lengths['max']}" in printed
    assert f"cut at {limit} tokens: {n_cut}; dropped, because nothing to learn was left: 0" in printed
    assert "### Instruction:" in printed and "[[masked" not in printed


def test_prepare_dolly_knows_dollys_names_and_masks(bpe_dir, tmp_path, capsys):
    rows = [{"instruction": r["instruction"], "context": r["input"], "response": r["output"], "category": "qa"}
            for r in many_rows(10)]  # fmt: skip
    path, out = write(tmp_path / "dolly.jsonl", rows), tmp_path / "out"
    call(prepare_dolly, "--data_file_path", path, "--destination_path", out, "--checkpoint_dir", bpe_dir,
         "--max_seq_length", 1000, "--mask_inputs", "true", "--prompt_style", "chat")  # fmt: skip
    tokenizer = Tokenizer(bpe_dir)
    learned = sorted(targets_text(tokenizer, s) for f in ("train.pt", "test.pt") for s in load_split(out / f))
    assert learned == sorted(row["response"] + "<|im_end|>" for row in rows)
    assert "[[masked: <|im_start|>system\n" in capsys.readouterr().out
    assert read_data_config(out)["prompt_style"] == "chat"


@pytest.mark.parametrize("suffix", ["json", "jsonl"])
def test_prepare_json_sees_conversations_by_themselves(bpe_dir, tmp_path, suffix):
    path, out = write(tmp_path / f"data.{suffix}", [{"messages": CHAT}] * 4), tmp_path / "out"
    call(prepare_json, "--data_file_path", path, "--destination_path", out, "--checkpoint_dir", bpe_dir,
         "--max_seq_length", 200)  # fmt: skip
    facts = read_data_config(out)
    assert (facts["prompt_style"], facts["mask_inputs"], facts["n_train"], facts["n_test"]) == ("chat", True, 3, 1)
    assert targets_text(Tokenizer(bpe_dir), load_split(out / "test.pt")[0]) == "two<|im_end|>new<|im_end|>"


def test_prepare_json_reads_a_spreadsheet_with_its_own_names(spm_dir, tmp_path):
    path, out = tmp_path / "data.csv", tmp_path / "out"
    path.write_text("question,answer\nthe,two\na,new\n")
    call(prepare_json, "--data_file_path", path, "--destination_path", out, "--checkpoint_dir", spm_dir,
         "--max_seq_length", 200, "--fields", '{"instruction": "question", "output": "answer"}',
         "--prompt_style", "plain")  # fmt: skip
    tokenizer = Tokenizer(spm_dir)
    texts = {tokenizer.decode(load_split(out / f)[0]["input_ids"]) for f in ("train.pt", "test.pt")}
    assert texts == {"thetwo", "anew"}


def test_rows_with_nothing_left_to_learn_are_dropped_and_counted(bpe_dir, tmp_path, capsys):
    long = {"instruction": "the old house " * 60, "input": "", "output": "two"}
    path = write(tmp_path / "data.json", [*many_rows(10), long, long])
    call(prepare_json, "--data_file_path", path, "--destination_path", tmp_path / "out", "--checkpoint_dir", bpe_dir,
         "--max_seq_length", 60, "--mask_inputs", "true", "--prompt_style", "plain")  # fmt: skip
    facts = read_data_config(tmp_path / "out")
    assert facts["n_dropped"] >= 2 and facts["n_train"] + facts["n_test"] + facts["n_dropped"] == 12
    assert f"dropped, because nothing to learn was left: {facts['n_dropped']}" in capsys.readouterr().out


def test_the_length_defaults_to_the_models_context(bpe_dir, tmp_path):
    from lit_gpt import Config
    from lit_gpt.files import write_json

    folder = tmp_path / "model"
    shutil.copytree(bpe_dir, folder)
    write_json(folder / "lit_config.json", Config.from_name("pythia-70m", block_size=111).to_dict())
    path = write(tmp_path / "data.json", ROWS)
    prepare(path, destination_path=tmp_path / "out", checkpoint_dir=folder)
    assert read_data_config(tmp_path / "out")["max_seq_length"] == 111
    with pytest.raises(ValueError, match="--max_seq_length 112: expected 2 to 111"):
        prepare(path, destination_path=tmp_path / "out2", checkpoint_dir=folder, max_seq_length=112)


def test_the_same_call_writes_the_same_bytes(bpe_dir, tmp_path):
    path = write(tmp_path / "data.json", many_rows(30))
    for name in ("a", "b"):
        prepare(path, destination_path=tmp_path / name, checkpoint_dir=bpe_dir, max_seq_length=200)
    for name in ("train.pt", "test.pt", "data_config.json"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()


def test_prepared_data_is_overwritten_only_when_told(bpe_dir, tmp_path, capsys):
    path = write(tmp_path / "data.json", many_rows(10))
    flags = ["--data_file_path", path, "--destination_path", tmp_path / "out", "--checkpoint_dir", bpe_dir,
             "--max_seq_length", 200]  # fmt: skip
    call(prepare_json, *flags)
    before = (tmp_path / "out" / "train.pt").read_bytes()
    assert "--overwrite true" in failure(capsys, prepare_json, *flags, "--mask_inputs", "true")
    assert (tmp_path / "out" / "train.pt").read_bytes() == before
    call(prepare_json, *flags, "--mask_inputs", "true", "--overwrite", "true")
    assert (tmp_path / "out" / "train.pt").read_bytes() != before


@pytest.mark.parametrize(
    "flags, message",
    [
        (["--prompt_style", "vicuna"], "unknown prompt style 'vicuna'; choices: alpaca, plain, chat"),
        (["--test_split_fraction", "1"], "--test_split_fraction 1.0: expected a number between 0 and 1"),
        (["--test_split_fraction", "0"], "--test_split_fraction 0.0: expected a number between 0 and 1"),
        (["--max_seq_length", "1"], "--max_seq_length 1: expected 2 to the model context"),
        (["--max_seq_length", "5", "--mask_inputs", "true"], "of 3 rows 0 are left to train on and 0 to test with"),
        (["--max_seq_length", "null"], "has no lit_config.json that tells the model's context: give --max_seq_length"),
        (["--data_file_path", "x.json"], "x.json is not a file; give --data_file_path a .json, .jsonl or .csv"),
        (["--checkpoint_dir", "nowhere"], "nowhere: not a folder"),
        (["--fields", '{"question": "a"}'], "--fields names question; it maps instruction, input, output"),
        (["--seed", "many"], "seed"),
    ],
)
def test_refusals_are_one_line_and_leave_nothing_behind(bpe_dir, tmp_path, capsys, flags, message):
    path = write(tmp_path / "data.json", ROWS)
    flags = ["--data_file_path", path, "--destination_path", tmp_path / "out", "--checkpoint_dir", bpe_dir,
             "--max_seq_length", 200, *flags]  # fmt: skip
    assert message in failure(capsys, prepare_json, *flags)
    assert [p.name for p in tmp_path.iterdir()] == ["data.json"]


def test_all_that_is_wrong_with_the_arguments_is_told_at_once(bpe_dir, tmp_path):
    with pytest.raises(ValueError, match=r"--max_seq_length 0: .*; --test_split_fraction 2: .*; unknown prompt style"):
        prepare("x.json", destination_path=tmp_path / "out", checkpoint_dir=bpe_dir, max_seq_length=0,
                test_split_fraction=2, prompt_style="x")  # fmt: skip


def test_messages_need_the_models_template_and_no_other_style(bpe_dir, spm_dir, tmp_path):
    path = write(tmp_path / "data.json", [{"messages": CHAT}] * 2)
    options = {"destination_path": tmp_path / "out", "max_seq_length": 200}
    with pytest.raises(ValueError, match="has no chat template; choose one of alpaca, plain"):
        prepare(path, checkpoint_dir=spm_dir, **options)
    with pytest.raises(ValueError, match="--prompt_style alpaca is for rows of instruction and output"):
        prepare(path, checkpoint_dir=bpe_dir, prompt_style="alpaca", **options)


@pytest.mark.parametrize(
    "error",
    [http.client.IncompleteRead(b"{", 999), http.client.BadStatusLine("no answer"), http.client.LineTooLong("header")],
    ids=["cut off", "no HTTP", "endless header"],
)
def test_a_download_that_breaks_off_is_one_line(bpe_dir, tmp_path, capsys, monkeypatch, error):
    """http.client's errors are neither OSErrors nor urllib's: a connection that closed early was a traceback."""

    class Reply(contextlib.nullcontext):
        def read(self) -> bytes:
            raise error

    monkeypatch.setattr(urllib.request, "urlopen", lambda address, timeout: Reply(Reply()))
    flags = ["--destination_path", tmp_path / "out", "--checkpoint_dir", bpe_dir, "--max_seq_length", 200]
    text = failure(capsys, prepare_json, "--data_file_path", "https://host/rows.jsonl", *flags)
    assert f"cannot download https://host/rows.jsonl ({type(error).__name__}(" in text and "Traceback" not in text
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("script", [prepare_alpaca, prepare_dolly])
def test_a_data_set_that_cannot_be_reached_is_one_line(bpe_dir, tmp_path, capsys, monkeypatch, script):
    def unreachable(address, timeout):
        assert address.startswith("https://") and address.endswith((".json", ".jsonl"))
        raise urllib.error.URLError("no route to host")

    monkeypatch.setattr(urllib.request, "urlopen", unreachable)
    text = failure(capsys, script, "--destination_path", tmp_path / "out", "--checkpoint_dir", bpe_dir,
                   "--max_seq_length", 200)  # fmt: skip
    assert "cannot download https://" in text and "(no route to host)" in text and "--data_file_path FILE" in text
    assert not (tmp_path / "out").exists()
