"""Compute rotary position embeddings (Su et al., 2104.09864), stretched for longer contexts as Hugging Face does it.

Angles follow from the positions in each forward pass: there is no buffer to size, to move, or to fill after a start on
the meta device. Frequencies are fp32, whatever the model's dtype.

Shapes: T tokens, S head size, n elements of a head that are rotated.
"""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from lit_gpt.config import ORIGINAL_LENGTH, Config

Rope = tuple[Tensor, Tensor]
"""Cosines and sines, (T, n) each."""


def rope_angles(
    config: Config, spans: Sequence[tuple[int, int]], *, device: torch.device, dtype: torch.dtype, local: bool = False
) -> Rope:
    """Return the rotary embedding of positions.

    Args:
        config: the model.
        spans: first position and end of each run of positions in a row; two types of scaling depend on the end.
        device: of cosines and sines.
        dtype: of cosines and sines.
        local: of the layers with a window, where they have a base of their own and no scaling.
    """
    base, scaling = (config.local_rope_base, None) if local else (config.rope_base, config.rope_scaling)
    first = min(start for start, _ in spans)
    made: dict[int, Rope] = {}  # by how the positions are stretched, of the longest sequence
    for _, end in sorted(spans, key=lambda span: -span[1]):
        if (stretch := config.rope_stretch(end)) not in made:
            frequencies, factor = scaled_frequencies(base, config.rope_n_elem, scaling, length=end, device=device)
            positions = torch.arange(first, end, device=device).float()
            angles = torch.outer(positions, frequencies).repeat(1, 2)  # (T, n): both halves turn alike
            cos, sin = angles.cos(), angles.sin()
            made[stretch] = tuple((part if factor == 1 else part * factor).to(dtype) for part in (cos, sin))
    rows = [(made[config.rope_stretch(end)], slice(start - first, end - first)) for start, end in spans]
    return tuple(torch.cat([angles[part][span] for angles, span in rows]) for part in (0, 1))


def scaled_frequencies(
    base: float, n: int, scaling: dict[str, Any] | None, *, length: int = 0, device: torch.device | None = None
) -> tuple[Tensor, float]:
    """Return the (n / 2,) turns a position, in radians, and a factor of cosines and sines."""
    scaling = scaling or {"rope_type": "default"}
    kind, factor, original = scaling["rope_type"], scaling.get("factor", 1.0), scaling.get(ORIGINAL_LENGTH, 0)
    if kind == "dynamic" and length > original:  # the base grows with the text
        base = base * (factor * length / original - (factor - 1)) ** (n / (n - 2))
    frequencies = 1.0 / base ** (torch.arange(0, n, 2, device=device).float() / n)
    if kind == "linear":
        return frequencies / factor, 1.0
    if kind == "llama3":
        # Slow waves are stretched by the factor, fast ones stay, those between are blended.
        low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
        turns = original * frequencies / (2 * math.pi)
        blend = ((turns - low) / (high - low)).clamp(0, 1)
        return blend * frequencies + (1 - blend) * frequencies / factor, 1.0
    if kind == "yarn":
        return _yarn(frequencies, base, scaling), _yarn_factor(scaling)
    if kind == "longrope":
        own = scaling["long_factor" if length > original else "short_factor"]
        usual = math.sqrt(1 + math.log(factor) / math.log(original)) if factor > 1 else 1.0
        return frequencies / torch.tensor(own, device=device), scaling.get("attention_factor") or usual
    return frequencies, 1.0


def _yarn(frequencies: Tensor, base: float, scaling: dict[str, Any]) -> Tensor:
    """Stretch waves that turn seldom in the original context, keep fast ones (YaRN, 2309.00071, section 3.2)."""
    n = 2 * len(frequencies)

    def dimension(turns: float) -> float:
        """Return the index of the wave that turns this often in the original context."""
        return n * math.log(scaling[ORIGINAL_LENGTH] / (turns * 2 * math.pi)) / (2 * math.log(base))

    low, high = dimension(scaling.get("beta_fast") or 32), dimension(scaling.get("beta_slow") or 1)
    if scaling.get("truncate", True):
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, n - 1)
    waves = torch.arange(n // 2, device=frequencies.device)
    stretched = ((waves - low) / max(high - low, 0.001)).clamp(0, 1)
    return stretched * frequencies / scaling["factor"] + (1 - stretched) * frequencies


def _yarn_factor(scaling: dict[str, Any]) -> float:
    """Return the factor of cosines and sines, which makes attention as sharp as it was (section 3.4)."""

    def sharpen(weight: float) -> float:
        return 0.1 * weight * math.log(scaling["factor"]) + 1.0 if scaling["factor"] > 1 else 1.0

    both = scaling.get("mscale"), scaling.get("mscale_all_dim")
    usual = sharpen(both[0]) / sharpen(both[1]) if all(both) else sharpen(1.0)
    return scaling.get("attention_factor") or usual


def apply_rope(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate the first elements of each head of x (B, H, T, S): the first half of them pairs with the second."""
    n = cos.size(-1)
    rotated, rest = x[..., :n], x[..., n:]
    first, second = rotated.chunk(2, dim=-1)
    rotated = rotated * cos + torch.cat((-second, first), dim=-1) * sin
    return rotated if rest.size(-1) == 0 else torch.cat((rotated, rest), dim=-1)
