"""Models that were built and filled elsewhere train the same adapters as the package's own."""

import pytest

from tests import launch, tiny
from tests.distributed.bridged import train_built_models

TOLERANCE = 1e-3


@pytest.fixture(scope="module")
def run_file(tmp_path_factory):
    """Two jobs on a Llama of four layers, and what one process makes of them."""
    folder = tmp_path_factory.mktemp("run")
    path = tiny.tiny_run(folder)
    launch.train(path, f"checkpoint.save={folder / 'one'}")
    return path


def _train(run_file, out, kind, stages):
    words = [str(run_file), f"checkpoint.save={out}", f"model.pipeline_model_parallel_size={stages}"]
    ranks = launch.Ranks(train_built_models, (kind, words), world=stages, folder=out.with_name("logs"))
    return ranks.wait(120.0)


@pytest.mark.parametrize("stages", [1, 2])
@pytest.mark.parametrize("kind", ["gpt", "hybrid"])
def test_adapters_are_taken_over_by_type_wherever_the_linears_stand(run_file, tmp_path, measured, kind, stages):
    _train(run_file, tmp_path / "out", kind, stages).check()
    for name in ("first", "second"):
        got, want = (tiny.adapter(out, name) for out in (tmp_path / "out", run_file.parent / "one"))
        start = tiny.read(run_file.parent / "init" / name)
        assert measured(tiny.update_error(got, want, start)) <= TOLERANCE


def test_a_model_that_computes_something_else_than_the_base_is_refused_by_name(run_file, tmp_path):
    finished = _train(run_file, tmp_path / "out", "clamped", 1)
    assert finished.statuses == (1,)
    assert "TransformerConfig.activation_func_clamp_value: " in finished.outputs[0]
    assert not (tmp_path / "out").exists()


def test_an_attention_that_takes_no_packed_samples_is_refused(run_file, tmp_path):
    finished = _train(run_file, tmp_path / "out", "stock attention", 1)
    assert finished.statuses == (1,)
    assert (
        "UserError: base_model.path: Megatron's local DotProductAttention takes no packed samples"
        in (finished.outputs[0])
    )
    assert not (tmp_path / "out").exists()
