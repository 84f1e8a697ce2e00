"""dino_laionet.py: targets, loss, drawn prototypes and their rows, against slow float64 versions of the paper."""

import math

import numpy as np
import pytest
import scipy.special
import scipy.stats
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

import dino_laionet as dino
import evaluate


def normal(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def slow_sinkhorn(logits, temperature, n_iterations=3):
    """SwAV's listing: prototypes are rows."""
    q = np.exp(logits.numpy() / temperature).T
    K, n = q.shape
    for _ in range(n_iterations):
        q /= q.sum(1, keepdims=True) * K
        q /= q.sum(0, keepdims=True) * n
    return (q * n).T


@pytest.mark.parametrize(
    "n_iterations, value", [(1, 0.6), (2, 0.631579), (3, 0.633803), (200, math.sqrt(3) / (1 + math.sqrt(3)))]
)
def test_sinkhorn_by_hand(n_iterations, value):
    logits = torch.tensor([[3.0, 1.0], [1.0, 1.0]], dtype=torch.float64).log()
    assert math.isclose(dino.sinkhorn(logits, 1.0, n_iterations)[0, 0], value, abs_tol=1e-6)


@pytest.mark.parametrize("n, K", [(16, 7), (4, 500)])
def test_sinkhorn_is_the_slow_one(n, K):
    logits = normal(n, K)
    np.testing.assert_allclose(dino.sinkhorn(logits, 0.3).numpy(), slow_sinkhorn(logits, 0.3), rtol=1e-10)


@pytest.mark.parametrize("temperature", [0.04, 0.005, 1e-4])
def test_sinkhorn_is_finite(temperature):
    logits = normal(8, 300, dtype=torch.float32).clamp(-1, 1)
    logits[:, 5] = -torch.inf
    q = dino.sinkhorn(logits, temperature)
    torch.testing.assert_close(q.sum(1), torch.ones(8), rtol=0, atol=1e-4)
    assert bool((q[:, 5] == 0).all())
    masked = dino.sinkhorn(torch.full((3, 4), -torch.inf), temperature)
    assert bool((masked == 0).all())


def sinkhorn_of_rank(rank, path, logits, results):
    dist.init_process_group("gloo", init_method=f"file://{path}", rank=rank, world_size=2)
    center, ids = torch.zeros(9, dtype=torch.float64), torch.arange(2, 9)
    results[rank] = (
        dino.sinkhorn(logits.chunk(2)[rank], 0.01),
        dino.center_and_sharpen(logits.chunk(2)[rank], center, ids, 0.1),
        center,
    )
    dist.destroy_process_group()


def test_targets_over_two_processes(tmp_path):
    logits = normal(12, 7)
    with mp.Manager() as manager:
        results = manager.dict()
        mp.spawn(sinkhorn_of_rank, (tmp_path / "store", logits, results), nprocs=2)
        parts = [results[0], results[1]]
    center = torch.zeros(9, dtype=torch.float64)
    targets = dino.center_and_sharpen(logits, center, torch.arange(2, 9), 0.1)
    torch.testing.assert_close(torch.cat([p[0] for p in parts]), dino.sinkhorn(logits, 0.01), rtol=0, atol=1e-10)
    torch.testing.assert_close(torch.cat([p[1] for p in parts]), targets, rtol=0, atol=1e-12)
    torch.testing.assert_close(parts[0][2], center, rtol=0, atol=1e-12)


def test_center():
    logits, center, ids = normal(5, 3), torch.arange(6, dtype=torch.float64), torch.tensor([0, 2, 5])
    before, used = center.clone(), center[ids].numpy()
    x = np.exp((logits.numpy() - used) / 0.2)
    targets = dino.center_and_sharpen(logits, center, ids, 0.2)
    np.testing.assert_allclose(targets.numpy(), x / x.sum(1, keepdims=True), rtol=1e-12)
    np.testing.assert_allclose(center[ids].numpy(), 0.9 * used + 0.1 * logits.numpy().mean(0), rtol=1e-12)
    assert torch.equal(center[[1, 3, 4]], before[[1, 3, 4]])


def test_loss_by_hand():
    targets = torch.tensor([[0.75, 0.25], [0.5, 0.5]], dtype=torch.float64)
    student = torch.tensor([[0.75, 0.25], [0.5, 0.5]], dtype=torch.float64).log()  # crops 1 and 2
    assert math.isclose(dino.dino_loss(student, targets, 1.0), 0.765068, abs_tol=1e-6)


@pytest.mark.parametrize("V", [2, 3, 10])
def test_loss_is_the_slow_loop(V):
    B, M = 4, 6
    student, targets = normal(V * B, M).requires_grad_(), normal(2 * B, M, seed=1).softmax(1)
    z = student.detach().numpy().reshape(V, B, M) / 0.1
    logp, q = z - np.log(np.exp(z).sum(2, keepdims=True)), targets.numpy().reshape(2, B, M)
    pairs = [-(q[i] * logp[v]).sum(1).mean() for i in range(2) for v in range(V) if v != i]
    assert len(pairs) == 2 * (V - 1)
    assert math.isclose(dino.dino_loss(student, targets, 0.1), np.mean(pairs), rel_tol=1e-12)
    assert torch.autograd.gradcheck(lambda s: dino.dino_loss(s, targets, 0.1), student)


def test_drawn_prototypes():
    ids = dino.draw_prototypes(100, 10, 3, 7)
    assert len(ids.unique()) == 10 and torch.equal(ids, ids.sort()[0]) and 0 <= ids.min() and ids.max() < 100
    assert torch.equal(ids, dino.draw_prototypes(100, 10, 3, 7))
    assert not torch.equal(ids, dino.draw_prototypes(100, 10, 3, 8))
    assert torch.equal(dino.draw_prototypes(9, 9, 3, 7), torch.arange(9))
    counts = torch.bincount(torch.cat([dino.draw_prototypes(20, 5, 0, step) for step in range(2000)]), minlength=20)
    assert bool(((counts - 500).abs() < 5 * math.sqrt(2000 * 0.25 * 0.75)).all())
    for M in (0, 101):
        with pytest.raises(ValueError, match="cannot be drawn"):
            dino.draw_prototypes(100, M, 0, 0)


def test_prototype_power():
    """With M = 1 a prototype is drawn in proportion to its weight."""
    usage = np.array([0, 1, 3])  # weights 1, 2, 4
    drawn = np.array([int(dino.draw_prototypes(3, 1, 0, step, usage, 1.0)) for step in range(4000)])
    np.testing.assert_allclose(np.bincount(drawn, minlength=3) / 4000, np.array([1, 2, 4]) / 7, atol=0.035)


def optimizers():
    yield "sgd", lambda p: torch.optim.SGD(p, 0.1, momentum=0.9, weight_decay=0.1)
    yield "adamw", lambda p: torch.optim.AdamW(p, 0.1, weight_decay=0.1)


@pytest.mark.parametrize("name, make", list(optimizers()))
def test_rows_not_drawn_stay(name, make):
    table, head = dino.PrototypeTable(8, 4, "cpu"), dino.Head(5, 6, 4, 3)
    optimizer = make([head.prototypes])
    for step in range(6):
        ids = dino.draw_prototypes(8, 3, 0, step)
        before, states = table.weight.clone(), {k: v.clone() for k, v in table.state.items()}
        table.load(ids, head.prototypes, optimizer)
        optimizer.zero_grad()
        dino.dino_loss(head(normal(6, 5, seed=step).float()), normal(4, 3).softmax(1).float(), 0.1).backward()
        optimizer.step()
        table.store(ids, head.prototypes, optimizer)
        others = torch.ones(8, dtype=torch.bool)
        others[ids] = False
        assert torch.equal(table.weight[others], before[others])
        assert not torch.equal(table.weight[ids], before[ids])
        for key, values in states.items():
            assert torch.equal(table.state[key][others], values[others]), key


@pytest.mark.parametrize("name, make", list(optimizers()))
def test_all_prototypes_is_plain_dino(name, make):
    """M = K: the table gives what an optimiser that holds the prototypes gives, bit for bit, with torch's weight norm."""
    torch.manual_seed(0)
    table, head = dino.PrototypeTable(8, 4, "cpu"), dino.Head(5, 6, 4, 8)
    plain = torch.nn.Parameter(table.weight.clone())
    optimizer, plain_optimizer = make([head.prototypes]), make([plain])
    for step in range(5):
        table.load(torch.arange(8), head.prototypes, optimizer)
        z, targets = normal(6, 5, seed=step).float(), normal(4, 8).softmax(1).float()
        dino.dino_loss(head(z), targets, 0.1).backward()
        unit = torch.nn.functional.normalize(head.mlp(z), dim=1)
        rows = torch._weight_norm(plain, torch.ones(8, 1), 0)
        dino.dino_loss(unit @ rows.T, targets, 0.1).backward(inputs=[plain])
        for o in (optimizer, plain_optimizer):
            o.step()
            o.zero_grad()
        table.store(torch.arange(8), head.prototypes, optimizer)
        assert torch.equal(table.weight, plain)


def test_head_gives_cosines():
    head, x = dino.Head(5, 6, 4, 8), normal(7, 5).float()
    head.prototypes.data = 3 * normal(8, 4, seed=1).float()
    z = head.mlp(x).detach()
    expected = torch.nn.functional.cosine_similarity(z[:, None], head.prototypes[None].detach(), dim=2)
    torch.testing.assert_close(head(x), expected, rtol=0, atol=1e-6)


def test_diagnostics_by_hand():
    """Entropies as scipy has them, in units of ln M; spread is of the mean assignment; features over a sphere have 1."""
    logits, targets = normal(6, 5), normal(6, 5, seed=1).softmax(1)
    embed, m = 7 * normal(4000, 32, seed=2), math.log(5)
    signs = dino.diagnostics(torch.tensor(2.5), logits, targets, embed, 0.3)
    of_rows = scipy.stats.entropy(targets, axis=1).mean()
    spread = scipy.stats.entropy(scipy.special.softmax(logits / 0.3, 1).mean(0)) / m
    expected = {"teacher_entropy": of_rows / m, "kl_uniform": m - of_rows, "teacher_kl": 2.5 - of_rows}
    found = {name: float(value) for name, value in signs.items()}
    assert 0.99 < found.pop("feature_std") < 1.01 and found == pytest.approx(expected | {"spread_entropy": spread})
    assert float(dino.diagnostics(torch.tensor(2.5), logits, targets, embed[:1].expand(9, -1), 0.3)["feature_std"]) < 1e-6


def test_collapse_begins_at_its_thresholds():
    """Targets above nine tenths of ln M, a spread or a deviation below a twentieth: not before."""
    well = {"teacher_entropy": 0.89, "spread_entropy": 0.051, "feature_std": 0.051}
    assert dino.collapse_of(well) == ""
    for sign, value in ("teacher_entropy", 0.91), ("spread_entropy", 0.049), ("feature_std", 0.049):
        assert dino.collapse_of(well | {sign: value}) != ""


def test_initial_head():
    """Weights of deviation 0.02, as in DINO's code, and no bias: temperatures are of such a start."""
    layers = [layer for layer in dino.Head(64, 128, 32, 4, True).mlp if isinstance(layer, torch.nn.Linear)]
    assert len(layers) == 3 and not any(layer.bias.any() for layer in layers)
    assert all(float(layer.weight.detach().std()) == pytest.approx(0.02, rel=0.05) for layer in layers)


def test_unique_prototypes():
    def at(*degrees):
        angles = torch.tensor(degrees).deg2rad()
        return torch.stack([angles.cos(), angles.sin()], 1)

    assert dino.unique_prototypes(at(0.0, 10.0, 20.0)) == 2
    assert dino.unique_prototypes(at(10.0, 0.0, 20.0)) == 1
    w = torch.nn.functional.normalize(normal(200, 3), dim=1).float()
    kept = []
    for row in w:
        if all(1 - float(row @ other) >= 0.025 for other in kept):
            kept.append(row)
    assert dino.unique_prototypes(w, chunk=64) == dino.unique_prototypes(w) == len(kept) < 200
    assert len(evaluate.greedy_cover(w, 0.025)[0]) == len(kept)  # evaluate.py prototypes counts the same


def test_ema():
    assert math.isclose(dino.cosine_at(0.996, 1.0, 0, 100), 0.996) and math.isclose(
        dino.cosine_at(0.996, 1.0, 50, 100), 0.998
    )
    assert dino.cosine_at(0.996, 1.0, 99, 100) < 1
