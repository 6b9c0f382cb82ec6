"""A limit on deferred weight gradients, so that what they hold fits into the memory of the steady state.

A deferred W is one whose I has run. It holds the inputs of its stage's linear layers and the gradients of their
outputs: up to 2.5 times the bytes of a forward in flight where activations are recomputed. When the last forwards have
run, a schedule may defer half as many W as it had forwards in flight, which is then the largest memory of the step.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import replace

from .actions import Action, Overlap, Schedule, parts


def forwards_in_flight(schedule: Schedule) -> int:
    """Largest number of (stage, micro-batch) on any rank between the F and the B or I. A deferred W does not count."""
    most = 0
    for actions in schedule.actions:
        live = 0
        for action in actions:
            kinds = [part.kind for part in parts(action)]
            live += kinds.count("F")
            most = max(most, live)
            live -= kinds.count("B") + kinds.count("I")
    return most


def limit_deferred(
    schedule: Schedule, ratios: Sequence[float], budget: float, least: int = 1, most: int | None = None
) -> Schedule:
    """The schedule with some W earlier than it has them, where too many would be deferred. Nothing else moves.

    Memory is counted in forwards in flight; a deferred W of stage s counts `ratios[s]`. Before an action that would
    bring a rank above `budget`, the rank runs its oldest deferred W, one after another, while more than `least` would
    be deferred. No more than `most` are deferred; each of the two counts the I of the action itself. Linear in the
    number of actions.

    A W waits for no other rank and none waits for it, so a schedule that could run still can.
    """
    order = tuple(tuple(_limit(actions, ratios, budget, least, most)) for actions in schedule.actions)
    return schedule if order == schedule.actions else replace(schedule, actions=order)


def _limit(
    actions: Sequence[Action | Overlap], ratios: Sequence[float], budget: float, least: int, most: int | None
) -> list[Action | Overlap]:
    """The order of one rank with its early W."""
    order: list[Action | Overlap] = []
    deferred: deque[Action] = deque()
    moved: set[Action] = set()
    live, held = 0, 0.0
    for action in actions:
        if isinstance(action, Action) and action.kind == "W":
            if action in moved:
                moved.remove(action)
                continue
            deferred.remove(action)
            held -= ratios[action.stage]
        else:
            later = [part._replace(kind="W") for part in parts(action) if part.kind == "I"]
            whole = sum(part.kind == "B" for part in parts(action))
            live += sum(part.kind == "F" for part in parts(action))
            more = sum(ratios[part.stage] for part in later)
            while deferred and (
                (len(deferred) + len(later) > least and held + max(live, live - len(later) - whole + more) > budget)
                or (most is not None and len(deferred) + len(later) > most)
            ):
                early = deferred.popleft()
                held -= ratios[early.stage]
                moved.add(early)
                order.append(early)
            live -= len(later) + whole
            deferred += later
            held += more
        order.append(action)
    return order
