"""Training step of clip.py against open_clip's: python benchmarks/clip_step.py [--arch RN50] [--batch-sizes 8 16]

On a GPU: python benchmarks/clip_step.py --device cuda --arch ViT-B-16 --batch-sizes 256 --pairs 20 [--compile]

Both sides: same shapes, real caption lengths (WordNet's glosses from --captions), forward, symmetric InfoNCE, backward,
AdamW. open_clip's side is its model, ClipLoss and torch.optim.AdamW as its trainer builds it, with texts of 77 tokens.
Sides alternate within one run, since the speed of a shared machine drifts; printed is the median of paired ratios.
Each side has a process of its own, since clip.py sets how memory is kept between steps (keep_freed_memory).
A `frozen` step of clip.py has cached caption embeddings; open_clip's locked text tower runs without gradient.
On a GPU both run in bf16 autocast, as their trainers do, and what is printed too is images/s and the share of the rate
of a large bf16 matrix product, measured first, that the step's own operations need (torch counts them).
"""

import argparse
import functools
import math
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path

if any(arg.startswith("clip.py") for arg in sys.argv):
    os.environ["THP_MEM_ALLOC_ENABLE"] = "1"  # before torch is imported, as clip.py does when it is run
import open_clip  # noqa: E402
import torch  # noqa: E402
from torch.utils.flop_counter import FlopCounterMode  # noqa: E402

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import clip  # noqa: E402


def gloss_tokens(path: str, batch_size: int) -> torch.Tensor:
    """[B, 77] tokens of the first glosses of a WordNet data file, spread over the file."""
    glosses = [line.split("|")[1].strip() for line in open(path, encoding="utf-8") if "|" in line]
    return open_clip.SimpleTokenizer()(glosses[:: len(glosses) // batch_size][:batch_size])


def open_clip_step(arch: str, images: torch.Tensor, texts: torch.Tensor, is_locked: bool, is_compiled: bool):
    torch.manual_seed(0)
    model = open_clip.create_model(arch, device=images.device)
    if is_locked:
        model.lock_text_tower()

    def is_gain(name, p):
        return p.ndim < 2 or any(part in name for part in ("bn", "ln", "bias", "logit_scale"))

    named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    groups = [
        {"params": [p for name, p in named if is_gain(name, p)], "weight_decay": 0.0},
        {"params": [p for name, p in named if not is_gain(name, p)], "weight_decay": 0.2},
    ]
    optimizer, loss_of = torch.optim.AdamW(groups, lr=1e-5), open_clip.ClipLoss()
    model.train()
    net = torch.compile(model) if is_compiled else model

    def step():
        optimizer.zero_grad()
        with autocast(images.device):
            image_features, text_features, scale = net(images, texts)[:3]
            loss = loss_of(image_features, text_features, scale)
        loss.backward()
        optimizer.step()
        with torch.no_grad():
            model.logit_scale.clamp_(0, math.log(100))

    return step


def our_step(arch: str, images: torch.Tensor, texts: torch.Tensor, is_frozen: bool, is_compiled: bool):
    torch.manual_seed(0)
    text = dict(arch="transformer", width=clip.ARCHS[arch]["text_width"], vocab_size=49408, context_length=77)
    model = clip.CLIP(arch, clip.ARCHS[arch]["embed_dim"], text, "gelu").to(images.device)
    if arch == "RN50":
        model.visual.to(memory_format=torch.channels_last)
    texts = texts[:, : int(texts.argmax(1).max()) + 1]  # as pad_tokens does
    if is_frozen:
        for parameter in model.text_parameters().values():
            parameter.requires_grad_(False)
        with torch.no_grad():
            texts = model.encode_text(texts)
    optimizer = torch.optim.AdamW(clip.param_groups(model, 0.2), lr=1e-5, fused=True)
    params = [p for group in optimizer.param_groups for p in group["params"] if p.requires_grad]
    model.train()
    if is_compiled:
        model.visual.compile()
        model.transformer.compile()
    precision = functools.partial(autocast, images.device)

    def step():
        clip.backward_in_chunks(model, images, texts, clip.info_nce, 1, precision, lambda loss: loss)
        grad_norm = torch.nn.utils.get_total_norm([p.grad for p in params])
        optimizer.found_inf = (~grad_norm.isfinite()).float()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        with torch.no_grad():
            model.logit_scale.clamp_(0, math.log(100))

    return step


def autocast(device: torch.device):
    return torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda")


def wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def matmul_rate(device: torch.device, n: int = 8192) -> float:
    """Operations/s of a bf16 product of two [n, n] matrices of normal numbers: ten in a row, the median of 10 times."""
    a, b = torch.randn(2, n, n, device=device, dtype=torch.bfloat16)
    times = []
    for _ in range(12):
        wait(device)
        start = time.perf_counter()
        for _ in range(10):
            a @ b
        wait(device)
        times.append(time.perf_counter() - start)
    return 20 * n**3 / statistics.median(times[2:])


def run_side(side: str, args: argparse.Namespace) -> None:
    """Answer the first line on stdin with the operations of a step, and each other with the seconds of one."""
    arch, batch_size, device = args.arch, args.batch_sizes[0], torch.device(args.device)
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
    images = torch.randint(0, 256, (batch_size, 3, 224, 224), dtype=torch.uint8).to(device)
    texts = gloss_tokens(args.captions, batch_size).to(device)

    def make(is_compiled):
        if side.startswith("clip.py"):
            return our_step(arch, images, texts, side.endswith("frozen"), is_compiled)
        return open_clip_step(arch, images.float() / 255, texts, side.endswith("locked"), is_compiled)

    if side.startswith("clip.py") and device.type == "cpu":
        clip.keep_freed_memory()
    sys.stdin.readline()
    operations = 0
    if device.type == "cuda":
        step = make(False)
        with FlopCounterMode(display=False) as counter:
            step()
        operations = counter.get_total_flops()
    step = make(args.compile)
    print(operations, flush=True)
    for _ in sys.stdin:
        wait(device)
        start = time.perf_counter()
        step()
        wait(device)
        print(time.perf_counter() - start, flush=True)


def main(args: argparse.Namespace) -> None:
    if args.side:
        run_side(args.side, args)
        return
    device = torch.device(args.device)
    is_gpu = device.type == "cuda"
    name = torch.cuda.get_device_name(device) if is_gpu else f"{torch.get_num_threads()} threads"
    print(
        f"torch {torch.__version__}, open_clip {open_clip.__version__}, {name}, {args.arch}"
        + (", compiled" if args.compile else "")
    )
    rate = matmul_rate(device) if is_gpu else 0
    if is_gpu:
        print(f"bf16 product of 8192 x 8192 matrices: {rate / 1e12:.0f} TFLOP/s")
    sides = ("open_clip", "open_clip locked", "clip.py", "clip.py frozen")
    for batch_size in args.batch_sizes:
        length = int(gloss_tokens(args.captions, batch_size).argmax(1).max()) + 1
        print(f"batch {batch_size}: texts of {length} of 77 tokens")
        command = [sys.executable, __file__, "--arch", args.arch, "--batch-sizes", str(batch_size)]
        command += ["--captions", args.captions, "--device", args.device, *(["--compile"] if args.compile else [])]
        pipes = dict(stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        processes = {side: subprocess.Popen([*command, "--side", side], **pipes) for side in sides}
        times, operations = {side: [] for side in sides}, {}
        for _ in range(2 if is_gpu else 1):  # all at once: counting on a GPU, and the first step, which compiles
            for process in processes.values():
                print(file=process.stdin, flush=True)
            for side, process in processes.items():
                operations.setdefault(side, float(process.stdout.readline()))
        for i in range(args.pairs + 2):
            for side, process in processes.items():
                print(file=process.stdin, flush=True)
                elapsed = float(process.stdout.readline())
                if i > 1:  # the first two rounds warm up
                    times[side].append(elapsed)
        for process in processes.values():
            process.communicate()
        for name, values in times.items():
            median = statistics.median(values)
            line = f"  {name:<17} {median:7.4f} s a step (of {min(values):.4f} to {max(values):.4f})"
            if is_gpu:
                share = operations[name] / median / rate
                line += f", {batch_size / median:5.0f} images/s, {operations[name] / 1e12:.1f} TFLOP, {share:.0%}"
            print(line)
        for ours, theirs in ((2, 0), (3, 1), (3, 0)):
            ratios = [b / a for a, b in zip(times[sides[ours]], times[sides[theirs]], strict=True)]
            bounds = f"{min(ratios):.2f} to {max(ratios):.2f}"
            print(f"  {sides[theirs]} / {sides[ours]}: median {statistics.median(ratios):.2f} (of {bounds})")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--arch", default="RN50", choices=["RN50", "ViT-B-32", "ViT-B-16"], help="image tower")
    parser.add_argument("--batch-sizes", type=int, nargs="+", default=[8, 16], help="pairs of a step")
    parser.add_argument("--pairs", type=int, default=5, help="counted rounds of the alternation")
    parser.add_argument(
        "--captions", default="/usr/share/wordnet/data.noun", help="WordNet data file (Debian: wordnet-base)"
    )
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--compile", action="store_true", help="torch.compile both")
    parser.add_argument("--side", default="", help="used by the script itself: the one side that this process times")
    main(parser.parse_args())
