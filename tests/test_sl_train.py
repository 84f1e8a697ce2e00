"""sl_vocab_subsample.py as a program: processes, resume, heads, multi-label, tail experiments, bad input."""

import functools
import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys

import numpy as np
import programs
import pytest
import torch
import torchvision
from PIL import Image
from programs import ROOT, assert_bit_equal, log_of, named, weights_of

import clip
import dino_laionet as dino
import sl_vocab_subsample as sl

FLAGS = ["--batch-size", "32", "--log-every", "1", "--warmup-steps", "2", "--precision", "fp32", "--device", "cpu"]
FLAGS += ["--eval-sets", "val"]
run = functools.partial(programs.run, "sl_vocab_subsample.py")
run_forked = functools.partial(programs.run_forked, "sl_vocab_subsample.py")
run_here = functools.partial(programs.run_here, sl)


@pytest.fixture(scope="module")
def clip_pt(world):
    """A small CLIP checkpoint with class prototypes, as ROOT/clip.pt is."""
    path = world / "head.pt"
    flags = ["--root", world, "--steps", "3", "--batch-size", "32", "--device", "cpu", "--precision", "fp32"]
    programs.run_here(clip, *flags, "--eval-sets", "val", "--out", path.parent / "clip_run", "--export", path)
    return path


@pytest.mark.parametrize("group", [0, 20])
def test_one_process_equals_two(world, tmp_path, group):
    """Losses, vocabularies and gradient norms; one group is the whole batch, groups of 20 lie across the border of the
    processes."""
    flags = [
        "--root",
        world,
        "--data",
        "laionet,incaps",
        "--vocab",
        "40",
        "--vocab-group",
        group,
        "--steps",
        "4",
        *FLAGS,
    ]
    run_here(*flags, "--out", tmp_path / "one")
    run_forked(*flags, "--out", tmp_path / "two", processes=2)
    one, two = log_of(tmp_path / "one"), log_of(tmp_path / "two")
    for name in "loss", "grad_norm", "drawn", "vocab":
        tolerance = 1e-5 if name == "loss" else 1e-3
        assert np.allclose([x[name] for x in one], [x[name] for x in two], rtol=tolerance), name
    assert abs(one[0]["loss"] - two[0]["loss"]) <= 1e-5 * one[0]["loss"]
    assert all(line["vocab"] == 40 and 0 < line["drawn"] < 1 for line in one)


def loss_of(model, labels, images, first, B):
    """Loss of rows first .. first + B of the global batch."""
    features, prototypes, scale = model(images[first : first + B])
    vocab, *_ = sl.vocab_of_batch(labels, first, B, 64, sl.draws_of(torch.arange(40) + 1, 30, 1.0), 0, 0)
    own = labels[first : first + B]
    own = own if vocab.ids is None else torch.searchsorted(vocab.ids, own)
    return sl.cross_entropy(sl.vocab_logits(features, prototypes, scale, vocab), own)


def test_gradients_of_two_halves_average_to_the_whole():
    """The mean of the ranks' losses is the loss of the batch, and so are the gradients (groups of 64, tower in eval)."""
    torch.manual_seed(0)
    model = sl.Classifier("tiny", 40, None, False).eval()
    images, labels = torch.randint(0, 256, (128, 3, 32, 32)), torch.randint(0, 40, (128, 1))
    whole = loss_of(model, labels, images, 0, 128)
    grads = torch.autograd.grad(whole, list(model.parameters()))
    halves = (loss_of(model, labels, images, 0, 64) + loss_of(model, labels, images, 64, 64)) / 2
    others = torch.autograd.grad(halves, list(model.parameters()))
    assert torch.allclose(whole, halves, rtol=1e-6)
    for a, b in zip(grads, others, strict=True):
        assert (a - b).norm() <= 1e-5 * a.norm() + 1e-12


@pytest.mark.parametrize("processes", [1, 2])
def test_kill_and_resume_is_bit_equal(world, tmp_path, processes):
    flags = ["--root", world, "--vocab", "24", "--vocab-group", "8", "--steps", "30", "--save-every", "3", *FLAGS]
    flags += ["--sampler", "sqrt", "--label-smoothing", "0.1"]
    go = run_here if processes == 1 else lambda *flags: run_forked(*flags, processes=processes).stdout
    go(*flags, "--out", tmp_path / "straight")
    programs.kill_after(7, tmp_path / "killed", "sl_vocab_subsample.py", *flags, processes=processes)
    step = torch.load(tmp_path / "killed" / "checkpoint.pt", weights_only=True)["step"]
    assert 0 < step < 30
    assert f"continued from step {step}" in go(*flags, "--out", tmp_path / "killed")
    assert_bit_equal(weights_of(tmp_path / "straight"), weights_of(tmp_path / "killed"))
    a, b = ([{**x, "images_per_s": 0} for x in log_of(tmp_path / name)] for name in ("straight", "killed"))
    assert a == b  # vocabularies are drawn again as they were


def test_sigterm_saves_and_exits_0(world, tmp_path):
    """To the process's group, loader workers and all, as torchrun, timeout and Slurm do; then the same command."""
    flags = ["--root", world, "--vocab", "24", "--vocab-group", "8", "--steps", "30", "--save-every", "0", *FLAGS]
    run_here(*flags, "--out", tmp_path / "straight")
    command = [sys.executable, ROOT / "sl_vocab_subsample.py", *map(str, flags), "--out", str(tmp_path / "stopped")]
    process = subprocess.Popen(command, env=programs.ENV, stdout=subprocess.PIPE, text=True, start_new_session=True)
    for line in process.stdout:
        if line.startswith("step      3"):
            os.killpg(process.pid, signal.SIGTERM)
            break
    rest = process.stdout.read()
    assert process.wait() == 0 and "SIGTERM: saved at step" in rest and "val" not in rest
    step = torch.load(tmp_path / "stopped" / "checkpoint.pt", weights_only=True)["step"]
    assert 3 <= step < 30 and f"continued from step {step}" in run_here(*flags, "--out", tmp_path / "stopped")
    assert_bit_equal(weights_of(tmp_path / "straight"), weights_of(tmp_path / "stopped"))
    results = [json.loads((tmp_path / name / "metrics.json").read_text())["val"] for name in ("straight", "stopped")]
    assert results[0] == results[1]


def test_frozen_head_is_bit_equal_and_learns_around_it(world, clip_pt, tmp_path):
    prototypes = torch.load(clip_pt, weights_only=True)["prototypes"]
    flags = ["--root", world, "--steps", "4", *FLAGS]
    for head in "frozen", "finetune":
        run_here(*flags, "--head", head, "--head-init", clip_pt, "--vocab", "32", "--vocab-group", "16", "--out", tmp_path / head)
        assert torch.equal(weights_of(tmp_path / head)["prototypes"], prototypes) == (head == "frozen")
    frozen = weights_of(tmp_path / "frozen")
    run_here(*flags, "--freeze-backbone", "--init", tmp_path / "frozen" / "checkpoint.pt", "--out", tmp_path / "probe")
    probe = weights_of(tmp_path / "probe")
    assert all(torch.equal(frozen[k], probe[k]) for k in frozen if k.startswith("visual."))
    assert not torch.equal(probe["prototypes"], frozen["prototypes"])


def test_evaluation_files(world, tmp_path):
    """--eval-only writes what the run wrote, and <set>.npz with the contract's arrays, for one and three processes."""
    run_here("--root", world, "--steps", "3", "--out", tmp_path / "run", *FLAGS)
    flags = ["--root", world, "--eval-only", tmp_path / "run" / "checkpoint.pt", *FLAGS, world / "laionet" / "train.tsv"]
    run_here(*flags, "--out", tmp_path / "one")
    run_forked(*flags, "--out", tmp_path / "three", processes=3)
    trained, one, three = (json.loads((tmp_path / x / "metrics.json").read_text()) for x in ("run", "one", "three"))
    assert trained["val"] == one["val"] == three["val"] and one["train"] == three["train"]
    with np.load(tmp_path / "one" / "train.npz") as a, np.load(tmp_path / "three" / "train.npz") as b:
        assert len(a["labels"]) > 2 * sl.EVAL_BATCH  # so that each process has images
        assert all(np.array_equal(a[key], b[key]) for key in a.files)
    keys = "n top1 balanced head medium tail spearman_acc spearman_pred chance retrieval knn probe".split()
    assert set(keys) <= set(one["val"]) and one["run"]["script"] == "sl_vocab_subsample.py"
    with np.load(tmp_path / "one" / "val.npz") as a, np.load(tmp_path / "three" / "val.npz") as b:
        assert all(np.array_equal(a[key], b[key]) for key in a.files)
        n = len(a["labels"])
        assert a["logits"].shape == (n, 120) and a["features"].shape == (n, 64) and a["prototypes"].shape == (120, 64)
        right = a["logits"].argmax(1) == a["labels"]
        assert abs(right.mean() - one["val"]["top1"]) < 0.01  # float16 logits can tie
        assert a["class_counts"].sum() == len((world / "laionet" / "train.tsv").read_text().splitlines()) - 1


def write_set(world, name, edit):
    """A copy of the laionet set with edited labels."""
    lines = (world / "laionet" / "train.tsv").read_text().splitlines()
    column = lines[0].split("\t").index("label")
    rows = [line.split("\t") for line in lines]
    for i, row in enumerate(rows[1:]):
        row[column] = edit(i, row[column])
    path = world / "laionet" / name
    path.write_text("\n".join("\t".join(row) for row in rows) + "\n")
    return path


def test_one_step_of_two_processes_is_that_of_one(world, tmp_path):
    """SGD without momentum's past, batch 128, groups of 64: the difference of the weights is the gradient, of every
    parameter, head and scale included; batch norm is synchronised."""
    flags = ["--root", world, "--vocab", "60", "--vocab-group", "64", "--batch-size", "128", "--optimizer", "sgd"]
    flags += ["--weight-decay", "0", "--warmup-steps", "0", "--lr", "100", "--steps", "1", *FLAGS[2:4], *FLAGS[6:-2]]
    for processes in 1, 2:
        run_forked(*flags, "--eval-sets", "val", "--out", tmp_path / str(processes), processes=processes)
    torch.manual_seed(0)
    start = {k: v.double() for k, v in sl.Classifier("tiny", 120, None, False).state_dict().items()}
    one, two = ({k: v.double() - start[k] for k, v in weights_of(tmp_path / str(n)).items()} for n in (1, 2))
    learned = [name for name, value in one.items() if "running" not in name and "num_batches" not in name]
    assert all(one[name].norm() > 0 for name in ("prototypes", "logit_scale", "visual.conv1.weight"))
    for name in learned:
        assert (one[name] - two[name]).norm() <= 1e-5 * one[name].norm() + 1e-6, name


def test_frozen_backbone_through_precision_and_evaluation(world, tmp_path):
    """bf16, and evaluations on the way: neither weights nor statistics of a frozen tower move."""
    flags = ["--root", world, *FLAGS[:4], "--device", "cpu", "--eval-sets", "val"]
    run_here(*flags, "--steps", "2", "--out", tmp_path / "a")
    more = ["--freeze-backbone", "--init", tmp_path / "a" / "checkpoint.pt", "--precision", "bf16", "--eval-every", "2"]
    run_here(*flags, *more, "--steps", "5", "--out", tmp_path / "b")
    a, b = weights_of(tmp_path / "a"), weights_of(tmp_path / "b")
    assert all(torch.equal(a[name], b[name]) for name in a if name.startswith("visual."))
    assert b["prototypes"].dtype == torch.float32 and not torch.equal(a["prototypes"], b["prototypes"])
    assert [line["step"] for line in log_of(tmp_path / "b") if "val" in line] == [2, 4]


def test_rows_without_and_with_several_labels(world, tmp_path):
    path = write_set(
        world, "several.tsv", lambda i, x: "" if i % 10 == 0 else f"{x}|{(int(x) + 1) % 120}" if i % 3 else x
    )
    lost, n = {}, len(path.read_text().splitlines()) - 1
    for mode in "first", "all", "random", "drop":
        flags = ["--root", world, "--data", path, "--multi-label", mode, "--vocab", "32", "--steps", "2", *FLAGS]
        printed = run_here(*flags, "--out", tmp_path / mode)
        lost[mode] = printed.split("rows left out: ")[1].split("\n")[0]
        counts = torch.load(tmp_path / mode / "checkpoint.pt", weights_only=True)["class_counts"]
        kept = n - len(range(0, n, 10)) - (sum(i % 10 > 0 and i % 3 > 0 for i in range(n)) if mode == "drop" else 0)
        assert abs(int(counts.sum()) - kept) <= 60  # all: halves are rounded, class by class
        if mode in ("first", "drop"):
            assert int(counts.sum()) == kept
    assert lost["first"] == lost["all"] == lost["random"] == f"{len(range(0, n, 10))} without a label"
    assert "with several labels" in lost["drop"]
    losses = {mode: log_of(tmp_path / mode)[0]["loss"] for mode in lost}
    assert len(set(losses.values())) == 4 and all(np.isfinite(x) for x in losses.values())


def test_zero_shot_tail_is_reported_apart(world, tmp_path):
    flags = ["--root", world, "--trim-tail", "90", "--steps", "3", *FLAGS]
    for shots in 0, 1:
        printed = run_here(*flags, "--trim-shots", shots, "--out", tmp_path / str(shots))
        checkpoint = torch.load(tmp_path / str(shots) / "checkpoint.pt", weights_only=True)
        counts, trimmed = checkpoint["class_counts"], checkpoint["trimmed"]
        assert len(trimmed) == 90 and counts[trimmed].max() <= shots
        assert "trimmed classes" in printed and "trimmed from the tail" in printed
    metrics = json.loads((tmp_path / "0" / "metrics.json").read_text())["val"]
    mixed = (90 * metrics["trimmed"] + 30 * metrics["untrimmed"]) / 120  # val is balanced
    assert abs(mixed - metrics["top1"]) < 1e-9
    flags = ["--root", world, "--eval-only", tmp_path / "0" / "checkpoint.pt", *FLAGS[:-2]]
    run_here(*flags, "--eval-sets", world / "laionet" / "train.tsv", "--out", tmp_path / "long")  # classes weigh equally
    with np.load(tmp_path / "long" / "train.npz") as file:
        right, labels = file["predictions"] == file["labels"], file["labels"]
    of_class = {c: right[labels == c].mean() for c in np.unique(labels)}
    metrics = json.loads((tmp_path / "long" / "metrics.json").read_text())["train"]
    for key, is_trimmed in ("trimmed", True), ("untrimmed", False):
        wanted = [a for c, a in of_class.items() if (c in trimmed.tolist()) == is_trimmed]
        assert metrics[key] == pytest.approx(np.mean(wanted))


def test_vocabulary_below_what_the_batch_holds_is_named(world, tmp_path):
    printed = run_here(
        "--root", world, "--vocab", "4", "--vocab-group", "32", "--steps", "2", "--out", tmp_path, *FLAGS
    )
    assert "--vocab 4 is less than what some of the groups of 32 images hold" in printed
    assert "chance loss about ln(4) = 1.386" in printed
    assert log_of(tmp_path)[0]["vocab"] > 4 and log_of(tmp_path)[0]["drawn"] == 0


@pytest.mark.parametrize("module, more", [(clip, []), (sl, []), (dino, ["--transfer", "--no-baselines"])])
def test_counts_are_those_of_the_mixture(module, more, world, tmp_path):
    """300 rows each, drawn 3:1: a row of the first counts one and a half times, one of the second half."""
    flags = ["--root", world, "--data", "laionet:3,incaps:1", "--steps", 1, *FLAGS[:-1], *more]
    programs.run_here(module, *flags, "--out", tmp_path)
    names = [row["name"] for row in clip.read_classes(world)]
    a, b = (np.bincount(clip.read_labels(clip.Table(world / name / "train.tsv"), named(names)), minlength=120)
            for name in ("laionet", "incaps"))  # fmt: skip
    found = torch.load(tmp_path / "checkpoint.pt", weights_only=True)["class_counts"].numpy()
    assert a.sum() == b.sum() == 300 and np.abs(found - (1.5 * a + 0.5 * b)).max() <= 0.5


@pytest.mark.parametrize("module, more", [(clip, []), (sl, []), (dino, ["--transfer", "--no-baselines"])])
def test_sets_without_weights_count_by_their_rows(module, more, world, tmp_path):
    """Of 300 and 100 rows each is drawn as often as another, and an epoch is 400 of them."""
    lines = (world / "incaps" / "train.tsv").read_text().splitlines(keepends=True)
    (world / "incaps" / "few.tsv").write_text("".join(lines[:101]))
    flags = ["--root", world, "--data", f"laionet,{world / 'incaps' / 'few.tsv'}", "--epochs", 0.2, *FLAGS[:-1], *more]
    programs.run_here(module, *flags, "--out", tmp_path)
    names, found = [row["name"] for row in clip.read_classes(world)], torch.load(tmp_path / "checkpoint.pt", weights_only=True)
    a, b = (np.bincount(clip.read_labels(clip.Table(world / name), named(names)), minlength=120)
            for name in ("laionet/train.tsv", "incaps/few.tsv"))  # fmt: skip
    assert found["class_counts"].tolist() == (a + b).tolist() and found["step"] == math.ceil(0.2 * 400 / 32) == 3


def test_rate_of_sgd_is_the_papers(world, tmp_path):
    flags = ["--optimizer", "sgd", "--weight-decay", "1e-4", "--warmup-steps", "0", "--bn", "local"]
    run_here("--root", world, "--steps", "3", *FLAGS, *flags, "--out", tmp_path)
    assert np.isclose(log_of(tmp_path)[0]["lr"], 0.1 * 32 / 256)


@pytest.mark.parametrize("module, flags, lr", [
    (clip, [], 3e-3), (clip, ["--arch", "ViT-S-16"], 1e-3), (sl, [], 3e-3), (sl, ["--arch", "ViT-S-16"], 1e-3),
    (sl, ["--optimizer", "sgd"], 0.1 / 8), (dino, [], 3e-3), (dino, ["--optimizer", "sgd"], 0.03 / 8),
    (dino, ["--arch", "ViT-S-16", "--global-size", "16", "--prototypes", "64"], 5e-4 / 8)])  # fmt: skip
def test_default_rates(module, flags, lr, world, tmp_path, monkeypatch):
    """Those of tower and optimiser: with SGD the papers', and of DINO's larger towers, for 256 images; 32 here."""
    seen = []
    for name in "AdamW", "SGD":
        monkeypatch.setattr(torch.optim, name, lambda groups, lr, *more, **kwargs: seen.append(lr) or sys.exit())
    with pytest.raises(SystemExit):
        programs.run_here(module, "--root", world, *FLAGS[:-1], *flags, "--out", tmp_path)
    assert seen == [pytest.approx(lr)]


@pytest.mark.parametrize("module", [sl, dino])
def test_momentum_starts_at_zero_when_the_first_step_is_skipped(module, world, tmp_path, monkeypatch):
    """A step with an infinite gradient is left out; torch's fused SGD then has a buffer of whatever was there."""
    method = {sl: "cross_entropy", dino: "dino_loss"}[module]
    right, calls = getattr(module, method), []

    def overflows_once(*args):
        calls.append(0)
        return right(*args) * (torch.inf if len(calls) == 1 else 1)

    monkeypatch.setattr(module, method, overflows_once)
    monkeypatch.setattr(torch, "empty_like", lambda x, **kwargs: torch.full_like(x, 1e6, **kwargs))  # as memory may be
    flags = [*FLAGS, "--optimizer", "sgd", "--steps", "3", "--out", tmp_path / "out", "--workers", "0"]
    if module is dino:
        flags += ["--no-baselines", "--eval-sets", "--transfer"]
    programs.run_here(module, "--root", world, *flags)
    assert len(calls) == 3 and max(float(x.abs().max()) for x in weights_of(tmp_path / "out").values()) < 1e3


@pytest.mark.parametrize("module", [sl, dino])
def test_a_step_left_out_leaves_no_trace_in_batch_norm(module, world, tmp_path, monkeypatch):
    method = {sl: "cross_entropy", dino: "dino_loss"}[module]
    right = getattr(module, method)
    monkeypatch.setattr(module, method, lambda *args: right(*args) * math.inf)
    flags = [*FLAGS[:-1], "--steps", "1", "--out", tmp_path / "out", "--workers", "0"]
    programs.run_here(module, "--root", world, *flags, *(["--no-baselines", "--transfer"] if module is dino else []))
    running = {name: value for name, value in weights_of(tmp_path / "out").items() if "running_" in name}
    assert running and all((value == float("var" in name)).all() for name, value in running.items())


def test_torchvisions_weights_are_evaluated_as_they_were_trained(tmp_path):
    """--init of a torchvision checkpoint, and --eval-only of what came of it, with ImageNet's pixel statistics."""
    torch.manual_seed(0)
    torch.save(torchvision.models.resnet50().state_dict(), tmp_path / "resnet50.pth")
    np.save(tmp_path / "images.npy", np.random.default_rng(0).integers(0, 256, (4, 32, 32, 3), np.uint8))
    (tmp_path / "train.tsv").write_text("image\tlabel\n" + "".join(f"images.npy:{i}\t{i % 2}\n" for i in range(4)))
    (tmp_path / "classes.tsv").write_text("name\ncat\ndog\n")
    flags = ["--data", tmp_path / "train.tsv", "--eval-sets", tmp_path / "train.tsv", "--precision", "fp32"]
    more = ["--arch", "resnet50", "--init", tmp_path / "resnet50.pth", "--freeze-backbone", "--batch-size", "4"]
    run_here(*flags, *more, "--steps", "1", "--workers", "0", "--device", "cpu", "--out", tmp_path / "run")
    run_here(*flags, "--eval-only", tmp_path / "run" / "checkpoint.pt", "--device", "cpu", "--out", tmp_path / "again")
    assert torch.load(tmp_path / "run" / "checkpoint.pt", weights_only=True)["pixels"] == "imagenet"
    with np.load(tmp_path / "run" / "train.npz") as a, np.load(tmp_path / "again" / "train.npz") as b:
        assert np.isfinite(a["features"]).all() and np.array_equal(a["features"], b["features"])


def test_images_in_files(world, tmp_path):
    """JPEGs of two sizes through the loader's workers; one broken file is replaced and counted."""
    rng = np.random.default_rng(0)
    (tmp_path / "train.tsv").write_text("image\tlabel\n" + "".join(f"{i}.jpg\t{i % 3}\n" for i in range(40)))
    (tmp_path / "classes.tsv").write_text("name\ncat\ndog\ncow\n")
    for i in range(40):
        size = (40, 48, 3) if i % 2 else (64, 40, 3)
        Image.fromarray(rng.integers(0, 256, size, np.uint8)).save(tmp_path / f"{i}.jpg")
    (tmp_path / "7.jpg").write_bytes(b"no picture")
    flags = ["--data", tmp_path / "train.tsv", "--steps", "4", "--max-bad", "1", "--workers", "1", *FLAGS]
    flags[flags.index("--eval-sets") + 1] = str(tmp_path / "train.tsv")
    printed = run_here(*flags, "--out", tmp_path / "out")
    assert "unreadable image (not an image)" in printed
    assert json.loads((tmp_path / "out" / "metrics.json").read_text())["train"]["n"] == 39


def test_bad_input(world, clip_pt, tmp_path):
    """One clear line, exit code 2, nothing written."""
    out, wrong = tmp_path / "out", write_set(world, "wrong.tsv", lambda i, x: "999" if i == 3 else x)
    unlabelled = write_set(world, "none.tsv", lambda i, x: "")
    np.save(tmp_path / "narrow.npy", np.ones((120,)))
    np.save(tmp_path / "other.npy", np.ones((120, 32)))  # another width than the tower's that --init has
    empty = tmp_path / "empty"
    empty.mkdir()
    (empty / "classes.tsv").write_text("name\n")
    shutil.copy(world / "laionet" / "train.tsv", empty / "train.tsv")
    cases = [
        (["--data", wrong], "row 4 has label '999'"),
        (["--eval-sets", wrong], "row 4 has label '999'"),  # told before training
        (["--data", unlabelled], "no row with a label is left"),
        (["--data", empty / "train.tsv", "--root", empty, "--eval-sets"], "has no classes"),
        (["--head", "frozen", "--head-init", tmp_path / "narrow.npy"], "expected an array (classes, width)"),
        (["--head", "frozen", "--head-init", tmp_path / "none.pt"], "cannot be read"),
        (["--init", clip_pt, "--arch", "ViT-S-16"], "does not fit the model"),
        (["--init", clip_pt, "--head", "frozen", "--head-init", tmp_path / "other.npy"], "(64, 128) for (32, 128)"),
        (["--data", "nowhere"], "no file"),
        (["--batch-size", "100000"], "larger than the"),
    ]
    for flags, message in cases:
        with pytest.raises(SystemExit, match=message.replace("(", r"\(").replace(")", r"\)")):
            run_here("--root", world, *FLAGS, *flags, "--out", out)
        assert not out.exists()
    result = run_forked("--root", world, "--data", wrong, "--out", out, *FLAGS, check=False)
    assert result.returncode == 2 and "Traceback" not in result.stdout and "row 4" in result.stdout


def test_images_that_are_not_finite(world, tmp_path):
    """An .npy of floats, with NaN, is refused before training, in a test set too; a TIFF of NaN is a bad image."""
    images, out = np.full((40, 32, 32, 3), np.nan, np.float32), tmp_path / "out"
    np.save(tmp_path / "float.npy", images)
    path = tmp_path / "float.tsv"
    path.write_text("image\tlabel\n" + "".join(f"float.npy:{i}\t{i}\n" for i in range(40)) + "float.tif\t0\n")
    Image.fromarray(images[0, :, :, 0]).save(tmp_path / "float.tif")
    assert sl.read_image(sl.Table(path), 40, 1, 10**6) == "values that are not finite"
    assert sl.read_image(sl.Table(path), 0, 1, 10**6) == "no .npy file of uint8 (N, H, W, 3)"
    Image.fromarray(np.full((32, 32), 7, np.float32)).save(tmp_path / "float.tif")
    assert sl.read_image(sl.Table(path), 40, 1, 10**6).getpixel((0, 0)) == (7, 7, 7)
    path.write_text(path.read_text().replace("float.tif\t0\n", ""))
    result = run_forked("--root", world, "--data", path, *FLAGS, "--out", out, check=False)
    expected = "float.npy holds float32 (40, 32, 32, 3), expected uint8 (N, H, W, 3)"
    assert result.returncode == 2 and "Traceback" not in result.stdout and not out.exists()
    assert expected in result.stdout.strip().split("\n")[-1]
    with pytest.raises(SystemExit, match=re.escape(expected)):
        run_here("--root", world, *FLAGS, "--eval-sets", path, "--steps", "1", "--out", out)
    assert not out.exists()


def test_copied_alone(world, tmp_path):
    """The script in a folder of its own trains on a given world."""
    shutil.copy(ROOT / "sl_vocab_subsample.py", tmp_path / "mine.py")
    environment = {k: v for k, v in programs.ENV.items() if k != "PYTHONPATH"}
    flags = ["--root", world, "--steps", "2", "--out", tmp_path / "out", *FLAGS]
    result = programs.run("mine.py", *flags, folder=tmp_path, cwd=tmp_path, env=environment)
    assert "val" in result.stdout and (tmp_path / "out" / "metrics.json").is_file()
    missing = programs.run("mine.py", folder=tmp_path, cwd=tmp_path, env=environment, check=False)
    assert missing.returncode == 2 and "no build_datasets.py beside mine.py" in missing.stdout
    assert os.listdir(tmp_path / "out") and not (tmp_path / "data").exists()
