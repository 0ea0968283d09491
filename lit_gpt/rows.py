"""Rows of instruction data, read from JSON, JSONL or CSV and checked.

A row is {"instruction", "input", "output"}, or {"messages"}: a conversation of system, user and assistant. A file
holds rows of one kind. What is wrong is told with the file and the rows' numbers, counted from 1.
"""

import csv
import http.client
import io
import json
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping
from pathlib import Path

FIELDS = {"instruction": "instruction", "input": "input", "output": "output"}
"""What a file calls the three texts of a row, where nobody says otherwise."""
ROLES = ("system", "user", "assistant")
SHOWN_PROBLEMS = 3


def read_rows(source: Path | str, fields: Mapping[str, str] = FIELDS) -> list[dict]:
    """The checked rows of a file: all {"instruction", "input", "output"}, or all {"messages"}.

    Args:
        source: a .json (one list), .jsonl (a row a line) or .csv (with a header) file, or the https address of one.
        fields: what the file calls instruction, input and output.

    Raises:
        FileNotFoundError, ConnectionError: there is no such file, or it can't be downloaded.
        ValueError: the file can't be parsed, is empty, or has bad rows; the message names the file and the rows.
    """
    if unknown := fields.keys() - FIELDS.keys():
        raise ValueError(f"--fields names {', '.join(sorted(unknown))}; it maps {', '.join(FIELDS)} to a file's names")
    fields = FIELDS | dict(fields)
    suffix = Path(str(source).split("?")[0]).suffix.lower()
    readers = {".json": _parse_json, ".jsonl": _parse_jsonl, ".csv": _parse_csv}
    if suffix not in readers:
        raise ValueError(f"{source}: unknown kind of data file {suffix!r}; choices: {', '.join(readers)}")
    raw = list(readers[suffix](_read_text(source), source))
    if not raw:
        raise ValueError(f"{source} holds no rows")
    chat = isinstance(raw[0], dict) and "messages" in raw[0]
    rows, problems = [], []
    for number, row in enumerate(raw, start=1):
        try:
            rows.append(_check_messages(row) if chat else _check_instruction(row, fields))
        except ValueError as error:
            problems.append(f"row {number}: {error}")
    if problems:
        more = len(problems) - SHOWN_PROBLEMS
        shown = problems[:SHOWN_PROBLEMS] + [f"and {more} more rows like these"] * (more > 0)
        raise ValueError(f"{source}, {'; '.join(shown)}")
    return rows


def _read_text(source: Path | str) -> str:
    """The text of a local file or an https address."""
    if str(source).startswith("https://"):
        try:
            with urllib.request.urlopen(str(source), timeout=60) as reply:
                data = reply.read()
        except (urllib.error.URLError, http.client.HTTPException, TimeoutError, ConnectionError) as error:
            reason = getattr(error, "reason", repr(error))
            raise ConnectionError(
                f"cannot download {source} ({reason}); get the file in another way and give --data_file_path FILE"
            ) from error
    elif Path(source).is_file():
        data = Path(source).read_bytes()
    else:
        raise FileNotFoundError(f"{source} is not a file; give --data_file_path a .json, .jsonl or .csv file")
    try:
        return data.decode("utf-8-sig")  # spreadsheets put a byte order mark in front
    except UnicodeDecodeError as error:
        row = data[: error.start].count(b"\n") + 1
        raise ValueError(f"{source} is not UTF-8 text (line {row}); save it as UTF-8") from error


def _parse_json(text: str, source: Path | str) -> list:
    try:
        rows = json.loads(text)
    except json.JSONDecodeError as error:
        hint = "; a file with one row a line is to be named .jsonl" if error.msg == "Extra data" else ""
        raise ValueError(f"{source} is not valid JSON, or cut short: {error}{hint}") from error
    if not isinstance(rows, list):
        raise ValueError(f"{source} holds a {type(rows).__name__}, expected a list of rows")
    return rows


def _parse_jsonl(text: str, source: Path | str) -> Iterator:
    for number, line in enumerate(text.split("\n"), start=1):
        try:
            if line.strip():
                yield json.loads(line)
        except json.JSONDecodeError as error:
            raise ValueError(f"{source}, line {number} is not valid JSON: {error}") from error


def _parse_csv(text: str, source: Path | str) -> list[dict]:
    csv.field_size_limit(max(csv.field_size_limit(), len(text) + 1))  # the default stops at 131,072 characters
    rows: list[dict] = []
    try:
        for row in csv.DictReader(io.StringIO(text, newline=""), strict=True):
            rows.append({key: value for key, value in row.items() if value is not None})
    except csv.Error as error:
        raise ValueError(f"{source}, row {len(rows) + 1} is not valid CSV: {error}") from error
    return rows


def _check_instruction(row: object, fields: Mapping[str, str]) -> dict[str, str]:
    """The three texts of a row; the input may be missing or null, the output may be empty."""
    if not isinstance(row, dict):
        raise ValueError(f"is a {type(row).__name__}, expected an object with {', '.join(fields.values())}")
    needed = (fields["instruction"], fields["output"])
    if missing := [name for name in needed if name not in row]:
        raise ValueError(f"has no {' and no '.join(missing)} (it has {', '.join(map(str, row)) or 'nothing'})")
    texts = {name: row.get(key) for name, key in fields.items()}
    if texts["input"] is None:
        texts["input"] = ""
    for name, text in texts.items():
        if not isinstance(text, str):
            raise ValueError(f"{fields[name]} is a {type(text).__name__}, expected text")
    return texts


def _check_messages(row: object) -> dict[str, list]:
    """The conversation of a row."""
    messages = row.get("messages") if isinstance(row, dict) else None
    if not isinstance(messages, list) or not messages:
        raise ValueError("has no messages, expected a list of {role, content}")
    for turn, message in enumerate(messages, start=1):
        if not isinstance(message, dict) or not isinstance(message.get("content"), str):
            raise ValueError(f"message {turn} has no text under content")
        if message.get("role") not in ROLES:
            raise ValueError(f"message {turn} has the role {message.get('role')!r}, expected {', '.join(ROLES)}")
    return {"messages": messages}
