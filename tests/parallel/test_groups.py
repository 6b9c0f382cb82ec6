"""Process groups of a layout, on the whole world or a part of it, and never the default group."""

from __future__ import annotations

import inspect
import itertools
import time
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor, Shard

from counterflow.comm.config import MaxCtas
from counterflow.comm.nccl import refuse_equal_colours
from counterflow.configs.load import load_config
from counterflow.parallel.communicators import communicator_rounds
from counterflow.parallel.groups import Groups, _Maker
from counterflow.parallel.layout import Layout
from counterflow.settings import UsageError
from counterflow.tests.gather import gathered
from counterflow.tests.pool import Pool, Worker

GROUPS = ("world", "pp", "ep", "edp", "dp")
Sets = list[tuple[int, ...]]
GRIDS = [(1, 1, 1), (4, 1, 4), (4, 1, 1), (8, 2, 2), (8, 1, 4), (8, 8, 1)]  # world size, pp, ep


def _present(worker: Worker, group: dist.ProcessGroup) -> list[int]:
    """Global ranks in `group`: torch's list, checked against a sum over the group."""
    assert group is not dist.group.WORLD
    present = torch.zeros(worker.world_size, dtype=torch.int64)
    present[worker.rank] = 1
    dist.all_reduce(present, group=group)
    found: list[int] = present.nonzero().flatten().tolist()
    assert dist.get_process_group_ranks(group) == found
    return found


def _members(worker: Worker, layout: Layout, ranks: list[int] | None, holders: Sets | None = None) -> dict[str, Any]:
    """Global ranks of each group."""
    groups = Groups.create(layout, "cpu", ranks, holders=holders or ())
    found: dict[str, Any] = {"rank": groups.rank, "coordinates": tuple(groups.coordinates)}
    found |= {name: _present(worker, getattr(groups, name)) for name in GROUPS}
    for kind in ("dp", "edp"):
        for mesh in (groups.replicas(kind), groups.replicas(kind, (groups.coordinates.pp,))):
            assert mesh.mesh.tolist() == found[kind]
    own = {tuple(sorted(held)) for held in holders or () if groups.coordinates.pp in held and len(held) > 1}
    assert {held for _, held in groups.shared} == own
    for kind, held in groups.shared:
        found[f"{kind} {held}"] = _present(worker, groups.replicas(kind, held).get_group())
        assert groups.replicas(kind, held).mesh.tolist() == found[f"{kind} {held}"]
    return found


def expected(layout: Layout, rank: int, holders: Sets | None = None) -> dict[str, list[int]]:
    lists = {"ep": layout.ep_groups(), "edp": layout.edp_groups(), "dp": layout.dp_groups()}
    lists["pp"] = layout.pp_groups()
    found = {name: next(group for group in groups if rank in group) for name, groups in lists.items()}
    for held in {tuple(sorted(held)) for held in holders or () if len(held) > 1}:
        if layout.coordinates(rank).pp in held:
            coordinates = [layout.coordinates(r) for r in range(layout.world_size)]
            of_held = [r for r, at in enumerate(coordinates) if at.pp in held]
            found[f"dp {held}"] = of_held
            found[f"edp {held}"] = [r for r in of_held if coordinates[r].ep == coordinates[rank].ep]
    return {"world": list(range(layout.world_size)), **found}


@pytest.mark.parametrize(("world", "pp", "ep"), GRIDS)
def test_groups_hold_the_ranks_of_the_layout(pool: Pool, world: int, pp: int, ep: int) -> None:
    layout = Layout(world, pp, ep)
    for rank, found in enumerate(pool.run(_members, world, layout, None)):
        assert found == {"rank": rank, "coordinates": layout.coordinates(rank), **expected(layout, rank)}


def _two_grids(worker: Worker) -> dict[str, Any]:
    ranks = [0, 2, 4, 6] if worker.rank % 2 == 0 else [1, 3, 5, 7]
    return _members(worker, Layout(4, 1, 2), ranks)


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
        whole.append(gathered(DTensor.from_local(local, mesh, [Shard(0)], run_check=False)).tolist())
    return whole[0], whole[1]


def test_shards_lie_in_rank_order_on_the_meshes(pool: Pool) -> None:
    assert pool.run(_rows, 4) == [([0, 1, 2, 3], [rank % 2, rank % 2 + 2]) for rank in range(4)]


MIRRORED: Sets = [(0, 3), (1, 2)]
SHARED: list[tuple[int, int, int, Sets]] = [  # world size, pp, ep, sets of holders
    (4, 4, 1, MIRRORED),
    (4, 4, 1, [(0, 3)]),  # the embedding with MTP: pipeline ranks 1 and 2 are in no set
    (8, 4, 2, [(0, 3), (1,)]),
    (8, 4, 2, MIRRORED),
    (8, 4, 1, [(0, 3), (0, 1, 2, 3)]),
    (4, 4, 1, [(0, 1), (1, 2), (2, 3), (3, 0), (0, 1, 2)]),  # a chain: each rank is in a different number of sets
    (8, 2, 2, [(0, 1), (0, 1)]),
    (8, 8, 1, [(0, 7), (1, 6), (2, 5), (3, 4), (0, 4)]),
]


@pytest.mark.parametrize(("world", "pp", "ep", "holders"), SHARED)
def test_holders_of_a_parameter_share_groups(pool: Pool, world: int, pp: int, ep: int, holders: Sets) -> None:
    layout = Layout(world, pp, ep)
    for rank, found in enumerate(pool.run(_members, world, layout, None, holders)):
        wanted = {"rank": rank, "coordinates": layout.coordinates(rank), **expected(layout, rank, holders)}
        assert found == wanted


def _in_any_order(worker: Worker, holders: Sets) -> bool:
    """Whether a rank that lists the sets in its own order, and starts late, gets the expected groups."""
    listed = holders[worker.rank % len(holders) :] + holders[: worker.rank % len(holders)]
    time.sleep(0.02 * (worker.rank * 3 % 4))
    found = _members(worker, Layout(worker.world_size, worker.world_size), None, listed)
    return found.items() >= expected(Layout(worker.world_size, worker.world_size), worker.rank, holders).items()


def test_the_order_in_which_sets_are_listed_does_not_matter(pool: Pool) -> None:
    assert pool.run(_in_any_order, 8, [(0, 7), (1, 6), (0, 3, 5), (6, 7), (2, 4)]) == [True] * 8


def _two_pipelines(worker: Worker) -> dict[str, Any]:
    """Members of grids on even and odd ranks, with different sets."""
    odd = worker.rank % 2
    holders: Sets = [(0, 1), (1, 2), (0, 3)] if odd else []
    return _members(worker, Layout(4, 4), [odd, 2 + odd, 4 + odd, 6 + odd], holders)


def test_pipelines_with_different_sets_live_side_by_side(pool: Pool) -> None:
    layout = Layout(4, 4)
    for global_rank, found in enumerate(pool.run(_two_pipelines, 8)):
        odd, rank = global_rank % 2, global_rank // 2
        local = expected(layout, rank, [(0, 1), (1, 2), (0, 3)] if odd else [])
        groups = {name: [2 * member + odd for member in members] for name, members in local.items()}
        assert found == {"rank": rank, "coordinates": layout.coordinates(rank), **groups}


def _one_after_another(worker: Worker) -> list[bool]:
    """Whether three grids on the same ranks, then a group across different sets, have the expected members."""
    grids: list[tuple[Layout, Sets]] = [(Layout(4, 4), [(0, 3)]), (Layout(4, 2, 2), [(0, 1)]), (Layout(4, 4), MIRRORED)]
    found = []
    for layout, holders in grids:
        members = _members(worker, layout, None, holders)
        found.append(members.items() >= expected(layout, worker.rank, holders).items())
    later = dist.new_group([0, 1, 2, 3], use_local_synchronization=True)
    found.append(_present(worker, later) == [0, 1, 2, 3])
    return found


def test_grids_and_groups_can_be_made_one_after_another(pool: Pool) -> None:
    assert pool.run(_one_after_another, 4) == [[True] * 4] * 4


def _unevenly(worker: Worker) -> bool:
    if worker.rank == 0:
        dist.new_group([0], use_local_synchronization=True)
    ranks = [0, 1]
    try:
        dist.new_group(ranks, use_local_synchronization=True, timeout=timedelta(seconds=1))
    except (RuntimeError, dist.DistError):
        return False
    return True


def test_torch_needs_ranks_that_have_made_equally_many_groups(pool: Pool) -> None:
    """Ranks that are in no set make placeholders for this reason: if torch stops needing placeholders, they can go."""
    assert not any(pool.run(_unevenly, 2))


def _everyone_to_everyone(worker: Worker, layout: Layout) -> dict[tuple[int, int], list[int]]:
    """Received tensors by channel, when every pipeline rank sends to every other at once."""
    pairs = list(itertools.combinations(range(layout.pp), 2))
    groups = Groups.create(layout, "cpu", links=pairs)
    here = groups.coordinates.pp
    assert len(set(groups.channels.values())) == 2 * (layout.pp - 1), "one for each direction of each link"
    works, received = [], {}
    for (source, target), group in groups.channels.items():
        tensor = torch.tensor([10 * worker.rank + target])
        if source == here:
            works.append(dist.isend(tensor, group=group, group_dst=int(target > source)))
        else:
            received[source, target] = tensor
            works.append(dist.irecv(tensor, group=group, group_src=int(source > target)))
    for work in works:
        assert work is not None
        work.wait()
    return {channel: [int(tensor)] for channel, tensor in received.items()}


@pytest.mark.parametrize("layout", [Layout(2, 2), Layout(3, 3), Layout(8, 4, 2)], ids=str)
def test_every_link_has_a_channel_in_each_direction(pool: Pool, layout: Layout) -> None:
    for rank, received in enumerate(pool.run(_everyone_to_everyone, layout.world_size, layout)):
        here = layout.coordinates(rank)
        others = [pp for pp in range(layout.pp) if pp != here.pp]
        assert received == {(pp, here.pp): [10 * layout.rank(pp, here.edp, here.ep) + here.pp] for pp in others}


def _foreign_set(worker: Worker) -> str:
    groups = Groups.create(Layout(4, 4), "cpu", holders=MIRRORED)
    with pytest.raises(AssertionError) as refused:
        groups.replicas("dp", (1, 2) if worker.rank in (0, 3) else (0, 3))
    return str(refused.value)


def test_a_rank_has_no_group_of_a_set_it_is_not_in(pool: Pool) -> None:
    for rank, said in enumerate(pool.run(_foreign_set, 4)):
        assert said.startswith(f"pipeline rank {rank} has no dp group with holders")


def test_groups_that_nccl_would_make_one_of_are_refused() -> None:
    one, other = (15, 58, 124, 160), (23, 141, 162, 179)  # found by a search over random sets of four ranks
    assert dist.distributed_c10d._process_group_color([*one]) == dist.distributed_c10d._process_group_color([*other])
    with pytest.raises(UsageError, match=r"groups of ranks 15, 58, 124, 160 and 23, .* the same split colour"):
        refuse_equal_colours([(0,), one, other])
    refuse_equal_colours([(0,), one, (23, 141, 162, 180)])


@pytest.mark.parametrize("config", ["deepseek-v3-671b", "deepseek-v3-16b"])
def test_shipped_layouts_have_no_two_groups_of_one_colour(config: str) -> None:
    loaded = load_config(config)
    pp, ep = loaded.parallel.pp, loaded.parallel.ep
    layout = Layout(2048 if pp > 1 else 64, pp, ep)
    sets = [(rank, pp - 1 - rank) for rank in range(pp // 2)]
    links = [(rank, rank + 1) for rank in range(pp - 1)]
    rounds = list(communicator_rounds(layout, sets, links, counts=True))
    for each in rounds:
        refuse_equal_colours(one.ranks for one in each.all(layout.world_size))
        members = sorted(rank for one in each.all(layout.world_size) for rank in one.ranks)
        assert members == list(range(layout.world_size)), "every rank makes one group in every round"
    assert sum(loaded.comm.max_ctas.model_dump()[each.of(layout.ep).purpose] for each in rounds) < 132


class FakeOptions:
    """Options of `ProcessGroupNCCL`, which a torch for CPUs lacks."""

    def __init__(self, is_high_priority_stream: bool = False) -> None:
        self.is_high_priority_stream, self._timeout = is_high_priority_stream, timedelta(0)
        self.config = SimpleNamespace(max_ctas=-1)


def test_nccl_gets_a_cap_and_a_stream_of_high_priority_by_the_use_of_a_group(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[tuple[str, Any]] = []

    def new_group(ranks: list[int], **keys: Any) -> dist.ProcessGroup:
        made.append((keys["group_desc"], keys["pg_options"]))
        return dist.ProcessGroup(dist.HashStore(), 0, len(ranks))

    monkeypatch.setattr(dist, "ProcessGroupNCCL", SimpleNamespace(Options=FakeOptions), raising=False)
    monkeypatch.setattr(dist, "get_backend", lambda: "nccl")
    monkeypatch.setattr(dist, "get_rank", lambda: 0)
    monkeypatch.setattr(dist, "new_group", new_group)
    layout, caps = Layout(8, 2, 2), MaxCtas(experts=4, gradients=6, pipeline=1)
    maker = _Maker(layout, "cuda", None, 30.0, caps)
    for each in communicator_rounds(layout, [(0, 1)], [(0, 1)], counts=True):
        maker.group(each)
    assert all(options.is_high_priority_stream and options._timeout == timedelta(seconds=30) for _, options in made)
    assert {name: options.config.max_ctas for name, options in made} == {
        "world": 1,
        "pp": 1,
        "edp": 6,
        "ep": 4,
        "counts": 1,
        "dp": 6,
        "from pipeline rank 0 to 1": 1,
        "from pipeline rank 1 to 0": 1,
        "dp of pipeline ranks (0, 1)": 6,
        "edp of pipeline ranks (0, 1)": 6,
    }


def test_torch_has_these_options() -> None:
    stub = (Path(torch.__file__).parent / "_C" / "_distributed_c10d.pyi").read_text()
    nccl = stub[stub.index("class ProcessGroupNCCL") :]
    assert "max_ctas: int" in nccl and "config: ProcessGroupNCCL.NCCLConfig" in nccl
    assert "def __init__(self, is_high_priority_stream: bool = False)" in nccl
    assert "pg_options" in inspect.signature(dist.new_group).parameters
