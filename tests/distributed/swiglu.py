"""A Megatron MLP whose activation and adapters run as one function, beside linear, activation, linear."""

import json
from pathlib import Path

import torch


def compare(out: str, tensor_parallel: int, sequence_parallel: bool) -> int:
    """Keep the largest relative difference of output, input gradient and adapters' gradients, rank by rank."""
    from lorafusion_megatron.kernels.dropout import row_keys
    from lorafusion_megatron.lora.reference import TorchBackend
    from lorafusion_megatron.lora.routing import RoutedSegment, build_routing, routing_scope
    from lorafusion_megatron.lora.triton_backend import TritonBackend
    from lorafusion_megatron.mcore import parallel
    from lorafusion_megatron.mcore.inject import LoraSwigluMlp, taken_over
    from lorafusion_megatron.training.bench.measure import Bench, Setting, make_adapters
    from lorafusion_megatron.training.bench.workloads import shape
    from lorafusion_megatron.types import Topology
    from tests.unit.kernels.kernel_interpreter import patch_interpreter

    patch_interpreter()
    topology = Topology(tensor_parallel=tensor_parallel, sequence_parallel=sequence_parallel)
    groups = parallel.start(topology, device="cpu", seed=1, timeout_minutes=2.0)
    bench = Bench(
        Setting(
            spec=shape("tiny", 1),
            topology=topology,
            layers_per_chunk=(1,),
            transformer_impl="local",
            dtype=torch.float32,
            backend=TritonBackend("cpu", strategy="fused", interpret=True),
            adapters=make_adapters(2, rank=4, alpha=8.0, dropout=0.1),
        ),
        groups,
    )
    mlp = bench.chunks[0].decoder.layers[0].mlp
    assert isinstance(mlp, LoraSwigluMlp)
    tokens = 192
    position = torch.arange(tokens)
    keys = row_keys(position * 0 + 9, position * 0 + 1, position * 0, position)
    segments = [RoutedSegment(slot=0, start=0, stop=64), RoutedSegment(slot=1, start=64, stop=128)]
    routing = build_routing(segments, num_tokens=tokens, tile=64, row_keys=keys)
    shards = tensor_parallel if sequence_parallel else 1
    torch.manual_seed(5)
    whole, d_out = torch.randn(2, tokens, 1, 64).chunk(2)
    mine = (
        slice(groups.tp_rank * tokens // shards, (groups.tp_rank + 1) * tokens // shards) if shards > 1 else slice(None)
    )
    results = []
    for backend in (None, TorchBackend()):
        for module, _, _ in taken_over(bench.chunks):
            module.lora_backend = backend or module.lora_backend
        x = whole[0, mine].clone().requires_grad_()
        with routing_scope(routing):
            y, bias = mlp(x)
        assert bias is None
        names = _graph(y)
        assert ("SwigluMlpFunctionBackward" in names) == (backend is None), names
        (dx,) = torch.autograd.grad(y, x, d_out[0, mine])
        gradients = [steps.shard.grad.clone() for steps in bench._steps["fused"].values()]
        bench._clear()
        results.append([y.detach(), dx, *gradients])
    worst = max(float((a - b).norm() / b.norm()) for a, b in zip(*results, strict=True))
    parallel.stop()
    Path(f"{out}.{groups.tp_rank}").write_text(json.dumps(worst))
    return 0


def _graph(y: torch.Tensor) -> set[str]:
    """Names of the functions that made a tensor."""
    found, waiting = set(), [y.grad_fn]
    while waiting:
        node = waiting.pop()
        if node is not None and node.name() not in found:
            found.add(node.name())
            waiting += [following for following, _ in node.next_functions]
    return found
