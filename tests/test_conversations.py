"""Parts of conversations that are learned, judged by transformers: its rendering and ids, for all kinds of templates.

Each template here is small and ours; what it does is what templates of real families do.
"""

import json
import shutil

import pytest
import torch
from helpers import encode_rows

from lit_gpt.encoding import AS_WRITTEN, LEFT_OUT, SEVERAL
from lit_gpt.errors import UserError
from lit_gpt.loss import IGNORE_INDEX
from lit_gpt.tokenizer import Tokenizer

MARKERS = ("<|user|>", "<|assistant|>", "<|system|>", "<|end|>", "<|return|>", "[INST]", "[/INST]", "[close]", "[sep]")
SYSTEM = {"role": "system", "content": "You are old."}
TALK = [
    {"role": "user", "content": "What is the river?"},
    {"role": "assistant", "content": "The stone."},
    {"role": "user", "content": "And the house?"},
    {"role": "assistant", "content": "New light, naïve café."},
]
KINDS = {"UA": TALK[:2], "SUA": [SYSTEM, *TALK[:2]], "UAUA": TALK, "SUAUA": [SYSTEM, *TALK]}

TURN = "{% for m in messages %}{{ '<|' + m.role + '|>\n' + m.content + END }}{% endfor %}"
ASK = "{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
INST = "{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}[INST] {{ m.content }}[/INST]"
WHOLE, BOTH = set(), {"UAUA", "SUAUA"}
# The template; what is learned of an answer A; the conversations whose answers become samples of their own; the notes
TEMPLATES = {
    "a header and an end": (TURN.replace("END", "'<|end|>\n'") + ASK, "A<|end|>", WHOLE, set()),
    "a newline before the end": (TURN.replace("END", "'\n<|end|>\n'") + ASK, "A\n<|end|>", WHOLE, set()),
    "spaces and eos": (
        "{% for m in messages %}{% if m.role == 'assistant' %}{{ ' ' + m.content + ' ' + eos_token }}{% else %}"
        "{{ bos_token + '[INST] ' + m.content + ' [/INST]' }}{% endif %}{% endfor %}",
        *(" A </s>", WHOLE, set()),
    ),
    "always a generation prompt": (
        TURN.replace("END", "'<|end|>'") + "{{ '<|assistant|>\n' }}",
        "A<|end|>",
        WHOLE,
        set(),
    ),
    "always a generation prompt, and no end": (TURN.replace("END", "''") + "<|assistant|>", "\nA</s>", BOTH, set()),
    "nothing but line breaks": (
        "{% for m in messages %}{{ m.role + ': ' + m.content + '\n' }}{% endfor %}"
        "{% if add_generation_prompt %}assistant: {% endif %}",
        *("A</s>", BOTH, set()),
    ),
    "no generation prompt": (
        "{% for m in messages %}{{ m.role + ' ' + m.content + '<|end|>\n' }}{% endfor %}",
        *("assistant A<|end|>", WHOLE, set()),
    ),
    "eos behind the last end": (
        TURN.replace("END", "'<|end|>\n'") + "{% if add_generation_prompt %}<|assistant|>\n{% else %}</s>{% endif %}",
        *("A<|end|>", WHOLE, set()),
    ),
    "another end where the answer is last": (
        TURN.replace("END", "('<|return|>' if loop.last and m.role == 'assistant' else '<|end|>')") + ASK,
        *("A<|return|>", BOTH, set()),
    ),
    "an end of its own": (TURN.replace("END", "'[sep]\n'") + ASK, "A[sep]", WHOLE, set()),
    "a channel that is closed": (
        TURN.replace(
            "m.content", "('[close][sep]' + m.content + '[close][end]' if m.role == 'assistant' else m.content)"
        )
        .replace("END", "''")
        .replace("[end]", "<|return|>")
        + ASK,
        *("[close][sep]A[close]<|return|>", WHOLE, set()),
    ),
    "the last answer is left out": (
        "{% for m in messages %}{% if not (loop.last and m.role == 'assistant') %}"
        "{{ m.role + ': ' + m.content + '\n\n' }}{% endif %}{% endfor %}assistant:[sep]",
        *("A</s>", BOTH, {AS_WRITTEN}),
    ),
    "the prompt opens the reasoning": (
        TURN.replace("END", "'<|end|>\n'") + "{% if add_generation_prompt %}<|assistant|>\n<think>\n{% endif %}",
        *("A<|end|>", BOTH, {AS_WRITTEN}),
    ),
    "empty reasoning in the last answer": (
        TURN.replace(
            "m.content", "('<think>\n\n</think>\n\n' if loop.last and m.role == 'assistant' else '') + m.content"
        ).replace("END", "'<|end|>\n'")
        + ASK,
        *("<think>\n\n</think>\n\nA<|end|>", BOTH, set()),
    ),
    "the system message in the last user message": (
        INST.replace("{{ m", "{{ messages[0].content + ': ' if loop.last and messages[0].role == 'system' }}{{ m")
        + "{% elif m.role == 'assistant' %}{{ ' ' + m.content + eos_token }}{% endif %}{% endfor %}",
        *(" A</s>", {"SUAUA"}, set()),
    ),
    "no system message": (
        INST + "{% elif m.role == 'assistant' %}{{ m.content + eos_token }}{% endif %}{% endfor %}",
        *("A</s>", WHOLE, {LEFT_OUT.format("system")}),
    ),
    "marked for transformers": (
        "{% for m in messages %}{{ '<|' + m.role + '|>' }}{% if m.role == 'assistant' %}{% generation %}"
        "{{ m.content + '<|end|>' }}{% endgeneration %}{% else %}{{ m.content }}{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}<|assistant|>{% endif %}",
        *("A<|end|>", WHOLE, set()),
    ),
}


@pytest.fixture(scope="module")
def folders(bpe_dir, spm_dir, tmp_path_factory):
    """Folders with the markers as special tokens: byte-level BPE, and Llama-2's tokenizer.json, which puts a space
    before every text behind a special token."""
    from tokenizers import AddedToken
    from transformers import AutoTokenizer

    made = {}
    for kind, source in (("bpe", bpe_dir), ("spm", spm_dir)):
        made[kind] = tmp_path_factory.mktemp(kind)
        backend = AutoTokenizer.from_pretrained(str(source)).backend_tokenizer
        backend.add_special_tokens([AddedToken(text, special=True, normalized=False) for text in MARKERS])
        content = json.loads(backend.to_str())
        if kind == "spm":
            steps = [{"type": "Prepend", "prepend": "▁"}]
            steps.append({"type": "Replace", "pattern": {"String": " "}, "content": "▁"})
            content |= {"normalizer": {"type": "Sequence", "normalizers": steps}, "pre_tokenizer": None}
        (made[kind] / "tokenizer.json").write_text(json.dumps(content))
        settings = json.loads((source / "tokenizer_config.json").read_text())
        settings |= {"tokenizer_class": "PreTrainedTokenizerFast"}
        (made[kind] / "tokenizer_config.json").write_text(json.dumps(settings))
    return made


def load(folder, template):
    """Our tokenizer and transformers', with a chat template."""
    from transformers import AutoTokenizer

    ours, theirs = Tokenizer(folder), AutoTokenizer.from_pretrained(str(folder))
    ours.chat_template = theirs.chat_template = template
    return ours, theirs


def learned_runs(sample):
    """(begin, end) of every stretch that is learned."""
    learned = [False, *(sample["labels"] != IGNORE_INDEX).tolist(), False]
    borders = [i for i in range(1, len(learned)) if learned[i] != learned[i - 1]]
    return [(begin - 1, end - 1) for begin, end in zip(borders[::2], borders[1::2], strict=True)]


def encode(tokenizer, *conversations):
    """The samples of conversations."""
    rows = [(number, {"messages": messages}) for number, messages in enumerate(conversations, start=1)]
    return encode_rows(tokenizer, rows, style="chat", mask_inputs=True)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", TEMPLATES)
@pytest.mark.parametrize("tokenizer", ["bpe", "spm"])
def test_an_answer_is_learned_behind_what_chat_sends_with_its_end(folders, tokenizer, name, kind):
    template, learned, several, notes = TEMPLATES[name]
    ours, theirs = load(folders[tokenizer], template)
    messages = KINDS[kind]
    samples = encode(ours, messages)
    assert len(samples) == (2 if kind in several else 1)
    runs = [(sample["input_ids"].tolist(), begin, end) for sample in samples for begin, end in learned_runs(sample)]
    answers = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
    for (ids, begin, end), i in zip(runs, answers, strict=True):
        assert ids[:begin] == theirs.apply_chat_template(messages[:i], add_generation_prompt=True, return_dict=False)
        expected = learned.replace("</s>", theirs.eos_token).replace("A", messages[i]["content"], 1)
        found = theirs.decode(ids[begin:end])
        # Llama-2's decoder moves spaces around special tokens
        assert found == expected if tokenizer == "bpe" else "".join(found.split()) == "".join(expected.split())
        assert ids[end - 1] in ours.stop_ids and not ours.stop_ids.intersection(ids[begin : end - 1])
    for sample in samples:
        assert torch.equal(sample["labels"] != IGNORE_INDEX, sample["response"])
        assert torch.equal(sample["labels"][sample["response"]], sample["input_ids"][sample["response"]])
    expected_notes = {note for note in notes if "system" not in note or "S" in kind}
    assert set(samples.notes) == (expected_notes | {SEVERAL} if kind in several else expected_notes)


def learned_texts(tokenizer, messages):
    """Return the part of each answer that is learned, as text."""
    return [
        tokenizer.decode(sample["input_ids"][begin:end], skip_special=False)
        for sample in encode(tokenizer, messages)
        for begin, end in learned_runs(sample)
    ]


@pytest.mark.parametrize("key", ["weight", "train", "loss"])
def test_an_answer_marked_so_is_not_learned(folders, key):
    ours, _ = load(folders["bpe"], TEMPLATES["a header and an end"][0])
    first = [TALK[0], {**TALK[1], key: 0}, TALK[2], {**TALK[3], key: 1}]
    assert learned_texts(ours, first) == ["New light, naïve café.<|end|>"]
    assert len(encode(ours, first)) == 1
    last = [TALK[0], TALK[1], TALK[2], {**TALK[3], key: False}]
    assert learned_texts(ours, last) == ["The stone.<|end|>"]
    assert encode(ours, first[:2]).n_dropped == 1


def test_a_greeting_before_the_first_question_is_not_learned(folders):
    """Chat never asks for one; an empty conversation, rendered to find where it begins, broke templates."""
    template = "{% if messages[0].role == 'system' %}{% endif %}" + TEMPLATES["a header and an end"][0]
    ours, theirs = load(folders["bpe"], template)
    greeted = [{"role": "assistant", "content": "Hello!"}, *TALK]
    (sample,) = encode(ours, greeted)
    assert learned_texts(ours, greeted) == ["The stone.<|end|>", "New light, naïve café.<|end|>"]
    ids = theirs.apply_chat_template(greeted, return_dict=False)
    assert sample["input_ids"].tolist() == ids[: len(sample["input_ids"])]


@pytest.mark.parametrize("name", TEMPLATES)
def test_an_answer_right_behind_another_is_refused_unless_it_is_marked(folders, name):
    """The template's text between the two was learned, a stop among it."""
    ours, _ = load(folders["bpe"], TEMPLATES[name][0])
    second = {"role": "assistant", "content": "It is old."}
    twice = [SYSTEM, *TALK[:2], second, *TALK[2:]]
    with pytest.raises(UserError, match=r"data, row 2: messages 3 and 4 are both the assistant's, .*: join [^;]*$"):
        encode(ours, TALK, twice)
    twice[3] = {**second, "weight": 0}
    assert len(learned_texts(ours, twice)) == 2


@pytest.mark.parametrize("style", ["plain", "chat"])
@pytest.mark.parametrize("output", ["red TOKEN green", "red TOKEN", "TOKEN", "red </s>"])
def test_an_answer_that_holds_its_own_end_is_refused(folders, style, output):
    ours, _ = load(folders["bpe"], TEMPLATES["a header and an end"][0])
    output = output.replace("TOKEN", "<|end|>").replace("</s>", ours.special_tokens["eos_token"])
    rows = [(1, {"instruction": output, "input": "", "output": "red"})]
    assert len(encode_rows(ours, rows, style=style, mask_inputs=False)) == 1
    rows += [(7, {"instruction": "a", "input": "", "output": output})]
    with pytest.raises(UserError, match=r"data, row 7: an answer holds <\|\w+\|>, which ends answers"):
        encode_rows(ours, rows, style=style, mask_inputs=True)


REASONED = [TALK[0], {"role": "assistant", "content": "<think>\nold?\n</think>\n\nThe stone."}, *TALK[2:]]
DROPPING = (
    "{% for m in messages %}{{ '<|' + m.role + '|>\n' }}"
    "{{ (m.content.split('</think>')[-1].strip() if DROPS else m.content) + '<|end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\nOPEN' }}{% endif %}"
)


@pytest.mark.parametrize("opening", ["", "<think>\n", "<think>"])
@pytest.mark.parametrize("drops", ["true", "not loop.last"])
def test_reasoning_is_learned_as_the_row_has_it_and_not_opened_twice(folders, drops, opening):
    """Templates drop it from earlier turns, or from the last one too, and open it in the prompt."""
    ours, theirs = load(folders["bpe"], DROPPING.replace("DROPS", drops).replace("OPEN", opening))
    assert learned_texts(ours, REASONED) == [
        REASONED[1]["content"].removeprefix(opening) + "<|end|>",
        "New light, naïve café.<|end|>",
    ]
    samples = encode(ours, REASONED)
    assert len(samples) == 2 and "old?" not in theirs.decode(samples[1]["input_ids"])
    assert (AS_WRITTEN in samples.notes) == (drops == "true" or opening != "")


def test_reasoning_beside_the_content_is_learned_or_refused(folders):
    row = [TALK[0], {**TALK[1], "reasoning_content": "old?"}]
    shows = TEMPLATES["a header and an end"][0].replace("m.content", "(m.reasoning_content or '') + m.content")
    assert learned_texts(load(folders["bpe"], shows)[0], row) == ["old?The stone.<|end|>"]
    with pytest.raises(ValueError, match=r"data, row 1: .* does not show the reasoning_content of message 2"):
        encode(load(folders["bpe"], TEMPLATES["a header and an end"][0])[0], row)


def test_all_conversations_that_a_template_refuses_are_told_at_once(folders):
    strict = (
        "{% for m in messages %}{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}"
        "{{ raise_exception('roles must alternate') }}{% endif %}{% endfor %}" + TEMPLATES["a header and an end"][0]
    )
    ours, _ = load(folders["bpe"], strict)
    rows = [TALK] * 50
    for i in range(1, 50, 2):
        rows[i] = [TALK[0], *TALK]
    with pytest.raises(ValueError, match=r"^data, row 2, row 4, .*, row 20 and 15 more: [^;]* roles must alternate$"):
        encode(ours, *rows)


def test_answers_that_merge_with_the_prompt_are_learned_behind_its_own_ids(folders):
    """`\n` before an answer, and one at its beginning, are one token together: no sample may hold that."""
    ours, theirs = load(
        folders["bpe"], TEMPLATES["nothing but line breaks"][0].replace("assistant: {%", "assistant:\n{%")
    )
    messages = [TALK[0], {"role": "assistant", "content": "\nThe stone."}]
    (sample,) = encode(ours, messages)
    prompt = theirs.apply_chat_template(messages[:1], add_generation_prompt=True, return_dict=False)
    assert sample["input_ids"][: len(prompt)].tolist() == prompt
    assert learned_texts(ours, messages) == ["\nThe stone." + theirs.eos_token]


def test_a_sentencepiece_folder_whose_bos_and_eos_have_no_name_learns_their_ids(spm_dir, tmp_path):
    """They were encoded as letters, and the end of an answer was never learned."""
    shutil.copy(spm_dir / "tokenizer.model", tmp_path)
    template = TEMPLATES["spaces and eos"][0]
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"add_bos_token": True, "chat_template": template}))
    tokenizer = Tokenizer(tmp_path)
    (sample,) = encode(tokenizer, TALK)
    ids = sample["input_ids"].tolist()
    assert (ids.count(1), ids.count(2), ids[0], ids[-1]) == (2, 2, 1, 2)
    assert [ids[end - 1] for _, end in learned_runs(sample)] == [2, 2]
