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
    python evaluate.py probe runs/dino/transfer/unseen_train.npz runs/dino/transfer/unseen_test.npz
    python evaluate.py knn runs/dino/transfer runs/sampled/transfer --sets unseen    # unseen_train.npz, _test.npz
    python evaluate.py fewshot runs/dino/transfer/unseen_train.npz runs/dino/transfer/unseen_test.npz --shots 1 4
    python evaluate.py retrieval pairs.npz              # features, text_features, image_ids, caption_ids (optional)
    python evaluate.py calibration runs/clip/val.npz --plot reliability.png
    python evaluate.py concepts shared laion.tsv yfcc.tsv cc12m.tsv --plot tail.png
    python evaluate.py report runs/sl runs/clip collapse.json --out report.html  # runs, and --json of other commands

in    <set>.npz     labels [N] (-1: none), logits [N, C], features [N, D], class_counts [C], class_names [C], prototypes
                    [C, D]; each command names what it misses. `predictions` [N], if there, takes the place of argmax
      RUN           a folder with <set>.npz, and metrics.json and args.json where a command can use them
      tables        CSV, TSV or JSON with a header; counts: one number a line, or columns class and count
      checkpoints   .pt with weights_only, .safetensors, .npy
out   a table on the terminal, `--json FILE` with all numbers, `--plot FILE.png|svg` (pip install matplotlib)

Every estimate is {"value", "low", "high"}: 95 % percentile intervals of --boot resamples, over images for accuracies
(within classes where classes weigh equally), over classes for correlations, over models for fits; exact binomial ones
for accuracies of 0, of 1 and from tables, t intervals over runs, jackknife ones for ranks and lengths, reflected ones
for what resampling itself moves (Gini, ECE); null where nothing can be computed, or nothing was sampled. Arrays of
classes have theirs beside them (accuracy_interval [C, 2]).
No interval: counts; p-values; what is computed from no sample (class vectors, prototypes); what is chosen from a grid
(probe's C; debias gives `wins`, the share of resamples of the held-out images in which it is the best too). Tables mark
estimates without one: * on the terminal, † in a report. Fractions are in 0..1. The same seed gives the same bytes.

Dimension key: N images, C classes, D width, K prototypes, S shifts, boot resamples.

Differences from the paper's notebooks and from the methods' released code:
 1. Estimates have intervals, and classes without images are left out of means of accuracies (theirs: 0/0).
 2. Ties of float16 logits are broken by features @ prototypes, not by the lowest class; their number is reported.
 3. Intra-class similarity has no self-pairs; its interval resamples images, not pairs; curves keep one order.
 4. NC2 of class vectors is given centred too: uncentred it mostly measures their common mean.
 5. GLA's label prior is the exact optimum of its convex problem (L-BFGS), not 1,000 steps of primal-dual SGD.
 6. 11-point average precision does not count recall 0 as precision 1, and leaves out `difficult` objects (label -1).
 7. Logistic regression runs to its optimum for every strength; the released sweep stops at 100 iterations.
 8. Percentiles are widened for small samples of models (Hesterberg, arXiv 1411.5279, section 5.3.1).
 9. --calibrate minimises the negative log-likelihood; GLA's code makes the mean confidence equal to the accuracy.
"""

import argparse
import base64
import contextlib
import csv
import importlib.util
import json
import math
import os
import pickle
import re
import sys
import tempfile
import zipfile
import zlib
from collections.abc import Callable, Iterator
from html import escape
from pathlib import Path

# ------------------------------------------------------------------------------ flags


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """Flags of evaluate.py, one subcommand a metric family; wrong combinations end here."""
    def between(low: float, high: float = 1e12, kind: type = int) -> Callable:
        def convert(text: str) -> float:
            if not low <= kind(text) <= high:
                raise ValueError
            return kind(text)

        convert.__name__ = f"number between {low:g} and {high:g},"
        return convert

    def pair(kind: Callable = str) -> Callable:
        def convert(text: str) -> tuple:
            name, value = text.split("=", 1)
            return name, kind(value)

        convert.__name__ = "NAME=VALUE"
        return convert

    amount, count, share, strength = between(0), between(1), between(0, 1, float), between(1e-30, 1e30, float)
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], allow_abbrev=False)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    common, files, counted, shifted, device, task = (argparse.ArgumentParser(add_help=False) for _ in range(6))
    common.add_argument("--boot", type=amount, default=1000,
                        help="resamples for intervals (but fewshot's); 0: none; for those of correlations take 2000")
    common.add_argument("--seed", type=amount, default=0, help="of resamples, splits and draws")
    common.add_argument("--json", default="", help="write all numbers to this file")
    common.add_argument("--plot", default="", help="draw to this .png or .svg (pip install matplotlib)")
    files.add_argument("files", nargs="+", help="predictions, one file a model")
    counted.add_argument("--counts", default="", help="training frequencies, if other than the files' class_counts")
    shifted.add_argument("--id", default="val", help="in-distribution test set")
    shifted.add_argument("--shifts", nargs="*", default=[], help="test sets under shift; empty: those of all inputs")
    device.add_argument("--device", default="cpu", help="cpu, cuda, cuda:1")
    task.add_argument("inputs", nargs="+", help="TRAIN.npz TEST.npz, TRAIN.npz VAL.npz TEST.npz, or folders of models "
                                                "with SET_train.npz, SET_test.npz, perhaps SET_val.npz")
    task.add_argument("--sets", nargs="*", default=[], help="sets of the folders; empty takes all of the first")
    task.add_argument("--metric", default="auto", choices=["auto", "top1", "per_class"],
                      help="auto is per_class for aircraft, caltech, flowers and pets, else top1; labels [N, C] of 1, "
                           "0, -1 (difficult) are scored by 11-point mAP")
    task.set_defaults(k=[], sweep="none", C=0.0, shots=[], draws=0)  # those that another of the three commands has

    def command(name: str, text: str, *parents: argparse.ArgumentParser) -> argparse.ArgumentParser:
        return commands.add_parser(name, help=text, description=text, parents=[common, *parents], allow_abbrev=False,
                                   formatter_class=argparse.ArgumentDefaultsHelpFormatter)

    p = command("imbalance", "accuracy and predictions against the training frequency of the classes", files, counted)
    p.add_argument("--classes", default="", help="classes to keep (logits too): a line each, id or name, and perhaps a "
                                                 "tab and a group; logits of a group are max-pooled")
    p.add_argument("--cuts", nargs=2, type=amount, default=[100, 20], help="many > first, medium, few < second")
    p.add_argument("--tail-classes", type=amount, default=0, help="also the K rarest classes, and the others; 0 is off")
    p.add_argument("--worst", type=count, default=10, help="k of the mean over the k worst classes")
    p.add_argument("--bins", type=count, default=10, help="frequency bins")
    p.add_argument("--equal-count", action="store_true", help="bins of as many classes each, not of one log width")
    p = command("robustness", "effective robustness: accuracy under shift beyond the baseline models' line", shifted)
    p.add_argument("inputs", nargs="+", help="tables (columns model, group, and one a test set; SET@SHIFT is the "
                                             "accuracy on SET over the classes of SHIFT) and runs, as GROUP=FOLDER; "
                                             "without GROUP a run's training data names it")
    p.add_argument("--baseline", default="", help="group of the standard models; empty takes the first input's")
    p.add_argument("--before", default="", help="model before an intervention: adds each model's relative robustness")
    p.add_argument("--subset", nargs="*", type=pair(), default=[], metavar="SHIFT=FILE", help="classes of a shift, as "
                   "imbalance's --classes; without it, those that both sets have images of")
    p.add_argument("--n", nargs="*", type=pair(between(1, kind=float)), default=[], metavar="SET=N",
                   help="images of test sets where tables and runs do not say it, for intervals")
    p.add_argument("--split", nargs="*", type=pair(between(1e-6, 1 - 1e-6, float)), default=[], metavar="SHIFT=ACC",
                   help="two lines, left and right of this ID accuracy, for sets chosen against one model")
    p = command("compare", "two models on the same images: paired bootstrap, McNemar's test; A's thirds", counted)
    p.add_argument("a", help="predictions; several seeds with commas between")
    p.add_argument("b", help="predictions; several seeds with commas between")
    p = command("probe", "logistic regression on features (L-BFGS), strength chosen on validation images", task, device)
    p.add_argument("--sweep", default="clip", choices=["clip", "transfer", "none"],
                   help="strengths: CLIP's binary search over 96, 45 of the transfer protocol, or --C alone")
    p.add_argument("--C", type=strength, default=0.316, help="inverse strength, as scikit-learn's, for --sweep none")
    p = command("knn", "weighted nearest neighbours by cosine", task, device)
    p.add_argument("--k", nargs="+", type=count, default=[10, 20, 100, 200], help="numbers of neighbours")
    p = command("fewshot", "logistic regression on k images a class, several draws", task, device)
    p.add_argument("--shots", nargs="+", type=count, default=[1, 2, 4, 8, 16], help="images a class")
    p.add_argument("--draws", type=count, default=5, help="draws of the images; the interval is over them")
    p.add_argument("--C", type=strength, default=0.316, help="inverse strength, as scikit-learn's")
    p = command("retrieval", "recall at k of texts for images and images for texts", device)
    p.add_argument("files", nargs="+", help="features [n_images, D], text_features [n, D], image_ids [n]; caption_ids "
                                             "[n], equal for equal captions, which are right for all of their images")
    p.add_argument("--k", nargs="+", type=count, default=[1, 5, 10], help="places that count")
    p = command("calibration", "expected calibration error, temperature, reliability", files)
    p.add_argument("--bins", type=count, default=15, help="confidence bins")
    p.add_argument("--fraction", type=share, default=0.5, help="images that the temperature is fitted on")
    command("collapse", "neural collapse: NC1, NC2 of class means (features before normalisation) and class vectors",
            files, counted)
    p = command("similarity", "how alike the pictures of one class are, in two sets")
    p.add_argument("a", help="features and labels of one set")
    p.add_argument("b", help="features and labels of the other, from the same model")
    p.add_argument("--pairs", type=count, default=100, help="largest number of pairs of a class in the distribution")
    p.add_argument("--max-images", type=between(2), default=100, help="images of a class, a random choice")
    p.add_argument("--min-pairs", type=count, default=7, help="leave out classes with fewer in either set")
    p = command("prototypes", "distinct prototypes, affinity of head and tail, effective rank", counted, device)
    p.add_argument("file", help="[K, D] array: .npy, .npz (prototypes), or a checkpoint's last layer")
    p.add_argument("--key", default="", help="name of the array, if it is not found")
    p.add_argument("--eps", nargs="+", type=between(1e-6, 2, float), default=[0.025],
                   help="largest 1 - cosine of prototypes that count as one")
    p.add_argument("--tail", type=amount, default=50, help="rarest rows, and as many random others, in the affinity")
    p.add_argument("--tsne", action="store_true", help="add t-SNE to numbers and plot (pip install scikit-learn)")
    p.add_argument("--samples", type=amount, default=0, help="t-SNE of as many images a class of the .npz, of 25 "
                                                             "frequent and 8 rare classes, too; 0 is off")
    p = command("debias", "remove the label bias of a zero-shot and a fine-tuned model after training")
    p.add_argument("--zeroshot", required=True, help="predictions of the zero-shot model on the test images")
    p.add_argument("--finetuned", required=True, help="predictions of the fine-tuned model on the same images")
    p.add_argument("--val-zeroshot", default="", help="the same on held-out images; empty holds out half of each class")
    p.add_argument("--val-finetuned", default="", help="goes with --val-zeroshot")
    p.add_argument("--more", nargs="*", type=pair(), default=[], metavar="NAME=FILE", help="more rows: wise=FILE.npz")
    p.add_argument("--wiseft", nargs="*", default=[], metavar="FILE", help="predictions of interpolated weights on the "
                   "same images: the best on the held-out half is a row (WiSE-FT)")
    p.add_argument("--prior", default="", help="frequencies the fine-tuned model was trained on: a file, or uniform; "
                                               "empty takes its class_counts")
    p.add_argument("--group-by", default="counts", choices=["counts", "prior"],
                   help="thirds of classes by the class_counts or by the zero-shot model's estimated prior (GLA)")
    p.add_argument("--calibrate", action="store_true", help="divide both models' logits by their temperature first")
    p = wise = command("wiseft", "interpolate two checkpoints; then the curve of their results", shifted)
    p.add_argument("checkpoints", nargs="*", help="zero-shot and fine-tuned checkpoint")
    p.add_argument("--alpha", nargs="+", type=between(-9, 9, float), default=[0, 0.25, 0.5, 0.75, 1],
                   help="share of the second")
    p.add_argument("--out", default="runs/wiseft", help="folder of alpha_*.pt")
    p.add_argument("--results", default="", help="instead: a folder with alpha_*/, each written by --eval-only")
    p = command("concepts", "class frequencies over concept sets and data sets", counted)
    p.add_argument("what", choices=["accuracy", "agree", "shared"],
                   help="accuracy: MODEL/SET.npz files, correlations a set; agree: pairs of counts A B; shared: counts "
                        "of several data sets")
    p.add_argument("files", nargs="+", help="predictions, or tables of counts")
    p = command("report", "one HTML page, and Markdown tables, of runs side by side")
    p.add_argument("runs", nargs="+", help="folders, as NAME=FOLDER, where names like frozen/0.4M make a series along "
                                           "an axis; FILE.json of other commands: tables and plots (matplotlib)")
    p.add_argument("--id", default="val", help="in-distribution test set, the first of the page; else that of the runs")
    p.add_argument("--out", default="report.html", help="the page: one file, no requests")
    p.add_argument("--markdown", default="", help="also write the tables to this file")

    args = parser.parse_args(argv)
    if args.command == "imbalance" and args.cuts[0] < args.cuts[1]:
        parser.error(f"--cuts: {args.cuts[0]} is below {args.cuts[1]}")
    if args.command == "wiseft" and len(args.checkpoints) != (0 if args.results else 2):
        parser.error("wiseft takes two checkpoints, or --results FOLDER")
    if args.command == "wiseft" and len(set(args.alpha)) < len(args.alpha):
        parser.error("--alpha: a value is given twice")
    if getattr(args, "results", "") and (args.alpha, args.out) != (wise.get_default("alpha"), wise.get_default("out")):
        parser.error("--alpha and --out go with two checkpoints, not with --results")
    if args.command == "debias" and bool(args.val_zeroshot) != bool(args.val_finetuned):
        parser.error("--val-zeroshot and --val-finetuned go together")
    if args.command == "debias" and args.val_zeroshot and args.wiseft:
        parser.error("--wiseft is chosen on the half that is held out: not with --val-zeroshot")
    for flag in ("n", "split", "subset", "more"):
        names = [name for name, _ in getattr(args, flag, [])]
        if len(set(names)) < len(names):
            parser.error(f"--{flag}: {', '.join(sorted({n for n in names if names.count(n) > 1}))} is given twice")
    if args.command == "robustness" and any(n != int(n) for _, n in args.n):
        parser.error("--n: numbers of images are whole")
    if getattr(args, "sets", []) and all(path.endswith(".npz") for path in args.inputs):
        parser.error("--sets chooses among the sets of folders, not of .npz files")
    if args.command == "concepts" and args.counts and args.what != "accuracy":
        parser.error(f"concepts {args.what} has its counts in the files: --counts goes with accuracy")
    if args.json and not Path(args.json).name:
        parser.error(f"--json: {args.json} is not the name of a file")
    if args.plot and (args.command == "report" or args.command == "wiseft" and args.checkpoints):
        parser.error(f"{args.command} has nothing for --plot to draw")
    if args.plot and Path(args.plot).suffix not in (".png", ".svg"):
        parser.error(f"--plot ends in .png or .svg, got {args.plot}")
    return args


if __name__ == "__main__":
    ARGS = parse_args()  # before the heavy imports: --help and a mistyped flag are answered at once

import numpy as np  # noqa: E402
import scipy.ndimage  # noqa: E402
import scipy.optimize  # noqa: E402
import torch  # noqa: E402
from scipy.sparse import csr_matrix  # noqa: E402
from scipy.sparse.csgraph import connected_components  # noqa: E402
from scipy.special import expit, log_softmax, logit, logsumexp, softmax  # noqa: E402
from scipy.stats import beta, binom, binomtest, chi2, false_discovery_control, norm, rankdata, spearmanr  # noqa: E402
from scipy.stats import t as student_t  # noqa: E402

# ------------------------------------------------------------------------------ readers


# What the readers of the standard library, NumPy and torch raise for files that are not theirs.
FAILURES = (OSError, ValueError, LookupError, TypeError, AttributeError, AssertionError, RuntimeError, EOFError,
            csv.Error, zlib.error, zipfile.BadZipFile, pickle.UnpicklingError)


def refuse(is_wrong: object, line: str) -> None:
    """SystemExit with the one line that the user reads, for input that cannot be used."""
    if is_wrong:
        raise SystemExit(line)


@contextlib.contextmanager
def reading(path: str | Path, what: str, *more: type) -> Iterator[None]:
    """Turns FAILURES, and those of `more`, raised inside into a SystemExit of one line."""
    try:
        yield
    except (*FAILURES, *more) as error:
        raise SystemExit(f"{path}: cannot be read{what} ({str(error)[:100]})") from None


def check_member(archive: zipfile.ZipFile, member: zipfile.ZipInfo, path: str | Path) -> None:
    """SystemExit for an array of an .npz that must not be read, told by its header."""
    with archive.open(member) as file:
        version = np.lib.format.read_magic(file)
        read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
        shape, _, dtype = read(file)
        refuse(dtype.hasobject, f"{path}: {member.filename} holds Python objects, which run code: save numbers or text")
        if math.prod(shape) * dtype.itemsize + file.tell() != member.file_size:
            raise SystemExit(f"{path}: {member.filename} says {shape} {dtype} and has {member.file_size} bytes")


def memory_size() -> int:
    """Bytes of memory that the machine has."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def read_npz(path: str | Path, keys: tuple[str, ...] = ()) -> dict[str, np.ndarray]:
    """Arrays of an .npz: those named, else all. Nothing is unpacked before names, types and sizes were looked at.

    Raises: SystemExit for a file that is none, holds Python objects, or unpacks to more than the memory of the machine
        or than 200 times its size.
    """
    refuse(Path(path).exists() and not Path(path).is_file(), f"{path}: not a file")  # a device may have no end
    with reading(path, " as .npz"):
        with zipfile.ZipFile(path) as archive:
            members = [m for m in archive.infolist() if not keys or m.filename.removesuffix(".npy") in keys]
            n_bytes, n_packed = sum(m.file_size for m in members), sum(m.compress_size for m in members)
            refuse(n_bytes > min(memory_size(), max(2**28, 200 * n_packed)),
                   f"{path}: {n_packed} bytes announce {n_bytes} unpacked; save it without compression or in parts")
            for member in members:
                check_member(archive, member, path)
        with np.load(path, allow_pickle=False) as file:
            return {name: file[name] for name in file.files if not keys or name in keys}


def check_finite_rows(path: str | Path, name: str, array: np.ndarray) -> None:
    """SystemExit, with the row, for NaN, infinity, and numbers above 1e15, whose squares and sums leave float32."""
    for start in range(0, len(array), 8192):
        part = array[start : start + 8192]
        finite = np.isfinite(part) if part.dtype.itemsize == 2 else np.abs(part) <= 1e15
        finite = finite.reshape(len(part), -1).all(1)
        refuse(not finite.all(), f"{path}: {name} are not finite in row {start + int(finite.argmin())}, or above 1e15 "
               "(float16 ends at 65,504: save larger values as float32)")


ROW_KEYS = ("labels", "logits", "features", "rows", "predictions")
CLASS_KEYS = ("class_counts", "class_names", "prototypes")
ARRAYS = {name: ("numbers", "fiu", 2) for name in ("logits", "features", "prototypes")} | {
    "class_counts": ("numbers", "fiu", 1), "class_names": ("text", "Uiu", 1),
    "labels": ("whole numbers", "iu", 1), "predictions": ("whole numbers", "iu", 1)}  # what, its NumPy kinds, axes
MAX_CLASSES = 2**24  # a larger label, where nothing else tells the number of classes, is a mistake and fills the memory


def read_predictions(path: str | Path, *need: str, counts: str = "", multi_label: bool = False,
                     with_logits: bool = False) -> dict:
    """One <set>.npz, checked: {"path", "n_classes", "labels", ...}; rows without a label are left out.

    need: arrays it must have, where logits do for `predictions`; logits are read only for these two, or with_logits,
    where there are any. counts: a file that takes the place of class_counts. multi_label: labels may be [N, C] of 1, 0
    and -1 (difficult).
    Raises: SystemExit for a missing array, widths that differ, values that are not finite, labels out of range,
        negative counts.
    """
    unread = () if {"logits", "predictions"} & {*need} or with_logits else ("logits",)
    data = read_npz(path, tuple(key for key in ROW_KEYS + CLASS_KEYS if key not in unread))
    if counts:
        data["class_counts"] = read_counts(counts, data.get("class_names"))
    frequencies = data.get("class_counts", np.ones(1))  # the scripts write zeros where they are not known
    unknown = {"class_counts"} if frequencies.dtype.kind in "fiu" and not frequencies.any() else set()
    missing = {*need, "labels"} - (set(data) - unknown) - ({"predictions"} if "logits" in data else set())
    refuse(missing, f"{path}: no array {', '.join(sorted(missing))}; found "
           f"{', '.join(sorted(set(data) - unknown)) or 'nothing'}"
           f"{'; --counts names a table of them' if 'class_counts' in missing else ''}")
    labels = data["labels"]
    is_multi = multi_label and labels.ndim == 2
    for name, (what, kinds, n_dims) in ARRAYS.items():
        array, n_dims = data.get(name), n_dims + (is_multi and name == "labels")
        if array is not None and (array.dtype.kind not in kinds or array.ndim != n_dims or 0 in array.shape[1:]):
            raise SystemExit(f"{path}: {name} is {array.dtype} {array.shape}, expected {what} "
                             f"{'[N]' if n_dims == 1 else '[N, width]'}")
        if array is not None and what == "numbers":
            check_finite_rows(path, name, array)
    refuse(not len(labels) or labels.max() < 0 and not is_multi, f"{path}: no labelled rows")
    if is_multi and not np.isin(labels, (-1, 0, 1)).all():
        raise SystemExit(f"{path}: labels [N, C] are 1, 0 or -1 (difficult), got {labels.min()} to {labels.max()}")
    for name in (name for name in ROW_KEYS if name in data):
        n = (*data[name].shape, "no")[0]
        refuse(n != len(labels), f"{path}: {len(labels)} labels, {n} {name}")
    widths = {name: len(data[name]) for name in CLASS_KEYS if name in data}
    widths |= {name: data[name].shape[1] for name in ("logits", "labels") if name in data and data[name].ndim == 2}
    is_table = counts and len({n for name, n in widths.items() if name != "class_counts"}) == 1  # the file agrees
    refuse(len(set(widths.values())) > 1, f"{counts if is_table else path}: numbers of classes differ: {widths}")
    ids = {name: data[name] for name in ("labels", "predictions") if name in data and not is_multi}
    n_classes = next(iter(widths.values()), min(max((int(v.max()) + 1 for v in ids.values()), default=0), MAX_CLASSES))
    for name, values in ids.items():
        wrong = (values >= n_classes) | ((values < 0) & (name == "predictions"))
        refuse(wrong.any(), f"{path}: row {wrong.argmax()} has {name[:-1]} {values[wrong.argmax()]}, there are "
               f"{n_classes} classes{counts and f' in {counts}'}")
    refuse(frequencies.min() < 0, f"{path}: class_counts has {frequencies.min()}")
    if frequencies.dtype.kind == "u":  # of which minus is no minus
        data["class_counts"] = frequencies.astype(np.int64)
    for name in unknown:
        del data[name]
    if labels.min() < 0 and not is_multi:
        data = with_rows(data, labels >= 0)
    return data | {"path": str(path), "n_classes": n_classes, "labels": data["labels"].astype(np.int64)}


def predict(data: dict) -> tuple[np.ndarray, int]:
    """Predicted classes [N], and how many rows have a tie for the first place that float16 made.

    Ties go to the class whose prototype is nearest to the features, where the file has both; else to the lowest id.
    """
    if "predictions" in data:
        return data["predictions"].astype(np.int64), 0
    predictions, n_ties = np.empty(len(data["logits"]), np.int64), 0
    can_break = {"features", "prototypes"} <= data.keys() and data["features"].shape[1] == data["prototypes"].shape[1]
    prototypes = unit_rows(data["prototypes"]) if can_break else None
    for start in range(0, len(predictions), 8192):
        logits = data["logits"][start : start + 8192].astype(np.float32)
        predictions[start : start + 8192] = logits.argmax(1)
        is_best = logits == logits.max(1, keepdims=True)
        tied = np.flatnonzero(is_best.sum(1) > 1)
        n_ties += len(tied)
        if can_break and len(tied):
            cosine = unit_rows(data["features"][start + tied]) @ prototypes.T
            predictions[start + tied] = np.where(is_best[tied], cosine, -np.inf).argmax(1)
    return predictions, n_ties


def with_rows(data: dict, rows: np.ndarray) -> dict:
    """The same file of predictions with these rows alone."""
    return {key: value[rows] if key in ROW_KEYS else value for key, value in data.items()}


def share_rows(a: np.ndarray, b: np.ndarray) -> bool:
    """Whether half of the distinct rows of a, in any order and as float16, are rows of b too: the same images."""
    with np.errstate(over="ignore"):
        a, b = ({hash(row.astype(np.float16).tobytes()) for row in side} for side in (a, b))
    return 2 * len(a & b) >= len(a) > 1


def accuracy_of(data: dict) -> tuple[float, int]:
    """Top-1 accuracy and the number of images."""
    return float((predict(data)[0] == data["labels"]).mean()), len(data["labels"])


def unit_rows(array: np.ndarray) -> np.ndarray:
    """Rows divided by their length, in float64; zero rows stay zero."""
    array = np.asarray(array, np.float64)
    return array / np.maximum(np.linalg.norm(array, axis=1, keepdims=True), 1e-12)


def ratio(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """a / b; NaN where both are 0, as for a class without images."""
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.asarray(a) / b


def read_records(path: str | Path) -> list[dict[str, str]]:
    """Rows of a CSV, TSV or JSON table (a list of objects, {model: object} or {class: count}) as dicts of text."""
    with reading(path, " as a table"):
        if Path(path).suffix == ".json":
            rows = json.loads(Path(path).read_text("utf-8"))
            if not isinstance(rows, list):
                rows = [v | {"model": k} if isinstance(v, dict) else {"class": k, "count": v} for k, v in rows.items()]
            return [{k: str(v) for k, v in row.items() if v is not None} for row in rows]
        with open(path, encoding="utf-8-sig", newline="") as file:
            options = {} if Path(path).suffix == ".csv" else {"delimiter": "\t", "quoting": csv.QUOTE_NONE}
            reader = csv.DictReader(file, **options)
            rows, names = list(reader), reader.fieldnames or []
    refuse(len(set(names)) < len(names), f"{path}: two columns of the same name: {', '.join(names)}")
    for i, row in enumerate(rows):
        refuse(None in row or None in row.values(), f"{path}:{i + 2}: the row and the header have other lengths")
    return rows


def number(text: str, where: str, low: float = -math.inf, high: float = math.inf) -> float:
    """A finite number from `low` to `high`, or SystemExit that says where."""
    with contextlib.suppress(ValueError, TypeError, OverflowError):
        if low <= float(text) <= high and math.isfinite(float(text)):
            return float(text)
    least, most = f" of at least {low:g}" * (low > -math.inf), f", at most {high:g}" * (high < math.inf)
    raise SystemExit(f"{where}: got {text!r}, expected a number{least}{most}")


def read_named_counts(path: str | Path) -> tuple[dict[str, float], bool]:
    """{class: count} of a table with columns class (or name, label) and count (or freq, frequency, n), or of a JSON
    object, or of lines with one number each (the classes are 0, 1, ...); and whether it is such lines."""
    with reading(path, ""):
        lines = [line.strip() for line in Path(path).read_text("utf-8-sig").split("\n") if line.strip()]
    is_lines = Path(path).suffix != ".json" and bool(lines and re.fullmatch(r"[-\d.eE+]+", lines[0]))
    rows = [{"class": str(i), "count": line} for i, line in enumerate(lines)] if is_lines else read_records(path)
    columns, counts = list(rows[0]) if rows else [], {}
    key = next((c for c in ("class", "name", "label", "model") if c in columns), None)
    value = next((c for c in ("count", "freq", "frequency", "n") if c in columns), None)
    if key is None or value is None:
        raise SystemExit(f"{path}: found columns {columns}, expected class and count, or one number a line")
    for i, row in enumerate(rows, 1 if is_lines else 2):
        refuse(row.get(key) in counts, f"{path}:{i}: {row.get(key)} twice")
        counts[row.get(key)] = number(row.get(value), f"{path}:{i}", 0)
    return counts, is_lines


def read_counts(path: str | Path, class_names: np.ndarray | None, n_classes: int = 0) -> np.ndarray:
    """[C] training frequencies: by class name, else by id (0, 1, ...), else, of predictions without names, by place,
    which is told. Not all are 0; n_classes, if not 0, is how many there must be."""
    named, is_lines = read_named_counts(path)
    names = [] if class_names is None else list(map(str, class_names.tolist()))
    if set(named) & set(names) and not is_lines:  # lines without names go by place, whatever names say
        missing = [name for name in names if name not in named]
        refuse(missing, f"{path}: no count for {len(missing)} classes: {', '.join(missing[:5])}")
        order = names
    elif set(named) == {str(i) for i in range(len(named))}:
        order = [str(i) for i in range(len(named))]
    else:
        order = list(named)
        refuse(names, f"{path}: its classes ({', '.join(order[:3])}) are none of {', '.join(names[:3])}")
        print(f"{path}: its classes ({', '.join(order[:3])}) are taken by place, as there are no class_names beside "
              "the predictions", file=sys.stderr)
    counts = np.array([named[name] for name in order])
    refuse(not counts.any(), f"{path}: all counts are 0")
    refuse(n_classes and len(counts) != n_classes, f"{path}: {len(counts)} counts, expected {n_classes}")
    return counts


def read_subset(path: str | Path, class_names: np.ndarray | None, n_classes: int) -> tuple[np.ndarray, np.ndarray]:
    """Classes of a file (id or name, perhaps a tab and a group): ids [S] ascending, group of each [S] in 0..G-1."""
    names = [] if class_names is None else [str(name) for name in class_names.tolist()]
    place = {name: i for i, name in enumerate(names)}
    with reading(path, ""):
        lines = [line.split("\t") for line in Path(path).read_text("utf-8-sig").split("\n") if line.strip()]
    group_of = {}
    for i, fields in enumerate(lines):
        name = fields[0].strip()
        c = place.get(name, int(name) if name.isdecimal() and len(name) < 10 else -1)
        if not 0 <= c < n_classes or names.count(name) > 1:
            raise SystemExit(f"{path}:{i + 1}: {names.count(name) or 'no'} class {name!r} among {n_classes}")
        group = fields[1] if len(fields) > 1 else c
        refuse(group_of.setdefault(c, group) != group, f"{path}:{i + 1}: class {name!r} is in two groups")
    refuse(not group_of, f"{path}: no classes")
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
    refuse(not keep.any(), f"{data['path']}: no image of the {len(ids)} classes")
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
    with reading(path, ""):
        content = json.loads(path.read_text("utf-8")) if path.is_file() else {}
    refuse(not isinstance(content, dict), f"{path}: expected an object, got a {type(content).__name__}")
    return content


def read_metrics(folder: Path) -> dict[str, dict]:
    """{test set: {metric: number, or dict of numbers}} of a run's metrics.json: what is known here and not null."""
    path, sets = folder / "metrics.json", {}
    for name, entry in read_json(path).items():
        refuse(not isinstance(entry, dict | None), f"{path}: {name} is {entry}, expected an object")
        found = {}
        for key in ("n", "chance", *REPORT_KEYS, "retrieval", "knn", "probe") if entry and name != "run" else ():
            value, where = entry.get(key), f"{path}: {name}: {key}"
            if value is not None and key == "retrieval":
                refuse(not isinstance(value, dict), f"{where}: expected an object")
                found[key] = {k: number(v, where, 0, 1) for k, v in value.items() if v is not None}
            elif value is not None and key == "n":
                found[key] = int(number(value, where, 1, 1e12))
            elif value is not None:
                found[key] = number(value, where, -1 if key.startswith("spearman") else 0, 1)
        sets |= {name: found} if found else {}
    return sets


# ------------------------------------------------------------------------------ estimates


def estimate(value: float | None, draws: np.ndarray | None = None, level: float = 0.95,
             biased_up_to: float | None = None) -> dict[str, float | None]:
    """{"value", "low", "high"}: percentile interval of the draws; draws that are not finite are left out.

    biased_up_to: the largest value of a number from 0 on that resampling itself raises or lowers (Gini, ECE, mean of
    the worst k, standard deviation): the basic bootstrap interval, percentiles reflected at the value, which takes that
    bias off; it holds the value and stays in the range.
    """
    value = None if value is None or not math.isfinite(value) else float(value)
    draws = np.asarray([] if draws is None else draws, float)
    draws = draws[np.isfinite(draws)]
    if value is None or not len(draws):
        return {"value": value, "low": None, "high": None}
    low, high = np.quantile(draws, [(1 - level) / 2, (1 + level) / 2])
    if biased_up_to is not None:
        low, high = max(0.0, min(2 * value - high, value)), min(biased_up_to, max(2 * value - low, value))
    return {"value": value, "low": float(low), "high": float(high)}


def from_draws(draws: np.ndarray, level: float = 0.95, biased_up_to: float | None = None,
               n_images: int = 0) -> dict[str, float | None]:
    """Estimate from [1 + boot] values: the first is the sample's, the others are its resamples'.

    n_images: of a share of so many that is 0 or 1, which no resample changes, the exact interval is taken.
    """
    if n_images and len(draws) > 1 and draws[0] in (0, 1) and np.ptp(draws) == 0:
        return clopper_pearson(draws[0], n_images)
    return estimate(draws[0], draws[1:], level, biased_up_to)


def t_interval(values: list[float], least: float = -math.inf, most: float = math.inf) -> dict[str, float | None]:
    """Mean over runs with its 95 % t-interval, cut to possible values; None for the ends of a single run."""
    values = np.asarray([v for v in values if v is not None], float)
    if len(values) < 2:
        return estimate(values[0] if len(values) else None)
    half = student_t.ppf(0.975, len(values) - 1) * values.std(ddof=1) / math.sqrt(len(values))
    low, high = max(least, values.mean() - half), min(most, values.mean() + half)
    return {"value": float(values.mean()), "low": float(low), "high": float(high)}


def over_runs(cells: list[dict], metric: str) -> dict[str, float | None]:
    """Of several runs the mean with its t-interval, of a single one its own estimate."""
    least = -1 if metric.startswith("spearman") else 0
    return cells[0] if len(cells) == 1 else t_interval([cell["value"] for cell in cells], least, 1)


def normal_std(values: list[float]) -> dict[str, float | None]:
    """Standard deviation over two or more runs, with the 95 % interval it has if they are normal."""
    std, n = float(np.std(values, ddof=1)), len(values) - 1
    return {"value": std} | {end: std * math.sqrt(n / chi2.ppf(q, n)) for end, q in (("low", 0.975), ("high", 0.025))}


def binomial_interval(k: np.ndarray, n: np.ndarray) -> np.ndarray:
    """[..., 2] exact 95 % interval (Clopper and Pearson) of a fraction that was k of n; NaN where n is 0 or k NaN."""
    low = np.where(np.asarray(k) > 0, beta.ppf(0.025, k, n - k + 1), 0)
    high = np.where(np.asarray(k) < n, beta.ppf(0.975, k + 1, n - k), 1)
    is_known = (np.asarray(n) > 0) & np.isfinite(k)
    return np.where(is_known[..., None], np.stack([low, high], axis=-1), np.nan)


def clopper_pearson(accuracy: float, n: float) -> dict[str, float | None]:
    """Exact 95 % interval of a fraction of n images; None for the ends when n is not known (NaN)."""
    if not math.isfinite(n) or n < 1:
        return estimate(accuracy)
    low, high = binomial_interval(round(accuracy * n), n)
    return {"value": float(accuracy), "low": float(low), "high": float(high)}


def bootstrap(values: np.ndarray, boot: int, rng: np.random.Generator,
              of: Callable = lambda resampled: resampled.mean(1)) -> np.ndarray:
    """[boot, ...] of([block, n, ...] resampled values), their mean; in blocks, so memory does not grow with boot."""
    step, n = max(1, 2**24 // max(1, values.size)), len(values)
    blocks = [of(values[rng.integers(n, size=(min(step, boot - i), n))]) for i in range(0, boot, step)]
    return np.concatenate(blocks or [np.zeros((0, *values.shape[1:]))])


def t_quantile(variance: np.ndarray, spread: np.ndarray) -> np.ndarray:
    """97.5 % quantile of Student's t for an estimated variance that itself varies by `spread` (Satterthwaite)."""
    return student_t.ppf(0.975, 2 / np.clip(spread / variance**2, 1e-9, 2))


def mean_of(cells: list[dict]) -> dict[str, float | None]:
    """Mean of independent estimates; distances to their ends add up in squares (Zou and Donner, 2008)."""
    value, low, high = (np.array([c[key] for c in cells], float) for key in ("value", "low", "high"))
    ends = value.mean() + np.array([-1, 1]) * np.linalg.norm([low - value, high - value], axis=1) / len(cells)
    return estimate(value.mean()) if np.isnan(ends).any() else {
        "value": float(value.mean()), "low": float(ends[0]), "high": float(ends[1])}


def mean_over(values: np.ndarray, boot: int, rng: np.random.Generator) -> dict[str, float | None]:
    """Mean of the finite values, with the interval of resampling them, of one none; booleans may be all alike."""
    values = values[np.isfinite(values)]
    if not len(values) or len(values) == 1 and values.dtype != bool:
        return estimate(values[0] if len(values) else None)
    return from_draws(np.r_[values.mean(), bootstrap(values, boot, rng)],
                      n_images=len(values) if values.dtype == bool else 0)


def std_over(values: np.ndarray, boot: int, rng: np.random.Generator) -> dict[str, float | None]:
    """Standard deviation of the finite values, with the interval of resampling them, of one none."""
    values = values[np.isfinite(values)]
    draws = bootstrap(values, boot, rng, lambda v: v.std(1)) if len(values) > 1 else None
    return estimate(values.std() if len(values) else None, draws, biased_up_to=math.inf)


def jackknife(rows: np.ndarray, statistic: Callable[[np.ndarray], float], rng: np.random.Generator) -> dict:
    """A number of rows [n, D] that copies of a row would bend (a rank, a length), with the 95 % normal interval of the
    delete-a-group jackknife: at most 100 random groups of rows, each left out once."""
    groups = np.array_split(rng.permutation(len(rows)), min(100, len(rows)))
    draws = np.array([statistic(np.delete(rows, group, 0)) for group in groups])
    value, half = statistic(rows), 1.96 * math.sqrt(len(groups) - 1) * float(draws.std())
    if not math.isfinite(half):  # of too few rows, or all alike
        return estimate(value)
    return {"value": value, "low": max(0.0, value - half), "high": value + half}


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
    return ratio((x * y).sum(1), np.sqrt((x**2).sum(1) * (y**2).sum(1)))


def spearman(x: np.ndarray, y: np.ndarray, boot: int, rng: np.random.Generator) -> dict[str, float | None]:
    """Spearman's correlation over classes, with the interval of resampling classes; pairs with a NaN are left out.

    Resamples in which one side is constant have none: they are left out of the interval and counted as `dropped`. All
    others of two classes are alike: these have no interval.
    """
    pairs = np.stack([x, y], 1)
    pairs = pairs[np.isfinite(pairs).all(1)]
    draws = bootstrap(pairs, boot, rng, lambda v: rank_correlations(*np.moveaxis(v, 2, 0))) if len(pairs) > 2 else None
    found = estimate(rank_correlation(*pairs.T), draws)
    dropped = 0 if found["low"] is None else int((~np.isfinite(draws)).sum())
    return found | ({"dropped": dropped} if dropped else {})


def gini(values: np.ndarray) -> np.ndarray:
    """Gini index over the last axis; 0 is equal shares, NaN if all are 0."""
    values = np.sort(np.asarray(values, float), axis=-1)
    n = values.shape[-1]
    return ratio((values * (2 * np.arange(1, n + 1) - n - 1)).sum(-1), n * values.sum(-1))


# ------------------------------------------------------------------------------ imbalance


def resamples(labels: np.ndarray, boot: int, rng: np.random.Generator) -> Iterator:
    """Index of all images, then boot resamples within classes: a test set has a fixed number of each."""
    order = np.argsort(labels, kind="stable")
    first, n_of = np.searchsorted(labels[order], labels[order]), np.bincount(labels)[labels[order]]
    yield slice(None)
    for _ in range(boot):
        yield order[first + (rng.random(len(labels)) * n_of).astype(int)]


def resample_images(labels: np.ndarray, predictions: np.ndarray, n_classes: int, boot: int,
                    rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Number of images of each class [C], of its right ones and of its predictions, both [1 + boot, C]: of the images,
    then of resamples of them within classes."""
    n_right, n_predicted = (np.empty((1 + boot, n_classes), np.int32) for _ in range(2))
    cell = np.where(labels == predictions, labels, n_classes)
    for b, index in enumerate(resamples(labels, boot, rng)):
        n_right[b] = np.bincount(cell[index], minlength=n_classes + 1)[:n_classes]
        n_predicted[b] = np.bincount(predictions[index], minlength=n_classes)
    return np.bincount(labels, minlength=n_classes), n_right, n_predicted


def class_mean(per_class: np.ndarray, n_test: np.ndarray) -> np.ndarray:
    """[1 + boot]: mean over classes of [1 + boot, C] values of the images, then of resamples of them within classes.

    n_test: [C]; classes without images are left out. A resample of n images varies by (n - 1) / n of what n new images
    would: deviations are widened by the root of n / (n - 1). A class of a single image does not vary at all: it is
    given the mean variance of an image of the others. If no class varies and not all are alike (a model that has
    collapsed), NaN: no interval. A sum of few variances is uncertain itself: deviations are widened by the t quantile
    at the degrees of freedom that the variances' spread over classes tells (Satterthwaite). Of classes with 2 to 5
    images, 95 % intervals cover 93 to 95 % (simulated).
    """
    has = n_test > 0
    if not has.any():
        return np.full(len(per_class), np.nan)
    draws, n, several = per_class[:, has], n_test[has], n_test[has] > 1
    deviation = (draws[1:] - draws[:1])[:, several] * np.sqrt(n[several] / (n[several] - 1))
    total = deviation.sum(1)
    variance = deviation.var(0) if len(deviation) else np.zeros(0)
    if variance.any():
        total *= math.sqrt(1 + (~several).sum() * (variance @ n[several]) / several.sum() / variance.sum())
        spread = variance.var() * len(variance) ** 2 / max(1, len(variance) - 1)
        total *= t_quantile(variance.sum(), spread) / norm.ppf(0.975)
    elif np.ptp(draws[0]):
        total = np.full_like(total, np.nan)
    return np.r_[draws[0].mean(), draws[0].mean() + total / len(n)]


def class_accuracy(labels: np.ndarray, right: np.ndarray, n_classes: int) -> np.ndarray:
    """[C] share of the images of each class that are right [N] bool; NaN without images."""
    return ratio(np.bincount(labels[right], minlength=n_classes), np.bincount(labels, minlength=n_classes))


def thirds(class_counts: np.ndarray) -> dict[str, np.ndarray]:
    """Class ids of head, medium and tail, by falling frequency (ties by id): C // 3, C // 3 and the rest."""
    order, C = np.argsort(-class_counts, kind="stable"), len(class_counts)
    return dict(zip(("head", "medium", "tail"), np.split(order, [C // 3, 2 * (C // 3)])))


def class_groups(class_counts: np.ndarray, cuts: tuple[int, int], tail_classes: int) -> dict[str, np.ndarray]:
    """Class ids: thirds by frequency; by counts; those never seen; the rarest and the others."""
    high, low = cuts
    groups = thirds(class_counts) | {
        f"many >{high}": np.flatnonzero(class_counts > high),
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
        out.append({"bin": int(i), "n_classes": int(inside.sum()), "count": float(class_counts[inside].mean())})
        for key, values in (("accuracy", accuracy[inside]), ("predictions", share[inside])):
            out[-1] |= {key: mean_over(values, boot, rng), f"{key}_std": std_over(values, boot, rng)}
    return out


def score_classes(data: dict, cuts: tuple[int, int], tail_classes: int, worst: int, boot: int,
                  seed: int) -> tuple[dict, dict[str, np.ndarray]]:
    """All imbalance numbers of one model, {name: estimate}; of each class its accuracy (NaN: no test image) and number
    of predictions [C], and the 95 % intervals of both, [C, 2]."""
    rng, labels, counts = np.random.default_rng(seed), data["labels"], data["class_counts"]
    predictions, n_ties = predict(data)
    test, right, predicted = resample_images(labels, predictions, data["n_classes"], boot, rng)
    draws = ratio(right, test)  # [1 + boot, C]
    accuracy, n_predicted = draws[0], predicted[0]
    row = {"n": len(labels), "top1": mean_over(labels == predictions, boot, rng),
           "balanced": from_draws(class_mean(draws, test).clip(0, 1), n_images=len(labels))}
    for name, ids in class_groups(counts, cuts, tail_classes).items():
        n = test[ids]
        row |= {name: from_draws(class_mean(draws[:, ids], n).clip(0, 1), n_images=n.sum())} if len(ids) else {}
    k = min(worst, int(np.isfinite(accuracy).sum()))
    worst_k = np.sort(draws, 1)[:, :k].mean(1)  # NaN sort last
    return row | {
        f"worst {k}": estimate(worst_k[0], worst_k[1:] if np.ptp(worst_k) else None, biased_up_to=1),
        "never right": mean_over((right[0] == 0)[test > 0], boot, rng),
        "spearman_acc": spearman(counts, accuracy, boot, rng),
        "spearman_pred": spearman(counts, n_predicted, boot, rng),
        "spearman_acc_pred": spearman(accuracy, n_predicted.astype(float), boot, rng),
        "gini_counts": estimate(gini(counts), bootstrap(counts, boot, rng, gini), biased_up_to=1),
        "gini_pred": from_draws(gini(predicted), biased_up_to=1),
        "chance": 1 / data["n_classes"], "classes without test images": int((test == 0).sum()), "ties": n_ties,
    }, {"accuracy": accuracy, "accuracy_interval": binomial_interval(right[0], test), "predictions": n_predicted,
        "predictions_interval": (np.quantile(predicted[1:], [0.025, 0.975], axis=0).T if boot else
                                 np.full((data["n_classes"], 2), np.nan))}


def imbalance(paths: list[str], counts: str, subset: str, cuts: tuple[int, int], tail_classes: int, worst: int,
              n_bins: int, is_equal_count: bool, boot: int, seed: int) -> dict:
    """Rows of all models, their classes and frequency bins, and the bins' mean and std over models."""
    rows, models = {}, {}
    for name, path in zip(short_names(paths), paths):
        data = read_predictions(path, "logits" if subset else "predictions", "class_counts", counts=counts)
        if subset:
            data = restrict(data, *read_subset(subset, data.get("class_names"), data["n_classes"]))
        rows[name], classes = score_classes(data, cuts, tail_classes, worst, boot, seed)
        class_counts, n_test = data["class_counts"], np.bincount(data["labels"], minlength=data["n_classes"])
        share = np.where(n_test > 0, ratio(classes["predictions"], n_test), np.nan)
        bins = frequency_bins(class_counts, n_bins, is_equal_count)
        models[name] = {"class_names": data.get("class_names", np.arange(data["n_classes"]).astype(str)),
                        "class_counts": class_counts, "predictions_per_image": share,
                        "predictions_per_image_interval": ratio(classes["predictions_interval"], n_test[:, None]),
                        "rarest": np.argsort(class_counts, kind="stable")[:tail_classes],
                        "bins": binned_statistics(bins, class_counts, classes["accuracy"], share, boot,
                                                  np.random.default_rng(seed))} | classes
    over = []
    if len(models) > 1 and len({tuple(m["class_counts"]) for m in models.values()}) == 1:
        for same in zip(*(m["bins"] for m in models.values())):
            over.append({"count": same[0]["count"]})
            for key, most in (("accuracy", 1), ("predictions", math.inf)):
                values = [b[key]["value"] for b in same]  # nothing where a model has no test image
                over[-1] |= {key: t_interval(values, 0, most), f"{key}_std": normal_std(values)} \
                    if None not in values else {key: estimate(None), f"{key}_std": estimate(None)}
    elif len(models) > 1:
        print("imbalance: no bins_over_models, as the models' class_counts differ", file=sys.stderr)
    return {"rows": rows, "models": models, "bins_over_models": over}


def plot_imbalance(results: dict, path: str) -> None:
    """Accuracy, and predictions per test image, against frequency: classes (one model) and frequency bins, with
    the means over models as a thick line; bars of each of the rarest classes (figure 9b)."""
    models = results["models"]
    figure, axes = new_figure(4 if any(model["rarest"] for model in models.values()) else 2)
    for i, (name, model) in enumerate(models.items()):
        bins, width = model["bins"], 0.8 / len(models)
        x = np.maximum([b["count"] for b in bins], 0.5) * 1.03**i
        for axis, key, of_class in zip(axes, ("accuracy", "predictions"), ("accuracy", "predictions_per_image")):
            if len(models) == 1:
                axis.scatter(np.maximum(model["class_counts"], 0.5), np.array(model[of_class], float), s=8, color="0.6",
                             linewidths=0, label="class")
            mean, std = ([value_of(b[key + end]) for b in bins] for end in ("", "_std"))
            axis.errorbar(x, mean, std, label=name if len(models) > 1 else "bin: mean, std of classes", **line_style(i))
        for axis, key in zip(axes[2:], ("accuracy", "predictions")):
            cells = [dict(zip(("value", "low", "high"), (model[key][c], *model[f"{key}_interval"][c])))
                     for c in model["rarest"]]
            axis.bar(np.arange(len(cells)) + i * width, [value_of(c) for c in cells], width, yerr=error_bars(cells),
                     color=COLORS[i % len(COLORS)], hatch=("", "///", "...", "xx")[i % 4], edgecolor="white",
                     label=name, error_kw={"elinewidth": 0.6, "ecolor": "0.55"})
            axis.set(xlabel="rarest classes, rarest first", ylabel=key, xticks=[], ymargin=0.25)  # room for a legend
    over = results.get("bins_over_models", [])
    for axis, key in zip(axes if over else (), ("accuracy", "predictions")):
        axis.plot(np.maximum([b["count"] for b in over], 0.5), [value_of(b[key]) for b in over], color="0.3",
                  linewidth=4, alpha=0.4, label="mean of the models")
    for axis, title in zip(axes, ("accuracy", "predictions / test images")):
        axis.set(xscale="log", xlabel="training images of the class (0.5: none)", ylabel=title, ylim=(0, None))
    axes[1].axhline(1, **GUIDE)
    save_figure(figure, path, axes[0], *axes[2:3])


# ------------------------------------------------------------------------------ compare


def compare(paths_a: list[str], paths_b: list[str], counts: str, boot: int, seed: int) -> dict:
    """Two models on the same images, several seeds each: A, B, the difference B - A with its paired interval.

    Accuracies: the same images are resampled for both, within classes where classes weigh equally. Correlations: the
    same classes, with each file's own frequencies; head and tail are those of A's first file. `seeds` is the t-interval
    of the difference over pairs of runs, another source of chance. McNemar's exact test looks at the images that only
    one of a pair gets right.
    """
    rng = np.random.default_rng(seed)
    refuse(len(paths_a) != len(paths_b), f"A has {len(paths_a)} seeds, B {len(paths_b)}: seeds are compared in pairs")
    sides = [[read_predictions(path, "predictions", counts=counts) for path in paths] for paths in (paths_a, paths_b)]
    first = sides[0][0]
    for data in sides[0] + sides[1]:
        check_same(first, data)
    labels, C = first["labels"], first["n_classes"]
    class_counts = first.get("class_counts", np.zeros(C))
    predictions = [[predict(data)[0] for data in side] for side in sides]
    right = [np.array([p == labels for p in side]) for side in predictions]  # [runs, N] of A and of B
    gain, n_test = right[1].mean(0) - right[0].mean(0), np.bincount(labels, minlength=C)  # [N], [C]
    per_class = np.array([ratio(np.bincount(labels[i], gain[i], C), n_test) for i in resamples(labels, boot, rng)])
    draws = {"top1": bootstrap(gain, boot, rng), "balanced": class_mean(per_class, n_test)[1:]}
    if "class_counts" in first:  # else there is no tail
        draws |= {k: class_mean(per_class[:, ids], n_test[ids])[1:] for k, ids in thirds(class_counts).items()}
    own = [[data.get("class_counts") for data in side] for side in sides]
    if all(n is not None for n in own[0] + own[1]):
        for key, of, among in (("spearman_acc", lambda p: class_accuracy(labels, p == labels, C), n_test.nonzero()[0]),
                               ("spearman_pred", lambda p: np.bincount(p, minlength=C), np.arange(C))):
            classes = among[rng.integers(len(among), size=(boot, len(among)))]
            means = [np.mean([rank_correlations(n[classes], of(p)[classes]) for n, p in zip(*side)], 0)
                     for side in zip(own, predictions)]
            draws[key] = means[1] - means[0]
    score = lambda data, n: score_classes(data | {"class_counts": n}, (100, 20), 0, 10, boot, seed)[0]  # noqa: E731
    scores = [[score(data, class_counts) for data in side] for side in sides]  # head and tail by A's frequencies
    for data, row in zip(sides[0] + sides[1], scores[0] + scores[1]):
        n = data.get("class_counts", class_counts)
        if not np.array_equal(n, class_counts):
            row |= {k: v for k, v in score(data, n).items() if k.startswith("spearman")}
    rows, mcnemar = {}, {}
    for key, draw in draws.items():
        cells = [[score.get(key, estimate(None)) for score in side] for side in scores]
        a, b = ([c["value"] for c in side] for side in cells)
        is_known = None not in a + b
        rows[key] = {"A": over_runs(cells[0], key), "B": over_runs(cells[1], key),
                     "B - A": estimate(np.mean(b) - np.mean(a) if is_known else None, draw),
                     "seeds": t_interval([y - x for x, y in zip(a, b)] if is_known else [])}
    for i, (x, y) in enumerate(zip(*right)):
        only_a, only_b = int((x & ~y).sum()), int((y & ~x).sum())
        p = binomtest(min(only_a, only_b), only_a + only_b).pvalue if only_a + only_b else 1.0
        mcnemar[f"pair {i}"] = {"only A right": only_a, "only B right": only_b, "p": float(p)}
    return {"rows": rows, "mcnemar": mcnemar}


def check_same(a: dict, b: dict, what: str = "images", keys: tuple = ("rows", "labels", "n_classes")) -> None:
    """SystemExit if two files of predictions both have one of these, and not the same."""
    for key in keys:
        if key in a and key in b and not np.array_equal(a[key], b[key]):
            raise SystemExit(f"{b['path']} and {a['path']} are not of the same {what}: their {key} differ")


def plot_compare(results: dict, path: str) -> None:
    """B - A of every metric, with its interval."""
    cells = {name: row["B - A"] for name, row in results["rows"].items() if row["B - A"]["value"] is not None}
    figure, (axis,) = new_figure(1)
    interval_panel(axis, list(cells), {"B - A": list(cells.values())}, "B - A (fractions, correlations)")
    save_figure(figure, path)


# ------------------------------------------------------------------------------ robustness


def split_name(text: str) -> tuple[str, str]:
    """("a", "b") of a=b, ("", text) without an = or where the text as it is names a file or folder."""
    name, _, path = text.partition("=")
    return (name, path) if "=" in text and not Path(text).exists() else ("", text)


def has_predictions(path: Path, *arrays: str) -> bool:
    """Whether an .npz has labels, one an image, logits or predictions, and these arrays; sets of pairs lack them."""
    with reading(path, " as .npz"), np.load(path, allow_pickle=False) as file:
        names = set(file.files)
    labels = read_npz(path, ("labels",)).get("labels", np.zeros(0))
    return names >= {*arrays} and not names.isdisjoint(("logits", "predictions")) and labels.ndim == 1 and bool(
        labels.dtype.kind in "iu" and (labels >= 0).any())


def accuracy_pair(id_data: dict, data: dict, subset: str) -> tuple[float, int, float, int]:
    """Accuracy and number of images, in distribution and under shift, both among the classes that both sets have images
    of (the published accuracy under shift where the ID set has all of its classes), or those of `subset`."""
    if id_data["n_classes"] != data["n_classes"]:
        raise SystemExit(f"{data['path']} has {data['n_classes']} classes, {id_data['path']} {id_data['n_classes']}")
    ids = np.intersect1d(id_data["labels"], data["labels"])
    refuse(not len(ids) and not subset, f"{data['path']} and {id_data['path']} have no class in common")
    groups = np.arange(len(ids))
    if subset:
        ids, groups = read_subset(subset, id_data.get("class_names"), id_data["n_classes"])
    sides = [restrict(d, ids, groups) if subset or len(ids) < d["n_classes"] else d for d in (id_data, data)]
    return *accuracy_of(sides[0]), *accuracy_of(sides[1])


def models_of_run(folder: Path, group: str, id_set: str, shifts: list[str], subsets: dict[str, str],
                  n_of: dict[str, float]) -> dict:
    """One model of the robustness plot: {"model", "group", shift: (acc_id, n_id, acc, n)} from a run's folder."""
    told = read_json(folder / "args.json").get("args") or read_json(folder / "metrics.json").get("run")  # --eval-only
    name = group or str(told.get("data") or "runs" if isinstance(told, dict) else "runs")
    metrics, model = read_metrics(folder), {"model": str(folder), "group": name}
    id_path = folder / f"{id_set}.npz"
    other = {p.name.removesuffix("_test.npz") for p in folder.glob("transfer/*_test.npz")}  # worlds of other classes
    found, whole = sorted(({p.stem for p in folder.glob("*.npz")} | set(metrics)) - {id_set, "train"} - other), []
    id_data = read_predictions(id_path, "logits") if id_path.is_file() else None
    for shift in shifts or found:
        path = folder / f"{shift}.npz"
        if id_data is not None and path.is_file() and (shifts or has_predictions(path, "logits")):
            model[shift] = accuracy_pair(id_data, read_predictions(path, "logits"), subsets.get(shift, ""))
        elif all("top1" in metrics.get(s, {}) for s in (id_set, shift)):
            refuse(shift in subsets, f"{folder}: --subset {shift} needs {id_set}.npz and {shift}.npz")
            whole.append(shift)
            model[shift] = tuple(number for s in (id_set, shift)
                                 for number in (metrics[s]["top1"], metrics[s].get("n", n_of.get(s, math.nan))))
        elif path.is_file():
            print(f"{path}: left out, no labels and logits in it, or none in {id_set}.npz", file=sys.stderr)
    if whole:
        print(f"{folder}: {id_set} beside {', '.join(whole)} is over all classes (metrics.json)", file=sys.stderr)
    return model


def models_of_table(path: str, group: str, id_set: str, shifts: list[str], subsets: dict[str, str],
                    n_of: dict[str, float], beside: frozenset = frozenset()) -> list[dict]:
    """The same from a table; a column is in percent if a value is above 1; columns of both kinds are refused.

    beside: sets of which runs beside the table have arrays, and so accuracies over the classes of both sets.
    """
    rows, models = read_records(path), []
    columns = list(dict.fromkeys(column for row in rows for column in row))  # JSON may lack one in a row
    names = shifts or [c for c in columns if c not in ("", "model", "group", "average", id_set) and "@" not in c]
    wanted = [c for c in columns if c.split("@")[0] in (id_set, *names)]
    refuse(id_set not in columns or not names or not all("model" in row for row in rows),
           f"{path}: found columns {columns}, expected model, {id_set} and shifts; name them by --id and --shifts")
    matched = {s: f"{id_set}@{s}" if f"{id_set}@{s}" in columns else id_set for s in names}
    whole = [s for s in subsets if matched.get(s) == id_set]
    refuse(whole, f"--subset {', '.join(whole)}: {path} has accuracies, no images to choose from; give it a column "
           f"{id_set}@{whole[0] if whole else ''}")
    if whole := [s for s in names if matched[s] == id_set and {s, id_set} <= beside]:
        print(f"{path}: {id_set} beside {', '.join(whole)} is over all classes (no column {id_set}@{whole[0]})",
              file=sys.stderr)
    values = [{c: number(row[c], f"{path}:{i + 2}, {c}") for c in wanted if row.get(c, "") != ""}
              for i, row in enumerate(rows)]
    largest = {c: max((row[c] for row in values if c in row), default=0) for c in wanted}
    percent, fraction = (", ".join(c for c in wanted if a < largest[c] <= b) for a, b in ((1, math.inf), (0, 1)))
    scale = 100 if percent else 1
    refuse(percent and fraction, f"{path}: {percent} look like percent, {fraction} like fractions; write all as "
           "fractions, or name the test sets by --shifts")
    for i, (row, value) in enumerate(zip(rows, values)):
        model = {"model": row["model"], "group": group or row.get("group") or Path(path).stem}
        for shift in (s for s in names if s in value and matched[s] in value):
            acc_id, n_id = value[matched[shift]] / scale, n_of.get(matched[shift], np.nan)
            pair = (acc_id, n_id, value[shift] / scale, n_of.get(shift, np.nan))
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


def binomial_draws(p: np.ndarray, n: np.ndarray, u: np.ndarray) -> np.ndarray:
    """[1 + boot, ...]: accuracies p, then their binomial draws at quantiles u, of 0 and 1 those of (k + 1/2) / (n + 1);
    p again where n is not known (NaN)."""
    k = binom.ppf(u, np.nan_to_num(n), np.where((p <= 0) | (p >= 1), (p * n + 0.5) / (n + 1), p))
    return np.concatenate([p[None], np.where(np.isnan(n), p, k / np.maximum(n, 1))])


class Line:
    """A group's fit on the logit scale, in one piece or two; row 0 of all arrays is the fit, the others its resamples'.

    x, y: [m] log odds. split: log odds of x that part the pieces; inf is one piece. Each resample of models has at
    least two distinct x; pieces of fewer than three have no interval. level: that at which percentiles over m points,
    those of the smallest other piece, have the width of a t-interval with m - 2 degrees of freedom (expanded
    percentiles: Hesterberg, arXiv 1411.5279, section 5.3.1).
    """

    def __init__(self, x: np.ndarray, y: np.ndarray, split: float, boot: int, rng: np.random.Generator):
        self.split, n, index = split, len(x), rng.integers(len(x), size=(boot, len(x)))
        pieces = [x < split, x >= split] if math.isfinite(split) else [np.ones(n, bool)]
        self.sizes = [int(piece.sum()) for piece in pieces]
        m = min((size for size in self.sizes if size > 2), default=0)
        self.level = 1 - 2 * norm.cdf(-math.sqrt(m / (m - 2)) * student_t.ppf(0.975, m - 2)) if m else 0.95
        while np.ptp(x) > 0 and (constant := np.ptp(x[index], axis=1) == 0).any():
            index[constant] = rng.integers(n, size=(int(constant.sum()), n))
        index = np.concatenate([np.arange(n)[None], index])
        fits = np.stack([fit_lines(x[index], y[index], piece[index].astype(float)) for piece in pieces], -1)
        fits[:, 1:, np.array(self.sizes) < 3] = np.nan  # through two models every resample has the same line
        self.slope, self.intercept, self.r2 = fits  # [1 + boot, pieces] each

    def at(self, x: np.ndarray) -> np.ndarray:
        """Log odds [1 + boot, m] that the lines expect at x, [m] or [1 + boot, m]."""
        piece = np.broadcast_to((np.asarray(x) >= self.split).astype(int), (len(self.slope), np.shape(x)[-1]))
        return np.take_along_axis(self.slope, piece, 1) * x + np.take_along_axis(self.intercept, piece, 1)

    def estimates(self) -> list[dict]:
        """Slope, intercept and r2 of each piece, with intervals."""
        return [{"models": self.sizes[i]} | {name: from_draws(values[:, i], self.level) for name, values in zip(
            ("slope", "intercept", "r2"), (self.slope, self.intercept, self.r2))} for i in range(self.slope.shape[1])]


def effective_robustness(models: list[dict], shifts: list[str], baseline: str, before: str, splits: dict[str, float],
                         boot: int, seed: int) -> dict:
    """Accuracy of every model under every shift beyond the line of the baseline models.

    models: as models_of_run gives them, each with all shifts. rho = acc - sigmoid(slope * logit(acc_id) + intercept), a
    vertical distance, as a fraction, negative below the line. `average` is a shift of its own: accuracies averaged,
    then logit; `mean_rho` is the mean of rho.
    The interval of rho resamples models (the line) and images (binomial draws of both accuracies).
    Source: Taori et al., arXiv 2007.00644, sections 2 and 3; groups of one training source each: 2103.00020, figure 13.
    """
    rng = np.random.default_rng(seed)
    values = np.array([[m[s] for s in shifts] for m in models], float)  # [models, S, 4]
    acc_id, n_id, acc, n = np.moveaxis(values, -1, 0)  # each [models, S]
    acc_id = binomial_draws(acc_id, n_id, rng.random((boot, len(models), 1)))  # the shifts share the ID images
    acc = binomial_draws(acc, n, rng.random((boot, *acc.shape)))  # [1 + boot, models, S]
    # The average is one more shift, with the summed images as its n.
    acc_id, acc = (np.concatenate([v, v.mean(-1, keepdims=True)], -1) for v in (acc_id, acc))
    n_id, n = (np.concatenate([v, v.sum(-1, keepdims=True)], -1) for v in (n_id, n))
    x, y, names = safe_logit(acc_id, n_id), safe_logit(acc[0], n), [*shifts, "average"]
    groups = np.array([m["group"] for m in models])
    rows = {m["model"]: {"group": m["group"]} for m in models}
    fits, curves, rhos, levels = {}, {}, [], []
    for s, shift in enumerate(names):
        split = logit(splits[shift]) if shift in splits else math.inf
        lines = {g: Line(x[0, groups == g, s], y[groups == g, s], split if g == baseline else math.inf, boot,
                         np.random.default_rng(seed + 1))  # the same resamples of models for every shift
                 for g in dict.fromkeys(groups.tolist()) if g == baseline or (groups == g).sum() > 2}
        curves[shift], grid = {}, np.linspace(x[0, :, s].min() - 0.2, x[0, :, s].max() + 0.2, 60)
        for g, line in lines.items():
            for side, fit in zip(("",) if math.isinf(line.split) else (", left", ", right"), line.estimates()):
                fits[f"{shift}, {g}{side}"] = fit
            at, tail = line.at(grid), (1 - line.level) / 2
            curves[shift][g] = {"x": expit(grid), "y": expit(at[0])}
            has = np.isfinite(at[1:]).any(0)  # a piece of two models has no interval, of one no line
            known = at[1:][np.isfinite(at[1:, has]).all(1)]
            if has.any() and len(known):
                low, high = expit(np.quantile(known, [tail, 1 - tail], axis=0))
                curves[shift][g] |= {"low": low, "high": high}
        line, base = lines[baseline], x[0, groups == baseline, s]
        rhos.append(acc[:, :, s] - expit(line.at(x[:, :, s])))  # [1 + boot, models]
        levels.append(line.level)
        for i, row in enumerate(rows.values()):
            for key, a, m in ((f"{shift} id", acc_id[:, i, s], n_id[i, s]), (shift, acc[:, i, s], n[i, s])):
                row[key] = from_draws(a) if shift == "average" and m > 0 else clopper_pearson(a[0], m)
            row |= {f"{shift} rho": from_draws(rhos[-1][:, i], line.level),
                    f"{shift} extrapolated": bool(not base.min() <= x[0, i, s] <= base.max())}
    for i, row in enumerate(rows.values()):
        row["mean_rho"] = from_draws(np.mean([rho[:, i] for rho in rhos[:-1]], 0), max(levels[:-1]))
        for s, shift in enumerate(names if before else ()):
            b = list(rows).index(before)
            tau = acc[:, i, s] - acc[:, b, s]
            row[f"{shift} tau"] = from_draws(tau) if (n[[i, b], s] > 0).all() else estimate(tau[0])  # NaN: not known
    return {"baseline": baseline, "shifts": names, "rows": rows, "fits": fits, "curves": curves}


def robustness(inputs: list[str], id_set: str, shifts: list[str], baseline: str, before: str, subsets: dict[str, str],
               n_of: dict[str, float], splits: dict[str, float], boot: int, seed: int) -> dict:
    """Read tables and runs, leave out shifts that an input misses and then models that miss a shift, fit."""
    parts, beside = [], frozenset(p.stem for _, path in map(split_name, inputs) for p in Path(path).glob("*.npz"))
    for group, path in map(split_name, inputs):
        parts.append([models_of_run(Path(path), group, id_set, shifts, subsets, n_of)] if Path(path).is_dir() else
                     models_of_table(path, group, id_set, shifts, subsets, n_of, beside))
    models = [m for part in parts for m in part]
    found = list(dict.fromkeys(k for m in models for k in m if k not in ("model", "group")))
    shared = [s for s in found if all(any(s in m for m in part) for part in parts)]
    if not shifts and 0 < len(shared) < len(found):
        print(f"left out {', '.join(s for s in found if s not in shared)}: not in all inputs", file=sys.stderr)
    shifts = shifts or shared or found
    refuse("average" in shifts, "a test set called average: that is the name of the mean over the shifts here")
    kept = [m for m in models if all(s in m for s in shifts)]
    for m in models:
        if missing := ", ".join(s for s in shifts if s not in m):
            print(f"left out {m['model']}: no accuracy on {missing}, or none on {id_set} beside", file=sys.stderr)
    names = [m["model"] for m in kept]
    refuse(not kept or not shifts or len(set(names)) < len(names),
           f"{len(models)} models, {len(kept)} of them with {id_set} and all of {shifts}; each needs its own name "
           f"({len(set(names))} names); --id and --shifts choose the sets")
    for flag, values in (("--n", n_of), ("--split", splits), ("--subset", subsets)):
        known = [*([id_set, *(f"{id_set}@{s}" for s in shifts)] if flag == "--n" else ()), *shifts]
        unknown = set(values) - set(known)
        refuse(unknown, f"{flag}: no set {', '.join(sorted(unknown))}; there are {', '.join(known)}")
    baseline, groups = baseline or kept[0]["group"], [m["group"] for m in kept]
    refuse(groups.count(baseline) < 2, f"--baseline {baseline}: {groups.count(baseline)} models, a line needs 2; "
           f"groups are {sorted(set(groups))}")
    refuse(before and before not in names, f"--before: no model {before}")
    return effective_robustness(kept, shifts, baseline, before, splits, boot, seed)


def logit_points(axis, rows: list[dict], key_x: str, key_y: str, **style) -> tuple[np.ndarray, np.ndarray]:
    """Draw two accuracies of each row as log odds, the second with its interval; returns their places."""
    x, y = (np.array([value_of(row[key]) for row in rows]) for key in (key_x, key_y))
    error = error_bars([row[key_y] for row in rows])
    x, y, low, high = (logit(np.clip(v, 1e-3, 0.999)) for v in (x, y, y - error[0], y + error[1]))
    axis.errorbar(x, y, [y - low, high - y], **style)
    return x, y


def percent_axes(axis, rows: list[dict], key_x: str, key_y: str, xlabel: str) -> None:
    """Limits and ticks, in percent, of axes that hold the log odds of two accuracies of rows; the line y = x."""
    for which, key in (("x", key_x), ("y", key_y)):
        values = [value_of(row[key]) for row in rows]
        limits = logit(np.clip([min(values), max(values)], 2e-3, 0.998)) + [-0.35, 0.35]
        for step in (20, 10, 5, 2, 1):  # percent between ticks
            ticks = np.arange(step, 100, step) / 100
            inside = ticks[(logit(ticks) > limits[0]) & (logit(ticks) < limits[1])]
            if len(inside) >= 4:
                break
        axis.set(**{f"{which}lim": limits, f"{which}ticks": logit(inside),
                    f"{which}ticklabels": [f"{100 * t:g}" for t in inside]})
    axis.plot(axis.get_xlim(), axis.get_xlim(), **GUIDE)
    axis.set(title=key_y, xlabel=xlabel, ylabel="under shift (%)")


def plot_robustness(results: dict, path: str) -> None:
    """For every shift: accuracy under shift against ID accuracy, logit axes, y = x, the groups' lines and bands."""
    rows, shifts = list(results["rows"].values()), results["shifts"]
    figure, axes = new_figure(len(shifts), 3.4, 3.2)
    for axis, shift in zip(axes, shifts):
        for i, group in enumerate(dict.fromkeys(row["group"] for row in rows)):
            members, color = [row for row in rows if row["group"] == group], COLORS[i % len(COLORS)]
            logit_points(axis, members, f"{shift} id", shift, label=group,
                         **line_style(i) | {"linestyle": "", "markersize": 5, "capsize": 0})
            curve = {k: logit(np.array(v, float)) for k, v in results["curves"][shift].get(group, {}).items()}
            if curve:
                axis.plot(curve["x"], curve["y"], color=color, linewidth=1)
            if "low" in curve and len(members) >= 6:  # the band of a few models is the whole panel
                axis.fill_between(curve["x"], curve["low"], curve["high"], alpha=0.2, linewidth=0, color=color)
        percent_axes(axis, rows, f"{shift} id", shift, "in distribution (%), same classes")
    save_figure(figure, path, axes[0])


# ------------------------------------------------------------------------------ transfer

PER_CLASS_SETS = ("aircraft", "caltech", "flowers", "pets")  # mean per class there, top-1 elsewhere (CLIP, App. A.3)


class Logistic:
    """Logistic regression on fixed features: softmax over classes, or one sigmoid a class for labels [N, C].

    Minimises mean cross-entropy + |W|^2 / (2 C n), the bias free: scikit-learn's optimum for the same C. L-BFGS
    over float32 products; small objectives of few images, where these have too few digits, go on in float64. Fits start
    from the last one. The search is in the features' principal axes, each divided by the root of about its curvature:
    the same optimum in fewer steps.
    """

    def __init__(self, features: np.ndarray, labels: np.ndarray, n_classes: int, device: str):
        self.n, self.n_classes, self.is_multi = len(features), n_classes, labels.ndim == 2
        x = torch.from_numpy(np.asarray(features, np.float32)).to(device)
        self.mean = x.double().mean(0).float()  # taken off, the bias makes up for it: better conditioned
        x, n_features = x - self.mean, x.shape[1]
        if self.n > n_features:
            variance, self.axes = torch.linalg.eigh((x.T @ x / self.n).double().cpu())
            x = x @ self.axes.to(x)
        else:  # fewer images than axes: too few to be worth it
            variance, self.axes = torch.ones(n_features), torch.eye(n_features, dtype=torch.float64)
        # The curvature at W = 0, plus the mean variance on every axis: near separation those of little variance move.
        curvature = torch.cat([variance.clamp(min=0) + variance.mean(), torch.ones(1)])
        self.curvature = curvature * (0.25 if self.is_multi else 1 / n_classes)
        self.x = torch.cat([x, torch.ones(self.n, 1, device=device)], 1)  # [n, D + 1]
        self.y = torch.from_numpy(labels).to(device)
        self.weight = torch.zeros(n_features + 1, n_classes, dtype=torch.float64)  # of the features; last row: bias

    def loss(self, x: torch.Tensor, weight: torch.Tensor) -> tuple[float, torch.Tensor]:
        """Mean cross-entropy and its gradient [D + 1, C], in the precision of x; without the penalty."""
        logits = x @ weight.to(x)  # [n, C]
        if self.is_multi:
            counted = (self.y >= 0).to(x)  # -1 is difficult: left out
            value = (torch.nn.functional.softplus(logits) - logits * (self.y == 1)) * counted
            error = (logits.sigmoid() - (self.y == 1).to(x)) * counted
        else:
            rows = torch.arange(self.n, device=x.device)
            error = logits.log_softmax(1)
            value = -error[rows, self.y]
            error.exp_()[rows, self.y] -= 1
        return float(value.sum(dtype=torch.float64)) / self.n, (x.T @ error).double().cpu() / self.n

    def fit(self, C: float) -> float:
        """Fit for one inverse strength; returns the objective."""
        decay = torch.full((len(self.weight), 1), 1 / (C * self.n), dtype=torch.float64)
        decay[-1] = 0
        scale = (self.curvature[:, None] + decay).rsqrt()  # [D + 1, 1]

        def objective(flat: np.ndarray, x: torch.Tensor, unit: float) -> tuple[float, np.ndarray]:
            weight = torch.from_numpy(flat).view(-1, self.n_classes) * scale
            value, gradient = self.loss(x, weight)
            value += float((decay * weight**2).sum()) / 2
            return value / unit, ((gradient + decay * weight) * scale).numpy().ravel() / unit

        unit = 1.0  # scipy takes `ftol` as absolute below 1: the second round is in units of the first one's result
        start = torch.cat([self.axes.T @ self.weight[:-1], self.weight[-1:]]) / scale
        for is_second in (False, True):
            if is_second and unit * math.sqrt(self.n) > 2:  # rounding errors of images average out
                break
            x = self.x.double() if is_second else self.x
            found = scipy.optimize.minimize(objective, start.numpy().ravel(), (x, unit), jac=True,
                                            method="L-BFGS-B", options={"maxiter": 10_000, "maxfun": 10_000,
                                                                        "ftol": 1e-8, "gtol": 1e-9})
            start, unit = torch.from_numpy(found.x).view(-1, self.n_classes), max(found.fun * unit, 1e-300)
        self.weight = start * scale
        self.weight[:-1] = self.axes @ self.weight[:-1]
        return unit

    def scores(self, features: np.ndarray) -> np.ndarray:
        """[N, C] float32 logits."""
        x = torch.from_numpy(np.asarray(features, np.float32)).to(self.x.device) - self.mean
        return (x @ self.weight[:-1].to(x) + self.weight[-1].to(x)).cpu().numpy()


def average_precision(scores: np.ndarray, labels: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """11-point average precision (VOC07) of one class: mean of the largest precision at recall >= 0, .1, .., 1.

    labels: [N] 1, 0, and -1 for objects left out. weights: [boot, N] how often each image counts. Returns: [boot]; NaN
    where no image is positive.
    """
    order = np.argsort(-scores, kind="stable")
    order = order[labels[order] >= 0]
    if not len(order):
        return np.full(len(weights), np.nan)
    weights, labels = weights[:, order].astype(float), labels[order]
    right, shown = np.cumsum(weights * labels, 1), np.cumsum(weights, 1)
    last = np.searchsorted(-scores[order], -scores[order], side="right") - 1  # equal scores are shown together
    right, shown = right[:, last], shown[:, last]
    recall, precision = ratio(right, right[:, -1:]), np.nan_to_num(ratio(right, shown))
    mean = np.mean([np.where(recall >= t / 10 - 1e-12, precision, 0).max(1) for t in range(11)], 0)
    return np.where(right[:, -1] > 0, mean, np.nan)


def transfer_metric(scores: np.ndarray, labels: np.ndarray, metric: str, boot: int,
                    seed: int | list[int]) -> np.ndarray:
    """[1 + boot] top1 or map of scores [N, C], of the images, and of resamples, the same for all models; or for
    per_class [1 + boot, tested classes] accuracies, for mean_of_classes."""
    rng, n = np.random.default_rng(seed), len(labels)
    if metric == "map":
        draws = []
        for start in range(-50, boot, 50):
            size = min(50, boot - start)
            weights = rng.multinomial(n, np.full(n, 1 / n), size=size) if start >= 0 else np.ones((1, n))
            found = np.stack([average_precision(*pair, weights) for pair in zip(scores.T, labels.T)], 1)
            draws.append(np.ma.masked_invalid(found).mean(1).filled(np.nan))
        return np.concatenate(draws)
    right, C = scores.argmax(1) == labels, scores.shape[1]
    if metric == "top1":
        return np.concatenate([[right.mean()], bootstrap(right.astype(np.float32), boot, rng)])
    n_test, n_right, _ = resample_images(labels, np.where(right, labels, C), C + 1, boot, rng)
    return ratio(n_right, n_test)[:, n_test > 0]


def mean_of_classes(draws: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """What transfer_metric gives, or a difference of two, as [1 + boot]: classes are averaged by class_mean."""
    return draws if draws.ndim == 1 else class_mean(draws, np.unique(labels, return_counts=True)[1])


def read_tasks(inputs: list[str], sets: list[str]) -> Iterator[tuple]:
    """(model, set, train, val or None, test) from TRAIN.npz TEST.npz, or from folders with SET_train.npz, SET_test.npz
    and perhaps SET_val.npz; one after the other."""
    if all(path.endswith(".npz") for path in inputs):
        if len(inputs) not in (2, 3):
            raise SystemExit(f"got {len(inputs)} files, expected TRAIN.npz TEST.npz, or TRAIN.npz VAL.npz TEST.npz")
        tasks = [("model", Path(inputs[-1]).stem, inputs[0], inputs[1] if len(inputs) > 2 else "", inputs[-1])]
    else:
        names = sets or sorted(p.name.removesuffix("_test.npz") for p in Path(inputs[0]).glob("*_test.npz"))
        refuse(not names, f"{inputs[0]}: no SET_test.npz in it")
        refuse("mean" in names, f"{inputs[0]}: a set called mean: that is the name of the mean over sets here")
        bases = [Path(path).name for path in inputs]
        bases = bases if len(set(bases)) == len(inputs) else short_names(inputs)
        tasks = [(base, name, *(Path(folder) / f"{name}_{part}.npz" for part in ("train", "val", "test")))
                 for base, folder in zip(bases, inputs) for name in names]
        tasks = [(*task[:3], task[3] if task[3].is_file() else "", task[4]) for task in tasks]
    missing = [str(path) for task in tasks for path in task[2:] if path and not Path(path).is_file()]
    refuse(missing, f"{', '.join(missing[:3])}: cannot be read: no such file")
    for model, name, *paths in tasks:
        parts = [read_predictions(p, "features", multi_label=True) if p else None for p in paths]
        for part in filter(None, parts[1:]):
            refuse(any(part[k].shape[1:] != parts[0][k].shape[1:] for k in ("features", "labels")),
                   f"{part['path']} and {paths[0]} have features or labels of different widths")
            check_same(parts[0], part, "classes", ("class_names",))
        refuse(parts[1] is not None and share_rows(parts[1]["features"], parts[2]["features"]),
               f"{paths[1]} and {paths[2]} hold the same images: those for validation must not be the test's")
        yield model, name, *parts


def sweep_strength(protocol: str, model: Logistic, val: dict, metric: str) -> float:
    """Inverse strength C that is best on the validation part; among equals the weakest regularisation.

    clip: lambda = 1 / C from 10^-6 to 10^6 on 7 points, then halving round the peak to 8 steps a decade (CLIP, arXiv
    2103.00020, App. A.3). transfer: 45 values of lambda from 10^-6 to 10^5 (Kornblith et al., ssl-transfer). Strong to
    weak, each fit from the last.
    """
    found, peak, rounds = {}, 0.0, [np.linspace(-6, 5, 45)]
    if protocol == "clip":
        rounds = [range(-6, 7, 2), (-1, 1), (-0.5, 0.5), (-0.25, 0.25), (-0.125, 0.125)]
    for offsets in rounds:
        for e in sorted({float(peak + offset) for offset in offsets} - set(found), reverse=True):
            if -6 <= e <= 6:
                model.fit(10.0**-e)
                draws = transfer_metric(model.scores(val["features"]), val["labels"], metric, 0, 0)
                found[e] = mean_of_classes(draws, val["labels"])[0]
        peak = min(found, key=lambda e: (-found[e], e))
    return 10.0**-peak


def probe_scores(train: dict, val: dict | None, whole: dict, test: dict, n_classes: int, protocol: str, C: float,
                 metric: str, seed: int, device: str) -> tuple[np.ndarray, dict]:
    """Scores [N, C] of the test images from logistic regression: strength chosen on validation images (of the training
    part a random 20 %, if there are none), then fitted on both."""
    if protocol != "none":
        if val is None:
            is_val = np.random.default_rng(seed).random(len(train["labels"])) < 0.2
            if is_val.all() or not is_val.any():
                raise SystemExit(f"{train['path']}: {len(is_val)} images are too few to hold out a fifth; --sweep none")
            train, val = ({k: train[k][rows] for k in ("features", "labels")} for rows in (~is_val, is_val))
        C = sweep_strength(protocol, Logistic(train["features"], train["labels"], n_classes, device), val, metric)
    model = Logistic(whole["features"], whole["labels"], n_classes, device)
    objective = model.fit(C)
    return model.scores(test["features"]), {"C": C, "objective": objective}


def knn_scores(train: dict, test: dict, n_classes: int, k: int, device: str) -> np.ndarray:
    """Votes [N, C]: the k nearest training images by cosine, each with weight exp(cosine / 0.07), for all its labels.

    Source: DINO, arXiv 2104.14294, section 4.1. Test images go in chunks, so memory is O(2^26 + N C).
    """
    x, queries = (torch.from_numpy(unit_rows(part["features"])).float() for part in (train, test))
    x, y, votes = x.to(device), torch.from_numpy(train["labels"]).to(device), []
    for part in queries.split(max(1, 2**26 // len(y))):
        with exact_matmul():
            cosine, index = (part.to(device) @ x.T).topk(min(k, len(x)), 1)
        weights, found = (cosine / 0.07).exp(), torch.zeros(len(part), n_classes, device=device)
        if y.ndim == 1:
            found.scatter_add_(1, y[index], weights)
        else:
            for i in range(index.shape[1]):
                found += weights[:, i, None] * (y[index[:, i]] == 1)
        votes.append(found.cpu())
    return torch.cat(votes).numpy()


def metric_of(name: str, labels: np.ndarray, metric: str) -> str:
    """map for labels [N, C]; else the flag, or what the field reports on this set."""
    if labels.ndim == 2:
        return "map"
    return metric if metric != "auto" else "per_class" if name.lower().startswith(PER_CLASS_SETS) else "top1"


def transfer(command: str, inputs: list[str], sets: list[str], ks: list[int], protocol: str, C: float, metric: str,
             shots: list[int], n_draws: int, boot: int, seed: int, device: str) -> dict:
    """Table of models x sets, of probe with the mean, and the difference to the first model on the same test images."""
    rows, details, draws, tests, labels = {}, [], {}, {}, {}
    for model, name, train, val, test in read_tasks(inputs, sets):
        check_same(tests.setdefault(name, {k: test[k] for k in ("path", "labels", "rows") if k in test}), test)
        n_classes = max(part["n_classes"] for part in (train, val, test) if part)
        kind = metric_of(name, test["labels"], metric)
        own_seed = [seed, zlib.crc32(name.encode())]  # sets are drawn from independently, models on a set alike
        both = train if val is None else {k: np.concatenate([train[k], val[k]]) for k in ("features", "labels")}
        row, about, outcomes = rows.setdefault(model, {}), {"model": model, "set": name, "metric": kind}, {}
        for k in shots:
            values = [few_shot(both, test, n_classes, k, C, kind, seed + i, device) for i in range(n_draws)]
            column = f"{name} {k}-shot"
            row[column], draws.setdefault(model, {})[column] = t_interval(values, 0, 1), np.array(values)
            labels[column] = test["labels"]
            details.append(about | {"shots": k, "draws": values})
        if command == "probe":
            outcomes[name] = probe_scores(train, val, both, test, n_classes, protocol, C, kind, seed, device)
        for k in ks:
            outcomes[f"{name} k={k}"] = knn_scores(both, test, n_classes, k, device), {"k": k}
        for column, (scores, detail) in outcomes.items():
            draws.setdefault(model, {})[column] = transfer_metric(scores, test["labels"], kind, boot, own_seed)
            draw, n = mean_of_classes(draws[model][column], test["labels"]), 0 if kind == "map" else len(test["labels"])
            row[column], labels[column] = from_draws(draw.clip(0, 1), n_images=n), test["labels"]
            details.append(about | {"value": float(draw[0])} | detail)
    interval, base = t_interval if command == "fewshot" else from_draws, next(iter(draws))
    for model, columns in draws.items():
        own = {c: mean_of_classes(d, labels[c]) for c, d in columns.items()}
        if len(columns) > 1 and command == "probe":
            rows[model]["mean"] = from_draws(np.mean(list(own.values()), 0).clip(0, 1))
        if model != base:  # of the differences, not a difference of means: class_mean widens by their own variances
            gains = {c: mean_of_classes(d - draws[base][c], labels[c]) for c, d in columns.items()}
            gains |= {"mean": np.mean(list(gains.values()), 0)} if "mean" in rows[model] else {}
            rows[f"{model} - {base}"] = {c: interval(gain) for c, gain in gains.items()}
    return {"rows": rows, "details": details}


def few_shot(train: dict, test: dict, n_classes: int, k: int, C: float, metric: str, seed: int, device: str) -> float:
    """Logistic regression on k images of each class (all of a smaller class), drawn with the seed; of images with
    several labels, on those that were drawn for any of them."""
    order = np.random.default_rng(seed).permutation(len(train["labels"]))
    labels = train["labels"][order]
    if labels.ndim == 2:
        chosen = np.unique(np.concatenate([order[column == 1][:k] for column in labels.T]))
    else:
        order = order[np.argsort(labels, kind="stable")]
        chosen = np.concatenate([rows[:k] for rows in np.split(order, np.bincount(labels).cumsum()[:-1])])
    refuse(not len(chosen), "fewshot: no training image has a label, so none can be drawn")
    model = Logistic(train["features"][chosen], train["labels"][chosen], n_classes, device)
    model.fit(C)
    return mean_of_classes(transfer_metric(model.scores(test["features"]), test["labels"], metric, 0, 0),
                           test["labels"])[0]


def plot_transfer(results: dict, path: str) -> None:
    """Each set: difference to the first model, or the values of a single one."""
    rows = {k: v for k, v in results["rows"].items() if " - " in k} or results["rows"]
    columns = list(next(iter(rows.values())))
    figure, (axis,) = new_figure(1, max(4.2, 0.3 * len(columns) * len(rows) + 1.5))
    unit = "points" if any(" - " in name for name in rows) else "%"
    interval_panel(axis, columns, {name: [row[c] for c in columns] for name, row in rows.items()},
                   unit if len(rows) > 1 else f"{next(iter(rows))} ({unit})", 100)
    save_figure(figure, path, axis)


# ------------------------------------------------------------------------------ retrieval


# Copied from clip.py
@contextlib.contextmanager
def exact_matmul() -> Iterator[None]:
    """Matrix products of the forward pass in full fp32: TF32 rounds logits near 100 to steps of 0.06."""
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = False
    try:
        yield
    finally:
        torch.backends.cuda.matmul.allow_tf32 = before


def retrieval_ranks(images: np.ndarray, texts: np.ndarray, owner: np.ndarray,
                    device: str) -> tuple[np.ndarray, np.ndarray]:
    """Rank, from 0, of the best text of each image, and of the image of each text: the number of wrong items before it.

    images: [n_images, D]; texts: [n, D]; unit rows. owner: [n] image of each text. Wrong items with a score within 2e-6
    count as before it: a constant model is last. Images go in chunks of 256: memory is O(256 n), scores are made once.
    Same value as clip.py's retrieval_metrics (tests/test_evaluate_transfer.py).
    """
    x, t, owner = (torch.as_tensor(v).to(device) for v in (images, texts, owner))
    pairs = zip(t.split(8192), owner.split(8192))
    right = torch.cat([(x[o].double() * part.double()).sum(1) for part, o in pairs]).float()
    right = right - 2e-6  # [n] what a wrong item must exceed
    best = torch.full((len(x),), -torch.inf, device=device).scatter_reduce_(0, owner, right, "amax")  # [n_images]
    # Right texts of an image that exceed the threshold themselves.
    own = torch.bincount(owner[right + 2e-6 > best[owner]], minlength=len(x))
    before, t2i = [], torch.zeros(len(t), device=device)
    scores, sign = (torch.empty(256, len(t), device=device) for _ in range(2))
    for start in range(0, len(x), 256):
        part = x[start : start + 256]
        a, b = scores[: len(part)], sign[: len(part)]
        with exact_matmul():
            torch.mm(part, t.T, out=a)
        before.append((torch.sub(a, best[start : start + 256, None], out=b).sign_().sum(1) + len(t)) / 2)  # +1 or -1
        t2i += torch.sub(a, right, out=b).sign_().sum(0)
    return (torch.cat(before).round().long() - own).cpu().numpy(), ((t2i + len(x)) / 2).round().long().cpu().numpy() - 1


def shared_ranks(images: np.ndarray, texts: np.ndarray, owner: np.ndarray, group: np.ndarray,
                 device: str) -> tuple[np.ndarray, np.ndarray]:
    """retrieval_ranks where captions repeat: one that several images have is right for each of them.

    group: [n] number of each text's caption. All scores are made twice.
    """
    x, t, owner, group = (torch.as_tensor(v).to(device) for v in (images, texts, owner, group))
    best, before, t2i = torch.full((len(t),), -torch.inf, device=device), [], torch.zeros(len(t), device=device)
    for is_counted in (False, True):  # the best right image of each text is known after all images
        for start in range(0, len(x), 256):
            with exact_matmul():
                scores = x[start : start + 256] @ t.T
            has_group = torch.zeros(len(scores), int(group.max()) + 1, dtype=torch.bool, device=device)
            mine = (owner >= start) & (owner < start + len(scores))
            has_group[owner[mine] - start, group[mine]] = True
            right = has_group[:, group]  # [256, n]
            of_right = scores.masked_fill(~right, -torch.inf)
            if is_counted:
                before.append(((scores >= of_right.amax(1, keepdim=True) - 2e-6) & ~right).sum(1))
                t2i += ((scores >= best - 2e-6) & ~right).sum(0)
            else:
                best = torch.maximum(best, of_right.amax(0))
    return torch.cat(before).cpu().numpy(), t2i.round().long().cpu().numpy()


def retrieval(paths: list[str], ks: list[int], boot: int, seed: int, device: str) -> dict:
    """Recall at k, texts for an image (any of its texts) and images for a text; intervals resample images."""
    rows = {}
    for name, path in zip(short_names(paths), paths):
        data = read_npz(path, ("features", "text_features", "image_ids", "caption_ids"))
        images, texts = (data.get(key, np.zeros(0)) for key in ("features", "text_features"))
        if any(v.ndim != 2 or 0 in v.shape or v.dtype.kind not in "fiu" for v in (images, texts)):
            raise SystemExit(f"{path}: needs features [n_images, D] and text_features [n, D]; found {', '.join(data)}")
        owner = data.get("image_ids", np.arange(len(texts)))
        if not (images.shape[1] == texts.shape[1] and owner.shape == (len(texts),) and owner.dtype.kind in "iu"
                and owner.min() >= 0 and owner.max() < len(images)):
            raise SystemExit(f"{path}: features {images.shape}, text_features {texts.shape}, image_ids {owner.shape}; "
                             "image_ids [n] is the row of each text's image")
        used, owner = np.unique(owner, return_inverse=True)  # a row without a text is no query and no answer
        check_finite_rows(path, "features", images[used])
        check_finite_rows(path, "text_features", texts)
        images, texts = (torch.nn.functional.normalize(torch.from_numpy(v.astype(np.float32)), dim=1).numpy()
                         for v in (images[used], texts))
        captions = data.get("caption_ids", np.arange(len(texts)))
        refuse(captions.shape != (len(texts),), f"{path}: caption_ids {captions.shape}, expected one a text")
        captions = np.unique(captions, return_inverse=True)[1]
        if captions.max() + 1 < len(texts):
            i2t, t2i = shared_ranks(images, texts, owner, captions, device)
        else:
            i2t, t2i = retrieval_ranks(images, texts, owner, device)
        rng, n, n_texts = np.random.default_rng(seed), len(images), np.bincount(owner)
        is_hit, n_hits = {k: i2t < k for k in ks}, {k: np.bincount(owner, t2i < k) for k in ks}
        draws = {f"{way}{what}": [] for what in (*(f"_r{k}" for k in ks), " median rank") for way in ("i2t", "t2i")}
        for b in range(1 + boot):  # each image as often as it was drawn
            w = np.bincount(rng.integers(n, size=n), minlength=n) if b else np.ones(n, int)
            for k in ks:
                draws[f"i2t_r{k}"].append(w @ is_hit[k] / n)
                draws[f"t2i_r{k}"].append(w @ n_hits[k] / (w @ n_texts))
            for way, rank, image in (("i2t", i2t, slice(None)), ("t2i", t2i, owner)):
                draws[f"{way} median rank"].append(np.median(np.repeat(rank, w[image])) + 1)
        rows[name] = {"images": n, "texts": len(texts)} | {
            key: from_draws(values, n_images=0 if "median" in key else n) for key, values in draws.items()}
    return {"rows": rows}


def plot_retrieval(results: dict, path: str) -> None:
    """Recall at k, of texts for an image and of images for a text."""
    figure, axes = new_figure(2)
    for axis, way, title in zip(axes, ("i2t_r", "t2i_r"), ("texts for an image", "images for a text")):
        for i, (name, row) in enumerate(results["rows"].items()):
            cells = {int(c.removeprefix(way)): row[c] for c in row if c.startswith(way)}
            y, error = [100 * value_of(c) for c in cells.values()], 100 * error_bars(list(cells.values()))
            axis.errorbar(list(cells), y, error, label=name, **line_style(i))
        axis.set(xlabel="k", ylabel="recall at k (%)", title=title)
    save_figure(figure, path, axes[0])


# ------------------------------------------------------------------------------ calibration


def confidence_of(logits: np.ndarray, labels: np.ndarray, temperature: float) -> tuple[np.ndarray, np.ndarray]:
    """Top probability and negative log-likelihood in nats of each image, [N] each, at a temperature."""
    top, nll = np.empty(len(labels)), np.empty(len(labels))
    for start in range(0, len(labels), 4096):
        part = slice(start, start + 4096)
        scaled = logits[part].astype(np.float64) / temperature
        total = logsumexp(scaled, axis=1)
        top[part], nll[part] = np.exp(scaled.max(1) - total), total - scaled[np.arange(len(scaled)), labels[part]]
    return top, nll


def calibration_bins(confidence: np.ndarray, n_bins: int, is_equal_mass: bool) -> np.ndarray:
    """[N] bin of each confidence: (lo, hi] of equal width, or equal numbers of images."""
    if is_equal_mass:
        return np.argsort(np.argsort(confidence, kind="stable"), kind="stable") * n_bins // len(confidence)
    return np.clip(np.ceil(confidence * n_bins).astype(int) - 1, 0, n_bins - 1)


def calibration_error(bins: np.ndarray, confidence: np.ndarray, right: np.ndarray, boot: int,
                      rng: np.random.Generator) -> dict[str, float | None]:
    """ECE: sum over bins of n_b / n |accuracy - confidence|; bins are those of the sample in every resample."""
    gap, draws = right - confidence, []
    for b in range(1 + boot):
        index = rng.integers(len(gap), size=len(gap)) if b else slice(None)
        draws.append(np.abs(np.bincount(bins[index], gap[index])).sum() / len(gap))
    return from_draws(draws, biased_up_to=1)


def fit_temperature(logits: np.ndarray, labels: np.ndarray) -> float:
    """T in [0.01, 100] of the least negative log-likelihood of softmax(logits / T); the least T of several (all right,
    the likelihood is 1 in floats over a range)."""
    def nll(log_t: float) -> float:
        return float(confidence_of(logits, labels, math.exp(log_t))[1].mean())

    found = scipy.optimize.minimize_scalar(nll, bounds=(math.log(0.01), math.log(100)), options={"xatol": 1e-6})
    return 0.01 if nll(math.log(0.01)) <= found.fun else math.exp(found.x)


def temperature_draws(logits: np.ndarray, labels: np.ndarray, temperature: float, boot: int,
                      rng: np.random.Generator) -> np.ndarray:
    """[boot] temperatures of resampled images: one Newton step each in 1 / T, from the fitted one, in which the
    likelihood is convex; its slope is E_p[logit] - logit of the label, its curvature Var_p[logit]."""
    slope = np.empty((len(labels), 2))
    for start in range(0, len(labels), 4096):
        z = logits[start : start + 4096].astype(np.float64)
        p = softmax(z / temperature, axis=1)
        mean = (p * z).sum(1)
        slope[start : start + 4096, 0] = mean - z[np.arange(len(z)), labels[start : start + 4096]]
        slope[start : start + 4096, 1] = (p * (z - mean[:, None]) ** 2).sum(1)
    draws = bootstrap(slope, boot, rng)
    return 1 / np.clip(1 / temperature - ratio(draws[:, 0], draws[:, 1]), 0.01, 100)


def calibration(paths: list[str], n_bins: int, fraction: float, boot: int, seed: int) -> dict:
    """ECE before and after a temperature that is fitted on a random part of the images and judged on the others."""
    rows, curves = {}, {}
    for name, path in zip(short_names(paths), paths):
        data, rng = read_predictions(path, "logits"), np.random.default_rng(seed)
        is_fit = rng.random(len(data["labels"])) < fraction
        refuse(is_fit.all() or not is_fit.any(),
               f"{path}: {len(is_fit)} images do not split into --fraction {fraction} and the rest")
        held_out = data["logits"][is_fit], data["labels"][is_fit]
        temperature = fit_temperature(*held_out)
        logits, labels = data["logits"][~is_fit], data["labels"][~is_fit]
        right = predict(data)[0][~is_fit] == labels
        rows[name] = {"n": len(labels), "top1": mean_over(right, boot, rng), "temperature": estimate(
            temperature, temperature_draws(*held_out, temperature, boot, rng))}
        for label, t in (("", 1.0), (" at T", temperature)):
            confidence, nll = confidence_of(logits, labels, t)
            bins, equal_bins = (calibration_bins(confidence, n_bins, is_equal) for is_equal in (False, True))
            rows[name] |= {f"confidence{label}": mean_over(confidence, boot, rng),
                           f"ece{label}": calibration_error(bins, confidence, right, boot, rng),
                           f"ece, equal mass{label}": calibration_error(equal_bins, confidence, right, boot, rng),
                           f"nll{label}": mean_over(nll, boot, rng)}
            curves[name + label] = [{"confidence": mean_over(confidence[inside], boot, rng), "n": int(inside.sum()),
                                     "accuracy": clopper_pearson(right[inside].mean(), inside.sum())}
                                    for inside in (bins == b for b in np.unique(bins))]
    return {"rows": rows, "curves": curves}


def plot_calibration(results: dict, path: str) -> None:
    """Reliability: accuracy against confidence in each bin, and how many images it has."""
    figure, axes = new_figure(2)
    for i, (name, curve) in enumerate(results["curves"].items()):
        x, cells = [value_of(b["confidence"]) for b in curve], [b["accuracy"] for b in curve]
        axes[0].errorbar(x, [value_of(c) for c in cells], error_bars(cells), label=name, **line_style(i))
        axes[1].errorbar(x, [b["n"] for b in curve], **line_style(i))
    axes[0].plot([0, 1], [0, 1], **GUIDE)
    axes[0].set(xlabel="confidence", ylabel="accuracy", xlim=(0, 1), ylim=(0, 1))
    axes[1].set(xlabel="confidence", ylabel="images of the bin", xlim=(0, 1), yscale="log")
    save_figure(figure, path, axes[0])


# ------------------------------------------------------------------------------ collapse


def class_means(features: np.ndarray, labels: np.ndarray, n_classes: int) -> np.ndarray:
    """[C, D] float64 mean of each class; NaN without images. Features are widened in chunks, not as a whole."""
    total = np.zeros((n_classes, features.shape[1]))
    for start in range(0, len(labels), 8192):
        part = labels[start : start + 8192]
        one_hot = csr_matrix((np.ones(len(part)), (part, np.arange(len(part)))), (n_classes, len(part)))
        total += one_hot @ features[start : start + 8192].astype(np.float64)
    return ratio(total, np.bincount(labels, minlength=n_classes)[:, None])


def within_variability(features: np.ndarray, labels: np.ndarray,
                       means: np.ndarray) -> tuple[np.ndarray, int, np.ndarray]:
    """NC1 of each class [C], tr(S_w(c) S_b^+) with S_w(c) over the number of all images; the rank kept of S_b; and the
    95 % t-intervals [C, 2] of NC1 over the images of the class, at this S_b: NaN for a single image.

    features: [N, D] before normalisation; means: [C, D], NaN without images (left out). Memory O(N D + D C): with the
    thin SVD of the centred means U S V^T, NC1_c sums |S^-1 V^T (h - mean)|^2. Eigenvalues of S_b below 1.19e-7 D of the
    largest are dropped: torch.linalg.pinv's default in float32, which the authors used.
    Source: paper's notebooks; mean over classes equals the textbook tr(S_w S_b^+) / C.
    """
    tested = np.isfinite(means[:, 0])
    centred = means[tested] - means[tested].mean(0)
    _, s, vt = np.linalg.svd(centred / math.sqrt(tested.sum()), full_matrices=False)
    keep = s**2 > features.shape[1] * 1.19e-7 * s.max(initial=0) ** 2
    project = vt[keep].T / s[keep]  # [D, rank]
    distance, n = np.empty(len(labels)), np.bincount(labels, minlength=len(means))
    for start in range(0, len(labels), 4096):
        part = slice(start, start + 4096)
        distance[part] = (((features[part] - means[labels[part]]) @ project) ** 2).sum(1)
    total = np.bincount(labels, distance, len(means))
    variance = ratio(np.bincount(labels, (distance - ratio(total, n)[labels]) ** 2, len(means)), n - 1)
    half = student_t.ppf(0.975, n - 1) * np.sqrt(n * variance)  # NaN without degrees of freedom
    total = np.where(tested & keep.any(), total, np.nan)
    ends = np.maximum(0, total[:, None] + half[:, None] * [-1, 1])
    return total / len(labels), int(keep.sum()), ends / len(labels)


def cosine_gaps(vectors: np.ndarray, is_centred: bool) -> tuple[np.ndarray, np.ndarray]:
    """NC2 of each class: mean and largest |cosine to another class + 1 / (C - 1)|; 0 is a simplex. [C] each.

    vectors: [C, D], rows of NaN are left out, and rows without direction, which have NaN, as has a single class.
    """
    tested = np.isfinite(vectors[:, 0])
    rows = vectors[tested]
    rows = rows - rows.mean(0) if is_centred and len(rows) else rows
    norms = np.linalg.norm(rows, axis=1)
    has = norms > 1e-12 * max(norms.max(initial=0), 1e-300)
    ids, n = np.flatnonzero(tested)[has], int(has.sum())
    mean, nearest = np.full(len(vectors), np.nan), np.full(len(vectors), np.nan)
    if n > 1:
        unit = rows[has] / norms[has, None]
        gap = np.abs(unit @ unit.T + 1 / (n - 1))
        np.fill_diagonal(gap, 0)
        mean[ids], nearest[ids] = gap.sum(1) / (n - 1), gap.max(1)
    return mean, nearest


def jackknife_of_means(features: np.ndarray, labels: np.ndarray, means: np.ndarray, of: Callable,
                       rng: np.random.Generator) -> np.ndarray:
    """[..., C] half widths of the 95 % intervals of of(class means [C, D]) over images: 20 random groups of every class
    (a group an image of smaller ones, so a little wide), each left out once. NaN for classes of a single image."""
    C, n, order = len(means), np.bincount(labels, minlength=len(means)), rng.permutation(len(labels))
    order = order[np.argsort(labels[order], kind="stable")]
    y, group, values = labels[order], np.empty(len(labels), int), []
    place = np.arange(len(y)) - np.searchsorted(y, y) + rng.integers(20, size=C)[y]
    group[order] = np.where(n[y] > 1, place % 20, 20)  # a class keeps its only image
    for g in range(20):
        rows = np.flatnonzero(group == g)
        n_out = np.bincount(labels[rows], minlength=C)[:, None]
        total = np.nan_to_num(class_means(features[rows], labels[rows], C)) * n_out
        values.append(of(ratio(means * n[:, None] - total, n[:, None] - n_out)))
    half = student_t.ppf(0.975, 19) * math.sqrt(19) * np.std(values, 0)
    return np.where(n > 1, half, np.nan)


def collapse(paths: list[str], counts: str, boot: int, seed: int) -> dict:
    """NC1 and NC2 of each class, their means, and Spearman's correlation with frequency and accuracy.

    Intervals of a class are over its images; class vectors are no sample: theirs have none. NC1's leave out the noise
    of S_b, which is shared: they cover 88 to 94 % with 5 to 30 images a class (simulated), those of NC2_M 95 to 98 %.
    """
    rows, models = {}, {}
    for name, path in zip(short_names(paths), paths):
        data = read_predictions(path, "features", counts=counts, with_logits=True)
        labels, C, rng = data["labels"], data["n_classes"], np.random.default_rng(seed)
        means = class_means(data["features"], labels, C)
        nc1, rank, ends = within_variability(data["features"], labels, means)
        metrics, intervals = {"NC1": nc1}, {"NC1_interval": ends}
        if boot:
            halves = jackknife_of_means(data["features"], labels, means, lambda m: np.array(
                [cosine_gaps(m, True), cosine_gaps(m, False)]), rng)
        # The paper centres means (M) and leaves class vectors (W) as they are; the other way round is marked.
        kinds = [("M", True, ""), ("M", False, " uncentred"), ("W", False, ""), ("W", True, " centred")]
        for letter, is_centred, suffix in kinds if "prototypes" in data else kinds[:2]:
            vectors = means if letter == "M" else data["prototypes"].astype(np.float64)
            names, gaps = (f"NC2_{letter}{suffix}", f"NC2_{letter} nn{suffix}"), cosine_gaps(vectors, is_centred)
            metrics |= zip(names, gaps)
            if boot and letter == "M":
                intervals |= {f"{key}_interval": np.maximum(0, value[:, None] + half[:, None] * [-1, 1])
                              for key, value, half in zip(names, gaps, halves[int(not is_centred)])}
        accuracy, frequency = np.full(C, np.nan), data.get("class_counts", np.full(C, np.nan))
        if "logits" in data or "predictions" in data:
            accuracy = class_accuracy(labels, predict(data)[0] == labels, C)
        for metric, values in metrics.items():
            rows[f"{name} {metric}" if len(paths) > 1 else metric] = {
                "mean": mean_over(values, boot, rng), "rho(freq)": spearman(frequency, values, boot, rng),
                "rho(acc)": spearman(accuracy, values, boot, rng)}
        n_test = np.bincount(labels, minlength=C)
        models[name] = {"rank of S_b": rank, "accuracy": accuracy,
                        "accuracy_interval": binomial_interval(accuracy * n_test, n_test)} | metrics | intervals
    return {"rows": rows, "models": models}


def plot_collapse(results: dict, path: str) -> None:
    """Correlations of the collapse metrics with accuracy and frequency."""
    figure, axes = new_figure(2, 5)
    names, rows = list(results["models"]), results["rows"]
    metrics = list(dict.fromkeys(k for model in results["models"].values() for k in model  # not all have class vectors
                                 if k.startswith("NC") and not k.endswith("_interval")))
    for axis, key, title in zip(axes, ("rho(acc)", "rho(freq)"), ("accuracy", "frequency")):
        cells = {name: [rows.get(f"{name} {m}" if len(names) > 1 else m, {}).get(key, estimate(None)) for m in metrics]
                 for name in names}
        interval_panel(axis, metrics, cells, f"Spearman with {title}")
    save_figure(figure, path, axes[0])


# ------------------------------------------------------------------------------ similarity


def pair_means(gram: np.ndarray, boot: int, rng: np.random.Generator) -> tuple[float, np.ndarray]:
    """Mean off-diagonal of a similarity matrix [n, n], and [boot] of resampled rows; a row and its copy are no pair.
    Draws of two rows, which would all be alike, are NaN."""
    n = len(gram)
    weights = rng.multinomial(n, np.full(n, 1 / n), size=boot).astype(float)  # [boot, n]
    own = weights**2 @ np.diag(gram)
    draws = ratio(((weights @ gram) * weights).sum(1) - own, n**2 - (weights**2).sum(1))  # 0 / 0: one row n times
    draws = draws if n > 2 else np.full(boot, np.nan)
    return float((gram.sum() - np.trace(gram)) / (n * (n - 1))), draws


def similarity(path_a: str, path_b: str, n_pairs: int, max_images: int, min_pairs: int, boot: int, seed: int) -> dict:
    """Cosine similarity of pictures of one class, in A and in B: class by class, and as a distribution.

    Per class a random max_images images of each set; pairs i < j only. The distribution takes the same number of
    pairs of a class from both sets, at most n_pairs, with replacement. Classes with fewer than min_pairs in either are
    left out. Source: Shirali and Hardt, arXiv 2310.06872; their intervals resample pairs, ours images. False
    discoveries: t-tests, with the draws' standard deviation, as shares of --boot draws do not get small enough.
    Intervals of a class's mean in one set are short where images are few: in 1,500 simulations (8 dimensions) 95 % ones
    of 5 images held it 89 times in 100, of 50 images 93 times; those of the difference 93 to 98 times.
    """
    rng = np.random.default_rng(seed)
    sides = [read_predictions(path, "features") for path in (path_a, path_b)]
    widths = [side["features"].shape[1] for side in sides]
    refuse(widths[0] != widths[1], f"{path_a} has features of width {widths[0]}, {path_b} of {widths[1]}")
    check_same(*sides, "classes", ("class_names",))
    classes, means, draws, own, samples, free = [], [], [], [], ([], []), []
    for c in np.intersect1d(*(side["labels"] for side in sides)):
        chosen = [rng.permutation(np.flatnonzero(side["labels"] == c))[:max_images] for side in sides]
        units = [unit_rows(side["features"][rows]) for side, rows in zip(sides, chosen)]
        grams, counts = [unit @ unit.T for unit in units], [len(u) * (len(u) - 1) // 2 for u in units]
        if min(counts) < min_pairs:
            continue
        for gram, sample in zip(grams, samples):
            sample.append(rng.choice(gram[np.triu_indices(len(gram), 1)], min(*counts, n_pairs)))
        value, draw = zip(*(pair_means(gram, boot, rng) for gram in grams))
        classes.append(int(c))
        means.append(value)
        with np.errstate(invalid="ignore"):  # inf - inf: resamples of one row n times, in both
            draws.append(draw[0] - draw[1])
        own.append([estimate(*side) for side in zip(value, draw)])
        free.append(sum(map(len, chosen)) - 2)
    refuse(not classes, f"{path_a} and {path_b}: no class with {min_pairs} pairs of images in both")
    means, draws = np.array(means), np.array(draws)  # [C, 2], [C, boot]
    difference = means[:, 0] - means[:, 1]
    ends = [estimate(d, draw) for d, draw in zip(difference, draws)]
    spread = np.ma.masked_invalid(draws).std(1).filled(0)
    spread = np.where(spread > 1e-12, spread, np.inf)  # no draws, or all alike: no evidence
    found = false_discovery_control(2 * student_t.sf(np.abs(difference) / spread, free)) <= 0.05  # Benjamini-Hochberg
    names, index = short_names([path_a, path_b]), rng.integers(len(classes), size=(boot, len(classes)))
    rows = {"classes": len(classes)} | {f"mean of {name}": mean_over(v, boot, rng) for name, v in zip(names, means.T)}
    rows["difference"] = estimate(difference.mean(), difference[index].mean(1) if len(classes) > 1 else None)
    lows, highs = (np.array([e[end] for e in ends], float) for end in ("low", "high"))
    for label, holds in (("classes less alike in A", highs < 0), ("classes more alike in A", lows > 0)):
        for what, those in (("", holds), (", 5 % false discoveries", found & holds)):
            rows[f"share of {label}{what}"] = mean_over(those, boot, rng) if boot else estimate(None)
    return {"rows": {name: {"value": v} for name, v in rows.items()}, "names": names, "classes": classes,
            "class_means": own, "differences": ends, "pairs": [np.concatenate(s) for s in samples]}


def plot_similarity(results: dict, path: str) -> None:
    """Distribution of similarities in both sets; differences of all classes, sorted, with their intervals."""
    figure, axes = new_figure(2)
    edges = np.linspace(min(map(min, results["pairs"])), 1, 71)
    for i, (name, pairs) in enumerate(zip(results["names"], results["pairs"])):
        axes[0].hist(pairs, edges, density=True, histtype="step", label=name, color=COLORS[i], linestyle=DASHES[i])
    axes[0].set(xlabel="cosine of two images of a class", ylabel="density")
    ends = sorted(results["differences"], key=lambda e: e["value"])
    low, high = (np.array([e[end] for e in ends], float) for end in ("low", "high"))  # NaN where there is none
    axes[1].fill_between(range(len(ends)), low, high, color="0.75")
    axes[1].plot([e["value"] for e in ends], color="black", linewidth=1)
    axes[1].axhline(0, **GUIDE)
    axes[1].set(xlabel="classes, sorted by difference", ylabel="similarity, {} minus\n{}".format(*results["names"]))
    save_figure(figure, path, axes[0])


# ------------------------------------------------------------------------------ prototypes


def read_state(path: str | Path) -> dict:
    """A checkpoint with tensors and builtins only (.pt, .safetensors); nothing in it is run."""
    failures = ()
    if Path(path).suffix == ".safetensors":
        try:
            import safetensors.torch
        except ImportError:
            raise SystemExit(f"{path}: pip install safetensors") from None
        failures = (safetensors.SafetensorError,)
    with reading(path, " as a checkpoint of tensors", *failures), torch.serialization.safe_globals(
            [argparse.Namespace]):  # the public DINO keeps its flags so
        content = {"state_dict": safetensors.torch.load_file(path)} if failures else torch.load(
            path, map_location="cpu", weights_only=True)
        if not isinstance(content, dict) or not isinstance(content.get("state_dict", {}), dict):
            raise ValueError("it holds no dict of them")
    return content


def flat_tensors(content: dict, path: str, prefix: str = "") -> dict[str, torch.Tensor]:
    """All tensors of nested dicts, by dotted names; refused if sparse, quantized, expanded and so on."""
    found = {}
    for name, value in content.items():
        if isinstance(value, dict):
            found |= flat_tensors(value, path, f"{prefix}{name}.")
        elif isinstance(value, torch.Tensor):
            is_plain = value.layout == torch.strided and not (value.is_quantized or value.is_complex() or
                                                              value.is_nested or value.is_meta)
            refuse(not is_plain or value.nbytes > value.untyped_storage().nbytes(),
                   f"{path}: {prefix}{name} is sparse, quantized, complex, nested, without values or one number many "
                   "times; save plain tensors")
            found[f"{prefix}{name}"] = value.detach()
    return found


def read_array(path: str, key: str) -> tuple[np.ndarray, dict]:
    """A [K, D] array of an .npy, an .npz (`prototypes`) or a checkpoint (all K of dino_laionet.py, DINO's last layer,
    the teacher's first), and what else an .npz has."""
    suffix, name, more = Path(path).suffix, key or "prototypes", {}
    if suffix == ".npy":
        with reading(path, " as .npy"):
            array = np.load(path, allow_pickle=False, mmap_mode="r")
            refuse(array.nbytes > memory_size(), f"{path}: {array.nbytes} bytes are more than this machine's memory")
    elif suffix == ".npz":
        more = read_npz(path, (name, "class_counts", "class_names"))
        array = more.get(name)
        if name in (*ROW_KEYS, "text_features"):  # a row an image: numbers of classes say nothing of it
            more = {name: array}
    else:
        content = read_state(path)
        tensors = flat_tensors(content, path)
        pattern = r"(.*\.)?(last_layer|(dino_)?prototypes)(\.(weight(_v)?|parametrizations\.weight\.original1))?"
        names = [key] if key else sorted((n for n in tensors if re.fullmatch(pattern, n) and tensors[n].ndim == 2),
                                         key=lambda n: (n != "dino_prototypes", "teacher" not in n, n))
        if not names or names[0] not in tensors:
            raise SystemExit(f"{path}: no tensor {key or 'that looks like prototypes'}; --key is one of "
                             f"{', '.join(n for n, t in tensors.items() if t.ndim == 2)[:300]}")
        array, classes = tensors[names[0]].float().numpy(), content.get("class_names")
        if names[0] != "dino_prototypes" and isinstance(classes, list) and array.shape[:1] == (len(classes),):
            more = {"class_names": np.array(classes, str)}  # a table of --counts goes by them
    if array is None or array.ndim != 2 or array.dtype.kind not in "fiu" or 0 in array.shape:
        raise SystemExit(f"{path}: expected numbers [K, D], got "
                         f"{'nothing' if array is None else f'{array.dtype} {array.shape}'}; --key names an array")
    check_finite_rows(path, name, array)
    return np.array(array, np.float32), more


def greedy_cover(vectors: torch.Tensor, eps: float) -> tuple[np.ndarray, np.ndarray]:
    """Visit rows in order, keep one iff 1 - cosine to all kept is at least eps. Kept rows [M], group of each [K].

    vectors: [K, D] unit float32. The order matters: ours is the index. As the naive loop; memory O(4096^2 + K D).
    """
    kept, groups = [], np.full(len(vectors), -1)
    for start in range(0, len(vectors), 4096):
        chunk = vectors[start : start + 4096]
        covered = np.full(len(chunk), -1)
        for first in range(0, len(kept), 4096):
            cosine = chunk @ vectors[kept[first : first + 4096]].T
            near = (cosine.amax(1) > 1 - eps).cpu().numpy() & (covered < 0)
            covered[near] = first + (cosine[near] > 1 - eps).byte().argmax(1).cpu().numpy()
        free = np.flatnonzero(covered < 0)
        near = ((chunk[free] @ chunk[free].T) > 1 - eps).cpu().numpy()
        for i in range(len(free)):
            if covered[free[i]] < 0:
                covered[free[near[i] & (covered[free] < 0)]] = len(kept)
                covered[free[i]] = len(kept)
                kept.append(start + int(free[i]))
        groups[start : start + 4096] = covered
    return np.array(kept), groups


def linked_groups(vectors: torch.Tensor, groups: np.ndarray, eps: float) -> np.ndarray:
    """Connected components [K] of the graph 1 - cosine < eps, whatever the order.

    groups: greedy_cover's, each of which is inside one component; only pairs of different groups are looked at, so that
    collapsed prototypes do not make K^2 pairs.
    """
    labels = groups.copy()
    for i in range(0, len(vectors), 4096):
        for j in range(i, len(vectors), 4096):
            cosine = vectors[i : i + 4096] @ vectors[j : j + 4096].T
            if float(cosine.max()) <= 1 - eps:
                continue
            a, b = labels[i : i + 4096], labels[j : j + 4096]
            rows, columns = np.nonzero((cosine > 1 - eps).cpu().numpy() & (a[:, None] != b))
            if len(rows):
                edges = np.unique(np.stack([a[rows], b[columns]]), axis=1)
                n = int(labels.max()) + 1
                labels = connected_components(csr_matrix((np.ones(edges.shape[1]), edges), (n, n)), False)[1][labels]
    return labels


def effective_rank(rows: np.ndarray) -> float:
    """exp of the entropy of the singular values as shares, as many equal ones would have (Roy and Vetterli, 2007)."""
    s = np.linalg.svd(rows, compute_uv=False)
    return math.exp(scipy.stats.entropy(s)) if s.any() else math.nan


def affinity(vectors: np.ndarray, head: np.ndarray, tail: np.ndarray, boot: int, rng: np.random.Generator) -> dict:
    """Mean cosines inside and between head and tail rows, what they say of collapse, and effective ranks.

    Intervals resample classes; a class and its own copy make no pair. Those of lengths and ranks leave classes out.
    Source: Wen et al., figure 9a.
    """
    sides = [unit_rows(vectors[ids]) for ids in (head, tail)]
    (hh, hh_draws), (tt, tt_draws) = (pair_means(side @ side.T, boot, rng) for side in sides)
    cross = sides[0] @ sides[1].T
    weights = [rng.multinomial(n, np.full(n, 1 / n), size=boot) / n for n in cross.shape]
    rows = {"head-head cosine": estimate(hh, hh_draws),
            "head-tail cosine": estimate(cross.mean(), ((weights[0] @ cross) * weights[1]).sum(1)),
            "tail-tail cosine": estimate(tt, tt_draws),
            "tail collapse (tail-tail - head-head)": estimate(tt - hh, tt_draws - hh_draws)}
    for name, side in zip(("head", "tail"), sides):
        for label, statistic in (("resultant length", lambda rows: float(np.linalg.norm(rows.mean(0)))),
                                 ("effective rank", effective_rank),
                                 ("effective rank, centred", lambda rows: effective_rank(rows - rows.mean(0)))):
            rows[f"{name} {label}"] = jackknife(side, statistic, rng) if boot else estimate(statistic(side))
    return rows


def prototypes(path: str, key: str, counts: str, epsilons: list[float], n_tail: int, is_tsne: bool, n_samples: int,
               boot: int, seed: int, device: str) -> dict:
    """Distinct prototypes at each eps, in two definitions; head-tail affinity where frequencies are known."""
    array, more = read_array(path, key)
    unit = torch.nn.functional.normalize(torch.from_numpy(array), dim=1).to(device)
    rng, rows = np.random.default_rng(seed), {"K": {"value": len(array)}}
    frequency = None
    if counts or np.any(more.get("class_counts", 0)):  # the scripts write zeros where they are not known
        frequency = read_counts(counts, more.get("class_names"), len(array)) if counts else more["class_counts"]
        if frequency.shape != (len(array),) or frequency.dtype.kind not in "fiu" or not (frequency >= 0).all():
            raise SystemExit(f"{path}: {len(array)} rows, frequencies are {frequency.dtype} {frequency.shape}, "
                             "expected one a row, not negative")
    planes = {"tsne": tsne(array, seed)} if is_tsne else {}  # first: they may miss scikit-learn, or have too many rows
    planes |= {"samples": sample_plane(path, counts, n_samples, seed)} if n_samples else {}
    for eps in epsilons:
        with exact_matmul():
            groups = greedy_cover(unit, eps)[1]
            linked = linked_groups(unit, groups, eps)
        for name, labels in (("greedy", groups), ("linked", linked)):
            sizes = np.unique(labels, return_counts=True)[1]
            rows[f"{name}, eps {eps:g}"] = {"value": len(sizes), "largest group": int(sizes.max()),
                                            "exp entropy": math.exp(scipy.stats.entropy(sizes))}
    directions = unit_rows(array)
    rows["effective rank"] = {"value": effective_rank(directions)}
    centred = directions - directions.mean(0)
    is_point = np.linalg.norm(centred) <= 1e-6 * np.linalg.norm(directions)  # what is left is rounding
    rows["effective rank, centred"] = {"value": math.nan if is_point else effective_rank(centred)}
    results = {"rows": rows, "affinity": {}}
    if frequency is not None:
        order, k = np.argsort(frequency, kind="stable"), min(n_tail, len(array) // 2)
        if k > 1:
            tail, head = order[:k], rng.choice(order[k:], k, replace=False)
            rows |= {name: {"value": v} for name, v in affinity(array, head, tail, boot, rng).items()}
            both = directions[np.concatenate([head, tail])]
            results["affinity"] = both @ both.T
        if len(array) <= 20_000:
            cosine = directions @ directions.T
            np.fill_diagonal(cosine, -np.inf)
            results |= {"class_counts": frequency, "margin": 1 - cosine.max(1)}
    return results | planes


def sample_plane(path: str, counts: str, n_samples: int, seed: int) -> dict:
    """t-SNE [n + c, 2] of n images of c classes: 25 of the more frequent half and 8 of the rarest 4 % (at least 8);
    then of the classes' means; class of each; whether it is rare. Source: Wen et al., figure 7 (k = 500 and 40)."""
    data, rng = read_predictions(path, "features", "class_counts", counts=counts), np.random.default_rng(seed)
    labels = data["labels"]
    tested = np.unique(labels)
    order = tested[np.argsort(-data["class_counts"][tested], kind="stable")]
    half = len(order) // 2
    rare = order[max(half, len(order) - max(8, len(order) // 25)) :]
    classes = np.concatenate([rng.permutation(order[:half])[:25], rng.permutation(rare)[:8]])
    rows = [rng.permutation(np.flatnonzero(labels == c))[:n_samples] for c in classes]
    means = class_means(data["features"], labels, data["n_classes"])[classes]
    ids = np.concatenate([np.repeat(classes, [len(r) for r in rows]), classes])
    points = tsne(np.concatenate([data["features"][np.concatenate(rows)].astype(np.float64), means]), seed)
    return {"points": points, "classes": ids, "is_rare": np.isin(ids, rare), "n_means": len(classes)}


def tsne(array: np.ndarray, seed: int) -> np.ndarray:
    """[K, 2] of scikit-learn's t-SNE with the paper's settings; only neighbourhoods mean something."""
    try:
        from sklearn.manifold import TSNE
    except ImportError:
        raise SystemExit("t-SNE (--tsne, --samples) needs scikit-learn: pip install scikit-learn") from None
    refuse(not 4 <= len(array) <= 20_000, f"t-SNE of {len(array)} rows: 4 to 20,000 can be drawn (--tsne, --samples)")
    model = TSNE(2, perplexity=min(30, (len(array) - 1) / 3), metric="cosine", init="random", random_state=seed % 2**32)
    return model.fit_transform(unit_rows(array))


def plot_prototypes(results: dict, path: str) -> None:
    """Distinct prototypes over eps; cosines of head and tail classes; t-SNE."""
    figure, axes = new_figure(1 + sum(bool(results.get(key)) for key in ("affinity", "tsne", "samples")))
    K, more = results["rows"]["K"]["value"], iter(axes[1:])
    for i, name in enumerate(("greedy", "linked")):
        found = {float(k.split("eps ")[1]): v["value"] for k, v in results["rows"].items()
                 if k.startswith(f"{name}, eps")}
        axes[0].errorbar(sorted(found), [found[e] for e in sorted(found)], label=name, **line_style(i))
    axes[0].axhline(K, **GUIDE)
    axes[0].set(xlabel="eps (1 - cosine)", ylabel=f"distinct prototypes of {K}", xscale="log", ylim=(0, None))
    axes[0].set_xticks(sorted(found), [f"{e:g}" for e in sorted(found)], minor=False)
    axes[0].minorticks_off()
    if results["affinity"]:
        axis = next(more)
        image = axis.imshow(results["affinity"], cmap="viridis", vmin=-0.15, vmax=1)
        figure.colorbar(image, ax=axis, label="cosine")
        for line in (axis.axhline, axis.axvline):
            line(len(results["affinity"]) / 2 - 0.5, color="white", linewidth=1)
        axis.set(xlabel="random head classes | tail classes", xticks=[], yticks=[])
    if "tsne" in results:
        axis, counts = next(more), results.get("class_counts", [1] * len(results["tsne"]))
        points = axis.scatter(*np.array(results["tsne"]).T, c=np.log10(np.maximum(counts, 0.5)), s=10, cmap="viridis")
        figure.colorbar(points, ax=axis, label="log10 frequency")
        axis.set(xticks=[], yticks=[], xlabel="t-SNE, cosine")
    if "samples" in results:
        axis, found = next(more), results["samples"]
        points, is_rare = np.array(found["points"]), np.array(found["is_rare"])
        is_mean = np.arange(len(points)) >= len(points) - found["n_means"]
        for i, (name, part) in enumerate((("frequent", ~is_rare), ("rare", is_rare))):
            style = {"color": ("#56b4e9", "#d55e00")[i], "marker": "o^"[i]}
            axis.scatter(*points[part & ~is_mean].T, s=5, alpha=0.5, linewidths=0, **style)
            axis.scatter(*points[part & is_mean].T, s=40, edgecolors="black", label=f"{name}: class mean", **style)
        axis.set(xticks=[], yticks=[], xlabel="t-SNE of images, cosine")
    save_figure(figure, path, axes[0], axes[-1])


# ------------------------------------------------------------------------------ debias


def label_prior(logits: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """GLA's estimate of the label prior [C] that a zero-shot model learned with, from labelled held-out images.

    argmin over q in the simplex of mean CE(logits - ln q + ln pi, labels), pi the labels' own shares, so that the
    labels need not be balanced. Convex in z = ln q; a class without images gets the mean z by a ridge of 1e-4.
    Source: arXiv 2310.08106, section 4.2; solved to its optimum, where mean softmax(logits - z + ln pi) = pi.
    """
    N, C = logits.shape
    share = np.bincount(labels, minlength=C) / N
    with np.errstate(divide="ignore"):
        logits = logits.astype(np.float64) + np.log(share)
    ridge = 1e-4 if (share == 0).any() else 0.0

    def objective(z: np.ndarray) -> tuple[float, np.ndarray]:
        log_p, spread = log_softmax(logits - z, axis=1), z - z.mean()
        value = -log_p[np.arange(N), labels].mean() + ridge * (spread**2).sum()
        return value, share - np.exp(log_p).mean(0) + 2 * ridge * spread

    found = scipy.optimize.minimize(objective, np.zeros(C), jac=True, method="L-BFGS-B",
                                    options={"ftol": 1e-15, "gtol": 1e-9, "maxiter": 2000})
    return softmax(found.x)


def prior_interval(logits: np.ndarray, labels: np.ndarray, q: np.ndarray) -> np.ndarray:
    """[C, 2] 95 % interval of label_prior's q over the images within their classes; NaN where the optimum is not
    unique, as for a model that is never in doubt (of one that hardly ever is, the intervals are too short).

    What an image adds to ln q is a Newton step; the sum of their squared deviations within classes is the variance of
    log odds, n / (n - 1) times as in class_mean, with its t quantile. Classes with a single image count as one class.
    """
    (N, C), n_images, log_q = logits.shape, np.bincount(labels, minlength=len(q)), np.log(np.maximum(q, 1e-300))
    with np.errstate(all="ignore"):
        p = softmax(logits.astype(np.float64) - log_q + np.log(n_images / N), axis=1)
        # Shifts of all ln q change nothing: 1 / C fixes them. The ridge is label_prior's.
        curvature = np.diag(p.mean(0)) - p.T @ p / N + 1 / C
        curvature += 2e-4 * (np.eye(C) - 1 / C) if (n_images == 0).any() else 0
        try:
            inverse = scipy.linalg.cho_solve(scipy.linalg.cho_factor(curvature - 1e-9 * np.eye(C)), np.eye(C))
        except np.linalg.LinAlgError:
            return np.full((C, 2), np.nan)
        strata = np.where(n_images[labels] > 1, labels, C)
        n = np.bincount(strata)[strata, None]
        p[np.arange(N), labels] -= 1
        step = (p - class_means(p, strata, C + 1)[strata]) * np.sqrt(n / np.maximum(n - 1, 1)) / N
        square = (step @ (inverse - np.outer(inverse @ q, np.ones(C)))) ** 2  # [N, C], of ln q: z less its mean over q
        variance = square.sum(0)
        half = t_quantile(variance, (square**2).sum(0) - variance**2 / N) * np.sqrt(variance) / (1 - q)
        return expit(logit(q)[:, None] + half[:, None] * [-1, 1])


def best_of(values: list, make: Callable, labels: np.ndarray, boot: int, seed: int) -> dict:
    """The value whose make(value) [N, C] has the best balanced accuracy on held-out labels, the first among equals; and
    the share of resamples in which it has: a choice has no interval."""
    right = np.array([make(v).argmax(1) == labels for v in values]) / np.bincount(labels)[labels]  # [values, N]
    rows, rng = np.arange(len(labels)), np.random.default_rng(seed)
    best = np.array([(right @ np.bincount(rows[i], minlength=len(rows))).round(9).argmax()
                     for i in resamples(labels, boot, rng)])
    return {"value": values[best[0]], "wins": float((best[1:] == best[0]).mean()) if boot else None}


def debias_logits(zs: dict, ft: dict, val: dict[str, np.ndarray], log_prior: np.ndarray, is_calibrated: bool,
                  boot: int, seed: int) -> tuple[dict[str, np.ndarray], dict]:
    """Logits [N, C] of every method on the test images, and what was chosen on the held-out ones.

    zs, ft: test predictions of the zero-shot and the fine-tuned model. val: `zs`, `ft`, `labels` and perhaps
    `ft_features` of held-out images. log_prior: [C] of the downstream training set. Nothing here sees a test label.
    """
    f_zs, f_ft, y = zs["logits"].astype(np.float32), ft["logits"].astype(np.float32), val["labels"]
    v_zs, v_ft, chosen = val["zs"].astype(np.float32), val["ft"].astype(np.float32), {}
    if is_calibrated:
        chosen = {f"T {name}": estimate(t, temperature_draws(v, y, t, boot, np.random.default_rng(seed)))
                  for name, v in (("zero-shot", v_zs), ("fine-tuned", v_ft)) for t in [fit_temperature(v, y)]}
        f_zs, v_zs = (f / chosen["T zero-shot"]["value"] for f in (f_zs, v_zs))
        f_ft, v_ft = (f / chosen["T fine-tuned"]["value"] for f in (f_ft, v_ft))
    q = label_prior(v_zs, y)
    log_mean = np.log(np.maximum(softmax(v_zs.astype(np.float64), axis=1).mean(0), 1e-12))
    grid = [round(0.1 * i, 1) for i in range(21)]
    chosen |= {"lambda": best_of(grid, lambda t: v_zs - t * log_mean, y, boot, seed),
               "tau": best_of(grid, lambda t: v_ft - t * log_prior, y, boot, seed)}
    out = {"zero-shot": f_zs, "fine-tuned": f_ft, "zero-shot - ln q": f_zs - np.log(q),
           "zero-shot - lambda ln mean": f_zs - chosen["lambda"]["value"] * log_mean,
           "logit adjustment": f_ft - chosen["tau"]["value"] * log_prior, "sum": f_zs + f_ft,
           "GLA": f_ft + f_zs - np.log(q) - log_prior}
    norms = np.linalg.norm(ft.get("prototypes", np.ones((1, 1))).astype(np.float64), axis=1, keepdims=True).clip(1e-12)
    widths = {v.shape[1] for v in (val.get("ft_features"), ft.get("features"), ft.get("prototypes")) if v is not None}
    head = lambda x, t: x.astype(np.float64) @ (ft["prototypes"].astype(np.float64) / norms**t).T  # noqa: E731
    # A cosine head has tau 1 already. With tau 0 it is the model (but for ties of float16), or features and prototypes
    # are not those of the logits: dino_laionet.py's probe standardises features and has a bias.
    if "ft_features" in val and "features" in ft and len(widths) == 1 and np.ptp(norms) > 1e-2 * norms.mean() \
            and (head(val["ft_features"], 0).argmax(1) == val["ft"].argmax(1)).mean() > 0.99:
        chosen["tau-norm"] = best_of(grid[:11], lambda t: head(val["ft_features"], t), y, boot, seed)
        out["tau-normalised"] = head(ft["features"], chosen["tau-norm"]["value"])
    return out, chosen | {"q": q, "q_interval": prior_interval(v_zs, y, q)}


def debias(zeroshot: str, finetuned: str, val_zeroshot: str, val_finetuned: str, more: dict[str, str],
           wiseft: list[str], prior: str, group_by: str, is_calibrated: bool, boot: int, seed: int) -> dict:
    """Head, medium and tail accuracy of every debiasing, and the differences to both models on the same images.

    Held-out images: --val-*, else a random half of every class of the files, which then is not scored. wiseft: files of
    which the one with the best balanced accuracy on that half is a row.
    """
    zs, ft = (read_predictions(path, "logits") for path in (zeroshot, finetuned))
    extra = {name: read_predictions(path, "logits") for name, path in more.items()}
    mixed = {path: read_predictions(path, "logits") for path in wiseft}
    for data in (ft, *extra.values(), *mixed.values()):
        check_same(zs, data)
    labels, C, test = zs["labels"], zs["n_classes"], np.ones(len(zs["labels"]), bool)
    if val_zeroshot:
        held_out = [read_predictions(path, "logits") for path in (val_zeroshot, val_finetuned)]
        check_same(*held_out)
        for data, tested in zip(held_out, (zs, ft)):
            refuse(share_rows(data["logits"], tested["logits"]), f"{data['path']} holds the test images")
        refuse(held_out[0]["n_classes"] != C, f"{val_zeroshot} has {held_out[0]['n_classes']} classes, {zeroshot} {C}")
    else:
        order = np.random.default_rng(seed).permutation(len(labels))
        test[order[np.argsort(labels[order], kind="stable")][::2]] = False  # every other image of a class
        held_out = [with_rows(data, ~test) for data in (zs, ft)]
        refuse(not test.any(), f"{zeroshot}: {len(labels)} images, too few to hold out half")
    counts = read_counts(prior, ft.get("class_names"), C) if prior not in ("", "uniform") else ft.get("class_counts")
    counts = np.ones(C) if prior == "uniform" and group_by == "prior" else counts
    if counts is None:
        way = "--group-by prior" if prior == "uniform" else "--prior FILE or uniform"
        raise SystemExit(f"{finetuned}: no class_counts of {C} classes: pass {way}")
    least = 0.5 * min(1, counts[counts > 0].min(initial=1))  # never seen: half an image, or half of the least share
    share = np.ones(C) if prior == "uniform" else np.maximum(counts, least)
    val = {"zs": held_out[0]["logits"], "ft": held_out[1]["logits"], "labels": held_out[0]["labels"]}
    val |= {"ft_features": held_out[1]["features"]} if "features" in held_out[1] else {}
    cut = [with_rows(data, test) for data in (zs, ft)]
    outcome, chosen = debias_logits(*cut, val, np.log(share / share.sum()), is_calibrated, boot, seed)
    refuse(mixed and "WiSE-FT" in extra, "--more: --wiseft makes the row WiSE-FT")
    if mixed:
        best = best_of(wiseft, lambda path: mixed[path]["logits"][~test], val["labels"], boot, seed)
        extra, chosen = extra | {"WiSE-FT": mixed[best["value"]]}, chosen | {"WiSE-FT": best}
    refuse(set(outcome) & set(extra), f"--more: the table has {', '.join(set(outcome) & set(extra))} already")
    predictions = {name: f.argmax(1) for name, f in outcome.items()}
    predictions |= {"zero-shot": predict(cut[0])[0], "fine-tuned": predict(cut[1])[0]}
    same = {"lambda": ("zero-shot - lambda ln mean", "zero-shot"), "tau": ("logit adjustment", "fine-tuned")}
    # By nothing it is the model itself, ties too.
    predictions |= {a: predictions[b] for key, (a, b) in same.items() if chosen[key]["value"] == 0}
    predictions |= {name: predict(data)[0][test] for name, data in extra.items()}
    order_by = chosen["q"] if group_by == "prior" else counts
    rows, draws, parts = {}, {}, {"balanced": np.arange(C)} | thirds(order_by)
    tested = np.bincount(labels[test], minlength=C)
    means = lambda top1, per_class: {"top1": top1} | {  # noqa: E731
        k: class_mean(per_class[:, ids], tested[ids]) for k, ids in parts.items()}
    for name, predicted in predictions.items():
        n_test, right, n_predicted = resample_images(labels[test], predicted, C, boot, np.random.default_rng(seed))
        hit = (labels[test] == predicted).astype(float)
        top1 = np.r_[hit.mean(), bootstrap(hit, boot, np.random.default_rng(seed))]
        draws[name] = top1, ratio(right, n_test)  # [1 + boot], [1 + boot, C]
        n = {"top1": len(hit)} | {k: tested[ids].sum() for k, ids in parts.items()}
        rows[name] = {k: from_draws(d.clip(0, 1), n_images=n[k]) for k, d in means(*draws[name]).items()}
        rows[name]["spearman_pred"] = spearman(order_by, n_predicted[0], boot, np.random.default_rng(seed))
    # Of the differences, not differences of means: class_mean widens by their own variances.
    minus = lambda name, base: means(*(a - b for a, b in zip(draws[name], draws[base])))  # noqa: E731
    deltas = {f"minus {base}": {name: {k: from_draws(d) for k, d in minus(name, base).items()}
                                for name in rows if name != base} for base in ("zero-shot", "fine-tuned")}
    return {"rows": rows} | deltas | {"chosen": chosen, "n_test": int(test.sum()), "n_held_out": len(val["labels"])}


def plot_debias(results: dict, path: str) -> None:
    """Head, medium, tail and balanced accuracy of every method."""
    figure, (axis,) = new_figure(1, 6.5)
    series = {key: [row[key] for row in results["rows"].values()] for key in ("head", "medium", "tail", "balanced")}
    interval_panel(axis, list(results["rows"]), series, "accuracy (%)", 100)
    save_figure(figure, path, axis)


# ------------------------------------------------------------------------------ wiseft


def interpolate(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor], alpha: float) -> dict[str, torch.Tensor]:
    """(1 - alpha) a + alpha b for every entry, batch norm's statistics too; alpha 0 and 1 are a and b, bit for bit.

    Whole-number buffers are rounded. Source: Wortsman et al., WiSE-FT, arXiv 2109.01903, section 3.
    """
    if alpha in (0, 1):
        return {name: (b if alpha else a)[name].clone() for name in a}
    mixed = {name: torch.lerp(a[name].double(), b[name].double(), alpha) for name in a}
    return {name: (m if a[name].is_floating_point() else m.round()).to(a[name].dtype) for name, m in mixed.items()}


def wiseft(paths: list[str], alphas: list[float], out: str) -> dict:
    """Write OUT/alpha_0.50.pt and so on: what the second checkpoint holds, with interpolated weights."""
    contents, rows = [read_state(path) for path in paths], {}
    wrapped = re.compile(r"^(module\.|_orig_mod\.)+|(?<=\.)_orig_mod\.")  # by DDP, torch.compile, or both
    a, b = ({wrapped.sub("", k): v for k, v in flat_tensors(c.get("state_dict", c), path).items()}
            for c, path in zip(contents, paths))
    for path, content, state in zip(paths, contents, (a, b)):
        state |= {k: content[k] for k in ("dino_prototypes",) if "state_dict" in content and k in content}
        broken = [k for k, v in state.items() if not (v.float() if v.element_size() == 1 else v).isfinite().all()]
        refuse(broken, f"{path}: {', '.join(broken[:5])} {'are' if len(broken) > 1 else 'is'} not finite")
    differing = sorted(k for k in a.keys() | b.keys() if k not in a or k not in b or a[k].shape != b[k].shape)
    refuse(differing or not a, f"{paths[0]} and {paths[1]}: {len(differing)} of {len(a | b)} entries are not in both "
           f"with the same shape: {', '.join(differing[:5])}")
    # Prototypes were made by one of the towers: they are kept only where both have the same.
    more = {k: v for k, v in contents[1].items() if k not in ("state_dict", "optimizer", "scaler", "rng", "seconds")}
    same = [c.get("prototypes") for c in contents]
    if not all(isinstance(p, torch.Tensor) for p in same) or not torch.equal(*same):
        more.pop("prototypes", None)
    for alpha in alphas:
        # Two decimals, more where they are needed.
        path = Path(out) / f"alpha_{np.format_float_positional(alpha, min_digits=2)}.pt"
        state = interpolate(a, b, alpha)
        beside = {k: state.pop(k) for k in ("dino_prototypes",) if k in state and "state_dict" in contents[1]}
        content = more | beside | {"state_dict": state} if "state_dict" in contents[1] else state
        write_atomically(path, lambda file, content=content: torch.save(content, file))
        rows[str(path)] = {"alpha": alpha, "evaluate with": f"--eval-only {path} --out {path.with_suffix('')}"}
    return {"rows": rows}


def wiseft_results(folder: str, id_set: str, shifts: list[str], boot: int, seed: int) -> dict:
    """Accuracy in distribution and under shift of FOLDER/alpha_*/, which the training script's --eval-only wrote."""
    rows = {}
    found = {number(p.name.removeprefix("alpha_"), str(p)): p for p in Path(folder).glob("alpha_*") if p.is_dir()}
    for alpha, path in sorted(found.items()):
        model = models_of_run(path, "wiseft", id_set, shifts, {}, {})
        names, missing = [k for k in model if k not in ("model", "group")], [s for s in shifts if s not in model]
        refuse(missing, f"{path}: no accuracy on {', '.join(missing)}, or none on {id_set} beside; --shifts and --id "
               "name the sets")
        refuse(not names or "average" in names, f"{path}: no {id_set} and shifts in its metrics.json or .npz, or one "
               "called average, which is their mean here")
        id_path = path / f"{id_set}.npz"  # over all of its classes; the pairs are over those of a shift
        whole = accuracy_of(read_predictions(id_path, "logits")) if id_path.is_file() else model[names[0]][:2]
        p, n = np.array([model[s][2:] for s in names]).T
        draws = binomial_draws(p, n, np.random.default_rng(seed).random((boot, len(n)))).mean(1)
        row = {id_set: clopper_pearson(*whole), "average": estimate(draws[0], draws[1:] if (n > 0).all() else None)}
        row |= {s: clopper_pearson(*model[s][2:]) for s in names}
        rows[np.format_float_positional(alpha, min_digits=2)] = row
        refuse(row.keys() != next(iter(rows.values())).keys(),
               f"{path}: has {', '.join(names)}, other alphas have other sets; --shifts chooses")
    refuse(not rows, f"{folder}: no alpha_*/ folders; evaluate the checkpoints first")
    return {"rows": rows, "id": id_set}


def plot_wiseft(results: dict, path: str) -> None:
    """ID accuracy against the shifts' average and against each shift, along alpha, on logit axes."""
    rows, id_set = list(results["rows"].values()), results["id"]
    shifts = [k for k in rows[0] if k != id_set]
    figure, axes = new_figure(len(shifts), 3.2, 2.8)
    for axis, shift in zip(axes, shifts):
        for alpha, at in zip(results["rows"], zip(*logit_points(axis, rows, id_set, shift, **line_style(0)))):
            axis.annotate(alpha, at, fontsize=7, xytext=(3, 3), textcoords="offset points")
        percent_axes(axis, rows, id_set, shift, f"{id_set} (%)")
    save_figure(figure, path)


# ------------------------------------------------------------------------------ concepts


def top_share(counts: np.ndarray) -> np.ndarray:
    """Share of the most frequent tenth of the classes over the last axis, NaN if all are 0."""
    counts = np.sort(counts, axis=-1)
    return ratio(counts[..., -max(1, counts.shape[-1] // 10):].sum(-1), counts.sum(-1))


def shared_tail(paths: list[str], boot: int, seed: int) -> dict:
    """Frequencies of the same classes in several data sets: shape of each tail, and rank agreement (figure 1a)."""
    tables, rng, rows = [read_named_counts(path)[0] for path in paths], np.random.default_rng(seed), {}
    common = [name for name in tables[0] if all(name in t for t in tables)]
    refuse(len(common) < 2, f"{', '.join(paths)}: {len(common)} classes in common; classes of the first are "
           f"{', '.join(list(tables[0])[:3])}, of the last {', '.join(list(tables[-1])[:3])}")
    counts = dict(zip(short_names(paths), np.array([[t[c] for c in common] for t in tables])))
    for name, n in counts.items():
        rows[name] = {"classes": len(n), "total": n.sum(), "max": n.max(), "min": n.min(),
                      "never seen": int((n == 0).sum()),
                      "median": estimate(np.median(n), bootstrap(n, boot, rng, lambda v: np.median(v, 1)))}
        rows[name] |= {key: estimate(of(n), bootstrap(n, boot, rng, of), biased_up_to=1)
                       for key, of in (("gini", gini), ("share of the top 10 %", top_share))}
        rows[name] |= {f"rho with {other}": spearman(n, m, boot, rng) for other, m in counts.items() if other != name}
    return {"rows": rows, "classes": common, "counts": counts}


def agreement(paths: list[str], boot: int, seed: int) -> dict:
    """Two frequency estimates A B of each concept set: Spearman over the classes in both, median ratio (figure 14)."""
    refuse(len(paths) % 2, f"agree takes pairs of files, A B for each concept set; got {len(paths)}")
    rows, joined, rng = {}, {}, np.random.default_rng(seed)
    for a, b in zip(paths[::2], paths[1::2]):
        x, y = read_named_counts(a)[0], read_named_counts(b)[0]
        both = [name for name in x if name in y]
        refuse(not both, f"{a} and {b}: no class in common")
        if single := [name for name in {**x, **y} if (name in x) != (name in y)]:
            print(f"left out {len(single)} classes that only one of {a} and {b} has: {', '.join(single[:5])}",
                  file=sys.stderr)
        u, v = (np.array([t[name] for name in both]) for t in (x, y))
        ratios = u[(u > 0) & (v > 0)] / v[(u > 0) & (v > 0)]
        name = f"{Path(a).stem}, {Path(b).stem}"
        name = f"{a}, {b}" if name in rows else name
        median = None
        if len(ratios):
            median = estimate(np.median(ratios), bootstrap(ratios, boot, rng, lambda r: np.median(r, 1)))
        rows[name] = {"classes": len(both), "rho": spearman(u, v, boot, rng), "median A / B": median}
        joined[name] = [u, v]
    return {"rows": rows, "pairs": joined}


def concept_sets(paths: list[str], counts: str, boot: int, seed: int) -> dict:
    """Correlations of several models on several concept sets: MODEL/SET.npz; means over models (figure 12)."""
    sets, keys, rows = {}, ("top1", "spearman_acc", "spearman_pred"), {}
    for path in paths:
        data = read_predictions(path, "predictions", "class_counts", counts=counts)
        row = score_classes(data, (100, 20), 0, 10, boot, seed)[0]
        sets.setdefault(Path(path).stem, {})[str(Path(path).parent)] = {key: row[key] for key in keys}
    for name, models in sets.items():
        rows[name] = {"models": len(models)} | {key: over_runs([m[key] for m in models.values()], key) for key in keys}
    return {"rows": rows, "models": sets}


def plot_concepts(results: dict, path: str) -> None:
    """The figure of whichever of the three was asked for."""
    if "counts" in results:
        figure, axes = new_figure(1, 6)
        first = next(iter(results["counts"]))
        order = np.argsort(-np.array(results["counts"][first]), kind="stable")
        for i, (name, n) in enumerate(results["counts"].items()):
            n, color = np.maximum(np.array(n)[order], 0.5), COLORS[i % len(COLORS)]
            axes[0].plot(n, color=color, alpha=0.25, linewidth=0.6)
            axes[0].plot(scipy.ndimage.gaussian_filter1d(n, 3), color=color, linestyle=DASHES[i % len(DASHES)],
                         label=name, linewidth=1.2)
        axes[0].set(yscale="log", xlabel=f"classes by falling frequency in {first}", ylabel="frequency")
    elif "pairs" in results:
        figure, axes = new_figure(len(results["pairs"]), 3.4)
        for axis, (name, (u, v)) in zip(axes, results["pairs"].items()):
            axis.scatter(np.maximum(u, 0.5), np.maximum(v, 0.5), s=8, color="black", alpha=0.5, linewidths=0)
            a, _, b = name.partition(", ")
            axis.set(xscale="log", yscale="log", xlabel=a, ylabel=b,
                     title=f"Spearman {value_of(results['rows'][name]['rho']):.2f}")
    else:
        figure, axes = new_figure(2, 5)
        for axis, key, title in zip(axes, ("spearman_acc", "spearman_pred"), ("accuracy", "predictions")):
            interval_panel(axis, list(results["rows"]), {"mean": [row[key] for row in results["rows"].values()]},
                           f"Spearman of frequency and {title}")
            for j, models in enumerate(results["models"].values()):
                axis.scatter([j] * len(models), [value_of(m[key]) for m in models.values()], s=14, color="0.6")
    save_figure(figure, path, axes[0])


# ------------------------------------------------------------------------------ report

REPORT_KEYS = {"top1": "top-1", "balanced": "balanced", "head": "head", "medium": "medium", "tail": "tail",
               "spearman_acc": "rho(freq, acc)", "spearman_pred": "rho(freq, pred)"}
PAGE = """<!doctype html><html lang="en"><head><meta charset="utf-8"><title>Runs side by side</title>
<meta name="viewport" content="width=device-width, initial-scale=1"><link rel="icon" href="data:,">
<meta http-equiv="Content-Security-Policy"
 content="default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'unsafe-inline'">
<style>
:root { --ink: #1b1b1b; --paper: #fff; --line: #d5d5d5; --c0: #000; --c1: #d55e00; --c2: #0072b2; --c3: #b07c00;
 --c4: #007a5a; --c5: #b0528a; --c6: #2a8fd0; color-scheme: light dark }
@media (prefers-color-scheme: dark) { :root { --ink: #e6e6e6; --paper: #16181a; --line: #44484c; --c0: #fff;
 --c1: #ff8c3a; --c2: #6db6f2; --c3: #f0c04a; --c4: #3fcf9f; --c5: #e79ac6; --c6: #9ad4f7 } }
body { font: 15px/1.5 system-ui, sans-serif; color: var(--ink); background: var(--paper); margin: 1rem auto;
 max-width: 1300px; padding: 0 .8rem }
h1 { font-size: 1.4rem } h2 { font-size: 1.1rem; margin: 1.6rem 0 .4rem }
.wide { overflow-x: auto } table { border-collapse: collapse; font-variant-numeric: tabular-nums }
th, td { padding: .25rem .6rem; border-bottom: 1px solid var(--line); text-align: right; white-space: nowrap }
th:first-child, td:first-child { text-align: left } th button { font: inherit; font-weight: 600; color: inherit;
 background: none; border: 0; padding: 0; cursor: pointer } th[aria-sort=ascending] button::after { content: " \\2191" }
th[aria-sort=descending] button::after { content: " \\2193" } small { opacity: .75 }
.charts { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(300px, 100%), 1fr)); gap: .8rem }
img { max-width: max(100%, 700px); background: #fff }
figure { margin: 0 } figcaption { font-size: .85rem } svg { width: 100%; height: auto; display: block }
svg text { fill: var(--ink); font-size: 11px } .axis { stroke: var(--line); fill: none }
</style></head><body>
BODY
<script>
for (const button of document.querySelectorAll("th button")) button.addEventListener("click", () => {
  const th = button.parentNode, row = th.parentNode, body = row.parentNode.nextElementSibling;
  const i = [...row.children].indexOf(th), up = th.getAttribute("aria-sort") === "descending";
  for (const other of row.children) other.removeAttribute("aria-sort");
  th.setAttribute("aria-sort", up ? "ascending" : "descending");
  const key = r => r.children[i].dataset.v;
  body.append(...[...body.children].sort((a, b) => {
    const x = key(a), y = key(b);
    if (x === "" || y === "") return (x === "") - (y === "");
    const order = isNaN(x) || isNaN(y) ? x.localeCompare(y) : x - y;
    return up ? order : -order; }));
});
</script></body></html>
"""


def from_metrics(known: dict) -> dict[str, dict]:
    """Estimates of one set's numbers in metrics.json, with the intervals that can be had from them.

    top-1 equals balanced accuracy where all C = 1 / chance classes have n / C images: then groups of classes have known
    numbers of them. Correlations over C classes: Fisher's z with the variance of Bonett and Wright (Psychometrika 65,
    2000), (1 + rho^2 / 2) / (C - 3).
    """
    n, C, top1 = known.get("n", math.nan), max(1, round(1 / max(known.get("chance", 1), 1e-9))), known["top1"]
    is_even = 0 < top1 < 1 and abs(known.get("balanced", math.nan) - top1) < 1e-9 and n % C == 0
    sizes = {"balanced": C, "head": C // 3, "medium": C // 3, "tail": C - 2 * (C // 3)}
    images = {"top1": n} | {key: n * size / C if is_even else math.nan for key, size in sizes.items()}
    row = {key: clopper_pearson(known[key], images[key]) for key in images if key in known}
    for key, is_over_all in (("spearman_acc", is_even), ("spearman_pred", True)):
        row[key] = estimate(known.get(key))
        if key in known and is_over_all and C > 3 and abs(known[key]) < 1:
            rho, half = known[key], 1.96 * math.sqrt((1 + known[key] ** 2 / 2) / (C - 3))
            row[key] |= {"low": math.tanh(math.atanh(rho) - half), "high": math.tanh(math.atanh(rho) + half)}
    return {key: row.get(key, estimate(None)) for key in REPORT_KEYS}


def score_run(folder: Path, boot: int, seed: int) -> dict[str, dict]:
    """{test set: {metric: estimate}} of a run: from its <set>.npz, else from metrics.json alone (from_metrics; recalls
    and what else has no interval there are marked in the tables)."""
    metrics, out = read_metrics(folder), {}
    for name in dict.fromkeys([*metrics, *sorted(p.stem for p in folder.glob("*.npz"))]):
        path, known, row = folder / f"{name}.npz", metrics.get(name, {}), {}
        is_scored = ("top1" in known or not known) and path.is_file() and has_predictions(path)
        data = read_predictions(path, "predictions") if is_scored else {}
        if "class_counts" in data:
            row, classes = score_classes(data, (100, 20), 0, 10, boot, seed)
            bins = binned_statistics(frequency_bins(data["class_counts"], 8, False), data["class_counts"],
                                     classes["accuracy"], classes["predictions"].astype(float), boot,
                                     np.random.default_rng(seed))
            row["bins"] = [(math.log10(max(b["count"], 0.5)), *b["accuracy"].values(), f"{b['n_classes']} classes")
                           for b in bins if b["accuracy"]["value"] is not None]
        elif data and not known:  # nor are the frequencies
            scored = score_classes(data | {"class_counts": np.zeros(data["n_classes"])}, (100, 20), 0, 10, boot, seed)
            row = {key: scored[0][key] for key in ("n", "top1", "balanced")}
        elif known:
            row = {"n": known.get("n")} | (from_metrics(known) if "top1" in known else {})
        row |= {k: clopper_pearson(known[k], known.get("n", math.nan)) for k in ("knn", "probe") if k in known}
        recalls = {k: estimate(v) for k, v in known.get("retrieval", {}).items()}
        if recalls and path.is_file() and "text_features" in read_npz(path, ("text_features",)):
            ks = sorted({int(found[1]) for k in recalls if (found := re.search(r"_r(\d{1,9})$", k))})
            recalls = next(iter(retrieval([str(path)], ks, boot, seed, "cpu")["rows"].values()))
        row |= {f"retrieval {k}": v for k, v in recalls.items() if "_r" in k}
        if row.keys() - {"n"}:
            out[name] = row
    return out


def mark(entry: dict | float | str | None, sign: str = " †") -> str:
    """The sign of an estimate without an interval; nothing for others."""
    return sign if isinstance(entry, dict) and entry.get("value") is not None and entry.get("low", 0) is None else ""


def html_cell(entry: dict | float | str | None) -> str:
    """A table cell: the interval small, the value in data-v, by which columns are sorted."""
    value = value_of(entry)
    if isinstance(value, str | bool):
        return f'<td data-v="{escape(str(value))}">{escape(str(value))}</td>'
    if not math.isfinite(value):
        return '<td data-v="">-</td>'
    if not isinstance(entry, dict):
        shown = f"{value:g}" if isinstance(value, float) else value  # 3256561, not 3.25656e+06
        return f'<td data-v="{shown}">{shown}</td>'
    ends = f" <small>{entry['low']:.3f} to {entry['high']:.3f}</small>" if entry.get("low") is not None else mark(entry)
    return f'<td data-v="{value:.6g}">{value:.3f}{ends}</td>'


def both_tables(title: str, rows: dict[str, dict], columns: dict[str, str]) -> tuple[str, list[str]]:
    """A table under a heading: as HTML that a click on a column's name sorts, and as lines of Markdown."""
    head = "".join(f"<th><button>{escape(name)}</button></th>" for name in ("run", *columns.values()))
    body = "\n".join(f"<tr>{html_cell(name)}{''.join(html_cell(row.get(c)) for c in columns)}</tr>"
                     for name, row in rows.items())
    lines = [["run", *columns.values()], ["---"] * (len(columns) + 1)]
    lines += [[name, *(cell(row.get(c)) + mark(row.get(c)) for c in columns)] for name, row in rows.items()]
    lines = [[text.replace("|", "\\|") for text in line] for line in lines]
    return (f'<h2>{escape(title)}</h2><div class="wide"><table><thead><tr>{head}</tr></thead><tbody>\n{body}\n</tbody>'
            "</table></div>", [f"## {title}", "", *(f"| {' | '.join(line)} |" for line in lines), ""])


def nice_ticks(low: float, high: float) -> list[float]:
    """Three to six round numbers inside [low, high]."""
    step = 10 ** math.floor(math.log10(max(high - low, 1e-9)))
    step = next(s for s in (step * 5, step * 2, step, step / 2, step / 5) if (high - low) / s >= 3)
    return [round(i * step, 10) for i in range(math.ceil(low / step), math.floor(high / step) + 1)]


def svg_chart(series: dict[str, list[tuple]], title: str, x_title: str, x_names: list[str] | None = None,
              is_line: bool = False, is_logit: bool = False) -> str:
    """One chart as inline SVG: {series: [(x, y, low, high, tip)]}, error bars, a tooltip a point.

    x_names: names of x = 0, 1, ... in place of numbers. is_logit: axes of fractions are their log odds, with the line
    y = x. Series differ in colour (the page's) and shape.
    """
    points = [p for ps in series.values() for p in ps]
    values = [p[0] for p in points], [v for p in points for v in p[1:4] if v is not None]
    (x0, x1), (y0, y1) = ((min(v) - pad, max(v) + pad) for v in values
                            for pad in [0.06 * (max(v) - min(v) if max(v) - min(v) > 1e-6 else 1)])
    bend = (lambda v: float(logit(min(max(v, 1e-3), 0.999)))) if is_logit else (lambda v: v)  # noqa: E731
    (u0, u1), (v0, v1) = map(bend, (x0, x1)), map(bend, (y0, y1))

    def at(x: float, y: float) -> str:
        return f"{48 + 262 * (bend(x) - u0) / (u1 - u0 or 1):.1f} {190 - 170 * (bend(y) - v0) / (v1 - v0 or 1):.1f}"

    legend = "".join(f' <span style="color:var(--c{i % 7})">{"●■◆▲▼✚✕"[i % 7]}</span> {escape(name)}'
                     for i, name in enumerate(series) if len(series) > 1)
    short = [name if len(name) < 15 else name[:6] + ".." + name[-6:] for name in x_names or []]
    height = 214 + 4 * max(map(len, short)) if short else 226
    out = [f'<figure><figcaption>{escape(title)}<small>{legend}</small></figcaption>',
           f'<svg viewBox="0 0 320 {height}" role="img" aria-label="{escape(title)}">',
           '<path class="axis" d="M48 20V190H310"/>']
    if is_logit and max(x0, y0) < min(x1, y1):
        low, high = max(x0, y0, 1e-3), min(x1, y1, 0.999)
        out.append(f'<path class="axis" stroke-dasharray="2 2" d="M{at(low, low)}L{at(high, high)}"/>')
    text = '<text transform="translate({}) {}" text-anchor="{}">{}</text>'
    ticks = [(at(x0, t), "h-4", "translate(-7 4)", "end", t) for t in nice_ticks(y0, y1)]
    ticks += [(at(t, y0), "v4", "translate(0 15)", "middle", t) for t in nice_ticks(x0, x1) if not x_names]
    for place, mark, shift, anchor, t in ticks:
        out += [f'<path class="axis" d="M{place}{mark}"/>', text.format(place, shift, anchor, f"{t:g}")]
    for i, name in enumerate(short):
        out.append(text.format(at(i, y0), "translate(0 14) rotate(-40)", "end", escape(name)))
    out.append("" if x_names else text.format("180 222", "", "middle", escape(x_title)))
    shapes = ("m-4 0a4 4 0 1 0 8 0a4 4 0 1 0 -8 0z", "m-4 -4h8v8h-8z", "m0 -5l5 5l-5 5l-5 -5z", "m0 -5l5 9h-10z",
              "m0 5l5 -9h-10z", "m-5 -1.5h3.5v-3.5h3v3.5h3.5v3h-3.5v3.5h-3v-3.5h-3.5z", "m-4 -4l8 8m0 -8l-8 8")
    for i, ps in enumerate(series.values()):
        color, dashes = f"var(--c{i % 7})", ("", "5 3", "2 2", "6 2 2 2")[i % 4]
        if is_line and len(ps) > 1:
            out.append(f'<path fill="none" stroke="{color}" stroke-dasharray="{dashes}" '
                       f'd="M{"L".join(at(*p[:2]) for p in ps)}"/>')
        for x, y, low, high, tip in ps:
            bar = f"M{at(x, low)}L{at(x, high)}" if low is not None else ""
            out.append(f'<g stroke="{color}" fill="{color}"><title>{escape(tip)}</title><path d="{bar}"/><path '
                       f'd="M{at(x, y)}{shapes[i % 7]}"/></g>')
    return "".join(out) + "</svg></figure>"


def chart_points(rows: dict[str, dict], key_x: str, key_y: str, x_names: list[str]) -> dict[str, list[tuple]]:
    """Points of svg_chart: key_x empty puts runs in order; SERIES/X names make a series each."""
    series = {}
    for name, row in rows.items():
        group, _, place = name.rpartition("/")
        y, x = row.get(key_y), value_of(row.get(key_x)) if key_x else float(x_names.index(place))
        if math.isfinite(value_of(y)) and math.isfinite(x):
            series.setdefault(group, []).append((x, y["value"], y["low"], y["high"], f"{name}: {cell(y)}"))
    return series


def set_section(test_set: str, rows: dict[str, dict], x_names: list[str]) -> tuple[str, list[str], dict[str, str]]:
    """HTML (table and charts) and Markdown lines of the runs on one test set, and the columns {metric: title}."""
    present = {c for row in rows.values() for c in row}
    columns = {"n": "n"} | {k: v for k, v in REPORT_KEYS.items() if k in present} | {
        c: c for c in sorted(present) if c.startswith(("retrieval", "knn", "probe"))}
    x_title = REPORT_KEYS["spearman_acc"]
    charts = [svg_chart(points, title, "", x_names, is_line=True) for key, title in columns.items()
              if key != "n" and (points := chart_points(rows, "", key, x_names))]
    charts += [svg_chart(points, f"{REPORT_KEYS[key]} against {x_title}", x_title) for key in ("spearman_pred", "top1")
               if len(rows) > 1 and (points := chart_points(rows, "spearman_acc", key, x_names))]
    bins = {name: row["bins"] for name, row in rows.items() if "bins" in row}
    if bins:
        title = "accuracy of frequency bins" + f", the first 7 of {len(bins)} runs" * (len(bins) > 7)  # or a tangle
        charts.append(svg_chart(dict(list(bins.items())[:7]), title, "log10 of the training images of the class",
                                is_line=True))
    text, lines = both_tables(test_set, rows, columns)
    return f'{text}<div class="charts">{"".join(charts)}</div>', lines, columns


def file_section(name: str, path: Path, is_drawn: bool) -> tuple[str, list[str]]:
    """HTML (tables and, if is_drawn, the command's own plot, inside the page) and Markdown lines of a --json."""
    refuse(not path.is_file(), f"{path}: cannot be read: no such file")
    content, text, lines = read_json(path), "", []
    with reading(path, ": not what --json of evaluate.py writes"):
        for key in ("rows", *EXTRA_TABLES):
            rows = content["rows"] if key == "rows" else content.get(key)
            if rows:
                rows = named_rows(rows)
                columns = {c: c for row in rows.values() for c in row}
                more = both_tables(name if key == "rows" else f"{name}: {key}", rows, columns)
                text, lines = text + more[0], lines + more[1]
        if content["command"] in PLOTS and is_drawn and (content["command"] != "wiseft" or "id" in content):
            with tempfile.TemporaryDirectory() as folder:
                PLOTS[content["command"]](content, f"{folder}/plot.svg")
                image = base64.b64encode(Path(folder, "plot.svg").read_bytes()).decode()
            alt = escape(f"{content['command']}: {name}")
            text += f'<div class="wide"><img alt="{alt}" src="data:image/svg+xml;base64,{image}"></div>'
    return text, lines


def report_runs(runs: list[str], id_set: str, out: str, markdown: str, boot: int, seed: int) -> dict:
    """Write the page and the tables of runs, scored, and of results of other commands.

    runs: NAME=FOLDER, where NAME may be SERIES/X, which puts runs on an axis; NAME=FILE.json.
    """
    named = dict((name or Path(path).name, path) for name, path in map(split_name, runs))
    files = {name.removesuffix(".json"): Path(path) for name, path in named.items() if path.endswith(".json")}
    folders = {name: Path(path) for name, path in named.items() if not path.endswith(".json")}
    if len(named) < len(runs) or not all(p.is_dir() for p in folders.values()):
        raise SystemExit(f"runs are folders with different names: {', '.join(f'{k}={v}' for k, v in named.items())}")
    scores = {name: score_run(folder, boot, seed) for name, folder in folders.items()}
    empty = [named[name] for name, score in scores.items() if not score]
    refuse(empty, f"{', '.join(empty)}: neither metrics.json nor <set>.npz that could be scored")
    sets = sorted(dict.fromkeys(s for score in scores.values() for s in score), key=lambda s: s != id_set)
    x_names = list(dict.fromkeys(name.rpartition("/")[2] for name in scores))
    body, lines, tables, shifted = [], ["# Runs side by side", ""], {}, {}
    if scores:
        body = [f"<h1>{len(scores)} runs on {len(sets)} test sets</h1>",
                f"<p>Intervals are 95 %: images resampled for accuracies, classes for correlations, {boot} times; of "
                "runs with metrics.json alone, by formulas. A click on a column's name sorts.</p>"]
    for test_set in sets:
        rows = {name: score[test_set] for name, score in scores.items() if test_set in score}
        text, more, columns = set_section(test_set, rows, x_names)
        body, lines = [*body, text], lines + more
        tables[test_set] = {name: {c: row.get(c) for c in columns} for name, row in rows.items()}
    judged = {name: score for name, score in scores.items() if score.get(sets[0], {}).get("top1")}
    other = {p.name.removesuffix("_test.npz") for f in folders.values() for p in f.glob("transfer/*_test.npz")}
    common = [s for s in sets[1:] if s not in {"train", *other}
              and all(score.get(s, {}).get("top1") for score in judged.values())]
    for name, score in judged.items() if common else ():
        shifted[name] = {"id": score[sets[0]]["top1"], "shift": mean_of([score[s]["top1"] for s in common])}
    points = chart_points(shifted, "id", "shift", x_names)
    if points:
        title = f"mean top-1 of {', '.join(common)} against {sets[0]}"
        chart = svg_chart(points, title, f"top-1, {sets[0]}", is_logit=True)
        body.append(f'<h2>Under shift</h2><div class="charts">{chart}</div>')
    is_drawn = importlib.util.find_spec("matplotlib") is not None
    if files and not is_drawn:
        print(f"{', '.join(files)}: tables without plots: pip install matplotlib", file=sys.stderr)
    for name, path in files.items():
        text, more = file_section(name, path, is_drawn)
        body, lines = [*body, text], lines + more
    note = f"† {NO_INTERVAL}"
    if any("†" in text for text in lines):
        body, lines = [*body, f"<p>{note}</p>"], [*lines, note, ""]
    write_atomically(Path(out), lambda file: file.write(PAGE.replace("BODY", "\n".join(body)).encode()))
    if markdown:
        write_atomically(Path(markdown), lambda file: file.write("\n".join(lines).encode()))
    rows = {n: {k: score[sets[0]].get(k) for k in REPORT_KEYS} for n, score in scores.items() if sets[0] in score}
    return {"rows": rows or {name: {"file": str(path)} for name, path in files.items()}, "sets": tables,
            "written": [p for p in (out, markdown) if p]}


# ------------------------------------------------------------------------------ output

COLORS = ("#000000", "#d55e00", "#0072b2", "#e69f00", "#009e73", "#cc79a7", "#56b4e9")  # Okabe and Ito
PLOTS = {"imbalance": plot_imbalance, "robustness": plot_robustness, "compare": plot_compare, "probe": plot_transfer,
         "knn": plot_transfer, "fewshot": plot_transfer, "retrieval": plot_retrieval, "calibration": plot_calibration,
         "collapse": plot_collapse, "similarity": plot_similarity, "prototypes": plot_prototypes,
         "debias": plot_debias, "wiseft": plot_wiseft, "concepts": plot_concepts}
EXTRA_TABLES = ("bins_over_models", "fits", "mcnemar", "minus zero-shot", "minus fine-tuned")
TURNED = ("imbalance", "robustness", "probe", "knn", "fewshot", "retrieval", "calibration")  # a line a column
NO_INTERVAL = ("has no interval: too few runs, models, classes or images, resamples that are all alike, --boot 0, or "
               "nothing in the files to make one from.")
MARKERS, DASHES = "osD^vPX", ("-", "--", "-.", ":")
GUIDE = {"color": "0.5", "linestyle": ":", "linewidth": 0.8}


def value_of(entry: dict | float | None) -> float:
    """The number of an estimate, or a plain number; NaN for None."""
    value = entry.get("value") if isinstance(entry, dict) else entry
    return math.nan if value is None else value


def error_bars(cells: list[dict]) -> np.ndarray:
    """[2, n] lengths below and above the values; 0 where there is no interval."""
    ends = np.array([[value_of(c), *(value_of(c) if c[e] is None else c[e] for e in ("low", "high"))] for c in cells])
    return np.maximum([ends[:, 0] - ends[:, 1], ends[:, 2] - ends[:, 0]], 0)


def line_style(i: int) -> dict:
    """Colour, marker and dashes of series i, for errorbar: told apart without colour too."""
    return {"color": COLORS[i % len(COLORS)], "marker": MARKERS[i % len(MARKERS)], "markersize": 4,
            "linestyle": DASHES[i % len(DASHES)], "linewidth": 1, "capsize": 2}


def interval_panel(axis, names: list[str], series: dict[str, list[dict]], ylabel: str, scale: float = 1) -> None:
    """Values with intervals: a place on the x axis for each name, the series side by side."""
    step = min(0.12, 0.8 / len(series))
    for i, (label, cells) in enumerate(series.items()):
        x = np.arange(len(names)) + (i - (len(series) - 1) / 2) * step
        axis.errorbar(x, [scale * value_of(c) for c in cells], scale * error_bars(cells), label=label,
                      **line_style(i) | {"linestyle": ""})
    if axis.get_ylim()[0] < 0:
        axis.axhline(0, **GUIDE)
    axis.set_xticks(range(len(names)), names, rotation=30, ha="right", fontsize=8)
    axis.set(ylabel=ylabel, xlim=(-0.5, len(names) - 0.5))


def new_figure(n_panels: int, width: float = 4.2, height: float = 3.2) -> tuple:
    """A matplotlib figure and its panels, at most four in a row."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise SystemExit("plots (--plot) need matplotlib: pip install matplotlib") from None
    columns = min(n_panels, 4)
    n_rows = math.ceil(n_panels / columns)
    figure = Figure((width * columns, height * n_rows), layout="constrained")
    axes = figure.subplots(n_rows, columns, squeeze=False).ravel()
    for i, axis in enumerate(axes):
        axis.spines[["top", "right"]].set_visible(False)
        axis.set_visible(i < n_panels)
    return figure, list(axes[:n_panels])


def save_figure(figure, path: str, *legends) -> None:
    """Write a figure, a legend where panels of `legends` have several series; no date: equal input, equal bytes."""
    import matplotlib

    for axis in legends:
        if len(axis.get_legend_handles_labels()[1]) > 1:
            axis.legend(fontsize=7, frameon=False)
    for text in figure.findobj(matplotlib.text.Text):  # a $ of a name is no formula; powers of ten on axes are
        text.set_parse_math("mathdefault" in text.get_text() or "$" not in text.get_text())
    kind = Path(path).suffix[1:]
    with matplotlib.rc_context({"svg.hashsalt": "evaluate", "svg.fonttype": "none"}):
        write_atomically(Path(path), lambda file: figure.savefig(
            file, format=kind, dpi=130, metadata={"Date": None} if kind == "svg" else {"Software": None}))


# Copied from clip.py
def write_atomically(path: Path, write: Callable) -> None:
    """Write a file under a temporary name, then put it in its place: a reader never sees half of it.

    write: called with the open binary file. A link stays one; a device or a pipe is written to, not replaced.
    Raises: SystemExit if the disk is full or the folder cannot be written; what was there before is kept.
    """
    place = os.path.realpath(path)
    part = Path(f"{place}.{os.getpid()}.part")
    try:
        if path.exists() and not path.is_file():
            with open(path, "wb") as file:
                write(file)
            return
        part.parent.mkdir(parents=True, exist_ok=True)
        with open(part, "wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, place)
    except (OSError, RuntimeError) as error:  # torch.save reports a full disk as RuntimeError
        raise SystemExit(f"cannot write {path}: {str(error)[:200]}; a checkpoint written before is kept") from None
    finally:  # nothing is left of it after Ctrl-C and SIGTERM either
        with contextlib.suppress(OSError):
            part.unlink()


# Copied from clip.py
def write_json(path: Path, content: dict) -> None:
    write_atomically(path, lambda file: file.write((json.dumps(content, indent=1) + "\n").encode()))


def plain(value):
    """Arrays, NumPy numbers and NaN as JSON has them: lists, numbers, null."""
    if isinstance(value, dict):
        return {str(k): plain(v) for k, v in value.items()}
    value = value.tolist() if isinstance(value, np.ndarray | np.generic) else value
    if isinstance(value, list | tuple):
        return [plain(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def short_names(paths: list[str]) -> list[str]:
    """Names of files for tables: without what all paths have in common; with a number if they are equal."""
    parts = [Path(re.sub(r"\.(npz|tsv|csv|json|txt)$", "", path)).parts for path in paths]
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


def named_rows(rows: dict | list) -> dict[str, dict]:
    """Rows of a table by name: those of a list are bins."""
    return {f"bin {i}": row for i, row in enumerate(rows)} if isinstance(rows, list) else rows


def show(rows: dict[str, dict], title: str = "", is_turned: bool = False) -> bool:
    """Print a table {row: {column: estimate or value}}, turned: one line a column of it; whether any is marked."""
    columns = list(dict.fromkeys(c for row in rows.values() for c in row))
    lines = [[title, *columns]]
    lines += [[name] + [cell(row.get(c)) + mark(row.get(c), " *") for c in columns] for name, row in rows.items()]
    lines = list(zip(*lines)) if is_turned else lines
    widths = [max(len(line[i]) for line in lines) for i in range(len(lines[0]))]
    for line in lines:
        print("  ".join(text.ljust(w) if i == 0 else text.rjust(w) for i, (text, w) in enumerate(zip(line, widths))))
    return any(mark(entry) for row in rows.values() for entry in row.values())


# ------------------------------------------------------------------------------ main


def main(args: argparse.Namespace) -> None:
    boot, seed = args.boot, args.seed
    if "device" in args:
        try:
            torch.zeros(1, dtype=torch.float64, device=args.device).item()
        except (RuntimeError, AssertionError, TypeError) as error:  # TypeError: mps has no float64
            raise SystemExit(f"--device {args.device}: {str(error).splitlines()[0][:100]}") from None
    if args.plot:
        new_figure(1)  # before the work: matplotlib may be missing
    if args.command == "imbalance":
        results = imbalance(args.files, args.counts, args.classes, tuple(args.cuts), args.tail_classes, args.worst,
                            args.bins, args.equal_count, boot, seed)
    elif args.command == "robustness":
        results = robustness(args.inputs, args.id, args.shifts, args.baseline, args.before, dict(args.subset),
                             dict(args.n), dict(args.split), boot, seed)
    elif args.command == "compare":
        results = compare(args.a.split(","), args.b.split(","), args.counts, boot, seed)
    elif args.command in ("probe", "knn", "fewshot"):
        results = transfer(args.command, args.inputs, args.sets, args.k, args.sweep, args.C, args.metric, args.shots,
                           args.draws, boot, seed, args.device)
    elif args.command == "retrieval":
        results = retrieval(args.files, args.k, boot, seed, args.device)
    elif args.command == "calibration":
        results = calibration(args.files, args.bins, args.fraction, boot, seed)
    elif args.command == "collapse":
        results = collapse(args.files, args.counts, boot, seed)
    elif args.command == "similarity":
        results = similarity(args.a, args.b, args.pairs, args.max_images, args.min_pairs, boot, seed)
    elif args.command == "prototypes":
        results = prototypes(args.file, args.key, args.counts, args.eps, args.tail, args.tsne, args.samples,
                             boot, seed, args.device)
    elif args.command == "debias":
        results = debias(args.zeroshot, args.finetuned, args.val_zeroshot, args.val_finetuned, dict(args.more),
                         args.wiseft, args.prior, args.group_by, args.calibrate, boot, seed)
    elif args.command == "wiseft":
        results = wiseft_results(args.results, args.id, args.shifts, boot, seed) if args.results else wiseft(
            args.checkpoints, args.alpha, args.out)
    elif args.command == "concepts" and args.what == "accuracy":
        results = concept_sets(args.files, args.counts, boot, seed)
    elif args.command == "concepts":
        results = (agreement if args.what == "agree" else shared_tail)(args.files, boot, seed)
    elif args.command == "report":
        results = report_runs(args.runs, args.id, args.out, args.markdown, boot, seed)

    if args.json:
        versions = {"numpy": np.__version__, "scipy": scipy.__version__, "torch": torch.__version__}
        head = {"command": args.command, "args": vars(args), "versions": versions}
        write_json(Path(args.json), plain(head | results))
    try:
        is_marked = show(results["rows"], args.command, args.command in TURNED or "counts" in results)
        for name in EXTRA_TABLES:
            if results.get(name):
                is_marked |= show(named_rows(results[name]), name)
        if is_marked:
            print(f"* {NO_INTERVAL}")
        sys.stdout.flush()
    except BrokenPipeError:  # `| head` has read enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    if args.plot:
        PLOTS[args.command](plain(results), args.plot)


if __name__ == "__main__":
    try:
        main(ARGS)
    except (MemoryError, RuntimeError) as error:
        if isinstance(error, RuntimeError) and not re.search("allocate memory|out of memory", str(error)):
            raise
        print("evaluate.py: not enough memory: fewer images, classes or --boot", file=sys.stderr)
        sys.exit(2)
    except SystemExit as error:
        if not isinstance(error.code, str):
            raise
        print(f"evaluate.py: {error.code}", file=sys.stderr)
        sys.exit(2)
