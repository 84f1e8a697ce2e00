#!/usr/bin/env bash
# Figure 9: why the zero-shot tail of 50 classes works: (a) cosines of class vectors, head and tail; (b) accuracy and
# number of predictions of each tail class.
#
# Paper (a), mean cosine head-head / head-tail / tail-tail: SL .01 / .01 / .86 (the vectors that are never a target
# fall together), frozen CLIP head .59 / .48 / .42. (b): SL 0 in all; frozen head mean accuracy 1.8 %, largest about
# 16 %; with a sampled vocabulary mean 15.0 %, several classes at 40 to 62 %, up to 95 predictions of a class with 50
# images.
#
# Deviations: another 50 of the 950 head classes are drawn.
# Faults avoided: the frozen head is compared at the vocabulary's batch size and learning rate too (see fig8.sh).
#
# In: fig8.sh, k = 50, zero-shot. Not run yet on the real data; every line is parsed by tests/test_paper_recipes.py.
set -euo pipefail
cd "$(dirname "$0")/../.."
OUT=${OUT:-runs/paper}
runs=$OUT/tail/50_shots0

for name in sl sl_frozen sl_frozen_vocabulary; do
  python evaluate.py prototypes "$runs/$name/val.npz" --tail 50 --seed 42 --json "$OUT/fig9a_$name.json" \
    --plot "$OUT/fig9a_$name.png"
done
python evaluate.py imbalance "$runs"/{sl,sl_frozen,sl_frozen_large_batch,sl_frozen_vocabulary}/val.npz \
  --tail-classes 50 --json "$OUT/fig9b.json" --plot "$OUT/fig9b.png"
