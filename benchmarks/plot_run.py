"""Figure of a run: python benchmarks/plot_run.py runs/clip/val.npz docs/run.png (pip install matplotlib)

For each class, against its training frequency: accuracy, and how often it is predicted for each test image it has.
"""

import sys

import numpy as np
from scipy.stats import spearmanr

try:
    import matplotlib.pyplot as plt
except ImportError:
    raise SystemExit("the figure needs matplotlib: pip install matplotlib") from None

if len(sys.argv) != 3:
    raise SystemExit(__doc__)
with np.load(sys.argv[1]) as run:
    logits, labels, counts = run["logits"].astype(np.float32), run["labels"], run["class_counts"]
predictions, n_classes = logits.argmax(1), len(counts)
n_test = np.bincount(labels, minlength=n_classes)
accuracy = np.bincount(labels[predictions == labels], minlength=n_classes) / n_test
predicted = np.bincount(predictions, minlength=n_classes) / n_test
figure, axes = plt.subplots(1, 2, figsize=(8, 2.8), layout="constrained")
for axis, values, title in zip(axes, (accuracy, predicted), ("accuracy", "predictions / test images"), strict=True):
    axis.scatter(counts, values, s=9, alpha=0.6, linewidths=0)
    axis.set(xscale="log", xlabel="training images of the class", ylabel=title, ylim=(0, None))
    axis.set_title(f"Spearman {spearmanr(counts, values).statistic:.2f}", fontsize=10)
    axis.spines[["top", "right"]].set_visible(False)
figure.savefig(sys.argv[2], dpi=110)
