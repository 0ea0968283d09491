"""Tell what the person at the command line can cure from bugs of ours, and print commands that a shell takes as meant.

A module at the bottom of the import order: everything may import it, and it imports nothing of ours.
"""

import shlex
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]


class UserError(ValueError):
    """A mistake in what was given, which whoever gave it can mend: ``cli`` shows its text in one line.

    Any other ``ValueError`` is a bug of ours, which keeps its traceback.
    """


class Problems(list[str]):
    """Problems with the settings of a command, gathered so that one error names all of it."""

    def expect(self, holds: bool, problem: str) -> None:
        """Note a problem where what is expected does not hold."""
        if not holds:
            self.append(problem)

    def attempt(self, function: Callable[..., Any], *args: Any, **options: Any) -> Any:
        """Return the function's result, or note its user's error and return None."""
        try:
            return function(*args, **options)
        except (UserError, OSError) as error:
            self.append(str(error))
            return None

    def check(self) -> None:
        """Raise one UserError with every problem, each once; do nothing where there are none."""
        if self:
            raise UserError("; ".join(dict.fromkeys(self)))


def command(script: str, **flags: Any) -> str:
    """Return the command that runs a script from the current folder, quoted for a shell where a path needs it.

    Args:
        script: its path in this repository, which stays as short as that where the folder is the repository.
        flags: of the script, with their values.
    """
    script = script if Path.cwd() == ROOT else str(ROOT / script)
    words = [word for name, value in flags.items() for word in (f"--{name}", str(value))]
    return shlex.join(["python", script, *words])


@contextmanager
def reading(path: Path | str, remedy: str = "get it, or make it, again") -> Iterator[None]:
    """Turn whatever Python stumbles on inside, in a file of another shape than expected, into an error that names it.

    The error ends in the remedy.

    For code that reads and nothing else: a bug of ours inside would be taken for the file's. --debug shows the place.
    """
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        expected = (ArithmeticError, AttributeError, LookupError, RuntimeError, TypeError, ValueError)
        # The last two: the tokenizers library raises nothing more precise, and safetensors need not be there.
        if not (isinstance(error, expected) or type(error).__name__ in ("Exception", "SafetensorError")):
            raise
        reason = f"{type(error).__name__}: {' '.join(str(error).split())[:160]}"
        raise UserError(f"{path} does not hold what it should ({reason}); {remedy}") from error


def out_of_memory(error: BaseException) -> bool:
    """Return True where an error says that memory ran out: Python's and NumPy's, a GPU's, PyTorch's on a CPU."""
    return (
        isinstance(error, MemoryError)
        or type(error).__name__ == "OutOfMemoryError"
        or "can't allocate memory" in str(error)
    )
