"""From a run file and trailing overrides to a checked `RunConfig`."""

import re
from collections.abc import Sequence
from pathlib import Path

from lorafusion_megatron.config.build import Builder, aliases, nearest
from lorafusion_megatron.config.job import PeftConfig
from lorafusion_megatron.config.rules import show
from lorafusion_megatron.config.run import RunConfig
from lorafusion_megatron.config.yaml_reader import parse_yaml
from lorafusion_megatron.errors import UserError


def load_run(path: Path | str, overrides: Sequence[str] = ()) -> RunConfig:
    """Read and check a run file.

    Args:
        path: the YAML file.
        overrides: ``a.b.c=value``, ``jobs[0].peft.r=8`` or ``jobs.NAME.peft.r=8``; the value is YAML.

    Returns:
        The run. Relative input paths stay relative to the current directory, or, where nothing is there, lead to the
        run file's directory.

    Raises:
        UserError: whatever is wrong with the file, a key, a value or an override. Files that the run names (model,
            data, adapters) are not opened here.
    """
    path = Path(path)
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else "not UTF-8 text"
        raise UserError(
            f"the run file cannot be read ({reason})",
            rule="it must be a YAML file",
            remedy="check the path",
            key=str(path),
        ) from None
    raw = parse_yaml(text, source=str(path))
    if not isinstance(raw, dict):
        raise UserError(
            f"got {show(raw)}",
            rule="a run file is a section of keys",
            remedy="start from a file in configs/",
            key=str(path),
        )
    for override in overrides:
        raw = apply_override(raw, override)
    return Builder(path.parent).section(RunConfig, raw, "")


def apply_override(raw: object, override: str) -> object:
    """The run file's data with one ``key=value`` applied; the given data stays as it was.

    Raises:
        UserError: no ``=``, a job that doesn't exist, or a key inside something that has no keys.
    """
    key, equals, text = override.partition("=")
    name = f"override {show(override)}"
    if not equals or not key.strip():
        raise UserError(
            "no key=value", rule="a trailing word is an override", remedy="write it like runtime.seed=1", key=name
        )
    return _with(raw, _steps(raw, key.strip(), name), parse_yaml(text, source=name), name)


def _steps(raw: object, key: str, name: str) -> list[str | int]:
    """The keys and indices that an override's key leads through; ``jobs.NAME`` becomes ``jobs``, its index."""
    steps: list[str | int] = []
    jobs = raw.get("jobs") if isinstance(raw, dict) else None
    if key.startswith("jobs.") and isinstance(jobs, list):
        rest = key.removeprefix("jobs.")
        names = {
            job["name"]: i for i, job in enumerate(jobs) if isinstance(job, dict) and isinstance(job.get("name"), str)
        }
        # A name may hold dots: the longest that fits is meant.
        fitting = [job for job in names if rest == job or rest.startswith(f"{job}.")]
        if not fitting:
            raise UserError(
                f"no job is called {show(rest.split('.')[0])}",
                rule="an override needs an existing job",
                remedy=nearest(rest.split(".")[0], names) if names else "give the jobs names",
                key=name,
            )
        job = max(fitting, key=len)
        steps, key = ["jobs", names[job]], rest.removeprefix(job).removeprefix(".")
        if not key:
            return steps
    for part in key.split("."):
        match = re.fullmatch(r"([^\[\]]+)((?:\[\d{1,6}\])*)", part)
        if not match:
            raise UserError(
                f"{show(part)} is not a key", rule="keys look like a.b or a[0].b", remedy="mend the override", key=name
            )
        steps += [match[1], *(int(index) for index in re.findall(r"\d+", match[2]))]
    return steps


def _with(node: object, steps: list[str | int], value: object, name: str) -> object:
    """``node`` with ``value`` at the end of ``steps``; containers on the way are copied (YAML aliases share them)."""
    if not steps:
        return value
    step, rest = steps[0], steps[1:]
    if isinstance(step, int):
        if not isinstance(node, list) or step >= len(node):
            size = f"it has {len(node)} entries" if isinstance(node, list) else "it is no list"
            raise UserError(f"index {step} does not exist", rule=size, remedy="count from 0", key=name)
        return [*node[:step], _with(node[step], rest, value, name), *node[step + 1 :]]
    if node is not None and not isinstance(node, dict):
        raise UserError(
            f"{step} would lie in {show(node)}", rule="only sections have keys", remedy="mend the override", key=name
        )
    spellings = {a: b for pair in aliases(PeftConfig).items() for a, b in (pair, pair[::-1])}
    kept = {key: old for key, old in (node or {}).items() if key != spellings.get(step)}
    return kept | {step: _with(kept.get(step), rest, value, name)}
