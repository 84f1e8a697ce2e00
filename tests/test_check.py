"""build_datasets.py check: every kind of bad row is listed with file, line and reason; the exit code."""

import subprocess
import sys

import numpy as np
import programs
from PIL import Image

import build_datasets as bd


def check(folder, *flags):
    done = programs.answer(bd, "check", "all.tsv", "--out", "bad.tsv", *flags, folder=folder)
    bad = [(int(r["line"]), r["reason"]) for r in bd.open_tables([str(folder / "bad.tsv")])[1]]
    return done, bad


def make(folder):
    Image.new("RGB", (20, 30), "red").save(folder / "a.png")
    (folder / "cut.png").write_bytes((folder / "a.png").read_bytes()[:60])
    (folder / "text.jpg").write_text("no image")
    np.save(folder / "p.npy", np.zeros((2, 8, 8, 3), np.uint8))
    bd.write_tsv(folder / "classes.tsv", ("name",), [dict(name="cat"), dict(name="dog")])
    lines = [
        "image\tlabel\tcaption",
        "a.png\t0\tone cat",
        "p.npy:1\tdog\tone dog",
        "p.npy:2\t1\tone dog",
        "gone.png\t\tx",
    ]
    lines += ["text.jpg\t1\ty", "a.png\t2\tz", "a.png\t\t", "a.png\t1", "cut.png\t1\tone dog"]
    (folder / "all.tsv").write_text("\n".join(lines) + "\n")


def test_every_reason(tmp_path):
    make(tmp_path)
    done, bad = check(tmp_path, "--workers", 2)
    assert [line for line, _ in bad] == [4, 5, 6, 7, 8, 9, 10]
    reasons = dict(bad)
    assert reasons[4] == "row beyond the end of the .npy file" and reasons[5] == "missing file"
    assert reasons[6] == "not an image" and reasons[7] == "label '2' is no class"
    assert reasons[8] == "neither label nor caption" and reasons[9] == "2 fields, but the header has 3"
    assert reasons[10] in ("truncated", "cannot be decoded", "not an image")
    assert done.returncode == 1
    assert "all.tsv:2: a.png, 20 x 30, label 0\n    one cat" in done.stdout
    assert "2  repetitions of a caption" in done.stdout and "x 'one dog'" in done.stdout
    assert check(tmp_path, "--max-bad", 0.77)[0].returncode == 1  # 7 of 9 rows
    assert check(tmp_path, "--max-bad", 0.78)[0].returncode == 0
    assert check(tmp_path, "--max-pixels", 100)[1][0] == (2, "more pixels than --max-pixels")


def test_a_size_beyond_all_memory(tmp_path):
    (tmp_path / "s.tar").write_bytes(b"x" * 100)
    rows = [dict(image=name, caption="x") for name in ("s.tar:0:99999999999999", f"s.tar:{10**30}:9", "s.tar:95:9")]
    bd.write_tsv(tmp_path / "all.tsv", ("image", "caption"), rows)
    done, bad = check(tmp_path, "--workers", 1)
    assert bad == [(line, "offset or size beyond the end of the file") for line in (2, 3, 4)]
    assert "-3    offset or size beyond the end of the file" in done.stdout


def test_good_table_and_sample(tmp_path):
    np.save(tmp_path / "p.npy", np.zeros((300, 8, 8, 3), np.uint8))
    rows = [dict(image=f"p.npy:{i}", caption=f"c{i}") for i in range(301)]  # the last has no pixels
    bd.write_tsv(tmp_path / "all.tsv", ("image", "caption"), rows)
    done, bad = check(tmp_path, "--workers", 1)
    assert bad == [(302, "row beyond the end of the .npy file")] and done.returncode == 1
    assert check(tmp_path, "--max-bad", 0.01)[0].returncode == 0
    done, bad = check(tmp_path, "--sample", 3, "--workers", 1)
    assert "3  decoded" in done.stdout
    drawn = sorted(range(301), key=lambda i: bd.unit_hash(0, f"p.npy:{i}"))[:3]
    assert (done.returncode, bad) == ((1, [(302, "row beyond the end of the .npy file")]) if 300 in drawn else (0, []))
    bd.write_tsv(tmp_path / "all.tsv", ("image", "caption"), rows[:300])
    assert check(tmp_path)[0].returncode == 0


def test_texts_before_their_images_are_there(tmp_path):
    """A table as LAION's, TEXT and URL without images: only what reads images needs the column."""
    rows = [dict(URL=f"http://x/{i}.jpg", TEXT="" if i == 3 else f"one {i // 2}") for i in range(8)]
    bd.write_tsv(tmp_path / "all.tsv", ("URL", "TEXT"), rows)
    for flags in ([], ["--sample", 8]):
        done, bad = check(tmp_path, *flags)
        assert bad == [(5, "neither label nor caption")] and done.returncode == 1, done.stderr
        assert "rows are of tables without a column image" in done.stdout
    assert list(bd.open_tables([str(tmp_path / "bad.tsv")])[1])[0]["image"] == "http://x/3.jpg"

    def rows_of(command, *flags):
        line = [sys.executable, bd.__file__, command, "all.tsv", *flags, "--out", "o.tsv"]
        done = subprocess.run(line, cwd=tmp_path, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return [row["URL"][9] for row in bd.open_tables([str(tmp_path / "o.tsv")])[1]]

    assert rows_of("dedup", "--by", "caption") == ["0", "2", "3", "4", "6"]
    pairs = list(bd.open_tables([str(tmp_path / "o.pairs.tsv")])[1])
    assert pairs[0]["image"] == "http://x/0.jpg" and pairs[0]["kept"] == "http://x/0.jpg"
    assert len(rows_of("subset", "--rows", "3")) == 3 and len(rows_of("mix", "--rows", "3")) == 3
    assert set(rows_of("subset", "--rows", "3")) == set(rows_of("subset", "--rows", "3", "--key", "URL"))
    line = [sys.executable, bd.__file__, "dedup", "all.tsv", "--by", "pixels", "--out", "p.tsv"]
    assert "no column image" in subprocess.run(line, cwd=tmp_path, capture_output=True, text=True).stderr
    (tmp_path / "all.tsv").write_text("a.jpg\t0\nb.jpg\t1\n")  # no header
    line = [sys.executable, bd.__file__, "subset", "all.tsv", "--rows", "1", "--out", "p.tsv"]
    assert "no column image; found a.jpg, 0" in subprocess.run(line, cwd=tmp_path, capture_output=True, text=True).stderr  # fmt: skip


def test_labels_that_are_no_class_are_counted_as_one_reason(tmp_path):
    rows = [dict(image="x.jpg", label=f"n{i}", caption="x") for i in range(5)]
    bd.write_tsv(tmp_path / "all.tsv", ("image", "label", "caption"), rows)
    done, bad = check(tmp_path, "--workers", 1)
    assert "-5    label is no class" in done.stdout and dict(bad)[2] == "label 'n0' is no class"


def test_a_sample_is_drawn_by_its_seed_and_judged_by_its_own_share(tmp_path):
    """Four of 100 rows are decoded and all four are bad: a share of 1, not of .04."""
    rows = [dict(image=f"gone{i}.jpg", caption="x") for i in range(100)]
    bd.write_tsv(tmp_path / "all.tsv", ("image", "caption"), rows)
    flags = ["--sample", 4, "--max-bad", 0.9, "--workers", 1, "--seed"]
    (done, bad), (_, other) = (check(tmp_path, *flags, seed) for seed in (0, 1))
    assert done.returncode == 1 and len(bad) == len(other) == 4 and bad != other


def test_pictures_are_decoded_whole(tmp_path):
    """Where training reads a large JPEG at a part of its size."""
    Image.new("RGB", (1200, 800), "red").save(tmp_path / "a.jpg")
    bd.write_tsv(tmp_path / "all.tsv", ("image", "caption"), [dict(image="a.jpg", caption="x")])
    assert "a.jpg, 1200 x 800," in check(tmp_path, "--workers", 1)[0].stdout
