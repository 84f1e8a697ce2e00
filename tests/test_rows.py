"""build_datasets.py: rows and names that containers, widths, quotas and kills must not change or lose."""

import bz2
import errno
import hashlib
import json
import os
import random
import re
import time

import numpy as np
import pytest
from programs import answer
from test_index import make_tar, read, sample

import build_datasets as bd

CLASSES = "name\tsynonyms\nsea lion\t\nlion\t\n"


def told(folder, *flags, code=0):
    result = answer(bd, *flags, folder=folder)
    assert result.returncode == code, result.stderr
    return result.stderr


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "classes.tsv").write_text(CLASSES)
    return tmp_path


def test_a_caption_has_one_label_in_every_container(folder):
    """A line break inside of a name: as in TSV, where it cannot be, it is a blank."""
    pa = pytest.importorskip("pyarrow")
    import pyarrow.parquet as pq

    caption = "two sea\nlion"
    pq.write_table(pa.table({"caption": [caption]}), folder / "a.parquet")
    (folder / "a.csv").write_text(f'caption\n"{caption}"\n')
    (folder / "a.jsonl").write_text(json.dumps({"caption": caption}) + "\n")
    (folder / "a.tsv").write_text("caption\ntwo sea lion\n")
    for kind in ("tsv", "jsonl", "csv", "parquet"):
        told(folder, "label", f"a.{kind}", "--classes", "classes.tsv", "--match", "word", "--out", "out.tsv")
        assert [(row["caption"], row["label"]) for row in read(folder / "out.tsv")] == [("two sea lion", "0")], kind


def test_texts_that_no_table_can_hold_are_lost_samples(folder):
    """4 MiB of bytes that are no UTF-8 become 12 MiB: a line of that length would stop every command after `index`."""
    members = [("a.jpg", b"x"), ("a.txt", b"\xff" * 2**22), *sample("b")]
    make_tar(folder / "0.tar", members)
    told(folder, "index", "0.tar", "--out", "t.tsv")
    assert [row["caption"] for row in read(folder / "t.tsv")] == ["a cat"]
    assert json.loads((folder / "t.tsv.json").read_text())["counts"]["texts of more than 10 MiB"] == 1
    (folder / "c.csv").write_text(f"caption,more\n\"{'x' * 6 * 2**20}\n{'y' * 6 * 2**20}\",a\nlion,b\n")
    told(folder, "label", "c.csv", "--classes", "classes.tsv", "--skip-bad", "--out", "l.tsv")
    assert [row["caption"] for row in read(folder / "l.tsv")] == ["lion"]


def test_an_empty_txt_does_not_hide_the_caption_of_the_json(folder):
    make_tar(folder / "0.tar", [("a.jpg", b"x"), ("a.txt", b" \n"), ("a.json", b'{"title": "a lion"}')])
    told(folder, "index", "0.tar", "--out", "t.tsv")
    assert read(folder / "t.tsv")[0]["caption"] == "a lion"


@pytest.mark.parametrize("rule, counts", [("substring", [0, 1]), ("word", [1, 2])])
def test_frequency_counts_what_label_labels(folder, rule, counts):
    """Case counts for substring, as published, in both; a caption counts for each class that it names."""
    (folder / "a.tsv").write_text("caption\nA Sea Lion\nmy lion\n")
    flags = ["a.tsv", "--classes", "classes.tsv", "--match", rule, "--out"]
    told(folder, "frequency", *flags, "f.tsv")
    assert [int(row["count"]) for row in read(folder / "f.tsv")] == counts
    told(folder, "label", *flags, "l.tsv", "--multi", "all")
    assert np.bincount([int(row["label"]) for row in read(folder / "l.tsv")], minlength=2).tolist() == counts


def test_a_folder_called_as_a_compressed_file_begins(folder):
    make_tar(folder / "0.tar", [("BZhang/1.jpg", b"x"), ("BZhang/1.txt", b"a cat")])
    told(folder, "index", "0.tar", "--out", "t.tsv")
    assert len(read(folder / "t.tsv")) == 1
    (folder / "1.tar").write_bytes(bz2.compress((folder / "0.tar").read_bytes()))
    assert "bzip2" in told(folder, "index", "1.tar", "--out", "u.tsv", code=2)


def test_a_source_that_is_no_tar_is_told_before_the_others_are_read(folder, monkeypatch):
    for i in range(3):
        make_tar(folder / f"{i}.tar", sample("a"))
    (folder / "9.tar").write_text("<html>not found</html>" * 99)
    monkeypatch.setattr(bd, "in_processes", lambda *_: pytest.fail("tars are read"))
    assert "9.tar: not a tar" in told(folder, "index", *(f"{i}.tar" for i in (0, 1, 2, 9)), "--out", "t.tsv", code=2)


def test_a_full_disk_ends_index_at_once_and_is_not_the_inputs_fault(folder, monkeypatch):
    for i in range(3):
        make_tar(folder / f"{i}.tar", sample("a"))
    asked = []

    def full(function, jobs, workers):
        for (job,) in jobs:
            asked.append(job["path"])
            yield function(job)

    def no_room(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(bd, "in_processes", full)
    monkeypatch.setattr(bd, "row_bytes", no_room)
    error = told(folder, "index", "0.tar", "1.tar", "2.tar", "--out", "t.tsv", code=2)
    assert "No space left" in error and "0.tar" not in error and asked == ["0.tar"]


def test_what_killed_runs_of_index_left_does_no_harm(folder):
    """Rows of a run of the same table go; those of another table are perhaps being written."""
    make_tar(folder / "0.tar", sample("a"))
    for name in (".index-t.tsv-abcdefgh", ".index-u.tsv-abcdefgh"):
        (folder / name).mkdir()
        (folder / name / "0.train").write_text("x")
    told(folder, "index", "0.tar", "--out", "t.tsv")
    assert not (folder / ".index-t.tsv-abcdefgh").exists() and (folder / ".index-u.tsv-abcdefgh").exists()
    (folder / "imagenet" / "cat").mkdir(parents=True)
    (folder / "imagenet" / "cat" / "1.jpg").write_bytes(b"x")
    (folder / "d").mkdir()
    (folder / "d" / "classes.tsv.json.partial").touch()  # of `classes`
    told(folder, "index", "imagenet", "--out", "d/train.tsv")
    assert (folder / "d" / "classes.tsv").read_text().startswith("name\t")


def test_rows_without_a_label_go_for_classes_that_lost_all(folder):
    rows = [f"{i}.jpg\t" for i in range(990)] + [f"c{i}.jpg\t{i}" for i in range(10)]
    (folder / "a.tsv").write_text("image\tlabel\n" + "\n".join(rows) + "\n")
    (folder / "classes.tsv").unlink()
    told(folder, "subset", "a.tsv", "--rows", "100", "--out", "b.tsv")
    kept = read(folder / "b.tsv")
    assert len(kept) == 100 and {row["label"] for row in kept} >= set(map(str, range(10)))
    assert "cannot hold a row of each of 10 classes" in told(folder, "subset", "a.tsv", "--rows", "9", "--out", "c.tsv",
                                                            code=2)


def test_threshold_holds_for_rows_of_fill_too(folder):
    (folder / "a.tsv").write_text("image\tlabel\tsimilarity\na.jpg\t0\t0.9\n")
    (folder / "b.tsv").write_text("image\tlabel\tsimilarity\nb.jpg\t0\t0.1\nc.jpg\t0\t0.8\n")
    (folder / "bare.tsv").write_text("image\tlabel\nd.jpg\t0\n")
    (folder / "wanted.tsv").write_text("name\tcount\nsea lion\t3\nlion\t0\n")
    flags = ["subset", "a.tsv", "--threshold", "similarity=0.7", "--match-frequency", "wanted.tsv", "--out", "o.tsv"]
    told(folder, *flags, "--fill", "b.tsv")
    assert [row["image"] for row in read(folder / "o.tsv")] == ["a.jpg", "c.jpg"]
    assert "no column similarity" in told(folder, *flags, "--fill", "bare.tsv")
    assert [row["image"] for row in read(folder / "o.tsv")] == ["a.jpg", "d.jpg"]


def test_fill_repeats_no_row(folder):
    """A cut in a folder of its own is filled from its source: the image it has is there by another name."""
    (folder / "a.tsv").write_text("image\tlabel\na.jpg\t0\nb.jpg\t0\nb.jpg\t0\nb.jpg\t1\n")
    (folder / "cut").mkdir()
    (folder / "cut" / "a.tsv").write_text("image\tlabel\n../a.jpg\t0\na.jpg\t1\n")
    (folder / "wanted.tsv").write_text("name\tcount\nsea lion\t9\nlion\t9\n")
    done = answer(bd, "subset", "cut/a.tsv", "--match-frequency", "wanted.tsv", "--fill", "a.tsv", "--out", "o.tsv",
                  "--classes", "classes.tsv", folder=folder)  # fmt: skip
    rows = sorted((row["image"], row["label"]) for row in read(folder / "o.tsv"))
    assert rows == [("a.jpg", "0"), ("b.jpg", "0"), ("b.jpg", "1"), ("cut/a.jpg", "1")], done.stderr
    assert "of --fill: 2 copies" in done.stdout
    assert json.loads((folder / "o.tsv.json").read_text())["fill_copies"] == 2


def test_counts_of_files_with_other_columns(folder):
    """Of the tables of a set only the labels count."""
    (folder / "set").mkdir()
    (folder / "set" / "a.tsv").write_text("url\tlabel\nu\t0\n")
    (folder / "set" / "b.tsv").write_text("label\tcaption\n0\tx\n1\ty\n")
    told(folder, "stats", "set", "--classes", "classes.tsv", "--out", "o.tsv")
    assert read(folder / "o.tsv")[0]["labelled"] == "3"


def test_names_of_columns_are_flat(folder):
    (folder / "a.jsonl").write_text(json.dumps({"caption": "a lion", "a\tb": 1, "": 2}) + "\n")
    told(folder, "label", "a.jsonl", "--classes", "classes.tsv", "--out", "o.tsv")
    row = read(folder / "o.tsv")[0]
    assert (row["a b"], row["_"], row["label"]) == ("1", "2", "1")


def test_a_pattern_passes_over_what_is_being_written(folder):
    (folder / "data").mkdir()
    (folder / "data" / "a.tsv").write_text("image\tcaption\n1.jpg\ta lion\n")
    told(folder, "label", "data/*", "--classes", "classes.tsv", "--out", "data/z.tsv")
    assert len(read(folder / "data" / "z.tsv")) == 1
    (folder / "data" / "z.tsv").unlink()
    told(folder, "label", "data/a.tsv", "--classes", "classes.tsv", "--out", "data/y.tsv", "--shard", "0/1")
    assert list((folder / "data" / "y.tsv.parts").glob("*.tsv"))  # as a killed run leaves them
    told(folder, "label", "data/**/*.tsv", "--classes", "classes.tsv", "--out", "z.tsv")
    assert len(read(folder / "z.tsv")) == 1


def test_a_link_to_nothing_and_a_pipe_are_one_line(folder):
    """A pipe is neither waited for as a table nor as a picture."""
    (folder / "a.tsv").symlink_to("gone.tsv")
    os.mkfifo(folder / "b.tsv")
    os.mkfifo(folder / "p.jpg")
    (folder / "c.tsv").write_text("image\tcaption\np.jpg\tx\n")
    for table, message in (("a.tsv", "a.tsv: a link to gone.tsv, which is not there\n"),
                           ("[a]*.tsv", "a.tsv: a link to gone.tsv, which is not there\n"),
                           ("b.tsv", "b.tsv: expected a regular file or a folder\n")):  # fmt: skip
        assert told(folder, "check", table, "--out", "o.tsv", code=2) == message
    told(folder, "check", "c.tsv", "--workers", "1", "--out", "o.tsv", code=1)
    assert [row["reason"] for row in read(folder / "o.tsv")] == ["not a regular file"]
    for by in "bytes", "phash":
        told(folder, "dedup", "c.tsv", "--by", by, "--workers", "1", "--out", "d.tsv")


def test_rows_to_try_again_are_a_table(folder):
    """`status` has img2dataset's columns, but no tars beside it."""
    (folder / "retry.tsv").write_text("key\turl\tcaption\tlabel\tstatus\terror_message\n0\thttp://a\tx\t\tfailed\t404\n")
    told(folder, "subset", "retry.tsv", "--fraction", "1", "--out", "o.tsv")
    assert read(folder / "o.tsv")[0]["url"] == "http://a"


def longest_by_pairs(places):
    """The rule as it is said: a class stays if a place of it is not strictly inside of a place of another class."""
    return tuple(sorted({c for a, b, c in places if not any(
        x <= a and b <= y and y - x > b - a and other != c for x, y, other in places)}))


def test_longest_equals_the_naive_loop_and_is_not_quadratic(monkeypatch):
    rng, spans = random.Random(0), []
    matcher = bd.Matcher([("x", 0)], "word")

    class Found:
        def __init__(self, span):
            self.span = lambda _: span

    monkeypatch.setattr(matcher, "prepared", lambda caption: caption)
    monkeypatch.setattr(matcher, "named", (np.arange(4), np.arange(4)))
    monkeypatch.setattr(matcher, "needles", list(range(4)))
    monkeypatch.setattr(matcher, "pattern", lambda needle: ("", str(needle), ""))
    monkeypatch.setattr(bd.re, "finditer", lambda pattern, _: map(Found, spans[int(re.search(r"\d", pattern)[0])]))
    for _ in range(2000):
        spans[:] = [[(a := rng.randrange(8), a + rng.randint(1, 5)) for _ in range(rng.randrange(4))] for _ in range(4)]
        places = [(*span, c) for c in range(4) for span in spans[c]]
        assert matcher.longest("", range(4)) == longest_by_pairs(places), places
    spans[:] = [[(8 * i, 8 * i + 3) for i in range(50_000)], [(8 * i + 4, 8 * i + 7) for i in range(50_000)], [], []]
    start = time.perf_counter()
    assert matcher.longest("", range(4)) == (0, 1)
    assert time.perf_counter() - start < 10  # 10^10 comparisons take an hour


def test_a_report_never_replaces_what_was_read(folder):
    (folder / "cap.tsv.json").write_text("[]")
    said = told(folder, "incaps", "cap.tsv.json", "--images", ".", "--classes", "classes.tsv", "--out", "cap.tsv", code=2)
    assert "cap.tsv.json, which it would replace, is an input" in said and (folder / "cap.tsv.json").read_text() == "[]"


def test_a_holdout_never_replaces_another_val_tsv(folder):
    for name in ("a", "b"):
        make_tar(folder / f"{name}.tar", [m for i in range(20) for m in sample(f"{name}{i}")])
    told(folder, "index", "a.tar", "--out", "val.tsv")
    before = (folder / "val.tsv").read_bytes()
    said = told(folder, "index", "b.tar", "--out", "web.tsv", "--holdout", "0.5", code=2)
    assert "val.tsv is there, and not of the last call that wrote web.tsv" in said and not (folder / "web.tsv").exists()
    assert (folder / "val.tsv").read_bytes() == before
    for path in folder.glob("val.tsv*"):
        path.unlink()
    for _ in range(2):  # its own is made anew
        told(folder, "index", "b.tar", "--out", "web.tsv", "--holdout", "0.5")
    report, val = json.loads((folder / "web.tsv.json").read_text()), (folder / "val.tsv").read_bytes()
    assert report["val"] == {"path": "val.tsv", "sha256": hashlib.sha256(val).hexdigest()}
    (folder / "val.tsv").write_bytes(before)  # another again
    told(folder, "index", "b.tar", "--out", "web.tsv", "--holdout", "0.5", code=2)
    assert (folder / "val.tsv").read_bytes() == before
    (folder / "val.tsv.partial").write_bytes(val)  # killed between OUT.json and its val.tsv
    told(folder, "index", "b.tar", "--out", "web.tsv", "--holdout", "0.5")


def test_why_a_tar_gave_nothing_is_told(folder):
    make_tar(folder / "whole.tar", sample("a"))
    (folder / "cut.tar").write_bytes((folder / "whole.tar").read_bytes()[:1300])
    assert "cut.tar: " in told(folder, "index", "cut.tar", "--out", "t.tsv", code=2)


def test_mixes_of_mixes_keep_where_rows_came_from(folder):
    (folder / "a.tsv").write_text("image\tsource\n0.jpg\tflickr\n1.jpg\tcc12m\n")
    (folder / "b.tsv").write_text("image\n2.jpg\n")
    told(folder, "mix", "a.tsv", "b.tsv", "--out", "m.tsv")
    assert [(row["source"], row["source_before"]) for row in read(folder / "m.tsv")] == [("a", "flickr"), ("a", "cc12m"),
                                                                                      ("b", "")]  # fmt: skip
    told(folder, "mix", "m.tsv", "b.tsv", "--out", "mm.tsv")
    assert [(row["source"], row["source_before"]) for row in read(folder / "mm.tsv")] == [("m", "flickr"), ("m", "cc12m"),
                                                                                       ("m", "b")]  # fmt: skip


@pytest.mark.parametrize("flags, said", [
    (("mix", "a.tsv", "b.tsv", "--rows", "3", "--weights", "inf", "1"), "expected a positive number for each of 2"),
    (("mix", "a.tsv", "b.tsv", "--rows", "3", "--weights", "1e308", "1e308"), "expected a positive number for each of 2"),
    (("mix", "a.tsv", "b.tsv", "--rows", "3", "--weights", "1e308", "1"), "expected a positive number for each of 2"),
    (("subset", "a.tsv", "--profile", "pareto", "--imbalance", "inf"), "--imbalance is a number from 1 on"),
    (("subset", "a.tsv", "--profile", "balanced", "--rows", "1" + "0" * 30), "there are 9 rows to choose from"),
])  # fmt: skip
def test_numbers_without_a_bound_are_refused(folder, flags, said):
    for name in "ab":
        (folder / f"{name}.tsv").write_text("image\tlabel\n" + "".join(f"{name}{i}.jpg\t{i % 2}\n" for i in range(9)))
    error = told(folder, *flags, "--out", "m.tsv", code=2)
    assert said in error and "Warning" not in error and not (folder / "m.tsv").exists()


def test_weights_that_no_count_can_hold_are_refused(folder):
    rows = "two sea lions\t999999999999999\n" * 9_300
    (folder / "q.tsv").write_text("caption\tn\n" + rows)
    flags = ["frequency", "q.tsv", "--classes", "classes.tsv", "--lemmas", "none", "--weights", "n", "--out", "f.tsv"]
    assert "add up to more than 2^63" in told(folder, *flags, code=2)
    for name in "ab":  # each can be held, both cannot
        (folder / f"{name}.tsv").write_text("caption\tn\n" + "lion\t999999999999999\n" * 5_000)
    assert "add up to more than 2^63" in told(folder, "frequency", "a.tsv", "b.tsv", *flags[2:], code=2)


def test_headers_of_class_lists(folder):
    for header, code in (("name", 0), ("name\tsynonyms", 0), ("name\tdefinition", 2), ("name\twnid", 2)):
        more = "\tx" * header.count("\t")
        (folder / "list.txt").write_text(f"{header}\ncat{more}\ndog{more}\n")
        said = told(folder, "classes", "list.txt", "--out", "c.tsv", code=code)
        assert "a list has name, synonyms, definition alone" in said or code == 0
        assert code or [row["name"] for row in read(folder / "c.tsv")] == ["cat", "dog"]


def test_embeddings_without_a_direction_are_counted(folder):
    np.save(folder / "e.npy", np.array([[1, 0], [np.nan, 1], [0, 0], [1, 1e-9]], np.float32))
    (folder / "t.tsv").write_text("image\n" + "".join(f"{i}.jpg\n" for i in range(4)))
    told(folder, "dedup", "t.tsv", "--by", "embedding", "--embeddings", "e.npy", "--out", "d.tsv")
    assert json.loads((folder / "d.tsv.json").read_text())["not_compared"] == {"embedding": 2}
    assert [row["image"] for row in read(folder / "d.tsv")] == ["0.jpg", "1.jpg", "2.jpg"]


def test_json_too_deep_and_offsets_too_long_are_bad_input(folder):
    make_tar(folder / "00000.tar", sample("a"))
    (folder / "00000_stats.json").write_text("[" * 100_000)
    assert "_stats.json: cannot be read" in told(folder, "index", "00000.tar", "--out", "t.tsv")
    (folder / "n.tsv").write_text(f"image\n00000.tar:{'1' * 5000}:5\n")
    told(folder, "check", "n.tsv", "--out", "c.tsv", code=1)
