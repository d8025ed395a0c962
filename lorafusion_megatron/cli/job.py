"""``job``: add, pause, resume, cancel or list the jobs of a run that is going on.

A request is a file in ``RUN_DIR/inbox``; the run reads it when its window ends, does the same on all ranks, records
it in ``RUN_DIR/events.jsonl`` and removes the file. A refused request stays as ``….refused`` and the log says why.
"""

import argparse
import json
import os
import time
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lorafusion_megatron.errors import UserError

if TYPE_CHECKING:
    from lorafusion_megatron.config.job import JobConfig

PATHS = (("dataset", "path"), ("dataset", "chat_template"), ("eval", "path"), ("peft", "init_from"))
"""Keys of a job that name a file or folder."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of the command."""
    actions = parser.add_subparsers(dest="action", metavar="ACTION", required=True)
    add = actions.add_parser("add", help="let a new job join")
    add.add_argument("run_dir", type=Path, metavar="RUN_DIR", help="the run's checkpoint.save folder")
    add.add_argument("job_file", type=Path, metavar="JOB.yaml", help="a job, with the keys of one under 'jobs'")
    for action, text in (
        ("pause", "keep a job's adapter and state but train no further"),
        ("resume", "go on with a paused job"),
        ("cancel", "end a job; its latest adapter is written"),
    ):
        sub = actions.add_parser(action, help=text)
        sub.add_argument("run_dir", type=Path, metavar="RUN_DIR", help="the run's checkpoint.save folder")
        sub.add_argument("name", metavar="JOB", help="the job's name")
    listing = actions.add_parser("list", help="list the jobs and the requests that wait")
    listing.add_argument("run_dir", type=Path, metavar="RUN_DIR", help="the run's checkpoint.save folder")


def run(args: argparse.Namespace) -> int:
    """Leave a request, or list; 0."""
    from lorafusion_megatron.training.lifecycle import OPERATIONS
    from lorafusion_megatron.training.status import read_status

    status = read_status(args.run_dir)
    inbox = args.run_dir / "inbox"
    if args.action == "list":
        for job in status.jobs:
            reason = f"  ({job.reason})" if job.reason else ""
            print(f"{job.name}  {job.status}  {job.step}/{job.num_steps}{reason}")
        for file in sorted(inbox.glob("*.yaml")):
            print(f"waiting: {file.name}")
        return 0
    live = ("paused",) if status.state == "done" else ("paused", "running")
    fit = [job.name for job in status.jobs if job.status in live and job.status in OPERATIONS.get(args.action, ())]
    waits = status.state != "running" and args.action != "add" and args.name in fit
    if status.state != "running" and not waits:
        raise UserError(
            f"the run in {args.run_dir} is {status.state}",
            rule="requests are read by a running run",
            remedy="change the run file and start it again",
            key="RUN_DIR",
        )
    if args.action == "add":
        text, name = _read_job(args.job_file)
    else:
        known = {job.name for job in status.jobs}
        if args.name not in known:
            raise UserError(
                f"no job is called {args.name}",
                rule=f"this run has {', '.join(sorted(known))}",
                remedy="give one of these names",
                key="JOB",
            )
        # Quoted: YAML would read some names as numbers or null.
        text, name = f"op: {args.action}\nname: {json.dumps(args.name)}\n", f"{args.action}-{args.name}"
    target = _leave(inbox, name, text)
    print(f"{target} is read when {'the same command is started again' if waits else 'the window of the run ends'}")
    return 0


def _leave(inbox: Path, name: str, text: str) -> Path:
    """Write a request into the inbox; returns its file."""
    # Written under a name that the run does not read, then renamed: it never sees half of one.
    target = inbox / f"{time.time_ns()}-{name}.yaml"
    temporary = target.with_name(f".{target.name}.{os.getpid()}")
    try:
        inbox.mkdir(exist_ok=True)
        temporary.write_text(text, encoding="utf-8")
        temporary.rename(target)
    except OSError as error:
        with suppress(OSError):
            temporary.unlink()
        raise UserError(
            f"{inbox} can't be written ({error.strerror or error})",
            rule="requests are files in this folder",
            remedy="make it a folder that you may write",
            key="RUN_DIR",
        ) from None
    return target


def _read_job(path: Path) -> tuple[str, str]:
    """The text of a job file and the job's name, after the checks that need neither the model nor the data."""
    from lorafusion_megatron.config.build import Builder
    from lorafusion_megatron.config.job import JobConfig
    from lorafusion_megatron.config.yaml_reader import parse_yaml

    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        raise UserError(
            f"{path} can't be read ({error})", rule="a job is a YAML file", remedy="check the path", key="JOB.yaml"
        ) from None
    raw = parse_yaml(text, source=str(path))
    job = Builder(path.parent).section(JobConfig, raw, str(path))
    return _absolute(raw, job), job.name


def _absolute(raw: Any, job: "JobConfig") -> str:
    """A job as text, with absolute paths: the run would look relative ones up in its own folders."""
    for section, key in PATHS:
        found = getattr(getattr(job, section), key)
        # A chat template with a brace is one that is given as it is.
        if found is not None and (key != "chat_template" or "{" not in found):
            raw[section][key] = os.path.abspath(found)
    # JSON is YAML, and quotes names that YAML would take for numbers.
    return json.dumps(raw, ensure_ascii=False, indent=1) + "\n"
