"""Hugging Face's names and layouts of each architecture, and the way there and back.

One table serves both converters and the LoRA export: our module's name, and the Hugging Face module (or the three
for q, k and v) that holds the same weights. Tensors move under ``.weight`` and ``.bias`` alike. Only the attention
differs in layout: ours is one matrix, interleaved by KV group (its q heads, then k, then v). GPT-NeoX stores its own
fused matrix as (q, k, v) of head after head, which for as many groups as heads is that very layout.

Everything here is a pure function of tensors and dicts; what is not listed is refused, never skipped.
"""

import re
from collections.abc import Callable
from typing import Any

import torch

from lit_gpt.config import UNQUANTIZED, Config
from lit_gpt.errors import UserError
from lit_gpt.model import GPT, deinterleave_qkv, interleave_qkv

State = dict[str, torch.Tensor]

HEAD, EMBEDDING = "lm_head.weight", "transformer.wte.weight"

_LLAMA_ATTENTION = {
    "lm_head": "lm_head",
    "transformer.wte": "model.embed_tokens",
    "transformer.ln_f": "model.norm",
    "transformer.h.{i}.norm_1": "model.layers.{i}.input_layernorm",
    "transformer.h.{i}.norm_2": "model.layers.{i}.post_attention_layernorm",
    "transformer.h.{i}.attn.attn": tuple(f"model.layers.{{i}}.self_attn.{part}_proj" for part in "qkv"),
    "transformer.h.{i}.attn.proj": "model.layers.{i}.self_attn.o_proj",
}
_LLAMA = {
    **_LLAMA_ATTENTION,
    "transformer.h.{i}.mlp.fc_1": "model.layers.{i}.mlp.gate_proj",
    "transformer.h.{i}.mlp.fc_2": "model.layers.{i}.mlp.up_proj",
    "transformer.h.{i}.mlp.proj": "model.layers.{i}.mlp.down_proj",
}
# On disk each expert is on its own, also where transformers holds them stacked in memory.
_MIXTRAL = {
    **_LLAMA_ATTENTION,
    "transformer.h.{i}.mlp.gate": "model.layers.{i}.block_sparse_moe.gate",
    "transformer.h.{i}.mlp.experts.{e}.fc_1": "model.layers.{i}.block_sparse_moe.experts.{e}.w1",
    "transformer.h.{i}.mlp.experts.{e}.fc_2": "model.layers.{i}.block_sparse_moe.experts.{e}.w3",
    "transformer.h.{i}.mlp.experts.{e}.proj": "model.layers.{i}.block_sparse_moe.experts.{e}.w2",
}
_GPT_NEOX = {
    "lm_head": "embed_out",
    "transformer.wte": "gpt_neox.embed_in",
    "transformer.ln_f": "gpt_neox.final_layer_norm",
    "transformer.h.{i}.norm_1": "gpt_neox.layers.{i}.input_layernorm",
    "transformer.h.{i}.norm_2": "gpt_neox.layers.{i}.post_attention_layernorm",
    "transformer.h.{i}.attn.attn": "gpt_neox.layers.{i}.attention.query_key_value",
    "transformer.h.{i}.attn.proj": "gpt_neox.layers.{i}.attention.dense",
    "transformer.h.{i}.mlp.fc": "gpt_neox.layers.{i}.mlp.dense_h_to_4h",
    "transformer.h.{i}.mlp.proj": "gpt_neox.layers.{i}.mlp.dense_4h_to_h",
}
_PHI = {
    "lm_head": "lm_head",
    "transformer.wte": "model.embed_tokens",
    "transformer.ln_f": "model.final_layernorm",
    "transformer.h.{i}.norm_1": "model.layers.{i}.input_layernorm",
    "transformer.h.{i}.attn.attn": tuple(f"model.layers.{{i}}.self_attn.{part}_proj" for part in "qkv"),
    "transformer.h.{i}.attn.proj": "model.layers.{i}.self_attn.dense",
    "transformer.h.{i}.mlp.fc": "model.layers.{i}.mlp.fc1",
    "transformer.h.{i}.mlp.proj": "model.layers.{i}.mlp.fc2",
}
LAYOUTS: dict[str, dict[str, str | tuple[str, ...]]] = {
    "LlamaForCausalLM": _LLAMA,
    "MistralForCausalLM": _LLAMA,
    "MixtralForCausalLM": _MIXTRAL,
    "GPTNeoXForCausalLM": _GPT_NEOX,
    "PhiForCausalLM": _PHI,
}

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
    """Our module names to Hugging Face's: one name each, or three (q, k, v) for an attention kept apart.

    Raises:
        ValueError: the model is one of the original code's that no class known here can hold.
    """
    if config.architecture not in LAYOUTS:
        raise UserError(
            f"{config.name or 'the model'} ({config.norm_class}, {config.mlp_class}) has no Hugging Face class that is "
            f"known here ({', '.join(LAYOUTS)}): it can be finetuned, merged and talked to, but not exported"
        )
    modules = {}
    for ours, theirs in LAYOUTS[config.architecture].items():
        theirs = (theirs,) if isinstance(theirs, str) else theirs
        for i in range(config.n_layer if "{i}" in ours else 1):
            for e in range(config.n_expert if "{e}" in ours else 1):
                modules[ours.format(i=i, e=e)] = tuple(name.format(i=i, e=e) for name in theirs)
    return modules


def hf_names(key: str, modules: dict[str, tuple[str, ...]]) -> list[str]:
    """The Hugging Face keys whose tensors make up our ``key``."""
    module, _, kind = key.rpartition(".")
    return [f"{name}.{kind}" for name in modules[module]]


def parameter_shapes(config: Config) -> dict[str, torch.Size]:
    """Every key of a ``lit_model.pth`` of this config, with its shape."""
    with torch.device("meta"):
        return {key: tensor.shape for key, tensor in GPT(config).state_dict().items()}


def hf_to_lit(weights: State, config: Config) -> State:
    """Rename and lay out Hugging Face's weights as ours. Tensors that need no new layout are passed on as they are.

    Args:
        weights: every tensor of the Hugging Face checkpoint.
        config: the model they belong to. Where it ties the embeddings, either name will do for both.

    Returns:
        the state dict of ``lit_model.pth``; tied embeddings are one tensor under both keys.

    Raises:
        ValueError: keys missing, keys that no one expects, or a shape that contradicts the config.
    """
    modules, left, missing, lit = hf_modules(config), dict(weights), {}, {}
    for key, shape in parameter_shapes(config).items():
        names = hf_names(key, modules)
        absent = [name for name in names if name not in left]
        if absent:
            missing[key] = absent
            continue
        lit[key] = _join([left.pop(name) for name in names], config, name=names[0])
        _check_shape(names[0], lit[key], shape)
    shared = lit.get(EMBEDDING, lit.get(HEAD))
    if config.tie_embeddings and shared is not None:
        lit[HEAD] = lit[EMBEDDING] = shared
        missing = {key: names for key, names in missing.items() if key not in (HEAD, EMBEDDING)}
    unknown = [key for key in left if not _BUFFERS.search(key)]
    _refuse(f"a {config.architecture}", missing=[name for names in missing.values() for name in names], unknown=unknown)
    return lit


def lit_tensor(key: str, read: Callable[[str], torch.Tensor], config: Config) -> torch.Tensor:
    """One tensor of ``hf_to_lit``'s result, from a function that reads a Hugging Face tensor by its name.

    Where the embeddings are tied, HEAD and EMBEDDING are both the embedding.
    """
    names = hf_names(EMBEDDING if key == HEAD and config.tie_embeddings else key, hf_modules(config))
    return _join([read(name) for name in names], config, name=names[0])


def lit_to_hf(weights: State, config: Config) -> State:
    """Rename and lay out our weights as Hugging Face's; the inverse of ``hf_to_lit``, bit for bit.

    Args:
        weights: the state dict of a ``lit_model.pth``.
        config: the model they belong to. Where it ties the embeddings, only the embedding is written.

    Returns:
        tensors that share no memory with one another.

    Raises:
        ValueError: keys missing, or keys that no one expects (an adapter that is not merged).
    """
    shapes, modules, hf = parameter_shapes(config), hf_modules(config), {}
    missing, unknown = [k for k in shapes if k not in weights], [k for k in weights if k not in shapes]
    _refuse("this lit_config.json", missing=missing, unknown=unknown)
    for key in shapes:
        _check_shape(key, weights[key], shapes[key])
        if key == HEAD and config.tie_embeddings:
            continue
        names = hf_names(key, modules)
        if len(names) == 1:
            hf[names[0]] = weights[key]
        else:
            for name, part in zip(names, split_qkv(weights[key], config), strict=True):
                hf[name] = part.clone()
    return hf


def split_qkv(tensor: torch.Tensor, config: Config) -> tuple[torch.Tensor, ...]:
    """The interleaved rows of a file's attention weight or bias as q, k and v."""
    return deinterleave_qkv(tensor, config).split([config.q_size, config.kv_size, config.kv_size])


def _check_shape(name: str, tensor: torch.Tensor, shape: torch.Size) -> None:
    if tensor.shape != shape:
        raise UserError(f"{name} has shape {tuple(tensor.shape)}; the model's config asks for {tuple(shape)}")


def _join(parts: list[torch.Tensor], config: Config, *, name: str) -> torch.Tensor:
    """The one tensor, or q, k and v as ours."""
    return parts[0] if len(parts) == 1 else interleave_qkv(_stack(parts, config, name=name), config)


def _stack(parts: list[torch.Tensor], config: Config, *, name: str) -> torch.Tensor:
    """q, k and v under one another, their heights checked: three wrong heights can have the right sum."""
    rows, wanted = [len(part) for part in parts], [config.q_size, config.kv_size, config.kv_size]
    if rows != wanted:
        raise UserError(f"{name} and its k and v have {rows} rows; config.json asks for {wanted}")
    return torch.cat(parts)


def _refuse(who: str, *, missing: list[str], unknown: list[str]) -> None:
    """Raise where keys are missing or left over, naming the first few."""
    problems = [
        f"{len(keys)} {what} ({', '.join(keys[:4])}{', ...' if len(keys) > 4 else ''})"
        for what, keys in (("missing", missing), ("not known", unknown))
        if keys
    ]
    if problems:
        raise UserError(f"the weights are not those of {who}: {'; '.join(problems)}")


def hf_config(config: Config) -> dict[str, Any]:
    """A ``config.json`` for transformers, the inverse of ``Config.from_hf``; for folders that have none.

    Spelled as transformers 4 did (``rope_theta`` at the top), which its later versions, vLLM and llama.cpp read too.
    """
    kinds = {
        "LlamaForCausalLM": ("llama", {"attention_bias": config.qkv_bias, "mlp_bias": config.mlp_bias}),
        "MistralForCausalLM": ("mistral", {"sliding_window": config.sliding_window}),
        "MixtralForCausalLM": (
            "mixtral",
            {
                "sliding_window": config.sliding_window,
                "num_local_experts": config.n_expert,
                "num_experts_per_tok": config.n_expert_per_token,
            },
        ),
        "GPTNeoXForCausalLM": (
            "gpt_neox",
            {
                "use_parallel_residual": config.parallel_residual,
                "attention_bias": config.qkv_bias,
                "rotary_pct": config.rotary_percentage,
                "rotary_emb_base": config.rope_base,
            },
        ),
        "PhiForCausalLM": ("phi", {"partial_rotary_factor": config.rotary_percentage}),
    }
    model_type, own = kinds[config.architecture]
    if config.norm_class == "RMSNorm":
        own |= {"rms_norm_eps": config.norm_eps, "hidden_act": "silu", "head_dim": config.head_size}
    else:
        activation = {"none": "gelu", "tanh": "gelu_new"}[config.gelu_approximate]
        own |= {"layer_norm_eps": config.norm_eps, "hidden_act": activation}
    return {
        "architectures": [config.architecture],
        "model_type": model_type,
        "vocab_size": config.padded_vocab_size,
        "hidden_size": config.n_embd,
        "intermediate_size": config.intermediate_size,
        "num_hidden_layers": config.n_layer,
        "num_attention_heads": config.n_head,
        "num_key_value_heads": config.n_query_groups,
        "max_position_embeddings": config.block_size,
        "rope_theta": config.rope_base,
        "rope_scaling": config.rope_scaling,
        "tie_word_embeddings": config.tie_embeddings,
        **own,
    }
