#!/usr/bin/env bash
# Real pictures with real captions, from a web server to a trained model: 785 drawings and photos of Tux Paint.
#
#     apt install tuxpaint-stamps-default                            # the pictures, each .png with a .txt
#     python3 -m venv i2d && i2d/bin/pip install img2dataset==1.47.0 # a venv of its own: it brings many packages
#     IMG2DATASET=i2d/bin/img2dataset bash recipes/stamps.sh
#
# Env: IMG2DATASET (executable), PYTHON, OUT (its shards and clip are replaced), STAMPS, PORT, STEPS.
# 10 s to the tables; the training decodes 7,680 JPEGs, a minute or two on 2 cores.
set -euo pipefail
cd "$(dirname "$0")/.."
IMG2DATASET=${IMG2DATASET:-img2dataset} PYTHON=${PYTHON:-python} OUT=${OUT:-data/stamps} STEPS=${STEPS:-60}
STAMPS=${STAMPS:-/usr/share/tuxpaint/stamps} PORT=${PORT:-8765}

[ -d "$STAMPS" ] || { echo "$STAMPS: no such folder; apt install tuxpaint-stamps-default" >&2; exit 1; }
command -v "$IMG2DATASET" >/dev/null || { echo "IMG2DATASET: $IMG2DATASET not found; see the top of $0" >&2; exit 1; }
rm -rf "$OUT/shards" "$OUT/clip"  # img2dataset skips shards that are there, clip.py goes on with a checkpoint
mkdir -p "$OUT"

# 1. What a crawl gives: addresses and captions. The first line of a stamp's .txt is its English caption.
"$PYTHON" - "$STAMPS" "$PORT" "$OUT/urls.csv" <<'PY'
import csv, pathlib, sys, urllib.parse
root, port, out = pathlib.Path(sys.argv[1]), sys.argv[2], sys.argv[3]
with open(out, "w", encoding="utf-8", newline="") as f:
    table = csv.writer(f)
    table.writerow(("url", "caption"))
    n = 0
    for image in sorted(root.rglob("*.png")):
        text = image.with_suffix(".txt")
        if text.exists():
            caption = text.read_text(encoding="utf-8", errors="replace").partition("\n")[0].strip()
            name = urllib.parse.quote(image.relative_to(root).as_posix())
            table.writerow((f"http://127.0.0.1:{port}/{name}", caption))
            n += 1
print(f"pairs listed: {n}")
PY

# 2. A web server, on this machine only, until the download is done or the script fails.
"$PYTHON" -m http.server "$PORT" --bind 127.0.0.1 --directory "$STAMPS" >"$OUT/server.log" 2>&1 &
server=$!
trap 'kill $server 2>/dev/null || true' EXIT
"$PYTHON" - "$PORT" <<'PY'
import socket, sys, time
for _ in range(100):
    try:
        socket.create_connection(("127.0.0.1", int(sys.argv[1])), 1).close()
        break
    except ConnectionRefusedError:
        time.sleep(0.1)
else:
    sys.exit(f"PORT: no server on 127.0.0.1:{sys.argv[1]} after 10 s")
PY
kill -0 $server || { echo "PORT: $PORT is taken, see $OUT/server.log" >&2; exit 1; }

# 3. Download, shrink and pack, as for any web-scale set. NO_ALBUMENTATIONS_UPDATE: no question to the network.
NO_ALBUMENTATIONS_UPDATE=1 "$IMG2DATASET" --url_list "$OUT/urls.csv" --input_format csv --url_col url \
    --caption_col caption --output_format webdataset --output_folder "$OUT/shards" --image_size 256 \
    --resize_mode keep_ratio --number_sample_per_shard 200 --processes_count 1 --thread_count 8 --enable_wandb False \
    >"$OUT/img2dataset.log" 2>&1 || { tail -n 20 "$OUT/img2dataset.log" >&2; exit 1; }
kill $server
trap - EXIT

# 4. Index the tars where they lie. Prints pairs in, pairs out, bad images, rows.
"$PYTHON" build_datasets.py index "$OUT/shards" --out "$OUT/train.tsv" --holdout 0.1

# 5. Train. val.tsv lies beside train.tsv and is found; the figures are its retrieval.
"$PYTHON" clip.py --data "$OUT/train.tsv" --steps "$STEPS" --out "$OUT/clip"
"$PYTHON" - "$OUT/clip/metrics.json" <<'PY'
import json, sys
val = json.load(open(sys.argv[1]))["val"]
print("val:", val["n"], "pairs,", json.dumps(val["retrieval"]))
PY
