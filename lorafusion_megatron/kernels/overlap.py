"""Programmatic dependent launch: a kernel's programs are placed while its predecessor drains."""

import triton
import triton.language as tl


@triton.jit
def await_predecessor(OVERLAP: tl.constexpr, BESIDE: tl.constexpr = False):
    """Wait until the kernels before this one are done and their writes seen; then let the next one be placed.

    Note: the first statement of every kernel that is launched with ``launch_pdl``, before it reads or writes
    anything. Hides a launch's latency and ramp, 2 to 3 microseconds, of which a linear has five or six. A kernel that
    runs beside the one before it does not wait here and ends with `outlast_predecessor`.
    """
    if OVERLAP:
        if not BESIDE:
            tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()


@triton.jit
def outlast_predecessor(BESIDE: tl.constexpr):
    """End no sooner than the kernel before this one, which this one has not waited for at its start.

    Note: the last statement of one program of such a kernel, the last one to be placed. Whatever follows waits for this
    kernel alone and must find the one before it done as well.
    """
    if BESIDE:
        axes = (tl.program_id(0) + 1 == tl.num_programs(0)) & (tl.program_id(1) + 1 == tl.num_programs(1))
        if axes & (tl.program_id(2) + 1 == tl.num_programs(2)):
            tl.extra.cuda.gdc_wait()


def launch_options(overlap: bool, **options: int) -> dict[str, int]:
    """Triton's options of a launch; the interpreter knows no dependent launches."""
    return options | {"launch_pdl": True} if overlap else options
