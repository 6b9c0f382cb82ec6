"""Search for DeepEP, reasons why it cannot serve a run, and the rules that its stand-in enforces."""

from __future__ import annotations

import ast
import inspect
import os
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist

import counterflow
from counterflow.comm.deepep import library as libraries
from counterflow.comm.deepep.buffers import open_buffer
from counterflow.comm.deepep.library import Generation, Job, deepep_available, deepep_faults, find_library, read_library
from counterflow.settings import UsageError
from counterflow.tests.comm.deepep_parts import RECORDED, Settings
from counterflow.tests.comm.deepep_stand_in import stand_in
from counterflow.tests.comm.record_deepep_signatures import RELEASES
from counterflow.tests.fp8.record_te_signatures import parse
from counterflow.tests.pool import Pool, Worker

PACKAGE = Path(counterflow.__file__).parent
NEW, OLD = stand_in(Settings()), stand_in(Settings(release="1.2.1"))
V3 = Job(nodes=[rank // 8 for rank in range(64)], hidden=7168, top_k=8, tokens=4096, fp8=True)


# Installation


def test_without_it_both_generations_are_named_with_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "deep_ep", None)
    assert not deepep_available()
    with pytest.raises(UsageError) as fault:
        find_library()
    message = str(fault.value)
    for part in (
        "is not installed",
        "ElasticBuffer",
        "deep_ep.Buffer",
        "github.com/deepseek-ai",
        "two-hop needs neither",
    ):
        assert part in message
    assert deepep_faults(V3, "cuda") == [message]


@pytest.mark.parametrize("trouble", ["raise AssertionError('Invalid NCCL versions')", "import a_library_of_its_own"])
def test_a_failed_import_is_reported_with_its_reason(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, trouble: str
) -> None:
    (tmp_path / "deep_ep.py").write_text(trouble, encoding="utf-8")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "deep_ep", raising=False)
    assert not deepep_available()
    with pytest.raises(UsageError, match=r"cannot be imported: (Invalid NCCL versions|No module named 'a_library)"):
        find_library()


def test_an_importable_library_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "deep_ep", NEW.module)
    assert deepep_available() and find_library() == NEW


def test_the_newer_generation_is_preferred_and_one_that_is_missing_refused() -> None:
    assert (NEW.generations, NEW.version, NEW.choose()) == (("elastic", "legacy"), "2.1.0", "elastic")
    assert NEW.choose("legacy") == "legacy"
    assert (OLD.generations, OLD.choose()) == (("legacy",), "legacy")
    with pytest.raises(UsageError, match=r"has no ElasticBuffer, only Buffer; comm\.dispatcher two-hop"):
        OLD.choose("elastic")
    with pytest.raises(UsageError, match="neither ElasticBuffer nor Buffer"):
        read_library(os)


class _WithTimeouts:
    def __init__(
        self, group: Any, num_gpu_timeout_secs: int = 100, num_cpu_timeout_secs: int = 300, **rest: Any
    ) -> None:
        self.seconds = num_gpu_timeout_secs, num_cpu_timeout_secs


class _WithoutTimeouts:
    def __init__(
        self,
        group: Any,
        num_max_tokens_per_rank: int = 0,
        hidden: int = 0,
        num_topk: int = 0,
        use_fp8_dispatch: bool = False,
        explicitly_destroy: bool = False,
    ) -> None:
        self.seconds = None


@pytest.mark.parametrize(("kind", "expected"), [(_WithTimeouts, (1801, 1801)), (_WithoutTimeouts, None)])
def test_its_kernels_wait_as_long_as_collectives_do(kind: Any, expected: Any) -> None:
    made: list[Any] = []

    class Recorded(kind):  # type: ignore[misc]
        def __init__(self, *arguments: Any, **named: Any) -> None:
            super().__init__(*arguments, **named)
            made.append(self)

    Recorded.__init__.__signature__ = inspect.signature(kind.__init__)  # type: ignore[attr-defined]
    group: Any = mock.Mock(size=lambda: 64)
    open_buffer(read_library(SimpleNamespace(ElasticBuffer=Recorded)), group, replace(V3, timeout=1800.5))
    assert made[0].seconds == expected


# Faults


@pytest.mark.parametrize("generation", [None, "legacy", "elastic"])
def test_v3s_layout_has_no_fault(generation: Generation | None) -> None:
    assert deepep_faults(V3, "cuda", generation, NEW) == []
    assert deepep_faults(replace(V3, nodes=[0] * 8, fp8=False), "cuda", generation, NEW) == []


FAULTS: list[tuple[dict[str, Any], Generation, str]] = [
    (
        {"dtype": torch.float32},
        "elastic",
        "carries BF16 and FP8, and activations are torch.float32; precision.recipe bf16",
    ),
    ({"sms": 23}, "elastic", "an even number of SMs, not 23; 22 works"),
    ({"sms": 0}, "elastic", "an even number of SMs, not 0; 2 works"),
    ({"top_k": 33}, "elastic", "to at most 32 experts, and top-k is 33"),
    ({"nodes": [0]}, "elastic", "one rank sends nothing; comm.dispatcher flat"),
    ({"hidden": 640}, "elastic", "a multiple of 256, not 640 \\(nearest: 512 or 768\\)"),
    ({"hidden": 640}, "legacy", "a multiple of 256, not 640 \\(nearest: 512 or 768\\)"),
    ({"hidden": 576, "nodes": [0] * 8}, "legacy", "a multiple of 128, not 576 \\(nearest: 512 or 640\\)"),
    (
        {"nodes": [0] * 8 + [1] * 4},
        "elastic",
        r"equally many ranks of an expert parallel group on every node, not \[4, 8\]",
    ),
    (
        {"nodes": [0] * 4 + [1] * 4},
        "legacy",
        "Buffer supports nodes of 8 GPUs, and the expert parallel group has 4 on each",
    ),
    (
        {"nodes": [0] * 3},
        "legacy",
        r"of 3 ranks; parallel.ep can be one of \[2, 4, 8, 16, 24, 32, 48, 64, 96, 128, 144, 160\]",
    ),
]


@pytest.mark.parametrize(("change", "generation", "message"), FAULTS, ids=lambda value: str(value)[:30])
def test_a_fault_is_reported_with_what_works(change: dict[str, Any], generation: Generation, message: str) -> None:
    faults = deepep_faults(replace(V3, **change), "cuda", generation, NEW)
    assert len(faults) >= 1
    with pytest.raises(UsageError, match=message):
        raise UsageError("\n".join(faults))


def test_limits_of_the_other_generation_are_no_faults() -> None:
    assert deepep_faults(replace(V3, nodes=[0] * 4 + [1] * 4), "cuda", "elastic", NEW) == []
    assert deepep_faults(replace(V3, nodes=[0] * 3), "cuda", "elastic", NEW) == []
    assert deepep_faults(replace(V3, hidden=640, nodes=[0] * 8), "cuda", "legacy", NEW) == []


def test_group_sizes_come_from_the_installed_release() -> None:
    ep48 = replace(V3, nodes=[rank // 8 for rank in range(48)])
    assert deepep_faults(ep48, "cuda", "legacy", NEW) == []
    (fault,) = deepep_faults(ep48, "cuda", "legacy", OLD)
    assert "[2, 4, 8, 16, 24, 32, 64, 128, 144, 160]" in fault


def test_all_faults_are_reported_at_once_and_without_a_gpu_nothing_is_imported(monkeypatch: pytest.MonkeyPatch) -> None:
    def imported(name: str) -> Any:
        raise AssertionError(f"{name} was imported")

    monkeypatch.setattr(libraries.importlib, "import_module", imported)
    faults = deepep_faults(replace(V3, sms=3, dtype=torch.float32), "cpu")
    assert len(faults) == 3 and "this run's device is cpu; comm.dispatcher two-hop needs neither" in faults[0]


# Records


def test_calls_are_checked_against_the_releases_that_are_named() -> None:
    assert tuple(RECORDED) == libraries.CHECKED == tuple(RELEASES)
    assert {release: record["commit"] for release, record in RECORDED.items()} == {
        release: source[0] for release, source in RELEASES.items()
    }


def test_every_name_we_use_was_recorded() -> None:
    tree = ast.parse((PACKAGE / "comm/deepep/buffers.py").read_text(encoding="utf-8"))
    used: dict[str, set[str]] = {}
    for definition in tree.body:
        if isinstance(definition, ast.ClassDef):
            for node in ast.walk(definition):
                if isinstance(node, ast.Attribute) and ast.unparse(node.value) in ("self._buffer", "kind"):
                    used.setdefault(definition.name, set()).add(node.attr)
    assert set(used) == {"LegacyBuffer", "ElasticBuffer"}
    for release in RECORDED.values():
        known = set(release["callables"])
        assert {f"Buffer.{name}" for name in used["LegacyBuffer"]} <= known
    assert {f"ElasticBuffer.{name}" for name in used["ElasticBuffer"]} <= set(RECORDED["2.1.0"]["callables"])


@pytest.mark.parametrize("name", [name for name in RECORDED["2.1.0"]["callables"] if "get_" not in name[:11]])
def test_the_stand_in_has_the_recorded_signatures(name: str) -> None:
    owner, method = name.split(".")
    if owner == "EventOverlap" or method == "set_num_sms" or method.endswith("config"):
        return
    parameters = inspect.signature(getattr(getattr(NEW.module, owner), method)).parameters
    recorded_ones = parse(RECORDED["2.1.0"]["callables"][name]).parameters
    plain = [parameter for parameter in parameters.values() if parameter.name != "self"]
    assert [parameter.name for parameter in plain] == list(recorded_ones)
    for parameter, recorded in zip(plain, recorded_ones.values(), strict=True):
        if recorded.default is inspect.Parameter.empty:
            assert parameter.default is recorded.default
        else:
            assert repr(parameter.default) == recorded.default


# Rules


Calls = Callable[[Any, Any], object]

T, H, K, E = 6, 256, 2, 4


def _rows(**change: Any) -> torch.Tensor:
    return torch.zeros(change.get("tokens", T), change.get("width", H), dtype=change.get("dtype", torch.bfloat16))


def _ids(dtype: torch.dtype = torch.int64) -> torch.Tensor:
    return torch.tensor([[0, 3]] * T, dtype=dtype)


def _weights(dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.ones(T, K, dtype=dtype)


def _legacy(buffer: Any, x: Any = None, **change: Any) -> Any:
    names = ("num_tokens_per_rank", "num_tokens_per_rdma_rank", "num_tokens_per_expert", "is_token_in_rank")
    layout = dict(zip(names, buffer.get_dispatch_layout(_ids(), E)[:-1], strict=True))
    named = {**layout, "topk_idx": _ids(), "topk_weights": _weights(), **change}
    return buffer.dispatch(_rows() if x is None else x, **named)


def _elastic(buffer: Any, x: Any = None, **change: Any) -> Any:
    named = {"topk_idx": _ids(), "topk_weights": _weights(), "num_experts": E, "num_sms": 4, **change}
    return buffer.dispatch(_rows() if x is None else x, **named)


def _changed_while_read(buffer: Any) -> None:
    x = _rows()
    event = _legacy(buffer, x, async_finish=True)[-1]
    x.add_(1)
    event.current_stream_wait()


def _released_twice(buffer: Any) -> None:
    event = _legacy(buffer, async_finish=True)[-1]
    event.event = None  # the effect of `release_handle`, which version 1 does not have
    event.current_stream_wait()


def _other_sms(buffer: Any) -> None:
    handle = _legacy(buffer)[4]
    type(buffer).set_num_sms(18)
    try:
        buffer.combine(_legacy(buffer)[0], handle)
    finally:
        type(buffer).set_num_sms(20)


FP8 = torch.float8_e4m3fn
LEGACY_RULES: dict[str, Callable[[Any], object]] = {
    "rows of torch.float32": lambda b: _legacy(b, _rows(dtype=torch.float32)),
    "scales are FP32": lambda b: _legacy(b, (_rows(dtype=FP8), torch.ones(T, 2, dtype=torch.bfloat16))),
    "one scale per 128 values": lambda b: _legacy(b, (_rows(dtype=FP8), torch.ones(T, 4))),
    "contiguous int64": lambda b: b.get_dispatch_layout(_ids(torch.int32), E),
    "contiguous FP32": lambda b: _legacy(b, topk_weights=_weights(torch.bfloat16)),
    "no expert twice": lambda b: b.get_dispatch_layout(torch.zeros(T, K, dtype=torch.int64), E),
    "experts and weights": lambda b: _legacy(b, topk_weights=None),
    "the ids' layout": lambda b: _legacy(b, topk_idx=_ids() + torch.tensor([1, 0])),
    "with a handle neither": lambda b: b.dispatch(_rows(), handle=_legacy(b)[4], topk_weights=_weights()),
    "as many tokens as in the first": lambda b: b.dispatch(_rows(tokens=T + 1), handle=_legacy(b)[4]),
    "as many rows are sent back": lambda b: b.combine(_rows(tokens=1), _legacy(b)[4]),
    "the SM count must be even": lambda b: type(b).set_num_sms(21),
    "the SMs of the dispatch": _other_sms,
    "memory of its stream needs both": lambda b: _legacy(b, allocate_on_comm_stream=True),
    "an event that is missing": lambda b: _legacy(b)[-1].current_stream_wait(),
    "or was released": _released_twice,
    "an input changed": _changed_while_read,
    "memory of at least the hinted size": lambda b: _legacy(type(b)(b.group, explicitly_destroy=True)),
    "`explicitly_destroy` must": lambda b: type(b)(b.group).destroy(),
}
ELASTIC_RULES: dict[str, Callable[[Any], object]] = {
    "rows of torch.float32": lambda b: _elastic(b, _rows(dtype=torch.float32)),
    "rows of a multiple of 256": lambda b: _elastic(b, _rows(width=128)),
    "its estimate of SMs": lambda b: _elastic(b, num_sms=0),
    "no more tokens than": lambda b: _elastic(b, _rows(tokens=20)),
    "no larger than it was made for": lambda b: _elastic(b, _rows(width=512)),
    "with a handle neither": lambda b: b.dispatch(_rows(), handle=_elastic(b)[3], topk_idx=_ids(), num_sms=4),
    "there are no counts to wait for": lambda b: b.dispatch(
        _rows(), handle=_elastic(b)[3], num_sms=4, do_cpu_sync=True
    ),
    "between nodes, the SMs": lambda b: b.dispatch(_rows(), handle=_elastic(b)[3], num_sms=6),
    "size of row of the first": lambda b: b.dispatch(
        (_rows(dtype=FP8), torch.ones(T, 2)), handle=_elastic(b)[3], num_sms=4
    ),
    "after an event": lambda b: _elastic(b, previous_event=object()),
    "sums of torch.float16": lambda b: b.combine(_rows(dtype=torch.float16), _elastic(b)[3]),
    "an event that is missing": lambda b: _elastic(b)[-1].current_stream_wait(),
}


def test_the_stand_in_enforces_the_rules(pool: Pool) -> None:
    """Rules, broken one by one on two ranks of two nodes, so that the rules between nodes apply."""

    def broken(worker: Worker) -> list[str]:
        library: Any = stand_in(Settings(peers=1)).module
        configs = library.Buffer.get_dispatch_config(2), H * 2, 2
        memory = configs[0].get_nvl_buffer_size_hint(*configs[1:]), configs[0].get_rdma_buffer_size_hint(*configs[1:])
        legacy = library.Buffer(dist.group.WORLD, *memory, explicitly_destroy=True)
        elastic = library.ElasticBuffer(dist.group.WORLD, num_max_tokens_per_rank=8, hidden=H, num_topk=K)
        assert _legacy(legacy)[0].shape == _elastic(elastic)[0].shape == (2 * T, H), "a call that breaks no rule works"
        unenforced = []
        for buffer, rules in ((legacy, LEGACY_RULES), (elastic, ELASTIC_RULES)):
            for rule, call in rules.items():
                try:
                    call(buffer)
                except AssertionError as error:
                    if rule not in str(error):
                        unenforced.append(f"{rule}: {error}")
                else:
                    unenforced.append(rule)
        with pytest.raises(TypeError, match="topk_ids"):
            elastic.dispatch(_rows(), topk_ids=_ids(), num_sms=4)
        with pytest.raises(TypeError, match="enable_shrink"):  # a parameter of the newer release only
            library.Buffer(dist.group.WORLD, enable_shrink=True)
        return unenforced

    assert pool.run(broken, 2) == [[], []]


def test_launched_results_are_garbage_until_waited_for(pool: Pool) -> None:
    def early(worker: Worker) -> tuple[bool, bool, bool]:
        library: Any = stand_in(Settings(peers=2)).module
        elastic = library.ElasticBuffer(dist.group.WORLD, num_max_tokens_per_rank=8, hidden=H, num_topk=K)
        received, _, _, handle, event = _elastic(elastic, async_with_compute_stream=True)
        counts = handle.num_recv_tokens_per_expert_list == [2 * T, 0] if worker.rank == 0 else True
        before = bool(received.isnan().all())
        event.current_stream_wait()
        return counts, before, bool((received == 0).all())

    assert pool.run(early, 2) == [(True, True, True)] * 2
