"""Filling one rank's parameters from safetensors files, slice by slice."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from lorafusion_megatron.models.checkpoint import check_base_weights, tensor_error
from lorafusion_megatron.models.families import (
    Parameter,
    Split,
    check_tensor_parallel,
    find_parameter,
    source_tensors,
)
from lorafusion_megatron.models.files import read_fault
from lorafusion_megatron.types import ModelSpec


@dataclass(frozen=True, kw_only=True)
class _Piece:
    """Rows ``start`` to ``stop`` of one Hugging Face tensor along ``dim`` and the local view that they fill."""

    name: str
    dim: int
    start: int
    stop: int
    target: torch.Tensor


def load_base_weights(
    path: str | Path,
    spec: ModelSpec,
    parameters: Mapping[str, torch.Tensor],
    *,
    tp_rank: int,
    tp_size: int,
    key: str = "base_model.path",
) -> None:
    """Fill a rank's parameters in place with its slices of the base model.

    Args:
        path: Hugging Face directory.
        spec: dimensions of the model.
        parameters: canonical name (global layer number; Transformer Engine's fused norm names too) -> this rank's
            shard, allocated, of any floating dtype on any device. Which names there are decides what is read.
        tp_rank: this rank's place among the tensor-parallel ranks.
        tp_size: number of tensor-parallel ranks.
        key: where the path was given, for messages.

    Raises:
        UserError: the checkpoint doesn't fit the model (`check_base_weights`), or the model doesn't divide by
            ``tp_size``.
        ValueError: a parameter is not one of the model's or has the wrong local shape.

    Note:
        One source slice is in host memory at a time. Files are memory-mapped and opened once per tensor (about
        0.1 ms), so that pages that were read are not held for longer than their tensor. Rows of the embedding and
        the output layer past the vocabulary are zero.
    """
    check_tensor_parallel(spec, tp_size)
    files = check_base_weights(path, spec, key=key)
    with torch.no_grad():
        for name, local in parameters.items():
            parameter, layer = find_parameter(spec, name)
            for piece in _pieces(spec, parameter, layer, local.detach(), tp_rank, tp_size):
                _fill(piece, files[piece.name], key)


def _pieces(
    spec: ModelSpec, parameter: Parameter, layer: int, local: torch.Tensor, tp_rank: int, tp_size: int
) -> Iterator[_Piece]:
    """The slices that make up a local tensor; zeroes the rows of padding."""
    shapes = dict(source_tensors(spec, parameter, layer))
    if parameter.split is Split.VOCABULARY:
        (name, shape), rows = next(iter(shapes.items())), local.shape[0]
        _check_local(parameter, local, (rows, *shape[1:]))
        if rows * tp_size < shape[0]:
            raise ValueError(f"{parameter.name}: {tp_size} x {rows} rows are fewer than the vocabulary's {shape[0]}")
        start = min(tp_rank * rows, shape[0])
        stop = min(start + rows, shape[0])
        local[stop - start :].zero_()
        if stop > start:
            yield _Piece(name=name, dim=0, start=start, stop=stop, target=local[: stop - start])
        return
    dim = 1 if parameter.split is Split.COLUMNS else 0
    parts = 1 if parameter.split is Split.REPLICATED else tp_size
    sizes = [shape[dim] // parts for shape in shapes.values()]
    expected = list(next(iter(shapes.values())))
    expected[dim] = sum(sizes)
    _check_local(parameter, local, tuple(expected))
    index = tp_rank if parts > 1 else 0
    if dim == 1:
        (name,), (size,) = shapes, sizes
        yield _Piece(name=name, dim=1, start=index * size, stop=(index + 1) * size, target=local)
        return
    # Sources lie below each other once, or once per query group.
    blocks = spec.num_query_groups // parts if parameter.by_query_group else 1
    blocked, column = local.view(blocks, -1, *local.shape[1:]), 0
    for name, size in zip(shapes, sizes, strict=True):
        target = blocked[:, column : column + size // blocks]
        yield _Piece(name=name, dim=0, start=index * size, stop=(index + 1) * size, target=target)
        column += size // blocks


def _check_local(parameter: Parameter, local: torch.Tensor, shape: tuple[int, ...]) -> None:
    if tuple(local.shape) != shape:
        raise ValueError(f"{parameter.name} is {list(local.shape)} on this rank; the base model makes it {list(shape)}")


def _fill(piece: _Piece, file: Path, key: str) -> None:
    try:
        with safe_open(file, framework="pt", device="cpu") as opened:
            source = opened.get_slice(piece.name)
            rows = slice(piece.start, piece.stop)
            read = source[rows] if piece.dim == 0 else source[:, rows]
    except (SafetensorError, OSError) as error:
        raise tensor_error(
            file, piece.name, f"can't be read ({read_fault(file, error)})", "the file must be whole", key
        ) from None
    piece.target.copy_(read.reshape(piece.target.shape))
