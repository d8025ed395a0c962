"""One buffer a microbatch, and microbatches made ahead."""

import numpy as np
import pytest
import torch

from lorafusion_megatron.data.collate import collate
from lorafusion_megatron.kernels.dropout import row_keys
from lorafusion_megatron.mcore.batch import ALIGNMENT, host_batch, length_bucket
from lorafusion_megatron.training.bench.workloads import Rows
from lorafusion_megatron.training.prefetch import prefetch
from lorafusion_megatron.types import Microbatch, Sample

CPU = torch.device("cpu")
ROWS = {job: Rows(lengths=np.array([5, 9, 3]), seed=job, vocab_size=100, path=f"job {job}") for job in (0, 3)}


def _packed():
    samples = [(0, 0), (0, 1), (3, 2)]
    microbatch = Microbatch(
        samples=tuple(
            Sample(job=j, step=2, position=r, row=r, tokens=int(ROWS[j].lengths[r]), batch_label_tokens=20)
            for j, r in samples
        )
    )
    return collate(microbatch, ROWS, 16)


def _host(packed):
    return host_batch(packed, seeds={0: 7, 3: 8}, slots={0: 4, 3: 2}, tile=16, pinned=False)


def test_everything_arrives_as_it_was():
    packed = _packed()
    host = _host(packed)
    batch, buffer = host.to(CPU)
    assert torch.equal(batch.input_ids[0], torch.from_numpy(packed.input_ids))
    assert torch.equal(batch.labels[0], torch.from_numpy(packed.labels))
    assert torch.equal(batch.position_ids[0], torch.from_numpy(packed.position_ids))
    assert torch.equal(batch.loss_weights, torch.from_numpy(packed.loss_weights))
    assert torch.equal(batch.packed.cu_seqlens_q, torch.from_numpy(packed.cu_seqlens))
    assert batch.packed.borders == tuple(packed.cu_seqlens.tolist())
    assert batch.jobs == (0, 3)
    routing = batch.packed.routing
    assert [(s.slot, s.start, s.stop) for s in routing.segments] == [(4, 0, 16), (2, 16, 32)]
    assert routing.tile_slots.tolist() == [4, 2]
    seeds = torch.tensor([7] * 16 + [8] * 16)
    rows = [torch.from_numpy(x) for x in (packed.row_step, packed.row_sample, packed.row_position)]
    assert torch.equal(routing.row_keys, row_keys(seeds, *rows))
    first, last = buffer.data_ptr(), buffer.data_ptr() + buffer.nbytes
    for tensor in (batch.input_ids, batch.loss_weights, routing.row_keys, routing.tile_slots):
        assert first <= tensor.data_ptr() < last
        assert (tensor.data_ptr() - first) % ALIGNMENT == 0


def test_copies_of_one_microbatch_share_no_derived_tables():
    host = _host(_packed())
    one, two = (host.to(CPU)[0].packed.routing for _ in range(2))
    one.derived["x"] = 1
    assert two.derived == {}


@pytest.mark.parametrize(
    ("tokens", "bucket"), [(1, 256), (256, 256), (257, 512), (512, 512), (1025, 2048), (4096, 4096), (4097, 8192)]
)
def test_attention_is_told_of_few_lengths(tokens, bucket):
    assert length_bucket(tokens) == bucket


def test_microbatches_come_in_order_and_an_error_where_its_microbatch_is_asked_for():
    def source():
        for _ in range(2):
            yield _host(_packed())
        raise RuntimeError("a broken row")

    batches = prefetch(source(), CPU)
    assert [next(batches).jobs for _ in range(2)] == [(0, 3), (0, 3)]
    with pytest.raises(RuntimeError, match="a broken row"):
        next(batches)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_on_a_gpu_the_side_thread_ends_with_its_reader_and_passes_errors_on():
    import threading

    def source():
        for _ in range(20):
            yield host_batch(_packed(), seeds={0: 7, 3: 8}, slots={0: 4, 3: 2}, tile=16, pinned=True)
        raise RuntimeError("a broken row")

    device = torch.device("cuda")
    batches = prefetch(source(), device)
    expected = _host(_packed()).to(CPU)[0]
    assert torch.equal(next(batches).input_ids.cpu(), expected.input_ids)
    batches.close()
    assert not [t for t in threading.enumerate() if t.name == "prefetch"]
    with pytest.raises(RuntimeError, match="a broken row"):
        list(prefetch(source(), device))
