"""build_datasets.py prune: the oracle on a circle, brute force in float64, the tables end to end."""

import json

import numpy as np
import programs
import pytest

import build_datasets as bd


def at(*degrees):
    angle = np.radians(degrees)
    return np.stack([np.cos(angle), np.sin(angle)], axis=1).astype(np.float32)


def prune(rows, small, tests):
    queries = {name: [b for _, b in bd.unit_blocks([t], "cpu")] for name, t in tests.items()}
    limits = {name: bd.nearest(blocks, [small], "cpu") for name, blocks in queries.items()}
    return bd.prune_rows([rows], queries, limits, "cpu")


def test_circle_by_hand():
    rows = at(10, 25, 40, 149, 151, -20, 200) * 3  # lengths do not matter
    drop, best, query = prune(rows, at(20, 150), {"val": at(0, 90)})["val"]
    assert drop.tolist() == [True, False, True, True, False, False, False]  # -20 degrees is a tie
    assert query[:3].tolist() == [0, 0, 0] and best[0] == pytest.approx(np.cos(np.radians(10)), abs=1e-6)
    assert query[3:5].tolist() == [1, 1]


@pytest.mark.parametrize("block", [7, 64, 1024])
def test_equals_brute_force(monkeypatch, block):
    monkeypatch.setattr(bd, "BLOCK", block)
    rng = np.random.default_rng(block)
    rows, small = rng.standard_normal((500, 16)).astype(np.float32), rng.standard_normal((30, 16)).astype(np.float32)
    tests = {"a": rng.standard_normal((70, 16)).astype(np.float32), "b": rng.standard_normal((9, 16))}
    rows[:30] = small * 2  # copies of the small set tie, and stay unless another test image wants them
    rows[40], rows[41] = np.nan, 0

    def unit(x):
        return x.astype(np.float64) / np.linalg.norm(x.astype(np.float64), axis=1, keepdims=True)

    with np.errstate(invalid="ignore"):
        for name, (drop, best, query) in prune(rows, small, tests).items():
            cosines, limit = unit(rows) @ unit(tests[name]).T, (unit(tests[name]) @ unit(small).T).max(axis=1)
            truth = (cosines > limit + bd.TIE).any(axis=1)
            truth[[40, 41]] = True
            assert (drop == truth).all() and 0 < truth.sum() < 500
            assert not drop[:30].any()
            usable = np.delete(np.arange(500), [40, 41])
            assert np.abs(best[usable] - cosines.max(axis=1)[usable]).max() < 1e-6
            assert (query[usable] == cosines.argmax(axis=1)[usable]).all()
            left = np.concatenate([unit(rows)[~drop], unit(small)])  # the gap is closed, and not more than that
            assert (unit(tests[name]) @ left.T).max(axis=1) == pytest.approx(limit, abs=2e-6)


def test_a_gap_that_is_not_closed_is_one_line(tmp_path, monkeypatch):
    for name, rows in (("e", at(0, 90)), ("s", at(60))):
        np.save(tmp_path / f"{name}.npy", rows)
    bd.write_tsv(tmp_path / "a.tsv", ("image",), [dict(image="a"), dict(image="b")])
    monkeypatch.setattr(bd, "prune_rows", lambda *_: {"t": (np.zeros(2, bool), np.zeros(2), np.zeros(2, int))})
    done = programs.answer(bd, "prune", "a.tsv", "--embeddings", "e.npy", "--small", "s.npy", "--tests", "t=e.npy",
                           "--out", "o-{set}.tsv", folder=tmp_path)  # fmt: skip
    assert done.returncode == 2 and done.stderr.startswith("--verify: t: a row that is left exceeds its limit by 0.5")
    assert not list(tmp_path.glob("o-*"))


def test_equal_scores_take_the_first_query(monkeypatch):
    monkeypatch.setattr(bd, "BLOCK", 2)
    _, _, query = prune(at(0, 10), at(90), {"t": at(45, 0, 0, 0, 0)})["t"]
    assert query.tolist() == [1, 1]


@pytest.fixture
def world(tmp_path):
    bd.write_tsv(
        tmp_path / "all.tsv", ("image", "caption"), [dict(image=f"{i}.jpg", caption=f"c{i}") for i in range(7)]
    )
    np.save(tmp_path / "e.npy", at(10, 25, 40, 149, 151, -20, 200).astype(np.float16).astype(np.float32))
    np.save(tmp_path / "small.npy", at(20, 150))
    np.save(tmp_path / "v.npy", at(0))
    np.savez(tmp_path / "s.npz", features=at(90), logits=np.zeros(3))
    return tmp_path


def run(world, *more, tests=("val=v.npy", "sketch=s.npz"), out="o-{set}.tsv", small="small.npy"):
    command = ["prune", "all.tsv", "--embeddings", "e.npy", "--small", small, "--out", out]
    return programs.answer(bd, *command, "--tests", *tests, *more, folder=world)


def images(path):
    return "".join(row["image"][0] for row in bd.open_tables([str(path)])[1])


def test_end_to_end(world):
    done = run(world, "--keep", "2")
    assert done.returncode == 0, done.stderr
    assert images(world / "o-sketch.tsv") == "01456" and images(world / "o-combined.tsv") in ("146", "1456")
    assert images(world / "o-near.tsv") == "46" and len(images(world / "o-rand.tsv")) == 2
    assert images(world / "o-far.tsv") == "05"  # 10 and -20 degrees, seen from 0
    leaks = list(bd.open_tables([str(world / "o-leaks.tsv")])[1])
    assert [r["image"] for r in leaks if r["set"] == "sketch"] == ["2.jpg", "3.jpg"]
    assert leaks[0]["limit"] == f"{np.cos(np.radians(20)):.6f}"
    before = {p.name: p.read_bytes() for p in world.glob("o-*.tsv")}
    run(world, "--keep", "2")
    assert before == {p.name: p.read_bytes() for p in world.glob("o-*.tsv")}


def test_bad_input(world):
    np.save(world / "short.npy", at(1, 2))
    np.save(world / "zero.npy", np.zeros((2, 2), np.float32))
    np.save(world / "int.npy", np.zeros((2, 2), int))
    (world / "text.npy").write_text("no array")
    np.save(world / "wide.npy", np.ones((2, 3), np.float32))
    for flags, message in (
        (dict(tests=["val=zero.npy"]), "zero.npy: no rows, or a row that is zero or not finite"),
        (dict(tests=["val=int.npy"]), "int.npy: got int64 (2, 2), expected floats [rows, D]"),
        (dict(tests=["val=text.npy"]), "text.npy: not readable as embeddings"),
        (dict(tests=["v.npy"]), "expected NAME=FILE"),
        (dict(tests=["val=wide.npy"]), "wide.npy: got float32 (2, 3), expected floats [rows, D], D as in the first file (2)"),
        (dict(small="wide.npy"), "D as in the first file (2)"),
        (dict(out="{set}/o.tsv"), "expected a file name with {set} in it"),
        (dict(small="zero.npy"), "--small: no usable row"),
        (dict(out="o.tsv"), "{set}"),
    ):
        done = run(world, **flags)
        assert done.returncode == 2 and message in done.stderr, done.stderr
        assert "Traceback" not in done.stderr
    (world / "e.npy").write_bytes((world / "short.npy").read_bytes())
    done = run(world)
    assert done.returncode == 2 and "--embeddings: got 2 rows, the tables have 7" in done.stderr
    assert not list(world.glob("o*"))


def test_rows_without_an_embedding(world):
    """They go from every table, are counted apart, are no leaks, and no rule keeps them."""
    rows = np.load(world / "e.npy")
    rows[[1, 5]] = np.nan, 0
    np.save(world / "e.npy", rows)
    done = run(world, "--keep", "5")
    assert done.returncode == 0, done.stderr
    assert all(set(images(world / f"o-{name}.tsv")) == set("02346") for name in ("near", "far", "rand"))
    assert images(world / "o-sketch.tsv") == "046" and "1" not in images(world / "o-combined.tsv")
    assert {row["image"] for row in bd.open_tables([str(world / "o-leaks.tsv")])[1]}.isdisjoint({"1.jpg", "5.jpg"})
    funnel = json.loads((world / "o-sketch.tsv.json").read_text())["funnel"]
    assert funnel["zero or not finite embedding"] == -2 and list(funnel.values()) == [7, -2, -2, 3]
    done = run(world, "--keep", "6")
    assert done.returncode == 2 and "the tables have 5 rows with an embedding" in done.stderr


def test_an_input_that_no_output_would_replace_is_no_error(world):
    (world / "all.tsv").rename(world / "o-rand.tsv")
    (world / "all.tsv").symlink_to("o-rand.tsv")
    assert run(world).returncode == 0  # without --keep there is no random part


@pytest.mark.parametrize("name", ["sketch", "combined", "near", "leaks"])
def test_no_table_replaces_an_input(world, name):
    (world / "all.tsv").rename(world / f"o-{name}.tsv")
    (world / "all.tsv").symlink_to(f"o-{name}.tsv")
    before = (world / "all.tsv").read_bytes()
    done = run(world, "--keep", "2")
    assert done.returncode == 2 and "all.tsv, which it would replace, is an input" in done.stderr
    assert (world / "all.tsv").read_bytes() == before and len(list(world.glob("o-*"))) == 1


def test_rand_is_neither_near_nor_far(tmp_path):
    bd.write_tsv(tmp_path / "a.tsv", ("image",), [dict(image=f"{i}.jpg") for i in range(200)])
    kept = [set(np.flatnonzero(~bd.least_similar([str(tmp_path / "a.tsv")], np.linspace(0, 1, 200), 100, seed)["rand"]))
            for seed in (0, 1)]  # fmt: skip
    assert kept[0] != kept[1] and all(30 < len(k & set(range(100))) < 70 for k in kept)


def test_gap_and_leaks_of_the_report_by_hand(world):
    """Mean cosine of test images at 0 and 90 degrees to the nearest row; of 10 degrees alone the cosine is over .95."""
    np.save(world / "v.npy", at(0, 90))
    done = run(world, tests=["val=v.npy"])
    assert done.returncode == 0, done.stderr
    report, cos = json.loads((world / "o-val.tsv.json").read_text()), lambda degrees: np.cos(np.radians(degrees))
    expected = dict(small=(cos(20) + cos(60)) / 2, pruned=(cos(20) + cos(61)) / 2)
    assert report["gap"] == pytest.approx(expected, abs=2e-4) and report["leaks"] == {"val": 1}
