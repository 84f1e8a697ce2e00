"""Real data, real tool: Tux Paint's captioned pictures through img2dataset, the index, and clip.py.

Needs the Debian package tuxpaint-stamps-default and img2dataset (on PATH, or its path in IMG2DATASET); else skipped.
"""

import csv
import functools
import http.server
import io
import json
import os
import shutil
import subprocess
import sys
import threading
import urllib.parse
from pathlib import Path

import pytest
from PIL import Image

MAIN = Path(__file__).resolve().parents[1]
BUILD = os.path.join(os.environ.get("BUILD_DATASETS_DIR", MAIN), "build_datasets.py")
STAMPS = Path("/usr/share/tuxpaint/stamps")
IMG2DATASET = shutil.which(os.environ.get("IMG2DATASET", "img2dataset"))
N_STAMPS, N_BROKEN = 200, 3

pytestmark = [
    pytest.mark.skipif(not STAMPS.is_dir(), reason=f"no {STAMPS}: apt install tuxpaint-stamps-default"),
    pytest.mark.skipif(not IMG2DATASET, reason="no img2dataset on PATH or in IMG2DATASET: see recipes/stamps.sh"),
]


class QuietHandler(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *args):
        pass


def read(path):
    header, *rows = [line.split("\t") for line in path.read_text(encoding="utf-8").rstrip("\n").split("\n")]
    return [dict(zip(header, row, strict=True)) for row in rows]


@pytest.fixture(scope="module")
def stamps(tmp_path_factory):
    """A folder with shards/ of 200 pictures and 3 addresses that fail, {url: caption}, and what the index said."""
    folder = tmp_path_factory.mktemp("stamps")
    images = [image for image in sorted(STAMPS.rglob("*.png")) if image.with_suffix(".txt").exists()]
    images = images[:: len(images) // N_STAMPS][:N_STAMPS]
    handler = functools.partial(QuietHandler, directory=str(STAMPS))
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    base, captions = f"http://127.0.0.1:{server.server_port}/", {}
    for image in images:
        text = image.with_suffix(".txt").read_text(encoding="utf-8", errors="replace")
        captions[base + urllib.parse.quote(image.relative_to(STAMPS).as_posix())] = text.partition("\n")[0].strip()
    text_file = next(iter(sorted(STAMPS.rglob("*.txt")))).relative_to(STAMPS).as_posix()
    broken = [base + "missing1.png", base + "missing2.png", base + text_file]  # two 404, one that is no picture
    with open(folder / "urls.csv", "w", encoding="utf-8", newline="") as f:
        csv.writer(f).writerows([("url", "caption"), *captions.items(), *((url, "broken") for url in broken)])
    flags = dict(url_list=folder / "urls.csv", input_format="csv", url_col="url", caption_col="caption",
                 output_format="webdataset", output_folder=folder / "shards", image_size=256, resize_mode="keep_ratio",
                 number_sample_per_shard=70, processes_count=1, thread_count=8, enable_wandb=False)  # fmt: skip
    command = [IMG2DATASET, *(f"--{key}={value}" for key, value in flags.items())]
    try:
        env = {**os.environ, "NO_ALBUMENTATIONS_UPDATE": "1"}  # its updater would ask the network
        done = subprocess.run(command, env=env, capture_output=True, text=True)
    finally:
        server.shutdown()
        server.server_close()
    assert done.returncode == 0, done.stderr[-3000:]
    command = [sys.executable, BUILD, "index", folder / "shards", "--out", folder / "train.tsv", "--holdout", "0.1"]
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    print(done.stdout, done.stderr)
    return folder, captions, done


def test_rows_out_equal_pairs_in(stamps):
    folder, captions, done = stamps
    train, val = read(folder / "train.tsv"), read(folder / "val.tsv")
    assert {row["url"]: row["caption"] for row in train + val} == captions
    assert len(train) + len(val) == N_STAMPS and 5 <= len(val) <= 40  # 20 expected, standard deviation 4.2
    assert f"{N_STAMPS + N_BROKEN} pairs in, {N_STAMPS} out, 2 not downloaded, 1 bad images" in done.stdout
    assert not done.stderr.replace("warning: .parquet beside the shards was not read", "").startswith("warning")
    assert json.loads((folder / "train.tsv.json").read_text())["img2dataset"]["count"] == N_STAMPS + N_BROKEN


def test_images_decode_from_the_tars(stamps):
    folder, _, _ = stamps
    for row in read(folder / "train.tsv")[::10] + read(folder / "val.tsv")[:3]:
        path, offset, size = row["image"].rsplit(":", 2)
        with open(folder / path, "rb") as f:
            f.seek(int(offset))
            image = Image.open(io.BytesIO(f.read(int(size))))
        image.load()
        assert image.format == "JPEG" and image.size == (int(row["width"]), int(row["height"]))
        assert min(image.size) == 256


def test_clip_trains_on_it(stamps):
    folder, _, _ = stamps
    if not (MAIN / "clip.py").exists():
        pytest.skip("no clip.py beside build_datasets.py")
    command = [sys.executable, MAIN / "clip.py", "--data", folder / "train.tsv", "--out", folder / "run"]
    flags = ["--steps", "5", "--batch-size", "16", "--eval-sets", folder / "val.tsv", "--device", "cpu"]
    done = subprocess.run(list(map(str, command + flags)), capture_output=True, text=True, cwd=folder)
    assert done.returncode == 0, done.stderr[-3000:]
    val = json.loads((folder / "run" / "metrics.json").read_text())["val"]
    assert val["n"] == len(read(folder / "val.tsv"))
    assert all(0 <= val["retrieval"][key] <= 1 for key in ("i2t_r1", "t2i_r1"))
