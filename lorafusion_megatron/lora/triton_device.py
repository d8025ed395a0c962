"""What the Triton backend knows of its device, and the counters that its kernels share."""

from dataclasses import dataclass, field

import torch


@dataclass(frozen=True, kw_only=True)
class TritonDevice:
    """A device's facts; the defaults serve the CPU, where the kernels are interpreted."""

    device: torch.device
    """With an index where it is a GPU."""
    present: bool = False
    """Whether it is a GPU of this machine."""
    programs: int = 4
    """Multiprocessors."""
    bulk_copies: bool = False
    """Tensor descriptors (TMA)."""
    overlap: bool = False
    """Programmatic dependent launch."""
    hopper: bool = False
    """Warpgroup products (wgmma), which no later generation has."""
    cache_bytes: int = 32 << 20
    """L2."""
    counters: dict[str, torch.Tensor] = field(default_factory=dict, compare=False)
    """Use -> counters, zero between launches."""

    @staticmethod
    def of(device: torch.device | str, *, interpret: bool = False) -> "TritonDevice":
        """The facts of a device.

        Args:
            device: a GPU without an index is the current one, for good.
            interpret: kernels run on the CPU, whose interpreter has tensor descriptors.
        """
        device = torch.device(device)
        if device.type != "cuda" or not torch.cuda.is_available():
            return TritonDevice(device=device, bulk_copies=interpret)
        if device.index is None:
            device = torch.device("cuda", torch.cuda.current_device())
        properties = torch.cuda.get_device_properties(device)
        return TritonDevice(
            device=device,
            present=True,
            programs=properties.multi_processor_count,
            bulk_copies=properties.major >= 9,
            overlap=properties.major >= 9,
            hopper=properties.major == 9,
            cache_bytes=properties.L2_cache_size,
        )

    def zeros(self, use: str, size: int) -> torch.Tensor:
        """``[>= size]`` int32 counters of a kernel that leaves them zero; a larger buffer replaces a smaller one."""
        if use not in self.counters or self.counters[use].numel() < size:
            self.counters[use] = torch.zeros(max(4096, 2 * size), dtype=torch.int32, device=self.device)
        return self.counters[use]
