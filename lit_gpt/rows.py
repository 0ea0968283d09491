"""Rows of instruction data, read one by one from JSON, JSONL or CSV and checked.

It knows files and shapes of rows, and no tokenizer. A row is {"instruction", "input", "output"}, or {"messages"}: a
conversation of system, user and assistant, which ShareGPT calls {"conversations"}. A file holds rows of one kind. Rows
that cannot be read as they were meant are gathered, and told together with the file and their numbers, counted from 1.
Nothing is mended or guessed; rows without any text are left out and counted.
"""

import csv
import json
import re
import urllib.request
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field
from http.client import HTTPException
from io import BytesIO, TextIOWrapper
from pathlib import Path
from typing import Any, BinaryIO, TextIO

from lit_gpt.errors import UserError

FIELDS = {"instruction": "instruction", "input": "input", "output": "output"}
"""The columns of the three texts of a row, where nobody says otherwise."""
ROLES = ("system", "user", "assistant")
LEARN_KEYS = ("weight", "train", "loss")
"""Keys with which data sets mark a message of the assistant that is not to be learned (0 or false)."""
TOOL_KEYS = ("tools", "functions", "tool_calls", "function_call")
NO_TOOLS = (
    ": chat offers no tools, so they can't be learned; leave the row out or write the calls as text under content"
)
CONTEXT_KEYS = ("system", "system_prompt", "history")
"""Keys of what belongs to a conversation and stands beside it, or beside an instruction."""
NO_CONTEXT = ", which would be left out; put it into messages, or take it away"
CHAT_KEYS = ("messages", "conversations")
SHAREGPT = {"human": "user", "gpt": "assistant"}
SHOWN_PROBLEMS, SHOWN_ROWS = 20, 10
"""The most problems that an error tells, and the most rows that it names of one."""
CHUNK = 1 << 20
SPACE = re.compile(r"[ \t\n\r]*")


@dataclass
class BadRows:
    """The rows of a file that cannot be used, by number, and what is wrong with them; told with each problem once."""

    source: Path | str
    rows: list[tuple[int, str]] = field(default_factory=list)
    blank: int = 0
    """Rows without text, left out."""

    def __str__(self) -> str:
        by_problem: dict[str, list[int]] = {}
        for number, problem in sorted(self.rows):
            by_problem.setdefault(problem, []).append(number)
        shown = [f"{_name(numbers)}: {problem}" for problem, numbers in [*by_problem.items()][:SHOWN_PROBLEMS]]
        more = sum(map(len, [*by_problem.values()][SHOWN_PROBLEMS:]))
        return f"{self.source}, {'; '.join(shown + [f'and {more} more rows'] * (more > 0))}"


def _name(numbers: list[int]) -> str:
    """Return how rows with one problem are told: the first ten, and how many more there are."""
    shown, more = ", ".join(map(str, numbers[:SHOWN_ROWS])), len(numbers) - SHOWN_ROWS
    return f"row{'s' * (len(numbers) > 1)} {shown}{f' and {more} more' * (more > 0)}"


def read_rows(problems: BadRows, fields: Mapping[str, str] = FIELDS) -> Iterator[tuple[int, dict]]:
    """Yield the numbers and the contents of a file's good rows: {"instruction", "input", "output"} or {"messages"}.

    Args:
        problems: names the file: a .json (one list), .jsonl (a row a line) or .csv (with a header) file, or the https
            address of one. It gets what is wrong with the other rows.
        fields: what the file calls instruction, input and output.

    Raises:
        FileNotFoundError, ConnectionError: there is no such file, or it can't be downloaded.
        ValueError: the file is of an unknown kind, no UTF-8, or holds no rows, or none with a field that is mapped.
    """
    source = problems.source
    columns = _columns(fields)
    absent = set(columns.values()) - set(FIELDS) - {None}
    suffix = Path(str(source).split("?")[0]).suffix.lower()
    readers = {".json": _parse_json, ".jsonl": _parse_jsonl, ".csv": _parse_csv}
    if suffix not in readers:
        raise UserError(f"{source}: unknown kind of data file {suffix!r}; choices: {', '.join(readers)}")
    chat, n_good = None, 0
    with _open(source) as file:
        try:
            # Spreadsheets put a byte order mark in front
            text = TextIOWrapper(file, encoding="utf-8-sig", newline="" if suffix == ".csv" else "\n")
            for number, row in enumerate(readers[suffix](text), start=1):
                if isinstance(row, dict):
                    absent -= row.keys()
                    chat = not row.keys().isdisjoint(CHAT_KEYS) if chat is None else chat
                try:
                    if isinstance(row, UserError):
                        raise row
                    row = _check_conversation(row) if chat else _check_instruction(row, columns)
                except UserError as error:
                    problems.rows.append((number, str(error)))
                    continue
                texts = [message["content"] for message in row["messages"]] if chat else row.values()
                if "".join(texts).strip():
                    n_good += 1
                    yield number, row
                else:
                    problems.blank += 1
        except UnicodeDecodeError as error:
            file.seek(0)
            lines = enumerate(file, start=1)
            bad = next(number for number, line in lines if line.decode(errors="replace").encode() != line)
            raise UserError(f"{source} is not UTF-8 text (line {bad}); save it as UTF-8") from error
    if absent and (n_good or problems.blank):
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
            reason = getattr(error, "reason", repr(error))
            raise ConnectionError(
                f"cannot download {source} ({reason}); get the file in another way and give --data_file_path FILE"
            ) from error
    if not Path(source).is_file():
        raise FileNotFoundError(f"{source} is not a file; give --data_file_path a .json, .jsonl or .csv file")
    return Path(source).open("rb")


# ---------------------------------------------------------------------------------------------------- parsing
def _object(pairs: list[tuple[str, Any]]) -> dict | UserError:
    """Return a JSON object, or an error in its place where a key stands twice: so the parser can go on behind it."""
    row = dict(pairs)
    if len(row) == len(pairs):
        return row
    names = [name for name, _ in pairs]
    return UserError(f"the key {next(name for name in row if names.count(name) > 1)!r} stands twice in an object")


# Python converts no integers of 4,300 digits and more
DECODER = json.JSONDecoder(
    object_pairs_hook=_object, parse_int=lambda digits: int(digits) if len(digits) < 4300 else float(digits)
)


def _decode(text: str, problem: str) -> Any:
    """Return what a JSON text holds, or an error in its place."""
    try:
        return DECODER.decode(text)
    except (ValueError, RecursionError) as error:
        return UserError(f"{problem}: {error}")


def _parse_json(file: TextIO) -> Iterator[Any]:
    """Yield the items of a JSON list, holding a part of the text alone; what is no JSON is the last item, an error."""
    text = file.read(CHUNK)
    at = SPACE.match(text).end() + 1
    if text[at - 1 : at] != "[":
        item = _decode(text + file.read(), "is not valid JSON, or cut short")
        if not isinstance(item, UserError):
            item = UserError(f"the file holds a {type(item).__name__}, expected a list of rows")
        hint = "; a file with one row a line is to be named .jsonl" if "Extra data" in str(item) else ""
        yield UserError(f"{item}{hint}")
        return
    while True:
        at = SPACE.match(text, at).end()
        if text[at : at + 1] == "]":
            if (text[at + 1 :] + file.read()).strip():
                yield UserError("the list ends here, but the file goes on; make it one list")
            return
        try:
            item, end = DECODER.raw_decode(text, at)
            end = SPACE.match(text, end).end()
            if text[end : end + 1] not in (",", "]") or end == len(text):
                raise json.JSONDecodeError("Expecting ',' delimiter", text, end)
        except (ValueError, RecursionError) as error:
            more = file.read(max(CHUNK, len(text)))
            if not more:
                yield UserError(f"is not valid JSON, or cut short: {getattr(error, 'msg', error)}")
                return
            text, at = text[at:] + more, 0
        else:
            yield item
            at = end + (text[end] == ",")


def _parse_jsonl(file: TextIO) -> Iterator[Any]:
    for number, line in enumerate(file, start=1):
        if line.strip():
            yield _decode(line, f"line {number} is not valid JSON")


def _parse_csv(file: TextIO) -> Iterator[dict | UserError]:
    csv.field_size_limit(1 << 30)  # the default stops at 131,072 characters
    reader = csv.reader(file, strict=True)
    records = filter(None, reader)
    try:
        header = next(records, [])
        if twice := sorted({name for name in header if name and header.count(name) > 1}):
            yield UserError(f"the header has {' and '.join(map(repr, twice))} twice; give every column its own name")
            return
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
    if texts["input"] is None:
        texts["input"] = ""
    for name, text in texts.items():
        _check_text(columns[name], text)
    return texts


def _refuse(where: str, holder: Mapping, keys: Collection[str], why: str) -> None:
    """Raise ValueError where a row or a message holds something under one of these keys."""
    if found := [key for key in keys if holder.get(key)]:
        raise UserError(f"{where}has {' and '.join(found)}{why}")


def _check_conversation(row: object) -> dict[str, list[dict]]:
    """Return the messages of a row, each with role and content."""
    messages = next((row[key] for key in CHAT_KEYS if key in row), None) if isinstance(row, dict) else None
    if not isinstance(messages, list) or not messages:
        raise UserError("has no messages, expected a list of {role, content}")
    _refuse("the row ", row, TOOL_KEYS, NO_TOOLS)
    messages = [_check_message(f"message {turn}", message) for turn, message in enumerate(messages, start=1)]
    _refuse("", row, CONTEXT_KEYS, NO_CONTEXT)
    return {"messages": messages}


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
    if isinstance(message.get("content"), list):
        message = {**message, "content": "".join([_part_text(where, part) for part in message["content"]])}
    if not isinstance(message.get("content"), str):
        raise UserError(f"{where} has no text under content")
    if message.get("role") not in ROLES:
        raise UserError(f"{where} has the role {message.get('role')!r}, expected {', '.join(ROLES)}")
    for key, value in message.items():
        if key in LEARN_KEYS and value not in (None, 0, 1):
            raise UserError(f"{where} has the {key} {value!r}, expected 0 or 1")
        if isinstance(value, str):
            _check_text(f"{where}, {key}", value)
    return message


def _part_text(where: str, part: object) -> str:
    """Return the text of a part of a message's content."""
    kind = part.get("type") if isinstance(part, dict) else type(part).__name__
    if kind != "text" or not isinstance(part.get("text"), str):
        raise UserError(f"{where} has a part {kind} under content, expected texts alone")
    return part["text"]


def _check_text(name: str, text: object) -> None:
    """Raise ValueError unless it is text that can be written as UTF-8."""
    if not isinstance(text, str):
        raise UserError(f"{name} is a {type(text).__name__}, expected text")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        found = f"U+{ord(text[error.start]):04X} at character {error.start + 1}"
        raise UserError(f"{name} holds half a character ({found}); write it again from the whole text") from error
