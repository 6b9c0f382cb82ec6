"""Counts of a model's parameters and of its FLOPs per token: arithmetic on the configuration alone.

No weight is allocated and torch is not imported, so planning a 671B model takes microseconds.
Symbols in docstrings: H hidden, V vocabulary, S sequence, E experts, K top-k.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from .config import ModelConfig

FLOP_CONVENTION = "6 FLOPs per active matmul parameter + attention, no causal discount"
"""Convention of `flops_per_token`, short enough to stand next to an MFU figure.

In full: a training step costs three forwards (one forward, and two for the gradients of inputs and of weights);
a forward costs 2 FLOPs for every weight that multiplies the token: the K selected experts and not the other
E - K, the output head but not the embedding (a lookup), MTP modules with a head each; and attention scores and
sums cost 2 S (qk_head_dim + v_head_dim) per head, as if no position were masked. Recomputation is not counted.
"""


@dataclass(frozen=True)
class AttentionCounts:
    """Parameters of one multi-head latent attention (V3 §2.1.1)."""

    query: int  # down and up projection, or the one direct projection
    key_value: int  # joint down projection (with the shared rotary key) and up projection
    output: int
    norms: int  # gains of the RMSNorms on the compressed latents

    @property
    def matmul(self) -> int:
        return self.query + self.key_value + self.output

    @property
    def total(self) -> int:
        return self.matmul + self.norms


@dataclass(frozen=True)
class ParameterCounts:
    """Parameters of a model by part. "Each" parts are counted once, however many layers hold them.

    Parameters are trained by gradients. The router's correction bias is moved by a separate rule and is a buffer, as in
    Hugging Face's model, so no total includes it: `router_bias` is its size (671B: 58 x 256 = 14,848, and
    671,026,404,352 parameters without it; 671.026B either way). Embedding and head are not tied.
    """

    dense_layers: int
    moe_layers: int
    mtp_modules: int
    experts_per_token: int
    routed_experts: int

    embedding: int  # V x H
    head: int  # H x V
    final_norm: int
    block_norms: int  # each block: before attention and before the feed-forward
    attention: AttentionCounts  # each block
    dense_ffn: int  # each dense block
    router: int  # each MoE block: the gate's E x H
    router_bias: int  # each MoE block: E, a buffer; only V3's router has one
    expert: int  # each routed expert
    shared_experts: int  # each MoE block: all shared experts together
    mtp_projection: int  # each MTP module: eh_proj, 2H x H
    mtp_norms: int  # each MTP module: enorm, hnorm, shared_head.norm

    @property
    def dense_block(self) -> int:
        return self.attention.total + self.block_norms + self.dense_ffn

    @property
    def moe_block(self) -> int:
        return self._moe_block_with(self.routed_experts)

    @property
    def active_moe_block(self) -> int:
        """Part of an MoE block that one token uses: K of its E experts."""
        return self._moe_block_with(self.experts_per_token)

    @property
    def mtp_module(self) -> int:
        """One MTP module without the embedding and the head, which it shares with the model (V3 §2.2)."""
        return self.mtp_norms + self.mtp_projection + self.moe_block

    @property
    def total(self) -> int:
        """Parameters of the model without MTP modules, as "671B" is counted."""
        return self._model_with(self.moe_block)

    @property
    def active(self) -> int:
        """Part of `total` that one token uses, embedding and head included."""
        return self._model_with(self.active_moe_block)

    @property
    def trained(self) -> int:
        """Parameters in the optimizer: the model and its MTP modules."""
        return self.total + self.mtp_modules * self.mtp_module

    def _moe_block_with(self, experts: int) -> int:
        ffn = self.router + experts * self.expert + self.shared_experts
        return self.attention.total + self.block_norms + ffn

    def _model_with(self, moe_block: int) -> int:
        outside = self.embedding + self.head + self.final_norm
        return outside + self.dense_layers * self.dense_block + self.moe_layers * moe_block


def count_attention(model: ModelConfig) -> AttentionCounts:
    """Parameters of one block's attention."""
    hidden, heads = model.hidden_size, model.num_attention_heads
    queries = heads * model.qk_head_dim
    if model.q_lora_rank is None:
        query, query_norm = hidden * queries, 0
    else:
        query, query_norm = (hidden + queries) * model.q_lora_rank, model.q_lora_rank
    down = hidden * (model.kv_lora_rank + model.qk_rope_head_dim)
    up = model.kv_lora_rank * heads * (model.qk_nope_head_dim + model.v_head_dim)
    return AttentionCounts(
        query=query,
        key_value=down + up,
        output=heads * model.v_head_dim * hidden,
        norms=query_norm + model.kv_lora_rank,
    )


def count_parameters(model: ModelConfig) -> ParameterCounts:
    """Parameters of `model` by part, with totals."""
    hidden = model.hidden_size
    expert = 3 * hidden * model.moe_intermediate_size  # gate, up and down projection of a SwiGLU
    return ParameterCounts(
        dense_layers=model.first_k_dense_replace,
        moe_layers=model.num_moe_layers - model.num_nextn_predict_layers,
        mtp_modules=model.num_nextn_predict_layers,
        experts_per_token=model.num_experts_per_tok,
        routed_experts=model.n_routed_experts,
        embedding=model.vocab_size * hidden,
        head=hidden * model.vocab_size,
        final_norm=hidden,
        block_norms=2 * hidden,
        attention=count_attention(model),
        dense_ffn=3 * hidden * model.intermediate_size,
        router=model.n_routed_experts * hidden,
        router_bias=model.n_routed_experts if model.has_router_bias else 0,
        expert=expert,
        shared_experts=model.n_shared_experts * expert,
        mtp_projection=2 * hidden * hidden,
        mtp_norms=3 * hidden,
    )


def flops_per_token(model: ModelConfig, sequence_length: int) -> float:
    """FLOPs per token of a training step, forward and backward, by FLOP_CONVENTION.

    Linear in `sequence_length` S: each token attends to a whole sequence of S tokens.
    """
    counts = count_parameters(model)
    core = 2 * model.num_attention_heads * (model.qk_head_dim + model.v_head_dim) * sequence_length
    attention = 2 * counts.attention.matmul + core
    dense_block = attention + 2 * counts.dense_ffn
    selected = counts.experts_per_token * counts.expert
    moe_block = attention + 2 * (counts.router + selected + counts.shared_experts)
    head = 2 * counts.head
    mtp_module = 2 * counts.mtp_projection + moe_block + head
    forward = head + counts.dense_layers * dense_block + counts.moe_layers * moe_block
    return 3.0 * (forward + counts.mtp_modules * mtp_module)


class PartRow(NamedTuple):
    """One line of the parameter table."""

    part: str
    each: int  # parameters of one such part
    copies: int  # number of them in the model
    total: int  # each x copies
    active: int  # parameters that one token uses


def parameter_table(model: ModelConfig) -> list[PartRow]:
    """Table of parameters by part, for display. The rows add up to `trained`; their active column adds up to the
    parameters that a token uses in training (`active`, and the active part of the MTP modules)."""
    counts = count_parameters(model)
    layers = model.num_hidden_layers
    rows = [
        _row("embedding", counts.embedding, 1),
        _row("attention", counts.attention.total, layers),
        _row("dense feed-forward", counts.dense_ffn, counts.dense_layers),
        _row("router", counts.router, counts.moe_layers),
        _row(
            "routed experts",
            counts.expert,
            counts.routed_experts * counts.moe_layers,
            active_copies=counts.experts_per_token * counts.moe_layers,
        ),
        _row("shared experts", counts.shared_experts, counts.moe_layers),
        _row("block norms", counts.block_norms, layers),
        _row("final norm", counts.final_norm, 1),
        _row("output head", counts.head, 1),
    ]
    if counts.mtp_modules:
        idle = counts.moe_block - counts.active_moe_block
        module = _row("MTP module", counts.mtp_module, counts.mtp_modules)
        rows.append(module._replace(active=module.total - counts.mtp_modules * idle))
    return [row for row in rows if row.total]


def _row(part: str, each: int, copies: int, active_copies: int | None = None) -> PartRow:
    return PartRow(part, each, copies, each * copies, each * (copies if active_copies is None else active_copies))
