"""What the benchmarks print and refuse; the measuring itself needs a GPU."""

import argparse
import json

import pytest
import torch

from lorafusion_megatron.cli import bench_layer, bench_linear
from lorafusion_megatron.cli.bench_common import bar_chart, table, write_json
from lorafusion_megatron.errors import UserError

ROWS = [
    {"tokens": 64, "in": 8, "out": 8, "r": 4, "adapters": 1, "dropout": 0.1, "frozen": [1.0, 2.0], "ours": [1.1, 2.2]},
    {"tokens": 64, "in": 8, "out": 16, "r": 4, "adapters": 1, "dropout": 0.1, "frozen": [2.0, 4.0], "ours": [2.2, 5.2]},
]


def parse(module, *words: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    module.add_arguments(parser)
    return parser.parse_args(words)


@pytest.mark.parametrize("module", [bench_linear, bench_layer])
@pytest.mark.skipif(torch.cuda.is_available(), reason="says what happens without a GPU")
def test_without_a_gpu(module):
    with pytest.raises(UserError, match="no GPU is visible"):
        module.run(parse(module))


def test_table_and_means():
    text = table(ROWS, ["frozen", "ours"], bench_linear.KEYS).splitlines()
    assert text[0].split() == [*bench_linear.KEYS, "frozen", "ours"]
    assert text[2].split()[-3:] == ["2.200", "5.200", "x1.300"]
    assert bench_linear.means(ROWS, ["frozen", "ours"]).splitlines()[1] == (
        "  tokens 64 r 4 adapters 1 dropout 0.1: frozen 1.000  ours 1.200"
    )


def test_an_implementation_that_failed_somewhere_has_no_mean():
    rows = [ROWS[0], {key: value for key, value in ROWS[1].items() if key != "ours"}]
    assert table(rows, ["frozen", "ours"], bench_linear.KEYS).splitlines()[2].split()[-1] == "-"
    assert "ours" not in bench_linear.means(rows, ["frozen", "ours"])


def test_json_and_chart(tmp_path):
    write_json(str(tmp_path / "new" / "out.json"), {"gpu": "H100"}, ROWS)
    assert json.loads((tmp_path / "new" / "out.json").read_text()) == {"machine": {"gpu": "H100"}, "rows": ROWS}
    bar_chart(str(tmp_path / "chart.png"), "title", ROWS, ["ours"], bench_linear.KEYS)
    assert (tmp_path / "chart.png").read_bytes().startswith(b"\x89PNG")


def test_shapes():
    assert bench_linear._shapes("square-8k,64:128") == [(8192, 8192), (64, 128)]
    assert bench_linear._shapes("llama-70b-tp4")[2] == (8192, 14336)
    with pytest.raises(UserError, match="--shapes: 'llama-9b'; names no known shapes"):
        bench_linear._shapes("llama-9b")
    with pytest.raises(UserError, match="--shapes: '64,x'; must be numbers with commas between"):
        bench_linear._shapes("64:x")
