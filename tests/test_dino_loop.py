"""dino_laionet.py's loop against another one, written with ordinary torch parameters for all K prototypes."""

import copy
import math
import types

import numpy as np
import programs
import pytest
import torch
import torch.nn.functional as F
from programs import log_of

import dino_laionet as dino

B, K, D, STEPS, LR, DECAY, EMA, WARM = 32, 64, 32, 4, 3e-3, 0.04, 0.95, 2
FLAGS = ["--batch-size", B, "--log-every", 1, "--warmup-steps", WARM, "--precision", "fp32", "--device", "cpu"]
FLAGS += ["--prototypes", K, "--prototype-dim", D, "--steps", STEPS, "--lr", LR, "--transfer", "--eval-sets", "--no-baselines"]


PLAIN = dict(seed=0, sets={"laionet": 1}, hidden=256, has_bn=True, sizes=(28, 16), scales=((0.6, 1.0), (0.05, 0.14)),
             aspect=1.15, augment="colour", student_temp=0.1, teacher_temps=[0.02] * STEPS, clip=3.0)  # fmt: skip
# Flags of a run that has no default left in what shapes its views, targets and head, and PLAIN for it.
OTHER = """--seed 3 --data laionet:2,incaps:1 --augment dino --global-size 26 --global-scale 0.3 0.8 --local-size 12
    --local-scale 0.1 0.3 --crop-aspect 1.4 --student-temp 0.2 --warmup-teacher-temp 0.1 --warmup-teacher-temp-steps 2
    --no-head-bn --head-hidden 32 --clip-grad 0.01""".split()
OF_OTHER = dict(seed=3, sets={"laionet": 2, "incaps": 1}, hidden=32, has_bn=False, sizes=(26, 12), aspect=1.4, clip=0.01,
                scales=((0.3, 0.8), (0.1, 0.3)), augment="dino", student_temp=0.2,
                teacher_temps=[0.1, 0.06, 0.02, 0.02])  # fmt: skip


def slow_loop(world, M, centering, optimizer_name, n_local, **changes):
    """Losses, student, teacher, prototypes of both, centre after STEPS steps; written from the paper, but for the
    tower, the views, the loss and Sinkhorn, which have tests of their own."""
    s = types.SimpleNamespace(**PLAIN | changes)
    torch.manual_seed(s.seed)
    student = dino.Network("tiny", s.hidden, D, K, s.has_bn)
    student.visual.to(memory_format=torch.channels_last)
    student.head.prototypes.data = F.normalize(torch.randn(K, D), dim=1)
    student.head.prototypes.data *= 1 if optimizer_name == "adamw" else math.sqrt(D / K)
    teacher = copy.deepcopy(student)
    named = [(n, p) for n, p in student.named_parameters() if p.requires_grad and (M == K or n != "head.prototypes")]
    groups = [
        {"params": [p for _, p in named if p.ndim > 1], "weight_decay": DECAY},
        {"params": [p for _, p in named if p.ndim < 2], "weight_decay": 0.0},
    ]
    if optimizer_name == "adamw":
        optimizer = torch.optim.AdamW(groups, LR, (0.9, 0.98), eps=1e-8, fused=True)
    else:
        optimizer = torch.optim.SGD(groups, LR, 0.9, fused=True)
    tables = [dino.Table(world / name / "train.tsv") for name in s.sets]
    n_rows, shares = [len(table) for table in tables], np.array(list(s.sets.values())) / sum(s.sets.values())
    pixels, sizes = dino.load_pixels(tables), [s.sizes[0]] * 2 + [s.sizes[1]] * n_local
    views = dino.Views(tables, sizes, [s.scales[0]] * 2 + [s.scales[1]] * n_local, s.aspect, 10**9, s.seed)
    views.pixel_offsets = np.cumsum([0, *n_rows[:-1]])
    center, momenta, losses = torch.zeros(K), [torch.zeros(K, D), torch.zeros(K, D)], []

    def logits_of(network, crops, prototypes):
        z = network.head.mlp(torch.cat([network.encode_image(x) for x in crops]))
        return F.normalize(z, dim=1) @ torch._weight_norm(prototypes, torch.ones(len(prototypes), 1), 0).T

    for step in range(STEPS):
        examples = dino.Sampler(n_rows, shares, B, s.seed, step, STEPS, 0, 1).batch(step)
        lr = LR * (step + 1) / WARM if step < WARM else LR / 2 * (1 + math.cos(math.pi * (step - WARM) / (STEPS - WARM)))
        for group in optimizer.param_groups:
            group["lr"] = lr
        ids = torch.arange(K)
        if M < K:
            ids = torch.from_numpy(np.sort(np.random.default_rng([s.seed, step, 0, 11]).choice(K, M, replace=False)))
        crops = dino.make_crops(views.__getitems__(examples), pixels, sizes, s.augment, torch.device("cpu"))
        rows = student.head.prototypes if M == K else student.head.prototypes.detach()[ids].clone().requires_grad_()
        with torch.no_grad():
            of_teacher = logits_of(teacher, [crops[0][: 2 * B]], teacher.head.prototypes.detach()[ids])
        of_student = logits_of(student, crops, rows)
        if centering == "sinkhorn":
            targets = dino.sinkhorn(of_teacher, s.teacher_temps[step])
        else:
            targets = ((of_teacher - center[ids]) / s.teacher_temps[step]).softmax(1)
            center[ids] = 0.9 * center[ids] + (1 - 0.9) * of_teacher.mean(0)
        loss = dino.dino_loss(of_student, targets, s.student_temp)
        losses.append(float(loss.detach()))
        loss.backward()
        grads = [p.grad for _, p in named if p.grad is not None] + ([] if M == K else [rows.grad])
        for grad in grads:
            grad.mul_((s.clip / (grad.norm() + 1e-6)).clamp(max=1))
        optimizer.step()
        optimizer.zero_grad()
        if M < K:  # only the drawn rows move, each with its own past
            grad, weight = rows.grad, student.head.prototypes.data
            first, second = momenta
            if optimizer_name == "sgd":
                first[ids] = 0.9 * first[ids] + grad + DECAY * weight[ids]
                weight[ids] -= lr * first[ids]
            else:
                weight[ids] *= 1 - lr * DECAY
                first[ids], second[ids] = 0.9 * first[ids] + 0.1 * grad, 0.98 * second[ids] + 0.02 * grad * grad
                mean, square = first[ids] / (1 - 0.9 ** (step + 1)), second[ids] / (1 - 0.98 ** (step + 1))
                weight[ids] -= lr * mean / (square.sqrt() + 1e-8)
        momentum = 1 + (EMA - 1) / 2 * (1 + math.cos(math.pi * step / STEPS))
        with torch.no_grad():
            for slow, fast in zip(teacher.parameters(), student.parameters()):
                if fast.requires_grad:
                    slow.lerp_(fast, 1 - momentum)
    return losses, student.state_dict(), teacher.state_dict(), center


@pytest.mark.parametrize(
    "M, centering, optimizer, n_local, more",
    [(K, "sinkhorn", "adamw", 0, []), (K, "mean", "sgd", 2, []), (16, "mean", "sgd", 0, []),
     (16, "sinkhorn", "adamw", 2, []), (K, "mean", "adamw", 1, OTHER)],
)  # fmt: skip
def test_the_loop_is_plain_dino(world, tmp_path, M, centering, optimizer, n_local, more):
    """All prototypes: bit for bit. M of K: the drawn rows move as under an optimizer of their own, no other row does."""
    flags = ["--sample-prototypes", 0 if M == K else M, "--centering", centering, "--optimizer", optimizer]
    programs.run_here(dino, "--root", world, *FLAGS, *flags, "--local-crops", n_local, *more, "--out", tmp_path)
    found = torch.load(tmp_path / "checkpoint.pt", weights_only=True)
    changes = OF_OTHER if more else {}
    losses, student, teacher, center = slow_loop(world, M, centering, optimizer, n_local, **changes)
    pairs = [(found["student_prototypes"], student.pop("head.prototypes"))]
    pairs += [(found["dino_prototypes"], teacher.pop("head.prototypes")), (found["center"], center)]
    others = [(found["student"][name], value) for name, value in student.items()]
    others += [(found["state_dict"][name], value) for name, value in teacher.items()]
    if M == K:
        assert [line["loss"] for line in log_of(tmp_path)] == losses
        assert all(torch.equal(a, b) for a, b in pairs + others)
    else:
        assert np.allclose([line["loss"] for line in log_of(tmp_path)], losses, rtol=1e-5)
        close = 1e-6 if optimizer == "sgd" else 1e-5  # AdamW divides by gradients that are small: 4e-6 on AVX-512
        assert all(torch.allclose(a, b, rtol=0, atol=close) for a, b in pairs)
        if optimizer == "sgd":  # AdamW divides by gradients that are all but 0: of biases before batch norm
            assert all(torch.allclose(a.float(), b.float(), rtol=1e-5, atol=1e-6) for a, b in others)
