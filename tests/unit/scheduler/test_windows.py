"""Planning ahead in a process: the same schedules, whatever happens to the process."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace

import pytest

from lorafusion_megatron.errors import UserError
from lorafusion_megatron.scheduler import windows
from lorafusion_megatron.scheduler.build import PlanOptions, build_schedule
from lorafusion_megatron.scheduler.report import simulate_schedule
from lorafusion_megatron.scheduler.windows import WindowPlanner
from tests.unit.scheduler.instances import batches

OPTIONS = PlanOptions(token_capacity=64, stages=2)
FIRST = batches([[[9, 9, 40], [30, 3]], [[7] * 5, [8] * 4]])
NEXT = batches([[[9, 50], [20, 3]], [[7] * 5, [9] * 4]], first_step=3)


@pytest.fixture(scope="module")
def planner() -> Iterator[WindowPlanner]:
    with WindowPlanner() as made:
        yield made


def test_a_prepared_window_is_what_planning_on_the_spot_gives(planner: WindowPlanner) -> None:
    planner.prepare(FIRST, OPTIONS)
    assert planner.take(FIRST, OPTIONS) == build_schedule(FIRST, OPTIONS)
    planner.prepare(NEXT, OPTIONS)
    assert planner.take(NEXT, OPTIONS) == build_schedule(NEXT, OPTIONS)


@pytest.mark.parametrize("ahead", [False, True], ids=["on the spot", "ahead"])
def test_a_window_knows_how_much_faster_it_is_than_one_job_after_the_other(planner: WindowPlanner, ahead: bool) -> None:
    if ahead:
        planner.prepare(FIRST, OPTIONS)
    together = simulate_schedule(planner.take(FIRST, OPTIONS), OPTIONS).seconds
    apart = 0.0
    for job in FIRST:
        for batch in job:
            apart += simulate_schedule(build_schedule([[batch]], OPTIONS), OPTIONS).seconds
    assert planner.speedup == pytest.approx(apart / together, rel=0.02)
    assert planner.speedup > 1.2
    planner.take(FIRST, replace(OPTIONS, schedule="sequential"))
    assert planner.speedup == 1.0


def test_jobs_that_came_or_left_are_planned_on_the_spot(planner: WindowPlanner) -> None:
    planner.prepare(FIRST, OPTIONS)
    assert planner.take(FIRST[:1], OPTIONS) == build_schedule(FIRST[:1], OPTIONS)
    assert planner.take(NEXT, OPTIONS) == build_schedule(NEXT, OPTIONS)


def test_a_plan_that_nobody_took_is_dropped(planner: WindowPlanner) -> None:
    planner.prepare(FIRST, OPTIONS)
    planner.prepare(NEXT, OPTIONS)
    assert planner.take(NEXT, OPTIONS) == build_schedule(NEXT, OPTIONS)


def test_the_wait_is_short_when_there_was_time(planner: WindowPlanner) -> None:
    planner.prepare(FIRST, OPTIONS)
    time.sleep(0.5)
    planner.take(FIRST, OPTIONS)
    assert planner.waited_seconds < 0.2


def test_a_users_mistake_comes_back_as_such(planner: WindowPlanner) -> None:
    small = PlanOptions(token_capacity=32)
    planner.prepare(FIRST, small)
    with pytest.raises(UserError, match="sample of 40 tokens") as error:
        planner.take(FIRST, small)
    assert error.value.key == "runtime.token_capacity"


def test_the_death_of_the_process_loses_nothing() -> None:
    with WindowPlanner() as planner:
        planner.prepare(FIRST, OPTIONS)
        assert planner._process.pid is not None
        os.kill(planner._process.pid, signal.SIGKILL)
        planner._process.join()
        assert planner.take(FIRST, OPTIONS) == build_schedule(FIRST, OPTIONS)
        planner.prepare(NEXT, OPTIONS)
        assert planner.take(NEXT, OPTIONS) == build_schedule(NEXT, OPTIONS)


@pytest.mark.parametrize("planning", [True, False], ids=["while it plans", "while it waits"])
def test_a_process_that_was_killed_is_followed_by_another(planning: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    with WindowPlanner() as planner:
        planner.prepare(FIRST, OPTIONS)
        killed = planner._process
        assert killed is not None
        assert killed.pid is not None
        if not planning:
            planner.take(FIRST, OPTIONS)
        os.kill(killed.pid, signal.SIGKILL)
        killed.join()
        if not planning:
            planner.prepare(FIRST, OPTIONS)  # notices that it is gone
        assert planner.take(FIRST, OPTIONS) == build_schedule(FIRST, OPTIONS)
        planner.prepare(NEXT, OPTIONS)
        assert planner._prepared is not None
        assert planner._process is not None
        assert planner._process.pid != killed.pid
        monkeypatch.setattr(windows, "_plan", pytest.fail)  # in this process alone
        assert planner.take(NEXT, OPTIONS) == build_schedule(NEXT, OPTIONS)


def test_close_twice_ends_the_process() -> None:
    planner = WindowPlanner()
    planner.prepare([], PlanOptions(token_capacity=64))
    assert planner._process is not None
    planner.close()
    planner.close()
    assert not planner._process.is_alive()


def test_a_planner_that_prepared_nothing_has_no_process_and_closes() -> None:
    planner = WindowPlanner()
    planner.close()
    assert planner._process is None


SCRIPT = """
import os, time
from lorafusion_megatron.scheduler.options import PlanOptions
from lorafusion_megatron.scheduler.report import simulate_schedule
from lorafusion_megatron.scheduler.windows import WindowPlanner
if __name__ == "__main__":
    planner = WindowPlanner()
    planner.prepare([], PlanOptions(token_capacity=64))
    print(planner._process.pid, flush=True)
    time.sleep(60)
"""


def test_the_process_ends_with_a_parent_that_was_killed(tmp_path) -> None:  # type: ignore[no-untyped-def]
    (tmp_path / "parent.py").write_text(SCRIPT)
    parent = subprocess.Popen([sys.executable, str(tmp_path / "parent.py")], stdout=subprocess.PIPE, text=True)
    assert parent.stdout is not None
    child = int(parent.stdout.readline())
    parent.kill()
    parent.wait()
    parent.stdout.close()
    deadline = time.monotonic() + 30
    while _runs(child) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not _runs(child)


def _runs(pid: int) -> bool:
    try:
        with open(f"/proc/{pid}/stat") as file:
            return file.read().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False
