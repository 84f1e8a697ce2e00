"""evaluate.py: estimates, imbalance, compare, robustness; against scipy, clip.py and hand numbers."""

import json

import numpy as np
import pytest
from scipy import stats
from scipy.special import expit, logit

import clip
import evaluate


def test_rank_correlation_by_hand_and_by_scipy():
    """n = (10, 5, 5, 0), a = (.9, .5, .7, .1): .948683 (average ranks); rows equal scipy's."""
    assert evaluate.rank_correlation(np.array([10, 5, 5, 0]), np.array([0.9, 0.5, 0.7, 0.1])) == pytest.approx(
        0.948683, abs=1e-6
    )
    rng = np.random.default_rng(0)
    x, y = rng.integers(5, size=(20, 30)), rng.normal(size=(20, 30))
    expected = [stats.spearmanr(a, b).statistic for a, b in zip(x, y)]
    np.testing.assert_allclose(evaluate.rank_correlations(x, y), expected, atol=1e-12)
    x[3] = 1
    assert np.isnan(evaluate.rank_correlations(x, y)[3])
    assert evaluate.rank_correlation(x[3], y[3]) is None


def test_gini_by_hand():
    assert evaluate.gini([0, 1, 3]) == pytest.approx(0.5)
    assert evaluate.gini([2, 2, 2]) == 0
    assert np.isnan(evaluate.gini([0, 0]))
    values = np.random.default_rng(0).random((3, 9))
    slow = [np.abs(v[:, None] - v[None]).mean() / (2 * v.mean()) for v in values]
    np.testing.assert_allclose(evaluate.gini(values), slow, atol=1e-12)


@pytest.mark.parametrize("k, n", [(5, 10), (0, 50), (50, 50), (1, 1), (733, 1000)])
def test_clopper_pearson_equals_scipy(k, n):
    entry = evaluate.clopper_pearson(k / n, n)
    exact = stats.binomtest(k, n).proportion_ci(method="exact")
    assert (entry["low"], entry["high"]) == pytest.approx((exact.low, exact.high), abs=1e-12)
    assert evaluate.clopper_pearson(0.5, np.nan) == {"value": 0.5, "low": None, "high": None}


def make(n=2000, C=30, bias=1.0, seed=0):
    rng = np.random.default_rng(seed)
    counts = np.sort(rng.integers(0, 3000, C))[::-1].copy()
    counts[-2:] = 0
    labels = rng.integers(C, size=n)
    logits = rng.normal(size=(n, C)) + 2 * np.eye(C)[labels] + bias * np.log(counts + 1) / 8
    return {"path": "x", "n_classes": C, "labels": labels, "logits": logits.astype(np.float16), "class_counts": counts}


def test_imbalance_metrics_are_clips():
    """The table of the training scripts and this one: the same numbers; K = [[3, 1], [2, 2]]: top-1 and balanced .625."""
    data = make(n=200, C=40)  # some classes without test images
    row = evaluate.score_classes(data, (100, 20), 0, 10, 0, 0)[0]
    expected = clip.imbalance_metrics(data["logits"].argmax(1), data["labels"], data["class_counts"])
    assert row["chance"] == expected.pop("chance") and row["n"] == expected.pop("n")
    assert {key: row[key]["value"] for key in expected} == pytest.approx(expected, abs=1e-12)
    predictions, labels = np.array([0, 0, 0, 1, 0, 0, 1, 1]), np.array([0, 0, 0, 0, 1, 1, 1, 1])
    data = {"labels": labels, "predictions": predictions, "n_classes": 2, "class_counts": np.array([5, 1])}
    row = evaluate.score_classes(data, (100, 20), 0, 10, 0, 0)[0]
    assert row["top1"]["value"] == row["balanced"]["value"] == 0.625


def test_groups_zero_counts_and_worst():
    data = make()
    row, classes = evaluate.score_classes(data, (100, 20), 5, 3, 200, 0)
    predictions, labels = data["logits"].argmax(1), data["labels"]
    per_class = np.array([(predictions[labels == c] == c).mean() for c in range(30)])
    np.testing.assert_allclose(classes["accuracy"], per_class)
    assert row["worst 3"]["value"] == pytest.approx(np.sort(per_class)[:3].mean())
    assert row["head"]["value"] == pytest.approx(per_class[:10].mean())
    assert row["never seen"]["value"] == pytest.approx(per_class[-2:].mean())
    assert row["many >100"]["value"] == pytest.approx(per_class[data["class_counts"] > 100].mean())
    rarest = np.argsort(data["class_counts"], kind="stable")[:5]
    assert row["5 rarest"]["value"] == pytest.approx(per_class[rarest].mean())
    assert row["gini_counts"]["value"] == pytest.approx(float(evaluate.gini(data["class_counts"])))
    assert classes["predictions"].sum() == len(labels)
    for c in (0, 10, 29):
        n, k = (labels == c).sum(), (predictions[labels == c] == c).sum()
        exact = stats.binomtest(k, n).proportion_ci(0.95, "exact")
        assert classes["accuracy_interval"][c] == pytest.approx([exact.low, exact.high])
    low, high = classes["predictions_interval"].T
    assert (low <= classes["predictions"]).mean() > 0.9 and (high > low).mean() > 0.9
    for key, entry in row.items():
        if isinstance(entry, dict) and entry["low"] is not None:
            assert entry["low"] <= entry["value"] <= entry["high"], key


def test_binned_statistics():
    counts = np.array([0, 1, 10, 11, 100, 1000])
    assert evaluate.frequency_bins(counts, 3, False).tolist() == [-1, 0, 1, 1, 2, 2]
    assert evaluate.frequency_bins(counts, 3, True).tolist() == [0, 0, 1, 1, 2, 2]
    accuracy = np.array([0, 0.2, 0.4, 0.6, 0.8, np.nan])
    rows = evaluate.binned_statistics(
        np.array([0, 0, 1, 1, 2, 2]), counts, accuracy, accuracy, 20, np.random.default_rng(0)
    )
    assert [b["accuracy"]["value"] for b in rows] == pytest.approx([0.1, 0.5, 0.8])
    assert [b["accuracy_std"]["value"] for b in rows] == pytest.approx([0.1, 0.1, 0])
    assert all(b["accuracy_std"]["low"] <= b["accuracy_std"]["value"] <= b["accuracy_std"]["high"] for b in rows[:2])
    assert {b["low"] for b in (rows[2]["accuracy"], rows[2]["accuracy_std"])} == {None}, "of one class nothing varies"
    assert [b["count"] for b in rows] == [0.5, 10.5, 550]


def test_interval_of_top1_covers_as_the_binomial_law_says():
    """Bootstrap standard deviation against sqrt(p (1 - p) / n): 4 % is three standard errors of 3,000 draws. Within
    classes the p are the classes' own."""
    data = make()
    right = data["logits"].argmax(1) == data["labels"]
    n_test, n_right, n_predicted = evaluate.resample_images(
        data["labels"], data["logits"].argmax(1), 30, 3000, np.random.default_rng(0)
    )
    p, own = right.mean(), n_right[0] / n_test
    assert (n_right.sum(1)).std() == pytest.approx(np.sqrt((n_test * own * (1 - own)).sum()), rel=0.04)
    assert n_test.sum() == 2000 and (n_predicted.sum(1) == 2000).all()
    draws = evaluate.bootstrap(right.astype(float), 3000, np.random.default_rng(0))
    assert draws.std() == pytest.approx(np.sqrt(p * (1 - p) / 2000), rel=0.04)


@pytest.mark.parametrize("n", [2, 3, 10])
def test_interval_of_a_class_mean_has_the_width_of_new_images(n):
    """60 classes of n images, right with p = .6: the variance of the mean is p (1 - p) / (60 n), which resampling within
    classes alone understates n / (n - 1) times; 6 % is three standard errors of 40 simulations."""
    rng, variances = np.random.default_rng(0), []
    for _ in range(40):
        labels = np.repeat(np.arange(60), n)
        predictions = np.where(rng.random(60 * n) < 0.6, labels, 60)
        n_test, n_right, _ = evaluate.resample_images(labels, predictions, 61, 400, rng)
        variances.append(evaluate.class_mean(evaluate.ratio(n_right, n_test), n_test)[1:].var())
    assert np.mean(variances) == pytest.approx(0.24 / (60 * n), rel=0.06)


def test_single_images_vary_as_the_others_do():
    """20 classes of one image among 40 of three, all right with p = .6: variance (20 + 40 / 3) p (1 - p) / 60^2."""
    rng, variances, n = np.random.default_rng(0), [], np.repeat([3, 1], [40, 20])
    for _ in range(60):
        labels = np.repeat(np.arange(60), n)
        predictions = np.where(rng.random(len(labels)) < 0.6, labels, 60)
        n_test, n_right, _ = evaluate.resample_images(labels, predictions, 61, 400, rng)
        variances.append(evaluate.class_mean(evaluate.ratio(n_right, n_test), n_test)[1:].var())
    assert np.mean(variances) == pytest.approx((20 + 40 / 3) * 0.24 / 60**2, rel=0.06)


def test_interval_of_a_mean_of_few_small_classes_covers_it():
    """10 classes of 2 to 5 images, most of them right: percentiles alone cover the mean of the p in 86 % of simulations,
    with the t quantile in 94 %; 300 simulations have a standard error of 1.4 %."""
    rng, inside = np.random.default_rng(0), []
    for _ in range(300):
        n, p = rng.integers(2, 6, size=10), rng.beta(8, 1, size=10)
        right = rng.binomial(n, p)
        draws = np.concatenate([right[None], rng.binomial(n, right / n, size=(200, 10))]) / n
        entry = evaluate.from_draws(evaluate.class_mean(draws, n).clip(0, 1), n_images=n.sum())
        if entry["low"] is not None:  # else each class is all right or all wrong
            inside.append(entry["low"] <= p.mean() <= entry["high"])
    assert 0.91 <= np.mean(inside) <= 0.99 and len(inside) > 290, np.mean(inside)
    many = np.concatenate([np.full((1, 400), 0.5), rng.binomial(50, 0.5, size=(400, 400)) / 50])
    widened = evaluate.class_mean(many, np.full(400, 50))[1:].std() / many[1:].mean(1).std()
    assert widened == pytest.approx(np.sqrt(50 / 49), rel=2e-3)  # many classes: no more than n / (n - 1)


def test_classes_of_one_image_have_no_interval():
    data = {"labels": np.array([0, 1]), "predictions": np.array([0, 0]), "n_classes": 2, "class_counts": np.ones(2)}
    row = evaluate.score_classes(data, (100, 20), 0, 1, 50, 0)[0]
    assert row["balanced"] == {"value": 0.5, "low": None, "high": None}


def test_interval_of_gini_covers_it():
    """40 classes of 10 images, 8 % of them mistaken for frequent classes: the Gini index of the expected predictions is
    inside in 85 % or more of 100 simulations (resampled across classes: in 5 %), the sample's own value in all."""
    rng, q, labels = np.random.default_rng(0), 0.85 ** np.arange(40), np.repeat(np.arange(40), 10)
    q, inside = q / q.sum(), []
    truth = float(evaluate.gini(0.92 / 40 + 0.08 * q))
    for _ in range(100):
        data = {"labels": labels, "n_classes": 40, "class_counts": np.arange(40)}
        data["predictions"] = np.where(rng.random(400) < 0.92, labels, rng.choice(40, 400, p=q))
        entry = evaluate.score_classes(data, (100, 20), 0, 10, 100, 0)[0]["gini_pred"]
        inside.append([entry["low"] <= v <= entry["high"] for v in (truth, entry["value"])])
    hits = np.sum(inside, 0)
    assert hits[0] >= 80 and hits[1] == 100, hits


def test_predictions_per_image_and_never_right_have_intervals(tmp_path):
    data = make(n=3000)
    np.savez(tmp_path / "a.npz", **{k: data[k] for k in ("labels", "logits", "class_counts")})
    result = evaluate.imbalance([str(tmp_path / "a.npz")], "", "", (100, 20), 0, 10, 5, False, 50, 0)
    ((model,), (row,)) = (part.values() for part in (result["models"], result["rows"]))
    low, high = model["predictions_per_image_interval"].T
    assert (low <= model["predictions_per_image"]).mean() > 0.9 and (low < high).all()
    np.testing.assert_allclose(low * np.bincount(data["labels"]), model["predictions_interval"][:, 0])
    assert row["never right"]["value"] == 0 and row["never right"]["high"] == pytest.approx(1 - 0.025 ** (1 / 30))


def test_biased_intervals_are_possible_values():
    """Reflected percentiles would be [-.2, 0] and [1, 1.3]: ends stay in 0..1 and hold the value."""
    for value, draws, ends in ((0.1, [0.2, 0.4], (0, 0.1)), (1.0, [0.7, 0.9], (1, 1)), (0.5, [0.4, 0.5], (0.5, 0.6))):
        entry = evaluate.estimate(value, np.repeat(draws, 100), biased_up_to=1)
        assert (entry["low"], entry["high"]) == pytest.approx(ends)
    data = make(n=300)
    row = evaluate.score_classes(data | {"labels": data["labels"] % 15}, (100, 20), 0, 10, 200, 0)[0]
    never = row["never right"]  # over classes: images alone can only add such
    assert never["low"] <= never["value"] <= never["high"]


def test_means_over_models(tmp_path):
    paths = []
    for seed in range(3):
        data = make(seed=seed) | {"class_counts": make()["class_counts"]}
        paths.append(str(tmp_path / f"{seed}.npz"))
        np.savez(paths[-1], **{k: data[k] for k in ("labels", "logits", "class_counts")})
    result = evaluate.imbalance(paths, "", "", (100, 20), 0, 10, 4, True, 10, 0)
    values = [m["bins"][1]["accuracy"]["value"] for m in result["models"].values()]
    mean, std = (result["bins_over_models"][1][key] for key in ("accuracy", "accuracy_std"))
    assert mean["value"] == pytest.approx(np.mean(values)) and std["value"] == pytest.approx(np.std(values, ddof=1))
    # t = 4.3027 with 2 degrees of freedom; chi-squared 7.3778 and .050636
    assert mean["high"] - mean["value"] == pytest.approx(4.3027 * std["value"] / 3**0.5, rel=1e-4)
    assert std["low"] == pytest.approx(std["value"] * (2 / 7.3778) ** 0.5, rel=1e-4)
    assert std["high"] == pytest.approx(std["value"] * (2 / 0.050636) ** 0.5, rel=1e-4)


@pytest.mark.parametrize("statistic", ["rank", "length"])
def test_jackknife_covers_lengths_and_ranks(statistic):
    """40 unit rows round a direction: the expected effective rank and resultant length of 40 such rows are inside in 88
    to 100 % of 200 simulations; percentiles of resampled rows hold the rank in none, since copies have no rank."""
    rng = np.random.default_rng(0)
    of = evaluate.effective_rank if statistic == "rank" else lambda rows: float(np.linalg.norm(rows.mean(0)))
    samples = [evaluate.unit_rows(rng.normal(size=(40, 12)) * 0.7 ** np.arange(12) + 0.5) for _ in range(200)]
    truth = np.mean([of(rows) for rows in samples])
    ends = [evaluate.jackknife(rows, of, rng) for rows in samples]
    covered = np.mean([e["low"] <= truth <= e["high"] for e in ends])
    assert 0.88 <= covered, covered
    assert np.mean([e["high"] - e["low"] for e in ends]) < 6 * np.std([of(rows) for rows in samples])
    many = evaluate.jackknife(np.concatenate(samples[:10]), of, rng)  # 400 rows: groups of four
    assert 0 < many["high"] - many["low"] < np.mean([e["high"] - e["low"] for e in ends])


def test_mean_of_independent_estimates():
    """Two means of 100 images each: the interval of their mean is that of the bootstrap of both, to 10 %."""
    rng = np.random.default_rng(0)
    sides = [(rng.random(400) < p).astype(float) for p in (0.5, 0.9)]
    found = evaluate.mean_of([evaluate.mean_over(side, 4000, rng) for side in sides])
    expected = evaluate.estimate(0, np.mean([evaluate.bootstrap(side, 4000, rng) for side in sides], 0))
    assert found["value"] == np.mean([side.mean() for side in sides])
    assert found["high"] - found["low"] == pytest.approx(expected["high"] - expected["low"], rel=0.1)
    assert found["low"] == pytest.approx(expected["low"], abs=0.005)
    alone = evaluate.mean_of([evaluate.estimate(0.5), evaluate.estimate(0.7, [0.6, 0.8])])
    assert alone == {"value": 0.6, "low": None, "high": None}


def test_compare_by_hand(tmp_path):
    """b = 10, c = 2: McNemar's exact p = .038574; a paired interval is narrower than an unpaired one."""
    labels = np.zeros(100, int)
    right_a, right_b = (
        np.arange(100) < 60,
        np.r_[np.arange(10) < 0, np.ones(50, bool), np.ones(2, bool), np.zeros(38, bool)],
    )
    paths = []
    for name, right in (("a", right_a), ("b", right_b)):
        logits = np.where(right[:, None], [1.0, 0], [0.0, 1])
        paths.append(str(tmp_path / f"{name}.npz"))
        np.savez(paths[-1], labels=labels, logits=logits, class_counts=[5, 3])
    result = evaluate.compare(paths[:1], paths[1:], "", 500, 0)
    assert result["mcnemar"]["pair 0"] == {
        "only A right": 10,
        "only B right": 2,
        "p": pytest.approx(0.038574, abs=1e-6),
    }
    entry = result["rows"]["top1"]["B - A"]
    assert entry["value"] == pytest.approx(-0.08) and -0.16 < entry["low"] < entry["high"] < 0
    same = evaluate.compare(paths[:1], paths[:1], "", 50, 0)
    assert same["mcnemar"]["pair 0"]["p"] == 1 and same["rows"]["top1"]["B - A"] == {"value": 0, "low": 0, "high": 0}


def test_compare_seeds_and_classes(tmp_path):
    names = {}
    for side, bias in (("a", 6.0), ("b", 0.0)):
        for seed in range(3):
            data = make(n=3000, bias=bias, seed=seed) | {"labels": make(n=3000)["labels"]}
            data["logits"] = make(n=3000, bias=bias, seed=0)["logits"] + np.random.default_rng(seed).normal(
                size=(3000, 30)
            )
            names.setdefault(side, []).append(str(tmp_path / f"{side}{seed}.npz"))
            np.savez(names[side][-1], labels=data["labels"], logits=data["logits"], class_counts=make()["class_counts"])
    rows = evaluate.compare(names["a"], names["b"], "", 300, 0)["rows"]
    assert rows["spearman_pred"]["B - A"]["high"] < 0  # the unbiased model follows frequency less
    assert rows["top1"]["seeds"]["low"] < rows["top1"]["B - A"]["value"] < rows["top1"]["seeds"]["high"]
    assert rows["tail"]["B - A"]["low"] > 0


def test_compare_takes_the_frequencies_of_each_side(tmp_path):
    data, paths = make(n=600), []
    for name, n in (("a", data["class_counts"]), ("b", data["class_counts"][::-1])):
        paths.append(str(tmp_path / f"{name}.npz"))
        np.savez(paths[-1], labels=data["labels"], logits=data["logits"], class_counts=n)
    row = evaluate.compare(paths[:1], paths[1:], "", 200, 0)["rows"]
    own = [evaluate.score_classes(data | {"class_counts": n}, (100, 20), 0, 10, 0, 0)[0]["spearman_pred"]["value"]
           for n in (data["class_counts"], data["class_counts"][::-1])]  # fmt: skip
    assert [row["spearman_pred"][side]["value"] for side in "AB"] == pytest.approx(own)
    assert row["spearman_pred"]["B - A"]["high"] < 0 == row["head"]["B - A"]["value"]  # the same thirds, A's
    same = evaluate.compare(paths[:1], paths[1:], str(write_counts(tmp_path)), 20, 0)["rows"]["spearman_pred"]["B - A"]
    assert same == {"value": 0, "low": 0, "high": 0}
    with pytest.raises(SystemExit, match="A has 1 seeds, B 2"):
        evaluate.compare(paths[:1], paths, "", 10, 0)


def test_compare_counts_predictions_of_all_classes(tmp_path):
    """Images of two classes of six; predictions go to all: value and interval are over the same six classes."""
    rng, counts, paths = np.random.default_rng(0), np.array([60, 50, 40, 30, 20, 10]), []
    for name, share in (("a", counts / counts.sum()), ("b", counts[::-1] / counts.sum())):
        paths.append(str(tmp_path / f"{name}.npz"))
        np.savez(paths[-1], labels=np.arange(300) % 2, predictions=rng.choice(6, 300, p=share), class_counts=counts)
    entry = evaluate.compare(paths[:1], paths[1:], "", 200, 0)["rows"]["spearman_pred"]["B - A"]
    assert entry["value"] == pytest.approx(-2, abs=0.2) and entry["low"] <= entry["value"] <= entry["high"]


def write_counts(folder):
    (folder / "counts.txt").write_text("\n".join(map(str, range(30))))
    return folder / "counts.txt"


def models_of(x, y, groups, n=np.nan):
    return [{"model": f"m{i}", "group": g, "s": (a, n, b, n)} for i, (a, b, g) in enumerate(zip(x, y, groups))]


def test_effective_robustness_by_hand():
    """u = 1, v = -.5, acc_id .6: expected .476384; at .55 the effective robustness is 7.36 points."""
    x = np.array([0.3, 0.5, 0.7, 0.6])
    y = np.r_[expit(logit(x[:3]) - 0.5), 0.55]
    result = evaluate.effective_robustness(models_of(x, y, "bbbc"), ["s"], "b", "m0", {}, 50, 0)
    assert result["rows"]["m3"]["s rho"]["value"] == pytest.approx(0.55 - 0.476384, abs=1e-6)
    fit = result["fits"]["s, b"]
    assert (fit["slope"]["value"], fit["intercept"]["value"], fit["r2"]["value"]) == pytest.approx((1, -0.5, 1))
    assert result["rows"]["m3"]["s tau"] == {"value": pytest.approx(0.55 - y[0]), "low": None, "high": None}  # no n
    with_n = evaluate.effective_robustness(models_of(x, y, "bbbc", 500), ["s"], "b", "m0", {}, 50, 0)["rows"]
    assert with_n["m3"]["s tau"]["low"] < 0.55 - y[0] < with_n["m3"]["s tau"]["high"]
    assert result["rows"]["m3"]["mean_rho"]["value"] == result["rows"]["m3"]["average rho"]["value"]


def test_fit_equals_linregress_and_two_pieces():
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=40), rng.normal(size=40)
    expected = stats.linregress(x, y)
    fit = evaluate.fit_lines(x, y, np.ones(40))
    assert fit == pytest.approx((expected.slope, expected.intercept, expected.rvalue**2), abs=1e-12)
    line = evaluate.Line(x, y, 0.2, 10, rng)
    right = stats.linregress(x[x >= 0.2], y[x >= 0.2])
    assert line.at(np.array([1.0]))[0] == pytest.approx(right.intercept + right.slope, abs=1e-12)
    assert np.isnan(evaluate.Line(np.ones(3), y[:3], np.inf, 5, rng).slope[0])  # identical x: null, not a number


def test_extreme_accuracies_need_the_number_of_images():
    assert evaluate.safe_logit(np.array([0.0, 0.25]), np.array([9.0, 9])) == pytest.approx(logit([0.05, 0.25]))
    with pytest.raises(SystemExit, match="pass --n"):
        evaluate.safe_logit(np.array([1.0]), np.array([np.nan]))


def test_interval_of_the_slope_covers_it():
    """A simulated testbed of 40 models with slope 1.1: 95 % intervals cover in 93 to 97 % of 1,000 simulations."""
    rng, hits = np.random.default_rng(0), 0
    for _ in range(1000):
        x = rng.uniform(-1, 2, 40)
        line = evaluate.Line(x, 1.1 * x - 0.4 + 0.15 * rng.normal(size=40), np.inf, 400, rng)
        entry = line.estimates()[0]["slope"]
        hits += entry["low"] <= 1.1 <= entry["high"]
    assert 930 <= hits <= 970, hits


def test_a_line_through_two_models_has_no_interval():
    x = np.array([0.3, 0.7, 0.6])
    result = evaluate.effective_robustness(models_of(x, x - 0.1, "bbc", 500), ["s"], "b", "", {}, 50, 0)
    assert all(result["fits"]["s, b"][key]["low"] is None for key in ("slope", "intercept", "r2"))
    entry = result["rows"]["m2"]["s rho"]
    assert entry["value"] is not None is entry["low"] and "low" not in result["curves"]["s"]["b"]


def test_shifts_share_the_id_images():
    """Only the last model's ID accuracy is uncertain, and of the same 400 images for each shift: an average of the shifts
    is as uncertain as one of them (drawn anew for each of five it would be 0.45 times as wide)."""
    x, shifts = expit(np.linspace(-0.5, 1.5, 12)), [f"s{k}" for k in range(5)]
    models = [{"model": f"m{i}", "group": "b" if i < 12 else "c"}
              | {s: (a, 400, expit(logit(a) - 1), 10**6) if i == 12 else (a, np.nan, expit(logit(a) - 1), np.nan)
                 for s in shifts} for i, a in enumerate([*x, 0.6])]  # fmt: skip
    row = evaluate.effective_robustness(models, shifts, "b", "", {}, 400, 0)["rows"]["m12"]

    def width(key):
        return row[key]["high"] - row[key]["low"]

    assert width("average rho") == pytest.approx(width("s0 rho"), rel=0.1) == width("mean_rho")
    assert width("average id") == pytest.approx(width("s0 id"), rel=0.1)
    assert row["average"]["low"] <= row["average"]["value"] <= row["average"]["high"]


def test_robustness_from_tables_with_matched_columns(tmp_path):
    x, y = np.array([0.4, 0.5, 0.6, 0.55]), np.array([0.2, 0.3, 0.4, 0.5])
    lines = ["model,group,val,val@r,r"] + [f"m{i},{'clip' if i == 3 else 'sl'},{10},{100 * a},{100 * b}"
                                           for i, (a, b) in enumerate(zip(x, y))]  # fmt: skip
    (tmp_path / "t.csv").write_text("\n".join(lines) + "\nm4,sl,10,50,\n")
    result = evaluate.robustness([str(tmp_path / "t.csv")], "val", ["r"], "sl", "", {}, {"r": "500"}, {}, 50, 0)
    expected = stats.linregress(logit(x[:3]), logit(y[:3]))
    rho = 0.5 - expit(expected.slope * logit(0.55) + expected.intercept)
    assert list(result["rows"]) == ["m0", "m1", "m2", "m3"]  # m4 has no r and is left out
    assert result["rows"]["m3"]["r rho"]["value"] == pytest.approx(rho, abs=1e-12)
    assert result["rows"]["m3"]["r"]["low"] == pytest.approx(stats.binomtest(250, 500).proportion_ci().low)
    with pytest.raises(SystemExit, match="--baseline clip: 1 models"):
        evaluate.robustness([str(tmp_path / "t.csv")], "val", ["r"], "clip", "", {}, {}, {}, 50, 0)


def test_robustness_of_runs_uses_the_classes_of_the_shift(tmp_path):
    rng = np.random.default_rng(0)
    for i in range(3):
        folder = tmp_path / f"run{i}"
        folder.mkdir()
        (folder / "args.json").write_text(json.dumps({"args": {"data": "laionet"}}))
        for name, classes in (("val", 6), ("adversarial", 3), ("train", 6)):  # train is no shift
            labels = rng.integers(classes, size=300)
            logits = rng.normal(size=(300, 6)) + (1 + 0.5 * i) * np.eye(6)[labels]
            np.savez(folder / f"{name}.npz", labels=labels, logits=logits)
    result = evaluate.robustness([str(tmp_path / f"run{i}") for i in range(3)], "val", [], "", "", {}, {}, {}, 20, 0)
    assert result["baseline"] == "laionet" and result["shifts"] == ["adversarial", "average"]
    with np.load(tmp_path / "run1" / "val.npz") as file:
        keep = file["labels"] < 3
        expected = (file["logits"][keep][:, :3].argmax(1) == file["labels"][keep]).mean()
    row = result["rows"][str(tmp_path / "run1")]
    assert row["adversarial id"]["value"] == pytest.approx(expected, abs=1e-12)


def test_pairs_in_a_runs_folder_are_no_shift(tmp_path, capsys):
    """clip.py writes sets without labels beside the others, for retrieval; a column of averages is none either."""
    rng, runs = np.random.default_rng(0), []
    for i in range(2):
        (tmp_path / f"run{i}").mkdir()
        runs.append(str(tmp_path / f"run{i}"))
        for name in "val", "v2":
            labels = np.arange(60) % 3
            np.savez(f"{runs[i]}/{name}.npz", labels=labels, logits=rng.normal(size=(60, 3)) + (1 + i) * np.eye(3)[labels])
        np.savez(f"{runs[i]}/odd.npz", labels=np.full(5, -1), features=np.ones((5, 2)))
    result = evaluate.robustness(runs, "val", [], "", "", {}, {}, {}, 10, 0)
    assert result["shifts"] == ["v2", "average"] and "odd.npz: left out" in capsys.readouterr().err
    (tmp_path / "t.csv").write_text("model,val,v2,average\na,50,40,40\nb,60,50,50\n")
    assert evaluate.robustness([str(tmp_path / "t.csv")], "val", [], "", "", {}, {}, {}, 0, 0)["shifts"] == ["v2", "average"]
    with pytest.raises(SystemExit, match="called average"):
        evaluate.robustness([str(tmp_path / "t.csv")], "val", ["average"], "", "", {}, {}, {}, 0, 0)


def test_sets_that_an_input_lacks_are_left_out(tmp_path, capsys):
    """A table of two sets beside a run that has three: the models of the table stay."""
    (tmp_path / "t.csv").write_text("model,val,v2\na,50,40\nb,60,50\nc,70,62\n")
    metrics = {s: {"n": 100, "top1": 0.5} for s in ("val", "v2", "sketch")}
    (tmp_path / "metrics.json").write_text(json.dumps(metrics))
    inputs = [f"x={tmp_path / 't.csv'}", f"y={tmp_path}"]
    result = evaluate.robustness(inputs, "val", [], "x", "", {}, {}, {}, 0, 0)
    assert result["shifts"] == ["v2", "average"] and list(result["rows"]) == ["a", "b", "c", str(tmp_path)]
    error = capsys.readouterr().err
    assert "left out sketch: not in all inputs" in error
    assert f"{tmp_path}: val beside sketch, v2 is over all classes (metrics.json)" in error
    for order, message in ((inputs[::-1], "--subset v2 needs val.npz and v2.npz"), (inputs, "column val@v2")):
        with pytest.raises(SystemExit, match=message):
            evaluate.robustness(order, "val", [], "x", "", {"v2": "subset.txt"}, {}, {}, 0, 0)


def test_columns_of_other_units_are_named_or_left_out(tmp_path):
    """An extra column would rescale all; accuracies of 0 fit percent and fractions; pandas' index is no test set."""
    (tmp_path / "t.csv").write_text(",model,val,v2,r,epochs\n0,a,.5,.4,0,32\n1,b,.6,.5,0,90\n")
    how = ([str(tmp_path / "t.csv")], "val", ["v2"], "", "", {}, {}, {}, 0, 0)
    assert evaluate.robustness(*how)["rows"]["a"]["v2"]["value"] == 0.4
    models = evaluate.models_of_table(how[0][0], "", "val", ["v2", "r"], {}, {})
    assert models[1]["r"][:3:2] == (0.6, 0)


def test_unsigned_counts_are_counts(tmp_path):
    """Minus an unsigned 0 is 0: the class that was never seen would be the most frequent one."""
    labels = np.repeat(np.arange(3), 5)
    counts = np.array([500, 40, 0], np.uint32)
    np.savez(tmp_path / "a.npz", labels=labels, predictions=labels, class_counts=counts)
    data = evaluate.read_predictions(tmp_path / "a.npz", "predictions", "class_counts")
    assert {k: v.tolist() for k, v in evaluate.thirds(data["class_counts"]).items()} == {
        "head": [0], "medium": [1], "tail": [2]}  # fmt: skip


def test_no_interval_where_nothing_varies_by_chance_of_the_draw():
    """Three classes of two images, all wrong, beside single ones of which one is right; ranks of equal rows; recall 1."""
    n_test = np.array([2, 2, 2, 1, 1, 1])
    per_class = np.tile([0.0, 0, 0, 1, 0, 0], (51, 1))
    draws = evaluate.class_mean(per_class, n_test)
    assert draws[0] == pytest.approx(1 / 6) and np.isnan(draws[1:]).all()
    assert (evaluate.class_mean(np.zeros((51, 6)), n_test) == 0).all()  # from_draws gives its exact interval
    rows = np.tile(np.eye(3)[:1], (4, 1))
    assert evaluate.jackknife(rows, lambda x: np.nan, np.random.default_rng(0))["low"] is None
    data = {"labels": np.arange(4), "predictions": np.array([0, 0, 0, 0]), "n_classes": 4, "class_counts": np.ones(4)}
    row = evaluate.score_classes(data, (100, 20), 0, 2, 50, 0)[0]
    assert row["worst 2"] == {"value": 0.0, "low": None, "high": None}


def test_names_and_folders_that_hold_a_sign(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "lr=0.1").mkdir()
    assert evaluate.split_name("lr=0.1") == ("", "lr=0.1") and evaluate.split_name("a=lr=0.1") == ("a", "lr=0.1")
    assert evaluate.split_name("runs/a") == ("", "runs/a")


def test_average_is_of_accuracies_then_logit():
    x, nan = np.array([0.3, 0.5, 0.7, 0.6]), np.nan
    s, t = x - 0.2, np.array([0.25, 0.4, 0.5, 0.58])
    models = [{"model": f"m{i}", "group": "bbbc"[i], "s": (x[i], nan, s[i], nan), "t": (x[i], nan, t[i], nan)}
              for i in range(4)]  # fmt: skip
    row = evaluate.effective_robustness(models, ["s", "t"], "b", "", {}, 0, 0)["rows"]["m3"]
    y = (s + t) / 2
    line = stats.linregress(logit(x[:3]), logit(y[:3]))
    assert row["average"]["value"] == pytest.approx(y[3]) and not row["average extrapolated"]
    expected = y[3] - expit(line.slope * logit(0.6) + line.intercept)
    assert row["average rho"]["value"] == pytest.approx(expected)
    assert row["mean_rho"]["value"] == pytest.approx((row["s rho"]["value"] + row["t rho"]["value"]) / 2)


def test_a_map_of_classes_pools_both_sides(tmp_path):
    """ObjectNet's protocol: several of the model's classes are one of the set's, on the set and on the ID images."""
    rng, expected = np.random.default_rng(0), {}
    (tmp_path / "map.tsv").write_text("0\tA\n1\tB\n2\tA\n")
    for run in "ab":
        (tmp_path / run).mkdir()
        for name in ("val", "objectnet"):
            labels = rng.integers(4, size=300)
            logits = rng.normal(size=(300, 4)) + np.eye(4)[labels]
            np.savez(tmp_path / run / f"{name}.npz", labels=labels, logits=logits)
            labels, logits = labels[labels < 3], logits[labels < 3]
            is_b = logits[:, 1] > np.maximum(logits[:, 0], logits[:, 2])
            expected[run, name] = (is_b == (labels == 1)).mean()
    subsets = {"objectnet": str(tmp_path / "map.tsv")}
    rows = evaluate.robustness([str(tmp_path / run) for run in "ab"], "val", [], "", "", subsets, {}, {}, 0, 0)["rows"]
    for run, row in zip("ab", rows.values()):
        assert row["objectnet id"]["value"] == pytest.approx(expected[run, "val"])
        assert row["objectnet"]["value"] == pytest.approx(expected[run, "objectnet"])


def test_models_of_other_images_are_not_compared(tmp_path):
    labels = np.arange(60) % 3
    for name, rows in (("a", np.arange(60)), ("b", np.arange(60)[::-1])):
        np.savez(tmp_path / f"{name}.npz", labels=labels, predictions=labels, rows=rows)
    with pytest.raises(SystemExit, match="their rows differ"):
        evaluate.compare([str(tmp_path / "a.npz")], [str(tmp_path / "b.npz")], "", 10, 0)


def test_a_row_without_the_matched_accuracy_is_left_out(tmp_path, capsys):
    """Not fitted by the one over all classes; that a table has no other is told where a run has arrays."""
    (tmp_path / "t.csv").write_text("model,val,val@r,r\na,50,60,40\nb,60,70,50\nc,70,,60\n")
    assert list(evaluate.robustness([str(tmp_path / "t.csv")], "val", [], "", "", {}, {}, {}, 0, 0)["rows"]) == ["a", "b"]
    assert "left out c: no accuracy on r, or none on val beside" in capsys.readouterr().err
    for name in "val", "r":
        np.savez(tmp_path / f"{name}.npz", labels=np.arange(60) % 3, logits=np.random.default_rng(0).normal(size=(60, 3)))
    (tmp_path / "u.csv").write_text("model,val,r,v2\na,50,40,30\nb,60,50,40\n")
    for table, is_told in (("u", True), ("t", False)):
        inputs = [f"x={tmp_path / table}.csv", f"y={tmp_path}"]
        evaluate.robustness(inputs, "val", [], "x", "", {}, {}, {}, 0, 0)
        told = "u.csv: val beside r is over all classes (no column val@r)"
        assert (told in capsys.readouterr().err) == is_told


def test_accuracies_are_among_the_classes_of_both_sets():
    """Of five classes the ID set has 0 to 3, the shift 2 to 4."""
    rng, sides, expected = np.random.default_rng(0), [], []
    for first, last in ((0, 4), (2, 5)):
        labels = rng.integers(first, last, 300)
        logits = rng.normal(size=(300, 5)) + np.eye(5)[labels]
        sides.append({"path": "x.npz", "n_classes": 5, "labels": labels, "logits": logits})
        keep = np.isin(labels, (2, 3))
        expected += [(logits[keep][:, 2:4].argmax(1) + 2 == labels[keep]).mean(), keep.sum()]
    assert evaluate.accuracy_pair(*sides, "") == pytest.approx(expected)
    with pytest.raises(SystemExit, match="x.npz and x.npz have no class in common"):
        evaluate.accuracy_pair(sides[0] | {"labels": np.zeros(300, int)}, sides[1], "")


def test_cuts_belong_to_the_medium_classes():
    """--cuts 100 20: more than 100 is many, fewer than 20 few, both cuts medium; the K rarest and all others."""
    groups = evaluate.class_groups(np.array([101, 100, 99, 21, 20, 19, 0]), (100, 20), 2)
    found = {name: sorted(ids.tolist()) for name, ids in groups.items()}
    assert [found[k] for k in ("many >100", "medium 20-100", "few <20")] == [[0], [1, 2, 3, 4], [5, 6]]
    assert [found[k] for k in ("never seen", "2 rarest", "others")] == [[6], [5, 6], [0, 1, 2, 3, 4]]


def test_classes_without_test_images_by_hand(tmp_path):
    """Three of four classes have four images, right in 3, 2 and 0 of them: one of three is never right, the worst two
    have .25; Gini counts predictions of all four, 7, 2, 3 and 0; predictions per image of the class without are none."""
    labels = np.repeat([0, 1, 3], 4)
    predictions = np.array([0, 0, 0, 2, 1, 1, 2, 2, 0, 0, 0, 0])
    np.savez(tmp_path / "a.npz", labels=labels, predictions=predictions, class_counts=[100, 10, 30, 5])
    result = evaluate.imbalance([str(tmp_path / "a.npz")], "", "", (100, 20), 0, 2, 2, True, 0, 0)
    ((row,), (model,)) = (part.values() for part in (result["rows"], result["models"]))
    assert row["never right"]["value"] == pytest.approx(1 / 3) and row["classes without test images"] == 1
    assert row["worst 2"]["value"] == pytest.approx(0.25)
    differences = np.abs(np.subtract.outer([7, 2, 3, 0], [7, 2, 3, 0])).mean()
    assert row["gini_pred"]["value"] == pytest.approx(differences / (2 * 3))
    assert model["predictions_per_image"] == pytest.approx([7 / 4, 2 / 4, np.nan, 0], nan_ok=True)
    assert [b["predictions"]["value"] for b in model["bins"]] == pytest.approx([1 / 4, 7 / 4])  # {3, 1}, {2, 0}


def test_more_than_one_prediction_an_image_is_no_end(tmp_path):
    """Two models say class 0 for 14 and 18 of its 10 images: t = 12.706 with one degree of freedom, cut at 0 alone."""
    labels, paths = np.repeat([0, 1], 10), []
    for n in 14, 18:
        paths.append(str(tmp_path / f"{n}.npz"))
        np.savez(paths[-1], labels=labels, predictions=(np.arange(20) >= n).astype(int), class_counts=[9, 1])
    found = evaluate.imbalance(paths, "", "", (100, 20), 0, 1, 2, True, 0, 0)["bins_over_models"][1]["predictions"]
    assert found["value"] == pytest.approx(1.6) and found["low"] == 0
    assert found["high"] == pytest.approx(1.6 + 12.706 * 0.2, rel=1e-4)


def test_std_of_resamples_is_the_same_statistic():
    """Of 0 and 1 the standard deviation is .5, of their resamples 0 or .5: reflected, [.5, 1]."""
    found = evaluate.std_over(np.array([0.0, 1]), 400, np.random.default_rng(0))
    assert found == {"value": 0.5, "low": 0.5, "high": 1}


def test_jackknife_of_a_mean_is_its_standard_error():
    """Each of ten rows left out once: 1.96 s / sqrt(n), exactly."""
    rows = np.random.default_rng(0).normal(50, 1, size=(10, 1))
    found = evaluate.jackknife(rows, lambda rows: float(rows.mean()), np.random.default_rng(1))
    assert found["high"] - found["value"] == pytest.approx(1.96 * rows.std(ddof=1) / 10**0.5)
    assert found["value"] - found["low"] == pytest.approx(1.96 * rows.std(ddof=1) / 10**0.5)


def test_compare_means_over_all_seeds(tmp_path):
    """The same two files in another order have the same means, in every resample."""
    data, paths = make(n=600), []
    for seed in range(2):
        paths.append(str(tmp_path / f"{seed}.npz"))
        np.savez(paths[-1], labels=data["labels"], logits=make(n=600, seed=seed)["logits"], class_counts=data["class_counts"])
    rows = evaluate.compare(paths, paths[::-1], "", 50, 0)["rows"]
    assert {"top1", "balanced", "tail", "spearman_acc", "spearman_pred"} < set(rows)
    for key, row in rows.items():
        assert row["B - A"] == pytest.approx({"value": 0, "low": 0, "high": 0}, abs=1e-12), key


def test_compare_correlates_accuracies_of_tested_classes(tmp_path):
    """12 of 40 classes have images: resamples are of these, or none would have a correlation."""
    rng, labels, paths = np.random.default_rng(0), np.repeat(np.arange(12), 10), []
    for share in np.linspace(0.9, 0.1, 12), np.linspace(0.1, 0.9, 12):
        paths.append(str(tmp_path / f"{len(paths)}.npz"))
        predictions = np.where(rng.random(120) < share[labels], labels, 39)
        np.savez(paths[-1], labels=labels, predictions=predictions, class_counts=100 - np.arange(40))
    found = evaluate.compare(paths[:1], paths[1:], "", 200, 0)["rows"]["spearman_acc"]
    values = [stats.spearmanr(-np.arange(12), [(np.load(p)["predictions"] == labels)[labels == c].mean() for c in range(12)])
              for p in paths]  # fmt: skip
    assert found["B - A"]["value"] == pytest.approx(values[1].statistic - values[0].statistic)
    assert found["B - A"]["low"] < found["B - A"]["value"] < found["B - A"]["high"] < -1


def test_a_model_that_is_always_wrong_enters_the_average():
    """0 of 10 and 0 of 10 on two shifts are 0 of 20: log odds of .5 / 21."""
    x, y = np.array([0.3, 0.5, 0.7]), np.array([0.0, 0.2, 0.4])
    models = [{"model": f"m{i}", "group": "b", **{s: (x[i], 10, y[i], 10) for s in "st"}} for i in range(3)]
    fits = evaluate.effective_robustness(models, ["s", "t"], "b", "", {}, 0, 0)["fits"]
    for shift, n in ("s", 10), ("average", 20):
        line = stats.linregress(logit(x), logit(np.r_[0.5 / (n + 1), y[1:]]))
        assert fits[f"{shift}, b"]["slope"]["value"] == pytest.approx(line.slope)


def test_what_is_extrapolated_and_what_tau_needs():
    """The baseline's own ends are inside its range; a difference of which one side has no n has no interval."""
    x = np.array([0.3, 0.5, 0.7, 0.6, 0.71, 0.29])
    models = models_of(x, x - 0.1, "bbbccc", 500)
    models[0]["s"] = (0.3, np.nan, 0.2, np.nan)
    rows = evaluate.effective_robustness(models, ["s"], "b", "m0", {}, 50, 0)["rows"].values()
    assert [row["s extrapolated"] for row in rows] == [False] * 4 + [True] * 2
    assert all(row["s tau"]["low"] is None for row in rows)


def test_interval_of_a_line_through_few_models_has_the_width_of_t():
    """Percentiles over six models are taken at the level that a t-interval with four degrees of freedom needs."""
    rng = np.random.default_rng(0)
    x = np.linspace(-1, 1, 6)
    line = evaluate.Line(x, x + 0.1 * rng.normal(size=6), np.inf, 300, rng)
    tail = stats.norm.cdf(-np.sqrt(6 / 4) * stats.t.ppf(0.975, 4))
    for name, draws in ("slope", line.slope), ("intercept", line.intercept), ("r2", line.r2):
        entry = line.estimates()[0][name]
        assert [entry["low"], entry["high"]] == pytest.approx(np.quantile(draws[1:, 0], [tail, 1 - tail]))


def test_frequency_of_a_bin_is_the_mean():
    counts = np.array([1, 1, 10])
    (row,) = evaluate.binned_statistics(np.zeros(3, int), counts, counts / 10, counts, 0, np.random.default_rng(0))
    assert row["count"] == 4 and row["n_classes"] == 3


def test_correlations_of_seeds_may_be_negative():
    """-.5 and -.3: -.4 less 12.706 x .1 is cut at -1; an accuracy's low end at 0."""
    assert evaluate.over_runs([{"value": -0.5}, {"value": -0.3}], "spearman_acc")["low"] == -1
    assert evaluate.over_runs([{"value": 0.5}, {"value": 0.3}], "top1")["low"] == 0


def test_shifts_share_the_resamples_of_models():
    """Of two shifts with the same accuracies lines and rho are the same, and the mean of rho is either one."""
    rng = np.random.default_rng(0)
    x = np.linspace(0.3, 0.8, 7)
    models = [{"model": f"m{i}", "group": "x", "a": pair, "b": pair}
              for i, pair in enumerate((v, np.nan, 0.8 * v + 0.03 * rng.normal(), np.nan) for v in x)]  # fmt: skip
    found = evaluate.effective_robustness(models, ["a", "b"], "x", "", {}, 100, 0)
    assert found["fits"]["a, x"] == found["fits"]["b, x"] and found["fits"]["a, x"]["slope"]["low"] is not None
    for row in found["rows"].values():
        assert list(row["mean_rho"].values()) == pytest.approx(list(row["a rho"].values())) and row["a rho"] == row["b rho"]


def test_the_mean_of_rho_is_as_wide_as_its_narrowest_piece_needs(monkeypatch):
    """A line in pieces of three and five models beside one through eight: the level of three points."""
    models = [{"model": f"m{i}", "group": "x"} | {s: (v, np.nan, 0.8 * v + 0.02 * (i % 3), np.nan) for s in "ab"}
              for i, v in enumerate(np.linspace(0.2, 0.9, 8))]  # fmt: skip
    levels, make = [], evaluate.from_draws
    monkeypatch.setattr(evaluate, "from_draws", lambda draws, level=0.95, **k: levels.append(level) or make(draws, level, **k))
    evaluate.effective_robustness(models, ["a", "b"], "x", "", {"b": 0.45}, 20, 0)
    of_three, of_eight = (1 - 2 * stats.norm.cdf(-np.sqrt(m / (m - 2)) * stats.t.ppf(0.975, m - 2)) for m in (3, 8))
    assert of_three > of_eight and levels[-8:] == pytest.approx([of_three] * 8)


def test_matched_columns_have_their_own_numbers_of_images(tmp_path):
    """--n val@r=20 is for the accuracy on val over the classes of r: 14 of 20."""
    (tmp_path / "t.csv").write_text("model,val,val@r,r\na,.8,.7,.4\nb,.9,.8,.5\n")
    n_of = {"val": 1000, "val@r": 20, "r": 100}
    row = evaluate.robustness([str(tmp_path / "t.csv")], "val", ["r"], "", "", {}, n_of, {}, 5, 0)["rows"]["a"]
    exact = stats.binomtest(14, 20).proportion_ci(method="exact")
    assert (row["r id"]["low"], row["r id"]["high"]) == pytest.approx((exact.low, exact.high))


@pytest.mark.parametrize("C, sizes", [(5, [1, 1, 3]), (8, [2, 2, 4])])
def test_the_rest_of_thirds_is_in_the_tail(C, sizes):
    assert [len(ids) for ids in evaluate.thirds(np.arange(C)).values()] == sizes


def test_predictions_of_a_class_have_95_percent_intervals(tmp_path):
    """Half of 400 images are said to be of their class: 200 +- 1.96 x 10. The rarest classes are in rising order."""
    labels, predictions = np.repeat([0, 1, 2], [400, 50, 50]), np.repeat([0, 2, 1, 2], [200, 200, 50, 50])
    np.savez(tmp_path / "a.npz", labels=labels, predictions=predictions, class_counts=[9, 3, 6])
    (model,) = evaluate.imbalance([str(tmp_path / "a.npz")], "", "", (100, 20), 2, 1, 2, True, 3000, 0)["models"].values()
    assert model["predictions_interval"][0] == pytest.approx([180.4, 219.6], abs=1.5)
    assert model["rarest"].tolist() == [1, 2]
