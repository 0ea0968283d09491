"""Text to token ids and back, and conversations to text: Hugging Face's and SentencePiece's files behind one class.

- `tokenizer.json` (the `tokenizers` library) is read where there is one, `tokenizer.model` (SentencePiece) otherwise.
- `encode(text)` gives what transformers' `AutoTokenizer(text)` gives, the BOS token included or not. Two exceptions:
  SentencePiece text that begins with a space keeps it (transformers 5 drops it), so that decoding gives the text back;
  and a BOS that `tokenizer_config.json` asks for is added beside a tokenizer.json too (as transformers 4 does).
- A conversation is rendered by the model's own chat template. A template is code from the internet: it runs in Jinja's
  immutable sandbox, with the helpers that transformers gives it
  (https://huggingface.co/docs/transformers/chat_templating), and can reach nothing else.
"""

import hashlib
import json
import re
from collections.abc import Iterable, Sequence
from datetime import datetime
from functools import cached_property, lru_cache, partial
from itertools import takewhile
from pathlib import Path

import jinja2
from jinja2.sandbox import ImmutableSandboxedEnvironment

from lit_gpt.errors import UserError, reading
from lit_gpt.files import write_json
from lit_gpt.tokenizer_files import TokenizerFiles, Vocabulary, encode_behind

# Tokens that end a text or a turn in the model families we know; those a tokenizer has are among its `stop_ids`.
END_TOKENS = (
    *("</s>", "<|endoftext|>", "<|end_of_text|>", "<|im_end|>", "<|eot_id|>", "<|eom_id|>", "<|eot|>"),
    *("<end_of_turn>", "<|end|>", "<|end_of_turn|>", "<|END_OF_TURN_TOKEN|>", "<|return|>"),
)
# Stands for an answer, to see what a chat template writes around one.
PROBE = "qzanswerzq"


class Tokenizer:
    """The tokenizer of a checkpoint folder.

    Attributes:
        vocab_size: one more than the largest id.
        bos_id, eos_id, pad_id: ids, or None where the model has no such token.
        eos_ids: ids at which transformers ends a generation: EOS, and all of `generation_config.json`.
        adds_bos: True where `encode(text)` puts BOS in front.
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
            self.files = TokenizerFiles(self.dir)
            self.special_tokens = self.files.special_tokens
            self._vocabulary = Vocabulary(self.files)
            self._backend = self._vocabulary.backend
            self.vocab_size: int = self._vocabulary.vocab_size
            self.bos_id, self.eos_id, self.pad_id = map(self._special_id, ("bos", "eos", "pad"))
            self.eos_ids = {self.eos_id, *self.files.model_ids("eos_token_id", self.vocab_size)} - {None}
            # First-generation LLaMA folders call BOS an end
            self.eos_ids -= {self._vocabulary.default_ids.get("bos")} - {self.eos_id}
            (around,) = self._vocabulary.encode_batch([""], add_special=True)
            asks = self.files.config.get("add_bos_token") and self.bos_id not in (None, *around)
            self._head = [self.bos_id] if asks else []
            # A tokenizer.json says itself what comes behind a text
            asks = self.files.config.get("add_eos_token") and self._vocabulary.path.suffix == ".model"
            self._tail = [self.eos_id] if asks and self.eos_id is not None else []
            self.adds_bos = self.encode("")[:1] == [self.bos_id]
            self.chat_template = self._find_chat_template()

    def encode(self, text: str, bos: bool | None = None) -> list[int]:
        """Return the ids of a text.

        Args:
            text: any text; special tokens written in it become their ids.
            bos: put BOS in front; None does what the model's own tokenizer does.

        Raises:
            ValueError: a BOS is asked for that the tokenizer does not have.
        """
        head, tail = (self._head, self._tail) if bos is None else ([self.bos_id] * bos, [])
        if None in head:
            raise UserError(f"the tokenizer of {self.dir} has no BOS token; name one in tokenizer_config.json")
        (ids,) = self._vocabulary.encode_batch([text], add_special=bos is None)
        return head + ids + tail

    def encode_batch(self, texts: Sequence[str], *, continues: bool = False) -> list[list[int]]:
        """Return the ids of many texts, without BOS and EOS.

        Args:
            texts: the texts.
            continues: they go on from some other text, so no leading space is added (SentencePiece does, to a text).
        """
        encode = self._vocabulary.encode_batch
        return [encode_behind(encode, text) for text in texts] if continues and self._adds_space else encode(texts)

    def decode(self, ids: Sequence[int], skip_special: bool = True) -> str:
        """Return the text of `ids`; bytes that are no UTF-8 become U+FFFD."""
        return self._backend.decode([int(i) for i in ids], skip_special_tokens=skip_special)

    def check_ids(self, ids: Iterable[int], rows: int) -> None:
        """Raise ValueError where a model with so many rows has none for some of the ids; the tokens are named."""
        beyond = sorted({i for i in ids if i >= rows})
        if beyond:
            names = ", ".join(f"{self._backend.id_to_token(i)} is id {i}" for i in beyond[:4])
            more = ", ..." if len(beyond) > 4 else ""
            way = "the tokenizer that its model was made with, or text and a prompt style without these tokens"
            raise UserError(f"{names}{more}: the model has {rows} rows; {self.dir} needs {way}")

    @property
    def stop_tokens(self) -> tuple[str, ...]:
        """Return the texts of `stop_ids`."""
        return tuple(filter(None, map(self._backend.id_to_token, sorted(self.stop_ids))))

    @cached_property
    def byte_ids(self) -> frozenset[int]:
        """Ids of byte-fallback pieces (`<0x0A>`): what one of them decodes to depends on those that follow it."""
        ids = (self._backend.token_to_id(f"<0x{byte:02X}>") for byte in range(256))
        return frozenset(i for i in ids if i is not None)

    @property
    def sha256(self) -> str:
        """Return a fingerprint of what the ids come from: data and model belong together where it is the same."""
        more = repr(sorted(self._vocabulary.beside.items())) if self._vocabulary.beside else ""
        return hashlib.sha256(self._vocabulary.path.read_bytes() + more.encode()).hexdigest()

    def answer_end(self, style: str) -> int | None:
        """Return the id that ends an answer in training data of this prompt style: EOS, or what the template writes."""
        try:
            tail = render_tail(self, ("user",)) if style == "chat" else ""
        except ValueError:  # no template, or one for other conversations
            tail = ""
        return next((i for i in self.encode_batch([tail])[0] if i in self.stop_ids), self.eos_id)

    def render_chat(self, messages: Sequence[dict], add_generation_prompt: bool = False) -> str:
        """Return the text of a conversation in the model's own format, as transformers' `apply_chat_template` makes it.

        Args:
            messages: dicts with "role" and "content".
            add_generation_prompt: end with what comes before the assistant's next answer.

        Raises:
            ValueError: there is no template, or the template refuses the messages.
        """
        if self.chat_template is None:
            places = "chat_template.jinja, or chat_template in tokenizer_config.json"
            raise UserError(f"{self.dir} has no chat template ({places}); use a prompt style such as alpaca")
        settings = self.special_tokens | {"add_generation_prompt": add_generation_prompt}
        try:
            # `tools` and `documents` are empty as in transformers, whose templates test them
            template = compile_template(self.chat_template)
            return template.render(messages=list(messages), tools=None, documents=None, **settings)
        except (jinja2.TemplateError, TypeError) as error:
            way = "; for a template without a system role, put its text into the first user message"
            way = way if messages[0]["role"] == "system" else ""
            raise UserError(f"the chat template of {self.dir} refuses the conversation: {error}{way}") from error

    @cached_property
    def _adds_space(self) -> bool:
        """True where a text's first word is encoded as if a space stood before it, as SentencePiece does."""
        newline, joined, alone = self._vocabulary.encode_batch(["\n", "\na", "a"])
        return joined[len(newline) :] != alone

    def _special_id(self, name: str) -> int | None:
        """Return the id of the bos, eos or pad token: as the tokenizer's files say, or else the model's.

        First-generation LLaMA folders name none, and their config.json has ids that are off by one.
        """
        token = self.special_tokens.get(f"{name}_token")
        found = self._backend.token_to_id(token) if token else self._vocabulary.default_ids.get(name)
        # null says that there is none (Qwen's BOS), whatever the model's files say; every text needs an end
        if found is None and (name == "eos" or self.files.config.get(f"{name}_token", "") is not None):
            found = next(iter(self.files.model_ids(f"{name}_token_id", self.vocab_size)), None)
        if found is not None:
            self.special_tokens.setdefault(f"{name}_token", self._backend.id_to_token(found) or "")
        return found

    @cached_property
    def stop_ids(self) -> set[int]:
        """Ids at which an answer ends: `eos_ids`, known end-of-turn tokens, and the chat template's own."""
        found = {self._backend.token_to_id(token) for token in END_TOKENS}
        known = self.eos_ids | (found & self._vocabulary.special_ids)
        return known | self._template_end(known)

    def _template_end(self, known: set[int]) -> set[int]:
        """Return the special token that the chat template writes behind every answer, where none there is known."""
        user, answer = {"role": "user", "content": "?"}, {"role": "assistant", "content": PROBE}
        try:
            prompt = self.render_chat([user], add_generation_prompt=True)
            last, earlier = (self.render_chat(turns) for turns in ([user, answer], [user, answer, user]))
        except ValueError:
            return set()
        tails = self.encode_batch([text.rpartition(PROBE)[2] for text in (last, earlier)])
        shared = [i for i, j in takewhile(lambda pair: pair[0] == pair[1], zip(*tails, strict=False))]
        # A token that the answer itself begins with does not end it
        lead = last.removeprefix(prompt).partition(PROBE)[0] if last.startswith(prompt) else ""
        ends = [i for i in shared if i in self._vocabulary.special_ids and self._backend.id_to_token(i) not in lead]
        return set() if known.intersection(shared) else set(ends[:1])

    def _find_chat_template(self) -> str | None:
        """Return `chat_template.jinja` first, as transformers does; else the config's text, or its list's default."""
        path = self.dir / "chat_template.jinja"
        if path.is_file():
            return path.read_text(encoding="utf-8")
        template = self.files.config.get("chat_template")
        if isinstance(template, list):
            template = {entry["name"]: entry["template"] for entry in template}.get("default")
        return template


# ---------------------------------------------------------------------------------------------------- chat templates
def _raise_exception(message: str) -> None:
    raise jinja2.TemplateError(message)


@lru_cache(maxsize=8)
def compile_template(source: str) -> jinja2.Template:
    """Compile a chat template.

    Raises:
        jinja2.TemplateSyntaxError: the source is no template.
    """
    options = {"trim_blocks": True, "lstrip_blocks": True, "extensions": ["jinja2.ext.loopcontrols"]}
    environment = ImmutableSandboxedEnvironment(**options)
    # Jinja's own filter escapes HTML characters, which the models have never seen
    environment.filters["tojson"] = partial(json.dumps, ensure_ascii=False)
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = lambda pattern: datetime.now().strftime(pattern)
    # `{% generation %}` marks the assistant's text for transformers, and writes nothing
    source = re.sub(r"({%[-+]?\s*)generation\b", r"\1if true", source)
    source = re.sub(r"({%[-+]?\s*)endgeneration\b", r"\1endif", source)
    return environment.from_string(source)


@lru_cache(maxsize=1000)
def render_tail(tokenizer: Tokenizer, roles: tuple[str, ...]) -> str:
    """Return what the chat template writes behind an answer to turns of these roles."""
    answer, user = {"role": "assistant", "content": PROBE}, {"role": "user", "content": PROBE}
    turns = [*({"role": role, "content": "?"} for role in roles), answer]
    _, shown, tail = tokenizer.render_chat(turns).rpartition(PROBE)
    if shown:
        return tail
    # A template that leaves the last answer out: what stands between an earlier one and the user's next text
    return [*tokenizer.render_chat([*turns, user]).split(PROBE), ""][1]


def list_answer_end(folder: Path, style: str) -> None:
    """Add the token that ends an answer of this prompt style to a finetuned model's generation_config.json.

    transformers and vLLM end an answer at what that file lists (config.json where there is none): the base's EOS, while
    answers in a chat template end with another token.
    """
    tokenizer = Tokenizer(folder)
    path, end, content = folder / "generation_config.json", tokenizer.answer_end(style), tokenizer.files.generation
    listed = content.get("eos_token_id", tokenizer.files.model.get("eos_token_id"))
    listed = listed if isinstance(listed, list) else [listed]
    if end is None or end in listed or not (path.is_file() or (folder / "config.json").is_file()):
        return
    if "eos_token_id" not in content:
        ids = {"bos_token_id": tokenizer.bos_id, "pad_token_id": tokenizer.pad_id}
        content, listed = {key: i for key, i in ids.items() if i is not None} | content, sorted(tokenizer.eos_ids)
    ends = [*(i for i in listed if i in tokenizer.eos_ids), end]
    write_json(path, content | {"eos_token_id": list(dict.fromkeys(ends))})
