"""The same LoRA finetuning in PEFT on transformers: an oracle for our model, our LoRA and our loop at once."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import peft
import torch
import torch.nn.functional as F
import transformers

from lit_gpt.batches import collate, sample_order
from lit_gpt.data import Sample
from lit_gpt.train import learning_rate


def peft_losses(
    hf_dir: Path | str,
    start: Mapping[str, torch.Tensor],
    samples: Sequence[Sample],
    *,
    n_steps: int,
    size: int,
    peak: float,
    seed: int = 1337,
    alpha: float = 16,
) -> list[float]:
    """Mean loss over the target tokens of each step, fp32, q and v adapted.

    Args:
        hf_dir: the base, as transformers reads it (separate q, k and v).
        start: our adapter's parameters, by our names.
        samples: the training set.
        n_steps: optimizer steps; no warm-up below ten, as our loop's default.
        size: rows of a step.
        peak: learning rate.
        seed: of the order of the rows.
        alpha: LoRA's.
    """
    base = transformers.AutoModelForCausalLM.from_pretrained(hf_dir, dtype=torch.float32)
    r = next(iter(start.values())).size(0) // 2
    config = peft.LoraConfig(r=r, lora_alpha=alpha, target_modules=["q_proj", "v_proj"], lora_dropout=0.0)
    model = peft.get_peft_model(base, config)
    with torch.no_grad():
        for i, layer in enumerate(base.model.layers):
            a = start[f"transformer.h.{i}.attn.attn.lora_A"]
            b = start[f"transformer.h.{i}.attn.attn.lora_B"]
            q, v = layer.self_attn.q_proj, layer.self_attn.v_proj
            q.lora_A.default.weight.copy_(a[:r])
            v.lora_A.default.weight.copy_(a[r:])
            q.lora_B.default.weight.copy_(b[: q.out_features])
            v.lora_B.default.weight.copy_(b[q.out_features :])
    optimizer = torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), lr=peak, weight_decay=0.01)
    order, losses = sample_order(len(samples), n_steps * size, seed=seed), []
    for step in range(n_steps):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, peak=peak, n_warmup=min(1000, n_steps // 10), n_steps=n_steps)
        idx, targets = collate([samples[i] for i in order[step * size : (step + 1) * size]])
        wanted = targets != -100
        loss = F.cross_entropy(model(idx).logits[wanted], targets[wanted])
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses
