"""Two hosts: network namespaces with a cable between them, each with addresses and a loopback of its own.

Both hosts' own name stands for a loopback address, as on many machines, so what binds to that name fails here.
"""

import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from tests.launch import train
from tests.tiny import adapter, job, same_bits, write_base, write_run

ROOT = Path(__file__).resolve().parents[2]
STEPS = 120
TIMEOUT_SECONDS = 6.0


def missing() -> str | None:
    """Why no two hosts can be made here."""
    if shutil.which("ip") is None:
        return "iproute2 is not installed"
    return None if os.geteuid() == 0 else "network namespaces need root"


pytestmark = [
    pytest.mark.skipif(missing() is not None and "CI" not in os.environ, reason=str(missing())),
    pytest.mark.timeout(240),
]


class Hosts:
    """The hosts ``a`` (10.77.0.1) and ``b`` (10.77.0.2), with one cable between them and no other network."""

    ADDRESSES = {"a": "10.77.0.1", "b": "10.77.0.2"}  # noqa: RUF012

    def __init__(self) -> None:
        self.names = {host: f"lora{os.getpid()}{host}" for host in self.ADDRESSES}

    def make(self) -> None:
        """Plug everything in."""
        for name in self.names.values():
            ip("netns", "add", name)
            ip("-n", name, "link", "set", "lo", "up")
        a, b = self.names.values()
        ip("-n", a, "link", "add", "cable", "type", "veth", "peer", "name", "cable", "netns", b)
        for host, name in self.names.items():
            ip("-n", name, "addr", "add", f"{self.ADDRESSES[host]}/24", "dev", "cable")
            ip("-n", name, "link", "set", "cable", "up")

    def remove(self) -> None:
        """Take the hosts away."""
        for name in self.names.values():
            subprocess.run(["ip", "netns", "del", name], check=False, capture_output=True)

    def cut(self) -> None:
        """Pull the cable."""
        ip("-n", self.names["a"], "link", "set", "cable", "down")

    def mend(self) -> None:
        """Plug it in again."""
        ip("-n", self.names["a"], "link", "set", "cable", "up")


class TwoHostRun:
    """A run of one rank on each host, started with torchrun.

    Args:
        hosts: the hosts.
        words: the run file and overrides.
        folder: for the output of both.
        dynamic: whether they meet as the SLURM scripts do (c10d) instead of by the first one's address (static).
    """

    def __init__(self, hosts: Hosts, words: tuple[str, ...], folder: Path, *, dynamic: bool = False) -> None:
        folder.mkdir()
        self.logs = {host: folder / f"{host}.log" for host in hosts.names}
        self.processes = {}
        for rank, (host, name) in enumerate(hosts.names.items()):
            first, own = hosts.ADDRESSES["a"], hosts.ADDRESSES[host]
            static = (f"--node-rank={rank}", f"--master-addr={first}", "--master-port=29500")
            c10d = ("--rdzv-backend=c10d", f"--rdzv-endpoint={first}:29501", f"--rdzv-conf=is_host={rank == 0}")
            command = [
                *("ip", "netns", "exec", name, sys.executable, "-m", "torch.distributed.run"),
                *("--nnodes=2", "--nproc-per-node=1"),
                *((*c10d, "--rdzv-id=1", f"--local-addr={own}") if dynamic else static),
                *("-m", "lorafusion_megatron.train", *words),
            ]
            environment = os.environ | {"PYTHONPATH": str(ROOT), "PYTHONWARNINGS": "ignore", "OMP_NUM_THREADS": "1"}
            with self.logs[host].open("w") as log:
                self.processes[host] = subprocess.Popen(command, env=environment, stdout=log, stderr=log)

    def output(self, host: str) -> str:
        """What a host printed."""
        return self.logs[host].read_text(errors="replace")

    def wait(self, timeout: float) -> dict[str, int]:
        """Exit status by host; those that go on after ``timeout`` seconds are killed and raise."""
        deadline = time.monotonic() + timeout
        try:
            return {host: p.wait(max(0.1, deadline - time.monotonic())) for host, p in self.processes.items()}
        except subprocess.TimeoutExpired:
            raise AssertionError("\n".join(f"{h} goes on:\n{self.output(h)[-3000:]}" for h in self.logs)) from None
        finally:
            self.kill()

    def kill(self) -> None:
        """Leave nothing behind."""
        for process in self.processes.values():
            with suppress(ProcessLookupError):
                process.kill()
            process.wait()


def ip(*words: str) -> None:
    """The ``ip`` command."""
    done = subprocess.run(["ip", *words], capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"ip {' '.join(words)}: {done.stderr}"


@pytest.fixture
def hosts() -> Iterator[Hosts]:
    """Two hosts."""
    assert missing() is None, missing()
    made = Hosts()
    try:
        made.make()
        yield made
    finally:
        made.remove()


@pytest.fixture
def run_file(tmp_path: Path) -> Path:
    """Two jobs over two stages that save now and then and give a lost rank little time."""
    write_base(tmp_path / "base")
    jobs = [
        job(tmp_path, "first", steps=STEPS, batch=3, seed=1, lora_dropout=0.1),
        job(tmp_path, "second", steps=STEPS, batch=2, seed=2, target_modules=["q_proj", "v_proj"]),
    ]
    return write_run(tmp_path, jobs, max_window_microbatches=64, distributed_timeout_minutes=TIMEOUT_SECONDS / 60)


def test_a_cut_cable_ends_both_sides_in_time_and_a_new_start_goes_on(
    hosts: Hosts, run_file: Path, tmp_path: Path
) -> None:
    save = tmp_path / "two_hosts"
    words = (
        str(run_file),
        "model.pipeline_model_parallel_size=2",
        "checkpoint.save_interval=10",
        f"checkpoint.save={save}",
    )
    run = TwoHostRun(hosts, words, tmp_path / "logs1")
    metrics = save / "metrics.jsonl"
    deadline = time.monotonic() + 100
    while not (metrics.exists() and len(metrics.read_text().splitlines()) > STEPS // 2):
        assert time.monotonic() < deadline, run.output("a") + run.output("b")
        assert all(process.poll() is None for process in run.processes.values()), run.output("a") + run.output("b")
        time.sleep(0.05)
    hosts.cut()
    cut_at = time.monotonic()
    statuses = run.wait(60)
    assert time.monotonic() - cut_at < 45
    assert all(statuses.values()), statuses
    assert "gloo uses the interface cable (10.77.0.1)" in run.output("a")
    for host in hosts.names:
        line = next((line for line in run.output(host).splitlines() if line.startswith("lorafusion-megatron: ")), "")
        assert re.search(r"rank [01] on \S+ lost another rank, or the network to it \(.+\); start the same", line), (
            run.output(host)[-3000:]
        )
        assert "Trainer" not in run.output(host), "a traceback of the program is no clear error"

    hosts.mend()
    again = TwoHostRun(hosts, words, tmp_path / "logs2", dynamic=True)
    assert again.wait(100) == {"a": 0, "b": 0}, again.output("a") + again.output("b")
    steps = [line for line in metrics.read_text().splitlines() if '"first"' in line]
    assert len(steps) == STEPS

    train(run_file, *words[1:3], f"checkpoint.save={tmp_path / 'one_host'}", world=2)
    for name in ("first", "second"):
        assert same_bits(adapter(save, name), adapter(tmp_path / "one_host", name))
