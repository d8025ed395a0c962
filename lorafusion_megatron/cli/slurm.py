"""``slurm``: write the batch script that trains a run file on a SLURM cluster."""

import argparse
import io
import re
import shlex
import stat
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from lorafusion_megatron.errors import UserError

TIME = re.compile(r"(?:(?P<days>\d+)-(?=\d))?(?P<parts>\d+(?::\d{1,2}){0,2})")
OPTION = re.compile(r'--?[A-Za-z][A-Za-z0-9-]*(?:(?:=| +)[^"\\]+)?')
PARTS = re.compile(r"(--?[A-Za-z][A-Za-z0-9-]*)(=| +(?=\S))(.+)")
"""Name of an option, what parts it from its value, and the value."""
PLAIN = re.compile(r"[\w.,:/%@+=&|\[\]()*-]+")
"""Values that sbatch reads whole without quotes; elsewhere it ends them at a blank or #, and drops single quotes."""
MOST_WARN_SECONDS = 65535
"""What sbatch's ``--signal`` takes."""
HEAD = """\
#!/usr/bin/env bash
# Trains the jobs of one run file on the nodes of a SLURM job, {how}.
#
#     {usage}
#
# Options given to sbatch go before those below. Environment variables that the script reads:
#   PYTHON            interpreter that has lorafusion_megatron (default {python})
#   SETUP             a shell command to run first on every node, such as 'module load cuda'
#   LOGS              folder of the logs of all ranks (default logs)
#   MASTER_ADDR       name or address of the first node, where the others can't resolve SLURM's name for it
#   CONTAINER_IMAGE   run inside this image (pyxis and enroot), with CONTAINER_MOUNTS
"""
FIRST_LINES = HEAD.partition("{how}")[0].encode()
"""What every script begins with."""

BODY = """\
set -euo pipefail

export PYTHON=${{PYTHON:-{python}}} SETUP=${{SETUP:-{setup}}} OMP_NUM_THREADS=${{OMP_NUM_THREADS:-1}}
CONTAINER_IMAGE=${{CONTAINER_IMAGE:-{image}}} CONTAINER_MOUNTS=${{CONTAINER_MOUNTS:-{mounts}}}
attempt=${{SLURM_RESTART_COUNT:-0}}
export LOGS=${{LOGS:-logs}}/$SLURM_JOB_ID.$attempt
export MASTER_ADDR=${{MASTER_ADDR:-$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)}}
# Jobs that share a node, and attempts of one job, must not meet at one port.
export MASTER_PORT=${{MASTER_PORT:-$((10000 + (SLURM_JOB_ID * 16 + attempt) % 20000))}}
# srun does not take the CPUs per task over from sbatch by itself.
[ -z "${{SLURM_CPUS_PER_TASK:-}}" ] || export SRUN_CPUS_PER_TASK=$SLURM_CPUS_PER_TASK
mkdir -p "$LOGS"

options=(--kill-on-bad-exit=0 --wait=60)  # when one task has failed the others get a minute to notice by themselves
[ -z "$CONTAINER_IMAGE" ] || options+=(--container-image="$CONTAINER_IMAGE")
[ -z "$CONTAINER_MOUNTS" ] || options+=(--container-mounts="$CONTAINER_MOUNTS")
"""

TORCHRUN_NODE = """
# One torchrun a node. SLURM signals every process of a step itself, so torchrun ignores the signals that ask for a
# stop (its own way is to kill after 30 s); the training processes save and end, and torchrun ends with them.
# shellcheck disable=SC2016
task='
    eval "$SETUP"
    trap "" TERM USR1
    [ "$SLURM_NODEID" = 0 ] && is_host=true || is_host=false
    exec "$PYTHON" -m torch.distributed.run --nnodes="$SLURM_NNODES" --nproc-per-node={processes} \\
        --rdzv-backend=c10d --rdzv-id="$SLURM_JOB_ID" --rdzv-endpoint="$MASTER_ADDR:$MASTER_PORT" \\
        --rdzv-conf=is_host="$is_host" --local-addr="$SLURMD_NODENAME" --signals-to-handle=SIGINT \\
        --log-dir="$LOGS/node-$SLURM_NODEID" --redirects=3 --tee=0:3 \\
        -m lorafusion_megatron.train "$@"
'
"""

SRUN_TASK = """
# One task a process: SLURM's own variables say which rank it is.
# shellcheck disable=SC2016
task='
    eval "$SETUP"
    export RANK="$SLURM_PROCID" LOCAL_RANK="$SLURM_LOCALID" WORLD_SIZE="$SLURM_NTASKS"
    export LOCAL_WORLD_SIZE="$((SLURM_NTASKS / SLURM_NNODES))"
    exec "$PYTHON" -m lorafusion_megatron.train "$@"
'
options+=(--output="$LOGS/rank-%t.log"{gpu_bind})
"""

TAIL = """
srun "${options[@]}" bash -c "$task" bash "$@" &
step=$!

# SLURM sends USR1 to this script alone, ahead of the time limit; srun passes it on to all tasks, which save and end.
# TERM (preemption, scancel, the time limit itself) reaches every task from SLURM.
stopping=
trap 'stopping=1 again=1; echo "the time limit is near: saving"; kill -USR1 "$step" 2>/dev/null || true' USR1
trap '' TERM
again=1
while [ -n "$again" ]; do  # a trapped signal ends wait early
    again=
    wait "$step" && status=0 || status=$?
done

if [ -n "$stopping" ] && [ "$status" != 0 ]; then
    echo "stopped ahead of the time limit (status $status); back into the queue"
    if scontrol requeue "$SLURM_JOB_ID"; then
        sleep 60  # SLURM ends this script
    else
        echo "it could not be requeued; submit it again and it goes on where it stopped" >&2
    fi
    exit 75
fi
exit "$status"
"""


@dataclass(frozen=True, kw_only=True)
class SlurmJob:
    """What is asked of SLURM, and how the processes start."""

    nodes: int
    processes_per_node: int
    gpus_per_node: int
    launcher: str
    """torchrun: one task a node; srun: one task a process."""
    time: str
    warn_seconds: int
    """How long before the time limit the run is told to save and end."""
    cpus_per_process: int
    name: str = "lorafusion"
    options: tuple[str, ...] = ()
    """Further sbatch options, such as ``--partition=gpu``."""
    python: str = "python3"
    setup: str = ""
    container_image: str = ""
    container_mounts: str = ""

    def directives(self) -> list[str]:
        """The ``#SBATCH`` options."""
        tasks = 1 if self.launcher == "torchrun" else self.processes_per_node
        options = [f"--job-name={self.name}", f"--nodes={self.nodes}", f"--ntasks-per-node={tasks}"]
        options.append(f"--cpus-per-task={self.cpus_per_process * self.processes_per_node // tasks}")
        if self.gpus_per_node:
            options.append(f"--gpus-per-node={self.gpus_per_node}")
        options += [
            f"--time={self.time}",
            f"--signal=B:USR1@{self.warn_seconds}",
            "--requeue",
            "--open-mode=append",
            "--output=%x-%j.out",
        ]
        return [_quoted(option) for option in (*options, *self.options)]


def _quoted(option: str) -> str:
    """An option as sbatch reads it in a directive: a value that is not plain in double quotes."""
    found = PARTS.fullmatch(option)
    if found is None or PLAIN.fullmatch(found[3]):
        return option
    # Only long options take their value after =.
    parting = "=" if option.startswith("--") else found[2]
    return f'{found[1]}{parting}"{found[3]}"'


def script(job: SlurmJob, arguments: Sequence[str] | None = None) -> str:
    """The batch script.

    Args:
        job: what is asked of SLURM.
        arguments: the run file and overrides; None: the script takes them as its own arguments.

    Returns:
        Bash, with every value quoted.
    """
    torchrun = job.launcher == "torchrun"
    usage = "sbatch [sbatch options] THIS_FILE " + ("RUN.yaml [key=value …]" if arguments is None else "[key=value …]")
    quoted = {
        "python": shlex.quote(job.python),
        "setup": shlex.quote(job.setup) if job.setup else "",
        "image": shlex.quote(job.container_image) if job.container_image else "",
        "mounts": shlex.quote(job.container_mounts) if job.container_mounts else "",
    }
    given = f': "${{1:?usage: {usage}}}"' if arguments is None else f'set -- {shlex.join(arguments)} "$@"'
    # sbatch --gpus-per-node=4 in front of the script is obeyed too.
    own_gpus = job.gpus_per_node == job.processes_per_node
    processes = f'"${{SLURM_GPUS_ON_NODE:-{job.gpus_per_node}}}"' if own_gpus else job.processes_per_node
    # All GPUs of a node are visible to all its processes, which NCCL needs to copy between them directly.
    gpu_bind = " --gpu-bind=none" if job.gpus_per_node else ""
    return "".join(
        (
            HEAD.format(
                how="one torchrun a node" if torchrun else "one task a process", usage=usage, python=job.python
            ),
            *(f"#SBATCH {option}\n" for option in job.directives()),
            BODY.format(**quoted),
            f"{given}\n",
            TORCHRUN_NODE.format(processes=processes) if torchrun else SRUN_TASK.format(gpu_bind=gpu_bind),
            TAIL,
        )
    )


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of the command."""
    parser.add_argument("run_file", metavar="RUN.yaml", help="the run file")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="override a key of the run file")
    parser.add_argument("--nodes", type=int, required=True, metavar="N", help="hosts")
    parser.add_argument("--gpus-per-node", type=int, required=True, metavar="N", help="0 for a CPU run")
    parser.add_argument("--processes-per-node", type=int, metavar="N", help="default: one per GPU")
    parser.add_argument("--cpus-per-process", type=int, default=4, metavar="N", help="CPUs of each process (default 4)")
    parser.add_argument(
        "--launcher",
        choices=("torchrun", "srun"),
        default="torchrun",
        help="one torchrun a node, or one SLURM task a process",
    )
    parser.add_argument("--time", default="24:00:00", help="time limit of one attempt (default 24:00:00)")
    parser.add_argument(
        "--warn-seconds",
        type=int,
        default=180,
        metavar="N",
        help="seconds before the time limit at which the run saves, ends and is queued again (default 180)",
    )
    parser.add_argument("--job-name", default="lorafusion", metavar="NAME", help="default lorafusion")
    for option in ("partition", "account", "qos"):
        parser.add_argument(f"--{option}", metavar="NAME", help=f"sbatch's own --{option}")
    parser.add_argument(
        "--sbatch", action="append", default=[], metavar="OPTION", help="a further option, --sbatch=--mem=0; repeatable"
    )
    parser.add_argument("--setup", default="", metavar="COMMAND", help="shell command to run first on every node")
    parser.add_argument("--python", metavar="PATH", help="interpreter on the nodes (default: this one)")
    parser.add_argument("--container-image", default="", metavar="IMAGE", help="pyxis image to run in")
    parser.add_argument("--container-mounts", default="", metavar="MOUNTS", help="its mounts, HOST:INSIDE,…")
    parser.add_argument("--output", default="train.sbatch", metavar="FILE", help="default train.sbatch; - for stdout")


def run(args: argparse.Namespace) -> int:
    """Write the script; 0 unless something is wrong.

    Raises:
        UserError: the run file is not valid, its layout doesn't fit the processes, or an option is not valid.
    """
    from lorafusion_megatron.config import load_run
    from lorafusion_megatron.training.output import replace_text

    job = job_from(args)
    run_config = load_run(args.run_file, args.overrides)
    topology = run_config.topology(job.nodes * job.processes_per_node)
    text = script(job, [args.run_file, *args.overrides])
    if args.output == "-":
        _print(text)
        return 0
    path = Path(args.output)
    try:
        _check_output(path, Path(args.run_file))
        replace_text(path.resolve(), text, mode=0o755)  # the file that a link names
    except OSError as error:
        raise UserError(
            f"{path} can't be written ({error.strerror})",
            rule="the script goes there",
            remedy="choose another file",
            key="--output",
        ) from None
    _print(
        f"wrote {path}: {job.nodes} x {job.processes_per_node} processes, tensor {topology.tensor_parallel}, "
        f"pipeline {topology.pipeline_parallel}, data {topology.data_parallel}; "
        f"submit it with: sbatch {shlex.quote(str(path))}\n"
    )
    if topology.tensor_parallel > job.processes_per_node:
        print("note: tensor parallel groups span nodes, which is slow; keep them within one")
    return 0


def _check_output(path: Path, run_file: Path) -> None:
    """Check that the script would replace nothing but a script that was written before.

    Raises:
        UserError: the file is the run file, or holds something else.
        OSError: it can't be read.
    """
    try:
        mode = path.stat().st_mode
    except FileNotFoundError:
        return
    if path.samefile(run_file):
        given = f"{path} is the run file"
    elif not stat.S_ISREG(mode):  # a folder; a device or pipe, which os.replace would put the script in the place of
        given = f"{path} is no file"
    else:
        with path.open("rb") as file:
            if file.read(len(FIRST_LINES)) == FIRST_LINES:
                return
        given = f"{path} exists and is no script of this command"
    raise UserError(
        given,
        rule="only a script that this command wrote is replaced",
        remedy="choose another file, or - for stdout",
        key="--output",
    )


def _print(text: str) -> None:
    """Print bytes as they were given: the name of a file or a command need not be UTF-8."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.flush()
        sys.stdout.buffer.write(text.encode("utf-8", "surrogateescape"))
    else:
        print(text, end="")


def job_from(args: argparse.Namespace) -> SlurmJob:
    """The job that the arguments ask for.

    Raises:
        UserError: a number is out of range, or a text holds a line break.
    """
    processes = args.gpus_per_node if args.processes_per_node is None else args.processes_per_node
    for option, value, low in (
        ("--nodes", args.nodes, 1),
        ("--gpus-per-node", args.gpus_per_node, 0),
        ("--processes-per-node", processes, 1),
        ("--cpus-per-process", args.cpus_per_process, 1),
        ("--warn-seconds", args.warn_seconds, 1),
    ):
        if value < low:
            raise UserError(f"got {value}", rule=f"must be at least {low}", remedy="give such a number", key=option)
    named = {"--partition": args.partition, "--account": args.account, "--qos": args.qos}
    options = tuple(f"{option}={value}" for option, value in named.items() if value is not None) + tuple(args.sbatch)
    texts = (args.time, args.job_name, args.setup, args.python or "", args.container_image, args.container_mounts)
    for text in (*texts, *options):
        if set("\n\r\0") & set(text):
            raise UserError(repr(text), rule="options are single lines", remedy="remove the line break")
    for option in (f"--job-name={args.job_name}", *options):
        _check_option(option)
    _check_time(args.time, args.warn_seconds)
    return SlurmJob(
        nodes=args.nodes,
        processes_per_node=processes,
        gpus_per_node=args.gpus_per_node,
        launcher=args.launcher,
        time=args.time,
        warn_seconds=args.warn_seconds,
        cpus_per_process=args.cpus_per_process,
        name=args.job_name,
        options=options,
        python=args.python or _this_python(in_container=bool(args.container_image)),
        setup=args.setup,
        container_image=args.container_image,
        container_mounts=args.container_mounts,
    )


def _check_option(option: str) -> None:
    """Check that an option can stand in a directive of sbatch."""
    if not OPTION.fullmatch(option):
        raise UserError(
            f"got {option!r}",
            rule="an option of sbatch is --name or --name=value, without double quotes or backslashes",
            remedy="write it as --mem=0 or --comment=two words",
            key="--sbatch",
        )


def _check_time(limit: str, warn_seconds: int) -> None:
    """Check a time limit as sbatch(1) reads it: MM, MM:SS, HH:MM:SS, D-HH, D-HH:MM, D-HH:MM:SS, or none."""
    if warn_seconds > MOST_WARN_SECONDS:
        raise UserError(
            f"got {warn_seconds}",
            rule=f"SLURM warns at most {MOST_WARN_SECONDS} seconds ahead",
            remedy="give less",
            key="--warn-seconds",
        )
    if limit.upper() in ("UNLIMITED", "INFINITE"):
        return
    found = TIME.fullmatch(limit)
    if found is None:
        raise UserError(
            f"got {limit!r}",
            rule="a time limit is MM, MM:SS, HH:MM:SS, D-HH, D-HH:MM or D-HH:MM:SS",
            remedy="write 24:00:00 for a day",
            key="--time",
        )
    days, parts = found["days"], [int(part) for part in found["parts"].split(":")]
    # Without days a single number is minutes and two are minutes and seconds; with days the first is hours.
    units = (3600, 60, 1) if days or len(parts) == 3 else (60, 1)
    seconds = 86400 * int(days or 0) + sum(unit * part for unit, part in zip(units, parts, strict=False))
    if 0 < seconds <= warn_seconds:  # 0 asks SLURM for no limit
        raise UserError(
            f"{limit} ({seconds} s)",
            rule=f"the run is told to save {warn_seconds} s before it",
            remedy="give a longer limit or fewer --warn-seconds",
            key="--time",
        )


def _this_python(*, in_container: bool) -> str:
    """The interpreter on the nodes: this one, which they see too where homes are shared; an image has its own."""
    return "python3" if in_container else sys.executable
