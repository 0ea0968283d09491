"""Text to token ids and back, and conversations to text: Hugging Face's and SentencePiece's files behind one class.

- `tokenizer.json` (the `tokenizers` library) is read where there is one, `tokenizer.model` (SentencePiece) otherwise.
- `encode(text)` gives what transformers' `AutoTokenizer(text)` gives, the BOS token included or not. Two exceptions:
  SentencePiece text that begins with a space keeps it (transformers 5 drops it), so that decoding gives the text back;
  and a BOS that `tokenizer_config.json` asks for is added beside a tokenizer.json too (as transformers 4 does).
- A conversation is rendered by the model's own chat template, see templates.py.
"""

import hashlib
import re
from collections.abc import Collection, Container, Iterable, Sequence
from functools import cached_property
from itertools import groupby
from pathlib import Path

import jinja2

from lit_gpt.checkpoint import read_json, write_json
from lit_gpt.templates import compile_template

# Tokens that end a text or a turn in the model families we know; those a tokenizer has are among its `stop_ids`.
END_TOKENS = (
    *("</s>", "<|endoftext|>", "<|end_of_text|>", "<|im_end|>", "<|eot_id|>", "<|eom_id|>", "<|eot|>"),
    *("<end_of_turn>", "<|end|>", "<|end_of_turn|>", "<|END_OF_TURN_TOKEN|>", "<|return|>"),
)
SPECIAL_NAMES = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
# A text that goes on is encoded behind one of these, so that no leading space is added to it; see `_encode_behind`.
ANCHORS = ("\n", "|", "0")
FLAGS = ("single_word", "lstrip", "rstrip", "normalized", "special")  # how an added token matches a text


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
        self.config = self._read_optional("tokenizer_config.json")
        special_map = self._read_optional("special_tokens_map.json")
        self.special_tokens = {
            name: text for name in SPECIAL_NAMES if (text := _token_text(self.config.get(name, special_map.get(name))))
        }
        more = self.config.get("additional_special_tokens") or self.config.get("extra_special_tokens")
        more = more or special_map.get("additional_special_tokens") or []
        more = more.values() if isinstance(more, dict) else more
        special = dict.fromkeys([*self.special_tokens.values(), *map(_token_text, more)])
        added = self._read_added_tokens(special)
        self._backend = _open_backend(self.dir, self.config, self.special_tokens, added=added, special=special)
        self.vocab_size: int = self._backend.vocab_size
        self.bos_id = self._special_id("bos")
        self.eos_id = self._special_id("eos")
        self.pad_id = self._special_id("pad")
        if self.config.get("add_bos_token") is True and self.bos_id is not None and self.bos_id not in self.encode(""):
            self._backend.head = [self.bos_id]
        self.eos_ids = {self.eos_id, *self._model_ids("eos_token_id")} - {None}
        if self.eos_id != self._backend.default_id("bos"):
            self.eos_ids -= {self._backend.default_id("bos")}
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

    def check_ids(self, ids: Iterable[int], rows: int) -> None:
        """Raise ValueError where a model with so many rows has none for some of the ids; the tokens are named."""
        beyond = sorted({i for i in ids if i >= rows})
        if beyond:
            names = ", ".join(f"{self._backend.id_token(i)} is id {i}" for i in beyond[:4])
            raise ValueError(
                f"{names}{', ...' if len(beyond) > 4 else ''}: the model has {rows} rows; {self.dir} needs the "
                "tokenizer that its model was made with, or text and a prompt style without these tokens"
            )

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
        """A fingerprint of what the ids come from: data and model belong together where it is the same."""
        more = repr(sorted(self._backend.beside.items())) if self._backend.beside else ""
        return hashlib.sha256(self._backend.path.read_bytes() + more.encode()).hexdigest()

    def answer_end(self, style: str) -> int | None:
        """The id that ends an answer in training data of this prompt style: EOS, or what the chat template writes."""
        if style != "chat" or self.chat_template is None:
            return self.eos_id
        answer = "qzanswerzq"  # no template writes this
        try:
            turns = [{"role": "user", "content": "?"}, {"role": "assistant", "content": answer}]
            tail = self.render_chat(turns).rpartition(answer)[2]
        except ValueError:  # a template for other conversations
            return self.eos_id
        return next((i for i in self._backend.encode_batch([tail])[0] if i in self.stop_ids), self.eos_id)

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

    def _read_added_tokens(self, special: Container[str]) -> dict[str, dict]:
        """The tokens that tokenizer_config.json and added_tokens.json add, by their text: "id", and how they match."""
        found = {
            text: {"id": i, "special": text in special, "normalized": text not in special}
            for text, i in self._read_optional("added_tokens.json").items()
        }
        for i, token in self.config.get("added_tokens_decoder", {}).items():
            flags = token if isinstance(token, dict) else {"special": True}
            found[_token_text(token)] = {"id": int(i)} | {name: flags[name] for name in FLAGS if name in flags}
        return found

    def _special_id(self, name: str) -> int | None:
        """The id of the bos, eos or pad token: as the tokenizer's files say, or else the model's.

        First-generation LLaMA folders name none, and their config.json has ids that are off by one.
        """
        token = self.special_tokens.get(f"{name}_token")
        found = self._backend.token_id(token) if token else self._backend.default_id(name)
        if found is None:
            found = next(iter(self._model_ids(f"{name}_token_id")), None)
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


def list_answer_end(folder: Path, style: str) -> None:
    """Add the token that ends an answer of this prompt style to a finetuned model's generation_config.json.

    transformers and vLLM end an answer at what that file lists (config.json where there is none): the base's EOS, while
    answers in a chat template end with another token.
    """
    tokenizer = Tokenizer(folder)
    path, end = folder / "generation_config.json", tokenizer.answer_end(style)
    content = tokenizer._read_optional("generation_config.json")
    listed = content.get("eos_token_id", tokenizer._read_optional("config.json").get("eos_token_id"))
    listed = listed if isinstance(listed, list) else [listed]
    if end is None or end in listed or not (path.is_file() or (folder / "config.json").is_file()):
        return
    if "eos_token_id" not in content:
        ids = {"bos_token_id": tokenizer.bos_id, "pad_token_id": tokenizer.pad_id}
        content, listed = {key: i for key, i in ids.items() if i is not None} | content, sorted(tokenizer.eos_ids)
    ends = [*(i for i in listed if i in tokenizer.eos_ids), end]
    write_json(path, content | {"eos_token_id": list(dict.fromkeys(ends))})


class _JsonBackend:
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
            raise ValueError(f"{path} is corrupt or not a tokenizer ({error}); get the file again") from error
        # What a file says of cutting and padding is meant for batches of its author
        self.processor.no_truncation()
        self.processor.no_padding()
        before = {token.content for token in self.processor.get_added_tokens_decoder().values()}
        new = sorted((text for text in added if self.token_id(text) is None), key=lambda text: added[text]["id"])
        old = [text for text in added if self.token_id(text) is not None]
        flags = {text: {name: token[name] for name in FLAGS if name in token} for text, token in added.items()}
        self.processor.add_tokens([AddedToken(text, **flags[text]) for text in [*old, *new]])
        for text in new:
            if self.token_id(text) != added[text]["id"]:
                raise ValueError(
                    f"{path} gives the token {text} the id {self.token_id(text)}, tokenizer_config.json or "
                    f"added_tokens.json says {added[text]['id']}: these files are not of one model, get them again"
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


class _SentencePieceBackend:
    """`tokenizer.model`, read by the `sentencepiece` library, with the special tokens that other files add to it."""

    def __init__(
        self, path: Path, *, config: dict, names: dict[str, str], added: dict[str, dict], special: Iterable[str]
    ) -> None:
        """`config` is `tokenizer_config.json`, `names` its special tokens; the rest as in `_JsonBackend`."""
        from sentencepiece import SentencePieceProcessor

        self.path = path
        try:
            self.processor = SentencePieceProcessor(model_file=str(path))
        except (RuntimeError, OSError) as error:
            raise ValueError(_no_sentencepiece(path)) from error
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


def _open_backend(
    folder: Path, config: dict, names: dict[str, str], *, added: dict[str, dict], special: Collection[str]
) -> _JsonBackend | _SentencePieceBackend:
    """Whichever of the two files `folder` has."""
    if (folder / "tokenizer.json").is_file():
        return _JsonBackend(folder / "tokenizer.json", added=added, special=special)
    if not (folder / "tokenizer.model").is_file():
        what = "no tokenizer.json and no tokenizer.model" if folder.is_dir() else "not a folder: expected one"
        raise FileNotFoundError(
            f"{folder}: {what} to read the tokenizer from; get the model with "
            "`python scripts/download.py --repo_id <org>/<name>`"
        )
    return _SentencePieceBackend(folder / "tokenizer.model", config=config, names=names, added=added, special=special)


def _no_sentencepiece(path: Path) -> str:
    """Why a file is no SentencePiece model."""
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


def _token_text(token: str | dict | None) -> str | None:
    """Files write a token as its text, or as an object with the text and its flags."""
    return token.get("content") if isinstance(token, dict) else token
