# /// script
# requires-python = ">=3.10"
# dependencies = ["torch>=2.6", "torchvision>=0.21", "numpy>=1.26", "scipy>=1.11", "pillow>=10.1", "tqdm>=4.66"]
# ///
"""CLIP: an image tower and a text tower learn to find each other's pair among the pairs of a batch.

Paper: Radford et al., arXiv 2103.00020, section 2. The study this file serves is Wen et al., arXiv 2405.21070: a batch
is a small vocabulary drawn anew at every step, which makes CLIP far less biased by long tails than supervised learning.

    python clip.py                                           # the built-in shapes world, 1 to 6 minutes on 2 CPU cores
    torchrun clip.py --data laionet --text-head frozen --out runs/frozen      # towards a frozen text tower
    torchrun --nproc-per-node 2 clip.py --data laionet:2,incaps:1 --caption "{title} {tags}" --out runs/mix
    python clip.py --data my_pairs.tsv --arch RN50 --batch-size 1024 --epochs 32 --out runs/mine   # one's own pairs
    python clip.py --eval-only runs/clip/checkpoint.pt --eval-sets val.tsv sketch.tsv --out runs/again

RN50 keeps some 90 MB an image for its gradient in fp32: --accumulate 64 takes 1,024 pairs in chunks of 16.

Released weights (ours, open_clip's, OpenAI's) become the clip.pt of a world; others than ours need --arch, and
open_clip's --activation:
    python clip.py --eval-only RN50.pt --arch RN50 --root ROOT --bpe bpe_simple_vocab_16e6.txt.gz --export ROOT/clip.pt
The paper's recipe (RN50, 32 epochs of ImageNet-Captions) adds these flags to --root ROOT --data incaps --arch RN50:
    --batch-size 1024 --epochs 32 --lr 1e-3 --weight-decay 0.2 --beta2 0.999 --warmup-steps 500 --precision fp16
    --bpe bpe_simple_vocab_16e6.txt.gz --templates openai_templates.txt   (CLIP's 80 prompts, {} for the name)

A data set is a TSV (columns image, label, caption, any others); an image is `photos/1.jpg`, `00000.tar:512:34567`
(offset and size in an uncompressed tar) or `val.npy:17` (row of a uint8 array); `build_datasets.py index` writes such
files. Written to --out: args.json (flags, versions, CRCs of tables), log.jsonl, lock, checkpoint.pt, metrics.json and
<set>.npz for each test set; with a frozen text tower also text_features.npy, if the captions' embeddings are many.

Dimension key: B pairs of this process, N = B * world_size pairs of the step, D embedding width, L tokens, P image
tokens, C classes, H heads. Features are unit vectors unless called *_embed, but for those in <set>.npz and a loader's.

Expected on the default world: val top-1 0.78 to 0.82, Spearman(frequency, predictions) near 0 (README).

Deviations from the paper and its code:
 1. Gathered features carry gradients between processes: encoders get the one-process gradient (theirs: 1 / processes).
 2. Texts are cut to the longest of the batch: exact, since the text transformer is causal and pooled at the end token.
 3. Gradient accumulation is GradCache (arXiv 2101.06983) with replayed random states: the exact full-batch gradient,
    except that batch norm sees chunks.
 4. A frozen text tower embeds each distinct caption once, before training, and is not run again.
 5. The tokenizer leaves out `ftfy` (repairs mis-decoded text); ids differ from CLIP's on such texts only.
 6. A broken image is replaced by another pair and counted, up to --max-bad.
 7. Templates of --caption @FILE are drawn per example and epoch, not once per image.
 8. A class name stands in a caption only where --caption says {class}; theirs stood before every natural caption.
 9. The activation is stored with the weights and compared: theirs ran QuickGELU weights with GELU in two figures. A
    frozen text tower of OpenAI's has QuickGELU, a new one GELU, as theirs, unless --activation quick_gelu is given.
10. --text-embeddings trains the projection on fixed vectors; theirs kept the language model's dropout on.
11. The defaults are shared with sl_vocab_subsample.py. Their CLIP and supervised runs differed in optimiser, updates,
    epochs, batch norm, weight decay, precision and evaluation too.
12. Everything that is drawn depends on --seed; their figures are single runs, the supervised ones without a seed.
13. What an epoch leaves over begins the next batch, which may so hold an image twice; theirs dropped it.
14. On 32 px images (not in the paper): a bag-of-words text tower with one hidden layer, half of the words of a caption
    left out at random (--word-dropout), a short list of prompts, square .npy images cropped bilinearly on the device.
"""

import argparse
import contextlib
import ctypes
import dataclasses
import datetime
import fcntl
import functools
import gzip
import hashlib
import heapq
import html
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
import unicodedata
import warnings
import zipfile
import zlib
from collections import Counter, OrderedDict, defaultdict
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

# ------------------------------------------------------------------------------ flags

SHAPES_ROOT = "data/shapes"  # rendered by build_datasets.py on first use
TEST_SETS = ("val", "v2", "sketch", "rendition", "objectnet", "adversarial")


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """Flags of clip.py; wrong combinations end here."""
    parser = argparse.ArgumentParser(usage="%(prog)s [FLAGS]; --help lists them", description=__doc__.split("\n")[0],
                                     formatter_class=argparse.ArgumentDefaultsHelpFormatter, allow_abbrev=False)
    data = parser.add_argument_group("data")
    data.add_argument("--root", default="auto",
                      help=f"folder of the world: classes.tsv, test sets, SET/train.tsv, clip.pt; auto is "
                           f"{SHAPES_ROOT}, or the folder of the first --data file")
    data.add_argument("--data", default="laionet",
                      help="training sets: NAME (ROOT/NAME/train.tsv) or FILE.tsv, mixed as A:2,B:1; without weights "
                           "each set counts by its size")
    data.add_argument("--caption", default="{caption}",
                      help="text of an example from {column}, {class} and {synonym}, or @FILE with one such template a "
                           "line, drawn per example and epoch")
    data.add_argument("--word-dropout", type=float, default=-1,
                      help="probability of leaving out each word of a caption, drawn anew every epoch; keeps small "
                           "sets with long captions from being memorised; -1 is 0.5 for tiny with a trained text "
                           "tower, else 0")
    data.add_argument("--crop-scale", type=float, default=0.9,
                      help="smallest area of the random crop, as a fraction of the image; 1: no random crop but the "
                           "largest centred one with an aspect from 3/4 to 4/3")
    data.add_argument("--bpe", default="auto",
                      help="byte-pair merges in CLIP's file format (.txt or .gz); auto: those of the loaded weights, "
                           "else ROOT/bpe.txt, else learned from the captions")
    data.add_argument("--templates", default="auto",
                      help="prompts of the zero-shot classifier, one a line with {} for the class name; auto is a "
                           "short built-in list")
    data.add_argument("--eval-sets", nargs="*", default=["auto"],
                      help=f"test sets: names in ROOT or TSV files; auto takes those of {', '.join(TEST_SETS)} that "
                           "ROOT has")
    data.add_argument("--max-bad", type=float, default=0.01,
                      help="end the run when more than this fraction of the images read so far, or of 1,000 if these "
                           "are fewer, cannot be read")
    data.add_argument("--max-pixels", type=int, default=89_478_485,
                      help="refuse images whose header announces more pixels than this")

    model = parser.add_argument_group("model")
    model.add_argument("--arch", default="tiny", choices=["tiny", "RN50", "ViT-B-32", "ViT-B-16", "ViT-S-16"],
                       help="image tower; tiny is a small residual net for 32 px images")
    model.add_argument("--text-arch", default="auto", choices=["auto", "cbow", "transformer"],
                       help="text tower; auto is cbow for tiny, else transformer")
    model.add_argument("--activation", default="auto", choices=["auto", "gelu", "quick_gelu"],
                       help="of the transformers; auto: as in the loaded weights, else gelu (OpenAI's weights need "
                            "quick_gelu)")
    model.add_argument("--init", default="",
                       help="checkpoint to start from: in clip.py the whole model, elsewhere the image tower")
    model.add_argument("--text-head", default="scratch", choices=["scratch", "frozen", "finetune"],
                       help="text tower: trained from a random start, fixed to --text-init, or trained from it")
    model.add_argument("--text-init", default="auto",
                       help="checkpoint whose text tower is used by frozen and finetune; auto is ROOT/clip.pt")
    model.add_argument("--text-embeddings", nargs="+", default=[], metavar="NPY",
                       help="TRAIN.npy [CLASSES.npy]: caption embeddings of any language model, a row for each row of "
                            "the one --data set, and of the class prompts; with --text-head frozen; a two-layer "
                            "projection is trained on them")

    method = parser.add_argument_group("method")
    method.add_argument("--dup-captions", default="keep", choices=["keep", "mask", "soft"],
                        help="other pairs of the batch with the same caption: negatives (the paper), left out, or "
                             "further positives")
    method.add_argument("--directions", default="both", choices=["both", "image", "text"],
                        help="what is classified: images among the texts of the batch, texts among its images, or both "
                             "(the paper); a liking for a class as such cancels among images")
    method.add_argument("--accumulate", type=int, default=1,
                        help="split each process's part of the batch into this many chunks (GradCache); the loss is "
                             "still over the whole batch")
    method.add_argument("--bn", default="sync", choices=["sync", "local"],
                        help="batch norm statistics over all processes or over each one's own part")

    optimization = parser.add_argument_group("optimization")
    optimization.add_argument("--steps", type=int, default=1600,
                              help="optimiser steps; --epochs takes its place when given")
    optimization.add_argument("--epochs", type=float, default=0, help="passes over the data; 0 leaves it to --steps")
    optimization.add_argument("--batch-size", type=int, default=128, help="examples of a step over all processes")
    optimization.add_argument("--lr", type=float, default=0,
                              help="peak learning rate; 0 is what suits tower and optimiser (tiny with AdamW: 3e-3)")
    optimization.add_argument("--weight-decay", type=float, default=0.1,
                              help="on matrices only: not on gains, biases and scales")
    optimization.add_argument("--beta2", type=float, default=0.98,
                              help="second AdamW beta; the paper's runs used 0.999")
    optimization.add_argument("--warmup-steps", type=int, default=50,
                              help="steps of linear warm-up, before the cosine to 0")
    optimization.add_argument("--clip-grad", type=float, default=0.0, help="largest gradient norm; 0 is off")

    run = parser.add_argument_group("run")
    run.add_argument("--out", default="runs/clip",
                     help="folder for log, checkpoint, metrics and predictions; --eval-only has runs/eval for this one")
    run.add_argument("--resume", default="auto",
                     help="auto continues OUT/checkpoint.pt if there is one, off starts over (that one becomes "
                          "checkpoint.old.pt), or a checkpoint to continue")
    run.add_argument("--export", default="",
                     help="also write the final model, without optimiser state, to this file: with the class "
                          "prototypes of clip.py a ROOT/clip.pt, of dino_laionet.py a backbone for --init")
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
    if args.text_embeddings and args.text_head != "frozen":
        parser.error("--text-embeddings holds fixed embeddings: it needs --text-head frozen")
    if args.text_init != "auto" and (args.text_head == "scratch" or args.init or args.text_embeddings):
        parser.error("--text-init is read by --text-head frozen and finetune, without --init and --text-embeddings")
    if args.text_embeddings and (len(args.text_embeddings) > 2 or args.data.count(",") or args.caption != "{caption}"):
        parser.error("--text-embeddings takes TRAIN.npy and perhaps CLASSES.npy, and one --data set with its own "
                     "captions")
    if args.text_embeddings and (args.bpe, args.text_arch) != ("auto", "auto"):
        parser.error("--bpe and --text-arch are of a text tower, which --text-embeddings takes the place of")
    if args.word_dropout > 0 and args.text_head == "frozen":
        parser.error("--word-dropout changes captions at every epoch, --text-head frozen embeds each caption once: "
                     "choose one")
    if not (0 <= args.word_dropout < 1 or args.word_dropout == -1) or not 0 < args.crop_scale <= 1:
        parser.error("--word-dropout must be in [0, 1), or -1, and --crop-scale in (0, 1]")
    if not 0 <= args.beta2 < 1:
        parser.error(f"--beta2 must be in [0, 1), got {args.beta2}")
    for flag in ("batch_size", "accumulate", "log_every", "max_pixels"):
        if not getattr(args, flag) >= 1:
            parser.error(f"--{flag.replace('_', '-')} must be at least 1, got {getattr(args, flag)}")
    for flag in ("seed", "steps", "epochs", "lr", "weight_decay", "warmup_steps", "clip_grad", "save_every",
                 "eval_every", "max_bad"):
        if not 0 <= getattr(args, flag) < 2**32:  # numpy's seeds; NaN is not
            parser.error(f"--{flag.replace('_', '-')} must be at least 0 and below 2**32, got {getattr(args, flag)}")
    return args


if __name__ == "__main__":
    ARGS = parse_args()  # before the heavy imports: --help and a mistyped flag are answered at once
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")  # torch reads it once: huge pages for large CPU tensors

import numpy as np  # noqa: E402
import torch  # noqa: E402
import torch.distributed as dist  # noqa: E402
import torch.nn as nn  # noqa: E402
import torch.nn.functional as F  # noqa: E402
from PIL import Image, ImageOps  # noqa: E402
from scipy.stats import spearmanr  # noqa: E402
from torch.nn.parallel import DistributedDataParallel  # noqa: E402
from tqdm import tqdm  # noqa: E402

# ------------------------------------------------------------------------------ method


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


def gather_rows(rows: torch.Tensor) -> torch.Tensor:
    """[B, ...] of each process -> [N, ...] in rank order, differentiable; the input itself for one process."""
    return GatherRows.apply(rows) if dist.is_initialized() and dist.get_world_size() > 1 else rows


@contextlib.contextmanager
def exact_matmul() -> Iterator[None]:
    """Matrix products of the forward pass in full fp32: TF32 rounds logits near 100 to steps of 0.06."""
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = False
    try:
        yield
    finally:
        torch.backends.cuda.matmul.allow_tf32 = before


def info_nce(image_features: torch.Tensor, text_features: torch.Tensor, scale: torch.Tensor,
             caption_ids: torch.Tensor | None = None, dup_captions: str = "keep",
             directions: str = "both") -> torch.Tensor:
    """Symmetric cross-entropy over matching pairs (InfoNCE), over the batch of all processes.

    image_features, text_features: [B, D] float32, unit norm; row i of both is one pair.
    scale: scalar tensor, 1 / temperature, already exponentiated, in [1, 100].
    caption_ids: [B] int64, equal for equal captions; needed by mask and soft.
    dup_captions: equal captions of other pairs are negatives (keep), left out (mask), or share the target (soft).
    directions: each image among the texts (image), each text among the images (text), or the mean of the two (both).
    Returns: scalar, nats; mean over this process's B rows against all N columns. The mean over
        processes is the loss of one process with the whole batch, and so are its gradients (tests/test_clip_train.py).
    Source: CLIP section 2.3, figure 3; masks as in the few-shot code of GLA, arXiv 2310.08106.
    """
    B = len(image_features)
    pairs = gather_rows(torch.stack([image_features, text_features], 1))  # [N, 2, D]: one collective for both
    with exact_matmul():
        logits_per_image = scale * image_features @ pairs[:, 1].T  # [B, N]
        logits_per_text = scale * text_features @ pairs[:, 0].T  # [B, N]
    first = B * dist.get_rank() if dist.is_initialized() else 0
    targets = torch.arange(first, first + B, device=image_features.device)  # [B] column of the own pair
    if dup_captions != "keep":
        same = caption_ids[:, None] == gather_rows(caption_ids)[None]  # [B, N]
        if dup_captions == "mask":
            others = same.scatter(1, targets[:, None], False)  # the own pair is never left out: no row gets empty
            logits_per_image = logits_per_image.masked_fill(others, -torch.inf)
            logits_per_text = logits_per_text.masked_fill(others, -torch.inf)
        else:
            targets = same.to(scale.dtype) / same.sum(1, keepdim=True)  # [B, N] probabilities
    losses = {"image": F.cross_entropy(logits_per_image, targets), "text": F.cross_entropy(logits_per_text, targets)}
    return losses.get(directions, (losses["image"] + losses["text"]) / 2)


def backward_in_chunks(net: nn.Module, images: torch.Tensor, texts: torch.Tensor,
                       loss_of: Callable[..., torch.Tensor], n_chunks: int,
                       autocast: Callable[[], contextlib.AbstractContextManager],
                       grad_scale: Callable[[torch.Tensor], torch.Tensor]) -> tuple[torch.Tensor, ...]:
    """Backward pass of a loss over the whole batch with the activations of one chunk at a time (GradCache).

    net: (images, texts) -> image_features, text_features [., D], scale; may be wrapped in DDP.
    images, texts: [B, ...] of this process. loss_of: (image_features [B, D], text_features [B, D], scale) -> scalar.
    autocast, grad_scale: precision context and GradScaler.scale.
    Returns: loss, image_features, text_features, detached; gradients are added to the parameters of net.
    Three passes: features without a graph; the loss on them, which gives dL/dfeatures; each chunk again, with its
    random state and batch-norm buffers as they were, and backward from its features with dL/dfeatures. The gradients
    equal the full batch's, except that batch norm sees chunks (tests). Source: Gao et al., arXiv 2101.06983, 3.2.
    """
    if n_chunks == 1:
        with autocast():
            image_features, text_features, scale = net(images, texts)
        loss = loss_of(image_features, text_features, scale)
        grad_scale(loss).backward()
        return loss.detach(), image_features.detach(), text_features.detach()

    chunks = list(zip(images.chunk(n_chunks), texts.chunk(n_chunks), strict=True))
    buffers = [buffer.clone() for buffer in net.buffers()]
    random_states, features = [], []
    for chunk in chunks:
        random_states.append((torch.get_rng_state(), torch.cuda.get_rng_state() if images.is_cuda else None))
        with torch.no_grad(), autocast():  # a context of its own: autocast would keep graph-less weight casts
            features.append(net(*chunk))
    for buffer, before in zip(net.buffers(), buffers, strict=True):
        buffer.copy_(before)  # running statistics advance in the replay only

    image_features = torch.cat([f[0] for f in features]).requires_grad_()
    text_features = torch.cat([f[1] for f in features]).requires_grad_()
    scale = features[0][2].detach().requires_grad_()
    loss = loss_of(image_features, text_features, scale)
    grad_scale(loss).backward()

    image_grads, text_grads = image_features.grad.chunk(n_chunks), text_features.grad.chunk(n_chunks)
    for k, chunk in enumerate(chunks):
        torch.set_rng_state(random_states[k][0])
        if images.is_cuda:
            torch.cuda.set_rng_state(random_states[k][1])
        is_last = k == len(chunks) - 1  # chunk() can give fewer than n_chunks
        wait = net.no_sync() if isinstance(net, DistributedDataParallel) and not is_last else contextlib.nullcontext()
        with wait:  # DDP averages gradients once, in the last chunk
            with autocast():
                outputs = net(*chunk)
            grads = [image_grads[k], text_grads[k]] + [scale.grad] * is_last  # the scale's once, not in each chunk
            roots = [(output, grad) for output, grad in zip(outputs, grads) if output.requires_grad]
            torch.autograd.backward(*zip(*roots))
    return loss.detach(), image_features.detach(), text_features.detach()


# ------------------------------------------------------------------------------ model
# Parameter names and shapes are OpenAI's and open_clip's, so released weights load strictly, and ours load there.

ARCHS = {
    "tiny": dict(embed_dim=64, image_size=32, text_width=128),
    "RN50": dict(embed_dim=1024, image_size=224, text_width=512),
    "ViT-B-32": dict(embed_dim=512, image_size=224, text_width=512, width=768, patch_size=32),
    "ViT-B-16": dict(embed_dim=512, image_size=224, text_width=512, width=768, patch_size=16),
    "ViT-S-16": dict(embed_dim=384, image_size=224, text_width=384, width=384, patch_size=16),
}


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


class QuickGELU(nn.Module):
    """The cheap GELU of OpenAI's weights."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * torch.sigmoid(1.702 * x)


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


class Transformer(nn.Module):
    def __init__(self, width: int, n_layers: int, activation: str, is_causal: bool):
        super().__init__()
        self.is_causal = is_causal
        self.resblocks = nn.ModuleList(ResidualAttentionBlock(width, activation) for _ in range(n_layers))

    def forward(self, x: torch.Tensor) -> torch.Tensor:  # [B, L, width]
        for block in self.resblocks:
            x = block(x, self.is_causal)
        return x


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


@functools.cache
def pixel_statistics(device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean and deviation of CLIP's training pixels, [3] each; copied to a device once, since a copy waits."""
    mean, std = [0.48145466, 0.4578275, 0.40821073], [0.26862954, 0.26130258, 0.27577711]  # openai/CLIP clip.py
    return torch.tensor(mean, device=device), torch.tensor(std, device=device)


def standardize(images: torch.Tensor) -> torch.Tensor:
    """[B, 3, S, S], 0..255 -> float32 by CLIP's mean and deviation, channels last, which is faster for convolutions."""
    mean, std = pixel_statistics(images.device)
    images = (images.float() / 255 - mean[:, None, None]) / std[:, None, None]
    return images.contiguous(memory_format=torch.channels_last)


class CLIP(nn.Module):
    """Two towers and a learned temperature.

    text: dict(arch="cbow" | "transformer", width, vocab_size, context_length), or dict(arch="embeddings", width) for
    given caption embeddings, of which a projection is learned (the paper's frozen RoBERTa, its section 0.5).
    """

    def __init__(self, arch: str, embed_dim: int, text: dict, activation: str, image_size: int = 0):
        super().__init__()
        spec = ARCHS[arch]
        self.arch, self.activation, self.embed_dim = arch, activation, embed_dim
        self.image_size = image_size or spec["image_size"]
        if arch == "tiny":
            self.visual = TinyResNet(embed_dim)
        elif arch == "RN50":
            self.visual = ModifiedResNet(embed_dim, self.image_size)
        else:
            self.visual = VisionTransformer(embed_dim, self.image_size, spec["patch_size"], spec["width"], activation)
        self.logit_scale = nn.Parameter(torch.tensor(math.log(1 / 0.07)))  # CLIP section 2.5
        self.text_arch, width = text["arch"], text["width"]
        if self.text_arch == "embeddings":
            hidden = (width + embed_dim) // 2  # 896 for 768 -> 1024
            self.text_mlp = nn.Sequential(nn.Linear(width, hidden, bias=False), nn.GELU(),
                                          nn.Linear(hidden, embed_dim, bias=False))
            return
        self.token_embedding = nn.Embedding(text["vocab_size"], width)
        nn.init.normal_(self.token_embedding.weight, std=0.02)
        self.ln_final = nn.LayerNorm(width)
        if self.text_arch == "cbow":
            self.text_hidden = nn.Linear(width, 2 * width)
            self.text_projection = nn.Parameter(torch.randn(2 * width, embed_dim) * (2 * width) ** -0.5)
            return
        self.positional_embedding = nn.Parameter(torch.randn(text["context_length"], width) * 0.01)
        self.transformer = Transformer(width, text.get("n_layers", 12), activation, is_causal=True)
        self.text_projection = nn.Parameter(torch.randn(width, embed_dim) * width**-0.5)
        n_layers = len(self.transformer.resblocks)
        for block in self.transformer.resblocks:  # openai/CLIP model.py initialize_parameters
            nn.init.normal_(block.attn.in_proj_weight, std=width**-0.5)
            nn.init.normal_(block.attn.out_proj.weight, std=width**-0.5 * (2 * n_layers) ** -0.5)
            nn.init.normal_(block.mlp.c_fc.weight, std=(2 * width) ** -0.5)
            nn.init.normal_(block.mlp.c_proj.weight, std=width**-0.5 * (2 * n_layers) ** -0.5)

    def text_parameters(self) -> dict[str, nn.Parameter]:
        """Parameters of the text tower by name: all but the image tower's and the temperature."""
        return {k: p for k, p in self.named_parameters() if not k.startswith("visual.") and k != "logit_scale"}

    def encode_image(self, images: torch.Tensor) -> torch.Tensor:
        """[B, 3, S, S], 0..255 -> [B, D], not normalised."""
        return self.visual(standardize(images))

    def encode_text(self, texts: torch.Tensor) -> torch.Tensor:
        """[B, L] tokens, zeros after the end token, L up to the context length -> [B, D], not normalised.

        Floating-point texts are embeddings made before: a frozen tower's own pass through, others are projected.
        """
        if texts.is_floating_point():
            return self.text_mlp(texts) if self.text_arch == "embeddings" else texts
        x = self.token_embedding(texts)  # [B, L, width]
        end = texts.argmax(1)  # [B]: the end token has the largest id; what follows it is padding
        if self.text_arch == "cbow":  # mean of the words' embeddings, without start and end token
            position = torch.arange(texts.shape[1], device=texts.device)
            is_word = (position > 0) & (position < end[:, None])  # [B, L]
            x = (x * is_word[..., None]).sum(1) / is_word.sum(1, keepdim=True).clamp(min=1)  # [B, width]
            return F.gelu(self.text_hidden(self.ln_final(x))) @ self.text_projection
        x = self.transformer(x + self.positional_embedding[: texts.shape[1]].to(x.dtype))
        return self.ln_final(x[torch.arange(len(x), device=x.device), end]) @ self.text_projection

    def forward(self, images: torch.Tensor, texts: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Unit features [B, D] of both sides, float32, and the scale exp(logit_scale)."""
        image_features = F.normalize(self.encode_image(images).float(), dim=1)
        text_features = F.normalize(self.encode_text(texts).float(), dim=1)
        return image_features, text_features, self.logit_scale.exp()


def text_config(state_dict: dict[str, torch.Tensor], path: str) -> tuple[dict, int]:
    """The `text` argument of CLIP that fits a state dict, and its embedding width D; SystemExit if none does."""
    if "token_embedding.weight" not in state_dict:
        weights = [v for k, v in state_dict.items() if k.startswith("text_mlp.")]
        if not weights:
            raise SystemExit(f"{path}: no text tower in it (no token_embedding.weight)")
        return dict(arch="embeddings", width=weights[0].shape[1]), weights[-1].shape[0]
    if "text_projection" not in state_dict:
        raise SystemExit(f"{path}: no whole text tower in it (no text_projection)")
    if state_dict["token_embedding.weight"].ndim != 2 or state_dict["text_projection"].ndim != 2:
        raise SystemExit(f"{path}: token_embedding.weight and text_projection of its text tower are no matrices")
    vocab_size, width = state_dict["token_embedding.weight"].shape
    text = dict(arch="cbow", width=width, vocab_size=vocab_size, context_length=77)
    if "positional_embedding" in state_dict:
        blocks = {k.split(".")[2] for k in state_dict if k.startswith("transformer.resblocks.")}
        text |= dict(arch="transformer", context_length=len(state_dict["positional_embedding"]), n_layers=len(blocks))
    return text, state_dict["text_projection"].shape[1]


# What torch.load, torch.jit.load and safetensors raise for a file that is something else, or cut or damaged.
UNREADABLE = (OSError, RuntimeError, ValueError, EOFError, LookupError, AttributeError, struct.error)
UNREADABLE += (zipfile.BadZipFile, pickle.UnpicklingError)


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


def pick_activation(flag: str, checkpoint: dict, path: str) -> str:
    """The activation of loaded weights; a wrong one gives wrong features silently, so it must be known and agree."""
    stored = checkpoint.get("activation")
    if not any("resblocks" in k for k in checkpoint["state_dict"]):
        return flag if flag != "auto" else stored or "gelu"  # no transformer: nothing to mistake
    if stored is None and flag == "auto":
        raise SystemExit(f"{path} does not say its activation: pass --activation quick_gelu (OpenAI's weights and "
                         "open_clip models named -quickgelu) or --activation gelu")
    if stored is not None and flag not in ("auto", stored):
        raise SystemExit(f"{path} was trained with {stored}, --activation says {flag}")
    return stored or flag


# ------------------------------------------------------------------------------ data

ALIASES = {"image": ("filepath", "path", "file"), "label": ("class", "wnid"), "caption": ("text", "title")}
IMAGE_FORMATS = ["JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM"]  # not EPS: Pillow would run Ghostscript on it
COUNT_CAPTIONS = 2_000_000  # of larger sets an even sample of the captions is matched with class names
KEEP_PIXELS = 16 * 2**30  # bytes of .npy images kept on the device; beyond it they are read in the workers
KEEP_TEXT = 2**30  # bytes of cached caption embeddings kept in memory; beyond it they are mapped from a file
GAVE_UP = "gave up"  # the reason, where no replacement could be read either


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


def class_ids(classes: list[dict[str, str]]) -> dict[str, int]:
    """Number of a class by its name and wnid; -1 for what several classes are called (a crane, and another)."""
    ids = {}
    for column in ("name", "wnid"):
        names = [row.get(column, "") for row in classes]
        n_called = Counter(names)
        ids |= {name: i if n_called[name] == 1 else -1 for i, name in enumerate(names) if name}
    return ids


def label_of(field: str, ids: dict[str, int]) -> int:
    """The class of a label: its number (3, or 3.0 as pandas writes it beside a missing one), name or wnid; or -1."""
    is_number = re.fullmatch(r"\d{1,18}(\.0*)?", field, re.A)
    return int(field.partition(".")[0]) if is_number else ids.get(field, -1)


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


def match_classes(captions: Iterable[str], classes: list[dict[str, str]]) -> np.ndarray:
    """[C] int64: number of captions that name a class, by its name or a synonym, as whole words, whatever the case.

    A caption counts once for each class it names. Names are looked up by their first word, so the time does not grow
    with the number of classes. Same value as the regex (?<!\\w)(name1|name2|..)(?!\\w) run for each class.
    """
    by_first_word = defaultdict(list)
    for c, row in enumerate(classes):
        for name in {row["name"].lower(), *row.get("synonyms", "").lower().split("|")} - {""}:
            word = re.search(r"\w+|$", name)
            pattern = re.compile(rf"(?<!\w){re.escape(name)}(?!\w)")
            by_first_word[word.group()].append((pattern, word.start(), c))
    counts = np.zeros(len(classes), np.int64)
    wordless = by_first_word.pop("", ())
    for caption in captions:
        caption = caption.lower()
        found = {c for pattern, _, c in wordless if pattern.search(caption)}
        for word in re.finditer(r"\w+", caption):
            for pattern, offset, c in by_first_word.get(word.group(), ()):
                if word.start() >= offset and pattern.match(caption, word.start() - offset):
                    found.add(c)
        counts[list(found)] += 1
    return counts


def bytes_to_unicode() -> dict[int, str]:
    """Map each of the 256 bytes to a printable character, in the order of CLIP's vocabulary.

    Source: GPT-2 / openai/CLIP simple_tokenizer.py; the order fixes the first 256 token ids.
    """
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [byte for byte in range(256) if byte not in printable]
    return {byte: chr(byte) for byte in printable} | {byte: chr(256 + i) for i, byte in enumerate(others)}


@functools.cache
def word_pattern() -> re.Pattern:
    """CLIP's word pattern (letters, one digit, other signs, "'s" and its like), written for Python's `re`."""
    numbers = "".join(c for c in map(chr, range(sys.maxunicode + 1)) if unicodedata.category(c) in ("Nl", "No"))
    # A fraction or a Roman numeral is a letter to \w, a number to CLIP; [a-z] comes first, since that test is slow.
    letter = rf"(?:[a-z]|(?![{numbers}])[^\W\d_])"
    other = rf"(?:(?!{letter})[^\s\d{numbers}])"
    return re.compile(rf"'s|'t|'re|'ve|'m|'ll|'d|{letter}+|[\d{numbers}]|{other}+", re.IGNORECASE)


def bpe_words(text: str) -> list[str]:
    """Split a text into the pieces that byte-pair merges never cross: CLIP's cleaning, lower case and word pattern.

    The literals of start and end tokens are dropped. CLIP also runs `ftfy` first, which repairs mis-decoded text
    (full-width forms, curly quotes, bytes read in a wrong encoding); that is left out, so such texts get other ids.
    """
    text = re.sub(r"<\|(?:start|end)oftext\|>|<(?:start|end)_of_text>", " ", html.unescape(html.unescape(text)))
    return [piece for word in text.lower().split() for piece in word_pattern().findall(word)]


def train_bpe(texts: Iterable[str], n_merges: int) -> list[str]:
    """Learn byte-pair merges from texts: the most frequent neighbouring pair is merged, again and again.

    n_merges: upper bound; fewer when every word has become one token.
    Returns: lines "left right", first merge first; ties go to the pair that sorts first, so the result is a
    function of the texts alone. Source: Sennrich et al., arXiv 1508.07909, algorithm 1.
    """
    to_unicode = bytes_to_unicode()
    counts = Counter(word for text in texts for word in bpe_words(text))
    words, pairs, where = [], Counter(), defaultdict(set)  # symbols of each distinct word; pair -> words that have it
    for i, word in enumerate(counts):
        symbols = [to_unicode[byte] for byte in word.encode("utf-8")]
        words.append(symbols[:-1] + [symbols[-1] + "</w>"])
        for pair in zip(words[i], words[i][1:]):
            pairs[pair] += counts[word]
            where[pair].add(i)
    counts = list(counts.values())
    queue, merges = [(-count, pair) for pair, count in pairs.items()], []
    heapq.heapify(queue)
    while queue and len(merges) < n_merges:
        count, best = heapq.heappop(queue)
        if -count != pairs[best] or not count:
            continue  # the count has changed since: the pair stands in the queue again
        merges.append(" ".join(best))
        changed = set()
        for i in where.pop(best):
            for pair in zip(words[i], words[i][1:]):
                pairs[pair] -= counts[i]
                changed.add(pair)
            words[i] = merge_pair(words[i], *best)
            for pair in zip(words[i], words[i][1:]):
                pairs[pair] += counts[i]
                where[pair].add(i)
                changed.add(pair)
        for pair in changed:
            heapq.heappush(queue, (-pairs[pair], pair))
    return merges


def merge_pair(symbols: list[str], left: str, right: str) -> list[str]:
    """Join each occurrence of `left right` in a list of symbols, from the left."""
    merged = []
    for symbol in symbols:
        if symbol == right and merged[-1:] == [left]:
            merged[-1] += right
        else:
            merged.append(symbol)
    return merged


class Tokenizer:
    """CLIP's byte-level BPE. Ids: 256 bytes, 256 bytes that end a word, merges, start, end; 0 pads.

    merges: lines "left right"; with the 48,894 of OpenAI's file ids equal open_clip's (deviation 5).
    """

    def __init__(self, merges: list[str], context_length: int = 77):
        self.merges, self.context_length, self.cache = merges, context_length, {}
        self.to_unicode = bytes_to_unicode()
        symbols = list(self.to_unicode.values())
        symbols += [symbol + "</w>" for symbol in symbols] + ["".join(merge.split()) for merge in merges]
        self.ids = {symbol: i for i, symbol in enumerate(symbols)}
        self.ranks = {tuple(merge.split()): i for i, merge in enumerate(merges)}
        self.vocab_size = len(symbols) + 2
        self.start_id, self.end_id = self.vocab_size - 2, self.vocab_size - 1
        self.ends_word = np.array([symbol.endswith("</w>") for symbol in symbols] + [True, True])  # [vocab_size]

    def encode_word(self, word: str) -> list[int]:
        """Ids of one piece of bpe_words: neighbours are merged, lowest rank first."""
        if word not in self.cache:
            symbols = [self.to_unicode[byte] for byte in word.encode("utf-8")]
            symbols[-1] += "</w>"
            while len(symbols) > 1:
                pair = min(zip(symbols, symbols[1:]), key=lambda pair: self.ranks.get(pair, math.inf))
                if pair not in self.ranks:
                    break
                symbols = merge_pair(symbols, *pair)
            if len(self.cache) > 500_000:
                self.cache.clear()
            self.cache[word] = [self.ids[symbol] for symbol in symbols]
        return self.cache[word]

    def encode(self, text: str) -> tuple[list[int], bool]:
        """Start, tokens, end, at most context_length of them, the last one the end token; and whether it was cut."""
        ids = [self.start_id, *(i for word in bpe_words(text) for i in self.encode_word(word)), self.end_id]
        is_cut = len(ids) > self.context_length
        return ids[: self.context_length - 1] + ids[-1:] if is_cut else ids, is_cut

    def __call__(self, texts: Iterable[str]) -> torch.Tensor:
        """[B, L] int64, padded with zeros to the longest text."""
        return pad_tokens([self.encode(text)[0] for text in texts])


def pad_tokens(rows: list) -> torch.Tensor:
    """Lists of token ids -> [B, L] int64, padded with zeros to the longest."""
    return nn.utils.rnn.pad_sequence([torch.tensor(row) for row in rows], batch_first=True)


def read_merges(path: str | Path) -> list[str]:
    """Lines of a merges file in CLIP's format (first line a version), plain or gzipped; at most CLIP's 48,894."""
    try:
        raw = gzip.open(path).read() if str(path).endswith(".gz") else Path(path).read_bytes()
        lines = raw.decode("utf-8").split("\n")[1 : 49152 - 256 - 2 + 1]
    except (OSError, EOFError, zlib.error, UnicodeDecodeError) as error:
        raise SystemExit(f"--bpe {path}: {error}") from None
    for number, line in enumerate(lines, 2):
        if line.strip() and len(line.split()) != 2:
            raise SystemExit(f"--bpe {path}: line {number} is no merge of two: {line[:60]!r}; expected CLIP's format")
    return [line for line in lines if line.strip()]


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


def drop_words(tokens: torch.Tensor, ends_word: np.ndarray, probability: float, *keys: np.ndarray) -> torch.Tensor:
    """Leave out each word with a probability; the one with the luckiest draw always stays.

    tokens: [B, L] with start, end and padding. keys: integers [B] that seed the draws. Returns [B, L'], L' <= L.
    """
    ids = tokens.numpy()
    position, end = np.arange(ids.shape[1]), ids.argmax(1)[:, None]
    is_word = (position > 0) & (position < end)  # [B, L]
    word = np.cumsum(ends_word[ids], 1) - ends_word[ids]  # [B, L] number of the word a token belongs to
    draw = uniform_hash(*(key[:, None] for key in keys), word)
    luckiest = np.where(is_word, draw, -1).max(1, keepdims=True)
    keep = np.where(is_word, (draw >= probability) | (draw == luckiest), position <= end)
    order = np.argsort(~keep, axis=1, kind="stable")[:, : keep.sum(1).max()]  # kept tokens to the left
    return torch.from_numpy(np.where(np.take_along_axis(keep, order, 1), np.take_along_axis(ids, order, 1), 0))


class Captions:
    """Text of each example of a table under templates such as "{title} {tags}" or "a photo of a {class}".

    is_fixed: the text does not depend on the epoch. Raises: SystemExit for an unknown field, or {class} without labels.
    """

    def __init__(self, table: Table, labels: np.ndarray, templates: list[str], classes: list[dict[str, str]],
                 seed: int):
        self.table, self.labels, self.seed = table, labels, seed
        self.templates = [re.split(r"\{([^{}]+)\}", template) for template in templates]  # literal, field, literal, ...
        self.names = [[row["name"], *filter(None, row.get("synonyms", "").split("|"))] for row in classes]
        fields = {field for parts in self.templates for field in parts[1::2]}
        unknown = fields - {*table.columns, "class", "synonym"}
        unknown |= {part for parts in self.templates for part in parts[::2] if "{" in part or "}" in part}
        if unknown:
            raise SystemExit(f"--caption names {sorted(unknown)}; {table.path} has {sorted(table.columns)}, and there "
                             "are class and synonym")
        if fields & {"class", "synonym"} and (labels.min() < 0 or not classes):
            raise SystemExit(f"--caption uses the class name, but {(labels < 0).sum()} of {len(labels)} rows of "
                             f"{table.path} have no label, and there are {len(classes)} classes")
        self.is_fixed = len(templates) == 1 and "synonym" not in fields

    def __call__(self, row: int, epoch: int) -> str:
        return self.text(row, *self.draw(np.array([row]), epoch)[0])

    def draw(self, rows: np.ndarray, epoch: int) -> np.ndarray:
        """[n, 2] in [0, 1): what chooses template and synonym of a row."""
        if self.is_fixed:
            return np.zeros((len(rows), 2))
        return uniform_hash(self.seed, 1, rows[:, None], epoch, np.arange(2))

    def text(self, row: int, template: float, synonym: float) -> str:
        parts, fields = list(self.templates[int(template * len(self.templates))]), self.table[row]
        names = self.names[self.labels[row]] if self.names else [""]
        drawn = {"class": names[0], "synonym": names[int(synonym * len(names))]}
        for i in range(1, len(parts), 2):
            parts[i] = drawn[parts[i]] if parts[i] in drawn else fields[self.table.columns[parts[i]]]
        return "".join(parts)


def caption_id(caption: str) -> int:
    """64-bit id of a caption, equal for equal texts."""
    return int.from_bytes(hashlib.blake2b(caption.encode("utf-8"), digest_size=8).digest(), "little", signed=True)


def locate_image(table: Table, row: int) -> tuple[Path, int, int]:
    """Where the image of a row is: path, offset (row of an .npy, -1 if none is named), size in bytes or -1 for all."""
    field = table.get(row, "image")
    if match := re.fullmatch(r"(.+\.tar):(\d{1,4000}):(\d{1,4000})", field):
        return table.folder / match[1], int(match[2]), int(match[3])
    if match := re.fullmatch(r"(.+\.npy):(\d{1,4000})", field):
        return table.folder / match[1], int(match[2]), -1
    return table.folder / field, -1 if field.endswith(".npy") else 0, -1


@functools.lru_cache(maxsize=64)
def open_npy(path: Path) -> np.ndarray:
    """Memory map of a uint8 array (N, H, W, 3)."""
    array = np.lib.format.open_memmap(path, mode="r")  # np.load would take an .npz by another name
    if array.dtype != np.uint8 or array.ndim != 4 or array.shape[3] != 3:
        raise ValueError(f"{path} holds {array.dtype} {array.shape}, expected uint8 (N, H, W, 3)")
    return array


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


def center_box(width: int, height: int) -> tuple[float, float, float, float]:
    """The largest centred square: what is left by "resize the short side, then crop the centre"."""
    side = min(width, height)
    return (width - side) / 2, (height - side) / 2, (width + side) / 2, (height + side) / 2


def crop_pixels(pixels: torch.Tensor, boxes: torch.Tensor, image_size: int) -> torch.Tensor:
    """Crop and resize images on the device: [B, H, W, 3] uint8, [B, 4] fractions -> [B, 3, S, S] float, 0..255."""
    x = pixels.permute(0, 3, 1, 2).float()
    left, top, right, bottom = boxes.float().unbind(1)
    zero = torch.zeros_like(left)  # affine_grid's coordinates run from -1 to 1
    theta = torch.stack([right - left, zero, left + right - 1, zero, bottom - top, top + bottom - 1], 1).view(-1, 2, 3)
    grid = F.affine_grid(theta, [len(x), 3, image_size, image_size], align_corners=False)
    return F.grid_sample(x, grid, padding_mode="border", align_corners=False)


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


class Pairs(torch.utils.data.Dataset):
    """Training pairs of several sets; whole batches at a time, in the loader's workers or in the main process.

    captions: one for each set, with its table. tokenizer: None if text_features stand in the place of tokens.
    Set from outside: pixel_offsets [sets], where the rows of a set start among the images on the device;
    text_features [n, D], not normalised ([n, width] of --text-embeddings), and text_ids [n], the sorted caption ids
    they belong to (None: a row for each row of the set), and text_cut [n], whether a caption was truncated.
    """

    def __init__(self, captions: list[Captions], tokenizer: Tokenizer | None, image_size: int, crop_scale: float,
                 word_dropout: float, max_pixels: int, seed: int):
        self.captions, self.tables, self.tokenizer = captions, [c.table for c in captions], tokenizer
        self.image_size, self.crop_scale, self.word_dropout = image_size, crop_scale, word_dropout
        self.max_pixels, self.seed = max_pixels, seed
        self.pixel_offsets, self.text_features, self.text_ids, self.text_cut = None, None, None, None

    def __getitems__(self, examples: np.ndarray) -> dict:
        """[B, 3] (set, row, epoch) -> a batch: images or pixel_rows and boxes, texts, caption_ids, bad, n_cut."""
        bad = []
        if self.pixel_offsets is None:
            min_side = self.image_size / math.sqrt(0.75 * self.crop_scale)  # of the smallest crop
            examples, images, bad = read_crops(self.tables, examples, self.image_size, min_side, self.crop_scale,
                                               self.max_pixels, self.seed)
            batch = {"images": images}
        else:
            boxes = crop_boxes((self.crop_scale, 1), 4 / 3, np.ones(len(examples)), self.seed, 2, *examples.T)
            batch = {"pixel_rows": torch.from_numpy(self.pixel_offsets[examples[:, 0]] + examples[:, 1]),
                     "boxes": torch.from_numpy(boxes).float()}
        texts = [self.captions[s](row, epoch) for s, row, epoch in examples.tolist()]
        batch["caption_ids"] = torch.tensor([caption_id(text) for text in texts])
        if self.text_features is None:
            ids, cut = zip(*map(self.tokenizer.encode, texts))
            batch["texts"] = pad_tokens(ids)
            if self.word_dropout:
                batch["texts"] = drop_words(batch["texts"], self.tokenizer.ends_word, self.word_dropout,
                                            np.full(len(ids), self.seed + 4), *examples.T)
        else:
            rows, cut = examples[:, 1], ()
            if self.text_ids is not None:
                rows = np.searchsorted(self.text_ids, batch["caption_ids"].numpy())
                cut = self.text_cut[rows].tolist()
            batch["texts"] = torch.from_numpy(np.asarray(self.text_features[rows], np.float32))
        return batch | {"bad": bad, "n_cut": sum(cut)}


def ignore_sigterm(worker: int) -> None:
    """A signal to the whole process group (torchrun's, timeout's, Slurm's) is for the training process, which saves."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)


def worker_setup(workers: int) -> dict:
    """Of a DataLoader. Forked, its workers share the tables and arrays of this process, copied nowhere.

    Linux: Python 3.14 has another default there. Elsewhere a fork may hang, so the default stays.
    """
    return {"num_workers": workers, "worker_init_fn": ignore_sigterm,
            "multiprocessing_context": "fork" if workers and sys.platform == "linux" else None}


def default_workers() -> int:
    """Loader processes for one training process: one a core that this process may use, at most 8."""
    return min(8, len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1)


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


def keep_freed_memory() -> None:
    """Let glibc keep freed memory for the next step, which else maps and zeroes the pages of its activations anew.

    With huge pages a quarter to a third less time for an RN50 step on a CPU (benchmarks/clip_step.py).
    """
    with contextlib.suppress(OSError, AttributeError, TypeError):  # without glibc nothing happens
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(-4, 0)  # M_MMAP_MAX: large blocks come from the heap
        mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD: which is not given back


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


def run_script(command: list[str]) -> None:
    """Run another process outside this one's process group; SystemExit if it fails."""
    launcher = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "GROUP_RANK", "MASTER_ADDR", "MASTER_PORT",
                "OMP_NUM_THREADS")
    environment = {k: v for k, v in os.environ.items() if k not in launcher and not k.startswith("TORCHELASTIC")}
    status = subprocess.run([sys.executable, *command], env=environment).returncode
    if status:
        raise SystemExit(f"{' '.join(command)} ended with status {status}")


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


def lr_at(step: int, peak: float, warmup_steps: int, steps: int) -> float:
    """Learning rate of a step: linear warm-up to the peak, then a cosine to 0 (open_clip's scheduler)."""
    if step < warmup_steps:
        return peak * (step + 1) / warmup_steps
    return peak * 0.5 * (1 + math.cos(math.pi * (step - warmup_steps) / max(1, steps - warmup_steps)))


def param_groups(model: nn.Module, weight_decay: float) -> list[dict]:
    """Trainable parameters: matrices with weight decay; gains, biases and logit_scale without."""
    params = [p for p in model.parameters() if p.requires_grad]
    decay, no_decay = [p for p in params if p.ndim >= 2], [p for p in params if p.ndim < 2]
    return [{"params": decay, "weight_decay": weight_decay}, {"params": no_decay, "weight_decay": 0.0}]


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


def write_json(path: Path, content: dict) -> None:
    write_atomically(path, lambda file: file.write((json.dumps(content, indent=1) + "\n").encode()))


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


def checksums(tables: list[Table], *paths: str | Path) -> dict[str, int]:
    """CRC32 of the files that decide what a run learns, by name; a path that is no file is left out."""
    sums = {str(table.path): table.crc for table in tables}
    for path in filter(os.path.isfile, paths):
        with open(path, "rb") as file:
            blocks = iter(functools.partial(file.read, 2**26), b"")
            sums[str(path)] = functools.reduce(lambda crc, block: zlib.crc32(block, crc), blocks, 0)
    return sums


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


def versions() -> dict[str, str]:
    return {"python": sys.version.split()[0], "torch": torch.__version__, "numpy": np.__version__}


def resumable(optimizer: torch.optim.Optimizer, scaler: torch.amp.GradScaler, inputs: dict[str, int], n_bad: int,
              seconds: float, device: torch.device) -> dict:
    """What a checkpoint holds beside the model, to be continued from; undone by `restore`."""
    rng = {"torch": torch.get_rng_state(), "cuda": torch.cuda.get_rng_state(device) if device.type == "cuda" else None}
    return {"optimizer": optimizer.state_dict(), "scaler": scaler.state_dict(), "rng": rng, "inputs": inputs,
            "n_bad": n_bad, "seconds": seconds}


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


def save_checkpoint(path: Path, checkpoint: dict, rank: int) -> None:
    """Written by the first process, whole or not at all. All ranks."""
    on_one_rank(rank, lambda: write_atomically(path, lambda file: torch.save(checkpoint, file)))


def wrap_ddp(model: nn.Module, device: torch.device, world_size: int) -> nn.Module:
    """Average gradients over the processes; buffers are each one's own (batch norm sees to its own)."""
    if world_size == 1:
        return model
    warnings.filterwarnings("ignore", "`broadcast_buffers`")  # older torch does not know its new name
    device_ids = [device] if device.type == "cuda" else None
    return DistributedDataParallel(model, device_ids, broadcast_buffers=False, gradient_as_bucket_view=True)


# ------------------------------------------------------------------------------ evaluate

EVAL_BATCH = 128  # rows are encoded in the same blocks whatever the number of processes, so metrics are identical
TEMPLATES = ["a {}", "the {}", "a photo of a {}", "a picture of the {}"]


@dataclasses.dataclass
class World:
    """What a model is evaluated on."""

    root: Path
    classes: list[dict[str, str]]  # rows of classes.tsv, in label order
    class_counts: np.ndarray  # [C] int64 training images
    test_sets: dict[str, Table]
    templates: list[str]  # prompts with {} for the class name
    class_embeddings: np.ndarray | None  # [C, width] given embeddings of the class prompts
    stored: torch.Tensor | None = None  # [C, D] class vectors of a checkpoint, for where there are no such embeddings
    has_own_counts: bool = True  # class_counts are those of the model's training


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


def encode_texts(model: CLIP, tokenizer: Tokenizer, texts: list[str], device: torch.device) -> torch.Tensor:
    """[n, D] embeddings, not normalised. All ranks."""
    return encode_rows(len(texts), model.embed_dim, lambda a, b: model.encode_text(tokenizer(texts[a:b]).to(device)),
                       device)


@torch.no_grad()
def class_prototypes(model: CLIP, tokenizer: Tokenizer | None, world: World,
                     device: torch.device) -> torch.Tensor | None:
    """[C, D] unit class vectors: the normalised mean of the normalised embeddings of a class's prompts. All ranks.

    Without classes, or without embeddings of their prompts: those stored in the checkpoint, or None.
    Source: openai/CLIP's zero-shot notebook.
    """
    if not world.classes or (tokenizer is None and world.class_embeddings is None):
        return None if world.stored is None else world.stored.to(device)
    if tokenizer is None:
        given = torch.from_numpy(np.array(world.class_embeddings, np.float32)).to(device)
        return F.normalize(encode_rows(len(given), model.embed_dim, lambda a, b: model.encode_text(given[a:b]), device))
    prompts = [template.replace("{}", row["name"]) for row in world.classes for template in world.templates]
    embed = encode_texts(model, tokenizer, prompts, device)
    return F.normalize(F.normalize(embed, dim=1).unflatten(0, (len(world.classes), -1)).mean(1), dim=1)


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


def rank_correlation(x: np.ndarray, y: np.ndarray) -> float | None:
    """Spearman's rank correlation, average ranks for ties; None if one side is constant."""
    if len(x) < 2 or np.ptp(x) == 0 or np.ptp(y) == 0:
        return None
    return float(spearmanr(x, y).statistic)


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


def retrieval_metrics(image_features: torch.Tensor, text_features: torch.Tensor, image_ids: np.ndarray,
                      caption_ids: np.ndarray | None = None) -> dict[str, float]:
    """Recall at 1, 5 and 10 of texts for an image and of images for a text; any text of an image is right for it.

    image_features: [n_images, D]; text_features: [n, D]; image_ids: [n] the image of each text. Unit vectors.
    caption_ids: [n], equal for equal captions: a caption that several images have is right for each of them.
    The rank of the best right item counts the wrong items with a higher or an equal score (a constant model has rank
    last; NaN is wrong). Queries go in chunks: memory is O(chunk * n).
    """
    device = image_features.device
    owner = torch.as_tensor(image_ids, device=device)  # [n]
    group = np.unique(np.arange(len(owner)) if caption_ids is None else caption_ids, return_inverse=True)[1]
    group, ranks = torch.from_numpy(group).to(device), {"i2t": [], "t2i": []}
    with exact_matmul():
        for way, queries, items in ("i2t", image_features, text_features), ("t2i", text_features, image_features):
            for start in range(0, len(queries), 256):
                scores = queries[start : start + 256] @ items.T  # [chunk, items]
                if way == "i2t":
                    has_group = torch.zeros(len(scores), len(group), dtype=torch.bool, device=device)
                    mine = (owner >= start) & (owner < start + len(scores))
                    has_group[owner[mine] - start, group[mine]] = True
                    right = has_group[:, group]
                else:
                    query, text = (group[start : start + 256, None] == group).nonzero(as_tuple=True)
                    right = torch.zeros_like(scores, dtype=torch.bool)
                    right[query, owner[text]] = True
                best = scores.masked_fill(~right, -torch.inf).amax(1, keepdim=True)
                ranks[way].append((~(scores < best) & ~right).sum(1))
    return {f"{way}_r{k}": float((torch.cat(ranks[way]) < k).double().mean()) for way in ranks for k in (1, 5, 10)}


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
def evaluate(model: CLIP, tokenizer: Tokenizer | None, world: World, workers: int, max_pixels: int,
             device: torch.device, npz_folder: Path | None = None) -> dict[str, dict]:
    """Zero-shot classification of labelled sets, image-text retrieval of those without labels. All ranks.

    npz_folder: where the first process writes <set>.npz; rows of unreadable images are left out, `rows` says which are
    there. Returns: {set: metrics}.
    """
    if dist.is_initialized():
        for buffer in model.buffers():  # with --bn local each process has its own statistics
            dist.broadcast(buffer, 0)  # All ranks
    prototypes = class_prototypes(model.eval(), tokenizer, world, device)
    names, metrics = [row["name"] for row in world.classes], {}
    for name, table in world.test_sets.items():
        embed, readable, bad = encode_images(model, table, workers, max_pixels, device)
        rows = np.flatnonzero(readable)
        result = dict.fromkeys(("n", "top1", "balanced", "head", "medium", "tail", "spearman_acc", "spearman_pred",
                                "chance", "retrieval", "knn", "probe"))
        result |= {"n": len(rows), "bad_images": dict(bad)}
        labels = read_labels(table, world.classes)[rows]
        embed = embed[torch.from_numpy(rows).to(device)]
        if not bool(embed.isfinite().all()):
            raise SystemExit(f"{name}: the image features are not finite: the model has diverged")
        features = F.normalize(embed, dim=1)
        logits, extra = None, {}
        if prototypes is not None:
            with exact_matmul():
                logits = (100 * features @ prototypes.T).cpu()  # CLIP evaluates at the largest scale, 100
        labelled = labels >= 0
        if logits is not None and labelled.any():
            result |= imbalance_metrics(logits.argmax(1).numpy()[labelled], labels[labelled], world.class_counts)
        elif not labelled.any() and "caption" in table.columns and tokenizer is not None and len(rows):
            images = [table.get(row, "image") for row in rows]
            _, first, image_ids = np.unique(images, return_index=True, return_inverse=True)
            first = torch.from_numpy(first).to(device)
            captions = [table.get(row, "caption") for row in rows]
            texts = F.normalize(encode_texts(model, tokenizer, captions, device), dim=1)
            caption_ids = np.array([caption_id(caption) for caption in captions])
            result["retrieval"] = retrieval_metrics(features[first], texts, image_ids, caption_ids)
            extra = {"text_features": texts.cpu().numpy().astype(np.float16), "caption_ids": caption_ids,
                     "image_ids": first.cpu().numpy()[image_ids]}  # the row of each caption's image
        metrics[name] = result
        if npz_folder is not None and (not dist.is_initialized() or dist.get_rank() == 0):
            arrays = {"features": embed.cpu().numpy().astype(np.float16), "labels": labels, "rows": rows} | extra
            if names:
                arrays |= {"class_counts": world.class_counts, "class_names": np.array(names, str)}
            if logits is not None:
                arrays |= {"logits": logits.numpy().astype(np.float16),
                           "predictions": logits.argmax(1).numpy(),  # of float32: logits in float16 can tie
                           "prototypes": prototypes.cpu().numpy().astype(np.float16)}
            write_atomically(npz_folder / f"{name}.npz", lambda file, arrays=arrays: np.savez(file, **arrays))
    model.train()
    return metrics


# ------------------------------------------------------------------------------ train

# Flags that do not change what is computed: a run may be continued with others.
RUN_FLAGS = {"out", "resume", "export", "eval_only", "eval_sets", "device", "compile", "workers", "log_every",
             "save_every", "eval_every", "tensorboard", "wandb", "max_bad"}


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


def read_lines(path: str) -> list[str]:
    """Non-empty lines of a text file."""
    try:
        lines = [line.strip() for line in Path(path).read_text("utf-8-sig").splitlines() if line.strip()]
    except OSError as error:
        raise SystemExit(f"{path}: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise SystemExit(f"{path} is not UTF-8: {error}; save it as UTF-8") from None
    if not lines:
        raise SystemExit(f"{path}: no templates in it")
    return lines


def map_embeddings(path: str, n: int, owners: str) -> np.ndarray:
    """Memory map of a file of --text-embeddings, [n, width]. owners: what has a row each, for the message."""
    try:
        rows = np.lib.format.open_memmap(path, mode="r")
    except FileNotFoundError:
        raise SystemExit(f"--text-embeddings {path}: no such file") from None
    except (OSError, ValueError, EOFError) as error:  # no .npy file, one of objects, or cut
        raise SystemExit(f"--text-embeddings {path}: cannot be read as .npy: {error}") from None
    if rows.ndim != 2 or len(rows) != n or not rows.shape[1] or rows.dtype.kind not in "fiu":
        raise SystemExit(f"--text-embeddings {path} is {rows.dtype} {rows.shape}, expected ({n}, width), numbers: a "
                         f"row for each of {owners}")
    return rows


def map_text_embeddings(paths: list[str], table: Table, world: World) -> np.ndarray:
    """The captions' --text-embeddings [rows of the table, width]; SystemExit if the classes' have another width."""
    features = map_embeddings(paths[0], len(table), f"the rows of {table.path}")
    if world.class_embeddings is not None and world.class_embeddings.shape[1] != features.shape[1]:
        raise SystemExit(f"{paths[1]} is {world.class_embeddings.shape[1]} wide, {paths[0]} {features.shape[1]}")
    return features


def read_world(args: argparse.Namespace, root: Path) -> World:
    """Classes, test sets and prompts of a root; class counts are still zero."""
    classes = read_classes(root)
    class_embeddings = None
    if len(args.text_embeddings) > 1:
        class_embeddings = map_embeddings(args.text_embeddings[1], len(classes), f"{len(classes)} classes")
        if not np.isfinite(class_embeddings).all():
            raise SystemExit(f"{args.text_embeddings[1]} holds values that are not finite")
    templates = TEMPLATES if args.templates == "auto" else read_lines(args.templates)
    for template in templates:
        if "{}" not in template:
            raise SystemExit(f"--templates {args.templates}: no {{}} for the class name in {template!r}")
    counts, test_sets = np.zeros(len(classes), np.int64), find_test_sets(args.eval_sets, root)
    for table in test_sets.values() if not args.eval_only else ():
        read_labels(table, classes)  # what is wrong is told before training, not after it
        load_pixels([table])
        for row in range(len(table)) if "label" not in table.columns else ():
            table[row]  # has as many fields as the header
    return World(root, classes, counts, test_sets, templates, class_embeddings)


def read_training_sets(args: argparse.Namespace, world: World) -> tuple[list[Captions], np.ndarray]:
    """Captions (each with its table) of --data, and the share of the pairs that each set gives; fills class_counts."""
    paths, weights = find_sets(args.data, world.root)
    templates = read_lines(args.caption[1:]) if args.caption.startswith("@") else [args.caption]
    captions = []
    for path in paths:
        table = Table(path)
        labels = read_labels(table, world.classes)
        has_embeddings = args.text_embeddings and args.dup_captions == "keep" and "caption" not in table.columns
        is_counted = args.eval_only and (labels >= 0).any()  # and nothing more
        needed = [""] if is_counted or has_embeddings else templates
        captions.append(Captions(table, labels, needed, world.classes, args.seed))
    shares = np.array([len(c.table) if weight is None else weight for weight, c in zip(weights, captions)], float)
    shares /= shares.sum()
    world.class_counts = count_classes(captions, shares, world.classes)
    return captions, shares


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


def count_classes(captions: list[Captions], shares: np.ndarray, classes: list[dict[str, str]]) -> np.ndarray:
    """[C] int64 training images a class: by label, or, in sets without labels, by captions that name the class.

    shares: [sets] part of the training pairs that a set gives. Of a set without labels and with more than
    COUNT_CAPTIONS rows an even sample of the captions is matched.
    """
    if not classes:  # nothing to count, and without names a label is any number
        return np.zeros(0, np.int64)
    total, counts = sum(len(c.table) for c in captions), np.zeros(len(classes))
    for source, share in zip(captions, shares):
        seen = n_rows = len(source.table)
        if (source.labels >= 0).any():
            found = np.bincount(source.labels[source.labels >= 0], minlength=len(classes))
        else:
            rows = range(0, n_rows, math.ceil(n_rows / COUNT_CAPTIONS))
            found, seen = match_classes((source(row, 0) for row in rows), classes), len(rows)
        counts += found * (share * total / seen)
    return np.where(counts > 0, np.rint(counts).clip(1), 0).astype(np.int64)  # a class that is there stays


def caption_statistics(pairs: Pairs, sampler: Sampler) -> str:
    """How often a caption is twice in a batch (of the first four); of up to COUNT_CAPTIONS rows, how many differ."""
    same = []
    for step in range(min(4, sampler.stop) or 1):
        ids = [caption_id(pairs.captions[s](row, epoch)) for s, row, epoch in sampler.batch(step).tolist()]
        same.append(sum(n for n in Counter(ids).values() if n > 1) / len(ids))
    line = f"captions: {np.mean(same):.1%} of a batch share theirs with another pair"
    n_rows = sum(map(len, pairs.tables))
    if n_rows <= COUNT_CAPTIONS:
        ids = {caption_id(captions(row, 0)) for captions in pairs.captions for row in range(len(captions.table))}
        line += f", {len(ids):,} distinct in {n_rows:,} rows (first epoch)"
    return line


def allocate_npy(path: Path, shape: tuple[int, ...], dtype: type) -> None:
    """An .npy file of zeros whose room is taken at once: on a full disk a write to its map would kill the process.

    Raises: SystemExit if there is no room, or no permission.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        np.lib.format.open_memmap(path, "w+", dtype, shape).flush()
        if hasattr(os, "posix_fallocate"):
            with open(path, "r+b") as file:
                os.posix_fallocate(file.fileno(), 0, path.stat().st_size)
    except OSError as error:
        with contextlib.suppress(OSError):
            path.unlink()
        raise SystemExit(f"cannot write {path}: {error.strerror or error}") from None


@torch.no_grad()
def embed_captions(model: CLIP, pairs: Pairs, n_epochs: list[int], out: Path, device: torch.device,
                   autocast: Callable) -> tuple[np.ndarray, np.ndarray]:
    """Embed each distinct caption of a run once with the frozen text tower, the work shared by all processes.

    n_epochs: per set, epochs for which captions are drawn. Returns: [n] sorted caption ids; [n, D + 1] embeddings
    and, last, whether the caption was truncated; in memory, or beyond KEEP_TEXT mapped from OUT/text_features.npy
    (float16).
    """
    ids, examples = [], []
    for s, captions in enumerate(pairs.captions):
        for epoch in range(1 if captions.is_fixed else n_epochs[s]):
            draws = captions.draw(np.arange(len(captions.table)), epoch)  # at once: one by one takes ten times as long
            texts = (captions.text(row, *draw) for row, draw in enumerate(draws))
            found, rows = np.unique(np.fromiter(map(caption_id, texts), np.int64, len(draws)), return_index=True)
            ids.append(found)
            examples.append(np.stack([np.full_like(rows, s), rows, np.full_like(rows, epoch)], 1))
    ids, first = np.unique(np.concatenate(ids), return_index=True)
    examples = np.concatenate(examples)[first]
    model.eval()

    def encode(start: int, stop: int) -> torch.Tensor:
        texts = [pairs.captions[s](row, epoch) for s, row, epoch in examples[start:stop].tolist()]
        tokens, cut = zip(*map(pairs.tokenizer.encode, texts))
        with autocast():
            embed = model.encode_text(pad_tokens(tokens).to(device)).float()
        return torch.cat([embed, torch.tensor(cut, device=device)[:, None]], 1)

    if len(ids) * model.embed_dim * 4 <= KEEP_TEXT:
        return ids, encode_rows(len(ids), model.embed_dim + 1, encode, device).cpu().numpy()
    path = out / "text_features.npy"
    rank, world_size = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    on_one_rank(rank, lambda: allocate_npy(path, (len(ids), model.embed_dim + 1), np.float16))
    features = np.load(path, mmap_mode="r+") if rank == 0 else None  # one writes: NFS merges no maps of several nodes
    for start in range(0, len(ids), world_size * EVAL_BATCH):
        stop = min(start + world_size * EVAL_BATCH, len(ids))
        rows = encode_rows(stop - start, model.embed_dim + 1, lambda i, j, k=start: encode(k + i, k + j), device)
        if rank == 0:
            features[start:stop] = rows.cpu().numpy()
    on_one_rank(rank, lambda: features.flush())
    return ids, np.load(path, mmap_mode="r")


def build_model(args: argparse.Namespace, root: Path, captions: list[Captions],
                text_width: int) -> tuple[CLIP, Tokenizer | None, dict]:
    """Model and tokenizer from flags and loaded weights.

    captions: to learn byte-pair merges from, if no others are at hand. text_width: of given embeddings, or 0.
    Returns: model, tokenizer (None with given embeddings), the loaded checkpoint ({} if there is none).
    """
    source = whole = args.eval_only or args.init
    if not whole and args.text_head != "scratch" and not text_width:
        source = str(root / "clip.pt") if args.text_init == "auto" else args.text_init
    loaded = load_weights(source) if source else {}
    arch = loaded.get("arch", args.arch) if whole else args.arch
    activation = pick_activation(args.activation, loaded, source) if source else args.activation.replace("auto", "gelu")
    embed_dim, tokenizer = ARCHS[args.arch]["embed_dim"], None
    if args.init and args.arch not in ("tiny", arch):
        raise SystemExit(f"--arch {args.arch}: {args.init} has {arch}")
    if source:
        text, embed_dim = text_config(loaded["state_dict"], source)
        if args.text_arch not in ("auto", text["arch"]) or (text_width and text["arch"] != "embeddings"):
            raise SystemExit(f"{source} has a text tower of another kind ({text['arch']}) than the flags ask for")
        if text_width and text["width"] != text_width:
            raise SystemExit(f"{source} was trained on embeddings {text['width']} wide, --text-embeddings has "
                             f"{text_width}")
        if text["arch"] == "embeddings" and not text_width and not args.eval_only:
            raise SystemExit(f"{source} was trained with --text-embeddings: it has no text tower for captions")
    elif text_width:
        text = dict(arch="embeddings", width=text_width)
    else:
        text_arch = args.text_arch.replace("auto", "cbow" if arch == "tiny" else "transformer")
        text = dict(arch=text_arch, width=ARCHS[arch]["text_width"], context_length=77)
    if text["arch"] != "embeddings":
        if args.bpe != "auto":
            merges = read_merges(args.bpe)
        elif "bpe" in loaded:
            merges = loaded["bpe"].split("\n") if loaded["bpe"] else []
        elif (root / "bpe.txt").is_file():
            merges = read_merges(root / "bpe.txt")
        else:
            merges = train_bpe((c(row, 0) for c in captions for row in range(min(len(c.table), 200_000))), 8192)
        tokenizer = Tokenizer(merges, text["context_length"])
        if text.setdefault("vocab_size", tokenizer.vocab_size) != tokenizer.vocab_size:
            raise SystemExit(f"{source} has {text['vocab_size']} tokens, the merges make {tokenizer.vocab_size}: pass "
                             "the --bpe it was made with (CLIP's is bpe_simple_vocab_16e6.txt.gz)")
    model = CLIP(arch, embed_dim, text, activation)
    if whole:
        load_state(model, loaded["state_dict"], source)
    elif source:
        given, of_text = loaded["state_dict"], model.text_parameters()
        weights = {k: given.get(k) if k in of_text else own for k, own in model.state_dict().items()}
        load_state(model, {k: weight for k, weight in weights.items() if weight is not None}, source)
    return model, tokenizer, loaded


def checkpoint_of(model: CLIP, tokenizer: Tokenizer | None, world: World, args: argparse.Namespace, step: int,
                  prototypes: torch.Tensor | None) -> dict:
    """What a checkpoint or an export holds, in tensors and builtins."""
    return {
        "state_dict": {name: tensor.detach().cpu().contiguous() for name, tensor in model.state_dict().items()},
        "args": vars(args), "step": step, "arch": model.arch, "activation": model.activation,
        "prototypes": None if prototypes is None else prototypes.cpu(),  # [C, D]
        "class_names": [row["name"] for row in world.classes],
        "class_counts": torch.from_numpy(world.class_counts * world.has_own_counts),
    } | ({"bpe": "\n".join(tokenizer.merges)} if tokenizer else {})


def total(value: float, group: dist.ProcessGroup | None) -> float:
    """Sum of a number over the processes; over the CPU, so that no GPU is waited for."""
    if group is None:
        return value
    value = torch.tensor(float(value), dtype=torch.float64)
    dist.all_reduce(value, group=group)  # All ranks
    return float(value)


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


def root_of(root: str, data: str | None) -> Path:
    """Folder of the world: --root; if that is auto, of the first TSV of --data, else the built-in world's."""
    files = [part.strip() for part in (data or "").split(",") if re.search(r"\.tsv(:[\d.]+)?$", part.strip())]
    return Path(root) if root != "auto" else Path(files[0]).parent if files else Path(SHAPES_ROOT)


def evaluate_checkpoint(args: argparse.Namespace, world: World, rank: int, device: torch.device) -> None:
    """--eval-only: class counts are those the checkpoint was trained with, else those of --data, if it is there.

    A root without classes.tsv has the classes of the checkpoint; one with others is scored zero-shot.
    """
    model, tokenizer, loaded = build_model(args, world.root, [], 0)
    world.classes = world.classes or [{"name": name} for name in loaded.get("class_names", [])]
    names = [row["name"] for row in world.classes]
    world.class_counts = np.zeros(len(names), np.int64)
    sets = [part.strip().split(":")[0] for part in args.data.split(",")]
    world.has_own_counts = names == loaded.get("class_names") and bool(loaded["class_counts"].any())
    if world.has_own_counts:
        world.class_counts = loaded["class_counts"].numpy()
    elif names and all(s.endswith(".tsv") or (world.root / s / "train.tsv").is_file() for s in sets):
        read_training_sets(args, world)
        if rank == 0:
            print(f"frequencies of the classes: those of --data {args.data}, not of the training of {args.eval_only}")
    elif names and rank == 0:
        print(f"frequencies of the classes are not known: {args.eval_only} has none for the {len(names)} classes of "
              f"{world.root}, and there is no --data {args.data} in it")
    now, unknown = RUN_FLAGS | {"templates", "text_embeddings", "max_pixels"}, {"data": None, "seed": None}
    trained = loaded["args"] if "class_names" in loaded and isinstance(loaded.get("args"), dict) else unknown
    trained = {k: v for k, v in trained.items() if k not in now}
    args = argparse.Namespace(**vars(args) | trained | {"root": str(world.root)})
    given = world.class_embeddings
    if given is not None and tokenizer is not None:
        raise SystemExit(f"{args.eval_only} has a text tower, which makes the class vectors: no --text-embeddings then")
    if given is not None and given.shape[1] != model.text_mlp[0].in_features:
        raise SystemExit(f"{args.eval_only} was trained on embeddings {model.text_mlp[0].in_features} wide, "
                         f"--text-embeddings has {given.shape[1]}")
    world.stored = loaded.get("prototypes") if names == loaded.get("class_names") else None
    report(model.to(device), tokenizer, world, args, loaded.get("step", 0), 0.0, rank, device, "fp32")


def report(model: CLIP, tokenizer: Tokenizer | None, world: World, args: argparse.Namespace, step: int, seconds: float,
           rank: int, device: torch.device, precision: str) -> None:
    """Evaluate, write metrics.json, <set>.npz and the export, print the table. All ranks."""
    out = Path(args.out)
    metrics = evaluate(model, tokenizer, world, args.workers, args.max_pixels, device, out)
    run = {"script": Path(__file__).name, "step": step, "seconds": round(seconds, 1), "data": args.data,
           "seed": args.seed, "precision": precision, "versions": versions()}
    on_one_rank(rank, lambda: write_json(out / "metrics.json", metrics | {"run": run}))
    if args.export:
        export = checkpoint_of(model, tokenizer, world, args, step, class_prototypes(model, tokenizer, world, device))
        save_checkpoint(Path(args.export), export, rank)
    if rank == 0:
        print_table(metrics)
        for name, m in metrics.items():
            if m["n"] and m["top1"] is None and not m["retrieval"]:
                print(f"{name}: not scored: labels need classes.tsv (with --text-embeddings CLASSES.npy), retrieval "
                      "needs captions, no labels and a text tower")
        if not world.test_sets:
            print(f"no test sets: put val.tsv into {world.root} or pass --eval-sets")
        exported = f", exported: {args.export}" if args.export else ""
        if args.export and not world.classes:
            exported += f" without class vectors, as {world.root} has no classes.tsv"
        print(f"metrics: {out / 'metrics.json'}{exported}", flush=True)


def main(args: argparse.Namespace) -> None:
    # --- setup
    rank, world_size, device, control = setup_distributed(args.device)
    is_main, out = rank == 0, Path(args.out)
    precision, reason = pick_precision(args.precision, device)
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[precision]
    autocast = functools.partial(torch.autocast, device.type, dtype, enabled=precision != "fp32")
    torch.manual_seed(args.seed)  # the same on all processes, so they start from the same weights

    # --- data
    root = root_of(args.root, args.data)
    if args.eval_only and args.root == "auto" and ".tsv" not in args.data:  # the world that it was trained in, if here
        trained = load_weights(args.eval_only).get("args")
        if isinstance(trained, dict) and "root" in trained:
            root = root_of(trained["root"], trained["data"])
    on_one_rank(rank, lambda: ensure_shapes(root))
    world = read_world(args, root)
    if args.eval_only:
        evaluate_checkpoint(args, world, rank, device)
        return
    if args.batch_size % world_size or args.batch_size // world_size < args.accumulate:
        raise SystemExit(f"--batch-size {args.batch_size} does not split into {world_size} processes of "
                         f"{args.accumulate} chunks")
    captions, shares = read_training_sets(args, world)
    tables, sizes = [c.table for c in captions], [len(c.table) for c in captions]
    if is_main:
        print(describe(root, tables, shares, [row["name"] for row in world.classes], world.class_counts))
        print(f"precision {precision} ({reason}), {device}, {world_size} process{'es' * (world_size > 1)}", flush=True)
    if sum(sizes) < args.batch_size:
        raise SystemExit(f"--batch-size {args.batch_size} is larger than the {sum(sizes)} rows of --data {args.data}")
    text_features = map_text_embeddings(args.text_embeddings, tables[0], world) if args.text_embeddings else None
    inputs = checksums(tables, root / "classes.tsv", args.caption.removeprefix("@"), *args.text_embeddings)
    checkpoint = find_checkpoint(args, RUN_FLAGS, inputs, control)

    # --- model
    if args.text_init == "auto" and not (args.text_head == "scratch" or args.text_embeddings or args.init):
        on_one_rank(rank, lambda: ensure_clip_pt(root, args.device, "--text-head frozen and finetune"))
    text_width = 0 if text_features is None else text_features.shape[1]
    model, tokenizer, _ = build_model(args, root, captions, text_width)
    pixels = load_pixels(tables, model.image_size)  # [rows of all sets, H, W, 3] uint8, or None
    model.to(device)
    if model.arch in ("tiny", "RN50"):  # of --init, if that is given
        model.visual.to(memory_format=torch.channels_last)
    for module in model.modules():
        if isinstance(module, BatchNorm2d):
            module.sync = args.bn == "sync"
    if args.text_head == "frozen" and not args.text_embeddings:
        for parameter in model.text_parameters().values():
            parameter.requires_grad_(False)
    if args.compile:
        model.visual.compile()
        if model.text_arch == "transformer":
            model.transformer.compile()
    net = wrap_ddp(model, device, world_size)

    # --- optimizer
    steps = math.ceil(args.epochs * sum(sizes) / args.batch_size) if args.epochs else args.steps
    peak_lr = args.lr or (3e-3 if model.arch == "tiny" else 1e-3)
    optimizer = torch.optim.AdamW(param_groups(model, args.weight_decay), peak_lr, (0.9, args.beta2), fused=True)
    params = [p for group in optimizer.param_groups for p in group["params"]]
    scaler = torch.amp.GradScaler(device.type, enabled=precision == "fp16")

    # --- resume
    start, seconds_before, started = 0, 0.0, time.time()
    if checkpoint:
        if tokenizer and checkpoint["bpe"] != "\n".join(tokenizer.merges):
            raise SystemExit(f"{checkpoint['path']} was made with other byte-pair merges than those of now "
                             "(ROOT/bpe.txt or --bpe has changed): pass another --out, or --resume off to replace it")
        load_state(model, checkpoint["state_dict"], checkpoint["path"])
        start, seconds_before = restore(checkpoint, optimizer, scaler, device)

    # --- loader
    held = []  # by name until the end, and with it the lock
    on_one_rank(rank, lambda: held.append(lock_folder(out)))
    has_dropout = args.word_dropout < 0 and model.arch == "tiny" and args.text_head != "frozen"
    word_dropout = 0.5 if has_dropout else max(0.0, args.word_dropout)
    pairs = Pairs(captions, tokenizer, model.image_size, args.crop_scale, word_dropout, args.max_pixels, args.seed)
    pairs.text_features = text_features
    if pixels is not None:
        pixels, pairs.pixel_offsets = pixels.to(device), np.cumsum([0, *sizes[:-1]])
    if args.text_head == "frozen" and not args.text_embeddings and start < steps:
        n_epochs = [math.ceil(steps * args.batch_size * share / size) + 1 for share, size in zip(shares, sizes)]
        pairs.text_ids, cache = embed_captions(model, pairs, n_epochs, out, device, autocast)
        pairs.text_features, pairs.text_cut = cache[:, :-1], cache[:, -1]
    workers = args.workers if args.workers >= 0 else default_workers() if pixels is None else 1
    sampler = Sampler(sizes, shares, args.batch_size, args.seed, start, steps, rank, world_size)
    # Batches come whole from the data set, as dicts: nothing is left to collate.
    loader = torch.utils.data.DataLoader(pairs, batch_sampler=sampler, collate_fn=dict,
                                         pin_memory=device.type == "cuda", **worker_setup(workers))

    # --- log
    if is_main:
        print(f"{sum(p.numel() for p in model.parameters()) / 1e6:.2f} M parameters, {steps} steps of "
              f"{args.batch_size} pairs, chance loss ln({args.batch_size}) = {math.log(args.batch_size):.3f}"
              + (f", continued from step {start}" if start else ""))
        if any(captions[0].templates[0]):  # embeddings may stand for them
            print(caption_statistics(pairs, sampler), flush=True)
    log, stop_signals = RunLog(checkpoint, args, sum(sizes), inputs, device, control), []
    signal.signal(signal.SIGTERM, lambda number, frame: stop_signals.append(number))

    # --- loop
    model.train()
    n_cut = checkpoint["n_cut"] if checkpoint and is_main else 0
    running = [buffer for name, buffer in model.named_buffers() if "running_" in name]
    progress = tqdm(total=steps, initial=start, disable=not (is_main and sys.stderr.isatty()), unit="step")
    for step, batch in enumerate(loader, start):
        lr = lr_at(step, peak_lr, args.warmup_steps, steps)
        for group in optimizer.param_groups:
            group["lr"] = lr
        batch = {k: v.to(device, non_blocking=True) if isinstance(v, torch.Tensor) else v for k, v in batch.items()}
        if pixels is None:
            images = batch["images"]
        else:
            images = crop_pixels(pixels.index_select(0, batch["pixel_rows"]), batch["boxes"], model.image_size)
        loss_of = functools.partial(info_nce, caption_ids=batch["caption_ids"], dup_captions=args.dup_captions,
                                    directions=args.directions)
        kept = [buffer.clone() for buffer in running]
        parts = backward_in_chunks(net, images, batch["texts"], loss_of, args.accumulate, autocast, scaler.scale)

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
        parts = dict(zip(("loss", "image_features", "text_features"), parts))
        log.count(step, parts, is_taken, batch["bad"], is_log_step)
        n_cut += batch["n_cut"]
        progress.update()

        if is_log_step:
            log.report(step, lr=lr, logit_scale=float(model.logit_scale.detach().exp()), grad_norm=float(grad_norm),
                       truncated=total(n_cut, control) / ((step + 1) * args.batch_size))
        if args.eval_every and (step + 1) % args.eval_every == 0 and step + 1 < steps:
            paused_at = time.time()
            metrics = evaluate(model, tokenizer, world, args.workers, args.max_pixels, device)
            log.write({"step": step + 1, **metrics})
            if is_main:
                print_table(metrics)
            log.logged_at += time.time() - paused_at  # images_per_s is that of training
        is_stopped = total(len(stop_signals), control)
        if is_stopped or step + 1 == steps or (args.save_every and (step + 1) % args.save_every == 0):
            # Prompts of many classes take minutes: only a finished run has class prototypes.
            prototypes = class_prototypes(model, tokenizer, world, device) if step + 1 == steps else None
            checkpoint = checkpoint_of(model, tokenizer, world, args, step + 1, prototypes)
            seconds = seconds_before + time.time() - started
            checkpoint |= resumable(optimizer, scaler, inputs, log.n_bad(), seconds, device)
            checkpoint["n_cut"] = total(n_cut, control)
            save_checkpoint(out / "checkpoint.pt", checkpoint, rank)
        if is_stopped:
            if is_main:
                how = "the same command" if args.resume == "auto" else "--resume auto"
                print(f"SIGTERM: saved at step {step + 1}; {how} continues", flush=True)
            return

    progress.close()
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(0))  # all is saved: the same command evaluates
    report(model, tokenizer, world, args, steps, seconds_before + time.time() - started, rank, device, precision)


if __name__ == "__main__":
    try:
        main(ARGS)
        if dist.is_initialized():  # only then: NCCL's waits for the other processes, which may wait for one that failed
            dist.destroy_process_group()
    except SystemExit as error:  # a message to the user: the input cannot be used, or the disk is full
        if isinstance(error.code, str):
            print(error.code, file=sys.stderr)
        raise SystemExit(2 if isinstance(error.code, str) else error.code) from None
