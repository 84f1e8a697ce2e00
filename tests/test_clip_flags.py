"""clip.py's loop, flag by flag, against another one of ordinary torch; its evaluation against float64."""

import json
import math
import sys
import types

import numpy as np
import programs
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from programs import named

import clip

FLAGS = "--batch-size 32 --steps 5 --log-every 1 --warmup-steps 2 --precision fp32 --device cpu --workers 0".split()
PLAIN = dict(batch_size=32, steps=5, warmup_steps=2, precision="fp32", lr=3e-3, weight_decay=0.1, beta2=0.98, clip_grad=0,
             data="laionet:1", caption="{caption}", word_dropout=0.5, crop_scale=0.9, max_pixels=10**9, text_arch="cbow",
             activation="gelu", init="", text_init="", text_head="scratch", text_embeddings="", dup_captions="keep",
             directions="both", accumulate=1, seed=0, left_out=())  # fmt: skip


def loss_of(x, y, scale, ids, dup, directions):
    """Cross-entropy of the own pair among the batch, from unit features [B, D]; in the precision of the features."""
    same, losses = ids[:, None] == ids[None], {}
    u, v = torch.stack([x, y], 1).unbind(1)  # in memory as the program has them, since some CPUs sum by that
    for way, logits in {"image": scale * x @ v.T, "text": scale * y @ u.T}.items():
        if dup == "mask":
            logits = logits.masked_fill(same & ~torch.eye(len(x), dtype=torch.bool), -torch.inf)
        losses[way] = F.cross_entropy(logits, same.to(x.dtype) / same.sum(1) if dup == "soft" else torch.arange(len(x)))
    return losses.get(directions, (losses["image"] + losses["text"]) / 2)


def small(vocab_size, arch="cbow", activation="gelu"):
    text = dict(arch=arch, width=96 if arch == "embeddings" else 128, vocab_size=vocab_size, context_length=77)
    return clip.CLIP("tiny", 64, text, activation)


def slow_loop(root, **changes):
    """Log and model after all steps; anew but for towers, tokenizer, sampler, crops, dropped words, which have own tests."""
    s = types.SimpleNamespace(**PLAIN | changes)
    torch.manual_seed(s.seed)
    shares = {name: float(share) for name, share in (part.split(":") for part in s.data.split(","))}
    tables, classes = [clip.Table(root / name / "train.tsv") for name in shares], clip.read_classes(root)
    sizes, has_pixels, names = list(map(len, tables)), (root / "bpe.txt").is_file(), [row["name"] for row in classes]
    templates = clip.read_lines(s.caption[1:]) if s.caption.startswith("@") else [s.caption]
    captions = [clip.Captions(table, clip.read_labels(table, named(names)), templates, classes, s.seed) for table in tables]
    pixels = [torch.from_numpy(np.load(root / name / "train.npy")) for name in shares if has_pixels]
    own = () if has_pixels else clip.train_bpe([captions[0](row, 0) for row in range(sizes[0])], 8192)
    tokenizer = clip.Tokenizer(own or clip.read_merges(root / "bpe.txt"))
    model = small(tokenizer.vocab_size, "embeddings" if s.text_embeddings else s.text_arch, s.activation)
    if s.init or s.text_init:
        state, given = model.state_dict(), torch.load(s.init or s.text_init, weights_only=True)["state_dict"]
        model.load_state_dict(state | {k: given[k] for k in (state if s.init else model.text_parameters())})
    model.visual.to(memory_format=torch.channels_last)
    fixed = model.text_parameters() if s.text_head == "frozen" and not s.text_embeddings else ()
    params = sorted((p for name, p in model.named_parameters() if name not in fixed), key=lambda p: p.ndim < 2)
    groups = [dict(params=[p for p in params if (p.ndim < 2) == b], weight_decay=s.weight_decay * (1 - b)) for b in (0, 1)]
    optimizer = torch.optim.AdamW(groups, s.lr, (0.9, s.beta2), eps=1e-8, fused=True)
    dtype = dict(fp32=None, bf16=torch.bfloat16, fp16=torch.float16)[s.precision]
    scaler = torch.amp.GradScaler("cpu", enabled=s.precision == "fp16")
    shares, (B, seed, crop) = np.array(list(shares.values())), (s.batch_size, s.seed, s.crop_scale)
    sampler, lines, n_cut, n_bad = clip.Sampler(sizes, shares / shares.sum(), B, seed, 0, s.steps, 0, 1), [], 0, 0
    for step in range(s.steps):
        cosine = math.cos(math.pi * (step - s.warmup_steps) / (s.steps - s.warmup_steps))
        for group in optimizer.param_groups:
            group["lr"] = lr = s.lr * (step + 1) / s.warmup_steps if step < s.warmup_steps else s.lr / 2 * (1 + cosine)
        examples = sampler.batch(step)
        if has_pixels:
            boxes = torch.from_numpy(clip.crop_boxes((crop, 1), 4 / 3, np.ones(B), seed, 2, *examples.T)).float()
            images = clip.crop_pixels(torch.stack([pixels[i][row] for i, row, _ in examples]), boxes, 32)
        else:
            examples, images, bad = clip.read_crops(tables, examples, 32, 0, crop, s.max_pixels, seed)
            n_bad += len(bad)
        said = [captions[i](row, epoch) for i, row, epoch in examples]
        texts, n_cut = tokenizer(said), n_cut + sum(tokenizer.encode(text)[1] for text in said)
        if s.text_embeddings:
            texts = torch.from_numpy(np.load(s.text_embeddings)[examples[:, 1]])
        elif s.word_dropout and not fixed:
            texts = clip.drop_words(texts, tokenizer.ends_word, s.word_dropout, np.full(B, seed + 4), *examples.T)
        running = [(b, b.clone()) for name, b in model.named_buffers() if "running" in name]
        with torch.autocast("cpu", dtype, enabled=dtype is not None):
            x = torch.cat([model.encode_image(part).float() for part in images.chunk(s.accumulate)])
            y = torch.cat([model.encode_text(part).float() for part in texts.chunk(s.accumulate)])
            pair = F.normalize(x, dim=1), F.normalize(y, dim=1), model.logit_scale.exp()
        how = torch.tensor([said.index(text) for text in said]), s.dup_captions, s.directions
        loss = loss_of(*pair, *how)
        assert float(loss.detach()) == pytest.approx(float(loss_of(*(x.detach().double() for x in pair), *how)), rel=1e-5)
        scaler.scale(loss * math.nan if step in s.left_out else loss).backward()
        scaler.unscale_(optimizer)
        norm = torch.nn.utils.clip_grad_norm_(params, s.clip_grad or math.inf)
        is_in = bool(norm.isfinite())
        if is_in:
            scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        for buffer, before in () if is_in else running:
            buffer.copy_(before)
        model.logit_scale.data.clamp_(0, math.log(100))
        n, (loss, norm) = B * (step + 1), [float(x.detach()) if is_in else None for x in (loss, norm)]
        line = dict(step=step + 1, samples=n, epoch=round(n / sum(sizes), 4), loss=loss, grad_norm=norm, lr=lr, left_out=1 - is_in)
        lines.append(line | dict(bad_images=n_bad, truncated=n_cut / n, logit_scale=model.logit_scale.exp().item()))
    return lines, model


def check(root, out, *flags, is_exact=True, **changes):
    """Run the program and the slow loop: log and weights are equal, bit for bit or, if other sums are taken, nearly."""
    for name, value in changes.items():
        flags += (f"--{name.replace('_', '-')}", value) if name != "left_out" else ()
    programs.run_here(clip, "--root", root, *FLAGS, "--eval-sets", *flags, "--out", out)
    found = [{k: v for k, v in line.items() if k != "images_per_s"} for line in programs.log_of(out) if "loss" in line]
    (lines, model), state = slow_loop(root, **changes), programs.weights_of(out)
    for name, value in model.state_dict().items():  # the number of batches is not used, and counts those left out too
        is_equal = torch.equal(state[name], value) or "num_batches" in name
        assert is_equal or not is_exact and (state[name] - value).norm() <= 2e-3 * value.norm() + 1e-3, name
    assert found == (lines if is_exact else [pytest.approx(line, rel=1e-3) for line in lines])
    return lines


@pytest.mark.parametrize("flags, changes", [
    (["--eval-sets", "val", "--eval-every", 2], {}),
    ([], dict(lr=2e-3, weight_decay=2.0, beta2=0.9, clip_grad=0.5, warmup_steps=3)),
    ([], dict(seed=3, crop_scale=0.3, word_dropout=0.2, caption="{title} {tags}", data="laionet:2,incaps:1")),
    ([], dict(dup_captions="mask", directions="image", caption="a {class}")),
    ([], dict(dup_captions="soft", directions="text", caption="a {class}")),
    ([], dict(text_arch="transformer", activation="quick_gelu", word_dropout=0, batch_size=16, steps=3)),
    (["--epochs", 0.43, "--steps", 9], dict(precision="bf16")),  # 129 pairs of 300: the last of 5 steps is for one
    ([], dict(precision="fp16", batch_size=4, steps=3)),
    ([], dict(text_head="finetune", text_init="given.pt")),
    ([], dict(text_head="frozen", text_init="given.pt")),
    ([], dict(text_head="frozen", text_embeddings="rows.npy")),
    ([], dict(init="given.pt")),  # with a scale beyond the largest, 100
    ([], dict(lr=4.0, warmup_steps=0)),  # steps of the rate's size in the scale's logarithm: it is at its least, 1
], ids="plain optimizer data mask soft transformer epochs fp16 finetune frozen embeddings init scale".split())  # fmt: skip
def test_the_loop_is_plain_clip(flags, changes, world, tmp_path, monkeypatch):
    """Losses, norms, rates and weights of each step are those of ordinary torch to the last bit, whatever the flags."""
    monkeypatch.chdir(tmp_path)
    np.save("rows.npy", np.random.default_rng(0).normal(size=(300, 96)).astype(np.float32))
    merges = clip.read_merges(world / "bpe.txt")
    given = small(514 + len(merges)).state_dict() | {"logit_scale": torch.tensor(6.0)}
    torch.save({"state_dict": given, "arch": "tiny", "activation": "gelu", "bpe": "\n".join(merges)}, "given.pt")
    is_exact = changes.get("text_head") != "frozen" or "text_embeddings" in changes  # else captions go in other batches
    scales = [line["logit_scale"] for line in check(world, tmp_path, *flags, is_exact=is_exact, **changes)]
    assert (scales == [1] * 5) == ("lr" in changes and changes["lr"] == 4) and (scales[0] > 99) == ("init" in changes)


def test_the_loop_on_image_files(tmp_path):
    """Decoded by workers, the large ones replaced and counted, captions too long cut and counted, merges learned."""
    for i, size in enumerate([40] * 41 + [50] * 5):
        Image.fromarray((np.arange(size * 150) * (i + 3)).astype(np.uint8).reshape(size, 50, 3)).save(tmp_path / f"{i}.png")
    (tmp_path / "train.tsv").write_text("image\tcaption\n" + "".join(f"{i}.png\tpicture {i * i}\n" for i in range(46)))
    (tmp_path / "said.txt").write_text("{caption} " * 20 + "\na {caption}")
    flags = ["--max-bad", 0.1, "--workers", 2, "--eval-sets", tmp_path / "train.tsv"]
    changes = dict(data=f"{tmp_path.name}:1", caption=f"@{tmp_path / 'said.txt'}", crop_scale=0.5, max_pixels=2000, seed=2)
    last = check(tmp_path.parent, tmp_path, *flags, **changes)[-1]
    assert last["bad_images"] > 10 and 0.2 < last["truncated"] < 0.8
    metrics = json.loads((tmp_path / "metrics.json").read_text())["train"]
    assert metrics["n"] == 41 and metrics["bad_images"] == {"more pixels than --max-pixels": 5}


def test_a_step_that_is_left_out_leaves_no_trace(world, tmp_path, monkeypatch):
    """Weights, momenta and running statistics are as if it had not been; the rate goes on, the mean is of the rest."""
    calls, info_nce = iter([0, 1, 0, 1, 0] * 2), clip.info_nce
    monkeypatch.setattr(clip, "info_nce", lambda *a, **k: info_nce(*a, **k) * (math.nan if next(calls) else 1.0))
    losses = [line["loss"] for line in check(world, tmp_path / "a", left_out=(1, 3))]
    programs.run_here(clip, "--root", world, *FLAGS, "--eval-sets", "--log-every", 3, "--out", tmp_path / "b")
    lines = [(line["step"], line["left_out"], line["loss"]) for line in programs.log_of(tmp_path / "b")]
    assert lines == [(3, 1, pytest.approx((losses[0] + losses[2]) / 2)), (5, 1, pytest.approx(losses[4]))]


def test_chunks_have_batch_norm_of_their_own(world, tmp_path):
    """--accumulate 2 is one graph of two chunks; so is --bn local of two processes, which evaluate with the first's."""
    flags, train = ["--root", world, *FLAGS, "--eval-sets"], world / "laionet" / "train.tsv"
    losses = [line["loss"] for line in check(world, tmp_path / "a", accumulate=2, is_exact=False)]
    assert abs(losses[0] - slow_loop(world, steps=1)[0][0]["loss"]) > 1e-3
    programs.run_forked("clip.py", *flags, train, "--bn", "local", "--out", tmp_path / "b", processes=2)
    assert [line["loss"] for line in programs.log_of(tmp_path / "b")] == pytest.approx(losses, rel=1e-4)
    programs.run_here(clip, *flags, train, "--eval-only", tmp_path / "b" / "checkpoint.pt", "--out", tmp_path / "c")
    with np.load(tmp_path / "b" / "train.npz") as two, np.load(tmp_path / "c" / "train.npz") as one:
        assert np.array_equal(one["features"], two["features"])


def test_evaluation_by_hand(world, tmp_path):
    """Class vectors of --templates, logits, predictions, retrieval: float64; some rows have no label or no image."""
    pixels, table, owner = np.load(world / "val.npy")[:40], clip.Table(world / "val.tsv"), np.arange(40) * 7 % 40 // 2
    names, said = [row["name"] for row in clip.read_classes(world)], np.array([table.get(i % 20, "caption") for i in range(40)])
    labels = np.where(np.isin(np.arange(40), (7, 8)), -1, clip.read_labels(table, named(names))[:40])
    for name, images, marks in ("mine", range(40), np.where(labels < 0, "", labels)), ("pairs", owner, [""] * 40):
        places = ["no.png" if i == 3 else f"{world / 'val.npy'}:{i}" for i in images]
        (tmp_path / f"{name}.tsv").write_text("image\tlabel\tcaption\n" + "".join(map("{}\t{}\t{}\n".format, places, marks, said)))
    (tmp_path / "t.txt").write_text("here is a {}\n{} {}, once more\n")
    flags = [tmp_path / "mine.tsv", tmp_path / "pairs.tsv", "--templates", tmp_path / "t.txt", "--export", tmp_path / "e.pt"]
    programs.run_here(clip, "--root", world, *FLAGS, "--eval-sets", *flags, "--seed", 5, "--out", tmp_path)
    export, saved = (torch.load(tmp_path / name, weights_only=True) for name in ("e.pt", "checkpoint.pt"))
    tokenizer, metrics = clip.Tokenizer(export["bpe"].split("\n")), json.loads((tmp_path / "metrics.json").read_text())
    model = small(tokenizer.vocab_size).double().eval().requires_grad_(False)
    model.load_state_dict(export["state_dict"])
    embed = lambda texts: F.normalize(torch.cat([model.encode_text(tokenizer([t])) for t in texts]), dim=1)  # noqa: E731
    features = model.visual(clip.standardize(torch.from_numpy(pixels).permute(0, 3, 1, 2)).double())
    prompts = torch.stack([embed([f"here is a {name}", f"{name} {name}, once more"]).mean(0) for name in names])
    prototypes, unit, kept = F.normalize(prompts, dim=1), F.normalize(features, dim=1), np.delete(np.arange(40), 3)
    assert all(torch.allclose(x["prototypes"].double(), prototypes, atol=1e-5) for x in (export, saved))
    counts = np.bincount(clip.read_labels(clip.Table(world / "laionet" / "train.tsv"), named(names)), minlength=120)
    with np.load(tmp_path / "mine.npz") as npz:
        logits, known = (100 * unit @ prototypes.T).numpy()[kept], npz["labels"] >= 0
        assert np.allclose(npz["logits"], logits, atol=0.1) and np.allclose(npz["features"], features[kept], atol=0.01)
        assert (npz["rows"] == kept).all() and (npz["labels"] == labels[kept]).all() and known.sum() == 37
        assert (logits[np.arange(39), npz["predictions"]] > logits.max(1) - 1e-3).all()
        expected = clip.imbalance_metrics(npz["predictions"][known], npz["labels"][known], counts)
        assert (npz["class_counts"] == counts).all() and metrics["mine"].items() >= expected.items()
    kept = np.flatnonzero(owner != 3)
    images, ids = np.unique(owner[kept], return_inverse=True)
    of_caption = np.unique(said[kept], return_inverse=True)[1]  # most stand twice, and are right for both images
    expected = clip.retrieval_metrics(unit[images], embed(said[kept]), ids, of_caption)
    assert expected != pytest.approx(clip.retrieval_metrics(unit[images], embed(said[kept]), ids))
    assert metrics["pairs"]["retrieval"] == pytest.approx(expected) and metrics["pairs"]["n"] == 38
    with np.load(tmp_path / "pairs.npz") as npz:
        assert (owner[kept][npz["image_ids"]] == owner[kept]).all() and len(set(npz["image_ids"])) == 19
    assert metrics["run"].items() >= {"step": 5, "data": "laionet", "seed": 5, "precision": "fp32"}.items()


def test_a_continued_run_adds_to_its_time_and_ends_where_it_diverged(world, tmp_path):
    """metrics.json has the seconds of all parts; features that are not finite end the evaluation with one line."""
    flags, path = ["--root", world, *FLAGS, "--out", tmp_path, "--eval-sets"], tmp_path / "checkpoint.pt"
    programs.run_here(clip, *flags)
    checkpoint = torch.load(path, weights_only=True) | {"seconds": 1000.0}
    checkpoint["state_dict"]["visual.proj.weight"].fill_(3e38)
    torch.save(checkpoint, path)
    programs.run_here(clip, *flags)
    assert 1000 <= json.loads((tmp_path / "metrics.json").read_text())["run"]["seconds"] < 1100
    with pytest.raises(SystemExit, match="val: the image features are not finite: the model has diverged"):
        programs.run_here(clip, *flags, "val")


def test_what_main_hands_on(world, tmp_path, monkeypatch):
    """--wandb and --tensorboard get each line, --compile both towers, the loader its workers, other towers all words."""
    heard, seen = [], []
    client = types.SimpleNamespace(log=lambda line, step: heard.append(line), init=lambda **k: heard.append(k) or client,
                                   SummaryWriter=lambda _: client, add_scalar=lambda *args: heard.append(args))  # fmt: skip
    for name in "wandb", "torch.utils.tensorboard":
        monkeypatch.setitem(sys.modules, name, client)
    monkeypatch.setattr(torch.nn.Module, "compile", lambda self: seen.append(type(self).__name__))
    flags = ["--root", world, *FLAGS, "--eval-sets", "--steps", 1, "--text-arch", "transformer", "--out", tmp_path, "--compile"]
    programs.run_here(clip, *flags, "--wandb", "mine", "--tensorboard")
    (line,) = programs.log_of(tmp_path)
    assert heard[0]["project"] == "mine" and heard[1:] == [*((k, v, 1) for k, v in line.items()), line]
    monkeypatch.setattr(torch.utils.data, "DataLoader", lambda pairs, **k: seen.append((pairs.word_dropout, k["num_workers"])))
    for more in ["--arch", "ViT-S-16", "--workers", -1], ["--workers", 3]:
        with pytest.raises(TypeError):  # None for a loader
            programs.run_here(clip, *flags[:-1], *more, "--resume", "off")
    assert seen == ["TinyResNet", "Transformer", (0, 1), (0.5, 3)]
