"""The fused product for Hopper, with the warps' work divided by hand: one warp copies, two groups of four multiply.

The same result as `product`. The two groups own the upper and lower 64 rows of a tile and share the columns of W; each
runs as far ahead of the other as the ring of buffers allows, so while one draws its mask, adds its adapter or stores
its rows, the other keeps the matrix units busy, and the copies for the next tile are under way already. A group's 64
rows are one tile of the routing, hence one adapter.
"""

from functools import cache

import torch
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor
from triton.language.extra.cuda import gdc_launch_dependents

from .launch import Launcher, power_of_two
from .tables import COLUMNS, FACTOR_A, FACTOR_B, FIELDS, THRESHOLD

ROWS = 64
"""Rows of one group of warps: the tile of the routing."""
BM, BN, BK = 2 * ROWS, 256, 64
STAGES = 4
WIDEST_FACTOR = 32
"""Columns of an adapter that pass through a group's buffer at once."""
STEPS_APART = 16
"""Steps between two places where the programs wait for each other: 10 MB that they read in the meantime."""
_PATIENCE = gl.constexpr(128)
"""Times that a program looks whether the others have arrived, under a microsecond each."""
_GOLDEN = gl.constexpr(0x9E3779B9)
_M1 = gl.constexpr(0x7FEB352D)
_M2 = gl.constexpr(0x846CA68B)
_M3 = gl.constexpr(0xC2B2AE35)
_WORDS = gl.constexpr(
    gl.DistributedLinearLayout(
        reg_bases=[[8, 0], [0, 4], [0, 8], [0, 16], [0, 32], [0, 64]],
        lane_bases=[[0, 1], [0, 2], [1, 0], [2, 0], [4, 0]],
        warp_bases=[[16, 0], [32, 0]],
        block_bases=[],
        shape=[ROWS, BN // 2],
    )
)
"""Layout of the mask's words: each thread draws those of its own accumulators."""
_FACTOR_A, _FACTOR_B = gl.constexpr(FACTOR_A.value), gl.constexpr(FACTOR_B.value)
_FIELDS, _COLUMNS, _THRESHOLD = gl.constexpr(FIELDS.value), gl.constexpr(COLUMNS.value), gl.constexpr(THRESHOLD.value)


@gluon.jit
def _place(t, row_blocks, col_blocks, GROUP: gl.constexpr):
    """Row and column block of a tile: GROUP row blocks side by side, then the next columns."""
    first = t // (GROUP * col_blocks) * GROUP
    size = min(row_blocks - first, GROUP)
    return first + (t % (GROUP * col_blocks)) % size, (t % (GROUP * col_blocks)) // size


@gluon.jit
def _wanted(step, common, programs, rest, IN_STEP: gl.constexpr):
    """Arrivals, of all programs together, after which one that has arrived at this step goes on.

    Args:
        common: how many times every program arrives, ``ceil(steps of the rounds that all have / IN_STEP)``.
        rest: programs that have a tile in the last, smaller round and arrive more often.
    """
    number = step // IN_STEP + 1
    by_all = number if number < common else common
    return by_all * programs + (number - by_all) * rest


@gluon.jit
def _await_arrivals(arrivals, wanted, patience):
    """Wait until ``wanted`` programs have arrived; what is left of the patience, none once it was not enough."""
    left = patience
    while (left > 0) & (gl.load(arrivals, volatile=True) < wanted):
        left -= 1
    return gl.where(left > 0, patience, 0)


@gluon.jit
def _copy(
    z_desc, w_desc, z_ring, w_ring, ready, free, row_blocks, col_blocks, inner, arrivals,
    W_BY_OUTPUT: gl.constexpr, GROUP: gl.constexpr, IN_STEP: gl.constexpr,
    BM: gl.constexpr, BN: gl.constexpr, BK: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """The copying warp: both operands of every step, as fast as buffers become free.

    Note: programs read rows of z and columns of w that others read as well, and the memory delivers them once only if
    all read them within what the L2 holds. Nothing else ties the programs to each other: once some are behind, because
    they were placed late or something else uses the memory, they stay there, and the product takes up to twice as long.
    So every IN_STEP steps each program arrives at a counter, and half as many steps later it waits until all have
    (never, where IN_STEP is 0). It waits a limited time, once: a program that has no multiprocessor yet must not stop
    the others.
    """
    step = 0
    half: gl.constexpr = BM // 2
    tiles, programs = row_blocks * col_blocks, gl.num_programs(0)
    patience = _PATIENCE
    if IN_STEP > 0:
        common, rest = gl.cdiv(tiles // programs * gl.cdiv(inner, BK), IN_STEP), tiles % programs
    for t in range(gl.program_id(0), tiles, programs):
        row_block, col_block = _place(t, row_blocks, col_blocks, GROUP)
        row, col = row_block * BM, col_block * BN
        for k in range(0, inner, BK):
            if IN_STEP > 0:
                if step % IN_STEP == 0:
                    gl.atomic_add(arrivals, 1, sem="relaxed")
                if step % IN_STEP == IN_STEP // 2:
                    patience = _await_arrivals(arrivals, _wanted(step, common, programs, rest, IN_STEP), patience)
            at = step % STAGES
            mbarrier.wait(free.index(at), (step // STAGES & 1) ^ 1)
            bar = ready.index(at)
            mbarrier.expect(bar, 2 * z_desc.block_type.nbytes + w_desc.block_type.nbytes)
            tma.async_copy_global_to_shared(z_desc, [row, k], bar, z_ring.index(2 * at))
            tma.async_copy_global_to_shared(z_desc, [row + half, k], bar, z_ring.index(2 * at + 1))
            if W_BY_OUTPUT:
                tma.async_copy_global_to_shared(w_desc, [col, k], bar, w_ring.index(at))
            else:
                tma.async_copy_global_to_shared(w_desc, [k, col], bar, w_ring.index(at))
            step += 1
    if IN_STEP > 0:
        ended = gl.atomic_add(arrivals + 1, 1, sem="acq_rel")  # every arrival comes before the last end
        if ended == programs - 1:
            gl.store(arrivals, 0)
            gl.store(arrivals + 1, 0)


@gluon.jit
def _dropped(acc, key0, key1, threshold, module_key, first_feature, MMA: gl.constexpr, BN: gl.constexpr):
    """Zero the dropped elements of ``acc [64, BN]``: `masks.keep_signs` in this kernel's layouts."""
    index = (first_feature // 2 + gl.arange(0, BN // 2, gl.SliceLayout(0, _WORDS))).to(gl.uint32)
    module = module_key.to(gl.uint32, bitcast=True)
    word = gl.expand_dims(key0, 1) + gl.expand_dims(index * _GOLDEN + module, 0)
    word = ((word ^ (word >> 16)) * _M1) ^ gl.expand_dims(key1 ^ (module * _M3), 1)
    word = (word ^ (word >> 15)) * _M2
    word = ((word ^ (word >> 16)) & 0x7FFF7FFF) + (0x8000 - threshold) * 0x10001
    signs = gl.join(word << 16, word).to(gl.int32, bitcast=True).reshape([64, BN])
    return gl.where(gl.convert_layout(signs, MMA) < 0, acc, 0.0)


@gluon.jit
def _operands(
    k, q_ptr, q_stride, factor, columns, row, col, tokens, width,
    FACTOR: gl.constexpr, KC: gl.constexpr, MMA: gl.constexpr, BN: gl.constexpr,
):  # fmt: skip
    """KC columns of Q for 64 rows, and of the adapter's F for BN features, both from column k on."""
    lhs: gl.constexpr = gl.DotOperandLayout(operand_index=0, parent=MMA, k_width=2)
    across: gl.constexpr = gl.BlockedLayout([1, 8], [1, 32], [4, 1], [1, 0])
    down: gl.constexpr = gl.BlockedLayout([8, 1], [2, 16], [1, 4], [0, 1])
    q_rows = row + gl.arange(0, 64, gl.SliceLayout(1, lhs))
    q_cols = k + gl.arange(0, KC, gl.SliceLayout(0, lhs))
    q_at = q_ptr + gl.expand_dims(q_rows.to(gl.int64) * q_stride, 1) + gl.expand_dims(q_cols, 0)
    q_mask = gl.expand_dims(q_rows < tokens, 1) & gl.expand_dims(q_cols < columns, 0)
    q = gl.load(q_at, mask=q_mask, other=0.0)
    if FACTOR == _FACTOR_A:
        f_rows = k + gl.arange(0, KC, gl.SliceLayout(1, across))
        f_cols = col + gl.arange(0, BN, gl.SliceLayout(0, across))
        at = factor + gl.expand_dims(f_rows.to(gl.int64) * width, 1) + gl.expand_dims(f_cols, 0)
    else:
        f_rows = k + gl.arange(0, KC, gl.SliceLayout(1, down))
        f_cols = col + gl.arange(0, BN, gl.SliceLayout(0, down))
        at = factor + gl.expand_dims(f_rows, 1) + gl.expand_dims(f_cols.to(gl.int64) * columns, 0)
    f_mask = gl.expand_dims(f_rows < columns, 1) & gl.expand_dims(f_cols < width, 0)
    f = gl.load(at, mask=f_mask, other=0.0)
    return q, f


@gluon.jit
def _begin(
    t, tiles, row_blocks, col_blocks, q_ptr, q_stride, table, tile_slots, keys, tokens, width, num_slots,
    HALF: gl.constexpr, FACTOR: gl.constexpr, DROP: gl.constexpr, ALIGN: gl.constexpr, KC: gl.constexpr,
    GROUP: gl.constexpr, MMA: gl.constexpr, BM: gl.constexpr, BN: gl.constexpr,
):  # fmt: skip
    """Where tile t lies and what its first product needs; loads that nothing waits for yet. Past the end: no column."""
    dtype: gl.constexpr = q_ptr.dtype.element_ty
    row_block, col_block = _place(gl.minimum(t, tiles - 1), row_blocks, col_blocks, GROUP)
    row, col = row_block * BM + HALF * (BM // 2), col_block * BN
    slot = gl.load(tile_slots + row // (BM // 2), mask=(row < tokens) & (t < tiles), other=-1)
    known = (slot >= 0) & (slot < num_slots)
    entry = table + gl.where(known, slot, 0).to(gl.int64) * _FIELDS
    columns = gl.where(known, gl.load(entry + _COLUMNS), 0).to(gl.int32)
    factor = gl.load(entry + FACTOR).to(gl.pointer_type(dtype))
    if ALIGN > 0:
        factor = gl.multiple_of(factor, 16)
    if ALIGN == 8:
        columns = gl.multiple_of(columns, 8)
    q, f = _operands(0, q_ptr, q_stride, factor, columns, row, col, tokens, width, FACTOR, KC, MMA, BN)
    rows = row + gl.arange(0, 64, gl.SliceLayout(1, _WORDS))
    key0, key1, threshold = rows.to(gl.uint32), rows.to(gl.uint32), columns.to(gl.uint32)
    if DROP:
        threshold = gl.load(entry + _THRESHOLD).to(gl.uint32)
        at = keys + rows.to(gl.int64) * 2
        inside = (rows < tokens) & (t < tiles)
        key0 = gl.load(at, mask=inside, other=0).to(gl.uint32, bitcast=True)
        key1 = gl.load(at + 1, mask=inside, other=0).to(gl.uint32, bitcast=True)
    return row, col, columns, factor, q, f, threshold, key0, key1


@gluon.jit
def _halves(x):
    """The left and the right half of the columns, in registers."""
    return x.reshape([x.shape[0], 2, x.shape[1] // 2]).permute(0, 2, 1).split()


@gluon.jit
def _multiply(
    HALF: gl.constexpr, y_desc, z_ring, w_ring, ready, free, buffer, bias, q_ptr, q_stride, table, tile_slots, keys,
    tokens, width, inner, num_slots, module_key, feature_offset,
    FACTOR: gl.constexpr, W_BY_OUTPUT: gl.constexpr, DROP: gl.constexpr, BIAS: gl.constexpr, ALIGN: gl.constexpr,
    KC: gl.constexpr, GROUP: gl.constexpr,
    BM: gl.constexpr, BN: gl.constexpr, BK: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """A multiplying group: its 64 rows of every tile."""
    MMA: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, BN, 16])
    dtype: gl.constexpr = q_ptr.dtype.element_ty
    row_blocks, col_blocks = gl.cdiv(tokens, BM), gl.cdiv(width, BN)
    tiles = row_blocks * col_blocks
    # F passes through the buffer before the main loop, the result in quarters after it.
    operand = buffer.slice(0, KC, dim=0)
    quarters = buffer._reinterpret(dtype, [2, BM // 2, BN // 4], y_desc.layout)
    step = 0
    row, col, columns, factor, q, f, threshold, key0, key1 = _begin(
        gl.program_id(0), tiles, row_blocks, col_blocks, q_ptr, q_stride, table, tile_slots, keys, tokens, width,
        num_slots, HALF, FACTOR, DROP, ALIGN, KC, GROUP, MMA, BM, BN,
    )  # fmt: skip
    for t in range(gl.program_id(0), tiles, gl.num_programs(0)):
        acc = gl.zeros((BM // 2, BN), gl.float32, MMA)
        tma.store_wait(0)
        operand.store(f)
        fence_async_shared()
        acc = warpgroup_mma(q, operand, acc)
        for k in range(KC, columns, KC):
            q, f = _operands(k, q_ptr, q_stride, factor, columns, row, col, tokens, width, FACTOR, KC, MMA, BN)
            operand.store(f)
            fence_async_shared()
            acc = warpgroup_mma(q, operand, acc)
        if DROP:
            acc = _dropped(acc, key0, key1, threshold, module_key, feature_offset + col, MMA, BN)
        to_row, to_col = row, col
        for k in range(0, inner, BK):
            at = step % STAGES
            mbarrier.wait(ready.index(at), step // STAGES & 1)
            rhs = w_ring.index(at)
            if W_BY_OUTPUT:
                rhs = rhs.permute((1, 0))
            acc = warpgroup_mma(z_ring.index(2 * at + HALF), rhs, acc, is_async=True)
            acc = warpgroup_mma_wait(1, deps=(acc,))
            # The step before this one is done with its buffers.
            mbarrier.arrive(free.index((step + STAGES - 1) % STAGES), count=1, pred=k > 0)
            step += 1
        # While the last products run: what the next tile begins with.
        row, col, columns, factor, q, f, threshold, key0, key1 = _begin(
            t + gl.num_programs(0), tiles, row_blocks, col_blocks, q_ptr, q_stride, table, tile_slots, keys, tokens,
            width, num_slots, HALF, FACTOR, DROP, ALIGN, KC, GROUP, MMA, BM, BN,
        )  # fmt: skip
        acc = warpgroup_mma_wait(0, deps=(acc,))
        mbarrier.arrive(free.index((step + STAGES - 1) % STAGES), count=1)
        if BIAS:
            at_bias = to_col + gl.arange(0, BN, gl.SliceLayout(0, MMA))
            added = gl.load(bias + at_bias, mask=at_bias < width, other=0.0).to(gl.float32)
            acc = acc + gl.expand_dims(added, 0)
        left, right = _halves(acc.to(dtype))
        first, second = _halves(left)
        third, fourth = _halves(right)
        quarters.index(0).store(first)
        fence_async_shared()
        tma.async_copy_shared_to_global(y_desc, [to_row, to_col], quarters.index(0))
        quarters.index(1).store(second)
        fence_async_shared()
        tma.async_copy_shared_to_global(y_desc, [to_row, to_col + BN // 4], quarters.index(1))
        tma.store_wait(1)
        quarters.index(0).store(third)
        fence_async_shared()
        tma.async_copy_shared_to_global(y_desc, [to_row, to_col + BN // 2], quarters.index(0))
        tma.store_wait(1)
        quarters.index(1).store(fourth)
        fence_async_shared()
        tma.async_copy_shared_to_global(y_desc, [to_row, to_col + 3 * (BN // 4)], quarters.index(1))
    tma.store_wait(0)


@gluon.jit(do_not_specialize=["tokens", "num_slots", "module_key", "feature_offset"])
def _hopper_kernel(
    z_desc, w_desc, y_desc, bias, q_ptr, q_stride, table, tile_slots, keys, arrivals,
    tokens, width, inner, num_slots, module_key, feature_offset,
    FACTOR: gl.constexpr, W_BY_OUTPUT: gl.constexpr, DROP: gl.constexpr, BIAS: gl.constexpr, ALIGN: gl.constexpr,
    KC: gl.constexpr, MOST: gl.constexpr, GROUP: gl.constexpr, IN_STEP: gl.constexpr, OVERLAP: gl.constexpr,
    BM: gl.constexpr, BN: gl.constexpr, BK: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """Buffers and barriers; then each part of the warps does its work until all tiles are done."""
    dtype: gl.constexpr = z_desc.dtype
    z_ring = gl.allocate_shared_memory(dtype, [2 * STAGES, BM // 2, BK], z_desc.layout)
    w_shape: gl.constexpr = [STAGES, BN, BK] if W_BY_OUTPUT else [STAGES, BK, BN]
    w_ring = gl.allocate_shared_memory(dtype, w_shape, w_desc.layout)
    factors: gl.constexpr = gl.NVMMASharedLayout.get_default_for([MOST, BN], dtype)
    buffers = gl.allocate_shared_memory(dtype, [2, MOST, BN], factors)
    ready = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    free = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(STAGES):
        mbarrier.init(ready.index(i), count=1)
        mbarrier.init(free.index(i), count=2)
    row_blocks, col_blocks = gl.cdiv(tokens, BM), gl.cdiv(width, BN)
    if OVERLAP:
        gdc_launch_dependents()
    gl.warp_specialize(
        [
            (_multiply, (
                0, y_desc, z_ring, w_ring, ready, free, buffers.index(0), bias, q_ptr, q_stride, table, tile_slots,
                keys, tokens, width, inner, num_slots, module_key, feature_offset,
                FACTOR, W_BY_OUTPUT, DROP, BIAS, ALIGN, KC, GROUP, BM, BN, BK, STAGES,
            )),
            (_multiply, (
                1, y_desc, z_ring, w_ring, ready, free, buffers.index(1), bias, q_ptr, q_stride, table, tile_slots,
                keys, tokens, width, inner, num_slots, module_key, feature_offset,
                FACTOR, W_BY_OUTPUT, DROP, BIAS, ALIGN, KC, GROUP, BM, BN, BK, STAGES,
            )),
            (_copy, (
                z_desc, w_desc, z_ring, w_ring, ready, free, row_blocks, col_blocks, inner, arrivals,
                W_BY_OUTPUT, GROUP, IN_STEP, BM, BN, BK, STAGES,
            )),
        ],
        [4, 1],
        [240, 24],
    )  # fmt: skip


_launch = Launcher(_hopper_kernel)


class _Block(TensorDescriptor):
    """A descriptor whose base, strides and alignment the caller has checked already."""

    def __post_init__(self) -> None:
        pass


@cache
def _block(rows: int, columns: int, dtype: torch.dtype) -> tuple[list[int], gl.NVMMASharedLayout]:
    """(shape, layout in shared memory) of a tile."""
    element = {torch.bfloat16: gl.bfloat16, torch.float16: gl.float16}[dtype]
    shape = [rows, columns]
    return shape, gl.NVMMASharedLayout.get_default_for(shape, element)


def hopper_product(
    z: torch.Tensor,
    w: torch.Tensor,
    bias: torch.Tensor | None,
    q: torch.Tensor,
    table: torch.Tensor,
    tile_slots: torch.Tensor,
    keys: torch.Tensor,
    *,
    factor: int,
    tile: int,
    module_key: int,
    feature_offset: int,
    drop: bool,
    align: int,
    overlap: bool,
    programs: int,
    group: int,
    arrivals: torch.Tensor,
    cache_bytes: int,
) -> torch.Tensor:
    """As `product.product`, for 16-bit types on compute capability 9.0 and tiles of 64 rows.

    Args:
        group: row blocks that run side by side.
        arrivals: two int32 zeros; zeros again afterwards.
        cache_bytes: of the L2. Where the rows and columns that the programs read at a time don't fit it whole, they
            are kept in step.
        overlap: whether the next kernel may be placed as soon as all programs of this one are.

    Note: not a dependent launch itself. That hides 2 to 3 microseconds, but places the programs in the order in which
    the kernel before leaves the multiprocessors, and the products took 1 to 10 % longer: neighbours, which read the
    same columns of w at the same time, then lie apart.
    """
    if tile != ROWS:
        raise ValueError(f"tiles of {tile} rows; the Hopper product needs {ROWS}")
    forward = factor == FACTOR_B.value
    (tokens, inner), width = z.shape, w.shape[0 if forward else 1]
    y = z.new_empty(tokens, width)
    tiles = -(-tokens // BM) * -(-width // BN)
    rows = min(group * BM, tokens)
    at_a_time = (rows + min(programs * BM * BN // rows, width)) * inner * z.element_size()
    _launch(
        (min(programs, tiles), 1, 1),
        (
            _Block(z, z.shape, z.stride(), *_block(ROWS, BK, z.dtype)),
            _Block(w, w.shape, w.stride(), *_block(*((BN, BK) if forward else (BK, BN)), z.dtype)),
            _Block(y, y.shape, y.stride(), *_block(ROWS, BN // 4, z.dtype)),
            bias, q, q.shape[1], table, tile_slots, keys, arrivals,
            tokens, width, inner, table.shape[0], module_key, feature_offset,
        ),
        FACTOR=factor, W_BY_OUTPUT=forward, DROP=drop, BIAS=bias is not None, ALIGN=align,
        KC=min(power_of_two(q.shape[1]), WIDEST_FACTOR), MOST=WIDEST_FACTOR, GROUP=group,
        IN_STEP=STEPS_APART if at_a_time > cache_bytes else 0, OVERLAP=overlap,
        BM=BM, BN=BN, BK=BK, STAGES=STAGES,
        options={"num_warps": 4, "maxnreg": 168},
    )  # fmt: skip
    return y
