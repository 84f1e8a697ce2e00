"""clip.py as a program: loss and gradients over processes, GradCache, resume, kill, frozen towers, broken input."""

import argparse
import contextlib
import functools
import json
import math
import multiprocessing.context
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import types

import numpy as np
import programs
import pytest
import torch
import torch.multiprocessing as mp
import torch.nn.functional as F
from PIL import Image
from programs import ENV, ROOT, assert_bit_equal, log_of, named, weights_of

import clip
import dino_laionet
import evaluate
import sl_vocab_subsample

FLAGS = ["--batch-size", "32", "--log-every", "1", "--warmup-steps", "2", "--precision", "fp32", "--device", "cpu"]
run, run_here = functools.partial(programs.run, "clip.py"), functools.partial(programs.run_here, clip)
run_forked = functools.partial(programs.run_forked, "clip.py")


# ------------------------------------------------------------------------------ loss


def pair_of_features(B=6, D=5, dtype=torch.float64):
    generator = torch.Generator().manual_seed(0)
    x, y = torch.randn(2, B, D, generator=generator, dtype=dtype)
    return F.normalize(x, dim=1), F.normalize(y, dim=1)


def test_info_nce_by_hand():
    """Z = [[ln 3, 0], [0, ln 3]] has loss ln(4/3); three equal features with two equal captions, see methods A."""
    eye = torch.eye(2, dtype=torch.float64)
    assert math.isclose(clip.info_nce(eye, eye, torch.tensor(math.log(3.0))), math.log(4 / 3), rel_tol=1e-6)
    image, text = torch.eye(2, dtype=torch.float64)[[0, 0, 0]], torch.eye(2, dtype=torch.float64)[[1, 1, 1]]  # Z = 0
    ids, scale = torch.tensor([7, 7, 8]), torch.tensor(10.0)
    expected = {"keep": math.log(3), "mask": (2 * math.log(2) + math.log(3)) / 3, "soft": math.log(3)}
    for dup_captions, value in expected.items():
        assert math.isclose(clip.info_nce(image, text, scale, ids, dup_captions), value, rel_tol=1e-6), dup_captions


def test_info_nce_is_the_slow_loop():
    x, y = pair_of_features()
    z = 9.0 * x.numpy() @ y.numpy().T
    ids = torch.tensor([0, 1, 0, 2, 1, 0])

    def loss(z, targets):
        logp = z - np.log(np.exp(z).sum(1, keepdims=True))
        return -np.where(targets > 0, targets * logp, 0).sum(1).mean()

    same = ids[:, None].numpy() == ids[None].numpy()
    masked = np.where(same & ~np.eye(6, dtype=bool), -np.inf, z)
    share = same / same.sum(1, keepdims=True)
    slow = {"keep": (z, np.eye(6)), "mask": (masked, np.eye(6)), "soft": (z, share)}
    with np.errstate(invalid="ignore"):
        for dup_captions, (logits, targets) in slow.items():
            image, text = loss(logits, targets), loss(logits.T, targets)
            for directions, expected in {"image": image, "text": text, "both": (image + text) / 2}.items():
                value = clip.info_nce(x, y, torch.tensor(9.0, dtype=torch.float64), ids, dup_captions, directions)
                assert math.isclose(value, expected, rel_tol=1e-12), (dup_captions, directions)


def test_a_liking_for_a_class_cancels_among_images():
    """A constant added to all logits of one text leaves the loss among images as it is, and not that among texts."""
    x, y = pair_of_features()
    liked = torch.zeros(6, 1, dtype=torch.float64)
    liked[0] = 0.4  # one more coordinate: 1 in all images, 0.4 in text 0
    images, texts = torch.cat([x, torch.ones_like(liked)], 1), torch.cat([y, liked], 1)
    scale = torch.tensor(9.0, dtype=torch.float64)
    for directions, is_equal in (("text", True), ("image", False)):
        a, b = clip.info_nce(x, y, scale, directions=directions), clip.info_nce(images, texts, scale, directions=directions)
        assert math.isclose(a, b, rel_tol=1e-12) == is_equal, directions


def test_info_nce_gradient():
    x, y = pair_of_features()
    scale = torch.tensor(3.0, dtype=torch.float64)
    tensors = [t.requires_grad_() for t in (x, y, scale)]
    assert torch.autograd.gradcheck(lambda *t: clip.info_nce(*t), tensors)


# ------------------------------------------------------------------------------ gradients over processes and chunks


def small_model(arch, text_arch="transformer"):
    torch.manual_seed(0)
    text = dict(arch=text_arch, width=128, vocab_size=600, context_length=77, n_layers=2)
    model = clip.CLIP(arch, 32, text, "gelu", image_size=32)
    for module in model.modules():  # zero gains would hide the branches behind them
        if isinstance(module, clip.BatchNorm2d):
            torch.nn.init.uniform_(module.weight, 0.5, 1.5)
    return model


def batch_of(n):
    generator = torch.Generator().manual_seed(1)
    images = torch.randint(0, 256, (n, 3, 32, 32), generator=generator).float()
    texts = torch.randint(1, 598, (n, 9), generator=generator)
    texts[:, -1] = 599
    return images, texts


def gradients(net, model, images, texts, n_chunks=1, loss_of=clip.info_nce):
    loss, *_ = clip.backward_in_chunks(net, images, texts, loss_of, n_chunks, contextlib.nullcontext, lambda x: x)
    return float(loss), {name: p.grad.clone() for name, p in model.named_parameters()}


def relative_error(a, b):
    """The largest over parameters of |a - b| / |b|. Gradients below 1e-7 in norm are rounding (a bias before a norm)."""
    return max(float((a[k] - b[k]).norm() / b[k].norm().clamp(min=1e-7)) for k in b)


def loss_of_part(rank, world_size, dup):
    """InfoNCE of a process's part of 16 pairs that have 5 different captions."""
    caption_ids = (torch.arange(16) % 5).chunk(world_size)[rank]
    return functools.partial(clip.info_nce, caption_ids=caption_ids, dup_captions=dup)


def rank_main(rank, world_size, port, arch, n_chunks, dup, path):
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", rank=rank, world_size=world_size)
    model = small_model(arch)
    net = torch.nn.parallel.DistributedDataParallel(model, broadcast_buffers=False)
    images, texts = (x.chunk(world_size)[rank] for x in batch_of(16))
    loss, grads = gradients(net, model, images, texts, n_chunks, loss_of_part(rank, world_size, dup))
    losses = [None] * world_size
    torch.distributed.all_gather_object(losses, loss)
    if rank == 0:
        torch.save({"loss": np.mean(losses), "grads": grads, "buffers": dict(model.named_buffers())}, path)
    torch.distributed.destroy_process_group()


def on_ranks(arch, n_chunks, dup, tmp_path, world_size=2):
    port = 20000 + os.getpid() % 20000
    mp.spawn(rank_main, (world_size, port, arch, n_chunks, dup, tmp_path / "out.pt"), nprocs=world_size)
    return torch.load(tmp_path / "out.pt", weights_only=False)


@pytest.mark.parametrize("arch, n_chunks, dup", [("tiny", 1, "soft"), ("ViT-S-16", 1, "keep"), ("ViT-S-16", 4, "mask")])
def test_two_ranks_equal_one_process(arch, n_chunks, dup, tmp_path):
    """Loss, all gradients (logit_scale included) and batch-norm statistics; with batch norm synchronised or absent."""
    model = small_model(arch)
    loss, grads = gradients(model, model, *batch_of(16), loss_of=loss_of_part(0, 1, dup))
    other = on_ranks(arch, n_chunks, dup, tmp_path)
    assert math.isclose(other["loss"], loss, rel_tol=1e-6)
    assert relative_error(other["grads"], grads) <= 1e-5
    for name, buffer in model.named_buffers():
        assert torch.allclose(other["buffers"][name], buffer, rtol=1e-5, atol=1e-6), name


def test_grad_cache_equals_full_batch():
    model = small_model("ViT-S-16")
    loss, grads = gradients(model, model, *batch_of(16))
    for n_chunks in (2, 4, 7):  # chunk(7) of 16 rows gives 6 of them
        other = small_model("ViT-S-16")
        other_loss, other_grads = gradients(other, other, *batch_of(16), n_chunks)
        assert math.isclose(other_loss, loss, rel_tol=1e-6) and relative_error(other_grads, grads) <= 1e-5


class Noisy(torch.nn.Module):
    """A model with dropout: the replay must draw the same masks."""

    def __init__(self):
        super().__init__()
        self.model = small_model("tiny")

    def forward(self, images, texts):
        image_features, text_features, scale = self.model(images, texts)
        return F.dropout(image_features, 0.3), F.dropout(text_features, 0.3), scale


def test_grad_cache_replays_dropout_and_batch_norm():
    """Equal to one graph over the same chunks; running statistics advance once per chunk, not twice."""
    images, texts = batch_of(16)
    net = Noisy()
    torch.manual_seed(5)
    _, grads = gradients(net, net, images, texts, 4)
    reference = Noisy()
    torch.manual_seed(5)
    features = [reference(*chunk) for chunk in zip(images.chunk(4), texts.chunk(4), strict=True)]
    x, y = torch.cat([f[0] for f in features]), torch.cat([f[1] for f in features])
    clip.info_nce(x, y, features[0][2]).backward()
    assert relative_error(grads, {name: p.grad for name, p in reference.named_parameters()}) <= 1e-5
    for (name, a), b in zip(net.named_buffers(), reference.buffers(), strict=True):
        assert torch.allclose(a, b), name


@pytest.mark.parametrize("n_chunks", [1, 4])
def test_grad_cache_knows_precision_and_scaler(n_chunks):
    """Features, and so the loss, are those of the replay's precision; all gradients are scaled, the loss is not."""
    (images, texts), half = batch_of(16), functools.partial(torch.autocast, "cpu", torch.bfloat16)
    of = {}
    for scale in 1, 1024:
        model = small_model("tiny")
        parts = clip.backward_in_chunks(model, images, texts, clip.info_nce, n_chunks, half, lambda x, s=scale: s * x)
        of[scale] = parts, {name: p.grad / scale for name, p in model.named_parameters()}
    assert all(torch.equal(a, b) for a, b in zip(of[1][0], of[1024][0])) and relative_error(of[1024][1], of[1][1]) < 1e-2
    with half():
        expected = [small_model("tiny")(*chunk) for chunk in zip(images.chunk(n_chunks), texts.chunk(n_chunks))]
    for k in 0, 1:
        assert torch.equal(of[1][0][1 + k], torch.cat([features[k] for features in expected]))


class Saved:
    """Counts the bytes that autograd keeps for the backward pass."""

    now = peak = 0

    class Box:
        def __init__(self, tensor):
            self.tensor, self.n = tensor, tensor.numel() * tensor.element_size()
            Saved.now += self.n
            Saved.peak = max(Saved.peak, Saved.now)

        def __del__(self):
            Saved.now -= self.n


def peak_of_saved_activations(n_chunks):
    model = small_model("ViT-S-16")
    parameters = {p.data_ptr() for p in model.parameters()}
    Saved.now = Saved.peak = 0

    def pack(tensor):
        is_weight = (
            tensor.data_ptr() in parameters or tensor._base is not None and tensor._base.data_ptr() in parameters
        )
        return tensor if is_weight else Saved.Box(tensor)

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda box: box.tensor if isinstance(box, Saved.Box) else box):
        gradients(model, model, *batch_of(64), n_chunks)
    return Saved.peak


def test_accumulate_8_needs_a_quarter_of_the_activations():
    full, cached = peak_of_saved_activations(1), peak_of_saved_activations(8)
    assert full > 10e6 and cached <= full / 4, (full, cached)


# ------------------------------------------------------------------------------ the program


def test_one_process_equals_two(world, tmp_path):
    """The same losses but for rounding, on a mixture, with word dropout, drawn crops and captions that are cut."""
    caption = "{title} {tags} " * 12
    flags = ["--root", world, "--data", "laionet:2,incaps:1", "--caption", caption, "--word-dropout", "0.2"]
    flags += ["--steps", "5", "--eval-sets", "val", *FLAGS]
    run_here(*flags, "--out", tmp_path / "one")
    run_forked(*flags, "--out", tmp_path / "two", processes=2)
    one, two = log_of(tmp_path / "one"), log_of(tmp_path / "two")
    assert [line["step"] for line in one] == [1, 2, 3, 4, 5]
    assert np.allclose([line["loss"] for line in one], [line["loss"] for line in two], rtol=1e-4)
    assert np.allclose([line["grad_norm"] for line in one], [line["grad_norm"] for line in two], rtol=1e-2)
    assert 0 < one[-1]["truncated"] < 1 and [x["truncated"] for x in one] == [x["truncated"] for x in two]
    keys = {
        "step",
        "samples",
        "epoch",
        "loss",
        "lr",
        "logit_scale",
        "grad_norm",
        "images_per_s",
        "left_out",
        "bad_images",
        "truncated",
    }
    assert set(one[0]) == keys


def test_evaluation_is_the_same_for_one_and_three_ranks(world, tmp_path):
    """Metrics and predictions to the last bit, for a number of rows that 3 does not divide, labelled or not."""
    for name in ("laionet", "yfcc"):
        lines = (world / name / "train.tsv").read_text().splitlines(keepends=True)
        (world / name / "odd.tsv").write_text("".join(lines[:300]))  # 299 rows
    run_here("--root", world, "--steps", "3", "--out", tmp_path / "run", "--eval-sets", "val", *FLAGS)
    flags = [
        "--root",
        world,
        "--eval-only",
        tmp_path / "run" / "checkpoint.pt",
        "--device",
        "cpu",
        "--precision",
        "fp32",
    ]
    for i, image in enumerate(np.load(world / "val.npy")[:12]):
        Image.fromarray(image).save(tmp_path / f"{i}.png")
    lines = [f"{i * 7 % 13}.png\t{i % 120}\n" for i in range(299)]  # 12.png is not there
    (tmp_path / "files.tsv").write_text("image\tlabel\n" + "".join(lines))
    flags += ["--eval-sets", world / "laionet" / "odd.tsv", world / "yfcc" / "odd.tsv", tmp_path / "files.tsv"]
    run_here(*flags, "--out", tmp_path / "one")
    run_forked(*flags, "--out", tmp_path / "three", processes=3)
    one, three = (json.loads((tmp_path / name / "metrics.json").read_text()) for name in ("one", "three"))
    assert one.pop("run") and three.pop("run") and one == three
    assert one["laionet-odd"]["n"] == 299 and one["laionet-odd"]["top1"] is not None
    assert one["files"]["n"] == 276 and one["files"]["bad_images"] == {"missing file": 23}
    with np.load(tmp_path / "one" / "files.npz") as a, np.load(tmp_path / "three" / "files.npz") as b:
        assert np.array_equal(a["features"], b["features"]) and np.array_equal(a["rows"], b["rows"])
    again = evaluate.retrieval([str(tmp_path / "one" / "yfcc-odd.npz")], [1, 10], 10, 0, "cpu")["rows"]
    for key in "i2t_r1", "t2i_r10":  # evaluate.py reads what clip.py writes (float16)
        assert abs(next(iter(again.values()))[key]["value"] - one["yfcc-odd"]["retrieval"][key]) < 0.02
    assert set(one["yfcc-odd"]["retrieval"]) == {f"{way}_r{k}" for way in ("i2t", "t2i") for k in (1, 5, 10)}
    with np.load(tmp_path / "one" / "laionet-odd.npz") as a, np.load(tmp_path / "three" / "laionet-odd.npz") as b:
        assert all(np.array_equal(a[key], b[key]) for key in a.files)
        assert a["logits"].shape == (299, 120) and a["logits"].dtype == np.float16 and a["features"].shape == (299, 64)
        assert a["prototypes"].shape == (120, 64) and a["class_counts"].shape == a["class_names"].shape == (120,)


@pytest.mark.parametrize("processes", [1, 2])
def test_kill_and_resume_is_bit_equal(world, tmp_path, processes):
    """kill -9 after some step, the same command again, and the final weights are those of an undisturbed run."""
    flags = ["--root", world, "--steps", "40", "--save-every", "4", "--eval-sets", "val", *FLAGS]
    go = run_here if processes == 1 else lambda *flags: run_forked(*flags, processes=processes).stdout
    go(*flags, "--out", tmp_path / "straight")
    programs.kill_after(7, tmp_path / "killed", "clip.py", *flags, processes=processes)
    steps = torch.load(tmp_path / "killed" / "checkpoint.pt", weights_only=True)["step"]
    assert 0 < steps < 40
    assert f"continued from step {steps}" in go(*flags, "--out", tmp_path / "killed")
    assert_bit_equal(weights_of(tmp_path / "straight"), weights_of(tmp_path / "killed"))
    assert [line["step"] for line in log_of(tmp_path / "killed")] == list(range(1, 41))  # no step is told twice
    if processes == 1:  # a finished run only reports
        again = go(*flags, "--out", tmp_path / "killed")
        assert "continued from step 40" in again and "rho(freq,pred)" in again


@pytest.mark.parametrize("is_group", [False, True])
def test_sigterm_saves_and_exits_0(is_group, world, tmp_path):
    """To the process alone, or, as torchrun, timeout and Slurm do, to its group, loader workers and all."""
    flags = ["--root", world, "--steps", "30", "--save-every", "0", "--eval-every", "12", "--eval-sets", "val", *FLAGS]
    run_here(*flags, "--out", tmp_path / "straight")
    command = [sys.executable, ROOT / "clip.py", *map(str, flags), "--out", str(tmp_path / "stopped")]
    process = subprocess.Popen(command, env=ENV, stdout=subprocess.PIPE, text=True, start_new_session=True)
    for line in process.stdout:
        if line.startswith("step      3"):
            (os.killpg if is_group else os.kill)(process.pid, signal.SIGTERM)
            break
    rest = process.stdout.read()
    assert process.wait() == 0 and "SIGTERM: saved at step" in rest
    run_here(*flags, "--out", tmp_path / "stopped")
    assert_bit_equal(weights_of(tmp_path / "straight"), weights_of(tmp_path / "stopped"))
    evaluated = [[line["step"] for line in log_of(tmp_path / name) if "val" in line] for name in ("straight", "stopped")]
    assert evaluated[0] == evaluated[1] == [12, 24]


def test_sigterm_of_one_rank_stops_both(world, tmp_path):
    """Slurm signals each task: whichever process hears it first, all save the same step and end with 0."""
    flags = ["--root", world, "--steps", "60", "--save-every", "0", "--eval-sets", "val", *FLAGS, "--out", tmp_path]
    command = [*programs.launcher(2), ROOT / "clip.py", *map(str, flags)]
    process = subprocess.Popen(command, env=ENV, stdout=subprocess.PIPE, stderr=-3, text=True, start_new_session=True)
    for line in process.stdout:
        if line.startswith("step      3"):
            os.kill([int(p) for p in programs.ranks_of(process.pid)][1], signal.SIGTERM)
            break
    rest = process.stdout.read()
    assert process.wait() == 0 and "SIGTERM: saved at step" in rest
    assert 3 <= torch.load(tmp_path / "checkpoint.pt", weights_only=True)["step"] < 60


def test_other_flags_are_refused_on_resume(world, tmp_path, monkeypatch):
    flags = ["--root", world, "--steps", "2", "--out", tmp_path, "--eval-sets", "val", *FLAGS]
    run_here(*flags)
    with pytest.raises(SystemExit, match="--lr 0.*, now 0.5"):
        run_here(*flags, "--lr", "0.5")
    run_here(*flags, "--lr", "0.5", "--resume", "off")
    monkeypatch.setattr(clip, "backward_in_chunks", None)  # ends in the first step
    with pytest.raises(TypeError):
        run_here(*flags, "--resume", "off")
    monkeypatch.undo()
    assert "continued" not in run_here(*flags)  # not from the run that --resume off was to leave behind


@pytest.fixture(scope="session")
def clip_pt(world, tmp_path_factory):
    """A (hardly) pretrained clip.pt of the small world."""
    path = tmp_path_factory.mktemp("clip_pt") / "clip.pt"
    run_here(
        "--root",
        world,
        "--data",
        "web",
        "--steps",
        "3",
        "--out",
        path.parent / "run",
        "--export",
        path,
        "--eval-sets",
        "val",
        *FLAGS,
    )
    return path


def test_frozen_text_tower(world, clip_pt, tmp_path):
    """Bit-equal after training, embeddings as of the tower itself, the rest trained; on 1 and 2 processes."""

    def text(state):
        return {k: v for k, v in state.items() if not k.startswith("visual.") and k != "logit_scale"}

    before = torch.load(clip_pt, weights_only=True)
    assert "optimizer" not in before and before["prototypes"].shape == (120, 64)
    flags = [
        "--root",
        world,
        "--text-head",
        "frozen",
        "--text-init",
        clip_pt,
        "--steps",
        "4",
        "--eval-sets",
        "val",
        *FLAGS,
    ]
    for processes in (1, 2):
        start = functools.partial(run, processes=2) if processes == 2 else run_here
        start(*flags, "--out", tmp_path / str(processes))
        after = weights_of(tmp_path / str(processes))
        assert_bit_equal(text(after), text(before["state_dict"]))
        assert not torch.equal(after["visual.conv1.weight"], before["state_dict"]["visual.conv1.weight"])
    losses = [[line["loss"] for line in log_of(tmp_path / n)] for n in "12"]
    assert np.allclose(*losses, rtol=1e-4)
    finetuned = run_here(*flags, "--text-head", "finetune", "--word-dropout", "0", "--out", tmp_path / "finetune")
    assert finetuned and not torch.equal(
        weights_of(tmp_path / "finetune")["token_embedding.weight"], before["state_dict"]["token_embedding.weight"]
    )
    # The first loss of both is that of the same towers: cached embeddings are those of the tower.
    assert math.isclose(log_of(tmp_path / "1")[0]["loss"], log_of(tmp_path / "finetune")[0]["loss"], rel_tol=1e-4)


def test_cached_captions_say_what_was_truncated_and_fit_on_disk(world, clip_pt, tmp_path, monkeypatch):
    """Captions of twenty captions are cut, the others are not; a cache too large for memory gives the same losses."""
    flags = ["--root", world, "--text-head", "frozen", "--text-init", clip_pt, "--steps", "2", "--eval-sets", *FLAGS]
    (tmp_path / "long.txt").write_text(" ".join(["{caption}"] * 20) + "\na {class}\n")
    run_here(*flags, "--caption", f"@{tmp_path / 'long.txt'}", "--out", tmp_path / "a")
    assert all(0.2 < line["truncated"] < 0.8 for line in log_of(tmp_path / "a"))
    run_here(*flags, "--out", tmp_path / "b")
    monkeypatch.setattr(clip, "KEEP_TEXT", 0)
    run_here(*flags, "--out", tmp_path / "c")
    assert (tmp_path / "c" / "text_features.npy").is_file() and not (tmp_path / "b" / "text_features.npy").exists()
    b, c = ([(line["loss"], line["truncated"]) for line in log_of(tmp_path / name)] for name in "bc")
    assert np.allclose(b, c, rtol=1e-3) and b[0][1] == 0


def test_frozen_captions_are_embedded_in_the_asked_precision(world, clip_pt, tmp_path, monkeypatch):
    """As if the tower ran in the loop; prompts of the evaluation in fp32, as all that is scored."""
    seen, encode = [], clip.CLIP.encode_text
    monkeypatch.setattr(clip.CLIP, "encode_text", lambda self, texts: seen.append(
        (texts.is_floating_point(), torch.is_autocast_enabled("cpu"))) or encode(self, texts))  # fmt: skip
    flags = ["--text-head", "frozen", "--text-init", clip_pt, "--steps", 1, *FLAGS, "--precision", "bf16"]
    run_here("--root", world, *flags, "--eval-sets", "--out", tmp_path)
    of_training = seen.index((True, True))
    assert set(seen[:of_training]) == {(False, True)} and set(seen[of_training + 1 :]) == {(False, False)}


def test_frozen_with_drawn_captions(world, clip_pt, tmp_path):
    """Templates drawn per epoch are all embedded before training: none is looked up in vain."""
    (tmp_path / "templates.txt").write_text("a {class}\na photo of the {synonym}\n{title} {tags}\n")
    flags = [
        "--root",
        world,
        "--text-init",
        clip_pt,
        "--caption",
        f"@{tmp_path / 'templates.txt'}",
        "--steps",
        "25",
        "--eval-sets",
        "val",
        *FLAGS,
    ]
    run_here(*flags, "--text-head", "frozen", "--out", tmp_path / "a")
    run_here(
        *flags,
        "--text-head",
        "finetune",
        "--word-dropout",
        "0",
        "--lr",
        "1e-9",
        "--out",
        tmp_path / "b",
        "--weight-decay",
        "0",
    )  # the tower runs in the step
    run_here(*flags, "--text-head", "frozen", "--lr", "1e-9", "--out", tmp_path / "c", "--weight-decay", "0")
    losses = [[line["loss"] for line in log_of(tmp_path / name)] for name in "bc"]
    assert np.allclose(*losses, rtol=1e-4)


def test_missing_clip_pt(world, tmp_path, monkeypatch):
    """The shapes world is pretrained on web, cached in ROOT; another world is told how to make the file."""
    commands = []
    monkeypatch.setattr(clip, "run_script", commands.append)
    clip.ensure_clip_pt(world, "cpu", "--text-head frozen")
    command = commands[0][1:]
    args = clip.parse_args(command)
    assert args.data == "web" and args.export == str(world / "clip.pt") and args.root == str(world)
    assert (args.steps, args.word_dropout, args.seed) == (2200, 0, 0)  # as for the study's figures
    other = tmp_path / "imagenet"
    shutil.copytree(world, other)
    for damaged in (b'{"world": "shapes", "see', b"\xff", b"[]"):
        (other / "world.json").write_bytes(damaged)
        if b"shapes" in damaged:
            clip.ensure_clip_pt(other, "cpu", "--text-head frozen")
            assert len(commands) == 2
        else:
            with pytest.raises(SystemExit, match="--eval-only RN50.pt"):
                clip.ensure_clip_pt(other, "cpu", "--text-head frozen")
    (other / "world.json").unlink()
    with pytest.raises(SystemExit, match="--eval-only RN50.pt"):
        clip.ensure_clip_pt(other, "cpu", "--text-head frozen")


def test_text_embeddings(world, tmp_path):
    """Given embeddings (as of RoBERTa) with a learned two-layer projection; classes from their own embeddings."""
    n = len((world / "laionet" / "train.tsv").read_text().splitlines()) - 1
    rng = np.random.default_rng(0)
    np.save(tmp_path / "train.npy", rng.normal(size=(n, 96)).astype(np.float32))
    np.save(tmp_path / "classes.npy", rng.normal(size=(120, 96)).astype(np.float32))
    flags = [
        "--root",
        world,
        "--text-head",
        "frozen",
        "--steps",
        "3",
        "--eval-sets",
        "val",
        *FLAGS,
        "--out",
        tmp_path / "run",
    ]
    run_here(*flags, "--text-embeddings", tmp_path / "train.npy", tmp_path / "classes.npy")
    state = weights_of(tmp_path / "run")
    assert state["text_mlp.0.weight"].shape == (80, 96) and state["text_mlp.2.weight"].shape == (64, 80)
    top1 = json.loads((tmp_path / "run" / "metrics.json").read_text())["val"]["top1"]
    assert top1 is not None
    again = ["--root", world, "--eval-only", tmp_path / "run/checkpoint.pt", "--eval-sets", "val", *FLAGS[-4:]]
    run_here(*again, "--seed", "7", "--out", tmp_path / "again", "--export", tmp_path / "export.pt")
    metrics = json.loads((tmp_path / "again" / "metrics.json").read_text())
    assert metrics["val"]["top1"] == top1 and metrics["run"]["seed"] == 0  # by the stored class vectors; the run's seed
    export = torch.load(tmp_path / "export.pt", weights_only=True)
    assert export["prototypes"].shape == (120, 64) and export["args"]["steps"] == 3
    for name, rows in (("narrow.npy", n), ("narrow_classes.npy", 120)):
        np.save(tmp_path / name, np.zeros((rows, 32), np.float32))
    narrow = ["--text-head", "frozen", "--text-embeddings", tmp_path / "narrow.npy", tmp_path / "narrow_classes.npy"]
    for others in again, [*flags, "--resume", "off", "--init", tmp_path / "run/checkpoint.pt"]:
        with pytest.raises(SystemExit, match="was trained on embeddings 96 wide, --text-embeddings has 32"):
            run_here(*others, *narrow)
    np.save(tmp_path / "train.npy", np.zeros((n - 1, 96), np.float32))
    with pytest.raises(SystemExit, match=re.escape(f"expected ({n}, width)")):
        run_here(*flags, "--resume", "off", "--text-embeddings", tmp_path / "train.npy")
    np.savez(tmp_path / "z.npz", a=np.zeros((n, 96)))
    (tmp_path / "text.npy").write_text("no array")
    (tmp_path / "cut.npy").write_bytes((tmp_path / "train.npy").read_bytes()[:999])
    for name, rows in {"o": np.array([{}] * n), "flat": np.zeros(n), "s": np.full((n, 2), "a"), "0": np.zeros((n, 0))}.items():
        np.save(tmp_path / f"{name}.npy", rows)
    for name, of in (*((x, n) for x in ("z.npz", "text.npy", "cut.npy", "o.npy", "flat.npy", "s.npy", "0.npy")), ("s.npy", 9)):
        with pytest.raises(SystemExit, match=rf"--text-embeddings .*{name}.* (cannot be read|expected \({of}, )"):
            clip.map_embeddings(str(tmp_path / name), of, "the rows of a table")
    np.save(tmp_path / "train.npy", np.zeros((n, 96), np.float32))
    for classes, message in ((np.zeros((120, 95)), "is 95 wide"), (np.full((120, 96), np.nan), "not finite")):
        np.save(tmp_path / "classes.npy", classes.astype(np.float32))
        with pytest.raises(SystemExit, match=message):
            run_here(*flags, "--text-embeddings", tmp_path / "train.npy", tmp_path / "classes.npy")
    with pytest.raises(SystemExit, match="was trained with --text-embeddings"):
        run_here("--root", world, "--init", tmp_path / "run/checkpoint.pt", "--steps", "1", "--out", tmp_path / "x")
    (tmp_path / "other").mkdir()  # the stored class vectors are of the run's classes, in their order
    names = [row["name"] for row in clip.read_classes(world)]
    (tmp_path / "other" / "classes.tsv").write_text("\n".join(["name", *names[::-1]]) + "\n")
    (tmp_path / "other" / "val.tsv").write_text("image\tlabel\n" + f"{world / 'val.npy'}:0\t{names[0]}\n")
    run_here(*again, "--root", tmp_path / "other", "--out", tmp_path / "others")
    assert json.loads((tmp_path / "others" / "metrics.json").read_text())["val"]["top1"] is None


def limit_file_size(n):
    """Writes beyond n bytes fail, as on a full disk."""
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (n, n))


def test_full_disk_keeps_the_last_checkpoint(world, tmp_path):
    flags = ["--root", world, "--out", tmp_path / "run", "--eval-sets", "val", *FLAGS]
    run_here(*flags, "--steps", "2")
    before = (tmp_path / "run" / "checkpoint.pt").read_bytes()
    result = run(*flags, "--steps", "4", "--resume", "off", check=False, preexec_fn=lambda: limit_file_size(100_000))
    assert result.returncode == 2 and "cannot write" in result.stdout and "Traceback" not in result.stdout
    assert (tmp_path / "run" / "checkpoint.old.pt").read_bytes() == before  # --resume off started over
    assert not list((tmp_path / "run").glob("*.part"))
    (tmp_path / "file").write_text("")
    with pytest.raises(SystemExit, match="cannot write"):
        run_here(*flags[:2], "--out", tmp_path / "file" / "run", "--steps", "2", "--eval-sets", "val", *FLAGS)


def test_cached_captions_on_a_full_disk_are_one_line(tmp_path, monkeypatch):
    """Room is taken before the file is mapped: a write to the map of a full disk would be a SIGBUS."""

    def full(*args):
        raise OSError(28, "No space left on device")

    clip.allocate_npy(tmp_path / "new" / "x.npy", (300, 5), np.float16)
    assert np.load(tmp_path / "new" / "x.npy").shape == (300, 5)
    assert os.stat(tmp_path / "new" / "x.npy").st_blocks * 512 >= 3000
    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(SystemExit, match="cannot write .*y.npy: No space left"):
        clip.allocate_npy(tmp_path / "y.npy", (300, 5), np.float16)
    assert not (tmp_path / "y.npy").exists()


def open_log(out, start, **flags):
    args = argparse.Namespace(**{"out": str(out), "tensorboard": False, "wandb": "", "resume": "auto"} | flags)
    return clip.RunLog({"step": start, "n_bad": 0}, args, 0, {}, torch.device("cpu"), None)


def test_broken_images_of_all_ranks_are_counted_once(tmp_path, monkeypatch):
    """Those of a continued run's first part are the main process's; n_bad is the sum over the processes."""
    args, n = argparse.Namespace(out=str(tmp_path), tensorboard=False, wandb="", resume="auto"), []
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 2)
    for rank in 0, 1:
        monkeypatch.setattr(torch.distributed, "get_rank", lambda rank=rank: rank)
        log = clip.RunLog({"step": 5, "n_bad": 30}, args, 0, {}, torch.device("cpu"), object())
        log.bad["truncated"] += rank + 1
        n.append(sum(log.bad.values()))
        monkeypatch.setattr(clip, "total", lambda value, group: 1000 + value)
        assert log.n_bad() == 1000 + n[-1]
    assert n == [31, 2]


def test_restore_is_the_undo_of_resumable():
    """Momenta, the loss scale and torch's random state go on where they were."""
    cpu, states = torch.device("cpu"), []
    weight = torch.nn.Parameter(torch.ones(3))
    for lr in 0.1, 0.2:
        states.append((torch.optim.AdamW([weight], lr), torch.amp.GradScaler("cpu", init_scale=lr * 80)))
    (optimizer, scaler), (other, other_scaler) = states
    scaler.scale(weight.sum()).backward()
    scaler.step(optimizer)
    saved = clip.resumable(optimizer, scaler, {}, 0, 7.0, cpu)
    expected = torch.rand(3).tolist()
    assert clip.restore(saved | {"step": 3}, other, other_scaler, cpu) == (3, 7.0)
    assert torch.rand(3).tolist() == expected != torch.rand(3).tolist()
    assert other_scaler.get_scale() == 8 and other.param_groups[0]["lr"] == 0.1
    assert torch.equal(other.state[weight]["exp_avg"], optimizer.state[weight]["exp_avg"])


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full, a disk that is always full")
def test_log_on_a_full_disk_is_one_line(tmp_path):
    log = open_log(tmp_path, 0)
    log.write({"step": 1})
    log.file = open("/dev/full", "a", buffering=1)
    with pytest.raises(SystemExit, match="cannot write .*No space left.*a checkpoint written before is kept"):
        log.write({"step": 2})
    assert (tmp_path / "log.jsonl").read_text() == '{"step": 1}\n'


def train_here(world, out, *flags):
    """main() in this process, so that a test can put something in its way."""
    torch.set_num_threads(1)
    clip.main(clip.parse_args(["--root", str(world), "--out", str(out), "--eval-sets", "val", *FLAGS, *flags]))


def test_non_finite_steps_are_left_out(world, tmp_path, monkeypatch, capsys):
    """Two bad steps are skipped: the weights are those before; ten in a row end the run."""
    calls, info_nce = [], clip.info_nce

    def broken(image_features, *args, **kwargs):
        calls.append(1)
        loss = info_nce(image_features, *args, **kwargs)
        return loss * float("nan") if len(calls) in bad_calls else loss

    monkeypatch.setattr(clip, "info_nce", broken)
    bad_calls = {3, 4}
    train_here(world, tmp_path / "a", "--steps", "4", "--lr", "1e-3")
    printed = capsys.readouterr().out
    assert "step 3: loss not finite: step left out (1 in a row)" in printed and "(2 in a row)" in printed
    assert [line["left_out"] for line in log_of(tmp_path / "a")] == [0, 0, 1, 1]
    losses = [line["loss"] for line in log_of(tmp_path / "a")]
    assert losses[2:] == [None, None]
    calls.clear()
    train_here(world, tmp_path / "one", "--steps", "4", "--lr", "1e-3", "--log-every", "4")
    (line,) = log_of(tmp_path / "one")
    assert line["left_out"] == 2 and line["loss"] == pytest.approx(sum(losses[:2]) / 2)  # of the steps taken
    calls.clear()
    bad_calls = set()
    train_here(world, tmp_path / "b", "--steps", "4", "--lr", "1e-3")
    good = torch.load(tmp_path / "b" / "checkpoint.pt", weights_only=True)["state_dict"]
    skipped = torch.load(tmp_path / "a" / "checkpoint.pt", weights_only=True)["state_dict"]
    assert all(value.isfinite().all() for value in skipped.values())
    assert not torch.equal(good["visual.conv1.weight"], skipped["visual.conv1.weight"])
    calls.clear()
    bad_calls = set(range(1, 99))
    with pytest.raises(SystemExit, match="ten steps in a row"):
        train_here(world, tmp_path / "c", "--steps", "20")
    assert len(calls) == 10
    bad_calls, encode_image = set(), clip.CLIP.encode_image

    def overflows_backward(self, images):
        embed = encode_image(self, images)
        if embed.requires_grad:
            embed.register_hook(lambda grad: grad * torch.inf)
        return embed

    monkeypatch.setattr(clip.CLIP, "encode_image", overflows_backward)
    with pytest.raises(SystemExit, match="ten steps in a row"):
        train_here(world, tmp_path / "d", "--steps", "20")
    calls.clear()

    def overflows_forward(self, images):
        calls.append(1)
        return encode_image(self, images.float() * (torch.inf if len(calls) == 3 else 1.0))

    monkeypatch.setattr(clip.CLIP, "encode_image", overflows_forward)
    train_here(world, tmp_path / "e", "--steps", "4", "--lr", "1e-3")  # its evaluation would find NaN in batch norm
    state = torch.load(tmp_path / "e" / "checkpoint.pt", weights_only=True)["state_dict"]
    assert all(value.isfinite().all() for value in state.values())


def test_precisions_and_switches_run(world, tmp_path):
    """bf16 autocast on the CPU, accumulation, clipping, soft duplicates, periodic evaluation, local batch norm."""
    flags = ["--root", world, "--eval-sets", "val", *FLAGS]
    run_here(
        *flags,
        "--out",
        tmp_path / "a",
        "--steps",
        "4",
        "--precision",
        "bf16",
        "--accumulate",
        "2",
        "--clip-grad",
        "1",
        "--bn",
        "local",
    )
    assert all(np.isfinite(line["loss"]) for line in log_of(tmp_path / "a"))
    run_here(
        *flags,
        "--out",
        tmp_path / "b",
        "--steps",
        "4",
        "--dup-captions",
        "soft",
        "--caption",
        "a {class}",
        "--eval-every",
        "2",
    )
    lines = log_of(tmp_path / "b")
    assert [line["step"] for line in lines if "val" in line] == [2]
    printed = run_here(
        *flags, "--out", tmp_path / "c", "--steps", "4", "--text-arch", "transformer", "--batch-size", "16"
    )
    assert "chance loss ln(16) = 2.773" in printed


# ------------------------------------------------------------------------------ one's own data


@pytest.fixture
def photos(tmp_path):
    """40 JPEG pairs with captions, without classes; 12 rows of val.tsv."""
    rng = np.random.default_rng(0)
    lines = []
    for i in range(40):
        color = rng.integers(0, 256, 3)
        Image.fromarray(np.full((40, 50, 3), color, np.uint8)).save(tmp_path / f"{i}.jpg")
        lines.append(f"{i}.jpg\tthe colour {color[0]} {color[1]} {color[2]}\n")
    (tmp_path / "train.tsv").write_text("filepath\ttitle\n" + "".join(lines))
    (tmp_path / "val.tsv").write_text("filepath\ttitle\n" + "".join(lines[:12]))
    return tmp_path


OWN = ["--batch-size", "8", "--steps", "6", "--log-every", "2", "--precision", "fp32", "--device", "cpu"]


def test_own_pairs(photos):
    """A TSV of JPEGs with other column names, no classes, no merges: trains, learns its BPE, reports retrieval."""
    printed = run_here("--data", photos / "train.tsv", "--out", photos / "run", *OWN)
    metrics = json.loads((photos / "run" / "metrics.json").read_text())
    assert metrics["val"]["retrieval"]["i2t_r10"] >= 0 and metrics["val"]["top1"] is None and metrics["val"]["n"] == 12
    assert "retrieval" in printed and "metrics.json" in printed
    one = weights_of(photos / "run")
    run_here("--data", photos / "train.tsv", "--out", photos / "run2", "--workers", "2", *OWN)
    assert_bit_equal(one, weights_of(photos / "run2"))  # workers do not matter


def test_broken_images_are_replaced_and_counted(photos):
    for name, content in {"3.jpg": b"not an image", "5.jpg": (photos / "5.jpg").read_bytes()[:-60]}.items():
        (photos / name).write_bytes(content)
    (photos / "7.jpg").unlink()
    flags = ["--data", photos / "train.tsv", "--out", photos / "run", *OWN, "--epochs", "2", "--workers", "0"]
    printed = run_here(*flags)
    for reason in ("not an image", "truncated", "missing file"):
        assert f"unreadable image ({reason})" in printed
    assert log_of(photos / "run")[-1]["bad_images"] >= 6
    val = json.loads((photos / "run" / "metrics.json").read_text())["val"]
    assert val["n"] == 9 and val["bad_images"] == {"not an image": 1, "truncated": 1, "missing file": 1}
    assert "val: 3 images left out, they cannot be read (1 " in printed
    with pytest.raises(SystemExit, match="more than --max-bad 0.001"):
        run_here(*flags[:-4], "--epochs", "60", "--max-bad", "0.001", "--resume", "off")


def test_replacements_never_run_in_circles(photos, monkeypatch):
    """A tenth of the images is bad: over 3,000 epochs of 40 rows each is replaced by one that can be read."""
    monkeypatch.setattr(clip, "read_image", lambda table, row, *_: "bad" if row % 10 == 3 else Image.new("RGB", (8, 8)))
    table = clip.Table(photos / "train.tsv")
    examples = np.stack([np.zeros(3000, int), np.full(3000, 3), np.arange(3000)], 1)
    read, _, bad = clip.read_crops([table], examples, 8, 1.0, 1.0, 10**6, 0)
    assert (read[:, 1] % 10 != 3).all() and {reason for reason, _ in bad} == {"bad"} and len(bad) > 3000


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere the default stays, since a fork may hang")
@pytest.mark.parametrize("script", [clip, sl_vocab_subsample, dino_laionet], ids=lambda script: script.__name__)
def test_workers_share_tables_whatever_pythons_default(photos, monkeypatch, script):
    """Python 3.14 does not fork by default: nothing may be pickled to the workers of training and evaluation."""
    for name in "train", "val":
        names = [line.split("\t")[0] for line in (photos / f"{name}.tsv").read_text().splitlines()[1:]]
        rows = "".join(f"{file}\t{i % 2}\ta photo\n" for i, file in enumerate(names))
        (photos / f"{name}.tsv").write_text("image\tlabel\tcaption\n" + rows)
    (photos / "classes.tsv").write_text("name\ncat\ndog\n")
    state_of = script.Table.__getstate__

    def unless_spawning(table):
        assert multiprocessing.context.get_spawning_popen() is None, "a table is copied to a worker"
        return state_of(table)

    monkeypatch.setattr(script.Table, "__getstate__", unless_spawning)
    more = ["--no-baselines", "--transfer"] if script is dino_laionet else []
    mp.set_start_method("forkserver", force=True)
    try:
        programs.run_here(script, "--root", photos, "--data", photos / "train.tsv", "--out", photos / "run", *OWN,
                          "--workers", "1", "--eval-sets", "val", *more)
    finally:
        mp.set_start_method(None, force=True)
    assert json.loads((photos / "run" / "metrics.json").read_text())["val"]["n"] == 12


def test_evaluation_workers_leave_sigterm_to_the_training_process(photos, monkeypatch):
    """A signal to the group while a test set is read: the workers go on, so that the process in charge can end well."""
    monkeypatch.setattr(clip, "EVAL_BATCH", 2)

    class Model(torch.nn.Module):
        image_size, embed_dim = 8, 3

        def encode_image(self, images):
            calls.append(1)
            for worker in torch.multiprocessing.active_children() if len(calls) > 2 else ():  # both have begun
                os.kill(worker.pid, signal.SIGTERM)
                killed.add(worker.pid)
            return images.float().mean((2, 3))

    calls, killed = [], set()
    embed, readable, _ = clip.encode_images(Model(), clip.Table(photos / "val.tsv"), 2, 10**6, torch.device("cpu"))
    assert len(killed) == 2 and readable.all() and (embed > 0).any(1).all()


def test_automatic_precision(monkeypatch):
    """bf16 where the hardware has it; fp16 where torch only emulates it (GPUs before Ampere)."""
    for is_native, expected in ((True, "bf16"), (False, "fp16")):
        answer = lambda including_emulation=True, native=is_native: native or including_emulation  # noqa: E731
        monkeypatch.setattr(torch.cuda, "is_bf16_supported", answer)
        assert clip.pick_precision("auto", torch.device("cuda"))[0] == expected
    assert clip.pick_precision("fp16", torch.device("cpu"))[0] == "fp16"


@pytest.mark.parametrize("workers", ["0", "2"])
def test_a_set_without_any_image_ends_in_one_line(photos, workers):
    for path in photos.glob("*.jpg"):
        path.unlink()
    result = run_forked("--data", photos / "train.tsv", "--out", photos / "run", *OWN, "--workers", workers, check=False)
    assert result.returncode == 2 and "Traceback" not in result.stdout
    assert result.stdout.splitlines()[-1].startswith("100 unreadable images in a row, the last: missing file: ")


def test_evaluation_with_other_classes(world, photos, tmp_path):
    """Zero-shot on the classes of another root, without frequencies; without classes.tsv on those of the checkpoint."""
    run_here("--root", world, "--steps", "2", "--eval-sets", "val", "--out", tmp_path / "run", *FLAGS)
    other, bare = tmp_path / "other", tmp_path / "bare"
    for root in other, bare:
        root.mkdir()
        shutil.copy(world / "val.npy", root)
        shutil.copy(world / "val.tsv", root)
    names = [row["name"] for row in clip.read_classes(world)]
    of_name = {"": "", **{str(i): name for i, name in enumerate(names)}}
    rows = [line.split("\t") for line in (world / "val.tsv").read_text().splitlines()]
    place = rows[0].index("label")
    for row in rows[1:]:
        row[place] = of_name[row[place]]  # by name: the numbers of other hold for another order
    for root in other, bare:
        (root / "val.tsv").write_text("".join("\t".join(row) + "\n" for row in rows))
    (other / "classes.tsv").write_text("name\n" + "\n".join(reversed(names)) + "\n")
    flags = ["--eval-only", tmp_path / "run/checkpoint.pt", "--eval-sets", "val", *FLAGS[-4:]]
    printed = run_here(*flags, "--root", other, "--out", tmp_path / "a")
    assert "frequencies of the classes are not known" in printed
    mixed = ",".join(f"{world / name / 'train.tsv'}:1" for name in ("laionet", "incaps"))
    assert "frequencies of the classes: those of --data" in run_here(
        *flags, "--root", other, "--data", mixed, "--out", tmp_path / "mixed"
    )
    labels = np.concatenate(
        [clip.read_labels(clip.Table(world / name / "train.tsv"), named(names)) for name in ("laionet", "incaps")]
    )
    with np.load(tmp_path / "mixed" / "val.npz") as file:  # the tables' numbers, whatever the root calls them
        assert np.array_equal(file["class_counts"], np.bincount(labels[labels >= 0], minlength=120))
    run_here(*flags, "--root", bare, "--out", tmp_path / "b")
    first, a, b = (json.loads((tmp_path / x / "metrics.json").read_text())["val"] for x in ("run", "a", "b"))
    assert b == first and a["spearman_pred"] is None and a["top1"] is not None
    with np.load(tmp_path / "a" / "val.npz") as file, np.load(tmp_path / "run" / "val.npz") as own:
        assert np.array_equal(file["logits"][:, ::-1], own["logits"]) and not file["class_counts"].any()
    run_here("--data", photos / "train.tsv", "--out", photos / "own", *OWN)  # has no classes: zero-shot all the same
    run_here("--root", world, "--eval-only", photos / "own/checkpoint.pt", "--eval-sets", "val", *OWN[-4:],
             "--data", "nothing", "--out", tmp_path / "c")  # fmt: skip
    assert json.loads((tmp_path / "c" / "metrics.json").read_text())["val"]["top1"] is not None


@pytest.fixture
def own_pairs(world, tmp_path, monkeypatch):
    """own/ in the current folder: pairs.tsv and val.tsv with labels and captions, classes in another order, no merges."""
    monkeypatch.chdir(tmp_path)
    own = tmp_path / "own"
    own.mkdir()
    shutil.copy(world / "val.npy", own)
    names = [row["name"] for row in clip.read_classes(world)]
    header, *rows = [line.split("\t") for line in (world / "val.tsv").read_text().splitlines()]
    labels = [int(row[header.index("label")]) for row in rows]
    lines = ["image\tlabel\tcaption", *(f"val.npy:{i}\t{119 - c}\ta {names[c]}" for i, c in enumerate(labels))]
    for name in "pairs.tsv", "val.tsv":
        (own / name).write_text("\n".join(lines) + "\n")
    (own / "classes.tsv").write_text("name\n" + "\n".join(reversed(names)) + "\n")
    return own


def test_eval_only_scores_in_the_world_of_the_training(own_pairs, tmp_path, monkeypatch):
    """Without --root and --out: the classes of the training, not the built-in world's; no training's results replaced."""
    run_here("--data", "own/pairs.tsv", "--steps", "2", *FLAGS, "--eval-sets", "val")
    first = (tmp_path / "runs/clip/metrics.json").read_bytes()
    run_here("--eval-only", "runs/clip/checkpoint.pt", *FLAGS, "--eval-sets", "own/val.tsv")
    assert (tmp_path / "runs/clip/metrics.json").read_bytes() == first
    again = json.loads((tmp_path / "runs/eval/metrics.json").read_text())
    assert next(iter(again.values())) == json.loads(first)["val"] and not (tmp_path / "data").exists()
    (tmp_path / "elsewhere").mkdir()  # where the root of the training is not: the checkpoint knows its classes
    monkeypatch.chdir(tmp_path / "elsewhere")
    run_here("--eval-only", "../runs/clip/checkpoint.pt", *FLAGS, "--eval-sets", "../own/val.tsv")
    again = json.loads((tmp_path / "elsewhere/runs/eval/metrics.json").read_text())
    assert next(iter(again.values())) == json.loads(first)["val"] and not (tmp_path / "elsewhere/data").exists()


def test_eval_only_of_pairs_without_classes_keeps_what_was_trained(own_pairs, tmp_path):
    """Set and seed in metrics.json and in the export, whose own evaluation goes to the world of the training again."""
    (own_pairs / "classes.tsv").unlink()
    run_here("--data", "own/pairs.tsv", "--seed", "3", "--steps", "1", *FLAGS, "--eval-sets")
    run_here("--eval-only", "runs/clip/checkpoint.pt", *FLAGS, "--eval-sets", "own/val.tsv", "--export", "e.pt")
    assert json.loads((tmp_path / "runs/eval/metrics.json").read_text())["run"].items() >= {
        "data": "own/pairs.tsv", "seed": 3}.items()  # fmt: skip
    exported = torch.load("e.pt", weights_only=True)["args"]
    assert exported["root"] == "own" and exported["data"] == "own/pairs.tsv"
    run_here("--eval-only", "e.pt", *FLAGS, "--eval-sets")
    assert not (tmp_path / "data").exists()


def test_what_is_wrong_with_a_test_set_is_told_before_training(own_pairs, tmp_path):
    """A row that is cut where no label is read; an array that is empty."""
    (own_pairs / "flickr.tsv").write_text("image\tcaption\nval.npy:0\ta\nval.npy:1\ta\tb\n")
    flags = ["--data", "own/pairs.tsv", "--steps", "1", *FLAGS, "--eval-sets"]
    with pytest.raises(SystemExit, match="flickr.tsv: row 2 has 3 fields, the header 2"):
        run_here(*flags, "flickr")
    (own_pairs / "empty.npy").touch()
    (own_pairs / "empty.tsv").write_text("image\tlabel\tcaption\nempty.npy:0\t0\ta\n")
    with pytest.raises(SystemExit, match="images of own/empty.tsv: EOF"):
        run_here(*flags, "empty")
    assert not (tmp_path / "runs").exists()


def test_templates_with_a_byte_order_mark(tmp_path):
    (tmp_path / "t.txt").write_bytes("\ufeffa photo of a {}\n\n{}\n".encode())
    assert clip.read_lines(str(tmp_path / "t.txt")) == ["a photo of a {}", "{}"]


def test_resume_with_other_merges_is_refused(own_pairs, tmp_path):
    """Merges are learned from the captions where the world has none: other captions, other tokens, the same weights."""
    flags = ["--data", "own/pairs.tsv", *FLAGS, "--eval-sets", "val"]
    run_here(*flags, "--steps", "2")
    run_here(*flags, "--steps", "2")  # with the same captions it reports
    text = (own_pairs / "pairs.tsv").read_text()
    (own_pairs / "pairs.tsv").write_text(text.replace("a ", "quite a "))
    with pytest.raises(SystemExit, match="was made with another own/pairs.tsv: pass"):
        run_here(*flags, "--steps", "2")
    (own_pairs / "pairs.tsv").write_text(text)
    (own_pairs / "bpe.txt").write_text("#version\na b\nc d</w>\n")
    with pytest.raises(SystemExit, match="other byte-pair merges"):
        run_here(*flags, "--steps", "2")


def test_a_set_that_cannot_be_scored_is_named(own_pairs):
    (own_pairs / "classes.tsv").unlink()
    assert "val: not scored: labels need classes.tsv" in run_here("--data", "own/pairs.tsv", "--steps", "1", *FLAGS)


def test_labels_without_classes_may_be_any_number(own_pairs):
    """Ids of another system, in millions of millions: no table of counts is made for them."""
    (own_pairs / "classes.tsv").unlink()
    for name in "pairs.tsv", "val.tsv":
        header, *lines = (own_pairs / name).read_text().splitlines()
        lines = [line.replace("\t", "\t2000000000", 1) for line in lines]
        (own_pairs / name).write_text("\n".join([header, *lines]) + "\n")
    assert "0 classes" in run_here("--data", "own/pairs.tsv", "--steps", "1", *FLAGS, "--eval-sets", "val", "--out", "out")
    with np.load("out/val.npz") as file:  # evaluate.py takes features and labels: no array of no classes
        assert not {"class_names", "class_counts"} & set(file.files) and len(file["labels"]) == len(file["features"])


def test_a_test_set_that_cannot_be_read_is_told_before_training(own_pairs, tmp_path):
    flags = ["--data", "own/pairs.tsv", "--steps", "1", *FLAGS, "--eval-sets", "val", "--out", tmp_path / "out"]
    text = (own_pairs / "val.tsv").read_text()
    (own_pairs / "val.tsv").write_text(text + "other.npy:3\t3\ta thing\n")
    with pytest.raises(SystemExit, match="other.npy"):
        run_here(*flags)
    assert not (tmp_path / "out").exists()
    (own_pairs / "val.tsv").write_text(text + "val.npy:99999\t3\ta thing\n")  # one broken image: left out, counted
    assert "row 99999 is named: images are read one by one" in run_here(*flags)
    val = json.loads((tmp_path / "out" / "metrics.json").read_text())["val"]
    assert val["bad_images"] == {"row beyond the end of the .npy file": 1} and val["n"] == text.count("\n") - 1


def test_a_finished_frozen_run_embeds_no_caption_again(world, tmp_path, monkeypatch):
    text = dict(arch="cbow", width=64, vocab_size=514, context_length=77)
    model = clip.CLIP("tiny", 64, text, "gelu")
    torch.save({"state_dict": model.state_dict(), "activation": "gelu", "bpe": ""}, tmp_path / "text.pt")
    flags = ["--root", world, "--text-head", "frozen", "--text-init", tmp_path / "text.pt", "--steps", "2"]
    flags += [*FLAGS, "--eval-sets", "val", "--out", tmp_path / "run"]
    run_here(*flags)
    monkeypatch.setattr(clip, "embed_captions", lambda *_: pytest.fail("captions are embedded again"))
    assert "rho(freq,pred)" in run_here(*flags)


@pytest.mark.parametrize("is_missing, message", [(False, "values that are not finite"), (True, "does not fit the model")])
def test_a_text_tower_of_nan_or_in_part_is_not_trained_on(world, tmp_path, is_missing, message):
    model = clip.CLIP("tiny", 64, dict(arch="cbow", width=64, vocab_size=514, context_length=77), "gelu")
    weights, last = model.state_dict(), list(model.text_parameters())[-1]
    weights = {k: v * math.nan if k == last else v for k, v in weights.items() if not (is_missing and k == last)}
    torch.save({"state_dict": weights, "activation": "gelu", "bpe": ""}, tmp_path / "text.pt")
    with pytest.raises(SystemExit, match=message):
        run_here("--root", world, "--text-head", "frozen", "--text-init", tmp_path / "text.pt", *FLAGS, "--out", tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("error", [KeyboardInterrupt, SystemExit, MemoryError])
def test_a_write_that_is_interrupted_leaves_no_part(tmp_path, error):
    def write(file):
        file.write(b"half")
        raise error

    (tmp_path / "a.npz").write_bytes(b"before")
    with pytest.raises(error):
        clip.write_atomically(tmp_path / "a.npz", write)
    assert [path.name for path in tmp_path.iterdir()] == ["a.npz"] and (tmp_path / "a.npz").read_bytes() == b"before"


def test_a_link_stays_one_and_a_pipe_is_written_to(tmp_path):
    """Outputs that lead to another disk go on doing so, and what is no file is not replaced by one."""
    (tmp_path / "disk").mkdir()
    (tmp_path / "a.json").symlink_to("disk/a.json")
    os.mkfifo(tmp_path / "pipe")
    reader = os.open(tmp_path / "pipe", os.O_RDONLY | os.O_NONBLOCK)
    for name in "a.json", "pipe":
        clip.write_json(tmp_path / name, {"a": 1})
    assert os.read(reader, 99) == (tmp_path / "disk" / "a.json").read_bytes() == b'{\n "a": 1\n}\n'
    os.close(reader)
    assert (tmp_path / "a.json").is_symlink() and {path.name for path in tmp_path.iterdir()} == {"disk", "a.json", "pipe"}


def test_only_parts_of_this_program_go_from_out(tmp_path):
    for name in "checkpoint.pt.7.part", "film.mp4.part", "7.part", "checkpoint.pt":
        (tmp_path / name).touch()
    assert clip.lock_folder(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {"lock", "film.mp4.part", "7.part", "checkpoint.pt"}


def test_a_script_that_is_started_knows_nothing_of_the_launcher(monkeypatch):
    """Nor has it torchrun's single thread; what else is set stays, and a failure is told."""
    for name in "RANK", "WORLD_SIZE", "MASTER_PORT", "OMP_NUM_THREADS", "TORCHELASTIC_RUN_ID", "CUDA_VISIBLE_DEVICES":
        monkeypatch.setenv(name, "1")
    seen = []
    monkeypatch.setattr(subprocess, "run", lambda command, env: seen.append(env) or subprocess.CompletedProcess(command, 3))
    with pytest.raises(SystemExit, match="^a.py --b ended with status 3$"):
        clip.run_script(["a.py", "--b"])
    assert seen[0]["CUDA_VISIBLE_DEVICES"] == "1" and seen[0]["PATH"] == os.environ["PATH"]
    assert not [name for name in seen[0] if re.match("TORCHELASTIC|OMP_NUM|MASTER_|.*RANK|.*WORLD_SIZE", name)]


def test_args_json_and_the_name_of_a_run(tmp_path, monkeypatch):
    """CRCs have eight digits; W&B goes on with the run of a folder, not with that of another of the same name."""
    seen = []
    monkeypatch.setitem(sys.modules, "wandb", types.SimpleNamespace(init=lambda **k: seen.append((k["id"], k["name"]))))
    for folder in "a/run", "b/run", "a/run":
        args = argparse.Namespace(out=str(tmp_path / folder), tensorboard=False, wandb="mine", resume="auto")
        clip.RunLog(None, args, 0, {"x.tsv": 0xBEEF}, torch.device("cpu"), None)
    assert json.loads((tmp_path / "a" / "run" / "args.json").read_text())["crc32"] == {"x.tsv": "0000beef"}
    assert seen[0] == seen[2] and seen[0][0] != seen[1][0] and {name for _, name in seen} == {"run"}


def test_the_root_is_that_of_the_first_table():
    """With weights too; a set by its name is of the built-in world, and --root comes first."""
    of = {"a/x.tsv": "a", "a/x.tsv:2, b/y.tsv:1": "a", "laionet:2,b/y.tsv:.5": "b", "laionet:2": clip.SHAPES_ROOT}
    for data, root in (of | {None: clip.SHAPES_ROOT}).items():
        assert str(clip.root_of("auto", data)) == root and str(clip.root_of("r", data)) == "r"


def test_checkpoints_of_other_programs_are_named(world, tmp_path):
    """One line for what is no checkpoint of this script, to continue and to evaluate."""
    to_continue = {"layout": {"epoch": 1, "state_dict": {}, "optimizer": {}}, "tensor": torch.zeros(3), "list": [1]}
    to_read = {"numbered": {0: torch.zeros(3)}, "bare": {"state_dict": torch.zeros(3)},
               "half": {"token_embedding.weight": torch.zeros(514, 8)}}  # fmt: skip
    for name, content in (to_continue | to_read).items():
        torch.save(content, tmp_path / f"{name}.pt")
    for name in to_continue:
        with pytest.raises(SystemExit, match=f"{name}.pt is no checkpoint of clip.py"):
            run_here("--root", world, "--resume", tmp_path / f"{name}.pt", "--out", tmp_path / "out", *FLAGS)
    tower = {"arch": "resnet50", "state_dict": {"visual.conv1.weight": torch.zeros(3)}}  # dino_laionet.py's
    torch.save(tower, tmp_path / "tower.pt")
    with pytest.raises(SystemExit, match="tower.pt: no text tower"):
        run_here("--root", world, "--eval-only", tmp_path / "tower.pt", "--activation", "gelu", *FLAGS[-4:])
    for name, message in zip(to_read, ("no weights by name", "no weights by name", "no text_projection")):
        with pytest.raises(SystemExit, match=rf"{name}.pt: .*{message}"):
            run_here("--root", world, "--eval-only", tmp_path / f"{name}.pt", "--activation", "gelu", *FLAGS[-4:])


def test_the_log_is_json_whatever_the_gradient(tmp_path):
    log = open_log(tmp_path, 0)
    log.write({"step": 1, "grad_norm": float("inf"), "loss": float("nan")})
    log.file.close()
    assert (tmp_path / "log.jsonl").read_text() == '{"step": 1, "grad_norm": null, "loss": null}\n'
    (tmp_path / "log.jsonl").write_text("not JSON\n")
    (tmp_path / "checkpoint.pt").touch()
    with pytest.raises(SystemExit, match="a line is no JSON with a step"):
        open_log(tmp_path, 1)


def test_init_decides_the_architecture(world, tmp_path):
    """Learning rate and dropout follow the tower that was loaded, not the default of --arch; a kind of text must fit."""
    torch.manual_seed(0)
    text = dict(arch="transformer", width=64, vocab_size=514, context_length=77, n_layers=1)
    model = clip.CLIP("ViT-S-16", 64, text, "gelu")
    merges = {"state_dict": model.state_dict(), "arch": "tiny", "activation": "gelu", "bpe": ""}
    torch.save(merges, tmp_path / "vit.pt")
    args = clip.parse_args(["--init", str(tmp_path / "vit.pt"), "--text-arch", "cbow"])
    with pytest.raises(SystemExit, match="text tower of another kind"):
        clip.build_model(args, tmp_path, [], 0)
    torch.save(merges | {"arch": "ViT-S-16"}, tmp_path / "vit.pt")
    flags = ["--root", world, "--steps", "1", "--eval-sets", "--init", tmp_path / "vit.pt", *FLAGS]
    run_here(*flags, "--out", tmp_path / "on", "--batch-size", "2", "--warmup-steps", "0")
    assert log_of(tmp_path / "on")[0]["lr"] == 1e-3  # not tiny's 3e-3
    with pytest.raises(SystemExit, match="--arch RN50: .*vit.pt has ViT-S-16"):
        clip.build_model(clip.parse_args(["--init", str(tmp_path / "vit.pt"), "--arch", "RN50"]), tmp_path, [], 0)


def test_a_file_here_does_not_stand_in_for_the_roots(world, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "val.tsv").write_text("image\nx.npy:0\n")
    assert len(clip.find_test_sets(["val"], world)["val"]) > 1 == len(clip.find_test_sets(["val.tsv"], world)["val"])


def test_the_first_run_renders_the_world_once(world, tmp_path):
    """Beside build_datasets.py, here one that copies: one of three processes calls it, the others wait for the end."""
    shutil.copy(ROOT / "clip.py", tmp_path)
    (tmp_path / "build_datasets.py").write_text(
        "import os, shutil, sys, time\n"
        "print('rendering', *sys.argv[1:], os.environ.get('RANK'), flush=True)\n"
        f"time.sleep(1)\nshutil.copytree({str(world)!r}, sys.argv[3])\n")  # fmt: skip
    flags = ["--steps", "0", "--batch-size", "12", "--eval-sets", "val", "--device", "cpu", "--workers", "0"]
    printed = run(*flags, folder=tmp_path, cwd=tmp_path, processes=3).stdout
    assert printed.count("rendering shapes --out data/shapes None\n") == 1 and "rho(freq,pred)" in printed
    assert "Warning" not in printed and "nan" not in printed  # no step, so nothing to take a mean of


def test_copied_alone(photos, tmp_path):
    """The script alone in a folder trains on one's own data, and says what to pass when there is none."""
    alone = tmp_path / "alone"
    alone.mkdir()
    shutil.copy(ROOT / "clip.py", alone)
    run("--data", photos / "train.tsv", "--out", "run", *OWN, folder=alone, cwd=alone)
    result = run(folder=alone, cwd=alone, check=False)
    assert result.returncode == 2 and "pass --data my_pairs.tsv" in result.stdout and "Traceback" not in result.stdout


def test_messages(world, photos, tmp_path, capsys):
    """What users get wrong ends with one line that names it, and status 1 or 2."""
    (photos / "t.txt").write_text("a photo of a {class}\n")
    (photos / "wrong.tsv").write_text("image\tlabel\n0.jpg\t999\n")
    cases = {
        "no file": ["--root", world, "--data", "laion"],
        "sets in": ["--root", world, "--data", "nothing"],
        "no such file": ["--root", world, "--eval-sets", "test"],
        "is larger than the 40 rows": ["--data", photos / "train.tsv", "--batch-size", "64"],
        "--caption names ['titel']": ["--root", world, "--caption", "{titel}"],
        "have no label": ["--root", world, "--data", "web", "--caption", "a {class}"],
        "no such checkpoint": ["--root", world, "--eval-only", "nothing.pt"],
        "give every set a weight": ["--root", world, "--data", "laionet:2,incaps"],
        "not all of them 0": ["--root", world, "--data", "laionet:0,incaps:0"],
        "needs --text-head frozen": ["--root", world, "--text-embeddings", world / "val.npy"],
        "is read by --text-head frozen": ["--root", world, "--text-init", "some.pt"],
        "nope.npy: no such file": ["--root", world, "--text-head", "frozen", "--text-embeddings", "nope.npy"],
        "--seed must be at least 0": ["--root", world, "--seed", "-1"],
        "--epochs must be at least 0 and below 2**32": ["--root", world, "--epochs", "inf"],
        "--seed must be at least 0 and below 2**32, got 4294967296": ["--root", world, "--seed", "4294967296"],
        "would be called laionet-train, laionet-train": [
            "--root", world, "--eval-sets", world / "laionet/train.tsv", f"{world}/../shapes/laionet/train.tsv"],
        "no {} for the class name in 'a photo of a {class}'": ["--root", world, "--templates", photos / "t.txt"],
        "row 1 has label '999'": ["--root", world, "--eval-sets", photos / "wrong.tsv"],
        "choose one": ["--root", world, "--word-dropout", "0.5", "--text-head", "frozen"],
        "--device abacus: ": ["--root", world, "--device", "abacus"],
        "--device xpu:99: ": ["--root", world, "--device", "xpu:99"],
        "only cpu and cuda": ["--root", world, "--device", "meta"],
    }
    for message, wrong in cases.items():
        with pytest.raises(SystemExit) as error:
            clip.main(clip.parse_args([str(flag) for flag in ("--out", tmp_path / "out", *OWN, *wrong)]))
        is_usage = error.value.code == 2  # argparse prints its own message
        printed = capsys.readouterr().err
        assert message in (printed if is_usage else error.value.code), (message, error.value.code)
        assert not is_usage or printed.startswith("usage: ") and printed.count("\n") == 2, printed


@pytest.mark.parametrize("tensorboard, wandb", [(True, ""), (False, "project")])
def test_a_logger_that_is_missing_is_told_before_anything_is_written(tensorboard, wandb, tmp_path, monkeypatch):
    for name in "torch.utils.tensorboard", "wandb":
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(SystemExit, match="pip install"):
        open_log(tmp_path / "out", 0, tensorboard=tensorboard, wandb=wandb)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("module", [clip, sl_vocab_subsample])
def test_clip_grad_scales_the_step(world, tmp_path, module):
    """Gradients of a norm far below Adam's epsilon of 1e-8 move nothing; the logged norm is the one before."""
    weights, norms = {}, {}
    for limit, lr in (("0", "1e-12"), ("0", "1e-3"), ("1e-14", "1e-3")):
        out = tmp_path / f"{limit}_{lr}"
        flags = ["--root", world, "--out", out, "--steps", "2", "--lr", lr, "--clip-grad", limit, "--weight-decay", "0"]
        programs.run_here(module, *flags, *FLAGS, "--eval-sets")
        weights[limit, lr], norms[limit, lr] = weights_of(out), log_of(out)[0]["grad_norm"]
    start, free, clipped = weights.values()
    moved = {True: 0.0, False: 0.0}
    for is_clipped, end in ((False, free), (True, clipped)):
        for name in (n for n in start if n.endswith("weight")):
            moved[is_clipped] = max(moved[is_clipped], float((end[name] - start[name]).abs().max()))
    assert moved[False] > 5e-4 and moved[True] < 1e-7
    assert norms["0", "1e-3"] == norms["1e-14", "1e-3"] > 0.01
