"""dino_laionet.py: crops, colours, towers, published weights and probes, against torchvision, scipy and scikit-learn."""

import argparse
import math

import numpy as np
import pytest
import torch
import torchvision
import torchvision.transforms.v2.functional as tv
from PIL import Image
from scipy.stats import ks_2samp
from sklearn.linear_model import LogisticRegression
from sklearn.neighbors import KNeighborsClassifier

import clip
import dino_laionet as dino


def uniform(*shape, seed=0):
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("scale, aspect", [((0.05, 0.14), 1.5), ((0.6, 1.0), 1.0), ((0.4, 1.0), 3.0)])
def test_boxes_have_the_law_of_torchvision(scale, aspect):
    n, height = 3000, 2000
    width, ratio = round(aspect * height), 4 / 3
    boxes = dino.crop_boxes(scale, ratio, np.full(n, width / height), 0, np.arange(n))
    assert boxes.min() >= 0 and boxes.max() <= 1 + 1e-12
    left, top, right, bottom = (boxes * [width, height, width, height]).T
    ours = np.stack([left, top, right - left, bottom - top], 1)
    torch.manual_seed(0)
    image, get = torch.empty(1, 1, 1).expand(1, height, width), torchvision.transforms.RandomResizedCrop.get_params
    theirs = np.array([get(image, list(scale), [1 / ratio, ratio]) for _ in range(n)])[:, [1, 0, 3, 2]]
    for name, of in {
        "left": lambda x: x[:, 0] / width,
        "top": lambda x: x[:, 1] / height,
        "area": lambda x: x[:, 2] * x[:, 3] / (width * height),
        "ratio": lambda x: np.log(x[:, 2] / x[:, 3]),
    }.items():
        a, b = (np.round(of(x), 2) for x in (ours, theirs))  # torchvision's sides are whole pixels
        assert ks_2samp(a, b).pvalue > 1e-3, name
    if aspect < 3:
        area, shape = ours[:, 2] * ours[:, 3] / (width * height), ours[:, 2] / ours[:, 3]
        assert scale[0] - 1e-9 <= area.min() and area.max() <= scale[1] + 1e-9
        assert 1 / ratio - 1e-9 <= shape.min() and shape.max() <= ratio + 1e-9


@pytest.mark.parametrize("aspect", [10.0, 0.1])
def test_box_that_never_fits(aspect):
    """The largest crop of an allowed ratio, in the middle."""
    box = dino.crop_boxes((0.9, 1.0), 4 / 3, np.array([aspect]), 0, 1)[0]
    side = 4 / 3 / 10
    expected = [0.5 - side / 2, 0, 0.5 + side / 2, 1] if aspect > 1 else [0, 0.5 - side / 2, 1, 0.5 + side / 2]
    np.testing.assert_allclose(box, expected, atol=1e-12)


def test_boxes_depend_on_their_own_keys_alone():
    boxes = dino.crop_boxes((0.1, 1.0), 1.3, np.ones(5), 3, np.arange(5))
    alone = dino.crop_boxes((0.1, 1.0), 1.3, np.ones(1), 3, np.array([4]))
    assert np.array_equal(boxes[4:], alone) and len(np.unique(boxes, axis=0)) == 5
    assert not np.array_equal(alone, dino.crop_boxes((0.1, 1.0), 1.3, np.ones(1), 4, np.array([4])))


@pytest.mark.parametrize("f", [0.0, 0.3, 1.0])
def test_jitter_is_torchvisions(f):
    x, f1 = uniform(4, 3, 20, 20), torch.full((4, 1, 1, 1), f)
    x[0, :, :5], x[1, :, 3] = 0.5, 0  # grey and black: no hue
    published = torchvision.transforms.v2.ColorJitter(0.4, 0.4, 0.2, 0.1)
    for op, name in zip(dino.JITTER, ("brightness", "contrast", "saturation", "hue"), strict=True):
        low, high = getattr(published, name)
        expected = torch.stack([getattr(tv, f"adjust_{name}")(one, low + f * (high - low)) for one in x])
        torch.testing.assert_close(op(x.clone(), f1), expected, rtol=0, atol=2e-5)
    torch.testing.assert_close(dino.grey(x), tv.rgb_to_grayscale(x), rtol=0, atol=1e-6)


def test_blur_is_torchvisions():
    x, sigma = uniform(3, 3, 16, 16), torch.tensor([0.1, 0.7, 2.0])
    expected = torch.stack([tv.gaussian_blur(one, [13, 13], [float(s)]) for one, s in zip(x, sigma, strict=True)])
    torch.testing.assert_close(dino.gaussian_blur(x, sigma), expected, rtol=0, atol=1e-5)


def test_crops_of_arrays_are_torchvisions():
    """torchvision sees nothing outside the crop: here that repeats its edge."""
    inner = uniform(2, 3, 23, 30) * 255
    pixels = tv.pad(inner, [5, 3, 7, 4], padding_mode="edge").byte()  # left, top, right, bottom
    box = torch.tensor([[5 / 42, 3 / 30, 35 / 42, 26 / 30]] * 2)
    for size in 12, 28, 40:
        expected = tv.resized_crop(pixels.float(), 3, 5, 23, 30, [size, size], antialias=False)
        ours = dino.crop_pixels(pixels.permute(0, 2, 3, 1), box, size)
        torch.testing.assert_close(ours, expected, rtol=0, atol=0.01)
        whole = dino.crop_pixels(pixels.permute(0, 2, 3, 1), torch.tensor([[0, 0, 1, 1]] * 2), size)
        torch.testing.assert_close(whole, tv.resize(pixels.float(), [size, size], antialias=False), rtol=0, atol=0.01)


def pictures(folder, n=24):
    """n images of 40 x 32 px as files and as an array, blocks with dark and bright parts: two tables."""
    blocks = tv.resize(uniform(n, 3, 4, 5), [32, 40], antialias=True).mul(255).byte().permute(0, 2, 3, 1).numpy()
    np.save(folder / "all.npy", blocks)
    for i, image in enumerate(blocks):
        Image.fromarray(image).save(folder / f"{i}.png")
    for name, field in ("files", "{}.png"), ("array", "all.npy:{}"):
        (folder / f"{name}.tsv").write_text("image\n" + "".join(f"{field.format(i)}\n" for i in range(n)))
    return [dino.Table(folder / f"{name}.tsv") for name in ("files", "array")]


def views_of(table, sizes, n=24):
    """A batch with all rows of a table in order, and the table's pixels or None."""
    views, pixels = dino.Views([table], sizes, [(0.3, 1)] * len(sizes), 4 / 3, 10**6, 5), dino.load_pixels([table])
    views.pixel_offsets = None if "files" in table.path.name else np.array([0])
    return views.__getitems__(np.array([[0, i, 2] for i in range(n)])), pixels


def test_crops_of_files_are_torchvisions(tmp_path, monkeypatch):
    """The same to the bit where the crop is the image; else Pillow's filter also sees what is next to the crop."""
    table, n = pictures(tmp_path)[0], 5
    for left, top, right, bottom in (0, 0, 40, 32), (6, 4, 38, 28), (20, 10, 30, 20):
        box = np.array([[left / 40, top / 32, right / 40, bottom / 32]])
        monkeypatch.setattr(dino, "crop_boxes", lambda *args, box=box: box)
        crops = views_of(table, [28, 16], n)[0]["crops"]
        for size, ours in zip((28, 16), crops, strict=True):
            edge = 0 if right - left == 40 else 2 * size // min(right - left, bottom - top, size)
            for i in range(n):
                image = Image.open(tmp_path / f"{i}.png")
                args = top, left, bottom - top, right - left, [size, size]
                expected = tv.pil_to_tensor(tv.resized_crop(image, *args, interpolation=tv.InterpolationMode.BICUBIC))
                inside = (..., slice(edge, size - edge), slice(edge, size - edge))
                assert (ours[i][inside].int() - expected[inside].int()).abs().max() <= (edge > 0)


@pytest.mark.parametrize("source", [0, 1], ids=["files", "array"])
def test_dino_views_are_torchvisions(tmp_path, source):
    """Colours in the drawn order, flips, and each view's own probabilities, as make_crops gives them to a step."""
    sizes, seen, n = [28, 28, 16], np.zeros(5), 24
    batch, pixels = views_of(pictures(tmp_path)[source], sizes)
    pixels = pixels if source else None
    large, small = (x.unflatten(0, (-1, n)) / 255 for x in dino.make_crops(batch, pixels, sizes, "dino", "cpu"))
    for view, ours in enumerate([*large, *small]):
        if source:
            crops = dino.crop_pixels(pixels[batch["pixel_rows"]], batch["boxes"][view], sizes[view])
        else:
            crops = batch["crops"][view]
        for i, d in enumerate(batch["draws"][view].tolist()):
            ops = [
                lambda y, d=d: tv.adjust_brightness(y, 0.6 + 0.8 * d[2]),
                lambda y, d=d: tv.adjust_contrast(y, 0.6 + 0.8 * d[3]),
                lambda y, d=d: tv.adjust_saturation(y, 0.8 + 0.4 * d[4]),
                lambda y, d=d: tv.adjust_hue(y, 0.2 * d[5] - 0.1),
            ]
            is_on = d[1] < 0.8, d[10] < 0.2, d[11] < (1.0, 0.1, 0.5)[view], d[13] < (0.0, 0.2, 0.0)[view], d[0] < 0.5
            y, seen = crops[i].float() / 255, seen + is_on
            for op in np.argsort(d[6:10]) if is_on[0] else []:
                y = ops[op](y)
            y = tv.rgb_to_grayscale(y, 3) if is_on[1] else y
            y = tv.gaussian_blur(y, [13, 13], [0.1 + 1.9 * d[12]]) if is_on[2] else y
            y = tv.solarize(y, 0.5) if is_on[3] else y
            y = tv.horizontal_flip(y) if is_on[4] else y
            close = (ours[i] - y).abs() < 1e-4
            assert close.float().mean() > (0.99 if is_on[3] else 0.9999), (view, i)  # solarising cuts at 0.5
    assert seen.min() > 0 and seen.max() < 3 * n


@pytest.mark.parametrize("kind", ["dino", "colour"])
def test_colours_do_not_depend_on_the_batch(kind):
    x, draws = uniform(12, 3, 16, 16), uniform(12, dino.N_DRAWS, seed=2)

    def augment(rows, view):
        if kind == "colour":
            return dino.augment_colour(x[rows].clone(), draws[rows])
        blur, solarise = ([1.0, 0.1], [0.0, 0.2]) if view is None else ([[1.0], [0.1]][view], [[0.0], [0.2]][view])
        return dino.augment_dino(x[rows].clone(), draws[rows], blur, solarise)

    together = augment(slice(None), None)
    assert torch.equal(together, augment(slice(None), None)) and not torch.equal(together, x)
    for i in range(12):
        torch.testing.assert_close(together[i : i + 1], augment(slice(i, i + 1), i // 6), rtol=0, atol=2e-6)


def test_each_view_of_each_epoch_is_drawn_anew(tmp_path):
    """Crops and colours: by seed, view, row and epoch, no two the same."""
    pictures(tmp_path)
    table, examples = dino.Table(tmp_path / "array.tsv"), np.array([[0, 3, 0], [0, 3, 1], [0, 4, 0]])
    boxes, draws = [], []
    for seed in 0, 1:
        views = dino.Views([table], [16, 16, 8], [(0.3, 1)] * 3, 4 / 3, 10**6, seed)
        views.pixel_offsets = np.array([0])
        batch = views.__getitems__(examples)
        boxes, draws = [*boxes, *batch["boxes"].flatten(0, 1).tolist()], [*draws, *batch["draws"].flatten().tolist()]
    assert len(set(map(tuple, boxes))) == 2 * 3 * 3 and len(set(draws)) > 0.99 * len(draws) == 0.99 * 18 * dino.N_DRAWS


@pytest.mark.parametrize("kind", ["file", "array"])
def test_each_view_has_its_area_and_all_the_aspect(kind, tmp_path, monkeypatch):
    """In pixels; of a file that is wider than high too."""
    width, height, boxes, resize = 60 if kind == "file" else 50, 50, [], Image.Image.resize
    Image.new("RGB", (width, height)).save(tmp_path / "a.png")
    (tmp_path / "t.tsv").write_text("image\na.png\n")
    monkeypatch.setattr(Image.Image, "resize", lambda *args: boxes.append(args[3]) or resize(*args))
    scales = [(0.4, 0.7), (0.4, 0.7), (0.05, 0.14)]
    views = dino.Views([dino.Table(tmp_path / "t.tsv")], [8, 8, 4], scales, 1.15, 10**6, 0)
    views.pixel_offsets = None if kind == "file" else np.array([0])
    batch = views.__getitems__(np.array([[0, 0, i] for i in range(200)]))
    if kind == "array":
        boxes = batch["boxes"].numpy().transpose(1, 0, 2).reshape(-1, 4) * [width, height, width, height]
    left, top, right, bottom = np.array(boxes).reshape(200, 3, 4).transpose(2, 1, 0)
    ratio, area = (right - left) / (bottom - top), (right - left) * (bottom - top) / (width * height)
    for v, (low, high) in enumerate(scales):
        assert low <= area[v].min() + 1e-6 < low + 0.03 and high - 0.03 < area[v].max() - 1e-6 <= high
        assert 1 / 1.15 <= ratio[v].min() + 1e-6 < 0.89 and 1.13 < ratio[v].max() - 1e-6 <= 1.15


def test_synthetic_colours_by_hand():
    """One image at a time, in float64: what is left are the deviations of the noise."""
    x, draws = uniform(200, 3, 8, 8), uniform(200, dino.N_DRAWS, seed=3)
    noise, seen = [], np.zeros(4)
    for image, d, ours in zip(x.double().numpy(), draws.double().numpy(), dino.augment_colour(x, draws).numpy()):
        is_on = d[1] < 0.6, d[5] < 0.3, d[12] < 0.25, d[0] < 0.5
        y, seen = image[np.argsort(d[2:5])] if is_on[0] else image, seen + is_on
        y = 1 - y if is_on[1] else y
        y = y * np.exp(-0.4 + 0.8 * d[6:9])[:, None, None] + (-0.13 + 0.26 * d[9:12])[:, None, None]
        y = np.broadcast_to(np.tensordot([0.2989, 0.587, 0.114], y, 1), y.shape) if is_on[2] else y
        noise.append(ours - (y[:, :, ::-1] if is_on[3] else y))
    assert np.abs(noise).max() < 0.12 and 0.019 < np.std(noise) < 0.021 and abs(np.mean(noise)) < 0.002
    assert seen.min() > 30 and seen.max() < 150


def test_synthetic_colours_stay_in_range():
    x, draws = uniform(400, 3, 8, 8), uniform(400, dino.N_DRAWS, seed=3)
    y = dino.augment_colour(x, draws)
    assert -0.13 - 0.12 < y.min() and y.max() < math.exp(0.4) + 0.13 + 0.12  # noise: 6 sigma
    is_grey = ((y - y.mean(1, keepdim=True)).abs().amax((1, 2, 3)) < 0.15) & (draws[:, 12] < 0.25)
    assert bool((is_grey == (draws[:, 12] < 0.25)).all())


def test_files_and_arrays_give_the_same_views(tmp_path):
    """Two ramps tell where a crop was taken from."""
    ramp = np.arange(64, dtype=np.uint8) * 4
    image = np.stack([np.tile(ramp, (64, 1)), np.tile(ramp[:, None], (1, 64)), np.zeros((64, 64), np.uint8)], 2)
    Image.fromarray(image).save(tmp_path / "0.png")
    np.save(tmp_path / "all.npy", image[None])
    (tmp_path / "files.tsv").write_text("image\n" + "0.png\n" * 6)
    (tmp_path / "array.tsv").write_text("image\n" + "all.npy:0\n" * 6)
    examples, sizes, scales = np.array([[0, i, 2] for i in range(6)]), [28, 28, 16], [(0.3, 1), (0.3, 1), (0.1, 0.3)]
    crops, batches = [], []
    for name in "files", "array":
        tables = [dino.Table(tmp_path / f"{name}.tsv")]
        views, pixels = dino.Views(tables, sizes, scales, 4 / 3, 10**6, 5), dino.load_pixels(tables)
        views.pixel_offsets = None if pixels is None else np.array([0])
        batch = views.__getitems__(examples)
        batches.append(batch)
        if pixels is None:
            crops.append([x.float() for x in batch["crops"]])
        else:
            images = pixels[batch["pixel_rows"]]
            crops.append([dino.crop_pixels(images, b, s) for b, s in zip(batch["boxes"], sizes, strict=True)])
    assert "crops" in batches[0] and "boxes" in batches[1]
    assert torch.equal(batches[0]["draws"], batches[1]["draws"]) and batches[0]["draws"].shape == (3, 6, dino.N_DRAWS)
    for a, b in zip(*crops, strict=True):
        assert a.shape == b.shape and (a - b).abs()[:, :, 2:-2, 2:-2].max() < 6 and a.mean((1, 2, 3)).std() > 1


def cubic_matrix(n_in, n_out):
    """Keys' cubic convolution with a = -0.75, pixel centres at halves, edges repeated."""
    matrix, a = np.zeros((n_out, n_in)), -0.75
    for o in range(n_out):
        at = (o + 0.5) * n_in / n_out - 0.5
        for i in range(math.floor(at) - 1, math.floor(at) + 3):
            t = abs(at - i)
            w = (a + 2) * t**3 - (a + 3) * t**2 + 1 if t <= 1 else a * (t**3 - 5 * t**2 + 8 * t - 4)
            matrix[o, min(max(i, 0), n_in - 1)] += w
    return matrix


def test_positions_of_another_grid():
    positions = torch.randn(1 + 14**2, 5, generator=torch.Generator().manual_seed(0))
    assert torch.equal(dino.resize_positions(positions, 14, 14), positions)
    new = dino.resize_positions(positions, 6, 7)
    grid = positions[1:].reshape(14, 14, 5).numpy()
    expected = np.einsum("hi,wj,ijd->hwd", cubic_matrix(14, 6), cubic_matrix(14, 7), grid)
    assert torch.equal(new[0], positions[0])
    np.testing.assert_allclose(new[1:].reshape(6, 7, 5), expected, atol=1e-5)


def vit_weights():
    """The published key names of DINO's ViT-S/16."""
    D, shapes = 384, {"cls_token": (1, 1, 384), "pos_embed": (1, 197, 384)}
    shapes |= {"patch_embed.proj.weight": (D, 3, 16, 16), "patch_embed.proj.bias": (D,)}
    shapes |= {"norm.weight": (D,), "norm.bias": (D,)}
    for i in range(12):
        for name, shape in {
            "norm1.weight": (D,),
            "norm1.bias": (D,),
            "attn.qkv.weight": (3 * D, D),
            "attn.qkv.bias": (3 * D,),
            "attn.proj.weight": (D, D),
            "attn.proj.bias": (D,),
            "norm2.weight": (D,),
            "norm2.bias": (D,),
            "mlp.fc1.weight": (4 * D, D),
            "mlp.fc1.bias": (4 * D,),
            "mlp.fc2.weight": (D, 4 * D),
            "mlp.fc2.bias": (D,),
        }.items():
            shapes[f"blocks.{i}.{name}"] = shape
    return {name: 0.02 * uniform(*shape, seed=k) for k, (name, shape) in enumerate(shapes.items())}


def network(arch):
    return dino.Network(arch, 16, 8, 4, False).eval()


def test_public_vit_weights_load(tmp_path):
    weights, model = vit_weights(), network("ViT-S-16")
    flags = argparse.Namespace(arch="vit_small")  # as the public code saves them
    wrapped = {f"module.backbone.{k}": v for k, v in weights.items()} | {"module.head.mlp.0.weight": torch.ones(2, 2)}
    for name, content in {"bare": weights, "full": {"teacher": wrapped, "student": {}, "args": flags}}.items():
        torch.save(content, tmp_path / f"{name}.pt")
        torch.nn.init.zeros_(model.visual.pos_embed)
        dino.load_backbone(model, str(tmp_path / f"{name}.pt"))
        own = model.visual.state_dict()
        assert own.keys() == weights.keys() and all(torch.equal(own[k], weights[k]) for k in own)
    with pytest.raises(SystemExit, match="does not fit the model"):
        dino.load_backbone(network("tiny"), str(tmp_path / "bare.pt"))
    with torch.no_grad():
        a, b = (model.visual(uniform(2, 3, size, size)) for size in (224, 96))
        logits, embed = model([uniform(4, 3, 224, 224) * 255, uniform(2, 3, 96, 96) * 255])
    assert a.shape == b.shape == (2, 384) and bool(a.isfinite().all())
    assert logits.shape == (6, 4) and embed.shape == (6, 384)


def test_vit_is_torchvisions():
    """torchvision's names for the same parameters; it computes all tokens of the last block."""
    tower = torchvision.models.VisionTransformer(
        224, 16, num_layers=12, num_heads=6, hidden_dim=384, mlp_dim=1536
    ).eval()
    tower.heads, weights = torch.nn.Identity(), {k: 4 * v - 0.04 for k, v in vit_weights().items()}
    names = {"cls_token": "class_token", "pos_embed": "encoder.pos_embedding", "patch_embed.proj": "conv_proj"}
    names |= {"blocks.": "encoder.layers.encoder_layer_", "norm1": "ln_1", "norm2": "ln_2", "mlp.fc1": "mlp.0"}
    names |= {"mlp.fc2": "mlp.3", "attn.qkv.": "self_attention.in_proj_", "attn.proj": "self_attention.out_proj"}

    def renamed(key):
        for ours, theirs in names.items():
            key = key.replace(ours, theirs)
        return f"encoder.ln.{key[5:]}" if key.startswith("norm.") else key

    tower.load_state_dict({renamed(key): value for key, value in weights.items()})
    model = network("ViT-S-16").visual
    model.load_state_dict(weights)
    images = uniform(2, 3, 224, 224)
    pair = [net(images) for net in (model, tower)]
    assert pair[0].std() > 0.01
    torch.testing.assert_close(*pair, rtol=1e-4, atol=1e-5)
    for y in pair:
        (y * uniform(2, 384, seed=1)).sum().backward()
    expected = dict(tower.named_parameters())
    for key, p in model.named_parameters():
        theirs = expected[renamed(key)].grad
        assert (p.grad - theirs).norm() <= 1e-3 * theirs.norm() + 1e-6, key


def test_clip_rn50_weights_load(tmp_path):
    torch.manual_seed(0)
    tower, model = clip.ModifiedResNet(1024, 224).eval(), network("RN50")
    weights = {f"visual.{k}": v for k, v in tower.state_dict().items()} | {"logit_scale": torch.ones(())}
    torch.save({"state_dict": weights}, tmp_path / "clip.pt")
    dino.load_backbone(model, str(tmp_path / "clip.pt"))
    with torch.no_grad():
        image = uniform(1, 3, 224, 224)
        torch.testing.assert_close(model.visual(image), tower(image), rtol=1e-5, atol=1e-6)
        assert model.visual(uniform(2, 3, 96, 96)).shape == (2, 1024)
        x, small = uniform(2, 2048, 3, 3), clip.AttentionPool2d(3, 2048, 32, 1024)  # the pool of a 96 px tower
        positions = dino.resize_positions(model.visual.attnpool.positional_embedding, 3, 3)
        small.load_state_dict(model.visual.attnpool.state_dict() | {"positional_embedding": positions})
        torch.testing.assert_close(model.visual.attnpool(x), small(x))
    model.visual.attnpool(x).sum().backward()
    assert bool(model.visual.attnpool.positional_embedding.grad.any())


def test_torchvision_resnet50_weights_load(tmp_path):
    tower, model = torchvision.models.resnet50(weights=None).eval(), network("resnet50")
    torch.save(tower.state_dict(), tmp_path / "resnet50.pt")
    dino.load_backbone(model, str(tmp_path / "resnet50.pt"))
    tower.fc = torch.nn.Identity()
    with torch.no_grad():
        for size in 224, 96:
            x = uniform(1, 3, size, size)
            torch.testing.assert_close(model.visual(x), tower(x), rtol=1e-5, atol=1e-5)


def features(n, d, seed):
    x = torch.randn(n, d, generator=torch.Generator().manual_seed(seed))
    return x, (x @ torch.randn(d, 5, generator=torch.Generator().manual_seed(9)) + x).argmax(1)


def test_knn_is_scikit_learns():
    (bank, labels), (queries, _) = features(300, 5, 0), features(1500, 5, 1)
    bank, queries = (torch.nn.functional.normalize(x, dim=1) for x in (bank, queries))
    ours = dino.knn_votes(bank, labels, queries, 5)
    oracle = KNeighborsClassifier(20, metric="cosine", weights=lambda d: np.exp(-d / 0.07)).fit(bank, labels)
    np.testing.assert_allclose(ours / ours.sum(1, keepdim=True), oracle.predict_proba(queries), atol=1e-4)
    few = dino.knn_votes(bank[:3], labels[:3], queries, 5)  # fewer than k images
    assert len(few) == 1500 and int((few > 0).sum(1).max()) <= 3


@pytest.mark.parametrize("decay", [1e-1, 1e-2, 1e-3])
def test_logistic_regression_is_scikit_learns(decay):
    x, labels = features(400, 5, 0)
    ones = torch.cat([x, torch.ones(400, 1)], 1)
    ours = dino.fit_logistic(ones, labels, 5, decay, None)
    oracle = LogisticRegression(C=1 / (400 * decay), tol=1e-10, max_iter=5000).fit(x.numpy(), labels.numpy())
    theirs = torch.cat([torch.from_numpy(oracle.coef_.T), torch.from_numpy(oracle.intercept_)[None]]).double()

    def objective(w):
        logits = ones.double() @ w.double()
        return float(torch.nn.functional.cross_entropy(logits, labels) + decay / 2 * w[:-1].double().square().sum())

    assert abs(objective(ours) / objective(theirs) - 1) < 1e-4


def test_probe_chooses_its_decay_on_held_out_rows():
    """Half the labels at random, as many columns as rows per class or more: the strongest generalises, though the
    weakest fits the rows to the last. Separable classes want a weaker one."""
    noise = torch.Generator().manual_seed(0)
    x, is_wrong, wrong = (f(*of, generator=noise) for f, of in ((torch.randn, (600, 200)), (torch.rand, (600,)),
                                                                (torch.randint, (0, 5, (600,)))))  # fmt: skip
    labels = torch.where(is_wrong < 0.5, wrong, x[:, :5].argmax(1))
    assert dino.linear_probe(torch.cat([x, torch.ones(600, 1)], 1), labels, 5, 0)[1] == 0.1
    x, labels = features(400, 5, 0)
    ones = torch.cat([x, torch.ones(400, 1)], 1)
    weights, decay = dino.linear_probe(ones, labels, 5, 0)
    assert decay < 0.1 and float(((ones @ weights).argmax(1) == labels).float().mean()) > 0.9
    assert torch.equal(weights, dino.fit_logistic(ones, labels, 5, decay, None))


def test_probe_tries_four_decays_from_strong_to_weak(monkeypatch):
    """On four fifths of the rows, each from the weights before; the strongest of equally good ones, on all rows, anew."""
    seen = []

    def fit(x, labels, C, decay, start):
        seen.append((len(x), decay, None if start is None else float(start[0, 0])))
        return torch.full((x.shape[1], C), float(len(seen)))

    monkeypatch.setattr(dino, "fit_logistic", fit)
    weights, decay = dino.linear_probe(torch.ones(50, 3), torch.zeros(50).long(), 2, 0)
    assert seen == [(40, 0.1, None), (40, 0.01, 1), (40, 0.001, 2), (40, 0.0001, 3), (50, 0.1, None)]
    assert decay == 0.1 and bool((weights == 5).all())
