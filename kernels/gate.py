"""Router behind its logits: experts, gate weights, token counts and balance losses in two kernels, and the backward.

B sequences, S tokens of a sequence, T = B S tokens, E experts in D groups, K top-k, P parts of a sequence over whose
tokens a program sums. Nothing is added with atomics, so the same logits give the same bits.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .launch import Launch
from .op import fused

MOST_PARTS = 128
"""Most parts of a sequence: a program of `balance` reads them all."""

VALUES = 2048
"""Affinities that a program holds at a time."""

EPSILON = 1e-20


@dataclass(frozen=True)
class Gate:
    """Rules of a router: what the operations below get as numbers, in this order."""

    top_k: int
    groups: int
    open_groups: int
    """Groups that a token may choose from; 0 if it may choose from all."""
    softmax: bool
    """Whether affinities are a softmax; else they are sigmoids."""
    paired: bool
    """Whether groups are chosen by their two best experts; else by their best."""
    apart: bool
    """Whether the balance loss counts the top-k of the scores without the bias; else the experts chosen."""
    normalise: bool
    """Whether a token's weights are divided by their sum."""
    factor: float
    """Factor on all weights."""
    most_groups: int
    """Largest number of groups that a token can be sent to."""


def _power(size: int) -> int:
    return 1 << max(0, size - 1).bit_length()


def _columns(experts: int, groups: int) -> dict[str, int]:
    members = experts // groups
    return {
        "groups": groups,
        "members": members,
        "groups_block": _power(groups),
        "members_block": _power(members),
    }


def _tile(columns: int) -> int:
    """Tokens of a tile of so many columns."""
    return max(1, min(64, VALUES // columns))


def _parts(length: int, experts: int, groups: int) -> tuple[int, int, int]:
    """Parts of a sequence, tiles of a part, and tokens of a tile."""
    columns = _columns(experts, groups)
    tile = _tile(columns["groups_block"] * columns["members_block"])
    tiles = -(-length // (tile * MOST_PARTS)) or 1
    return -(-length // (tile * tiles)), tiles, tile


# Formulas


def _affinities(logits: Tensor, softmax: bool) -> Tensor:
    return logits.softmax(-1) if softmax else logits.sigmoid()


def _choose(scores: Tensor, bias: Tensor | None, rules: Gate) -> Tensor:
    """Experts `[..., K]`, the best first."""
    order = scores if bias is None else scores + bias
    if rules.open_groups:
        grouped = order.unflatten(-1, (rules.groups, -1))
        best = min(2, grouped.shape[-1]) if rules.paired else 1
        worth = grouped.topk(best, -1).values.sum(-1)
        kept = worth.topk(rules.open_groups, -1).indices
        closed = torch.ones_like(worth, dtype=torch.bool).scatter_(-1, kept, False)
        order = grouped.masked_fill(closed.unsqueeze(-1), float("-inf")).flatten(-2)
    return order.topk(rules.top_k, -1).indices


def _marks(ids: Tensor, size: int) -> Tensor:
    """Ones where `ids` `[..., K]` point, int32 `[..., size]`; once for a number that is there twice."""
    return torch.zeros(*ids.shape[:-1], size, dtype=torch.int32, device=ids.device).scatter_(-1, ids, 1)


def _gate(logits: Tensor, bias: Tensor | None, *rules: Any) -> tuple[Tensor, ...]:
    wanted = Gate(*rules)
    length, experts = logits.shape[1:]
    parts, tiles, tile = _parts(length, experts, wanted.groups)

    def by_part(x: Tensor) -> Tensor:
        padded = torch.nn.functional.pad(x, (0, 0, 0, parts * tiles * tile - length))
        return padded.unflatten(1, (parts, -1)).sum(2, dtype=x.dtype)

    scores = _affinities(logits, wanted.softmax)
    ids = _choose(scores, bias, wanted)
    weights = scores.gather(-1, ids)
    if wanted.normalise:
        weights = weights / (weights.sum(-1, keepdim=True) + EPSILON)
    counted = [ids] + [scores.topk(wanted.top_k, -1).indices] * wanted.apart
    hits = torch.stack([by_part(_marks(each, experts)) for each in counted], 2)
    reached = by_part(_marks(ids // (experts // wanted.groups), wanted.groups)) * (wanted.groups > 1)
    affinity = scores if wanted.softmax else scores / scores.sum(-1, keepdim=True)
    return ids.flatten(0, 1), (weights * wanted.factor).flatten(0, 1), by_part(affinity), hits, reached


def _balance(
    shares: Tensor, hits: Tensor, reached: Tensor, valid: Tensor, length: int, *rules: Any
) -> tuple[Tensor, Tensor, Tensor]:
    wanted = Gate(*rules)
    experts = shares.shape[-1]
    share = shares.sum(1) / length
    sums = hits.sum(1)
    counts = torch.cat(((sums[:, 0] * valid[:, None]).sum(0), sums.new_zeros(1))).long()
    load = sums[:, -1] * (experts / (wanted.top_k * length)) * valid[:, None]
    pairs = [(load, share)]
    if wanted.groups > 1:
        of_groups = share.unflatten(1, (wanted.groups, -1)).sum(-1)
        reach = reached.sum(1) / length * (wanted.groups / wanted.most_groups) * valid[:, None]
        pairs += [(load.unflatten(1, (wanted.groups, -1)).mean(-1), of_groups), (reach, of_groups)]
    losses = torch.stack([(pull * given).sum() for pull, given in pairs])
    pulls = [(pull / length).repeat_interleave(experts // pull.shape[1], 1) for pull, _ in pairs]
    return counts, torch.nn.functional.pad(losses, (0, 3 - len(pairs))), torch.stack(pulls)


def _backward(
    grad_weights: Tensor | None,
    of_losses: list[Tensor | None],
    logits: Tensor,
    ids: Tensor,
    pulls: Tensor,
    halves: bool,
    *rules: Any,
) -> Tensor:
    wanted = Gate(*rules)
    scores = _affinities(logits, wanted.softmax)
    pull = torch.zeros_like(scores)
    for gradient, pulled in zip(of_losses, pulls, strict=False):
        if gradient is not None:
            pull = pull + gradient * pulled.unsqueeze(1)
    if not wanted.softmax:
        total = scores.sum(-1, keepdim=True)
        pull = (pull - (pull * scores).sum(-1, keepdim=True) / total) / total
    if grad_weights is not None:
        chosen = ids.view(*scores.shape[:2], -1)
        gradient, gates = grad_weights.view(chosen.shape), scores.gather(-1, chosen)
        if wanted.normalise:
            total = gates.sum(-1, keepdim=True) + EPSILON
            gradient = (gradient - (gradient * gates).sum(-1, keepdim=True) / total) / total
        pull = pull.scatter_add(-1, chosen, gradient * wanted.factor)
    along = (pull * scores).sum(-1, keepdim=True)
    pull = scores * (pull - along) if wanted.softmax else pull * scores * (1 - scores)
    pull = pull.flatten(0, 1)
    if not halves:
        return pull
    high = pull.bfloat16()
    return torch.cat((high, (pull - high.float()).bfloat16()), 1)


# Kernels


def _shapes(logits: Tensor, bias: Tensor | None, *rules: Any) -> tuple[Tensor, ...]:
    wanted = Gate(*rules)
    batch, length, experts = logits.shape
    parts, _, _ = _parts(length, experts, wanted.groups)
    return (
        logits.new_empty(batch * length, wanted.top_k, dtype=torch.int64),
        logits.new_empty(batch * length, wanted.top_k),
        logits.new_empty(batch, parts, experts),
        logits.new_empty(batch, parts, 2 if wanted.apart else 1, experts, dtype=torch.int32),
        logits.new_empty(batch, parts, wanted.groups, dtype=torch.int32),
    )


def _gpu(logits: Tensor, bias: Tensor | None, *rules: Any) -> tuple[Tensor, ...]:
    wanted, logits = Gate(*rules), logits.contiguous()
    batch, length, experts = logits.shape
    parts, tiles, tile = _parts(length, experts, wanted.groups)
    results = _shapes(logits, bias, *rules)
    from .triton.gate_kernels import gate as kernel

    Launch(
        kernel,
        batch * parts,
        (logits, logits if bias is None else bias, *results, length, parts, tiles, experts, wanted.factor),
        {"top_k": wanted.top_k, "top_block": _power(wanted.top_k), "open_groups": wanted.open_groups}
        | _columns(experts, wanted.groups)
        | {"softmax": wanted.softmax, "biased": bias is not None, "apart": wanted.apart, "block": tile}
        | {"paired": wanted.paired and experts > wanted.groups, "normalise": wanted.normalise},
        num_warps=8,
    ).run()
    return results


def _shapes_balance(
    shares: Tensor, hits: Tensor, reached: Tensor, valid: Tensor, length: int, *rules: Any
) -> tuple[Tensor, Tensor, Tensor]:
    batch, _, experts = shares.shape
    return (
        shares.new_empty(experts + 1, dtype=torch.int64),
        shares.new_empty(3),
        shares.new_empty(3 if Gate(*rules).groups > 1 else 1, batch, experts),
    )


def _gpu_balance(
    shares: Tensor, hits: Tensor, reached: Tensor, valid: Tensor, length: int, *rules: Any
) -> tuple[Tensor, Tensor, Tensor]:
    wanted = Gate(*rules)
    batch, parts, experts = shares.shape
    results = _shapes_balance(shares, hits, reached, valid, length, *rules)
    factors = float(experts / (wanted.top_k * length)), float(wanted.groups / wanted.most_groups)
    from .triton.gate_kernels import balance as kernel

    Launch(
        kernel,
        1,
        (
            *(shares, hits, reached, valid.contiguous().view(torch.uint8), *results),
            *(batch, parts, length, experts),
            *factors,
        ),
        {"kinds": hits.shape[2]} | _columns(experts, wanted.groups) | {"block": 16},
        num_warps=8,
    ).run()
    return results


def _shapes_backward(
    grad_weights: Tensor | None,
    of_losses: list[Tensor | None],
    logits: Tensor,
    ids: Tensor,
    pulls: Tensor,
    halves: bool,
    *rules: Any,
) -> Tensor:
    batch, length, experts = logits.shape
    dtype = torch.bfloat16 if halves else torch.float32
    return logits.new_empty(batch * length, (2 if halves else 1) * experts, dtype=dtype)


def _gpu_backward(
    grad_weights: Tensor | None,
    of_losses: list[Tensor | None],
    logits: Tensor,
    ids: Tensor,
    pulls: Tensor,
    halves: bool,
    *rules: Any,
) -> Tensor:
    wanted, logits = Gate(*rules), logits.contiguous()
    batch, length, experts = logits.shape
    out = _shapes_backward(grad_weights, of_losses, logits, ids, pulls, halves, *rules)
    given = [logits if loss is None else loss for loss in of_losses]
    by = [loss is not None and index < len(pulls) for index, loss in enumerate(of_losses)]
    columns = _power(experts)
    tile = _tile(columns)
    from .triton.gate_kernels import gate_backward as kernel

    Launch(
        kernel,
        -(-batch * length // tile),
        (
            *(logits if grad_weights is None else grad_weights.contiguous(), *given, logits, ids, pulls, out),
            *(batch * length, batch, length, experts, wanted.factor),
        ),
        {"top_k": wanted.top_k, "softmax": wanted.softmax, "normalise": wanted.normalise}
        | {"weighted": grad_weights is not None, "halves": halves, "columns": columns, "block": tile}
        | {"by_experts": by[0], "by_devices": by[1], "by_groups": by[2]},
        num_warps=8,
    ).run()
    return out


_RULES = (
    "int top_k, int groups, int open_groups, bool softmax, bool paired, bool apart, bool normalise, float factor, "
    "int most_groups"
)

gate: Any = fused(
    f"gate(Tensor logits, Tensor? bias, {_RULES}) -> (Tensor, Tensor, Tensor, Tensor, Tensor)", _gpu, _gate, _shapes
)
"""logits FP32 `[B, S, E]`, bias FP32 `[E]` or None -> experts int64 `[T, K]`, the best first; weights FP32 `[T, K]`;
and sums for `gate_balance`: of affinities FP32 `[B, P, E]`, of tokens by expert int32 `[B, P, 1 or 2, E]`, by group
int32 `[B, P, D]`, zeros for one group. Among equal scores kernels choose the lower number."""

gate_balance: Any = fused(
    f"gate_balance(Tensor shares, Tensor hits, Tensor reached, Tensor valid, int length, {_RULES})"
    " -> (Tensor, Tensor, Tensor)",
    _gpu_balance,
    _balance,
    _shapes_balance,
)
"""Sums of `gate` and valid bool `[B]` -> token counts int64 `[E + 1]`, the last of them 0; the losses over experts,
over groups and over tokens sent to groups FP32 `[3]`, each summed over valid sequences; and their gradients for a
token's affinities FP32 `[1 or 3, B, E]`."""

gate_backward: Any = fused(
    "gate_backward(Tensor? grad_weights, Tensor?[] of_losses, Tensor logits, Tensor ids, Tensor pulls, bool halves, "
    f"{_RULES}) -> Tensor",
    _gpu_backward,
    _backward,
    _shapes_backward,
)
"""Gradients of the weights and of the three losses, None for none -> gradient of the logits: FP32 `[T, E]`, or with
`halves` BF16 `[T, 2E]`, rounded, and what was rounded off, rounded: 16 bits of each number."""
