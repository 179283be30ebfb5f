"""The linear path of the AVQ: spatial x temporal components of a patch, dealt out to tokens.

A codec of Gaussian signals needs no more than this path: decorrelate, give every token the same
number of bits' worth of components (reverse water-filling), and quantise each token's components as
one vector at their true scale. It starts in closed form from the covariances of training windows;
the blocks of the network then learn what a Gaussian codec of patches cannot know. Sources: Goyal
2001 (transform coding); Cover & Thomas, section 10.3.3 (reverse water-filling); Rahimi & Recht
2007 (random Fourier features).
"""

import heapq
import math
from collections.abc import Callable

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from transformers import initialization as init

from .configuration_avq import AVQConfig
from .layers_avq import TextMoments, TextProjection


def exactly(tensor):
    """Context in which nothing is computed in half precision on the device of `tensor`."""
    return torch.autocast(tensor.device.type, enabled=False)


class RegionMaps(nn.Module):
    """Maps over the brain as functions of MNI coordinates in mm: (regions, 3) -> (regions, maps).

    Linear in fixed random Fourier features, so that a map can be fitted at the regions of one
    parcellation in closed form and read at any other position. The wavelength bounds how fast it
    changes in between.
    """

    def __init__(self, features, wavelength, maps):
        super().__init__()
        self.wavelength = float(wavelength)
        # Persistent, because the weights mean nothing without them.
        self.register_buffer("frequencies", torch.zeros(3, features))
        self.weight = nn.Parameter(torch.zeros(2 * features + 1, maps))

    def features(self, coordinates):
        """Features (batch or 1, regions, 2 * features + 1), rows of about unit length."""
        # Half precision would blur millimetres.
        with exactly(coordinates):
            phase = coordinates @ self.frequencies * (2 * math.pi / self.wavelength)
            waves = torch.cat([phase.sin(), phase.cos()], -1) / self.frequencies.shape[1] ** 0.5
            return torch.cat([waves, torch.full_like(waves[..., :1], 0.3)], -1)

    def forward(self, coordinates):
        return self.features(coordinates) @ self.weight

    @torch.no_grad()
    def fit(self, coordinates, maps):
        """Take the values `maps` (regions, maps) at `coordinates` (regions, 3), smoothly."""
        rows = self.features(coordinates).double()
        kernel = rows @ rows.T
        kernel.diagonal().add_(1e-4)  # regions at one place would otherwise ask for the impossible
        self.weight.copy_(rows.T @ torch.linalg.solve(kernel, maps.double()))


def rate_level(variances, bits):
    """Water level of reverse water-filling: `variances` (components,) share `bits`; float."""
    ordered = variances.clamp(min=1e-12 * float(variances.max())).sort(descending=True).values
    number = torch.arange(1, len(ordered) + 1, dtype=ordered.dtype)
    levels = 2.0 ** ((ordered.log2().cumsum(0) - 2.0 * bits) / number)
    return float(levels[max(1, int((levels <= ordered).sum())) - 1])


def deal_components(variances, bits, hands, cards):
    """Deal components to `hands` so that all need about the same rate; int64 (hands, cards).

    `variances` (components,); `bits` of all hands together. A component goes to the hand with the
    least rate so far; those below the water level fill what is left. An empty place holds the
    number of components.
    """
    variances = variances.cpu()  # one by one below
    level = rate_level(variances, bits)
    held: list[list[int]] = [[] for _ in range(hands)]
    queue = [(0.0, hand) for hand in range(hands)]
    for index in variances.argsort(descending=True, stable=True).tolist()[: hands * cards]:
        rate, hand = heapq.heappop(queue)
        held[hand].append(index)
        # Below the level the number of components counts.
        rate += max(0.5 * math.log2(max(float(variances[index]), 1e-30) / level), 1e-3)
        if len(held[hand]) < cards:
            heapq.heappush(queue, (rate, hand))
    empty = len(variances)
    return torch.tensor([hand + [empty] * (cards - len(hand)) for hand in held])


class PatchComponents(nn.Module):
    """Patches of regions to components and back: (.., patch_length, regions) <-> (.., components).

    Component `t * maps + m` is temporal shape t of spatial map m.
    """

    def __init__(self, config):
        super().__init__()
        self.maps, self.length = config.num_components, config.patch_length
        sizes = (config.position_features, config.position_wavelength, config.num_components)
        self.analysis, self.synthesis = RegionMaps(*sizes), RegionMaps(*sizes)
        self.shapes = nn.Parameter(torch.zeros(self.length, self.length))
        self.shapes_back = nn.Parameter(torch.zeros(self.length, self.length))
        self.register_buffer("regions", torch.ones(()))  # of the parcellation it was started with
        self.register_buffer("started", torch.zeros((), dtype=torch.bool))

    def begin(self):
        """Shapes of rising frequency (DCT), until `AVQModel.start_components`."""
        time = torch.arange(self.length, dtype=torch.float32)
        shapes = torch.cos(math.pi / self.length * (time[:, None] + 0.5) * time)
        shapes = shapes / shapes.norm(dim=0)
        init.copy_(self.shapes, shapes)
        init.copy_(self.shapes_back, shapes)
        init.ones_(self.regions)
        init.zeros_(self.started)

    def forward(self, patches, coordinates, region_mask):
        """Components (batch, patches, patch_length * maps) of (batch, patches, time, regions)."""
        with exactly(patches):
            return self._forward(patches, coordinates, region_mask)

    def _forward(self, patches, coordinates, region_mask):
        # Sums over regions stand for integrals over the brain, whatever number is present.
        scale = self.regions * region_mask / region_mask.sum(-1, keepdim=True).clamp(min=1)
        patches = patches * scale.to(patches.dtype)[:, None, None]
        maps = self.analysis(coordinates).to(patches.dtype)
        mixed = multiply_shared(patches.flatten(1, 2), maps).view(-1, self.length, self.maps)
        # NOTE: a copy of the transposed shapes makes this product five times faster on CPU.
        shapes = self.shapes.to(mixed.dtype).T.contiguous().expand(len(mixed), -1, -1)
        return torch.bmm(shapes, mixed).view(*patches.shape[:2], -1)

    def inverse(self, components, coordinates):
        """Patches (batch, patches, time, regions) at any coordinates."""
        with exactly(components):
            return self._inverse(components, coordinates)

    def _inverse(self, components, coordinates):
        mixed = components.unflatten(2, (self.length, self.maps))
        mixed = self.shapes_back.to(mixed.dtype) @ mixed
        maps = self.synthesis(coordinates).to(mixed.dtype).transpose(1, 2)
        return multiply_shared(mixed.flatten(1, 2), maps).unflatten(1, mixed.shape[1:3])


def multiply_shared(rows, matrix):
    """rows (batch, rows, k) times matrix (batch or 1, k, columns)."""
    return rows @ (matrix[0] if matrix.shape[0] == 1 else matrix)


class Deal(nn.Module):
    """Which components each of `hands` holds, `cards` of them: a permutation and its inverse."""

    def __init__(self, hands, cards, components):
        super().__init__()
        self.components = components
        # One place more than there are components: the empty ones point to it.
        self.register_buffer("chosen", torch.zeros(hands, cards, dtype=torch.int64))

    def begin(self):
        """In turn, in the components' order."""
        hands, cards = self.chosen.shape
        order = torch.arange(hands * cards).clamp(max=self.components)
        init.copy_(self.chosen, order.view(cards, hands).T)

    def forward(self, components):
        """(batch, patches, components) -> (batch, patches, hands, cards)."""
        padded = torch.cat([components, torch.zeros_like(components[..., :1])], -1)
        # NOTE: on CPU half the time of padded[..., self.chosen], and a third of it backwards.
        chosen = self.chosen.flatten().expand(*padded.shape[:-1], -1)
        return padded.gather(-1, chosen).unflatten(-1, self.chosen.shape)

    def inverse(self, dealt):
        """(batch, patches, hands, cards) -> (batch, patches, components); others are 0."""
        out = dealt.new_zeros(*dealt.shape[:2], self.components + 1)
        return out.index_copy(2, self.chosen.flatten(), dealt.flatten(2))[..., :-1]


class Correction(nn.Linear):
    """What the blocks add to the linear path; begins near nothing."""


def covariances(values, region_mask, time_mask, patch_length):
    """Sums of products of windows (batch, time, regions): of regions, of samples of a patch, and
    the number of samples behind each pair of regions.
    """
    values, mask = values.double(), region_mask.double()
    patches = values.unflatten(1, (-1, patch_length))  # (batch, patches, patch_length, regions)
    # Half a patch would say that its second half is quiet.
    patches = patches[time_mask.unflatten(1, (-1, patch_length)).all(-1)]
    spatial = (values.transpose(1, 2) @ values).sum(0)
    temporal = torch.einsum("ptr,psr->ts", patches, patches)
    return spatial, temporal, (mask * time_mask.sum(1, keepdim=True)).T @ mask


class ComponentStart:
    """The closed-form start of `AVQModel`'s linear path."""

    config: AVQConfig
    components: PatchComponents
    deal: Deal
    ranks: Deal
    token_maps: RegionMaps
    token_maps_back: RegionMaps
    projection: TextProjection
    text_moments: TextMoments
    read_code: nn.Linear
    _prepare: Callable
    _encode: Callable

    @torch.no_grad()
    def start_components(self, batches, elsewhere=()) -> None:
        """Start the linear path in closed form from `batches`, keyword inputs of `encode`.

        Spatial maps and temporal shapes become the principal components of the batches' windows,
        which must be of one parcellation and of training subjects; the components are dealt out to
        the tokens; P begins where text lies, and the decoder at reading P(code). Call it after
        `set_text_space`. All processes' windows count. A model whose codebook starts by itself
        does this at its first training forward, from the one batch. `elsewhere`, where given, holds
        the same windows in the regions of another parcellation: the maps then fit both.
        """
        inputs = [self._prepare(**batch) for batch in batches]
        coordinates = inputs[0][1][:1]
        length = self.config.patch_length
        sums = [covariances(values, space, time, length) for values, _, space, time in inputs]
        spatial, temporal, pairs = (torch.stack(part).sum(0) for part in zip(*sums, strict=True))
        distributed = dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1
        if distributed:
            for part in (spatial, temporal, pairs):
                dist.all_reduce(part)
        self._take_components(spatial / pairs.clamp(min=1), temporal, coordinates[0])
        if any(elsewhere):
            others = [self._prepare(**batch) for batch in elsewhere]
            self._take_maps_elsewhere(inputs, others, distributed)
        vectors = torch.cat([self._vectors(*one) for one in inputs[:8]])
        codes = F.normalize(vectors, dim=-1)
        self.projection.take_codes(codes)
        if bool(self.text_moments.fitted):
            self.projection.match(self.text_moments.mean, self.text_moments.axes(), codes)
        self._fit_read_code(vectors)
        self.components.started.fill_(True)
        if distributed:  # the same bits everywhere, whatever the machines' libraries
            parts = [self.components, self.deal, self.projection, self.read_code]
            if self.config.token_layout == "grid":
                parts += [self.ranks, self.token_maps, self.token_maps_back]
            for part in parts:
                for tensor in part.state_dict().values():
                    dist.broadcast(tensor, src=0)

    def _vectors(self, values, coordinates, region_mask, time_mask):
        """Unnormalised code vectors (vectors, code_dim) of the patches that hold data."""
        latents = self._encode(values, coordinates, region_mask, time_mask)[0]
        present = time_mask.unflatten(1, (-1, self.config.patch_length)).any(-1)
        return latents.unflatten(1, (present.shape[1], -1))[present].flatten(0, 1)

    def _take_components(self, spatial, temporal, coordinates):
        config, parts = self.config, self.components
        regions, grid = len(spatial), config.token_layout == "grid"
        space, maps = (part.flip(-1) for part in torch.linalg.eigh(spatial))
        time, shapes = (part.flip(-1) for part in torch.linalg.eigh(temporal))
        spare = max(0, config.num_components - regions)
        space = F.pad(space, (0, spare))[: config.num_components].clamp(min=0)
        maps = F.pad(maps, (0, spare))[:, : config.num_components]
        time = time.clamp(min=0) * config.patch_length / time.sum()
        variances = torch.outer(time, space).flatten()
        tokens = regions if grid else config.num_latents
        bits = tokens * math.log2(config.num_codes)
        self.deal.chosen.copy_(deal_components(variances, bits, *self.deal.chosen.shape))
        parts.regions.fill_(regions)
        parts.analysis.fit(coordinates, maps)
        parts.synthesis.fit(coordinates, maps)
        coded = self.deal.chosen.flatten()
        if grid:
            # Tokens share the components of about one variance; which token gets which is turned
            # by the maps, so that a token belongs to its region.
            ranks, most = len(self.ranks.chosen), min(config.num_components, regions)
            ranked = variances.argsort(descending=True, stable=True)[: ranks * most]
            coded = F.pad(ranked, (0, ranks * most - len(ranked)), value=len(variances))
            # NOTE: no more maps than regions turn anything; what is dealt to others would be lost.
            empty = config.num_components - most
            turned = F.pad(coded.view(ranks, most), (0, empty), value=len(variances))
            self.ranks.chosen.copy_(turned)
            self.token_maps.fit(coordinates, maps)
            self.token_maps_back.fit(coordinates, maps)
        # A token's components have length one on average.
        energy = variances[coded[coded < len(variances)]].sum()
        unit = (energy / tokens).sqrt().clamp(min=1e-6)
        parts.shapes.copy_(shapes / unit)
        parts.shapes_back.copy_(shapes * unit)

    def _take_maps_elsewhere(self, inputs, others, distributed):
        """Fit the maps at the regions of `others` too, by least squares over the same windows."""
        parts = self.components
        sums: tuple = ()
        for (values, coordinates, mask, _), (there, _, mask_there, _) in zip(
            inputs, others, strict=True
        ):
            scale = parts.regions * mask / mask.sum(-1, keepdim=True).clamp(min=1)
            heard = (values * scale[:, None]) @ parts.analysis(coordinates)  # (batch, time, maps)
            heard, there = heard.flatten(0, 1).double(), there.flatten(0, 1).double()
            seen = (mask_there.double() * values.shape[1]).sum(0)
            total = torch.full_like(seen[:1], len(heard))
            new = (heard.T @ heard, heard.T @ there, there.T @ there, seen, total)
            sums = tuple(a + b for a, b in zip(sums, new, strict=True)) if sums else new
        if distributed:
            for part in sums:
                dist.all_reduce(part)
        own, cross, regions, seen, total = sums
        cross = cross * (total / seen.clamp(min=1))  # as if no region were missing anywhere

        def solve(gram, right, ridge):
            size = ridge * gram.diagonal().mean()
            return torch.linalg.solve(gram + size * torch.eye(len(gram)).to(gram), right)

        at = torch.cat([inputs[0][1][0], others[0][1][0]])
        here = parts.synthesis(inputs[0][1][:1])[0]
        parts.synthesis.fit(at, torch.cat([here, solve(own, cross, 1e-4).T.to(here)]))
        here = parts.analysis(inputs[0][1][:1])[0]
        read = solve(regions, cross.T, 1e-2).to(here) * (len(regions) / parts.regions)
        parts.analysis.fit(at, torch.cat([here, read]))

    def _fit_read_code(self, vectors):
        """Let the decoder read P(code) as the components of code vectors before normalisation."""
        rows = self.projection(F.normalize(vectors, dim=-1))
        rows = self.text_moments(self.projection.standardize(rows)).double()
        mean, wanted = rows.mean(0), vectors[:, :-1].double()
        rows, centre = rows - mean, wanted.mean(0)
        gram = rows.T @ rows
        gram.diagonal().add_(1e-6 * gram.diagonal().mean() + 1e-12)
        weight = torch.linalg.solve(gram, rows.T @ (wanted - centre)).T
        self.read_code.weight.copy_(weight)
        self.read_code.bias.copy_(centre - weight @ mean)
