"""Rows of instruction data, read from JSON, JSONL or CSV and checked one by one.

It knows files and shapes of rows, and no tokenizer. A row is {"instruction", "input", "output"}, or {"messages"}: a
conversation of system, user and assistant, which ShareGPT calls {"conversations"}. A file holds rows of one kind. Rows
that cannot be read as they were meant are gathered, and told together with the file and their numbers, counted from 1.
Nothing is mended or guessed; rows without any text are left out and counted. A JSON list is held in memory whole, JSONL
and CSV a row at a time.
"""

import csv
import json
import re
import urllib.request
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from http.client import HTTPException
from io import BytesIO
from pathlib import Path
from typing import Any, BinaryIO

from lit_gpt.errors import UserError

FIELDS = {"instruction": "instruction", "input": "input", "output": "output"}
"""The columns of the three texts of a row, where nobody says otherwise."""
ROLES = ("system", "user", "assistant")
LEARN_KEYS = ("weight", "train", "loss")
"""Keys with which data sets mark a message of the assistant that is not to be learned (0 or false)."""
TOOL_KEYS = ("tools", "functions", "tool_calls", "function_call")
NO_TOOLS = ": chat offers no tools, so they can't be learned; leave the row out, or write the calls as text"
CONTEXT_KEYS = ("system", "system_prompt", "history")
"""Keys of what belongs to a conversation and stands beside it, or beside an instruction."""
NO_CONTEXT = ", which would be left out; put it into messages, or take it away"
CHAT_KEYS = ("messages", "conversations")
SHAREGPT = {"human": "user", "gpt": "assistant"}
HALF_CHARACTER = re.compile("[\ud800-\udfff]")
"""A surrogate without its other half, which cannot be written as UTF-8."""
SHOWN_PROBLEMS, SHOWN_ROWS = 20, 10
"""The most problems that an error tells, and the most rows that it names of one."""


@dataclass
class BadRows:
    """The rows of a file that cannot be used, and what is wrong with them; each problem is told once."""

    source: Path | str
    rows: dict[str, list[int]] = field(default_factory=dict)
    """Numbers of rows, by what is wrong with them."""
    blank: int = 0
    """Rows without text, left out."""

    def add(self, number: int, problem: UserError) -> None:
        """Note what is wrong with a row."""
        self.rows.setdefault(str(problem), []).append(number)

    def __str__(self) -> str:
        told = []
        for problem, numbers in [*self.rows.items()][:SHOWN_PROBLEMS]:
            shown, more = ", ".join(f"row {n}" for n in numbers[:SHOWN_ROWS]), len(numbers) - SHOWN_ROWS
            told.append(f"{shown}{f' and {more} more' * (more > 0)}: {problem}")
        if more := sum(map(len, [*self.rows.values()][SHOWN_PROBLEMS:])):
            told.append(f"and {more} more rows")
        return f"{self.source}, {'; '.join(told)}"


def read_rows(problems: BadRows, fields: Mapping[str, str] = FIELDS) -> Iterator[tuple[int, dict]]:
    """Yield the numbers and the contents of a file's good rows: {"instruction", "input", "output"} or {"messages"}.

    Args:
        problems: names the file: a .json (one list), .jsonl (a row a line) or .csv (with a header) file, or the https
            address of one. It gets what is wrong with the other rows.
        fields: what the file calls instruction, input and output.

    Raises:
        FileNotFoundError, ConnectionError: there is no such file, or it can't be downloaded.
        ValueError: the file is of an unknown kind, no UTF-8 or JSON, or holds no rows, or none with a field that is
            mapped.
    """
    source, columns = problems.source, _columns(fields)
    absent = set(columns.values()) - set(FIELDS) - {None}
    suffix = Path(str(source).split("?")[0]).suffix.lower()
    readers = {".json": _read_json, ".jsonl": _read_jsonl, ".csv": _read_csv}
    if suffix not in readers:
        raise UserError(f"{source}: unknown kind of data file {suffix!r}; choices: {', '.join(readers)}")
    chat, n_good = None, 0
    with _open(source) as file:
        for number, row in enumerate(readers[suffix](source, _read_lines(source, file)), start=1):
            if isinstance(row, dict):
                absent -= row.keys()
                chat = not row.keys().isdisjoint(CHAT_KEYS) if chat is None else chat
            try:
                if isinstance(row, UserError):
                    raise row
                row = _check_conversation(row) if chat else _check_instruction(row, columns)
            except UserError as error:
                problems.add(number, error)
                continue
            texts = [message["content"] for message in row["messages"]] if chat else row.values()
            if "".join(texts).strip():
                n_good += 1
                yield number, row
            else:
                problems.blank += 1
    if absent and (n_good or problems.blank):  # a typo would empty every input
        raise UserError(f"{source}: no row has {' or '.join(map(repr, sorted(absent)))}, which --fields names")
    if not n_good and not problems.rows:
        raise UserError(f"{source} holds no rows{' with text' if problems.blank else ''}")


def _columns(fields: Mapping[str, str]) -> dict[str, str | None]:
    """Return the column of each text; None for an input that the file does not have."""
    if unknown := fields.keys() - FIELDS.keys():
        raise UserError(f"--fields names {', '.join(sorted(unknown))}; it maps {', '.join(FIELDS)} to a file's names")
    # A file's "input" that is the instruction, say, is not the input too
    columns = FIELDS | ({"input": None} if "input" in fields.values() else {}) | dict(fields)
    if len(set(columns.values())) < len(columns):
        raise UserError(f"--fields takes two texts from one column ({columns}): give each a column of its own")
    return columns


def _open(source: Path | str) -> BinaryIO:
    """Open a local file, or what an https address gives."""
    if str(source).startswith("https://"):
        try:
            with urllib.request.urlopen(str(source), timeout=60) as reply:
                return BytesIO(reply.read())
        except (OSError, HTTPException, ValueError) as error:
            problem = f"cannot download {source} ({getattr(error, 'reason', repr(error))})"
            raise ConnectionError(f"{problem}; get the file in another way and give --data_file_path FILE") from error
    if not Path(source).is_file():
        raise FileNotFoundError(f"{source} is not a file; give --data_file_path a .json, .jsonl or .csv file")
    return Path(source).open("rb")


# ---------------------------------------------------------------------------------------------------- reading
def _read_lines(source: Path | str, file: BinaryIO) -> Iterator[str]:
    """Yield the lines of a file, each with the line break that ends it."""
    for number, line in enumerate(file, start=1):
        try:
            # Spreadsheets put a byte order mark in front
            yield line.decode("utf-8-sig" if number == 1 else "utf-8")
        except UnicodeDecodeError as error:
            raise UserError(f"{source} is not UTF-8 text (line {number}); save it as UTF-8") from error


def _object(pairs: list[tuple[str, Any]]) -> dict | UserError:
    """Return a JSON object, or an error in its place where a key stands twice: so the parser can go on behind it."""
    row = dict(pairs)
    if len(row) == len(pairs):
        return row
    ((twice, _),) = Counter(name for name, _ in pairs).most_common(1)
    return UserError(f"the key {twice!r} stands twice in an object")


def _read_json(source: Path | str, lines: Iterable[str]) -> list:
    """Return the items of a JSON list."""
    text = "".join(lines)
    try:
        rows = json.loads(text, object_pairs_hook=_object)
    except (ValueError, RecursionError) as error:
        hint = "; a file with one row a line is to be named .jsonl" if "Extra data" in str(error) else ""
        raise UserError(f"{source} is not valid JSON, or cut short: {error}{hint}") from error
    if not isinstance(rows, list):
        raise UserError(f"{source} holds a {type(rows).__name__}, expected a list of rows")
    return rows


def _read_jsonl(source: Path | str, lines: Iterable[str]) -> Iterator[Any]:
    """Yield what each line of JSON holds, or an error in its place."""
    for number, line in enumerate(lines, start=1):
        if line.strip():
            try:
                yield json.loads(line, object_pairs_hook=_object)
            except (ValueError, RecursionError) as error:
                yield UserError(f"line {number} is not valid JSON: {error}")


def _read_csv(source: Path | str, lines: Iterable[str]) -> Iterator[dict | UserError]:
    """Yield the records of a CSV file by the names of its header, or an error in their place."""
    csv.field_size_limit(1 << 30)  # the default stops at 131,072 characters
    # A \r alone ends a line, too: Excel writes "CSV (Macintosh)" so
    reader = csv.reader((part for line in lines for part in re.split(r"(?<=\r)(?!\n)", line)), strict=True)
    records = filter(None, reader)  # of lines that hold something
    try:
        header = next(records, [])
        if twice := sorted({name for name in header if name and header.count(name) > 1}):
            names = " and ".join(map(repr, twice))
            raise UserError(f"{source}: the header has {names} twice; give every column its own name")
        for record in records:
            if any(map(str.strip, record[len(header) :])):
                yield UserError(f"{len(record)} fields, the header has {len(header)}; quote a text that holds commas")
            else:
                yield dict(zip(header, record, strict=False))
    except csv.Error as error:
        yield UserError(f"is not valid CSV (line {reader.line_num}): {error}")


# ---------------------------------------------------------------------------------------------------- checking
def _check_instruction(row: object, columns: Mapping[str, str | None]) -> dict[str, str]:
    """Return the three texts of a row; the input may be missing or null, the output may be empty."""
    if not isinstance(row, dict):
        names = ", ".join(filter(None, columns.values()))
        raise UserError(f"is a {type(row).__name__}, expected an object with {names}")
    if missing := [name for name in (columns["instruction"], columns["output"]) if name not in row]:
        raise UserError(f"has no {' and no '.join(missing)} (it has {', '.join(map(str, row)) or 'nothing'})")
    _refuse("", row, [key for key in CONTEXT_KEYS if key not in columns.values()], NO_CONTEXT)
    texts = {name: row.get(column) for name, column in columns.items()}
    texts["input"] = "" if texts["input"] is None else texts["input"]
    for name, text in texts.items():
        _check_text(columns[name], text)
    return texts


def _check_conversation(row: object) -> dict[str, list[dict]]:
    """Return the messages of a row, each with role and content."""
    messages = next((row[key] for key in CHAT_KEYS if key in row), None) if isinstance(row, dict) else None
    if not isinstance(messages, list) or not messages:
        raise UserError("has no messages, expected a list of {role, content}")
    _refuse("the row ", row, TOOL_KEYS, NO_TOOLS)
    _refuse("", row, CONTEXT_KEYS, NO_CONTEXT)
    return {"messages": [_check_message(f"message {turn}", message) for turn, message in enumerate(messages, start=1)]}


def _check_message(where: str, message: object) -> dict:
    """Return a message with role and content, of ShareGPT's from and value too; parts of text become one."""
    if isinstance(message, UserError):
        raise UserError(f"{where}: {message}")
    if not isinstance(message, dict):
        raise UserError(f"{where} is a {type(message).__name__}, expected {{role, content}}")
    _refuse(f"{where} ", message, TOOL_KEYS, NO_TOOLS)
    if "from" in message and "role" not in message:
        role = message["from"]
        message = {**message, "role": SHAREGPT.get(str(role), role), "content": message.get("value")}
    if isinstance(message.get("content"), list) and all(map(_is_text, message["content"])):
        message = {**message, "content": "".join(part["text"] for part in message["content"])}
    if not isinstance(message.get("content"), str):
        raise UserError(f"{where} has no text under content, expected a string or parts of text")
    if message.get("role") not in ROLES:
        raise UserError(f"{where} has the role {message.get('role')!r}, expected {', '.join(ROLES)}")
    for key, value in message.items():
        if key in LEARN_KEYS and value not in (None, 0, 1):
            raise UserError(f"{where} has the {key} {value!r}, expected 0 or 1")
        if isinstance(value, str):
            _check_text(f"{where}, {key}", value)
    return message


def _is_text(part: object) -> bool:
    """Return True for a part of a message's content, as OpenAI writes it, that is a text."""
    return isinstance(part, dict) and part.get("type") == "text" and isinstance(part.get("text"), str)


def _refuse(where: str, holder: Mapping, keys: Collection[str], why: str) -> None:
    """Raise ValueError where a row or a message holds something under one of these keys."""
    if found := [key for key in keys if holder.get(key)]:
        raise UserError(f"{where}has {' and '.join(found)}{why}")


def _check_text(name: str, text: object) -> None:
    """Raise ValueError unless it is text that can be written as UTF-8."""
    if not isinstance(text, str):
        raise UserError(f"{name} is a {type(text).__name__}, expected text")
    if half := HALF_CHARACTER.search(text):
        found = f"U+{ord(half[0]):04X} at character {half.start() + 1}"
        raise UserError(f"{name} holds half a character ({found}); write it again from the whole text")
