"""sl_vocab_subsample.py: vocabularies, losses, samplers and readers, against hand computation and simulation."""

import math
from argparse import Namespace
from contextlib import nullcontext

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import torchvision
import torchvision.transforms.v2.functional as tv
from programs import named

import dino_laionet as dino
import sl_vocab_subsample as sl


def draw(counts, present, M, power=1.0, n=1, n_arrivals=0):
    """n independent vocabularies: [n, C] bool, and ln q."""
    draws = sl.draws_of(torch.tensor(counts), M, power)._replace(n_arrivals=n_arrivals)
    vocab, log_q = torch.zeros(n, len(counts), dtype=torch.bool), torch.zeros(n, len(counts))
    for row in range(n):
        ids, values = sl.draw_vocab(torch.tensor(present), draws, row)
        assert len(ids) == len(set(ids.tolist()))  # none twice
        vocab[row, ids], log_q[row, ids] = True, values
    return vocab, log_q


# The race alone, the race after a few arrivals, and (nearly always) arrivals alone have one law.
routes = pytest.mark.parametrize("n_arrivals", [0, 4, 100])


@routes
def test_inclusion_by_hand(n_arrivals):
    """Weights (2, 1, 1), two drawn: inclusion 5/6, 7/12, 7/12 (first 1/2, 1/4, 1/4, then renormalised)."""
    n = 4_000
    vocab, _ = draw([2, 1, 1, 9], [3], M=3, n=n, n_arrivals=n_arrivals)
    assert (vocab.sum(1) == 3).all() and vocab[:, 3].all()
    assert np.allclose(vocab[:, :3].double().mean(0), [5 / 6, 7 / 12, 7 / 12], atol=4 * 0.5 / math.sqrt(n))


@pytest.mark.parametrize("power, n_arrivals", [(0.0, 0), (0.5, 4), (1.0, 0), (1.0, 4), (1.0, 100)])
def test_same_law_as_numpys_choice_without_replacement(power, n_arrivals):
    """Frequency of each drawn set, against Generator.choice(replace=False, p), which draws one after the other."""
    counts, n, M = np.array([50, 20, 10, 5, 1]), 4_000, 2
    vocab, _ = draw(counts.tolist() + [7], [5], M + 1, power, n, n_arrivals)
    ours = np.bincount(vocab[:, :5].numpy() @ (1 << np.arange(5)), minlength=32) / n
    rng, weights = np.random.default_rng(0), counts**power / (counts**power).sum()
    theirs = np.zeros(32)
    for _ in range(n):
        theirs[(1 << rng.choice(5, M, replace=False, p=weights)).sum()] += 1 / n
    assert np.abs(ours - theirs).max() < 5 * math.sqrt(2 * 0.25 / n)


@routes
def test_federated_rule_of_lvis(n_arrivals):
    """Classes of the batch first, then by count ** 0.5 until M: as torch.multinomial without replacement draws them."""
    counts, present, n = [400, 100, 25, 16, 4, 1], [2], 4_000
    vocab, _ = draw(counts, present, 3, 0.5, n, n_arrivals)
    weights = torch.tensor(counts).double().sqrt()
    weights[present] = 0
    theirs = F.one_hot(torch.multinomial(weights.expand(n, -1), 2), len(counts)).sum(1).double().mean(0)
    theirs[present] = 1
    assert (vocab.double().mean(0) - theirs).abs().max() < 5 * math.sqrt(2 * 0.25 / n)


@routes
def test_classes_without_images_are_drawn_by_power_0_only(n_arrivals):
    counts = [5, 0, 3, 0, 2, 0]
    vocab, log_q = draw(counts, [0, 3], 5, 1.0, 200, n_arrivals)
    assert (vocab == torch.tensor([True, False, True, True, True, False])).all()  # those that have images, none twice
    assert (log_q == 0).all()  # each of them for certain
    vocab, _ = draw(counts, [0], 4, 0.0, 200, n_arrivals)
    assert vocab.any(0).all() and (vocab.sum(1) == 4).all()


@routes
def test_present_classes_are_always_in_and_set_a_floor(n_arrivals):
    vocab, log_q = draw([3] * 10, [0, 2, 4, 6, 8], M=3, n_arrivals=n_arrivals)
    assert vocab.nonzero()[:, 1].tolist() == [0, 2, 4, 6, 8] and (log_q == 0).all()
    vocab, _ = draw([3] * 10, [0], M=10, n_arrivals=n_arrivals)
    assert vocab.all()


@routes
def test_log_q_makes_the_sum_unbiased(n_arrivals):
    """Mean over draws of sum_j in V exp(f_j - ln q_j) is the sum over all classes; so is each class's part of it."""
    counts, logits = [30, 10, 6, 3, 2, 1], torch.tensor([0.3, -0.5, 1.0, 0.2, 2.0, 0.7]).double()
    vocab, log_q = draw(counts, [1], M=3, n=4_000, n_arrivals=n_arrivals)
    parts = (logits - log_q.double()).exp() * vocab  # [n, C]
    errors = parts.std(0) / math.sqrt(len(parts))
    assert ((parts.mean(0) - logits.exp()).abs() <= 4.5 * errors + 1e-12).all()
    assert abs(parts.sum(1).mean() - logits.exp().sum()) < 4 * parts.sum(1).std() / math.sqrt(len(parts))


def test_draws_among_few_classes_are_those_of_the_committed_study():
    """Up to 4,096 classes a group's race is one draw of C exponentials: figures of results/ can be made again."""
    counts, labels = 1000 // (torch.arange(120) + 1), torch.tensor([3, 50, 3])
    vocab, *_ = sl.vocab_of_batch(labels[:, None], 0, 3, 3, sl.draws_of(counts, 6, 1.0), 5, 7)
    generator = torch.Generator().manual_seed(int(sl.uniform_hash(5, 6, 7, 0) * 2**53))
    times = torch.empty(120, dtype=torch.float64).exponential_(generator=generator) / counts
    times[[3, 50]] = -1
    assert torch.equal(vocab.ids, times.argsort()[:6].sort().values)


@pytest.mark.parametrize("kind", ["Zipf", "one class has nearly all", "even"])
def test_a_vocabulary_of_many_classes_costs_no_pass_over_them(kind, monkeypatch):
    """Of 100,000 classes a few arrivals are looked at; they race only where one has nearly all the weight."""
    C, M, sizes, exponential = 100_000, 100, [], torch.Tensor.exponential_
    monkeypatch.setattr(torch.Tensor, "exponential_", lambda x, **k: sizes.append(len(x)) or exponential(x, **k))
    counts = 10**6 // (torch.arange(C) + 1)
    counts[7] += 10**11 * (kind == "one class has nearly all")
    draws = sl.draws_of(counts, M, 0.0 if kind == "even" else 1.0)
    labels, estimates = torch.randint(0, C, (20, 1), generator=torch.Generator().manual_seed(0)), []
    for step in range(100):
        vocab, (size, n_drawn, _) = sl.vocab_of_batch(labels, 0, 20, 20, draws, 0, step)
        assert size == len(vocab.ids) == M and n_drawn == M - 20
        assert vocab.inside.all() and torch.isin(labels, vocab.ids).all()
        estimates.append(float((draws.weights[vocab.ids] / vocab.log_q[0].double().exp()).sum()))
    assert max(sizes) == (C if kind == "one class has nearly all" else draws.n_arrivals)
    assert {"Zipf": 150 < draws.n_arrivals < 300, "even": 100 < draws.n_arrivals < 200}.get(kind, not draws.n_arrivals)
    error = np.std(estimates) / math.sqrt(len(estimates))  # each estimates the sum of all weights
    assert abs(np.mean(estimates) / float(draws.weights.sum()) - 1) < 4 * error / float(draws.weights.sum()) + 1e-3


def batch(N=24, C=9, D=5, J=1, seed=0):
    generator = torch.Generator().manual_seed(seed)
    features = F.normalize(torch.randn(N, D, generator=generator), dim=1)
    prototypes = torch.randn(C, D, generator=generator).requires_grad_()
    return features.requires_grad_(), prototypes, torch.randint(0, C, (N, J), generator=generator)


def test_full_vocabulary_is_plain_softmax_bit_for_bit():
    features, prototypes, labels = batch()
    plain = sl.vocab_logits(features, prototypes, torch.tensor(10.0), None)
    vocab, (size, _, n_groups) = sl.vocab_of_batch(labels, 0, 24, 8, sl.draws_of(torch.ones(9), 9, 1.0), 0, step=0)
    assert size == 3 * 9 and n_groups == 3 and vocab.ids is None
    sampled = sl.vocab_logits(features, prototypes, torch.tensor(10.0), vocab)
    assert torch.equal(sl.cross_entropy(plain, labels), sl.cross_entropy(sampled, labels))
    expected = F.cross_entropy(10 * features @ F.normalize(prototypes, dim=1).T, labels[:, 0])
    assert torch.allclose(sl.cross_entropy(plain, labels), expected, rtol=1e-6)


@pytest.mark.parametrize("loss", ["softmax", "log-q"])
def test_union_and_masked_logits_have_the_same_loss_and_gradients(loss):
    """Both routes of the rule in vocab_of_batch against a slow loop over groups in float64."""
    C = 60
    features, prototypes, labels = batch(C=C)
    scale = torch.tensor(10.0, requires_grad=True)
    vocab, *_ = sl.vocab_of_batch(labels, 0, 24, 8, sl.draws_of(torch.arange(C) + 1, 9, 1.0), seed=3, step=5)
    assert vocab.ids is not None and len(vocab.ids) <= 30
    wide = torch.zeros(3, C, dtype=torch.bool).index_copy_(1, vocab.ids, vocab.inside)
    wide_q = torch.zeros(3, C).index_copy_(1, vocab.ids, vocab.log_q)
    values = []
    for v, y in (vocab, torch.searchsorted(vocab.ids, labels)), (sl.Vocab(None, wide, wide_q, vocab.groups), labels):
        value = sl.cross_entropy(sl.vocab_logits(features, prototypes, scale, v, None, loss == "log-q"), y, 0.1)
        values.append((value, *torch.autograd.grad(value, (features, prototypes, scale))))
    slow, W = 0.0, F.normalize(prototypes.double(), dim=1)
    for i in range(24):
        ids = wide[i // 8].nonzero()[:, 0]
        f = scale.double() * W[ids] @ features[i].double()
        f = f - wide_q[i // 8, ids] if loss == "log-q" else f
        log_p = f.log_softmax(0)
        slow = slow - (0.9 * log_p[ids == labels[i, 0]].sum() + 0.1 * log_p.mean()) / 24
    values.append((slow, *torch.autograd.grad(slow, (features, prototypes, scale))))
    for other in values[1:]:
        for a, b in zip(values[0], other, strict=True):
            assert torch.allclose(a.double(), b.double(), rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("C", [40, 10_000])
def test_vocabulary_does_not_depend_on_the_number_of_processes(C):
    """Groups of 8 of a batch of 24, for one process, for two (a group lies on both sides), and for three."""
    _, _, labels = batch(C=C)
    draws = sl.draws_of(torch.arange(C) + 1, 12, 1.0)

    def rows_of(first, B, step=7):
        """[B, C] bool, the vocabulary of each image."""
        vocab, *_ = sl.vocab_of_batch(labels, first, B, 8, draws, 0, step)
        ids = torch.arange(C) if vocab.ids is None else vocab.ids
        return torch.zeros(B, C, dtype=torch.bool).index_copy_(1, ids, vocab.inside[vocab.groups])

    whole = rows_of(0, 24)
    assert (whole.sum(1) == 12).all() and whole.gather(1, labels).all()
    assert [len(whole[first : first + 8].unique(dim=0)) for first in (0, 8, 16)] == [1, 1, 1]
    for B in 12, 8:
        assert torch.equal(torch.cat([rows_of(first, B) for first in range(0, 24, B)]), whole)
    assert not torch.equal(rows_of(0, 24, step=8), whole)  # another step, another draw


def test_losses_by_hand():
    """logits (0, 0, ln 2), label 0: full ln 4; V = {0, 2} ln 3; corrected by q_2 = 1/2 ln 5 (methods E)."""
    logits, label = torch.tensor([[0.0, 0.0, math.log(2)]]), torch.tensor([[0]])
    assert math.isclose(sl.cross_entropy(logits, label), math.log(4), rel_tol=1e-6)
    logits[0, 1] = -math.inf
    assert math.isclose(sl.cross_entropy(logits, label), math.log(3), rel_tol=1e-6)
    vocab = sl.Vocab(
        None, torch.tensor([[True, False, True]]), torch.tensor([[0.0, 0.0, math.log(0.5)]]), torch.tensor([0])
    )
    features = torch.tensor([[1.0, 0.0]])
    prototypes = torch.tensor([[0.0, 1.0], [0.0, 1.0], [1.0, 0.0]])
    logits = sl.vocab_logits(features, prototypes, torch.tensor(math.log(2)), vocab, None, correct=True)
    assert math.isclose(sl.cross_entropy(logits, label), math.log(5), rel_tol=1e-6)


def test_logit_adjustment_by_nothing_is_plain_softmax():
    """tau 0, also where a class has no image (0 times ln 0)."""
    counts = torch.tensor([5, 0, 2])
    assert sl.adjustment_of("logit-adjusted", 0.0, counts) is None is sl.adjustment_of("softmax", 1.0, counts)
    assert sl.adjustment_of("logit-adjusted", 1.0, counts).tolist() == sl.adjustment_of("balanced", 3.0, counts).tolist()


def test_balanced_softmax_by_hand():
    """Counts (3, 1), equal logits: ln 4 for the rare class, ln(4/3) for the frequent one; tau scales the logarithm."""
    adjustment = sl.adjustment_of("balanced", 9.0, torch.tensor([3, 1]))
    assert math.isclose(sl.cross_entropy(adjustment[None], torch.tensor([[1]])), math.log(4), rel_tol=1e-6)
    assert math.isclose(sl.cross_entropy(adjustment[None], torch.tensor([[0]])), math.log(4 / 3), rel_tol=1e-6)
    assert torch.allclose(sl.adjustment_of("logit-adjusted", 2.0, torch.tensor([3, 1])), 2 * adjustment)
    assert sl.adjustment_of("softmax", 1.0, torch.tensor([3, 1])) is None
    with_empty = sl.adjustment_of("balanced", 1.0, torch.tensor([3, 0, 1]))  # a class without images is just not there
    assert math.isclose(sl.cross_entropy(with_empty[None], torch.tensor([[2]])), math.log(4), rel_tol=1e-6)


def test_balanced_softmax_of_the_batch_is_clips_denominator():
    """InfoNCE over template captions: same-class pairs stay negatives, so the sum is sum_c n_c exp(s_c)."""
    features, prototypes, labels = batch()
    text_features = F.normalize(prototypes, dim=1)[labels[:, 0]]
    counts = torch.bincount(labels[:, 0], minlength=9).float()
    image_to_text = F.cross_entropy(10 * features @ text_features.T, torch.arange(24))
    logits = sl.vocab_logits(features, prototypes, torch.tensor(10.0), None, counts.log())
    difference = counts[labels[:, 0]].log().mean()  # a constant: it has no gradient
    assert math.isclose(sl.cross_entropy(logits, labels), image_to_text - difference, rel_tol=1e-5)


def test_focal_smoothing_and_several_labels_by_hand():
    logits = torch.tensor([[0.0, 0.0, math.log(2), -math.inf]])  # p = 1/4, 1/4, 1/2
    assert math.isclose(sl.cross_entropy(logits, torch.tensor([[2]]), gamma=2.0), 0.25 * math.log(2), rel_tol=1e-6)
    expected = 0.7 * math.log(2) + 0.3 * (2 * math.log(4) + math.log(2)) / 3
    assert math.isclose(sl.cross_entropy(logits, torch.tensor([[2]]), 0.3), expected, rel_tol=1e-6)
    torch_value = F.cross_entropy(logits[:, :3], torch.tensor([2]), label_smoothing=0.3)
    assert math.isclose(sl.cross_entropy(logits[:, :3], torch.tensor([[2]]), 0.3), torch_value, rel_tol=1e-6)
    both = sl.cross_entropy(logits, torch.tensor([[0, 2, -1]]))
    assert math.isclose(both, (math.log(4) + math.log(2)) / 2, rel_tol=1e-6)


@pytest.mark.parametrize("power", [0.0, 0.5])
def test_class_sampler(power):
    """Classes come with weight count ** power (empty ones never), images of a class evenly, ranks split the batch."""
    labels = [np.array([0] * 60 + [1] * 20), np.array([1] * 5 + [3] * 15)]
    sampler = sl.ClassSampler(labels, power, 100, 0, 0, 200, 0, 1)
    batches = np.concatenate(list(sampler))
    drawn = np.concatenate(labels)[batches[:, 1] + 80 * batches[:, 0]]
    weights = np.array([60, 25, 0, 15]) ** power * np.array([1, 1, 0, 1])
    assert np.allclose(np.bincount(drawn, minlength=4) / len(drawn), weights / weights.sum(), atol=0.02)
    images = np.bincount((batches[:, 1] + 80 * batches[:, 0])[drawn == 3], minlength=100)[85:]
    assert images.min() > 0.7 * images.mean()
    parts = [list(sl.ClassSampler(labels, power, 100, 0, 3, 5, rank, 2)) for rank in range(2)]
    assert np.array_equal(np.concatenate([parts[0][0], parts[1][0]]), sampler.batch(3))
    assert len(np.unique(batches[:, 2])) == len(batches)  # every draw has crops of its own


def table_of(tmp_path, labels):
    path = tmp_path / "train.tsv"
    path.write_text("image\tlabel\n" + "".join(f"{i}.png\t{label}\n" for i, label in enumerate(labels)))
    return sl.Table(path)


def test_images_of_a_class_are_drawn_by_the_seed():
    drawn = [sl.ClassSampler([np.zeros(50, int)], 0.0, 40, seed, 0, 1, 0, 1).batch(0)[:, 1] for seed in (0, 0, 1)]
    assert np.array_equal(drawn[0], drawn[1]) and (drawn[0] == drawn[2]).mean() < 0.3


def test_label_sets(tmp_path):
    table = table_of(tmp_path, ["2", "", "0|2", "dog", "dog | 0"])
    assert sl.read_label_sets(table, named(["cat", "dog", "cow"])).tolist() == [[2, -1], [-1, -1], [0, 2], [1, -1], [1, 0]]
    assert sl.read_label_sets(table_of(tmp_path, ["1|1|0|dog"]), named(["cat", "dog"])).tolist() == [[1, 0]]  # none twice
    for wrong in ("3", "-1", "bird", "0|9", "9" * 5_000):
        with pytest.raises(SystemExit, match="row 1 has label"):
            sl.read_label_sets(table_of(tmp_path, [wrong]), named(["cat", "dog", "cow"]))


def test_one_of_several_labels_is_drawn(tmp_path):
    """--multi-label random: each of an image's labels evenly, by seed, example and epoch alone."""
    table = table_of(tmp_path, ["0|1|2", "1|2", "2"] * 100)
    label_sets = sl.read_label_sets(table, named(["cat", "dog", "cow"]))
    examples = np.array([(0, row, epoch) for epoch in range(20) for row in range(300)])
    drawn = {}
    for seed in 0, 1:
        images = sl.LabelledImages([table], [label_sets], True, True, 32, 0.9, 10**6, seed)
        drawn[seed] = images.__getitems__(examples)["labels"][:, 0].numpy()
    for kind, labels in (0, [0, 1, 2]), (1, [1, 2]), (2, [2]):
        counts = np.bincount(drawn[0][examples[:, 1] % 3 == kind], minlength=3)
        assert (abs(counts[labels] - 2000 / len(labels)) <= 4 * math.sqrt(2000) / 2).all() and counts.sum() == 2000
        assert not np.delete(counts, labels).any()
    images = sl.LabelledImages([table], [label_sets], True, True, 32, 0.9, 10**6, 0)
    order = np.random.default_rng(0).permutation(len(examples))[:500]  # in other batches, in another process
    assert np.array_equal(images.__getitems__(examples[order])["labels"][:, 0].numpy(), drawn[0][order])
    several = examples[:, 1] % 3 == 0
    assert 0.2 < (drawn[0] == drawn[1])[several].mean() < 0.5  # another seed, other draws
    epochs = drawn[0].reshape(20, 300)[:, ::3]
    assert 0.2 < (epochs[0] == epochs[1]).mean() < 0.5  # another epoch, too


def test_an_image_with_k_labels_counts_a_kth_for_each(tmp_path):
    """Whatever the most is that an image has: one with a single label counts 1."""
    table_of(tmp_path, ["0|1"] * 4 + ["2"] * 3 + ["0|1|2"] * 3)
    args = sl.parse_args(["--data", str(next(tmp_path.glob("*.tsv"))), "--multi-label", "all"])
    assert sl.read_labelled_sets(args, tmp_path, named(["cat", "dog", "cow"]))[3].tolist() == [3, 3, 4]


def test_trim_tail():
    labels = np.repeat([0, 1, 2, 3], [50, 4, 30, 9])
    counts = np.bincount(labels)
    for shots in 0, 1, 5:
        keep, tail = sl.trim_tail(labels, counts, 2, shots, 0)
        assert tail.tolist() == [1, 3]
        assert np.bincount(labels[keep], minlength=4).tolist() == [50, min(4, shots), 30, min(9, shots)]
    assert not np.array_equal(sl.trim_tail(labels, counts, 2, 1, 0)[0], sl.trim_tail(labels, counts, 2, 1, 1)[0])
    assert sl.trim_tail(labels, np.array([7, 4, 4, 4]), 2, 0, 0)[1].tolist() == [1, 2]  # ties by id


def test_weights_beyond_all_numbers():
    with pytest.raises(SystemExit, match="--vocab-power 80"):
        sl.draws_of(torch.arange(1, 21) * 10_000, 5, 80.0)


def test_prototypes_are_matched_by_name(tmp_path):
    vectors = torch.eye(3)
    torch.save({"prototypes": vectors, "class_names": ["a", "b", "c"]}, tmp_path / "clip.pt")
    read = sl.read_prototypes(str(tmp_path / "clip.pt"), ["c", "a"])
    assert torch.equal(read, vectors[[2, 0]])
    np.save(tmp_path / "w.npy", np.eye(2, 7))
    np.save(tmp_path / "columns.npy", np.eye(2, 7, order="F"))
    for name in "w.npy", "columns.npy":
        read = sl.read_prototypes(str(tmp_path / name), ["x", "y"])
        assert read.shape == (2, 7) and read.is_contiguous()  # processes cannot broadcast what is not
    np.save(tmp_path / "nan.npy", np.full((2, 7), np.nan))
    np.save(tmp_path / "flat.npy", np.ones(2))
    np.save(tmp_path / "width0.npy", np.ones((2, 0)))
    np.save(tmp_path / "complex.npy", np.ones((2, 3), complex))
    np.save(tmp_path / "zero.npy", np.diag([1.0, 0.0]))
    torch.save({"prototypes": vectors, "class_names": 5}, tmp_path / "number.pt")
    np.save(tmp_path / "object.npy", np.array([{}], object), allow_pickle=True)
    (tmp_path / "broken.pt").write_bytes(b"PK no archive")
    (tmp_path / "zip.npy").write_bytes(b"PK\x03\x04 no archive")
    (tmp_path / "empty.npy").touch()
    torch.save({"prototypes": vectors, "class_names": ["a", "b", "a"]}, tmp_path / "twice.pt")
    assert torch.equal(sl.read_prototypes(str(tmp_path / "twice.pt"), ["a", "b", "a"]), vectors)  # ImageNet has two maillots
    torch.save({"prototypes": vectors, "class_names": ["a", "b"]}, tmp_path / "short.pt")
    for name, names, message in (
        ("clip.pt", ["a", "zebra", "okapi"], "no vector for 2 of 3 classes: zebra, okapi"),
        ("twice.pt", ["a", "b"], "3 class names, 2 of them different, for 3 rows"),
        ("short.pt", ["a", "b"], "2 class names, 2 of them different, for 3 rows"),
        ("w.npy", ["x", "y", "z"], "2 rows for 3 classes"),
        ("nan.npy", ["x", "y"], "not finite"),
        ("flat.npy", ["x", "y"], "expected an array"),
        ("width0.npy", ["x", "y"], r"holds \(2, 0\), expected an array"),
        ("complex.npy", ["x", "y"], r"holds \(2, 3\) complex numbers, expected an array"),
        ("zero.npy", ["x", "y"], "1 classes have a vector of length 0, which has no direction: y"),
        ("number.pt", ["a", "b", "c"], "class_names must be a list of names, it is a int"),
        ("object.npy", ["x"], "Object arrays"),
        ("empty.npy", ["x"], "No data left"),
        ("zip.npy", ["x"], "not a zip file"),
        ("broken.pt", ["x"], "cannot be read"),
        ("missing.pt", ["x"], "cannot be read"),
    ):
        with pytest.raises(SystemExit, match=message):
            sl.read_prototypes(str(tmp_path / name), names)


def test_towers_load_from_other_checkpoints(tmp_path):
    """A clip.py checkpoint (visual.*), a bare tower, and torchvision's resnet50, whose fc is left out."""
    source = sl.Classifier("tiny", 4, None, False)
    torch.save({"state_dict": source.state_dict()}, tmp_path / "clip.pt")
    torch.save(source.visual.state_dict(), tmp_path / "tower.pt")
    for name in "clip.pt", "tower.pt":
        model = sl.Classifier("tiny", 7, None, False)
        sl.load_tower(model, str(tmp_path / name))
        assert all(
            torch.equal(a, b) for a, b in zip(source.visual.parameters(), model.visual.parameters(), strict=True)
        )
    standard = torchvision.models.resnet50()
    torch.save(standard.state_dict(), tmp_path / "resnet50.pt")
    model = sl.Classifier("resnet50", 7, None, False)
    sl.load_tower(model, str(tmp_path / "resnet50.pt"))
    standard.fc, model.visual.fc = torch.nn.Identity(), torch.nn.Identity()
    images = torch.rand(2, 3, 64, 64)
    with torch.no_grad():
        assert torch.allclose(standard.eval()(images), model.visual.eval()(images), rtol=1e-4, atol=1e-5)
    with pytest.raises(SystemExit, match="does not fit the model"):
        sl.load_tower(source, str(tmp_path / "resnet50.pt"))
    ssl = dino.Network("resnet50", 8, 8, 8, False)  # has no fc
    torch.save({"state_dict": ssl.state_dict()}, tmp_path / "dino.pt")
    sl.load_tower(model := sl.Classifier("resnet50", 7, None, False), str(tmp_path / "dino.pt"))
    assert torch.equal(model.visual.layer4[2].conv3.weight, ssl.visual.layer4[2].conv3.weight)
    vit = dino.Network("ViT-S-16", 8, 8, 8, False).eval()
    torch.save({"state_dict": vit.state_dict(), "arch": "ViT-S-16"}, tmp_path / "vit.pt")
    sl.load_tower(ours := sl.Classifier("dino-ViT-S-16", 7, None, False).eval(), str(tmp_path / "vit.pt"))
    with torch.no_grad():
        bytes_of = torch.randint(0, 256, (2, 3, 224, 224))
        assert torch.allclose(ours.encode_image(bytes_of), vit.encode_image(bytes_of), atol=1e-5)
    sl.load_tower(ours, save(vit.visual.state_dict(), tmp_path / "public.pt"))  # bare names, as published
    assert ours.pixels == "imagenet"
    sl.load_tower(other := sl.Classifier("resnet50", 9, None, False), save(model.state_dict(), tmp_path / "ours.pt"))
    assert torch.equal(model.visual.fc.weight, other.visual.fc.weight)  # our own fc belongs to the tower
    theirs = {f"module.{k}": v for k, v in standard.state_dict().items()}
    for content in {"model": standard.state_dict(), "epoch": 9}, {"student": {}, "teacher": theirs, "epoch": 9}:
        sl.load_tower(found := sl.Classifier("resnet50", 7, None, False), save(content, tmp_path / "program.pt"))
        assert torch.equal(found.visual.layer4[2].conv3.weight, standard.layer4[2].conv3.weight)
    with pytest.raises(SystemExit, match="--arch dino-ViT-S-16"):
        sl.load_tower(sl.Classifier("ViT-S-16", 7, None, False), str(tmp_path / "public.pt"))
    for prefix in "backbone.", "encoder.", "module.encoder_q.":  # SimCLR's and MoCo's files, with a projection as fc
        weights = {f"{prefix}{k}": v for k, v in standard.state_dict().items()}
        weights |= {f"{prefix}fc.{i}.weight": torch.ones(8, 8) for i in (0, 2)}
        found = sl.Classifier("resnet50", 7, None, False)
        assert sl.load_tower(found, save(weights, tmp_path / "simclr.pt")) == "fc"
        assert torch.equal(found.visual.layer4[2].conv3.weight, standard.layer4[2].conv3.weight)
        assert found.visual.fc.weight.shape == other.visual.fc.weight.shape


def test_initial_vit():
    """As in DINO's code: deviation 0.02 of matrices, tokens and positions, no bias, layer norms that do nothing."""
    for name, p in sl.ViT(224, 16, 384).named_parameters():
        mean, std = (0, 0) if name.endswith("bias") else (1, 0) if "norm" in name else (0, 0.02)
        p, n = p.detach(), p.numel()
        assert float(p.mean()) == pytest.approx(mean, abs=0.1 / n**0.5), name
        assert float(p.std()) == pytest.approx(std, rel=4 / n**0.5), name


def test_initial_head_is_of_unit_vectors():
    """Random directions: their length, which the logits do not see, decides how fast an optimiser turns them."""
    head = sl.Classifier("tiny", 500, None, False).prototypes.detach()
    torch.testing.assert_close(head.norm(dim=1), torch.ones(500))
    assert head.shape == (500, 64) and float(head.mean(0).norm()) < 3 / 500**0.5


def test_pixels_are_standardised_as_the_weights_expect(tmp_path):
    """torchvision's resnet50 was trained with ImageNet's mean and deviation: its features are torchvision's own."""
    torch.manual_seed(0)
    standard, images = torchvision.models.resnet50(), torch.randint(0, 256, (4, 3, 64, 64))
    ready = tv.normalize(images / 255, (0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
    for _ in range(20):
        standard(ready)  # batch norm's statistics, for features of a usual size
    model, again, ssl = (sl.Classifier("resnet50", 7, None, False) for _ in range(3))
    sl.load_tower(model, save(standard.state_dict(), tmp_path / "resnet50.pth"))
    checkpoint = sl.checkpoint_of_classifier(model, named("abcdefg"), np.ones(7), np.zeros(0), Namespace(), 1)
    torch.save(checkpoint, tmp_path / "ours.pt")  # fine-tuned weights expect what those they came from did
    sl.load_tower(again, str(tmp_path / "ours.pt"))
    standard.fc = torch.nn.Identity()
    with torch.no_grad():
        expected = standard.eval()(ready)
        for tower in model.eval(), again.eval():
            tower.visual.fc = torch.nn.Identity()
            assert (tower.encode_image(images) - expected).norm() <= 1e-5 * expected.norm()
    torch.save({"state_dict": dino.Network("resnet50", 8, 8, 8, False).state_dict()}, tmp_path / "dino.pt")
    sl.load_tower(ssl, str(tmp_path / "dino.pt"))
    assert (ssl.pixels, again.pixels) == ("clip", "imagenet")  # dino_laionet.py standardises as clip.py does


def save(state_dict, path, **more):
    torch.save({"state_dict": state_dict, **more}, path)
    return str(path)


def test_activation_is_compared(tmp_path):
    """QuickGELU weights in a GELU tower would give wrong features silently."""
    source = sl.Classifier("ViT-S-16", 4, None, False)
    wrong = {"quick_gelu": "quick_gelu", None: "one it does not name"}
    for more in {"activation": "gelu"}, {"arch": "ViT-S-16"}, {"activation": "quick_gelu"}, {}:
        path, activation = save(source.state_dict(), tmp_path / "vit.pt", **more), more.get("activation")
        is_wrong = "arch" not in more and activation in wrong
        with pytest.raises(SystemExit, match=wrong[activation]) if is_wrong else nullcontext():
            sl.load_tower(source, path)


@pytest.mark.parametrize(
    "flags, message",
    [
        (["--vocab", "1"], "at least 2 classes"),
        (["--vocab", "-3"], "at least 2 classes"),
        (["--loss", "log-q"], "needs --vocab"),
        (["--label-smoothing", "1"], "must be in"),
        (["--vocab-power", "-1"], "must be at least 0"),
        (["--trim-tail", "-1"], "must be at least 0"),
        (["--freeze-backbone"], "keeps the tower of --init"),
        (["--head-init", "x.npy"], "--head-init is read by --head frozen"),
        (["--loss", "balanced", "--tau", "0.5"], "--tau is of --loss logit-adjusted"),
        (["--tau", "inf", "--loss", "logit-adjusted"], "must be at least 0 and below 2**32"),
        (["--vocab-power", "inf"], "must be at least 0 and below 2**32"),
        (["--trim-tail", "5", "--multi-label", "all"], "cuts by the first label"),
        (["--sampler", "class", "--data", "a:2,b:1"], "no weights in --data"),
    ],
)
def test_wrong_flags(flags, message, capsys):
    with pytest.raises(SystemExit) as ended:
        sl.parse_args(flags)
    assert ended.value.code == 2 and message in capsys.readouterr().err
