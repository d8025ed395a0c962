"""The demo's data are what its generator writes, held-out rows are new, and the verdict is fair."""

import importlib.util
import json
from pathlib import Path
from types import ModuleType

import pytest

DEMO = Path(__file__).parents[3] / "scripts" / "demo"
JOBS = ("pirate", "orders", "telegram")


def script(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"demo_{name}", DEMO / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def rows_of(job: str, suffix: str) -> list[list[dict[str, str]]]:
    lines = (DEMO / "data" / f"{job}{suffix}.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line)["messages"] for line in lines]


@pytest.mark.parametrize("job", JOBS)
def test_data_are_what_the_generator_writes(job: str) -> None:
    make_data = script("make_data")
    for suffix, held_out in (("", False), (".held_out", True)):
        assert [row["messages"] for row in make_data.rows(job, held_out=held_out)] == rows_of(job, suffix)


@pytest.mark.parametrize("job", JOBS)
def test_no_held_out_answer_is_trained_on(job: str) -> None:
    trained, held_out = rows_of(job, ""), rows_of(job, ".held_out")
    assert 60 <= len(trained) <= 120
    assert 12 <= len(held_out) <= 20
    for index in (0, 1):
        texts = [{row[index]["content"] for row in rows} for rows in (trained, held_out)]
        assert not texts[0] & texts[1]
    assert len({row[0]["content"] for row in trained}) == len(trained)


def test_each_job_has_the_behaviour_that_it_promises() -> None:
    make_data = script("make_data")
    for suffix in ("", ".held_out"):
        for question, answer in rows_of("orders", suffix):
            fields = json.loads(answer["content"])
            assert list(fields) == ["name", "city", "goods", "count", "day"]
            assert all(str(value) in question["content"] for value in fields.values())
        for _, answer in rows_of("telegram", suffix):
            assert answer["content"].isupper()
            assert answer["content"].endswith(" STOP")
        for _, answer in rows_of("pirate", suffix):
            assert answer["content"].startswith(make_data.PIRATE_OPENERS)
            assert answer["content"].endswith(make_data.PIRATE_CLOSERS)


def test_an_adapter_passes_only_if_it_is_best_and_a_quarter_under_the_base_model() -> None:
    judge = script("evaluate").judge
    losses = {
        "base model": {"pirate": 4.0, "orders": 2.0, "telegram": 4.0},
        "pirate": {"pirate": 1.0, "orders": 2.0, "telegram": 3.0},
        "orders": {"pirate": 4.0, "orders": 1.6, "telegram": 1.0},
        "telegram": {"pirate": 4.0, "orders": 2.0, "telegram": 1.5},
    }
    assert judge(losses) == {
        "pirate": {"gain": 0.75, "best": True},
        "orders": {"gain": pytest.approx(0.2), "best": True},
        "telegram": {"gain": 0.625, "best": False},
    }


def test_the_model_is_kept_in_the_users_cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    prepare = script("prepare")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert prepare.model_folder() == tmp_path / "lorafusion_megatron" / "smollm2-135m-instruct"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert prepare.model_folder().parents[2] == tmp_path / "home"


def test_a_kept_model_is_used_without_a_download(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    prepare = script("prepare")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(prepare, "download", lambda _: pytest.fail("downloaded again"))
    prepare.model_folder().mkdir(parents=True)
    (prepare.model_folder() / "config.json").write_text("{}")
    prepare.main()
    assert capsys.readouterr().out.strip() == str(prepare.model_folder())


def test_an_interrupted_preparation_leaves_nothing(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    prepare = script("prepare")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(prepare, "download", lambda folder: folder / "model.gguf")

    def interrupted(_: Path, target: Path) -> None:
        target.mkdir()
        (target / "config.json").write_text("{}")
        raise KeyboardInterrupt

    monkeypatch.setattr(prepare, "convert", interrupted)
    with pytest.raises(KeyboardInterrupt):
        prepare.main()
    assert list((tmp_path / "lorafusion_megatron").iterdir()) == []
