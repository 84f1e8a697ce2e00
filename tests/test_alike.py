"""recipes/alike.py: the images of a class that are nearest to its mean, as a column for a threshold."""

import importlib.util
import subprocess
import sys

import numpy as np
import programs
import pytest

COUNTS = {0: 4, 1: 1}


@pytest.fixture
def world(tmp_path):
    """40 rows of three classes in 2 dimensions, row 3 unreadable; angles from 0 are the distance to the mean."""
    labels = np.arange(40) % 3
    angle = np.where(np.arange(40) % 2, 1, -1) * np.linspace(0.05, 1.2, 40)
    features = np.stack([np.cos(angle), np.sin(angle)], 1) * np.linspace(1, 9, 40)[:, None]  # lengths do not matter
    rows = np.delete(np.arange(40), 3)
    np.savez(tmp_path / "f.npz", features=features[rows].astype(np.float16), labels=labels[rows], rows=rows)
    lines = [f"train.npy:{i}\t{label}\ta\x85caption\u2028\t0.5" for i, label in enumerate(labels)]
    (tmp_path / "t.tsv").write_text("\n".join(["image\tlabel\tcaption\tsimilarity", *lines]) + "\n")
    few = [f"train.npy:{i}\t{label}" for i, label in enumerate([c for c, n in COUNTS.items() for _ in range(n)])]
    (tmp_path / "few.tsv").write_text("\n".join(["image\tlabel", *few]) + "\n")
    return tmp_path, features / np.linalg.norm(features, axis=1, keepdims=True), labels, rows


def alike(folder, *names, check=True):
    command = [sys.executable, programs.ROOT / "recipes" / "alike.py", *(folder / name for name in names)]
    return subprocess.run(command, env=programs.ENV, check=check, capture_output=True, text=True)


def test_the_nearest_of_each_class_are_kept(world):
    folder, unit, labels, rows = world
    alike(folder, "f.npz", "t.tsv", "few.tsv", "alike.tsv")
    programs.run("build_datasets.py", "subset", folder / "alike.tsv", "--threshold", "alike=1", "--out",
                 folder / "cut.tsv")
    kept = {int(line.split("\t")[0].split(":")[1]) for line in (folder / "cut.tsv").read_text().splitlines()[1:]}
    expected = set()
    for c, n in COUNTS.items():
        mine = [row for row in rows if labels[row] == c]
        mean = unit[mine].mean(0)
        expected |= set(sorted(mine, key=lambda row: -unit[row] @ mean)[:n])
    assert kept == expected and len(kept) == 5
    lines = (folder / "alike.tsv").read_text().split("\n")
    assert [line.rsplit("\t", 1)[0] for line in lines] == (folder / "t.tsv").read_text().split("\n")


def test_too_few_and_wrong_files(world):
    folder, _, _, _ = world
    (folder / "few.tsv").write_text("image\tlabel\n" + "x\t2\n" * 20)
    result = alike(folder, "f.npz", "t.tsv", "few.tsv", "out.tsv", check=False)
    assert "class 2: 20 rows are asked for, 13 have features" in result.stderr and result.returncode == 1
    (folder / "short.tsv").write_text("".join((folder / "t.tsv").read_text().splitlines(True)[:9]))
    result = alike(folder, "f.npz", "short.tsv", "few.tsv", "out.tsv", check=False)
    assert "row 39" in result.stderr and not (folder / "out.tsv").exists()


def test_nearest_by_hand():
    """Each class has a mean of its own, may give all that it has, and of equal rows gives the first."""
    spec = importlib.util.spec_from_file_location("alike", programs.ROOT / "recipes" / "alike.py")
    recipe = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(recipe)
    features = np.array([[1, 0], [0.5, 0.8], [1, 0.1], [0, 3], [1, 0.2], [-0.5, 0.8], [0, -1], [0, -1], [0, -1]])
    labels = np.array([0, 1, 0, 1, 0, 1, 2, 2, 2])
    assert recipe.nearest(features, labels, {0: 3, 1: 1, 2: 2}).tolist() == [1, 0, 1, 1, 1, 0, 1, 1, 0]
