"""Where a job stands: its best validation, and its patience."""

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest

from lorafusion_megatron.config.job import DatasetConfig, EvalConfig, JobConfig, TrainConfig
from lorafusion_megatron.training.jobs import Job

NAN = math.nan


def job(losses: list[float], patience: int | None = None) -> Job:
    """A job that was validated after every step."""
    config = JobConfig(
        name="a",
        dataset=DatasetConfig(path=Path("a.jsonl")),
        train=TrainConfig(global_batch_size=1, train_iters=100),
        eval=EvalConfig(path=Path("b.jsonl"), interval=1, patience=patience),
    )
    return Job(index=0, config=config, dataset=None, source=None, evals=list(enumerate(losses, 1)))


@pytest.mark.parametrize(
    ("losses", "step"),
    [
        ([3.0, 2.0, 2.0, 2.5], 2),
        ([NAN, 3.0, 2.0], 3),
        ([3.0, NAN, 2.0, math.inf], 3),
        ([-math.inf, 3.0], 2),
        ([math.inf, NAN, 9.0], 3),
        ([NAN, math.inf], 1),
    ],
)
def test_a_loss_that_is_not_finite_is_never_the_best_where_another_is(losses, step):
    assert job(losses).best_eval()[0] == step
    entry = job([])
    entry.evals = [tuple(e) for e in json.loads(json.dumps(job(losses).evals))]  # as a resume reads them
    assert entry.best_eval()[0] == step


def test_no_validation_has_no_best():
    assert job([], patience=1).best_eval() is None
    assert not job([], patience=1).out_of_patience()


@pytest.mark.parametrize(
    ("losses", "out"),
    [
        ([NAN, 3.0, 2.0], False),
        ([NAN, 3.0, 2.0, NAN], False),
        ([NAN, 3.0, 2.0, NAN, 2.5], True),
        ([3.0, NAN, NAN], True),
        ([NAN, NAN], False),
        ([NAN, NAN, NAN], True),
    ],
)
def test_patience_counts_from_the_best_finite_loss(losses, out):
    assert job(losses, patience=2).out_of_patience() is out


def test_a_job_that_has_done_more_steps_than_it_is_asked_for_now_is_validated_once_more():
    entry = job([3.0, 2.0])
    entry.config = replace(entry.config, eval=replace(entry.config.eval, interval=30))
    entry.num_steps, entry.applied, entry.status = 20, 41, "finished"
    assert entry.eval_due()
    entry.evals.append((41, 2.5))
    assert not entry.eval_due()
