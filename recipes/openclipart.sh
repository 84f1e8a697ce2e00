#!/usr/bin/env bash
# Real pictures with titles and tags, from a package to labelled, curated and trained: Debian's Open Clip Art.
#
#     apt install openclipart-png openclipart-svg wordnet-base       # pictures; their titles and tags; class names
#     bash recipes/openclipart.sh
#
# Env: PYTHON, OUT (is replaced), CLIPART (holds png/ and svg/), WORDNET, STEPS, WORKERS. 2 min on 2 cores at STEPS=20.
# Ends with a funnel, in OUT/funnel.tsv too; docs/openclipart.md has it with remarks.
set -euo pipefail
cd "$(dirname "$0")/.."
PYTHON=${PYTHON:-python} OUT=${OUT:-data/openclipart} STEPS=${STEPS:-200} WORKERS=${WORKERS:-2}
CLIPART=${CLIPART:-/usr/share/openclipart} WORDNET=${WORDNET:-/usr/share/wordnet}

[ -d "$CLIPART/png" ] && [ -d "$CLIPART/svg" ] || {
    echo "$CLIPART: no png/ and svg/ in it; apt install openclipart-png openclipart-svg" >&2; exit 1; }
[ -f "$WORDNET/data.noun" ] || { echo "$WORDNET: no data.noun in it; apt install wordnet-base" >&2; exit 1; }
rm -rf "$OUT"
mkdir -p "$OUT/pictures"
build() { "$PYTHON" build_datasets.py "$@"; }

# 1. A flat folder: a link to each .png, beside it a .json with title, tags and description from the .svg.
"$PYTHON" - "$CLIPART" "$OUT/pictures" <<'PY'
import json, pathlib, sys, xml.etree.ElementTree as ElementTree
root, out, n, lost = pathlib.Path(sys.argv[1]), pathlib.Path(sys.argv[2]), 0, {}
CC, DC = "{http://web.resource.org/cc/}", "{http://purl.org/dc/elements/1.1/}"
ITEM = "{http://www.w3.org/1999/02/22-rdf-syntax-ns#}li"
for png in sorted((root / "png").rglob("*.png")):
    name = png.relative_to(root / "png").with_suffix("")
    svg, why = root / "svg" / f"{name}.svg", ""  # with_suffix would cut "a_g._01"
    try:
        work = ElementTree.parse(svg).find(f".//{CC}Work")
    except (ElementTree.ParseError, FileNotFoundError) as error:
        work, why = None, f"the .svg: {type(error).__name__}"
    title, description = (" ".join((work.findtext(DC + key) or "").split()) if work is not None else ""
                          for key in ("title", "description"))
    subject = work.find(DC + "subject") if work is not None else None
    tags = [" ".join((item.text or "").split()).lower() for item in subject.iter(ITEM)] if subject is not None else []
    tags = [tag for tag in dict.fromkeys(tags) if tag]
    why = why or ("no title" if not title else "no tags" if not tags else "" if png.exists() else "dead link")
    lost[why] = lost.get(why, 0) + 1
    if not why:
        stem = "__".join(name.parts)
        (out / f"{stem}.png").symlink_to(png.resolve())
        facts = dict(caption=" ".join((title, *tags)), title=title, tags="|".join(tags), description=description)
        (out / f"{stem}.json").write_text(json.dumps(facts, ensure_ascii=False), encoding="utf-8")
print(", ".join(f"{n} {why or 'with title and tags'}" for why, n in sorted(lost.items())))
(out.parent / "pictures.txt").write_text(f"{sum(lost.values())}")
PY

# 2. Index, a tenth for val.tsv; decode every picture; drop copies, then the copies of val's pictures.
build index "$OUT/pictures" --out "$OUT/all.tsv" --holdout 0.1 --workers "$WORKERS"
build check "$OUT/all.tsv" --out "$OUT/bad.tsv" --max-bad 0.01 --workers "$WORKERS"
awk -F '\t' 'NR == FNR {bad[$3]; next} FNR == 1 || !($1 in bad)' "$OUT/bad.tsv" "$OUT/all.tsv" >"$OUT/good.tsv"
build dedup "$OUT/good.tsv" --by bytes pixels --out "$OUT/dedup.tsv" --workers "$WORKERS"
build dedup "$OUT/dedup.tsv" --by pixels --against "$OUT/val.tsv" --out "$OUT/train.tsv" --workers "$WORKERS"

# 3. Classes: the tags of at least 5 pictures that are nouns of WordNet, the frequent ones first.
"$PYTHON" - "$OUT" "$WORDNET" <<'PY'
import collections, csv, pathlib, sys
out, wordnet = map(pathlib.Path, sys.argv[1:])
nouns = {line.split(" ", 1)[0] for line in open(wordnet / "index.noun", encoding="utf-8")}
with open(out / "train.tsv", encoding="utf-8", newline="") as f:
    rows = csv.DictReader(f, delimiter="\t", quoting=csv.QUOTE_NONE)
    counts = collections.Counter(tag for row in rows for tag in row["tags"].split("|"))
names = [tag for tag, n in sorted(counts.items(), key=lambda x: (-x[1], x[0]))
         if n >= 5 and tag.replace(" ", "").isalpha() and tag.replace(" ", "_") in nouns]
(out / "names.txt").write_text("\n".join(names) + "\n", encoding="utf-8")
print(f"{len(counts)} tags, {sum(n >= 5 for n in counts.values())} on 5 pictures or more, {len(names)} of these nouns")
PY
build classes "$OUT/names.txt" --wordnet "$WORDNET" --out "$OUT/classes.tsv"

# 4. Labels by the published rules, frequencies by the paper's, and 16 shots of each class.
build label "$OUT/train.tsv" --classes "$OUT/classes.tsv" --multi drop --out "$OUT/drop.tsv"
build label "$OUT/train.tsv" --classes "$OUT/classes.tsv" --multi all --out "$OUT/labelled.tsv"
build frequency "$OUT/train.tsv" --classes "$OUT/classes.tsv" --wordnet "$WORDNET" --out "$OUT/counts.tsv"
build stats "$OUT/drop.tsv" "$OUT/labelled.tsv" "$OUT/counts.tsv" --classes "$OUT/classes.tsv" --out "$OUT/stats.tsv"
build subset "$OUT/labelled.tsv" --shots 16 --out "$OUT/shots.tsv"

# 5. MetaCLIP's curation, with the entries of WordNet and of the captions themselves.
build metadata "$OUT/train.tsv" --wordnet "$WORDNET" --min-count 5 --min-pmi 8 --out "$OUT/entries.tsv"
build curate "$OUT/train.tsv" --metadata "$OUT/entries.tsv" --cap 20 --out "$OUT/curated.tsv"

# 6. Train on the curated set; val.tsv lies beside it. Its text tower then gives LAIONet's similarities.
"$PYTHON" clip.py --data "$OUT/curated.tsv" --steps "$STEPS" --out "$OUT/clip"
build laionet "$OUT/train.tsv" --classes "$OUT/classes.tsv" --clip "$OUT/clip/checkpoint.pt" --threshold 0.3 \
    --out "$OUT/laionet.tsv"

"$PYTHON" - "$OUT" <<'PY'
import json, pathlib, sys
out = pathlib.Path(sys.argv[1])
rows = {p.stem: sum(1 for _ in open(p, encoding="utf-8")) - 1 for p in out.glob("*.tsv")}
steps = [("pictures of the packages", int((out / "pictures.txt").read_text())),
         ("index: with title and tags", rows["all"] + rows["val"]), ("index: not in val.tsv", rows["all"]),
         ("check: decoded", rows["good"]), ("dedup: no copies", rows["dedup"]),
         ("dedup --against val.tsv", rows["train"]), ("label --multi drop: name one class", rows["drop"]),
         ("label --multi all: labels", rows["labelled"]), ("subset --shots 16: labels", rows["shots"]),
         ("laionet: name one class, case counts", rows["laionet.all"]),
         ("laionet: similar to its definition", rows["laionet"]),
         ("curate: balanced", rows["curated"])]
(out / "funnel.tsv").write_text("step\trows\n" + "".join(f"{step}\t{n}\n" for step, n in steps))
print("\n".join(f"{n:>6,}  {step}" for step, n in steps))
val = json.loads((out / "clip" / "metrics.json").read_text())["val"]
print("val:", val["n"], "pairs,", json.dumps(val["retrieval"]))
PY
