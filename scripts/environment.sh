# Sourced by quickstart.sh, test.sh and .ci/run: finds or makes the Python environment and installs into it.
#
#   use_environment         sets PYTHON: that of the active virtual environment (venv or conda), else of .venv, made here
#   install FILE [FILE...]  installs torch where there is none, then the requirements files; says nothing to do when done before
#
# A stamp in the environment holds a hash of the requirements, so that a second call costs nothing.

REPO="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
cd "$REPO"

TORCH="torch==2.13.0" # only where no torch is installed: a CUDA build of one's own stays

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
    local active="${VIRTUAL_ENV:-${CONDA_PREFIX:-}}" base
    if [ -n "$active" ]; then
        PYTHON="$active/bin/python"
        is_new_enough "$PYTHON" || fail "the active environment $active has no Python 3.10 or newer; deactivate it or make a newer one"
        say "Environment: $active (active)"
    else
        PYTHON="$REPO/.venv/bin/python"
        # An interrupted first call can leave half an environment: make it anew.
        if ! { is_new_enough "$PYTHON" && "$PYTHON" -m pip --version >/dev/null 2>&1; }; then
            base="$(find_python)" || exit 1
            "$base" -c 'import ensurepip, venv' >/dev/null 2>&1 ||
                fail "$base cannot make a virtual environment (no ensurepip); on Debian or Ubuntu: apt install python3-venv"
            say "Environment: making .venv with $("$base" --version)"
            "$base" -m venv --clear "$REPO/.venv"
        else
            say "Environment: .venv ($("$PYTHON" --version))"
        fi
    fi
    "$PYTHON" -m pip --version >/dev/null 2>&1 || fail "$PYTHON has no pip; give it one: $PYTHON -m ensurepip --upgrade"
    export PYTHON
}

pip_install() {
    echo "\$ python -m pip install $*"
    PIP_ROOT_USER_ACTION=ignore "$PYTHON" -m pip install -qq --no-input --disable-pip-version-check "$@" ||
        fail "pip could not install $* (its reason is above); the same command again goes on from here"
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
        pip_install "$TORCH"
    fi
    for file in "$@"; do pip_install -r "$file"; done
    : >"$stamp"
}
