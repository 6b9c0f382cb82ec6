"""Network: embedding, decoder blocks, output head and multi-token prediction.

B sequences, S tokens of a sequence, D depth of multi-token prediction, H hidden, L MoE layers, E experts.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..comm.dispatcher import Dispatcher
from ..fp8.linear import GroupedLinear, Linear
from ..fp8.recipe import Recipe
from ..phases import Tape, Uncut, run
from ..weight_gradients import WeightQueue, plain_autograd, sink_of
from .balance import BalanceWeights
from .block import DecoderBlock, DenseBlock, MoEBlock
from .capacity import Dropping
from .config import ModelConfig
from .feed_forward import MixtureOfExperts
from .kernels import EmbeddingFunction, Kernels
from .loss import IGNORED, cross_entropy_sum
from .norm import RMSNorm
from .recompute import Keep, RecomputePolicy
from .rope import rotary_factors
from .router import Router, Routing


@dataclass(frozen=True)
class Output:
    """Losses and counts of a micro-batch: sums, not means, because the mean is over the global batch."""

    loss: Tensor
    """FP32 scalar: next-token cross-entropy summed over valid positions, in nats."""
    mtp_losses: tuple[Tensor, ...]
    """Cross-entropy of each MTP depth, summed over valid positions."""
    balance: Tensor
    """Balance loss over experts summed over MoE layers and valid sequences, before its weight."""
    device: Tensor
    """Balance loss over groups of experts (V2 §2.2.3), likewise; 0 with one group."""
    communication: Tensor
    """Balance loss over tokens sent to groups, likewise; 0 with one group."""
    counts: Tensor
    """`[L, E]` int64: valid tokens that chose each expert, by MoE layer (MTP modules last)."""
    dropped: Tensor
    """`[L]` int64: (token, expert) pairs of these tokens that were dropped."""
    first_moe: int = 0
    """Index of this part's first MoE layer among all MoE layers of the model."""


class MTPModule(nn.Module):
    """Module of multi-token prediction: one token further ahead than the previous depth (V3 §2.2, equations 21-23).

    The embedding and the output head are the main model's. The incoming hidden state is the input of the head, after
    the final norm, as inference engines use these weights.
    """

    def __init__(self, config: ModelConfig, block: DecoderBlock, kernels: Kernels, recipe: Recipe) -> None:
        super().__init__()
        self.hidden_norm = RMSNorm(config.hidden_size, config.rms_norm_eps, kernels)
        self.embedding_norm = RMSNorm(config.hidden_size, config.rms_norm_eps, kernels)
        self.project = Linear(2 * config.hidden_size, config.hidden_size, recipe.linear("mtp"))
        self.block = block
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps, kernels)

    def join(self, hidden: Tensor, embedded: Tensor) -> Tensor:
        """Join hidden and embedded `[B, S, H]` to the block's input `[B, S, H]`."""
        keep = Keep()
        # Released weights take the embedding first: eh_proj(cat(enorm(e), hnorm(h))).
        return self.project(torch.cat((self.embedding_norm(embedded, keep), self.hidden_norm(hidden, keep)), -1))


@dataclass(frozen=True)
class Part:
    """Consecutive layers of a stage. The first stage has the embedding, the last the head and MTP."""

    layers: range
    first: bool = True
    last: bool = True

    @classmethod
    def whole(cls, config: ModelConfig) -> Part:
        return cls(range(config.num_hidden_layers))


@dataclass(frozen=True)
class LossWeights:
    """Factors with which the backward of a micro-batch's losses begins; the losses are sums."""

    token: float = 1.0
    mtp: float = 1.0
    balance: float = 1.0
    device: float = 0.0
    communication: float = 0.0

    @property
    def of_routers(self) -> BalanceWeights:
        return BalanceWeights(self.balance, self.device, self.communication)


@dataclass(frozen=True)
class MicroBatch:
    """Sequences to train on or to evaluate."""

    tokens: Tensor
    """`[B, S+1+D]` int64: position i predicts token i+1, MTP depth k token i+1+k."""
    valid: Tensor
    """`[B]` bool, False for sequences that are padding and are not counted."""
    weights: LossWeights = LossWeights()
    mtp: bool = True
    """Whether the MTP modules run; False is for evaluation."""
    dropping: Dropping | None = None
    """Budget of the groups of experts; None, as in evaluation, drops no token."""


class Transformer(nn.Module):
    """DeepSeek-V3-class language model, or a stage of one, with the experts that this rank holds.

    Layers are numbered through the whole model, whatever part this is. A last stage that is not the first has an
    embedding too if there is MTP, because MTP modules embed tokens.
    """

    def __init__(
        self,
        config: ModelConfig,
        dispatcher: Dispatcher,
        local_experts: Sequence[int],
        recompute: RecomputePolicy = "none",
        kernels: Kernels | None = None,
        part: Part | None = None,
        recipe: Recipe | None = None,
    ) -> None:
        """`recipe` quantises the linear layers' tensors; by default nothing is quantised."""
        super().__init__()
        self.config = config
        self.recipe = recipe = recipe or Recipe()
        self.part = part = part or Part.whole(config)
        kernels = kernels or Kernels.make()

        def block(layer: int) -> DecoderBlock:
            if config.is_moe(layer):
                return MoEBlock(config, local_experts, dispatcher, kernels, recompute, recipe)
            return DenseBlock(config, kernels, recompute, recipe)

        depths = config.num_nextn_predict_layers if part.last else 0
        if part.first or depths:
            self.embedding = nn.Parameter(torch.empty(config.vocab_size, config.hidden_size))
        self.layers = nn.ModuleDict({str(layer): block(layer) for layer in part.layers})
        if part.last:
            self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps, kernels)
            self.head = nn.Parameter(torch.empty(config.vocab_size, config.hidden_size))
        self.mtp = nn.ModuleList(
            MTPModule(config, block(config.num_hidden_layers + depth), kernels, recipe) for depth in range(depths)
        )
        self.before_use: Callable[..., None] = _nothing_to_wait_for
        """Hook, called with modules and parameters before the forward reads them: new weights may still arrive."""
        self.weight_queue = WeightQueue(of_pairs=WeightQueue())
        for module in self.modules():
            if isinstance(module, Linear | GroupedLinear):
                module.weight_queue = self.weight_queue if module.may_wait else self.weight_queue.of_pairs
        self._table: Tensor | None = None

    def forward(
        self, tokens: Tensor, valid: Tensor | None = None, mtp: bool = True, dropping: Dropping | None = None
    ) -> Output:
        """Run the whole model as one graph: tokens, valid and dropping as in `MicroBatch`, by default all valid.

        Plain autograd gets every gradient, also where an optimizer adds up those of a pipeline's passes.
        `mtp` False leaves the MTP modules out, for evaluation.
        """
        assert self.part == Part.whole(self.config), "a stage runs in a pipeline"
        if valid is None:
            valid = torch.ones(tokens.shape[0], dtype=torch.bool, device=tokens.device)
        with plain_autograd():
            _, output = run(self.phases(MicroBatch(tokens, valid, mtp=mtp, dropping=dropping), None, Uncut()))
        return output

    def phases(
        self, batch: MicroBatch, x: Tensor | None, tape: Uncut | Tape
    ) -> Generator[str, None, tuple[Tensor | None, Output]]:
        """Yield each phase's name, then run it; returns the next stage's input, and this part's losses and counts.

        x `[B, S, H]` is the previous stage's output, None at the first stage.
        """
        length = batch.tokens.shape[1] - 1 - self.config.num_nextn_predict_layers
        if self.part.first:
            assert x is None
            yield tape.phase("embedding")
            self.before_use(self.embedding)
            x = tape.cut(self._embed(batch.tokens[:, :length]))
        assert x is not None
        rotary, routings = self._rotary(length, x.device), []
        for layer, block in self.layers.items():
            assert isinstance(block, DecoderBlock)
            self.before_use(block)
            x, routing = yield from block.phases(x, rotary, batch.valid, tape, batch.weights.of_routers, batch.dropping)
            routings.append(routing)
            if self.part.last or int(layer) + 1 < self.part.layers.stop:
                x = tape.cut(x)
        losses: list[Tensor] = []
        if self.part.last:
            losses = yield from self._predict(batch, x, rotary, tape, routings)
        output = self._output(losses, [routing for routing in routings if routing is not None], x.device)
        return (None if self.part.last else tape.leave(x)), output

    def _predict(
        self, batch: MicroBatch, x: Tensor, rotary: Tensor, tape: Uncut | Tape, routings: list[Routing | None]
    ) -> Generator[str, None, list[Tensor]]:
        """Losses from the last layer's output: next token first, then each MTP depth."""
        targets = batch.tokens.masked_fill(~batch.valid.unsqueeze(1), IGNORED)
        length, weights, losses = x.shape[1], batch.weights, []
        modules = list(self.mtp) if batch.mtp else []
        norm: nn.Module = self.norm
        for depth in range(len(modules) + 1):
            yield tape.phase("head")
            self.before_use(norm, self.head)
            hidden = norm(x, Keep())
            weight = weights.mtp if depth else weights.token
            known = None if isinstance(tape, Uncut) else weight  # plain autograd begins a backward as its caller likes
            loss = self._head_loss(hidden, targets[:, depth + 1 : length + depth + 1], known)
            losses.append(tape.seed(loss, weight))
            if depth == len(modules):
                return losses
            module = modules[depth]
            assert isinstance(module, MTPModule)
            self.before_use(module, self.embedding)
            embedded = self._embed(batch.tokens[:, depth + 1 : length + depth + 1])
            x = tape.cut(module.join(hidden, embedded))
            x, routing = yield from module.block.phases(
                x, rotary, batch.valid, tape, weights.of_routers, batch.dropping
            )
            x = tape.cut(x)
            routings.append(routing)
            norm = module.norm
        raise AssertionError("unreachable")

    def _output(self, losses: list[Tensor], routings: list[Routing], device: torch.device) -> Output:
        """Losses of `_predict` (none before the last stage), and statistics of the MoE layers' routings."""

        def stack(by_layer: list[Tensor], *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
            """`[L, *shape]`; a stage without MoE layers has L = 0."""
            return torch.stack(by_layer) if by_layer else torch.zeros(0, *shape, dtype=dtype, device=device)

        return Output(
            loss=losses[0] if losses else torch.zeros((), device=device),
            mtp_losses=tuple(losses[1:]),
            balance=stack([routing.balance for routing in routings]).sum(),
            device=stack([routing.device for routing in routings]).sum(),
            communication=stack([routing.communication for routing in routings]).sum(),
            counts=stack([routing.counts for routing in routings], self.config.n_routed_experts, dtype=torch.int64),
            dropped=stack([routing.dropped for routing in routings], dtype=torch.int64),
            first_moe=self.first_moe,
        )

    @property
    def first_moe(self) -> int:
        """Index of this part's first MoE layer among all MoE layers of the model."""
        return max(0, self.part.layers.start - self.config.first_k_dense_replace)

    def logits(self, tokens: Tensor) -> Tensor:
        """Next-token logits `[B, S, V]` of tokens `[B, S]`, in one piece: for evaluation and sampling, not training."""
        self.before_use(self)
        valid = torch.ones(tokens.shape[0], dtype=torch.bool, device=tokens.device)
        x = self._embed(tokens)
        for block in self.layers.values():
            x, _ = block(x, self._rotary(tokens.shape[1], x.device), valid)
        return self.recipe.products.multiply(self.norm(x, Keep()), self.head.mT)

    def routers(self) -> list[Router]:
        """Routers of this part's MoE layers in order, MTP modules last: the rows of `Output.counts`."""
        return [module for module in self.modules() if isinstance(module, Router)]

    def mixtures(self) -> list[MixtureOfExperts]:
        """Mixtures of this part's MoE layers, in the order of `routers`."""
        return [module for module in self.modules() if isinstance(module, MixtureOfExperts)]

    def _embed(self, tokens: Tensor) -> Tensor:
        embedded: Tensor = EmbeddingFunction.apply(tokens, self.embedding, sink_of(self.embedding))
        return embedded

    def _rotary(self, length: int, device: torch.device) -> Tensor:
        """Rotary factors of the first `length` positions, computed at the first use and kept."""
        if self._table is None or self._table.shape[0] < length or self._table.device != device:
            with torch.inference_mode(False):  # a table made while sampling is used in training later
                self._table = rotary_factors(self.config, length, device)
        return self._table[:length]

    def _head_loss(self, hidden: Tensor, labels: Tensor, gradient: float | None) -> Tensor:
        return cross_entropy_sum(hidden.flatten(0, 1), self.head, labels.flatten(), self.recipe.products, gradient)


def _nothing_to_wait_for(*users: nn.Module | nn.Parameter) -> None:
    """Do nothing: the weights have arrived."""
