"""Time and memory of evaluate.py at the study's scale: python benchmarks/evaluate.py [NAME ...]

Each case is random data of the size named, in a process of its own, on two threads: seconds without making the data,
and the peak of the process (the data included). probe alternates with scikit-learn's LogisticRegression on the same
features.
"""

import importlib.util
import resource
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import torch

ROOT = Path(__file__).resolve().parent.parent
spec = importlib.util.spec_from_file_location("evaluate", ROOT / "evaluate.py")
evaluate = importlib.util.module_from_spec(spec)
spec.loader.exec_module(evaluate)
rng = np.random.default_rng(0)


def timed(name, work):
    start = time.perf_counter()
    result = work()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    print(f"{name}: {time.perf_counter() - start:.1f} s, {peak:.2f} GiB at most", flush=True)
    return result


def imbalance():
    labels = np.repeat(np.arange(1000), 50)
    logits = rng.normal(size=(50_000, 1000)).astype(np.float16)
    logits[np.arange(50_000), labels] += np.float16(3)
    counts = (1e6 / np.arange(1, 1001)).astype(int)
    data = {"path": "", "n_classes": 1000, "labels": labels, "logits": logits, "class_counts": counts}
    timed("imbalance, 1,000 resamples of 50,000 x 1,000",
          lambda: evaluate.score_classes(data, (100, 20), 0, 10, 1000, 0))  # fmt: skip


def collapse():
    labels = np.repeat(np.arange(1000), 50)
    centers = rng.normal(size=(1000, 1024)).astype(np.float32)
    features = np.empty((50_000, 1024), np.float16)
    for start in range(0, 50_000, 5000):
        part = slice(start, start + 5000)
        features[part] = centers[labels[part]] + rng.normal(size=(5000, 1024)).astype(np.float32)

    def work():
        means = evaluate.class_means(features, labels, 1000)
        nc1, rank, _ = evaluate.within_variability(features, labels, means)
        of = lambda m: np.array([evaluate.cosine_gaps(m, is_centred) for is_centred in (True, False)])  # noqa: E731
        evaluate.jackknife_of_means(features, labels, means, of, rng)
        return nc1.mean(), rank, (of(means), of(centers))

    nc1, rank, _ = timed("NC1 and NC2, N = 50,000, D = 1,024, C = 1,000", work)
    print(f"  NC1 {nc1:.4f}, rank {rank}")


def prototypes():
    for name, n_centers, spread in (("all distinct", 65_536, 0.0), ("1,000 clusters", 1000, 0.05)):
        centers = torch.randn(n_centers, 256, generator=torch.Generator().manual_seed(0))
        index = torch.arange(65_536) % n_centers
        rows = centers[index] + spread * torch.randn(65_536, 256, generator=torch.Generator().manual_seed(1))
        unit = torch.nn.functional.normalize(rows, dim=1)

        def work(unit=unit):
            kept, groups = evaluate.greedy_cover(unit, 0.025)
            return len(kept), len(np.unique(evaluate.linked_groups(unit, groups, 0.025)))

        found = timed(f"distinct prototypes, K = 65,536, D = 256, {name}", work)
        print(f"  greedy {found[0]}, linked {found[1]}")


def retrieval():
    images = evaluate.unit_rows(rng.normal(size=(25_000, 512)).astype(np.float32)).astype(np.float32)
    owner = np.repeat(np.arange(25_000), 5)
    texts = images[owner] + rng.normal(size=(125_000, 512)).astype(np.float32) / 6
    texts /= np.linalg.norm(texts, axis=1, keepdims=True)
    i2t, t2i = timed("retrieval, 25,000 images x 5 captions, D = 512",
                     lambda: evaluate.retrieval_ranks(images, texts, owner, "cpu"))  # fmt: skip
    print(f"  R@1 {(i2t < 1).mean():.4f} {(t2i < 1).mean():.4f}")


def probe():
    from sklearn.linear_model import LogisticRegression

    labels, scale = rng.integers(100, size=25_000), np.linspace(0.2, 2, 512)
    features = rng.normal(size=(100, 512))[labels] * 0.2 + rng.normal(size=(25_000, 512))
    features = (features * scale).astype(np.float32)
    x, y, test, test_y = features[:20_000], labels[:20_000], features[20_000:], labels[20_000:]

    def objective(weight, bias):
        logits = torch.from_numpy(x.astype(np.float64) @ weight + bias)
        loss = torch.nn.functional.cross_entropy(logits, torch.from_numpy(y))
        return float(loss) + (weight**2).sum() / (2 * 0.316 * len(y))

    def fitted():
        model = evaluate.Logistic(x, y, 100, "cpu")
        model.fit(0.316)
        return model

    for _ in range(2):
        model = timed("probe, 20,000 x 512, 100 classes", fitted)
        weight = model.weight[:-1].numpy()
        ours = objective(weight, model.weight[-1].numpy() - model.mean.double().numpy() @ weight)
        theirs = LogisticRegression(C=0.316, tol=1e-6, max_iter=5000)
        timed("  scikit-learn, tol 1e-6", lambda theirs=theirs: theirs.fit(x, y))
        best = objective(theirs.coef_.T.astype(np.float64), theirs.intercept_)
        right = [(model.scores(test).argmax(1) == test_y).mean(), (theirs.predict(test) == test_y).mean()]
        print(f"  objectives {ours:.8f} {best:.8f}, relative {ours / best - 1:.1e}; accuracy {right[0]:.4f} "
              f"{right[1]:.4f}", flush=True)  # fmt: skip


CASES = {f.__name__: f for f in (imbalance, collapse, prototypes, retrieval, probe)}

if __name__ == "__main__":
    torch.set_num_threads(2)
    names = sys.argv[1:] or list(CASES)
    if len(names) == 1:
        CASES[names[0]]()
    else:
        for name in names:
            subprocess.run([sys.executable, __file__, name], check=True)
