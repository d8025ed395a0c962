"""What a user reads on the terminal of a run."""

import json
import os
import subprocess
import sys
import warnings

import pytest

from lorafusion_megatron.mcore.quiet import EXPECTED_RECORDS, EXPECTED_WARNINGS, quiet_megatron
from tests.tiny import tiny_run


def test_a_run_prints_its_own_lines_and_no_warning_of_a_library(tmp_path):
    run_file = tiny_run(tmp_path)
    done = subprocess.run(
        [sys.executable, "-m", "lorafusion_megatron.train", str(run_file)],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )
    # PyTorch's C++ begins its remarks on the machine's network with [W; everything else would be ours to answer for.
    assert [line for line in done.stderr.splitlines() if not line.startswith("[W")] == []
    assert "Warning" not in done.stdout
    assert "DEPRECATED" not in done.stdout
    assert done.stdout.splitlines()[0].startswith("2 jobs on cpu: local layers")


@pytest.mark.parametrize(("stdout", "log_format"), [("full disk", "lines"), ("closed pipe", "json")])
def test_a_run_whose_output_cannot_be_written_is_done_all_the_same(tmp_path, stdout, log_format):
    run_file = tiny_run(tmp_path)
    if stdout == "full disk":
        target = os.open("/dev/full", os.O_WRONLY)
    else:
        reader, target = os.pipe()
        os.close(reader)
    done = subprocess.run(
        [sys.executable, "-m", "lorafusion_megatron.train", str(run_file), f"logger.log_format={log_format}"],
        cwd=tmp_path,
        stdout=target,
        stderr=subprocess.PIPE,
        text=True,
        timeout=120,
    )
    os.close(target)
    assert (done.returncode, [line for line in done.stderr.splitlines() if not line.startswith("[W")]) == (0, [])
    assert json.loads((tmp_path / "out" / "status.json").read_text())["state"] == "done"


@pytest.mark.parametrize(("message", "module"), EXPECTED_WARNINGS)
def test_only_the_expected_warnings_of_megatron_are_silenced(message, module):
    text = message.replace("\\", "")
    with warnings.catch_warnings(record=True) as caught:
        warnings.resetwarnings()
        quiet_megatron()
        quiet_megatron()
        for said, where in [(text, "megatron.core.x"), (text, "my.module"), ("weights differ", "megatron.core.x")]:
            warnings.warn_explicit(said, UserWarning, "file.py", 1, module=where, registry={})
    assert [str(warning.message) for warning in caught] == [text, "weights differ"]


@pytest.mark.parametrize("name", EXPECTED_RECORDS)
def test_only_the_expected_log_records_are_dropped(name, caplog):
    import logging

    quiet_megatron()
    logging.getLogger(name).warning(EXPECTED_RECORDS[name] + " and more")
    logging.getLogger(name).warning("something else")
    assert caplog.messages == ["something else"]
