"""Loading run files: values, defaults, spellings, numbers, paths, seeds."""

import hashlib
from pathlib import Path
from typing import Any

import pytest
import yaml

from lorafusion_megatron.config import DatasetConfig, RunConfig, load_run
from lorafusion_megatron.config.job import RESERVED
from lorafusion_megatron.config.targets import HF_TARGETS
from lorafusion_megatron.config.yaml_reader import parse_yaml
from lorafusion_megatron.errors import UserError
from lorafusion_megatron.types import Topology
from tests.unit.fuzzing import fuzz_run_files

LEAST = """
base_model: {path: base}
jobs:
  - {name: one, dataset: {path: one.jsonl}, train: {global_batch_size: 4, train_iters: 10}}
  - {name: two.b, dataset: {path: two.jsonl}, train: {global_batch_size: 2, epochs: 1.5}}
checkpoint: {save: out}
"""


@pytest.fixture
def run_file(tmp_path: Path) -> Path:
    path = tmp_path / "run.yaml"
    path.write_text(LEAST)
    return path


def with_job(path: Path, **changes: Any) -> RunConfig:
    """The least run with the first job changed."""
    run = yaml.safe_load(LEAST)
    run["jobs"][0].update(changes)
    path.write_text(yaml.safe_dump(run))
    return load_run(path)


def test_defaults(run_file: Path) -> None:
    run = load_run(str(run_file))
    job = run.jobs[0]
    assert (run.base_model.dtype, run.base_model.trust_remote_code) == ("bfloat16", False)
    assert (run.model.chunks, run.model.sequence_parallel, run.model.pipeline_layout) == (1, False, "auto")
    assert (run.runtime.token_capacity, run.runtime.schedule, run.runtime.seed) == (8192, "staggered", 1234)
    assert run.runtime.padding_multiple is None
    assert (run.runtime.max_window_microbatches, run.runtime.distributed_timeout_minutes) == (512, 10.0)
    assert job.dataset == DatasetConfig(path=Path("one.jsonl"), shuffle=True, truncate=False, chat_template=None)
    assert (job.peft.r, job.peft.lora_alpha, job.peft.lora_dropout, job.peft.use_rslora) == (16, 32.0, 0.0, False)
    assert job.peft.target_modules == HF_TARGETS
    assert (job.optimizer.lr, job.optimizer.adam_beta1, job.optimizer.adam_beta2) == (2e-4, 0.9, 0.999)
    assert (job.optimizer.adam_eps, job.optimizer.weight_decay, job.optimizer.clip_grad) == (1e-8, 0.0, 1.0)
    assert (job.scheduler.lr_decay_style, job.scheduler.lr_warmup_iters, job.scheduler.min_lr) == ("constant", 0, 0.0)
    assert (job.train.train_iters, job.train.epochs, job.train.max_bad_steps) == (10, None, 3)
    assert (job.eval.path, job.max_length, job.seed) == (None, None, None)
    assert (run.checkpoint.save, run.checkpoint.keep, run.checkpoint.resume) == (Path("out"), 2, "auto")


def test_steps_of_epochs_round_up(run_file: Path) -> None:
    train = load_run(run_file).jobs[1].train
    assert [train.num_steps(rows) for rows in (1, 4, 5, 8)] == [1, 3, 4, 6]
    assert load_run(run_file).jobs[0].train.num_steps(99) == 10


@pytest.mark.parametrize(("epochs", "rows", "steps"), [(1.1, 50, 55), (0.1, 30, 3), (2.3, 100, 230), (1.15, 100, 115)])
def test_epochs_are_the_number_that_is_written(run_file: Path, epochs: float, rows: int, steps: int) -> None:
    train = (
        load_run(run_file, [f"jobs.two.b.train.epochs={epochs}", "jobs.two.b.train.global_batch_size=1"]).jobs[1].train
    )
    assert train.num_steps(rows) == steps


@pytest.mark.parametrize(
    ("written", "meant"),
    [("2e-4", 2e-4), ("2.0E-4", 2e-4), ("1", 1.0), (".5", 0.5), ("+3e1", 30.0), ("1_0.5", 10.5), ("5.", 5.0)],
)
def test_floats_as_people_write_them(run_file: Path, written: str, meant: float) -> None:
    lr = load_run(run_file, [f"jobs[0].optimizer.lr={written}"]).jobs[0].optimizer.lr
    assert (lr, type(lr)) == (meant, float)


@pytest.mark.parametrize(("written", "meant"), [("2e3", 2000), ("4096.0", 4096), ("0x100", 256), ("1_024", 1024)])
def test_whole_numbers_as_people_write_them(run_file: Path, written: str, meant: int) -> None:
    capacity = load_run(run_file, [f"runtime.token_capacity={written}"]).runtime.token_capacity
    assert (capacity, type(capacity)) == (meant, int)


@pytest.mark.parametrize(
    ("text", "meant"),
    [
        ("a: {<<: {r: 1, seed: 2}, r: 3}", {"a": {"r": 3, "seed": 2}}),
        ("a: &a {<<: {r: 1, s: 2}, r: 3}\nb: {<<: *a, t: 4}", {"a": {"r": 3, "s": 2}, "b": {"r": 3, "s": 2, "t": 4}}),
        ("a: [[&a {<<: {r: 1}, r: 3}]]\nb: {<<: *a}", {"a": [[{"r": 3}]], "b": {"r": 3}}),
        ("a: {<<: [{r: 1, seed: 1}, {r: 2, seed: 2, t: 2}]}", {"a": {"r": 1, "seed": 1, "t": 2}}),
        ("a: &a {<<: *a, r: 1}", {"a": {"r": 1}}),
    ],
)
def test_a_merge_leaves_a_sections_own_keys(text: str, meant: object) -> None:
    """Through two merges too, and where the merged section is read later than the one that merges it."""
    assert parse_yaml(text, source="run.yaml") == meant


@pytest.mark.parametrize("text", ["a: {<<: 3}", "a: {<<: [{}, [x]]}"])
def test_a_merge_of_something_else_is_an_error(text: str) -> None:
    with pytest.raises(UserError, match=r"<< merges something else than a section .* at line 1"):
        parse_yaml(text, source="run.yaml")


@pytest.mark.parametrize("name", ["010", "2024-01-01", "1.2.3", "_-", "A_b-C.d", "x" * 128])
def test_names_that_yaml_1_1_would_turn_into_something_else(run_file: Path, name: str) -> None:
    assert load_run(run_file, [f"jobs[0].name={name}"]).jobs[0].name == name


@pytest.mark.parametrize("name", [*RESERVED, "Run.Lock", "WandB", "Cost_Model.JSON", "earlier-2", "Earlier-", "\u212a"])
def test_names_of_what_a_run_writes_beside_the_jobs_are_refused(run_file: Path, name: str) -> None:
    with pytest.raises(UserError, match=r"jobs\[0\]\.name: .*nothing that begins with earlier-"):
        load_run(run_file, [f"jobs[0].name={name}"])


@pytest.mark.parametrize("name", ["earlier", "my-earlier-run", "run.lock2", "States"])
def test_names_that_only_look_like_those_are_taken(run_file: Path, name: str) -> None:
    assert load_run(run_file, [f"jobs[0].name={name}"]).jobs[0].name == name


def test_second_spellings(run_file: Path) -> None:
    peft = with_job(run_file, peft={"dim": 8, "alpha": 4, "dropout": 0.5}).jobs[0].peft
    assert (peft.r, peft.lora_alpha, peft.lora_dropout) == (8, 4.0, 0.5)
    assert with_job(run_file, peft={"dim": 8, "r": 8}).jobs[0].peft.r == 8
    with pytest.raises(UserError, match=r"jobs\[0\]\.peft\.lora_alpha: got 8\.0, and 4\.0 under its other spelling"):
        with_job(run_file, peft={"alpha": 4, "lora_alpha": 8})


def test_targets(run_file: Path) -> None:
    def targets(given: Any) -> tuple[str, ...]:
        return with_job(run_file, peft={"target_modules": given}).jobs[0].peft.target_modules

    assert targets("all-linear") == targets(["all-linear"]) == HF_TARGETS
    assert targets("linear_qkv") == ("linear_qkv",)
    assert targets(["linear_fc1", "q_proj", "o_proj"]) == ("linear_fc1", "q_proj", "o_proj")
    with pytest.raises(UserError, match="all-linear"):
        targets(["q_proj", "all-linear"])


def test_pipeline_layout(run_file: Path) -> None:
    sizes = ["model.pipeline_model_parallel_size=2", "model.virtual_pipeline_model_parallel_size=2"]
    assert load_run(run_file, [*sizes, "model.pipeline_layout=[3,3,3,1]"]).model.pipeline_layout == (3, 3, 3, 1)
    assert load_run(run_file, [*sizes, "model.pipeline_layout=auto"]).model.chunks == 4


def test_input_paths_lead_to_the_run_file_where_nothing_is_here(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    here, there = tmp_path / "here", tmp_path / "there"
    for folder in (here, there):
        folder.mkdir()
    (there / "run.yaml").write_text(LEAST)
    (there / "one.jsonl").touch()
    (there / "two.jsonl").touch()
    (there / "out").mkdir()
    (there / "chat.jinja").touch()
    (here / "two.jsonl").touch()
    monkeypatch.chdir(here)
    run = load_run("../there/run.yaml", ["jobs[0].dataset.chat_template=chat.jinja"])
    assert run.jobs[0].dataset.path == Path("../there/one.jsonl")
    assert run.jobs[0].dataset.chat_template == "../there/chat.jinja"
    assert run.jobs[1].dataset.path == Path("two.jsonl"), "the current directory comes first"
    assert run.base_model.path == Path("base"), "missing everywhere: as it was given"
    assert run.checkpoint.save == Path("out"), "output always goes where the command runs"
    inline = load_run("../there/run.yaml", ["jobs[0].dataset.chat_template='{{ x }}'"])
    assert inline.jobs[0].dataset.chat_template == "{{ x }}"


def test_home_folder_is_expanded(run_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/someone")
    assert load_run(run_file, ["checkpoint.save=~/runs"]).checkpoint.save == Path("/home/someone/runs")


def test_seeds_depend_on_the_name_and_never_on_the_place(run_file: Path) -> None:
    run = load_run(run_file)
    digest = hashlib.sha256(b"1234/one").digest()
    assert run.job_seed(0) == int.from_bytes(digest[:8], "little") % 2**63
    swapped = load_run(run_file, ["jobs[0].name=other", "jobs[1].name=one"])
    assert swapped.job_seed(1) == run.job_seed(0) != swapped.job_seed(0)
    assert load_run(run_file, ["runtime.seed=1"]).job_seed(0) != run.job_seed(0)
    assert load_run(run_file, ["runtime.seed=1", "jobs[0].seed=77"]).job_seed(0) == 77


def test_adapter_spec(run_file: Path) -> None:
    run = load_run(
        run_file,
        [
            "jobs[0].peft={r: 16, lora_alpha: 32, use_rslora: true, target_modules: [v_proj]}",
            "jobs[0].peft.layers_to_transform=[0, 3]",
        ],
    )
    adapter = run.adapter_spec(0)
    assert (adapter.name, adapter.rank, adapter.scaling, adapter.seed) == ("one", 16, 8.0, run.job_seed(0))
    assert (adapter.target_modules, adapter.layers_to_transform) == (("v_proj",), (0, 3))
    assert run.adapter_spec(1).scaling == 2.0


def test_topology(run_file: Path) -> None:
    run = load_run(
        run_file,
        ["model={tensor_model_parallel_size: 2, pipeline_model_parallel_size: 2, sequence_parallel: true}"],
    )
    assert run.topology(12) == Topology(tensor_parallel=2, pipeline_parallel=2, data_parallel=3, sequence_parallel=True)
    for ranks in (1, 2, 6):
        with pytest.raises(UserError, match="multiple of 4"):
            run.topology(ranks)
    alone = load_run(run_file, ["model.sequence_parallel=true"])
    assert not alone.topology(1).sequence_parallel, "without tensor parallelism there is nothing to split"


def test_a_recursive_document_is_refused_in_one_short_line(run_file: Path) -> None:
    run_file.write_text("base_model: &a [*a, *a]\n")
    with pytest.raises(UserError, match="base_model: got"):
        load_run(run_file)
    bomb = "a0: &a0 [x, x]\n" + "".join(f"a{n}: &a{n} [*a{n - 1}, *a{n - 1}]\n" for n in range(1, 60))
    run_file.write_text(bomb + "base_model: *a59\n")
    with pytest.raises(UserError) as error:
        load_run(run_file)
    assert len(str(error.value)) < 500


def test_a_run_file_as_long_as_a_data_set_is_refused(run_file: Path) -> None:
    run_file.write_text("# " + "x" * (1 << 22))
    with pytest.raises(UserError, match="at most 4194304"):
        load_run(run_file)


def test_generated_run_files_load_or_are_refused_in_one_line(tmp_path: Path) -> None:
    seen: list[str] = []
    fuzz_run_files(tmp_path, 200, count=seen.append)
    assert seen.count("loaded") >= 10
    assert seen.count("refused") >= 100
