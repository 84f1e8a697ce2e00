#!/usr/bin/env bash
# Figure 13: accuracy and number of predictions in bins of class frequency, for models of YFCC-15M and of LAION.
#
# Paper: no numbers, code or bin edges are published, only that a weak trend remains at 400 million images and more,
# much weaker than supervised learning's. SL beside it (figure 1b, YFCC-15M): corr_acc .639, corr_pred .825; CLIP .340,
# .126.
#
# Deviations: 10 bins with equal numbers of classes, mean and deviation over classes, then over models; the edges of
# the paper's are unknown. YFCC-15M has one checkpoint of an architecture that clip.py loads.
# Faults avoided: YFCC's checkpoint runs with its own activation (QuickGELU).
#
# In: fig1a.sh, fig1b.sh. Not run yet on the real data; every line is parsed by tests/test_paper_recipes.py.
set -euo pipefail
cd "$(dirname "$0")/../.."
ROOT=${ROOT:-data/imagenet} OUT=${OUT:-runs/paper}

for data in yfcc15m laion400m laion2b; do
  python evaluate.py imbalance "$OUT/public/$data"/*/val.npz --counts "$ROOT/counts/$data.tsv" --bins 10 --equal-count \
    --json "$OUT/fig13_$data.json" --plot "$OUT/fig13_$data.png"
done
python evaluate.py imbalance "$OUT/sl/yfcc_cls/val.npz" --counts "$ROOT/counts/yfcc15m.tsv" --bins 10 --equal-count \
  --json "$OUT/fig13_sl.json" --plot "$OUT/fig13_sl.png"
