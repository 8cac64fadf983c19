#!/usr/bin/env bash
# Table 2: general QA. AlpacaEval 2.0 length-controlled win rate of SFT, NEFTune, SPIN, BASH and RAC, two iterations; and
# of sft-more, our own addition: plain SFT for as many steps more as BASH and RAC take in each iteration.
#
#     NPROC=8 bash recipes/table2.sh            SMALL=1 [DATA=folder] bash recipes/table2.sh
#
# Model           HuggingFaceH4/mistral-7b-sft-beta as SFT; NEFTune starts from mistralai/Mistral-7B-v0.1
# Data            HuggingFaceH4/ultrachat_200k, 50,000 prompts at random, first turn of each dialogue (as SPIN)
# Table 5         bfloat16, AdamW, lr 5e-6, warm-up 10 %, cosine, global batch 512; 2 iterations of [1, 2] epochs, beta 0.2;
#                 NEFTune's alpha 5
# Measured        LC win rate by alpaca_eval, temperature 0.7 (three generations) and greedy
# Paper           mean of three, greedy:  SFT 8.03±0.30, 7.06    NEFTune 7.38±0.28, 6.64
#                 SPIN 9.15±0.28, 8.66 then 8.50±0.30, 7.64    BASH 8.60±0.12, 7.31 then 9.07±0.27, 8.42
#                 RAC 9.53±0.33, 9.04 then 10.37±0.34, 9.41
# Hardware, time  the paper's machine is 8 x A6000 (48 GB); estimate, from the step times of its Table 9: 100 hours, of
#                 which the drawing of data would be 40 at its 370 s a batch
# Chosen here     - The iterations are two runs in a row: each draws its data with the model so far and has its own AdamW
#                   and schedule (the paper does not say). Both iterations take the same 50,000 prompts, as in SPIN.
#                 - NEFTune has one epoch on all of UltraChat at Table 5's lr; the paper is silent ("/" in Table 5).
#                 - SPIN takes its own code's lr 5e-7, batch 64, beta 0.1, 3 epochs an iteration. spin-2 does both.
#                 - z and y_hat are drawn at temperature 1, at most 1,024 tokens: the paper is silent.
#                 - The exposure table is ours: 1,000 test prompts.
. "$(dirname "$0")/common.sh"
qa_settings
paper GB=800

qa_ready "model=$MODEL"
alpaca_data
begin_table "Losses of the test set; the win rates come from alpaca_eval. The paper's rows are in recipes/$RECIPE.sh."
for seed in $SEEDS; do
    seed_is "$seed"
    qa_sft
    train neftune sft.py --model "${MODEL:-$model}" --data "${NEFT_DATA:-$train_file}" --epochs "$NEFT_EPOCHS" --lr "$SFT_LR" \
        --neftune-alpha 5
    qa_methods
    for beta in $SPIN_BETAS; do # from the second iteration on SPIN needs the pairs of the first: one run of two
        spin=(--model "$sft" --lr "$SPIN_LR" --batch-size "$SPIN_BATCH" --beta "$beta" --epochs "$SPIN_EPOCHS")
        train "spin-$beta-1" spin.py "${spin[@]}"
        train "spin-$beta-2" spin.py "${spin[@]}" --iterations 2
    done
    names="neftune sft-more-1 sft-more-2 $(printf 'spin-%s-1 ' $SPIN_BETAS)$(printf 'spin-%s-2 ' $SPIN_BETAS)"
    measure sft --model "$sft"
    alpaca sft "$sft"
    for name in $names bash-1 bash-2 rac-1 rac-2; do
        measure "$name"
        alpaca "$name"
    done
done
table "" sft-more-2
end_table "$(alpaca_hint)"
