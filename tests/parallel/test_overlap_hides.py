"""Communication hidden by the orders of an overlapped pair, on a model of a device and a link with one task each.

The model has only the phases in which the real blocks launch and wait; `benchmarks/overlap.py` measures the same on
real processes and a real link.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Generator, Sequence

import pytest

from counterflow.parallel.overlap import run_pair
from counterflow.parallel.overlap_orders import find_order

LAYERS = 4
# Forward, backward for input, backward for weights: as in DeepSeek's published trace (ms), and all equal.
TRACE = {"attention": (4.1, 8.8, 2.4), "shared": (0.5, 0.55, 0.7), "experts": (4.1, 4.75, 5.7)}
EVEN = {"attention": (4.6, 4.6, 4.6), "shared": (0.5, 0.5, 0.5), "experts": (4.3, 4.3, 4.3)}
ALTERNATION = [
    "F.attention",
    "B.finish",
    "F.dispatch",
    "B.combine",
    "F.shared",
    "B.experts",
    "F.experts",
    "B.shared",
    "F.combine",
    "B.dispatch",
    "F.finish",
    "B.attention",
]

Parts = dict[str, tuple[float, float, float]]


class Device:
    """A clock, and a link that carries one transfer after another."""

    def __init__(self, parts: Parts, ratio: float) -> None:
        self.parts = parts
        self.compute = LAYERS * sum(map(sum, parts.values()))
        self.communication = ratio * self.compute
        self.now = 0.0
        self.link_free_at = 0.0
        self.weight_gradients: deque[Callable[[], None]] = deque()

    def launch(self, transfers: int = 1) -> float:
        """Arrival of a transfer launched now: after all earlier launches, even if it is tiny."""
        self.link_free_at = max(self.now, self.link_free_at) + transfers * self.communication / (4 * LAYERS)
        return self.link_free_at

    def wait(self, arrival: float) -> None:
        self.now = max(self.now, arrival)

    def work(self, seconds: float) -> None:
        self.now += seconds

    def forward(self) -> Generator[str, None, None]:
        for _ in range(LAYERS):
            yield "attention"
            self.work(self.parts["attention"][0])
            counts = self.launch(transfers=0)
            yield "dispatch"
            self.wait(counts)
            dispatching = self.launch()
            yield "shared"
            self.work(self.parts["shared"][0])
            yield "experts"
            self.wait(dispatching)
            self.work(self.parts["experts"][0])
            yield "combine"
            combining = self.launch()
            yield "finish"
            self.wait(combining)

    def backward(self) -> Generator[str, None, None]:
        for _ in range(LAYERS):
            yield "finish"
            combining = self.launch()
            yield "combine"
            self.wait(combining)
            yield "experts"
            self._back("experts")
            dispatching = self.launch()
            yield "shared"
            self._back("shared")
            yield "dispatch"
            self.wait(dispatching)
            yield "attention"
            self._back("attention")

    def _back(self, part: str) -> None:
        _, for_input, for_weights = self.parts[part]
        self.work(for_input)
        self.weight_gradients.append(lambda: self.work(for_weights))


def exposed(order: Sequence[str], parts: Parts, ratio: float) -> float:
    """Share of the communication that is not hidden by compute, where all of it takes `ratio` of the compute."""
    device = Device(parts, ratio)
    run_pair(device.forward(), device.backward(), device.weight_gradients, order)
    while device.weight_gradients:
        device.weight_gradients.popleft()()
    return (device.now - device.compute) / device.communication


@pytest.mark.parametrize("parts", [TRACE, EVEN], ids=["trace", "even"])
def test_v3_hides_communication_of_half_the_compute_and_nearly_all_of_as_much(parts: Parts) -> None:
    v3 = find_order("v3")
    assert exposed(v3, parts, 0.5) == pytest.approx(0.0, abs=1e-9)
    assert exposed(v3, parts, 1.0) < 0.07
    # No order can hide the excess; a pair that is bound by its link keeps it busy.
    assert exposed(v3, parts, 2.0) == pytest.approx(0.5, abs=0.01)


@pytest.mark.parametrize("parts", [TRACE, EVEN], ids=["trace", "even"])
@pytest.mark.parametrize("ratio", [0.5, 1.0])
def test_simpler_orders_expose_most_of_it(parts: Parts, ratio: float) -> None:
    assert exposed(find_order("sequence"), parts, ratio) > 0.85  # the shared experts hide a little
    assert exposed(ALTERNATION, parts, ratio) > 0.45


@pytest.mark.parametrize("parts", [TRACE, EVEN], ids=["trace", "even"])
@pytest.mark.parametrize("ratio", [0.65, 1.0, 1.1])
def test_moving_no_entry_of_v3_hides_more_than_a_percent_more(parts: Parts, ratio: float) -> None:
    v3 = tuple(entry for entry in find_order("v3") if not entry.startswith("B.redo."))
    here = exposed(v3, parts, ratio)
    for taken in range(len(v3)):
        rest = v3[:taken] + v3[taken + 1 :]
        for place in range(len(rest) + 1):
            moved = (*rest[:place], v3[taken], *rest[place:])
            assert exposed(moved, parts, ratio) > here - 0.01, moved
