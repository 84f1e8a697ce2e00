"""dino_laionet.py against the public DINO itself. For developers: skipped unless DINO_REPO names a checkout.

git clone https://github.com/facebookresearch/dino DINO && DINO_REPO=DINO pytest tests/test_dino_public.py
"""

import os
import sys

import pytest
import torch
import torch.distributed as dist

import dino_laionet as dino

REPOSITORY = os.environ.get("DINO_REPO", "")
pytestmark = pytest.mark.skipif(not REPOSITORY, reason="no DINO_REPO, a checkout of github.com/facebookresearch/dino")


@pytest.fixture(scope="module")
def public():
    """Its modules main_dino, utils and vision_transformer, in a process group of one."""
    sys.path.insert(0, REPOSITORY)
    import main_dino

    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield main_dino
    dist.destroy_process_group()
    sys.path.remove(REPOSITORY)


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("V", [2, 6, 10])
def test_loss_and_center(public, V):
    """Three steps from the same logits, so the centre of the one before counts: value, gradient, centre. In float64."""
    B, K = 5, 300
    theirs, center = public.DINOLoss(K, V, 0.04, 0.04, 0, 1).double(), torch.zeros(K, dtype=torch.float64)
    for step in range(3):
        teacher = normal(2 * B, K, seed=step).double().tanh()
        students = [normal(V * B, K, seed=9 + step).double().tanh().requires_grad_() for _ in range(2)]
        targets = dino.center_and_sharpen(teacher, center, torch.arange(K), 0.04)
        losses = dino.dino_loss(students[0], targets, 0.1), theirs(students[1], teacher, 0)
        torch.testing.assert_close(*losses, rtol=0, atol=1e-12)
        for loss in losses:
            loss.backward()
        torch.testing.assert_close(students[0].grad, students[1].grad, rtol=0, atol=1e-12)
        torch.testing.assert_close(center, theirs.center[0], rtol=0, atol=1e-12)


def vits(public):
    """The public ViT-S/16 and ours with its weights."""
    torch.manual_seed(0)
    theirs = public.vits.vit_small(patch_size=16).eval()
    ours = dino.Network("ViT-S-16", 16, 8, 4, False).visual.eval()
    ours.load_state_dict(theirs.state_dict())
    return theirs, ours


def test_vit(public):
    theirs, ours = vits(public)
    images = normal(2, 3, 224, 224)
    pair = [tower(images) for tower in (ours, theirs)]
    torch.testing.assert_close(*pair, rtol=0, atol=2e-5)  # of the order of 1
    for y in pair:
        (y * normal(2, 384, seed=1)).sum().backward()
    expected = {name: p.grad for name, p in theirs.named_parameters()}
    for name, p in ours.named_parameters():
        error = (p.grad - expected[name]).norm()
        assert error <= 1e-4 * expected[name].norm() + 1e-6, (name, error)


def test_positions(public, monkeypatch):
    """Equal once its scale is that of the grid: it adds 0.1 patch (deviation 5)."""
    theirs, ours = vits(public)
    interpolate = torch.nn.functional.interpolate

    def to_the_grid(x, size=None, scale_factor=None, **kwargs):
        if scale_factor:
            size = [int(n * scale) for n, scale in zip(x.shape[2:], scale_factor, strict=True)]
        return interpolate(x, size, **kwargs)

    monkeypatch.setattr(torch.nn.functional, "interpolate", to_the_grid)
    for height, width in (6, 6), (20, 14), (3, 8):
        tokens = torch.zeros(1, 1 + height * width, 384)
        expected = theirs.interpolate_pos_encoding(tokens, 16 * height, 16 * width)[0]
        torch.testing.assert_close(dino.resize_positions(ours.pos_embed[0], height, width), expected, rtol=0, atol=1e-7)
    with torch.no_grad():
        images = normal(2, 3, 96, 96)
        torch.testing.assert_close(ours(images), theirs(images), rtol=0, atol=2e-5)


def test_head(public):
    torch.manual_seed(0)
    theirs, ours, x = public.DINOHead(384, 500), dino.Head(384, 2048, 256, 500), normal(6, 384)
    weights = theirs.state_dict()
    assert torch.equal(weights.pop("last_layer.weight_g"), torch.ones(500, 1))
    ours.load_state_dict({k.replace("last_layer.weight_v", "prototypes"): v for k, v in weights.items()})
    torch.testing.assert_close(ours(x), theirs(x), rtol=0, atol=1e-6)


def test_clipping_and_schedule(public):
    layers = [torch.nn.Linear(30, 40), torch.nn.Linear(30, 40)]
    for layer in layers:
        layer.weight.grad, layer.bias.grad = 9 * normal(40, 30), 0.1 * normal(40, seed=1)
    norms = public.utils.clip_gradients(layers[0], 3.0)
    norm = dino.clip_gradients(list(layers[1].parameters()), 3.0, True)
    for a, b in zip(*(layer.parameters() for layer in layers), strict=True):
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-6, atol=0)
    assert float(norm) == pytest.approx(torch.tensor(norms).norm().item(), rel=1e-6)
    schedule = public.utils.cosine_scheduler(0.996, 1, 4, 25)
    assert [dino.cosine_at(0.996, 1.0, step, 100) for step in range(100)] == pytest.approx(schedule, abs=1e-12)
