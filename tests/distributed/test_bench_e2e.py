"""The end-to-end benchmark runs anywhere: a tiny model on two gloo stages."""

import json

from tests import launch


def test_every_variant_trains_the_same_samples_and_is_reported(tmp_path):
    out = tmp_path / "out"
    words = ["bench", "e2e", "--model", "tiny", "--pipeline", "2", "--device", "cpu", "--dtype", "float32"]
    words += ["--capacity", "512", "--sizes", "0,512", "--tokens", "3000", "--baseline-tokens", "3000"]
    words += ["--repeats", "1", "--batch-size", "2", "--workloads", "xsum,heterogeneous", "--out", str(out)]
    finished = launch.Ranks(launch.command, (words,), world=2, folder=tmp_path / "logs").wait().check()
    report = json.loads((out / "e2e.json").read_text())
    assert list(report["workloads"]) == ["xsum", "heterogeneous"]
    for found in report["workloads"].values():
        rows = {row["variant"]: row for row in found["rows"]}
        assert set(rows) == {
            "sequential one sample", "sequential 512", "round robin 512", "kernels only", "schedule only", "both",
            "no adapters",
        }  # fmt: skip
        assert len({row["tokens"] for row in rows.values()}) == 1
        assert len({row["optimizer_steps"] for row in rows.values()}) == 1
        assert rows["both"]["microbatches"] == rows["no adapters"]["microbatches"]
        assert rows["sequential one sample"]["microbatches"] == 2 * rows["both"]["optimizer_steps"]
        for row in rows.values():
            assert row["tokens_per_s"] > 0
            assert 0 <= row["bubble_share"] < 1
        best = max(rows[f"sequential {size}"]["tokens_per_s"] for size in ("one sample", "512"))
        ratio = rows["both"]["tokens_per_s"] / best
        assert abs(found["summary"]["both / sequential"] / ratio - 1) < 0.01
    assert {path.name for path in out.iterdir()} >= {"e2e.png", "timeline_xsum.png", "trace_xsum_both.json"}
    assert "GiB predicted" in finished.outputs[0]


def test_the_profile_lists_every_stage(tmp_path):
    words = ["bench", "e2e", "--model", "tiny", "--pipeline", "2", "--device", "cpu", "--dtype", "float32"]
    words += ["--capacity", "256", "--tokens", "1000", "--repeats", "1", "--batch-size", "1", "--workloads", "xsum"]
    words += ["--only", "both", "--profile", "--out", str(tmp_path / "out")]
    launch.Ranks(launch.command, (words,), world=2, folder=tmp_path / "logs").wait().check()
    operations = (tmp_path / "out" / "kernels_xsum_both.txt").read_text()
    assert operations.startswith("stage 0: ")
    assert "\nstage 1: " in operations
    assert "LoraLinearFunction" in operations


def test_a_world_that_does_not_fit_is_one_line(tmp_path):
    words = ["bench", "e2e", "--model", "tiny", "--pipeline", "2", "--device", "cpu"]
    finished = launch.Ranks(launch.command, (words,), world=1, folder=tmp_path / "logs").wait()
    assert finished.statuses == (2,)
    assert "error: --pipeline: 1 processes for 2 stages" in finished.outputs[0]
