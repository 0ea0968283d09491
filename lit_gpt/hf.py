"""Convert weights between Hugging Face's names and layouts and ours, in both directions, bit for bit.

``families`` says which module of ours is which of theirs. Tensors move under ``.weight`` and ``.bias`` alike. Only the
attention differs in layout: ours is one matrix, interleaved by KV group (its q heads, then k, then v). Every tensor is
used or named in an error, never skipped. Nothing here knows a format of file: tensors come from a dict or a function.
"""

import re
from collections.abc import Callable, Collection
from itertools import product
from pathlib import Path

import torch

from lit_gpt.checkpoint import stream_state
from lit_gpt.config import UNQUANTIZED, Config
from lit_gpt.errors import UserError
from lit_gpt.families import FAMILIES
from lit_gpt.model import GPT, deinterleave_qkv, interleave_qkv

State = dict[str, torch.Tensor]

HEAD, EMBEDDING = "lm_head.weight", "transformer.wte.weight"

# Buffers that older transformers wrote beside the weights: constants the model computes for itself.
_BUFFERS = re.compile(r"\.(rotary_emb\.inv_freq|attention\.(masked_)?bias)$")

# Parts of names that tell how weights are quantized.
_QUANTIZED = {
    "qweight": "GPTQ or AWQ", "quant_state": "bitsandbytes", "SCB": "bitsandbytes", "absmax": "bitsandbytes",
    "_blocks": "MXFP4", "weight_packed": "compressed-tensors",
}  # fmt: skip
# Weights are the first four; the others are buffers.
_PLAIN = (torch.float32, torch.float16, torch.bfloat16, torch.float64, torch.int64, torch.bool)


def check_unquantized_weights(weights: State) -> None:
    """Raise where the tensors of a Hugging Face checkpoint are quantized, whatever its config.json says."""
    for key, tensor in weights.items():
        if tensor.dtype not in _PLAIN and not _BUFFERS.search(key):
            known = (kind for part, kind in _QUANTIZED.items() if any(part in key for key in weights))
            kind = next(known, str(tensor.dtype).removeprefix("torch."))
            raise UserError(f"{key} is {tensor.dtype}: the weights are quantized ({kind}); {UNQUANTIZED}")


def hf_modules(config: Config) -> dict[str, tuple[str, ...]]:
    """Return our module names with Hugging Face's: one each, or three (q, k, v) for an attention kept apart.

    Raises:
        ValueError: the model is one of the original code's that no class known here can hold.
    """
    if config.architecture not in FAMILIES:
        raise UserError(
            f"{config.name or 'the model'} ({config.norm_class}, {config.mlp_class}) has no Hugging Face class that is "
            f"known here ({', '.join(FAMILIES)}): it can be finetuned, merged and talked to, but not exported"
        )
    family, modules = FAMILIES[config.architecture], {}
    two_norms = {} if config.shared_attention_norm else family.two_norms
    for ours, theirs in (family.modules | two_norms).items():
        names = (theirs,) if isinstance(theirs, str) else theirs
        layers, experts = config.n_layer if "{i}" in ours else 1, config.n_expert if "{e}" in ours else 1
        for i, e in product(range(layers), range(experts)):
            modules[ours.format(i=i, e=e)] = tuple(name.format(i=i, e=e, h="{h}") for name in names)
    return modules


def parameter_shapes(config: Config) -> dict[str, torch.Size]:
    """Return every key of a ``lit_model.pth`` of this config, with its shape."""
    with torch.device("meta"):
        return {key: tensor.shape for key, tensor in GPT(config).state_dict().items()}


def hf_names(config: Config) -> dict[str, tuple[str, ...]]:
    """Return every key of a ``lit_model.pth`` of this config, with the keys of Hugging Face's tensors that it is of."""
    modules, names = hf_modules(config), {}
    for key in parameter_shapes(config):
        module, _, kind = key.rpartition(".")
        names[key] = tuple(f"{theirs}.{kind}" for theirs in modules[module])
    return names


def write_lit(blanks: State, read: Callable[[str], torch.Tensor], config: Config, path: Path) -> State:
    """Write Hugging Face's weights as a ``lit_model.pth``, holding the sources of one of its tensors at a time.

    Args:
        blanks: every tensor of the Hugging Face checkpoint, on the meta device, with the dtype to store it in.
        read: gives the tensor of a name.
        config: the model they belong to. Where it ties the embeddings, either name will do for both.
        path: the file.

    Returns:
        what the file holds, on the meta device; tied embeddings are one tensor under both keys.

    Raises:
        ValueError: keys missing, keys that no one expects, or a shape that contradicts the config.
    """
    sources = hf_names(config)
    known = {name for names in sources.values() for name in names}
    if config.tie_embeddings:
        either = [sources[EMBEDDING], sources.pop(HEAD)]
        sources[EMBEDDING] = sources[HEAD] = next((names for names in either if names[0] in blanks), either[0])
    needed = [name for names in sources.values() for name in names]
    given = [name for name in blanks if not _BUFFERS.search(name)]
    _check_keys(f"a {config.architecture}", given, needed=needed, known=known)
    template = {key: _join(names, blanks.__getitem__, config) for key, names in sources.items()}
    for key, shape in parameter_shapes(config).items():
        _check_shape(sources[key][0], template[key], shape)
    stream_state(template, lambda key: _join(sources[key], read, config).to(template[key].dtype), path)
    return template


def lit_to_hf(weights: State, config: Config) -> State:
    """Return our weights under Hugging Face's names and in its layout; the inverse of ``write_lit``, bit for bit.

    Args:
        weights: the state dict of a ``lit_model.pth``.
        config: the model they belong to. Where it ties the embeddings, only the embedding is written.

    Returns:
        tensors that share no memory with one another.

    Raises:
        ValueError: keys missing, or keys that no one expects (an adapter that is not merged).
    """
    shapes, names, hf = parameter_shapes(config), hf_names(config), {}
    _check_keys("this lit_config.json", weights, needed=shapes, known=shapes)
    for key, shape in shapes.items():
        _check_shape(key, weights[key], shape)
        if len(names[key]) > 1:
            parts = [part.clone() for part in split_qkv(weights[key], config)]
            hf.update(zip(names[key], parts, strict=True))
        elif key != HEAD or not config.tie_embeddings:
            hf[names[key][0]] = weights[key]
    return hf


def split_qkv(tensor: torch.Tensor, config: Config) -> tuple[torch.Tensor, ...]:
    """Return the q, k and v of the interleaved rows of a file's attention weight or bias."""
    return deinterleave_qkv(tensor, config).split(config.qkv_sizes)


def _join(names: tuple[str, ...], read: Callable[[str], torch.Tensor], config: Config) -> torch.Tensor:
    """Read one tensor as it is, or q, k and v as ours; their heights are checked: three wrong ones may sum up right."""
    parts = [read(name) for name in names]
    if len(parts) == 1:
        return parts[0]
    rows = [len(part) for part in parts]
    if rows != [*config.qkv_sizes]:
        raise UserError(f"{names[0]} and its k and v have {rows} rows; config.json asks for {[*config.qkv_sizes]}")
    return interleave_qkv(torch.cat(parts), config)


def _check_shape(name: str, tensor: torch.Tensor, shape: torch.Size) -> None:
    if tensor.shape != shape:
        raise UserError(f"{name} has shape {tuple(tensor.shape)}; the model's config asks for {tuple(shape)}")


def _check_keys(who: str, given: Collection[str], *, needed: Collection[str], known: Collection[str]) -> None:
    """Raise where keys are missing or left over, naming the first few."""
    problems = []
    for what, keys, there in (("missing", needed, given), ("not known", given, known)):
        found = [key for key in dict.fromkeys(keys) if key not in there]
        if found:
            problems.append(f"{len(found)} {what} ({', '.join(found[:4])}{', ...' if len(found) > 4 else ''})")
    if problems:
        raise UserError(f"the weights are not those of {who}: {'; '.join(problems)}")
