"""evaluate.py, every subcommand on bad files and flags: one line and status 2, never a traceback or a warning."""

import json
import os
import re
import subprocess
import sys
import zipfile

import numpy as np
import pytest
import torch
from programs import ROOT, answer, run_here
from test_evaluate_readers import arrays

import evaluate

COMMANDS = {
    "imbalance": "imbalance {0}",
    "compare": "compare ok.npz {0}",
    "collapse": "collapse {0}",
    "similarity": "similarity {0} ok.npz --min-pairs 2",
    "debias": "debias --zeroshot ok.npz --finetuned {0}",
    "held out": "debias --zeroshot ok.npz --finetuned ok.npz --val-zeroshot {0} --val-finetuned {0}",
    "probe": "probe {0} ok.npz --sweep none",
    "knn": "knn ok.npz {0} --k 3",
    "fewshot": "fewshot {0} {0} --shots 1 --draws 2",
    "calibration": "calibration {0}",
    "concepts": "concepts accuracy {0}",
    "report": "report run --out r.html",
}
LABELS = arrays()["labels"]
FILES = {  # what the file says, and what the line says
    "predictions too large": ({"predictions": np.full(60, 4)}, "row 0 has prediction 4, there are 4 classes"),
    "predictions negative": ({"predictions": LABELS - 1}, "has prediction -1"),
    "predictions not whole": ({"predictions": np.zeros(60)}, "predictions is float64"),
    "predictions [N, C]": ({"predictions": np.zeros((60, 4), int)}, "predictions is int64 .60, 4."),
    "names without shape": ({"class_names": np.array("a")}, "class_names is <U1 .., expected text"),
    "names of names": ({"class_names": np.array([["a", "b"]] * 4)}, "class_names is <U1 .4, 2."),
    "counts [C, 2]": ({"class_counts": np.ones((4, 2))}, "class_counts is float64 .4, 2."),
    "float64 beyond float32": ({"logits": np.full((60, 4), 1e300), "features": np.full((60, 5), 1e300)}, "above 1e15"),
    "no width": ({"logits": np.zeros((60, 0)), "features": np.zeros((60, 0))}, "expected numbers"),
    "float16 overflow": (
        {"logits": np.float16([[np.inf] * 4] * 60), "features": np.float16([[np.inf] * 5] * 60)},
        "float16",
    ),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("bad")
    (path / "run").mkdir()
    np.savez(path / "ok.npz", **arrays())
    (path / "counts.txt").write_text("1\n2\n3\n4\n")
    return path


def error_of(line, folder, monkeypatch, *more):
    """The line of a command that must end with one."""
    monkeypatch.chdir(folder)
    with pytest.raises(SystemExit) as error:
        run_here(evaluate, *line.split(), *more, "--boot", 10)
    assert isinstance(error.value.code, str) and "\n" not in error.value.code, error.value.code
    return error.value.code


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize("file", FILES)
def test_bad_predictions_of_every_command(folder, monkeypatch, command, file):
    changes, text = FILES[file]
    name = "run/val.npz" if command == "report" else "bad.npz"
    np.savez(folder / name, **(arrays() | changes))
    line = error_of(COMMANDS[command].format(name), folder, monkeypatch)
    assert line.startswith(f"{name}: ") and re.search(text, line), line


def test_files_that_cannot_be_unpacked(folder, monkeypatch):
    """Encrypted members, and labels of which the largest would be the number of classes."""
    data = bytearray((folder / "ok.npz").read_bytes())
    for head, flag in ((b"PK\x01\x02", 8), (b"PK\x03\x04", 6)):
        place = data.find(head)
        while place >= 0:
            data[place + flag] |= 1
            place = data.find(head, place + 4)
    (folder / "locked.npz").write_bytes(data)
    assert zipfile.is_zipfile(folder / "locked.npz")
    assert "cannot be read as .npz" in error_of("imbalance locked.npz", folder, monkeypatch)
    np.savez(folder / "labels.npz", labels=np.array([0, 10**12]), features=np.eye(2))
    for command in ("probe labels.npz labels.npz --sweep none", "knn labels.npz labels.npz", "collapse labels.npz"):
        assert "row 1 has label 1000000000000" in error_of(command, folder, monkeypatch)


def test_labels_of_many_kinds(folder, monkeypatch):
    """[N, C] of other numbers or of other widths; all difficult: nothing to compute, no crash."""
    features = np.random.default_rng(0).normal(size=(20, 4))
    for name, labels in (
        ("a", np.ones((20, 2))),
        ("b", np.ones((20, 3))),
        ("c", np.full((20, 2), 7)),
        ("d", -np.ones((20, 2))),
    ):
        np.savez(folder / f"{name}.npz", features=features, labels=labels.astype(int))
    for other, text in (("b", "different widths"), ("c", "1, 0 or -1 .difficult., got 7 to 7")):
        line = error_of(f"probe a.npz {other}.npz --sweep none", folder, monkeypatch)
        assert re.search(text, line), line
    run_here(evaluate, "probe", "a.npz", "d.npz", "--sweep", "none", "--boot", 10, "--json", "d.json")
    assert json.loads((folder / "d.json").read_text())["rows"]["model"]["d"]["value"] is None


@pytest.mark.filterwarnings("error")
def test_degenerate_models_beside_others(folder, monkeypatch):
    """A model without images of some class, beside one that has them, also in the plot; one image to debias."""
    pytest.importorskip("matplotlib")
    monkeypatch.chdir(folder)
    np.savez("one.npz", **(arrays() | {"labels": np.zeros(60, int)}))
    run_here(evaluate, "imbalance", "ok.npz", "one.npz", "--boot", 10, "--plot", "o.svg", "--json", "o.json")
    means = [b["accuracy"]["value"] for b in json.loads((folder / "o.json").read_text())["bins_over_models"]]
    assert None in means and not all(m is None for m in means)
    np.savez("single.npz", **{k: v[:1] if len(v) == 60 else v for k, v in arrays().items()})
    assert "too few to hold out half" in error_of(
        "debias --zeroshot single.npz --finetuned single.npz", folder, monkeypatch
    )
    np.savez("five.npz", **arrays(C=5) | {"labels": LABELS})
    assert "their n_classes differ" in error_of("compare ok.npz five.npz", folder, monkeypatch)
    np.savez("wide.npz", **arrays() | {"prototypes": 1.0 + np.random.default_rng(0).random((4, 9))})
    run_here(evaluate, "debias", "--zeroshot", "ok.npz", "--finetuned", "wide.npz", "--boot", 10)  # without tau-norm


def test_compare_without_frequencies_has_no_tail(folder, monkeypatch):
    monkeypatch.chdir(folder)
    np.savez("plain.npz", **{k: v for k, v in arrays().items() if k in ("labels", "logits")})
    np.savez("zeros.npz", **arrays() | {"class_counts": np.zeros(4, int)})  # as the scripts write what is not known
    for name in "plain.npz", "zeros.npz":
        assert list(evaluate.compare([name], [name], "", 10, 0)["rows"]) == ["top1", "balanced"]
        assert "no array class_counts" in error_of(f"imbalance {name}", folder, monkeypatch)


COUNTS = {
    "-3\n4\n": ":1: got '-3', expected a number of at least 0",
    "class\tcount\na\t-4\n": ":2: got '-4', expected a number of at least 0",
    "class\tcount\na\t4\na\t5\n": ":3: a twice",
    '{"a": null}': "expected class and count",
    "[" * 100_000: "cannot be read",
    "{}": "expected class and count",
}


@pytest.mark.parametrize("text", COUNTS)
@pytest.mark.parametrize("command", ["imbalance ok.npz --counts {0}", "concepts shared {0} counts.txt", "concepts agree {0} counts.txt",
                                     "prototypes ok.npz --counts {0}", "debias --zeroshot ok.npz --finetuned ok.npz --prior {0}"])  # fmt: skip
def test_bad_counts(folder, monkeypatch, command, text):
    name = "c.json" if text[0] in "[{" else "c.tsv"
    (folder / name).write_text(text)
    assert COUNTS[text] in error_of(command.format(name), folder, monkeypatch)


def test_names_that_stand_for_two_classes(folder, monkeypatch):
    (folder / "subset.txt").write_text("a\n")
    np.savez(folder / "twins.npz", **(arrays() | {"class_names": np.array(list("aabc"))}))
    assert "2 class 'a'" in error_of("imbalance twins.npz --classes subset.txt", folder, monkeypatch)


TABLE = "model,group,val,v2\na,x,50,40\nb,x,60,50\nc,x,70,62\nd,y,65,61\n"


@pytest.mark.parametrize(
    "table, flags, text",
    [
        (TABLE, "--n sketch=5", "no set sketch; there are val, val@v2, v2"),
        (TABLE, "--split sketch=0.5", "no set sketch"),
        (TABLE, "--split val=0.5", "no set val; there are v2"),
        ("model,val,v2,epochs\na,.5,.4,32\nb,.6,.5,32\n", "", "epochs look like percent, val, v2 like fractions"),
        ("model,val,v2,v2\na,1,2,3\n", "", "two columns of the same name"),
        ('[{"model": "a", "val": 0.5, "v2": 0.4}, {"val": 0.5, "v2": 0.4}]', "", "expected model"),
        ("[" * 100_000, "", "cannot be read as a table"),
    ],
)
def test_bad_robustness_tables(folder, monkeypatch, table, flags, text):
    name = "t.json" if table[0] == "[" else "t.csv"
    (folder / name).write_text(table)
    assert text in error_of(f"robustness {name} {flags}", folder, monkeypatch)


def test_lines_that_some_resamples_do_not_have(folder, monkeypatch):
    """Pieces of one and two models, or identical x: bands of the resamples that have a line, and a plot."""
    pytest.importorskip("matplotlib")
    monkeypatch.chdir(folder)
    (folder / "t.csv").write_text(TABLE)
    (folder / "same.csv").write_text("model,val,v2\na,50,40\nb,50,50\n")
    for line in ("t.csv --split v2=0.65", "same.csv"):
        run_here(evaluate, "robustness", *line.split(), "--boot", 50, "--plot", "o.png", "--json", "o.json")
    (folder / "t.csv").write_text(TABLE + "e,x,55,46\nf,x,72,60\n")
    run_here(evaluate, "robustness", "t.csv", "--split", "v2=0.57", "--boot", 200, "--json", "o.json")
    results = json.loads((folder / "o.json").read_text())
    low, fits = results["curves"]["v2"]["x"]["low"], results["fits"]
    assert low[0] is None and low[-1] is not None  # through two models every resample has the same line
    assert [fits[f"v2, x, {side}"]["models"] for side in ("left", "right")] == [2, 3]
    assert fits["v2, x, left"]["slope"]["value"] is not None is fits["v2, x, left"]["slope"]["low"]


@pytest.mark.parametrize(
    "metrics, text",
    [
        ([], "expected an object, got a list"),
        ({"val": 3}, "val is 3, expected an object"),
        ({"val": {"top1": "x"}}, "val: top1: got 'x'"),
        ({"val": {"top1": float("nan")}}, "val: top1: got nan"),
        ({"val": {"top1": 50, "n": 5}}, "top1: got 50, expected a number of at least 0, at most 1"),
        ({"val": {"top1": 0.5, "n": 0}}, "val: n: got 0, expected a number of at least 1"),
        ({"val": {"retrieval": {"i2t_r1": "x"}}}, "val: retrieval: got 'x'"),
    ],
)
@pytest.mark.parametrize("command", ["report bad --out r.html", "robustness bad", "wiseft --results ."])
def test_bad_metrics(tmp_path, monkeypatch, command, metrics, text):
    for name in ("bad", "alpha_0.50"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "metrics.json").write_text(json.dumps(metrics))
    assert text in error_of(command, tmp_path, monkeypatch)


def test_metrics_without_the_number_of_images(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name, top1 in (("a", 0.5), ("b", 0.6)):
        (tmp_path / name).mkdir()
        (tmp_path / name / "metrics.json").write_text(json.dumps({"val": {"top1": top1}, "v2": {"top1": top1 - 0.1}}))
        (tmp_path / name / "args.json").write_text('{"args": []}')
    result = evaluate.robustness(["a", "b"], "val", [], "", "", {}, {}, {}, 10, 0)
    assert result["baseline"] == "runs" and result["rows"]["a"]["v2"] == {"value": 0.4, "low": None, "high": None}


@pytest.mark.parametrize(
    "content",
    ["[]", '{"rows": {}}', '{"command": [], "rows": {}}', '{"command": "compare", "rows": {"a": 3}}',
     '{"command": "imbalance", "rows": {}}', '{"command": "robustness", "rows": {"a": {"b": 1}}}',
     '{"command": "x", "rows": {"a": {"b": {"c": 1}}}}', '{"command": "x", "rows": {"a": {"b": [1]}}}'],
)  # fmt: skip
def test_report_of_other_json(tmp_path, monkeypatch, content):
    pytest.importorskip("matplotlib")
    (tmp_path / "x.json").write_text(content)
    line = error_of("report x.json --out r.html", tmp_path, monkeypatch)
    assert "not what --json of evaluate.py writes" in line or "expected an object" in line


def test_report_passes_over_arrays_that_cannot_be_scored(tmp_path, monkeypatch):
    (tmp_path / "run").mkdir()
    for name, labels in (("a", None), ("b", np.array(["x"] * 60))):
        np.savez(
            tmp_path / "run" / f"{name}.npz",
            **{k: v for k, v in (arrays() | {"labels": labels}).items() if v is not None},
        )
    assert "neither metrics.json nor" in error_of("report run", tmp_path, monkeypatch)


@pytest.mark.parametrize("name", ["list.pt", "tensor.pt", "text.pt", "text.safetensors"])
def test_checkpoints_that_are_none(tmp_path, monkeypatch, name):
    """A list, a tensor in place of a dict of them, a text (which torch.load takes for an old pickle)."""
    if name.endswith(".safetensors"):
        pytest.importorskip("safetensors")
    content = {"list.pt": [1, 2], "tensor.pt": {"state_dict": torch.ones(2)}}.get(name)
    torch.save(content, tmp_path / name) if content else (tmp_path / name).write_text("hello world")
    for command in (f"prototypes {name}", f"wiseft {name} {name} --out w"):
        assert "cannot be read as a checkpoint of tensors" in error_of(command, tmp_path, monkeypatch)


def test_prototypes_of_bad_shapes(tmp_path, monkeypatch):
    np.save(tmp_path / "none.npy", np.ones((4, 0)))
    assert "expected numbers [K, D]" in error_of("prototypes none.npy --tsne", tmp_path, monkeypatch)
    np.save(tmp_path / "huge.npy", np.full((4, 2), 1e200))
    assert "above 1e15" in error_of("prototypes huge.npy", tmp_path, monkeypatch)
    for counts in (np.ones((4, 2)), np.array(3), -np.ones(4), np.array([np.nan, 1, 1, 1]), np.array(list("abcd"))):
        np.savez(tmp_path / "c.npz", prototypes=np.eye(4), class_counts=counts)
        assert "expected one a row, not negative" in error_of("prototypes c.npz", tmp_path, monkeypatch)
    assert np.isnan(evaluate.effective_rank(np.zeros((3, 2))))
    np.save(tmp_path / "whole.npy", np.eye(4, dtype=np.int64))
    assert evaluate.prototypes(str(tmp_path / "whole.npy"), "", "", [0.025], 2, False, 0, 0, 0, "cpu")["rows"]  # numbers are numbers


def test_prototypes_without_frequencies_have_no_tail(tmp_path):
    """The training scripts write zeros where they do not know them."""
    np.savez(tmp_path / "a.npz", prototypes=np.eye(6), class_counts=np.zeros(6, np.int64))
    assert not evaluate.prototypes(str(tmp_path / "a.npz"), "", "", [0.025], 2, False, 0, 0, 0, "cpu")["affinity"]


def test_a_null_of_the_first_model_leaves_out_that_model_only(folder, monkeypatch, capsys):
    rows = [{"model": m, "group": "x", "val": v, "v2": v - 0.1, "v3": v - 0.2} for m, v in zip("abcd", (0.5, 0.6, 0.7, 0.8))]
    rows[0]["v2"] = None
    (folder / "null.json").write_text(json.dumps(rows))
    monkeypatch.chdir(folder)
    run_here(evaluate, "robustness", "null.json", "--boot", 20, "--json", "o.json")
    assert "left out a: no accuracy on v2" in capsys.readouterr().err
    assert set(json.loads((folder / "o.json").read_text())["curves"]) >= {"v2", "v3"}


def test_wiseft_curve_is_over_all_classes_of_the_id_set(tmp_path, monkeypatch):
    """Not over the classes of the first shift; all alphas have the same sets."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "alpha_0.50").mkdir()
    part = arrays() | {"labels": LABELS % 2}
    for name, data in (("val", arrays()), ("adversarial", part)):
        np.savez(f"alpha_0.50/{name}.npz", labels=data["labels"], logits=data["logits"])
    row = evaluate.wiseft_results(".", "val", [], 200, 0)["rows"]["0.50"]
    assert row["average"]["low"] < row["average"]["value"] < row["average"]["high"]
    assert row["val"]["value"] == pytest.approx((arrays()["logits"].argmax(1) == LABELS).mean())
    (tmp_path / "alpha_1.00").mkdir()
    (tmp_path / "alpha_1.00" / "metrics.json").write_text('{"val": {"top1": 0.5, "n": 9}, "v2": {"top1": 0.4, "n": 9}}')
    assert "other alphas have other sets" in error_of("wiseft --results .", tmp_path, monkeypatch)


@pytest.mark.parametrize(
    "line",
    ["imbalance a --bins 0", "imbalance a --worst 0", "imbalance a --seed -1", "imbalance a --tail-classes -1",
     "imbalance a --cuts 20 100", "imbalance a --json .", "knn a b --k 0", "knn a b --k -1", "probe a b --C 0", "probe a b --C nan",
     "fewshot a b --shots 0", "fewshot a b --draws 0", "retrieval a --k 0", "calibration a --bins 0", "calibration a --fraction nan",
     "similarity a b --pairs 0", "prototypes a --eps nan", "prototypes a --eps 0", "prototypes a --samples -1",
     "wiseft a b --alpha nan", "wiseft a b --alpha 0.5 0.50", "wiseft --results a --out b", "wiseft --results a --alpha 1", "robustness a --n v2=-5", "robustness a --n v2=inf", "robustness a --n v2",
     "robustness a --split v2=0", "debias --zeroshot a --finetuned b --more c",
     "knn a.npz b.npz --sets c", "concepts agree a b --counts c", "concepts shared a b --counts c"],
)  # fmt: skip
def test_flags_out_of_range(line, capsys):
    with pytest.raises(SystemExit) as error:
        evaluate.parse_args(line.split())
    assert error.value.code == 2 and "error: " in capsys.readouterr().err


def test_devices_that_are_not_there(folder, monkeypatch):
    for device in ("nonsense", "meta", "xpu"):
        assert f"--device {device}: " in error_of("knn ok.npz ok.npz", folder, monkeypatch, "--device", device)


def test_status_two_of_the_program(folder):
    command = [sys.executable, ROOT / "evaluate.py", "imbalance", folder / "none.npz"]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 2 and result.stderr.count("\n") == 1 and not result.stdout


def test_output_to_a_pipe_a_link_and_a_reader_that_stops(folder, tmp_path):
    """A pipe is written to and stays one, a link too; `| head -1` loses neither the numbers nor the status."""
    pipe, link = tmp_path / "pipe", tmp_path / "link.json"
    os.mkfifo(pipe)
    link.symlink_to(tmp_path / "there.json")
    command = f"{sys.executable} {ROOT / 'evaluate.py'} imbalance {folder / 'ok.npz'} --boot 5 --json"
    reader = subprocess.Popen(["cat", pipe], stdout=subprocess.PIPE)
    subprocess.run(f"{command} {pipe}", shell=True, check=True, stdout=subprocess.DEVNULL)
    assert json.loads(reader.communicate(timeout=60)[0])["command"] == "imbalance" and pipe.is_fifo()
    script = f"set -o pipefail; {command} {link} | head -1"
    result = subprocess.run(["bash", "-c", script], capture_output=True, text=True)
    assert result.returncode == 0 and result.stderr == "" and result.stdout.startswith("imbalance")
    assert link.is_symlink() and json.loads((tmp_path / "there.json").read_text())["rows"]


@pytest.mark.filterwarnings("ignore")
def test_tensors_that_are_not_plain_numbers(folder, monkeypatch, tmp_path):
    plain = {"state_dict": {"a": torch.ones(3, 4), "prototypes": torch.ones(3, 4)}}
    torch.save(plain, tmp_path / "ok.pt")
    odd = {
        "sparse": torch.eye(4).to_sparse(), "complex": torch.ones(3, 4, dtype=torch.complex64),
        "quantized": torch.quantize_per_tensor(torch.ones(3, 4), 0.1, 0, torch.qint8),
        "huge": torch.zeros(1).expand(10**7, 10**5),
    }  # fmt: skip
    for name, tensor in odd.items():
        torch.save({"state_dict": {"a": torch.ones(3, 4), "prototypes": tensor}}, tmp_path / f"{name}.pt")
        for line in (f"prototypes {tmp_path}/{name}.pt", f"wiseft {tmp_path}/{name}.pt {tmp_path}/ok.pt --out w"):
            assert "prototypes is sparse, quantized, complex, nested, without values or one" in error_of(line, folder, monkeypatch)
    torch.save({"state_dict": {"a": torch.full((3, 4), torch.nan), "prototypes": torch.ones(3, 4)}}, tmp_path / "n.pt")
    line = error_of(f"wiseft {tmp_path}/ok.pt {tmp_path}/n.pt --out w", folder, monkeypatch)
    assert "n.pt: a is not finite" in line
    with open(tmp_path / "huge.npy", "wb") as file:
        np.lib.format.write_array_header_1_0(file, {"descr": "<f4", "fortran_order": False, "shape": (10**9, 100)})
        file.truncate(file.tell() + 4 * 10**11)  # sparse on the disk
    assert "more than this machine's memory" in error_of(f"prototypes {tmp_path}/huge.npy", folder, monkeypatch)
    assert "/dev/zero: not a file" in error_of("imbalance /dev/zero", folder, monkeypatch)


def test_models_that_are_always_right_have_an_interval(folder, monkeypatch):
    """60 of 60: [.9404, 1] by Clopper and Pearson; 15 of a class [.7820, 1]; a difference of such has none."""
    monkeypatch.chdir(folder)
    np.savez("right.npz", **(arrays() | {"logits": 9.0 * np.eye(4)[LABELS]}))
    row = evaluate.imbalance(["right.npz"], "", "", (100, 20), 0, 10, 2, False, 20, 0)["rows"]
    (row,) = row.values()
    for key in ("top1", "balanced"):
        assert row[key]["low"] == pytest.approx(0.025 ** (1 / 60)) and row[key]["high"] == 1
    n = int(np.isin(LABELS, np.argsort(-arrays()["class_counts"], kind="stable")[:1]).sum())
    assert row["head"]["low"] == pytest.approx(0.025 ** (1 / n))
    rows = evaluate.compare(["ok.npz"], ["right.npz"], "", 20, 0)["rows"]
    assert rows["balanced"]["B"]["low"] == pytest.approx(0.025 ** (1 / 60))
    assert rows["top1"]["A"]["low"] < rows["top1"]["A"]["value"] < rows["top1"]["A"]["high"]


def test_intervals_over_runs_are_possible_values():
    cells = [evaluate.estimate(v) for v in (0.2, 0.9)]
    assert evaluate.over_runs(cells, "top1") == {"value": pytest.approx(0.55), "low": 0, "high": 1}
    found = evaluate.over_runs(cells, "spearman_acc")
    assert found["low"] == -1 and found["high"] == 1 and evaluate.over_runs(cells[:1], "top1") is cells[0]


def test_no_resamples_no_intervals(folder, monkeypatch, tmp_path):
    """--boot 0: what hangs on intervals is null, not 0."""
    monkeypatch.chdir(folder)
    run_here(evaluate, *"imbalance ok.npz --boot 0 --json".split(), tmp_path / "i.json")
    assert json.loads((tmp_path / "i.json").read_text())["models"]["ok"]["predictions_interval"] == [[None, None]] * 4
    np.savez("more.npz", **arrays(seed=1))
    run_here(evaluate, *"similarity ok.npz more.npz --min-pairs 2 --boot 0 --json".split(), tmp_path / "s.json")
    rows = json.loads((tmp_path / "s.json").read_text())["rows"]
    assert all(row["value"]["value"] is None for name, row in rows.items() if name.startswith("share of"))


def test_report_of_arrays_without_frequencies(folder, tmp_path):
    """Any model can be scored by one file: top-1 and balanced accuracy; a | in a name leaves the table whole."""
    kept = {k: v for k, v in arrays().items() if k in ("labels", "logits")}
    (tmp_path / "a").mkdir()
    np.savez(tmp_path / "a" / "val.npz", **kept, class_counts=np.zeros(4, int))
    out = str(tmp_path / "r.html"), str(tmp_path / "r.md")
    rows = [evaluate.report_runs([f"x|y={tmp_path / 'a'}"], "val", *out, 10, 0)["sets"]["val"]["x|y"]]
    np.savez(tmp_path / "a" / "val.npz", **kept)
    result = evaluate.report_runs([f"x|y={tmp_path / 'a'}"], "val", *out, 10, 0)
    row = result["sets"]["val"]["x|y"]
    assert row["n"] == 60 and row["balanced"]["low"] < row["top1"]["high"] and set(row) == {"n", "top1", "balanced"}
    assert rows == [row]
    lines = (tmp_path / "r.md").read_text().splitlines()
    assert [line.replace("\\|", "").count("|") for line in lines if line.startswith("|")] == [5, 5, 5]


def test_the_temperature_of_a_part_that_is_all_right_is_the_least():
    labels = np.arange(60) % 4
    for margin in 1, 20, 1000, 60000:
        assert evaluate.fit_temperature(margin * np.eye(4)[labels].astype(np.float32), labels) == 0.01
    wrong = np.eye(4)[np.where(np.arange(60) < 15, (labels + 1) % 4, labels)] * 5.0  # a quarter: an interior least
    t = evaluate.fit_temperature(wrong, labels)
    assert t == pytest.approx(5 / np.log(9), rel=1e-4)  # softmax's share of the right one is 3/4: e^(5/T) / (e^(5/T) + 3)


@pytest.mark.parametrize("tensor, told", [
    (torch.nn.Parameter(torch.randn(6, 4)), None), (torch.randn(6, 4).to(torch.float8_e4m3fn), None),
    (torch.empty(6, 4, device="meta"), "without values"),
    ("two lengths", "nested")])  # fmt: skip
@pytest.mark.filterwarnings("ignore:.*nested tensors.*")
def test_tensors_of_other_kinds(tmp_path, tensor, told):
    if isinstance(tensor, str):
        tensor = torch.nested.nested_tensor([torch.ones(2), torch.ones(3)])
    torch.save({"module._orig_mod.last_layer.weight": tensor}, tmp_path / "x.pt")
    torch.save({"last_layer.weight": tensor}, tmp_path / "y.pt")
    if told:
        for call in (lambda: evaluate.read_array(str(tmp_path / "x.pt"), ""),
                     lambda: evaluate.wiseft([str(tmp_path / "x.pt")] * 2, [0.5], str(tmp_path))):  # fmt: skip
            with pytest.raises(SystemExit, match=told):
                call()
        return
    assert evaluate.read_array(str(tmp_path / "x.pt"), "")[0].shape == (6, 4)
    evaluate.wiseft([str(tmp_path / "x.pt"), str(tmp_path / "y.pt")], [0.5], str(tmp_path))  # DDP over compile, plain
    mixed = torch.load(tmp_path / "alpha_0.50.pt", weights_only=True)
    assert list(mixed) == ["last_layer.weight"] and torch.equal(mixed["last_layer.weight"].float(), tensor.detach().float())


@pytest.mark.parametrize("entry, told", [
    ({"top1": -0.5}, "top1: got -0.5"), ({"top1": 0.5, "knn": 7}, "knn: got 7"), ({"top1": 0.5, "spearman_acc": 5}, "got 5"),
    ({"top1": 0.5, "n": 1e308}, "n: got 1e"), ({"top1": 10**400}, "top1: got 1000"), ({"retrieval": {"i2t_r1": 1.5}}, "retrieval: got 1.5")])  # fmt: skip
def test_metrics_out_of_range_are_refused(tmp_path, entry, told):
    (tmp_path / "metrics.json").write_text(json.dumps({"val": entry}))
    with pytest.raises(SystemExit, match=told):
        evaluate.read_metrics(tmp_path)


def test_a_class_in_two_groups_and_a_name_of_many_digits_are_refused(tmp_path):
    names = np.array(["c0", "c1", "c2"])
    for text, told in (("c0\tx\nc1\tx\nc0\ty\n", ":3: class 'c0' is in two groups"), ("1" * 5000, "no class '1111")):
        (tmp_path / "classes.txt").write_text(text)
        with pytest.raises(SystemExit, match=told):
            evaluate.read_subset(tmp_path / "classes.txt", names, 3)
    (tmp_path / "classes.txt").write_text("c0\tx\nc1\tx\n0\tx\n")
    assert evaluate.read_subset(tmp_path / "classes.txt", names, 3)[1].tolist() == [0, 0]


def test_shots_of_no_class_are_told(tmp_path):
    np.savez(tmp_path / "x.npz", features=np.random.default_rng(0).normal(size=(20, 4)), labels=np.zeros((20, 3), int))
    told = answer(evaluate, "fewshot", tmp_path / "x.npz", tmp_path / "x.npz", "--shots", "1", "--draws", "2")
    assert told.returncode == 2 and "no training image has a label" in told.stderr


def test_resamples_without_a_correlation_are_counted():
    found = evaluate.spearman(np.array([9.0, 9, 1]), np.array([1.0, 2, 3]), 2000, np.random.default_rng(0))
    draws = np.random.default_rng(0).integers(3, size=(2000, 3))
    assert found["dropped"] == sum(len({(9, 9, 1)[i] for i in row}) == 1 or len(set(row)) == 1 for row in draws.tolist())
    assert "dropped" not in evaluate.spearman(np.arange(50.0), np.arange(50.0), 200, np.random.default_rng(0))
