"""Choosing a product: measured once, kept on disk, robust against broken files and candidates that don't fit."""

import errno
import json
import stat
import warnings
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import triton

from lorafusion_megatron.kernels import tuning
from lorafusion_megatron.kernels.tuning import EXPAND, Problem, Tuner, expand_is_hopeless


def problem(**changes) -> Problem:
    values = {
        "tokens": 8192,
        "inner": 4096,
        "width": 4096,
        "columns": 16,
        "forward": True,
        "drop": True,
        "dtype": "bf16",
    }
    return Problem(**(values | changes))


@pytest.fixture
def milliseconds(monkeypatch) -> dict[str, float]:
    """Times by the name that a candidate returns."""
    times: dict[str, float] = {}
    monkeypatch.setattr(tuning, "_median_ms", lambda runs: {name: times[run()] for name, run in runs.items()})
    return times


class Gpu:
    """Stands in for torch.cuda: work is done as it is queued, and a run moves the clock."""

    def __init__(self):
        self.now = 0.0

    def current_stream(self):
        return SimpleNamespace(synchronize=lambda: None)

    def _sleep(self, cycles):
        assert cycles > 0

    def Event(self, *, enable_timing):
        gpu = self

        class Event:
            def record(self):
                self.at = gpu.now

            def elapsed_time(self, end):
                return end.at - self.at

        return Event()


def test_candidates_run_in_turn_and_the_first_rounds_do_not_count(monkeypatch):
    gpu, order = Gpu(), []
    monkeypatch.setattr(tuning.torch, "cuda", gpu)

    def run(name, milliseconds):
        order.append(name)
        slow_start = 5.0 if len(order) <= 2 * tuning.WARM_ROUNDS else 1.0
        gpu.now += milliseconds * slow_start

    times = tuning._median_ms({"a": lambda: run("a", 2.0), "b": lambda: run("b", 3.0)})
    assert times == pytest.approx({"a": 2.0, "b": 3.0})
    assert order == ["a", "b"] * tuning.ROUNDS


def candidates(*names: str) -> dict:
    return {name: lambda name=name: name for name in names}


def test_fastest_is_chosen_and_remembered_on_disk(tmp_path, milliseconds):
    path = tmp_path / "deep" / "choices.json"
    milliseconds |= {"a": 2.0, "b": 1.0, "c": 3.0}
    tuner = Tuner(path)
    assert tuner.known(problem()) is None
    assert tuner.measure(problem(), candidates("a", "b", "c")) == "b"
    assert tuner.known(problem()) == "b"
    assert tuner.known(problem(columns=64)) is None
    assert Tuner(path).known(problem()) == "b"
    assert list(json.loads(path.read_text()).values()) == ["b"]
    assert [file.name for file in path.parent.iterdir()] == ["choices.json"]


def test_a_file_cut_off_by_a_crash_is_measured_again(tmp_path, milliseconds):
    path = tmp_path / "choices.json"
    path.write_text('{"tokens=8192 inn')
    milliseconds |= {"a": 1.0}
    assert Tuner(path).measure(problem(), candidates("a")) == "a"
    assert Tuner(path).known(problem()) == "a"


def test_choices_of_another_process_are_kept(tmp_path, milliseconds):
    path = tmp_path / "choices.json"
    one, two = Tuner(path), Tuner(path)
    milliseconds |= {"a": 1.0, "b": 2.0}
    candidates = {name: lambda name=name: name for name in "ab"}
    one.measure(problem(tokens=64), candidates)
    two.measure(problem(tokens=128), candidates)
    assert [Tuner(path).known(problem(tokens=tokens)) for tokens in (64, 128)] == ["a", "a"]


@pytest.mark.parametrize("text", ["null", "[]", '{"a'])
def test_a_file_that_holds_something_else_is_measured_again(tmp_path, milliseconds, text):
    path = tmp_path / "choices.json"
    path.write_text(text)
    tuner = Tuner(path)
    assert tuner.known(problem()) is None
    milliseconds["a"] = 1.0
    tuner.measure(problem(), {"a": lambda: "a"})
    assert Tuner(path).known(problem()) == "a"


def test_an_older_choice_does_not_replace_what_another_process_chose_since(tmp_path, milliseconds):
    path = tmp_path / "choices.json"
    old = Tuner(path)
    milliseconds |= {"a": 1.0, "b": 2.0}
    old.measure(problem(), {name: lambda name=name: name for name in "ab"})
    milliseconds["a"] = 3.0
    Tuner(path).measure(problem(), {name: lambda name=name: name for name in "ab"})
    old.measure(problem(tokens=64), {"a": lambda: "a"})
    assert Tuner(path).known(problem()) == "b"


def test_what_has_no_room_is_left_out(milliseconds):
    def too_large():
        raise triton.runtime.errors.OutOfResources(300_000, 232_448, "shared memory")

    milliseconds |= {"slow": 9.0}
    assert Tuner(None).measure(problem(), {"large": too_large} | candidates("slow")) == "slow"
    assert Tuner(None).measure(problem(), {"large": too_large}) == EXPAND


def test_other_errors_are_not_hidden(milliseconds):
    def broken():
        raise RuntimeError("illegal memory access")

    with pytest.raises(RuntimeError, match="illegal memory access"):
        Tuner(None).measure(problem(), {"broken": broken})


@pytest.mark.parametrize(("inner", "hopeless"), [(512, True), (2048, True), (4096, False), (14336, False)])
def test_traffic_model(inner, hopeless):
    # 2 * 266 / inner of the product's time goes into reading and writing the output once more: 13 % at 4096.
    assert expand_is_hopeless(problem(inner=inner)) is hopeless


def fail(*_, **__):
    raise OSError(errno.EROFS, "Read-only file system")


@pytest.mark.parametrize("broken", ["mkdir", "write_text", "replace"])
def test_a_disk_that_cannot_be_written_warns_once_and_is_tried_again(tmp_path, milliseconds, monkeypatch, broken):
    path = tmp_path / "deep" / "choices.json"
    tuner = Tuner(path)
    milliseconds |= {"a": 1.0, "b": 2.0}
    with monkeypatch.context() as patch, warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        patch.setattr(Path, broken, fail)
        for tokens in (64, 128):
            assert tuner.measure(problem(tokens=tokens), candidates("a", "b")) == "a"
    (warning,) = caught
    assert "Read-only file system" in str(warning.message)
    assert tuner.known(problem(tokens=64)) == "a"
    assert not list(tmp_path.rglob("*.*"))
    tuner.measure(problem(tokens=256), candidates("a"))
    assert [Tuner(path).known(problem(tokens=tokens)) for tokens in (64, 128, 256)] == ["a", "a", "a"]


def test_a_file_that_cannot_be_read_is_measured_again(tmp_path, milliseconds):
    path = tmp_path / "file" / "choices.json"
    (tmp_path / "file").touch()
    with pytest.warns(UserWarning, match="stay in memory"):
        tuner = Tuner(path)
    milliseconds["a"] = 1.0
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert tuner.measure(problem(), candidates("a")) == "a"
    assert tuner.known(problem()) == "a"


def test_two_hosts_with_equal_process_ids_write_different_files(tmp_path, milliseconds, monkeypatch):
    written, write_text = [], Path.write_text
    monkeypatch.setattr(Path, "write_text", lambda path, text: (written.append(path), write_text(path, text)))
    milliseconds["a"] = 1.0
    for _ in range(2):
        Tuner(tmp_path / "choices.json").measure(problem(), candidates("a"))
    assert len(set(written)) == 2
    others = stat.S_IMODE((tmp_path / "choices.json").stat().st_mode)
    (tmp_path / "plain").touch()
    assert others == stat.S_IMODE((tmp_path / "plain").stat().st_mode), "users that share a cache can't read it"


@pytest.mark.parametrize("name", ["LORAFUSION_CACHE", "XDG_CACHE_HOME", None])
def test_choices_stay_in_memory_where_there_is_no_home(tmp_path, monkeypatch, name):
    def no_home():
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("LORAFUSION_CACHE", raising=False)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr(Path, "home", no_home)
    properties = SimpleNamespace(name="GPU", multi_processor_count=1)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    if name is None:
        with pytest.warns(UserWarning, match="LORAFUSION_CACHE names a folder"):
            assert tuning.cache_path(torch.device("cuda")) is None
        return
    monkeypatch.setenv(name, str(tmp_path))
    assert tuning.cache_path(torch.device("cuda")).is_relative_to(tmp_path)
