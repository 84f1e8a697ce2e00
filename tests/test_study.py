"""recipes/shapes_results.py: the rule of the verdict, and what is kept of a run."""

import importlib.util
import json
import types

import numpy as np
import pytest
from programs import ROOT

spec = importlib.util.spec_from_file_location("shapes_results", ROOT / "recipes" / "shapes_results.py")
study = importlib.util.module_from_spec(spec)
spec.loader.exec_module(study)


def write_run(folder, name, **metrics):
    folder.mkdir(parents=True, exist_ok=True)
    row = {"top1": 0.8, "tail": 0.7, "spearman_acc": 0.3, "spearman_pred": 0.2} | metrics
    content = {"command": "", "metrics": {"val": row, "run": {"seconds": 60.0}}, "classes": {}}
    (folder / f"{name}.json").write_text(json.dumps(content))


def test_interval_is_students():
    """Hand: 1, 2, 3 has mean 2, deviation 1, and t(2 degrees, .975) = 4.303."""
    mean, half = study.interval([1.0, None, 2.0, 3.0])
    assert mean == 2 and half == pytest.approx(4.3027 / np.sqrt(3), rel=1e-4)
    assert study.interval([None]) == (None, None) and study.interval([1.5]) == (1.5, None)


def test_worlds_needed():
    """Hand: mean 1, deviation 1: t(6 degrees) / sqrt(7) = .925 is the first below 1, t(5) / sqrt(6) = 1.049."""
    assert study.worlds_needed([0.0, 1.0, 2.0, None]) == 7
    assert study.worlds_needed([-1.0, 0.0, -2.0]) == 7  # of either sign
    assert study.worlds_needed([-1.0, 1.0]) == 101 and study.worlds_needed([1.0]) is None


def test_the_papers_differences_belong_to_contrasts():
    for e in study.EXPERIMENTS:
        texts = {text.rstrip(" *") for text, _ in e["contrasts"]}
        assert not study.FOUND.get(e["number"], {}).keys() - texts


@pytest.mark.parametrize("answers, verdict", [
    (["yes", "yes"], "reproduces"), (["yes", "open"], "partly"), (["yes", "no"], "partly"), (["no", "open"], "does not"),
    (["open", "open"], "inconclusive"), ([], "inconclusive")])  # fmt: skip
def test_verdict(answers, verdict):
    assert study.verdict_of(answers) == verdict


def test_page_of_known_results(tmp_path):
    """Three seeds where SL is more biased by .3 in every one, and once where the sign changes from seed to seed."""
    for number, noise in enumerate((-0.01, 0.0, 0.01)):
        folder = tmp_path / f"seed{number}"
        for name in ("sl", "sl_paper"):
            write_run(folder, name, spearman_acc=0.5 + noise, spearman_pred=0.6 - noise)
        write_run(folder, "clip", spearman_acc=0.2, spearman_pred=0.1)
        write_run(folder, "clip_template_mask", spearman_pred=0.2 + 30 * noise)
        write_run(folder, "clip_template", spearman_pred=0.2)
    study.page(tmp_path)
    text = (tmp_path / "shapes.md").read_text()
    assert "| 1 | Supervised learning and CLIP" in text
    assert "| reproduces | 6 | 0 | 0 | reproduces |" in text.split("| 2 |")[0]
    assert "| rho(freq, acc): SL matched - CLIP | 0.300 ± 0.025 | 0.126 |" in text
    row = "| rho(freq, pred), CLIP templates: masked - kept | 0.000 ± 0.745 |  | -0.300, 0.000, 0.300 | open (over 100 worlds) |"
    assert row in text
    assert (tmp_path / "shapes_1.png").stat().st_size > 5000


def test_floor_is_no_correlation(tmp_path):
    write_run(tmp_path / "seed0", "sl", top1=0.2, spearman_acc=0.9)
    seed = study.Seed(tmp_path / "seed0")
    assert seed.get("sl", "acc") is None and seed.get("sl", "top1") == 0.2 and seed.get("other", "top1") is None


def test_robustness_is_the_distance_to_a_logit_line(tmp_path):
    """Points on logit(y) = logit(x) - 1, and a model a known distance above."""
    line = {name: 0.3 + 0.15 * i for i, name in enumerate(study.LINE)}
    for name, x in line.items():
        write_run(tmp_path / "seed0", name, top1=x)
        file = tmp_path / "seed0" / f"{name}.json"
        content = json.loads(file.read_text())
        content["metrics"]["sketch"] = {"top1": 1 / (1 + np.exp(1) * (1 / x - 1))}
        file.write_text(json.dumps(content))
    seed = study.Seed(tmp_path / "seed0")
    seed.files["model"] = {"metrics": {"val": {"top1": 0.5}, "sketch": {"top1": 1 / (1 + np.e) + 0.07}}}
    assert seed.robustness("model", "sketch") == pytest.approx(0.07)
    assert seed.robustness("sl", "sketch") == pytest.approx(0, abs=1e-9)
    del seed.files["model"]["metrics"]["sketch"]  # a run that has not been scored on it
    assert seed.robustness("model", "sketch") is None


def test_compact_keeps_what_the_page_needs(tmp_path):
    run = tmp_path / "run"
    run.mkdir()
    (run / "metrics.json").write_text(json.dumps({"val": {"top1": 2 / 3, "tail": None}, "run": {"seconds": 1.0}}))
    np.savez(run / "val.npz", labels=[0, 0, 2], predictions=[0, 1, 2], class_counts=[5, 0, 1])
    study.compact(run, tmp_path / "out.json", "python x.py ")
    content = json.loads((tmp_path / "out.json").read_text())
    assert content["command"] == "python x.py" and content["metrics"]["val"] == {"top1": 0.6667, "tail": None}
    assert content["classes"] == {"val": {"count": [5, 0, 1], "images": [2, 0, 1], "right": [1, 0, 1], "predicted": [1, 1, 1]}}


def test_judge_answers_by_label(tmp_path):
    (tmp_path / "laionet").mkdir()
    (tmp_path / "classes.tsv").write_text("name\nred\nblue\n")
    (tmp_path / "laionet/train.tsv").write_text("image\tlabel\ntrain.npy:0\t0\ntrain.npy:1\t1\n")
    (tmp_path / "sample.tsv").write_text("name\tlabel\tkey\tcaption\nred\t0\ttrain.npy:0\ta\nred\t0\t../x/train.npy:1\tb\n")
    study.judge(tmp_path / "sample.tsv", tmp_path, tmp_path / "judged.tsv")
    assert (tmp_path / "judged.tsv").read_text() == "name\trelevant\nred\tyes\nred\tno\n"


def contents(path, **rows):
    """A file as evaluate.py writes it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"rows": rows}))


def test_the_page_is_that_of_the_files(tmp_path, monkeypatch, capsys):
    """results/shapes.md, as committed, is what results/seed*/*.json give, to the letter; plots aside."""
    for folder in (ROOT / "results").glob("seed*"):
        (tmp_path / folder.name).symlink_to(folder)
    monkeypatch.setattr(study, "draw", lambda *args: None)
    monkeypatch.setattr(study, "draw_study", lambda *args: None)
    study.page(tmp_path)
    assert (tmp_path / "shapes.md").read_text("utf-8") == (ROOT / "results/shapes.md").read_text("utf-8")


@pytest.mark.parametrize("number, difference, column, a, b", [
    (1, "rho(freq, acc): SL matched - CLIP", 3, "SL, matched", "CLIP, full captions"),
    (2, "rho(freq, acc), frozen: eighth - whole", 3, "CLIP, frozen text, eighth", "CLIP, frozen text, whole"),
    (4, "top-1, 15,000: m32_g32 - all", 1, "15,000: m32_g32", "15,000: all 120"),
    (4, "rho(freq, pred), 15,000: all - m32_g32", 4, "15,000: all 120", "15,000: m32_g32"),
    (4, "rho(freq, pred), 15,000: evenly - by frequency", 4, "15,000: m32_g32, drawn evenly", "15,000: m32_g32"),
    (5, "rho(freq, acc), frozen: images most alike - any, same class counts *", 3,
     "images most alike (alike0.35), class counts of above0.35, frozen", "any (as0.35), class counts of above0.35, frozen"),
    (6, "NC1: frozen - scratch", 5, "frozen", "scratch"),
    (7, "rho(freq, acc), SL: 120 - 60 classes", 2, "SL, 120 classes, equal images", "SL, 60 classes"),
    (7, "rho(freq, acc), CLIP: 60 - 120 classes", 2, "CLIP, 60 classes", "CLIP, 120 classes, equal images"),
    (8, "tail, 1 shot: frozen head with vocabulary - frozen head", 3, "SL, frozen head, vocabulary 32", "SL, frozen head"),
    (8, "tail, 0 shots: .05 - frozen head *", 1, 0.05, "SL, frozen head"),
    (9, "probe: sampled K / 4 - fixed K / 4", 1, "sampled, M = K / 4", "fixed, K / 4"),
    (10, "sketch: web - web without what is near sketch", 2, "CLIP, web", "CLIP, web without what is near sketch"),
    (10, "effective robustness: SL on web - SL on laionet", 5, "SL, web", "SL, laionet"),
    (11, "tail: GLA - fine-tuned", 4, "GLA", "fine-tuned"),
    (12, "rho(freq, pred): log-Q - vocabulary 32", 4, "SL, vocabulary 32, log-Q", "SL, vocabulary 32"),
    (12, "rho(freq, pred), CLIP templates: masked - kept", 4, "CLIP, templates, duplicates masked",
     "CLIP, templates, duplicates kept")])  # fmt: skip
def test_differences_are_those_of_their_rows(number, difference, column, a, b):
    """On the page: where no world lacks a value, the mean of paired differences is the difference of two rows' means."""
    part = (ROOT / "results/shapes.md").read_text("utf-8").split(f"\n## {number}. ")[1].split("\n## ")[0]
    cells = {}
    for line in part.splitlines():
        first, *others = (cell.strip() for cell in line.strip("|").split("|"))
        cells.setdefault(first, others)
    x, y = (float(cells[row][column - 1].split(" ± ")[0]) if isinstance(row, str) else row for row in (a, b))
    assert float(cells[difference][0].split(" ± ")[0]) == pytest.approx(x - y, abs=0.0016)


def test_floor_is_that_of_the_test_set(tmp_path):
    """A quarter right is enough. Both correlations of a set go by its own accuracy; other numbers stay."""
    write_run(tmp_path, "sl", top1=0.25)
    seed = study.Seed(tmp_path)
    seed.files["sl"]["metrics"]["v2"] = {"top1": 0.2499, "spearman_acc": 0.5, "spearman_pred": 0.6, "tail": 0.1}
    assert [seed.get("sl", key) for key in study.METRICS] == [0.25, 0.7, 0.3, 0.2]
    assert [seed.get("sl", key, "v2") for key in study.METRICS] == [0.2499, 0.1, None, None]
    assert seed.get("sl", "top1", "sketch") is None


def test_differences_need_both_sides_on_one_set(tmp_path):
    write_run(tmp_path, "a", top1=0.75)
    write_run(tmp_path, "b", top1=0.5)
    seed = study.Seed(tmp_path)
    assert study.minus("a", "b", "top1")(seed) == 0.25 and study.minus("a", "b", "top1", "v2")(seed) is None
    for run, top1 in ("a", 0.625), ("b", 0.125):
        seed.files[run]["metrics"]["v2"] = {"top1": top1}
    assert study.minus("a", "b", "top1", "v2")(seed) == 0.5
    two, one, none = (lambda seed: 2.0), (lambda seed: 0.5), (lambda seed: None)
    assert study.both(two, one)(seed) == 1.5 and study.both(two, none)(seed) is study.both(none, two)(seed) is None
    assert study.minus_from(0.25, 0.5) == -0.25 and study.minus_from(0.25, None) is None
    assert study.size_of(-0.5) == 0.5 and study.size_of(None) is None


def test_answers_and_cells():
    """Hand: 1 and 2 have deviation sqrt(1/2) and t(1 degree, .975) = 12.706, so 12.706 * sqrt(1/2) / sqrt(2) = 6.353."""
    pairs = [(1, 0.9), (1, 1), (0.1, None), (None, None), (-1, 1), (-1, 0.9), (-1, 1.1)]
    assert [study.answer_of(*pair) for pair in pairs] == ["yes", "open", "open", "open", "open", "no", "open"]
    values = [1.0, None, 2.0], [1.0, 2.0], [0.5], [None, 0.5], [None]
    assert [study.cell(v) for v in values] == ["1.500 ± 6.353 (2)", "1.500 ± 6.353", "0.500", "0.500 (1)", "-"]


@pytest.mark.parametrize("mean, n", [(9.0, 2), (8.98, 3), (0.199, 100), (0.198, 101)])
def test_worlds_needed_from_2_to_100(mean, n):
    """Hand, of deviation 1: t(1) / sqrt(2) = 8.985, t(99) / 10 = .1984, t(98) / sqrt(99) = .1994. 101: more than 100."""
    assert study.worlds_needed([mean - np.sqrt(0.5), mean + np.sqrt(0.5)]) == n


def test_rare_classes_count_alike(tmp_path):
    """Hand: the mean over classes of their accuracies, not over images; a class of just so many shots is rare."""
    seed = study.Seed(tmp_path)
    row = {"count": [0, 1, 5, 2], "images": [2, 10, 4, 5], "right": [1, 1, 3, 5], "predicted": [0, 0, 0, 0]}
    seed.files["run"] = {"classes": {"val": row}}
    assert seed.of_rare("run", 0) == 0.5 and seed.of_rare("run", 1) == pytest.approx((0.5 + 0.1) / 2)
    assert seed.of_rare("run", 1, False) == pytest.approx((0.75 + 1) / 2)
    assert seed.of_rare("run", 1, test="v2") is None and study.rare("other", 1)(seed) is None


def test_robustness_needs_the_whole_line(tmp_path):
    """A line through fewer points is another line, and a mean over fewer shifts another mean: none then."""
    for i, name in enumerate(study.LINE):
        write_run(tmp_path, name, top1=0.3 + 0.1 * i)
    seed = study.Seed(tmp_path)
    for name in study.LINE:
        seed.files[name]["metrics"] |= {test: {"top1": seed.get(name, "top1")} for test in study.SHIFTS}
    seed.files["run"] = {"metrics": {"val": {"top1": 0.5}, "sketch": {"top1": 0.6}, "rendition": {"top1": 0.5},
                                     "objectnet": {"top1": 0.7}}}  # fmt: skip
    assert study.mean_robustness("run")(seed) == pytest.approx(0.1)
    del seed.files["sl_half"]["metrics"]["objectnet"]
    assert seed.robustness("run", "sketch") == pytest.approx(0.1) and seed.robustness("run", "objectnet") is None
    assert study.mean_robustness("run")(seed) is None


def test_language_counts_by_size():
    """Hand: images give .2 - .1, and language's .05 is as much where it takes as where it gives."""
    (contrast,) = [f for e in study.EXPERIMENTS for text, f in e["contrasts"] if text.startswith("images less language")]
    for clip in (0.05, 0.15, None):
        found = {"rob_sl_web": 0.2, "sl": 0.1, "clip": clip}
        seed = types.SimpleNamespace(robustness=lambda run, test, found=found: found[run])
        assert contrast(seed) == (None if clip is None else pytest.approx(0.05))


def test_numbers_of_evaluate(tmp_path):
    contents(tmp_path / "frequencies.json", first={"rho": {"value": 0.9, "low": 0.1}}, second={"rho": {"value": 0.5}})
    seed = study.Seed(tmp_path)
    assert study.scored("frequencies", "first", "rho")(seed) == 0.9 and study.agreement(seed) == pytest.approx(0.1)
    assert seed.score("frequencies", "third", "rho") is None and seed.score("other", "first") is None
    assert study.agreement(study.Seed(tmp_path / "none")) is None


def test_page_of_made_up_differences(tmp_path, monkeypatch, capsys):
    """Marks: ** has no part in the verdict, * none in that of the first. What five worlds decide and the first three had
    left open is counted, of both signs, but for **. A world without a run stays in its place."""
    values = {
        "late yes": [0.1, 0.02, 0.2, 0.2, 0.2], "early yes": [0.2, 0.21, 0.22, 0.2, 0.2],
        "late no *": [-0.1, 0.02, -0.1, -0.1, -0.1], "late **": [0.1, 0.02, 0.2, 0.2, 0.2],
        "early, not late **": [0.2, 0.21, 0.22, -0.9, 0.2], "with a gap **": [0.2, None, 0.22, 0.2, 0.2]}  # fmt: skip
    for i in range(5):
        contents(tmp_path / f"seed{i}/v.json", **{text: numbers[i] for text, numbers in values.items()})
        write_run(tmp_path / f"seed{i}", "sl")
    experiment = dict(number=1, title="T", claim="C.", differs="", contrasts=[(text, study.scored("v", text)) for text in values],
                      rows=[("row", [study.scored("v", "with a gap **")], "")], columns=["gap"])  # fmt: skip
    none = dict(experiment, number=2, contrasts=[("x", lambda seed: None)])
    monkeypatch.setattr(study, "EXPERIMENTS", [experiment, none])
    monkeypatch.setattr(study, "FOUND", {1: {"late no": 0.5}})
    monkeypatch.setattr(study, "draw", lambda *args: None)
    monkeypatch.setattr(study, "draw_study", lambda *args: None)
    study.page(tmp_path)
    text = (tmp_path / "shapes.md").read_text("utf-8")
    assert "| 1 | T | partly | 2 | 0 | 1 | reproduces |\n| 2 | T | not run yet | 0 | 0 | 0 |  |\n" in text
    assert "2 differences (2 in 1)." in text and "5 seeds, 5 trainings" in text
    assert "| late no * | -0.076 ± 0.067 | 0.500 | -0.100, 0.020, -0.100, -0.100, -0.100 | no |" in text
    assert "| row | 0.205 ± 0.016 (4) |" in text
    assert "| with a gap ** | 0.205 ± 0.016 (4) |  | 0.200, -, 0.220, 0.200, 0.200 | yes |" in text


def test_figures_show_what_the_page_says(tmp_path, monkeypatch):
    """Bars are the t intervals. Bins are of equally many classes, by frequency; rho is that of the set that is shown."""
    import matplotlib.pyplot as plt

    figures = []
    monkeypatch.setattr(plt, "close", figures.append)
    write_run(tmp_path, "sl")
    seed = study.Seed(tmp_path)
    count = np.array([7, 1, 40, 2, 90, 3, 5, 20, 6, 30, 50, 4, 60, 8, 70, 80])
    seed.files["sl"] |= {"classes": {"v2": {"count": count.tolist(), "images": [100] * 16, "right": count.tolist(),
                                            "predicted": (2 * count).tolist()}}}  # fmt: skip
    seed.files["sl"]["metrics"]["v2"] = {"top1": 0.5, "spearman_acc": 0.41, "spearman_pred": 0.42}
    study.draw_study({"seed0": seed}, tmp_path / "study.png")
    for axes, times, rho in zip(figures[0].axes, (0.01, 0.02), ("0.41", "0.42")):
        _, line = axes.lines[:2]
        low, high = np.sort(count).reshape(8, 2).T
        np.testing.assert_allclose(line.get_xdata(), np.sqrt(low * high))
        np.testing.assert_allclose(line.get_ydata(), (low + high) / 2 * times)
        assert line.get_label() == f"supervised, rho {rho}"
    e = dict(number=1, title="T", contrasts=[("x", lambda value: value)])
    study.draw(e, {"seed0": 1.0, "seed1": None, "seed2": 2.0}, tmp_path / "x.png")
    (bar,) = figures[1].axes[0].containers
    (ends,) = bar.lines[2][0].get_segments()
    np.testing.assert_allclose(ends[:, 0], [1.5 - 6.3531, 1.5 + 6.3531], atol=1e-4)
    for figure in figures:
        plt.figure(figure.number).clear()


def test_compact_and_shorten_keep_what_is_asked_for(tmp_path):
    """v2 too; numbers that are none become null; of evaluate.py's lists those of up to 200 numbers."""
    (tmp_path / "metrics.json").write_text('{"val": {"top1": 0.12345, "tail": NaN}}')
    np.savez(tmp_path / "v2.npz", labels=[1], predictions=[0], class_counts=[3, 4])
    study.compact(tmp_path, tmp_path / "out.json", "c")
    content = json.loads((tmp_path / "out.json").read_text())
    assert content["metrics"]["val"] == {"top1": 0.1235, "tail": None} and list(content["classes"]) == ["v2"]
    source = {"rows": {"a": {"values": [0.12345] * 200, "all": [0.12345] * 300, "rho": 1.0}}, "pairs": [0] * 999}
    (tmp_path / "source.json").write_text(json.dumps(source))
    study.shorten(tmp_path / "source.json", tmp_path / "short.json")
    assert json.loads((tmp_path / "short.json").read_text()) == {"rows": {"a": {"values": [0.1235] * 200, "rho": 1.0}}}


def test_compact_tells_zeros(tmp_path, capsys):
    row = {"top1": 0.8, "tail": 0.0, "spearman_acc": None, "spearman_pred": 0.2, "knn": 0.5}
    (tmp_path / "metrics.json").write_text(json.dumps({"val": row}))
    study.compact(tmp_path, tmp_path / "out.json", "c")
    assert capsys.readouterr().out == "top1 0.800  tail 0.000  spearman_pred 0.200  knn 0.500\n"


def test_text_embeddings_are_latent_semantic_analysis(tmp_path):
    """recipes/text_embeddings.py by a dense decomposition; signs and order of directions don't change inner products."""
    path = ROOT / "recipes" / "text_embeddings.py"
    spec = importlib.util.spec_from_file_location("text_embeddings", path)
    lsa = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(lsa)
    rng, words = np.random.default_rng(0), [f"w{i}" for i in range(80)]
    weights = 1 / np.arange(1, 81)
    captions = [" ".join(rng.choice(words, 9, p=weights / weights.sum())) for _ in range(90)] + ["a w1 W1"]
    (tmp_path / "corpus.tsv").write_text("\n".join(["caption", *captions]) + "\n")
    train, classes = ["w3 w4 w4", "new w5", "new"], ["w7", "w3 w4"]
    (tmp_path / "train.tsv").write_text("\n".join(["image\tcaption", *(f"x\t{text}" for text in train)]) + "\n")
    (tmp_path / "classes.tsv").write_text("\n".join(["name", *classes]) + "\n")
    lsa.main(*(tmp_path / f"{name}.tsv" for name in ("corpus", "train", "classes")), tmp_path / "out")
    vocabulary = sorted({word for text in captions for word in text.lower().split()})

    def table(texts):
        return np.log1p([[text.lower().split().count(word) for word in vocabulary] for text in texts])

    corpus = table(captions)
    idf = np.log(len(captions) / (corpus > 0).sum(0))
    directions = np.linalg.svd(corpus * idf)[2][:64]
    expected = table([*train, *(f"a {name}" for name in classes)]) * idf @ directions.T
    expected /= np.maximum(np.linalg.norm(expected, axis=1, keepdims=True), 1e-12)
    found = np.concatenate([np.load(tmp_path / "out.npy"), np.load(tmp_path / "out.classes.npy")])
    assert found.shape == (5, 64) and not found[2].any()
    np.testing.assert_allclose(found @ found.T, expected @ expected.T, atol=1e-5)
