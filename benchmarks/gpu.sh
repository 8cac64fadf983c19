#!/usr/bin/env bash
# One call on a GPU that measures everything, in order of value. Each part has a time limit and a file of its own, which
# it writes again after every measurement: a cut loses what was running, and nothing else.
#
#     bash benchmarks/gpu.sh                       all parts: about ten minutes on one GPU of 80 GB
#     SMALL=1 bash benchmarks/gpu.sh               the same path on a CPU, tiny: some minutes, numbers that mean nothing
#     python benchmarks/gpu.py report results/gpu/*.json         the table; writes it into docs/speed.md
#
#     1 equality   2 joint (Tables 8 and 9)   3 decoding (and mixing)   4 sft (against TRL)   5 study   6 profile
#
# Needs torch, transformers, numpy, tqdm, pyarrow and this repository; no network, and no data: rows are made here.
# Override with environment variables:
#     OUT=results/gpu    where the files go (SMALL: out-gpu-small)     PARTS="1 3"     some of the parts, in this order
#     LIMIT_1=100 ...    seconds for a part             ONLY="SCS|joint"  some rows of a part, by their names
#     PYTHON             the interpreter (default: .venv's or python3)
#     MODEL=FOLDER       of part 5: a small pretrained model, such as tools/smollm2.py makes (SEEDS, TRAIN, ... as in
#                        run.sh). Without it, or without the package datasets, the part says so and ends.
#     WHEELS=FOLDER      wheels that the machine lacks: trl and datasets for part 4, datasets for part 5
#
# What has to travel where a call takes 64 MiB, and the machine has no network:
#     wheels    pip download --no-deps --only-binary=:all: -d wheels trl datasets dill multiprocess
#               (some 2 MiB; the machine's Python and platform: --python-version, --platform)
#     weights   tar c -C runs smollm2 | zstd | split -b 60M - weights.           one piece a call, all to one machine:
#               the last call joins them:   cat weights.* | zstd -d | tar x -C runs && MODEL=runs/smollm2 bash benchmarks/gpu.sh
#               (in bfloat16 a model of 135M parameters takes 270 MB; the wheel of tools/smollm2.py, 95 MB, is smaller)
set -uo pipefail
cd "$(dirname "$0")/.."
if [ -z "${PYTHON:-}" ]; then
    PYTHON=python3
    [ ! -x .venv/bin/python ] || PYTHON=.venv/bin/python
fi
case ${SMALL:-} in
    '' | 0) SIZE=full OUT=${OUT:-results/gpu} ;;
    1) SIZE=small OUT=${OUT:-out-gpu-small} ;;
    tiny) SIZE=tiny OUT=${OUT:-out-gpu-small} ;;
    *) echo "gpu.sh: SMALL is 1 or unset, not $SMALL" >&2; exit 2 ;;
esac
PARTS=${PARTS:-1 2 3 4 5 6}
NAMES=(- equality joint decoding sft study profile)
LIMITS=(- 70 150 170 110 60 40) # ten minutes in all
export HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false PYTHONUNBUFFERED=1
scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT
mkdir -p "$OUT"
if [ -n "${WHEELS:-}" ]; then
    "$PYTHON" -m pip install -q --no-index --no-deps --no-compile --target "$scratch/site" "$WHEELS"/*.whl || exit 2
    export PYTHONPATH=$scratch/site${PYTHONPATH:+:$PYTHONPATH}
fi
study() { # the toy's sums by a pretrained model
    if [ ! -d "${MODEL:-}" ]; then echo "study: not run, MODEL names no folder"; return; fi
    if ! "$PYTHON" -c "import datasets"; then echo "study: not run, the package datasets is not installed"; return; fi
    OUT=$scratch/study JOBS=${JOBS:-1} bash run.sh real
}
export -f study
export PYTHON MODEL OUT scratch
echo "gpu.sh: parts $PARTS, size $SIZE, into $OUT"
: > "$OUT/gpu.log"
for part in $PARTS; do
    name=${NAMES[$part]:-} limit=LIMIT_$part
    if [ -z "$name" ] || [ "$part" = 0 ]; then echo "gpu.sh: there is no part $part" >&2; exit 2; fi
    if [ $SIZE = full ]; then limit=${!limit:-${LIMITS[$part]}}; else limit=${!limit:-300}; fi
    began=$SECONDS
    if [ "$name" = study ]; then command=(bash -c study)
    else command=("$PYTHON" benchmarks/gpu.py "$name" --out "$OUT/$name.json" --size $SIZE); fi
    timeout -k 5 "$limit" "${command[@]}" > "$scratch/log" 2>&1
    code=$?
    if [ "$name" = study ] && results=("$scratch"/study/seed-*/*/eval/results.json) && [ -e "${results[0]}" ]; then
        "$PYTHON" evaluate.py table "${results[@]}" --out "$OUT/study" >> "$scratch/log" 2>&1 # of what there is
    fi
    { echo "== $name"; cat "$scratch/log"; } >> "$OUT/gpu.log"
    grep "^$name: " "$scratch/log"
    case $code in
        0) echo "== $name: done in $((SECONDS - began)) s" ;;
        124 | 137) echo "== $name: cut after $limit s; what it had measured is in $OUT" ;;
        *) echo "== $name: ended with $code after $((SECONDS - began)) s:"; tail -n 3 "$scratch/log" ;;
    esac
done
shopt -s nullglob
files=("$OUT"/{equality,joint,decoding,sft,profile}.json)
existing=()
for file in "${files[@]}"; do [ ! -e "$file" ] || existing+=("$file"); done
[ ${#existing[@]} = 0 ] || "$PYTHON" benchmarks/gpu.py report "${existing[@]}"
