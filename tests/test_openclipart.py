"""recipes/openclipart.sh from end to end, on a folder laid out as Debian's packages are."""

import os
import subprocess
import sys

import numpy as np
import programs
import pytest
from PIL import Image

WORDNET = "/usr/share/wordnet"
RECIPE = programs.ROOT / "recipes" / "openclipart.sh"
SVG = """<svg xmlns:rdf="http://www.w3.org/1999/02/22-rdf-syntax-ns#" xmlns:cc="http://web.resource.org/cc/"
xmlns:dc="http://purl.org/dc/elements/1.1/"><metadata><rdf:RDF><cc:Work><dc:title>{}</dc:title><dc:subject><rdf:Bag>{}
</rdf:Bag></dc:subject><dc:creator><cc:Agent><dc:title>Someone</dc:title></cc:Agent></dc:creator></cc:Work></rdf:RDF>
</metadata></svg>"""


def recipe(tmp_path, **env):
    env = {**programs.ENV, "PYTHON": sys.executable, "OUT": str(tmp_path / "out"), "STEPS": "1", "WORKERS": "1", **env}
    return subprocess.run(["bash", RECIPE], env=env, capture_output=True, text=True)


def add(folder, name, pixels, title, tags):
    for kind in ("png", "svg"):
        (folder / kind / name).parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(folder / "png" / f"{name}.png")
    items = "".join(f"<rdf:li>{tag}</rdf:li>" for tag in tags)
    (folder / "svg" / f"{name}.svg").write_text(SVG.format(title, items))


@pytest.mark.skipif(not os.path.isfile(f"{WORDNET}/data.noun"), reason="WordNet's files are not here")
def test_recipe(tmp_path):
    rng, clipart = np.random.default_rng(0), tmp_path / "clipart"
    pixels = rng.integers(0, 256, (211, 16, 16, 3), dtype=np.uint8)
    for i in range(200):
        add(
            clipart,
            f"animals/{i}",
            pixels[i],
            f"My {i % 100}",
            ["Dog" if i % 3 else "cat", "qwxz", "rare" if i < 2 else ""],
        )
    for i in range(7):
        add(clipart, f"copies/{i}", pixels[200], "A copy", ["tree"])
    add(clipart, "no_tags", pixels[201], "No tags", [])
    add(clipart, "no_title", pixels[202], "", ["dog"])
    add(clipart, "no_svg", pixels[203], "No file", ["dog"])
    (clipart / "svg" / "no_svg.svg").unlink()
    done = recipe(tmp_path, CLIPART=str(clipart))
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    assert "207 with title and tags" in done.stdout and "1 no tags" in done.stdout and "1 no title" in done.stdout
    lines = (tmp_path / "out" / "funnel.tsv").read_text().splitlines()[1:]
    funnel = {step: int(n) for step, n in (line.split("\t") for line in lines)}
    assert funnel["pictures of the packages"] == 210 and funnel["index: with title and tags"] == 207
    train = funnel["index: not in val.tsv"]
    assert funnel["check: decoded"] == train and 160 < train < 207
    n = funnel["dedup --against val.tsv"]  # the copies: one is left, or none if val.tsv has one
    assert 0 <= train - funnel["dedup: no copies"] <= 6 and funnel["dedup: no copies"] - n in (0, 1)
    names = (tmp_path / "out" / "names.txt").read_text().split()
    assert names == ["dog", "cat"]  # "qwxz" is no noun, "tree" and "rare" are on too few
    assert n - 1 <= funnel["label --multi drop: name one class"] <= n  # all but the copy's caption
    assert funnel["subset --shots 16: labels"] == 32
    assert funnel["curate: balanced"] in (n - 1, n)  # each holds a number that is rarer than the cap, but for the copy


def test_recipe_without_the_packages(tmp_path):
    done = recipe(tmp_path, CLIPART=str(tmp_path))
    assert done.returncode == 1 and "apt install openclipart-png" in done.stderr
    assert not (tmp_path / "out").exists()
