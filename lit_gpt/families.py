"""Describe the Hugging Face classes that are known here: what their ``config.json`` says, how their weights are named.

Data, but for Falcon's two forms. ``config`` reads and writes ``config.json`` by these rows, ``hf`` converts weights by
them in both directions, and the LoRA export names its modules by them. A class that computes what another does is some
rows more, and a case in tests/hf_models.py, which holds it against transformers.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from lit_gpt.errors import UserError


@dataclass(frozen=True)
class Family:
    """A Hugging Face class.

    Attributes:
        model_type: its name in ``config.json``.
        modules: our modules, each with the Hugging Face module that holds the same weights, or the three for q, k and
            v. ``{i}`` stands for a layer, ``{e}`` for an expert.
        defaults: the fields that a ``config.json`` of it may tell, and what they are where it leaves them out (the
            defaults of the class in transformers).
        constants: fields that are the same for all its models.
        own_keys: fields that it calls otherwise than ``Config`` says.
        two_norms: modules of a parallel block whose MLP has a norm of its own, where they have other names.
        windowed: ``sliding_window`` counts without ``use_sliding_window``.
        max_window_layers: so many first layers have no window, where the file tells neither that nor each layer's kind.
        prepare: brings an own form of ``config.json`` into the usual one.
        written: keys of ``config.json`` that choose the form we write.
    """

    model_type: str
    modules: dict[str, str | tuple[str, ...]]
    defaults: dict[str, Any]
    constants: dict[str, Any] = field(default_factory=dict)
    own_keys: dict[str, str] = field(default_factory=dict)
    two_norms: dict[str, str] = field(default_factory=dict)
    windowed: bool = True
    max_window_layers: int = 0
    prepare: Callable[[dict[str, Any]], dict[str, Any]] = dict
    written: dict[str, Any] = field(default_factory=dict)


_ANY = dict(n_query_groups=None, rope_base=10000.0, rope_scaling=None, tie_embeddings=False, rotary_percentage=1.0)
_RMS_NORM = dict(_ANY, norm_eps=1e-6, gelu_approximate="silu", head_size=None)
_LAYER_NORM = dict(_ANY, norm_eps=1e-5, gelu_approximate="gelu")
_GELU_MLP = dict(norm_class="LayerNorm", mlp_class="GptNeoxMLP", mlp_bias=True)
_BIASES = dict(qkv_bias=True, proj_bias=True)
_EXPERTS = dict(n_expert=8, n_expert_per_token=2)

_QKV = tuple(f"model.layers.{{i}}.self_attn.{part}_proj" for part in "qkv")
_LLAMA_ATTENTION = {
    "lm_head": "lm_head",
    "transformer.wte": "model.embed_tokens",
    "transformer.ln_f": "model.norm",
    "transformer.h.{i}.norm_1": "model.layers.{i}.input_layernorm",
    "transformer.h.{i}.norm_2": "model.layers.{i}.post_attention_layernorm",
    "transformer.h.{i}.attn.attn": _QKV,
    "transformer.h.{i}.attn.proj": "model.layers.{i}.self_attn.o_proj",
}
_LLAMA = {
    **_LLAMA_ATTENTION,
    "transformer.h.{i}.mlp.fc_1": "model.layers.{i}.mlp.gate_proj",
    "transformer.h.{i}.mlp.fc_2": "model.layers.{i}.mlp.up_proj",
    "transformer.h.{i}.mlp.proj": "model.layers.{i}.mlp.down_proj",
}
_STARCODER2 = {
    **_LLAMA_ATTENTION,
    "transformer.h.{i}.mlp.fc": "model.layers.{i}.mlp.c_fc",
    "transformer.h.{i}.mlp.proj": "model.layers.{i}.mlp.c_proj",
}
# In files each expert is on its own, also where transformers holds them stacked in memory.
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
    # (q, k, v) of head after head, which is our files' own order for as many groups as heads.
    "transformer.h.{i}.attn.attn": "gpt_neox.layers.{i}.attention.query_key_value",
    "transformer.h.{i}.attn.proj": "gpt_neox.layers.{i}.attention.dense",
    "transformer.h.{i}.mlp.fc": "gpt_neox.layers.{i}.mlp.dense_h_to_4h",
    "transformer.h.{i}.mlp.proj": "gpt_neox.layers.{i}.mlp.dense_4h_to_h",
}
_OLMO = {ours: theirs for ours, theirs in _LLAMA.items() if "norm" not in ours and "ln_f" not in ours}
_POST_NORMS = {
    "transformer.h.{i}.post_attention_norm": "model.layers.{i}.post_attention_layernorm",
    "transformer.h.{i}.post_mlp_norm": "model.layers.{i}.post_feedforward_layernorm",
}
_QK_NORMS = {
    "transformer.h.{i}.attn.norm_q": "model.layers.{i}.self_attn.q_norm",
    "transformer.h.{i}.attn.norm_k": "model.layers.{i}.self_attn.k_norm",
}
_OLMO2 = {**_OLMO, **_POST_NORMS, **_QK_NORMS, "transformer.ln_f": "model.norm"}
_GEMMA2 = {**_LLAMA, **_POST_NORMS, "transformer.h.{i}.norm_2": "model.layers.{i}.pre_feedforward_layernorm"}
# A name that is listed more than once holds its parts one after another, in the order of the list.
_PHI3 = {
    **_LLAMA,
    "transformer.h.{i}.attn.attn": ("model.layers.{i}.self_attn.qkv_proj",) * 3,
    "transformer.h.{i}.mlp.fc_1": "model.layers.{i}.mlp.gate_up_proj",
    "transformer.h.{i}.mlp.fc_2": "model.layers.{i}.mlp.gate_up_proj",
}
_STABLELM = {
    **_LLAMA,
    "transformer.h.{i}.attn.norm_q": ("model.layers.{i}.self_attn.q_layernorm.norms.{h}",),
    "transformer.h.{i}.attn.norm_k": ("model.layers.{i}.self_attn.k_layernorm.norms.{h}",),
}
_QWEN3_MOE = {
    **_LLAMA_ATTENTION,
    **_QK_NORMS,
    "transformer.h.{i}.mlp.gate": "model.layers.{i}.mlp.gate",
    "transformer.h.{i}.mlp.experts.{e}.fc_1": "model.layers.{i}.mlp.experts.{e}.gate_proj",
    "transformer.h.{i}.mlp.experts.{e}.fc_2": "model.layers.{i}.mlp.experts.{e}.up_proj",
    "transformer.h.{i}.mlp.experts.{e}.proj": "model.layers.{i}.mlp.experts.{e}.down_proj",
}
_FALCON = {
    "lm_head": "lm_head",
    "transformer.wte": "transformer.word_embeddings",
    "transformer.ln_f": "transformer.ln_f",
    "transformer.h.{i}.norm_1": "transformer.h.{i}.input_layernorm",
    # For each group its query heads, then k, then v: our files' own order.
    "transformer.h.{i}.attn.attn": "transformer.h.{i}.self_attention.query_key_value",
    "transformer.h.{i}.attn.proj": "transformer.h.{i}.self_attention.dense",
    "transformer.h.{i}.mlp.fc": "transformer.h.{i}.mlp.dense_h_to_4h",
    "transformer.h.{i}.mlp.proj": "transformer.h.{i}.mlp.dense_4h_to_h",
}
_PHI = {
    "lm_head": "lm_head",
    "transformer.wte": "model.embed_tokens",
    "transformer.ln_f": "model.final_layernorm",
    "transformer.h.{i}.norm_1": "model.layers.{i}.input_layernorm",
    "transformer.h.{i}.attn.attn": _QKV,
    "transformer.h.{i}.attn.proj": "model.layers.{i}.self_attn.dense",
    "transformer.h.{i}.mlp.fc": "model.layers.{i}.mlp.fc1",
    "transformer.h.{i}.mlp.proj": "model.layers.{i}.mlp.fc2",
}


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


_GEMMA = dict(_RMS_NORM, head_size=256, gelu_approximate="gelu_pytorch_tanh", tie_embeddings=True, qkv_bias=False)
_GEMMA |= dict(proj_bias=False)
_GEMMA_CONSTANTS = dict(norm_class="OffsetRMSNorm", mlp_class="GemmaMLP", embedding_scale=0.0)
_GEMMA_2_KEYS = dict(gelu_approximate="hidden_activation", attention_scale="query_pre_attn_scalar")
_QWEN3_DEFAULTS = dict(_RMS_NORM, n_query_groups=32, head_size=128, qkv_bias=False, proj_bias=False)
_LLAMA_DEFAULTS = dict(_RMS_NORM, qkv_bias=False, proj_bias=False, mlp_bias=False)
_WINDOWS = dict(sliding_window=4096, sliding_layers=None)

FAMILIES = {
    "LlamaForCausalLM": Family("llama", _LLAMA, _LLAMA_DEFAULTS),
    "MistralForCausalLM": Family("mistral", _LLAMA, dict(_RMS_NORM, n_query_groups=8, sliding_window=4096)),
    "MinistralForCausalLM": Family("ministral", _LLAMA, _RMS_NORM | _WINDOWS | dict(n_query_groups=8)),
    "Qwen2ForCausalLM": Family(
        "qwen2",
        _LLAMA,
        _RMS_NORM | _WINDOWS | dict(n_query_groups=32),
        constants=dict(qkv_bias=True),
        windowed=False,
        max_window_layers=28,
    ),
    "Qwen3ForCausalLM": Family(
        "qwen3",
        {**_LLAMA, **_QK_NORMS},
        _QWEN3_DEFAULTS | _WINDOWS,
        constants=dict(qk_norm=True),
        windowed=False,
        max_window_layers=28,
    ),
    "Qwen3MoeForCausalLM": Family(
        "qwen3_moe",
        _QWEN3_MOE,
        _QWEN3_DEFAULTS
        | dict(n_query_groups=4, head_size=None, sliding_window=4096)
        | dict(n_expert=128, n_expert_per_token=8, norm_expert_weights=False, intermediate_size=768),
        constants=dict(qk_norm=True, mlp_class="LLaMAMoE"),
        own_keys=dict(intermediate_size="moe_intermediate_size"),
        # transformers 5 writes num_local_experts.
        prepare=lambda described: {"num_local_experts": described.get("num_experts", 128), **described},
        windowed=False,
    ),
    "GemmaForCausalLM": Family(
        "gemma", _LLAMA, _GEMMA | dict(n_query_groups=16), constants=_GEMMA_CONSTANTS, prepare=_gemma_gelu
    ),
    "Gemma2ForCausalLM": Family(
        "gemma2",
        _GEMMA2,
        _GEMMA
        | dict(n_query_groups=4, attention_scale=256, attention_softcap=50.0, logits_softcap=30.0)
        | dict(sliding_window=4096, sliding_layers=2),
        constants=dict(_GEMMA_CONSTANTS, post_norm=True),
        own_keys=_GEMMA_2_KEYS,
    ),
    "Gemma3ForCausalLM": Family(
        "gemma3_text",
        {**_GEMMA2, **_QK_NORMS},
        _GEMMA
        # Files of the multimodal models leave out what is the class's default, sizes too.
        | dict(vocab_size=262208, n_embd=2304, intermediate_size=9216, n_layer=26, n_head=8, block_size=131072)
        | dict(n_query_groups=4, attention_scale=256, attention_softcap=None, logits_softcap=None)
        | dict(rope_base=1e6, local_rope_base=1e4, sliding_window=4096, sliding_layers=6),
        constants=dict(_GEMMA_CONSTANTS, post_norm=True, qk_norm=True),
        own_keys=_GEMMA_2_KEYS,
    ),
    "Phi3ForCausalLM": Family("phi3", _PHI3, dict(_RMS_NORM, norm_eps=1e-5, block_size=4096, sliding_window=None)),
    "OlmoForCausalLM": Family(
        "olmo",
        _OLMO,
        dict(_RMS_NORM, qkv_bias=False, proj_bias=False, qkv_clip=None),
        constants=dict(norm_class="PlainLayerNorm", norm_eps=1e-5),
    ),
    "Olmo2ForCausalLM": Family(
        "olmo2",
        _OLMO2,
        dict(_RMS_NORM, norm_eps=1e-5, qkv_bias=False, proj_bias=False),
        constants=dict(pre_norm=False, post_norm=True, qk_norm=True, qk_norm_over="row"),
    ),
    "Olmo3ForCausalLM": Family(
        "olmo3",
        _OLMO2,
        dict(_RMS_NORM, norm_eps=1e-5, qkv_bias=False, proj_bias=False, rope_base=5e5)
        | dict(local_rope_base=None, sliding_window=4096, sliding_layers=4),
        constants=dict(pre_norm=False, post_norm=True, qk_norm=True, qk_norm_over="row"),
    ),
    "SmolLM3ForCausalLM": Family(
        "smollm3",
        _LLAMA,
        _LLAMA_DEFAULTS
        | dict(n_query_groups=4, rope_base=2e6, tie_embeddings=True, rope_layers=4)
        | _WINDOWS
        | dict(sliding_window=None),
        windowed=False,
    ),
    "GraniteForCausalLM": Family(
        "granite",
        _LLAMA,
        _LLAMA_DEFAULTS | dict.fromkeys(("embedding_scale", "residual_scale", "logits_scale", "attention_scale"), 1.0),
    ),
    "StableLmForCausalLM": Family(
        "stablelm",
        _STABLELM,
        dict(_RMS_NORM, norm_eps=1e-5, n_query_groups=32, qkv_bias=False, rotary_percentage=0.25)
        | dict(parallel_residual=False, shared_attention_norm=False, qk_norm=False),
        constants=dict(norm_class="LayerNorm", qk_norm_over="heads"),
        own_keys=dict(norm_eps="layer_norm_eps", qkv_bias="use_qkv_bias", qk_norm="qk_layernorm")
        | dict(shared_attention_norm="use_parallel_residual"),
    ),
    "MixtralForCausalLM": Family(
        "mixtral",
        _MIXTRAL,
        _RMS_NORM | _EXPERTS | dict(norm_eps=1e-5, n_query_groups=8, rope_base=1e6, sliding_window=None),
        constants=dict(mlp_class="LLaMAMoE"),
    ),
    "GPTNeoXForCausalLM": Family(
        "gpt_neox",
        _GPT_NEOX,
        _LAYER_NORM | _BIASES | dict(rotary_percentage=0.25, parallel_residual=True),
        constants=_GELU_MLP,
        own_keys=dict(norm_eps="layer_norm_eps", rotary_percentage="rotary_pct", rope_base="rotary_emb_base"),
    ),
    "Starcoder2ForCausalLM": Family(
        "starcoder2",
        _STARCODER2,
        _LAYER_NORM
        | dict.fromkeys(("qkv_bias", "proj_bias", "mlp_bias"), True)
        | dict(n_query_groups=2, gelu_approximate="gelu_pytorch_tanh", sliding_window=None, tie_embeddings=True),
        constants=dict(norm_class="LayerNorm", mlp_class="GptNeoxMLP"),
        own_keys=dict.fromkeys(("qkv_bias", "proj_bias", "mlp_bias"), "use_bias") | dict(norm_eps="norm_epsilon"),
    ),
    "PhiForCausalLM": Family(
        "phi",
        _PHI,
        _LAYER_NORM | dict(rotary_percentage=0.5, gelu_approximate="gelu_new"),
        constants=_GELU_MLP | _BIASES | dict(parallel_residual=True, shared_attention_norm=True, lm_head_bias=True),
        own_keys=dict(norm_eps="layer_norm_eps"),
    ),
    "FalconForCausalLM": Family(
        "falcon",
        _FALCON,
        _LAYER_NORM
        | dict.fromkeys(("qkv_bias", "proj_bias", "mlp_bias", "shared_attention_norm"), False)
        | dict(block_size=2048, tie_embeddings=True),
        constants=dict(norm_class="LayerNorm", mlp_class="GptNeoxMLP", parallel_residual=True),
        own_keys=dict.fromkeys(("qkv_bias", "proj_bias", "mlp_bias"), "bias")
        | dict(n_query_groups="num_kv_heads", shared_attention_norm="num_ln_in_parallel_attn")
        | dict(norm_eps="layer_norm_epsilon", intermediate_size="ffn_hidden_size", gelu_approximate="activation"),
        two_norms={
            "transformer.h.{i}.norm_1": "transformer.h.{i}.ln_attn",
            "transformer.h.{i}.norm_2": "transformer.h.{i}.ln_mlp",
        },
        prepare=_new_falcon,
        written=dict(new_decoder_architecture=True),
    ),
}
"""Each class by its name under ``architectures`` in ``config.json``."""

UNSUPPORTED = {
    "most of its layers have linear attention": ("Qwen3Next", "Qwen3_5", "Qwen4", "KimiLinear", "OlmoHybrid"),
    "it mixes attention with Mamba, convolutions or other recurrent layers": (
        "Mamba", "FalconMamba", "FalconH1", "NemotronH", "GraniteMoeHybrid", "Jamba", "Bamba", "Zamba", "Lfm2", "Lfm3",
        "RecurrentGemma", "Rwkv", "xLSTM",
    ),
    "its layers share keys and values, and have embeddings or head sizes of their own": ("Gemma3n", "Gemma4"),
    "its weights are MXFP4, and its attention has sinks": ("GptOss",),
    "its attention keeps keys and values compressed (MLA)": ("Deepseek", "Kimi", "MiniCPM3", "Longcat", "GlmMoeDsa"),
    "it routes to experts in a way that is not known here": (
        "GraniteMoe", "Qwen2Moe", "Phimoe", "Olmoe", "Llama4", "Glm4Moe", "Dbrx", "Ernie4_5_Moe", "MiniMax",
    ),
    "it has no rotary embedding": ("GPT2", "GPTNeoFor", "GPTBigCode", "OPT", "Bloom", "Mpt", "MPT"),
    "it is no decoder alone": ("Bert", "Roberta", "XLMRoberta", "ModernBert", "T5", "Bart", "MBart", "Whisper"),
}  # fmt: skip
"""Reasons why a class is not built here, each with how the names of such classes begin; the first that fits is said."""
REMOTE_CODE = "its code comes with it (trust_remote_code), and none but ours is run"
ROUTE = "finetune others in transformers, with PEFT's LoRA, or with ETHER by finetune/ether_hf.py"
"""The way that works for them, as the end of an error."""
