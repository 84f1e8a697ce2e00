"""build_datasets.py: no output replaces an input, and after bad input or on a full disk no part of a file stays."""

import contextlib
import errno
import io
import json
import os
import re
import resource
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from programs import ENV

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


def on_a_full_disk(n, *args):
    """The OSError of a command whose writes beyond n bytes of a file fail, or None."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (n, hard))  # Python ignores SIGXFSZ
    try:
        run(*args)
    except OSError as error:
        return error
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.parametrize("command, kinds", [
    ("label im/t.tsv --classes im/classes.tsv --workers 1 --out out/x.tsv", "npz.tsv npz tsv.json"),
    ("frequency im/t.tsv --classes im/classes.tsv --sample 20 --workers 1 --out out/x.tsv", "npz tsv.json"),
    ("curate im/t.tsv --metadata entries.tsv --cap 20 --workers 1 --out out/x.tsv", "npz.rows npz tsv.json"),
    ("stats im/t.tsv --plot out/x.png --out out/x.tsv", "png"),
])  # fmt: skip
def test_full_disk(data, command, kinds):
    """Whatever file finds the disk full, the error names it, and what is there under its last name is whole."""
    if "--plot" in command:
        pytest.importorskip("matplotlib")
    failed = set()
    for n_rows in (2000, 1):  # the report is the smallest file, or the largest
        lines = (data / "im" / "t.tsv").read_text().splitlines(keepends=True)
        (data / "im" / "t.tsv").write_text("".join([lines[0], *lines[-n_rows:]]))
        run(*command.replace("out/", "whole/").split())
        for n in (*range(50, 2400, 350), 10_000, 25_000, 100_000):
            error = on_a_full_disk(n, *command.split())
            there = [path for path in (data / "out").rglob("*") if path.is_file()]
            assert not [path.name for path in there if path.name.endswith(".partial")]
            if error is None:
                break
            assert not (data / "out" / "x.tsv").exists()  # without its report
            assert error.errno == errno.EFBIG and error.filename.startswith("out/x."), (n, error)
            assert all(path.stat().st_size <= n and str(path.relative_to(data)) != error.filename for path in there)
            failed.add(Path(error.filename).name.split(".", 1)[1])
            shutil.rmtree("out")
        assert error is None and (data / "out" / "x.tsv").read_bytes() == (data / "whole" / "x.tsv").read_bytes()
        shutil.rmtree("out")
    assert failed == set(kinds.split())


def test_no_table_has_the_report_of_another(data, monkeypatch):
    """When a report is replaced its old table is gone, so a kill leaves no such pair, and the parts have another name,
    since another process may begin its own as soon as the lock is off."""
    command, seen, replace = "label im/t.tsv --classes im/classes.tsv --workers 1 --out x.tsv", [], os.replace

    def spy(source, target):
        if str(target) == "x.tsv.json":
            seen.append(sorted(path.name for path in data.glob("x.tsv*")))
        replace(source, target)

    monkeypatch.setattr(os, "replace", spy)
    for _ in range(2):
        run(*command.split())
    assert seen[1] == ["x.tsv.json", "x.tsv.json.partial", "x.tsv.partial", "x.tsv.parts.old"]
    assert sorted(path.name for path in data.glob("x.tsv*")) == ["x.tsv", "x.tsv.json"]


REPORTED = [
    "label im/t.tsv --classes im/classes.tsv --workers 1",
    "classes list.txt",
    "incaps captions.json --images im/t.tsv --classes im/classes.tsv",
    "metadata im/t.tsv",
    "dedup im/t.tsv --by caption --workers 1",
    "subset im/t.tsv --fraction 0.5",
    "mix im/t.tsv",
    "stats im/t.tsv",
]


@pytest.mark.parametrize("command", REPORTED)
def test_no_table_without_its_report(data, command, monkeypatch):
    """If the report fails the old table and the old report stay; a report that has no place is said before the work."""
    (data / "list.txt").write_text("lion\ncat\n")
    run(*command.split(), "--out", "x.tsv")
    old = {path.name: path.read_bytes() for path in data.glob("x.tsv*")}
    assert set(old) == {"x.tsv", "x.tsv.json"}
    (data / "list.txt").write_text("lion\n")
    with open(data / "im" / "t.tsv", "a") as f:
        f.write("new.jpg\t0\ta new lion\n")

    def full(path):
        raise OSError(errno.ENOSPC, "No space left on device", "x.tsv.json")

    with monkeypatch.context() as patch:
        patch.setattr(bd, "facts_of", full)
        with pytest.raises(OSError, match="No space"):
            run(*command.split(), "--out", "x.tsv")
    assert {path.name: path.read_bytes() for path in data.glob("x.tsv*") if path.is_file()} == old
    (data / "y.tsv.json").mkdir()
    with monkeypatch.context() as patch:
        patch.setattr(bd, "run_command", lambda args: pytest.fail("work was begun"))
        with pytest.raises(SystemExit, match="y.tsv.json: is a folder, expected the name of a file"):
            run(*command.split(), "--out", "y.tsv")
    assert [path.name for path in data.glob("y.tsv*")] == ["y.tsv.json"]


def test_what_a_killed_run_leaves_is_no_table(data, monkeypatch, capsys):
    code = "import os, build_datasets as b; {}; b.main(b.parse_args('label im/t.tsv --classes im/classes.tsv --out x.tsv'.split()))"
    for killed, there in (
        ("b.facts_of = lambda path: os._exit(9)", {"x.tsv.partial", "x.tsv.json.partial", "x.tsv.parts"}),
        ("move = os.replace; os.replace = lambda a, b: os._exit(9) if b == 'x.tsv' else move(a, b)",
         {"x.tsv.partial", "x.tsv.json", "x.tsv.parts.old"}),
    ):  # fmt: skip
        command = [sys.executable, "-c", code.format(killed)]
        done = subprocess.run(command, env={**ENV, "PYTHONPATH": str(Path(bd.__file__).parent)})
        assert done.returncode == 9 and {path.name for path in data.glob("x.tsv*")} == there
        with pytest.raises(SystemExit, match="x.tsv.partial: what a killed run left; expected a name"):
            bd.find_tables(["x.tsv.partial"])
        run("label", "im/t.tsv", "--classes", "im/classes.tsv", "--workers", 1, "--out", "x.tsv")
        assert capsys.readouterr().err == "note: x.tsv.partial is of a run that was killed; it is made anew\n"
        assert {path.name for path in data.glob("x.tsv*")} == {"x.tsv", "x.tsv.json"}
        shutil.rmtree("x.tsv.parts", ignore_errors=True)
        (data / "x.tsv").unlink()
        (data / "x.tsv.json").unlink()


def test_a_table_is_of_one_process(data):
    """A second run with the same OUT ends with a line, and the first has its table."""
    flags = ["label", "im/t.tsv", "--classes", "im/classes.tsv", "--workers", 1, "--out", "x.tsv"]
    with bd.with_reports(["x.tsv"], []):
        with pytest.raises(SystemExit, match="x.tsv: another process is writing it"):
            run(*flags)
        assert {path.name for path in data.glob("x.tsv*")} == {"x.tsv.json.partial"}
        with pytest.raises(SystemExit, match="x.tsv: another"), bd.with_reports(["w.tsv", "x.tsv"], []):
            pytest.fail("it was begun")
        assert not list(data.glob("w.tsv*"))
    run(*flags)
    assert bd.json.loads((data / "x.tsv.json").read_text())["outputs"][0]["sha256"] == bd.file_hash("x.tsv")


def test_a_share_takes_no_place(data):
    """What other shards hold open stays; the table is of the process that merges."""
    (data / "x.tsv.json.partial").touch()
    (data / "x.tsv.partial").touch()
    flags = ["label", "im/t.tsv", "--classes", "im/classes.tsv", "--workers", 1, "--out", "x.tsv"]
    run(*flags, "--shard", "0/2")
    assert {path.name for path in data.glob("x.tsv*")} == {"x.tsv.partial", "x.tsv.json.partial", "x.tsv.parts"}
    run(*flags, "--merge")
    assert {path.name for path in data.glob("x.tsv*")} == {"x.tsv", "x.tsv.json"}


def test_full_disk_is_one_line(data):
    command = [sys.executable, bd.__file__, "curate", "im/t.tsv", "--metadata", "entries.tsv", "--out", "x.tsv"]
    limit = lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (9000, 9000))  # noqa: E731
    done = subprocess.run(command, preexec_fn=limit, capture_output=True, text=True)
    assert done.returncode == 2 and re.fullmatch(r"x\.tsv\.parts/\w+\.npz\.rows: File too large\n", done.stderr)


def test_no_empty_folder_of_parts(data):
    (data / "bad.tsv").write_text("url\nx\n")
    flags = ["--classes", "im/classes.tsv", "--workers", 1, "--out", "x.tsv"]
    for command in (["bad.tsv"], ["im/t.tsv", "--merge"]):
        with pytest.raises(SystemExit, match="caption|no result yet"):
            run("label", *command, *flags)
        assert not (data / "x.tsv.parts").exists()
    with pytest.raises(SystemExit):
        run("label", "bad.tsv", "im/t.tsv", *flags, "--shard", "0/2")
    assert (data / "x.tsv.parts").is_dir()  # another shard may be about to write into it
    run("label", "bad.tsv", "im/t.tsv", *flags, "--shard", "1/2")
    with pytest.raises(SystemExit, match="caption"):
        run("label", "bad.tsv", "im/t.tsv", *flags)
    assert len(list((data / "x.tsv.parts").iterdir())) == 2  # what is done is kept


def test_plot_that_cannot_be_written(data, monkeypatch):
    pytest.importorskip("matplotlib")
    run("stats", "im/t.tsv", "--out", "x.tsv", "--plot", "new/x.png")
    assert (data / "new" / "x.png").exists()
    monkeypatch.setattr(bd, "find_tables", lambda paths: pytest.fail("a table was read"))
    monkeypatch.setattr(bd, "check_out", lambda args: None)
    with pytest.raises(OSError) as error:
        run("stats", "im/t.tsv", "--out", "y.tsv", "--plot", "entries.tsv/x.png")
    assert error.value.filename.endswith("entries.tsv") and not (data / "y.tsv").exists()
    monkeypatch.undo()
    monkeypatch.chdir(data)
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(SystemExit, match="--plot needs matplotlib"):
        run("stats", "im/t.tsv", "--out", "y.tsv", "--plot", "x.png")
    assert not (data / "y.tsv").exists()
