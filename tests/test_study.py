"""recipes/shapes_results.py: the rule of the verdict, and what is kept of a run."""

import importlib.util
import json

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
