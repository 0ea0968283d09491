"""Read Hugging Face's ``config.json`` by the rows of ``families``: plain dicts in, plain dicts out.

``Config`` says which of its fields the file tells, each with its usual key and its default: a ``Usual``. All spellings
are understood: transformers 5 keeps the whole rotary embedding in ``rope_parameters``, for each type of layer where
they differ; older versions keep its scaling alone in ``rope_scaling``, the rest at the top.
"""

from typing import Any

from lit_gpt.errors import UserError
from lit_gpt.families import FAMILIES, Family

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
ROUTE = "finetune others in transformers, with PEFT's LoRA, or with ETHER by finetune/ether_hf.py"
"""The way that works for classes that are not known here, as the end of an error."""
REFUSED = {
    "qk_layernorm": "norms of q and k",
    "alibi": "models with ALiBi in place of rotary positions (falcon-rw)",
    "use_bidirectional_attention": "models whose attention looks ahead",
    "mlp_only_layers": "models with experts in some layers alone",
}
"""Keys that only a class that has them as a field of its own may set."""
SLIDING, FULL = "sliding_attention", "full_attention"
FORMS = {"query_pre_attn_scalar": lambda scalar: scalar**-0.5, "num_ln_in_parallel_attn": lambda count: count == 1}
"""Functions that read a value in another form than ours, by the key that has it."""


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
        raise UserError(f"{name}: {architecture} is not supported; supported: {', '.join(FAMILIES)}; {ROUTE}")
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
    keys = {ours: key for ours, (key, _) in usual.items()} | family.own_keys
    keys = {ours: key for ours, key in keys.items() if ours in SIZES or ours in family.defaults}
    found = {ours: described.get(key, family.defaults.get(ours)) for ours, key in keys.items()}
    if absent := ", ".join(keys[ours] for ours in SIZES if found[ours] is None):
        raise UserError(f"{name}: config.json of a {architecture} has no {absent}")
    for ours, key in keys.items():
        if key in FORMS and found[ours] is not None:
            found[ours] = FORMS[key](found[ours])
    found |= _layer_lists(described, family, found["n_layer"])
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


def _layer_lists(described: dict[str, Any], family: Family, n_layer: int) -> dict[str, Any]:
    """Return the fields that differ by layer: as the file lists them, else by the rule of its class."""
    layers, usual, windows = range(n_layer), family.defaults, None
    rotates, types = described.get("no_rope_layers"), described.get("layer_types")
    if "rope_layers" in usual:  # SmolLM 3, whose layers that rotate have no window
        every = described.get("no_rope_layer_interval") or usual["rope_layers"]
        rotates = rotates or [(i + 1) % every != 0 for i in layers]
        windows = [not rotated for rotated in rotates]
    elif family.windows_from:
        first = described.get("max_window_layers", family.windows_from)
        windows = [i >= first for i in layers]
    elif every := described.get("sliding_window_pattern") or usual.get("sliding_layers"):
        windows = [(i + 1) % every != 0 for i in layers]
    lists = {"rope_layers": rotates, "sliding_layers": windows}
    if not described.get("use_sliding_window", family.windows_from is None):
        # Qwen's files name a window also where there is none
        lists |= {"sliding_window": None, "sliding_layers": None}
    elif types is not None:
        if others := {*types} - {SLIDING, FULL}:
            raise UserError(f"layers of type {', '.join(sorted(others))} are not supported")
        lists["sliding_layers"] = [kind == SLIDING for kind in types]
    return {ours: values for ours, values in lists.items() if ours in usual}


def _rotary(described: dict[str, Any], family: Family, found: dict[str, Any], name: str) -> dict[str, Any]:
    """Return the fields of the rotary embedding, and the context where scaling makes it longer."""
    told = described.get("rope_parameters") or described.get("rope_scaling") or {}
    whole, local = told.get(FULL), told.get(SLIDING)
    rope = dict(whole or local or told)
    base = rope.pop("rope_theta", found["rope_base"])
    share = rope.pop("partial_rotary_factor", found["rotary_percentage"])
    older = rope.pop("type", "default")
    kind = rope.setdefault("rope_type", older)
    if kind == "su" or (kind == "yarn" and "short_factor" in rope):  # words of the first Phi-3
        kind = rope["rope_type"] = "longrope"
    # Vicuna's 16k models name the context before scaling first.
    length = max(found["block_size"], described.get("max_sequence_length") or 0)
    if ORIGINAL_LENGTH in ROPE_SCALING.get(kind, ()):
        original = described.get(ORIGINAL_LENGTH) or rope.get(ORIGINAL_LENGTH) or found["block_size"]
        factor = rope.get("factor") or found["block_size"] / original
        rope |= {ORIGINAL_LENGTH: original, "factor": factor}
        if kind in ("dynamic", "yarn"):  # their max_position_embeddings may be of the time before scaling
            length = max(length, int(float(factor) * original))
    local_base = None
    if (local and local != whole) or "local_rope_base" in family.defaults:
        if local and local.get("rope_type", "default") != "default":
            raise UserError(f"{name}: scaled rotary embeddings in layers with a window are not supported")
        local_base = (local or {}).get("rope_theta") or found.get("local_rope_base") or base
    scaling = rope if kind != "default" else None
    rotary = {"rope_base": base, "rotary_percentage": share, "rope_scaling": scaling, "local_rope_base": local_base}
    return {**rotary, "block_size": length}
