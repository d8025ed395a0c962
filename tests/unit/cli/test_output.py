"""Commands whose stdout is closed, full or a pipe that nobody reads."""

import subprocess
import sys
from pathlib import Path

import pytest

from tests.unit.tiny_inputs import make_case

ROOT = Path(__file__).resolve().parents[3]
STAND_IN = """
import sys
from lorafusion_megatron.cli import main, {command}
def run(args):
    print("a line")
    {body}
{command}.run = run
sys.exit(main.main([{command!r}, *{words}]))
"""
STDOUTS = {
    "closed": 'exec "$@" >&-',
    "full": 'exec "$@" >/dev/full',
    # The reader ends before the command starts.
    "gone": 'exec 3> >(:); wait $!; exec "$@" >&3',
}


@pytest.fixture(autouse=True)
def buffered(monkeypatch: pytest.MonkeyPatch) -> None:
    """Python buffers what is printed, as it does unless it is told not to."""
    monkeypatch.delenv("PYTHONUNBUFFERED", raising=False)


def ended(stdout: str, *words: str) -> tuple[int, str]:
    """Exit status and stderr of a Python whose stdout can't be written."""
    command = ["bash", "-c", STDOUTS[stdout], "bash", sys.executable, *words]
    done = subprocess.run(command, stderr=subprocess.PIPE, text=True, timeout=60, cwd=ROOT, check=False)
    return done.returncode, done.stderr


def stand_in(stdout: str, command: str, body: str, *words: str) -> tuple[int, str]:
    """Exit status and stderr of a command that prints a line and then does ``body``."""
    return ended(stdout, "-c", STAND_IN.format(command=command, body=body, words=words))


@pytest.mark.parametrize("stdout", STDOUTS)
@pytest.mark.parametrize("status", [0, 73, 75])
def test_the_status_of_train_is_that_of_the_run(stdout: str, status: int) -> None:
    assert stand_in(stdout, "train", f"return {status}", "run.yaml") == (status, "")


def test_a_pipe_that_breaks_within_training_is_no_run_that_is_done() -> None:
    status, error = stand_in("full", "train", "raise BrokenPipeError", "run.yaml")
    assert status == 1
    assert "BrokenPipeError" in error


@pytest.mark.parametrize("body", ["return 0", "sys.stdout.flush()", "print('x' * 100_000)"])
@pytest.mark.parametrize("unbuffered", [False, True])
def test_output_that_can_not_be_written_is_one_line(
    body: str, unbuffered: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if unbuffered:
        monkeypatch.setenv("PYTHONUNBUFFERED", "1")
    status, error = stand_in("full", "validate", body, "run.yaml")
    assert status == 1
    assert error == (
        "lorafusion-megatron: error: standard output can't be written (No space left on device); make room, or send "
        "it elsewhere\n"
    )


@pytest.mark.parametrize(
    ("stdout", "body"), [("closed", "return 0"), ("gone", "return 0"), ("gone", "sys.stdout.flush()")]
)
def test_a_command_that_nobody_reads_ends_well(stdout: str, body: str) -> None:
    assert stand_in(stdout, "validate", body, "run.yaml") == (0, "")


def test_a_failed_command_keeps_its_status() -> None:
    assert stand_in("full", "validate", "return 3", "run.yaml") == (3, "")


def test_other_errors_keep_their_traceback() -> None:
    for stdout, body in (("full", "open('/nowhere/x')"), ("closed", "raise OSError(5, 'elsewhere')")):
        status, error = stand_in(stdout, "validate", body, "run.yaml")
        assert status == 1
        assert "Traceback" in error


@pytest.mark.parametrize("words", [("--help",), ("slurm", "--help"), ("slurm", "{run}", "--output", "-")])
def test_real_commands_say_that_stdout_is_full(words: tuple[str, ...], tmp_path: Path) -> None:
    run = str(make_case(tmp_path).write())
    shape = ("--nodes", "1", "--gpus-per-node", "1") if "{run}" in words else ()
    asked = (word.format(run=run) for word in words)
    status, error = ended("full", "-m", "lorafusion_megatron.cli.main", *asked, *shape)
    assert status == 1
    assert error.count("\n") == 1
    assert "standard output can't be written" in error


def test_a_mistake_is_told_by_its_status_where_stderr_is_closed() -> None:
    command = ("-m", "lorafusion_megatron.cli.main", "validate", "/nowhere.yaml")
    for stderr in ("2>&-", "2>/dev/full"):
        shell = ["bash", "-c", f'exec "$@" {stderr}', "bash", sys.executable, *command]
        done = subprocess.run(shell, stdout=subprocess.PIPE, text=True, timeout=60, cwd=ROOT, check=False)
        assert (done.returncode, done.stdout) == (2, "")
