"""The evaluation against the harness's own Hugging Face backend, on the same tiny random weights and local data."""

import json
import random
import re
import shutil
import sqlite3
import subprocess
import sys
from collections import Counter
from contextlib import contextmanager
from itertools import chain
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
from helpers import tiny_model
from lm_eval import evaluator
from lm_eval.api.instance import Instance
from lm_eval.loggers import EvaluationTracker

from eval import harness_model, lm_eval_harness
from eval import tasks as eval_tasks
from eval.harness_model import HarnessModel
from eval.lm_eval_harness import evaluate, save_results, setup
from lit_gpt import GPT, Config
from lit_gpt.adapter import adapter_parameters
from lit_gpt.adapter_files import KINDS, save_adapter
from lit_gpt.checkpoint import fingerprint, load_model, load_state
from lit_gpt.cli import main
from lit_gpt.ether import EtherConfig
from lit_gpt.files import LOCK, locked
from lit_gpt.lora import LoraConfig
from lit_gpt.merge import merge_adapter
from lit_gpt.tokenizer import Tokenizer

CONTEXT = 128
ARC, TRUTHFULQA, MMLU = "allenai/ai2_arc", "truthfulqa/truthful_qa", "cais/mmlu"
SUBJECTS = ("abstract_algebra", "business_ethics")
ALL_TASKS = ["arc_challenge", "truthfulqa_mc", *(f"hendrycksTest-{subject}" for subject in SUBJECTS)]


def sentence(rng: random.Random, words: int) -> str:
    """Words that the test tokenizers know, and some that they spell out."""
    return " ".join(rng.choices("the river stone house runs finds naïve 12 light x-y of a two old".split(), k=words))


def write_split(folder: Path, config: str, splits: dict[str, list[dict]]) -> None:
    """Add one configuration to a data set laid out like the Hub."""
    (folder / config).mkdir(parents=True)
    for split, rows in splits.items():
        (folder / config / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    configs = []
    for path in sorted(path for path in folder.iterdir() if path.is_dir()):
        files = "".join(f"\n  - {{split: {f.stem}, path: {path.name}/{f.name}}}" for f in sorted(path.iterdir()))
        configs.append(f"- config_name: {path.name}\n  data_files:{files}\n")
    (folder / "README.md").write_text("---\nconfigs:\n" + "".join(configs) + "---\n")


def arc_row(rng: random.Random, number: int) -> dict:
    labels = list("ABCD")
    choices = {"text": [sentence(rng, rng.randint(1, 5)) for _ in labels], "label": labels}
    return {"id": str(number), "question": sentence(rng, 9) + "?", "choices": choices, "answerKey": rng.choice(labels)}


def truthfulqa_row(rng: random.Random) -> dict:
    def targets(n: int, right: int) -> dict:
        return {"choices": [sentence(rng, 4) + "." for _ in range(n)], "labels": [1] * right + [0] * (n - right)}

    return {"question": sentence(rng, 6) + "?", "mc1_targets": targets(4, 1), "mc2_targets": targets(6, 3)}


def mmlu_row(rng: random.Random, subject: str) -> dict:
    choices = [sentence(rng, 2) for _ in range(4)]
    return {"question": sentence(rng, 8), "subject": subject, "choices": choices, "answer": rng.randrange(4)}


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory) -> Path:
    """ARC, TruthfulQA and two MMLU subjects of a few made-up rows each, laid out like the Hub."""
    root, rng = tmp_path_factory.mktemp("data"), random.Random(0)
    arc = {split: [arc_row(rng, i) for i in range(n)] for split, n in (("train", 6), ("validation", 3), ("test", 12))}
    write_split(root / ARC, "ARC-Challenge", arc)
    write_split(root / TRUTHFULQA, "multiple_choice", {"validation": [truthfulqa_row(rng) for _ in range(5)]})
    for subject in SUBJECTS:
        rows = {split: [mmlu_row(rng, subject) for _ in range(n)] for split, n in (("dev", 5), ("test", 8))}
        write_split(root / MMLU, subject, rows)
    return root


pytestmark = pytest.mark.usefixtures("own_datasets_cache")


@pytest.fixture(scope="module", params=["bpe", "spm"])
def checkpoint(request, tmp_path_factory) -> Path:
    """A tiny random Llama with Hugging Face's and our files side by side: without BOS, and with a BOS that is added."""
    return make_checkpoint(tmp_path_factory.mktemp(request.param), request.getfixturevalue(f"{request.param}_dir"))


def make_checkpoint(folder: Path, tokenizer_dir: Path) -> Path:
    from transformers import LlamaConfig, LlamaForCausalLM

    from scripts.convert_hf_checkpoint import setup as convert

    shutil.copytree(tokenizer_dir, folder, dirs_exist_ok=True)
    tokenizer = Tokenizer(folder)
    torch.manual_seed(1)
    config = LlamaConfig(
        vocab_size=tokenizer.vocab_size,
        hidden_size=48,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=CONTEXT,
        initializer_range=0.3,  # far from uniform, so that log-likelihoods and greedy answers differ
        bos_token_id=tokenizer.bos_id,
        eos_token_id=tokenizer.eos_id,
        pad_token_id=None,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    convert(checkpoint_dir=folder)
    return folder


@pytest.fixture(scope="module")
def ours(checkpoint) -> HarnessModel:
    return HarnessModel(load_model(checkpoint), Tokenizer(checkpoint), batch_size=3)


@pytest.fixture(scope="module")
def theirs(checkpoint):
    from lm_eval.models.huggingface import HFLM

    return HFLM(pretrained=str(checkpoint), device="cpu", dtype="float32", batch_size=3)


def requests_for(kind: str, arguments: list[tuple]) -> list[Instance]:
    return [Instance(request_type=kind, doc={}, arguments=args, idx=i) for i, args in enumerate(arguments)]


def assert_close(ours: list[float], theirs: list[float]) -> None:
    for a, b in zip(ours, theirs, strict=True):
        assert abs(a - b) <= 1e-4 + 1e-6 * abs(b)


def pairs() -> list[tuple[str, str]]:
    """Contexts and continuations of every kind: siblings, spaces at the cut, no context, BOS written out, too long."""
    rng = random.Random(1)
    found = []
    for _ in range(4):
        context = f"Question: {sentence(rng, 10)}\nAnswer:"
        found += [(context, f" {sentence(rng, n)}") for n in (1, 2, 5, 3)]
        found += [(context, f" {letter}") for letter in "ABCD"]
    found += [("the river ", "runs"), ("the river   ", "runs"), ("the river", "runs"), ("", "the stone"), ("", "x")]
    found += [("<s>the house", " is old"), ("<|im_start|>the house", " is old"), ("the house", " is old")]
    found += [(sentence(rng, 90), f" {sentence(rng, n)}") for n in (1, 8)]
    found += [("stone", " " + sentence(rng, 20)), (sentence(rng, 20), " " + sentence(rng, 12)), ("é 日本", " ☃ naïve")]
    return found + found[:5]


def test_log_likelihoods_equal_the_hugging_face_backend(ours, theirs):
    arguments = pairs()
    mine = ours.loglikelihood(requests_for("loglikelihood", arguments))
    reference = theirs.loglikelihood(requests_for("loglikelihood", arguments), disable_tqdm=True)
    assert_close([value for value, _ in mine], [value for value, _ in reference])
    assert [greedy for _, greedy in mine] == [greedy for _, greedy in reference]
    # Theirs refuses blanks alone, which leave no context where the tokenizer adds no BOS; ours ended in a traceback.
    blank, none = ours.loglikelihood(requests_for("loglikelihood", [("  ", "the river"), ("", "  the river")]))
    assert blank == pytest.approx(none)
    blank, none = ([(context, {"until": [], "max_gen_toks": 3})] for context in ("", ours.prefix_text))
    assert ours.generate_until(requests_for("generate_until", blank + none))


def test_a_greedy_continuation_is_recognised(ours, theirs):
    prompts = requests_for("generate_until", [("the river", {"until": [], "max_gen_toks": 3})])
    (continuation,) = theirs.generate_until(prompts, disable_tqdm=True)
    request = requests_for("loglikelihood", [("the river", continuation)])
    assert ours.loglikelihood(request)[0][1] == theirs.loglikelihood(request, disable_tqdm=True)[0][1]
    ids = ours.tok_encode("the river")
    tokens = [int(t) for t in ours.model(torch.tensor([ids]))[0, -1:].argmax(dim=-1)]
    assert ours._loglikelihood_tokens([(None, ids, tokens)])[0][1] is True
    assert ours._loglikelihood_tokens([(None, ids, [tokens[0] ^ 1])])[0][1] is False


def test_rolling_log_likelihoods_equal_the_hugging_face_backend(ours, theirs):
    rng = random.Random(2)
    arguments = [(sentence(rng, words),) for words in (1, 30, 60, 200, 90)] + [("",)]
    requests = requests_for("loglikelihood_rolling", arguments)
    assert_close(ours.loglikelihood_rolling(requests), theirs.loglikelihood_rolling(requests, disable_tqdm=True))


def test_greedy_generation_equals_the_hugging_face_backend(ours, theirs):
    rng = random.Random(3)
    until = [[], ["\n"], ["e"], ["stone", " a"], "r"]
    arguments = [
        (sentence(rng, words), {"until": stops, "max_gen_toks": 20, "do_sample": False, "temperature": 0.0})
        for words, stops in zip((3, 10, 1, 120, 5), until, strict=True)
    ]
    requests = requests_for("generate_until", arguments)
    # One request at a time on their side: a left-padded batch in transformers is a different, rounded computation
    reference = [theirs.generate_until([request], disable_tqdm=True)[0] for request in requests]
    assert ours.generate_until(requests) == reference


@contextmanager
def likeliest_first(ours, theirs, token: int):
    """Both models, with their answer to "the river" beginning with this token."""
    likeliest = int(ours.model(torch.tensor([ours.tok_encode("the river")]))[0, -1].argmax())
    heads = [ours.model.lm_head.weight.data, theirs.model.lm_head.weight.data]
    for head in heads:
        head[[likeliest, token]] = head[[token, likeliest]]
    try:
        yield
    finally:
        for head in heads:
            head[[likeliest, token]] = head[[token, likeliest]]


def test_generation_goes_past_ends_of_turns_that_are_not_the_models_eos(ours, theirs):
    (prompt,) = requests_for("generate_until", [("the river", {"until": [], "max_gen_toks": 8})])
    with likeliest_first(ours, theirs, 0):  # <|endoftext|> or <unk>: special, and not these tokenizers' EOS
        assert ours.generate_until([prompt]) == theirs.generate_until([prompt], disable_tqdm=True) != [""]


@pytest.mark.parametrize("before", ["", " "])
def test_a_stop_string_that_is_a_special_token_ends_an_answer(ours, theirs, before, monkeypatch):
    """gsm8k's `<|im_end|>`: it is left out of the text, where it was looked for, and the answer ran to its limit."""
    special = before + ours.tokenizer.decode([0], skip_special=False)
    arguments = [("the river", {"until": until, "max_gen_toks": 8}) for until in ([special], ["never", special], [])]
    requests = requests_for("generate_until", arguments)
    drawn = []
    original = harness_model.generate
    monkeypatch.setattr(
        harness_model, "generate", lambda *args, **options: (drawn.append(i) or i for i in original(*args, **options))
    )
    with likeliest_first(ours, theirs, 0):
        reference = [theirs.generate_until([request], disable_tqdm=True)[0] for request in requests]
        assert ours.generate_until(requests[:2]) == reference[:2]
        assert before or (reference[:2] == ["", ""] and drawn == [0, 0])
        assert ours.generate_until(requests[2:]) == reference[2:] != [""]


def test_sampling_follows_temperature_and_has_a_seed(checkpoint):
    model, tokenizer = load_model(checkpoint), Tokenizer(checkpoint)
    options = {"until": [], "max_gen_toks": 12, "do_sample": True, "temperature": 1.5}
    requests = requests_for("generate_until", [("the river", options)] * 3)
    first, again = (HarnessModel(model, tokenizer).generate_until(requests) for _ in range(2))
    assert first == again
    assert len(set(first)) > 1


@pytest.mark.parametrize("options", [{}, {"num_fewshot": 2}, {"apply_chat_template": True}, {"limit": 3}])
def test_every_metric_equals_the_hugging_face_backend(checkpoint, ours, theirs, data_dir, options, monkeypatch):
    if options.get("apply_chat_template") and ours.tokenizer.chat_template is None:
        pytest.skip("this tokenizer has no chat template")
    monkeypatch.setattr(evaluator, "add_env_info", lambda results: None)  # runs pip, for seconds
    manager, names = eval_tasks.resolve_names(ALL_TASKS)
    with eval_tasks.isolated_harness(data_dir):
        reference = evaluator.simple_evaluate(theirs, tasks=names, task_manager=manager, log_samples=False, **options)
    found = evaluate(ours.model, ours.tokenizer, tasks=ALL_TASKS, data_dir=data_dir, batch_size=5, **options)
    assert found["results"].keys() == reference["results"].keys() == {*names}
    for name, metrics in reference["results"].items():
        for metric, value in metrics.items():
            expected = pytest.approx(value, abs=1e-6) if isinstance(value, float) else value
            assert found["results"][name][metric] == expected, (name, metric)
    for key in ("versions", "n-shot", "n-samples", "higher_is_better"):
        assert found[key] == json.loads(json.dumps(reference[key])), key


def test_common_beginnings_are_computed_once(ours):
    """Four answers to a question cost the question once, and a question behind known examples costs itself alone."""
    counts = []
    hidden = ours.model.hidden
    ours.model.hidden = lambda idx, **options: counts.append(idx.numel()) or hidden(idx, **options)
    try:
        examples = "the river runs. " * 8
        arguments = [(f"{examples}{question}:", f" {answer}") for question in "abcdef" for answer in "wxyz"]
        ours.loglikelihood(requests_for("loglikelihood", arguments))
    finally:
        del ours.model.hidden
    length = len(ours.tok_encode(arguments[0][0]))
    assert sum(counts) < 2 * length < 6 * length
    assert ours.model.transformer.h[0].attn.kv_cache is None


@pytest.mark.parametrize("tokens", [0, 512])
def test_sharing_gives_what_separate_rows_give(ours, tokens, monkeypatch):
    """Also where the answers to a question are too long to share all of it."""
    monkeypatch.setattr(harness_model, "BRANCHES_TOKENS", tokens)
    rows = ours.make_rows([(None, ours.tok_encode(a), ours.tok_encode(b)) for a, b in pairs() if a])
    with torch.no_grad():
        batches = list(ours.run(rows))
        for row, states in chain.from_iterable(batches):
            alone = ours.model.hidden(ours.ids(row.head + row.tail))[0]
            n = min(len(states), len(row.tail))
            torch.testing.assert_close(states[-n:], alone[-n:], atol=2e-4, rtol=2e-4)
    assert sorted(row.requests for row, _ in chain.from_iterable(batches)) == sorted(row.requests for row in rows)


def test_half_precision_is_scored_in_fp32(ours, checkpoint):
    """Log-probabilities of a bf16 model are rounded where the model rounds, not once more where they are added up."""
    requests = requests_for("loglikelihood", pairs()[:8])
    model = load_model(checkpoint, "bf16-true")
    values = [value for value, _ in HarnessModel(model, ours.tokenizer).loglikelihood(requests)]
    assert any(value != torch.tensor(value).bfloat16().item() for value in values)
    assert values == pytest.approx([value for value, _ in ours.loglikelihood(requests)], rel=0.05, abs=0.5)


def test_evaluating_leaves_modes_and_random_states_alone(ours, data_dir):
    model = ours.model.train()
    model.transformer.h[0].eval()
    before = [random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()]
    modes = [module.training for module in model.modules()]
    evaluate(model, ours.tokenizer, tasks=["arc_challenge"], data_dir=data_dir, limit=2)
    assert before == [random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()]
    assert modes == [module.training for module in model.modules()]
    assert all(parameter.grad is None for parameter in model.parameters())
    model.eval()


WITHOUT_TRANSFORMERS = """
import sys
class Block:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("transformers", "accelerate", "peft"):
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
sys.meta_path.insert(0, Block())
sys.path.insert(0, sys.argv[1])
import datasets
datasets.config.HF_DATASETS_CACHE = sys.argv[4]
from eval.lm_eval_harness import evaluate
from lit_gpt import GPT, Config
from lit_gpt.tokenizer import Tokenizer
tokenizer = Tokenizer(sys.argv[2])
sizes = dict(n_layer=1, n_head=2, n_embd=16, intermediate_size=8)
model = GPT(Config(block_size=512, vocab_size=tokenizer.vocab_size, **sizes))
found = evaluate(model, tokenizer, tasks=["arc_challenge", "truthfulqa_mc1"], data_dir=sys.argv[3], limit=2)
assert sorted(found["results"]) == ["arc_challenge", "truthfulqa_mc1"], found
assert not [name for name in sys.modules if name.split(".")[0] in ("transformers", "accelerate", "peft")]
"""


def test_transformers_is_not_needed(bpe_dir, data_dir, tmp_path):
    root = Path(__file__).resolve().parents[1]
    command = [sys.executable, "-c", WITHOUT_TRANSFORMERS, root, bpe_dir, data_dir, tmp_path]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0 and "fatal: not a git repository" not in done.stderr, done.stderr


# Conversations

NO_SYSTEM = (
    "{% for m in messages %}{% if m.role == 'system' %}{{ raise_exception('no system role') }}{% endif %}"
    "[{{ m.role }}] {{ m.content | trim }}{{ eos_token }}{% endfor %}"
    "{% if add_generation_prompt %}[assistant]{% endif %}"
)


@pytest.fixture
def without_system(bpe_dir, tmp_path):
    """Our model and the Hugging Face backend's, with a template that refuses a system message."""
    from lm_eval.models.huggingface import HFLM

    folder = make_checkpoint(tmp_path / "model", bpe_dir)
    (folder / "chat_template.jinja").write_text(NO_SYSTEM)
    ours = HarnessModel(load_model(folder), Tokenizer(folder), batch_size=3)
    return ours, HFLM(pretrained=str(folder), device="cpu", dtype="float32", batch_size=3)


def test_a_description_is_left_out_where_the_template_has_no_system_role(without_system, data_dir, monkeypatch, capsys):
    """The Hugging Face backend goes on without it; the evaluation ended."""
    monkeypatch.setattr(evaluator, "add_env_info", lambda results: None)
    ours, theirs = without_system
    options = {"apply_chat_template": True, "num_fewshot": 1}
    manager, names = eval_tasks.resolve_names([f"mmlu_{SUBJECTS[0]}"])
    with eval_tasks.isolated_harness(data_dir):
        reference = evaluator.simple_evaluate(
            theirs, tasks=names, task_manager=manager, fewshot_as_multiturn=True, log_samples=False, **options
        )
    capsys.readouterr()
    found = evaluate(ours.model, ours.tokenizer, tasks=names, data_dir=data_dir, **options)
    assert found["results"][names[0]] == pytest.approx(reference["results"][names[0]], abs=1e-6)
    notes = capsys.readouterr().err.splitlines()
    assert len(notes) == 1 and "no system role" in notes[0] and "without the system message" in notes[0]


@pytest.mark.parametrize("template", [NO_SYSTEM, NO_SYSTEM.replace(" | trim", "")])
@pytest.mark.parametrize("beginning", ["Answer:", " the answer is ", "a", "", "end"])
def test_an_answers_beginning_is_rendered_as_by_the_hugging_face_backend(without_system, template, beginning):
    ours, theirs = without_system
    ours.tokenizer.chat_template = theirs.tokenizer.chat_template = template
    chat = [{"role": "user", "content": "the river?"}, {"role": "assistant", "content": beginning}]
    rendered = ours.apply_chat_template(chat, add_generation_prompt=False)
    assert rendered == theirs.apply_chat_template(chat, add_generation_prompt=False)


# Names


def names_of(*names: str) -> list[str]:
    return eval_tasks.resolve_names(names)[1]


def test_old_names_are_understood():
    assert names_of("arc_challenge", "truthfulqa_mc", "hendrycksTest-*") == [
        "arc_challenge",
        "truthfulqa_mc1",
        "truthfulqa_mc2",
        "mmlu",
    ]
    assert names_of("hendrycksTest*") == names_of("hendrycksTest") == ["mmlu"]
    assert names_of("hendrycksTest-abstract_algebra") == ["mmlu_abstract_algebra"]
    subjects = names_of("hendrycksTest-high_school_*", "hendrycksTest-high_school_physics")
    assert len(subjects) == 14
    assert all(name.startswith("mmlu_high_school_") for name in subjects)


def test_patterns_name_tasks_and_each_is_taken_once():
    assert names_of("truthfulqa_mc*", "truthfulqa_mc", "truthfulqa_mc1") == ["truthfulqa_mc1", "truthfulqa_mc2"]
    assert {"arc_easy", "arc_challenge"} <= set(names_of("arc_*"))
    assert "hellaswag" in names_of("hellaswag")


def test_a_name_that_matches_nothing_brings_the_nearest():
    with pytest.raises(ValueError, match=r"no task matches 'arc_chalenge'; the nearest: arc_challenge") as caught:
        names_of("arc_chalenge", "arc_easy", "hendrycksTest-abstract_algebr")
    assert "no task matches 'mmlu_abstract_algebr'; the nearest: mmlu_abstract_algebra" in str(caught.value)
    with pytest.raises(ValueError, match="no tasks to evaluate"):
        names_of()


# Data


def test_groups_read_local_data_and_are_aggregated(ours, tmp_path):
    subjects = sorted(eval_tasks.task_manager(every_task=False).task_index["mmlu_social_sciences_tasks"].tags)
    rng = random.Random(4)
    for number, subject in enumerate(name.removeprefix("mmlu_") for name in subjects):
        rows = {"dev": [mmlu_row(rng, subject)], "test": [mmlu_row(rng, subject) for _ in range(1 + number % 3)]}
        write_split(tmp_path / MMLU, subject, rows)
    found = evaluate(ours.model, ours.tokenizer, tasks=["mmlu_social_sciences"], data_dir=tmp_path)
    sizes = {name: found["n-samples"][name]["effective"] for name in subjects}
    right = sum(found["results"][name]["acc,none"] * size for name, size in sizes.items())
    group = found["groups"]["mmlu_social_sciences"]
    assert group["acc,none"] == pytest.approx(right / sum(sizes.values())) and group["sample_len"] == sum(
        sizes.values()
    )


@pytest.mark.parametrize(
    ("task", "remove", "message"),
    [
        (
            "arc_challenge",
            ARC,
            r"ai2_arc is missing; .*`hf download allenai/ai2_arc --repo-type dataset",
        ),
        ("arc_easy", None, r"\(ARC-Easy\) can't be read: .*Available: .*hf download allenai/ai2_arc"),
        ("truthfulqa_mc1", f"{TRUTHFULQA}/multiple_choice/validation.jsonl", r"truthful_qa .*multiple_choice"),
        ("mmlu_business_ethics", f"{MMLU}/business_ethics/dev.jsonl", r"mmlu .*business_ethics"),
    ],
)
def test_data_that_is_not_there_is_named(data_dir, tmp_path, task, remove, message):
    shutil.copytree(data_dir, tmp_path / "data")
    path = tmp_path / "data" / (remove or "none")
    if path.is_dir():
        shutil.rmtree(path)
    elif remove:
        path.unlink()
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        eval_tasks.load_tasks([task], data_dir=tmp_path / "data")


def test_data_of_another_shape_is_named_with_the_reason(data_dir, tmp_path):
    """All that was said of it was: an error occurred while generating the dataset."""
    shutil.copytree(data_dir, tmp_path / "data")
    file = tmp_path / "data" / ARC / "ARC-Challenge" / "test.jsonl"
    file.write_text(file.read_text().replace("answerKey", "key"))
    with pytest.raises(ValueError, match=r"ai2_arc .* can't be read: .*column names.*hf download allenai/ai2_arc"):
        eval_tasks.load_tasks(["arc_challenge"], data_dir=tmp_path / "data")


def test_a_changed_or_copied_data_folder_is_read_anew(data_dir, tmp_path):
    """`datasets` tells folders apart by their README alone: a sample of ARC was answered with all of another copy's."""
    for name in ("one", "two"):
        shutil.copytree(data_dir, tmp_path / name)
    file = tmp_path / "two" / ARC / "ARC-Challenge" / "test.jsonl"
    rows = file.read_text().splitlines(keepends=True)

    def n_rows(name: str) -> int:
        tasks = eval_tasks.load_tasks(["arc_challenge"], data_dir=tmp_path / name)["tasks"]
        return len(tasks["arc_challenge"].dataset["test"])

    assert n_rows("one") == len(rows)
    file.write_text("".join(rows[:-1]))
    assert n_rows("two") == len(rows) - 1
    file.write_text("".join(rows[:-2]))
    assert n_rows("two") == len(rows) - 2


def test_a_missing_split_is_named_with_those_there_are(data_dir, tmp_path):
    write_split(tmp_path / ARC, "ARC-Challenge", {"train": [arc_row(random.Random(0), 0)]})
    with pytest.raises(ValueError, match=r"ai2_arc \(ARC-Challenge\) has no split 'test'.*; it has train"):
        eval_tasks.load_tasks(["arc_challenge"], data_dir=tmp_path)


def test_without_internet_and_data_folder_the_message_says_what_to_do():
    with pytest.raises(ValueError, match=r"allenai/ai2_arc .*internet.* for --data_dir.*hf download allenai/ai2_arc"):
        eval_tasks.load_tasks(["arc_challenge"])
    with pytest.raises(ValueError, match="data set folder nowhere/allenai/ai2_arc is missing"):
        eval_tasks.load_tasks(["arc_challenge"], data_dir="nowhere")


def test_a_data_set_with_a_loading_script_is_one_line_and_its_parquet_copy_is_read(ours, tmp_path):
    folder = tmp_path / "EleutherAI" / "logiqa"
    folder.mkdir(parents=True)
    (folder / "logiqa.py").write_text("import datasets")
    with pytest.raises(ValueError, match=r"task logiqa .*EleutherAI/logiqa .* scripts .*--revision refs/convert"):
        eval_tasks.load_tasks(["logiqa"], data_dir=tmp_path)
    (folder / "logiqa.py").unlink()
    row = {"label": "a", "context": "the river", "question": "a?", "options": ["one", "two", "three", "four"]}
    for split in ("train", "validation", "test"):  # as the Hub's own copy lies
        (folder / "logiqa" / split).mkdir(parents=True)
        datasets.Dataset.from_list([row] * 3).to_parquet(folder / "logiqa" / split / "0000.parquet")
    found = evaluate(ours.model, ours.tokenizer, tasks=["logiqa"], data_dir=tmp_path)
    assert found["n-samples"]["logiqa"]["effective"] == 3


CODE_EVAL = """
import datasets
import evaluate
class CodeEval(evaluate.Metric):
    def _info(self):
        features = datasets.Features({"predictions": datasets.Sequence(datasets.Value("string")),
                                      "references": datasets.Value("string")})
        return evaluate.MetricInfo(description="", citation="", inputs_description="", features=features)
    def _compute(self, predictions, references, k=(1,), **options):
        return {f"pass@{k[0]}": 1.0}, {}
"""


def test_tasks_that_run_code_are_refused_before_they_are_loaded_and_run_when_asked(bpe_dir, tmp_path, monkeypatch):
    row = {"task_id": "0", "prompt": "def f():", "test": "", "entry_point": "f", "canonical_solution": ""}
    write_split(tmp_path / "openai" / "openai_humaneval", "openai_humaneval", {"test": [row, row]})
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_ALLOW_CODE_EVAL", "0")
    with pytest.raises(ValueError, match=r"task humaneval runs the code .*--confirm_run_unsafe_code true"):
        eval_tasks.load_tasks(["humaneval"], data_dir=tmp_path)
    with pytest.raises(ValueError, match=r"task humaneval can't be loaded: .*code_eval"):  # it is on the Hub
        eval_tasks.load_tasks(["humaneval"], data_dir=tmp_path, run_code=True)
    (tmp_path / "code_eval").mkdir()
    (tmp_path / "code_eval" / "code_eval.py").write_text(CODE_EVAL)
    loaded = eval_tasks.load_tasks(["humaneval"], data_dir=tmp_path, run_code=True)
    loaded["tasks"]["humaneval"].set_config("generation_kwargs", {"max_gen_toks": 4}, update=True)
    tokenizer = Tokenizer(bpe_dir)
    model = GPT(Config(block_size=64, vocab_size=400, n_layer=1, n_head=2, n_embd=16, intermediate_size=8))
    results = evaluate(model, tokenizer, tasks=loaded)["results"]["humaneval"]
    assert results["pass@1,create_test"] == 1.0


def test_ids_that_the_model_has_no_row_for_are_named(bpe_dir):
    sizes = dict(n_layer=1, n_head=2, n_embd=16, intermediate_size=8, block_size=64)
    harness = HarnessModel(GPT(Config(vocab_size=300, **sizes)), Tokenizer(bpe_dir))
    with pytest.raises(ValueError, match=r" is id 3\d\d.*: the model has 300 rows"):
        harness.loglikelihood(requests_for("loglikelihood", [("the river", " house")]))
    with pytest.raises(ValueError, match=r" is id 3\d\d.*: the model has 300 rows"):
        harness.generate_until(requests_for("generate_until", [("the river house", {"until": [], "max_gen_toks": 2})]))


# Tasks of one's own

OWN_TASKS = {
    "own_choice": """
output_type: multiple_choice
doc_to_text: "{{ question }}"
doc_to_choice: ["runs", "house", "a"]
doc_to_target: "{{ number }}"
num_fewshot: 2
fewshot_split: train
fewshot_config: {sampler: first_n}
metric_list: [{metric: acc}, {metric: brier_score}, {metric: acc_norm}]
""",
    "own_text": """
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{ question }} {{ question }}"
metric_list: [{metric: word_perplexity}, {metric: bits_per_byte}]
""",
    "own_word": """
output_type: loglikelihood
doc_to_text: "{{ question }}"
doc_to_target: "house"
metric_list: [{metric: perplexity}, {metric: acc}]
""",
    "own_answer": """
output_type: generate_until
description: "Go on. "
doc_to_text: "{{ question }}"
doc_to_target: "{{ question }}"
generation_kwargs: {until: [" a", "STOP"], max_gen_toks: 6}
metric_list: [{metric: exact_match}, {metric: bleu}]
filter_list: [{name: first, filter: [{function: regex, regex_pattern: "(t)"}, {function: take_first}]}]
""",
}


@pytest.fixture(scope="module")
def own_tasks(tmp_path_factory, ours) -> Path:
    """A folder with a task of each type; the generating one's stop strings have a special token among them."""
    folder, rng = tmp_path_factory.mktemp("own"), random.Random(6)
    rows = [{"question": sentence(rng, 4 + 30 * (i == 1)), "number": i % 3} for i in range(5)]
    write_split(folder / "data", "default", {"train": rows[3:], "test": rows})
    for name, text in OWN_TASKS.items():
        head = f"task: {name}\ndataset_path: {folder / 'data'}\ntest_split: test\nmetadata: {{version: 7.0}}"
        stop = ours.tokenizer.decode([0], skip_special=False)
        (folder / f"{name}.yaml").write_text(head + text.replace("STOP", stop))
    return folder


def numbers(metrics: dict) -> dict:
    """Leave out names, and "N/A" for a standard error."""
    return {name: value for name, value in metrics.items() if not isinstance(value, str)}


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"system_instruction": "Be brief.", "num_fewshot": 1, "limit": 3},
        {"gen_kwargs": {"max_gen_toks": 3, "until": ["e"]}, "apply_chat_template": True, "system_instruction": "Hi."},
    ],
)
def test_own_tasks_of_every_type_equal_the_hugging_face_backend(ours, theirs, own_tasks, options, monkeypatch):
    """Log-likelihoods, rolling ones and texts of every document, and the metrics and hashes that follow from them."""
    if options.get("apply_chat_template") and ours.tokenizer.chat_template is None:
        pytest.skip("this tokenizer has no chat template")
    manager, names = eval_tasks.resolve_names([*OWN_TASKS], own_tasks)
    settings = {"batch_size": 1, "fewshot_as_multiturn": "apply_chat_template" in options}
    with eval_tasks.isolated_harness():
        reference = evaluator.simple_evaluate(theirs, tasks=names, task_manager=manager, **settings, **options)
    found = evaluate(ours.model, ours.tokenizer, tasks=names, include_path=own_tasks, **options)
    for name in OWN_TASKS:
        mine, other = (numbers(results["results"][name]) for results in (found, reference))
        assert mine == pytest.approx(other, abs=1e-4, rel=1e-4), name
        for mine, other in zip(found["samples"][name], reference["samples"][name], strict=True):
            assert mine["prompt_hash"] == other["prompt_hash"]
            assert mine["doc_hash"] + mine["target_hash"] == other["doc_hash"] + other["target_hash"]
            for (one,), (two,) in zip(mine["resps"], other["resps"], strict=True):
                assert one == two if isinstance(one, str) else one == pytest.approx(two, abs=1e-4, rel=1e-6)


def test_a_task_that_is_no_yaml_is_named(own_tasks, tmp_path):
    (tmp_path / "bad.yaml").write_text("task: [unclosed")
    with pytest.raises(ValueError, match=r"bad\.yaml is not a task: .*expected"):
        eval_tasks.load_tasks(["own_text"], include_path=tmp_path)
    (tmp_path / "bad.yaml").write_text("task: own_text\ndataset_path: nowhere\ntest_split: test\ndoc_to_target: a")
    with pytest.raises(ValueError, match="task own_text can't be loaded: data set nowhere can't be read"):
        eval_tasks.load_tasks(["own_text"], include_path=tmp_path)


def test_the_quickstarts_tasks_are_balanced_and_held_out():
    folder = Path(__file__).resolve().parents[1] / "scripts" / "demo" / "requests"
    rows = {
        split: [
            [message["content"] for message in json.loads(line)["messages"]] for line in path.open(encoding="utf-8")
        ]
        for split in ("train", "test", "examples")
        for path in [folder / f"{split}.jsonl"]
    }
    assert not {request for _, request, _ in rows["train"]} & {request for _, request, _ in rows["test"]}
    assert all(row in rows["test"] for row in rows["examples"])
    names = ["request_kinds", "request_answers"]
    tasks = eval_tasks.load_tasks(names, include_path=folder, data_dir=folder.parent)["tasks"]
    kinds = tasks["request_kinds"].config.doc_to_choice
    for split, each in (("train", 180), ("test", 50), ("examples", 1)):
        assert Counter(kind for *_, kind in rows[split]) == dict.fromkeys(kinds, each)
    assert [len(tasks[name].eval_docs) for name in names] == [400, 8]


def test_an_evaluation_that_was_interrupted_goes_on(checkpoint, own_tasks, tmp_path, monkeypatch, capsys):
    """Answered requests of every type are kept, for the same model alone, until the results are written."""
    computed, stop_after = [], [10**6]

    class Counting(HarnessModel):
        def in_batches(self, *given, **more):
            for batch in super().in_batches(*given, **more):
                yield self.count(batch)

        def answer(self, context, settings):
            return self.count(super().answer(context, settings))

        def count(self, result):
            if len(computed) == stop_after[0]:
                raise KeyboardInterrupt
            computed.append(result)
            return result

    monkeypatch.setattr(lm_eval_harness, "HarnessModel", Counting)

    def run(name: str, *more: str) -> dict:
        computed.clear()
        path = ["--save_filepath", str(tmp_path / name), "--include_path", str(own_tasks), "--batch_size", "1", *more]
        main(setup, ["--checkpoint_dir", str(checkpoint), "--eval_tasks", json.dumps([*OWN_TASKS]), *path])
        return json.loads((tmp_path / name).read_text())

    whole = run("whole.json")
    needed = len(computed)
    for stop_after[0] in (3, needed // 2):
        with pytest.raises(SystemExit):
            run("part.json")
    stop_after[0] = 10**6
    capsys.readouterr()
    part = run("part.json")
    assert len(computed) <= needed - 3 - needed // 2 + 4  # windows of texts that were under way: one part has five
    for name, values in whole["results"].items():
        assert numbers(part["results"][name]) == pytest.approx(numbers(values), abs=1e-4, rel=1e-4), name
    assert "going on from the answers of a call that was interrupted" in capsys.readouterr().out
    assert {path.name for path in tmp_path.iterdir()} == {"whole.json", "part.json"}


@pytest.mark.parametrize("change", ["config", "seed", "adapter", "precision"])
def test_answers_are_of_one_model_and_seed_alone(change, checkpoint, own_tasks, tmp_path, monkeypatch, capsys):
    """A model whose config alone had changed, and draws with another seed, got the answers of before."""
    base, path = shutil.copytree(checkpoint, tmp_path / "base"), tmp_path / "out [1]" / "r [2].json"
    options = dict(checkpoint_dir=base, eval_tasks=["own_answer", "own_word"], include_path=own_tasks)
    options |= dict(gen_kwargs={"temperature": 5.0}, seed=1, save_filepath=path, log_samples=True)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(lm_eval_harness, "print_results", lambda results: (_ for _ in ()).throw(KeyboardInterrupt))
        setup(**options)
    if change == "config":
        content = json.loads((base / "lit_config.json").read_text())
        (base / "lit_config.json").write_text(json.dumps(content | {"norm_eps": 0.5}))
    elif change == "adapter":
        model, config = load_model(base), EtherConfig(Htype="ether", nb=4)
        KINDS["ether"].add(model, config)
        origin = {"name": "base", "fingerprint": fingerprint(load_state(base / "lit_model.pth"))}
        options["ether_path"] = tmp_path / "adapter.pth"
        save_adapter(options["ether_path"], model, kind="ether", config=config, base=origin, prompt_style=None)
    else:
        options |= {"seed": {"seed": 2}, "precision": {"precision": "bf16-true"}}[change]

    def answers(folder: Path) -> list[list]:
        return [[json.loads(line)["resps"] for line in file.open()] for file in sorted(folder.glob("samples_*"))]

    capsys.readouterr()
    setup(**options)
    assert "going on" not in capsys.readouterr().out
    setup(**options | {"save_filepath": tmp_path / "fresh" / "r.json"})
    assert answers(path.parent) == answers(tmp_path / "fresh")
    assert not [*path.parent.glob("*.db")], "answers of unfinished calls go"


def test_results_that_cannot_be_written_are_refused_before_the_evaluation(checkpoint, own_tasks, tmp_path, monkeypatch):
    """A second evaluation into the same file took the first one's answers away; a read-only folder cost hours."""
    monkeypatch.setattr(lm_eval_harness, "HarnessModel", None)
    options = dict(checkpoint_dir=checkpoint, eval_tasks=["own_word"], include_path=own_tasks)
    with pytest.raises(OSError):
        setup(**options, save_filepath=Path("/proc/self/results.json"))
    with (
        locked(tmp_path, lock=f"{LOCK}-r.json"),
        pytest.raises(ValueError, match=r"is in use by process .* give another --save_filepath"),
    ):
        setup(**options, save_filepath=tmp_path / "r.json")


def test_a_file_system_without_locks_keeps_no_answers(checkpoint, own_tasks, tmp_path, monkeypatch, capsys):
    def refuse(path):
        raise sqlite3.OperationalError("locking protocol")

    monkeypatch.setattr(sqlite3, "connect", refuse)
    path = ["--save_filepath", str(tmp_path / "results.json"), "--include_path", str(own_tasks)]
    main(setup, ["--checkpoint_dir", str(checkpoint), "--eval_tasks", "['own_choice']", *path])
    assert capsys.readouterr().err.count("answers are not kept for an interruption") == 1
    assert [file.name for file in tmp_path.iterdir()] == ["results.json"]


def test_samples_are_written_in_the_harness_layout(checkpoint, own_tasks, tmp_path):
    path = tmp_path / "results.json"
    more = ["--save_filepath", str(path), "--log_samples", "true", "--include_path", str(own_tasks)]
    main(setup, ["--checkpoint_dir", str(checkpoint), "--eval_tasks", "['own_choice', 'own_text']", *more])
    files = sorted(file for file in tmp_path.iterdir() if file != path)
    names = [f"samples_{task}_results" for task in ("own_choice", "own_text")]  # of this --save_filepath
    assert [re.sub("_[^_]*$", "", file.name) for file in files] == names
    rows = datasets.load_dataset("json", data_files=str(files[0]), split="train", cache_dir=str(tmp_path / "cache"))
    assert len(rows) == 5 and rows[0]["arguments"]["gen_args_2"]["arg_1"] == " a"


def test_results_are_json_also_where_a_model_gives_nan(tmp_path):
    content = {"results": {"a": {"acc,none": float("nan"), "acc_stderr,none": "N/A"}}, "samples": {}}
    save_results(tmp_path / "r.json", content, EvaluationTracker(), log_samples=False)
    saved = json.loads((tmp_path / "r.json").read_text(), parse_constant=pytest.fail)
    assert saved["results"] == {"a": {"acc,none": None, "acc_stderr,none": "N/A"}}


def test_requests_that_lose_their_beginning_are_counted(checkpoint, data_dir, capsys):
    main(setup, command(checkpoint, data_dir, "--num_fewshot", "5", "--limit", "3"))
    n = int(re.search(r"(\d+) of them lost their beginning: they are longer than", capsys.readouterr().out)[1])
    assert n == 3 * (4 + 4 + 6)  # all: five examples, and those that TruthfulQA has in its text, are too long


@pytest.mark.parametrize("kind", ["longrope", "dynamic"])
def test_long_texts_beside_short_ones_score_as_alone(ours, kind):
    """Neither its batch nor a shared beginning changes a score, though positions are rotated by a text's length."""
    factors = dict(short_factor=[1.0] * 4, long_factor=[1.0, 2.0, 4.0, 8.0]) if kind == "longrope" else {}
    scaling = dict(rope_type=kind, factor=4.0, original_max_position_embeddings=24, **factors)
    model = tiny_model(vocab_size=ours.tokenizer.vocab_size, rope_scaling=scaling).eval()
    harness, rng = HarnessModel(model, ours.tokenizer, batch_size=3), random.Random(4)
    heads = [[rng.randrange(300) for _ in range(n)] for n in (20, 20, 30, 6)]
    requests = [(None, head, [rng.randrange(300) for _ in range(n)]) for head in heads for n in (2, 3, 9, 40)]
    found = [value for value, _ in harness._loglikelihood_tokens(requests)]
    with torch.inference_mode():
        for (_, head, tail), value in zip(requests, found, strict=True):
            scores = model(torch.tensor([head + tail[:-1]]))[0, -len(tail) :].log_softmax(dim=-1)
            assert value == pytest.approx(scores.gather(1, torch.tensor(tail)[:, None]).sum().item(), rel=1e-4)


def test_memory_that_ends_halves_the_automatic_batch(ours, monkeypatch):
    requests = requests_for("loglikelihood", [(word, " house") for word in "the river runs a of".split()])
    whole = ours.loglikelihood(requests)
    hidden, longest = ours.model.hidden, max(len(ours.tok_encode("".join(request.args))) - 1 for request in requests)

    def small(idx, **options):
        if idx.numel() > 2 * longest:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return hidden(idx, **options)

    monkeypatch.setattr(ours.model, "hidden", small)
    auto = HarnessModel(ours.model, ours.tokenizer, batch_size="auto")
    assert [value for value, _ in auto.loglikelihood(requests)] == pytest.approx(
        [value for value, _ in whole], abs=1e-4
    )
    assert auto.batch_size == 2
    with pytest.raises(torch.OutOfMemoryError):
        ours.loglikelihood(requests)


@pytest.mark.parametrize("checkpoint", ["bpe"], indirect=True)
def test_several_processes_give_what_one_gives(checkpoint, own_tasks, tmp_path, monkeypatch):
    monkeypatch.delenv("DISABLE_MULTIPROC")  # as users have it
    script = Path(__file__).resolve().parents[1] / "eval/lm_eval_harness.py"
    options = ["--checkpoint_dir", checkpoint, "--include_path", own_tasks, "--eval_tasks", json.dumps([*OWN_TASKS])]
    paths = [tmp_path / "1.json", tmp_path / "2.json"]
    main(setup, [*map(str, options), "--save_filepath", str(paths[0])])
    launch = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", "--standalone", script, *options]
    done = subprocess.run([*map(str, launch), "--save_filepath", str(paths[1])], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("Saved to") == 1
    found = [json.loads(path.read_text()) for path in paths]
    one, two = ({task: numbers(values) for task, values in results["results"].items()} for results in found)
    for task, values in one.items():  # a bootstrapped standard error depends on the documents' order
        exact = [metric for metric in values if "_stderr" not in metric]
        assert [two[task][metric] for metric in exact] == pytest.approx([values[m] for m in exact], rel=1e-4), task


# The script


def command(checkpoint: Path, data_dir: Path, *more: str) -> list[str]:
    names = "['arc_challenge', 'truthfulqa_mc']"
    return ["--checkpoint_dir", str(checkpoint), "--eval_tasks", names, "--data_dir", str(data_dir), *more]


def test_the_script_prints_a_table_and_saves_the_results(checkpoint, data_dir, tmp_path, capfd):
    path = tmp_path / "new" / "results.json"
    main(setup, command(checkpoint, data_dir, "--save_filepath", str(path), "--limit", "4"))
    shown, noise = capfd.readouterr()
    assert "|arc_challenge " in shown
    assert "acc_norm" in shown
    assert f"{checkpoint}, no adapter, 32-true, --limit 4\n" in shown
    assert noise == ""
    saved = json.loads(path.read_text())
    assert saved["results"]["truthfulqa_mc2"].keys() >= {"acc,none", "acc_stderr,none"}
    assert saved["versions"] == {"arc_challenge": 1.0, "truthfulqa_mc1": 2.0, "truthfulqa_mc2": 3.0}
    assert saved["n-samples"]["arc_challenge"] == {"original": 12, "effective": 4}
    assert saved["n-shot"]["arc_challenge"] == 0
    assert saved["config"]["model_args"]["pretrained"] == str(checkpoint.resolve())
    assert saved["config"]["model_args"]["adapter"] is None
    assert saved["lm_eval_version"] == "0.4.13"
    assert saved["config"]["limit"] == 4
    assert len(saved["task_hashes"]["arc_challenge"]) == 64
    assert [file.name for file in path.parent.iterdir()] == ["results.json"]
    with pytest.raises(SystemExit):
        main(setup, command(checkpoint, data_dir, "--save_filepath", str(path)))
    assert "already holds results.json; choose another place or give --overwrite true" in capfd.readouterr().err
    more = ["--limit", "1", "--overwrite", "true"]
    main(setup, command(checkpoint, data_dir, "--save_filepath", str(path), *more))
    assert json.loads(path.read_text())["n-samples"]["arc_challenge"]["effective"] == 1


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--limit", "0"], '"limit": .*does not conform to restriction v>0'),
        (["--batch_size", "0"], '"batch_size": .*does not conform to restriction v>0'),
        (["--num_fewshot", "-1"], '"num_fewshot": .*does not conform to restriction v>=0'),
        (["--precision", "fp8"], "\"precision\": .*'32-true', 'bf16-true', '16-true'.*Got value: fp8"),
        (["--confirm_run_unsafe_code", "maybe"], "\"confirm_run_unsafe_code\": Expected a <class 'bool'>"),
        (["--save_filepath", "."], r" is a folder, and a file of that name is to be written"),
        (["--log_samples", "true"], "--log_samples true: give --save_filepath, too"),
        (["--gen_kwargs", "{num_beams: 4}"], "generation does not know num_beams; it knows do_sample, .*until"),
        (["--include_path", "nowhere"], "--include_path nowhere: expected a folder with the .yaml files of tasks"),
        (["--checkpoint_dir", "nowhere"], "nowhere is not a folder"),
        (["--eval_tasks", "[]"], "no tasks to evaluate"),
        (["--data_dir", "nowhere"], "data set folder nowhere/allenai/ai2_arc is missing"),
    ],
)
def test_the_script_refuses_in_one_line(checkpoint, data_dir, capsys, more, message):
    with pytest.raises(SystemExit) as caught:
        main(setup, command(checkpoint, data_dir, *more))
    shown = capsys.readouterr().err
    assert caught.value.code in (1, 2)
    assert shown.count("\n") == 1
    assert re.search(message, shown), shown


@pytest.mark.parametrize("method", ["ether", "etherplus", "etherplusHH", "oft", "lora"])
def test_an_unmerged_adapter_is_evaluated_as_the_merged_model_is(bpe_dir, data_dir, tmp_path, method):
    base = make_checkpoint(tmp_path / "base", bpe_dir)
    kind = "lora" if method == "lora" else "ether"
    config = LoraConfig(r=2) if kind == "lora" else EtherConfig(Htype=method, nb=4)
    model = load_model(base)
    KINDS[kind].add(model, config)
    torch.manual_seed(0)
    for parameter in adapter_parameters(model).values():
        torch.nn.init.normal_(parameter)
    origin = {"name": "base", "fingerprint": fingerprint(load_state(base / "lit_model.pth"))}
    path = tmp_path / "adapter.pth"
    save_adapter(path, model, kind=kind, config=config, base=origin, prompt_style=None)
    merge_adapter(
        kind=kind, path=path, checkpoint_dir=base, out_dir=tmp_path / "merged", precision="32-true", overwrite=False
    )
    found = []
    adapted = [f"--{kind}_path", str(path)]
    off = [*adapted, "--strength", "0"] if method == "etherplusHH" else []
    for name, more in (("base", adapted), ("merged", []), ("base", off)):
        file = tmp_path / "results" / f"{len(found)}.json"
        main(setup, command(tmp_path / name, data_dir, "--save_filepath", str(file), *more))
        found.append(json.loads(file.read_text()))
    assert found[0]["config"]["model_args"]["adapter"].items() >= {"path": str(path), "kind": kind}.items()
    for task, metrics in found[0]["results"].items():
        assert found[1]["results"][task] == pytest.approx(metrics, abs=1e-5)
    assert found[0]["results"] != found[2]["results"], "the adapter did nothing"
    if off:
        assert found[2]["config"]["model_args"]["strength"] == 0
        main(setup, command(base, data_dir, "--save_filepath", str(tmp_path / "base.json")))
        assert json.loads((tmp_path / "base.json").read_text())["results"] == found[2]["results"]


def test_a_chat_template_is_needed_to_apply_one(spm_dir, data_dir, tmp_path, capsys):
    folder = make_checkpoint(tmp_path, spm_dir)
    with pytest.raises(SystemExit):
        main(setup, command(folder, data_dir, "--apply_chat_template", "true"))
    assert "has no chat template" in capsys.readouterr().err
