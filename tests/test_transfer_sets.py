"""recipes/transfer_sets.py: digits and stamps as folders for --transfer."""

import subprocess
import sys

import numpy as np
import programs
import pytest
from PIL import Image
from programs import named
from sklearn.datasets import load_digits

import dino_laionet as dino


def recipe(*flags, check=True, **env):
    command = [sys.executable, programs.ROOT / "recipes" / "transfer_sets.py", *map(str, flags)]
    return subprocess.run(command, env=programs.ENV | env, check=check, capture_output=True, text=True)


def parts(folder):
    """Class names, and {part: table, labels}, read as dino_laionet.py reads them."""
    names = [row["name"] for row in dino.read_classes(folder)]
    tables = {part: dino.Table(folder / f"{part}.tsv") for part in ("train", "test")}
    return names, {part: (table, dino.read_labels(table, named(names))) for part, table in tables.items()}


def test_digits(tmp_path):
    recipe("digits", "--out", tmp_path / "a")
    recipe("digits", "--out", tmp_path / "b")
    recipe("digits", "--out", tmp_path / "c", "--seed", "1")
    test_sets = [(tmp_path / name / "digits" / "test.tsv").read_bytes() for name in "abc"]
    assert test_sets[0] == test_sets[1] != test_sets[2]
    names, found = parts(tmp_path / "a" / "digits")
    assert names == list("0123456789")
    digits, rows = load_digits(), {}
    for part, (table, labels) in found.items():
        rows[part] = np.array([dino.locate_image(table, row)[1] for row in range(len(table))])
        assert np.array_equal(labels, digits.target[rows[part]])
        pixels = dino.load_pixels([table]).numpy()
        assert pixels.shape[1:] == (32, 32, 3)
        small = pixels.reshape(-1, 8, 4, 8, 4, 3).mean((2, 4, 5)) * 16 / 255
        assert np.abs(small - digits.images[rows[part]]).mean() < 1
        assert small.mean() == pytest.approx(digits.images[rows[part]].mean(), rel=0.03)  # 16 is white
    assert sorted(np.concatenate(list(rows.values()))) == list(range(1797))
    counts = np.bincount(digits.target)
    np.testing.assert_allclose(np.bincount(found["test"][1]), counts / 4, atol=0.5)


def test_stamps(tmp_path):
    """Class folders, also nested; without mirrored twins, equal files and .svg."""
    rng, stamps, kept = np.random.default_rng(0), tmp_path / "tux", {"animals": 8, "food": 2}
    for name, n in kept.items():
        (stamps / name / "deeper").mkdir(parents=True)
        for i in range(n):
            pixels = rng.integers(0, 256, (300, 600, 4) if i else (20, 30, 4), np.uint8)
            Image.fromarray(pixels).save(stamps / name / ("deeper" if i % 2 else ".") / f"{i}.png")
    for twin in "1_mirror.png", "1_flip.png":
        Image.fromarray(rng.integers(0, 256, (9, 9, 4), np.uint8)).save(stamps / "food" / twin)
    (stamps / "food" / "again.png").write_bytes((stamps / "food" / "0.png").read_bytes())
    (stamps / "food" / "2.svg").write_text("<svg/>")
    recipe("stamps", "--out", tmp_path / "out", "--stamps", stamps)
    names, found = parts(tmp_path / "out" / "stamps")
    assert names == list(kept) and [len(found[part][0]) for part in ("train", "test")] == [7, 3]
    images = [table.get(row, "image") for table, _ in found.values() for row in range(len(table))]
    assert len(set(images)) == 10 and "animals/deeper/1.png" in images and "food/0.png" in images
    for table, labels in found.values():
        for row, label in enumerate(labels):
            assert names[label] == table.get(row, "image").split("/")[0]
            image = dino.read_image(table, row, 32, 10**6)
            assert image.size in ((256, 128), (30, 20))
    before, after = (np.asarray(Image.open(folder / "food/0.png")) for folder in (stamps, tmp_path / "out" / "stamps"))
    assert np.array_equal(before, after)  # small: as it was, with its transparency
    splits = set()
    for seed in range(2):
        recipe("stamps", "--out", tmp_path / "out", "--stamps", stamps, "--seed", seed)
        splits.add((tmp_path / "out" / "stamps" / "test.tsv").read_text())
    assert len(splits) > 1


def test_messages(tmp_path):
    (tmp_path / "sklearn.py").write_text("raise ImportError")
    cases = [
        (["digits"], dict(PYTHONPATH=str(tmp_path)), "digits: no scikit-learn; pip install scikit-learn"),
        (["stamps", "--stamps", tmp_path / "none"], {}, "apt install tuxpaint-stamps-default"),
        (["cifar10"], {}, "cifar10: no such set; digits, stamps"),
    ]
    for flags, env, message in cases:
        result = recipe(*flags, "--out", tmp_path / "out", check=False, **env)
        assert result.returncode and message in result.stderr and result.stderr.count("\n") == 1
        assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", ["val", "run", "unseen"])
def test_names_that_are_taken(world, tmp_path, name):
    """Metrics are kept by the name of the folder."""
    recipe("digits", "--out", tmp_path)
    folder = (tmp_path / "digits").rename(tmp_path / name)
    flags = ["--root", world, "--steps", "1", "--transfer", "auto", folder, "--out", tmp_path / "out"]
    with pytest.raises(SystemExit, match=f"{name} is taken"):
        programs.run_here(dino, *flags)
    assert not (tmp_path / "out").exists()
