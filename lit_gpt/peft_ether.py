"""ETHER and ETHER+ as a method of PEFT, for any model of transformers: import this, then use PEFT as ever.

    from lit_gpt.peft_ether import EtherPeftConfig
    model = peft.get_peft_model(model, EtherPeftConfig(method="etherplusHH", n=4, target_modules="all-linear"))

``PeftModel.from_pretrained`` reads what ``save_pretrained`` wrote once this is imported. The maths is that of
``reflections``; nothing else of ours imports this file, and it knows no model, no file of ours and no training loop.

Notable choices:
- Layers act on activations, and call the layer that they wrap: a quantized one needs nothing of its own.
- Vectors stay in fp32, whatever casts the model: small late updates would be rounded away.
- ETHER+'s R may have no inverse, so unmerging subtracts the thin factors that merging added.
- A Linear that holds q, k and v together has one adapter; where the method is one-sided, on its output.
"""

import math
import warnings
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from enum import Enum
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lit_gpt.adapter import is_finite
from lit_gpt.errors import Problems, UserError
from lit_gpt.ether import METHODS, EtherConfig, check_sizes, draw_blocks
from lit_gpt.reflections import Vectors, reflection_factors, working_dtype

try:
    from peft import PeftConfig, mapping, utils
    from peft.tuners import tuners_utils
    from peft.utils import resolve_quantization_backend  # since 0.21
    from peft.utils.other import get_pattern_key
    from transformers.pytorch_utils import Conv1D
except ImportError as error:
    raise ImportError(
        f"lit_gpt.peft_ether needs PEFT 0.21 or newer, and transformers: pip install 'peft>=0.21' ({error})"
    ) from error

SIDES = ("input", "output")
PREFIX = "ether_"
"""Names of adapter parameters begin so; PEFT finds them by it."""
QKV_MODULES = (
    "q_proj", "k_proj", "v_proj", "q", "k", "v", "query", "key", "value", "query_key_value", "qkv_proj", "qkv", "Wqkv",
    "c_attn", "q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "kv_b_proj"
)  # fmt: skip


class EtherType(str, Enum):
    """The method's name in PEFT's tables, which take a type of another package's."""

    ETHER = "ETHER"


@dataclass
class EtherPeftConfig(PeftConfig):
    """Settings of ETHER and ETHER+ in PEFT; ``adapter_config.json`` holds all of them."""

    method: str = "etherplusHH"
    """ether, etherplus (one-sided) or etherplusHH (two-sided, the paper's ETHER+)."""
    n: int = 1
    """Number of diagonal blocks."""
    n_pattern: dict[str, int] = field(default_factory=dict)
    """Other numbers of blocks, by the ends of modules' names or by regular expressions for them."""
    target_modules: list[str] | str | None = None
    """Names (or their ends) of the Linears to adapt, a regular expression, or "all-linear"; by default LoRA's."""
    exclude_modules: list[str] | str | None = None
    """Names (or their ends) of modules that stay as they are, or a regular expression."""
    qkv_modules: list[str] = field(default_factory=lambda: [*QKV_MODULES])
    """Last parts of the names of modules that make queries, keys or values.

    A one-sided method acts on their output, and on the input of all others."""
    flip_side: bool = False
    """Move the one-sided transform of those others to the output where that is the smaller side."""
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
        if self.method not in methods:
            raise UserError(f"method {self.method!r} is unknown; choices: {', '.join(methods)}")
        shared = {name: getattr(self, name) for name in ("dropout", "block_dropout", "flip_side")}
        for n in (self.n, *self.n_pattern.values()):
            EtherConfig(self.method, n, **shared)  # which checks them
        if self.layers_to_transform is None and self.layers_pattern:
            raise UserError("layers_pattern means nothing without layers_to_transform")
        if self.layers_to_transform is not None and isinstance(self.target_modules, str):
            raise UserError("layers_to_transform goes with a list of target_modules, not a str")
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
    """The u (or v) of one side, by adapter; stays in fp32 (fp64 over fp64) whatever dtype the model is cast to."""

    def _apply(self, fn: Any, recurse: bool = True) -> "VectorDict":
        return super()._apply(lambda tensor: tensor.to(fn(tensor).device), recurse)

    def train(self, mode: bool = True) -> "VectorDict":
        """Set the mode, and undo a cast by whoever wrote to the parameters themselves, as TRL does for QLoRA."""
        for parameter in self.values():
            parameter.data = parameter.data.to(working_dtype(parameter.dtype))
        return super().train(mode)


class EtherLinear(nn.Module, tuners_utils.BaseTunerLayer):
    """A Linear (a quantized one, or a Conv1D of transformers) with ETHER or ETHER+ around it, once per adapter.

    With several active adapters the second one acts on what the first one has made of the weight, and so on.
    """

    adapter_layer_names = tuple(f"{PREFIX}{vector}_{side}" for side in SIDES for vector in "uv")
    other_param_names = ("settings",)

    def __init__(self, base_layer: nn.Module, *, tied: bool, quantization: dict[str, Any]) -> None:
        super().__init__()
        self.base_layer, self.tied = base_layer, tied
        self.settings: dict[str, tuple[EtherPeftConfig, int]] = {}  # an adapter's config and its n here
        self.merged_adapters, self.unmerging = [], []
        self.quantization_backend = resolve_quantization_backend(self.get_base_layer(), **quantization)
        self.in_features, self.out_features = side_sizes(self).values()
        for name in self.adapter_layer_names:
            setattr(self, name, VectorDict())

    def update_layer(self, adapter_name: str, config: EtherPeftConfig, name: str) -> None:
        """Give the layer one more adapter; the module's name decides n and sides.

        u is drawn as the original code does, which its learning rates depend on.
        """
        n, sizes = config.blocks(name), side_sizes(self)
        device, dtype = self._get_base_layer_device_and_dtype(self.get_base_layer())
        for side in config.sides(name, sizes):
            block = sizes[side] // n
            bound = 1 / math.sqrt(sizes[side] if config.is_qkv(name) else block)
            u, v = torch.empty(2, n, block, device=device, dtype=working_dtype(dtype)).uniform_(-bound, bound)
            start = (u, -u if config.init_weights else v)
            for vector, tensor in zip("uv"[: METHODS[config.method].tensors], start, strict=False):
                getattr(self, f"{PREFIX}{vector}_{side}")[adapter_name] = nn.Parameter(tensor.clone())
        self.settings[adapter_name] = (config, n)

    def vectors(self, adapter_name: str, side: str) -> Vectors:
        """Return u, or u and v, (n, b) each; none where an adapter leaves the side as it is."""
        both = (getattr(self, f"{PREFIX}{vector}_{side}") for vector in "uv")
        return tuple(vectors[adapter_name] for vectors in both if adapter_name in vectors)

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Return R_out(W(R_in x)) + b: (..., in) to (..., out)."""
        if self.disable_adapters and self.merged:
            self.unmerge()
        active = [] if self.disable_adapters or self.merged else self.active_adapters
        active = [name for name in active if name in self.settings]
        for name in reversed(active):
            x = self.transform(name, "input", F.dropout(x, self.settings[name][0].dropout, self.training))
        y = self.base_layer(x, *args, **kwargs)
        for name in active:
            y = self.transform(name, "output", y)
        return y

    def transform(self, adapter_name: str, side: str, x: Tensor) -> Tensor:
        """Return R x on one side, or R(x - b) + b on the output: (..., size) to (..., size)."""
        vectors = self.vectors(adapter_name, side)
        if not vectors:
            return x
        config, n = self.settings[adapter_name]
        bias = self.get_base_layer().bias if side == "output" else None
        center = None if bias is None else bias.to(x.dtype)
        mask = draw_blocks(n, config.block_dropout if self.training else 0.0, x.device)
        return METHODS[config.method].apply(x, vectors, center=center, block_mask=mask, save_output=side == "output")

    @torch.no_grad()
    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Put adapters into the weight, one after the other; those that are active, where none are named.

        Raises:
            ValueError: with ``safe_merge``, an adapter makes the weight NaN or infinite; it is left as it was.
        """
        for name in tuners_utils.check_adapters_to_merge(self, adapter_names):
            if name in self.settings:
                down, up = self.factors(name)
                before = self.get_base_layer().weight if self.tied else None
                self.add_to_weight(up, down, name if safe_merge else None)
                self.merged_adapters.append(name)
                self.unmerging.append((up, down, before))

    @torch.no_grad()
    def unmerge(self) -> None:
        """Take all merged adapters out of the weight again, the last one first."""
        while self.merged_adapters:
            up, down, before = self.unmerging[-1]
            if before is None:
                self.add_to_weight(-up, down)
            else:
                self.get_base_layer().weight = before
            self.merged_adapters.pop()
            self.unmerging.pop()

    @torch.no_grad()
    def factors(self, adapter_name: str) -> tuple[Tensor, Tensor]:
        """Return A (r, in) and B (out, r) in fp32, with R_out W R_in = W + B A for the weight W as it is now."""
        vectors = {side: self.vectors(adapter_name, side) for side in SIDES}
        weight = self.read_weight()
        return reflection_factors(weight.to(working_dtype(weight.dtype)), **vectors)

    def read_weight(self) -> Tensor:
        """Return the weight (out, in), dequantized where it is quantized."""
        weight = self.get_base_weight()
        return weight.T if isinstance(self.get_base_layer(), Conv1D) else weight

    def add_to_weight(self, up: Tensor, down: Tensor, checked: str | None = None) -> None:
        """Add B A to the weight, which is quantized again where it was; raise where it must be finite and is not."""
        base, before = self.get_base_layer(), self.read_weight()
        up, down = up.to(before.device), down.to(before.device)  # the model may have moved since it was merged
        weight = torch.addmm(before.to(up.dtype), up, down).to(before.dtype)
        if checked and not is_finite(weight):
            raise UserError(f"merging {checked} gives NaN or infinity: it holds a zero vector, or its run diverged")
        weight = weight.T.contiguous() if isinstance(base, Conv1D) else weight
        if self.tied:  # a parameter of its own: the embedding stays as it is
            base.weight = nn.Parameter(weight, requires_grad=base.weight.requires_grad)
        else:
            self.set_base_weight(weight)

    def _move_adapter_to_device_of_base_layer(self, adapter_name: str, device: torch.device | None = None) -> None:
        device = device or self._get_base_layer_device_and_dtype(self.get_base_layer())[0]
        for vectors in (getattr(self, name) for name in self.adapter_layer_names):
            if adapter_name in vectors and not vectors[adapter_name].is_meta:
                # Only there: PEFT's own method casts to the base's dtype, too.
                vectors[adapter_name].data = vectors[adapter_name].data.to(device)


base_of = tuners_utils.BaseTunerLayer.get_base_layer
"""Return a module without the adapters around it."""


def side_sizes(module: nn.Module) -> dict[str, int]:
    """Return the sizes of the input and the output of a Linear, or of the one in an adapter's layer."""
    return dict(zip(SIDES, tuners_utils._get_in_out_features(base_of(module)), strict=True))


def unsuited(config: EtherPeftConfig, name: str, module: nn.Module, model: nn.Module) -> str | None:
    """Return why a module cannot be a target, in words that go on after its name; None where it can."""
    base, parent = base_of(module), model.get_submodule(name.rpartition(".")[0])
    if not isinstance(base, nn.Linear | Conv1D) and resolve_quantization_backend(base) is None:
        return f"is no Linear but a {type(base).__name__}"
    mamba = hasattr(parent, "A_log") and hasattr(parent, "D") and name.endswith(("x_proj", "dt_proj", "out_proj"))
    if mamba or isinstance(parent, nn.MultiheadAttention):
        return f"lends its weight to {type(parent).__name__}, which multiplies with it past any adapter"
    sizes = side_sizes(base)
    narrow = [side for side in config.sides(name, sizes) if sizes[side] < 2]
    return f"has an {narrow[0]} of size 1, which cannot be reflected" if narrow else None


class EtherModel(tuners_utils.BaseTuner):
    """Puts ETHER layers in the place of a model's target modules."""

    prefix = PREFIX
    tuner_layer_cls = EtherLinear
    target_module_mapping = utils.TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING

    def _prepare_model(self, peft_config: EtherPeftConfig, model: nn.Module) -> None:
        """Check all targets before the first is replaced; leave out what "all-linear" cannot mean."""
        counts = Counter(id(parameter) for _, parameter in model.named_parameters(remove_duplicate=False))
        self.tied_ids = {identity for identity, count in counts.items() if count > 1}
        for module in model.modules():
            if hasattr(module, "support_avx512bf16_for_cpu"):
                # bitsandbytes: an evaluation on a CPU repacks 4-bit weights into a form that gives no gradients.
                module.support_avx512bf16_for_cpu = False
        every = str(peft_config.target_modules).lower() == utils.INCLUDE_LINEAR_LAYERS_SHORTHAND
        tuners_utils._maybe_include_all_linear_layers(peft_config, model)
        targets = dict(self.targets(peft_config, model))
        problems = {name: reason for name in targets if (reason := unsuited(peft_config, name, targets[name], model))}
        told = [f"{name} {reason}" for name, reason in problems.items()]
        if every and told:
            warnings.warn(f"all-linear leaves out {len(told)} modules: {'; '.join(told)[:400]}", stacklevel=2)
            peft_config.target_modules, told = peft_config.target_modules - problems.keys(), []
        for name, parameter in model.named_parameters():
            if parameter.ndim == 3 and self._check_target_module_exists(peft_config, name):
                told.append(f"{name} holds experts as one plain parameter, not as Linears: it cannot be a target")
        Problems(told).check()
        sizes: dict[int, dict[str, int]] = {}
        for name in (name for name in targets if name not in problems):
            of_module, of_n = side_sizes(targets[name]), sizes.setdefault(peft_config.blocks(name), {})
            of_n |= {f"{name} {side}": of_module[side] for side in peft_config.sides(name, of_module)}
        for n, of_targets in sizes.items():
            check_sizes(n, of_targets)

    def targets(self, config: EtherPeftConfig, model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
        """Yield the modules that a config names, with their names; none from inside an adapter's layer."""
        inside = None
        for name, module in model.named_modules():
            if inside is None or not name.startswith(inside):
                inside = f"{name}." if isinstance(module, tuners_utils.BaseTunerLayer) else None
                if name and self._check_target_module_exists(config, name):
                    yield name, module

    def _create_and_replace(
        self, peft_config: EtherPeftConfig, adapter_name: str, target: nn.Module, *place: Any, current_key: str
    ) -> None:
        layer, (target_name, parent) = target, place
        if not isinstance(target, EtherLinear):
            tied = id(base_of(target).weight) in self.tied_ids
            layer = EtherLinear(target, tied=tied, quantization=utils.get_quantization_kwargs(self))
            self._replace_module(parent, target_name, layer, target)
        layer.update_layer(adapter_name, peft_config, current_key)
        layer.set_adapter(self.active_adapters, inference_mode=peft_config.inference_mode)

    @contextmanager
    def _enable_peft_forward_hooks(self, *args: Any, adapter_names: Any = None, **kwargs: Any) -> Iterator[None]:
        if adapter_names is not None:  # PEFT would drop it, and run the active adapter for all rows
            raise UserError("adapter_names: ETHER has no adapter a row; call set_adapter before each adapter's rows")
        yield

    def _check_merge_allowed(self) -> None:
        """Allow it: a merged head leaves the embedding that it is tied to alone, which PEFT would warn of."""

    @classmethod
    def _remap_adapter_state_dict_for_load(
        cls, model: nn.Module, config: EtherPeftConfig, adapter_name: str, state_dict: dict[str, Tensor]
    ) -> dict[str, Tensor]:
        """Return the tensors by the model's names; raise UserError where any is missing, too many or of no use."""
        state = super()._remap_adapter_state_dict_for_load(model, config, adapter_name, state_dict)
        known, root = model.state_dict(), "base_model.model."
        wrapped = any(name.startswith(root) for name in known)
        given = {name if wrapped else name.removeprefix(root): tensor for name, tensor in state.items()}
        own = {name for name in known if f".{PREFIX}" in name and name.endswith(f".{adapter_name}")}
        wrong = {name for name in own & given.keys() if known[name].shape != given[name].shape}
        wrong |= (own - given.keys()) | (given.keys() - known.keys())
        if wrong:
            raise UserError(
                f"the adapter does not fit this model: {len(wrong)} tensors are missing, not known or of another "
                f"shape, {min(wrong)} first; load it on the model that it was trained on"
            )
        for name in own:
            if not (is_finite(given[name]) and given[name].any(dim=-1).all()):
                raise UserError(f"{name} holds a zero vector, NaN or infinity: a damaged file, or a run that diverged")
        return state


# Enter the method into PEFT's tables.
for table, entry in {"CONFIG": EtherPeftConfig, "TUNER": EtherModel, "PREFIX": PREFIX}.items():
    found = getattr(mapping, f"PEFT_TYPE_TO_{table}_MAPPING").setdefault(EtherType.ETHER, entry)
    if found is not entry:
        raise ImportError(f"PEFT has another method {EtherType.ETHER.value} already, {found}: use one of the two")
