"""Record of torch's operations that have a kernel for CUDA, made with a build of torch for CUDA; it needs no GPU.

    python -P tests/gpu/record_cuda_kernels.py > tests/gpu/cuda_kernels.txt

One line an operation, with its overloads. An operation has a kernel where the dispatcher has one for CUDA, or one that
is written in other operations. Tests check that dry runs use no others, on a CPU build, whose tables lack CUDA. Record
with the oldest torch that pyproject.toml admits and a GPU is likely to have.
"""

from __future__ import annotations

import sys
from collections import defaultdict
from pathlib import Path

import torch

RECORD = Path(__file__).with_name("cuda_kernels.txt")


def with_kernels() -> dict[str, list[str]]:
    """Overloads that have a kernel for CUDA, by the operation's name."""
    found = defaultdict(list)
    for name in torch._C._dispatch_get_all_op_names():
        if name.startswith("aten::") and torch._C._dispatch_has_computed_kernel_for_dispatch_key(name, "CUDA"):
            operation, _, overload = name.removeprefix("aten::").partition(".")
            found[operation].append(overload or "default")
    return {operation: sorted(found[operation]) for operation in sorted(found)}


def read(path: Path = RECORD) -> tuple[str, set[str]]:
    """Version of torch of a record, and its operations as a dry run names them, such as `aten.mm.default`."""
    first, *lines = path.read_text(encoding="utf-8").splitlines()
    pairs = (line.split(": ") for line in lines)
    return first, {f"aten.{operation}.{overload}" for operation, all in pairs for overload in all.split()}


def main() -> None:
    if torch.version.cuda is None:
        sys.exit(f"torch {torch.__version__} is no build for CUDA: its tables have no kernels for it")
    print(f"torch {torch.__version__}")
    for operation, overloads in with_kernels().items():
        print(f"{operation}: {' '.join(overloads)}")


if __name__ == "__main__":
    main()
