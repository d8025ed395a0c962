"""Jobs come and go while a run goes on: requests in a watched folder, decisions in a log that a resume replays.

    <save>/inbox/<anything>.yaml     a request, written by ``lorafusion-megatron job`` or by hand; removed when read
    <save>/events.jsonl              every decision with the window at whose beginning it took effect

A request is a job (a mapping with ``name``, ``dataset``, …, as under ``jobs`` of a run file) or
``{op: pause | resume | cancel, name: JOB}``. Rank 0 reads; what it decides is broadcast with the window's plan.
"""

import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from ..config.build import Builder
from ..config.job import JobConfig
from ..config.run import RunConfig
from ..config.yaml_reader import parse_yaml
from ..errors import UserError
from .checks import check_dataset, check_run
from .initial import check_initial_adapters
from .inputs import load_eval_dataset, load_job_dataset
from .setup import Prepared

OPERATIONS = ("pause", "resume", "cancel")


class Inbox:
    """Rank 0's view of the requests.

    Args:
        folder: the run's folder.
        note: told of requests that are refused.
    """

    def __init__(self, folder: Path, note: Callable[[str], None]) -> None:
        self.folder, self._note = folder, note
        self._log = folder / "events.jsonl"

    def decide(self, window: int, statuses: Mapping[str, str], check: Callable[[JobConfig], None]) -> list[dict]:
        """The events of a window: those that were decided for it before (a resumed run), then new requests.

        Args:
            window: number of the window that is about to be planned.
            statuses: name of every job so far -> its status.
            check: raises `UserError` where a new job can't run with this model.
        """
        events = [event for event in self._recorded() if event["window"] == window]
        now = dict(statuses)
        for event in events:
            now[event["name"]] = _after(event["op"])
        for file in self._requests():
            try:
                event = self._read(file, now, check)
            except Exception as error:  # whatever is wrong with a request, the run must go on, and be able to start
                reason = str(error) if isinstance(error, UserError) else f"{type(error).__name__}: {error}"
                self._note(f"request {file.name} is refused: {reason}")
                file.replace(file.with_name(file.name + ".refused"))
                continue
            try:
                self._append({"window": window, **event})
            except OSError as error:
                self._note(f"request {file.name} waits: it could not be recorded ({error})")
                break
            file.unlink()
            now[event["name"]] = _after(event["op"])
            events.append({"window": window, **event})
        return events

    def _requests(self) -> list[Path]:
        inbox = self.folder / "inbox"
        if not inbox.is_dir():
            return []
        files = [p for p in inbox.iterdir() if p.is_file() and p.suffix in (".yaml", ".yml") and p.name[0] != "."]
        return sorted(files, key=lambda p: (p.stat().st_mtime_ns, p.name))

    def _read(self, file: Path, statuses: Mapping[str, str], check: Callable[[JobConfig], None]) -> dict[str, Any]:
        raw = parse_yaml(file.read_text(encoding="utf-8", errors="replace"), source=file.name)
        if isinstance(raw, dict) and raw.get("op", "add") != "add":
            return _operation(raw, statuses, file.name)
        if isinstance(raw, dict):
            raw = {key: value for key, value in raw.items() if key != "op"}
        job = Builder(file.parent).section(JobConfig, raw, file.name)
        if job.name.lower() in {name.lower() for name in statuses}:
            raise UserError(
                f"{job.name} exists in this run",
                rule="names differ",
                remedy="give the new job another name",
                key="name",
            )
        check(job)
        return {"op": "add", "name": job.name, "job": raw}

    def _recorded(self) -> list[dict[str, Any]]:
        if not self._log.exists():
            return []
        out = []
        for line in self._log.read_text().splitlines():
            try:
                out.append(json.loads(line))
            except ValueError:  # cut off by a kill while it was written; its request file is still there
                continue
        return out

    def _append(self, event: Mapping[str, Any]) -> None:
        with self._log.open("a+b") as file:
            # A kill may have cut the last line off; what follows must not become a part of it.
            file.seek(max(0, file.tell() - 1))
            start = b"" if file.read(1) in (b"", b"\n") else b"\n"
            file.write(start + json.dumps(event).encode() + b"\n")
            file.flush()
            os.fsync(file.fileno())


def check_new_job(run: RunConfig, prepared: Prepared) -> None:
    """Refuse a request whose job, the last one of ``run``, this model or machine can't train.

    Raises:
        UserError: what is wrong with it.
    """
    check_run(run, prepared.spec)
    index = len(run.jobs) - 1
    for section, load in (("dataset", load_job_dataset), ("eval", load_eval_dataset)):
        dataset = load(run, index, vocab_size=prepared.spec.vocab_size)
        if dataset is not None:
            check_dataset(
                run, prepared.spec, index, dataset, padding_multiple=prepared.padding_multiple, section=section
            )
    check_initial_adapters(run, prepared.spec)


def _operation(raw: Mapping[str, Any], statuses: Mapping[str, str], source: str) -> dict[str, Any]:
    op, name = raw.get("op"), str(raw.get("name"))
    if op not in OPERATIONS or set(raw) != {"op", "name"}:
        raise UserError(
            f"got {dict(raw)}",
            rule=f"a request is a job, or op ({', '.join(OPERATIONS)}) and name",
            remedy="write it with lorafusion-megatron job",
            key=source,
        )
    status = statuses.get(name)
    fits = {"pause": ("running",), "resume": ("paused",), "cancel": ("running", "paused")}[op]
    if status not in fits:
        raise UserError(
            f"{op} of {name}, which is {status or 'not in this run'}",
            rule=f"only a job that is {' or '.join(fits)} can be given {op}",
            remedy="see lorafusion-megatron job list",
            key=source,
        )
    return {"op": op, "name": name}


def _after(op: str) -> str:
    """Status of a job after an operation."""
    return {"add": "running", "pause": "paused", "resume": "running", "cancel": "cancelled"}[op]
