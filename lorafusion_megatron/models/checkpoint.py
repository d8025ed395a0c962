"""The files of a Hugging Face checkpoint and their tensors, by headers alone; knows no torch."""

import hashlib
import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from safetensors import SafetensorError, safe_open

from lorafusion_megatron.errors import UserError
from lorafusion_megatron.models.families import hf_tensors
from lorafusion_megatron.models.files import read_fault
from lorafusion_megatron.types import ModelSpec

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
_DTYPES = {"F32", "F16", "BF16"}
# Buffers that old versions of Transformers saved; they follow from the configuration.
_IGNORED = (".rotary_emb.inv_freq",)
_HEAD, _EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"
_SAMPLES, _SAMPLE_BYTES = 64, 1024
"""Places of a tensor that are compared, and the bytes at each: trained weights differ everywhere."""


class Header(NamedTuple):
    """What a safetensors file says of one tensor ahead of its values."""

    shape: tuple[int, ...]
    dtype: str
    """``F32``, ``BF16``, …"""


def read_json_object(file: Path, *, key: str) -> dict[str, Any]:
    """Read a JSON file whose top level is an object.

    Raises:
        UserError: it is missing, unreadable or something else.
    """
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        missing = isinstance(error, FileNotFoundError)
        given = f"{file} does not exist" if missing else f"{file} can't be read ({read_fault(file, error)})"
        raise UserError(given, rule="it must be a JSON file", remedy="complete the folder", key=key) from None
    if not isinstance(content, dict):
        raise UserError(
            f"{file} holds a {type(content).__name__}", rule="it must be a JSON object", remedy="mend it", key=key
        )
    return content


def checkpoint_files(folder: str | Path, *, key: str = "base_model.path") -> tuple[Path, ...]:
    """The safetensors files of a model: ``model.safetensors``, or else those that the index names.

    Raises:
        UserError: there is neither, or the index names a file that is missing.

    Note: where both are there Transformers takes the single file, so that is the model that this folder is elsewhere.
    """
    folder = Path(folder)
    index, single = folder / INDEX_FILE, folder / SINGLE_FILE
    if os.path.isfile(single):
        return (single,)
    if not os.path.lexists(index):
        other = sorted(file.name for suffix in ("*.bin", "*.gguf", "*.pth") for file in folder.glob(suffix))
        raise UserError(
            f"{folder} holds no {SINGLE_FILE} and no {index.name}" + (f", but {other[0]}" if other else ""),
            rule="weights are read from safetensors files alone",
            remedy="save the model with safetensors, or complete the download",
            key=key,
        )
    weight_map = read_json_object(index, key=key).get("weight_map")
    names = list(weight_map.values()) if isinstance(weight_map, dict) else []
    if not names or not all(isinstance(name, str) and name and Path(name).name == name for name in names):
        raise UserError(
            f"{index} has no usable weight_map",
            rule="it maps tensors to files of the folder",
            remedy="complete the download",
            key=key,
        )
    files = tuple(folder / name for name in sorted(set(names)))
    missing = [file.name for file in files if not os.path.isfile(file)]
    if missing:
        raise UserError(
            f"{folder} lacks {missing[0]} ({len(missing)} of {len(files)} files)",
            rule=f"{index.name} names it",
            remedy="complete the download",
            key=key,
        )
    return files


def check_base_weights(path: str | Path, spec: ModelSpec, *, key: str = "base_model.path") -> dict[str, Path]:
    """Check the tensors of a checkpoint against the model by the headers of its files alone.

    Args:
        path: Hugging Face directory.
        spec: what its ``config.json`` says.
        key: where the path was given, for messages.

    Returns:
        Name of each tensor that the model needs -> the file that holds it.

    Raises:
        UserError: a tensor is missing, unknown, in two files, or of another shape or a dtype that is not floating
            point of 16 or 32 bits; an output layer is another than the embedding that it is tied to; a file is damaged.
    """
    wanted = dict(hf_tensors(spec))
    found: dict[str, Path] = {}
    head: Path | None = None
    for file in checkpoint_files(path, key=key):
        for name, (shape, dtype) in read_header(file, key=key, remedy="download it again").items():
            if name.endswith(_IGNORED):
                continue
            if spec.tied and name == _HEAD:
                head = file
                continue
            if name not in wanted:
                raise tensor_error(
                    file, name, "is not part of the model", "config.json and weights belong together", key
                )
            if name in found:
                raise tensor_error(file, name, f"is in {found[name].name} too", "each tensor is in one file", key)
            if shape != wanted[name]:
                given = f"has shape {list(shape)}"
                raise tensor_error(file, name, given, f"config.json makes it {list(wanted[name])}", key)
            if dtype not in _DTYPES:
                raise tensor_error(file, name, f"is {dtype}", "weights are float32, float16 or bfloat16", key)
            found[name] = file
    missing = [name for name in wanted if name not in found]
    if missing:
        raise tensor_error(Path(path), missing[0], f"is missing ({len(missing)} in all)", "the model needs it", key)
    if head is not None and _sampled(head, [_HEAD])[_HEAD] != _sampled(found[_EMBEDDING], [_EMBEDDING])[_EMBEDDING]:
        # Transformers 5 takes this tensor, earlier ones the embedding: which model it is can't be told.
        raise UserError(
            f"{_HEAD} in {head} differs from the embedding",
            rule="config.json ties the output layer to it",
            remedy="set tie_word_embeddings to false there, or remove the tensor",
            key=key,
        )
    return found


def weights_fingerprint(files: Mapping[str, Path]) -> str:
    """SHA-256 over name, type, shape and sampled values of every tensor: the same however a model is cut into files.

    Args:
        files: name of each tensor -> its file, as `check_base_weights` gives it.

    Note: reads 64 KiB of each tensor. Raises OSError where a file is away by now.
    """
    digest = hashlib.sha256()
    by_file: dict[Path, list[str]] = {}
    for name, file in files.items():
        by_file.setdefault(file, []).append(name)
    sampled = {name: value for file, names in by_file.items() for name, value in _sampled(file, names).items()}
    for name in sorted(sampled):
        digest.update(name.encode() + b"\0" + sampled[name])
    return digest.hexdigest()


def _sampled(file: Path, names: Iterable[str]) -> dict[str, bytes]:
    """Type, shape and some of the values of tensors of a safetensors file whose header was found good."""
    with file.open("rb") as opened:
        size = int.from_bytes(opened.read(8), "little")
        header = json.loads(opened.read(size))
        out = {}
        for name in names:
            entry = header[name]
            start, end = entry["data_offsets"]
            room = max(0, end - start - _SAMPLE_BYTES)
            pieces = [json.dumps([entry["dtype"], entry["shape"]]).encode()]
            for offset in sorted({room * place // (_SAMPLES - 1) for place in range(_SAMPLES)}):
                opened.seek(8 + size + start + offset)
                pieces.append(opened.read(min(_SAMPLE_BYTES, end - start - offset)))
            out[name] = b"".join(pieces)
    return out


def read_header(file: Path, *, key: str, remedy: str) -> dict[str, Header]:
    """Name of every tensor of a safetensors file -> its shape and dtype; no values are read.

    Raises:
        UserError: the file is missing, unreadable or damaged; ``remedy`` is what to do about a damaged one.
    """
    try:
        with safe_open(file, framework="numpy") as opened:
            slices = ((name, opened.get_slice(name)) for name in opened.keys())  # noqa: SIM118
            return {name: Header(tuple(part.get_shape()), part.get_dtype()) for name, part in slices}
    except (SafetensorError, OSError) as error:
        denied = isinstance(error, OSError) and os.path.lexists(file)
        raise UserError(
            f"{file} can't be read ({read_fault(file, error)})",
            rule="it must be a whole safetensors file",
            remedy="make it readable" if denied else remedy,
            key=key,
        ) from None


def tensor_error(file: Path, tensor: str, given: str, rule: str, key: str) -> UserError:
    """An error about one tensor of a file."""
    remedy = "use the config.json and the weights of one unquantized model, downloaded completely"
    return UserError(f"{file}: tensor {tensor} {given}", rule=rule, remedy=remedy, key=key)
