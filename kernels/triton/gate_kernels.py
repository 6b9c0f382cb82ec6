"""Choice of experts with what is summed over tokens for the balance losses, and the way back to the logits.

Among equal scores the lower number is chosen first. A score that is no number counts as the largest, so that every
token has K distinct experts whatever the scores are.
"""

# mypy: ignore-errors
# Kernels are in Triton's language, not in Python: their arguments have no types to check.
from __future__ import annotations

from ..launch import load_triton

triton, tl = load_triton()

CLOSED = tl.constexpr(float("-inf"))
LEAST = tl.constexpr(-1e38)  # of a candidate: two of them add up to a finite number
EPSILON = tl.constexpr(1e-20)  # of the sum of a token's weights


@triton.jit
def _scores(logits, row, inside, expert, there, experts, softmax: tl.constexpr):
    """Affinities `[rows, columns]` of the rows' tokens to `expert` `[columns]`; zero where no expert is there."""
    at = row.to(tl.int64)[:, None] * experts + expert[None, :]
    value = tl.load(logits + at, mask=inside[:, None] & there[None, :], other=0.0)
    if softmax:
        value = tl.where(there[None, :], value, CLOSED)
        value = tl.exp(value - tl.max(value, axis=1)[:, None])
        value = value / tl.sum(value, axis=1)[:, None]
    else:
        value = 1.0 / (1.0 + tl.exp(-value))
    return tl.where(there[None, :], value, 0.0)


@triton.jit
def _candidates(scores, there):
    """Scores to choose by, all of them comparable; closed where no expert is there."""
    comparable = tl.where(scores == scores, tl.maximum(scores, LEAST), float("inf"))
    return tl.where(there[None, :], comparable, CLOSED)


@triton.jit
def _opened(grouped, groups: tl.constexpr, open_groups: tl.constexpr, paired: tl.constexpr):
    """Candidates `[rows, groups, members]` with all but the best groups closed: by their two best, or by their best."""
    rows: tl.constexpr = grouped.shape[0]
    across: tl.constexpr = grouped.shape[1]
    members: tl.constexpr = grouped.shape[2]
    worth, best = tl.max(grouped, axis=2, return_indices=True)
    if paired:
        member = tl.arange(0, members)[None, None, :]
        worth = worth + tl.max(tl.where(member == best[:, :, None], CLOSED, grouped), axis=2)
    group = tl.arange(0, across)[None, :]
    worth = tl.where(group < groups, worth, CLOSED)
    opened = tl.zeros([rows, across], tl.int32)
    for _ in tl.static_range(open_groups):
        best = tl.argmax(worth, axis=1)
        hit = group == best[:, None]
        opened = tl.where(hit, 1, opened)
        worth = tl.where(hit, CLOSED, worth)
    return tl.where(opened[:, :, None] > 0, grouped, CLOSED)


@triton.jit
def _choose(left, scores, column, place, top_k: tl.constexpr):
    """The best columns of the candidates `left` `[rows, columns]`, one after the other: marks int32 of that shape, and
    the columns and their scores at places `[1, top_block]`."""
    rows: tl.constexpr = left.shape[0]
    top_block: tl.constexpr = place.shape[1]
    chosen = tl.zeros_like(left).to(tl.int32)
    gates = tl.zeros([rows, top_block], tl.float32)
    names = tl.zeros([rows, top_block], tl.int32)
    for k in tl.static_range(top_k):
        best = tl.argmax(left, axis=1)
        hit = column[None, :] == best[:, None]
        left = tl.where(hit, CLOSED, left)
        chosen = tl.where(hit, 1, chosen)
        gates = tl.where(place == k, tl.sum(tl.where(hit, scores, 0.0), axis=1)[:, None], gates)
        names = tl.where(place == k, best[:, None], names)
    return chosen, gates, names


@triton.jit
def gate(
    logits,
    bias,
    ids,
    weights,
    shares,
    hits,
    reached,
    length,
    parts,
    tiles,
    experts,
    factor,
    top_k: tl.constexpr,
    top_block: tl.constexpr,
    groups: tl.constexpr,
    open_groups: tl.constexpr,
    members: tl.constexpr,
    groups_block: tl.constexpr,
    members_block: tl.constexpr,
    softmax: tl.constexpr,
    biased: tl.constexpr,
    paired: tl.constexpr,
    apart: tl.constexpr,
    normalise: tl.constexpr,
    block: tl.constexpr,
):
    """Choose the experts of `tiles * block` tokens of a sequence per program, and sum over these tokens.

    `shares` `[., parts, experts]` FP32 sums the affinities; `hits` int32 `[., parts, kinds, experts]` counts the tokens
    sent to each expert, and with `apart` those whose best scores without `bias` are the expert's; `reached` int32
    `[., parts, groups]` counts the tokens sent to each group.
    """
    sequence, part = tl.program_id(0) // parts, tl.program_id(0) % parts
    columns: tl.constexpr = groups_block * members_block
    kinds: tl.constexpr = 2 if apart else 1
    column = tl.arange(0, columns)
    expert = column // members_block * members + column % members_block
    there = (column // members_block < groups) & (column % members_block < members)
    place = tl.arange(0, top_block)[None, :]
    share = tl.zeros([columns], tl.float32)
    sent = tl.zeros([columns], tl.int32)
    counted = tl.zeros([columns], tl.int32)
    of_groups = tl.zeros([groups_block], tl.int32)
    for tile in range(tiles):
        position = (part * tiles + tile) * block + tl.arange(0, block)
        inside = position < length
        row = sequence * length + position
        scores = _scores(logits, row, inside, expert, there, experts, softmax)
        affinity = scores
        if not softmax:
            affinity = scores / tl.sum(scores, axis=1)[:, None]
        share += tl.sum(tl.where(inside[:, None], affinity, 0.0), axis=0)

        order = scores
        if biased:
            order = scores + tl.load(bias + expert, mask=there, other=0.0)[None, :]
        left = _candidates(order, there)
        if open_groups > 0:
            grouped = tl.reshape(left, [block, groups_block, members_block])
            left = tl.reshape(_opened(grouped, groups, open_groups, paired), [block, columns])
        chosen, gates, names = _choose(left, scores, column, place, top_k)
        if normalise:
            gates = gates / (tl.sum(gates, axis=1)[:, None] + EPSILON)
        at = row.to(tl.int64)[:, None] * top_k + place
        stored = inside[:, None] & (place < top_k)
        tl.store(weights + at, gates * factor, mask=stored)
        tl.store(ids + at, (names // members_block * members + names % members_block).to(tl.int64), mask=stored)
        chosen = tl.where(inside[:, None], chosen, 0)
        sent += tl.sum(chosen, axis=0)
        if groups > 1:
            there_too = tl.max(tl.reshape(chosen, [block, groups_block, members_block]), axis=2)
            of_groups += tl.sum(there_too, axis=0)
        if apart:
            chosen, _, _ = _choose(_candidates(scores, there), scores, column, place, top_k)
            counted += tl.sum(tl.where(inside[:, None], chosen, 0), axis=0)
    of_part = sequence * parts + part
    tl.store(shares + of_part * experts + expert, share, mask=there)
    tl.store(hits + of_part * kinds * experts + expert, sent, mask=there)
    if apart:
        tl.store(hits + (of_part * kinds + 1) * experts + expert, counted, mask=there)
    group = tl.arange(0, groups_block)
    tl.store(reached + of_part * groups + group, of_groups, mask=group < groups)


@triton.jit
def balance(
    shares,
    hits,
    reached,
    valid,
    counts,
    losses,
    pulls,
    sequences,
    parts,
    length,
    experts,
    load_factor,
    reach_factor,
    kinds: tl.constexpr,
    groups: tl.constexpr,
    members: tl.constexpr,
    groups_block: tl.constexpr,
    members_block: tl.constexpr,
    block: tl.constexpr,
):
    """Add up the sums of `gate`, in one program: token counts, the three losses, and what the losses pull on.

    `counts` int64 `[experts + 1]` ends with 0. `pulls` `[kinds of losses, sequences, experts]` FP32 are the losses'
    gradients for a token's affinities: the same for all tokens of a sequence.
    """
    columns: tl.constexpr = groups_block * members_block
    column = tl.arange(0, columns)
    expert = column // members_block * members + column % members_block
    there = (column // members_block < groups) & (column % members_block < members)
    group = tl.arange(0, groups_block)
    of_all = tl.zeros([columns], tl.int64)
    first = tl.zeros([columns], tl.float32)
    second = tl.zeros([groups_block], tl.float32)
    third = tl.zeros([groups_block], tl.float32)
    for sequence in range(sequences):
        share = tl.zeros([columns], tl.float32)
        sent = tl.zeros([columns], tl.int32)
        counted = tl.zeros([columns], tl.int32)
        of_groups = tl.zeros([groups_block], tl.int32)
        for start in range(0, parts, block):
            part = start + tl.arange(0, block)
            inside = (part < parts)[:, None]
            at = (sequence * parts + part)[:, None]
            mask = inside & there[None, :]
            share += tl.sum(tl.load(shares + at * experts + expert[None, :], mask=mask, other=0.0), axis=0)
            sent += tl.sum(tl.load(hits + at * kinds * experts + expert[None, :], mask=mask, other=0), axis=0)
            if kinds > 1:
                more = hits + (at * kinds + 1) * experts + expert[None, :]
                counted += tl.sum(tl.load(more, mask=mask, other=0), axis=0)
            mask = inside & (group < groups)[None, :]
            of_groups += tl.sum(tl.load(reached + at * groups + group[None, :], mask=mask, other=0), axis=0)
        if kinds == 1:
            counted = sent
        holds = tl.load(valid + sequence).to(tl.int32)
        of_all += (sent * holds).to(tl.int64)
        share = share / length
        load = counted.to(tl.float32) * load_factor * holds
        first += load * share
        tl.store(pulls + sequence * experts + expert, load / length, mask=there)
        if groups > 1:
            shares_of = tl.sum(tl.reshape(share, [groups_block, members_block]), axis=1)
            loads_of = tl.sum(tl.reshape(load, [groups_block, members_block]), axis=1) / members
            reach = of_groups.to(tl.float32) / length * reach_factor * holds
            second += loads_of * shares_of
            third += reach * shares_of
            wide = tl.zeros([groups_block, members_block], tl.float32)
            spread = tl.reshape((loads_of / length)[:, None] + wide, [columns])
            tl.store(pulls + (sequences + sequence) * experts + expert, spread, mask=there)
            spread = tl.reshape((reach / length)[:, None] + wide, [columns])
            tl.store(pulls + (2 * sequences + sequence) * experts + expert, spread, mask=there)
    tl.store(counts + expert, of_all, mask=there)
    tl.store(counts + experts + tl.arange(0, 1), tl.zeros([1], tl.int64))
    tl.store(losses, tl.sum(first, axis=0))
    tl.store(losses + 1, tl.sum(second, axis=0))
    tl.store(losses + 2, tl.sum(third, axis=0))


@triton.jit(do_not_specialize=["rows"])
def gate_backward(
    grad_weights,
    of_experts,
    of_devices,
    of_groups,
    logits,
    ids,
    pulls,
    out,
    rows,
    sequences,
    length,
    experts,
    factor,
    top_k: tl.constexpr,
    softmax: tl.constexpr,
    normalise: tl.constexpr,
    weighted: tl.constexpr,
    by_experts: tl.constexpr,
    by_devices: tl.constexpr,
    by_groups: tl.constexpr,
    halves: tl.constexpr,
    columns: tl.constexpr,
    block: tl.constexpr,
):
    """Gradient of the logits of `block` tokens per program, from that of the weights and of each loss, a scalar.

    With `halves` `out` is BF16 `[rows, 2 experts]`: the gradient rounded, and the rest of it.
    """
    row = tl.program_id(0) * block + tl.arange(0, block)
    inside = row < rows
    expert = tl.arange(0, columns)
    there = expert < experts
    mask = inside[:, None] & there[None, :]
    scores = _scores(logits, row, inside, expert, there, experts, softmax)
    at = (row // length * experts)[:, None] + expert[None, :]
    pull = tl.zeros([block, columns], tl.float32)
    if by_experts:
        pull += tl.load(of_experts) * tl.load(pulls + at, mask=mask, other=0.0)
    if by_devices:
        pull += tl.load(of_devices) * tl.load(pulls + sequences * experts + at, mask=mask, other=0.0)
    if by_groups:
        pull += tl.load(of_groups) * tl.load(pulls + 2 * sequences * experts + at, mask=mask, other=0.0)
    if not softmax:
        total = tl.sum(scores, axis=1)[:, None]
        pull = (pull - tl.sum(pull * scores, axis=1)[:, None] / total) / total
    if weighted:
        gradient = tl.zeros([block, columns], tl.float32)
        chosen = tl.zeros([block, columns], tl.int32)
        for k in tl.static_range(top_k):
            name = tl.load(ids + row.to(tl.int64) * top_k + k, mask=inside, other=-1)
            given = tl.load(grad_weights + row.to(tl.int64) * top_k + k, mask=inside, other=0.0)
            hit = expert[None, :] == name[:, None]
            gradient = tl.where(hit, given[:, None], gradient)
            chosen = tl.where(hit, 1, chosen)
        if normalise:
            total = tl.sum(tl.where(chosen > 0, scores, 0.0), axis=1)[:, None] + EPSILON
            along = tl.sum(gradient * scores, axis=1)[:, None] / total
            gradient = (gradient - along) / total
        pull += tl.where(chosen > 0, gradient * factor, 0.0)
    along = tl.sum(pull * scores, axis=1)[:, None]
    pull = scores * (pull - along) if softmax else pull * scores * (1.0 - scores)
    if halves:
        into = out + row.to(tl.int64)[:, None] * (2 * experts) + expert[None, :]
        high = pull.to(tl.bfloat16)
        tl.store(into, high, mask=mask)
        tl.store(into + experts, (pull - high.to(tl.float32)).to(tl.bfloat16), mask=mask)
    else:
        tl.store(out + row.to(tl.int64)[:, None] * experts + expert[None, :], pull, mask=mask)
