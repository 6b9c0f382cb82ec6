"""Identity of the tensors that autograd saves for the backward, for hooks that must recognise one."""

from __future__ import annotations

from torch import Tensor


def memory_of(tensor: Tensor) -> int:
    """Number of the memory that a tensor lies in; 0 for a tensor that wraps others and has no memory itself.

    Views of one tensor share the number, tensors on the meta device too. It is free again once the memory is.
    """
    try:
        return tensor.untyped_storage()._cdata
    except RuntimeError:
        return 0
