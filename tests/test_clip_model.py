"""clip.py's towers and loaders: equal to open_clip in both directions, initialised as OpenAI's, files of every source."""

import argparse
import io
import math
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

import clip


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """The time of this file then does not depend on what else runs."""
    n_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(n_threads)


TEXT = dict(arch="transformer", width=512, vocab_size=49408, context_length=77)
N_PARAMETERS = {"RN50": 102_007_137, "ViT-B-32": 151_277_313, "ViT-B-16": 149_620_737}  # methods.md B
NO_WORLD = clip.World(Path("."), [], np.zeros(0, np.int64), {}, clip.TEMPLATES, None)


def small_clip(text_arch="transformer", activation="quick_gelu", merges=(), **text):
    text = dict(arch=text_arch, width=64, vocab_size=514 + len(merges), context_length=77, n_layers=2) | text
    torch.manual_seed(0)
    return clip.CLIP("tiny", 16, text, activation).eval()


def checkpoint_of(model, tokenizer=None):
    return clip.checkpoint_of(model, tokenizer, NO_WORLD, argparse.Namespace(seed=0), 7, None)


@torch.no_grad()
def perturb(model):
    """Make every gain, bias and running statistic matter: at its initial 0 or 1 an exchange would go unseen."""
    generator = torch.Generator().manual_seed(1)
    for name, tensor in model.state_dict().items():
        if name == "logit_scale" or not tensor.is_floating_point() or tensor.ndim > 1:
            continue
        if name.endswith(("running_var", "weight")):
            tensor.copy_(0.5 + torch.rand(tensor.shape, generator=generator))
        else:
            tensor.copy_(0.2 * torch.randn(tensor.shape, generator=generator))


def standardised(images):
    """What open_clip's towers get: its own constants, not those of clip.py."""
    from open_clip.constants import OPENAI_DATASET_MEAN, OPENAI_DATASET_STD

    mean, std = (torch.tensor(c)[:, None, None] for c in (OPENAI_DATASET_MEAN, OPENAI_DATASET_STD))
    return (images / 255 - mean) / std


def random_inputs():
    generator = torch.Generator().manual_seed(2)
    texts = torch.zeros(2, 77, dtype=torch.int64)
    for row, n in zip(texts, (9, 77)):  # one short text, one of full length
        row[:n] = torch.randint(1, 49406, (n,), generator=generator)
        row[0], row[n - 1] = 49406, 49407
    blocks = torch.randint(0, 256, (2, 3, 7, 7), generator=generator).to(
        torch.uint8
    )  # noise alone looks the same everywhere
    return blocks.repeat_interleave(32, 2).repeat_interleave(32, 3) ^ torch.randint(
        0, 64, (2, 3, 224, 224), generator=generator
    ).to(torch.uint8), texts


def assert_equal_features(ours, theirs):
    """To 1e-4 relative: both compute in fp32, in other orders. Rows must differ from one another to say anything."""
    assert ours.shape == theirs.shape and bool(ours.isfinite().all())
    assert ((ours - theirs).norm(dim=1) < 1e-4 * theirs.norm(dim=1)).all()
    assert (theirs[0] - theirs[1]).norm() > 0.02 * theirs[0].norm()


# ------------------------------------------------------------------------------ open_clip


@pytest.fixture(scope="module", params=["RN50", "ViT-B-32", "ViT-B-16"])
def saved(request, tmp_path_factory):
    """Our model with perturbed weights, its checkpoint file, and (mean, std) of its tensors as initialised."""
    pytest.importorskip("open_clip")
    torch.manual_seed(0)
    model = clip.CLIP(request.param, clip.ARCHS[request.param]["embed_dim"], dict(TEXT), "gelu").eval()
    initial = {
        k: (float(v.mean()), float(v.std(correction=0))) for k, v in model.state_dict().items() if v.is_floating_point()
    }
    perturb(model)
    if request.param == "RN50":  # running statistics that fit, or all images give nearly the same features
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.momentum = 0.95
        with torch.no_grad():
            model.train().encode_image(random_inputs()[0])
        model.eval()
    path = tmp_path_factory.mktemp("model") / "checkpoint.pt"
    torch.save(checkpoint_of(model), path)
    yield model, path, initial
    path.unlink()  # 0.6 GB


def with_activation(model, activation):
    for block in model.modules():
        if isinstance(block, clip.ResidualAttentionBlock):
            block.mlp.gelu = clip.QuickGELU() if activation == "quick_gelu" else nn.GELU()
    return model


@torch.no_grad()
def test_our_file_loads_in_open_clip_with_equal_features(saved):
    """Also in the -quickgelu variant, built without memory of its own: only its activation can differ."""
    import open_clip
    from open_clip.model import CLIP

    model, path, _ = saved
    theirs = {"gelu": open_clip.create_model(model.arch, pretrained=str(path)).eval()}  # strict: open_clip's default
    assert torch.equal(theirs["gelu"].logit_scale, model.logit_scale)
    with torch.device("meta"):
        theirs["quick_gelu"] = CLIP(**open_clip.get_model_config(model.arch + "-quickgelu")).eval()
    theirs["quick_gelu"].load_state_dict(theirs["gelu"].state_dict(), assign=True)
    theirs["quick_gelu"].attn_mask = theirs["gelu"].attn_mask
    images, texts = random_inputs()
    features = []
    for activation, reference in theirs.items():
        with_activation(model, activation)
        features.append((model.encode_image(images), model.encode_text(texts)))
        assert_equal_features(features[-1][0], reference.encode_image(standardised(images.float())))
        assert_equal_features(features[-1][1], reference.encode_text(texts))
    image, text = ((a - b).norm() / a.norm() for a, b in zip(*features))
    assert text > 1e-3
    assert image == 0 if model.arch == "RN50" else image > 1e-3  # RN50's convolutions use ReLU


@pytest.mark.parametrize("activation", ["gelu", "quick_gelu"])
@torch.no_grad()
def test_open_clip_weights_load_here_with_equal_features(activation, tmp_path):
    pytest.importorskip("open_clip")
    from open_clip.model import CLIP

    vision = dict(image_size=224, layers=12, width=384, patch_size=16)  # open_clip's ViT-S-16, with a small text tower
    text = dict(context_length=77, vocab_size=49408, width=64, heads=1, layers=3)
    torch.manual_seed(3)
    theirs = CLIP(384, vision, text, quick_gelu=activation == "quick_gelu").eval()
    perturb(theirs)
    path = tmp_path / "epoch_1.pt"  # as open_clip's trainer writes it
    torch.save(
        {"epoch": 1, "name": "run", "state_dict": {f"module.{k}": v for k, v in theirs.state_dict().items()}}, path
    )
    loaded = clip.load_weights(str(path))
    text, embed_dim = clip.text_config(loaded["state_dict"], str(path))
    assert (text, embed_dim) == (
        dict(arch="transformer", width=64, vocab_size=49408, context_length=77, n_layers=3),
        384,
    )
    model = clip.CLIP("ViT-S-16", embed_dim, text, clip.pick_activation(activation, loaded, str(path))).eval()
    clip.load_state(model, loaded["state_dict"], str(path))
    images, texts = random_inputs()
    assert_equal_features(model.encode_image(images), theirs.encode_image(standardised(images.float())))
    assert_equal_features(model.encode_text(texts), theirs.encode_text(texts))


def test_parameter_counts(saved):
    model, _, _ = saved
    assert sum(p.numel() for p in model.parameters()) == N_PARAMETERS[model.arch]
    text = sum(p.numel() for p in model.text_parameters().values())
    visual = sum(p.numel() for p in model.visual.parameters())
    assert text + visual + 1 == N_PARAMETERS[model.arch]  # 1: logit_scale


def test_initial_weights(saved):
    """Means and deviations as in openai/CLIP (methods.md B); 2 %: the sampling error of 5e4 and more numbers is below 1 %."""
    model, _, initial = saved
    width, vision = 512, 768
    expected = {"token_embedding.weight": 0.02, "positional_embedding": 0.01, "text_projection": width**-0.5}
    for i in (0, 11):
        block = f"transformer.resblocks.{i}."
        expected |= {block + "attn.in_proj_weight": 0.04419, block + "attn.out_proj.weight": 0.009021}
        expected |= {block + "mlp.c_fc.weight": 0.03125, block + "mlp.c_proj.weight": 0.009021}
    constants = {
        "logit_scale": math.log(1 / 0.07),
        "transformer.resblocks.3.ln_1.weight": 1,
        "transformer.resblocks.3.attn.in_proj_bias": 0,
        "transformer.resblocks.3.attn.out_proj.bias": 0,
    }
    if model.arch == "RN50":
        expected |= {f"visual.attnpool.{k}.weight": 2048**-0.5 for k in ("q_proj", "k_proj", "v_proj", "c_proj")}
        expected |= {"visual.attnpool.positional_embedding": 2048**-0.5}
        gains = [k for k in initial if k.startswith("visual.layer") and k.endswith("bn3.weight")]
        assert len(gains) == 16
        constants |= dict.fromkeys(gains, 0) | {
            "visual.bn3.weight": 1,
            "visual.layer1.0.bn2.weight": 1,
            "visual.layer2.0.downsample.1.weight": 1,
        }
    else:
        expected |= {"visual.positional_embedding": vision**-0.5, "visual.proj": vision**-0.5}
        block = "visual.transformer.resblocks.5."  # torch's defaults: Xavier and Kaiming uniform laws
        expected |= {
            block + "attn.in_proj_weight": (2 * vision) ** -0.5,
            block + "attn.out_proj.weight": (3 * vision) ** -0.5,
        }
        expected |= {
            block + "mlp.c_fc.weight": (3 * vision) ** -0.5,
            block + "mlp.c_proj.weight": (12 * vision) ** -0.5,
        }
        assert initial["visual.class_embedding"][1] == pytest.approx(vision**-0.5, rel=0.1)  # 768 numbers only
        constants |= {"visual.ln_pre.weight": 1, block + "attn.in_proj_bias": 0, block + "attn.out_proj.bias": 0}
    for name, std in expected.items():
        mean, deviation = initial[name]
        assert deviation == pytest.approx(std, rel=0.02), name
        assert abs(mean) < 0.02 * std, name
    for name, value in constants.items():
        assert initial[name] == (pytest.approx(value), 0), name


# ------------------------------------------------------------------------------ loaders


def scripted(model, extra):
    """A TorchScript archive in the layout of OpenAI's: fp16 weights, three integers beside them."""
    root = nn.Module()
    for name, tensor in model.state_dict().items():
        *path, last = name.split(".")
        module = root
        for part in path:
            if part not in module._modules:
                module.add_module(part, nn.Module())
            module = module._modules[part]
        is_parameter = tensor.is_floating_point() and "running" not in last
        module.register_parameter(last, nn.Parameter(tensor.half())) if is_parameter else module.register_buffer(
            last, tensor
        )
    for name, value in extra.items():
        root.register_buffer(name, torch.tensor(value))
    root.forward = lambda x: x + 1
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch.jit is deprecated; OpenAI's files are what they are
        return torch.jit.trace(root, torch.zeros(1), check_trace=False)


def write_as(source, model, folder):
    """One file of each kind that load_weights reads; returns its path and the weights expected from it."""
    state, path = {k: v.clone() for k, v in model.state_dict().items()}, folder / "weights.pt"
    if source == "ours":
        torch.save(checkpoint_of(model), path)
    elif source == "open_clip":
        torch.save({"epoch": 3, "state_dict": {f"module.{k}": v for k, v in state.items()}}, path)
    elif source == "compiled":
        torch.save({"state_dict": {f"_orig_mod.{k}": v for k, v in state.items()}}, path)
    elif source == "compiled in DDP":
        torch.save({"state_dict": {f"module._orig_mod.{k}": v for k, v in state.items()}}, path)
    elif source == "compiled tower":
        names = {
            k: k.replace("visual.", "visual._orig_mod.").replace("transformer.", "transformer._orig_mod.")
            for k in state
        }
        torch.save({"state_dict": {names[k]: v for k, v in state.items()}}, path)
    elif source == "bare":
        torch.save(state, path)
    elif source == "safetensors":
        path = path.with_suffix(".safetensors")
        pytest.importorskip("safetensors.torch").save_file(state, path)
    else:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            torch.jit.save(scripted(model, {"input_resolution": 32, "context_length": 77, "vocab_size": 514}), path)
        state = {k: v.half().float() if v.is_floating_point() and "running" not in k else v for k, v in state.items()}
    return str(path), state


@pytest.mark.parametrize(
    "source",
    ["ours", "open_clip", "compiled", "compiled in DDP", "compiled tower", "bare", "safetensors", "TorchScript"],
)
@torch.no_grad()
def test_load_weights_reads(source, tmp_path):
    model = small_clip()
    perturb(model)
    path, expected = write_as(source, model, tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        loaded = clip.load_weights(path)
    assert loaded["state_dict"].keys() == expected.keys()
    assert all(torch.equal(loaded["state_dict"][k], v.to(loaded["state_dict"][k].dtype)) for k, v in expected.items())
    assert loaded.get("activation") == ("quick_gelu" if source in ("ours", "TorchScript") else None)
    assert (loaded["arch"], loaded["step"]) == ("tiny", 7) if source == "ours" else "arch" not in loaded
    other = small_clip()
    clip.load_state(other, loaded["state_dict"], path)
    assert (
        torch.equal(other.text_projection, expected["text_projection"]) and other.text_projection.dtype == torch.float32
    )


def saved_bytes(content):
    file = io.BytesIO()
    torch.save(content, file)
    return file.getvalue()


GOOD = saved_bytes({"state_dict": {"a": torch.ones(100)}})
BROKEN = {
    "empty.pt": b"",
    "random.pt": np.random.default_rng(0).bytes(300),
    "text.pt": b"hello world\n" * 5,
    "pointer.pt": b"version https://git-lfs.github.com/spec/v1\noid sha256:ab\nsize 12\n",
    "page.pt": b"<html><body>404</body></html>",
    "pickle.pt": b"\x80\x02cposix\nsystem\nX\x04\x00\x00\x00true\x85R.",  # would run a command
    "cut.pt": GOOD[: len(GOOD) // 2],
    "spoilt.pt": GOOD.replace(b"PK\x01\x02", b"PKxx"),  # the directory of the zip archive
    "tensor.pt": saved_bytes(torch.ones(3)),
    "list.pt": saved_bytes([1, 2]),
    "empty.safetensors": b"",
    "random.safetensors": np.random.default_rng(1).bytes(300),
}


@pytest.mark.parametrize("name", BROKEN)
def test_load_weights_refuses_broken_files_by_name(name, tmp_path):
    (tmp_path / name).write_bytes(BROKEN[name])
    with pytest.raises(SystemExit) as error:
        clip.load_weights(str(tmp_path / name))
    assert str(tmp_path / name) in str(error.value) and "no such" not in str(error.value)


def test_load_weights_of_a_missing_file(tmp_path):
    with pytest.raises(SystemExit, match=r"clip\.pt: no such checkpoint"):
        clip.load_weights(str(tmp_path / "clip.pt"))
    with pytest.raises(SystemExit, match="no such checkpoint"):
        clip.load_weights(str(tmp_path))


def test_load_state_mismatch_lists_names_and_shapes():
    model = small_clip()
    state = model.state_dict()
    state["text_proj"] = state.pop("text_projection")
    state["positional_embedding"] = torch.zeros(5, 64)
    before = model.token_embedding.weight.clone()
    state["token_embedding.weight"] = before + 1
    with pytest.raises(SystemExit) as error:
        clip.load_state(model, state, "some/file.pt")
    for words in (
        "some/file.pt",
        "missing ['text_projection']",
        "unexpected ['text_proj']",
        "positional_embedding (5, 64) for (77, 64)",
    ):
        assert words in str(error.value)
    assert torch.equal(model.token_embedding.weight, before)  # nothing was loaded
    with pytest.raises(SystemExit, match=r"some/file.pt: values that are not finite in \['ln_final.bias'\]"):
        clip.load_state(model, model.state_dict() | {"ln_final.bias": torch.full((64,), math.inf)}, "some/file.pt")


def test_pick_activation():
    transformer, cbow = {"state_dict": small_clip().state_dict()}, {"state_dict": small_clip("cbow").state_dict()}
    with pytest.raises(SystemExit, match=r"x\.pt does not say its activation: pass --activation quick_gelu"):
        clip.pick_activation("auto", transformer, "x.pt")
    with pytest.raises(SystemExit, match=r"x\.pt was trained with quick_gelu, --activation says gelu"):
        clip.pick_activation("gelu", transformer | {"activation": "quick_gelu"}, "x.pt")
    for flag, stored, expected in [
        ("gelu", None, "gelu"),
        ("quick_gelu", None, "quick_gelu"),
        ("auto", "quick_gelu", "quick_gelu"),
        ("gelu", "gelu", "gelu"),
    ]:
        assert clip.pick_activation(flag, transformer | ({"activation": stored} if stored else {}), "x.pt") == expected
    assert clip.pick_activation("auto", cbow, "x.pt") == "gelu"  # nothing to mistake
    assert clip.pick_activation("quick_gelu", cbow | {"activation": "gelu"}, "x.pt") == "quick_gelu"  # of the images


def test_text_config_of_each_text_tower():
    for model, expected in [
        (
            small_clip(context_length=20),
            dict(arch="transformer", width=64, vocab_size=514, context_length=20, n_layers=2),
        ),
        (small_clip("cbow"), dict(arch="cbow", width=64, vocab_size=514, context_length=77)),
        (small_clip("embeddings"), dict(arch="embeddings", width=64)),
    ]:
        assert clip.text_config(model.state_dict(), "x.pt") == (expected, 16)
    with pytest.raises(SystemExit, match="^x.pt: no text tower"):
        clip.text_config({"visual.conv1.weight": torch.zeros(1)}, "x.pt")
    with pytest.raises(SystemExit, match="^x.pt: .* no matrices"):
        clip.text_config({"token_embedding.weight": torch.zeros(1), "text_projection": torch.zeros(1, 1)}, "x.pt")


@torch.no_grad()
def test_export_rebuilds_model_and_tokenizer(tmp_path):
    merges = clip.train_bpe(["a cat and a hat"] * 3, 8)
    model, path = small_clip(activation="quick_gelu", merges=merges), tmp_path / "clip.pt"
    torch.save(checkpoint_of(model, clip.Tokenizer(merges)), path)
    again, tokenizer, loaded = clip.build_model(
        clip.parse_args(["--eval-only", str(path), "--arch", "RN50"]), tmp_path, [], 0
    )
    assert (again.arch, again.activation, again.embed_dim, loaded["step"]) == ("tiny", "quick_gelu", 16, 7)
    texts, images = tokenizer(["a cat", "hats"]), torch.randint(0, 256, (2, 3, 32, 32), dtype=torch.uint8)
    assert torch.equal(again.eval().encode_text(texts), model.encode_text(texts))
    assert torch.equal(again.encode_image(images), model.encode_image(images))
    (tmp_path / "other.txt").write_text("version\na b\n")
    with pytest.raises(SystemExit, match=f"{514 + len(merges)} tokens, the merges make 515"):
        clip.build_model(
            clip.parse_args(["--eval-only", str(path), "--bpe", str(tmp_path / "other.txt")]), tmp_path, [], 0
        )


@torch.no_grad()
def test_initial_tiny_and_cbow():
    """Residual blocks start as their shortcuts; projections of unit inputs have unit variance."""
    model, x = clip.CLIP("tiny", 64, dict(arch="cbow", width=128, vocab_size=600), "gelu"), torch.rand(4, 32, 8, 8)
    for block in model.visual.layers:
        shortcut = x if block.downsample is None else block.downsample(x)
        assert torch.equal(block(x), shortcut.relu())
        x = torch.rand(4, shortcut.shape[1], 8, 8)
    assert float(model.text_projection.std()) == pytest.approx(256**-0.5, rel=0.02)
    assert float(model.token_embedding.weight.std()) == pytest.approx(0.02, rel=0.02)
    assert float(model.logit_scale.exp()) == pytest.approx(1 / 0.07)


def test_captions_are_cut_to_what_the_tower_holds(tmp_path):
    """Loaded weights may have fewer positions than 77: as many tokens are made, the last one the end token."""
    torch.save(checkpoint_of(small_clip(context_length=12), clip.Tokenizer([])), tmp_path / "clip.pt")
    args = clip.parse_args(["--init", str(tmp_path / "clip.pt")])
    model, tokenizer, _ = clip.build_model(args, tmp_path, [], 0)
    tokens = tokenizer(["a hat " * 20, "a"])
    assert tokens.shape == (2, 12) and tokens[0, -1] == 513 and bool(model.encode_text(tokens).isfinite().all())


def test_merges_are_learned_from_the_captions(tmp_path, monkeypatch):
    """Of the first epoch and all sets, but 200,000 rows of each at most; 8,192 merges at most."""
    class Said:
        def __init__(self, name, n):
            self.name, self.table = name, range(n)

        def __call__(self, row, epoch):
            return f"{self.name}{row} {epoch}"

    seen, sets = [], [Said("a", 3), Said("b", 200_003)]
    monkeypatch.setattr(clip, "train_bpe", lambda texts, n: seen.append((list(texts), n)) or ["a b"])
    _, tokenizer, _ = clip.build_model(clip.parse_args([]), tmp_path, sets, 0)
    assert seen == [([f"a{i} 0" for i in range(3)] + [f"b{i} 0" for i in range(200_000)], 8192)]
    assert tokenizer.merges == ["a b"]


# ------------------------------------------------------------------------------ text towers


@pytest.mark.parametrize("text_arch", ["transformer", "cbow"])
@torch.no_grad()
def test_texts_cut_to_the_longest_are_exact(text_arch):
    model = small_clip(text_arch).double()
    perturb(model)
    texts = clip.Tokenizer([])(["a cat", "", "an owl!! sat", "!"])
    assert texts.shape[1] < 20
    padded = nn.functional.pad(texts, (0, 77 - texts.shape[1]))
    whole, cut = model.encode_text(padded), model.encode_text(texts)
    torch.testing.assert_close(cut, whole, rtol=1e-12, atol=1e-12)  # float64: only the order of sums differs
    alone = torch.cat([model.encode_text(clip.Tokenizer([])([text])) for text in ("a cat", "", "an owl!! sat", "!")])
    torch.testing.assert_close(alone, whole, rtol=1e-12, atol=1e-12)
    junk = padded.masked_fill(torch.arange(77) > padded.argmax(1, keepdim=True), 5)  # what follows the end token
    torch.testing.assert_close(model.encode_text(junk), whole, rtol=1e-12, atol=1e-12)


def test_cbow_is_the_mean_of_the_words_alone():
    model = small_clip("cbow")
    perturb(model)
    start, end = 512, 513
    texts = torch.tensor([[start, 7, 0, 9, end, 0, 0], [start, end, 0, 0, 0, 0, 0]])  # id 0 inside a text is "!"
    table = model.token_embedding.weight
    mean = torch.stack([table[[7, 0, 9]].mean(0), torch.zeros(64)])
    expected = nn.functional.gelu(model.text_hidden(model.ln_final(mean))) @ model.text_projection
    torch.testing.assert_close(model.encode_text(texts), expected)
    with torch.no_grad():
        before = model.encode_text(texts)
        table[[start, end]] += 3
        assert torch.equal(model.encode_text(texts), before)
    model.encode_text(texts).square().sum().backward()
    assert all(p.grad.isfinite().all() for p in model.text_parameters().values())
    rows = table.grad.abs().sum(1).nonzero().flatten().tolist()
    assert rows == [0, 7, 9]
    features = model(torch.zeros(2, 3, 32, 32, dtype=torch.uint8), texts)[1]
    assert features.isfinite().all() and torch.allclose(features.norm(dim=1), torch.ones(2))


def test_transformer_is_causal_and_reads_the_end_token():
    model = small_clip().double()
    perturb(model)
    texts = torch.tensor([[512, 5, 6, 7, 513, 0]])
    with torch.no_grad():
        before = model.encode_text(texts)
        assert not torch.allclose(model.encode_text(torch.tensor([[512, 6, 5, 7, 513, 0]])), before)  # order matters
    tokens = model.token_embedding(texts).detach().requires_grad_()
    hidden = model.transformer(tokens + model.positional_embedding[:6])
    grads = torch.autograd.grad(hidden[0, 2].sum(), tokens)[0][0].abs().sum(1)
    assert (grads[:3] > 0).all() and (grads[3:] == 0).all()


@torch.no_grad()
def test_given_embeddings():
    frozen, projected = small_clip(), small_clip("embeddings", width=24)
    rows = torch.randn(3, 24)
    assert torch.equal(frozen.encode_text(rows), rows)  # a frozen tower's own embeddings pass through
    assert projected.encode_text(rows).shape == (3, 16)
    assert list(projected.text_parameters()) == ["text_mlp.0.weight", "text_mlp.2.weight"]


# ------------------------------------------------------------------------------ batch norm


@pytest.mark.parametrize("sync", [True, False])
def test_batch_norm_is_torchs_in_one_process(sync):
    torch.manual_seed(0)
    ours, theirs = clip.BatchNorm2d(5), nn.BatchNorm2d(5)
    ours.sync = sync
    perturb(ours)
    theirs.load_state_dict(ours.state_dict())
    for training in (True, True, False):
        x = 3 * torch.randn(4, 5, 6, 7) + 1
        a, b = x.clone().requires_grad_(), x.clone().requires_grad_()
        out, expected = ours.train(training)(a), theirs.train(training)(b)
        assert torch.equal(out, expected)
        (out**3).sum().backward()
        (expected**3).sum().backward()
        assert torch.equal(a.grad, b.grad) and torch.equal(ours.weight.grad, theirs.weight.grad)
    assert all(torch.equal(v, theirs.state_dict()[k]) for k, v in ours.state_dict().items())
    assert ours.num_batches_tracked == 2


def test_statistics_over_processes_are_of_fp32(monkeypatch):
    """Of bf16 activations far from 0, whose mean in bf16 would be off by a percent of the deviation."""
    x = (3 + 0.1 * torch.randn(8, 5, 6, 6, generator=torch.Generator().manual_seed(0))).bfloat16()
    monkeypatch.setattr(clip.dist, "is_initialized", lambda: True)
    monkeypatch.setattr(clip.dist, "get_world_size", lambda: 2)
    monkeypatch.setattr(clip, "gather_rows", lambda rows: torch.cat([rows, rows]))  # the other has the same images
    norm = clip.BatchNorm2d(5)
    with torch.autocast("cpu", torch.bfloat16):
        out = norm(x)
    both = torch.cat([x, x]).double()
    torch.testing.assert_close(norm.running_mean.double(), 0.1 * both.mean((0, 2, 3)), rtol=1e-6, atol=0)
    torch.testing.assert_close(norm.running_var.double(), 0.9 + 0.1 * both.var((0, 2, 3)), rtol=1e-6, atol=0)
    expected = torch.nn.functional.batch_norm(both, None, None, training=True)[:8]
    assert out.dtype == torch.bfloat16 and torch.allclose(out.double(), expected, rtol=0.005, atol=0.002)


def test_class_vectors_of_given_embeddings_are_unit():
    """What the tower makes of them, normalised: a class does not gain by its vector's length."""
    model = clip.CLIP("tiny", 64, dict(arch="embeddings", width=8), "gelu")
    given = np.random.default_rng(0).normal(size=(5, 8)) * np.linspace(0.1, 9, 5)[:, None]
    world = clip.World("", [{"name": "a"}] * 5, np.ones(5, int), {}, [], given)
    expected = model.text_mlp(torch.from_numpy(given).float()).detach().double()
    expected /= expected.norm(dim=1, keepdim=True)
    torch.testing.assert_close(clip.class_prototypes(model, None, world, "cpu").double(), expected, rtol=0, atol=1e-6)
