"""Collectives that may not be used, because gloo can crash in them: see `tests/gather.py`."""

from __future__ import annotations

import ast
from pathlib import Path

ON_FUNCTIONAL_COLLECTIVES = {"full_tensor", "redistribute", "_functional_collectives", "_c10d_functional"}
COALESCED = {"_coalescing_manager", "all_reduce_coalesced", "all_gather_coalesced"}


def named_in(source: str) -> set[str]:
    """Every name, attribute and import in the code; comments and strings are not."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Attribute):
            found.add(node.attr)
        elif isinstance(node, ast.Name):
            found.add(node.id)
        elif isinstance(node, ast.ImportFrom | ast.Import):
            module = (getattr(node, "module", None) or "").split(".")
            found.update(module, *(alias.name.split(".") for alias in node.names))
    return found


def test_no_collective_that_gloo_can_die_of_is_used(root: Path, project_files: list[Path]) -> None:
    unsafe = ON_FUNCTIONAL_COLLECTIVES | COALESCED
    python = [path for path in project_files if path.suffix == ".py"]
    used = {str(path): named_in((root / path).read_text(encoding="utf-8")) & unsafe for path in python}
    assert {path: names for path, names in used.items() if names} == {}


def test_the_check_sees_every_way_to_use_one() -> None:
    ways = [
        "whole = tensor.full_tensor()",
        "import torch.distributed._functional_collectives as funcol",
        "from torch.distributed import _functional_collectives",
        "from torch.distributed._functional_collectives import all_gather_tensor",
        "torch.ops._c10d_functional.all_reduce(x, 'sum', group)",
    ]
    assert all(named_in(way) & ON_FUNCTIONAL_COLLECTIVES for way in ways)
    assert not named_in("'''full_tensor'''  # redistribute") & ON_FUNCTIONAL_COLLECTIVES
