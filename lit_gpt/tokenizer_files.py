"""The two kinds of tokenizer files, each behind the same methods: text to ids and back, and what tokens are special.

- `tokenizer.json` is read by the `tokenizers` library, `tokenizer.model` by `sentencepiece`.
- Tokens that stand in other files alone (`tokenizer_config.json`, `added_tokens.json`) are added to either, as
  transformers does it.
"""

import re
from collections.abc import Collection, Iterable, Sequence
from itertools import groupby
from pathlib import Path

from lit_gpt.errors import UserError

# A text that goes on is encoded behind one of these, so that no leading space is added to it; see `_encode_behind`.
ANCHORS = ("\n", "|", "0")
FLAGS = {"single_word", "lstrip", "rstrip", "normalized", "special"}  # how an added token matches a text


class JsonBackend:
    """`tokenizer.json`, read by the `tokenizers` library."""

    def __init__(self, path: Path, *, added: dict[str, dict], special: Iterable[str]) -> None:
        """`added` and `special` are tokens that other files add: all that they say of them, and special ones' texts.

        Raises:
            ValueError: the file is corrupt, or an added token would get another id than the other files say.
        """
        from tokenizers import AddedToken
        from tokenizers import Tokenizer as HFTokenizer

        self.path = path
        try:
            self.processor = HFTokenizer.from_file(str(path))
        except Exception as error:  # the library raises nothing more precise
            raise UserError(f"{path} is corrupt or not a tokenizer ({error}); get the file again") from error
        # What a file says of cutting and padding is meant for batches of its author
        self.processor.no_truncation()
        self.processor.no_padding()
        before = {token.content for token in self.processor.get_added_tokens_decoder().values()}
        texts = sorted(added, key=lambda text: added[text]["id"])  # new ids are given in this order
        new = [text for text in texts if self.token_id(text) is None]
        self.processor.add_tokens(
            [AddedToken(text, **{k: added[text][k] for k in FLAGS & {*added[text]}}) for text in texts]
        )
        for text in new:
            if self.token_id(text) != (said := added[text]["id"]):
                raise UserError(
                    f"{path} gives the token {text} the id {self.token_id(text)}, tokenizer_config.json or "
                    f"added_tokens.json says {said}: these files are not of one model, get them again"
                )
        self.processor.add_special_tokens(
            [AddedToken(text, special=True, normalized=False) for text in special if text not in before | {*added}]
        )
        decoder = self.processor.get_added_tokens_decoder()
        self.beside = {token.content: i for i, token in decoder.items() if token.content not in before}
        self.special_ids = {i for i, token in decoder.items() if token.special}
        self.vocab_size = max(self.processor.get_vocab().values(), default=-1) + 1
        self.head: list[int] = []

    def encode_batch(self, texts: Sequence[str], *, add_special: bool = False) -> list[list[int]]:
        """`add_special`: run the file's post-processor, which is what adds BOS, or else put `head` in front."""
        encodings = self.processor.encode_batch_fast(list(texts), add_special_tokens=add_special)
        return [self.head + e.ids if add_special else e.ids for e in encodings]

    def decode(self, ids: list[int], skip_special: bool) -> str:
        return self.processor.decode(ids, skip_special_tokens=skip_special)

    def token_id(self, token: str) -> int | None:
        return self.processor.token_to_id(token)

    def id_token(self, token_id: int) -> str:
        return self.processor.id_to_token(token_id) or ""

    def default_id(self, name: str) -> int | None:
        """The file itself names no special tokens."""
        return None


class SentencePieceBackend:
    """`tokenizer.model`, read by the `sentencepiece` library, with the special tokens that other files add to it."""

    def __init__(
        self, path: Path, *, config: dict, names: dict[str, str], added: dict[str, dict], special: Iterable[str]
    ) -> None:
        """`config` is `tokenizer_config.json`, `names` its special tokens; the rest as in `JsonBackend`."""
        from sentencepiece import SentencePieceProcessor

        self.path = path
        try:
            self.processor = SentencePieceProcessor(model_file=str(path))
        except (RuntimeError, OSError) as error:
            raise UserError(_no_sentencepiece(path)) from error
        self.pieces = pieces = self.processor.get_piece_size()
        own = [i for i in range(pieces) if self.processor.is_control(i) or self.processor.is_unknown(i)]
        self.added = {self.processor.id_to_piece(i): i for i in own}
        self.added |= {text: token["id"] for text, token in added.items()}
        for text in special:
            if text not in self.added:  # one that no file gives an id comes behind all others
                found = self.token_id(text)
                self.added[text] = max(pieces - 1, *self.added.values()) + 1 if found is None else found
        self.beside = {text: i for text, i in self.added.items() if i >= pieces}
        self.added_tokens = {i: token for token, i in self.added.items()}
        plain = {text for text, token in added.items() if not token.get("special") and text not in special}
        self.special_ids = {i for text, i in self.added.items() if text not in plain}
        self.vocab_size = max(pieces, max(self.added_tokens, default=-1) + 1)
        # As in LlamaTokenizer, whose `legacy` puts a space before the text after a special token, too
        self.legacy = bool(config.get("legacy", False))
        self.prefix = config.get("add_prefix_space") is not False
        ends = {name: self.token_id(names.get(f"{name}_token", "")) for name in ("bos", "eos")}
        ends = {name: self.default_id(name) if found is None else found for name, found in ends.items()}
        self.head = [ends["bos"]] if config.get("add_bos_token") and ends["bos"] is not None else []
        self.tail = [ends["eos"]] if config.get("add_eos_token") and ends["eos"] is not None else []
        spaces = {
            text: [r"\s*" * bool(token.get(flag)) for flag in ("lstrip", "rstrip")] for text, token in added.items()
        }
        patterns = [
            re.escape(text).join(spaces.get(text, ["", ""])) for text in sorted(self.added, key=len, reverse=True)
        ]
        self.split = re.compile(f"({'|'.join(patterns)})")
        self.dummy_prefix = self.processor.encode("a", out_type=str)[0].startswith("▁")

    def encode_batch(self, texts: Sequence[str], *, add_special: bool = False) -> list[list[int]]:
        """`add_special`: add BOS and EOS as `tokenizer_config.json` says."""
        head, tail = (self.head, self.tail) if add_special else ([], [])
        return [head + self._encode(text) + tail for text in texts]

    def _encode(self, text: str) -> list[int]:
        ids: list[int] = []
        for number, part in enumerate(self.split.split(text) if self.added else [text]):
            token = part if part in self.added else part.strip()  # with the spaces that it takes along
            if token in self.added:
                ids.append(self.added[token])
            elif part and (number or not self.prefix) and self.dummy_prefix and not self.legacy:
                ids += self._encode_inside(part)
            else:
                ids += self.processor.encode(part)
        return ids

    def _encode_inside(self, text: str) -> list[int]:
        """The ids of a text that follows a special token: the space that SentencePiece puts first is not wanted."""
        if text == " ":
            return [self.processor.piece_to_id("▁")]
        if text.startswith(" "):
            return self.processor.encode(text[1:])
        for anchor in ANCHORS:
            head, ids = self.processor.encode([anchor, anchor + text])
            if ids[: len(head)] == head:
                return ids[len(head) :]
        return self.processor.encode(text)

    def decode(self, ids: list[int], skip_special: bool) -> str:
        """As in transformers, each byte of a run of byte pieces that is no UTF-8 gives U+FFFD."""
        # A model has more rows than its tokenizer has ids: what those padded rows stand for is no text
        ids = [i for i in ids if i < self.pieces or i in self.added_tokens]
        ids = [i for i in ids if not (skip_special and i in self.special_ids)]
        text = ""
        for is_byte, run in groupby(ids, key=self._is_byte):
            pieces = [self.added_tokens.get(i) or self.processor.id_to_piece(i) for i in run]
            text += _bytes_text(pieces) if is_byte else "".join(pieces).replace("▁", " ")
        return text[1:] if self.dummy_prefix and self.prefix and text.startswith(" ") else text

    def _is_byte(self, token_id: int) -> bool:
        return token_id not in self.added_tokens and self.processor.is_byte(token_id)

    def token_id(self, token: str) -> int | None:
        if token in self.added:
            return self.added[token]
        found = self.processor.piece_to_id(token)
        return found if self.processor.id_to_piece(found) == token else None

    def id_token(self, token_id: int) -> str:
        return self.added_tokens.get(token_id) or self.processor.id_to_piece(token_id)

    def default_id(self, name: str) -> int | None:
        """The id of bos, eos or pad that the model file itself gives."""
        found = {"bos": self.processor.bos_id, "eos": self.processor.eos_id, "pad": self.processor.pad_id}[name]()
        return found if found >= 0 else None


def open_backend(
    folder: Path, config: dict, names: dict[str, str], *, added: dict[str, dict], special: Collection[str]
) -> JsonBackend | SentencePieceBackend:
    """Whichever of the two files `folder` has."""
    if (folder / "tokenizer.json").is_file():
        return JsonBackend(folder / "tokenizer.json", added=added, special=special)
    if not (folder / "tokenizer.model").is_file():
        what = "no tokenizer.json and no tokenizer.model" if folder.is_dir() else "not a folder: expected one"
        raise FileNotFoundError(
            f"{folder}: {what} to read the tokenizer from; get the model with "
            "`python scripts/download.py --repo_id <org>/<name>`"
        )
    return SentencePieceBackend(folder / "tokenizer.model", config=config, names=names, added=added, special=special)


def _no_sentencepiece(path: Path) -> str:
    """Return the reason why a file is no SentencePiece model."""
    if re.match(rb"[A-Za-z0-9+/]+=* \d+\r?\n", path.read_bytes()[:200]):
        return (
            f"{path} is a tiktoken vocabulary (Meta's own files of Llama 3), which lacks the special tokens; get the "
            "tokenizer.json of the model's Hugging Face repository into the folder"
        )
    return f"{path} is corrupt or not a SentencePiece model; get the file again"


def _bytes_text(pieces: list[str]) -> str:
    """The text of byte pieces, `<0xE2>` and such."""
    try:
        return bytes(int(piece[3:5], 16) for piece in pieces).decode("utf-8")
    except UnicodeDecodeError:
        return "\ufffd" * len(pieces)


def token_text(token: str | dict | None) -> str | None:
    """Files write a token as its text, or as an object with the text and its flags."""
    return token.get("content") if isinstance(token, dict) else token
