"""Input pipeline of clip.py against torchvision's: python benchmarks/input.py

Throughput: JPEGs read from tars by `clip.Pairs` in a DataLoader, against ImageFolder + DataLoader on the same files
with torchvision's RandomResizedCrop(224, scale (0.9, 1), bicubic), both to uint8 batches, at 1 and 2 workers,
alternating; printed is the median of the ratios. Memory: a table of 1 M rows and 4 workers.
"""

import argparse
import io
import os
import statistics
import sys
import tarfile
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torchvision.datasets import ImageFolder
from torchvision.transforms import v2

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import clip  # noqa: E402


def make_jpegs(folder: Path, n: int, width: int, height: int) -> None:
    """n smooth noisy JPEGs as folder/class/*.jpg and in folder/0.tar, with folder/train.tsv."""
    rng, lines = np.random.default_rng(0), []
    (folder / "images" / "class").mkdir(parents=True)
    with tarfile.open(folder / "0.tar", "w", format=tarfile.USTAR_FORMAT) as tar:
        for i in range(n):
            coarse = Image.fromarray(rng.integers(0, 256, (16, 16, 3), np.uint8)).resize(
                (width, height), Image.Resampling.BICUBIC
            )
            pixels = np.asarray(coarse, np.int16) + rng.normal(0, 8, (height, width, 3)).astype(np.int16)
            buffer = io.BytesIO()
            Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(buffer, "JPEG", quality=90)
            (folder / "images" / "class" / f"{i}.jpg").write_bytes(buffer.getvalue())
            info = tarfile.TarInfo(f"{i}.jpg")
            info.size = len(buffer.getvalue())
            lines.append(f"0.tar:{tar.offset + 512}:{info.size}\ta photo of number {i}\n")
            tar.addfile(info, io.BytesIO(buffer.getvalue()))
    (folder / "train.tsv").write_text("image\tcaption\n" + "".join(lines))


def our_loader(folder: Path, workers: int, batch_size: int):
    table = clip.Table(folder / "train.tsv")
    captions = clip.Captions(table, np.full(len(table), -1), ["{caption}"], [], 0)
    pairs = clip.Pairs([captions], clip.Tokenizer([]), 224, 0.9, 0.0, 10**9, 0)
    sampler = clip.Sampler([len(table)], np.ones(1), batch_size, 0, 0, len(table) // batch_size, 0, 1)
    return torch.utils.data.DataLoader(pairs, batch_sampler=sampler, collate_fn=dict, num_workers=workers)


def their_loader(folder: Path, workers: int, batch_size: int):
    crop = v2.RandomResizedCrop(224, scale=(0.9, 1), interpolation=v2.InterpolationMode.BICUBIC)
    dataset = ImageFolder(folder / "images", v2.Compose([crop, v2.PILToTensor()]))
    return torch.utils.data.DataLoader(dataset, batch_size, shuffle=True, num_workers=workers, drop_last=True)


def images_per_s(loader, n: int) -> float:
    """Rate after the first batch, so that the start of the workers does not count."""
    batches = iter(loader)
    next(batches)
    start, seen = time.perf_counter(), 0
    for batch in batches:
        seen += len(batch["images"] if isinstance(batch, dict) else batch[0])
    return seen / (time.perf_counter() - start)


def memory_gib(rows: int, workers: int, folder: Path) -> tuple[float, float]:
    """Memory of this process and its workers in GiB while they load: sums of PSS and of RSS."""
    line = (folder / "train.tsv").read_text().splitlines()[1].split("\t")[0]
    with open(folder / "large.tsv", "w") as file:
        file.write("image\tcaption\n")
        file.writelines(
            f"{line}\ta caption of ordinary length with the number {i} and some more words\n" for i in range(rows)
        )
    table = clip.Table(folder / "large.tsv")
    captions = clip.Captions(table, np.full(rows, -1), ["{caption}"], [], 0)
    pairs = clip.Pairs([captions], clip.Tokenizer([]), 224, 0.9, 0.0, 10**9, 0)
    sampler = clip.Sampler([rows], np.ones(1), 64, 0, 0, 20, 0, 1)
    batches = iter(
        torch.utils.data.DataLoader(pairs, batch_sampler=sampler, collate_fn=dict, num_workers=workers)
    )
    for _ in range(15):
        next(batches)
    children = Path(f"/proc/self/task/{os.getpid()}/children").read_text().split()
    sizes = {"Pss:": 0, "Rss:": 0}
    for pid in (str(os.getpid()), *children):
        for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines():
            if line.split()[0] in sizes:
                sizes[line.split()[0]] += int(line.split()[1])
    return sizes["Pss:"] / 2**20, sizes["Rss:"] / 2**20


def main(args: argparse.Namespace) -> None:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        make_jpegs(folder, args.images, *args.size)
        print(
            f"{args.images} JPEGs of {args.size[0]} x {args.size[1]}, torch {torch.__version__}, {os.cpu_count()} cores"
        )
        for workers in (1, 2):
            rates = [
                (
                    images_per_s(our_loader(folder, workers, 32), args.images),
                    images_per_s(their_loader(folder, workers, 32), args.images),
                )
                for _ in range(args.pairs)
            ]
            ours, theirs = (statistics.median(rate) for rate in zip(*rates, strict=True))
            ratios = [a / b for a, b in rates]
            print(
                f"{workers} workers: clip.py {ours:.0f}, torchvision {theirs:.0f} images/s, median ratio "
                f"{statistics.median(ratios):.2f} (of {min(ratios):.2f} to {max(ratios):.2f})"
            )
        pss, rss = memory_gib(args.rows, 4, folder)
        print(
            f"{args.rows:,} rows, 4 workers: {pss:.2f} GiB (each shared page once), {rss:.2f} GiB (each page once a "
            "process)"
        )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--images", type=int, default=1600, help="JPEGs to make")
    parser.add_argument(
        "--size", type=int, nargs=2, default=[341, 256], help="their width and height; img2dataset's short side is 256"
    )
    parser.add_argument("--pairs", type=int, default=5, help="rounds of the alternation")
    parser.add_argument("--rows", type=int, default=1_000_000, help="rows of the table of the memory test")
    main(parser.parse_args())
