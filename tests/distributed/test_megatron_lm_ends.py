"""How a pretraining script's run begins and ends where something is wrong: one line, the right status, nothing lost."""

import json
import shutil

import pytest

from lorafusion_megatron.training.run import EXIT_UNSAVED
from tests import tiny
from tests.distributed.megatron_lm import (
    PROVIDER_SCRIPT,
    SCRIPT,
    pretrain,
    run_and_stop_while_it_settles,
    run_clamped,
    run_loading,
    run_on_a_full_disk,
)

WINDOWS = ("runtime.max_window_microbatches=2",)


@pytest.fixture
def run_file(tmp_path):
    """Two jobs on a Llama of four layers, in fp32."""
    return tiny.tiny_run(tmp_path)


def errors(output: str) -> list[str]:
    """The lines of mistakes."""
    return [line for line in output.splitlines() if line.startswith("lorafusion-megatron: error: ")]


def state(out) -> str:
    return json.loads((out / "status.json").read_text())["state"]


@pytest.mark.parametrize("leaves", ["at its end", "by an option"])
def test_an_adapter_that_could_not_be_saved_is_told_and_makes_the_status(run_file, tmp_path, leaves):
    out, saved = tmp_path / "out", tmp_path / "saved"
    words, overrides = ("--save", str(saved), "--save-interval", "1"), WINDOWS
    if leaves == "by an option":  # one window, after which Megatron leaves its loop
        words, overrides = (*words, "--exit-interval", "1"), ()
    finished = pretrain(SCRIPT, run_file, out, *words, overrides=overrides, run=run_on_a_full_disk)
    assert ("exiting program at iteration 1" in finished.outputs[0]) == (leaves == "by an option")
    assert finished.statuses == (EXIT_UNSAVED,)
    assert "the last adapters of second could not be saved" in finished.outputs[0]
    assert "Traceback" not in finished.outputs[0]
    assert (out / "first" / "adapter_model.safetensors").is_file()
    assert (saved / "latest_checkpointed_iteration.txt").is_file()  # Megatron's last save comes before
    assert not (out / "second" / "adapter_model.safetensors").exists()
    pretrain(SCRIPT, run_file, out, overrides=WINDOWS).check()
    assert (out / "second" / "adapter_model.safetensors").is_file()


def test_a_last_save_of_megatrons_that_failed_makes_the_status(run_file, tmp_path):
    (tmp_path / "saved").write_text("no folder")
    two = ("--pipeline-model-parallel-size", "2")
    words = ("--save", str(tmp_path / "saved"), "--save-interval", "100", *two)
    finished = pretrain(SCRIPT, run_file, tmp_path / "out", *words, world=2, overrides=WINDOWS)
    assert finished.statuses == (EXIT_UNSAVED, EXIT_UNSAVED)
    assert "could not be saved to" in finished.outputs[0]
    assert (tmp_path / "out" / "second" / "adapter_model.safetensors").is_file()


def test_what_load_names_is_checked_first_and_a_folder_without_a_tracker_is_told(run_file, tmp_path):
    out, saved = tmp_path / "out", tmp_path / "saved"
    both = ("--save", str(saved), "--save-interval", "1", "--load", str(saved))
    first = pretrain(SCRIPT, run_file, out, *both, "--exit-interval", "1", overrides=WINDOWS).check()
    assert f"no checkpoint under {saved}: the jobs begin afresh" in first.outputs[0]
    assert "stopped by an exit option of Megatron's; the state is saved" in first.outputs[0]

    damaged = tmp_path / "damaged"
    shutil.copytree(saved, damaged)
    (damaged / "iter_0000001" / "megatron.json").write_text('{"iteration": 1')
    wrong = pretrain(SCRIPT, run_file, tmp_path / "wrong", "--load", str(damaged), overrides=WINDOWS)
    assert wrong.statuses == (2,)
    assert len(errors(wrong.outputs[0])) == 1
    assert "megatron.json can't be read" in wrong.outputs[0]
    assert not (tmp_path / "wrong").exists()

    shutil.rmtree(saved)
    second = pretrain(SCRIPT, run_file, out, *both, overrides=WINDOWS).check()
    assert "begin afresh" not in second.outputs[0]
    resumed = next(line for line in second.outputs[0].splitlines() if f"no checkpoint under {saved}" in line)
    assert f"the jobs go on from {out / 'state'}" in resumed
    assert "iterations count from 0" in resumed


def test_ranks_that_do_not_see_the_same_checkpoint_end_with_one_line(run_file, tmp_path):
    two = ("--pipeline-model-parallel-size", "2")
    save = ("--save", str(tmp_path / "load0"), "--save-interval", "1", "--exit-interval", "1")
    pretrain(SCRIPT, run_file, tmp_path / "first", *save, *two, world=2, overrides=WINDOWS).check()
    (tmp_path / "load1").mkdir()
    load = ("--load", str(tmp_path / "LOAD"), "--distributed-timeout-minutes", "1")
    finished = pretrain(SCRIPT, run_file, tmp_path / "second", *load, *two, world=2, overrides=WINDOWS, run=run_loading)
    assert finished.statuses == (2, 2)
    (error,) = errors(finished.outputs[0])
    assert error.startswith("lorafusion-megatron: error: --load: rank 0 finds iteration 1, rank 1 no checkpoint; ")


def test_a_signal_before_megatrons_loop_ends_the_run_as_stopped(run_file, tmp_path):
    out = tmp_path / "out"
    pretrain(SCRIPT, run_file, out, overrides=WINDOWS).check()
    assert state(out) == "done"
    stopped = pretrain(SCRIPT, run_file, out, "--exit-signal-handler", run=run_and_stop_while_it_settles).check()
    assert "stopped by a signal; the state is saved" in stopped.outputs[0]
    assert "every job has ended already" not in stopped.outputs[0]
    assert state(out) == "stopped"
    again = pretrain(SCRIPT, run_file, out, overrides=WINDOWS).check()
    assert "every job has ended already" in again.outputs[0]
    assert state(out) == "done"


def test_a_model_provider_that_builds_another_model_is_refused(run_file, tmp_path):
    finished = pretrain(PROVIDER_SCRIPT, run_file, tmp_path / "out", run=run_clamped)
    assert finished.statuses == (2,)
    (error,) = errors(finished.outputs[0])
    assert error == (
        "lorafusion-megatron: error: TransformerConfig.activation_func_clamp_value: activation_func_clamp_value is 0.1 "
        "in the model; the base model needs another value; set it to None where the model is built"
    )
    assert not (tmp_path / "out").exists()


def test_overrides_in_two_places_are_both_obeyed(run_file, tmp_path):
    more = ("--lorafusion-set", "jobs[0].train.train_iters=2", "--lorafusion-set", "jobs[1].train.train_iters=3")
    pretrain(SCRIPT, run_file, tmp_path / "out", *more).check()
    assert [len(tiny.losses(tmp_path / "out", name)) for name in ("first", "second")] == [2, 3]
