"""Runs of two nodes under a real SLURM: undisturbed, preempted, and cut by the time limit; all end the same."""

import contextlib
import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.distributed.slurm.cluster import Cluster, missing
from tests.launch import train
from tests.tiny import Tensors, adapter, job, losses, same_bits, write_base, write_run

pytestmark = [
    pytest.mark.skipif(missing() is not None and "CI" not in os.environ, reason=str(missing())),
    pytest.mark.timeout(240),
]
ROOT = Path(__file__).resolve().parents[3]
NAMES = ("first", "second")
STEPS = 120


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """Two nodes."""
    assert missing() is None, missing()
    running = Cluster(tmp_path_factory.mktemp("slurm"))
    try:
        running.start()
        yield running
    finally:
        running.stop()


@dataclass(frozen=True, kw_only=True)
class Result:
    """What a run left."""

    adapters: dict[str, Tensors]
    losses: dict[str, list[float]]

    @classmethod
    def of(cls, folder: Path) -> "Result":
        """Read it from a run's folder."""
        return cls(
            adapters={name: adapter(folder, name) for name in NAMES},
            losses={name: losses(folder, name) for name in NAMES},
        )

    def check_same(self, other: "Result") -> None:
        """Adapters equal to the last bit, the same losses, every step once."""
        for name in NAMES:
            assert [len(self.losses[name]), len(other.losses[name])] == [STEPS, STEPS]
            assert self.losses[name] == other.losses[name]
            assert same_bits(self.adapters[name], other.adapters[name])


@pytest.fixture(scope="module")
def run_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two jobs with dropout over two stages, a few seconds long."""
    folder = tmp_path_factory.mktemp("case")
    write_base(folder / "base")
    jobs = [
        job(folder, "first", steps=STEPS, batch=3, seed=1, lora_dropout=0.1),
        job(folder, "second", steps=STEPS, batch=2, seed=2, target_modules=["q_proj", "v_proj"]),
    ]
    return write_run(folder, jobs, max_window_microbatches=64)


@pytest.fixture(scope="module")
def undisturbed(run_file: Path) -> Result:
    """The run on one host, without SLURM."""
    save = run_file.parent / "undisturbed"
    train(run_file, f"checkpoint.save={save}", "model.pipeline_model_parallel_size=2", world=2)
    return Result.of(save)


class Submitted:
    """A run that was submitted with a script of `lorafusion-megatron slurm`.

    Args:
        cluster: where.
        run_file: of the run.
        folder: where it works.
        launcher: torchrun or srun.
        sbatch: further options to sbatch.
    """

    def __init__(self, cluster: Cluster, run_file: Path, folder: Path, launcher: str, *sbatch: str) -> None:
        self.cluster, self.folder = cluster, folder
        self.save = folder / "out"
        words = (str(run_file), f"checkpoint.save={self.save}", "model.pipeline_model_parallel_size=2")
        shape = ("--nodes=2", "--gpus-per-node=0", "--processes-per-node=1", "--cpus-per-process=1")
        command = (sys.executable, "-m", "lorafusion_megatron.cli.main", "slurm", *words, *shape)
        options = (
            f"--launcher={launcher}",
            "--time=1:00:00",
            f"--python={sys.executable}",
            "--sbatch=--comment=two words",
        )
        subprocess.run([*command, *options], cwd=folder, env=os.environ | {"PYTHONPATH": str(ROOT)}, check=True)
        # Both nodes are this machine, and their names stand for its loopback.
        exported = f"--export=ALL,PYTHONPATH={ROOT},PYTHONWARNINGS=ignore,GLOO_SOCKET_IFNAME=lo"
        self.number = cluster.submit(exported, *sbatch, "train.sbatch", cwd=folder)

    def steps(self) -> int:
        """Optimizer steps that the run has logged."""
        path = self.save / "metrics.jsonl"
        return len(path.read_text().splitlines()) if path.exists() else 0

    def freeze(self, number: signal.Signals = signal.SIGSTOP) -> None:
        """Hold the training processes where they are (SIGCONT lets them go on), so that what is to come meets them."""
        for entry in Path("/proc").iterdir():
            if entry.name.isdigit():
                with contextlib.suppress(OSError):
                    words = (entry / "cmdline").read_bytes().split(b"\0")
                    if b"lorafusion_megatron.train" in words and f"checkpoint.save={self.save}".encode() in words:
                        os.kill(int(entry.name), number)

    def freeze_in_training(self) -> None:
        """Wait until it trains and hold it there."""
        self.cluster.until(lambda: self.steps() > STEPS // 4, 100, f"training has not begun\n{self.output()}")
        self.freeze()
        assert self.steps() < 2 * STEPS

    def wait(self) -> dict[str, str]:
        """Wait for the job's good end; what SLURM says of it."""
        try:
            found = self.cluster.wait(self.number, timeout=120)
        except TimeoutError as error:
            raise AssertionError(f"{error}\n{self.cluster.job(self.number)}\n{self.output()}") from None
        assert found["JobState"] == "COMPLETED", f"{found}\n{self.output()}"
        return found

    def output(self) -> str:
        """What the script and all ranks wrote, over all attempts."""
        files = [*self.folder.glob("*.out"), *sorted(self.folder.glob("logs/**/*.log"))]
        return "\n".join(f"== {path}\n{path.read_text(errors='replace')}" for path in files)

    def check_metrics(self) -> None:
        """Every optimizer step of every job is logged once, in order."""
        lines = [json.loads(line) for line in (self.save / "metrics.jsonl").read_text().splitlines()]
        for name in NAMES:
            assert [line["step"] for line in lines if line["job"] == name] == list(range(1, STEPS + 1))


def test_a_run_stops_ahead_of_its_time_limit_and_goes_on_in_the_next_attempt(
    cluster: Cluster, run_file: Path, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    # The first test: slurmctld looks for jobs near their limit every 30 s from its start, which leaves the run some
    # 27 s to begin. Where it takes longer, that attempt has nothing to lose, and the next is met while it trains.
    run = Submitted(cluster, run_file, tmp_path, "srun", "--time=1", "--signal=B:USR1@30")
    run.freeze_in_training()
    warnings = run.output().count("the time limit is near")
    cluster.until(lambda: run.output().count("the time limit is near") > warnings, 60, "no warning came")
    run.freeze(signal.SIGCONT)
    cluster.command("scontrol", "update", f"JobId={run.number}", "TimeLimit=60")  # one warning is enough
    assert int(run.wait()["Restarts"]) >= 1
    assert "stopped by SIGUSR1; the state is saved" in run.output()
    assert "stopped ahead of the time limit (status 75); back into the queue" in run.output()
    Result.of(run.save).check_same(request.getfixturevalue("undisturbed"))
    run.check_metrics()


def test_two_nodes_end_as_one_host_does(cluster: Cluster, run_file: Path, undisturbed: Result, tmp_path: Path) -> None:
    run = Submitted(cluster, run_file, tmp_path, "torchrun")
    assert run.wait()["NodeList"] == "node[1-2]"
    Result.of(run.save).check_same(undisturbed)
    logs = {path.parents[3].name for path in tmp_path.glob("logs/*.0/node-*/*/attempt_0/0/stdout.log")}
    assert logs == {"node-0", "node-1"}


def test_a_preempted_run_is_requeued_and_ends_as_if_nothing_had_been(
    cluster: Cluster, run_file: Path, undisturbed: Result, tmp_path: Path
) -> None:
    run = Submitted(cluster, run_file, tmp_path, "torchrun")
    run.freeze_in_training()
    urgent = tmp_path / "urgent.sh"
    urgent.write_text("#!/bin/sh\ntrue\n")
    other = cluster.submit("--partition=urgent", "--nodes=2", "--exclusive", str(urgent), cwd=tmp_path)
    # SLURM sends SIGCONT before SIGTERM, so the frozen run needs no help.
    assert cluster.wait(other, timeout=60)["JobState"] == "COMPLETED"
    assert int(run.wait()["Restarts"]) == 1
    assert "stopped by SIGTERM; the state is saved" in run.output()
    Result.of(run.save).check_same(undisturbed)
    run.check_metrics()
