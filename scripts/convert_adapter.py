"""Take an ETHER adapter into PEFT and back, or make a LoRA of it: the same function each time, nothing fitted.

    python scripts/convert_adapter.py --to peft --adapter_path RUN/lit_model_ether_finetuned.pth \\
        --checkpoint_dir checkpoints/ORG/NAME --out_dir path/to/peft
    python scripts/convert_adapter.py --to lit --adapter_path path/to/peft --checkpoint_dir ... --out_dir path/to/ours
    python scripts/convert_adapter.py --to lora --adapter_path path/to/peft --checkpoint_dir ... --out_dir path/to/lora

A PEFT ETHER folder (lit_gpt/peft_ether.py) has an adapter for each Linear of Hugging Face's model, our file one for
each of q, k, v and every other Linear: they correspond where each of these is a Linear there. A LoRA folder is loaded
by whatever has never heard of ETHER. Of a file of ours, export_lora.py makes it without transformers.
"""

import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

from safetensors import safe_open
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # runs from any folder

from lit_gpt.adapter import TARGETS, adapter_layers, linear_targets
from lit_gpt.adapter_files import KINDS, AdapterFile, attach_adapter, check_base, load_adapter, save_adapter
from lit_gpt.checkpoint import WEIGHTS, check_checkpoint_dir, fingerprint, hub_name, load_config, load_state, meta_model
from lit_gpt.cli import main
from lit_gpt.config import Config
from lit_gpt.errors import UserError, reading
from lit_gpt.ether import EtherConfig, add_ether
from lit_gpt.export import CONFIG, IN_MEMORY, ROOT, TENSORS, Export, place, save_tensors
from lit_gpt.files import prepare_out_dir, read_json, staged_dir
from lit_gpt.hf import hf_layout
from lit_gpt.serving import served_base, write_card

SETTINGS = {"method": "Htype", "n": "nb"} | {name: name for name in ("dropout", "block_dropout", "flip_side")}
"""PEFT's names of an adapter's settings, with ours."""
Form = Literal["peft", "lit", "lora"]
STYLE = "prompt_style"
"""A key in the metadata of a PEFT folder's tensors, ours alone: the style of prompts."""
ABOUT = {"peft": "An ETHER adapter", "lora": "An ETHER adapter in the form of a LoRA"}
NOTES = {
    "peft": "`import lit_gpt.peft_ether`, of ETHER's repository, comes first: PEFT by itself knows no ETHER",
    "lora": "it computes the same function, exactly in fp32; PEFT loads it as any LoRA",
}
"""The beginning of the folder's page, and a note on it."""


def setup(*, to: Form, adapter_path: Path, checkpoint_dir: Path, out_dir: Path, overwrite: bool = False) -> None:
    """Write an ETHER adapter in another form.

    Args:
        to: peft (a PEFT folder, from an adapter file of ours), lit (an adapter file of ours, from a PEFT folder) or
            lora (a PEFT LoRA folder, from a PEFT folder).
        adapter_path: the adapter file, or the PEFT folder.
        checkpoint_dir: the base model's folder, with lit_model.pth; for lora a Hugging Face folder or a repo id.
        out_dir: the folder to write.
        overwrite: replace an adapter that is already in out_dir.
    """
    names = [KINDS["ether"].file_name] if to == "lit" else [CONFIG]
    out_dir = prepare_out_dir(out_dir, overwrite, names=names, source=checkpoint_dir)
    with staged_dir(out_dir, overwrite) as staging:
        {"peft": to_peft, "lit": to_lit, "lora": to_lora}[to](adapter_path, checkpoint_dir, staging)
        if to != "lit":
            base = read_json(staging / CONFIG)["base_model_name_or_path"]
            about = f"{ABOUT[to]} of {base}, made of {adapter_path.name}."
            load = {"PEFT": "AutoPeftModelForCausalLM.from_pretrained('.')"}
            write_card(staging, out_dir, library="peft", base=base, about=about, notes=[NOTES[to]], load=load)
    print(f"{adapter_path} -> {out_dir}")


def to_peft(path: Path, checkpoint_dir: Path, out_dir: Path) -> None:
    """Write an adapter file of ours as a PEFT folder."""
    from lit_gpt.peft_ether import EtherPeftConfig

    config, adapter = load_config(check_checkpoint_dir(checkpoint_dir)), load_adapter(path, "ether")
    check_base(adapter, checkpoint_dir)
    model = meta_model(config)
    attach_adapter(model, adapter)
    theirs = {ours: name for _, ours, name in counterparts(config, adapter.config)}
    reasons = [layer.full_rank for _, layer in adapter_layers(model) if layer.full_rank]
    reasons += [f"{ours} has no Linear of its own in a {config.architecture}" for ours in theirs if not theirs[ours]]
    if reasons:
        raise UserError(f"{path} is nothing in PEFT: {reasons[0]}; scripts/export_lora.py or merge_ether.py may do")
    tensors = {theirs[ours]: tensor.flatten(0, -2).contiguous() for ours, tensor in adapter.state.items()}
    settings = {name: getattr(adapter.config, ours) for name, ours in SETTINGS.items()}
    targets = {name.split(".")[-2] for name in tensors}
    written = EtherPeftConfig(**settings, target_modules=targets, task_type="CAUSAL_LM", inference_mode=True)
    written.base_model_name_or_path = served_base(checkpoint_dir)[1]
    written.save_pretrained(out_dir)
    save_tensors(tensors, out_dir, **{STYLE: adapter.prompt_style or ""})


def to_lit(folder: Path, checkpoint_dir: Path, out_dir: Path) -> None:
    """Write a PEFT ETHER folder as an adapter file of ours."""
    config, (peft_config, given, style) = load_config(check_checkpoint_dir(checkpoint_dir)), read_peft(folder)
    settings = {ours: getattr(peft_config, name) for name, ours in SETTINGS.items()}
    pairs = [*counterparts(config, EtherConfig(**{**settings, **dict.fromkeys(TARGETS, True), "nb": 1}))]
    found = {target for target, _, theirs in pairs if theirs in given}
    names = {ours: theirs for target, ours, theirs in pairs if target in found}
    other = given.keys() ^ {*names.values()}
    if other or peft_config.n_pattern:
        raise UserError(f"{folder}: ours have one n, and targets in all layers; here {min(other, default='n')} differs")
    state = {ours: given[name][None] if ".attn.attn." in ours else given[name] for ours, name in names.items()}
    ether = EtherConfig(**settings, **{target: target in found for target in TARGETS})
    base = {"name": checkpoint_dir.resolve().name, "fingerprint": fingerprint(load_state(checkpoint_dir / WEIGHTS))}
    model, meta = meta_model(config), {"kind": "ether", "config": ether, "base": base, "prompt_style": style}
    attach_adapter(model, AdapterFile(path=folder, state=state, **meta))
    save_adapter(out_dir / KINDS["ether"].file_name, model, **meta)


def to_lora(folder: Path, base: Path, out_dir: Path) -> None:
    """Write a PEFT ETHER folder as a PEFT LoRA folder, exact in fp32; of one rank, as llama.cpp knows no other."""
    import peft
    import transformers

    from lit_gpt.peft_ether import EtherLinear

    config, _, _ = read_peft(folder)
    auto_class = (config.auto_mapping or {}).get("base_model_class", "AutoModelForCausalLM")
    model = getattr(transformers, auto_class).from_pretrained(str(base), dtype="auto")
    model = peft.PeftModel.from_pretrained(model, folder).get_base_model()
    export = Export()
    for name, layer in model.named_modules():
        if isinstance(layer, EtherLinear):
            export.add(name, *layer.factors("default"))
    kept = ("target_modules", "exclude_modules", "layers_to_transform", "layers_pattern", "task_type", "auto_mapping")
    settings = {"r": export.rank, "lora_alpha": export.rank} | {name: getattr(config, name) for name in kept}
    lora = peft.LoraConfig(**settings, inference_mode=True)
    # What PEFT finds the base by from any folder: ORG/NAME, or the whole path of a folder elsewhere.
    lora.base_model_name_or_path = hub_name(base) or str(base.resolve() if base.is_dir() else base)
    lora.save_pretrained(out_dir)
    save_tensors(export.tensors(), out_dir)


def read_peft(folder: Path) -> tuple[Any, dict[str, Tensor], str | None]:
    """Return config, tensors and prompt style of a PEFT ETHER folder; raise UserError where it is none."""
    from lit_gpt.peft_ether import EtherPeftConfig

    if not ((folder / CONFIG).is_file() and (folder / TENSORS).is_file()):
        raise UserError(f"{folder} is no PEFT folder: it needs {CONFIG} and {TENSORS}")
    with reading(folder / TENSORS), safe_open(folder / TENSORS, "pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (no dict)
        style = (file.metadata() or {}).get(STYLE) or None
    with reading(folder / CONFIG):
        described = read_json(folder / CONFIG)
        method = "modules trained in full" if described.get("modules_to_save") else described["peft_type"]
        if method != "ETHER":
            raise UserError(f"{folder} holds {method}; an ETHER adapter alone was expected")
        return EtherPeftConfig.from_pretrained(folder), tensors, style


def counterparts(config: Config, ether: EtherConfig) -> Iterator[tuple[str, str, str | None]]:
    """Yield the target and the name of each tensor of ours, with PEFT's name of it, None where it has none."""
    model, layout = meta_model(config), hf_layout(replace(config, tie_embeddings=False))
    add_ether(model, ether)
    for name, layer, targets in linear_targets(model, ether):
        for part in (part for part in layer.parts if part.adapted):
            module, rows = place(layout, layer, f"{name}.weight", part)
            whole = len(rows) == layout.theirs[f"{module}.weight"][0] and ".experts." not in name
            for side in layer.sides:
                for ours, vector in zip(layer.names(part, side), "uv", strict=False):
                    theirs = f"{ROOT}{IN_MEMORY.get(module, module)}.ether_{vector}_{side}" if whole else None
                    yield part.target or min(targets), f"{name}.{ours}", theirs


if __name__ == "__main__":
    main(setup)
