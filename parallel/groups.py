"""Process groups and device meshes of a layout.

Training never communicates on the default group: every collective gets one of these groups, so one world can hold two
grids.
Groups exist in every layout, also where they have a single member.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from ..comm.meter import Meter
from .layout import Coordinates, Layout, holder_rounds


@dataclass(frozen=True)
class Groups:
    """Position of this rank in the grid, and its groups."""

    layout: Layout
    rank: int
    """Rank in the grid: equal to the global rank unless the grid is a part of the world."""
    world: dist.ProcessGroup
    """Every rank of the grid."""
    mesh: DeviceMesh
    """The grid itself, with dimensions `pp`, `edp` and `ep`."""
    dp_mesh: DeviceMesh
    """The ranks of this stage in one dimension, `dp`: edp and ep together."""
    channels: Mapping[tuple[int, int], dist.ProcessGroup] = field(hash=False, compare=False)
    """Groups of two pipeline ranks, one of them this rank's, by source and target: for transfers in this direction."""
    shared: Mapping[tuple[str, tuple[int, ...]], DeviceMesh] = field(hash=False, compare=False)
    """Ranks that hold the same parameters on several pipeline ranks, this rank included; by kind and holders."""
    meter: Meter = field(hash=False, compare=False)
    """Counter of everything that this rank sends in any of the groups."""

    @classmethod
    def create(
        cls,
        layout: Layout,
        device_type: str,
        ranks: Sequence[int] | None = None,
        timeout: float = 600.0,
        holders: Iterable[tuple[int, ...]] = (),
        links: Iterable[tuple[int, int]] = (),
    ) -> Groups:
        """Make the groups; every rank of the grid calls this at the same point of its sequence of new groups.

        `ranks` are the global ranks of the grid, ascending, by default all of the world. `holders` are the sets of
        pipeline ranks that hold a parameter in common, `links` the pairs of pipeline ranks, lower first, that send to
        each other; both are the same on every rank. Each rank makes only its own groups, so the cost does not grow
        with the number of groups.
        """
        make = _Maker(layout, device_type, ranks, timeout)
        sets = list(holders)
        assert all(0 <= pp < layout.pp for held in sets for pp in held), (sets, layout)
        world = make.group(range(layout.world_size), "world")
        lists = {"pp": layout.pp_groups(), "edp": layout.edp_groups(), "ep": layout.ep_groups()}
        along = [make.group(next(g for g in groups if make.rank in g), name) for name, groups in lists.items()]
        grid = torch.tensor(make.members).view(layout.pp, layout.edp, layout.ep)
        mesh = DeviceMesh.from_group(along, device_type, mesh=grid, mesh_dim_names=("pp", "edp", "ep"))
        here = layout.coordinates(make.rank).pp
        dp_mesh = make.mesh("dp", (here,))
        channels: dict[tuple[int, int], dist.ProcessGroup] = {}
        for pairs in holder_rounds(links):
            pair = next((pair for pair in pairs if here in pair), None)
            for way in (1, -1):
                if pair is not None:
                    source, target = pair[::way]
                    channels[source, target] = make.channel(source, target)
                else:
                    make.group([make.rank], "placeholder")  # see _Maker
        shared: dict[tuple[str, tuple[int, ...]], DeviceMesh] = {}
        for disjoint in holder_rounds(sets):
            held = next((held for held in disjoint if here in held), None)
            for kind in ("dp", "edp"):
                if held is not None:
                    shared[kind, held] = make.mesh(kind, held)
                else:
                    make.group([make.rank], "placeholder")  # see _Maker
        meter = Meter({rank: layout.node(grid_rank) for grid_rank, rank in enumerate(make.members)})
        return cls(layout, make.rank, world, mesh, dp_mesh, channels, shared, meter)

    @property
    def coordinates(self) -> Coordinates:
        return self.layout.coordinates(self.rank)

    @property
    def pp(self) -> dist.ProcessGroup:
        """Ranks that together hold one whole model replica, in stage order."""
        return self.mesh.get_group("pp")

    @property
    def ep(self) -> dist.ProcessGroup:
        """Ranks that exchange tokens."""
        return self.mesh.get_group("ep")

    @property
    def edp(self) -> dist.ProcessGroup:
        """Ranks of this pipeline rank that hold the same experts."""
        return self.mesh.get_group("edp")

    @property
    def dp(self) -> dist.ProcessGroup:
        """Ranks of this pipeline rank."""
        return self.dp_mesh.get_group("dp")

    def sum(self, tensor: Tensor) -> None:
        """Sum statistics over every rank of the grid, in place."""
        self.meter.group(self.world).all_reduce("statistics", tensor.nbytes)
        dist.all_reduce(tensor, group=self.world)

    def replicas(self, kind: str, holders: tuple[int, ...] | None = None) -> DeviceMesh:
        """Mesh in one dimension of the ranks that hold the same parameter: `dp`, or `edp` for experts.

        `holders` are the pipeline ranks that hold the parameter: this one by default, else a set given to `create`.
        """
        here = self.coordinates.pp
        if holders is None or holders == (here,):
            return self.dp_mesh if kind == "dp" else self.mesh["edp"]
        made = [held for of_kind, held in self.shared if of_kind == kind]
        assert holders in made, f"pipeline rank {here} has no {kind} group with holders {holders}, only {made}"
        return self.shared[kind, holders]


class _Maker:
    """Maker of groups of a grid's ranks. Every rank makes equally many groups.

    Only the members of a group make it. Torch names a group after its members and the number of groups that the process
    already has, so members with different numbers would wait for each other for ever. NCCL also splits the world's
    communicator with all ranks taking part. Whenever some ranks make a group, each of the others therefore makes one
    too, if need be a placeholder of one rank.
    """

    def __init__(self, layout: Layout, device_type: str, ranks: Sequence[int] | None, timeout: float) -> None:
        self.layout, self.device_type, self.timeout = layout, device_type, timedelta(seconds=timeout)
        self.members = members = list(range(layout.world_size)) if ranks is None else list(ranks)
        """Global rank of each rank of the grid."""
        assert len(members) == layout.world_size, (members, layout)
        assert members == sorted(set(members)), f"torch sorts the ranks of a group, so these must ascend: {members}"
        # NCCL splits a communicator with every rank of the world, which a part of the world cannot do.
        assert ranks is None or device_type == "cpu", "a grid on a part of the world is for tests on CPUs"
        self.rank = members.index(dist.get_rank())

    def group(self, local: Iterable[int], name: str) -> dist.ProcessGroup:
        """Make a group of the grid's ranks `local`, this one among them."""
        ranks = [self.members[rank] for rank in local]
        made = dist.new_group(ranks, timeout=self.timeout, use_local_synchronization=True, group_desc=name)
        assert isinstance(made, dist.ProcessGroup)
        return made

    def channel(self, source: int, target: int) -> dist.ProcessGroup:
        """Make a group of the ranks of two pipeline ranks that have this one's edp and ep coordinates."""
        _, edp, ep = self.layout.coordinates(self.rank)
        ranks = sorted(self.layout.rank(pp, edp, ep) for pp in (source, target))
        return self.group(ranks, f"from pipeline rank {source} to {target}")

    def mesh(self, kind: str, holders: tuple[int, ...]) -> DeviceMesh:
        """Make the mesh of the ranks that hold the same values as this one, in one dimension called `kind`."""
        local = self.layout.replica_ranks(self.rank, kind, holders)
        group = self.group(local, f"{kind} of pipeline ranks {holders}" if len(holders) > 1 else kind)
        ranks = [self.members[rank] for rank in local]
        return DeviceMesh.from_group(group, self.device_type, mesh=ranks, mesh_dim_names=(kind,))
