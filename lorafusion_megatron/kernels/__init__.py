"""Triton kernels, each beside an fp32 reference in PyTorch; knows torch and triton, nothing of ours."""
