# /// script
# requires-python = ">=3.10"
# dependencies = ["torch>=2.6", "torchvision>=0.21", "numpy>=1.26", "scipy>=1.11", "pillow>=10.1", "tqdm>=4.66"]
# ///
"""DINO on uncurated data: a student predicts the prototypes its slow teacher assigns to other crops of an image.

Paper: Caron et al., arXiv 2104.14294; sampled prototypes: Wen et al., arXiv 2405.21070, section 4 and figure 10. DINO's
prototypes act as K classes; on long-tailed data a step among M of them, drawn anew, is the dynamic classification that
makes CLIP robust to imbalance.

    python dino_laionet.py                                                 # all prototypes, on the shapes world
    python dino_laionet.py --sample-prototypes 512 --out runs/dino_sampled
    torchrun --nproc-per-node 2 dino_laionet.py --data balanced --out runs/dino_balanced
    python dino_laionet.py --eval-only runs/dino/checkpoint.pt --eval-sets val sketch
    python dino_laionet.py --export backbone.pt          # then sl_vocab_subsample.py --init backbone.pt

The defaults are a recipe for 32 px images. The paper's, on LAIONet, is
    torchrun --nproc-per-node 8 dino_laionet.py --root ROOT --arch RN50 --batch-size 1024 --epochs 100
with --warmup-steps 31800 --optimizer sgd --lr 0.12 --weight-decay 1e-4 --ema 0.996 --teacher-temp 0.04 --no-head-bn
--augment dino --global-size 224 --global-scale 0.14 1 --crop-aspect 1.3333 --local-crops 8 --local-size 96
--sample-prototypes 16384 --precision fp16

A data set is a TSV with a column image (clip.py's docstring has the formats). Labels are not trained on; k-NN and a
linear probe are fitted on the features of a labelled set (--probe-set). Written to --out: args.json, log.jsonl,
checkpoint.pt, metrics.json and <set>.npz for each test set (logits of the probe, features, labels, ...). Other worlds
(--transfer) leave transfer/<set>_train.npz and _test.npz, for evaluate.py probe.

Dimension key: B images of this process, V views, K prototypes, M of them used in a step, D width of a prototype,
C classes.

Expected on the default world: a linear probe has 0.24 to 0.27 on val by machine, k-NN 0.12; with --data balanced 0.40
and 0.20. Raw pixels have 0.07 and 0.09, a random network 0.03 and 0.03. Worlds differ: in those of `build_datasets.py
shapes --seed 1` and 2 the long-tailed probe has 0.25 and 0.49 (results/shapes.md, 9). A third of the steps gives 0.09.

Deviations from the paper and its code:
 1. Sinkhorn runs in the log domain: the published exp(logits / temperature) overflows at low temperatures.
 2. Prototypes that a step does not use do not move in it: neither momentum nor weight decay touches their rows. The
    teacher's rows are the running average of the student's, all of them, at every step.
 3. Crops and colours are drawn by example, so any number of processes sees the same views, after a restart too.
    torchvision.transforms.v2 draws from a process's generator: its formulas are applied here to batches on the device,
    to files and .npy alike, in no more CPU time. Pillow cuts files and large .npy images (bicubic), the device .npy
    images that are square, at most 1.3 times as large as a global crop and fit into memory (bilinear, so local crops
    shrunk much more than these alias there).
 4. ViT-S/16 has no stochastic depth.
 5. Position embeddings are resized to the exact grid of a local crop; the public code's scale is 0.1 patch larger.
 6. One draw of prototypes serves all processes, and depends on seed and step: theirs was equal on all only as long as
    their generators were, and began anew after a restart.
 7. Runs to be compared differ in one flag: theirs also differed in the freezing of the last layer, and in the batch.
 8. A data set is what its table lists: theirs took ImageNet's train and val folders for two classes of one set.
 9. Training, k-NN and probe standardise pixels by CLIP's mean, also for weights of others (theirs by ImageNet's mean,
    then by CLIP's).
10. With AdamW prototypes start at length 1, with SGD, which turns a row by gradient / length^2, at sqrt(D / K) as
    theirs. (With AdamW one trial of 1,000 steps on the shapes world had a probe of 9.1 % on val with either start,
    and on unseen classes 11.3 %, 10.0 % with theirs.)
11. RN50 starts as CLIP's does, with residual branches off, ViT's patch embedding as its other matrices (theirs: torch's
    defaults); AdamW's second beta is 0.98 (0.999), warm-up begins at peak / steps and the cosine ends at 0 (0, 1e-6).
12. Test images are seen at the tower's own size (32 px, else 224), whatever --global-size is.
13. What an epoch leaves over begins the next batch; theirs dropped it.
"""

import argparse
import contextlib
import copy
import ctypes
import datetime
import fcntl
import functools
import hashlib
import io
import json
import math
import mmap
import os
import pickle
import re
import signal
import struct
import subprocess
import sys
import time
import warnings
import zipfile
import zlib
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path

# ------------------------------------------------------------------------------ flags

SHAPES_ROOT = "data/shapes"  # rendered by build_datasets.py on first use
TEST_SETS = ("val", "v2", "sketch", "rendition", "objectnet", "adversarial")


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """Flags of dino_laionet.py; wrong combinations end here."""
    parser = argparse.ArgumentParser(usage="%(prog)s [FLAGS]; --help lists them", description=__doc__.split("\n")[0],
                                     formatter_class=argparse.ArgumentDefaultsHelpFormatter, allow_abbrev=False)
    data = parser.add_argument_group("data")
    data.add_argument("--root", default="auto",
                      help=f"folder of the world: classes.tsv, test sets, SET/train.tsv, clip.pt; auto is "
                           f"{SHAPES_ROOT}, or the folder of the first --data file")
    data.add_argument("--data", default="laionet",
                      help="training sets: NAME (ROOT/NAME/train.tsv) or FILE.tsv, mixed as A:2,B:1; without weights "
                           "each set counts by its size")
    data.add_argument("--probe-set", default="auto",
                      help="labelled set that k-NN and the linear probe are fitted on: NAME or FILE.tsv; auto is "
                           "imagenet where ROOT has it, else the first of --data")
    data.add_argument("--probe-images", type=int, default=6000,
                      help="use at most so many images of --probe-set, drawn evenly; with --eval-only the default "
                           "is as many as the run's")
    data.add_argument("--eval-sets", nargs="*", default=["auto"],
                      help=f"test sets: names in ROOT or TSV files; auto takes those of {', '.join(TEST_SETS)} that "
                           "ROOT has")
    data.add_argument("--transfer", nargs="*", default=["auto"],
                      help="more worlds to probe the features on: folders with classes.tsv, train.tsv and test.tsv; "
                           "auto is those in ROOT (unseen in the shapes world), no name is none")
    data.add_argument("--max-bad", type=float, default=0.01,
                      help="end the run when more than this fraction of the images read so far, or of 1,000 if these "
                           "are fewer, cannot be read")
    data.add_argument("--max-pixels", type=int, default=89_478_485,
                      help="refuse images whose header announces more pixels than this")

    views = parser.add_argument_group("views")
    views.add_argument("--augment", default="colour", choices=["colour", "dino"],
                       help="colour: channels permuted, inverted, scaled and shifted, noise, for synthetic pictures; "
                            "dino: jitter, grey, blur, solarise")
    views.add_argument("--global-size", type=int, default=28,
                       help="px of the two global crops, which the teacher sees too")
    views.add_argument("--global-scale", type=float, nargs=2, default=[0.6, 1.0], metavar=("LO", "HI"),
                       help="area of a global crop, as a fraction of the image")
    views.add_argument("--local-crops", type=int, default=0, help="local crops, which only the student sees")
    views.add_argument("--local-size", type=int, default=16, help="px of a local crop")
    views.add_argument("--local-scale", type=float, nargs=2, default=[0.05, 0.14], metavar=("LO", "HI"),
                       help="area of a local crop, as a fraction of the image")
    views.add_argument("--crop-aspect", type=float, default=1.15,
                       help="largest width / height of a crop, and largest height / width")

    model = parser.add_argument_group("model")
    model.add_argument("--arch", default="tiny", choices=["tiny", "RN50", "ViT-S-16", "resnet50"],
                       help="image tower; tiny is a small residual net for 32 px images")
    model.add_argument("--init", default="",
                       help="checkpoint to start from: in clip.py the whole model, elsewhere the image tower")
    model.add_argument("--head-hidden", type=int, default=0,
                       help="width of the head's two hidden layers; 0 is 256 for tiny, else 2048")
    model.add_argument("--head-bn", action=argparse.BooleanOptionalAction, default=True,
                       help="batch norm in the head's hidden layers")
    model.add_argument("--bn", default="sync", choices=["sync", "local"],
                       help="batch norm statistics over all processes or over each one's own part")

    method = parser.add_argument_group("method")
    method.add_argument("--prototypes", type=int, default=-1, help="prototypes K; -1 is 2,048 for tiny, else 65,536")
    method.add_argument("--prototype-dim", type=int, default=0, help="their width D; 0 is 64 for tiny, else 256")
    method.add_argument("--sample-prototypes", type=int, default=0, help="prototypes M drawn for a step; 0 is all")
    method.add_argument("--prototype-power", type=float, default=0.0,
                        help="prototypes are drawn with weight (times won + 1) ** this; 0 is evenly")
    method.add_argument("--centering", default="sinkhorn", choices=["sinkhorn", "mean"],
                        help="against one answer for all: equal shares of the prototypes, or a running mean taken off")
    method.add_argument("--student-temp", type=float, default=0.1, help="temperature of the student's softmax")
    method.add_argument("--teacher-temp", type=float, default=0.02, help="temperature of the teacher's targets")
    method.add_argument("--warmup-teacher-temp", type=float, default=0.0,
                        help="the teacher's temperature at the first step; 0 is --teacher-temp")
    method.add_argument("--warmup-teacher-temp-steps", type=int, default=0, help="steps until it is --teacher-temp")
    method.add_argument("--ema", type=float, default=0.95,
                        help="teacher's momentum at the first step; a cosine takes it to 1")
    method.add_argument("--freeze-prototypes", type=int, default=0, help="steps before the prototypes are trained")

    optimization = parser.add_argument_group("optimization")
    optimization.add_argument("--steps", type=int, default=3000,
                              help="optimiser steps; --epochs takes its place when given")
    optimization.add_argument("--epochs", type=float, default=0, help="passes over the data; 0 leaves it to --steps")
    optimization.add_argument("--batch-size", type=int, default=128, help="examples of a step over all processes")
    optimization.add_argument("--optimizer", default="adamw", choices=["adamw", "sgd"],
                              help="AdamW with betas 0.9, 0.98, or SGD with momentum 0.9")
    optimization.add_argument("--lr", type=float, default=0,
                              help="peak learning rate; 0 is what suits tower and optimiser (tiny with AdamW: 3e-3)")
    optimization.add_argument("--weight-decay", type=float, default=0.04,
                              help="on matrices only: not on gains, biases and scales")
    optimization.add_argument("--weight-decay-end", type=float, default=-1,
                              help="weight decay at the last step, by a cosine; -1 is no change")
    optimization.add_argument("--warmup-steps", type=int, default=50,
                              help="steps of linear warm-up, before the cosine to 0")
    optimization.add_argument("--clip-grad", type=float, default=3.0, help="largest gradient norm; 0 is off")
    optimization.add_argument("--clip-of", default="tensor", choices=["tensor", "all"],
                              help="the norm that is limited: each parameter's own, as published, or that of all")

    run = parser.add_argument_group("run")
    run.add_argument("--out", default="runs/dino",
                     help="folder for log, checkpoint, metrics and predictions; --eval-only has runs/eval for this one")
    run.add_argument("--export", default="",
                     help="also write the final model, without optimiser state, to this file: with the class "
                          "prototypes of clip.py a ROOT/clip.pt, of dino_laionet.py a backbone for --init")
    run.add_argument("--resume", default="auto",
                     help="auto continues OUT/checkpoint.pt if there is one, off starts over (that one becomes "
                          "checkpoint.old.pt), or a checkpoint to continue")
    run.add_argument("--eval-only", default="", help="evaluate this checkpoint on --eval-sets and end")
    run.add_argument("--baselines", action=argparse.BooleanOptionalAction, default=True,
                     help="at the end also probe a random network and raw pixels")
    run.add_argument("--device", default="auto", help="cpu, cuda, cuda:1; auto is cuda where there is one")
    run.add_argument("--precision", default="auto", choices=["auto", "fp32", "bf16", "fp16"],
                     help="of the towers; auto is bf16 on CUDA and on CPUs with AMX, else fp32 (on CUDA with TF32 "
                          "products); normalisation, logits and loss are always fp32")
    run.add_argument("--compile", action=argparse.BooleanOptionalAction, default=False, help="torch.compile the towers")
    run.add_argument("--workers", type=int, default=-1,
                     help="loader processes per process; -1 is 1 for .npy images of one size, else up to 8")
    run.add_argument("--seed", type=int, default=0, help="of the weights, the order, the crops and what is drawn")
    run.add_argument("--log-every", type=int, default=50, help="steps between log lines")
    run.add_argument("--save-every", type=int, default=500, help="steps between checkpoints; 0 is only at the end")
    run.add_argument("--eval-every", type=int, default=0, help="steps between evaluations; 0 is only at the end")
    run.add_argument("--tensorboard", action=argparse.BooleanOptionalAction, default=False,
                     help="also log to OUT for TensorBoard (pip install tensorboard)")
    run.add_argument("--wandb", default="",
                     help="also log to this Weights & Biases project (pip install wandb); empty is off")

    args = parser.parse_args(argv)
    if args.eval_only and args.out == parser.get_default("out"):
        args.out = "runs/eval"  # not over what a training run left
    is_tiny = args.arch == "tiny"
    args.head_hidden = args.head_hidden or (256 if is_tiny else 2048)
    if args.prototypes == -1:
        args.prototypes = 2048 if is_tiny else 65536
    args.prototype_dim = args.prototype_dim or (64 if is_tiny else 256)
    for flag in ("prototypes", "sample_prototypes"):
        if getattr(args, flag) == 1:
            parser.error(f"--{flag.replace('_', '-')} 1: with one prototype there is nothing to tell apart; 2 or more")
    for flag in ("prototypes", "prototype_dim", "head_hidden", "batch_size", "log_every", "max_pixels", "global_size",
                 "local_size", "crop_aspect"):
        if not 1 <= getattr(args, flag) < math.inf:
            parser.error(f"--{flag.replace('_', '-')} must be at least 1, got {getattr(args, flag)}")
    for flag in ("seed", "steps", "epochs", "lr", "weight_decay", "warmup_steps", "clip_grad", "save_every",
                 "eval_every", "max_bad", "local_crops", "sample_prototypes", "warmup_teacher_temp",
                 "warmup_teacher_temp_steps", "freeze_prototypes"):
        if not 0 <= getattr(args, flag) < 2**32:  # numpy's seeds; NaN is not
            parser.error(f"--{flag.replace('_', '-')} must be at least 0 and below 2**32, got {getattr(args, flag)}")
    if args.sample_prototypes > args.prototypes:
        parser.error(f"--sample-prototypes {args.sample_prototypes} is more than the {args.prototypes} --prototypes")
    if args.eval_only and args.export:
        parser.error("--export writes what was trained: it has no use with --eval-only")
    for flag in ("student_temp", "teacher_temp", "warmup_teacher_temp"):
        value = getattr(args, flag)
        if not 1e-6 <= value < math.inf and (value or flag != "warmup_teacher_temp"):  # fp32's logits / T overflow
            parser.error(f"--{flag.replace('_', '-')} must be positive, from 1e-6 up, got {value}")
    if not (0 <= args.weight_decay_end < math.inf or args.weight_decay_end == -1):
        parser.error(f"--weight-decay-end must not be negative, or be -1, got {args.weight_decay_end}")
    if args.probe_images < 2:
        parser.error("--probe-images must be at least 2: one class and another")
    if not args.local_crops and any(getattr(args, k) != parser.get_default(k) for k in ("local_size", "local_scale")):
        parser.error("--local-size and --local-scale are of local crops: they need --local-crops")
    if bool(args.warmup_teacher_temp) != bool(args.warmup_teacher_temp_steps):
        parser.error("--warmup-teacher-temp and --warmup-teacher-temp-steps go together")
    if args.prototype_power and not args.sample_prototypes:
        parser.error("--prototype-power weighs what is drawn: it needs --sample-prototypes")
    if args.prototype_power and args.sample_prototypes == args.prototypes:
        parser.error("--prototype-power: nothing is drawn where --sample-prototypes takes all of --prototypes")
    if not math.isfinite(args.prototype_power):
        parser.error(f"--prototype-power must be a finite number, got {args.prototype_power}")
    if not 0 <= args.ema <= 1:
        parser.error(f"--ema must be in [0, 1], got {args.ema}")
    for flag in ("global_scale", "local_scale"):
        low, high = getattr(args, flag)
        if not 0 < low <= high <= 1:
            parser.error(f"--{flag.replace('_', '-')} must be 0 < LO <= HI <= 1, got {low} {high}")
    return args


if __name__ == "__main__":
    ARGS = parse_args()  # before the heavy imports: --help and a mistyped flag are answered at once
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")  # torch reads it once: huge pages for large CPU tensors

import numpy as np  # noqa: E402
import torch  # noqa: E402
import torch.distributed as dist  # noqa: E402
import torch.nn as nn  # noqa: E402
import torch.nn.functional as F  # noqa: E402
import torchvision  # noqa: E402
from PIL import Image, ImageOps  # noqa: E402
from scipy.stats import spearmanr  # noqa: E402
from torch.nn.parallel import DistributedDataParallel  # noqa: E402
from tqdm import tqdm  # noqa: E402

# ------------------------------------------------------------------------------ method


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


def draw_prototypes(K: int, M: int, seed: int, step: int, usage: np.ndarray | None = None,
                    power: float = 0.0) -> torch.Tensor:
    """[M] sorted ids of the prototypes of a step, without replacement: a function of seed and step (and usage).

    usage: [K] how often each prototype won; with power != 0 the weights are (usage + 1) ** power.
    Source: Wen et al., arXiv 2405.21070, section 4 (uniform); weights are drawn by Gumbel's top-M.
    """
    if not 0 < M <= K:
        raise ValueError(f"{M} of {K} prototypes cannot be drawn")
    if M == K:
        return torch.arange(K)
    rng = np.random.default_rng([seed, step, 0, 11])  # a stream of its own by the last number
    if not power:
        return torch.from_numpy(np.sort(rng.choice(K, M, replace=False)))
    score = power * np.log(usage + 1.0) + rng.gumbel(size=K)
    return torch.from_numpy(np.sort(np.argpartition(-score, M - 1)[:M]))


@torch.no_grad()
def sinkhorn(logits: torch.Tensor, temperature: float, n_iterations: int = 3) -> torch.Tensor:
    """Assign samples to prototypes so that each prototype gets an equal share, over the samples of all processes.

    logits: [n, K] float32; a column of -inf is a prototype that is not there. temperature: > 0.
    Returns: [n, K], each row sums to 1. In the log domain: finite while logits / temperature are.
    Source: SwAV, arXiv 2006.09882, section 3.1. All ranks.
    """
    log_q = logits / temperature
    for _ in range(n_iterations):
        largest = log_q.amax(0)  # [K]
        if dist.is_initialized():
            dist.all_reduce(largest, dist.ReduceOp.MAX)  # All ranks
        largest = largest.nan_to_num(neginf=0.0)
        mass = (log_q - largest).exp().sum(0)
        if dist.is_initialized():
            dist.all_reduce(mass)  # All ranks
        log_q = log_q - torch.where(mass > 0, largest + mass.log(), 0)  # each prototype sums to 1
        log_q = log_q - log_q.logsumexp(1, keepdim=True).nan_to_num(neginf=0.0)  # each sample sums to 1
    return log_q.exp()


@torch.no_grad()
def center_and_sharpen(logits: torch.Tensor, center: torch.Tensor, proto_ids: torch.Tensor, temperature: float,
                       momentum: float = 0.9) -> torch.Tensor:
    """DINO's own targets: softmax((logits - center) / temperature); then `center` follows the mean, in place.

    logits: [n, M]; center: [K], of which the entries proto_ids [M] are used and moved. All ranks.
    Source: DINO, arXiv 2104.14294, equation 4.
    """
    targets = ((logits - center[proto_ids]) / temperature).softmax(1)
    mean = logits.mean(0)
    if dist.is_initialized():
        dist.all_reduce(mean)  # All ranks; processes hold equally many rows
        mean /= dist.get_world_size()
    center[proto_ids] = momentum * center[proto_ids] + (1 - momentum) * mean
    return targets


def dino_loss(student_logits: torch.Tensor, targets: torch.Tensor, temperature: float) -> torch.Tensor:
    """Cross-entropy of the student's views under the teacher's targets, mean over the pairs of different views.

    student_logits: [V * B, M] float32, view by view, the two global views first. targets: [2 * B, M], rows sum to 1.
    Returns: scalar, nats. A local view meets both targets, so their sum: the pairs are never built.
    Source: DINO, arXiv 2104.14294, equation 3.
    """
    q = targets.unflatten(0, (2, -1))  # [2, B, M]
    z = student_logits.unflatten(0, (-1, q.shape[1])) / temperature  # [V, B, M]
    normaliser = z.logsumexp(2)  # [V, B]
    loss = (normaliser[:2] - (q.flip(0) * z[:2]).sum(2)).sum() + 2 * normaliser[2:].sum()
    loss = loss - (q.sum(0) * z[2:].sum(0)).sum()  # not as a matrix product, which may be in TF32
    return loss / (2 * (len(z) - 1) * q.shape[1])


@torch.no_grad()
@exact_matmul()
def unique_prototypes(prototypes: torch.Tensor, eps: float = 0.025, chunk: int = 4096) -> int:
    """Number of prototypes kept by a greedy cover: one is kept if all kept before are at cosine distance >= eps.

    prototypes: [K, D]. O(K * kept) time, O(chunk * kept) memory. Source: methods of arXiv 2410.14060, our reading.
    """
    unit = F.normalize(prototypes.float(), dim=1)
    kept = unit[:0]
    for block in unit.split(chunk):
        if len(kept):
            block = block[(block @ kept.T).amax(1) <= 1 - eps]
        near, alive, chosen = (block @ block.T > 1 - eps).cpu(), torch.ones(len(block), dtype=torch.bool), []
        for i in range(len(block)):
            if alive[i]:
                chosen.append(i)
                alive &= ~near[i]
        kept = torch.cat([kept, block[chosen]])
    return len(kept)


class PrototypeTable:
    """All K prototypes and their optimiser state; the optimiser itself only ever sees the M rows of a step.

    load() before the forward pass, store() after the optimiser's step: rows that were not drawn, and their momenta,
    stay as they are to the bit. The bias corrections of Adam count steps, not draws.
    """

    def __init__(self, K: int, D: int, device: torch.device):
        self.weight, self.state = F.normalize(torch.randn(K, D), dim=1).to(device), {}  # state: name -> [K, D]

    @torch.no_grad()
    def load(self, proto_ids: torch.Tensor, rows: nn.Parameter, optimizer: torch.optim.Optimizer) -> None:
        if rows.data_ptr() == self.weight.data_ptr():
            return  # all K rows are in use and nothing needs to be moved
        torch.index_select(self.weight, 0, proto_ids, out=rows.data)
        for name, values in self.state.items():
            torch.index_select(values, 0, proto_ids, out=optimizer.state[rows][name])

    @torch.no_grad()
    def store(self, proto_ids: torch.Tensor, rows: nn.Parameter, optimizer: torch.optim.Optimizer) -> None:
        if rows.data_ptr() == self.weight.data_ptr():
            return
        self.weight[proto_ids] = rows.detach()
        for name, value in optimizer.state.get(rows, {}).items():
            if value.ndim == 2:  # not the number of steps
                if name not in self.state:
                    self.state[name] = torch.zeros_like(self.weight)
                self.state[name][proto_ids] = value


def cosine_at(start: float, end: float, step: int, steps: int) -> float:
    """From start at step 0 towards end."""
    return end + (start - end) * 0.5 * (1 + math.cos(math.pi * step / steps))


def clip_gradients(params: list[nn.Parameter], largest: float, is_per_tensor: bool) -> torch.Tensor:
    """Scale gradients down to a norm of at most `largest` (0: leave them), without a sync. Returns: norm of all before.

    is_per_tensor: each parameter by its own norm, as DINO's code does. Parameters without a gradient are left out.
    """
    grads = [p.grad for p in params if p.grad is not None]
    norms = torch.stack(torch._foreach_norm(grads))
    norm_of_all = norms.norm()
    if largest:
        limited = norms if is_per_tensor else norm_of_all.expand_as(norms)
        torch._foreach_mul_(grads, list((largest / (limited + 1e-6)).clamp(max=1).unbind()))
    return norm_of_all


@torch.no_grad()
def diagnostics(loss: torch.Tensor, teacher_logits: torch.Tensor, targets: torch.Tensor, embed: torch.Tensor,
                temperature: float) -> dict:
    """Signs of a collapse, as 0-d tensors; of this process's rows, but for spread_entropy. All ranks.

    teacher_entropy: mean over rows of H(targets) / ln M; near 1, the targets say nothing. kl_uniform: ln M less
    H(targets), nats. teacher_kl: mean KL(targets || student), the loss less H(targets), nats; at 0 there is nothing to
    learn. spread_entropy: H of the mean softmax of teacher_logits (less the centre, if there is one) / temperature, by
    ln M; near 0, one prototype takes all (Sinkhorn hides it).
    feature_std: sqrt(d) * mean std of a feature's dimensions, unit features: 1 is spread evenly, 0 a point.
    """
    def entropy(p: torch.Tensor) -> torch.Tensor:
        return -(p * p.clamp_min(1e-30).log()).sum(-1)

    largest = math.log(targets.shape[1])
    of_rows = entropy(targets).mean()
    raw = (teacher_logits / temperature).softmax(1).mean(0)
    if dist.is_initialized():  # a mean of few rows is less spread
        dist.all_reduce(raw)  # All ranks
        raw /= dist.get_world_size()
    unit = F.normalize(embed.float(), dim=1)
    return {"teacher_entropy": of_rows / largest, "kl_uniform": largest - of_rows, "teacher_kl": loss - of_rows,
            "spread_entropy": entropy(raw) / largest, "feature_std": unit.std(0).mean() * unit.shape[1] ** 0.5}


def collapse_of(signs: dict[str, float]) -> str:
    """What has collapsed by the diagnostics, in words; empty if nothing has."""
    found = {"targets are near uniform": signs["teacher_entropy"] > 0.9,
             "one prototype takes all": signs["spread_entropy"] < 0.05,
             "all features are the same": signs["feature_std"] < 0.05}
    return ", ".join(name for name, is_bad in found.items() if is_bad)


# ------------------------------------------------------------------------------ model

# Copied from clip.py
class GatherRows(torch.autograd.Function):
    """Concatenate equal blocks of rows of all processes, in rank order; gradients flow back to their owners.

    Each process has its own loss, so backward sums the gradients that all of them have for a row; with DDP's mean over
    processes this is the gradient of the mean loss. Source: SLIP utils.py GatherLayer.
    """

    @staticmethod
    def forward(ctx, rows: torch.Tensor) -> torch.Tensor:
        blocks = [torch.empty_like(rows) for _ in range(dist.get_world_size())]
        dist.all_gather(blocks, rows.contiguous())  # All ranks
        return torch.cat(blocks)

    @staticmethod
    def backward(ctx, grad: torch.Tensor) -> torch.Tensor:
        grad = grad.contiguous()
        dist.all_reduce(grad)  # All ranks; the sum
        return grad.chunk(dist.get_world_size())[dist.get_rank()]


# Copied from clip.py
def gather_rows(rows: torch.Tensor) -> torch.Tensor:
    """[B, ...] of each process -> [N, ...] in rank order, differentiable; the input itself for one process."""
    return GatherRows.apply(rows) if dist.is_initialized() and dist.get_world_size() > 1 else rows


# Copied from clip.py
@functools.cache
def pixel_statistics(device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean and deviation of CLIP's training pixels, [3] each; copied to a device once, since a copy waits."""
    mean, std = [0.48145466, 0.4578275, 0.40821073], [0.26862954, 0.26130258, 0.27577711]  # openai/CLIP clip.py
    return torch.tensor(mean, device=device), torch.tensor(std, device=device)


# Copied from clip.py
def standardize(images: torch.Tensor) -> torch.Tensor:
    """[B, 3, S, S], 0..255 -> float32 by CLIP's mean and deviation, channels last, which is faster for convolutions."""
    mean, std = pixel_statistics(images.device)
    images = (images.float() / 255 - mean[:, None, None]) / std[:, None, None]
    return images.contiguous(memory_format=torch.channels_last)


# Copied from clip.py
class BatchNorm2d(nn.BatchNorm2d):
    """Batch norm whose statistics are those of all processes (torch's SyncBatchNorm is for CUDA only).

    Means and variances of the processes are gathered with gradient and combined by the law of total variance.
    With `sync` false, with one process, and in eval mode it is nn.BatchNorm2d.
    """

    sync = True

    def forward(self, x: torch.Tensor) -> torch.Tensor:  # [B, C, H, W]
        if not (self.training and self.sync and dist.is_initialized() and dist.get_world_size() > 1):
            return super().forward(x)
        with torch.autocast(x.device.type, enabled=False):
            xf = x.float()
            var, mean = torch.var_mean(xf, dim=(0, 2, 3), correction=0)  # [C] each
            means, variances = gather_rows(torch.stack([mean, var])[None]).unbind(1)  # [ranks, C] each; All ranks
            mean = means.mean(0)  # processes hold equally many pixels
            var = (variances + (means - mean) ** 2).mean(0)
            n = x.numel() // x.shape[1] * len(means)
            with torch.no_grad():
                self.num_batches_tracked += 1
                self.running_mean.lerp_(mean, self.momentum)
                self.running_var.lerp_(var * n / max(n - 1, 1), self.momentum)
            gain = self.weight * (var + self.eps).rsqrt()
            return (xf * gain[:, None, None] + (self.bias - mean * gain)[:, None, None]).to(x.dtype)


# Copied from clip.py
class BasicBlock(nn.Module):
    """Two 3x3 convolutions and a shortcut; the last gain starts at 0, so the block starts as its shortcut."""

    def __init__(self, inplanes: int, planes: int, stride: int):
        super().__init__()
        self.conv1 = nn.Conv2d(inplanes, planes, 3, stride, 1, bias=False)
        self.bn1 = BatchNorm2d(planes)
        self.conv2 = nn.Conv2d(planes, planes, 3, 1, 1, bias=False)
        self.bn2 = BatchNorm2d(planes)
        nn.init.zeros_(self.bn2.weight)
        self.downsample = None
        if stride > 1 or inplanes != planes:
            self.downsample = nn.Sequential(nn.Conv2d(inplanes, planes, 1, stride, bias=False), BatchNorm2d(planes))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        shortcut = x if self.downsample is None else self.downsample(x)
        x = F.relu(self.bn1(self.conv1(x)), inplace=True)
        return F.relu(self.bn2(self.conv2(x)) + shortcut, inplace=True)


# Copied from clip.py
class TinyResNet(nn.Module):
    """A residual net for 32 px images: 0.32 M parameters, about 2,500 training images/s on 2 CPU cores."""

    def __init__(self, embed_dim: int):
        super().__init__()
        self.conv1 = nn.Conv2d(3, 32, 5, 2, 2, bias=False)
        self.bn1 = BatchNorm2d(32)
        self.layers = nn.Sequential(BasicBlock(32, 32, 1), BasicBlock(32, 64, 2), BasicBlock(64, 128, 2))
        self.proj = nn.Linear(128, embed_dim)

    def forward(self, images: torch.Tensor) -> torch.Tensor:  # [B, 3, 32, 32] -> [B, D]
        x = F.relu(self.bn1(self.conv1(images)), inplace=True)  # [B, 32, 16, 16]
        x = self.layers(x)  # [B, 128, 4, 4]
        return self.proj(x.mean((2, 3)))


# Copied from clip.py
class Bottleneck(nn.Module):
    """CLIP's bottleneck: all convolutions have stride 1, an average pool before the last one does the striding."""

    def __init__(self, inplanes: int, planes: int, stride: int):
        super().__init__()
        self.conv1 = nn.Conv2d(inplanes, planes, 1, bias=False)
        self.bn1 = BatchNorm2d(planes)
        self.conv2 = nn.Conv2d(planes, planes, 3, padding=1, bias=False)
        self.bn2 = BatchNorm2d(planes)
        self.avgpool = nn.AvgPool2d(stride) if stride > 1 else nn.Identity()
        self.conv3 = nn.Conv2d(planes, 4 * planes, 1, bias=False)
        self.bn3 = BatchNorm2d(4 * planes)
        nn.init.zeros_(self.bn3.weight)
        self.downsample = None
        if stride > 1 or inplanes != 4 * planes:  # keys "0" and "1" are CLIP's; the pool has no parameters
            self.downsample = nn.Sequential(nn.Conv2d(inplanes, 4 * planes, 1, bias=False), BatchNorm2d(4 * planes))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        shortcut = x if self.downsample is None else self.downsample(self.avgpool(x))
        x = F.relu(self.bn1(self.conv1(x)), inplace=True)
        x = F.relu(self.bn2(self.conv2(x)), inplace=True)
        return F.relu(self.bn3(self.conv3(self.avgpool(x))) + shortcut, inplace=True)


# Copied from clip.py
class AttentionPool2d(nn.Module):
    """Multi-head attention with one query, the mean token; c_proj's output is the image embedding."""

    def __init__(self, side: int, width: int, n_heads: int, embed_dim: int):
        super().__init__()
        self.n_heads = n_heads
        self.positional_embedding = nn.Parameter(torch.randn(side**2 + 1, width) * width**-0.5)
        self.k_proj = nn.Linear(width, width)
        self.q_proj = nn.Linear(width, width)
        self.v_proj = nn.Linear(width, width)
        self.c_proj = nn.Linear(width, embed_dim)
        for linear in (self.k_proj, self.q_proj, self.v_proj, self.c_proj):
            nn.init.normal_(linear.weight, std=width**-0.5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:  # [B, width, h, w] -> [B, D]
        x = x.flatten(2).transpose(1, 2)  # [B, P, width]
        x = torch.cat([x.mean(1, keepdim=True), x], 1) + self.positional_embedding.to(x.dtype)  # [B, 1 + P, width]
        # With one query, q (Wk x) = (q Wk) x and sum a (Wv x) = Wv (sum a x): no token is projected. Per head, 64 wide:
        q = self.q_proj(x[:, 0]).unflatten(1, (self.n_heads, -1))  # [B, H, 64]
        k_weight, v_weight = (p.weight.unflatten(0, (self.n_heads, -1)) for p in (self.k_proj, self.v_proj))
        k_bias, v_bias = (p.bias.unflatten(0, (self.n_heads, -1)) for p in (self.k_proj, self.v_proj))
        scores = torch.einsum("bhw,hwc->bhc", q, k_weight) @ x.transpose(1, 2) + (q * k_bias).sum(2, keepdim=True)
        pooled = (scores * q.shape[2] ** -0.5).softmax(2) @ x  # [B, H, width]
        return self.c_proj((torch.einsum("bhc,hwc->bhw", pooled, v_weight) + v_bias).flatten(1))


# Copied from clip.py
class ModifiedResNet(nn.Module):
    """CLIP's ResNet-50: a stem of three convolutions, anti-aliased strides, attention pooling."""

    def __init__(self, embed_dim: int, image_size: int, layers: tuple[int, ...] = (3, 4, 6, 3), width: int = 64):
        super().__init__()
        self.conv1 = nn.Conv2d(3, width // 2, 3, stride=2, padding=1, bias=False)
        self.bn1 = BatchNorm2d(width // 2)
        self.conv2 = nn.Conv2d(width // 2, width // 2, 3, padding=1, bias=False)
        self.bn2 = BatchNorm2d(width // 2)
        self.conv3 = nn.Conv2d(width // 2, width, 3, padding=1, bias=False)
        self.bn3 = BatchNorm2d(width)
        inplanes = width
        for i, n_blocks in enumerate(layers):
            planes = width * 2**i
            blocks = [Bottleneck(inplanes, planes, 2 if i else 1)]
            blocks += [Bottleneck(4 * planes, planes, 1) for _ in range(n_blocks - 1)]
            setattr(self, f"layer{i + 1}", nn.Sequential(*blocks))
            inplanes = 4 * planes
        self.attnpool = AttentionPool2d(image_size // 32, inplanes, inplanes // 64, embed_dim)

    def forward(self, images: torch.Tensor) -> torch.Tensor:  # [B, 3, S, S] -> [B, D]
        x = F.relu(self.bn1(self.conv1(images)), inplace=True)
        x = F.relu(self.bn2(self.conv2(x)), inplace=True)
        x = F.avg_pool2d(F.relu(self.bn3(self.conv3(x)), inplace=True), 2)
        x = self.layer4(self.layer3(self.layer2(self.layer1(x))))  # [B, 2048, S / 32, S / 32]
        return self.attnpool(x)


# Copied from sl_vocab_subsample.py
def resize_positions(positions: torch.Tensor, height: int, width: int) -> torch.Tensor:
    """Position embeddings of another grid: [1 + P, D], the first of the class token, -> [1 + height * width, D]."""
    side = math.isqrt(len(positions) - 1)
    if (height, width) == (side, side):
        return positions
    grid = positions[1:].float().unflatten(0, (side, side)).permute(2, 0, 1)[None]
    grid = F.interpolate(grid, (height, width), mode="bicubic", align_corners=False)
    return torch.cat([positions[:1], grid[0].flatten(1).T.to(positions.dtype)])


class AnySizeAttentionPool2d(AttentionPool2d):
    """The attention pool with its positions resized to the feature map, for local crops."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:  # [B, width, S, S] -> [B, D]
        positions = resize_positions(self.positional_embedding, *x.shape[2:])
        if positions is self.positional_embedding:
            return super().forward(x)
        return torch.func.functional_call(self, {"positional_embedding": positions}, x)  # which fit: the line above


# Copied from sl_vocab_subsample.py
class ViTBlock(nn.Module):
    """Pre-norm transformer block with the parameter names of the published DINO weights."""

    def __init__(self, width: int):
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width, eps=1e-6), nn.LayerNorm(width, eps=1e-6)
        self.attn = nn.ModuleDict({"qkv": nn.Linear(width, 3 * width), "proj": nn.Linear(width, width)})
        self.mlp = nn.ModuleDict({"fc1": nn.Linear(width, 4 * width), "fc2": nn.Linear(4 * width, width)})

    def forward(self, x: torch.Tensor, n: int) -> torch.Tensor:  # [B, L, width] -> [B, n, width], the first n tokens
        qkv = self.attn["qkv"](self.norm1(x)).unflatten(2, (3, -1, 64))  # [B, L, 3, H, 64]
        q, k, v = (part.transpose(1, 2) for part in qkv.unbind(2))  # [B, H, L, 64] each; unbound here: one copy back
        mixed = F.scaled_dot_product_attention(q[:, :, :n], k, v)
        x = x[:, :n] + self.attn["proj"](mixed.transpose(1, 2).flatten(2))
        return x + self.mlp["fc2"](F.gelu(self.mlp["fc1"](self.norm2(x))))


# Copied from sl_vocab_subsample.py
class ViT(nn.Module):
    """ViT with the parameter names of the published DINO weights; crops of any multiple of the patch size."""

    def __init__(self, image_size: int, patch_size: int, width: int):
        super().__init__()
        self.cls_token = nn.Parameter(torch.zeros(1, 1, width))
        self.pos_embed = nn.Parameter(torch.zeros(1, 1 + (image_size // patch_size) ** 2, width))
        self.patch_embed = nn.ModuleDict({"proj": nn.Conv2d(3, width, patch_size, patch_size)})
        self.blocks = nn.ModuleList(ViTBlock(width) for _ in range(12))
        self.norm = nn.LayerNorm(width, eps=1e-6)
        for name, p in self.named_parameters():
            if "norm" not in name:
                nn.init.zeros_(p) if name.endswith("bias") else nn.init.trunc_normal_(p, std=0.02)

    def forward(self, images: torch.Tensor) -> torch.Tensor:  # [B, 3, S, S] -> [B, width]
        x = self.patch_embed["proj"](images)  # [B, width, h, w]
        positions = resize_positions(self.pos_embed[0], *x.shape[2:])
        x = torch.cat([self.cls_token.to(x.dtype).expand(len(x), -1, -1), x.flatten(2).transpose(1, 2)], 1)
        x = x + positions.to(x.dtype)
        for block in self.blocks[:-1]:
            x = block(x, x.shape[1])
        return self.norm(self.blocks[-1](x, 1)[:, 0])  # what the last block makes of the other tokens is not used


TOWERS = {
    "tiny": dict(embed_dim=256, image_size=32),  # mean and maximum of 128 channels
    "RN50": dict(embed_dim=1024, image_size=224),
    "ViT-S-16": dict(embed_dim=384, image_size=224),
    "resnet50": dict(embed_dim=2048, image_size=224),
}


class Head(nn.Module):
    """Projection to unit vectors and their cosines with the prototypes of the step.

    `prototypes` [M, D] are working rows: the table of all K stays outside (PrototypeTable).
    """

    def __init__(self, embed_dim: int, hidden: int, D: int, M: int, has_bn: bool = False):
        super().__init__()

        def norm() -> list[nn.Module]:  # statistics over all processes need the batch norm of images
            return [nn.Unflatten(1, (hidden, 1, 1)), BatchNorm2d(hidden), nn.Flatten(1)] if has_bn else []

        self.mlp = nn.Sequential(nn.Linear(embed_dim, hidden), *norm(), nn.GELU(),
                                 nn.Linear(hidden, hidden), *norm(), nn.GELU(), nn.Linear(hidden, D))
        for layer in self.mlp:
            if isinstance(layer, nn.Linear):
                nn.init.trunc_normal_(layer.weight, std=0.02)
                nn.init.zeros_(layer.bias)
        self.prototypes = nn.Parameter(torch.zeros(M, D))

    def forward(self, embed: torch.Tensor) -> torch.Tensor:  # [n, embed_dim] -> [n, M] float32
        return self.logits(self.mlp(embed).float())

    @torch.compiler.disable  # a compiled graph would leave out what exact_matmul sets
    def logits(self, z: torch.Tensor) -> torch.Tensor:
        with torch.autocast(z.device.type, enabled=False), exact_matmul():
            # DINO's weight norm with gain 1: one pass over the rows each way, where F.normalize makes several.
            prototypes = torch._weight_norm(self.prototypes, z.new_ones(len(self.prototypes), 1), 0)
            return F.normalize(z, dim=1) @ prototypes.T


class Network(nn.Module):
    """Image tower and head: a student or a teacher."""

    def __init__(self, arch: str, hidden: int, D: int, M: int, has_bn: bool):
        super().__init__()
        self.arch, self.embed_dim, self.image_size = arch, TOWERS[arch]["embed_dim"], TOWERS[arch]["image_size"]
        if arch == "tiny":
            self.visual = TinyResNet(64)
            self.visual.proj.requires_grad_(False)  # not used here; sl_vocab_subsample.py's --init expects it
        elif arch == "RN50":
            self.visual = ModifiedResNet(self.embed_dim, self.image_size)
            self.visual.attnpool.__class__ = AnySizeAttentionPool2d  # same parameters, and local crops fit
        elif arch == "resnet50":
            self.visual = torchvision.models.resnet50(norm_layer=BatchNorm2d)
            self.visual.fc = nn.Identity()
        else:
            self.visual = ViT(self.image_size, 16, self.embed_dim)
        self.head = Head(self.embed_dim, hidden, D, M, has_bn)

    def encode_image(self, images: torch.Tensor) -> torch.Tensor:
        """[n, 3, S, S], 0..255 -> [n, embed_dim], not normalised."""
        images = standardize(images)
        if self.arch != "tiny":
            return self.visual(images)
        x = self.visual.layers(F.relu(self.visual.bn1(self.visual.conv1(images)), inplace=True))  # [n, 128, h, w]
        return torch.cat([x.mean((2, 3)), x.amax((2, 3))], 1)

    def forward(self, crops: list[torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
        """crops: one batch a size, [n_i, 3, S_i, S_i]. Returns: [n, M] float32 cosines; [n, embed_dim]; n = sum n_i."""
        embed = torch.cat([self.encode_image(x) for x in crops])
        return self.head(embed), embed


class RawPixels:
    """A baseline with the interface of a network: the features are the pixels."""

    image_size, embed_dim = 32, 3 * 32 * 32

    def encode_image(self, images: torch.Tensor) -> torch.Tensor:
        return images.flatten(1) / 255


# What torch.load, torch.jit.load and safetensors raise for a file that is something else, or cut or damaged.
UNREADABLE = (OSError, RuntimeError, ValueError, EOFError, LookupError, AttributeError, struct.error)
UNREADABLE += (zipfile.BadZipFile, pickle.UnpicklingError)


# Copied from clip.py
def load_weights(path: str) -> dict:
    """Read weights of clip.py, open_clip (.pt, .safetensors) or OpenAI (TorchScript).

    Returns: {"state_dict", ...} as the training scripts save it; other sources have "state_dict", maybe "activation".
    Raises: SystemExit for a missing or unreadable file.
    """
    if not Path(path).is_file():
        raise SystemExit(f"{path}: no such checkpoint")
    try:
        if path.endswith(".safetensors"):
            try:
                import safetensors.torch
                checkpoint = safetensors.torch.load_file(path)
            except ImportError:
                raise SystemExit(f"{path}: needs safetensors (pip install safetensors)") from None
            except safetensors.SafetensorError as error:
                raise ValueError(error) from None
        elif zipfile.is_zipfile(path) and any(n.endswith("/constants.pkl") for n in zipfile.ZipFile(path).namelist()):
            checkpoint = {k: v.float() for k, v in torch.jit.load(path, map_location="cpu").state_dict().items()}
            for key in ("input_resolution", "context_length", "vocab_size"):
                checkpoint.pop(key, None)
            checkpoint = {"state_dict": checkpoint, "activation": "quick_gelu"}  # OpenAI's archives
        else:
            with torch.serialization.safe_globals([argparse.Namespace]):  # the public DINO keeps its flags so
                checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    except UNREADABLE as error:
        raise SystemExit(f"{path}: cannot be read as a checkpoint: {str(error)[:300]}") from None
    if not isinstance(checkpoint, dict) or "state_dict" not in checkpoint:
        checkpoint = {"state_dict": checkpoint}
    state = checkpoint["state_dict"]
    if not isinstance(state, dict) or not all(isinstance(k, str) for k in state):
        raise SystemExit(f"{path}: cannot be read as a checkpoint: it holds no weights by name")
    names = {re.sub(r"^(module\.|_orig_mod\.)+|\._orig_mod", "", k): v for k, v in state.items()}
    return checkpoint | {"state_dict": names}


# Copied from clip.py
def load_state(model: nn.Module, state_dict: dict[str, torch.Tensor], path: str) -> None:
    """Load strictly: SystemExit for other names or shapes, with both lists, and for values that are not finite."""
    own = model.state_dict()
    state_dict = {k: v for k, v in own.items() if k.endswith("batches_tracked")} | state_dict  # torch 0.4 wrote none
    missing, unexpected = sorted(own.keys() - state_dict), sorted(state_dict.keys() - own)
    found = {k: getattr(state_dict[k], "shape", None) for k in own if k in state_dict}  # None: no tensor
    shapes = [f"{k} {v and tuple(v)} for {tuple(own[k].shape)}" for k, v in found.items() if v != own[k].shape]
    if missing or unexpected or shapes:
        raise SystemExit(f"{path} does not fit the model (another --arch?): missing {missing[:5]}, unexpected "
                         f"{unexpected[:5]}, shapes {shapes[:5]}")
    if broken := [name for name, value in state_dict.items() if not bool(value.isfinite().all())]:
        raise SystemExit(f"{path}: values that are not finite in {broken[:5]}")
    model.load_state_dict(state_dict)


def load_backbone(model: Network, path: str) -> None:
    """Load an image tower: keys visual.* (clip.py, this script), backbone.* (public DINO, its teacher) or bare ones.

    Layers that are not used here (proj of tiny, torchvision's fc) need not be there.
    """
    weights = load_weights(path)["state_dict"]
    if isinstance(weights.get("teacher"), dict):  # the public code's full checkpoint
        weights = {name.removeprefix("module."): value for name, value in weights["teacher"].items()}
    weights = {name: value for name, value in weights.items() if isinstance(value, torch.Tensor)}
    prefix = next((p for p in ("visual.", "backbone.") if any(name.startswith(p) for name in weights)), "")
    weights = {name.removeprefix(prefix): value for name, value in weights.items() if name.startswith(prefix)}
    weights = {name: value for name, value in weights.items() if not name.startswith("fc.")}
    own = model.visual.state_dict()
    weights |= {name: own[name] for name in own if model.arch == "tiny" and name.startswith("proj.")}  # not used here
    load_state(model.visual, weights, f"--init {path}")


# ------------------------------------------------------------------------------ data

ALIASES = {"image": ("filepath", "path", "file"), "label": ("class", "wnid"), "caption": ("text", "title")}
IMAGE_FORMATS = ["JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM"]  # not EPS: Pillow would run Ghostscript on it
KEEP_PIXELS = 16 * 2**30  # bytes of .npy images kept on the device; beyond it they are read in the workers
GAVE_UP = "gave up"  # the reason, where no replacement could be read either
N_DRAWS = 16  # random numbers of a view, for augment_dino and augment_colour


# Copied from clip.py
class Table:
    """A TSV with a header line, held as a memory map and one int64 offset a row.

    Rows are split when asked for, so 100 M rows and any number of workers share one copy (the page cache).
    columns: name -> place, with `image`, `label`, `caption` by their aliases too. folder: images are relative to it.
    Raises: SystemExit for a missing or empty file, a missing image column, a row with another number of fields.
    """

    def __init__(self, path: str | Path):
        self.path, self.folder, self.file = Path(path), Path(path).parent, None
        if not self.path.is_file():
            raise SystemExit(f"{path}: no such file")
        with open(path, "rb") as file:
            header = file.readline()
        names = header.decode("utf-8-sig", "replace").rstrip("\r\n").split("\t")
        self.columns, lower = {name: i for i, name in enumerate(names)}, [name.lower() for name in names]
        for name, aliases in ALIASES.items():
            found = [alias for alias in (name, *aliases) if alias in lower]
            if name not in self.columns and found:
                self.columns[name] = lower.index(found[0])
        self.n_fields = len(names)
        if "image" not in self.columns:
            raise SystemExit(f"{path}: no image column; found {names}; expected a tab-separated header with image (or "
                             f"{', '.join(ALIASES['image'])}), label, caption")
        content = np.memmap(path, np.uint8, "r")
        starts, self.crc = [np.array([len(header)])], zlib.crc32(header)  # of the table, not of its images
        for block in range(len(header), len(content), 2**26):
            starts.append(np.flatnonzero(content[block : block + 2**26] == ord("\n")) + block + 1)
            self.crc = zlib.crc32(content[block : block + 2**26], self.crc)
        starts = np.concatenate(starts)
        starts = starts[starts < len(content)]
        starts = starts[~np.isin(content[starts], (ord("\n"), ord("\r")))]  # no blank lines
        if not len(starts):
            raise SystemExit(f"{path}: no rows below the header")
        self.starts = torch.from_numpy(starts)  # a tensor, since it goes to worker processes without a copy

    def __len__(self) -> int:
        return len(self.starts)

    def __getstate__(self) -> dict:
        return self.__dict__ | {"file": None}  # a map cannot be pickled: each process opens its own

    def __getitem__(self, row: int) -> list[str]:
        """Fields of a row."""
        if self.file is None:
            with open(self.path, "rb") as file:
                self.file = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        self.file.seek(int(self.starts[row]))
        line = self.file.readline().decode("utf-8", "replace").removesuffix("\n").removesuffix("\r")
        fields = line.split("\t")
        if len(fields) != self.n_fields:
            raise SystemExit(f"{self.path}: row {row + 1} has {len(fields)} fields, the header {self.n_fields}: "
                             f"{line[:100]!r}")
        return fields

    def get(self, row: int, name: str) -> str:
        """One field of a row; empty when there is no such column."""
        return self[row][self.columns[name]] if name in self.columns else ""


# Copied from clip.py
def read_classes(root: Path) -> list[dict[str, str]]:
    """Rows of ROOT/classes.tsv (name, synonyms, definition), in label order; empty if there is no such file."""
    path = root / "classes.tsv"
    if not path.is_file():
        return []
    try:
        text = path.read_text("utf-8-sig")
    except UnicodeDecodeError as error:
        raise SystemExit(f"{path} is not UTF-8: {error}; save it as UTF-8") from None
    lines = [line.split("\t") for line in text.split("\n") if line.strip()]  # splitlines() cuts at more than newlines
    if not lines or "name" not in lines[0]:
        raise SystemExit(f"{path}: no column name in {lines[:1]}")
    return [dict(zip(lines[0], line + [""] * len(lines[0]))) for line in lines[1:]]


# Copied from clip.py
def class_ids(classes: list[dict[str, str]]) -> dict[str, int]:
    """Number of a class by its name and wnid; -1 for what several classes are called (a crane, and another)."""
    ids = {}
    for column in ("name", "wnid"):
        names = [row.get(column, "") for row in classes]
        n_called = Counter(names)
        ids |= {name: i if n_called[name] == 1 else -1 for i, name in enumerate(names) if name}
    return ids


# Copied from clip.py
def label_of(field: str, ids: dict[str, int]) -> int:
    """The class of a label: its number (3, or 3.0 as pandas writes it beside a missing one), name or wnid; or -1."""
    is_number = re.fullmatch(r"\d{1,18}(\.0*)?", field, re.A)
    return int(field.partition(".")[0]) if is_number else ids.get(field, -1)


# Copied from clip.py
def read_labels(table: Table, classes: list[dict[str, str]]) -> np.ndarray:
    """[n] int64 labels, -1 for none; of several in a field (`3|17`) the first counts."""
    ids, labels = class_ids(classes), np.full(len(table), -1)
    for row in range(len(table)):
        field = table.get(row, "label").strip("| ").split("|")[0].strip()
        if field:
            label = label_of(field, ids)
            if not 0 <= label < (len(classes) or label + 1):
                known = f"nor a name or wnid that no other has, of the {len(classes)} classes of classes.tsv"
                raise SystemExit(f"{table.path}: row {row + 1} has label {field[:100]!r}, not the number, "
                                 + (known if classes else "and there is no classes.tsv for names"))
            labels[row] = label
    return labels


# Copied from clip.py
def uniform_hash(*keys: int | np.ndarray) -> np.ndarray:
    """Uniform numbers in [0, 1), float64, a function of the (broadcast) integer keys alone.

    So what is drawn for an example depends on seed, example and epoch, never on ranks, workers or a restart.
    Source: the finaliser of splitmix64 (Steele et al., OOPSLA 2014), chained over the keys.
    """
    x = np.uint64(0)
    with np.errstate(over="ignore"):
        for key in keys:
            x = (x ^ np.asarray(key).astype(np.uint64)) + np.uint64(0x9E3779B97F4A7C15)
            x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
            x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
            x = x ^ (x >> np.uint64(31))
    return (x >> np.uint64(11)) * 2.0**-53


# Copied from clip.py
def locate_image(table: Table, row: int) -> tuple[Path, int, int]:
    """Where the image of a row is: path, offset (row of an .npy, -1 if none is named), size in bytes or -1 for all."""
    field = table.get(row, "image")
    if match := re.fullmatch(r"(.+\.tar):(\d{1,4000}):(\d{1,4000})", field):
        return table.folder / match[1], int(match[2]), int(match[3])
    if match := re.fullmatch(r"(.+\.npy):(\d{1,4000})", field):
        return table.folder / match[1], int(match[2]), -1
    return table.folder / field, -1 if field.endswith(".npy") else 0, -1


# Copied from clip.py
@functools.lru_cache(maxsize=64)
def open_npy(path: Path) -> np.ndarray:
    """Memory map of a uint8 array (N, H, W, 3)."""
    array = np.lib.format.open_memmap(path, mode="r")  # np.load would take an .npz by another name
    if array.dtype != np.uint8 or array.ndim != 4 or array.shape[3] != 3:
        raise ValueError(f"{path} holds {array.dtype} {array.shape}, expected uint8 (N, H, W, 3)")
    return array


# Copied from clip.py
def read_image(table: Table, row: int, min_side: float, max_pixels: int) -> Image.Image | str:
    """Decode an image to RGB, turned as its EXIF says, alpha on white; or the reason why that cannot be done.

    min_side: px that the caller needs of each side; JPEGs are decoded at 1/2, 1/4 or 1/8 where that leaves enough.
    max_pixels: limit on what the header announces, checked before a pixel is decoded.
    """
    Image.MAX_IMAGE_PIXELS = None  # Pillow's own limit warns at a fixed size; ours is a flag and comes before decoding
    path, offset, size = locate_image(table, row)
    try:
        if offset < 0:
            return "no row of the .npy file is named"
        if path.suffix == ".npy":
            return Image.fromarray(open_npy(path)[offset])
        with open(path, "rb", buffering=0) as file:
            if offset + size > os.fstat(file.fileno()).st_size:  # before read() asks for that much memory
                return "offset or size beyond the end of the file"
            file.seek(offset)
            image = Image.open(io.BytesIO(file.read(size)), formats=IMAGE_FORMATS)
        if image.width * image.height > max_pixels:
            return "more pixels than --max-pixels"
        image.draft("RGB", (math.ceil(min_side), math.ceil(min_side)))
        image = ImageOps.exif_transpose(image)
        if image.mode == "F" and not np.isfinite(np.asarray(image)).all():
            return "values that are not finite"
        if image.mode.startswith("I;16") or image.mode == "I":  # 16-bit grey: Pillow's convert would clip at 255
            image = Image.fromarray((np.asarray(image).clip(0, 65535) >> 8).astype(np.uint8))
        if image.mode in ("RGBA", "LA", "PA", "La", "RGBa") or "transparency" in image.info:
            image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image.convert("RGBA"))
        return image.convert("RGB")
    except FileNotFoundError:
        return "missing file"
    except IndexError:
        return "row beyond the end of the .npy file"
    except Image.UnidentifiedImageError:
        return "not an image"
    except (OSError, ValueError, TypeError, KeyError, AttributeError, AssertionError, ArithmeticError, SyntaxError,
            EOFError, struct.error, zlib.error) as error:  # Pillow's; odd EXIF data give any of the first six
        if path.suffix == ".npy":
            return "no .npy file of uint8 (N, H, W, 3)"
        return "truncated" if "truncated" in str(error).lower() else "cannot be decoded"


# Copied from clip.py
def crop_boxes(scale: tuple[float, float], max_ratio: float, aspect: np.ndarray, *keys: int | np.ndarray) -> np.ndarray:
    """Random crops with the law of torchvision's RandomResizedCrop(scale, ratio=(1 / max_ratio, max_ratio)).

    aspect: [B] image width / height. keys: integers [B] that seed the draws.
    Returns [B, 4] left, top, right, bottom as fractions of width and height. Ten tries to fit, else the largest crop.
    """
    B = len(aspect)
    draws = uniform_hash(*(np.reshape(key, (-1, 1)) for key in keys), np.arange(22)) + np.zeros((B, 1))  # [B, 22]
    area = scale[0] + (scale[1] - scale[0]) * draws[:, :10]
    ratio = max_ratio ** (2 * draws[:, 10:20] - 1)
    width, height = np.sqrt(area * ratio / aspect[:, None]), np.sqrt(area / ratio * aspect[:, None])  # [B, 10] of 1
    fits = (width <= 1) & (height <= 1)
    first, any_fits = (np.arange(B), fits.argmax(1)), fits.any(1)
    largest = aspect.clip(1 / max_ratio, max_ratio)  # of the largest crop, from the centre when no try fits
    width = np.where(any_fits, width[first], np.minimum(1, largest / aspect))
    height = np.where(any_fits, height[first], np.minimum(1, aspect / largest))
    left, top = (np.where(any_fits, draws[:, k], 0.5) * (1 - side) for k, side in ((20, width), (21, height)))
    return np.stack([left, top, left + width, top + height], 1)


# Copied from clip.py
def read_or_replace(tables: list[Table], examples: np.ndarray, i: int, min_side: float, max_pixels: int, seed: int,
                    bad: list[tuple[str, str]]) -> Image.Image:
    """The image of examples[i]; another example takes its place, in the array too, if it cannot be read.

    examples: [B, 3] (set, row, epoch), by which replacements are drawn. min_side: px, see read_image.
    bad: gets (reason, place) of each image that cannot be read, (GAVE_UP, message) where a hundred in a row were bad.
    """
    for attempt in range(100):
        s, row, epoch = map(int, examples[i])
        image = read_image(tables[s], row, min_side, max_pixels)
        if not isinstance(image, str):
            return image
        bad.append((image, f"{tables[s].path}: {tables[s].get(row, 'image')}"))
        examples[i, 1] = int(uniform_hash(seed, 3, s, row, epoch, attempt) * len(tables[s]))
    # A worker process cannot end the run: RunLog.count does.
    bad.append((GAVE_UP, f"100 unreadable images in a row, the last: {': '.join(bad[-1])}"))
    return Image.new("RGB", (32, 32))


# Copied from clip.py
def center_box(width: int, height: int) -> tuple[float, float, float, float]:
    """The largest centred square: what is left by "resize the short side, then crop the centre"."""
    side = min(width, height)
    return (width - side) / 2, (height - side) / 2, (width + side) / 2, (height + side) / 2


# Copied from clip.py
def crop_pixels(pixels: torch.Tensor, boxes: torch.Tensor, image_size: int) -> torch.Tensor:
    """Crop and resize images on the device: [B, H, W, 3] uint8, [B, 4] fractions -> [B, 3, S, S] float, 0..255."""
    x = pixels.permute(0, 3, 1, 2).float()
    left, top, right, bottom = boxes.float().unbind(1)
    zero = torch.zeros_like(left)  # affine_grid's coordinates run from -1 to 1
    theta = torch.stack([right - left, zero, left + right - 1, zero, bottom - top, top + bottom - 1], 1).view(-1, 2, 3)
    grid = F.affine_grid(theta, [len(x), 3, image_size, image_size], align_corners=False)
    return F.grid_sample(x, grid, padding_mode="border", align_corners=False)


# Copied from clip.py
def load_pixels(tables: list[Table], image_size: int = 0) -> torch.Tensor | None:
    """All images of tables, one after the other, [n, H, W, 3] uint8; None if not all are rows of .npy of one size.

    image_size: px that crops of them will have, 0 for none; None too if the images are much larger or not square, since
    crop_pixels has no antialiasing filter and assumes an aspect of 1, and if a row is beyond the end of its file: then
    images are read one by one, and the broken ones counted.
    """
    places, n = defaultdict(list), 0
    for table in tables:
        for row in range(len(table)):
            path, index, _ = locate_image(table, row)
            if path.suffix != ".npy" or index < 0:
                return None
            places[path].append((n, index))
            n += 1
    try:
        arrays = {path: open_npy(path) for path in places}
        shapes = {array.shape[1:] for array in arrays.values()}
        if len(shapes) > 1 or n * math.prod(*shapes) > KEEP_PIXELS:
            return None
        H, W, _ = shapes.pop()
        if image_size and (H != W or H > 1.3 * image_size):
            return None
        pixels = np.empty((n, H, W, 3), np.uint8)
        for path, array in arrays.items():
            place, row = np.array(places[path]).T
            if row.max() >= len(array):
                print(f"{path}: {len(array)} rows, row {row.max()} is named: images are read one by one", flush=True)
                return None
            pixels[place] = array[row]
    except (OSError, ValueError, EOFError) as error:
        raise SystemExit(f"images of {', '.join(str(table.path) for table in tables)}: {error}") from None
    return torch.from_numpy(pixels)


# Copied from clip.py
class Sampler:
    """Which examples make up each step: a function of seed and step, the same for any number of processes.

    Each set runs through its own shuffled epochs, without a remainder; a step takes its share from each. Iterating
    gives, from step `start` on, this process's part of the batch as [B, 3] rows (set, row, epoch).
    """

    def __init__(self, sizes: list[int], shares: np.ndarray, batch_size: int, seed: int, start: int, stop: int,
                 rank: int, world_size: int):
        self.sizes, self.batch_size, self.seed = sizes, batch_size, seed
        self.shares = [round(float(share) * 2**40) for share in shares]  # integers: what follows is exact
        self.start, self.stop, self.rank, self.world_size = start, stop, rank, world_size
        self.orders = {}  # set -> (epoch, permutation)

    def given(self, n: int) -> list[int]:
        """How many of the first n pairs come from each set: n in all, never less than for fewer pairs."""
        counts, rest = [], sum(self.shares)
        for share in self.shares:  # each takes its part, rounded, of what the sets before it left
            counts.append((n * share + rest // 2) // rest if rest else 0)
            n, rest = n - counts[-1], rest - share
        return counts

    def batch(self, step: int) -> np.ndarray:
        """[N, 3] int64: set, row, epoch of each example of a step, over all processes."""
        before, after = self.given(step * self.batch_size), self.given((step + 1) * self.batch_size)
        examples = []
        for s, size in enumerate(self.sizes):
            positions = np.arange(before[s], after[s])
            for epoch in np.unique(positions // size):
                if self.orders.get(s, (None,))[0] != epoch:
                    self.orders[s] = (epoch, np.random.default_rng([self.seed, s, epoch]).permutation(size))
                rows = self.orders[s][1][positions[positions // size == epoch] % size]
                examples.append(np.stack([np.full_like(rows, s), rows, np.full_like(rows, epoch)], 1))
        examples = np.concatenate(examples)
        return examples if len(self.sizes) == 1 else np.random.default_rng([self.seed, step]).permutation(examples)

    def __iter__(self) -> Iterator[np.ndarray]:
        B = self.batch_size // self.world_size
        for step in range(self.start, self.stop):
            yield self.batch(step)[self.rank * B : (self.rank + 1) * B]


class Views(torch.utils.data.Dataset):
    """Views of training images, and the random numbers of their colours; whole batches at a time.

    sizes: [V] px. scales: [V] (smallest, largest) area. Set from outside: pixel_offsets [sets], where the rows of a
    set start among the images on the device.
    """

    def __init__(self, tables: list[Table], sizes: list[int], scales: list[tuple[float, float]], max_ratio: float,
                 max_pixels: int, seed: int):
        self.tables, self.sizes, self.scales, self.max_ratio = tables, sizes, scales, max_ratio
        self.max_pixels, self.seed, self.pixel_offsets = max_pixels, seed, None
        self.smallest = max(size / math.sqrt(scale[0] / max_ratio) for size, scale in zip(sizes, scales))  # side, px

    def boxes(self, v: int, aspect: np.ndarray, examples: np.ndarray) -> np.ndarray:
        return crop_boxes(self.scales[v], self.max_ratio, aspect, self.seed, 7, v, *examples.T)

    def __getitems__(self, examples: np.ndarray) -> dict:
        """[B, 3] (set, row, epoch) -> draws [V, B, N_DRAWS], bad, and pixel_rows [B], boxes [V, B, 4] or V crops."""
        examples, bad, V = np.array(examples), [], len(self.sizes)
        if self.pixel_offsets is None:
            crops = [np.empty((len(examples), size, size, 3), np.uint8) for size in self.sizes]
            for i in range(len(examples)):
                image = read_or_replace(self.tables, examples, i, self.smallest, self.max_pixels, self.seed, bad)
                for v, size in enumerate(self.sizes):
                    box = self.boxes(v, np.array([image.width / image.height]), examples[i : i + 1])[0]
                    box = tuple(box * (image.width, image.height, image.width, image.height))
                    crops[v][i] = image.resize((size, size), Image.Resampling.BICUBIC, box)
            batch = {"crops": [torch.from_numpy(x).permute(0, 3, 1, 2) for x in crops]}
        else:
            boxes = [self.boxes(v, np.ones(len(examples)), examples) for v in range(V)]
            batch = {"pixel_rows": torch.from_numpy(self.pixel_offsets[examples[:, 0]] + examples[:, 1]),
                     "boxes": torch.from_numpy(np.stack(boxes)).float()}
        draws = uniform_hash(self.seed, 8, *(examples.T[:, None, :, None]), np.arange(V)[:, None, None],
                             np.arange(N_DRAWS))
        return batch | {"draws": torch.from_numpy(draws.astype(np.float32)), "bad": bad}


def grey(x: torch.Tensor) -> torch.Tensor:
    """[n, 3, S, S] -> [n, 1, S, S], ITU-R 601-2 luma."""
    return 0.2989 * x[:, :1] + 0.587 * x[:, 1:2] + 0.114 * x[:, 2:]


def blend(x: torch.Tensor, other: torch.Tensor, factor: torch.Tensor) -> torch.Tensor:
    """factor * x + (1 - factor) * other, kept in [0, 1]."""
    return torch.lerp(other.expand_as(x), x, factor).clamp(0, 1)


def shift_hue(x: torch.Tensor, shift: torch.Tensor) -> torch.Tensor:
    """Turn the hue by `shift` [n, 1, 1, 1] of the circle; x: [n, 3, S, S] in [0, 1]. By way of HSV."""
    value, chroma = x.amax(1, keepdim=True), x.amax(1, keepdim=True) - x.amin(1, keepdim=True)
    r, g, b = (x / chroma.where(chroma > 0, 1)).split(1, 1)
    red, green = value == x[:, :1], value == x[:, 1:2]
    hue = torch.where(red, g - b, torch.where(green, b - r + 2, r - g + 4))  # sixths of the circle
    k = (hue + 6 * shift + torch.arange(5, 0, -2, device=x.device)[:, None, None]) % 6
    return value - chroma * torch.minimum(k, 4 - k).clamp(0, 1)


def gaussian_blur(x: torch.Tensor, sigma: torch.Tensor) -> torch.Tensor:
    """Blur each image by its own sigma, [n] px; x: [n, 3, S, S]. 13 taps, edges mirrored."""
    taps = torch.arange(-6, 7, device=x.device)
    kernel = (-0.5 * (taps / sigma[:, None]) ** 2).softmax(1).repeat_interleave(3, 0)[:, None]  # [3n, 1, 13]
    y = F.pad(x, (6, 6, 6, 6), "reflect").flatten(0, 1)[None]
    y = F.conv2d(y, kernel[:, :, None], groups=y.shape[1])
    return F.conv2d(y, kernel[:, :, :, None], groups=y.shape[1])[0].unflatten(0, (-1, 3))


JITTER = (lambda x, f: (x * (0.6 + 0.8 * f)).clamp(0, 1),  # brightness
          lambda x, f: blend(x, grey(x).mean((2, 3), keepdim=True), 0.6 + 0.8 * f),  # contrast
          lambda x, f: blend(x, grey(x), 0.8 + 0.4 * f),  # saturation
          lambda x, f: shift_hue(x, 0.2 * f - 0.1))


def augment_dino(x: torch.Tensor, draws: torch.Tensor, blur: list[float], solarise: list[float]) -> torch.Tensor:
    """DINO's colours: jitter in random order (p 0.8), grey (p 0.2), blur, solarise, flip (p 0.5).

    x: [n, 3, S, S] in [0, 1]. draws: [n, N_DRAWS] in [0, 1), on the CPU. blur, solarise: probabilities of a view, of
    n / len(blur) images each. Source: DINO main_dino.py, DataAugmentationDINO; torchvision ColorJitter.
    """
    def rows(chosen: torch.Tensor) -> torch.Tensor:
        return chosen.nonzero()[:, 0].to(x.device, non_blocking=True)  # found on the CPU, so that no GPU is waited for

    n_each, on_device = len(x) // len(blur), draws.to(x.device, non_blocking=True)
    order = draws[:, 6:10].argsort(1)  # [n, 4]
    for place in range(4):
        for op in range(4):
            i = rows((order[:, place] == op) & (draws[:, 1] < 0.8))
            x[i] = JITTER[op](x[i], on_device[i, 2 + op, None, None, None])
    x = torch.where((on_device[:, 10] < 0.2)[:, None, None, None], grey(x), x)
    i = rows(draws[:, 11] < torch.tensor(blur).repeat_interleave(n_each))
    if len(i):
        x[i] = gaussian_blur(x[i], 0.1 + 1.9 * on_device[i, 12])
    is_solarised = draws[:, 13] < torch.tensor(solarise).repeat_interleave(n_each)
    x = torch.where(is_solarised.to(x.device, non_blocking=True)[:, None, None, None] & (x >= 0.5), 1 - x, x)
    return torch.where((on_device[:, 0] < 0.5)[:, None, None, None], x.flip(3), x)


@functools.cache
def noise_field(device: torch.device) -> torch.Tensor:
    """[3, 256, 256] normal numbers; each view takes a window, so its noise does not depend on the process."""
    return torch.randn(3, 256, 256, generator=torch.Generator().manual_seed(0)).to(device)


def augment_colour(x: torch.Tensor, draws: torch.Tensor) -> torch.Tensor:
    """Colours that leave only outline and pattern: channels permuted (p 0.6), inverted (p 0.3), each scaled by
    e^-0.4..e^0.4 and shifted by up to 0.13, grey (p 0.25), noise of sigma 0.02, flip (p 0.5).

    x: [n, 3, S, S] in [0, 1], S <= 128. draws: [n, N_DRAWS] in [0, 1).
    """
    draws, S = draws.to(x.device, non_blocking=True), x.shape[2]
    u = draws[:, :, None, None, None]  # [n, N_DRAWS, 1, 1, 1]
    order = torch.where(draws[:, 1:2] < 0.6, draws[:, 2:5].argsort(1), torch.arange(3, device=x.device))
    x = x.gather(1, order[:, :, None, None].expand_as(x))
    x = torch.where(u[:, 5] < 0.3, 1 - x, x)
    x = x * (0.8 * u[:, 6:9, 0] - 0.4).exp() + 0.26 * u[:, 9:12, 0] - 0.13
    x = torch.where(u[:, 12] < 0.25, grey(x), x)
    top, left = (draws[:, 13:15] * (256 - S)).long().unbind(1)
    span = torch.arange(S, device=x.device)
    rows, columns = (top[:, None] + span)[:, :, None], (left[:, None] + span)[:, None]  # [n, S, 1], [n, 1, S]
    x = x + 0.02 * noise_field(x.device)[:, rows, columns].transpose(0, 1)
    return torch.where(u[:, 0] < 0.5, x.flip(3), x)


def make_crops(batch: dict, pixels: torch.Tensor | None, sizes: list[int], kind: str, device: torch.device
               ) -> list[torch.Tensor]:
    """The views of a batch on the device: one [views * B, 3, S, S] a size, view by view, 0..255."""
    crops = []
    for size in dict.fromkeys(sizes):
        views = [v for v in range(len(sizes)) if sizes[v] == size]
        if pixels is None:
            x = torch.cat([batch["crops"][v].to(device, non_blocking=True) for v in views]).float()
        else:
            images, boxes = (batch[k].to(device, non_blocking=True) for k in ("pixel_rows", "boxes"))
            images = pixels[images]
            x = torch.cat([crop_pixels(images, boxes[v], size) for v in views])
        x, draws = x / 255, batch["draws"][views].flatten(0, 1)
        if kind == "colour":
            x = augment_colour(x, draws)
        else:
            x = augment_dino(x, draws, [(1.0, 0.1, 0.5)[min(v, 2)] for v in views], [0.2 * (v == 1) for v in views])
        crops.append(255 * x)
    return crops


# Copied from clip.py
def ignore_sigterm(worker: int) -> None:
    """A signal to the whole process group (torchrun's, timeout's, Slurm's) is for the training process, which saves."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)


# Copied from clip.py
def worker_setup(workers: int) -> dict:
    """Of a DataLoader. Forked, its workers share the tables and arrays of this process, copied nowhere.

    Linux: Python 3.14 has another default there. Elsewhere a fork may hang, so the default stays.
    """
    return {"num_workers": workers, "worker_init_fn": ignore_sigterm,
            "multiprocessing_context": "fork" if workers and sys.platform == "linux" else None}


# Copied from clip.py
def default_workers() -> int:
    """Loader processes for one training process: one a core that this process may use, at most 8."""
    return min(8, len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1)


# Copied from clip.py
def read_squares(table: Table, image_size: int, max_pixels: int, rows: list[int]) -> tuple[torch.Tensor, list]:
    """Centre squares of a test set's images, [B, 3, S, S] uint8, and 0 for each; or zeros and why it cannot be read.

    Collate function of row numbers: one tensor a block, since each tensor of a worker holds a file descriptor.
    """
    pixels, reasons = np.zeros((len(rows), image_size, image_size, 3), np.uint8), [0] * len(rows)
    for i, row in enumerate(rows):
        image = read_image(table, row, image_size, max_pixels)
        if isinstance(image, str):
            reasons[i] = image
        else:
            pixels[i] = image.resize((image_size, image_size), Image.Resampling.BICUBIC, center_box(*image.size))
    return torch.from_numpy(pixels).permute(0, 3, 1, 2), reasons


# ------------------------------------------------------------------------------ plumbing

RUN_FLAGS = {"out", "export", "resume", "eval_only", "eval_sets", "transfer", "probe_set", "probe_images", "baselines",
             "device", "compile", "workers", "log_every", "save_every", "eval_every", "tensorboard", "wandb", "max_bad"}


# Copied from clip.py
def setup_distributed(device: str) -> tuple[int, int, torch.device, dist.ProcessGroup | None]:
    """Rank, number of processes, device; joins the process group when started by torchrun, and sets up the device.

    Returns, last, a group of several processes for flags and counts: it does not wait for the GPU.
    """
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cuda":
        device = f"cuda:{os.environ.get('LOCAL_RANK', 0)}"
    try:
        if torch.empty(0, device=device).device.type not in ("cpu", "cuda"):
            raise RuntimeError("only cpu and cuda have all that is used here")
    except (RuntimeError, AssertionError) as error:  # no such name or number, or nothing that this torch can use
        raise SystemExit(f"--device {device}: {str(error).splitlines()[0][:200]}") from None
    if device.startswith("cuda"):
        torch.cuda.set_device(device)
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
    else:
        keep_freed_memory()
    if "RANK" not in os.environ:
        return 0, 1, torch.device(device), None
    hour = datetime.timedelta(hours=1)  # one process may render data or pretrain a text tower while the others wait
    dist.init_process_group("nccl" if device.startswith("cuda") else "gloo", timeout=hour)
    control = dist.new_group(backend="gloo", timeout=hour) if dist.get_world_size() > 1 else None
    return dist.get_rank(), dist.get_world_size(), torch.device(device), control


# Copied from clip.py
def keep_freed_memory() -> None:
    """Let glibc keep freed memory for the next step, which else maps and zeroes the pages of its activations anew.

    With huge pages a quarter to a third less time for an RN50 step on a CPU (benchmarks/clip_step.py).
    """
    with contextlib.suppress(OSError, AttributeError, TypeError):  # without glibc nothing happens
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(-4, 0)  # M_MMAP_MAX: large blocks come from the heap
        mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD: which is not given back


# Copied from clip.py
def pick_precision(precision: str, device: torch.device) -> tuple[str, str]:
    """`auto` resolved, and why."""
    if precision != "auto":
        return precision, "--precision"
    if device.type == "cuda":
        has_bf16 = torch.cuda.is_bf16_supported(including_emulation=False)
        return ("bf16", "CUDA") if has_bf16 else ("fp16", "CUDA without bf16")
    if os.path.exists("/proc/cpuinfo") and "amx_bf16" in Path("/proc/cpuinfo").read_text():
        return "bf16", "CPU with AMX"
    return "fp32", "CPU without fast bf16"


# Copied from clip.py
def on_one_rank(rank: int, work: Callable[[], None]) -> None:
    """Run on the first process while the others wait; if it ends with a message, all end."""
    message = [None]
    if rank == 0:
        try:
            work()
        except SystemExit as error:
            message[0] = error.code
    if dist.is_initialized():
        dist.broadcast_object_list(message, src=0)  # All ranks
    if message[0] is not None:
        raise SystemExit(message[0] if rank == 0 else 1)


# Copied from clip.py
def run_script(command: list[str]) -> None:
    """Run another process outside this one's process group; SystemExit if it fails."""
    launcher = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "GROUP_RANK", "MASTER_ADDR", "MASTER_PORT",
                "OMP_NUM_THREADS")
    environment = {k: v for k, v in os.environ.items() if k not in launcher and not k.startswith("TORCHELASTIC")}
    status = subprocess.run([sys.executable, *command], env=environment).returncode
    if status:
        raise SystemExit(f"{' '.join(command)} ended with status {status}")


# Copied from clip.py
def ensure_shapes(root: Path) -> None:
    """Render the built-in world if it is not there."""
    if (root / "classes.tsv").is_file() or str(root) != SHAPES_ROOT:
        return
    builder = Path(__file__).parent / "build_datasets.py"
    if not builder.is_file():
        raise SystemExit(f"{root} is not there, and no build_datasets.py beside {Path(__file__).name} to render it: "
                         "pass --data my_pairs.tsv, or --root a folder with classes.tsv, val.tsv and laionet/train.tsv")
    print(f"{root} is not there: rendering the shapes world (once)", flush=True)
    run_script([str(builder), "shapes", "--out", str(root)])


# Copied from clip.py
def lr_at(step: int, peak: float, warmup_steps: int, steps: int) -> float:
    """Learning rate of a step: linear warm-up to the peak, then a cosine to 0 (open_clip's scheduler)."""
    if step < warmup_steps:
        return peak * (step + 1) / warmup_steps
    return peak * 0.5 * (1 + math.cos(math.pi * (step - warmup_steps) / max(1, steps - warmup_steps)))


# Copied from clip.py
def param_groups(model: nn.Module, weight_decay: float) -> list[dict]:
    """Trainable parameters: matrices with weight decay; gains, biases and logit_scale without."""
    params = [p for p in model.parameters() if p.requires_grad]
    decay, no_decay = [p for p in params if p.ndim >= 2], [p for p in params if p.ndim < 2]
    return [{"params": decay, "weight_decay": weight_decay}, {"params": no_decay, "weight_decay": 0.0}]


# Copied from sl_vocab_subsample.py
def make_optimizer(name: str, groups: list[dict], lr: float) -> torch.optim.Optimizer:
    """SGD with a momentum of 0.9, or AdamW with betas of 0.9 and 0.98."""
    if name == "adamw":
        return torch.optim.AdamW(groups, lr, (0.9, 0.98), fused=True)
    optimizer = torch.optim.SGD(groups, lr, 0.9, fused=True)
    for p in (p for group in groups for p in group["params"]):  # torch leaves it unset if the first step is skipped
        optimizer.state[p]["momentum_buffer"] = torch.zeros_like(p)
    return optimizer


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


# Copied from clip.py
def load_checkpoint(path: Path, args: dict, run_flags: set[str]) -> dict:
    """Read a checkpoint to continue; SystemExit if it was made with other flags than `args`, run_flags left aside."""
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    except UNREADABLE as error:
        raise SystemExit(f"{path}: cannot be read ({str(error)[:200]}); --resume off starts over") from None
    if not isinstance(checkpoint, dict) or not isinstance(checkpoint.get("args"), dict):
        raise SystemExit(f"{path} is no checkpoint of {Path(__file__).name}; --resume off starts over")
    if "optimizer" not in checkpoint:
        raise SystemExit(f"{path} has no optimiser state: it is an export, pass it as --init")
    unknown = ["inputs"] * ("inputs" not in checkpoint)
    unknown += [f"--{k.replace('_', '-')}" for k in args if k not in run_flags and k not in checkpoint["args"]]
    if unknown:
        raise SystemExit(f"{path} is no checkpoint of this {Path(__file__).name}: it has no {', '.join(unknown[:5])}; "
                         "pass another --out, or --resume off to replace it")
    if differing := [k for k in args if k not in run_flags and args[k] != checkpoint["args"].get(k)]:
        flags = ", ".join(f"--{k.replace('_', '-')} {checkpoint['args'].get(k)}, now {args[k]}" for k in differing)
        raise SystemExit(f"{path} was made with {flags}: pass another --out, or --resume off to replace it")
    return checkpoint


# Copied from clip.py
def lock_folder(out: Path) -> object:
    """What holds OUT for this run until the process ends; SystemExit if another run does. Removes what a killed one
    left half written."""
    try:
        out.mkdir(parents=True, exist_ok=True)
        lock = open(out / "lock", "a")
        fcntl.lockf(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        for part in out.glob("*.[0-9]*.part"):  # write_atomically's
            with contextlib.suppress(OSError):  # of another user, say: the lock counts
                part.unlink()
        return lock
    except BlockingIOError:
        raise SystemExit(f"--out {out}: another run is writing there: pass another --out") from None
    except OSError:  # a file system without locks; or one that cannot be written to, which comes next
        return None


# Copied from clip.py
def checksums(tables: list[Table], *paths: str | Path) -> dict[str, int]:
    """CRC32 of the files that decide what a run learns, by name; a path that is no file is left out."""
    sums = {str(table.path): table.crc for table in tables}
    for path in filter(os.path.isfile, paths):
        with open(path, "rb") as file:
            blocks = iter(functools.partial(file.read, 2**26), b"")
            sums[str(path)] = functools.reduce(lambda crc, block: zlib.crc32(block, crc), blocks, 0)
    return sums


# Copied from clip.py
def find_checkpoint(args: argparse.Namespace, run_flags: set[str], inputs: dict[str, int],
                    control: dist.ProcessGroup | None) -> dict | None:
    """What --resume says is to be continued, None to start anew; the same on all processes.

    inputs: files by name that may not change, with their CRCs. Raises: SystemExit if it is of other flags or files.
    """
    own, checkpoint = Path(args.out) / "checkpoint.pt", None
    path = own if args.resume in ("auto", "off") else Path(args.resume)
    if args.resume != "off" and (path.is_file() or args.resume != "auto"):
        checkpoint = load_checkpoint(path, vars(args), run_flags) | {"path": str(path)}
        if own.is_file() and not own.samefile(path):
            raise SystemExit(f"--resume {path}: {own} is there too, of another run or of later steps: pass another "
                             "--out, or --resume auto to continue that one")
    step = checkpoint["step"] if checkpoint else 0
    if control and total(step, control) != step * dist.get_world_size():
        raise SystemExit(f"{path}: not the same on all nodes: --out must be on storage that they share")
    if checkpoint and checkpoint["inputs"] != inputs:
        other = dict(set(checkpoint["inputs"].items()) ^ set(inputs.items()))
        raise SystemExit(f"{path} was made with another {' and '.join(sorted(other))}: pass another --out, or --resume "
                         "off to replace it")
    return checkpoint


# Copied from clip.py
def versions() -> dict[str, str]:
    return {"python": sys.version.split()[0], "torch": torch.__version__, "numpy": np.__version__}


# Copied from clip.py
def resumable(optimizer: torch.optim.Optimizer, scaler: torch.amp.GradScaler, inputs: dict[str, int], n_bad: int,
              seconds: float, device: torch.device) -> dict:
    """What a checkpoint holds beside the model, to be continued from; undone by `restore`."""
    rng = {"torch": torch.get_rng_state(), "cuda": torch.cuda.get_rng_state(device) if device.type == "cuda" else None}
    return {"optimizer": optimizer.state_dict(), "scaler": scaler.state_dict(), "rng": rng, "inputs": inputs,
            "n_bad": n_bad, "seconds": seconds}


# Copied from clip.py
def restore(checkpoint: dict, optimizer: torch.optim.Optimizer, scaler: torch.amp.GradScaler,
            device: torch.device) -> tuple[int, float]:
    """Optimiser, scaler and random states of a checkpoint; returns its step and the seconds until then."""
    optimizer.load_state_dict(checkpoint["optimizer"])
    if checkpoint["scaler"]:  # empty but for fp16
        scaler.load_state_dict(checkpoint["scaler"])
    torch.set_rng_state(checkpoint["rng"]["torch"])
    if checkpoint["rng"]["cuda"] is not None and device.type == "cuda":
        torch.cuda.set_rng_state(checkpoint["rng"]["cuda"], device)
    return checkpoint["step"], checkpoint["seconds"]


# Copied from clip.py
def save_checkpoint(path: Path, checkpoint: dict, rank: int) -> None:
    """Written by the first process, whole or not at all. All ranks."""
    on_one_rank(rank, lambda: write_atomically(path, lambda file: torch.save(checkpoint, file)))


# Copied from clip.py
def wrap_ddp(model: nn.Module, device: torch.device, world_size: int) -> nn.Module:
    """Average gradients over the processes; buffers are each one's own (batch norm sees to its own)."""
    if world_size == 1:
        return model
    warnings.filterwarnings("ignore", "`broadcast_buffers`")  # older torch does not know its new name
    device_ids = [device] if device.type == "cuda" else None
    return DistributedDataParallel(model, device_ids, broadcast_buffers=False, gradient_as_bucket_view=True)


# ------------------------------------------------------------------------------ evaluate

EVAL_BATCH = 128  # rows are encoded in the same blocks whatever the number of processes, so metrics are identical


# Copied from clip.py
def encode_rows(n: int, dim: int, encode: Callable[[int, int], torch.Tensor], device: torch.device) -> torch.Tensor:
    """[n, dim] float32 on every process; block k of rows is encoded by process k modulo their number.

    encode: (first row, row after the last) -> [rows, dim].
    """
    rank, world_size = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    rows = torch.zeros(n, dim, device=device)
    for start in range(rank * EVAL_BATCH, n, world_size * EVAL_BATCH):
        stop = min(start + EVAL_BATCH, n)
        rows[start:stop] = encode(start, stop).float()
    if world_size > 1:
        dist.all_reduce(rows)  # All ranks; each row is zero on all processes but one, so the sum is exact
    return rows


# Copied from clip.py
@torch.no_grad()
def encode_images(model: nn.Module, table: Table, workers: int, max_pixels: int,
                  device: torch.device) -> tuple[torch.Tensor, np.ndarray, Counter]:
    """Image embeddings of a test set, not normalised. All ranks.

    model: has encode_image, image_size and embed_dim.
    Returns: [n, D]; [n] bool, whether the image could be read (its embedding is zero if not); counts of the reasons.
    """
    pixels = load_pixels([table])
    reasons = np.zeros(len(table), object)
    if pixels is None:
        rank, world_size = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
        rows = range(len(table))
        blocks = [rows[k : k + EVAL_BATCH] for k in rows[rank * EVAL_BATCH :: world_size * EVAL_BATCH]]
        workers = min(len(blocks), workers if workers >= 0 else default_workers())
        read = functools.partial(read_squares, table, model.image_size, max_pixels)
        blocks = iter(torch.utils.data.DataLoader(rows, batch_sampler=blocks, collate_fn=read, **worker_setup(workers)))

    def encode(start: int, stop: int) -> torch.Tensor:
        if pixels is not None:
            images = pixels[start:stop].to(device).permute(0, 3, 1, 2)
            left, top, right, bottom = map(int, center_box(images.shape[3], images.shape[2]))
            images = images[:, :, top:bottom, left:right]
            if images.shape[2] != model.image_size:
                images = F.interpolate(images.float(), model.image_size, mode="bicubic", antialias=True).clamp(0, 255)
            return model.encode_image(images)
        images, reasons[start:stop] = next(blocks)
        embed = model.encode_image(images.to(device))
        embed[[reason != 0 for reason in reasons[start:stop].tolist()]] = 0
        return embed

    embed = encode_rows(len(table), model.embed_dim, encode, device)
    if dist.is_initialized():
        gathered = [None] * dist.get_world_size()
        dist.all_gather_object(gathered, reasons)  # All ranks
        reasons = np.select([part != 0 for part in gathered], gathered, 0)
    return embed, reasons == 0, Counter(reasons[reasons != 0].tolist())


# Copied from clip.py
def rank_correlation(x: np.ndarray, y: np.ndarray) -> float | None:
    """Spearman's rank correlation, average ranks for ties; None if one side is constant."""
    if len(x) < 2 or np.ptp(x) == 0 or np.ptp(y) == 0:
        return None
    return float(spearmanr(x, y).statistic)


# Copied from clip.py
def imbalance_metrics(predictions: np.ndarray, labels: np.ndarray, class_counts: np.ndarray) -> dict[str, float | None]:
    """Accuracy, and how much it and the predictions follow the training frequency of the classes.

    predictions, labels: [n] class ids. class_counts: [C] training images of each class, zeros included.
    Returns: fractions in 0..1 and Spearman correlations over all classes; a class without test images has no accuracy
        and is left out of means of accuracies. head, medium, tail: the classes by falling count (ties by id), in
        thirds of C // 3, C // 3 and the rest. What cannot be computed is None.
    Source: Wen et al., arXiv 2405.21070, section 2 (their notebooks: all classes, average ranks).
    """
    C = len(class_counts)
    n_test = np.bincount(labels, minlength=C)
    tested = n_test > 0
    per_class = np.bincount(labels[predictions == labels], minlength=C) / np.where(tested, n_test, np.nan)  # [C]
    accuracy = per_class[tested]
    thirds = np.split(per_class[np.argsort(-class_counts, kind="stable")], [C // 3, 2 * (C // 3)])
    is_known = class_counts.any()
    head, medium, tail = (float(np.nanmean(x)) if is_known and np.isfinite(x).any() else None for x in thirds)
    return {"n": len(labels), "top1": float((predictions == labels).mean()), "balanced": float(accuracy.mean()),
            "head": head, "medium": medium, "tail": tail,
            "spearman_acc": rank_correlation(class_counts[tested], accuracy),
            "spearman_pred": rank_correlation(class_counts, np.bincount(predictions, minlength=C)), "chance": 1 / C}


def knn_votes(bank: torch.Tensor, labels: torch.Tensor, queries: torch.Tensor, C: int, k: int = 20,
               temperature: float = 0.07) -> torch.Tensor:
    """[n, C] votes of the k nearest images of a bank, each exp(cosine / temperature).

    bank: [m, d] unit rows with labels [m]; queries: [n, d] unit rows. Source: DINO eval_knn.py, up to a factor.
    """
    scores = torch.zeros(len(queries), C, device=queries.device)
    for start in range(0, len(queries), 1024):
        near, index = (queries[start : start + 1024] @ bank.T).topk(min(k, len(bank)), 1)
        scores[start : start + 1024].scatter_add_(1, labels[index], ((near - 1) / temperature).exp())
    return scores


def fit_logistic(x: torch.Tensor, labels: torch.Tensor, C: int, decay: float, start: torch.Tensor | None
                 ) -> torch.Tensor:
    """[d + 1, C] weights that minimise mean cross-entropy + decay / 2 * |weights|^2, the last row, the bias, free.

    x: [n, d + 1] with a column of ones. start: weights to start from. Of the default run's features 600 iterations
    instead of 60 gave up to 0.6 points more on a test set, of pixels 0.1.
    """
    weights = torch.zeros(x.shape[1], C, device=x.device) if start is None else start.clone()
    weights.requires_grad_()
    lbfgs = torch.optim.LBFGS([weights], max_iter=60, history_size=10, line_search_fn="strong_wolfe",
                              tolerance_grad=1e-5, tolerance_change=1e-7)

    def closure() -> torch.Tensor:
        lbfgs.zero_grad()
        loss = F.cross_entropy(x @ weights, labels) + decay / 2 * weights[:-1].square().sum()
        loss.backward()
        return loss

    lbfgs.step(closure)
    return weights.detach()


def linear_probe(x: torch.Tensor, labels: torch.Tensor, C: int, seed: int) -> tuple[torch.Tensor, float]:
    """Weights [d + 1, C] of a logistic regression, and the decay chosen on a random fifth of the rows.

    x: [n, d + 1], standardised, a column of ones last. From strong to weak decay, each started from the one before.
    Pixels take the strongest, and did so (in the default world) where 1 and 10 could be chosen too.
    """
    order = torch.from_numpy(np.random.default_rng([seed, 9]).permutation(len(x))).to(x.device)
    held, fit = order[: max(1, len(x) // 5)], order[max(1, len(x) // 5) :]
    weights, best = None, (-1.0, 0.0)
    for decay in (1e-1, 1e-2, 1e-3, 1e-4):
        weights = fit_logistic(x[fit], labels[fit], C, decay, weights)
        best = max(best, (float(((x[held] @ weights).argmax(1) == labels[held]).float().mean()), decay))
    return fit_logistic(x, labels, C, best[1], None), best[1]


def labelled_features(
    model: Network | RawPixels, table: Table, classes: list[dict[str, str]], args: argparse.Namespace,
    device: torch.device
) -> tuple[torch.Tensor, np.ndarray, np.ndarray, Counter]:
    """Features [n, d] of the images that can be read, their labels and rows; counts of the others. All ranks."""
    embed, readable, bad = encode_images(model, table, args.workers, args.max_pixels, device)
    rows = np.flatnonzero(readable)
    embed = embed[torch.from_numpy(rows).to(device)]
    if not bool(embed.isfinite().all()):
        raise SystemExit(f"{table.path}: the image features are not finite: the model has diverged")
    return embed, read_labels(table, classes)[rows], rows, bad


@torch.no_grad()
def probe_features(model: Network | RawPixels, bank: Table, test_sets: dict[str, Table],
                   classes: list[dict[str, str]], args: argparse.Namespace, device: torch.device,
                   is_whole: bool) -> dict[str, dict]:
    """k-NN and linear probe, fitted on a labelled set, of each test set. All ranks.

    is_whole: encode all of the bank, though the probe is fitted on --probe-images.
    Returns: {set: {knn, probe: [n, C] scores, weights [C, d] of raw features, decay, features, labels, rows, bad, bank:
    its features and labels}}.
    """
    bank, n = copy.copy(bank), min(len(bank), args.probe_images)
    keep = np.sort(np.random.default_rng([0, 10]).choice(len(bank), n, replace=False))
    if not is_whole:
        bank.starts = bank.starts[torch.from_numpy(keep)]
    embed, labels, rows, _ = labelled_features(model, bank, classes, args, device)
    whole = embed, labels
    if is_whole:
        chosen = np.isin(rows, keep)
        embed, labels = embed[torch.from_numpy(chosen).to(device)], labels[chosen]
    if len(labels) < 2:
        raise SystemExit(f"{bank.path}: {len(labels)} images can be read, so no probe can be fitted")
    labels, C = torch.from_numpy(labels).to(device), len(classes)
    unit, mean, std = F.normalize(embed, dim=1), embed.mean(0), embed.std(0).clamp_min(1e-6)

    def standard(x: torch.Tensor) -> torch.Tensor:
        return torch.cat([(x - mean) / std, x.new_ones(len(x), 1)], 1)

    with exact_matmul(), torch.enable_grad():
        weights, decay = linear_probe(standard(embed), labels, C, args.seed)
    found = {}
    for name, table in test_sets.items():
        x, test_labels, rows, bad = labelled_features(model, table, classes, args, device)
        with exact_matmul():
            found[name] = {"knn": knn_votes(unit, labels, F.normalize(x, dim=1), C), "probe": standard(x) @ weights,
                           "weights": (weights[:-1] / std[:, None]).T, "features": x, "labels": test_labels,
                           "rows": rows, "bad": bad, "decay": decay, "bank": whole}
    return found


def evaluate_dino(model: Network, worlds: list[tuple], class_counts: np.ndarray, args: argparse.Namespace,
                  device: torch.device, npz_folder: Path | None = None) -> dict[str, dict]:
    """Metrics of each test set of each world: top1, balanced, ... are the linear probe's. All ranks.

    worlds: (labelled set, test sets, rows of classes.tsv, whether it is a --transfer folder). Without a labelled set
    (None) the features of the test sets are all there is. class_counts: [C], the root's.
    npz_folder: where the first process writes <set>.npz, of a --transfer folder transfer/<set>_train.npz, _test.npz;
    with it, and --baselines, a random network and raw pixels too.
    """
    if dist.is_initialized():
        for buffer in model.buffers():  # with --bn local each process has its own statistics
            dist.broadcast(buffer, 0)  # All ranks
    model.eval()
    models, banks = {"": model}, [bank for bank, _, _, _ in worlds if bank is not None]
    if npz_folder is not None and args.baselines and banks:
        models |= {"random_": random_network(args, banks[0], device), "pixels_": RawPixels()}
    keys = ("n", "top1", "balanced", "head", "medium", "tail", "spearman_acc", "spearman_pred", "chance", "retrieval")
    metrics, is_writer = {}, npz_folder is not None and (not dist.is_initialized() or dist.get_rank() == 0)

    def write(name: str, halves: dict[str, torch.Tensor], **arrays: np.ndarray) -> None:
        arrays = {key: x.cpu().numpy().astype(np.float16) for key, x in halves.items()} | arrays
        write_atomically(npz_folder / f"{name}.npz", lambda file: np.savez(file, **arrays))

    for bank, test_sets, classes, is_transfer in worlds:
        for name, table in test_sets.items() if bank is None else ():
            x, labels, rows, bad = labelled_features(model, table, classes, args, device)
            metrics[name] = dict.fromkeys((*keys, "knn", "probe")) | {"n": len(rows), "bad_images": dict(bad)}
            if is_writer:
                write(name, {"features": x}, labels=labels, rows=rows)
        if bank is None:
            continue
        counts = np.zeros(len(classes), np.int64) if is_transfer else class_counts  # no training frequencies there
        for kind, probed in models.items():
            for name, found in probe_features(probed, bank, test_sets, classes, args, device,
                                              is_transfer and not kind and npz_folder is not None).items():
                labels, labelled = found["labels"], found["labels"] >= 0
                guesses = {key: found[key].argmax(1).cpu().numpy() for key in ("knn", "probe")}
                right = {kind + key: float((guess[labelled] == labels[labelled]).mean()) if labelled.any() else None
                         for key, guess in guesses.items()}
                if test_sets[name].path.samefile(bank.path):  # where an image's nearest neighbour is itself
                    right[kind + "knn"] = None
                if kind:
                    metrics[name] |= right | {f"{kind}probe_decay": found["decay"]}
                    continue
                metrics[name] = dict.fromkeys(keys) | {"n": len(labels), "bad_images": dict(found["bad"]),
                                                       "probe_decay": found["decay"]}
                if labelled.any():
                    metrics[name] |= imbalance_metrics(guesses["probe"][labelled], labels[labelled], counts)
                metrics[name] |= right
                if is_writer:
                    halves = {"logits": found["probe"], "features": found["features"], "prototypes": found["weights"]}
                    write(f"transfer/{name}_test" if is_transfer else name, halves, predictions=guesses["probe"],
                          labels=labels, rows=found["rows"], class_counts=counts,
                          class_names=np.array([row["name"] for row in classes], str))
                if is_writer and is_transfer:  # evaluate.py probe has the paper's protocol, over many runs
                    write(f"transfer/{name}_train", {"features": found["bank"][0]}, labels=found["bank"][1])
    model.train()
    return metrics


def random_network(args: argparse.Namespace, table: Table, device: torch.device) -> Network:
    """A network at its random start, with batch-norm statistics that have converged on the images of a table."""
    torch.manual_seed(args.seed)
    model = Network(args.arch, args.head_hidden, args.prototype_dim, 1, args.head_bn).to(device).train()
    for module in model.modules():
        if isinstance(module, BatchNorm2d):
            module.sync, module.momentum = False, None  # the mean over all batches; equal on all processes
            nn.init.ones_(module.weight)  # the gains of residual branches start at 0: without them it is no network
    table = copy.copy(table)
    table.starts = table.starts[torch.linspace(0, len(table) - 1, min(len(table), 2560), dtype=torch.float64).long()]
    with torch.no_grad():
        for start in range(0, len(table), EVAL_BATCH):
            rows = range(start, min(start + EVAL_BATCH, len(table)))
            images, reasons = read_squares(table, model.image_size, args.max_pixels, rows)
            images = images[[not reason for reason in reasons]]
            if len(images) > 1:
                model.encode_image(images.to(device))
    return model.eval()


def print_probes(metrics: dict[str, dict]) -> None:
    """One aligned line a test set: accuracy of k-NN and linear probe, beside the baselines'."""
    keys = ("knn", "random_knn", "pixels_knn", "probe", "random_probe", "pixels_probe", "chance")
    rows, first = {name: m for name, m in metrics.items() if m["probe"] is not None}, max([12, *map(len, metrics)]) + 2
    if rows:
        print(f"{'test set':<{first}}{'n':>9}" + "".join(f"{key.replace('_', ' '):>14}" for key in keys))
    for name, m in rows.items():
        cells = ("-" if m.get(key) is None else f"{m[key]:.1%}" for key in keys)
        print(f"{name:<{first}}{m['n']:>9}" + "".join(f"{cell:>14}" for cell in cells))


# ------------------------------------------------------------------------------ train

# Copied from clip.py
def find_sets(data: str, root: Path) -> tuple[list[Path], list[float | None]]:
    """Paths and weights of `A:2,B:1`; each name is a file, or ROOT/NAME/train.tsv."""
    paths, weights = [], []
    for part in data.split(","):
        name, weight = re.fullmatch(r"(.*?)(?::(\d*\.?\d+))?", part.strip()).groups()
        path = Path(name) if name.endswith(".tsv") else root / name / "train.tsv"
        if not path.is_file():
            there = ", ".join(sorted(p.parent.name for p in root.glob("*/train.tsv"))) or "none"
            raise SystemExit(f"--data {name}: no file {path}; sets in {root}: {there}. build_datasets.py index makes "
                             "one from tars or folders")
        paths.append(path)
        weights.append(float(weight) if weight else None)
    if None in weights and set(weights) != {None} or None not in weights and not any(weights):
        raise SystemExit(f"--data {data}: give every set a weight, not all of them 0, or none")
    return paths, weights


# Copied from clip.py
def find_test_sets(names: list[str], root: Path) -> dict[str, Table]:
    """Test sets by name: those given, or the ones of TEST_SETS that the root has."""
    if names == ["auto"]:
        names = [name for name in TEST_SETS if (root / f"{name}.tsv").is_file()]
    files = [name if name.endswith(".tsv") else f"{name}.tsv" for name in names]
    paths = [Path(file) if file == name and Path(file).is_file() else root / file for name, file in zip(names, files)]
    is_unique = [sum(path.stem == other.stem for other in paths) == 1 for path in paths]
    stems = [path.stem if unique else f"{path.parent.name}-{path.stem}" for path, unique in zip(paths, is_unique)]
    if len(set(stems)) < len(stems) or {"run", "loss", "step"} & set(stems):
        raise SystemExit(f"--eval-sets: {', '.join(map(str, paths))} would be called {', '.join(stems)} in "
                         "metrics.json: names must differ, and run, loss and step have other meanings in the logs")
    test_sets, classes = {stem: Table(path) for stem, path in zip(stems, paths)}, read_classes(root)
    for table in test_sets.values():
        has_numbers = classes and table.get(0, "label")[:1].isdecimal()  # names and wnids are looked up
        theirs = read_classes(table.folder) if has_numbers else []
        if theirs and [row["name"] for row in theirs] != [row["name"] for row in classes]:
            raise SystemExit(f"--eval-sets {table.path}: its labels are numbers of the classes.tsv beside it, which is "
                             f"another than that of {root}: pass --root {table.folder} (DINO: --transfer)")
    return test_sets


# Copied from clip.py
def describe(root: Path, tables: list[Table], shares: np.ndarray, class_names: list[str],
             class_counts: np.ndarray) -> str:
    """The first line of a run's log."""
    sets = [f"{len(table):,} rows of {table.path}" + f" (share {share:.3f})" * (len(tables) > 1)
            for table, share in zip(tables, shares)]
    line = f"world {root}: {', '.join(sets)}, {len(class_names)} classes"
    if class_counts.any():
        for word, c in ("most", class_counts.argmax()), ("least", class_counts.argmin()):
            line += f", {word} frequent {class_names[c]!r} {class_counts[c]:,}"
    return line


# Copied from clip.py
def total(value: float, group: dist.ProcessGroup | None) -> float:
    """Sum of a number over the processes; over the CPU, so that no GPU is waited for."""
    if group is None:
        return value
    value = torch.tensor(float(value), dtype=torch.float64)
    dist.all_reduce(value, group=group)  # All ranks
    return float(value)


# Copied from clip.py
def check_finite(step: int, parts: dict[str, torch.Tensor], in_a_row: int, group: dist.ProcessGroup | None) -> None:
    """Report a step left out for its non-finite gradient, and what was not finite; SystemExit after ten in a row.

    parts: tensors by name, to be looked at; none if it was a step before this one, as a GPU, asked at log steps only,
    may find. in_a_row: the most steps left out since the last call, equal on all processes.
    """
    if not in_a_row:
        return
    names = [name for name, part in parts.items() if total(not bool(part.isfinite().all()), group)] or ["gradients"]
    if not dist.is_initialized() or dist.get_rank() == 0:
        when = "step" if parts else "before step"
        print(f"{when} {step + 1}: {', '.join(names)} not finite: step left out ({in_a_row} in a row)", flush=True)
    if in_a_row >= 10:
        raise SystemExit(f"ended at step {step + 1}: ten steps in a row were not finite; try a lower --lr, --clip-grad "
                         "1 or --precision fp32")


# Copied from clip.py
class RunLog:
    """What a run counts between two log lines, which go to OUT/log.jsonl, the terminal, TensorBoard and W&B.

    Every process counts, the first writes. checkpoint: what is continued, or None; lines of later steps, of a run that
    was killed, are dropped. n_rows: of the training sets. inputs: of `checksums`. control: all processes, None if one.
    """

    def __init__(self, checkpoint: dict | None, args: argparse.Namespace, n_rows: int, inputs: dict[str, int],
                 device: torch.device, control: dist.ProcessGroup | None):
        self.args, self.n_rows, self.control, self.device = args, n_rows, control, device
        self.world_size = dist.get_world_size() if control else 1
        self.is_main = not control or dist.get_rank() == 0
        self.bad, self.logged = Counter(), checkpoint["step"] if checkpoint else 0
        self.loss_sum = torch.zeros((), device=device)
        self.left_out = torch.zeros((), dtype=torch.int64, device=device)  # steps, for gradients that are not finite
        self.in_a_row = self.most_in_a_row = self.left_out.clone()
        if self.is_main:
            self.open(Path(args.out), self.logged, inputs)
            self.bad += Counter({"before it was continued": checkpoint["n_bad"] if checkpoint else 0})
        self.logged_at = time.time()

    def open(self, out: Path, start: int, inputs: dict[str, int]) -> None:
        """The files of a run; SystemExit without the packages that are asked for."""
        path, own, self.wandb = out / "log.jsonl", out / "checkpoint.pt", None
        try:
            if self.args.tensorboard:
                from torch.utils.tensorboard import SummaryWriter
            if self.args.wandb:
                import wandb
        except ImportError as error:
            raise SystemExit(f"--tensorboard or --wandb: {error}; pip install tensorboard, or wandb") from None
        lines = path.read_text().splitlines(keepends=True) if start and path.is_file() and own.is_file() else []
        try:
            kept = [line for line in lines if line.endswith("\n") and json.loads(line)["step"] <= start]
        except (ValueError, LookupError, TypeError) as error:
            raise SystemExit(f"{path}: a line is no JSON with a step ({error}): move the file away") from None
        write_atomically(path, lambda file: file.write("".join(kept).encode()))
        self.file = open(path, "a", buffering=1)
        self.writer = SummaryWriter(out) if self.args.tensorboard else None
        if self.args.wandb:
            run_id = hashlib.sha1(str(path.resolve()).encode()).hexdigest()[:12]  # the same for a continued run
            self.wandb = wandb.init(project=self.args.wandb, name=out.name, config=vars(self.args), id=run_id,
                                    resume="allow")
        if self.args.resume == "off" and own.is_file():  # else a run killed before its first save would continue it
            os.replace(own, out / "checkpoint.old.pt")
        write_json(out / "args.json", {
            "args": vars(self.args), "argv": sys.argv, "crc32": {name: f"{crc:08x}" for name, crc in inputs.items()},
            "versions": versions(), "script_sha256": hashlib.sha256(Path(__file__).read_bytes()).hexdigest()})

    def count(self, step: int, parts: dict[str, torch.Tensor], is_taken: torch.Tensor, bad: list[tuple[str, str]],
              is_log_step: bool) -> None:
        """After each step. All ranks.

        parts: tensors by name, `loss` among them, of which a message says what was not finite. is_taken: bool, whether
        the gradient was finite, equal on all ranks. bad: reason and example of each image that could not be read.
        """
        self.loss_sum += torch.where(is_taken, parts["loss"].detach(), 0)
        self.left_out += ~is_taken
        self.in_a_row = torch.where(is_taken, 0, self.in_a_row + 1)
        self.most_in_a_row = torch.maximum(self.most_in_a_row, self.in_a_row)
        if is_log_step or self.device.type == "cpu":  # Sync
            check_finite(step, parts if self.in_a_row else {}, int(self.most_in_a_row), self.control)
            self.most_in_a_row = torch.zeros_like(self.in_a_row)
        for reason, example in bad:
            if reason == GAVE_UP:
                raise SystemExit(example)
            if reason not in self.bad:  # the first of each reason is printed
                print(f"unreadable image ({reason}), replaced by another example: {example}", flush=True)
            self.bad[reason] += 1

    def n_bad(self) -> int:
        """Broken images of the whole run. All ranks."""
        return int(total(sum(self.bad.values()), self.control))

    def report(self, step: int, **numbers: float) -> None:
        """Write the line of a step, and count anew. All ranks.

        numbers: further ones, equal on all ranks. Raises: SystemExit if more than --max-bad of the images are broken.
        """
        n_steps, n_left_out, n_bad = step + 1 - self.logged, int(self.left_out), self.n_bad()  # Sync
        n_done, n_new = (step + 1) * self.args.batch_size, n_steps * self.args.batch_size
        loss = total(float(self.loss_sum), self.control) / self.world_size / ((n_steps - n_left_out) or math.nan)
        self.write({"step": step + 1, "samples": n_done, "epoch": round(n_done / self.n_rows, 4), "loss": loss,
                    **numbers, "images_per_s": round(n_new / (time.time() - self.logged_at), 1),
                    "left_out": n_left_out, "bad_images": n_bad})
        if n_bad > self.args.max_bad * max(1000, n_done):
            raise SystemExit(f"{n_bad} of {n_done} images cannot be read ({dict(self.bad)} on this process), more than "
                             f"--max-bad {self.args.max_bad}")
        self.logged, self.logged_at = step + 1, time.time()
        self.loss_sum.zero_()
        self.left_out.zero_()

    def write(self, line: dict) -> None:
        """line: {"step": int, name: number, ...}; nested dicts are kept in the file, flattened elsewhere."""
        if not self.is_main:
            return
        try:
            finite = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in line.items()}
            self.file.write(json.dumps(finite) + "\n")  # JSON has no NaN
        except OSError as error:
            raise SystemExit(f"cannot write {self.file.name}: {error}; a checkpoint written before is kept") from None
        nested = {f"{name}/{k}": v for name, m in line.items() if isinstance(m, dict) for k, v in m.items()}
        numbers = {k: v for k, v in (line | nested).items() if isinstance(v, int | float)}
        if self.writer:
            for name, value in numbers.items():
                self.writer.add_scalar(name, value, line["step"])
        if self.wandb:
            self.wandb.log(numbers, step=line["step"])
        if "loss" in line:
            tqdm.write(f"step {line['step']:>6}  " + "  ".join(f"{k} {v:.4g}" for k, v in line.items() if k != "step"))
            sys.stdout.flush()


# Copied from clip.py
def root_of(root: str, data: str | None) -> Path:
    """Folder of the world: --root; if that is auto, of the first TSV of --data, else the built-in world's."""
    files = [part.strip() for part in (data or "").split(",") if re.search(r"\.tsv(:[\d.]+)?$", part.strip())]
    return Path(root) if root != "auto" else Path(files[0]).parent if files else Path(SHAPES_ROOT)


def count_labels(tables: list[Table], shares: np.ndarray, classes: list[dict[str, str]]) -> np.ndarray:
    """[C] int64 training images a class, by the sets' shares as in clip.py; for the metrics only."""
    class_counts, n_rows = np.zeros(len(classes)), sum(map(len, tables))
    for table, share in zip(tables, shares) if classes else []:
        labels = read_labels(table, classes)
        class_counts += np.bincount(labels[labels >= 0], minlength=len(classes)) * share * n_rows / len(table)
    return np.where(class_counts > 0, np.rint(class_counts).clip(1), 0).astype(np.int64)


def check_views(args: argparse.Namespace, tables: list[Table], view_sizes: list[int], is_main: bool) -> None:
    """SystemExit if the views cannot be cut from the images or are not what the tower or the augmentation takes. Files
    may be smaller, as their sizes vary: crops are enlarged then, and if three of them are, a line says so."""
    for table in tables:
        rows = {0, len(table) // 2, len(table) - 1}
        images = [read_image(table, row, max(view_sizes), args.max_pixels) for row in rows]
        sizes = [image.size for image in images if not isinstance(image, str)]
        if sizes and max(view_sizes) > max(map(min, sizes)):
            found = ", ".join(sorted({f"{width} x {height}" for width, height in sizes}))
            told = (f"a crop of {max(view_sizes)} px is larger than the images of {table.path} ({found}): lower "
                    "--global-size or --local-size")
            if locate_image(table, 0)[0].suffix == ".npy":
                raise SystemExit(told)
            if is_main:
                print(f"note: {told}, or crops are enlarged (the first, the last and one between were looked at)")
    if args.arch == "ViT-S-16" and any(size % 16 for size in view_sizes):
        raise SystemExit("ViT-S-16 needs --global-size and --local-size that are multiples of its patches of 16 px")
    if args.arch == "RN50" and min(view_sizes) < 32:
        raise SystemExit("RN50 halves an image five times: it needs --global-size and --local-size of at least 32")
    if args.augment == "dino" and min(view_sizes) < 7:
        raise SystemExit("--augment dino blurs 6 px to each side: --global-size and --local-size must be at least 7")
    if args.augment == "colour" and max(view_sizes) > 128:
        raise SystemExit("--augment colour is for crops up to 128 px: use --augment dino")


def load_teacher(args: argparse.Namespace) -> dict:
    """The checkpoint of --eval-only; it is probed as its run was (data, root, probe) where a flag has its default."""
    loaded, default = load_weights(args.eval_only), parse_args([])
    missing = sorted({"dino_prototypes", "arch", "args", "class_names", "class_counts", "step"} - loaded.keys())
    if missing:
        raise SystemExit(f"{args.eval_only} is no checkpoint of this script: no {' or '.join(missing)} in it")
    if loaded["arch"] not in TOWERS:
        raise SystemExit(f"{args.eval_only} is no checkpoint of this script: it has the tower {loaded['arch']!r}")
    made_with = loaded["args"]
    if args.probe_images == default.probe_images:
        args.probe_images = made_with["probe_images"]
    is_there = args.root == "auto" or os.path.realpath(args.root) == os.path.realpath(
        root_of(made_with["root"], made_with["data"]))
    for name in ("probe_set", "data"):  # files of another root would be read with the class numbers of this one
        if getattr(args, name) == getattr(default, name) and (is_there or ".tsv" not in made_with[name]):
            setattr(args, name, made_with[name])
    args.root = made_with["root"] if args.root == "auto" and args.data == made_with["data"] else args.root
    return loaded


def find_worlds(args: argparse.Namespace, root: Path) -> list[tuple]:
    """What features are probed on, as evaluate_dino takes it: the root's first; it needs classes.tsv for a probe."""
    worlds, classes = [], read_classes(root)
    test_sets = find_test_sets(args.eval_sets, root)
    name, is_probed = args.probe_set, bool(classes and test_sets)
    if name == "auto" and is_probed:
        name = "imagenet" if (root / "imagenet" / "train.tsv").is_file() else str(find_sets(args.data, root)[0][0])
    bank = None if name == "auto" else Table(name if name.endswith(".tsv") else root / name / "train.tsv")
    if test_sets:
        worlds.append((bank if is_probed else None, test_sets, classes if is_probed else [], False))
    in_root = [path.parent for path in sorted(root.glob("*/classes.tsv"))
               if (path.parent / "train.tsv").is_file() and (path.parent / "test.tsv").is_file()]
    for folder in [f for name in args.transfer for f in (in_root if name == "auto" else [Path(name)])]:
        classes, name = read_classes(folder), folder.resolve().name
        if not classes:
            raise SystemExit(f"--transfer {folder}: no classes.tsv with a column name")
        if any(name in test_sets for _, test_sets, _, _ in worlds) or name in ("run", "loss", "step"):
            raise SystemExit(f"--transfer {folder}: {name} is taken in metrics.json, rename the folder")
        worlds.append((Table(folder / "train.tsv"), {name: Table(folder / "test.tsv")}, classes, True))
    for bank, tests, classes, is_transfer in worlds:  # now, not after the training
        for table in tests.values():
            read_labels(table, classes)
        if bank is not None:
            is_labelled = read_labels(bank, classes) >= 0
            if is_labelled.sum() < 2:
                hint = "" if is_transfer else "; pass another --probe-set"
                raise SystemExit(f"{bank.path}: {is_labelled.sum()} rows with a label, so no probe can be fitted{hint}")
            bank.starts = bank.starts[torch.from_numpy(is_labelled)]
        for table in (*([bank] if bank is not None else []), *tests.values()):
            ends = [read_image(table, row, 1, args.max_pixels) for row in (0, len(table) - 1)]
            if all(isinstance(image, str) for image in ends):
                raise SystemExit(f"{table.path}: neither its first nor its last image can be read ({ends[0]}): "
                                 f"{table.get(0, 'image')}")
    return worlds


def checkpoint_of_dino(teacher: Network, prototypes: torch.Tensor, class_names: list[str], class_counts: np.ndarray,
                       args: argparse.Namespace, step: int) -> dict:
    """What a checkpoint or an export holds, in tensors and builtins. state_dict: the teacher's tower and head."""
    weights = {k: v.detach().cpu().contiguous() for k, v in teacher.state_dict().items() if k != "head.prototypes"}
    return {"state_dict": weights, "args": vars(args), "step": step, "arch": teacher.arch,
            "dino_prototypes": prototypes.cpu(), "class_names": class_names,
            "class_counts": torch.from_numpy(class_counts)}


def report_dino(teacher: Network, prototypes: torch.Tensor, worlds: list, class_counts: np.ndarray,
                args: argparse.Namespace, step: int, seconds: float, rank: int, device: torch.device,
                precision: str) -> None:
    """Evaluate, write metrics.json and <set>.npz, print the table. All ranks."""
    out = Path(args.out)
    metrics = evaluate_dino(teacher, worlds, class_counts, args, device, out)
    run = {"script": Path(__file__).name, "step": step, "seconds": round(seconds, 1), "data": args.data,
           "seed": args.seed, "precision": precision, "prototypes": len(prototypes),
           "unique_prototypes": unique_prototypes(prototypes), "versions": versions(),
           "probe_sets": sorted({str(bank.path) for bank, *_ in worlds if bank is not None})}
    on_one_rank(rank, lambda: write_json(out / "metrics.json", metrics | {"run": run}))
    if rank:
        return
    print_probes(metrics)
    if all(m["probe"] is None for m in metrics.values()):
        print("nothing to probe: no labelled images that can be read, in test sets of a root with classes.tsv or in "
              "--transfer")
    print(f"probes are fitted on {', '.join(run['probe_sets']) or 'nothing'}")
    print(f"unique prototypes (greedy cover at cosine distance 0.025): {run['unique_prototypes']} of {len(prototypes)}")
    print(f"metrics: {out / 'metrics.json'}", flush=True)


def evaluate_teacher(args: argparse.Namespace, loaded: dict, worlds: list, rank: int, device: torch.device) -> None:
    """--eval-only: the teacher of a checkpoint, as loaded."""
    made_with, prototypes = loaded["args"], loaded["dino_prototypes"]
    model = Network(loaded["arch"], made_with["head_hidden"], prototypes.shape[1], 1, made_with["head_bn"])
    try:
        model.load_state_dict(loaded["state_dict"] | {"head.prototypes": prototypes[:1]})
    except RuntimeError as error:
        raise SystemExit(f"{args.eval_only} does not fit its --arch: {' '.join(str(error).split())[:300]}") from None
    for name in ("arch", "data", "seed", "head_hidden", "prototype_dim", "head_bn"):  # also of the random network
        setattr(args, name, made_with[name])
    if worlds and loaded["class_names"] != [row["name"] for row in worlds[0][2]]:
        loaded["class_counts"] = torch.zeros(len(worlds[0][2]), dtype=torch.int64)
        if rank == 0 and worlds[0][2] and not worlds[0][3]:
            print(f"frequencies of the classes are not known: {args.eval_only} has those of other classes, or of "
                  "these in another order")
    report_dino(model.to(device), prototypes, worlds, loaded["class_counts"].numpy(), args, loaded["step"], 0.0, rank,
                device, "fp32")


def main(args: argparse.Namespace) -> None:
    # --- setup
    rank, world_size, device, control = setup_distributed(args.device)
    is_main, out = rank == 0, Path(args.out)
    precision, reason = pick_precision(args.precision, device)
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[precision]
    autocast = functools.partial(torch.autocast, device.type, dtype, enabled=precision != "fp32")
    torch.manual_seed(args.seed)  # the same on all processes, so they start from the same weights

    # --- data
    loaded = load_teacher(args) if args.eval_only else {}
    root = root_of(args.root, args.data)
    on_one_rank(rank, lambda: ensure_shapes(root))
    worlds = find_worlds(args, root)
    if args.eval_only:
        evaluate_teacher(args, loaded, worlds, rank, device)
        return
    classes = read_classes(root)
    class_names = [row["name"] for row in classes]
    paths, weights = find_sets(args.data, root)
    tables = [Table(path) for path in paths]
    sizes = [len(table) for table in tables]
    shares = np.array([size if weight is None else weight for weight, size in zip(weights, sizes)], float)
    shares /= shares.sum()
    class_counts = count_labels(tables, shares, classes)
    if is_main:
        print(describe(root, tables, shares, class_names, class_counts))
        print(f"precision {precision} ({reason}), {device}, {world_size} process{'es' * (world_size > 1)}", flush=True)
    if args.batch_size % world_size or sum(sizes) < args.batch_size:
        raise SystemExit(f"--batch-size {args.batch_size} must split into {world_size} processes and not be larger "
                         f"than the {sum(sizes)} rows of --data {args.data}")
    pixels = load_pixels(tables, args.global_size)  # [rows of all sets, H, W, 3] uint8, or None
    view_sizes = 2 * [args.global_size] + args.local_crops * [args.local_size]
    view_scales = 2 * [tuple(args.global_scale)] + args.local_crops * [tuple(args.local_scale)]
    check_views(args, tables, view_sizes, is_main)
    inputs = checksums(tables)
    checkpoint = find_checkpoint(args, RUN_FLAGS, inputs, control)

    # --- model
    K, D = args.prototypes, args.prototype_dim
    M = args.sample_prototypes or K
    student = Network(args.arch, args.head_hidden, D, M, args.head_bn)
    if args.init:
        load_backbone(student, args.init)
    student.to(device)
    if args.arch != "ViT-S-16":
        student.visual.to(memory_format=torch.channels_last)
    for module in student.modules():
        if isinstance(module, BatchNorm2d):
            module.sync = args.bn == "sync"
    table = PrototypeTable(K, D, device)
    if args.optimizer == "sgd":
        table.weight *= (D / K) ** 0.5  # deviation 10
    teacher, teacher_prototypes = copy.deepcopy(student).requires_grad_(False), table.weight.clone()
    if M == K:  # the working rows are the table
        student.head.prototypes.data, teacher.head.prototypes.data = table.weight, teacher_prototypes
    pairs = [(t, s) for (name, t), s in zip(teacher.named_parameters(), student.parameters())
             if s.requires_grad and name != "head.prototypes"]
    teacher_params, student_params = map(list, zip(*pairs))
    center, usage = torch.zeros(K, device=device), torch.zeros(K, dtype=torch.int64, device=device)
    last_won = torch.full((K,), -(10**9), dtype=torch.int64, device=device)  # step at which a prototype last won
    if args.compile:
        warnings.filterwarnings("ignore", message="Dynamo detected a call to a `functools")  # a cache of constants
        student.compile()
        teacher.compile()
    net = wrap_ddp(student, device, world_size)

    # --- optimizer
    steps = math.ceil(args.epochs * sum(sizes) / args.batch_size) if args.epochs else args.steps
    peak_lr = args.lr or (3e-3 if args.arch == "tiny" else 5e-4 * args.batch_size / 256)
    if args.optimizer == "sgd":
        peak_lr = args.lr or 0.03 * args.batch_size / 256  # Wen et al., appendix
    optimizer = make_optimizer(args.optimizer, param_groups(student, args.weight_decay), peak_lr)
    params = [p for group in optimizer.param_groups for p in group["params"]]
    decay_end = args.weight_decay if args.weight_decay_end < 0 else args.weight_decay_end
    scaler = torch.amp.GradScaler(device.type, enabled=precision == "fp16")

    # --- resume
    start, seconds_before, started = 0, 0.0, time.time()
    if checkpoint:
        student.load_state_dict(checkpoint["student"])
        teacher.load_state_dict(checkpoint["state_dict"] | {"head.prototypes": teacher.head.prototypes})
        for own, name in ((table.weight, "student_prototypes"), (teacher_prototypes, "dino_prototypes"),
                          (center, "center"), (usage, "usage"), (last_won, "last_won")):
            own.copy_(checkpoint[name])
        table.state = {name: rows.to(device) for name, rows in checkpoint["prototype_state"].items()}
        start, seconds_before = restore(checkpoint, optimizer, scaler, device)

    # --- loader
    held = []  # by name until the end, and with it the lock
    on_one_rank(rank, lambda: held.append(lock_folder(out)))
    dataset = Views(tables, view_sizes, view_scales, args.crop_aspect, args.max_pixels, args.seed)
    if pixels is not None:
        pixels, dataset.pixel_offsets = pixels.to(device), np.cumsum([0, *sizes[:-1]])
    workers = args.workers if args.workers >= 0 else default_workers() if pixels is None else 1
    sampler = Sampler(sizes, shares, args.batch_size, args.seed, start, steps, rank, world_size)
    loader = torch.utils.data.DataLoader(dataset, batch_sampler=sampler, collate_fn=dict,
                                         pin_memory=device.type == "cuda", **worker_setup(workers))

    # --- log
    if is_main:
        print(f"{sum(p.numel() for p in student.parameters()) / 1e6:.2f} M parameters, {steps} steps of "
              f"{args.batch_size} images, {M} of {K} prototypes, ln {M} = {math.log(M):.3f}"
              + (f", continued from step {start}" if start else ""), flush=True)
    log, stop_signals = RunLog(checkpoint, args, sum(sizes), inputs, device, control), []
    signal.signal(signal.SIGTERM, lambda number, frame: stop_signals.append(number))

    # --- loop
    student.train()
    teacher.train()  # as published: the teacher normalises by its own batches
    has_warned = False
    running = [b for m in (student, teacher) for name, b in m.named_buffers() if "running_" in name]
    progress = tqdm(total=steps, initial=start, disable=not (is_main and sys.stderr.isatty()), unit="step")
    for step, batch in enumerate(loader, start):
        lr = lr_at(step, peak_lr, args.warmup_steps, steps)
        optimizer.param_groups[0]["weight_decay"] = cosine_at(args.weight_decay, decay_end, step, steps)
        for group in optimizer.param_groups:
            group["lr"] = lr
        warm = min(1.0, step / args.warmup_teacher_temp_steps) if args.warmup_teacher_temp_steps else 1.0
        first_temp = args.warmup_teacher_temp or args.teacher_temp
        temperature = first_temp + warm * (args.teacher_temp - first_temp)
        momentum = cosine_at(args.ema, 1.0, step, steps)
        counts = usage.cpu().numpy() if args.prototype_power else None  # Sync
        proto_ids = draw_prototypes(K, M, args.seed, step, counts, args.prototype_power)
        proto_ids = proto_ids.to(device, non_blocking=True)
        table.load(proto_ids, student.head.prototypes, optimizer)
        if M < K:
            torch.index_select(teacher_prototypes, 0, proto_ids, out=teacher.head.prototypes)

        crops = make_crops(batch, pixels, view_sizes, args.augment, device)
        n_global, kept = 2 * len(batch["draws"][0]), [buffer.clone() for buffer in (*running, center)]
        with autocast():
            with torch.no_grad():
                teacher_logits, teacher_embed = teacher([crops[0][:n_global]])
            student_logits, _ = net(crops)
        if args.centering == "sinkhorn":
            targets = sinkhorn(teacher_logits, temperature)
        else:
            targets = center_and_sharpen(teacher_logits, center, proto_ids, temperature)
        loss = dino_loss(student_logits, targets, args.student_temp)
        scaler.scale(loss).backward()

        is_log_step = (step + 1) % args.log_every == 0 or step + 1 == steps
        scaler.unscale_(optimizer)
        if step < args.freeze_prototypes:
            student.head.prototypes.grad = None
        grad_norm = clip_gradients(params, args.clip_grad, args.clip_of == "tensor")
        is_taken = grad_norm.isfinite()  # equal on all ranks
        for buffer, before in zip((*running, center), kept):  # a step that is left out leaves no trace in these either
            torch.where(is_taken, buffer, before, out=buffer)
        if precision != "fp16":  # as GradScaler has a fused optimizer leave a step out, on the device
            optimizer.found_inf = (~is_taken).float()
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad(set_to_none=True)
        table.store(proto_ids, student.head.prototypes, optimizer)
        with torch.no_grad():
            # After a step that was left out too, as published: towards a student that stands still.
            torch._foreach_lerp_(teacher_params, student_params, 1 - momentum)
            teacher_prototypes.lerp_(table.weight, 1 - momentum)
            winners = proto_ids[targets.argmax(1)]
            won = torch.zeros_like(usage).index_add_(0, winners, torch.ones_like(winners))
            won *= is_taken  # targets of NaN name none
            if world_size > 1:
                dist.all_reduce(won)  # All ranks
            usage += won
            last_won.masked_fill_(won > 0, step)
        parts = {"loss": loss, "teacher_logits": teacher_logits}
        log.count(step, parts, is_taken, batch["bad"], is_log_step)
        progress.update()

        if is_log_step:
            signs = {name: total(float(x), control) / world_size for name, x in
                     diagnostics(loss.detach(), teacher_logits - kept[-1][proto_ids], targets, teacher_embed,
                                 temperature).items()}  # Sync
            log.report(step, lr=lr, grad_norm=float(grad_norm), temperature=temperature, ema=momentum, **signs,
                       won_1000=float((last_won > step - 1000).float().mean()))
            collapsed = collapse_of(signs)
            if collapsed and is_main and not has_warned and step > max(args.warmup_steps, steps // 5):
                print(f"step {step + 1}: the model has collapsed: {collapsed}; try another --teacher-temp, "
                      "a lower --lr or --ema nearer to 1", flush=True)
                has_warned = True
        if args.eval_every and (step + 1) % args.eval_every == 0 and step + 1 < steps:
            paused_at = time.time()
            metrics = evaluate_dino(teacher, worlds, class_counts, args, device)
            log.write({"step": step + 1, "unique_prototypes": unique_prototypes(teacher_prototypes), **metrics})
            if is_main:
                print_probes(metrics)
            log.logged_at += time.time() - paused_at  # images_per_s is that of training
        is_stopped = total(len(stop_signals), control)
        if is_stopped or step + 1 == steps or (args.save_every and (step + 1) % args.save_every == 0):
            checkpoint = checkpoint_of_dino(teacher, teacher_prototypes, class_names, class_counts, args, step + 1)
            checkpoint |= {"student": student.state_dict(), "student_prototypes": table.weight,
                           "prototype_state": table.state, "center": center, "usage": usage, "last_won": last_won}
            seconds = seconds_before + time.time() - started
            checkpoint |= resumable(optimizer, scaler, inputs, log.n_bad(), seconds, device)
            save_checkpoint(out / "checkpoint.pt", checkpoint, rank)
        if is_stopped:
            if is_main:
                how = "the same command" if args.resume == "auto" else "--resume auto"
                print(f"SIGTERM: saved at step {step + 1}; {how} continues", flush=True)
            return

    progress.close()
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(0))  # all is saved: the same command evaluates
    if args.export:
        exported = checkpoint_of_dino(teacher, teacher_prototypes, class_names, class_counts, args, steps)
        save_checkpoint(Path(args.export), exported, rank)
    report_dino(teacher, teacher_prototypes, worlds, class_counts, args, steps,
                seconds_before + time.time() - started, rank, device, precision)


if __name__ == "__main__":
    try:
        main(ARGS)
        if dist.is_initialized():  # only then: NCCL's waits for the other processes, which may wait for one that failed
            dist.destroy_process_group()
    except SystemExit as error:  # a message to the user: the input cannot be used, or the disk is full
        if isinstance(error.code, str):
            print(error.code, file=sys.stderr)
        raise SystemExit(2 if isinstance(error.code, str) else error.code) from None
