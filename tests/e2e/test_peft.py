"""What a run writes is a PEFT adapter: PEFT loads it, whole, and it computes what the run computed."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests import launch, tiny

TP2_PP2 = ["model.tensor_model_parallel_size=2", "model.pipeline_model_parallel_size=2"]


def _load_and_measure(base: str, folder: str, rows: str, out: str) -> None:
    """In a process of its own: tensors that PEFT expects, the scale, and the loss over some rows."""
    import peft
    import transformers

    model = transformers.AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    model = peft.PeftModel.from_pretrained(model, folder)
    total, labels = 0.0, 0
    for line in Path(rows).read_text().splitlines():
        row = json.loads(line)
        ids = torch.tensor([row["prompt_ids"] + row["completion_ids"]])
        first = len(row["prompt_ids"])
        with torch.no_grad():
            logits = model(input_ids=ids).logits[0, first - 1 : -1]
        total += torch.nn.functional.cross_entropy(logits, ids[0, first:], reduction="sum").item()
        labels += len(row["completion_ids"])
    scale = model.base_model.model.model.layers[0].self_attn.q_proj.scaling["default"]
    keys = sorted(peft.get_peft_model_state_dict(model))
    Path(out).write_text(json.dumps({"loss": total / labels, "scale": scale, "keys": keys}))


@pytest.mark.parametrize(("world", "words"), [(1, []), (4, TP2_PP2)], ids=["one process", "PP2 TP2"])
@pytest.mark.parametrize("use_rslora", [False, True], ids=["plain", "rslora"])
def test_peft_loads_an_adapter_whole_and_finds_the_loss_of_the_next_step(tmp_path, measured, world, words, use_rslora):
    """Rows 13 and 14: the run's loss at step 4 is that of the adapter it kept after step 3."""
    tiny.write_base(tmp_path / "base")
    job = tiny.job(tmp_path, "only", r=16, alpha=32.0, use_rslora=use_rslora, rows=3, batch=3, steps=4)
    launch.train(
        tiny.write_run(tmp_path, [job]), *words, "checkpoint.save_interval=1", "checkpoint.keep=9", world=world
    )
    kept, found = tmp_path / "out" / "only" / "step_3", tmp_path / "found.json"
    arguments = (str(tmp_path / "base"), str(kept), job["dataset"]["path"], str(found))
    launch.Ranks(_load_and_measure, arguments, world=1, folder=tmp_path / "peft").wait().check()
    got = json.loads(found.read_text())
    assert got["scale"] == (8.0 if use_rslora else 2.0)
    assert got["keys"] == sorted(tiny.read(kept))
    next_loss = tiny.losses(tmp_path / "out", "only")[3]
    assert measured(abs(got["loss"] - next_loss) / next_loss) <= 1e-5


def test_a_loaded_adapter_is_what_the_first_step_starts_from(tmp_path):
    """Row 20: in bf16 the fp32 masters, too, must hold what was loaded, unrounded."""
    tiny.write_base(tmp_path / "base")
    optimizer = {"lr": 1e-7, "weight_decay": 0.0}
    job = tiny.job(tmp_path, "only", steps=1, optimizer=optimizer)
    job["scheduler"] = {"lr_decay_style": "constant"}
    launch.train(tiny.write_run(tmp_path, [job]), "base_model.dtype=bfloat16")
    start, got = tiny.read(tmp_path / "init" / "only"), tiny.adapter(tmp_path / "out", "only")
    for name, tensor in got.items():
        moved = (tensor - start[name]).abs().max()
        assert 0 < moved <= 2e-7, name


def test_adapters_of_tensor_parallel_ranks_merge_into_the_model_of_one_process(tmp_path, measured):
    """Row 9."""
    tiny.write_base(tmp_path / "base")
    run_file = tiny.write_run(tmp_path, [tiny.job(tmp_path, "only")])
    merged = []
    for out, world, words in (("one", 1, []), ("two", 2, ["model.tensor_model_parallel_size=2"])):
        launch.train(run_file, f"checkpoint.save={tmp_path / out}", *words, world=world)
        words = ["merge", "--base", str(tmp_path / "base"), "--adapter", str(tmp_path / out / "only")]
        words += ["--output", str(tmp_path / f"merged {out}")]
        launch.Ranks(launch.command, (words,), world=1, folder=tmp_path / "logs").wait().check()
        merged.append(load_file(tmp_path / f"merged {out}" / "model.safetensors"))
    base = load_file(tmp_path / "base" / "model.safetensors")
    one, two = merged
    assert set(one) == set(two) == set(base)
    changed = [name for name in base if not torch.equal(one[name], base[name])]
    assert len(changed) == 4 * 7
    assert measured(tiny.update_error(*({name: part[name] for name in changed} for part in (two, one, base)))) <= 1e-3
