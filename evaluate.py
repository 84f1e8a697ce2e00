# /// script
# requires-python = ">=3.10"
# dependencies = ["torch>=2.6", "numpy>=1.26", "scipy>=1.11"]
# ///
"""Imbalance, robustness, collapse, transfer, debiasing: scores from arrays, tables and state dicts, never from a model.

    python evaluate.py imbalance runs/clip/val.npz runs/sl/val.npz --plot bins.png         # frequency against accuracy
    python evaluate.py robustness sl=runs/sl0 sl=runs/sl1 clip=runs/clip --baseline sl     # or any CSV, TSV, JSON table
    python evaluate.py compare runs/sl/val.npz runs/clip/val.npz                # A0,A1,A2 B0,B1,B2 are seeds
    python evaluate.py collapse runs/clip/val.npz                               # NC1, NC2 of means and class vectors
    python evaluate.py similarity laionet.npz imagenet.npz --plot sorted.png    # pictures of one class: how alike
    python evaluate.py prototypes runs/dino/checkpoint.pt --eps 0.025 0.1       # distinct prototypes, affinity
    python evaluate.py debias --zeroshot runs/zs/val.npz --finetuned runs/ft/val.npz
    python evaluate.py wiseft zeroshot.pt finetuned.pt --alpha 0 0.5 1 --out runs/wise
    python evaluate.py wiseft --results runs/wise --plot wise.png
    python evaluate.py probe runs/dino/train.npz runs/dino/val.npz --sweep transfer
    python evaluate.py knn runs/dino runs/dino4096 --sets cifar10 pets          # RUN/cifar10_train.npz, _test.npz
    python evaluate.py fewshot runs/dino/train.npz runs/dino/val.npz --shots 1 4 16
    python evaluate.py retrieval pairs.npz                                      # features, text_features, image_ids
    python evaluate.py calibration runs/clip/val.npz --plot reliability.png
    python evaluate.py concepts shared laion.tsv yfcc.tsv cc12m.tsv --plot tail.png
    python evaluate.py report runs/sl runs/clip runs/frozen --out report.html

in    <set>.npz     labels [N] (-1: none), logits [N, C], features [N, D], class_counts [C], class_names [C], prototypes
                    [C, D]; each command names what it misses. `predictions` [N], if there, takes the place of argmax
      RUN           a folder with <set>.npz, and metrics.json and args.json where a command can use them
      tables        CSV, TSV or JSON with a header; counts: one number a line, or columns class and count
      checkpoints   .pt with weights_only, .safetensors, .npy
out   a table on the terminal, `--json FILE` with all numbers, `--plot FILE.png|svg` (pip install matplotlib)

Every estimate is {"value", "low", "high"}: 95 % percentile intervals of --boot resamples, over images for accuracies,
over classes for correlations, over models for fits; null where nothing can be computed, or nothing was sampled.
Fractions are in 0..1. The same seed gives the same bytes.

Dimension key: N images, C classes, D width, K prototypes, S shifts, boot resamples.

Differences from the paper's notebooks and from the methods' released code:
 1. Every number has an interval, and empty classes are left out of means of accuracies (theirs: 0/0).
 2. Ties of float16 logits are broken by features @ prototypes, not by the lowest class; their number is reported.
 3. Intra-class similarity has no self-pairs; its interval resamples images, not pairs; curves keep one order.
 4. NC2 of class vectors is given centred too: uncentred it mostly measures their common mean.
 5. GLA's label prior is the exact optimum of its convex problem (L-BFGS), not 1,000 steps of primal-dual SGD.
 6. 11-point average precision does not count recall 0 as precision 1, and leaves out `difficult` objects (label -1).
 7. Logistic regression runs to its optimum for every strength; the released sweep stops at 100 iterations.
 8. Percentiles are widened for small samples of models (Hesterberg, arXiv 1411.5279, section 5.3.1).
"""

import argparse
import contextlib
import csv
import json
import math
import os
import re
import sys
import zipfile
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path

# ------------------------------------------------------------------------------ flags


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """Flags of evaluate.py, one subcommand a metric family; wrong combinations end here."""
    common = argparse.ArgumentParser(add_help=False)
    common.add_argument("--boot", type=int, default=1000, help="resamples of the intervals; 0 leaves intervals out")
    common.add_argument("--seed", type=int, default=0, help="of resamples, splits and draws")
    common.add_argument("--json", default="", help="write all numbers to this file")
    common.add_argument("--plot", default="", help="draw to this .png or .svg (pip install matplotlib)")
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], allow_abbrev=False)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    def command(name: str, text: str) -> argparse.ArgumentParser:
        return commands.add_parser(name, help=text, description=text, parents=[common], allow_abbrev=False,
                                   formatter_class=argparse.ArgumentDefaultsHelpFormatter)

    p = command("imbalance", "accuracy and predictions against the training frequency of the classes")
    p.add_argument("files", nargs="+", help="predictions, one file a model")
    p.add_argument("--counts", default="", help="training frequencies, if other than the files' class_counts")
    p.add_argument("--classes", default="", help="classes to keep (logits too): a line each, id or name, and perhaps a "
                                                 "tab and a group; logits of a group are max-pooled")
    p.add_argument("--cuts", nargs=2, type=int, default=[100, 20], help="many > first, medium, few < second")
    p.add_argument("--tail-classes", type=int, default=0, help="also the mean over the K rarest classes, and over the "
                                                               "others; 0 is off")
    p.add_argument("--worst", type=int, default=10, help="k of the mean over the k worst classes")
    p.add_argument("--bins", type=int, default=10, help="frequency bins")
    p.add_argument("--equal-count", action="store_true", help="bins with equal numbers of classes, not equal widths in "
                                                              "log frequency")
    p = command("robustness", "effective robustness: accuracy under shift beyond the baseline models' line")
    p.add_argument("inputs", nargs="+", help="tables (columns model, group, and one a test set; SET@SHIFT is the "
                                             "accuracy on SET over the classes of SHIFT) and runs, as GROUP=FOLDER; "
                                             "without GROUP a run's training data names it")
    p.add_argument("--id", default="val", help="in-distribution test set")
    p.add_argument("--shifts", nargs="*", default=[], help="test sets under shift; empty takes all but --id")
    p.add_argument("--baseline", default="", help="group of the standard models; empty takes the first input's")
    p.add_argument("--before", default="", help="model before an intervention: adds each model's relative robustness")
    p.add_argument("--subset", nargs="*", default=[], metavar="SHIFT=FILE", help="classes of a shift, as imbalance's "
                   "--classes; without it, those that its labels have")
    p.add_argument("--n", nargs="*", default=[], metavar="SET=N", help="images of a table's test sets, for intervals")
    p.add_argument("--split", nargs="*", default=[], metavar="SHIFT=ACC", help="two lines, left and right of this ID "
                   "accuracy, for sets chosen against one model")
    p = command("compare", "two models on the same images: paired bootstrap and McNemar's test")
    p.add_argument("a", help="predictions; several seeds with commas between")
    p.add_argument("b", help="predictions; several seeds with commas between")
    p.add_argument("--counts", default="", help="training frequencies, if other than the files' class_counts")

    args = parser.parse_args(argv)
    if args.boot < 0:
        parser.error(f"--boot must not be negative, got {args.boot}")
    if args.plot and Path(args.plot).suffix not in (".png", ".svg"):
        parser.error(f"--plot ends in .png or .svg, got {args.plot}")
    return args


if __name__ == "__main__":
    ARGS = parse_args()  # before the heavy imports: --help and a mistyped flag are answered at once

import numpy as np  # noqa: E402
import scipy  # noqa: E402
import torch  # noqa: E402
from scipy.sparse import coo_matrix, csr_matrix  # noqa: E402
from scipy.sparse.csgraph import connected_components  # noqa: E402
from scipy.special import expit, log_softmax, logit, logsumexp, softmax  # noqa: E402
from scipy.stats import beta, binomtest, norm, rankdata, spearmanr  # noqa: E402
from scipy.stats import t as student_t  # noqa: E402

# ------------------------------------------------------------------------------ readers


def member_shape(archive: zipfile.ZipFile, member: zipfile.ZipInfo, path: str) -> tuple[int, ...]:
    """Shape of an array inside an .npz, from its header; SystemExit for what must not be read."""
    with archive.open(member) as file:
        version = np.lib.format.read_magic(file)
        read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
        shape, _, dtype = read(file)
        if dtype.hasobject:
            raise SystemExit(f"{path}: {member.filename} holds Python objects, which run code when read: save it as "
                             "numbers or as text")
        if math.prod(shape) * dtype.itemsize + file.tell() != member.file_size:
            raise SystemExit(f"{path}: {member.filename} says {shape} {dtype} and has {member.file_size} bytes")
    return shape


def read_npz(path: str | Path, keys: tuple[str, ...] = ()) -> dict[str, np.ndarray]:
    """Arrays of an .npz: those named, else all. Nothing is unpacked before names, types and sizes were looked at.

    Raises: SystemExit for a file that is none, holds Python objects, or unpacks to more than the memory of the machine
        or than 200 times its size.
    """
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    try:
        with zipfile.ZipFile(path) as archive:
            members = [m for m in archive.infolist() if not keys or m.filename.removesuffix(".npy") in keys]
            n_bytes, n_packed = sum(m.file_size for m in members), sum(m.compress_size for m in members)
            if n_bytes > memory or n_bytes > max(2**28, 200 * n_packed):
                raise SystemExit(f"{path}: {n_packed} bytes announce {n_bytes} unpacked, refused; save it without "
                                 "compression or in parts")
            for member in members:
                member_shape(archive, member, path)
        with np.load(path, allow_pickle=False) as file:
            return {name: file[name] for name in file.files if not keys or name in keys}
    except (OSError, ValueError, EOFError, NotImplementedError, zlib.error, zipfile.BadZipFile) as error:
        raise SystemExit(f"{path}: cannot be read as .npz ({str(error)[:100]})") from None


def check_finite_rows(path: str | Path, name: str, array: np.ndarray) -> None:
    """SystemExit, with the row, for NaN and infinity."""
    for start in range(0, len(array), 8192):
        finite = np.isfinite(array[start : start + 8192]).reshape(len(array[start : start + 8192]), -1).all(1)
        if not finite.all():
            raise SystemExit(f"{path}: {name} are not finite in row {start + int(finite.argmin())} (float16 ends at "
                             "65,504: save larger values as float32)")


ROW_KEYS = ("labels", "logits", "features", "rows", "predictions")
CLASS_KEYS = ("class_counts", "class_names", "prototypes")


def read_predictions(path: str | Path, *need: str, counts: str = "", multi_label: bool = False) -> dict:
    """One <set>.npz, checked: {"path", "n_classes", "labels", ...}; rows without a label are left out.

    need: arrays it must have. counts: a file that takes the place of class_counts. multi_label: labels may be [N, C]
    of 1, 0 and -1 (difficult). Raises: SystemExit for a missing array, widths that differ, values that are not finite,
    labels out of range, negative counts.
    """
    data = read_npz(path, (*need, *CLASS_KEYS, "labels", "rows", "predictions"))
    if counts:
        data["class_counts"] = read_counts(counts, data.get("class_names"))
    missing = [name for name in (*need, "labels") if name not in data]
    if missing:
        raise SystemExit(f"{path}: no array {', '.join(missing)}; found {', '.join(sorted(data)) or 'nothing'}")
    labels = data["labels"]
    for name in (name for name in ("logits", "features", "prototypes", "class_counts") if name in data):
        if data[name].dtype.kind not in "fiu" or data[name].ndim != (1 if name == "class_counts" else 2):
            raise SystemExit(f"{path}: {name} is {data[name].dtype} {data[name].shape}, expected numbers "
                             f"{'[C]' if name == 'class_counts' else '[N, width]'}")
        check_finite_rows(path, name, data[name])
    if labels.dtype.kind not in "iu" or labels.ndim != 1 + (multi_label and labels.ndim == 2):
        raise SystemExit(f"{path}: labels are {labels.dtype} {labels.shape}, expected whole numbers [N]")
    if not len(labels) or labels.ndim == 1 and labels.max() < 0:
        raise SystemExit(f"{path}: no labelled rows")
    for name in (name for name in ROW_KEYS if name in data):
        if len(data[name]) != len(labels):
            raise SystemExit(f"{path}: {len(labels)} labels, {len(data[name])} {name}")
    widths = {name: len(data[name]) for name in CLASS_KEYS if name in data}
    widths |= {"logits": data["logits"].shape[1]} if "logits" in data else {}
    if len(set(widths.values())) > 1:
        raise SystemExit(f"{path}: numbers of classes differ: {widths}")
    n_classes = next(iter(widths.values()), labels.shape[1] if labels.ndim == 2 else int(labels.max()) + 1)
    if labels.ndim == 1 and labels.max() >= n_classes:
        raise SystemExit(f"{path}: row {int(labels.argmax())} has label {labels.max()}, there are {n_classes} classes")
    if "class_counts" in data and data["class_counts"].min() < 0:
        raise SystemExit(f"{path}: class_counts has {data['class_counts'].min()}")
    if labels.ndim == 1 and labels.min() < 0:
        data |= {name: data[name][labels >= 0] for name in ROW_KEYS if name in data}
    return data | {"path": str(path), "n_classes": n_classes, "labels": data["labels"].astype(np.int64)}


def predict(data: dict) -> tuple[np.ndarray, int]:
    """Predicted classes [N], and how many rows have a tie for the first place that float16 made.

    Ties go to the class whose prototype is nearest to the features, where the file has both; else to the lowest id.
    """
    if "predictions" in data:
        return data["predictions"].astype(np.int64), 0
    predictions, n_ties = np.empty(len(data["logits"]), np.int64), 0
    prototypes = data.get("prototypes")
    if prototypes is not None:
        prototypes = unit_rows(prototypes)
    for start in range(0, len(predictions), 8192):
        logits = data["logits"][start : start + 8192].astype(np.float32)
        predictions[start : start + 8192] = logits.argmax(1)
        is_best = logits == logits.max(1, keepdims=True)
        tied = np.flatnonzero(is_best.sum(1) > 1)
        n_ties += len(tied)
        if len(tied) and prototypes is not None and "features" in data \
                and data["features"].shape[1] == prototypes.shape[1]:
            cosine = unit_rows(data["features"][start + tied]) @ prototypes.T
            predictions[start + tied] = np.where(is_best[tied], cosine, -np.inf).argmax(1)
    return predictions, n_ties


def unit_rows(array: np.ndarray) -> np.ndarray:
    """Rows divided by their length, in float64; zero rows stay zero."""
    array = np.asarray(array, np.float64)
    return array / np.maximum(np.linalg.norm(array, axis=1, keepdims=True), 1e-12)


def read_table(path: str | Path) -> list[dict[str, str]]:
    """Rows of a CSV, TSV (by suffix) or JSON table (a list of objects, or {name: object}) as dicts of text."""
    try:
        if Path(path).suffix == ".json":
            content = json.loads(Path(path).read_text("utf-8"))
            rows = content if isinstance(content, list) else [{"model": k} | v for k, v in content.items()]
            return [{k: str(v) for k, v in row.items() if v is not None} for row in rows]
        with open(path, encoding="utf-8-sig", newline="") as file:
            is_csv = Path(path).suffix == ".csv"
            options = {} if is_csv else {"delimiter": "\t", "quoting": csv.QUOTE_NONE}
            rows = list(csv.DictReader(file, restkey="", **options))
    except (OSError, UnicodeDecodeError, json.JSONDecodeError, AttributeError, TypeError, csv.Error) as error:
        raise SystemExit(f"{path}: cannot be read as a table ({str(error)[:100]})") from None
    for i, row in enumerate(rows):
        if "" in row or None in row.values():
            raise SystemExit(f"{path}:{i + 2}: the row and the header have different numbers of fields")
    return rows


def number(text: str, where: str) -> float:
    """A finite number, or SystemExit that says where."""
    with contextlib.suppress(ValueError):
        if math.isfinite(float(text)):
            return float(text)
    raise SystemExit(f"{where}: got {text!r}, expected a number")


def read_named_counts(path: str | Path) -> dict[str, float]:
    """{class: count} of a table with columns class (or name, label) and count (or freq, frequency, n), or of lines with
    one number each (the classes are 0, 1, ...), or of a JSON object."""
    path = Path(path)
    try:
        lines = path.read_text("utf-8").split("\n") if path.suffix != ".json" else []
    except (OSError, UnicodeDecodeError) as error:
        raise SystemExit(f"{path}: cannot be read ({str(error)[:100]})") from None
    lines = [line.strip() for line in lines if line.strip()]
    if lines and re.fullmatch(r"[\d.eE+]+", lines[0]):
        return {str(i): number(line, f"{path}:{i + 1}") for i, line in enumerate(lines)}
    try:
        content = json.loads(path.read_text("utf-8")) if path.suffix == ".json" else None
    except (OSError, ValueError) as error:
        raise SystemExit(f"{path}: cannot be read ({str(error)[:100]})") from None
    if isinstance(content, dict) and not any(isinstance(v, dict) for v in content.values()):
        return {str(k): number(v, f"{path}: {k}") for k, v in content.items()}
    rows = read_table(path)
    columns = list(rows[0]) if rows else []
    key = next((c for c in ("class", "name", "label") if c in columns), None)
    value = next((c for c in ("count", "freq", "frequency", "n") if c in columns), None)
    if key is None or value is None:
        raise SystemExit(f"{path}: found columns {columns}, expected class and count, or one number a line")
    return {row[key]: number(row[value], f"{path}:{i + 2}") for i, row in enumerate(rows)}


def read_counts(path: str | Path, class_names: np.ndarray | None) -> np.ndarray:
    """[C] training frequencies, by class name where the file and the predictions have names, else by place."""
    named = read_named_counts(path)
    if class_names is not None and set(named) & set(class_names.tolist()):
        missing = [name for name in class_names.tolist() if name not in named]
        if missing:
            raise SystemExit(f"{path}: no count for {len(missing)} classes: {', '.join(missing[:5])}")
        return np.array([named[name] for name in class_names.tolist()])
    return np.array(list(named.values()))


def read_subset(path: str | Path, class_names: np.ndarray | None, n_classes: int) -> tuple[np.ndarray, np.ndarray]:
    """Classes of a file (id or name, perhaps a tab and a group): ids [S] ascending, group of each [S] in 0..G-1."""
    place = {name: i for i, name in enumerate(class_names.tolist())} if class_names is not None else {}
    try:
        lines = [line.split("\t") for line in Path(path).read_text("utf-8").splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise SystemExit(f"{path}: cannot be read ({str(error)[:100]})") from None
    group_of = {}
    for i, fields in enumerate(lines):
        name = fields[0].strip()
        c = place.get(name, int(name) if name.isdecimal() else -1)
        if not 0 <= c < n_classes:
            raise SystemExit(f"{path}:{i + 1}: no class {name!r} among {n_classes}")
        group_of[c] = fields[1] if len(fields) > 1 else c
    if not group_of:
        raise SystemExit(f"{path}: no classes")
    ids = np.array(sorted(group_of))
    groups = {group: i for i, group in enumerate(dict.fromkeys(group_of[c] for c in ids.tolist()))}
    return ids, np.array([groups[group_of[c]] for c in ids.tolist()])


def restrict(data: dict, ids: np.ndarray, groups: np.ndarray) -> dict:
    """The images of some classes, classified among these alone: other logits are dropped, those of a group max-pooled.

    Source: methods of ImageNet-R, -A and ObjectNet (imagenet-testbed, wise-ft): label is the place in the list.
    """
    place = np.full(data["n_classes"], -1)
    place[ids] = groups
    keep, n_groups = place[data["labels"]] >= 0, int(groups.max()) + 1
    if not keep.any():
        raise SystemExit(f"{data['path']}: no image of the {len(ids)} classes")
    order = np.argsort(groups, kind="stable")
    starts = np.searchsorted(groups[order], np.arange(n_groups))
    out = {"path": data["path"], "n_classes": n_groups, "labels": place[data["labels"][keep]]}
    if "logits" in data:
        out["logits"] = np.maximum.reduceat(data["logits"][keep][:, ids[order]], starts, axis=1)
    if "class_counts" in data:
        out["class_counts"] = np.add.reduceat(data["class_counts"][ids[order]], starts)
    if n_groups == len(ids):
        out |= {name: data[name][ids] for name in ("class_names", "prototypes") if name in data}
    return out | ({"features": data["features"][keep]} if "features" in data else {})


def read_json(path: Path) -> dict:
    """A JSON object; {} if there is no such file."""
    try:
        return json.loads(path.read_text("utf-8")) if path.is_file() else {}
    except (OSError, ValueError) as error:
        raise SystemExit(f"{path}: cannot be read ({str(error)[:100]})") from None


def set_flag(values: list[str], flag: str) -> dict[str, str]:
    """SET=VALUE flags as a dict."""
    wrong = [value for value in values if "=" not in value]
    if wrong:
        raise SystemExit(f"{flag}: got {wrong[0]}, expected SET=VALUE")
    return dict(value.split("=", 1) for value in values)


# ------------------------------------------------------------------------------ estimates


def estimate(value: float | None, draws: np.ndarray | None = None, level: float = 0.95,
             is_biased: bool = False) -> dict[str, float | None]:
    """{"value", "low", "high"}: percentile interval of the draws; draws that are not finite are left out.

    is_biased: of a statistic that resampling itself raises or lowers (Gini, mean of the worst k): the basic bootstrap
    interval, percentiles reflected at the value, which takes that bias off.
    """
    value = None if value is None or not math.isfinite(value) else float(value)
    draws = np.asarray([] if draws is None else draws, float)
    draws = draws[np.isfinite(draws)]
    if value is None or not len(draws):
        return {"value": value, "low": None, "high": None}
    low, high = np.quantile(draws, [(1 - level) / 2, (1 + level) / 2])
    low, high = (2 * value - high, 2 * value - low) if is_biased else (low, high)
    return {"value": value, "low": float(low), "high": float(high)}


def t_interval(values: list[float]) -> dict[str, float | None]:
    """Mean over runs with its 95 % t-interval; None for the ends of a single run."""
    values = np.asarray([v for v in values if v is not None], float)
    if len(values) < 2:
        return estimate(values[0] if len(values) else None)
    half = student_t.ppf(0.975, len(values) - 1) * values.std(ddof=1) / math.sqrt(len(values))
    return {"value": float(values.mean()), "low": float(values.mean() - half), "high": float(values.mean() + half)}


def clopper_pearson(accuracy: float, n: float) -> dict[str, float | None]:
    """Exact 95 % interval of a fraction of n images; None for the ends when n is not known (NaN)."""
    if not math.isfinite(n) or n < 1:
        return estimate(accuracy)
    k = round(accuracy * n)
    low = float(beta.ppf(0.025, k, n - k + 1)) if k else 0.0
    high = float(beta.ppf(0.975, k + 1, n - k)) if k < n else 1.0
    return {"value": float(accuracy), "low": low, "high": high}


def bootstrap_means(values: np.ndarray, boot: int, rng: np.random.Generator) -> np.ndarray:
    """[boot] means of resampled values; in blocks, so memory does not grow with boot."""
    step = max(1, 2**24 // max(1, len(values)))
    return np.concatenate([np.zeros(0)] + [
        values[rng.integers(len(values), size=(min(step, boot - i), len(values)))].mean(1) for i in range(0, boot, step)])


def mean_over(values: np.ndarray, boot: int, rng: np.random.Generator) -> dict[str, float | None]:
    """Mean of the finite values, with the interval of resampling them."""
    values = values[np.isfinite(values)]
    return estimate(values.mean(), bootstrap_means(values, boot, rng)) if len(values) else estimate(None)


# Copied from clip.py
def rank_correlation(x: np.ndarray, y: np.ndarray) -> float | None:
    """Spearman's rank correlation, average ranks for ties; None if one side is constant."""
    if len(x) < 2 or np.ptp(x) == 0 or np.ptp(y) == 0:
        return None
    return float(spearmanr(x, y).statistic)


def rank_correlations(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Spearman's correlation of each row of x with that row of y, NaN if one is constant. x, y: [boot, C]."""
    x, y = (rankdata(side, axis=1) for side in (x, y))
    x, y = (side - side.mean(1, keepdims=True) for side in (x, y))
    with np.errstate(invalid="ignore"):
        return (x * y).sum(1) / np.sqrt((x**2).sum(1) * (y**2).sum(1))


def spearman(x: np.ndarray, y: np.ndarray, boot: int, rng: np.random.Generator) -> dict[str, float | None]:
    """Spearman's correlation over classes, with the interval of resampling classes; pairs with a NaN are left out."""
    both = np.isfinite(x) & np.isfinite(y)
    x, y = x[both], y[both]
    index = rng.integers(len(x), size=(boot, len(x))) if len(x) else np.zeros((0, 0), int)
    return estimate(rank_correlation(x, y), rank_correlations(x[index], y[index]) if len(index) else None)


def gini(values: np.ndarray) -> np.ndarray:
    """Gini index over the last axis; 0 is equal shares, NaN if all are 0."""
    values = np.sort(np.asarray(values, float), axis=-1)
    n = values.shape[-1]
    with np.errstate(invalid="ignore"):
        return (values * (2 * np.arange(1, n + 1) - n - 1)).sum(-1) / (n * values.sum(-1))


# ------------------------------------------------------------------------------ imbalance


# Copied from clip.py
def imbalance_metrics(predictions: np.ndarray, labels: np.ndarray, class_counts: np.ndarray) -> dict[str, float | None]:
    """Accuracy, and how much it and the predictions follow the training frequency of the classes.

    predictions, labels: [n] class ids. class_counts: [C] training images a class; classes without any count too.
    Returns: fractions in 0..1 and Spearman correlations over all classes; a class without test images has no accuracy
        and is left out of means of accuracies. head, medium, tail: the classes by falling count (ties by id), in
        thirds of C // 3, C // 3 and the rest. What cannot be computed is None.
    Source: Wen et al., arXiv 2405.21070, section 2 (their notebooks: all classes, average ranks).
    """
    C = len(class_counts)
    n_test = np.bincount(labels, minlength=C)
    n_predicted = np.bincount(predictions, minlength=C)
    tested = n_test > 0
    accuracy = np.bincount(labels[predictions == labels], minlength=C)[tested] / n_test[tested]
    per_class = np.full(C, np.nan)
    per_class[tested] = accuracy
    thirds = np.split(per_class[np.argsort(-class_counts, kind="stable")], [C // 3, 2 * (C // 3)])
    head, medium, tail = (float(np.nanmean(third)) if np.isfinite(third).any() else None for third in thirds)
    return {
        "n": len(labels),
        "top1": float((predictions == labels).mean()),
        "balanced": float(accuracy.mean()),
        "head": head,
        "medium": medium,
        "tail": tail,
        "spearman_acc": rank_correlation(class_counts[tested], accuracy),
        "spearman_pred": rank_correlation(class_counts, n_predicted),
        "chance": 1 / C,
    }


def resample_images(labels: np.ndarray, predictions: np.ndarray, n_classes: int, boot: int,
                    rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Bootstrap over images: number of each class, of its right ones, of its predictions, each [boot, C]."""
    n_test, n_right, n_predicted = (np.empty((boot, n_classes), np.int32) for _ in range(3))
    cell = np.where(labels == predictions, labels, n_classes)
    for b in range(boot):
        index = rng.integers(len(labels), size=len(labels))
        n_test[b] = np.bincount(labels[index], minlength=n_classes)
        n_right[b] = np.bincount(cell[index], minlength=n_classes + 1)[:n_classes]
        n_predicted[b] = np.bincount(predictions[index], minlength=n_classes)
    return n_test, n_right, n_predicted


def nan_mean(values: np.ndarray) -> np.ndarray:
    """Mean over the last axis without NaN, NaN if there is nothing else."""
    n = np.isfinite(values).sum(-1)
    return np.where(n > 0, np.nansum(values, -1) / np.maximum(n, 1), np.nan)


def class_groups(class_counts: np.ndarray, cuts: tuple[int, int], tail_classes: int) -> dict[str, np.ndarray]:
    """Class ids by falling frequency (ties by id): thirds; by counts; those never seen; the rarest and the others."""
    order, C = np.argsort(-class_counts, kind="stable"), len(class_counts)
    groups = dict(zip(("head", "medium", "tail"), np.split(order, [C // 3, 2 * (C // 3)])))
    high, low = cuts
    groups |= {f"many >{high}": np.flatnonzero(class_counts > high),
               f"medium {low}-{high}": np.flatnonzero((class_counts >= low) & (class_counts <= high)),
               f"few <{low}": np.flatnonzero(class_counts < low), "never seen": np.flatnonzero(class_counts == 0)}
    if tail_classes:
        rarest = np.argsort(class_counts, kind="stable")
        groups |= {f"{tail_classes} rarest": rarest[:tail_classes], "others": rarest[tail_classes:]}
    return groups


def frequency_bins(class_counts: np.ndarray, n_bins: int, is_equal_count: bool) -> np.ndarray:
    """[C] bin of each class: equal widths in log10 of the frequency (never seen: bin -1), or equal numbers of classes.

    Source: Wen et al., arXiv 2405.21070, figure 13, bins the log frequency; its edges are not published.
    """
    if is_equal_count:
        bins = np.empty(len(class_counts), int)
        for i, part in enumerate(np.array_split(np.argsort(class_counts, kind="stable"), n_bins)):
            bins[part] = i
        return bins
    seen, bins = class_counts > 0, np.full(len(class_counts), -1)
    if seen.any():
        log = np.log10(class_counts[seen])
        width = max(np.ptp(log) / n_bins, 1e-12)
        bins[seen] = np.minimum((log - log.min()) // width, n_bins - 1)
    return bins


def binned_statistics(bins: np.ndarray, class_counts: np.ndarray, accuracy: np.ndarray, share: np.ndarray, boot: int,
                      rng: np.random.Generator) -> list[dict]:
    """For each bin of classes: number, mean frequency, mean and std of accuracy and of predictions per test image."""
    out = []
    for i in np.unique(bins):
        inside = bins == i
        out.append({"bin": int(i), "n_classes": int(inside.sum()), "count": float(class_counts[inside].mean()),
                    "accuracy": mean_over(accuracy[inside], boot, rng),
                    "accuracy_std": float(np.sqrt(nan_mean((accuracy[inside] - nan_mean(accuracy[inside])) ** 2))),
                    "predictions": mean_over(share[inside], boot, rng),
                    "predictions_std": float(np.sqrt(nan_mean((share[inside] - nan_mean(share[inside])) ** 2)))})
    return out


def score_classes(data: dict, cuts: tuple[int, int], tail_classes: int, worst: int, boot: int,
                  seed: int) -> tuple[dict, np.ndarray, np.ndarray]:
    """All imbalance numbers of one model, {name: estimate}; accuracy [C] (NaN: no test image); predictions [C]."""
    rng = np.random.default_rng(seed)
    labels, counts, C = data["labels"], data["class_counts"], data["n_classes"]
    predictions, n_ties = predict(data)
    n_test, n_predicted = (np.bincount(ids, minlength=C) for ids in (labels, predictions))
    with np.errstate(invalid="ignore"):
        accuracy = np.bincount(labels[labels == predictions], minlength=C) / n_test
        test, right, predicted = resample_images(labels, predictions, C, boot, rng)
        draws = right / test  # [boot, C]
    point = imbalance_metrics(predictions, labels, counts)
    row = {"n": len(labels), "top1": estimate(point["top1"], right.sum(1) / len(labels)),
           "balanced": estimate(point["balanced"], nan_mean(draws))}
    for name, ids in class_groups(counts, cuts, tail_classes).items():
        if len(ids):
            row[name] = estimate(float(nan_mean(accuracy[ids])), nan_mean(draws[:, ids]))
    k = min(worst, int((n_test > 0).sum()))
    row |= {f"worst {k}": estimate(np.sort(accuracy)[:k].mean(), np.sort(draws, 1)[:, :k].mean(1),
                               is_biased=True),  # NaN sort last
            "never right": estimate(np.mean(accuracy[n_test > 0] == 0), nan_mean(np.where(test > 0, right == 0, np.nan))),
            "spearman_acc": spearman(counts, accuracy, boot, rng),
            "spearman_pred": spearman(counts, n_predicted, boot, rng),
            "spearman_acc_pred": spearman(accuracy, n_predicted.astype(float), boot, rng),
            "gini_counts": estimate(float(gini(counts))), "gini_pred": estimate(
                float(gini(n_predicted)), gini(predicted), is_biased=True),
            "chance": point["chance"], "classes without test images": int((n_test == 0).sum()), "ties": n_ties}
    return row, accuracy, n_predicted


def imbalance(paths: list[str], counts: str, subset: str, cuts: tuple[int, int], tail_classes: int, worst: int,
              n_bins: int, is_equal_count: bool, boot: int, seed: int) -> dict:
    """Rows of all models, their classes and frequency bins, and the bins' mean and std over models."""
    rows, models = {}, {}
    for name, path in zip(short_names(paths), paths):
        data = read_predictions(path, "logits", counts=counts)
        if "class_counts" not in data:
            raise SystemExit(f"{path}: no class_counts: pass --counts")
        if subset:
            data = restrict(data, *read_subset(subset, data.get("class_names"), data["n_classes"]))
        rows[name], accuracy, predicted = score_classes(data, cuts, tail_classes, worst, boot, seed)
        class_counts, n_test = data["class_counts"], np.bincount(data["labels"], minlength=data["n_classes"])
        with np.errstate(divide="ignore", invalid="ignore"):
            share = np.where(n_test > 0, predicted / n_test, np.nan)
        bins = frequency_bins(class_counts, n_bins, is_equal_count)
        names = data.get("class_names", np.arange(data["n_classes"]).astype(str))
        models[name] = {"class_names": names, "class_counts": class_counts, "accuracy": accuracy,
                        "predictions": predicted, "predictions_per_image": share,
                        "bins": binned_statistics(bins, class_counts, accuracy, share, boot,
                                                  np.random.default_rng(seed))}
    over = []
    if len(models) > 1 and len({tuple(m["class_counts"]) for m in models.values()}) == 1:
        for same in zip(*(m["bins"] for m in models.values())):
            over.append({"count": same[0]["count"]} | {
                key + end: float(f([b[key]["value"] for b in same])) for key in ("accuracy", "predictions")
                for end, f in (("", np.mean), ("_std", lambda v: np.std(v, ddof=1)))})
    return {"rows": rows, "models": models, "bins_over_models": over}


def plot_imbalance(results: dict, path: str) -> None:
    """Accuracy, and predictions per test image, against frequency: classes (one model) and frequency bins."""
    figure, axes = new_figure(2)
    for i, (name, model) in enumerate(results["models"].items()):
        for axis, key, std in zip(axes, ("accuracy", "predictions_per_image"), ("accuracy", "predictions")):
            counts = np.maximum(model["class_counts"], 0.5)
            if len(results["models"]) == 1:
                axis.scatter(counts, model[key], s=8, color="0.6", linewidths=0, label="class")
            bins = model["bins"]
            x = np.maximum([b["count"] for b in bins], 0.5) * 1.03**i
            axis.errorbar(x, [value_of(b[std]) for b in bins], [b[f"{std}_std"] for b in bins], capsize=2,
                          **line_style(i), label=name if len(results["models"]) > 1 else "bin: mean, std of classes")
    for axis, title in zip(axes, ("accuracy", "predictions / test images")):
        axis.set(xscale="log", xlabel="training images of the class (0.5: none)", ylabel=title, ylim=(0, None))
    axes[1].axhline(1, color="0.5", linewidth=0.8, linestyle=":")
    axes[0].legend(fontsize=7, frameon=False)
    save_figure(figure, path)


# ------------------------------------------------------------------------------ compare


def compare(paths_a: list[str], paths_b: list[str], counts: str, boot: int, seed: int) -> dict:
    """Two models on the same images, several seeds each: A, B, the difference B - A with its paired interval.

    Accuracies: the same images are resampled for both, within classes where classes weigh equally. Correlations: the
    same classes. `seeds` is the t-interval of the difference over pairs of runs, another source of chance. McNemar's
    exact test looks at the images that only one of a pair gets right.
    """
    rng = np.random.default_rng(seed)
    sides = [[read_predictions(path, "logits", counts=counts) for path in paths] for paths in (paths_a, paths_b)]
    first = sides[0][0]
    for data in sides[0] + sides[1]:
        for key in ("rows", "labels"):
            if key in first and key in data and not np.array_equal(first[key], data[key]):
                raise SystemExit(f"{data['path']} and {first['path']} are not of the same images: their {key} differ")
    labels, C = first["labels"], first["n_classes"]
    class_counts = first.get("class_counts", np.zeros(C))
    predictions = [[predict(data)[0] for data in side] for side in sides]
    right = [np.array([p == labels for p in side]) for side in predictions]  # [runs, N] of A and of B
    n_test, tested = np.bincount(labels, minlength=C), np.bincount(labels, minlength=C) > 0
    order = np.argsort(labels, kind="stable")
    gain = (right[1].mean(0) - right[0].mean(0))[order]  # [N], by class
    start, n_of = (np.cumsum(n_test) - n_test)[labels[order]], n_test[labels[order]]
    per_class = np.full((boot, C), np.nan)
    for b in range(boot):
        index = start + (rng.random(len(gain)) * n_of).astype(int)
        per_class[b, tested] = np.bincount(labels, gain[index][np.argsort(order)], C)[tested] / n_test[tested]
    draws = {"top1": bootstrap_means(gain, boot, rng), "balanced": nan_mean(per_class)}
    draws |= {k: nan_mean(per_class[:, ids]) for k, ids in list(class_groups(class_counts, (100, 20), 0).items())[:3]}
    classes = rng.integers(int(tested.sum()), size=(boot, int(tested.sum())))
    metrics = [[imbalance_metrics(p, labels, class_counts) for p in side] for side in predictions]
    frequency = class_counts[tested][classes]
    for key, of in (("spearman_acc", lambda p: np.bincount(labels[p == labels], minlength=C)[tested] / n_test[tested]),
                    ("spearman_pred", lambda p: np.bincount(p, minlength=C)[tested])):
        means = [np.mean([rank_correlations(frequency, of(p)[classes]) for p in side], 0) for side in predictions]
        draws[key] = means[1] - means[0]
    rows = {}
    for key, draw in draws.items():
        a, b = ([m[key] for m in side] for side in metrics)
        if None in a + b:
            rows[key] = {"A": t_interval(a), "B": t_interval(b), "B - A": estimate(None), "seeds": estimate(None)}
            continue
        pairs = [y - x for x, y in zip(a, b)]
        rows[key] = {"A": t_interval(a), "B": t_interval(b), "B - A": estimate(np.mean(b) - np.mean(a), draw),
                     "seeds": t_interval(pairs)}
    mcnemar = {}
    for i, (x, y) in enumerate(zip(*right)):
        only_a, only_b = int((x & ~y).sum()), int((y & ~x).sum())
        p = binomtest(min(only_a, only_b), only_a + only_b).pvalue if only_a + only_b else 1.0
        mcnemar[f"pair {i}"] = {"only A right": only_a, "only B right": only_b, "p": float(p)}
    return {"rows": rows, "mcnemar": mcnemar}


# ------------------------------------------------------------------------------ robustness


def accuracy_pair(id_data: dict, data: dict, subset: str) -> tuple[float, int, float, int]:
    """Accuracy and number of images, in distribution and under shift, over the classes of the shift alone."""
    if subset:
        ids, groups = read_subset(subset, id_data.get("class_names"), id_data["n_classes"])
    else:
        ids = np.unique(data["labels"])
        groups = np.arange(len(ids))
    if id_data["n_classes"] != data["n_classes"]:
        raise SystemExit(f"{data['path']} has {data['n_classes']} classes, {id_data['path']} {id_data['n_classes']}")
    pair = []
    for side in (id_data, data):
        part = restrict(side, ids, groups) if subset or len(ids) < side["n_classes"] else side
        pair += [float((predict(part)[0] == part["labels"]).mean()), len(part["labels"])]
    return tuple(pair)


def models_of_run(folder: Path, group: str, id_set: str, shifts: list[str], subsets: dict[str, str]) -> dict:
    """One model of the robustness plot: {"model", "group", shift: (acc_id, n_id, acc, n)} from a run's folder."""
    name = group or str(read_json(folder / "args.json").get("args", {}).get("data", "runs"))
    metrics, model = read_json(folder / "metrics.json"), {"model": str(folder), "group": name}
    id_path = folder / f"{id_set}.npz"
    found = sorted(({p.stem for p in folder.glob("*.npz")} | set(metrics)) - {id_set, "run"})
    id_data = read_predictions(id_path, "logits") if id_path.is_file() else None
    for shift in shifts or found:
        path = folder / f"{shift}.npz"
        if id_data is not None and path.is_file():
            model[shift] = accuracy_pair(id_data, read_predictions(path, "logits"), subsets.get(shift, ""))
        elif all((metrics.get(s) or {}).get("top1") is not None for s in (id_set, shift)):
            model[shift] = tuple(metrics[s][k] for s in (id_set, shift) for k in ("top1", "n"))
    return model


def models_of_table(path: str, group: str, id_set: str, shifts: list[str], n_of: dict[str, float]) -> list[dict]:
    """The same from a table; accuracies are percent if one of the table is above 1."""
    rows, models = read_table(path), []
    columns = list(rows[0]) if rows else []
    names = shifts or [c for c in columns if c not in ("model", "group", id_set) and "@" not in c]
    wanted = [c for c in columns if c.split("@")[0] in (id_set, *names)]
    if id_set not in columns or not names or "model" not in columns:
        raise SystemExit(f"{path}: found columns {columns}, expected model, {id_set} and shifts; name them by --id and "
                         "--shifts")
    values = [{c: number(row[c], f"{path}:{i + 2}, {c}") for c in wanted if row.get(c, "") != ""}
              for i, row in enumerate(rows)]
    scale = 100 if max((v for row in values for v in row.values()), default=0) > 1 else 1
    for i, (row, value) in enumerate(zip(rows, values)):
        model = {"model": row["model"], "group": group or row.get("group") or Path(path).stem}
        for shift in (s for s in names if s in value and id_set in value):
            matched = f"{id_set}@{shift}" if f"{id_set}@{shift}" in value else id_set
            pair = (value[matched] / scale, n_of.get(matched, np.nan), value[shift] / scale, n_of.get(shift, np.nan))
            if not (0 <= pair[0] <= 1 and 0 <= pair[2] <= 1):
                raise SystemExit(f"{path}:{i + 2}: accuracies of {shift} are out of range: {value}")
            model[shift] = pair
        models.append(model)
    return models


def safe_logit(accuracy: np.ndarray, n: np.ndarray) -> np.ndarray:
    """Log odds; accuracies of 0 and 1 as (k + 1/2) / (n + 1), the others as they are."""
    extreme = (accuracy <= 0) | (accuracy >= 1)
    if np.isnan(np.broadcast_to(n, accuracy.shape)[extreme]).any():
        raise SystemExit("an accuracy is 0 or 1: its log odds need the number of images, pass --n SET=N")
    return logit(np.where(extreme, (accuracy * n + 0.5) / (n + 1), accuracy))


def fit_lines(x: np.ndarray, y: np.ndarray, weight: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Least squares over the last axis: slope, intercept, r2; NaN where x has one distinct value."""
    total = np.maximum(weight.sum(-1, keepdims=True), 1e-300)
    mx, my = ((weight * v).sum(-1, keepdims=True) / total for v in (x, y))
    sxx, syy, sxy = ((weight * a * b).sum(-1) for a, b in ((x - mx, x - mx), (y - my, y - my), (x - mx, y - my)))
    with np.errstate(divide="ignore", invalid="ignore"):
        slope = np.where(sxx > 1e-12 * total[..., 0], sxy / sxx, np.nan)
        return slope, my[..., 0] - slope * mx[..., 0], np.where(syy > 0, slope * sxy / syy, np.nan)


def small_sample_level(n: int) -> float:
    """Level at which percentiles of a bootstrap over n points of a line have the width of a t-interval.

    Source: Hesterberg, arXiv 1411.5279, section 5.3.1 (expanded percentiles), with n - 2 degrees of freedom.
    """
    return float(1 - 2 * norm.cdf(-math.sqrt(n / (n - 2)) * student_t.ppf(0.975, n - 2))) if n > 2 else 0.95


class Line:
    """A group's fit on the logit scale, in one piece or two, with its resamples.

    x, y: [m] log odds. split: log odds of x that part the pieces; inf is one piece. draws: [boot, pieces] of slope and
    intercept, each resample of models with at least two distinct x.
    """

    def __init__(self, x: np.ndarray, y: np.ndarray, split: float, boot: int, rng: np.random.Generator):
        self.split, self.level, self.n = split, small_sample_level(len(x)), len(x)
        index = rng.integers(len(x), size=(boot, len(x)))
        while np.ptp(x) > 0 and (constant := np.ptp(x[index], axis=1) == 0).any():
            index[constant] = rng.integers(len(x), size=(int(constant.sum()), len(x)))
        pieces = [x < split, x >= split] if math.isfinite(split) else [np.ones(len(x), bool)]
        fits = [fit_lines(x, y, piece.astype(float)) for piece in pieces]
        self.slope, self.intercept, self.r2 = (np.array(v) for v in zip(*fits))
        draws = [fit_lines(x[index], y[index], piece[index].astype(float)) for piece in pieces]
        self.draws = [np.stack(v, -1) for v in zip(*draws)]  # slope, intercept, r2: [boot, pieces]

    def at(self, x: np.ndarray) -> np.ndarray:
        """Log odds that the line expects at x [...]."""
        piece = (np.asarray(x) >= self.split).astype(int)
        return self.slope[piece] * x + self.intercept[piece]

    def draws_at(self, x: np.ndarray) -> np.ndarray:
        """The same of every resample. x: [boot, m] or [m]; returns [boot, m]."""
        piece = np.broadcast_to((np.asarray(x) >= self.split).astype(int), (len(self.draws[0]), np.shape(x)[-1]))
        slope, intercept = (np.take_along_axis(d, piece, 1) for d in self.draws[:2])
        return slope * x + intercept

    def estimates(self) -> list[dict]:
        """Slope, intercept and r2 of each piece, with intervals."""
        return [{"models": self.n} | {name: estimate(value[i], draws[:, i], self.level) for name, value, draws in zip(
            ("slope", "intercept", "r2"), (self.slope, self.intercept, self.r2), self.draws)}
            for i in range(len(self.slope))]


def effective_robustness(models: list[dict], shifts: list[str], baseline: str, before: str, splits: dict[str, float],
                         boot: int, seed: int) -> dict:
    """Accuracy of every model under every shift beyond the line of the baseline models.

    models: as models_of_run gives them, each with all shifts. rho = acc - sigmoid(slope * logit(acc_id) + intercept), a
    vertical distance in 0..1. `average` is a shift of its own: accuracies averaged, then logit; `mean_rho` averages rho.
    The interval of rho resamples models (the line) and images (binomial draws of both accuracies).
    Source: Taori et al., arXiv 2007.00644, sections 2 and 3; groups of one training source each: 2103.00020, figure 13.
    """
    rng = np.random.default_rng(seed)
    values = np.array([[m[s] for s in shifts] for m in models], float)  # [models, S, 4]
    acc_id, n_id, acc, n = np.moveaxis(values, -1, 0)  # each [models, S]

    def drawn(p: np.ndarray, n: np.ndarray) -> np.ndarray:
        k = rng.binomial(np.nan_to_num(n).astype(int), p, size=(boot, *p.shape))
        return np.where(np.isnan(n), p, k / np.maximum(n, 1))

    id_draws, draws = drawn(acc_id, n_id), drawn(acc, n)  # [boot, models, S]
    # All: the average is one more shift, with the summed images as its n.
    acc_id, acc, id_draws, draws = (np.concatenate([v, v.mean(-1, keepdims=True)], -1)
                                    for v in (acc_id, acc, id_draws, draws))
    n_id, n = (np.concatenate([v, v.sum(-1, keepdims=True)], -1) for v in (n_id, n))
    x, y, names = safe_logit(acc_id, n_id), safe_logit(acc, n), [*shifts, "average"]
    groups = np.array([m["group"] for m in models])
    rows = {m["model"]: {"group": m["group"]} for m in models}
    fits, curves, rho_draws = {}, {}, []
    for s, shift in enumerate(names):
        split = logit(splits[shift]) if shift in splits else math.inf
        lines = {g: Line(x[groups == g, s], y[groups == g, s], split if g == baseline else math.inf, boot,
                         np.random.default_rng(seed + 1))  # the same resamples of models for every shift
                 for g in dict.fromkeys(groups.tolist()) if g == baseline or (groups == g).sum() > 2}
        for g, line in lines.items():
            for i, fit in enumerate(line.estimates()):
                fits[f"{shift}, {g}" + (f", {'left' if i == 0 else 'right'}" if len(line.slope) > 1 else "")] = fit
            grid = np.linspace(x[:, s].min() - 0.2, x[:, s].max() + 0.2, 60)
            tail = (1 - line.level) / 2
            low, high = np.quantile(line.draws_at(grid), [tail, 1 - tail], axis=0) if boot else (None, None)
            curves.setdefault(shift, {})[g] = {"x": expit(grid), "y": expit(line.at(grid))} | (
                {"low": expit(low), "high": expit(high)} if boot else {})
        line, base = lines[baseline], x[groups == baseline, s]
        rho = acc[:, s] - expit(line.at(x[:, s]))
        rho_draws.append(draws[:, :, s] - expit(line.draws_at(safe_logit(id_draws[:, :, s], n_id[:, s])))
                         if boot else np.zeros((0, len(models))))
        for i, m in enumerate(models):
            rows[m["model"]] |= {f"{shift} id": clopper_pearson(acc_id[i, s], n_id[i, s] if shift != "average" else np.nan),
                                 shift: clopper_pearson(acc[i, s], n[i, s] if shift != "average" else np.nan),
                                 f"{shift} rho": estimate(rho[i], rho_draws[-1][:, i], line.level),
                                 f"{shift} extrapolated": bool(not base.min() <= x[i, s] <= base.max())}
    for i, m in enumerate(models):
        rhos = [rows[m["model"]][f"{s} rho"]["value"] for s in shifts]
        rows[m["model"]]["mean_rho"] = estimate(None if None in rhos else np.mean(rhos),
                                                np.mean([d[:, i] for d in rho_draws[:-1]], 0), line.level)
        if before:
            j = [m["model"] for m in models].index(before)
            for s, shift in enumerate(names):
                rows[m["model"]][f"{shift} tau"] = estimate(acc[i, s] - acc[j, s], draws[:, i, s] - draws[:, j, s])
    return {"baseline": baseline, "shifts": names, "rows": rows, "fits": fits, "curves": curves}


def robustness(inputs: list[str], id_set: str, shifts: list[str], baseline: str, before: str, subsets: dict[str, str],
               n_of: dict[str, str], splits: dict[str, str], boot: int, seed: int) -> dict:
    """Read tables and runs, leave out models that miss a shift, fit."""
    models = []
    n_images = {k: number(v, f"--n {k}") for k, v in n_of.items()}
    for text in inputs:
        group, _, path = text.rpartition("=")
        if Path(path).is_dir():
            models.append(models_of_run(Path(path), group, id_set, shifts, subsets))
        else:
            models += models_of_table(path, group, id_set, shifts, n_images)
    shifts = shifts or list(dict.fromkeys(k for m in models for k in m if k not in ("model", "group")))
    kept = [m for m in models if all(s in m for s in shifts)]
    for m in models:
        if m not in kept:
            print(f"left out {m['model']}: no accuracy on {', '.join(s for s in shifts if s not in m)}", file=sys.stderr)
    names = [m["model"] for m in kept]
    if not kept or not shifts or len(set(names)) < len(names):
        raise SystemExit(f"{len(models)} models, {len(kept)} of them with {id_set} and all of {shifts}; each needs its "
                         f"own name ({len(set(names))} names); --id and --shifts choose the sets")
    baseline = baseline or kept[0]["group"]
    n_base = sum(m["group"] == baseline for m in kept)
    if n_base < 2 or (before and before not in names):
        raise SystemExit(f"--baseline {baseline}: {n_base} models, a line needs 2; groups are "
                         f"{sorted({m['group'] for m in kept})}" if n_base < 2 else f"--before: no model {before}")
    cuts = {k: number(v, f"--split {k}") for k, v in splits.items()}
    return effective_robustness(kept, shifts, baseline, before, cuts, boot, seed)


def plot_robustness(results: dict, path: str) -> None:
    """For every shift: accuracy under shift against ID accuracy, logit axes, y = x, the groups' lines and bands."""
    shifts = results["shifts"]
    figure, axes = new_figure(len(shifts), 3.4, 3.2)
    groups = list(dict.fromkeys(row["group"] for row in results["rows"].values()))
    for axis, shift in zip(axes, shifts):
        for i, group in enumerate(groups):
            members = [row for row in results["rows"].values() if row["group"] == group]
            x, y = (np.array([value_of(row[key]) for row in members]) for key in (f"{shift} id", shift))
            error = np.array([[v - (row[shift]["low"] or v), (row[shift]["high"] or v) - v]
                              for row, v in zip(members, y)]).T
            x, y, low, high = (logit(np.clip(v, 1e-3, 0.999)) for v in (x, y, y - error[0], y + error[1]))
            axis.errorbar(x, y, [y - low, high - y], label=group, **line_style(i) | {"linestyle": "", "markersize": 5})
            curve = results["curves"][shift].get(group)
            if curve:
                axis.plot(logit(curve["x"]), logit(curve["y"]), color=COLORS[i % len(COLORS)], linewidth=1)
                if "low" in curve and len(members) >= 6:  # the band of a few models is the whole panel
                    axis.fill_between(logit(curve["x"]), logit(curve["low"]), logit(curve["high"]), alpha=0.2,
                                      color=COLORS[i % len(COLORS)], linewidth=0)
        rows = results["rows"].values()
        for which, key in (("x", f"{shift} id"), ("y", shift)):
            low, high = (f(value_of(row[key]) for row in rows) for f in (min, max))
            limits = logit(np.clip([low, high], 2e-3, 0.998)) + [-0.35, 0.35]
            for step in (20, 10, 5, 2, 1):  # percent between ticks
                ticks = np.arange(step, 100, step) / 100
                inside = ticks[(logit(ticks) > limits[0]) & (logit(ticks) < limits[1])]
                if len(inside) >= 4:
                    break
            axis.set(**{f"{which}lim": limits, f"{which}ticks": logit(inside),
                        f"{which}ticklabels": [f"{100 * t:g}" for t in inside]})
        ends = axis.get_xlim()
        axis.plot(ends, ends, color="0.5", linestyle=":", linewidth=0.8)
        axis.set(title=shift, xlabel="in distribution (%), same classes", ylabel="under shift (%)")
    axes[0].legend(fontsize=7, frameon=False)
    save_figure(figure, path)


# ------------------------------------------------------------------------------ output

COLORS = ("#000000", "#d55e00", "#0072b2", "#e69f00", "#009e73", "#cc79a7", "#56b4e9")  # Okabe and Ito
MARKERS, DASHES = "osD^vPX", ("-", "--", "-.", ":")


def value_of(entry: dict | float | None) -> float:
    """The number of an estimate or a plain number; NaN for None."""
    entry = entry["value"] if isinstance(entry, dict) else entry
    return math.nan if entry is None else entry


def line_style(i: int) -> dict:
    """Colour, marker and dashes of series i: told apart without colour too."""
    return {"color": COLORS[i % len(COLORS)], "marker": MARKERS[i % len(MARKERS)], "markersize": 4,
            "linestyle": DASHES[i % len(DASHES)], "linewidth": 1}


def new_figure(n_panels: int, width: float = 4.2, height: float = 3.2) -> tuple:
    """A matplotlib figure and its panels, at most four in a row."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise SystemExit("--plot needs matplotlib: pip install matplotlib") from None
    columns = min(n_panels, 4)
    n_rows = math.ceil(n_panels / columns)
    figure = Figure((width * columns, height * n_rows), layout="constrained")
    axes = list(figure.subplots(n_rows, columns, squeeze=False).ravel())
    for axis in axes:
        axis.spines[["top", "right"]].set_visible(False)
    for axis in axes[n_panels:]:
        axis.set_visible(False)
    return figure, axes[:n_panels]


def save_figure(figure, path: str) -> None:
    """Write a figure without a date, so that equal input gives equal bytes."""
    import matplotlib

    kind = Path(path).suffix[1:]
    with matplotlib.rc_context({"svg.hashsalt": "evaluate", "svg.fonttype": "none"}):
        write_atomically(Path(path), lambda file: figure.savefig(
            file, format=kind, dpi=130, metadata={"Date": None} if kind == "svg" else {"Software": None}))


# Copied from clip.py
def write_atomically(path: Path, write: Callable) -> None:
    """Write a file under a temporary name, then put it in its place: a reader never sees half of it.

    write: called with the open binary file. Raises: SystemExit if the disk is full or the folder cannot be written;
    what was there before is kept.
    """
    part = path.with_name(f"{path.name}.{os.getpid()}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(part, "wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, path)
    except (OSError, RuntimeError) as error:  # torch.save reports a full disk as RuntimeError
        with contextlib.suppress(OSError):
            part.unlink(missing_ok=True)
        raise SystemExit(f"cannot write {path}: {str(error)[:200]}; a checkpoint written before is kept") from None


# Copied from clip.py
def write_json(path: Path, content: dict) -> None:
    write_atomically(path, lambda file: file.write((json.dumps(content, indent=1) + "\n").encode()))


def plain(value):
    """Arrays, NumPy numbers and NaN as JSON has them: lists, numbers, null."""
    if isinstance(value, dict):
        return {str(k): plain(v) for k, v in value.items()}
    if isinstance(value, list | tuple | np.ndarray):
        return [plain(v) for v in (value.tolist() if isinstance(value, np.ndarray) else value)]
    if isinstance(value, np.generic):
        value = value.item()
    return None if isinstance(value, float) and not math.isfinite(value) else value


def short_names(paths: list[str]) -> list[str]:
    """Names of files for tables: without what all paths have in common; with a number if they are equal."""
    parts = [Path(path).with_suffix("").parts for path in paths]
    while len(parts) > 1 and min(map(len, parts)) > 1 and len({p[0] for p in parts}) == 1:
        parts = [p[1:] for p in parts]
    while len(parts) > 1 and min(map(len, parts)) > 1 and len({p[-1] for p in parts}) == 1:
        parts = [p[:-1] for p in parts]
    names = ["/".join(p[-2:]) for p in parts]
    return [name if names.count(name) == 1 else f"{name} {i}" for i, name in enumerate(names)]


def cell(value) -> str:
    """A table cell: `0.785 [0.770, 0.800]`, - for what cannot be computed."""
    if isinstance(value, dict):
        ends = f" [{value['low']:.3f}, {value['high']:.3f}]" if value["low"] is not None else ""
        return "-" if value["value"] is None else f"{value['value']:.3f}{ends}"
    if isinstance(value, float | np.floating):
        return "-" if not math.isfinite(value) else f"{value:.4g}"
    return "-" if value is None else str(value)


def show(rows: dict[str, dict], title: str = "", is_turned: bool = False) -> None:
    """Print a table {row: {column: estimate or value}}; turned: one line a column of it."""
    columns = list(dict.fromkeys(c for row in rows.values() for c in row))
    lines = [[title, *columns]] + [[name] + [cell(row.get(c)) for c in columns] for name, row in rows.items()]
    lines = list(zip(*lines)) if is_turned else lines
    widths = [max(len(line[i]) for line in lines) for i in range(len(lines[0]))]
    for line in lines:
        print("  ".join(text.ljust(w) if i == 0 else text.rjust(w) for i, (text, w) in enumerate(zip(line, widths))))


# ------------------------------------------------------------------------------ main


def main(args: argparse.Namespace) -> None:
    draw, is_turned, boot, seed = None, False, args.boot, args.seed
    if args.command == "imbalance":
        results = imbalance(args.files, args.counts, args.classes, tuple(args.cuts), args.tail_classes, args.worst,
                            args.bins, args.equal_count, boot, seed)
        draw, is_turned = plot_imbalance, True
    elif args.command == "robustness":
        results = robustness(args.inputs, args.id, args.shifts, args.baseline, args.before,
                             set_flag(args.subset, "--subset"), set_flag(args.n, "--n"),
                             set_flag(args.split, "--split"), boot, seed)
        draw, is_turned = plot_robustness, True
    elif args.command == "compare":
        results = compare(args.a.split(","), args.b.split(","), args.counts, boot, seed)

    show(results["rows"], args.command, is_turned)
    for name in ("fits", "mcnemar"):
        if results.get(name):
            show(results[name], name)
    if args.plot and draw is None:
        raise SystemExit(f"{args.command} has no plot")
    if args.json:
        versions = {"numpy": np.__version__, "scipy": scipy.__version__, "torch": torch.__version__}
        write_json(Path(args.json), plain({"command": args.command, "args": vars(args), "versions": versions} | results))
    if args.plot:
        draw(plain(results), args.plot)


if __name__ == "__main__":
    try:
        main(ARGS)
    except SystemExit as error:
        if not isinstance(error.code, str):
            raise
        print(f"evaluate.py: {error.code}", file=sys.stderr)
        sys.exit(2)
