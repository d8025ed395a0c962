"""Checkpoints of a run: what an exact resume needs, in files that don't depend on the topology.

    state/00000012/manifest.json        jobs, counters, losses, plan position, checksums; written last
    state/00000012/schedule.json        the window that was under way, where the checkpoint lies inside one
    state/00000012/<job>.safetensors    fp32 masters and moments, whole factors: master/<layer>.<projection>.<A|B>

A checkpoint is written under a temporary name, flushed and renamed: under its own name it is whole. Nothing in it is
executed when it is read (JSON and safetensors only).
"""

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from ..errors import UserError
from ..mcore.gather import Factors
from ..mcore.steps import StepCounters
from ..models.files import flush
from ..models.tensors import save_tensors
from ..types import Microbatch, Sample, Schedule, StepEnd
from .sequences import checkpoint_folder, sequences

FORMAT = 1
PARTS = ("master", "exp_avg", "exp_avg_sq")
HASHED_AT_ONCE = 1 << 24
"""Bytes, about 10 ms."""


class StateWriter:
    """Writes one checkpoint piece by piece; nothing shows under its name before `commit`."""

    def __init__(self, folder: Path, sequence: int) -> None:
        self.path = checkpoint_folder(folder, sequence)
        self._temporary = folder / f".{sequence:08d}.{os.getpid()}"
        self._files: dict[str, dict[str, Any]] = {}
        shutil.rmtree(self._temporary, ignore_errors=True)
        self._temporary.mkdir(parents=True)

    def job(self, name: str, parts: Mapping[str, Factors]) -> None:
        """Write masters and moments of one job."""
        tensors = {
            factor_key(part, layer, projection, factor): tensor
            for part, factors in parts.items()
            for (layer, projection, factor), tensor in factors.items()
        }
        file = state_file(self._temporary, name)
        save_tensors(tensors, file)
        self._seal(file)

    def schedule(self, schedule: Schedule) -> None:
        """Write the window that is under way."""
        file = self._temporary / "schedule.json"
        file.write_text(json.dumps(encode_schedule(schedule)))
        self._seal(file)

    def commit(self, manifest: Mapping[str, Any]) -> Path:
        """Write the manifest and give the checkpoint its name."""
        file = self._temporary / "manifest.json"
        # Not indented: that is done in Python, beside the thread that trains, and losses are many numbers.
        text = json.dumps({"format": FORMAT, **manifest, "files": self._files}, sort_keys=True)
        file.write_text(f'{text[:-1]}, "digest": "{_digest(text)}"}}\n')
        flush(file)
        flush(self._temporary)
        if self.path.exists():  # a damaged one of the same number, which a resume passed over
            shutil.rmtree(self.path)
        self._temporary.rename(self.path)
        flush(self.path.parent)
        return self.path

    def discard(self) -> None:
        """Remove what was written."""
        shutil.rmtree(self._temporary, ignore_errors=True)

    def _seal(self, file: Path) -> None:
        flush(file)
        self._files[file.name] = {"bytes": file.stat().st_size, "sha256": _sha256(file)}


def check_folder(folder: Path) -> None:
    """Check that a state folder is one, or is not there.

    Raises:
        UserError: it is a file, or a link to a disk that is not mounted at the moment.
    """
    if os.path.lexists(folder) and not folder.is_dir():
        leads = f"leads to {os.path.realpath(folder)}, which is not there" if folder.is_symlink() else "is no folder"
        raise UserError(
            f"{folder} {leads}",
            rule="a run keeps its checkpoints there",
            remedy="mount what it leads to, or remove it to begin anew",
            key="checkpoint.save",
        )


def newest_state(folder: Path, note: Callable[[str], None]) -> tuple[Path, dict[str, Any]] | None:
    """The newest whole checkpoint and its manifest; None where there is no checkpoint.

    Args:
        folder: the state folder.
        note: told which damaged ones are passed over and why.

    Raises:
        UserError: one can't be read at the moment or is of another version, or all are damaged: to begin anew then
            would throw away what was trained, so it must be asked for.
    """
    check_folder(folder)
    damaged = 0
    for sequence in sequences(folder):
        path = checkpoint_folder(folder, sequence)
        try:
            return path, check_state(path)
        except UserError:
            raise
        except (ValueError, KeyError, TypeError, FileNotFoundError) as error:
            reason = " ".join(str(error).split()) or type(error).__name__
            note(f"checkpoint {path} is passed over: {reason}")
            damaged += 1
        except OSError as error:
            raise UserError(
                f"{path} can't be read ({error})",
                rule="a run goes on from its newest checkpoint",
                remedy="start again when it can be, remove it to go on from the one before, or set checkpoint.resume: "
                "never to begin anew",
                key="checkpoint.save",
            ) from None
    if damaged:
        raise UserError(
            f"none of the {damaged} checkpoints in {folder} is whole",
            rule="a run goes on from its newest checkpoint",
            remedy="bring one back, or set checkpoint.resume: never to begin anew",
            key="checkpoint.save",
        )
    return None


def set_damaged_aside(folder: Path, whole: Path) -> None:
    """Rename the checkpoints that are newer than the newest whole one, so that none of them counts as kept."""
    for sequence in sequences(folder):
        path = checkpoint_folder(folder, sequence)
        if path.name > whole.name:
            aside = path.with_suffix(".damaged")
            shutil.rmtree(aside, ignore_errors=True)
            path.rename(aside)


def check_state(path: Path) -> dict[str, Any]:
    """Check every file of a checkpoint against its checksum.

    Returns:
        The manifest.

    Raises:
        ValueError, OSError, KeyError, TypeError: what is wrong.
        UserError: it is of another version.
    """
    try:
        manifest = json.loads((path / "manifest.json").read_text())
    except RecursionError:
        raise ValueError("manifest.json is nested too deep") from None
    if not isinstance(manifest, dict):
        raise ValueError("manifest.json is no JSON object")
    if manifest["format"] != FORMAT:
        raise UserError(
            f"{path} has format {manifest['format']}",
            rule=f"this version of lorafusion_megatron reads format {FORMAT}",
            remedy="go on with the version that wrote it, or set checkpoint.resume: never to begin anew",
            key="checkpoint.save",
        )
    digest = manifest.pop("digest", None)  # earlier versions wrote none
    if digest is not None and digest != _digest(json.dumps(manifest, sort_keys=True)):
        raise ValueError("manifest.json is damaged: its checksum differs")
    _check_form(manifest)
    for name, seal in manifest["files"].items():
        file = path / name
        if file.parent != path:
            raise ValueError(f"file name {name!r} leaves the folder")
        if not file.is_file():
            raise ValueError(f"{name} is missing")
        if file.stat().st_size != seal["bytes"]:
            raise ValueError(f"{name} has {file.stat().st_size} bytes, written were {seal['bytes']}")
        if _sha256(file) != seal["sha256"]:
            raise ValueError(f"{name} is damaged: its checksum differs")
    return manifest


def load_job(path: Path, name: str, keys: list[tuple[int, str]]) -> Iterator[tuple[str, Factors]]:
    """One job's parts: ``(part, factors)`` for the (layer, projection) pairs of this rank.

    Raises:
        ValueError: a tensor is missing.
    """
    try:
        with safe_open(state_file(path, name), framework="pt", device="cpu") as file:
            for part in PARTS:
                yield (
                    part,
                    {
                        (layer, projection, factor): file.get_tensor(factor_key(part, layer, projection, factor))
                        for layer, projection in keys
                        for factor in ("A", "B")
                    },
                )
    except SafetensorError as error:
        raise ValueError(f"{state_file(path, name)}: {error}") from None


def read_shapes(file: Path) -> dict[str, tuple[int, ...]]:
    """Every tensor of a job's file with its shape."""
    with safe_open(file, framework="pt", device="cpu") as opened:
        return {key: tuple(opened.get_slice(key).get_shape()) for key in opened.keys()}  # noqa: SIM118


def state_file(path: Path, job: str) -> Path:
    """The file of a job in a checkpoint."""
    return path / f"{job}.safetensors"


def factor_key(part: str, layer: int, projection: str, factor: str) -> str:
    """The name of one factor's master or moment in that file."""
    return f"{part}/{layer}.{projection}.{factor}"


def drop_old(folder: Path, keep: int) -> None:
    """Keep the newest ``keep`` checkpoints; remove what a killed run left unfinished."""
    for sequence in sequences(folder)[keep:]:
        shutil.rmtree(checkpoint_folder(folder, sequence))
    drop_unfinished(folder)


def drop_unfinished(folder: Path, *, own: bool = False) -> None:
    """Remove checkpoints that never got their name.

    Args:
        folder: the state folder.
        own: also those under this process's number, where it writes none yet: a container that starts again often
            has the number of the one that was killed.
    """
    if folder.is_dir():
        for path in folder.iterdir():
            if path.is_dir() and path.name.startswith(".") and (own or not path.name.endswith(f".{os.getpid()}")):
                shutil.rmtree(path, ignore_errors=True)


def encode_schedule(schedule: Schedule) -> dict[str, Any]:
    """A schedule as JSON."""
    return {
        "replicas": [
            [
                [[s.job, s.step, s.position, s.row, s.tokens, s.batch_label_tokens] for s in microbatch.samples]
                for microbatch in replica
            ]
            for replica in schedule.replicas
        ],
        "step_ends": [[end.job, end.step, end.position] for end in schedule.step_ends],
        "distance": schedule.distance,
        "token_capacity": schedule.token_capacity,
        "padding_multiple": schedule.padding_multiple,
    }


def decode_schedule(path: Path) -> Schedule:
    """The schedule of a checkpoint."""
    value = json.loads((path / "schedule.json").read_text())
    names = ("job", "step", "position", "row", "tokens", "batch_label_tokens")
    return Schedule(
        replicas=tuple(
            tuple(
                Microbatch(samples=tuple(Sample(**dict(zip(names, s, strict=True))) for s in samples))
                for samples in replica
            )
            for replica in value["replicas"]
        ),
        step_ends=tuple(StepEnd(job=job, step=step, position=position) for job, step, position in value["step_ends"]),
        distance=value["distance"],
        token_capacity=value["token_capacity"],
        padding_multiple=value["padding_multiple"],
    )


def _check_form(manifest: Mapping[str, Any]) -> None:
    """Raise ValueError or KeyError where a manifest is none that a resume can read."""
    kinds = {"window": int, "inside": bool, "shape": dict, "jobs": list, "files": dict}
    for key, kind in kinds.items():
        if type(manifest[key]) is not kind:
            raise ValueError(f"manifest.json has {manifest[key]!r:.40} as {key}")
    texts, counts = dict.fromkeys(("name", "status", "reason"), str), dict.fromkeys(("num_steps", "applied"), int)
    fields = texts | counts | {"losses": list, "evals": list, "added": bool, "config": dict}
    for job in manifest["jobs"]:
        for key, kind in fields.items():
            if type(job[key]) is not kind:
                raise ValueError(f"manifest.json has {job[key]!r:.40} as {key} of a job")
        if job["counters"] is not None:
            StepCounters(**job["counters"])
    for seal in manifest["files"].values():
        if type(seal["bytes"]) is not int or type(seal["sha256"]) is not str:
            raise ValueError(f"manifest.json has {seal!r:.80} of a file")


def _digest(text: str) -> str:
    """Of a manifest without its digest, as sorted JSON: what is read and written again has the same."""
    return hashlib.sha256(text.encode()).hexdigest()


def _sha256(file: Path) -> str:
    """The sum of a file, read in large pieces.

    A thread that hashes 256 KiB at a time, as `hashlib.file_digest`, asks for the interpreter's lock as often; where
    another thread computes it waits 5 ms each time, and a gigabyte takes 40 s instead of one (*measured*).
    """
    digest, buffer = hashlib.sha256(), memoryview(bytearray(HASHED_AT_ONCE))
    with file.open("rb", buffering=0) as opened:
        while read := opened.readinto(buffer):
            digest.update(buffer[:read])
    return digest.hexdigest()
