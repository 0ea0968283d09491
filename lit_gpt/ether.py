"""ETHER, ETHER+ and OFT as layers: configure, add, mark, merge, filter.

    model = GPT(Config.from_name("Llama-2-7b-hf"))
    add_ether(model, EtherConfig(Htype="etherplusHH", nb=32, query=True, value=True))
    mark_only_ether_as_trainable(model)

Notable choices:
- Adapters act on activations, y = R_out(W(R_in x)) + b: W is read, never transformed.
- One-sided methods act on the output of q, k and v and on the input of every other Linear, as the original code does.
- Adapter parameters are fp32 also over a half-precision base: late, small updates would be rounded away.
- Parameter names and shapes are the original code's: ``ether_R``, ``ether_R2`` hold u and v of the first side,
  ``ether_R3``, ``ether_R4`` those of the second; for a plain Linear the first side is the input (the output if
  flipped), for the fused q, k, v it is the output, their names end in q, k, v, and their shapes begin with 1.
"""

import math
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lit_gpt.adapter import (
    AdapterConfig,
    AdapterLayer,
    Part,
    linear_targets,
    mark_only_adapter_as_trainable,
    merge_adapter_weights,
    replace_targets,
)
from lit_gpt.errors import UserError
from lit_gpt.model import GPT, QKVLinear
from lit_gpt.reflections import cayley, published_rotate, published_update, reflect, reflect_plus, rotate

Vectors = tuple[Tensor, ...]


@dataclass(frozen=True)
class Method:
    """One entry of the registry.

    Attributes:
        tensors: parameters of one side: u; u and v; or A.
        two_sided: transforms both sides of W.
        apply: R x from blocked activations (..., n, b) and the side's parameters; ``center``, ``block_mask`` and
            ``save_output`` as in ``reflections.reflect``.
        apply_transposed: R^T x, what a weight's rows take.
        matrices: the parameters are (n, b, b), not (n, b).
    """

    tensors: int
    two_sided: bool
    apply: Callable[..., Tensor]
    apply_transposed: Callable[[Tensor, Vectors], Tensor]
    matrices: bool = False


def _ether(x: Tensor, vectors: Vectors, **options: Any) -> Tensor:
    return reflect(x, *vectors, **options)


def _ether_plus(x: Tensor, vectors: Vectors, **options: Any) -> Tensor:
    return reflect_plus(x, *vectors, **options)


def _rotation(vectors: Vectors, block_mask: Tensor | None = None) -> Tensor:
    a = vectors[0]
    return cayley(a if block_mask is None else a * block_mask.unsqueeze(-1))  # A = 0 is the identity


def _oft(
    x: Tensor,
    vectors: Vectors,
    *,
    center: Tensor | None = None,
    block_mask: Tensor | None = None,
    save_output: bool = False,
) -> Tensor:
    return rotate(x, _rotation(vectors, block_mask), center=center)


def _oft_transposed(x: Tensor, vectors: Vectors) -> Tensor:
    return rotate(x, _rotation(vectors).mT)


METHODS = {
    "ether": Method(1, False, _ether, _ether),
    "etherplus": Method(2, False, _ether_plus, _ether_plus),
    "etherplusHH": Method(2, True, _ether_plus, _ether_plus),
    "oft": Method(1, False, _oft, _oft_transposed, matrices=True),
}
BLOCK_LAYOUTS = ("diagonal", "published")


@dataclass
class EtherConfig(AdapterConfig):
    """What is adapted, and how."""

    kind: ClassVar[str] = "ether"
    unprefixed: ClassVar[tuple[str, ...]] = ("Htype", "flip_side")

    Htype: str = "ether"
    """ether, etherplus (one-sided), etherplusHH (two-sided, the paper's ETHER+) or oft."""
    nb: int = 1
    """Number of diagonal blocks, n."""
    query: bool = True
    """Adapt the query projections."""
    key: bool = False
    """Adapt the key projections."""
    value: bool = True
    """Adapt the value projections."""
    projection: bool = False
    """Adapt the attention's output projections."""
    mlp: bool = False
    """Adapt the MLPs."""
    head: bool = False
    """Adapt the language model's head."""
    dropout: float = 0.0
    """Dropout on the input of adapted layers."""
    block_dropout: float = 0.0
    """Probability with which a block's R is replaced by I while training; no small change for ether, whose R is never
    near I."""
    flip_side: bool = False
    """Move the one-sided transform of a non-square Linear to its smaller side."""
    block_layout: str = "diagonal"
    """diagonal (the paper's), or published (what the original code does for n > 1)."""

    def __post_init__(self) -> None:
        if self.Htype not in METHODS:
            raise UserError(f"Htype '{self.Htype}' is unknown; choices: {', '.join(METHODS)}")
        if self.block_layout not in BLOCK_LAYOUTS:
            raise UserError(f"block layout '{self.block_layout}' is unknown; choices: {', '.join(BLOCK_LAYOUTS)}")
        if self.nb < 1:
            raise UserError(f"the number of blocks must be at least 1, got {self.nb}")
        for name in ("dropout", "block_dropout"):
            if not 0.0 <= getattr(self, name) < 1.0:
                raise UserError(f"{name} must be in [0, 1), got {getattr(self, name)}")
        if self.flip_side and METHODS[self.Htype].two_sided:
            raise UserError(f"flip_side moves a one-sided transform; {self.Htype} acts on both sides")


class EtherLayer(AdapterLayer):
    """A Linear whose rows are transformed by ETHER, ETHER+ or OFT, part by part."""

    def set_up(self, base: nn.Linear, config: EtherConfig, targets: set[str]) -> None:
        """Adopt ``base`` and make the parameters of each part and side."""
        self.adopt(base, targets)
        self.ether_config = config
        self.method = METHODS[config.Htype]
        self.sides = side_order(base, config)
        if self.published and "input" in self.sides and self.quantized is not None:
            raise UserError(
                "the published block layout at n > 1 needs the weight itself, which a quantized base does not have; "
                "use the diagonal layout or leave out --quantize"
            )
        for part in self.parts:
            for side in self.sides if part.adapted else ():
                size = self.in_features if side == "input" else part.size
                block = size // config.nb
                shape = (config.nb, block, block) if self.method.matrices else (config.nb, block)
                for name in self.names(part, side):
                    tensor = torch.empty(self.lead + shape, **self.factory)
                    self.register_parameter(name, nn.Parameter(tensor))
        self.reset_parameters()

    @property
    def lead(self) -> tuple[int, ...]:
        """How the original's shapes begin: with 1 in the fused q, k, v."""
        return (1,) if len(self.parts) > 1 else ()

    def names(self, part: Part, side: str) -> list[str]:
        """Names of the parameters of one side of one part."""
        first = 2 * self.sides.index(side)
        return [f"ether_R{'' if k == 0 else k + 1}{part.suffix}" for k in range(first, first + self.method.tensors)]

    def vectors(self, part: Part, side: str) -> Vectors:
        """The parameters of one side of one part: (n, b) vectors or (n, b, b) matrices."""
        return tuple(getattr(self, name).flatten(0, len(self.lead)) for name in self.names(part, side))

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Draw the start: u as the original code does (which its learning rates depend on), v = -u, A = 0."""
        if not hasattr(self, "method"):
            return  # nn.Linear's constructor calls this before there is anything to draw
        for part in self.parts:
            for side in self.sides if part.adapted else ():
                first, *rest = (getattr(self, name) for name in self.names(part, side))
                if self.method.matrices:
                    first.zero_()
                    continue
                # kaiming_uniform(a=sqrt(5)) of a (1, n, b) tensor sees a fan-in of n b; of an (n, b) one, of b.
                bound = 1 / math.sqrt(first.size(-1) * (first.size(-2) if self.lead else 1))
                first.uniform_(-bound, bound)
                for second in rest:
                    second.copy_(-first)

    def adapted(self, x: Tensor) -> list[Tensor]:
        """R_out(W(R_in x)) + b of each part."""
        x = F.dropout(x, self.ether_config.dropout, self.training)
        return [self.adapted_part(part, x) if part.adapted else self.product(part, x) for part in self.parts]

    def adapted_part(self, part: Part, x: Tensor) -> Tensor:
        """One adapted part: (..., in) to (..., its rows)."""
        if "input" not in self.sides:
            y = self.product(part, x)
        elif self.published:
            y = self.published_product(part, x)
        else:
            y = self.product(part, self.transform(part, "input", x))
        return self.transform(part, "output", y, center=self.bias_of(part)) if "output" in self.sides else y

    def published_product(self, part: Part, x: Tensor) -> Tensor:
        """W R_in x + b in the original code's layout."""
        vectors, block_mask = self.vectors(part, "input"), self.draw_blocks()
        weight, bias = self.weight[part.rows], self.bias_of(part)
        if self.method.matrices:
            y = published_rotate(x, weight, _rotation(vectors, block_mask))
            return y if bias is None else y + bias
        update = published_update(x, weight, *vectors).unflatten(-1, (self.ether_config.nb, -1))
        return F.linear(x, weight, bias) + (update if block_mask is None else update * block_mask).flatten(-2).to(
            x.dtype
        )

    @property
    def published(self) -> bool:
        """The input side is in the original code's layout (which for one block is the diagonal one)."""
        return self.ether_config.block_layout == "published" and self.ether_config.nb > 1

    def transform(self, part: Part, side: str, x: Tensor, *, center: Tensor | None = None) -> Tensor:
        """R x on one side of one part, or R(x - center) + center: (..., size) to (..., size)."""
        blocks = (self.ether_config.nb, -1)
        center = None if center is None else center.unflatten(-1, blocks)
        y = self.method.apply(
            x.unflatten(-1, blocks),
            self.vectors(part, side),
            center=center,
            block_mask=self.draw_blocks(),
            save_output=side == "output",  # attention keeps its v too; an input x has other readers that keep it
        )
        return y.flatten(-2)

    def draw_blocks(self) -> Tensor | None:
        """(n, 1), zero for the blocks dropped in this pass; None where none is."""
        p = self.ether_config.block_dropout
        if p == 0.0 or not self.training:
            return None
        return (torch.rand(self.ether_config.nb, 1, device=self.factory["device"]) >= p).float()

    def merged_rows(self, part: Part, rows: Tensor) -> Tensor:
        """R_out W R_in of one part: rows take R_in's transpose, columns take R_out."""
        n = self.ether_config.nb
        if "input" in self.sides:
            vectors = self.vectors(part, "input")
            if self.published:  # row group r meets R_r in each of its n chunks
                groups = rows.unflatten(0, (n, -1)).unflatten(-1, (n, -1)).permute(1, 2, 0, 3)  # (f/n, j, r, b)
                turned = self.method.apply_transposed(groups, vectors)
                rows = turned.permute(2, 0, 1, 3).flatten(-2).flatten(0, 1)
            else:
                rows = self.method.apply_transposed(rows.unflatten(-1, (n, -1)), vectors).flatten(-2)
        if "output" in self.sides:
            columns = rows.T.unflatten(-1, (n, -1))
            rows = self.method.apply(columns, self.vectors(part, "output")).flatten(-2).T
        return rows


class EtherLinear(EtherLayer):
    """Any Linear but the fused q, k, v."""

    def __init__(self, base: nn.Linear, config: EtherConfig, targets: set[str]) -> None:
        super().__init__(base.in_features, base.out_features, bias=base.bias is not None, device="meta")
        self.set_up(base, config, targets)


class EtherQKVLinear(EtherLayer, QKVLinear):
    """The fused q, k, v, each with an adapter of its own."""

    def __init__(self, base: QKVLinear, config: EtherConfig, targets: set[str]) -> None:
        QKVLinear.__init__(self, base.config, device="meta")
        self.set_up(base, config, targets)


def side_order(linear: nn.Linear, config: EtherConfig) -> tuple[str, ...]:
    """The sides of a Linear that are transformed, in the order in which the original code numbers them."""
    if isinstance(linear, QKVLinear):
        sides = ("output", "input")
    else:
        sides = ("output", "input") if is_flipped(linear, config) else ("input", "output")
    return sides if METHODS[config.Htype].two_sided else sides[:1]


def is_flipped(linear: nn.Linear, config: EtherConfig) -> bool:
    """Whether ``flip_side`` moves this Linear's transform: its output must be its smaller side."""
    return config.flip_side and not isinstance(linear, QKVLinear) and linear.out_features < linear.in_features


def add_ether(model: GPT, config: EtherConfig) -> None:
    """Put ETHER layers in the place of the Linears that the config's targets name.

    Args:
        model: on any device, the meta device included; base keys stay as they are.
        config: method, blocks, targets.

    Raises:
        ValueError: no target is enabled, or the blocks do not divide a size (names the module and the legal n).
    """
    check_blocks(model, config)
    if config.flip_side and not any(is_flipped(linear, config) for _, _, _, linear, _ in linear_targets(model, config)):
        warnings.warn(
            "flip_side changes nothing: no chosen target has an output smaller than its input (query, key and value "
            "are transformed on their output in any case)",
            stacklevel=2,
        )
    replace_targets(model, config, plain=EtherLinear, fused=EtherQKVLinear)


def check_blocks(model: GPT, config: EtherConfig) -> None:
    """Raise unless n cuts every adapted side into blocks of at least 2 (a block of 1 has nothing to learn)."""
    sizes: dict[str, int] = {}
    for name, _, _, linear, targets in linear_targets(model, config):
        sides = side_order(linear, config)
        heights = {name: linear.out_features}
        if isinstance(linear, QKVLinear):
            rows = {"query": linear.config.q_size, "key": linear.config.kv_size, "value": linear.config.kv_size}
            heights = {f"{name} ({target})": rows[target] for target in rows if target in targets}
        for part, height in heights.items():
            if "input" in sides:
                sizes[f"{part} input"] = linear.in_features
                if config.block_layout == "published" and config.nb > 1:
                    sizes[f"{part} rows"] = height
            if "output" in sides:
                sizes[f"{part} output"] = height
    shared = math.gcd(*sizes.values())
    legal = [n for n in range(1, shared + 1) if shared % n == 0 and all(s // n >= 2 for s in sizes.values())]
    if sizes and config.nb not in legal:
        module, size = next((m, s) for m, s in sizes.items() if s % config.nb or s // config.nb < 2)
        raise UserError(
            f"{config.nb} blocks do not divide {module} of size {size} into blocks of 2 or more; "
            f"legal for all chosen targets: {', '.join(map(str, legal))}"
        )


def ether_filter(name: str, _: Any = None) -> bool:
    """Whether a parameter's name is an ETHER, ETHER+ or OFT parameter's."""
    return ".ether_R" in name


mark_only_ether_as_trainable = mark_only_adapter_as_trainable
merge_ether_weights = merge_adapter_weights
