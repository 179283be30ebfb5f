"""The linear path of the connectivity stream, and its start in closed form.

A symmetric matrix between regions becomes coordinates between maps (U^T M U), these become
components (a Karhunen-Loeve transform), and those are dealt out to tokens as in `components_avq`.
Everything is linear, so that a covariance and a water level say what is best.
"""

import math

import torch
import torch.nn.functional as F
from torch import nn

from .code_search_avq import nearest_code
from .components_avq import RegionMaps, deal_components, exactly, rate_level

_ROWS = 64  # matrices at once in the start


class MatrixComponents(nn.Module):
    """Matrices (batch, regions, regions) to components (batch, components), and back anywhere.

    The maps are functions of position. Which combination of them reads a parcellation follows from
    the maps at its regions: the one whose coordinates explain the matrix with least energy. With
    as many orthogonal maps as regions that is U^T M U, and a region left out is one of deviation 0.
    """

    def __init__(self, config):
        super().__init__()
        count, self.ridge = config.num_maps, float(config.position_ridge)
        self.count = count
        coordinates = config.num_coordinates + config.num_pattern_coordinates
        self.maps = RegionMaps(config.position_features, config.position_wavelength, count)
        # The same on the way in and out: they are orthogonal, and half as much to store.
        self.axes = nn.Parameter(torch.zeros(config.num_components, coordinates))
        # Orthonormal directions in which coordinates are made louder before they are coded.
        self.register_buffer("directions", torch.zeros(coordinates, config.num_directions))
        self.emphasis = float(config.emphasis)
        # Number row * num_maps + column of the pairs of maps that are kept.
        self.register_buffer("kept", torch.zeros(config.num_coordinates, dtype=torch.int64))
        # Orthonormal mixtures of all pairs, but for those that are kept: coordinates of their own.
        if config.num_pattern_coordinates:
            pairs = count * (count + 1) // 2
            self.register_buffer("mixtures", torch.zeros(pairs, config.num_pattern_coordinates))
        else:
            self.mixtures = None
        self.register_buffer("mean", torch.zeros(count, count))  # of people, between maps

    def readers(self, coordinates, region_mask):
        """What matrices are multiplied by on both sides, (batch or 1, regions, maps)."""
        maps = self.maps(coordinates) * region_mask[..., None]  # (batch or 1, regions, maps)
        gram = maps @ maps.transpose(1, 2)
        gram = gram + self.ridge * torch.eye(gram.shape[1], device=gram.device)
        return torch.linalg.solve(gram, maps)

    def scales(self, kept):
        """Keeps lengths: a pair of two maps stands for two entries, a map with itself for one."""
        same = torch.div(kept, self.count, rounding_mode="floor") == kept % self.count
        return torch.where(same, 0.5**0.5, 1.0)

    def pairs(self):
        """Numbers of all pairs of maps, as in `kept`."""
        rows, columns = torch.triu_indices(self.count, self.count, device=self.kept.device)
        return rows * self.count + columns

    def read(self, deviations, readers, kept):
        """Coordinates (batch, kept) of deviations from the mean; 0 where a pair is missing."""
        with exactly(deviations):
            between = readers.transpose(1, 2) @ deviations @ readers  # (batch, maps, maps)
            return between.flatten(1)[:, kept] * self.scales(kept)

    def coordinates(self, deviations, readers):
        """All coordinates (batch, kept and mixtures) of deviations from the mean."""
        if self.mixtures is None:
            return self.read(deviations, readers, self.kept)
        return self.chosen_of(self.read(deviations, readers, self.pairs()))

    def chosen_of(self, every):
        """Of what all pairs hold, (batch, pairs): the kept ones, and the mixtures."""
        kept = every[:, torch.searchsorted(self.pairs(), self.kept)]
        if self.mixtures is None:
            return kept
        with exactly(every):
            return torch.cat([kept, every @ self.mixtures], -1)

    def at(self, between, coordinates):
        """Matrices (batch, regions, regions) of what lies between maps, (batch, maps, maps)."""
        with exactly(between):
            maps = self.maps(coordinates)
            found = maps @ between @ maps.transpose(1, 2)
            found = 0.5 * (found + found.transpose(1, 2))  # to the last bit
            return found * (1 - torch.eye(found.shape[1], device=found.device))

    def louder(self, values, factor):
        """Coordinates (batch, kept), those along `directions` times `factor`."""
        return values + (factor - 1.0) * (values @ self.directions) @ self.directions.T

    def forward(self, deviations, coordinates, region_mask):
        """Components (batch, components) of deviations (batch, regions, regions)."""
        with exactly(deviations):
            readers = self.readers(coordinates, region_mask)
            values = self.coordinates(deviations, readers)
            return self.louder(values, self.emphasis) @ self.axes.T

    def inverse(self, components, coordinates):
        """Deviations (batch, regions, regions) at any coordinates."""
        with exactly(components):
            values = self.louder(components @ self.axes, 1.0 / self.emphasis)
            single = values[:, : len(self.kept)] * self.scales(self.kept)
            half = values.new_zeros(len(values), self.count**2).index_add(1, self.kept, single)
            if self.mixtures is not None:
                pairs = self.pairs()
                mixed = values[:, len(self.kept) :] @ self.mixtures.T
                half = half.index_add(1, pairs, mixed * self.scales(pairs))
            half = half.unflatten(1, (self.count, self.count))
            return self.at(half + half.transpose(1, 2), coordinates)

    def mean_at(self, coordinates):
        """The people's mean (1, regions, regions) at any coordinates."""
        return self.at(self.mean[None], coordinates)

    @torch.no_grad()
    def start(
        self, matrices, present, coordinates, more, more_present, patterns, shrinkage, bits, deal
    ):
        """Take maps, pairs and components from training matrices; components (scans, components).

        Arguments as `AVQConnectomeModel.start_components`; `present` (scans, regions, regions).
        """
        mean = matrices.sum(0) / present.sum(0).clamp(min=1)
        corner = torch.tanh(mean.double()) + torch.eye(len(mean), dtype=torch.float64)
        maps = torch.linalg.eigh(corner)[1].flip(-1)
        self.maps.fit(
            coordinates, F.pad(maps, (0, max(0, self.count - len(maps))))[:, : self.count]
        )
        everyone = torch.ones(1, len(mean), dtype=torch.bool)
        readers = self.readers(coordinates[None], everyone)
        # The hole on the diagonal would be felt beside it, at the positions of other regions.
        filled = mean + torch.diag((mean - torch.eye(len(mean)) * 1e6).amax(1))
        self.mean.copy_((readers.transpose(1, 2) @ filled @ readers)[0])
        centre = self.mean_at(coordinates[None])

        pairs = self.pairs()

        def read_all(rows, there):
            parts = zip(rows.split(_ROWS), there.split(_ROWS), strict=True)
            return torch.cat(
                [self.read((part - centre) * mask, readers, pairs) for part, mask in parts]
            )

        found = own = read_all(matrices, present)
        if more is not None:
            found = torch.cat([own, read_all(more, more_present)])
        variances = found.square().mean(0)
        chosen = variances.argsort(descending=True, stable=True)[: len(self.kept)].sort().values
        self.kept.copy_(pairs[chosen])
        # What other scans add is the shape of the covariance, not how much people differ.
        ratio = float(own.square().sum(1).mean() / variances.sum().clamp(min=1e-30))
        self.directions.zero_()
        if patterns is not None:
            self._take_patterns(self.read(patterns, readers, pairs), chosen)
        own, found = self.chosen_of(own), self.chosen_of(found)
        variances = found.square().mean(0)
        covariance = (1 - shrinkage) * ratio * (found.T @ found / len(found))
        covariance.diagonal().add_(shrinkage * ratio * variances)
        covariance = self.louder(self.louder(covariance, self.emphasis).T, self.emphasis).double()
        spread, axes = (part.flip(-1) for part in torch.linalg.eigh(covariance))
        spread = spread.clamp(min=1e-12 * float(spread[0]))
        active = int((spread > rate_level(spread, bits)).sum())
        active = max(1, min(active, deal.chosen.numel(), deal.components))
        dealt = deal_components(spread[:active], bits, *deal.chosen.shape)
        # Components below the water level are left out: their place is empty.
        deal.chosen.copy_(torch.where(dealt == active, deal.components, dealt))
        axes = axes[:, :active].float()
        self.axes.zero_()
        self.axes[:active] = axes.T
        components = self.louder(own, self.emphasis) @ self.axes.T
        # Shrinkage says that the axes' variances are too large as measured on those who made them.
        measured = components[:, :active].square().mean(0).clamp(min=1e-20)
        components[:, :active] *= (spread[:active] / measured).sqrt().float()
        return components

    def _take_patterns(self, wanted, chosen):
        """Directions, and where there is room mixtures, of patterns (patterns, pairs) of maps.

        Kept pairs (`chosen` of all) hold two thirds of a pattern, the mixtures the rest of it.
        """
        wanted = F.normalize(wanted, dim=1).double()  # one weak pattern counts like a strong
        values = wanted[:, chosen]
        if self.mixtures is not None:
            self.mixtures.zero_()
            rest = wanted.index_fill(1, chosen, 0.0)[: self.mixtures.shape[1]]
            basis, size = torch.linalg.qr(rest.T)
            # Without a rest of its own a pattern needs no mixture, and QR would invent one.
            basis = basis * (size.diagonal().abs() > 1e-6)
            self.mixtures[:, : basis.shape[1]] = basis.float()
            values = torch.cat([values, wanted @ self.mixtures.double()], 1)
        values = F.normalize(values, dim=1).T
        self.directions[:, : values.shape[1]] = torch.linalg.qr(values)[0].float()


@torch.no_grad()
def flipped_kmeans(vectors, size, iterations, draws, seed, flip_sign=True):
    """Unit-norm cluster centres (size, code_dim) of unit vectors and all their mirror images.

    Principal components are as likely with one sign as with the other, and independent of each
    other: each pass sees `draws` fresh vectors whose components, but for the last, the anchor, have
    signs drawn anew. A few thousand vectors of a few hundred scans so become as many as codes need,
    and no centre is one person's vector. Without `flip_sign` vectors keep their signs. Statistics
    are forgotten at 0.6 a pass.
    """
    generator = torch.Generator().manual_seed(seed)
    width = vectors.shape[1]

    def draw(count):
        rows = vectors[torch.randint(len(vectors), (count,), generator=generator)]
        if not flip_sign:
            return rows
        signs = 2.0 * torch.randint(2, rows.shape, generator=generator) - 1.0
        signs[:, -1] = 1.0
        return rows * signs.to(rows)

    centres = draw(size)
    sums, counts = torch.zeros_like(centres), torch.zeros(size)
    for step in range(iterations):
        rows = draw(draws)
        nearest = nearest_code(rows, centres)
        memory = 0.0 if step < 3 else 0.6
        sums = memory * sums + torch.zeros(size, width).index_add_(0, nearest, rows)
        counts = memory * counts + torch.bincount(nearest, minlength=size)
        live = counts > 0.5
        centres = torch.where(live[:, None], F.normalize(sums, dim=-1), centres)
        dead = (counts < 0.1).nonzero()[:, 0]
        if len(dead) and step < iterations - 2:
            centres[dead] = rows[torch.randint(len(rows), (len(dead),), generator=generator)]
            sums[dead], counts[dead] = 0.0, 0.0
    return centres


def bits_of(config):
    """Bits of one matrix."""
    return config.num_tokens * math.log2(config.num_codes)
