"""dedup and prune against what they should equal: python benchmarks/dedup.py [WHAT ...] [--folder DIR] [--sheet PNG]

prune, embedding: 200,000 x 512 rows against 10,000, in-process, alternating with the plain blocked product of the same
blocks; printed are the medians of time, their ratio, the peak of memory, and the rows that differ from brute force in
float64 (on a part of the rows). Run it alone for its memory.
hash: dhash and phash against the imagehash library on the first 500 pictures of --folder.
find: the copies in --folder that `dedup` finds by bytes, and by pixels and phash; --sheet: near pairs, side by side.
"""

import argparse
import hashlib
import json
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

import numpy as np
import torch
from PIL import Image

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import build_datasets as bd  # noqa: E402

SUFFIXES = (".png", ".jpg", ".jpeg", ".svg", ".svgz")


def unit_rows(n, dim, seed, path=None):
    """n random rows of unit length, a tenth of them near another row; in a file if there is a path."""
    rng = np.random.default_rng(seed)
    rows = rng.standard_normal((n, dim), dtype=np.float32)
    rows[: n // 10] = rows[n // 10 : 2 * (n // 10)] + 0.5 * rows[: n // 10]
    rows /= np.linalg.norm(rows, axis=1, keepdims=True)
    if path is None:
        return rows
    np.save(path, rows)
    return np.load(path, mmap_mode="r")


def plain(rows, queries):
    for start in range(0, len(rows), bd.BLOCK):
        block = torch.from_numpy(np.array(rows[start : start + bd.BLOCK]))
        for query in queries:
            block @ query.T


def race(work, rows, queries, repeats):
    """Median seconds of work and of the plain product, alternating, and the median of the ratios."""
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        plain(rows, queries)
        middle = time.perf_counter()
        result = work()
        times.append((middle - start, time.perf_counter() - middle))
    ratio = statistics.median(a / b for a, b in times)
    theirs, ours = (statistics.median(pair) for pair in zip(*times))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    print(f"  plain {theirs:.1f} s, ours {ours:.1f} s, speed {ratio:.2f} x plain, peak memory {peak:.2f} GiB")
    return result


def prune(folder, n, n_tests, dim, repeats):
    print(f"prune: {n} x {dim} against {n_tests}")
    rows = unit_rows(n, dim, 0, folder / "rows.npy")
    tests, small = unit_rows(n_tests, dim, 1), unit_rows(2000, dim, 2)
    small[:5] = rows[:5]  # copies of these rows tie with the limit
    near = min(2000, n_tests, n)
    tests[:near] = 0.6 * tests[:near] + 0.4 * rows[:near]
    tests /= np.linalg.norm(tests, axis=1, keepdims=True)
    queries = [block for _, block in bd.unit_blocks([tests], "cpu")]
    limits = bd.nearest(queries, [small], "cpu")
    drop, best, query = race(
        lambda: bd.prune_rows([rows], {"val": queries}, {"val": limits}, "cpu")["val"], rows, queries, repeats
    )
    limit = (tests.astype(np.float64) @ small.T.astype(np.float64)).max(axis=1)
    n_wrong, n_part = 0, min(n, 20_000)
    for start in range(0, n_part, 1000):
        cosines = rows[start : start + 1000].astype(np.float64) @ tests.T.astype(np.float64)
        n_wrong += int((((cosines - limit).max(axis=1) > bd.TIE) != drop[start : start + 1000]).sum())
        assert abs(cosines.max(axis=1) - best[start : start + 1000]).max() < 1e-6
    print(f"  {drop.sum()} dropped; {n_wrong} of {n_part} rows differ from float64 brute force")


def embedding(folder, n, n_tests, dim, repeats):
    print(f"dedup --by embedding --against: {n} x {dim} against {n_tests}")
    rows, tests = unit_rows(n, dim, 0, folder / "rows.npy"), unit_rows(n_tests, dim, 1)
    near = min(2000, n_tests, n)
    tests[:near] = 0.6 * tests[:near] + 0.4 * rows[:near]
    queries = [block for _, block in bd.unit_blocks([tests], "cpu")]
    roots, _ = race(
        lambda: bd.connect(n + n_tests, {"embedding": bd.cosine_pairs([rows], [tests], 0.45, False, "cpu")}),
        rows, queries, repeats)  # fmt: skip
    tainted = np.isin(roots[:n], roots[n:])
    unit = tests.astype(np.float64) / np.linalg.norm(tests.astype(np.float64), axis=1, keepdims=True)
    n_part = min(n, 20_000)
    truth = np.concatenate(
        [(rows[i : i + 1000].astype(np.float64) @ unit.T).max(axis=1) > 0.45 for i in range(0, n_part, 1000)]
    )
    print(f"  {tainted.sum()} copies; {(truth != tainted[:n_part]).sum()} of {n_part} rows differ from brute force")


def pictures(folder, suffixes):
    return sorted(p for p in Path(folder).rglob("*") if p.suffix.lower() in suffixes and p.is_file())


def hashes(folder):
    import imagehash

    n, wrong = 0, Counter()
    paths = pictures(folder, SUFFIXES[:3])
    for path in paths:
        image = bd.read_image(bd.ImageNames(path.parent, [path.name]), 0, bd.NO_DRAFT, 10**8)
        if isinstance(image, str):
            continue
        n += 1
        for ours, theirs in ((bd.dhash, imagehash.dhash), (bd.phash, imagehash.phash)):
            wrong[ours.__name__] += f"{ours(image):016x}" != str(theirs(image))
        if n == 500:
            break
    print(f"hash: of {n} pictures {wrong['dhash']} dhash and {wrong['phash']} phash differ from imagehash")


def find(folder, sheet, temporary):
    for by, suffixes in ((["bytes"], SUFFIXES[3:]), (["bytes"], SUFFIXES[:3]), (["pixels", "phash"], SUFFIXES[:3])):
        paths = pictures(folder, suffixes)
        if not paths:
            continue
        table, out = temporary / "all.tsv", temporary / "kept.tsv"
        bd.write_tsv(table, ("image", "caption"), (dict(image=str(p), caption=p.stem) for p in paths))
        start = time.perf_counter()
        script = Path(bd.__file__)
        subprocess.run([sys.executable, script, "dedup", table, "--by", *by, "--out", out], check=True)
        truth = len(paths) - len({hashlib.sha256(p.read_bytes()).digest() for p in paths})
        report = json.loads(Path(f"{out}.json").read_text())["funnel"]
        n, seconds = report["rows"] - report["rows left"], time.perf_counter() - start
        print(f"find: {len(paths)} {suffixes[0]} by {' '.join(by)}: {n} copies ({truth} equal files), {seconds:.0f} s")
    if sheet:
        _, rows = bd.open_tables([str(temporary / "kept.pairs.tsv")])
        rows = [row for row in rows if row["by"] == "phash"]
        side, across = 110, 5
        rows = rows[:: max(1, len(rows) // 50)][:50]
        canvas = Image.new("RGB", (across * (2 * side + 20), -(-len(rows) // across) * (side + 10)), "grey")
        for k, row in enumerate(rows):
            for half, name in enumerate((row["image"], row["other"])):
                image = bd.read_image(bd.ImageNames(Path(name).parent, [Path(name).name]), 0, bd.NO_DRAFT, 10**8)
                image.thumbnail((side, side))
                canvas.paste(image, ((k % across) * (2 * side + 20) + half * side, k // across * (side + 10)))
        canvas.save(sheet)
        print(f"{len(rows)} near pairs in {sheet}; bits apart: {Counter(row['distance'] for row in rows)}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", nargs="*", default=["prune", "embedding", "hash", "find"])
    parser.add_argument("--folder", default="/usr/share/tuxpaint/stamps", help="pictures for hash and find")
    parser.add_argument("--sheet", help="contact sheet of near pairs to write")
    parser.add_argument("--rows", type=int, default=200_000)
    parser.add_argument("--tests", type=int, default=10_000)
    parser.add_argument("--dim", type=int, default=512)
    parser.add_argument("--repeats", type=int, default=3)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        for what, work in (("prune", prune), ("embedding", embedding)):
            if what in args.what:
                work(folder, args.rows, args.tests, args.dim, args.repeats)
        if "hash" in args.what:
            hashes(args.folder)
        if "find" in args.what:
            find(args.folder, args.sheet, folder)
