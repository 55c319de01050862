#!/usr/bin/env bash
# Types the commands behind the tables of docs/results.md:  tests/reproduce.sh DATA [OUT]
# DATA holds tumor/, stroke/ and alzheimer/ as downloaded (docs/data.md). A night on two cores, a
# quarter of an hour on a GPU. Stopped and started again, it goes on where it was: a pretraining from
# its checkpoint, a comparison from its finished fits; a finished result is passed over.
set -euo pipefail
DATA=$(realpath "$1")
OUT=${2:-runs/reproduce}
MAIN="python $(dirname "$0")/../main.py"
RECIPE="--batch-size 128 --lr 1e-3 --temperature 0.2"

finished() { [ -e "$OUT/$1/metrics.json" ] || [ -e "$OUT/$1/table.md" ]; }

pretrain() { # name, folder, flags
    name=$1 folder=$2
    shift 2
    $MAIN pretrain --data "$folder" --out "$OUT/$name" "$@"
}

probe() { # encoder, folder, task, head
    name=$4-$3-$1
    finished "$name" ||
        $MAIN probe --data "$2" --task "$3" --head "$4" --encoder "$OUT/$1/encoder.pt" --out "$OUT/$name"
}

for part in tumor stroke alzheimer; do
    $MAIN data --data "$DATA/$part" --out "$OUT/data-$part"
done

# The README's table: one encoder, 100 epochs, and what it is worth with few labels and with all.
pretrain tumor "$DATA/tumor" --epochs 100 $RECIPE
for head in linear cosine_mlp; do
    probe tumor "$DATA/tumor" tumor $head
done
finished compare ||
    $MAIN compare --data "$DATA/tumor" --task tumor --encoder "$OUT/tumor/encoder.pt" \
        --out "$OUT/compare" --label-fractions 0.1 --seeds 3 --epochs 30

# Transfer: the tumor encoder on other diseases; nobody of theirs has been seen by it.
for part in stroke alzheimer; do
    probe tumor "$DATA/$part" $part linear
done

# Temperature: the published 0.07 for the same epochs; two seeds of each.
for temperature in 0.07 0.2; do
    for seed in 0 1; do
        name=temperature-$temperature-$seed
        pretrain $name "$DATA/tumor" --epochs 100 --image-size 64 --batch-size 128 --lr 1e-3 \
            --temperature $temperature --seed $seed
        probe $name "$DATA/tumor" tumor linear
    done
done
