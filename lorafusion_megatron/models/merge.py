"""Merging an adapter into its base model: a Hugging Face directory with the layout of the base."""

import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from io import BufferedReader
from pathlib import Path

import torch

from lorafusion_megatron.errors import UserError
from lorafusion_megatron.models.adapter import read_adapter
from lorafusion_megatron.models.checkpoint import INDEX_FILE, SINGLE_FILE, check_base_weights, checkpoint_files
from lorafusion_megatron.models.config import read_model_spec
from lorafusion_megatron.models.files import flush, prepare_output, temporary_folder

CONFIG_FILE = "config.json"
# Configuration, tokenizer, their code and licence; weights in other formats would be those of the base.
_COPIED_SUFFIXES = (".json", ".jinja", ".model", ".txt", ".tiktoken", ".py")
_TEMPLATES = "additional_chat_templates"
"""Where Transformers keeps a tokenizer's other chat templates."""
_DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
_BLOCK_BYTES = 16 << 20
"""fp32 bytes of the rows that are merged at a time, and bytes that are copied at a time."""


@dataclass(frozen=True, kw_only=True)
class _Stored:
    """Where one tensor's bytes stand in a safetensors file."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    start: int
    stop: int


@dataclass(frozen=True, kw_only=True)
class _Delta:
    """Both factors of a projection in fp32 and their scale."""

    a: torch.Tensor
    b: torch.Tensor
    scaling: float


def merge_adapter(
    base: str | Path, adapter: str | Path, output: str | Path, *, progress: Callable[[int, int], None] | None = None
) -> str | None:
    """Write the base model with an adapter added to its weights.

    ``W' = cast(fp32(W) + scaling * B A)`` for each projection that the adapter trains, in the dtype of W; every other
    tensor is copied byte for byte.

    Args:
        base: Hugging Face directory of the base model.
        adapter: PEFT folder.
        output: directory to write, new or empty. Files and shards are those of the base.
        progress: called with the bytes of weights written so far and in all.

    Returns:
        The base model that the adapter names, where that is another one.

    Raises:
        UserError: the base or the adapter is not usable, they don't belong together, there is too little space, the
            output exists, or a merged weight is too large for its dtype.

    Note:
        Holds the adapter and some 16 MiB of one weight in memory, whatever the model's size: the header of a
        safetensors file serves for the merged file too, since names, shapes and dtypes stay, so that rows go from
        file to file. The output appears by one rename once all of it is on the disk; where the folder exists
        already, file by file, the configuration last.
    """
    spec = read_model_spec(base, key="--base")
    check_base_weights(base, spec, key="--base")
    config, tensors = read_adapter(adapter, spec, key="--adapter")
    scaling = config.spec("merged").scaling
    deltas = {
        _base_name(name): _Delta(a=a.float(), b=tensors[name.replace(".lora_A.", ".lora_B.")].float(), scaling=scaling)
        for name, a in tensors.items()
        if name.endswith(".lora_A.weight")
    }
    files = checkpoint_files(base, key="--base")
    companions = _companions(Path(base), files)
    total = sum(file.stat().st_size for file in files)
    folder = prepare_output(output, total, key="--output")
    with temporary_folder(folder) as temporary:
        for file in companions:
            _copy(file, temporary / file.relative_to(base))
        written = 0
        for file in files:
            for size in _merge_file(file, temporary / file.name, deltas):
                written += size
                if progress is not None:
                    progress(written, total)
        _publish(temporary, folder)
    return None if _is_same_model(config.base_model_path, Path(base)) else config.base_model_path


def _is_same_model(named: str, base: Path) -> bool:
    """Whether ``base`` may be what an adapter names: that folder or, where there is none, one of the same name."""
    try:
        return not named or os.path.samefile(named, base)
    except (OSError, ValueError):
        # A name of the hub, or a folder of another machine. The hub's cache has models--OWNER--NAME/snapshots/HASH.
        real = Path(os.path.realpath(base))
        return Path(named).name in (base.name, real.name) or f"models--{named.replace('/', '--')}" in real.parts


def _publish(temporary: Path, folder: Path) -> None:
    """Move a whole model to its place: by one rename, or file by file into a folder that exists."""
    flush(temporary)
    if temporary.parent == folder:
        for file in sorted(temporary.iterdir(), key=lambda file: (file.name == CONFIG_FILE, file.name)):
            os.replace(file, folder / file.name)
        flush(folder)
    else:
        os.replace(temporary, folder)
        flush(folder.parent)


def _base_name(name: str) -> str:
    """The base weight that a factor under PEFT's key belongs to."""
    return name.removeprefix("base_model.model.").replace(".lora_A.weight", ".weight")


def _companions(base: Path, weights: Sequence[Path]) -> list[Path]:
    """What a merged model takes from its base beside the weights: configuration, tokenizer, licence; all readable."""
    left_out = {INDEX_FILE} if weights == (base / SINGLE_FILE,) else set()  # an index of files that it does not have
    found = []
    try:
        for file in sorted([*base.iterdir(), *base.glob(f"{_TEMPLATES}/*.jinja")]):
            wanted = file.suffix in _COPIED_SUFFIXES or file.name.upper().startswith(("LICENSE", "NOTICE"))
            wanted = wanted and file.name not in left_out and not file.name.startswith("adapter_")
            # What is listed but not there is a link that leads nowhere: opening it is the error.
            if (wanted and file.is_file()) or ((wanted or file.name == _TEMPLATES) and not file.exists()):
                file.open("rb").close()
                found.append(file)
    except OSError as error:
        raise UserError(
            f"{error.filename} can't be read ({error.strerror})",
            rule="a merged model has the base's configuration and tokenizer too",
            remedy="make it readable, or remove it",
            key="--base",
        ) from None
    return found


def _copy(file: Path, copy: Path) -> None:
    copy.parent.mkdir(exist_ok=True)
    shutil.copyfile(file, copy)
    flush(copy)
    flush(copy.parent)


def _merge_file(source: Path, target: Path, deltas: Mapping[str, _Delta]) -> Iterator[int]:
    """Write one merged file; yields the bytes of each part once it is written."""
    with source.open("rb") as read, target.open("xb") as write:
        header, stored = _layout(read)
        write.write(header)
        yield len(header)
        for tensor in stored:
            delta = deltas.get(tensor.name)
            if delta is None:
                for chunk in _chunks(read, tensor, _BLOCK_BYTES):
                    write.write(chunk)
            else:
                for block in _merged(read, tensor, delta):
                    if not torch.isfinite(block).all():
                        raise UserError(
                            f"{source}: {tensor.name} with the adapter is not finite in {block.dtype}",
                            rule="merged weights are finite",
                            remedy="check the base weights, or merge into a base in bfloat16 or float32",
                            key="--base",
                        )
                    write.write(block.view(torch.uint8).numpy().data)
            yield tensor.stop - tensor.start
        write.flush()
        os.fsync(write.fileno())


def _merged(read: BufferedReader, tensor: _Stored, delta: _Delta) -> Iterator[torch.Tensor]:
    """Blocks of rows of W + scaling * B A, computed in fp32 and cast once."""
    columns, dtype = tensor.shape[1], _DTYPES[tensor.dtype]
    rows, row = max(1, _BLOCK_BYTES // (4 * columns)), 0
    for chunk in _chunks(read, tensor, rows * columns * dtype.itemsize):
        weight = torch.frombuffer(chunk, dtype=dtype).view(-1, columns)
        b = delta.b[row : row + weight.shape[0]]
        yield weight.float().addmm_(b, delta.a, alpha=delta.scaling).to(dtype)
        row += weight.shape[0]


def _layout(file: BufferedReader) -> tuple[bytes, list[_Stored]]:
    """The header of a checked safetensors file, and its tensors in the order of their bytes."""
    prefix = file.read(8)
    header = file.read(int.from_bytes(prefix, "little"))
    begin = len(prefix) + len(header)
    stored = [
        _Stored(
            name=name,
            dtype=entry["dtype"],
            shape=tuple(entry["shape"]),
            start=begin + entry["data_offsets"][0],
            stop=begin + entry["data_offsets"][1],
        )
        for name, entry in json.loads(header).items()
        if name != "__metadata__"
    ]
    return prefix + header, sorted(stored, key=lambda tensor: tensor.start)


def _chunks(read: BufferedReader, tensor: _Stored, size: int) -> Iterator[bytearray]:
    """The bytes of a tensor, ``size`` at a time."""
    read.seek(tensor.start)
    left = tensor.stop - tensor.start
    while left:
        chunk = bytearray(min(left, size))
        if read.readinto(chunk) != len(chunk):
            raise OSError(f"{read.name} became shorter while it was read")
        yield chunk
        left -= len(chunk)
