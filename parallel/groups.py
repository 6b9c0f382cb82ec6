"""Process groups and device meshes of a layout.

Training never communicates on the default group: every collective is given one of these, so two grids can
live side by side in one world. Groups exist in every layout, also where they have a single member.
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
    """This rank's place in the grid and the groups it belongs to."""

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
    """By source and target pipeline rank, this one among them: a group of just these two, for transfers that way."""
    shared: Mapping[tuple[str, tuple[int, ...]], DeviceMesh] = field(hash=False, compare=False)
    """By kind and holders: the ranks of several pipeline ranks that hold the same parameters, this one among them."""
    meter: Meter = field(hash=False, compare=False)
    """Counts what this rank sends in any of them."""

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

        `ranks` are the global ranks of the grid, ascending, all of the world by default. `holders` are the sets of
        pipeline ranks that hold a parameter in common, `links` the pairs of pipeline ranks, lower first, that send to
        each other; both are the same on every rank. Each rank makes only the groups it is in, so the cost does not
        grow with the number of groups.
        """
        make = _Maker.of(layout, device_type, ranks, timeout)
        sets = list(holders)
        assert all(0 <= pp < layout.pp for held in sets for pp in held), (sets, layout)
        world = make.group(range(layout.world_size), "world")
        along = [
            make.containing(groups, name)
            for name, groups in (("pp", layout.pp_groups()), ("edp", layout.edp_groups()), ("ep", layout.ep_groups()))
        ]
        grid = torch.tensor(make.members).view(layout.pp, layout.edp, layout.ep)
        mesh = DeviceMesh.from_group(along, device_type, mesh=grid, mesh_dim_names=("pp", "edp", "ep"))
        here = layout.coordinates(make.rank).pp
        dp_mesh = make.mesh("dp", (here,))
        channels: dict[tuple[int, int], dist.ProcessGroup] = {}
        for apart in holder_rounds(links):
            pair = next((pair for pair in apart if here in pair), None)
            for way in (1, -1):
                if pair is not None:
                    source, target = pair[::way]
                    channels[source, target] = make.channel(source, target)
                else:
                    make.group([make.rank], "placeholder")  # see _Maker
        shared: dict[tuple[str, tuple[int, ...]], DeviceMesh] = {}
        for apart in holder_rounds(sets):
            held = next((held for held in apart if here in held), None)
            for kind in ("dp", "edp"):
                if held is not None:
                    shared[kind, held] = make.mesh(kind, held)
                else:
                    make.group([make.rank], "placeholder")  # see _Maker
        meter = Meter({rank: layout.node(place) for place, rank in enumerate(make.members)})
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
        """One-dimensional mesh of the ranks that hold the same parameter: `dp`, or `edp` for experts.

        `holders` are the pipeline ranks that hold it, by default this one alone; else a set that `create` was given.
        """
        here = self.coordinates.pp
        if holders is None or holders == (here,):
            return self.dp_mesh if kind == "dp" else self.mesh["edp"]
        made = [held for of_kind, held in self.shared if of_kind == kind]
        assert holders in made, f"pipeline rank {here} has no {kind} group with holders {holders}, only {made}"
        return self.shared[kind, holders]


@dataclass(frozen=True)
class _Maker:
    """Makes groups of a grid's ranks, in such a way that all ranks make equally many.

    Groups are made by their members alone. Torch names such a group after its members and the number of groups that
    the process has already, and members that count differently wait for each other in vain. NCCL moreover splits the
    world's communicator with all ranks taking part. So whenever some ranks make a group, each of the others makes
    one too, be it a placeholder of its own.
    """

    layout: Layout
    device_type: str
    members: list[int]
    """Global rank of each rank of the grid."""
    rank: int
    timeout: timedelta

    @classmethod
    def of(cls, layout: Layout, device_type: str, ranks: Sequence[int] | None, timeout: float) -> _Maker:
        members = list(range(layout.world_size)) if ranks is None else list(ranks)
        assert len(members) == layout.world_size, (members, layout)
        assert members == sorted(set(members)), f"torch sorts the ranks of a group, so these must ascend: {members}"
        # NCCL splits a communicator with every rank of the world taking part, which a part of the world cannot do.
        assert ranks is None or device_type == "cpu", "a grid on a part of the world is for tests on CPUs"
        return cls(layout, device_type, members, members.index(dist.get_rank()), timedelta(seconds=timeout))

    def group(self, local: Iterable[int], name: str) -> dist.ProcessGroup:
        """A group of the grid's ranks `local`, this one among them."""
        made = dist.new_group(
            [self.members[rank] for rank in local],
            timeout=self.timeout,
            use_local_synchronization=True,
            group_desc=name,
        )
        assert isinstance(made, dist.ProcessGroup)
        return made

    def containing(self, groups: Iterable[list[int]], name: str) -> dist.ProcessGroup:
        """The one of `groups` that this rank is in."""
        return self.group(next(candidate for candidate in groups if self.rank in candidate), name)

    def channel(self, source: int, target: int) -> dist.ProcessGroup:
        """The ranks of two pipeline ranks at this one's place in edp and ep."""
        _, edp, ep = self.layout.coordinates(self.rank)
        ranks = sorted(self.layout.rank(pp, edp, ep) for pp in (source, target))
        return self.group(ranks, f"from pipeline rank {source} to {target}")

    def mesh(self, kind: str, holders: tuple[int, ...]) -> DeviceMesh:
        """The ranks that hold the same as this one, in one dimension called `kind`."""
        local = self.layout.replica_ranks(self.rank, kind, holders)
        group = self.group(local, f"{kind} of pipeline ranks {holders}" if len(holders) > 1 else kind)
        ranks = [self.members[rank] for rank in local]
        return DeviceMesh.from_group(group, self.device_type, mesh=ranks, mesh_dim_names=(kind,))
