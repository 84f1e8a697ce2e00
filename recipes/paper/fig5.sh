#!/usr/bin/env bash
# Figure 5: data scale and text head: LAIONet at 1/32 to 1, four text towers, with neural collapse; one SL run.
#
# Paper, .10, .20, .41, .81, 1.63, 3.26 M images. Scratch: top-1 3.2, 7.6, 14.0, 21.7, 30.0, 38.0, corr_acc .414, .520,
# .535, .536, .524, .494. CLIP's weights, trained on: 6.0, 10.7, 16.5, 23.8, 31.9, 38.8; .422, .548, .514, .535, .498,
# .472. Frozen CLIP: 10.4, 15.7, 22.2, 29.3, 38.0, 45.0; .324, .328, .296, .278, .266, .258. Frozen RoBERTa: 2.4, 4.2,
# 7.2, 12.0, 20.8, 30.7; .284, .370, .486, .558, .608, .624. SL with frozen CLIP head, 3.26 M: 33.3; .678. NC1 / NC2_M
# at 3.26 M: .85 / .168, .9 / .163, 9.7 / .144, 2.5 / .197, SL 4.1 / .169.
#
# Deviations:
#  1. RoBERTa's sentence vectors are made once, without dropout (theirs stayed active), and its LayerNorms are
#     untouched; the two layers behind it, 768 -> 896 -> 1024, are trained as in theirs.
#  2. Its class vector is the projected mean of the 80 prompts (theirs: the mean of the projected ones).
#  3. Correlations near the floor (scratch at .10 M: 3.2 %) say little, in theirs too.
#  4. SL: decay on matrices only, cosine by step, evaluated at resize 224 (theirs: on all parameters, by epoch, 256).
#  5. Features are gathered with gradient; what an epoch leaves over begins the next batch (theirs dropped it).
#  6. Text towers from scratch have QuickGELU, as the frozen ones of OpenAI have (theirs GELU).
# Faults avoided: SL has a seed; cosine and step are not exchanged; collapse of classes without test images is not 0/0.
#
# In: fig2.sh; pip install transformers. Not run yet on the real data; every line is parsed by
# tests/test_paper_recipes.py.
set -euo pipefail
cd "$(dirname "$0")/../.."
ROOT=${ROOT:-data/imagenet} OUT=${OUT:-runs/paper} GPUS=${GPUS:-4}

clip() { # NAME FLAGS: the paper's CLIP
  torchrun --nproc-per-node "$GPUS" clip.py --root "$ROOT" --arch RN50 --batch-size 1024 --epochs 32 --lr 1e-3 \
    --weight-decay 0.2 --beta2 0.999 --warmup-steps 500 --precision fp16 --templates "$ROOT/templates.txt" \
    --activation quick_gelu --out "$OUT/$1" "${@:2}"
}
sl() { # NAME FLAGS: the paper's SL; batch norm is each process's own, so 4 GPUs are part of it; lr 0.1 * batch / 256
  torchrun --nproc-per-node "$GPUS" sl_vocab_subsample.py --root "$ROOT" --arch RN50 --batch-size 256 --epochs 90 \
    --optimizer sgd --weight-decay 1e-4 --warmup-steps 0 --bn local --precision fp32 --out "$OUT/$1" "${@:2}"
}
roberta() { # TABLE OUT: mean-pooled vectors of roberta-base, OUT.npy of the captions, OUT.classes.npy of the classes
  python - "$1" "$2" "$ROOT" <<'PY'
import csv, sys
import numpy as np, torch
from transformers import AutoModel, AutoTokenizer

table, out, root = sys.argv[1:]
tokenizer = AutoTokenizer.from_pretrained("roberta-base")
model = AutoModel.from_pretrained("roberta-base", add_pooling_layer=False).eval().cuda()


def column(path, name):
    with open(path, encoding="utf-8", newline="") as file:
        return [row[name] for row in csv.DictReader(file, delimiter="\t", quoting=csv.QUOTE_NONE)]


@torch.no_grad()
def vectors(texts):
    features = np.empty((len(texts), 768), np.float16)
    order = sorted(range(len(texts)), key=lambda i: len(texts[i]))  # texts of one length need little padding
    for start in range(0, len(order), 1024):
        rows = order[start : start + 1024]
        tokens = tokenizer([texts[i] for i in rows], padding=True, truncation=True, max_length=77, return_tensors="pt")
        tokens = tokens.to("cuda")
        mask = tokens["attention_mask"][..., None]
        features[rows] = ((model(**tokens).last_hidden_state * mask).sum(1) / mask.sum(1)).cpu().numpy()
    return features


np.save(f"{out}.npy", vectors(column(table, "caption")))
prompts = open(f"{root}/templates.txt", encoding="utf-8").read().split("\n")
names = column(f"{root}/classes.tsv", "name")
each = vectors([prompt.strip().replace("{}", name) for name in names for prompt in prompts if prompt.strip()])
np.save(f"{out}.classes.npy", each.reshape(len(names), -1, 768).astype(np.float32).mean(1))
PY
}

for part in 1:1 2:0.5 4:0.25 8:0.125 16:0.0625 32:0.03125; do
  n=${part%:*} table=$ROOT/laionet/train.tsv
  if [ "$n" != 1 ]; then
    table=$ROOT/cuts/laionet_$n.tsv
    python build_datasets.py subset "$ROOT/laionet/train.tsv" --fraction "${part#*:}" --seed 42 --out "$table"
  fi
  roberta "$table" "$ROOT/cuts/roberta_$n"
  clip "scale/scratch_$n" --data "$table"
  clip "scale/finetune_$n" --data "$table" --text-head finetune
  clip "scale/frozen_$n" --data "$table" --text-head frozen
  clip "scale/roberta_$n" --data "$table" --text-head frozen \
    --text-embeddings "$ROOT/cuts/roberta_$n.npy" "$ROOT/cuts/roberta_$n.classes.npy"
done
sl scale/sl_frozen_1 --data "$ROOT/laionet/train.tsv" --head frozen

runs=()
for head in scratch finetune frozen roberta; do
  for size in 32:0.10M 16:0.20M 8:0.41M 4:0.81M 2:1.63M 1:3.26M; do
    runs+=("$head/${size#*:}=$OUT/scale/${head}_${size%:*}")
  done
done
python evaluate.py report "${runs[@]}" sl/3.26M="$OUT/scale/sl_frozen_1" --out "$OUT/fig5.html" \
  --markdown "$OUT/fig5.md"
python evaluate.py collapse "$OUT"/scale/*/val.npz --json "$OUT/fig5_collapse.json"
