"""Describe the Hugging Face classes that are known here: what their ``config.json`` says, how their weights are named.

Data, but for Falcon's two forms. ``hf_config`` reads ``config.json`` by these rows, ``hf`` converts weights by
them in both directions, and the LoRA export names its modules by them. A class that computes what another does is some
rows more, and a case in tests/hf_models.py, which holds it against transformers.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from lit_gpt.errors import UserError


def _top(head: str, embedding: str, norm: str) -> dict[str, str]:
    """Return the modules around the layers."""
    return {"lm_head": head, "transformer.wte": embedding, "transformer.ln_f": norm}


_TOP = _top("lm_head", "model.embed_tokens", "model.norm")


@dataclass(frozen=True)
class Family:
    """A Hugging Face class.

    Attributes:
        model_type: its name in ``config.json``.
        block: modules of a layer, each with the Hugging Face module that holds the same weights, or the three for q, k
            and v. ``{e}`` stands for an expert, ``{h}`` for a head.
        defaults: the fields that a ``config.json`` of it may tell, and what they are where it leaves them out (the
            defaults of the class in transformers).
        constants: fields that are the same for all its models.
        own_keys: fields that it calls otherwise than ``Config`` says.
        layers: the Hugging Face module with the list of layers.
        top: the modules around the layers.
        two_norms: modules of a parallel block whose MLP has a norm of its own, where they have other names.
        windows_from: first layer with a window where the file says ``use_sliding_window``, and neither
            ``max_window_layers`` nor each layer's kind. None: the class does not ask for that word.
        prepare: brings an own form of ``config.json`` into the usual one.
    """

    model_type: str
    block: dict[str, str | tuple[str, ...]]
    defaults: dict[str, Any]
    constants: dict[str, Any] = field(default_factory=dict)
    own_keys: dict[str, str] = field(default_factory=dict)
    layers: str = "model.layers"
    top: dict[str, str] = field(default_factory=lambda: _TOP)
    two_norms: dict[str, str] = field(default_factory=dict)
    windows_from: int | None = None
    prepare: Callable[[dict[str, Any]], dict[str, Any]] = dict


_ANY = dict(n_query_groups=None, rope_base=10000.0, rope_scaling=None, tie_embeddings=False, rotary_percentage=1.0)
_RMS_NORM = dict(_ANY, norm_eps=1e-6, gelu_approximate="silu", head_size=None)
_LAYER_NORM = dict(_ANY, norm_eps=1e-5, gelu_approximate="gelu")
_GELU_MLP = dict(norm_class="LayerNorm", mlp_class="GptNeoxMLP")
_BIASES = dict(qkv_bias=True, proj_bias=True)
_NO_BIASES = dict(qkv_bias=False, proj_bias=False)
_BIAS_FIELDS = ("qkv_bias", "proj_bias", "mlp_bias")

_NORMS = {"norm_1": "input_layernorm", "norm_2": "post_attention_layernorm"}
_POST_NORMS = {"post_attention_norm": "post_attention_layernorm", "post_mlp_norm": "post_feedforward_layernorm"}
_QK_NORMS = {"attn.norm_q": "self_attn.q_norm", "attn.norm_k": "self_attn.k_norm"}
_QKV = {"attn.attn": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")}
_ATTENTION = {**_QKV, "attn.proj": "self_attn.o_proj"}
_GATED_MLP = {"mlp.fc_1": "mlp.gate_proj", "mlp.fc_2": "mlp.up_proj", "mlp.proj": "mlp.down_proj"}


def _experts(name: str, gate: str, up: str, down: str) -> dict[str, str]:
    """Return the modules of a mixture; in files each expert is on its own, also where memory holds them stacked."""
    parts = dict(fc_1=gate, fc_2=up, proj=down)
    experts = {f"mlp.experts.{{e}}.{ours}": f"{name}.experts.{{e}}.{theirs}" for ours, theirs in parts.items()}
    return {"mlp.gate": f"{name}.gate"} | experts


_LLAMA = _NORMS | _ATTENTION | _GATED_MLP
_STARCODER2 = _NORMS | _ATTENTION | {"mlp.fc": "mlp.c_fc", "mlp.proj": "mlp.c_proj"}
_MIXTRAL = _NORMS | _ATTENTION | _experts("block_sparse_moe", "w1", "w3", "w2")
_QWEN3_MOE = _NORMS | _ATTENTION | _QK_NORMS | _experts("mlp", "gate_proj", "up_proj", "down_proj")
_OLMO = _ATTENTION | _GATED_MLP
_OLMO2 = _OLMO | _POST_NORMS | _QK_NORMS
_GEMMA2 = _LLAMA | _POST_NORMS | {"norm_2": "pre_feedforward_layernorm"}
# A name that is listed more than once holds its parts one after another, in the order of the list.
_PHI3_GATE_UP = dict.fromkeys(("mlp.fc_1", "mlp.fc_2"), "mlp.gate_up_proj")
_PHI3 = _LLAMA | {"attn.attn": ("self_attn.qkv_proj",) * 3} | _PHI3_GATE_UP
_STABLELM = _LLAMA | {f"attn.norm_{part}": (f"self_attn.{part}_layernorm.norms.{{h}}",) for part in "qk"}
_PHI = {**_QKV, "norm_1": "input_layernorm", "attn.proj": "self_attn.dense", "mlp.fc": "mlp.fc1", "mlp.proj": "mlp.fc2"}
# Their fused weights have our files' own order: for each group its query heads, then k, then v.
_NEOX_MLP = {"mlp.fc": "mlp.dense_h_to_4h", "mlp.proj": "mlp.dense_4h_to_h"}
_NEOX = _NORMS | _NEOX_MLP | {"attn.attn": "attention.query_key_value", "attn.proj": "attention.dense"}
_FALCON = _NEOX_MLP | {"attn.attn": "self_attention.query_key_value", "attn.proj": "self_attention.dense"}
_FALCON["norm_1"] = "input_layernorm"


def _new_falcon(described: dict[str, Any]) -> dict[str, Any]:
    """Describe Falcon-7B's form in the words of Falcon-40B's: one group of heads and one norm a block."""
    new, several = described.get("new_decoder_architecture"), not described.get("multi_query", True)
    if not (new or described.get("parallel_attn", True)):
        raise UserError("Falcon with one part of a block after the other (parallel_attn false) is not supported")
    groups = described.get("num_kv_heads") or described.get("num_attention_heads") if new or several else 1
    norms = described.get("num_ln_in_parallel_attn") or 2 if new else 1
    width = described.get("ffn_hidden_size") or 4 * described.get("hidden_size", 0) or None
    return {**described, "num_kv_heads": groups, "num_ln_in_parallel_attn": norms, "ffn_hidden_size": width}


def _gemma_gelu(described: dict[str, Any]) -> dict[str, Any]:
    """Name the GELU of tanh that Gemma 1 was trained with, also where its first files say ``gelu``."""
    older = {"hidden_act": _GEMMA["gelu_approximate"]} if described.get("hidden_act") == "gelu" else {}
    return {**described, **older}


_GEMMA = _RMS_NORM | _NO_BIASES | dict(head_size=256, gelu_approximate="gelu_pytorch_tanh", tie_embeddings=True)
_GEMMA_CONSTANTS = dict(norm_class="OffsetRMSNorm", mlp_class="GemmaMLP", embedding_scale=0.0)
_GEMMA_2_KEYS = dict(gelu_approximate="hidden_activation", attention_scale="query_pre_attn_scalar")
_QWEN3_DEFAULTS = _RMS_NORM | _NO_BIASES | dict(n_query_groups=32, head_size=128)
_LLAMA_DEFAULTS = _RMS_NORM | _NO_BIASES | dict(mlp_bias=False)
_OLMO2_DEFAULTS = _RMS_NORM | _NO_BIASES | dict(norm_eps=1e-5)
_OLMO2_CONSTANTS = dict(pre_norm=False, post_norm=True, qk_norm=True, qk_norm_over="row")
_WINDOWS = dict(sliding_window=4096, sliding_layers=None)

FAMILIES = {
    "LlamaForCausalLM": Family("llama", _LLAMA, _LLAMA_DEFAULTS),
    "MistralForCausalLM": Family("mistral", _LLAMA, dict(_RMS_NORM, n_query_groups=8, sliding_window=4096)),
    "MinistralForCausalLM": Family("ministral", _LLAMA, _RMS_NORM | _WINDOWS | dict(n_query_groups=8)),
    "Qwen2ForCausalLM": Family(
        "qwen2", _LLAMA, _RMS_NORM | _WINDOWS | dict(n_query_groups=32), constants=dict(qkv_bias=True), windows_from=28,
    ),
    "Qwen3ForCausalLM": Family(
        "qwen3", _LLAMA | _QK_NORMS, _QWEN3_DEFAULTS | _WINDOWS, constants=dict(qk_norm=True), windows_from=28,
    ),
    "Qwen3MoeForCausalLM": Family(
        "qwen3_moe", _QWEN3_MOE,
        dict(_QWEN3_DEFAULTS, n_query_groups=4, head_size=None, sliding_window=4096, intermediate_size=768,
             n_expert=128, n_expert_per_token=8, norm_expert_weights=False),
        constants=dict(qk_norm=True, mlp_class="LLaMAMoE"), own_keys=dict(intermediate_size="moe_intermediate_size"),
        # transformers 5 writes num_local_experts.
        prepare=lambda described: {"num_local_experts": described.get("num_experts", 128), **described},
        windows_from=0,
    ),
    "GemmaForCausalLM": Family(
        "gemma", _LLAMA, _GEMMA | dict(n_query_groups=16), constants=_GEMMA_CONSTANTS, prepare=_gemma_gelu,
    ),
    "Gemma2ForCausalLM": Family(
        "gemma2", _GEMMA2,
        dict(_GEMMA, n_query_groups=4, attention_scale=256, attention_softcap=50.0, logits_softcap=30.0,
             sliding_window=4096, sliding_layers=2),
        constants=dict(_GEMMA_CONSTANTS, post_norm=True), own_keys=_GEMMA_2_KEYS,
    ),
    "Gemma3ForCausalLM": Family(
        "gemma3_text", _GEMMA2 | _QK_NORMS,
        # Files of the multimodal models leave out what is the class's default, sizes too.
        dict(_GEMMA, vocab_size=262208, n_embd=2304, intermediate_size=9216, n_layer=26, n_head=8, block_size=131072,
             n_query_groups=4, attention_scale=256, attention_softcap=None, logits_softcap=None,
             rope_base=1e6, local_rope_base=1e4, sliding_window=4096, sliding_layers=6),
        constants=dict(_GEMMA_CONSTANTS, post_norm=True, qk_norm=True), own_keys=_GEMMA_2_KEYS,
    ),
    "Phi3ForCausalLM": Family("phi3", _PHI3, dict(_RMS_NORM, norm_eps=1e-5, block_size=4096, sliding_window=None)),
    "OlmoForCausalLM": Family(
        "olmo", _OLMO, _RMS_NORM | _NO_BIASES | dict(qkv_clip=None),
        constants=dict(norm_class="PlainLayerNorm", norm_eps=1e-5),
    ),
    "Olmo2ForCausalLM": Family("olmo2", _OLMO2, _OLMO2_DEFAULTS, _OLMO2_CONSTANTS),
    "Olmo3ForCausalLM": Family(
        "olmo3", _OLMO2,
        dict(_OLMO2_DEFAULTS, rope_base=5e5, local_rope_base=None, sliding_window=4096, sliding_layers=4),
        _OLMO2_CONSTANTS,
    ),
    "SmolLM3ForCausalLM": Family(
        "smollm3", _LLAMA,
        dict(_LLAMA_DEFAULTS, n_query_groups=4, rope_base=2e6, tie_embeddings=True, rope_layers=4, sliding_window=None,
             sliding_layers=None),
        windows_from=0,
    ),
    "GraniteForCausalLM": Family(
        "granite", _LLAMA,
        dict(_LLAMA_DEFAULTS, embedding_scale=1.0, residual_scale=1.0, logits_scale=1.0, attention_scale=1.0),
    ),
    "StableLmForCausalLM": Family(
        "stablelm", _STABLELM,
        dict(_RMS_NORM, norm_eps=1e-5, n_query_groups=32, qkv_bias=False, rotary_percentage=0.25,
             parallel_residual=False, shared_attention_norm=False, qk_norm=False),
        constants=dict(norm_class="LayerNorm", qk_norm_over="heads"),
        own_keys=dict(norm_eps="layer_norm_eps", qkv_bias="use_qkv_bias", qk_norm="qk_layernorm",
                      shared_attention_norm="use_parallel_residual"),
    ),
    "MixtralForCausalLM": Family(
        "mixtral", _MIXTRAL,
        dict(_RMS_NORM, n_expert=8, n_expert_per_token=2, norm_eps=1e-5, n_query_groups=8, rope_base=1e6,
             sliding_window=None),
        constants=dict(mlp_class="LLaMAMoE"),
    ),
    "GPTNeoXForCausalLM": Family(
        "gpt_neox", _NEOX, _LAYER_NORM | _BIASES | dict(rotary_percentage=0.25, parallel_residual=True),
        constants=_GELU_MLP | dict(mlp_bias=True),
        own_keys=dict(norm_eps="layer_norm_eps", rotary_percentage="rotary_pct", rope_base="rotary_emb_base"),
        layers="gpt_neox.layers", top=_top("embed_out", "gpt_neox.embed_in", "gpt_neox.final_layer_norm"),
    ),
    "Starcoder2ForCausalLM": Family(
        "starcoder2", _STARCODER2,
        dict(_LAYER_NORM, **_BIASES, mlp_bias=True, n_query_groups=2, gelu_approximate="gelu_pytorch_tanh",
             sliding_window=None, tie_embeddings=True),
        constants=_GELU_MLP, own_keys=dict.fromkeys(_BIAS_FIELDS, "use_bias") | dict(norm_eps="norm_epsilon"),
    ),
    "PhiForCausalLM": Family(
        "phi", _PHI, _LAYER_NORM | dict(rotary_percentage=0.5, gelu_approximate="gelu_new"),
        constants=dict(_GELU_MLP, **_BIASES, mlp_bias=True, parallel_residual=True, shared_attention_norm=True,
                       lm_head_bias=True),
        own_keys=dict(norm_eps="layer_norm_eps"), top=_top("lm_head", "model.embed_tokens", "model.final_layernorm"),
    ),
    "FalconForCausalLM": Family(
        "falcon", _FALCON,
        dict(_LAYER_NORM, **_NO_BIASES, mlp_bias=False, shared_attention_norm=False, block_size=2048,
             tie_embeddings=True),
        constants=dict(_GELU_MLP, parallel_residual=True),
        own_keys=dict.fromkeys(_BIAS_FIELDS, "bias") | dict(
            n_query_groups="num_kv_heads", shared_attention_norm="num_ln_in_parallel_attn",
            norm_eps="layer_norm_epsilon", intermediate_size="ffn_hidden_size", gelu_approximate="activation",
        ),
        layers="transformer.h", top=_top("lm_head", "transformer.word_embeddings", "transformer.ln_f"),
        two_norms={"norm_1": "ln_attn", "norm_2": "ln_mlp"},
        prepare=_new_falcon,
    ),
}  # fmt: skip
"""Each class by its name under ``architectures`` in ``config.json``."""
