"""The launcher's memory of compiled kernels: the same facts, the same code; any other fact, Triton is asked."""

import numpy
import pytest
import torch
from triton._C.libtriton import native_specialize_impl
from triton.backends.compiler import BaseBackend
from triton.runtime.errors import OutOfResources
from triton.runtime.jit import JITFunction
from triton.tools.tensor_descriptor import TensorDescriptor

from lorafusion_megatron.kernels.launch import Launcher, _sorted_out, cdiv, power_of_two


class Compiled:
    """Stands for a compiled kernel; keeps what it was launched with."""

    def __init__(self):
        self.launches = []

    def __getitem__(self, grid):
        return lambda *values: self.launches.append((grid, values))


class Watched(JITFunction):
    """A kernel that counts how often Triton has to sort its arguments out."""

    def __getitem__(self, grid):
        def run(*arguments, **constants):
            self.seen.append((grid, arguments, constants))
            self.compiled.append(Compiled())
            return self.compiled[-1]

        return run


def _kernel(x_ptr, stride, count, y_ptr, SIZE):
    pass


@pytest.fixture
def watched():
    kernel = Watched(_kernel, do_not_specialize=["count"])
    kernel.seen, kernel.compiled = [], []
    return kernel


def test_the_same_facts_launch_the_compiled_kernel_with_addresses(watched):
    launch = Launcher(watched)
    x, y = torch.zeros(64), torch.zeros(64)
    launch((1, 1, 1), (x, 32, 7, y), options={"num_warps": 4}, SIZE=16)
    launch((5, 2, 1), (y, 48, 9, x), options={"num_warps": 4}, SIZE=16)
    assert watched.seen == [((1, 1, 1), (x, 32, 7, y), {"SIZE": 16, "num_warps": 4})]
    assert watched.compiled[0].launches == [((5, 2, 1), (y.data_ptr(), 48, 9, x.data_ptr(), 16))]


@pytest.mark.parametrize(
    "other",
    [
        {"stride": 33},
        {"stride": 1},
        {"stride": 1 << 36},
        {"count": 1 << 40},
        {"dtype": torch.bfloat16},
        {"offset": 1},
        {"y": None},
        {"SIZE": 32},
        {"num_warps": 8},
    ],
    ids=lambda other: next(iter(other)),
)
def test_any_other_fact_asks_triton(watched, other):
    launch = Launcher(watched)
    given = {"stride": 32, "count": 7, "dtype": torch.float32, "offset": 0, "y": torch.zeros(8), "SIZE": 16}
    for facts in (given, given | other):
        x = torch.zeros(64, dtype=facts["dtype"])[facts["offset"] :]
        options = {"num_warps": facts.get("num_warps", 4)}
        launch((1, 1, 1), (x, facts["stride"], facts["count"], facts["y"]), options=options, SIZE=facts["SIZE"])
    assert len(watched.seen) == 2


FLOATS = (torch.float32, torch.float16)
ARGUMENTS = [
    None,
    *(0, 1, -1, 16, -16, 17, 2**40, 2**40 + 1, 2**63 - 1, 2**63),
    *(sign * 2**31 + by for sign in (-1, 1) for by in (-16, -1, 0, 1, 16)),
    *(torch.zeros(64, dtype=dtype)[offset:] for dtype in FLOATS for offset in (0, 1, 8)),
    *(
        TensorDescriptor.from_tensor(torch.zeros(64, 64, dtype=dtype), block)
        for dtype in FLOATS
        for block in ([16, 16], [16, 32], [32, 16])
    ),
]


@pytest.mark.parametrize("specialised", [True, False])
def test_what_triton_compiles_apart_has_other_facts(specialised):
    found: dict = {}
    for argument in ARGUMENTS:
        facts, _ = _sorted_out((None, argument), frozenset() if specialised else frozenset({1}))
        code = native_specialize_impl(BaseBackend, argument, False, specialised, True)
        assert found.setdefault(tuple(facts), code) == code, argument
    assert len(found) < len(ARGUMENTS)


@pytest.mark.parametrize("argument", [True, 1.0, numpy.int64(4)], ids=["bool", "float", "numpy"])
def test_arguments_of_other_types_are_refused(watched, argument):
    with pytest.raises(TypeError, match="argument 1 is a "):
        Launcher(watched)((1, 1, 1), (torch.zeros(64), argument, 7, None), SIZE=16)


def test_options_are_known_by_their_names(watched):
    launch = Launcher(watched)
    for options in ({"num_warps": 4, "num_stages": 2}, {"num_warps": 4, "maxnreg": 2}):
        launch((1, 1, 1), (torch.zeros(64), 32, 7, None), options=options, SIZE=16)
    assert len(watched.seen) == 2


def test_a_number_that_is_not_specialised_may_change(watched):
    launch = Launcher(watched)
    x = torch.zeros(64)
    for count in (1, 16, 17, -5):
        launch((1, 1, 1), (x, 32, count, None), SIZE=16)
    assert len(watched.seen) == 1


def test_a_device_with_little_shared_memory_gets_fewer_stages(watched):
    def refuse_three(grid):
        def run(*arguments, **constants):
            if constants["num_stages"] > 2:
                raise OutOfResources(120_000, 100_000, "shared memory")
            return Watched.__getitem__(watched, grid)(*arguments, **constants)

        return run

    launch = Launcher(watched)
    launch._kernel = type("Small", (), {"__getitem__": lambda self, grid: refuse_three(grid)})()
    x = torch.zeros(64)
    for _ in range(2):
        launch((1, 1, 1), (x, 32, 7, None), options={"num_stages": 4}, STAGES=4)
    assert [constants for _, _, constants in watched.seen] == [{"STAGES": 2, "num_stages": 2}]
    assert watched.compiled[0].launches[0][1][-1] == 2


def test_a_kernel_that_fits_with_no_number_of_stages_says_so(watched):
    def refuse(*arguments, **constants):
        raise OutOfResources(120_000, 100_000, "shared memory")

    launch = Launcher(watched)
    launch._kernel = type("None", (), {"__getitem__": lambda self, grid: refuse})()
    with pytest.raises(OutOfResources):
        launch((1, 1, 1), (torch.zeros(64), 32, 7, None), options={"num_stages": 4}, SIZE=16)


def test_parameters_are_tensors(watched):
    launch = Launcher(watched)
    launch((1, 1, 1), (torch.nn.Parameter(torch.zeros(64)), 32, 7, None), SIZE=16)
    launch((1, 1, 1), (torch.zeros(64), 32, 7, None), SIZE=16)
    assert len(watched.seen) == 1


def test_whole_numbers():
    assert [cdiv(value, 4) for value in (0, 1, 4, 5)] == [0, 1, 1, 2]
    assert [power_of_two(value) for value in (1, 2, 3, 16, 17)] == [1, 2, 4, 16, 32]
