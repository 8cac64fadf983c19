#!/usr/bin/env bash
# Best-of-N-aware fine-tuning (Chow et al., arXiv 2412.15287): pass@k of a model trained to be right once in N samples,
# beside SFT, sft-more (plain SFT for as many steps), rejection sampling of the same samples (bon-1) and DCO.
#
#     NPROC=8 bash recipes/bon.sh               SMALL=1 [DATA=folder] bash recipes/bon.sh
#
# Model           google/gemma-2-2b
# Data            EleutherAI/hendrycks_math (7,500 training rows, 5,000 test)
# Settings        N = 32 is the paper's best-of-N; the rest is chosen here
# Measured        accuracy, pass@k and maj@k of 32 samples at temperature 1; a plot of pass@k over k
# Paper           Gemma 2B on MATH: best of 32 by a verifier 26.8 -> 30.8, pass@32 60.0 -> 67.0
# Hardware, time  not run at this size; estimate for 8 x A6000 (48 GB): 10 hours, most of them for 480,000 samples to train
#                 on and 100,000 to measure
# Chosen here     - The paper draws in every step, and we once: 64 samples of each problem, which all N share.
#                 - bon-8 and bon-1 are there to see what N does. dco has N = 32.
#                 - lr, warm-up, batch and epochs are those of the recipe for Table 3 here; the paper's were not to be had.
#                 - The best-of-32 of the paper takes a learned verifier: `evaluate.py best-of` reads its scores.
#                 - The first 500 test problems.
. "$(dirname "$0")/common.sh"
[ -z "$SMALL" ] || paper SAMPLES=8 NS="1 4" DRAWN=4 PASS=1,2,4 DCO_N=4
paper MODEL=google/gemma-2-2b SEEDS=1 DTYPE=bfloat16 BATCH=512 MICRO=8 SFT_LR=5e-6 LR=5e-6 WARMUP=0.1 SFT_EPOCHS=2 EPOCHS=1 \
    SAMPLES=64 NS="1 8 32" DRAWN=32 PASS=1,2,8,32 DCO_N=32 LIMIT=0 TEST_LIMIT=500 GB=150
[ -n "$SMALL$EXTRA" ] || EXTRA=--activation-checkpointing

use math
ready
begin_table "pass@k in percent at temperature 1. The paper's rows are in recipes/$RECIPE.sh."
for seed in $SEEDS; do
    seed_is "$seed"
    train sft sft.py --model "$model" --lr "$SFT_LR" --epochs "$SFT_EPOCHS"
    train sft-more sft.py --model "$dir/sft" --epochs "$EPOCHS"
    case " ${METHODS:-bon} " in *" bon"*) # the samples that all N share
        logged "$dir/bon-draws.log" "$task, seed $seed: samples" run bon.py "${FLAGS[@]}" --model "$dir/sft" --epochs 0 \
            --n "$SAMPLES" --best-of "${NS%% *}" --out "$dir/bon-draws" ;;
    esac
    for N in $NS; do
        train "bon-$N" bon.py --model "$dir/sft" --epochs "$EPOCHS" --best-of "$N" --pairs "$dir/bon-draws/D_bon_1"
    done
    train dco bon.py --model "$dir/sft" --epochs "$EPOCHS" --dco --best-of "$DCO_N"
    for name in sft sft-more $(printf 'bon-%s ' $NS) dco; do
        measure "$name" --temperatures 0,1 --generations "$DRAWN" --k "$PASS"
    done
done
results=("${RESULTS[@]}")
table
if have matplotlib; then
    "$PYTHON" tools/show.py pass-at-k "${results[@]}" --out "$HERE/plots" || die "the plot failed"
fi
end_table "Best-of-N by a verifier of your own: score $HERE/$task/seed-*/NAME/generations-t1, then evaluate.py best-of"
