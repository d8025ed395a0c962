"""Jobs come and go while a run goes on: requests in a watched folder, decisions in a log that a resume replays.

    <save>/inbox/<anything>.yaml     a request, written by ``lorafusion-megatron job`` or by hand; removed when read
    <save>/events.jsonl              every decision with the window at whose beginning it took effect

A request is a job (a mapping with ``name``, ``dataset``, …, as under ``jobs`` of a run file) or
``{op: pause | resume | cancel, name: JOB}``. Rank 0 reads; what it decides is broadcast with the window's plan. A
checkpoint keeps which decisions it holds the effect of; a resume carries the others out at the same windows.
"""

import json
import os
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from ..config.build import Builder
from ..config.job import JobConfig
from ..config.yaml_reader import parse_yaml
from ..errors import UserError

OPERATIONS = {"pause": ("running",), "resume": ("paused",), "cancel": ("running", "paused")}
"""What a request may do to a job, and the statuses that a job can have then."""


type Request = tuple[str | int, ...]
"""What tells a request from another whose file has its name: that name, times of change and of its entry, inode."""
Hold = Callable[[str, dict[str, Any]], dict[str, Any]]
"""A new job's name and its mapping -> the mapping to record, whose adapter to start from stays as it is now."""
Check = Callable[[JobConfig], bool]
"""Whether a new job was found good; False where that is not known yet. Raises `UserError` where it can't be trained."""


class Inbox:
    """Rank 0's view of the requests. Whatever is wrong with one, or with its file, the run goes on.

    Args:
        folder: the run's folder.
        note: told of requests that are refused.
        carried_out: decisions that the run's checkpoint holds the effect of, by id; None: those up to ``held_window``.
        held_window: the window in or after which the checkpoint lies.
    """

    def __init__(
        self,
        folder: Path,
        note: Callable[[str], None],
        *,
        carried_out: Iterable[int] | None = (),
        held_window: int = -1,
    ) -> None:
        self.folder, self._note = folder, note
        self._log = folder / "events.jsonl"
        self._put_aside: set[Request] = set()
        """Requests that are answered but whose file could not be moved away."""
        self._log_read = True
        self._told: set[int] = set()
        """Lines of the log that were told to be none."""
        events = self._recorded()
        self._taken = {tuple(event["request"]) for event in events if "request" in event}
        before = [event["id"] for event in events if event["window"] <= held_window]
        self.carried_out: set[int] = set(before if carried_out is None else carried_out)
        """Ids of all decisions that took effect."""
        self._seen: set[Request] = set()
        """Requests that the last `decide` met."""
        self.waits = False
        """Whether the last `decide` left a request because its check goes on."""

    def decide(
        self,
        window: int,
        statuses: Mapping[str, str],
        check: Check,
        *,
        last: bool = False,
        hold: Hold = lambda name, job: job,
    ) -> list[dict[str, Any]]:
        """The events that take effect now: those recorded for this window or one before, then new requests.

        Args:
            window: number of the window that is about to be planned.
            statuses: name of every job so far -> its status.
            check: of new jobs.
            last: no job is left to train: what is recorded for later windows takes effect now.
            hold: of new jobs that were found good.
        """
        now, events = dict(statuses), []
        self.waits = False
        for event in self._recorded():
            if event["id"] in self.carried_out or (event["window"] > window and not last):
                continue
            self.carried_out.add(event["id"])
            reason = _unfit(event["op"], event["name"], now)
            if reason is not None:
                self._note(f"{event['op']} of {event['name']}, decided before, is left out: {reason}")
                continue
            now[event["name"]] = _after(event["op"])
            events.append(event)
        requests = self._requests()
        self._seen = {request for _, request in requests}
        for file, request in requests:
            event = self._answer(file, request, window, now, check, hold)
            if event is not None:
                self.carried_out.add(event["id"])
                now[event["name"]] = _after(event["op"])
                events.append(event)
        return events

    def unanswered(self, *, new: bool = False) -> list[str]:
        """Names of the files that wait; ``new``: those that have come since the last `decide`."""
        return [file.name for file, request in self._requests() if not (new and request in self._seen)]

    def _answer(
        self, file: Path, request: Request, window: int, statuses: Mapping[str, str], check: Check, hold: Hold
    ) -> dict[str, Any] | None:
        """Record what a request asks for, or refuse it; None where nothing is to be done now."""
        if request in self._taken:  # a kill came between its record and its removal
            self._move(file, request)
            return None
        try:
            event = self._read(file, statuses, check)
        except FileNotFoundError:  # withdrawn
            return None
        except Exception as error:  # whatever is wrong with a request, the run must go on, and be able to start
            reason = str(error) if isinstance(error, UserError) else f"{type(error).__name__}: {error}"
            self._note(f"request {file.name} is refused: {reason}")
            self._move(file, request, file.with_name(file.name + ".refused"))
            return None
        if event is None:
            self.waits = True
            return None
        try:
            if event["op"] == "add":
                event = {**event, "job": hold(event["name"], event["job"])}
            event = self._append({"window": window, **event, "request": list(request)})
        except OSError as error:
            self._note(f"request {file.name} waits: it could not be recorded ({error})")
            return None
        self._taken.add(request)
        self._move(file, request)
        return event

    def _move(self, file: Path, request: Request, target: Path | None = None) -> None:
        """Remove an answered request, or rename it; where that fails it is not looked at again."""
        try:
            if target is None:
                file.unlink()
            else:
                file.replace(target)
        except FileNotFoundError:
            pass
        except OSError as error:
            self._put_aside.add(request)
            self._note(f"request {file.name} is answered but can't be moved away ({error})")

    def _requests(self) -> list[tuple[Path, Request]]:
        """Files that wait, oldest first, each with what tells it from another of its name."""
        found = []
        try:
            for path in (self.folder / "inbox").iterdir():
                if path.suffix in (".yaml", ".yml") and path.name[0] != "." and path.is_file():
                    status = path.stat()
                    found.append((path, (path.name, status.st_mtime_ns, status.st_ctime_ns, status.st_ino)))
        except OSError:  # there is none, one was withdrawn, or the file system hangs: at the next window
            return []
        return sorted((entry for entry in found if entry[1] not in self._put_aside), key=lambda e: (e[1][1], e[1][0]))

    def _read(self, file: Path, statuses: Mapping[str, str], check: Check) -> dict[str, Any] | None:
        """The event that a request asks for; None while its check goes on."""
        raw = parse_yaml(file.read_text(encoding="utf-8", errors="replace"), source=file.name)
        if isinstance(raw, dict) and raw.get("op", "add") != "add":
            return _operation(raw, statuses, file.name)
        if isinstance(raw, dict):
            raw = {key: value for key, value in raw.items() if key != "op"}
        job = Builder(file.parent).section(JobConfig, raw, file.name)
        if _unfit("add", job.name, statuses):
            raise UserError(
                f"{job.name} exists in this run",
                rule="names differ",
                remedy="give the new job another name",
                key="name",
            )
        return {"op": "add", "name": job.name, "job": raw} if check(job) else None

    def _recorded(self) -> list[dict[str, Any]]:
        """All decisions, oldest first; one without an id is of an older version and has that of its line."""
        try:
            lines = self._log.read_text(errors="replace").splitlines()
        except FileNotFoundError:
            return []
        except OSError as error:
            if self._log_read:
                self._note(f"{self._log} can't be read ({error}): recorded decisions wait")
            self._log_read = False
            return []
        self._log_read = True
        out = []
        for number, line in enumerate(lines, 1):
            try:
                event = {"id": number, **json.loads(line)}
            except (ValueError, TypeError, RecursionError):
                continue  # cut off by a kill while it was written; its request file is still there
            if _is_event(event):
                out.append(event)
            elif number not in self._told:
                self._told.add(number)
                self._note(f"line {number} of {self._log} is no decision and is passed over")
        return out

    def _append(self, event: Mapping[str, Any]) -> dict[str, Any]:
        """Record a decision; it comes back with its id."""
        with self._log.open("a+b") as file:
            file.seek(0)
            lines = file.read().splitlines()
            known = [recorded["id"] for recorded in self._recorded()]
            # Also beyond what the checkpoint of another folder holds: an id that it knows would be taken for done.
            numbered = {"id": max([len(lines), *known, *self.carried_out]) + 1, **event}
            # A kill may have cut the last line off; what follows must not become a part of it.
            file.seek(max(0, file.tell() - 1))
            start = b"" if file.read(1) in (b"", b"\n") else b"\n"
            file.write(start + json.dumps(numbered).encode() + b"\n")
            file.flush()
            os.fsync(file.fileno())
        return numbered


def _is_event(event: Mapping[str, Any]) -> bool:
    """Whether a line of the log has the form of a decision."""
    numbers = (event.get("id"), event.get("window"))
    if not all(type(number) is int for number in numbers) or type(event.get("name")) is not str:
        return False
    if type(event.get("request", [])) is not list:
        return False
    return event.get("op") in OPERATIONS or (event.get("op") == "add" and isinstance(event.get("job"), dict))


def _operation(raw: Mapping[str, Any], statuses: Mapping[str, str], source: str) -> dict[str, Any]:
    op, name = raw.get("op"), str(raw.get("name"))
    if op not in OPERATIONS or set(raw) != {"op", "name"}:
        raise UserError(
            f"got {dict(raw)}",
            rule=f"a request is a job, or op ({', '.join(OPERATIONS)}) and name",
            remedy="write it with lorafusion-megatron job",
            key=source,
        )
    if (reason := _unfit(op, name, statuses)) is not None:
        raise UserError(
            f"{op} of {name}, which is {reason}",
            rule=f"only a job that is {' or '.join(OPERATIONS[op])} can be given {op}",
            remedy="see lorafusion-megatron job list",
            key=source,
        )
    return {"op": op, "name": name}


def _unfit(op: str, name: str, statuses: Mapping[str, str]) -> str | None:
    """What a job is that can't be given an operation now; None where it can."""
    if op == "add":
        return "there already" if name.lower() in {other.lower() for other in statuses} else None
    status = statuses.get(name, "not in this run")
    return None if status in OPERATIONS.get(op, ()) else status


def _after(op: str) -> str:
    """Status of a job after an operation."""
    return {"add": "running", "pause": "paused", "resume": "running", "cancel": "cancelled"}[op]
