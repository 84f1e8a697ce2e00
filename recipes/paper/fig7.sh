#!/usr/bin/env bash
# Figure 7: what large models fail on: Spearman of each class's collapse metrics with its accuracy and its frequency,
# over the models of figure 1b; and t-SNE of class vectors.
#
# Paper, LAIONet-3M, CC-12M, YFCC-15M, LAION-400M, MetaCLIP-400M, LAION-2B, MetaCLIP-2.5B: rho(acc, NC2_M) -.34, -.42,
# -.49, -.32, -.30, -.30, -.29; rho(acc, NC1) .08, .05, .10, -.10, -.16, -.15, -.19; rho(acc, NC2_W nn) -.03, .00,
# -.02, -.21, -.24, -.26, -.27; rho(freq, NC2_W) .35, .25, .18, .62, .62, .69, .62. t-SNE is only looked at.
#
# Deviations: fewer checkpoints (see fig1b.sh). t-SNE of the class vectors of 80 prompts and of 50 images of each of 25
# frequent and 8 rare classes, as in the paper; other classes are drawn. The t-SNE of all 1000 classes' image means is
# left out.
# Faults avoided: class vectors are given centred too, uncentred NC2_W mostly measures their common mean; the t-SNE
# model's QuickGELU weights run with QuickGELU; NC1 without C matrices of D x D (4.2 GB in theirs).
#
# In: fig1a.sh, fig1b.sh; pip install scikit-learn. Not run yet on the real data; every line is parsed by
# tests/test_paper_recipes.py.
set -euo pipefail
cd "$(dirname "$0")/../.."
ROOT=${ROOT:-data/imagenet} OUT=${OUT:-runs/paper}

python evaluate.py collapse "$OUT"/scale/scratch_[12]/val.npz --json "$OUT/fig7_laionet.json" \
  --plot "$OUT/fig7_laionet.png"
for data in cc12m yfcc15m laion400m metaclip_400m laion2b metaclip_fullcc; do
  python evaluate.py collapse "$OUT/public/$data"/*/val.npz --counts "$ROOT/counts/$data.tsv" \
    --json "$OUT/fig7_$data.json" --plot "$OUT/fig7_$data.png"
done
python evaluate.py prototypes "$OUT/public/laion400m/ViT-B-32/val.npz" --counts "$ROOT/counts/laion400m.tsv" --tsne \
  --samples 50 --seed 0 --json "$OUT/fig7_tsne.json" --plot "$OUT/fig7_tsne.png"
