"""Fixtures shared by the tests: small tokenizers that are made here, so that no test needs a network or a large file.

`bpe_dir` looks like SmolLM2-Instruct's folder (byte-level BPE, ChatML), `spm_dir` like Llama-2's (SentencePiece, BOS).
"""

import json
import random
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

CHATML = (
    "{% for message in messages %}{% if loop.first and message['role'] != 'system' %}"
    "{{ '<|im_start|>system\nYou are a small test model.<|im_end|>\n' }}{% endif %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
WORDS = (
    "the a one two river stone house light water small large old new walks runs sleeps finds keeps opens Below is an "
    "instruction that describes task Write response appropriately completes request Input user assistant system answer "
    "question What How Why capital of France city name list three colours red green blue and or not with from to in"
).split()


def sample_text(n_sentences: int = 400, seed: int = 0) -> list[str]:
    """`n_sentences` lines of made-up text with numbers, punctuation and accents, the same for the same seed."""
    rng = random.Random(seed)
    endings = (".", "?", "!", ":", ", naïve café.", " (12).", " #3:\n")
    return [" ".join(rng.choices(WORDS, k=rng.randint(4, 12))) + rng.choice(endings) for _ in range(n_sentences)]


def write_bpe_tokenizer(folder: Path, *, vocab_size: int = 400) -> Path:
    """Write a byte-level BPE `tokenizer.json` and its `tokenizer_config.json` (ChatML template) into `folder`."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    specials = [AddedToken(t, special=True, normalized=False) for t in ("<|endoftext|>", "<|im_start|>", "<|im_end|>")]
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=specials,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(sample_text(), trainer)
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {
        "tokenizer_class": "GPT2Tokenizer",
        "bos_token": "<|im_start|>",
        "eos_token": "<|im_end|>",
        "pad_token": "<|im_end|>",
        "unk_token": "<|endoftext|>",
        "chat_template": CHATML,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder


def write_spm_tokenizer(folder: Path, *, vocab_size: int = 400, **training) -> Path:
    """Write a SentencePiece `tokenizer.model` (BPE, byte fallback) and a Llama-2-like `tokenizer_config.json`."""
    import sentencepiece

    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "tokenizer.model").open("wb") as file:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(sample_text()),
            model_writer=file,
            model_type="bpe",
            vocab_size=vocab_size,
            byte_fallback=True,
            normalization_rule_name="identity",
            remove_extra_whitespaces=False,
            allow_whitespace_only_pieces=True,
            split_digits=True,
            minloglevel=2,
            **training,
        )
    config = {
        "tokenizer_class": "LlamaTokenizer",
        "bos_token": "<s>",
        "eos_token": "</s>",
        "unk_token": "<unk>",
        "add_bos_token": True,
        "add_eos_token": False,
        "legacy": False,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder


@pytest.fixture(scope="session")
def bpe_dir(tmp_path_factory) -> Path:
    """A folder with a tiny byte-level BPE tokenizer and a ChatML template (400 tokens, no BOS). Read only."""
    return write_bpe_tokenizer(tmp_path_factory.mktemp("bpe"))


@pytest.fixture(scope="session")
def spm_dir(tmp_path_factory) -> Path:
    """A folder with a tiny SentencePiece tokenizer that adds BOS, without a chat template (400 tokens). Read only."""
    return write_spm_tokenizer(tmp_path_factory.mktemp("spm"))
