# What every recipe shares: settings, checks, and the verbs that the recipes are written in. Sourced, not run.
#
#     NPROC=8 bash recipes/table1.sh                         the paper's models and data, eight GPUs
#     SMALL=1 bash recipes/table1.sh                         the same file on the toy task: minutes on two CPU cores
#     SMALL=1 DATA=folder bash recipes/table1.sh             ... on real text: gsm8k/, summarization/, qa/ in that folder
#
# A recipe called again goes on where it stopped. Models lie in OUT/TASK/seed-N/METHOD and are shared: the recipes for
# Tables 1 and 7 and Fig. 3, and those for Tables 2, 4 and 6 and Figs. 2 and 4, train the same SFT, BASH and RAC once.
# The recipe's own results lie in OUT/RECIPE, its table in OUT/RECIPE/table.md. Set in the environment:
#     OUT       runs, or out-small        NPROC     processes (torchrun)            PYTHON   instead of .venv
#     METHODS   only these, e.g. "bash rac" (sft always runs)                       SEEDS    e.g. "1 2 3"
#     DATA      a folder with gsm8k/, math/, summarization/, qa/ instead of the hub (files: see `files` below)
#     GB        disk space to ask for     EXTRA     flags for every stage, e.g. "--shard 8"
# and every value that a recipe's `paper` line names: MODEL, LR, BATCH, MICRO, SFT_EPOCHS, EPOCHS, LIMIT, ...
# Of another value than before, a model must go to another OUT: the stage says so and stops.
set -euo pipefail
RECIPE=$(basename "$0" .sh)
cd "$(dirname "${BASH_SOURCE[0]}")/.."
die() {
    echo "$RECIPE: $*" >&2
    exit 2
}

SMALL=${SMALL:-} DATA=${DATA:-} NPROC=${NPROC:-1} METHODS=${METHODS:-} EXTRA=${EXTRA:-}
OUT=${OUT:-$([ -n "$SMALL" ] && echo out-small || echo runs)}
HERE=$OUT/$RECIPE
export TOKENIZERS_PARALLELISM=false

# paper NAME=VALUE...: values of the paper (or SMALL's), for the variables that have none yet
paper() {
    local pair name
    for pair; do
        name=${pair%%=*}
        [ -n "${!name+set}" ] || printf -v "$name" %s "${pair#*=}"
    done
}

# SMALL=1 changes values, never lines: these stand before the recipe's own. An empty MODEL is built by toy.py.
if [ -n "$SMALL" ]; then
    export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
    [ -n "${MODEL:-}" ] || export HF_HUB_OFFLINE=1
    paper MODEL= SFT_MODEL= SEEDS=1 TASKS=gsm8k DTYPE=float32 BATCH=16 MICRO=8 SFT_LR=7e-4 LR=7e-4 WARMUP=0.1 \
        SFT_EPOCHS=4 EPOCHS=2 EPOCHS_1=1 EPOCHS_2=2 SPIN_LR=1e-4 SPIN_BATCH=16 SPIN_BETAS=1 SPIN_EPOCHS=1 \
        NEFT_EPOCHS=4 NEFT_DATA= DPO_LR=1e-4 DPO_BATCH=16 DPO_BETA=0.1 BASE_STEPS=900 LIMIT=200 TEST_LIMIT=100 GENERATIONS=1 \
        DRAWS=greedy FRACTIONS="20 100" N=8 ALPACA_LIMIT=8 MAX_ANSWER=64 \
        TABLES=8 MODEL_8= MODEL_9= STEPS=2 REPEAT=1 GB=1
fi

# run FILE.py FLAGS: in one process, or in NPROC of them
run() {
    if [ "$NPROC" -gt 1 ]; then "$PYTHON" -m torch.distributed.run --standalone --nproc-per-node "$NPROC" "$@"
    else "$PYTHON" "$@"; fi
}

# logged LOG WORDS COMMAND...: the output goes to LOG; a failure shows its last lines
logged() {
    local log=$1 what=$2 began=$SECONDS
    mkdir -p "$(dirname "$log")"
    if "${@:3}" >> "$log" 2>&1; then echo "    $what ($((SECONDS - began)) s)"
    else
        tail -n 5 "$log" | tr '\r' '\n' | tail -n 3 >&2 # progress bars are long lines
        die "$what failed, see $log"
    fi
}

# files TASK: where DATA has it: prints train file, test file, columns
files() {
    case $1 in
        tldr) echo "summarization/scitldr_a_train.jsonl summarization/scitldr_a_test.jsonl" ;;
        gsm8k | math) echo "$1/train.jsonl $1/test.jsonl" ;;
        ultrachat) echo "qa/dolly_3k.jsonl qa/dolly_3k.jsonl prompt=instruction+input,response=output" ;;
    esac
}

# use TASK: sets task, dir0 and the rows to train and test on: ROWS and TEST (flags), train_file (where it is local)
use() {
    task=$1 model=${MODEL:-} columns='' train_file='' test_file='' ROWS=() TEST=() SHAPE=()
    if [ -n "$DATA" ]; then
        local train test
        [ -d "$DATA" ] || die "DATA=$DATA: no such folder"
        read -r train test columns <<< "$(files "$task")"
        [ -f "$DATA/$train" ] && [ -f "$DATA/$test" ] || die "DATA=$DATA: no $train and $test in it"
        train_file=$DATA/$train test_file=$DATA/$test
        case $SMALL,$task in # short texts: a small model on a CPU
            1,gsm8k | 1,math) SHAPE=(--max-prompt 256 --max-response 160) ;;
            1,tldr) SHAPE=(--max-prompt 256 --max-response 53) ;;
            1,ultrachat) SHAPE=(--max-prompt 192 --max-response 128) ;;
        esac
    elif [ -n "$SMALL" ]; then task=toy; fi
    dir0=$OUT/$task
}

# check [model=NAME]...: all that can be known to go wrong, before any work; makes .venv. ready: and prepares. After `use`.
ready() {
    check "$@"
    prepare
}
check() {
    mkdir -p "$HERE" "$dir0" 2> /dev/null || die "OUT=$OUT cannot be written"
    local free
    free=$(($(df -Pk "$OUT" | awk 'NR == 2 {print $4}') / 1000000))
    [ "$free" -ge "$GB" ] || die "OUT=$OUT has $free GB free, this recipe needs about $GB (GB= sets that)"
    if [ -z "${PYTHON:-}" ]; then
        PYTHON=.venv/bin/python
        bash run.sh setup
    fi
    local wanted=("model=$model")
    [ "$task" = toy ] || wanted+=("train=$task|$train_file|$columns" "test=$task|$test_file|$columns")
    for word; do wanted+=("$word"); done
    "$PYTHON" - "$RECIPE" "${wanted[@]}" << 'END' || exit 2
import sys
from pathlib import Path

sys.argv[0] = sys.argv.pop(1)
import data
import preferences
from core.fsdp import load_tokenizer
from core.kinds import check_kind
from core.ranks import cli, first_line
from core.rows import source_rows
from transformers import AutoConfig


def main():
    for wanted in filter(None, sys.argv[1:]):
        kind, _, value = wanted.partition("=")
        if kind == "model" and value:
            load_tokenizer(value)
            try:
                AutoConfig.from_pretrained(check_kind(value)[-1])
            except Exception as error:
                raise OSError(f"--model {value}: could not be loaded ({first_line(error)})") from None
            if Path(value).is_dir() and not [*Path(value).glob("*.safetensors"), *Path(value).glob("*.bin")]:
                raise OSError(f"--model {value}: no weights in this folder")
        elif kind in ("train", "test"):
            task, path, columns = value.split("|")
            data.load_rows(task, path or None, kind, columns, limit=1)
        elif kind == "preferences":
            hub, split = preferences.PREFERENCES
            rows, source = source_rows(value or None, (hub,), "train" if value else split)
            first = next(iter(rows), {})
            preferences.preference(first, {name: name for name in ("prompt", "chosen", "rejected")}, f"{source}, row 0")


cli(main)
END
}

# sample N SEED FILE: N random training rows of the task (or N%) as a .jsonl file, from `train_file` or the hub
sample() {
    local from="$train_file $([ -z "$train_file" ] || cksum < "$train_file")"
    [ ! -e "$3" ] || [ ! -e "$3.from" ] || [ "$(cat "$3.from")" = "$from" ] ||
        die "$3 was drawn from other rows than those of $train_file: choose another OUT"
    mkdir -p "$(dirname "$3")" && echo "$from" > "$3.from"
    [ -e "$3" ] || "$PYTHON" - "$RECIPE" "$task" "$train_file" "$@" << 'END'
import json, os, random, sys

import data
from core.ranks import cli
from core.rows import source_rows

name, task, path, count, seed, out = sys.argv[1:]


def main():
    spec = data.TASKS[task]
    rows, _ = source_rows(path or None, spec.hub, spec.splits[0])
    rows = list(rows) if path else rows  # a file is read as its rows are asked for
    n = round(len(rows) * float(count[:-1]) / 100) if count.endswith("%") else int(count)
    picked = sorted(random.Random(int(seed)).sample(range(len(rows)), max(1, min(n, len(rows)))))
    os.makedirs(os.path.dirname(out), exist_ok=True)
    with open(out + ".partial", "w", encoding="utf-8") as file:
        file.writelines(json.dumps(rows[i]) + "\n" for i in picked)
    os.rename(out + ".partial", out)


sys.argv[0] = name
cli(main)
END
}

# The task's files, and the small base model, where they are to be made. Sets ROWS and TEST.
prepare() {
    if [ "$task" = toy ]; then
        local problems="--train $LIMIT --test $TEST_LIMIT"
        [ ! -e "$dir0/data.flags" ] || [ "$(cat "$dir0/data.flags")" = "$problems" ] ||
            die "$dir0 has the problems of $(cat "$dir0/data.flags"), not of $problems: choose another OUT"
        [ -e "$dir0/data" ] || {
            "$PYTHON" toy.py data --out "$dir0/data" $problems
            echo "$problems" > "$dir0/data.flags"
        }
        train_file=$dir0/data/train.jsonl test_file=$dir0/data/test.jsonl
    elif [ "$task" = ultrachat ] && [ -n "$DATA" ]; then # one file: its last 300 rows are the test set
        head -n -300 "$train_file" > "$dir0/train.jsonl"
        tail -n 300 "$test_file" > "$dir0/test.jsonl"
        train_file=$dir0/train.jsonl test_file=$dir0/test.jsonl
    fi
    if [ "$task" != toy ] && [ "${LIMIT:-0}" -gt 0 ]; then
        sample "$LIMIT" 0 "$dir0/rows-$LIMIT.jsonl"
        train_file=$dir0/rows-$LIMIT.jsonl
    fi
    [ -z "$train_file" ] || ROWS=(--data "$train_file")
    [ -z "$test_file" ] || TEST=(--data "$test_file")
    [ -z "$columns" ] || { ROWS+=(--columns "$columns"); TEST+=(--columns "$columns"); }
    TEST+=(--split test --limit "${TEST_LIMIT:-0}" "${SHAPE[@]}")
    if [ -z "$model" ]; then
        model=$dir0/base
        if [ "$task" = toy ]; then
            [ -e "$model" ] || logged "$dir0/base.log" "base model" "$PYTHON" toy.py base --out "$model" --steps "$BASE_STEPS"
        else
            [ -e "$model" ] || logged "$dir0/base.log" "base model" "$PYTHON" toy.py bytes --out "$model" --text "$train_file"
        fi
    fi
}

# seed_is N: where the models of this seed go, and the flags that all its stages share
seed_is() {
    seed=$1 dir=$dir0/seed-$1 results=$HERE/$task/seed-$1
    FLAGS=(--task "$task" "${ROWS[@]}" "${SHAPE[@]}" --batch-size "$BATCH" --micro-batch-size "$MICRO" --lr "$LR"
        --warmup "$WARMUP" --dtype "$DTYPE" --seed "$1")
    # shellcheck disable=SC2206 # EXTRA is words
    FLAGS+=($EXTRA)
}

# METHODS="bash" takes in bash-1, bash-2 and bash-dpo; sft always runs, the others start from it
wanted() {
    case " ${METHODS:-$1} sft " in *" $1 "* | *" ${1%%-[0-9]*} "* | *" ${1%-dpo} "*) ;; *) return 1 ;; esac
}

# train NAME STAGE.py FLAGS: $dir/NAME. A flag given here overrides the shared one.
train() {
    wanted "$1" || return 0
    logged "$dir/$1.log" "$task, seed $seed: $1" run "$2" "${FLAGS[@]}" "${@:3}" --out "$dir/$1"
}

# measure NAME [FLAGS]: the model $dir/NAME (or --model) on the test rows; remembered for `table`
RESULTS=()
measure() {
    wanted "$1" || return 0
    local out=$results/$1
    logged "$results/$1.log" "$task, seed $seed: $1 measured" run evaluate.py run --model "$dir/$1" --task "$task" \
        "${TEST[@]}" --name "$1" --seed "$seed" --dtype "$DTYPE" --out "$out" ${SMALL:+--generations 1} "${@:2}"
    if [ "$task" = tldr ] && [ -n "${JUDGE_URL:-}" ]; then
        logged "$results/$1.log" "$task, seed $seed: $1 judged" "$PYTHON" tools/judge.py "$out" \
            --judge-url "$JUDGE_URL" --judge-model "${JUDGE_MODEL:-gpt-4-turbo}"
    fi
    RESULTS+=("$out/results.json")
}

# one_round [FLAGS of measure]: Tables 1 and 3: SFT and NEFTune, from SFT each method once, and all of them measured
one_round() {
    train sft sft.py --model "$model" --lr "$SFT_LR" --epochs "$SFT_EPOCHS"
    train neftune sft.py --model "$model" --lr "$SFT_LR" --epochs "$SFT_EPOCHS" --neftune-alpha 5
    train sft-more sft.py --model "$dir/sft" --epochs "$EPOCHS"
    local beta name
    for beta in $SPIN_BETAS; do
        train "spin-$beta" spin.py --model "$dir/sft" --epochs "$EPOCHS" --lr "$SPIN_LR" --batch-size "$SPIN_BATCH" \
            --beta "$beta"
    done
    train bash bash.py --model "$dir/sft" --epochs "$EPOCHS" --beta 0.2
    train rac rac.py --model "$dir/sft" --epochs "$EPOCHS"
    for name in sft neftune sft-more $(printf 'spin-%s ' $SPIN_BETAS) bash rac; do
        measure "$name" "$@"
    done
}

# alpaca NAME [MODEL]: the outputs files of alpaca_eval, one for each of DRAWS: at temperature 0.7, or greedy
alpaca() {
    wanted "$1" || return 0
    local g temperature out
    for g in $DRAWS; do
        temperature=0.7 out=$HERE/alpaca/seed-$seed/$1-$g.json
        [ "$g" != greedy ] || temperature=0
        [ -e "$out" ] || logged "$HERE/alpaca/log" "$1: answers for alpaca_eval, $g" run evaluate.py alpaca \
            --model "${2:-$dir/$1}" --data "$ALPACA" --instruction "$INSTRUCTION" --name "$1" --out "$out" --dtype "$DTYPE" \
            --temperature "$temperature" --seed "${g/greedy/0}" --limit "${ALPACA_LIMIT:-0}" \
            --max-response "${MAX_ANSWER:-2048}"
    done
}

# SMALL has no preferences: the reference is preferred to the SFT model's own answer
small_preferences() { # sets pairs, of this seed
    pairs=$dir/preferences.jsonl
    [ -e "$pairs" ] && return
    [ -e "$dir/answers.jsonl" ] || logged "$dir/answers.log" "$task, seed $seed: rejected answers" run generate.py \
        --model "$sft" --task "$task" "${ROWS[@]}" "${SHAPE[@]}" --limit 100 --seed "$seed" --out "$dir/answers.jsonl"
    "$PYTHON" - "$task" "$train_file" "$columns" "$dir/answers.jsonl" "$pairs" << 'END'
import json, os, sys

import data
from core.rows import read

task, path, columns, answers, out = sys.argv[1:]
rows = {row["id"]: row for row in data.load_rows(task, path, "train", columns)}
with open(out + ".partial", "w", encoding="utf-8") as file:
    for answer in read(answers):
        row, z = rows[answer["id"]], answer["responses"][0].strip()
        if z and z != row["response"].strip():
            file.write(json.dumps({"prompt": row["prompt"], "chosen": row["response"], "rejected": z}) + "\n")
os.rename(out + ".partial", out)
END
}

# ---- general QA: what Tables 2, 4 and 6 and Figs. 2 and 4 share, so that they train the same models ----
qa_settings() {
    [ -z "$DATA" ] || paper NEFT_DATA=
    paper SFT_MODEL=HuggingFaceH4/mistral-7b-sft-beta MODEL=mistralai/Mistral-7B-v0.1 SEEDS=1 DTYPE=bfloat16 BATCH=512 \
        MICRO=8 SFT_LR=5e-6 LR=5e-6 WARMUP=0.1 SFT_EPOCHS=1 EPOCHS_1=1 EPOCHS_2=2 SPIN_LR=5e-7 SPIN_BATCH=64 SPIN_BETAS=0.1 \
        SPIN_EPOCHS=3 NEFT_EPOCHS=1 NEFT_DATA=HuggingFaceH4/ultrachat_200k LIMIT=50000 TEST_LIMIT=1000
    [ -n "$SMALL$EXTRA" ] || EXTRA=--activation-checkpointing
}
qa_ready() { # of a model of one's own, SFT_MODEL= makes the recipe train SFT first
    use ultrachat
    if [ -n "$SFT_MODEL" ]; then model=$SFT_MODEL; fi
    ready "$@"
}
qa_sft() {
    sft=${SFT_MODEL:-$dir/sft}
    [ -n "$SFT_MODEL" ] || train sft sft.py --model "$model" --lr "$SFT_LR" --epochs "$SFT_EPOCHS"
}
# two_iterations NAME STAGE.py FLAGS: two runs in a row, NAME-1 and NAME-2, of [1, 2] epochs; the second draws its own
# data, with the model of the first and with another seed
two_iterations() {
    train "$1-1" "$2" --model "$sft" --epochs "$EPOCHS_1" "${@:3}"
    train "$1-2" "$2" --model "$dir/$1-1" --epochs "$EPOCHS_2" --seed "$((seed + 1000))" "${@:3}"
}

# qa_methods: sft-more, BASH and RAC, two iterations each
qa_methods() {
    two_iterations sft-more sft.py
    two_iterations bash bash.py --beta 0.2
    two_iterations rac rac.py
}

# The instructions of AlpacaEval 2.0 (SMALL: the test prompts); ALPACA=file takes another copy
alpaca_data() {
    paper ALPACA= INSTRUCTION=instruction DRAWS="1 2 3 greedy"
    if [ -n "$SMALL" ] && [ -z "$ALPACA" ]; then
        ALPACA=$test_file INSTRUCTION=prompt
        [ "$task" = toy ] || INSTRUCTION=instruction
    elif [ -z "$ALPACA" ]; then
        ALPACA=$("$PYTHON" -c 'import huggingface_hub as hub
print(hub.hf_hub_download("tatsu-lab/alpaca_eval", "alpaca_eval.json", repo_type="dataset"))' 2> /dev/null) ||
            die "alpaca_eval.json cannot be downloaded from tatsu-lab/alpaca_eval; give a copy: ALPACA=alpaca_eval.json"
    fi
    [ -f "$ALPACA" ] || die "ALPACA=$ALPACA: no such file"
}

# begin_table, table [HEADING] [BASELINE], end_table WORDS...: OUT/RECIPE/table.md, and what is still to do
TABLE=$HERE/table.md.partial # until it is whole
begin_table() { printf '# %s\n\n%s\n' "$RECIPE${SMALL:+ (SMALL=1)}" "$*" > "$TABLE"; }
table() {
    local part=$HERE/table-$task${1:+-${1// /-}} baseline=()
    case " ${RESULTS[*]} " in *"/${2:-sft-more}/results.json "*) baseline=(--baseline "${2:-sft-more}") ;; esac
    "$PYTHON" evaluate.py table "${RESULTS[@]}" --out "$part" "${baseline[@]}" > /dev/null
    { [ -z "${1:-}" ] || printf '\n## %s\n' "$1"; echo; cat "$part.md"; } >> "$TABLE"
    RESULTS=()
}
end_table() {
    mv "$TABLE" "$HERE/table.md"
    cat "$HERE/table.md"
    printf '\n%s\n' "This table: $HERE/table.md"
    for line; do echo "$line"; done
}
judge_hint() {
    [ "$task" = tldr ] && [ -z "${JUDGE_URL:-}" ] || return 0
    echo "Win rates: the same command with JUDGE_API_KEY=... JUDGE_URL=https://api.openai.com/v1 JUDGE_MODEL=gpt-4-turbo"
}
alpaca_hint() {
    echo "LC win rates (pip install alpaca_eval; OPENAI_API_KEY), for each file and then the mean over its generations:"
    echo "    alpaca_eval --model_outputs $HERE/alpaca/seed-SEED/NAME-DRAW.json"
}
# plots LABEL RESULTS...: each metric over the --x of `measure`
plots() {
    if have matplotlib; then
        "$PYTHON" tools/show.py plots "${@:2}" --x-label "$1" --out "$HERE/plots" || die "the plots failed"
        echo "Plots: $HERE/plots"
    else
        echo "Plots: pip install matplotlib, then the same command again"
    fi
}
have() { "$PYTHON" -c "import sys, importlib.util as u; sys.exit(not u.find_spec('$1'))"; }
