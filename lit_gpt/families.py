"""Describe the Hugging Face classes that are known here: what their ``config.json`` says, how their weights are named.

Data alone. ``config`` reads and writes ``config.json`` by these rows, ``hf`` converts weights by them in both
directions, and the LoRA export names its modules by them. A class that computes what another does is some rows more.

The defaults are those of the classes in transformers: a ``config.json`` leaves out what equals them.
"""

from dataclasses import dataclass, field
from typing import Any

REQUIRED = object()
"""Stands for a default where there is none: a ``config.json`` without this key is refused."""


@dataclass(frozen=True)
class Family:
    """A Hugging Face class.

    Attributes:
        model_type: its name in ``config.json``.
        fields: fields of our ``Config``, each with its key in ``config.json`` and the key's default.
        modules: our modules, each with the Hugging Face module that holds the same weights, or the three for q, k and
            v. ``{i}`` stands for a layer, ``{e}`` for an expert.
        constants: fields of ``Config`` that are the same for all models of the class.
    """

    model_type: str
    fields: dict[str, tuple[str, Any]]
    modules: dict[str, str | tuple[str, ...]]
    constants: dict[str, Any] = field(default_factory=dict)


_SIZES = {
    "vocab_size": ("vocab_size", REQUIRED),
    "n_embd": ("hidden_size", REQUIRED),
    "intermediate_size": ("intermediate_size", REQUIRED),
    "n_layer": ("num_hidden_layers", REQUIRED),
    "n_head": ("num_attention_heads", REQUIRED),
    "n_query_groups": ("num_key_value_heads", None),
    "block_size": ("max_position_embeddings", REQUIRED),
    "rope_base": ("rope_theta", 10000.0),
    "rope_scaling": ("rope_scaling", None),
    "tie_embeddings": ("tie_word_embeddings", False),
}
_RMS_NORM = {
    "norm_eps": ("rms_norm_eps", 1e-6),
    "gelu_approximate": ("hidden_act", "silu"),
    "head_size": ("head_dim", None),
}
_LAYER_NORM = {"norm_eps": ("layer_norm_eps", 1e-5), "gelu_approximate": ("hidden_act", "gelu")}
_GELU_MLP = {"norm_class": "LayerNorm", "mlp_class": "GptNeoxMLP", "mlp_bias": True}

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

FAMILIES = {
    "LlamaForCausalLM": Family(
        model_type="llama",
        fields={
            **_SIZES,
            **dict.fromkeys(("qkv_bias", "proj_bias"), ("attention_bias", False)),
            "mlp_bias": ("mlp_bias", False),
            **_RMS_NORM,
        },
        modules=_LLAMA,
    ),
    "MistralForCausalLM": Family(
        model_type="mistral",
        fields={
            **_SIZES,
            "n_query_groups": ("num_key_value_heads", 8),
            "sliding_window": ("sliding_window", 4096),
            **_RMS_NORM,
        },
        modules=_LLAMA,
    ),
    "MixtralForCausalLM": Family(
        model_type="mixtral",
        fields={
            **_SIZES,
            "n_query_groups": ("num_key_value_heads", 8),
            "rope_base": ("rope_theta", 1e6),
            "sliding_window": ("sliding_window", None),
            "n_expert": ("num_local_experts", 8),
            "n_expert_per_token": ("num_experts_per_tok", 2),
            **_RMS_NORM,
            "norm_eps": ("rms_norm_eps", 1e-5),
        },
        # In files each expert is on its own, also where transformers holds them stacked in memory.
        modules={
            **_LLAMA_ATTENTION,
            "transformer.h.{i}.mlp.gate": "model.layers.{i}.block_sparse_moe.gate",
            "transformer.h.{i}.mlp.experts.{e}.fc_1": "model.layers.{i}.block_sparse_moe.experts.{e}.w1",
            "transformer.h.{i}.mlp.experts.{e}.fc_2": "model.layers.{i}.block_sparse_moe.experts.{e}.w3",
            "transformer.h.{i}.mlp.experts.{e}.proj": "model.layers.{i}.block_sparse_moe.experts.{e}.w2",
        },
        constants={"mlp_class": "LLaMAMoE"},
    ),
    "GPTNeoXForCausalLM": Family(
        model_type="gpt_neox",
        fields={
            **_SIZES,
            "parallel_residual": ("use_parallel_residual", True),
            **dict.fromkeys(("qkv_bias", "proj_bias"), ("attention_bias", True)),
            "rotary_percentage": ("rotary_pct", 0.25),
            "rope_base": ("rotary_emb_base", 10000.0),
            **_LAYER_NORM,
        },
        modules={
            "lm_head": "embed_out",
            "transformer.wte": "gpt_neox.embed_in",
            "transformer.ln_f": "gpt_neox.final_layer_norm",
            "transformer.h.{i}.norm_1": "gpt_neox.layers.{i}.input_layernorm",
            "transformer.h.{i}.norm_2": "gpt_neox.layers.{i}.post_attention_layernorm",
            # (q, k, v) of head after head, which is our files' own order for as many groups as heads.
            "transformer.h.{i}.attn.attn": "gpt_neox.layers.{i}.attention.query_key_value",
            "transformer.h.{i}.attn.proj": "gpt_neox.layers.{i}.attention.dense",
            "transformer.h.{i}.mlp.fc": "gpt_neox.layers.{i}.mlp.dense_h_to_4h",
            "transformer.h.{i}.mlp.proj": "gpt_neox.layers.{i}.mlp.dense_4h_to_h",
        },
        constants=_GELU_MLP,
    ),
    "PhiForCausalLM": Family(
        model_type="phi",
        fields={
            **_SIZES,
            "rotary_percentage": ("partial_rotary_factor", 0.5),
            **_LAYER_NORM,
            "gelu_approximate": ("hidden_act", "gelu_new"),
        },
        modules={
            "lm_head": "lm_head",
            "transformer.wte": "model.embed_tokens",
            "transformer.ln_f": "model.final_layernorm",
            "transformer.h.{i}.norm_1": "model.layers.{i}.input_layernorm",
            "transformer.h.{i}.attn.attn": _LLAMA_ATTENTION["transformer.h.{i}.attn.attn"],
            "transformer.h.{i}.attn.proj": "model.layers.{i}.self_attn.dense",
            "transformer.h.{i}.mlp.fc": "model.layers.{i}.mlp.fc1",
            "transformer.h.{i}.mlp.proj": "model.layers.{i}.mlp.fc2",
        },
        constants={
            **_GELU_MLP,
            **dict.fromkeys(("parallel_residual", "shared_attention_norm"), True),
            **dict.fromkeys(("qkv_bias", "proj_bias", "lm_head_bias"), True),
        },
    ),
}
"""Each class by its name under ``architectures`` in ``config.json``."""
