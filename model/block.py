"""A decoder block, in phases: computation and communication in turn.

    attention   attention, second norm, router; the counts of tokens start to travel
    dispatch    the tokens start to travel, once the counts are there
    shared      the shared expert, meanwhile
    experts     waits for the tokens; routed experts
    combine     the outputs start to travel back
    finish      waits for them; the next residual stream

A dense block has the one phase `dense`. The backward runs the same phases in reverse: there `finish` sends the
gradients to the experts, `combine` waits for them, `experts` sends theirs back, `dispatch` waits. The pipeline's
overlap engine advances the phases of two micro-batches in turn. B sequences, S tokens of a sequence, H hidden.
"""

from __future__ import annotations

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
from .kernels import Kernels
from .norm import RMSNorm
from .recompute import Keep, Rebuild, RecomputePolicy, Replay, Saved
from .router import Routing

UNWEIGHTED = BalanceWeights()


@dataclass(frozen=True)
class Attended:
    """What the attention phase leaves: the residual stream, its norm, and where the tokens go (None if dense)."""

    residual: Tensor
    normed: Tensor
    routing: Routing | None
    places: Tensor | None
    """`[T, K]` int64: where the ranks of the group hold the chosen experts."""
    route: Route | None
    """Counts on their way to the ranks of the experts."""

    def cut(self, tape: Uncut | Tape, balance: BalanceWeights) -> Attended:
        """The same for the phases after attention; the balance losses go no further."""
        assert self.routing is not None
        routing = self.routing.cut(tape, balance)
        return Attended(tape.cut(self.residual), tape.cut(self.normed), routing, self.places, self.route)


class DecoderBlock(nn.Module):
    """Pre-norm block with MLA and a dense or mixture-of-experts feed-forward: `[B, S, H]` -> `[B, S, H]`."""

    def __init__(
        self,
        config: ModelConfig,
        experts: Sequence[int] | None,
        dispatcher: Dispatcher,
        kernels: Kernels,
        recompute: RecomputePolicy = "none",
        recipe: Recipe | None = None,
    ) -> None:
        """`experts` are the global numbers of the routed experts this rank holds; None makes the block dense."""
        super().__init__()
        recipe = recipe or Recipe()
        self.recompute = recompute
        self.attention_norm = RMSNorm(config.hidden_size, config.rms_norm_eps, kernels)
        self.attention = LatentAttention(config, kernels, recipe)
        self.mlp_norm = RMSNorm(config.hidden_size, config.rms_norm_eps, kernels)
        self.mlp: FeedForward | MixtureOfExperts
        if experts is None:
            up, down = recipe.linear("dense_up"), recipe.linear("dense_down")
            self.mlp = FeedForward(config.hidden_size, config.intermediate_size, kernels, up, down)
        else:
            self.mlp = MixtureOfExperts(config, experts, dispatcher, kernels, recipe)

    def forward(self, x: Tensor, rotary: Tensor, valid: Tensor) -> tuple[Tensor, Routing | None]:
        """The phases in their plain order, as one graph."""
        return run(self.phases(x, rotary, valid, Uncut()))

    def phases(
        self,
        x: Tensor,
        rotary: Tensor,
        valid: Tensor,
        tape: Uncut | Tape,
        balance: BalanceWeights = UNWEIGHTED,
        dropping: Dropping | None = None,
    ) -> Generator[str, None, tuple[Tensor, Routing | None]]:
        """Yield each phase's name, then run it: x `[B, S, H]`, valid `[B]` bool -> the next residual stream, and the
        routing for its statistics. With a tape that cuts, the balance losses start a backward by their weights.
        """
        saved = self._saved(x, rotary, valid, dropping)
        try:
            return (yield from self._phases(x, rotary, valid, saved, tape, balance, dropping))
        finally:
            saved.close()

    def _saved(self, x: Tensor, rotary: Tensor, valid: Tensor, dropping: Dropping | None) -> Saved:
        """What the phases of one forward are given: which activations stay for the backward."""
        if not self.training or not torch.is_grad_enabled():
            return Keep()
        if self.recompute == "v3":
            return Rebuild()
        if self.recompute == "full":
            # Statistics leave with the first pass alone, so running the phases again cannot count a token twice.
            kept = x.detach()
            return Replay(
                lambda collect: self._phases(
                    kept.requires_grad_(), rotary, valid, collect, Uncut(), UNWEIGHTED, dropping
                ),
                "combine",
            )
        return Keep()

    def _phases(
        self,
        x: Tensor,
        rotary: Tensor,
        valid: Tensor,
        saved: Saved,
        tape: Uncut | Tape,
        balance: BalanceWeights,
        dropping: Dropping | None,
    ) -> Generator[str, None, tuple[Tensor, Routing | None]]:
        if not isinstance(self.mlp, MixtureOfExperts):
            yield tape.phase("dense")
            x = self.run_dense(self.attend(x, rotary, valid, saved), saved)
            if isinstance(saved, Replay):
                tape.before_backward(saved.again)
            return x, None
        yield tape.phase("attention")
        attended = self.attend(x, rotary, valid, saved, dropping)
        attended = attended.cut(tape, balance)
        assert attended.routing is not None
        yield tape.phase("dispatch")
        dispatching = self.dispatch(attended)
        dispatching.ticket = tape.cut(dispatching.ticket)
        yield tape.phase("shared")
        shared = self.run_shared(attended, saved)
        shared = None if shared is None else tape.cut(shared)
        yield tape.phase("experts")
        dispatched = dispatching.wait()
        y = tape.cut(self.run_experts(dispatched, saved))
        yield tape.phase("combine")
        combining = self.combine(y, dispatched)
        del y, dispatched  # the rows, which are many and which nothing but autograd needs any more
        combining.ticket = tape.cut(combining.ticket)
        if isinstance(saved, Replay):  # while the gradients travel to the experts
            tape.before_backward(saved.again)
        yield tape.phase("finish")
        return self.finish(attended, combining.wait(), shared), attended.routing

    def attend(
        self, x: Tensor, rotary: Tensor, valid: Tensor, saved: Saved, dropping: Dropping | None = None
    ) -> Attended:
        """Attention, the second norm and the router's choice: computation; the counts of tokens start to travel."""
        with saved.hooks():
            residual = x + self.attention(self.attention_norm(x, saved), rotary, saved)
            normed = self.mlp_norm(residual, saved)
            if not isinstance(self.mlp, MixtureOfExperts):
                return Attended(residual, normed, None, None, None)
            routing = self.mlp.gate(normed, valid, dropping)
        places = self.mlp.place(routing.expert_ids)
        return Attended(residual, normed, routing, places, self.mlp.dispatcher.begin_route(places))

    def run_dense(self, attended: Attended, saved: Saved) -> Tensor:
        """All the rest of a dense block: computation."""
        with saved.hooks():
            return attended.residual + self.mlp(attended.normed, saved)

    def dispatch(self, attended: Attended) -> Pending[Dispatched]:
        """Start sending tokens to their experts, once the counts are there: communication."""
        assert isinstance(self.mlp, MixtureOfExperts) and attended.routing is not None and attended.places is not None
        rows, weights = attended.normed.flatten(0, 1), attended.routing.weights
        return self.mlp.dispatcher.begin_dispatch(rows, attended.places, weights, attended.route)

    def run_shared(self, attended: Attended, saved: Saved) -> Tensor | None:
        """The experts every token passes: computation that needs no dispatch."""
        assert isinstance(self.mlp, MixtureOfExperts)
        with saved.hooks():
            return None if self.mlp.shared is None else self.mlp.shared(attended.normed, saved)

    def run_experts(self, dispatched: Dispatched, saved: Saved) -> Tensor:
        """The routed experts on the rows that arrived: computation."""
        assert isinstance(self.mlp, MixtureOfExperts)
        with saved.hooks():
            given = dispatched.x, dispatched.weights, dispatched.offsets, saved, dispatched.tokens_per_expert
            return self.mlp.experts(*given, dispatched.codes, dispatched.incoming)

    def combine(self, y: Tensor, dispatched: Dispatched) -> Pending[Tensor]:
        """Start returning the experts' outputs to their tokens: communication."""
        assert isinstance(self.mlp, MixtureOfExperts)
        return self.mlp.dispatcher.begin_combine(y, dispatched)

    def finish(self, attended: Attended, routed: Tensor, shared: Tensor | None) -> Tensor:
        """The next residual stream from what came back, rows `[B S, H]`, and the shared experts."""
        routed = routed.view_as(attended.residual)
        return attended.residual + (routed if shared is None else routed + shared)
