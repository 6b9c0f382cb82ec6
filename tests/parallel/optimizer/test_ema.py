"""The moving average of the weights, against the closed formula in FP64 over the weights of every step."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh

from counterflow.local_parameter import LocalParameter
from counterflow.parallel.config import OptimConfig
from counterflow.parallel.groups import Groups
from counterflow.parallel.layout import Layout
from counterflow.parallel.optimizer import ema as ema_module
from counterflow.parallel.optimizer.ema import DeviceCopy, Ema, share_of_newest
from counterflow.parallel.optimizer.sharded import ShardedOptimizer
from counterflow.tests.gather import gathered
from counterflow.tests.pool import Pool, Worker

EXPERTS = 4
# Rows that 2 and 4 ranks do not divide, fewer rows than ranks, a single row, and one dimension.
DENSE = {"matrix": (7, 5), "few": (3, 4), "row": (1, 8), "gain": (6,)}
EXPERT = {"w1": (5, 4), "w2": (3, 5)}
SHAPES = DENSE | {f"experts.{e}.{w}": shape for e in range(EXPERTS) for w, shape in EXPERT.items()}
LAYOUTS = [(2, 1), (2, 2), (4, 2), (4, 4)]  # world size, ep
DECAY = 0.8
SLOW = 0.05  # seconds by which a copy or an update is delayed


def weighted_mean(values: Sequence[Tensor], decay: float) -> Tensor:
    """The formula in FP64."""
    powers = [decay ** (len(values) - 1 - i) for i in range(len(values))]
    return sum((p * v.double() for p, v in zip(powers, values, strict=True)), torch.zeros(())) / sum(powers)


def noise(name: str, step: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(sum(map(ord, name)) + 1000 * step)
    return torch.randn(SHAPES[name], generator=generator)


@pytest.mark.parametrize("background", [False, True], ids=["inline", "thread"])
@pytest.mark.parametrize("decay", [0.1, 0.9, 0.999])
def test_the_average_is_the_weighted_mean_of_the_weights_after_each_step(decay: float, background: bool) -> None:
    weights = [torch.full((4,), 7.0), torch.randn(5)]
    average = Ema(weights, decay, background)
    average.restart(updates=0)
    seen: list[list[Tensor]] = []
    for step in range(40):
        average.release()
        for number, weight in enumerate(weights):
            weight.copy_(torch.randn(weight.shape, generator=torch.Generator().manual_seed(10 * step + number)))
        average.update()
        seen.append([weight.clone() for weight in weights])
        for values, shard in zip(zip(*seen, strict=True), average.shards(), strict=True):
            torch.testing.assert_close(shard.double(), weighted_mean(values, decay), rtol=1e-5, atol=1e-6)
        if step == 0:  # the initial weights do not count
            assert all(map(torch.equal, average.shards(), weights))


def test_before_the_first_step_the_average_is_the_weights() -> None:
    weight = torch.randn(9)
    average = Ema([weight], 0.99)
    average.restart(updates=0)
    assert torch.equal(average.shards()[0], weight)
    assert average.shards()[0].data_ptr() != weight.data_ptr()


def test_weights_that_were_loaded_count_as_one_step() -> None:
    weight = torch.randn(9)
    loaded, average = weight.clone(), Ema([weight], 0.5)
    average.restart(updates=1)
    weight.normal_()
    average.update()
    torch.testing.assert_close(average.shards()[0].double(), weighted_mean([loaded, weight], 0.5))


def test_in_the_long_run_a_step_has_the_weight_that_the_decay_leaves() -> None:
    shares = [share_of_newest(0.9, updates) for updates in range(1, 400)]
    assert shares[:2] == [1.0, pytest.approx(1 / 1.9)]
    assert shares == sorted(shares, reverse=True)
    assert shares[-1] == pytest.approx(0.1, rel=1e-15)


# The race: an update that comes late must still read the weights of its own step.


def slow(function: Callable[..., Any]) -> Callable[..., Any]:
    def delayed(*args: Any) -> Any:
        time.sleep(SLOW)
        return function(*args)

    return delayed


def steps_in_quick_succession(average: Ema, weight: Tensor, steps: int = 6) -> Tensor:
    """The average after steps without any computation between them; the weight at step s is s everywhere."""
    average.restart(updates=0)
    for step in range(1, steps + 1):
        average.release()
        for row in weight:  # a step rewrites the weights piece by piece
            row.fill_(step)
        average.update()
    return average.shards()[0]


def expected_after(steps: int = 6) -> Tensor:
    return weighted_mean([torch.tensor(float(step)) for step in range(1, steps + 1)], DECAY)


def test_a_slow_update_never_reads_the_weights_of_the_next_step() -> None:
    weight = torch.zeros(16, 3)
    average = Ema([weight], DECAY, background=True)
    with mock.patch.object(average, "_average", slow(average._average)):
        started = time.monotonic()
        found = steps_in_quick_succession(average, weight)
        assert time.monotonic() - started > 5 * SLOW, "the updates should have been delayed"
    torch.testing.assert_close(found.double(), expected_after().expand(16, 3), rtol=1e-6, atol=0)


def test_without_release_the_race_is_lost_so_the_test_above_can_fail() -> None:
    weight = torch.zeros(16, 3)
    average = Ema([weight], DECAY, background=True)
    with (
        mock.patch.object(average, "_average", slow(average._average)),
        mock.patch.object(average, "release"),
    ):
        found = steps_in_quick_succession(average, weight)
    assert not torch.allclose(found.double(), expected_after().expand(16, 3), rtol=1e-2)


class LazyCopy:
    """A device that copies as late as the contract allows: when a writer is held back, or a thread waits."""

    def __init__(self, tensors: list[Tensor]) -> None:
        self.tensors, self.copies = tensors, [torch.full_like(tensor, torch.nan) for tensor in tensors]
        self.due = False
        self.calls: list[str] = []

    def start(self) -> None:
        self.calls.append("start")
        self.due = True

    def hold_back_writers(self) -> None:
        self.calls.append("hold back")
        self._copy()

    def wait(self) -> list[Tensor]:
        time.sleep(SLOW)  # the next step has begun by now
        self.calls.append("wait")
        self._copy()
        return self.copies

    def _copy(self) -> None:
        if self.due:
            for tensor, copy in zip(self.tensors, self.copies, strict=True):
                copy.copy_(tensor)
        self.due = False


def test_a_copy_that_the_device_delays_is_of_its_own_step() -> None:
    weight = torch.zeros(16, 3)
    average = Ema([weight], DECAY, background=True)
    average._copy = device = LazyCopy([weight])  # type: ignore[assignment]
    found = steps_in_quick_succession(average, weight)
    torch.testing.assert_close(found.double(), expected_after().expand(16, 3), rtol=1e-6, atol=0)
    # A copy is used before the next is started, and the step does not wait for the arithmetic.
    assert device.calls == ["hold back", "start", *["hold back", "wait", "start"] * 5, "wait"]


def test_the_copy_runs_between_two_steps_on_a_gpu() -> None:
    """Calls in order on stand-ins with the signatures of torch's classes, without a GPU."""
    current, side = (mock.create_autospec(torch.cuda.Stream, instance=True) for _ in range(2))
    event = mock.create_autospec(torch.cuda.Event, instance=True)
    cuda = mock.MagicMock()
    cuda.Stream.return_value, cuda.Event.return_value = side, event
    cuda.current_stream.return_value = current
    weight = torch.arange(6.0)
    with mock.patch.object(ema_module.torch, "cuda", cuda):
        log = mock.Mock()
        for name, stand_in in (("side", side), ("event", event), ("current", current), ("cuda", cuda)):
            log.attach_mock(stand_in, name)
        copy = DeviceCopy([weight])
        log.reset_mock()
        copy.start()
        copy.hold_back_writers()
        (arrived,) = copy.wait()
    assert torch.equal(arrived, weight)
    order = [call for call in log.mock_calls if "current_stream" not in call[0]]
    assert order == [
        mock.call.side.wait_stream(current),  # the copy begins after the update of the weights
        mock.call.cuda.stream(side),
        mock.call.cuda.stream().__enter__(),
        mock.call.event.record(side),
        mock.call.cuda.stream().__exit__(None, None, None),
        mock.call.current.wait_event(event),  # the next update of the weights begins after the copy
        mock.call.event.synchronize(),
    ]


def test_copies_of_a_gpu_are_one_pinned_block_of_just_their_size() -> None:
    cuda = mock.MagicMock()
    runtime = cuda.cudart.return_value
    weights = [torch.zeros(3, 5), torch.zeros(7)]
    with mock.patch.object(ema_module.torch, "cuda", cuda):
        copies = DeviceCopy(weights)
        copies.start()
        arrived = copies.wait()
    ((start, size, flags),) = (call.args for call in runtime.cudaHostRegister.mock_calls)
    assert size == (15 + 7) * 4 and flags == 0
    cuda.check_error.assert_called_once_with(runtime.cudaHostRegister.return_value)
    assert [copy.data_ptr() - start for copy in arrived] == [0, 15 * 4]
    assert all(torch.equal(copy, weight) for copy, weight in zip(arrived, weights, strict=True))
    runtime.cudaHostUnregister.assert_not_called()
    del copies
    runtime.cudaHostUnregister.assert_called_once_with(start)


def test_the_thread_of_a_gpus_average_works_on_that_gpu() -> None:
    """A new thread begins on GPU 0, where waiting for an event would make a context."""
    device = torch.device("cuda", 3)
    weight = mock.MagicMock(spec=Tensor, device=device, shape=torch.Size([4]))
    weight.numel.return_value = 4
    cuda = mock.MagicMock()
    entered: list[torch.device] = []
    cuda.set_device.side_effect = entered.append
    with mock.patch.object(ema_module.torch, "cuda", cuda):
        average = Ema([weight], DECAY)
        assert average._thread is not None
        average._thread.submit(lambda: None).result()
    assert entered == [device]


def test_an_error_in_the_thread_ends_the_next_step() -> None:
    average = Ema([torch.zeros(3)], DECAY, background=True)
    with mock.patch.object(average, "_average", side_effect=MemoryError("no room")):
        average.update()
        with pytest.raises(MemoryError, match="no room"):
            average.release()
    average.release()  # raised once


# The average in the sharded optimizer.


class Model:
    """The optimizer of a rank over the dense parameters and its own experts, stacked."""

    def __init__(self, worker: Worker, ep: int, dtype: torch.dtype, **keys: Any) -> None:
        groups = Groups.create(Layout(worker.world_size, 1, ep), "cpu")
        per_rank = EXPERTS // ep
        local = range(groups.coordinates.ep * per_rank, (groups.coordinates.ep + 1) * per_rank)
        self.parameters = [LocalParameter(nn.Parameter(torch.empty(s, dtype=dtype)), (n,)) for n, s in DENSE.items()]
        for w, shape in EXPERT.items():
            stack = nn.Parameter(torch.empty((per_rank, *shape), dtype=dtype))
            self.parameters.append(LocalParameter(stack, tuple(f"experts.{e}.{w}" for e in local), "edp"))
        few = {"ema_decay": DECAY, "moments": "fp32", "clip_norm": None, "bucket_mb": 60 * 4 / 2**20}
        config = OptimConfig.model_validate({**few, **keys})
        self.optimizer = ShardedOptimizer(self.parameters, groups, config)
        self.optimizer.initialise(lambda name, shape: noise(name))

    def step(self, number: int) -> None:
        self.optimizer.begin_step()
        groups = self.optimizer.groups
        for name, gradient in self.optimizer.gradients().items():
            replicas = dist.get_world_size(groups.edp if "experts" in name else groups.dp)
            gradient.copy_(noise(name, number).view_as(gradient) / replicas)  # powers of two: their sum is exact
        self.optimizer.step(0.1, self.optimizer.reduce_gradients())

    def published(self) -> dict[str, Tensor]:
        return {n: t.clone() for item in self.parameters for n, t in zip(item.names, item.tensors(), strict=True)}


def averaged_run(
    worker: Worker, ep: int, dtype: torch.dtype, background: bool, steps: int
) -> tuple[dict[str, Tensor], list[dict[str, Tensor]], dict[str, int]]:
    """The average, the master weights after every step, and the elements of the average that this rank holds."""
    model = Model(worker, ep, dtype)
    optimizer = model.optimizer
    if background:
        optimizer.ema = Ema([bucket.master for bucket in optimizer._buckets], DECAY, background)
        optimizer.ema._average = slow(optimizer.ema._average)  # type: ignore[method-assign]
    history = []
    for number in range(1, steps + 1):
        model.step(number)
        # From the shards themselves, because `state` waits for the average.
        masters = {n: t for bucket in optimizer._buckets for n, t in bucket.views(bucket.master)}
        history.append({name: gathered(tensor) for name, tensor in masters.items()})
    averages = optimizer.averages()
    held = {name: tensor.to_local().numel() for name, tensor in averages.items()}
    return {name: gathered(tensor) for name, tensor in averages.items()}, history, held


@pytest.mark.parametrize("background", [False, True], ids=["inline", "slow-thread"])
@pytest.mark.parametrize(("world", "ep"), [(1, 1), *LAYOUTS])
def test_every_rank_averages_its_rows_of_the_master_weights(pool: Pool, world: int, ep: int, background: bool) -> None:
    held = dict.fromkeys(SHAPES, 0)
    for averages, history, elements in pool.run(averaged_run, world, ep, torch.bfloat16, background, 3):
        for name, average in averages.items():
            values = [weights[name.removeprefix("ema.")] for weights in history]
            torch.testing.assert_close(average.double(), weighted_mean(values, DECAY), rtol=1e-6, atol=1e-7)
            assert not torch.equal(average, average.bfloat16().float()), "an FP32 average of the FP32 master weights"
        for name, count in elements.items():
            held[name.removeprefix("ema.")] += count
    assert held == {name: torch.Size(shape).numel() for name, shape in SHAPES.items()}, "each row is held once"


def test_every_layout_has_the_average_of_one_process_bit_for_bit(pool: Pool) -> None:
    alone = pool.run(averaged_run, 1, 1, torch.float32, False, 3)[0][0]
    for world, ep in LAYOUTS:
        for averages, _, _ in pool.run(averaged_run, world, ep, torch.float32, False, 3):
            for name, average in averages.items():
                assert torch.equal(average, alone[name]), name


def swapped(worker: Worker, ep: int) -> tuple[bool, bool, bool, str]:
    """Whether parameters are the average inside, have moved, and are restored; the error of a step inside."""
    model = Model(worker, ep, torch.bfloat16)
    for number in range(1, 4):
        model.step(number)
    before, refusal = model.published(), ""
    averages = {name.removeprefix("ema."): gathered(t) for name, t in model.optimizer.averages().items()}
    with model.optimizer.averaged():
        within = model.published()
        try:
            model.optimizer.begin_step()
        except AssertionError as error:
            refusal = str(error)
    is_average = all(torch.equal(within[name], averages[name].bfloat16()) for name in within)
    moved = any(not torch.equal(within[name], before[name]) for name in within)
    after = model.published()
    return is_average, moved, all(torch.equal(after[name], before[name]) for name in before), refusal


@pytest.mark.parametrize(("world", "ep"), [(1, 1), (2, 1), (4, 2)])
def test_parameters_are_the_average_for_a_while_and_then_the_weights(pool: Pool, world: int, ep: int) -> None:
    for is_average, moved, back, refusal in pool.run(swapped, world, ep):
        assert (is_average, moved, back) == (True, True, True)
        assert "training would continue from the average" in refusal


def host_views(worker: Worker) -> tuple[str, bool, bool]:
    """Device of the average's DTensor on a grid of GPUs, and whether writing to it writes the shard."""
    model = Model(worker, 1, torch.float32)
    bucket = model.optimizer._buckets[0]
    bucket.mesh = DeviceMesh.from_group(bucket.group, "cuda", mesh_dim_names=("dp",))
    assert model.optimizer.ema is not None
    shard = model.optimizer.ema.shards()[0]
    tensor = dict(bucket.views(shard))["matrix"]
    tensor.to_local().fill_(3.0)
    whole = gathered(tensor)
    return tensor.device_mesh.device_type, bool((shard == 3.0).any()), bool((whole == 3.0).all())


def test_the_average_stays_in_cpu_memory_when_the_grid_is_one_of_gpus(pool: Pool) -> None:
    assert pool.run(host_views, 2) == [("cpu", True, True)] * 2


def test_without_the_key_there_is_no_average(pool: Pool) -> None:
    def run(worker: Worker) -> tuple[Any, dict[str, Any]]:
        model = Model(worker, 1, torch.float32, ema_decay=None)
        model.step(1)
        return model.optimizer.ema, model.optimizer.averages()

    assert pool.run(run, 1) == [(None, {})]
