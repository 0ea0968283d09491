"""The README tells the truth: its commands name scripts and flags that exist, its tree every file and no other."""

import re
import shlex
from functools import cache

import pytest
from helpers import ROOT, SCRIPTS, load_script

from lit_gpt.cli import build_parser

README = (ROOT / "README.md").read_text(encoding="utf-8")
FOLDERS = ("lit_gpt", "finetune", "scripts", "chat", "eval")
OWN_COMMANDS = ("conda", "pip", "grep", "python", "bash")


def commands() -> list[list[str]]:
    """Every command of the README's bash blocks, as words: comments dropped, lines joined, pipes and && split."""
    blocks = re.findall(r"^```bash\n(.*?)^```", README, re.M | re.S)
    lines = "\n".join(blocks).replace("\\\n", " ").splitlines()
    found = []
    for line in lines:
        words = [word.replace("\0", "<") for word in shlex.split(line.replace("<", "\0"), comments=True)]
        while words:
            end = next((i for i, word in enumerate(words) if word in ("|", "&&")), len(words))
            command = words[:end]
            if command[0] == "torchrun":  # its own flags, then a script as behind python
                script = next(i for i, word in enumerate(command) if word.endswith(".py"))
                command = ["python", *command[script:]]
            found.append(command)
            words = words[end + 1 :]
    return [words for words in found if words]


@cache
def flags_of(script: str) -> frozenset[str]:
    """The flags of a script, from the parser that it hands to cli.main."""
    actions = build_parser(load_script(ROOT / script).setup)._actions
    return frozenset(flag for action in actions for flag in action.option_strings)


def tree() -> set[str]:
    """The paths of the table of files; one without a folder is in the folder of the one before it."""
    table, paths = README.partition("\n## Files\n")[2].partition("\n\n`tests/`")[0], set()
    for path in re.findall(r"`([^`]+)`", table):
        folder = path.partition("/")[0] if "/" in path[:-1] else folder
        paths.add(path if "/" in path[:-1] else f"{folder}/{path}")
    return paths


def test_readme_has_the_commands_of_the_whole_pipeline():
    scripts = {words[1] for words in commands() if words[0] == "python"}
    assert {"scripts/download.py", "finetune/ether.py", "scripts/merge_ether.py", "chat/base.py"} <= scripts
    assert {words[0] for words in commands()} <= set(OWN_COMMANDS)


@pytest.mark.parametrize("words", [w for w in commands() if w[0] in ("python", "bash", "pip")], ids=" ".join)
def test_readme_command_names_files_and_flags_that_exist(words):
    program, target, *arguments = words
    if program == "pip":
        assert (target, arguments[0]) == ("install", "-r")
        target, arguments = arguments[1], []
    assert (ROOT / target).is_file(), f"{target} does not exist"
    given = {word.split("=")[0] for word in arguments if word.startswith("--")}
    known = flags_of(target) if program == "python" else set(re.findall(r"--\w[\w-]*", (ROOT / target).read_text()))
    assert given <= known, f"{target} does not know {sorted(given - known)}"


def test_readme_option_table_names_flags_that_exist():
    """`--ether_query`, `_key` stands for --ether_query and --ether_key."""
    flags = set()
    for row in re.findall(r"^\| (`--.*?) \|", README, re.M):
        names = [name.split()[0] for name in re.findall(r"`([^`]+)`", row)]
        flags |= {name if name.startswith("--") else "--ether" + name for name in names}
    assert len(flags) > 15
    assert flags <= flags_of("finetune/ether.py"), sorted(flags - flags_of("finetune/ether.py"))


def test_every_flag_in_the_readme_belongs_to_a_script():
    outside = {"--repo-type", "--short"}
    known = set().union(*(flags_of(str(path.relative_to(ROOT))) for path in SCRIPTS))
    prose = set(re.findall(r"`(--[\w.]*\w)", README))
    assert prose <= known | outside, sorted(prose - known - outside)


def test_readme_tree_and_files_agree():
    written = tree()
    missing = sorted(path for path in written if not (ROOT / path).exists())
    assert not missing, f"in the tree, but not there: {missing}"
    there = {str(p.relative_to(ROOT)) for f in FOLDERS for kind in ("*.py", "*.sh") for p in (ROOT / f).glob(kind)}
    assert not there - written, f"not in the README's tree: {sorted(there - written)}"


def test_readme_links_and_pictures_exist():
    for target in re.findall(r"\]\((?!https?://|#)([^)]+)\)", README):
        assert (ROOT / target).exists(), target
