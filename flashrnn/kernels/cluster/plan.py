"""What the plans of clusters share: how CTAs, heads and sequences divide."""

from __future__ import annotations

from dataclasses import dataclass

from flashrnn.kernels.gpu import GPU, clusters_at_once
from flashrnn.kernels.plan import Plan
from flashrnn.kernels.sizes import tiles_of


@dataclass(frozen=True, kw_only=True)
class ClusterPlan(Plan):
    """How a cluster of CTAs computes some sequences of a head; no cluster waits for another.

    Attributes:
        size: CTAs of the cluster.
        units: units of the head that a CTA has.
        n_tiles: n-tiles of 8 sequences that the cluster has.
    """

    size: int
    units: int
    n_tiles: int

    @property
    def cluster_size(self) -> int:
        """CTAs of a cluster."""
        return self.size

    def groups(self, B: int, N: int, gpu: GPU) -> int:
        """Clusters of a launch: each has 8 * n_tiles sequences of a head."""
        return N * tiles_of(B, 8 * self.n_tiles)

    def grid(self, B: int, N: int, gpu: GPU) -> int:
        """CTAs of a launch."""
        return self.groups(B, N, gpu) * self.size

    def rounds(self, B: int, N: int, gpu: GPU) -> int:
        """How many clusters run one after another, when as many as possible run at once."""
        return tiles_of(self.groups(B, N, gpu), clusters_at_once(self.size, gpu))


# The time that it takes to start another cluster (its launch, reading R, first inputs), as a part
# of a cluster's. An estimate.
_START = 0.03


def time_of_rounds(rounds: int) -> float:
    """The time of so many clusters one after another, in that of one."""
    return rounds + _START * (rounds - 1)
