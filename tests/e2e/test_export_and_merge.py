"""``export`` and ``merge`` as a user calls them, against PEFT's own merging."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch


def command(*words: object) -> subprocess.CompletedProcess[str]:
    program = [sys.executable, "-m", "lorafusion_megatron.cli.main", *map(str, words)]
    return subprocess.run(program, capture_output=True, text=True, timeout=120)


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    """A bfloat16 base model with tied head, and a run's folder with one kept step, written by PEFT itself."""
    from peft import LoraConfig, get_peft_model
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=250, hidden_size=48, intermediate_size=96, num_hidden_layers=3, num_attention_heads=8,
        num_key_value_heads=4, head_dim=10, tie_word_embeddings=True, attention_bias=True,
    )  # fmt: skip
    LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(tmp_path / "base", max_shard_size="40KB")
    base = LlamaForCausalLM.from_pretrained(tmp_path / "base", dtype=torch.float32)
    # 16 / sqrt(4) = 8 is exact, so that PEFT's scale is ours to the last bit.
    lora = LoraConfig(r=4, lora_alpha=16, use_rslora=True, target_modules="all-linear", task_type="CAUSAL_LM")
    model = get_peft_model(base, lora)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.normal_(std=0.05)
    for folder in ("job", "job/step_20"):
        model.save_pretrained(tmp_path / "run" / folder)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if "lora_B" in name:
                    parameter.mul_(2)
    return tmp_path / "run"


def test_an_exported_step_merges_into_what_peft_merges(run_dir: Path, tmp_path: Path) -> None:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    base, adapter, merged = tmp_path / "base", tmp_path / "adapter", tmp_path / "merged"
    done = command("export", run_dir, "job", "--step", 20, "--output", adapter)
    assert (done.returncode, done.stderr) == (0, "")
    assert str(adapter) in done.stdout
    done = command("merge", "--base", base, "--adapter", adapter, "--output", merged)
    assert done.returncode == 0, done.stderr
    assert str(merged) in done.stdout

    plain = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    expected = PeftModel.from_pretrained(plain, run_dir / "job" / "step_20").merge_and_unload()
    got = AutoModelForCausalLM.from_pretrained(merged, dtype="auto")
    assert got.dtype == torch.bfloat16
    weights = {name: value.to(torch.bfloat16) for name, value in expected.state_dict().items()}
    assert got.state_dict().keys() == weights.keys()
    for name, value in got.state_dict().items():
        # Sums in another order may round a value in 2^16 or so to the neighbour.
        assert (value != weights[name]).float().mean() < 1e-3, name
        torch.testing.assert_close(value, weights[name], rtol=2**-7, atol=1e-6)
    ids = torch.arange(40)[None]
    with torch.no_grad():
        torch.testing.assert_close(
            got.float()(ids).logits, expected.to(torch.bfloat16).float()(ids).logits, rtol=0, atol=2e-3
        )


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("export", "{run}", "other", "--output", "{out}"), "jobs with an adapter: job"),
        (("export", "{run}", "job", "--step", "7", "--output", "{out}"), "kept steps: 20"),
        (("export", "{run}", "../run/job", "--output", "{out}"), "holds no adapter of '../run/job'"),
        (("export", "{run}", "job", "--output", "{run}"), "exists; nothing is overwritten"),
        (("merge", "--base", "{run}", "--adapter", "{run}/job", "--output", "{out}"), "config.json does not exist"),
        (("merge", "--base", "{base}", "--adapter", "{base}", "--output", "{out}"), "adapter_config.json does not"),
        (("merge", "--base", "{base}", "--adapter", "{run}/job", "--output", "{base}"), "nothing is overwritten"),
        (("merge", "--base", "{base}", "--adapter", "{run}/job"), "--output"),
    ],
)
def test_wrong_calls_end_with_one_line_and_status_2(
    run_dir: Path, tmp_path: Path, words: tuple[str, ...], message: str
) -> None:
    places = {"run": run_dir, "base": tmp_path / "base", "out": tmp_path / "out"}
    before = sorted(tmp_path.rglob("*"))
    done = command(*(word.format(**places) for word in words))
    assert done.returncode == 2
    assert message in done.stderr
    assert done.stderr.count("\n") == 1
    assert sorted(tmp_path.rglob("*")) == before
