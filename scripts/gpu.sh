#!/usr/bin/env bash
# What this repository does on a GPU, checked and measured: bash scripts/gpu.sh [--short] [--parts abc] [--minutes N]
#
# Bandwidth, exactness against fp64, kernels, training steps of Llama-2-7B, PEFT beside us, training as a user would,
# generation, evaluation. At most eight minutes; nothing is downloaded, weights are random. Results in logs/gpu.
# Takes $PYTHON, the active environment, or a python3 that has torch; makes .venv only where there is none of these.
# --short, and a machine without a GPU: the same code on tiny sizes (what CI runs).
set -euo pipefail
PYTHON_GIVEN="${PYTHON:-}"
. "$(dirname "${BASH_SOURCE[0]}")/environment.sh"

has_torch() { [ -n "$1" ] && "$1" -c 'import lightning, torch' >/dev/null 2>&1; }

ACTIVE="${VIRTUAL_ENV:-${CONDA_PREFIX:-}}"
for PYTHON in "$PYTHON_GIVEN" "${ACTIVE:+$ACTIVE/bin/python}" "$REPO/.venv/bin/python" python3; do
    if has_torch "$PYTHON"; then break; fi
    PYTHON=
done
if [ -z "$PYTHON" ]; then
    use_environment
    install requirements.txt tests/requirements.txt
fi
say "$PYTHON eval/gpu_report.py $*"
exec "$PYTHON" eval/gpu_report.py "$@"
