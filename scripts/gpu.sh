#!/usr/bin/env bash
# The GPU report: bash scripts/gpu.sh [--short] [--parts PART ...] [--minutes 8] [--out_dir DIR]
#
# Checks and measures in at most eight minutes what a GPU does here: bandwidth, training as a user would, training steps
# of Llama-2-7B, PEFT beside us, kernels, exactness against fp64 (with pytest). Weights are random, nothing is downloaded.
# Takes $PYTHON, the active environment, .venv or python3, the first that has torch and lightning, as it is; only where
# none has does it make an environment and install.
# Results go to a new folder under logs/gpu, named for the time. --short, and a machine without a GPU: the same code on
# tiny sizes (what CI runs).
set -euo pipefail
GIVEN="${PYTHON:-}"
. "$(dirname "${BASH_SOURCE[0]}")/environment.sh"

can_report() {
    "$1" -c 'import sys; from importlib.util import find_spec as find; sys.exit(not (find("torch") and find("lightning")))'
}

ACTIVE="${VIRTUAL_ENV:-${CONDA_PREFIX:-}}"
for PYTHON in "$GIVEN" "${ACTIVE:+$ACTIVE/bin/python}" "$REPO/.venv/bin/python" python3 ""; do
    if [ -n "$PYTHON" ] && can_report "$PYTHON" 2>/dev/null; then break; fi
done
if [ -z "$PYTHON" ]; then
    use_environment
    install requirements.txt tests/requirements.txt
fi
say "$PYTHON eval/gpu_report.py $*"
exec "$PYTHON" eval/gpu_report.py "$@"
