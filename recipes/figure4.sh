#!/usr/bin/env bash
# Figure 4: SFT of the SFT model for more epochs, beside BASH and RAC, after epochs 1, 2 and 3; general QA. The models after
# epochs 1 and 3 are those of Table 2 where OUT holds them (here SFT for more steps is the paper's own comparison).
#
#     NPROC=8 bash recipes/figure4.sh           SMALL=1 [DATA=folder] bash recipes/figure4.sh
#
# Model           HuggingFaceH4/mistral-7b-sft-beta
# Data            HuggingFaceH4/ultrachat_200k, 50,000 prompts at random, first turn of each dialogue (as SPIN)
# Table 5         bfloat16, AdamW, lr 5e-6, warm-up 10 %, cosine, global batch 512; 2 iterations of [1, 2] epochs, beta 0.2
# Measured        LC win rate by alpaca_eval, three generations
# Paper           no numbers but those of Table 2; SFT rises, then drops at epoch 3; BASH and RAC rise at each and lie above
# Hardware, time  the paper's machine is 8 x A6000 (48 GB); estimate: 30 hours beside those of Table 2
# Chosen here     - Epoch 1 is the first iteration, epochs 2 and 3 the second, as in the paper. It does not say how the
#                   learning rate goes: the model of epoch 2 is a run of its own of one epoch after the first iteration,
#                   that of epoch 3 one of two, and SFT is cut in the same way.
#                 - SFT has the same 50,000 prompts. As in recipes/table2.sh.
. "$(dirname "$0")/common.sh"
qa_settings
paper GB=700

qa_ready
alpaca_data
for seed in $SEEDS; do
    seed_is "$seed"
    qa_sft
    top=$results results=$top/0
    measure sft --model "$sft" --x 0
    alpaca sft "$sft"
    for name in sft-more bash rac; do
        stage=(sft.py)
        [ "$name" != bash ] || stage=(bash.py --beta 0.2)
        [ "$name" != rac ] || stage=(rac.py)
        two_iterations "$name" "${stage[@]}"
        train "$name-2-half" "${stage[@]}" --model "$dir/$name-1" --epochs "$EPOCHS_1" --seed "$((seed + 1000))"
        epoch=0
        for part in 1 2-half 2; do
            epoch=$((epoch + 1)) results=$top/$((epoch))
            measure "$name" --model "$dir/$name-$part" --x "$epoch"
            alpaca "$name-$part"
        done
    done
done
all=("${RESULTS[@]}")
begin_table "Losses of the test set after each epoch; the win rates come from alpaca_eval."
for epoch in 0 1 2 3; do
    RESULTS=()
    for file in "${all[@]}"; do case $file in */seed-*/"$epoch"/*/results.json) RESULTS+=("$file") ;; esac; done
    table "epoch $epoch"
done
plots epochs "${all[@]}"
end_table "$(alpaca_hint)"
