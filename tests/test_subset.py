"""build_datasets.py subset, mix, stats: hand numbers of the methods, nesting, independence of order, end to end."""

import contextlib
import functools
import json
from collections import Counter

import numpy as np
import programs
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import spearmanr

import build_datasets as bd

run = functools.partial(programs.answer, bd)


def table(path, counts, **columns):
    """counts: {label: rows}."""
    path.parent.mkdir(exist_ok=True)
    rows = [
        dict(image=f"{path.stem}{c}-{i}.jpg", label=c, caption=f"w {c}") for c, n in counts.items() for i in range(n)
    ]
    rows = [row | {name: value(i) for name, value in columns.items()} for i, row in enumerate(rows)]
    bd.write_tsv(path, ("image", "label", "caption", *columns), rows)
    return path


def read(path):
    return list(bd.open_tables([str(path)])[1])


def counts_of(path):
    return dict(sorted(Counter(int(row["label"]) for row in read(path)).items()))


def test_rescue_by_hand():
    """Methods 10: a10 b3 c1, the three smallest hashes are all a; rescue gives a3 b1 c1, at equal n a1 b1 c1."""
    labels = np.array([0] * 10 + [1] * 3 + [2])
    hashes = np.linspace(0, 0.9, 14)
    pool = np.ones(14, bool)
    mask = bd.bottom(hashes, pool, 3)
    assert np.flatnonzero(mask).tolist() == [0, 1, 2]
    more, n = bd.rescue(hashes, labels, mask, pool, False)
    assert n == 2 and np.flatnonzero(more).tolist() == [0, 1, 2, 10, 13]
    equal, _ = bd.rescue(hashes, labels, mask, pool, True)
    assert np.flatnonzero(equal).tolist() == [0, 10, 13]  # the largest hashes go
    with pytest.raises(SystemExit, match="cannot hold a row of each of 3"):
        bd.rescue(hashes, labels, bd.bottom(hashes, pool, 2), pool, True)
    with pytest.raises(SystemExit, match="15 rows wanted, 14 there"):
        bd.bottom(hashes, pool, 15)


def test_rescue_takes_from_the_ten_largest_classes():
    """13 classes; the row with the largest hash of those that can go is 93, of a small one."""
    labels, mask = np.repeat(np.arange(13), [9] * 10 + [2, 2, 1]), np.arange(95) < 94
    kept, _ = bd.rescue(np.linspace(0, 0.9, 95), labels, mask, np.ones(95, bool), True)
    assert np.flatnonzero(~kept).tolist() == [89]


def test_gini_and_shares_by_hand():
    assert bd.gini_of(np.array([5, 5, 5])) == 0 and bd.gini_of(np.array([0, 0, 0, 8])) == 0.75
    x = np.array([1, 3, 7, 0, 2])
    assert bd.gini_of(x) == pytest.approx(np.abs(x[:, None] - x).sum() / (2 * len(x) ** 2 * x.mean()))
    assert bd.round_shares(10, [1, 1, 1]).tolist() == [4, 3, 3] and bd.round_shares(7, [2, 1]).tolist() == [5, 2]


def test_profiles():
    counts = np.array([1000, 0, 1000, 1000, 1000])
    assert bd.profile_quota(counts, "balanced", 1, 0, 0).tolist() == [1000, 0, 1000, 1000, 1000]
    assert sorted(bd.profile_quota(counts, "exponential", 1000, 0, 0)) == [0, 1, 10, 100, 1000]
    pareto = np.sort(bd.profile_quota(counts, "pareto", 16, 0, 0))[::-1]
    assert pareto.tolist() == [1000, 250, 112, 63, 0]  # 1 / i^2, since 4^2 = 16; rounded up
    assert bd.profile_quota(np.array([10, 40]), "exponential", 2, 0, 0).tolist() == [10, 20]
    assert bd.profile_quota(counts, "balanced", 1, 10, 0).sum() == 10


@settings(max_examples=40, deadline=None)
@given(st.lists(st.integers(-1, 4), min_size=1, max_size=60), st.integers(0, 5), st.integers(0, 99))
def test_bottom_per_class_equals_sorting(labels, quota, seed):
    labels, hashes = np.array(labels), np.random.default_rng(seed).random(len(labels))
    mask = np.random.default_rng(seed + 1).random(len(labels)) < 0.8
    chosen = bd.bottom_per_class(hashes, labels, mask, np.full(5, quota))
    rows = [i for c in range(5) for i in sorted(np.flatnonzero(mask & (labels == c)), key=lambda i: hashes[i])[:quota]]
    assert sorted(rows) == np.flatnonzero(chosen).tolist()


def test_order_of_rows_does_not_matter_and_cuts_are_nested(tmp_path):
    path = table(tmp_path / "a.tsv", {0: 200, 1: 60, 2: 2})
    lines = path.read_text().splitlines()
    shuffled = [lines[1 + i] for i in np.random.default_rng(0).permutation(len(lines) - 1)]
    (tmp_path / "b.tsv").write_text("\n".join([lines[0], *shuffled]) + "\n")
    found = {}
    for name, flags in (("a", [0.25]), ("b", [0.25]), ("a2", [0.5]), ("seed", [0.25, "--seed", 1])):
        out = tmp_path / f"out_{name}.tsv"
        assert run("subset", tmp_path / f"{name[0] if name != 'seed' else 'a'}.tsv", "--fraction", *flags, "--out", out).stderr == ""  # fmt: skip
        found[name] = {row["image"] for row in read(out)}
    assert found["a"] == found["b"] != found["seed"]
    assert {x for x in found["a"] if x[1] != "2"} <= found["a2"]
    assert any(x.startswith("a2") for x in found["a"])  # class 2 is not lost
    first = (tmp_path / "out_a.tsv").read_bytes(), json.loads((tmp_path / "out_a.tsv.json").read_text())
    run("subset", path, "--fraction", 0.25, "--out", tmp_path / "out_a.tsv")
    again = json.loads((tmp_path / "out_a.tsv.json").read_text())
    assert first[0] == (tmp_path / "out_a.tsv").read_bytes()
    assert list(again)[-1] == "date" and again | {"date": 0} == first[1] | {"date": 0}


@pytest.mark.parametrize(
    "flags, counts",
    [
        (["--shots", 4], {0: 4, 1: 3, 2: 1}),
        (["--trim-tail", 2, "--shots", 1], {0: 10, 1: 1, 2: 1}),
        (["--trim-tail", 1, "--shots", 0], {0: 10, 1: 3}),
        (["--threshold", "similarity=6"], {0: 4, 1: 3, 2: 1}),
        (["--threshold", "similarity=11", "--rows", 3], {0: 1, 1: 1, 2: 1}),
        (["--rows", 14], {0: 10, 1: 3, 2: 1}),
        (["--profile", "exponential", "--imbalance", 9], {0: 9, 1: 3, 2: 1}),
        (["--class-list", "list"], {0: 10, 2: 1}),
        (["--trim-tail", 1, "--shots", 0, "--fraction", 0.5], {0: 6, 1: 1}),  # class 2 was asked away: no rescue
        (["--match-frequency", "wanted", "--rows", 4], {0: 3, 2: 1}),
    ],
)
def test_cuts(tmp_path, flags, counts):
    path = table(tmp_path / "a.tsv", {0: 10, 1: 3, 2: 1}, similarity=str)
    (tmp_path / "list").write_text("2\n0\n")
    files = {"list": tmp_path / "list", "wanted": table(tmp_path / "wanted.tsv", {0: 5, 2: 1})}
    out = tmp_path / "o.tsv"
    done = run("subset", path, *[files.get(f, f) for f in flags], "--out", out)
    assert done.returncode == 0, done.stderr
    assert counts_of(out) == counts
    report = json.loads((tmp_path / "o.tsv.json").read_text())
    assert sum(n for what, n in report["funnel"].items() if what != "rows left") == sum(counts.values())
    if "list" in flags:
        assert {(row["label"], row["subset_label"]) for row in read(out)} == {("0", "1"), ("2", "0")}


def test_a_cut_of_a_cut_by_class_lists(tmp_path):
    path = table(tmp_path / "a.tsv", {0: 3, 1: 2, 2: 1})
    for name, classes in (("first", "2\n1\n"), ("second", "1\n")):
        (tmp_path / name).write_text(classes)
        done = run("subset", path, "--class-list", tmp_path / name, "--out", tmp_path / f"{name}.tsv")
        assert done.returncode == 0, done.stderr
        path = tmp_path / f"{name}.tsv"
    assert [(row["label"], row["subset_label"]) for row in read(path)] == 2 * [("1", "0")]  # places in the second list


def test_match_frequency_by_hand(tmp_path):
    """Methods 10: {a2 b5 c1} from A {a4 b3} and B {b1 c9}: a2, b3 + 1, c0 + 1, and one b is missing."""
    target, a = table(tmp_path / "t.tsv", {0: 2, 1: 5, 2: 1}), table(tmp_path / "a.tsv", {0: 4, 1: 3})
    fill, out = table(tmp_path / "deep" / "b.tsv", {1: 1, 2: 9}), tmp_path / "o.tsv"
    done = run("subset", a, "--match-frequency", target, "--fill", fill, "--out", out)
    assert done.returncode == 0 and "classes short of rows (1 rows): 1" in done.stdout, done.stderr
    assert counts_of(out) == {0: 2, 1: 4, 2: 1} and read(out)[-1]["image"].startswith("deep/b2-")
    assert json.loads((tmp_path / "o.tsv.json").read_text())["deficit"] == [0, 1, 0]


def test_match_frequency_of_what_status_writes(tmp_path):
    """Its label is a class's, not a row's; rows of no class do not count."""
    rows = [dict(label=0, name="a", count=5), dict(label=1, name="b", count=2), dict(label="none", name="", count=9)]
    bd.write_tsv(tmp_path / "retry.classes.tsv", ("label", "name", "rows", "count", "success"), rows)
    bd.write_tsv(tmp_path / "classes.tsv", ("name",), [dict(name="a"), dict(name="b")])
    path, out = table(tmp_path / "a.tsv", {0: 7, 1: 7}), tmp_path / "o.tsv"
    done = run("subset", path, "--match-frequency", tmp_path / "retry.classes.tsv", "--no-rescue", "--out", out)
    assert done.returncode == 0 and counts_of(out) == {0: 5, 1: 2}, done.stderr


def test_dry_run_and_bad_input(tmp_path):
    path, out = table(tmp_path / "a.tsv", {0: 10, 1: 3}, similarity=lambda i: "x" if i == 5 else i), tmp_path / "o.tsv"
    done = run("subset", path, "--shots", 0, "--trim-tail", 1, "--dry-run", "--out", out)
    assert done.returncode == 0 and "classes lost: 1" in done.stdout
    (tmp_path / "list").write_text("1\n\n1\n")
    bare = table(tmp_path / "bare.tsv", {"": 3})
    for flags, message in (
        (["--threshold", "similarity=1"], "a.tsv:7: similarity is 'x', expected a number"),
        (["--rows", 99], "99 rows wanted, 13 there"),
        (["--class-list", tmp_path / "list"], "list:2: '' is no class"),
        (["--key", "url"], "no column url"),
        (["--trim-tail", 3], "--trim-tail needs --shots"),
        (["--profile", "balanced"], "--profile: no row has a label"),
    ):
        done = run("subset", bare if "--profile" in flags else path, *flags, "--out", out)
        assert done.returncode == 2 and message in done.stderr and "Traceback" not in done.stderr, done.stderr
    assert not out.exists()


def test_mix(tmp_path):
    a, b = table(tmp_path / "a" / "train.tsv", {0: 10}), table(tmp_path / "b" / "train.tsv", {1: 30})
    out = tmp_path / "o.tsv"
    for flags, counts in (
        ([], (10, 30)),
        (["--rows", 9, "--weights", 2, 1], (6, 3)),
        (["--rows", 30, "--spill"], (10, 20)),
    ):
        done = run("mix", a, b, *flags, "--out", out)
        assert done.returncode == 0, done.stderr
        rows = read(out)
        assert Counter(row["source"] for row in rows) == dict(zip("ab", counts))
        assert all(row["image"].startswith(f"{row['source']}/") for row in rows)
    done = run("mix", a, b, "--rows", 30, "--out", out)
    assert done.returncode == 2 and "or --spill" in done.stderr
    done = run("mix", a, b, "--weights", 3, 1, "--out", out)
    assert done.returncode == 2 and "--weights are of --rows" in done.stderr
    copy = tmp_path / "a" / "copy.tsv"
    copy.write_bytes(a.read_bytes())
    assert run("mix", a, copy, "--out", out).returncode == 0 and len(read(out)) == 10


def test_stats(tmp_path):
    a, b = table(tmp_path / "a.tsv", {0: 50, 1: 10, 2: 3}), table(tmp_path / "b.tsv", {0: 9, 1: 20, 2: 1})
    bd.write_tsv(tmp_path / "classes.tsv", ("name",), [dict(name=n) for n in ("x", "y", "z")])
    bd.write_tsv(tmp_path / "f.tsv", ("name", "count"), [dict(name=n, count=c) for n, c in zip("zyx", (1, 2, 900))])
    done = run("stats", a, b, tmp_path / "f.tsv", "--out", tmp_path / "o.tsv", "--plot", tmp_path / "o.png")
    assert done.returncode == 0, done.stderr
    rows = {row["name"]: row for row in read(tmp_path / "o.tsv")}
    assert rows["f"]["max"] == "900" and rows["f"]["words_mean"] == "" and rows["a"]["below_20"] == "2"
    assert float(rows["a"]["words_mean"]) == float(rows["a"]["words_median"]) == 2  # "w 0"
    assert float(rows["a"]["captions_distinct"]) == pytest.approx(3 / 63)
    assert float(rows["a"]["spearman b"]) == pytest.approx(spearmanr([50, 10, 3], [9, 20, 1]).statistic)
    assert float(rows["a"]["head_share"]) == pytest.approx(50 / 63) and float(rows["f"]["spearman a"]) == 1
    assert (tmp_path / "o.png").read_bytes().startswith(b"\x89PNG")


def test_match_frequency_with_other_classes(tmp_path):
    """Of --fill only --class-list's classes; a class that the target has and the table lacks is short of rows."""
    target, a = table(tmp_path / "t.tsv", {0: 2, 1: 5, 4: 3}), table(tmp_path / "a.tsv", {0: 4, 1: 3})
    (tmp_path / "list").write_text("1\n")
    out, fill = tmp_path / "new" / "o.tsv", table(tmp_path / "b.tsv", {0: 1, 1: 9, 4: 1})
    for flags, counts, deficit in (
        (["--class-list", tmp_path / "list", "--fill", fill], {1: 5}, [0, 0, 0, 0, 0]),
        ([], {0: 2, 1: 3}, [0, 2, 0, 0, 3]),
    ):
        done = run("subset", a, "--match-frequency", target, *flags, "--out", out)
        assert done.returncode == 0 and counts_of(out) == counts, done.stderr
        assert json.loads((tmp_path / "new" / "o.tsv.json").read_text())["deficit"] == deficit


def test_reports_name_the_classes_that_were_found(tmp_path):
    path, classes = table(tmp_path / "a.tsv", {0: 4, 1: 3}), tmp_path / "classes.tsv"
    bd.write_tsv(classes, ("name",), [dict(name="x"), dict(name="y")])
    for flags in (["subset"], ["stats"], ["check", "--max-bad", 1]):
        assert run(flags[0], path, *flags[1:], "--out", tmp_path / "o.tsv").returncode == 0
        assert json.loads((tmp_path / "o.tsv.json").read_text())["flags"]["classes"] == str(classes)
    assert bd.find_classes(None, "a.tsv")[2] is None
    (tmp_path / "in").mkdir()
    for folder, found in ((tmp_path, "classes.tsv"), (tmp_path / "in", "../classes.tsv")):
        with contextlib.chdir(folder):  # as given, without private folders
            assert bd.find_classes(None, "a.tsv")[2] == found


def test_tail_is_among_the_listed_classes(tmp_path):
    """Classes that --class-list took out have no rows, and are not the rarest ones to be trimmed."""
    data = table(tmp_path / "t.tsv", {0: 9, 1: 8, 2: 2, 3: 1, 4: 5, 5: 3})
    (tmp_path / "list.txt").write_text("0\n1\n4\n5\n")
    flags = ["--class-list", tmp_path / "list.txt", "--trim-tail", 2, "--shots", 1]
    assert run("subset", data, *flags, "--out", tmp_path / "o.tsv").returncode == 0
    assert counts_of(tmp_path / "o.tsv") == {0: 9, 1: 8, 4: 1, 5: 1}
    result = run("subset", data, "--trim-tail", 2, "--shots", 0, "--threshold", "label=4", "--out", tmp_path / "p.tsv")
    assert result.returncode == 0 and "2 of the 2 rarest classes have no rows to trim" in result.stderr
    (tmp_path / "list.txt").write_text("0\n\n1\n0\n")
    assert f"{tmp_path}/list.txt:2: '' is no class" in run("subset", data, *flags, "--out", tmp_path / "q.tsv").stderr
    (tmp_path / "list.txt").write_text("0\n1\n0\n")
    assert f"{tmp_path}/list.txt:3: '0' is there twice" in run("subset", data, *flags, "--out", tmp_path / "q.tsv").stderr


def test_out_is_no_input(tmp_path):
    data = table(tmp_path / "t.tsv", {0: 3, 1: 2})
    before = data.read_bytes()
    for command in ("subset", "stats", "check", "mix"):
        result = run(command, data, "--out", data)
        assert result.returncode == 2 and "is an input" in result.stderr, command
    result = run("frequency", tmp_path, "--classes", data, "--out", tmp_path / "t.sample.tsv")
    assert "is an input" not in result.stderr
    (tmp_path / "link.tsv").symlink_to(data)
    assert "is an input" in run("stats", tmp_path / "link.tsv", "--out", data).stderr
    assert data.read_bytes() == before


def test_rows_without_a_key_are_no_copies_of_each_other(tmp_path):
    a = table(tmp_path / "a.tsv", {0: 3}, url=lambda i: f"u{i}" if i else "")
    b = table(tmp_path / "b.tsv", {1: 3}, url=lambda i: "" if i else "u1")
    assert run("mix", a, b, "--key", "url", "--out", tmp_path / "m.tsv").returncode == 0
    assert counts_of(tmp_path / "m.tsv") == {0: 3, 1: 2}  # u1 alone is in both


@pytest.mark.parametrize("profile", ["balanced", "exponential", "pareto"])
def test_profile_with_rows_is_exact(tmp_path, profile):
    """A class's last row is paid for by large classes; what a class lacks comes from the others, and is told."""
    path, out = table(tmp_path / "a.tsv", {c: 80 - c for c in range(60)}), tmp_path / "o.tsv"
    for rows in (60, 61, 121, 150, 3000, 3030):
        done = run("subset", path, "--profile", profile, "--imbalance", 20, "--rows", rows, "--out", out)
        counts = counts_of(out)
        assert done.returncode == 0 and sum(counts.values()) == rows and len(counts) == 60, done.stderr
        assert list(counts.values()) == sorted(counts.values(), reverse=True) or rows > 3000
        is_short = rows >= 3000
        assert ("classes short of rows" in done.stdout) == is_short
    for rows, message in ((59, "a row of each of the 60 classes"), (3031, "there are 3,030 rows to choose from")):
        done = run("subset", path, "--profile", profile, "--rows", rows, "--out", out)
        assert done.returncode == 2 and message in done.stderr and done.stderr.count("\n") == 1, done.stderr
    done = run("subset", path, "--profile", profile, "--rows", 99, "--shots", 1, "--out", out)
    assert done.returncode == 2 and "not with --shots" in done.stderr


@given(st.lists(st.integers(0, 300), min_size=1, max_size=30).filter(any), st.floats(1, 1000), st.integers(1, 900))
def test_a_profile_keeps_a_table_that_has_it(counts, imbalance, rows):
    counts = np.array(counts)
    for profile in bd.PROFILES:
        quota = bd.profile_quota(counts, profile, imbalance, 0, 0)
        assert (quota <= counts).all() and ((quota > 0) == (counts > 0)).all()
        assert (bd.profile_quota(quota, profile, imbalance, 0, 0) == quota).all()
        if rows >= (counts > 0).sum():
            quota = bd.profile_quota(counts, profile, imbalance, rows, 0)
            assert quota.sum() == rows and ((quota > 0) == (counts > 0)).all()
            assert (bd.profile_quota(quota, profile, imbalance, rows, 0) == quota).all()


def test_rows_of_one_key_are_told_apart_by_their_fields(tmp_path):
    """`label --multi all` writes a row for each class of an image: which of them is kept hangs on no order."""
    rows = [dict(image=f"{i // 2}.jpg", label=i % 2, caption="both") for i in range(60)]
    bd.write_tsv(tmp_path / "a.tsv", ("image", "label", "caption"), rows)
    bd.write_tsv(tmp_path / "b.tsv", ("caption", "image", "label"), [rows[i] for i in np.random.default_rng(1).permutation(60)])  # fmt: skip
    kept = {}
    for flags in (["subset", "--rows", 21], ["subset", "--rows", 23], ["subset", "--rows", 25], ["mix", "--rows", 27]):
        for name in "ab":
            assert run(flags[0], tmp_path / f"{name}.tsv", *flags[1:], "--out", tmp_path / "o.tsv").returncode == 0
            kept[name] = {(row["image"], row["label"]) for row in read(tmp_path / "o.tsv")}
        assert kept["a"] == kept["b"]


def test_cuts_are_nested_over_folders_by_a_column_that_stays(tmp_path):
    """Images are named from their table's folder, so by image a cut elsewhere is another draw, and that is told."""
    path = table(tmp_path / "a" / "train.tsv", {0: 200}, url=lambda i: f"http://x/{i}.jpg")
    near, far = tmp_path / "a" / "o.tsv", tmp_path / "b" / "o.tsv"
    for out, key, is_told in ((near, "image", False), (far, "image", True), (far, "url", False)):
        done = run("subset", path, "--rows", 150, "--key", key, "--out", out)
        assert done.returncode == 0 and ("with --key url" in done.stdout) == is_told, done.stderr
        if not is_told:
            cuts = []
            for source, name in ((path, "direct"), (out, "twice")):
                run("subset", source, "--rows", 60, "--key", key, "--out", out.parent / f"{name}.tsv")
                cuts.append({row["url"] for row in read(out.parent / f"{name}.tsv")})
            assert cuts[0] == cuts[1] and len(cuts[0]) == 60


def test_labels_that_are_not_read_or_are_floats(tmp_path):
    """mix and prune read no labels; pandas writes 3.0 where a label is missing."""
    (tmp_path / "w.csv").write_text("filepath,class\na.jpg,n01440764\nb.jpg,n01443537\n")
    assert run("mix", tmp_path / "w.csv", "--out", tmp_path / "o.tsv").stderr == ""
    assert [row["label"] for row in read(tmp_path / "o.tsv")] == ["n01440764", "n01443537"]
    chosen = bd.least_similar([str(tmp_path / "w.csv")], np.array([0.5, 0.1]), 1, 0)["near"]
    assert chosen.tolist() == [True, False]
    (tmp_path / "f.jsonl").write_text('{"image": "a", "label": 3.0}\n{"image": "b", "label": null}\n')
    done = run("subset", tmp_path / "f.jsonl", "--shots", 1, "--out", tmp_path / "o.tsv")
    assert done.returncode == 0 and [row["label"] for row in read(tmp_path / "o.tsv")] == ["3.0"], done.stderr
    assert run("stats", tmp_path / "f.jsonl", "--out", tmp_path / "o.tsv").stderr == ""
    assert read(tmp_path / "o.tsv")[0]["labelled"] == "1"
    assert [bd.label_number(x, {}, 4) for x in ("3", "3.", "3.0|9", "4.0", "3.5", "²", "-0.0", "9" * 9999)] == [3, 3, 3] + 5 * [None]  # fmt: skip


@pytest.mark.parametrize("label", [99999999999, 2000000000, "9" * 5000])
def test_labels_beyond_all_classes(tmp_path, label):
    path, out = table(tmp_path / "a.tsv", {0: 2, label: 1}), tmp_path / "o.tsv"
    for flags in (["stats"], ["subset", "--shots", 1]):
        done = run(flags[0], path, *flags[1:], "--out", out)
        assert done.returncode == 2 and "a.tsv:4: label '" in done.stderr and done.stderr.count("\n") == 1, done.stderr
        assert "is no number below 16,777,216; names and wnids need --classes" in done.stderr and not out.exists()


def test_numbers_that_make_no_sense(tmp_path):
    path, out = table(tmp_path / "a.tsv", {0: 2, 1: 1}), tmp_path / "o.tsv"
    assert run("subset", path, "--shots", 10**20, "--out", out).returncode == 0 and counts_of(out) == {0: 2, 1: 1}
    out.unlink()
    bd.write_tsv(tmp_path / "f.tsv", ("name", "count"), [dict(name="x", count="²")])
    bd.write_tsv(tmp_path / "classes.tsv", ("name",), [dict(name="x"), dict(name="y")])
    bare = table(tmp_path / "bare.tsv", {"": 3})
    for flags, message in (
        (["stats", tmp_path / "f.tsv"], "'²': no class of classes.tsv, or no count"),
        (["subset", bare, "--shots", 3], "--shots: no row has a label"),
    ):
        done = run(*flags, "--out", out)
        assert done.returncode == 2 and message in done.stderr and done.stderr.count("\n") == 1, done.stderr
    assert not out.exists()
    done = run("subset", bare, "--shots", 3, "--trim-tail", 1, "--out", out)  # other rows are left as they are
    assert done.returncode == 0 and len(read(out)) == 3


def test_the_tail_is_that_of_the_matched_table(tmp_path):
    """Matched to {1, 50, 2} the rarest class is the first, which had the most rows."""
    target, a = table(tmp_path / "t.tsv", {0: 1, 1: 50, 2: 2}), table(tmp_path / "a.tsv", {0: 100, 1: 50, 2: 10})
    flags = ["--match-frequency", target, "--shots", 0, "--trim-tail", 1, "--out", tmp_path / "o.tsv"]
    assert run("subset", a, *flags).returncode == 0 and counts_of(tmp_path / "o.tsv") == {1: 50, 2: 2}


@pytest.mark.parametrize("seed", range(4))
def test_a_class_of_fill_alone_is_rescued_too(tmp_path, seed):
    target, a = table(tmp_path / "t.tsv", {0: 2, 1: 5, 2: 1}), table(tmp_path / "a.tsv", {0: 4, 1: 3})
    fill, out = table(tmp_path / "b.tsv", {1: 1, 2: 9}), tmp_path / "o.tsv"
    done = run("subset", a, "--match-frequency", target, "--fill", fill, "--rows", 3, "--seed", seed, "--out", out)
    assert counts_of(out) == {0: 1, 1: 1, 2: 1}, done.stderr
    funnel = json.loads((tmp_path / "o.tsv.json").read_text())["funnel"]
    assert funnel["rescued of lost classes"] == -funnel["taken from large ones instead"]
    assert ("rescued of lost classes" in done.stdout) == (funnel["rescued of lost classes"] > 0)


def test_match_frequency_of_status_by_label_where_names_are_shared(tmp_path):
    rows = [dict(label="0.0", name="", count=5), dict(label=1, name="crane", count=2)]
    bd.write_tsv(tmp_path / "retry.classes.tsv", ("label", "name", "rows", "count", "success"), rows)
    classes = [dict(name="crane", wnid="n1"), dict(name="crane", wnid="n2")]
    bd.write_tsv(tmp_path / "classes.tsv", ("name", "wnid"), classes)
    path, out = table(tmp_path / "a.tsv", {0: 7, 1: 7}), tmp_path / "o.tsv"
    done = run("subset", path, "--match-frequency", tmp_path / "retry.classes.tsv", "--out", out)
    assert done.returncode == 0 and counts_of(out) == {0: 5, 1: 2}, done.stderr


def test_counts_of_status_without_classes_are_refused(tmp_path):
    bd.write_tsv(tmp_path / "c.tsv", ("label", "name", "rows", "count"), [dict(label=5, name="", count=3)])
    done = run("subset", table(tmp_path / "a.tsv", {0: 3}), "--match-frequency", tmp_path / "c.tsv", "--out", tmp_path / "o.tsv")
    assert done.returncode == 2 and "'5' '3': no class of classes.tsv" in done.stderr


def test_a_row_without_the_number_is_below_every_threshold(tmp_path):
    path, out = table(tmp_path / "a.tsv", {0: 10}, similarity=lambda i: i if i % 2 else ""), tmp_path / "o.tsv"
    assert run("subset", path, "--threshold", "similarity=-1", "--out", out).returncode == 0
    assert [row["similarity"] for row in read(out)] == list("13579")


def test_stats_by_hand():
    """15 classes, one of them empty: a tenth is one class; 20 rows are not below 20; the median is of all classes."""
    found = bd.describe_counts(np.array([0, 19, 20, 100, 99, *[150] * 4, *[7] * 6]))
    assert found["head_share"] == 150 / 880 and (found["below_20"], found["below_100"]) == (8, 10)
    assert found["median"] == 19 and (found["classes"], found["empty"], found["labelled"]) == (14, 1, 880)


def test_numbers_of_the_reports_by_hand(tmp_path):
    """A cut's classes before and after, a mixture's shares of what it has, mean and median of caption lengths."""
    a, b = table(tmp_path / "a.tsv", {0: 6, 1: 3, 2: 1}), table(tmp_path / "b.tsv", {0: 9})
    report = lambda name: json.loads((tmp_path / f"{name}.tsv.json").read_text())  # noqa: E731
    assert run("subset", a, "--shots", 2, "--out", tmp_path / "s.tsv").returncode == 0
    assert (report("s")["classes_before"], report("s")["classes_after"]) == ([6, 3, 1], [2, 2, 1])
    assert run("mix", a, b, "--rows", 9, "--weights", 2, 1, "--out", tmp_path / "m.tsv").returncode == 0
    assert report("m")["shares"] == {"a": dict(rows=6, share=0.6667), "b": dict(rows=3, share=0.3333)}
    rows = [dict(image=str(i), label=0, caption=text) for i, text in enumerate(("one", "one two", "1 2 3 4 5 6"))]
    bd.write_tsv(tmp_path / "c.tsv", ("image", "label", "caption"), rows)
    assert bd.caption_lengths(str(tmp_path / "c.tsv")) == dict(words_mean=3, words_median=2, captions_distinct=1)


def test_classes_of_equal_counts_are_ranked_by_the_seed():
    found = {tuple(bd.profile_quota(np.full(6, 100), "exponential", 32, 0, seed)) for seed in range(4)}
    assert len(found) > 1 and all(sorted(quota) == [4, 7, 13, 25, 50, 100] for quota in found)  # 100 / 2^i, rounded up


def test_a_mix_of_mixes_tells_the_first_source(tmp_path):
    """Shares without --rows are of all rows."""
    for name in "abcd":
        table(tmp_path / f"{name}.tsv", {0: 1 if name == "a" else 3})
    for tables, out in (("ab", "m"), ("mc", "n"), ("nd", "o")):
        assert run("mix", *(tmp_path / f"{name}.tsv" for name in tables), "--out", tmp_path / f"{out}.tsv").returncode == 0
    assert json.loads((tmp_path / "m.tsv.json").read_text())["shares"] == {"a": dict(rows=1, share=0.25), "b": dict(rows=3, share=0.75)}
    assert [row["source"] for row in read(tmp_path / "o.tsv")] == ["n"] * 7 + ["d"] * 3
    assert [row["source_before"] for row in read(tmp_path / "o.tsv")][:4] == ["a", "b", "b", "b"]


def test_the_plot_of_counts_has_them_in_the_order_of_the_first(tmp_path, monkeypatch):
    figures = []
    figure = pytest.importorskip("matplotlib.figure").Figure
    monkeypatch.setattr(figure, "savefig", lambda self, *_, **__: figures.append(self))
    bd.plot_counts(["a", "b"], [np.array([1, 9, 4]), np.array([7, 0, 2])], str(tmp_path / "p.png"))
    drawn = [[line.get_ydata().tolist() for line in axis.lines] for axis in figures[0].axes]
    assert drawn == [[[9, 4, 1], [7, 2, 0]], [[9, 4, 1], [0, 2, 7]]]


def test_what_a_source_lacks_comes_from_the_others_by_their_weights():
    """1 of 8 rows is there: the other 7 are shared as 1 to 3, which is 1.75 and 5.25."""
    quota = bd.source_quota(24, [2, 1, 3], np.array([1, 50, 60]), True)
    assert quota.tolist() == [1, 4 + 2, 12 + 5]


def test_a_row_of_fill_that_has_just_the_threshold_is_taken(tmp_path):
    paths = [table(tmp_path / f"{name}.tsv", {0: 3}, similarity=lambda i: i / 4) for name in "ab"]
    table(tmp_path / "m.tsv", {0: 9})
    flags = ["--threshold", "similarity=0.25", "--match-frequency", tmp_path / "m.tsv", "--fill", paths[1]]
    assert run("subset", paths[0], *flags, "--out", tmp_path / "o.tsv").returncode == 0
    assert sorted(row["image"] for row in read(tmp_path / "o.tsv")) == ["a0-1.jpg", "a0-2.jpg", "b0-1.jpg", "b0-2.jpg"]


def test_trimming_the_tail_keeps_rows_without_a_label(tmp_path):
    path, out = table(tmp_path / "a.tsv", {0: 3, 1: 2, "": 2}), tmp_path / "o.tsv"
    assert run("subset", path, "--shots", 1, "--trim-tail", 1, "--out", out).returncode == 0
    assert Counter(row["label"] for row in read(out)) == {"0": 3, "1": 1, "": 2}
