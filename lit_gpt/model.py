"""A decoder-only transformer in plain PyTorch; its ``Config`` makes it a Llama, a Qwen, a Gemma, a Pythia, ...

Notable choices:
- Module and file names are Lit-GPT's. Files hold the fused QKV weight interleaved (for each key/value group its query
  heads, then its key head, then its value head); in memory its rows are [q | k | v], so that each projection is a
  contiguous block that an adapter can multiply alone. ``QKVLinear`` converts while it loads and saves.
- Adapters replace ``nn.Linear`` modules from outside; nothing here knows of them.
- Layers of one kind (window, rotary embedding) share what attention needs beside its input, made once a pass.

Shapes: B batch, T tokens, d n_embd, H query heads, G key/value groups, S head size, V padded vocabulary.
"""

from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from lit_gpt.attention import AttentionContext, KVCache, Lengths, Trees
from lit_gpt.config import Config, LayerKind
from lit_gpt.loss import IGNORE_INDEX, chunked_cross_entropy
from lit_gpt.norms import build_norm, build_qk_norm
from lit_gpt.rope import apply_rope


class GPT(nn.Module):
    """The language model; weights start at PyTorch's defaults, ``checkpoint.load_model`` fills in pretrained ones."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.config = config
        self.activation_checkpointing = False  # if true, the backward pass computes all but each block's input again
        self.lm_head = nn.Linear(config.n_embd, config.padded_vocab_size, bias=config.lm_head_bias)
        wte = TokenEmbedding(config.padded_vocab_size, config.n_embd)
        blocks = nn.ModuleList(Block(config, kind) for kind in config.layer_kinds)
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
            return self.logits(x)
        wanted = targets != IGNORE_INDEX
        flags = dict(reduction=reduction, finish=self.finish_logits)
        return chunked_cross_entropy(self.lm_head, x[wanted], targets[wanted], **flags)

    def logits(self, x: Tensor) -> Tensor:
        """Map (..., d) states, as ``hidden`` gives them, to (..., V) logits."""
        return self.finish_logits(self.lm_head(x))

    def finish_logits(self, logits: Tensor) -> Tensor:
        """Scale and bend what the head gives, where the model does (Granite, Gemma 2)."""
        if self.config.logits_scale != 1:
            logits = logits / self.config.logits_scale
        cap = self.config.logits_softcap
        return cap * torch.tanh(logits / cap) if cap else logits

    def hidden(
        self, idx: Tensor, *, input_pos: int | None = None, lengths: Lengths = None, trees: Trees = None
    ) -> Tensor:
        """Return the (B, T, d) states that the head reads.

        Args:
            idx: (B, T) token ids.
            input_pos: position of ``idx``'s first token; given, keys and values go through the cache.
            lengths: of the samples that are packed, one after another, in ``idx``'s only row; each has positions
                from 0 and attends to itself alone.
            trees: lengths of a trunk and its branches, for each of those that are packed in ``idx``'s only row; of
                evaluation. A branch continues its trunk, a trunk the cache's first ``input_pos`` positions, which stay.
        """
        x = self.transformer.wte(idx)  # (B, T, d)
        if self.config.embedding_scale != 1:
            x = x * torch.tensor(self.config.embedding_scale, dtype=x.dtype)  # rounded to x's type, as Gemma's is
        kinds = dict.fromkeys(block.kind for block in self.transformer.h)
        contexts = {kind: AttentionContext(self.config, kind, x, input_pos, lengths, trees) for kind in kinds}
        compute_again = self.activation_checkpointing and torch.is_grad_enabled()
        for block in self.transformer.h:
            context = contexts[block.kind]
            x = checkpoint(block, x, context, use_reentrant=False) if compute_again else block(x, context)
        return self.transformer.ln_f(x)

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

    def __init__(self, config: Config, kind: LayerKind) -> None:
        super().__init__()
        self.kind = kind
        self.parallel_residual, self.residual_scale = config.parallel_residual, config.residual_scale
        pre, post = (build_norm if present else nn.Identity for present in (config.pre_norm, config.post_norm))
        self.norm_1 = pre(config)
        self.attn = CausalSelfAttention(config)
        self.post_attention_norm = post(config)
        self.norm_2 = None if config.shared_attention_norm else pre(config)
        self.mlp = MLPS[config.mlp_class](config)
        self.post_mlp_norm = post(config)

    def forward(self, x: Tensor, context: AttentionContext) -> Tensor:
        """Map (B, T, d) to (B, T, d)."""
        normed = self.norm_1(x)
        attended = self.post_attention_norm(self.attn(normed, context))
        if self.parallel_residual:
            return x + attended + self.mlp(normed if self.norm_2 is None else self.norm_2(x))
        x = torch.add(x, attended, alpha=self.residual_scale)
        return torch.add(x, self.post_mlp_norm(self.mlp(self.norm_2(x))), alpha=self.residual_scale)


class CausalSelfAttention(nn.Module):
    """Multi-head, grouped-query or multi-query attention with rotary positions."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.config = config
        self.attn = QKVLinear(config)
        self.proj = nn.Linear(config.q_size, config.n_embd, bias=config.proj_bias)
        self.norm_q = build_qk_norm(config, config.n_head) if config.qk_norm else None
        self.norm_k = build_qk_norm(config, config.n_query_groups) if config.qk_norm else None
        self.kv_cache: KVCache | None = None

    def forward(self, x: Tensor, context: AttentionContext) -> Tensor:
        """Map (B, T, d) to (B, T, d)."""
        (B, T, _), config = x.shape, self.config
        q, k, v = self.attn(x)  # (B, T, H or G * S)
        if config.qkv_clip:
            q, k, v = (part.clamp(-config.qkv_clip, config.qkv_clip) for part in (q, k, v))
        if self.norm_q is not None and config.qk_norm_over == "row":
            q, k = self.norm_q(q), self.norm_k(k)
        q, k, v = (part.view(B, T, -1, config.head_size).transpose(1, 2) for part in (q, k, v))  # (B, H or G, T, S)
        if self.norm_q is not None and config.qk_norm_over != "row":
            q, k = self.norm_q(q), self.norm_k(k)
        if config.attention_scale:
            q = q * (config.attention_scale * config.head_size**0.5)  # attend divides by that root
        if context.rope is not None:
            q, k = apply_rope(q, *context.rope), apply_rope(k, *context.rope)
        if context.start is not None:
            assert self.kv_cache is not None, "call set_kv_cache before giving input_pos"
            with_cache = self.kv_cache.followed_by if context.packed else self.kv_cache.update
            k, v = with_cache(k, v, start=context.start)  # (B, G, start + T, S)
        y = context.attend(q, k, v)  # (B, H, T, S)
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

    # A tensor on the meta device has no rows to order, and torch.cat would import the compiler for it.
    def _save_to_state_dict(self, destination: dict[str, Tensor], prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        for name in (f"{prefix}weight", f"{prefix}bias"):
            if name in destination and not destination[name].is_meta:
                destination[name] = interleave_qkv(destination[name], self.config)

    def _load_from_state_dict(self, state_dict: dict[str, Tensor], prefix: str, *rest: Any) -> None:
        for name in (f"{prefix}weight", f"{prefix}bias"):
            if name in state_dict and not state_dict[name].is_meta:
                state_dict[name] = deinterleave_qkv(state_dict[name], self.config)
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
    """A gate and a value of the MLP's width, multiplied (Shazeer, 2002.05202)."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.fc_1 = nn.Linear(config.n_embd, config.intermediate_size, bias=config.mlp_bias)
        self.fc_2 = nn.Linear(config.n_embd, config.intermediate_size, bias=config.mlp_bias)
        self.proj = nn.Linear(config.intermediate_size, config.n_embd, bias=config.mlp_bias)
        gelu = partial(F.gelu, approximate=config.gelu_approximate)
        self.activation = gelu if config.mlp_class == "GemmaMLP" else F.silu

    def forward(self, x: Tensor) -> Tensor:
        """Map (..., d) to (..., d)."""
        return self.proj(self.activation(self.fc_1(x)) * self.fc_2(x))


class LLaMAMoE(nn.Module):
    """A mixture of SwiGLU experts: each token goes to the ``n_expert_per_token`` that the router likes best."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.gate = nn.Linear(config.n_embd, config.n_expert, bias=False)
        self.experts = nn.ModuleList(LLaMAMLP(config) for _ in range(config.n_expert))
        self.n_expert_per_token, self.norm_expert_weights = config.n_expert_per_token, config.norm_expert_weights

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, T, d) to (B, T, d)."""
        tokens = x.flatten(0, -2)  # (B * T, d)
        scores = self.gate(tokens).float()  # (B * T, experts)
        best, chosen = scores.topk(self.n_expert_per_token, dim=-1)
        if self.norm_expert_weights:
            weights = best.softmax(dim=-1).to(x.dtype)  # over the chosen alone
        else:
            weights = scores.softmax(dim=-1).gather(-1, chosen).to(x.dtype)
        out = torch.zeros_like(tokens)
        for index, expert in enumerate(self.experts):
            row, slot = torch.where(chosen == index)
            out = out.index_add(0, row, expert(tokens[row]) * weights[row, slot, None])
        return out.view_as(x)


MLPS = {"GptNeoxMLP": GptNeoxMLP, "LLaMAMLP": LLaMAMLP, "GemmaMLP": LLaMAMLP, "LLaMAMoE": LLaMAMoE}


def interleave_qkv(rows: Tensor, config: Config) -> Tensor:
    """Order rows [q | k | v] of a fused weight or bias as files do: per group its q heads, then k, then v."""
    parts = [part.unflatten(0, (config.n_query_groups, -1)) for part in rows.split(config.qkv_sizes)]
    return torch.cat(parts, dim=1).flatten(0, 1)


def deinterleave_qkv(rows: Tensor, config: Config) -> Tensor:
    """Undo ``interleave_qkv``."""
    sizes = [size // config.n_query_groups for size in config.qkv_sizes]
    parts = rows.unflatten(0, (config.n_query_groups, -1)).split(sizes, dim=1)
    return torch.cat([part.flatten(0, 1) for part in parts])
