"""ETHER and ETHER+ as a method of PEFT, for any model of transformers: import this, then use PEFT as ever.

    import lit_gpt.peft_ether as ether
    model = peft.get_peft_model(model, ether.EtherPeftConfig(method="etherplusHH", n=4, target_modules="all-linear"))

``PeftModel.from_pretrained`` reads what ``save_pretrained`` wrote once this is imported. The maths is that of
``reflections``; nothing else of ours imports this file, and it knows no model, no file of ours and no training loop.

Notable choices:
- Layers act on activations, and call the layer that they wrap: quantized ones need nothing of their own.
- Vectors stay in fp32, whatever casts the model: small late updates would be rounded away.
- ETHER+'s R may have no inverse, so unmerging subtracts the thin factors that merging added.
- Modules named in ``qkv_modules`` are one Linear each: a fused q, k, v has one adapter, on its output.
"""

import math
import warnings
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from enum import Enum
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lit_gpt.adapter import is_finite
from lit_gpt.errors import Problems, UserError
from lit_gpt.ether import METHODS, Vectors, check_sizes
from lit_gpt.reflections import reflection_factors, working_dtype

try:
    import peft
    from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_PREFIX_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING
    from peft.tuners.tuners_utils import (
        BaseTuner,
        BaseTunerLayer,
        _maybe_include_all_linear_layers,
        check_adapters_to_merge,
    )
    from peft.utils import (
        TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING,
        get_quantization_kwargs,
        resolve_quantization_backend,
    )
    from peft.utils.other import get_pattern_key
    from transformers.pytorch_utils import Conv1D
except ImportError as error:
    raise ImportError(
        f"lit_gpt.peft_ether needs PEFT 0.21 or newer, and transformers: pip install 'peft>=0.21' ({error})"
    ) from error

SIDES = ("input", "output")
PREFIX = "ether_"
"""Names of adapter parameters begin so; PEFT finds them by it."""
QKV_MODULES = ("q_proj", "k_proj", "v_proj", "q", "k", "v", "query", "key", "value")
FUSED_QKV_MODULES = ("query_key_value", "qkv_proj", "c_attn", "Wqkv", "qkv")


class EtherType(str, Enum):
    """The name of the method in PEFT's tables; they take a type of another package."""

    ETHER = "ETHER"


@dataclass
class EtherPeftConfig(peft.PeftConfig):
    """Settings of ETHER and ETHER+ in PEFT; ``adapter_config.json`` holds all of them."""

    method: str = "etherplusHH"
    """ether, etherplus (one-sided) or etherplusHH (two-sided, the paper's ETHER+)."""
    n: int = 1
    """Number of diagonal blocks."""
    n_pattern: dict[str, int] = field(default_factory=dict)
    """Number of blocks of modules whose names end with, or match as regular expressions, the keys."""
    target_modules: list[str] | str | None = None
    """Names (or their ends) of the Linears to adapt, one regular expression, or "all-linear"; by default LoRA's."""
    exclude_modules: list[str] | str | None = None
    """Names (or their ends) of modules that stay as they are, or one regular expression."""
    qkv_modules: list[str] = field(default_factory=lambda: [*QKV_MODULES, *FUSED_QKV_MODULES])
    """Last parts of the names of modules that make queries, keys or values.

    One-sided methods act on the output of these and on the input of all others."""
    flip_side: bool = False
    """Move the one-sided transform of other modules to the output where it is the smaller side."""
    dropout: float = 0.0
    """Dropout on the input of adapted layers."""
    block_dropout: float = 0.0
    """Probability with which a block's R is replaced by I while training; no small change for ether."""
    init_weights: bool = True
    """Start ETHER+ at the identity; False draws v as u is drawn, for tests."""
    layers_to_transform: list[int] | int | None = None
    """Indices of the layers to adapt; all by default."""
    layers_pattern: list[str] | str | None = None
    """Name of the list of layers that ``layers_to_transform`` counts in."""
    modules_to_save: list[str] | None = None
    """Names of modules that are trained in full and saved beside the adapter."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = EtherType.ETHER
        methods = [name for name, method in METHODS.items() if not method.matrices]
        problems = Problems()
        problems.expect(self.method in methods, f"method {self.method!r} is unknown; choices: {', '.join(methods)}")
        for name, n in {"n": self.n, **self.n_pattern}.items():
            problems.expect(isinstance(n, int) and n >= 1, f"{name} is {n}; the number of blocks is at least 1")
        for name in ("dropout", "block_dropout"):
            problems.expect(0 <= getattr(self, name) < 1, f"{name} must be in [0, 1), got {getattr(self, name)}")
        one_sided = self.method in METHODS and not METHODS[self.method].two_sided
        problems.expect(one_sided or not self.flip_side, f"flip_side has no meaning for {self.method}: it is two-sided")
        indices = self.layers_to_transform is not None
        names = isinstance(self.target_modules, list | set | tuple | None)
        problems.expect(names or not indices, "layers_to_transform goes with a list of target_modules, not with a str")
        problems.expect(indices or not self.layers_pattern, "layers_pattern has no meaning without layers_to_transform")
        problems.check()
        for name in ("target_modules", "exclude_modules"):
            if isinstance(getattr(self, name), list | tuple):
                setattr(self, name, set(getattr(self, name)))

    def is_qkv(self, name: str) -> bool:
        """Return True for the name of a module that makes queries, keys or values."""
        return name.rpartition(".")[2] in self.qkv_modules

    def sides(self, name: str, sizes: dict[str, int]) -> tuple[str, ...]:
        """Return the sides of a module that are transformed; ``sizes`` are those of its input and output."""
        if METHODS[self.method].two_sided:
            return SIDES
        flipped = self.flip_side and sizes["output"] < sizes["input"]
        return ("output",) if self.is_qkv(name) or flipped else ("input",)

    def blocks(self, name: str) -> int:
        """Return n of a module."""
        return self.n_pattern.get(get_pattern_key(self.n_pattern, name), self.n)


class VectorDict(nn.ParameterDict):
    """One of the vectors of a side, by adapter; no cast of the model makes them 16 bits wide."""

    def _apply(self, fn: Any, recurse: bool = True) -> "VectorDict":
        return super()._apply(lambda tensor: tensor.to(fn(tensor).device), recurse)

    def restore_fp32(self) -> None:
        """Undo a cast to 16 bits by someone who wrote to the parameters themselves, as TRL does for QLoRA."""
        for parameter in self.values():
            parameter.data = parameter.data.to(working_dtype(parameter.dtype))


class EtherLinear(nn.Module, BaseTunerLayer):
    """A Linear (a quantized one, or a Conv1D of transformers) with ETHER or ETHER+ around it, once per adapter.

    With several active adapters the second one acts on what the first one has made of the weight, and so on.
    """

    adapter_layer_names = tuple(f"{PREFIX}{vector}_{side}" for side in SIDES for vector in "uv")
    other_param_names = ("settings",)

    def __init__(self, base_layer: nn.Module, *, tied: bool, quantization: dict[str, Any]) -> None:
        super().__init__()
        self.base_layer, self.tied = base_layer, tied
        self.settings: dict[str, tuple[EtherPeftConfig, int]] = {}  # with n
        self.merged_adapters, self._merged = [], []
        base = self.get_base_layer()
        self.quantization_backend = resolve_quantization_backend(base, **quantization)
        self.in_features, self.out_features = side_sizes(base).values()
        for name in self.adapter_layer_names:
            setattr(self, name, VectorDict())

    def update_layer(self, adapter_name: str, config: EtherPeftConfig, name: str) -> None:
        """Give the layer one more adapter, with vectors as training starts from them.

        Args:
            adapter_name: the adapter's.
            config: its settings.
            name: the module's, which decides sides and n.
        """
        n, sizes = config.blocks(name), {"input": self.in_features, "output": self.out_features}
        device, dtype = self._get_base_layer_device_and_dtype(self.get_base_layer())
        factory = {"device": device, "dtype": working_dtype(dtype)}
        for side in config.sides(name, sizes):
            # What the original code draws, which its learning rates depend on: see ether.py.
            bound = 1 / math.sqrt(sizes[side] if config.is_qkv(name) else sizes[side] // n)
            u, v = torch.empty(2, n, sizes[side] // n, **factory).uniform_(-bound, bound).unbind()
            v = -u if config.init_weights else v
            for vector, start in zip("uv"[: METHODS[config.method].tensors], (u, v), strict=False):
                getattr(self, f"{PREFIX}{vector}_{side}")[adapter_name] = nn.Parameter(start.clone())
        self.settings[adapter_name] = (config, n)

    def vectors(self, adapter_name: str) -> dict[str, Vectors]:
        """Return u, or u and v, (n, b) each, of the sides that an adapter transforms."""
        dicts = {side: [getattr(self, f"{PREFIX}{vector}_{side}") for vector in "uv"] for side in SIDES}
        found = {side: tuple(d[adapter_name] for d in both if adapter_name in d) for side, both in dicts.items()}
        return {side: vectors for side, vectors in found.items() if vectors}

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Return R_out(W(R_in x)) + b: (..., in) to (..., out)."""
        if self.disable_adapters and self.merged:
            self.unmerge()
        if self.disable_adapters or self.merged:
            return self.base_layer(x, *args, **kwargs)
        active = [name for name in self.active_adapters if name in self.settings]
        for name in reversed(active):
            x = self.transform(name, "input", F.dropout(x, self.settings[name][0].dropout, self.training))
        y = self.base_layer(x, *args, **kwargs)
        for name in active:
            y = self.transform(name, "output", y)
        return y

    def transform(self, adapter_name: str, side: str, x: Tensor) -> Tensor:
        """Return R x on one side, around the bias on the output: (..., size) to (..., size)."""
        vectors = self.vectors(adapter_name).get(side)
        if vectors is None:
            return x
        config, n = self.settings[adapter_name]
        output = side == "output"
        bias = self.get_base_layer().bias if output else None
        mask = None
        if config.block_dropout and self.training:
            mask = (torch.rand(n, 1, device=x.device) >= config.block_dropout).float()
        center = None if bias is None else bias.to(x.dtype).unflatten(-1, (n, -1))
        y = METHODS[config.method].apply(
            x.unflatten(-1, (n, -1)), vectors, center=center, block_mask=mask, save_output=output
        )
        return y.flatten(-2)

    @torch.no_grad()
    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Put adapters into the weight, one after the other.

        Args:
            safe_merge: raise ValueError, with the weight as it was, where an adapter makes it NaN or infinite.
            adapter_names: those that are active, by default.
        """
        for name in check_adapters_to_merge(self, adapter_names):
            if name in self.settings:
                weight = self.read_weight()
                down, up = reflection_factors(weight, **self.vectors(name))
                weight = torch.addmm(weight, up, down)
                if safe_merge and not is_finite(weight):
                    raise UserError(
                        f"merging adapter {name} gives NaN or infinity: it holds a zero vector, or diverged"
                    )
                self._merged.append((down, up, self.get_base_layer().weight))
                self.write_weight(weight, untie=self.tied)
                self.merged_adapters.append(name)

    @torch.no_grad()
    def unmerge(self) -> None:
        """Take all merged adapters out of the weight again, the last one first."""
        if not self.merged:
            warnings.warn("Already unmerged. Nothing to do.", stacklevel=2)
        while self.merged_adapters:
            down, up, before = self._merged.pop()
            if self.tied:
                self.get_base_layer().weight = before
            else:
                weight = self.read_weight()
                self.write_weight(torch.addmm(weight, up.to(weight.device), down.to(weight.device), alpha=-1))
            self.merged_adapters.pop()

    def read_weight(self) -> Tensor:
        """Return the weight (out, in) as it is now, in fp32 (fp64 for fp64), dequantized where it is quantized."""
        weight = self.get_base_weight()
        weight = weight.T if isinstance(self.get_base_layer(), Conv1D) else weight
        return weight.to(working_dtype(weight.dtype))

    def write_weight(self, weight: Tensor, *, untie: bool = False) -> None:
        """Store a weight (out, in) in the base layer's dtype, quantized where it was; in a parameter of its own if tied."""
        base, dtype = self.get_base_layer(), self.get_base_weight().dtype
        weight = weight.T.contiguous() if isinstance(base, Conv1D) else weight
        if untie:
            base.weight = nn.Parameter(weight.to(dtype), requires_grad=base.weight.requires_grad)
        else:
            self.set_base_weight(weight.to(dtype))

    def train(self, mode: bool = True) -> "EtherLinear":
        """Set the mode, and make the vectors fp32 again."""
        for name in self.adapter_layer_names:
            getattr(self, name).restore_fp32()
        return super().train(mode)

    def _move_adapter_to_device_of_base_layer(self, adapter_name: str, device: torch.device | None = None) -> None:
        """Move, and leave the dtype: PEFT's own casts to the base's."""
        device = device or self._get_base_layer_device_and_dtype(self.get_base_layer())[0]
        for name in self.adapter_layer_names:
            vectors = getattr(self, name)
            if adapter_name in vectors and not vectors[adapter_name].is_meta:
                vectors[adapter_name].data = vectors[adapter_name].data.to(device)

    def __repr__(self) -> str:
        return "ether." + super().__repr__()


def side_sizes(base: nn.Module) -> dict[str, int]:
    """Return the sizes of the input and the output of a layer."""
    if isinstance(base, Conv1D):
        return dict(zip(SIDES, base.weight.shape, strict=True))
    return {"input": base.in_features, "output": base.out_features}


class EtherModel(BaseTuner):
    """Puts ETHER layers in the place of a model's target modules."""

    prefix = PREFIX
    tuner_layer_cls = EtherLinear
    target_module_mapping = TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING

    def _prepare_model(self, peft_config: EtherPeftConfig, model: nn.Module) -> None:
        """Check all targets before the first is replaced; leave out what "all-linear" cannot mean."""
        counts = Counter(id(parameter) for _, parameter in model.named_parameters(remove_duplicate=False))
        self.tied_ids = {identity for identity, count in counts.items() if count > 1}
        for module in model.modules():
            if hasattr(module, "support_avx512bf16_for_cpu"):
                # A forward pass in eval mode repacks a 4-bit weight on a CPU into a form without gradients.
                module.support_avx512bf16_for_cpu = False
        everything = isinstance(peft_config.target_modules, str) and peft_config.target_modules.lower() == "all-linear"
        _maybe_include_all_linear_layers(peft_config, model)
        reasons = {
            name: unsuited(peft_config, name, module, model) for name, module in self.targets(peft_config, model)
        }
        reasons = {name: reason for name, reason in reasons.items() if reason}
        if everything and reasons:
            peft_config.target_modules = set(peft_config.target_modules) - reasons.keys()
            left_out = "; ".join(f"{name} {reason}" for name, reason in reasons.items())
            warnings.warn(f"all-linear leaves out {len(reasons)} modules: {left_out[:300]}", stacklevel=2)
            reasons = {}
        problems = Problems(f"{name} {reason}" for name, reason in reasons.items())
        for name, parameter in model.named_parameters():
            if parameter.ndim == 3 and self._check_target_module_exists(peft_config, name):
                problems.append(f"{name} is one parameter for many experts, no Linear, and cannot be a target")
        problems.check()
        sizes: dict[int, dict[str, int]] = {}
        for name, module in self.targets(peft_config, model):
            of_module = side_sizes(base_of(module))
            for side in peft_config.sides(name, of_module):
                sizes.setdefault(peft_config.blocks(name), {})[f"{name} {side}"] = of_module[side]
        for n, of_targets in sizes.items():
            check_sizes(n, of_targets)

    def targets(self, config: EtherPeftConfig, model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
        """Yield the modules that a config names, with their names; nothing inside of another adapter's layer."""
        inside = None
        for name, module in model.named_modules():
            if inside is not None and name.startswith(inside):
                continue
            inside = f"{name}." if isinstance(module, BaseTunerLayer) else None
            if name and self._check_target_module_exists(config, name):
                yield name, module

    def _create_and_replace(
        self,
        peft_config: EtherPeftConfig,
        adapter_name: str,
        target: nn.Module,
        target_name: str,
        parent: nn.Module,
        current_key: str,
        **_: Any,
    ) -> None:
        layer = target
        if not isinstance(target, EtherLinear):
            tied = id(base_of(target).weight) in self.tied_ids
            layer = EtherLinear(target, tied=tied, quantization=get_quantization_kwargs(self))
            self._replace_module(parent, target_name, layer, target)
        layer.update_layer(adapter_name, peft_config, current_key)
        layer.set_adapter(self.active_adapters, inference_mode=peft_config.inference_mode)

    def _check_merge_allowed(self) -> None:
        """Allow it always: a tied head leaves the embedding alone, which PEFT would warn of."""

    @classmethod
    def _remap_adapter_state_dict_for_load(
        cls, model: nn.Module, config: EtherPeftConfig, adapter_name: str, state_dict: dict[str, Tensor]
    ) -> dict[str, Tensor]:
        """Return the tensors by the model's names; raise UserError for any that is missing, too many or of no use."""
        state = super()._remap_adapter_state_dict_for_load(model, config, adapter_name, state_dict)
        known = model.state_dict()
        own = {name for name in known if f".{PREFIX}" in name and name.endswith(f".{adapter_name}")}
        wrapped = any(name.startswith("base_model.model.") for name in known)
        names = {name: name if wrapped else name.removeprefix("base_model.model.") for name in state}
        problems = own - {*names.values()}
        problems |= {name for name in names.values() if name not in known}
        problems |= {
            own_name
            for name, own_name in names.items()
            if own_name in own and known[own_name].shape != state[name].shape
        }
        if problems:
            raise UserError(
                f"the adapter does not fit this model: {len(problems)} tensors are missing, not known or of another "
                f"shape, {min(problems)} first; load it on the model that it was trained on"
            )
        for name, own_name in names.items():
            if own_name in own and not (is_finite(state[name]) and state[name].any(dim=-1).all()):
                raise UserError(
                    f"{name} holds a zero vector, NaN or infinity; the file is damaged, or its run diverged"
                )
        return state


def base_of(module: nn.Module) -> nn.Module:
    """Return a module without the adapters around it."""
    return module.get_base_layer() if isinstance(module, BaseTunerLayer) else module


def unsuited(config: EtherPeftConfig, name: str, module: nn.Module, model: nn.Module) -> str | None:
    """Return the reason, in words, why a module cannot be a target; None where it can."""
    base, parent = base_of(module), model.get_submodule(name.rpartition(".")[0])
    if not isinstance(base, nn.Linear | Conv1D) and resolve_quantization_backend(base) is None:
        return f"is no Linear but a {type(base).__name__}"
    mamba = hasattr(parent, "A_log") and hasattr(parent, "D") and name.endswith(("x_proj", "dt_proj", "out_proj"))
    if mamba or isinstance(parent, nn.MultiheadAttention):
        return f"has a weight that {type(parent).__name__} multiplies with by itself, past any adapter"
    sizes = side_sizes(base)
    narrow = next((side for side in config.sides(name, sizes) if sizes[side] < 2), None)
    return f"has an {narrow} of size 1, which cannot be reflected" if narrow else None


def register() -> None:
    """Enter the method into PEFT's tables; raise ImportError where its name is taken."""
    tables = (
        (PEFT_TYPE_TO_CONFIG_MAPPING, EtherPeftConfig),
        (PEFT_TYPE_TO_TUNER_MAPPING, EtherModel),
        (PEFT_TYPE_TO_PREFIX_MAPPING, PREFIX),
    )
    for table, entry in tables:
        if table.setdefault(EtherType.ETHER, entry) is not entry:
            taken = table[EtherType.ETHER]
            raise ImportError(f"PEFT {peft.__version__} has a method ETHER of its own ({taken}): use one of the two")


register()
