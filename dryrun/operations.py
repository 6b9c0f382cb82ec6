"""Cost of torch's operations on a GPU, from their schemas and shapes: kernels, bytes and FLOPs.

An operation counts as one kernel. Some are several on a GPU, such as a sort. Views and allocations are none.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from functools import cache
from typing import Any

from torch import Tensor
from torch._ops import OpOverload

from . import transformer_engine

NO_KERNEL = frozenset(
    (
        *("empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided", "detach", "alias", "lift_fresh"),
        *("lift", "_unsafe_view", "_reshape_alias", "_local_scalar_dense", "is_same_size", "set_", "resize_", "_conj"),
        *("conj", "resolve_conj", "resolve_neg", "result_type", "sym_size", "sym_numel", "sym_stride"),
        *("sym_storage_offset", "unsafe_split", "unsafe_chunk", "unsafe_split_with_sizes", "record_stream"),
    )
)
"""Operations that launch nothing, beside those whose results are views by their schema."""

ATTENTION = tuple(
    f"_scaled_dot_product_{kind}_attention{way}"
    for kind in ("cudnn", "flash", "efficient")
    for way in ("", "_backward")
)
MATRIX_PRODUCTS = frozenset(
    (
        *("mm", "bmm", "addmm", "baddbmm", "addmv", "mv", "dot", "_grouped_mm", "_scaled_mm", "_scaled_mm_v2"),
        *("_scaled_grouped_mm", *ATTENTION),
    )
)
"""Operations that tensor cores run; `counterflow` operations with `product` or `attention` in their names are too."""

_PICK = frozenset(["index_select", "gather", "embedding", "index", "take_along_dim"])  # read as much as they write
_PUT = frozenset(["index_copy_", "scatter_", "index_put_", "_index_put_impl_"])  # write as much as they read
_ADD = frozenset(["index_add_", "scatter_add_"])
_OVERWRITE = frozenset(["copy_", "fill_", "zero_", "normal_", "uniform_"])


@cache
def is_view(operation: OpOverload) -> bool:
    """Whether the results are views of the arguments, by the schema."""
    returns = operation._schema.returns
    return bool(returns) and all(r.alias_info is not None and not r.alias_info.is_write for r in returns)


@cache
def name_of(operation: OpOverload) -> str:
    """Name without its overload; without its namespace too, where that is torch's own."""
    namespace, _, name = operation._schema.name.partition("::")
    return name if namespace == "aten" else f"{namespace}::{name}"


@cache
def is_product(name: str) -> bool:
    """Whether an operation of this name is a matrix product or attention."""
    own = name.startswith("counterflow::") and ("product" in name or "attention" in name or "gemm" in name)
    return own or name in MATRIX_PRODUCTS


def tensors_in(values: Any) -> Iterator[Tensor]:
    """Tensors among arguments or results, in lists too."""
    if isinstance(values, Tensor):
        yield values
    elif isinstance(values, list | tuple):
        for value in values:
            yield from tensors_in(value)
    elif isinstance(values, dict):
        yield from tensors_in(list(values.values()))


def launches(operation: OpOverload, arguments: Iterable[Tensor], results: Iterable[Tensor]) -> bool:
    """Whether a GPU runs a kernel; an operation on no elements launches none."""
    if is_view(operation) or name_of(operation) in NO_KERNEL:
        return False
    made = [result.numel() for result in results]
    return any(made) if made else any(argument.numel() for argument in arguments)


def bytes_moved(operation: OpOverload, args: tuple[Any, ...], kwargs: Mapping[str, Any], results: list[Tensor]) -> int:
    """Bytes that the kernel reads and writes, if it reads each argument once and writes each result once."""
    name = name_of(operation)
    read = [_bytes(tensor) for tensor in tensors_in(args)]
    read += [_bytes(tensor) for key, value in kwargs.items() if key != "out" for tensor in tensors_in(value)]
    written = [_bytes(result) for result in results]
    if name in _OVERWRITE:
        read[0] = 0
    elif name in _PICK and read:
        read[0] = min(read[0], sum(written))
    elif name in ("_embedding_bag", "_embedding_bag_forward_only"):
        columns, rows = args[1], args[0]
        read[0] = columns.numel() * rows.shape[-1] * rows.element_size()
        written = written[:1]
    elif name in _PUT | _ADD:
        put = read[-1] if len(read) > 1 else written[0]
        read[0], written = (put if name in _ADD else 0), [put]
    return sum(read) + sum(written)


def flops(operation: OpOverload, args: tuple[Any, ...], results: list[Tensor]) -> float:
    """Floating-point operations of a matrix product, two for a multiplication and an addition; 0 for all others.

    Causal attention counts half of its products, as a fused kernel skips the other half.
    """
    name = name_of(operation)
    if not is_product(name):
        return 0.0
    if "scaled_dot_product" in name:
        query, _, value = args[1:4] if name.endswith("_backward") else args[:3]
        batch, heads, length, width = query.shape
        forward = float(batch * heads * length * length * (width + value.shape[-1]))
        return 2.5 * forward if name.endswith("_backward") else forward
    if name == "counterflow::add_product":  # the sum, [T, N] and [T, K]
        return 2.0 * args[1].numel() * args[2].shape[1]
    if name.startswith("counterflow::"):
        return transformer_engine.flops(name.removeprefix("counterflow::"), args)
    left, right = list(tensors_in(args))[-2:] if name in ("addmm", "baddbmm", "addmv") else list(tensors_in(args))[:2]
    if name.endswith("grouped_mm") and left.dim() == right.dim() == 2:  # [M, R] x [R, N], R in groups
        return 2.0 * left.numel() * right.shape[1]
    columns = right.shape[-1] if right.dim() > 1 else 1
    return 2.0 * left.numel() * columns


def _bytes(tensor: Tensor) -> int:
    """Bytes of the distinct elements: an expanded dimension is read once."""
    elements = 1
    for size, stride in zip(tensor.shape, tensor.stride(), strict=True):
        elements *= size if stride or not size else 1
    return elements * tensor.element_size()
