#!/usr/bin/env bash
# The whole path on real text with a pretrained model: SFT, then SFT again, SCS, BASH and RAC, each evaluated.
#
#     DATA=path/to/data bash benchmarks/real_data.sh [tldr|ultrachat|gsm8k ...]
#     DATA=... MODEL=path/to/Qwen2.5-Coder-0.5B-Instruct TRAIN=48 TEST=40 bash benchmarks/real_data.sh gsm8k
#     DATA=... EMBEDDER=path/to/all-MiniLM-L6-v2 bash benchmarks/real_data.sh figure2
#
# DATA holds gsm8k/{train,test}.jsonl, summarization/scitldr_a_{train,test}.jsonl and qa/dolly_3k.jsonl. MODEL is a folder;
# by default SmolLM2-135M-Instruct (tools/smollm2.py), which cannot do GSM8K. Seed s trains on the s-th TRAIN rows, and all
# are asked the same TEST rows. On one CPU core a seed of a task takes about an hour. Called again, it goes on where it
# stopped. Writes results/real/TASK.md and .json, and TASK-D_r.jsonl: RAC's labels in numbers, a line a seed. `figure2`,
# after ultrachat, draws N answers to each of the first four test queries by the models of seed 1, and writes how far
# they are from the reference, results/real/figure2.json and .png (Fig. 2; its temperature is the paper's).
# OUT, SEEDS, METHODS, JOBS, FLAGS, DTYPE and PYTHON are as in run.sh.
set -euo pipefail
cd "$(dirname "$0")/.."
PYTHON=${PYTHON:-.venv/bin/python} OUT=${OUT:-out-text} JOBS=${JOBS:-$(nproc)} SEEDS=${SEEDS:-1} DTYPE=${DTYPE:-bfloat16}
METHODS=${METHODS:-sft-more scs bash rac} TRAIN=${TRAIN:-96} TEST=${TEST:-100}
JOBS=$((JOBS > 0 ? JOBS : 1))
trap 'trap - INT TERM; kill 0' INT TERM
case $OUT in *[[:space:]]*) echo "real_data.sh: OUT must be a path without blanks, not '$OUT'" >&2; exit 2 ;; esac
case " $* " in *" figure2 "*) EMBEDDER=${EMBEDDER:?the folder of a sentence-transformers model} ;; esac
DATA=${DATA:?the folder that holds gsm8k/, summarization/ and qa/}
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1} HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false
export MALLOC_MMAP_THRESHOLD_=33554432 MALLOC_TRIM_THRESHOLD_=34359738368 MALLOC_TOP_PAD_=268435456 # as in run.sh

mkdir -p "$OUT" results/real
BASE=${MODEL:-$OUT/base}
[ -n "${MODEL:-}" ] || [ -e "$BASE" ] || {
    rm -rf "$BASE.partial" # of a call that was cut
    "$PYTHON" tools/smollm2.py "$BASE.partial" && mv "$BASE.partial" "$BASE"
}
train() { # train METHOD
    local stage="$data --data $dir/train.jsonl --batch-size 8 --micro-batch-size 8 --warmup 0.1 --checkpoint-every 20
        --seed $seed --epochs 2 --out $dir/$1 ${FLAGS:-}" # rates and epochs of `run.sh real`
    case $1 in
        sft) "$PYTHON" sft.py $stage --model "$BASE" --lr 1e-4 ;;
        sft-more) "$PYTHON" sft.py $stage --model "$dir/sft" --lr 5e-5 ;;
        scs) "$PYTHON" scs.py $stage --model "$dir/sft" --lr 5e-5 ;;
        *) "$PYTHON" "$1.py" $stage --model "$dir/sft" --lr 5e-5 --share-prompt ;;
    esac
}
job() { # job METHOD: trains and evaluates, into a log file
    if (train "$1" && evaluate "$1") > "$dir/$1.log" 2>&1; then return; fi
    echo "$task, seed $seed: $1 failed, see $dir/$1.log" >&2
    touch "$OUT/failed" # wait -n does not hear of each
}
evaluate() { # evaluate METHOD
    "$PYTHON" evaluate.py run --model "$dir/$1" $data --data "$test" --limit "$TEST" --temperatures 0 --name "$1" \
        --seed "$seed" --out "$dir/$1/eval"
}
for task in ${*:-tldr ultrachat}; do
    case $task in
        gsm8k) train=$DATA/gsm8k/train.jsonl test=$DATA/gsm8k/test.jsonl more="--max-response 256" ;;
        tldr)
            train=$DATA/summarization/scitldr_a_train.jsonl test=$DATA/summarization/scitldr_a_test.jsonl
            more="--max-prompt 400 --max-response 53" ;;
        ultrachat) # dolly is one file: its last 300 rows are the test set
            train=$OUT/dolly-train.jsonl test=$OUT/dolly-test.jsonl
            more="--columns prompt=instruction+input,response=output --max-prompt 256 --max-response 128"
            head -n -300 "$DATA/qa/dolly_3k.jsonl" > "$train"
            tail -n 300 "$DATA/qa/dolly_3k.jsonl" > "$test" ;;
        figure2)
            head -n 4 "$OUT/dolly-test.jsonl" > "$OUT/four.jsonl"
            files=()
            for method in sft $METHODS; do
                file=$OUT/figure2-$method.jsonl
                [ -e "$file" ] || "$PYTHON" generate.py --model "$OUT/ultrachat-1/$method" --task ultrachat --data "$OUT/four.jsonl" \
                    --columns prompt=instruction+input,response=output --max-response 128 --n "${N:-256}" --temperature 0.7 \
                    --dtype "$DTYPE" --seed 1 --out "$file"
                files+=("$method=$file")
            done
            "$PYTHON" tools/show.py distance "${files[@]}" --embedder "$EMBEDDER" --out "$OUT/figure2"
            for kind in json png; do cp "$OUT/figure2/distance.$kind" "results/real/figure2.$kind"; done
            continue ;;
        *) echo "real_data.sh: no task $task" >&2; exit 2 ;;
    esac
    data="--task $task $more --dtype $DTYPE"
    results=()
    for seed in $SEEDS; do
        dir=$OUT/$task-$seed
        mkdir -p "$dir"
        sed -n "$(((seed - 1) * TRAIN + 1)),$((seed * TRAIN))p" "$train" > "$dir/train.jsonl"
        echo "$task, seed $seed: sft $METHODS ($JOBS at a time; logs in $dir/)"
        rm -f "$OUT/failed"
        job sft
        [ ! -e "$OUT/failed" ] || exit 1
        for method in $METHODS; do
            while [ "$(jobs -rp | wc -l)" -ge "$JOBS" ]; do wait -n || true; done
            job "$method" &
        done
        wait
        [ ! -e "$OUT/failed" ] || exit 1
        for method in sft $METHODS; do results+=("$dir/$method/eval/results.json"); done
    done
    "$PYTHON" evaluate.py table "${results[@]}" --out "results/real/$task"
    case " $METHODS " in *" rac "*)
        for seed in $SEEDS; do tr -d '\n' < "$OUT/$task-$seed/rac/D_r_1.json" && echo; done > "results/real/$task-D_r.jsonl" ;;
    esac
done
