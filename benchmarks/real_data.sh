#!/usr/bin/env bash
# The whole path on real text: SFT, then SFT again, SCS, BASH and RAC, each evaluated, on three tasks.
#
#     DATA=path/to/data bash benchmarks/real_data.sh [gsm8k|tldr|ultrachat ...]
#
# DATA holds gsm8k/{train,test}.jsonl, summarization/scitldr_a_{train,test}.jsonl and qa/dolly_3k.jsonl. The model is a
# small random one with a byte-level BPE made from the training text, so accuracy is near zero by construction: what can
# be seen is that every stage runs on real columns, lengths and templates, the losses, and the exposure gap.
# Some minutes a task on two cores. Writes results/real/TASK.md and .json; OUT and PYTHON as in run.sh.
set -euo pipefail
cd "$(dirname "$0")/.."
PYTHON=${PYTHON:-.venv/bin/python} OUT=${OUT:-out-real} JOBS=${JOBS:-$(nproc)} METHODS="sft sft-more scs bash rac"
trap 'trap - INT TERM; kill 0' INT TERM
DATA=${DATA:?the folder that holds gsm8k/, summarization/ and qa/}
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1} HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false

job() { # job METHOD: trains and evaluates, into a log file
    local more="$stage --model $dir/sft --limit 400 --lr 5e-4 --epochs 1 --out $dir/$1"
    case $1 in
        sft) ;;
        sft-more) "$PYTHON" sft.py $more ;;
        *) "$PYTHON" "$1.py" $more ;;
    esac
    "$PYTHON" evaluate.py run --model "$dir/$1" $data --data "$test" --limit 100 --temperatures 0 --name "$1" \
        --out "$dir/$1/eval"
}
for task in ${*:-gsm8k tldr ultrachat}; do
    dir=$OUT/$task columns=''
    mkdir -p "$dir"
    case $task in
        gsm8k) train=$DATA/gsm8k/train.jsonl test=$DATA/gsm8k/test.jsonl lengths="--max-response 256" ;;
        tldr)
            train=$DATA/summarization/scitldr_a_train.jsonl test=$DATA/summarization/scitldr_a_test.jsonl
            lengths="--max-prompt 512 --max-response 53" ;;
        ultrachat) # dolly is one file: its last 300 rows are the test set
            train=$dir/train.jsonl test=$dir/test.jsonl lengths="--max-prompt 256 --max-response 192"
            columns="--columns prompt=instruction+input,response=output"
            head -n -300 "$DATA/qa/dolly_3k.jsonl" > "$train"
            tail -n 300 "$DATA/qa/dolly_3k.jsonl" > "$test" ;;
        *) echo "real_data.sh: no task $task" >&2; exit 2 ;;
    esac
    data="--task $task $columns $lengths"
    stage="$data --data $train --batch-size 16 --micro-batch-size 8"
    [ -e "$dir/base" ] || "$PYTHON" toy.py bytes --out "$dir/base" --text "$train" --vocab 2048
    OMP_NUM_THREADS=$(nproc) "$PYTHON" sft.py $stage --model "$dir/base" --limit 1200 --lr 2e-3 --epochs 2 --out "$dir/sft"
    echo "$task: $METHODS ($JOBS at a time; logs in $dir/)"
    fail=0
    for method in $METHODS; do
        while [ "$(jobs -rp | wc -l)" -ge "$JOBS" ]; do wait -n || fail=1; done
        job "$method" > "$dir/$method.log" 2>&1 &
    done
    while [ -n "$(jobs -rp)" ]; do wait -n || fail=1; done
    [ $fail = 0 ] || { echo "$task: a method failed, see $dir/*.log" >&2; exit 1; }
    mkdir -p results/real
    results=()
    for method in $METHODS; do results+=("$dir/$method/eval/results.json"); done
    "$PYTHON" evaluate.py table "${results[@]}" --out "results/real/$task"
    cp "$dir/rac/D_r_1.json" "results/real/$task-D_r.json"
done
