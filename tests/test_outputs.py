"""build_datasets.py: no output replaces an input, and after bad input or on a full disk no part of a file stays."""

import contextlib
import io
import json

import pytest

import build_datasets as bd


def run(*args):
    with contextlib.redirect_stdout(io.StringIO()):
        bd.main(bd.parse_args([*map(str, args)]))


@pytest.fixture
def data(tmp_path, monkeypatch):
    """Class lists, entries and two tables; the work is done in their folder."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "im").mkdir()
    (tmp_path / "im" / "classes.tsv").write_text("name\tsynonyms\tdefinition\twnid\nlion\t\ta cat\tn00000001\n")
    rows = "".join(f"n00000001_{i}.jpg\t0\ta lion {i}\n" for i in range(2000))
    (tmp_path / "im" / "t.tsv").write_text(f"image\tlabel\tcaption\n{rows}")
    (tmp_path / "entries.tsv").write_text("entry\nlion\ncat\n")
    record = dict(filename="n00000001_1.jpg", wnid="n00000001", title="a lion", description="", tags=[])
    (tmp_path / "captions.json").write_text(json.dumps([record]))
    return tmp_path


@pytest.mark.parametrize("command", [
    "incaps captions.json --images im/t.tsv --classes im/classes.tsv --out im/t.tsv",
    "stats im/t.tsv --out im/classes.tsv",
    "subset im/t.tsv --fraction 0.5 --out im/classes.tsv",
    "check im/t.tsv --sample 1 --workers 1 --out im/classes.tsv",
])  # fmt: skip
def test_no_output_replaces_an_input(data, command):
    before = {path: path.read_bytes() for path in data.rglob("*.*")}
    with pytest.raises(SystemExit, match="which it would replace, is an input"):
        run(*command.split())
    assert {path: path.read_bytes() for path in data.rglob("*.*")} == before
