"""The prompt styles, word for word, and the ids that stand before a response."""

import pytest

from lit_gpt.prompts import PROMPT_STYLES, check_style, encode_prompt, render_prompt
from lit_gpt.tokenizer import Tokenizer


def test_alpaca_is_stanfords_text_word_for_word():
    assert render_prompt("alpaca", "Add the numbers.", "1 and 2") == (
        "Below is an instruction that describes a task, paired with an input that provides further context. "
        "Write a response that appropriately completes the request.\n\n"
        "### Instruction:\nAdd the numbers.\n\n### Input:\n1 and 2\n\n### Response:"
    )
    assert render_prompt("alpaca", "Say hello.") == (
        "Below is an instruction that describes a task. "
        "Write a response that appropriately completes the request.\n\n"
        "### Instruction:\nSay hello.\n\n### Response:"
    )


def test_plain_adds_nothing_but_a_line_break():
    assert render_prompt("plain", "Once upon a time") == "Once upon a time"
    assert render_prompt("plain", "Add.", "1 2") == "Add.\n1 2"


def test_braces_in_the_text_stay_as_they_are():
    for style in PROMPT_STYLES:
        assert "{x} %s {0}" in render_prompt(style, "the", "{x} %s {0}")


def test_chat_asks_the_models_template(bpe_dir):
    assert render_prompt("chat", "Add.", "1 2", Tokenizer(bpe_dir)) == (
        "<|im_start|>system\nYou are a small test model.<|im_end|>\n"
        "<|im_start|>user\nAdd.\n1 2<|im_end|>\n<|im_start|>assistant\n"
    )


def test_bos_stands_before_a_style_where_the_tokenizer_adds_it_and_never_before_a_chat(spm_dir, bpe_dir, tmp_path):
    tokenizer = Tokenizer(spm_dir)
    assert encode_prompt(tokenizer, "alpaca", instruction="the river") == tokenizer.encode(
        render_prompt("alpaca", "the river")
    )
    tokenizer.chat_template = "{{ bos_token }}[INST] {{ messages[0].content }} [/INST]"
    ids = encode_prompt(tokenizer, "chat", instruction="the river")
    assert ids[0] == tokenizer.bos_id and ids.count(tokenizer.bos_id) == 1
    assert Tokenizer(bpe_dir).bos_id not in encode_prompt(Tokenizer(bpe_dir), "plain", instruction="the")


def test_unknown_styles_and_a_missing_template_are_refused(spm_dir):
    with pytest.raises(ValueError, match=r"unknown prompt style 'alpacca'; choices: alpaca, plain, chat"):
        check_style("alpacca")
    with pytest.raises(ValueError, match=r"has no chat template; choose one of alpaca, plain"):
        render_prompt("chat", "the", "", Tokenizer(spm_dir))
    with pytest.raises(ValueError, match="no tokenizer was given"):
        render_prompt("chat", "the")
