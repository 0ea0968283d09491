"""Tokenizer, model and data that do not belong together are refused in one line; what an answer ends with travels."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from helpers import QUICK, edit_json, refusal, script, write_base, write_bpe_tokenizer, write_llama_config

from lit_gpt.cli import main
from lit_gpt.data import load_split, prepare
from lit_gpt.files import read_json, write_json

ROWS = [{"instruction": f"name colour {i}", "input": "", "output": "the red river"} for i in range(8)]
CHAT = [
    {"messages": [{"role": "user", "content": f"the {i}"}, {"role": "assistant", "content": "a"}]} for i in range(8)
]
BEYOND = r"<\|im_start\|> is id 400, <\|im_end\|> is id 401: the model has 400 rows"


def write_rows(folder: Path, rows: list[dict], name: str) -> Path:
    path = folder / f"{name}.json"
    path.write_text(json.dumps(rows))
    return path


def make_data(base: Path, rows: list[dict], name: str, **options) -> Path:
    """Rows, prepared for a base beside it."""
    folder = base.parent / name
    prepare(write_rows(base.parent, rows, name), destination_path=folder, checkpoint_dir=base, **options)
    return folder


def flags(data: Path, out: Path, *more: str) -> list[str]:
    return ["--io.train_data_dir", str(data), "--io.out_dir", str(out), *QUICK, "--train.max_steps", "1", *more]


@pytest.fixture
def base(tmp_path, bpe_dir) -> Path:
    return write_base(tmp_path / "base", bpe_dir)


@pytest.fixture
def small(tmp_path) -> Path:
    """A base of 400 rows, whose two chat tokens have the ids 400 and 401."""
    folder = write_base(tmp_path / "small", write_bpe_tokenizer(tmp_path / "tokenizer"))
    content = read_json(folder / "tokenizer.json")
    content["added_tokens"] = content["added_tokens"][:1]
    for token in ("<|im_start|>", "<|im_end|>"):
        content["model"]["vocab"][token + "old"] = content["model"]["vocab"].pop(token)
    write_json(folder / "tokenizer.json", content)
    edit_json(
        folder / "tokenizer_config.json",
        bos_token=None, eos_token="<|endoftext|>", pad_token=None, unk_token=None,
        additional_special_tokens=["<|im_start|>", "<|im_end|>"],
    )  # fmt: skip
    return folder


def test_ids_without_a_row_are_named_when_data_are_prepared_and_before_training(small, tmp_path, capsys):
    with pytest.raises(ValueError, match=BEYOND):
        make_data(small, CHAT, "chat")
    assert not (tmp_path / "chat").exists()
    data = make_data(small, ROWS, "plain", prompt_style="plain")  # no row holds such a token
    main(script("finetune/ether.py"), flags(data, tmp_path / "run"))
    more = ["--eval.sample_prompt", "the<|im_start|>", "--eval.sample_interval", "1"]
    line = refusal(capsys, "finetune/ether.py", flags(data, tmp_path / "r2", *more))
    assert "<|im_start|> is id 400: the model has 400 rows" in line
    split = load_split(data / "train.pt")
    split[1]["input_ids"][2] = 401  # data of another hand, or of an older version
    torch.save(
        {n: torch.cat([s[n] for s in split]) for n in split[0]}
        | {"lengths": torch.tensor([len(s["labels"]) for s in split])},
        data / "train.pt",
    )
    line = refusal(capsys, "finetune/ether.py", flags(data, tmp_path / "r3"))
    assert "<|im_end|> is id 401: the model has 400 rows" in line
    assert not (tmp_path / "r3").exists()


def test_chat_names_a_token_without_a_row(small):
    from chat.base import Conversation
    from lit_gpt.checkpoint import load_model
    from lit_gpt.tokenizer import Tokenizer

    with pytest.raises(ValueError, match=r"<\|im_end\|> is id 401: the model has 400 rows"):
        talk = Conversation(load_model(small), Tokenizer(small), "plain", sampling={"max_new_tokens": 9})
        talk.ask("the <|im_end|>")


def test_validation_data_of_another_tokenizer_or_style_are_refused(base, small, tmp_path, capsys):
    data = make_data(base, ROWS, "alpaca")
    other, plain = make_data(small, ROWS, "other"), make_data(base, ROWS, "plain", prompt_style="plain")
    (tmp_path / "bare").mkdir()
    shutil.copyfile(data / "test.pt", tmp_path / "bare" / "test.pt")
    for folder, message in (
        (other, f"--io.val_data_dir {other} was prepared with another tokenizer than --io.train_data_dir {data}"),
        (plain, f"--io.val_data_dir {plain} was prepared with another prompt style (plain, not alpaca)"),
        (tmp_path / "bare", "holds no data_config.json"),
    ):
        line = refusal(capsys, "finetune/ether.py", flags(data, tmp_path / "run", "--io.val_data_dir", str(folder)))
        assert message in line
    assert not (tmp_path / "run").exists()
    same = make_data(base, ROWS[:5], "same")
    main(script("finetune/ether.py"), flags(data, tmp_path / "run", "--io.val_data_dir", str(same)))


# ---- what an answer ends with


@pytest.fixture
def ends_elsewhere(base) -> Path:
    """A base whose EOS is <|endoftext|> (0), and whose chat template ends a turn with <|im_end|> (2)."""
    edit_json(base / "tokenizer_config.json", bos_token=None, eos_token="<|endoftext|>", pad_token=None)
    write_json(base / "generation_config.json", {"eos_token_id": 0, "temperature": 0.6})
    return base


def test_the_end_of_a_turn_is_listed_in_what_finetuning_merging_and_converting_write(ends_elsewhere, tmp_path, capsys):
    """transformers and vLLM never stopped: the base's generation_config.json said its EOS alone."""
    write_llama_config(ends_elsewhere)
    chat, alpaca = make_data(ends_elsewhere, CHAT, "chat"), make_data(ends_elsewhere, ROWS, "alpaca")
    for data, ends in ((chat, [0, 2]), (alpaca, 0)):
        out = tmp_path / f"run-{data.name}"
        main(script("finetune/ether.py"), flags(data, out))
        adapter = ["--ether_path", str(out / "lit_model_ether_finetuned.pth"), "--checkpoint_dir", str(ends_elsewhere)]
        main(script("scripts/merge_ether.py"), [*adapter, "--precision", "32-true"])
        main(script("finetune/full.py"), flags(data, out / "full"))
        for folder in (out / "merged", out / "full" / "final"):
            assert read_json(folder / "generation_config.json") == {"eos_token_id": ends, "temperature": 0.6}
            write_json(folder / "generation_config.json", {"eos_token_id": 0})  # as older versions left it
            convert = ["--checkpoint_dir", str(folder), "--out_dir", str(folder / "hf")]
            main(script("scripts/convert_lit_checkpoint.py"), convert)
            assert read_json(folder / "hf" / "generation_config.json")["eos_token_id"] == ends
        capsys.readouterr()
        main(script("scripts/export_lora.py"), [*adapter, "--out_dir", str(out / "lora")])
        assert ("ask with stop_token_ids = [2]" in capsys.readouterr().out) == (data == chat)


def test_an_end_that_config_json_alone_tells_is_kept_beside_the_new_one(ends_elsewhere, tmp_path):
    from lit_gpt.tokenizer import list_answer_end

    (ends_elsewhere / "generation_config.json").unlink()
    list_answer_end(ends_elsewhere, "chat")
    assert not (ends_elsewhere / "generation_config.json").exists(), "no file says anything: transformers reads neither"
    write_json(ends_elsewhere / "config.json", {"eos_token_id": 0, "bos_token_id": 1})
    list_answer_end(ends_elsewhere, "alpaca")
    assert not (ends_elsewhere / "generation_config.json").exists()
    list_answer_end(ends_elsewhere, "chat")
    assert read_json(ends_elsewhere / "generation_config.json") == {"bos_token_id": 1, "eos_token_id": [0, 2]}
