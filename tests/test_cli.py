"""Errors as a person sees them: one line for what can be cured, a traceback for our own bugs; and pasted commands."""

import json
import re
import shlex
from collections.abc import Collection
from dataclasses import dataclass

import pytest
import torch
from helpers import SOURCES, refusal, relative_path, script, train, write_base
from helpers import command as train_command

from lit_gpt.adapter import AdapterConfig
from lit_gpt.checkpoint import load_state, save_state
from lit_gpt.cli import adapter_flags, main
from lit_gpt.config import Config
from lit_gpt.errors import UserError, command, reading
from lit_gpt.tokenizer import Tokenizer

CURABLE = {
    "a setting": (UserError("--n 0: expected 1 or more"), "--n 0: expected 1 or more"),
    "several lines": (UserError("one\n  two"), "one two"),
    "a file": (FileNotFoundError("m is not a folder"), "m is not a folder"),
    "a package": (ModuleNotFoundError("No module named 'wandb'", name="wandb"), "No module named 'wandb'"),
    "memory": (MemoryError(), "out of memory: something smaller may fit (MemoryError)"),
    "memory of the CPU": (
        RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 64 bytes"),
        "out of memory: something smaller may fit (DefaultCPUAllocator: can't allocate memory: you tried to allocate "
        "64 bytes)",
    ),
}
BUGS = {
    "zip": lambda: list(zip([1, 2], [1], strict=True)),
    "key": lambda: {}["step"],
    "max": lambda: max([]),
    "name": lambda: UserError.nothing,
    "import": lambda: exec("from lit_gpt.cli import nothing"),
}


def ends(capsys, raise_it, *flags: str) -> tuple[int, str]:
    """The exit code and stderr of a script whose setup calls a function."""

    def setup(*, size: int = 1) -> None:
        """Do it."""
        raise_it()

    capsys.readouterr()
    with pytest.raises(SystemExit) as end:
        main(setup, [*flags])
    return end.value.code, capsys.readouterr().err


def raiser(error: Exception):
    def raise_it() -> None:
        raise error

    return raise_it


@pytest.mark.parametrize("case", CURABLE)
def test_what_a_person_can_cure_is_one_line_and_a_traceback_with_debug(case, capsys):
    error, line = CURABLE[case]
    assert ends(capsys, raiser(error)) == (1, f"error: {line}\n")
    with pytest.raises(type(error)):
        ends(capsys, raiser(error), "--debug")


@pytest.mark.parametrize("case", BUGS)
def test_our_own_bug_shows_its_traceback_and_asks_for_a_report(case, capsys):
    """`zip() argument 2 is shorter` was one line that read as the user's mistake."""
    code, text = ends(capsys, BUGS[case])
    assert code == 1 and text.startswith("Traceback (most recent call last)") and "test_cli.py" in text
    assert text.splitlines()[-1].startswith("error: a bug of ours") and "report" in text.splitlines()[-1]


@pytest.mark.parametrize(
    "content", [None, b"", b"\xff\xfe", b"[1, 2]", b"size: x", b"size: null", b"size: [", b"nothing: 1", b"x"]
)
def test_a_config_file_that_is_none_is_one_line(content, tmp_path, capsys):
    path = tmp_path / "c.yaml"
    path.mkdir() if content is None else path.write_bytes(content)
    code, text = ends(capsys, lambda: None, "--config", str(path))
    assert code == 2 and text.startswith("error: ") and text.count("\n") == 1


def given_to(*args: str) -> dict:
    """The arguments that a script's setup gets."""
    got = {}

    def setup(*, size: int = 1, rate: float = 0.5, given: Collection[str] = ()) -> None:
        """Do it."""
        got.update(size=size, rate=rate, given=given)

    main(setup, args)
    return got


@pytest.mark.parametrize("joined", [False, True])
def test_a_flag_wins_over_a_config_file_wherever_it_stands(joined, tmp_path):
    """`--train.learning_rate 5e-3 --config f.yaml` trained with the file's rate, without a word."""
    configs = []
    for name, text in (("a", "size: 2\nrate: 2.0"), ("b", "size: 3")):
        (tmp_path / name).write_text(text)
        configs += [f"--config={tmp_path / name}"] if joined else ["--config", str(tmp_path / name)]
    for args in (["--rate", "7", *configs], [*configs, "--rate=7"]):
        got = given_to(*args)
        assert (got["size"], got["rate"]) == (3, 7.0)  # the later file wins over the earlier one
        assert {"size", "rate"} & got["given"] == {"rate"}


@pytest.mark.parametrize("flag", ["--train.learning_rat", "--learning_rate"])
def test_an_unknown_flag_is_told_with_the_one_that_may_be_meant(flag, capsys):
    told = refusal(capsys, "finetune/ether.py", ["--io.train_data_dir", "data", flag, "1"])
    assert "did you mean --train.learning_rate?" in told
    told = refusal(capsys, "finetune/ether.py", ["--io.train_data_dir", "data", "--checkpoint_dir=base"])
    assert "did you mean --io.checkpoint_dir?" in told
    assert "did you mean" not in refusal(capsys, "finetune/ether.py", ["--io.train_data_dir", "data", "--zzz", "1"])


def test_printed_commands_can_be_pasted(tmp_path):
    words = shlex.split(command("scripts/merge_ether.py", checkpoint_dir=tmp_path / "my model", ether_path="it's.pth"))
    assert words[:2] == ["python", "scripts/merge_ether.py"]
    assert words[2:] == ["--checkpoint_dir", str(tmp_path / "my model"), "--ether_path", "it's.pth"]


@pytest.mark.parametrize("path", SOURCES, ids=relative_path)
def test_every_printed_command_is_quoted(path):
    """A path with a space inside a command of an f-string would be two words of the shell."""
    text = path.read_text(encoding="utf-8")
    assert not re.findall(r'f"[^"\n]*(?:python|vllm serve|hf download) \S[^"\n]*--?\w+ \{(?!shlex)[^"\n]*', text)


def test_a_flag_with_the_defaults_value_contradicts_an_adapter_too(work, tmp_path, capsys):
    """`--Htype ether --ether_nb 1` beside --init_from of an ETHER+ of n = 2 was ignored."""
    train(work, "etherplusHH", tmp_path / "one", "--train.max_steps", "1")
    start = ["--init_from", str(tmp_path / "one" / "lit_model_ether_finetuned.pth"), "--train.max_steps", "1"]
    _, (*flags, _, _, _, _) = train_command(work, "ether", tmp_path / "two")
    (tmp_path / "one.yaml").write_text("ether_value: false")
    for more, told in (
        (["--ether_nb", "1"], "nb = 2, a flag says 1"),
        (["--Htype", "ether"], "Htype = etherplusHH, a flag says ether"),
        (["--ether_block_layout", "published"], "block_layout = diagonal, a flag says published"),
        (["--config", str(tmp_path / "one.yaml")], "value = True, a flag says False"),
    ):
        assert told in refusal(capsys, "finetune/ether.py", [*flags, *start, *more])
    (tmp_path / "all.yaml").write_text("Htype: ether\nether_nb: 1")  # as --print_config writes what no one chose
    start += ["--config", str(tmp_path / "all.yaml")]
    main(script("finetune/ether.py"), [*flags, *start, "--ether_nb", "2", "--ether_dropout", "0.0"])


def test_a_lora_flag_with_the_defaults_value_contradicts_an_adapter_too(work, tmp_path, capsys):
    train(work, "lora", tmp_path / "one", "--train.max_steps", "1", "--lora_r", "2")
    start = ["--init_from", str(tmp_path / "one" / "lit_model_lora_finetuned.pth")]
    _, flags = train_command(work, "lora", tmp_path / "two", *start, "--lora_r", "8")
    assert "r = 2, a flag says 8" in refusal(capsys, "finetune/lora.py", flags)


WRONG_NUMBERS = {
    "rate": (["--train.learning_rate", ".nan"], "--train.learning_rate must be positive"),
    "word": (["--train.learning_rate", "nan"], "Got value: nan"),
    "endless rate": (["--train.learning_rate", ".inf"], "--train.learning_rate must be positive"),
    "decay": (["--train.weight_decay", "-1"], "--train.weight_decay must be 0 or more"),
    "no decay": (["--train.weight_decay", ".nan"], "--train.weight_decay must be 0 or more"),
    "seed": (["--seed", "-1"], "--seed must be 0 or more"),
    "large seed": (["--seed", str(10**30)], "--seed must be 0 or more"),
    "norm": (["--train.max_grad_norm", ".nan"], "--train.max_grad_norm must be positive"),
    "devices": (["--devices", "-1"], "--devices"),
    "many devices": (["--devices", "9" * 20], "--devices times --num_nodes must be positive and below 2^31"),
    "epochs": (["--train.epochs", str(10**30)], "samples, expected less than 2^31"),
    "null": (["--train.epochs", "null"], "Got value: None"),
}


@pytest.mark.parametrize("case", WRONG_NUMBERS)
def test_a_number_that_cannot_be_meant_is_refused_before_training(case, work, tmp_path, capsys):
    flags, message = WRONG_NUMBERS[case]
    name, arguments = train_command(work, "ether", tmp_path / "run", *flags)
    assert message in refusal(capsys, name, arguments)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    "change",
    [dict(n_layer="x"), dict(n_head=0), dict(n_embd=None), dict(norm_eps="1e-5"), dict(tie_embeddings="no"),
     dict(vocab_size=-1), dict(head_size=-1), dict(n_query_groups=-2), dict(name=3), dict(block_size=10**30),
     dict(mlp_class={})],
    ids=str,
)  # fmt: skip
def test_a_config_of_wrong_types_is_a_users_error(change, tmp_path):
    path = tmp_path / "lit_config.json"
    path.write_text(json.dumps(Config().to_dict() | change))
    with pytest.raises(UserError, match=next(iter(change))):
        Config.from_json(path)


@pytest.mark.parametrize("entry", [dict(chat_template=[1]), dict(eos_token=[1]), dict(eos_token=3)])
def test_a_tokenizer_config_of_another_shape_is_a_users_error(entry, bpe_dir, tmp_path):
    folder = write_base(tmp_path / "base", bpe_dir)
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps(settings | entry))
    with pytest.raises(UserError, match=r"the tokenizer of .* does not hold what it should"):
        Tokenizer(folder)


ADAPTERS = {
    "no tensors": lambda content: content["model"].update(dict.fromkeys(content["model"], 3)),
    "no dict": lambda content: content.update(config=[1]),
    "no settings": lambda content: content["config"].update(ether=None),
    "no base": lambda content: content["config"].pop("base"),
    "base in a list": lambda content: content["config"].update(base=[1]),
    "wrong types": lambda content: content["config"]["ether"].update(nb="x"),
    "wrong method": lambda content: content["config"]["ether"].update(Htype=[1]),
    "no dimensions": lambda content: (
        content.pop("config") and content["model"].update(dict.fromkeys(content["model"], torch.ones(())))
    ),
}


def test_an_adapter_file_of_another_shape_is_one_line(work, tmp_path, capsys):
    train(work, "ether", tmp_path / "run", "--train.max_steps", "1")
    path = tmp_path / "run" / "lit_model_ether_finetuned.pth"
    content = load_state(path)
    for name, change in ADAPTERS.items():
        changed = {"model": dict(content["model"]), "config": dict(content["config"])}
        changed["config"]["ether"] = dict(changed["config"]["ether"])
        change(changed)
        save_state(changed, tmp_path / "changed.pth")
        flags = ["--checkpoint_dir", str(work / "base"), "--ether_path", str(tmp_path / "changed.pth")]
        assert "changed.pth" in refusal(
            capsys, "scripts/merge_ether.py", [*flags, "--out_dir", str(tmp_path / "out")]
        ), name
        assert not (tmp_path / "out").exists()


def test_reading_names_the_file_and_passes_our_own_words_on():
    with pytest.raises(UserError, match=r"a.json does not hold what it should .KeyError: 'x'"), reading("a.json"):
        _ = {}["x"]
    with pytest.raises(UserError, match=r"^mine$"), reading("a.json"):
        raise UserError("mine")


def test_a_field_of_an_adapter_without_help_is_an_error_and_no_missing_flag():
    @dataclass
    class Config(AdapterConfig):
        """Settings."""

        kind = "new"
        gate: bool = False

    def setup(*, adapter: Config):
        """Train."""

    with pytest.raises(KeyError, match="gate"):
        adapter_flags(setup)
