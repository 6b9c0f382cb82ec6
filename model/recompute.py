"""Activation recompute: of single tensors, as V3 saves memory (V3 §3.2.3), or of whole blocks.

V3 keeps the inputs of RMSNorm, of the MLA up-projections and of SwiGLU, and computes their outputs again in the
backward. Module-level checkpointing would also run the neighbouring GEMMs again. Here a module registers a tensor
together with a recipe that rebuilds it. When autograd saves the tensor, or a view of it, for the backward, the tensor
is dropped and the recipe kept instead (`Rebuild`).

`Replay` drops every tensor that autograd saves in a block and runs the block's phases again. It does what torch's
non-reentrant checkpoint does, but its second run is a generator: an engine that overlaps two micro-batches can place
the phases.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

from ..fp8.saved_tensors import memory_of

RecomputePolicy = Literal["none", "v3", "full"]


class Keep:
    """Policy that keeps every activation that autograd saves."""

    def rebuilds(self, tensor: Tensor) -> bool:
        """Whether `tensor` is rebuilt for the backward, so that saving it takes no memory."""
        return False

    def rebuild(self, tensors: tuple[Tensor, ...], recipe: Callable[[], tuple[Tensor, ...]]) -> None:
        """Do nothing: no tensor is dropped."""

    def lend(self, tensor: Tensor) -> Callable[[], Tensor]:
        """Function that returns `tensor`, for the recipe of another tensor: made again only once for all its users."""
        return lambda: tensor

    def hooks(self) -> AbstractContextManager[Any]:
        return nullcontext()

    def close(self) -> None:
        """Do nothing: no tensor is held."""


class Rebuild:
    """Policy that drops registered tensors and computes them again when the backward needs them.

    One object serves the forward of one block. Its `hooks` are entered around each phase, never across a point where
    another block's phases may run. A registration stays valid in later phases, until `close`. A recipe must read only
    tensors that live as long as the graph, and run exactly the operations of the forward, so that gradients are
    bit-equal.
    """

    def __init__(self) -> None:
        self._recipes: dict[int, tuple[StorageWeakRef, _Recipe, int]] = {}

    def rebuild(self, tensors: tuple[Tensor, ...], recipe: Callable[[], tuple[Tensor, ...]]) -> None:
        """Register `recipe()` to rebuild `tensors` wherever autograd saves one of them."""
        shared = _Recipe(recipe)
        for index, tensor in enumerate(tensors):
            assert tensor.storage_offset() == 0, "register whole tensors, not views into others"
            if tensor.numel() == 0:  # saving it takes no memory
                continue
            # The reference lets the memory go, but not its number, which no other tensor can get until `close`.
            self._recipes[memory_of(tensor)] = (StorageWeakRef(tensor.untyped_storage()), shared, index)

    def rebuilds(self, tensor: Tensor) -> bool:
        return memory_of(tensor) in self._recipes

    def lend(self, tensor: Tensor) -> Callable[[], Tensor]:
        """Function of `Keep.lend` that holds no registered tensor; call it in each backward."""
        found = self._recipes.get(memory_of(tensor))
        if found is None:
            return lambda: tensor
        _, recipe, index = found
        recipe.users += 1
        return partial(recipe.take, index)

    def hooks(self) -> AbstractContextManager[Any]:
        """Context in which tensors that autograd saves are looked up among the recipes."""
        return torch.autograd.graph.saved_tensors_hooks(self._pack, self._unpack)

    def close(self) -> None:
        """Forget the registrations, at the end of the block's forward."""
        self._recipes.clear()

    def _pack(self, tensor: Tensor) -> Any:
        try:  # as `memory_of`; this runs for every tensor that a layer saves
            found = self._recipes.get(tensor.untyped_storage()._cdata)
        except RuntimeError:
            found = None
        if found is None:
            # Detached: a node that saved its own output would hold itself, and never be freed without a backward.
            return tensor.detach()
        _, recipe, index = found
        recipe.users += 1
        return recipe, index, tensor.size(), tensor.stride(), tensor.storage_offset()

    @staticmethod
    def _unpack(packed: Any) -> Tensor:
        if isinstance(packed, Tensor):
            return packed
        recipe, index, size, stride, offset = packed
        return recipe.take(index).as_strided(size, stride, offset)


class _Recipe:
    """Recipe for dropped tensors. All users of the tensors share its results, which are freed after the last use."""

    def __init__(self, make: Callable[[], tuple[Tensor, ...]]) -> None:
        self.make = make
        self.users = 0
        self._left = 0
        self._values: tuple[Tensor, ...] = ()

    def take(self, index: int) -> Tensor:
        if not self._values:
            if torch.is_grad_enabled():
                with torch.no_grad():
                    self._values = self.make()
            else:  # within a backward
                self._values = self.make()
            self._left = self.users
        value = self._values[index]
        self._left -= 1
        if self._left <= 0:
            self._values = ()
        return value


class Replay:
    """Policy that drops all tensors that autograd saves, and makes them again in a second run of the phases.

    One object serves the forward of one block. `phases(saved)` must run its phases with the activations going to
    `saved`, save the same tensors in the same order each time, and save none from the phase `last` on (None: all phases
    may save).
    """

    def __init__(self, phases: Callable[[_Collect], Iterator[str]], last: str | None) -> None:
        self._phases = phases
        self._last = last
        self._dropped = 0
        self._values: dict[int, Tensor] = {}

    def rebuild(self, tensors: tuple[Tensor, ...], recipe: Callable[[], tuple[Tensor, ...]]) -> None:
        """Do nothing: every tensor is made again anyhow."""

    def lend(self, tensor: Tensor) -> Callable[[], Tensor]:
        return lambda: tensor  # no recipe will ask for it

    def rebuilds(self, tensor: Tensor) -> bool:
        return False  # tensors saved in a smaller format are smaller in the second run, too

    def hooks(self) -> AbstractContextManager[Any]:
        return torch.autograd.graph.saved_tensors_hooks(self._pack, self._unpack)

    def close(self) -> None:
        """Do nothing: no tensor is held."""

    def again(self) -> Iterator[str]:
        """Run the phases before `last` again in grad mode, each named before it runs, and hold their saved tensors."""
        collect = _Collect()
        for name in self._phases(collect):
            if name == self._last:
                break
            yield f"redo.{name}"
        assert len(collect.values) == self._dropped, "the phases saved other tensors than the first time"
        self._values = collect.values

    def _pack(self, _: Tensor) -> int:
        self._dropped += 1
        return self._dropped - 1

    def _unpack(self, index: int) -> Tensor:
        if index not in self._values:  # plain autograd, or a second backward through the graph
            with torch.enable_grad():
                for _ in self.again():
                    pass
        return self._values.pop(index)


class _Collect(Keep):
    """Policy that keeps the tensors that autograd saves, numbered in the order of saving."""

    def __init__(self) -> None:
        self.values: dict[int, Tensor] = {}

    def hooks(self) -> AbstractContextManager[Any]:
        return torch.autograd.graph.saved_tensors_hooks(self._pack, lambda index: self.values[index])

    def _pack(self, tensor: Tensor) -> int:
        self.values[len(self.values)] = tensor.detach()
        return len(self.values) - 1


Saved = Keep | Rebuild | Replay
