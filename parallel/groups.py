"""Process groups and device meshes of a layout.

Training never communicates on the default group: every collective is given one of these, so two grids can
live side by side in one world. Groups exist in every layout, also where they have a single member.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh

from .layout import Coordinates, Layout


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

    @classmethod
    def create(
        cls,
        layout: Layout,
        device_type: str,
        ranks: Sequence[int] | None = None,
        timeout: float = 600.0,
    ) -> Groups:
        """Make the groups; every rank of the grid calls this once, in the same order among them.

        `ranks` are the global ranks of the grid, all of the world by default. Each rank makes only the groups it is
        in, so the cost does not grow with the number of groups.
        """
        members = list(range(layout.world_size)) if ranks is None else list(ranks)
        assert len(members) == layout.world_size, (members, layout)
        # NCCL splits a communicator with every rank of the world taking part, which a part of the world cannot do.
        assert ranks is None or device_type == "cpu", "a grid on a part of the world is for tests on CPUs"
        rank = members.index(dist.get_rank())
        wait = timedelta(seconds=timeout)

        def group(local: Sequence[int], name: str) -> dist.ProcessGroup:
            made = dist.new_group(
                [members[r] for r in local], timeout=wait, use_local_synchronization=True, group_desc=name
            )
            assert isinstance(made, dist.ProcessGroup)
            return made

        def containing(groups: Iterable[list[int]]) -> list[int]:
            return next(candidate for candidate in groups if rank in candidate)

        world = group(range(layout.world_size), "world")
        along = [
            group(containing(groups), name)
            for name, groups in (("pp", layout.pp_groups()), ("edp", layout.edp_groups()), ("ep", layout.ep_groups()))
        ]
        grid = torch.tensor(members).view(layout.pp, layout.edp, layout.ep)
        mesh = DeviceMesh.from_group(along, device_type, mesh=grid, mesh_dim_names=("pp", "edp", "ep"))
        stage = containing(layout.dp_groups())
        dp_mesh = DeviceMesh.from_group(
            group(stage, "dp"), device_type, mesh=[members[r] for r in stage], mesh_dim_names=("dp",)
        )
        return cls(layout, rank, world, mesh, dp_mesh)

    @property
    def coordinates(self) -> Coordinates:
        return self.layout.coordinates(self.rank)

    @property
    def ep(self) -> dist.ProcessGroup:
        """Ranks that exchange tokens."""
        return self.mesh.get_group("ep")

    @property
    def edp(self) -> dist.ProcessGroup:
        """Ranks that hold the same experts."""
        return self.mesh.get_group("edp")

    @property
    def dp(self) -> dist.ProcessGroup:
        """Ranks that hold the same stage."""
        return self.dp_mesh.get_group("dp")

    def replicas(self, kind: str) -> DeviceMesh:
        """One-dimensional mesh of the ranks that hold the same parameter: `dp`, or `edp` for experts."""
        return self.dp_mesh if kind == "dp" else self.mesh["edp"]
