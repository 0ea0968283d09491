"""What a model is made of: one dataclass, read from a known name, a Hugging Face ``config.json`` or our own JSON.

A ``Config`` says what the model *is* (sizes, norms, rotary embedding), never what is done with it. A model that
nobody listed works when its architecture is known: ``Config.from_hf`` reads the file that comes with it. The list of
known models serves ``scripts/download.py`` and anything that needs a model's sizes without its files.
"""

import json
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from lit_gpt.errors import UserError, reading

UNQUANTIZED = "get the unquantized model that they were made of; finetuning quantizes it with --quantize bnb.nf4"


@dataclass
class Config:
    """Sizes and switches of a decoder-only transformer, in Lit-GPT's terms.

    Grouped-query attention shares one key and one value head among ``n_head / n_query_groups`` query heads: all
    heads have their own at ``n_query_groups == n_head`` (MHA), all share one at ``1`` (MQA).
    """

    name: str = ""
    """The model's name, for people."""
    architecture: str = "LlamaForCausalLM"
    """The Hugging Face class whose weights these are; empty where none that is known here has such layers."""
    block_size: int = 4096
    """Longest context, in tokens."""
    vocab_size: int = 32000
    """Ids that the tokenizer uses; the rows above it are padding."""
    padded_vocab_size: int = 0
    """Rows of the embedding and the head; 0 means ``vocab_size``."""
    n_layer: int = 32
    n_head: int = 32
    n_embd: int = 4096
    n_query_groups: int = 0
    """Key/value heads; 0 means one for each query head."""
    head_size: int = 0
    """Size of one head; 0 means ``n_embd / n_head``."""
    intermediate_size: int = 11008
    """Width of the MLP."""
    mlp_class: str = "LLaMAMLP"
    """``LLaMAMLP`` (SwiGLU), ``GptNeoxMLP`` (GELU) or ``LLaMAMoE`` (SwiGLU experts)."""
    gelu_approximate: str = "none"
    """``none`` or ``tanh``, for ``GptNeoxMLP``."""
    n_expert: int = 0
    n_expert_per_token: int = 0
    norm_class: str = "RMSNorm"
    """``RMSNorm`` or ``LayerNorm``."""
    norm_eps: float = 1e-5
    parallel_residual: bool = False
    """Attention and MLP read the same residual stream instead of following each other."""
    shared_attention_norm: bool = False
    """The MLP of a parallel block reads the attention's norm (Phi)."""
    qkv_bias: bool = False
    proj_bias: bool = False
    mlp_bias: bool = False
    lm_head_bias: bool = False
    rotary_percentage: float = 1.0
    """Share of each head that is rotated."""
    rope_base: float = 10000.0
    rope_scaling: dict[str, Any] | None = None
    """Hugging Face's ``rope_scaling`` of type ``linear`` or ``llama3``."""
    sliding_window: int | None = None
    """A query sees this many positions, itself included; all of them when absent."""
    tie_embeddings: bool = False
    """Embedding and head are one tensor."""

    def __post_init__(self) -> None:
        self._check_types()
        self.padded_vocab_size = self.padded_vocab_size or self.vocab_size
        self.n_query_groups = self.n_query_groups or self.n_head
        self.head_size = self.head_size or self.n_embd // self.n_head
        if self.n_head % self.n_query_groups:
            raise UserError(f"n_head {self.n_head} is not a multiple of n_query_groups {self.n_query_groups}")
        kind = (self.rope_scaling or {}).get("rope_type", "default")
        if kind not in ("default", "linear", "llama3"):
            raise UserError(f"{self.name or 'model'}: rope scaling '{kind}' is not supported (linear and llama3 are)")

    def _check_types(self) -> None:
        """Raise where a field of a config file is of another type than its default, or a size cannot be one."""
        for field in fields(self):
            value, plain = getattr(self, field.name), type(field.default)
            right = isinstance(value, (int, float) if plain is float else plain) or field.default is None
            least = int(plain is int and field.default > 0)  # 0 stands for another field's value, or for none
            if not right or (plain is int and not least <= value < 2**31):
                kind = f"an integer of at least {least}" if plain is int else f"a {plain.__name__}"
                raise UserError(f"{self.name or 'model'}: {field.name} is {value!r}, expected {kind}")

    @property
    def q_size(self) -> int:
        """Rows of the query projection."""
        return self.n_head * self.head_size

    @property
    def kv_size(self) -> int:
        """Rows of the key projection, and of the value projection."""
        return self.n_query_groups * self.head_size

    @property
    def rope_n_elem(self) -> int:
        """How many elements of a head are rotated."""
        return int(self.rotary_percentage * self.head_size)

    @classmethod
    def from_name(cls, name: str, **overrides: Any) -> "Config":
        """The sizes of a known model.

        Args:
            name: a repo id of ``KNOWN_MODELS``, or its last part (``Llama-2-7b-hf``).
            overrides: fields to change, such as ``n_layer=2``.
        """
        for repo_id, sizes in KNOWN_MODELS.items():
            if name in (repo_id, repo_id.split("/")[1]):
                return cls(**{**sizes, "name": repo_id.split("/")[1], **overrides})
        raise UserError(f"'{name}' is not a known model; `python scripts/download.py` lists those known")

    @classmethod
    def from_hf(cls, hf: dict[str, Any], name: str = "") -> "Config":
        """Read a Hugging Face ``config.json``.

        Args:
            hf: the parsed file; older and newer spellings (``rope_theta``, ``rope_parameters``) are understood.
            name: the model's name, for people.
        """
        with reading(f"config.json of {name or 'a model'}"):
            return cls._from_hf(hf, name)

    @classmethod
    def _from_hf(cls, hf: dict[str, Any], name: str) -> "Config":
        if isinstance(hf.get("architectures"), str):
            hf = {**hf, "architectures": [hf["architectures"]]}
        architecture = (hf.get("architectures") or [None])[0]
        if architecture not in ARCHITECTURES:
            raise UserError(
                f"{name or 'model'}: architecture {architecture} is not supported; "
                f"supported: {', '.join(ARCHITECTURES)}"
            )
        try:
            return ARCHITECTURES[architecture](hf, name)
        except KeyError as error:
            raise UserError(f"{name or 'model'}: config.json of a {architecture} has no {error}") from error

    @classmethod
    def from_json(cls, path: Path | str) -> "Config":
        """Read a ``lit_config.json``, ours or one written by the original code (whose extra fields are dropped)."""
        path = Path(path)
        try:
            stored = json.loads(path.read_text(encoding="utf-8"))
            assert isinstance(stored, dict)
        except (json.JSONDecodeError, UnicodeDecodeError, AssertionError) as error:
            raise UserError(f"{path} is not a JSON object ({error}); convert the checkpoint again") from error
        with reading(path):
            return cls.from_dict(stored)

    @classmethod
    def from_dict(cls, stored: dict[str, Any]) -> "Config":
        """Build from ``to_dict``'s output or from the original code's fields."""
        stored = dict(stored)
        if "_mlp_class" in stored:
            for old, new in (("_mlp_class", "mlp_class"), ("_norm_class", "norm_class")):
                stored[new] = stored.pop(old)
            stored |= dict.fromkeys(("qkv_bias", "proj_bias", "mlp_bias"), stored["bias"])
            stored["architecture"] = _original_architecture(stored)
            if stored.get("rope_condense_ratio", 1) != 1:
                stored["rope_scaling"] = {"rope_type": "linear", "factor": float(stored["rope_condense_ratio"])}
        known = {field.name for field in fields(cls)}
        return cls(**{key: value for key, value in stored.items() if key in known})

    def to_dict(self) -> dict[str, Any]:
        """Plain types, for JSON."""
        return asdict(self)


def _original_architecture(stored: dict[str, Any]) -> str:
    """The Hugging Face class of a model that the original code describes; empty where no class here has such layers."""
    layers = (stored["norm_class"], stored["mlp_class"], stored["bias"])
    if stored.get("scale_embeddings") or layers[1] not in ("LLaMAMLP", "LLaMAMoE", "GptNeoxMLP"):
        raise UserError(
            f"{stored.get('name')}: layers of the original code that are not supported here ({layers[1]}; Gemma)"
        )
    phi = {stored.get("shared_attention_norm", False), stored.get("lm_head_bias", False)}
    if layers == ("LayerNorm", "GptNeoxMLP", True) and len(phi) == 1:
        return "PhiForCausalLM" if phi == {True} else "GPTNeoXForCausalLM"
    llamas = {"LLaMAMLP": "LlamaForCausalLM", "LLaMAMoE": "MixtralForCausalLM"}
    return llamas.get(layers[1], "") if layers[::2] == ("RMSNorm", False) and phi == {False} else ""


def check_unquantized(hf: dict[str, Any], name: str) -> None:
    """Raise where a ``config.json`` says that the weights beside it are quantized."""
    how = isinstance(hf, dict) and (hf.get("quantization_config") or hf.get("compression_config"))
    if how:
        method = how.get("quant_method", "bitsandbytes") if isinstance(how, dict) else how
        raise UserError(f"{name}: its weights are quantized ({method}); {UNQUANTIZED}")


def _shared_fields(hf: dict[str, Any], name: str) -> dict[str, Any]:
    """What every architecture's ``config.json`` says in the same words."""
    rope = dict(hf.get("rope_parameters") or hf.get("rope_scaling") or {})
    rope.setdefault("rope_type", rope.pop("type", "default"))
    rope_base = rope.pop("rope_theta", hf.get("rope_theta", hf.get("rotary_emb_base", 10000.0)))
    fraction = rope.pop("partial_rotary_factor", hf.get("partial_rotary_factor", hf.get("rotary_pct")))
    return {
        "name": name,
        "architecture": hf["architectures"][0],
        "block_size": hf["max_position_embeddings"],
        "vocab_size": hf["vocab_size"],
        "n_layer": hf["num_hidden_layers"],
        "n_head": hf["num_attention_heads"],
        "n_embd": hf["hidden_size"],
        "n_query_groups": hf.get("num_key_value_heads") or 0,
        "head_size": hf.get("head_dim") or 0,
        "intermediate_size": hf["intermediate_size"],
        "rope_base": float(rope_base),
        "rope_scaling": rope if rope["rope_type"] != "default" else None,
        "rotary_percentage": 1.0 if fraction is None else fraction,
        "tie_embeddings": hf.get("tie_word_embeddings", False),
    }


def _gelu(hf: dict[str, Any], default: str) -> str:
    """Which GELU ``hidden_act`` names."""
    kinds = {"gelu": "none", "gelu_new": "tanh", "gelu_pytorch_tanh": "tanh", "gelu_fast": "tanh"}
    activation = hf.get("hidden_act", default)
    if activation not in kinds:
        raise UserError(f"hidden_act '{activation}' is not supported; supported: {', '.join(kinds)}")
    return kinds[activation]


def _silu_only(hf: dict[str, Any]) -> None:
    if hf.get("hidden_act", "silu") != "silu":
        raise UserError(f"hidden_act '{hf['hidden_act']}' is not supported for {hf['architectures'][0]} (silu is)")


# The defaults in these readers are those of the transformers classes: a config.json leaves out what equals them.


def _llama(hf: dict[str, Any], name: str) -> Config:
    _silu_only(hf)
    attention_bias = hf.get("attention_bias", False)
    return Config(
        **_shared_fields(hf, name),
        norm_eps=hf.get("rms_norm_eps", 1e-6),
        qkv_bias=attention_bias,
        proj_bias=attention_bias,
        mlp_bias=hf.get("mlp_bias", False),
    )


def _mistral(hf: dict[str, Any], name: str) -> Config:
    _silu_only(hf)
    hf = {"num_key_value_heads": 8, **hf}
    return Config(
        **_shared_fields(hf, name), norm_eps=hf.get("rms_norm_eps", 1e-6), sliding_window=hf.get("sliding_window", 4096)
    )


def _mixtral(hf: dict[str, Any], name: str) -> Config:
    _silu_only(hf)
    hf = {"num_key_value_heads": 8, "rope_theta": 1e6, **hf}
    return Config(
        **_shared_fields(hf, name),
        norm_eps=hf.get("rms_norm_eps", 1e-5),
        sliding_window=hf.get("sliding_window"),
        mlp_class="LLaMAMoE",
        n_expert=hf.get("num_local_experts", 8),
        n_expert_per_token=hf.get("num_experts_per_tok", 2),
    )


def _gpt_neox(hf: dict[str, Any], name: str) -> Config:
    attention_bias = hf.get("attention_bias", True)
    shared = _shared_fields(hf, name)
    if "rope_parameters" not in hf and "rotary_pct" not in hf:
        shared["rotary_percentage"] = 0.25
    return Config(
        **shared,
        norm_class="LayerNorm",
        norm_eps=hf.get("layer_norm_eps", 1e-5),
        mlp_class="GptNeoxMLP",
        gelu_approximate=_gelu(hf, "gelu"),
        parallel_residual=hf.get("use_parallel_residual", True),
        qkv_bias=attention_bias,
        proj_bias=attention_bias,
        mlp_bias=True,
    )


def _phi(hf: dict[str, Any], name: str) -> Config:
    if hf.get("qk_layernorm", False):
        raise UserError(f"{name or 'model'}: qk_layernorm is not supported")
    shared = _shared_fields(hf, name)
    if "rope_parameters" not in hf and "partial_rotary_factor" not in hf:
        shared["rotary_percentage"] = 0.5
    return Config(
        **shared,
        norm_class="LayerNorm",
        norm_eps=hf.get("layer_norm_eps", 1e-5),
        mlp_class="GptNeoxMLP",
        gelu_approximate=_gelu(hf, "gelu_new"),
        parallel_residual=True,
        shared_attention_norm=True,
        qkv_bias=True,
        proj_bias=True,
        mlp_bias=True,
        lm_head_bias=True,
    )


# The door for further architectures: a reader here, a table of names in hf.py.
ARCHITECTURES = {
    "LlamaForCausalLM": _llama,
    "MistralForCausalLM": _mistral,
    "MixtralForCausalLM": _mixtral,
    "GPTNeoXForCausalLM": _gpt_neox,
    "PhiForCausalLM": _phi,
}


def _sizes(n_layer: int, n_head: int, n_embd: int, intermediate_size: int, **rest: Any) -> dict[str, Any]:
    return dict(n_layer=n_layer, n_head=n_head, n_embd=n_embd, intermediate_size=intermediate_size, **rest)


def _known_models() -> dict[str, dict[str, Any]]:
    llama3 = dict(vocab_size=128256, rope_base=500000.0, block_size=8192, n_query_groups=8)
    scaled = dict(factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=8192)
    llama31 = {**llama3, "block_size": 131072, "rope_scaling": {"rope_type": "llama3", **scaled}}
    llama32 = {**llama31, "rope_scaling": {"rope_type": "llama3", **scaled, "factor": 32.0}, "tie_embeddings": True}
    smol = dict(vocab_size=49152, rope_base=100000.0, block_size=8192, tie_embeddings=True)
    neox = dict(architecture="GPTNeoXForCausalLM", norm_class="LayerNorm", mlp_class="GptNeoxMLP", block_size=2048)
    neox |= dict(qkv_bias=True, proj_bias=True, mlp_bias=True, parallel_residual=True, rotary_percentage=0.25)
    neox |= dict(vocab_size=50277)
    phi = {**neox, "architecture": "PhiForCausalLM", "gelu_approximate": "tanh", "lm_head_bias": True}
    phi |= dict(shared_attention_norm=True, vocab_size=50295, padded_vocab_size=51200)
    mistral = dict(architecture="MistralForCausalLM", n_query_groups=8, block_size=32768)
    mixtral = dict(architecture="MixtralForCausalLM", n_query_groups=8, block_size=32768, rope_base=1e6)
    mixtral |= dict(mlp_class="LLaMAMoE", n_expert=8, n_expert_per_token=2)

    llama2 = {"7b": _sizes(32, 32, 4096, 11008), "13b": _sizes(40, 40, 5120, 13824)}
    llama2["70b"] = _sizes(80, 64, 8192, 28672, n_query_groups=8)
    models = {f"meta-llama/Llama-2-{size}{kind}-hf": llama2[size] for size in llama2 for kind in ("", "-chat")}
    models["huggyllama/llama-7b"] = _sizes(32, 32, 4096, 11008, block_size=2048, norm_eps=1e-6)
    models["huggyllama/llama-13b"] = _sizes(40, 40, 5120, 13824, block_size=2048, norm_eps=1e-6)
    for kind in ("", "-Instruct"):
        models[f"meta-llama/Meta-Llama-3-8B{kind}"] = _sizes(32, 32, 4096, 14336, **llama3)
        models[f"meta-llama/Meta-Llama-3-70B{kind}"] = _sizes(80, 64, 8192, 28672, **llama3)
        models[f"meta-llama/Llama-3.1-8B{kind}"] = _sizes(32, 32, 4096, 14336, **llama31)
        models[f"meta-llama/Llama-3.2-1B{kind}"] = _sizes(16, 32, 2048, 8192, **llama32)
        models[f"meta-llama/Llama-3.2-3B{kind}"] = _sizes(28, 24, 3072, 8192, **llama32)
        models[f"HuggingFaceTB/SmolLM2-135M{kind}"] = _sizes(30, 9, 576, 1536, n_query_groups=3, **smol)
        models[f"HuggingFaceTB/SmolLM2-360M{kind}"] = _sizes(32, 15, 960, 2560, n_query_groups=5, **smol)
        models[f"HuggingFaceTB/SmolLM2-1.7B{kind}"] = _sizes(24, 32, 2048, 8192, **{**smol, "rope_base": 130000.0})
    for tail in ("intermediate-step-1431k-3T", "Chat-v1.0"):
        tiny = _sizes(22, 32, 2048, 5632, n_query_groups=4, block_size=2048)
        models[f"TinyLlama/TinyLlama-1.1B-{tail}"] = tiny
    pythia = {"14m": _sizes(6, 4, 128, 512), "70m": _sizes(6, 8, 512, 2048), "160m": _sizes(12, 12, 768, 3072)}
    pythia |= {"410m": _sizes(24, 16, 1024, 4096), "1b": _sizes(16, 8, 2048, 8192), "1.4b": _sizes(24, 16, 2048, 8192)}
    pythia |= {"2.8b": _sizes(32, 32, 2560, 10240), "6.9b": _sizes(32, 32, 4096, 16384)}
    pythia["12b"] = _sizes(36, 40, 5120, 20480)
    rows = {"6.9b": 50432, "12b": 50688}  # the embedding's padding grew with the number of GPUs it was trained on
    for size in pythia:
        models[f"EleutherAI/pythia-{size}"] = {**neox, "padded_vocab_size": rows.get(size, 50304), **pythia[size]}
    models["microsoft/phi-1_5"] = {**phi, "rotary_percentage": 0.5, **_sizes(24, 32, 2048, 8192)}
    models["microsoft/phi-2"] = {**phi, "rotary_percentage": 0.4, **_sizes(32, 32, 2560, 10240)}
    models["mistralai/Mistral-7B-v0.1"] = _sizes(32, 32, 4096, 14336, sliding_window=4096, **mistral)
    for version in ("v0.2", "v0.3"):
        words = {"vocab_size": 32768} if version == "v0.3" else {}
        sizes = _sizes(32, 32, 4096, 14336, **mistral, rope_base=1e6, **words)
        models[f"mistralai/Mistral-7B-Instruct-{version}"] = sizes
    for kind in ("", "-Instruct"):
        models[f"mistralai/Mixtral-8x7B{kind}-v0.1"] = _sizes(32, 32, 4096, 14336, **mixtral)
    return models


KNOWN_MODELS: dict[str, dict[str, Any]] = _known_models()
"""Sizes of the models that have a name here, by Hugging Face repo id."""
