"""Text of `counterflow verify` in 80 columns for a person, and its plain data for programs."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Sequence
from typing import Any

from ..configs.config import Config
from ..report.text.lines import WIDTH, wrap_row
from ..report.text.numbers import count, plural
from ..report.text.table import align
from .check import MOST_SEEDS, Attempt, MovedChoices, Outcome
from .compare import CLASSES, Difference
from .grid import grid_of
from .shrink import Shrunk

INDENT = 14  # columns before the texts of rows
MOST_COLUMNS = 5
"""Largest number of steps that have a column each; of more steps the one that is furthest off is shown."""

NUMBERS = {
    "loss": "loss",
    "loss_mtp": "MTP loss",
    "loss_balance": "balance loss",
    "loss_device": "device balance loss",
    "loss_communication": "communication balance loss",
    "grad_norm": "gradient norm",
}
QUANTITIES = {
    "plain gradient": "gradient of the single process (against plain autograd)",
    "gradient": "gradient",
    "bias": "router bias",
    "weight": "updated weight",
    "exp_avg": "first moment",
    "exp_avg_sq": "second moment",
    "copy": "a rank's copy of a weight (against the master weight)",
}


def heading(config: Config, shrunk: Shrunk) -> str:
    """The small run: keys whose values differ from the configuration's, and properties that stay."""
    ranks = shrunk.layout.world_size
    steps = shrunk.config.train.steps
    assert steps is not None, "a shrunk run has a number of steps"
    rows: list[tuple[str, ...]] = [("shrunk", "yours", "here", "")]
    yours = grid_of(config)
    all_ranks = "auto" if yours.edp is None else str(yours.ranks)
    rows.append(("ranks", all_ranks, str(ranks), ""))
    rows += [(key, _shown(mine), _shown(here), why) for key, mine, here, why in shrunk.changes if key != "train.steps"]
    against = "against one" if ranks > 1 else "against plain autograd"
    sizes = f"{count(ranks, 'process', 'es')} on the CPU {against}, {count(steps, 'step')}"
    lines = [
        *textwrap.wrap(f"{config.run.name}, made small: {sizes}", WIDTH),
        "",
        *(line[:WIDTH] for line in align(rows, frozenset({0, 3}))),
        "",
        *wrap_row("as yours", ", ".join(_kept(config, shrunk)), INDENT),
    ]
    if shrunk.lost:
        lines += wrap_row("not here", f"{'; '.join(shrunk.lost)} (more processes: --nproc)", INDENT)
    return "\n".join(lines)


def body(outcomes: Sequence[Outcome], ranks: int) -> str:
    """Tables of all precisions, and the verdicts."""
    parts = [wrap_row("text", outcomes[0].origin, INDENT)]
    for outcome in outcomes:
        parts += [_ties(outcome), _table(outcome, ranks)]
    parts.append(textwrap.wrap(_legend(ranks), WIDTH))
    parts.append([line for outcome in outcomes for line in _verdict(outcome, ranks)])
    return "\n\n".join("\n".join(part) for part in parts if part)


def to_json(config: Config, shrunk: Shrunk, outcomes: Sequence[Outcome]) -> dict[str, Any]:
    """Everything, for programs. An infinite error is null."""
    layout = shrunk.layout
    return {
        "config": config.run.name,
        "agrees": all(outcome.agrees for outcome in outcomes),
        "device": "cpu",
        "grid": {"ranks": layout.world_size, "pp": layout.pp, "ep": layout.ep, "edp": layout.edp},
        "changes": [change._asdict() for change in shrunk.changes],
        "lost": list(shrunk.lost),
        "runs": [_outcome_json(outcome) for outcome in outcomes],
    }


def _outcome_json(outcome: Outcome) -> dict[str, Any]:
    return {
        "recipe": outcome.recipe,
        "agrees": outcome.agrees,
        "text": outcome.origin,
        "microbatches": list(outcome.microbatches),
        "tolerances": vars(outcome.tolerances),
        "tries": [
            {
                "seed": attempt.seed,
                "closest_choice": _finite(attempt.closest),
                "near_balance_choices": attempt.near_balance,
                "moved": [vars(moved) | {"tie": moved.tie} for moved in attempt.moved],
            }
            for attempt in outcome.attempts
        ],
        "first_departure": None if outcome.last.first is None else _difference_json(outcome.last.first),
        "differences": [_difference_json(found) for found in outcome.last.differences],
    }


def _difference_json(found: Difference) -> dict[str, Any]:
    return {
        **{name: getattr(found, name) for name in ("step", "quantity", "name", "kind", "bound")},
        "scale": _finite(found.scale),
        "largest": _finite(found.largest),
        "error": _finite(found.error),
        "departs": found.departs,
        "ranks": list(found.ranks),
    }


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


def _kept(config: Config, shrunk: Shrunk) -> list[str]:
    """Properties of the topology that are as in the configuration."""
    model, parallel = config.model, config.parallel
    changed = {change.key for change in shrunk.changes}
    options = "".join(f" {name}={value}" for name, value in parallel.schedule_options.items())
    words = []
    if shrunk.layout.pp > 1:
        words += [f"schedule {parallel.schedule}{options}"] * ("parallel.schedule" not in changed)
        words += ["split balanced"] * (parallel.split == "balanced")
        order = parallel.overlap_order
        words.append(f"overlap order {order if isinstance(order, str) else 'of your own'}")
    words += [f"edp {shrunk.layout.edp}"] * (grid_of(config).edp == shrunk.layout.edp)
    words.append(f"MTP depth {model.num_nextn_predict_layers}")
    words += [f"{model.num_experts_per_tok} experts a token"] * ("model.num_experts_per_tok" not in changed)
    words += [f"{model.topk_group} of {model.n_group} groups"] * (model.n_group > 1)
    words += [f"recompute {config.memory.recompute}", f"{config.precision.recipe}, moments {config.optim.moments}"]
    return words


def _table(outcome: Outcome, ranks: int) -> list[str]:
    """A row for each number and parameter class, a column for each step."""
    found, bounds = outcome.last.differences, outcome.tolerances
    steps = sorted({each.step for each in found if each.quantity != "plain gradient"})
    shown = steps if len(steps) <= MOST_COLUMNS else []
    head = [f"step {step}" for step in shown] or [f"worst of {len(steps)} steps"]
    rows: list[tuple[str, ...]] = [(outcome.recipe, *head, "within")]

    def row(name: str, quantities: Sequence[str], kinds: Sequence[str], bound: float) -> None:
        chosen = [each for each in found if each.quantity in quantities and each.kind in kinds]
        if chosen:
            cells = [[each for each in chosen if each.step == step] for step in shown] or [chosen]
            rows.append((name, *map(_worst, cells), f"{bound:.0e}" if bound else "equal"))

    def classes(title: str, quantity: str, bound: float) -> None:
        if any(each.quantity == quantity for each in found):
            rows.append((title, *[""] * (len(head) + 1)))
            for kind in CLASSES:
                row(f"  {kind}", [quantity], [kind], bound)

    if ranks > 1:
        counts = [str(outcome.microbatches[step - 1]) for step in shown]
        counts = counts or [" to ".join(map(str, sorted({min(outcome.microbatches), max(outcome.microbatches)})))]
        rows.append(("micro-batches", *counts, ""))
        for kind, name in NUMBERS.items():
            row(name, ["number"], [kind], bounds.gradient if kind == "grad_norm" else bounds.loss)
        classes("gradients", "gradient", bounds.gradient)
        row("router biases", ["bias"], CLASSES, 0.0)
        classes("updated weights", "weight", bounds.weight)
        row("moments", ["exp_avg", "exp_avg_sq"], CLASSES, bounds.moment)
        row("copies of weights", ["copy"], CLASSES, 0.0)
        row("plain autograd", ["plain gradient"], CLASSES, bounds.gradient)
    else:
        classes("gradients", "plain gradient", bounds.gradient)
    return align(rows, frozenset({0}))


def _worst(found: Sequence[Difference]) -> str:
    if not found:
        return ""
    worst = max(each.error for each in found)
    text = "equal" if worst == 0 else f"{worst:.1e}" if math.isfinite(worst) else "not finite"
    return f"{text} !" if any(each.departs for each in found) else text


def _legend(ranks: int) -> str:
    of = "Largest difference of two elements, in parts of the tensor's largest value"
    if ranks == 1:
        return f"{of}: the training step on one rank against plain autograd on the model's own forward."
    return (
        f"{of}, the worst tensor of each class; losses in parts of themselves. Each step begins with the single "
        "process's weights, moments and biases, so that nothing that one step rounds otherwise is carried on, as BF16 "
        "moments would most. Updated weights and moments are compared with what the single process makes of the same "
        "gradients. Plain autograd: the single process's gradients of step 1, against those of the model's forward."
    )


def _ties(outcome: Outcome) -> list[str]:
    """Reasons why seeds were given up."""
    lines = []
    for attempt in outcome.attempts[:-1]:
        what = _why_unsure(attempt)
        lines += textwrap.wrap(f"{outcome.recipe}, seed {attempt.seed}: {what}; trying another seed", WIDTH)
    return lines


def _why_unsure(attempt: Attempt) -> str:
    if attempt.moved:
        return _describe(attempt.moved[0])
    assert attempt.first is not None
    near = count(attempt.near_balance, "choice")
    return (
        f"{_quantity(attempt.first)} of step {attempt.first.step} departs, and {near} that the balance loss counts "
        f"there may come out either way (the closest by {attempt.closest:.1e})"
    )


def _describe(moved: MovedChoices) -> str:
    return (
        f"in step {moved.step}, MoE layer {moved.layer}, {count(moved.choices, 'choice')} of experts came out "
        f"otherwise; rounding can move {moved.near} there (the closest scores are {moved.closest:.1e} apart)"
    )


def _quantity(found: Difference) -> str:
    return NUMBERS[found.name] if found.quantity == "number" else f"{QUANTITIES[found.quantity]} {found.name}"


def _verdict(outcome: Outcome, ranks: int) -> list[str]:
    attempt, first = outcome.last, outcome.last.first
    if outcome.agrees:
        what = "one process" if ranks > 1 else "plain autograd; with one process there is nothing else to compare"
        return textwrap.wrap(f"{outcome.recipe}: agrees with {what}", WIDTH)
    lines = [f"{outcome.recipe}: DEPARTS"]
    if attempt.moved:
        lines += textwrap.wrap(_routing(attempt, len(outcome.attempts)), WIDTH)
    if first is not None:
        lines += _departure(first)
    return lines


def _routing(attempt: Attempt, tries: int) -> str:
    text = _describe(attempt.moved[0])
    if attempt.tied:
        return f"{text}, as with all {MOST_SEEDS} seeds: this cannot tell rounding from a fault"
    return f"{text}, so rounding does not explain it" + (f" (seed {attempt.seed}, try {tries})" if tries > 1 else "")


def _departure(first: Difference) -> list[str]:
    """The first tensor that departs, in full."""
    named = NUMBERS.get(first.name) if first.quantity == "number" else None
    held = (
        f"{plural(len(first.ranks), 'rank', 'ranks')} {' '.join(map(str, first.ranks))}" if first.ranks else "no rank"
    )
    largest = (
        f"{first.largest:.3g}" if math.isfinite(first.largest) else "not finite: missing, owned twice, NaN or infinite"
    )
    relation = f", {first.error:.2g} of its largest value {first.scale:.3g}" if math.isfinite(first.error) else ""
    rows = [
        ("step", str(first.step)),
        ("quantity", named or QUANTITIES[first.quantity]),
        *([] if named else [("tensor", f"{first.name} ({first.kind})")]),
        ("difference", f"{largest}{relation}; allowed {first.bound:.0e}" if first.bound else f"{largest}{relation}"),
        ("held by", held),
    ]
    return [line for name, text in rows for line in wrap_row(f"  {name}", text, INDENT)]


def _shown(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.3g}"
    if isinstance(value, bool) or value is None:
        return {True: "true", False: "false", None: "null"}[value]
    if isinstance(value, list | tuple):
        text = f"[{', '.join(map(str, value))}]"
        return text if len(text) <= 20 else f"{len(value)} stages"
    return str(value)
