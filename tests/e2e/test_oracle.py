"""Every topology gives each job the adapter that Transformers + PEFT give it when they train it alone.

The oracle (`tests/oracle/peft_oracle.py`) imports nothing of this package and nothing of Megatron.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests import launch
from tests.oracle.case import TOLERANCE, OracleCase, make_case

ARCHITECTURES = ("llama", "mistral", "qwen2", "qwen3")
PP2 = "model.pipeline_model_parallel_size=2"
TP2 = "model.tensor_model_parallel_size=2"
SP = "model.sequence_parallel=true"
FULL = "model.recompute_granularity=full"
TOPOLOGIES = {
    "one process": (1, []),
    "PP2": (2, [PP2]),
    "TP2": (2, [TP2]),
    "TP2 SP": (2, [TP2, SP]),
    "DP2": (2, []),
    "PP2 TP2": (4, [PP2, TP2]),
}
VARIANTS = {
    "PP2 interleaved": (2, [PP2, "model.virtual_pipeline_model_parallel_size=2"]),
    "full recompute": (1, [FULL]),
    "selective recompute": (1, ["model.recompute_granularity=selective"]),
    "PP2 full recompute": (2, [PP2, FULL]),
    "TP2 SP full recompute": (2, [TP2, SP, FULL]),
    "PP2 TP2 SP": (4, [PP2, TP2, SP]),
    "PP2 DP2": (4, [PP2]),
    "TP2 DP2": (4, [TP2]),
}
SETTINGS = {
    "round robin": (2, [PP2, "runtime.schedule=round_robin"]),
    "sequential": (2, [PP2, "runtime.schedule=sequential"]),
    "short windows": (2, [PP2, "runtime.max_window_microbatches=4"]),
    "short windows, interleaved": (
        2,
        [PP2, "model.virtual_pipeline_model_parallel_size=2", "runtime.max_window_microbatches=4"],
    ),
    "PP4": (4, ["model.pipeline_model_parallel_size=4"]),
    "DP4": (4, []),
    "PP2 interleaved DP2": (4, [PP2, "model.virtual_pipeline_model_parallel_size=2"]),
    "padded rows": (2, [TP2, SP, "runtime.padding_multiple=24"]),
    "uneven stages": (2, [PP2, "model.pipeline_layout=[3,1]"]),
    "a stage with the embedding alone": (2, [PP2, "model.pipeline_layout=[0,4]"]),
    "a stage with the output layer alone": (2, [PP2, "model.pipeline_layout=[4,0]"]),
}


@pytest.fixture(scope="session")
def cases(tmp_path_factory) -> "Cases":
    """The cases that were made so far."""
    return Cases(tmp_path_factory.mktemp("oracle"))


class Cases:
    """Makes each case when it is first asked for: the oracle trains it once for all topologies."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.made: dict[tuple[str, bool], OracleCase] = {}

    def get(self, arch: str, tied: bool) -> OracleCase:
        """The case of an architecture, with the output layer tied to the embedding or not."""
        if (arch, tied) not in self.made:
            folder = self.folder / f"{arch}{'_tied' if tied else ''}"
            seed = 2 * ARCHITECTURES.index(arch) + tied
            self.made[arch, tied] = make_case(folder, arch=arch, tied=tied, seed=seed)
        return self.made[arch, tied]


def _error(case: OracleCase, out: Path, world: int, words: list[str]) -> float:
    launch.train(case.run_file, f"checkpoint.save={out}", *words, world=world)
    return case.error(out)


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("arch", ARCHITECTURES)
@pytest.mark.parametrize("topology", TOPOLOGIES)
def test_adapters_and_losses_equal_those_of_training_each_job_alone_in_peft(
    cases, tmp_path, measured, arch, tied, topology
):
    error = _error(cases.get(arch, tied), tmp_path / "out", *TOPOLOGIES[topology])
    assert measured(error) <= TOLERANCE


@pytest.mark.parametrize("arch", ["llama", "qwen3"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_interleaving_recompute_and_combined_topologies_equal_peft(cases, tmp_path, measured, arch, variant):
    error = _error(cases.get(arch, tied=False), tmp_path / "out", *VARIANTS[variant])
    assert measured(error) <= TOLERANCE


@pytest.mark.parametrize("setting", SETTINGS)
def test_orders_windows_padding_and_layouts_equal_peft(cases, tmp_path, measured, setting):
    error = _error(cases.get("llama", tied=False), tmp_path / "out", *SETTINGS[setting])
    assert measured(error) <= TOLERANCE


def test_torchrun_trains_the_same_adapters(cases, tmp_path):
    """The command of the README; over several windows, so that a process of its own plans ahead."""
    case = cases.get("llama", tied=False)
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--standalone"]
    overrides = [PP2, "runtime.max_window_microbatches=8", f"checkpoint.save={tmp_path / 'out'}"]
    done = subprocess.run(
        [*torchrun, "-m", "lorafusion_megatron.train", str(case.run_file), *overrides],
        cwd=tmp_path,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=180,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    assert case.error(tmp_path / "out") <= TOLERANCE
    assert "job0 step 6/6" in done.stdout
    assert done.stdout.count("window done in") > 1
