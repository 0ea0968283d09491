"""Adapter files: save, load, put on a base model.

An adapter file carries itself, ``{"model": {...}, "config": {...}}``: its tensors, and in plain types what they are
(method, blocks, targets), which base they belong to and which prompt style they were trained with. A file without a
"config" is one of the original code's; what it is follows from its keys and shapes.
"""

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lit_gpt.adapter import adapter_parameters, adapter_state, mark_only_adapter_as_trainable
from lit_gpt.checkpoint import WEIGHTS, fingerprint, load_model, load_prompt_style, load_state, save_state
from lit_gpt.errors import UserError, reading
from lit_gpt.ether import METHODS, EtherConfig, add_ether
from lit_gpt.lora import LoraConfig, add_lora
from lit_gpt.model import GPT
from lit_gpt.quantize import load_quantized_model


@dataclass(frozen=True)
class Kind:
    """A family of adapters: its config class, how it is put on a model, and the name of its file in a run folder."""

    config_class: type
    add: Callable[[GPT, Any], None]
    file_name: str


KINDS = {
    "ether": Kind(EtherConfig, add_ether, "lit_model_ether_finetuned.pth"),
    "lora": Kind(LoraConfig, add_lora, "lit_model_lora_finetuned.pth"),
}


@dataclass
class AdapterFile:
    """What an adapter file says.

    Attributes:
        kind: a key of ``KINDS``.
        config: an ``EtherConfig`` or a ``LoraConfig``.
        state: the adapter's tensors.
        base: name and fingerprint of its base model, and how that was quantized where it was; empty for the original
            code's files.
        prompt_style: it was trained with; None where the file does not say.
    """

    kind: str
    config: Any
    state: dict[str, Tensor]
    base: dict[str, str]
    prompt_style: str | None


def save_adapter(
    path: Path | str, model: GPT, *, kind: str, config: Any, base: Mapping[str, str], prompt_style: str | None
) -> None:
    """Write the adapter of ``model``; arguments as the attributes of ``AdapterFile``."""
    meta = {"kind": kind, kind: asdict(config), "base": dict(base), "prompt_style": prompt_style}
    save_state({"model": adapter_state(model), "config": meta}, path)


def load_adapter(path: Path | str, kind: str) -> AdapterFile:
    """Read an adapter file.

    Args:
        path: the file, ours or the original code's.
        kind: ``ether`` or ``lora``, what the caller expects.

    Raises:
        FileNotFoundError, ValueError: no such file, not an adapter, or one of the other kind.
    """
    with reading(path):
        return _parse_adapter(load_state(path), path, kind)


def _parse_adapter(content: dict[str, Any], path: Path | str, kind: str) -> AdapterFile:
    state, meta = content.get("model"), content.get("config")
    if not isinstance(state, dict) or not state or not all(isinstance(value, Tensor) for value in state.values()):
        raise UserError(f"{path} is not an adapter file: it holds no adapter under 'model'")
    if meta is None:
        if kind != "ether" or not all(".ether_R" in name for name in state):
            raise UserError(f"{path} is not {_article(kind)} adapter: no 'config', and its keys are not ETHER's")
        return AdapterFile("ether", infer_ether_config(state), state, {}, None)
    if meta.get("kind") != kind:
        raise UserError(f"{path} holds {_article(meta.get('kind'))} adapter; {_article(kind)} one was expected")
    config_class = KINDS[kind].config_class
    known = {field.name for field in fields(config_class)}
    config = config_class(**{name: value for name, value in meta[kind].items() if name in known})
    base = {**meta["base"]}  # refuses what is no mapping
    if base and not {"name", "fingerprint"} <= base.keys():
        raise UserError(f"{path} does not say which base model it belongs to; train it again")
    return AdapterFile(kind, config, state, base, meta["prompt_style"])


def _article(kind: str | None) -> str:
    return {"ether": "an ETHER", "lora": "a LoRA"}.get(kind or "", "an unknown")


def infer_ether_config(state: Mapping[str, Tensor]) -> EtherConfig:
    """Method, n, targets and side of an original file, from its keys and shapes; its layout is ``published``."""
    names = set(state)
    name, first = next(iter(state.items()))
    qkv = ".attn.attn." in name  # these have a leading 1
    if (first.dim() - qkv) == 3 and first.size(-1) == first.size(-2):
        method, blocks = "oft", first.size(-3)
    else:
        two_sided, plus = (any(f".ether_R{k}" in name for name in names) for k in (3, 2))
        method, blocks = ("etherplusHH" if two_sided else "etherplus" if plus else "ether"), first.size(-2)
    ends = {"query": "ether_Rq", "key": "ether_Rk", "value": "ether_Rv", "projection": "attn.proj.ether_R"}
    targets = {target: any(name.endswith(end) for name in names) for target, end in ends.items()}
    targets["mlp"] = any(".mlp." in name for name in names)
    targets["head"] = any(name.startswith("lm_head") for name in names)
    return EtherConfig(
        Htype=method, nb=blocks, **targets, flip_side=_is_flipped(state, method), block_layout="published"
    )


def _is_flipped(state: Mapping[str, Tensor], method: str) -> bool:
    """Unflipped, an MLP's last Linear is transformed on its wide input; flipped, on its narrow output.

    Nothing else tells: of the other Linears, the smaller side is the input already.
    """
    if method == "etherplusHH":
        return False
    sizes = {name: t.size(-1) * t.size(-2 if t.dim() == 2 else -3) for name, t in state.items() if ".mlp." in name}
    down = {size for name, size in sizes.items() if name.endswith("proj.ether_R")}
    up = {size for name, size in sizes.items() if ".fc" in name and name.endswith(".ether_R")}
    return bool(down) and down == up


def make_trainable(model: GPT, kind: str, config: Any) -> None:
    """Put a new adapter on, which alone trains; without a config all weights train."""
    if config is None:
        model.requires_grad_(True)
        return
    KINDS[kind].add(model, config)
    mark_only_adapter_as_trainable(model)


def attach_adapter(model: GPT, adapter: AdapterFile, *, source: Path | str) -> None:
    """Put an adapter on its base model and load its tensors; ``source`` is named where they do not fit.

    On a model on the meta device the adapter's tensors alone are real, on the CPU.
    """
    KINDS[adapter.kind].add(model, adapter.config)
    fill_adapter(model, adapter, source=source)


def fill_adapter(model: GPT, adapter: AdapterFile, *, source: Path | str) -> None:
    """Load an adapter's tensors into a model that has such an adapter; the rest as ``attach_adapter``."""
    expected = adapter_parameters(model)
    problems = list(expected.keys() ^ adapter.state.keys())
    problems += [n for n in expected.keys() & adapter.state.keys() if expected[n].shape != adapter.state[n].shape]
    if problems:
        raise UserError(f"{source} does not fit this base model: {len(problems)} tensors differ, {min(problems)} first")
    has_vectors = isinstance(adapter.config, EtherConfig) and not METHODS[adapter.config.Htype].matrices
    with torch.no_grad():
        for name, parameter in expected.items():
            tensor = adapter.state[name]
            if not torch.isfinite(tensor).all():
                raise UserError(f"{source}: {name} is not finite; the run that wrote it diverged")
            if has_vectors and not tensor.any(dim=-1).all():
                raise UserError(f"{source}: {name} holds a zero vector, which has no direction; the file is damaged")
            if parameter.is_meta:
                layer, _, own = name.rpartition(".")
                parameter = nn.Parameter(torch.empty_like(parameter, device="cpu"))
                setattr(model.get_submodule(layer), own, parameter)
            parameter.copy_(tensor)


def check_base(adapter: AdapterFile, checkpoint_dir: Path | str, *, source: Path | str) -> None:
    """Raise where the adapter was trained on another base; the original code's files do not say."""
    if not adapter.base:
        print(f"{source} has no config: read as an original {adapter.config.Htype} adapter, n = {adapter.config.nb}")
        return
    found = fingerprint(load_state(Path(checkpoint_dir) / WEIGHTS))
    if found != adapter.base["fingerprint"]:
        raise UserError(
            f"{source} belongs to another base model: {adapter.base['name']} ({adapter.base['fingerprint']}), "
            f"while {checkpoint_dir} holds {found}; give --checkpoint_dir the folder that it was trained on"
        )


def open_adapter(ether_path: Path | str | None, lora_path: Path | str | None) -> tuple[AdapterFile, Path] | None:
    """The adapter that one of ``--ether_path`` and ``--lora_path`` names, with its path; None where neither does."""
    if ether_path and lora_path:
        raise UserError("give --ether_path or --lora_path, not both")
    path, kind = (ether_path, "ether") if ether_path else (lora_path, "lora")
    return (load_adapter(path, kind), Path(path)) if path else None


def load_adapted_model(
    checkpoint_dir: Path | str,
    precision: str = "32-true",
    *,
    ether_path: Path | str | None = None,
    lora_path: Path | str | None = None,
    quantize: str | None = None,
    device: torch.device | str = "cpu",
) -> GPT:
    """A base-shaped folder's model, with an unmerged adapter where a path is given; in evaluation mode."""
    found = open_adapter(ether_path, lora_path)
    if found:
        check_base(found[0], checkpoint_dir, source=found[1])
    if quantize:
        model = load_quantized_model(checkpoint_dir, precision, quantize, device=device)
    else:
        model = load_model(checkpoint_dir, precision, device=device)
    if found:
        attach_adapter(model, found[0], source=found[1])
    return model.eval()


def adapted_prompt_style(
    checkpoint_dir: Path | str, *, ether_path: Path | str | None = None, lora_path: Path | str | None = None
) -> str:
    """The prompt style of an adapter, or of the folder where there is no adapter or it does not say."""
    found = open_adapter(ether_path, lora_path)
    return (found and found[0].prompt_style) or load_prompt_style(checkpoint_dir)
