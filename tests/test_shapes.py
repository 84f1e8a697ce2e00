"""build_datasets.py shapes: the claims of its docstring, on worlds of 5 % of the size, rendered in a few seconds."""

import hashlib
import json
import random
import re
import resource
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

import build_datasets as bd

SCRIPT = Path(__file__).resolve().parent.parent / "build_datasets.py"
SIZE = "0.05"
COLUMNS = ["image", "label", "caption", "title", "tags", "description", "similarity", "source"]
TEST_SETS = ["val", "v2", "sketch", "rendition", "objectnet", "adversarial"]
TRAIN_SETS = ["imagenet", "incaps", "incaps4k", "laionet", "laionet4k", "balanced", "yfcc", "web"]
UNSEEN = ["unseen/train", "unseen/test"]
TABLES = [f"{name}.tsv" for name in TEST_SETS + UNSEEN] + [f"{name}/train.tsv" for name in TRAIN_SETS]


def command(out, *flags):
    return [sys.executable, str(SCRIPT), "shapes", "--out", str(out), "--size", SIZE, *flags]


def build(out, *flags):
    done = subprocess.run(command(out, *flags), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def hashes(out):
    files = sorted(p for p in Path(out).rglob("*") if p.is_file())
    return {str(p.relative_to(out)): hashlib.sha256(p.read_bytes()).hexdigest() for p in files}


def read_tsv(path):
    """Header and rows, split on tabs alone, as a reader that knows no quoting sees them."""
    lines = Path(path).read_text(encoding="utf-8").split("\n")
    assert lines.pop() == "", "the file ends in a newline"
    header = lines[0].split("\t")
    rows = [line.split("\t") for line in lines[1:]]
    assert all(len(row) == len(header) for row in rows), path
    return header, [dict(zip(header, row, strict=True)) for row in rows]


def class_counts(out, name):
    return np.bincount([int(row["label"]) for row in read_tsv(out / name / "train.tsv")[1]], minlength=120)


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    out = tmp_path_factory.mktemp("one") / "shapes"
    build(out, "--workers", "1")
    return out


@pytest.fixture(scope="module")
def atomic_world(tmp_path_factory):
    out = tmp_path_factory.mktemp("atomic") / "shapes"
    build(out, "--names", "atomic")
    return out


def test_files_of_a_world(world):
    assert {*TABLES, "classes.tsv", "bpe.txt", "preview.png", "world.json"} <= set(hashes(world))


def test_seed_redraws_order_images_and_captions(world, tmp_path):
    other = tmp_path / "shapes"
    build(other, "--seed", "1")
    ranks = [np.argsort(np.argsort(class_counts(w, n))) for w, n in
             ((world, "laionet"), (other, "laionet"), (world, "incaps"))]  # fmt: skip
    # Independent orders of 120 classes correlate by 0 +- 0.09.
    assert abs(np.corrcoef(ranks[0], ranks[1])[0, 1]) < 0.4, "another seed, another order"
    assert abs(np.corrcoef(ranks[0], ranks[2])[0, 1]) < 0.4, "another set, another order"
    ours, theirs = hashes(world), hashes(other)
    same = {name for name in ours if ours[name] == theirs[name]}
    assert same <= {"classes.tsv", "unseen/classes.tsv"}


def test_second_call_is_instant_and_changes_nothing(world):
    before = {p: p.stat().st_mtime_ns for p in world.rglob("*")}
    start = sum(resource.getrusage(resource.RUSAGE_CHILDREN)[:2])
    said = build(world, "--workers", "2")
    assert sum(resource.getrusage(resource.RUSAGE_CHILDREN)[:2]) - start < 1.5  # CPU time: others may be busy
    assert said.count("\n") == 1 and "complete" in said
    assert {p: p.stat().st_mtime_ns for p in world.rglob("*")} == before


def test_killed_call_is_redone_whole_by_one_of_two(world, tmp_path):
    """Killed with two workers; two calls at once then: one renders, the other finds it, the bytes are those of one worker."""
    out, partial = tmp_path / "shapes", tmp_path / "shapes.partial"
    process = subprocess.Popen(command(out, "--workers", "2"), stderr=subprocess.DEVNULL)
    pixels = partial / "imagenet" / "train.npy"
    deadline = time.time() + 30
    while not (pixels.exists() and any(pixels.read_bytes()[128:])):  # 128: the header; wait for a first image
        assert time.time() < deadline and process.poll() is None, "the call was to be killed while it renders"
        time.sleep(0.005)
    tasks = Path(f"/proc/{process.pid}/task/{process.pid}/children")
    children = tasks.read_text().split() if tasks.exists() else []
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert partial.exists() and not out.exists()
    pair = [subprocess.Popen(command(out, "--workers", "2"), stdout=subprocess.PIPE, text=True) for _ in range(2)]
    said = [process.communicate()[0] for process in pair]
    assert [process.returncode for process in pair] == [0, 0]
    assert sum("complete" in text for text in said) == 1 and hashes(out) == hashes(world) and not partial.exists()
    for child in children:  # a worker that waits for ever would hold memory and perhaps the lock
        status = Path(f"/proc/{child}/status")
        assert not status.exists() or "(zombie)" in status.read_text()


def test_full_disk_is_one_line(tmp_path):
    """Found before rendering begins, since the room for all pixels is taken first."""
    limit = lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (300_000, 300_000))  # noqa: E731
    done = subprocess.run(command(tmp_path / "shapes"), preexec_fn=limit, capture_output=True, text=True)
    assert done.returncode == 2 and re.fullmatch(r"\S+\.partial/\S+\.npy: File too large\n", done.stderr)
    assert not (tmp_path / "shapes").exists()


@pytest.mark.parametrize("content", ["notes.txt", "world.json", "val.tsv"])
def test_foreign_folder_is_refused_and_kept(tmp_path, content):
    (tmp_path / "shapes").mkdir()
    (tmp_path / "shapes" / content).write_text('{"world": "mine"}')
    done = subprocess.run(command(tmp_path / "shapes"), capture_output=True, text=True)
    assert done.returncode == 2 and "is not a shapes world" in done.stderr and "Traceback" not in done.stderr
    assert (tmp_path / "shapes" / content).read_text() == '{"world": "mine"}'


def test_a_folder_reached_by_a_link(world, tmp_path):
    (tmp_path / "disk").mkdir()
    (tmp_path / "shapes").symlink_to("disk")
    done = subprocess.run(command(tmp_path / "shapes"), capture_output=True, text=True)
    assert done.returncode == 0 and hashes(tmp_path / "shapes") == hashes(world), done.stderr
    (tmp_path / "shapes" / "world.json").write_bytes(b"\xff")
    done = subprocess.run(command(tmp_path / "shapes"), capture_output=True, text=True)
    assert done.returncode == 2 and "is not a shapes world" in done.stderr and "Traceback" not in done.stderr


def test_foreign_partial_folder_is_refused_and_kept(tmp_path):
    (tmp_path / "shapes.partial").mkdir()
    (tmp_path / "shapes.partial" / "notes.txt").write_text("mine")
    done = subprocess.run(command(tmp_path / "shapes"), capture_output=True, text=True)
    assert done.returncode == 2 and "shapes.partial" in done.stderr and "Traceback" not in done.stderr
    assert (tmp_path / "shapes.partial" / "notes.txt").read_text() == "mine"


def test_other_parameters_are_named_in_the_error(world):
    before = hashes(world)
    done = subprocess.run(command(world, "--seed", "7", "--names", "atomic"), capture_output=True, text=True)
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert "seed is 0, asked for 7" in done.stderr and "names is compositional" in done.stderr
    assert "size" not in done.stderr, "only what differs"
    assert hashes(world) == before


def test_tables_keep_the_contract(world):
    header, classes = read_tsv(world / "classes.tsv")
    assert header == ["name", "synonyms", "definition"] and len(classes) == 120
    assert len({row["name"] for row in classes}) == 120
    everything = [phrase for row in classes for phrase in (row["name"], *row["synonyms"].split("|"))]
    assert len(everything) == len(set(everything)) and all(everything), "no phrase means two classes"

    rows_of = json.loads((world / "world.json").read_text())["rows"]
    assert set(rows_of) == {*TEST_SETS, *UNSEEN, *TRAIN_SETS}
    for table in TABLES:
        header, rows = read_tsv(world / table)
        name = table.removesuffix(".tsv") if table.startswith("unseen") else table.split("/")[0].removesuffix(".tsv")
        assert header == COLUMNS and len(rows) == rows_of[name]
        arrays, used = {}, Counter()
        for row in rows:
            file, _, index = row["image"].rpartition(":")
            if file not in arrays:
                arrays[file] = np.load((world / table).parent / file)
            array = arrays[file]
            assert array.dtype == np.uint8 and array.shape[1:] == (32, 32, 3) and 0 <= int(index) < len(array)
            assert array[int(index)].std() > 2, "an empty picture"
            used[row["image"]] += 1
            if name in ("yfcc", "web"):
                assert row["label"] == ""
            else:
                assert 0 <= int(row["label"]) < (90 if name in UNSEEN else 120)
            assert row["caption"] and row["source"] == name
            if name == "imagenet":
                assert row["caption"] == f"a photo of a {classes[int(row['label'])]['name']}"
                assert row["title"] == row["tags"] == row["description"] == ""
            else:
                assert row["caption"] == f"{row['title']} {row['tags']} {row['description']}"
            if name in ("laionet", "laionet4k"):
                assert re.fullmatch(r"[01]\.\d{4}", row["similarity"])
            else:
                assert row["similarity"] == ""
        assert max(used.values()) == 1, "each image once"
        if not name.endswith("4k"):
            assert len(used) == len(array), "every image has a row"


def test_frequencies(world):
    mild, tail = (class_counts(world, name) for name in ("incaps", "laionet"))
    for name in ("imagenet", "balanced"):
        counts = class_counts(world, name)
        assert counts.max() - counts.min() <= 1 and counts.min() >= 1
    assert tail.min() >= 1 and tail.max() >= 40 * tail.min(), "Zipf's first class has 1 / 5.4 of 750 rows"
    assert 3 <= mild.max() / mild.min() <= 8, "120 ** 0.3 = 4.2"
    for name in TEST_SETS:
        counts = Counter(row["label"] for row in read_tsv(world / f"{name}.tsv")[1])
        assert len(counts) == 120 and len(set(counts.values())) == 1
    labels = [int(row["label"]) for row in read_tsv(world / "laionet/train.tsv")[1]]
    assert labels != sorted(labels), "rows are shuffled"


def test_cuts_are_subsets_with_the_same_order(world):
    for name in ("laionet", "incaps"):
        whole = {row["image"]: row for row in read_tsv(world / name / "train.tsv")[1]}
        for row in read_tsv(world / f"{name}4k" / "train.tsv")[1]:
            original = whole[row["image"].removeprefix(f"../{name}/")]
            assert (row["label"], row["caption"]) == (original["label"], original["caption"])
        large, small = class_counts(world, name), class_counts(world, f"{name}4k")
        assert small.min() >= 1 and small.sum() < large.sum() and (small <= large).all()
        assert large[small.argmax()] == large.max()


def test_web_is_an_open_world(world):
    known = {word for row in read_tsv(world / "classes.tsv")[1] for phrase in (row["name"], *row["synonyms"].split("|"))
             for word in phrase.split()}  # fmt: skip
    for name in ("web", "yfcc"):
        captions = [set(row["caption"].split()) for row in read_tsv(world / name / "train.tsv")[1]]
        strangers = [c for c in captions if c & {"tree", "boat", "bowtie", "gear", "mushroom", "gridded", "halved"}]
        assert len(strangers) > 0.1 * len(captions)
        assert sum(bool(c & known) for c in captions) > 0.5 * len(captions)
    assert not {"tree", "gridded", "halved"} & known


def test_some_images_of_web_are_sketches(world):
    """5 % of web are black on white; no image of laionet is: its colours are drawn from twelve, all but one pair."""
    def share(name):
        images = np.load(world / name / "train.npy").astype(int)
        border = np.concatenate([images[:, 0], images[:, -1]], axis=1)  # [n, 64, 3]
        is_white = (border.mean(axis=(1, 2)) > 225) & (np.ptp(border.mean(axis=1), axis=1) < 12)
        is_grey = np.ptp(images.mean(axis=(1, 2)), axis=1) < 8  # the means of the three channels
        return (is_white & is_grey).mean()

    assert share("web") - share("laionet") > 0.03


def test_unseen_classes_are_those_outside_the_world(world):
    names = [{row["name"] for row in read_tsv(world / place / "classes.tsv")[1]} for place in ("", "unseen")]
    assert len(names[1]) == 90 and not names[0] & names[1]
    classes = read_tsv(world / "unseen" / "classes.tsv")[1]
    for part in ("train", "test"):
        rows = read_tsv(world / "unseen" / f"{part}.tsv")[1]
        assert len(set(Counter(row["label"] for row in rows).values())) == 1 and len({r["label"] for r in rows}) == 90
        exact = np.mean([classes[int(row["label"])]["name"] in row["caption"] for row in rows])
        assert exact > 0.6, "labels are places in unseen/classes.tsv"


def share_named(world, table, columns=("caption",)):
    """Share of rows with a word for the class's pattern and one for its shape in each of these columns."""
    words = []  # per class: the set of pattern words, the set of shape words
    for row in read_tsv(world / "classes.tsv")[1]:
        phrases = [phrase.split() for phrase in (row["name"], *row["synonyms"].split("|"))]
        words.append(({pattern for pattern, _ in phrases}, {shape for _, shape in phrases}))
    return np.mean([all(words[int(row["label"])][0] & set(row[c].split()) and words[int(row["label"])][1]
                        & set(row[c].split()) for c in columns)
                    for row in read_tsv(world / table)[1]])  # fmt: skip


def test_captions_name_the_class_when_clean_and_seldom_not_when_noisy(world):
    classes = read_tsv(world / "classes.tsv")[1]
    for table in ("incaps/train.tsv", "val.tsv", "sketch.tsv", "adversarial.tsv"):
        assert share_named(world, table, ("title", "tags", "description")) == 1, table
    exact = [classes[int(row["label"])]["name"] in row["caption"] for row in read_tsv(world / "incaps/train.tsv")[1]]
    assert 0.6 < np.mean(exact) < 1, "the name itself mostly, a synonym at times"
    # .01 of 750 rows, so three standard errors are .011. A wrong name may share the pattern or shape.
    assert 0.97 < share_named(world, "laionet/train.tsv") < 1
    # Nuisances are rare: a colour word in each of five places at p .15 or .05 makes about .44 of the captions.
    colours = set("red orange yellow green teal blue purple pink brown black grey white".split())
    rows = read_tsv(world / "incaps/train.tsv")[1]
    assert 0.3 < np.mean([bool(colours & set(row["caption"].split())) for row in rows]) < 0.6
    assert 9 < np.mean([len(row["caption"].split()) for row in rows]) < 13.5
    seen = {word for row in rows for word in row["caption"].split()}
    assert {"a", "the", "of", "photo", "picture"} <= seen, "prompts are not made of unseen words"


@pytest.mark.parametrize("noise", [0, 0.5])
def test_caption_noise_changes_captions_only(noise, world, tmp_path):
    build(tmp_path / "shapes", "--caption-noise", str(noise))
    mine, theirs = hashes(tmp_path / "shapes"), hashes(world)
    differing = {name for name in mine if mine[name] != theirs[name]}
    noisy = {f"{name}/train.tsv" for name in ("laionet", "laionet4k", "balanced", "yfcc", "web")}
    assert differing - {"bpe.txt", "world.json"} == noisy
    for name in "laionet", "balanced":  # three standard errors at one half are .055
        assert share_named(tmp_path / "shapes", f"{name}/train.tsv") == pytest.approx(1 - noise, abs=0.055)
        labels = [[row["label"] for row in read_tsv(out / name / "train.tsv")[1]] for out in (tmp_path / "shapes", world)]
        assert labels[0] == labels[1]


def test_atomic_names(atomic_world):
    classes = read_tsv(atomic_world / "classes.tsv")[1]
    names = [row["name"] for row in classes]
    assert len(set(names)) == 120 and all(re.fullmatch("[a-z]{4,8}", name) for name in names)
    for row in classes:
        phrase = row["synonyms"].split("|")[0]
        assert len(phrase.split()) == 2 and phrase in row["definition"]
    assert classes[6 * 5 + 1]["synonyms"].startswith("striped crescent")
    for row in read_tsv(atomic_world / "incaps/train.tsv")[1]:
        c = classes[int(row["label"])]
        assert c["name"] in row["title"].split() and c["name"] in row["tags"].split()
        assert c["name"] not in row["description"].split()
        assert any(phrase in row["description"] for phrase in c["synonyms"].split("|"))


def apply_merges(word, rank):
    """Byte-pair encoding as defined: join the pair that was learned first, until none is left. ASCII words."""
    symbols = [*word[:-1], word[-1] + "</w>"]
    while len(symbols) > 1:
        best = min(range(len(symbols) - 1), key=lambda i: rank.get((symbols[i], symbols[i + 1]), len(rank)))
        if (symbols[best], symbols[best + 1]) not in rank:
            break
        symbols[best : best + 2] = [symbols[best] + symbols[best + 1]]
    return symbols


@pytest.mark.parametrize("kind", ["world", "atomic_world"])
def test_every_word_is_one_token(kind, request):
    out = request.getfixturevalue(kind)
    lines = (out / "bpe.txt").read_text(encoding="utf-8").splitlines()
    assert lines[0].startswith("#version") and all(len(line.split(" ")) == 2 for line in lines[1:])
    rank = {tuple(line.split(" ")): i for i, line in enumerate(lines[1:])}
    words = {word for table in TABLES for row in read_tsv(out / table)[1] for word in row["caption"].split()}
    words |= {word for row in read_tsv(out / "classes.tsv")[1] for field in row.values()
              for word in re.findall("[a-z]+", field)}  # fmt: skip
    assert len(words) > 150
    split = {word: apply_merges(word, rank) for word in words if len(apply_merges(word, rank)) != 1}
    assert not split
    assert len(apply_merges("xqzvw", rank)) > 1, "an unseen word is not one token, or this test sees nothing"


def test_adversarial_set_fools_the_plain_model(world):
    accuracy = json.loads((world / "world.json").read_text())["plain_model"]
    assert accuracy["adversarial"] < accuracy["val"]


def test_flags_are_checked():
    for flags in (["--size", "0"], ["--workers", "0"], ["--seed", "-1"], ["--siz", "1"], ["--names", "other"],
                  ["--caption-noise", "1.1"], ["--caption-noise", "nan"]):  # fmt: skip
        done = subprocess.run([sys.executable, str(SCRIPT), "shapes", *flags], capture_output=True, text=True)
        assert done.returncode == 2 and flags[0] in done.stderr, flags


PROCESSES = dict(val="plain", v2="harder", sketch="sketch", rendition="rendition", objectnet="objectnet")


@pytest.mark.parametrize("name", PROCESSES)
def test_a_test_set_shows_its_labels_in_its_process(world, name):
    """120 images of a set, one chunk of it, drawn again from its labels."""
    labels = [int(row["label"]) for row in read_tsv(world / f"{name}.tsv")[1]]
    shapes, patterns = np.array(bd.CONCEPTS)[labels].T
    drawn, _ = bd.render(shapes, patterns, PROCESSES[name], bd.rng_of(0, name, "pixels", 0))
    assert np.array_equal(drawn, np.load(world / f"{name}.npy"))


@pytest.mark.parametrize("name, exponent", [("laionet", 1), ("incaps", 0.3), ("balanced", 0)])
def test_class_counts_are_zipf_s(world, name, exponent):
    """750 rows over 120 classes by rank ** -exponent, each rounded."""
    share = np.arange(1, 121.0) ** -exponent
    assert np.abs(np.sort(class_counts(world, name))[::-1] - 750 * share / share.sum()).max() < 1


def test_cuts_hold_the_first_rows_of_each_class(world):
    for name in "laionet", "incaps":
        first, kept = {}, {}
        for row in read_tsv(world / name / "train.tsv")[1]:
            first.setdefault(row["label"], []).append(row["image"])
        for row in read_tsv(world / f"{name}4k" / "train.tsv")[1]:
            kept.setdefault(row["label"], []).append(row["image"].removeprefix(f"../{name}/"))
        assert all(images == first[label][: len(images)] for label, images in kept.items())


def test_captions_tell_place_and_size_of_what_is_shown(world):
    """Means over about 18 captions a word, of the middle and the area of what differs from the picture's border."""
    rows, images = read_tsv(world / "incaps" / "train.tsv")[1], np.load(world / "incaps" / "train.npy").astype(float)
    border = np.concatenate([images[:, 0], images[:, -1], images[:, :, 0], images[:, :, -1]], axis=1)
    ink = np.abs(images - np.median(border, axis=1)[:, None, None]).sum(axis=3) > 120
    y, x = ([np.nonzero(one)[axis].mean() for one in ink] for axis in (0, 1))

    def mean(values, word):
        return np.mean([value for value, row in zip(values, rows) if word in row["caption"].split()])

    assert mean(x, "right") - mean(x, "left") > 1.5 and mean(y, "bottom") - mean(y, "top") > 1.5
    assert mean(ink.mean(axis=(1, 2)), "large") > 1.1 * mean(ink.mean(axis=(1, 2)), "small")


def test_noise_is_vague_or_wrong(tmp_path, monkeypatch):
    """Of 5,000 captions that do not say what is shown 8/13 name nothing, the others never the class itself."""
    seen = dict(colour=np.zeros(250, int), background=np.zeros(250, int), x=np.ones(250), y=np.zeros(250), radius=np.ones(250))
    monkeypatch.setattr(bd, "render", lambda shapes, *_: (np.zeros((len(shapes), 1, 1, 3), np.uint8), seen))
    np.save(tmp_path / "p.npy", np.zeros((5000, 1, 1, 3), np.uint8))
    classes, n_vague = np.arange(250) % 120, 0
    for first in range(0, 5000, 250):
        job = (tmp_path / "p.npy", "balanced", bd.TRAIN_SETS["balanced"], classes, first, 0, "compositional", 1.0)
        for number, text in zip(classes, bd.make_chunk(job)):
            words, concept = set(text["caption"].split()), bd.concept_table(0, "compositional")[number]
            n_vague += bool(words & {"figure", "shape", "thing", "object", "item", "something"})
            assert words.isdisjoint(concept["shape"]) or words.isdisjoint(concept["pattern"]), text
    assert n_vague / 5000 == pytest.approx(8 / 13, abs=0.028)  # four standard errors


def test_similarity_counts_words():
    assert bd.word_similarity("star star, red", "star") == pytest.approx(2 / 5**0.5)


def test_invented_names_are_all_different():
    """Of 29,400 words 210 are drawn: without a check every other seed has one twice."""
    for seed in range(8):
        names = [row["name"] for row in bd.concept_table(seed, "atomic")]
        assert len(set(names)) == len(names) == 210


def test_objectnet_turns_shapes_all_the_way_round(monkeypatch):
    """Half of the angles are over 90 degrees, of 600, five standard errors; on val at most 19."""
    seen, look_up = [], bd.look_up
    monkeypatch.setattr(bd, "look_up", lambda maps, shapes, u, v: seen.append(u) or look_up(maps, shapes, u, v))
    for process in "objectnet", "plain":
        bd.render(np.zeros(600, int), np.zeros(600, int), process, np.random.default_rng(0))
    angles = [np.abs(np.degrees(np.arctan2(u[:, 1, 0] - u[:, 0, 0], u[:, 0, 1] - u[:, 0, 0]))) for u in seen]
    assert np.mean(angles[0] > 90) == pytest.approx(0.5, abs=0.1) and angles[0].max() > 170
    assert 18 < angles[1].max() < 19.01


def test_colours_are_those_of_their_names_with_a_jitter_of_4_percent():
    for process, contrast in (("plain", 0.60), ("wide", 0.56)):
        *colours, front, back = bd.draw_colours(process, 4000, np.random.default_rng(0))
        jitter = np.stack(colours) - bd.COLOUR_RGB[np.stack([front, back])]
        assert jitter.std() == pytest.approx(0.04, rel=0.05) and abs(jitter.mean()) < 0.002
        assert np.linalg.norm(bd.COLOUR_RGB[front] - bd.COLOUR_RGB[back], axis=1).min() >= contrast


def test_seven_of_ten_words_are_the_class_s_own_and_the_others_its_synonyms():
    """Of 4,000 descriptions, to four standard errors; synonyms are as frequent as each other."""
    concept, draw = bd.concept_table(0, "compositional")[1], random.Random(0)
    seen = dict.fromkeys(("colour", "background", "position", "size"), "red")
    found = Counter(word for _ in range(4000) for word in bd.write_caption(draw, concept, seen, False, False)[2].split())
    for own, *others in (concept["pattern"], concept["shape"]):
        assert found[own] / 4000 == pytest.approx(0.7, abs=0.03)
        assert [found[word] / 4000 for word in others] == pytest.approx([0.3 / len(others)] * len(others), abs=0.03)


def test_nuisances_are_named_rarely():
    """Of 4,000 descriptions a colour 15 %, the others 5 % each; tags name the colour of the shape in 15 %."""
    concept, draw = bd.concept_table(0, "compositional")[1], random.Random(0)
    seen = dict(colour="red", size="small", background="teal", position="left")
    captions = [bd.write_caption(draw, concept, seen, False, False) for _ in range(4000)]
    for part, shares in ((2, (0.15, 0.05, 0.05, 0.05)), (1, (0.15, 0, 0, 0))):
        found = [np.mean([word in caption[part].split() for caption in captions]) for word in seen.values()]
        assert found == pytest.approx(shares, abs=0.023)


def test_a_chunk_s_similarity_and_its_odd_pictures(tmp_path, monkeypatch):
    """LAIONet's similarity is to the label's definition, whatever the caption says; 15 % of the web are drawn oddly."""
    concepts, drawn, render = np.arange(1600) % 120, Counter(), bd.render
    np.save(tmp_path / "x.npy", np.zeros((1600, 32, 32, 3), np.uint8))
    monkeypatch.setattr(bd, "render", lambda s, p, process, rng: drawn.update({process: len(s)}) or render(s, p, process, rng))
    texts = {name: bd.make_chunk((tmp_path / "x.npy", name, bd.TRAIN_SETS[name], concepts, 0, 0, "compositional", 0.5))
             for name in ("laionet", "web")}  # fmt: skip
    for number, row in zip(concepts[:250], texts["laionet"]):
        own = bd.concept_table(0, "compositional")[number]
        expected = bd.word_similarity(row["caption"], f"{own['name']} which is {own['definition']}")
        assert float(row["similarity"]) == pytest.approx(expected, abs=1e-4)
    assert drawn["wide"] == 3200 and sum(drawn.values()) - 3200 == pytest.approx(240, abs=58)


def test_renditions_have_the_first_colours_that_are_far_enough_apart():
    front, back, *_ = bd.draw_colours("rendition", 300, np.random.default_rng(3))
    for i, pairs in enumerate(np.random.default_rng(3).random((300, 8, 2, 3), dtype=np.float32)):
        apart = [np.linalg.norm(a - b) for a, b in pairs]
        chosen = next((k for k in range(8) if apart[k] >= 0.7), np.argmax(apart))
        assert np.array_equal(pairs[chosen], [front[i], back[i]])
