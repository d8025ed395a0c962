"""What the documentation tells people to do is done as it stands, page by page, and every shipped run file trains.

Commands run in a folder that has `configs/` and a small model under the name that the run files use; ranks are forks of
one process instead of new interpreters (see `tests.launch`), nothing else differs.
"""

import os
import shlex
from pathlib import Path

import pytest

from lorafusion_megatron.config import load_run
from tests.launch import Finished, Ranks, command
from tests.unit.docs.test_docs import ALL, ROOT, Block
from tests.unit.tiny_inputs import write_model, write_tokenizer

PAGES = sorted({block.page for block in ALL if block.marker == "run"})
RUN_BY_PAGES = {"quickstart", "pipeline", "tensor_parallel", "chat"}
TORCHRUN = ["torchrun", "--standalone", "--nproc-per-node"]


def make_place(folder: Path) -> Path:
    """A folder in which the pages' commands work."""
    (folder / "configs").symlink_to(ROOT / "configs")
    for name in ("SmolLM2-135M-Instruct", "Llama-3.2-1B-Instruct"):
        write_tokenizer(write_model(folder / "models" / name, max_position_embeddings=2048))
    return folder


def in_folder(folder: str, words: list[str]) -> int:
    """A command of the package, in a rank that works in ``folder``; without torchrun where it is the only one."""
    os.chdir(folder)
    if os.environ["WORLD_SIZE"] == "1":
        for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
            del os.environ[name]
    return command(words)


def run_code(folder: str, text: str) -> int:
    """A page's Python, in a process that works in ``folder``."""
    os.chdir(folder)
    exec(compile(text, "page", "exec"), {"__name__": "__main__"})
    return 0


def start(place: Path, line: str) -> Finished:
    """Do what a command line says."""
    words = shlex.split(line)
    if words[: len(TORCHRUN)] == TORCHRUN:
        world, module = int(words[3]), words[4:6]
        assert module == ["-m", "lorafusion_megatron.train"]
        words = ["train", *words[6:]]
    else:
        assert words[0] == "lorafusion-megatron"
        world, words = 1, words[1:]
    ranks = Ranks(in_folder, (str(place), words), world=world, folder=place / "logs")
    return ranks.wait(120.0).check()


def do(place: Path, block: Block) -> None:
    """Do what a block says."""
    if block.language == "python":
        Ranks(run_code, (str(place), block.text), world=1, folder=place / "logs").wait(120.0).check()
        return
    for line in block.commands:
        start(place, line)


@pytest.mark.parametrize("page", PAGES)
def test_a_page_works_as_it_stands(page: str, tmp_path: Path) -> None:
    place = make_place(tmp_path)
    for block in ALL:
        if block.page == page and block.marker == "run":
            do(place, block)
    made = {
        "index.md": ["runs/quickstart/summaries/adapter_model.safetensors", "merged/config.json"],
        "tutorials/torchrun.md": ["runs/pipeline/trace.json", "runs/tensor/metrics.jsonl", "runs/tracked/tb"],
        "tutorials/slurm.md": ["train.sbatch"],
        "tutorials/from_peft.md": ["runs/chat/harbour/losses.json", "harbour_step_15/adapter_config.json"],
    }
    assert [name for name in made.get(page, []) if not (place / name).exists()] == []


@pytest.mark.parametrize("path", sorted((ROOT / "configs").glob("*.yaml")), ids=lambda path: path.stem)
def test_a_shipped_run_file_is_planned(path: Path, tmp_path: Path) -> None:
    place = make_place(tmp_path)
    overrides = ""
    if path.stem == "continue_adapter":
        overrides = "jobs.harbour.peft.init_from=null"
    finished = start(place, f"lorafusion-megatron plan configs/{path.name} {overrides}")
    assert "staggered" in finished.outputs[0]


@pytest.mark.parametrize("name", ["tokenized", "cluster", "reference"])
def test_a_run_file_that_no_page_runs_trains(name: str, tmp_path: Path) -> None:
    place = make_place(tmp_path)
    world = {"cluster": 4}.get(name, 1)
    jobs = range(len(load_run(ROOT / "configs" / f"{name}.yaml").jobs))
    short = " ".join(f"jobs[{index}].train.train_iters=11" for index in jobs)
    line = f"configs/{name}.yaml checkpoint.save=runs/x {short}"
    start(place, f"torchrun --standalone --nproc-per-node {world} -m lorafusion_megatron.train {line}")
    assert list(place.glob("runs/x/*/adapter_model.safetensors"))


def test_an_adapter_of_one_run_file_is_where_another_goes_on(tmp_path: Path) -> None:
    place = make_place(tmp_path)
    start(place, "lorafusion-megatron train configs/chat.yaml jobs.harbour.train.epochs=2")
    start(place, "lorafusion-megatron validate configs/continue_adapter.yaml")
    start(place, "lorafusion-megatron train configs/continue_adapter.yaml")
    assert (place / "runs/continued/harbour/adapter_model.safetensors").is_file()


def test_every_shipped_run_file_is_trained_by_a_test() -> None:
    shipped = {path.stem for path in (ROOT / "configs").glob("*.yaml")}
    assert shipped == RUN_BY_PAGES | {"tokenized", "cluster", "reference", "continue_adapter"}
    text = "\n".join(block.text for block in ALL if block.marker == "run")
    assert [name for name in RUN_BY_PAGES if f"train configs/{name}.yaml" not in text] == []
