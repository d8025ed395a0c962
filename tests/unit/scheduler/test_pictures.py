"""Gantt chart and trace of a schedule."""

import json
import re
import struct
from itertools import pairwise
from pathlib import Path

import pytest

from lorafusion_megatron.errors import UserError
from lorafusion_megatron.scheduler.build import PlanOptions, build_schedule
from lorafusion_megatron.scheduler.gantt import draw_gantt, job_colors, lay_out
from lorafusion_megatron.scheduler.report import simulate_schedule
from lorafusion_megatron.scheduler.trace import write_trace
from tests.unit.scheduler.instances import batches

NAMES = ["one", "two</script>"]
OPTIONS = PlanOptions(token_capacity=64, stages=2, virtual_stages=2)
SCHEDULE = build_schedule(batches([[[9, 9, 40], [30, 3]], [[7] * 5, [8] * 4]]), OPTIONS)
TIMELINE = simulate_schedule(SCHEDULE, OPTIONS)


def test_boxes_cover_each_op_once_and_marks_each_step_on_each_stage() -> None:
    boxes, marks = lay_out(SCHEDULE, TIMELINE, 1000)
    heights: dict[tuple[int, float, float], float] = {}
    for box in boxes:
        at = (box.stage, box.start, box.stop)
        assert box.bottom == pytest.approx(heights.get(at, 0.0))
        heights[at] = heights.get(at, 0.0) + box.height
    ops = {(stage, e.start, e.stop) for stage, events in enumerate(TIMELINE.stages) for e in events}
    assert set(heights) == ops
    assert all(height == pytest.approx(1.0) for height in heights.values())
    assert len(marks) == 2 * len(SCHEDULE.step_ends)
    for mark in marks:
        position = next(e.position for e in SCHEDULE.step_ends if (e.job, e.step) == (mark.job, mark.step))
        backwards = [e.stop for e in TIMELINE.stages[mark.stage] if e.op.backward and e.op.microbatch == position]
        assert mark.at == max(backwards)


def test_png_is_an_image_of_the_stages(tmp_path: Path) -> None:
    draw_gantt(tmp_path / "plan.png", SCHEDULE, TIMELINE, NAMES, "title")
    head = (tmp_path / "plan.png").read_bytes()[:24]
    assert head[:8] == b"\x89PNG\r\n\x1a\n"
    width, height = struct.unpack(">II", head[16:24])
    assert width > 2000
    assert height > 300


def test_html_stands_alone_and_holds_the_data(tmp_path: Path) -> None:
    draw_gantt(tmp_path / "plan.html", SCHEDULE, TIMELINE, NAMES, "title")
    page = (tmp_path / "plan.html").read_text()
    assert not re.search(r"""(src|href)\s*=|https?://|@import""", page)
    assert page.count("</script>") == 1
    found = re.search(r"const data = (.*);\n", page)
    assert found is not None
    data = json.loads(found[1])
    assert data["names"] == NAMES
    assert len(data["boxes"]) == len(lay_out(SCHEDULE, TIMELINE, 1000)[0])


def test_another_suffix_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"must end in \.png or \.html"):
        draw_gantt(tmp_path / "plan.pdf", SCHEDULE, TIMELINE, NAMES, "title")


def test_colors_differ() -> None:
    assert len(set(job_colors(24))) == 24


def test_trace_has_every_op_and_step(tmp_path: Path) -> None:
    write_trace(tmp_path / "plan.json", SCHEDULE, TIMELINE, NAMES)
    events = json.loads((tmp_path / "plan.json").read_text())["traceEvents"]
    spans = [event for event in events if event["ph"] == "X"]
    assert len(spans) == 2 * 2 * 2 * SCHEDULE.num_microbatches
    assert max(e["ts"] + e["dur"] for e in spans) == pytest.approx(1e6 * TIMELINE.seconds)
    for stage in (0, 1):
        mine = sorted((e["ts"], e["ts"] + e["dur"]) for e in spans if e["pid"] == stage)
        assert all(first[1] <= second[0] + 1e-6 for first, second in pairwise(mine))
    assert sum(event["ph"] == "i" for event in events) == 2 * len(SCHEDULE.step_ends)
