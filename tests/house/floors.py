"""Draw the floors of the house from the package's real imports: `make floors` writes docs/floors.svg.

An arrow leads from a folder to a folder that one of its files imports. Arrows that follow from two others are left
out, and so are those to the contracts at the root, which all floors read.
"""

from __future__ import annotations

import ast
from collections import defaultdict
from collections.abc import Iterable, Mapping
from graphlib import TopologicalSorter
from html import escape
from pathlib import Path
from typing import NamedTuple

from counterflow.tests.house.imports import AT_THE_ROOT, folder_of, graph_of, modules_of, parsed, tracked_files

PICTURE = Path("docs/floors.svg")

WIDTH, MARGIN = 900, 24
BOX_WIDTH, BOX_HEIGHT, FLOOR = 280, 58, 96
STYLE = """
  .box { fill: #f4f6f8; stroke: #8a97a5 } .root { fill: #e7edf3; stroke: #8a97a5 }
  .name { font: 600 15px system-ui, sans-serif; fill: #17212b }
  .role { font: 11.5px system-ui, sans-serif; fill: #4c5a67 }
  .arrow { stroke: #5b7ea3; stroke-width: 1.4; fill: none } .head { fill: #5b7ea3 }
  @media (prefers-color-scheme: dark) {
    .box { fill: #1d252d; stroke: #66737f } .root { fill: #26303a; stroke: #66737f }
    .name { fill: #e8edf2 } .role { fill: #a9b5c0 } .arrow { stroke: #86a9cf } .head { fill: #86a9cf }
  }
"""

Arrows = Mapping[str, frozenset[str]]
"""For each folder the folders that it imports."""


class House(NamedTuple):
    """The folders of the package: their imports, and the docstring of each."""

    arrows: Arrows
    roles: Mapping[str, str]


def read_house(root: Path) -> House:
    """Read the folders of the package at `root`."""
    modules = [path for path in modules_of(tracked_files(root)) if len(path.parts) > 1]
    found: dict[str, set[str]] = {folder_of(path): set() for path in modules}
    for path, targets in graph_of(root, modules).items():
        found[folder_of(path)] |= {folder_of(target) for target in targets} - {folder_of(path)}
    roles = {folder: ast.get_docstring(parsed(root / folder / "__init__.py")) or "" for folder in found}
    return House({folder: frozenset(targets) for folder, targets in found.items()}, roles)


def needed(arrows: Arrows) -> Arrows:
    """Only the arrows that do not follow from two others."""

    def below(folder: str) -> set[str]:
        return set(arrows[folder]).union(*(below(target) for target in arrows[folder]))

    return {
        folder: frozenset(t for t in targets if not any(t in below(other) for other in targets - {t}))
        for folder, targets in arrows.items()
    }


def floors_of(arrows: Arrows) -> list[list[str]]:
    """Folders by floor, highest first: a folder stands on the floor below the lowest of those that import it."""
    depths: dict[str, int] = {}
    for folder in reversed([*TopologicalSorter(arrows).static_order()]):  # raises CycleError where there is a circle
        depths[folder] = 1 + max((depths[user] for user, targets in arrows.items() if folder in targets), default=-1)
    floors: dict[int, list[str]] = defaultdict(list)
    for folder in sorted(arrows):
        floors[depths[folder]].append(folder)
    return [floors[depth] for depth in sorted(floors)]


def draw(house: House) -> str:
    """The picture as SVG, light or dark as the reader's screen is."""
    floors = floors_of(house.arrows)
    ground = MARGIN + FLOOR * len(floors)
    height = ground + BOX_HEIGHT + MARGIN
    drawn, centres = needed(house.arrows), dict[str, tuple[float, float]]()
    for depth, folders in enumerate(floors):
        y = MARGIN + FLOOR * depth + BOX_HEIGHT / 2
        for index, folder in enumerate(folders):
            users = [centres[user][0] for user, targets in drawn.items() if folder in targets]
            alone = len(folders) == 1 and users  # then it stands below the folders that import it
            x = sum(users) / len(users) if alone else WIDTH * (2 * index + 1) / (2 * len(folders))
            centres[folder] = (x, y)
    described = "; ".join(f"{folder} imports {', '.join(sorted(house.arrows[folder])) or 'none'}" for folder in centres)
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" role="img" aria-label="Floors">',
        f"<title>The folders of Counterflow and their imports</title><desc>{escape(described)}</desc>",
        f"<style>{STYLE}</style>",
        '<defs><marker id="head" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="8" markerHeight="8" orient="auto">'
        '<path class="head" d="M0 0 8 4 0 8z"/></marker></defs>',
    ]
    for folder, targets in sorted(drawn.items()):
        parts += [_arrow(centres[folder], centres[target]) for target in sorted(targets)]
    for folder, (x, y) in centres.items():
        role = house.roles[folder].rstrip(".")
        parts.append(_box("box", x - BOX_WIDTH / 2, y - BOX_HEIGHT / 2, BOX_WIDTH, f"{folder}/", role))
    contracts = ", ".join(sorted(AT_THE_ROOT))
    parts.append(_box("root", MARGIN, ground, WIDTH - 2 * MARGIN, "contracts at the root, for all floors", contracts))
    return "\n".join([*parts, "</svg>", ""])


def _arrow(start: tuple[float, float], end: tuple[float, float]) -> str:
    (x0, y0), (x1, y1) = (start[0], start[1] + BOX_HEIGHT / 2), (end[0], end[1] - BOX_HEIGHT / 2)
    bend = (y1 - y0) / 2
    path = f"M{x0:.0f} {y0:.0f}C{x0:.0f} {y0 + bend:.0f} {x1:.0f} {y1 - bend:.0f} {x1:.0f} {y1:.0f}"
    return f'<path class="arrow" marker-end="url(#head)" d="{path}"/>'


def _box(kind: str, x: float, y: float, width: float, name: str, role: str) -> str:
    middle = x + width / 2
    return (
        f'<rect class="{kind}" x="{x:.0f}" y="{y:.0f}" width="{width:.0f}" height="{BOX_HEIGHT}" rx="6"/>'
        f'<text class="name" x="{middle:.0f}" y="{y + 25:.0f}" text-anchor="middle">{escape(name)}</text>'
        f'<text class="role" x="{middle:.0f}" y="{y + 44:.0f}" text-anchor="middle">{escape(role)}</text>'
    )


def main(arguments: Iterable[str] = ()) -> None:
    """Write the picture of the repository that this file lies in."""
    root = Path(__file__).resolve().parents[2]
    (root / PICTURE).write_text(draw(read_house(root)), encoding="utf-8")
    print(f"{PICTURE} written")


if __name__ == "__main__":
    main()
