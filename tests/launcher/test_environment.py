"""Environment of a process, its process group and device, its log and its record of a failure."""

from __future__ import annotations

import logging
import mmap
import os
from pathlib import Path

import psutil
import pytest
import torch
import torch.distributed as dist

from counterflow.launcher.bootstrap import bootstrap, choose_device, refuse_shared_gpu
from counterflow.launcher.environment import WorkerEnvironment, read_environment, threads_per_process, usable_cores
from counterflow.launcher.failures import FailureRecord, is_lost_peer
from counterflow.launcher.gpu_settings import (
    describe_gpu_settings,
    gpu_variables,
    refuse_launch_order,
    set_product_precision,
)
from counterflow.launcher.logs import open_log
from counterflow.settings import UsageError

TORCHRUN = {"RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "4"}


def test_plain_shell_is_one_process_whatever_nproc_says() -> None:
    assert read_environment({}) == read_environment({"PATH": "bin"}, nproc=4) == WorkerEnvironment(0, 1, 0, 1, "none")


def test_torchrun_gives_rank_world_size_and_threads() -> None:
    worker = read_environment({**TORCHRUN, "TORCHELASTIC_ERROR_FILE": "error.json", "OMP_NUM_THREADS": "3"})
    assert worker == WorkerEnvironment(5, 8, 1, 4, "torchrun", error_file=Path("error.json"), threads=3)


def test_nproc_is_refused_under_torchrun_and_not_in_our_own_workers() -> None:
    with pytest.raises(UsageError, match=r"--nproc 4 .* process 5 of 8"):
        read_environment(TORCHRUN, nproc=4)
    worker = read_environment({**TORCHRUN, "COUNTERFLOW_PARENT": "321"}, nproc=4)
    assert (worker.launcher, worker.parent, worker.rank) == ("local", 321, 5)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"LOCAL_RANK": None}, "RANK and WORLD_SIZE and LOCAL_WORLD_SIZE but not LOCAL_RANK"),
        ({"RANK": "first"}, "RANK='first'"),
        ({"RANK": "-1"}, "RANK='-1'"),
        ({"RANK": "8"}, "contradicts itself: RANK=8, WORLD_SIZE=8"),
        ({"LOCAL_RANK": "4"}, "contradicts itself"),
        ({"LOCAL_WORLD_SIZE": "9"}, "contradicts itself"),
    ],
)
def test_wrong_environment_is_named(changes: dict[str, str | None], message: str) -> None:
    environ = {name: value for name, value in {**TORCHRUN, **changes}.items() if value is not None}
    with pytest.raises(UsageError, match=message):
        read_environment(environ)


def test_threads_share_the_cores_and_are_at_least_one() -> None:
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    assert threads_per_process({}, 1) == usable_cores() == cores
    assert threads_per_process({}, 10_000) == 1
    assert threads_per_process({"OMP_NUM_THREADS": "3"}, 10_000) == 3


def connections() -> set[object]:
    return {each for each in psutil.Process().net_connections(kind="inet") if each.status == psutil.CONN_ESTABLISHED}


def test_single_process_is_a_group_of_one_without_a_rendezvous(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MASTER_ADDR", raising=False)
    open_before = connections()
    with bootstrap(WorkerEnvironment(), device="cpu", timeout=5.0) as process:
        assert (process.rank, process.world_size, process.device) == (0, 1, torch.device("cpu"))
        assert dist.get_backend() == "gloo"
        total = torch.tensor([3.0])
        dist.all_reduce(total)
        assert total.item() == 3.0
        assert connections() == open_before
    assert not dist.is_initialized()


def test_group_of_one_is_left_after_a_failure_too() -> None:
    with pytest.raises(KeyError), bootstrap(WorkerEnvironment(), device="cpu"):
        raise KeyError
    assert not dist.is_initialized()


def test_bootstrap_sets_the_threads() -> None:
    before = torch.get_num_threads()
    try:
        with bootstrap(WorkerEnvironment(threads=before + 1), device="cpu"):
            assert torch.get_num_threads() == before + 1
    finally:
        torch.set_num_threads(before)


def pretend_gpus(monkeypatch: pytest.MonkeyPatch, count: int) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: count > 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: count)


@pytest.mark.parametrize(
    ("gpus", "device", "backend", "local_rank", "expected"),
    [
        (0, "auto", "auto", 1, ("cpu", "gloo")),
        (4, "auto", "auto", 1, ("cuda:1", "nccl")),
        (1, "auto", "auto", 1, ("cuda:0", "nccl")),  # the launcher shows each rank a GPU of its own
        (1, "cuda", "nccl", 3, ("cuda:0", "nccl")),
        (2, "auto", "gloo", 3, ("cuda:1", "gloo")),
        (4, "cpu", "auto", 1, ("cpu", "gloo")),
        (4, "cuda", "gloo", 3, ("cuda:3", "gloo")),
        (2, "cuda", "gloo", 3, ("cuda:1", "gloo")),
    ],
)
def test_auto_takes_the_devices_of_the_machine(
    monkeypatch: pytest.MonkeyPatch, gpus: int, device: str, backend: str, local_rank: int, expected: tuple[str, str]
) -> None:
    pretend_gpus(monkeypatch, gpus)
    chosen, library = choose_device(device, backend, local_rank, 4)  # type: ignore[arg-type]
    assert (str(chosen), library) == expected


@pytest.mark.parametrize(
    ("gpus", "device", "backend", "message"),
    [
        (0, "cuda", "auto", "finds no GPU"),
        (0, "auto", "nccl", "nccl needs a GPU"),
        (4, "cpu", "nccl", "nccl needs a GPU"),
        (2, "cuda", "auto", "2 GPUs for its 4 ranks"),
        (2, "auto", "auto", "2 GPUs for its 4 ranks: start 2 ranks a node, set run.device to cpu"),
    ],
)
def test_impossible_devices_are_refused(
    monkeypatch: pytest.MonkeyPatch, gpus: int, device: str, backend: str, message: str
) -> None:
    pretend_gpus(monkeypatch, gpus)
    with pytest.raises(UsageError, match=message):
        choose_device(device, backend, 0, 4)  # type: ignore[arg-type]


def test_ranks_that_see_the_same_single_gpu_are_refused() -> None:
    store = dist.HashStore()
    refuse_shared_gpu(store, "GPU-1", 0)
    refuse_shared_gpu(store, "GPU-2", 1)
    with pytest.raises(UsageError, match=r"ranks 0 and 2 see the same single GPU \(GPU-1\)"):
        refuse_shared_gpu(store, "GPU-1", 2)


@pytest.mark.parametrize("variable", ["SLURM_STEP_NUM_TASKS", "OMPI_COMM_WORLD_SIZE", "PMI_SIZE"])
def test_a_task_that_would_train_alone_is_refused(variable: str) -> None:
    with pytest.raises(UsageError, match=rf"one of 16 tasks \({variable}\), and RANK is not set.*torchrun"):
        read_environment({variable: "16"})
    assert read_environment({variable: "1"}) == WorkerEnvironment()
    assert read_environment({**TORCHRUN, variable: "16"}).rank == 5
    assert read_environment({"SLURM_NTASKS": "16"}) == WorkerEnvironment(), "a job's script runs once"


def test_gpu_settings_leave_what_the_user_has_set() -> None:
    added = gpu_variables({}, Path("logs/nccl-"), deterministic=True)
    assert added["CUDA_DEVICE_MAX_CONNECTIONS"] == "32" and added["TORCH_FR_DUMP_TEMP_FILE"] == "logs/nccl-"
    assert added["PYTORCH_ALLOC_CONF"] == "expandable_segments:True"
    assert added["CUBLAS_WORKSPACE_CONFIG"] == ":4096:8"
    assert {"TORCH_FR_DUMP_TEMP_FILE", "CUBLAS_WORKSPACE_CONFIG"}.isdisjoint(gpu_variables({}))
    users = {"CUDA_DEVICE_MAX_CONNECTIONS": "8", "PYTORCH_CUDA_ALLOC_CONF": "", "TORCH_NCCL_TRACE_BUFFER_SIZE": "9"}
    left_out = added.keys() - gpu_variables(users, Path("logs/nccl-"), deterministic=True).keys()
    assert left_out == {"CUDA_DEVICE_MAX_CONNECTIONS", "PYTORCH_ALLOC_CONF", "TORCH_FR_BUFFER_SIZE"}
    assert describe_gpu_settings({"PATH": "x", "NCCL_DEBUG": "INFO", "CUDA_DEVICE_MAX_CONNECTIONS": "8"}) == (
        "CUDA_DEVICE_MAX_CONNECTIONS=8, NCCL_DEBUG=INFO"
    )


def test_an_order_of_launches_is_refused_for_pipelines() -> None:
    with pytest.raises(UsageError, match=r"NCCL_LAUNCH_ORDER_IMPLICIT is set, and with parallel\.pp 4"):
        refuse_launch_order({"NCCL_LAUNCH_ORDER_IMPLICIT": "1"}, pp=4)
    for environ, pp in (({"NCCL_LAUNCH_ORDER_IMPLICIT": "1"}, 1), ({"NCCL_LAUNCH_ORDER_IMPLICIT": "0"}, 4), ({}, 4)):
        refuse_launch_order(environ, pp)


def test_this_torch_reads_the_variables_that_are_set() -> None:
    torch_folder = Path(torch.__file__).parent
    headers = "".join(
        (torch_folder / "include" / name).read_text()
        for name in ("torch/csrc/distributed/c10d/ProcessGroupNCCL.hpp", "c10/cuda/CUDAAllocatorConfig.h")
    )
    names = {name for name in gpu_variables({}, Path("x")) if name.startswith(("TORCH", "PYTORCH"))}
    assert len(names) == 5
    with (torch_folder / "lib" / "libtorch_cpu.so").open("rb") as file:
        library = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        unknown = {name for name in names if f'"{name}"' not in headers and library.find(name.encode()) < 0}
    assert not unknown


def test_products_on_gpus_sum_in_fp32() -> None:
    matmul = torch.backends.cuda.matmul
    before = matmul.allow_bf16_reduced_precision_reduction, matmul.fp32_precision
    try:
        matmul.fp32_precision = "tf32"
        set_product_precision()
        assert matmul.allow_bf16_reduced_precision_reduction is False
        assert (matmul.fp32_precision, matmul.allow_tf32) == ("ieee", False)
    finally:
        matmul.allow_bf16_reduced_precision_reduction, matmul.fp32_precision = before


def test_log_of_a_single_process_keeps_its_output_and_continues_the_file(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    logger = logging.getLogger("counterflow.somewhere")
    for start in ("first", "second"):
        with open_log(tmp_path / "logs") as path:
            logger.info("%s start", start)
            logger.warning("mind the gap")
            print("plain")
    logger.info("after the run")
    console = capfd.readouterr()
    assert console.out == "plain\nplain\n"
    assert console.err == "first start\nwarning: mind the gap\nsecond start\nwarning: mind the gap\n"
    lines = path.read_text().splitlines()
    assert [line.split("] ", 1)[1] for line in lines if "start" in line] == [
        "INFO counterflow.somewhere: first start",
        "INFO counterflow.somewhere: second start",
    ]
    assert all("[rank 0]" in line for line in lines)


def test_failure_passes_through_the_log_and_stays_in_it(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(ArithmeticError), open_log(tmp_path) as path:
        raise ArithmeticError("the cause")
    assert "ArithmeticError: the cause" in path.read_text()
    assert capfd.readouterr().err == ""


def test_a_lost_peer_is_distinguished_from_a_cause() -> None:
    lost = RuntimeError("[gloo/transport/tcp/pair.cc:553] Connection closed by peer [127.0.0.1]:1")
    assert is_lost_peer(lost)
    assert is_lost_peer(dist.DistBackendError("remote process exited"))
    wrapped = ValueError("while reducing")
    wrapped.__cause__ = lost
    assert is_lost_peer(wrapped)
    assert not is_lost_peer(RuntimeError("shapes 2 and 3 do not match"))
    assert not is_lost_peer(ValueError("gloo/transport is a folder"))


def test_record_is_read_as_it_was_written_and_by_torch(tmp_path: Path) -> None:
    from torch.distributed.elastic.multiprocessing.errors import ProcessFailure

    record = FailureRecord.of(UsageError("a wrong\nkey"))
    record.write(tmp_path / "error.json")
    assert FailureRecord.read(tmp_path / "error.json") == record
    assert (record.usage, record.text) == (True, "a wrong\nkey")
    seen = ProcessFailure(local_rank=0, pid=1, exitcode=2, error_file=str(tmp_path / "error.json"))
    assert seen.timestamp == int(record.time)
    assert seen.error_file_data["message"]["extraInfo"]["py_callstack"] == "a wrong\nkey"
    assert FailureRecord.read(tmp_path / "none.json") is None
