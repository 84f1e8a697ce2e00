"""dino_laionet.py as a program: files, processes, resume, SIGTERM, bad images, export, bad input."""

import argparse
import copy
import functools
import json
import math
import re
import resource
import shutil
import signal
import subprocess
import sys

import numpy as np
import programs
import pytest
import torch
from PIL import Image
from programs import ENV, ROOT, assert_bit_equal, log_of, named, weights_of
from sklearn.neighbors import KNeighborsClassifier

import dino_laionet as dino
import evaluate
import sl_vocab_subsample as sl

FLAGS = ["--batch-size", "32", "--log-every", "1", "--warmup-steps", "2", "--precision", "fp32", "--device", "cpu"]
FLAGS += ["--eval-sets", "val", "--probe-images", "100", "--prototypes", "64"]
QUICK = ["--transfer", *FLAGS, "--no-baselines"]
SMALL = ["--sample-prototypes", "16"]
run = functools.partial(programs.run, "dino_laionet.py")
run_forked = functools.partial(programs.run_forked, "dino_laionet.py")
run_here = functools.partial(programs.run_here, dino)
STATE = ("student_prototypes", "dino_prototypes", "usage", "last_won", "center")


def run_start(world, tmp_path, flags):
    """The prototypes before the first step: those of a run that is stopped at a learning rate of nearly 0."""
    flags = [*flags, "--lr", "1e-30", "--steps", "1", "--out", tmp_path / "start"]
    run_here(*flags)
    return state_of(tmp_path / "start")["student_prototypes"]


def state_of(out):
    return torch.load(out / "checkpoint.pt", weights_only=True)


@pytest.fixture(scope="module")
def trained(world):
    """A run as a program, with local crops, an export and the baselines; its folder and what it printed."""
    out = world / "dino"
    flags = ["--steps", "4", "--local-crops", "2", "--export", world / "backbone.pt", "--eval-every", "2", *SMALL]
    return out, run_forked("--root", world, *flags, *FLAGS, "--out", out).stdout


def test_files_and_table(world, trained):
    out, printed = trained
    metrics = json.loads((out / "metrics.json").read_text())
    keys = "n top1 balanced head medium tail knn probe random_knn random_probe pixels_knn pixels_probe chance".split()
    assert set(keys) <= set(metrics["val"]) and metrics["val"]["top1"] == metrics["val"]["probe"]
    assert metrics["run"]["script"] == "dino_laionet.py" and metrics["run"]["step"] == 4
    assert 0 < metrics["run"]["unique_prototypes"] <= metrics["run"]["prototypes"] == 64
    header, line = (next(x for x in printed.splitlines()[::-1] if x.startswith(start)) for start in ("test set", "val"))
    assert re.split(r"\s{2,}", header)[2:] == [
        "knn",
        "random knn",
        "pixels knn",
        "probe",
        "random probe",
        "pixels probe",
        "chance",
    ]
    assert line.split()[1] == str(metrics["val"]["n"]) and f"{metrics['val']['knn']:.1%}" == line.split()[2]
    with np.load(out / "val.npz") as found:
        names = "logits features prototypes predictions labels rows class_counts class_names".split()
        assert set(names) == set(found.files)
        n = len(found["labels"])
        assert found["logits"].shape == (n, 120) and found["features"].shape == (n, 256)
        assert found["prototypes"].shape == (120, 256)
        assert np.mean(found["predictions"] == found["labels"]) == pytest.approx(metrics["val"]["probe"])
    unseen = np.load(world / "unseen" / "test.npy", mmap_mode="r")
    assert metrics["unseen"]["n"] == len(unseen) and metrics["unseen"]["spearman_acc"] is None
    assert metrics["unseen"]["chance"] == 1 / 90 and metrics["unseen"]["random_probe"] is not None
    tasks = evaluate.read_tasks([str(out / "transfer")], [])  # as evaluate.py probe does
    assert [(name, train["n_classes"], len(test["labels"])) for _, name, train, _, test in tasks] == [
        ("unseen", 90, len(unseen))
    ]
    lines = [line for line in log_of(out) if "loss" in line]
    assert [line["step"] for line in lines] == [1, 2, 3, 4] and any("val" in line for line in log_of(out))
    for line in lines:
        assert 0 <= line["teacher_entropy"] <= 1 + 1e-6 and 0 <= line["spread_entropy"] <= 1 + 1e-6
        assert line["teacher_kl"] > 0  # log_every is 1: loss and entropy are of the same step
        assert line["loss"] - line["teacher_kl"] == pytest.approx(np.log(16) * line["teacher_entropy"], abs=1e-4)
        assert 0 < line["won_1000"] <= 1 and line["feature_std"] > 0 and line["temperature"] > 0
        assert 0.95 <= line["ema"] < 1 and line["bad_images"] == 0 and np.isfinite(line["loss"])
    won = state_of(out)["usage"]
    assert int(won.sum()) == 4 * 2 * 32 and lines[-1]["won_1000"] == pytest.approx(float((won > 0).float().mean()))


def test_eval_only_gives_the_metrics_of_the_run(world, trained, tmp_path):
    flags = ["--root", world, "--eval-only", trained[0] / "checkpoint.pt", *QUICK, "--out", tmp_path]
    run_here(*flags)
    again, first = (json.loads((x / "metrics.json").read_text()) for x in (tmp_path, trained[0]))
    assert {**first["val"], **again["val"]} == first["val"] and len(again["val"]) > 10
    assert again["run"]["unique_prototypes"] == first["run"]["unique_prototypes"]


def test_eval_only_probes_as_many_images_as_the_run(world, trained, tmp_path):
    """--probe-images of the run, where the command names none; another where it names one."""
    flags = ["--root", world, "--eval-only", trained[0] / "checkpoint.pt", "--transfer", "--eval-sets", "val",
             "--no-baselines", "--device", "cpu"]
    run_here(*flags, "--out", tmp_path / "a")
    run_here(*flags, "--probe-images", "60", "--out", tmp_path / "b")
    first, again, fewer = (json.loads((x / "metrics.json").read_text())["val"]
                           for x in (trained[0], tmp_path / "a", tmp_path / "b"))
    assert again["probe"] == first["probe"] and again["knn"] == first["knn"]
    assert (fewer["probe"], fewer["knn"]) != (first["probe"], first["knn"])


def test_a_checkpoint_of_another_program(world, tmp_path):
    torch.save({"state_dict": {"visual.x": torch.zeros(1)}, "args": argparse.Namespace(a=1)}, tmp_path / "other.pt")
    for root in world, tmp_path:  # also where there is no set of the default's name
        with pytest.raises(SystemExit, match="is no checkpoint of this script"):
            run_here("--root", root, "--eval-only", tmp_path / "other.pt", "--out", tmp_path / "out")


def test_probes_are_the_same_for_one_and_two_ranks(world, trained, tmp_path):
    """k-NN, probe, transfer and baselines, over a number of images that 2 does not divide, some for each process."""
    lines = (world / "laionet" / "train.tsv").read_text().splitlines(keepends=True)
    (world / "laionet" / "odd.tsv").write_text("".join(lines[:300]))
    flags = ["--root", world, "--eval-only", trained[0] / "checkpoint.pt", "--device", "cpu", "--probe-images", "250"]
    flags += ["--eval-sets", world / "laionet" / "odd.tsv"]
    for processes in 1, 2:
        run_forked(*flags, "--out", tmp_path / str(processes), processes=processes)
    one, two = (json.loads((tmp_path / n / "metrics.json").read_text()) for n in "12")
    assert one.pop("run") and two.pop("run") and one == two
    assert one["odd"]["n"] == 299 > 2 * dino.EVAL_BATCH and one["odd"]["pixels_knn"] is not None and "unseen" in one


def test_the_random_network_uses_all_of_its_layers(world):
    """Residual gains start at 0, which would leave stem and shortcuts; statistics are those of the images."""
    args = dino.parse_args(["--head-hidden", "8", "--prototype-dim", "8"])
    model = dino.random_network(args, dino.Table(world / "val.tsv"), torch.device("cpu"))
    gains = [m.weight for m in model.modules() if isinstance(m, dino.BatchNorm2d)]
    assert len(gains) > 5 and all(bool((gain == 1).all()) for gain in gains)
    assert all(bool((m.running_var != 1).all()) for m in model.visual.modules() if isinstance(m, dino.BatchNorm2d))


def test_the_random_network_sees_an_even_sample(tmp_path, monkeypatch):
    """Of a large set, which may be sorted by class, 2,560 images from the first to the last."""
    (tmp_path / "train.tsv").write_text("image\n" + "".join(f"{i}\n" for i in range(10_000)))
    seen = []

    def images_of(table, size, max_pixels, rows):
        seen.extend(int(table.get(row, "image")) for row in rows)
        return torch.zeros(len(rows), 3, size, size), ["missing file"] * len(rows)

    monkeypatch.setattr(dino, "read_squares", images_of)
    args = dino.parse_args(["--head-hidden", "8", "--prototype-dim", "8"])
    dino.random_network(args, dino.Table(tmp_path / "train.tsv"), torch.device("cpu"))
    assert len(seen) == 2560 and (seen[0], seen[-1]) == (0, 9999) and set(np.diff(seen)) == {3, 4}


def test_export_starts_a_classifier(world, trained, tmp_path):
    exported = torch.load(world / "backbone.pt", weights_only=True)
    assert "optimizer" not in exported
    assert_bit_equal(exported["state_dict"], weights_of(trained[0]))  # the teacher's
    flags = ["--root", world, "--init", world / "backbone.pt", "--freeze-backbone", "--steps", "2", *FLAGS[:12]]
    programs.run_here(sl, *flags, "--out", tmp_path)
    own, theirs = weights_of(tmp_path), exported["state_dict"]
    towers = [name for name in own if name.startswith("visual.")]
    assert [name for name in towers if not torch.equal(own[name], theirs[name])] == ["visual.proj.weight", "visual.proj.bias"]
    flags = ["--root", world, "--init", world / "backbone.pt", "--steps", "1", "--lr", "1e-30", *QUICK]
    run_here(*flags, "--out", tmp_path / "dino")  # student and teacher both start from it
    for found in state_of(tmp_path / "dino")["student"], weights_of(tmp_path / "dino"):
        assert torch.equal(found["visual.conv1.weight"], theirs["visual.conv1.weight"])


@pytest.mark.parametrize("centering, optimizer", [("sinkhorn", "adamw"), ("mean", "sgd")])
def test_one_process_equals_two(world, tmp_path, centering, optimizer):
    """At a low rate: at the default one the losses part by up to 3e-4 within ten steps."""
    flags = ["--root", world, "--centering", centering, "--optimizer", optimizer, "--steps", "10", *SMALL, *QUICK]
    flags += ["--local-crops", "1", "--lr", "1e-4", "--eval-sets"]
    run_here(*flags, "--out", tmp_path / "one")
    run_forked(*flags, "--out", tmp_path / "two", processes=2)
    one, two = log_of(tmp_path / "one"), log_of(tmp_path / "two")
    assert len(one) == len(two) == 10
    for a, b in zip(one, two, strict=True):
        assert abs(a["loss"] - b["loss"]) <= 1e-5, (a, b)
        assert a["grad_norm"] == pytest.approx(b["grad_norm"], rel=1e-3) and a["won_1000"] == b["won_1000"]
        for sign in "teacher_entropy", "kl_uniform", "teacher_kl", "spread_entropy":  # of all images, not of a part
            assert a[sign] == pytest.approx(b[sign], rel=1e-3), sign
    one, two = (state_of(tmp_path / name)["student_prototypes"] for name in ("one", "two"))
    start = run_start(world, tmp_path, flags)
    assert (one - two).norm() < 0.01 * (one - start).norm()


@pytest.mark.parametrize("arch", ["RN50", "ViT-S-16"])
def test_the_papers_towers_train_on_one_and_two_processes(arch, tmp_path):
    """With the paper's kinds of crops, augmentation, optimiser and sampling, of pictures; the export has the tower."""
    for i, image in enumerate(np.random.default_rng(0).integers(0, 256, (12, 72, 80, 3), np.uint8)):
        Image.fromarray(image).save(tmp_path / f"{i}.png")
    (tmp_path / "train.tsv").write_text("image\n" + "".join(f"{i}.png\n" for i in range(12)))
    flags = ["--data", tmp_path / "train.tsv", *SMALL, *QUICK, "--eval-sets", "--steps", "2", "--batch-size", "4", "--arch", arch]
    flags += ["--augment", "dino", "--global-size", "64", "--local-crops", "1", "--local-size", "32", "--no-head-bn"]
    flags += ["--optimizer", "sgd", "--centering", "mean", "--head-hidden", "32", "--prototype-dim", "16", "--workers", "0"]
    run_here(*flags, "--out", tmp_path / "one", "--export", tmp_path / "tower.pt")
    run_forked(*flags, "--out", tmp_path / "two", processes=2)
    one, two = ([line["loss"] for line in log_of(tmp_path / name)] for name in ("one", "two"))
    assert len(one) == 2 and np.isfinite(one).all() and one == pytest.approx(two, rel=1e-3)
    exported = torch.load(tmp_path / "tower.pt", weights_only=True)
    assert exported["arch"] == arch and {k.split(".")[0] for k in exported["state_dict"]} == {"visual", "head"}
    for name in ("one", "two"):
        shutil.rmtree(tmp_path / name)  # hundreds of MB


@pytest.mark.parametrize(
    "flags",
    [
        [*SMALL, "--prototype-power", "-0.5", "--centering", "mean"],
        ["--optimizer", "sgd", "--lr", "0.1", "--freeze-prototypes", "3"],
    ],
)
def test_kill_and_resume_is_bit_equal(world, tmp_path, flags):
    flags = ["--root", world, "--steps", "30", "--save-every", "5", *QUICK, *flags, "--eval-sets"]
    run_here(*flags, "--out", tmp_path / "straight")
    programs.kill_after(7, tmp_path / "killed", "dino_laionet.py", *flags)
    step = state_of(tmp_path / "killed")["step"]
    assert 0 < step < 30
    assert f"continued from step {step}" in run_here(*flags, "--out", tmp_path / "killed")
    a, b = (state_of(tmp_path / name) for name in ("straight", "killed"))
    for name in "state_dict", "student", "prototype_state":
        assert_bit_equal(a[name], b[name])
    assert_bit_equal({name: a[name] for name in STATE}, {name: b[name] for name in STATE})
    a, b = ([{**x, "images_per_s": 0} for x in log_of(tmp_path / name)] for name in ("straight", "killed"))
    assert a == b


def test_sigterm_saves_and_exits_0(world, tmp_path):
    flags = ["--root", world, "--steps", "20", "--save-every", "0", *SMALL, *QUICK, "--eval-sets"]
    run_here(*flags, "--out", tmp_path / "straight")
    command = [sys.executable, ROOT / "dino_laionet.py", *map(str, flags), "--out", str(tmp_path / "stopped")]
    process = subprocess.Popen(command, env=ENV, stdout=subprocess.PIPE, text=True)
    for line in process.stdout:
        if line.startswith("step      3"):
            process.send_signal(signal.SIGTERM)
            break
    rest = process.stdout.read()
    assert process.wait() == 0 and "SIGTERM: saved at step" in rest
    run_here(*flags, "--out", tmp_path / "stopped")
    assert_bit_equal(weights_of(tmp_path / "straight"), weights_of(tmp_path / "stopped"))


def test_bad_images_are_replaced_and_counted(tmp_path):
    rng = np.random.default_rng(0)
    (tmp_path / "train.tsv").write_text("image\tlabel\n" + "".join(f"{i}.jpg\t{i % 3}\n" for i in range(40)))
    (tmp_path / "classes.tsv").write_text("name\ncat\ndog\ncow\n")
    for i in range(40):
        size = (40, 48, 3) if i % 2 else (64, 40, 3)
        Image.fromarray(rng.integers(0, 256, size, np.uint8)).save(tmp_path / f"{i}.jpg")
    (tmp_path / "7.jpg").write_bytes(b"no picture")
    flags = ["--data", tmp_path / "train.tsv", "--probe-set", tmp_path / "train.tsv", "--steps", "4", "--max-bad", "1"]
    flags += ["--augment", "dino", "--local-crops", "1", "--workers", "0", *QUICK, "--eval-sets"]
    printed = run_here(*flags, tmp_path / "train.tsv", "--out", tmp_path / "out")
    assert "unreadable image (not an image)" in printed
    assert 3 <= log_of(tmp_path / "out")[-1]["bad_images"] <= 6  # 128 draws of 40: row 7 comes 3 or 4 times
    metrics = json.loads((tmp_path / "out" / "metrics.json").read_text())["train"]
    assert metrics["n"] == 39 and metrics["bad_images"] == {"not an image": 1}
    assert metrics["knn"] is None and metrics["probe"] is not None  # each is its own nearest neighbour
    assert "nothing to probe" not in printed
    with np.load(tmp_path / "out" / "train.npz") as found:
        assert found["rows"].tolist() == [i for i in range(40) if i != 7] and (found["labels"] == found["rows"] % 3).all()
    with pytest.raises(SystemExit, match="cannot be read .* more than --max-bad 0.0"):
        flags[flags.index("--max-bad") + 1] = "0"
        run_here(*flags, tmp_path / "train.tsv", "--out", tmp_path / "strict")


def test_pictures_without_labels(world, tmp_path):
    """No classes.tsv: the run ends well, and --transfer probes other worlds; a probe set without labels is refused."""
    for i, image in enumerate(np.load(world / "val.npy")[:40]):
        Image.fromarray(image).save(tmp_path / f"{i}.png")
    (tmp_path / "train.tsv").write_text("image\n" + "".join(f"{i}.png\n" for i in range(40)))
    flags = ["--data", tmp_path / "train.tsv", "--steps", "2", "--workers", "0", *FLAGS[:-6], "--prototypes", "64"]
    assert "nothing to probe" in run_here(*flags, "--out", tmp_path / "plain")
    (tmp_path / "own.tsv").write_text("image\tlabel\n0.png\t7\n1.png\t\n2.png\t3\n")
    again = ["--eval-only", tmp_path / "plain" / "checkpoint.pt", "--device", "cpu", "--eval-sets", tmp_path / "own.tsv"]
    assert "nothing to probe" in run_here(*again, "--out", tmp_path / "features")  # root and data are the run's
    with np.load(tmp_path / "features" / "own.npz") as file:
        assert file["features"].shape == (3, 256) and file["labels"].tolist() == [7, -1, 3]
    metrics = json.loads((tmp_path / "features" / "metrics.json").read_text())
    assert metrics["own"]["n"] == 3 and metrics["own"]["probe"] is None and "train.tsv" in metrics["run"]["data"]
    other = tmp_path / "other"
    other.mkdir()
    (other / "classes.tsv").write_text("name\ncat\ndog\ncow\n")
    for name in "train", "test":
        rows = "".join(f"../{i}.png\t{i % 3}\n" for i in range(40))
        (other / f"{name}.tsv").write_text("image\tlabel\n" + rows)
    run_here(*flags, "--transfer", other, "--out", tmp_path / "plain")
    metrics = json.loads((tmp_path / "plain" / "metrics.json").read_text())["other"]
    assert metrics["n"] == 40 and metrics["knn"] > 1 / 3 and metrics["pixels_probe"] > 0.9  # it has seen them
    assert metrics["spearman_acc"] is None is metrics["tail"] and metrics["pixels_probe_decay"] > 0
    run_here(*flags, "--transfer", other, "--probe-images", "12", "--resume", "auto", "--out", tmp_path / "plain")
    with np.load(tmp_path / "plain" / "transfer" / "other_train.npz") as file:
        assert len(file["labels"]) == 40  # the probe here saw 12 of them, evaluate.py's will see all
    (other / "train.tsv").write_text("image\n../0.png\n../1.png\n")
    with pytest.raises(SystemExit, match="0 rows with a label, so no probe can be fitted"):
        run_here(*flags, "--transfer", other, "--out", tmp_path / "plain")
    with pytest.raises(SystemExit, match="no classes.tsv"):
        run_here(*flags, "--transfer", tmp_path / "nowhere", "--out", tmp_path / "plain")


def test_local_batch_norm_evaluates_as_the_checkpoint(world, tmp_path):
    """Processes have their own statistics; metrics are those of the first one's, which the checkpoint holds."""
    sets = ["--eval-sets", world / "laionet" / "train.tsv"]  # 300 rows: some for each process
    run_forked("--root", world, "--bn", "local", "--steps", "4", *SMALL, *QUICK, *sets, "--out", tmp_path / "two", processes=2)
    flags = ["--root", world, "--eval-only", tmp_path / "two" / "checkpoint.pt", *QUICK, *sets]
    run_here(*flags, "--out", tmp_path / "again")
    two, again = (np.load(tmp_path / name / "train.npz")["features"] for name in ("two", "again"))
    np.testing.assert_allclose(two.astype(np.float32), again.astype(np.float32), rtol=0.01, atol=0.01)


def test_schedules(world, tmp_path):
    """Five steps: temperature 0.1 to 0.02 over four, EMA and weight decay by half a cosine, prototypes held for two."""
    flags = ["--root", world, *QUICK, "--eval-sets", "--steps", "5"]
    more = ["--warmup-teacher-temp", "0.1", "--warmup-teacher-temp-steps", "4", "--ema", "0.9", "--lr", "0.1"]
    more += ["--weight-decay", "0.1", "--weight-decay-end", "0.3", "--optimizer", "sgd"]
    run_here(*flags, *more, "--freeze-prototypes", "2", "--save-every", "1", "--out", tmp_path / "run")
    lines = log_of(tmp_path / "run")
    assert [line["temperature"] for line in lines] == pytest.approx([0.1, 0.08, 0.06, 0.04, 0.02])
    cosines = (1 + np.cos(np.pi * np.arange(5) / 5)) / 2
    assert [line["ema"] for line in lines] == pytest.approx(1 - 0.1 * cosines)
    assert [line["lr"] for line in lines] == pytest.approx(
        [0.05, 0.1, *(0.1 * (1 + np.cos(np.pi * np.arange(3) / 3)) / 2)])  # fmt: skip
    groups = state_of(tmp_path / "run")["optimizer"]["param_groups"]
    assert groups[0]["weight_decay"] == pytest.approx(0.3 - 0.2 * cosines[4]) and groups[1]["weight_decay"] == 0
    start = run_start(world, tmp_path, flags[:-2])
    for steps, is_held in ((2, True), (3, False)):
        run_here(*flags[:-2], *more, "--freeze-prototypes", "2", "--steps", steps, "--out", tmp_path / f"held{steps}")
        assert torch.equal(state_of(tmp_path / f"held{steps}")["student_prototypes"], start) == is_held


@pytest.mark.parametrize("end, at_half", [("0", 0.05), ("-1", 0.1)])
def test_weight_decay_may_end_at_0(end, at_half, world, tmp_path):
    flags = ["--root", world, *QUICK, "--eval-sets", "--steps", 2, "--weight-decay", 0.1, "--weight-decay-end", end]
    run_here(*flags, "--out", tmp_path)
    assert state_of(tmp_path)["optimizer"]["param_groups"][0]["weight_decay"] == pytest.approx(at_half)


@pytest.mark.parametrize("precision, tolerance", [("bf16", 0.02), ("fp16", 0.005)])
def test_precisions_and_the_other_clipping(world, tmp_path, precision, tolerance):
    """Autocast on the CPU: the first loss is fp32's but for rounding; with --clip-of all no step is longer than asked."""
    flags = ["--root", world, *SMALL, *QUICK, "--eval-sets", "--steps", "3", "--clip-of", "all", "--clip-grad", "0.01"]
    flags += ["--batch-size", "16", "--probe-images", "20"]  # float16 is slow on a CPU
    losses = {}
    for kind in ("fp32", precision):
        run_here(*flags, "--precision", kind, "--optimizer", "sgd", "--lr", "1", "--weight-decay", "0", "--out",
                 tmp_path / kind)  # fmt: skip
        losses[kind] = [line["loss"] for line in log_of(tmp_path / kind)]
        found = state_of(tmp_path / kind)
        moves = [s["momentum_buffer"] for s in found["optimizer"]["state"].values()]
        moves += [found["prototype_state"]["momentum_buffer"]]
        # three gradients of norm 0.01 at most, with momentum 0.9
        assert float(torch.stack([x.norm() for x in moves]).norm()) <= 0.01 * (1 + 0.9 + 0.81) * 1.01
    assert losses[precision][0] == pytest.approx(losses["fp32"][0], rel=tolerance)
    assert losses[precision][0] != losses["fp32"][0] and np.isfinite(losses[precision]).all()
    assert state_of(tmp_path / precision)["scaler"].get("scale") == (None if precision == "bf16" else 2**16)


def test_collapse_is_named_once(world, tmp_path):
    """Not in the first fifth of the steps, nor in the warm-up: until then a start may look like one."""
    flags = ["--root", world, "--steps", "10", *QUICK, "--eval-sets", "--warmup-steps", "1"]
    printed = run_here(*flags, "--teacher-temp", "10", "--out", tmp_path / "flat")
    assert "step 4: the model has collapsed: targets are near uniform" in printed and printed.count("has collapsed") == 1
    assert "collapsed" not in run_here(*flags, "--out", tmp_path / "well")


@pytest.mark.parametrize("sign, value, said", [
    ("teacher_entropy", 0.91, "targets are near uniform"), ("spread_entropy", 0.04, "one prototype takes all"),
    ("feature_std", 0.04, "all features are the same")])  # fmt: skip
def test_each_collapse_has_its_words(sign, value, said, world, tmp_path, monkeypatch):
    diagnostics = dino.diagnostics
    monkeypatch.setattr(dino, "diagnostics", lambda *args: diagnostics(*args) | {sign: torch.tensor(value)})
    printed = run_here("--root", world, "--steps", "6", *QUICK, "--eval-sets", "--out", tmp_path)
    assert f"the model has collapsed: {said}; try" in printed


@pytest.mark.parametrize("centering", ["mean", "sinkhorn"])
def test_signs_of_a_collapse_are_those_of_centred_logits(centering, world, tmp_path, monkeypatch):
    """What all images share the centre takes off: it is no collapse; the centre is the one that the targets had."""
    seen, center_and_sharpen, diagnostics = [], dino.center_and_sharpen, dino.diagnostics

    def targets_of(logits, center, proto_ids, *more):
        seen.append((logits.clone(), center[proto_ids].clone()))
        return center_and_sharpen(logits, center, proto_ids, *more)

    def signs_of(loss, logits, *more):
        expected = seen[-1][0] - seen[-1][1] if centering == "mean" else None
        assert expected is None or torch.equal(logits, expected) and bool(seen[-1][1].any()) == (len(seen) > 1)
        seen.append(seen[-1] if seen else ())
        return diagnostics(loss, logits, *more)

    monkeypatch.setattr(dino, "center_and_sharpen", targets_of)
    monkeypatch.setattr(dino, "diagnostics", signs_of)
    run_here("--root", world, "--steps", "3", *SMALL, *QUICK, "--eval-sets", "--centering", centering, "--out", tmp_path)
    assert len(seen) == (6 if centering == "mean" else 3)


def test_non_finite_steps_are_left_out(world, tmp_path, monkeypatch):
    """Two bad steps are skipped: the weights stay finite; ten in a row end the run."""
    calls, dino_loss = [], dino.dino_loss

    def broken(*args):
        calls.append(1)
        return dino_loss(*args) * (float("nan") if len(calls) in bad_calls else 1)

    monkeypatch.setattr(dino, "dino_loss", broken)
    flags, bad_calls = ["--root", world, *SMALL, *QUICK, "--eval-sets"], {3, 4}
    printed = run_here(*flags, "--steps", "6", "--out", tmp_path / "a")
    assert "step 3: loss not finite: step left out (1 in a row)" in printed and "(2 in a row)" in printed
    found = state_of(tmp_path / "a")
    tensors = [*found["state_dict"].values(), *found["student"].values(), found["student_prototypes"]]
    assert all(bool(x.isfinite().all()) for x in [*tensors, *found["prototype_state"].values()])
    calls.clear()
    bad_calls = {1, 2}
    run_here(*flags, "--steps", "2", "--centering", "mean", "--out", tmp_path / "centre")
    found = state_of(tmp_path / "centre")
    assert not found["center"].any() and not found["usage"].any()
    assert [line["loss"] for line in log_of(tmp_path / "centre")] == [None, None]
    calls.clear()
    bad_calls = set(range(1, 99))
    with pytest.raises(SystemExit, match="ten steps in a row"):
        run_here(*flags, "--steps", "20", "--out", tmp_path / "b")
    assert len(calls) == 10


def test_full_disk_keeps_the_last_checkpoint(world, tmp_path):
    def limit_file_size():
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))

    flags = ["--root", world, *SMALL, *QUICK, "--eval-sets", "--out", tmp_path / "run"]
    run_here(*flags, "--steps", "2")
    before = (tmp_path / "run" / "checkpoint.pt").read_bytes()
    result = run(*flags, "--steps", "4", "--resume", "off", check=False, preexec_fn=limit_file_size)
    assert result.returncode == 2 and "cannot write" in result.stdout and "Traceback" not in result.stdout
    assert (tmp_path / "run" / "checkpoint.old.pt").read_bytes() == before  # --resume off started over


def test_bad_input(world, trained, tmp_path, capsys):
    """One clear line, exit code 2, nothing written."""
    out, good = tmp_path / "out", state_of(trained[0])
    flags = ["--root", world, "--steps", "1", "--batch-size", "32", "--eval-sets", "--device", "cpu"]
    programs.run_here(sl, *flags, "--out", world / "classifier")
    torch.save({k: v for k, v in good.items() if k != "args"}, tmp_path / "no_args.pt")
    torch.save(good | {"state_dict": {}}, tmp_path / "other_weights.pt")
    torch.save(good | {"state_dict": good["state_dict"] | {"visual.conv1.weight": 3}}, tmp_path / "number.pt")
    (tmp_path / "lost").mkdir()
    (tmp_path / "lost" / "classes.tsv").write_text("name\ncat\ndog\n")
    for name in "train", "test":
        (tmp_path / "lost" / f"{name}.tsv").write_text("image\tlabel\nx.png\t0\ny.png\t1\n")
    cases = [
        (["--global-size", "33"], "train.tsv (32 x 32): lower --global-size"),
        (["--local-crops", "1", "--local-size", "40"], "a crop of 40 px is larger"),
        (["--sample-prototypes", "65"], "--sample-prototypes 65 is more than the 64 --prototypes"),
        (["--sample-prototypes", "-1"], "--sample-prototypes must be at least 0"),
        (["--prototypes", "-3"], "--prototypes must be at least 1, got -3"),
        (["--prototypes", "0"], "--prototypes must be at least 1, got 0"),
        (["--prototypes", "1"], "with one prototype there is nothing to tell apart"),
        (["--sample-prototypes", "1"], "with one prototype there is nothing to tell apart"),
        (["--epochs", "inf"], "--epochs must be at least 0 and below 2**32"),
        (["--probe-images", "1"], "--probe-images must be at least 2"),
        (["--warmup-teacher-temp", "0.1"], "go together"),
        (["--warmup-teacher-temp-steps", "9"], "go together"),
        (["--prototype-power", "1"], "it needs --sample-prototypes"),
        (["--prototype-power", "1", "--sample-prototypes", "64"], "nothing is drawn"),
        (["--teacher-temp", "0"], "must be positive"),
        (["--student-temp", "0"], "must be positive"),
        (["--teacher-temp", "nan"], "must be positive"),
        (["--teacher-temp", "inf"], "must be positive"),
        (["--student-temp", "1e-45"], "must be positive"),
        (["--warmup-teacher-temp", "inf", "--warmup-teacher-temp-steps", "9"], "below 2**32"),
        (["--crop-aspect", "inf"], "--crop-aspect must be at least 1"),
        (["--resume", world / "classifier" / "checkpoint.pt"], "is no checkpoint of this dino_laionet.py: it has no --"),
        (["--eval-only", tmp_path / "no_args.pt"], "no args in it"),
        (["--eval-only", tmp_path / "other_weights.pt"], "does not fit its --arch"),
        (["--init", tmp_path / "number.pt"], "missing ['conv1.weight']"),
        (["--transfer", tmp_path / "lost"], "neither its first nor its last image can be read (missing file)"),
        (["--ema", "1.5"], "--ema must be in [0, 1]"),
        (["--global-scale", "0.9", "0.2"], "--global-scale must be 0 < LO <= HI <= 1"),
        (["--init", world / "backbone.pt", "--arch", "ViT-S-16", "--global-size", "16"], "does not fit the model"),
        (["--arch", "ViT-S-16"], "multiples of its patches of 16 px"),
        (["--arch", "RN50"], "at least 32"),
        (["--augment", "dino", "--local-crops", "1", "--local-size", "6"], "at least 7"),
        (["--init", tmp_path / "none.pt"], "no such checkpoint"),
        (["--batch-size", "100000"], "larger than the"),
    ]
    for flags, message in cases:
        with pytest.raises(SystemExit) as error:
            run_here("--root", world, *QUICK, *flags, "--out", out)
        said = error.value.code if isinstance(error.value.code, str) else capsys.readouterr().err.split("error: ")[-1]
        assert message in said and "\n" not in said.strip(), flags
        assert isinstance(error.value.code, str) or error.value.code == 2
        assert not out.exists(), flags
    small = ["--data", tmp_path / "alone.tsv", "--local-crops", "1", "--local-size", "40", "--global-size", "24"]
    np.save(tmp_path / "alone.npy", np.zeros((40, 32, 32, 3), np.uint8))  # so much larger that crops are cut in workers
    (tmp_path / "alone.tsv").write_text("image\n" + "".join(f"alone.npy:{i}\n" for i in range(40)))
    with pytest.raises(SystemExit, match=r"a crop of 40 px is larger than the images of .*\(32 x 32\)"):
        run_here(*QUICK, *small, "--eval-sets", "--out", out)
    flags = ["--root", world, "--steps", "4", "--local-crops", "2", *SMALL, *QUICK, "--prototypes", "32"]
    result = run_forked(*flags, "--out", trained[0], check=False)
    assert result.returncode == 2 and "Traceback" not in result.stdout
    assert "--prototypes 64, now 32: pass another --out" in result.stdout


def test_the_power_is_handed_on(world, tmp_path, monkeypatch):
    """With how often each prototype has won: 64 teacher rows a step."""
    seen, draw = [], dino.draw_prototypes
    monkeypatch.setattr(
        dino, "draw_prototypes", lambda *args: seen.append((int(args[4].sum()), args[5])) or draw(*args)
    )
    flags = [*SMALL, *QUICK, "--eval-sets", "--steps", 3, "--prototype-power", -0.5]
    run_here("--root", world, *flags, "--out", tmp_path)
    assert seen == [(0, -0.5), (64, -0.5), (128, -0.5)]


def test_usage_is_of_the_prototypes_that_were_drawn(world, tmp_path):
    """After one step only they have won; won_1000 is the part of all that has in the last 1,000 steps."""
    flags = ["--root", world, *SMALL, *QUICK, "--eval-sets", "--steps", 2, "--save-every", 1, "--seed", 4, "--out", tmp_path]
    save, kept = dino.save_checkpoint, []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dino, "save_checkpoint", lambda path, *given: kept.append(copy.deepcopy(given[0])) or save(path, *given))
        run_here(*flags)
    drawn = torch.zeros(64, dtype=torch.bool)
    drawn[dino.draw_prototypes(64, 16, 4, 0)] = True
    first = kept[0]
    assert not first["usage"][~drawn].any() and int(first["usage"].sum()) == 64
    assert torch.equal(first["usage"] > 0, first["last_won"] == 0)
    torch.save(first | {"last_won": torch.arange(64) - 1030}, tmp_path / "checkpoint.pt")
    run_here(*flags)  # its second step again
    won = (kept[1]["last_won"] == 1) | (torch.arange(64) > 31)  # 31 - 1030 is 1,000 steps before step 1
    assert log_of(tmp_path)[-1]["won_1000"] == float(won.float().mean())


def test_evaluations_on_the_way_are_of_what_is_saved(world, tmp_path, monkeypatch):
    """The teacher, as at the end."""
    seen, evaluate_dino = [], dino.evaluate_dino

    def spy(model, *given):
        seen.append({k: v.clone() for k, v in model.state_dict().items() if k != "head.prototypes"})
        return evaluate_dino(model, *given)

    monkeypatch.setattr(dino, "evaluate_dino", spy)
    monkeypatch.setattr(dino, "save_checkpoint", lambda path, content, rank: seen.append(copy.deepcopy(content["state_dict"])))
    run_here("--root", world, *QUICK, "--eval-sets", "--steps", 2, "--eval-every", 1, "--save-every", 1, "--out", tmp_path)
    for found, saved in (seen[0], seen[1]), (seen[3], seen[2]):
        assert_bit_equal(found, saved)


def test_frozen_prototypes_have_no_part_in_the_norm(world, tmp_path):
    """Neither in the logged one nor in what --clip-of all limits."""
    flags = ["--root", world, *QUICK, "--eval-sets", "--steps", 1, "--clip-of", "all", "--clip-grad", 0.01]
    flags += ["--optimizer", "sgd", "--lr", 1, "--weight-decay", 0]
    norms = {}
    for n in 0, 1:
        run_here(*flags, "--freeze-prototypes", n, "--out", tmp_path / str(n))
        momenta = [s["momentum_buffer"] for s in state_of(tmp_path / str(n))["optimizer"]["state"].values()]
        norms[n] = log_of(tmp_path / str(n))[0]["grad_norm"]
        assert float(torch.stack([x.norm() for x in momenta]).norm()) == pytest.approx(0.01, rel=1e-3)
    assert 0.01 < norms[1] < norms[0]


@pytest.mark.parametrize("is_transfer", [False, True])
def test_what_a_probe_cannot_say(is_transfer, world, tmp_path, monkeypatch):
    """No k-NN of a bank's own images, whose nearest is itself, by no model; no frequencies of a transfer set, though it
    has as many classes as the root."""
    scores = torch.eye(3)[[0, 1, 1]]
    found = dict(knn=scores, probe=scores, weights=scores, features=scores, labels=np.arange(3), rows=np.arange(3), bad={},
                 decay=0.1, bank=(scores, np.arange(3)))  # fmt: skip
    monkeypatch.setattr(dino, "probe_features", lambda model, bank, tests, *rest: dict.fromkeys(tests, found))
    monkeypatch.setattr(dino, "random_network", lambda *args: None)
    (tmp_path / "link.tsv").symlink_to(world / "val.tsv")
    (tmp_path / "transfer").mkdir()
    bank, link, other = (dino.Table(path) for path in (world / "val.tsv", tmp_path / "link.tsv", world / "laionet/train.tsv"))
    worlds = [(bank, {"own": link, "other": other}, named("abc"), is_transfer)]
    network = dino.Network("tiny", 8, 8, 1, False)
    metrics = dino.evaluate_dino(network, worlds, np.array([9, 5, 1]), dino.parse_args([]), torch.device("cpu"), tmp_path)
    for kind in "", "random_", "pixels_":
        assert metrics["own"][f"{kind}knn"] is None and metrics["own"][f"{kind}probe"] == 2 / 3
        assert metrics["other"][f"{kind}knn"] == metrics["other"][f"{kind}probe"] == 2 / 3
    assert [metrics["other"][part] for part in ("head", "medium", "tail")] == ([None] * 3 if is_transfer else [1, 1, 0])


def test_the_small_tower_gives_mean_and_maximum():
    """Of each of the last 128 channels over the picture."""
    network, maps = dino.Network("tiny", 8, 8, 1, False).eval(), []
    network.visual.layers.register_forward_hook(lambda module, given, x: maps.append(x.detach()))
    embed = network.encode_image(torch.rand(3, 3, 28, 28) * 255).detach()
    places = maps[0].flatten(2)
    assert torch.allclose(embed[:, :128], places.mean(2), atol=1e-6) and torch.equal(embed[:, 128:], places.max(2)[0])


def test_probe_features_by_hand(world):
    """Raw pixels: k-NN as scikit-learn votes, and a probe whose weights are those of raw features; on the same images
    whatever the seed."""
    args, names = dino.parse_args(["--probe-images", "200", "--seed", "5"]), [row["name"] for row in dino.read_classes(world)]
    bank, val = dino.Table(world / "imagenet" / "train.tsv"), dino.Table(world / "val.tsv")
    device = torch.device("cpu")
    found = dino.probe_features(dino.RawPixels(), bank, {"val": val}, named(names), args, device, False)["val"]
    keep = np.sort(np.random.default_rng([0, 10]).choice(300, 200, replace=False))
    x, queries = (np.load(world / name).transpose(0, 3, 1, 2).reshape(-1, 3072) / 255
                  for name in ("imagenet/train.npy", "val.npy"))  # fmt: skip
    y = dino.read_labels(bank, named(names))[keep]
    oracle = KNeighborsClassifier(20, metric="cosine", weights=lambda distance: np.exp(-distance / 0.07)).fit(x[keep], y)
    votes = (found["knn"] / found["knn"].sum(1, keepdim=True))[:, oracle.classes_]
    np.testing.assert_allclose(votes, oracle.predict_proba(queries), atol=1e-3)
    rest = found["probe"].double() - torch.from_numpy(queries) @ found["weights"].double().T
    assert rest.std(0).max() < 1e-3  # a constant of each class
    whole = dino.probe_features(dino.RawPixels(), bank, {"val": val}, named(names), args, device, True)["val"]
    assert len(whole["bank"][1]) == 300 and torch.equal(whole["knn"], found["knn"])  # all are written, no more are fitted
    assert torch.equal(whole["probe"], found["probe"])


def test_a_dead_dimension_has_no_part_in_the_probe(world):
    """A feature that is the same for all images cannot be standardised: scores are as without it."""
    args, names = dino.parse_args(["--probe-images", "200"]), [row["name"] for row in dino.read_classes(world)]
    scores, val = [], dino.Table(world / "val.tsv")
    for n in 0, 2:
        tower = argparse.Namespace(image_size=32, embed_dim=12 + n, encode_image=lambda x, n=n: torch.nn.functional.pad(
            torch.nn.functional.avg_pool2d(x / 255, 16).flatten(1), (0, n)))  # fmt: skip
        bank = dino.Table(world / "imagenet" / "train.tsv")
        found = dino.probe_features(tower, bank, {"val": val}, named(names), args, torch.device("cpu"), False)["val"]
        scores.append(found["probe"])
    assert bool(scores[1].isfinite().all()) and torch.allclose(*scores, atol=0.2)  # rounding: up to .05 of 2


def test_frequencies_are_of_these_classes_in_this_order(monkeypatch):
    """--eval-only with as many others, or another order, has none: labels and counts would be of different classes."""
    args, seen = dino.parse_args(["--head-hidden", "8", "--prototype-dim", "8", "--no-head-bn"]), []
    network = dino.Network("tiny", 8, 8, 1, False)
    loaded = dino.checkpoint_of_dino(network, torch.ones(4, 8), ["cat", "dog"], np.array([5, 3]), args, 1)
    monkeypatch.setattr(dino, "report_dino", lambda model, prototypes, worlds, counts, *more: seen.append(counts.tolist()))
    for names in ["cat", "dog"], ["dog", "cat"], ["cat", "cow"]:
        dino.evaluate_teacher(args, dict(loaded), [(None, {}, named(names), False)], 0, torch.device("cpu"))
    assert seen == [[5, 3], [0, 0], [0, 0]]


def test_what_a_probe_is_fitted_on(world, tmp_path):
    """Rows with a label; by default those of ROOT/imagenet, else of the first set of --data."""
    lines = (world / "laionet" / "train.tsv").read_text().splitlines()[:9]
    column = lines[0].split("\t").index("label")
    rows = [line.split("\t") for line in lines[1:]]
    rows = [[*row[:column], "" if i % 4 == 1 else row[column], *row[column + 1 :]] for i, row in enumerate(rows)]
    (world / "laionet" / "some.tsv").write_text("\n".join([lines[0], *map("\t".join, rows)]) + "\n")
    args = dino.parse_args(["--eval-sets", "val", "--probe-set", str(world / "laionet" / "some.tsv")])
    bank = dino.find_worlds(args, world)[0][0]
    assert [bank.get(row, "label") for row in range(len(bank))] == [row[column] for row in rows if row[column]] and len(bank) == 6
    args = dino.parse_args(["--data", "incaps,laionet", "--eval-sets", str(world / "val.tsv")])
    assert dino.find_worlds(args, world)[0][0].path == world / "imagenet" / "train.tsv"
    (tmp_path / "incaps").mkdir()
    (tmp_path / "laionet").mkdir()
    for name in "classes.tsv", "incaps/train.tsv", "laionet/train.tsv":
        (tmp_path / name).symlink_to(world / name)
    (tmp_path / "incaps" / "train.npy").symlink_to(world / "incaps" / "train.npy")
    assert dino.find_worlds(args, tmp_path)[0][0].path == tmp_path / "incaps" / "train.tsv"


@pytest.mark.parametrize("arch, augment, smallest, largest", [
    ("RN50", "colour", 32, 128), ("tiny", "dino", 7, None), ("tiny", "colour", 1, 128), ("ViT-S-16", "dino", 16, None)])  # fmt: skip
def test_sizes_of_views_have_bounds(arch, augment, smallest, largest):
    """What tower and augmentation take is taken, and one pixel less or more is not."""
    args = argparse.Namespace(arch=arch, augment=augment)
    dino.check_views(args, [], [largest or 64, smallest], True)
    for sizes in [largest or 64, smallest - 1], [(largest or math.inf) + 1, smallest]:
        if sizes[1] > 0 and sizes[0] < math.inf:
            with pytest.raises(SystemExit, match="need|must be at least|up to 128 px"):
                dino.check_views(args, [], sizes, True)
