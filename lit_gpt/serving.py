"""Say how what export_lora and convert_lit_checkpoint write is loaded: commands, limits of servers, a model card.

Tried in vLLM 0.32 and in llama.cpp of October 2026 by tests/servers.sh; what vLLM takes of each class its source says.
A sentence is written once: the scripts print it, and the card holds it. Computes nothing, and knows no adapter.
"""

import json
import os
import shlex
from collections.abc import Container
from pathlib import Path

import torch

from lit_gpt.checkpoint import hub_name
from lit_gpt.config import Config
from lit_gpt.errors import reading
from lit_gpt.files import read_json, write_text
from lit_gpt.hf_config import MULTIMODAL
from lit_gpt.prompts import CHAT
from lit_gpt.tokenizer import Tokenizer

VLLM_RANKS = (8, 16, 32, 64, 128, 256, 320, 512)
"""Values of vLLM's ``--max-lora-rank``."""
VLLM_HEADS = ("Granite", "Llama", "Mixtral", "Phi3", "Qwen3", "Qwen3Moe")
"""Models whose head takes a LoRA in vLLM: their ``embedding_modules`` have it."""
WITHOUT_LORA_IN_VLLM = ("Falcon", "StableLm")
"""Models that are no ``SupportsLoRA`` there."""
HF_WEIGHTS = ("model*.safetensors", "pytorch_model*.bin")
CARD = """\
---
library_name: {library}{base_model}
pipeline_tag: text-generation
tags: [ether]
---

# {title}

{about}

{notes}

To load it, in this folder:

{commands}
"""
FP32 = (
    "vLLM casts fp32 weights to bf16 unless told --dtype float32: log-probabilities of SmolLM2-135M moved by up to "
    "0.4, with and without an adapter"
)
STYLE = (
    "prompt style {style} does not travel with these files: a server renders messages with the base's chat template; "
    "send it a text that is rendered already, as lit_gpt/prompts.py does"
)


def hf_folder(checkpoint_dir: Path) -> Path:
    """Return the folder with a base as servers read it: this one, or the one that convert_lit_checkpoint has to write.

    An adapter of a multimodal model belongs to its text model: in the whole model, modules have other names.
    """
    path, has_weights = checkpoint_dir / "config.json", any(any(checkpoint_dir.glob(each)) for each in HF_WEIGHTS)
    with reading(path):
        listed = str(read_json(path).get("architectures")) if path.is_file() and has_weights else None
    if listed and not any(name in listed for name in MULTIMODAL):
        return checkpoint_dir
    return Path(f"{os.path.abspath(checkpoint_dir)}-hf")


def served_base(checkpoint_dir: Path) -> tuple[Path, str]:
    """Return a base's ``hf_folder``, and the name that finds it from any folder: ORG/NAME on the Hub, or a path."""
    folder = hf_folder(checkpoint_dir)
    on_hub = hub_name(checkpoint_dir) if folder == checkpoint_dir else None
    return folder, on_hub or os.path.abspath(folder)


def model_commands(folder: Path) -> dict[str, str]:
    """Return the commands that load a model's folder, by program; quoted for Python or for a shell."""
    quoted = shlex.quote(str(folder))
    return {
        "transformers": f"AutoModelForCausalLM.from_pretrained({str(folder)!r})",
        "vLLM": f"vllm serve {quoted}",
        "llama.cpp": f"python convert_hf_to_gguf.py {quoted}",
    }


def lora_limits(config: Config, rank: int, *, head: bool) -> dict[str, str]:
    """Return what a server does not take of a LoRA on such a base, by the server's name.

    Args:
        config: the base's.
        rank: of the LoRA.
        head: the LoRA changes the head.
    """
    name, limits = config.architecture.removesuffix("ForCausalLM"), {}
    if rank > VLLM_RANKS[-1]:
        limits["vLLM"] = f"no rank above {VLLM_RANKS[-1]}"
    if head and name not in VLLM_HEADS:
        limits["vLLM"] = f"no LoRA of the head of a {config.architecture}"
    if name in WITHOUT_LORA_IN_VLLM:
        limits["vLLM"] = f"no LoRA on a {config.architecture}"
    if head and config.tie_embeddings:
        limits["llama.cpp"] = "no LoRA of a tied head"
    return limits


def lora_commands(base: str, folder: Path, *, name: str, rank: int, without: Container[str] = ()) -> dict[str, str]:
    """Return the commands that load a LoRA folder, by program.

    Args:
        base: the folder of the base, or its name on the Hub.
        folder: of the LoRA.
        name: of the LoRA in vLLM's requests.
        rank: of the LoRA.
        without: programs that are left out.
    """
    limit = next((limit for limit in VLLM_RANKS if rank <= limit), None)
    flag = "--base" if Path(base).is_absolute() or Path(base).is_dir() else "--base-model-id"
    served = ["vllm", "serve", base, "--enable-lora", "--max-lora-rank", str(limit)]
    served += ["--lora-modules", f"{name}={folder}"]
    commands = {
        "PEFT": f"AutoPeftModelForCausalLM.from_pretrained({str(folder)!r})",
        "vLLM": shlex.join(served),
        "llama.cpp": shlex.join(["python", "convert_lora_to_gguf.py", str(folder), flag, base]),
    }
    return {program: line for program, line in commands.items() if program not in without}


def serving_notes(folder: Path, style: str | None, dtype: torch.dtype) -> list[str]:
    """Return what whoever serves a finetuned model has to know of prompts, of the end of answers, and of the type.

    Args:
        folder: with the tokenizer and generation_config.json that are served.
        style: the prompt style; None where it is not known.
        dtype: of the weights.
    """
    tokenizer = Tokenizer(folder) if style else None
    end = tokenizer.answer_end(style) if tokenizer else None
    notes = [STYLE.format(style=style)] if style not in (None, CHAT) else []
    if end is not None and end not in tokenizer.eos_ids:
        notes.append(f"answers end with token {end}, as no file of the base tells: ask with stop_token_ids = [{end}]")
    return notes + [FP32] * (dtype == torch.float32)


def write_card(
    staging: Path, out_dir: Path, *, library: str, about: str, notes: list[str], load: dict[str, str], base: str = ""
) -> None:
    """Write README.md, a folder's page on the Hub, unless there is one already.

    Args:
        staging: the folder to write into.
        out_dir: where its files go, and whose README.md stays as it is.
        library: that loads the folder.
        about: a sentence.
        notes: sentences for a list.
        load: commands, by program.
        base: of an adapter: its name on the Hub, or its folder.
    """
    if os.path.lexists(out_dir / "README.md"):
        print(f"{out_dir / 'README.md'} stays as it is")
        return
    on_hub = base and not Path(base).is_absolute()  # the Hub refuses a page whose head names a folder as the base
    head = {"library": library, "base_model": f"\nbase_model: {json.dumps(base)}" if on_hub else ""}
    lists = notes, [f"{program}: `{line}`" for program, line in load.items()]
    notes, commands = ("\n".join(f"- {line}" for line in lines) for lines in lists)
    card = CARD.format(**head, title=out_dir.resolve().name, about=about, notes=notes, commands=commands)
    write_text(staging / "README.md", card)
