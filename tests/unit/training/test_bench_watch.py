"""A GPU's clock and power, read from a stand-in for nvidia-smi."""

import os
import time
from types import SimpleNamespace

import pytest
import torch

from lorafusion_megatron.training.bench.watch import Reading, Watch


@pytest.fixture
def smi(tmp_path, monkeypatch):
    """Writes an ``nvidia-smi`` of some lines that then waits to be ended; the one GPU is GPU-abc."""

    def write(*lines: str) -> None:
        script = tmp_path / "nvidia-smi"
        printed = "".join(f'echo "{line}"\n' for line in lines)
        script.write_text(f'#!/bin/sh\necho "$@" > {tmp_path}/asked\n{printed}exec sleep 30\n')
        script.chmod(0o755)

    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(uuid="abc"))
    write.folder = tmp_path
    return write


def test_medians_of_the_readings_after_the_first(smi):
    smi("345, 70.1", "1980, 500.0", "1400, 700.0", "[N/A], 1", "1300, 690.0")
    with Watch(torch.device("cuda", 0)) as watch:
        time.sleep(0.2)
    assert watch.reading == Reading(clock_mhz=1400.0, watts=690.0)
    assert "--id=GPU-abc" in (smi.folder / "asked").read_text()


def test_nothing_to_read_is_no_reading(smi, monkeypatch):
    smi()
    (smi.folder / "nvidia-smi").write_text("#!/bin/sh\nexit 9\n")
    with Watch(torch.device("cuda", 0)) as failing:
        pass
    monkeypatch.setenv("PATH", "")
    with Watch(torch.device("cuda", 0)) as missing, Watch(torch.device("cpu")) as other:
        pass
    assert failing.reading is missing.reading is other.reading is None
