"""What the fork server of `tests.launch` imports once for all ranks.

One thread before torch starts any: a fork keeps no thread but its own.
"""

import os
import warnings

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("MKL_NUM_THREADS", "1")
warnings.simplefilter("ignore")

import ortools.sat.python.cp_model  # noqa: E402, F401
import peft  # noqa: E402, F401
import torch  # noqa: E402
import transformers  # noqa: E402, F401
from transformers.models import llama, mistral, qwen2, qwen3  # noqa: E402, F401

import lorafusion_megatron.training.trainer  # noqa: E402, F401

torch.set_num_threads(1)
