"""The batch scripts that `slurm` writes, run by bash with stand-ins for SLURM's commands (the real SLURM: see
tests/distributed/slurm)."""

import os
import re
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path

import pytest

from lorafusion_megatron.cli.main import main
from scripts import generate
from tests.unit.tiny_inputs import make_case

CPU = ("--nodes", "2", "--gpus-per-node", "0", "--processes-per-node", "1")
SLURM = {
    "SLURM_JOB_ID": "77",
    "SLURM_JOB_NODELIST": "n[1-2]",
    "SLURM_NNODES": "2",
    "SLURM_NODEID": "1",
    "SLURM_NTASKS": "16",
    "SLURM_PROCID": "9",
    "SLURM_LOCALID": "1",
    "SLURMD_NODENAME": "n2",
}
COMMANDS = {
    # The step: its own options up to "bash" are kept, the rest is run.
    "srun": 'while [ "$1" != bash ]; do echo "$1" >>"$HERE/srun.log"; shift; done; exec "$@"',
    "scontrol": 'echo "$*" >>"$HERE/scontrol.log"; [ "$1" != show ] || printf "n1\\nn2\\n"; [ -e "$HERE/$1" ]',
    "sleep": "exit 0",
    "fakepython": 'printf "%s\\n" "$@" >"$HERE/arguments"; env >"$HERE/environment"; eval "$(cat "$HERE/work")"',
}


class Bench:
    """A folder with stand-ins in its path.

    Args:
        folder: for everything.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        programs = folder / "bin"
        programs.mkdir()
        for name, body in COMMANDS.items():
            (programs / name).write_text(f"#!/usr/bin/env bash\n{body}\n")
            (programs / name).chmod(0o755)
        (folder / "show").touch()
        self.training("true")

    def training(self, body: str) -> None:
        """What stands for the training processes."""
        (self.folder / "work").write_text(body)

    def start(self, script: Path, *words: str, **environment: str) -> subprocess.Popen[str]:
        """The script as SLURM starts it."""
        return subprocess.Popen(
            ["bash", str(script), *words],
            cwd=self.folder,
            env=os.environ
            | SLURM
            | {"PATH": f"{self.folder / 'bin'}:{os.environ['PATH']}", "HERE": str(self.folder)}
            | environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    def lines(self, name: str) -> list[str]:
        """Lines of a file that a stand-in wrote."""
        path = self.folder / name
        return path.read_text().splitlines() if path.exists() else []

    def environment(self) -> Mapping[str, str]:
        """Environment of the training process."""
        return dict(line.split("=", 1) for line in self.lines("environment") if "=" in line)


@pytest.fixture
def bench(tmp_path: Path) -> Bench:
    """Stand-ins for SLURM's commands."""
    return Bench(tmp_path)


@pytest.fixture
def run_file(tmp_path: Path) -> Path:
    """A run of two pipeline stages."""
    case = make_case(tmp_path / "case")
    case.run["model"] = {"pipeline_model_parallel_size": 2}
    return case.write()


def written(folder: Path, run_file: Path, *words: str) -> Path:
    """The script that the command writes."""
    path = folder / "train.sbatch"
    assert main(["slurm", str(run_file), *words, "--output", str(path)]) == 0
    return path


def test_shipped_files_are_what_the_code_says() -> None:
    assert generate.stale() == [], "run: python -m scripts.generate"


def test_torchrun_meets_on_the_first_node_and_gets_the_run_file(bench: Bench, run_file: Path) -> None:
    script = written(bench.folder, run_file, "runtime.seed=5", "jobs[0].peft.r=4", *CPU, "--python", "fakepython")
    assert bench.start(script, "runtime.seed=6").wait(20) == 0
    assert bench.lines("arguments") == [
        "-m",
        "torch.distributed.run",
        "--nnodes=2",
        "--nproc-per-node=1",
        "--rdzv-backend=c10d",
        "--rdzv-id=77",
        "--rdzv-endpoint=n1:11232",
        "--rdzv-conf=is_host=false",
        "--local-addr=n2",
        "--signals-to-handle=SIGINT",
        "--log-dir=logs/77.0/node-1",
        "--redirects=3",
        "--tee=0:3",
        "-m",
        "lorafusion_megatron.train",
        str(run_file),
        "runtime.seed=5",
        "jobs[0].peft.r=4",
        "runtime.seed=6",
    ]


def test_one_task_a_process_knows_its_rank_from_slurm(bench: Bench, run_file: Path) -> None:
    script = written(
        bench.folder, run_file, "--nodes", "2", "--gpus-per-node", "8", "--launcher", "srun", "--python", "fakepython"
    )
    assert bench.start(script, SLURM_CPUS_PER_TASK="6", SLURM_RESTART_COUNT="2").wait(20) == 0
    assert bench.lines("arguments") == ["-m", "lorafusion_megatron.train", str(run_file)]
    found = bench.environment()
    assert {key: found[key] for key in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE")} == {
        "RANK": "9",
        "LOCAL_RANK": "1",
        "WORLD_SIZE": "16",
        "LOCAL_WORLD_SIZE": "8",
    }
    assert (found["MASTER_ADDR"], found["MASTER_PORT"]) == ("n1", "11234")
    assert found["SRUN_CPUS_PER_TASK"] == "6"
    assert bench.lines("srun.log")[-2:] == ["--output=logs/77.2/rank-%t.log", "--gpu-bind=none"]
    assert (bench.folder / "logs" / "77.2").is_dir()


def test_values_with_blanks_quotes_and_dollars_arrive_as_they_were(bench: Bench, run_file: Path) -> None:
    chat = """jobs[0].dataset.chat_template="{{ 'a b' }}$x\""""
    setup = """export NOTE="it's ${HOME:-} } \\$1" """
    script = written(
        bench.folder,
        run_file,
        chat,
        *CPU,
        *("--python", "fakepython", "--setup", setup),
        *("--container-image", "reg#team/image:1", "--container-mounts", "/data 1:/data,/home"),
    )
    assert bench.start(script, HOME="/h").wait(20) == 0
    assert bench.lines("arguments")[-1] == chat
    assert bench.environment()["NOTE"] == "it's /h } $1"
    assert bench.lines("srun.log")[-2:] == [
        "--container-image=reg#team/image:1",
        "--container-mounts=/data 1:/data,/home",
    ]


def test_the_gpus_that_sbatch_was_asked_for_rule(bench: Bench) -> None:
    script = generate.ROOT / "scripts" / "slurm" / "train.sbatch"
    for environment, processes in (({}, 8), ({"SLURM_GPUS_ON_NODE": "4"}, 4)):
        assert bench.start(script, "RUN.yaml", PYTHON="fakepython", **environment).wait(20) == 0
        assert bench.lines("arguments")[3] == f"--nproc-per-node={processes}"
        assert bench.lines("arguments")[-1] == "RUN.yaml"


def test_without_a_run_file_the_shipped_script_says_how_it_is_used(bench: Bench) -> None:
    process = bench.start(generate.ROOT / "scripts" / "slurm" / "train.sbatch", PYTHON="fakepython")
    assert "usage: sbatch [sbatch options] THIS_FILE RUN.yaml" in process.communicate(timeout=20)[0]
    assert process.returncode != 0
    assert not bench.lines("arguments")


def test_a_failure_keeps_its_status_and_is_not_requeued(bench: Bench, run_file: Path) -> None:
    bench.training("exit 2")
    assert bench.start(written(bench.folder, run_file, *CPU, "--python", "fakepython")).wait(20) == 2
    assert [line for line in bench.lines("scontrol.log") if line.startswith("requeue")] == []


def warned(bench: Bench, script: Path, body: str) -> subprocess.Popen[str]:
    """A running script whose training has got the warning before the time limit."""
    bench.training(f'{body}; touch "$HERE/ready"; while true; do /usr/bin/env sleep 0.02; done')
    process = bench.start(script)
    deadline = time.monotonic() + 20
    while not (bench.folder / "ready").exists():
        assert time.monotonic() < deadline
        time.sleep(0.02)
    process.send_signal(signal.SIGUSR1)
    return process


@pytest.mark.parametrize("launcher", ["torchrun", "srun"])
def test_the_warning_reaches_training_and_the_job_goes_back_into_the_queue(
    launcher: str, bench: Bench, run_file: Path
) -> None:
    (bench.folder / "requeue").touch()
    script = written(bench.folder, run_file, *CPU, "--python", "fakepython", "--launcher", launcher)
    # Of a step SLURM signals every process; the stand-in's is one. bash can't trap what was ignored at its start, so
    # under torchrun, where the signal is ignored until training has set its handler, another program stands for it.
    handler = "exec python3 -c 'import os,signal,sys,time; signal.signal(signal.SIGUSR1, lambda *_: os._exit(75)); "
    handler += 'open(os.environ["HERE"] + "/ready", "w"); time.sleep(30)\''
    process = warned(bench, script, handler)
    output = process.communicate(timeout=20)[0]
    assert "back into the queue" in output
    assert "could not be requeued" not in output
    assert bench.lines("scontrol.log")[-1] == "requeue 77"


def test_where_requeueing_is_refused_the_status_says_run_it_again(bench: Bench, run_file: Path) -> None:
    script = written(bench.folder, run_file, *CPU, "--python", "fakepython", "--launcher", "srun")
    process = warned(bench, script, "trap 'exit 75' USR1")
    assert "submit it again" in process.communicate(timeout=20)[0]
    assert process.returncode == 75


def test_a_run_that_ends_well_in_spite_of_the_warning_is_done(bench: Bench, run_file: Path) -> None:
    (bench.folder / "requeue").touch()
    script = written(bench.folder, run_file, *CPU, "--python", "fakepython", "--launcher", "srun")
    process = warned(bench, script, "trap 'exit 0' USR1")
    process.communicate(timeout=20)
    assert process.returncode == 0
    assert "requeue 77" not in bench.lines("scontrol.log")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--nodes", "0", "--gpus-per-node", "8"), r"--nodes: got 0; must be at least 1"),
        (("--nodes", "1", "--gpus-per-node", "0"), r"--processes-per-node: got 0"),
        (("--nodes", "3", "--gpus-per-node", "1"), r"3 ranks .*multiple of 2"),
        (("--nodes", "2", "--gpus-per-node", "1", "--sbatch=--mem=0\n#"), r"single lines"),
        (("--nodes", "2", "--gpus-per-node", "x"), r"invalid int value: 'x'"),
        (("--nodes", "2", "--gpus-per-node", "1", "--time", "a day"), r"--time: got 'a day'; .*24:00:00"),
        (("--nodes", "2", "--gpus-per-node", "1", "--time", "1-"), r"--time: got '1-'"),
        (("--nodes", "2", "--gpus-per-node", "1", "--time", "2:30"), r"--time: 2:30 \(150 s\); .* 180 s before"),
        (("--nodes", "2", "--gpus-per-node", "1", "--time", "3"), r"--time: 3 \(180 s\)"),
        (("--nodes", "2", "--gpus-per-node", "1", "--python", "python3\nrm -rf x"), r"single lines"),
        (("--nodes", "2", "--gpus-per-node", "1", "--job-name", 'a"b'), r"--sbatch: .*without double quotes"),
        (("--nodes", "2", "--gpus-per-node", "1", '--sbatch=--comment="a b"'), r"--sbatch: .*without double quotes"),
        (("--nodes", "2", "--gpus-per-node", "1", "--partition", ""), r"--sbatch: got '--partition='"),
        (("--nodes", "2", "--gpus-per-node", "1", "--sbatch=mem=0"), r"--sbatch: got 'mem=0'"),
        (("--nodes", "2", "--gpus-per-node", "1", "--warn-seconds", "70000"), r"--warn-seconds: got 70000"),
        (("--nodes", "2", "--gpus-per-node", "1", "--output", "/nowhere/x"), r"--output: /nowhere/x can't be written"),
    ],
)
def test_what_does_not_fit_is_one_line(
    words: tuple[str, ...], message: str, run_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = () if "--output" in words else ("--output", str(tmp_path / "x.sbatch"))
    assert main(["slurm", str(run_file), *words, *output]) == 2
    error = capsys.readouterr().err
    assert re.search(message, error), error
    assert error.count("\n") == 1
    assert not (tmp_path / "x.sbatch").exists()


def test_sbatch_gets_what_was_asked_for(tmp_path: Path, run_file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ("--nodes", "4", "--gpus-per-node", "8", "--partition", "gpu", "--sbatch=--mem=0", "--time", "2:00:00")
    assert main(["slurm", str(run_file), *words, "--warn-seconds", "60", "--job-name", "x", "--output", "-"]) == 0
    directives = [line.split(" ", 1)[1] for line in capsys.readouterr().out.splitlines() if line.startswith("#SBATCH")]
    assert directives == [
        "--job-name=x",
        "--nodes=4",
        "--ntasks-per-node=1",
        "--cpus-per-task=32",
        "--gpus-per-node=8",
        "--time=2:00:00",
        "--signal=B:USR1@60",
        "--requeue",
        "--open-mode=append",
        "--output=%x-%j.out",
        "--partition=gpu",
        "--mem=0",
    ]


@pytest.mark.parametrize("limit", ["4", "3:30", "00:03:30", "1-0", "1-00:00", "7-00:00:00", "0", "unlimited"])
def test_every_form_of_a_time_limit_that_sbatch_takes_is_taken(
    limit: str, run_file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["slurm", str(run_file), "--nodes", "2", "--gpus-per-node", "1", "--time", limit, "--output", "-"]) == 0
    assert f"#SBATCH --time={limit}\n" in capsys.readouterr().out


def test_blanks_in_values_are_quoted_as_sbatch_reads_them(run_file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ("--job-name", "my run", "--sbatch=--comment=hello big world", "--sbatch=-x node1", "--sbatch=--exclusive")
    assert main(["slurm", str(run_file), "--nodes", "2", "--gpus-per-node", "1", *words, "--output", "-"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert '#SBATCH --job-name="my run"' in lines
    assert '#SBATCH --comment="hello big world"' in lines
    assert "#SBATCH -x node1" in lines
    assert "#SBATCH --exclusive" in lines


@pytest.mark.parametrize(
    ("option", "directive"),
    [
        ("--comment=it's", """--comment="it's\""""),
        ("--comment=a#b", '--comment="a#b"'),
        ("--comment two words", '--comment="two words"'),
        ("--comment  a=b c", '--comment="a=b c"'),
        ("--comment=é;$x", '--comment="é;$x"'),
        ("-J run#2", '-J "run#2"'),
        ("--mem 0", "--mem 0"),
        ("--exclusive", "--exclusive"),
        ("--gres=gpu:8", "--gres=gpu:8"),
        ("--constraint=[(a|b)*2&c]", "--constraint=[(a|b)*2&c]"),
        ("--array=0-3%2,7", "--array=0-3%2,7"),
    ],
)
def test_values_that_sbatch_would_cut_or_refuse_are_quoted_and_others_left(
    option: str, directive: str, run_file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ("--nodes", "2", "--gpus-per-node", "1", "--job-name", "run#2", f"--sbatch={option}", "--output", "-")
    assert main(["slurm", str(run_file), *words]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert '#SBATCH --job-name="run#2"' in lines
    assert f"#SBATCH {directive}" in lines


def test_only_a_script_of_this_command_is_replaced(
    tmp_path: Path, run_file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    notes, pipe, link = tmp_path / "notes.sh", tmp_path / "pipe", tmp_path / "link.yaml"
    notes.write_text("#!/usr/bin/env bash\n# mine\n")
    os.mkfifo(pipe)
    link.symlink_to(run_file)
    before = run_file.read_text()
    for path, reason in (
        (run_file, "is the run file"),
        (link, "is the run file"),
        (notes, "is no script of this command"),
        (pipe, "is no file"),
        (tmp_path, "is no file"),
    ):
        assert main(["slurm", str(run_file), *CPU, "--output", str(path)]) == 2
        out, error = capsys.readouterr()
        assert (out, error.count("\n")) == ("", 1)
        assert f"--output: {path} " in error
        assert reason in error
    assert run_file.read_text() == before
    assert notes.read_text() == "#!/usr/bin/env bash\n# mine\n"


def test_a_script_that_was_written_before_is_replaced_whole(
    tmp_path: Path, run_file: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "scripts"
    folder.mkdir()
    link = folder / "link"
    link.symlink_to("train.sbatch")
    script = written(folder, run_file, *CPU)
    assert main(["slurm", str(run_file), *CPU, "--job-name", "second", "--output", str(link)]) == 0
    second = script.read_text()
    assert "--job-name=second\n" in second
    assert link.is_symlink()
    assert os.access(script, os.X_OK)

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", full)
    assert main(["slurm", str(run_file), *CPU, "--output", str(script)]) == 2
    assert "No space left on device" in capsys.readouterr().err
    assert script.read_text() == second
    assert sorted(path.name for path in folder.iterdir()) == ["link", "train.sbatch"]


def test_names_and_commands_that_are_not_utf8_arrive_as_they_were(bench: Bench, run_file: Path) -> None:
    odd = run_file.with_name("r\udcff.yaml")
    run_file.rename(odd)
    path = bench.folder / "sp ace\udcff.sh"
    shape = (*CPU, "--python", "fakepython", "--setup", "NOTE=$'a\udcff'; export NOTE")
    command = [sys.executable, "-m", "lorafusion_megatron.cli.main", "slurm", str(odd), *shape, "--output"]
    environment = os.environ | {"PYTHONIOENCODING": "utf-8:strict"}  # Python escapes by itself in the C locale
    done = subprocess.run([*command, str(path)], capture_output=True, env=environment, cwd=generate.ROOT)
    assert (done.returncode, done.stderr) == (0, b"")
    assert done.stdout.endswith(b"submit it with: sbatch " + os.fsencode(shlex.quote(str(path))) + b"\n")
    assert bench.start(path).wait(20) == 0
    assert (bench.folder / "arguments").read_bytes().splitlines()[-1] == os.fsencode(odd)
    assert b"NOTE=a\xff" in (bench.folder / "environment").read_bytes().splitlines()
    shown = subprocess.run([*command, "-"], capture_output=True, env=environment, cwd=generate.ROOT)
    assert (shown.returncode, shown.stdout) == (0, path.read_bytes())
