#!/usr/bin/env bash
# Runs every test: bash scripts/test.sh [arguments of pytest]
# Makes .venv and installs what the tests need unless a virtual environment is active; needs no GPU, no model hub and
# no network but the package index.
set -euo pipefail
. "$(dirname "${BASH_SOURCE[0]}")/environment.sh"

use_environment
install requirements.txt tests/requirements.txt
export HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false MPLBACKEND=Agg
say "python -m pytest -q $*"
exec "$PYTHON" -m pytest -q "$@"
