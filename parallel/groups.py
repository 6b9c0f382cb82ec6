"""Process groups and device meshes of a layout.

Training never communicates on the default group: every collective gets one of these groups, so one world can hold two
grids.
Groups exist in every layout, also where they have a single member.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from ..comm.config import MaxCtas
from ..comm.meter import Meter
from ..comm.nccl import communicator_options, refuse_equal_colours
from .communicators import Communicator, Round, communicator_rounds
from .layout import Coordinates, Layout


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
    counts: dist.ProcessGroup = field(hash=False, compare=False)
    """Ranks that exchange tokens, for the numbers of them: on a GPU a group of its own, on a CPU that of the tokens."""
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
        max_ctas: MaxCtas | None = None,
    ) -> Groups:
        """Make the groups; every rank of the grid calls this at the same point of its sequence of new groups.

        `ranks` are the global ranks of the grid, ascending, by default all of the world. `holders` are the sets of
        pipeline ranks that hold a parameter in common, `links` the pairs of pipeline ranks, lower first, that send to
        each other; both are the same on every rank. Each rank makes only its own groups, so the cost does not grow
        with the number of groups. `max_ctas` caps NCCL's kernels. Raises UsageError where NCCL would mix up two groups.
        """
        make = _Maker(layout, device_type, ranks, timeout, max_ctas or MaxCtas())
        sets = list(holders)
        assert all(0 <= pp < layout.pp for held in sets for pp in held), (sets, layout)
        made: dict[Hashable, dist.ProcessGroup] = {}
        for each in communicator_rounds(layout, sets, links, counts=device_type != "cpu"):
            own, group = make.group(each)
            made[own.key] = group
        grid = torch.tensor(make.members).view(layout.pp, layout.edp, layout.ep)
        along = [made[name] for name in ("pp", "edp", "ep")]
        mesh = DeviceMesh.from_group(along, device_type, mesh=grid, mesh_dim_names=("pp", "edp", "ep"))
        pairs = [key for key in made if isinstance(key, tuple)]
        channels = {pair: made[pair] for pair in pairs if not isinstance(pair[0], str)}
        shared = {pair: make.mesh(pair[0], made[pair]) for pair in pairs if isinstance(pair[0], str)}
        meter = Meter({rank: layout.node(grid_rank) for grid_rank, rank in enumerate(make.members)})
        dp_mesh, counts = make.mesh("dp", made["dp"]), made.get("counts", made["ep"])
        return cls(layout, make.rank, made["world"], mesh, dp_mesh, counts, channels, shared, meter)

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

    def set_timeout(self, seconds: float) -> None:
        """Let collectives that begin from now on wait no longer than `seconds` for their peers, in all groups."""
        meshes = (self.dp_mesh, *self.shared.values())
        groups = [self.world, self.counts, *self.mesh.get_all_groups(), *self.channels.values()]
        for group in {*groups, *(mesh.get_group() for mesh in meshes)}:
            dist.distributed_c10d._set_pg_timeout(timedelta(seconds=seconds), group)

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
    """Maker of this rank's groups. Every rank makes equally many, see `Round`."""

    def __init__(
        self, layout: Layout, device_type: str, ranks: Sequence[int] | None, timeout: float, max_ctas: MaxCtas
    ) -> None:
        self.layout, self.device_type, self.timeout = layout, device_type, timedelta(seconds=timeout)
        self.max_ctas = max_ctas
        self.members = members = list(range(layout.world_size)) if ranks is None else list(ranks)
        """Global rank of each rank of the grid."""
        assert len(members) == layout.world_size, (members, layout)
        assert members == sorted(set(members)), f"torch sorts the ranks of a group, so these must ascend: {members}"
        # NCCL splits a communicator with every rank of the world, which a part of the world cannot do.
        assert ranks is None or device_type == "cpu", "a grid on a part of the world is for tests on CPUs"
        self.rank = members.index(dist.get_rank())

    def group(self, each: Round) -> tuple[Communicator, dist.ProcessGroup]:
        """Make this rank's group of a round."""
        own = each.of(self.rank)
        options = communicator_options(own.purpose, self.max_ctas, self.timeout)
        if options is not None:
            refuse_equal_colours([one.ranks for one in each.all(self.layout.world_size)])
        made = dist.new_group(
            [self.members[rank] for rank in own.ranks],
            timeout=self.timeout,
            pg_options=options,
            use_local_synchronization=True,
            group_desc=own.name,
        )
        assert isinstance(made, dist.ProcessGroup)
        return own, made

    def mesh(self, kind: str, group: dist.ProcessGroup) -> DeviceMesh:
        """Make the mesh of the ranks of `group`, which hold the same values, in one dimension called `kind`."""
        ranks = dist.get_process_group_ranks(group)
        return DeviceMesh.from_group(group, self.device_type, mesh=ranks, mesh_dim_names=(kind,))
