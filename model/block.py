"""Decoder blocks in phases, computation and communication in turn.

A mixture-of-experts block (`MoEBlock`) has six phases:

    attention   attention, second norm, router; the exchange of token counts begins
    dispatch    once the counts have arrived, sending of the tokens begins
    shared      the shared expert, meanwhile
    experts     waits for the tokens; routed experts
    combine     sending of the outputs begins
    finish      waits for the outputs; the next residual stream

A dense block (`DenseBlock`) has the one phase `dense`. The backward runs the same phases in reverse: `finish` sends the
gradients to the experts, `combine` waits for them, `experts` sends its gradients back, `dispatch` waits for these. The
pipeline's overlap engine advances the phases of two micro-batches in turn. B sequences, S tokens of a sequence,
T = B S tokens, H hidden, K top-k.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Generator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..comm.dispatcher import Dispatched, Dispatcher, Pending, Route
from ..fp8.recipe import Recipe
from ..phases import Tape, Uncut, run
from .attention import LatentAttention
from .balance import BalanceWeights
from .capacity import Dropping
from .config import ModelConfig
from .feed_forward import FeedForward, MixtureOfExperts
from .kernels import Kernels, SumFunction
from .norm import RMSNorm
from .recompute import Keep, Rebuild, RecomputePolicy, Replay, Saved
from .router import Routing

UNWEIGHTED = BalanceWeights()

BlockPhases = Generator[str, None, tuple[Tensor, Routing | None]]
"""Generator that yields each phase's name before running it. Returns the next residual stream `[B, S, H]`, and the
routing for the step's statistics (None from a dense block)."""


class DecoderBlock(nn.Module, ABC):
    """Pre-norm block: the half with MLA, common to dense and MoE blocks. `[B, S, H]` -> `[B, S, H]`.

    A subclass adds `mlp`, and runs both halves in `_phases`.
    """

    mlp: nn.Module
    end_of_saving: str | None = None
    """First of the last phases, in which autograd saves nothing; None if all phases save."""

    def __init__(self, config: ModelConfig, kernels: Kernels, recompute: RecomputePolicy, recipe: Recipe) -> None:
        super().__init__()
        self.recompute, self.kernels = recompute, kernels
        self.attention_norm = RMSNorm(config.hidden_size, config.rms_norm_eps, kernels)
        self.attention = LatentAttention(config, kernels, recipe)
        self.mlp_norm = RMSNorm(config.hidden_size, config.rms_norm_eps, kernels)

    def forward(self, x: Tensor, rotary: Tensor, valid: Tensor) -> tuple[Tensor, Routing | None]:
        """Run the phases in their plain order, as one graph."""
        return run(self.phases(x, rotary, valid, Uncut()))

    def phases(
        self,
        x: Tensor,
        rotary: Tensor,
        valid: Tensor,
        tape: Uncut | Tape,
        balance: BalanceWeights = UNWEIGHTED,
        dropping: Dropping | None = None,
    ) -> BlockPhases:
        """Run the block on x `[B, S, H]`, valid `[B]` bool. With a tape that cuts, each balance loss starts a backward
        with its weight in `balance`.
        """
        saved = self._saved(x, rotary, valid, dropping)
        try:
            return (yield from self._phases(x, rotary, valid, saved, tape, balance, dropping))
        finally:
            saved.close()

    def attend(self, x: Tensor, rotary: Tensor, saved: Saved, users: int = 1) -> tuple[Tensor, ...]:
        """Attention and the second norm: the residual stream, and its norm for each of `users`, all `[B, S, H]`.
        Computation."""
        with saved.hooks():
            x, normed, same = self.attention_norm.branch(x, saved, users=2)
            return self.mlp_norm.branch(x, saved, users, self.attention(normed, rotary, saved, same))

    @abstractmethod
    def _phases(
        self,
        x: Tensor,
        rotary: Tensor,
        valid: Tensor,
        saved: Saved,
        tape: Uncut | Tape,
        balance: BalanceWeights,
        dropping: Dropping | None,
    ) -> BlockPhases:
        """Run the phases, with the activations for the backward going to `saved`."""

    def _saved(self, x: Tensor, rotary: Tensor, valid: Tensor, dropping: Dropping | None) -> Saved:
        """Object that, by the recompute policy, chooses the activations that one forward keeps for its backward."""
        if not self.training or not torch.is_grad_enabled():
            return Keep()
        if self.recompute == "v3":
            return Rebuild()
        if self.recompute == "full":
            # Only the first pass returns statistics, so running the phases again cannot count a token twice.
            kept = x.detach()
            return Replay(
                lambda collect: self._phases(
                    kept.requires_grad_(), rotary, valid, collect, Uncut(), UNWEIGHTED, dropping
                ),
                self.end_of_saving,
            )
        return Keep()


class DenseBlock(DecoderBlock):
    """Block with a SwiGLU feed-forward: one phase, all computation."""

    mlp: FeedForward

    def __init__(
        self, config: ModelConfig, kernels: Kernels, recompute: RecomputePolicy = "none", recipe: Recipe | None = None
    ) -> None:
        recipe = recipe or Recipe()
        super().__init__(config, kernels, recompute, recipe)
        up, down = recipe.linear("dense_up"), recipe.linear("dense_down")
        self.mlp = FeedForward(config.hidden_size, config.intermediate_size, kernels, up, down)

    def _phases(
        self,
        x: Tensor,
        rotary: Tensor,
        valid: Tensor,
        saved: Saved,
        tape: Uncut | Tape,
        balance: BalanceWeights,
        dropping: Dropping | None,
    ) -> BlockPhases:
        yield tape.phase("dense")
        residual, normed = self.attend(x, rotary, saved)
        with saved.hooks():
            x = residual + self.mlp(normed, saved)
        if isinstance(saved, Replay):
            tape.before_backward(saved.again)
        return x, None


@dataclass(frozen=True)
class Routed:
    """Results of the attention phase of an MoE block, from which tokens are dispatched."""

    residual: Tensor
    """`[B, S, H]`, the residual stream."""
    normed: Tensor
    """`[B, S, H]`, the normalised residual stream, for the routed experts."""
    for_shared: Tensor
    """The same for the shared experts: the same tensor on CPUs, elsewhere one with a gradient of its own."""
    routing: Routing
    places: Tensor
    """`[T, K]` int64, places of the chosen experts on the ranks of the group."""
    route: Route
    """Route of the tokens to these places; the exchange of its counts has begun."""

    def cut(self, tape: Uncut | Tape, balance: BalanceWeights) -> Routed:
        """Return the results for the phases after attention; the graph of the balance losses ends here."""
        routing, normed = self.routing.cut(tape, balance), tape.cut(self.normed)
        for_shared = normed if self.for_shared is self.normed else tape.cut(self.for_shared)
        return Routed(tape.cut(self.residual), normed, for_shared, routing, self.places, self.route)


class MoEBlock(DecoderBlock):
    """Block with DeepSeekMoE (V3 §2.1.2): six phases, three of which begin communication."""

    mlp: MixtureOfExperts
    end_of_saving = "combine"

    def __init__(
        self,
        config: ModelConfig,
        experts: Sequence[int],
        dispatcher: Dispatcher,
        kernels: Kernels,
        recompute: RecomputePolicy = "none",
        recipe: Recipe | None = None,
    ) -> None:
        """`experts` are the global numbers of the routed experts that this rank holds."""
        recipe = recipe or Recipe()
        super().__init__(config, kernels, recompute, recipe)
        self.mlp = MixtureOfExperts(config, experts, dispatcher, kernels, recipe)

    def _phases(
        self,
        x: Tensor,
        rotary: Tensor,
        valid: Tensor,
        saved: Saved,
        tape: Uncut | Tape,
        balance: BalanceWeights,
        dropping: Dropping | None,
    ) -> BlockPhases:
        yield tape.phase("attention")
        routed = self.route(self.attend(x, rotary, saved, users=3), valid, saved, dropping).cut(tape, balance)
        yield tape.phase("dispatch")
        dispatching = self.dispatch(routed)
        dispatching.ticket = tape.cut(dispatching.ticket)
        yield tape.phase("shared")
        shared = self.run_shared(routed, saved)
        shared = None if shared is None else tape.cut(shared)
        yield tape.phase("experts")
        dispatched = dispatching.wait()
        y = tape.cut(self.run_experts(dispatched, saved), large=True)
        yield tape.phase("combine")
        combining = self.combine(y, dispatched)
        del y, dispatched  # many rows, which only autograd still needs
        combining.ticket = tape.cut(combining.ticket)
        if isinstance(saved, Replay):  # runs while the gradients are sent to the experts
            tape.before_backward(saved.again)
        yield tape.phase("finish")
        return self.finish(routed, combining.wait(), shared), routed.routing

    def route(
        self, attended: tuple[Tensor, ...], valid: Tensor, saved: Saved, dropping: Dropping | None = None
    ) -> Routed:
        """Choose each token's experts, and begin the exchange of the counts.

        `attended` is what `attend` returns for three users: the routed experts, the shared experts and the router.
        """
        residual, normed, for_shared, for_gate = attended
        with saved.hooks():
            routing = self.mlp.gate(for_gate, valid, dropping)
        places = self.mlp.place(routing.expert_ids)
        return Routed(residual, normed, for_shared, routing, places, self.mlp.dispatcher.begin_route(places))

    def dispatch(self, routed: Routed) -> Pending[Dispatched]:
        """Begin sending tokens to their experts, once the counts have arrived: communication."""
        rows, weights = routed.normed.flatten(0, 1), routed.routing.weights
        return self.mlp.dispatcher.begin_dispatch(rows, routed.places, weights, routed.route)

    def run_shared(self, routed: Routed, saved: Saved) -> Tensor | None:
        """Run the experts that every token passes: computation that needs no dispatch."""
        with saved.hooks():
            return None if self.mlp.shared is None else self.mlp.shared(routed.for_shared, saved)

    def run_experts(self, dispatched: Dispatched, saved: Saved) -> Tensor:
        """Run the routed experts on the rows that arrived, and take the rows: computation."""
        with saved.hooks():
            return self.mlp.experts(dispatched, saved)

    def combine(self, y: Tensor, dispatched: Dispatched) -> Pending[Tensor]:
        """Begin returning the experts' outputs to their tokens: communication."""
        return self.mlp.dispatcher.begin_combine(y, dispatched)

    def finish(self, routed: Routed, sums: Tensor, shared: Tensor | None) -> Tensor:
        """Return the next residual stream: the last one, the routed experts' sums `[T, H]` and the shared output."""
        sums = sums.view_as(routed.residual)
        if shared is not None and self.kernels.fuse(sums):
            total: Tensor = SumFunction.apply(routed.residual, sums, shared)
            return total
        return routed.residual + (sums if shared is None else sums + shared)
