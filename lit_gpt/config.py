"""Describe a model in one dataclass, read from a known name, a Hugging Face ``config.json`` or our own JSON.

A ``Config`` says what the model *is* (sizes, norms, rotary embedding), never what is done with it. A model that
nobody listed works when its class is in ``families``: ``Config.from_hf`` reads the file that comes with it. The list
of known models says what their ``config.json`` says, for whoever needs a model's sizes without its files.
"""

from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Annotated, Any, get_origin

from lit_gpt.errors import UserError, reading
from lit_gpt.families import FAMILIES, REMOTE_CODE, ROUTE, UNSUPPORTED, Family
from lit_gpt.files import read_json

SIZES = ("vocab_size", "n_embd", "intermediate_size", "n_layer", "n_head", "block_size")
"""Fields that every ``config.json`` tells. Of other whole numbers 0 stands for another field's value, or for none."""
GELUS = {"gelu": "none", "gelu_new": "tanh", "gelu_pytorch_tanh": "tanh", "gelu_fast": "tanh"}
"""Names of a GELU in ``config.json``, with PyTorch's name of its approximation."""
UNQUANTIZED = "get the unquantized model that they were made of; finetuning quantizes it with --quantize bnb.nf4"


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
    """The Hugging Face class whose weights these are; empty where none that is known here has such layers."""
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
    """``LLaMAMLP`` (SwiGLU), ``GptNeoxMLP`` (GELU) or ``LLaMAMoE`` (SwiGLU experts)."""
    gelu_approximate: Annotated[str, "hidden_act"] = "none"
    """``none`` or ``tanh``, for ``GptNeoxMLP``."""
    n_expert: Annotated[int, "num_local_experts"] = 0
    n_expert_per_token: Annotated[int, "num_experts_per_tok"] = 0
    norm_class: str = "RMSNorm"
    """``RMSNorm`` or ``LayerNorm``."""
    norm_eps: Annotated[float, "rms_norm_eps"] = 1e-5
    parallel_residual: Annotated[bool, "use_parallel_residual"] = False
    """Attention and MLP read the same residual stream instead of following each other."""
    shared_attention_norm: bool = False
    """The MLP of a parallel block reads the attention's norm (Phi)."""
    qkv_bias: Annotated[bool, "attention_bias"] = False
    proj_bias: Annotated[bool, "attention_bias"] = False
    mlp_bias: Annotated[bool, "mlp_bias"] = False
    lm_head_bias: bool = False
    qk_norm: bool = False
    """An RMSNorm over each head of q and of k, before they are rotated (Qwen3)."""
    rotary_percentage: Annotated[float, "partial_rotary_factor"] = 1.0
    """Share of each head that is rotated."""
    rope_base: Annotated[float, "rope_theta"] = 10000.0
    rope_scaling: Annotated[dict[str, Any] | None, "rope_scaling"] = None
    """Hugging Face's ``rope_scaling`` of type ``linear`` or ``llama3``."""
    sliding_window: Annotated[int | None, "sliding_window"] = None
    """A query sees this many positions, itself included; all of them when absent."""
    tie_embeddings: Annotated[bool, "tie_word_embeddings"] = False
    """Embedding and head are one tensor."""

    def __post_init__(self) -> None:
        name = self.name or "model"
        for each in fields(self):  # a config file may hold anything
            value, plain, least = getattr(self, each.name), type(each.default), int(each.name in SIZES)
            right = isinstance(value, (int, float) if plain is float else plain) or each.default is None
            if not right or (plain is int and not least <= value < 2**31):
                kind = f"an integer of at least {least}" if plain is int else f"a {plain.__name__}"
                raise UserError(f"{name}: {each.name} is {value!r}, expected {kind}")
            if plain is float:
                setattr(self, each.name, float(value))
        self.padded_vocab_size = self.padded_vocab_size or self.vocab_size
        self.n_query_groups = self.n_query_groups or self.n_head
        self.head_size = self.head_size or self.n_embd // self.n_head
        if self.n_head % self.n_query_groups:
            raise UserError(f"n_head {self.n_head} is not a multiple of n_query_groups {self.n_query_groups}")
        kind = (self.rope_scaling or {}).get("rope_type", "default")
        if kind not in ("default", "linear", "llama3"):
            raise UserError(f"{name}: rope scaling '{kind}' is not supported (linear and llama3 are)")

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
                return cls(**{**known, **_fields_of(described, repo_id), **overrides})
        raise UserError(f"'{name}' is not a known model; `python scripts/download.py` lists those known")

    @classmethod
    def from_hf(cls, described: dict[str, Any], name: str = "") -> "Config":
        """Read a Hugging Face ``config.json``.

        Args:
            described: the parsed file; older and newer spellings (``rope_theta``, ``rope_parameters``) are understood.
            name: the model's name, for people.
        """
        with reading(f"config.json of {name or 'a model'}"):
            return cls(name=name, **_fields_of(described, name or "model"))

    def to_hf(self) -> dict[str, Any]:
        """Return a ``config.json`` for transformers, the inverse of ``from_hf``; for folders that have none.

        Spelled as transformers 4 did (``rope_theta`` at the top): its later versions, vLLM and llama.cpp read that too.
        """
        family = FAMILIES[self.architecture]
        usual = (family.defaults["gelu_approximate"], *GELUS)
        gelu = next(name for name in usual if GELUS.get(name) == self.gelu_approximate)
        return {
            "architectures": [self.architecture],
            "model_type": family.model_type,
            **{key: getattr(self, ours) for ours, key in _keys(family).items()},
            "rope_theta": self.rope_base,
            "vocab_size": self.padded_vocab_size,
            "hidden_act": gelu if self.mlp_class == "GptNeoxMLP" else "silu",
        }

    @classmethod
    def from_json(cls, path: Path | str) -> "Config":
        """Read a ``lit_config.json``, ours or one written by the original code (whose extra fields are dropped)."""
        with reading(path):
            stored = read_json(path)
            if not isinstance(stored, dict):
                raise UserError(f"{path} is not a JSON object; convert the checkpoint again")
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
        known = {each.name for each in fields(cls)}
        return cls(**{key: value for key, value in stored.items() if key in known})

    def to_dict(self) -> dict[str, Any]:
        """Return plain types, for JSON."""
        return asdict(self)


def _keys(family: Family) -> dict[str, str]:
    """Return the fields of ``Config`` that a ``config.json`` of this class tells, each with its key there."""
    keys = {each.name: each.type.__metadata__[0] for each in fields(Config) if get_origin(each.type) is Annotated}
    return {name: key for name, key in (keys | family.own_keys).items() if name in SIZES or name in family.defaults}


def _original_architecture(stored: dict[str, Any]) -> str:
    """Return the Hugging Face class with the layers of the original code's config; empty where none here has them."""
    if stored.get("scale_embeddings") or stored["mlp_class"] not in ("LLaMAMLP", "LLaMAMoE", "GptNeoxMLP"):
        name, layers = stored.get("name"), stored["mlp_class"]
        raise UserError(f"{name}: layers of the original code that are not supported here ({layers}; Gemma)")
    telling = "norm_class mlp_class qkv_bias proj_bias mlp_bias lm_head_bias shared_attention_norm qk_norm".split()
    plain = {name: getattr(Config, name) for name in telling}
    for architecture, family in FAMILIES.items():
        usual = {**plain, **family.defaults, **family.constants}
        if all(stored.get(name, plain[name]) == usual[name] for name in telling):
            return architecture
    return ""


def check_supported(hf: dict[str, Any], name: str) -> None:
    """Raise where a model with this ``config.json`` cannot be converted: of another kind, or its weights quantized."""
    Config.from_hf(hf, name)
    how = hf.get("quantization_config") or hf.get("compression_config")
    if how:
        method = how.get("quant_method", "bitsandbytes") if isinstance(how, dict) else how
        raise UserError(f"{name}: its weights are quantized ({method}); {UNQUANTIZED}")


def _fields_of(described: dict[str, Any], name: str) -> dict[str, Any]:
    """Return the fields of ``Config`` that a ``config.json`` tells; ``name`` is for errors."""
    listed = described.get("architectures")
    architecture = listed if isinstance(listed, str) else (listed or [None])[0]
    if architecture not in FAMILIES:
        reasons = [reason for reason, classes in UNSUPPORTED.items() if str(architecture).startswith(classes)]
        reason = next(iter(reasons), REMOTE_CODE if "auto_map" in described else "")
        because = reason and f": {reason}"
        raise UserError(f"{name}: {architecture} is not supported{because}; supported: {', '.join(FAMILIES)}; {ROUTE}")
    if described.get("qk_layernorm"):
        raise UserError(f"{name}: qk_layernorm is not supported")
    if described.get("use_sliding_window"):  # Qwen; its sliding_window says nothing without
        raise UserError(f"{name}: windows in some of the layers (use_sliding_window) are not supported")
    family = FAMILIES[architecture]
    keys = _keys(family)
    found = {ours: described.get(key, family.defaults.get(ours)) for ours, key in keys.items()}
    absent = ", ".join(key for ours, key in keys.items() if ours in SIZES and found[ours] is None)
    if absent:
        raise UserError(f"{name}: config.json of a {architecture} has no {absent}")
    found.setdefault("rotary_percentage", described.get("partial_rotary_factor") or 1.0)
    # transformers 5 keeps all of the rotary embedding in rope_parameters, older versions the rest of it at the top.
    rope = dict(described.get("rope_parameters") or described.get("rope_scaling") or {})
    for key, ours in (("rope_theta", "rope_base"), ("partial_rotary_factor", "rotary_percentage")):
        found[ours] = rope.pop(key, found[ours])
    rope.setdefault("rope_type", rope.pop("type", "default"))
    found["rope_scaling"] = rope if rope["rope_type"] != "default" else None
    activation = found["gelu_approximate"]
    known = GELUS if family.constants.get("mlp_class") == "GptNeoxMLP" else {"silu": "none"}
    if activation not in known:
        choices = ", ".join(known)
        raise UserError(f"{name}: hidden_act '{activation}' of a {architecture} is not supported; supported: {choices}")
    found["gelu_approximate"] = known[activation]
    # null means no window, or that a size follows from the others; our fields say so with None, 0 or False.
    told = {ours: value for ours, value in found.items() if value is not None or getattr(Config, ours)}
    return {"architecture": architecture, **family.constants, **told}


def _names(pattern: str) -> list[str]:
    """Return what a shell makes of braces: ``a{,b}c`` stands for ``ac`` and ``abc``."""
    before, brace, rest = pattern.partition("{")
    choices, _, after = rest.partition("}")
    return [before + choice + end for choice in choices.split(",") for end in _names(after)] if brace else [pattern]


def _read_known_models() -> dict[str, dict[str, Any]]:
    table = read_json(Path(__file__).with_name("known_models.json"))
    models = {}
    for group in table["groups"]:
        for pattern, sizes in group["models"].items():
            told = dict(zip(group.get("columns", table["columns"]), sizes, strict=True))
            models |= {repo_id: {**group["shared"], **told} for repo_id in _names(pattern)}
    return models


KNOWN_MODELS = _read_known_models()
"""The ``config.json`` of the models that have a name here, by repo id, as far as it differs from the class's defaults.

Where the tokenizer has fewer ids than the embedding has rows, the rows are ``padded_vocab_size``, a word of ours.
"""
