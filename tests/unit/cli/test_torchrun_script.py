"""scripts/torchrun/train.sh, with a stand-in for torchrun whose child stands for a rank."""

import os
import signal
import subprocess
import time
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[3] / "scripts" / "torchrun" / "train.sh"
RANK = """
import os, signal, sys, time
def stop(*_):
    open(os.environ["HERE"] + "/stopped", "a").write("x")
    sys.exit(75)
signal.signal(signal.SIGTERM, stop)
open(os.environ["HERE"] + "/ready", "w").close()
time.sleep(30 if "wait" in os.environ["RANK_DOES"] else 0)
sys.exit(3 if "fail" in os.environ["RANK_DOES"] else 0)
"""
PYTHON = """#!/usr/bin/env bash
if [ "$1" = -c ]; then echo 4; exit; fi
printf '%s\\n' "$@" >"$HERE/arguments"
setsid --wait python3 -c "$RANK" && exit 0
exit 1
"""


def start(folder: Path, *words: str, does: str, **environment: str) -> subprocess.Popen[bytes]:
    """The script, whose rank ends at once, fails, or waits for a signal."""
    (folder / "python").write_text(PYTHON)
    (folder / "python").chmod(0o755)
    settings = {"PYTHON": str(folder / "python"), "HERE": str(folder), "RANK": RANK, "RANK_DOES": does}
    # In the background of a script SIGINT is ignored, and a shell can't trap what it finds ignored.
    return subprocess.Popen(
        ["bash", str(SCRIPT), *words],
        env=os.environ | settings | environment,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )


def test_one_host_starts_a_rank_per_gpu_and_passes_the_words_on(tmp_path: Path) -> None:
    assert start(tmp_path, "RUN.yaml", "a.b=it's 1", does="end").wait(20) == 0
    assert (tmp_path / "arguments").read_text().splitlines() == [
        *("-m", "torch.distributed.run", "--standalone", "--nproc-per-node=4", "--signals-to-handle=SIGQUIT"),
        *("-m", "lorafusion_megatron.train", "RUN.yaml", "a.b=it's 1"),
    ]


def test_several_hosts_meet_on_the_first(tmp_path: Path) -> None:
    hosts = {"NNODES": "2", "NODE_RANK": "1", "MASTER_ADDR": "head", "NPROC": "8"}
    assert start(tmp_path, "RUN.yaml", does="end", **hosts).wait(20) == 0
    assert (tmp_path / "arguments").read_text().splitlines()[2:7] == [
        *("--nnodes=2", "--node-rank=1", "--master-addr=head", "--master-port=29500", "--nproc-per-node=8"),
    ]
    assert start(tmp_path, "RUN.yaml", does="end", **(hosts | {"MASTER_ADDR": ""})).wait(20) != 0


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1, signal.SIGINT])
def test_a_signal_reaches_the_ranks_once_and_the_status_says_run_it_again(
    number: signal.Signals, tmp_path: Path
) -> None:
    process = start(tmp_path, "RUN.yaml", does="wait")
    deadline = time.monotonic() + 20
    while not (tmp_path / "ready").exists():
        assert time.monotonic() < deadline
        time.sleep(0.02)
    process.send_signal(number)
    assert process.wait(20) == 75
    assert (tmp_path / "stopped").read_text() == "x"


def test_a_failure_stays_one(tmp_path: Path) -> None:
    assert start(tmp_path, "RUN.yaml", does="fail").wait(20) == 1


def test_without_a_run_file_it_says_how_it_is_used(tmp_path: Path) -> None:
    assert start(tmp_path, does="end").wait(20) != 0
    assert not (tmp_path / "arguments").exists()
