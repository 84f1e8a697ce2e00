"""build_datasets.py, readers: every kind of table gives the same rows; bad input ends with file, line and reason."""

import contextlib
import csv
import gzip
import json
import os
import re
import shlex
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from programs import run_here

import build_datasets as bd

SCRIPT = Path(bd.__file__)
ROWS = [
    {"image": "a.jpg", "caption": 'a "cat", sat', "n": "1"},
    {"image": "b.jpg", "caption": "Käse — 日本 🐈", "n": ""},
    {"image": "c.jpg", "caption": " spaces  stay ", "n": "3"},
]


def write(folder, kind, rows=ROWS, columns=("image", "caption", "n")):
    path = folder / f"rows{kind}"
    if kind == ".parquet":
        pq.write_table(pa.table({c: [row[c] for row in rows] for c in columns}), path)
        return path
    if kind.startswith(".jsonl"):
        text = "".join(json.dumps(row) + "\n" for row in rows)
    elif kind.startswith(".csv"):
        with open(folder / "plain", "w", encoding="utf-8", newline="") as f:
            writer = csv.DictWriter(f, columns)
            writer.writeheader()
            writer.writerows(rows)
        text = (folder / "plain").read_text("utf-8")
    else:
        text = "\n".join("\t".join(line) for line in [columns, *([row[c] for c in columns] for row in rows)]) + "\n"
    path.write_bytes(gzip.compress(text.encode()) if kind.endswith(".gz") else text.encode())
    return path


@pytest.mark.parametrize("kind", [kind for kind in bd.TABLE_SUFFIXES if kind != ".tar"])  # tars: test_index.py
def test_all_kinds_give_the_same_rows(tmp_path, kind):
    path = str(write(tmp_path, kind))
    columns, rows = bd.open_tables([path])
    assert columns == ["image", "caption", "n"] and list(rows) == ROWS
    names, projected = bd.read_table(path, ["n", "caption"], is_all=False)
    assert names == ["n", "caption"] and [f for _, f in projected] == [[r["n"], r["caption"]] for r in ROWS]


def test_aliases_and_missing_columns(tmp_path):
    write(tmp_path, ".tsv", [{"FilePath": "a", "TEXT": "x", "wnid": "n01"}], ("FilePath", "TEXT", "wnid"))
    path = str(tmp_path / "rows.tsv")
    assert list(bd.open_tables([path])[1]) == [{"image": "a", "caption": "x", "label": "n01"}]
    assert bd.our_names(["title", "caption", "text"], "f") == ["title", "caption", "text"]
    assert bd.our_names(["title", "text"], "f") == ["title", "caption"]
    with pytest.raises(SystemExit, match=r"no column TEXT; found FilePath \(read as image\), TEXT \(read as caption\), wnid"):
        bd.read_table(path, ["TEXT"])


GOOD = b"image\tcaption\na\tb\n"
BAD = {
    "utf8": (".tsv", GOOD + b"c\t\xff\n", 3, r"not UTF-8 \(byte 0xff\)"),
    "nul": (".tsv", GOOD + b"c\t\0\n", 3, "a NUL byte"),
    "long": (".tsv", GOOD + b"c\t" + b"x" * (bd.MAX_LINE + 1) + b"\n", 3, "more than 10 MiB"),
    "ragged": (".tsv", GOOD + b"c\td\te\n", 3, "3 fields, but the header has 2"),
    "ragged csv": (".csv", b"image,caption\na,b\nc\n", 3, "1 fields, but the header has 2"),
    "quote": (".csv", b'image,caption\na,"b\n', 2, "not CSV"),
    "json": (".jsonl", b'{"a": 1}\n{"a": \n', 2, "not JSON"),
    "json list": (".jsonl", b'{"a": 1}\n[1]\n', 2, "a JSON list, expected an object"),
    "json array": (".jsonl", b'[{"a": 1}]\n', 1, "a JSON list, expected an object"),
    "json of many lines": (".jsonl", b'{\n "a": 1\n}\n', 1, "not JSON"),
    "double": (".tsv", b"image\tcaption\timage\n", 1, r"no or double names \(image\)"),
    "unnamed": (".csv", b"image,,caption\n", 1, "no or double names"),
    "empty": (".tsv", b"", 1, "an empty file"),
    "empty gz": (".tsv.gz", gzip.compress(b""), 1, "an empty file"),
    "zero gz": (".csv.gz", b"", 1, "an empty file"),
    "not gz": (".tsv.gz", GOOD, 1, "not gzip data"),
    "hidden gz": (".tsv", gzip.compress(GOOD), 1, "gzip data: its name must end in .gz"),
    "cut gz": (".tsv.gz", gzip.compress(os.urandom(9000).hex().encode())[:-40], 1, "damaged gzip data"),
    "parquet": (".parquet", b"PAR1 nothing", 1, "not readable as parquet"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_one_line(tmp_path, name):
    kind, content, line, reason = BAD[name]
    path = tmp_path / f"bad{kind}"
    path.write_bytes(content)
    with pytest.raises(SystemExit, match=rf"^{path}:{line}: .*{reason}") as error:
        list(bd.open_tables([str(path)])[1])
    assert "\n" not in str(error.value)


def test_bad_rows_are_counted_when_asked(tmp_path):
    path = tmp_path / "a.tsv"
    lines = [b"c\t\xff", b"d\te", b"f\t\0", b"g", b"h\t" + b"x" * (bd.MAX_LINE + 5), b"i\tj"]
    path.write_bytes(GOOD + b"\n".join(lines))
    bad = Counter()
    assert [row["image"] for row in bd.open_tables([str(path)], bad=bad)[1]] == ["a", "d", "i"]
    assert sum(bad.values()) == 4 and all(n == 1 for n in bad.values())


def test_lines_behind_an_open_quote_are_all_bad(tmp_path):
    (tmp_path / "a.csv").write_text('image,caption\na,b\nc,"d\n' + "e,f\n" * 9)
    bad, lines = Counter(), []
    assert [row["image"] for row in bd.open_tables([str(tmp_path / "a.csv")], bad=bad)[1]] == ["a"] and bad.total() == 10
    list(bd.open_tables([str(tmp_path / "a.csv")], bad=lines)[1])
    assert [line for _, line, _ in lines] == list(range(3, 13))


def test_lines_behind_one_that_is_left_out_keep_their_numbers(tmp_path):
    (tmp_path / "a.csv").write_bytes(b'image,caption\n\na,"b\n\nc"\nd,\xff\ne,f,g\nh,"i\n')
    bad = []
    rows = list(bd.read_table(str(tmp_path / "a.csv"), bad=bad)[1])
    assert [line for line, _ in rows] == [5] and [line for _, line, _ in bad] == [6, 7, 8]


def test_crlf_bom_and_quoted_line_breaks(tmp_path):
    (tmp_path / "a.tsv").write_bytes(b"\xef\xbb\xbfimage\tcaption\r\n\r\na\tb\r\n")
    (tmp_path / "b.csv").write_bytes(b'\xef\xbb\xbfimage,caption\r\na,"b\r\nc"\r\n')
    assert list(bd.open_tables([str(tmp_path / "a.tsv")])[1]) == [{"image": "a", "caption": "b"}]
    assert list(bd.open_tables([str(tmp_path / "b.csv")])[1]) == [{"image": "a", "caption": "b c"}]  # as in a TSV


def test_files_are_found(tmp_path):
    for name in ("b.tsv", "a.tsv", ".hidden.tsv", "notes.txt"):
        (tmp_path / name).write_bytes(GOOD)
    both = [str(tmp_path / "a.tsv"), str(tmp_path / "b.tsv")]
    assert bd.find_tables([str(tmp_path)]) == bd.find_tables([str(tmp_path / "*.tsv")]) == both
    for wrong, reason in (
        ([str(tmp_path / "none*")], "no such file"),
        ([str(tmp_path / "notes.txt")], "expected a name"),
        ([both[0], str(tmp_path)], "given twice"),
    ):
        with pytest.raises(SystemExit, match=reason):
            bd.find_tables(wrong)
    (tmp_path / "c.csv").write_bytes(b"image\n")
    with pytest.raises(SystemExit, match="kinds .csv, .tsv: name the files"):
        bd.find_tables([str(tmp_path)])
    (tmp_path / "none").mkdir()
    with pytest.raises(SystemExit, match="no table"):
        bd.find_tables([str(tmp_path / "none")])


@pytest.mark.parametrize("mode", [0o000, 0o400, 0o100])
@pytest.mark.parametrize("pattern", ["*/train.tsv", "**/*.tsv", "[ab]/*.tsv"])
def test_a_pattern_does_not_pass_over_folders_that_cannot_be_read(pattern, mode):
    """Root may read everything, so a child process without rights looks, in a folder that it could see."""
    with tempfile.TemporaryDirectory() as folder:
        os.chmod(folder, 0o755)
        for name in "ab":
            (Path(folder) / name).mkdir()
            (Path(folder) / name / "train.tsv").write_bytes(GOOD)
        os.chmod(f"{folder}/b", mode)
        reader, writer = os.pipe()
        child = os.fork()
        if not child:
            try:
                if os.geteuid() == 0:
                    os.setuid(65534)
                found = str(bd.find_tables([f"{folder}/{pattern}"]))
            except OSError as error:
                found = f"{error.filename}: {error.strerror}"
            os.write(writer, found.encode())
            os._exit(0)
        os.waitpid(child, 0)
        os.chmod(f"{folder}/b", 0o755)
        assert os.read(reader, 9999).decode() == f"{folder}/b/.: Permission denied"


def test_several_files_join_and_images_move(tmp_path):
    (tmp_path / "x").mkdir()
    (tmp_path / "x" / "a.tsv").write_text("image\tcaption\n0.tar:512:3\tA\n/abs/b.jpg\tB\nhttps://c/d.jpg\tC\n")
    (tmp_path / "b.tsv").write_text("image\ttags\nval.npy:3\tt\n")
    paths = [str(tmp_path / "x" / "a.tsv"), str(tmp_path / "b.tsv")]
    columns, rows = bd.open_tables(paths, ["image"], out=str(tmp_path / "y" / "out.tsv"))
    assert columns == ["image", "caption", "tags"]
    rows = list(rows)
    assert [row["image"] for row in rows] == ["../x/0.tar:512:3", "/abs/b.jpg", "https://c/d.jpg", "../val.npy:3"]
    assert rows[3]["caption"] == "" and rows[0]["tags"] == ""


FIELD = st.text(st.characters(exclude_categories=("Cs",)), max_size=8)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(FIELD, FIELD), min_size=1, max_size=5))
def test_writer_and_reader_round_trip(tmp_path_factory, pairs):
    path = tmp_path_factory.mktemp("trip") / "a.tsv"
    rows = [{"image": a, "caption": b} for a, b in pairs]
    bd.write_tsv(path, ("image", "caption"), rows)
    read = list(bd.open_tables([str(path)])[1])
    assert read == [{k: bd.tsv_field(v) for k, v in row.items()} for row in rows]


def test_report_and_half_written_tables(tmp_path, monkeypatch):
    out, source = tmp_path / "out.tsv", write(tmp_path, ".csv")

    def rows():
        yield ROWS[0]
        raise SystemExit("bad row")

    with pytest.raises(SystemExit, match="bad row"):
        bd.write_tsv(out, ("image",), rows())
    assert sorted(os.listdir(tmp_path)) == ["plain", "rows.csv"]
    bd.write_tsv(out, ("image",), ROWS)
    monkeypatch.setattr(sys, "argv", ["b.py", "label", "a b.csv", "--merge"])
    bd.write_report(str(out), [str(source)], {"seed": 0}, {"rows in": 3, "lost": -1, "rows out": 2}, extra=[1])
    report = json.loads(Path(f"{out}.json").read_text())
    digest = subprocess.run(["sha256sum", source], capture_output=True, text=True, check=True).stdout.split()[0]
    assert report["inputs"] == [{"path": str(source), "bytes": source.stat().st_size, "sha256": digest}]
    assert list(report)[-1] == "date" and report["funnel"] == {"rows in": 3, "lost": -1, "rows out": 2}
    assert report["extra"] == [1] and len(report["script"]) == 64
    assert report["command"] == "python b.py label 'a b.csv'"  # without the shards' parts there is nothing to merge


def write_keys(path, n, empty=()):
    """A JSONL of rows that each have three keys of their own. Returns: the rows."""
    rows = [dict(image=f"{i}.jpg", label=i % 3, caption=f"a lion {i}", url=f"http://x/{i}") for i in range(n)]
    for i, row in enumerate(rows):
        row.update({f"k{i}_{j}": [None, "", f"v{i}"][j] for j in range(3)}, **dict.fromkeys(empty, "") if i % 2 == 0 else {})
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return rows


def test_rows_of_thousands_of_keys(tmp_path, monkeypatch):
    """Empty fields are not held, but the tables are those of rows that hold all."""
    monkeypatch.chdir(tmp_path)
    rows = write_keys(tmp_path / "a.jsonl", 300, empty=["image"])
    columns = list(dict.fromkeys(key for row in rows for key in row))
    want = [{c: bd.tsv_field(row.get(c)) for c in columns} for row in rows]
    run_here(bd, "mix", "a.jsonl", "--out", "o.tsv")
    (tmp_path / "classes.tsv").write_text("name\nlion\ncat\nstar\n")
    run_here(bd, "label", "a.jsonl", "--classes", "classes.tsv", "--workers", 1, "--out", "l.tsv")
    for path in ("o.tsv", "l.tsv"):
        header, *lines = (line.split("\t") for line in Path(path).read_text().splitlines())
        got = [dict(zip(header, line, strict=True)) for line in lines]
        assert [{c: row[c] for c in columns} for row in got] == [
            row | ({} if path == "o.tsv" else {"label": "0"}) for row in want
        ]  # fmt: skip
        for line, (_, row) in zip(got, bd.read_table(path)[1], strict=True):  # 900 columns, read as rows of few
            assert len(row) < 12 and "image" in row and row["k0_0"] == line["k0_0"] and {**row}.items() <= line.items()
    for path in ("o.tsv", "a.jsonl"):
        with pytest.raises(SystemExit):
            run_here(bd, "check", path, "--workers", 1, "--out", "bad.tsv")
        assert len((tmp_path / "bad.tsv").read_text().splitlines()) == 301  # the first row's image is empty, not no column


def test_time_is_in_proportion_to_rows_not_to_rows_times_keys(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "classes.tsv").write_text("name\nlion\ncat\nstar\n")
    for n in (1000, 2000):
        write_keys(tmp_path / f"{n}.jsonl", n)
    for command in ("frequency {}.jsonl --classes classes.tsv --match word --workers 1", "mix {}.jsonl", "stats {}.jsonl"):
        seconds = {}
        for n in (1000, 2000) * 3:
            start = time.process_time()
            run_here(bd, *command.format(n).split(), "--out", "o.tsv")
            seconds[n] = min(seconds.get(n, 99), time.process_time() - start)
        assert seconds[2000] < 3 * seconds[1000], (command, seconds)


COMMANDS = "shapes index classes incaps label laionet metadata curate frequency status check dedup prune subset mix stats"


@pytest.mark.parametrize("command", COMMANDS.split())
def test_help_says_what_goes_in_and_has_an_example_that_parses(command, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "4000")
    with pytest.raises(SystemExit) as error:
        bd.parse_args([command, "--help"])
    text = capsys.readouterr().out
    example = re.search(rf"^example: python build_datasets.py ({command} .*)$", text, re.MULTILINE)
    assert error.value.code == 0 and example and len(text.splitlines()[2]) > 20
    assert bd.parse_args(shlex.split(example[1])).command == command
    for option in "--threshold=nan", "--max-bad=nan", "--cosine=nan":
        if option.split("=")[0] in text:
            with pytest.raises(SystemExit):
                bd.parse_args([*shlex.split(example[1]), option])


def test_rows_of_ten_megabytes_do_not_add_up(tmp_path):
    """24 rows of 8 MiB take less memory than 12 of them would, beside what a command takes anyway."""
    peaks = []
    for n_chars in 8, 2**23:
        with gzip.open(tmp_path / "a.tsv.gz", "wt", compresslevel=1) as f:
            f.write("image\tnote\n")
            f.writelines(f"{i}.jpg\t{i}{'x' * n_chars}\n" for i in range(24))
        code = "import build_datasets as b; b.main(b.parse_args())\n"
        code += "print(open('/proc/self/status').read().split('VmHWM:')[1].split()[0])"  # of this program alone
        command = [sys.executable, "-c", code, "dedup", tmp_path / "a.tsv.gz", "--by", "note", "--out", tmp_path / "o.tsv"]
        done = subprocess.run([*map(str, command)], cwd=SCRIPT.parent, capture_output=True, text=True)
        assert done.returncode == 0 and "24  rows left" in done.stdout, done.stderr
        peaks.append(int(done.stdout.split()[-1]) / 1024)
    assert peaks[1] - peaks[0] < 12 * 8, peaks


def test_chunks_end_by_rows_and_by_characters():
    rows = [(i, ["x" * (2**20 if i % 3 else 5)]) for i in range(40)]
    chunks = list(bd.in_chunks(rows, lambda row: row[1], 256))
    assert sum(chunks, []) == rows and {len(chunk) for chunk in chunks[:-1]} == {15}  # 10 of 1 MiB and 5 others
    assert [len(chunk) for chunk in bd.in_chunks(rows[::3], lambda row: row[1], 5)] == [5, 5, 4]


def test_reports_name_all_that_was_read(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    np.save("p.npy", np.arange(3 * 192, dtype=np.uint8).reshape(3, 8, 8, 3))
    for name in ("e", "small", "test"):
        np.save(f"{name}.npy", np.eye(3, dtype=np.float32))
    bd.write_tsv("t.tsv", ("image", "label", "caption"), [dict(image=f"p.npy:{i}", label=i, caption=f"c{i}") for i in range(3)])
    bd.write_tsv("a.tsv", ("image",), [dict(image="p.npy:0")])
    bd.write_tsv("classes.tsv", ("name",), [dict(name=name) for name in "xyz"])
    bd.write_tsv("counts.tsv", ("name", "count"), [dict(name=name, count=1) for name in "xyz"])
    Path("list").write_text("x\nz\n")
    for read, command in (
        ("t classes", "check t.tsv --workers 1"),
        ("t e.npy a test.npy", "dedup t.tsv --by embedding --embeddings e.npy --against a.tsv --against-embeddings test.npy"),
        ("t e.npy small.npy test.npy", "prune t.tsv --embeddings e.npy --small small.npy --tests val=test.npy"),
        ("t counts list classes", "subset t.tsv --match-frequency counts.tsv --class-list list"),
        ("t a classes", "stats t.tsv a.tsv"),
        ("t", "mix t.tsv"),
        ("list", "classes list"),
    ):
        if command.startswith("dedup"):
            np.save("test.npy", np.eye(3, dtype=np.float32)[:1])
        out = "o-{set}.tsv" if command.startswith("prune") else "o-val.tsv"
        with contextlib.suppress(SystemExit):  # check always exits
            run_here(bd, *command.split(), "--out", out)
        found = {os.path.relpath(entry["path"]): entry["sha256"] for entry in json.loads(Path("o-val.tsv.json").read_text())["inputs"]}
        names = [name if "." in name or name == "list" else f"{name}.tsv" for name in read.split()]
        assert found == {name: bd.file_hash(name) for name in names}, command
