"""evaluate.py: what has no interval, levels of intervals, and flags that must count or be refused."""

import json

import numpy as np
import pytest
import torch
from programs import answer
from scipy.stats import norm
from scipy.stats import t as student_t

import evaluate


def save_run(folder, **sets):
    folder.mkdir(parents=True)
    (folder / "metrics.json").write_text(json.dumps(sets))
    return str(folder)


def test_size_of_the_largest_group_is_counted():
    """1 / 49 * 49 is below 1 in floating point."""
    rows = np.eye(49)
    path = "rows.npy"
    for copies in (1, 3):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(evaluate, "read_array", lambda *_, c=copies: (np.repeat(rows, c, 0).astype(np.float32), {}))
            found = evaluate.prototypes(path, "", "", [0.025], 3, False, 0, 0, 0, "cpu")["rows"]
        assert found["greedy, eps 0.025"]["largest group"] == found["linked, eps 0.025"]["largest group"] == copies
        assert found["greedy, eps 0.025"]["value"] == 49


def test_a_prior_of_shares_counts_as_one_of_numbers(tmp_path):
    """Shares are below the half image that classes never seen are given."""
    rng, C = np.random.default_rng(0), 10
    labels, counts = rng.integers(C, size=600), np.array([400, 200, 100, 50, 25, 10, 5, 4, 3, 1])
    for name in ("zs", "ft"):
        logits = rng.normal(size=(600, C)) + 2 * np.eye(C)[labels] + (name == "ft") * np.log(np.maximum(counts, 0.5))
        np.savez(tmp_path / f"{name}.npz", labels=labels, logits=logits.astype(np.float32))
    found = []
    for scale in (1, counts.sum()):
        (tmp_path / "prior.txt").write_text("\n".join(f"{c / scale:.9f}" for c in counts))
        found.append(evaluate.debias(
            *(str(tmp_path / f"{n}.npz") for n in ("zs", "ft")), "", "", {}, [], str(tmp_path / "prior.txt"), "prior",
            False, 0, 0)["rows"])
    assert found[0].keys() == found[1].keys() and "GLA" in found[0]
    for name in found[0]:
        assert found[0][name]["top1"]["value"] == pytest.approx(found[1][name]["top1"]["value"]), name
    assert found[1]["GLA"]["top1"]["value"] > found[1]["fine-tuned"]["top1"]["value"] + 0.1


def test_mean_rho_has_the_level_of_its_smallest_piece():
    """One shift, twenty models in two pieces of ten: the mean over shifts is the shift itself, with its interval."""
    rng = np.random.default_rng(0)
    acc_id = np.linspace(0.3, 0.8, 20)
    models = [{"model": f"m{i}", "group": "g", "v2": (a, 1000, a - 0.1 + 0.02 * rng.normal(), 1000)}
              for i, a in enumerate(acc_id)]
    row = evaluate.effective_robustness(models, ["v2"], "g", "", {"v2": 0.55}, 300, 0)["rows"]["m3"]
    assert row["mean_rho"] == row["v2 rho"]
    level = 1 - 2 * norm.cdf(-np.sqrt(10 / 8) * student_t.ppf(0.975, 8))
    line = evaluate.Line(np.log(acc_id / (1 - acc_id)), acc_id, np.log(0.55 / 0.45), 5, rng)
    assert line.level == pytest.approx(level)


def test_n_counts_for_runs_and_subset_is_refused_for_tables(tmp_path):
    runs = [save_run(tmp_path / f"r{i}", val={"top1": 0.5 + 0.1 * i}, v2={"top1": 0.3 * i}) for i in range(3)]
    told = answer(evaluate, "robustness", *(f"g={run}" for run in runs), "--shifts", "v2")
    assert told.returncode == 2 and "pass --n SET=N" in told.stderr
    flags = ["--n", "val=1000", "v2=500", "--json", tmp_path / "r.json", "--boot", "50"]
    assert answer(evaluate, "robustness", *(f"g={run}" for run in runs), "--shifts", "v2", *flags).returncode == 0
    row = json.loads((tmp_path / "r.json").read_text())["rows"][runs[0]]
    assert row["v2"]["low"] == 0 and 0 < row["v2"]["high"] < 0.01, "exact interval of 0 of 500"
    (tmp_path / "t.csv").write_text("model,val,v2\na,0.5,0.4\nb,0.6,0.5\n")
    (tmp_path / "keep.txt").write_text("0\n1\n")
    told = answer(evaluate, "robustness", tmp_path / "t.csv", "--subset", f"v2={tmp_path / 'keep.txt'}")
    assert told.returncode == 2 and "--subset v2" in told.stderr and "val@v2" in told.stderr


@pytest.mark.parametrize("flags, message", [
    (["--n", "v2=100", "v2=200"], "--n: v2 is given twice"), (["--n", "v2=100.5"], "are whole"),
])
def test_mistaken_pairs_are_refused(tmp_path, capsys, flags, message):
    with pytest.raises(SystemExit) as stopped:
        evaluate.parse_args(["robustness", "t.csv", *flags])
    assert stopped.value.code == 2 and message in capsys.readouterr().err


def test_no_interval_where_nothing_can_vary():
    """A single class among classes; a model that says one class for all."""
    rng = np.random.default_rng(0)
    assert evaluate.mean_over(np.array([0.5]), 50, rng) == {"value": 0.5, "low": None, "high": None}
    assert evaluate.mean_over(np.array([True]), 50, rng)["low"] is not None, "one yes of one is a share"
    labels = np.repeat([0, 1], 5)
    data = {"labels": labels, "predictions": np.zeros(10, int), "n_classes": 2, "class_counts": np.array([9, 1]), "path": ""}
    row = evaluate.score_classes(data, (100, 20), 0, 2, 50, 0)[0]
    assert row["balanced"] == {"value": 0.5, "low": None, "high": None}
    right = evaluate.score_classes(data | {"predictions": labels}, (100, 20), 0, 2, 50, 0)[0]["balanced"]
    assert right["value"] == 1 and right["low"] is not None


@pytest.mark.parametrize("entry", [{"top1": {"value": 0.5}}, {"knn": {"10": 0.5}}, {"retrieval": 0.5}])
def test_metrics_of_the_wrong_kind_are_one_line(tmp_path, entry):
    run = save_run(tmp_path / "a", val=entry)
    told = answer(evaluate, "report", run, "--out", tmp_path / "r.html")
    assert told.returncode == 2 and f"val: {next(iter(entry))}" in told.stderr and "expected" in told.stderr


def test_probe_sets_have_the_same_class_names(tmp_path):
    features, labels = np.eye(2, dtype=np.float32)[[0, 1] * 10], np.array([0, 1] * 10)
    for part, names in (("train", ["cat", "dog"]), ("test", ["dog", "cat"])):
        np.savez(tmp_path / f"{part}.npz", features=features, labels=labels, class_names=np.array(names))
    told = answer(evaluate, "knn", "train.npz", "test.npz", "--k", "1", folder=tmp_path)
    assert told.returncode == 2 and "class_names differ" in told.stderr


def test_sets_of_a_probe_are_drawn_from_on_their_own(tmp_path):
    """Two sets whose right images stand at opposite ends: with the same rows drawn of both their mean would not vary."""
    rng = np.random.default_rng(0)
    for name, n_right in (("a", slice(0, 100)), ("b", slice(100, 200))):
        labels = rng.integers(2, size=200)
        shown = 1 - labels
        shown[n_right] = labels[n_right]
        for part, classes in (("train", labels), ("test", shown)):
            np.savez(tmp_path / f"{name}_{part}.npz", labels=labels, features=np.eye(2, dtype=np.float32)[classes])
    flags = "--sweep none --metric top1 --boot 400 --json p.json".split()
    assert answer(evaluate, "probe", tmp_path, *flags, folder=tmp_path).returncode == 0
    row = json.loads((tmp_path / "p.json").read_text())["rows"][tmp_path.name]
    width = row["mean"]["high"] - row["mean"]["low"]
    assert width == pytest.approx(2 * 1.96 * np.sqrt(0.25 / 400), rel=0.25)


def test_alphas_stand_in_the_order_of_numbers(tmp_path):
    for alpha in ("-0.50", "-0.25", "0.00", "1.00"):
        save_run(tmp_path / f"alpha_{alpha}", val={"n": 10, "top1": 0.5}, v2={"n": 10, "top1": 0.4})
    assert list(evaluate.wiseft_results(str(tmp_path), "val", [], 0, 0)["rows"]) == ["-0.50", "-0.25", "0.00", "1.00"]


def test_a_mistyped_shift_of_wiseft_is_refused(tmp_path):
    save_run(tmp_path / "alpha_0.50", val={"n": 10, "top1": 0.5}, v2={"n": 10, "top1": 0.4})
    with pytest.raises(SystemExit, match="alpha_0.50: no accuracy on sketh"):
        evaluate.wiseft_results(str(tmp_path), "val", ["v2", "sketh"], 0, 0)


def test_alphas_keep_their_decimals(tmp_path):
    """At least two: recipes ask for alpha_0.25."""
    torch.save({"w": torch.ones(2)}, tmp_path / "a.pt")
    evaluate.wiseft([str(tmp_path / "a.pt")] * 2, [0, 0.125, 0.25], str(tmp_path))
    assert {p.stem for p in tmp_path.glob("alpha_*.pt")} == {"alpha_0.00", "alpha_0.125", "alpha_0.25"}
    save_run(tmp_path / "alpha_0.125", val={"n": 10, "top1": 0.5}, v2={"n": 10, "top1": 0.4})
    assert list(evaluate.wiseft_results(str(tmp_path), "val", [], 0, 0)["rows"]) == ["0.125"]


def test_accuracies_of_0_and_1_vary_too():
    """By (k + 1/2) / (n + 1); of an unknown number of images not at all."""
    u = np.random.default_rng(0).random((2000, 3))
    draws = evaluate.binomial_draws(np.array([0.0, 1, 1]), np.array([20, 20, np.nan]), u)
    assert draws[0].tolist() == [0, 1, 1] and (draws[:, 2] == 1).all()
    assert draws[1:, 0].mean() == pytest.approx(0.5 / 21, abs=0.003) == pytest.approx(1 - draws[1:, 1].mean(), abs=0.003)
    models = [{"model": f"m{i}", "group": "g", "v2": (0.4 + 0.1 * i, 20, 0.0, 20)} for i in range(4)]
    row = evaluate.effective_robustness(models, ["v2"], "g", "m0", {}, 200, 0)["rows"]["m1"]
    assert row["v2 tau"]["low"] < 0 < row["v2 tau"]["high"] and row["average"]["high"] > 0


def test_resamples_that_are_all_alike_are_no_evidence(tmp_path):
    """Correlations of two classes; one pair of images a class: whatever the one pair says, it always says."""
    rng, null = np.random.default_rng(0), {"low": None, "high": None}
    assert evaluate.spearman(np.arange(2), np.arange(2), 50, rng) == {"value": pytest.approx(1)} | null
    for name in "ab":
        np.savez(tmp_path / f"{name}.npz", labels=np.repeat(np.arange(6), 2), features=rng.normal(size=(12, 4)))
    labels = np.repeat(np.arange(6), [2, 5, 2, 5, 2, 5])
    for name in "cd":
        np.savez(tmp_path / f"{name}.npz", labels=labels, features=rng.normal(size=(len(labels), 4)))
    found = evaluate.similarity(str(tmp_path / "a.npz"), str(tmp_path / "b.npz"), 9, 9, 1, 200, 0)
    assert all(entry | null == entry for entry in found["differences"])
    assert found["rows"]["share of classes more alike in A"]["value"]["value"] == 0
    found = evaluate.similarity(str(tmp_path / "c.npz"), str(tmp_path / "d.npz"), 9, 9, 1, 200, 0)
    assert {entry["low"] is None for entry in found["differences"]} == {True, False}
    evaluate.plot_similarity(found, str(tmp_path / "x.png"))  # some classes have intervals, others not
    same = np.concatenate([rng.normal(size=(5, 3)), np.ones((5, 3))])  # a tail that has collapsed to the bit
    rows = evaluate.affinity(same, np.arange(5), np.arange(5, 10), 50, rng)
    assert rows["tail-tail cosine"]["low"] == pytest.approx(1) and rows["tail collapse (tail-tail - head-head)"]["low"] is not None
    rows = evaluate.affinity(rng.normal(size=(4, 3)), np.arange(2), np.arange(2, 4), 50, rng)
    for key in ("head-head cosine", "tail-tail cosine", "tail collapse (tail-tail - head-head)"):
        assert rows[key] | null == rows[key]
