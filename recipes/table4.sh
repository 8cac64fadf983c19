#!/usr/bin/env bash
# Table 4: DPO on top of SFT, BASH and RAC; and on top of sft-more, our own addition: plain SFT for as many steps more as
# BASH and RAC take. The models that DPO starts from are those of Table 2 where OUT holds them.
#
#     NPROC=8 bash recipes/table4.sh            SMALL=1 [DATA=folder] bash recipes/table4.sh
#
# Model           HuggingFaceH4/mistral-7b-sft-beta, and BASH and RAC of it
# Data            HuggingFaceH4/ultrachat_200k for those (50,000 prompts); HuggingFaceH4/ultrafeedback_binarized for DPO
#                 (PREFERENCES=pairs.jsonl: prompt, chosen, rejected)
# Table 5         as in recipes/table2.sh; DPO as for zephyr-7b-beta, see below
# Measured        LC win rate by alpaca_eval, temperature 0.7 (three generations) and greedy
# Paper           mean of three, greedy:  SFT + DPO 14.06±0.60, 14.22    BASH + DPO 13.87±0.57, 14.39
#                 RAC + DPO 15.85±0.49, 15.35
# Hardware, time  the paper's machine is 8 x A6000 (48 GB); estimate: 6 hours for each DPO, 50 for BASH and RAC where
#                 Table 2 has not been run
# Chosen here     - The paper "closely follows" zephyr-7b-beta and lists no values: beta 0.01, lr 5e-7, 1 epoch, batch 128,
#                   warm-up 10 %, cosine, 1,024 tokens (the recipe in the alignment handbook; its first version had beta
#                   0.1 and 3 epochs).
#                 - DPO starts from the second iteration of BASH and RAC; the paper does not say from which.
. "$(dirname "$0")/common.sh"
qa_settings
paper DPO_LR=5e-7 DPO_BATCH=128 DPO_BETA=0.01 PREFERENCES= GB=700

if [ -n "$SMALL" ] && [ -z "$PREFERENCES" ]; then qa_ready
else qa_ready "preferences=$PREFERENCES"; fi
alpaca_data
begin_table "Losses of the test set; the win rates come from alpaca_eval. The paper's rows are in recipes/$RECIPE.sh."
for seed in $SEEDS; do
    seed_is "$seed"
    qa_sft
    qa_methods
    pairs=${PREFERENCES:-HuggingFaceH4/ultrafeedback_binarized} # the last --data counts
    if [ -n "$SMALL" ] && [ -z "$PREFERENCES" ]; then small_preferences; fi
    for name in sft sft-more bash rac; do
        start=$dir/$name-2
        [ "$name" != sft ] || start=$sft
        train "$name-dpo" dpo.py --model "$start" --data "$pairs" --columns '' --max-prompt 512 --max-response 0 \
            --max-length 1024 --epochs 1 --lr "$DPO_LR" --batch-size "$DPO_BATCH" --beta "$DPO_BETA"
        measure "$name" --model "$start"
        measure "$name-dpo"
        alpaca "$name-dpo"
    done
done
table "" sft-dpo
end_table "$(alpaca_hint)"
