"""sl_vocab_subsample.py: each flag of the method reaches the loss of the program; checkpoints and classes that changed."""

import functools
import json
import math
import shutil

import numpy as np
import programs
import pytest
import torch
import torch.nn.functional as F
import torchvision
from PIL import Image
from programs import log_of, named, weights_of

import sl_vocab_subsample as sl

FLAGS = ["--batch-size", "32", "--log-every", "1", "--warmup-steps", "2", "--precision", "fp32", "--device", "cpu"]
FLAGS += ["--eval-sets", "--workers", "0"]
VOCAB = ["--vocab", "32", "--vocab-group", "16"]
run_here = functools.partial(programs.run_here, sl)


def first_step(world, out, monkeypatch, *flags):
    """Of step 1 of the program: unit features [B, D], class vectors [C, D], scale, vocabulary, and labels as classes [B]
    (all of an image's, [B, J], with --multi-label all); the loss that it logs; its class counts."""
    seen, logits_of, labels_of = [], sl.vocab_logits, sl.LabelledImages.__getitems__

    def spy(features, prototypes, scale, vocab, *rest):
        seen.append((features.detach().double().numpy(), prototypes.detach().double().numpy(), float(scale.detach()), vocab))
        return logits_of(features, prototypes, scale, vocab, *rest)

    def spy_labels(self, examples):
        batch = labels_of(self, examples)
        labels = batch["labels"].numpy().copy()
        seen.append(labels if "all" in flags else labels[:, 0])
        return batch

    with monkeypatch.context() as patch:
        patch.setattr(sl, "vocab_logits", spy)
        patch.setattr(sl.LabelledImages, "__getitems__", spy_labels)
        run_here("--root", world, "--steps", "1", *FLAGS, *flags, "--out", out)
    labels, (features, prototypes, scale, vocab) = seen
    counts = torch.load(out / "checkpoint.pt", weights_only=True)["class_counts"].double().numpy()
    return features, prototypes, scale, vocab, labels, log_of(out)[0]["loss"], counts


def expected(features, prototypes, scale, vocab, labels, counts, add=0.0, subtract_log_q=False, smoothing=0.0, gamma=0):
    """Mean loss, written out in float64 over the classes of each image's vocabulary."""
    logits = scale * features @ (prototypes / np.linalg.norm(prototypes, axis=1, keepdims=True)).T + add
    losses = []
    for i, (row, label) in enumerate(zip(logits, labels)):
        classes, log_q = np.arange(len(counts)), 0.0
        if vocab is not None:
            inside = vocab.inside[vocab.groups[i]].numpy()
            classes = classes[inside] if vocab.ids is None else vocab.ids.numpy()[inside]
            log_q = vocab.log_q[vocab.groups[i]].numpy()[inside]
        row = row[classes] - (log_q if subtract_log_q else 0.0)
        log_p = row - np.log(np.exp(row).sum())
        own = log_p[classes == label].item()
        nll = -(1 - smoothing) * own - smoothing * log_p.mean()
        losses.append((1 - np.exp(-nll)) ** gamma * nll)
    return np.mean(losses)


@pytest.mark.parametrize(
    "flags, how",
    [
        ([], {}),
        (VOCAB, {}),
        ([*VOCAB, "--loss", "log-q"], {"subtract_log_q": True}),
        (["--loss", "balanced"], {"tau": 1.0}),
        ([*VOCAB, "--loss", "balanced"], {"tau": 1.0}),
        (["--loss", "logit-adjusted", "--tau", "0.5"], {"tau": 0.5}),
        (["--loss", "focal"], {"gamma": 2}),
        (["--label-smoothing", "0.2"], {"smoothing": 0.2}),
        (["--precision", "bf16"], {}),
    ],
    ids=lambda x: "-".join(x).replace("--", "") if isinstance(x, list) else "",
)
def test_a_flag_reaches_the_loss(flags, how, world, tmp_path, monkeypatch):
    *given, loss, counts = first_step(world, tmp_path / "out", monkeypatch, *flags)
    tau, rest = how.get("tau", 0.0), {k: v for k, v in how.items() if k != "tau"}
    add = tau * np.log(counts / counts.sum()) if tau else 0.0
    assert loss == pytest.approx(expected(*given, counts, add, **rest), rel=1e-5)
    if how:  # and it is not the plain loss
        assert abs(loss - expected(*given, counts)) > 0.003 * loss
    assert given[2] == pytest.approx(1 / 0.07, rel=1e-6)
    assert np.allclose(np.linalg.norm(given[0], axis=1), 1, rtol=0, atol=1e-6)  # normalised after bf16, not in it


def test_vocabularies_are_drawn_by_the_power_of_the_counts(world, tmp_path, monkeypatch):
    """The mean count of the drawn classes falls as the power does; 2 groups a step, 12 steps."""
    means, vocab_of = [], sl.vocab_of_batch
    for power in "1", "0.5", "0":
        drawn = []

        def spy(labels, first, B, group_size, draws, seed, step, drawn=drawn):
            vocab, counted = vocab_of(labels, first, B, group_size, draws, seed, step)
            ids = torch.arange(120) if vocab.ids is None else vocab.ids
            for group, inside in enumerate(vocab.inside):
                present = labels[group * group_size : (group + 1) * group_size]
                drawn.extend(c for c in ids[inside].tolist() if c not in present)
            return vocab, counted

        with monkeypatch.context() as patch:
            patch.setattr(sl, "vocab_of_batch", spy)
            flags = ["--root", world, "--steps", "12", *FLAGS, *VOCAB, "--vocab-power", power]
            run_here(*flags, "--out", tmp_path / power)
        counts = torch.load(tmp_path / power / "checkpoint.pt", weights_only=True)["class_counts"]
        means.append(float(counts[drawn].double().mean()))
    assert means[0] > 1.15 * means[1] > 1.15 * 1.15 * means[2], means


def test_vocabularies_are_those_of_the_runs_seed(world, tmp_path, monkeypatch):
    """Else the spread over seeds would be that of the images alone."""
    _, _, _, vocab, labels, _, counts = first_step(world, tmp_path, monkeypatch, *VOCAB, "--seed", "3")
    draws = sl.draws_of(torch.from_numpy(counts), 32, sl.parse_args([]).vocab_power)
    own, other = (sl.vocab_of_batch(torch.from_numpy(labels)[:, None], 0, 32, 16, draws, seed, 0)[0] for seed in (3, 0))
    assert torch.equal(vocab.ids, own.ids) and torch.equal(vocab.inside, own.inside)
    assert not torch.equal(own.ids, other.ids)


def test_images_with_several_labels_are_scored_by_the_first(world, tmp_path):
    """And those without one not at all."""
    table, n = sl.Table(world / "val.tsv"), 40
    first = [int(x) for x in sl.read_label_sets(table, sl.read_classes(world))[:n, 0]]
    fields = ["" if i % 5 == 4 else f"{c}|{(c + 1) % 120}" if i % 2 else str(c) for i, c in enumerate(first)]
    (tmp_path / "x.tsv").write_text("image\tlabel\n" + "".join(f"{world / 'val.npy'}:{i}\t{x}\n" for i, x in enumerate(fields)))
    run_here("--root", world, "--steps", 1, *FLAGS, "--eval-sets", tmp_path / "x.tsv", "--out", tmp_path)
    expected = np.where(np.arange(n) % 5 == 4, -1, first)
    metrics = json.loads((tmp_path / "metrics.json").read_text())["x"]
    with np.load(tmp_path / "x.npz") as file:
        assert file["labels"].tolist() == expected.tolist()
        assert metrics["top1"] == pytest.approx((file["predictions"] == expected)[expected >= 0].mean())


def test_the_sampler_is_the_one_that_is_asked_for(world, tmp_path, monkeypatch):
    """The share of the ten most frequent classes among 640 examples: as in the data, less by the root, 10 of 120."""
    shares, items_of = [], sl.LabelledImages.__getitems__
    for name in "instance", "sqrt", "class":
        labels = []

        def spy(self, examples, labels=labels):
            batch = items_of(self, examples)
            labels.extend(batch["labels"][:, 0].tolist())
            return batch

        with monkeypatch.context() as patch:
            patch.setattr(sl.LabelledImages, "__getitems__", spy)
            run_here("--root", world, "--steps", "20", *FLAGS, "--sampler", name, "--out", tmp_path / name)
        counts = torch.load(tmp_path / name / "checkpoint.pt", weights_only=True)["class_counts"].numpy()
        shares.append(np.isin(labels, np.argsort(-counts)[:10]).mean())
    of_data = np.sort(counts)[-10:].sum() / counts.sum()
    assert abs(shares[0] - of_data) < 0.06 and abs(shares[2] - 10 / 120) < 0.04 and shares[2] < shares[1] < shares[0]


def test_the_scale_stays_between_1_and_100(world, tmp_path):
    """Steps of the learning rate's size in its logarithm: it would pass 1 or 100 at once."""
    run_here("--root", world, "--steps", "6", *FLAGS, "--lr", "4", "--warmup-steps", "0", "--out", tmp_path)
    scales = [line["logit_scale"] for line in log_of(tmp_path)]
    assert all(0.999 <= scale <= 100.001 for scale in scales)
    assert min(abs(np.log(scale) - bound) for scale in scales for bound in (0, np.log(100))) < 1e-4


def test_all_classes_are_plain_softmax_with_absent_ones_too(world, tmp_path):
    """--vocab of C or more, when 30 classes have no image and would not be drawn."""
    for vocab in "0", "120", "500":
        run_here("--root", world, "--trim-tail", "30", "--vocab", vocab, "--steps", "3", *FLAGS, "--out", tmp_path / vocab)
    losses = [[line["loss"] for line in log_of(tmp_path / vocab)] for vocab in ("0", "120", "500")]
    assert losses[0] == losses[1] == losses[2] and "vocab" not in log_of(tmp_path / "120")[0]


def test_batch_norm_of_each_process_alone(world, tmp_path):
    """Synchronised, two processes have the loss of one; by themselves they have not."""
    flags = ["--root", world, "--steps", "2", *FLAGS]
    run_here(*flags, "--out", tmp_path / "one")
    for bn in "sync", "local":
        programs.run_forked("sl_vocab_subsample.py", *flags, "--bn", bn, "--out", tmp_path / bn, processes=2)
    one, sync, local = (log_of(tmp_path / name)[0]["loss"] for name in ("one", "sync", "local"))
    assert sync == pytest.approx(one, rel=1e-5) and abs(local - one) > 1e-4 * one


def test_a_realised_vocabulary_of_another_size_is_named(world, tmp_path):
    """Some groups hold more classes than --vocab; or fewer classes than --vocab have images."""
    flags = ["--root", world, "--vocab-group", "16", "--steps", "2", *FLAGS]
    printed = run_here(*flags, "--vocab", "12", "--out", tmp_path / "a")
    assert "--vocab 12 is less than what some of the groups of 16 images hold" in printed
    printed = run_here(*flags, "--vocab", "64", "--trim-tail", "100", "--out", tmp_path / "b")
    assert "--vocab 64 is more than the classes that can be drawn: the vocabularies have 20.0 classes" in printed
    assert "--vocab" not in run_here(*flags, "--vocab", "40", "--out", tmp_path / "c")


def test_a_line_has_the_vocabularies_since_the_one_before(world, tmp_path, monkeypatch):
    """Mean size, and share of drawn classes, of groups whose vocabularies differ in size; two steps a line."""
    counted, vocab_of = [], sl.vocab_of_batch
    monkeypatch.setattr(sl, "vocab_of_batch", lambda *given: counted.append(vocab_of(*given)) or counted[-1])
    run_here("--root", world, "--steps", "6", *FLAGS, "--log-every", "2", "--vocab", "14", "--vocab-group", "16", "--out", tmp_path)
    sizes = [vocab.inside.sum(1).tolist() for vocab, _ in counted]
    means = [np.mean(sizes[i] + sizes[i + 1]) for i in (0, 2, 4)]
    assert [line["vocab"] for line in log_of(tmp_path)] == pytest.approx(means, abs=0.005) and len(set(means)) > 1
    drawn = [(vocab.log_q < 0).sum().item() for vocab, _ in counted]
    shares = [(drawn[i] + drawn[i + 1]) / sum(sizes[i] + sizes[i + 1]) for i in (0, 2, 4)]
    assert [line["drawn"] for line in log_of(tmp_path)] == pytest.approx(shares, abs=1e-4) and shares[0] > 0


def test_resume_compares_classes_and_labels(world, tmp_path):
    """Two names exchanged, a class more, labels edited: the head's rows would belong to other classes."""
    root = tmp_path / "root"
    root.mkdir()
    shutil.copytree(world / "laionet", root / "laionet")
    lines = (world / "classes.tsv").read_text().splitlines()
    table = (root / "laionet" / "train.tsv").read_text()
    flags = ["--root", root, "--steps", "2", *FLAGS, "--out", tmp_path / "out"]
    (root / "classes.tsv").write_text("\n".join(lines) + "\n")
    run_here(*flags)
    label = table.splitlines()[0].split("\t").index("label")
    rows = [line.split("\t") for line in table.splitlines()]
    rows[1][label] = str((int(rows[1][label]) + 1) % 120)
    for names, text, told in (
        ([lines[0], lines[2], lines[1], *lines[3:]], table, "another .*classes.tsv"),
        ([*lines, lines[1].replace(lines[1].split("\t")[0], "another", 1)], table, "another .*classes.tsv"),
        (lines, "\n".join(map("\t".join, rows)) + "\n", "another .*train.tsv"),
    ):
        (root / "classes.tsv").write_text("\n".join(names) + "\n")
        (root / "laionet" / "train.tsv").write_text(text)
        with pytest.raises(SystemExit, match=f"was made with {told}"):
            run_here(*flags)
    (root / "classes.tsv").write_text("\n".join(lines) + "\n")
    (root / "laionet" / "train.tsv").write_text(table)
    run_here(*flags)


@pytest.mark.parametrize("width", [64, 32])
def test_resume_compares_the_vectors_of_a_frozen_head(width, world, tmp_path):
    head = tmp_path / "head.npy"
    flags = ["--root", world, "--head", "frozen", "--head-init", head, "--steps", "1", *FLAGS, "--out", tmp_path / "out"]
    np.save(head, np.random.default_rng(0).normal(size=(120, 64)).astype(np.float32))
    run_here(*flags)
    np.save(head, np.random.default_rng(1).normal(size=(120, width)).astype(np.float32))
    with pytest.raises(SystemExit, match="was made with other class vectors than .*head.npy"):
        run_here(*flags)


def test_evaluation_in_the_world_of_the_run(world, tmp_path, monkeypatch):
    """From anywhere: --eval-only knows the root that the checkpoint was trained in; data and seed are named as the run's."""
    flags = ["--root", world, "--data", "incaps", "--seed", "3", "--steps", "1", *FLAGS, "--eval-sets", "val"]
    run_here(*flags, "--out", tmp_path / "run")
    monkeypatch.chdir(tmp_path)
    sets = ["--eval-sets", world / "val.tsv", "--device", "cpu"]
    run_here("--eval-only", tmp_path / "run" / "checkpoint.pt", *sets, "--out", tmp_path / "eval")
    first, again = (json.loads((tmp_path / name / "metrics.json").read_text()) for name in ("run", "eval"))
    assert (again["run"]["data"], again["run"]["seed"]) == ("incaps", 3) == (first["run"]["data"], first["run"]["seed"])
    first, again = first["val"], again["val"]
    assert again["top1"] == first["top1"] and again["spearman_pred"] == first["spearman_pred"]
    assert not (tmp_path / "data").exists()


def test_checkpoints_that_cannot_be_used(world, tmp_path):
    """One line for what --eval-only and --init cannot take, nothing written."""
    run_here("--root", world, "--steps", "1", *FLAGS, "--out", tmp_path / "run")
    good = torch.load(tmp_path / "run" / "checkpoint.pt", weights_only=True)
    state, out = good["state_dict"], tmp_path / "out"
    negative, wrong = good["class_counts"].clone(), state["visual.conv1.weight"].clone()
    negative[3] = -5
    wrong[0, 0, 0, 0] = torch.nan
    cases = [
        ("--eval-only", {k: v for k, v in good.items() if k != "trimmed"}, "no trimmed in it"),
        ("--eval-only", good | {"arch": "tower of Babel"}, "it has the tower 'tower of Babel'"),
        ("--eval-only", good | {"class_counts": good["class_counts"][:5]}, "they are 5"),
        ("--eval-only", good | {"class_counts": negative}, "the least -5"),
        ("--eval-only", good | {"class_names": good["class_names"][::-1]}, "another order of the classes"),
        ("--eval-only", good | {"state_dict": {"prototypes": state["prototypes"]}}, "does not fit"),
        ("--eval-only", good | {"state_dict": state | {"prototypes": state["prototypes"] * torch.nan}},
         r"not finite in \['prototypes'\]"),
        ("--init", good | {"pixels": "mine"}, "names the pixel statistics 'mine'"),
        ("--init", good | {"state_dict": state | {"visual.conv1.weight": wrong}}, r"not finite in \['conv1.weight'\]"),
        ("--init", good | {"state_dict": state | {"visual.conv1.weight": 3}}, r"missing \['conv1.weight'\]"),
    ]
    for flag, content, message in cases:
        torch.save(content, tmp_path / "bad.pt")
        with pytest.raises(SystemExit, match=message):
            run_here("--root", world, "--steps", "1", *FLAGS, flag, tmp_path / "bad.pt", "--out", out)
        assert not out.exists()
    np.save(tmp_path / "head.npy", np.ones((120, 64), np.float32))
    head = ["--arch", "dino-ViT-S-16", "--head", "frozen", "--head-init", tmp_path / "head.npy"]
    with pytest.raises(SystemExit, match="vectors of width 64, --arch dino-ViT-S-16 features of 384"):
        run_here("--root", world, *FLAGS, *head, "--out", out)
    with pytest.raises(SystemExit, match="--trim-tail 120 must be less than the 120 classes"):
        run_here("--root", world, "--trim-tail", "120", "--trim-shots", "1", *FLAGS, "--out", out)


def test_weights_of_old_files_load(tmp_path):
    """Before version 0.4.1 torch wrote no num_batches_tracked; torchvision's first resnet50 is of that time."""
    torch.manual_seed(0)
    weights = {k: v for k, v in torchvision.models.resnet50().state_dict().items() if "num_batches" not in k}
    model = sl.Classifier("resnet50", 3, None, False)
    torch.save(weights, tmp_path / "resnet50.pth")
    assert sl.load_tower(model, str(tmp_path / "resnet50.pth")) == "fc"
    assert torch.equal(model.visual.layer4[2].conv3.weight, weights["layer4.2.conv3.weight"])


def test_a_parameter_as_a_frozen_head_needs_no_gradient(tmp_path):
    torch.save(torch.nn.Parameter(torch.eye(3, 8)), tmp_path / "head.pt")
    prototypes = sl.read_prototypes(str(tmp_path / "head.pt"), ["a", "b", "c"])
    assert not sl.Classifier("tiny", 3, prototypes, True).prototypes.requires_grad


def test_the_tail_is_that_of_the_mixture(tmp_path):
    """Of two sets weighed 1:9 the rarest class is rare in the heavy one, though the light one has most of the rows."""
    (tmp_path / "classes.tsv").write_text("name\na\nb\n")
    for name, counts in (("light", (90, 10)), ("heavy", (2, 8))):
        (tmp_path / name).mkdir()
        rows = [f"x.jpg\t{c}\n" for c, n in enumerate(counts) for _ in range(n)]
        (tmp_path / name / "train.tsv").write_text("image\tlabel\n" + "".join(rows))
    for data, tail in (("light,heavy", 1), ("light:1,heavy:9", 0)):
        args = sl.parse_args(["--data", data, "--trim-tail", "1"])
        tables, _, shares, counts, trimmed, _ = sl.read_labelled_sets(args, tmp_path, named(["a", "b"]))
        assert trimmed.tolist() == [tail]
        if ":" not in data:  # each set counts by what is left of it
            assert shares.tolist() == [90 / 92, 2 / 92] and counts.tolist() == [92, 0] and len(tables[1]) == 2


def test_a_table_without_labels_is_told_so(tmp_path):
    (tmp_path / "t.tsv").write_text("image\ttarget\nx.jpg\t0\n")
    with pytest.raises(SystemExit, match="t.tsv: no column label; it has image, target"):
        sl.read_labelled_sets(sl.parse_args(["--data", str(tmp_path / "t.tsv")]), tmp_path, named(["a"]))


@pytest.mark.parametrize("kind", ["adamw", "sgd"])
def test_the_loop_is_plain_supervised_learning(kind, world, tmp_path):
    """Four steps on a mixture, flags and seed other than the defaults, against a loop of ordinary torch."""
    flags = ["--seed", 3, "--lr", 2e-3, "--weight-decay", 2, "--crop-scale", 0.3, "--steps", 4, "--optimizer", kind]
    run_here("--root", world, *FLAGS, *flags, "--data", "laionet:2,incaps:1", "--out", tmp_path)
    torch.manual_seed(3)
    model = sl.Classifier("tiny", 120, None, False)
    model.visual.to(memory_format=torch.channels_last)
    names, sets = [row["name"] for row in sl.read_classes(world)], ("laionet", "incaps")
    pixels = [torch.from_numpy(np.load(world / name / "train.npy")) for name in sets]
    labels = [sl.read_label_sets(sl.Table(world / name / "train.tsv"), named(names))[:, 0] for name in sets]
    groups = [dict(params=[p for p in model.parameters() if (p.ndim < 2) == is_flat], weight_decay=2.0 * (not is_flat))
              for is_flat in (False, True)]  # fmt: skip
    optimizer = torch.optim.SGD(groups, 2e-3, 0.9) if kind == "sgd" else torch.optim.AdamW(groups, 2e-3, (0.9, 0.98))
    shares = np.array([2, 1]) / 3
    for step in range(4):
        for group in optimizer.param_groups:  # two steps of warm-up, then the cosine
            group["lr"] = 1e-3 * (step + 1 if step < 2 else 1 + math.cos(math.pi * (step - 2) / 2))
        examples = sl.Sampler([len(x) for x in labels], shares, 32, 3, step, 4, 0, 1).batch(step)
        boxes = torch.from_numpy(sl.crop_boxes((0.3, 1), 4 / 3, np.ones(32), 3, 2, *examples.T)).float()
        images = sl.crop_pixels(torch.stack([pixels[s][row] for s, row, _ in examples]), boxes, 32)
        features, rows, scale = model(images)
        targets = torch.tensor([int(labels[s][row]) for s, row, _ in examples])
        F.cross_entropy(scale * features @ F.normalize(rows, dim=1).T, targets).backward()
        optimizer.step()
        optimizer.zero_grad()
    found = weights_of(tmp_path)
    for name, parameter in model.named_parameters():
        assert (found[name] - parameter).norm() <= 2e-3 * parameter.norm() + 1e-5, name


def test_a_replacement_brings_its_own_label(tmp_path):
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    (tmp_path / "t.tsv").write_text("image\tlabel\n" + "none.png\t0\n" * 5 + "a.png\t1\n")
    table = sl.Table(tmp_path / "t.tsv")
    data = sl.LabelledImages([table], [sl.read_label_sets(table, named(["x", "y"]))], False, False, 8, 1.0, 10**6, 0)
    assert (data.__getitems__(np.array([[0, i, 0] for i in range(6)]))["labels"] == 1).all()


@pytest.mark.parametrize("flags", [(), ("--vocab", "40", "--vocab-group", "32", "--vocab-power", "0.5")])
def test_all_labels_of_an_image_share_its_loss(flags, world, tmp_path, monkeypatch):
    """The mean of their cross-entropies, in float64; -1 pads and has no part."""
    header, *rows = [line.split("\t") for line in (world / "laionet/train.tsv").read_text().splitlines()]
    place = header.index("label")
    for i, row in enumerate(rows):
        row[place] += f"|{(int(row[place]) + 1) % 120}" * (i % 2)
    path = world / "laionet" / "pairs.tsv"
    path.write_text("".join("\t".join(row) + "\n" for row in (header, *rows)))
    features, prototypes, scale, vocab, labels, loss, _ = first_step(
        world, tmp_path / "out", monkeypatch, "--data", str(path), "--multi-label", "all", *flags)  # fmt: skip
    logits = scale * features @ (prototypes / np.linalg.norm(prototypes, axis=1, keepdims=True)).T
    if flags:  # one group: its classes are the union, and the first of them is a label of none but those that have it
        logits[:, np.setdiff1d(np.arange(120), vocab.ids)] = -np.inf
        assert vocab.inside.all() and len(vocab.ids) < 120
    log_p = logits - np.log(np.exp(logits).sum(1, keepdims=True))
    assert labels.shape[1] == 2 and 0 < (labels[:, 1] < 0).sum() < len(labels)
    means = [np.mean([-log_p[i, c] for c in row if c >= 0]) for i, row in enumerate(labels)]
    assert loss == pytest.approx(np.mean(means), rel=1e-5)


def test_precision_reaches_the_tower(world, tmp_path, monkeypatch):
    losses = [first_step(world, tmp_path / p, monkeypatch, "--precision", p)[5] for p in ("fp32", "bf16", "fp16")]
    assert len(set(losses)) == 3 and losses[1:] == pytest.approx([losses[0]] * 2, rel=0.02)


def test_logits_are_scaled_cosines(world, tmp_path):
    """Rows of a head of very different lengths: the length has no say."""
    head = np.random.default_rng(0).normal(size=(120, 64)) * np.linspace(0.1, 9, 120)[:, None]
    np.save(tmp_path / "h.npy", head)
    flags = ["--head", "frozen", "--head-init", tmp_path / "h.npy", "--steps", 1, *FLAGS]
    run_here("--root", world, *flags, "--eval-sets", "val", "--out", tmp_path / "r")
    scale = float(weights_of(tmp_path / "r")["logit_scale"].exp())
    stored = torch.load(tmp_path / "r" / "checkpoint.pt", weights_only=True)["prototypes"]
    np.testing.assert_allclose(stored, head / np.linalg.norm(head, axis=1, keepdims=True), atol=1e-6)
    with np.load(tmp_path / "r" / "val.npz") as file:
        features, head = (x / np.linalg.norm(x, axis=1, keepdims=True) for x in (file["features"].astype(float), head))
        expected = scale * features @ head.T
        assert np.allclose(file["logits"], expected, atol=0.1)
        assert (expected[np.arange(len(expected)), file["predictions"]] > expected.max(1) - 0.1).all()
