"""What is told, and let go of, when a checkpoint can't be written or an old one not removed."""

import gc
import json
import weakref
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from lorafusion_megatron.config.job import DatasetConfig, JobConfig, TrainConfig
from lorafusion_megatron.mcore.gather import FactorGatherer
from lorafusion_megatron.mcore.steps import StepCounters, StepSnapshot
from lorafusion_megatron.scheduler.options import REFERENCE_MODEL
from lorafusion_megatron.training import checkpoints, state
from lorafusion_megatron.training.checkpoints import CheckpointWriter
from lorafusion_megatron.training.jobs import Job
from lorafusion_megatron.training.saver import PlanPosition, SaveItem, StateItem
from lorafusion_megatron.types import AdapterSpec
from tests.unit.training.one_factor import GROUPS, OneFactor

WHERE = PlanPosition(window=0, schedule=None, shape={}, statuses={0: ("running", "")})


@pytest.fixture
def notes() -> list[str]:
    return []


@pytest.fixture
def job() -> Job:
    config = JobConfig(
        name="a", dataset=DatasetConfig(path=Path("a.jsonl")), train=TrainConfig(global_batch_size=1, train_iters=9)
    )
    return Job(index=0, config=config, dataset=None, source=None, num_steps=9, applied=3, losses=[3.0, 2.0, 1.0])


@pytest.fixture
def writer(tmp_path, notes, job) -> CheckpointWriter:
    return CheckpointWriter(
        tmp_path,
        {0: job},
        lambda index: AdapterSpec(name="a", rank=2, alpha=4.0, seed=0, target_modules=("q_proj",)),
        REFERENCE_MODEL,
        tmp_path / "base",
        keep=1,
        keep_steps=True,
        is_first=True,
        note=notes.append,
    )


def item() -> StateItem:
    counters = StepCounters(applied=3, optimizer_steps=3, bad_steps=0, stopped=False)
    snapshot = StepSnapshot(master=torch.ones(6), exp_avg=torch.ones(6), exp_avg_sq=torch.ones(6), counters=counters)
    return StateItem(
        SaveItem(wants={0: 3}, cut=0, where=WHERE, got={0: (OneFactor(), snapshot)}), FactorGatherer(GROUPS)
    )


def refuse_removal(monkeypatch) -> None:
    """NFS, where another host has a file open."""

    def busy(path, ignore_errors=False):
        if not ignore_errors:
            raise OSError(16, "Device or resource busy")

    monkeypatch.setattr(state.shutil, "rmtree", busy)


def test_an_old_checkpoint_that_stays_is_told_as_that(writer, notes, tmp_path, monkeypatch):
    writer.state(item())
    refuse_removal(monkeypatch)
    writer.state(item())
    assert notes == [
        "an old checkpoint could not be removed ([Errno 16] Device or resource busy); the run goes on",
    ]
    assert writer.last_state == str(tmp_path / "state" / "00000002")
    assert state.check_state(tmp_path / "state" / "00000002")["jobs"][0]["applied"] == 3


def test_a_checkpoint_holds_the_validations_of_its_place_and_none_that_came_while_it_waited(writer, job, tmp_path):
    """A kill then must not lose the best adapter of a validation that the resume would take for done."""
    job.evals.append((2, 0.5))
    queued = item()
    queued.where = replace(WHERE, evals={0: 1})
    job.evals.append((3, 0.25))
    writer.state(queued)
    (record,) = state.check_state(tmp_path / "state" / "00000001")["jobs"]
    assert record["evals"] == [[2, 0.5]]


def test_an_old_adapter_that_stays_is_told_as_that_and_the_new_one_is_written(
    writer, notes, job, tmp_path, monkeypatch
):
    monkeypatch.setattr(checkpoints, "to_peft", lambda factors, model: {})
    monkeypatch.setattr(checkpoints, "write_adapter", lambda folder, *_: folder.mkdir(parents=True, exist_ok=True))
    writer.adapter(0, 2, {}, False)
    refuse_removal(monkeypatch)
    writer.adapter(0, 3, {}, False)
    assert notes == ["a: an old adapter could not be removed ([Errno 16] Device or resource busy); the run goes on"]
    assert writer.has_last(job)
    assert (tmp_path / "a" / "step_3").is_dir()


def test_a_full_disk_is_told_with_the_last_whole_checkpoint_and_keeps_no_copy(writer, notes, tmp_path, monkeypatch):
    writer.state(item())

    def full(tensors, file):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(state, "save_tensors", full)
    again = item()
    copy = weakref.ref(again._got[0][1].master)
    gc.disable()
    try:
        writer.state(again)
        del again
        assert copy() is None
    finally:
        gc.enable()
    kept = tmp_path / "state" / "00000001"
    assert notes == [
        "a checkpoint could not be saved ([Errno 28] No space left on device); "
        f"the run goes on, the last whole one is {kept}"
    ]
    assert [path.name for path in kept.parent.iterdir()] == [kept.name]


def test_a_best_adapter_that_a_resume_does_not_know_is_set_aside_until_it_is_found_again(
    writer, notes, job, tmp_path, monkeypatch
):
    monkeypatch.setattr(checkpoints, "to_peft", lambda factors, model: {})
    monkeypatch.setattr(checkpoints, "write_adapter", lambda folder, *_: folder.mkdir(parents=True, exist_ok=True))
    best, aside = tmp_path / "a" / "best", tmp_path / "a" / "best_step_3"
    job.evals[:] = [(2, 0.5), (3, 0.25)]
    writer.adapter(0, 3, {}, True)
    assert json.loads((best / "eval.json").read_text()) == {"step": 3, "loss": 0.25}
    writer.roll_back()
    assert best.is_dir(), "this training has it"
    job.evals[:] = [(2, 0.5)]
    writer.roll_back()
    assert aside.is_dir()
    assert not best.exists()
    assert notes == [f"a: {best} is of step 3, which is trained again: kept as best_step_3"]
    assert json.loads((tmp_path / "a" / "evals.json").read_text()) == [{"step": 2, "loss": 0.5}]
    job.evals.append((3, 0.25))
    writer.adapter(0, 3, {}, True)
    assert best.is_dir()
    assert not aside.exists()
