"""The trainers: what is not known is not made up, what is ignored is refused, what has changed is noticed."""

import argparse
import json
import re
import subprocess
import sys
import types
import zlib

import numpy as np
import pytest
import torch
import torchvision
from PIL import Image
from programs import answer, log_of

import clip
import dino_laionet as dino
import evaluate
import sl_vocab_subsample as sl

FLAGS = "--batch-size 16 --steps 2 --log-every 1 --precision fp32 --device cpu --workers 0".split()
DINO = ["--prototypes", "8", "--probe-images", "60", "--no-baselines"]


def table(path, text):
    path.write_text(text)
    return clip.Table(path)


@pytest.fixture(scope="module")
def trained(world, tmp_path_factory):
    out = tmp_path_factory.mktemp("trained")
    assert answer(clip, "--root", world, "--eval-sets", "val", "--out", out, *FLAGS).returncode == 0
    return out


def test_released_weights_have_no_frequencies_of_their_own(world, trained, tmp_path):
    """Scored by those of --data; exported they are still unknown, and no robustness plot has them among our runs."""
    content = torch.load(trained / "checkpoint.pt", weights_only=True)
    torch.save({k: content[k] for k in ("state_dict", "arch", "activation", "bpe")}, tmp_path / "raw.pt")
    flags = ["--root", world, "--eval-sets", "val", "--device", "cpu", "--workers", "0"]
    told = answer(clip, "--eval-only", tmp_path / "raw.pt", *flags, "--data", "incaps", "--export", tmp_path / "clip.pt",
                  "--out", tmp_path / "a")
    assert told.returncode == 0 and "those of --data incaps" in told.stdout, told.stderr
    metrics = json.loads((tmp_path / "a" / "metrics.json").read_text())
    assert metrics["run"]["data"] is None is metrics["run"]["seed"] and metrics["val"]["head"] is not None
    exported = torch.load(tmp_path / "clip.pt", weights_only=True)
    assert not exported["class_counts"].any() and exported["args"]["data"] is None
    told = answer(clip, "--eval-only", tmp_path / "clip.pt", *flags, "--data", "laionet", "--out", tmp_path / "b")
    assert "those of --data laionet" in told.stdout and told.returncode == 0
    with np.load(tmp_path / "b" / "val.npz") as found, np.load(trained / "val.npz") as own:
        assert np.array_equal(found["class_counts"], own["class_counts"])
        assert np.array_equal(found["logits"], own["logits"])
    assert evaluate.models_of_run(tmp_path / "b", "", "val", [], {}, {})["group"] == "runs"
    bare = tmp_path / "bare"  # a root without classes.tsv has those of the checkpoint
    bare.mkdir()
    for suffix in ("npy", "tsv"):
        (bare / f"val.{suffix}").write_bytes((world / f"val.{suffix}").read_bytes())
    told = answer(clip, "--eval-only", tmp_path / "clip.pt", *flags[2:], "--root", bare, "--out", tmp_path / "d")
    assert told.returncode == 0 and "frequencies of the classes are not known" in told.stdout, told.stderr
    assert json.loads((tmp_path / "d" / "metrics.json").read_text())["val"]["spearman_acc"] is None
    for script in (clip, sl):  # without --root: the built-in world, here one that is there
        (tmp_path / "home" / "data").mkdir(parents=True, exist_ok=True)
        if not (tmp_path / "home" / "data" / "shapes").exists():
            (tmp_path / "home" / "data" / "shapes").symlink_to(world)
        told = answer(script, "--eval-only", tmp_path / "clip.pt", *flags[2:], folder=tmp_path / "home")
        assert told.returncode == (0 if script is clip else 2) and "Traceback" not in told.stderr, told.stderr
    others = {"args": argparse.Namespace(data="theirs"), "state_dict": content["state_dict"], "bpe": content["bpe"]}
    torch.save(others, tmp_path / "theirs.pt")
    told = answer(clip, "--eval-only", tmp_path / "theirs.pt", *flags, "--arch", "tiny", "--activation", "gelu", "--out",
                  tmp_path / "e")
    assert "Traceback" not in told.stderr and told.returncode in (0, 2), told.stderr
    told = answer(clip, "--eval-only", trained / "checkpoint.pt", *flags, "--data", "incaps", "--out", tmp_path / "c")
    assert "those of --data" not in told.stdout, "a run of ours knows what it was trained on"
    assert json.loads((tmp_path / "c" / "metrics.json").read_text())["run"]["data"] == "laionet"


def test_class_vectors_beside_a_text_tower_are_refused(world, trained, tmp_path):
    for name, n in (("t", 2), ("c", 120)):
        np.save(tmp_path / f"{name}.npy", np.ones((n, 8), np.float32))
    told = answer(clip, "--eval-only", trained / "checkpoint.pt", "--root", world, "--text-head", "frozen",
                  "--text-embeddings", tmp_path / "t.npy", tmp_path / "c.npy", "--device", "cpu", "--out", tmp_path / "o")
    assert told.returncode == 2 and "has a text tower" in told.stderr


@pytest.mark.parametrize("module, more", [(clip, []), (sl, []), (dino, DINO)], ids=["clip", "sl", "dino"])
def test_a_table_that_has_changed_is_noticed_on_resume(world, tmp_path, module, more):
    """Even if its length, its labels and the byte-pair merges are as before."""
    for path in (world / "laionet").iterdir():
        (tmp_path / path.name).symlink_to(path) if path.suffix != ".tsv" else (tmp_path / path.name).write_bytes(path.read_bytes())
    own = tmp_path / "train.tsv"
    flags = ["--root", world, "--data", own, "--eval-sets", "val", "--out", tmp_path / "out", *FLAGS, *more]
    assert answer(module, *flags).returncode == 0
    written = json.loads((tmp_path / "out" / "args.json").read_text())["crc32"]
    assert written[str(own)] == f"{zlib.crc32(own.read_bytes()):08x}"
    lines = own.read_text().splitlines(keepends=True)
    first, last = lines[1].split("\t"), lines[-1].split("\t")
    place = lines[0].rstrip("\n").split("\t").index("image")
    first[place], last[place] = last[place], first[place]  # two images change places
    own.write_text("".join([lines[0], "\t".join(first), *lines[2:-1], "\t".join(last)]))
    told = answer(module, *flags)
    assert told.returncode == 2 and "was made with another" in told.stderr and str(own) in told.stderr


@pytest.mark.parametrize("name", ["loss", "step", "run"])
def test_test_sets_are_not_called_as_what_the_log_has(world, tmp_path, name):
    (tmp_path / f"{name}.tsv").write_text("image\tlabel\n")
    for module in (clip, sl, dino):
        with pytest.raises(SystemExit, match="other meanings in the logs"):
            module.find_test_sets([str(tmp_path / f"{name}.tsv")], world)


@pytest.mark.parametrize("module, flags, message", [
    (clip, ["--text-head", "frozen", "--text-embeddings", "t.npy", "--bpe", "b.txt"], "of a text tower"),
    (sl, ["--sampler", "class", "--multi-label", "random"], "draw by the first label"),
    (sl, ["--trim-shots", "5"], "--trim-tail, which is not given"),
    (sl, ["--vocab-group", "32"], "--vocab-group is of --vocab"),
    (sl, ["--vocab-power", "0"], "--vocab-power is of --vocab"),
])
def test_flags_without_an_effect_are_refused(module, flags, message, capsys):
    with pytest.raises(SystemExit) as stopped:
        module.parse_args(flags)
    assert stopped.value.code == 2 and message in capsys.readouterr().err


def test_nothing_to_train_is_refused(world, trained, tmp_path):
    told = answer(sl, "--root", world, "--init", trained / "checkpoint.pt", "--head", "frozen", "--head-init",
                  trained / "checkpoint.pt", "--freeze-backbone", "--out", tmp_path, *FLAGS)
    assert told.returncode == 2 and "nothing to train" in told.stderr


@pytest.mark.parametrize("sampler, power", [("instance", 1), ("sqrt", 0.5), ("class", 0)])
def test_a_balanced_softmax_adds_the_prior_of_what_is_drawn(world, tmp_path, monkeypatch, sampler, power):
    seen, adjustment_of = [], sl.adjustment_of
    monkeypatch.setattr(sl, "adjustment_of", lambda *args: seen.append(adjustment_of(*args)) or seen[-1])
    told = answer(sl, "--root", world, "--eval-sets", "val", "--loss", "balanced", "--sampler", sampler, "--out", tmp_path,
                  *FLAGS)
    assert told.returncode == 0, told.stderr
    with np.load(tmp_path / "val.npz") as file:
        counts = file["class_counts"].astype(float)
    drawn = np.where(counts > 0, counts**power, 0)
    with np.errstate(divide="ignore"):
        assert seen[0].numpy() == pytest.approx(np.log(drawn / drawn.sum()), rel=1e-5)


def test_labels_and_names_at_the_edge(tmp_path):
    """The first of several labels may be empty; a name may have no letter; a name needs classes."""
    assert clip.read_labels(table(tmp_path / "a.tsv", "image\tlabel\nx\t|3\nx\t3|1\nx\t|\n"), []).tolist() == [3, 3, -1]
    with pytest.raises(SystemExit, match="there is no classes.tsv"):
        clip.read_labels(table(tmp_path / "b.tsv", "image\tlabel\nx\tcat\n"), [])
    classes = [dict(name="☂"), dict(name="cat", synonyms="=^.^=")]
    captions = ["rain ☂!", "a☂", "my cat", "so =^.^= it is", "a concatenation"]
    assert clip.match_classes(captions, classes).tolist() == [1, 2]


def test_a_class_that_a_mixture_all_but_lost_is_still_there(tmp_path):
    """As in the other trainers: 0.2 images are not none."""
    classes, sets = [dict(name=name) for name in "ab"], []
    for name, labels in (("x", [1] + [0] * 99), ("y", [0] * 100)):
        rows = table(tmp_path / f"{name}.tsv", "image\tlabel\tcaption\n" + "".join(f"i\t{c}\tt\n" for c in labels))
        sets.append(clip.Captions(rows, np.array(labels), ["{caption}"], classes, 0))
    assert clip.count_classes(sets, np.array([0.1, 0.9]), classes).tolist() == [200, 1]


def test_an_npz_by_another_name_is_no_picture(tmp_path):
    with open(tmp_path / "a.npy", "wb") as file:
        np.savez(file, x=np.zeros(3))
    rows = table(tmp_path / "a.tsv", "image\na.npy:0\n")
    assert clip.read_image(rows, 0, 1, 10**6) == "no .npy file of uint8 (N, H, W, 3)"
    with pytest.raises(SystemExit, match="images of"):
        clip.load_pixels([rows])


@pytest.mark.parametrize("script", [clip, sl, dino], ids=lambda module: module.__name__)
def test_what_the_log_counts_goes_on_after_a_resume(script, tmp_path, monkeypatch):
    """Broken images and cut captions of the whole run, as if it had not been stopped."""
    rng = np.random.default_rng(0)
    for i in range(1, 24):  # 0.png is missing
        Image.fromarray(rng.integers(0, 256, (32, 32, 3), np.uint8)).save(tmp_path / f"{i}.png")
    rows = [f"{i}.png\t{i % 2}\t{'word ' * (5 + 300 * (i % 3 == 0))}\n" for i in range(24)]
    (tmp_path / "train.tsv").write_text("image\tlabel\tcaption\n" + "".join(rows))
    (tmp_path / "classes.tsv").write_text("name\ncat\ndog\n")
    flags = ["--data", tmp_path / "train.tsv", *FLAGS, "--steps", "6", "--save-every", "3", "--max-bad", "1", "--eval-sets"]
    flags += [] if script is not dino else ["--probe-set", tmp_path / "train.tsv", "--local-crops", "1", *DINO]
    assert answer(script, *flags, "--out", tmp_path / "straight").returncode == 0
    save = script.save_checkpoint

    def save_and_stop(*given):
        save(*given)
        raise SystemExit("stopped")

    monkeypatch.setattr(script, "save_checkpoint", save_and_stop)
    assert "stopped" in answer(script, *flags, "--out", tmp_path / "stopped").stderr
    monkeypatch.undo()
    told = answer(script, *flags, "--out", tmp_path / "stopped")
    assert "continued from step 3" in told.stdout and told.returncode == 0, told.stderr
    a, b = ([{**line, "images_per_s": 0} for line in log_of(tmp_path / name)] for name in ("straight", "stopped"))
    assert a == b and 2 <= a[2]["bad_images"] < a[5]["bad_images"] and len(a) == 6
    assert script is not clip or 0.2 < a[5]["truncated"] < 0.5


@pytest.mark.parametrize("script, evaluation, more", [(clip, "evaluate", []), (sl, "evaluate_classifier", []),
                                                      (dino, "evaluate_dino", ["--transfer", *DINO])])  # fmt: skip
def test_images_per_s_is_of_training_alone(script, evaluation, more, world, tmp_path, monkeypatch):
    """A clock on which a step takes 1 s and an evaluation 100: each line has the rate since the one before it, without
    evaluations, the last step has one too; the seconds of a run have all, also if it is continued."""
    now, rate, metrics_of = [5.0], script.lr_at, getattr(script, evaluation)
    tick = lambda seconds, then: (now.append(now[-1] + seconds), then)[1]  # noqa: E731
    monkeypatch.setattr(script, "time", types.SimpleNamespace(time=lambda: now[-1]))
    monkeypatch.setattr(script, "lr_at", lambda *given: tick(1, rate(*given)))
    monkeypatch.setattr(script, evaluation, lambda *given: tick(100, metrics_of(*given)))
    flags = ["--root", world, *FLAGS, "--log-every", "2", "--eval-every", "3", "--eval-sets", *more]
    flags += ["--epochs", "0.22", "--steps", "99"]  # 66 of 300 rows: the last of 5 steps is for two
    for _ in range(2):
        told = answer(script, *flags, "--out", tmp_path)
        assert told.returncode == 0, told.stderr
        assert json.loads((tmp_path / "metrics.json").read_text())["run"]["seconds"] == 105
    assert [(line["step"], line["images_per_s"]) for line in log_of(tmp_path) if "loss" in line] == [(2, 16), (4, 16), (5, 16)]


@pytest.mark.parametrize("script, evaluation, more", [(clip, "evaluate", []), (sl, "evaluate_classifier", []),
                                                      (dino, "evaluate_dino", ["--transfer", *DINO])])  # fmt: skip
@pytest.mark.parametrize("bn", ["sync", "local"])
def test_bn_reaches_every_layer(bn, script, evaluation, more, world, tmp_path, monkeypatch):
    """Of what is trained and what is evaluated: tower and head, student and teacher."""
    seen, wrap = [], script.wrap_ddp
    monkeypatch.setattr(script, "wrap_ddp", lambda model, *given: seen.append(model) or wrap(model, *given))
    monkeypatch.setattr(script, evaluation, lambda model, *given: seen.append(model) or {})
    told = answer(script, "--root", world, *FLAGS, "--bn", bn, "--eval-sets", *more, "--out", tmp_path)
    assert told.returncode == 0 and (seen[0] is seen[-1]) == (script is not dino), told.stderr
    layers = [module for model in seen for module in model.modules() if isinstance(module, torch.nn.BatchNorm2d)]
    assert len(layers) >= 18 and {layer.sync for layer in layers} == {bn == "sync"}


def test_weights_that_would_score_in_silence_are_refused(world, trained, tmp_path):
    """Directions that cannot be normalised, a head with fewer rows than names, NaN, a tower that does not exist."""
    for size in 1e20, 1e-20:
        np.save(tmp_path / "head.npy", np.eye(3, dtype=np.float32) * size)
        with pytest.raises(SystemExit, match="too large to be squared" if size > 1 else "a and b|length"):
            sl.read_prototypes(str(tmp_path / "head.npy"), ["a", "b", "c"])
    flags = ["--root", world, "--eval-sets", "val", *FLAGS]
    assert answer(sl, *flags, "--out", tmp_path / "sl").returncode == 0
    content = torch.load(tmp_path / "sl" / "checkpoint.pt", weights_only=True)
    content["state_dict"]["prototypes"] = content["state_dict"]["prototypes"][:3]
    torch.save(content, tmp_path / "cut.pt")
    told = answer(sl, *flags[:4], "--eval-only", tmp_path / "cut.pt", "--out", tmp_path / "cut")
    assert told.returncode == 2 and "3 prototypes for 120 class names" in told.stderr
    network = dino.Network("tiny", 8, 8, 4, False)
    weights = network.state_dict()
    torch.save({"state_dict": weights | {"visual.conv1.weight": weights["visual.conv1.weight"] * np.nan}}, tmp_path / "nan.pt")
    with pytest.raises(SystemExit, match=r"not finite in \['conv1.weight'\]"):
        dino.load_backbone(network, str(tmp_path / "nan.pt"))
    old = {k: v for k, v in torchvision.models.resnet50().state_dict().items() if "num_batches" not in k}
    torch.save(old, tmp_path / "resnet50.pth")  # as torch 0.4 wrote it
    network = dino.Network("resnet50", 8, 8, 4, False)
    dino.load_backbone(network, str(tmp_path / "resnet50.pth"))
    assert torch.equal(network.visual.layer4[2].bn3.running_var, old["layer4.2.bn3.running_var"])
    made = {name: {} for name in ("state_dict", "class_counts", "step")} | {"arch": "Babel", "class_names": []}
    made |= {"dino_prototypes": torch.zeros(4, 8), "args": vars(dino.parse_args([]))}
    torch.save(made, tmp_path / "babel.pt")
    told = answer(dino, *flags[:4], "--eval-only", tmp_path / "babel.pt", "--out", tmp_path / "babel", "--device", "cpu")
    assert told.returncode == 2 and "the tower 'Babel'" in told.stderr


@pytest.mark.parametrize("module, more", [(clip, []), (sl, []), (dino, DINO)], ids=["clip", "sl", "dino"])
def test_two_runs_do_not_write_to_one_folder(world, tmp_path, monkeypatch, module, more):
    """The second ends with one line; what a killed run left half written goes when the folder is free."""
    monkeypatch.setattr(clip, "KEEP_TEXT", 0)  # embeddings of captions lie in OUT too
    (world / "clip.pt").exists() or answer(clip, "--root", world, "--eval-sets", *FLAGS, "--export", world / "clip.pt",
                                           "--out", tmp_path / "pretrained")  # fmt: skip
    more = ["--text-head", "frozen"] if module is clip else more
    flags = ["--root", world, "--eval-sets", "--out", tmp_path, *FLAGS, *more]
    hold = "import fcntl, sys; f = open(sys.argv[1], 'a'); fcntl.lockf(f, fcntl.LOCK_EX); print(1, flush=True); input()"
    holder = subprocess.Popen([sys.executable, "-c", hold, tmp_path / "lock"], stdin=-1, stdout=-1, text=True)
    try:
        assert holder.stdout.readline() == "1\n"
        (tmp_path / "checkpoint.pt.7.part").write_bytes(b"half")
        told = answer(module, *flags)
        assert told.returncode == 2 and "another run is writing there" in told.stderr
        assert {path.name for path in tmp_path.iterdir()} <= {"checkpoint.pt.7.part", "lock", "pretrained"}
    finally:
        holder.communicate("\n")
    assert answer(module, *flags).returncode == 0 and not list(tmp_path.glob("*.part"))


def test_a_run_is_not_replaced_by_another_that_is_continued(world, trained, tmp_path):
    flags = ["--root", world, "--eval-sets", *FLAGS, "--steps", "3"]
    assert answer(clip, *flags, "--out", tmp_path).returncode == 0
    before = (tmp_path / "checkpoint.pt").read_bytes()
    longer = torch.load(trained / "checkpoint.pt", weights_only=True)
    longer["args"]["steps"] = 3
    torch.save(longer, tmp_path / "two_steps.pt")
    told = answer(clip, *flags, "--resume", tmp_path / "two_steps.pt", "--out", tmp_path)
    assert told.returncode == 2 and "pass another --out, or --resume auto" in told.stderr
    assert (tmp_path / "checkpoint.pt").read_bytes() == before
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "log.jsonl").write_text('{"step": 1, "loss": 7}\n')  # of a run that never saved
    told = answer(clip, *flags, "--resume", tmp_path / "two_steps.pt", "--out", tmp_path / "other")
    assert told.returncode == 0 and [line["step"] for line in log_of(tmp_path / "other")] == [3]


@pytest.mark.parametrize("module", [clip, sl, dino])
def test_a_test_set_of_other_classes_is_refused(world, module):
    with pytest.raises(SystemExit, match="pass --root .*unseen"):
        module.find_test_sets([str(world / "unseen" / "test.tsv")], world)
    assert module.find_test_sets([str(world / "unseen" / "test.tsv")], world / "unseen")


@pytest.mark.parametrize("changed", ["t.txt", "e.npy", "classes.tsv"])
def test_what_flags_name_is_compared_on_resume(changed, world, tmp_path):
    """Templates of captions, embeddings, synonyms: a run that goes on with others is neither's."""
    own = tmp_path / "root"
    (own / "laionet").mkdir(parents=True)
    for name in ("classes.tsv", "laionet/train.tsv", "laionet/train.npy"):
        (own / name).write_bytes((world / name).read_bytes())
    n = len((own / "laionet" / "train.tsv").read_text().splitlines()) - 1
    (own / "t.txt").write_text("a {synonym} x\n")
    np.save(own / "e.npy", np.zeros((n, 8), np.float32))
    flags = ["--root", own, "--eval-sets", "--out", tmp_path / "out", *FLAGS]
    flags += ["--text-head", "frozen", "--text-embeddings", own / "e.npy"] if changed == "e.npy" else [
        "--caption", f"@{own / 't.txt'}"]
    assert answer(clip, *flags).returncode == 0
    content = bytearray((own / changed).read_bytes())
    content[-2] ^= 1
    (own / changed).write_bytes(content)
    told = answer(clip, *flags)
    assert told.returncode == 2 and "was made with another" in told.stderr and changed in told.stderr


@pytest.mark.parametrize("module, flags", [
    (clip, ["--text-head", "frozen"]), (sl, ["--head", "frozen"])], ids=["clip", "sl"])
def test_nothing_is_pretrained_for_a_run_that_cannot_be(world, tmp_path, monkeypatch, module, flags):
    """Wrong flags, and those of a run in OUT that was made with others, are told at once."""
    monkeypatch.setattr(module, "ensure_clip_pt", lambda *args: pytest.fail("pretrains"))
    flags = ["--root", world, *FLAGS, *flags]
    assert "no file" in answer(module, *flags, "--data", "lainet", "--out", tmp_path / "a").stderr
    told = answer(module, *flags, "--batch-size", "100000", "--out", tmp_path / "a").stderr
    assert re.search("larger\\s+than the .* rows", told), told
    assert answer(module, "--root", world, "--eval-sets", "--out", tmp_path / "b", *FLAGS).returncode == 0
    assert "was made with --" in answer(module, *flags, "--eval-sets", "--out", tmp_path / "b").stderr


def test_embeddings_stand_for_captions(world, tmp_path):
    """A table without captions is enough where --text-embeddings are given."""
    rows = [line.split("\t") for line in (world / "laionet" / "train.tsv").read_text().splitlines()]
    place = [rows[0].index(name) for name in ("image", "label")]
    lines = ["\t".join(row[i] for i in place) for row in rows]
    (world / "laionet" / "bare.tsv").write_text("\n".join(lines) + "\n")
    np.save(tmp_path / "t.npy", np.random.default_rng(0).normal(size=(len(lines) - 1, 8)).astype(np.float32))
    flags = ["--root", world, "--data", world / "laionet" / "bare.tsv", "--text-head", "frozen", "--text-embeddings",
             tmp_path / "t.npy", "--eval-sets", "--out", tmp_path / "out", *FLAGS]
    told = answer(clip, *flags)
    assert told.returncode == 0, told.stderr
    assert "caption" in answer(clip, *flags, "--dup-captions", "mask", "--out", tmp_path / "b").stderr


def test_a_test_set_that_cannot_be_scored_is_named(world, trained, tmp_path):
    flags = ["--root", world, "--eval-sets", world / "yfcc" / "train.tsv", *FLAGS, "--out", tmp_path]
    assert "train: not scored: no labels" in answer(sl, *flags).stdout


def test_trimmed_classes_that_have_no_image_are_counted(world, tmp_path):
    own = tmp_path / "train.tsv"
    lines = (world / "laionet" / "train.tsv").read_text().splitlines()
    place = lines[0].split("\t").index("label")
    kept = [line for line in lines[1:] if int(line.split("\t")[place]) > 6]
    own.write_text("\n".join([lines[0], *kept]) + "\n")
    (tmp_path / "train.npy").symlink_to(world / "laionet" / "train.npy")
    flags = ["--root", world, "--data", own, "--eval-sets", *FLAGS, "--trim-tail", "9"]
    assert "7 of the trimmed classes had no more than 0 images anyway" in answer(sl, *flags, "--out", tmp_path / "o").stdout


@pytest.mark.parametrize("flags, message", [
    (["--local-size", "12"], "they need --local-crops"),
    (["--local-scale", "0.1", "0.2"], "they need --local-crops"),
    (["--probe-set", "typo.tsv", "--eval-sets"], "typo.tsv: no such file")])  # fmt: skip
def test_flags_of_dino_that_would_do_nothing_are_refused(flags, message, world, tmp_path):
    told = answer(dino, "--root", world, *FLAGS, *DINO, *flags, "--out", tmp_path / "o")
    assert told.returncode == 2 and message in told.stderr, told.stderr


def test_a_probe_is_not_fitted_on_images_of_another_root(world, tmp_path):
    """--eval-only with --root elsewhere: the run's own files have labels of its own classes."""
    rows = (world / "laionet" / "train.tsv").read_text()
    (world / "laionet" / "own.tsv").write_text(rows)
    flags = ["--data", world / "laionet" / "own.tsv", *FLAGS, *DINO, "--transfer", "--eval-sets"]
    assert answer(dino, "--root", world, *flags, "--out", tmp_path / "run").returncode == 0
    other = tmp_path / "other"
    other.mkdir()
    (other / "classes.tsv").write_text("name\n" + "".join(f"{i}\n" for i in range(120)))
    for name in ("val.tsv", "val.npy"):
        (other / name).write_bytes((world / name).read_bytes())
    told = answer(dino, "--eval-only", tmp_path / "run" / "checkpoint.pt", "--root", other, "--transfer", "--device", "cpu",
                  "--no-baselines", "--out", tmp_path / "e")  # fmt: skip
    assert told.returncode == 2 and "no file" in told.stderr, told.stdout


def test_crops_larger_than_the_pictures_are_told(tmp_path):
    for i in range(40):
        Image.new("RGB", (24, 30)).save(tmp_path / f"{i}.png")
    (tmp_path / "train.tsv").write_text("image\n" + "".join(f"{i}.png\n" for i in range(40)))
    told = answer(dino, "--data", tmp_path / "train.tsv", "--eval-sets", "--transfer", *FLAGS, *DINO, "--out", tmp_path / "o")
    assert told.returncode == 0 and "a crop of 28 px is larger than the images of" in told.stdout, told.stderr
    assert "or crops are enlarged" in told.stdout


@pytest.mark.parametrize("script", [clip, sl], ids=["clip", "sl"])
def test_predictions_are_of_full_precision(script, world, tmp_path):
    """Two class vectors that 16 bits cannot tell apart: metrics and <set>.npz have the nearer one, by float64."""
    torch.manual_seed(0)
    images = torch.from_numpy(np.load(world / "val.npy")[:100]).permute(0, 3, 1, 2)
    text = dict(arch="embeddings", width=8)
    model = clip.CLIP("tiny", 64, text, "gelu") if script is clip else sl.Classifier("tiny", 2, None, False)
    with torch.no_grad():
        features = torch.nn.functional.normalize(model.eval().encode_image(images).double(), dim=1)
    middle = torch.nn.functional.normalize(features.mean(0), dim=0)
    aside = torch.randn(64, dtype=torch.float64)
    vectors = torch.stack([middle, middle + 1e-3 * (aside - (aside @ middle) * middle)]).float()
    (tmp_path / "x.tsv").write_text("image\tlabel\n" + "".join(f"{world / 'val.npy'}:{i}\t{i % 2}\n" for i in range(100)))
    sets, classes, cpu = {"x": clip.Table(tmp_path / "x.tsv")}, [{"name": "a"}, {"name": "b"}], torch.device("cpu")
    if script is clip:
        of = clip.World(tmp_path, classes, np.ones(2, np.int64), sets, [], None, vectors)
        metrics = clip.evaluate(model, None, of, 0, 10**6, cpu, tmp_path)
    else:
        model.prototypes.data = vectors
        metrics = sl.evaluate_classifier(model, classes, np.ones(2, np.int64), np.zeros(0, np.int64), sets, 0, 10**6, cpu, tmp_path)
    unit = torch.nn.functional.normalize(vectors.double(), dim=1) if script is sl else vectors.double()
    expected = (features @ unit.T).argmax(1).numpy()
    with np.load(tmp_path / "x.npz") as found:
        assert (found["predictions"] == expected).mean() >= 0.97 and 0.1 < expected.mean() < 0.9
        assert (found["logits"].argmax(1) != expected).mean() > 0.05
        assert metrics["x"]["top1"] == (found["predictions"] == np.arange(100) % 2).mean()


@pytest.mark.parametrize("module, name, more", [(clip, "CLIP", []), (sl, "Classifier", []), (dino, "Network", DINO)])
def test_towers_train_in_the_asked_precision_and_are_scored_in_fp32(module, name, more, world, tmp_path, monkeypatch):
    """Whatever --precision was: numbers of runs can be compared. Evaluations on the way too."""
    seen, tower = [], getattr(module, name)
    encode = tower.encode_image
    monkeypatch.setattr(tower, "encode_image", lambda self, images: seen.append(
        (self.training, torch.is_autocast_enabled("cpu"))) or encode(self, images))  # fmt: skip
    flags = ["--root", world, "--eval-sets", "val", "--out", tmp_path, *FLAGS, "--precision", "bf16", "--eval-every", 1, *more]
    assert answer(module, *flags).returncode == 0
    assert set(seen) == {(True, True), (False, False)}
