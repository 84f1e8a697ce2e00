#!/usr/bin/env bash
# Figure 14: the frequencies agree with those of Parashar et al. (2024), who let a language model judge which captions
# mean the class.
#
# Paper, Spearman on LAION-400M / LAION-2B: ImageNet .834 / .838 (1000 classes), CUB .957 / .949 (179), Food .902 /
# .921 (101), Pets .848 / .831 (31), Flowers .824 / .816 (97), DTD .487 / .514 (46), EuroSAT .863 / .875 (10). Ours are
# larger, in the median by a factor of 1.7 to 1.8 on ImageNet, of 1.1 to 1.25 elsewhere.
#
# Deviations: the figure has no released code; these are all classes with a name in both. Places365 is not among
# theirs. Their EuroSAT counts satellite captions only, about 1000 times fewer.
# Faults avoided: the share of relevant captions can be judged for one's own counts, with an interval (last lines).
#
# In: fig1a.sh, fig12.sh; JUDGED/laion400m/imagenet.tsv, cub.tsv, ...: their `relevant_total` as columns name (as in
# the set's classes.tsv) and count, and the same in JUDGED/laion2b. Not run yet on the real data; every line is parsed by
# tests/test_paper_recipes.py.
set -euo pipefail
cd "$(dirname "$0")/../.."
ROOT=${ROOT:-data/imagenet} RAW=${RAW:-data/raw} SETS=${SETS:-data/sets} JUDGED=${JUDGED:-data/judged}
OUT=${OUT:-runs/paper} WORDNET=${WORDNET:-/usr/share/wordnet}

for data in laion400m laion2b; do
  pairs=("$ROOT/counts/$data.tsv" "$JUDGED/$data/imagenet.tsv")
  for set in cub food101 pets flowers102 eurosat dtd; do
    pairs+=("$SETS/$set/counts/$data.tsv" "$JUDGED/$data/$set.tsv")
  done
  python evaluate.py concepts agree "${pairs[@]}" --json "$OUT/fig14_$data.json" --plot "$OUT/fig14_$data.png"
done

# Judged by oneself: 100 captions of each class are written to dtd/counts/laion400m_judged.sample.tsv; with its column
# `relevant` filled in (yes or no), as JUDGED/dtd.relevant.tsv, the same command gives estimates with intervals.
judge() {
  python build_datasets.py frequency "$RAW/laion400m" --classes "$SETS/dtd/classes.tsv" --match bag --lemmas nltk \
    --wordnet "$WORDNET" --sample 100 --out "$SETS/dtd/counts/laion400m_judged.tsv" "$@"
}
judge
[ ! -e "$JUDGED/dtd.relevant.tsv" ] || judge --relevance "$JUDGED/dtd.relevant.tsv"
