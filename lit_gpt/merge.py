"""Merge an adapter file into its base's weights, one tensor at a time.

Notable choices:
- The base stays memory-mapped and the result is written as it is made: memory holds a few fp32 copies of the largest
  adapted Linear, whatever the model's size. What else the process seems to hold is the kernel's cache of the two files,
  which it takes back by itself.
- Computed in fp32 and cast once; how far the weights moved and what the cast cost is counted on the way.
- ``--verify`` compares the logits of the two models, which run in fp32 with the weights of one module at a time.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import torch
import torch.nn.functional as F
import yaml
from torch import Tensor, nn

from lit_gpt import checkpoint
from lit_gpt.adapter import adapter_layers, is_finite, rows_in_memory
from lit_gpt.adapter_files import attach_adapter, check_base, load_adapter, set_strength
from lit_gpt.data import TEST_FILE, check_ids, load_split
from lit_gpt.devices import weights_dtype
from lit_gpt.errors import UserError, command
from lit_gpt.files import prepare_out_dir, staged_dir, write_json
from lit_gpt.hf import EMBEDDING, HEAD, State
from lit_gpt.model import GPT, QKVLinear, interleave_qkv
from lit_gpt.quantize import describe_merge
from lit_gpt.tokenizer import Tokenizer, list_answer_end

# Real text: on tokens that never stand together, rounding alone moves the base model's own logits ten times as far.
PROBE = "A reflection turns a vector over at a plane, and keeps its length: what it does twice, it undoes."
VERIFY_ROWS, VERIFY_TOKENS = 4, 256


def merge_adapter(
    kind: str,
    path: Path | str,
    *,
    checkpoint_dir: Path,
    out_dir: Path | None = None,
    precision: str = "bf16-true",
    strength: float = 1.0,
    verify: bool = False,
    overwrite: bool = False,
) -> None:
    """Write a base-shaped folder with the adapter merged.

    Args:
        kind: of the adapter, a key of ``adapter_files.KINDS``.
        path: the adapter file.
        checkpoint_dir: the base model's folder.
        out_dir: the folder to write; merged/ beside the adapter file by default.
        precision: of the written weights: 32-true, bf16-true or 16-true.
        strength: of the adapter: 0 leaves the base as it is, 1 merges what was learned, 0.5 goes half the way.
        verify: compare the logits of the merged and the unmerged model, both computed in fp32, on a few rows that the
            adapter's run held out.
        overwrite: write into a folder that already holds a model.

    Raises:
        ValueError, OSError: one line that says what to do; nothing is left then.
    """
    weights_dtype(precision)  # refuses an unknown one
    adapter = set_strength(load_adapter(path, kind), strength)
    names = [*checkpoint.side_files(checkpoint_dir), checkpoint.CONFIG, checkpoint.PROMPT_STYLE]
    out_dir = out_dir or Path(path).parent / "merged"
    out_dir = prepare_out_dir(out_dir, overwrite, names=names, source=checkpoint_dir)
    with staged_dir(out_dir, overwrite) as staging:
        check_base(adapter, checkpoint.check_checkpoint_dir(checkpoint_dir))
        model, base = open_base(checkpoint_dir)
        if "quantize" in adapter.base:
            print(describe_merge(adapter.base["quantize"], model, base))
        attach_adapter(model, adapter)
        rows, origin = held_out_rows(path, checkpoint_dir) if verify else ([], "")
        checkpoint.copy_side_files(checkpoint_dir, staging)
        if adapter.prompt_style:
            checkpoint.save_prompt_style(staging, adapter.prompt_style)
            list_answer_end(staging, adapter.prompt_style)
        write_merged(model, base, precision, staging)
        if rows:
            merged = stream_weights(*open_base(staging))
            gap, relative, divergence = compare_logits(stream_weights(model, base), merged, rows)
            print(
                f"verified on {origin}: logits differ by at most {gap:.1e} ({relative:.1e} relative), KL of the merged "
                f"from the unmerged model {divergence:.1e} nats a token"
            )
    print(f"merged model: {out_dir}\ntalk to it: {command('chat/base.py', checkpoint_dir=out_dir)}")


def open_base(checkpoint_dir: Path | str) -> tuple[GPT, State]:
    """Return the model of a folder on the meta device, fp32, and its memory-mapped weights, which fit it."""
    model, state = checkpoint.open_model(checkpoint_dir, lambda name, tensor: tensor.to("meta").float())
    if model.config.tie_embeddings:
        state[HEAD] = state[EMBEDDING]
    return model.eval(), state


def write_merged(model: GPT, base: Mapping[str, Tensor], precision: str, folder: Path) -> None:
    """Write weights and config of a merged model, and print how far its weights moved.

    Args:
        model: on the meta device, with its adapter.
        base: its weights as they are in the file.
        precision: of the merged weights.
        folder: that is written into.

    Raises:
        ValueError: a weight is not finite; says why.
    """
    dtype, moved = weights_dtype(precision), []
    layers = {f"{name}.weight": layer for name, layer in adapter_layers(model)}
    names = [name for name in model.state_dict() if name in base]  # an adapter has more
    template = {name: torch.empty_like(base[name], dtype=dtype, device="meta") for name in names}
    tied = model.config.tie_embeddings and HEAD not in layers  # an adapted head leaves the embedding alone
    if tied:
        template[HEAD] = template[EMBEDDING]

    def make(name: str) -> Tensor:
        stored, layer = base[name], layers.get(name)
        if not is_finite(stored):
            raise UserError(f"{name} of the base model holds NaN or infinity; convert it again")
        if layer is None:
            cast = stored.to(dtype)
            if cast is not stored and not is_finite(cast):
                raise UserError(f"{name} has values too large for --precision {precision}; bf16-true can hold them")
            return cast
        merged, moves = layer.merged_weight(name, rows_in_memory(layer, stored), dtype)
        moved.extend(moves)
        return interleave_qkv(merged, layer.config) if isinstance(layer, QKVLinear) else merged

    write_json(folder / checkpoint.CONFIG, replace(model.config, tie_embeddings=tied).to_dict())
    checkpoint.stream_state(template, make, folder / checkpoint.WEIGHTS)
    changes, roundings = zip(*moved, strict=True)
    low, high, middle = min(changes), max(changes), median(changes)
    told = f"merged {len(changes)} weights: |W'-W|/|W| {low:.1e} to {high:.1e}, median {middle:.1e}"
    if dtype != torch.float32:
        told += f"; rounding to {precision} moved them by {median(roundings):.1e} (median)"
    print(told)


# ------------------------------------------------------------------------------------------------- verification
def held_out_rows(path: Path | str, checkpoint_dir: Path) -> tuple[list[Tensor], str]:
    """Return rows of token ids that the run of an adapter file did not train on, and in words where they are from.

    The hparams.yaml beside the file names the run's data. Where that is not there, the row is a sentence.
    """
    settings = Path(path).parent / "hparams.yaml"
    if settings.is_file():
        io = yaml.safe_load(settings.read_text(encoding="utf-8"))["io"]
        file = Path(io["val_data_dir"] or io["train_data_dir"]) / TEST_FILE
        if file.is_file():
            rows = [sample["input_ids"][:VERIFY_TOKENS].long() for sample in load_split(file)[:VERIFY_ROWS]]
            check_ids(rows, Tokenizer(checkpoint_dir), checkpoint.load_config(checkpoint_dir))
            return rows, f"{len(rows)} rows of {file}"
    return [torch.tensor(Tokenizer(checkpoint_dir).encode(PROBE))], "a sentence, for want of held-out rows"


def stream_weights(model: GPT, state: Mapping[str, Tensor]) -> GPT:
    """Let a model on the meta device read the weights of each module, in fp32, when its turn comes, and drop them then.

    Returns:
        The model, with hooks; what is not on the meta device (an adapter) stays as it is.
    """

    def put(weights: Mapping[str, Tensor], module: nn.Module, *_: Any) -> None:
        for own, weight in weights.items():
            weight = weight if weight.is_meta else rows_in_memory(module, weight).float()
            setattr(module, own, nn.Parameter(weight, requires_grad=False))

    for name, module in model.named_modules():
        blanks = {own: p for own, p in module.named_parameters(recurse=False) if p.is_meta}
        if blanks:
            module.register_forward_pre_hook(partial(put, {own: state[f"{name}.{own}"] for own in blanks}))
            module.register_forward_hook(partial(put, blanks))
    return model


@torch.no_grad()
def compare_logits(unmerged: GPT, merged: GPT, rows: Sequence[Tensor]) -> tuple[float, float, float]:
    """Return how far the second model's logits are from the first's, on rows of token ids.

    Returns:
        The largest difference; the same relative to the largest logit; the mean KL divergence per token, in nats.

    Raises:
        ValueError: logits are not finite.
    """
    ids, lengths = torch.cat(list(rows))[None], [len(row) for row in rows]
    # All rows at once, packed: each weight is read once.
    hidden = [model.hidden(ids, lengths=lengths)[0].split(lengths) for model in (unmerged, merged)]
    gap = scale = divergence = 0.0
    for pair in zip(*hidden, strict=True):
        p, q = (model.logits(x).double() for model, x in zip((unmerged, merged), pair, strict=True))  # (t, V) each
        if not (is_finite(p) and is_finite(q)):
            raise UserError("verification gives logits that are not finite; the merged model was not kept")
        gap, scale = max(gap, (p - q).abs().max().item()), max(scale, p.abs().max().item())
        p, q = p.log_softmax(-1), q.log_softmax(-1)
        divergence += F.kl_div(q, p, reduction="sum", log_target=True).item()
    return gap, gap / scale, divergence / sum(lengths)
