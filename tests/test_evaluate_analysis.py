"""evaluate.py: collapse, similarity, prototypes, debiasing, WiSE-FT, concepts, report."""

import argparse
import base64
import json
import re
import sys
from html.parser import HTMLParser
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest
import torch
from programs import run_here
from scipy.special import logit, softmax
from scipy.stats import binomtest, spearmanr

import evaluate


def test_nc1_by_hand_and_by_the_textbook():
    """1-d classes {1, 3}, {-3, -1}: NC1 .125 a class. General: mean equals tr(S_w S_b^+) / C from D x D matrices."""
    features, labels = np.array([[1.0], [3], [-3], [-1]]), np.array([0, 0, 1, 1])
    means = evaluate.class_means(features, labels, 3)
    nc1, rank, _ = evaluate.within_variability(features, labels, means)
    assert nc1[:2] == pytest.approx([0.125, 0.125]) and np.isnan(nc1[2]) and rank == 1
    rng = np.random.default_rng(0)
    labels = rng.integers(6, size=400)
    features = rng.normal(size=(6, 10))[labels] * 2 + rng.normal(size=(400, 10))
    means = np.array([features[labels == c].mean(0) for c in range(6)])
    np.testing.assert_allclose(evaluate.class_means(features.astype(np.float32), labels, 6), means, atol=1e-6)
    s_b = np.cov(means.T, bias=True)
    inverse = np.linalg.pinv(s_b, rcond=1e-6)
    expected = []
    for c in range(6):
        h = features[labels == c] - means[c]
        expected.append(np.trace(h.T @ h / 400 @ inverse))
    nc1, rank, _ = evaluate.within_variability(features, labels, means)
    np.testing.assert_allclose(nc1, expected, rtol=1e-8)
    s_w = sum((features[labels == c] - means[c]).T @ (features[labels == c] - means[c]) for c in range(6)) / 400
    assert nc1.mean() == pytest.approx(np.trace(s_w @ inverse) / 6, rel=1e-8) and rank == 5


def test_nc2_by_hand():
    """Orthogonal means are a simplex once centred: 0. W = I uncentred: .5. A vector equal to the mean has no angle."""
    mean, nearest = evaluate.cosine_gaps(np.eye(3), True)
    np.testing.assert_allclose([mean, nearest], 0, atol=1e-12)
    assert evaluate.cosine_gaps(np.eye(3), False)[0] == pytest.approx([0.5] * 3)
    mean, _ = evaluate.cosine_gaps(np.array([[1.0, 0], [-1, 0], [0, 0], [np.nan, 0]]), True)
    assert np.isnan(mean[2]) and np.isnan(mean[3]) and mean[:2] == pytest.approx([0, 0], abs=1e-12)
    mean, _ = evaluate.cosine_gaps(np.array([[0.0, 0], [1, 0], [0, 1], [-1, 0]]), False)
    assert np.isnan(mean[0]) and mean[1:] == pytest.approx([0.5, 0.5, 0.5])  # as without the row
    rng = np.random.default_rng(0)
    rows = evaluate.unit_rows(rng.normal(size=(7, 4)))
    gap = [[abs(rows[i] @ rows[j] + 1 / 6) for j in range(7) if j != i] for i in range(7)]
    mean, nearest = evaluate.cosine_gaps(rows, False)
    np.testing.assert_allclose([mean, nearest], [np.mean(gap, 1), np.max(gap, 1)], atol=1e-12)


def test_pair_means_drop_self_pairs_and_copies():
    unit = evaluate.unit_rows(np.random.default_rng(0).normal(size=(6, 3)))
    value, draws = evaluate.pair_means(unit @ unit.T, 400, np.random.default_rng(1))
    upper = (unit @ unit.T)[np.triu_indices(6, 1)]
    assert value == pytest.approx(upper.mean())
    total = unit.sum(0)
    assert value == pytest.approx((total @ total - 6) / 30)  # the identity of methods.md N
    assert draws.max() <= upper.max() + 1e-12 and draws.mean() == pytest.approx(value, abs=0.05)


def test_similarity_of_two_sets(tmp_path):
    rng = np.random.default_rng(0)
    centers, labels = rng.normal(size=(8, 16)), np.repeat(np.arange(8), 30)
    for name, spread in (("a", 1.0), ("b", 0.5)):
        np.savez(
            tmp_path / f"{name}.npz", features=centers[labels] + spread * rng.normal(size=(240, 16)), labels=labels
        )
    result = evaluate.similarity(str(tmp_path / "a.npz"), str(tmp_path / "b.npz"), 50, 20, 7, 300, 0)
    assert result["rows"]["share of classes less alike in A"]["value"]["value"] == 1
    assert (
        result["rows"]["difference"]["value"]["high"] < 0 and len(result["pairs"][0]) == len(result["pairs"][1]) == 400
    )
    same = evaluate.similarity(str(tmp_path / "a.npz"), str(tmp_path / "a.npz"), 50, 30, 7, 300, 0)
    assert same["rows"]["difference"]["value"]["value"] == pytest.approx(0, abs=1e-12)
    with pytest.raises(SystemExit, match="no class with 10000 pairs"):
        evaluate.similarity(str(tmp_path / "a.npz"), str(tmp_path / "b.npz"), 50, 20, 10_000, 10, 0)


def test_similarity_finds_one_class_among_many(tmp_path):
    """A single class of 200 that differs: shares of 50 draws are never below 2 / 51, which 200 tests would not let pass."""
    rng, labels = np.random.default_rng(0), np.repeat(np.arange(200), 8)
    centers = rng.normal(size=(200, 16))
    for name in "ab":
        spread = np.where(labels == 7, 2.0 if name == "a" else 0.1, 0.7)[:, None]
        features = centers[labels] + spread * rng.normal(size=(1600, 16))
        np.savez(tmp_path / f"{name}.npz", features=features, labels=labels)
    rows = evaluate.similarity(str(tmp_path / "a.npz"), str(tmp_path / "b.npz"), 50, 20, 7, 50, 0)["rows"]
    assert rows["share of classes less alike in A, 5 % false discoveries"]["value"]["value"] == 1 / 200
    assert rows["share of classes more alike in A, 5 % false discoveries"]["value"]["value"] == 0


def on_circle(*degrees):
    angles = np.radians(degrees)
    return torch.from_numpy(np.stack([np.cos(angles), np.sin(angles)], 1)).float()


def test_distinct_prototypes_by_hand():
    """eps .025 is 12.84 degrees. Angles (0, 10, 20): greedy 2; (10, 0, 20): greedy 1; linked 1 in any order."""
    for degrees, n_greedy in (((0, 10, 20), 2), ((10, 0, 20), 1)):
        kept, groups = evaluate.greedy_cover(on_circle(*degrees), 0.025)
        assert len(kept) == n_greedy == groups.max() + 1
        assert len(np.unique(evaluate.linked_groups(on_circle(*degrees), groups, 0.025))) == 1


def test_prototypes_of_a_checkpoint_are_the_table_of_all(tmp_path):
    """A run with sampled prototypes also saves the rows of its last step, under the student's name."""
    state = {"head.prototypes": torch.ones(2, 3)}
    torch.save({"state_dict": state, "student": state, "dino_prototypes": torch.zeros(8, 3)}, tmp_path / "a.pt")
    assert evaluate.read_array(tmp_path / "a.pt", "")[0].shape == (8, 3)
    torch.save({"student": {"head.last_layer.weight": torch.ones(2, 3)},
                "teacher": {"head.last_layer.weight": torch.ones(4, 3)},
                "args": argparse.Namespace(arch="vit_small")}, tmp_path / "b.pt")  # the public DINO's
    assert evaluate.read_array(tmp_path / "b.pt", "")[0].shape == (4, 3)


def test_counts_by_name_of_a_checkpoints_classes(tmp_path):
    """A classifier's checkpoint has class names: a table in another order gives what the run's own arrays give."""
    names, counts = list("abcdefgh"), 2 ** np.arange(8)
    vectors = np.random.default_rng(0).normal(size=(8, 5)).astype(np.float32)
    torch.save({"state_dict": {"prototypes": torch.from_numpy(vectors)}, "class_names": names}, tmp_path / "a.pt")
    np.savez(tmp_path / "a.npz", prototypes=vectors, class_names=names, class_counts=counts)
    order = np.random.default_rng(1).permutation(8)
    (tmp_path / "c.tsv").write_text("name\tcount\n" + "".join(f"{names[i]}\t{counts[i]}\n" for i in order))
    found = [evaluate.prototypes(str(tmp_path / path), "", table, [0.025], 3, False, 0, 0, 0, "cpu")["affinity"]
             for path, table in (("a.npz", ""), ("a.pt", str(tmp_path / "c.tsv")))]  # fmt: skip
    np.testing.assert_allclose(found[0], found[1], atol=1e-6)


def test_distinct_prototypes_equal_the_naive_loop():
    """9,000 rows in clusters, more than two blocks: the same cover, and scipy's components of the whole graph."""
    rng = np.random.default_rng(0)
    rows = rng.normal(size=(60, 8))[rng.integers(60, size=9000)] + 0.16 * rng.normal(size=(9000, 8))
    unit = torch.nn.functional.normalize(torch.from_numpy(rows).float(), dim=1)
    kept, groups = evaluate.greedy_cover(unit, 0.05)
    naive = [0]
    for i in range(1, 9000):
        if float((unit[naive] @ unit[i]).max()) <= 0.95:
            naive.append(i)
    assert kept.tolist() == naive and ((unit * unit[kept[groups]]).sum(1) > 0.95 - 1e-6).all()
    sub, sub_groups = unit[:3000], evaluate.greedy_cover(unit[:3000], 0.05)[1]
    whole = evaluate.connected_components(evaluate.csr_matrix((sub @ sub.T > 0.95).numpy()), False)[0]
    assert len(np.unique(evaluate.linked_groups(sub, sub_groups, 0.05))) == whole < len(np.unique(sub_groups))
    order = torch.randperm(9000, generator=torch.Generator().manual_seed(0))
    counts = [
        len(np.unique(evaluate.linked_groups(x, evaluate.greedy_cover(x, 0.05)[1], 0.05))) for x in (unit, unit[order])
    ]
    assert counts[0] == counts[1] <= len(kept)


def test_effective_rank_and_affinity_by_hand(tmp_path):
    assert evaluate.effective_rank(np.diag([1.0, 1, 0])) == pytest.approx(2)
    assert evaluate.effective_rank(np.diag([3.0, 1])) == pytest.approx(1.7548, abs=1e-4)
    head, tail = np.eye(6)[:3], np.tile(np.eye(6)[5], (3, 1))
    rows = evaluate.affinity(np.concatenate([head, tail]), np.arange(3), np.arange(3, 6), 50, np.random.default_rng(0))
    assert rows["tail collapse (tail-tail - head-head)"]["value"] == pytest.approx(1)
    assert rows["tail resultant length"]["value"] == pytest.approx(1) and rows["head-tail cosine"]["value"] == 0
    torch.save(
        {
            "student": {"head.last_layer.weight": torch.eye(4)},
            "teacher": {"head.last_layer.weight_v": torch.ones(3, 2)},
        },
        tmp_path / "d.pt",
    )
    assert evaluate.read_array(str(tmp_path / "d.pt"), "")[0].shape == (3, 2)  # the teacher's
    with pytest.raises(SystemExit, match="--key is one of student.head.last_layer.weight"):
        evaluate.read_array(str(tmp_path / "d.pt"), "nothing")


def test_label_prior_by_hand_and_of_a_biased_classifier():
    """f = (2, 0), labels half and half: q = (.8808, .1192). Simulated: the known prior within 2 % total variation."""
    q = evaluate.label_prior(np.tile([2.0, 0], (4, 1)), np.array([0, 1, 0, 1]))
    assert q == pytest.approx([0.8808, 0.1192], abs=1e-4)
    rng, C = np.random.default_rng(0), 20
    prior = rng.dirichlet(np.full(C, 2.0))
    for shares in (np.full(C, 1 / C), rng.dirichlet(np.full(C, 5.0))):  # balanced labels, and others
        labels = rng.choice(C, size=40_000, p=shares)
        x = rng.normal(size=(40_000, C)) + 1.5 * np.eye(C)[labels]
        logits = 1.5 * x + np.log(prior)  # exact log p(x | y) up to a constant, plus a wrong prior
        q = evaluate.label_prior(logits, labels)
        assert np.abs(q - prior).sum() / 2 < 0.02
        share = np.bincount(labels, minlength=C) / len(labels)
        optimum = softmax(logits - np.log(q) + np.log(share), axis=1).mean(0)
        np.testing.assert_allclose(optimum, share, atol=1e-6)
    assert np.isfinite(evaluate.label_prior(logits[labels > 0], labels[labels > 0])).all()  # a class without images


def test_a_distance_of_eps_is_not_covered():
    """The cosine is .5 to the last bit: two rows at eps .5, one at .51."""
    x = torch.tensor([[1, 0], [0.5, 0.75**0.5]])
    for eps, n in ((0.5, 2), (0.51, 1)):
        kept, groups = evaluate.greedy_cover(x, eps)
        assert len(kept) == n == len(np.unique(evaluate.linked_groups(x, groups, eps)))


def test_intervals_of_nc1_end_at_0():
    """Distances 1, 1, 4 of three images: 6 less 4.3 x 3 is below 0."""
    features, labels = np.array([[-1.0], [-1], [2], [-9], [-9]]), np.array([0, 0, 0, 1, 1])
    means = evaluate.class_means(features, labels, 2)
    nc1, _, interval = evaluate.within_variability(features, labels, means)
    assert interval[0, 0] == 0 and interval[0, 1] == pytest.approx(nc1[0] * (6 + 4.3027 * 3) / 6, rel=1e-4)


def zero_shot(rng, n, prior):
    """Labels, and the log p(x | y) of x up to a constant, plus the log of a wrong prior."""
    labels = rng.integers(len(prior), size=n)
    return labels, 1.5 * (rng.normal(size=(n, len(prior))) + 1.5 * np.eye(len(prior))[labels]) + np.log(prior)


def test_interval_of_the_label_prior_is_that_of_refits():
    """Width against 600 refits to resamples within classes, to 10 % (their own error is 3 %)."""
    rng, prior = np.random.default_rng(0), np.array([0.5, 0.3, 0.12, 0.07, 0.01])
    labels, logits = zero_shot(rng, 500, prior)
    q = evaluate.label_prior(logits, labels)
    refits = [evaluate.label_prior(logits[i], labels[i]) for i in list(evaluate.resamples(labels, 600, rng))[1:]]
    ends = evaluate.prior_interval(logits, labels, q)
    assert np.diff(logit(ends), axis=1)[:, 0] == pytest.approx(2 * 1.96 * logit(refits).std(0), rel=0.1)
    assert (ends[:, 0] < q).all() and (q < ends[:, 1]).all() and (0 < ends).all() and (ends < 1).all()


def test_a_class_without_images_bends_no_prior():
    """It gets the mean of ln q; f = (2, 0) gives the others .8808 and .1192 of the rest as if it were not there."""
    q = evaluate.label_prior(np.tile([2.0, 0, 5], (4, 1)), np.array([0, 1, 0, 1]))
    assert q[:2] / q[:2].sum() == pytest.approx([0.8808, 0.1192], abs=1e-3)
    assert q[2] == pytest.approx(np.sqrt(q[0] * q[1]), rel=1e-3)


def test_interval_of_the_label_prior_is_that_of_new_images():
    """Deviations of n images are n / (n - 1) of what they show: of 4 a class, each twice, the width falls by the root
    of 3 / 7, not of 1 / 2. All deviations are equal here, so that t is normal."""
    widths = []
    for times in (1, 2):
        logits, labels = np.tile([[1.0, 0], [-1, 0]], (4 * times, 1)), np.repeat([0, 1], 4 * times)
        widths.append(np.diff(logit(evaluate.prior_interval(logits, labels, np.full(2, 0.5))), axis=1)[:, 0])
    assert widths[1] / widths[0] == pytest.approx(np.sqrt([3 / 7, 3 / 7]), rel=1e-4)


def test_interval_of_the_label_prior_covers_it():
    """200 simulations of 300 images, some classes of a few; a class without images, single images, no doubt at all."""
    rng, inside = np.random.default_rng(0), []
    for _ in range(200):
        prior = rng.dirichlet(np.full(5, 2.0))
        labels, logits = zero_shot(rng, 300, prior)
        low, high = evaluate.prior_interval(logits, labels, evaluate.label_prior(logits, labels)).T
        inside.append((low <= prior) & (prior <= high))
    assert 0.92 <= np.mean(inside) <= 0.98, np.mean(inside)
    for keep in (labels > 0, np.r_[np.unique(labels, return_index=True)[1], np.flatnonzero(labels > 1)]):
        q = evaluate.label_prior(logits[keep], labels[keep])
        low, high = evaluate.prior_interval(logits[keep], labels[keep], q).T
        assert (0 <= low).all() and (low < q).all() and (q < high).all() and (high <= 1).all()
    assert np.isnan(evaluate.prior_interval(100 * np.eye(3), np.arange(3), np.full(3, 1 / 3))).all()


def test_wins_are_the_share_of_resamples():
    """Balanced accuracy of three columns, image by image, in the same resamples."""
    rng, labels = np.random.default_rng(0), np.repeat([0, 1, 2], [5, 20, 40])
    predicted = np.where(rng.random((3, 65)) < [[0.6], [0.65], [0.5]], labels, (labels + 1) % 3)
    found = evaluate.best_of([0, 1, 2], lambda v: np.eye(3)[predicted[v]], labels, 100, 7)
    best = []
    for i in evaluate.resamples(labels, 100, np.random.default_rng(7)):
        y, right = labels[i], (predicted == labels)[:, i]
        best.append(int(np.mean([right[:, y == c].mean(1) for c in range(3)], 0).round(9).argmax()))
    assert found == {"value": best[0], "wins": np.mean(np.array(best[1:]) == best[0])} and 0.2 < found["wins"] < 1
    assert evaluate.best_of([0, 1], lambda v: np.eye(3)[labels], labels, 0, 7) == {"value": 0, "wins": None}


def test_what_debias_chose_has_intervals(tmp_path):
    zs, ft = biased_pair(tmp_path, n=1200)
    chosen = evaluate.debias(zs, ft, "", "", {}, [], "", "counts", True, 50, 0)["chosen"]
    for key in ("T zero-shot", "T fine-tuned"):
        assert chosen[key]["low"] < chosen[key]["value"] < chosen[key]["high"]
    assert all(0 < chosen[key]["wins"] <= 1 for key in ("lambda", "tau"))
    low, high = chosen["q_interval"].T
    assert (low < chosen["q"]).all() and (chosen["q"] < high).all()


def biased_pair(tmp_path, seed=0, n=6000, C=12):
    """A zero-shot model with a label bias of its own, and a fine-tuned one that learned long-tailed classes."""
    rng = np.random.default_rng(seed)
    labels, counts = rng.integers(C, size=n), (2000 * 0.6 ** np.arange(C)).astype(int) + 1
    bias = rng.permutation(np.linspace(-2, 2, C))
    signal = [2 * np.eye(C)[labels] + 1.3 * rng.normal(size=(n, C)) for _ in range(2)]
    np.savez(tmp_path / "zs.npz", labels=labels, logits=signal[0] + bias, class_counts=counts)
    np.savez(tmp_path / "ft.npz", labels=labels, logits=signal[1] + np.log(counts / counts.sum()), class_counts=counts)
    return [str(tmp_path / name) for name in ("zs.npz", "ft.npz")]


def test_debiasing_helps_and_reports_deltas(tmp_path):
    zs, ft = biased_pair(tmp_path)
    result = evaluate.debias(zs, ft, "", "", {"more": ft}, [], "", "counts", False, 200, 0)
    balanced = {name: row["balanced"]["value"] for name, row in result["rows"].items()}
    assert balanced["GLA"] == max(balanced.values())
    assert result["minus zero-shot"]["GLA"]["balanced"]["low"] > 0 < result["minus fine-tuned"]["GLA"]["tail"]["low"]
    assert result["minus fine-tuned"]["logit adjustment"]["tail"]["low"] > 0
    assert result["minus zero-shot"]["zero-shot - ln q"]["balanced"]["low"] > 0
    assert balanced["more"] == balanced["fine-tuned"] and result["n_test"] + result["n_held_out"] == 6000
    value = result["rows"]["GLA"]["tail"]["value"] - result["rows"]["zero-shot"]["tail"]["value"]
    assert result["minus zero-shot"]["GLA"]["tail"]["value"] == pytest.approx(value)


def test_debias_has_the_intervals_of_compare(tmp_path):
    """One difference on the same images by two commands, of few images a class, where class_mean widens most."""
    rng = np.random.default_rng(0)
    labels, counts = np.repeat(np.arange(12), 6), 100 - np.arange(12)
    logits = 2 * np.eye(12)[labels] + rng.normal(size=(72, 12))
    other = np.where(rng.random((72, 1)) < 0.15, rng.normal(size=(72, 12)), logits)
    order, test = np.random.default_rng(0).permutation(72), np.ones(72, bool)
    test[order[np.argsort(labels[order], kind="stable")][::2]] = False
    for name, values in (("a", logits), ("b", other)):
        np.savez(tmp_path / f"{name}.npz", labels=labels, logits=values, class_counts=counts)
        np.savez(tmp_path / f"{name}_test.npz", labels=labels[test], logits=values[test], class_counts=counts)
    a, b, a_test, b_test = (str(tmp_path / f"{name}.npz") for name in ("a", "b", "a_test", "b_test"))
    compared = evaluate.compare([a_test], [b_test], "", 2000, 0)["rows"]
    found = evaluate.debias(a, b, "", "", {"more": b}, [], "", "counts", False, 2000, 0)["minus zero-shot"]["more"]
    for key in "balanced", "head", "tail":
        expected = compared[key]["B - A"]
        assert found[key]["value"] == pytest.approx(expected["value"])
        width, expected = (x["high"] - x["low"] for x in (found[key], expected))
        assert width == pytest.approx(expected, rel=0.08) and (width > 0 or key != "balanced")


def test_wise_ft_is_chosen_on_held_out_images(tmp_path):
    """Of sums of both models' logits, the one that is best on the half that is not scored, found by hand."""
    zs, ft = biased_pair(tmp_path, n=1200)
    with np.load(zs) as a, np.load(ft) as b:
        labels, mixed = a["labels"], [a["logits"] * (1 - t) + b["logits"] * t for t in (0.1, 0.5, 0.9)]
    paths = [str(tmp_path / f"alpha{i}.npz") for i in range(3)]
    for path, logits in zip(paths, mixed):
        np.savez(path, labels=labels, logits=logits)
    result = evaluate.debias(zs, ft, "", "", {}, paths, "", "counts", False, 10, 0)
    test, order = np.ones(1200, bool), np.random.default_rng(0).permutation(1200)
    test[order[np.argsort(labels[order], kind="stable")][::2]] = False
    held = [np.mean([(x[~test].argmax(1) == c)[labels[~test] == c].mean() for c in range(12)]) for x in mixed]
    best = int(np.argmax(held))
    assert result["chosen"]["WiSE-FT"]["value"] == paths[best] and np.ptp(held) > 0
    expected = (mixed[best].argmax(1) == labels)[test].mean()
    assert result["rows"]["WiSE-FT"]["top1"]["value"] == pytest.approx(expected)


def test_debias_refuses_the_test_images_as_held_out_ones(tmp_path):
    zs, ft = biased_pair(tmp_path, n=200)
    with pytest.raises(SystemExit, match="holds the test images"):
        evaluate.debias(zs, ft, zs, ft, {}, [], "", "counts", False, 10, 0)
    rows, mixed = np.random.default_rng(0).permutation(200)[:150], []
    for path in (zs, ft):  # some of them, in another order
        with np.load(path) as file:
            arrays = {k: file[k][rows] if k != "class_counts" else file[k] for k in file.files}
        mixed.append(str(tmp_path / f"mixed_{Path(path).name}"))
        np.savez(mixed[-1], **arrays)
    with pytest.raises(SystemExit, match="mixed_zs.npz holds the test images"):
        evaluate.debias(zs, ft, *mixed, {}, [], "", "counts", False, 10, 0)


def test_debias_by_nothing_is_the_model_itself(tmp_path):
    """tau or lambda 0 keeps the file's own predictions where rounded logits tie; counts are only asked for if used."""
    rng, labels = np.random.default_rng(0), np.arange(400) % 4
    for name in ("zs", "ft"):
        logits = 5 * np.eye(4)[labels] + rng.integers(2, size=(400, 4))
        logits[::7] = 0  # all tie
        np.savez(tmp_path / f"{name}.npz", labels=labels, logits=logits, predictions=np.where(
            np.arange(400) % 7, logits.argmax(1), rng.integers(4, size=400)))  # fmt: skip
    files = [str(tmp_path / f"{name}.npz") for name in ("zs", "ft")]
    result = evaluate.debias(*files, "", "", {}, [], "uniform", "prior", False, 20, 0)
    assert result["chosen"]["tau"]["value"] == 0
    assert result["rows"]["logit adjustment"] == result["rows"]["fine-tuned"]
    assert result["rows"]["GLA"]["spearman_pred"].keys() == {"value", "low", "high"}
    with pytest.raises(SystemExit, match="no class_counts of 4 classes: pass --group-by prior"):
        evaluate.debias(*files, "", "", {}, [], "uniform", "counts", False, 20, 0)


def test_collapse_without_logits_has_no_accuracy(tmp_path):
    rng = np.random.default_rng(0)
    np.savez(tmp_path / "a.npz", labels=np.arange(40) % 4, features=rng.normal(size=(40, 6)), class_counts=np.arange(4))
    result = evaluate.collapse([str(tmp_path / "a.npz")], "", 10, 0)
    (model,) = result["models"].values()
    assert np.isnan(model["accuracy"]).all() and result["rows"]["NC1"]["rho(acc)"]["value"] is None
    assert np.isnan(model["accuracy_interval"]).all()


def test_intervals_of_collapse_cover_what_so_many_images_have():
    """NC1 and NC2 of each of 40 classes of 5 to 60 images against their means over 100 simulations."""
    rng, C = np.random.default_rng(0), 40
    labels, centers = np.repeat(np.arange(C), np.linspace(5, 60, C).astype(int)), 2 * rng.normal(size=(C, 6))
    of = lambda m: np.array(evaluate.cosine_gaps(m, True))  # noqa: E731
    values, ends = [], []
    for _ in range(100):
        features = centers[labels] + rng.normal(size=(len(labels), 6))
        means = evaluate.class_means(features, labels, C)
        nc1, _, interval = evaluate.within_variability(features, labels, means)
        gaps, half = of(means), evaluate.jackknife_of_means(features, labels, means, of, rng)
        values.append([nc1, *gaps])
        ends.append([interval, *np.stack([gaps - half, gaps + half], -1)])
    truth, ends = np.mean(values, 0), np.array(ends)
    covered = ((ends[..., 0] <= truth) & (truth <= ends[..., 1])).mean((0, 2))
    assert (0.91 <= covered).all() and (covered <= 0.98).all(), covered


def test_collapse_gives_each_class_its_interval(tmp_path):
    """Not class vectors, which are no sample, nor a class of a single image; none without resamples."""
    rng, labels = np.random.default_rng(0), np.r_[np.arange(120) % 4, 4]
    np.savez(tmp_path / "a.npz", labels=labels, features=rng.normal(size=(121, 6)) + 3 * np.eye(6)[labels],
             prototypes=rng.normal(size=(5, 6)))  # fmt: skip
    (model,) = evaluate.collapse([str(tmp_path / "a.npz")], "", 10, 0)["models"].values()
    names = [key for key in model if key.startswith("NC") and not key.endswith("_interval")]
    assert len(names) == 9
    for name in names:
        assert (f"{name}_interval" in model) == ("_W" not in name), name
        low, high = model.get(f"{name}_interval", np.tile([-np.inf, np.inf], (5, 1))).T
        assert (low[:4] <= model[name][:4]).all() and (model[name][:4] <= high[:4]).all() and (low[:4] < high[:4]).all()
        assert np.isnan(low[4]) == ("_W" not in name)
    (model,) = evaluate.collapse([str(tmp_path / "a.npz")], "", 0, 0)["models"].values()
    assert "NC2_M_interval" not in model


def test_nothing_is_chosen_on_test_labels(tmp_path):
    """Other labels of the test images leave every prediction, tau, lambda and q as they are."""
    rng, C = np.random.default_rng(0), 5
    f = {name: rng.normal(size=(200, C)) for name in ("zs", "ft", "vz", "vf")}
    val, outcomes = {"zs": f["vz"], "ft": f["vf"], "labels": rng.integers(C, size=200)}, []
    for seed in (0, 1):
        labels = np.random.default_rng(seed).integers(C, size=200)
        sides = [{"logits": f[name], "labels": labels} for name in ("zs", "ft")]
        outcomes.append(evaluate.debias_logits(*sides, val, np.log(np.full(C, 1 / C)), True, 20, 0))
    assert str(outcomes[0]) == str(outcomes[1])


def test_tau_normalisation_by_hand():
    """Rows (3, 4), (0, 1) at tau .5: (1.3416, 1.7889), (0, 1); a cosine head is left out."""
    head = np.array([[3.0, 4], [0, 1]])
    x = np.array([[1.0, 1], [0, 1], [2, -1], [0.1, 2]])
    val = {"zs": np.zeros((4, 2)), "ft": x @ head.T, "labels": np.array([0, 1, 0, 1]), "ft_features": x}
    ft = {"logits": x @ head.T, "features": x, "prototypes": head}
    out, chosen = evaluate.debias_logits({"logits": np.zeros((4, 2))}, ft, val, np.zeros(2), False, 0, 0)
    rows = head / np.linalg.norm(head, axis=1, keepdims=True) ** chosen["tau-norm"]["value"]
    np.testing.assert_allclose(out["tau-normalised"], x @ rows.T)
    np.testing.assert_allclose(head[0] / 5**0.5, [1.3416, 1.7889], atol=1e-4)
    out, _ = evaluate.debias_logits(
        {"logits": np.zeros((4, 2))}, ft | {"prototypes": evaluate.unit_rows(head)}, val, np.zeros(2), False, 0, 0
    )
    assert "tau-normalised" not in out
    shifted = val | {"ft": x @ head.T - [9, 0]}  # a probe with a bias: features and prototypes are not its logits
    assert "tau-normalised" not in evaluate.debias_logits({"logits": np.zeros((4, 2))}, ft, shifted, np.zeros(2), False, 0, 0)[0]


def test_wiseft_ends_are_exact_and_the_middle_is_the_mean(tmp_path):
    a = {"w": torch.randn(3, 2), "h": torch.randn(2).half(), "n": torch.tensor(3)}
    b = {"w": torch.randn(3, 2), "h": torch.randn(2).half(), "n": torch.tensor(8)}
    for alpha, end in ((0, a), (1, b)):
        mixed = evaluate.interpolate(a, b, alpha)
        assert all(torch.equal(mixed[k], end[k]) for k in a)
    torch.save({"state_dict": a, "prototypes": torch.ones(2), "optimizer": {}, "step": 1}, tmp_path / "a.pt")
    torch.save(
        {
            "state_dict": {f"module.{k}": v for k, v in b.items()},
            "prototypes": torch.zeros(2),
            "optimizer": {},
            "step": 2,
        },
        tmp_path / "b.pt",
    )
    evaluate.wiseft([str(tmp_path / "a.pt"), str(tmp_path / "b.pt")], [0.5], str(tmp_path / "out"))
    content = torch.load(tmp_path / "out" / "alpha_0.50.pt", weights_only=True)
    assert set(content) == {"state_dict", "step"} and content["step"] == 2
    torch.testing.assert_close(content["state_dict"]["w"], (a["w"] + b["w"]) / 2)
    assert content["state_dict"]["h"].dtype == torch.float16 and content["state_dict"]["n"].item() == 6
    for name, value in (("d", 0.0), ("e", 1.0)):  # dino_laionet.py's lie beside the state
        torch.save({"state_dict": {"w": torch.zeros(2)}, "dino_prototypes": torch.full((3, 2), value)}, tmp_path / f"{name}.pt")
    evaluate.wiseft([str(tmp_path / "d.pt"), str(tmp_path / "e.pt")], [0, 0.25], str(tmp_path / "out"))
    for alpha in (0, 0.25):
        content = torch.load(tmp_path / "out" / f"alpha_{alpha:.2f}.pt", weights_only=True)
        assert list(content["state_dict"]) == ["w"] and content["dino_prototypes"].unique().tolist() == [alpha]
    torch.save({"state_dict": {"w": torch.zeros(4)}}, tmp_path / "c.pt")
    with pytest.raises(SystemExit, match="3 of 3 entries are not in both"):
        evaluate.wiseft([str(tmp_path / "a.pt"), str(tmp_path / "c.pt")], [0.5], str(tmp_path / "out"))


def test_wiseft_curve_reads_metrics(tmp_path):
    for alpha, top1 in (("0.00", 0.5), ("1.00", 0.7)):
        (tmp_path / f"alpha_{alpha}").mkdir()
        sets = {s: {"n": 100, "top1": top1 - d} for s, d in (("val", 0), ("v2", 0.1), ("sketch", 0.3))}
        (tmp_path / f"alpha_{alpha}" / "metrics.json").write_text(json.dumps(sets | {"run": {}}))
    rows = evaluate.wiseft_results(str(tmp_path), "val", [], 50, 0)["rows"]
    assert list(rows) == ["0.00", "1.00"] and rows["1.00"]["average"]["value"] == pytest.approx(0.5)


def test_shifts_of_an_average_are_drawn_on_their_own(tmp_path):
    """Four shifts of 100 images at 50 %: the average's standard error is 5 % over the root of four."""
    (tmp_path / "alpha_0.50").mkdir()
    sets = {s: {"n": 100, "top1": 0.5} for s in ("val", "v2", "sketch", "a", "r")}
    (tmp_path / "alpha_0.50" / "metrics.json").write_text(json.dumps(sets))
    average = evaluate.wiseft_results(str(tmp_path), "val", [], 4000, 0)["rows"]["0.50"]["average"]
    assert (average["high"] - average["low"]) / 2 == pytest.approx(1.96 * 0.025, rel=0.1)


def test_concepts(tmp_path, capsys):
    (tmp_path / "a.tsv").write_text("class\tcount\n" + "".join(f"c{i}\t{2**i}\n" for i in range(10)))
    (tmp_path / "b.tsv").write_text(
        "class\tcount\n" + "".join(f"c{i}\t{3 * 2**i}\n" for i in range(9, -1, -1)) + "x\t1\n"
    )
    paths = [str(tmp_path / "a.tsv"), str(tmp_path / "b.tsv")]
    rows = evaluate.agreement(paths, 50, 0)["rows"]["a, b"]
    assert "left out 1 classes" in capsys.readouterr().err
    assert (
        rows["classes"] == 10
        and rows["rho"]["value"] == pytest.approx(1)
        and rows["median A / B"]["value"] == pytest.approx(1 / 3)
    )
    shared = evaluate.shared_tail(paths, 50, 0)["rows"]
    assert shared["tmp/a" if "tmp/a" in shared else list(shared)[0]]["max"] == 512
    assert list(shared.values())[1]["share of the top 10 %"]["value"] == pytest.approx(512 / 1023)
    with pytest.raises(SystemExit, match="pairs of files"):
        evaluate.agreement(paths[:1], 50, 0)


class Page(HTMLParser):
    """Tags that are open, addresses that would be fetched, and rows of tables."""

    def __init__(self):
        super().__init__()
        self.open, self.addresses, self.rows = [], [], 0

    def handle_starttag(self, tag, attrs):
        if tag not in ("meta", "link", "path", "img"):
            self.open.append(tag)
        self.rows += tag == "tr"
        self.addresses += [v for k, v in attrs if k in ("src", "href") and not v.startswith("data:")]

    def handle_endtag(self, tag):
        if tag not in ("meta", "link", "path", "img"):
            assert self.open.pop() == tag


def test_report_of_thirty_runs_is_one_small_page(tmp_path):
    """30 runs x 6 sets in <= 5 MB, no address to fetch, names escaped, tags balanced; see benchmarks/check_report.py."""
    rng, runs = np.random.default_rng(0), []
    for i in range(30):
        folder = tmp_path / f"run{i}"
        folder.mkdir()
        metrics = {
            s: {
                "n": 500,
                "top1": rng.random(),
                "balanced": 0.5,
                "head": None,
                "spearman_acc": 0.1 * rng.random(),
                "spearman_pred": rng.random(),
            }
            for s in ("val", "v2", "sketch", "rendition", "objectnet", "adversarial")
        }
        metrics["pairs"] = {"n": 9, "top1": None, "retrieval": {"i2t_r1": 0.25}}
        (folder / "metrics.json").write_text(json.dumps(metrics | {"run": {"step": 1}}))
        runs.append(f"<b>series{i % 3}/{i}={folder}")
    result = evaluate.report_runs(runs, "val", str(tmp_path / "r.html"), str(tmp_path / "r.md"), 20, 0)
    text = (tmp_path / "r.html").read_text()
    page = Page()
    page.feed(text)
    assert page.open == [] and page.addresses == [] and page.rows == 7 * 31
    assert len(text) < 5e6 and "<b>series" not in text and not re.search(r"https?://", text)
    assert result["sets"]["pairs"]["<b>series0/0"]["retrieval i2t_r1"]["value"] == 0.25
    assert (tmp_path / "r.md").read_text().count("\n| <b>series") == 30 * 7
    low = result["sets"]["val"]["<b>series1/1"]["top1"]["low"]
    assert 0 <= low < result["sets"]["val"]["<b>series1/1"]["top1"]["value"]


def test_report_of_one_run_has_every_interval(tmp_path):
    """Of a clip.py run (classes, pairs) and of k-NN and probe in metrics.json; the mean under shift has one too."""
    rng, labels, names = np.random.default_rng(0), np.arange(60) % 6, ("val", "v2", "sketch")
    metrics = {name: {"n": 60, "top1": 0.5, "knn": 0.25, "probe": 0.75} for name in names}
    for name in names:
        np.savez(tmp_path / f"{name}.npz", labels=labels, class_counts=np.arange(6) + 1,
                 predictions=np.where(rng.random(60) < 0.5, labels, 0))  # fmt: skip
    metrics["pairs"] = {"n": 40, "top1": None, "retrieval": {f"{w}_r{k}": 0.5 for w in ("i2t", "t2i") for k in (1, 5)}}
    images = rng.normal(size=(40, 8))
    np.savez(tmp_path / "pairs.npz", features=images, text_features=images + rng.normal(size=(40, 8)),
             image_ids=np.arange(40), labels=np.full(40, -1), class_counts=np.arange(6))  # fmt: skip
    (tmp_path / "metrics.json").write_text(json.dumps(metrics))
    result = evaluate.report_runs([str(tmp_path)], "val", str(tmp_path / "r.html"), "", 50, 0)
    for test_set, rows in result["sets"].items():
        for key, entry in next(iter(rows.values())).items():
            assert key == "n" or entry["low"] <= entry["value"] <= entry["high"], (test_set, key, entry)
            assert key == "n" or entry["low"] < entry["high"], (test_set, key, entry)
    assert {"knn", "probe", "top1"} < set(result["sets"]["val"][tmp_path.name])
    found = result["sets"]["pairs"][tmp_path.name]
    expected = next(iter(evaluate.retrieval([str(tmp_path / "pairs.npz")], [1, 5], 50, 0, "cpu")["rows"].values()))
    assert found["retrieval t2i_r5"] == expected["t2i_r5"] and len(found) == 5
    (tip,) = re.findall(r"<h2>Under shift.*?<title>(.*?)</title>", (tmp_path / "r.html").read_text(), re.S)
    assert re.search(r" 0\.\d+ \[0\.\d+, 0\.\d+\]$", tip), tip


def test_report_of_metrics_alone(tmp_path, capsys):
    """Classes of one size, told by top-1 and balanced accuracy: every interval; of others, and of recalls: a mark, on
    the terminal one that every encoding has."""
    even = {"n": 600, "top1": 0.5, "balanced": 0.5, "head": 0.6, "medium": 0.5, "tail": 0.4, "spearman_acc": 0.3,
            "spearman_pred": -0.4, "chance": 1 / 20, "knn": 0.4}  # fmt: skip
    sets = {"val": even, "v2": even | {"balanced": 0.45}, "pairs": {"n": 9, "retrieval": {"i2t_r1": 0.25}},
            "bare": {"top1": 0.25, "knn": 0.5}}  # fmt: skip
    (tmp_path / "metrics.json").write_text(json.dumps(sets))
    result = evaluate.report_runs([f"a={tmp_path}"], "val", str(tmp_path / "r.html"), str(tmp_path / "r.md"), 20, 0)
    row = result["sets"]["val"]["a"]
    for key, n in (("balanced", 600), ("head", 180), ("medium", 180), ("tail", 240)):  # 6, 6 and 8 classes of 30
        assert row[key] == evaluate.clopper_pearson(even[key], n)
    half = 1.96 * np.sqrt((1 + 0.3**2 / 2) / 17)
    assert row["spearman_acc"]["high"] == pytest.approx(np.tanh(np.arctanh(0.3) + half))
    assert row["spearman_pred"]["low"] < -0.4 < row["spearman_pred"]["high"]
    row = result["sets"]["v2"]["a"]
    bare = {key for key, entry in row.items() if key != "n" and entry["low"] is None}
    assert bare == {"balanced", "head", "medium", "tail", "spearman_acc"}
    for name in ("r.md", "r.html"):
        text = (tmp_path / name).read_text()
        assert "0.450 †" in text and "0.250 †" in text and text.count("† has no interval") == 1
        assert "--boot 0, or nothing in the files" in text
    evaluate.show({"v2": row})
    table = capsys.readouterr().out
    assert "0.450 *" in table and table.isascii()
    (tmp_path / "metrics.json").write_text(json.dumps({"val": even}))
    evaluate.report_runs([f"a={tmp_path}"], "val", str(tmp_path / "r.html"), "", 20, 0)
    assert "†" not in (tmp_path / "r.html").read_text()


def test_formula_of_the_rank_correlation_covers_it():
    """Normal pairs with correlation .6 have the rank correlation 6 / pi asin(.3); 1,000 samples of 30."""
    rng, inside = np.random.default_rng(0), []
    for _ in range(1000):
        x, y = rng.normal(size=(2, 30))
        rho = float(spearmanr(x, 0.6 * x + 0.8 * y).statistic)
        entry = evaluate.from_metrics({"top1": 0.5, "chance": 1 / 30, "spearman_pred": rho})["spearman_pred"]
        inside.append(entry["low"] <= 6 / np.pi * np.arcsin(0.3) <= entry["high"])
    assert 0.93 <= np.mean(inside) <= 0.97, np.mean(inside)


def test_report_under_shift_is_over_the_sets_of_all_runs(tmp_path):
    """A run without sketch is not compared by an average without it; `train` is no shift; x that differ by rounding."""
    for name, sets in (("a", {"val": 0.3, "v2": 0.4, "sketch": 0.1, "train": 0.9}), ("pairs", {}),
                       ("b", {"val": 0.1 + 0.2, "v2": 0.2, "train": 0.8})):  # fmt: skip
        (tmp_path / name).mkdir()
        metrics = {s: {"n": 100, "top1": v} for s, v in sets.items()} or {"pairs": {"retrieval": {"i2t_r1": 0.5}}}
        (tmp_path / name / "metrics.json").write_text(json.dumps(metrics))
    evaluate.report_runs([str(tmp_path / name) for name in ("a", "b", "pairs")], "val", str(tmp_path / "r.html"), "", 10, 0)
    text = (tmp_path / "r.html").read_text()
    assert "mean top-1 of v2 against val" in text and "a: 0.400" in text


def test_worlds_of_other_classes_are_no_shifts(tmp_path):
    """What dino_laionet.py --transfer probed is in metrics.json, and no shift of the training's classes."""
    for name, v2 in (("a", 0.4), ("b", 0.2)):
        (tmp_path / name / "transfer").mkdir(parents=True)
        metrics = {s: {"n": 100, "top1": x} for s, x in {"val": 0.5, "v2": v2, "digits": 0.9}.items()}
        (tmp_path / name / "metrics.json").write_text(json.dumps(metrics | {"run": {"data": "laionet"}}))
        np.savez(tmp_path / name / "transfer" / "digits_test.npz", labels=np.arange(3), features=np.ones((3, 2)))
        model = evaluate.models_of_run(tmp_path / name, "", "val", [], {}, {})
        assert set(model) == {"model", "group", "v2"} and model["group"] == "laionet"  # without args.json, as --eval-only
    evaluate.report_runs([str(tmp_path / name) for name in "ab"], "val", str(tmp_path / "r.html"), "", 10, 0)
    assert "digits against" not in (tmp_path / "r.html").read_text()


def test_report_begins_with_the_in_distribution_set(tmp_path):
    """Files alone, by name adversarial first; features or retrieval arrays beside them; accuracies beyond the axis."""
    rng, labels = np.random.default_rng(0), np.arange(2000) % 10
    for run, noise in (("a", 0.0), ("b", 0.02)):
        (tmp_path / run).mkdir()
        for name in "adversarial", "v2", "val":
            predictions = np.where(rng.random(2000) < noise * (name != "val"), 9 - labels, labels)
            predictions[: 1 if run == "b" else 0] = 5
            np.savez(tmp_path / run / f"{name}.npz", labels=labels, predictions=predictions, class_counts=np.arange(10))
        np.savez(tmp_path / run / "bank.npz", labels=labels, features=np.ones((2000, 2)), class_counts=np.arange(10))
        np.savez(tmp_path / run / "pairs.npz", labels=np.full(5, -1), features=np.ones((5, 2)))
    result = evaluate.report_runs([str(tmp_path / run) for run in "ab"], "val", str(tmp_path / "r.html"), "", 10, 0)
    assert list(result["sets"]) == ["val", "adversarial", "v2"]
    assert "mean top-1 of adversarial, v2 against val" in (tmp_path / "r.html").read_text()
    assert result["rows"]["a"]["top1"]["value"] == 1


def test_report_scores_predictions(tmp_path):
    rng = np.random.default_rng(0)
    labels = rng.integers(10, size=300)
    (tmp_path / "run").mkdir()
    np.savez(
        tmp_path / "run" / "val.npz",
        labels=labels,
        logits=rng.normal(size=(300, 10)) + np.eye(10)[labels],
        class_counts=np.arange(10),
    )
    row = evaluate.report_runs([str(tmp_path / "run")], "val", str(tmp_path / "r.html"), "", 50, 0)["rows"]["run"]
    assert row["spearman_acc"]["low"] < row["spearman_acc"]["value"] < row["spearman_acc"]["high"]
    assert "accuracy of frequency bins" in (tmp_path / "r.html").read_text()


def test_report_of_other_commands(tmp_path):
    """Files of --json become tables and the command's own plot, inside the page; other JSON is refused."""
    pytest.importorskip("matplotlib")
    zs, ft = biased_pair(tmp_path, n=600)
    for flags in (["imbalance", zs, ft, "--tail-classes", 4], ["calibration", zs], ["similarity", zs, ft],
                  ["debias", "--zeroshot", zs, "--finetuned", ft], ["compare", zs, ft]):  # fmt: skip
        if flags[0] == "similarity":
            with np.load(zs) as data:
                np.savez(tmp_path / "f.npz", features=data["logits"], labels=data["labels"])
            flags[1:] = [tmp_path / "f.npz", tmp_path / "f.npz"]
        run_here(evaluate, *flags, "--boot", 20, "--json", tmp_path / f"{flags[0]}.json")
    paths = [tmp_path / f"{name}.json" for name in ("imbalance", "calibration", "similarity", "debias", "compare")]
    run_here(evaluate, "report", *paths, "--out", tmp_path / "r.html", "--markdown", tmp_path / "r.md")
    page, text = Page(), (tmp_path / "r.html").read_text()
    page.feed(text)
    assert page.open == [] and page.addresses == [] and not re.search(r"https?://", text)
    pictures = re.findall(r"base64,([^\"]+)", text)
    assert [ElementTree.fromstring(base64.b64decode(p)).tag.split("}")[1] for p in pictures] == ["svg"] * 5
    assert "## debias: minus zero-shot" in (tmp_path / "r.md").read_text()
    (tmp_path / "x.json").write_text('{"a": 1}')
    with pytest.raises(SystemExit, match="not what --json"):
        run_here(evaluate, "report", tmp_path / "x.json", "--out", tmp_path / "r.html")


def test_samples_in_the_plane(tmp_path):
    """Images of frequent and of rare classes, never one class as both, and a mean for each."""
    rng, labels = np.random.default_rng(0), np.repeat(np.arange(30), 6)
    centers = 5 * rng.normal(size=(30, 8))
    np.savez(tmp_path / "a.npz", features=centers[labels] + rng.normal(size=(180, 8)), labels=labels,
             class_counts=np.arange(30, 0, -1))  # fmt: skip
    found = evaluate.sample_plane(str(tmp_path / "a.npz"), "", 4, 0)
    classes, is_rare = found["classes"], found["is_rare"]
    assert len(found["points"]) == 5 * (15 + 8) and found["n_means"] == 23
    assert set(classes[is_rare]) == set(range(22, 30)) and set(classes[~is_rare]) == set(range(15))


@pytest.mark.parametrize("kind", ["png", "svg"])
def test_every_plot_is_drawn(tmp_path, kind):
    """Each family's plot from its own numbers, by way of JSON, as main does it."""
    pytest.importorskip("matplotlib")
    zs, ft = biased_pair(tmp_path, n=600)
    with np.load(zs) as data:
        arrays = dict(data)
    rng = np.random.default_rng(0)
    arrays |= {"features": rng.normal(size=(600, 8)), "prototypes": rng.normal(size=(12, 8))}
    np.savez(tmp_path / "full.npz", **arrays)
    full, pairs = str(tmp_path / "full.npz"), str(tmp_path / "pairs.npz")
    np.savez(pairs, features=rng.normal(size=(20, 4)), text_features=rng.normal(size=(20, 4)))
    (tmp_path / "t.csv").write_text("model,group,val,v2\na,x,50,40\nb,x,60,50\nc,x,70,62\nd,y,65,61\n")
    (tmp_path / "a.txt").write_text("5\n0\n7\n")
    (tmp_path / "b.txt").write_text("6\n1\n7\n")
    counts = [str(tmp_path / "a.txt"), str(tmp_path / "b.txt")]
    results = [
        (evaluate.plot_imbalance, evaluate.imbalance([zs], "", "", (100, 20), 3, 5, 4, False, 10, 0)),
        (
            evaluate.plot_robustness,
            evaluate.robustness([str(tmp_path / "t.csv")], "val", [], "x", "", {}, {}, {}, 0, 0),
        ),
        (evaluate.plot_collapse, evaluate.collapse([full], "", 10, 0)),
        (evaluate.plot_similarity, evaluate.similarity(full, full, 10, 20, 3, 10, 0)),
        (evaluate.plot_prototypes, evaluate.prototypes(full, "", "", [0.1, 0.2], 3, True, 9, 10, 0, "cpu")),
        (evaluate.plot_debias, evaluate.debias(zs, ft, "", "", {}, [], "", "prior", True, 10, 0)),
        (evaluate.plot_calibration, evaluate.calibration([zs], 10, 0.5, 10, 0)),
        (evaluate.plot_compare, evaluate.compare([zs], [ft], "", 10, 0)),
        (evaluate.plot_retrieval, evaluate.retrieval([pairs], [1, 5], 10, 0, "cpu")),
        (evaluate.plot_transfer, evaluate.transfer("knn", [full, full], [], [3], "", 0, "top1", [], 0, 10, 0, "cpu")),
        (evaluate.plot_concepts, evaluate.shared_tail(counts, 10, 0)),
        (evaluate.plot_concepts, evaluate.agreement(counts, 10, 0)),
        (evaluate.plot_concepts, evaluate.concept_sets([zs, ft], "", 10, 0)),
    ]
    curve = {a: {"val": evaluate.estimate(v), "v2": evaluate.estimate(v - 0.2)} for a, v in (("0", 0.5), ("1", 0.7))}
    results.append((evaluate.plot_wiseft, {"rows": curve, "id": "val"}))
    for i, (draw, result) in enumerate(results):
        path = tmp_path / f"{i}.{kind}"
        draw(json.loads(json.dumps(evaluate.plain(result))), str(path))
        assert path.stat().st_size > 3000


def test_similarity_of_other_classes_is_refused(tmp_path):
    rng, labels = np.random.default_rng(0), np.repeat(np.arange(3), 8)
    for name, names in (("a", ["x", "y", "z"]), ("b", ["z", "y", "x"])):
        np.savez(tmp_path / f"{name}.npz", features=rng.normal(size=(24, 4)), labels=labels, class_names=names)
    with pytest.raises(SystemExit, match="their class_names differ"):
        evaluate.similarity(str(tmp_path / "a.npz"), str(tmp_path / "b.npz"), 50, 20, 7, 10, 0)


@pytest.mark.parametrize("order", ["ab", "ba"])
def test_collapse_of_models_with_and_without_class_vectors(tmp_path, order):
    rng, labels = np.random.default_rng(0), np.repeat(np.arange(4), 10)
    arrays = dict(features=rng.normal(size=(40, 6)), labels=labels, class_counts=np.arange(1, 5))
    np.savez(tmp_path / "a.npz", prototypes=rng.normal(size=(4, 6)), **arrays)
    np.savez(tmp_path / "b.npz", **arrays)
    run_here(evaluate, "collapse", *(tmp_path / f"{name}.npz" for name in order), "--boot", 20, "--plot", tmp_path / "c.svg")
    assert "NC2_W" in (tmp_path / "c.svg").read_text()


def test_the_tail_is_the_rarest(tmp_path):
    """The three rarest classes share a direction, the others have none in common."""
    prototypes = np.eye(8)[[0, 1, 2, 3, 4, 5, 7, 7, 7]]
    np.savez(tmp_path / "a.npz", prototypes=prototypes, class_counts=[90, 80, 70, 60, 50, 40, 3, 2, 1])
    path = str(tmp_path / "a.npz")
    rows = evaluate.prototypes(path, "", "", [0.025], 3, False, 0, 0, 0, "cpu")["rows"]
    cosines = [rows[f"{part} cosine"]["value"]["value"] for part in ("tail-tail", "head-head")]
    assert cosines == pytest.approx([1, 0])


def test_counts_of_classes_are_not_those_of_images(tmp_path):
    rng = np.random.default_rng(0)
    np.savez(tmp_path / "a.npz", prototypes=np.eye(4), class_counts=np.arange(4), features=rng.normal(size=(9, 5)))
    found = evaluate.prototypes(str(tmp_path / "a.npz"), "features", "", [0.025], 2, False, 0, 0, 0, "cpu")
    assert found["rows"]["K"]["value"] == 9 and not found["affinity"]


def test_what_is_missing_is_told_before_the_work(tmp_path, monkeypatch, capsys):
    """scikit-learn, rows for t-SNE, matplotlib; a report without matplotlib has its tables."""
    zs, ft = biased_pair(tmp_path, n=200)
    run_here(evaluate, "compare", zs, ft, "--boot", 10, "--json", tmp_path / "c.json")
    np.save(tmp_path / "few.npy", np.eye(3))
    for name in ("greedy_cover", "imbalance"):
        monkeypatch.setattr(evaluate, name, None)
    with pytest.raises(SystemExit, match="t-SNE of 3 rows|scikit-learn"):
        run_here(evaluate, "prototypes", tmp_path / "few.npy", "--tsne")
    for name in ("sklearn.manifold", "matplotlib", "matplotlib.figure"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(SystemExit, match="scikit-learn"):
        run_here(evaluate, "prototypes", tmp_path / "few.npy", "--tsne")
    with pytest.raises(SystemExit, match="matplotlib"):
        run_here(evaluate, "imbalance", zs, "--plot", tmp_path / "x.svg")
    run_here(evaluate, "report", tmp_path / "c.json", "--out", tmp_path / "r.html")
    assert "c: tables without plots: pip install matplotlib" in capsys.readouterr().err
    text = (tmp_path / "r.html").read_text()
    assert "<td" in text and "<img" not in text


def test_marks_on_the_terminal_have_a_legend(tmp_path):
    """Where there is one, once, below all tables; and means over models have a table of their own, and a line."""
    pytest.importorskip("matplotlib")
    zs, ft = biased_pair(tmp_path, n=600)
    for flags, is_marked in ((["compare", zs, ft], True), (["calibration", zs], False), (["robustness", tmp_path / "t.csv"], True)):
        (tmp_path / "t.csv").write_text("model,val,v2\na,50,40\nb,60,50\n")
        printed = run_here(evaluate, *flags, "--boot", 20)
        assert (" *" in printed) == is_marked and printed.count("\n* has no interval: ") == is_marked
    flags = ["imbalance", zs, ft, "--boot", 20, "--bins", 3]
    printed = run_here(evaluate, *flags, "--plot", tmp_path / "i.svg", "--json", tmp_path / "i.json")
    assert re.search(r"^bins_over_models.*\n(bin \d  .*\n){3}", printed, re.M)
    assert "mean of the models" in (tmp_path / "i.svg").read_text()
    run_here(evaluate, "report", tmp_path / "i.json", "--out", tmp_path / "r.html")
    assert "i: bins_over_models" in (tmp_path / "r.html").read_text()


def test_models_of_other_frequencies_have_no_common_bins(tmp_path, capsys):
    zs, ft = biased_pair(tmp_path, n=600)
    with np.load(ft) as file:
        np.savez(ft, **{key: file[key] + (key == "class_counts") for key in file.files})
    assert evaluate.imbalance([zs, ft], "", "", (100, 20), 0, 10, 3, False, 0, 0)["bins_over_models"] == []
    assert "imbalance: no bins_over_models" in capsys.readouterr().err


def test_report_of_eight_runs_and_one_shift(tmp_path):
    """The chart of bins says which runs it shows; one shift is a shift."""
    rng, labels = np.random.default_rng(0), np.arange(60) % 6
    for i in range(8):
        (tmp_path / f"run{i}").mkdir()
        for name in "val", "v2":
            predictions = np.where(rng.random(60) < 0.5, labels, 0)
            np.savez(tmp_path / f"run{i}" / f"{name}.npz", labels=labels, predictions=predictions, class_counts=np.arange(6))
    for n in 7, 8:
        runs = [str(tmp_path / f"run{i}") for i in range(n)]
        evaluate.report_runs(runs, "val", str(tmp_path / "r.html"), "", 5, 0)
        text = (tmp_path / "r.html").read_text()
        assert ("accuracy of frequency bins, the first 7 of 8 runs" in text) == (n == 8)
        assert "<h2>Under shift</h2>" in text and "mean top-1 of v2 against val" in text


def test_a_dollar_in_a_name_is_no_formula(tmp_path):
    """Neither in a legend nor on an axis; powers of ten stay powers."""
    pytest.importorskip("matplotlib")
    zs, ft = biased_pair(tmp_path, n=200)
    paths = [str(tmp_path / f"{name}.npz") for name in ("a$x_1$", "b$x_1$")]
    for old, new in zip((zs, ft), paths):
        Path(old).rename(new)
    run_here(evaluate, "imbalance", *paths, "--boot", 0, "--plot", tmp_path / "i.svg")
    run_here(evaluate, "concepts", "accuracy", *paths, "--boot", 0, "--plot", tmp_path / "c.svg")
    pages = [(tmp_path / f"{name}.svg").read_text() for name in "ic"]
    assert all(f">{name}$x_1$</text>" in page for page in pages for name in "ab")
    assert ">1</tspan>" in pages[0]  # of a power of ten, digit by digit


def test_small_eigenvalues_are_dropped_as_by_torch_pinv():
    """S_b with eigenvalues 1, 4e-6 and 5e-7 in 10 dimensions: float32's default is 10 x 1.19e-7, so two are kept."""
    signs = np.array([[1, 1, 1], [1, -1, -1], [-1, 1, -1], [-1, -1, 1]])
    means = np.zeros((4, 10))
    means[:, :3] = signs * np.sqrt([1, 4e-6, 5e-7])
    labels = np.repeat(np.arange(4), 30)
    noise = np.random.default_rng(0).normal(size=(120, 10))
    features = means[labels] + noise - evaluate.class_means(noise, labels, 4)[labels]
    nc1, rank, _ = evaluate.within_variability(features, labels, means)
    inverse = torch.linalg.pinv(torch.from_numpy(np.cov(means.T, bias=True)).float()).double().numpy()
    h = features - means[labels]
    assert rank == 2 and nc1.mean() == pytest.approx(np.trace(h.T @ h / 120 @ inverse) / 4, rel=1e-4)


def test_collapse_centres_means_and_not_class_vectors(tmp_path):
    """Orthogonal ones: a simplex centred, .5 uncentred, of three classes; the mark is on the other way round. Intervals
    are those of the same way."""
    rng, labels = np.random.default_rng(0), np.repeat(np.arange(3), 40)
    features = 4 * np.eye(3)[labels] + 0.5 * rng.normal(size=(120, 3))
    np.savez(tmp_path / "a.npz", features=features, labels=labels, prototypes=np.eye(3))
    result = evaluate.collapse([str(tmp_path / "a.npz")], "", 20, 0)
    (model,) = result["models"].values()
    for name, value in ("NC2_W", 0.5), ("NC2_W centred", 0), ("NC2_M uncentred", 0.5), ("NC2_M", 0):
        assert result["rows"][name]["mean"]["value"] == pytest.approx(value, abs=1e-12 if "W" in name else 0.1)
    means = evaluate.class_means(features, labels, 3)
    for name, is_centred in ("NC2_M", True), ("NC2_M uncentred", False):
        half = evaluate.jackknife_of_means(
            features, labels, means, lambda m, c=is_centred: evaluate.cosine_gaps(m, c)[0], np.random.default_rng(0))
        np.testing.assert_allclose(model[f"{name}_interval"][:, 1], model[name] + half)


def test_similarity_tests_both_sides(tmp_path, monkeypatch):
    """Where both sets are draws of one distribution p-values are uniform: their mean is .5, of 300 classes to .05."""
    rng, labels, seen = np.random.default_rng(0), np.repeat(np.arange(300), 20), []
    for name in "ab":
        np.savez(tmp_path / f"{name}.npz", labels=labels, features=rng.normal(size=(6000, 8)) + 1)
    control = evaluate.false_discovery_control
    monkeypatch.setattr(evaluate, "false_discovery_control", lambda p: seen.append(p) or control(p))
    evaluate.similarity(str(tmp_path / "a.npz"), str(tmp_path / "b.npz"), 10, 20, 7, 100, 0)
    assert seen[0].mean() == pytest.approx(0.5, abs=0.05)


def test_similarity_takes_as_many_pairs_of_both_sets(tmp_path):
    """4 and 8 images have 6 and 28 pairs: the distribution has 6 of both, and a class of 6 is enough for 6; of 8 images
    --max-images 3 leaves three pairs."""
    rng = np.random.default_rng(0)
    for name, n in ("a", 4), ("b", 8):
        np.savez(tmp_path / f"{name}.npz", labels=np.zeros(n, int), features=rng.normal(size=(n, 5)))
    a, b = str(tmp_path / "a.npz"), str(tmp_path / "b.npz")
    assert [len(pairs) for pairs in evaluate.similarity(a, b, 20, 9, 6, 10, 0)["pairs"]] == [6, 6]
    assert [len(pairs) for pairs in evaluate.similarity(a, b, 5, 9, 6, 10, 0)["pairs"]] == [5, 5]
    with pytest.raises(SystemExit, match="no class with 7 pairs"):
        evaluate.similarity(a, b, 20, 9, 7, 10, 0)
    found = evaluate.similarity(b, b, 20, 3, 1, 10, 0)["pairs"]
    assert all(len(set(pairs.tolist())) <= 3 for pairs in found)


def test_prototypes_are_directions(tmp_path):
    """Angles 0, 60 and 180 degrees, of any length: the nearest other is 60, 60 and 120 away. Axes of lengths 1, 10 and
    100 have the effective rank 3, their simplex 2."""
    def found(vectors, counts):
        np.savez(tmp_path / "a.npz", prototypes=vectors, class_counts=counts)
        return evaluate.prototypes(str(tmp_path / "a.npz"), "", "", [0.025], 2, False, 0, 0, 0, "cpu")

    vectors = on_circle(0, 60, 180).numpy() * [[1.0], [10], [100]]
    assert found(vectors, [3, 2, 1])["margin"] == pytest.approx([0.5, 0.5, 1.5], abs=1e-6)
    rows = found(np.diag([1.0, 10, 100]), [3, 2, 1])["rows"]
    assert rows["effective rank"]["value"] == pytest.approx(3, abs=1e-6)
    assert rows["effective rank, centred"]["value"] == pytest.approx(2, abs=1e-6)


def test_the_head_is_a_random_choice_of_the_others(tmp_path):
    """Of 20 classes the two most frequent share a direction: not every choice of two of 18 is theirs."""
    np.savez(tmp_path / "a.npz", prototypes=np.eye(20)[[0, 0, *range(2, 20)]], class_counts=np.arange(20, 0, -1))
    rows = [evaluate.prototypes(str(tmp_path / "a.npz"), "", "", [0.1], 2, False, 0, 0, seed, "cpu")["rows"]
            for seed in range(4)]  # fmt: skip
    assert 0 in [row["head-head cosine"]["value"]["value"] for row in rows]


def test_thirds_by_the_estimated_prior(tmp_path):
    """--group-by prior: those of q, here none of those by counts."""
    zs, ft = biased_pair(tmp_path, n=1200)
    test, order = np.ones(1200, bool), np.random.default_rng(0).permutation(1200)
    with np.load(ft) as file:
        labels, right, counts = file["labels"], file["logits"].argmax(1) == file["labels"], file["class_counts"]
    test[order[np.argsort(labels[order], kind="stable")][::2]] = False
    per_class = np.array([right[test & (labels == c)].mean() for c in range(12)])
    heads = []
    for group_by in "counts", "prior":
        result = evaluate.debias(zs, ft, "", "", {}, [], "", group_by, False, 0, 0)
        frequency = counts if group_by == "counts" else result["chosen"]["q"]
        heads.append(per_class[np.argsort(-frequency)[:4]].mean())
        assert result["rows"]["fine-tuned"]["head"]["value"] == pytest.approx(heads[-1])
        said = spearmanr(frequency, np.bincount(np.load(ft)["logits"].argmax(1)[test], minlength=12)).statistic
        assert result["rows"]["fine-tuned"]["spearman_pred"]["value"] == pytest.approx(said)
    assert heads[0] != heads[1]


def test_calibrated_logits_have_no_scale(tmp_path):
    """--calibrate: logits of either model times a number are the same logits."""
    zs, ft = biased_pair(tmp_path, n=1200)
    results = [evaluate.debias(zs, ft, "", "", {}, [], "", "counts", True, 0, 0)]
    for path, scale in (zs, 3.0), (ft, 0.25):
        with np.load(path) as file:
            arrays = {k: file[k] * scale if k == "logits" else file[k] for k in file.files}
        np.savez(path, **arrays)
    results.append(evaluate.debias(zs, ft, "", "", {}, [], "", "counts", True, 0, 0))
    t = [[result["chosen"][f"T {name}"]["value"] for name in ("zero-shot", "fine-tuned")] for result in results]
    assert t[1] == pytest.approx([3 * t[0][0], 0.25 * t[0][1]], rel=1e-4)
    for name, row in results[0]["rows"].items():
        assert row["top1"]["value"] == pytest.approx(results[1]["rows"][name]["top1"]["value"], abs=2 / 600), name


def test_what_is_taken_off_logits_by_hand(tmp_path, monkeypatch):
    """lambda ln of the mean softmax; a class never seen counts half an image, of shares half of the least one."""
    rng, labels = np.random.default_rng(0), np.arange(300) % 3
    v_zs = rng.normal(size=(300, 3)) + np.eye(3)[labels] + [3, 0, 0]
    val = {"zs": v_zs, "ft": v_zs, "labels": labels}
    zeros = {"logits": np.zeros((1, 3))}
    out, chosen = evaluate.debias_logits(zeros, zeros, val, np.zeros(3), False, 0, 0)
    mean = softmax(v_zs.astype(np.float32), axis=1).mean(0)
    assert chosen["lambda"]["value"] > 0
    np.testing.assert_allclose(out["zero-shot - lambda ln mean"][0], -chosen["lambda"]["value"] * np.log(mean), rtol=1e-5)

    seen, make = [], evaluate.debias_logits
    monkeypatch.setattr(evaluate, "debias_logits", lambda *a: seen.append(np.exp(a[3])) or make(*a))
    np.savez(tmp_path / "a.npz", labels=labels, logits=v_zs)
    for counts in ([100, 10, 0], [0.9, 0.1, 0]):
        (tmp_path / "prior.txt").write_text("\n".join(map(str, counts)))
        evaluate.debias(*[str(tmp_path / "a.npz")] * 2, "", "", {}, [], str(tmp_path / "prior.txt"), "counts", False, 0, 0)
    assert seen[0] == pytest.approx(np.array([100, 10, 0.5]) / 110.5)
    assert seen[1] == pytest.approx(np.array([0.9, 0.1, 0.05]) / 1.05)


def test_ratios_are_of_classes_that_both_have_seen(tmp_path):
    """Ratios 2 and 3 beside zeros on either side: the median is 2.5. The top tenth of 15 classes is one class."""
    for name, counts in ("a", [0, 0, 4, 9, 7]), ("b", [5, 5, 2, 3, 0]):
        (tmp_path / f"{name}.txt").write_text("\n".join(map(str, counts)))
    paths = [str(tmp_path / f"{name}.txt") for name in "ab"]
    assert evaluate.agreement(paths, 0, 0)["rows"]["a, b"]["median A / B"]["value"] == 2.5
    assert evaluate.top_share(np.r_[30, np.ones(14)]) == pytest.approx(30 / 44)
    assert evaluate.top_share(np.r_[30, 20, np.ones(18)]) == pytest.approx(50 / 68)


def test_concept_sets_are_means_over_models(tmp_path):
    """MODEL/SET.npz: a row a set, of its models."""
    labels, top1 = np.arange(20) % 4, {("m1", "coco"): 10, ("m2", "coco"): 16, ("m1", "lvis"): 4, ("m2", "lvis"): 20}
    for (model, name), n in top1.items():
        (tmp_path / model).mkdir(exist_ok=True)
        predictions = np.where(np.arange(20) < n, labels, (labels + 1) % 4)
        np.savez(tmp_path / model / f"{name}.npz", labels=labels, predictions=predictions, class_counts=np.arange(1, 5))
    paths = [str(tmp_path / model / f"{name}.npz") for model, name in top1]
    rows = evaluate.concept_sets(paths, "", 0, 0)["rows"]
    assert {name: (row["models"], row["top1"]["value"]) for name, row in rows.items()} == {
        "coco": (2, pytest.approx(0.65)), "lvis": (2, pytest.approx(0.6))}  # fmt: skip


def test_the_mean_under_shift_is_over_all_shifts(tmp_path):
    sets = {"val": 0.9, "v2": 0.5, "sketch": 0.2, "train": 1.0}
    (tmp_path / "metrics.json").write_text(json.dumps({s: {"n": 100, "top1": v} for s, v in sets.items()}))
    evaluate.report_runs([f"a={tmp_path}"], "val", str(tmp_path / "r.html"), "", 10, 0)
    (tip,) = re.findall(r"<h2>Under shift.*?<title>(.*?)</title>", (tmp_path / "r.html").read_text(), re.S)
    assert tip.startswith("a: 0.350 [")


@pytest.mark.parametrize("spread", ["head", "tail"])
def test_head_tail_cosine_resamples_both(spread):
    """One side is a single direction, ten times: the interval is that of the other's mean."""
    rng = np.random.default_rng(0)
    rows, same = evaluate.unit_rows(rng.normal(size=(10, 3))), np.tile([1.0, 0, 0], (10, 1))
    sides = (rows, same) if spread == "head" else (same, rows)
    found = evaluate.affinity(np.concatenate(sides), np.arange(10), np.arange(10, 20), 4000, rng)["head-tail cosine"]
    assert found["value"] == pytest.approx(rows[:, 0].mean())
    assert found["high"] - found["low"] == pytest.approx(2 * 1.96 * rows[:, 0].std() / 10**0.5, rel=0.1)


def test_accuracies_beside_collapse_have_intervals_of_their_classes(tmp_path):
    labels = np.repeat([0, 1], [40, 10])
    np.savez(tmp_path / "a.npz", labels=labels, features=np.random.default_rng(0).normal(size=(50, 3)),
             predictions=np.repeat([0, 1, 0], [30, 15, 5]))  # fmt: skip
    (model,) = evaluate.collapse([str(tmp_path / "a.npz")], "", 0, 0)["models"].values()
    exact = [binomtest(k, n).proportion_ci(method="exact") for k, n in ((30, 40), (5, 10))]
    np.testing.assert_allclose(model["accuracy_interval"], [(e.low, e.high) for e in exact])


def test_discoveries_are_those_up_to_5_percent(tmp_path, monkeypatch):
    """Two classes that are surely more alike in A, with adjusted p of .05 and .06."""
    rng, labels = np.random.default_rng(0), np.repeat([0, 1], 8)
    for name, shift in ("a", 9), ("b", 0):
        np.savez(tmp_path / f"{name}.npz", labels=labels, features=rng.normal(size=(16, 5)) + shift)
    monkeypatch.setattr(evaluate, "false_discovery_control", lambda p: np.array([0.05, 0.06]))
    rows = evaluate.similarity(str(tmp_path / "a.npz"), str(tmp_path / "b.npz"), 10, 9, 7, 200, 0)["rows"]
    shares = [rows[f"share of classes more alike in A{end}"]["value"]["value"] for end in ("", ", 5 % false discoveries")]
    assert shares == [1, 0.5]


def test_the_matrix_of_cosines_begins_with_the_head(tmp_path):
    np.savez(tmp_path / "a.npz", prototypes=np.eye(3)[[0, 0, 1, 2]], class_counts=[9, 8, 2, 1])
    found = evaluate.prototypes(str(tmp_path / "a.npz"), "", "", [0.1], 2, False, 0, 0, 0, "cpu")["affinity"]
    assert found[0, 1] == pytest.approx(1) and found[2, 3] == pytest.approx(0)


def test_rare_classes_of_the_plane_are_the_rarest_4_percent(tmp_path, monkeypatch):
    """Of 220 classes the eight rarest."""
    monkeypatch.setattr(evaluate, "tsne", lambda array, _: array[:, :2])
    np.savez(tmp_path / "a.npz", labels=np.arange(220), features=np.eye(220), class_counts=np.arange(220, 0, -1))
    found = evaluate.sample_plane(str(tmp_path / "a.npz"), "", 1, 0)
    assert set(found["classes"][found["is_rare"]]) == set(range(212, 220)) and found["n_means"] == 25 + 8


def test_tau_normalisation_ends_at_a_cosine_head():
    """Rows of length 4 and 1: features (2, 1) are of class 1 from tau 1.5 on, (10, 1) of class 0 up to 2.6."""
    head, x = np.diag([4.0, 1]), np.array([[2.0, 1], [10, 1]])
    val = {"zs": np.zeros((2, 2)), "ft": x @ head.T, "labels": np.array([1, 0]), "ft_features": x}
    ft = {"logits": x @ head.T, "features": x, "prototypes": head}
    _, chosen = evaluate.debias_logits({"logits": np.zeros((2, 2))}, ft, val, np.zeros(2), False, 0, 0)
    assert chosen["tau-norm"]["value"] == 0  # the first of equals


def test_interpolated_weights_are_rounded_once():
    """Sums in float64, as NumPy's; counts above 2^24 are exact."""
    rng = np.random.default_rng(0)
    a, b = ({"w": torch.from_numpy(rng.normal(size=1000)).float(), "n": torch.tensor(n)} for n in (20_000_001, 20_000_003))
    mixed = evaluate.interpolate(a, b, 0.5)
    assert mixed["n"].item() == 20_000_002
    w = {k: v["w"].double().numpy() for k, v in (("a", a), ("b", b))}
    np.testing.assert_array_equal(evaluate.interpolate(a, b, 0.25)["w"], (w["a"] + 0.25 * (w["b"] - w["a"])).astype(np.float32))


def test_frequency_bins_of_a_report_by_hand(tmp_path):
    """16 classes from 1 to 10^5 images in eight bins of two: log10 of their mean count, and the mean accuracy."""
    counts = np.rint(10 ** np.linspace(0, 5, 16)).astype(int)
    labels = np.arange(16).repeat(2)
    predictions = np.where(np.arange(32) % 4 == 0, (labels + 1) % 16, labels)
    np.savez(tmp_path / "val.npz", labels=labels, predictions=predictions, class_counts=counts)
    bins = evaluate.score_run(tmp_path, 0, 0)["val"]["bins"]
    assert [b[0] for b in bins] == pytest.approx(np.log10(counts.reshape(8, 2).mean(1)))
    assert [(b[1], b[4]) for b in bins] == [(0.75, "2 classes")] * 8


def test_cells_are_sorted_by_more_digits_than_they_show():
    assert 'data-v="0.123457">0.123 ' in evaluate.html_cell({"value": 0.1234567, "low": 0.1, "high": 0.2})


def test_lengths_of_error_bars():
    """Below, then above; none without an interval."""
    cells = [{"value": 0.5, "low": 0.4, "high": 0.8}, {"value": 0.3, "low": None, "high": None}]
    np.testing.assert_allclose(evaluate.error_bars(cells), [[0.1, 0], [0.3, 0]])


def test_what_plots_show(tmp_path, monkeypatch):
    """Every panel has the numbers that its title says: log odds with their own ends, the thick mean of the models,
    correlations with accuracy and with frequency, sorted differences, frequencies in the order of the first."""
    pytest.importorskip("matplotlib")
    seen, e = [], lambda value, low=None, high=None: {"value": value, "low": low, "high": high}  # noqa: E731
    monkeypatch.setattr(evaluate, "save_figure", lambda figure, *_: seen.append(figure.axes))
    rows = {a: {"val": e(v), "v2": e(0.5, 0.4, 0.7)} for a, v in (("0", 0.6), ("1", 0.8))}
    evaluate.plot_wiseft({"rows": rows, "id": "val"}, "")
    line, _, (bars,) = seen[-1][0].containers[0].lines
    assert line.get_xdata() == pytest.approx(logit([0.6, 0.8])) and line.get_ydata() == pytest.approx([0, 0])
    assert bars.get_segments()[0][:, 1] == pytest.approx(logit([0.4, 0.7]))

    paths = [str(tmp_path / f"{i}.npz") for i in range(2)]
    for path, wrong in zip(paths, (1, 3)):
        labels = np.repeat([0, 1], 4)
        np.savez(path, labels=labels, predictions=np.where(np.arange(8) < wrong, 1, labels), class_counts=[9, 1])
    evaluate.plot_imbalance(evaluate.plain(evaluate.imbalance(paths, "", "", (100, 20), 0, 1, 2, True, 0, 0)), "")
    thick = [line for axis in seen[-1][:2] for line in axis.lines if line.get_linewidth() == 4]
    assert [line.get_ydata().tolist() for line in thick] == [[1, 0.5], [1.5, 0.5]]

    model = {"NC1": [0.1, 0.2], "accuracy": [1, 1]}
    evaluate.plot_collapse({"models": {"m": model}, "rows": {"NC1": {"rho(acc)": e(-0.5), "rho(freq)": e(0.25)}}}, "")
    assert [(a.get_ylabel(), a.containers[0].lines[0].get_ydata().tolist()) for a in seen[-1]] == [
        ("Spearman with accuracy", [-0.5]), ("Spearman with frequency", [0.25])]  # fmt: skip

    ends = [e(v, v - 0.1, v + 0.2) for v in (0.3, -0.2, 0.1)]
    evaluate.plot_similarity({"names": ["a", "b"], "pairs": [[0.1, 0.2], [0.3, 0.4]], "differences": ends}, "")
    assert seen[-1][1].lines[0].get_ydata() == pytest.approx([-0.2, 0.1, 0.3])

    evaluate.plot_concepts({"counts": {"a": [1, 9, 4], "b": [7, 0, 2]}}, "")
    assert [line.get_ydata().tolist() for line in seen[-1][0].lines[::2]] == [[9, 4, 1], [0.5, 2, 7]]


def test_single_images_vary_as_one_class():
    """Two classes of one image, log odds 1 and -1: the slopes +-.2689 have a standard error of .2689, the curvature is
    .1966. Of a variance that is not known at all t has one degree of freedom."""
    ends = evaluate.prior_interval(np.array([[1.0, 0], [0, 1]]), np.arange(2), np.full(2, 0.5))
    assert logit(ends) == pytest.approx(np.tile(1.96 * 0.26894 / 0.19661 * np.array([-1, 1]), (2, 1)), rel=1e-3)
    assert evaluate.t_quantile(np.array(1.0), np.array(100.0)) == pytest.approx(12.706, abs=1e-3)


def test_tau_varies_with_both_models():
    """Accuracies of 100 images each at .5: the difference has a standard error of .05 times the root of two."""
    models = [{"model": m, "group": "g", "s": (0.4 + 0.05 * i, 100, 0.5, 100)} for i, m in enumerate("abcd")]
    tau = evaluate.effective_robustness(models, ["s"], "g", "a", {}, 3000, 0)["rows"]["b"]["s tau"]
    assert (tau["high"] - tau["low"]) / 2 == pytest.approx(1.96 * 0.05 * 2**0.5, rel=0.1)
