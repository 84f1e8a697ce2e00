#!/usr/bin/env bash
# Figure 10: DINO on ImageNet and on LAIONet, with all, sampled and few prototypes; linear probes on downstream sets.
#
# Paper, mean of 12 sets (%): ImageNet K = 65,536 60.8; LAIONet K = 65,536 56.7, sampled S = 1024 58.0, 4096 59.1,
# 16384 60.0, a fixed K = 16,384 about 57.1. ImageNet / LAIONet / S = 16384: aircraft 27.0 / 26.7 / 32.2, birdsnap 37.1
# / 24.6 / 31.2, caltech 82.3 / 77.8 / 79.4, cars 23.6 / 24.6 / 25.2, cifar10 86.4 / 83.5 / 85.4, cifar100 62.9 / 60.0
# / 63.9, dtd 68.7 / 67.1 / 70.2, flowers 80.8 / 79.3 / 79.1, food 55.8 / 48.6 / 54.3, pets 66.4 / 55.5 / 62.2, sun397
# 57.0 / 55.4 / 57.7, voc07 81.6 / 77.3 / 79.0.
#
# Deviations:
#  1. VOC07 is left out: a table has one label an image here. An .npz with labels [N, C] goes into `evaluate.py probe`;
#     without it the mean is over 11 sets: theirs is then ImageNet 58.9, LAIONet 54.8, S = 1024 56.2, 4096 57.3, 16384
#     58.3.
#  2. Learning rate to 0 (theirs 1e-6); CLIP's mean and deviation in pre-training and probe (theirs: ImageNet's in the
#     one, OpenAI's in the other); logistic regression to its optimum (theirs: 100 iterations).
#  3. Rows that a step does not draw do not move (theirs: momentum and weight decay did).
#  4. RN50 starts as CLIP's does, with residual branches off (theirs: torch's defaults), in all runs.
# Faults avoided: prototypes are drawn from (seed, step), equal on all GPUs and after a resume by construction; all
# runs train the prototypes from the first step (theirs froze the last layer for an epoch in the vanilla runs only);
# ImageNet is pre-trained at batch 1024 too, on train without val. LAIONet still has 2.5 times the images at equal
# epochs.
#
# In: fig2.sh; TRANSFER: class folders SET/train, SET/test, and SET/val for aircraft, dtd and flowers. GPUS=8, as in
# the paper, or any number: batch norm is over all. Not run yet on the real data; every line is parsed by
# tests/test_paper_recipes.py.
set -euo pipefail
cd "$(dirname "$0")/../.."
ROOT=${ROOT:-data/imagenet} TRANSFER=${TRANSFER:-data/transfer} OUT=${OUT:-runs/paper} GPUS=${GPUS:-8}

dino() { # NAME FLAGS: the paper's DINO; Sinkhorn instead of centering in all runs
  torchrun --nproc-per-node "$GPUS" dino_laionet.py --root "$ROOT" --arch RN50 --batch-size 1024 --epochs 100 \
    --optimizer sgd --lr 0.12 --weight-decay 1e-4 --clip-grad 3.0 --precision fp16 --no-head-bn --centering sinkhorn \
    --student-temp 0.1 --teacher-temp 0.04 --ema 0.996 --augment dino --crop-aspect 1.3333 --global-size 224 \
    --global-scale 0.14 1 --local-crops 8 --local-size 96 --local-scale 0.05 0.14 --no-baselines \
    --out "$OUT/$1" "${@:2}"
}

# Ten epochs of warm-up: 3,180 steps each on LAIONet, 1,251 on ImageNet.
dino dino/imagenet --data imagenet --prototypes 65536 --warmup-steps 12510
dino dino/laionet --data laionet --prototypes 65536 --warmup-steps 31800
dino dino/laionet_fixed_16384 --data laionet --prototypes 16384 --warmup-steps 31800
for S in 1024 4096 16384; do
  dino dino/laionet_sampled_$S --data laionet --prototypes 65536 --sample-prototypes $S --warmup-steps 31800
done

# Features of the frozen teacher, and logistic regression on them: 45 strengths, chosen on val or a fifth of train.
models=(imagenet laionet laionet_fixed_16384 laionet_sampled_1024 laionet_sampled_4096 laionet_sampled_16384)
for set in aircraft birdsnap caltech cars cifar10 cifar100 dtd flowers food pets sun397; do
  parts="train test"
  case $set in aircraft | dtd | flowers) parts="train val test" ;; esac
  for part in $parts; do
    python build_datasets.py index "$TRANSFER/$set/$part" --out "$TRANSFER/$set/${set}_$part.tsv"
  done
  for model in "${models[@]}"; do
    python dino_laionet.py --eval-only "$OUT/dino/$model/checkpoint.pt" --root "$TRANSFER/$set" --no-baselines \
      --probe-set "$TRANSFER/$set/${set}_train.tsv" --eval-sets $(printf "${set}_%s.tsv " $parts) \
      --out "$OUT/transfer/$model"
  done
done
python evaluate.py probe "${models[@]/#/$OUT/transfer/}" --sweep transfer --device cuda --json "$OUT/fig10.json" \
  --plot "$OUT/fig10.png"

# Context: of the published models' prototypes only about 800 to 3,400 are distinct (1,078 of 65,536 in DINO's ViT-S).
for model in "${models[@]}"; do
  python evaluate.py prototypes "$OUT/dino/$model/checkpoint.pt" --eps 0.025 --device cuda \
    --json "$OUT/fig10_prototypes_$model.json"
done
