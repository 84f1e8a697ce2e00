#!/usr/bin/env bash
# Figure 4: imbalance, distribution shift and diversity: cuts of LAIONet of the size of ImageNet-Captions.
#
# Paper, threshold .7, .75, .8, .82, then =freq, then ImageNet-Captions. Scratch: top-1 15.0, 16.1, 17.3, 17.8, 24.6,
# 34.2, corr_acc .554, .582, .598, .639, .290, .277. Frozen text: top-1 23.2, 23.05, 22.7, 22.2, 32.35, 40.75, corr_acc
# .296, .337, .415, .432, .260, .360. Gini .785, .782, .780, .780, .241, .221. Modes of the similarity inside a class
# (4a): .60 at .7, .62 =freq, .67 at .8, .68 at .82, .75 in ImageNet-Captions.
#
# Deviations:
#  1. =freq has only what LAIONet at .7 has (the paper: 416,489 rows, since captions that lacked were looked up in
#     LAION by text similarity); a table of such rows goes to `subset --fill`.
#  2. One row for each class that a cut would lose, as in theirs; rows are chosen by a hash, so cuts lie inside each
#     other.
#  3. Features are gathered with gradient; what an epoch leaves over begins the next batch (theirs dropped it).
#  4. Text towers from scratch have QuickGELU, as the frozen ones of OpenAI have (theirs GELU).
# Faults avoided: the match of frequencies is seeded; no image is compared with itself (their spike at 1).
#
# In: fig2.sh, and fig3_captions.sh for the runs on ImageNet-Captions. Not run yet on the real data; every line is
# parsed by tests/test_paper_recipes.py.
set -euo pipefail
cd "$(dirname "$0")/../.."
ROOT=${ROOT:-data/imagenet} OUT=${OUT:-runs/paper} GPUS=${GPUS:-4}
ROWS=${ROWS:-448896} # of each cut; fewer, if fewer images of .82 are still online

clip() { # NAME FLAGS: the paper's CLIP
  torchrun --nproc-per-node "$GPUS" clip.py --root "$ROOT" --arch RN50 --batch-size 1024 --epochs 32 --lr 1e-3 \
    --weight-decay 0.2 --beta2 0.999 --warmup-steps 500 --precision fp16 --templates "$ROOT/templates.txt" \
    --activation quick_gelu --out "$OUT/$1" "${@:2}"
}

for threshold in 0.70 0.75 0.80 0.82; do
  python build_datasets.py subset "$ROOT/laionet/train.tsv" --threshold "similarity=$threshold" --rows "$ROWS" \
    --seed 42 --out "$ROOT/cuts/laionet_t${threshold#0.}.tsv"
done
python build_datasets.py subset "$ROOT/laionet/train.tsv" --match-frequency "$ROOT/incaps/train.tsv" --seed 42 \
  --out "$ROOT/cuts/laionet_freq.tsv"
python build_datasets.py stats "$ROOT"/cuts/laionet_{t70,t75,t80,t82,freq}.tsv "$ROOT/incaps/train.tsv" \
  --classes "$ROOT/classes.tsv" --out "$ROOT/cuts/stats.tsv" --plot "$OUT/fig4a_counts.png"

# 4a: cosines of OpenAI's RN50 between images of a class, each cut beside ImageNet-Captions, each image of it once.
python build_datasets.py dedup "$ROOT/incaps/train.tsv" --by image --out "$ROOT/cuts/incaps.tsv"
python clip.py --eval-only "$ROOT/clip.pt" --root "$ROOT" --data none --out "$OUT/similarity" \
  --eval-sets "$ROOT"/cuts/laionet_{t70,t75,t80,t82,freq}.tsv "$ROOT/cuts/incaps.tsv"
for cut in t70 t75 t80 t82 freq; do
  python evaluate.py similarity "$OUT/similarity/laionet_$cut.npz" "$OUT/similarity/incaps.npz" --max-images 100 \
    --pairs 4950 --json "$OUT/fig4a_$cut.json" --plot "$OUT/fig4a_$cut.png"
done

# 4b
for cut in t70 t75 t80 t82 freq; do
  clip "diversity/$cut" --data "$ROOT/cuts/laionet_$cut.tsv"
  clip "diversity/${cut}_frozen" --data "$ROOT/cuts/laionet_$cut.tsv" --text-head frozen
done
for text in "" _frozen; do
  series=${text:1}
  python evaluate.py report "${series:-scratch}/0.70=$OUT/diversity/t70$text" \
    "${series:-scratch}/0.75=$OUT/diversity/t75$text" "${series:-scratch}/0.80=$OUT/diversity/t80$text" \
    "${series:-scratch}/0.82=$OUT/diversity/t82$text" "${series:-scratch}/freq=$OUT/diversity/freq$text" \
    "${series:-scratch}/incaps=$OUT/captions/full$text" --out "$OUT/fig4b${text}.html"
done
