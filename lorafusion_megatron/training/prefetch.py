"""Prepares microbatches ahead on a side thread, so that the thread that feeds the GPU only takes them.

Features: at most ``depth`` microbatches wait; on a GPU their copies run on a stream of their own from pinned memory and
the training stream waits for them on the device alone; an error of the side thread is raised where its microbatch is
asked for. On the CPU there is nothing to overlap with, and they are made when they are asked for.
"""

import queue
import threading
from collections.abc import Iterator
from dataclasses import dataclass

import torch

from ..mcore.batch import HostBatch
from ..mcore.stream import DeviceBatch

DEPTH = 4
"""Microbatches that wait ready: about 0.4 MB each on the device, and more than any burst of short ones needs."""


@dataclass(frozen=True, kw_only=True)
class _Copied:
    """A microbatch whose copy is under way."""

    batch: DeviceBatch
    buffer: torch.Tensor
    arrived: torch.cuda.Event
    source: HostBatch
    """Kept until the copy is taken: its pinned memory must not be given to another microbatch."""


def prefetch(batches: Iterator[HostBatch], device: torch.device, *, depth: int = DEPTH) -> Iterator[DeviceBatch]:
    """The microbatches of ``batches`` on the device, in their order.

    Args:
        batches: makes each microbatch on the host; runs on the side thread.
        device: where they go.
        depth: most that wait.

    Raises:
        Exception: whatever ``batches`` raises.
    """
    if device.type != "cuda":
        for batch in batches:
            yield batch.to(device)[0]
        return
    if device.index is None:  # the side thread has a current GPU of its own
        device = torch.device("cuda", torch.cuda.current_device())
    ready: queue.Queue[_Copied | BaseException | None] = queue.Queue(maxsize=depth)
    closed = threading.Event()
    thread = threading.Thread(target=_fill, args=(batches, device, ready, closed), name="prefetch", daemon=True)
    thread.start()
    try:
        while (item := ready.get()) is not None:
            if isinstance(item, BaseException):
                raise item
            stream = torch.cuda.current_stream(device)
            stream.wait_event(item.arrived)
            item.buffer.record_stream(stream)
            yield item.batch
    finally:
        closed.set()
        thread.join()


def _fill(
    batches: Iterator[HostBatch],
    device: torch.device,
    ready: "queue.Queue[_Copied | BaseException | None]",
    closed: threading.Event,
) -> None:
    """The side thread."""
    last: BaseException | None = None
    try:
        torch.cuda.set_device(device)
        stream = torch.cuda.Stream(device)
        for source in batches:
            with torch.cuda.stream(stream):
                batch, buffer = source.to(device)
                arrived = torch.cuda.Event()
                arrived.record(stream)
            if not _put(ready, _Copied(batch=batch, buffer=buffer, arrived=arrived, source=source), closed):
                return
    except BaseException as error:  # raised again on the training thread
        last = error
    _put(ready, last, closed)


def _put(
    ready: "queue.Queue[_Copied | BaseException | None]",
    item: _Copied | BaseException | None,
    closed: threading.Event,
) -> bool:
    """Wait for room; False where nobody takes any more."""
    while not closed.is_set():
        try:
            ready.put(item, timeout=0.1)
            return True
        except queue.Full:
            continue
    return False
