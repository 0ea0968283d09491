"""Read and write Hugging Face's ``config.json`` by the rows of ``families``: plain dicts in, plain dicts out.

``Config`` says which of its fields the file tells, each with its usual key and its default: a ``Usual``. All spellings
are understood: transformers 5 keeps the whole rotary embedding in ``rope_parameters``, for each type of layer where
they differ; older versions keep its scaling alone in ``rope_scaling``, the rest at the top.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

from lit_gpt.errors import UserError
from lit_gpt.families import FAMILIES, REMOTE_CODE, ROUTE, UNSUPPORTED, Family

Usual = dict[str, tuple[str, Any]]
"""Fields of ``Config`` that a ``config.json`` tells: the usual key, our default."""
SIZES = ("vocab_size", "n_embd", "intermediate_size", "n_layer", "n_head", "block_size")
"""Fields that every ``config.json`` tells. Of other whole numbers 0 stands for another field's value, or for none."""
ORIGINAL_LENGTH = "original_max_position_embeddings"
ROPE_SCALING = {
    "default": (),
    "linear": ("factor",),
    "dynamic": ("factor", ORIGINAL_LENGTH),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor", ORIGINAL_LENGTH),
    "yarn": ("factor", ORIGINAL_LENGTH),
    "longrope": ("factor", "short_factor", "long_factor", ORIGINAL_LENGTH),
}
"""Types of ``rope_scaling``, each with the values that it needs."""
GELUS = {"gelu": "none", "gelu_new": "tanh", "gelu_pytorch_tanh": "tanh", "gelu_fast": "tanh"}
"""Names of a GELU, with PyTorch's name of its approximation."""
MULTIMODAL = ("Gemma3ForConditionalGeneration", "Mistral3ForConditionalGeneration")
"""Classes whose text model can be read alone."""
SPECIAL_IDS = ("bos_token_id", "eos_token_id", "pad_token_id")
REFUSED = {
    "qk_layernorm": "norms of q and k",
    "alibi": "models with ALiBi in place of rotary positions (falcon-rw)",
    "use_bidirectional_attention": "models whose attention looks ahead",
    "mlp_only_layers": "models with experts in some layers alone",
}
"""Keys that only a class that has them as a field of its own may set."""
SLIDING, FULL = "sliding_attention", "full_attention"


class Form(NamedTuple):
    """A value in another form than ours: how to read and to write it."""

    read: Callable[[Any], Any]
    write: Callable[[Any], Any]


def _read_layer_types(kinds: list[str]) -> list[bool]:
    if others := set(kinds) - {SLIDING, FULL}:
        raise UserError(f"layers of type {', '.join(sorted(others))} are not supported")
    return [kind == SLIDING for kind in kinds]


FORMS = {
    "query_pre_attn_scalar": Form(lambda scalar: scalar**-0.5, lambda scale: round(scale**-2)),
    "num_ln_in_parallel_attn": Form(lambda count: count == 1, lambda shared: 1 if shared else 2),
    "layer_types": Form(_read_layer_types, lambda flags: [SLIDING if flag else FULL for flag in flags]),
    "no_rope_layers": Form(lambda flags: [bool(flag) for flag in flags], lambda flags: [int(flag) for flag in flags]),
}
"""By the key that has them."""


def text_config(described: dict[str, Any], name: str) -> dict[str, Any]:
    """Return the ``config.json`` of a folder's text model, whose ``architectures`` is a known class alone.

    Args:
        described: the parsed file. A multimodal model keeps that of its text model under ``text_config``.
        name: the model's name, for errors.
    """
    listed = described.get("architectures")
    architecture = listed if isinstance(listed, str) else (listed or [None])[0]
    if architecture in MULTIMODAL:
        text = described.get("text_config") or {}
        classes = {family.model_type: known for known, family in FAMILIES.items()}
        architecture = classes.get(text.get("model_type"), f"{architecture} ({text.get('model_type')})")
        dtype = {key: described[key] for key in ("torch_dtype", "dtype") if key in described}
        whole = ("tie_word_embeddings", *SPECIAL_IDS)  # the whole model's word counts in transformers
        described = {**dtype, **text, **{key: described[key] for key in whole if described.get(key) is not None}}
    if architecture not in FAMILIES:
        reasons = [reason for reason, classes in UNSUPPORTED.items() if str(architecture).startswith(classes)]
        reason = next(iter(reasons), REMOTE_CODE if "auto_map" in described else "")
        because = reason and f": {reason}"
        raise UserError(f"{name}: {architecture} is not supported{because}; supported: {', '.join(FAMILIES)}; {ROUTE}")
    return {**described, "architectures": [architecture]}


def read_config(described: dict[str, Any], name: str, usual: Usual) -> dict[str, Any]:
    """Return the fields of ``Config`` that a ``config.json`` tells; ``name`` is for errors."""
    described = text_config(described, name)
    architecture = described["architectures"][0]
    family = FAMILIES[architecture]
    for key, reason in REFUSED.items():
        if described.get(key) and key not in family.own_keys.values():
            raise UserError(f"{name}: {reason} ({key}) are not supported")
    described = family.prepare(described)
    keys = _keys(family, usual)
    found = {ours: described.get(key, family.defaults.get(ours)) for ours, key in keys.items()}
    absent = ", ".join(key for ours, key in keys.items() if ours in SIZES and found[ours] is None)
    if absent:
        raise UserError(f"{name}: config.json of a {architecture} has no {absent}")
    lists = _layer_lists(described, family, found, keys)
    for ours, key in keys.items():
        if key in FORMS and found[ours] is not None and ours not in lists:
            found[ours] = FORMS[key].read(found[ours])
    found |= lists
    found |= _rotary(described, family, found, name)
    activation = found["gelu_approximate"]
    known = {"silu": "none"} if family.constants.get("mlp_class", "LLaMAMLP").startswith("LLaMA") else GELUS
    if activation not in known:
        choices = ", ".join(known)
        raise UserError(f"{name}: hidden_act '{activation}' of a {architecture} is not supported; supported: {choices}")
    found["gelu_approximate"] = known[activation]
    # null means no window, or that a size follows from the others; our fields say so with None, 0 or False.
    told = {ours: value for ours, value in found.items() if value is not None or usual[ours][1]}
    return {"architecture": architecture, **told, **family.constants}


def write_config(fields: dict[str, Any], usual: Usual) -> dict[str, Any]:
    """Return the ``config.json`` of a ``Config``'s fields, the inverse of ``read_config``; for folders that have none.

    Spelled as transformers 4 did (``rope_theta`` at the top): its later versions, vLLM and llama.cpp read that too.
    """
    family = FAMILIES[fields["architecture"]]
    keys = _keys(family, usual)
    told = {key: fields[ours] for ours, key in keys.items()}
    for key in told.keys() & FORMS.keys():
        told[key] = None if told[key] is None else FORMS[key].write(told[key])
    likely = (family.defaults.get("gelu_approximate"), *GELUS)
    gelu = next(name for name in likely if GELUS.get(name) == fields["gelu_approximate"])
    told[keys["gelu_approximate"]] = "silu" if fields["mlp_class"].startswith("LLaMA") else gelu
    scaling = fields["rope_scaling"] or {}
    if before := {"dynamic": "max_position_embeddings", "longrope": ORIGINAL_LENGTH}.get(scaling.get("rope_type")):
        told[before] = scaling[ORIGINAL_LENGTH]  # the class's own word for the context before scaling
    if not family.windowed:
        told["use_sliding_window"] = fields["sliding_window"] is not None
    told |= {"rope_theta": fields["rope_base"], "vocab_size": fields["padded_vocab_size"]}
    return {"architectures": [fields["architecture"]], "model_type": family.model_type, **family.written, **told}


def _keys(family: Family, usual: Usual) -> dict[str, str]:
    """Return the fields of ``Config`` that a ``config.json`` of this class tells, each with its key there."""
    keys = {ours: key for ours, (key, _) in usual.items()} | family.own_keys
    return {ours: key for ours, key in keys.items() if ours in SIZES or ours in family.defaults}


def _layer_lists(
    described: dict[str, Any], family: Family, found: dict[str, Any], keys: dict[str, str]
) -> dict[str, Any]:
    """Return what differs by layer, where the file does not list it: a rule of the class says which layers do."""
    lists: dict[str, Any] = {}
    layers = range(found["n_layer"])
    for ours, key in (("sliding_layers", "sliding_window_pattern"), ("rope_layers", "no_rope_layer_interval")):
        every = described.get(key) or family.defaults.get(ours)
        if isinstance(every, int) and ours in keys and described.get(keys[ours]) is None:
            lists[ours] = [(i + 1) % every != 0 for i in layers]
    if not described.get("use_sliding_window", family.windowed):  # Qwen; its sliding_window says nothing without
        return {**lists, "sliding_window": None, "sliding_layers": None}
    if described.get("layer_types") is None and "rope_layers" in keys:  # SmolLM 3: the others see everything
        lists["sliding_layers"] = [not rotates for rotates in lists.get("rope_layers") or found["rope_layers"]]
    elif described.get("layer_types") is None and family.max_window_layers:
        first = described.get("max_window_layers", family.max_window_layers)
        lists["sliding_layers"] = [i >= first for i in layers]
    return lists


def _rotary(described: dict[str, Any], family: Family, found: dict[str, Any], name: str) -> dict[str, Any]:
    """Return the fields of the rotary embedding, and the context where scaling makes it longer."""
    rope = dict(described.get("rope_parameters") or described.get("rope_scaling") or {})
    local = rope.pop(SLIDING, None)
    rope = dict(rope.pop(FULL, None) or rope or local or {})
    rotary = {"local_rope_base": found.get("local_rope_base")}
    for key, ours in (("rope_theta", "rope_base"), ("partial_rotary_factor", "rotary_percentage")):
        rotary[ours] = rope.pop(key, found[ours])
    older = rope.pop("type", "default")
    kind = rope.setdefault("rope_type", older)
    if kind == "su" or (kind == "yarn" and "short_factor" in rope):  # words of the first Phi-3
        kind = rope["rope_type"] = "longrope"
    if ORIGINAL_LENGTH in ROPE_SCALING.get(kind, ()):
        original = described.get(ORIGINAL_LENGTH) or rope.get(ORIGINAL_LENGTH) or found["block_size"]
        factor = rope.get("factor") or found["block_size"] / original
        rope |= {ORIGINAL_LENGTH: original, "factor": factor}
        if kind in ("dynamic", "yarn"):  # their max_position_embeddings may be of the time before scaling
            rotary["block_size"] = max(found["block_size"], int(float(factor) * original))
    rotary["rope_scaling"] = rope if kind != "default" else None
    # Vicuna's 16k models name the context before scaling first.
    rotary.setdefault("block_size", max(found["block_size"], described.get("max_sequence_length") or 0))
    apart = local and local != (described.get("rope_parameters") or described["rope_scaling"]).get(FULL)
    if apart or "local_rope_base" in family.defaults:
        if (local or {}).get("rope_type", "default") != "default":
            raise UserError(f"{name}: scaled rotary embeddings in layers with a window are not supported")
        rotary["local_rope_base"] = (local or {}).get("rope_theta") or rotary["local_rope_base"] or rotary["rope_base"]
    return rotary
