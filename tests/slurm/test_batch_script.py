"""The batch script of `slurm/`, run with stand-ins for Slurm's commands."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest
from torch.distributed.run import get_args_parser

import counterflow

SCRIPT = Path(counterflow.__file__).parent / "slurm" / "train.sbatch"
JOB = {
    "SLURM_JOB_ID": "123456",
    "SLURM_JOB_NODELIST": "node[7-9]",
    "SLURM_JOB_NUM_NODES": "3",
    "SLURM_CPUS_ON_NODE": "64",
}


def run_script(folder: Path, *arguments: str, **environ: str) -> subprocess.CompletedProcess[str]:
    """Run the script on the first node of a job; `srun` prints its command line, one word per line."""
    stand_ins = {"scontrol": "printf 'node7\\nnode8\\nnode9\\n'", "srun": 'printf "%s\\n" "$@"'}
    for name, body in stand_ins.items():
        (folder / name).write_text(f"#!/bin/sh\n{body}\n")
        (folder / name).chmod(0o755)
    path = f"{folder}:{os.environ['PATH']}"
    return subprocess.run([SCRIPT, *arguments], env={"PATH": path, **JOB, **environ}, capture_output=True, text=True)


def command_of(done: subprocess.CompletedProcess[str]) -> tuple[list[str], list[str]]:
    """Words for `srun` and words for `torchrun`."""
    assert done.returncode == 0, done.stderr
    words = done.stdout.splitlines()
    at = words.index("torchrun")
    return words[:at], words[at + 1 :]


def test_one_torchrun_on_each_node_meets_the_others_on_the_first(tmp_path: Path) -> None:
    for_srun, for_torchrun = command_of(run_script(tmp_path, "smoke", "--set", "run.name=a b", RANKS_PER_NODE="4"))
    assert "--ntasks-per-node=1" in for_srun
    assert "--cpus-per-task=64" in for_srun  # all cores of the node, for all its ranks
    args = get_args_parser().parse_args(for_torchrun)
    assert (args.nnodes, args.nproc_per_node) == ("3", "4")
    assert (args.rdzv_backend, args.rdzv_endpoint, args.rdzv_id) == ("c10d", "node7:23456", "123456")
    assert args.no_python
    assert [args.training_script, *args.training_script_args] == [
        "counterflow",
        "train",
        "smoke",
        "--set",
        "run.name=a b",
    ]


@pytest.mark.parametrize(
    ("environ", "ranks"),
    [({}, "1"), ({"SLURM_GPUS_ON_NODE": "8"}, "8"), ({"SLURM_GPUS_ON_NODE": "8", "RANKS_PER_NODE": "2"}, "2")],
)
def test_a_node_has_a_rank_for_each_gpu_or_as_many_as_asked_for(
    tmp_path: Path, environ: dict[str, str], ranks: str
) -> None:
    _, for_torchrun = command_of(run_script(tmp_path, "tiny", **environ))
    assert get_args_parser().parse_args(for_torchrun).nproc_per_node == ranks


def test_without_a_configuration_it_says_how_it_is_used(tmp_path: Path) -> None:
    done = run_script(tmp_path)
    assert done.returncode == 2
    assert done.stderr.startswith("usage: sbatch ")
