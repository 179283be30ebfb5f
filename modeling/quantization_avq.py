"""The codebook of the AVQ: cosine lookup, straight-through, k-means start, EMA, revival."""

from typing import NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from transformers.utils import logging

from .code_search_avq import halved, nearest_branches, nearest_code, spherical_kmeans

logger = logging.get_logger(__name__)

# A code is the mean of this many vectors, each of another scan.
NEIGHBOURS = 3


class QuantizerOutput(NamedTuple):
    """What the codebook returns, with its health.

    quantized : float32, shape (..., code_dim)
        Unit-norm codes with the straight-through gradient.
    codes : int64, shape (...)
    commitment_loss : float32, scalar
    perplexity : float32, scalar
        exp(entropy) of the codes of this batch, over all processes; 1 to num_codes.
    usage : float32, scalar
        Share of the codebook whose running count is above the revival threshold.
    """

    quantized: torch.Tensor
    codes: torch.Tensor
    commitment_loss: torch.Tensor
    perplexity: torch.Tensor
    usage: torch.Tensor


def straight_through(continuous: torch.Tensor, quantized: torch.Tensor) -> torch.Tensor:
    """Value of `quantized`, gradient of `continuous`.

    Source: Bengio et al. 2013; van den Oord et al. 2017.
    """
    return continuous + (quantized - continuous).detach()


def rotate(continuous: torch.Tensor, quantized: torch.Tensor) -> torch.Tensor:
    """Value of `quantized`; the gradient is turned by the rotation that takes one to the other.

    Both (..., code_dim) of unit length. Where straight-through copies the gradient, this keeps its
    angle to the code. Source: Fifty et al. 2024 (the rotation trick), here without their rescaling,
    as both sides have length one.
    """
    with torch.no_grad():
        middle = F.normalize(continuous + quantized, dim=-1)
    start = continuous.detach()
    along = (continuous * middle).sum(-1, keepdim=True) * middle
    turned = continuous - 2 * along + 2 * (continuous * start).sum(-1, keepdim=True) * quantized
    # The product equals `quantized` up to rounding; codes must be exact.
    return turned + (quantized - turned).detach()


def _world_size() -> int:
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def gather_rows(rows: torch.Tensor) -> torch.Tensor:
    """Rows of all processes, in rank order; every process must bring the same number."""
    if _world_size() == 1:
        return rows
    parts = [torch.empty_like(rows) for _ in range(_world_size())]
    dist.all_gather(parts, rows.contiguous())
    return torch.cat(parts)


class AVQCodebook(nn.Module):
    """Codebook on the unit sphere.

    Tricks used: factorised low-dimensional codes and cosine lookup (Yu et al. 2022, ViT-VQGAN); EMA
    update (van den Oord et al. 2017); k-means start and revival of dead codes (Zeghidour et al.
    2021, SoundStream), where a revived code is the mean of vectors of several scans, never one
    person's; counts and sums added over all processes; always float32.

    It may have `branches` of equally many codes each, one after the other: a vector is compared
    with the branches' mean codes, then with the codes of the few nearest branches, and not with all
    (as in tree-searched quantisation, Buzo et al. 1980, and inverted files, Jegou et al. 2011).
    Nothing more is stored, and nothing more is learned: a branch is where its codes are.

    It starts by `start`, or by itself at the first training forward after `start_step` of them:
    each code then begins as a revived one does.

    Until then noise may stand for the quantisation to come: a channel of as few bits teaches the
    encoder to spend them well, where one without noise would have to be unlearned.

    All state that changes a decision (counts, sums, clock, started or not) is a persistent buffer.
    """

    def __init__(
        self,
        num_codes,
        code_dim,
        ema_decay,
        revival_threshold,
        revival_interval,
        gradient="straight_through",
        start_step=None,
        start_noise=0.0,
        branches=1,
    ):
        super().__init__()
        self.branches = int(branches)
        self.start_step = start_step
        self.start_noise = float(start_noise)
        self.pass_gradient = rotate if gradient == "rotation" else straight_through
        self.ema_decay = float(ema_decay)
        self.revival_threshold = float(revival_threshold)
        self.revival_interval = int(revival_interval)
        self.register_buffer("codebook", torch.zeros(num_codes, code_dim))
        self.register_buffer("code_sum", torch.zeros(num_codes, code_dim))
        self.register_buffer("code_count", torch.zeros(num_codes))
        self.register_buffer("updates", torch.zeros((), dtype=torch.int64))
        self.register_buffer("initialized", torch.zeros((), dtype=torch.bool))

    @property
    def num_codes(self) -> int:
        return self.codebook.shape[0]

    def lookup(self, codes: torch.Tensor) -> torch.Tensor:
        """Codes int64 (...) to unit vectors float32 (..., code_dim)."""
        return F.embedding(codes, self.codebook)

    def encode(self, latents: torch.Tensor) -> torch.Tensor:
        """Codes int64 (batch, tokens) of `latents` (batch, tokens, code_dim), as in `forward`."""
        return self._nearest(F.normalize(latents.float(), dim=-1))

    def search(self, vectors: torch.Tensor) -> torch.Tensor:
        """Codes int64 (vectors,) of unit `vectors` (vectors, code_dim)."""
        return nearest_code(vectors, self.codebook, self.branches)

    def _nearest(self, units):
        return self.search(units.flatten(0, -2)).view(units.shape[:-1])

    def forward(
        self,
        latents: torch.Tensor,
        token_mask: torch.Tensor | None = None,
        update: bool | None = None,
    ) -> QuantizerOutput:
        """Quantise `latents` (batch, tokens, code_dim) and `update` the codebook.

        `token_mask` (batch, tokens) marks the tokens that hold data: the others get a code but do
        not count. `update` defaults to whether the module is in training mode.
        """
        latents = F.normalize(latents.float(), dim=-1)  # (batch, tokens, code_dim)
        if token_mask is None:
            token_mask = torch.ones(latents.shape[:-1], dtype=torch.bool, device=latents.device)
        update = self.training if update is None else update
        if update and self.start_step is not None and not bool(self.initialized):
            self._start_when_due(latents.detach(), token_mask)
        if not bool(self.initialized):
            # Before the k-means start training runs without quantisation, so that there is
            # something to cluster.
            if self.training and self.start_noise:
                noise = torch.randn_like(latents) / latents.shape[-1] ** 0.5
                latents = F.normalize(latents + self.start_noise * noise, dim=-1)
            zero = latents.new_zeros(())
            codes = torch.zeros(latents.shape[:-1], dtype=torch.int64, device=latents.device)
            return QuantizerOutput(latents, codes, zero, zero, zero)
        codes = self._nearest(latents)
        chosen = self.lookup(codes)
        error = (latents - chosen).square().sum(-1)  # (batch, tokens)
        commitment_loss = (error * token_mask).sum() / token_mask.sum().clamp(min=1)
        counts = torch.bincount(codes[token_mask], minlength=self.num_codes).float()
        if update:
            with torch.no_grad():
                counts = self._update(latents.detach(), codes, token_mask, counts)
        share = counts / counts.sum().clamp(min=1)
        perplexity = torch.exp(-(share * (share + 1e-10).log()).sum())
        return QuantizerOutput(
            self.pass_gradient(latents, chosen), codes, commitment_loss, perplexity, self.usage()
        )

    def usage(self) -> torch.Tensor:
        """Share of codes whose running count is above the revival threshold, scalar in [0, 1]."""
        mean = self.code_count.mean().clamp(min=1e-12)
        return (self.code_count > self.revival_threshold * mean).float().mean()

    def start(self, vectors: torch.Tensor, seed: int = 0) -> None:
        """Place the codebook by k-means on all processes' `vectors` (vectors, code_dim)."""
        if _world_size() > 1:  # masked tokens can make the processes' numbers of vectors differ
            count = torch.tensor(len(vectors), device=vectors.device)
            dist.all_reduce(count, op=dist.ReduceOp.MIN)
            vectors = vectors[: int(count)]
        vectors = F.normalize(gather_rows(vectors.float()), dim=-1)
        centres = spherical_kmeans(vectors, self.num_codes, seed=seed, branches=self.branches)
        if _world_size() > 1:  # k-means is deterministic, but a broadcast makes equality certain
            dist.broadcast(centres, src=0)
        self.codebook.copy_(centres)
        self.code_count.fill_(1.0)
        self.code_sum.copy_(centres)
        self.initialized.fill_(True)

    @torch.no_grad()
    def _start_when_due(self, latents, token_mask):
        """Count the training forwards before the start; then place every code where data are.

        Where a batch has fewer vectors than there are codes the others begin as copies that nothing
        counts for, and the revivals to come move them to the data of later batches.
        """
        if int(self.updates) < self.start_step:
            self.updates += 1
            return
        pool, owner, scans = _vectors_of_scans(latents, token_mask)
        if scans < 2 * NEIGHBOURS:
            logger.warning_once(
                f"The codebook is due to start, but a batch holds {scans} scans; expected "
                f"{2 * NEIGHBOURS} or more, so that no code is one person's vector. It waits for "
                "such a batch: raise the batch size, or call AVQModel.start_codebook."
            )
            return
        generator = torch.Generator().manual_seed(int(self.updates))
        anchors = torch.randperm(len(pool), generator=generator)[: self.num_codes]
        means = _means_over_scans(pool, owner, anchors.to(pool.device))
        number = torch.arange(self.num_codes, device=means.device)
        number = torch.cat(halved(means[number % len(means)], self.branches))
        if _world_size() > 1:
            dist.broadcast(number, src=0)
        self.codebook.copy_(means[number % len(means)])
        self.code_count.copy_((number < len(means)).float())
        self.code_sum.copy_(self.codebook * self.code_count[:, None])
        self.initialized.fill_(True)

    def _update(self, latents, codes, token_mask, counts):
        flat = latents[token_mask]
        sums = torch.zeros_like(self.code_sum).index_add_(0, codes[token_mask], flat)
        if _world_size() > 1:
            # One all-reduce for both; every process must therefore run the same number of training
            # forwards.
            stacked = torch.cat([counts[:, None], sums], dim=1)
            dist.all_reduce(stacked)
            counts, sums = stacked[:, 0].contiguous(), stacked[:, 1:].contiguous()
        self.updates += 1
        self.code_count.mul_(self.ema_decay).add_(counts, alpha=1 - self.ema_decay)
        self.code_sum.mul_(self.ema_decay).add_(sums, alpha=1 - self.ema_decay)
        self.codebook.copy_(
            torch.where(
                (self.code_sum.norm(dim=-1) > 1e-8)[:, None],
                F.normalize(self.code_sum, dim=-1),
                self.codebook,
            )
        )
        if int(self.updates) % self.revival_interval == 0:
            self._revive(latents, token_mask)
        return counts

    def _revive(self, latents, token_mask):
        """Move dead codes to where data are, each to the mean of vectors of several scans."""
        mean = self.code_count.mean()
        dead = (self.code_count < self.revival_threshold * mean).nonzero()[:, 0]
        pool, owner, scans = _vectors_of_scans(latents, token_mask)
        if len(dead) == 0 or scans < 2 * NEIGHBOURS:
            return
        generator = torch.Generator().manual_seed(int(self.updates))
        if len(dead) > len(pool):
            dead = dead[torch.randperm(len(dead), generator=generator)[: len(pool)].to(dead.device)]
        order = torch.randperm(len(pool), generator=generator).to(pool.device)
        dead, anchors = self._anchors(dead, pool, order)
        revived = _means_over_scans(pool, owner, anchors)
        # Count and sum are reset together with the code: otherwise the next EMA step would undo the
        # revival.
        self.codebook[dead] = revived
        self.code_count[dead] = mean
        self.code_sum[dead] = revived * mean

    def _anchors(self, dead, pool, order):
        """For each of the codes `dead` a row of `pool` in the code's branch, taken in `order`.

        Returns the codes that got one, and those rows. A branch whose codes are all dead takes the
        place of the vectors around one of the pool.
        """
        if self.branches == 1:
            return dead, order[: len(dead)]
        book = self.codebook.unflatten(0, (self.branches, -1))
        branch, dead = nearest_branches(pool, book, 1)[0], dead.sort().values
        own = dead // book.shape[1]
        wanted = torch.bincount(own, minlength=self.branches)
        for deserted in (wanted == book.shape[1]).nonzero()[:, 0].tolist():
            near = pool @ pool[order[deserted % len(order)]]
            branch[near.topk(min(book.shape[1], len(near))).indices] = deserted
        if _world_size() > 1:
            dist.broadcast(branch, src=0)
        order = order[branch[order].argsort(stable=True)]  # branch by branch
        there = torch.bincount(branch, minlength=self.branches)
        # The first dead code of a branch takes the first of its vectors, and so on.
        place = torch.arange(len(dead), device=dead.device) - (wanted.cumsum(0) - wanted)[own]
        found = place < there[own]
        place = place + (there.cumsum(0) - there)[own]
        return dead[found], order[place[found]]


def _vectors_of_scans(latents, token_mask):
    """All processes' valid vectors (vectors, code_dim), their scans, and how many scans."""
    scan = torch.arange(latents.shape[0], device=latents.device)[:, None].expand(latents.shape[:2])
    # Masked tokens stay in the pool's shape (processes must agree on it) and are never chosen.
    pool, owner = gather_rows(latents.flatten(0, 1)), gather_rows(scan.reshape(-1))
    valid = gather_rows(token_mask.reshape(-1).to(torch.uint8)).bool()
    per_process = latents.shape[0] * latents.shape[1]
    owner = owner + torch.arange(len(owner), device=owner.device) // per_process * latents.shape[0]
    # Scans without a valid token leave gaps; numbered anew, every group below holds two scans or
    # more.
    pool, (scans, owner) = pool[valid], owner[valid].unique(return_inverse=True)
    return pool, owner, len(scans)


def _means_over_scans(pool, owner, anchors):
    """Unit means (anchors, code_dim) of the vectors of other scans nearest to each anchor.

    `pool` (vectors, code_dim) belongs to scans `owner` (vectors,); `anchors` are rows of it. The
    same bits on every process.
    """
    means = torch.empty(len(anchors), pool.shape[1], device=pool.device)
    for part in torch.arange(len(anchors), device=pool.device).split(1024):
        anchor = anchors[part]
        with torch.autocast(pool.device.type, enabled=False):
            similarity = pool[anchor] @ pool.T  # (codes, pool)
        similarity.masked_fill_(owner[anchor][:, None] == owner[None], -2.0)
        # One neighbour from each of several disjoint groups of scans: a mean over different
        # people, always.
        near = [
            similarity.masked_fill(owner[None] % NEIGHBOURS != group, -3.0).argmax(-1)
            for group in range(NEIGHBOURS)
        ]
        means[part] = F.normalize(sum(pool[index] for index in near), dim=-1)
    if _world_size() > 1:
        dist.broadcast(means, src=0)
    return means
