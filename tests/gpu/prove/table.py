"""Table of the recorded proofs in docs/gpu.md, made from the files in docs/proofs.

python -P tests/gpu/prove/table.py      # writes the table again
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[3]
PROOFS = ROOT / "docs" / "proofs"
PAGE = ROOT / "docs" / "gpu.md"
BEGIN, END = "<!-- proofs -->\n", "<!-- end of proofs -->"
NOTHING = "**Nothing has run on a GPU so far.**\n"


def proof_table(folder: Path = PROOFS) -> str:
    """The recorded proofs, one row a run; a plain sentence where there are none."""
    rows = [_row(run) for run in sorted(folder.iterdir()) if run.is_dir() and any(run.glob("*.json"))]
    if not rows:
        return NOTHING
    head = "| run | GPU | torch, Triton, CUDA | passed | not passed | TFLOP/s of a product | MFU |"
    return "\n".join([head, "| --- | --- | --- | --- | --- | --- | --- |", *rows]) + "\n"


def _row(run: Path) -> str:
    parts = {path.stem: json.loads(path.read_text(encoding="utf-8")) for path in sorted(run.glob("*.json"))}
    passed = [name for name, part in parts.items() if part["status"] == "passed"]
    others = [f"{name} ({part['status']})" for name, part in parts.items() if part["status"] != "passed"]
    numbers: dict[str, Any] = parts.get("environment", {}).get("numbers", {})
    product = next((value for name, value in numbers.items() if "bfloat16" in name and "TFLOP" in name), "")
    slices = parts.get("throughput", {}).get("tables", {}).get("training", [])
    mfu = max((row["MFU"] for row in slices if isinstance(row.get("MFU"), float)), default=None)
    versions = ", ".join(str(numbers.get(name, "?")) for name in ("torch", "triton", "CUDA of torch"))
    cells = [
        f"[{run.name}](proofs/{run.name}/index.md)",
        str(numbers.get("GPU", "?")),
        versions,
        f"{len(passed)} of {len(parts)}",
        ", ".join(others) or "none",
        str(product),
        "" if mfu is None else f"{mfu:.1%}",
    ]
    return f"| {' | '.join(cells)} |"


def with_table(page: str, table: str) -> str:
    """`page` with `table` between its two marks."""
    return re.sub(f"(?s)({BEGIN}).*?({END})", lambda found: f"{found[1]}{table}{found[2]}", page)


if __name__ == "__main__":
    PAGE.write_text(with_table(PAGE.read_text(encoding="utf-8"), proof_table()), encoding="utf-8")
