"""evaluate.py: what it reads, what it refuses, and the command line."""

import json
import subprocess
import sys
import zipfile

import numpy as np
import pytest
import torch
from sync_copies import ROOT

import evaluate


def arrays(n=60, C=4, D=5, seed=0):
    rng = np.random.default_rng(seed)
    features = rng.normal(size=(n, D)).astype(np.float16)
    prototypes = evaluate.unit_rows(rng.normal(size=(C, D))).astype(np.float16)
    logits = (100 * evaluate.unit_rows(features) @ prototypes.T).astype(np.float16)
    return {
        "labels": rng.integers(C, size=n),
        "logits": logits,
        "features": features,
        "class_counts": np.arange(C) * 10,
        "class_names": np.array([f"c{i}" for i in range(C)]),
        "prototypes": prototypes,
    }


def save(path, **changes):
    np.savez(path, **(arrays() | changes))
    return path


def run(*flags, cwd=None):
    """(exit status, stdout, stderr) of evaluate.py in a process of its own."""
    result = subprocess.run(
        [sys.executable, str(ROOT / "evaluate.py"), *map(str, flags)], capture_output=True, text=True, cwd=cwd
    )
    return result.returncode, result.stdout, result.stderr


@pytest.mark.parametrize(
    "changes, text",
    [
        ({"logits": np.full((60, 4), np.nan)}, "logits are not finite in row 0"),
        ({"logits": np.vstack([np.zeros((59, 4)), np.full((1, 4), np.inf)]).astype(np.float16)}, "row 59"),
        ({"features": np.full((60, 5), np.inf)}, "features are not finite"),
        ({"labels": np.full(60, 4)}, "row 0 has label 4, there are 4 classes"),
        ({"labels": np.full(60, -1)}, "no labelled rows"),
        ({"labels": np.zeros(60)}, "expected whole numbers"),
        ({"labels": np.zeros((60, 4), int)}, "expected whole numbers"),
        ({"labels": np.zeros(0, int), "logits": np.zeros((0, 4))}, "no labelled rows"),
        ({"logits": np.zeros((60, 3))}, "numbers of classes differ"),
        ({"logits": np.zeros((59, 4))}, "60 labels, 59 logits"),
        ({"logits": np.zeros(60)}, "expected numbers"),
        ({"rows": np.array(3)}, "60 labels, no rows"),
        ({"class_counts": np.array([1, 2, -3, 4])}, "class_counts has -3"),
        ({"class_counts": np.zeros(5, int)}, "numbers of classes differ"),
    ],
)
def test_refuses_bad_predictions(tmp_path, changes, text):
    path = save(tmp_path / "val.npz", **changes)
    with pytest.raises(SystemExit, match=text):
        evaluate.read_predictions(path, "logits")


def test_missing_arrays_are_named(tmp_path):
    np.savez(tmp_path / "a.npz", labels=np.zeros(3, int), features=np.ones((3, 2)))
    with pytest.raises(SystemExit, match="no array logits; found features, labels"):
        evaluate.read_predictions(tmp_path / "a.npz", "logits")


def test_objects_are_refused_without_being_read(tmp_path):
    class Bomb:
        def __reduce__(self):
            return open, (str(tmp_path / "ran"), "w")

    np.savez(tmp_path / "a.npz", labels=np.array([Bomb()], object))
    with pytest.raises(SystemExit, match="Python objects"):
        evaluate.read_npz(tmp_path / "a.npz")
    assert not (tmp_path / "ran").exists()


def test_zip_bombs_are_refused_by_their_declared_size(tmp_path):
    np.savez_compressed(tmp_path / "bomb.npz", labels=np.zeros(2**26, np.int64))  # 512 MiB of zeros in 0.5 MiB
    with pytest.raises(SystemExit, match="announce 53687"):
        evaluate.read_npz(tmp_path / "bomb.npz")
    header = b"\x93NUMPY\x01\x00v\x00{'descr': '<f8', 'fortran_order': False, 'shape': (1000000000000,), }"
    with zipfile.ZipFile(tmp_path / "header.npz", "w") as archive:
        archive.writestr("labels.npy", header.ljust(127) + b"\n")
    with pytest.raises(SystemExit, match="says .1000000000000,. float64 and has 128 bytes"):
        evaluate.read_npz(tmp_path / "header.npz")


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04 no", b"text"])
def test_files_that_are_no_npz(tmp_path, content):
    (tmp_path / "a.npz").write_bytes(content)
    with pytest.raises(SystemExit, match="cannot be read as .npz"):
        evaluate.read_npz(tmp_path / "a.npz")


def test_unlabelled_rows_are_left_out(tmp_path):
    labels = arrays()["labels"].copy()
    labels[::2] = -1
    data = evaluate.read_predictions(save(tmp_path / "a.npz", labels=labels), "logits")
    assert len(data["labels"]) == len(data["logits"]) == len(data["features"]) == 30
    assert np.array_equal(data["logits"], arrays()["logits"][1::2])


def test_float16_ties_go_to_the_nearest_prototype():
    prototypes = np.array([[1, 0], [0.999, 0.0447]])
    features = np.array([[1, 0.0447], [1.0, 0]])
    logits = np.full((2, 2), 99.9, np.float16)
    data = {"logits": logits, "features": features, "prototypes": prototypes}
    predictions, n_ties = evaluate.predict(data)
    assert predictions.tolist() == [1, 0] and n_ties == 2
    assert evaluate.predict({"logits": logits})[0].tolist() == [0, 0]  # nothing else is known: the lowest


def test_tables_of_all_kinds_read_alike(tmp_path):
    rows = [{"model": "a", "val": "1.5"}, {"model": "b, c", "val": "2"}]
    (tmp_path / "t.csv").write_text('model,val\na,1.5\n"b, c",2\n')
    (tmp_path / "t.tsv").write_text("model\tval\na\t1.5\nb, c\t2\n")
    (tmp_path / "t.json").write_text(json.dumps(rows))
    (tmp_path / "u.json").write_text(json.dumps({"a": {"val": 1.5}, "b, c": {"val": 2}}))
    for name in ("t.csv", "t.tsv", "t.json", "u.json"):
        assert evaluate.read_records(tmp_path / name) == rows, name
    (tmp_path / "bad.tsv").write_text("model\tval\na\n")
    with pytest.raises(SystemExit, match="bad.tsv:2: the row and the header"):
        evaluate.read_records(tmp_path / "bad.tsv")
    (tmp_path / "index.csv").write_text(",model,val\n0,a,1.5\n")  # as pandas writes it
    assert evaluate.read_records(tmp_path / "index.csv") == [{"": "0", "model": "a", "val": "1.5"}]
    (tmp_path / "long.csv").write_text("model,val\na,1.5,2\n")
    with pytest.raises(SystemExit, match="long.csv:2: the row and the header"):
        evaluate.read_records(tmp_path / "long.csv")
    (tmp_path / "t.json").write_text("[1, 2]")
    with pytest.raises(SystemExit, match="cannot be read as a table"):
        evaluate.read_records(tmp_path / "t.json")


def test_counts_by_place_name_and_json(tmp_path):
    (tmp_path / "lines.txt").write_text("3\n0\n12\n")
    (tmp_path / "t.tsv").write_text("name\tfreq\ndog\t7\ncat\t5\n")
    (tmp_path / "t.json").write_text('{"cat": 5, "dog": 7}')
    assert evaluate.read_counts(tmp_path / "lines.txt", None).tolist() == [3, 0, 12]
    (tmp_path / "lines.txt").write_text("\ufeff3\n0\n12\n", "utf-8")  # as Notepad saves it
    assert evaluate.read_counts(tmp_path / "lines.txt", None).tolist() == [3, 0, 12]
    for name in ("t.tsv", "t.json"):
        assert evaluate.read_counts(tmp_path / name, np.array(["cat", "dog"])).tolist() == [5, 7]
    with pytest.raises(SystemExit, match="no count for 1 classes: cow"):
        evaluate.read_counts(tmp_path / "t.tsv", np.array(["cat", "cow"]))
    (tmp_path / "bad.tsv").write_text("class\tcount\ncat\tmany\n")
    with pytest.raises(SystemExit, match="bad.tsv:2: got 'many'"):
        evaluate.read_counts(tmp_path / "bad.tsv", None)


@pytest.mark.parametrize("names", [None, np.array(["ant", "bee", "cat", "dog"])])
def test_counts_by_id(tmp_path, names):
    """Whatever the order of the lines; other names than the predictions' are refused, not taken by place."""
    (tmp_path / "t.json").write_text('{"3": 400, "0": 100, "2": 20, "1": 5}')
    assert evaluate.read_counts(tmp_path / "t.json", names).tolist() == [100, 5, 20, 400]
    (tmp_path / "t.tsv").write_text("class\tcount\nDog\t4\nAnt\t3\nCat\t2\nBee\t1\n")
    if names is not None:
        with pytest.raises(SystemExit, match=r"its classes \(Dog, Ant, Cat\) are none of ant, bee, cat"):
            evaluate.read_counts(tmp_path / "t.tsv", names)


def test_a_list_of_counts_goes_by_place_whatever_the_names(tmp_path):
    """Folders 0 to 11 are classes "0", "1", "10", "11", "2", ...: line 3 is that of "10"."""
    names = np.array(sorted(map(str, range(12))))
    (tmp_path / "list.txt").write_text("".join(f"{2**i}\n" for i in range(12)))
    assert evaluate.read_counts(tmp_path / "list.txt", names).tolist() == [2**i for i in range(12)]
    (tmp_path / "table.tsv").write_text("name\tcount\n" + "".join(f"{i}\t{2**i}\n" for i in range(12)))
    assert evaluate.read_counts(tmp_path / "table.tsv", names).tolist() == [2 ** int(name) for name in names]


def test_predictions_in_place_of_logits(tmp_path):
    """Where nothing needs logits, `predictions` will do, with the same numbers; a subset of classes needs logits."""
    data = arrays() | {"predictions": arrays()["logits"].argmax(1)}
    for name, without in (("a", "predictions"), ("b", "logits")):
        np.savez(tmp_path / f"{name}.npz", **{k: v for k, v in data.items() if k != without})
    a, b = str(tmp_path / "a.npz"), str(tmp_path / "b.npz")
    rows = evaluate.imbalance([a, b], "", "", (100, 20), 0, 10, 10, False, 20, 0)["rows"]
    assert [row["top1"] for row in rows.values()] == 2 * [next(iter(rows.values()))["top1"]]
    assert evaluate.compare([a], [b], "", 20, 0)["rows"]["top1"]["B - A"] == {"value": 0, "low": 0, "high": 0}
    (tmp_path / "subset.txt").write_text("c1\nc2\n")
    with pytest.raises(SystemExit, match="no array logits"):
        evaluate.imbalance([b], "", str(tmp_path / "subset.txt"), (100, 20), 0, 10, 10, False, 20, 0)


def test_subset_max_pools_groups(tmp_path):
    """Hand example of methods.md D: logits (2, 3, 2.5), map A = {0, 2}, B = {1}: pooled (2.5, 3), so B."""
    (tmp_path / "map.tsv").write_text("0\tA\n1\tB\n2\tA\n")
    ids, groups = evaluate.read_subset(tmp_path / "map.tsv", None, 4)
    data = {
        "path": "x",
        "n_classes": 4,
        "labels": np.array([2, 1, 3]),
        "class_counts": np.array([5, 6, 7, 8]),
        "logits": np.array([[2, 3, 2.5, 9], [2, 3, 2.5, 9], [2, 3, 2.5, 9]]),
    }
    part = evaluate.restrict(data, ids, groups)
    assert part["logits"].tolist() == [[2.5, 3], [2.5, 3]] and part["labels"].tolist() == [0, 1]
    assert part["class_counts"].tolist() == [12, 6]
    (tmp_path / "map.tsv").write_text("\ufeff0\n", "utf-8")  # the class called 0, as Notepad saves it
    assert evaluate.read_subset(tmp_path / "map.tsv", np.array([2, 0, 1]), 3)[0].tolist() == [1]
    (tmp_path / "map.tsv").write_text("5\n")
    with pytest.raises(SystemExit, match="map.tsv:1: no class '5' among 4"):
        evaluate.read_subset(tmp_path / "map.tsv", None, 4)


def test_subset_accuracy_is_never_below_accuracy_among_all(tmp_path):
    data = evaluate.read_predictions(save(tmp_path / "a.npz"), "logits")
    part = evaluate.restrict(data, np.array([1, 3]), np.array([0, 1]))
    among_all = np.isin(data["labels"], [1, 3]) & (evaluate.predict(data)[0] == data["labels"])
    assert (evaluate.predict(part)[0] == part["labels"]).sum() >= among_all.sum()


def test_degenerate_sets_give_null_not_zero(tmp_path):
    """One class with images, a model that always says the same, one image: no correlation, no crash."""
    null = {"value": None, "low": None, "high": None}
    path = save(tmp_path / "val.npz", labels=np.zeros(60, int))
    assert (
        next(iter(evaluate.imbalance([str(path)], "", "", (100, 20), 0, 10, 10, False, 50, 0)["rows"].values()))[
            "spearman_acc"
        ]
        == null
    )
    labels = np.arange(60) % 4
    path = save(
        tmp_path / "val.npz", labels=labels, logits=np.zeros((60, 4)) + [0, 1, 0, 0], prototypes=np.zeros((4, 5))
    )
    row = next(iter(evaluate.imbalance([str(path)], "", "", (100, 20), 0, 10, 10, False, 50, 0)["rows"].values()))
    assert row["top1"]["value"] == 0.25 and row["gini_pred"]["value"] == 0.75
    one = {"labels": np.zeros(1, int), "logits": np.ones((1, 1)), "features": np.ones((1, 3))}
    np.savez(tmp_path / "a.npz", class_counts=np.array([3]), prototypes=np.ones((1, 3)), **one)
    path = str(tmp_path / "a.npz")
    row = next(iter(evaluate.imbalance([path], "", "", (100, 20), 0, 10, 10, False, 50, 0)["rows"].values()))
    assert row["top1"]["value"] == 1 and row["spearman_pred"] == null
    rows = evaluate.collapse([path], "", 20, 0)["rows"]
    assert rows["NC2_M"]["mean"] == rows["NC1"]["mean"] == null


def test_errors_are_one_line_and_status_two(tmp_path):
    save(tmp_path / "a.npz")
    for flags in (
        ("imbalance", tmp_path / "none.npz"),
        ("imbalance", tmp_path / "a.npz", "--json", "/proc/none/x.json"),
    ):
        code, out, error = run(*flags, "--boot", "10")
        assert code == 2 and error.count("\n") == 1 and "Traceback" not in error, error
    with pytest.raises(SystemExit, match="not of the same images: their labels differ"):
        other = save(tmp_path / "b.npz", labels=(arrays()["labels"] + 1) % 4)
        evaluate.compare([str(tmp_path / "a.npz")], [str(other)], "", 10, 0)
    with pytest.raises(SystemExit, match="runs are folders"):
        evaluate.report_runs([str(tmp_path / "nowhere")], "val", "x.html", "", 10, 0)
    with pytest.raises(SystemExit, match="no alpha_"):
        evaluate.wiseft_results(str(tmp_path), "val", [], 0, 0)
    for flags in (["imbalance", "a.npz", "--plot", "x.pdf"], ["wiseft", "a.pt"], ["knn", "a", "b", "--boot", "-1"]):
        with pytest.raises(SystemExit) as error:
            evaluate.parse_args(flags)
        assert error.value.code == 2


def test_end_to_end_is_deterministic_and_runs_alone(tmp_path):
    """The script copied into an empty folder; the same seed gives the same bytes of numbers and plot."""
    (tmp_path / "evaluate.py").write_text((ROOT / "evaluate.py").read_text())
    save(tmp_path / "val.npz")
    pytest.importorskip("matplotlib")
    for name in ("1", "2"):
        command = [sys.executable, "evaluate.py", "imbalance", "val.npz", "--boot", "50", "--plot", f"{name}.svg"]
        result = subprocess.run([*command, "--json", f"{name}.json"], cwd=tmp_path, capture_output=True, text=True)
        assert result.returncode == 0, result.stderr
    content = [json.loads((tmp_path / f"{name}.json").read_text()) for name in ("1", "2")]
    assert content[0]["rows"] == content[1]["rows"] and content[0]["models"] == content[1]["models"]
    assert (tmp_path / "1.svg").read_bytes() == (tmp_path / "2.svg").read_bytes()
    assert not list(tmp_path.glob("*.part"))


def test_checkpoints_that_run_code_are_refused(tmp_path):
    torch.save({"a": evaluate.Path("x")}, tmp_path / "a.pt")
    with pytest.raises(SystemExit, match="cannot be read as a checkpoint of tensors"):
        evaluate.read_state(tmp_path / "a.pt")
    (tmp_path / "b.pt").write_bytes(b"no")
    with pytest.raises(SystemExit, match="cannot be read as a checkpoint of tensors"):
        evaluate.read_state(tmp_path / "b.pt")


def test_tables_of_counts_that_do_not_fit_are_named(tmp_path, capsys):
    """Not the predictions; a table whose names nothing can be found by is taken by place, and that is told."""
    path = str(save(tmp_path / "val.npz"))
    (tmp_path / "three.txt").write_text("1\n2\n3\n")
    (tmp_path / "zeros.txt").write_text("0\n0\n0\n0\n")
    three, zeros = str(tmp_path / "three.txt"), str(tmp_path / "zeros.txt")
    with pytest.raises(SystemExit, match="three.txt: numbers of classes differ"):
        evaluate.read_predictions(path, "predictions", counts=three)
    np.savez(tmp_path / "bare.npz", labels=np.arange(4), predictions=np.arange(4))
    with pytest.raises(SystemExit, match="row 3 has label 3, there are 3 classes in .*three.txt"):
        evaluate.read_predictions(tmp_path / "bare.npz", "predictions", counts=three)
    for prior, told in ((three, "three.txt: 3 counts, expected 4"), (zeros, "zeros.txt: all counts are 0")):
        with pytest.raises(SystemExit, match=told):
            evaluate.debias(path, path, "", "", {}, [], prior, "counts", False, 0, 0)
        with pytest.raises(SystemExit, match=told):
            evaluate.prototypes(path, "", prior, [0.025], 2, False, 0, 0, 0, "cpu")
    with pytest.raises(SystemExit, match="zeros.txt: all counts are 0"):
        evaluate.compare([path], [path], zeros, 0, 0)
    (tmp_path / "t.tsv").write_text("class\tcount\ndog\t4\nant\t3\n")
    assert capsys.readouterr().err == ""
    assert evaluate.read_counts(tmp_path / "t.tsv", None).tolist() == [4, 3]
    assert "t.tsv: its classes (dog, ant) are taken by place" in capsys.readouterr().err


def test_ties_go_by_cosine_whatever_the_lengths():
    data = {"logits": np.zeros((2, 2)), "features": np.array([[1, 0.1], [0.1, 1]]), "prototypes": np.diag([1.0, 100])}
    assert evaluate.predict(data)[0].tolist() == [0, 1]
