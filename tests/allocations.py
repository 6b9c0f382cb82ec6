"""Count of the memory that operations have allocated and that is still held."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, UntypedStorage
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


def storages(values: Any) -> list[UntypedStorage]:
    return [x.untyped_storage() for x in tree_leaves(values) if isinstance(x, Tensor) and x.layout == torch.strided]


class Allocations(TorchDispatchMode):
    """Record of every storage that operations allocate; it keeps none of them alive."""

    def __init__(self) -> None:
        super().__init__()
        self._made: dict[StorageWeakRef, int] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        given = {storage.data_ptr() for storage in storages((args, kwargs))}  # a view allocates nothing
        for storage in storages(result):
            if storage.data_ptr() not in given:
                self._made[StorageWeakRef(storage)] = storage.nbytes()
        return result

    def bytes_alive(self) -> int:
        return sum(size for storage, size in self._made.items() if not storage.expired())
