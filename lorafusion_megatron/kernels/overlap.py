"""Programmatic dependent launch: a kernel's programs are placed while its predecessor drains."""

import triton
import triton.language as tl


@triton.jit
def await_predecessor(OVERLAP: tl.constexpr):
    """Wait until the kernels before this one are done and their writes seen; then let the next one be placed.

    Note: the first statement of every kernel that is launched with ``launch_pdl``, before it reads or writes
    anything. Hides a launch's latency and ramp, 2 to 3 microseconds, of which a linear has five or six.
    """
    if OVERLAP:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()


def launch_options(overlap: bool, **options: int) -> dict[str, int]:
    """Triton's options of a launch; the interpreter knows no dependent launches."""
    return options | {"launch_pdl": True} if overlap else options
