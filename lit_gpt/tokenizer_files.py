"""The files of a tokenizer's folder: what the JSON files say, and the vocabulary.

- The `tokenizers` library reads `tokenizer.json`. For a `tokenizer.model` it calls `sentencepiece` to cut texts into
  pieces, since no set of merges is exact for every such file, and does the rest (added tokens, decoding) itself.
- Tokens that stand in other files alone (`tokenizer_config.json`, `added_tokens.json`) are added to either, as
  transformers does it.

It knows texts, tokens and ids, and nothing of conversations.
"""

from collections.abc import Callable, Sequence
from pathlib import Path

from tokenizers import AddedToken, PreTokenizedString, Token, decoders, models
from tokenizers import Tokenizer as HFTokenizer
from tokenizers.pre_tokenizers import PreTokenizer

from lit_gpt.errors import UserError, reading
from lit_gpt.files import read_json

NAMES = (
    "tokenizer*", "special_tokens_map.json", "added_tokens.json", "vocab.json", "merges.txt", "chat_template*",
    "config.json", "generation_config.json",
)  # fmt: skip
"""Patterns of the files that tell of a tokenizer, here or in other programs."""
SPECIAL_NAMES = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
FLAGS = {"single_word", "lstrip", "rstrip", "normalized", "special"}  # how an added token matches a text


class TokenizerFiles:
    """Contents of a folder's JSON files, each read once; {} for one that is not there.

    Attributes:
        config, generation, model: tokenizer_config.json, generation_config.json, config.json.
        special_tokens: texts by name ("bos_token").
        added: tokens to add to the vocabulary, by text: how they match, and the "id" where a file says one.
    """

    def __init__(self, folder: Path) -> None:
        """Read the files, or raise ValueError with the name of one that is corrupt."""
        self.dir = folder
        names = ("tokenizer_config.json", "generation_config.json", "config.json")
        self.config, self.generation, self.model = map(self._read, names)
        special_map = self._read("special_tokens_map.json")
        named = {name: token_text(self.config.get(name, special_map.get(name))) for name in SPECIAL_NAMES}
        self.special_tokens = {name: text for name, text in named.items() if text}
        more = self.config.get("additional_special_tokens") or self.config.get("extra_special_tokens")
        more = more or special_map.get("additional_special_tokens") or []
        more = more.values() if isinstance(more, dict) else more
        special = [*self.special_tokens.values(), *filter(None, map(token_text, more))]
        self.added: dict[str, dict] = {}
        for text, i in self._read("added_tokens.json").items():
            self.added[text] = {"id": i, "special": text in special, "normalized": text not in special}
        for i, token in self.config.get("added_tokens_decoder", {}).items():
            self.added[token_text(token)] = {**(token if isinstance(token, dict) else {"special": True}), "id": int(i)}
        for text in special:
            self.added.setdefault(text, {"normalized": False})["special"] = True

    def _read(self, name: str) -> dict:
        path = self.dir / name
        content = read_json(path) if path.is_file() else {}
        if not isinstance(content, dict):
            raise UserError(f"{path} holds a {type(content).__name__}, expected an object; get the file again")
        return content

    def model_ids(self, key: str, vocab_size: int) -> list[int]:
        """Return what generation_config.json, then config.json say of a token id: an int or a list of them."""
        values = [content.get(key) for content in (self.generation, self.model)]
        ids = [i for value in values for i in (value if isinstance(value, list) else [value])]
        return [i for i in ids if isinstance(i, int) and 0 <= i < vocab_size]


class Vocabulary:
    """Tokens and ids of a folder, a tokenizer.json first, with the tokens that other files add.

    Attributes:
        backend: the tokenizers library's.
        path: the file that holds the vocabulary.
        default_ids: what SentencePiece's file says of bos, eos and pad.
        beside: ids of the tokens that other files add.
        special_ids: ids that decoding may skip.
        vocab_size: one more than the largest id.
    """

    def __init__(self, files: TokenizerFiles) -> None:
        """Read the file, and add the tokens of the others.

        Raises:
            FileNotFoundError: there is none.
            ValueError: the file is corrupt, or an added token would get another id than the other files say.
        """
        found = [path for path in (files.dir / "tokenizer.json", files.dir / "tokenizer.model") if path.is_file()]
        if not found:
            what = "no tokenizer.json and no tokenizer.model" if files.dir.is_dir() else "not a folder: expected one"
            way = "get the model with `python scripts/download.py --repo_id <org>/<name>`"
            raise FileNotFoundError(f"{files.dir}: {what} to read the tokenizer from; {way}")
        self.path, self.default_ids, own = found[0], {}, []
        with reading(self.path):
            if self.path.suffix == ".json":
                self.backend = HFTokenizer.from_file(str(self.path))
                # What a file says of cutting and padding is meant for batches of its author
                self.backend.no_truncation()
                self.backend.no_padding()
            else:
                pieces = SentencePieces(self.path, files.config)
                self.backend, self.default_ids, own = pieces.as_tokenizer(), pieces.default_ids, pieces.control
        before = {token.content for token in self.backend.get_added_tokens_decoder().values()} | {*own}
        added = {text: token for text, token in files.added.items() if "id" in token or text not in before}
        texts = sorted(added, key=lambda text: added[text].get("id", float("inf")))  # new ids are given in this order
        stated = [text for text in texts if "id" in added[text]]
        if self.path.suffix == ".json":  # it decides on what it has itself
            stated = [text for text in stated if self.backend.token_to_id(text) is None]
        self.backend.add_tokens(
            [AddedToken(text, **{flag: added[text][flag] for flag in FLAGS & {*added[text]}}) for text in texts]
        )
        self.backend.add_special_tokens([AddedToken(text, normalized=False) for text in own if text not in added])
        for text in stated:
            if self.backend.token_to_id(text) != (said := added[text]["id"]):
                other = f"tokenizer_config.json or added_tokens.json says {said}"
                problem = f"{self.path} gives the token {text} the id {self.backend.token_to_id(text)}, {other}"
                raise UserError(f"{problem}: these files are not of one model")
        decoder = self.backend.get_added_tokens_decoder()
        self.beside = {token.content: i for i, token in decoder.items() if token.content not in before}
        self.special_ids = {i for i, token in decoder.items() if token.special}
        self.vocab_size = max(self.backend.get_vocab().values(), default=-1) + 1

    def encode_batch(self, texts: Sequence[str], *, add_special: bool = False) -> list[list[int]]:
        """Return the ids of texts; with `add_special` as the file's post-processor leaves them, which may add BOS."""
        encodings = self.backend.encode_batch_fast(list(texts), add_special_tokens=add_special)
        return [encoding.ids for encoding in encodings]


class SentencePieces:
    """`tokenizer.model`, with which the `sentencepiece` library cuts the texts between added tokens into pieces."""

    def __init__(self, path: Path, config: dict) -> None:
        """Read the file, or raise ValueError where it is corrupt."""
        from sentencepiece import SentencePieceProcessor

        self.processor = SentencePieceProcessor(model_file=str(path))
        defaults = {name: getattr(self.processor, f"{name}_id")() for name in ("bos", "eos", "pad")}
        self.default_ids = {name: i for name, i in defaults.items() if i >= 0}
        self.pieces = [self.processor.id_to_piece(i) for i in range(self.processor.get_piece_size())]
        own = (i for i in range(len(self.pieces)) if self.processor.is_control(i) or self.processor.is_unknown(i))
        self.control = [self.pieces[i] for i in own]
        self.prefix = config.get("add_prefix_space") is not False
        self.dummy_prefix = self.processor.encode("a", out_type=str)[0].startswith("▁")
        # As in LlamaTokenizer, whose `legacy` puts a space before the text after a special token, too
        self.adds_space_inside = not self.dummy_prefix or bool(config.get("legacy", False))

    def as_tokenizer(self) -> HFTokenizer:
        """Return a tokenizer of the pieces."""
        vocabulary = {piece: i for i, piece in enumerate(self.pieces)}
        tokenizer = HFTokenizer(models.WordLevel(vocabulary, unk_token=self.pieces[self.processor.unk_id()]))
        tokenizer.pre_tokenizer = PreTokenizer.custom(self)
        # A run of byte pieces (`<0xE2>`) that is no UTF-8 gives U+FFFD for each byte
        steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
        strip = [decoders.Strip(" ", 1, 0)] * (self.dummy_prefix and self.prefix)
        tokenizer.decoder = decoders.Sequence(steps + strip)
        return tokenizer

    def pre_tokenize(self, text: PreTokenizedString) -> None:
        """Turn the parts of a text that are no added tokens into pieces; the tokenizers library calls it."""
        begins = iter([start == 0 for _, (start, _), tokens in text.get_splits() if tokens is None])

        def cut(part: str) -> list[Token]:  # called with each of these parts in turn
            return [Token(i, self.pieces[i], (0, 0)) for i in self.encode(part, next(begins))]

        text.tokenize(cut)

    def encode(self, part: str, begins: bool) -> list[int]:
        """Return the ids of a part, which may begin the text; a space is put before it there."""
        if (begins and self.prefix) or self.adds_space_inside:
            return self.processor.encode(part)
        return [self.processor.piece_to_id("▁")] if part == " " else encode_behind(self.processor.encode, part)


def encode_behind(encode: Callable[[Sequence[str]], list[list[int]]], text: str) -> list[int]:
    """Return the ids of a text that goes on from another, without the space that SentencePiece puts before a text.

    It is encoded behind an anchor, whose ids are taken off again: behind the next one where it has merged with the
    text. A text that merges with all keeps its space.
    """
    for anchor in ("\n", "|", "0", ""):
        head, joined = encode([anchor, anchor + text])
        if joined[: len(head)] == head:
            break
    return joined[len(head) :]


def token_text(token: str | dict | None) -> str | None:
    """Return the text of a token, which files write as its text, or as an object with the text and its flags."""
    return token.get("content") if isinstance(token, dict) else token
