"""Losses and vocabularies on real long-tailed pictures: python benchmarks/real_long_tail.py [digits | stamps]

digits: scikit-learn's 1,797 digits, half of each class for testing, the rest cut to an imbalance factor of 100 as
far as they go, from 87 images to 1 (n_c falls geometrically in a class order drawn by the seed). stamps: Debian's
tuxpaint-stamps-default, top-level category as the class, 30 % of each for testing. Each arm trains
sl_vocab_subsample.py (tiny, at 32 px) for --steps; printed are mean and (population) standard deviation over the seeds.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
from pathlib import Path

import numpy as np
from PIL import Image

ROOT = Path(__file__).resolve().parent.parent
ARMS = {
    "softmax": [],
    "vocabulary M = C / 2": ["--vocab", "HALF", "--vocab-group", "4"],
    "the same, drawn evenly": ["--vocab", "HALF", "--vocab-group", "4", "--vocab-power", "0"],
    "the same, log-q": ["--vocab", "HALF", "--vocab-group", "4", "--loss", "log-q"],
    "balanced softmax": ["--loss", "balanced"],
    "focal": ["--loss", "focal"],
    "class-balanced sampling": ["--sampler", "class"],
    "square-root sampling": ["--sampler", "sqrt"],
}


def write_tables(folder: Path, names: list[str], train: list[tuple[str, int]], test: list[tuple[str, int]]) -> None:
    (folder / "classes.tsv").write_text("name\n" + "\n".join(names) + "\n")
    for name, rows in ("train", train), ("val", test):
        (folder / f"{name}.tsv").write_text("image\tlabel\n" + "".join(f"{image}\t{c}\n" for image, c in rows))


def make_digits(folder: Path, seed: int) -> int:
    from sklearn.datasets import load_digits

    digits, rng = load_digits(), np.random.default_rng(seed)
    pixels = (digits.images * 255 / 16).astype(np.uint8)
    pixels = [np.array(Image.fromarray(x).resize((32, 32), Image.Resampling.BICUBIC).convert("RGB")) for x in pixels]
    np.save(folder / "digits.npy", np.stack(pixels))
    train, test = [], []
    for rank, c in enumerate(rng.permutation(10)):
        rows = rng.permutation(np.flatnonzero(digits.target == c))
        half = len(rows) // 2
        test += [(f"digits.npy:{row}", c) for row in rows[:half]]
        train += [(f"digits.npy:{row}", c) for row in rows[half : half + max(1, round(87 * 100 ** (-rank / 9)))]]
    write_tables(folder, [f"digit {c}" for c in range(10)], train, test)
    return 10


def make_stamps(folder: Path, seed: int) -> int:
    source, rng = Path("/usr/share/tuxpaint/stamps"), np.random.default_rng(seed)
    files = sorted(path for path in source.rglob("*.png") if "_mirror" not in path.name and "_flip" not in path.name)
    if not files:
        raise SystemExit(f"no pictures in {source}: install Debian's tuxpaint-stamps-default")
    by_class = {}
    for path in files:
        by_class.setdefault(path.relative_to(source).parts[0], []).append(path)
    names = [name for name, paths in sorted(by_class.items()) if len(paths) >= 6]
    pixels, train, test = [], [], []
    for c, name in enumerate(names):
        order = rng.permutation(len(by_class[name]))
        for i, k in enumerate(order):
            image = Image.open(by_class[name][k]).convert("RGBA")
            image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
            (test if i < 0.3 * len(order) else train).append((f"stamps.npy:{len(pixels)}", c))
            pixels.append(np.array(image.resize((32, 32), Image.Resampling.BICUBIC)))
    np.save(folder / "stamps.npy", np.stack(pixels))
    write_tables(folder, names, train, test)
    return len(names)


def main(args: argparse.Namespace) -> None:
    results = {arm: [] for arm in ARMS}
    for seed in range(args.seeds):
        folder = Path(args.out) / args.data / str(seed)
        folder.mkdir(parents=True, exist_ok=True)
        n_classes = (make_digits if args.data == "digits" else make_stamps)(folder, seed)
        for arm, flags in ARMS.items():
            flags = [flag.replace("HALF", str(n_classes // 2)) for flag in flags]
            out = folder / arm.replace(" ", "_").replace("/", "per")
            command = [sys.executable, str(ROOT / "sl_vocab_subsample.py"), "--data", str(folder / "train.tsv")]
            command += [
                "--steps",
                str(args.steps),
                "--batch-size",
                "64",
                "--seed",
                str(seed),
                "--out",
                str(out),
                "--resume",
                "off",
                *flags,
            ]
            subprocess.run(command, check=True, env=os.environ, stdout=subprocess.DEVNULL)
            results[arm].append(json.loads((out / "metrics.json").read_text())["val"])
    print(f"{args.data}, {args.seeds} seeds, {args.steps} steps of 64, {results['softmax'][0]['n']} test images")
    print(f"{'arm':<26}{'balanced':>16}{'tail third':>16}{'rho(freq,pred)':>18}")
    for arm, runs in results.items():
        cells = []
        for key, factor in ("balanced", 100), ("tail", 100), ("spearman_pred", 1):
            values = [factor * run[key] for run in runs]
            cells.append(f"{statistics.mean(values):.{1 if factor > 1 else 2}f} +- {statistics.pstdev(values):.2f}")
        print(f"{arm:<26}{cells[0]:>16}{cells[1]:>16}{cells[2]:>18}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("data", nargs="?", default="digits", choices=["digits", "stamps"], help="pictures")
    parser.add_argument("--seeds", type=int, default=5, help="runs of each arm, with splits of their own")
    parser.add_argument("--steps", type=int, default=300, help="optimiser steps of a run")
    parser.add_argument("--out", default="runs/real", help="folder for data and runs")
    main(parser.parse_args())
