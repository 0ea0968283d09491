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
