"""Builders that several test files share: tokenizers, tiny models, folders, runs through the scripts, and processes.

Test files import from here and never from each other; fixtures stand in conftest.py. Everything is made on the spot, so
that no test needs a network or a large file.
"""

import csv
import importlib.util
import json
import multiprocessing
import os
import random
import resource
import shutil
import signal
import socket
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import chain
from pathlib import Path
from types import ModuleType

import hf_models
import pytest
import torch

from lit_gpt import GPT, Config, encoding
from lit_gpt.adapter import TARGETS, adapter_parameters, mark_only_adapter_as_trainable
from lit_gpt.adapter_files import KINDS, load_adapter, save_adapter
from lit_gpt.batches import Batching
from lit_gpt.checkpoint import fingerprint, load_config, load_model, load_state, save_state
from lit_gpt.cli import main
from lit_gpt.data import Sample, length, prepare
from lit_gpt.errors import UserError
from lit_gpt.ether import EtherConfig, add_ether
from lit_gpt.files import write_json
from lit_gpt.lora import LoraConfig, add_lora
from lit_gpt.loss import IGNORE_INDEX
from lit_gpt.rows import BadRows
from scripts import convert_hf_checkpoint, export_lora

ROOT = Path(__file__).resolve().parents[1]
FRONT_ENDS = ("finetune", "scripts", "chat", "eval")
SOURCES = [p for folder in ("lit_gpt", *FRONT_ENDS) for p in sorted((ROOT / folder).rglob("*.py"))]
SCRIPTS = [p for p in SOURCES if "main(setup)" in p.read_text(encoding="utf-8")]


# -------------------------------------------------------------------------------------------------------------- scripts
def relative_path(path: Path) -> str:
    """Return a path as a test's name."""
    return str(path.relative_to(ROOT))


def load_script(path: Path) -> ModuleType:
    """Import a script by its path; registered, since the parser looks up where a function's `**options` go."""
    spec = importlib.util.spec_from_file_location(f"script_{path.parent.name}_{path.stem}", path)
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def script(name: str) -> Callable:
    """Return the setup function of a script, named by its path in the repo."""
    return load_script(ROOT / name).setup


def refusal(capsys, name: str, arguments: list[str]) -> str:
    """Run a script that must fail; return the one line with which it ends."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as end:
        main(script(name), arguments)
    lines = capsys.readouterr().err.strip().splitlines()
    assert end.value.code and lines and lines[-1].startswith("error: ")
    return lines[-1]


# ----------------------------------------------------------------------------------------------------------- tokenizers
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
    """Return lines of made-up text with numbers, punctuation and accents, the same for the same seed."""
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


def edit_json(path, **changes):
    """Change keys of a JSON file; None takes a key away."""
    content = json.loads(path.read_text()) if path.is_file() else {}
    path.write_text(json.dumps({key: value for key, value in (content | changes).items() if value is not None}))


# ----------------------------------------------------------------------------------------------- models and their steps
SIZES = dict(n_layer=2, n_head=4, n_embd=24, intermediate_size=40, vocab_size=48, block_size=32)
MODELS = {
    "mha_bias": dict(
        norm_class="LayerNorm", mlp_class="GptNeoxMLP", qkv_bias=True, proj_bias=True, mlp_bias=True, lm_head_bias=True
    ),
    "gqa_tied": dict(n_query_groups=2, tie_embeddings=True),
    "mqa_odd_head": dict(n_query_groups=1, head_size=8, qk_norm=True),
    # Every expert for every token: in half precision a choice may flip with the last digit of a score.
    "moe": dict(n_query_groups=2, mlp_class="LLaMAMoE", n_expert=3, n_expert_per_token=3),
}
ARCHITECTURES = {
    "gqa": {},
    "window": {"sliding_window": 7, "qk_norm": True},
    "mixture": {"mlp_class": "LLaMAMoE", "n_expert": 4, "n_expert_per_token": 2},
    "parallel": {"parallel_residual": True, "mlp_class": "GptNeoxMLP", "norm_class": "LayerNorm", "qkv_bias": True},
}
PADDED, PACKED = Batching(4), Batching(4, n_tokens=80)


def relative(a: torch.Tensor, b: torch.Tensor) -> float:
    """Return the largest difference, relative to the largest value of ``b``."""
    return ((a - b).abs().max() / b.abs().max()).item()


def tiny_model(*, seed: int = 0, **overrides) -> GPT:
    """Return a random grouped-query model of two layers and 400 tokens, in training mode."""
    torch.manual_seed(seed)
    sizes = dict(block_size=128, vocab_size=400, n_layer=2, n_head=4, n_query_groups=2, n_embd=32, intermediate_size=48)
    return GPT(Config(name="tiny", **(sizes | overrides)))


def adapted_model(model: str, method: str, *, dtype=torch.float32, started: bool = False, **options) -> GPT:
    """Return a random model with an adapter of random values (as it starts, where ``started``) on the targets given."""
    torch.manual_seed(0)
    gpt = GPT(Config(**SIZES, **MODELS[model])).to(dtype)
    wanted = options.pop("targets", TARGETS)
    targets = {target: target in wanted for target in TARGETS}
    if method == "lora":
        add_lora(gpt, LoraConfig(r=3, **targets))
    else:
        add_ether(gpt, EtherConfig(Htype=method, nb=options.pop("nb", 2), **targets, **options))
    if not started:
        with torch.no_grad():
            for parameter in adapter_parameters(gpt).values():
                parameter.copy_(torch.randn_like(parameter) * (0.2 if method == "lora" else 1.0))
    return gpt.eval()


def dense(method: str, vectors: list[torch.Tensor]) -> torch.Tensor:
    """Return one block of R as a matrix, written out from the paper."""
    eye = torch.eye(vectors[0].size(-1), dtype=vectors[0].dtype)
    if method == "oft":
        s = (vectors[0] - vectors[0].T) / 2
        return (eye + s) @ torch.linalg.inv(eye - s)
    outer = [torch.outer(v, v) / v.dot(v) for v in vectors]

    def plus():
        return eye - outer[0] + outer[1]

    return {"ether": lambda: eye - 2 * outer[0], "etherplus": plus, "etherplusHH": plus}[method]()


def etherplus_model(*, targets: Sequence[str] = TARGETS, **overrides) -> GPT:
    """Return a tiny model with two-sided ETHER+ on every Linear, its head included, or on the targets given."""
    model = tiny_model(**overrides)
    add_ether(model, EtherConfig(Htype="etherplusHH", nb=2, **{target: target in targets for target in TARGETS}))
    mark_only_adapter_as_trainable(model)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.1 * torch.randn_like(parameter) * parameter.requires_grad
    return model


def samples_of(*lengths: int) -> list[Sample]:
    """Make up samples of these lengths; the first third of each has no target."""
    generator = torch.Generator().manual_seed(sum(lengths))
    made = []
    for n in lengths:
        ids = torch.randint(400, (n,), generator=generator, dtype=torch.int32)
        response = torch.arange(n) >= n // 3
        made.append({"input_ids": ids, "labels": ids.masked_fill(~response, IGNORE_INDEX), "response": response})
    return made


def step(model: GPT, samples: list[Sample], batching: Batching) -> tuple[float, dict[str, torch.Tensor]]:
    """Return loss and gradients of a pass."""
    model.zero_grad()
    idx, targets, lengths = batching.collate(samples)
    loss = model(idx, lengths=lengths, targets=targets)
    loss.backward()
    return loss.item(), {name: p.grad.clone() for name, p in model.named_parameters() if p.requires_grad}


def assert_same_step(one, other) -> None:
    """Compare loss and gradients of two passes: within 1e-5 of the largest value of each tensor."""
    assert other[0] == pytest.approx(one[0], rel=1e-5)
    for name, gradient in one[1].items():
        assert (other[1][name] - gradient).abs().max() <= 1e-5 * gradient.abs().max(), name


# ----------------------------------------------------------------------------------------------------------------- data
def encode_rows(
    tokenizer, rows, *, style: str, mask_inputs: bool, max_seq_length: int | None = None
) -> encoding.Samples:
    """Return the samples of numbered rows; raise what is wrong with them."""
    rows = iter(rows)
    first, problems = next(rows), BadRows("data")
    samples = encoding.Samples(max_seq_length, learn_all=not mask_inputs and "messages" not in first[1])
    encoding.encode_rows(tokenizer, chain([first], rows), style=style, samples=samples, problems=problems)
    if problems.rows:
        raise UserError(str(problems))
    return samples


def save_samples(samples: Sequence[Sample], path: Path) -> None:
    """Write samples as `prepare` does."""
    columns = {name: torch.cat([sample[name] for sample in samples]) for name in encoding.NAMES}
    save_state(columns | {"lengths": torch.tensor(list(map(length, samples)))}, path)


# -------------------------------------------------------------------------------------------------------------- folders
def write_folder(folder: Path, model: GPT, tokenizer_dir: Path) -> Path:
    """Save a model and a tokenizer as a base-shaped folder."""
    shutil.copytree(tokenizer_dir, folder)
    save_state(model.state_dict(), folder / "lit_model.pth")
    write_json(folder / "lit_config.json", model.config.to_dict())
    return folder


def write_llama_config(folder: Path) -> None:
    """Write the config.json of a base-shaped folder whose model is a Llama, for what goes back to Hugging Face."""
    config = load_config(folder)
    described = dict(
        architectures=["LlamaForCausalLM"], model_type="llama", vocab_size=config.padded_vocab_size,
        max_position_embeddings=config.block_size, hidden_size=config.n_embd, num_hidden_layers=config.n_layer,
        intermediate_size=config.intermediate_size, num_attention_heads=config.n_head, head_dim=config.head_size,
        num_key_value_heads=config.n_query_groups, rms_norm_eps=config.norm_eps, rope_theta=config.rope_base,
        attention_bias=config.qkv_bias, mlp_bias=config.mlp_bias, tie_word_embeddings=config.tie_embeddings,
    )  # fmt: skip
    assert Config.from_hf(described, config.name) == config
    write_json(folder / "config.json", described)


def write_base(folder: Path, tokenizer_dir: Path, **overrides) -> Path:
    """Save a tiny model with tied embeddings as a base-shaped folder."""
    return write_folder(folder, tiny_model(seed=3, **({"tie_embeddings": True} | overrides)), tokenizer_dir)


def write_work(work: Path, tokenizer_dir: Path) -> Path:
    """Fill a folder with ``base``, ``rows.json`` and ``data``, prepared by the project's own function."""
    write_base(work / "base", tokenizer_dir)
    colours = ["red", "green", "blue", "small", "large"]
    rows = [{"instruction": f"name colour {i}", "input": "", "output": f"the {colours[i % 5]} river " * (1 + i % 4)}
            for i in range(40)]  # fmt: skip
    (work / "rows.json").write_text(json.dumps(rows))
    prepare(work / "rows.json", destination_path=work / "data", checkpoint_dir=work / "base", max_seq_length=128)
    return work


def make_adapter(
    folder: Path, case: str, tokenizer: Path, *, dtype: str | None = None, scale: float = 1.0, **fields
) -> Path:
    """Write a tiny base, in Hugging Face's and our files, and an adapter of random values beside it; return its path.

    `scale` 0 leaves the adapter as it starts.
    """
    base = folder / "base"
    hf_models.save(case, base)
    for file in tokenizer.iterdir():
        shutil.copyfile(file, base / file.name)
    convert_hf_checkpoint.setup(checkpoint_dir=base, dtype=dtype)
    name = "lora" if "r" in fields else "ether"
    kind = KINDS[name]
    targets = fields.pop("targets", TARGETS)
    config = kind.config_class(**{target: target in targets for target in TARGETS}, **fields)
    torch.manual_seed(3)
    model = load_model(base)
    kind.add(model, config)
    with torch.no_grad():
        for parameter in adapter_parameters(model).values() if scale else ():
            parameter.copy_(scale * torch.randn_like(parameter))
    about = {"name": "the-base", "fingerprint": fingerprint(load_state(base / "lit_model.pth"))}
    save_adapter(folder / kind.file_name, model, kind=name, config=config, base=about, prompt_style="alpaca")
    return folder / kind.file_name


def path_option(adapter: Path) -> dict[str, Path]:
    """Return the option that names an adapter file, by the adapter's kind."""
    return {"lora_path" if "lora" in adapter.name else "ether_path": adapter}


def export_adapter(adapter: Path, **options) -> Path:
    """Export an adapter through the script; return the folder, ``out`` beside the adapter."""
    out = adapter.parent / "out"
    export_lora.setup(checkpoint_dir=adapter.parent / "base", out_dir=out, **path_option(adapter), **options)
    return out


@contextmanager
def file_size_limit(n_bytes: int) -> Iterator[None]:
    """Let no file grow beyond a size, as on a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (n_bytes, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


# --------------------------------------------------------------------------------------------- runs through the scripts
ADAPTER = "lit_model_ether_finetuned.pth"
QUICK = ["--train.global_batch_size", "4", "--train.micro_batch_size", "2", "--train.max_steps", "6"]
QUICK += ["--precision", "32-true", "--train.learning_rate", "1e-2", "--eval.interval", "3"]


def command(work: Path, method: str, out: Path, *more: str) -> tuple[str, list[str]]:
    """Return the script of a method and its arguments."""
    name = method if method in ("lora", "full") else "ether"
    own = ["--Htype", method, "--ether_nb", "2"] if name == "ether" else []
    arguments = ["--io.train_data_dir", str(work / "data"), "--io.out_dir", str(out), *QUICK, *own, *more]
    return f"finetune/{name}.py", arguments


def train(work: Path, method: str, out: Path, *more: str) -> dict:
    """Train through the script; return summary.json."""
    name, arguments = command(work, method, out, *more)
    main(script(name), arguments)
    return json.loads((out / "summary.json").read_text())


def unfinished(work, out: Path) -> None:
    """Leave a run of six steps as if it had been killed after the third, with a checkpoint."""
    train(work, "ether", out, "--train.save_interval", "3")
    (out / "summary.json").unlink()
    shutil.rmtree(out / "checkpoints" / "step-000006")


def losses_of(out: Path, column: str = "loss") -> list[float]:
    """Return a column of metrics.csv, without its gaps."""
    return [float(row[column]) for row in csv.DictReader((out / "metrics.csv").open()) if row[column]]


def rows_without_time(out: Path) -> list[dict]:
    """Return metrics.csv without its timing column."""
    return [{k: v for k, v in row.items() if k != "seconds"} for row in csv.DictReader((out / "metrics.csv").open())]


def same_result(one: Path, other: Path) -> bool:
    """Return True where adapter and metrics of two runs are the same, bit for bit."""
    a, b = (load_adapter(folder / ADAPTER, "ether").state for folder in (one, other))
    return all(torch.equal(a[n], b[n]) for n in a) and rows_without_time(one) == rows_without_time(other)


# ---------------------------------------------------------------------------------------------------- runs in processes
PROCESSES = multiprocessing.get_context("forkserver")  # a fresh process in a moment: the imports are done in the server
PROCESSES.set_forkserver_preload(["lit_gpt.launch", "lit_gpt.train", "lit_gpt.cli", "matplotlib.figure"])


class Training:
    """A run in a process of its own; what it says goes to a file."""

    def __init__(self, work, out: Path, *more: str, rank: str = "0", environment: dict[str, str] | None = None) -> None:
        self.log = out.with_suffix(f".log{rank}")
        arguments = (*command(work, "etherplusHH", out, *more), self.log, environment or {})
        self.process = PROCESSES.Process(target=in_process, args=arguments)
        self.process.start()

    @property
    def alive(self) -> bool:
        """Return True while it runs."""
        return self.process.is_alive()

    def end(self, number: int | None = None) -> tuple[int, str]:
        """Send a signal, if any, and wait; return the exit code and all that was said."""
        if number and self.alive:
            os.kill(self.process.pid, number)
        self.process.join()
        return self.process.exitcode, self.log.read_text()


def in_process(name: str, arguments: list[str], log: Path, environment: dict[str, str]) -> None:
    """Run a script with its output in a file: what the process of a ``Training`` does."""
    os.environ.update(environment)
    for number in (signal.SIGHUP, signal.SIGUSR1):  # as from a terminal, however the tests were started
        signal.signal(number, signal.SIG_DFL)
    with log.open("w") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    main(script(name), arguments)


def free_port() -> str:
    """Return a port that nothing listens on."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return str(free.getsockname()[1])


def two_processes(work, out: Path, *more: str) -> list[Training]:
    """Start a run of two processes on the CPU, as torchrun starts them."""
    shared = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "GROUP_RANK": "0", "TORCHELASTIC_RUN_ID": "test"}
    shared |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port(), "OMP_NUM_THREADS": "1"}
    ranks = [{**shared, "RANK": rank, "LOCAL_RANK": rank} for rank in ("0", "1")]
    return [Training(work, out, "--devices", "2", *more, rank=rank["RANK"], environment=rank) for rank in ranks]


def wait_for(condition: Callable[[], bool], seconds: float = 60) -> None:
    """Wait until a condition holds; fail after so many seconds."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it never came"
        time.sleep(0.005)
