"""The one command line: every script hands its ``setup`` function to ``main``.

Flags, their types, defaults and help come from the function's signature and the dataclasses in it, through
jsonargparse; ``--config file.yaml``, ``--print_config`` and ``--help`` work everywhere. A user's mistake ends in one
line on stderr and a non-zero exit; ``--debug`` shows the traceback, which our own bugs (any other exception) always do.
"""

import inspect
import io
import os
import sys
import traceback
import warnings
from collections.abc import Callable, Sequence
from dataclasses import Field, fields
from difflib import get_close_matches

import docstring_parser
from jsonargparse import ArgumentError, ArgumentParser, set_parsing_settings
from jsonargparse.typing import SecretStr as Secret

from lit_gpt.errors import UserError, out_of_memory

__all__ = ["Secret", "build_parser", "main"]

GIVEN = "given"
"""The argument of a ``setup`` that no flag sets: the names of the flags on the command line, defaults or not.

Those of a --config file are not among them: --print_config writes all flags, whether they are meant or not."""
ADAPTER = "adapter"
"""The argument of a ``setup`` that is an adapter's config, whose fields become flags without a group."""
CONFIG_HELP = "A YAML file with any of the flags below; a flag on the command line wins, wherever it stands."

WRITTEN = dict.fromkeys(("list", "tuple"), 'a list, even of one, is written "[a, b]"') | {
    "dict": 'names are given as "{name: value, name: value}"'
}
"""The ways to write what a flag takes, by the type that jsonargparse names where it is something else."""

set_parsing_settings(docstring_parse_attribute_docstrings=True)


def build_parser(setup: Callable) -> ArgumentParser:
    """Return the parser of a script.

    Args:
        setup: the script's function; its keyword arguments become flags, dataclass arguments become groups.
    """
    summary = (setup.__doc__ or "").strip().split("\n")[0]
    # No abbreviations: --train.learning_rat would pass today and mean something else once a flag is added.
    parser = ArgumentParser(description=summary, exit_on_error=False, allow_abbrev=False)
    parser.add_argument("--config", action="config", help=CONFIG_HELP)
    parser.add_argument("--debug", action="store_true", help="Show the traceback of an error.")
    for flag, (field, explained) in adapter_flags(setup).items():
        parser.add_argument(f"--{flag}", type=field.type, default=field.default, help=explained)
    parser.add_function_arguments(setup, as_group=False, skip={GIVEN, ADAPTER})
    return parser


def adapter_flags(setup: Callable) -> dict[str, tuple[Field, str]]:
    """Return the fields of a setup's adapter config, with their docstrings, by the names of their flags."""
    config_class = inspect.get_annotations(setup).get(ADAPTER)
    if config_class is None:
        return {}
    documented = map(docstring_parser.parse_from_object, config_class.__mro__[:-1])  # the last one is object
    helps = {param.arg_name: param.description for docstring in documented for param in docstring.params}
    return {config_class.flag(field.name): (field, helps[field.name]) for field in fields(config_class)}


def gather_adapter(setup: Callable, values: dict) -> dict:
    """Return the arguments of a setup, those of its adapter's flags as the config that it takes."""
    flags = adapter_flags(setup)
    chosen = {field.name: values.pop(flag) for flag, (field, _) in flags.items()}
    return values | {ADAPTER: inspect.get_annotations(setup)[ADAPTER](**chosen)} if flags else values


def main(setup: Callable, args: Sequence[str] | None = None) -> None:
    """Parse the command line, call ``setup``, and exit with one line where a person can cure what went wrong.

    Args:
        setup: the script's function.
        args: the command line, ``sys.argv[1:]`` by default.

    Raises:
        SystemExit: 1 after a user's error or a bug of ours, 2 after a mistake on the command line.
    """
    args = config_first(sys.argv[1:] if args is None else args)
    parser = build_parser(setup)
    quiet_libraries()
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")  # a terminal that lacks a character shows "?"
    try:
        parsed = parser.parse_args(args)
        parser.validate(parsed, skip_unset=False)  # a --config may say null where the type has none
        values = parser.instantiate(parsed).as_dict()
    except (ArgumentError, OSError, TypeError, ValueError, RecursionError) as error:  # the others: of a --config
        written = "".join(f"{text}; " for sign, text in WRITTEN.items() if f"Expected a <class '{sign}'>" in str(error))
        fail(f"{one_line(error)} ({written}{meant_flags(parser, args)}--help lists the flags)", code=2)
    debug = values.pop("debug")
    values.pop("config")
    if GIVEN in inspect.signature(setup).parameters:
        values[GIVEN] = frozenset(arg[2:].split("=")[0] for arg in args if arg.startswith("--"))
    try:
        setup(**gather_adapter(setup, values))
    except KeyboardInterrupt:
        fail("interrupted", code=130)
    except BrokenPipeError:
        # The reader of our output has gone (`... | head`): nothing is wrong, and there is no one left to tell.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except Exception as error:
        if debug:
            raise
        # A person can cure a wrong setting or file, a fault of the system, and a missing package, unless it is ours.
        ours = isinstance(error, ImportError) and (error.name or "").startswith("lit_gpt")
        if isinstance(error, UserError | OSError | ImportError) and not ours:
            fail(one_line(error), code=1)
        if out_of_memory(error):
            fail(f"out of memory: something smaller may fit ({one_line(error)[:200]})", code=1)
        traceback.print_exc()
        fail("a bug of ours, not a mistake of yours: please report the lines above and the command", code=1)


def config_first(args: Sequence[str]) -> list[str]:
    """Return the arguments with each --config moved to the front: what comes later wins, and flags must."""

    def is_other(pair: tuple[str, str]) -> bool:
        return "--config" not in pair and not pair[1].startswith("--config=")

    pairs = zip(["", *args], args, strict=False)  # each word with the one before it, which may be --config
    return [word for _, word in sorted(pairs, key=is_other)]


def meant_flags(parser: ArgumentParser, args: Sequence[str]) -> str:
    """Return a question for each flag that the parser does not have: the one of the same last word, or the nearest."""
    known, found = list(parser._option_string_actions), []
    for flag in (arg.split("=")[0] for arg in args if arg.startswith("--")):
        if flag not in known:
            same = [name for name in known if name.endswith((f".{flag[2:]}", f"_{flag[2:]}"))]
            found += (same or get_close_matches(flag, known, n=1))[:1]
    return f"did you mean {', '.join(found)}? " if found else ""


def fail(message: str, *, code: int) -> None:
    """Print ``message`` as the one line that explains the end, and exit with ``code``."""
    print(f"error: {message}", file=sys.stderr)
    raise SystemExit(code)


def one_line(error: BaseException) -> str:
    """Return the text of an error on one line; its type where it has no text."""
    return " ".join(str(error).split()) or type(error).__name__


def quiet_libraries() -> None:
    """Drop a library's advice that no one here can act on; other warnings are one line."""
    warnings.filterwarnings("ignore", message=".*isinstance.*LeafSpec.*")
    warnings.formatwarning = lambda message, *_, **__: f"warning: {one_line(message)}\n"
