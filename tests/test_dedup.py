"""build_datasets.py dedup: hashes against imagehash, pairs against brute force, components against scipy."""

import functools
import json
import math
import subprocess
import sys

import imagehash
import numpy as np
import programs
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from scipy.sparse import coo_matrix
from scipy.sparse.csgraph import connected_components

import build_datasets as bd


def picture(seed, side=48):
    coarse = np.random.default_rng(seed).integers(0, 256, (6, 6, 3), np.uint8)
    return Image.fromarray(coarse).resize((side, side), Image.Resampling.BICUBIC)


run = functools.partial(programs.answer, bd)


@pytest.mark.parametrize("seed", range(40))
def test_perceptual_hashes_equal_imagehash(seed):
    image = picture(seed, 20 + 7 * seed)
    assert f"{bd.dhash(image):016x}" == str(imagehash.dhash(image))
    assert f"{bd.phash(image):016x}" == str(imagehash.phash(image))


def test_hashes_by_hand():
    ramp = np.tile(np.arange(0, 225, 25, dtype=np.uint8), (8, 1))
    assert bd.dhash(Image.fromarray(ramp)) == 2**64 - 1 and bd.dhash(Image.fromarray(ramp[:, ::-1].copy())) == 0
    flat = Image.new("RGB", (30, 30), "grey")
    assert bd.phash(flat) == 0x8000000000000000 and bd.dhash(flat) == 0


@given(st.lists(st.integers(0, 2**64 - 1), min_size=1, max_size=50))
def test_count_bits(numbers):
    assert bd.count_bits(np.array(numbers, np.uint64)).tolist() == [x.bit_count() for x in numbers]


@pytest.mark.parametrize("distance", range(8))
def test_banding_finds_all_near_pairs(distance):
    rng = np.random.default_rng(distance)
    base = rng.integers(0, 2**64, 1500, np.uint64)
    for _ in range(9):  # every distance up to 9 occurs
        flipped = base[-400:] ^ (np.uint64(1) << rng.integers(0, 64, 400, np.uint64))
        base = np.concatenate([base, flipped])
    hashes = np.unique(base)
    i, j = np.triu_indices(len(hashes), 1)
    bits = bd.count_bits(hashes[i] ^ hashes[j])
    truth = set(zip(i[bits <= distance].tolist(), j[bits <= distance].tolist(), bits[bits <= distance].tolist()))
    found = {t for block in bd.near_hashes(hashes, distance) for t in zip(*(a.tolist() for a in block))}
    assert found == truth and (distance == 0 or truth)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 29), st.integers(0, 29)), max_size=60), st.integers(1, 7))
def test_components_equal_scipy(pairs, size):
    i, j = np.array(pairs, np.int64).reshape(-1, 2).T
    blocks = [(i[s : s + size], j[s : s + size], np.zeros(len(i[s : s + size]))) for s in range(0, len(i), size)]
    roots, edges = bd.connect(30, {"x": iter(blocks)})
    n, labels = connected_components(coo_matrix((np.ones(len(i)), (i, j)), shape=(30, 30)), directed=False)
    assert all((roots[labels == c] == np.flatnonzero(labels == c)[0]).all() for c in range(n))
    assert len(edges) == 30 - n  # a spanning forest, no edge more


def test_cosine_pairs_equal_brute_force(monkeypatch):
    monkeypatch.setattr(bd, "BLOCK", 16)
    rows = np.random.default_rng(0).standard_normal((100, 5)).astype(np.float16)
    rows[3], rows[7] = 0, np.nan
    unit = rows.astype(np.float64)
    unit /= np.linalg.norm(unit, axis=1, keepdims=True)
    cosines = unit @ unit.T
    for is_chain in (True, False):
        pairs = bd.cosine_pairs([rows[:30], rows[30:60]], [rows[60:]], 0.6, is_chain, "cpu")
        found = {(i, j) for block in pairs for i, j in zip(block[0].tolist(), block[1].tolist())}
        truth = {(i, j) for i in range(100) for j in range(i + 1, 100) if cosines[i, j] > 0.6}
        assert found == {(i, j) for i, j in truth if is_chain or i < 60 <= j}


@pytest.mark.parametrize("cosine", [0.0, 0.5, 0.75])
def test_faiss_gives_the_same_bytes(tmp_path, monkeypatch, cosine):
    """Many pairs lie at the threshold, give or take a rounding; blocks are small, and end where files do."""
    pytest.importorskip("faiss", reason="pip install faiss-cpu")
    monkeypatch.setattr(bd, "BLOCK", 32)
    rng = np.random.default_rng(0)
    grid = rng.integers(-1, 2, (300, 8)).astype(np.float32)  # cosines are 0, 1/2, 3/4 and the like
    near = rng.standard_normal((100, 8)).astype(np.float32)
    near[50:] = near[:50] + 1e-4 * rng.standard_normal((50, 8))
    for name, rows in (("a", grid), ("b", near), ("t", grid[::9])):
        np.save(tmp_path / f"{name}.npy", rows)
        bd.write_tsv(tmp_path / f"{name}.tsv", ("image",), [dict(image=f"{name}{i}.jpg") for i in range(len(rows))])
    files = [[str(tmp_path / f"{name}{kind}") for name in "ab"] for kind in (".tsv", ".npy")]
    against = ["--against", str(tmp_path / "t.tsv"), "--against-embeddings", str(tmp_path / "t.npy")]
    for more in ([], against, [*against, "--chain"]):
        found = []
        for backend in ("blocks", "faiss"):
            flags = ["--by", "embedding", "--embeddings", *files[1], "--cosine", str(cosine), "--backend", backend]
            bd.main(bd.parse_args(["dedup", *files[0], *flags, *more, "--out", str(tmp_path / "o.tsv")]))
            found.append(((tmp_path / "o.tsv").read_bytes(), (tmp_path / "o.pairs.tsv").read_bytes()))
        assert found[0] == found[1] and found[0][1].count(b"\n") > 20


def test_faiss_is_what_searches(monkeypatch):
    faiss = pytest.importorskip("faiss", reason="pip install faiss-cpu")
    monkeypatch.setattr(bd, "BLOCK", 8)
    rows, called, search = np.eye(160, dtype=np.float32), [], faiss.IndexFlatIP.range_search
    rows[159] = rows[3]
    monkeypatch.setattr(faiss.IndexFlatIP, "range_search", lambda *args: called.append(1) or search(*args))
    pairs = [p for p in bd.cosine_pairs([rows], [], 0.9, True, "cpu", "faiss") if len(p[0])]
    assert [(p[0].tolist(), p[1].tolist()) for p in pairs] == [([3], [159])] and len(called) == 20
    called.clear()
    list(bd.cosine_pairs([rows], [], 0.9, True, "cpu"))
    assert not called


def test_without_faiss(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "faiss", None)
    np.save(tmp_path / "e.npy", np.eye(2))
    bd.write_tsv(tmp_path / "a.tsv", ("image",), [dict(image="a"), dict(image="b")])
    flags = ["--by", "embedding", "--embeddings", str(tmp_path / "e.npy"), "--backend", "faiss"]
    with pytest.raises(SystemExit, match="pip install faiss-cpu"):
        bd.main(bd.parse_args(["dedup", str(tmp_path / "a.tsv"), *flags, "--out", str(tmp_path / "o.tsv")]))
    assert not (tmp_path / "o.tsv").exists()


def test_chain_by_hand():
    """At 0, 40 and 80 degrees with cos 45 as the limit, the graph is one component."""
    rows = np.array([[math.cos(math.radians(a)), math.sin(math.radians(a))] for a in (0, 40, 80)], np.float32)
    pairs = bd.cosine_pairs([rows], [], math.cos(math.radians(45)), True, "cpu")
    assert bd.connect(3, {"embedding": pairs})[0].tolist() == [0, 0, 0]


@pytest.fixture
def photos(tmp_path):
    """a: a picture; b: re-encoded; c: larger; d: another; e: its bytes; f: broken; g, h: flat; i: labelled copy of d."""
    picture(1).save(tmp_path / "a.png")
    picture(1).save(tmp_path / "b.jpg", quality=90)
    picture(1).resize((96, 96), Image.Resampling.BICUBIC).save(tmp_path / "c.png")
    picture(2).save(tmp_path / "d.png")
    for name in ("e", "i"):
        (tmp_path / f"{name}.png").write_bytes((tmp_path / "d.png").read_bytes())
    (tmp_path / "f.png").write_bytes(b"no image")
    for name, colour in (("g", "red"), ("h", "blue")):
        Image.new("RGB", (40, 40), colour).save(tmp_path / f"{name}.png")
    names = "a.png b.jpg c.png d.png e.png f.png g.png h.png i.png".split()
    rows = [dict(image=n, label="3" if n[0] == "i" else "", caption="Ein  Bild" if n[0] in "gh" else n) for n in names]
    bd.write_tsv(tmp_path / "all.tsv", ("image", "label", "caption"), rows)
    return tmp_path


@pytest.mark.parametrize(
    "flags, kept",
    [
        (["bytes"], "abcfghi"),
        (["pixels"], "abcfghi"),
        (["phash"], "cfghi"),
        (["caption"], "abcdefgi"),
        (["phash", "caption"], "cfgi"),
    ],
)
def test_end_to_end(photos, flags, kept):
    out = photos / "sub" / "kept.tsv"
    out.parent.mkdir()
    done = run("dedup", photos / "all.tsv", "--by", *flags, "--out", out, "--workers", 1)
    assert done.returncode == 0, done.stderr
    rows = list(bd.open_tables([str(out)])[1])
    assert "".join(row["image"][3] for row in rows) == kept and rows[0]["image"].startswith("../")
    report = json.loads((photos / "sub" / "kept.tsv.json").read_text())
    assert report["funnel"]["rows left"] == len(kept)
    pairs = list(bd.open_tables([str(photos / "sub" / "kept.pairs.tsv")])[1])
    assert len(pairs) == 9 - len(kept) and {p["kept"][-5] for p in pairs} <= set(kept)
    assert len(list(out.parent.iterdir())) == 3


@pytest.mark.parametrize(
    "columns, kept",
    [
        (dict(width=["10", "30.0", "", ""], height=["10", "30.0", "", ""]), "b"),
        (dict(width=["", "", "", ""], height=["", "", "", ""], original_width=["9", "8", "", "20"], original_height=["9"] * 4), "d"),
        (dict(width=["wide", "", "", "nan"], height=["9"] * 4), "c"),
        (dict(label=["", "0", "", ""], width=["9", "3", "", ""], height=["9", "3", "", ""]), "b"),  # labelled first
        ({}, "c"),
    ],
)
def test_the_larger_image_stays_by_columns_if_none_is_decoded(tmp_path, capsys, columns, kept):
    """img2dataset's width and height are empty where it did not resize; without sizes the longest caption stays."""
    texts = dict(image=["a", "b", "c", "d"], caption=["x", "x", "xx", "x"], **columns)
    bd.write_tsv(tmp_path / "t.tsv", list(texts), [dict(zip(texts, row)) for row in zip(*texts.values())])
    np.save(tmp_path / "e.npy", np.ones((4, 2)))
    flags = ["--by", "embedding", "--embeddings", str(tmp_path / "e.npy"), "--out", str(tmp_path / "o.tsv")]
    bd.main(bd.parse_args(["dedup", str(tmp_path / "t.tsv"), *flags]))
    assert [row["image"] for row in bd.open_tables([str(tmp_path / "o.tsv")])[1]] == [kept]
    said = "columns" if columns else "unknown"
    assert f"the larger stays: {said}" in capsys.readouterr().out
    assert json.loads((tmp_path / "o.tsv.json").read_text())["flags"]["image_sizes"] == said


def test_protected_and_against(photos):
    bd.write_tsv(photos / "test.tsv", ("image",), [dict(image="b.jpg")])
    out = photos / "kept.tsv"
    flags = ["--by", "phash", "--out", out, "--workers", 1]
    assert run("dedup", photos / "all.tsv", *flags, "--against", photos / "test.tsv").returncode == 0
    assert "".join(r["image"][0] for r in bd.open_tables([str(out)])[1]) == "defghi"  # other copies are left
    assert run("dedup", photos / "all.tsv", photos / "test.tsv", *flags, "--protect", photos / "test.tsv").stderr == ""
    assert "".join(sorted(r["image"][0] for r in bd.open_tables([str(out)])[1])) == "bfghi"


def test_against_with_embeddings(tmp_path):
    angles = np.radians([0, 20, 40, 60, 180])
    np.save(tmp_path / "e.npy", np.stack([np.cos(angles), np.sin(angles)], axis=1))
    np.save(tmp_path / "t.npy", np.array([[1.0, 0.0]]))
    bd.write_tsv(tmp_path / "all.tsv", ("image", "caption"), [dict(image=f"{i}.jpg") for i in range(5)])
    bd.write_tsv(tmp_path / "test.tsv", ("image", "caption"), [dict(image="t.jpg")])
    command = ["dedup", tmp_path / "all.tsv", "--by", "embedding", "--embeddings", tmp_path / "e.npy", "--cosine", 0.9]
    command += ["--against", tmp_path / "test.tsv", "--against-embeddings", tmp_path / "t.npy"]
    for chain, left in (("--no-chain", ["2.jpg", "3.jpg", "4.jpg"]), ("--chain", ["4.jpg"])):
        done = run(*command, chain, "--out", tmp_path / "kept.tsv")
        assert done.returncode == 0, done.stderr
        assert [row["image"] for row in bd.open_tables([str(tmp_path / "kept.tsv")])[1]] == left


def test_bad_input(photos):
    np.save(photos / "e.npy", np.zeros((3, 4)))
    done = run(
        "dedup", photos / "all.tsv", "--by", "embedding", "--embeddings", photos / "e.npy", "--out", photos / "o.tsv"
    )
    assert done.returncode == 2 and done.stderr == "--embeddings: got 3 rows, the tables have 9\n"
    done = run("dedup", photos / "all.tsv", "--by", "sha256", "--out", photos / "o.tsv")
    assert done.returncode == 2 and "no column sha256; found image, label, caption" in done.stderr
    assert run("dedup", photos / "all.tsv", "--by", "phash", "--distance", 8, "--out", photos / "o.tsv").returncode == 2
    assert not list(photos.glob("o.*"))


def test_embeddings_go_with_tables(tmp_path):
    """Tables are read by name: files in another order, or of other lengths, would be other rows' embeddings."""
    for name, n in (("A", 2), ("B", 3)):
        bd.write_tsv(tmp_path / f"{name}.tsv", ("image",), [dict(image=f"{name}{i}.jpg") for i in range(n)])
        np.save(tmp_path / f"{name}.npy", np.eye(5)[:n])
    np.save(tmp_path / "flat.npy", np.eye(3))
    tables, flags = [tmp_path / "B.tsv", tmp_path / "A.tsv"], ["--by", "embedding", "--out", tmp_path / "o.tsv"]
    order = "--embeddings: give tables and files in the order of the tables' names"
    for these, files, more, message in (
        (tables, "BA", [], order),
        (tables[::-1], "BA", [], "--embeddings: got 3 + 2 rows, the tables have 2 + 3"),
        (tables[1:], "A", [*tables, "--against-embeddings", "B", "A"], "--against-" + order[2:]),
        (tables[1:], "A", [tables[0], "--against-embeddings", "flat"], "flat.npy: got float64 (3, 3), expected floats"),
    ):
        more = ["--against", *(tmp_path / f"{f}.npy" if f in ("A", "B", "flat") else f for f in more)] if more else []
        done = run("dedup", *these, *flags, "--embeddings", *(tmp_path / f"{f}.npy" for f in files), *more)
        assert done.returncode == 2 and message in done.stderr and "Traceback" not in done.stderr, done.stderr
    done = run("dedup", *tables[::-1], *flags, "--embeddings", tmp_path / "A.npy", tmp_path / "B.npy")
    assert done.returncode == 0 and "3  rows left" in done.stdout, done.stderr


def test_embeddings_of_what_is_not_downloaded(tmp_path):
    bd.write_tsv(tmp_path / "u.tsv", ("url", "caption"), [dict(url=f"u{i}", caption="c") for i in range(3)])
    np.save(tmp_path / "u.npy", np.eye(2)[[0, 1, 0]])
    done = run("dedup", tmp_path / "u.tsv", "--by", "embedding", "--embeddings", tmp_path / "u.npy", "--out", tmp_path / "o.tsv")
    assert done.returncode == 0 and "2  rows left" in done.stdout, done.stderr


def test_pieces_beyond_the_end_are_no_copies(tmp_path):
    (tmp_path / "s.tar").write_bytes(b"x" * 100)
    names = ["s.tar:500:10", "s.tar:600:10", "s.tar:95:10", "s.tar:0:10", "s.tar:10:10", "empty.jpg", "empty2.jpg"]
    names[:0] = ["s.tar:0:99999999999999", f"s.tar:{10**30}:10", f"s.tar:0:{10**30}"]
    for name in names[-2:]:
        (tmp_path / name).write_bytes(b"")
    bd.write_tsv(tmp_path / "a.tsv", ("image",), [dict(image=name) for name in names])
    done = run("dedup", tmp_path / "a.tsv", "--by", "bytes", "--workers", 1, "--out", tmp_path / "o.tsv")
    left = [row["image"] for row in bd.open_tables([str(tmp_path / "o.tsv")])[1]]
    assert left == [name for name in names if name != "s.tar:10:10"] and "8 x no bytes" in done.stdout, done.stderr


def test_an_array_without_a_row_is_no_copy_of_its_last_one(tmp_path):
    np.save(tmp_path / "x.npy", np.random.default_rng(0).integers(0, 256, (3, 8, 8, 3), np.uint8))
    names = ["x.npy:0", "x.npy", "x.npy:2"]
    bd.write_tsv(tmp_path / "a.tsv", ("image",), [dict(image=name) for name in names])
    done = run("dedup", tmp_path / "a.tsv", "--by", "bytes", "--workers", 1, "--out", tmp_path / "o.tsv")
    left = [row["image"] for row in bd.open_tables([str(tmp_path / "o.tsv")])[1]]
    assert left == names and "1 x no bytes" in done.stdout, done.stderr


def test_sizes_beyond_all_memory_are_no_pixels(tmp_path):
    names = ["s.tar:0:99999999999999", f"s.tar:0:{10**30}", f"s.tar:{10**30}:9"]
    (tmp_path / "s.tar").write_bytes(b"x" * 100)
    bd.write_tsv(tmp_path / "a.tsv", ("image",), [dict(image=name) for name in names])
    done = run("dedup", tmp_path / "a.tsv", "--by", "pixels", "--workers", 1, "--out", tmp_path / "o.tsv")
    assert done.returncode == 0 and "3 x no pixels" in done.stdout, done.stderr


@pytest.mark.parametrize("device", ["cuda", "nosuch", "meta"])
def test_a_device_that_is_not_there_is_one_line(photos, monkeypatch, device):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    np.save(photos / "e.npy", np.eye(3, dtype=np.float32))
    for command in (["dedup", photos / "all.tsv", "--by", "caption", "--out", photos / "o.tsv"],
                    ["prune", photos / "all.tsv", "--embeddings", photos / "e.npy", "--small", photos / "e.npy",
                     "--tests", f"v={photos / 'e.npy'}", "--out", photos / "o-{set}.tsv"]):  # fmt: skip
        done = run(*command, "--device", device)
        assert done.returncode == 2 and done.stderr.startswith(f"--device {device}: ") and done.stderr.count("\n") == 1


def test_test_images_that_cannot_be_read_are_told(photos):
    """With none that can be, all rows would pass as clean."""
    np.save(photos / "e.npy", np.eye(9))
    np.save(photos / "t.npy", np.zeros((2, 9)))
    for names, code in (["f.png", "gone.png"], 2), (["d.png", "gone.png"], 0):
        bd.write_tsv(photos / "test.tsv", ("image", "caption"), [dict(image=name) for name in names])
        flags = ["--against", photos / "test.tsv", "--out", photos / "o.tsv", "--workers", 1]
        for by in "bytes", "phash":
            done = run("dedup", photos / "all.tsv", "--by", by, *flags)
            if code and by == "phash":
                assert done.returncode == 2 and "--against: none of 2 rows" in done.stderr and not (photos / "o.tsv").exists()
            else:
                assert done.returncode == 0 and f"of --against: 1 x no {by}" in done.stdout, done.stderr
                (photos / "o.tsv").unlink()
    more = ["--embeddings", photos / "e.npy", "--against-embeddings", photos / "t.npy"]
    done = run("dedup", photos / "all.tsv", "--by", "embedding", *more, *flags)
    assert done.returncode == 2 and "none of 2 rows" in done.stderr
    np.save(photos / "t.npy", np.eye(9)[:2] * [[0], [1]])
    done = run("dedup", photos / "all.tsv", "--by", "embedding", *more, *flags)
    assert done.returncode == 0 and "of --against: 1 x no embedding" in done.stdout, done.stderr


def test_flags_without_effect_are_refused(capsys):
    for flags in (["--by", "phash", "--against", "t.tsv", "--against-embeddings", "t.npy"], ["--by", "phash", "--chain"],
                  ["--by", "embedding", "--embeddings", "e.npy", "--against-embeddings", "t.npy"]):  # fmt: skip
        with pytest.raises(SystemExit):
            bd.parse_args(["dedup", "a.tsv", "--out", "o.tsv", *flags])
        assert ": only with --against" in capsys.readouterr().err


def test_what_stays_hangs_on_no_working_folder(tmp_path):
    """Seen from a, b's row is ../b/.. and smaller; seen from b it is the other way round."""
    for name in "ab":
        (tmp_path / name).mkdir()
        bd.write_tsv(tmp_path / name / "t.tsv", ("image", "caption"), [dict(image="1.jpg", caption="x")])
    found = []
    for folder in "ab":
        out = tmp_path / f"{folder}.tsv"
        command = [sys.executable, bd.__file__, "dedup", "../a/t.tsv", "../b/t.tsv", "--by", "caption", "--out", out]
        subprocess.run(command, cwd=tmp_path / folder, check=True, capture_output=True)
        found.append((out.read_text(), (tmp_path / f"{folder}.pairs.tsv").read_text()))
    assert found[0] == found[1] and "\na/1.jpg\tb/1.jpg\tcaption\t0\ta/1.jpg\n" in found[0][1]


def test_one_name_in_two_folders_is_two_images(tmp_path):
    for name in "ab":
        (tmp_path / name).mkdir()
        bd.write_tsv(tmp_path / name / "t.tsv", ("image",), [dict(image="x.jpg"), dict(image="../c/y.jpg")])
    done = run("dedup", tmp_path / "a/t.tsv", tmp_path / "b/t.tsv", "--by", "image", "--out", tmp_path / "o.tsv")
    assert [row["image"] for row in bd.open_tables([str(tmp_path / "o.tsv")])[1]] == ["a/x.jpg", "c/y.jpg", "b/x.jpg"], (
        done.stderr)  # fmt: skip


def test_protect_is_refused_with_against(photos):
    flags = ["--by", "phash", "--against", photos / "all.tsv", "--protect", photos / "all.tsv", "--out", photos / "o.tsv"]
    assert "--protect: with --against" in run("dedup", photos / "all.tsv", *flags).stderr


def test_captions_are_compared_without_case_blanks_and_form_and_empty_ones_not_at_all(tmp_path):
    texts = ["Ein  Bild", "ein bild", "Cafe\u0301", "CAF\u00c9", "", "", ""]
    bd.write_tsv(tmp_path / "t.tsv", ("image", "caption"), [dict(image=str(i), caption=c) for i, c in enumerate(texts)])
    run("dedup", tmp_path / "t.tsv", "--by", "caption", "--out", tmp_path / "o.tsv")
    assert [row["image"] for row in bd.open_tables([str(tmp_path / "o.tsv")])[1]] == list("02456")


def test_near_copies_of_copies_stay_without_chain():
    """Two rows, then a test image: the first is near it, the second near the first."""
    hashes = np.array([0xF0F0 ^ 1, 0xF0F0 ^ 3, 0xF0F0], np.uint64)
    for is_chain, left in ((False, [1]), (True, [])):
        roots, _ = bd.connect(3, {"phash": bd.hash_pairs(hashes, 1, 2, is_chain)})
        assert [i for i in range(2) if roots[i] != roots[2]] == left


def test_the_bounds_of_a_copy(tmp_path, monkeypatch):
    """A hash of 4 to 60 bits is compared; equal pixels in another shape are none; at the limit a cosine is not above it."""
    monkeypatch.setattr(bd, "dhash", lambda image: (1 << image.width) - 1)
    names = [f"{bits}.png" for bits in (3, 4, 60, 61)]
    for name in names:
        Image.new("RGB", (int(name[:-4]), 5)).save(tmp_path / name)
    rows = [(name, {}) for name in names]
    assert (bd.hash_rows(tmp_path, rows, ["dhash"], 999)[:, 0] > 0).tolist() == [False, True, True, False]
    for size in (20, 10), (10, 20):
        Image.new("RGB", size, "red").save(tmp_path / f"{size[0]}x{size[1]}.png")
    high, wide = bd.hash_rows(tmp_path, [("10x20.png", {}), ("20x10.png", {})], ["pixels"], 999)[:, 0]
    assert high != wide
    rows = np.array([[1, 0, 0, 0], [1, 1, 1, 1]], np.float32)  # their cosine is 1/2, without rounding
    assert [sum(len(p[0]) for p in bd.cosine_pairs([rows], [], t, True, "cpu")) for t in (0.5, 0.49)] == [0, 1]


def test_components_are_joined_by_their_closest_pairs():
    i, j = np.array([0, 1, 0]), np.array([1, 2, 2])
    for method, distance, told in ("phash", [3, 1, 2], [1, 2]), ("embedding", [0.7, 0.9, 0.8], [0.9, 0.8]):
        _, edges = bd.connect(3, {method: [(i, j, np.array(distance))]})
        assert [edge[3] for edge in edges] == told


def test_captions_that_differ_in_a_sign_are_no_copies(tmp_path):
    """NFC, not NFKC: 5² is not 52."""
    bd.write_tsv(tmp_path / "t.tsv", ("image", "caption"), [dict(image="a", caption="5\u00b2 m"), dict(image="b", caption="52 m")])
    run("dedup", tmp_path / "t.tsv", "--by", "caption", "--out", tmp_path / "o.tsv")
    assert len(list(bd.open_tables([str(tmp_path / "o.tsv")])[1])) == 2


def test_the_smaller_name_with_its_folder_stays_and_sizes_are_of_copies_alone(tmp_path):
    for folder, texts in ("a", dict(z="x", y="y", w="alone")), ("b", dict(a="x", b="x", c="y")):
        (tmp_path / folder).mkdir()
        rows = [dict(image=f"{name}.jpg", caption=text) for name, text in texts.items()]
        bd.write_tsv(tmp_path / folder / "t.tsv", ("image", "caption"), rows)
    run("dedup", tmp_path / "a/t.tsv", tmp_path / "b/t.tsv", "--by", "caption", "--out", tmp_path / "o.tsv")
    assert [row["image"] for row in bd.open_tables([str(tmp_path / "o.tsv")])[1]] == ["a/z.jpg", "a/y.jpg", "a/w.jpg"]
    assert json.loads((tmp_path / "o.tsv.json").read_text())["component_sizes"] == {"2": 1, "3": 1}


def test_captions_are_alike_by_casefold_and_the_longer_one_has_more_letters(tmp_path):
    """STRASSE is Strasse with a sharp s; of copies by url eight letters stay, not two words."""
    (tmp_path / "a.tsv").write_text("image\turl\tcaption\n1\tx\tStra\u00dfe\n2\ty\tSTRASSE\n3\tz\taa bb\n4\tz\tabcdefgh\n", "utf-8")
    for by, left in (("caption", ["2", "3", "4"]), ("url", ["1", "2", "4"])):
        bd.main(bd.parse_args(["dedup", str(tmp_path / "a.tsv"), "--by", by, "--out", str(tmp_path / "o.tsv")]))
        assert [row["image"] for row in bd.open_tables([str(tmp_path / "o.tsv")])[1]] == left
