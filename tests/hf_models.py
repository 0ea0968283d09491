"""Tiny random models of transformers, one for each architecture and each switch that changes the computation.

Sizes differ from one another wherever they may, so that a mix-up of two shows; weights are large enough for greedy
tokens to be apart, and norms and biases are not at their trivial start.
"""

from pathlib import Path
from typing import Any

import torch

SIZES = dict(
    vocab_size=160, hidden_size=24, intermediate_size=40, num_hidden_layers=2, num_attention_heads=4,
    max_position_embeddings=96, bos_token_id=None, eos_token_id=None,
)  # fmt: skip
LLAMA3_ROPE = dict(
    rope_type="llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=16
)

SLIDING, FULL = "sliding_attention", "full_attention"
YARN = dict(rope_type="yarn", factor=4.0, original_max_position_embeddings=24)
QWEN3_MOE = dict(num_key_value_heads=2, head_dim=10, moe_intermediate_size=20, num_experts=5, num_experts_per_tok=2)
GEMMA = dict(num_key_value_heads=2, head_dim=10, query_pre_attn_scalar=64, sliding_window=5)
GEMMA3_ROPE = {
    FULL: dict(rope_type="linear", factor=8.0, rope_theta=1e6), SLIDING: dict(rope_type="default", rope_theta=1e4)
}  # fmt: skip
PHI3_LONGROPE = dict(
    hidden_size=32, num_key_value_heads=2, pad_token_id=None, original_max_position_embeddings=24,
    rope_scaling=dict(type="longrope", short_factor=[1.0, 1.1, 1.2, 1.3], long_factor=[1.0, 2.0, 4.0, 8.0]),
)  # fmt: skip
FALCON = dict(hidden_size=32, intermediate_size=None)
OLMO3 = dict(num_key_value_heads=2, sliding_window=5, layer_types=[SLIDING, FULL])

# name: (transformers config class, its fields)
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("LlamaConfig", {}),
    "llama_tied_gqa": ("LlamaConfig", dict(num_key_value_heads=2, tie_word_embeddings=True, rope_theta=5e4)),
    "llama_mqa_odd_head": ("LlamaConfig", dict(num_key_value_heads=1, head_dim=10)),
    "llama_biases": ("LlamaConfig", dict(num_key_value_heads=2, attention_bias=True, mlp_bias=True)),
    "llama3_rope": ("LlamaConfig", dict(num_key_value_heads=2, head_dim=16, rope_scaling=LLAMA3_ROPE)),
    "llama_linear_rope": ("LlamaConfig", dict(rope_scaling=dict(rope_type="linear", factor=4.0))),
    "mistral_window": ("MistralConfig", dict(num_key_value_heads=2, sliding_window=5)),
    "mistral_no_window": ("MistralConfig", dict(num_key_value_heads=2, sliding_window=None)),
    "qwen2": ("Qwen2Config", dict(num_key_value_heads=2, rope_theta=1e6)),
    "qwen2_tied": ("Qwen2Config", dict(num_key_value_heads=4, tie_word_embeddings=True, sliding_window=5)),
    "qwen3": ("Qwen3Config", dict(num_key_value_heads=2, head_dim=10)),
    "qwen3_biases_tied": ("Qwen3Config", dict(num_key_value_heads=2, attention_bias=True, tie_word_embeddings=True)),
    "stablelm": ("StableLmConfig", dict(hidden_size=32, num_key_value_heads=2, partial_rotary_factor=0.25)),
    "stablelm_biases": ("StableLmConfig", dict(hidden_size=64, num_key_value_heads=4, use_qkv_bias=True)),
    "starcoder2": ("Starcoder2Config", dict(num_key_value_heads=2, sliding_window=5)),
    "starcoder2_untied": ("Starcoder2Config", dict(use_bias=False, tie_word_embeddings=False, norm_epsilon=1e-3)),
    "qwen2_some_windows": (
        "Qwen2Config",
        dict(num_key_value_heads=2, use_sliding_window=True, sliding_window=5, max_window_layers=1),
    ),
    "qwen3_yarn": ("Qwen3Config", dict(num_key_value_heads=2, head_dim=16, rope_scaling=YARN)),
    "qwen3_moe": ("Qwen3MoeConfig", QWEN3_MOE),
    "qwen3_moe_norm": ("Qwen3MoeConfig", dict(QWEN3_MOE, norm_topk_prob=True, attention_bias=True)),
    "ministral": (
        "MinistralConfig",
        dict(num_key_value_heads=2, head_dim=6, sliding_window=5, layer_types=[SLIDING, FULL]),
    ),
    "gemma": ("GemmaConfig", dict(num_key_value_heads=1, head_dim=10)),
    "gemma2": ("Gemma2Config", dict(GEMMA, attn_logit_softcapping=2.0, final_logit_softcapping=3.0)),
    "gemma2_no_caps": ("Gemma2Config", dict(GEMMA, attn_logit_softcapping=None, final_logit_softcapping=None)),
    "gemma3": ("Gemma3TextConfig", dict(GEMMA, layer_types=[SLIDING, FULL])),
    "gemma3_linear_rope": ("Gemma3TextConfig", dict(GEMMA, layer_types=[FULL, SLIDING], rope_parameters=GEMMA3_ROPE)),
    "phi3": ("Phi3Config", dict(num_key_value_heads=2, sliding_window=7, pad_token_id=None)),
    "phi3_longrope": ("Phi3Config", PHI3_LONGROPE),
    "phi4_mini": ("Phi3Config", PHI3_LONGROPE | dict(partial_rotary_factor=0.5, tie_word_embeddings=True)),
    "falcon_7b": ("FalconConfig", dict(FALCON, multi_query=True, parallel_attn=True)),
    "falcon_40b": ("FalconConfig", dict(FALCON, new_decoder_architecture=True, num_kv_heads=2)),
    "falcon_11b": (
        "FalconConfig",
        dict(FALCON, new_decoder_architecture=True, num_kv_heads=2, num_ln_in_parallel_attn=1, bias=True),
    ),
    "falcon_untied": ("FalconConfig", dict(FALCON, multi_query=False, tie_word_embeddings=False, ffn_hidden_size=40)),
    "stablelm2_12b": (
        "StableLmConfig",
        dict(
            hidden_size=32,
            num_key_value_heads=2,
            partial_rotary_factor=0.25,
            qk_layernorm=True,
            use_parallel_residual=True,
        ),
    ),
    "olmo": ("OlmoConfig", dict(num_key_value_heads=2, clip_qkv=0.8)),
    "olmo2": ("Olmo2Config", dict(num_key_value_heads=2)),
    "olmo3": ("Olmo3Config", OLMO3),
    "olmo3_yarn": ("Olmo3Config", OLMO3 | dict(head_dim=16, rope_scaling=YARN)),
    "smollm3": ("SmolLM3Config", dict(pad_token_id=None, num_key_value_heads=2, num_hidden_layers=5)),
    "smollm3_listed": ("SmolLM3Config", dict(pad_token_id=None, num_key_value_heads=4, no_rope_layers=[0, 1])),
    "granite": (
        "GraniteConfig",
        dict(
            num_key_value_heads=2,
            attention_multiplier=0.3,
            logits_scaling=3.0,
            embedding_multiplier=2.0,
            residual_multiplier=0.4,
        ),
    ),
    "llama_dynamic_rope": (
        "LlamaConfig",
        dict(rope_scaling=dict(rope_type="dynamic", factor=4.0), max_position_embeddings=24),
    ),
    "llama_yarn_mscale": (
        "LlamaConfig",
        dict(head_dim=16, rope_scaling=YARN | dict(mscale=0.7, mscale_all_dim=0.4, truncate=False)),
    ),
    "mixtral": ("MixtralConfig", dict(num_key_value_heads=2, num_local_experts=5, num_experts_per_tok=2)),
    "mixtral_window": ("MixtralConfig", dict(num_key_value_heads=2, num_local_experts=3, sliding_window=5)),
    "neox_parallel": ("GPTNeoXConfig", dict(hidden_size=32, rotary_pct=0.25)),
    "neox_sequential": ("GPTNeoXConfig", dict(rotary_pct=1.0, use_parallel_residual=False, attention_bias=False)),
    "neox_tied_tanh": ("GPTNeoXConfig", dict(hidden_size=32, tie_word_embeddings=True, hidden_act="gelu_new")),
    "phi": ("PhiConfig", dict(hidden_size=32, partial_rotary_factor=0.5)),
    "phi_gqa": ("PhiConfig", dict(hidden_size=64, partial_rotary_factor=0.25, num_key_value_heads=2)),
}


def build(case: str, seed: int = 1) -> Any:
    """The random model of a case, in evaluation mode and fp32."""
    import transformers

    transformers.logging.set_verbosity_error()
    kind, fields = CASES[case]
    torch.manual_seed(seed)
    model = transformers.AutoModelForCausalLM.from_config(getattr(transformers, kind)(**{**SIZES, **fields}))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim > 1:
                parameter.normal_(std=1.2 / parameter.shape[-1] ** 0.5)  # activations keep their size
            else:
                parameter.normal_(mean=1.0 if "norm" in name and "bias" not in name else 0.0, std=0.2)
    return model.float().eval()


def save(case: str, folder: Path, **options: Any) -> Any:
    """Build a case's model, save it as transformers does, and return it."""
    model = build(case)
    model.save_pretrained(folder, **options)
    return model
