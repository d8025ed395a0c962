"""Python's cyclic garbage collector, kept off the hot path.

Imports and compilers leave about a million objects behind. A full collection visits them all, 0.3 seconds and more in
which the GPU runs dry, and the objects that training makes set one off every few seconds. Frozen, they are visited no
more.
"""

import gc


def settle() -> None:
    """Collect everything, what was frozen earlier included, and let later collections look at new objects alone.

    Note: takes as long as one full collection. Call it where the pipeline is empty and much was made or let go: before
        the first window, after it (kernels were compiled), and after jobs have left.
    """
    gc.unfreeze()
    gc.collect()
    gc.freeze()
