#!/usr/bin/env bash
# Tables 8 and 9: what online scheduled sampling (SCS) costs in time and memory beside BASH; by benchmarks/overhead.py,
# whose head says what is measured. It also has SCS with the parallel draw of generate.py, which the paper has not.
#
#     bash recipes/table8.sh                    SMALL=1 [DATA=folder] bash recipes/table8.sh
# (a small model that overhead.py trains, instead; prompts of 400 tokens, responses of 50)
#
# Model           EleutherAI/pythia-1b-deduped (Table 8), mistralai/Mistral-7B-v0.1 (Table 9)
# Data            the summarization set, the general QA set; no training beyond the steps that are timed
# Table 5         bfloat16, AdamW, beta 0.2. 4 micro-batches of 16 (1B), 8 of 8 (7B): 64 rows a GPU
# Paper           s a batch, GB:  1B  SCS 20.8, 35    BASH data 0.9, 17    BASH training 4.4, 28
#                                 7B  SCS > 3600, 46    BASH data 370, 22    BASH training 75, 36
# Hardware, time  the paper's machine is 8 x A6000 (48 GB); estimate: 1 hour (1B), some hours (7B)
# Chosen here     - One GPU does the share of one of the paper's eight. Weights and moments are not divided then: the 7B
#                   needs about 130 GB. TABLES=8 leaves it out.
#                 - The time of the parallel draw depends on how sure the model is of its text: MODEL_8 and MODEL_9 may
#                   name fine-tuned ones, e.g. MODEL_8=runs/tldr/seed-1/sft.
. "$(dirname "$0")/common.sh"
paper TABLES="8 9" MODEL_8=EleutherAI/pythia-1b-deduped MODEL_9=mistralai/Mistral-7B-v0.1 DTYPE=bfloat16 STEPS=3 REPEAT=2 \
    TRAINING_STEPS=60 GB=60

texts() { # texts FILE: prompts and responses of the task, for overhead.py to cut to its lengths
    if [ "$task" = toy ]; then
        rm -rf "$1.toy" # of a call that was cut
        "$PYTHON" toy.py data --out "$1.toy" --train 400 && mv "$1.toy/train.jsonl" "$1"
    else
        "$PYTHON" - "$task" "$train_file" "$columns" "$1" << 'END'
import json, os, sys

import data

task, path, columns, out = sys.argv[1:]
rows = data.load_rows(task, path or None, "train", columns, limit=2000)
with open(out + ".partial", "w", encoding="utf-8") as file:
    file.writelines(json.dumps({"prompt": row["prompt"], "response": row["response"]}) + "\n" for row in rows)
os.rename(out + ".partial", out)
END
    fi
}
measure_table() { # measure_table NUMBER MODEL FLAGS
    local file=$HERE/texts-$1.jsonl
    [ -e "$file" ] || texts "$file"
    if [ -n "$SMALL" ]; then set -- "$1" "" --batch-size 4 --micro-batch-size 4 --training-steps "$TRAINING_STEPS"; fi
    if [ -n "$2" ] && [ ! -d "$2" ]; then # overhead.py wants a folder
        set -- "$1" "$("$PYTHON" -c 'import sys, huggingface_hub as h; print(h.snapshot_download(sys.argv[1]))' "$2")" "${@:3}"
    fi
    echo "    Table $1 (log: $HERE/log)"
    "$PYTHON" benchmarks/overhead.py --data "$file" ${2:+--model "$2"} "${@:3}" --dtype "$DTYPE" --steps "$STEPS" \
        --repeat "$REPEAT" --out "$HERE/model" --results "$HERE/overhead-$1.json" > "$HERE/overhead-$1.md" 2>> "$HERE/log" ||
        die "Table $1 failed, see $HERE/log"
    { printf '\n## Table %s\n' "$1"; cat "$HERE/overhead-$1.md"; } >> "$TABLE"
}

for table in $TABLES; do
    case $table in
        8) use tldr; model=$MODEL_8 ;;
        9) use ultrachat; model=$MODEL_9 ;;
        *) die "TABLES=$TABLES: 8, 9 or both" ;;
    esac
    [ -z "$SMALL" ] || model=${MODEL:-}
    check
done
begin_table "The paper's figures are the last two columns."
for table in $TABLES; do
    case $table in
        8) use tldr; measure_table 8 "$MODEL_8" --preset tldr --batch-size 64 --micro-batch-size 16 ;;
        9) use ultrachat; measure_table 9 "$MODEL_9" --preset ultrachat --batch-size 64 --micro-batch-size 8 ;;
    esac
done
end_table
