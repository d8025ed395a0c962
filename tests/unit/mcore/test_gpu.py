"""Which GPU is a rank's own."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from lorafusion_megatron.errors import UserError
from lorafusion_megatron.mcore.gpu import claim_gpu
from lorafusion_megatron.training import setup


@pytest.fixture
def made_current(monkeypatch):
    """What was made the current device; four GPUs seem to be there."""
    made_current: list[torch.device] = []
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    monkeypatch.setattr(torch.cuda, "set_device", made_current.append)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    return made_current


@pytest.mark.parametrize(("rank", "count", "visible", "index"), [("3", 4, "", 3), ("0", 1, "", 0), ("3", 1, "6", 0)])
def test_a_rank_takes_the_gpu_of_its_number_or_the_one_that_it_is_shown(
    monkeypatch, made_current, rank, count, visible, index
):
    monkeypatch.setenv("LOCAL_RANK", rank)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: count)
    assert claim_gpu() == torch.device("cuda", index)
    assert made_current == [torch.device("cuda", index)]


def test_more_ranks_than_gpus_are_refused(monkeypatch, made_current):
    monkeypatch.setenv("LOCAL_RANK", "4")
    with pytest.raises(UserError, match="5 ranks on this host and 4 GPUs"):
        claim_gpu()
    assert made_current == []


@pytest.mark.parametrize("rank", ["0", "4"])
def test_every_rank_of_the_host_finds_it_so_that_the_first_one_tells(monkeypatch, made_current, rank):
    monkeypatch.setenv("LOCAL_RANK", rank)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "5")
    with pytest.raises(UserError, match="5 ranks on this host and 4 GPUs"):
        claim_gpu()


def test_a_run_takes_its_gpu_before_it_makes_anything_on_one(monkeypatch, made_current, tmp_path):
    class Seen(Exception):
        """Ends the preparation where the first thing is made on a GPU."""

    def make(*_):
        raise Seen(made_current)

    monkeypatch.setenv("LOCAL_RANK", "1")
    monkeypatch.setattr(setup, "choose_device", lambda run: "cuda")
    monkeypatch.setattr(setup, "choose_transformer", lambda run, device: ("local", "asked for"))
    monkeypatch.setattr(setup, "choose_backend", make)
    run: Any = SimpleNamespace(checkpoint=SimpleNamespace(save=tmp_path))
    with pytest.raises(Seen) as seen:
        setup.prepare(run)
    assert seen.value.args[0][-1] == torch.device("cuda", 1)
    with pytest.raises(Seen) as seen:
        setup.prepare(run, gpu=torch.device("cuda", 3))  # a model is there already
    assert seen.value.args[0][-1] == torch.device("cuda", 3)
