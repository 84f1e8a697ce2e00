"""Two small real sets to probe features on: scikit-learn's digits and the stamps of Tux Paint.

    pip install scikit-learn                     # digits: 1,797 handwritten digits of 8 x 8 pixels, 10 classes
    apt install tuxpaint-stamps-default          # stamps: 790 pictures, the 17 folders they lie in as classes
    python recipes/transfer_sets.py              # or digits, or stamps
    python dino_laionet.py --transfer auto data/transfer/digits data/transfer/stamps

Each becomes a folder OUT/NAME with classes.tsv, train.tsv and test.tsv: a quarter of each class, drawn with the seed,
is the test set. Digits are scaled to 32 px, rows of one .npy; stamps are shrunk to 256 px, files. Of the stamps,
mirrored twins and equal files are left out, which the split could part, and .svg, which Pillow cannot read. Their
classes are uneven: a third are symbols, and five folders have fewer than ten pictures.
"""

import argparse
import hashlib
from pathlib import Path

import numpy as np
from PIL import Image


def write_set(folder, names, images, labels, seed):
    """classes.tsv, and train.tsv and test.tsv of images (TSV fields) and labels [N], the same parts for a seed."""
    rng, is_test = np.random.default_rng(seed), np.zeros(len(labels), bool)
    for label in range(len(names)):
        rows = rng.permutation(np.flatnonzero(labels == label))
        is_test[rows[: max(1, round(len(rows) / 4))]] = True
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "classes.tsv").write_text("name\n" + "".join(f"{name}\n" for name in names), "utf-8")
    for part, rows in ("train", np.flatnonzero(~is_test)), ("test", np.flatnonzero(is_test)):
        lines = "".join(f"{images[row]}\t{labels[row]}\n" for row in rows)
        (folder / f"{part}.tsv").write_text(f"image\tlabel\n{lines}", "utf-8")
        print(f"{folder / part}.tsv: {len(rows)} rows, {len(names)} classes")


def write_digits(folder, seed):
    try:
        from sklearn.datasets import load_digits
    except ImportError:
        raise SystemExit("digits: no scikit-learn; pip install scikit-learn") from None
    digits = load_digits()
    folder.mkdir(parents=True, exist_ok=True)
    grey = [Image.fromarray(np.uint8(x / 16 * 255)).resize((32, 32), Image.Resampling.BICUBIC) for x in digits.images]
    np.save(folder / "digits.npy", np.stack([np.asarray(x.convert("RGB")) for x in grey]))
    fields = [f"digits.npy:{row}" for row in range(len(grey))]
    write_set(folder, list(map(str, digits.target_names)), fields, digits.target, seed)


def write_stamps(folder, source, seed):
    """source: a folder of class folders."""
    seen, found = set(), []
    for path in sorted(source.glob("*/**/*.png")):
        content = hashlib.sha256(path.read_bytes()).digest()
        if not path.stem.endswith(("_mirror", "_flip")) and content not in seen:
            found.append(path.relative_to(source))
            seen.add(content)
    names = sorted({path.parts[0] for path in found})
    labels = np.array([names.index(path.parts[0]) for path in found])
    if len(names) < 2 or np.bincount(labels).min() < 2:
        raise SystemExit(
            f"stamps: {source} has {len(names)} folders with pictures, it needs 2, of 2 pictures each: "
            "apt install tuxpaint-stamps-default, or pass --stamps FOLDER"
        )
    for path in found:
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        image = Image.open(source / path).convert("RGBA")
        image.thumbnail((256, 256))
        image.save(folder / path)
    write_set(folder, names, [path.as_posix() for path in found], labels, seed)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("sets", nargs="*", default=["digits", "stamps"], help="which to write: digits, stamps")
    parser.add_argument("--out", type=Path, default=Path("data/transfer"), help="folder to write into")
    parser.add_argument("--stamps", type=Path, default=Path("/usr/share/tuxpaint/stamps"), help="folder of the stamps")
    parser.add_argument("--seed", type=int, default=0, help="of the split")
    args = parser.parse_args()
    for name in args.sets:
        if name == "digits":
            write_digits(args.out / name, args.seed)
        elif name == "stamps":
            write_stamps(args.out / name, args.stamps, args.seed)
        else:
            raise SystemExit(f"{name}: no such set; digits, stamps")
