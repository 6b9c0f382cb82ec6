"""A layout drawn for a terminal: the nodes with their ranks, the grid, and the groups. Plain ASCII, 80 columns.

Every rank is drawn where all fit; otherwise dots stand for the middle. The cost does not grow with the number of ranks.
"""

from __future__ import annotations

from collections.abc import Callable

from ...parallel.layout import Layout
from .lines import WIDTH
from .numbers import count
from .table import align

ALL_NODES = 4  # most nodes that are all drawn; with more, the first and the last
SHOWN = 4  # most stages, replicas or members that are all drawn; with more, the first two and the last
ALL_COLUMNS = frozenset(range(2 + SHOWN))  # of the widest table


def describe_layout(layout: Layout) -> str:
    """Summary in one line: the numbers of ranks and nodes, and the degrees."""
    ranks, nodes = count(layout.world_size, "rank"), count(layout.num_nodes, "node")
    return f"{ranks} on {nodes}: pp {layout.pp} x edp {layout.edp} x ep {layout.ep} (dp {layout.dp})"


def draw_layout(layout: Layout) -> str:
    """Picture of `layout` in at most 80 columns, without a newline at the end.

    It has each node's ranks with their coordinates, the grid of expert parallel groups where some nodes are left out,
    and the groups with their sizes.
    """
    parts = [describe_layout(layout), *_draw_nodes(layout)]
    if layout.num_nodes > ALL_NODES and layout.world_size > layout.ep:
        parts.append(_draw_grid(layout))
    parts.append(_draw_groups(layout))
    return "\n\n".join(parts)


def _draw_nodes(layout: Layout) -> list[str]:
    last = layout.num_nodes - 1
    if last < ALL_NODES:
        return [_draw_node(layout, node) for node in range(last + 1)]
    between = f"... nodes 1 to {last - 1} likewise: each holds the next {layout.gpus_per_node} ranks ..."
    return [_draw_node(layout, 0), between, _draw_node(layout, last)]


def _draw_node(layout: Layout, node: int) -> str:
    """A box with a column for each rank of the node."""
    first = node * layout.gpus_per_node
    ranks = range(first, min(first + layout.gpus_per_node, layout.world_size))
    width = len(str(layout.world_size - 1)) + 2
    fits = (WIDTH - len("| rank  |")) // width
    shown = _pick(len(ranks), fits)

    def row(name: str, value: Callable[[int], int]) -> str:
        cells = ["..." if index is None else str(value(ranks[index])) for index in shown]
        return f"| {name:<4}" + "".join(f"{cell:>{width}}" for cell in cells) + " |"

    rows = [
        row("rank", lambda rank: rank),
        row("pp", lambda rank: layout.coordinates(rank).pp),
        row("edp", lambda rank: layout.coordinates(rank).edp),
        row("ep", lambda rank: layout.coordinates(rank).ep),
    ]
    title = f"node {node}"
    inside = max(len(rows[0]) - 2, len(title) + 3)
    rows = [f"{line[:-1]:<{inside + 1}}|" for line in rows]
    return "\n".join([f"+ {title} ".ljust(inside + 1, "-") + "+", *rows, "+" + "-" * inside + "+"])


def _draw_grid(layout: Layout) -> str:
    """A row for each pipeline stage, a column for each replica; a cell is an expert parallel group."""
    columns = _pick(layout.edp, SHOWN)
    table: list[tuple[str, ...]] = [("", "", *("..." if edp is None else f"edp {edp}" for edp in columns))]
    for pp in _pick(layout.pp, SHOWN):
        if pp is None:
            table.append(("...", "", *("" for _ in columns)))
            continue
        # An expert parallel group's ranks are consecutive, as `ep` runs fastest.
        ends = [
            edp if edp is None else (layout.rank(pp, edp, 0), layout.rank(pp, edp, layout.ep - 1)) for edp in columns
        ]
        table.append((f"pp {pp}", "ranks", *("..." if end is None else _span(*end) for end in ends)))
        table.append(("", "nodes", *("..." if end is None else _span(*map(layout.node, end)) for end in ends)))
    return "\n".join(align(table, left=ALL_COLUMNS))


def _draw_groups(layout: Layout) -> str:
    """A row for each kind of group: its members, the number of such groups, the first one, and its purpose."""
    kinds = (
        ("ep", layout.ep, 1, "exchange tokens"),
        ("edp", layout.edp, layout.ep, "hold the same experts"),
        ("dp", layout.dp, 1, "hold the same stage"),
        ("pp", layout.pp, layout.dp, "pass micro-batches on"),
    )
    table: list[tuple[str, ...]] = [("group", "members", "groups", "first", "its ranks")]
    for name, members, stride, purpose in kinds:
        if stride == 1 and members > 2:
            first = f"0-{members - 1}"
        else:
            first = ", ".join("..." if index is None else str(stride * index) for index in _pick(members, SHOWN))
        table.append((name, str(members), str(layout.world_size // members), first, purpose))
    return "\n".join(align(table, left=ALL_COLUMNS))


def _pick(things: int, most: int) -> list[int | None]:
    """Indices of `things`: all of them up to `most`; else the first, None in place of those left out, the last."""
    return list(range(things)) if things <= most else [*range(most - 2), None, things - 1]


def _span(first: int, last: int) -> str:
    return str(first) if first == last else f"{first}-{last}"
