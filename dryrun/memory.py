"""Bytes of tensors alive on one device, by what was running when each was allocated."""

from __future__ import annotations

import weakref
from collections import Counter
from dataclasses import dataclass

import torch
from torch import Tensor

ROUNDING = 512
"""Bytes to which CUDA's allocator rounds a block up."""

NOTICEABLE = 1.001
"""Growth of the peak at which the list of what lives at it is made again."""


@dataclass
class _Block:
    """A storage in the books."""

    storage: weakref.ref[torch.UntypedStorage]
    size: int
    label: str


class Memory:
    """Books of the storages of one kind of device. Each is counted until it is freed, and none is kept alive."""

    def __init__(self, device_type: str, rounding: int = ROUNDING) -> None:
        self.device_type, self.rounding = device_type, rounding
        self.alive = 0
        """Bytes alive now."""
        self.peak = 0
        """Most bytes that were alive at once since the last `restart`."""
        self.peak_label = ""
        """Label at the peak."""
        self.by_label: Counter[str] = Counter()
        self.at_peak: dict[str, int] = {}
        self._at_peak_total = 0
        self._known: dict[int, _Block] = {}

    def add(self, tensor: Tensor, label: str) -> None:
        """Count the storage of `tensor` under `label`, if it is new and on this device."""
        if tensor.device.type != self.device_type or tensor.layout != torch.strided:
            return
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self._known:
            return
        size = -(-storage.nbytes() // self.rounding) * self.rounding
        if not size:
            return
        self.alive += size
        self.by_label[label] += size

        def freed(_: object) -> None:
            block = self._known.pop(key)
            self.alive -= block.size
            self.by_label[block.label] -= block.size

        self._known[key] = _Block(weakref.ref(storage, freed), size, label)
        if self.alive > self.peak:
            self.peak, self.peak_label = self.alive, label
            if self.alive > NOTICEABLE * self._at_peak_total:
                self.at_peak = {name: bytes for name, bytes in self.by_label.items() if bytes}
                self._at_peak_total = self.alive

    def relabel(self, tensor: Tensor, label: str) -> None:
        """Count the storage of `tensor`, if it is alive on this device, under another label from now on."""
        block = self._known.get(tensor.untyped_storage()._cdata)
        if block is not None:
            self.by_label[block.label] -= block.size
            self.by_label[label] += block.size
            block.label = label

    def restart(self) -> None:
        """Begin again to look for a peak, from what is alive now."""
        self.peak = self._at_peak_total = self.alive
        self.at_peak = {name: bytes for name, bytes in self.by_label.items() if bytes}
