"""The whole network: embedding, decoder blocks, output head and multi-token prediction.

B sequences, S tokens of a sequence, D depth of multi-token prediction, H hidden, L MoE layers, E experts.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..comm.dispatcher import Dispatcher
from ..fp8.linear import Linear
from .block import DecoderBlock
from .config import ModelConfig
from .kernels import EmbeddingFunction, Kernels
from .loss import IGNORED, cross_entropy_sum
from .norm import RMSNorm
from .recompute import Keep, RecomputePolicy
from .rope import rotary_turns
from .router import Router, Routing


@dataclass(frozen=True)
class Output:
    """What a micro-batch gives: sums, not means, because the mean is over the global batch."""

    loss: Tensor
    """FP32 scalar: next-token cross-entropy summed over valid positions, in nats."""
    mtp_losses: tuple[Tensor, ...]
    """For each MTP depth, cross-entropy summed over valid positions."""
    balance: Tensor
    """Sequence-wise balance loss summed over MoE layers and valid sequences, before its weight."""
    counts: Tensor
    """`[L, E]` int64: valid tokens each expert of each MoE layer (MTP modules last) was sent."""


class MTPModule(nn.Module):
    """Predicts one token further ahead from the previous depth's hidden state (V3 §2.2, equations 21-23).

    The embedding and the output head are the main model's. The incoming hidden state is the one the head sees, after
    the final norm: what inference engines feed these weights with.
    """

    def __init__(self, config: ModelConfig, block: DecoderBlock, kernels: Kernels) -> None:
        super().__init__()
        self.hidden_norm = RMSNorm(config.hidden_size, config.rms_norm_eps, kernels)
        self.embedding_norm = RMSNorm(config.hidden_size, config.rms_norm_eps, kernels)
        self.project = Linear(2 * config.hidden_size, config.hidden_size)
        self.block = block
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps, kernels)

    def join(self, hidden: Tensor, embedded: Tensor) -> Tensor:
        """hidden and embedded `[B, S, H]` -> the block's input `[B, S, H]`."""
        keep = Keep()
        # Released weights take the embedding first: eh_proj(cat(enorm(e), hnorm(h))).
        return self.project(torch.cat((self.embedding_norm(embedded, keep), self.hidden_norm(hidden, keep)), -1))


class Transformer(nn.Module):
    """A DeepSeek-V3-class language model, or the part of its experts that this rank holds."""

    def __init__(
        self,
        config: ModelConfig,
        dispatcher: Dispatcher,
        local_experts: Sequence[int],
        recompute: RecomputePolicy = "none",
        kernels: Kernels | None = None,
    ) -> None:
        super().__init__()
        self.config = config
        kernels = kernels or Kernels.make()

        def block(layer: int) -> DecoderBlock:
            experts = local_experts if config.is_moe(layer) else None
            return DecoderBlock(config, experts, dispatcher, kernels, recompute)

        layers = config.num_hidden_layers
        self.embedding = nn.Parameter(torch.empty(config.vocab_size, config.hidden_size))
        self.layers = nn.ModuleList(block(layer) for layer in range(layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps, kernels)
        self.head = nn.Parameter(torch.empty(config.vocab_size, config.hidden_size))
        self.mtp = nn.ModuleList(
            MTPModule(config, block(layers + depth), kernels) for depth in range(config.num_nextn_predict_layers)
        )
        self._table: Tensor | None = None

    def forward(self, tokens: Tensor, valid: Tensor | None = None, mtp: bool = True) -> Output:
        """tokens `[B, S+1+D]` int64: position i predicts token i+1, MTP depth k token i+1+k.

        valid `[B]` bool, False for sequences that are padding and count for nothing. `mtp` False leaves the MTP modules
        out, for evaluation.
        """
        depth = len(self.mtp)
        length = tokens.shape[1] - 1 - depth
        if valid is None:
            valid = torch.ones(tokens.shape[0], dtype=torch.bool, device=tokens.device)
        targets = tokens.masked_fill(~valid.unsqueeze(1), IGNORED)
        x, routings = self.hidden_states(tokens[:, :length], valid)
        hidden = self.norm(x, Keep())
        loss = self._head_loss(hidden, targets[:, 1 : length + 1])
        mtp_losses = []
        for k, module in enumerate(self.mtp if mtp else (), start=1):
            assert isinstance(module, MTPModule)
            x = module.join(hidden, EmbeddingFunction.apply(tokens[:, k : length + k], self.embedding))
            x, routing = module.block(x, self._turns(length, x.device), valid)
            routings.append(routing)
            hidden = module.norm(x, Keep())
            mtp_losses.append(self._head_loss(hidden, targets[:, k + 1 : length + k + 1]))
        moe = [routing for routing in routings if routing is not None]
        if moe:
            balance, counts = torch.stack([r.balance for r in moe]).sum(), torch.stack([r.counts for r in moe])
        else:
            balance, counts = loss.new_zeros(()), tokens.new_zeros(0, self.config.n_routed_experts)
        return Output(loss, tuple(mtp_losses), balance, counts)

    def hidden_states(self, tokens: Tensor, valid: Tensor) -> tuple[Tensor, list[Routing | None]]:
        """Residual stream `[B, S, H]` after the last block, before the final norm, and each block's routing."""
        x = EmbeddingFunction.apply(tokens, self.embedding)
        turns = self._turns(tokens.shape[1], x.device)
        routings = []
        for layer in self.layers:
            x, routing = layer(x, turns, valid)
            routings.append(routing)
        return x, routings

    def logits(self, tokens: Tensor) -> Tensor:
        """Next-token logits `[B, S, V]` of tokens `[B, S]`, whole: for evaluation and sampling, not for training."""
        valid = torch.ones(tokens.shape[0], dtype=torch.bool, device=tokens.device)
        x, _ = self.hidden_states(tokens, valid)
        return F.linear(self.norm(x, Keep()), self.head)

    def routers(self) -> list[Router]:
        """Routers of the MoE layers in order, MTP modules last: the rows of `Output.counts`."""
        return [module for module in self.modules() if isinstance(module, Router)]

    def _turns(self, length: int, device: torch.device) -> Tensor:
        """Rotary factors of the first `length` positions, made at the first use and kept."""
        if self._table is None or self._table.shape[0] < length or self._table.device != device:
            with torch.inference_mode(False):  # a table made while sampling must serve training later
                self._table = rotary_turns(self.config, length, device)
        return self._table[:length]

    def _head_loss(self, hidden: Tensor, labels: Tensor) -> Tensor:
        return cross_entropy_sum(hidden.flatten(0, 1), self.head, labels.flatten())
