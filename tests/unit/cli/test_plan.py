"""The ``plan`` command from the run file to its figures and pictures."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from lorafusion_megatron.cli.main import main
from tests.unit.tiny_inputs import Case, make_case

FIGURES = {"microbatches", "noops", "fill", "predicted_seconds", "bubble_share", "split_bound", "lemma_bound"}


@pytest.fixture
def case(tmp_path: Path) -> Case:
    return make_case(tmp_path)


def plan(case: Case, capsys: pytest.CaptureFixture[str], *words: str) -> dict:  # type: ignore[type-arg]
    assert main(["plan", str(case.write()), "--json", *words]) == 0
    out, err = capsys.readouterr()
    assert err == ""
    return json.loads(out)  # type: ignore[no-any-return]


def lengths_file(case: Case, **lengths: list[int]) -> str:
    path = case.folder / "lengths.json"
    path.write_text(json.dumps(lengths))
    return str(path)


def test_json_has_the_figures_of_all_three_schedules(case: Case, capsys: pytest.CaptureFixture[str]) -> None:
    figures = plan(case, capsys, "model.pipeline_model_parallel_size=2")
    assert set(figures) == {"planning_seconds", "staggered", "round_robin", "sequential"}
    for kind in ("staggered", "round_robin", "sequential"):
        assert set(figures[kind]) == FIGURES
        assert 0 <= figures[kind]["bubble_share"] < 1
        assert 0 < figures[kind]["fill"] <= 1
    # Every step of every job flushes the pipeline: 4 + 5 steps, so 8 gaps of one no-op.
    assert figures["sequential"]["noops"] == 8
    assert figures["sequential"]["bubble_share"] > figures["staggered"]["bubble_share"]
    assert not (case.folder / "out").exists()


def test_given_lengths_replace_the_data(case: Case, capsys: pytest.CaptureFixture[str]) -> None:
    (case.folder / "data" / "first.jsonl").unlink()
    # Steps of 3 x 20 tokens and of 2 x 30 in microbatches of 64: one each, 4 + 3 of them.
    file = lengths_file(case, first=[20] * 6, second=[30, 30, 30])
    figures = plan(case, capsys, "--lengths", file)
    assert figures["staggered"]["microbatches"] == 7
    assert figures["staggered"]["fill"] == pytest.approx(60 / 64)


def test_text_tells_layout_jobs_and_schedules(case: Case, capsys: pytest.CaptureFixture[str]) -> None:
    file = lengths_file(case, first=[20, 20], second=[30, 30, 30])
    assert main(["plan", str(case.write()), "--lengths", file, "model.pipeline_model_parallel_size=2"]) == 0
    out = capsys.readouterr().out
    assert "2 stages of layers [2, 2]" in out
    rows = [line.split() for line in out.splitlines()]
    assert ["first", "2", "240", "3", "4", "4"] in rows
    assert [row[0] for row in rows if row and row[0] in ("staggered", "round_robin", "sequential")] == [
        "staggered",
        "round_robin",
        "sequential",
    ]
    assert "note: first: a global batch of 3 takes some of the 2 rows more than once" in out


def test_a_worse_layout_is_told(case: Case, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["model.pipeline_model_parallel_size=2", "model.pipeline_layout=[1,3]"]
    assert main(["plan", str(case.write()), *words]) == 0
    assert "note: model.pipeline_layout: layers [2, 2] instead of [1, 3] would make" in capsys.readouterr().out


def test_pictures_are_written(case: Case, capsys: pytest.CaptureFixture[str]) -> None:
    gantt, trace = case.folder / "plan.html", case.folder / "plan.json"
    plan(case, capsys, "--gantt", str(gantt), "--trace", str(trace))
    assert "<canvas" in gantt.read_text()
    assert json.loads(trace.read_text())["traceEvents"]


def test_windows_end_where_a_validation_is_due(case: Case, capsys: pytest.CaptureFixture[str]) -> None:
    case.run["jobs"][0]["eval"] = {"path": case.run["jobs"][1]["dataset"]["path"], "interval": 2}
    assert main(["plan", str(case.write())]) == 0
    assert "planned 2 windows" in capsys.readouterr().out, "4 steps of the first job"


def test_windows_follow_the_budget(case: Case, capsys: pytest.CaptureFixture[str]) -> None:
    # One token capacity a window: a step of each job; the second job, which has 5 to the other's 4, takes 2 once.
    assert main(["plan", str(case.write()), "runtime.max_window_microbatches=1"]) == 0
    assert "planned 4 windows" in capsys.readouterr().out


def test_replicas_share_the_work(case: Case, capsys: pytest.CaptureFixture[str]) -> None:
    file = lengths_file(case, first=[40] * 6, second=[40, 40])
    one = plan(case, capsys, "--lengths", file)
    two = plan(case, capsys, "--lengths", file, "--replicas", "2")
    assert two["staggered"]["microbatches"] == one["staggered"]["microbatches"]
    assert two["staggered"]["predicted_seconds"] < 0.7 * one["staggered"]["predicted_seconds"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "can't be read"),
        ("{", "can't be read"),
        pytest.param("[" * 100_000, "can't be read", id="deep"),
        ('{"first": [1]}', "holds first; --lengths takes"),
        ('{"first": [1], "second": []}', "the lengths of second; they are whole numbers from 1"),
        ('{"first": [1], "second": [0]}', "the lengths of second; they are whole numbers from 1"),
        ('{"first": [1], "second": [true]}', "the lengths of second"),
        ('{"first": [1], "second": [1], "first": [2]}', "can't be read (key 'first' comes twice)"),
        ('{"first": [1, 65], "second": [1]}', "a sample of 65 tokens in first; a microbatch holds 64 tokens"),
    ],
)
def test_bad_lengths_end_in_one_line(
    case: Case, capsys: pytest.CaptureFixture[str], content: str | None, message: str
) -> None:
    file = case.folder / "lengths.json"
    if content is not None:
        file.write_text(content)
    assert main(["plan", str(case.write()), "--lengths", str(file)]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert message in err
    assert err.count("\n") == 1


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--gantt", "plan.pdf"], "must end in .png or .html"),
        (["--trace", "no/such/plan.json"], "its folder must exist"),
        (["--replicas", "0"], "replicas 0; it must be at least 1"),
        (["--cost-model", "missing.json"], "a cost model is the JSON file"),
        (["model.pipeline_model_parallel_size=9"], "every stage needs a layer"),
    ],
)
def test_bad_arguments_end_in_one_line(
    case: Case, capsys: pytest.CaptureFixture[str], words: list[str], message: str
) -> None:
    assert main(["plan", str(case.write()), *words]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert message in err
    assert err.count("\n") == 1


@pytest.mark.parametrize("rate", ["1e308", "1" + "0" * 400], ids=["1e308", "10**400"])
def test_a_cost_model_of_absurd_rates_is_one_line(case: Case, capsys: pytest.CaptureFixture[str], rate: str) -> None:
    file = case.folder / "cost.json"
    file.write_text(f'{{"forward": {{"layer_token": {rate}}}, "backward": {{"layer_token": {rate}}}}}')
    assert main(["plan", str(case.write()), "--cost-model", str(file)]) == 2
    out, err = capsys.readouterr()
    assert (out, err.count("\n")) == ("", 1)
    assert "--cost-model: " in err
    assert "forward.layer_token is 1" in err


@pytest.mark.parametrize("rate", ["1e-18", "1e6"])
def test_the_smallest_and_the_largest_rates_make_a_plan(
    case: Case, capsys: pytest.CaptureFixture[str], rate: str
) -> None:
    file = case.folder / "cost.json"
    file.write_text(f'{{"forward": {{"layer_square": {rate}}}, "backward": {{"layer_token": {rate}}}}}')
    plan(case, capsys, "--cost-model", str(file), "model.pipeline_model_parallel_size=2")


@pytest.mark.parametrize("option", ["--gantt", "--trace"])
def test_a_folder_in_the_place_of_a_picture_is_told_before_planning(
    case: Case, capsys: pytest.CaptureFixture[str], option: str
) -> None:
    folder = case.folder / ("plan.png" if option == "--gantt" else "plan.json")
    folder.mkdir()
    assert main(["plan", str(case.write()), option, str(folder)]) == 2
    assert "it must be a file, and is a folder" in capsys.readouterr().err


@pytest.mark.parametrize("option", ["--gantt", "--trace"])
def test_a_picture_that_can_not_be_written_is_one_line_after_the_figures(
    case: Case, capsys: pytest.CaptureFixture[str], option: str
) -> None:
    full = case.folder / ("full.html" if option == "--gantt" else "full.json")
    full.symlink_to("/dev/full")
    assert main(["plan", str(case.write()), "--json", option, str(full)]) == 2
    out, err = capsys.readouterr()
    assert json.loads(out)["staggered"]
    assert err.count("\n") == 1
    assert f"{option}: {full} can't be written (No space left on device)" in err
    assert main(["plan", str(case.write()), option, str(full.with_stem("n" * 260))]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.count("\n") == 1
    assert "can't be written (File name too long)" in err


def test_it_runs_where_torch_can_not_be_imported(case: Case) -> None:
    script = (
        "import sys\n"
        "class Missing:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        "        if name.split('.')[0] in ('torch', 'megatron', 'triton'):\n"
        "            raise ModuleNotFoundError(name)\n"
        "sys.meta_path.insert(0, Missing())\n"
        "from lorafusion_megatron.cli.main import main\n"
        f"assert main(['plan', {str(case.write())!r}, '--json']) == 0\n"
        "assert 'torch' not in sys.modules\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["staggered"]["microbatches"] == 6
