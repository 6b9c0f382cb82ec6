"""Process groups: made from the layout's lists, whole or as a part of the world, and never the default group."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor, Shard

from counterflow.parallel.groups import Groups
from counterflow.parallel.layout import Layout
from counterflow.tests.pool import Pool, Worker

GROUPS = ("world", "ep", "edp", "dp")
GRIDS = [(1, 1, 1), (4, 1, 4), (4, 1, 1), (8, 2, 2), (8, 1, 4), (8, 8, 1)]  # world size, pp, ep


def _members(worker: Worker, layout: Layout, ranks: list[int] | None) -> dict[str, Any]:
    """Global ranks of each group, asked of the group and found by summing over it."""
    groups = Groups.create(layout, "cpu", ranks)
    found: dict[str, Any] = {"rank": groups.rank, "coordinates": tuple(groups.coordinates)}
    for name in GROUPS:
        group = getattr(groups, name)
        assert group is not dist.group.WORLD
        present = torch.zeros(worker.world_size, dtype=torch.int64)
        present[worker.rank] = 1
        dist.all_reduce(present, group=group)
        found[name] = present.nonzero().flatten().tolist()
        assert sorted(dist.get_process_group_ranks(group)) == found[name]
    for kind, name in (("dp", "dp"), ("edp", "edp")):
        assert groups.replicas(kind).mesh.tolist() == found[name]
    return found


def expected(layout: Layout, rank: int) -> dict[str, list[int]]:
    lists = {"ep": layout.ep_groups(), "edp": layout.edp_groups(), "dp": layout.dp_groups()}
    mine = {name: next(group for group in groups if rank in group) for name, groups in lists.items()}
    return {"world": list(range(layout.world_size)), **mine}


@pytest.mark.parametrize(("world", "pp", "ep"), GRIDS)
def test_groups_hold_the_ranks_of_the_layout(pool: Pool, world: int, pp: int, ep: int) -> None:
    layout = Layout(world, pp, ep)
    for rank, found in enumerate(pool.run(_members, world, layout, None)):
        assert found == {"rank": rank, "coordinates": layout.coordinates(rank), **expected(layout, rank)}


def _two_grids(worker: Worker) -> dict[str, Any]:
    mine = [0, 2, 4, 6] if worker.rank % 2 == 0 else [1, 3, 5, 7]
    return _members(worker, Layout(4, 1, 2), mine)


def test_a_grid_may_be_any_part_of_the_world(pool: Pool) -> None:
    layout = Layout(4, 1, 2)
    for global_rank, found in enumerate(pool.run(_two_grids, 8)):
        offset, rank = global_rank % 2, global_rank // 2
        groups = {name: [2 * member + offset for member in members] for name, members in expected(layout, rank).items()}
        assert found == {"rank": rank, "coordinates": layout.coordinates(rank), **groups}


def _rows(worker: Worker) -> tuple[list[int], list[int]]:
    groups = Groups.create(Layout(4, 1, 2), "cpu")
    whole = []
    for kind in ("dp", "edp"):
        mesh = groups.replicas(kind)
        local = torch.full((1,), worker.rank)
        whole.append(DTensor.from_local(local, mesh, [Shard(0)], run_check=False).full_tensor().tolist())
    return whole[0], whole[1]


def test_shards_lie_in_rank_order_on_the_meshes(pool: Pool) -> None:
    assert pool.run(_rows, 4) == [([0, 1, 2, 3], [rank % 2, rank % 2 + 2]) for rank in range(4)]
