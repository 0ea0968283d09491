"""The terminal chat: through a pipe, in a pseudo-terminal, and as a function; on tiny models made here."""

import io
import os
import pty
import re
import select
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from helpers import encode_rows, tiny_model, write_folder

from chat.base import Conversation, encode, setup
from lit_gpt.adapter import adapter_parameters
from lit_gpt.adapter_files import save_adapter
from lit_gpt.batches import collate
from lit_gpt.checkpoint import fingerprint, load_model, load_state, save_prompt_style
from lit_gpt.cli import main
from lit_gpt.ether import EtherConfig, add_ether
from lit_gpt.lora import LoraConfig, add_lora
from lit_gpt.prompts import alpaca
from lit_gpt.tokenizer import Tokenizer

SCRIPT = Path(__file__).resolve().parents[1] / "chat" / "base.py"
SIZES = dict(n_embd=64, intermediate_size=128, block_size=256)
TALK = [
    {"role": "user", "content": "What is the capital of France?"},
    {"role": "assistant", "content": "The capital of France is Paris. 🗼 巴黎"},
    {"role": "user", "content": "And?"},
    {"role": "assistant", "content": "The river runs.\n\nThe stone sleeps."},
]


@pytest.fixture(scope="module")
def trained_dir(bpe_dir, tmp_path_factory) -> Path:
    """A model that knows one conversation by heart, from the `messages` encoding of the training data."""
    samples = encode_rows(Tokenizer(bpe_dir), [(1, {"messages": TALK})], style="chat", mask_inputs=True)
    idx, targets = collate(samples)
    model = tiny_model(**SIZES)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=0.0)
    for _ in range(120):
        loss = model(idx, targets=targets) / (targets != -100).sum()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss < 0.02, "the model has not learned its conversation; the tests below would mean nothing"
    return write_folder(tmp_path_factory.mktemp("chat") / "trained", model, bpe_dir)


@pytest.fixture(scope="module")
def endless_dir(bpe_dir, tmp_path_factory) -> Path:
    """A random model that never ends an answer."""
    model = tiny_model(**SIZES | dict(block_size=50_000, lm_head_bias=True))
    model.lm_head.bias.data[list(Tokenizer(bpe_dir).stop_ids)] = -1e9
    return write_folder(tmp_path_factory.mktemp("chat") / "endless", model, bpe_dir)


@pytest.fixture
def pipe(monkeypatch, capsys):
    """Run the script in this process on a piped prompt: (exit code, stdout, stderr)."""

    def call(prompt: str | bytes, *args: object) -> tuple[int, str, str]:
        data = prompt if isinstance(prompt, bytes) else prompt.encode()
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(data), encoding="utf-8"))
        try:
            main(setup, [str(arg) for arg in args])
            code = 0
        except SystemExit as error:
            code = error.code
        return code, *capsys.readouterr()

    return call


# ---------------------------------------------------------------------------------------------------- as a function
def test_a_model_trained_on_messages_ends_its_turn_and_carries_the_conversation(trained_dir):
    tokenizer = Tokenizer(trained_dir)
    sampling = {"max_new_tokens": 100, "temperature": 0.0}
    talk = Conversation(load_model(trained_dir), tokenizer, "chat", sampling=sampling)
    pieces: list[str] = []
    first = talk.ask(TALK[0]["content"], pieces.append)
    assert (first.text, first.end) == (TALK[1]["content"], "")
    assert "".join(pieces) == first.text and len(pieces) > 5
    computed: list[int] = []
    talk.model.transformer.wte.register_forward_pre_hook(lambda _, inputs: computed.append(inputs[0].size(1)))
    second = talk.ask(TALK[2]["content"], pieces.append)
    assert (second.text, second.end) == (TALK[3]["content"], "")
    assert talk.turns == TALK
    whole = tokenizer.render_chat(TALK[:3], add_generation_prompt=True)
    assert TALK[0]["content"] in whole and TALK[1]["content"] in whole
    assert second.prompt_tokens == len(tokenizer.encode(whole, bos=False))
    third = talk.ask(TALK[2]["content"], pieces.append)
    # what a turn costs: the end of the last answer, this question, and the answer's own tokens but the last
    assert sum(computed[-third.tokens - 1 :]) < second.prompt_tokens
    del talk.turns[-2:]
    # without the first turn the model does not know the second: it was the conversation that told it
    alone = Conversation(talk.model, tokenizer, "chat", sampling=sampling).ask(TALK[2]["content"])
    assert alone.text != second.text


def test_answer_says_why_it_ended(trained_dir, endless_dir):
    model, tokenizer = load_model(trained_dir), Tokenizer(trained_dir)
    reply = Conversation(model, tokenizer, "chat", sampling={"max_new_tokens": 3}).ask(TALK[0]["content"])
    assert (reply.tokens, reply.end) == (3, "cut at --max_new_tokens") and TALK[1]["content"].startswith(reply.text)
    assert "--max_new_tokens" in reply.summary() and "tokens/s" in reply.summary()
    model = load_model(endless_dir)
    model.config.block_size = 80
    talk = Conversation(model, tokenizer, "plain", sampling={"max_new_tokens": 500})
    reply = talk.ask("Hi")
    assert reply.end == "cut where the model's context ends" and reply.tokens + reply.prompt_tokens == 80

    def interrupt(piece: str) -> None:
        raise KeyboardInterrupt

    stopped = talk.ask("Hi", write=interrupt)
    assert stopped.end == "interrupted" and stopped.tokens >= 1
    assert talk.ask("Hi").text == reply.text, "the model was not given back as it was"


def test_a_prompt_style_keeps_no_conversation(trained_dir):
    tokenizer = Tokenizer(trained_dir)
    talk = Conversation(load_model(trained_dir), tokenizer, "alpaca", sampling={"max_new_tokens": 4})
    lengths = [talk.ask("Name three colours", lambda piece: None).prompt_tokens for _ in range(2)]
    assert lengths == [len(tokenizer.encode(alpaca("Name three colours", "")))] * 2


def test_the_oldest_turns_go_where_the_conversation_outgrows_the_context(trained_dir, capsys):
    model, tokenizer = load_model(trained_dir), Tokenizer(trained_dir)
    model.config.block_size = 128
    talk = Conversation(model, tokenizer, "chat", system="Be brief", sampling={"max_new_tokens": 20})
    for number in range(9):
        reply = talk.ask(f"question number {number}", lambda piece: None)
    assert "the conversation outgrew the context" in capsys.readouterr().err
    asked = encode(tokenizer, "chat", [{"role": "system", "content": "Be brief"}, *talk.turns[:-1]])
    assert reply.prompt_tokens == len(asked)
    assert talk.turns[-2]["content"] == "question number 8" and talk.turns[0]["role"] == "user"
    assert 2 <= len(talk.turns) < 18
    before = list(talk.turns)
    with pytest.raises(ValueError, match=r"prompt has \d+ tokens, the model's context holds 128"):
        talk.ask("river " * 200, lambda piece: None)
    assert talk.turns == before, "a prompt that was refused is not part of the conversation"
    model.config.block_size = len(encode(tokenizer, "chat", [{"role": "user", "content": "river"}]))
    with pytest.raises(ValueError, match="with its answer: shorten it"):  # an empty answer would say nothing
        Conversation(model, tokenizer, "chat", sampling={"max_new_tokens": 20}).ask("river", lambda piece: None)


@pytest.mark.parametrize("text", ["The river runs.", "    def f():\n        return 1\n"])
def test_a_later_turn_is_asked_with_the_ids_that_its_training_row_has(spm_dir, tmp_path, text):
    """The model writes the template's spaces around its answer; they came back twice, or the answer's own went."""
    shutil.copytree(spm_dir, tmp_path / "tokenizer")
    tokenizer = Tokenizer(tmp_path / "tokenizer")
    tokenizer.chat_template = (
        "{% for m in messages %}{% if m.role == 'assistant' %}{{ ' ' + m.content + ' ' + eos_token }}{% else %}"
        "{{ bos_token + '[INST] ' + m.content + ' [/INST]' }}{% endif %}{% endfor %}"
    )
    messages = [TALK[0], {"role": "assistant", "content": text}, *TALK[2:]]
    (sample,) = encode_rows(tokenizer, [(1, {"messages": messages})], style="chat", mask_inputs=True)
    ids, learned = sample["input_ids"].tolist(), (sample["labels"] != -100).tolist()
    model = tiny_model(**SIZES | dict(block_size=512))
    begin = learned.index(True)
    end = learned.index(False, begin)

    class Parrot(torch.nn.Module):
        """Writes the row's first answer, whatever it is asked."""

        def forward(self, hidden):
            logits = torch.zeros(1, 400)
            logits[0, ids[begin + self.n]] = 1.0
            self.n += 1
            return logits

    model.lm_head = Parrot()
    model.lm_head.n = 0
    talk = Conversation(model, tokenizer, "chat", sampling={"max_new_tokens": end - begin + 1, "temperature": 0.0})
    assert talk.ask(TALK[0]["content"], lambda piece: None).end == ""
    assert talk.turns == messages[:2]
    asked = [*talk.turns, TALK[2]]
    assert encode(tokenizer, "chat", asked) == ids[: learned.index(True, end)]


# ---------------------------------------------------------------------------------------------------- a pipe
def test_a_piped_prompt_gives_the_answer_alone_on_stdout(trained_dir, tmp_path):
    """As a process of its own, from another folder."""
    command = [sys.executable, str(SCRIPT), "--checkpoint_dir", str(trained_dir), "--temperature", "0"]
    done = subprocess.run(command, input=TALK[0]["content"] + "\n", capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout == TALK[1]["content"] + "\n"
    assert re.search(r"\d+ tokens, \d+\.\d tokens/s", done.stderr)
    assert "prompt style chat: the conversation is kept" in done.stderr and "greedy" in done.stderr


def test_a_system_message_that_the_template_leaves_out_is_told(trained_dir, tmp_path, pipe):
    folder = shutil.copytree(trained_dir, tmp_path / "copy")
    args = ("--checkpoint_dir", folder, "--max_new_tokens", "2", "--system", "Be kind")
    assert "leaves out" not in pipe("Hi", *args)[2]
    (folder / "chat_template.jinja").write_text(
        "{% for m in messages if m.role != 'system' %}{{ m.content }}{% endfor %}"
    )
    code, _, err = pipe("Hi", *args)
    assert code == 0 and "[--system: the chat template leaves out what the system says" in err


def test_the_prompt_style_travels_with_the_model_and_the_flag_overrides_it(trained_dir, tmp_path, pipe):
    folder = shutil.copytree(trained_dir, tmp_path / "copy")
    save_prompt_style(folder, "alpaca")
    args = ("--checkpoint_dir", folder, "--max_new_tokens", "5", "--temperature", "0")
    code, _, err = pipe("What is the capital of France?", *args)
    assert code == 0 and "prompt style alpaca: every prompt stands alone" in err
    n_tokens = len(Tokenizer(folder).encode(alpaca("What is the capital of France?", "")))
    assert f"prompt: {n_tokens} tokens" in err
    code, out, err = pipe("What is the capital of France?", *args, "--prompt_style", "chat")
    assert code == 0 and "prompt style chat" in err and TALK[1]["content"].startswith(out.strip())


def test_an_unmerged_adapter_brings_its_prompt_style(trained_dir, endless_dir, tmp_path, pipe):
    model = load_model(trained_dir)
    base = {"name": "trained", "fingerprint": fingerprint(torch.load(trained_dir / "lit_model.pth", weights_only=True))}
    config = EtherConfig(Htype="etherplusHH", nb=2)
    add_ether(model, config)  # starts at the identity
    path = tmp_path / "adapter.pth"
    save_adapter(path, model, kind="ether", config=config, base=base, prompt_style="alpaca")
    args = ("--checkpoint_dir", trained_dir, "--ether_path", path, "--temperature", "0")
    code, out, err = pipe(TALK[0]["content"], *args, "--prompt_style", "chat")
    assert (code, out) == (0, TALK[1]["content"] + "\n")
    code, _, err = pipe("Hi", *args, "--max_new_tokens", "3")
    assert code == 0 and "prompt style alpaca" in err
    torch.save([1, 2], tmp_path / "list.pth")
    for wrong, message in (
        (
            ("--checkpoint_dir", trained_dir, "--ether_path", tmp_path / "list.pth"),
            "holds a list, a dict of tensors was expected",
        ),
        (("--checkpoint_dir", endless_dir, "--ether_path", path), "belongs to another base model"),
        (("--checkpoint_dir", trained_dir, "--strength", "0.5"), "--strength 0.5 needs an adapter file"),
        (("--checkpoint_dir", trained_dir, "--lora_path", path), "a LoRA one was expected"),
        (("--checkpoint_dir", trained_dir, "--ether_path", trained_dir / "lit_model.pth"), "not an adapter file"),
        (("--checkpoint_dir", trained_dir, "--ether_path", tmp_path / "none.pth"), "none.pth is not a file"),
    ):
        code, out, err = pipe("Hi", *wrong)
        assert code == 1 and out == "" and message in err and "Traceback" not in err, err
        assert len(err.strip().splitlines()) == 1


def test_strength_0_answers_as_the_base_does(endless_dir, tmp_path, pipe):
    model, config = load_model(endless_dir), LoraConfig(head=True)
    base = {"name": "endless", "fingerprint": fingerprint(load_state(endless_dir / "lit_model.pth"))}
    add_lora(model, config)
    for parameter in adapter_parameters(model).values():
        torch.nn.init.normal_(parameter)
    save_adapter(tmp_path / "a.pth", model, kind="lora", config=config, base=base, prompt_style=None)
    args = ("--checkpoint_dir", endless_dir, "--temperature", "0", "--max_new_tokens", "9")
    adapted = (*args, "--lora_path", tmp_path / "a.pth")
    without, none, whole = (pipe("Hi", *a)[1] for a in (args, (*adapted, "--strength", "0"), adapted))
    assert without == none != whole


def test_samples_through_a_pipe_are_those_of_the_seed(endless_dir, pipe):
    args = ("--checkpoint_dir", endless_dir, "--max_new_tokens", "20", "--temperature", "1", "--top_p", "0.9")
    first, again = pipe("Hi", *args), pipe("Hi", *args)
    assert first[0] == 0 and first[1] == again[1] and len(first[1]) > 10
    assert pipe("Hi", *args, "--seed", "5")[1] != first[1]


def test_each_mistake_is_one_line_and_ends_with_an_error(trained_dir, spm_dir, tmp_path, pipe):
    ok = ("--checkpoint_dir", trained_dir)
    plain_dir = write_folder(tmp_path / "plain", tiny_model(**SIZES), spm_dir)
    save_prompt_style(shutil.copytree(trained_dir, tmp_path / "odd"), "odd")
    for prompt, args, message in (
        ("Hi", ("--checkpoint_dir", tmp_path / "no"), "is not a folder"),
        ("Hi", ("--checkpoint_dir", tmp_path), "lit_model.pth, lit_config.json, .* missing"),
        ("Hi", (*ok, "--prompt_style", "vicuna"), "unknown prompt style 'vicuna'; choices: alpaca, plain, chat"),
        ("Hi", ("--checkpoint_dir", tmp_path / "odd"), "unknown prompt style 'odd'"),
        ("Hi", ("--checkpoint_dir", plain_dir, "--prompt_style", "chat"), "has no chat template"),
        ("Hi", (*ok, "--prompt_style", "alpaca", "--system", "Be kind"), "--system needs --prompt_style chat"),
        ("Hi", (*ok, "--top_p", "2", "--top_k", "0"), "top_k must be .*; top_p must be"),
        ("river " * 400, ok, r"the prompt has \d+ tokens, the model's context holds 256"),
        (" \n", ok, "stdin is empty"),
    ):
        code, out, err = pipe(prompt, *args)
        assert code == 1 and out == "" and "Traceback" not in err, (args, err)
        assert re.search(message, err.strip().splitlines()[-1]), err


def test_bytes_that_are_no_utf8_are_no_reason_to_fail(trained_dir, pipe):
    assert pipe(b"caf\xe9 \xf0\x9f", "--checkpoint_dir", trained_dir, "--max_new_tokens", "3")[0] == 0


# ---------------------------------------------------------------------------------------------------- a terminal
# Makes the pseudo-terminal the one whose Ctrl-C the script gets, then becomes the script.
OWN_TERMINAL = (
    "import fcntl, os, sys, termios; fcntl.ioctl(0, termios.TIOCSCTTY, 0); os.execv(sys.argv[1], sys.argv[1:])"
)


class Terminal:
    """The script in a pseudo-terminal."""

    def __init__(self, *args: object, term: str = "dumb", **more: str) -> None:
        self.master, slave = pty.openpty()
        command = [sys.executable, "-c", OWN_TERMINAL, sys.executable, str(SCRIPT), *map(str, args)]
        environment = os.environ | {"TERM": term} | more
        self.process = subprocess.Popen(
            command, stdin=slave, stdout=slave, stderr=slave, env=environment, start_new_session=True
        )
        os.close(slave)
        self.seen = ""

    def type(self, text: str) -> None:
        os.write(self.master, text.encode())

    def wait_for(self, pattern: str, *, seconds: float = 60) -> str:
        """Read until a pattern appears; return what came up to its end, and forget that."""
        until = time.monotonic() + seconds
        while not (match := re.search(pattern, self.seen, re.DOTALL)):
            assert time.monotonic() < until, f"no {pattern!r} in {self.seen!r}"
            if select.select([self.master], [], [], 0.2)[0]:
                try:
                    self.seen += os.read(self.master, 65536).decode(errors="replace")
                except OSError as error:  # the other end is closed
                    raise AssertionError(f"it ended before {pattern!r}: {self.seen!r}") from error
        found, self.seen = self.seen[: match.end()], self.seen[match.end() :]
        return found

    def exit_code(self) -> int:
        try:
            while select.select([self.master], [], [], 30)[0]:
                self.seen += os.read(self.master, 65536).decode(errors="replace")
        except OSError:  # closed at the other end, as it should be
            pass
        os.close(self.master)
        return self.process.wait(30)


def test_two_turns_in_a_terminal_then_ctrl_c_at_the_prompt(trained_dir):
    terminal = Terminal("--checkpoint_dir", trained_dir, "--temperature", 0)
    assert "the conversation is kept" in terminal.wait_for(">> ")
    terminal.type(TALK[0]["content"] + "\n")
    assert TALK[1]["content"] in terminal.wait_for(r"tokens/s.*>> ")
    terminal.type("\n   \n")  # an empty line asks nothing
    assert "tokens/s" not in terminal.wait_for(">> .*>> ")
    terminal.type("river " * 300 + "\n")
    assert re.search("error: the prompt has .* context holds 256", terminal.wait_for(r"error: .*>> "))
    terminal.type(TALK[2]["content"] + "\n")
    assert TALK[3]["content"].replace("\n", "\r\n") in terminal.wait_for(r"tokens/s.*>> ")
    time.sleep(0.3)  # Python loses a signal that comes between showing the prompt and waiting for a key
    terminal.type("\x03")
    assert terminal.exit_code() == 0
    assert "Traceback" not in terminal.seen and "error" not in terminal.seen


def test_pasted_lines_are_one_prompt(endless_dir):
    """At a terminal without bracketed paste (as this one), where the lines come one by one, and with it."""
    bracketed, seen = "\x1b[200~one\ntwo\nthree\x1b[201~\n", set()
    for terminal_name, paste in (("dumb", "one\ntwo\nthree\n"), ("xterm", "one\rtwo\rthree\r"), ("xterm", bracketed)):
        terminal = Terminal("--checkpoint_dir", endless_dir, "--max_new_tokens", 5, term=terminal_name)
        terminal.wait_for(">> ")
        time.sleep(0.3)
        terminal.type(paste)
        seen |= {*re.findall(r"prompt: \d+ tokens", terminal.wait_for("tokens/s.*>> "))}
        time.sleep(0.3)
        terminal.type("\x04")
        assert terminal.exit_code() == 0
        assert "tokens/s" not in terminal.seen, "one answer to all three lines"
    assert len(seen) == 1, "the same prompt, whole"


def test_without_the_readline_module_chat_works(endless_dir, tmp_path):
    (tmp_path / "sitecustomize.py").write_text("import sys; sys.modules['readline'] = None")
    terminal = Terminal("--checkpoint_dir", endless_dir, "--max_new_tokens", 5, PYTHONPATH=str(tmp_path))
    terminal.wait_for(">> ")
    terminal.type("one\ntwo\n")
    terminal.wait_for("tokens/s.*>> ")
    time.sleep(0.3)
    terminal.type("\x04")
    assert terminal.exit_code() == 0 and "tokens/s" not in terminal.seen


def test_ctrl_c_stops_an_answer_and_ctrl_d_quits(endless_dir):
    terminal = Terminal("--checkpoint_dir", endless_dir, "--max_new_tokens", 50_000)
    terminal.wait_for(">> ")
    for _ in range(2):
        terminal.type("Hello\n")
        terminal.wait_for("Hello.*.{200}")  # it talks
        terminal.type("\x03")
        assert "Traceback" not in terminal.wait_for(r"tokens/s[^\n]*; interrupted\]\r\n>> ")
    terminal.type("\x04")
    assert terminal.exit_code() == 0
    assert "Traceback" not in terminal.seen and "error" not in terminal.seen
