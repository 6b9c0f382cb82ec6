"""Random routings for dispatchers that must agree, special cases included."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from counterflow.tests.comm.layer import HIDDEN, INNER, Case

TOKENS = 12
"""Largest number of tokens of a rank; in one kind of routing, one rank has four times as many."""


def random_routing(
    seed: int, ranks: int, dtype: torch.dtype = torch.float32, hidden: int = HIDDEN, inner: int = INNER
) -> Case:
    """Inputs of one layer on `ranks` ranks; `len(case.up)` is the number of experts, a multiple of the ranks.

    Twenty consecutive seeds have every entry of KINDS twice: plainly, and with some slots that are sent nowhere.
    No expert occurs twice for one token, and slots are in any order.
    """
    generator = torch.Generator().manual_seed(seed)

    def number(low: int, high: int) -> int:
        return int(torch.randint(low, high + 1, (), generator=generator))

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).to(dtype)

    experts = ranks * number(1, 4)
    tokens = [number(1, TOKENS) for _ in range(ranks)]
    top_k, allowed = KINDS[list(KINDS)[seed % len(KINDS)]](number, experts, tokens)
    chance = torch.zeros(experts)
    chance[allowed] = 1.0
    ids = [torch.multinomial(chance.expand(n, -1), top_k, generator=generator) if n else _none(top_k) for n in tokens]
    if seed // len(KINDS) % 2:
        ids = [part.masked_fill(torch.rand(part.shape, generator=generator) < 0.3, -1) for part in ids]
    return Case(
        x=[normal(n, hidden) for n in tokens],
        expert_ids=ids,
        weights=[torch.rand(n, top_k, generator=generator) for n in tokens],
        up=normal(experts, hidden, inner) / hidden**0.5,
        down=normal(experts, inner, hidden) / inner**0.5,
        grads=[normal(n, hidden) for n in tokens],
    )


def _none(top_k: int) -> Tensor:
    return torch.zeros(0, top_k, dtype=torch.int64)


Number = Callable[[int, int], int]
Candidates = tuple[int, list[int]]
"""K, and the experts from which tokens choose."""


def _any(number: Number, experts: int, tokens: list[int]) -> Candidates:
    return number(1, min(experts, 8)), list(range(experts))


def _one_expert(number: Number, experts: int, tokens: list[int]) -> Candidates:
    return 1, [number(0, experts - 1)]


def _one_rank(number: Number, experts: int, tokens: list[int]) -> Candidates:
    """Candidates of one rank's experts: the other ranks receive nothing."""
    per_rank = experts // len(tokens)
    first = number(0, len(tokens) - 1) * per_rank
    return number(1, per_rank), list(range(first, first + per_rank))


def _few_experts(number: Number, experts: int, tokens: list[int]) -> Candidates:
    step = number(1, 3)
    return 1, list(range(number(0, experts - 1), experts, step))


def _top_1(number: Number, experts: int, tokens: list[int]) -> Candidates:
    return 1, list(range(experts))


def _all_experts(number: Number, experts: int, tokens: list[int]) -> Candidates:
    return experts, list(range(experts))


def _empty_ranks(number: Number, experts: int, tokens: list[int]) -> Candidates:
    for rank in range(len(tokens)):
        if number(0, 1):
            tokens[rank] = 0
    return _any(number, experts, tokens)


def _one_token(number: Number, experts: int, tokens: list[int]) -> Candidates:
    """Candidates of the only token in the whole group."""
    tokens[:] = [0] * len(tokens)
    tokens[number(0, len(tokens) - 1)] = 1
    return _any(number, experts, tokens)


def _no_tokens(number: Number, experts: int, tokens: list[int]) -> Candidates:
    tokens[:] = [0] * len(tokens)
    return _any(number, experts, tokens)


def _crowded(number: Number, experts: int, tokens: list[int]) -> Candidates:
    """Candidates with most tokens on one rank."""
    tokens[number(0, len(tokens) - 1)] = 4 * TOKENS
    return _any(number, experts, tokens)


KINDS: dict[str, Callable[[Number, int, list[int]], Candidates]] = {
    "any": _any,
    "all tokens to one expert": _one_expert,
    "all tokens to one rank": _one_rank,
    "few experts": _few_experts,
    "top-1": _top_1,
    "K = E": _all_experts,
    "ranks without tokens": _empty_ranks,
    "one token": _one_token,
    "no tokens": _no_tokens,
    "one rank with most tokens": _crowded,
}
