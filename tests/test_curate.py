"""build_datasets.py curate and metadata: the hand example of methods_data.md 6, order, shards, nesting, expectation."""

import json
import math
import os
import random
import tracemalloc
from pathlib import Path

import numpy as np
import pytest

import build_datasets as bd

WORDNET = "/usr/share/wordnet"
TEXTS = ["A x"] * 6 + ["A B"] * 2 + ["A B C"] + ["B"] + ["nothing"]  # rows 6x{A}, 2x{A,B}, {A,B,C}, {B}, {}


def run(*args):
    bd.main(bd.parse_args([*map(str, args)]))


def read(path):
    return list(bd.open_tables([str(path)])[1])


def write(path, rows):
    path.parent.mkdir(exist_ok=True)
    path.write_text("url\tcaption\n" + "".join(f"{key}\t{text}\n" for key, text in rows))
    return path


@pytest.fixture
def entries(tmp_path):
    (tmp_path / "entries.tsv").write_text("entry\nA\nB\nC\nnever\n")
    return tmp_path / "entries.tsv"


def curate(source, entries, out, *flags):
    run("curate", *(source if isinstance(source, list) else [source]), "--metadata", entries, "--out", out, *flags)
    return sorted(row["url"] for row in read(out)), json.loads(Path(f"{out}.json").read_text())


def test_hand_example(tmp_path, entries):
    source = write(tmp_path / "in.tsv", [(f"u{i}", text) for i, text in enumerate(TEXTS)])
    kept, report = curate(source, entries, tmp_path / "o.tsv", "--cap", 2, "--workers", 1)
    found = {row["entry"]: row for row in read(tmp_path / "o.entries.tsv")}
    assert [found[e]["count"] for e in "ABC"] == ["9", "4", "1"] and found["never"]["count"] == "0"
    assert [float(found[e]["probability"]) for e in "ABC"] == [pytest.approx(2 / 9, abs=1e-6), 0.5, 1]
    assert report["tail share"] == pytest.approx(1 / 14) and report["entries above the cap"] == 2
    assert "u8" in kept and "u10" not in kept and report["funnel"]["no entry"] == -1  # u8 holds C, whose p is 1
    assert sum(list(report["funnel"].values())[:-1]) == len(kept)
    _, report = curate(source, entries, tmp_path / "p.tsv", "--tail-share", 0.36, "--workers", 1)
    assert report["cap"] == 4


def test_expected_size():
    """E[kept] = 6 * 2/9 + 2 * 11/18 + 1 + 1/2 = 4.0556 over 10,000 seeds, within four standard errors."""
    sets = [[0]] * 6 + [[0, 1]] * 2 + [[0, 1, 2]] + [[1]]
    ids, lengths = np.array([i for s in sets for i in s], np.int32), np.array([len(s) for s in sets])
    entry_keys = np.array([bd.hash64(e) for e in "ABC"], np.uint64)
    sizes = []
    for seed in range(10_000):
        keys = np.array([bd.hash64(str(seed), f"u{i}") for i in range(len(sets))], np.uint64)
        sizes.append(bd.draw(ids, lengths, keys, entry_keys, np.array([2 / 9, 1 / 2, 1])).sum())
    expected = 6 * 2 / 9 + 2 * 11 / 18 + 1 + 1 / 2
    assert abs(np.mean(sizes) - expected) < 4 * np.std(sizes) / math.sqrt(len(sizes))


def test_draw_equals_a_loop():
    rng = np.random.default_rng(0)
    sets = [rng.choice(20, rng.integers(1, 6), replace=False) for _ in range(200)]
    keys, entry_keys = rng.integers(0, 2**63, 200).astype(np.uint64), rng.integers(0, 2**63, 20).astype(np.uint64)
    p, kept, mask = rng.random(20), [], 2**64 - 1
    for key, ids in zip(keys.tolist(), sets):
        is_kept = False
        for i in ids:
            x = ((key ^ int(entry_keys[i])) + 0x9E3779B97F4A7C15) & mask
            x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & mask
            x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & mask
            is_kept |= (x ^ (x >> 31)) / 2**64 < p[i]
        kept.append(is_kept)
    found = bd.draw(np.concatenate(sets).astype(np.int32), np.array(list(map(len, sets))), keys, entry_keys, p)
    assert found.tolist() == kept and 0 < sum(kept) < 200


def test_order_shards_workers_and_caps(tmp_path, entries):
    draw = random.Random(0)
    rows = [(f"https://x/{i}", " ".join(draw.choices("ABCxyz", [9, 4, 1, 9, 9, 9], k=4))) for i in range(3000)]
    whole, report = curate(
        write(tmp_path / "one" / "a.tsv", rows), entries, tmp_path / "o1.tsv", "--cap", 300, "--workers", 1
    )
    draw.shuffle(rows)
    for n in (1, 2, 5):
        folder = tmp_path / f"files{n}"
        for i in range(n):
            write(folder / f"{i}.tsv", rows[i::n])
        out = tmp_path / f"shards{n}.tsv"
        for i in range(n):
            run(
                "curate",
                folder,
                "--metadata",
                entries,
                "--cap",
                300,
                "--out",
                out,
                "--workers",
                1,
                "--shard",
                f"{i}/{n}",
            )
        kept, other = curate(folder, entries, out, "--cap", 300, "--workers", 2, "--merge")
        assert kept == whole and other["matches"] == report["matches"]
    assert 600 < len(whole) < 1500
    (tmp_path / "reversed.tsv").write_text("entry\nnever\nC\nB\nA\n")
    assert curate(tmp_path / "one" / "a.tsv", tmp_path / "reversed.tsv", tmp_path / "r.tsv", "--cap", 300)[0] == whole
    larger = curate(tmp_path / "one" / "a.tsv", entries, tmp_path / "l.tsv", "--cap", 500)[0]
    assert set(whole) < set(larger)
    other_seed = curate(tmp_path / "one" / "a.tsv", entries, tmp_path / "s.tsv", "--cap", 300, "--seed", 1)[0]
    assert other_seed != whole


def test_messages(tmp_path, entries):
    source = write(tmp_path / "in.tsv", [("u", "zzz")])
    with pytest.raises(SystemExit, match="no entry of .* is in any of 1 captions"):
        curate(source, entries, tmp_path / "o.tsv")
    entries.write_text("entry\n")
    with pytest.raises(SystemExit, match="no entry of .* is in any of 1 captions"):
        curate(source, entries, tmp_path / "p.tsv")
    entries.write_text("entry\nA\nA\n")
    with pytest.raises(SystemExit, match="empty or double entries"):
        curate(source, entries, tmp_path / "o.tsv")
    with pytest.raises(SystemExit):
        bd.parse_args(["curate", "a.tsv", "--metadata", "b.tsv", "--out", "c.tsv", "--cap", "0"])


def test_metadata(tmp_path):
    write(
        tmp_path / "in.tsv",
        [(i, "new york , red apple new york ! and apple") for i in range(4)] + [(9, "rare rare apple")],
    )
    out = tmp_path / "entries.tsv"
    run("metadata", tmp_path / "in.tsv", "--min-count", 5, "--min-pmi", 1.5, "--out", out)
    rows = read(out)
    assert [row["entry"] for row in rows[:100]] == [str(i) for i in range(100)]
    words = {row["entry"]: row["count"] for row in rows if row["source"] == "word"}
    assert words == {"new": "8", "york": "8", "apple": "9"}  # marks and what is rarer than 5 are out
    n = 4 * 10 + 3
    pmi = {"new york": (8, 8, 8), "red apple": (4, 4, 9), "apple new": (4, 9, 8), "rare rare": (1, 2, 2), "rare apple": (1, 2, 9),
           "and apple": (4, 4, 9)}  # fmt: skip
    expected = {pair for pair, (c, x, y) in pmi.items() if math.log2(c * n / (x * y)) >= 1.5}
    assert {row["entry"] for row in rows if row["source"] == "pair"} == expected and "apple new" not in expected
    run("metadata", tmp_path / "in.tsv", "--max-entries", 102, "--min-count", 1, "--out", out)
    assert len(read(out)) == 102


@pytest.mark.skipif(not os.path.isfile(f"{WORDNET}/data.verb"), reason="WordNet's files are not here")
def test_metadata_of_wordnet(tmp_path):
    write(tmp_path / "in.tsv", [("u", "a b")])
    run("metadata", tmp_path / "in.tsv", "--wordnet", WORDNET, "--out", tmp_path / "e.tsv")
    found = {row["entry"] for row in read(tmp_path / "e.tsv") if row["source"] == "wordnet"}
    first = set()
    for part in ("noun", "verb", "adj", "adv"):
        for line in Path(f"{WORDNET}/data.{part}").read_text("utf-8").splitlines():
            if not line.startswith("  "):
                first.add(line.split()[4].split("(")[0].replace("_", " "))
    assert found == first - set(map(str, range(100)))
    assert abs(len(found) - 86_654) / 86_654 < 0.01  # the paper's number; case or version must differ a little


def test_rows_hang_neither_on_where_out_lies_nor_on_a_stopped_call(tmp_path, entries, monkeypatch):
    """Images name the rows; parts of a call on one file are of other probabilities than a call's on two."""
    for name, n in (("a", 400), ("b", 800)):
        (tmp_path / f"{name}.tsv").write_text("image\tcaption\n" + "".join(f"{name}{i}.jpg\tA\n" for i in range(n)))
    sources, kept = [tmp_path / "a.tsv", tmp_path / "b.tsv"], []
    common = ["--metadata", entries, "--cap", 300, "--workers", 1]
    for out in ("o.tsv", "x/o.tsv", "x/y/o.tsv"):
        run("curate", *sources, *common, "--out", tmp_path / out)
        kept.append([Path(row["image"]).name for row in read(tmp_path / out)])
    assert kept[0] == kept[1] == kept[2] and 200 < len(kept[0]) < 400
    with monkeypatch.context() as patch:
        patch.setattr(bd, "merge_tables", lambda *_: exec("raise SystemExit('stopped')"))
        with pytest.raises(SystemExit, match="stopped"):
            run("curate", sources[0], *common, "--out", tmp_path / "p.tsv")
    run("curate", *sources, *common, "--out", tmp_path / "p.tsv")
    assert (tmp_path / "p.tsv").read_bytes() == (tmp_path / "o.tsv").read_bytes()


def test_metadata_tells_that_no_pair_can_reach_the_limit(tmp_path, capsys):
    write(tmp_path / "in.tsv", [(i, "red apple") for i in range(4)])
    run("metadata", tmp_path / "in.tsv", "--out", tmp_path / "e.tsv")
    assert "no pair can reach 30 bits in 8 words, at most 3.0" in capsys.readouterr().err
    run("metadata", tmp_path / "in.tsv", "--min-pmi", 3, "--out", tmp_path / "e.tsv")
    assert "no pair" not in capsys.readouterr().err


def test_a_part_holds_the_entries_that_its_file_has(tmp_path):
    (tmp_path / "many.tsv").write_text("entry\n" + "".join(f"e{i}\n" for i in range(10_000)))
    sources = [write(tmp_path / f"{i}.tsv", [(f"u{i}", f"e7 e{i}")]) for i in range(3)]
    run("curate", *sources, "--metadata", tmp_path / "many.tsv", "--out", tmp_path / "o.tsv", "--workers", 1, "--shard", "0/1")
    parts = list((tmp_path / "o.tsv.parts").glob("*.npz"))
    assert len(parts) == 3 and all(part.stat().st_size < 4000 for part in parts)  # 80,000 if all were kept
    curate(sources, tmp_path / "many.tsv", tmp_path / "o.tsv", "--merge")
    assert [(row["entry"], row["count"]) for row in read(tmp_path / "o.entries.tsv")[:4]] == [
        ("e7", "3"), ("e0", "1"), ("e1", "1"), ("e2", "1")]  # fmt: skip


def test_metadata_counts_no_pairs_that_cannot_reach_the_limit(tmp_path):
    """150 words in every order are 22,500 pairs without information; one pair of rare words has it."""
    words = [f"w{i}" for i in range(150)]
    texts = [" ".join(f"{a} {b}" for b in words) for a in words] + ["odd couple"]
    write(tmp_path / "in.tsv", enumerate(texts))
    tracemalloc.start()
    run("metadata", tmp_path / "in.tsv", "--min-pmi", 15, "--min-count", 10**6, "--out", tmp_path / "e.tsv")
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert [row["entry"] for row in read(tmp_path / "e.tsv")[100:]] == ["odd couple"] and peak < 6 * 2**20


def test_memory_does_not_grow_with_the_rows_of_a_file(tmp_path):
    """Which entries 50 words of each row are takes 200 bytes a row: 1.6 MB more and copies, if held."""
    (tmp_path / "words.tsv").write_text("entry\n" + "".join(f"{i}\n" for i in range(100)))
    peaks = []
    for n in 2**13, 2**14:
        write(tmp_path / "in.tsv", ((i, " ".join(str((i + k) % 100) for k in range(50))) for i in range(n)))
        tracemalloc.start()
        run("curate", tmp_path / "in.tsv", "--metadata", tmp_path / "words.tsv", "--cap", 9, "--workers", 1, "--out", tmp_path / "o.tsv")
        peaks.append(tracemalloc.get_traced_memory()[1] / 2**20)
        tracemalloc.stop()
    assert peaks[1] - peaks[0] < 1, peaks


def test_a_count_equal_to_the_cap_is_neither_above_nor_below_it(tmp_path, entries):
    """A 9, B 4, C 1 and t = 4: A alone is cut, C alone is the tail. An entry's `kept` are the rows that have it."""
    source = write(tmp_path / "in.tsv", [(f"u{i}", text) for i, text in enumerate(TEXTS)])
    kept, report = curate(source, entries, tmp_path / "o.tsv", "--cap", 4, "--workers", 1)
    assert report["entries above the cap"] == 1 and report["matches of entries above the cap"] == 9
    assert report["tail share"] == pytest.approx(1 / 14)
    texts = [TEXTS[int(url[1:])].split() for url in kept]
    found = {row["entry"]: int(row["kept"]) for row in read(tmp_path / "o.entries.tsv")}
    assert found == {entry: sum(entry in text for text in texts) for entry in found} and 0 < found["A"] < 9


def test_rows_that_cannot_be_read_are_lost_once(tmp_path, entries):
    source = write(tmp_path / "in.tsv", [("u0", "A"), ("u1", "B\tmore"), ("u2", "nothing")])
    kept, report = curate(source, entries, tmp_path / "o.tsv", "--skip-bad", "--workers", 1)
    assert kept == ["u0"] and list(report["funnel"].values()) == [3, -1, -1, 0, 1]


def test_a_word_of_the_least_count_is_an_entry(tmp_path):
    write(tmp_path / "in.tsv", [(i, "red apple" if i else "apple") for i in range(5)])
    run("metadata", tmp_path / "in.tsv", "--min-count", 4, "--out", tmp_path / "e.tsv")
    assert [row["entry"] for row in read(tmp_path / "e.tsv")[100:]] == ["apple", "red"]


def test_pairs_and_entries_stand_in_the_order_of_their_counts(tmp_path, entries):
    """What is never found is no part of the tail: the cap is a count that some entry has."""
    source = write(tmp_path / "in.tsv", [(f"u{i}", text) for i, text in enumerate(["b c"] * 3 + ["a d"] * 2)])
    run("metadata", source, "--min-count", 1, "--min-pmi", 1, "--out", tmp_path / "m.tsv")
    assert [row["entry"] for row in read(tmp_path / "m.tsv") if row["source"] == "pair"] == ["b c", "a d"]
    (tmp_path / "entries.tsv").write_text("entry\nnever\nC\nA\nB\n")
    curate(write(tmp_path / "t.tsv", [(f"u{i}", text) for i, text in enumerate(TEXTS)]), entries, tmp_path / "o.tsv", "--cap", 2)
    assert [row["entry"] for row in read(tmp_path / "o.entries.tsv")] == ["A", "B", "C", "never"]
    assert bd.cap_of_share(np.array([0, 0, 5, 5]), 0.01) == 5


def test_a_tail_share_counts_every_entry_of_a_count():
    """Of 1, 1, 1, 1, 2, 4 the cumulative shares are .1, .2, .3, .4, .6, 1."""
    counts = np.array([1, 2, 1, 4, 1, 1])
    assert [bd.cap_of_share(counts, share) for share in (0.4, 0.55, 0.9)] == [1, 2, 4]


def test_no_mark_of_ascii_is_an_entry(tmp_path):
    source = write(tmp_path / "in.tsv", [("u", "a - & é % — b")] * 3)
    run("metadata", source, "--min-count", 2, "--min-pmi", 99, "--out", tmp_path / "m.tsv")
    assert {row["entry"] for row in read(tmp_path / "m.tsv")[100:]} == {"a", "é", "—", "b"}


def test_what_names_a_row_in_a_draw():
    """The first there is: tables with a url draw alike before and after a download, which adds key and image."""
    row = {"caption": "c", "image": "i", "key": "k", "URL": "U", "url": "u"}
    for name in ("url", "URL", "key", "image", "caption"):
        assert bd.key_of(row) == row[name]
        row[name] = ""
    assert bd.key_of(row) == ""
