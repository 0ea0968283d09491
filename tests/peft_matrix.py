"""ETHER+ in PEFT on tiny random models of many architectures: what is exact in each, as a table.

python tests/peft_matrix.py            # all of ARCHITECTURES x CHECKS, fp32, about five minutes
python tests/peft_matrix.py llama t5   # some
"""

import copy
import sys
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import torch
import transformers
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # runs from any folder

from lit_gpt.peft_ether import EtherPeftConfig

EXACT = 1e-5
"""Largest difference, relative to the largest output, of what is equal in fp32 but for rounding."""
TEXT = dict(
    vocab_size=160, hidden_size=24, intermediate_size=40, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2, max_position_embeddings=96, bos_token_id=None, eos_token_id=None, pad_token_id=None,
)  # fmt: skip
EXPERTS = dict(num_experts=4, num_experts_per_tok=2, moe_intermediate_size=16, decoder_sparse_step=1)
LINEAR_ATTENTION = dict(
    linear_num_key_heads=2, linear_num_value_heads=4, linear_key_head_dim=8, linear_value_head_dim=8,
    shared_expert_intermediate_size=16, head_dim=8, layer_types=["linear_attention", "full_attention"],
)  # fmt: skip
MAMBA = dict(mamba_n_heads=4, mamba_d_head=12, mamba_d_ssm=48, mamba_d_state=8, mamba_n_groups=1, mamba_chunk_size=8)
T5 = dict(
    vocab_size=160, d_model=24, d_kv=6, d_ff=40, num_layers=2, num_heads=4, decoder_start_token_id=0, dropout_rate=0.0
)
IMAGE = dict(image_size=16, patch_size=8, num_labels=5)
NEMOTRON = dict(
    mamba_num_heads=4, mamba_head_dim=12, ssm_state_size=8, n_groups=1, chunk_size=8, head_dim=6,
    layers_block_type=["mamba", "attention", "mlp"], num_hidden_layers=3,
)  # fmt: skip

# name: (transformers' model class, config class, what differs from TEXT)
ARCHITECTURES: dict[str, tuple[str, str, dict[str, Any]]] = {
    "llama": ("AutoModelForCausalLM", "LlamaConfig", {}),
    "qwen3": ("AutoModelForCausalLM", "Qwen3Config", dict(head_dim=10)),
    "gemma3": ("AutoModelForCausalLM", "Gemma3TextConfig", dict(head_dim=10, sliding_window=5)),
    "gpt_neox": ("AutoModelForCausalLM", "GPTNeoXConfig", dict(rotary_pct=1.0)),
    "gpt2": ("AutoModelForCausalLM", "GPT2Config", dict(n_embd=24, n_layer=2, n_head=4, n_positions=96)),
    "mixtral": ("AutoModelForCausalLM", "MixtralConfig", dict(num_local_experts=4, num_experts_per_tok=2)),
    "qwen3_moe": ("AutoModelForCausalLM", "Qwen3MoeConfig", EXPERTS),
    "gpt_oss": ("AutoModelForCausalLM", "GptOssConfig", dict(num_local_experts=4, head_dim=6, sliding_window=5)),
    "qwen3_next": ("AutoModelForCausalLM", "Qwen3NextConfig", EXPERTS | LINEAR_ATTENTION),
    "t5": ("AutoModelForSeq2SeqLM", "T5Config", T5),
    "vit": ("AutoModelForImageClassification", "ViTConfig", IMAGE),
    "bert": ("AutoModelForSequenceClassification", "BertConfig", dict(num_labels=5)),
    "falcon_h1": ("AutoModelForCausalLM", "FalconH1Config", MAMBA),
    "nemotron_h": ("AutoModelForCausalLM", "NemotronHConfig", NEMOTRON),
    "mamba": ("AutoModelForCausalLM", "MambaConfig", dict(state_size=8, time_step_rank=4)),
}


def build(name: str) -> tuple[nn.Module, dict[str, Tensor]]:
    """Return the random model of an architecture, in evaluation mode, and an input for it."""
    auto, kind, fields = ARCHITECTURES[name]
    sizes = {} if name == "t5" else TEXT
    torch.manual_seed(1)
    config = getattr(transformers, kind)(**{**sizes, **fields})
    model = getattr(transformers, auto).from_config(config, attn_implementation="eager", dtype=torch.float32).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 2:
                parameter.normal_(std=1.2 / parameter.shape[-1] ** 0.5)  # activations keep their size
    idx = torch.arange(2 * 12).remainder(150).view(2, 12)
    if name == "vit":
        return model, {"pixel_values": torch.randn(2, 3, 16, 16)}
    return model, {"input_ids": idx} | ({"decoder_input_ids": idx} if name == "t5" else {})


def relative(a: Tensor, b: Tensor) -> float:
    """Return max|a - b| / max|b|."""
    return ((a - b).abs().max() / b.abs().max()).item()


def logits(model: nn.Module, inputs: dict[str, Tensor]) -> Tensor:
    """Return a model's logits, without a graph."""
    with torch.no_grad():
        return model(**inputs).logits


def disturb(model: nn.Module, seed: int = 0) -> None:
    """Move the vectors of all adapters away from where they start."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".ether_" in name:
                parameter += 0.3 * parameter.std() * torch.randn(parameter.shape, generator=generator)


def adapted(name: str, **fields: Any) -> tuple[peft.PeftModel, dict[str, Tensor], Tensor]:
    """Return a model with an adapter on all Linears at its start, an input, and the base's logits."""
    model, inputs = build(name)
    base = logits(model, inputs)
    defaults = {"method": "etherplusHH", "n": 2, "target_modules": "all-linear", "exclude_modules": ["classifier"]}
    config = EtherPeftConfig(**{**defaults, **fields})
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="all-linear leaves out")
        return peft.get_peft_model(model, config).eval(), inputs, base


def start(name: str) -> float:
    """Compare the start with the base."""
    model, inputs, base = adapted(name)
    return relative(logits(model, inputs), base)


def merge(name: str) -> float:
    """Compare the merged, unloaded model with the unmerged one, which must differ from the base."""
    model, inputs, base = adapted(name)
    disturb(model)
    expected = logits(model, inputs)
    assert relative(expected, base) > 1e-2, "the adapter does nothing"
    return relative(logits(model.merge_and_unload(safe_merge=True), inputs), expected)


def unmerge(name: str) -> float:
    """Compare merged and unmerged again with the unmerged one, and with the adapter disabled with the base."""
    model, inputs, base = adapted(name)
    disturb(model)
    expected = logits(model, inputs)
    model.merge_adapter()
    model.unmerge_adapter()
    back = relative(logits(model, inputs), expected)
    with model.disable_adapter():
        return max(back, relative(logits(model, inputs), base))


def reload(name: str) -> float:
    """Compare a saved and loaded adapter with itself."""
    model, inputs, _ = adapted(name)
    disturb(model)
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        loaded = peft.PeftModel.from_pretrained(build(name)[0], folder).eval()
    return relative(logits(loaded, inputs), logits(model, inputs))


def disable(name: str) -> float:
    """Compare the model with its adapter off with the base; also where it was merged."""
    model, inputs, base = adapted(name)
    disturb(model)
    with model.disable_adapter():
        off = relative(logits(model, inputs), base)
    model.merge_adapter()
    with model.disable_adapter():
        return max(off, relative(logits(model, inputs), base))


def switch(name: str) -> float:
    """Compare each of two adapters with itself alone, after switching to and fro."""
    model, inputs, _ = adapted(name)
    disturb(model)
    first = logits(model, inputs)
    targets = model.peft_config["default"].target_modules
    model.add_adapter("other", EtherPeftConfig(method="ether", target_modules=targets))
    model.set_adapter("other")
    assert relative(logits(model, inputs), first) > 1e-2, "the adapters are one"
    model.set_adapter("default")
    return relative(logits(model, inputs), first)


def gradients(model: nn.Module, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return the gradients of all parameters that have one."""
    model.zero_grad()
    model(**inputs).logits.square().mean().backward()
    return {name: parameter.grad.clone() for name, parameter in model.named_parameters() if parameter.grad is not None}


def trains(name: str) -> float:
    """Return 0 where a step moves all vectors and nothing else, else 1."""
    model, inputs, _ = adapted(name)
    disturb(model)
    model.train()
    before = copy.deepcopy(model.state_dict())
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.01, weight_decay=0.0)
    gradients(model, inputs)
    optimizer.step()
    moved = {key for key, tensor in model.state_dict().items() if not torch.equal(tensor, before[key])}
    expected = {key for key, _ in model.named_parameters() if ".ether_" in key}
    buffers = {key for key, _ in model.named_buffers()}
    idle = expected - moved
    assert moved - buffers <= expected and not idle, f"idle: {sorted(idle)[:3]}, moved: {sorted(moved - expected)[:3]}"
    return 0.0


def checkpointing(name: str) -> float:
    """Compare the gradients with those under gradient checkpointing."""
    model, inputs, _ = adapted(name, dropout=0.0)
    disturb(model)
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    model.train()
    expected = gradients(model, inputs)
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    found = gradients(model, inputs)
    assert found.keys() == expected.keys()
    return max(relative(found[key], expected[key]) for key in expected)


def compiles(name: str) -> float:
    """Compare the compiled model's logits with the eager one's; its graph breaks no more often than the base's."""
    base, inputs = build(name)
    with torch.no_grad():
        breaks = torch._dynamo.explain(base)(**inputs).graph_break_count
        model, _, _ = adapted(name)
        disturb(model)
        torch._dynamo.reset()
        found = torch._dynamo.explain(model)(**inputs).graph_break_count
        assert found <= breaks, f"{found} graph breaks, {breaks} in the base"
        torch._dynamo.reset()
        return relative(torch.compile(model, backend="aot_eager")(**inputs).logits, model(**inputs).logits)


CHECKS: dict[str, Callable[[str], float]] = {
    "start": start, "merge": merge, "unmerge": unmerge, "reload": reload, "disable": disable, "switch": switch,
    "only adapters train": trains, "checkpointing": checkpointing, "compile": compiles,
}  # fmt: skip


def main(names: list[str]) -> None:
    """Print the table, in Markdown."""
    transformers.logging.set_verbosity_error()
    warnings.simplefilter("ignore")
    print(f"| architecture | {' | '.join(CHECKS)} |\n|---|{'---|' * len(CHECKS)}", flush=True)
    for name in names or ARCHITECTURES:
        cells = []
        for check in CHECKS.values():
            try:
                value = check(name)
                cells.append("exact" if value == 0 else f"{value:.0e}" if value < EXACT else f"**{value:.0e}**")
            except Exception as error:
                cells.append(f"**{type(error).__name__}: {' '.join(str(error).split())[:90]}**")
        print(f"| {name} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
