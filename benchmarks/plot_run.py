"""Figure of runs: python benchmarks/plot_run.py OUT.png CLIP=runs/clip/val.npz "supervised"=runs/sl/val.npz

For each class, against its training frequency: accuracy, and how often it is predicted for each test image it has.
Needs matplotlib (pip install matplotlib).
"""

import sys

import numpy as np
from scipy.stats import spearmanr

try:
    import matplotlib.pyplot as plt
except ImportError:
    raise SystemExit("the figure needs matplotlib: pip install matplotlib") from None

if len(sys.argv) < 3 or not all("=" in arg for arg in sys.argv[2:]):
    raise SystemExit(__doc__)
figure, axes = plt.subplots(1, 2, figsize=(8, 3), layout="constrained")
for arg, marker, colour in zip(sys.argv[2:], "o^sx", ("#0072b2", "#d55e00", "#009e73", "#555555"), strict=False):
    name, path = arg.split("=", 1)
    with np.load(path) as run:
        logits, labels, counts = run["logits"].astype(np.float32), run["labels"], run["class_counts"]
    predictions, n_classes = logits.argmax(1), len(counts)
    n_test = np.bincount(labels, minlength=n_classes)
    accuracy = np.bincount(labels[predictions == labels], minlength=n_classes) / n_test
    predicted = np.bincount(predictions, minlength=n_classes) / n_test
    for axis, values in zip(axes, (accuracy, predicted), strict=True):
        label = f"{name}: Spearman {spearmanr(counts, values).statistic:.2f}"
        axis.scatter(counts, values, s=11, alpha=0.6, linewidths=0, marker=marker, color=colour, label=label)
for axis, title in zip(axes, ("accuracy", "predictions / test images"), strict=True):
    axis.set(xscale="log", xlabel="training images of the class", ylabel=title, ylim=(0, None))
    axis.legend(fontsize=8)
    axis.spines[["top", "right"]].set_visible(False)
figure.savefig(sys.argv[1], dpi=110)
