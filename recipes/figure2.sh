#!/usr/bin/env bash
# Figure 2: distance of 256 sampled responses to the reference response, as sentence embeddings, for two training and two
# test queries of UltraChat. SFT, SPIN, BASH and RAC of Table 2 where OUT holds them; and sft-more, our own addition.
#
#     NPROC=8 bash recipes/figure2.sh           SMALL=1 [DATA=folder] bash recipes/figure2.sh
#
# Model           HuggingFaceH4/mistral-7b-sft-beta, and SPIN, BASH and RAC of it
# Data            HuggingFaceH4/ultrachat_200k; the four queries of the paper's appendix A.3 (SMALL: the first two of each)
# Table 5         as in recipes/table2.sh
# Measured        256 responses at temperature 0.7, sentence-transformers/all-mpnet-base-v2
# Paper           violins; BASH and RAC lie nearer to the reference, but for the story of test example 2
# Hardware, time  the paper's machine is 8 x A6000 (48 GB); estimate: 1 hour beside Table 2
# Chosen here     - Distance is 1 - cosine similarity; the paper does not say.
#                 - Second iteration of each method; the paper does not say.
#                 - With SMALL, or without sentence-transformers, cosine over word counts stands in, and the table says so.
. "$(dirname "$0")/common.sh"
qa_settings
paper N=256 GB=800

qa_ready
queries() { # queries FILE: the rows whose prompts begin like those of A.3, or of each split the first two
    [ -e "$1" ] || "$PYTHON" - "$SMALL" "$task" "$train_file" "$test_file" "$columns" "$1" << 'END'
import json, os, sys

import data
from core.ranks import cli
from core.rows import one_row, source_rows

WANTED = {
    "train": ("What factors influenced the decision to build the Panama Canal",
              "What are the risks associated with IoT devices"),
    "test": ("How did the fall of the Soviet Union impact the economies",
             "Using vivid imagery and descriptive language, write a compelling short story about a time traveler"),
}
small, task, train, test, columns, out = sys.argv[1:]


def main():
    found = []
    for split, path in (("train", train), ("test", test)):
        spec = data.TASKS[task]
        if small:
            found += data.load_rows(task, path or None, split, columns, limit=2)
            continue
        rows, source = source_rows(None, spec.hub, spec.splits[split == "test"])  # the paper's, not the sample
        prompts = rows["prompt"]
        for start in WANTED[split]:
            places = [i for i, prompt in enumerate(prompts) if prompt.strip().startswith(start)]
            if not places:
                raise ValueError(f"{source} ({split}): no prompt begins {start!r}")
            wanted = {"prompt": "prompt", "response": "messages"}
            found.append(one_row(rows[places[0]], wanted, f"{source}, row {places[0]}"))
    with open(out + ".partial", "w", encoding="utf-8") as file:
        for row in found:
            file.write(json.dumps({"prompt": row["prompt"], "response": row["response"]}) + "\n")
    os.rename(out + ".partial", out)


sys.argv[0] = "figure2"
cli(main)
END
}
queries "$HERE/queries.jsonl"
begin_table "Losses of the test set, and the median distance of $N responses for each query."
for seed in $SEEDS; do
    seed_is "$seed"
    qa_sft
    two_iterations sft-more sft.py
    for beta in $SPIN_BETAS; do
        train "spin-$beta-2" spin.py --model "$sft" --lr "$SPIN_LR" --batch-size "$SPIN_BATCH" --beta "$beta" \
            --epochs "$SPIN_EPOCHS" --iterations 2
    done
    two_iterations bash bash.py --beta 0.2
    two_iterations rac rac.py
    answers=()
    for name in sft sft-more-2 $(printf 'spin-%s-2 ' $SPIN_BETAS) bash-2 rac-2; do
        wanted "$name" || continue
        start=$dir/$name out=$results/$name.jsonl
        [ "$name" != sft ] || start=$sft
        measure "$name" --model "$start"
        [ -e "$out" ] || logged "$results/$name.log" "$task, seed $seed: $name, $N responses" run generate.py --model "$start" \
            --task "$task" --data "$HERE/queries.jsonl" --columns prompt=prompt,response=response "${SHAPE[@]}" --n "$N" \
            --temperature 0.7 --dtype "$DTYPE" --seed "$seed" --out "$out"
        answers+=("$name=$out")
    done
    "$PYTHON" - "$SMALL" "$results/distance" "${answers[@]}" << 'END' > "$results/distance.md" || die "the distances failed"
import argparse, collections, importlib.util, json, re, sys

import numpy as np
from core.ranks import cli
from tools.plots import distance


def word_counts(texts):
    counts = [collections.Counter(re.findall(r"\w+", text.lower())) for text in texts]
    words = {word: i for i, word in enumerate(sorted(set().union(*counts)))}
    vectors = np.zeros((len(texts), len(words)))
    for row, count in zip(vectors, counts):
        for word, n in count.items():
            row[words[word]] = n
    return vectors


def main():
    small, out, *files = sys.argv[1:]  # small: nothing is asked of a hub
    real = not small and importlib.util.find_spec("sentence_transformers")
    name = "sentence-transformers/all-mpnet-base-v2" if real else "word counts (pip install sentence-transformers)"
    distance(argparse.Namespace(files=files, rows=[], embedder=name, out=out), None if real else word_counts)
    medians = json.load(open(f"{out}/distance.json"))["medians"]
    print(f"Embedding: {name}\n")
    print("|", " | ".join(["Median distance", *(f"query {i + 1}" for i in range(len(next(iter(medians.values())))))]), "|")
    print("|---|" + "---:|" * len(next(iter(medians.values()))))
    for method, values in medians.items():
        print("|", method, "|", " | ".join(f"{value:.3f}" for value in values), "|")


sys.argv[0] = "figure2"
cli(main)
END
done
table "" sft-more-2
for seed in $SEEDS; do
    printf '\n## Distance, seed %s\n\n' "$seed" >> "$TABLE"
    cat "$HERE/$task/seed-$seed/distance.md" >> "$TABLE"
done
end_table "Violins: $HERE/$task/seed-*/distance"
