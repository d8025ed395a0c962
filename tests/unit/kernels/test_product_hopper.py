"""The protocol that keeps the programs of the Hopper product in step: nobody waits for an arrival that never comes."""

import random

import pytest

from lorafusion_megatron.kernels.product_hopper import _wanted

IN_STEP = 16


@pytest.mark.parametrize("tiles", [1, 3, 4, 7, 8, 9, 13])
@pytest.mark.parametrize("steps_a_tile", [1, 7, 16, 40, 65])
def test_programs_stay_together_and_none_waits_for_ever(tiles, steps_a_tile):
    """Every program's steps as the copying warps do them, some programs faster than others."""
    rng = random.Random(tiles * 100 + steps_a_tile)
    programs = min(4, tiles)
    total = [-(-(tiles - program) // programs) * steps_a_tile for program in range(programs)]
    common, rest = -(-(tiles // programs * steps_a_tile) // IN_STEP), tiles % programs
    at, arrivals = [0] * programs, 0
    while running := [program for program in range(programs) if at[program] < total[program]]:
        able = [
            program
            for program in running
            if at[program] % IN_STEP != IN_STEP // 2
            or arrivals >= _wanted.fn(at[program], common, programs, rest, IN_STEP)
        ]
        assert able, "all programs wait"
        program = min(rng.sample(able, min(2, len(able))))
        arrivals += at[program] % IN_STEP == 0
        at[program] += 1
        awaited = [at[other] for other in running if at[other] <= (total[other] - 1) // IN_STEP * IN_STEP]
        assert at[program] - min(awaited, default=at[program]) <= 2 * IN_STEP
    assert arrivals == sum(-(-steps // IN_STEP) for steps in total)
