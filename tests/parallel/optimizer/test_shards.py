"""Packing of gradients and unpacking of weights, against loops over single rows."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from counterflow.local_parameter import LocalParameter
from counterflow.parallel.optimizer.shards import Plan, plan_buckets


@st.composite
def plans(draw: st.DrawFn) -> Plan:
    """A bucket of one to four parameters: any rows, columns and stacked tensors, also one dimension, over any ranks."""
    ranks, parameters = draw(st.integers(1, 9)), []
    for index in range(draw(st.integers(1, 4))):
        stacked, rows, columns = draw(st.integers(1, 4)), draw(st.integers(1, 40)), draw(st.integers(1, 5))
        one_dimension = draw(st.booleans())
        shape = (rows,) if one_dimension else (stacked, rows, columns)
        names = tuple(f"{index}.{number}" for number in range(1 if one_dimension else stacked))
        parameters.append(LocalParameter(nn.Parameter(torch.zeros(shape)), names))
    decayed = [item for item in parameters if len(item.shape) > 1]
    (plan,) = plan_buckets(decayed or parameters, lambda _: ranks, 10**9)
    return plan


def expected_shards(plan: Plan, flat: Tensor) -> Tensor:
    """Shards of the bucket `flat`, written row by row: row r of a tensor is on rank r // rows_per_rank."""
    shards = torch.zeros(plan.ranks, plan.shard_numel)
    for slot in plan.slots:
        tensors = flat[slot.start : slot.start + slot.numel].view(len(slot.local.names), slot.rows, slot.columns)
        per_rank = -(-slot.rows // plan.ranks)
        for number, tensor in enumerate(tensors):
            for row, values in enumerate(tensor):
                start = slot.shard_start + (number * per_rank + row % per_rank) * slot.columns
                shards[row // per_rank, start : start + slot.columns] = values
    return shards


@given(plans())
def test_any_bucket_is_packed_row_by_row_with_zeros_between(plan: Plan) -> None:
    flat = torch.arange(1.0, plan.numel + 1)
    shards = torch.full((plan.ranks, plan.shard_numel), torch.nan)
    plan.to_shards(flat, shards)
    assert torch.equal(shards, expected_shards(plan, flat))


@given(plans())
def test_any_bucket_is_unpacked_into_its_parameters_and_no_padding_is_read(plan: Plan) -> None:
    flat = torch.arange(1.0, plan.numel + 1)
    shards = expected_shards(plan, flat)
    shards[shards == 0] = torch.nan
    versions = [slot.local.parameter._version for slot in plan.slots]
    with torch.no_grad():
        plan.from_shards(shards)
    for slot in plan.slots:
        assert torch.equal(slot.local.parameter.flatten(), flat[slot.start : slot.start + slot.numel])
    assert all(slot.local.parameter._version > seen for slot, seen in zip(plan.slots, versions, strict=True))


@pytest.mark.parametrize("rows", [512, 600])
def test_a_parameter_takes_a_few_copies_however_many_ranks_share_it(rows: int) -> None:
    """256 ranks own two or three rows each; with 600 rows the last 56 ranks own none."""
    (plan,) = plan_buckets([LocalParameter(nn.Parameter(torch.zeros(rows, 2)), ("one",))], lambda _: 256, 10**9)
    flat, shards = torch.zeros(plan.numel), torch.empty(plan.ranks, plan.shard_numel)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as seen, torch.no_grad():
        plan.to_shards(flat, shards)
        plan.from_shards(shards)
    moved = [event for event in seen.events() if event.name in ("aten::copy_", "aten::zero_")]
    assert len(moved) <= 6
