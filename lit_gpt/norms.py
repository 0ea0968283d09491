"""The norms of a transformer, built as its ``Config`` says.

Shapes: B batch, T tokens, d n_embd, H heads, S head size.
"""

from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lit_gpt.config import Config


class OffsetRMSNorm(nn.RMSNorm):
    """An RMSNorm whose factor is 1 + weight, in fp32 (Gemma)."""

    def reset_parameters(self) -> None:
        """Start at a factor of 1."""
        nn.init.zeros_(self.weight)

    def forward(self, x: Tensor) -> Tensor:
        """Map (..., d) to (..., d)."""
        return F.rms_norm(x.float(), self.normalized_shape, 1 + self.weight.float(), self.eps).type_as(x)


class HeadNorms(nn.Module):
    """A LayerNorm without bias for each head, their weights one after another (StableLM 2)."""

    def __init__(self, config: Config, n_heads: int) -> None:
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.ones(n_heads * config.head_size)), config.norm_eps

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, H, T, S) to (B, H, T, S)."""
        return F.layer_norm(x, x.shape[-1:], eps=self.eps) * self.weight.view(x.size(1), 1, -1)


NORMS = {
    "RMSNorm": nn.RMSNorm,
    "LayerNorm": nn.LayerNorm,
    "OffsetRMSNorm": OffsetRMSNorm,
    "PlainLayerNorm": partial(nn.LayerNorm, elementwise_affine=False),
}


def build_norm(config: Config) -> nn.Module:
    """Return the norm that the config names."""
    return NORMS[config.norm_class](config.n_embd, eps=config.norm_eps)


def build_qk_norm(config: Config, n_heads: int) -> nn.Module:
    """Return the norm of q or k, of so many heads."""
    if config.qk_norm_over == "heads":
        return HeadNorms(config, n_heads)
    width = n_heads * config.head_size if config.qk_norm_over == "row" else config.head_size
    return NORMS[config.norm_class](width, eps=config.norm_eps)
