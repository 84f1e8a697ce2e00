"""Which images of a class are most alike: a column for build_datasets.py subset --threshold alike=1.

    python recipes/alike.py FEATURES.npz TABLE.tsv AS_MANY_AS.tsv OUT.tsv

OUT.tsv is TABLE.tsv and a column `alike`: 1 for the rows of each class whose image features are nearest, by cosine, to
the mean direction of the class, as many as AS_MANY_AS.tsv has of it, 0 for the others. FEATURES.npz is what `clip.py
--eval-only CHECKPOINT --eval-sets TABLE.tsv` writes. OUT.tsv belongs into TABLE.tsv's folder, where its images are.
"""

import csv
import os
import sys
from collections import Counter

import numpy as np


def nearest(features, labels, counts):
    """[n] bool: the counts[c] rows of each class c that are nearest to their class's mean direction; ties by row."""
    unit = features / np.maximum(np.linalg.norm(features, axis=1, keepdims=True), 1e-12)
    chosen = np.zeros(len(labels), bool)
    for c, n in counts.items():
        rows = np.flatnonzero(labels == c)
        if len(rows) < n:
            raise SystemExit(f"class {c}: {n} rows are asked for, {len(rows)} have features")
        cosine = unit[rows] @ unit[rows].mean(0)
        chosen[rows[np.argsort(-cosine, kind="stable")[:n]]] = True
    return chosen


def main(features, table, like, out):
    with open(like, encoding="utf-8", newline="") as file:
        counts = Counter(int(row["label"]) for row in csv.DictReader(file, delimiter="\t", quoting=csv.QUOTE_NONE))
    with open(table, encoding="utf-8", newline="") as file:
        header, *lines = file.read().replace("\r\n", "\n").removesuffix("\n").split("\n")  # no other breaks
    with np.load(features) as arrays:
        if arrays["rows"].max() >= len(lines):
            raise SystemExit(f"{features} has features of row {arrays['rows'].max()}, {table} has {len(lines)} rows")
        alike = np.zeros(len(lines), int)
        alike[arrays["rows"]] = nearest(arrays["features"].astype(np.float32), arrays["labels"], counts)
    with open(f"{out}.partial", "w", encoding="utf-8", newline="") as file:
        file.write("".join(f"{line}\t{flag}\n" for line, flag in zip([header, *lines], ["alike", *alike])))
    os.replace(f"{out}.partial", out)


if __name__ == "__main__":
    if len(sys.argv) != 5:
        raise SystemExit(__doc__)
    main(*sys.argv[1:])
