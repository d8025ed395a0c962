"""What lives is frozen; what is frozen and no longer lives is freed the next time."""

import gc
import weakref

from lorafusion_megatron.training.garbage import settle


class Node:
    """One end of a cycle."""

    def __init__(self):
        self.itself = self


def test_a_cycle_that_was_frozen_is_freed_once_it_is_let_go():
    try:
        node = Node()
        seen = weakref.ref(node)
        settle()
        assert gc.get_freeze_count() > 1000
        del node
        gc.collect()
        assert seen() is not None
        settle()
        assert seen() is None
    finally:
        gc.unfreeze()
