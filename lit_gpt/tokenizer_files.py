"""The files of a tokenizer's folder: what the JSON files say, and the two kinds of vocabulary behind the same methods.

- `tokenizer.json` is read by the `tokenizers` library, `tokenizer.model` by `sentencepiece`.
- Tokens that stand in other files alone (`tokenizer_config.json`, `added_tokens.json`) are added to either, as
  transformers does it.

It knows texts, tokens and ids, and nothing of conversations.
"""

import re
from collections.abc import Callable, Sequence
from pathlib import Path

from tokenizers import AddedToken, decoders
from tokenizers import Tokenizer as HFTokenizer

from lit_gpt.errors import UserError, reading
from lit_gpt.files import read_json

NAMES = (
    "tokenizer*", "special_tokens_map.json", "added_tokens.json", "vocab.json", "merges.txt", "chat_template*",
    "config.json", "generation_config.json",
)  # fmt: skip
"""Patterns of the files that tell of a tokenizer, here or in other programs."""
SPECIAL_NAMES = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
DECODER = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback()])
"""Makes text of SentencePiece's tokens. A run of byte pieces (`<0xE2>`) that is no UTF-8 gives U+FFFD for each byte."""
FLAGS = {"single_word", "lstrip", "rstrip", "normalized", "special"}  # how an added token matches a text


class TokenizerFiles:
    """Contents of a folder's JSON files, each read once; {} for one that is not there.

    Attributes:
        config, generation, model: tokenizer_config.json, generation_config.json, config.json.
        special_tokens: texts by name ("bos_token").
        special: the texts of all special tokens.
        added: tokens to add to the vocabulary, by text: how they match, and the "id" where a file says one.
    """

    def __init__(self, folder: Path) -> None:
        """Read the files, or raise ValueError with the name of one that is corrupt."""
        self.dir = folder
        self.config, self.generation, self.model = map(
            self._read, ("tokenizer_config.json", "generation_config.json", "config.json")
        )
        special_map = self._read("special_tokens_map.json")
        named = {name: token_text(self.config.get(name, special_map.get(name))) for name in SPECIAL_NAMES}
        self.special_tokens = {name: text for name, text in named.items() if text}
        more = self.config.get("additional_special_tokens") or self.config.get("extra_special_tokens")
        more = more or special_map.get("additional_special_tokens") or []
        more = more.values() if isinstance(more, dict) else more
        self.special = [*self.special_tokens.values(), *filter(None, map(token_text, more))]
        self.added: dict[str, dict] = {
            text: {"id": i, "special": text in self.special, "normalized": text not in self.special}
            for text, i in self._read("added_tokens.json").items()
        }
        for i, token in self.config.get("added_tokens_decoder", {}).items():
            self.added[token_text(token)] = {**(token if isinstance(token, dict) else {"special": True}), "id": int(i)}
        for text in self.special:
            self.added.setdefault(text, {"special": True, "normalized": False})

    def _read(self, name: str) -> dict:
        path = self.dir / name
        content = read_json(path) if path.is_file() else {}
        if not isinstance(content, dict):
            raise UserError(f"{path} holds a {type(content).__name__}, expected an object; get the file again")
        return content

    def open_vocabulary(self) -> "JsonVocabulary | SentencePieceVocabulary":
        """Return what the folder has, a tokenizer.json first."""
        for name, vocabulary in {"tokenizer.json": JsonVocabulary, "tokenizer.model": SentencePieceVocabulary}.items():
            if (self.dir / name).is_file():
                return vocabulary(self.dir / name, self)
        what = "no tokenizer.json and no tokenizer.model" if self.dir.is_dir() else "not a folder: expected one"
        raise FileNotFoundError(
            f"{self.dir}: {what} to read the tokenizer from; get the model with "
            "`python scripts/download.py --repo_id <org>/<name>`"
        )

    def model_ids(self, key: str, vocab_size: int) -> list[int]:
        """Return what generation_config.json, then config.json say of a token id: an int or a list of them."""
        values = [content.get(key) for content in (self.generation, self.model)]
        ids = [i for value in values for i in (value if isinstance(value, list) else [value])]
        return [i for i in ids if isinstance(i, int) and 0 <= i < vocab_size]


class JsonVocabulary:
    """`tokenizer.json`, read by the `tokenizers` library."""

    def __init__(self, path: Path, files: TokenizerFiles) -> None:
        """Read the file, and add the tokens of the others.

        Raises:
            ValueError: the file is corrupt, or an added token would get another id than the other files say.
        """
        self.path, self.default_ids = path, {}
        with reading(path):
            self.processor = HFTokenizer.from_file(str(path))
        # What a file says of cutting and padding is meant for batches of its author
        self.processor.no_truncation()
        self.processor.no_padding()
        before = {token.content for token in self.processor.get_added_tokens_decoder().values()}
        added = {text: token for text, token in files.added.items() if "id" in token or text not in before}
        texts = sorted(added, key=lambda text: added[text].get("id", float("inf")))  # new ids are given in this order
        new = [text for text in texts if "id" in added[text] and self.token_id(text) is None]
        self.processor.add_tokens(
            [AddedToken(text, **{flag: added[text][flag] for flag in FLAGS & {*added[text]}}) for text in texts]
        )
        for text in new:
            if self.token_id(text) != (said := added[text]["id"]):
                raise UserError(
                    f"{path} gives the token {text} the id {self.token_id(text)}, tokenizer_config.json or "
                    f"added_tokens.json says {said}: these files are not of one model, get them again"
                )
        decoder = self.processor.get_added_tokens_decoder()
        self.beside = {token.content: i for i, token in decoder.items() if token.content not in before}
        self.special_ids = {i for i, token in decoder.items() if token.special}
        self.vocab_size = max(self.processor.get_vocab().values(), default=-1) + 1

    def encode_batch(self, texts: Sequence[str], *, add_special: bool = False) -> list[list[int]]:
        """Return the ids of texts; with `add_special` as the file's post-processor leaves them, which may add BOS."""
        encodings = self.processor.encode_batch_fast(list(texts), add_special_tokens=add_special)
        return [encoding.ids for encoding in encodings]

    def decode(self, ids: list[int], skip_special: bool) -> str:
        return self.processor.decode(ids, skip_special_tokens=skip_special)

    def token_id(self, token: str) -> int | None:
        return self.processor.token_to_id(token)

    def id_token(self, token_id: int) -> str:
        return self.processor.id_to_token(token_id) or ""


class SentencePieceVocabulary:
    """`tokenizer.model`, read by the `sentencepiece` library, with the tokens that other files add to it."""

    def __init__(self, path: Path, files: TokenizerFiles) -> None:
        """Read the file, or raise ValueError where it is corrupt, and add the tokens of the others."""
        from sentencepiece import SentencePieceProcessor

        self.path = path
        with reading(path):
            self.processor = SentencePieceProcessor(model_file=str(path))
        defaults = {name: getattr(self.processor, f"{name}_id")() for name in ("bos", "eos", "pad")}
        self.default_ids = {name: i for name, i in defaults.items() if i >= 0}
        self.pieces = self.processor.get_piece_size()
        own = [i for i in range(self.pieces) if self.processor.is_control(i) or self.processor.is_unknown(i)]
        self.added = {self.processor.id_to_piece(i): i for i in own}
        self.added |= {text: token["id"] for text, token in files.added.items() if "id" in token}
        for text in files.added:
            if text not in self.added:  # one that no file gives an id comes behind all others
                found = self.token_id(text)
                self.added[text] = max(self.pieces - 1, *self.added.values()) + 1 if found is None else found
        self.added_texts = {i: text for text, i in self.added.items()}
        self.beside = {text: i for text, i in self.added.items() if i >= self.pieces}
        self.vocab_size = max(self.pieces, *(i + 1 for i in self.added.values()))
        flags = {text: files.added.get(text, {"special": True}) for text in self.added}
        self.special_ids = {i for text, i in self.added.items() if flags[text].get("special") or text in files.special}
        patterns = [
            r"\s*" * bool(flags[text].get("lstrip")) + re.escape(text) + r"\s*" * bool(flags[text].get("rstrip"))
            for text in sorted(self.added, key=len, reverse=True)
        ]
        self.split = re.compile(f"({'|'.join(patterns)})")
        self.prefix = files.config.get("add_prefix_space") is not False
        self.dummy_prefix = self.processor.encode("a", out_type=str)[0].startswith("▁")
        # As in LlamaTokenizer, whose `legacy` puts a space before the text after a special token, too
        self.adds_space_inside = not self.dummy_prefix or bool(files.config.get("legacy", False))

    def encode_batch(self, texts: Sequence[str], *, add_special: bool = False) -> list[list[int]]:
        """Return the ids of texts."""
        return [self._encode(text) for text in texts]

    def _encode(self, text: str) -> list[int]:
        ids: list[int] = []
        for number, part in enumerate(self.split.split(text)):
            token = part if part in self.added else part.strip()  # with the spaces that it takes along
            if token in self.added:
                ids.append(self.added[token])
            elif (number == 0 and self.prefix) or self.adds_space_inside:
                ids += self.processor.encode(part)
            elif part == " ":
                ids.append(self.processor.piece_to_id("▁"))
            else:
                ids += encode_behind(self.processor.encode, part)
        return ids

    def decode(self, ids: list[int], skip_special: bool) -> str:
        # A model has more rows than its tokenizer has ids: what those padded rows stand for is no text
        left_out = self.special_ids if skip_special else ()
        ids = [i for i in ids if (i < self.pieces or i in self.added_texts) and i not in left_out]
        text = DECODER.decode(list(map(self.id_token, ids)))
        return text[1:] if self.dummy_prefix and self.prefix and text.startswith(" ") else text

    def token_id(self, token: str) -> int | None:
        if token in self.added:
            return self.added[token]
        found = self.processor.piece_to_id(token)
        return found if self.processor.id_to_piece(found) == token else None

    def id_token(self, token_id: int) -> str:
        return self.added_texts.get(token_id) or self.processor.id_to_piece(token_id)


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
