#!/usr/bin/env bash
# Table 5 of the paper (2405.20271): Llama-2-7B finetuned on Alpaca, each method with the settings of Table 8.
#
#     bash scripts/reproduce_table5.sh        # a GPU of 40 GB or more, and a day; downloads need HF_TOKEN once
#
# A second call goes on where the first one was stopped: finished rows are kept, the others resume from a checkpoint.
# The table comes out of eval/report.py, as $OUT/report/report.md. The paper's own numbers (MMLU, ARC, TruthfulQA-1, -2):
#     untuned 41.81 42.92 25.21 38.95    LoRA 43.61 46.16 28.76 42.21    OFT 42.92 44.88 27.42 41.11
#     ETHER 44.57 45.14 27.91 41.83      ETHER+ 44.87 46.50 29.38 43.51 (one run each, without standard errors)
# Beside Table 8: the paper was presumably trained with the published code. So ETHER and OFT act on the output side of q
# and v, ETHER+ has that code's block layout on its input side, and a step's loss is the mean over its sequences.
#
# To try it out, or on another model, set any of these:
set -euo pipefail
if [ $# -gt 0 ]; then # --help, or what it does not know
    sed -n '2,/^set /s/^# \{0,1\}//p' "${BASH_SOURCE[0]}"
    [ "$1" = --help ]
    exit
fi
cd "$(dirname "${BASH_SOURCE[0]}")/.."
: "${PYTHON:=python}" "${REPO_ID:=meta-llama/Llama-2-7b-hf}" "${CHECKPOINT:=checkpoints/$REPO_ID}"
: "${DATA:=$CHECKPOINT/alpaca-t256}" # prepared rows; made from Alpaca, or from the file ALPACA, where missing
: "${OUT:=logs/table5}"              # the runs and the report
: "${STEPS:=}"                       # optimizer steps of a row instead of an epoch
: "${LIMIT:=}"                       # documents of a task instead of all
: "${EVAL_DATA:=}" "${TEXT:=}"       # folder of the tasks' data; a file of text to measure forgetting on
: "${PRECISION:=bf16-true}" "${MICRO_BATCH:=1}" "${LAYOUT:=published}"
: "${ETHER_N:=32}" "${OFT_N:=256}"
LENGTH=(--train.epochs 1 --train.lr_warmup_steps 1000)
[ -z "$STEPS" ] || LENGTH=(--train.max_steps "$STEPS")
TASKS="${TASKS:-['hendrycksTest-*', 'arc_challenge', 'truthfulqa_mc']}"
ROWS=( # name, script, learning rate, batch, settings of the method
    "LoRA lora 5e-4 8 --lora_r 8"
    "OFT ether 5e-4 16 --Htype oft --ether_nb $OFT_N"
    "ETHER ether 2e-3 8 --Htype ether --ether_nb $ETHER_N"
    "ETHER+ ether 5e-3 16 --Htype etherplusHH --ether_nb $ETHER_N --ether_block_layout $LAYOUT"
)

run() {
    printf '\n$ python'
    printf ' %q' "$@"
    printf '\n'
    "$PYTHON" "$@"
}
quoted() { # as YAML
    local text="${1//\\/\\\\}"
    printf '"%s"' "${text//\"/\\\"}"
}
report() {
    run eval/report.py --out_dir "$OUT/report" --models "{$MODELS}" --eval_tasks "$TASKS" --precision "$PRECISION" \
        ${LIMIT:+--limit "$LIMIT"} ${EVAL_DATA:+--data_dir "$EVAL_DATA"} ${TEXT:+--text "[$(quoted "$TEXT")]"}
}

if [ ! -f "$CHECKPOINT/lit_model.pth" ]; then
    run scripts/download.py --repo_id "$REPO_ID" --from_safetensors true # reads HF_TOKEN
    run scripts/convert_hf_checkpoint.py --checkpoint_dir "$CHECKPOINT"
fi
if [ ! -f "$DATA/data_config.json" ]; then
    run scripts/prepare_alpaca.py ${ALPACA:+--data_file_path "$ALPACA"} --destination_path "$DATA" \
        --checkpoint_dir "$CHECKPOINT" --max_seq_length 256
fi

MODELS="untuned: $(quoted "$CHECKPOINT")"
report # now: tasks or texts that cannot be had are found before the training
for row in "${ROWS[@]}"; do
    read -r name method rate batch settings <<<"$row"
    folder="$OUT/$name"
    MODELS+=", $name: $(quoted "$folder/merged")"
    # shellcheck disable=SC2086  # settings are words. Of a finished run it says so, or that its settings were others
    run "finetune/$method.py" --io.train_data_dir "$DATA" --io.checkpoint_dir "$CHECKPOINT" --io.out_dir "$folder" \
        --precision "$PRECISION" --train.learning_rate "$rate" --train.global_batch_size "$batch" \
        --train.micro_batch_size "$MICRO_BATCH" --train.loss_average sequence --train.save_interval 250 \
        "${LENGTH[@]}" $settings --resume true
    if [ ! -f "$folder/merged/lit_model.pth" ]; then
        run "scripts/merge_$method.py" --checkpoint_dir "$CHECKPOINT" --precision "$PRECISION" \
            "--${method}_path" "$folder/lit_model_${method}_finetuned.pth"
    fi
done
report
