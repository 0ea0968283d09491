"""Write adapters as PEFT LoRA folders, which vLLM, llama.cpp and other servers of LoRA host without merging.

In the diagonal block layout a reflected weight differs from W by a matrix of low rank: n for ETHER, 2n for ETHER+,
4n where both sides are reflected. That matrix is B A, exactly: nothing is fitted, nothing is left out.

Notable choices:
- lora_alpha is the rank: every scale is 1, also where a server looks at ``r`` alone. A scale of ours goes into B.
- Where Hugging Face holds several Linears of ours in one (q, k and v of GPT-NeoX, Falcon and Phi-3, gate and up of
  Phi-3), their A are stacked and the ranks add up.
- Every module gets the largest rank, filled up with zeros: llama.cpp knows one alpha a file and divides it by the rank
  of each tensor, so smaller ranks would be scaled up.
- One weight at a time is read from the memory-mapped base: no more is held than that weight and the factors so far.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from pathlib import Path

import safetensors.torch
import torch
import torch.nn.functional as F
from torch import Tensor

from lit_gpt.adapter import TARGETS, AdapterLayer, Part, adapter_layers, rows_in_memory
from lit_gpt.adapter_files import AdapterFile, attach_adapter, check_base, open_adapter
from lit_gpt.checkpoint import WEIGHTS, check_checkpoint_dir, load_config, load_state, meta_model
from lit_gpt.config import Config
from lit_gpt.errors import Problems, UserError, command
from lit_gpt.files import prepare_out_dir, staged_dir, write_json
from lit_gpt.hf import EMBEDDING, Layout, hf_layout
from lit_gpt.serving import lora_commands, lora_limits, served_base, serving_notes, write_card

CONFIG, TENSORS = "adapter_config.json", "adapter_model.safetensors"
"""Files of a PEFT folder."""
IN_MEMORY = {"embed_out": "lm_head"}
"""Modules that transformers 5 calls otherwise than the checkpoint does: GPT-NeoX's head."""
ROOT = "base_model.model."
"""PEFT begins the names of modules in its files so."""


@dataclass
class Export:
    """A LoRA in the making.

    Attributes:
        factors: A (r, in) and B (out, r) of each Hugging Face module, by its name.
    """

    factors: dict[str, tuple[Tensor, Tensor]] = field(default_factory=dict)

    def add(self, module: str, a: Tensor, b: Tensor) -> None:
        """Take the factors of one module."""
        self.factors[IN_MEMORY.get(module, module)] = (a, b)

    @property
    def ranks(self) -> dict[str, int]:
        """Return the largest rank in all layers, by the last part of the module's name."""
        ranks: dict[str, int] = {}
        for module, (a, _) in self.factors.items():
            last = module.rpartition(".")[2]
            ranks[last] = max(ranks.get(last, 0), len(a))
        return ranks

    @property
    def rank(self) -> int:
        """Return the largest rank, which every module of the file gets."""
        return max(self.ranks.values())

    def tensors(self) -> dict[str, Tensor]:
        """Return what ``adapter_model.safetensors`` holds: factors with zeros up to the largest rank."""
        tensors, rank = {}, self.rank
        for module, (a, b) in self.factors.items():
            missing = rank - len(a)
            tensors[f"{ROOT}{module}.lora_A.weight"] = F.pad(a, (0, 0, 0, missing)).contiguous()
            tensors[f"{ROOT}{module}.lora_B.weight"] = F.pad(b, (0, missing)).contiguous()
        return tensors

    @cached_property
    def rounding(self) -> float:
        """Return how far bf16 factors change the weight updates, relative to these; 0 where nothing is updated."""
        update = change = 0.0  # squared norms, summed over all modules
        for a, b in self.factors.values():
            update += squared_norm(a, b)
            change += squared_norm(torch.cat([a.bfloat16().float(), a]), torch.cat([b.bfloat16().float(), -b], dim=1))
        return (change / update) ** 0.5 if update else 0.0


def squared_norm(a: Tensor, b: Tensor) -> float:
    """Return |B A|^2 of A (r, in) and B (out, r), without their product: the sum over (B^T B) * (A A^T)."""
    a, b = a.double(), b.double()
    return ((b.T @ b) * (a @ a.T)).sum().clamp(min=0.0).item()  # of NaN, NaN; max() would make it zero


def export_adapter(
    *,
    checkpoint_dir: Path,
    out_dir: Path,
    ether_path: Path | None = None,
    lora_path: Path | None = None,
    strength: float = 1.0,
    overwrite: bool = False,
) -> None:
    """Write an adapter as a PEFT LoRA folder: adapter_config.json, adapter_model.safetensors, and a README.md.

    Args:
        checkpoint_dir: the base model's folder.
        out_dir: the folder to write.
        ether_path: an ETHER or ETHER+ adapter file, ours or the original code's; or
        lora_path: a LoRA adapter file.
        strength: of the adapter, 0 (none of it) to 1 (all of it).
        overwrite: replace an adapter that is already in out_dir.

    Raises:
        ValueError: the adapter is no LoRA of what Hugging Face's model holds (or none that is worth it).
    """
    adapter = open_adapter(ether_path, lora_path, strength)
    if not adapter:
        raise UserError("nothing to export: give an adapter file with --ether_path or --lora_path")
    config = load_config(check_checkpoint_dir(checkpoint_dir))
    out_dir = prepare_out_dir(out_dir, overwrite, names=[CONFIG], source=checkpoint_dir)
    check_base(adapter, checkpoint_dir)
    model, weights = meta_model(config), load_state(checkpoint_dir / WEIGHTS)
    attach_adapter(model, adapter)
    flags = {"checkpoint_dir": checkpoint_dir, f"{adapter.kind}_path": adapter.path}
    merge = command(f"scripts/merge_{adapter.kind}.py", **flags)
    try:
        export = factorise(dict(adapter_layers(model)), config, weights)
    except UserError as error:
        raise UserError(f"{adapter.path} cannot be a LoRA: {error}; merge instead: {merge}") from error
    if not math.isfinite(export.rounding):
        raise UserError(f"{adapter.path}: NaN or infinity in the update: convert the base model again, or train again")
    served, base = served_base(checkpoint_dir)
    limits = lora_limits(config, export.rank, head="lm_head" in export.ranks)
    about = f"{describe(adapter)}, as a LoRA of {base}"
    notes = facts(export, config) + serving_notes(checkpoint_dir, adapter.prompt_style, weights[EMBEDDING].dtype)
    notes += [f"{server} takes {limit}: merge for it" for server, limit in limits.items()]
    load = partial(lora_commands, name=out_dir.resolve().name, rank=export.rank, without=limits)
    with staged_dir(out_dir, overwrite) as staging:
        write_json(staging / CONFIG, peft_config(export, base=base))
        save_tensors(export.tensors(), staging)
        card = {"about": f"{about}. It computes the same function.", "notes": notes, "load": load(base, Path())}
        write_card(staging, out_dir, library="peft", base=base, **card)
    advice = [f"merge: {merge}"] if limits else []
    print(f"{out_dir}: {adapter.path}, {about}", *notes, *advice, sep="\n")
    if served != checkpoint_dir:
        print(f"next: {command('scripts/convert_lit_checkpoint.py', checkpoint_dir=checkpoint_dir, out_dir=served)}")
    print(*(f"{program}: {line}" for program, line in load(str(served), out_dir).items()), sep="\n")


def save_tensors(tensors: dict[str, Tensor], folder: Path, **metadata: str) -> None:
    """Write a PEFT folder's tensors; not by safetensors' save_file, whose files their owner alone can read."""
    (folder / TENSORS).write_bytes(safetensors.torch.save(tensors, metadata={"format": "pt", **metadata}))


def describe(adapter: AdapterFile) -> str:
    """Return an adapter's method, size, targets and prompt style in words."""
    config = adapter.config
    method = f"LoRA of rank {config.r}" if adapter.kind == "lora" else f"{config.Htype} with n = {config.nb}"
    style = f", prompt style {adapter.prompt_style}" if adapter.prompt_style else ""
    return f"{method} on {', '.join(target for target in TARGETS if getattr(config, target))}{style}"


def facts(export: Export, config: Config) -> list[str]:
    """Return rank, size and accuracy in words, and what tying the head means."""
    ranks = ", ".join(f"{name} {rank}" for name, rank in export.ranks.items())
    padded = "" if len({*export.ranks.values()}) == 1 else ", filled up with zeros"
    size = 4 * export.rank * sum(a.size(1) + b.size(0) for a, b in export.factors.values())
    found = [
        f"rank {export.rank} ({ranks}{padded}), {size / 1e6:.1f} MB in fp32",
        f"exact in fp32; on a server in bf16 its rounded factors change the weight update by {export.rounding:.1e}",
    ]
    if config.tie_embeddings and "lm_head" in export.ranks:
        found.append("the head is tied: unmerged, the embedding stays; PEFT's merge_and_unload would change it too")
    if config.architecture == "GPTNeoXForCausalLM":
        found.append("vLLM takes a LoRA on a GPTNeoXForCausalLM from version 0.32 on")
    return found


@torch.no_grad()
def factorise(layers: Mapping[str, AdapterLayer], config: Config, weights: Mapping[str, Tensor]) -> Export:
    """Return A and B of every Hugging Face module that the layers change, from the base's weights.

    Raises:
        ValueError: the adapter is no LoRA, with every reason; or a module's rank is so large that a LoRA saves nothing.
    """
    problems = Problems(layer.full_rank for layer in layers.values() if layer.full_rank)
    experts = f"transformers holds the experts of a {config.architecture} as plain parameters, not as Linears"
    problems.expect(not any(".experts." in name for name in layers), experts)
    problems.check()
    layout, export = hf_layout(replace(config, tie_embeddings=False)), Export()  # a tied head may be adapted
    changes: dict[str, list[tuple[Tensor, Tensor, Tensor]]] = {}  # of a module: A, B, the rows that B is for
    for name, layer in layers.items():
        weight = rows_in_memory(layer, weights[f"{name}.weight"].float())
        for part in layer.parts:
            if part.adapted:
                module, rows = place(layout, layer, f"{name}.weight", part)
                changes.setdefault(module, []).append((*layer.low_rank(part, weight[part.rows]), rows))
    for module, parts in changes.items():
        a = torch.cat([down for down, _, _ in parts])
        f, d = layout.theirs[f"{module}.weight"]
        b, r = a.new_zeros(f, len(a)), 0
        for down, up, rows in parts:  # where several parts of ours are one Linear there, their ranks add up
            b[rows, r : r + len(down)] = up
            r += len(down)
        if r * (f + d) >= f * d:
            raise UserError(f"rank {r} takes as much room as {module} itself, {f} x {d}")
        export.add(module, a, b)
    return export


def place(layout: Layout, layer: AdapterLayer, key: str, part: Part) -> tuple[str, Tensor]:
    """Return the Hugging Face module that has a part's rows, and which of its rows they are."""
    for piece in layout.pieces:
        if piece.name == key:
            theirs = torch.full((layout.ours[key][0],), -1)  # by the row of our file
            theirs[piece.rows] = torch.arange(piece.source_rows.start, piece.source_rows.stop)
            rows = rows_in_memory(layer, theirs)[part.rows]
            if (rows >= 0).all():
                return piece.source.removesuffix(".weight"), rows
    raise AssertionError(f"{key} has no place in the layout")


def peft_config(export: Export, *, base: str) -> dict:
    """Return the content of PEFT's ``adapter_config.json``."""
    about = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "base_model_name_or_path": base}
    size = {"target_modules": sorted(export.ranks), "r": export.rank, "lora_alpha": export.rank}
    return {**about, **size, "lora_dropout": 0.0, "bias": "none", "inference_mode": True}
