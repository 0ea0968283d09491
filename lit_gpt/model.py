"""A decoder-only transformer in plain PyTorch: Llama, Mistral, Mixtral, GPT-NeoX/Pythia and Phi by their ``Config``.

Notable choices:
- Module and file names are Lit-GPT's. Files hold the fused QKV weight interleaved (for each key/value group its query
  heads, then its key head, then its value head); in memory its rows are [q | k | v], so that each projection is a
  contiguous block that an adapter can multiply alone. ``QKVLinear`` converts while it loads and saves.
- Adapters replace ``nn.Linear`` modules from outside; nothing here knows of them.
- Rotary angles are computed from the positions in each forward pass (once, not once a layer): there is no buffer to
  size, to move, or to fill after a start on the meta device.

Shapes: B batch, T tokens, d n_embd, H query heads, G key/value groups, S head size, V padded vocabulary.
"""

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from lit_gpt.attention import KVCache, Packing, attend
from lit_gpt.config import Config
from lit_gpt.errors import UserError
from lit_gpt.loss import IGNORE_INDEX, chunked_cross_entropy

Rope = tuple[Tensor, Tensor]
"""Cosines and sines of the rotary embedding, (T, rope_n_elem) each."""


class GPT(nn.Module):
    """The language model; weights start at PyTorch's defaults, ``checkpoint.load_model`` fills in pretrained ones."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.config = config
        self.activation_checkpointing = False  # if true, the backward pass computes all but each block's input again
        self.lm_head = nn.Linear(config.n_embd, config.padded_vocab_size, bias=config.lm_head_bias)
        wte = TokenEmbedding(config.padded_vocab_size, config.n_embd)
        blocks = nn.ModuleList(Block(config) for _ in range(config.n_layer))
        self.transformer = nn.ModuleDict({"wte": wte, "h": blocks, "ln_f": build_norm(config)})
        self.tie_weights()

    def tie_weights(self) -> None:
        """Make head and embedding one parameter where the config says so; call it after ``assign=True`` loads."""
        if self.config.tie_embeddings:
            self.lm_head.weight = self.transformer.wte.weight

    def forward(self, idx: Tensor, *, targets: Tensor | None = None, reduction: str = "sum", **context: Any) -> Tensor:
        """Return logits, or the loss where targets are given.

        Args:
            idx: (B, T) token ids.
            targets: (B, T), the id that each position should predict, or ``IGNORE_INDEX``.
            reduction: ``sum``, or ``none`` for one loss for each target, in row order.
            context: ``input_pos`` or ``lengths``, as ``hidden`` takes them.

        Returns:
            (B, T, V) logits; with targets their cross entropy, in fp32. The head runs on positions with a target
            alone, some at a time: the logits of a long sequence are never all in memory.
        """
        x = self.hidden(idx, **context)
        if targets is None:
            return self.lm_head(x)
        wanted = targets != IGNORE_INDEX
        return chunked_cross_entropy(self.lm_head, x[wanted], targets[wanted], reduction=reduction)

    def hidden(self, idx: Tensor, *, input_pos: int | None = None, lengths: Sequence[int] | None = None) -> Tensor:
        """Return the (B, T, d) states that the head reads.

        Args:
            idx: (B, T) token ids.
            input_pos: position of ``idx``'s first token; given, keys and values go through the cache.
            lengths: of the samples that are packed, one after another, in ``idx``'s only row; each has positions
                from 0 and attends to itself alone.
        """
        T, start = idx.size(1), input_pos or 0
        longest = max(lengths) if lengths else T
        if start + longest > self.config.block_size:
            raise UserError(f"{start + longest} tokens do not fit the model's context of {self.config.block_size}")
        x = self.transformer.wte(idx)  # (B, T, d)
        positions = torch.arange(start, start + longest, device=idx.device)
        packing = Packing(lengths, self.config, device=x.device, dtype=x.dtype) if lengths else None
        mask = None if packing and packing.fused else self.attention_mask(start, longest, idx.device)
        if packing:
            positions = torch.cat([positions[:length] for length in packing.lengths])  # (T,)
        context = (rope_angles(self.config, positions, x.dtype), mask, input_pos, packing)
        compute_again = self.activation_checkpointing and torch.is_grad_enabled()
        for block in self.transformer.h:
            x = checkpoint(block, x, *context, use_reentrant=False) if compute_again else block(x, *context)
        return self.transformer.ln_f(x)

    def attention_mask(self, start: int, T: int, device: torch.device) -> Tensor | None:
        """Return (T, start + T), true where a query may look; None where plain causal attention says the same."""
        window = self.config.sliding_window
        if (start == 0 or T == 1) and (window is None or start + T <= window):
            return None
        queries = torch.arange(start, start + T, device=device)[:, None]
        keys = torch.arange(start + T, device=device)[None, :]
        mask = keys <= queries
        return mask if window is None else mask & (keys > queries - window)

    def set_kv_cache(self, batch_size: int, max_seq_length: int) -> None:
        """Make room for the keys and values of ``batch_size`` sequences; forward then takes ``input_pos``."""
        weight = self.transformer.wte.weight
        shape = (batch_size, self.config.n_query_groups, max_seq_length, self.config.head_size)
        for block in self.transformer.h:
            block.attn.kv_cache = KVCache(shape, weight.device, weight.dtype)

    def clear_kv_cache(self) -> None:
        """Free the caches."""
        for block in self.transformer.h:
            block.attn.kv_cache = None


class TokenEmbedding(nn.Embedding):
    """An embedding that draws no start on the meta device, where PyTorch would import its compiler to draw nothing."""

    def reset_parameters(self) -> None:
        """PyTorch's normal start, where there is memory to hold it."""
        if not self.weight.is_meta:
            super().reset_parameters()


class Block(nn.Module):
    """Attention and MLP around the residual stream, one after the other or in parallel."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.parallel_residual = config.parallel_residual
        self.norm_1 = build_norm(config)
        self.attn = CausalSelfAttention(config)
        self.norm_2 = None if config.shared_attention_norm else build_norm(config)
        self.mlp = MLPS[config.mlp_class](config)

    def forward(self, x: Tensor, *context: Any) -> Tensor:
        """Map (B, T, d) to (B, T, d); ``context`` is for the attention."""
        normed = self.norm_1(x)
        attended = self.attn(normed, *context)
        if self.parallel_residual:
            return x + attended + self.mlp(normed if self.norm_2 is None else self.norm_2(x))
        x = x + attended
        return x + self.mlp(self.norm_2(x))


class CausalSelfAttention(nn.Module):
    """Multi-head, grouped-query or multi-query attention with rotary positions."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.config = config
        self.attn = QKVLinear(config)
        self.proj = nn.Linear(config.q_size, config.n_embd, bias=config.proj_bias)
        self.norm_q = nn.RMSNorm(config.head_size, eps=config.norm_eps) if config.qk_norm else None
        self.norm_k = nn.RMSNorm(config.head_size, eps=config.norm_eps) if config.qk_norm else None
        self.kv_cache: KVCache | None = None

    def forward(self, x: Tensor, rope: Rope, mask: Tensor | None, start: int | None, packing: Packing | None) -> Tensor:
        """Map (B, T, d) to (B, T, d).

        Args:
            x: (B, T, d).
            rope: cosines and sines of the positions.
            mask: (T, start + T), true where a query may look; None for causal attention.
            start: position of x's first token in the cache; None goes without the cache.
            packing: the samples that x's only row is made of; None for one sample a row.
        """
        B, T, _ = x.shape
        config = self.config
        q, k, v = [part.view(B, T, -1, config.head_size).transpose(1, 2) for part in self.attn(x)]  # (B, H or G, T, S)
        if self.norm_q is not None:
            q, k = self.norm_q(q), self.norm_k(k)
        q, k = apply_rope(q, *rope), apply_rope(k, *rope)
        if start is not None:
            assert self.kv_cache is not None, "call set_kv_cache before giving input_pos"
            k, v = self.kv_cache.update(k, v, start=start)  # (B, G, start + T, S)
        if T == 1 and packing is None:
            # The query heads of a group become queries that read its keys once: bf16 on a CPU, 4 times as fast.
            q = q.reshape(B, config.n_query_groups, -1, config.head_size)  # (B, G, H / G, S)
        y = attend(q, k, v, mask, is_causal=T > 1) if packing is None else packing.attend(q, k, v, mask)
        y = y.reshape(B, config.n_head, T, config.head_size)
        return self.proj(y.transpose(1, 2).reshape(B, T, config.q_size))


class QKVLinear(nn.Linear):
    """The fused query, key and value projection: rows [q | k | v] in memory, interleaved in files.

    One product each: an adapted q, k or v then starts bit for bit as its base, and attention, which keeps v for the
    backward pass, does not keep q and k with it.
    """

    def __init__(self, config: Config, **factory: Any) -> None:
        self.sizes = config.qkv_sizes
        super().__init__(config.n_embd, sum(self.sizes), bias=config.qkv_bias, **factory)
        self.config = config

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        """Map (..., d) to q (..., H S), k and v (..., G S)."""
        biases = (None,) * 3 if self.bias is None else self.bias.split(self.sizes)
        return tuple(F.linear(x, *rows) for rows in zip(self.weight.split(self.sizes), biases, strict=True))

    def _save_to_state_dict(self, destination: dict[str, Tensor], prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        for name in ("weight", "bias"):
            if prefix + name in destination:
                destination[prefix + name] = interleave_qkv(destination[prefix + name], self.config)

    def _load_from_state_dict(self, state_dict: dict[str, Tensor], prefix: str, *rest: Any) -> None:
        for name in ("weight", "bias"):
            if prefix + name in state_dict:
                state_dict[prefix + name] = deinterleave_qkv(state_dict[prefix + name], self.config)
        super()._load_from_state_dict(state_dict, prefix, *rest)


class GptNeoxMLP(nn.Module):
    """Two Linears around a GELU."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.fc = nn.Linear(config.n_embd, config.intermediate_size, bias=config.mlp_bias)
        self.proj = nn.Linear(config.intermediate_size, config.n_embd, bias=config.mlp_bias)
        self.gelu_approximate = config.gelu_approximate

    def forward(self, x: Tensor) -> Tensor:
        """Map (..., d) to (..., d)."""
        return self.proj(F.gelu(self.fc(x), approximate=self.gelu_approximate))


class LLaMAMLP(nn.Module):
    """SwiGLU (Shazeer, 2002.05202): a gate and a value of the MLP's width, multiplied."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.fc_1 = nn.Linear(config.n_embd, config.intermediate_size, bias=config.mlp_bias)
        self.fc_2 = nn.Linear(config.n_embd, config.intermediate_size, bias=config.mlp_bias)
        self.proj = nn.Linear(config.intermediate_size, config.n_embd, bias=config.mlp_bias)

    def forward(self, x: Tensor) -> Tensor:
        """Map (..., d) to (..., d)."""
        return self.proj(F.silu(self.fc_1(x)) * self.fc_2(x))


class LLaMAMoE(nn.Module):
    """A mixture of SwiGLU experts: each token goes to the ``n_expert_per_token`` that the router likes best."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.gate = nn.Linear(config.n_embd, config.n_expert, bias=False)
        self.experts = nn.ModuleList(LLaMAMLP(config) for _ in range(config.n_expert))
        self.n_expert_per_token = config.n_expert_per_token

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, T, d) to (B, T, d)."""
        tokens = x.flatten(0, -2)  # (B * T, d)
        scores, chosen = self.gate(tokens).float().topk(self.n_expert_per_token, dim=-1)
        weights = scores.softmax(dim=-1).to(x.dtype)  # over the chosen alone, as Mixtral renormalises
        out = torch.zeros_like(tokens)
        for index, expert in enumerate(self.experts):
            row, slot = torch.where(chosen == index)
            out = out.index_add(0, row, expert(tokens[row]) * weights[row, slot, None])
        return out.view_as(x)


MLPS = {"GptNeoxMLP": GptNeoxMLP, "LLaMAMLP": LLaMAMLP, "LLaMAMoE": LLaMAMoE}


def build_norm(config: Config) -> nn.Module:
    """Return the norm that the config names."""
    return getattr(nn, config.norm_class)(config.n_embd, eps=config.norm_eps)


def rope_angles(config: Config, positions: Tensor, dtype: torch.dtype) -> Rope:
    """Return the rotary embedding (Su et al., 2104.09864) of (T,) positions; the angles themselves are fp32."""
    n = config.rope_n_elem
    exponents = torch.arange(0, n, 2, device=positions.device).float() / n
    frequencies = scale_frequencies(1.0 / config.rope_base**exponents, config.rope_scaling)
    angles = torch.outer(positions.float(), frequencies).repeat(1, 2)  # (T, n): both halves turn alike
    return angles.cos().to(dtype), angles.sin().to(dtype)


def scale_frequencies(frequencies: Tensor, scaling: dict[str, Any] | None) -> Tensor:
    """Stretch rotary frequencies for a longer context: Hugging Face's ``linear`` and ``llama3`` scaling."""
    if scaling is None:
        return frequencies
    if scaling["rope_type"] == "linear":
        return frequencies / scaling["factor"]
    # Llama 3: slow waves are stretched by the factor, fast ones stay, those between are blended.
    low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
    turns = scaling["original_max_position_embeddings"] * frequencies / (2 * math.pi)
    blend = ((turns - low) / (high - low)).clamp(0, 1)
    return blend * frequencies + (1 - blend) * frequencies / scaling["factor"]


def apply_rope(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate the first elements of each head of x (B, H, T, S): the first half of them pairs with the second."""
    n = cos.size(-1)
    rotated, rest = x[..., :n], x[..., n:]
    first, second = rotated.chunk(2, dim=-1)
    rotated = rotated * cos + torch.cat((-second, first), dim=-1) * sin
    return rotated if rest.size(-1) == 0 else torch.cat((rotated, rest), dim=-1)


def interleave_qkv(rows: Tensor, config: Config) -> Tensor:
    """Order rows [q | k | v] of a fused weight or bias as files do: per group its q heads, then k, then v."""
    parts = [part.unflatten(0, (config.n_query_groups, -1)) for part in rows.split(config.qkv_sizes)]
    return torch.cat(parts, dim=1).flatten(0, 1)


def deinterleave_qkv(rows: Tensor, config: Config) -> Tensor:
    """Undo ``interleave_qkv``."""
    sizes = [size // config.n_query_groups for size in config.qkv_sizes]
    parts = rows.unflatten(0, (config.n_query_groups, -1)).split(sizes, dim=1)
    return torch.cat([part.flatten(0, 1) for part in parts])
