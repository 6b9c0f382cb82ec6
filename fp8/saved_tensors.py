"""Identity of the tensors that autograd saves for the backward, for hooks that must recognise one."""

from __future__ import annotations

from torch import Tensor


def memory_of(tensor: Tensor) -> int:
    """Address of the memory that a saved tensor lies in; 0 for a tensor that wraps others and has no memory itself."""
    try:
        return tensor.untyped_storage().data_ptr()
    except RuntimeError:
        return 0
