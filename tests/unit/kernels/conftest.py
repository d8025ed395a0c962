"""These tests run the kernels on the CPU, under Triton's interpreter, which must be chosen before their import."""

import os

os.environ.setdefault("TRITON_INTERPRET", "1")

from kernel_interpreter import patch_interpreter

patch_interpreter()
