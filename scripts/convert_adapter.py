"""Take an ETHER adapter into PEFT and back, or make a LoRA of it: the same function each time, nothing fitted.

    python scripts/convert_adapter.py --to peft --adapter RUN/lit_model_ether_finetuned.pth --out_dir path/to/peft \\
        --checkpoint_dir checkpoints/ORG/NAME
    python scripts/convert_adapter.py --to lit  --adapter path/to/peft --out_dir ... --checkpoint_dir ...
    python scripts/convert_adapter.py --to lora --adapter path/to/peft --out_dir ... --checkpoint_dir ...

A PEFT ETHER folder (lit_gpt/peft_ether.py) has an adapter for each Linear of Hugging Face's model, our file one for
each of q, k, v and every other Linear: they correspond where q, k and v are Linears of their own. A LoRA folder needs
neither: PEFT, vLLM and llama.cpp load it. Of a file of ours, export_lora.py makes that without transformers.
"""

import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Literal

import torch
import torch.nn.functional as F
from safetensors import safe_open
from safetensors.torch import save_file

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # runs from any folder

from lit_gpt.adapter import TARGETS, adapter_layers
from lit_gpt.adapter_files import KINDS, AdapterFile, attach_adapter, check_base, load_adapter, save_adapter
from lit_gpt.checkpoint import WEIGHTS, check_checkpoint_dir, fingerprint, load_config, load_state, meta_model
from lit_gpt.cli import main
from lit_gpt.config import Config
from lit_gpt.errors import UserError, reading
from lit_gpt.ether import EtherConfig, add_ether
from lit_gpt.export import IN_MEMORY
from lit_gpt.files import prepare_out_dir, staged_dir
from lit_gpt.hf import hf_modules

SETTINGS = {"method": "Htype", "n": "nb", **{name: name for name in ("dropout", "block_dropout", "flip_side")}}
"""PEFT's names of an adapter's settings, with ours."""
CONFIG, TENSORS = "adapter_config.json", "adapter_model.safetensors"


def setup(
    *, to: Literal["peft", "lit", "lora"], adapter: Path, checkpoint_dir: Path, out_dir: Path, overwrite: bool = False
) -> None:
    """Write an ETHER adapter in another form.

    Args:
        to: peft (a PEFT folder, from an adapter file of ours), lit (an adapter file of ours, from a PEFT folder) or
            lora (a PEFT LoRA folder, from a PEFT folder).
        adapter: the adapter file, or the PEFT folder.
        checkpoint_dir: the base model: a base-shaped folder; for lora one of Hugging Face's, or a repo id.
        out_dir: the folder to write.
        overwrite: replace an adapter that is already in out_dir.
    """
    names = [KINDS["ether"].file_name] if to == "lit" else [CONFIG]
    out_dir = prepare_out_dir(out_dir, overwrite, names=names, source=checkpoint_dir)
    convert = {"peft": to_peft, "lit": to_lit, "lora": to_lora}[to]
    with staged_dir(out_dir, overwrite) as staging:
        convert(adapter, checkpoint_dir, staging)
    print(f"{adapter} -> {out_dir}")


def to_peft(path: Path, checkpoint_dir: Path, out_dir: Path) -> None:
    """Write an adapter file of ours as a PEFT folder."""
    from lit_gpt.peft_ether import EtherPeftConfig

    config, adapter = load_config(check_checkpoint_dir(checkpoint_dir)), load_adapter(path, "ether")
    check_base(adapter, checkpoint_dir)
    attach_adapter(meta_model(config), adapter)  # refuses what does not fit
    names = peft_names(config, adapter.config)
    tensors = {names[name]: tensor.flatten(0, -2).contiguous() for name, tensor in adapter.state.items()}
    targets = sorted({name.split(".")[-2] for name in tensors})
    settings = {name: getattr(adapter.config, ours) for name, ours in SETTINGS.items()}
    written = EtherPeftConfig(**settings, target_modules=targets, task_type="CAUSAL_LM", inference_mode=True)
    written.base_model_name_or_path = str(checkpoint_dir)
    written.save_pretrained(out_dir)
    style = {"prompt_style": adapter.prompt_style} if adapter.prompt_style else {}
    save_file(tensors, out_dir / TENSORS, metadata={"format": "pt", **style})


def to_lit(folder: Path, checkpoint_dir: Path, out_dir: Path) -> None:
    """Write a PEFT ETHER folder as an adapter file of ours."""
    peft_config, config = read_peft(folder), load_config(check_checkpoint_dir(checkpoint_dir))
    with reading(folder / TENSORS), safe_open(folder / TENSORS, "pt") as file:
        given, style = (
            {name: file.get_tensor(name) for name in file.keys()},
            (file.metadata() or {}).get("prompt_style"),
        )
    settings = {ours: getattr(peft_config, name) for name, ours in SETTINGS.items()}

    def ether(targets: set[str]) -> EtherConfig:
        return EtherConfig(**settings, **{target: target in targets for target in TARGETS})

    found = {t for t in TARGETS if given.keys() & {*peft_names(config, ether({t}), refuse=False).values()}}
    names = peft_names(config, ether(found or {"query"}))
    if peft_config.n_pattern or given.keys() != {*names.values()}:
        other = sorted(given.keys() ^ {*names.values()})[:2]
        raise UserError(f"{folder}: a file of ours has one n, and q, k, v, ... of all layers or none: {other} differ")
    model = meta_model(config)
    add_ether(model, ether(found))
    shapes = {name: parameter.shape for name, parameter in model.named_parameters()}
    with reading(folder / TENSORS):
        state = {ours: given[theirs].reshape(shapes[ours]) for ours, theirs in names.items()}
    base = {"name": checkpoint_dir.resolve().name, "fingerprint": fingerprint(load_state(checkpoint_dir / WEIGHTS))}
    model, meta = meta_model(config), {"kind": "ether", "config": ether(found), "base": base, "prompt_style": style}
    attach_adapter(model, AdapterFile(path=folder, state=state, **meta))
    save_adapter(out_dir / KINDS["ether"].file_name, model, **meta)


def to_lora(folder: Path, base: Path | str, out_dir: Path) -> None:
    """Write a PEFT ETHER folder as a PEFT LoRA folder, exact in fp32; smaller ranks are filled up with zeros."""
    import peft
    import transformers

    from lit_gpt.peft_ether import EtherLinear

    config = read_peft(folder)
    kind = (config.auto_mapping or {}).get("base_model_class", "AutoModelForCausalLM")
    model = getattr(transformers, kind).from_pretrained(str(base), dtype="auto")
    model = peft.PeftModel.from_pretrained(model, folder).get_base_model()
    layers = {name: layer for name, layer in model.named_modules() if isinstance(layer, EtherLinear)}
    factors = {name: layer.factors("default") for name, layer in layers.items()}
    r, tensors = max(len(a) for a, _ in factors.values()), {}
    for name, (a, b) in factors.items():
        tensors[f"base_model.model.{name}.lora_A.weight"] = F.pad(a, (0, 0, 0, r - len(a)))
        tensors[f"base_model.model.{name}.lora_B.weight"] = F.pad(b, (0, r - len(a)))
    kept = ("target_modules", "exclude_modules", "layers_to_transform", "layers_pattern", "task_type", "auto_mapping")
    lora = peft.LoraConfig(r=r, lora_alpha=r, inference_mode=True, **{name: getattr(config, name) for name in kept})
    lora.base_model_name_or_path = str(base)
    lora.save_pretrained(out_dir)
    save_file(tensors, out_dir / TENSORS, metadata={"format": "pt"})


def read_peft(folder: Path):
    """Return the config of a PEFT ETHER folder; raise UserError where it is none."""
    import peft

    from lit_gpt.peft_ether import EtherPeftConfig

    for name in (CONFIG, TENSORS):
        if not (folder / name).is_file():
            raise UserError(f"{folder} is no PEFT folder: it has no {name}")
    with reading(folder / CONFIG):
        config = peft.PeftConfig.from_pretrained(folder)
    if not isinstance(config, EtherPeftConfig) or config.modules_to_save:
        kind = "modules trained in full" if config.modules_to_save else f"a {config.peft_type}"
        raise UserError(f"{folder} holds {kind}, not an ETHER adapter alone")
    return config


def peft_names(config: Config, ether: EtherConfig, *, refuse: bool = True) -> Mapping[str, str]:
    """Return our names of an adapter's tensors, with PEFT's; raise UserError where none correspond."""
    model, modules, names = meta_model(config), hf_modules(config), {}
    add_ether(model, ether)
    for name, layer in adapter_layers(model):
        reason = layer.full_rank
        if len(layer.parts) > len(modules[name]):
            reason = f"{config.architecture} has one Linear for q, k and v, whose one adapter cannot be our three"
        elif ".experts." in name:
            reason = f"transformers holds the experts of a {config.architecture} as plain parameters, not as Linears"
        if reason and refuse:
            raise UserError(f"{name}: {reason}; scripts/export_lora.py or scripts/merge_ether.py may do")
        for part, module in zip(layer.parts, modules[name], strict=not reason):
            for side in layer.sides if part.adapted else ():
                for own, vector in zip(layer.names(part, side), "uv", strict=False):
                    module = IN_MEMORY.get(module, module)
                    names[f"{name}.{own}"] = f"base_model.model.{module}.ether_{vector}_{side}"
    return names


if __name__ == "__main__":
    main(setup)
