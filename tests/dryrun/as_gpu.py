"""Real training steps on CPU memory in which the product takes the branch of its code that a GPU takes.

The product chooses by `tensor.device.type`. Inside `as_gpu` tensors of the CPU answer with `HERE`, a name that torch
understands as "cpu" and whose `type` is not "cpu". Fused operations then compute their formulas, attention a plain one,
and collectives run on gloo. `Alive` counts the bytes of tensors that are alive, apart from the dry run's own books.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves

from counterflow.model import core_attention, fused_attention
from counterflow.model.fused_attention import Forwarded, FusedKernel
from counterflow.parallel.optimizer import collectives


class _Here(str):
    """Name of the CPU whose type is another."""

    type = "stand-in"
    index = None


HERE: Any = _Here("cpu")


class Alive(TorchDispatchMode):
    """Bytes of all storages that operations made and that are alive, in blocks of 512, and the most at once."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.most = 0
        self._seen: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor) and tensor.layout == torch.strided and tensor.untyped_storage().data_ptr():
                self._count(tensor.untyped_storage())
        return result

    def _count(self, storage: torch.UntypedStorage) -> None:
        key, size = storage.data_ptr(), -(-storage.nbytes() // 512) * 512
        if key in self._seen:
            return
        self._seen.add(key)
        self.now += size
        self.most = max(self.most, self.now)

        def freed() -> None:
            self._seen.discard(key)
            self.now -= size

        weakref.finalize(storage, freed).atexit = False


def _forward(query: Tensor, key: Tensor, value: Tensor, grad: bool) -> Forwarded:
    with _disable_current_modes():  # a GPU has one kernel for all of it
        scores = query.float() @ key.float().transpose(2, 3)
        scores.masked_fill_(torch.ones(scores.shape[-2:], dtype=torch.bool).triu(1), float("-inf"))
        out = (scores.softmax(-1) @ value.float()).to(value.dtype).transpose(1, 2).contiguous().transpose(1, 2)
        total = scores.logsumexp(-1)
    return Forwarded(out.detach(), (total.detach(),) if grad else ())


def _backward(
    grad: Tensor, query: Tensor, key: Tensor, value: Tensor, out: Tensor, saved: Any, lengths: tuple[int, ...]
) -> tuple[Tensor, Tensor, Tensor]:
    with _disable_current_modes():
        scores = query.float() @ key.float().transpose(2, 3) - saved[0].unsqueeze(-1)
        shares = scores.masked_fill(torch.ones(scores.shape[-2:], dtype=torch.bool).triu(1), float("-inf")).exp()
        wide = grad.float()
        wanted = shares * (wide @ value.float().transpose(2, 3) - (wide * out.float()).sum(-1, keepdim=True))
        made = wanted @ key.float(), wanted.transpose(2, 3) @ query.float(), shares.transpose(2, 3) @ wide
        grad_query, grad_key, grad_value = (part.to(query.dtype) for part in made)
    return grad_query.detach(), grad_key.detach(), grad_value.detach()


PLAIN = FusedKernel("plain", _forward, _backward)


class _UncountedWork:
    """A reduce-scatter in flight. Gloo's is an all-reduce of a copy, which no GPU makes: the copy is not counted."""

    def __init__(self, work: Any) -> None:
        self._work = work
        self.is_completed = work.is_completed

    def wait(self) -> None:
        with _disable_current_modes():
            self._work.wait()


@contextmanager
def as_gpu() -> Iterator[None]:
    """Context in which tensors of the CPU say that they lie on `HERE`."""
    real = torch._C.TensorBase.device

    def device(tensor: Tensor) -> Any:
        found = real.__get__(tensor)  # type: ignore[attr-defined]
        return HERE if found.type == "cpu" else found

    torch.Tensor.device = property(device)  # type: ignore[assignment, method-assign]
    reduce_scatter = collectives._reduce_scatter

    def reduce_uncounted(*args: Any, **kwargs: Any) -> _UncountedWork:
        with _disable_current_modes():
            return _UncountedWork(reduce_scatter(*args, **kwargs))

    collectives._reduce_scatter = reduce_uncounted
    choose, fused_attention.choose_kernel = fused_attention.choose_kernel, lambda *_: PLAIN
    chosen, core_attention.choose_kernel = core_attention.choose_kernel, lambda *_: PLAIN
    try:
        yield
    finally:
        del torch.Tensor.device
        collectives._reduce_scatter = reduce_scatter
        fused_attention.choose_kernel, core_attention.choose_kernel = choose, chosen
