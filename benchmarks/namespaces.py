"""Two network namespaces joined by a link of limited rate: two machines and the network between them.

    with joined(mbit=100) as link:
        subprocess.run([*link.inside(0), "ping", "-c", "1", link.addresses[1]])

Needs root and iproute2. Names are unique and addresses are inside the namespaces, so several links can exist at once
and none affects the machine's own network. The namespaces are removed at the end of the block, also after an exception,
Ctrl-C or SIGTERM. After SIGKILL they stay; `ip netns list` shows them and `ip netns delete NAME` removes them.
"""

from __future__ import annotations

import os
import secrets
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from counterflow.settings import UsageError

INTERFACE = "wire"
ADDRESSES = ("10.0.0.1", "10.0.0.2")
# Bytes that an idle link may send at once before its rate applies: few compared with a transfer, but more than the
# link sends in the time by which the kernel's timer is late. With fewer the link would never reach its rate.
BURST_BYTES = 16 * 1024
# Bytes that may wait for the link: more than a socket keeps in flight, so that nothing is dropped.
QUEUE_BYTES = 16 * 2**20

# A connection must not begin slowly again after a pause, nor estimate the rate of its path from its own traffic: with
# BBR, the default of some systems, transfers of 0.5 MiB in both directions at once ran at 34 to 98 of 100 Mbit/s. Reno
# is in every kernel; on a link that drops nothing it soon uses the whole rate.
TCP = {"tcp_slow_start_after_idle": 0, "tcp_congestion_control": "reno"}


@dataclass(frozen=True)
class Link:
    """Link and its two ends, 0 and 1; each direction has the whole rate."""

    namespaces: tuple[str, str]
    addresses: tuple[str, str] = ADDRESSES
    interface: str = INTERFACE
    """Name of the interface in both namespaces, the value of GLOO_SOCKET_IFNAME."""

    def inside(self, end: int) -> list[str]:
        """Prefix of a command that runs at this end."""
        return ["ip", "netns", "exec", self.namespaces[end]]

    def limit(self, mbit: float) -> None:
        """Limit each direction to `mbit` million bits a second, packet headers counted."""
        shape = [f"rate {round(mbit * 1e6)}bit", f"burst {BURST_BYTES}", f"limit {QUEUE_BYTES}"]
        for namespace in self.namespaces:
            command = f"tc -n {namespace} qdisc replace dev {self.interface} root tbf {' '.join(shape)}"
            _run(*command.split())


@contextmanager
def joined(mbit: float) -> Iterator[Link]:
    """Make two namespaces and a link between them, limited to `mbit` million bits a second in each direction.

    Raises:
        UsageError: not root, no iproute2, or a kernel that refuses.
    """
    _refuse_without_means()
    prefix = f"counterflow-{secrets.token_hex(4)}"
    link = Link((f"{prefix}-0", f"{prefix}-1"))
    with ExitStack() as cleanup, _terminated_as_exit():
        for namespace in link.namespaces:
            _run("ip", "netns", "add", namespace)
            cleanup.callback(_remove, namespace)
        first, second = link.namespaces
        # Made inside the namespaces: the machine's own namespace never has the interfaces.
        _run(*f"ip -n {first} link add {INTERFACE} type veth peer name {INTERFACE} netns {second}".split())
        for namespace, address in zip(link.namespaces, ADDRESSES, strict=True):
            _run(*f"ip -n {namespace} address add {address}/30 dev {INTERFACE}".split())
            _run(*f"ip -n {namespace} link set lo up".split())
            _run(*f"ip -n {namespace} link set {INTERFACE} up".split())
            for setting, value in TCP.items():
                _run(*f"ip netns exec {namespace} sh -c".split(), f"echo {value} > /proc/sys/net/ipv4/{setting}")
        link.limit(mbit)
        yield link


def run_at_both_ends(link: Link, arguments: Sequence[str], ranks: int = 1) -> None:
    """Run Python on `arguments` with `--rank R` in `ranks` processes at each end of the link, numbered end by end. A
    process that fails ends the others, and SystemExit is raised."""
    environment = ["env", f"GLOO_SOCKET_IFNAME={link.interface}", "OMP_NUM_THREADS=1", "TORCH_CPP_LOG_LEVEL=ERROR"]
    command = [*environment, sys.executable, "-P", *arguments, "--rank"]
    run_together([[*link.inside(rank // ranks), *command, str(rank)] for rank in range(2 * ranks)])


def run_together(commands: Iterable[Sequence[str]]) -> None:
    """Run all commands at the same time; the first that fails ends the others, and SystemExit is raised."""
    running = [subprocess.Popen(command) for command in commands]
    try:
        while any(one.poll() is None for one in running) and not any(one.poll() for one in running):
            time.sleep(0.1)
    finally:
        for one in running:
            if one.poll() is None:
                one.terminate()
            one.wait()
    if any(one.returncode for one in running):
        raise SystemExit("one of the processes failed; its output is above")


def bytes_sent() -> int:
    """Bytes that the kernel has sent over the link, packet headers included; read by a process at one of its ends."""
    return int(Path(f"/sys/class/net/{INTERFACE}/statistics/tx_bytes").read_text())


def _refuse_without_means() -> None:
    missing = [tool for tool in ("ip", "tc") if shutil.which(tool) is None]
    if missing:
        raise UsageError(f"{' and '.join(missing)} not found: network namespaces need iproute2 (apt install iproute2)")
    if os.geteuid() != 0:
        raise UsageError("network namespaces need root: run it with sudo, or in a container with CAP_SYS_ADMIN")


def _run(*command: str) -> str:
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise UsageError(f"`{' '.join(command)}` failed, so there is no limited link: {done.stderr.strip()}")
    return done.stdout


def _remove(namespace: str) -> None:
    # Deletes the interfaces at once, even while a process is still in the namespace.
    subprocess.run(["ip", "-n", namespace, "link", "delete", INTERFACE], capture_output=True)
    done = subprocess.run(["ip", "netns", "delete", namespace], capture_output=True, text=True)
    if done.returncode:
        print(f"namespace {namespace} could not be removed: {done.stderr.strip()}", file=sys.stderr)


@contextmanager
def _terminated_as_exit() -> Iterator[None]:
    """Context in which SIGTERM and SIGHUP raise SystemExit, so that the cleanup runs."""
    if threading.current_thread() is not threading.main_thread():  # only the main thread can handle signals
        yield
        return

    def leave(number: int, _frame: Any) -> None:
        raise SystemExit(128 + number)

    before = {number: signal.signal(number, leave) for number in (signal.SIGTERM, signal.SIGHUP)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
