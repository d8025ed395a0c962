"""What ``validate`` reports of runs that are good."""

from pathlib import Path

import pytest

from lorafusion_megatron.cli.main import COMMANDS, main
from tests.unit.tiny_inputs import Case, id_rows, make_case, write_rows


@pytest.fixture
def case(tmp_path: Path) -> Case:
    return make_case(tmp_path)


def notes(case: Case, capsys: pytest.CaptureFixture[str], *overrides: str) -> list[str]:
    """The notes of a good run, with the case's folder left out."""
    assert main(["validate", str(case.write()), *overrides]) == 0
    out, err = capsys.readouterr()
    assert err == ""
    assert not (case.folder / "out").exists()
    lines = out.replace(f"{case.folder}/", "").splitlines()
    return [line.removeprefix("note: ") for line in lines if line.startswith("note: ")]


def test_a_plain_run_has_no_notes(case: Case, capsys: pytest.CaptureFixture[str]) -> None:
    assert notes(case, capsys) == []


def test_rows_that_train_nothing_are_counted(case: Case, capsys: pytest.CaptureFixture[str]) -> None:
    write_rows(case.rows, [*id_rows(3), {"prompt_ids": [5], "completion_ids": []}])
    assert notes(case, capsys) == ["first: 1 of 4 rows of data/first.jsonl have no label token and train nothing"]


def test_rows_truncated_until_no_label_token_was_left_are_counted(
    case: Case, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [{"prompt_ids": [5] * prompt, "completion_ids": [6] * 4} for prompt in (3, 8, 12, 3)]
    write_rows(case.rows, rows)
    assert notes(case, capsys, "jobs[0].max_length=10", "jobs[0].dataset.truncate=true") == [
        "first: 1 of 4 rows of data/first.jsonl have no label token and train nothing",
        "first: 2 rows of data/first.jsonl were cut to max_length",
    ]


def test_what_the_chat_template_never_mentions_is_told_once(case: Case, capsys: pytest.CaptureFixture[str]) -> None:
    thought = {"role": "assistant", "content": "a", "reasoning_content": "hm"}
    rows = [{"messages": [{"role": "user", "content": "q"}, thought], "tools": [{"name": "f"}]}] * 3
    write_rows(case.rows, rows)
    assert notes(case, capsys) == [
        "first: rows of data/first.jsonl have reasoning_content, tools, which the chat template never mentions: "
        "nothing is trained of it"
    ]


def test_a_job_of_one_step_whose_rate_is_zero_is_told(case: Case, capsys: pytest.CaptureFixture[str]) -> None:
    one_step = ("jobs.first.train.train_iters=1", "jobs.first.scheduler=null")
    assert notes(case, capsys, *one_step) == []
    cosine = "jobs.first.scheduler={lr_decay_style: cosine}"
    assert notes(case, capsys, *one_step, cosine, "jobs.first.scheduler.min_lr=1e-5") == []
    (note,) = notes(case, capsys, *one_step, cosine)
    assert note.startswith("first: its one step trains nothing: cosine decay ends at min_lr 0")


def test_a_batch_larger_than_the_data_set_is_told(case: Case, capsys: pytest.CaptureFixture[str]) -> None:
    assert notes(case, capsys, "jobs.second.train.global_batch_size=6", "jobs.second.scheduler=null") == [
        "second: a global batch of 6 takes some of the 5 rows more than once"
    ]


def test_sequence_parallel_without_tensor_parallel_is_told(case: Case, capsys: pytest.CaptureFixture[str]) -> None:
    assert notes(case, capsys, "model.sequence_parallel=true") == [
        "model.sequence_parallel has no effect with tensor_model_parallel_size 1"
    ]


def test_validation_rows_are_checked_and_reported(case: Case, capsys: pytest.CaptureFixture[str]) -> None:
    path = write_rows(case.folder / "held_out.jsonl", [*id_rows(2), {"prompt_ids": [5], "completion_ids": []}])
    overrides = [f"jobs[1].eval.path={path}", "jobs[1].eval.interval=2"]
    assert notes(case, capsys, *overrides) == [
        "second: 1 of 3 rows of held_out.jsonl have no label token and train nothing"
    ]
    write_rows(path, [*id_rows(2), {"prompt_ids": [5] * 60, "completion_ids": [6] * 5}])
    assert main(["validate", str(case.write()), *overrides]) == 2
    assert "jobs[1].eval.path: " in capsys.readouterr().err


def test_help_lists_the_commands_that_exist(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main(["--help"])
    assert stop.value.code == 0
    text = capsys.readouterr().out
    there = Path(__file__).parents[3] / "lorafusion_megatron" / "cli"
    for name, summary in COMMANDS.items():
        assert (f"    {name} " in text) == (there / f"{name}.py").is_file()
        assert (summary in " ".join(text.split())) == (there / f"{name}.py").is_file()


def test_help_of_a_command_shows_its_arguments(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main(["validate", "--help"])
    assert stop.value.code == 0
    text = capsys.readouterr().out
    assert "RUN.yaml" in text
    assert "override a key of the run file" in text


@pytest.mark.parametrize("section", ["dataset", "eval"])
def test_a_row_that_only_a_run_without_a_gpu_takes_is_told(
    section: str, case: Case, capsys: pytest.CaptureFixture[str]
) -> None:
    """A GPU pads 70 tokens to 128: where a run may take one it is told, where it must it is refused as by train."""
    long = write_rows(case.folder / "long.jsonl", [*id_rows(3), {"prompt_ids": [5] * 40, "completion_ids": [6] * 30}])
    words = [f"jobs.first.{section}.path={long}", "runtime.token_capacity=100", "runtime.device=auto"]
    words += ["jobs.first.eval.interval=1"] if section == "eval" else []
    assert notes(case, capsys, *words) == [
        "first: a GPU pads rows to 64, and a row of 70 tokens does not fit into token_capacity = 100 then: train "
        "refuses it there"
    ]
    assert notes(case, capsys, *words, "runtime.device=cpu") == []
    assert main(["validate", str(case.write()), *words, "runtime.device=cuda"]) == 2
    assert "rows are padded to a multiple of 64" in capsys.readouterr().err
