"""Checks of jobs that want to join: small ones on the spot, large ones in a process that nobody waits for."""

import time
from dataclasses import replace

import pytest

from lorafusion_megatron.config import load_run
from lorafusion_megatron.errors import UserError
from lorafusion_megatron.models.config import read_model_spec
from lorafusion_megatron.training import new_jobs, row_cache
from lorafusion_megatron.training.memory import predict_run_memory
from lorafusion_megatron.training.new_jobs import NewJobs
from tests.unit.tiny_inputs import make_case


@pytest.fixture
def run(tmp_path):
    return load_run(make_case(tmp_path).write(), [])


def make(run, said: list[str]) -> NewJobs:
    return NewJobs(run, read_model_spec(run.base_model.path), 1, said.append)


def wait_for(jobs: NewJobs, job) -> bool:
    """Ask until it is known, as a run does between windows."""
    deadline = time.monotonic() + 60
    while not jobs.check(job):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    return True


def test_a_small_job_is_checked_on_the_spot_and_alone(run):
    said: list[str] = []
    jobs = make(run, said)
    assert jobs.check(replace(run.jobs[1], name="new"))
    with pytest.raises(UserError) as refused:
        jobs.check(replace(run.jobs[0], name="new", peft=replace(run.jobs[0].peft, init_from=run.checkpoint.save)))
    assert refused.value.key == "peft.init_from"
    # What an older job began with may be gone by now.
    gone = replace(run.jobs[0], peft=replace(run.jobs[0].peft, init_from=run.checkpoint.save / "gone"))
    assert make(replace(run, jobs=(gone, *run.jobs[1:])), said).check(replace(run.jobs[1], name="new"))
    assert said == []


def test_a_large_one_is_checked_by_a_process_and_others_wait_their_turn(run, monkeypatch):
    monkeypatch.setattr(new_jobs, "LARGE", 0)
    said: list[str] = []
    jobs, first = make(run, said), replace(run.jobs[1], name="new")
    bad = replace(run.jobs[0], name="bad", max_length=10**6)
    assert not jobs.check(first)
    assert not jobs.check(bad)
    assert wait_for(jobs, first)
    with pytest.raises(UserError) as refused:
        wait_for(jobs, bad)
    assert refused.value.key == "max_length"
    assert said == [f"{name} wants to join: its data is being read" for name in ("new", "bad")]
    jobs.close()


def test_a_job_whose_check_was_killed_is_refused_and_a_check_under_way_ends_with_the_run(run, monkeypatch):
    monkeypatch.setattr(new_jobs, "LARGE", 0)
    jobs, job = make(run, []), replace(run.jobs[1], name="new")
    assert not jobs.check(job)
    jobs._process.kill()
    with pytest.raises(UserError, match="ended with -9"):
        wait_for(jobs, job)
    assert not jobs.check(job)
    assert wait_for(jobs, job), "added again it is read again"
    assert not jobs.check(job)
    process = jobs._process
    jobs.close()
    assert not process.is_alive()


def test_a_job_for_which_a_gpu_has_no_room_is_refused(run):
    spec = read_model_spec(run.base_model.path)
    (stage,) = predict_run_memory(run, spec, (4,))
    first, second = run.jobs
    new_jobs.check_room(run, spec, (4,), [first], second, stage.total)
    with pytest.raises(UserError, match="stage 0 would take") as refused:
        new_jobs.check_room(run, spec, (4,), [first], second, stage.total - 1)
    assert refused.value.key == "peft.r"


def test_rows_of_a_job_that_may_join_wait_on_disk_and_those_of_a_refused_one_do_not(run, monkeypatch):
    monkeypatch.setattr(row_cache, "SMALL", 0)
    kept = run.checkpoint.save / "tokenized"
    bad = replace(run.jobs[0], name="bad", peft=replace(run.jobs[0].peft, init_from=run.checkpoint.save / "gone"))
    with pytest.raises(UserError):
        make(run, []).check(bad)
    assert not kept.exists()
    assert make(run, []).check(replace(run.jobs[1], name="new"))
    assert len(list(kept.glob("*/ids.npy"))) == 1
