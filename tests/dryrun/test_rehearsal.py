"""Steps of all ranks under NCCL's rules: no schedule and no layout waits in a circle, and planted faults are found."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest

from counterflow.configs.load import load_config
from counterflow.dryrun.rank import dry_run
from counterflow.dryrun.rehearsal import Rehearsal, program_at
from counterflow.dryrun.rules import Event, Group, HostWait, Launch, MismatchError, Rules, Wait
from counterflow.launcher.cli import main
from counterflow.launcher.commands import dryrun

BASE = ("precision.recipe=bf16", "memory.recompute=v3")


def config_of(schedule: str, pp: int, ep: int, *overrides: str) -> Any:
    layers = {"dualpipe": 2 * pp, "dualpipev": 2 * pp, "interleaved": 2 * pp}.get(schedule, max(pp, 2))
    shape = (f"model.num_hidden_layers={layers}", f"parallel.pp={pp}", f"parallel.ep={ep}")
    return load_config("tiny", [*BASE, *shape, f"parallel.schedule={schedule}", *overrides])


def long(*values: Any) -> Any:
    return pytest.param(*values, marks=pytest.mark.long)


FP8 = ("precision.recipe=fp8", "model.qk_rope_head_dim=16")
SMALL_BUCKETS = "optim.bucket_mb=0.05"
TWO_NODES = ("parallel.gpus_per_node=2",)
LAYOUTS = [
    ("dualpipe", 2, 2, 8, ()),
    ("1f1b", 2, 1, 4, ("model.num_nextn_predict_layers=0",)),
    *(long("gpipe", pp, 1, pp, ()) for pp in (2, 5)),
    *(long("1f1b", pp, ep, pp * ep, ()) for pp, ep in ((2, 2), (3, 1), (4, 4), (8, 1))),
    *(long("zb1p", pp, ep, pp * ep, ()) for pp, ep in ((2, 2), (3, 1), (6, 1), (8, 1))),
    *(long("interleaved", pp, ep, 2 * pp * ep, ()) for pp, ep in ((2, 2), (4, 1), (7, 1))),
    *(long("dualpipe", pp, 2, 4 * pp, ()) for pp in (4, 6, 8)),
    *(long("dualpipev", pp, 2, 4 * pp, ()) for pp in (2, 3, 5, 7)),
    long("dualpipe", 4, 4, 32, (*TWO_NODES, "comm.dispatcher=two-hop")),
    long("dualpipe", 4, 4, 32, (*TWO_NODES, "comm.dispatcher=flat")),
    long("dualpipe", 4, 2, 8, ("optim.overlap_gather=false", SMALL_BUCKETS)),
    long("dualpipe", 4, 2, 16, ("optim.reduce=bf16", SMALL_BUCKETS, *FP8)),
    long("1f1b", 1, 4, 8, ()),
]


@pytest.mark.parametrize(("schedule", "pp", "ep", "world", "overrides"), LAYOUTS)
def test_ranks_never_wait_in_a_circle(schedule: str, pp: int, ep: int, world: int, overrides: Sequence[str]) -> None:
    rehearsal = Rehearsal.of(config_of(schedule, pp, ep, *overrides), world, 2 * pp)
    assert sorted(rehearsal.programs) == list(range(world))
    rules = Rules(connections=32)
    assert rehearsal.always_room(rules), "so that no choice of the hardware matters, and one run is a proof"
    assert rehearsal.run(rules) == []


@pytest.fixture(scope="module")
def mirrored() -> Rehearsal:
    return Rehearsal.of(config_of("dualpipe", 2, 2), 8, 8)


def test_ranks_of_one_pipeline_rank_launch_alike(mirrored: Rehearsal) -> None:
    config, layout = config_of("dualpipe", 2, 2), mirrored.layout
    other = dry_run(config, 8, layout.rank(1, 1, 1), 8, layer=False, steps=2).program
    assert list(other) == mirrored.programs[layout.rank(1, 1, 1)] != mirrored.programs[layout.rank(1, 0, 0)]
    assert program_at(list(other), layout, 0, 0) == mirrored.programs[layout.rank(1, 0, 0)]


def test_a_program_has_everything_that_ranks_meet_in(mirrored: Rehearsal) -> None:
    events = mirrored.programs[0]
    launches = [event for event in events if isinstance(event, Launch)]
    used = {launch.communicator for launch in launches}
    links = {"from pipeline rank 0 to 1", "from pipeline rank 1 to 0"}
    assert links | {"ep", "world", "dp of pipeline ranks (0, 1)", "edp of pipeline ranks (0, 1)"} <= used
    assert {"send", "recv", "alltoall_base", "allreduce", "reduce_scatter_base", "allgather_base"} == {
        launch.operation for launch in launches
    }
    waited = [event.launch for event in events if isinstance(event, Wait)]
    assert len(set(waited)) == len(waited) <= len(launches)
    # Two micro-batches in two steps of eight, each of one MoE layer per chunk, tell the host their counts.
    assert sum(isinstance(event, HostWait) for event in events) >= 2 * 8


def test_one_communicator_for_all_links_is_a_circle(mirrored: Rehearsal) -> None:
    def on_one(event: Event) -> Event:
        return event._replace(communicator="pp") if isinstance(event, Launch) and event.peer is not None else event

    programs = {rank: [on_one(event) for event in program] for rank, program in mirrored.programs.items()}
    circle = [str(each) for each in replace(mirrored, programs=programs).run()]
    assert circle and any("in one queue" in line for line in circle), circle


def test_an_order_of_launches_is_a_circle(mirrored: Rehearsal) -> None:
    """NCCL_LAUNCH_ORDER_IMPLICIT: a receive that is behind another one holds up the exchange that both wait for."""
    for order in ("start", "end"):
        circle = [str(each) for each in mirrored.run(Rules(order=order))]  # type: ignore[arg-type]
        assert any("recv" in line and "launched before" in line for line in circle), circle
    alone = Rehearsal.of(config_of("1f1b", 1, 2), 4, 2)
    assert alone.run(Rules(order="start")) == alone.run(Rules(order="end")) == [], "without a pipeline it is none"


def test_without_caps_kernels_may_lack_room(mirrored: Rehearsal) -> None:
    groups = {
        rank: {name: Group(group.ranks, 32 if len(group.ranks) > 1 else 1) for name, group in of_rank.items()}
        for rank, of_rank in mirrored.groups.items()
    }
    greedy = replace(mirrored, groups=groups)
    assert not greedy.always_room(Rules(multiprocessors=64))
    circle = [str(each) for each in greedy.run(Rules(multiprocessors=64))]
    assert any("needs 32 of 64 multiprocessors" in line for line in circle), circle
    assert mirrored.run(Rules(multiprocessors=64)) == []


def reordered(program: Sequence[Event], order: Sequence[int]) -> list[Event]:
    """The program with its events in another order; waits are still for the same launches."""
    old = [index for index, event in enumerate(program) if isinstance(event, Launch)]
    new = {index: number for number, index in enumerate(index for index in order if isinstance(program[index], Launch))}

    def renumbered(event: Event) -> Event:
        return event._replace(launch=new[old[event.launch]]) if isinstance(event, Wait) else event

    return [renumbered(program[index]) for index in order]


def test_a_rank_that_launches_in_another_order_is_found(mirrored: Rehearsal) -> None:
    program = mirrored.programs[0]
    launches = [index for index, event in enumerate(program) if isinstance(event, Launch)]
    wait_of = {launches[event.launch]: index for index, event in enumerate(program) if isinstance(event, Wait)}
    sends = [index for index in launches if program[index][1] == "send"]
    # The last send of the first step comes after the sum over all ranks, to which the receiver gets only with it.
    last = sends[len(sends) // 2 - 1]
    after = wait_of[next(index for index in launches if index > last and program[index][0] == "world")]
    order = [index for index in range(len(program)) if index not in (last, wait_of[last])]
    place = order.index(after) + 1
    late = reordered(program, [*order[:place], last, wait_of[last], *order[place:]])
    circle = [str(each) for each in replace(mirrored, programs={**mirrored.programs, 0: late}).run()]
    assert any(line.startswith("rank 4: recv 7 from 0 of from pipeline rank 0 to 1") for line in circle), circle
    assert any("of world" in line for line in circle), circle
    assert reordered(program, range(len(program))) == program


def test_a_rank_that_skips_a_launch_is_named(mirrored: Rehearsal) -> None:
    last = max(index for index, event in enumerate(mirrored.programs[3]) if isinstance(event, Launch))
    programs = {**mirrored.programs, 3: mirrored.programs[3][:last]}
    with pytest.raises(MismatchError, match="rank 3 ends without launching"):
        replace(mirrored, programs=programs).run()


def test_the_command_tells_how_a_rehearsal_ends(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = [f"--set={name}" for name in ("parallel.pp=2", "parallel.ep=2", "precision.recipe=bf16")]
    command = ["dryrun", "tiny", "--world=4", "--microbatches=8", "--rehearse", *settings]
    assert main(command) == 0
    assert capsys.readouterr().out.startswith("no rank waits for ever: 4 ranks, two steps, ")
    monkeypatch.setattr(dryrun, "CONNECTIONS", 1)
    assert main(command) == 1
    told = capsys.readouterr().out.splitlines()
    assert told[0] == "ranks wait for each other for ever:" and len(told) > 2
    assert any("shares a queue of the hardware" in line for line in told)
