"""A decoder block, in phases: attention -> dispatch -> experts -> combine, computation and communication in turn.

The pipeline's overlap engine advances the phases of two micro-batches against each other; `forward` here is the
plain order. B sequences, S tokens of a sequence, H hidden.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ..comm.dispatcher import Dispatched, Dispatcher, Pending, Route
from .attention import LatentAttention
from .config import ModelConfig
from .feed_forward import FeedForward, MixtureOfExperts
from .kernels import Kernels
from .norm import RMSNorm
from .recompute import Keep, Rebuild, RecomputePolicy
from .router import Routing


@dataclass(frozen=True)
class Attended:
    """What the attention phase leaves: the residual stream, its norm, and where the tokens go (None if dense)."""

    residual: Tensor
    normed: Tensor
    routing: Routing | None
    route: Route | None
    """Counts on their way to the ranks of the experts."""


class DecoderBlock(nn.Module):
    """Pre-norm block with MLA and a dense or mixture-of-experts feed-forward: `[B, S, H]` -> `[B, S, H]`."""

    def __init__(
        self,
        config: ModelConfig,
        experts: Sequence[int] | None,
        dispatcher: Dispatcher,
        kernels: Kernels,
        recompute: RecomputePolicy = "none",
    ) -> None:
        """`experts` are the global numbers of the routed experts this rank holds; None makes the block dense."""
        super().__init__()
        self.recompute = recompute
        self.attention_norm = RMSNorm(config.hidden_size, config.rms_norm_eps, kernels)
        self.attention = LatentAttention(config, kernels)
        self.mlp_norm = RMSNorm(config.hidden_size, config.rms_norm_eps, kernels)
        self.mlp: FeedForward | MixtureOfExperts
        if experts is None:
            self.mlp = FeedForward(config.hidden_size, config.intermediate_size, kernels)
        else:
            self.mlp = MixtureOfExperts(config, experts, dispatcher, kernels)

    def forward(self, x: Tensor, turns: Tensor, valid: Tensor) -> tuple[Tensor, Routing | None]:
        """x `[B, S, H]`, valid `[B]` bool -> the next residual stream, and the routing for its statistics."""
        if self.recompute == "full" and self.training:
            # The statistics leave as outputs, so recomputing the block cannot count a token twice.
            return checkpoint(self._run, x, turns, valid, Keep(), use_reentrant=False, preserve_rng_state=False)
        saved = self.saved()
        try:
            return self._run(x, turns, valid, saved)
        finally:
            saved.close()

    def saved(self) -> Keep | Rebuild:
        """What the phases of one forward are given: which activations stay for the backward."""
        return Rebuild() if self.recompute == "v3" and self.training else Keep()

    def _run(self, x: Tensor, turns: Tensor, valid: Tensor, saved: Keep | Rebuild) -> tuple[Tensor, Routing | None]:
        attended = self.attend(x, turns, valid, saved)
        if attended.routing is None:
            return self.run_dense(attended, saved), None
        pending = self.dispatch(attended)
        shared = self.run_shared(attended, saved)  # while the tokens travel
        dispatched = pending.wait()
        combining = self.combine(self.run_experts(dispatched, saved), dispatched)
        return self.finish(attended, combining.wait(), shared), attended.routing

    def attend(self, x: Tensor, turns: Tensor, valid: Tensor, saved: Keep | Rebuild) -> Attended:
        """Attention, the second norm and the router's choice: computation; the counts of tokens start to travel."""
        with saved.hooks():
            residual = x + self.attention(self.attention_norm(x, saved), turns, saved)
            normed = self.mlp_norm(residual, saved)
            if not isinstance(self.mlp, MixtureOfExperts):
                return Attended(residual, normed, None, None)
            routing = self.mlp.gate(normed, valid)
        return Attended(residual, normed, routing, self.mlp.dispatcher.begin_route(routing.expert_ids))

    def run_dense(self, attended: Attended, saved: Keep | Rebuild) -> Tensor:
        """All the rest of a dense block: computation."""
        with saved.hooks():
            return attended.residual + self.mlp(attended.normed, saved)

    def dispatch(self, attended: Attended) -> Pending[Dispatched]:
        """Start sending tokens to their experts, once the counts are there: communication."""
        assert isinstance(self.mlp, MixtureOfExperts) and attended.routing is not None
        rows, routing = attended.normed.flatten(0, 1), attended.routing
        return self.mlp.dispatcher.begin_dispatch(rows, routing.expert_ids, routing.weights, attended.route)

    def run_shared(self, attended: Attended, saved: Keep | Rebuild) -> Tensor | None:
        """The experts every token passes: computation that needs no dispatch."""
        assert isinstance(self.mlp, MixtureOfExperts)
        with saved.hooks():
            return None if self.mlp.shared is None else self.mlp.shared(attended.normed, saved)

    def run_experts(self, dispatched: Dispatched, saved: Keep | Rebuild) -> Tensor:
        """The routed experts on the rows that arrived: computation."""
        assert isinstance(self.mlp, MixtureOfExperts)
        with saved.hooks():
            return self.mlp.experts(dispatched.x, dispatched.weights, dispatched.offsets, saved)

    def combine(self, y: Tensor, dispatched: Dispatched) -> Pending[Tensor]:
        """Start returning the experts' outputs to their tokens: communication."""
        assert isinstance(self.mlp, MixtureOfExperts)
        return self.mlp.dispatcher.begin_combine(y, dispatched)

    def finish(self, attended: Attended, routed: Tensor, shared: Tensor | None) -> Tensor:
        """The next residual stream from what came back, rows `[B S, H]`, and the shared experts."""
        routed = routed.view_as(attended.residual)
        return attended.residual + (routed if shared is None else routed + shared)
