"""Results of recipes/shapes.sh: one small JSON file a run, and the page that is made of them."""

import json
import sys
from pathlib import Path

import numpy as np


def rounded(value, digits=4):
    """The same JSON value with shorter numbers."""
    if isinstance(value, float):
        return round(value, digits) if np.isfinite(value) else None
    if isinstance(value, dict):
        return {k: rounded(v, digits) for k, v in value.items()}
    return [rounded(v, digits) for v in value] if isinstance(value, list) else value


def compact(run, path, command):
    """Keep of a finished run: its command, metrics, and for val and v2 each class's accuracy and predictions."""
    run = Path(run)
    metrics = json.loads((run / "metrics.json").read_text("utf-8"))
    content = {"command": command.strip(), "metrics": metrics, "classes": {}}
    for name in ("val", "v2"):
        if (run / f"{name}.npz").is_file():
            with np.load(run / f"{name}.npz") as file:
                labels, predictions, counts = file["labels"], file["predictions"], file["class_counts"]
            C = len(counts)
            right = np.bincount(labels[labels == predictions], minlength=C)
            content["classes"][name] = {"count": counts.tolist(), "images": np.bincount(labels, minlength=C).tolist(),
                                        "right": right.tolist(),
                                        "predicted": np.bincount(predictions, minlength=C).tolist()}
    write(path, content)


def write(path, content):
    partial = Path(f"{path}.partial")
    partial.write_text(json.dumps(rounded(content), separators=(",", ":")) + "\n", "utf-8")
    partial.replace(path)


def shorten(source, path):
    """Keep of a file of evaluate.py: what is not longer than a list of 200 numbers."""
    def without_arrays(value):
        if isinstance(value, dict):
            return {k: without_arrays(v) for k, v in value.items() if not (isinstance(v, list) and len(str(v)) > 2000)}
        return value

    write(path, without_arrays(json.loads(Path(source).read_text("utf-8"))))


def line(path):
    """One line of a result, for the terminal."""
    val = json.loads(Path(path).read_text("utf-8"))["metrics"]["val"]
    keys = ("top1", "tail", "spearman_acc", "spearman_pred", "knn", "probe")
    print("  ".join(f"{key} {val[key]:.3f}" for key in keys if val.get(key) is not None))


if __name__ == "__main__":
    {"compact": compact, "shorten": shorten, "line": line}[sys.argv[1]](*sys.argv[2:])
