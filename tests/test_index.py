"""build_datasets.py index: positions in tars, damaged tars, folders, columns, hold-out, messages, speed and memory."""

import contextlib
import hashlib
import io
import json
import os
import resource
import shutil
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

ROOT = os.environ.get("BUILD_DATASETS_DIR", str(Path(__file__).resolve().parents[1]))
sys.path.insert(0, ROOT)
import build_datasets as bd  # noqa: E402

FORMATS = {"ustar": tarfile.USTAR_FORMAT, "gnu": tarfile.GNU_FORMAT, "pax": tarfile.PAX_FORMAT}


def add(tar, name, payload, **attributes):
    member = tarfile.TarInfo(name)
    member.size = len(payload)
    for key, value in attributes.items():
        setattr(member, key, value)
    tar.addfile(member, io.BytesIO(payload))


def make_tar(path, members, tar_format="pax", **attributes):
    """members: list of (name, payload). A float mtime puts a pax header before every member, as webdataset does."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w", format=FORMATS[tar_format]) as tar:
        for name, payload in members:
            add(tar, name, payload, **attributes)
    return path


def sample(key, caption="a cat", image=b"pixels", fields=None):
    members = [(f"{key}.jpg", image), (f"{key}.txt", caption.encode())]
    return members + ([(f"{key}.json", json.dumps(fields).encode())] if fields is not None else [])


def index(*args, out):
    bd.main(bd.parse_args(["index", *map(str, args), "--out", str(out)]))
    return read(out)


def read(path):
    """Rows as dicts; a strict reader: equal numbers of fields on all lines, bytes split at tabs and newlines only."""
    lines = path.read_bytes().split(b"\n")
    assert lines.pop() == b""
    header, *rows = [line.decode().split("\t") for line in lines]
    assert all(len(row) == len(header) for row in rows)
    return [dict(zip(header, row, strict=True)) for row in rows]


def image_bytes(table, row):
    path, offset, size = row["image"].rsplit(":", 2)
    with open(table.parent / path, "rb") as f:
        f.seek(int(offset))
        return f.read(int(size))


def report(out):
    return json.loads(Path(f"{out}.json").read_text(encoding="utf-8"))


# ------------------------------------------------------------------------------ tar


def positions(path):
    reader = bd.TarReader(path)
    with reader.file:
        return list(reader), reader.problem


def tarfile_positions(path):
    with tarfile.open(path, encoding="utf-8") as tar:
        return [(m.name, m.offset_data, m.size) for m in tar if m.isfile()]


letters = st.characters(codec="utf-8", exclude_characters="\0/", exclude_categories=["Cs", "Cc"])
parts = st.text(letters, min_size=1, max_size=130).filter(lambda part: part not in (".", ".."))
paths = st.lists(parts, min_size=1, max_size=4).map("/".join)
members_of_any_kind = st.tuples(paths, st.binary(max_size=1500), st.sampled_from("fffds"), st.booleans())


@pytest.mark.parametrize("tar_format", FORMATS)
@settings(max_examples=80, deadline=None, suppress_health_check=list(HealthCheck))
@given(members=st.lists(members_of_any_kind, max_size=6), has_shared=st.booleans())
def test_positions_equal_tarfile(tmp_path, tar_format, members, has_shared):
    path, written = tmp_path / "a.tar", 0
    shared = {"comment": "for all members"} if has_shared and members and tar_format == "pax" else {}
    with tarfile.open(path, "w", format=FORMATS[tar_format], encoding="utf-8", pax_headers=shared) as tar:
        for name, payload, kind, has_time in members:
            attributes = {"mtime": 1.5} if has_time and tar_format == "pax" else {}
            try:
                if kind == "f":
                    add(tar, name, payload, **attributes)
                elif kind == "d":
                    add(tar, name, b"", type=tarfile.DIRTYPE)
                else:
                    add(tar, name, b"", type=tarfile.SYMTYPE, linkname=name)
                written += kind == "f"
            except ValueError:  # ustar cannot hold such a long name
                assert tar_format == "ustar"
    found, problem = positions(path)
    assert found == tarfile_positions(path)
    assert len(found) == written and problem == ""


def test_pax_size_and_base_256_override_the_header(tmp_path):
    member = tarfile.TarInfo("a.jpg")
    member.size = 1000
    block = bytearray(member.tobuf(tarfile.USTAR_FORMAT))
    block[124:136] = bytes([0x80]) + (1000).to_bytes(11, "big")
    block[148:156] = b"%06o\0 " % (sum(block) - sum(block[148:156]) + 256)
    record = b"13 size=1000\n"
    plain = tarfile.TarInfo("b.jpg").tobuf(tarfile.USTAR_FORMAT)
    header = tarfile.TarInfo("x")
    header.type, header.size = tarfile.XHDTYPE, len(record)
    pax = header.tobuf(tarfile.USTAR_FORMAT) + record.ljust(512, b"\0")
    data = b"y" * 1000 + bytes(24)
    (tmp_path / "a.tar").write_bytes(bytes(block) + data + pax + plain + data + bytes(1024))
    assert positions(tmp_path / "a.tar") == ([("a.jpg", 512, 1000), ("b.jpg", 3072, 1000)], "")
    assert tarfile_positions(tmp_path / "a.tar") == [("a.jpg", 512, 1000), ("b.jpg", 3072, 1000)]


def test_pax_header_before_every_member(tmp_path):
    path = make_tar(tmp_path / "a.tar", sample("0") + sample("1"), mtime=1700000000.25)
    found, _ = positions(path)
    assert found[0] == ("0.jpg", 1536, 6)  # 512 + 512 pax, then the member's own header
    assert found == tarfile_positions(path)


def checked(block):
    """A header with the checksum that goes with it."""
    return bytes(block[:148]) + b"%06o\0 " % (sum(block) - sum(block[148:156]) + 256) + bytes(block[156:])


def test_sparse_files_and_links_hide_no_member(tmp_path):
    """A map of holes goes on behind its header; a hard link's size is that of its target, and no data follow."""
    hole, link, plain = (bytearray(header(name, size)) for name, size in (("h.jpg", 512), ("l.jpg", 700), ("a.jpg", 6)))
    hole[156:157], hole[257:265], hole[482], hole[483:495] = b"S", b"ustar  \0", 1, b"%011o\0" % 9000
    link[156:157], link[157:162] = b"1", b"a.jpg"
    plain[257:265], plain[345:357] = b"ustar  \0", b"14000000000\0"  # old GNU's has the time of access there, no folder
    more = [bytes(504) + bytes([is_extended]) + bytes(7) for is_extended in (1, 0)]
    blocks = [checked(hole), *more, bytes(512), checked(link), checked(plain), b"pixels".ljust(512, b"\0")]
    (tmp_path / "a.tar").write_bytes(b"".join(blocks) + bytes(1024))
    assert positions(tmp_path / "a.tar") == ([("a.jpg", 3072, 6)], "")
    with tarfile.open(tmp_path / "a.tar") as tar:
        assert [(m.offset_data, m.size) for m in tar][2] == (3072, 6)


def test_a_member_s_own_pax_fields_win_and_sparse_ones_are_no_images(tmp_path):
    with tarfile.open(tmp_path / "a.tar", "w", format=tarfile.PAX_FORMAT, pax_headers={"path": "shared.jpg"}) as tar:
        add(tar, "0.jpg", b"pixels", pax_headers={"path": "own.jpg"})
        add(tar, "1.jpg", b"pixels")
    assert positions(tmp_path / "a.tar")[0] == tarfile_positions(tmp_path / "a.tar")
    assert [name for name, _, _ in positions(tmp_path / "a.tar")[0]] == ["own.jpg", "shared.jpg"]
    with tarfile.open(tmp_path / "b.tar", "w", format=tarfile.PAX_FORMAT) as tar:
        add(tar, "0.jpg", b"pixels", pax_headers={"GNU.sparse.major": "1", "GNU.sparse.minor": "0"})
        add(tar, "folder", b"", type=tarfile.DIRTYPE)
        for name, payload in sample("1"):
            add(tar, name, payload)
    assert len(index(tmp_path / "b.tar", out=tmp_path / "t.tsv")) == 1
    counts = report(tmp_path / "t.tsv")["counts"]
    assert counts["members"] == 4 and counts["members that are no plain files"] == 2


@pytest.mark.parametrize("tar_format", FORMATS)
def test_every_cut_keeps_the_readable_part(tmp_path, tar_format):
    long_name = "k" * 90 if tar_format == "ustar" else "k" * 180
    path = make_tar(tmp_path / "a.tar", [(f"{long_name}{i}.jpg", bytes([i + 1]) * 700) for i in range(3)], tar_format)
    whole, data = tarfile_positions(path), path.read_bytes()
    end = whole[-1][1] + 1024
    for cut in [*range(0, end, 97), *range(0, end + 1024, 512)]:
        path.write_bytes(data[:cut])
        found, problem = positions(path)
        assert found == [m for m in whole if m[1] + m[2] <= cut]
        assert problem and (f"byte {cut}" in problem or cut == 0 or cut == end + 512)


@pytest.mark.parametrize(
    ("cut", "n_rows", "message"),
    [
        (512 + 1024 + 512 + 512 + 512 + 400, 1, "truncated at byte 3472, inside '1.jpg' whose header is at byte 2560"),
        (2560 + 100, 1, "truncated at byte 2660, inside the header that starts at byte 2560"),
        (5120, 2, "no end marker at byte 5120"),
    ],
)
def test_truncated_tar_gives_its_part_and_a_warning(tmp_path, capsys, cut, n_rows, message):
    members = [m for i in range(2) for m in sample(str(i), image=bytes([65 + i]) * 1000)]
    path = make_tar(tmp_path / "00000.tar", members, "ustar")
    path.write_bytes(path.read_bytes()[:cut])
    rows = index(path, out=tmp_path / "train.tsv")
    assert [image_bytes(tmp_path / "train.tsv", row) for row in rows] == [b"A" * 1000, b"B" * 1000][:n_rows]
    said = capsys.readouterr().err
    assert "00000.tar" in said and message in said and f"{2 * n_rows} members, {n_rows} images kept" in said
    assert message in report(tmp_path / "train.tsv")["warnings"][0]


def test_damage_inside_a_tar(tmp_path):
    path = make_tar(tmp_path / "a.tar", sample("0") + sample("1"), "ustar")
    data = bytearray(path.read_bytes())
    data[2048 + 3] ^= 255  # the name of the third member
    path.write_bytes(data)
    found, problem = positions(path)
    assert [name for name, _, _ in found] == ["0.jpg", "0.txt"] and "damaged header at byte 2048" in problem
    joined = tmp_path / "joined.tar"
    one = make_tar(tmp_path / "b.tar", sample("0"), "ustar").read_bytes()
    joined.write_bytes(one + one)
    found, problem = positions(joined)
    assert len(found) == 2 and "data behind it" in problem
    data = bytearray(one)
    data[124:136] = b"-0000001000\0"  # a negative size would turn the reader round for ever
    data[148:156] = b"%06o\0 " % (sum(data[:512]) - sum(data[148:156]) + 256)
    path.write_bytes(data)
    with pytest.raises(bd.NotATarError):
        positions(path)


def test_refused_files(tmp_path):
    shards, out = tmp_path / "shards", tmp_path / "train.tsv"
    make_tar(shards / "0.tar", sample("0"))
    with tarfile.open(tmp_path / "z.tar", "w:gz") as tar:
        add(tar, "0.jpg", b"pixels")
    with pytest.raises(SystemExit, match=r"z\.tar: gzip: .*gunzip"):
        index(shards, tmp_path / "z.tar", out=out)
    (tmp_path / "page.tar").write_text("<html>not found" * 100)
    with pytest.raises(SystemExit, match=r"page\.tar: not a tar .*\nnothing was written"):
        index(shards, tmp_path / "page.tar", out=out)
    assert not out.exists()
    (shards / "1.tar").write_bytes(b"")
    assert len(index(shards, out=out)) == 1
    assert "1.tar: empty file" in report(out)["warnings"][0]


def test_grouping_rules(tmp_path):
    members = [
        ("a.b/c.seg.png", b"mask"), ("a.b/c.JPG", b"one"), ("a.b/c.txt", b"first"),  # key up to the first dot of c.
        ("__index.v1__", b"no"), ("d/.hidden.jpg", b"no"), ("README", b"no"),
        ("e.png", b"two"), ("e.txt", b"second"), ("e.txt", b"repeated"), ("e.webp", b"other"),
        ("f.txt", b"no image"), ("g.jpg", b"no text"), ("h.jpg", b""), ("h.txt", b"empty"),
        ("e.png", b"three"), ("e.cls", b"7"),  # a key that comes back is a new sample
        ("i.jpg", b"four"), ("i.cls", b"cat"), ("i.txt", b"fourth"),
    ]  # fmt: skip
    rows = index(make_tar(tmp_path / "s.tar", members), out=tmp_path / "train.tsv")
    assert [(image_bytes(tmp_path / "train.tsv", r), r["label"], r["caption"]) for r in rows] == [
        (b"one", "", "first"), (b"two", "", "second"), (b"three", "7", ""), (b"four", "", "fourth")]  # fmt: skip
    counts = report(tmp_path / "train.tsv")["counts"]
    assert counts["samples"] == 7 == 4 + sum(
        counts[loss] for loss in ("without an image", "empty image", "neither caption nor label"))  # fmt: skip
    assert counts["repeated suffix (first kept)"] == counts["second image of a sample (first kept)"] == 1
    assert counts["members whose name has no key and suffix"] == 3
    (tmp_path / "classes.tsv").write_text("name\tsynonyms\n\ndog\t\ncat\t\n")  # a blank line is no class, here as elsewhere
    rows = index(tmp_path / "s.tar", "--classes", tmp_path / "classes.tsv", out=tmp_path / "train.tsv")
    assert [r["label"] for r in rows] == ["", "", "1"]  # label 7 of two classes is none, so its row is gone


# ------------------------------------------------------------------------------ columns


def test_json_columns(tmp_path):
    nested = {"tags": ["a\tb", {"k": None}], "score": 0.25, "ok": True, "none": None, "bad": float("nan"), "title": "T"}
    members = [
        *sample("0", "from txt", fields={**nested, "caption": "from json", "image": "x"}),
        ("1.jpg", b"p"),
        ("1.json", b'{"caption": "from json", "label": 3, "half": "\\ud83d", "big": 12345678901234567890}'),
        ("2.jpg", b"p"), ("2.json", b'{"title": "from title"}'),
        ("3.jpg", b"p"), ("3.json", b'{"caption": cut'), ("3.txt", b"caf\xe9"),
        ("4.jpg", b"p"), ("4.json", b'{"caption": "nul\\u0000l"}'), ("5.jpg", b"p"), ("5.txt", b"x" * (5 << 20)), ("5.cls", b"1"),
    ]  # fmt: skip
    rows = index(make_tar(tmp_path / "s.tar", members), out=tmp_path / "train.tsv")
    assert list(rows[0]) == ["image", "label", "caption", "bad", "big", "half", "none", "ok", "score", "tags", "title"]
    assert [r["caption"] for r in rows] == ["from txt", "from json", "from title", "caf\ufffd", "nul l", ""]
    assert json.loads(rows[0]["tags"]) == nested["tags"] and " " not in rows[0]["tags"]
    assert [rows[0][k] for k in ("bad", "none", "ok", "score", "title")] == ["", "", "true", "0.25", "T"]
    assert [rows[1][k] for k in ("label", "big", "half", "tags")] == ["3", "12345678901234567890", "?", ""]
    counts = report(tmp_path / "train.tsv")["counts"]
    assert counts["invalid UTF-8 (replaced)"] == 2 and counts["text over 4 MiB (ignored)"] == 1
    assert counts["JSON that cannot be read or is no object (ignored)"] == 1


def test_which_text_is_the_caption_and_which_number_the_label(tmp_path):
    """JSON's caption, text, title in this order; .cls before JSON's label."""
    fields = dict(title="the title", text="the text", label=3)
    members = [("0.jpg", b"x"), ("0.json", json.dumps(fields).encode()), ("0.cls", b"5"),
               ("1.jpg", b"x"), ("1.json", json.dumps(fields | dict(caption="its own")).encode())]  # fmt: skip
    rows = index(make_tar(tmp_path / "s.tar", members), out=tmp_path / "t.tsv")
    assert [(row["caption"], row["label"]) for row in rows] == [("the text", "5"), ("its own", "3")]


def test_parquet_columns(tmp_path, monkeypatch):
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    make_tar(tmp_path / "00000.tar", sample("00000001", fields={"width": 5}) + sample("00000000") + sample("00000003"))
    columns = {"key": ["00000000", "00000001", "00000002"], "width": [1, 2, 3], "sim": [0.5, None, 0.25],
               "tags": [["a"], [], None], "caption": ["x", "y", "z"]}  # fmt: skip
    parquet.write_table(pyarrow.table(columns), tmp_path / "00000.parquet")
    rows = index(tmp_path, out=tmp_path / "train.tsv")
    assert [[r[k] for k in ("caption", "key", "width", "sim", "tags")] for r in rows] == [
        ["a cat", "00000001", "5", "", "[]"],
        ["a cat", "00000000", "1", "0.5", '["a"]'],
        ["a cat", "", "", "", ""],
    ]
    assert report(tmp_path / "train.tsv")["counts"]["not in the parquet"] == 1
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)  # as if it were not installed
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    rows = index(tmp_path, out=tmp_path / "train.tsv")
    assert list(rows[0]) == ["image", "label", "caption", "width"] and [r["width"] for r in rows] == ["5", "", ""]
    assert "pip install pyarrow" in report(tmp_path / "train.tsv")["warnings"][0]
    monkeypatch.undo()
    dates = pyarrow.array([2**31 - 1] * 3, pyarrow.date32())  # beyond all calendars
    parquet.write_table(pyarrow.table(columns | {"date": dates}), tmp_path / "00000.parquet")
    assert len(index(tmp_path, out=tmp_path / "train.tsv")) == 3
    assert "00000.parquet: not used" in report(tmp_path / "train.tsv")["warnings"][0]
    (tmp_path / "00000.parquet").write_bytes(b"PAR1 cut")
    assert len(index(tmp_path, out=tmp_path / "train.tsv")) == 3
    assert "00000.parquet: not used" in report(tmp_path / "train.tsv")["warnings"][0]


CAPTIONS = ["a \"quoted\" 'caption'", '"', "emoji \U0001f9d1\u200d\U0001f680 漢字 עברית", "back\\slash \\t", "0", "#"]
CAPTIONS += ["x" * 100_000]


@settings(max_examples=60, deadline=None)
@given(st.text(st.characters(exclude_categories=["Cs"])))
def test_field_is_one_field(value):
    field = bd.tsv_field(value)
    assert "\t" not in field and len(field.splitlines()) <= 1 and bd.tsv_field(field) == field
    assert len(field) == len(value) - value.count("\r\n")
    assert "".join(field.split()) == "".join(value.replace("\0", "").split())  # nothing but white space changes


def test_captions_round_trip(tmp_path):
    odd = ["two\nlines", "a\ttab", "crlf\r\nend", "line\u2028separator"]
    members = [m for i, caption in enumerate(CAPTIONS + odd + ["", " \n"]) for m in sample(f"{i:03d}", caption)]
    rows = index(make_tar(tmp_path / "s.tar", members), out=tmp_path / "train.tsv")
    assert [r["caption"] for r in rows] == [*CAPTIONS, "two lines", "a tab", "crlf end", "line separator"]
    assert report(tmp_path / "train.tsv")["counts"]["neither caption nor label"] == 2


# ------------------------------------------------------------------------------ folders


def write(path, payload=b"pixels"):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(payload if isinstance(payload, bytes) else payload.encode())


def test_class_folders(tmp_path):
    train, out = tmp_path / "train", tmp_path / "table" / "train.tsv"
    for name in ("n02/b.JPEG", "n02/a.png", "n01/x/deep.jpg", "n10/c.jpg"):
        write(train / name)
    write(train / "n10" / "c.txt", "with a caption")
    write(train / "n10" / "notes.md")
    (train / "n05").mkdir()  # keeps its label
    rows = index(train, out=out)
    assert [(r["image"], r["label"], r["caption"]) for r in rows] == [
        ("../train/n01/x/deep.jpg", "0", ""), ("../train/n02/a.png", "1", ""), ("../train/n02/b.JPEG", "1", ""),
        ("../train/n10/c.jpg", "3", "with a caption")]  # fmt: skip
    assert all((out.parent / r["image"]).read_bytes() == b"pixels" for r in rows)
    assert (
        out.parent / "classes.tsv"
    ).read_text() == "name\tsynonyms\tdefinition\nn01\t\t\nn02\t\t\nn05\t\t\nn10\t\t\n"
    assert "n05: a class folder without images" in report(out)["warnings"][0]
    (train / "n05").rmdir()
    assert index(train, out=out)[-1]["label"] == "3"  # the classes.tsv that lies there is used


def test_class_folders_with_classes(tmp_path):
    train, out, classes = tmp_path / "train", tmp_path / "train.tsv", tmp_path / "other.tsv"
    for name in ("n02/b.jpg", "dog/a.jpg"):
        write(train / name)
    classes.write_text("wnid\tname\nn09\tdog\nn03\tcrane\nn02\tcrane\n")
    rows = index(train, "--classes", classes, out=out)
    assert [(r["image"], r["label"]) for r in rows] == [("train/dog/a.jpg", "0"), ("train/n02/b.jpg", "2")]
    assert not (tmp_path / "classes.tsv").exists()
    for name in ("crane/c.jpg", "unicorn/d.jpg"):
        write(train / name)
    with pytest.raises(SystemExit, match="2 of 4 class folders .*: crane, unicorn"):  # two classes are called crane
        index(train, "--classes", classes, out=out)
    classes.write_text("id\n1\n")
    with pytest.raises(SystemExit, match="got columns id, expected name or wnid"):
        index(train, "--classes", classes, out=out)
    with pytest.raises(SystemExit, match="other.tsv, which it would replace, is an input"):
        index(train, "--classes", classes, out=classes)
    assert classes.read_text() == "id\n1\n"


def test_flat_folder(tmp_path):
    photos = tmp_path / "photos"
    for name, text in {"2.jpg": "p", "10.jpg": "p", "a.b.png": "p", "c:12.jpg": "p", "bare.jpg": "p", "t\tab.jpg": "p",
                       "2.txt": "two", "10.json": '{"text": "ten", "n": 1}', "a.b.txt": "dots", "c:12.txt": "colon",
                       "t\tab.txt": "x", "orphan.txt": "x", ".hidden.jpg": "p"}.items():  # fmt: skip
        write(photos / name, text)
    (photos / "dead.jpg").symlink_to("nowhere")
    write(photos / "dead.txt", "dead link")
    rows = index(photos, out=tmp_path / "train.tsv")
    assert [(r["image"], r["caption"], r["n"]) for r in rows] == [
        ("photos/10.jpg", "ten", "1"), ("photos/2.jpg", "two", ""), ("photos/a.b.png", "dots", ""),
        ("photos/c:12.jpg", "colon", "")]  # fmt: skip
    counts = report(tmp_path / "train.tsv")["counts"]
    assert counts["samples"] == 8 and counts["without an image"] == counts["empty image"] == 1
    assert counts["file name with a tab, line break or invalid UTF-8"] == counts["neither caption nor label"] == 1
    assert [r["image"] for r in index(photos, out=photos / "train.tsv")][0] == "10.jpg"


# ------------------------------------------------------------------------------ tables


def make_shards(folder, n_shards=4, n_samples=50):
    for shard in range(n_shards):
        members = []
        for i in range(n_samples):
            members += sample(f"{shard * 100 + i:06d}", f"caption {i}", fields={f"k{shard}": i})
        make_tar(folder / f"{shard:05d}.tar", members)
    return folder


def test_holdout(tmp_path):
    shards = make_shards(tmp_path / "shards")
    whole = index(shards, out=tmp_path / "whole" / "train.tsv")
    tables = {}
    for workers, place in ((1, "a"), (3, "b"), (2, "c/deeper")):
        out = tmp_path / place / "train.tsv"
        # In any order, with a source named directly: the same rows.
        sources = [shards] if workers == 1 else sorted(shards.glob("*.tar"), reverse=True)
        train = index(*sources, "--holdout", "0.3", "--workers", workers, out=out)
        val = read(out.with_name("val.tsv"))
        assert len(train) + len(val) == 200 and 35 <= len(val) <= 85  # 60 expected, standard deviation 6.5
        assert list(train[0]) == list(val[0])
        tables[place] = [{**row, "image": os.path.basename(row["image"])} for row in train], [
            os.path.basename(row["image"]) for row in val]  # fmt: skip
    assert tables["a"] == tables["b"] == tables["c/deeper"]
    train, val = ([r["image"] for r in tables["a"][0]], tables["a"][1])
    everything = [os.path.basename(row["image"]) for row in whole]
    assert not set(train) & set(val) and sorted(train + val) == sorted(everything)
    assert train == [image for image in everything if image in set(train)]  # the order of the sources
    first = (tmp_path / "a" / "train.tsv").read_bytes(), report(tmp_path / "a" / "train.tsv")
    index(shards, "--holdout", "0.3", "--workers", 2, out=tmp_path / "a" / "train.tsv")
    again = (tmp_path / "a" / "train.tsv").read_bytes(), report(tmp_path / "a" / "train.tsv")
    assert list(first[1])[-1] == "date" and first[1].pop("date") and again[1].pop("date") and first == again
    other = index(shards, "--holdout", "0.3", "--seed", 1, out=tmp_path / "a" / "train.tsv")
    assert [os.path.basename(row["image"]) for row in other] != train
    index(shards, out=tmp_path / "a" / "train.tsv")
    assert "val.tsv is older" in report(tmp_path / "a" / "train.tsv")["warnings"][0]


def test_an_older_val_beside_a_training_set_is_told(tmp_path, capsys):
    """Not beside another test set, which is no part of what val was cut from."""
    write(tmp_path / "photos" / "a.jpg")
    (tmp_path / "photos" / "a.txt").write_text("a photo")
    (tmp_path / "val.tsv").write_text("image\tlabel\tcaption\n")
    for name, is_told in (("train", True), ("v2", False)):
        index(tmp_path / "photos", out=tmp_path / f"{name}.tsv")
        assert ("is older and may share images" in capsys.readouterr().err) == is_told


def test_a_failed_run_leaves_train_and_val_of_one_cut(tmp_path, monkeypatch):
    shards, out = make_shards(tmp_path / "shards"), tmp_path / "table" / "train.tsv"
    index(shards, "--holdout", "0.5", out=out)
    before = {path: path.read_bytes() for path in out.parent.iterdir()}
    with monkeypatch.context() as patch:
        patch.setattr(bd, "write_report", lambda *args, **more: (_ for _ in ()).throw(OSError("disk")))
        with pytest.raises(OSError, match="disk"):
            index(shards, "--holdout", "0.5", "--seed", 1, out=out)
    assert {path: path.read_bytes() for path in out.parent.iterdir()} == before


def test_labels_that_are_floats_or_too_long(tmp_path):
    members = sample("0", fields={"label": 1.0}) + sample("1", fields={"label": "2."}) + sample("2", fields={"label": 1.5})
    make_tar(tmp_path / "s" / "0.tar", members + [("3.jpg", b"x"), ("3.txt", b"x"), ("3.cls", b"7" * 5000)])
    assert [row["label"] for row in index(tmp_path / "s", out=tmp_path / "t.tsv")] == ["1", "2", "", ""]


def test_links_that_lead_back(tmp_path):
    write(tmp_path / "set" / "dog" / "0.jpg", "p")
    (tmp_path / "set" / "dog" / "self").symlink_to(".")
    assert [row["image"] for row in index(tmp_path / "set", out=tmp_path / "t.tsv")] == ["set/dog/0.jpg"]


def test_texts_without_images_come_in_order(tmp_path):
    for i in range(30):
        write(tmp_path / f"{i:02d}.txt", "x")
    keys = [key for key, *_ in bd.folder_samples(str(tmp_path), "", False, bd.Counter())]
    assert keys == [f"{i:02d}" for i in range(30)]  # of a set, whose order is another in each process


def test_hash_is_pinned():
    """Rows must not change sides when the code does: the value follows from the definition alone."""
    parts = b"".join(len(p).to_bytes(8, "big") + p for p in (b"0", b"00000.tar/000000001"))
    expected = int.from_bytes(hashlib.blake2b(parts, digest_size=8).digest(), "big") / 2**64
    assert bd.unit_hash(0, "00000.tar/000000001") == expected == 0.5366263650151138


def test_a_shard_s_name_is_part_of_what_is_drawn(tmp_path):
    """Shards with the same keys hold out different rows, and no later version may move one of them."""
    def draw(shard, key):
        parts = b"".join(len(p).to_bytes(8, "big") + p for p in (b"3", f"{shard}.tar/{key}".encode()))
        return int.from_bytes(hashlib.blake2b(parts, digest_size=8).digest(), "big") / 2**64

    keys = [f"{i:02d}" for i in range(30)]
    for shard in "ab":
        make_tar(tmp_path / "s" / f"{shard}.tar", [m for key in keys for m in sample(key, f"{shard} {key}")])
    index(tmp_path / "s", "--holdout", 0.5, "--seed", 3, "--workers", 1, out=tmp_path / "train.tsv")
    held = [row["caption"] for row in read(tmp_path / "val.tsv")]
    assert held == [f"{shard} {key}" for shard in "ab" for key in keys if draw(shard, key) < 0.5]
    assert {text[2:] for text in held if text[0] == "a"} != {text[2:] for text in held if text[0] == "b"}


def test_stats_are_compared(tmp_path, capsys):
    shards = make_shards(tmp_path / "shards", 3, 5)
    for shard, successes in ((0, 5), (1, 6)):
        stats = dict(count=8, successes=successes, failed_to_download=2, failed_to_resize=1, duration=0.5)
        write(shards / f"{shard:05d}_stats.json", json.dumps(stats))
    index(shards, out=tmp_path / "train.tsv")
    said = capsys.readouterr()
    assert "00001.tar: 5 images, but its _stats.json counts 6 successes" in said.err and "00000" not in said.err
    assert "00002.tar: no readable _stats.json" in said.err
    assert "16 pairs in, 11 out, 4 not downloaded, 2 bad images" in said.out
    assert report(tmp_path / "train.tsv")["img2dataset"]["count"] == 16


def test_a_failed_run_leaves_the_old_table(tmp_path):
    shards, out = make_shards(tmp_path / "shards", 2, 3), tmp_path / "table" / "train.tsv"
    index(shards, out=out)
    before = out.read_bytes()
    write(shards / "00002.tar", b"no tar" * 200)
    with pytest.raises(SystemExit, match="not a tar"):
        index(shards, "--workers", 2, out=out)
    assert out.read_bytes() == before and sorted(os.listdir(out.parent)) == ["train.tsv", "train.tsv.json"]


def test_the_report_tells_what_was_read(tmp_path):
    """Of a tar size, time and ends, since only its headers and texts are read; of small files the hash."""
    shards = make_shards(tmp_path / "shards", 1, 3)
    write(shards / "00000_stats.json", b'{"successes": 3}')
    write(tmp_path / "classes.tsv", b"name\ncat\n")
    index(shards, "--classes", tmp_path / "classes.tsv", out=tmp_path / "train.tsv")
    tar, stats, classes = report(tmp_path / "train.tsv")["inputs"]
    data = (shards / "00000.tar").read_bytes()
    ends = hashlib.sha256(data[: 2**20] + data[max(0, len(data) - 2**20) :]).hexdigest()
    assert report(tmp_path / "train.tsv")["sources"][0]["rows"] == 3
    assert tar["bytes"] == len(data) and tar["sha256_of_first_and_last_mib"] == ends
    assert tar["mtime_ns"] == (shards / "00000.tar").stat().st_mtime_ns
    for entry, path in ((stats, shards / "00000_stats.json"), (classes, tmp_path / "classes.tsv")):
        assert entry == dict(path=str(path), bytes=path.stat().st_size, sha256=hashlib.sha256(path.read_bytes()).hexdigest())
    write(tmp_path / "classes" / "cat" / "1.jpg")
    index(tmp_path / "classes", out=tmp_path / "sub" / "train.tsv")  # writes a classes.tsv, which is no input
    assert report(tmp_path / "sub" / "train.tsv")["inputs"] == []
    found = []
    for name, payload in (("cat", b"x"), ("cat", b"xy"), ("dog", b"xy")):  # a folder: of names, sizes and texts
        write(tmp_path / "photos" / f"{name}.jpg", payload)
        write(tmp_path / "photos" / f"{name}.txt", b"a cat")
        index(tmp_path / "photos", out=tmp_path / "photos.tsv")
        found.append(report(tmp_path / "photos.tsv")["sources"][0])
    assert len({entry["sha256_of_names_sizes_texts"] for entry in found}) == 3
    assert [entry["image_bytes"] for entry in found] == [1, 2, 4]


# ------------------------------------------------------------------------------ tars as tables


@pytest.fixture
def crawl(tmp_path, monkeypatch):
    """The output of img2dataset: two shards of pictures, with parquet and stats; t.tsv is `index`'s table of them."""
    monkeypatch.chdir(tmp_path)
    pyarrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    for shard in range(2):
        members, rows = [], []
        for i in range(6):
            key, payload = f"{shard:05d}{i:04d}", io.BytesIO()
            Image.new("RGB", (20, 30 + i), (40 * i, 9, 9)).save(payload, "PNG")
            fields = dict(url=f"http://x/{i % 5}", similarity=i / 8, label=i % 2, key=key, status="success")
            members += sample(key, f"a {('crane', 'lion, a  crane')[i % 2]}\t{i % 4}", payload.getvalue() if i < 5 else b"no image", fields)
            rows.append(dict(key=key, url=f"http://x/{i % 5}", status="success", error_message=None, score=i * shard))
        rows.append(dict(key="x", url="http://x/gone", status="failed_to_download", error_message="404", score=None))
        make_tar(Path("shards") / f"{shard:05d}.tar", members)
        parquet.write_table(pyarrow.Table.from_pylist(rows), f"shards/{shard:05d}.parquet")
        write(Path("shards") / f"{shard:05d}_stats.json", json.dumps(dict(count=7, successes=6)))
    bd.write_tsv("classes.tsv", ("name",), [dict(name="crane"), dict(name="lion")])
    bd.write_tsv("entries.tsv", ("entry",), [dict(entry="crane"), dict(entry="4")])
    index("shards", out=Path("t.tsv"))
    rng = np.random.default_rng(0)
    for name, n in (("e", 12), ("small", 3), ("test", 2)):
        np.save(f"{name}.npy", rng.standard_normal((n, 4)).astype(np.float32))
    return tmp_path


@pytest.mark.parametrize("form", ["webdataset", "files"])
@pytest.mark.parametrize(
    "command",
    [
        "check --workers 1",
        "dedup --by pixels url",
        "dedup --by embedding --embeddings e.npy --cosine 0.5",
        "prune --embeddings e.npy --small small.npy --tests val=test.npy",
        "subset --rows 5 --key url --threshold score=1",
        "mix --rows 4 --key url",
        "stats",
        "label --classes classes.tsv --multi all --workers 1",
        "laionet --classes classes.tsv --threshold 0.2 --workers 1",
        "curate --metadata entries.tsv --cap 3 --workers 1",
        "frequency --classes classes.tsv --match word --sample 3 --workers 1",
        "metadata --min-count 1",
    ],
)
def test_img2dataset_s_folder_is_the_table_that_index_writes(crawl, command, form):
    found = []
    if form == "files":
        as_files("shards", crawl / "f")
        shutil.rmtree("shards")
        os.rename("f", "shards")
        index("shards", out=Path("t.tsv"))
    for source in ("shards", "t.tsv"):
        name, *flags = command.split()
        out = "o-{set}.tsv" if name == "prune" else "o.tsv"
        with contextlib.suppress(SystemExit):  # check always exits
            bd.main(bd.parse_args([name, source, *flags, "--out", out]))
        tables = {p.name: read(p) for p in sorted(crawl.glob("o*.tsv"))}
        for row in sum(tables.values(), []) if name in ("check", "stats", "mix") else ():
            for column in ("file", "line", "name", "source", "spearman shards", "spearman t"):  # they name the source
                row.pop(column, None)
            row["image"] = row.get("image", "").removeprefix("shards/")  # check tells it as the source does
        found.append(tables)
        for path in crawl.glob("o*"):
            path.unlink()
    assert found[0] == found[1] and any(found[0].values())


def test_what_a_tar_lacks_is_listed_counted_and_said(crawl, capsys):
    members = sample("0", "a crane") + [("1.txt", b"no image")] + sample("2", "", b"x") + sample("3", "a lion")
    tar = make_tar(crawl / "more" / "0.tar", members)
    data = tar.read_bytes()
    tar.write_bytes(data[: data.index(b"a lion") + 2])
    with pytest.raises(SystemExit) as stopped:
        bd.main(bd.parse_args(["check", "more", "--out", "bad.tsv", "--workers", "1"]))
    reasons = {(row["line"], row["reason"].partition(" at byte")[0]) for row in read(crawl / "bad.tsv")}
    assert stopped.value.code == 1 and ("2", "without an image") in reasons and ("3", "neither caption nor label") in reasons
    assert any("truncated" in reason for _, reason in reasons)
    capsys.readouterr()
    bd.tar_facts.cache_clear()
    bd.main(bd.parse_args("label more --classes classes.tsv --workers 1 --out o.tsv".split()))
    assert report("o.tsv")["funnel"]["rows"] == 4 and len(read(crawl / "o.tsv")) == 1  # a cut tar is no row that is lost
    assert report("o.tsv")["funnel"]["bad: without an image"] == -1 and "1 x without an image" in capsys.readouterr().err
    (crawl / "more" / "1.tar").write_bytes(b"no tar" * 200)
    with pytest.raises(SystemExit, match=r"more/1.tar: not a tar"):
        bd.main(bd.parse_args("stats more --out o.tsv".split()))
    write(crawl / "more" / "t.tsv", b"image\n")
    with pytest.raises(SystemExit, match="more: a folder with tables of kinds .tar, .tsv: name the files"):
        bd.main(bd.parse_args("stats more --out o.tsv".split()))


def as_files(shards, folder):
    """The same output of img2dataset in its format `files`."""
    for tar in sorted(Path(shards).glob("*.tar")):
        with tarfile.open(tar) as members:
            members.extractall(folder / tar.stem, filter="data")
        for end in (".parquet", "_stats.json"):
            write(folder / f"{tar.stem}{end}", Path(f"{tar.with_suffix('')}{end}").read_bytes())
    return folder


def test_img2dataset_folders_of_files_are_the_table_of_its_tars(crawl, capsys):
    """00000/ is a shard, no class: no label comes of it, and no classes.tsv."""
    (crawl / "classes.tsv").unlink()
    files, out = as_files("shards", crawl / "f"), crawl / "out" / "f.tsv"
    rows, of_tars = index(files, out=out), read(crawl / "t.tsv")
    assert [row.pop("image") for row in rows] == [f"../f/0000{s}/0000{s}000{i}.jpg" for s in (0, 1) for i in range(6)]
    for row in of_tars:
        row.pop("image")
    assert rows == of_tars and [row["score"] for row in rows[6:]] == list("012345")
    assert os.listdir(out.parent) in (["f.tsv", "f.tsv.json"], ["f.tsv.json", "f.tsv"])
    assert [Path(entry["path"]).name for entry in report(out)["inputs"]] == [
        "00000.parquet", "00000_stats.json", "00001.parquet", "00001_stats.json"]  # fmt: skip
    assert report(out)["img2dataset"]["count"] == 14 and report(out)["warnings"] == []
    assert [row["score"] for row in index(f"{files}/00001/", out=out)] == list("012345")  # one shard by its name
    for file in files.glob("0000?/*.json"):  # the label above was the JSON's
        file.write_text("{}")
    assert {row["label"] for row in index(files, out=out)} == {""}

    (files / "00001_stats.json").unlink()  # killed: no stats, then no parquet either
    write(files / "00002" / "000020000.jpg")
    write(files / "00002" / "000020000.txt", "a lion")
    write(files / "00000_stats.json", json.dumps(dict(count=7, successes=5)))
    assert len(index(files, out=out)) == 13
    warned = capsys.readouterr().err
    assert "00001: no readable _stats.json" in warned and "00002: no readable _stats.json" in warned
    assert "00000: 6 images, but its _stats.json counts 5 successes" in warned
    write(files / "cats" / "1.jpg")
    with pytest.raises(SystemExit, match="holds 3 shards in folders, 1 class folders side by side"):
        index(files, out=out)


def test_one_shard_of_files_and_flat_folders_are_tables(crawl):
    """f/00001, a pattern of such, the shard's own folder as `.`: all the rows that index writes, wherever OUT lies."""
    as_files("shards", crawl / "f")
    (crawl / "f" / "00001").rename(crawl / "f" / "00002")  # nothing lies beside it: killed
    for table, source in (("f/00000", "f/00000"), ("f/00002/", "f/00002"), ("f/0000?", "f"), ("f*", "f")):
        want = index(source, out=Path("o/t.tsv"))
        bd.main(bd.parse_args(["mix", table, "--out", "o/m.tsv"]))
        got = read(crawl / "o" / "m.tsv")
        assert len(got) == len(want) >= 6
        assert [row | {"source": ""} for row in got] == [row | {"source": ""} for row in want], table
    bd.main(bd.parse_args(["mix", "f/00000", "--out", "o/m.tsv"]))
    (inputs,) = {json.dumps(report(crawl / "o" / "m.tsv")["inputs"])}
    index("f/00000", out=Path("o/t.tsv"))
    (source,) = report(crawl / "o" / "t.tsv")["sources"]
    folder, *beside = json.loads(inputs)
    assert folder == dict(path="f/00000", **{k: source[k] for k in ("image_bytes", "sha256_of_names_sizes_texts")})
    assert [entry["path"] for entry in beside] == ["f/00000.parquet", "f/00000_stats.json"]
    os.chdir("f/00000")
    with pytest.raises(SystemExit) as stopped:
        bd.main(bd.parse_args("check . --workers 1 --out ../../bad.tsv".split()))
    assert stopped.value.code == 1 and [row["reason"] for row in read(crawl / "bad.tsv")] == ["not an image"]


def test_folders_that_are_no_tables(crawl):
    as_files("shards", crawl / "f")
    for name in ("cats", "dogs"):
        write(crawl / "classes" / name / "1.jpg")
    write(crawl / "f" / "t.tsv", b"image\n")
    for source, message in (
        ("classes", "classes: a folder with no table .*of class folders `index` makes a table"),
        ("f", r"f: a folder with tables of kinds .tsv, folder: name the files"),
        ("f/00000.parquet", "no column image: .*folder of its tars or folders of files"),
    ):
        with pytest.raises(SystemExit, match=message):
            bd.main(bd.parse_args(["check", source, "--workers", "1", "--out", "o.tsv"]))


def test_a_changed_text_of_a_folder_is_read_anew(crawl):
    as_files("shards", crawl / "f")
    command = "label f --classes classes.tsv --workers 1 --out o.tsv".split()
    bd.main(bd.parse_args([*command, "--shard", "0/2"]))
    (first,) = (path.name for path in (crawl / "o.tsv.parts").glob("*.npz"))
    bd.main(bd.parse_args([*command, "--shard", "0/2"]))
    assert [path.name for path in (crawl / "o.tsv.parts").glob("*.npz")] == [first]
    write(crawl / "f" / "00000" / "000000000.txt", b"a lion")
    bd.tar_facts.cache_clear()
    bd.main(bd.parse_args(command))
    assert read(crawl / "o.tsv")[0]["caption"] == "a lion"


def test_img2dataset_s_format_parquet_has_texts(crawl):
    """Its pictures are a column of bytes, which no table can hold."""
    parquet, pyarrow = pytest.importorskip("pyarrow.parquet"), pytest.importorskip("pyarrow")
    row = dict(key="0", status="success", error_message=None, caption="a lion", url="x", jpg=b"\xff\xd8\n\t")
    write(crawl / "p" / "00000_stats.json", b"{}")
    parquet.write_table(pyarrow.Table.from_pylist([row]), "p/00000.parquet")
    bd.main(bd.parse_args("label p --classes classes.tsv --workers 1 --out o.tsv".split()))
    assert list(read(crawl / "o.tsv")[0]) == ["key", "status", "error_message", "caption", "url", "label"]


# ------------------------------------------------------------------------------ messages


def run(*args):
    command = [sys.executable, os.path.join(ROOT, "build_datasets.py"), "index", *map(str, args)]
    return subprocess.run(command, capture_output=True, text=True)


def test_exit_codes(tmp_path):
    make_tar(tmp_path / "0.tar", sample("0"))
    done = run(tmp_path / "0.tar", "--out", tmp_path / "t" / "train.tsv")
    assert done.returncode == 0 and "1  rows" in done.stdout and not done.stderr
    missing = run(tmp_path / "none", "--out", tmp_path / "train.tsv")
    assert missing.returncode == 2 and missing.stderr == f"{tmp_path / 'none'}: no such file or folder\n"
    usage = run(tmp_path, "--out", tmp_path / "train.csv")
    assert usage.returncode == 2 and "ends in .tsv" in usage.stderr


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--holdout", "1"], "--holdout: got 1.0, expected a fraction"),
        (["--workers", "0"], "--workers: got 0"),
        (["--holdout", "0.1", "--out", "val.tsv"], "val.tsv is where --holdout writes"),
        (["--out", "classes.tsv"], "classes.tsv beside a table lists its classes"),
    ],
)
def test_wrong_flags(capsys, args, message):
    with pytest.raises(SystemExit) as stop:
        bd.parse_args(["index", "x", "--out", "train.tsv", *args])
    assert stop.value.code == 2 and message in capsys.readouterr().err


def test_messages(tmp_path):
    out = tmp_path / "out" / "train.tsv"
    (tmp_path / "empty").mkdir()
    with pytest.raises(SystemExit, match="empty: no tars, no images and no class folders"):
        index(tmp_path / "empty", out=out)
    make_tar(tmp_path / "outer" / "part" / "0.tar", sample("0"))
    with pytest.raises(SystemExit, match=r"its subfolders hold tars: pass .*outer/\*/"):
        index(tmp_path / "outer", out=out)
    make_tar(tmp_path / "mixed" / "0.tar", sample("0"))
    write(tmp_path / "mixed" / "1.jpg")
    with pytest.raises(SystemExit, match="holds 1 tars, 1 images side by side"):
        index(tmp_path / "mixed", out=out)
    write(tmp_path / "flat" / "1.jpg")
    with pytest.raises(SystemExit, match="tars .*flat folder .*table of its own"):
        index(tmp_path / "outer" / "part", tmp_path / "flat", out=out)
    with pytest.raises(SystemExit, match="no rows; nothing was written(.|\n)*1    neither caption nor label"):
        index(tmp_path / "flat", out=out)
    with pytest.raises(SystemExit, match="given twice"):
        index(tmp_path / "outer" / "part", tmp_path / "outer" / "part" / "0.tar", out=out)
    tabbed = make_tar(tmp_path / "a\tb.tar", sample("0"))
    write(tmp_path / "0_stats.json")
    with pytest.raises(SystemExit, match="0_stats.json: expected a folder or a name that ends in .tar"):
        index(tmp_path / "0_stats.json", out=out)
    with pytest.raises(SystemExit, match="rename these"):
        index(tabbed, out=out)
    with pytest.raises(SystemExit, match="--classes: no such file"):
        index(tmp_path / "flat", "--classes", tmp_path / "none.tsv", out=out)
    (tmp_path / "dir.tsv").mkdir()
    with pytest.raises(SystemExit, match="is a folder"):
        index(tmp_path / "flat", out=tmp_path / "dir.tsv")


def test_a_tar_reached_by_a_link(tmp_path):
    """`..` after a linked folder leads elsewhere: names are made from the folders' real places."""
    make_tar(tmp_path / "disk" / "deep" / "0.tar", sample("0"))
    (tmp_path / "far" / "away").mkdir(parents=True)
    (tmp_path / "table").symlink_to(tmp_path / "far" / "away")
    rows = index(tmp_path / "disk" / "deep", out=tmp_path / "table" / "train.tsv")
    assert image_bytes(tmp_path / "table" / "train.tsv", rows[0]) == b"pixels"


# ------------------------------------------------------------------------------ speed and memory


def header(name, size):
    block = bytearray(tarfile.TarInfo(name).tobuf(tarfile.USTAR_FORMAT))
    block[124:136] = b"%011o\0" % size
    block[148:156] = b"%06o\0 " % (sum(block) - sum(block[148:156]) + 256)
    return bytes(block)


def cpu_seconds():
    """Of all child processes that have ended."""
    return sum(resource.getrusage(resource.RUSAGE_CHILDREN)[:2])


def test_speed_and_memory(tmp_path):
    """1 M members take 60 s on 2 cores and a bounded memory: here 200,000, so at most 12 s, and sparse 2 MB images."""
    n_shards, n_samples, image_size = 4, 16_667, 2_000_000  # 133 GB in name, holes on disk
    fields = {"caption": "a photo of a thing", "url": "http://host/1.jpg", "width": 256, "sha256": "0" * 64}
    tail = b""
    for name, text in (("k.json", json.dumps(fields).encode()), ("k.txt", b"a photo of a thing")):
        tail += header(name, len(text)) + text.ljust(512, b"\0")
    step = 512 + -(-image_size // 512) * 512
    image = header("k.jpg", image_size)
    try:
        for shard in range(n_shards):
            with open(tmp_path / f"{shard:05d}.tar", "wb", buffering=0) as f:
                for i in range(n_samples):  # consecutive members with one key are one sample: alternate two keys
                    key = b"k" if i % 2 else b"j"
                    f.seek(i * (step + len(tail)))
                    f.write(image if i % 2 else rename(image, key))
                    f.seek(i * (step + len(tail)) + step)
                    f.write(tail if i % 2 else rename(tail, key))
                f.write(bytes(1024))
        code = "import resource, sys; sys.path.insert(0, sys.argv.pop(1)); import build_datasets as b; "
        code += "b.main(b.parse_args()); own = open('/proc/self/status').read().split('VmHWM:')[1].split()[0]; "
        code += "print(max(int(own), resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss) // 1024)"
        command = [sys.executable, "-c", code, ROOT, "index", str(tmp_path), "--out", str(tmp_path / "train.tsv")]
        start, used = time.perf_counter(), cpu_seconds()
        done = subprocess.run([*command, "--workers", "2"], capture_output=True, text=True, check=True)
        wall, rss = time.perf_counter() - start, int(done.stdout.split()[-1])
        seconds = min(wall, (cpu_seconds() - used) / 2)  # other tests run at the same time
    finally:
        for path in tmp_path.glob("*.tar"):
            path.unlink()
    n_members = n_shards * n_samples * 3
    print(f"{n_members:,} members in {seconds:.1f} s ({seconds / n_members * 1e6:.0f} s per million), {rss} MiB")
    assert report(tmp_path / "train.tsv")["rows"] == n_shards * n_samples
    assert seconds / n_members * 1e6 < 60
    assert rss < 250  # MiB, of one process: its imports; it holds neither images nor rows


def rename(blocks, key):
    """The same headers with another first letter of the name, and the checksum that goes with it."""
    blocks = bytearray(blocks)
    for pos in (0, 1024):
        if pos + 512 <= len(blocks) and blocks[pos + 257 : pos + 262] == b"ustar":
            blocks[pos : pos + 1] = key
            block = blocks[pos : pos + 512]
            blocks[pos + 148 : pos + 156] = b"%06o\0 " % (sum(block) - sum(block[148:156]) + 256)
    return bytes(blocks)


def test_a_wnid_wins_over_a_name_and_texts_are_part_of_what_was_read(tmp_path):
    (tmp_path / "c.tsv").write_text("name\twnid\nn2\tn1\nlion\tn2\n")
    assert bd.labels_by_name(str(tmp_path / "c.tsv")) == ({"n1": 0, "n2": 1, "lion": 1}, 2)
    found = []
    for text in (b"a cat", b"a dog"):
        write(tmp_path / "photos" / "0.jpg", b"x")
        write(tmp_path / "photos" / "0.txt", text)
        index(tmp_path / "photos", out=tmp_path / "t.tsv")
        found.append(report(tmp_path / "t.tsv")["sources"][0]["sha256_of_names_sizes_texts"])
    assert found[0] != found[1]
