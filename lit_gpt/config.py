"""Describe a model in one dataclass, read from a known name, a Hugging Face ``config.json`` or our own JSON.

A ``Config`` says what the model *is* (sizes, norms, rotary embedding), never what is done with it. A model that
nobody listed works when its class is in ``families``: ``Config.from_hf`` reads the file that comes with it. The list
of known models says what their ``config.json`` says, for whoever needs a model's sizes without its files.
"""

import math
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Annotated, Any, NamedTuple, get_args, get_origin, get_type_hints

from lit_gpt.errors import UserError, reading
from lit_gpt.files import read_json
from lit_gpt.hf_config import ORIGINAL_LENGTH, ROPE_SCALING, SIZES, Usual, read_config

NOT_ZERO = (*SIZES, "sliding_window", "rope_base", "logits_scale")
"""Numbers that a model cannot have 0 of."""
UNQUANTIZED = "get the unquantized model that they were made of; finetuning quantizes it with --quantize bnb.nf4"


class LayerKind(NamedTuple):
    """Attention of a layer: ``window`` is None where it sees all positions; ``rope`` is global, local or none."""

    window: int | None
    rope: str


@dataclass
class Config:
    """Sizes and switches of a decoder-only transformer, in Lit-GPT's terms.

    The word beside a field's type is the key that most Hugging Face classes have for it in ``config.json``.
    Grouped-query attention shares one key and one value head among ``n_head / n_query_groups`` query heads: all
    heads have their own at ``n_query_groups == n_head`` (MHA), all share one at ``1`` (MQA).
    """

    name: str = ""
    """The model's name, for people."""
    architecture: str = "LlamaForCausalLM"
    """The Hugging Face class whose weights these are; empty where the original code's file does not tell."""
    block_size: Annotated[int, "max_position_embeddings"] = 4096
    """Longest context, in tokens."""
    vocab_size: Annotated[int, "vocab_size"] = 32000
    """Ids that the tokenizer uses; the rows above it are padding."""
    padded_vocab_size: int = 0
    """Rows of the embedding and the head; 0 means ``vocab_size``."""
    n_layer: Annotated[int, "num_hidden_layers"] = 32
    n_head: Annotated[int, "num_attention_heads"] = 32
    n_embd: Annotated[int, "hidden_size"] = 4096
    n_query_groups: Annotated[int, "num_key_value_heads"] = 0
    """Key/value heads; 0 means one for each query head."""
    head_size: Annotated[int, "head_dim"] = 0
    """Size of one head; 0 means ``n_embd / n_head``."""
    intermediate_size: Annotated[int, "intermediate_size"] = 11008
    """Width of the MLP."""
    mlp_class: str = "LLaMAMLP"
    """``LLaMAMLP`` (SwiGLU), ``GemmaMLP`` (its gate a GELU), ``GptNeoxMLP`` (GELU) or ``LLaMAMoE`` (SwiGLU experts)."""
    gelu_approximate: Annotated[str, "hidden_act"] = "none"
    """``none`` or ``tanh``, of a GELU."""
    n_expert: Annotated[int, "num_local_experts"] = 0
    n_expert_per_token: Annotated[int, "num_experts_per_tok"] = 0
    norm_expert_weights: Annotated[bool, "norm_topk_prob"] = True
    """The weights of a token's experts sum up to 1."""
    norm_class: str = "RMSNorm"
    """``RMSNorm``, ``LayerNorm``, ``OffsetRMSNorm`` (factor 1 + weight: Gemma), ``PlainLayerNorm`` (no weight)."""
    norm_eps: Annotated[float, "rms_norm_eps"] = 1e-5
    parallel_residual: Annotated[bool, "use_parallel_residual"] = False
    """Attention and MLP read the same residual stream instead of following each other."""
    shared_attention_norm: bool = False
    """The MLP of a parallel block reads the attention's norm (Phi, Falcon-7B)."""
    pre_norm: bool = True
    """Attention and MLP each read a norm of the residual stream."""
    post_norm: bool = False
    """The outputs of attention and MLP are normed before they are added (Gemma 2 and 3; OLMo 2 has this norm alone)."""
    qkv_bias: Annotated[bool, "attention_bias"] = False
    proj_bias: Annotated[bool, "attention_bias"] = False
    mlp_bias: Annotated[bool, "mlp_bias"] = False
    lm_head_bias: bool = False
    qkv_clip: Annotated[float | None, "clip_qkv"] = None
    """Largest absolute value of q, k and v (OLMo 1)."""
    qk_norm: bool = False
    """q and k are normed before they are rotated."""
    qk_norm_over: str = "head"
    """One RMSNorm for the ``head`` of each (Qwen 3), a LayerNorm for each of the ``heads`` (StableLM 2), or an RMSNorm
    over the ``row`` of all heads (OLMo 2)."""
    attention_scale: Annotated[float, "attention_multiplier"] = 0.0
    """Factor of the attention's scores; 0 means ``1 / sqrt(head_size)``."""
    attention_softcap: Annotated[float | None, "attn_logit_softcapping"] = None
    """Scores of attention are bent by a tanh to stay below this (Gemma 2)."""
    embedding_scale: Annotated[float, "embedding_multiplier"] = 1.0
    """Factor of the embedding; 0 means ``sqrt(n_embd)`` (Gemma)."""
    residual_scale: Annotated[float, "residual_multiplier"] = 1.0
    """Factor of what attention and MLP add (Granite)."""
    logits_scale: Annotated[float, "logits_scaling"] = 1.0
    """Logits are divided by it (Granite)."""
    logits_softcap: Annotated[float | None, "final_logit_softcapping"] = None
    """Logits are bent by a tanh to stay below this (Gemma 2)."""
    rotary_percentage: Annotated[float, "partial_rotary_factor"] = 1.0
    """Share of each head that is rotated."""
    rope_base: Annotated[float, "rope_theta"] = 10000.0
    rope_scaling: Annotated[dict[str, Any] | None, "rope_scaling"] = None
    """Hugging Face's ``rope_scaling``, of a type that ``rope`` knows."""
    local_rope_base: Annotated[float, "rope_local_base_freq"] = 0.0
    """Base of the layers with a window, which then know no scaling; 0: they rotate as the others do."""
    rope_layers: Annotated[list[bool] | None, "no_rope_layers"] = None
    """True for the layers that rotate q and k; all of them when absent (SmolLM 3 leaves some out)."""
    sliding_window: Annotated[int | None, "sliding_window"] = None
    """A query sees this many positions, itself included; all of them when absent."""
    sliding_layers: Annotated[list[bool] | None, "layer_types"] = None
    """True for the layers with that window; all of them when absent."""
    tie_embeddings: Annotated[bool, "tie_word_embeddings"] = False
    """Embedding and head are one tensor."""

    def __post_init__(self) -> None:
        self._check_values()
        self.padded_vocab_size = self.padded_vocab_size or self.vocab_size
        self.n_query_groups = self.n_query_groups or self.n_head
        self.head_size = self.head_size or self.n_embd // self.n_head
        self.embedding_scale = self.embedding_scale or self.n_embd**0.5
        self._check_rope()
        if self.n_head % self.n_query_groups:
            raise UserError(f"n_head {self.n_head} is not a multiple of n_query_groups {self.n_query_groups}")
        if self.mlp_class == "LLaMAMoE" and not 1 <= self.n_expert_per_token <= self.n_expert:
            raise UserError(f"{self.name}: a token cannot go to {self.n_expert_per_token} of {self.n_expert} experts")
        for flags in ("sliding_layers", "rope_layers"):
            if (given := getattr(self, flags)) is not None:
                if len(given) < self.n_layer:
                    raise UserError(f"{self.name}: {flags} tells of {len(given)} layers; the model has {self.n_layer}")
                given = [bool(flag) for flag in given[: self.n_layer]]
                setattr(self, flags, None if all(given) else given)

    def _check_values(self) -> None:
        """Raise where a field has a value that no model has; a config file may hold anything."""
        for each in fields(self):
            value, plain = getattr(self, each.name), PLAIN_TYPES[each.name]
            if value is None and each.default is None:
                continue
            if plain is float and type(value) is int:
                value = float(value)
                setattr(self, each.name, value)
            right, number = type(value) is plain, plain in (int, float)
            if right and number:
                right = 0 <= value < (2**31 if plain is int else math.inf) and (value or each.name not in NOT_ZERO)
            if not right:
                bound = " above 0" if each.name in NOT_ZERO else ", 0 or more" if number else ""
                raise UserError(f"{self.name or 'model'}: {each.name} is {value!r}, expected {plain.__name__}{bound}")

    def _check_rope(self) -> None:
        """Raise where no position can be rotated in this way."""
        name, n, scaling = self.name or "model", self.rope_n_elem, self.rope_scaling or {"rope_type": "default"}
        if n % 2 or not 2 <= n <= self.head_size:
            raise UserError(f"{name}: {n} of a head's {self.head_size} elements are to be rotated, expected: pairs")
        kind = scaling.get("rope_type", "default")
        if kind not in ROPE_SCALING:
            raise UserError(f"{name}: rope scaling '{kind}' is not supported; supported: {', '.join(ROPE_SCALING)}")
        for key in ROPE_SCALING[kind]:
            value, waves = scaling.get(key), n // 2 if key in ("short_factor", "long_factor") else None
            numbers = value if waves and isinstance(value, list) else [value]
            positive = all(isinstance(number, (int, float)) and 0 < number < math.inf for number in numbers)
            if not positive or len(numbers) != (waves or 1):
                expected = f"{waves} positive numbers" if waves else "a positive number"
                raise UserError(f"{name}: {key} of rope scaling '{kind}' is {value!r:.80}, expected {expected}")

    @property
    def layer_kinds(self) -> list[LayerKind]:
        """Attention of each layer."""
        kinds = []
        for i in range(self.n_layer):
            slides = self.sliding_layers is None or self.sliding_layers[i]
            rotates = self.rope_layers is None or self.rope_layers[i]
            rope = "none" if not rotates else "local" if slides and self.local_rope_base else "global"
            kinds.append(LayerKind(self.sliding_window if slides else None, rope))
        return kinds

    @property
    def q_size(self) -> int:
        """Rows of the query projection."""
        return self.n_head * self.head_size

    @property
    def kv_size(self) -> int:
        """Rows of the key projection, and of the value projection."""
        return self.n_query_groups * self.head_size

    @property
    def qkv_sizes(self) -> tuple[int, int, int]:
        """Rows of the query, key and value projections."""
        return self.q_size, self.kv_size, self.kv_size

    @property
    def rope_n_elem(self) -> int:
        """Number of elements of a head that are rotated."""
        return int(self.rotary_percentage * self.head_size)

    def rope_stretch(self, length: int) -> int:
        """Return the same number for all lengths of text at which a position is rotated alike."""
        scaling = self.rope_scaling or {}
        beyond = length > scaling.get(ORIGINAL_LENGTH, length)
        return {"longrope": int(beyond), "dynamic": length * beyond}.get(scaling.get("rope_type"), 0)

    @classmethod
    def from_name(cls, name: str, **overrides: Any) -> "Config":
        """Return the config of a known model.

        Args:
            name: a repo id of ``KNOWN_MODELS``, or its last part (``Llama-2-7b-hf``).
            overrides: fields to change, such as ``n_layer=2``.
        """
        for repo_id, described in KNOWN_MODELS.items():
            if name in (repo_id, repo_id.split("/")[1]):
                known = {"name": repo_id.split("/")[1], "padded_vocab_size": described.get("padded_vocab_size", 0)}
                return cls(**{**known, **read_config(described, repo_id, USUAL), **overrides})
        raise UserError(f"'{name}' is not a known model; `python scripts/download.py` lists those known")

    @classmethod
    def from_hf(cls, described: dict[str, Any], name: str = "") -> "Config":
        """Read a Hugging Face ``config.json``.

        Args:
            described: the parsed file; older and newer spellings (``rope_theta``, ``rope_parameters``) are understood.
            name: the model's name, for people.
        """
        with reading(f"config.json of {name or 'a model'}"):
            return cls(name=name, **read_config(described, name or "model", USUAL))

    @classmethod
    def from_json(cls, path: Path | str) -> "Config":
        """Read a ``lit_config.json``, ours or one written by the original code (whose extra fields are dropped)."""
        with reading(path):
            stored = read_json(path)
            if "_mlp_class" in stored:
                # It does not tell the Hugging Face class.
                stored |= dict(mlp_class=stored["_mlp_class"], norm_class=stored["_norm_class"], architecture="")
                stored |= dict.fromkeys(("qkv_bias", "proj_bias", "mlp_bias"), stored["bias"])
                if stored.get("scale_embeddings"):  # Gemma
                    stored |= dict(embedding_scale=0.0, norm_class="OffsetRMSNorm", gelu_approximate="tanh")
                if stored.get("rope_condense_ratio", 1) != 1:
                    stored["rope_scaling"] = {"rope_type": "linear", "factor": float(stored["rope_condense_ratio"])}
            known = {each.name for each in fields(cls)}
            return cls(**{key: value for key, value in stored.items() if key in known})

    def to_dict(self) -> dict[str, Any]:
        """Return plain types, for JSON."""
        return asdict(self)


def _plain_type(hint: Any) -> type:
    """Return ``list`` for ``list[bool] | None``, and the like."""
    first = (get_args(hint) or (hint,))[0]
    return get_origin(first) or first


PLAIN_TYPES = {name: _plain_type(hint) for name, hint in get_type_hints(Config).items()}
"""Of the fields of ``Config``."""


USUAL: Usual = {
    each.name: (each.type.__metadata__[0], each.default)
    for each in fields(Config)
    if get_origin(each.type) is Annotated
}


def check_supported(described: dict[str, Any], name: str) -> Config:
    """Return the config of a model that can be converted, or raise: it is of another kind, or its weights quantized."""
    config = Config.from_hf(described, name)
    how = described.get("quantization_config") or described.get("compression_config")
    if how:
        method = how.get("quant_method", "bitsandbytes") if isinstance(how, dict) else how
        raise UserError(f"{name}: its weights are quantized ({method}); {UNQUANTIZED}")
    return config


def _read_known_models() -> dict[str, dict[str, Any]]:
    table = read_json(Path(__file__).with_name("known_models.json"))
    models = {}
    for group in table["groups"]:
        for repo_id, sizes in group["models"].items():
            models[repo_id] = group["shared"] | dict(zip(group.get("columns", table["columns"]), sizes, strict=True))
    return models


KNOWN_MODELS = _read_known_models()
"""The ``config.json`` of the models that have a name here, by repo id, as far as it differs from the class's defaults.

Where the tokenizer has fewer ids than the embedding has rows, the rows are ``padded_vocab_size``, a word of ours.
"""
