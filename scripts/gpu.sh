#!/usr/bin/env bash
# The GPU report: bash scripts/gpu.sh [--short] [--parts kernels steps training exactness] [--minutes 8] [--out_dir DIR]
#
# Checks and measures in at most eight minutes what a GPU does here, with commands that anybody could type, the most
# important first: bandwidth and kernels, training steps of Llama-2-7B, PEFT beside us, training as a user would,
# exactness against fp64. Each is a process of its own with a time limit: one that fails, hangs, lacks a package or
# leaves the GPU in a bad state costs no other. What it prints goes to DIR/NAME.txt as it comes, its files to DIR/NAME;
# DIR/report.txt has a line for each. Weights are random, nothing is downloaded. --short, and a machine without a GPU:
# tiny sizes, and not all of the steps (what CI runs).
#
# Takes $PYTHON, the active environment, .venv or python3, the first that has torch and lightning, as it is (most steps
# need jsonargparse too, exactness pytest); only where none has does it make an environment and install. DIR is a new
# folder under logs/gpu, named for the time.
set -euo pipefail
GIVEN="${PYTHON:-}"
. "$(dirname "${BASH_SOURCE[0]}")/environment.sh"

SHORT=false MINUTES=8 PARTS="kernels steps training exactness" OUT=logs/gpu/$(date +%Y%m%d-%H%M%S)
while [ $# -gt 0 ]; do
    case "$1" in
    --short) SHORT=true ;;
    --minutes) MINUTES="${2:-}" && shift ;;
    --out_dir) OUT="${2:-}" && shift ;;
    --parts)
        PARTS=
        while [[ "${2:---}" != --* ]]; do
            case "$2" in kernels | steps | training | exactness) PARTS+=" $2" && shift ;; *) fail "no part $2 of the report" ;; esac
        done
        ;;
    *) fail "unknown argument $1; known: --short, --parts, --minutes, --out_dir" ;;
    esac
    shift
done
[[ "$MINUTES" =~ ^[0-9]+$ ]] || fail "--minutes takes a whole number"
[ ! -e "$OUT/report.txt" ] || fail "$OUT holds a report, perhaps of another card: choose another --out_dir"

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

SCRATCH="$(mktemp -d)"
trap 'rm -rf "$SCRATCH"' EXIT
trap 'kill "$STEP" 2>/dev/null || true; wait; exit 143' INT TERM # `timeout` hands it on to all that the step has started
mkdir -p "$OUT"
: >"$OUT/report.txt"
END=$((SECONDS + 60 * MINUTES)) STEP='' FAILED=''
export HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false

step() { # step PART NAME COMMAND...
    local part=$1 name=$2 start=$SECONDS limit=$((END - SECONDS)) code=0
    shift 2
    [[ " $PARTS " == *" $part "* ]] || return 0
    [ "$limit" -lt 150 ] || limit=150 # one that hangs leaves time for the others
    say "$name: python $*"
    if [ "$limit" -le 0 ]; then
        echo "$name: not run, the time is over" | tee -a "$OUT/report.txt"
        return
    fi
    timeout --kill-after 5 "$limit" "$PYTHON" -u "$@" >"$OUT/$name.txt" 2>&1 &
    STEP=$!
    wait "$STEP" || code=$?
    tail -n 14 "$OUT/$name.txt"
    if [ "$code" = 0 ]; then
        code=done
    elif [ $((SECONDS - start)) -ge "$limit" ]; then
        code="stopped, too slow,"
    elif tail -n 1 "$OUT/$name.txt" | grep -Eq "No module named '?(jsonargparse|peft|pytest|transformers)|needs bitsandbytes"; then
        code="left out, a package is missing,"
    else
        code="FAILED with $code" FAILED+=" $name"
    fi
    echo "$name: $code after $((SECONDS - start)) s" | tee -a "$OUT/report.txt"
}

efficiency() { # efficiency NAME TOKENS FLAG...
    step steps "$1" eval/efficiency.py "${MODEL[@]}" --time true --precision "$PRECISION" --seq_length "$2" \
        --out_dir "$OUT/$1" "${@:3}"
}

train() { # train NAME FLAG...
    step training "$1" finetune/ether.py --Htype etherplusHH --precision "$PRECISION" "${BATCHES[@]}" --train.epochs 9 \
        --eval.interval 1000 --io.train_data_dir "$SCRATCH/data" --io.out_dir "$OUT/$1" "${@:2}"
}

prepare() { # prepare MODEL
    step training base scripts/demo/make_random_base.py --model_name "$1" --precision "$PRECISION" --out_dir "$SCRATCH/base"
    step training data scripts/prepare_json.py --data_file_path "$SCRATCH/base/rows.json" --max_seq_length 256 \
        --checkpoint_dir "$SCRATCH/base" --destination_path "$SCRATCH/data"
}

exactness() { # exactness NAME ARGUMENT...
    step exactness "$1" -m pytest -q "${@:2}"
}

short_report() {
    PRECISION=32-true
    MODEL=(--model_name SmolLM2-135M-Instruct --n_layer 1 --blocks "[4]" --oft_blocks "[8]" --rounds 2)
    BATCHES=(--ether_nb 4 --train.micro_batch_size 2 --train.global_batch_size 4 --train.max_steps 6)
    step kernels kernels eval/bandwidth.py --precision 32-true --rows 32 --width 64 --blocks 4
    efficiency eager 51
    efficiency peft 51 --methods "[]" --peft true
    efficiency compiled 51 --methods "[etherplusHH]" --compile true
    efficiency nf4 12 --quantize bnb.nf4
    prepare pythia-14m
    train packed-checkpointing --train.packing true --train.activation_checkpointing true
    exactness fp64 tests/test_gpu.py --noconftest -k etherplusHH
}

full_report() { # full_report CAPABILITY FREE_MIB
    local layers=$((($2 - 900) / 695)) # a layer's 386 MiB in 16 bits and 0.8 times as much for activations; embeddings
    PRECISION=$([ "$1" -ge 8 ] && echo bf16-true || echo 16-true)
    MODEL=(--model_name Llama-2-7b-hf --n_layer $((layers < 32 ? layers : 32)) --blocks "[32]" --oft_blocks "[256]" --rounds 8)
    BATCHES=(--ether_nb 32 --train.micro_batch_size 8 --train.global_batch_size 32 --train.max_steps 24)
    step kernels kernels eval/bandwidth.py --precision "$PRECISION"
    efficiency eager-2048 2048
    efficiency eager-256 256
    prepare Llama-3.2-1B
    train packed --train.packing true
    exactness fp64 tests/test_gpu.py --noconftest -s
    efficiency peft-2048 2048 --methods "[]" --peft true
    train packed-compiled --train.packing true --compile true
    efficiency compiled-2048 2048 --methods "[etherplusHH]" --compile true
    efficiency compiled-256 256 --methods "[etherplusHH]" --compile true
    efficiency nf4-512 512 --methods "[etherplusHH]" --quantize bnb.nf4
    train padded
    train packed-checkpointing --train.packing true --train.activation_checkpointing true
    train packed-nf4 --train.packing true --quantize bnb.nf4
    exactness resume tests/test_resume.py -k killed_again_and_again
    efficiency compiled-2048-others 2048 --methods "[ether, etherplus, oft]" --compile true
    efficiency compiled-256-others 256 --methods "[ether, etherplus, oft]" --compile true
}

echo "results go to $OUT"
PROBE='import torch; print(torch.cuda.get_device_capability()[0], torch.cuda.mem_get_info()[0] >> 20)'
CARD="$("$PYTHON" -c "$PROBE" 2>/dev/null)" || SHORT=true
if [ "$SHORT" = true ]; then short_report; else full_report $CARD; fi
[ -z "$FAILED" ] || fail "failed, see their .txt:$FAILED"
