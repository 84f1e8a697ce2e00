# /// script
# requires-python = ">=3.10"
# dependencies = ["torch>=2.6", "torchvision>=0.21", "numpy>=1.26", "scipy>=1.11", "pillow>=10.1", "tqdm>=4.66"]
# ///
"""DINO on uncurated data: a student predicts the prototypes its slow teacher assigns to other crops of an image.

Paper: Caron et al., arXiv 2104.14294; sampled prototypes: Wen et al., arXiv 2405.21070, figure 10.

Dimension key: B images of this process, V views, K prototypes, M of them used in a step, D width of a prototype.

Deviations from the paper and its code:
 1. Sinkhorn runs in the log domain: the published exp(logits / temperature) overflows at low temperatures.
 2. Prototypes that a step does not use do not move in it: neither momentum nor weight decay touches their rows. The
    teacher's rows are the running average of the student's, all of them, at every step.
"""

import math

import numpy as np
import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F

# ------------------------------------------------------------------------------ method


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
    rng = np.random.default_rng([seed, step])
    if not power:
        return torch.from_numpy(np.sort(rng.choice(K, M, replace=False)))
    score = power * np.log(usage + 1.0) + rng.gumbel(size=K)
    return torch.from_numpy(np.sort(np.argpartition(-score, M - 1)[:M]))


@torch.no_grad()
def sinkhorn(logits: torch.Tensor, temperature: float, n_iterations: int = 3) -> torch.Tensor:
    """Assign samples to prototypes so that each prototype gets an equal share, over the samples of all processes.

    logits: [n, K] float32; a column of -inf is a prototype that is not there. temperature: > 0.
    Returns: [n, K], each row sums to 1. In the log domain: finite at any temperature.
    Source: SwAV, arXiv 2006.09882, section 3.1. All ranks.
    """
    world_size = dist.get_world_size() if dist.is_initialized() else 1
    log_q = logits / temperature
    for _ in range(n_iterations):
        largest = log_q.amax(0)  # [K]
        if world_size > 1:
            dist.all_reduce(largest, dist.ReduceOp.MAX)  # All ranks
        largest = largest.nan_to_num(neginf=0.0)
        mass = (log_q - largest).exp().sum(0)
        if world_size > 1:
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
    if len(z) > 2:
        loss = loss - torch.einsum("bm,vbm->", q.sum(0), z[2:])
    return loss / (2 * (len(z) - 1) * q.shape[1])


@torch.no_grad()
def unique_prototypes(prototypes: torch.Tensor, eps: float = 0.025, chunk: int = 4096) -> int:
    """Number of prototypes kept by a greedy cover: one is kept if all kept before are at cosine distance >= eps.

    prototypes: [K, D]. O(K * kept) time, O(chunk * kept) memory. Source: methods of arXiv 2410.14060, our reading.
    """
    kept = F.normalize(prototypes.float(), dim=1)[:0]
    for block in F.normalize(prototypes.float(), dim=1).split(chunk):
        if len(kept):
            block = block[(block @ kept.T).amax(1) <= 1 - eps]
        near, alive, chosen = (block @ block.T > 1 - eps).cpu(), torch.ones(len(block), dtype=torch.bool), []
        for i in range(len(block)):
            if alive[i]:
                chosen.append(i)
                alive &= ~near[i]
        kept = torch.cat([kept, block[chosen]])
    return len(kept)

# ------------------------------------------------------------------------------ model


class Head(nn.Module):
    """Projection to unit vectors and their cosines with the prototypes of the step.

    `prototypes` [M, D] are working rows: the table of all K stays outside (PrototypeTable).
    """

    def __init__(self, embed_dim: int, hidden: int, D: int, M: int):
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(embed_dim, hidden), nn.GELU(), nn.Linear(hidden, hidden), nn.GELU(),
                                 nn.Linear(hidden, D))
        for layer in self.mlp:
            if isinstance(layer, nn.Linear):
                nn.init.trunc_normal_(layer.weight, std=0.02)
                nn.init.zeros_(layer.bias)
        self.prototypes = nn.Parameter(torch.zeros(M, D))

    def forward(self, embed: torch.Tensor) -> torch.Tensor:  # [n, embed_dim] -> [n, M] float32
        z = self.mlp(embed).float()
        with torch.autocast(z.device.type, enabled=False):
            return F.normalize(z, dim=1) @ F.normalize(self.prototypes.float(), dim=1).T


class PrototypeTable:
    """All K prototypes and their optimiser state; the optimiser itself only ever sees the M rows of a step.

    load() before the forward pass, store() after the optimiser's step: rows that were not drawn, and their momenta,
    stay as they are to the bit. The bias corrections of Adam count steps, not draws.
    """

    def __init__(self, K: int, D: int, device: torch.device):
        self.weight, self.state = F.normalize(torch.randn(K, D), dim=1).to(device), {}  # state: name -> [K, D]

    @torch.no_grad()
    def load(self, proto_ids: torch.Tensor, rows: nn.Parameter, optimizer: torch.optim.Optimizer) -> None:
        rows.copy_(self.weight[proto_ids])
        for name, values in self.state.items():
            optimizer.state[rows][name].copy_(values[proto_ids])

    @torch.no_grad()
    def store(self, proto_ids: torch.Tensor, rows: nn.Parameter, optimizer: torch.optim.Optimizer) -> None:
        self.weight[proto_ids] = rows.detach()
        for name, value in optimizer.state[rows].items():
            if isinstance(value, torch.Tensor) and value.ndim == 2:
                self.state.setdefault(name, torch.zeros_like(self.weight))[proto_ids] = value


def ema_at(step: int, start: float, steps: int) -> float:
    """The teacher's momentum: a cosine from start to 1."""
    return 1 + (start - 1) * 0.5 * (1 + math.cos(math.pi * step / steps))
