# /// script
# requires-python = ">=3.10"
# dependencies = ["torch>=2.6", "torchvision>=0.21", "numpy>=1.26", "scipy>=1.11", "pillow>=10.1", "tqdm>=4.66"]
# ///
r"""Supervised learning with a sampled vocabulary: at each step a group of images is classified among few classes only.

Paper: Wen et al., arXiv 2405.21070, section 3.3. CLIP's batch is a small vocabulary drawn anew at every step; here a
classifier gets the same: the classes of a group of images, and others drawn by frequency until there are M (federated
softmax). With --head frozen the classes are fixed vectors of a pretrained CLIP, so unseen classes have a place too.

    python sl_vocab_subsample.py                                    # plain softmax on the shapes world, 2 to 6 minutes
    python sl_vocab_subsample.py --vocab 32 --vocab-group 32 --out runs/vocab
    torchrun sl_vocab_subsample.py --data laionet --head frozen --vocab 64 --vocab-group 32 --out runs/frozen
    python sl_vocab_subsample.py --trim-tail 30 --head frozen --vocab 32 --vocab-group 32 --out runs/zero_shot_tail
    python sl_vocab_subsample.py --loss balanced --out runs/balanced                     # a baseline
    python sl_vocab_subsample.py --eval-only runs/sl/checkpoint.pt --eval-sets val.tsv sketch.tsv

The defaults are the matched protocol: a run differs from one of clip.py in the loss only (same tower, AdamW with
clip.py's default betas, steps, batch, warm-up, crops, batch norm, evaluation). The paper's protocol, on
ImageNet-Captions or LAIONet, is instead
    torchrun --nproc-per-node 4 sl_vocab_subsample.py --root ROOT --data incaps --arch RN50 --batch-size 256 \
        --epochs 90 --optimizer sgd --weight-decay 1e-4 --warmup-steps 0 --bn local --vocab 200 --vocab-group 64 \
        --precision fp32 --out runs/paper
Self-supervised weights to classification: --init backbone.pt (of clip.py, torchvision, SimCLR and MoCo with its
resnet50, and dino_laionet.py, whose ViT-S-16, with the published DINO's, is --arch dino-ViT-S-16 here).

A data set is a TSV with columns image and label (clip.py's docstring has the formats); rows without a label are
dropped, several labels are written 3|17 (a test set is scored by the first). Written to --out: args.json, log.jsonl,
checkpoint.pt, metrics.json and <set>.npz for each test set (logits, predictions, features, labels, rows, class_counts,
class_names, prototypes).

Dimension key: B images of this process, N = B * world_size images of the step, D embedding width, C classes, M classes
of a vocabulary, G images of a group, U classes in the union of this process's vocabularies, J labels of an image.

Expected on the default world: val top-1 near 0.84, Spearman(frequency, predictions) near 0.6, where a CLIP on the same
images has 0.80 and 0.01 (README).

Deviations from the paper and its code:
 1. Vocabularies belong to groups of G images of the global batch, not to processes: M has one meaning for any number
    of processes, and draws come from (seed, step, group). Theirs held all classes of a process's images, so M = 50 was
    about 62, or 222 at 256 images a process; the realised size is logged here, and a nominal one that is too small is
    named.
 2. Classes without a training image are never drawn by frequency, and no class twice (theirs could be near M = C). So
    no M < C holds them, while M = C does.
 3. The default optimiser and evaluation are clip.py's, so that the two compare; theirs differ in both.
 4. Momentum and weight decay act on all rows of a learned head: decay on the length of a row only, which logits do not
    see (its next gradients do: they grow as the row shrinks); momentum carries on the rows that left the vocabulary, as
    it does in theirs.
 5. The schedule is the cosine, by step (theirs by epoch, with the names of cosine and step exchanged).
 6. Weight decay is on matrices only (theirs on gains, biases and the scale too).
 7. Rows that compare differ in one flag: theirs trained the vocabulary of figure 8 at four times the baselines' batch
    and learning rate.
 8. What is drawn depends on --seed: --trim-tail's images too, which theirs drew without one.
 9. A row's labels stay together, as 3|17, under --multi-label; theirs repeated the row, and took the list of labels for
    the class counts.
10. What an epoch leaves over begins the next batch; theirs dropped it.
11. A frozen head has the class prototypes of clip.pt, means over its prompts; theirs the one prompt "a {class}".
"""

import argparse
import contextlib
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
from collections import Counter, OrderedDict, defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

# ------------------------------------------------------------------------------ flags

SHAPES_ROOT = "data/shapes"  # rendered by build_datasets.py on first use
TEST_SETS = ("val", "v2", "sketch", "rendition", "objectnet", "adversarial")


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """Flags of sl_vocab_subsample.py; wrong combinations end here."""
    parser = argparse.ArgumentParser(usage="%(prog)s [FLAGS]; --help lists them", description=__doc__.split("\n")[0],
                                     formatter_class=argparse.ArgumentDefaultsHelpFormatter, allow_abbrev=False)
    data = parser.add_argument_group("data")
    data.add_argument("--root", default="auto",
                      help=f"folder of the world: classes.tsv, test sets, SET/train.tsv, clip.pt; auto is "
                           f"{SHAPES_ROOT}, or the folder of the first --data file")
    data.add_argument("--data", default="laionet",
                      help="training sets: NAME (ROOT/NAME/train.tsv) or FILE.tsv, mixed as A:2,B:1; without weights "
                           "each set counts by its size")
    data.add_argument("--multi-label", default="first", choices=["first", "all", "random", "drop"],
                      help="images with several labels (3|17): the first one, all with equal weight, one drawn per "
                           "epoch, or left out")
    data.add_argument("--sampler", default="instance", choices=["instance", "class", "sqrt"],
                      help="images are drawn evenly, or first a class, evenly or by the root of its frequency")
    data.add_argument("--trim-tail", type=int, default=0,
                      help="keep only --trim-shots images of each of this many least frequent classes, and report "
                           "them apart")
    data.add_argument("--trim-shots", type=int, default=0, help="images kept of a trimmed class; 0: a zero-shot tail")
    data.add_argument("--crop-scale", type=float, default=0.9,
                      help="smallest area of the random crop, as a fraction of the image; 1: no random crop but the "
                           "largest centred one with an aspect from 3/4 to 4/3")
    data.add_argument("--eval-sets", nargs="*", default=["auto"],
                      help=f"test sets: names in ROOT or TSV files; auto takes those of {', '.join(TEST_SETS)} that "
                           "ROOT has")
    data.add_argument("--max-bad", type=float, default=0.01,
                      help="end the run when more than this fraction of the images read so far, or of 1,000 if these "
                           "are fewer, cannot be read")
    data.add_argument("--max-pixels", type=int, default=89_478_485,
                      help="refuse images whose header announces more pixels than this")

    model = parser.add_argument_group("model")
    model.add_argument("--arch", default="tiny",
                       choices=["tiny", "RN50", "ViT-B-32", "ViT-B-16", "ViT-S-16", "resnet50", "dino-ViT-S-16"],
                       help="image tower; tiny is a small residual net for 32 px images")
    model.add_argument("--head", default="learned", choices=["learned", "frozen", "finetune"],
                       help="class vectors: trained from a random start, fixed to --head-init, or trained from it")
    model.add_argument("--head-init", default="auto",
                       help="class vectors of frozen and finetune: a checkpoint with prototypes and class names, or an "
                            "array (C, D) as .npy or .pt; auto is ROOT/clip.pt")
    model.add_argument("--init", default="",
                       help="checkpoint to start from: in clip.py the whole model, elsewhere the image tower")
    model.add_argument("--freeze-backbone", action=argparse.BooleanOptionalAction, default=False,
                       help="train the head and the scale only (and the layer before the head where --init has none)")

    method = parser.add_argument_group("method")
    method.add_argument("--vocab", type=int, default=0,
                        help="classes M of a group's vocabulary, those of its images and drawn ones; 0 is all")
    method.add_argument("--vocab-power", type=float, default=1.0,
                        help="classes are drawn with weight (training images) ** this; 0 is evenly")
    method.add_argument("--vocab-group", type=int, default=64,
                        help="images that share a vocabulary; 0 is the whole batch")
    method.add_argument("--loss", default="softmax",
                        choices=["softmax", "balanced", "logit-adjusted", "log-q", "focal"],
                        help="cross-entropy; with logits + ln(class count); with --tau times that; minus "
                             "ln(probability of being drawn), which undoes --vocab, but for classes that are never "
                             "drawn; weighted by (1 - p)^2")
    method.add_argument("--tau", type=float, default=1.0, help="strength of --loss logit-adjusted")
    method.add_argument("--label-smoothing", type=float, default=0.0,
                        help="part of the target spread evenly over the vocabulary")
    method.add_argument("--bn", default="sync", choices=["sync", "local"],
                        help="batch norm statistics over all processes or over each one's own part")

    optimization = parser.add_argument_group("optimization")
    optimization.add_argument("--steps", type=int, default=1600,
                              help="optimiser steps; --epochs takes its place when given")
    optimization.add_argument("--epochs", type=float, default=0, help="passes over the data; 0 leaves it to --steps")
    optimization.add_argument("--batch-size", type=int, default=128, help="examples of a step over all processes")
    optimization.add_argument("--optimizer", default="adamw", choices=["adamw", "sgd"],
                              help="AdamW with betas 0.9, 0.98, or SGD with momentum 0.9")
    optimization.add_argument("--lr", type=float, default=0,
                              help="peak learning rate; 0 is what suits tower and optimiser (tiny with AdamW: 3e-3)")
    optimization.add_argument("--weight-decay", type=float, default=0.1,
                              help="on matrices only: not on gains, biases and scales")
    optimization.add_argument("--warmup-steps", type=int, default=50,
                              help="steps of linear warm-up, before the cosine to 0")
    optimization.add_argument("--clip-grad", type=float, default=0.0, help="largest gradient norm; 0 is off")

    run = parser.add_argument_group("run")
    run.add_argument("--out", default="runs/sl",
                     help="folder for log, checkpoint, metrics and predictions; --eval-only has runs/eval for this one")
    run.add_argument("--resume", default="auto",
                     help="auto continues OUT/checkpoint.pt if there is one, off starts over (that one becomes "
                          "checkpoint.old.pt), or a checkpoint to continue")
    run.add_argument("--eval-only", default="", help="evaluate this checkpoint on --eval-sets and end")
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
    if args.vocab and args.vocab < 2:
        parser.error(f"--vocab {args.vocab}: a vocabulary needs at least 2 classes (0 is all classes)")
    if args.loss == "log-q" and not args.vocab:
        parser.error("--loss log-q corrects for sampling: it needs --vocab")
    if args.tau != 1 and args.loss != "logit-adjusted":
        parser.error("--tau is of --loss logit-adjusted (balanced is its tau 1)")
    if args.head_init != "auto" and args.head == "learned":
        parser.error("--head-init is read by --head frozen and finetune: a learned head starts at random")
    if args.sampler != "instance" and ":" in args.data:
        parser.error("--sampler class and sqrt draw by class over all sets: no weights in --data then")
    if args.sampler != "instance" and args.multi_label in ("all", "random"):
        parser.error("--sampler class and sqrt draw by the first label: they need --multi-label first or drop")
    if args.trim_shots and not args.trim_tail:
        parser.error("--trim-shots is of --trim-tail, which is not given")
    if args.trim_tail and args.multi_label in ("all", "random"):
        parser.error("--trim-tail cuts by the first label: it needs --multi-label first or drop")
    if args.freeze_backbone and not args.init:
        parser.error("--freeze-backbone keeps the tower of --init, which is not given")
    if not 0 <= args.label_smoothing < 1 or not 0 < args.crop_scale <= 1:
        parser.error("--label-smoothing must be in [0, 1) and --crop-scale in (0, 1]")
    for flag in ("batch_size", "log_every", "max_pixels"):
        if not getattr(args, flag) >= 1:
            parser.error(f"--{flag.replace('_', '-')} must be at least 1, got {getattr(args, flag)}")
    for flag in ("seed", "steps", "epochs", "lr", "weight_decay", "warmup_steps", "clip_grad", "save_every",
                 "eval_every", "max_bad", "vocab_power", "vocab_group", "trim_tail", "trim_shots", "tau"):
        if not 0 <= getattr(args, flag) < 2**32:  # numpy's seeds; NaN is not
            parser.error(f"--{flag.replace('_', '-')} must be at least 0 and below 2**32, got {getattr(args, flag)}")
    for flag in ("vocab_group", "vocab_power"):
        if not args.vocab and getattr(args, flag) != parser.get_default(flag):
            parser.error(f"--{flag.replace('_', '-')} is of --vocab, which is not given")
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


class Vocab(NamedTuple):
    """Vocabularies of this process's groups, within their union of U classes."""

    ids: torch.Tensor | None  # [U] int64 sorted class ids; None: all C classes stand in the columns
    inside: torch.Tensor  # [groups, U] bool
    log_q: torch.Tensor  # [groups, U] float32, ln of the probability of being in the vocabulary; 0 for present classes
    groups: torch.Tensor  # [B] int64 group of each image


class Draws(NamedTuple):
    """How vocabularies are drawn."""

    weights: torch.Tensor  # [C] float64, how likely a class is drawn
    cumulative: torch.Tensor  # [C] float64, the sums of the weights up to each class
    M: int
    n_arrivals: int  # see draw_vocab; the law of what is drawn does not depend on it


def draws_of(class_counts: torch.Tensor, M: int, power: float) -> Draws:
    """Draws of M classes with weight count ** power. n_arrivals: so many that they almost surely hold M classes.

    It is 0 (all classes race, see draw_vocab) for few classes, and where a few classes have most of the weight, so that
    the arrivals would cost more than the race (benchmarks/vocab.py).
    """
    weights = class_counts.double() ** power  # 0 ** 0 = 1: classes without images are drawn by power 0 only
    C, n, cumulative = len(weights), M, weights.cumsum(0)
    if not bool(cumulative[-1].isfinite()):
        raise SystemExit(f"--vocab-power {power}: (training images) ** {power} is too large a number")
    while 8 * n < C and -torch.expm1(-n / cumulative[-1] * weights).sum() < M + 4 * math.sqrt(M):
        n += n // 8 + 1
    return Draws(weights, cumulative, M, n if 8 * n < C and C > 4096 else 0)


def draw_vocab(present: torch.Tensor, draws: Draws, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Vocabulary of a group: its P present classes, and others drawn without replacement until there are M.

    present: [P] class ids. Returns: [max(M, P)] class ids, fewer when no class with a weight is left; float32 ln of the
        probability of each to be in the vocabulary, 0 for present classes.
    An exponential race: class c arrives at time e_c / weight_c, the first ones are drawn, which has the law of draws
    one after the other with weights renormalised. Given t, the time at which the first class too many arrives, a class
    is in with probability 1 - exp(-weight t). Were classes to arrive again and again, all arrivals would be one Poisson
    stream whose classes are draws with replacement: n_arrivals of it are looked at, log C steps each, and the first one
    of a class counts. If too few classes have come by then, the others race on from there, since exponential times have
    no memory. The rule (classes of the batch first, then by count ** 0.5) is that of the federated loss of Zhou et al.,
    arXiv 2103.07461; power 1 is Wen et al., section 3.3.
    """
    weights, cumulative, M, n_arrivals = draws
    generator, size = torch.Generator().manual_seed(seed), max(M, len(present))
    gaps = torch.empty(n_arrivals, dtype=torch.float64).exponential_(generator=generator)
    luck = torch.rand(n_arrivals, dtype=torch.float64, generator=generator)
    stream = torch.searchsorted(cumulative, luck * cumulative[-1], right=True)  # never a class with a weight of 0
    times = torch.cat([torch.full(present.shape, -1.0), gaps.cumsum(0) / cumulative[-1]])  # present ones come first
    classes, first = np.unique(torch.cat([present, stream]).numpy(), return_index=True)
    order = first.argsort()[: size + 1]
    classes, times = torch.from_numpy(classes[order]), times[first[order]]
    if len(classes) <= size:
        race = torch.empty_like(weights).exponential_(generator=generator) / weights
        race += gaps.sum() / cumulative[-1]
        race[classes] = times
        times, classes = race.topk(min(size + 1, int(race.isfinite().sum())), largest=False)  # a weight of 0: never
    t = times[size] if len(times) > size else math.inf
    log_q = torch.log(-torch.expm1(-weights[classes[:size]] * t)).float()
    return classes[:size], log_q.masked_fill(times[:size] < 0, 0.0)


def vocab_of_batch(labels: torch.Tensor, first: int, B: int, group_size: int, draws: Draws, seed: int,
                   step: int) -> tuple[Vocab, np.ndarray]:
    """Vocabularies of the groups that hold rows first .. first + B of the global batch, the same for any such split.

    labels: [N, J] int64 of all processes, -1 pads. group_size: images of a group, cut from the global batch in order.
    Returns: the vocabularies; [3] summed over the groups whose first image is among these rows, so that each is counted
    once over all processes: their sizes, the number of drawn classes, the number of groups.
    The union's rows alone are multiplied when they are at most three quarters of the classes: from there on copying
    them costs more and more of what it saves (benchmarks/vocab.py).
    """
    C, ids = len(draws.weights), np.arange(first // group_size, (first + B - 1) // group_size + 1)
    vocabs, counted = [], np.zeros(3, np.int64)
    for group, luck in zip(ids, uniform_hash(seed, 6, step, ids)):
        present = labels[group * group_size : (group + 1) * group_size].unique()
        present = present[present >= 0]
        vocabs.append(draw_vocab(present, draws, int(luck * 2**53)))
        if group * group_size >= first:
            counted += (len(vocabs[-1][0]), len(vocabs[-1][0]) - len(present), 1)
    drawn, sizes = torch.cat([classes for classes, _ in vocabs]), torch.tensor([len(classes) for classes, _ in vocabs])
    union, columns = drawn.unique(return_inverse=True)  # [U], sorted, and where in it each drawn class is
    is_whole = 4 * len(union) > 3 * C
    if is_whole:
        union, columns = torch.arange(C), drawn
    inside, log_q = torch.zeros(len(ids), len(union), dtype=torch.bool), torch.zeros(len(ids), len(union))
    rows = torch.arange(len(ids)).repeat_interleave(sizes)
    inside[rows, columns], log_q[rows, columns] = True, torch.cat([values for _, values in vocabs])
    groups = torch.arange(first, first + B) // group_size - ids[0]
    return Vocab(None if is_whole else union, inside, log_q, groups), counted


def vocab_logits(features: torch.Tensor, prototypes: torch.Tensor, scale: torch.Tensor, vocab: Vocab | None,
                 adjustment: torch.Tensor | None = None, correct: bool = False) -> torch.Tensor:
    """Cosine logits, -inf outside of a row's vocabulary: [B, U], or [B, C] without a vocabulary.

    features: [B, D] unit. prototypes: [C, D] of any length. adjustment: [C], added. correct: subtract log_q, which
    makes the sum of exponentials an unbiased estimate of the one over the classes that can be drawn (sampled softmax).
    """
    if vocab is not None and vocab.ids is not None:
        prototypes = prototypes[vocab.ids]
        adjustment = None if adjustment is None else adjustment[vocab.ids]
    with exact_matmul():
        logits = scale * features @ F.normalize(prototypes.float(), dim=1).T
    if adjustment is not None:
        logits = logits + adjustment
    if vocab is None:
        return logits
    if correct:
        logits = logits - vocab.log_q[vocab.groups]
    return logits.masked_fill(~vocab.inside[vocab.groups], -torch.inf)


def cross_entropy(logits: torch.Tensor, labels: torch.Tensor, smoothing: float = 0.0,
                  gamma: float = 0.0) -> torch.Tensor:
    """Mean cross-entropy, nats, over rows; classes with a logit of -inf are not there.

    logits: [B, U]. labels: [B, J] columns, -1 pads; an image's labels share its target evenly. smoothing: part of the
    target that is spread over all classes that are there. gamma: each row weighs (1 - p) ** gamma, p = exp(-its
    cross-entropy), a single label's probability (focal loss, Lin et al., arXiv 1708.02002, equation 4).
    """
    log_p = logits.log_softmax(1)
    is_label = labels >= 0
    nll = -log_p.gather(1, labels.clamp(0)).masked_fill(~is_label, 0.0).sum(1) / is_label.sum(1)  # [B]
    if smoothing:
        there = logits > -torch.inf
        nll = (1 - smoothing) * nll - smoothing * log_p.masked_fill(~there, 0.0).sum(1) / there.sum(1)
    return ((1 - (-nll).exp()) ** gamma * nll).mean() if gamma else nll.mean()


def adjustment_of(loss: str, tau: float, class_counts: torch.Tensor) -> torch.Tensor | None:
    """[C] what is added to the logits in training: tau ln(count share); -inf for a class without images. class_counts:
    images as often as the sampler draws them.

    balanced: Ren et al., arXiv 2007.10740, equation 4. logit-adjusted: Menon et al., arXiv 2007.07314, equation 10, the
    same at tau 1. Predictions are made without it.
    """
    factor = {"balanced": 1.0, "logit-adjusted": tau}.get(loss, 0.0)
    return factor * (class_counts.double() / class_counts.sum()).log().float() if factor else None


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
@contextlib.contextmanager
def exact_matmul() -> Iterator[None]:
    """Matrix products of the forward pass in full fp32: TF32 rounds logits near 100 to steps of 0.06."""
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = False
    try:
        yield
    finally:
        torch.backends.cuda.matmul.allow_tf32 = before


# ------------------------------------------------------------------------------ model

TOWERS = {
    "tiny": dict(embed_dim=64, image_size=32),
    "RN50": dict(embed_dim=1024, image_size=224),
    "ViT-B-32": dict(embed_dim=512, image_size=224, width=768, patch_size=32),
    "ViT-B-16": dict(embed_dim=512, image_size=224, width=768, patch_size=16),
    "ViT-S-16": dict(embed_dim=384, image_size=224, width=384, patch_size=16),
    "resnet50": dict(embed_dim=1024, image_size=224),
    "dino-ViT-S-16": dict(embed_dim=384, image_size=224),  # of dino_laionet.py's ViT-S-16 and the published DINO
}

PIXELS = {  # mean and deviation of red, green and blue, of 0..1, that a tower was trained with
    "clip": ([0.48145466, 0.4578275, 0.40821073], [0.26862954, 0.26130258, 0.27577711]),  # openai/CLIP clip.py
    "imagenet": ([0.485, 0.456, 0.406], [0.229, 0.224, 0.225]),  # torchvision's and the public DINO's resnet50
}


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


# Copied from clip.py
class QuickGELU(nn.Module):
    """The cheap GELU of OpenAI's weights."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * torch.sigmoid(1.702 * x)


# Copied from clip.py
class Attention(nn.Module):
    """Multi-head self-attention with head width 64 and nn.MultiheadAttention's parameter names."""

    def __init__(self, width: int):
        super().__init__()
        self.n_heads = width // 64
        self.in_proj_weight = nn.Parameter(torch.empty(3 * width, width))
        self.in_proj_bias = nn.Parameter(torch.zeros(3 * width))
        self.out_proj = nn.Linear(width, width)
        nn.init.xavier_uniform_(self.in_proj_weight)
        nn.init.zeros_(self.out_proj.bias)

    def forward(self, x: torch.Tensor, is_causal: bool) -> torch.Tensor:  # [B, L, width]
        qkv = F.linear(x, self.in_proj_weight, self.in_proj_bias)
        q, k, v = qkv.unflatten(2, (3, self.n_heads, -1)).permute(2, 0, 3, 1, 4)  # [B, H, L, 64] each
        x = F.scaled_dot_product_attention(q, k, v, is_causal=is_causal)
        return self.out_proj(x.transpose(1, 2).flatten(2))


# Copied from clip.py
class ResidualAttentionBlock(nn.Module):
    """Pre-norm transformer block."""

    def __init__(self, width: int, activation: str):
        super().__init__()
        self.ln_1 = nn.LayerNorm(width)
        self.attn = Attention(width)
        self.ln_2 = nn.LayerNorm(width)
        act = QuickGELU() if activation == "quick_gelu" else nn.GELU()
        layers = {"c_fc": nn.Linear(width, 4 * width), "gelu": act, "c_proj": nn.Linear(4 * width, width)}
        self.mlp = nn.Sequential(OrderedDict(layers))

    def forward(self, x: torch.Tensor, is_causal: bool) -> torch.Tensor:  # [B, L, width]
        x = x + self.attn(self.ln_1(x), is_causal)
        return x + self.mlp(self.ln_2(x))


# Copied from clip.py
class Transformer(nn.Module):
    def __init__(self, width: int, n_layers: int, activation: str, is_causal: bool):
        super().__init__()
        self.is_causal = is_causal
        self.resblocks = nn.ModuleList(ResidualAttentionBlock(width, activation) for _ in range(n_layers))

    def forward(self, x: torch.Tensor) -> torch.Tensor:  # [B, L, width]
        for block in self.resblocks:
            x = block(x, self.is_causal)
        return x


# Copied from clip.py
class VisionTransformer(nn.Module):
    """CLIP's ViT: class token first, layer norm before and after the blocks, linear projection."""

    def __init__(self, embed_dim: int, image_size: int, patch_size: int, width: int, activation: str):
        super().__init__()
        self.conv1 = nn.Conv2d(3, width, patch_size, patch_size, bias=False)
        self.class_embedding = nn.Parameter(torch.randn(width) * width**-0.5)
        self.positional_embedding = nn.Parameter(torch.randn((image_size // patch_size) ** 2 + 1, width) * width**-0.5)
        self.ln_pre = nn.LayerNorm(width)
        self.transformer = Transformer(width, 12, activation, is_causal=False)
        self.ln_post = nn.LayerNorm(width)
        self.proj = nn.Parameter(torch.randn(width, embed_dim) * width**-0.5)

    def forward(self, images: torch.Tensor) -> torch.Tensor:  # [B, 3, S, S] -> [B, D]
        x = self.conv1(images).flatten(2).transpose(1, 2)  # [B, P, width]
        x = torch.cat([self.class_embedding.to(x.dtype).expand(len(x), 1, -1), x], 1)  # [B, 1 + P, width]
        x = self.transformer(self.ln_pre(x + self.positional_embedding.to(x.dtype)))
        return self.ln_post(x[:, 0]) @ self.proj


def resize_positions(positions: torch.Tensor, height: int, width: int) -> torch.Tensor:
    """Position embeddings of another grid: [1 + P, D], the first of the class token, -> [1 + height * width, D]."""
    side = math.isqrt(len(positions) - 1)
    if (height, width) == (side, side):
        return positions
    grid = positions[1:].float().unflatten(0, (side, side)).permute(2, 0, 1)[None]
    grid = F.interpolate(grid, (height, width), mode="bicubic", align_corners=False)
    return torch.cat([positions[:1], grid[0].flatten(1).T.to(positions.dtype)])


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


class Classifier(nn.Module):
    """Cosine classifier: logits = scale * cos(image, prototype); the scale is learned, clamped at 100 as CLIP's.

    prototypes: [C, D] given class vectors, or None for a random start. is_frozen: they are a buffer, not trained.
    """

    def __init__(self, arch: str, n_classes: int, prototypes: torch.Tensor | None, is_frozen: bool):
        super().__init__()
        spec = TOWERS[arch]
        self.arch, self.image_size = arch, spec["image_size"]
        self.embed_dim = spec["embed_dim"] if prototypes is None else prototypes.shape[1]
        if arch == "tiny":
            self.visual = TinyResNet(self.embed_dim)
        elif arch == "RN50":
            self.visual = ModifiedResNet(self.embed_dim, self.image_size)
        elif arch == "dino-ViT-S-16":
            self.visual = ViT(self.image_size, 16, spec["embed_dim"])
        elif arch == "resnet50":
            self.visual = torchvision.models.resnet50(norm_layer=BatchNorm2d, num_classes=self.embed_dim)
        else:
            self.visual = VisionTransformer(self.embed_dim, self.image_size, spec["patch_size"], spec["width"], "gelu")
        if prototypes is None:
            prototypes = F.normalize(torch.randn(n_classes, self.embed_dim), dim=1)
        if is_frozen:
            self.register_buffer("prototypes", prototypes.clone())
        else:
            self.prototypes = nn.Parameter(prototypes.clone())
        self.logit_scale = nn.Parameter(torch.tensor(math.log(1 / 0.07)))  # CLIP section 2.5
        self.use_pixels("clip")

    def use_pixels(self, name: str) -> None:
        """Standardise images as the tower's weights expect it: by a row of PIXELS. A checkpoint holds the name."""
        mean, std = torch.tensor(PIXELS[name])[:, :, None, None]  # [3, 1, 1] each
        self.pixels = name
        self.register_buffer("pixel_mean", mean, persistent=False)
        self.register_buffer("pixel_std", std, persistent=False)

    def encode_image(self, images: torch.Tensor) -> torch.Tensor:
        """[B, 3, S, S], 0..255 -> [B, D], not normalised. Channels last is faster for convolutions."""
        images = (images.float() / 255 - self.pixel_mean) / self.pixel_std
        return self.visual(images.contiguous(memory_format=torch.channels_last))

    def forward(self, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Unit features [B, D], float32; prototypes [C, D]; the scale exp(logit_scale)."""
        return F.normalize(self.encode_image(images).float(), dim=1), self.prototypes, self.logit_scale.exp()


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


def load_tower(model: Classifier, path: str) -> str:
    """Load the image tower of a checkpoint: keys visual.* (clip.py, this script, dino_laionet.py), backbone.*,
    encoder.* or encoder_q.* (SimCLR's and MoCo's), or without.

    Returns: the layer between tower and head that the file has not trained, or "". torchvision's classification layer
    (fc) is another one than ours, DINO has none for resnet50 and does not use tiny's: ours keeps its random start.
    A resnet50 or DINO's ViT that none of our scripts has written gets ImageNet's pixel statistics, its own.
    """
    loaded, own = load_weights(path), model.visual.state_dict()
    weights = loaded["state_dict"]
    for key in ("teacher", "model"):  # what DINO's and torchvision's own programs save
        weights = weights[key] if isinstance(weights.get(key), dict) else weights
    weights = {k.removeprefix("module."): v for k, v in weights.items() if isinstance(v, torch.Tensor)}
    activation = loaded.get("activation", "gelu" if "arch" in loaded else "one it does not name")
    if model.arch == "ViT-S-16" and any(k.endswith("cls_token") for k in weights):
        raise SystemExit(f"--init {path} holds DINO's ViT, which has other layers: --arch dino-ViT-S-16")
    if model.arch.startswith("ViT") and activation != "gelu":
        hint = "; if that is gelu, clip.py with --eval-only, --activation gelu and --export writes a file that names it"
        raise SystemExit(f"--init {path} was trained with {activation}, the ViT of this script has gelu"
                         + hint * (activation != "quick_gelu"))
    prefixes = ("visual.", "backbone.", "encoder.", "encoder_q.")
    prefix = next((p for p in prefixes if any(k.startswith(p) for k in weights)), "")
    weights = {k.removeprefix(prefix): v for k, v in weights.items() if k.startswith(prefix)}
    fresh = "proj" if model.arch == "tiny" and "dino_prototypes" in loaded else ""
    if model.arch == "resnet50" and not (prefix == "visual." and "fc.weight" in weights):
        fresh = "fc"
    if fresh:  # the file's last layer, a projection in SimCLR's and MoCo's, goes
        weights = {k: v for k, v in weights.items() if not k.startswith(f"{fresh}.")}
        weights |= {k: v for k, v in own.items() if k.startswith(f"{fresh}.")}
    is_public = prefix != "visual." and model.arch in ("resnet50", "dino-ViT-S-16")
    pixels = loaded.get("pixels", "imagenet" if is_public else "clip")
    if pixels not in PIXELS:
        raise SystemExit(f"--init {path} names the pixel statistics {pixels!r}, expected one of {', '.join(PIXELS)}")
    load_state(model.visual, weights, f"--init {path}")
    model.use_pixels(pixels)
    return fresh


def read_prototypes(path: str, class_names: list[str]) -> torch.Tensor:
    """[C, D] float32 class vectors of a file, in the order of class_names.

    A checkpoint has `prototypes` and `class_names`, by which rows are matched; an array (.npy, .pt) has a row for each
    class in label order. Raises: SystemExit for an unreadable file, classes that are missing, a wrong shape, NaN, a
    vector of length 0, which has no direction.
    """
    names, is_npy = None, path.endswith(".npy")
    try:
        prototypes = torch.from_numpy(np.load(path)) if is_npy else torch.load(path, "cpu", weights_only=True)
    except (*UNREADABLE, TypeError) as error:  # TypeError: an array of texts
        raise SystemExit(f"--head-init {path}: cannot be read: {str(error)[:200]}") from None
    if isinstance(prototypes, dict):
        names, prototypes = prototypes.get("class_names"), prototypes.get("prototypes")
    is_array = isinstance(prototypes, torch.Tensor) and prototypes.ndim == 2
    if not is_array or prototypes.is_complex() or not prototypes.numel():
        found = "no prototypes" if prototypes is None else f"{tuple(getattr(prototypes, 'shape', ()))}"
        found += " complex numbers" * (is_array and prototypes.is_complex())
        raise SystemExit(f"--head-init {path} holds {found}, expected an array (classes, width) of real numbers")
    if not isinstance(names, list | None) or not all(isinstance(name, str) for name in names or []):
        raise SystemExit(f"--head-init {path}: class_names must be a list of names, it is a {type(names).__name__}")
    if names and (len(names) != len(prototypes) or names != class_names and len(set(names)) < len(names)):
        raise SystemExit(f"--head-init {path}: {len(names)} class names, {len(set(names))} of them different, for "
                         f"{len(prototypes)} rows: they cannot be matched by name")
    if names and names != class_names:
        rows = {name: row for row, name in enumerate(names)}
        missing = [name for name in class_names if name not in rows]
        if missing:
            raise SystemExit(f"--head-init {path} has no vector for {len(missing)} of {len(class_names)} classes: "
                             f"{', '.join(missing[:10])}")
        prototypes = prototypes[[rows[name] for name in class_names]]
    if len(prototypes) != len(class_names):
        raise SystemExit(f"--head-init {path} has {len(prototypes)} rows for {len(class_names)} classes")
    prototypes = prototypes.detach().float().contiguous()  # what is broadcast has to be
    lengths = prototypes.norm(dim=1)
    if not bool(lengths.isfinite().all()):
        raise SystemExit(f"--head-init {path} holds values that are not finite, or too large to be squared")
    zero = [name for name, length in zip(class_names, lengths.tolist()) if length < 1e-12]  # F.normalize's least
    if zero:
        raise SystemExit(f"--head-init {path}: {len(zero)} classes have a vector of length 0, which has no direction: "
                         f"{', '.join(zero[:10])}")
    return prototypes


# ------------------------------------------------------------------------------ data

ALIASES = {"image": ("filepath", "path", "file"), "label": ("class", "wnid"), "caption": ("text", "title")}
IMAGE_FORMATS = ["JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM"]  # not EPS: Pillow would run Ghostscript on it
KEEP_PIXELS = 16 * 2**30  # bytes of .npy images kept on the device; beyond it they are read in the workers
GAVE_UP = "gave up"  # the reason, where no replacement could be read either


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


def read_label_sets(table: Table, classes: list[dict[str, str]]) -> np.ndarray:
    """[n, J] int64 labels of each row (a field is empty, a label, or several: `3|17`), none twice, -1 pads."""
    ids, rows = class_ids(classes), []
    for row in range(len(table)):
        fields = [field.strip() for field in table.get(row, "label").split("|")]
        labels = [label_of(field, ids) for field in fields if field]
        if any(not 0 <= label < len(classes) for label in labels):
            raise SystemExit(f"{table.path}: row {row + 1} has label {'|'.join(fields)[:100]!r}, not the number, nor a "
                             f"name or wnid that no other has, of the {len(classes)} classes of classes.tsv")
        rows.append(list(dict.fromkeys(labels)))
    label_sets = np.full((len(rows), max(1, *map(len, rows))), -1)
    for row, labels in enumerate(rows):
        label_sets[row, : len(labels)] = labels
    return label_sets


def trim_tail(labels: np.ndarray, class_counts: np.ndarray, K: int, shots: int, seed: int
              ) -> tuple[np.ndarray, np.ndarray]:
    """[n] bool: rows that stay when the K least frequent classes (ties by id) keep `shots` random images; [K] these."""
    tail = np.argsort(class_counts, kind="stable")[:K]
    keep = ~np.isin(labels, tail)
    luck = uniform_hash(seed, 7, np.arange(len(labels)))
    for c in tail:
        rows = np.flatnonzero(labels == c)
        keep[rows[np.argsort(luck[rows], kind="stable")[:shots]]] = True
    return keep, tail


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
def read_crops(tables: list[Table], examples: np.ndarray, image_size: int, min_side: float, crop_scale: float,
               max_pixels: int, seed: int) -> tuple[np.ndarray, torch.Tensor, list[tuple[str, str]]]:
    """Read and crop the images of a batch; another example takes the place of one that cannot be read.

    examples: [B, 3] (set, row, epoch). min_side: px, see read_image. Crops and replacements are drawn by example.
    Returns: the examples that were read; [B, 3, S, S] uint8, channels last in memory; bad images as read_or_replace.
    """
    examples, bad = np.array(examples), []
    pixels = np.empty((len(examples), image_size, image_size, 3), np.uint8)
    for first in range(0, len(examples), 16):  # a few decoded images at a time, and their boxes at once
        images = [read_or_replace(tables, examples, i, min_side, max_pixels, seed, bad)
                  for i in range(first, min(first + 16, len(examples)))]
        aspect = np.array([image.width / image.height for image in images])
        boxes = crop_boxes((crop_scale, 1), 4 / 3, aspect, seed, 2, *examples[first : first + 16].T)
        for i, (image, box) in enumerate(zip(images, boxes), first):
            box = tuple(box * (image.width, image.height, image.width, image.height))
            pixels[i] = image.resize((image_size, image_size), Image.Resampling.BICUBIC, box)
    return examples, torch.from_numpy(pixels).permute(0, 3, 1, 2), bad


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


class ClassSampler(Sampler):
    """As Sampler, but each image is drawn by class: a class with weight count ** power, then one of its images.

    labels: per set, [n] first label of each row. A row can come twice; `epoch` is the number of the draw, so that the
    crops differ.
    """

    def __init__(self, labels: list[np.ndarray], power: float, batch_size: int, seed: int, start: int, stop: int,
                 rank: int, world_size: int):
        super().__init__([], np.zeros(0), batch_size, seed, start, stop, rank, world_size)
        self.rows = np.concatenate([np.stack([np.full(len(x), s), np.arange(len(x))], 1) for s, x in enumerate(labels)])
        labels = np.concatenate(labels)
        self.rows = self.rows[np.argsort(labels, kind="stable")]  # [n, 2] set, row, by class
        self.counts = np.bincount(labels)
        self.starts = np.cumsum(self.counts) - self.counts
        law = np.cumsum(np.where(self.counts > 0, self.counts.astype(float) ** power, 0.0))
        self.law = law / law[-1]  # ends in 1 exactly, above every draw

    def batch(self, step: int) -> np.ndarray:
        """[N, 3] int64: set, row, number of the draw."""
        draws = step * self.batch_size + np.arange(self.batch_size)
        classes = np.searchsorted(self.law, uniform_hash(self.seed, 8, draws), side="right")
        places = self.starts[classes] + (uniform_hash(self.seed, 9, draws) * self.counts[classes]).astype(np.int64)
        return np.concatenate([self.rows[places], draws[:, None]], 1)


class LabelledImages(torch.utils.data.Dataset):
    """Training images of several sets with their labels; whole batches at a time, as in clip.py.

    label_sets: per set, [n, J]. is_random: one of an image's labels is drawn at each epoch. on_device: the images are
    there already, in the order of sets and rows, and only their places are given.
    """

    def __init__(self, tables: list[Table], label_sets: list[np.ndarray], is_random: bool, on_device: bool,
                 image_size: int, crop_scale: float, max_pixels: int, seed: int):
        self.tables, self.is_random, self.on_device, self.image_size = tables, is_random, on_device, image_size
        self.crop_scale, self.max_pixels, self.seed = crop_scale, max_pixels, seed
        n_labels = max(labels.shape[1] for labels in label_sets)
        padded = [np.pad(x, ((0, 0), (0, n_labels - x.shape[1])), constant_values=-1) for x in label_sets]
        self.offsets = np.cumsum([0, *map(len, padded[:-1])])
        self.labels = torch.from_numpy(np.concatenate(padded))  # a tensor: workers share it

    def __getitems__(self, examples: np.ndarray) -> dict:
        """[B, 3] (set, row, epoch) -> a batch: images or pixel_rows and boxes, labels [B, J], bad."""
        batch, bad = {}, []
        if not self.on_device:
            min_side = self.image_size / math.sqrt(0.75 * self.crop_scale)  # of the smallest crop
            examples, batch["images"], bad = read_crops(self.tables, examples, self.image_size, min_side,
                                                        self.crop_scale, self.max_pixels, self.seed)
        rows = torch.from_numpy(self.offsets[examples[:, 0]] + examples[:, 1])  # a replacement brings its own label
        if self.on_device:
            boxes = crop_boxes((self.crop_scale, 1), 4 / 3, np.ones(len(examples)), self.seed, 2, *examples.T)
            batch = {"pixel_rows": rows, "boxes": torch.from_numpy(boxes).float()}
        labels = self.labels[rows]
        if self.is_random:
            draw = torch.from_numpy(uniform_hash(self.seed, 5, *examples.T))
            labels = labels.gather(1, (draw * (labels >= 0).sum(1)).long()[:, None])
        return batch | {"labels": labels, "bad": bad}


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
def ensure_clip_pt(root: Path, device: str, flags: str) -> None:
    """Pretrain ROOT/clip.pt, text tower and class prototypes, of the built-in world; of another, say how to make it.

    flags: what needs it, for the message.
    """
    path, world, script = root / "clip.pt", root / "world.json", Path(__file__).with_name("clip.py")
    if path.is_file():
        return
    out = root / "clip_pretraining"
    is_shapes = world.is_file() and '"world": "shapes"' in world.read_text("utf-8", "replace")  # also if damaged
    if not is_shapes or not script.is_file():
        raise SystemExit(f"{flags}: {path} is not there: make it from released weights (python clip.py --eval-only "
                         f"RN50.pt --arch RN50 --root {root} --bpe bpe_simple_vocab_16e6.txt.gz --export {path}), or "
                         "pass another file")
    print(f"{path} is not there: pretraining on web (once, about 5 minutes on 2 CPU cores)", flush=True)
    try:
        with open(root / "clip.pt.lock", "w") as lock:
            with contextlib.suppress(OSError):  # a file system without locks
                fcntl.lockf(lock, fcntl.LOCK_EX)  # another run may be at it: then this one waits
            if not path.is_file():
                run_script([str(script), "--root", str(root), "--data", "web", "--steps", "2200", "--word-dropout",
                            "0", "--out", str(out), "--export", str(path), "--eval-sets", "val", "--device", device])
    except (SystemExit, OSError) as error:
        raise SystemExit(f"{path}: {error}; if what it continued is of another version, delete {out}") from None


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


# Copied from clip.py
def print_table(metrics: dict[str, dict]) -> None:
    """One aligned line a test set; accuracies in percent, - for what cannot be computed."""
    columns = {"n": "n", "top1": "top-1", "balanced": "balanced", "head": "head", "medium": "medium", "tail": "tail",
               "spearman_acc": "rho(freq,acc)", "spearman_pred": "rho(freq,pred)", "chance": "chance"}
    formats = {"n": "{}", "spearman_acc": "{:.3f}", "spearman_pred": "{:.3f}"}
    widths, first = {k: max(9, len(title) + 2) for k, title in columns.items()}, max([12, *map(len, metrics)]) + 2
    if rows := {name: m for name, m in metrics.items() if m["top1"] is not None}:
        print(f"{'test set':<{first}}" + "".join(f"{title:>{widths[k]}}" for k, title in columns.items()))
    for name, m in rows.items():
        cells = {k: "-" if m[k] is None else formats.get(k, "{:.1%}").format(m[k]) for k in columns}
        print(f"{name:<{first}}" + "".join(f"{cell:>{widths[k]}}" for k, cell in cells.items()))
    if rows := {name: m for name, m in metrics.items() if m["retrieval"]}:
        keys = next(iter(rows.values()))["retrieval"]
        print(f"{'retrieval':<{first}}{'n':>9}" + "".join(f"{key:>9}" for key in keys))
    for name, m in rows.items():
        print(f"{name:<{first}}{m['n']:>9}" + "".join(f"{100 * value:>8.1f}%" for value in m["retrieval"].values()))
    for name, m in metrics.items():
        if m.get("bad_images"):
            reasons = ", ".join(f"{n} {reason}" for reason, n in m["bad_images"].items())
            print(f"{name}: {sum(m['bad_images'].values())} images left out, they cannot be read ({reasons})")


@torch.no_grad()
def evaluate_classifier(model: Classifier, classes: list[dict[str, str]], class_counts: np.ndarray, trimmed: np.ndarray,
                        test_sets: dict[str, Table], workers: int, max_pixels: int, device: torch.device,
                        npz_folder: Path | None = None) -> dict[str, dict]:
    """Accuracy and imbalance metrics of labelled test sets. All ranks.

    trimmed: ids of the classes that --trim-tail cut; their mean accuracy and that of the others are reported apart.
    npz_folder: where the first process writes <set>.npz; `rows` says which rows are in it. Returns: {set: metrics}.
    """
    if dist.is_initialized():
        for buffer in model.buffers():  # with --bn local each process has its own statistics
            dist.broadcast(buffer, 0)  # All ranks
    model.eval()
    prototypes, metrics = F.normalize(model.prototypes.float(), dim=1), {}
    for name, table in test_sets.items():
        embed, readable, bad = encode_images(model, table, workers, max_pixels, device)
        labels = read_label_sets(table, classes)[:, 0]
        rows = np.flatnonzero(readable)
        embed, labels = embed[torch.from_numpy(rows).to(device)], labels[rows]
        if not bool(embed.isfinite().all()):
            raise SystemExit(f"{name}: the image features are not finite: the model has diverged")
        with exact_matmul():
            logits = (model.logit_scale.exp() * F.normalize(embed, dim=1) @ prototypes.T).cpu()
        metrics[name] = dict.fromkeys(("n", "top1", "balanced", "head", "medium", "tail", "spearman_acc",
                                       "spearman_pred", "chance", "retrieval", "knn", "probe"))
        metrics[name] |= {"n": len(rows), "bad_images": dict(bad)}
        predictions, labelled = logits.argmax(1).numpy(), labels >= 0
        if labelled.any():
            metrics[name] |= imbalance_metrics(predictions[labelled], labels[labelled], class_counts)
        if len(trimmed):
            is_trimmed = np.isin(labels, trimmed)
            for key, part in ("trimmed", is_trimmed), ("untrimmed", labelled & ~is_trimmed):
                of_part = imbalance_metrics(predictions[part], labels[part], class_counts) if part.any() else {}
                metrics[name][key] = of_part.get("balanced")
        if npz_folder is not None and (not dist.is_initialized() or dist.get_rank() == 0):
            arrays = {"logits": logits.numpy().astype(np.float16), "predictions": predictions,
                      "features": embed.cpu().numpy().astype(np.float16), "labels": labels, "rows": rows,
                      "class_counts": class_counts, "class_names": np.array([row["name"] for row in classes], str),
                      "prototypes": prototypes.cpu().numpy().astype(np.float16)}
            write_atomically(npz_folder / f"{name}.npz", lambda file, arrays=arrays: np.savez(file, **arrays))
    model.train()
    return metrics


# ------------------------------------------------------------------------------ train

# Flags that do not change what is computed: a run may be continued with others.
RUN_FLAGS = {"out", "resume", "eval_only", "eval_sets", "device", "compile", "workers", "log_every", "save_every",
             "eval_every", "tensorboard", "wandb", "max_bad"}


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


def read_labelled_sets(args: argparse.Namespace, root: Path, classes: list[dict[str, str]]
                       ) -> tuple[list[Table], list[np.ndarray], np.ndarray, np.ndarray, np.ndarray, str]:
    """Tables with the rows that are trained on, their labels [n, J], the sets' shares, class counts, trimmed classes.

    Also a sentence on the rows left out. Counts are those of the labels (an image with k labels counts
    1 / k for each), weighted by the sets' shares.
    """
    if not classes:
        raise SystemExit(f"{root}/classes.tsv is missing or has no classes: a classifier needs their names, one a row "
                         "below the header name")
    paths, weights = find_sets(args.data, root)
    tables, label_sets, lost = [Table(path) for path in paths], [], Counter()
    for table in tables:
        if "label" not in table.columns:
            raise SystemExit(f"{table.path}: no column label; it has {', '.join(table.columns)}")
        labels = read_label_sets(table, classes)
        n_labels = (labels >= 0).sum(1)
        keep = n_labels == 1 if args.multi_label == "drop" else n_labels > 0
        lost["without a label"] += int((n_labels == 0).sum())
        lost["with several labels"] += int((~keep & (n_labels > 0)).sum())
        labels = labels[keep, :1] if args.multi_label in ("first", "drop") else labels[keep]
        table.starts = table.starts[torch.from_numpy(keep)]
        label_sets.append(labels)
    trimmed = np.zeros(0, np.int64)
    if args.trim_tail >= len(classes):
        raise SystemExit(f"--trim-tail {args.trim_tail} must be less than the {len(classes)} classes")
    if args.trim_tail:
        first = np.concatenate([labels[:, 0] for labels in label_sets])
        counts = sum(np.bincount(x[:, 0], minlength=len(classes)) * (1 if w is None else w / max(1, len(x)))
                     for x, w in zip(label_sets, weights))
        keep, trimmed = trim_tail(first, counts, args.trim_tail, args.trim_shots, args.seed)
        lost["trimmed from the tail"] = int((~keep).sum())
        n_few = int((np.bincount(first, minlength=len(classes))[trimmed] <= args.trim_shots).sum())
        for s, part in enumerate(np.split(keep, np.cumsum([len(labels) for labels in label_sets])[:-1])):
            tables[s].starts, label_sets[s] = tables[s].starts[torch.from_numpy(part)], label_sets[s][part]
    for table in tables:
        if not len(table):
            raise SystemExit(f"{table.path}: no row with a label is left")
    shares = np.array([len(table) if weight is None else weight for weight, table in zip(weights, tables)], float)
    shares /= shares.sum()
    n, class_counts = sum(map(len, tables)), np.zeros(len(classes))
    for labels, share in zip(label_sets, shares):
        is_label = labels >= 0
        part = (is_label / is_label.sum(1, keepdims=True))[is_label]
        class_counts += np.bincount(labels[is_label], part, len(classes)) * share * n / len(labels)
    class_counts = np.where(class_counts > 0, np.rint(class_counts).clip(1), 0).astype(np.int64)
    left_out = ", ".join(f"{number:,} {reason}" for reason, number in lost.items() if number) or "none"
    if args.trim_tail and n_few:
        left_out += f"; {n_few} of the trimmed classes had no more than {args.trim_shots} images anyway"
    return tables, label_sets, shares, class_counts, trimmed, f"rows left out: {left_out}"


def checkpoint_of_classifier(model: Classifier, classes: list[dict[str, str]], class_counts: np.ndarray,
                             trimmed: np.ndarray, args: argparse.Namespace, step: int) -> dict:
    """What a checkpoint holds, in tensors and builtins."""
    return {
        "state_dict": {name: tensor.detach().cpu().contiguous() for name, tensor in model.state_dict().items()},
        "args": vars(args), "step": step, "arch": model.arch, "pixels": model.pixels,
        "prototypes": F.normalize(model.prototypes.detach().float(), dim=1).cpu(),  # [C, D]
        "class_names": [row["name"] for row in classes],
        "class_counts": torch.from_numpy(class_counts), "trimmed": torch.from_numpy(trimmed),
    }


def report_classifier(model: Classifier, classes: list[dict[str, str]], class_counts: np.ndarray, trimmed: np.ndarray,
                      test_sets: dict[str, Table], args: argparse.Namespace, step: int, seconds: float, rank: int,
                      device: torch.device, precision: str) -> None:
    """Evaluate, write metrics.json and <set>.npz, print the table. All ranks."""
    out = Path(args.out)
    metrics = evaluate_classifier(model, classes, class_counts, trimmed, test_sets, args.workers, args.max_pixels,
                                  device, out)
    run = {"script": Path(__file__).name, "step": step, "seconds": round(seconds, 1), "data": args.data,
           "seed": args.seed, "precision": precision, "versions": versions()}
    on_one_rank(rank, lambda: write_json(out / "metrics.json", metrics | {"run": run}))
    if rank:
        return
    print_table(metrics)
    if len(trimmed):
        for name, m in metrics.items():
            parts = [f"{m[key]:.1%}" if m[key] is not None else "-" for key in ("trimmed", "untrimmed")]
            print(f"{name}: accuracy of the {len(trimmed)} trimmed classes {parts[0]}, of the others {parts[1]}")
    for name in [name for name, m in metrics.items() if m["n"] and m["top1"] is None]:
        print(f"{name}: not scored: no labels")
    if not test_sets:
        print("no test sets: put val.tsv into the root or pass --eval-sets")
    print(f"metrics: {out / 'metrics.json'}", flush=True)


def evaluate_file(args: argparse.Namespace, root: Path, rank: int, device: torch.device) -> None:
    """--eval-only: the classes and their counts are those the checkpoint was trained with."""
    loaded = load_weights(args.eval_only)
    needed = {"arch", "args", "class_counts", "class_names", "trimmed", "step"}
    missing = sorted(needed - loaded.keys()) + ["prototypes"] * ("prototypes" not in loaded["state_dict"])
    pixels = loaded.get("pixels", "clip")
    if missing or loaded["arch"] not in TOWERS or pixels not in PIXELS:
        raise SystemExit(f"{args.eval_only} is no checkpoint of this script: " + (
            f"no {' or '.join(missing)} in it" if missing else
            f"it has the tower {loaded['arch']!r} and the pixel statistics {pixels!r}"))
    class_counts, n = loaded["class_counts"].numpy(), len(loaded["state_dict"]["prototypes"])
    if n != len(loaded["class_names"]):
        raise SystemExit(f"{args.eval_only}: {n} prototypes for {len(loaded['class_names'])} class names")
    if len(class_counts) != len(loaded["class_names"]) or (class_counts < 0).any():
        raise SystemExit(f"{args.eval_only}: its class_counts must be {len(loaded['class_names'])} numbers of at least "
                         f"0, they are {len(class_counts)}, the least {class_counts.min(initial=0)}")
    classes = read_classes(root) or [{"name": name} for name in loaded["class_names"]]
    class_names = [row["name"] for row in classes]
    if class_names != loaded["class_names"]:
        what = "another order of the" if sorted(class_names) == sorted(loaded["class_names"]) else "other"
        raise SystemExit(f"{args.eval_only} was trained with {what} classes ({len(loaded['class_names'])}) than "
                         f"{root}/classes.tsv has ({len(class_names)})")
    model = Classifier(loaded["arch"], len(class_names), loaded["state_dict"]["prototypes"], True)
    load_state(model, loaded["state_dict"], args.eval_only)
    model.use_pixels(pixels)
    args.data, args.seed = loaded["args"]["data"], loaded["args"]["seed"]
    report_classifier(model.to(device), classes, class_counts, loaded["trimmed"].numpy(),
                      find_test_sets(args.eval_sets, root), args, loaded["step"], 0.0, rank, device, "fp32")


# Copied from clip.py
def root_of(root: str, data: str | None) -> Path:
    """Folder of the world: --root; if that is auto, of the first TSV of --data, else the built-in world's."""
    files = [part.strip() for part in (data or "").split(",") if re.search(r"\.tsv(:[\d.]+)?$", part.strip())]
    return Path(root) if root != "auto" else Path(files[0]).parent if files else Path(SHAPES_ROOT)


def main(args: argparse.Namespace) -> None:
    # --- setup
    rank, world_size, device, control = setup_distributed(args.device)
    is_main, out = rank == 0, Path(args.out)
    precision, reason = pick_precision(args.precision, device)
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[precision]
    autocast = functools.partial(torch.autocast, device.type, dtype, enabled=precision != "fp32")
    torch.manual_seed(args.seed)  # the same on all processes, so they start from the same weights

    # --- data
    if args.eval_only and args.root == "auto" and ".tsv" not in args.data:  # the world that it was trained in
        made_with = load_weights(args.eval_only).get("args")
        if isinstance(made_with, dict):
            args.root, args.data = made_with.get("root", "auto"), made_with.get("data", args.data)
    root = root_of(args.root, args.data)
    on_one_rank(rank, lambda: ensure_shapes(root))
    if args.eval_only:
        evaluate_file(args, root, rank, device)
        return
    classes, test_sets = read_classes(root), find_test_sets(args.eval_sets, root)
    class_names = [row["name"] for row in classes]
    tables, label_sets, shares, class_counts, trimmed, left_out = read_labelled_sets(args, root, classes)
    for table in test_sets.values():  # what is wrong with them is told before training, not after it
        read_label_sets(table, classes)
        load_pixels([table])
    C, sizes, counts = len(class_names), [len(table) for table in tables], torch.from_numpy(class_counts)
    has_vocab = 0 < args.vocab < C
    draws = draws_of(counts, args.vocab, args.vocab_power) if has_vocab else None
    if is_main:
        print(describe(root, tables, shares, class_names, class_counts), left_out, sep="\n")
        print(f"precision {precision} ({reason}), {device}, {world_size} process{'es' * (world_size > 1)}", flush=True)
    if args.batch_size % world_size or sum(sizes) < args.batch_size:
        raise SystemExit(f"--batch-size {args.batch_size} must split into {world_size} processes and not be larger "
                         f"than the {sum(sizes)} rows of --data {args.data}")
    pixels = load_pixels(tables, TOWERS[args.arch]["image_size"])  # [rows of all sets, H, W, 3] uint8, or None
    inputs = checksums(tables, root / "classes.tsv")
    checkpoint = find_checkpoint(args, RUN_FLAGS, inputs, control)

    # --- model
    head_init = str(root / "clip.pt") if args.head_init == "auto" else args.head_init
    if args.head != "learned" and args.head_init == "auto":
        on_one_rank(rank, lambda: ensure_clip_pt(root, args.device, "--head frozen and finetune"))
    prototypes = None if args.head == "learned" else read_prototypes(head_init, class_names)
    if args.arch == "dino-ViT-S-16" and prototypes is not None and prototypes.shape[1] != 384:
        raise SystemExit(f"--head-init has vectors of width {prototypes.shape[1]}, --arch {args.arch} features of 384")
    model = Classifier(args.arch, C, prototypes, args.head == "frozen")
    fresh = load_tower(model, args.init) if args.init else ""
    if args.freeze_backbone and args.head == "frozen" and not fresh:
        raise SystemExit("--freeze-backbone with --head frozen leaves nothing to train")
    model.to(device)
    if args.arch in ("tiny", "RN50", "resnet50"):
        model.visual.to(memory_format=torch.channels_last)
    model.visual.requires_grad_(not args.freeze_backbone)
    if fresh:
        getattr(model.visual, fresh).requires_grad_()  # a part of the head: random if it were frozen
    for module in model.modules():
        if isinstance(module, BatchNorm2d):
            module.sync = args.bn == "sync"
    if args.compile:
        model.visual.compile()
    net = wrap_ddp(model, device, world_size)
    power = {"instance": 1.0, "sqrt": 0.5, "class": 0.0}[args.sampler]
    adjustment = adjustment_of(args.loss, args.tau, torch.where(counts > 0, counts.double() ** power, 0))
    adjustment = None if adjustment is None else adjustment.to(device)

    # --- optimizer
    steps = math.ceil(args.epochs * sum(sizes) / args.batch_size) if args.epochs else args.steps
    peak_lr = args.lr or (3e-3 if args.arch == "tiny" else 1e-3)
    if args.optimizer == "sgd":
        peak_lr = args.lr or 0.1 * args.batch_size / 256  # the paper's appendix C
    optimizer = make_optimizer(args.optimizer, param_groups(model, args.weight_decay), peak_lr)
    params = [p for group in optimizer.param_groups for p in group["params"]]
    scaler = torch.amp.GradScaler(device.type, enabled=precision == "fp16")

    # --- resume
    start, seconds_before, started = 0, 0.0, time.time()
    if checkpoint:
        theirs = checkpoint["state_dict"]["prototypes"]
        if theirs.shape != model.prototypes.shape or args.head == "frozen" and not torch.equal(theirs, prototypes):
            raise SystemExit(f"{checkpoint['path']} was made with other class vectors than {head_init} has now: pass "
                             "another --out, or --resume off to replace it")
        load_state(model, checkpoint["state_dict"], checkpoint["path"])
        model.use_pixels(checkpoint["pixels"])
        model.to(device)
        start, seconds_before = restore(checkpoint, optimizer, scaler, device)

    # --- loader
    held = []  # by name until the end, and with it the lock
    on_one_rank(rank, lambda: held.append(lock_folder(out)))
    dataset = LabelledImages(tables, label_sets, args.multi_label == "random", pixels is not None, model.image_size,
                             args.crop_scale, args.max_pixels, args.seed)
    if pixels is not None:
        pixels = pixels.to(device)
    workers = args.workers if args.workers >= 0 else default_workers() if pixels is None else 1
    if args.sampler == "instance":
        sampler = Sampler(sizes, shares, args.batch_size, args.seed, start, steps, rank, world_size)
    else:
        first = [labels[:, 0] for labels in label_sets]
        sampler = ClassSampler(first, power, args.batch_size, args.seed, start, steps, rank, world_size)
    loader = torch.utils.data.DataLoader(dataset, batch_sampler=sampler, collate_fn=dict,
                                         pin_memory=device.type == "cuda", **worker_setup(workers))

    # --- log
    if is_main:
        chance = f"about ln({args.vocab}) = {math.log(args.vocab):.3f}" if has_vocab else f"ln({C}) = {math.log(C):.3f}"
        print(f"{sum(p.numel() for p in model.parameters()) / 1e6:.2f} M parameters, {steps} steps of "
              f"{args.batch_size} images, chance loss {chance}"
              + (f", continued from step {start}" if start else ""), flush=True)
    log, stop_signals = RunLog(checkpoint, args, sum(sizes), inputs, device, control), []
    signal.signal(signal.SIGTERM, lambda number, frame: stop_signals.append(number))

    # --- loop
    model.train()
    if args.freeze_backbone:
        model.visual.eval()
    B, group_size = args.batch_size // world_size, args.vocab_group or args.batch_size
    vocab_sizes, has_warned = np.zeros(3), False
    running = [buffer for name, buffer in model.named_buffers() if "running_" in name]
    progress = tqdm(total=steps, initial=start, disable=not (is_main and sys.stderr.isatty()), unit="step")
    for step, batch in enumerate(loader, start):
        lr = lr_at(step, peak_lr, args.warmup_steps, steps)
        for group in optimizer.param_groups:
            group["lr"] = lr
        vocab, labels = None, batch["labels"]
        if has_vocab:
            all_labels = labels.repeat(world_size, 1)  # [N, J]
            if world_size > 1:
                dist.all_gather(list(all_labels.chunk(world_size)), labels, group=control)  # All ranks
            vocab, counted = vocab_of_batch(all_labels, rank * B, B, group_size, draws, args.seed, step)
            vocab_sizes += counted
            if vocab.ids is not None:  # labels as columns of the union
                labels = torch.searchsorted(vocab.ids, labels).masked_fill(labels < 0, -1)
            vocab = Vocab(*(x if x is None else x.to(device, non_blocking=True) for x in vocab))
        labels = labels.to(device, non_blocking=True)
        if pixels is None:
            images = batch["images"].to(device, non_blocking=True)
        else:
            rows, boxes = (batch[name].to(device, non_blocking=True) for name in ("pixel_rows", "boxes"))
            images = crop_pixels(pixels.index_select(0, rows), boxes, model.image_size)
        kept = [buffer.clone() for buffer in running]
        with autocast():
            features, class_vectors, scale = net(images)
        logits = vocab_logits(features, class_vectors, scale, vocab, adjustment, args.loss == "log-q")
        loss = cross_entropy(logits, labels, args.label_smoothing, 2.0 if args.loss == "focal" else 0.0)
        scaler.scale(loss).backward()

        is_log_step = (step + 1) % args.log_every == 0 or step + 1 == steps
        scaler.unscale_(optimizer)
        grad_norm = nn.utils.get_total_norm([p.grad for p in params if p.grad is not None])
        if args.clip_grad:
            nn.utils.clip_grads_with_norm_(params, args.clip_grad, grad_norm)
        is_taken = grad_norm.isfinite()  # equal on all ranks
        for buffer, before in zip(running, kept):  # a step that is left out leaves no trace in batch norm either
            torch.where(is_taken, buffer, before, out=buffer)
        if precision != "fp16":  # as GradScaler has a fused optimizer leave a step out, on the device
            optimizer.found_inf = (~is_taken).float()
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad(set_to_none=True)
        with torch.no_grad():
            model.logit_scale.clamp_(0, math.log(100))  # CLIP section 2.5
        log.count(step, {"loss": loss, "image_features": features}, is_taken, batch["bad"], is_log_step)
        progress.update()

        if is_log_step:
            numbers = {"lr": lr, "logit_scale": float(model.logit_scale.detach().exp()), "grad_norm": float(grad_norm)}
            if has_vocab:
                size, n_drawn, n_groups = (total(x, control) for x in vocab_sizes)
                numbers |= {"vocab": round(size / n_groups, 2), "drawn": round(n_drawn / size, 4)}
                if is_main and not has_warned and size != args.vocab * n_groups:
                    has_warned = True
                    reason = (f"less than what some of the groups of {group_size} images hold"
                              if size > args.vocab * n_groups else "more than the classes that can be drawn")
                    print(f"--vocab {args.vocab} is {reason}: the vocabularies have {size / n_groups:.1f} classes, "
                          f"{n_drawn / size:.1%} of them drawn")
                vocab_sizes[:] = 0
            log.report(step, **numbers)
        if args.eval_every and (step + 1) % args.eval_every == 0 and step + 1 < steps:
            paused_at = time.time()
            metrics = evaluate_classifier(model, classes, class_counts, trimmed, test_sets, args.workers,
                                          args.max_pixels, device)
            log.write({"step": step + 1, **metrics})
            if is_main:
                print_table(metrics)
            if args.freeze_backbone:
                model.visual.eval()
            log.logged_at += time.time() - paused_at  # images_per_s is that of training
        is_stopped = total(len(stop_signals), control)
        if is_stopped or step + 1 == steps or (args.save_every and (step + 1) % args.save_every == 0):
            checkpoint = checkpoint_of_classifier(model, classes, class_counts, trimmed, args, step + 1)
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
    report_classifier(model, classes, class_counts, trimmed, test_sets, args, steps,
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
