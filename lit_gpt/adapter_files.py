"""Adapter files: save, load, put on a base model.

An adapter file carries itself, ``{"model": {...}, "config": {...}}``: its tensors, and in plain types what they are
(method, blocks, targets), which base they belong to and which prompt style they were trained with. A file without a
"config" is one of the original code's; what it is follows from its keys and shapes.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lit_gpt.adapter import AdapterConfig, adapter_parameters, adapter_state, mark_only_adapter_as_trainable
from lit_gpt.checkpoint import WEIGHTS, fingerprint, load_state, save_state
from lit_gpt.errors import UserError, reading
from lit_gpt.ether import METHODS, EtherConfig, add_ether, ether_filter, set_ether_strength
from lit_gpt.lora import LoraConfig, add_lora, set_lora_strength
from lit_gpt.model import GPT
from lit_gpt.quantize import load_base


@dataclass(frozen=True)
class Kind:
    """A family of adapters.

    Attributes:
        config_class: of its settings.
        add: puts it on a model.
        file_name: of its file in a run folder.
        set_strength: returns its tensors at a strength, from these and a config; 0 makes it the identity.
    """

    config_class: type
    add: Callable[[GPT, Any], None]
    file_name: str
    set_strength: Callable[[Mapping[str, Tensor], Any, float], dict[str, Tensor]]


KINDS = {
    "ether": Kind(EtherConfig, add_ether, "lit_model_ether_finetuned.pth", set_ether_strength),
    "lora": Kind(LoraConfig, add_lora, "lit_model_lora_finetuned.pth", set_lora_strength),
}


@dataclass
class AdapterFile:
    """An adapter file's content; it is opened once in a command, and handed on.

    Attributes:
        path: the file, for messages.
        kind: a key of ``KINDS``.
        config: an ``EtherConfig`` or a ``LoraConfig``.
        state: the adapter's tensors.
        base: name and fingerprint of its base model, and how that was quantized where it was; empty for the original
            code's files.
        prompt_style: it was trained with; None where the file does not say.
    """

    path: Path
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


def open_adapter(
    ether_path: Path | str | None = None, lora_path: Path | str | None = None, strength: float = 1.0
) -> AdapterFile | None:
    """Read the adapter file that one of ``--ether_path`` and ``--lora_path`` names; return None where neither does."""
    if ether_path and lora_path:
        raise UserError("give --ether_path or --lora_path, not both")
    if strength != 1 and not (ether_path or lora_path):
        raise UserError(f"--strength {strength:g} needs an adapter file: give --ether_path or --lora_path")
    path, kind = (ether_path, "ether") if ether_path else (lora_path, "lora")
    return set_strength(load_adapter(path, kind), strength) if path else None


def set_strength(adapter: AdapterFile, strength: float) -> AdapterFile:
    """Return an adapter at a strength: 0 is the base model exactly, 1 the adapter as it was saved.

    Raises:
        ValueError: the adapter is an ETHER one, or the strength is no finite number.
    """
    if not math.isfinite(strength):
        raise UserError(f"--strength {strength}: expected a number; 0 is the base model, 1 the whole adapter")
    if strength == 1:
        return adapter
    state = KINDS[adapter.kind].set_strength(adapter.state, adapter.config, strength)
    return replace(adapter, state=state)


def load_adapter(path: Path | str, kind: str | None = None) -> AdapterFile:
    """Read an adapter file, ours or the original code's, of one kind where that is given.

    Raises:
        FileNotFoundError, ValueError: no such file, not an adapter, or one of another kind than ``kind``.
    """
    names = {"ether": "an ETHER", "lora": "a LoRA"}
    with reading(path):
        content = load_state(path)
        state, meta = content.get("model"), content.get("config")
        if not isinstance(state, dict) or not state or not all(isinstance(value, Tensor) for value in state.values()):
            raise UserError(f"{path} is not an adapter file: it holds no adapter under 'model'")
        if meta is None and not all(map(ether_filter, state)):
            raise UserError(f"{path} is not an adapter file: it has no 'config', and its keys are not ETHER's")
        found = meta["kind"] if meta else "ether"  # without one it is the original code's
        if kind not in (None, found):
            raise UserError(f"{path} holds {names.get(found, 'an unknown')} adapter; {names[kind]} one was expected")
        if meta is None:
            return AdapterFile(Path(path), "ether", infer_ether_config(state), state, {}, None)
        config_class = KINDS[found].config_class
        known = {field.name for field in fields(config_class)}  # an older version may have had others
        try:
            config = config_class(**{name: value for name, value in meta[found].items() if name in known})
        except UserError as error:
            raise UserError(f"{path} does not hold what it should: {error}") from error
        return AdapterFile(Path(path), found, config, state, {**meta["base"]}, meta["prompt_style"])


def infer_ether_config(state: Mapping[str, Tensor]) -> EtherConfig:
    """Return method, n, targets and side of an original file, from its keys and shapes; its layout is published."""
    # Shapes without the 1 that those of q, k and v begin with; (n, b, b) where the parameters are matrices.
    shapes = {name: t.shape[1:] if ".attn.attn." in name else t.shape for name, t in state.items()}
    shape = next(iter(shapes.values()))
    second, two_sided = (any(f".ether_R{number}" in name for name in state) for number in (2, 3))
    matrices = len(shape) == 3 and shape[-1] == shape[-2]
    method = "oft" if matrices else "etherplusHH" if two_sided else "etherplus" if second else "ether"
    ends = {"query": "_Rq", "key": "_Rk", "value": "_Rv", "projection": "attn.proj.ether_R", "head": "lm_head.ether_R"}
    targets = {target: any(name.endswith(end) for name in state) for target, end in ends.items()}
    targets["mlp"] = any(".mlp." in name for name in state)
    # Unflipped, an MLP's last Linear is transformed on its wide input; flipped, on its narrow output, whose size its
    # first Linears' input has. Nothing else tells: of the other Linears, the smaller side is the input already.
    sizes = {name: shape[0] * shape[1] for name, shape in shapes.items() if ".mlp." in name}
    down = {size for name, size in sizes.items() if name.endswith("proj.ether_R")}
    up = {size for name, size in sizes.items() if ".fc" in name and name.endswith(".ether_R")}
    flipped = method != "etherplusHH" and bool(down) and down == up
    return EtherConfig(Htype=method, nb=shape[0], **targets, flip_side=flipped, block_layout="published")


def make_trainable(model: GPT, config: AdapterConfig | None) -> None:
    """Put a new adapter on, which alone trains; without a config all weights train."""
    if config is None:
        model.requires_grad_(True)
    else:
        KINDS[config.kind].add(model, config)
        mark_only_adapter_as_trainable(model)


def attach_adapter(model: GPT, adapter: AdapterFile) -> None:
    """Put an adapter on its base model and load its tensors.

    On a model on the meta device the adapter's tensors alone are real, on the CPU.
    """
    KINDS[adapter.kind].add(model, adapter.config)
    fill_adapter(model, adapter)


@torch.no_grad()
def fill_adapter(model: GPT, adapter: AdapterFile) -> None:
    """Load an adapter's tensors into a model that has such an adapter; the rest as ``attach_adapter``."""
    expected, state = adapter_parameters(model), adapter.state
    problems = {name for name in expected.keys() & state.keys() if expected[name].shape != state[name].shape}
    problems |= expected.keys() ^ state.keys()
    if problems:
        raise UserError(
            f"{adapter.path} does not fit this base model: {len(problems)} tensors differ, {min(problems)} first"
        )
    has_vectors = adapter.kind == "ether" and not METHODS[adapter.config.Htype].matrices
    for name, parameter in expected.items():
        if not torch.isfinite(state[name]).all():
            raise UserError(f"{adapter.path}: {name} is not finite; the run that wrote it diverged")
        if has_vectors and not state[name].any(dim=-1).all():
            raise UserError(f"{adapter.path}: {name} holds a zero vector, which has no direction; the file is damaged")
        if parameter.is_meta:
            layer, _, own = name.rpartition(".")
            parameter = nn.Parameter(torch.empty_like(parameter, device="cpu"))
            setattr(model.get_submodule(layer), own, parameter)
        parameter.copy_(state[name])


def check_base(adapter: AdapterFile, checkpoint_dir: Path | str) -> None:
    """Raise where the adapter was trained on another base; the original code's files do not say."""
    if not adapter.base:
        config = adapter.config
        print(f"{adapter.path} has no config: read as an original {config.Htype} adapter, n = {config.nb}")
        return
    found = fingerprint(load_state(Path(checkpoint_dir) / WEIGHTS))
    if found != adapter.base["fingerprint"]:
        raise UserError(
            f"{adapter.path} belongs to another base model: {adapter.base['name']} ({adapter.base['fingerprint']}), "
            f"while {checkpoint_dir} holds {found}; give --checkpoint_dir the folder that it was trained on"
        )


def load_adapted_model(
    checkpoint_dir: Path | str,
    precision: str = "32-true",
    *,
    adapter: AdapterFile | None = None,
    quantize: str | None = None,
    device: torch.device | str = "cpu",
) -> GPT:
    """Load a base-shaped folder's model, with an unmerged adapter where one is given; in evaluation mode."""
    if adapter:
        check_base(adapter, checkpoint_dir)
    model = load_base(checkpoint_dir, precision, quantize, device=device)
    if adapter:
        attach_adapter(model, adapter)
    return model.eval()
