"""evaluate.py: probe, k-NN, few shots, average precision, retrieval, calibration; scikit-learn and hand numbers."""

import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits
from sklearn.linear_model import LogisticRegression
from sklearn.neighbors import KNeighborsClassifier

import clip
import dino_laionet as dino
import evaluate


@pytest.fixture(scope="module")
def digits():
    x, y = load_digits(return_X_y=True)
    order = np.random.default_rng(0).permutation(len(y))
    x, y = x[order].astype(np.float32), y[order]
    return {"features": x[:1200], "labels": y[:1200]}, {"features": x[1200:], "labels": y[1200:]}


def objective(weight, bias, features, labels, C):
    """scikit-learn's objective over C n, in float64: mean cross-entropy + |W|^2 / (2 C n). weight: [D, C]."""
    logits = torch.from_numpy(features.astype(np.float64) @ weight + bias)
    penalty = (weight**2).sum() / (2 * C * len(labels))
    return float(torch.nn.functional.cross_entropy(logits, torch.from_numpy(labels))) + penalty


@pytest.mark.parametrize("C", [1e-4, 0.316, 100.0])
def test_probe_has_scikit_learns_optimum(digits, C):
    """The same objective to 1e-5, the same accuracy up to one image (ties of near-equal optima)."""
    train, test = digits
    ours = evaluate.Logistic(train["features"], train["labels"], 10, "cpu")
    found = ours.fit(C)
    theirs = LogisticRegression(C=C, tol=1e-8, max_iter=20_000).fit(
        train["features"].astype(np.float64), train["labels"]
    )
    best = objective(theirs.coef_.T, theirs.intercept_, train["features"], train["labels"], C)
    weight = ours.weight[:-1].numpy()
    bias = ours.weight[-1].numpy() - ours.mean.double().numpy() @ weight
    assert objective(weight, bias, train["features"], train["labels"], C) == pytest.approx(best, rel=1e-5)
    assert found == pytest.approx(best, rel=1e-5)
    n_right = (ours.scores(test["features"]).argmax(1) == test["labels"]).sum()
    assert abs(int(n_right) - (theirs.predict(test["features"]) == test["labels"]).sum()) <= 1


def test_probe_of_many_labels_is_one_regression_a_class(digits):
    train, test = digits
    labels = np.stack([train["labels"] % 2, train["labels"] > 6], 1).astype(np.int64)
    labels[:50, 1] = -1  # difficult: left out of the second class
    ours = evaluate.Logistic(train["features"], labels, 2, "cpu")
    ours.fit(0.01)
    for c, rows in ((0, slice(None)), (1, slice(50, None))):
        x = train["features"].astype(np.float64)[rows]
        theirs = LogisticRegression(C=0.01, tol=1e-9, max_iter=5000).fit(x, labels[rows][:, c])
        np.testing.assert_allclose(ours.weight[:-1, c], theirs.coef_[0], atol=1e-3)  # flat: objectives agree to 1e-7


def test_sweeps_choose_on_validation_images(digits, tmp_path):
    train, test = digits
    half = {k: v[:600] for k, v in train.items()}, {k: v[600:] for k, v in train.items()}
    for protocol, n in (("clip", 7 + 8), ("transfer", 45)):
        model, strengths = evaluate.Logistic(*half[0].values(), 10, "cpu"), []
        fit = model.fit
        model.fit = lambda C, fit=fit, strengths=strengths: strengths.append(C) or fit(C)
        chosen = evaluate.sweep_strength(protocol, model, half[1], "top1")
        assert len(strengths) <= n and chosen in np.asarray(strengths)
    assert len(strengths) == 45 and strengths[0] == pytest.approx(1e-5) and strengths[-1] == pytest.approx(1e6)
    assert strengths == sorted(strengths)  # strong to weak regularisation
    fit = evaluate.Logistic(*half[0].values(), 10, "cpu")
    of_classes, of_images = (evaluate.sweep_strength("clip", fit, half[1], metric) for metric in ("per_class", "top1"))
    right = []
    for C in of_classes, of_images:
        fit.fit(C)
        hit = fit.scores(half[1]["features"]).argmax(1) == half[1]["labels"]
        right.append(np.mean([hit[half[1]["labels"] == c].mean() for c in range(10)]))
    assert right[0] >= right[1]  # the mean over classes is what was asked for


def test_a_fifth_of_the_training_images_is_held_out(monkeypatch):
    """Of 2,000 400, to four standard errors; no image is in both parts."""
    parts, rng = [], np.random.default_rng(1)
    data = {"features": rng.normal(size=(2000, 2)), "labels": np.arange(2000) % 2}
    monkeypatch.setattr(evaluate, "sweep_strength", lambda protocol, model, val, metric: parts.append((model, val)) or 1.0)
    evaluate.probe_scores(data, None, data, data, 2, "clip", 1.0, "top1", 0, "cpu")
    model, val = parts[0]
    assert abs(len(val["labels"]) - 400) < 72 and model.n + len(val["labels"]) == 2000


def test_transfer_table_has_deltas_on_the_same_images(digits, tmp_path):
    train, test = digits
    for model, scale in (("base", 1.0), ("noisy", 6.0)):
        (tmp_path / model).mkdir()
        for name in ("cifar10", "pets"):
            for part, data in (("train", train), ("test", test)):
                noise = np.random.default_rng(0).normal(size=data["features"].shape) * scale
                np.savez(
                    tmp_path / model / f"{name}_{part}.npz", features=data["features"] + noise, labels=data["labels"]
                )
    inputs = [str(tmp_path / "base"), str(tmp_path / "noisy")]
    rows = evaluate.transfer("probe", inputs, [], [], "none", 0.01, "auto", [], 0, 200, 0, "cpu")["rows"]
    delta = rows["noisy - base"]["mean"]
    assert list(rows["base"]) == ["cifar10", "pets", "mean"] and delta["low"] <= delta["value"] <= delta["high"] < 0
    assert delta["value"] == pytest.approx(rows["noisy"]["mean"]["value"] - rows["base"]["mean"]["value"])
    knn = evaluate.transfer("knn", inputs, ["pets"], [5], "", 0, "top1", [], 0, 50, 0, "cpu")["rows"]
    assert knn["noisy - base"]["pets k=5"]["high"] < 0
    shots = evaluate.transfer("fewshot", inputs[:1], ["pets"], [], "", 1.0, "auto", [1, 8], 3, 0, 0, "cpu")
    assert shots["rows"]["base"]["pets 1-shot"]["value"] < shots["rows"]["base"]["pets 8-shot"]["value"]
    assert len(set(shots["details"][0]["draws"])) > 1  # other images with every draw
    shots = evaluate.transfer("fewshot", inputs, ["pets"], [], "", 1.0, "auto", [8], 3, 0, 0, "cpu")["rows"]
    delta = shots["noisy - base"]["pets 8-shot"]
    assert delta["high"] < 0 and delta["value"] == pytest.approx(
        shots["noisy"]["pets 8-shot"]["value"] - shots["base"]["pets 8-shot"]["value"]
    )
    np.savez(tmp_path / "noisy" / "pets_test.npz", features=test["features"], labels=test["labels"][::-1])
    with pytest.raises(SystemExit, match="not of the same images: their labels differ"):
        evaluate.transfer("knn", inputs, ["pets"], [5], "", 0, "top1", [], 0, 50, 0, "cpu")
    with pytest.raises(SystemExit, match="no SET_test.npz"):
        evaluate.transfer("knn", [str(tmp_path)], [], [5], "", 0, "top1", [], 0, 50, 0, "cpu")


def test_knn_of_several_labels(tmp_path):
    """A neighbour votes for each of its labels, not for difficult ones (-1): the mean of 11-point APs is 1."""
    x = np.eye(4).repeat(3, 0) + 0.01
    labels = np.array([[1, 0, 1], [0, 1, 0], [1, 1, -1], [0, 0, 1]]).repeat(3, 0)
    np.savez(tmp_path / "a.npz", features=x, labels=labels)
    rows = evaluate.transfer("knn", [str(tmp_path / "a.npz")] * 2, [], [3], "", 0, "top1", [], 0, 5, 0, "cpu")["rows"]
    assert rows["model"]["a k=3"]["value"] == 1
    part = {"features": x, "labels": labels}
    votes = evaluate.knn_scores(part, {"features": x[:1], "labels": labels[:1]}, 3, 3, "cpu")[0]
    assert votes[1] == 0 and votes[0] == votes[2] > 0


def test_few_shots_of_several_labels(tmp_path):
    """Two positives of each label are enough here, where each is a direction of its own; draws hang on the seed."""
    rng = np.random.default_rng(0)
    labels = (rng.random((200, 4)) < 0.3).astype(int)
    x = labels @ (4 * np.eye(4, 8)) + 0.3 * rng.normal(size=(200, 8))
    for name, rows in (("train", slice(120)), ("test", slice(120, None))):
        np.savez(tmp_path / f"{name}.npz", features=x[rows], labels=labels[rows])
    files = [str(tmp_path / f"{name}.npz") for name in ("train", "test")]
    rows = evaluate.transfer("fewshot", files, [], [], "", 1.0, "top1", [1, 8], 3, 0, 0, "cpu")["rows"]["model"]
    one, eight = rows["test 1-shot"], rows["test 8-shot"]
    assert 0.5 < one["value"] < eight["value"] and eight["value"] > 0.9 and one["low"] < one["value"] < one["high"] <= 1


def test_dinos_probe_is_this_one():
    """The same features and strength: dino_laionet.py's weights give the scores of `probe`; its decay is 1 / (C n)."""
    digits = load_digits()
    x, y = torch.from_numpy(digits.data[:600]).float(), digits.target[:600]
    x = torch.cat([(x - x.mean(0)) / x.std(0).clamp_min(1e-6), torch.ones(600, 1)], 1)
    theirs = x @ dino.fit_logistic(x, torch.from_numpy(y), 10, 1e-2, None)
    model = evaluate.Logistic(x[:, :-1].numpy(), y, 10, "cpu")
    model.fit(1 / (1e-2 * 600))
    ours = torch.from_numpy(model.scores(x[:, :-1].numpy()))
    centred = [s - s.mean(1, keepdim=True) for s in (theirs, ours)]
    assert (centred[0] - centred[1]).abs().max() < 0.02 * centred[1].abs().max()
    assert (theirs.argmax(1) == ours.argmax(1)).all()


def test_validation_images(tmp_path):
    """The test's are refused; a class that only they have is one of the classes."""
    rng = np.random.default_rng(0)
    for name, C in (("train", 3), ("val", 4), ("test", 3)):
        np.savez(tmp_path / f"{name}.npz", features=rng.normal(size=(24, 5)), labels=np.arange(24) % C)
    train, val, test = (str(tmp_path / f"{name}.npz") for name in ("train", "val", "test"))
    rows = evaluate.transfer("knn", [train, val, test], [], [3], "", 0, "top1", [], 0, 10, 0, "cpu")["rows"]
    assert 0 <= rows["model"]["test k=3"]["value"] <= 1
    with pytest.raises(SystemExit, match="hold the same images"):
        evaluate.transfer("knn", [train, test, test], [], [3], "", 0, "top1", [], 0, 10, 0, "cpu")
    with np.load(test) as file:  # some of them, in another order and precision, are the same images
        np.savez(val, features=file["features"][20:3:-1].astype(np.float16), labels=file["labels"][20:3:-1])
    with pytest.raises(SystemExit, match="hold the same images"):
        evaluate.transfer("knn", [train, val, test], [], [3], "", 0, "top1", [], 0, 10, 0, "cpu")


def test_knn_by_hand_and_by_scikit_learn(digits):
    """Similarities .9 (A), .85, .8 (B): A wins although B has the majority."""
    angles = np.arccos([0.9, 0.85, 0.8])
    train = {"features": np.stack([np.cos(angles), np.sin(angles)], 1), "labels": np.array([0, 1, 1])}
    votes = evaluate.knn_scores(train, {"features": np.array([[1.0, 0]]), "labels": [0]}, 2, 5, "cpu")[0]
    np.testing.assert_allclose(votes / votes[0], [1, 0.4895 + 0.2397], atol=1e-4)
    train, test = digits
    unit = [evaluate.unit_rows(p["features"]) for p in (train, test)]
    theirs = KNeighborsClassifier(20, weights=lambda d: np.exp((1 - d**2 / 2) / 0.07)).fit(unit[0], train["labels"])
    ours = evaluate.knn_scores(train, test, 10, 20, "cpu").argmax(1)
    assert (ours == theirs.predict(unit[1])).mean() > 0.998
    bank, queries = (torch.from_numpy(u).float() for u in unit)
    votes = dino.knn_votes(bank, torch.from_numpy(train["labels"]), queries, 10).numpy()  # the training script's
    scores = evaluate.knn_scores(train, test, 10, 20, "cpu")
    np.testing.assert_allclose(votes / votes.sum(1, keepdims=True), scores / scores.sum(1, keepdims=True), atol=1e-4)


def test_average_precision_by_hand():
    """Labels 1 0 1 0 by falling score: (6 + 5 x 2/3) / 11; labels 0 1: .5, not the .5455 of a free precision of 1."""
    one = np.ones((1, 4))
    scores = np.array([4.0, 3, 2, 1])
    assert evaluate.average_precision(scores, np.array([1, 0, 1, 0]), one)[0] == pytest.approx(0.848485, abs=1e-6)
    assert evaluate.average_precision(scores[:2], np.array([0, 1]), one[:, :2])[0] == pytest.approx(0.5)
    assert evaluate.average_precision(scores, np.array([1, -1, 1, 0]), one)[0] == pytest.approx(1)
    assert np.isnan(evaluate.average_precision(scores, np.array([0, 0, 0, 0]), one)[0])
    tied = [evaluate.average_precision(np.ones(4), np.array(y), one)[0] for y in ([1, 0, 0, 1], [0, 0, 1, 1])]
    assert tied == pytest.approx([0.5, 0.5])  # whatever their order
    twice = evaluate.average_precision(scores, np.array([1, 0, 1, 0]), np.array([[2, 0, 1, 1]]))[0]
    repeated = evaluate.average_precision(np.array([4.0, 4, 2, 1]), np.array([1, 1, 1, 0]), one)[0]
    assert twice == pytest.approx(repeated)  # a weight is a number of copies


def test_per_class_metric():
    scores, labels = np.eye(3)[[0, 0, 1, 1, 0]], np.array([0, 0, 0, 1, 2])
    draws = evaluate.transfer_metric(scores, labels, "per_class", 10, 0)
    assert draws[0] == pytest.approx([2 / 3, 1, 0])
    assert evaluate.mean_of_classes(draws, labels)[0] == pytest.approx((2 / 3 + 1 + 0) / 3)
    wider = np.pad(scores, [(0, 0), (0, 2)])  # a model that knows two more classes: the same numbers, so a difference
    assert np.array_equal(evaluate.transfer_metric(wider, labels, "per_class", 10, 0), draws)
    assert evaluate.transfer_metric(scores, labels, "top1", 10, 0)[0] == pytest.approx(3 / 5)
    assert (
        evaluate.metric_of("Pets", labels, "auto") == "per_class"
        and evaluate.metric_of("dtd", labels, "auto") == "top1"
    )


def test_retrieval_by_hand():
    """Images x captions [[.9, .2, .8, .1], [.3, .6, .5, .7]]: R@1 1.0 from images, .5 from texts."""
    scores, owner = np.array([[0.9, 0.2, 0.8, 0.1], [0.3, 0.6, 0.5, 0.7]], np.float32), np.array([0, 0, 1, 1])
    images, texts = np.eye(2, 6, dtype=np.float32), np.zeros((4, 6), np.float32)
    texts[:, :2], texts[range(4), range(2, 6)] = scores.T, np.sqrt(1 - (scores**2).sum(0))
    i2t, t2i = evaluate.retrieval_ranks(images, texts, owner, "cpu")
    assert i2t.tolist() == [0, 0] and t2i.tolist() == [0, 1, 1, 0]


def test_retrieval_equals_clips_and_a_slow_loop():
    rng = np.random.default_rng(0)
    owner = rng.permutation(np.r_[np.arange(300), rng.integers(300, size=500)])
    images = rng.normal(size=(300, 16))
    texts = images[owner] + 1.5 * rng.normal(size=(800, 16))
    images, texts = (torch.nn.functional.normalize(torch.from_numpy(v).float(), dim=1) for v in (images, texts))
    expected = clip.retrieval_metrics(images, texts, owner)
    i2t, t2i = evaluate.retrieval_ranks(images.numpy(), texts.numpy(), owner, "cpu")
    for k in (1, 5, 10):
        assert (expected[f"i2t_r{k}"], expected[f"t2i_r{k}"]) == pytest.approx(((i2t < k).mean(), (t2i < k).mean()))
    scores = (images.double() @ texts.double().T).numpy()
    for i in range(0, 300, 50):
        assert i2t[i] == (scores[i, owner != i] >= scores[i, owner == i].max()).sum()
    same = np.ones((5, 4), np.float32) / 2
    i2t, t2i = evaluate.retrieval_ranks(same, same, np.arange(5), "cpu")
    assert i2t.tolist() == t2i.tolist() == [4] * 5  # a constant model is last


def test_retrieval_counts_images_that_have_a_text(tmp_path):
    """As clip.py writes it, where a row that repeats an image has no text of its own: image_ids is the first row."""
    for name, ids in ("a", [0, 2]), ("b", [0, 3]):
        arrays = dict(features=np.eye(3, 2), text_features=np.ones((2, 2)), image_ids=np.array(ids))
        np.savez(tmp_path / f"{name}.npz", **arrays)
    result = evaluate.retrieval([str(tmp_path / "a.npz")], [1], 10, 0, "cpu")
    row = next(iter(result["rows"].values()))
    assert row["images"] == 2 and row["i2t median rank"]["low"] <= row["i2t median rank"]["value"]
    with pytest.raises(SystemExit, match="row of each text's image"):
        evaluate.retrieval([str(tmp_path / "b.npz")], [1], 10, 0, "cpu")


def test_ece_by_hand():
    """Confidences .95 (right), .95 (wrong), .55 (right), 10 bins: .45; a confidence of 1 is in the last bin."""
    confidence, right = np.array([0.95, 0.95, 0.55]), np.array([1.0, 0, 1])
    bins = evaluate.calibration_bins(confidence, 10, False)
    assert evaluate.calibration_error(bins, confidence, right, 0, np.random.default_rng(0))["value"] == pytest.approx(
        0.45
    )
    assert evaluate.calibration_bins(np.array([0.1, 0.100001, 1.0]), 10, False).tolist() == [0, 1, 9]
    assert evaluate.calibration_bins(np.array([0.5, 0.9, 0.1, 0.7]), 2, True).tolist() == [0, 1, 0, 1]


def test_temperature_by_hand(tmp_path):
    """Margin 2, 75 % right: T = 2 / ln 3; all right: the lower end; the argmax does not change."""
    logits, labels = np.tile([2.0, 0], (4, 1)), np.array([0, 0, 0, 1])
    assert evaluate.fit_temperature(logits, labels) == pytest.approx(2 / np.log(3), rel=1e-5)
    assert evaluate.fit_temperature(logits, np.zeros(4, int)) < 0.05
    rng = np.random.default_rng(0)
    labels = rng.integers(5, size=4000)
    logits = 3 * (rng.normal(size=(4000, 5)) + 1.5 * np.eye(5)[labels])
    np.savez(tmp_path / "a.npz", labels=labels, logits=logits)
    row = next(iter(evaluate.calibration([str(tmp_path / "a.npz")], 15, 0.5, 100, 0)["rows"].values()))
    found = row["temperature"]  # the true log odds are 1.5 times the logits before the 3
    assert found["low"] < 2 < found["high"] and found["value"] == pytest.approx(2, rel=0.1)
    assert row["ece at T"]["value"] < 0.03 < row["ece"]["low"] and row["nll at T"]["high"] < row["nll"]["low"]


def test_temperatures_of_resamples_are_refitted_ones():
    """One Newton step from the fit against a fit of every resample: the same spread and ends, to 5 %."""
    rng = np.random.default_rng(0)
    labels = rng.integers(5, size=800)
    logits = 3 * (rng.normal(size=(800, 5)) + 1.5 * np.eye(5)[labels])
    fitted = evaluate.fit_temperature(logits, labels)
    draws = evaluate.temperature_draws(logits, labels, fitted, 200, np.random.default_rng(1))
    same = np.random.default_rng(1).integers(800, size=(200, 800))
    refitted = np.array([evaluate.fit_temperature(logits[i], labels[i]) for i in same])
    np.testing.assert_allclose(draws, refitted, rtol=0.05)
    assert draws.std() == pytest.approx(refitted.std(), rel=0.05)


class Peak:
    """Right on most images at a strength of 10^1.3; both grids have 10^1.25."""

    def fit(self, C):
        self.exponent = -np.log10(C)

    def scores(self, x):
        return np.stack([np.abs(self.exponent - 1.3) < x[:, 0], np.full(len(x), 0.5)], 1)


@pytest.mark.parametrize("protocol", ["clip", "transfer"])
def test_sweep_finds_the_peak(protocol):
    val = {"features": np.linspace(0, 10, 1001)[:, None], "labels": np.zeros(1001, int)}
    assert evaluate.sweep_strength(protocol, Peak(), val, "top1") == pytest.approx(10**-1.25)


@pytest.mark.parametrize("has_val", [True, False])
def test_probe_holds_out_of_train_and_refits_on_all(digits, monkeypatch, has_val):
    """The strength is chosen on val, or on a part of train, and the model of the scores is that of both."""
    (train, test), seen = digits, []
    monkeypatch.setattr(
        evaluate, "sweep_strength", lambda p, model, val, _: seen.append((model.n, len(val["labels"]))) or 0.01
    )
    a, b = ({k: v[part] for k, v in train.items()} for part in (slice(600), slice(600, None)))
    parts = (a, b) if has_val else (train, None)
    scores, _ = evaluate.probe_scores(*parts, train, test, 10, "clip", 0.0, "top1", 0, "cpu")
    model = evaluate.Logistic(train["features"], train["labels"], 10, "cpu")
    model.fit(0.01)
    assert sum(seen[0]) == 1200 and 0 < seen[0][1] < 1200
    np.testing.assert_allclose(scores, model.scores(test["features"]), rtol=1e-4, atol=1e-5)


def test_so_many_images_of_each_class(monkeypatch):
    part, seen, fit = {"features": np.eye(14), "labels": np.repeat([0, 1, 2], [9, 4, 1])}, [], evaluate.Logistic
    monkeypatch.setattr(
        evaluate, "Logistic", lambda x, y, *more: seen.append(np.bincount(y).tolist()) or fit(x, y, *more)
    )
    evaluate.few_shot(part, part, 3, 2, 1.0, "top1", 0, "cpu")
    assert seen == [[2, 2, 1]]


def test_map_is_over_the_classes_with_positives():
    """One class is ranked perfectly, the other has no positive image: 1, not .5."""
    scores, labels = np.array([[3.0, 1], [2, 2], [1, 3]]), np.array([[1, 0], [0, 0], [0, -1]])
    assert evaluate.transfer_metric(scores, labels, "map", 0, 0)[0] == 1


class Flat:
    """Right on half of the images at every strength."""

    def fit(self, C):
        pass

    def scores(self, x):
        return np.eye(2)[np.zeros(len(x), int)]


@pytest.mark.parametrize("protocol", ["clip", "transfer"])
def test_among_equals_the_weakest_regularisation(protocol):
    """lambda = 1e-6, the end of both grids."""
    val = {"features": np.zeros((10, 1)), "labels": np.arange(10) % 2}
    assert evaluate.sweep_strength(protocol, Flat(), val, "top1") == pytest.approx(1e6)


def test_sets_with_a_mean_per_class():
    """CLIP, appendix A.3, of the sets that are read here: by the beginning of their names."""
    found = {name: evaluate.metric_of(name, np.zeros(2, int), "auto")
             for name in ("aircraft", "caltech101", "flowers102", "Pets", "cars", "cifar10", "food", "sun397")}  # fmt: skip
    assert [name for name, metric in found.items() if metric == "per_class"] == ["aircraft", "caltech101", "flowers102", "Pets"]


@pytest.mark.parametrize("command", ["probe", "knn", "fewshot"])
def test_validation_images_are_trained_on_too(tmp_path, command):
    """A class that only they have is found."""
    for name, classes, shift in ("train", [0, 1], 0.0), ("val", [2], 0.01), ("test", [0, 1, 2], 0.02):
        labels = np.repeat(classes, 6)
        features = 3 * np.eye(3)[labels] + shift + 0.1 * np.random.default_rng(0).normal(size=(len(labels), 3))
        np.savez(tmp_path / f"{name}.npz", features=features, labels=labels)
    files = [str(tmp_path / f"{name}.npz") for name in ("train", "val", "test")]
    ks, shots = [3] * (command == "knn"), [4] * (command == "fewshot")
    found = evaluate.transfer(command, files, [], ks, "none", 1.0, "top1", shots, 2, 0, 0, "cpu")["rows"]["model"]
    assert [entry["value"] for entry in found.values()] == [1]


def test_half_of_the_rows_are_the_same_images():
    rows = np.random.default_rng(0).normal(size=(20, 3))
    assert evaluate.share_rows(rows[:10], rows[5:]) and not evaluate.share_rows(rows[:10], rows[6:])
    assert not evaluate.share_rows(rows[:1], rows)


def test_retrieval_that_is_always_right(tmp_path):
    """The median rank begins at 1; images have 1 to 7 texts, and a recall of 1 is one in every resample."""
    owner = np.repeat(np.arange(4), [7, 1, 1, 3])
    np.savez(tmp_path / "a.npz", features=np.eye(4), text_features=np.eye(4)[owner], image_ids=owner)
    (row,) = evaluate.retrieval([str(tmp_path / "a.npz")], [1], 50, 0, "cpu")["rows"].values()
    for way in "i2t", "t2i":
        assert row[f"{way} median rank"] == {"value": 1, "low": 1, "high": 1}
        assert row[f"{way}_r1"] == evaluate.clopper_pearson(1, 4)


def test_temperature_takes_its_fraction_and_likelihoods_are_in_nats(tmp_path):
    """A tenth of 1,000 images, to four standard deviations; PyTorch's cross-entropy; of four equal logits ln 4."""
    rng, labels = np.random.default_rng(0), np.arange(1000) % 4
    logits = rng.normal(size=(1000, 4)) + np.eye(4)[labels]
    np.savez(tmp_path / "a.npz", labels=labels, logits=logits)
    (row,) = evaluate.calibration([str(tmp_path / "a.npz")], 15, 0.1, 0, 0)["rows"].values()
    assert row["n"] == pytest.approx(900, abs=38)
    top, nll = evaluate.confidence_of(logits, labels, 2.0)
    expected = torch.nn.functional.cross_entropy(torch.from_numpy(logits / 2), torch.from_numpy(labels), reduction="none")
    np.testing.assert_allclose(nll, expected, atol=1e-12)
    top, nll = evaluate.confidence_of(np.zeros((1, 4)), np.zeros(1, int), 1.0)
    assert (top[0], nll[0]) == pytest.approx((0.25, np.log(4)))


def test_difficult_images_are_no_shots(monkeypatch):
    """Of several labels, images are drawn that have one: the first and the last of six."""
    part = {"features": np.eye(6), "labels": np.array([[1, -1, -1, 0, -1, 1]]).T}
    seen, fit = [], evaluate.Logistic
    monkeypatch.setattr(evaluate, "Logistic", lambda x, y, *more: seen.append(x.argmax(1).tolist()) or fit(x, y, *more))
    evaluate.few_shot(part, part, 1, 2, 1.0, "map", 0, "cpu")
    assert seen == [[0, 5]]


def test_the_seed_draws_the_splits(tmp_path, monkeypatch):
    """A fifth of train for the probe's strength, and the images of the temperature: others with another seed."""
    rng, seen = np.random.default_rng(0), []
    labels = np.arange(400) % 2
    part = {"path": "x", "features": rng.normal(size=(400, 2)), "labels": labels}
    monkeypatch.setattr(evaluate, "sweep_strength", lambda p, model, val, _: seen.append(val["features"][:, 0]) or 1.0)
    for seed in 0, 0, 1:
        evaluate.probe_scores(part, None, part, part, 2, "clip", 0.0, "top1", seed, "cpu")
    assert np.array_equal(seen[0], seen[1]) and not np.isin(seen[2], seen[0]).all()
    assert len(seen[0]) == pytest.approx(80, abs=32)  # four standard deviations
    np.savez(tmp_path / "a.npz", labels=labels, logits=part["features"] + np.eye(2)[labels])
    fits = [next(iter(evaluate.calibration([str(tmp_path / "a.npz")], 9, 0.5, 0, seed)["rows"].values()))["temperature"]
            for seed in (0, 0, 1)]  # fmt: skip
    assert fits[0] == fits[1] != fits[2]


def test_the_mean_over_sets_weighs_them_equally(tmp_path):
    """Right on all of 4 images and on half of 40: .75."""
    for name, n, wrong in ("a", 4, 0), ("b", 40, 20):
        labels = np.arange(n) % 2
        shown = np.where(np.arange(n) < wrong, 1 - labels, labels)
        for part, x in ("train", labels), ("test", shown):
            np.savez(tmp_path / f"{name}_{part}.npz", features=np.eye(2)[x], labels=labels)
    row = evaluate.transfer("probe", [str(tmp_path)], [], [], "none", 1.0, "top1", [], 0, 0, 0, "cpu")["rows"][tmp_path.name]
    assert [row[k]["value"] for k in ("a", "b", "mean")] == [1, 0.5, 0.75]


def test_difficult_neighbours_do_not_vote():
    """Both neighbours at cosine 1, one with a label, of the other it is difficult: the vote is exp(1 / .07)."""
    x = np.array([[1.0, 0], [1, 0]])
    votes = evaluate.knn_scores({"features": x, "labels": np.array([[1, 1], [0, -1]])}, {"features": x[:1]}, 2, 2, "cpu")
    np.testing.assert_allclose(votes, np.exp([[1 / 0.07] * 2]), rtol=1e-5)


def test_clips_sweep_ends_at_eight_steps_a_decade():
    class Other(Peak):
        def scores(self, x):
            return np.stack([np.abs(self.exponent - 1.4) < x[:, 0], np.full(len(x), 0.5)], 1)

    val = {"features": np.linspace(0, 10, 1001)[:, None], "labels": np.zeros(1001, int)}
    assert evaluate.sweep_strength("clip", Other(), val, "top1") == pytest.approx(10**-1.375)


def test_temperatures_reach_a_hundred():
    """Logits times 40 have 40 times the temperature."""
    rng = np.random.default_rng(0)
    labels = rng.integers(5, size=500)
    logits = rng.normal(size=(500, 5)) + np.eye(5)[labels]
    t = evaluate.fit_temperature(logits, labels)
    assert t > 0.5 and evaluate.fit_temperature(40 * logits, labels) == pytest.approx(40 * t, rel=1e-4)


def test_reliability_has_bins_of_equal_width(tmp_path):
    """Confidence .95 in nine of ten images, .55 in the others: two bins, with as many images."""
    sure = np.arange(400) % 10 > 0
    logits = np.stack([np.log(np.where(sure, 0.95, 0.55)), np.log(np.where(sure, 0.05, 0.45))], 1)
    labels = (np.arange(400) % 20 == 0).astype(int)
    np.savez(tmp_path / "a.npz", logits=logits, labels=labels)
    found = evaluate.calibration([str(tmp_path / "a.npz")], 10, 0.5, 0, 0)
    (row,), curve = found["rows"].values(), next(iter(found["curves"].values()))
    assert [b["confidence"]["value"] for b in curve] == pytest.approx([0.55, 0.95])
    assert sum(b["n"] for b in curve) == row["n"] and curve[1]["accuracy"]["value"] == 1


def test_a_plot_of_one_model_is_in_percent(monkeypatch):
    pytest.importorskip("matplotlib")
    seen = []
    monkeypatch.setattr(evaluate, "save_figure", lambda figure, *_: seen.append(figure.axes[0]))
    cells = {"rows": {"m": {"a": {"value": 0.5, "low": 0.4, "high": 0.7}}}}
    evaluate.plot_transfer(cells, "a.svg")
    assert seen[0].get_ylabel() == "m (%)" and seen[0].containers[0].lines[0].get_ydata() == pytest.approx([50])
    assert seen[0].containers[0].lines[2][0].get_segments()[0][:, 1] == pytest.approx([40, 70])


def test_shared_captions_of_a_constant_model_are_last():
    """All scores are equal: an image's rank is its number of wrong texts, a text's that of wrong images."""
    images, texts = np.tile(np.float32([0.6, 0.8]), (3, 1)), np.tile(np.float32([0.6, 0.8]), (4, 1))
    i2t, t2i = evaluate.shared_ranks(images, texts, np.array([0, 0, 1, 2]), np.array([0, 1, 0, 2]), "cpu")
    assert i2t.tolist() == [1, 2, 3] and t2i.tolist() == [1, 2, 1, 2]
