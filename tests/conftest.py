"""Fixtures that several test files share. What they build comes from helpers.py.

`bpe_dir` looks like SmolLM2-Instruct's folder (byte-level BPE, ChatML), `spm_dir` like Llama-2's (SentencePiece, BOS).
"""

import gc
import sys
from pathlib import Path

import pytest

gc.disable()  # until ``pytest_collection_finish``
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from helpers import write_bpe_tokenizer, write_spm_tokenizer, write_work


def pytest_collection_finish() -> None:
    """Let the garbage collector leave alone what imports and collection made, which stays: 700,000 objects.

    It went through them again and again, for a tenth of the suite's time.
    """
    gc.freeze()
    gc.set_threshold(50_000, 20, 100)
    gc.enable()


def pytest_unconfigure() -> None:
    """Let what was left alone end in order: Triton would report its functions as leaked."""
    gc.unfreeze()


@pytest.fixture(scope="session")
def bpe_dir(tmp_path_factory) -> Path:
    """A folder with a tiny byte-level BPE tokenizer and a ChatML template (400 tokens, no BOS). Read only."""
    return write_bpe_tokenizer(tmp_path_factory.mktemp("bpe"))


@pytest.fixture(scope="session")
def spm_dir(tmp_path_factory) -> Path:
    """A folder with a tiny SentencePiece tokenizer that adds BOS, without a chat template (400 tokens). Read only."""
    return write_spm_tokenizer(tmp_path_factory.mktemp("spm"))


@pytest.fixture(scope="module")
def own_datasets_cache(tmp_path_factory):
    """Keep `datasets` offline and out of the home folder, and the harness's bootstrap in this process.

    Its draws are the same; a pool would fork a process of a million objects for every metric, half a second each time.
    """
    import datasets

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))
        patch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
        patch.setenv("DISABLE_MULTIPROC", "1")
        yield


@pytest.fixture(scope="session")
def work(tmp_path_factory, bpe_dir) -> Path:
    """A folder with a base and the data for it. Read only, but for new folders beside the two."""
    return write_work(tmp_path_factory.mktemp("work"), bpe_dir)
