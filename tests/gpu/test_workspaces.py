"""Memory that libraries take by themselves is taken before training."""

import pytest
import torch
import torch.nn.functional as F

from lorafusion_megatron.mcore.gpu import make_workspaces

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_products_take_no_memory_beside_their_results(dtype):
    device = torch.device("cuda", torch.cuda.current_device())
    torch._C._cuda_clearCublasWorkspaces()
    before = torch.cuda.memory_allocated()
    make_workspaces(device)
    made = torch.cuda.memory_allocated()
    assert made > before + (1 << 20), "this torch takes its workspaces elsewhere: the test would prove nothing"
    x, weight = (torch.randn(256, 256, device=device, dtype=dtype, requires_grad=True) for _ in range(2))
    bias = torch.randn(256, device=device, dtype=dtype)
    F.linear(x @ weight, weight, bias).sum().backward()
    del x, weight, bias
    assert torch.cuda.memory_allocated() == made
