"""Text to token ids and back, and conversations to text: Hugging Face's and SentencePiece's files behind one class.

- `tokenizer.json` (the `tokenizers` library) is read where there is one, `tokenizer.model` (SentencePiece) otherwise.
- `encode(text)` gives what transformers' `AutoTokenizer(text)` gives, the BOS token included or not. The one exception:
  SentencePiece text that begins with a space keeps it (transformers 5 drops it), so that decoding gives the text back.
- A conversation is rendered by the model's own chat template, see templates.py.
"""

import hashlib
import re
from collections.abc import Sequence
from functools import cached_property
from itertools import groupby
from pathlib import Path

import jinja2

from lit_gpt.checkpoint import read_json
from lit_gpt.errors import reading
from lit_gpt.templates import compile_template

# Tokens that end a text or a turn in the model families we know; those a tokenizer has are among its `stop_ids`.
END_TOKENS = (
    *("</s>", "<|endoftext|>", "<|end_of_text|>", "<|im_end|>", "<|eot_id|>", "<|eom_id|>", "<|eot|>"),
    *("<end_of_turn>", "<|end|>", "<|end_of_turn|>", "<|END_OF_TURN_TOKEN|>", "<|return|>"),
)
SPECIAL_NAMES = ("bos_token", "eos_token", "unk_token", "pad_token", "sep_token", "cls_token", "mask_token")
# A text that goes on is encoded behind one of these, so that no leading space is added to it; see `_encode_behind`.
ANCHORS = ("\n", "|", "0")


class Tokenizer:
    """The tokenizer of a checkpoint folder.

    Attributes:
        vocab_size: one more than the largest id.
        bos_id, eos_id, pad_id: ids, or None where the model has no such token.
        eos_ids: ids at which transformers ends a generation: EOS, and all of `generation_config.json`.
        stop_ids: ids at which an answer ends: `eos_ids`, and known end-of-turn tokens.
        adds_bos: whether `encode(text)` puts BOS in front.
        chat_template: the Jinja source, or None.
    """

    def __init__(self, checkpoint_dir: Path | str) -> None:
        """Read the tokenizer's files.

        Raises:
            FileNotFoundError: there is no such folder, or no tokenizer in it.
            ValueError: a file is corrupt; the message names it.
        """
        self.dir = Path(checkpoint_dir)
        with reading(f"the tokenizer of {self.dir}"):
            self._read()

    def _read(self) -> None:
        self.config = self._read_optional("tokenizer_config.json")
        special_map = self._read_optional("special_tokens_map.json")
        self.special_tokens = {
            name: text for name in SPECIAL_NAMES if (text := _token_text(self.config.get(name, special_map.get(name))))
        }
        self._backend = _open_backend(self.dir, self.config, self.special_tokens)
        self.vocab_size: int = self._backend.vocab_size
        self.bos_id = self._special_id("bos")
        self.eos_id = self._special_id("eos")
        self.pad_id = self._special_id("pad")
        self.eos_ids = {self.eos_id, *self._model_ids("eos_token_id")} - {None}
        self.stop_ids = self._find_stop_ids()
        self.adds_bos = self.bos_id is not None and self.encode("")[:1] == [self.bos_id]
        self.chat_template = self._find_chat_template()

    def encode(self, text: str, bos: bool | None = None, eos: bool = False) -> list[int]:
        """The ids of `text`.

        Args:
            text: any text; special tokens written in it become their ids.
            bos: put BOS in front; None does what the model's own tokenizer does.
            eos: put EOS at the end.

        Raises:
            ValueError: a BOS or EOS is asked for that the tokenizer does not have.
        """
        if bos is None:
            ids = self._backend.encode_batch([text], add_special=True)[0]
        else:
            ids = ([self._required("bos")] if bos else []) + self._backend.encode_batch([text])[0]
        return ids + ([self._required("eos")] if eos else [])

    def encode_batch(self, texts: Sequence[str], *, continues: bool = False) -> list[list[int]]:
        """The ids of many texts, without BOS and EOS.

        Args:
            texts: the texts.
            continues: they go on from some other text, so no leading space is added (SentencePiece does, to a text).
        """
        if continues and self._adds_space:
            return self._encode_behind(texts)
        return self._backend.encode_batch(texts)

    def decode(self, ids: Sequence[int], skip_special: bool = True) -> str:
        """The text of `ids`; bytes that are no UTF-8 become U+FFFD."""
        return self._backend.decode([int(i) for i in ids], skip_special)

    @property
    def stop_tokens(self) -> tuple[str, ...]:
        """The texts of `stop_ids`."""
        return tuple(self._backend.id_token(i) for i in sorted(self.stop_ids))

    @cached_property
    def byte_ids(self) -> frozenset[int]:
        """Ids of byte-fallback pieces (`<0x0A>`): what one of them decodes to depends on those that follow it."""
        ids = (self._backend.token_id(f"<0x{byte:02X}>") for byte in range(256))
        return frozenset(i for i in ids if i is not None)

    @property
    def sha256(self) -> str:
        """A fingerprint of the file that the ids come from: data and model belong together where it is the same."""
        return hashlib.sha256(self._backend.path.read_bytes()).hexdigest()

    def render_chat(self, messages: Sequence[dict], add_generation_prompt: bool = False) -> str:
        """The text of a conversation in the model's own format, as transformers' `apply_chat_template` makes it.

        Args:
            messages: dicts with "role" and "content".
            add_generation_prompt: end with what comes before the assistant's next answer.

        Raises:
            ValueError: there is no template, or the template refuses the messages.
        """
        if self.chat_template is None:
            raise ValueError(
                f"{self.dir} has no chat template (chat_template.jinja, or chat_template in tokenizer_config.json); "
                "use a prompt style such as alpaca"
            )
        try:
            # `tools` and `documents` are empty as in transformers, whose templates test them
            return self._template.render(
                messages=list(messages),
                tools=None,
                documents=None,
                add_generation_prompt=add_generation_prompt,
                **self.special_tokens,
            )
        except (jinja2.TemplateError, TypeError) as error:
            raise ValueError(f"the chat template of {self.dir} refuses the conversation: {error}") from error

    @cached_property
    def _template(self) -> jinja2.Template:
        return compile_template(self.chat_template)

    @cached_property
    def _adds_space(self) -> bool:
        """Whether a text's first word is encoded as if a space stood before it, as SentencePiece does."""
        newline, joined = self._backend.encode_batch(["\n", "\na"])
        return joined[len(newline) :] != self._backend.encode_batch(["a"])[0]

    def _encode_behind(self, texts: Sequence[str]) -> list[list[int]]:
        """Encode each text behind an anchor, and take the anchor's ids off again.

        A second anchor is tried where the first has merged with the text; a text that merges with all keeps its space.
        """
        results: list[list[int] | None] = [None] * len(texts)
        for anchor in ANCHORS:
            left = [i for i, ids in enumerate(results) if ids is None]
            head = self._backend.encode_batch([anchor])[0]
            for i, ids in zip(left, self._backend.encode_batch([anchor + texts[i] for i in left]), strict=True):
                if ids[: len(head)] == head:
                    results[i] = ids[len(head) :]
        return [self._backend.encode_batch([texts[i]])[0] if ids is None else ids for i, ids in enumerate(results)]

    def _read_optional(self, name: str) -> dict:
        path = self.dir / name
        content = read_json(path) if path.is_file() else {}
        if not isinstance(content, dict):
            raise ValueError(f"{path} holds a {type(content).__name__}, expected an object; get the file again")
        return content

    def _special_id(self, name: str) -> int | None:
        """The id of the bos, eos or pad token: its name in the tokenizer's files, or else the model's own files."""
        token = self.special_tokens.get(f"{name}_token")
        found = self._backend.token_id(token) if token else None
        if found is None:
            found = next(iter(self._model_ids(f"{name}_token_id")), None)
        if found is None and not token:
            found = self._backend.default_id(name)
        if found is not None:
            self.special_tokens.setdefault(f"{name}_token", self._backend.id_token(found))
        return found

    def _model_ids(self, key: str) -> list[int]:
        """What `generation_config.json`, then `config.json` say of a token id: an int or a list of them."""
        ids: list[int] = []
        for name in ("generation_config.json", "config.json"):
            value = self._read_optional(name).get(key)
            ids += value if isinstance(value, list) else [value]
        return [i for i in ids if isinstance(i, int) and 0 <= i < self.vocab_size]

    def _find_stop_ids(self) -> set[int]:
        found = {self._backend.token_id(token) for token in END_TOKENS}
        return self.eos_ids | (found & self._backend.special_ids)

    def _find_chat_template(self) -> str | None:
        """`chat_template.jinja` first, as transformers does; else the config's text, or the default of its list."""
        path = self.dir / "chat_template.jinja"
        if path.is_file():
            return path.read_text(encoding="utf-8")
        template = self.config.get("chat_template")
        if isinstance(template, list):
            template = {entry["name"]: entry["template"] for entry in template}.get("default")
        return template

    def _required(self, name: str) -> int:
        token_id = {"bos": self.bos_id, "eos": self.eos_id}[name]
        if token_id is None:
            raise ValueError(
                f"the tokenizer of {self.dir} has no {name.upper()} token; name one in tokenizer_config.json"
            )
        return token_id


class _JsonBackend:
    """`tokenizer.json`, read by the `tokenizers` library."""

    def __init__(self, path: Path) -> None:
        from tokenizers import Tokenizer as HFTokenizer

        self.path = path
        try:
            self.processor = HFTokenizer.from_file(str(path))
        except Exception as error:  # the library raises nothing more precise
            raise ValueError(f"{path} is corrupt or not a tokenizer ({error}); get the file again") from error
        # What a file says of cutting and padding is meant for batches of its author
        self.processor.no_truncation()
        self.processor.no_padding()
        self.special_ids = {i for i, token in self.processor.get_added_tokens_decoder().items() if token.special}
        self.vocab_size = max(self.processor.get_vocab().values(), default=-1) + 1

    def encode_batch(self, texts: Sequence[str], *, add_special: bool = False) -> list[list[int]]:
        """`add_special`: run the file's post-processor, which is what adds BOS."""
        return [e.ids for e in self.processor.encode_batch_fast(list(texts), add_special_tokens=add_special)]

    def decode(self, ids: list[int], skip_special: bool) -> str:
        return self.processor.decode(ids, skip_special_tokens=skip_special)

    def token_id(self, token: str) -> int | None:
        return self.processor.token_to_id(token)

    def id_token(self, token_id: int) -> str:
        return self.processor.id_to_token(token_id) or ""

    def default_id(self, name: str) -> int | None:
        """The file itself names no special tokens."""
        return None


class _SentencePieceBackend:
    """`tokenizer.model`, read by the `sentencepiece` library, with the special tokens that other files add to it."""

    def __init__(self, path: Path, *, config: dict, special_tokens: dict[str, str], added: dict[str, int]) -> None:
        """`config` is `tokenizer_config.json`; `added` maps the tokens that are not in the model to their ids."""
        from sentencepiece import SentencePieceProcessor

        self.path = path
        try:
            self.processor = SentencePieceProcessor(model_file=str(path))
        except (RuntimeError, OSError) as error:
            raise ValueError(f"{path} is corrupt or not a SentencePiece model; get the file again") from error
        pieces = self.processor.get_piece_size()
        self.added = dict(added)
        for token in [*special_tokens.values(), *map(_token_text, config.get("additional_special_tokens") or [])]:
            if (found := self.token_id(token)) is not None:
                self.added[token] = found
        self.added_tokens = {i: token for token, i in self.added.items()}
        self.special_ids = {i for i in range(pieces) if self.processor.is_control(i)} | set(self.added_tokens)
        self.vocab_size = max(pieces, max(self.added_tokens, default=-1) + 1)
        # As in LlamaTokenizer, whose `legacy` puts a space before the text after a special token, too
        self.legacy = bool(config.get("legacy", False))
        ends = {name: self.token_id(special_tokens.get(f"{name}_token", "")) for name in ("bos", "eos")}
        ends = {name: self.default_id(name) if found is None else found for name, found in ends.items()}
        self.head = [ends["bos"]] if config.get("add_bos_token") and ends["bos"] is not None else []
        self.tail = [ends["eos"]] if config.get("add_eos_token") and ends["eos"] is not None else []
        self.split = re.compile("(" + "|".join(map(re.escape, sorted(self.added, key=len, reverse=True))) + ")")
        self.dummy_prefix = self.processor.encode("a", out_type=str)[0].startswith("▁")

    def encode_batch(self, texts: Sequence[str], *, add_special: bool = False) -> list[list[int]]:
        """`add_special`: add BOS and EOS as `tokenizer_config.json` says."""
        head, tail = (self.head, self.tail) if add_special else ([], [])
        return [head + self._encode(text) + tail for text in texts]

    def _encode(self, text: str) -> list[int]:
        ids: list[int] = []
        for number, part in enumerate(self.split.split(text) if self.added else [text]):
            if part in self.added:
                ids.append(self.added[part])
            elif part and number and self.dummy_prefix and not self.legacy:
                ids += self._encode_inside(part)
            else:
                ids += self.processor.encode(part)
        return ids

    def _encode_inside(self, text: str) -> list[int]:
        """The ids of a text that follows a special token: the space that SentencePiece puts first is not wanted."""
        if text.startswith(" "):
            return self.processor.encode(text[1:]) or self.processor.encode(text)[1:]
        for anchor in ANCHORS:
            head, ids = self.processor.encode([anchor, anchor + text])
            if ids[: len(head)] == head:
                return ids[len(head) :]
        return self.processor.encode(text)

    def decode(self, ids: list[int], skip_special: bool) -> str:
        """As in transformers, each byte of a run of byte pieces that is no UTF-8 gives U+FFFD."""
        # A model has more rows than its tokenizer has ids: what those padded rows stand for is no text
        ids = [i for i in ids if i < self.vocab_size and not (skip_special and i in self.special_ids)]
        text = ""
        for is_byte, run in groupby(ids, key=self._is_byte):
            pieces = [self.added_tokens.get(i) or self.processor.id_to_piece(i) for i in run]
            text += _bytes_text(pieces) if is_byte else "".join(pieces).replace("▁", " ")
        return text[1:] if self.dummy_prefix and text.startswith(" ") else text

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


def _open_backend(folder: Path, config: dict, special_tokens: dict[str, str]) -> _JsonBackend | _SentencePieceBackend:
    """Whichever of the two files `folder` has."""
    if (folder / "tokenizer.json").is_file():
        return _JsonBackend(folder / "tokenizer.json")
    if not (folder / "tokenizer.model").is_file():
        what = "no tokenizer.json and no tokenizer.model" if folder.is_dir() else "not a folder: expected one"
        raise FileNotFoundError(
            f"{folder}: {what} to read the tokenizer from; get the model with "
            "`python scripts/download.py --repo_id <org>/<name>`"
        )
    added = {_token_text(token): int(i) for i, token in config.get("added_tokens_decoder", {}).items()}
    if (folder / "added_tokens.json").is_file():
        added |= read_json(folder / "added_tokens.json")
    return _SentencePieceBackend(folder / "tokenizer.model", config=config, special_tokens=special_tokens, added=added)


def _bytes_text(pieces: list[str]) -> str:
    """The text of byte pieces, `<0xE2>` and such."""
    try:
        return bytes(int(piece[3:5], 16) for piece in pieces).decode("utf-8")
    except UnicodeDecodeError:
        return "\ufffd" * len(pieces)


def _token_text(token: str | dict | None) -> str | None:
    """Files write a token as its text, or as an object with the text and its flags."""
    return token.get("content") if isinstance(token, dict) else token
