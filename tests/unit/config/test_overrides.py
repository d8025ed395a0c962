"""Trailing key=value overrides."""

import copy
from pathlib import Path
from typing import Any

import pytest

from lorafusion_megatron.config import load_run
from lorafusion_megatron.config.loader import apply_override
from lorafusion_megatron.errors import UserError

RUN: dict[str, Any] = {
    "runtime": {"seed": 1},
    "jobs": [{"name": "a", "peft": {"r": 4}}, {"name": "a.b", "peft": {"r": 8}}, {"name": "c"}],
    "logger": None,
}


def changed(override: str) -> Any:
    """RUN with an override; RUN itself stays."""
    before = copy.deepcopy(RUN)
    after = apply_override(RUN, override)
    assert before == RUN
    return after


def test_values_are_yaml() -> None:
    assert changed("runtime.seed=2")["runtime"] == {"seed": 2}
    assert changed("runtime.x=2e-4")["runtime"] == {"seed": 1, "x": 2e-4}
    assert changed("runtime.x=[a, 1]")["runtime"]["x"] == ["a", 1]
    assert changed("runtime.x=")["runtime"]["x"] is None
    assert changed("runtime.x=a=b")["runtime"]["x"] == "a=b"
    assert changed("runtime={}")["runtime"] == {}
    assert changed("logger.log_interval=5")["logger"] == {"log_interval": 5}
    assert changed("checkpoint.save=out")["checkpoint"] == {"save": "out"}


def test_jobs_by_index_and_by_name() -> None:
    assert changed("jobs[1].peft.r=2")["jobs"][1]["peft"] == {"r": 2}
    assert changed("jobs.a.peft.r=2")["jobs"][0]["peft"] == {"r": 2}
    assert changed("jobs.a.b.peft.r=2")["jobs"][1]["peft"] == {"r": 2}, "the longest name that fits"
    assert changed("jobs.c={name: d}")["jobs"][2] == {"name": "d"}
    assert changed("jobs[0]={name: d}")["jobs"][0] == {"name": "d"}
    assert changed("jobs=[]")["jobs"] == []


def test_the_other_spelling_makes_room() -> None:
    assert changed("jobs.a.peft.dim=2")["jobs"][0]["peft"] == {"dim": 2}


def test_yaml_aliases_are_not_changed_together(tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text(
        "base_model: {path: base}\n"
        "jobs:\n"
        "- &job {name: one, dataset: {path: x}, peft: &peft {r: 4}, train: {global_batch_size: 1, train_iters: 1}}\n"
        "- {<<: *job, name: two}\n"
        "checkpoint: {save: out}\n"
    )
    run = load_run(path, ["jobs.one.peft.r=8"])
    assert [job.peft.r for job in run.jobs] == [8, 4]


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("seed", "no key=value"),
        ("=1", "no key=value"),
        ("a..b=1", "is not a key"),
        ("jobs[-1].x=1", "is not a key"),
        ("jobs[0=1", "is not a key"),
        ("jobs[3].x=1", "it has 3 entries"),
        ("runtime[0]=1", "it is no list"),
        ("runtime.seed.x=1", "only sections have keys"),
        ("jobs.x.peft=1", "no job is called 'x'"),
        ("runtime.x={", "plain YAML"),
    ],
)
def test_mistakes(override: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        apply_override(RUN, override)
