"""No rank leaves while rank 0 still writes: launchers end the others when one has left."""

import os
import signal
import time
from pathlib import Path

import pytest

from tests.launch import Ranks, command
from tests.tiny import tiny_run


def run_with_slow_end(words: list[str], note: str) -> int:
    """A rank of a run whose rank 0 takes a second to write what it writes last; 9 where another leaves before."""
    from lorafusion_megatron.training.trainer import Trainer

    write_last = Trainer._close

    def slowly(trainer: Trainer, stopped: bool) -> None:
        if trainer.groups.is_first:
            time.sleep(1.0)
            Path(note).touch()
        write_last(trainer, stopped)

    Trainer._close = slowly
    status = command(words)
    return status if Path(note).exists() else 9


@pytest.mark.parametrize("stop", [False, True])
def test_no_rank_leaves_before_rank_0_has_written_everything(stop: bool, tmp_path: Path) -> None:
    run_file = tiny_run(tmp_path)
    words = ["train", str(run_file), "model.pipeline_model_parallel_size=2"]
    if stop:
        words += [f"jobs[{index}].train.train_iters=2000" for index in (0, 1)]
    ranks = Ranks(run_with_slow_end, (words, str(tmp_path / "written")), world=2, folder=tmp_path / "logs")
    if stop:
        metrics = tmp_path / "out" / "metrics.jsonl"
        deadline = time.monotonic() + 60
        while not (metrics.exists() and metrics.stat().st_size):
            assert time.monotonic() < deadline
            time.sleep(0.05)
        os.kill(ranks.processes[1].pid, signal.SIGTERM)
    assert ranks.wait(60.0).statuses == ((75, 75) if stop else (0, 0))


@pytest.mark.parametrize("rank", [0, 1])
def test_a_rank_that_waits_for_one_that_never_comes_says_so(tmp_path, rank):
    run_file = tiny_run(tmp_path / "run")
    words = ["train", str(run_file), "model.pipeline_model_parallel_size=2", "runtime.distributed_timeout_minutes=0.05"]
    alone = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
    ranks = Ranks(command, (words,), world=1, folder=tmp_path / "logs", environment=alone)
    done = ranks.wait(60.0)
    assert done.statuses == (1,)
    assert f"rank {rank} on " in done.outputs[0]
    assert "lost another rank, or the network to it" in done.outputs[0]
    assert "Traceback" not in done.outputs[0]
