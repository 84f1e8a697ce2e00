"""build_datasets.py label, classes, incaps, laionet, frequency, status: hand-made tables, counts, resume, shards."""

import gzip
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from scipy.stats import binomtest

import build_datasets as bd

SCRIPT = Path(bd.__file__)
WORDNET = "/usr/share/wordnet"
needs_wordnet = pytest.mark.skipif(not os.path.isfile(f"{WORDNET}/data.noun"), reason="WordNet's files are not here")
CLASSES = "name\tsynonyms\tdefinition\tnegative\nsea lion\t\ta seal\t\nlion\tsimba\ta cat\tzoo\ncrane\t\ta bird\t\n"


def run(*args):
    bd.main(bd.parse_args([*map(str, args)]))


def read(path):
    return list(bd.open_tables([str(path)])[1])


def report(path):
    return json.loads(Path(f"{path}.json").read_text("utf-8"))


def hashes(path):
    """{input: its sha256} as a table's report tells them; of each the size is told too."""
    found = report(path)["inputs"]
    assert all(entry["bytes"] == os.path.getsize(entry["path"]) for entry in found)
    return {entry["path"]: entry["sha256"] for entry in found}


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "classes.tsv").write_text(CLASSES)
    return tmp_path


def write_captions(path, captions, **columns):
    lines = ["\t".join(["image", "caption", *columns])]
    lines += ["\t".join([f"{i}.jpg", c, *(str(v[i]) for v in columns.values())]) for i, c in enumerate(captions)]
    path.write_text("\n".join(lines) + "\n", "utf-8")
    return path


CAPTIONS = ["one sea lion", "Simba!", "a lion and a crane", "lion in a zoo", "nothing", "sealion, lions", "crane crane"]


@pytest.mark.parametrize(
    "multi, labels",
    [
        ("longest", [0, 1, 2]),
        ("drop", [1, 2]),
        ("all", [0, 1, 1, 1, 2, 2]),
        ("first", [0, 1, 1, 2]),
    ],
)
def test_label_policies(folder, multi, labels):
    source = write_captions(folder / "in.tsv", CAPTIONS, source=["yfcc"] * len(CAPTIONS))
    out = folder / "x" / "out.tsv"
    run("label", source, "--classes", folder / "classes.tsv", "--multi", multi, "--out", out, "--workers", 1)
    rows = read(out)
    assert [int(row["label"]) for row in rows] == labels
    assert rows[0]["image"] == ("../0.jpg" if multi != "drop" else "../1.jpg") and rows[0]["source"] == "yfcc"
    facts = report(out)
    assert facts["class_counts"] == np.bincount(labels, minlength=3).tolist() and sum(
        facts["funnel"].values()
    ) == 2 * len(rows)
    assert facts["labels_per_row"] == {
        "rows that name 0 classes": 3,
        "rows that name 1 classes": 2,
        "rows that name 2 classes": 2,
    }
    assert not os.path.exists(f"{out}.parts") and facts["funnel"]["rows"] == 7


def test_truth_is_kept_beside_the_label(folder):
    write_captions(folder / "in.tsv", ["a lion", "a crane"], label=["2", ""])
    run("label", folder / "in.tsv", "--classes", folder / "classes.tsv", "--out", folder / "o.tsv", "--workers", 1)
    assert [(row["label"], row["source_label"]) for row in read(folder / "o.tsv")] == [("1", "2"), ("2", "")]


def test_results_depend_neither_on_workers_nor_on_shards_nor_on_a_kill(folder):
    for i in range(5):
        write_captions(folder / f"in{i}.tsv", [f"{c} {i}" for c in CAPTIONS * (i + 1)])
    (folder / "in4.tsv").rename(folder / "plain")
    (folder / "in4.tsv.gz").write_bytes(gzip.compress((folder / "plain").read_bytes()))
    common = [folder / "in*", "--classes", folder / "classes.tsv"]
    out = {name: folder / f"{name}.tsv" for name in ("one", "two", "shards", "killed")}
    run("label", *common, "--out", out["one"], "--workers", 1)
    run("label", *common, "--out", out["two"], "--workers", 2)
    for shard in ("0/3", "2/3", "1/3"):
        if shard == "1/3":
            with pytest.raises(SystemExit, match="--merge: no result yet of 2 of 5 files"):
                run("label", *common, "--out", out["shards"], "--merge")
        run("label", *common, "--out", out["shards"], "--workers", 1, "--shard", shard)
        assert not out["shards"].exists()
    run("label", *common, "--out", out["shards"], "--merge")
    # a bad row in the last file ends the run; the others' parts stay, and are not made again
    whole = (folder / "in4.tsv.gz").read_bytes()
    (folder / "in4.tsv.gz").write_bytes(whole[:-9])
    with pytest.raises(SystemExit, match="in4.tsv.gz:.*damaged gzip"):
        run("label", *common, "--out", out["killed"], "--workers", 1)
    parts = list(Path(f"{out['killed']}.parts").glob("*.npz"))
    assert len(parts) == 4 and not out["killed"].exists()
    (folder / "in4.tsv.gz").write_bytes(whole)
    times = {p: p.stat().st_mtime_ns for p in parts}
    run("label", *common, "--out", out["killed"], "--workers", 1, "--shard", "4/5")
    assert {p: p.stat().st_mtime_ns for p in parts} == times
    run("label", *common, "--out", out["killed"], "--merge")
    texts = [path.read_bytes() for path in out.values()]
    assert texts[0] and len(set(texts)) == 1
    reports = [{k: v for k, v in report(path).items() if k not in ("date", "outputs")} for path in out.values()]
    assert all(r["class_counts"] == reports[0]["class_counts"] and r["inputs"] == reports[0]["inputs"] for r in reports)


def test_end_to_end_exit_codes(folder):
    source = write_captions(folder / "in.tsv", CAPTIONS)
    command = [sys.executable, SCRIPT, "label", source, "--classes", folder / "classes.tsv", "--out", folder / "o.tsv"]
    done = subprocess.run([*map(str, command)], capture_output=True, text=True)
    assert done.returncode == 0 and "3  rows in" in done.stdout, done.stderr
    source.write_bytes(source.read_bytes() + b"7.jpg\tbad \xff\n")
    done = subprocess.run([*map(str, command)], capture_output=True, text=True)
    assert done.returncode == 2 and done.stderr.startswith(f"{source}:9: not UTF-8") and done.stderr.count("\n") == 1
    done = subprocess.run([*map(str, command), "--skip-bad"], capture_output=True, text=True)
    assert done.returncode == 0 and "-1    bad: not UTF-8" in done.stdout, done.stderr
    full = ["bash", "-c", f"ulimit -f 1; trap '' XFSZ; exec {' '.join(map(str, command))} --skip-bad --workers 1"]
    big = write_captions(folder / "in.tsv", CAPTIONS * 999)
    done = subprocess.run(full, capture_output=True, text=True)
    assert done.returncode == 2 and "File too large" in done.stderr and done.stderr.count("\n") == 1 and big.exists()


@pytest.mark.parametrize(
    "text, reason",
    [
        ("name\nlion\nlion\n", "3: lion stands in line 2 too"),
        ("name\tsynonyms\n\tx\n", "2: an empty name"),
        ("name\n", "2: no classes"),
        ("nom\nlion\n", "1: no column name; found nom"),
        ("", "1: an empty file"),
    ],
)
def test_bad_classes(folder, text, reason):
    (folder / "classes.tsv").write_text(text)
    write_captions(folder / "in.tsv", CAPTIONS)
    with pytest.raises(SystemExit, match=f"^{folder / 'classes.tsv'}:{reason}"):
        run("label", folder / "in.tsv", "--classes", folder / "classes.tsv", "--out", folder / "o.tsv")


@needs_wordnet
def test_classes_from_wordnet(tmp_path):
    (tmp_path / "list").write_text("n02012849\tcrane bird\nn03126707\nn03710637\nn03710721\n")
    (tmp_path / "extra.tsv").write_text("wnid\tnegative\nn03126707\tbird|fish\n")
    out = tmp_path / "classes.tsv"
    run("classes", tmp_path / "list", "--wordnet", WORDNET, "--extra", tmp_path / "extra.tsv", "--out", out)
    rows = bd.class_rows(str(out))
    assert [row["name"] for row in rows] == ["crane bird", "crane", "maillot", "maillot"]
    assert rows[3]["synonyms"] == "tank suit" and rows[3]["definition"] == "a woman's one-piece bathing suit"
    assert rows[1]["negative"] == "bird|fish" and report(out)["shared_names"] == {"crane": [0, 1], "maillot": [2, 3]}
    assert [row["query"] for row in rows] == ["crane", "crane", "maillot", "maillot"]
    asked = []  # methods 5.3: the first synonym and the definition, whatever the name that is shown
    write_captions(tmp_path / "in.tsv", ["x"])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(bd, "run_files", lambda work, paths, out, settings, run: asked.extend(settings["queries"]))
        run("laionet", tmp_path / "in.tsv", "--classes", out, "--similarity", "similarity", "--out", tmp_path / "o.tsv")
    assert asked[0].startswith("crane which is large long-necked wading bird")
    (tmp_path / "list").write_text("n00000001\n")
    with pytest.raises(SystemExit, match="list:1: n00000001 is not a synset"):
        run("classes", tmp_path / "list", "--wordnet", WORDNET, "--out", out)


def test_classes_from_names(tmp_path):
    (tmp_path / "list").write_text("lock_chamber\narcade (game) or gallery / hall\ndog\thound|cur\ta beast\n")
    run("classes", tmp_path / "list", "--out", tmp_path / "c.tsv")
    assert [(r["name"], r["synonyms"], r["definition"]) for r in bd.class_rows(str(tmp_path / "c.tsv"))] == [
        ("lock chamber", "", ""),
        ("arcade", "gallery|hall", ""),
        ("dog", "hound|cur", "a beast"),
    ]
    for text, reason in (
        ("a\n\n", "2: an empty name"),
        ("a\na\n", "2: a stands in line 1 too"),
        ("crane (bird)\ncrane (machine)\n", "2: crane stands in line 1 too"),
        ("", "1: an empty file"),
    ):
        (tmp_path / "list").write_text(text)
        with pytest.raises(SystemExit, match=reason):
            run("classes", tmp_path / "list", "--out", tmp_path / "c.tsv")


@needs_wordnet
def test_names_of_several_senses_are_told(tmp_path, capsys):
    (tmp_path / "list").write_text("crane\nmaillot\ntench\n")
    run("classes", tmp_path / "list", "--wordnet", WORDNET, "--out", tmp_path / "c.tsv")
    found = report(tmp_path / "c.tsv")["ambiguous_names"]
    assert list(found) == ["crane", "maillot"] and [len(senses) for senses in found.values()] == [5, 2]
    assert any(sense.startswith("n02012849: large long-necked wading bird") for sense in found["crane"])
    printed = capsys.readouterr().out
    assert "2  names of several senses" in printed and "    maillot: n" in printed
    assert [bool(row["wnid"]) for row in bd.class_rows(str(tmp_path / "c.tsv"))] == [False, False, True]


SYNSET = "00000000 06 n 01 crane 0 000 | a bird  "


@pytest.mark.parametrize(
    "data, index, reason",
    [
        ("00000000 06", "", "data.noun:1: no line of WordNet's data.noun at byte 0: '00000000 06'"),
        (SYNSET + "\n" + SYNSET, "", "data.noun:2: no line of WordNet's data.noun at byte 40: '00000000 06 n"),
        ("  1 WordNet 3.1 Copyright 2011 by Princeton\n", "", "data.noun:1: WordNet 3.1, expected 3.0"),
        (SYNSET, "crane n x 0 1 0 00000000  ", "index.noun:1: no line of WordNet's index.noun at byte 0: 'crane n x"),
        (SYNSET, "crane", "index.noun:1: no line of WordNet's index.noun at byte 0: 'crane'"),
        (SYNSET, "crane n 1 0 1 0 00000009  ", "list:1: .*index.noun has crane at 00000009, where data.noun has no"),
    ],
)
def test_damaged_or_other_wordnet(tmp_path, data, index, reason):
    bd.read_nouns.cache_clear()
    for name, text in {"data.noun": data, "index.noun": index, "noun.exc": "", "list": "crane\n"}.items():
        (tmp_path / name).write_text(text)
    with pytest.raises(SystemExit, match=reason):
        run("classes", tmp_path / "list", "--wordnet", tmp_path, "--out", tmp_path / "c.tsv")
    (tmp_path / "data.noun").write_text(SYNSET)
    (tmp_path / "noun.exc").write_text("cranes\n")
    bd.read_nouns.cache_clear()
    with pytest.raises(SystemExit, match="noun.exc:1: no line of WordNet's noun.exc"):
        run("classes", tmp_path / "list", "--wordnet", tmp_path, "--out", tmp_path / "c.tsv")


def test_empty_fields_of_extra_and_wordnet_s_glosses_replace_nothing(tmp_path):
    files = {"data.noun": SYNSET, "index.noun": "crane n 1 0 1 0 00000000  ", "noun.exc": "", "list": "n00000000\n",
             "named": "crane\t\tmy own\n", "extra.tsv": "wnid\tnegative\tquery\tdefinition\nn00000000\tfish\t\t\n"}  # fmt: skip
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    for source, definition in ("list", "a bird"), ("named", "my own"):
        run("classes", tmp_path / source, "--wordnet", tmp_path, "--extra", tmp_path / "extra.tsv", "--out", tmp_path / "c.tsv")
        (row,) = bd.class_rows(str(tmp_path / "c.tsv"))
        assert (row["wnid"], row["negative"], row["definition"]) == ("n00000000", "fish", definition)
        assert row["query"] == ("crane" if source == "list" else "")


def test_comments_in_a_class_list(tmp_path, capsys):
    (tmp_path / "list").write_text("# names of\n#\n#1 pencil\n#hashtag\ndog\n")
    run("classes", tmp_path / "list", "--out", tmp_path / "c.tsv")
    assert [row["name"] for row in bd.class_rows(str(tmp_path / "c.tsv"))] == ["#1 pencil", "#hashtag", "dog"]
    with pytest.raises(SystemExit):
        run("classes", "--help")
    assert "begins with # and a blank, is a comment" in " ".join(capsys.readouterr().out.split())


@pytest.mark.parametrize("end", ["", ".gz"])
def test_odd_incaps(tmp_path, end):
    (tmp_path / "classes.tsv").write_text("name\twnid\ncatamaran\tn01\n")
    (tmp_path / "images" / "n01").mkdir(parents=True)
    (tmp_path / "images" / "n01" / "n01_1.JPEG").write_bytes(b"x")
    path, packed = tmp_path / f"in.json{end}", gzip.compress if end else bytes
    flags = ["incaps", path, "--images", tmp_path / "images", "--classes", tmp_path / "classes.tsv", "--out", tmp_path / "o.tsv"]
    for tags, caption in (([None, "a", 7], "a 7"), ("sea boat", "sea boat"), (None, "")):
        path.write_bytes(packed(json.dumps([dict(filename="n01_1.JPEG", wnid="n01", tags=tags)]).encode()))
        run(*flags)
        assert [row["caption"] for row in read(tmp_path / "o.tsv")] == [caption]
    whole = path.read_bytes()
    for data, reason in ((packed(b'[{"filename": "a", "wnid": "b", "tags": 5}]'), "record 1: tags is 5, expected a list"),
                         (packed(b"[" * 200_000), "not JSON"), (whole[:-4], "damaged gzip" if end else "not JSON"),
                         (b"[]" if end else gzip.compress(b"[]"), "damaged gzip" if end else "not JSON")):  # fmt: skip
        path.write_bytes(data)
        with pytest.raises(SystemExit, match=f"^{path}: {reason}"):
            run(*flags)


def test_incaps(tmp_path):
    (tmp_path / "classes.tsv").write_text("name\twnid\ncatamaran\tn01\nbear\tn02\n")
    records = [
        dict(filename="n01_1.JPEG", wnid="n01", title="My Boat", tags=["sea", "blue boat"], description="l1\nl2"),
        dict(filename="n01_1.JPEG", wnid="n01", title="My", tags=None, description=None),
        dict(filename="n01_2.JPEG", wnid="n01", title="gone", tags=[], description=""),
        dict(filename="n09_2.JPEG", wnid="n09", title="who", tags=[], description=""),
    ]
    (tmp_path / "null.json").write_text(json.dumps([*records, dict(filename=None, wnid="n01")]))
    with pytest.raises(SystemExit, match="expected a list of objects with filename"):
        run("incaps", tmp_path / "null.json", "--images", tmp_path, "--classes", tmp_path / "classes.tsv", "--out", tmp_path / "o.tsv")
    (tmp_path / "in.json").write_text(json.dumps(records))
    (tmp_path / "images" / "n01").mkdir(parents=True)
    (tmp_path / "images" / "n01" / "n01_1.JPEG").write_bytes(b"x")
    for keep, n in ((), 1), (["--keep-repeats"], 2):
        run("incaps", tmp_path / "in.json", "--images", tmp_path / "images", "--classes", tmp_path / "classes.tsv",
            "--out", tmp_path / "o.tsv", *keep)  # fmt: skip
        assert len(read(tmp_path / "o.tsv")) == n
    rows = sorted(row["caption"] for row in read(tmp_path / "o.tsv"))
    assert (
        rows == ["My", "My Boat sea blue boat l1 l2"]
        and read(tmp_path / "o.tsv")[0]["image"] == "images/n01/n01_1.JPEG"
    )
    losses = {"records": 4, "unknown wnid": -1, "no such image": -1, "repeated file name": 0}
    assert report(tmp_path / "o.tsv")["funnel"] == losses | {f"rows in {tmp_path / 'o.tsv'}": 2}


def test_laionet_by_column_and_by_embeddings(folder):
    captions = ["one sea lion", "simba here", "lion and crane", "crane", "none", "a crane"]
    similarity, nsfw = [0.9, 0.69, 0.9, 0.7, 1, 0.99], ["UNLIKELY"] * 5 + ["NSFW"]
    source = write_captions(folder / "in.tsv", captions, similarity=similarity, NSFW=nsfw)
    (folder / "classes.tsv").write_text(CLASSES.replace("\tzoo", "\t"))
    common = [source, "--classes", folder / "classes.tsv", "--out", folder / "o.tsv", "--workers", 1]
    with pytest.raises(SystemExit, match="whose similarity is of image and text"):  # it is not taken unasked
        run("laionet", *common)
    run("laionet", *common, "--similarity", "similarity")
    assert [(r["label"], r["similarity"]) for r in read(folder / "o.tsv")] == [("2", "0.700000")]
    assert "source_similarity" not in read(folder / "o.tsv")[0]
    assert [r["label"] for r in read(folder / "o.all.tsv")] == ["1", "2"]  # "sea lion" names lion too: dropped
    rng = np.random.default_rng(0)
    vectors, queries = rng.normal(size=(6, 8)), rng.normal(size=(3, 8))
    np.save(folder / "in.tsv.npy", vectors)
    np.save(folder / "classes.npy", queries)
    run("laionet", *common, "--embeddings", folder, "--threshold", "-1")
    unit = [v / np.linalg.norm(v) for v in (vectors[1], vectors[3], queries[1], queries[2])]
    found = [float(r["similarity"]) for r in read(folder / "o.tsv")]
    assert found == pytest.approx([unit[0] @ unit[2], unit[1] @ unit[3]], abs=1e-6)
    assert [r["source_similarity"] for r in read(folder / "o.tsv")] == ["0.69", "0.7"]
    np.save(folder / "classes.npy", queries[:2])
    with pytest.raises(SystemExit, match=r"classes.npy: got shape \(2, 8\), expected 3 rows"):
        run("laionet", *common, "--embeddings", folder)


def test_laionet_treats_a_missing_tag_alike_in_every_format(folder, capsys):
    """What is not UNLIKELY goes, an empty field and a key that is not there alike."""
    rows = [{"image": "0.jpg", "caption": "a crane", "similarity": "0.9", "NSFW": "UNLIKELY"},
            {"image": "1.jpg", "caption": "a crane", "similarity": "0.9"}]  # fmt: skip
    (folder / "in.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    bd.write_tsv(folder / "in.tsv", list(rows[0]), rows)
    for kind in ("jsonl", "tsv"):
        out = folder / f"{kind}.out.tsv"
        flags = ["--classes", folder / "classes.tsv", "--similarity", "similarity", "--workers", 1, "--out"]
        run("laionet", folder / f"in.{kind}", *flags, out)
        assert [row["image"] for row in read(out)] == ["0.jpg"], kind
    assert "NSFW" not in capsys.readouterr().err
    bd.write_tsv(folder / "bare.tsv", list(rows[0])[:3], rows)
    run("laionet", folder / "bare.tsv", *flags, folder / "b.tsv")
    assert "no NSFW column in 1 of 1 tables" in capsys.readouterr().err
    run("laionet", folder / "in.tsv", folder / "bare.tsv", *flags, folder / "o.tsv")
    assert len(read(folder / "o.tsv")) == 3 and "no NSFW column in 1 of 2 tables: no row" in capsys.readouterr().err


@pytest.mark.parametrize("arch", ["cbow", "transformer"])
@pytest.mark.parametrize("activation", ["gelu", "quick_gelu"])
def test_text_tower_equals_that_of_clip(tmp_path, arch, activation):
    import torch

    import clip

    torch.manual_seed(0)
    texts = ["A crane bird &amp; 12 fish", "", "the sea lion's " * 40, "naïve café"]
    tokenizer = clip.Tokenizer(clip.train_bpe(texts, 50), 20 if arch == "transformer" else 77)
    text = dict(arch=arch, width=128, vocab_size=tokenizer.vocab_size, context_length=20, n_layers=2)
    model = clip.CLIP("tiny", 16, text, activation).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    torch.save({"state_dict": model.state_dict(), "bpe": "\n".join(tokenizer.merges), "activation": activation}, tmp_path / "c.pt")  # fmt: skip
    with torch.no_grad():
        expected = torch.nn.functional.normalize(model.encode_text(tokenizer(texts)), dim=1).numpy()
    bd.load_text_tower.cache_clear()
    np.testing.assert_allclose(bd.text_features(str(tmp_path / "c.pt"), texts), expected, atol=2e-6)  # order of sums


def test_frequency_counts_samples_and_relevance(folder, capsys):
    for i in range(3):
        write_captions(folder / f"in{i}.tsv", [f"{c} {i} {j}" for j in range(10) for c in CAPTIONS])
    (folder / "more.tsv").write_text("name\tsynonyms\ncrane\tnothing\ncrane\tderrick\n")
    common = [folder / "in*.tsv", "--classes", folder / "classes.tsv", "--match", "word", "--seed", 3]
    for workers in (1, 2):
        out = folder / f"o{workers}.tsv"
        run("frequency", *common, "--out", out, "--workers", workers, "--sample", 8)
    assert [row["count"] for row in read(out)] == ["30", "90", "60"]
    assert len(re.findall(r"^ +\d+    ", capsys.readouterr().out, re.M)) == 2 * 3  # of few classes each is printed once
    assert (folder / "o1.sample.tsv").read_bytes() == (folder / "o2.sample.tsv").read_bytes()
    sample = read(folder / "o1.sample.tsv")
    assert Counter(row["name"] for row in sample) == {"sea lion": 8, "lion": 8, "crane": 8}
    run("frequency", *common, "--out", folder / "n.tsv", "--synonyms", folder / "more.tsv")
    assert [row["count"] for row in read(folder / "n.tsv")] == ["30", "90", "90"]
    assert hashes(folder / "n.tsv")[str(folder / "more.tsv")] == bd.file_hash(folder / "more.tsv")
    judged = [row | {"relevant": "yes" if i % 4 else "No."} for i, row in enumerate(sample)]
    bd.write_tsv(folder / "judged.tsv", list(judged[0]), judged)
    run("frequency", *common, "--out", folder / "r.tsv", "--relevance", folder / "judged.tsv")
    assert hashes(folder / "r.tsv")[str(folder / "judged.tsv")] == bd.file_hash(folder / "judged.tsv")
    row = read(folder / "r.tsv")[1]
    n = 8 * 89 / 82  # as many of endlessly many tell as much as 8 of 90
    low, high = (0.75 + 1.92 / n + np.array([-1, 1]) * 1.96 * np.sqrt(0.1875 / n + 0.9604 / n**2)) / (1 + 3.8416 / n)
    assert (row["estimate"], row["judged"], row["relevant"]) == ("68", "8", "6")  # 67.5, half to even
    assert abs(int(row["low"]) - 90 * low) < 1 and abs(int(row["high"]) - 90 * high) < 1


def test_frequency_by_the_counts_of_query_strings(folder, capsys):
    """MetaCLIP publishes its query strings with counts: "a lion" 500 times, "crane, lion" 7, "gulls" never."""
    rows = [("a lion", "500"), ("crane, lion", "7"), ("a crane", "0"), ("gulls", "9")]
    write = lambda path, rows: path.write_text(  # noqa: E731
        "caption\tn\n" + "".join("\t".join(row) + "\n" for row in rows)
    )
    write(folder / "q.tsv", rows)
    flags = ["--classes", folder / "classes.tsv", "--match", "word", "--out", folder / "o.tsv"]
    run("frequency", folder / "q.tsv", "--weights", "n", *flags)
    assert {row["name"]: row["count"] for row in read(folder / "o.tsv")} == {"sea lion": "0", "lion": "507", "crane": "7"}
    assert report(folder / "o.tsv")["flags"]["weights"] == "n" and report(folder / "o.tsv")["versions"]["numpy"]
    run("frequency", folder / "q.tsv", *flags)
    assert [row["count"] for row in read(folder / "o.tsv")] == ["0", "2", "2"]
    write(folder / "q.tsv", [*rows, ("a lion", "3.5")])
    with pytest.raises(SystemExit, match=r"q.tsv:6: n is '3.5', expected a whole number"):
        run("frequency", folder / "q.tsv", "--weights", "n", *flags)
    for more, message in ((["--sample", 3], "not with --sample"), (["--columns", "n"], "a column of its own")):
        with pytest.raises(SystemExit):
            run("frequency", folder / "q.tsv", "--weights", "n", *flags, *more)
        assert message in capsys.readouterr().err
    with pytest.raises(SystemExit):
        run("label", folder / "q.tsv", "--match", "bag", "--multi", "drop", "--case", "sensitive", *flags[:2], *flags[4:])
    assert "bag has no case" in capsys.readouterr().err


def test_status(tmp_path):
    for shard, n_stats in (("00000", 3), ("00001", 9)):
        status = ["success", "failed_to_download", "success"]
        table = dict(key=[f"{shard}{i}" for i in range(3)], url=["u"] * 3, caption=["c"] * 3, label=["0", "1", "1"],
                     status=status, error_message=["", "HTTP Error 404", ""])  # fmt: skip
        pq.write_table(pa.table(table), tmp_path / f"{shard}.parquet")
        (tmp_path / f"{shard}_stats.json").write_text(json.dumps(dict(count=n_stats, successes=2)))
    run("status", tmp_path, "--out", tmp_path / "retry.tsv")
    assert [row["key"] for row in read(tmp_path / "retry.tsv")] == ["000001", "000011"]
    assert report(tmp_path / "retry.tsv")["funnel"] == {
        "rows": 6,
        "failed_to_download: HTTP Error 404": -2,
        "images": 4,
    }
    assert report(tmp_path / "retry.tsv")["warnings"] == [
        f"{tmp_path}/00001_stats.json: count is 9, but 00001.parquet has 3"
    ]
    (tmp_path / "00000_stats.json").write_text("[]")
    run("status", tmp_path, "--out", tmp_path / "retry.tsv")
    assert report(tmp_path / "retry.tsv")["warnings"][0].endswith("00000_stats.json: not readable; an unfinished shard?")
    by_class = read(tmp_path / "retry.classes.tsv")
    assert [(row["label"], row["rows"], row["count"]) for row in by_class] == [("0", "2", "2"), ("1", "4", "2")]


def test_sample_of_two_files_is_that_of_one_wherever_out_lies(folder):
    """The smallest hashes of all rows; a row of 1,000 of the first file wins as often as one of 10 of the second."""
    write_captions(folder / "a.tsv", [f"a crane {i}" for i in range(200)])
    (folder / "b.tsv").write_text("image\tcaption\n" + "".join(f"b{i}.jpg\tcrane b{i}\n" for i in range(10)))
    both = (folder / "a.tsv").read_text() + (folder / "b.tsv").read_text().split("\n", 1)[1]
    (folder / "one").mkdir()
    (folder / "one" / "ab.tsv").write_text(both)
    samples = []
    for sources, out in (("ab", "o.tsv"), ("ab", "deep/er/o.tsv"), (["one/ab"], "p.tsv")):
        run("frequency", *(folder / f"{name}.tsv" for name in sources), "--classes", folder / "classes.tsv", "--match",
            "word", "--sample", 10, "--out", folder / out, "--workers", 1)  # fmt: skip
        samples.append((folder / out.replace(".tsv", ".sample.tsv")).read_bytes())
    assert len(set(samples)) == 1 and samples[0].count(b"crane b") < 5
    keys = [row["key"] for row in read(folder / "o.sample.tsv")]
    drawn = sorted([*(f"{i}.jpg" for i in range(200)), *(f"b{i}.jpg" for i in range(10))],
                   key=lambda key: bd.hash64("0", "2", key))  # fmt: skip
    assert keys == drawn[:10]


def test_laionet_takes_the_embeddings_that_are_there_now(folder):
    """Parts of a stopped call are of the old embeddings, and two tables of one name would share a file."""
    for name in ("in", "deep/in"):
        (folder / name).parent.mkdir(exist_ok=True)
        write_captions(folder / f"{name}.tsv", ["simba", "crane"])
    common = ["--classes", folder / "classes.tsv", "--out", folder / "o.tsv", "--workers", 1, "--embeddings", folder]
    np.save(folder / "classes.npy", np.eye(3))
    np.save(folder / "in.tsv.npy", np.eye(3)[:2])
    run("laionet", folder / "in.tsv", *common, "--shard", "0/1")
    np.save(folder / "in.tsv.npy", np.eye(3)[1:])
    run("laionet", folder / "in.tsv", *common)
    assert [row["label"] for row in read(folder / "o.tsv")] == ["1", "2"]
    assert {str(folder / name) for name in ("in.tsv.npy", "classes.npy")} < hashes(folder / "o.tsv").keys()
    with pytest.raises(SystemExit, match="several tables have one file name"):
        run("laionet", folder / "in.tsv", folder / "deep" / "in.tsv", *common)


def test_nul_in_jsonl_becomes_a_blank(folder):
    (folder / "in.jsonl").write_text(json.dumps(dict(image="a", caption="a lion\0x")) + "\n")
    run("label", folder / "in.jsonl", "--classes", folder / "classes.tsv", "--out", folder / "o.tsv", "--workers", 1)
    assert read(folder / "o.tsv")[0]["caption"] == "a lion x"


def test_interval_knows_that_captions_are_finite():
    """Methods 7: 4,040 captions, 579 of 1,024 relevant, SE 54.1: 2,284 -+ 106. All judged leave no doubt."""
    low, high = (round(4040 * share) for share in bd.wilson(579, 1024, 4040))
    assert (low, high) == (2178, 2389) and high - low == pytest.approx(2 * 1.96 * 54.1, rel=0.01)
    assert bd.wilson(3, 8, 8) == (0.375, 0.375) and bd.wilson(0, 0, 5) == bd.wilson(0, 0, 0) == (0, 1)


def test_two_classes_of_one_name(folder, capsys):
    """Both cranes are sampled, judged, counted and matched apart; a name that is neither is refused."""
    (folder / "classes.tsv").write_text("name\twnid\tmatch\ncrane\tn01\tbird\ncrane\tn02\tderrick\n")
    source = write_captions(folder / "in.tsv", ["bird 1", "bird 2", "derrick"], label=["0", "0", "1"])
    common = ["frequency", source, "--classes", folder / "classes.tsv", "--match", "word", "--workers", 1]
    run(*common, "--sample", 9, "--out", folder / "f.tsv")
    judged = [row | {"relevant": "yes" if row["label"] == "0" else "no"} for row in read(folder / "f.sample.tsv")]
    assert [row["label"] for row in judged] == ["0", "0", "1"]
    bd.write_tsv(folder / "judged.tsv", list(judged[0]), judged)
    run(*common, "--relevance", folder / "judged.tsv", "--out", folder / "g.tsv")
    assert [(row["count"], row["judged"], row["relevant"]) for row in read(folder / "g.tsv")] == [("2", "2", "2"), ("1", "1", "0")]
    run("subset", source, "--match-frequency", folder / "f.tsv", "--classes", folder / "classes.tsv", "--out", folder / "s.tsv")
    assert len(read(folder / "s.tsv")) == 3
    for more, counts in ("name\tsynonyms\nn02\tbird", "23"), ("wnid\tname\tsynonyms\nn01\tcrane\tderrick", "31"):
        (folder / "more.tsv").write_text(f"{more}\n")
        run(*common, "--synonyms", folder / "more.tsv", "--out", folder / "g.tsv")
        assert "".join(row["count"] for row in read(folder / "g.tsv")) == counts
    assert report(folder / "g.tsv")["shared_names"] == {"derrick": [0, 1]}
    assert "warning: names of several classes: derrick" in capsys.readouterr().err
    (folder / "more.tsv").write_text("name\tsynonyms\ncrane\tstork\n")
    with pytest.raises(SystemExit, match="--synonyms: crane is the name of classes 0, 1; give their wnids"):
        run(*common, "--synonyms", folder / "more.tsv", "--out", folder / "g.tsv")
    for wrong in ("crane\t", "crane\t2", "goose\t0", "craen\t"):
        (folder / "judged.tsv").write_text(f"name\tlabel\trelevant\n{wrong}\tyes\n")
        with pytest.raises(SystemExit, match="judged.tsv:2: .*not just one of --classes"):
            run(*common, "--relevance", folder / "judged.tsv", "--out", folder / "g.tsv")


@pytest.mark.parametrize(
    "row, embeddings, message",
    [
        (dict(similarity="abc"), None, "in.jsonl:1: similarity is 'abc'"),
        (dict(), None, "in.jsonl:1: similarity is ''"),
        (dict(), b"", "in.jsonl.npy: not readable as embeddings"),
        (dict(), np.eye(4)[:1], "4 numbers a row, classes 3"),
    ],
)
def test_laionet_of_bad_similarities(folder, row, embeddings, message):
    (folder / "in.jsonl").write_text(json.dumps(dict(image="a", caption="a crane") | row) + "\n")
    np.save(folder / "classes.npy", np.eye(3))
    if isinstance(embeddings, bytes):
        (folder / "in.jsonl.npy").write_bytes(embeddings)
    elif embeddings is not None:
        np.save(folder / "in.jsonl.npy", embeddings)
    flags = ["--similarity", "similarity"] if embeddings is None else ["--embeddings", folder]
    with pytest.raises(SystemExit, match=message):
        run("laionet", folder / "in.jsonl", "--classes", folder / "classes.tsv", "--out", folder / "o.tsv", "--workers", 1, *flags)


def test_half_a_surrogate_pair_in_a_url(folder):
    (folder / "in.jsonl").write_text('{"url": "\\ud83d", "caption": "a crane"}\n')
    (folder / "entries.tsv").write_text("entry\ncrane\n")
    run("curate", folder / "in.jsonl", "--metadata", folder / "entries.tsv", "--out", folder / "o.tsv", "--workers", 1)
    assert [row["caption"] for row in read(folder / "o.tsv")] == ["a crane"]


@pytest.mark.parametrize(
    "flags",
    [
        ["check", "a.tsv", "--out", "o.tsv", "--sample", "-1"],
        ["subset", "a.tsv", "--out", "o.tsv", "--rows", "-5"],
        ["mix", "a.tsv", "--out", "o.tsv", "--rows", "-5"],
        ["metadata", "a.tsv", "--out", "o.tsv", "--max-entries", "-3"],
        ["subset", "a.tsv", "--out", "o.tsv", "--shots", "1", "--trim-tail", "-1"],
        ["subset", "a.tsv", "--out", "o.tsv", "--threshold", "similarity=0.7.1"],
        ["stats", "a.tsv", "--out", "o.tsv", "--plot", "o.xyz"],
    ],
)
def test_numbers_and_names_that_are_refused(flags, capsys):
    with pytest.raises(SystemExit) as stopped:
        bd.parse_args(flags)
    assert stopped.value.code == 2 and f"{flags[-2]}: got {flags[-1]}, expected" in capsys.readouterr().err


def test_laionet_holds_some_rows_at_a_time(folder, monkeypatch):
    """Chunks of matched rows are measured with their own captions, and queries once."""
    write_captions(folder / "in.tsv", [f"crane {i}" if i % 3 else "nothing" for i in range(20)])
    asked, in_chunks = [], bd.in_chunks
    monkeypatch.setattr(bd, "in_chunks", lambda rows, texts: in_chunks(rows, texts, 5))
    monkeypatch.setattr(bd, "text_features", lambda _, texts: asked.append(len(texts)) or np.array(
        [[1, int(text.split()[-1]) if text[-1].isdigit() else 0] for text in texts]))  # fmt: skip
    (folder / "clip.pt").write_bytes(b"")
    run("laionet", folder / "in.tsv", "--classes", folder / "classes.tsv", "--out", folder / "o.tsv", "--workers", 1,
        "--clip", folder / "clip.pt", "--threshold", -1)  # fmt: skip
    assert asked == [3, 5, 5, 3]
    found = {row["image"]: float(row["similarity"]) for row in read(folder / "o.tsv")}
    assert found == {f"{i}.jpg": pytest.approx(1 / np.sqrt(1 + i * i), abs=2e-6) for i in range(20) if i % 3}


def test_img2dataset_tables_count_what_was_downloaded(folder, capsys):
    """A shard's parquet lists the rows that failed too: they are counted as lost, and in no class."""
    n = len(CAPTIONS)
    status = ["success" if i % 2 else "failed_to_download" for i in range(n)]
    columns = dict(caption=CAPTIONS, key=[str(i) for i in range(n)], status=status, error_message=[None] * n)
    pq.write_table(pa.table(columns), folder / "00000.parquet")
    write_captions(folder / "got.tsv", CAPTIONS[1::2])
    (folder / "entries.tsv").write_text("entry\nlion\ncrane\n")
    rule = ["--classes", folder / "classes.tsv", "--match", "word"]
    for command, flags in (("frequency", rule), ("frequency", [*rule, "--sample", 2]), ("label", rule),
                           ("curate", ["--metadata", folder / "entries.tsv", "--cap", 1])):  # fmt: skip
        for source in "00000.parquet", "got.tsv":
            run(command, folder / source, *flags, "--workers", 1, "--out", folder / f"{source}.tsv")
        all_of, got = (read(folder / f"{source}.tsv") for source in ("00000.parquet", "got.tsv"))
        assert [row.get("count", row.get("caption")) for row in all_of] == [
            row.get("count", row.get("caption")) for row in got] or command == "curate"  # fmt: skip
        assert {row["status"] for row in all_of if "status" in row} <= {"success"}
        funnel = report(folder / "00000.parquet.tsv")["funnel"]
        assert funnel["rows"] == n and funnel["bad: not downloaded by img2dataset"] == -(n + 1) // 2
    with pytest.raises(SystemExit, match="give the folder of its tars"):
        run("dedup", folder / "00000.parquet", "--by", "caption", "--out", folder / "d.tsv")


def test_a_parquet_date_beyond_all_calendars(folder):
    far = pa.array([2**62], pa.timestamp("us"))
    pq.write_table(pa.table({"caption": ["a lion"], "date": far}), folder / "a.parquet")
    with pytest.raises(SystemExit, match=r"a.parquet:1: cannot be read \("):
        list(bd.open_tables([str(folder / "a.parquet")])[1])


@pytest.mark.parametrize("content", ["empty", "list", "part", "number"])
def test_checkpoints_without_a_text_tower(tmp_path, content):
    import torch

    path, part = tmp_path / "c.pt", {"token_embedding.weight": torch.zeros(2, 3)}
    if content == "empty":
        path.touch()
    else:
        torch.save({"list": {"state_dict": part, "bpe": []}, "part": {"state_dict": part, "bpe": "a b"},
                    "number": {"state_dict": {"a": 1}, "bpe": "a b"}}[content], path)  # fmt: skip
    with pytest.raises(SystemExit, match="is no checkpoint of clip.py with a text tower"):
        bd.load_text_tower(str(path))


def test_a_parquet_row_that_no_table_can_hold(folder):
    pq.write_table(pa.table({"caption": ["a lion", "lion " * 3_000_000, "crane"]}), folder / "a.parquet")
    flags = [folder / "a.parquet", "--classes", folder / "classes.tsv", "--workers", 1, "--out", folder / "o.tsv"]
    with pytest.raises(SystemExit, match="a.parquet:2: a row of more than 10 MiB"):
        run("label", *flags)
    run("label", *flags, "--skip-bad")
    assert [row["label"] for row in read(folder / "o.tsv")] == ["1", "2"]


def test_sample_is_cut_file_by_file(folder):
    """The smallest hashes of many files, however they are parted."""
    captions = [f"lion {i}" for i in range(60)]
    for i in range(6):
        write_captions(folder / f"p{i}.tsv", captions[10 * i : 10 * i + 10], url=[f"u{10 * i + k}" for k in range(10)])
    write_captions(folder / "whole.tsv", captions, url=[f"u{i}" for i in range(60)])
    flags = ["--classes", folder / "classes.tsv", "--match", "word", "--sample", 7, "--workers", 1]
    run("frequency", *(folder / f"p{i}.tsv" for i in range(6)), *flags, "--out", folder / "a.tsv")
    run("frequency", folder / "whole.tsv", *flags, "--out", folder / "b.tsv")
    assert (folder / "a.sample.tsv").read_bytes() == (folder / "b.sample.tsv").read_bytes()
    assert len(read(folder / "a.sample.tsv")) == 7


def test_messages_name_the_line_behind_blank_lines_and_quoted_breaks(folder):
    """Line 2 is blank and the row behind it takes lines 3 and 4: what is wrong stands in line 5."""
    source = write_captions(folder / "in.tsv", ["crane"])
    table = '{}\n\n{}\n{}\n'
    common = ["--classes", folder / "classes.tsv", "--workers", 1, "--out", folder / "o.tsv"]
    (folder / "list").write_text("crane\nlion\n")
    for name, header, good, wrong, command in (
        ("c.csv", "name,definition", 'crane,"a\nbird"', "crane,x", ["label", source, *common, "--classes", folder / "c.csv"]),
        ("e.csv", "name,query", 'crane,"a\nbird"', "owl,x", ["classes", folder / "list", *common[4:], "--extra", folder / "e.csv"]),
        ("r.csv", "name,relevant,caption", 'crane,yes,"a\nb"', "crane,perhaps,x", ["frequency", source, *common, "--match", "word", "--relevance", folder / "r.csv"]),
        ("s.csv", "image,caption,similarity", 'a.jpg,"a\ncrane",1', "b.jpg,crane,high", ["laionet", folder / "s.csv", *common, "--similarity", "similarity"]),
    ):  # fmt: skip
        (folder / name).write_text(table.format(header, good, wrong))
        with pytest.raises(SystemExit, match=f"^{folder / name}:5: "):
            run(*command)


SIDE_INPUTS = {
    "label": {"classes.tsv": "--classes"},
    "label --match bag --multi drop": {"classes.tsv": "--classes", "noun.exc": "", "index.noun": ""},
    "frequency --match bag": {"classes.tsv": "--classes", "more.tsv": "--synonyms", "noun.exc": "", "index.noun": ""},
    "laionet": {"classes.tsv": "--classes", "in.tsv.npy": "", "classes.npy": ""},
    "curate": {"entries.tsv": "--metadata"},
}


@pytest.mark.parametrize("command", SIDE_INPUTS)
def test_a_changed_side_input_makes_all_parts_anew(folder, command):
    """Even one of the same size and time: its contents name the parts, and the report tells the hash of each."""
    write_captions(folder / "in.tsv", ["crane", "lion"])
    (folder / "more.tsv").write_text("name\tsynonyms\ncrane\tderrick\n")
    (folder / "entries.tsv").write_text("entry\nlion\ncrane\n")
    (folder / "noun.exc").write_text("lice louse\n")
    (folder / "index.noun").write_text("lion n 1 0 1 0 00000001  \nlouse n 1 0 1 0 00000002  \n")
    np.save(folder / "in.tsv.npy", np.eye(3)[:2])
    np.save(folder / "classes.npy", np.eye(3))
    flags = [x for name, flag in SIDE_INPUTS[command].items() if flag for x in (flag, folder / name)]
    flags += {"laionet": ["--embeddings", folder, "--threshold", -1], "curate": []}.get(command, ["--wordnet", folder])
    name, *rule = command.split()
    flags = [name, folder / "in.tsv", *rule, *flags, "--workers", 1, "--out", folder / "o.tsv"]
    for side in SIDE_INPUTS[command]:
        bd.read_nouns.cache_clear()
        run(*flags, "--shard", "0/1")
        path, time_ns = folder / side, (folder / side).stat().st_mtime_ns
        data = path.read_bytes()
        last = max(i for i, byte in enumerate(data) if chr(byte).isalnum())
        path.write_bytes(data[:last] + bytes([data[last] ^ 1]) + data[last + 1 :])
        os.utime(path, ns=(time_ns, time_ns))
        with pytest.raises(SystemExit, match="--merge: no result yet of 1 of 1 files"):
            run(*flags, "--merge")
        path.write_bytes(data)
        run(*flags, "--merge")
    assert set(hashes(folder / "o.tsv")) == {str(folder / name) for name in ("in.tsv", *SIDE_INPUTS[command])}


def test_ranks_are_of_a_launcher_and_none_waits_in_silence(folder, monkeypatch, capsys):
    sources = [write_captions(folder / f"{i}.tsv", ["crane"]) for i in range(3)]
    flags = ["label", *sources, "--classes", folder / "classes.tsv", "--workers", 1, "--out", folder / "o.tsv"]
    monkeypatch.setenv("RANK", "3")  # of something else: no process would write the table
    run(*flags)
    assert len(read(folder / "o.tsv")) == 3
    (folder / "o.tsv").unlink()
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "0")

    def other_rank(_):
        assert "rank 0 of 2 waits for 1 files of the others, the first" in capsys.readouterr().err
        with monkeypatch.context() as patch:
            patch.setenv("RANK", "1")
            run(*flags)

    monkeypatch.setattr(time, "sleep", other_rank)
    run(*flags)
    assert len(read(folder / "o.tsv")) == 3


def test_workers_are_those_that_have_a_core(monkeypatch):
    import torch

    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 1, 2, 5, 7}, raising=False)
    for local, n in ("1", 5), ("2", 2), ("8", 1):
        monkeypatch.setenv("LOCAL_WORLD_SIZE", local)
        assert {bd.parse_args([*command, "--out", "o.tsv"]).workers for command in (
            ["check", "a.tsv"], ["curate", "a.tsv", "--metadata", "e.tsv"])} == {n}  # fmt: skip
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        for parent, n in (None, 2), (True, 1):
            monkeypatch.setattr(bd.multiprocessing, "parent_process", lambda: parent)  # noqa: B023
            with pytest.raises(SystemExit, match="no such file"):
                bd.load_text_tower("gone.pt")
            assert torch.get_num_threads() == n
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("is_column", [True, False])
def test_laionet_in_shards_gives_the_bytes_of_one_process(folder, is_column):
    rng, n = np.random.default_rng(0), 40
    for i in range(5):
        captions = [f"{('crane', 'simba', 'lion and crane', 'none')[k % 4]} {i} {k}" for k in range(n)]
        columns = dict(similarity=rng.random(n).round(3)) if is_column else {}
        write_captions(folder / f"in{i}.tsv", captions, **columns)
        np.save(folder / f"in{i}.tsv.npy", rng.standard_normal((n, 16)).astype(np.float32))
    np.save(folder / "classes.npy", rng.standard_normal((3, 16)).astype(np.float32))
    flags = ["laionet", folder / "in*.tsv", "--classes", folder / "classes.tsv", "--workers", 1, "--threshold", 0.2]
    flags += ["--similarity", "similarity"] if is_column else ["--embeddings", folder]
    run(*flags, "--out", folder / "one.tsv")
    for i in (2, 0, 1):
        run(*flags, "--out", folder / "many.tsv", "--shard", f"{i}/3")
    run(*flags, "--out", folder / "many.tsv", "--merge")
    for kind in ".tsv", ".all.tsv":
        assert (folder / f"one{kind}").read_bytes() == (folder / f"many{kind}").read_bytes()
    assert 10 < len(read(folder / "one.tsv")) < len(read(folder / "one.all.tsv")) == 100


@pytest.mark.parametrize("command", ["frequency", "label"])
def test_a_killed_run_loses_only_what_it_was_at(folder, command):
    """kill -9 of all processes when the first of six files is done: the second call does the others and no more."""
    n_rows = 100_000 if command == "frequency" else 20_000  # a part of a second a file
    for i in range(6):
        captions = [f"{CAPTIONS[k % 7]} {i} {k}" for k in range(n_rows if i > 1 else n_rows // 10)]
        write_captions(folder / f"in{i}.tsv", captions)
    flags = [command, folder / "in*.tsv", "--classes", folder / "classes.tsv", "--match", "word"]
    out, parts = folder / "killed.tsv", folder / "killed.tsv.parts"
    process = subprocess.Popen([sys.executable, SCRIPT, *map(str, flags), "--workers", "2", "--out", str(out)],
                               stdout=-3, stderr=-3, start_new_session=True)  # fmt: skip
    while not list(parts.glob("*.npz")):
        assert process.poll() is None
        time.sleep(0.002)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    done = {path: path.stat().st_mtime_ns for path in parts.glob("*.npz")}
    assert 1 <= len(done) < 6 and not out.exists()
    run(*flags, "--out", out, "--workers", 1, "--shard", "0/1")  # leaves the parts to be looked at
    assert {path: path.stat().st_mtime_ns for path in done} == done and len(list(parts.glob("*.npz"))) == 6
    run(*flags, "--out", out, "--merge")
    run(*flags, "--out", folder / "whole.tsv", "--workers", 1)
    assert out.read_bytes() == (folder / "whole.tsv").read_bytes() and not parts.exists()


def test_status_passes_over_what_img2dataset_is_at_and_names_classes(folder):
    """A parquet has its footer at the end only; labels are numbers, perhaps as floats, names or wnids."""
    (folder / "classes.tsv").write_text("name\twnid\ncat\tn1\ndog\tn2\n")
    status, labels = ["success", "failed_to_download", "success", "success"], ["n2", "0.0", "1", None]
    columns = dict(key=list("abcd"), caption=["x"] * 4, wnid=labels, status=status, error_message=[""] * 4)
    pq.write_table(pa.table(columns), folder / "00000.parquet")
    (folder / "00000_stats.json").write_text(json.dumps(dict(count=4, successes=3)))
    (folder / "00001.parquet").write_bytes(b"PAR1")
    run("status", folder, "--classes", folder / "classes.tsv", "--out", folder / "retry.tsv")
    names = {row["label"]: row["name"] for row in read(folder / "retry.classes.tsv")}
    assert names == {"n2": "dog", "0.0": "cat", "1": "dog", "none": ""}
    (warning,) = report(folder / "retry.tsv")["warnings"]
    assert "00001.parquet: no _stats.json" in warning


def test_a_blank_behind_a_name_is_no_part_of_it(folder):
    (folder / "classes.tsv").write_text("name\ntiger cat \n")
    write_captions(folder / "a.tsv", ["a tiger cat sat"])
    for rule in ("word", "substring", "bag"):
        run("label", folder / "a.tsv", "--classes", folder / "classes.tsv", "--match", rule, "--multi", "drop",
            "--out", folder / "o.tsv", *(["--lemmas", "none"] if rule == "bag" else []))  # fmt: skip
        assert len(read(folder / "o.tsv")) == 1


def test_damaged_json_is_counted_by_cause(folder):
    lines = [json.dumps(dict(image="a.jpg", caption="a lion"))] + [f'{{"caption": "{"x" * n}' for n in range(5)]
    (folder / "a.jsonl").write_text("\n".join(lines) + "\n")
    run("label", folder / "a.jsonl", "--classes", folder / "classes.tsv", "--match", "word", "--multi", "drop",
        "--skip-bad", "--out", folder / "o.tsv")  # fmt: skip
    (bad,) = (what for what in report(folder / "o.tsv")["funnel"] if "not JSON" in what)
    assert "column" not in bad and report(folder / "o.tsv")["funnel"][bad] == -5


def test_captions_of_one_address_are_drawn_alike_in_any_files(folder):
    samples = []
    for parts in ([["a crane", "crane b"]], [["a crane"], ["crane b"]], [["crane b"], ["a crane"]]):
        for i, captions in enumerate(parts):
            (folder / f"{i}.tsv").write_text("image\tcaption\n" + "".join(f"x.jpg\t{c}\n" for c in captions))
        run("frequency", *(folder / f"{i}.tsv" for i in range(len(parts))), "--classes", folder / "classes.tsv",
            "--match", "word", "--sample", 1, "--workers", 1, "--out", folder / "f.tsv")  # fmt: skip
        samples.append([row["caption"] for row in read(folder / "f.sample.tsv")])
    assert samples[0] == samples[1] == samples[2]


def test_the_command_of_a_merged_table_makes_it(folder, monkeypatch):
    write_captions(folder / "a.tsv", CAPTIONS)
    flags = ["label", str(folder / "a.tsv"), "--classes", str(folder / "classes.tsv"), "--match", "word", "--multi",
             "drop", "--out", str(folder / "o.tsv")]  # fmt: skip
    for more in (["--shard", "0/1"], ["--shard=0/1", "--merge"]):
        monkeypatch.setattr(sys, "argv", ["build_datasets.py", *flags, *more])
        run(*flags, *more)
    assert report(folder / "o.tsv")["command"] == " ".join(["python", "build_datasets.py", *flags])


def test_all_columns_are_searched(folder):
    """A caption column is empty here: without --columns `title` would not be read."""
    (folder / "in.tsv").write_text("image\tcaption\ttitle\ttags\n0\t\ta lion\tcrane\n1\t\t\tcrane\n2\t\ta sea\tlion\n")
    flags = [folder / "in.tsv", "--classes", folder / "classes.tsv", "--match", "word", "--columns", "title", "tags",
             "--workers", 1, "--out", folder / "o.tsv"]  # fmt: skip
    run("frequency", *flags)
    assert [row["count"] for row in read(folder / "o.tsv")] == ["1", "2", "2"]
    run("label", *flags, "--multi", "all")
    assert [row["label"] for row in read(folder / "o.tsv")] == list("12201")


def test_lemmas_and_case_of_the_command(folder):
    for name, text in {"noun.exc": "lice louse\n", "index.noun": "louse n 1 0 1 0 00000001  \n",
                       "classes.tsv": "name\nlouse\n"}.items():  # fmt: skip
        (folder / name).write_text(text)
    write_captions(folder / "in.tsv", ["two lice", "a louse", "a Louse"])
    flags = [folder / "in.tsv", "--classes", folder / "classes.tsv", "--workers", 1, "--out", folder / "o.tsv"]
    for lemmas, n in (("nltk", "3"), ("none", "2")):
        run("frequency", *flags, "--lemmas", lemmas, "--wordnet", folder)
        assert read(folder / "o.tsv")[0]["count"] == n
    for more, n in (([], 1), (["--case", "insensitive"], 2)):
        run("label", *flags, "--match", "substring", *more)
        assert len(read(folder / "o.tsv")) == n


def test_incaps_draws_the_order_and_keeps_the_longest_text_wherever_it_stands(tmp_path):
    """A file name of another wnid is no image of this one; a variant is usable if one of its texts is there."""
    (tmp_path / "classes.tsv").write_text("name\twnid\ncatamaran\tn01\n")
    names, records = [f"n01_{i}.JPEG" for i in range(20)], []
    for i, name in enumerate(names):
        texts = ["short", f"the longer text {i}"][:: 1 if i % 2 else -1]
        records += [dict(filename=name, wnid="n01", title=text, tags=[], description="") for text in texts]
        records[-1]["description"] = "d" * (i < 5)
    records += [dict(filename="n02_1.JPEG", wnid="n01", title="x", tags=[], description="")]
    (tmp_path / "images" / "n01").mkdir(parents=True)
    for name in (*names, "n02_1.JPEG"):
        (tmp_path / "images" / "n01" / name).write_bytes(b"x")
    (tmp_path / "in.json").write_text(json.dumps(records))
    found = []
    for seed in 0, 1:
        run("incaps", tmp_path / "in.json", "--images", tmp_path / "images", "--classes", tmp_path / "classes.tsv",
            "--seed", seed, "--out", tmp_path / "o.tsv")  # fmt: skip
        rows = read(tmp_path / "o.tsv")
        assert all(row["title"] == f"the longer text {row['filename'][4:-5]}" for row in rows)
        found.append([row["filename"] for row in rows])
    assert found[0] != found[1] and sorted(found[0]) == sorted(found[1]) == sorted(names)
    n = sum(bool(row["description"]) for row in rows)
    assert report(tmp_path / "o.tsv")["rows_with_text"] == {
        "title": 20, "tags": 0, "description": n, "title+description": 20, "tags+description": n, "title+tags": 20}  # fmt: skip
    assert 0 < n < 20 and report(tmp_path / "o.tsv")["funnel"]["unknown wnid"] == -1


def test_laionet_keeps_the_similarity_of_image_and_text_through_a_second_call(folder):
    """A tag's case does not count."""
    source = write_captions(folder / "in.tsv", ["simba", "crane"], similarity=[0.33, 0.35], NSFW=["Unlikely", "unsure"])
    for name, rows in ("classes", np.eye(3)), ("in.tsv", np.eye(3)[:2]), ("o.all.tsv", np.eye(3)[1:2]):
        np.save(folder / f"{name}.npy", rows)
    flags = ["--classes", folder / "classes.tsv", "--embeddings", folder, "--workers", 1, "--out"]
    run("laionet", source, *flags, folder / "o.tsv")
    run("laionet", folder / "o.all.tsv", *flags, folder / "p.tsv")
    (row,) = read(folder / "p.tsv")
    assert (row["image"], row["similarity"], row["source_similarity"]) == ("0.jpg", "1.000000", "0.33")


def test_status_tells_the_share_of_a_class_and_which_are_lost(tmp_path):
    n, status = 4, ["success", "failed_to_download", "success", "failed_to_resize"]
    table = dict(key=list("abcd"), label=list("0112"), status=status, error_message=["x"] * n)
    pq.write_table(pa.table(table), tmp_path / "00000.parquet")
    (tmp_path / "00000_stats.json").write_text(json.dumps(dict(count=n, successes=2)))
    run("status", tmp_path, "--out", tmp_path / "retry.tsv")
    assert [row["success"] for row in read(tmp_path / "retry.classes.tsv")] == ["1.0000", "0.5000", "0.0000"]
    assert report(tmp_path / "retry.tsv")["lost_classes"] == ["2"]


def test_a_row_of_a_shard_without_a_status_is_kept_and_not_lost(folder):
    columns = dict(caption=["crane"] * 3, key=list("abc"), status=[None, "success", "failed_to_download"], error_message=[None] * 3)
    pq.write_table(pa.table(columns), folder / "00000.parquet")
    run("label", folder / "00000.parquet", "--classes", folder / "classes.tsv", "--workers", 1, "--out", folder / "o.tsv")
    assert [row["key"] for row in read(folder / "o.tsv")] == ["a", "b"]
    funnel = report(folder / "o.tsv")["funnel"]
    assert (funnel["rows"], funnel["bad: not downloaded by img2dataset"]) == (3, -1)


def test_judgements_may_be_digits(tmp_path):
    (tmp_path / "j.tsv").write_text("name\trelevant\n" + "".join(f"lion\t{a}\n" for a in ("1", "0", "Yes", "no", "")))
    assert bd.read_relevance(str(tmp_path / "j.tsv"), ["crane", "lion"]) == {1: [4, 2]}


def test_queries_of_laionet(folder, monkeypatch):
    """The first word in lower case, which is the definition as it is."""
    (folder / "classes.tsv").write_text("name\tdefinition\tquery\nSea Lion\ta Seal\t\ncrane\ta bird\tHeron\n")
    seen, source = [], write_captions(folder / "in.tsv", ["crane"], s=[0.5])
    monkeypatch.setattr(bd, "run_files", lambda work, paths, out, settings, run: seen.append(settings["queries"]))
    run("laionet", source, "--classes", folder / "classes.tsv", "--similarity", "s", "--out", folder / "o.tsv")
    assert seen == [["sea lion which is a Seal", "heron which is a bird"]]


def test_wilson_is_scipy_s_for_the_draws_that_have_its_variance():
    """4 of 7 without replacement vary as 4 x 6 / 3 = 8 with it, 10 of 19 as 20."""
    for yes, n, total, draws in ((2, 4, 7, 8), (3, 4, 7, 8), (3, 10, 19, 20)):
        expected = binomtest(yes * draws // n, draws).proportion_ci(method="wilson")
        assert bd.wilson(yes, n, total) == pytest.approx((expected.low, expected.high), abs=1e-6)


def test_names_of_a_class_are_one_whatever_their_case():
    row = bd.class_of_line("lion\tLion|big cat|Big Cat", "x:1", "", {}, {})
    assert row["name"] == "lion" and row["synonyms"] == "big cat"


def test_a_name_that_match_replaces_is_no_other_class_s_loss(folder):
    """Only the first class is found by blue jay alone; jay is the second's own."""
    (folder / "classes.tsv").write_text("name\tdefinition\tmatch\twnid\njay\ta bird\tblue jay\tn1\njay\ta man\t\tn2\n")
    write_captions(folder / "in.tsv", ["a jay", "crow"], s=[0.9, 0.9])
    run("laionet", folder / "in.tsv", "--classes", folder / "classes.tsv", "--similarity", "s", "--out", folder / "o.tsv",
        "--workers", 1)  # fmt: skip
    assert [(row["label"], row["caption"]) for row in read(folder / "o.tsv")] == [("1", "a jay")]


def test_or_and_a_slash_between_blanks_part_names():
    assert bd.clean_name("a/c_unit (old) or cooler / fan") == ["a/c unit", "cooler", "fan"]
