"""Checks that a schedule can run: every piece of work once, where its stage is, in an order without a deadlock."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ...settings import UsageError
from .actions import Action, Overlap, Schedule, parts
from .rendezvous import find_deadlock


class ScheduleError(UsageError):
    """A schedule that cannot run. `rank`, `position` in its order and `action` locate the fault, None if unknown."""

    def __init__(self, schedule: Schedule, message: str, rank: int | None = None, position: int | None = None) -> None:
        self.rank, self.position = rank, position
        self.action: Action | Overlap | None = None
        location = ""
        if rank is not None:
            location += f", rank {rank}"
            if position is not None:
                location += f", position {position}"
                if position < len(schedule.actions[rank]):
                    entry: object = schedule.actions[rank][position]
                    self.action = entry if isinstance(entry, Action | Overlap) else None
                    location += f" ({entry!r})" if self.action is None else f" ({self.action})"
        super().__init__(f"schedule {schedule.name}{location}: {message}")


@dataclass(frozen=True)
class Checked:
    """Result of checking a schedule that can run."""

    peak: tuple[int, ...]
    """Largest number of live (stage, micro-batch) on each rank: from the start of F to the end of B or W."""


def check(schedule: Schedule, training: bool = True) -> Checked:
    """Refuse a schedule that cannot run, otherwise return its live micro-batches. Linear in the number of actions.

    Every stage of every micro-batch needs one F and, when `training`, one backward (a B, or an I and a W), on one
    rank that holds the stage, in an order that the data allows. Communication is taken to be rendezvous: a send blocks
    until it is received. At a boundary a rank posts its receives and sends, and continues when its inputs have arrived
    and its own sends are matched. A schedule that runs so also runs where sends are buffered.

    Raises ScheduleError.
    """
    check_form(schedule)
    done = _check_work(schedule)
    _check_complete(schedule, done, training)
    deadlock = find_deadlock(schedule)
    if deadlock:
        first = deadlock[0]
        waits = "; ".join(map(str, deadlock))
        raise ScheduleError(schedule, f"deadlock, each waits for the next: {waits}", first.rank, first.position)
    return Checked(tuple(peak_live(actions) for actions in schedule.actions))


def peak_live(actions: Sequence[Action | Overlap]) -> int:
    """Largest number of (stage, micro-batch) whose activations a rank with these actions holds at once."""
    live = peak = 0
    for action in actions:
        kinds = [part.kind for part in parts(action)]
        live += kinds.count("F")  # a pair's forward begins before its backward ends
        peak = max(peak, live)
        live -= kinds.count("B") + kinds.count("W")
    return peak


def check_form(schedule: Schedule) -> None:
    """Check types and sizes of the parts, which a user's function may get wrong, but no single action."""
    for name in ("num_ranks", "num_stages", "num_microbatches"):
        if not _is_int(getattr(schedule, name)):
            raise ScheduleError(schedule, f"{name} is {getattr(schedule, name)!r}, which is no int")
        if getattr(schedule, name) < 1:
            raise ScheduleError(schedule, f"{name} is {getattr(schedule, name)}, but at least 1 is needed")
    for name, given in (("stages_of_rank", schedule.stages_of_rank), ("actions", schedule.actions)):
        if not isinstance(given, tuple | list):
            raise ScheduleError(schedule, f"{name} must be a tuple with one entry per rank, not {_shown(given)}")
        if len(given) != schedule.num_ranks:
            raise ScheduleError(schedule, f"{name} is given for {len(given)} ranks, but there are {schedule.num_ranks}")
    for rank, actions in enumerate(schedule.actions):
        if not isinstance(actions, tuple | list):
            raise ScheduleError(schedule, f"its actions must be a tuple of Actions, not {_shown(actions)}", rank)
    held: set[int] = set()
    for rank, stages in enumerate(schedule.stages_of_rank):
        if not isinstance(stages, tuple | list) or not all(map(_is_int, stages)):
            fault = f"its stages must be a tuple of numbers, such as ({rank},), not {_shown(stages)}"
            raise ScheduleError(schedule, fault, rank)
        if len(set(stages)) != len(stages):
            raise ScheduleError(schedule, f"holds a stage twice: {list(stages)}", rank)
        held |= set(stages)
    if held != set(range(schedule.num_stages)):
        wrong = sorted(held ^ set(range(schedule.num_stages)))
        raise ScheduleError(
            schedule, f"the ranks must hold stages 0 to {schedule.num_stages - 1}, wrong or missing are {wrong}"
        )


def _is_int(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _shown(value: object) -> str:
    """Type and repr of a wrong value, cut to a length that suits a message."""
    shown = repr(value)
    return f"the {type(value).__name__} {shown if len(shown) <= 60 else f'{shown[:57]}...'}"


Located = dict[Action, tuple[int, int]]
"""Rank of each action and its position in the rank's order."""


def _check_work(schedule: Schedule) -> Located:
    """Check that every action is one of the schedule's and runs once, where its stage is, after its inputs there."""
    done: Located = {}
    for rank, actions in enumerate(schedule.actions):
        held = set(schedule.stages_of_rank[rank])
        for position, action in enumerate(actions):
            if isinstance(action, Overlap):
                _check_pair(schedule, rank, position, action)
            elif not isinstance(action, Action):
                fault = f"expects an Action or an Overlap, not {_shown(action)}"
                raise ScheduleError(schedule, fault, rank, position)
            for part in parts(action):
                fault = _fault(schedule, held, done, part, rank)
                if fault:
                    raise ScheduleError(schedule, fault, rank, position)
                done[part] = rank, position
    return done


def _check_pair(schedule: Schedule, rank: int, position: int, pair: Overlap) -> None:
    """Check that neither half of a pair needs the other, because they run as one."""
    for half in pair:
        if not isinstance(half, Action):
            raise ScheduleError(schedule, f"a pair is of two Actions, not of {_shown(half)}", rank, position)
    if pair.forward.kind != "F" or pair.backward.kind not in ("B", "I"):
        kinds = f"{pair.forward.kind} and {pair.backward.kind}"
        raise ScheduleError(schedule, f"a pair is an F and a B or I, not {kinds}", rank, position)
    if pair.forward.microbatch == pair.backward.microbatch:
        fault = "the backward of a micro-batch needs all its forwards, so the two cannot be a pair"
        raise ScheduleError(schedule, fault, rank, position)


# By kind: the kinds of the same stage and micro-batch that may not run before an action, and the one that must.
_CLASHES = {"F": "F", "B": "BIW", "I": "BI", "W": "BW"}
_BEFORE = {"F": "", "B": "F", "I": "F", "W": "I"}


def _fault(schedule: Schedule, held: set[int], done: Located, part: Action, rank: int) -> str | None:
    """The fault of running `part` next on `rank`, if there is one."""
    kind, stage, microbatch = part
    if not isinstance(kind, str) or kind not in _CLASHES:
        return f"kind {kind!r} is none of F, B, I and W"
    for name, value in (("stage", stage), ("microbatch", microbatch)):
        if not _is_int(value):
            return f"{name} {value!r} is no int"
    if not 0 <= microbatch < schedule.num_microbatches:
        return f"there is no micro-batch {microbatch}, only 0 to {schedule.num_microbatches - 1}"
    if stage not in held:
        return f"the rank holds stages {sorted(held)}, not {stage}"
    for other in _CLASHES[kind]:
        earlier = done.get(Action(other, stage, microbatch))  # type: ignore[arg-type]
        if earlier is not None:
            each = "every stage of a micro-batch has one F, and one B or an I and a W"
            return f"{part} after its {other} on rank {earlier[0]}, position {earlier[1]}: {each}"
    for needed in _BEFORE[kind]:
        earlier = done.get(Action(needed, stage, microbatch))  # type: ignore[arg-type]
        if earlier is None or earlier[0] != rank:
            return f"{needed}{microbatch} of stage {stage} has not run on this rank before {kind}{microbatch}"
    return None


def _check_complete(schedule: Schedule, done: Located, training: bool) -> None:
    """Check that no work is missing, and that stages on one rank come in the order in which the data flows."""
    up = [(stage, "F") for stage in range(schedule.num_stages)]
    down = [(stage, "BI") for stage in reversed(range(schedule.num_stages))]
    for microbatch in range(schedule.num_microbatches):
        needed: Action | None = None
        for stage, kinds in up + down if training else up:
            options = [Action(kind, stage, microbatch) for kind in kinds]  # type: ignore[arg-type]
            action = next((action for action in options if action in done), None)
            if action is None:
                # The rank that ran the forward has to run the backward; any holder of the stage may run a forward.
                rank = schedule.holders(stage)[0] if kinds == "F" else done[Action("F", stage, microbatch)][0]
                fault = f"{' or '.join(kinds)} is missing for micro-batch {microbatch}, stage {stage}"
                raise ScheduleError(schedule, fault, rank)
            rank, position = done[action]
            if needed is not None and done[needed][0] == rank and done[needed][1] > position:
                fault = f"{action} needs {needed}, which comes later, at position {done[needed][1]}"
                raise ScheduleError(schedule, fault, rank, position)
            if action.kind == "I" and action._replace(kind="W") not in done:
                raise ScheduleError(schedule, f"W{microbatch} of stage {stage} is missing", rank, position)
            needed = action
    if not training:
        for part, (rank, position) in done.items():
            if part.kind != "F":
                raise ScheduleError(schedule, "a schedule for evaluation has forwards alone", rank, position)
