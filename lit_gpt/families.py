"""Describe the Hugging Face classes that are known here: what their ``config.json`` says, how their weights are named.

Data alone. ``config`` reads and writes ``config.json`` by these rows, ``hf`` converts weights by them in both
directions, and the LoRA export names its modules by them. A class that computes what another does is some rows more.
"""

from dataclasses import dataclass, field
from typing import Any


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
    """

    model_type: str
    modules: dict[str, str | tuple[str, ...]]
    defaults: dict[str, Any]
    constants: dict[str, Any] = field(default_factory=dict)
    own_keys: dict[str, str] = field(default_factory=dict)


_ANY = dict(n_query_groups=None, rope_base=10000.0, rope_scaling=None, tie_embeddings=False)
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
_QWEN3 = {
    **_LLAMA,
    "transformer.h.{i}.attn.norm_q": "model.layers.{i}.self_attn.q_norm",
    "transformer.h.{i}.attn.norm_k": "model.layers.{i}.self_attn.k_norm",
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

FAMILIES = {
    "LlamaForCausalLM": Family("llama", _LLAMA, dict(_RMS_NORM, qkv_bias=False, proj_bias=False, mlp_bias=False)),
    "MistralForCausalLM": Family("mistral", _LLAMA, dict(_RMS_NORM, n_query_groups=8, sliding_window=4096)),
    "Qwen2ForCausalLM": Family("qwen2", _LLAMA, dict(_RMS_NORM, n_query_groups=32), constants=dict(qkv_bias=True)),
    "Qwen3ForCausalLM": Family(
        "qwen3",
        _QWEN3,
        dict(_RMS_NORM, n_query_groups=32, head_size=128, qkv_bias=False, proj_bias=False),
        constants=dict(qk_norm=True),
    ),
    "StableLmForCausalLM": Family(
        "stablelm",
        _LLAMA,
        dict(_RMS_NORM, norm_eps=1e-5, n_query_groups=32, qkv_bias=False, rotary_percentage=0.25),
        constants=dict(norm_class="LayerNorm"),
        own_keys=dict(norm_eps="layer_norm_eps", qkv_bias="use_qkv_bias"),
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
ROUTE = "finetune others in transformers, with PEFT's LoRA or with ETHER, which lit_gpt/peft_ether.py adds to PEFT"
"""What does work for them."""
