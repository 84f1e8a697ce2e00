"""The training scripts and evaluate.py on a GPU; skipped where there is none: pytest tests/test_gpu.py -n 4 --dist load"""

import contextlib
import copy
import json
import math
import os
import re
import subprocess
import sys

import numpy as np
import programs
import pytest
import torch
from programs import ROOT, log_of

import clip
import evaluate

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")
ENV = {**os.environ, "OMP_NUM_THREADS": "1"}
FLAGS = {
    "clip.py": ["--batch-size", "64"],
    "sl_vocab_subsample.py": ["--batch-size", "64", "--vocab", "32", "--vocab-group", "32"],
    "dino_laionet.py": ["--batch-size", "32", "--prototypes", "256", "--sample-prototypes", "64", "--no-baselines"],
}
SCRIPTS = sorted(FLAGS)


def run(script, world, out, *flags, **kwargs):
    few = ["--root", world, "--out", out, "--steps", "12", "--warmup-steps", "2", "--log-every", "1"]
    return programs.run(script, *few, *FLAGS[script], *flags, **{"env": ENV, **kwargs})


@pytest.mark.parametrize("script", SCRIPTS)
def test_losses_are_those_of_the_cpu(world, tmp_path, script):
    """The first losses of the same weights and images: fp32 to TF32's rounding, bf16 and fp16 to theirs."""
    run(script, world, tmp_path / "cpu", "--device", "cpu", "--precision", "fp32")
    expected = [line["loss"] for line in log_of(tmp_path / "cpu")][:4]
    for precision, tolerance in (("fp32", 2e-3), ("bf16", 2e-2), ("fp16", 2e-2)):
        printed = run(script, world, tmp_path / precision, "--device", "cuda", "--precision", precision).stdout
        assert f"precision {precision}" in printed and "cuda:0" in printed
        lines = log_of(tmp_path / precision)
        # fp16's loss scale starts at 2^16 and may skip the first steps: only the first loss is that of the same weights
        n_same = 1 if precision == "fp16" else 4
        assert [line["loss"] for line in lines][:n_same] == pytest.approx(expected[:n_same], rel=tolerance), precision
        assert all(math.isfinite(line["loss"]) for line in lines)
        metrics = json.loads((tmp_path / precision / "metrics.json").read_text())
        assert metrics["run"]["precision"] == precision


@pytest.mark.parametrize("script", SCRIPTS)
def test_bf16_is_the_default(world, tmp_path, script):
    assert "precision bf16 (CUDA), cuda:0" in run(script, world, tmp_path).stdout


# A script in a program that counts what waits for the GPU, up to the checkpoint after the last step.
COUNT = """
import collections, runpy, sys, warnings
import torch
where, save = collections.Counter(), torch.save
def note(message, category, filename, line, *rest):
    where[f"{filename}:{line}"] += "synchronizing CUDA operation" in str(message)
def save_and_stop_counting(*args):
    warnings.showwarning = lambda *args: None
    save(*args)
torch.save, warnings.showwarning = save_and_stop_counting, note
warnings.simplefilter("always")
torch.cuda.init()
torch.cuda.set_sync_debug_mode("warn")
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
print("WAITED", sum(where.values()), where.most_common(4))
"""


@pytest.mark.parametrize("script", SCRIPTS)
@pytest.mark.parametrize("flags", [(), ("--precision", "fp16")])
def test_a_step_does_not_wait_for_the_gpu(world, tmp_path, script, flags):
    """Runs of 20 and of 40 steps wait equally often: at the start, and in the last step, which is logged."""
    counts = {}
    for steps in (20, 40):
        out = tmp_path / str(steps)
        command = [sys.executable, "-c", COUNT, ROOT / script, "--root", world, "--out", out, "--steps", steps]
        command += [*FLAGS[script], "--log-every", "1000", "--warmup-steps", "2", *flags]
        done = subprocess.run(list(map(str, command)), stdout=-1, stderr=-2, text=True, env=ENV, timeout=240)
        assert done.returncode == 0, done.stdout[-3000:]
        counts[steps] = re.findall(r"^WAITED (\d+) (.*)", done.stdout, re.M)[0]
    assert int(counts[20][0]) > 0, "not even the last step was counted"
    assert counts[20][0] == counts[40][0], counts


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_killed_run_continues(world, tmp_path, script):
    """The losses of a run that was killed and continued are those of one that was not, but for the order of sums."""
    flags = ["--steps", "60", "--precision", "fp32", "--save-every", "5"]
    run(script, world, tmp_path / "whole", *flags)
    few = ["--root", world, "--warmup-steps", "2", "--log-every", "1", *FLAGS[script], *flags]
    programs.kill_after(12, tmp_path / "killed", script, *few, env=ENV)
    assert "continued from step" in run(script, world, tmp_path / "killed", *flags).stdout
    whole, killed = (log_of(tmp_path / name) for name in ("whole", "killed"))
    assert [line["step"] for line in killed] == [line["step"] for line in whole]
    assert [line["loss"] for line in killed][:30] == pytest.approx([line["loss"] for line in whole][:30], rel=1e-2)


@pytest.mark.parametrize("script", SCRIPTS)
def test_compiled(world, tmp_path, script):
    run(script, world, tmp_path / "eager", "--precision", "fp32")
    run(script, world, tmp_path / "compiled", "--precision", "fp32", "--compile", timeout=400)
    eager, compiled = ([line["loss"] for line in log_of(tmp_path / out)] for out in ("eager", "compiled"))
    assert compiled[:4] == pytest.approx(eager[:4], rel=5e-3)


@pytest.mark.parametrize("script", SCRIPTS)
def test_one_process_under_torchrun_uses_nccl(world, tmp_path, script):
    command = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "1", str(ROOT / script)]
    few = ["--root", world, "--out", tmp_path, "--steps", 4, "--warmup-steps", 2, "--log-every", 1, *FLAGS[script]]
    done = subprocess.run([sys.executable, *command, *map(str, few)], stdout=-1, stderr=-2, text=True, env=ENV)
    assert done.returncode == 0, done.stdout[-3000:]
    assert len(log_of(tmp_path)) == 4


@pytest.mark.parametrize("kind", [torch.optim.AdamW, torch.optim.SGD])
def test_found_inf_leaves_a_fused_step_out(kind):
    """What the scripts rely on for steps that are not finite, without GradScaler's loss scale."""
    weight = torch.nn.Parameter(torch.ones(3, device="cuda"))
    optimizer = kind([weight], lr=0.1, fused=True)
    for gradient, expected in ((torch.nan, True), (1.0, False)):
        weight.grad = torch.full_like(weight, gradient)
        optimizer.found_inf = (~weight.grad.norm().isfinite()).float()
        optimizer.step()
        assert bool((weight == 1).all()) == expected


def test_gradcache_on_a_gpu():
    """Chunks give the gradients of the whole batch, of a model without batch norm."""
    torch.manual_seed(0)
    text = dict(arch="transformer", width=64, vocab_size=100, context_length=16)
    model = clip.CLIP("ViT-B-32", 64, text, "gelu", image_size=64).cuda()
    images = torch.randint(0, 256, (16, 3, 64, 64), dtype=torch.uint8, device="cuda")
    texts = torch.randint(1, 99, (16, 16), device="cuda")
    texts[:, -1] = 99
    grads = {}
    for n_chunks in (1, 4):
        net = copy.deepcopy(model)
        args = (net, images, texts, clip.info_nce, n_chunks, contextlib.nullcontext, lambda loss: loss)
        clip.backward_in_chunks(*args)
        grads[n_chunks] = torch.cat([p.grad.flatten() for p in net.parameters()])
    error = (grads[1] - grads[4]).norm() / grads[1].norm()
    assert error < 1e-5, float(error)


def numbers(value):
    """All numbers of nested dicts; NaN for null."""
    if isinstance(value, dict):
        return [x for v in value.values() for x in numbers(v)]
    return [math.nan if value is None else value] if isinstance(value, int | float | None) else []


def test_scores_are_those_of_the_cpu(tmp_path, monkeypatch):
    """Each command of evaluate.py that has --device; of 400 test images three may fall on the other side of a tie."""
    monkeypatch.chdir(tmp_path)
    rng, centers = np.random.default_rng(0), np.random.default_rng(1).normal(size=(10, 32))
    for part in "train", "test":
        labels = rng.integers(10, size=400)
        np.savez(f"{part}.npz", labels=labels, features=centers[labels] + 1.5 * rng.normal(size=(400, 32)))
    images = rng.normal(size=(200, 32))
    np.savez("pairs.npz", features=images, text_features=images + 1.5 * rng.normal(size=(200, 32)), image_ids=np.arange(200))
    rows = centers[rng.integers(10, size=300)] + 0.2 * rng.normal(size=(300, 32))
    np.savez("prototypes.npz", prototypes=rows, class_counts=np.arange(300))
    for line in ("probe train.npz test.npz", "knn train.npz test.npz --k 5", "retrieval pairs.npz",
                 "fewshot train.npz test.npz --shots 4 --draws 2", "prototypes prototypes.npz --eps 0.05"):  # fmt: skip
        found = []
        for device in ("cpu", "cuda"):
            programs.run_here(evaluate, *line.split(), "--boot", 50, "--device", device, "--json", f"{device}.json")
            with open(f"{device}.json") as file:
                found.append(numbers(json.load(file)["rows"]))
        assert len(found[0]) > 2 and found[1] == pytest.approx(found[0], abs=0.0076, nan_ok=True), line
