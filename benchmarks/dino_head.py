"""Head and loss of dino_laionet.py with M of K prototypes against all K: python benchmarks/dino_head.py

Forward and backward on given features, fp32, CPU, Sinkhorn targets of a teacher head included, as in a step of the
script: drawing, gathering and writing back the M rows count (not their moments in the optimizer, which the script moves
too, nor the teacher's average, which goes over all K rows whatever M is). Sides alternate; printed are medians and the
peak of memory beyond what stands before the step, from the kernel's high-water mark in a process of its own. Once with
the whole head (two hidden layers of 2,048, whose cost does not depend on K), once without its hidden layers.
"""

import argparse
import re
import statistics
import subprocess
import sys
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import dino_laionet as dino  # noqa: E402


def make(K, D, M, B, views, has_mlp):
    """Heads of student and teacher, their tables, features of a step."""
    torch.manual_seed(0)
    width = 384 if has_mlp else D
    heads = [dino.Head(width, 2048, D, M) for _ in range(2)]
    for head in heads:
        head.mlp = head.mlp if has_mlp else torch.nn.Identity()
    tables = [dino.PrototypeTable(K, D, "cpu") for _ in range(2)]
    if M == K:
        for head, table in zip(heads, tables):
            head.prototypes.data = table.weight
    optimizer = torch.optim.SGD(heads[0].parameters(), 0.1)
    return heads, tables, optimizer, torch.randn(views * B, width), torch.randn(2 * B, width)


def step(heads, tables, optimizer, student_x, teacher_x, number):
    K, M = len(tables[0].weight), len(heads[0].prototypes)
    optimizer.zero_grad(set_to_none=True)
    ids = dino.draw_prototypes(K, M, 0, number)
    for head, table in zip(heads, tables):
        table.load(ids, head.prototypes, optimizer)
    x = student_x.detach().requires_grad_()
    with torch.no_grad():
        targets = dino.sinkhorn(heads[1](teacher_x), 0.04)
    dino.dino_loss(heads[0](x), targets, 0.1).backward()
    tables[0].store(ids, heads[0].prototypes, optimizer)


def status_kib(name):
    return int(re.search(rf"{name}:\s+(\d+)", Path("/proc/self/status").read_text())[1])


def peak_mib(*arguments):
    """Peak memory of a step in a process of its own, beyond what was there before it."""
    command = [sys.executable, __file__, "--peak", *map(str, arguments)]
    return float(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


def main(args):
    if args.peak:
        given = make(*args.peak)
        small = make(64, args.peak[1], 64, 4, args.peak[4], args.peak[5])
        step(*small, 0)  # buffers of the libraries are there
        Path("/proc/self/clear_refs").write_text("5")  # the high-water mark starts anew
        before = status_kib("VmRSS")
        step(*given, 1)
        print((status_kib("VmHWM") - before) / 1024)
        return
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads, fp32")
    dino.keep_freed_memory()
    K, D, M, B, views = args.shape
    for has_mlp in 1, 0:
        sides = {"full": make(K, D, K, B, views, has_mlp), "sampled": make(K, D, M, B, views, has_mlp)}
        times = {side: [] for side in sides}
        for number in range(args.pairs + 1):
            for side, given in sides.items():
                start = time.perf_counter()
                step(*given, number)
                times[side] += [time.perf_counter() - start] if number else []  # the first warms up
        full, sampled = (1e3 * statistics.median(times[side]) for side in sides)
        ratio = statistics.median(a / b for a, b in zip(times["full"], times["sampled"]))
        peaks = [peak_mib(K, D, m, B, views, has_mlp) for m in (K, M)]
        print(f"{'whole head' if has_mlp else 'prototypes only'}, K {K:,}, D {D}, M {M:,}, batch {B}, {views} crops:")
        print(f"  full {full:.0f} ms, sampled {sampled:.0f} ms: {ratio:.2f} times as fast")
        print(f"  peak extra memory: full {peaks[0]:.0f} MiB, sampled {peaks[1]:.0f} MiB ({peaks[1] / peaks[0]:.2f})")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--pairs", type=int, default=5, help="counted rounds of the alternation")
    parser.add_argument(
        "--shape", type=int, nargs=5, default=[65_536, 256, 16_384, 32, 10], help="K, D, M, batch, crops"
    )
    parser.add_argument("--peak", type=int, nargs=6, help="used by the script itself: K D M B CROPS MLP of one side")
    main(parser.parse_args())
