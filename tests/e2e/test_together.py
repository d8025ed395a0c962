"""Jobs trained together are what each of them is alone, whatever the company, the packing and the topology."""

from pathlib import Path

import pytest

from tests import launch, tiny
from tests.oracle.case import TOLERANCE

PP2 = ["model.pipeline_model_parallel_size=2"]
TP2_SP = ["model.tensor_model_parallel_size=2", "model.sequence_parallel=true"]
FULL = ["model.recompute_granularity=full"]
TOPOLOGIES = {
    "one process": (1, []),
    "PP2": (2, PP2),
    "PP2 interleaved": (2, [*PP2, "model.virtual_pipeline_model_parallel_size=2"]),
    "TP2 SP full recompute": (2, [*TP2_SP, *FULL]),
    "DP2": (2, []),
    "PP2 full recompute": (2, [*PP2, *FULL]),
    "PP2 TP2 SP": (4, [*PP2, *TP2_SP]),
}


class Company:
    """Jobs of one base model, each of which was also trained alone, in one process."""

    def __init__(self, folder: Path, jobs: list[dict]) -> None:
        self.folder, self.jobs = folder, jobs
        self.run_file = tiny.write_run(folder, jobs)
        self.names = [job["name"] for job in jobs]
        words = [[str(tiny.write_run(folder / "alone" / job["name"], [job], base=folder / "base"))] for job in jobs]
        launch.Ranks(launch.train_in_turn, (words,), world=1, folder=folder / "alone").wait(240.0).check()

    def errors(self, out: Path) -> dict[str, float]:
        """Update error of each job's adapter and the error of its losses, the larger one."""
        found = {}
        for name in self.names:
            alone = self.folder / "alone" / name / "out"
            start = tiny.read(self.folder / "init" / name)
            found[name] = tiny.update_error(tiny.adapter(out, name), tiny.adapter(alone, name), start)
            got, want = tiny.losses(out, name), tiny.losses(alone, name)
            assert len(got) == len(want)
            found[name] = max(found[name], *(abs(a - b) / b for a, b in zip(got, want, strict=True)))
        return found


@pytest.fixture(scope="module", params=[0.0, 0.1], ids=["no dropout", "dropout 0.1"])
def company(request, tmp_path_factory) -> Company:
    """Five jobs that differ in everything: rank, alpha, targets, order, batch, length, end."""
    folder = tmp_path_factory.mktemp("company")
    tiny.write_base(folder / "base")
    dropout = {"lora_dropout": request.param}
    jobs = [
        tiny.job(folder, "a", r=4, alpha=8.0, batch=5, steps=4, seed=1, **dropout),
        tiny.job(folder, "b", r=1, alpha=3.0, batch=1, steps=9, seed=2, target_modules=["q_proj", "v_proj"], **dropout),
        tiny.job(folder, "c", r=16, alpha=16.0, batch=3, steps=6, seed=3, use_rslora=True, **dropout),
        tiny.job(folder, "d", r=8, alpha=24.0, batch=2, steps=3, seed=4, optimizer={"clip_grad": 0.05}, **dropout),
        tiny.job(folder, "e", r=2, alpha=1.0, batch=4, steps=5, seed=5, target_modules=["linear_qkv"], **dropout),
    ]
    jobs[2]["dataset"]["shuffle"] = True
    return Company(folder, jobs)


@pytest.mark.parametrize("topology", TOPOLOGIES)
def test_together_equals_alone(company, tmp_path, measured, topology):
    world, overrides = TOPOLOGIES[topology]
    launch.train(company.run_file, f"checkpoint.save={tmp_path / 'out'}", *overrides, world=world)
    errors = company.errors(tmp_path / "out")
    assert measured(max(errors.values())) <= TOLERANCE, errors


def test_dropout_changes_what_is_trained(tmp_path):
    """Guards the tests above: with the masks left out, the same jobs end elsewhere."""
    tiny.write_base(tmp_path / "base")
    jobs = [tiny.job(tmp_path, name, seed=1, lora_dropout=p) for name, p in (("with", 0.1), ("without", 0.0))]
    jobs[1]["dataset"] = jobs[0]["dataset"]
    launch.train(tiny.write_run(tmp_path, jobs))
    start = tiny.read(tmp_path / "init" / "with")
    assert (
        tiny.update_error(tiny.adapter(tmp_path / "out", "with"), tiny.adapter(tmp_path / "out", "without"), start)
        > 0.05
    )


def test_twenty_jobs_of_ranks_1_to_64_train_together_as_alone(tmp_path, measured):
    tiny.write_base(tmp_path / "base")
    ranks = [1, 2, 3, 4, 5, 6, 7, 8, 10, 12, 14, 16, 20, 24, 28, 32, 40, 48, 56, 64]
    jobs = [
        tiny.job(
            tmp_path,
            f"job{i}",
            r=rank,
            alpha=[rank, 16.0, 2.0 * rank, 7.5][i % 4],
            use_rslora=i % 5 == 0,
            lora_dropout=[0.0, 0.05, 0.3][i % 3],
            rows=5 + i % 4,
            batch=1 + i % 3,
            steps=2 + i % 3,
            seed=i,
        )
        for i, rank in enumerate(ranks)
    ]
    company = Company(tmp_path, jobs)
    launch.train(company.run_file, *PP2, "runtime.token_capacity=256", world=2)
    errors = company.errors(tmp_path / "out")
    assert len(errors) == 20
    assert measured(max(errors.values())) <= TOLERANCE, errors
