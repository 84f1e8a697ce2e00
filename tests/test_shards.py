"""Shards over torchrun's ranks and over Spark's tasks give the bytes of one process; folders that can't be read."""

import json
import os
import sys

import programs
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

CAPTIONS = ["one sea lion", "Simba!", "a lion and a crane", "nothing", "sealion, lions", "crane crane", "the lion sits"]
COMMANDS = {
    "frequency": ["--classes", "classes.tsv", "--match", "word", "--sample", "2"],
    "label": ["--classes", "classes.tsv"],
    "curate": ["--metadata", "entries.tsv", "--cap", "20"],
}


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    """A folder with five parquet shards, classes and entries."""
    folder = tmp_path_factory.mktemp("shards")
    (folder / "classes.tsv").write_text("name\tsynonyms\nsea lion\t\nlion\tsimba\ncrane\t\n")
    (folder / "entries.tsv").write_text("entry\nlion\ncrane\nsea lion\nSimba\n")
    (folder / "in").mkdir()
    for i in range(5):
        captions = [f"{caption} {i} {j}" for j in range(9 + i) for caption in CAPTIONS]
        urls = [f"http://x/{i}/{j}" for j in range(len(captions))]
        pq.write_table(pa.table(dict(url=urls, caption=captions)), folder / "in" / f"{i:05}.parquet")
    return folder


def results(shards, out):
    """Bytes of all tables that a command wrote as `out`, and its report without what tells the run."""
    tables = {path.name.removeprefix(out): path.read_bytes() for path in sorted(shards.glob(f"{out}.*tsv"))}
    report = json.loads((shards / f"{out}.tsv.json").read_text())
    return tables, json.dumps({k: v for k, v in report.items() if k not in ("command", "date", "outputs")}).replace(out, "OUT")


def build(shards, command, out, *flags, **kwargs):
    script = programs.ROOT / "build_datasets.py"
    return programs.run(
        script, command, "in", *COMMANDS[command], "--out", f"{out}.tsv", *flags, cwd=shards, folder="/", **kwargs
    )


@pytest.mark.parametrize("command", COMMANDS)
def test_torchrun_equals_one_process(shards, command):
    build(shards, command, f"{command}1", "--workers", 1)
    done = build(shards, command, f"{command}2", "--workers", 1, processes=2)
    assert "shard 1/2" in done.stdout and "--merge" not in done.stdout  # rank 0 has done that
    one, two = results(shards, f"{command}1"), results(shards, f"{command}2")
    assert one == two and len(one[0]) >= 1 and all(table.count(b"\n") > 3 for table in one[0].values())
    assert not list(shards.glob("*.parts"))


@pytest.mark.parametrize("command", ["frequency", "curate"])
def test_spark_equals_one_process(shards, command):
    pytest.importorskip("pyspark", reason="pip install pyspark, and Java")
    build(shards, command, f"{command}3", "--workers", 1)
    flags = [3, command, "in", *COMMANDS[command], "--out", f"{command}4.tsv"]
    env = {**programs.ENV, "PYSPARK_PYTHON": sys.executable, "SPARK_LOCAL_IP": "127.0.0.1"}
    programs.run(programs.ROOT / "recipes" / "spark.py", *flags, cwd=shards, folder="/", env=env)
    assert results(shards, f"{command}3") == results(shards, f"{command}4")


@pytest.mark.skipif(os.geteuid() == 0, reason="root reads every folder")
def test_folders_that_cannot_be_read(tmp_path):
    script = programs.ROOT / "build_datasets.py"
    tables, images = tmp_path / "tables", tmp_path / "images"
    tables.mkdir()
    (tables / "a.tsv").write_text("caption\nx\n")
    (tmp_path / "entries.tsv").write_text("entry\nx\n")
    for name in ("cat", "dog"):
        (images / name).mkdir(parents=True)
        (images / name / "1.jpg").write_bytes(b"x")
    locked = {tables: ["curate", tables, "--metadata", tmp_path / "entries.tsv"], images / "dog": ["index", images]}
    for folder, command in locked.items():
        folder.chmod(0)
        done = programs.run(script, *command, "--out", tmp_path / "out.tsv", check=False, folder="/")
        folder.chmod(0o700)
        assert done.returncode == 2 and done.stdout == f"{folder}: Permission denied\n"
        assert not (tmp_path / "out.tsv").exists()
