"""Convert weights between Hugging Face's names and layouts and ours, in both directions, bit for bit.

``families`` says which module of ours is which of theirs. One table is made of it, of which rows of our tensors are
which rows of theirs (``hf_layout``), and is read both ways: it splits what is fused on one side, and orders the rows of
our attention, which are interleaved by KV group (its q heads, then k, then v).

Every tensor is used or named in an error, never skipped, and is made when it is written: memory holds one at a time.
Nothing here knows a format of file: tensors come from a dict or a function.
"""

from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Sequence
from functools import reduce
from itertools import product
from pathlib import Path
from typing import Literal, NamedTuple

import torch

from lit_gpt.checkpoint import stream_state
from lit_gpt.config import Config
from lit_gpt.errors import UserError
from lit_gpt.families import FAMILIES
from lit_gpt.model import GPT, deinterleave_qkv

State = dict[str, torch.Tensor]
Shapes = dict[str, torch.Size]
Rows = slice | torch.Tensor
Stored = Literal["float32", "bfloat16", "float16"]
"""Types that weights may be converted to."""

HEAD, EMBEDDING = "lm_head.weight", "transformer.wte.weight"


class Piece(NamedTuple):
    """Rows of one tensor, and the rows of another that are the same."""

    name: str
    rows: Rows
    source: str
    source_rows: Rows


class Layout(NamedTuple):
    """A model's tensors on both sides, and the rows of ours with those of Hugging Face's; none of a tied head."""

    ours: Shapes
    theirs: Shapes
    pieces: list[Piece]


def hf_modules(config: Config) -> dict[str, tuple[str, ...]]:
    """Return our module names with those of Hugging Face's modules whose rows they are made of, mostly one.

    Raises:
        ValueError: the config is the original code's, which does not tell the class.
    """
    if config.architecture not in FAMILIES:
        raise UserError(
            f"{config.name or 'the model'}: its lit_config.json is the original code's, which does not tell the Hugging"
            " Face class; convert the Hugging Face files again, with scripts/convert_hf_checkpoint.py"
        )
    family = FAMILIES[config.architecture]
    modules = {ours: (theirs,) for ours, theirs in family.top.items()}
    block = family.block | ({} if config.shared_attention_norm else family.two_norms)
    for i, (ours, theirs) in product(range(config.n_layer), block.items()):
        names = (theirs,) if isinstance(theirs, str) else theirs
        heads = range(config.n_head if ours.endswith("norm_q") else config.n_query_groups)
        names = [name.replace("{h}", str(h)) for name in names for h in (heads if "{h}" in name else (0,))]
        for e in range(config.n_expert if "{e}" in ours else 1):
            theirs_here = tuple(f"{family.layers}.{i}.{name.format(e=e)}" for name in names)
            modules[f"transformer.h.{i}.{ours.format(e=e)}"] = theirs_here
    return modules


def parameter_shapes(config: Config) -> Shapes:
    """Return every key of a ``lit_model.pth`` of this config, with its shape."""
    with torch.device("meta"):
        return {key: tensor.shape for key, tensor in GPT(config).state_dict().items()}


def hf_layout(config: Config) -> Layout:
    """Return which rows of our tensors are which rows of Hugging Face's.

    A name of theirs that several parts of ours have is one tensor, in which these lie one after another as listed.
    """
    ours, theirs, pieces = parameter_shapes(config), {}, []
    height = Counter()  # of what is known so far of a tensor of theirs
    qkv = deinterleave_qkv(torch.arange(sum(config.qkv_sizes)), config).split(config.qkv_sizes)
    for (module, names), kind in product(hf_modules(config).items(), ("weight", "bias")):
        key = f"{module}.{kind}"
        if key not in ours or (key == HEAD and config.tie_embeddings):
            continue
        size = ours[key][0] // len(names)
        parts: Sequence[Rows] = [slice(start, start + size) for start in range(0, ours[key][0], size)]
        if module.endswith(".attn.attn") and len(names) == len(qkv):
            parts = qkv
        for name, rows in zip((f"{name}.{kind}" for name in names), parts, strict=True):
            start = height[name]
            height[name] += size if isinstance(rows, slice) else len(rows)
            pieces.append(Piece(key, rows, name, slice(start, height[name])))
            theirs[name] = torch.Size((height[name], *ours[key][1:]))
    place = {key: n for n, key in enumerate(ours)}  # layer by layer, for shards that are whole layers
    return Layout(ours, theirs, sorted(pieces, key=lambda piece: place[piece.name]))


def write_lit(blanks: State, read: Callable[[str], torch.Tensor], config: Config, path: Path) -> State:
    """Write Hugging Face's weights as a ``lit_model.pth``, holding one of its tensors and its sources at a time.

    Args:
        blanks: every tensor of the Hugging Face checkpoint, on the meta device, with the dtype to store it in.
        read: gives the tensor of a name.
        config: the model they belong to. Where it ties the embeddings, the head is not among them.
        path: the file.

    Returns:
        what the file holds, on the meta device; tied embeddings are one tensor under both keys.

    Raises:
        ValueError: keys missing, keys that no one expects, or a shape that contradicts the config.
    """
    layout = hf_layout(config)
    _check(f"a {config.architecture}", blanks, layout.theirs)
    template, make = _assemble(layout.ours, layout.pieces, blanks, read)
    stands_for = {HEAD: EMBEDDING} if config.tie_embeddings else {}
    template = {key: template[stands_for.get(key, key)] for key in layout.ours}
    stream_state(template, lambda key: make(stands_for.get(key, key)), path)
    return template


def lit_to_hf(weights: State, config: Config) -> tuple[State, Callable[[str], torch.Tensor]]:
    """Give our weights Hugging Face's names and layout; the inverse of ``write_lit``, bit for bit.

    Args:
        weights: the state dict of a ``lit_model.pth``.
        config: the model they belong to. Where it ties the embeddings, only the embedding is given.

    Returns:
        every tensor on the meta device, and a function that makes the tensor of a name.

    Raises:
        ValueError: keys missing, keys that no one expects (an adapter that is not merged), or a shape that
            contradicts the config.
    """
    layout = hf_layout(config)
    _check("this lit_config.json", weights, layout.ours)
    back = [Piece(piece.source, piece.source_rows, piece.name, piece.rows) for piece in layout.pieces]
    return _assemble(layout.theirs, back, weights, weights.__getitem__)


def _assemble(
    shapes: Shapes, pieces: Iterable[Piece], sources: State, read: Callable[[str], torch.Tensor]
) -> tuple[State, Callable[[str], torch.Tensor]]:
    """Return tensors that pieces of others make up: as they will be, on the meta device, and a function that makes one.

    What lies in its source as it is to be is not copied.
    """
    made_of: dict[str, list[Piece]] = defaultdict(list)
    for piece in pieces:
        made_of[piece.name].append(piece)
    blanks = {}
    for name, parts in made_of.items():
        dtype = reduce(torch.promote_types, (sources[piece.source].dtype for piece in parts))
        blanks[name] = torch.empty(shapes[name], dtype=dtype, device="meta")

    def make(name: str) -> torch.Tensor:
        dtype = blanks[name].dtype
        if len(made_of[name]) == 1:
            piece = made_of[name][0]
            return read(piece.source)[piece.source_rows].to(dtype)
        whole = torch.empty(shapes[name], dtype=dtype)
        for piece in made_of[name]:
            whole[piece.rows] = read(piece.source)[piece.source_rows].to(dtype)
        return whole

    return blanks, make


def _check(who: str, given: State, expected: Shapes) -> None:
    """Raise where keys are missing or left over, naming the first few, or a shape is another."""
    problems = []
    for what, keys, there in (("missing", expected, given), ("not known", given, expected)):
        found = [key for key in keys if key not in there]
        if found:
            problems.append(
                f"{len(found)} {what} ({', '.join(map(str, found[:4]))}{', ...' if len(found) > 4 else ''})"
            )
    if problems:
        raise UserError(f"the weights are not those of {who}: {'; '.join(problems)}")
    for key, shape in expected.items():
        if given[key].shape != shape:
            found = tuple(given[key].shape)
            raise UserError(f"{key} has shape {found}; the model's config asks for {tuple(shape)}")
