#!/usr/bin/env bash
# Figure 3: summarization with 10, 20, 50 and 100 % of the data, at equal steps. SFT, BASH and RAC; and sft-more, our own
# addition: plain SFT for as many steps more as BASH and RAC take. The models of 100 % are those of Table 1.
#
#     NPROC=8 bash recipes/figure3.sh           SMALL=1 [DATA=folder] bash recipes/figure3.sh
#
# Model           EleutherAI/pythia-1b-deduped
# Data            vwxyzjn/summarize_from_feedback_tldr_3_filtered; a part of it, another one for each of three seeds
# Table 5         bfloat16, AdamW, lr 3e-6, no warm-up, cosine, global batch 512, beta 0.2; SFT 2 epochs and BASH or RAC 1
#                 of the whole set; of 20 % that is 10 and 5 epochs
# Measured        win rate by GPT-4 Turbo, on the whole test set; temperature 0.01, 53 tokens
# Paper           no numbers: no notable drop from 20 % on; below, BASH and RAC fall less than SFT
# Hardware, time  the paper's machine is 8 x A6000 (48 GB); estimate, from the step times of its Table 8: 4 hours a seed
# Chosen here     - Exactly the steps of the whole set: --max-steps ends the last epoch of a part where they are reached.
#                 - D_s and D_r are drawn once from the part, and read for all its epochs.
. "$(dirname "$0")/common.sh"
paper MODEL=EleutherAI/pythia-1b-deduped SEEDS="1 2 3" DTYPE=bfloat16 BATCH=512 MICRO=16 SFT_LR=3e-6 LR=3e-6 WARMUP=0 \
    SFT_EPOCHS=2 EPOCHS=1 FRACTIONS="10 20 50 100" LIMIT=0 TEST_LIMIT=0 GB=250

use tldr
ready
for seed in $SEEDS; do
    seed_is "$seed"
    whole=$dir parts=$results
    for fraction in 100 ${FRACTIONS/100/}; do
        more=()
        results=$parts/$fraction
        if [ "$fraction" != 100 ]; then
            dir=$whole/part-$fraction
            sample "$fraction%" "$seed" "$dir/rows.jsonl"
            FLAGS+=(--data "$dir/rows.jsonl") # the last one counts
        fi
        part() { # part NAME STAGE.py EPOCHS FLAGS: for as many steps as the whole set took
            [ "$fraction" = 100 ] || ! wanted "$1" || more=(--max-steps "$(wc -l < "$whole/$1/log.jsonl")")
            train "$1" "$2" --epochs $((fraction < 100 ? 1000 * $3 : $3)) "${more[@]}" "${@:4}" # --max-steps ends them
            measure "$1" --x "$fraction"
        }
        part sft sft.py "$SFT_EPOCHS" --model "$model" --lr "$SFT_LR"
        part sft-more sft.py "$EPOCHS" --model "$dir/sft"
        part bash bash.py "$EPOCHS" --model "$dir/sft" --beta 0.2
        part rac rac.py "$EPOCHS" --model "$dir/sft"
    done
done
all=("${RESULTS[@]}")
begin_table "Equal steps for each part of the data; another part for each seed."
for fraction in $FRACTIONS; do
    RESULTS=()
    for file in "${all[@]}"; do case $file in */seed-*/"$fraction"/*/results.json) RESULTS+=("$file") ;; esac; done
    table "$fraction % of the data"
done
plots "% of the training data" "${all[@]}"
end_table "$(judge_hint)"
