"""Head and loss of sl_vocab_subsample.py with a vocabulary against the full softmax: python benchmarks/vocab.py

Forward and backward of cosine head and cross-entropy on given features, fp32, CPU; counts are Zipf's. Sides alternate;
printed are medians, the time of drawing alone, and the peak of memory beyond what stands before the step (weights and
their gradient buffer), from the kernel's high-water mark in a process of its own. Then drawing for 16 groups as a share
of such a step and of one with the smallest tower (tiny, 32 px), the two ways of draw_vocab, arrivals or a race of all,
by the number of classes, and the two routes of vocab_of_batch, the union's rows copied or all rows masked, by the
union's size.
"""

import argparse
import re
import statistics
import subprocess
import sys
import time
from pathlib import Path

import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import sl_vocab_subsample as sl  # noqa: E402


def make(C, D, B):
    """Features, weights with a gradient buffer, labels by frequency, counts."""
    torch.manual_seed(0)
    counts = (1e6 / (torch.randperm(C) + 1)).ceil()
    labels = torch.multinomial(counts, B, replacement=True)[:, None]
    features = F.normalize(torch.randn(B, D), dim=1).requires_grad_()
    weights = torch.randn(C, D).requires_grad_()
    weights.grad = torch.ones_like(weights)  # its pages are there before the step
    return (features, weights, labels), counts


def step(features, weights, labels, draws, group, number):
    """One forward and backward pass; returns the seconds of drawing."""
    features.grad, vocab = None, None
    start = time.perf_counter()
    if draws:
        vocab, *_ = sl.vocab_of_batch(labels, 0, len(labels), group, draws, 0, number)
        labels = labels if vocab.ids is None else torch.searchsorted(vocab.ids, labels)
    drawn = time.perf_counter() - start
    logits = sl.vocab_logits(features, weights, torch.tensor(14.3), vocab)
    sl.cross_entropy(logits, labels).backward()
    return drawn


def status_kib(name):
    return int(re.search(rf"{name}:\s+(\d+)", Path("/proc/self/status").read_text())[1])


def peak_mib(*arguments):
    """Peak memory of steps in a process of its own, beyond what was there before the first."""
    command = [sys.executable, __file__, "--peak", *map(str, arguments)]
    return float(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


def main(args):
    if args.peak:
        C, D, B, M, group = args.peak
        given, counts = make(C, D, B)
        draws = sl.draws_of(counts, M, 1.0) if M else None
        step(*given, draws, group, 0)  # buffers of the libraries are there
        Path("/proc/self/clear_refs").write_text("5")  # the high-water mark starts anew
        before = status_kib("VmRSS")
        step(*given, draws, group, 1)
        print((status_kib("VmHWM") - before) / 1024)
        return
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads, fp32")
    sl.keep_freed_memory()
    C, D, B, M, group = args.shape
    given, counts = make(C, D, B)
    sides, times, drawing = {"full": None, "sampled": sl.draws_of(counts, M, 1.0)}, {"full": [], "sampled": []}, []
    for number in range(args.pairs + 1):
        for side, draws in sides.items():
            start = time.perf_counter()
            drawn = step(*given, draws, group, number)
            if number:
                times[side].append(time.perf_counter() - start)
                drawing += [drawn] if draws else []
    full, sampled = (1e3 * statistics.median(times[side]) for side in sides)
    ratio = statistics.median(a / b for a, b in zip(times["full"], times["sampled"], strict=True))
    peaks = [peak_mib(C, D, B, size, group) for size in (0, M)]
    print(f"C {C:,}, D {D}, batch {B}, M {M}, groups of {group}: full {full:.0f} ms, sampled {sampled:.0f} ms")
    print(f"{ratio:.1f} times as fast; drawing {1e3 * statistics.median(drawing):.1f} ms of it")
    print(f"peak extra memory: full {peaks[0]:.0f} MiB, sampled {peaks[1]:.0f} MiB ({peaks[1] / peaks[0]:.2f})")
    tower, images, times = sl.TinyResNet(D), torch.randn(1024, 3, 32, 32), []
    for _ in range(4):
        start = time.perf_counter()
        tower(images).sum().backward()
        times.append(time.perf_counter() - start)
    tower = statistics.median(times[1:])
    for shape in (C, D), (10**6, D), (10**6, 128):
        (given, counts), times, drawing = make(*shape, 1024), [], []
        draws = sl.draws_of(counts, M, 1.0)
        for number in range(8):
            start = time.perf_counter()
            drawing.append(step(*given, draws, 64, number))
            times.append(time.perf_counter() - start)
        drawn, whole = statistics.median(drawing[1:]), statistics.median(times[1:])
        text = f"16 groups of 64, C {shape[0]:,}, D {shape[1]}, M {M}"
        print(f"{text}: drawing {1e3 * drawn:.0f} of {1e3 * whole:.0f} ms, {drawn / whole:.1%}; with the smallest "
              f"tower, whose {1e3 * tower:.0f} ms come on top, {drawn / (whole + tower):.1%}")  # fmt: skip
    for shape in 10_000, 20_000, 40_000, 10**6:
        (_, _, labels), counts = make(shape, 1, 64)
        draws = sl.draws_of(counts, M, 1.0)
        times = {n_arrivals: [] for n_arrivals in (draws.n_arrivals or shape // 8, 0)}
        for number in range(8):
            for n_arrivals in times:
                start = time.perf_counter()
                sl.draw_vocab(labels.unique(), draws._replace(n_arrivals=n_arrivals), number)
                times[n_arrivals] += [time.perf_counter() - start] if number else []
        text = [f"{n or 'no'} arrivals {1e3 * statistics.median(x):.2f} ms" for n, x in times.items()]
        print(f"a vocabulary of {M} of {shape:,} classes: {', '.join(text)}")
    (features, weights, _), _ = make(C, D, B)
    for share in 0.25, 0.4, 0.5, 0.6, 0.75:
        ids = torch.randperm(C)[: int(share * C)].sort().values
        own, groups = torch.randint(len(ids), (B, 1)), torch.zeros(B, dtype=torch.long)
        inside = torch.zeros(1, C, dtype=torch.bool)
        inside[0, ids] = True
        union = sl.Vocab(ids, torch.ones(1, len(ids)).bool(), torch.zeros(1, len(ids)), groups)
        routes = {"union": (union, own), "masked": (sl.Vocab(None, inside, torch.zeros(1, C), groups), ids[own])}
        times = {name: [] for name in routes}
        for number in range(4):
            for name, (vocab, target) in routes.items():
                features.grad, start = None, time.perf_counter()
                sl.cross_entropy(sl.vocab_logits(features, weights, torch.tensor(14.3), vocab), target).backward()
                times[name] += [time.perf_counter() - start] if number else []
        a, b = (1e3 * statistics.median(times[name]) for name in routes)
        print(f"union of {share:.0%} of the classes: its rows {a:.0f} ms, all rows masked {b:.0f} ms")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--pairs", type=int, default=7, help="counted rounds of the alternation")
    parser.add_argument(
        "--shape", type=int, nargs=5, default=[21_841, 1024, 256, 1000, 64], help="C, D, batch, M, group"
    )
    parser.add_argument("--peak", type=int, nargs=5, help="used by the script itself: C D B M GROUP of one side")
    main(parser.parse_args())
