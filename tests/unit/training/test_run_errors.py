"""How a run ends that a pipe ended: neither as a lost rank nor as done."""

from types import SimpleNamespace
from typing import Any

import pytest

from lorafusion_megatron.mcore import parallel
from lorafusion_megatron.training import run


def test_a_broken_pipe_ends_a_run_as_an_error(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def broken(text: str) -> None:
        raise BrokenPipeError(32, "Broken pipe")

    prepared = SimpleNamespace(
        device="cuda", topology=None, transformer_impl="", transformer_reason="", backend=SimpleNamespace(name="")
    )
    monkeypatch.setattr(run, "prepare", lambda config: SimpleNamespace(run=config, **vars(prepared)))
    monkeypatch.setattr(run, "choose_interface", lambda: None)
    monkeypatch.setattr(parallel, "start", lambda *_, **__: SimpleNamespace(is_first=True))
    monkeypatch.setattr(parallel, "stop", lambda *, failed: None)
    monkeypatch.setattr(run, "make_progress", lambda **_: SimpleNamespace(note=broken, close=lambda: None))
    sections = {"runtime": SimpleNamespace(seed=1, distributed_timeout_minutes=1.0), "jobs": ()}
    config: Any = SimpleNamespace(**sections, logger=SimpleNamespace(log_interval=1, log_format="lines"))
    # The command line takes a BrokenPipeError for a reader such as head and ends with 0.
    with pytest.raises(RuntimeError, match="a pipe broke") as caught:
        run.train_run(config)
    assert isinstance(caught.value.__cause__, BrokenPipeError)
    assert "lost another rank" not in capsys.readouterr().err
