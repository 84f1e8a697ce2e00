"""clip.py's data and metrics: tables, images of every kind, crops, samplers; evaluation against slow loops."""

import io
import math
import pickle
import random
import struct
import tarfile
import types
import zlib
from collections import Counter

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from programs import named
from scipy import stats

import clip
import dino_laionet as dino
import evaluate
import sl_vocab_subsample as sl

# ------------------------------------------------------------------------------ Table


def table_of(folder, content, name="t.tsv"):
    (folder / name).write_bytes(content if isinstance(content, bytes) else content.encode("utf-8"))
    return clip.Table(folder / name)


def rows_of(table):
    return [table[row] for row in range(len(table))]


@pytest.mark.parametrize("content", [
    "image\tcaption\na.jpg\ta cat\nb.jpg\t\n",
    "image\tcaption\na.jpg\ta cat\nb.jpg\t",  # no newline at the end
    "image\tcaption\r\na.jpg\ta cat\r\nb.jpg\t\r\n",
    "image\tcaption\r\na.jpg\ta cat\r\n\r\nb.jpg\t\r\n\r\n",
    "\ufeffimage\tcaption\na.jpg\ta cat\nb.jpg\t\n",
    "image\tcaption\n\n\na.jpg\ta cat\n\nb.jpg\t\n\n\n",
])  # fmt: skip
def test_table_reads_each_kind_of_line(content, tmp_path):
    table = table_of(tmp_path, content)
    assert len(table) == 2 and rows_of(table) == [["a.jpg", "a cat"], ["b.jpg", ""]]
    assert table.get(0, "caption") == "a cat" and table.get(1, "nothing") == ""
    assert table.folder == tmp_path


@pytest.mark.parametrize("header, found", [
    ("filepath\ttitle", dict(image=0, caption=1)),
    ("path\tclass\ttext", dict(image=0, label=1, caption=2)),
    ("wnid\tfile", dict(label=0, image=1)),
    ("title\timage\tcaption", dict(image=1, caption=2)),  # a column of that name comes before its aliases
    ("title\ttext\timage", dict(caption=1)),  # the first alias of the list, not of the file
])  # fmt: skip
def test_aliases(header, found, tmp_path):
    table = table_of(tmp_path, header + "\n" + "\t".join("abc"[: header.count("\t") + 1]) + "\n")
    for name, place in found.items():
        assert table.columns[name] == place and table.get(0, name) == "abc"[place]
    assert all(name in table.columns for name in header.split("\t"))


def test_table_errors(tmp_path):
    with pytest.raises(SystemExit, match="none.tsv: no such file"):
        clip.Table(tmp_path / "none.tsv")
    with pytest.raises(
        SystemExit, match=r"no image column; found \['url', 'caption'\]; expected .*filepath, path, file"
    ):
        table_of(tmp_path, "url\tcaption\nx\ty\n")
    with pytest.raises(SystemExit, match=r"no image column; found \['image,caption'\]"):
        table_of(tmp_path, "image,caption\nx,y\n")
    with pytest.raises(SystemExit, match="no image column"):
        table_of(tmp_path, "")
    for content in ("image\tcaption", "image\tcaption\n", "image\tcaption\r\n\r\n\n"):
        with pytest.raises(SystemExit, match="t.tsv: no rows below the header"):
            table_of(tmp_path, content)
    table = table_of(tmp_path, "image\tcaption\na\tb\nc\nd\te\tf\n")
    assert table[0] == ["a", "b"]
    with pytest.raises(SystemExit, match="t.tsv: row 2 has 1 fields, the header 2: 'c'"):
        table[1]
    with pytest.raises(SystemExit, match="row 3 has 3 fields"):
        table.get(2, "image")


def test_one_column_and_one_letter_without_newline(tmp_path):
    assert rows_of(table_of(tmp_path, "image\na\nb")) == [["a"], ["b"]]


FIELD = st.text(st.characters(exclude_categories=("Cs",)), max_size=20)


@settings(max_examples=300, deadline=None)
@given(st.lists(st.tuples(FIELD, FIELD, FIELD), min_size=1, max_size=8), st.booleans(), st.sampled_from(["\n", "\r\n"]))
def test_table_round_trip(tmp_path_factory, rows, ends_in_newline, newline):
    """Whatever the text, quotes and emoji too, once the writer has made blanks of tabs and newlines."""
    rows = [[field.translate({9: " ", 10: " ", 13: " "}) for field in row] for row in rows]
    text = (
        newline.join("\t".join(row) for row in [["image", "caption", 'a "column"'], *rows]) + newline * ends_in_newline
    )
    table = table_of(tmp_path_factory.getbasetemp(), text, "round_trip.tsv")
    assert rows_of(table) == rows


def test_table_pickles_without_its_content(tmp_path):
    long = "word " * 20_000  # 100 kB
    table = table_of(tmp_path, "image\tcaption\n" + "".join(f"{i}.jpg\t{long}{i}\n" for i in range(20)))
    assert table.get(7, "caption") == f"{long}7"  # the file is open
    pickled = pickle.dumps(table)
    again = pickle.loads(pickled)
    assert len(pickled) < 10_000 and again.file is None
    assert again.get(19, "caption") == f"{long}19" and len(again) == 20 and again.columns == table.columns


def test_broken_utf8_is_replaced(tmp_path):
    assert table_of(tmp_path, b"image\tcaption\na\tcaf\xe9\n")[0] == ["a", "caf\ufffd"]


def test_read_classes(tmp_path):
    """A byte order mark, Windows line ends and a line separator within a definition do not shift labels."""
    path = tmp_path / "classes.tsv"
    path.write_bytes("\ufeffname\tdefinition\r\ncat\tpurrs\u2028\x85and sleeps\r\n\r\ndog\tbarks\r\n".encode())
    rows = clip.read_classes(tmp_path)
    assert [row["name"] for row in rows] == ["cat", "dog"] and rows[1]["definition"] == "barks"
    path.write_bytes("name\ncaf\u00e9\n".encode("latin-1"))
    with pytest.raises(SystemExit, match="classes.tsv is not UTF-8"):
        clip.read_classes(tmp_path)


@pytest.mark.parametrize("field, label", [("2.0", 2), ("2.", 2), ("n1", 1), ("n2", 2), ("crane", -1), ("bat", 0)])
def test_labels_as_check_takes_them(tmp_path, field, label):
    """As pandas writes a number beside a missing one, by wnid, by a name that is another's wnid too (the wnid wins)."""
    classes = [{"name": name, "wnid": wnid} for name, wnid in (("a", "bat"), ("crane", "n1"), ("crane", "n2"), ("bat", ""))]
    one = table_of(tmp_path, f"FILE\tWnid\nx\t{field}\n", "one.tsv")
    several = table_of(tmp_path, f"image\tclass\nx\t{field}|3\n", "several.tsv")
    if label < 0:  # of two classes
        for read, table in (clip.read_labels, one), (sl.read_label_sets, several):
            with pytest.raises(SystemExit, match="row 1 has label 'crane"):
                read(table, classes)
        return
    assert clip.read_labels(one, classes).tolist() == [label]
    assert sl.read_label_sets(several, classes).tolist() == [[label, 3]]


def test_read_labels(tmp_path):
    rows = ["3", "0|17", "cat", "", "cat|1", " 1 ", "sea lion"]
    table = table_of(tmp_path, "image\tlabel\n" + "".join(f"x\t{row}\n" for row in rows))
    names = ["a", "sea lion", "cat", "d"]
    labels = clip.read_labels(table, named(names))
    assert labels.tolist() == [3, 0, 2, -1, 2, 1, 1] and labels.dtype == np.int64
    with pytest.raises(SystemExit, match="row 1 has label 'crane', not the number, nor a name or wnid that no other has"):
        clip.read_labels(table_of(tmp_path, "image\tlabel\nx\tcrane\n", "twice.tsv"), named(["crane", "b", "crane"]))
    for field in ("4", "-1", "dog", "4|1", "1.5", "9" * 30):
        bad = table_of(tmp_path, f"image\tlabel\nx\t0\nx\t{field}\n", "bad.tsv")
        with pytest.raises(
            SystemExit, match=rf"bad.tsv: row 2 has label '{field.split('|')[0]}', not the number, .* of the 4 classes"
        ):
            clip.read_labels(bad, named(names))
    assert clip.read_labels(table_of(tmp_path, "image\nx\n"), named(names)).tolist() == [-1]
    assert clip.read_labels(table_of(tmp_path, "image\tlabel\nx\t900\n"), []).tolist() == [900]  # no classes.tsv
    with pytest.raises(SystemExit, match="row 1 has label '9{100}'"):
        clip.read_labels(table_of(tmp_path, f"image\tlabel\nx\t{'9' * 5_000}\n"), [])


# ------------------------------------------------------------------------------ read_image


def encoded(image, kind, **options):
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def two_colours(mode="RGB", left=(255, 0, 0), right=(0, 0, 255), size=(64, 32)):
    image = Image.new(mode, size, left)
    image.paste(right, (size[0] // 2, 0, *size))
    return image


def read(folder, content, field="x", min_side=64, max_pixels=10**6):
    """What read_image gives for a file of that content."""
    if content is not None:
        (folder / "x").write_bytes(content)
    return clip.read_image(table_of(folder, f"image\n{field}\n"), 0, min_side, max_pixels)


def corners(image, size=(64, 32)):
    """Colours in the middle of the left and right halves."""
    assert image.mode == "RGB" and image.size == size
    return [image.getpixel((x, size[1] // 2)) for x in (size[0] // 4, 3 * size[0] // 4)]


def close(colours, expected, tolerance=3):
    return np.abs(np.array(colours, int) - np.array(expected)).max() <= tolerance


def palette_with_transparency():
    image = two_colours("P", 0, 1)
    image.putpalette([10, 200, 30, 0, 0, 255])
    return encoded(image, "PNG", transparency=0)


def sixteen_bit():
    values = np.repeat(np.array([[0x1234] * 32 + [0xFEDC] * 32], np.uint16), 32, 0)
    return encoded(Image.fromarray(values), "PNG")


KINDS = {  # content, colours of the left and the right half
    "RGB": (encoded(two_colours(), "PNG"), [(255, 0, 0), (0, 0, 255)]),
    "palette": (encoded(two_colours().quantize(2), "PNG"), [(255, 0, 0), (0, 0, 255)]),
    "palette with transparency": (palette_with_transparency(), [(255, 255, 255), (0, 0, 255)]),
    "GIF": (encoded(two_colours().quantize(4), "GIF"), [(255, 0, 0), (0, 0, 255)]),
    "grey": (encoded(two_colours("L", 40, 200), "PNG"), [(40,) * 3, (200,) * 3]),
    "grey JPEG": (encoded(two_colours("L", 40, 200), "JPEG"), [(40,) * 3, (200,) * 3]),
    "one bit": (encoded(two_colours("1", 0, 1), "PNG"), [(0,) * 3, (255,) * 3]),
    "LA": (encoded(two_colours("LA", (0, 255), (0, 127)), "PNG"), [(0,) * 3, (128,) * 3]),  # half black on white
    "RGBA": (encoded(two_colours("RGBA", (255, 0, 0, 255), (0, 0, 255, 0)), "PNG"), [(255, 0, 0), (255, 255, 255)]),
    "half RGBA": (encoded(two_colours("RGBA", (0, 200, 0, 51), (0, 0, 0, 255)), "PNG"), [(204, 244, 204), (0, 0, 0)]),
    "RGB with a transparent colour": (
        encoded(two_colours(), "PNG", transparency=(0, 0, 255)),
        [(255, 0, 0), (255, 255, 255)],
    ),
    "WebP with alpha": (
        encoded(two_colours("RGBA", (255, 0, 0, 255), (0, 0, 255, 0)), "WEBP", lossless=True),
        [(255, 0, 0), (255, 255, 255)],
    ),
    "CMYK JPEG": (
        encoded(two_colours("CMYK", (0, 255, 255, 0), (255, 255, 0, 0)), "JPEG", quality=95),
        [(255, 0, 0), (0, 0, 255)],
    ),
    "YCCK-like CMYK": (
        encoded(two_colours("CMYK", (0, 0, 0, 255), (0, 0, 0, 55)), "JPEG", quality=95),
        [(0,) * 3, (200,) * 3],
    ),
    "16-bit grey": (sixteen_bit(), [(0x12,) * 3, (0xFE,) * 3]),
    "progressive JPEG": (encoded(two_colours(), "JPEG", progressive=True, quality=95), [(255, 0, 0), (0, 0, 255)]),
    "TIFF": (encoded(two_colours(), "TIFF"), [(255, 0, 0), (0, 0, 255)]),
}


@pytest.mark.parametrize("kind", KINDS)
def test_read_image_of_each_kind(kind, tmp_path):
    content, expected = KINDS[kind]
    assert close(corners(read(tmp_path, content)), expected)


def test_16_bit_values_are_kept(tmp_path):
    values = np.arange(0, 65536, 64, dtype=np.uint16).reshape(16, 64)
    image = np.array(read(tmp_path, encoded(Image.fromarray(values), "PNG")))
    assert (image == (values >> 8)[..., None]).all()
    beyond = np.array([[-5, 0, 40000], [65535, 65536, 10**6]], np.int32)  # 32 bits: what 16 cannot hold is black or white
    assert np.array(read(tmp_path, encoded(Image.fromarray(beyond), "TIFF")))[..., 0].tolist() == [[0, 0, 156], [255] * 3]


def test_exif_rotation(tmp_path):
    """Orientation 6: what is stored left is shown at the top; also when the JPEG is decoded at a smaller scale."""
    exif = Image.Exif()
    exif[0x0112] = 6
    for size in ((64, 32), (1280, 640)):
        image = read(
            tmp_path, encoded(two_colours(size=size), "JPEG", exif=exif, quality=95), min_side=16, max_pixels=10**7
        )
        width, height = image.size
        assert height == 2 * width and width >= 16
        assert close(
            [image.getpixel((width // 2, height // 4)), image.getpixel((width // 2, 3 * height // 4))],
            [(255, 0, 0), (0, 0, 255)],
        )


def test_jpegs_are_decoded_no_smaller_than_needed(tmp_path):
    content = encoded(two_colours(size=(1000, 600)), "JPEG", quality=95)
    for min_side, expected in (
        (600, (1000, 600)),
        (301, (1000, 600)),
        (300, (500, 300)),
        (250.5, (500, 300)),
        (100, (250, 150)),
        (75, (125, 75)),
        (5, (125, 75)),
    ):
        assert read(tmp_path, content, min_side=min_side).size == expected


@pytest.mark.parametrize("script", [clip, sl, dino], ids=lambda script: script.__name__)
def test_small_crops_of_jpegs_are_as_sharp_as_of_pngs(script, tmp_path):
    """Training decodes a JPEG as large as the smallest crop needs it, not as the crop's pixels alone would."""
    waves = np.sin(np.arange(512) / 4)  # 25 px long, 3 at an eighth of the size
    image = Image.fromarray(np.uint8(127 + 60 * waves + 60 * waves[:, None])).convert("RGB")
    crops = []
    for kind in "jpeg", "png":
        image.save(tmp_path / f"0.{kind}", quality=100)
        table = table_of(tmp_path, "image\n" + f"0.{kind}\n" * 6, f"{kind}.tsv")
        captions, labels = clip.Captions(table, np.full(6, -1), ["a"], [], 0), np.zeros((6, 1), int)
        data = {clip: clip.Pairs([captions], clip.Tokenizer([]), 32, 0.02, 0.0, 10**6, 0),
                sl: sl.LabelledImages([table], [labels], False, False, 32, 0.02, 10**6, 0),
                dino: dino.Views([table], [32], [(0.02, 1.0)], 4 / 3, 10**6, 0)}[script]  # fmt: skip
        batch = data.__getitems__(np.array([[0, i, 0] for i in range(6)]))
        crops.append((batch["images"] if "images" in batch else batch["crops"][0]).float())
    assert crops[1].std() > 30 and (crops[0] - crops[1]).abs().mean() < 1


@pytest.mark.parametrize("size", [(50, 1), (1, 50), (1, 1), (3000, 1)])
@pytest.mark.parametrize("kind", ["PNG", "JPEG"])
def test_very_thin_images(size, kind, tmp_path):
    image = read(tmp_path, encoded(Image.new("RGB", size, (9, 90, 200)), kind, quality=95), min_side=224)
    assert image.size == size and close([image.getpixel((0, 0))], [(9, 90, 200)])
    box = clip.crop_boxes((0.9, 1), 4 / 3, np.array([size[0] / size[1]]), 0, np.arange(1))[0] * (*size, *size)
    assert image.resize((8, 8), Image.Resampling.BICUBIC, tuple(box)).size == (8, 8)


def png_of_size(width, height):
    """A PNG whose header announces width x height, with almost no data behind it."""

    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"\0" * 100)) + chunk(b"IEND", b"")
    )


def test_refused_images_and_the_reasons(tmp_path):
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (100, 100, 3), np.uint8))
    for kind in ("JPEG", "PNG", "GIF", "WEBP"):
        content = encoded(noise, kind)
        assert read(tmp_path, content[: len(content) // 2]) == (
            "truncated" if kind in ("JPEG", "PNG", "GIF") else "cannot be decoded"
        )
    for content in (b"", b"hello world", b"<html>404</html>", b"\x89PNG\r\n\x1a\n", bytes(1000), b"\xff\xd8\xff"):
        assert read(tmp_path, content) in ("not an image", "truncated", "cannot be decoded")
    assert read(tmp_path, b"<html>404</html>") == "not an image"
    assert (
        read(tmp_path, None, "none.jpg")
        == read(tmp_path, None, "none.tar:0:5")
        == read(tmp_path, None, "none.npy:0")
        == "missing file"
    )
    assert read(tmp_path, None, ".") == read(tmp_path, None, "x\0y") == "cannot be decoded"


def test_images_with_too_many_pixels_are_refused_by_their_header(tmp_path):
    assert read(tmp_path, png_of_size(100_000, 100_000), max_pixels=89_478_485) == "more pixels than --max-pixels"
    content = encoded(two_colours(), "PNG")
    assert read(tmp_path, content, max_pixels=64 * 32).size == (64, 32)
    assert read(tmp_path, content, max_pixels=64 * 32 - 1) == "more pixels than --max-pixels"
    large = read(
        tmp_path, png_of_size(20_000, 10_000), max_pixels=10**9
    )  # beyond Pillow's own limit, then without data
    assert large == "truncated"


def test_images_in_tars(tmp_path):
    files = {
        f"{i}.{kind.lower()}": encoded(two_colours(left=(i * 40, 0, 9)), kind)
        for i, kind in enumerate(("JPEG", "PNG", "GIF", "WEBP"))
    }
    with tarfile.open(tmp_path / "00000.tar", "w") as tar:
        for name, content in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    with tarfile.open(tmp_path / "00000.tar") as tar:
        places = {member.name: (member.offset_data, member.size) for member in tar}
    for name, (offset, size) in places.items():
        in_tar = read(tmp_path, None, f"00000.tar:{offset}:{size}")
        assert in_tar.size == (64, 32) and np.array_equal(in_tar, read(tmp_path, files[name]))
    offset, size = places["1.png"]
    assert read(tmp_path, None, f"00000.tar:{offset - 100}:{size}") == "not an image"
    assert read(tmp_path, None, f"00000.tar:{offset}:{size // 2}") == "truncated"
    assert read(tmp_path, None, f"00000.tar:{offset}:100000000") == "offset or size beyond the end of the file"
    assert read(tmp_path, None, f"00000.tar:99999999:{size}") == "offset or size beyond the end of the file"
    assert read(tmp_path, None, f"00000.tar:{offset}:0") == "not an image"


def test_images_in_npy_files(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (3, 8, 8, 3), np.uint8)
    np.save(tmp_path / "a.npy", pixels)
    assert np.array_equal(read(tmp_path, None, "a.npy:2"), pixels[2])
    assert read(tmp_path, None, "a.npy:3") == "row beyond the end of the .npy file"
    assert read(tmp_path, None, "a.npy") == "no row of the .npy file is named"
    np.save(tmp_path / "b.npy", pixels.astype(np.float32))
    np.save(tmp_path / "c.npy", pixels[..., 0])
    (tmp_path / "d.npy").write_bytes(b"no array")
    assert {read(tmp_path, None, f"{name}.npy:0") for name in "bcd"} == {"no .npy file of uint8 (N, H, W, 3)"}


@pytest.mark.filterwarnings("ignore")  # Pillow's, of spoilt EXIF data
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "GIF", "WEBP", "TIFF", "BMP", "PPM"])
def test_spoilt_bytes_never_end_the_run(kind, tmp_path):
    """200 copies with a few random bytes: an image or a reason, and no exception."""
    exif = Image.Exif()
    exif[0x0112], exif[0x010E] = 6, "a text"
    content = encoded(two_colours(), kind, **({"exif": exif} if kind in ("JPEG", "PNG", "WEBP", "TIFF") else {}))
    draw, results, table = random.Random(0), Counter(), table_of(tmp_path, "image\nx\n")
    for _ in range(200):
        spoilt = bytearray(content)
        for _ in range(draw.choice([1, 2, 5, 20])):
            spoilt[draw.randrange(min(len(spoilt), draw.choice([40, 200, 10**6])))] = draw.choice(
                [0, 255, draw.randrange(256)]
            )
        (tmp_path / "x").write_bytes(spoilt)
        result = clip.read_image(table, 0, 64, 10**6)
        results[result if isinstance(result, str) else "image"] += 1
    assert len(results) > 1 and sum(results.values()) == 200


def test_odd_exif_is_no_end_of_the_run(tmp_path, monkeypatch):
    """Pillow re-serialises EXIF when it turns an image, and raises TypeError for some values."""
    Image.new("RGB", (4, 4)).save(tmp_path / "x.png")

    def odd(image):
        raise TypeError("a bytes-like object is required")

    monkeypatch.setattr(clip.ImageOps, "exif_transpose", odd)
    assert clip.read_image(table_of(tmp_path, "image\nx.png\n"), 0, 4, 100) == "cannot be decoded"


@pytest.mark.parametrize("kind, size", [(5, 8), (11, 4), (12, 8)])  # RATIONAL, FLOAT, DOUBLE
def test_exif_texts_that_are_numbers_are_no_end_of_the_run(kind, size, tmp_path):
    """An ImageDescription of a wrong type, beside an orientation that has the image turned."""
    entries = struct.pack("<HHII", 0x010E, kind, 1, 38 if size > 4 else 0) + struct.pack("<HHII", 0x0112, 3, 1, 6)
    exif = b"Exif\0\0" + struct.pack("<2sHIH", b"II", 42, 8, 2) + entries + bytes(4) + struct.pack("<II", 1, 3)
    Image.new("RGB", (4, 8)).save(tmp_path / "x.jpg", exif=exif)
    found = clip.read_image(table_of(tmp_path, "image\nx.jpg\n"), 0, 4, 100)
    assert found == "cannot be decoded" or found.size == (8, 4)


def test_large_or_oblong_arrays_are_cropped_by_the_workers(tmp_path):
    """crop_pixels samples without a filter, so it serves images of about the model's size."""
    for name, shape in {"fits": (40, 40), "large": (64, 64), "oblong": (32, 40)}.items():
        np.save(tmp_path / f"{name}.npy", np.zeros((2, *shape, 3), np.uint8))
        table = table_of(tmp_path, f"image\n{name}.npy:0\n{name}.npy:1\n")
        assert (clip.load_pixels([table], 32) is None) == (name != "fits") and clip.load_pixels([table]) is not None


def test_a_block_of_test_images_is_one_tensor(tmp_path):
    """Each tensor that a worker sends holds a file descriptor open."""
    Image.new("RGB", (40, 30), "red").save(tmp_path / "a.png")
    table = table_of(tmp_path, "image\na.png\nmissing.png\n")
    images, reasons = clip.read_squares(table, 16, 10**6, range(2))
    assert images.shape == (2, 3, 16, 16) and reasons == [0, "missing file"]
    assert images[0, 0].min() == 255 and not images[1].any()


def test_eps_is_refused_without_a_word_to_ghostscript(tmp_path, monkeypatch):
    """Pillow hands EPS to an interpreter of programs: not what bytes from the web should reach."""
    from PIL import EpsImagePlugin

    monkeypatch.setattr(EpsImagePlugin, "Ghostscript", lambda *args, **kwargs: pytest.fail("Ghostscript was started"))
    assert read(tmp_path, encoded(two_colours(), "EPS")) == "not an image"


# ------------------------------------------------------------------------------ crops


def geometry(boxes, aspect):
    """Area, aspect (width / height in pixels) and corner of boxes in fractions."""
    left, top, right, bottom = boxes.T
    return dict(
        area=(right - left) * (bottom - top), aspect=(right - left) / (bottom - top) * aspect, left=left, top=top
    )


@pytest.mark.parametrize("min_area", [0.9, 0.08])
@pytest.mark.parametrize("width, height", [(3000, 3000), (4000, 3000), (4500, 3000), (2400, 3600), (9000, 3000)])
def test_crops_have_the_law_of_random_resized_crop(min_area, width, height):
    """Two-sample Kolmogorov-Smirnov of 3,000 crops; rounded to 3 digits, since torchvision's sides are whole pixels."""
    transforms = pytest.importorskip("torchvision.transforms")
    torch.manual_seed(0)
    image = torch.empty(1).expand(3, height, width)
    tops = (
        torch.tensor(
            [transforms.RandomResizedCrop.get_params(image, (min_area, 1.0), (3 / 4, 4 / 3)) for _ in range(3000)]
        )
        .double()
        .numpy()
    )
    top, left, h, w = tops.T
    theirs = geometry(np.stack([left / width, top / height, (left + w) / width, (top + h) / height], 1), width / height)
    ours = geometry(clip.crop_boxes((min_area, 1), 4 / 3, np.full(3000, width / height), 0, 2, np.arange(3000)), width / height)
    p_values = {name: stats.ks_2samp(ours[name].round(3), theirs[name].round(3)).pvalue for name in ours}
    assert min(p_values.values()) > 1e-4, p_values


def test_crops_lie_inside_and_have_the_asked_shape():
    aspect = np.exp(np.random.default_rng(0).uniform(-3, 3, 20_000))
    for min_area in (1e-4, 0.5, 0.9, 1.0):
        boxes = clip.crop_boxes((min_area, 1), 4 / 3, aspect, 5, np.arange(20_000))
        assert boxes.shape == (20_000, 4) and boxes.min() >= 0 and boxes.max() <= 1 + 1e-12
        shape = geometry(boxes, aspect)
        assert (shape["area"] > 0).all() and shape["area"].max() <= 1 + 1e-9
        inside = (aspect > 3 / 4) & (aspect < 4 / 3)
        assert (shape["aspect"] > 3 / 4 - 1e-9).all() and (shape["aspect"] < 4 / 3 + 1e-9).all()
        assert shape["area"][inside].min() >= min_area - 1e-9
    whole = clip.crop_boxes((1.0, 1), 4 / 3, np.ones(50), 0, np.arange(50))
    np.testing.assert_allclose(whole, np.tile([0, 0, 1, 1], (50, 1)), atol=1e-12)  # --crop-scale 1: all of a square


def test_crops_depend_on_their_keys_alone():
    aspect, rows = np.linspace(0.5, 2, 40), np.arange(40)
    boxes = clip.crop_boxes((0.3, 1), 4 / 3, aspect, 0, 2, rows, rows % 3)
    for i in (0, 17, 39):
        assert np.array_equal(
            clip.crop_boxes((0.3, 1), 4 / 3, aspect[i : i + 1], 0, 2, rows[i : i + 1], rows[i : i + 1] % 3)[0], boxes[i]
        )
    assert not np.isclose(clip.crop_boxes((0.3, 1), 4 / 3, aspect, 1, 2, rows, rows % 3), boxes).all(1).any()


def smooth_image(width, height):
    y, x = np.mgrid[0 : 1 : height * 1j, 0 : 1 : width * 1j]
    return Image.fromarray((np.stack([x, y, np.sin(3 * x + 2 * y) ** 2], 2) * 255).round().astype(np.uint8))


@pytest.mark.parametrize("size", [(400, 300), (300, 401), (224, 224), (640, 97)])
def test_centre_square_is_resize_and_centre_crop(size):
    """torchvision rounds the long side and the offset to whole pixels: a shift by half a pixel is up to 5 grey levels here."""
    transforms = pytest.importorskip("torchvision.transforms.v2")
    image, box = smooth_image(*size), clip.center_box(*size)
    assert box[2] - box[0] == box[3] - box[1] == min(size) and box[0] + box[2] == size[0] and box[1] + box[3] == size[1]
    ours = np.array(image.resize((64, 64), Image.Resampling.BICUBIC, box), int)
    resize = transforms.Resize(64, transforms.InterpolationMode.BICUBIC)
    theirs = np.array(transforms.CenterCrop(64)(resize(image)), int)
    assert np.abs(ours - theirs).max() <= 7 and np.abs(ours - theirs).mean() < 3


def test_crops_of_oblong_files_have_the_asked_shape(tmp_path, monkeypatch):
    """In pixels of a picture that is wider than high."""
    Image.new("RGB", (60, 50)).save(tmp_path / "a.png")
    boxes, resize = [], Image.Image.resize
    monkeypatch.setattr(Image.Image, "resize", lambda *args: boxes.append(args[3]) or resize(*args))
    clip.read_crops([table_of(tmp_path, "image\na.png\n")], [[0, 0, i] for i in range(200)], 8, 1, 0.3, 10**6, 0)
    left, top, right, bottom = np.array(boxes).T
    ratio, area = (right - left) / (bottom - top), (right - left) * (bottom - top) / 3000
    assert 0.75 <= ratio.min() < 0.8 and 1.25 < ratio.max() <= 4 / 3 and 0.3 <= area.min() < 0.35


def test_crop_pixels():
    pixels = torch.from_numpy(np.random.default_rng(0).integers(0, 256, (4, 32, 32, 3), np.uint8))
    whole = torch.tensor([[0.0, 0, 1, 1]]).repeat(4, 1).double()
    x = pixels.permute(0, 3, 1, 2).float()
    torch.testing.assert_close(clip.crop_pixels(pixels, whole, 32), x, atol=1e-2, rtol=0)  # fp32 coordinates
    for size in (48, 20):
        expected = torch.nn.functional.interpolate(x, (size, size), mode="bilinear", align_corners=False)
        torch.testing.assert_close(clip.crop_pixels(pixels, whole, size), expected, atol=2e-2, rtol=0)
    box = torch.tensor([[8, 4, 24, 20]]).repeat(4, 1) / 32  # 16 x 16 whole pixels, to their own size
    torch.testing.assert_close(clip.crop_pixels(pixels, box, 16), x[:, :, 4:20, 8:24], atol=1e-2, rtol=0)
    image, box = smooth_image(96, 96), (10.5, 20.25, 90, 70)
    ours = (
        clip.crop_pixels(torch.from_numpy(np.array(image))[None], torch.tensor([box]) / 96, 64)[0]
        .permute(1, 2, 0)
        .numpy()
    )
    theirs = np.array(image.resize((64, 64), Image.Resampling.BILINEAR, box), float)
    assert np.abs(ours - theirs).max() < 3  # Pillow filters while it shrinks, by 1.2 at most here


# ------------------------------------------------------------------------------ uniform_hash, Sampler


def test_uniform_hash_is_uniform():
    n = 40_000
    rows = np.arange(n)
    for keys in [
        (rows,),
        (0, rows),
        (3, 1, rows, 0),
        (0, 2, 7, rows),
        (rows, rows),
        (rows * 2**32,),
        (-rows,),
        (0, rows // 200, rows % 200),
    ]:
        draws = clip.uniform_hash(*keys)
        assert draws.shape == (n,) and draws.dtype == np.float64 and 0 <= draws.min() and draws.max() < 1
        assert stats.kstest(draws, "uniform").pvalue > 1e-4
        pairs = np.histogram2d(draws[:-1], draws[1:], 20, [[0, 1], [0, 1]])[0]  # neighbours are independent
        assert stats.chisquare(pairs.ravel()).pvalue > 1e-4
    seeds = [clip.uniform_hash(seed, rows) for seed in range(4)]
    assert np.abs(np.corrcoef(seeds) - np.eye(4)).max() < 5 / math.sqrt(n)
    assert len(np.unique(clip.uniform_hash(0, rows))) == n and not np.array_equal(
        clip.uniform_hash(1, 2), clip.uniform_hash(2, 1)
    )


def test_uniform_hash_depends_on_its_keys_alone():
    rows, columns = np.arange(50)[:, None], np.arange(7)
    grid = clip.uniform_hash(9, rows, columns)
    assert grid.shape == (50, 7)
    assert all(grid[i, j] == clip.uniform_hash(9, i, j) for i in (0, 3, 49) for j in (0, 6))
    assert np.array_equal(grid[10:20], clip.uniform_hash(9, rows[10:20].astype(np.int32), columns))
    assert grid[3, 4] == clip.uniform_hash(9, torch.tensor(3), np.uint8(4))


def sampler(sizes, shares, batch_size=12, seed=0, start=0, stop=40, rank=0, world_size=1):
    return clip.Sampler(sizes, np.array(shares, float) / sum(shares), batch_size, seed, start, stop, rank, world_size)


@pytest.mark.parametrize("sizes, batch_size", [([50], 12), ([12], 12), ([5], 12), ([7, 100, 13], 12), ([1], 3)])
def test_each_row_comes_once_per_epoch(sizes, batch_size):
    examples = np.concatenate(list(sampler(sizes, sizes, batch_size, stop=200)))
    assert examples.shape == (200 * batch_size, 3) and examples.dtype == np.int64
    for s, size in enumerate(sizes):
        epochs = examples[examples[:, 0] == s]
        last = epochs[:, 2].max()
        assert epochs[:, 2].min() == 0 and last >= 2
        for epoch in range(last + 1):
            rows = epochs[epochs[:, 2] == epoch, 1]
            assert len(np.unique(rows)) == len(rows) and (epoch == last or len(rows) == size) and rows.max() < size


def test_batches_are_the_same_for_any_number_of_processes_and_after_a_restart():
    for sizes, shares in (([100], [1]), ([7, 100, 13], [1, 2, 1])):
        whole = list(sampler(sizes, shares))
        assert len(whole) == 40 and all(batch.shape == (12, 3) for batch in whole)
        for world_size in (2, 3):
            parts = [list(sampler(sizes, shares, rank=rank, world_size=world_size)) for rank in range(world_size)]
            assert all(np.array_equal(np.concatenate(batch), expected) for batch, expected in zip(zip(*parts), whole))
        for start in (1, 13, 39):
            rest = list(sampler(sizes, shares, start=start))
            assert len(rest) == 40 - start
            assert all(np.array_equal(a, b) for a, b in zip(rest, whole[start:]))


def test_orders_differ_by_epoch_seed_and_set():
    def order(seed, epoch):
        examples = np.concatenate(list(sampler([60], [1], seed=seed)))
        return examples[examples[:, 2] == epoch, 1].tolist()

    orders = [order(0, 0), order(0, 1), order(1, 0), list(range(60))]
    assert all(sorted(rows) == list(range(60)) for rows in orders) and len(set(map(tuple, orders))) == 4
    batch = sampler([60, 60], [1, 1]).batch(0)
    assert set(batch[batch[:, 0] == 0, 1]) != set(batch[batch[:, 0] == 1, 1])
    single = np.concatenate(list(sampler([600], [1], batch_size=60, stop=10)))[:, 1]
    assert abs(np.corrcoef(single, np.arange(600))[0, 1]) < 0.2


@settings(max_examples=150, deadline=None)
@given(st.lists(st.tuples(st.integers(1, 50), st.floats(0.001, 10)), min_size=1, max_size=5), st.integers(1, 40))
def test_shares_are_exact(sets, batch_size):
    """After any number of steps each of up to three sets has given its share within one pair; every batch is full."""
    sizes, shares = zip(*sets)
    given_so_far = np.zeros(len(sets))
    fractions = np.array(shares) / sum(shares)
    for step, batch in enumerate(sampler(list(sizes), shares, batch_size, stop=60), 1):
        assert len(batch) == batch_size
        given_so_far += np.bincount(batch[:, 0], minlength=len(sets))
        assert np.abs(given_so_far - fractions * step * batch_size).max() <= max(1, (len(sets) - 1) / 2) + 1e-6


def test_sets_are_mixed_within_a_batch():
    batch = sampler([500, 500], [1, 1], batch_size=400).batch(0)
    assert 60 < batch[:200, 0].sum() < 140  # in order, a process would get one set only


# ------------------------------------------------------------------------------ metrics


def average_ranks(values):
    return np.array(
        [sum(other < value for other in values) + (sum(other == value for other in values) + 1) / 2 for value in values]
    )


def slow_spearman(x, y):
    x, y = average_ranks(x), average_ranks(y)
    x, y = x - x.mean(), y - y.mean()
    return float((x * y).sum() / math.sqrt((x * x).sum() * (y * y).sum())) if x.any() and y.any() else None


def slow_metrics(predictions, labels, counts):
    """The definitions, with a confusion matrix and loops."""
    C = len(counts)
    K = [[sum(1 for p, t in zip(predictions, labels) if (t, p) == (i, j)) for j in range(C)] for i in range(C)]
    accuracy = {c: K[c][c] / sum(K[c]) for c in range(C) if sum(K[c])}
    order = sorted(range(C), key=lambda c: (-counts[c], c))
    groups = dict(head=order[: C // 3], medium=order[C // 3 : 2 * (C // 3)], tail=order[2 * (C // 3) :])

    def mean(classes):
        values = [accuracy[c] for c in classes if c in accuracy]
        return sum(values) / len(values) if values else None

    return {
        "n": len(labels),
        "top1": sum(K[c][c] for c in range(C)) / len(labels),
        "balanced": mean(range(C)),
        **{name: mean(classes) if any(counts) else None for name, classes in groups.items()},
        "spearman_acc": slow_spearman([counts[c] for c in accuracy], list(accuracy.values())),
        "spearman_pred": slow_spearman(counts, [sum(K[t][p] for t in range(C)) for p in range(C)]),
        "chance": 1 / C,
    }


def assert_same_metrics(ours, theirs):
    assert ours.keys() == theirs.keys()
    for name, value in theirs.items():
        assert ours[name] == (None if value is None else pytest.approx(value, abs=1e-9)), name
        assert ours[name] is None or type(ours[name]) in (int, float), name  # what json can write


def from_confusion(K):
    labels, predictions = zip(*[(t, p) for t, row in enumerate(K) for p, n in enumerate(row) for _ in range(n)])
    return np.array(predictions), np.array(labels)


def test_worked_examples():
    """methods.md I."""
    assert clip.rank_correlation(np.array([10, 5, 5, 0]), np.array([0.9, 0.5, 0.7, 0.1])) == pytest.approx(
        0.948683, abs=1e-6
    )
    metrics = clip.imbalance_metrics(*from_confusion([[3, 1], [2, 2]]), np.array([100, 10]))
    assert (metrics["n"], metrics["top1"], metrics["balanced"], metrics["chance"]) == (8, 0.625, 0.625, 0.5)
    assert metrics["spearman_acc"] == metrics["spearman_pred"] == pytest.approx(1)
    assert (metrics["head"], metrics["medium"], metrics["tail"]) == (None, None, 0.625)  # C // 3 is 0
    confusion = np.diag([9, 5, 7, 1]) + np.diag([1, 5, 3], 1) + np.diag([0, 0, 9], -1)
    assert clip.imbalance_metrics(*from_confusion(confusion), np.array([10, 5, 5, 0]))["spearman_acc"] == pytest.approx(
        0.948683, abs=1e-6
    )


def test_a_collapsed_model_has_no_correlation():
    labels, counts = np.repeat(np.arange(4), 5), np.array([9, 5, 2, 0])
    metrics = clip.imbalance_metrics(np.full(20, 1), labels, counts)
    assert metrics["top1"] == metrics["balanced"] == 0.25 and metrics["spearman_pred"] is not None
    perfect = clip.imbalance_metrics(labels, labels, counts)
    assert perfect["spearman_acc"] is None and perfect["spearman_pred"] is None  # all accuracies, all predictions equal
    assert clip.imbalance_metrics(labels[::-1], labels, np.full(4, 7))["spearman_pred"] is None  # no imbalance
    unknown = clip.imbalance_metrics(labels, labels, np.zeros(4, int))
    assert unknown["balanced"] == 1 and unknown["head"] is unknown["tail"] is unknown["spearman_acc"] is None


def test_thirds():
    """Seven classes: 2, 2 and the 3 rest, by falling count, ties by id; classes without test images are left out."""
    counts = np.array([5, 9, 5, 1, 0, 5, 30])  # order 6 1 | 0 2 | 5 3 4
    labels = np.array([6, 6, 1, 1, 0, 0, 5, 5, 5, 5, 3])
    predictions = np.array([6, 6, 1, 0, 1, 1, 5, 5, 5, 0, 0])
    metrics = clip.imbalance_metrics(predictions, labels, counts)
    assert (metrics["head"], metrics["medium"], metrics["tail"]) == (0.75, 0.0, 0.375)
    assert metrics["balanced"] == pytest.approx((1 + 0.5 + 0 + 0.75 + 0) / 5)
    only_tail = clip.imbalance_metrics(np.array([3]), np.array([3]), counts)
    assert (only_tail["head"], only_tail["medium"], only_tail["tail"]) == (None, None, 1.0)
    assert only_tail["spearman_acc"] is None  # one class has test images


@settings(max_examples=200, deadline=None)
@given(st.data())
def test_metrics_equal_the_slow_ones(data):
    C = data.draw(st.integers(1, 9))
    pairs = data.draw(st.lists(st.tuples(st.integers(0, C - 1), st.integers(0, C - 1)), min_size=1, max_size=40))
    counts = np.array(data.draw(st.lists(st.integers(0, 5), min_size=C, max_size=C)))
    predictions, labels = np.array(pairs).T
    assert_same_metrics(
        clip.imbalance_metrics(predictions, labels, counts),
        slow_metrics(predictions.tolist(), labels.tolist(), counts.tolist()),
    )


def slow_retrieval(images, texts, owner):
    """Ranks by loops; equal scores of wrong items count against the right one."""
    scores = images @ texts.T
    ranks = {"i2t": [], "t2i": []}
    for i in range(len(images)):
        best = max((scores[i][t] for t in range(len(texts)) if owner[t] == i), default=-math.inf)
        ranks["i2t"].append(sum(scores[i][t] >= best for t in range(len(texts)) if owner[t] != i))
    for t in range(len(texts)):
        ranks["t2i"].append(sum(scores[i][t] >= scores[owner[t]][t] for i in range(len(images)) if i != owner[t]))
    return {f"{way}_r{k}": sum(rank < k for rank in ranks[way]) / len(ranks[way]) for way in ranks for k in (1, 5, 10)}


def test_retrieval_worked_example():
    """methods.md M: images x captions [[.9, .2, .8, .1], [.3, .6, .5, .7]], two captions an image."""
    texts = torch.tensor([[0.9, 0.2, 0.8, 0.1], [0.3, 0.6, 0.5, 0.7]]).T
    metrics = clip.retrieval_metrics(torch.eye(2), texts, np.array([0, 0, 1, 1]))
    assert metrics == dict(i2t_r1=1.0, i2t_r5=1.0, i2t_r10=1.0, t2i_r1=0.5, t2i_r5=1.0, t2i_r10=1.0)


@pytest.mark.parametrize("n_images, n, levels", [(7, 20, 2), (40, 90, 3), (300, 700, 40), (5, 5, 1)])
def test_retrieval_equals_brute_force(n_images, n, levels):
    """Small integers: products are exact in fp32, and ties are frequent. 300 and 700: more than one chunk of queries."""
    generator = np.random.default_rng(n)
    owner = np.concatenate([np.arange(n_images), generator.integers(0, n_images, n - n_images)])
    generator.shuffle(owner)
    images = generator.integers(-levels, levels + 1, (n_images, 6))
    texts = generator.integers(-levels, levels + 1, (n, 6)) + images[owner]
    ours = clip.retrieval_metrics(torch.from_numpy(images).float(), torch.from_numpy(texts).float(), owner)
    assert ours == pytest.approx(slow_retrieval(images, texts, owner))


@pytest.mark.parametrize("n_images, n, n_captions", [(300, 700, 200), (300, 700, 5), (6, 6, 1)])
def test_a_caption_of_several_images_is_right_for_each(tmp_path, n_images, n, n_captions):
    """methods.md M: duplicates are grouped, any image of the group is right; here and in evaluate.py, by brute force."""
    rng = np.random.default_rng(n_captions)
    owner = rng.permutation(np.r_[np.arange(n_images), rng.integers(n_images, size=n - n_images)])
    captions, kinds = rng.integers(n_captions, size=n) - 2**62, rng.normal(size=(n_captions, 16))
    texts = F.normalize(torch.from_numpy(kinds[captions + 2**62]).float(), dim=1)
    noise = torch.from_numpy(0.4 * rng.normal(size=(n_images, 16))).float()
    images = F.normalize(texts[np.unique(owner, return_index=True)[1]] + noise, dim=1)
    scores = (images.double() @ texts.double().T).numpy()
    has = np.zeros((n_images, n_captions), bool)
    has[owner, captions + 2**62] = True
    right = has[:, captions + 2**62]
    i2t = np.array([(row[~ok] >= row[ok].max() - 1e-6).sum() for row, ok in zip(scores, right)])
    t2i = np.array([(row[~ok] >= row[ok].max() - 1e-6).sum() for row, ok in zip(scores.T, right.T)])
    assert n_captions > 1 or not i2t.any() and not t2i.any()
    ours = clip.retrieval_metrics(images, texts, owner, captions)
    assert ours == pytest.approx({f"{way}_r{k}": (rank < k).mean() for way, rank in (("i2t", i2t), ("t2i", t2i))
                                  for k in (1, 5, 10)}, abs=2 / n_images)
    group = np.unique(captions, return_inverse=True)[1]
    found = evaluate.shared_ranks(images.numpy(), texts.numpy(), owner, group, "cpu")
    assert all(np.mean(a != b) < 0.01 for a, b in zip(found, (i2t, t2i)))
    np.savez(tmp_path / "pairs.npz", features=images, text_features=texts, image_ids=owner, caption_ids=captions)
    row = next(iter(evaluate.retrieval([str(tmp_path / "pairs.npz")], [1, 5, 10], 0, 0, "cpu")["rows"].values()))
    assert {name: row[name]["value"] for name in ours} == pytest.approx(ours, abs=2 / n_images)
    alone = evaluate.shared_ranks(images.numpy(), texts.numpy(), owner, np.arange(n), "cpu")
    assert all(map(np.array_equal, alone, evaluate.retrieval_ranks(images.numpy(), texts.numpy(), owner, "cpu")))


def test_constant_features_rank_last():
    not_a_number = clip.retrieval_metrics(torch.eye(12), torch.full((12, 12), torch.nan), np.arange(12))
    assert set(not_a_number.values()) == {0.0}
    metrics = clip.retrieval_metrics(torch.ones(30, 4), torch.ones(60, 4), np.arange(60) // 2)
    assert set(metrics.values()) == {0.0}
    perfect = torch.nn.functional.normalize(torch.randn(30, 64), dim=1)
    assert set(clip.retrieval_metrics(perfect, perfect, np.arange(30)).values()) == {1.0}


def test_evaluation_sees_the_centre_square(tmp_path):
    """Of a file and of an array, 60 x 40 px: 32 px of the square in the middle."""
    y, x = np.mgrid[:40, :60]
    image = Image.fromarray(np.stack([4 * x, 6 * y, 2 * x + 3 * y], 2).astype(np.uint8))
    image.save(tmp_path / "a.png")
    np.save(tmp_path / "a.npy", np.array(image)[None])
    tower = types.SimpleNamespace(image_size=32, embed_dim=3072, encode_image=lambda x: x.float().flatten(1))
    expected = image.resize((32, 32), Image.Resampling.BICUBIC, clip.center_box(60, 40))
    for field in "a.png", "a.npy:0":
        embed, *_ = clip.encode_images(tower, table_of(tmp_path, f"image\n{field}\n"), 0, 10**6, torch.device("cpu"))
        seen = embed[0].numpy().reshape(3, 32, 32)
        assert np.abs(seen - np.array(expected, float).transpose(2, 0, 1)).max() < 3
    steps = np.repeat(np.uint8(255 * (x // 7 % 2))[..., None], 3, 2)  # a bicubic filter overshoots at their edges
    np.save(tmp_path / "b.npy", steps[None])
    embed, *_ = clip.encode_images(tower, table_of(tmp_path, "image\nb.npy:0\n"), 0, 10**6, torch.device("cpu"))
    expected = Image.fromarray(steps).resize((32, 32), Image.Resampling.BICUBIC, clip.center_box(60, 40))
    assert np.abs(embed[0].numpy().reshape(3, 32, 32) - np.array(expected, float).transpose(2, 0, 1)).max() < 3


def test_test_images_are_decoded_as_large_as_they_are_seen(tmp_path):
    """A JPEG of fine waves is seen as its PNG is: not decoded smaller than the network's images."""
    waves = 127 + 60 * np.sin(np.arange(128) / 3)  # 19 px long, 5 of the 32 that are seen
    image, seen = Image.fromarray(np.uint8(waves + 0 * waves[:, None])).convert("RGB"), []
    for kind in "jpeg", "png":
        image.save(tmp_path / f"0.{kind}", quality=100)
        seen.append(clip.read_squares(table_of(tmp_path, f"image\n0.{kind}\n"), 32, 10**6, [0])[0][0].float())
    assert seen[1].std() > 20 and (seen[0] - seen[1]).abs().mean() < 4


def test_the_first_line_names_the_extremes(tmp_path):
    """The most and the least frequent class, one without images too; shares where there are several sets."""
    tables = [table_of(tmp_path, "image\n" + "x\n" * n, f"{n}.tsv") for n in (3, 1200)]
    counts, names = np.array([4, 1500, 0]), ["cat", "dog", "cow"]
    line = clip.describe("w", tables, np.array([0.25, 0.75]), names, counts)
    assert line == (f"world w: 3 rows of {tables[0].path} (share 0.250), 1,200 rows of {tables[1].path} (share 0.750), 3 "
                    "classes, most frequent 'dog' 1,500, least frequent 'cow' 0")  # fmt: skip
    line = clip.describe("w", tables[:1], np.ones(1), names, 0 * counts)
    assert line == f"world w: 3 rows of {tables[0].path}, 3 classes"


def test_the_table_of_metrics_by_hand(capsys):
    """Percent with one decimal, correlations with three, - for what cannot be computed."""
    keys = ("n", "top1", "balanced", "head", "medium", "tail", "spearman_acc", "spearman_pred", "chance", "retrieval")
    values = (64, 0.40625, 0.3333, 1.0, 0.0, None, -0.12345, None, 1 / 120, None)
    clip.print_table({"val": dict(zip(keys, values)), "pairs": dict.fromkeys(keys) | {"n": 9, "retrieval": {"i2t_r1": 1 / 9}}})
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert lines[1] == "val 64 40.6% 33.3% 100.0% 0.0% - -0.123 - 0.8%".split()
    assert lines[2:] == [["retrieval", "n", "i2t_r1"], ["pairs", "9", "11.1%"]]


def test_caption_statistics_by_hand(tmp_path):
    """Pairs with a caption that the batch has twice, over the first four batches; different captions of all rows."""
    said = ["a cat", "a cat", "a dog", "a dog", "an ape", "a bee", "an ox", "an eel"]
    table = table_of(tmp_path, "image\tcaption\n" + "".join(f"x\t{text}\n" for text in said))
    pairs = types.SimpleNamespace(captions=[clip.Captions(table, np.full(8, -1), ["{caption}"], [], 0)], tables=[table])
    batches = [[0, 1, 2, 4], [3, 5, 6, 7], [0, 1, 2, 3], [0, 1, 4, 5], [0, 0, 0, 0]]  # the fifth is not looked at
    sampler = types.SimpleNamespace(stop=9, batch=lambda step: np.array([[0, row, 0] for row in batches[step]]))
    expected = "captions: 50.0% of a batch share theirs with another pair, 6 distinct in 8 rows (first epoch)"
    assert clip.caption_statistics(pairs, sampler) == expected


def test_unlabelled_sets_are_counted_by_an_even_sample(tmp_path, monkeypatch):
    monkeypatch.setattr(clip, "COUNT_CAPTIONS", 100)
    classes = [dict(name="cat"), dict(name="dog")]
    table = table_of(tmp_path, "image\tcaption\n" + "".join(f"x\ta {'dog' if i % 4 else 'cat'}\n" for i in range(300)))
    captions = clip.Captions(table, np.full(300, -1), ["{caption}"], classes, 0)
    assert clip.count_classes([captions], np.ones(1), classes).tolist() == [75, 225]
