#!/usr/bin/env bash
# The whole study on the shapes world, with the five scripts, for each seed; a seed redraws world and training alike.
#
#   bash recipes/shapes.sh                  # seeds 0, 1 and 2: what has no JSON file yet; a seed took 63 minutes on 2 cores with AMX
#   bash recipes/shapes.sh 3 4              # further seeds
#   ONLY="1 12" bash recipes/shapes.sh 0    # some of the experiments
#                                           # (on a machine with none of the runs: 4 needs 1, 2 and 6 need each other and 1, 7 needs 1 and 6, 10 needs 1 and 2, 12 needs 1 and 4)
#   ONLY="2b 4b 5b 6b 7b 8b 9b 10b 12b" bash recipes/shapes.sh # further arms of the page, which come only by name (2 and 7 have rows of 6b)
#   JOBS=8 bash recipes/shapes.sh           # trainings at a time, a thread each (default: the number of cores); at first beside the pretraining
#
# What a run leaves is results/seedS/NAME.json, a few kB, to be committed: a run that has one is not made again, so the
# study continues on another machine. runs/shapesS/NAME holds the rest; a killed run continues there. At the end
# results/shapes.md and results/*.png are drawn from the JSON files (needs matplotlib), and runs/shapesS/report.html has
# the runs of this machine that make the study's curves, side by side.
set -euo pipefail
cd "$(dirname "$0")/.."
cores=$(env -u OMP_NUM_THREADS nproc) # which follows OMP_NUM_THREADS
jobs=${JOBS:-$cores}
export OMP_NUM_THREADS=1 PYTHON="${PYTHON:-python}"
compile=()
headers='import os, sysconfig; raise SystemExit(not os.path.exists(sysconfig.get_path("include") + "/Python.h"))'
if command -v "${CXX:-g++}" >/dev/null && "$PYTHON" -c "$headers"; then compile=(--compile); fi # takes a sixth off; needs these
SHIFTS=(--eval-sets val v2 sketch rendition objectnet adversarial) # for experiment 10
STEPS_4K=1000 # 32 epochs of 4,000 rows, the paper's number; 15,000 rows get 1,600 steps

# run NAME SCRIPT FLAGS: a training. score NAME "RUNS" COMMAND: numbers from the arrays of these runs (or none); {} is
# the folder of runs, --json is added. Both are only noted here, and carried out by `finish`, some at a time.
run() {
  local name=$1 script=$2
  shift 2
  printf '%s\t%s\n' "$name" "$(printf '%q ' "$PYTHON" "$script" --root "$root" --seed "$seed" --out "$runs/$name" "${compile[@]}" --workers 0 "$@")" >>"$todo/runs"
}
clip() { run "$1" clip.py --eval-sets val v2 "${@:2}"; }
sl() { run "$1" sl_vocab_subsample.py --eval-sets val v2 "${@:2}"; }
dino() { run "$1" dino_laionet.py --transfer auto "${real[@]}" "${@:2}"; }
score() { printf '%s\t%s\t%s\n' "$1" "$2" "${*:3}" >>"$todo/scores"; }
wants() { [[ " ${ONLY:-1 2 3 4 5 6 7 8 9 10 11 12} " == *" $1 "* ]]; }
pretrain() { # ROOT NAME: clip.pt of a world
  [ -e "$1/clip.pt" ] || "$PYTHON" clip.py --root "$1" --data web --steps 2200 --word-dropout 0 --seed "$seed" "${compile[@]}" --workers 0 --out "$runs/$2" --export "$1/clip.pt" >"$runs/$2.log" || { cat "$runs/$2.log"; exit 1; }
}
table() { # NAME COMMAND: a table of the world, made once
  [ -e "$cuts/$1.tsv" ] || "$PYTHON" build_datasets.py "${@:2}" --out "$cuts/$1.tsv" >"$runs/$1.log" || { cat "$runs/$1.log"; exit 1; }
}

one_run() {
  local name=${1%%$'\t'*} command=${1#*$'\t'}
  if [ -e "$results/$name.json" ] && ! grep -qx "$name" "$todo/forced"; then return; fi
  if grep -qs "^FAILED $name:" "$todo/failed"; then return; fi
  mkdir -p "$runs/$name"
  if bash -c "$command" >>"$runs/$name/output.txt" 2>&1 &&
    "$PYTHON" recipes/shapes_results.py compact "$runs/$name" "$results/$name.json" "$command" >"$runs/$name/line.txt" 2>>"$runs/$name/output.txt"; then
    echo "$(date +%H:%M) seed $seed $name $(cat "$runs/$name/line.txt")"
  else
    echo "FAILED $name: $runs/$name/output.txt" | tee -a "$todo/failed"
  fi
}
one_score() {
  IFS=$'\t' read -r name _ command <<<"$1"
  if [ -e "$results/$name.json" ]; then return; fi
  if ! bash -c "${command//\{\}/$runs} --json $runs/$name.json" >"$runs/$name.txt" 2>&1 ||
    ! "$PYTHON" recipes/shapes_results.py shorten "$runs/$name.json" "$results/$name.json" >>"$runs/$name.txt" 2>&1; then
    echo "FAILED $name: $runs/$name.txt" | tee -a "$todo/failed"
  fi
}
finish() { # all that was noted; runs that a missing score needs are made again where their arrays are not here
  local name needs arrays
  export root runs results todo seed
  : >"$todo/forced"
  while IFS=$'\t' read -r name needs _; do
    [ -e "$results/$name.json" ] || for arrays in $needs; do
      [ -e "$runs/$arrays/metrics.json" ] || echo "$arrays" >>"$todo/forced"
    done
  done <"$todo/scores"
  export -f one_run one_score
  xargs -r -P "$jobs" -d '\n' -n 1 bash -c 'one_run "$1"' _ <"$todo/runs"
  xargs -r -P "$jobs" -d '\n' -n 1 bash -c 'one_score "$1"' _ <"$todo/scores"
}
pretraining=
trap 'pkill -P "${pretraining:-none}" 2>/dev/null || true' EXIT # it would outlive an interrupt

for seed in "${@:-0 1 2}"; do for seed in $seed; do
  root=data/study$seed atomic=data/study_atomic$seed runs=runs/shapes$seed results=results/seed$seed
  cuts=$root/cuts todo=$runs/todo
  rm -rf "$todo"
  mkdir -p "$todo" "$results" "$runs"
  : >"$todo/runs"
  : >"$todo/scores"

  # --- the worlds, with captions as bad as alt text, a CLIP pretrained on `web` beside what does not need it, and cuts
  "$PYTHON" build_datasets.py shapes --seed "$seed" --caption-noise 0.065 --out "$atomic" --names atomic &
  "$PYTHON" build_datasets.py shapes --seed "$seed" --caption-noise 0.065 --out "$root"
  wait $!
  pretrain "$root" web &
  pretraining=$!
  mkdir -p "$cuts"
  table eighth subset "$root/laionet/train.tsv" --fraction 0.125 --seed "$seed"
  table quarter subset "$root/laionet/train.tsv" --fraction 0.25 --seed "$seed"
  table half subset "$root/laionet/train.tsv" --fraction 0.5 --seed "$seed"
  for threshold in 0.00 0.25 0.30 0.35; do # all of 4,000 rows; a third of the whole has 0.35
    table "above$threshold" subset "$root/laionet/train.tsv" --threshold "similarity=$threshold" --rows 4000 --seed "$seed"
  done
  table as0.35 subset "$root/laionet/train.tsv" --match-frequency "$cuts/above0.35.tsv" --seed "$seed"
  table matched subset "$root/laionet/train.tsv" --match-frequency "$root/incaps4k/train.tsv" --seed "$seed"
  table as_matched subset "$root/incaps4k/train.tsv" --match-frequency "$cuts/matched.tsv" --seed "$seed"
  # every other shape, with its 5 patterns: the other 60 classes are new words; frequencies do not follow the numbers
  [ -e "$cuts/even.txt" ] || seq 0 119 | awk 'int($1 / 5) % 2 == 0' >"$cuts/even.txt"
  table even subset "$root/laionet/train.tsv" --class-list "$cuts/even.txt" --seed "$seed"
  table as_even subset "$root/laionet/train.tsv" --rows "$(($(wc -l <"$cuts/even.tsv") - 1))" --seed "$seed"
  table yfcc_cls label "$root/yfcc/train.tsv" --classes "$root/classes.tsv"
  for shots in 0 1; do
    table "tail$shots" subset "$root/laionet/train.tsv" --trim-tail 30 --shots "$shots" --seed "$seed"
  done
  table web_all label "$root/web/train.tsv" --classes "$root/classes.tsv"
  table web_cls subset "$cuts/web_all.tsv" --rows 15000 --seed "$seed"
  table web_half subset "$cuts/web_cls.tsv" --rows 7500 --seed "$seed"
  for kind in class synonym; do
    printf '%s\n' "a photo of a {$kind}" "a picture of a {$kind}" "a photo of the {$kind}" "a picture of the {$kind}" "a {$kind}" "the {$kind}" >"$cuts/$kind.txt"
  done

  # --- 9: DINO on balanced and long-tailed images, with sampled and with few prototypes (figure 10, table 1); probed on
  # real pictures too, where scikit-learn and Debian's tuxpaint-stamps-default are installed
  real=()
  if wants 9 || wants 9b; then
    for set in digits stamps; do
      [ -e "data/transfer/$set/test.tsv" ] || "$PYTHON" recipes/transfer_sets.py "$set" || continue
      real+=("data/transfer/$set")
    done
  fi
  if wants 9; then
    dino dino_balanced --data balanced
    dino dino_laionet --no-baselines
    dino dino_sampled_quarter --no-baselines --sample-prototypes 512
    dino dino_fixed_quarter --no-baselines --prototypes 512
  fi

  # --- 9b: a smaller sample, and what the theory says matters, prototypes by images of a batch and the imbalance
  if wants 9b; then
    dino dino_sampled_16th --no-baselines --sample-prototypes 128
    dino dino_many --no-baselines --prototypes 8192
    dino dino_many_sampled --no-baselines --prototypes 8192 --sample-prototypes 2048
    table steep subset "$root/laionet/train.tsv" --profile pareto --imbalance 1000 --seed "$seed"
    table as_steep subset "$root/balanced/train.tsv" --rows "$(($(wc -l <"$cuts/steep.tsv") - 1))" --seed "$seed"
    dino dino_steep_balanced --no-baselines --data "$cuts/as_steep.tsv"
    dino dino_steep --no-baselines --data "$cuts/steep.tsv"
    dino dino_steep_sampled --no-baselines --data "$cuts/steep.tsv" --sample-prototypes 512
  fi

  # --- 1: supervised learning and CLIP on the same images (figure 1b); paper's and matched protocol
  if wants 1; then
    sl sl "${SHIFTS[@]}"
    sl sl_paper --optimizer sgd --lr 0.025 --batch-size 64 --steps 4500 --weight-decay 1e-4 --warmup-steps 0 --bn local
    clip clip "${SHIFTS[@]}"
    clip clip_template --caption "a {class}" --word-dropout 0
  fi

  # --- 12: why: duplicates as negatives make InfoNCE with templates a balanced softmax
  if wants 12; then
    clip clip_template_mask --caption "a {class}" --word-dropout 0 --dup-captions mask
    clip clip_template_soft --caption "a {class}" --word-dropout 0 --dup-captions soft
    clip clip_template_image --caption "a {class}" --word-dropout 0 --directions image
    clip clip_template_image_mask --caption "a {class}" --word-dropout 0 --directions image --dup-captions mask
    sl sl_balanced --loss balanced
    sl sl_adjusted --loss logit-adjusted --tau 0.5
    sl sl_log_q --loss log-q --vocab 32 --vocab-group 32
  fi

  # --- 12b, as all parts with a b asked for by name only: the other direction, and what else is done about long tails
  if wants 12b; then
    clip clip_template_text --caption "a {class}" --word-dropout 0 --directions text
    sl sl_class --sampler class
    sl sl_sqrt --sampler sqrt
    sl sl_focal --loss focal
  fi

  # --- 4: vocabularies in supervised learning (figure 3, crosses)
  few=(--data laionet4k --steps $STEPS_4K)
  if wants 4; then
    for m in 16 32 64; do
      sl "voc_m${m}_g32" --vocab $m --vocab-group 32
    done
    sl voc_m32_g32_even --vocab 32 --vocab-group 32 --vocab-power 0
    sl voc4k "${few[@]}"
    sl voc4k_m32_g32 "${few[@]}" --vocab 32 --vocab-group 32
    sl voc4k_m32_g32_even "${few[@]}" --vocab 32 --vocab-group 32 --vocab-power 0
  fi

  # --- 4b: larger groups, other sizes and losses on 4,000 rows; and longer, as a small vocabulary learns slower: 32
  # epochs of 15,000 rows, and 64
  if wants 4b; then
    for m in 16 32 64; do
      sl "voc_m${m}_g64" --vocab $m --vocab-group 64
      sl "voc4k_m${m}_g64" "${few[@]}" --vocab $m --vocab-group 64
    done
    for m in 16 64; do
      sl "voc4k_m${m}_g32" "${few[@]}" --vocab $m --vocab-group 32
    done
    sl voc4k_m64_g32_even "${few[@]}" --vocab 64 --vocab-group 32 --vocab-power 0
    sl voc4k_m32_g32_sqrt "${few[@]}" --vocab 32 --vocab-group 32 --vocab-power 0.5
    sl voc4k_balanced "${few[@]}" --loss balanced
    sl voc4k_class "${few[@]}" --sampler class
    sl voc4k_log_q "${few[@]}" --loss log-q --vocab 32 --vocab-group 32
    sl sl_long --steps 3750
    for m in 16 32 64; do for group in 32 64; do
      sl "voc_m${m}_g${group}_long" --steps 3750 --vocab $m --vocab-group $group
    done; done
    sl sl_64epochs --steps 7500
    sl voc_m16_g32_64epochs --steps 7500 --vocab 16 --vocab-group 32
  fi

  # --- 3: descriptiveness of captions (figure 3, dots); the class name stands before natural text, as in the paper
  if wants 3; then
    for names in shapes atomic; do
      few=(--root "$([ $names = shapes ] && echo "$root" || echo "$atomic")" --data laionet4k --steps $STEPS_4K)
      for dropout in 0.5 0; do
        end=$([ $dropout = 0 ] && echo _whole || true)
        clip "cap_${names}_template$end" "${few[@]}" --word-dropout $dropout --caption "@$cuts/class.txt"
        clip "cap_${names}_full$end" "${few[@]}" --word-dropout $dropout --caption "{class} {title} {tags} {description}"
      done
      clip "cap_${names}_synonym" "${few[@]}" --word-dropout 0.5 --caption "@$cuts/synonym.txt"
      for part in title tags description; do
        clip "cap_${names}_$part" "${few[@]}" --word-dropout 0.5 --caption "{class} {$part}"
      done
    done
  fi

  finish
  wait "$pretraining" || [ -e "$root/clip.pt" ] # the others take it
  pretraining=

  # --- 8: zero-shot and one-shot tails of 30 classes (figure 8); 9a: their prototypes
  if wants 8; then
    for shots in 0 1; do
      tail=(--trim-tail 30 --trim-shots "$shots" --steps 1200)
      sl "tail${shots}_frozen_head" "${tail[@]}" --head frozen
      sl "tail${shots}_frozen_head_voc" "${tail[@]}" --head frozen --vocab 32 --vocab-group 32
    done
    sl tail0_sl --trim-tail 30 --trim-shots 0 --steps 1200
    clip tail0_clip --data "$cuts/tail0.tsv" --steps 1200
    clip tail0_clip_frozen --data "$cuts/tail0.tsv" --steps 1200 --text-head frozen
    for name in sl frozen_head frozen_head_voc clip clip_frozen; do
      score "prototypes_$name" "tail0_$name" "$PYTHON" evaluate.py prototypes "{}/tail0_$name/val.npz" --tail 30 --boot 0
    done
  fi

  # --- 8b: one shot in the other runs; and no shot where a class's name is an invented word, which no other shares
  if wants 8b; then
    sl tail1_sl --trim-tail 30 --trim-shots 1 --steps 1200
    clip tail1_clip --data "$cuts/tail1.tsv" --steps 1200
    clip tail1_clip_frozen --data "$cuts/tail1.tsv" --steps 1200 --text-head frozen
    OMP_NUM_THREADS=$cores pretrain "$atomic" web_atomic
    table tail0_atomic subset "$atomic/laionet/train.tsv" --trim-tail 30 --shots 0 --seed "$seed"
    tail=(--root "$atomic" --trim-tail 30 --trim-shots 0 --steps 1200)
    sl tail0_atomic_frozen_head "${tail[@]}" --head frozen
    sl tail0_atomic_frozen_head_voc "${tail[@]}" --head frozen --vocab 32 --vocab-group 32
    clip tail0_atomic_clip_frozen --root "$atomic" --data "$cuts/tail0_atomic.tsv" --steps 1200 --text-head frozen
  fi

  # --- 2: data scale (figures 1b, 5); steps grow with the root of the rows
  eighth=(--data "$cuts/eighth.tsv" --steps 566) quarter=(--data "$cuts/quarter.tsv" --steps 800) half=(--data "$cuts/half.tsv" --steps 1131)
  if wants 2; then
    sl sl_eighth "${eighth[@]}" "${SHIFTS[@]}"
    sl sl_quarter "${quarter[@]}" "${SHIFTS[@]}"
    sl sl_half "${half[@]}" "${SHIFTS[@]}"
    clip clip_quarter "${quarter[@]}"
    clip frozen_eighth "${eighth[@]}" --text-head frozen
    clip frozen_quarter "${quarter[@]}" --text-head frozen
  fi

  # --- 2b: CLIP on half of the rows, and from scratch on an eighth
  if wants 2b; then
    clip clip_eighth "${eighth[@]}"
    clip clip_half "${half[@]}"
    clip frozen_half "${half[@]}" --text-head frozen
  fi

  # --- 6: text heads (figure 5), with neural collapse
  if wants 6 || wants 6b; then
    for size in quarter whole; do # texts alone embedded: for each size its own
      table=$([ $size = whole ] && echo "$root/laionet/train.tsv" || echo "$cuts/quarter.tsv")
      embedded=$cuts/text_$size
      [ -e "$embedded.classes.npy" ] || "$PYTHON" recipes/text_embeddings.py "$root/web/train.tsv" "$table" "$root/classes.tsv" "$embedded"
    done
  fi
  if wants 6; then
    clip frozen --text-head frozen
    clip finetune_whole --text-head finetune
    clip text_only_whole --text-head frozen --text-embeddings "$cuts/text_whole.npy" "$cuts/text_whole.classes.npy"
    for name in clip frozen finetune_whole text_only_whole sl; do
      score "collapse_$name" "$name" "$PYTHON" evaluate.py collapse "{}/$name/val.npz" --boot 0
    done
  fi

  # --- 6b: whole captions for the others too, as frozen texts have them; a frozen head in supervised learning; and all
  # text heads on a quarter of the rows
  if wants 6b; then
    clip clip_nodrop --word-dropout 0
    sl sl_frozen_head --head frozen
    score collapse_sl_frozen_head sl_frozen_head "$PYTHON" evaluate.py collapse "{}/sl_frozen_head/val.npz" --boot 0
    score even_sl_frozen_head sl_frozen_head "$PYTHON" evaluate.py imbalance "{}/sl_frozen_head/val.npz" --classes "$cuts/even.txt" --boot 0
    clip finetune_nodrop --word-dropout 0 --text-head finetune
    clip clip_nodrop_quarter --word-dropout 0 "${quarter[@]}"
    clip finetune_quarter "${quarter[@]}" --text-head finetune
    clip text_only_quarter "${quarter[@]}" --text-head frozen --text-embeddings "$cuts/text_quarter.npy" "$cuts/text_quarter.classes.npy"
  fi

  # --- 5: imbalance, shift, diversity (figure 4), all of 4,000 rows
  if wants 5; then
    for table in above0.00 above0.35 matched as_matched; do
      clip "div_${table}_scratch" --data "$cuts/$table.tsv" --steps $STEPS_4K
    done
    for table in above0.00 above0.35 matched; do
      clip "div_${table}_frozen" --data "$cuts/$table.tsv" --steps $STEPS_4K --text-head frozen
    done
  fi

  # --- 5b: thresholds between; with the class counts of above0.35, any captions (as0.35), and what the thresholds of
  # this world leave as it is, given by hand: the images of each class that are most alike to the CLIP of web
  if wants 5b; then
    if [ ! -e "$root/laionet/alike.tsv" ]; then
      "$PYTHON" clip.py --root "$root" --eval-only "$root/clip.pt" --out "$runs/features_laionet" --eval-sets "$root/laionet/train.tsv" >"$runs/features_laionet.log"
      "$PYTHON" recipes/alike.py "$runs/features_laionet/train.npz" "$root/laionet/train.tsv" "$cuts/above0.35.tsv" "$root/laionet/alike.tsv"
    fi
    table alike0.35 subset "$root/laionet/alike.tsv" --threshold alike=1 --seed "$seed"
    for table in above0.25 above0.30 as0.35 alike0.35; do
      clip "div_${table}_scratch" --data "$cuts/$table.tsv" --steps $STEPS_4K
    done
    for table in above0.25 above0.30 as0.35 alike0.35 as_matched; do
      clip "div_${table}_frozen" --data "$cuts/$table.tsv" --steps $STEPS_4K --text-head frozen
    done
  fi

  # --- 7: open-world concepts (figure 6)
  if wants 7; then
    for set in even as_even; do
      clip "open_clip_$set" --data "$cuts/$set.tsv" --steps 1131 --text-head frozen
      sl "open_sl_$set" --data "$cuts/$set.tsv" --steps 1131 --head frozen
    done
    for name in open_clip_even open_clip_as_even frozen open_sl_even open_sl_as_even; do
      score "even_$name" "$name" "$PYTHON" evaluate.py imbalance "{}/$name/val.npz" --classes "$cuts/even.txt" --boot 0
    done
    clip open_clip_cls --data "$cuts/yfcc_cls.tsv" --steps 1200
    clip open_clip_all --data yfcc --steps 1200
  fi

  # --- 7b: supervised learning on yfcc
  if wants 7b; then
    sl open_sl_cls --data "$cuts/yfcc_cls.tsv" --steps 1200
  fi

  # --- 10: effective robustness by training set, by mixture, and after pruning what is near the test sets
  mixed=$cuts/half.tsv:1,$cuts/web_half.tsv:1 # 15,000 images too
  if wants 10; then
    clip rob_clip_web --data "$cuts/web_cls.tsv" "${SHIFTS[@]}"
    sl rob_sl_web --data "$cuts/web_cls.tsv" "${SHIFTS[@]}"
    sl rob_sl_mix --data "$mixed" "${SHIFTS[@]}"
    if [ ! -e "$cuts/web_rand.tsv" ]; then
      features=$runs/features
      "$PYTHON" clip.py --root "$root" --eval-only "$root/clip.pt" --out "$features" --eval-sets "$cuts/web_cls.tsv" "$root/imagenet/train.tsv" sketch rendition objectnet v2 >"$runs/features.log"
      "$PYTHON" build_datasets.py prune "$cuts/web_cls.tsv" --embeddings "$features/web_cls.npz" --small "$features/train.npz" --tests sketch="$features/sketch.npz" rendition="$features/rendition.npz" objectnet="$features/objectnet.npz" v2="$features/v2.npz" --out "$cuts/web_{set}.tsv" >"$runs/prune.log"
      "$PYTHON" build_datasets.py subset "$cuts/web_cls.tsv" --rows "$(($(wc -l <"$cuts/web_combined.tsv") - 1))" --seed "$seed" --out "$cuts/web_rand.tsv" >"$runs/web_rand.log"
    fi
    for set in sketch combined rand; do
      clip "rob_clip_web_$set" --data "$cuts/web_$set.tsv" "${SHIFTS[@]}"
    done
  fi

  # --- 10b: CLIP on the mixture, and another training set
  if wants 10b; then
    clip rob_clip_mix --data "$mixed" "${SHIFTS[@]}"
    clip rob_clip_incaps --data incaps "${SHIFTS[@]}"
    sl rob_sl_incaps --data incaps "${SHIFTS[@]}"
  fi

  # --- 11: debiasing a fine-tuned model; estimates of the frequencies
  if wants 11; then
    tuned=(--data laionet4k --init "$root/clip.pt" --head finetune)
    sl zeroshot "${tuned[@]}" --steps 1 --lr 1e-12
    sl finetuned "${tuned[@]}" --steps 400 --lr 3e-4
    wise="$PYTHON evaluate.py wiseft {}/zeroshot/checkpoint.pt {}/finetuned/checkpoint.pt --alpha 0 0.25 0.5 0.75 1 --out {}/wise"
    wise+=" && for a in 0.00 0.25 0.50 0.75 1.00; do $PYTHON sl_vocab_subsample.py --root $root --eval-only {}/wise/alpha_\$a.pt --out {}/wise/alpha_\$a || exit 1; done"
    wise="{ flock 9 && { [ {}/wise/alpha_1.00/val.npz -nt {}/finetuned/metrics.json ] || { $wise; }; }; } 9>{}/wise.lock" # of two scores, one makes them
    score wiseft "zeroshot finetuned" "$wise && $PYTHON evaluate.py wiseft --results {}/wise"
    cut -f 1 "$root/classes.tsv" >"$cuts/names.tsv"
    count=(frequency "$root/laionet/train.tsv" --lemmas none)
    table freq_names "${count[@]}" --classes "$cuts/names.tsv"
    table freq_synonyms "${count[@]}" --classes "$root/classes.tsv" --sample 20 --seed "$seed"
    [ -e "$cuts/judged.tsv" ] || "$PYTHON" recipes/shapes_results.py judge "$cuts/freq_synonyms.sample.tsv" "$root" "$cuts/judged.tsv"
    table freq_judged "${count[@]}" --classes "$root/classes.tsv" --relevance "$cuts/judged.tsv" --seed "$seed"
    awk -F'\t' 'NR == 1 { for (i = 1; i <= NF && $i != "estimate"; i++); print "name\tcount"; next } { print $1 "\t" $i }' "$cuts/freq_judged.tsv" >"$cuts/freq_relevant.tsv"
    score frequencies none "$PYTHON" evaluate.py concepts agree "$cuts/freq_names.tsv" "$cuts/freq_relevant.tsv" --boot 0
    debias="$PYTHON evaluate.py debias --zeroshot {}/zeroshot/val.npz --finetuned {}/finetuned/val.npz"
    score debias "zeroshot finetuned" "$wise && $debias --wiseft {}/wise/alpha_*/val.npz"
  fi

  finish
  [ ! -e "$todo/failed" ]

  # --- one page: curves over data scale and vocabulary, the other arms beside them, and what `score` wrote
  page=()
  for size in eighth quarter half; do
    page+=("SL/$size=$runs/sl_$size" "CLIP/$size=$runs/clip_$size" "frozen/$size=$runs/frozen_$size")
  done
  page+=("SL/whole=$runs/sl" "CLIP/whole=$runs/clip" "frozen/whole=$runs/frozen")
  for m in 16 32 64; do page+=("vocabulary/$m=$runs/voc_m${m}_g32"); done
  for name in sl_{paper,balanced,adjusted,log_q,class,sqrt,focal,frozen_head} clip_template{,_mask,_soft,_image,_text} \
    finetune_whole text_only_whole rob_{sl,clip}_{incaps,web,mix}; do
    page+=("$name=$runs/$name")
  done
  there=() # not all are where a part of the study was made elsewhere
  for named in "${page[@]}" "$runs"/{collapse,prototypes}_*.json "$runs"/{debias,wiseft,frequencies}.json; do
    if [ -e "${named#*=}/metrics.json" ] || [ -f "$named" ]; then there+=("$named"); fi
  done
  [ ${#there[@]} = 0 ] || "$PYTHON" evaluate.py report "${there[@]}" --boot 200 --out "$runs/report.html" >"$runs/report.log"
done; done
"$PYTHON" recipes/shapes_results.py page results
