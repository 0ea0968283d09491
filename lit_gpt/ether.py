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
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lit_gpt import adapter, reflections
from lit_gpt.adapter import AdapterConfig, AdapterLayer, Part, linear_targets
from lit_gpt.errors import UserError
from lit_gpt.model import GPT, QKVLinear
from lit_gpt.reflections import Vectors


@dataclass(frozen=True)
class Method:
    """One entry of the registry: what is learned on a side of a weight, and how R acts on it.

    Attributes:
        tensors: how many parameters a side has: 1 (u, or A) or 2 (u and v).
        two_sided: R stands on both sides of W.
        rotation: R (n, b, b) from matrices (n, b, b), the identity where these are 0. Without it the parameters are
            vectors (n, b), and R is a reflection.
    """

    tensors: int
    two_sided: bool = False
    rotation: Callable[[Tensor], Tensor] | None = None

    @property
    def matrices(self) -> bool:
        """Return True where the parameters are (n, b, b), not (n, b)."""
        return self.rotation is not None

    def rotations(self, parameters: Vectors, block_mask: Tensor | None) -> Tensor:
        """Return R (n, b, b) of a method with matrices."""
        a = parameters[0]
        return self.rotation(a if block_mask is None else a * block_mask.unsqueeze(-1))

    def apply(
        self, x: Tensor, parameters: Vectors, *, center: Tensor | None = None, transposed: bool = False, **options: Any
    ) -> Tensor:
        """Return R x, or with ``transposed`` R^T x, of x (..., size), which is cut into n blocks.

        The center, (size,), and options are those of ``reflections.reflect``.
        """
        blocks = (len(parameters[0]), -1)
        x, center = x.unflatten(-1, blocks), None if center is None else center.unflatten(-1, blocks)
        if not self.matrices:
            return reflections.reflect(x, *parameters, center=center, **options).flatten(-2)
        r = self.rotations(parameters, options.get("block_mask"))
        return reflections.rotate(x, r.mT if transposed else r, center=center).flatten(-2)


METHODS = {
    "ether": Method(1),
    "etherplus": Method(2),
    "etherplusHH": Method(2, two_sided=True),
    "oft": Method(1, rotation=reflections.cayley),
}
BLOCK_LAYOUTS = ("diagonal", "published")


@dataclass
class EtherConfig(AdapterConfig):
    """Settings of ETHER, ETHER+ and OFT."""

    kind: ClassVar[str] = "ether"
    unprefixed: ClassVar[tuple[str, ...]] = ("Htype", "flip_side")

    Htype: str = "ether"
    """ether, etherplus (one-sided), etherplusHH (two-sided, the paper's ETHER+) or oft."""
    nb: int = 1
    """Number of diagonal blocks, n."""
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
        if not isinstance(self.nb, int) or self.nb < 1:
            raise UserError(f"the number of blocks must be at least 1, got {self.nb!r}")
        for name in ("dropout", "block_dropout"):
            if not 0.0 <= getattr(self, name) < 1.0:
                raise UserError(f"{name} must be in [0, 1), got {getattr(self, name)}")
        if self.flip_side and METHODS[self.Htype].two_sided:
            raise UserError(f"flip_side moves a one-sided transform; {self.Htype} acts on both sides")


class EtherLayer(AdapterLayer):
    """A Linear whose rows are transformed by ETHER, ETHER+ or OFT, part by part."""

    def make_parameters(self) -> None:
        """Register the parameters of each adapted part and side, as training starts from them."""
        self.method = METHODS[self.adapter_config.Htype]
        self.sides = side_order(self, self.adapter_config)
        if self.published and self.quantized is not None:
            raise UserError(
                "the published block layout at n > 1 needs the weight itself, which a quantized base does not have; "
                "use the diagonal layout or leave out --quantize"
            )
        for part in self.parts:
            for side in self.sides if part.adapted else ():
                start = self.draw_start(self.in_features if side == "input" else part.size)
                for name, tensor in zip(self.names(part, side), start, strict=True):
                    self.register_parameter(name, nn.Parameter(tensor))

    def draw_start(self, size: int) -> list[Tensor]:
        """Draw u as the original code does (which its learning rates depend on), v = -u; or A = 0."""
        n, block = self.adapter_config.nb, size // self.adapter_config.nb
        if self.method.matrices:
            return [torch.zeros(*self.lead, n, block, block, **self.factory)]
        # kaiming_uniform(a=sqrt(5)) of a (1, n, b) tensor sees a fan-in of n b; of an (n, b) one, of b.
        bound = 1 / math.sqrt(size if self.lead else block)
        u = torch.empty(*self.lead, n, block, **self.factory).uniform_(-bound, bound)
        v = u.clone() if u.is_meta else -u  # on the meta device a minus imports PyTorch's compiler, 144 MB
        return [u, v][: self.method.tensors]

    @property
    def lead(self) -> tuple[int, ...]:
        """Return the first sizes of the original's shapes: 1 in the fused q, k, v."""
        return (1,) if len(self.parts) > 1 else ()

    def names(self, part: Part, side: str) -> list[str]:
        """Return the names of the parameters of one side of one part."""
        first = 2 * self.sides.index(side)
        return [f"ether_R{'' if k == 0 else k + 1}{part.suffix}" for k in range(first, first + self.method.tensors)]

    def vectors(self, part: Part, side: str) -> Vectors:
        """Return the parameters of one side of one part: (n, b) vectors or (n, b, b) matrices."""
        return tuple(getattr(self, name).flatten(0, len(self.lead)) for name in self.names(part, side))

    def adapted(self, x: Tensor) -> list[Tensor]:
        """Return R_out(W(R_in x)) + b of each part."""
        x = F.dropout(x, self.adapter_config.dropout, self.training)
        return [self.adapted_part(part, x) if part.adapted else self.product(part, x) for part in self.parts]

    def adapted_part(self, part: Part, x: Tensor) -> Tensor:
        """Return R_out(W(R_in x)) + b of one part: (..., in) to (..., its rows)."""
        if self.published:
            y = self.published_product(part, x)
        else:
            y = self.product(part, self.transform(part, "input", x) if "input" in self.sides else x)
        return self.transform(part, "output", y, center=self.bias_of(part)) if "output" in self.sides else y

    def published_product(self, part: Part, x: Tensor) -> Tensor:
        """Return W R_in x + b in the original code's layout."""
        vectors, block_mask = self.vectors(part, "input"), self.draw_blocks()
        weight, bias = self.weight[part.rows], self.bias_of(part)
        if self.method.matrices:
            y = reflections.published_rotate(x, weight, self.method.rotations(vectors, block_mask))
            return y if bias is None else y + bias
        update = reflections.published_update(x, weight, *vectors).unflatten(-1, (self.adapter_config.nb, -1))
        update = update if block_mask is None else update * block_mask
        return F.linear(x, weight, bias) + update.flatten(-2).to(x.dtype)

    @property
    def published(self) -> bool:
        """Return True where the input side is in the original code's layout; for one block it is the diagonal one."""
        return "input" in self.sides and self.adapter_config.block_layout == "published" and self.adapter_config.nb > 1

    def transform(self, part: Part, side: str, x: Tensor, *, center: Tensor | None = None) -> Tensor:
        """Return R x on one side of one part, or R(x - center) + center: (..., size) to (..., size)."""
        options = {"center": center, "block_mask": self.draw_blocks()}
        # Attention keeps its v too; an input x has other readers that keep it.
        return self.method.apply(x, self.vectors(part, side), save_output=side == "output", **options)

    def draw_blocks(self) -> Tensor | None:
        """Return (n, 1), zero for the blocks dropped in this pass; None where none is."""
        config = self.adapter_config
        return draw_blocks(config.nb, config.block_dropout if self.training else 0.0, self.factory["device"])

    def merged_rows(self, part: Part, rows: Tensor) -> Tensor:
        """Return R_out W R_in of one part: rows take R_in's transpose, columns take R_out."""
        if "input" in self.sides:
            n, vectors = self.adapter_config.nb, self.vectors(part, "input")
            if self.published:  # row group r meets R_r in each of its n chunks j: (r, f/n, j, b) to (f/n, j, r b)
                rows = rows.unflatten(0, (n, -1)).unflatten(-1, (n, -1)).permute(1, 2, 0, 3).flatten(-2)
            rows = self.method.apply(rows, vectors, transposed=True)
            if self.published:
                rows = rows.unflatten(-1, (n, -1)).permute(2, 0, 1, 3).flatten(-2).flatten(0, 1)
        return self.method.apply(rows.T, self.vectors(part, "output")).T if "output" in self.sides else rows

    @property
    def full_rank(self) -> str | None:
        """Return why there is no ``low_rank``, or None."""
        if self.method.matrices:
            return f"{self.adapter_config.Htype} rotates all of a weight, which is no change of low rank"
        if self.published:
            n = self.adapter_config.nb
            return f"on the input side the published block layout has a rank of up to n^2, here n = {n}"
        return None

    def low_rank(self, part: Part, rows: Tensor) -> tuple[Tensor, Tensor]:
        """Return A and B with R_out W R_in = W + B A: of rank n (ETHER) or 2n (ETHER+) for each side."""
        return reflections.reflection_factors(rows, **{side: self.vectors(part, side) for side in self.sides})

    def elementwise_flops(self, positions: float) -> float:
        """Return the FLOPs of a step outside of matrix products, forward and backward.

        - ETHER, ETHER+: for each position and entry of a side, x + update and the same with the gradient (2); beside a
          bias, for each projection its bias's and that one's derivative (2). Once a step, for each entry of a vector,
          u / |u|, sum and difference, and their derivatives (13). All else are matrix products.
        - OFT: for each b x b block, S, I + S, I - S and their derivatives (8 b^2), an LU decomposition (2/3 b^3) and
          triangular solves for b right-hand sides (2 b^3). Beside a bias, x - bias, the sum with x and its derivative
          (3 a position). Products with R, and those in R's derivative, are matrix products.
        """
        total = 0.0
        for parameter in self.own_parameters().values():
            size, block = parameter.numel(), parameter.size(-1)
            if self.method.matrices:
                total += (8 + 8 / 3 * block) * size + (0 if self.bias is None else 3 * positions * size / block)
            else:
                biased = 0 if self.bias is None else 2 / block
                total += (positions * (2 / self.method.tensors + biased) + 13) * size
        return total


class EtherLinear(EtherLayer):
    """Any Linear but the fused q, k, v."""


class EtherQKVLinear(EtherLayer, QKVLinear):
    """The fused q, k, v, each with an adapter of its own; QKVLinear gives it the order of rows in files, no more."""


def draw_blocks(n: int, dropout: float, device: torch.device) -> Tensor | None:
    """Return a mask (n, 1), zero for each block with probability ``dropout``; None where that is 0."""
    return (torch.rand(n, 1, device=device) >= dropout).float() if dropout else None


def side_order(linear: nn.Linear, config: EtherConfig) -> tuple[str, ...]:
    """Return the sides of a Linear that are transformed, in the order in which the original code numbers them."""
    output_first = isinstance(linear, QKVLinear) or is_flipped(linear, config)
    sides = ("output", "input") if output_first else ("input", "output")
    return sides if METHODS[config.Htype].two_sided else sides[:1]


def is_flipped(linear: nn.Linear, config: EtherConfig) -> bool:
    """Return True where ``flip_side`` moves this Linear's transform: its output must be its smaller side."""
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
    if config.flip_side and not any(is_flipped(linear, config) for _, linear, _ in linear_targets(model, config)):
        warnings.warn(
            "flip_side changes nothing: no chosen target has an output smaller than its input (query, key and value "
            "are transformed on their output in any case)",
            stacklevel=2,
        )
    adapter.replace_targets(model, config, plain=EtherLinear, fused=EtherQKVLinear)


def check_blocks(model: GPT, config: EtherConfig) -> None:
    """Raise unless n cuts every adapted side into blocks of at least 2 (a block of 1 has nothing to learn)."""
    sizes: dict[str, int] = {}
    for name, linear, targets in linear_targets(model, config):
        sides = side_order(linear, config)
        for part in (part for part in adapter.cut_parts(linear, targets) if part.adapted):
            label = f"{name} ({part.target})" if part.target else name
            of_side = {"input": linear.in_features, "output": part.size}
            sizes |= {f"{label} {side}": of_side[side] for side in sides}
            if "input" in sides and config.block_layout == "published" and config.nb > 1:
                sizes[f"{label} rows"] = part.size
    if sizes:
        check_sizes(config.nb, sizes)


def check_sizes(n: int, sizes: dict[str, int]) -> None:
    """Raise UserError unless n cuts each of the sizes, given with their names, into blocks of at least 2."""
    shared = math.gcd(*sizes.values())
    legal = [m for m in range(1, shared + 1) if shared % m == 0 and all(size // m >= 2 for size in sizes.values())]
    if n not in legal:
        module, size = next((m, s) for m, s in sizes.items() if s % n or s // n < 2)
        raise UserError(
            f"{n} blocks do not divide {module} of size {size} into blocks of 2 or more; "
            f"legal for all chosen targets: {', '.join(map(str, legal))}"
        )


def set_ether_strength(state: Mapping[str, Tensor], config: EtherConfig, strength: float) -> dict[str, Tensor]:
    """Return an adapter's tensors at a strength: ETHER+'s v turned from -u, OFT's A times it.

    Raises:
        ValueError: ETHER, whose reflections are never near the identity.
    """
    method = METHODS[config.Htype]
    if method.matrices:
        return {name: strength * tensor for name, tensor in state.items()}
    if method.tensors == 1:
        raise UserError(
            f"--strength {strength:g}: plain ETHER cannot be scaled towards the base; ETHER+, OFT and LoRA can"
        )
    changed = dict(state)
    for name, v in state.items():
        u = state.get(name.replace("_R2", "_R").replace("_R4", "_R3"))  # its partner; where it is missing the file
        if u is not None and u is not v:  # fits no model, which is said when it is put on one
            changed[name] = reflections.turn(u, v, strength)
    return changed


def ether_filter(name: str, _: Any = None) -> bool:
    """Return True for names of ETHER, ETHER+ and OFT parameters."""
    return ".ether_R" in name


mark_only_ether_as_trainable = adapter.mark_only_adapter_as_trainable
merge_ether_weights = adapter.merge_adapter_weights
