"""The house rules a machine can hold: imports one way, nothing forbidden, honest requirements, every script starts."""

import ast
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from helpers import FRONT_ENDS, ROOT, SCRIPTS, SOURCES, load_script, relative_path

from lit_gpt.cli import main

# What is installed under another name than it is imported by.
PACKAGES = {"lm_eval": "lm-eval"}
PACKAGES |= dict.fromkeys(("yaml", "docstring_parser"), "jsonargparse")  # which always brings them
OPTIONAL = {"bitsandbytes", "peft", "tensorboard", "transformers", "triton", "wandb"}  # a line says where they miss
FORBIDDEN = {
    r"\bos\.system\(": "os.system hides failures: subprocess or shutil",
    r"except\s*:": "a bare except hides bugs",
    r"torch\.load\((?![^)]*weights_only=True)": "torch.load without weights_only=True runs code from the file",
    r"load_state_dict\([^)]*strict\s*=\s*False": "a lenient load_state_dict hides missing weights",
    r"^\s*global \w": "global state",
    r"pickle\.load": "pickle runs code from the file",
    r"\bos\.symlink\(|symlink_to\(": "folders are copied, never linked",
    r"\b(TODO|FIXME)\b": "do it or drop it",
}


def imported(path: Path) -> set[str]:
    """The top-level names of all modules that a file imports, wherever the import stands."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            names.add(node.module.split(".")[0])
    return names


def required(file: str) -> set[str]:
    """The packages that a requirements file lists."""
    lines = (ROOT / file).read_text(encoding="utf-8").splitlines()
    return {re.match(r"[\w-]+", line).group() for line in lines if line and not line.startswith("#")}


def test_imports_flow_one_way():
    for path in SOURCES:
        own = path.relative_to(ROOT).parts[0]
        sideways = imported(path) & ({*FRONT_ENDS, "tests"} - {own})
        assert not sideways, f"{relative_path(path)} imports from {sorted(sideways)}"


def test_requirements_are_exactly_what_is_imported():
    outside = set().union(*(imported(p) for p in SOURCES)) - set(sys.stdlib_module_names)
    outside -= {"lit_gpt", *FRONT_ENDS} | OPTIONAL
    assert {PACKAGES.get(name, name) for name in outside} == required("requirements.txt")


def test_every_requirement_gives_its_reason():
    lines = (ROOT / "requirements.txt").read_text(encoding="utf-8").splitlines()
    assert all(re.fullmatch(r"\S+\s+# \S.+", line) for line in lines)


def test_what_the_tests_import_is_listed():
    used = set().union(*(imported(p) for p in (ROOT / "tests").glob("*.py"))) - set(sys.stdlib_module_names)
    used -= {"lit_gpt", *FRONT_ENDS, *(p.stem for p in (ROOT / "tests").glob("*.py"))} | OPTIONAL
    listed = required("requirements.txt") | required("tests/requirements.txt")
    brought = {"datasets"}  # lm-eval brings it
    assert {PACKAGES.get(name, name) for name in used} <= listed | brought


def test_tests_share_through_helpers_alone():
    for path in (ROOT / "tests").glob("*.py"):
        shared = {name for name in imported(path) if name == "conftest" or name.startswith("test_")}
        assert not shared, f"{relative_path(path)} imports from {sorted(shared)}"


@pytest.mark.parametrize("path", SOURCES, ids=relative_path)
def test_source_has_a_docstring_and_nothing_forbidden(path):
    text = path.read_text(encoding="utf-8")
    assert ast.get_docstring(ast.parse(text)), "no file docstring"
    for pattern, reason in FORBIDDEN.items():
        match = re.search(pattern, text, re.M)
        assert not match, f"{match.group()!r}: {reason}"


@pytest.mark.parametrize("path", SCRIPTS, ids=relative_path)
def test_script_has_a_setup_and_explains_every_flag(path, capsys):
    """Help comes from docstrings: a flag without a sentence is a flag that nobody can use."""
    with pytest.raises(SystemExit) as end:
        main(load_script(path).setup, ["--help"])
    assert end.value.code == 0
    text = capsys.readouterr().out
    bare = re.findall(r"^  (--[\w.]+)(?: \S+)*\n +\((?:required|type|default)", text, re.M)
    assert not bare, f"no help for {bare}"


@pytest.mark.parametrize("script", ["finetune/ether.py", "scripts/merge_ether.py", "eval/lm_eval_harness.py"])
def test_script_starts_from_any_folder_without_pythonpath(script, tmp_path):
    """And without what would make every start take three times as long: PyTorch's compiler, and Lightning."""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    command = [sys.executable, "-X", "importtime", str(ROOT / script), "--help"]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    imported = {line.rpartition("|")[2].strip() for line in done.stderr.splitlines()}
    assert "torch" in imported and not imported & {"torch._dynamo", "lightning", "transformers"}
    assert "--checkpoint_dir" in done.stdout or "--io.checkpoint_dir" in done.stdout


SHELL = [path for folder in ("scripts", "tests") for path in sorted((ROOT / folder).glob("*.sh"))]


@pytest.mark.parametrize("script", [*map(relative_path, SHELL), ".ci/run"])
def test_shell_script_parses(script):
    assert subprocess.run(["bash", "-n", str(ROOT / script)]).returncode == 0


@pytest.fixture
def bare_machine(tmp_path):
    """A copy of the shell scripts and a PATH on which `python3` is what the test makes it; returns a function."""
    (tmp_path / "scripts").mkdir()
    (tmp_path / "bin").mkdir()
    for name in ("environment.sh", "test.sh"):
        shutil.copy(ROOT / "scripts" / name, tmp_path / "scripts")
    (tmp_path / "bin" / "dirname").symlink_to(shutil.which("dirname"))

    def test_command(python3: str) -> subprocess.CompletedProcess:
        fake = tmp_path / "bin" / "python3"
        fake.write_text(f"#!{shutil.which('bash')}\n{python3}\n")
        fake.chmod(0o755)
        command = [shutil.which("bash"), str(tmp_path / "scripts" / "test.sh")]
        return subprocess.run(command, env={"PATH": str(tmp_path / "bin")}, capture_output=True, text=True)

    return test_command


def test_old_python_is_refused_in_one_line(bare_machine):
    done = bare_machine('[ "$1" = --version ] && echo "Python 3.8.1" && exit 0; exit 1')
    assert done.returncode != 0
    assert "no Python 3.10 or newer found (python3 is Python 3.8.1)" in done.stderr
    assert len(done.stderr.splitlines()) == 1


@pytest.fixture
def installing(tmp_path):
    """The shell's two functions with a `python` that installs nothing and says what it was asked; what they print."""
    (tmp_path / "scripts").mkdir()
    shutil.copy(ROOT / "scripts" / "environment.sh", tmp_path / "scripts")
    (tmp_path / "requirements.txt").touch()
    fake = tmp_path / "env" / "bin" / "python"
    fake.parent.mkdir(parents=True)
    fake.write_text(
        '#!/bin/bash\ncase "$*" in *find_spec*) exit 1 ;; *ether-installed*) echo "$FAKE/stamp" ;; '
        '*urlopen*) exit "${CPU_INDEX_IS_DOWN:-0}" ;; *"pip install"*) echo "PIP $*" ;; '
        '*-m\\ venv*) mkdir -p "${@: -1}/bin"; ln -sf "$FAKE/env/bin/python" "${@: -1}/bin/python" ;; '
        '*version_info*) [ ! -e "$(dirname "$0")/old" ] ;; esac\n'
    )
    fake.chmod(0o755)

    def install(**environment: str) -> subprocess.CompletedProcess:
        code = '. scripts/environment.sh; use_environment; echo "PYTHON=$PYTHON"; install requirements.txt'
        environment = {"PATH": "/usr/bin:/bin", "FAKE": str(tmp_path), "PYTHON": str(fake)} | environment
        return subprocess.run(["bash", "-euc", code], cwd=tmp_path, env=environment, capture_output=True, text=True)

    return install


def test_condas_base_environment_is_left_alone(installing, tmp_path):
    own, venv = tmp_path / "env", tmp_path / ".venv"
    for environment, expected in (
        ({"CONDA_PREFIX": own, "CONDA_DEFAULT_ENV": "mine"}, own),
        ({"CONDA_PREFIX": own, "CONDA_DEFAULT_ENV": "base"}, venv),
        ({"CONDA_PREFIX": own, "CONDA_DEFAULT_ENV": "base", "VIRTUAL_ENV": own}, own),
        ({}, venv),
    ):
        done = installing(**{name: str(value) for name, value in environment.items()})
        assert f"PYTHON={expected}/bin/python" in done.stdout, done.stdout + done.stderr
    (own / "condabin").mkdir()  # base by another name
    assert f"PYTHON={venv}/bin/python" in installing(CONDA_PREFIX=str(own)).stdout


def test_a_virtual_environment_that_was_not_made_here_is_not_cleared(installing, tmp_path):
    """One without pip, as uv makes them, was emptied; half an environment of ours is made anew."""
    (tmp_path / ".venv" / "lib").mkdir(parents=True)
    done = installing()
    assert done.returncode and "was not made here: activate it, or move it away" in done.stderr
    assert (tmp_path / ".venv" / "lib").is_dir()
    (tmp_path / ".venv" / ".ether-made").touch()
    assert installing().returncode == 0 and not (tmp_path / ".venv" / "lib").exists()


@pytest.mark.skipif(sys.platform != "linux" or shutil.which("nvidia-smi") is not None, reason="needs Linux without GPU")
def test_without_an_nvidia_card_torch_comes_without_cuda(installing):
    asked = installing().stdout
    assert re.search(r"PIP .*torch==\S+ --index-url https://download.pytorch.org/whl/cpu\n", asked), asked


@pytest.mark.skipif(sys.platform != "linux" or shutil.which("nvidia-smi") is not None, reason="needs Linux without GPU")
def test_where_the_cpu_index_is_down_the_size_is_said_first(installing):
    asked = installing(CPU_INDEX_IS_DOWN="1").stdout
    assert re.search(r"may bring 3 GB of CUDA.*PIP .*torch==\S+\n", asked, re.DOTALL), asked
    assert "--index-url" not in asked


def test_a_character_that_the_output_lacks_ends_nothing(tmp_path):
    """In latin-1, printing a row with curly quotes ended the script with an error after its work."""
    code = "from lit_gpt.cli import main\ndef setup(*, text: str = 'x'):\n    'Print.'\n    print('“😀” é', text)\n"
    code += "    raise OSError('“no”')\nmain(setup)"
    environment = {**os.environ, "PYTHONIOENCODING": "latin-1"}
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=environment, capture_output=True)
    assert (done.returncode, done.stdout) == (1, "??? é x\n".encode("latin-1")), done.stderr
    assert done.stderr == b"error: ?no?\n"


def test_missing_ensurepip_is_told_in_one_line(bare_machine):
    done = bare_machine('case "$*" in *ensurepip*) exit 1 ;; *) exit 0 ;; esac')
    assert done.returncode != 0
    assert "no ensurepip" in done.stderr and "apt install python3-venv" in done.stderr
    assert len(done.stderr.splitlines()) == 1
