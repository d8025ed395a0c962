"""Cases of the oracle: made once, trained once by Transformers + PEFT, and compared with what the package exported."""

import argparse
import contextlib
import io
import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from tests.launch import Ranks

TOLERANCE = 1e-3
"""The oracle's own."""


@dataclass(frozen=True, kw_only=True)
class OracleCase:
    """A run file with the adapters and losses that each of its jobs has when the oracle trains it alone."""

    folder: Path

    @property
    def run_file(self) -> Path:
        """The run file: three jobs in fp32 without dropout, of ranks 4, 8 and 16, that end at different steps."""
        return self.folder / "run.yaml"

    @property
    def answers(self) -> Path:
        """What the oracle wrote."""
        return self.folder / "oracle"

    def error(self, product: Path) -> float:
        """Largest update error or loss error of all tensors and steps; raises where tensors or steps differ."""
        from tests.oracle import peft_oracle

        text = io.StringIO()
        arguments = argparse.Namespace(run=self.run_file, oracle=self.answers, product=product, tol=TOLERANCE)
        with contextlib.redirect_stdout(text), pytest.raises(SystemExit) as end:
            peft_oracle.compare(arguments)
        assert isinstance(end.value.code, int), end.value.code
        match = re.search(r"^worst (\S+), tolerance", text.getvalue(), re.MULTILINE)
        assert match is not None, text.getvalue()
        return float(match.group(1))


def make_case(folder: Path, *, arch: str, tied: bool = False, jobs: int = 3, seed: int = 0) -> OracleCase:
    """Write one of the oracle's own cases and let it train every job, in a process of its own."""
    Ranks(_make, (str(folder), arch, tied, jobs, seed), world=1, folder=folder / "logs").wait(180.0).check()
    return OracleCase(folder=folder)


def train_case(folder: Path) -> OracleCase:
    """Let the oracle train the jobs of ``folder/run.yaml``: in file order, without dropout, each from an adapter.

    Beside each adapter lies grad_norms.json, a norm per step of a job that clips. Where a job targets a fused
    linear by Megatron's name, PEFT's modules under it share one A parameter.
    """
    Ranks(_train, (str(folder),), world=1, folder=folder / "logs").wait(180.0).check()
    return OracleCase(folder=folder)


def _make(folder: str, arch: str, tied: bool, jobs: int, seed: int) -> None:
    from tests.oracle import peft_oracle

    peft_oracle.make(argparse.Namespace(case=folder, arch=arch, tied=tied, jobs=jobs, seed=seed, pp=1))
    _train(folder)


def _train(folder: str) -> None:
    import peft

    from tests.oracle import peft_oracle

    run = yaml.safe_load(Path(folder, "run.yaml").read_text())
    load, clip = peft.PeftModel.from_pretrained, torch.nn.utils.clip_grad_norm_
    norms: list[float] = []

    def clipping(parameters: Any, limit: float) -> Any:
        norms.append(clip(parameters, limit).item())

    torch.nn.utils.clip_grad_norm_ = clipping
    for job in run["jobs"]:
        targets = job["peft"].get("target_modules", [])

        def sharing(base: Any, path: str, targets: list[str] = targets, **options: Any) -> Any:
            model = load(base, path, **options)
            for block in model.base_model.model.model.layers:
                attention, mlp = block.self_attn, block.mlp
                if "linear_qkv" in targets:
                    attention.k_proj.lora_A = attention.v_proj.lora_A = attention.q_proj.lora_A
                if "linear_fc1" in targets:
                    mlp.up_proj.lora_A = mlp.gate_proj.lora_A
            return model

        peft.PeftModel.from_pretrained = sharing
        norms.clear()
        peft_oracle.train_job(run, job, Path(folder, "oracle", job["name"]))
        Path(folder, "oracle", job["name"], "grad_norms.json").write_text(json.dumps(norms))
