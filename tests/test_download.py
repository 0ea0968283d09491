"""Downloads against a small server that speaks the Hub's protocol: what is fetched, and what each failure says."""

import hashlib
import json
import os
import re
import signal
import subprocess
import sys
import threading
from dataclasses import replace
from functools import cache
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import ClassVar

import pytest
import torch
from helpers import ROOT

from lit_gpt.config import KNOWN_MODELS, Config, check_supported
from lit_gpt.errors import UserError
from lit_gpt.files import read_json
from lit_gpt.model import GPT
from scripts.download import setup, wanted_files

COMMIT = "0123456789abcdef0123456789abcdef01234567"
TOKEN = "hf_VerySecretToken"
HALF = 12 << 20  # huggingface_hub writes 10 MB at once
LLAMA = dict.fromkeys(("vocab_size", "hidden_size", "intermediate_size", "max_position_embeddings"), 64)
LLAMA |= {"architectures": ["LlamaForCausalLM"], "num_hidden_layers": 1, "num_attention_heads": 4}
BOTH = (
    "config.json model.safetensors pytorch_model.bin tokenizer.json tokenizer.model README.md .gitattributes "
    "consolidated.safetensors original/params.json training_args.bin chat_template.jinja model-q4.gguf onnx/model.onnx "
    "trainer_state.json model-00001-of-00001.safetensors model.safetensors.index.json"
).split()
SHARDS = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors", "model.safetensors.index.json"]
BINARY = ["pytorch_model-00001-of-00001.bin", "pytorch_model.bin.index.json"]
REPOS = {
    "tiny/both": BOTH,
    "tiny/bin": [name for name in BOTH if not name.startswith("model")],
    "tiny/none": ["README.md", "config.json"],
    "tiny/adapter": ["adapter_config.json", "model.safetensors"],
    "tiny/gguf": ["README.md", "model-q4.gguf"],
    "tiny/sharded": ["config.json", *SHARDS, *BINARY],
    "tiny/large": ["config.json", "model.safetensors"],
}
MXFP4, GPTQ = ({"quantization_config": {"quant_method": method}} for method in ("mxfp4", "gptq"))
OTHERS = {
    "tiny/quantized": (GPTQ, "its weights are quantized .gptq.; get the unquantized mod"),
    "tiny/gpt-oss": (
        {"architectures": ["GptOssForCausalLM"]} | MXFP4,
        "GptOssForCausalLM is not supported; .*in transformers",
    ),
    "tiny/gemma-4": (
        {"architectures": ["Gemma4ForConditionalGeneration"]},
        r"Gemma4For\w+ is not supported; supported: LlamaFor.*LoRA.*finetune/ether_hf.py",
    ),
    "tiny/scaled": ({"rope_scaling": {"type": "wavelet", "factor": 2.0}}, "rope scaling 'wavelet' is not supported"),
}


@cache
def content(name: str, repo: str = "") -> bytes:
    if name == "config.json":
        return json.dumps(LLAMA | OTHERS.get(repo, ({},))[0]).encode()
    return bytes(2 * HALF) if (repo, name) == ("tiny/large", "model.safetensors") else f"content of {name}".encode()


class Hub(BaseHTTPRequestHandler):
    """The three answers of the Hub that a download needs, and its errors as their headers spell them.

    Attributes:
        seen: each request for a file: method, repo, name, the range asked for.
        cut: called in the middle of a large file; the connection ends there.
    """

    seen: ClassVar[list[tuple[str, str, str, str | None]]] = []
    cut = None

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        parts = self.path.split("?")[0].strip("/").split("/")
        authorised = self.headers.get("Authorization") == f"Bearer {TOKEN}"
        is_api = parts[:2] == ["api", "models"]
        repo = "/".join(parts[2:4] if is_api else parts[:2])
        if repo == "tiny/gated" and not is_api and not authorised:
            return self.answer(401, {"X-Error-Code": "GatedRepo"})
        if repo == "tiny/forbidden":
            return self.answer(403, {"X-Error-Message": "no"})
        if repo == "tiny/broken":
            return self.answer(501)
        if repo == "tiny/portal":
            return self.answer(200, body=b"<html>please log in</html>")
        if repo not in (*REPOS, *OTHERS, "tiny/gated"):
            return self.answer(404 if authorised else 401, {"X-Error-Code": "RepoNotFound"})
        if "nowhere" in parts:
            return self.answer(404, {"X-Error-Code": "RevisionNotFound"})
        files = REPOS.get(repo, BOTH)
        if is_api and "tree" in parts:
            rows = [{"type": "file", "path": f, "size": len(content(f, repo)), "oid": sha(f, repo)[:40]} for f in files]
            return self.answer(200, {}, json.dumps(rows).encode())
        if is_api:
            tags = ["base_model:quantized:tiny/both"] if repo == "tiny/quantized" else []
            info = {"id": repo, "sha": COMMIT, "siblings": [sibling(name, repo) for name in files], "tags": tags}
            return self.answer(200, {}, json.dumps(info).encode())
        name = "/".join(parts[4:])
        self.seen.append((self.command, repo, name, self.headers.get("Range")))
        return self.answer(200, {"ETag": f'"{sha(name, repo)}"', "X-Repo-Commit": COMMIT}, content(name, repo))

    def answer(self, code: int, headers: dict[str, str] | None = None, body: bytes = b"{}") -> None:
        start = int((self.headers.get("Range") or "bytes=0-")[6:-1])
        self.send_response(206 if start else code)
        if start:
            self.send_header("Content-Range", f"bytes {start}-{len(body) - 1}/{len(body)}")
        for key, value in {**(headers or {}), "Content-Length": str(len(body) - start)}.items():
            self.send_header(key, value)
        self.end_headers()
        if self.command == "GET" and Hub.cut and len(body) > HALF:
            self.wfile.write(body[:HALF])
            self.close_connection, cut, Hub.cut = True, Hub.cut, None
            cut()
        elif self.command == "GET":
            self.wfile.write(body[start:])

    def log_message(self, *args) -> None:
        pass


@cache
def sha(name: str, repo: str) -> str:
    return hashlib.sha256(content(name, repo)).hexdigest()


def sibling(name: str, repo: str) -> dict:
    """Describe a file as the Hub does; weights are in its large file storage."""
    size = len(content(name, repo))
    lfs = {"sha256": sha(name, repo), "size": size, "pointerSize": 130}
    return {"rfilename": name, "size": size} | ({"lfs": lfs} if name.endswith((".safetensors", ".bin")) else {})


@pytest.fixture(scope="module")
def endpoint():
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()


def start(*arguments: str, endpoint: str, cwd: Path, **environment: str) -> subprocess.Popen:
    """Start the script as a person does: huggingface_hub reads its environment once, at import."""
    clean = {key: value for key, value in os.environ.items() if not key.startswith("HF_")}
    environment = {**clean, "HF_ENDPOINT": endpoint, "HF_HOME": str(cwd / "home"), "HF_HUB_OFFLINE": "0", **environment}
    environment["NO_PROXY"] = environment["no_proxy"] = "127.0.0.1"
    command = [sys.executable, str(ROOT / "scripts" / "download.py"), *arguments]
    return subprocess.Popen(
        command, cwd=cwd, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def download(*arguments: str, **options) -> subprocess.CompletedProcess:
    """Run the script to its end."""
    process = start(*arguments, **options)
    out, err = process.communicate(timeout=120)
    return subprocess.CompletedProcess(arguments, process.returncode, out, err)


def test_without_a_repo_id_it_lists_the_known_models_and_nothing_else(tmp_path):
    done = download(endpoint="http://127.0.0.1:9", cwd=tmp_path)
    assert done.returncode == 0 and done.stderr == ""
    names = done.stdout.splitlines()
    assert names == list(KNOWN_MODELS)
    llama2 = [f"meta-llama/Llama-2-{size}{kind}-hf" for size in ("7b", "13b", "70b") for kind in ("", "-chat")]
    assert [name for name in names if "meta" in name and "Llama-2" in name] == llama2
    assert "HuggingFaceTB/SmolLM2-135M-Instruct" in names


def test_listing_imports_neither_torch_nor_the_hub():
    code = "import runpy, sys; sys.argv = ['download.py']; runpy.run_path('scripts/download.py', run_name='__main__'); "
    code += "assert not {'torch', 'huggingface_hub', 'transformers'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True, capture_output=True)


@pytest.mark.parametrize(
    ("repo", "flags", "weights"),
    [
        ("tiny/both", [], {"model.safetensors"}),
        ("tiny/both", ["--from_safetensors", "false"], {"pytorch_model.bin"}),
        ("tiny/bin", [], {"pytorch_model.bin"}),
        ("tiny/bin", ["--revision", "v1"], {"pytorch_model.bin"}),
    ],
)
def test_download_takes_configs_tokenizer_and_one_kind_of_weights(repo, flags, weights, endpoint, tmp_path):
    done = download("--repo_id", repo, *flags, endpoint=endpoint, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    folder = tmp_path / "checkpoints" / repo
    got = {path.name for path in folder.iterdir() if path.is_file()}
    assert got == weights | {"config.json", "tokenizer.json", "tokenizer.model", "chat_template.jinja"}
    assert all((folder / name).read_bytes() == content(name, repo) for name in got)
    script = ROOT / "scripts/convert_hf_checkpoint.py"  # the folder is not the repository
    assert f"next: python {script} --checkpoint_dir checkpoints/{repo}" in done.stdout


def test_a_second_download_keeps_what_is_complete(endpoint, tmp_path):
    stamps = set()
    for _ in range(2):
        assert download("--repo_id", "tiny/both", endpoint=endpoint, cwd=tmp_path).returncode == 0
        stamps.add((tmp_path / "checkpoints/tiny/both/model.safetensors").stat().st_mtime_ns)
    assert len(stamps) == 1


def weights_seen(repo: str) -> list[str | None]:
    """Return the ranges that were asked for of a repo's weights."""
    return [part for method, of, name, part in Hub.seen if of == repo and "model" in name and method == "GET"]


def test_a_cut_connection_goes_on_where_it_was(endpoint, tmp_path):
    Hub.seen.clear()
    Hub.cut = lambda: None
    done = download("--repo_id", "tiny/large", endpoint=endpoint, cwd=tmp_path)
    if "run the command again (what is there is kept)" in done.stderr:  # huggingface_hub 1 does not go on by itself
        done = download("--repo_id", "tiny/large", endpoint=endpoint, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "checkpoints/tiny/large/model.safetensors").read_bytes() == bytes(2 * HALF)
    assert weights_seen("tiny/large") == [None, f"bytes={10 << 20}-"]


def test_a_killed_download_goes_on_where_it_was(endpoint, tmp_path):
    """A later huggingface_hub throws the part of a file away; a shard has gigabytes."""
    Hub.seen.clear()
    reached, gone = threading.Event(), threading.Event()
    Hub.cut = lambda: (reached.set(), gone.wait(60))
    process = start("--repo_id", "tiny/large", endpoint=endpoint, cwd=tmp_path)
    assert reached.wait(60)
    part = next((tmp_path / "checkpoints/tiny/large").glob(".ether-tmp-model.safetensors.*"))
    while part.stat().st_size < 10 << 20:
        assert process.poll() is None
    process.send_signal(signal.SIGKILL)
    process.communicate()
    gone.set()
    done = download("--repo_id", "tiny/large", endpoint=endpoint, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert weights_seen("tiny/large") == [None, f"bytes={10 << 20}-"]
    folder = tmp_path / "checkpoints/tiny/large"
    assert {path.name for path in folder.iterdir() if path.is_file()} == {"config.json", "model.safetensors"}
    assert (folder / "model.safetensors").read_bytes() == bytes(2 * HALF)


def test_a_damaged_part_is_noticed_by_its_hash(endpoint, tmp_path):
    folder = tmp_path / "checkpoints/tiny/large"
    folder.mkdir(parents=True)
    part = folder / f".ether-tmp-model.safetensors.{sha('model.safetensors', 'tiny/large')}"
    part.write_bytes(b"damaged")
    assert download("--repo_id", "tiny/large", endpoint=endpoint, cwd=tmp_path).returncode == 0
    assert (folder / "model.safetensors").read_bytes() == bytes(2 * HALF) and not part.exists()


def test_tokenizer_only_leaves_the_weights(endpoint, tmp_path):
    repo = "tiny/gemma-4"  # also of a model that is not supported
    done = download("--repo_id", repo, "--tokenizer_only", "true", endpoint=endpoint, cwd=tmp_path)
    assert done.returncode == 0 and "next:" not in done.stdout, done.stderr
    got = {path.name for path in (tmp_path / "checkpoints" / repo).iterdir() if path.is_file()}
    assert got == {"config.json", "tokenizer.json", "tokenizer.model", "chat_template.jinja"}


@pytest.mark.parametrize("repo", OTHERS)
def test_what_is_not_supported_is_refused_by_name(repo):
    with pytest.raises(UserError, match=f"^{repo}: .*{OTHERS[repo][1]}"):
        check_supported(LLAMA | OTHERS[repo][0], repo)


@pytest.mark.parametrize("repo", ["tiny/quantized", "tiny/gpt-oss"])
def test_what_is_not_supported_is_refused_before_its_weights_are_fetched(repo, endpoint, tmp_path):
    Hub.seen.clear()
    done = download("--repo_id", repo, endpoint=endpoint, cwd=tmp_path)
    lines = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert done.returncode == 1 and len(lines) == 1 and "Traceback" not in done.stderr, done.stderr
    origin = " made of tiny/both" if repo == "tiny/quantized" else ""
    assert lines[0].startswith(f"error: {repo}{origin}: ") and re.search(OTHERS[repo][1], lines[0]), lines
    assert {name for _, _, name, _ in Hub.seen} == {"config.json"} and not (tmp_path / "checkpoints").exists()


def test_a_gated_model_with_its_token_from_the_environment_or_the_flag(endpoint, tmp_path):
    assert download("--repo_id", "tiny/gated", endpoint=endpoint, cwd=tmp_path, HF_TOKEN=TOKEN).returncode == 0
    done = download("--repo_id", "tiny/gated", f"--access_token={TOKEN}", endpoint=endpoint, cwd=tmp_path)
    assert done.returncode == 0 and TOKEN not in done.stdout + done.stderr


FAILURES = {
    "gated": (["tiny/gated"], {}, "tiny/gated is gated: accept its licence.*--access_token=<HF_TOKEN> or set HF_TOKEN"),
    "not found": (["meta-llama/llama-2-7b"], {}, "not found on the Hub .or it is private.*lists the known models"),
    "revision": (["tiny/both", "--revision", "nowhere"], {}, "RevisionNotFoundError: .*nowhere"),
    "no such format": (["tiny/bin", "--from_safetensors", "true"], {}, "has .bin files: --from_safetensors false"),
    "forbidden": (["tiny/forbidden", f"--access_token={TOKEN}"], {}, "403.*run the command again"),
    "server error": (["tiny/broken"], {}, "501.*run the command again"),
    "offline": (["tiny/both"], {"HF_HUB_OFFLINE": "1"}, "OfflineMode.*HF_HUB_OFFLINE.*by hand and go on with"),
    "unreachable": (["tiny/both"], {"HF_ENDPOINT": "http://127.0.0.1:9"}, "127.0.0.1:9 .ConnectError.*by hand and go"),
    "portal": (["tiny/portal"], {}, "tiny/portal cannot be had from http://127.* .JSONDecodeError: Expecting value"),
    "no name": (["tiny/a--b"], {}, r"HFValidationError: Cannot have"),
}


@pytest.mark.parametrize(
    ("repo", "message"),
    [
        ("tiny/none", r"tiny/none has no pytorch_model\*.bin, so nothing that can be converted"),
        ("tiny/adapter", "tiny/adapter has no config.json, so no model that can be converted"),
        ("tiny/gguf", "no pytorch_model.*copy one of its .gguf files by hand, for scripts/convert_gguf_checkpoint.py"),
    ],
)
def test_a_repo_without_a_model_is_refused_by_its_files_alone(repo, message):
    with pytest.raises(UserError, match=message):
        wanted_files(REPOS[repo], repo, from_safetensors=None, tokenizer_only=False)


@pytest.mark.parametrize("repo_id", ["SmolLM2-135M", "HuggingFaceTB/SmolLM2 135M", "HuggingFaceTB/SmolLM2-135M/"])
def test_a_name_of_another_form_is_refused(repo_id):
    with pytest.raises(UserError, match=r"is not of the form ORG/NAME; .*download.py` lists the known models"):
        setup(repo_id=repo_id)


@pytest.mark.parametrize("space", ["{}\n", "  {} ", "{}\r\n"])
def test_white_space_around_a_token_is_no_part_of_it(space, endpoint, tmp_path):
    """Secret files of container systems end with a newline; the headers with it were called a network fault."""
    done = download("--repo_id", "tiny/gated", endpoint=endpoint, cwd=tmp_path, HF_TOKEN=space.format(TOKEN))
    assert done.returncode == 0, done.stderr


def test_a_token_that_cannot_be_one_is_refused_without_showing_it(endpoint, tmp_path):
    done = download("--repo_id", "tiny/gated", endpoint=endpoint, cwd=tmp_path, HF_TOKEN="hf_a\nhf_é")
    assert done.returncode == 1 and "holds characters that no token has" in done.stderr and "hf_a" not in done.stderr


BROKEN_HUB = """
import os
if "BROKEN" in os.environ:
    import huggingface_hub
    def broken(*args, **options):
        raise eval(os.environ["BROKEN"])
    huggingface_hub.snapshot_download = broken
"""
LOCAL = {
    "disk full": ("OSError(28, 'No space left on device')", "No space left on device"),
    "no right": ("PermissionError(13, 'Permission denied', 'x/y')", "Permission denied: 'x/y'"),
    "network": ("OSError(101, 'Network is unreachable')", "Network is unreachable"),
    "file in the way": ("", "(Not a directory|File exists): 'checkpoints"),
}


@pytest.mark.parametrize("case", LOCAL)
def test_a_fault_of_this_machine_is_told_as_it_is(case, endpoint, tmp_path):
    """Errors that huggingface_hub raises in the middle of a download; a file in the way is a real one."""
    error, message = LOCAL[case]
    (tmp_path / "sitecustomize.py").write_text(BROKEN_HUB)
    if not error:
        (tmp_path / "checkpoints").touch()
    environment = {"PYTHONPATH": str(tmp_path)} | ({"BROKEN": error} if error else {})
    done = download("--repo_id", "tiny/both", endpoint=endpoint, cwd=tmp_path, **environment)
    lines = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert done.returncode == 1 and len(lines) == 1 and "Traceback" not in done.stderr, done.stderr
    assert re.search(message, lines[0]), lines


@pytest.mark.parametrize("case", FAILURES)
def test_failure_is_one_line_and_leaves_nothing(case, endpoint, tmp_path):
    flags, environment, message = FAILURES[case]
    done = download("--repo_id", *flags, **{"endpoint": endpoint, "cwd": tmp_path}, **environment)
    lines = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert done.returncode == 1 and "Traceback" not in done.stderr, done.stderr
    assert len(lines) == 1 and re.search(message, lines[0]), done.stderr
    assert TOKEN not in done.stdout + done.stderr
    left = [p for p in (tmp_path / "checkpoints").rglob("*") if p.is_file() and ".cache" not in p.parts]
    assert not left


@pytest.mark.parametrize(("from_safetensors", "expected"), [(None, SHARDS), (True, SHARDS), (False, BINARY)])
def test_shards_come_with_their_own_index(from_safetensors, expected):
    """The index of files that were not fetched made the converter look for them."""
    options = {"from_safetensors": from_safetensors, "tokenizer_only": False}
    assert wanted_files(REPOS["tiny/sharded"], "tiny/sharded", **options) == ["config.json", *expected]


PARAMETERS = {
    "Llama-2-7b-hf": 6_738_415_616,
    "Llama-3.2-1B": 1_235_814_400,
    "SmolLM2-135M": 134_515_008,
    "pythia-160m": 162_322_944,
    "phi-2": 2_779_683_840,
    "Mistral-7B-v0.1": 7_241_732_096,
    "Ministral-8B-Instruct-2410": 8_019_808_256,
    "Qwen2.5-0.5B": 494_032_768,
    "Qwen3-0.6B": 596_049_920,
    "stablelm-2-1_6b": 1_644_515_328,
    "starcoder2-3b": 3_030_371_328,
    "falcon-7b": 6_921_720_704,  # 7,217,189,760 with the head, which is the embedding
    "gemma-2b": 2_506_172_416,
    "gemma-7b": 8_537_680_896,
    "gemma-2-2b": 2_614_341_888,
    "gemma-3-270m": 268_098_176,
    "gemma-3-1b-it": 999_885_952,
    "Phi-3-mini-4k-instruct": 3_821_079_552,
    "Phi-4-mini-instruct": 3_836_021_760,
    "OLMo-1B-hf": 1_176_764_416,
    "OLMo-2-1124-7B": 7_298_617_344,
    "SmolLM3-3B": 3_075_098_624,
    "granite-3.3-2b-instruct": 2_533_539_840,
}
"""Published numbers of parameters. A head that is the embedding counts once."""


def parameters(model: torch.nn.Module) -> int:
    return sum(tensor.numel() for tensor in {id(tensor): tensor for tensor in model.parameters()}.values())


@pytest.mark.parametrize("name", PARAMETERS)
def test_a_known_model_is_what_its_authors_and_transformers_say(name):
    """transformers reads the same figures and tells them in its own words, so a wrong key is lost there."""
    transformers = pytest.importorskip("transformers")
    described = dict(next(model for repo_id, model in KNOWN_MODELS.items() if repo_id.endswith(f"/{name}")))
    model_class = getattr(transformers, described.pop("architectures"))
    described["vocab_size"] = described.pop("padded_vocab_size", described["vocab_size"])
    config_class = {"Gemma3ForCausalLM": transformers.Gemma3TextConfig}.get(model_class.__name__)
    theirs, ours = (config_class or model_class.config_class)(**described), Config.from_name(name)
    told = {**theirs.to_dict(), "architectures": [model_class.__name__]}
    assert Config.from_hf(told, name) == replace(ours, vocab_size=ours.padded_vocab_size)
    with torch.device("meta"):
        assert parameters(model_class(theirs)) == parameters(GPT(ours)) == PARAMETERS[name]


def test_every_known_model_can_be_built():
    assert len({repo_id.lower() for repo_id in KNOWN_MODELS}) == len(KNOWN_MODELS) > 200
    for repo_id in KNOWN_MODELS:
        assert Config.from_name(repo_id).name == repo_id.split("/")[1]
    with pytest.raises(UserError, match="'Llama-2-8b' is not a known model"):
        Config.from_name("Llama-2-8b")


def test_each_group_of_known_models_says_where_its_figures_are_from():
    table = read_json(ROOT / "lit_gpt" / "known_models.json")
    for group in table["groups"]:
        assert any(source in group["source"] for source in table["sources"]), group


def test_help_shows_the_flags(tmp_path):
    done = download("--help", endpoint="http://127.0.0.1:9", cwd=tmp_path)
    assert done.returncode == 0 and "--from_safetensors" in done.stdout and "licence" in done.stdout
