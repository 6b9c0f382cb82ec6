"""Contract of the token dispatchers: an MoE layer's two all-to-alls, with autograd and asynchronous forms.

T tokens of this rank, K top-k, H hidden, E experts of the layer, E_local of them on this rank, R rows
that this rank receives.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Generic, Protocol, TypeVar

from torch import Tensor

from ..fp8.quantize import BlockQuantized

Result = TypeVar("Result")


@dataclass
class Incoming:
    """Codes in which the gradient of the experts' outputs arrived; taken once, None for an unquantised gradient."""

    codes: BlockQuantized | None = None
    wanted: bool = True
    """Whether anyone takes them; otherwise they are not kept."""

    def take(self) -> BlockQuantized | None:
        codes, self.codes = self.codes, None
        return codes


@dataclass
class Dispatched:
    """Rows that this rank's experts compute on, sorted by (local expert, source rank, token).

    x: [R, H], one row for each (token, expert of this rank) pair of the whole group. Nothing is dropped. A dispatcher
        that aligns rows adds rows of zeros, with weight zero, at the end of each expert; R counts them.
    weights: FP32 [R], the gate weight of each row. `combine` does not apply it; the expert does, between its SwiGLU and
        its down projection, so that combine stays a plain sum and its backward a plain copy.
    offsets: int32 [E_local], end of each local expert's rows; `offs` of `torch.nn.functional.grouped_mm`.
    tokens_per_expert: number of each local expert's rows, on the host.
    handle: the dispatcher's record of the rows' route, for `combine`.
    codes: quantised form in which the rows arrived, in the same order; `x` is its dequantised value. None if the rows
        were sent unquantised.
    incoming: codes of the gradient of the experts' outputs, once that gradient has arrived in the backward.
    """

    x: Tensor
    weights: Tensor
    offsets: Tensor
    tokens_per_expert: list[int]
    handle: Any
    codes: BlockQuantized | None = None
    incoming: Incoming = field(default_factory=Incoming)

    def take(self) -> tuple[Tensor, BlockQuantized | None]:
        """x and `codes`, which are then gone from here."""
        taken = self.x, self.codes
        self.x, self.codes = self.x.new_empty(0), None
        return taken


@dataclass
class Pending(Generic[Result]):
    """Communication that has been launched; `wait` once for its result.

    Between launch and wait the autograd graph holds only `ticket`, a scalar without meaning. In the backward the
    gradient of the result launches the reverse communication and passes on a gradient for the ticket. The ticket's own
    backward waits, so all that autograd runs between the two overlaps. To run the two halves by hand, cut the graph
    here: replace `ticket` by a detached leaf before `wait`, later run the backward of the result, and, once the
    communication is needed, the backward of the original ticket.
    """

    ticket: Tensor
    _finish: Callable[[Tensor], Result]

    def wait(self) -> Result:
        return self._finish(self.ticket)


class Route(Protocol):
    """Destinations of the tokens of one dispatch; the exchange of their counts ends with `complete`."""

    def complete(self) -> None:
        """Wait for the counts."""


class Dispatcher(Protocol):
    """Transport of tokens to the ranks of their experts, and of the experts' outputs back.

    Every rank of the group makes the same calls in the same order, with any number of tokens, also none, and runs the
    backward of each. Backward of dispatch is a combine, backward of combine a dispatch.
    """

    def dispatch(self, x: Tensor, expert_ids: Tensor, weights: Tensor) -> Dispatched:
        """Send every token to its K experts.

        Args:
            x: [T, H] BF16 or FP32.
            expert_ids: int64 [T, K] global expert ids, no expert twice for one token; -1 is sent nowhere.
            weights: FP32 [T, K] gate weights.
        """

    def begin_route(self, expert_ids: Tensor) -> Route:
        """Launch the exchange of counts that a dispatch begins with, as soon as the experts are chosen."""

    def begin_dispatch(self, x: Tensor, expert_ids: Tensor, weights: Tensor, route: Any = None) -> Pending[Dispatched]:
        """Launch `dispatch` without waiting for the tokens. The call waits for the counts of `route`, which
        `begin_route` made from the same expert ids. Without `route` the call makes one."""

    def combine(self, y: Tensor, dispatched: Dispatched) -> Tensor:
        """Return for each token the unweighted sum of its experts' outputs, zero for a token that was sent nowhere.

        Sums are taken in FP32 in a fixed order and rounded to the type of `y`. A flat dispatcher adds up in the order
        of the token's K slots and rounds once. A dispatcher that sends partial sums rounds each of them once.

        Args:
            y: [R, H], the rows of `dispatched.x` after the experts.

        Returns:
            [T, H] in the type of `y`.
        """

    def begin_combine(self, y: Tensor, dispatched: Dispatched) -> Pending[Tensor]:
        """Launch `combine` without waiting for the outputs."""
