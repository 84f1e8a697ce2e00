"""Training step of dino_laionet.py, all prototypes used, against the public DINO's: python benchmarks/dino_step.py DINO

DINO is a checkout of the public code: git clone https://github.com/facebookresearch/dino DINO

Both sides: the same random crops, two of 224 px and --local-crops of 96 px; student forward and backward, teacher
forward on the large ones, centred targets, loss, gradient clipping, AdamW, the teacher's average; fp32 on a CPU. The
public side is its own networks, loss, clipping and parameter groups in the order of its train_one_epoch, without what
needs a GPU or several processes, and without stochastic depth; its crops are normalised already, ours are not. Sides
alternate within one run, each in a process of its own, since dino_laionet.py sets how memory is kept between steps
(keep_freed_memory). Printed are medians of wall-clock and of CPU time, which tells more on a shared machine.
"""

import argparse
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path

if "--side=ours" in sys.argv:
    os.environ["THP_MEM_ALLOC_ENABLE"] = "1"  # before torch is imported, as dino_laionet.py does when it is run
import torch  # noqa: E402

ROOT = Path(__file__).resolve().parent.parent
STUDENT_TEMP, TEACHER_TEMP, CLIP, LR, DECAY, EMA = 0.1, 0.04, 3.0, 5e-4, 0.04, 0.996


def public_step(repository, K, crops):
    sys.path.insert(0, str(repository))
    import main_dino
    import utils
    import vision_transformer

    store = torch.distributed.HashStore()  # its centre is averaged over processes
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    nets = []
    for _ in range(2):
        tower = vision_transformer.vit_small(patch_size=16)
        nets.append(utils.MultiCropWrapper(tower, main_dino.DINOHead(tower.embed_dim, K)))
    student, teacher = nets
    teacher.load_state_dict(student.state_dict())
    teacher.requires_grad_(False)
    loss_of = main_dino.DINOLoss(K, len(crops), TEACHER_TEMP, TEACHER_TEMP, 0, 1)
    optimizer = torch.optim.AdamW(utils.get_params_groups(student))
    crops = [crop / 255 for crop in crops]

    def step():
        for i, group in enumerate(optimizer.param_groups):
            group["lr"] = LR
            if i == 0:
                group["weight_decay"] = DECAY
        teacher_output = teacher(crops[:2])
        loss = loss_of(student(crops), teacher_output, 0)
        loss.item()
        optimizer.zero_grad()
        loss.backward()
        utils.clip_gradients(student, CLIP)
        utils.cancel_gradients_last_layer(1, student, 1)
        optimizer.step()
        with torch.no_grad():
            for param_q, param_k in zip(student.parameters(), teacher.parameters()):
                param_k.data.mul_(EMA).add_((1 - EMA) * param_q.detach().data)

    return step


def our_step(K, crops):
    """The step of main, with M = K."""
    sys.path.insert(0, str(ROOT))
    import dino_laionet as dino

    dino.keep_freed_memory()
    student = dino.Network("ViT-S-16", 2048, 256, K, False)
    table = dino.PrototypeTable(K, 256, torch.device("cpu"))
    teacher = dino.copy.deepcopy(student).requires_grad_(False)
    teacher_prototypes = table.weight.clone()
    student.head.prototypes.data, teacher.head.prototypes.data = table.weight, teacher_prototypes
    student_params, teacher_params = (
        [p for name, p in net.named_parameters() if name != "head.prototypes"] for net in (student, teacher)
    )
    center, usage = torch.zeros(K), torch.zeros(K, dtype=torch.int64)
    last_won = torch.zeros(K, dtype=torch.int64)
    optimizer = torch.optim.AdamW(dino.param_groups(student, DECAY), LR, (0.9, 0.98), eps=1e-8, fused=True)
    params = [p for group in optimizer.param_groups for p in group["params"]]
    n_global = len(crops[0]) * 2
    crops = [torch.cat([x for x in crops if x.shape[2] == size]) for size in dict.fromkeys(x.shape[2] for x in crops)]

    def step():
        proto_ids = dino.draw_prototypes(K, K, 0, 0)
        table.load(proto_ids, student.head.prototypes, optimizer)
        with torch.no_grad():
            teacher_logits, _ = teacher([crops[0][:n_global]])
        student_logits, _ = student(crops)
        targets = dino.center_and_sharpen(teacher_logits, center, proto_ids, TEACHER_TEMP)
        loss = dino.dino_loss(student_logits, targets, STUDENT_TEMP)
        loss.backward()
        grad_norm = dino.clip_gradients(params, CLIP, True)
        dino.check_finite(0, {"loss": loss}, int(~grad_norm.isfinite()), None)
        optimizer.found_inf = (~grad_norm.isfinite()).float()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        table.store(proto_ids, student.head.prototypes, optimizer)
        with torch.no_grad():
            torch._foreach_lerp_(teacher_params, student_params, 1 - EMA)
            teacher_prototypes.lerp_(table.weight, 1 - EMA)
            winners = proto_ids[targets.argmax(1)]
            won = torch.zeros_like(usage).index_add_(0, winners, torch.ones_like(winners))
            usage.add_(won)
            last_won.masked_fill_(won > 0, 1)

    return step


def run_side(args):
    """Answer each line on stdin with the wall-clock and CPU seconds of one step."""
    torch.manual_seed(0)
    sizes = [224] * 2 + [96] * args.local_crops
    crops = [torch.randint(0, 256, (args.batch_size, 3, size, size)).float() for size in sizes]
    step = our_step(args.K, crops) if args.side == "ours" else public_step(args.dino, args.K, crops)
    for _ in sys.stdin:
        start = time.perf_counter(), time.process_time()
        step()
        print(time.perf_counter() - start[0], time.process_time() - start[1], flush=True)


def main(args):
    if args.side:
        run_side(args)
        return
    if not (args.dino / "main_dino.py").is_file():
        raise SystemExit(f"{args.dino}: no main_dino.py; git clone https://github.com/facebookresearch/dino")
    print(
        f"torch {torch.__version__}, {torch.get_num_threads()} threads, ViT-S/16, batch {args.batch_size}, "
        f"2 + {args.local_crops} crops, K {args.K:,}, {args.pairs} pairs"
    )
    command = [sys.executable, *sys.argv]
    pipes = dict(stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    sides = {side: subprocess.Popen([*command, f"--side={side}"], **pipes) for side in ("public", "ours")}
    times = {side: [] for side in sides}
    n_warmup = 5  # until both sides have the memory that they need
    for i in range(n_warmup + args.pairs):
        for side, process in sides.items():
            print(file=process.stdin, flush=True)
            elapsed = tuple(map(float, process.stdout.readline().split()))
            times[side] += [elapsed] if i >= n_warmup else []
    for process in sides.values():
        process.communicate()
    for clock, name in enumerate(("wall-clock", "CPU time")):
        public, ours = ([pair[clock] for pair in times[side]] for side in ("public", "ours"))
        ratios, medians = [a / b for a, b in zip(public, ours)], [statistics.median(x) for x in (public, ours)]
        print(
            f"{name}: public {medians[0]:.2f} s, ours {medians[1]:.2f} s, ratio {medians[0] / medians[1]:.2f}; pairs "
            f"{statistics.median(ratios):.2f} (of {min(ratios):.2f} to {max(ratios):.2f})"
        )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("dino", type=Path, help="checkout of the public code")
    parser.add_argument("--batch-size", type=int, default=8, help="images of a step")
    parser.add_argument("--local-crops", type=int, default=4, help="crops of 96 px")
    parser.add_argument("--K", type=int, default=65_536, help="prototypes")
    parser.add_argument("--pairs", type=int, default=5, help="counted rounds of the alternation")
    parser.add_argument("--side", default="", help="used by the script itself: the one side that this process times")
    main(parser.parse_args())
