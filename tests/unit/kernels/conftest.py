"""These tests run the kernels on the CPU, under Triton's interpreter; on a machine with a GPU tests/gpu runs them."""

import os

if os.environ.get("TRITON_INTERPRET") == "1":
    from kernel_interpreter import patch_interpreter

    patch_interpreter()
else:
    collect_ignore_glob = ["test_*.py"]
