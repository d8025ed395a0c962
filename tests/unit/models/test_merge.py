"""Merged models against PEFT, and the files around the weights."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from lorafusion_megatron.cli.main import main
from lorafusion_megatron.errors import UserError
from lorafusion_megatron.models import files
from lorafusion_megatron.models import merge as module
from lorafusion_megatron.models.adapter import write_adapter
from lorafusion_megatron.models.config import read_model_spec
from lorafusion_megatron.models.merge import merge_adapter
from lorafusion_megatron.types import AdapterSpec
from tests.unit.models.conftest import FAMILIES, SaveModel, biases
from tests.unit.models.test_peft_adapter import ALL, random_tensors

SPEC = AdapterSpec(name="job", rank=4, alpha=0.3, target_modules=ALL, seed=3)


def save_adapter(folder: Path, base: Path, spec: AdapterSpec = SPEC) -> dict[str, torch.Tensor]:
    tensors = random_tensors(read_model_spec(base), spec)
    write_adapter(folder, spec, base, tensors)
    return tensors


def logits(model: torch.nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(torch.arange(3, 35)[None]).logits.float()


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_merged_model_loads_in_transformers_with_the_logits_of_peft(
    save_model: SaveModel, tmp_path: Path, family: str, tied: bool
) -> None:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    base = save_model(family, tie_word_embeddings=tied, **biases(family))
    save_adapter(tmp_path / "adapter", base)
    merge_adapter(base, tmp_path / "adapter", tmp_path / "merged")
    merged, info = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", output_loading_info=True)
    assert not any(info.values()), info
    assert (merged.lm_head.weight is merged.model.embed_tokens.weight) is tied
    plain = AutoModelForCausalLM.from_pretrained(base)
    before = logits(plain)
    expected = logits(PeftModel.from_pretrained(plain, tmp_path / "adapter"))
    error, moved = (logits(merged) - expected).abs().max(), (before - expected).abs().max()
    assert error < 1e-5 * moved, (error, moved)


def test_weights_are_computed_in_fp32_and_cast_once(save_model: SaveModel, tmp_path: Path) -> None:
    base = save_model("llama", dtype=torch.bfloat16, max_shard_size="30KB")
    spec = replace(SPEC, use_rslora=True, target_modules=("q_proj", "down_proj"))
    tensors = save_adapter(tmp_path / "adapter", base, spec)
    merge_adapter(base, tmp_path / "adapter", tmp_path / "merged")
    names = sorted(file.name for file in base.glob("*.safetensors"))
    assert len(names) > 3
    assert sorted(file.name for file in (tmp_path / "merged").glob("*.safetensors")) == names
    for name in names:
        old, new = load_file(base / name), load_file(tmp_path / "merged" / name)
        assert old.keys() == new.keys()
        for key, weight in old.items():
            a = tensors.get(f"base_model.model.{key.removesuffix('.weight')}.lora_A.weight")
            expected = weight
            if a is not None:
                b = tensors[f"base_model.model.{key.removesuffix('.weight')}.lora_B.weight"]
                expected = (weight.double() + 0.3 / 2 * (b.double() @ a.double())).to(torch.bfloat16)
            # fp64 and fp32 may round a tie to different neighbours: at most one unit in the last place, rarely.
            assert new[key].dtype == torch.bfloat16
            different = new[key] != expected
            assert different.float().mean() < 1e-3, key
            assert torch.allclose(new[key].float(), expected.float(), rtol=2**-7, atol=0), key
            if a is None:
                assert torch.equal(new[key], weight)


def test_blocks_of_rows_give_the_same_weights(
    save_model: SaveModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = save_model("qwen2")
    save_adapter(tmp_path / "adapter", base)
    merge_adapter(base, tmp_path / "adapter", tmp_path / "whole")
    monkeypatch.setattr(module, "_BLOCK_BYTES", 1000)
    merge_adapter(base, tmp_path / "adapter", tmp_path / "blocks")
    whole, blocks = (load_file(tmp_path / name / "model.safetensors") for name in ("whole", "blocks"))
    for key in whole:
        torch.testing.assert_close(blocks[key], whole[key], rtol=1e-6, atol=1e-6)


def test_files_beside_the_weights_are_copied(save_model: SaveModel, tmp_path: Path) -> None:
    base = save_model("llama", max_shard_size="60KB")
    for name in ("tokenizer.json", "chat_template.jinja", "tokenizer.model", "LICENSE", "pytorch_model.bin", "x.py"):
        (base / name).write_text(name)
    for name in ("original/params.json", "additional_chat_templates/tools.jinja", "additional_chat_templates/notes.py"):
        (base / name).parent.mkdir(exist_ok=True)
        (base / name).write_text(name)
    save_adapter(tmp_path / "adapter", base)
    seen: list[tuple[int, int]] = []
    merge_adapter(base, tmp_path / "adapter", tmp_path / "merged", progress=lambda *step: seen.append(step))
    left_out = {"pytorch_model.bin", "original"}
    names = {file.name for file in base.iterdir()} - left_out
    assert {file.name for file in (tmp_path / "merged").iterdir()} == names
    (templates,) = (path for path in (tmp_path / "merged").iterdir() if path.is_dir())
    assert [file.name for file in templates.iterdir()] == ["tools.jinja"]
    (tmp_path / "there").mkdir()
    merge_adapter(base, tmp_path / "adapter", tmp_path / "there")
    assert (tmp_path / "there" / templates.name / "tools.jinja").is_file()
    for name in names - {templates.name}:
        if not name.endswith(".safetensors"):
            assert (tmp_path / "merged" / name).read_bytes() == (base / name).read_bytes()
    size = sum(file.stat().st_size for file in base.glob("*.safetensors"))
    assert seen[-1] == (size, size)
    assert [written for written, _ in seen] == sorted({written for written, _ in seen})


PEAK = """
import sys, torch
from lorafusion_megatron.models.merge import merge_adapter
torch.set_num_threads(1)
def peak():
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmHWM"))
torch.ones(64, 64) @ torch.ones(64, 64)
open("/proc/self/clear_refs", "w").write("5")
before = peak()
merge_adapter(*sys.argv[1:4])
print(peak() - before)
"""


def test_an_index_of_files_that_the_merged_model_lacks_is_not_copied(save_model: SaveModel, tmp_path: Path) -> None:
    base = save_model("llama")
    (base / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": "model-1.safetensors"}}))
    save_adapter(tmp_path / "adapter", base)
    merge_adapter(base, tmp_path / "adapter", tmp_path / "merged")
    assert {file.name for file in tmp_path.glob("merged/model*")} == {"model.safetensors"}


def test_memory_does_not_grow_with_the_model(tmp_path: Path) -> None:
    base, hidden, rows = tmp_path / "base", 1024, 30_000
    base.mkdir()
    config = {
        "model_type": "llama", "vocab_size": 8, "hidden_size": hidden, "intermediate_size": rows,
        "num_hidden_layers": 2, "num_attention_heads": 1, "head_dim": 2, "tie_word_embeddings": True,
    }  # fmt: skip
    (base / "config.json").write_text(json.dumps(config))
    shapes = {"model.embed_tokens.weight": (8, hidden), "model.norm.weight": (hidden,)}
    for i in range(2):
        path = f"model.layers.{i}"
        shapes |= {f"{path}.self_attn.{n}_proj.weight": (2, hidden) for n in "qkv"}
        shapes |= {f"{path}.self_attn.o_proj.weight": (hidden, 2), f"{path}.mlp.down_proj.weight": (hidden, rows)}
        shapes |= {f"{path}.mlp.{n}_proj.weight": (rows, hidden) for n in ("gate", "up")}
        shapes |= {f"{path}.{n}_layernorm.weight": (hidden,) for n in ("input", "post_attention")}
    weights = {name: torch.ones(shape, dtype=torch.bfloat16) for name, shape in shapes.items()}
    save_file(weights, base / "model.safetensors")
    assert (base / "model.safetensors").stat().st_size > 360e6
    save_adapter(tmp_path / "adapter", base, replace(SPEC, target_modules=("gate_proj", "down_proj")))
    arguments = [str(base), str(tmp_path / "adapter"), str(tmp_path / "merged")]
    done = subprocess.run([sys.executable, "-c", PEAK, *arguments], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    # 16 MiB of rows in fp32, their cast, the rows of the file and the libraries' own start-up (80 to 130 MB in all were
    # seen, by machine); the weights are 370 MB, so half of them would show a copy.
    assert int(done.stdout) * 1024 < 185e6, done.stdout
    with safe_open(tmp_path / "merged" / "model.safetensors", framework="pt") as merged:
        assert set(merged.keys()) == shapes.keys()


@pytest.mark.parametrize(
    ("prepare", "words"),
    [
        (lambda p: (p / "merged").mkdir() or (p / "merged" / "x").touch(), "--output: "),
        (lambda p: (p / "merged").touch(), "--output: "),
        (lambda p: (p / "base" / "config.json").unlink(), "--base: "),
        (lambda p: (p / "base" / "model.safetensors").write_bytes(b""), "--base: "),
        (lambda p: (p / "adapter" / "adapter_config.json").unlink(), "--adapter: "),
    ],
)
def test_wrong_input_is_an_error_and_writes_nothing(
    save_model: SaveModel, tmp_path: Path, prepare: Callable[[Path], object], words: str
) -> None:
    base = save_model("llama")
    save_adapter(tmp_path / "adapter", base)
    prepare(tmp_path)
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(UserError) as caught:
        merge_adapter(base, tmp_path / "adapter", tmp_path / "merged")
    assert str(caught.value).startswith(words)
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize(
    "name", ["tokenizer.json", "LICENSE", "additional_chat_templates", "additional_chat_templates/tools.jinja"]
)
def test_a_file_beside_the_weights_that_is_a_link_to_nowhere_is_an_error(
    save_model: SaveModel, tmp_path: Path, name: str
) -> None:
    base = save_model("llama")
    save_adapter(tmp_path / "adapter", base)
    (base / "weights.json").mkdir()  # no file at all, and left out
    (base / "pytorch_model.bin").symlink_to("nowhere")  # left out as well
    merge_adapter(base, tmp_path / "adapter", tmp_path / "whole")
    (base / name).parent.mkdir(exist_ok=True)
    (base / name).symlink_to("nowhere")
    with pytest.raises(UserError, match=rf"--base: .*{name} can't be read \(No such file or directory\)"):
        merge_adapter(base, tmp_path / "adapter", tmp_path / "merged")
    assert not (tmp_path / "merged").exists()


def test_too_little_space_is_an_error(save_model: SaveModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base = save_model("llama")
    save_adapter(tmp_path / "adapter", base)
    usage = type("Usage", (), {"free": 1000})
    monkeypatch.setattr("shutil.disk_usage", lambda _: usage)
    with pytest.raises(UserError, match=r"--output: .* has 0.0 GiB left"):
        merge_adapter(base, tmp_path / "adapter", tmp_path / "merged")


def test_a_weight_that_overflows_its_dtype_is_an_error_and_leaves_nothing(
    save_model: SaveModel, tmp_path: Path
) -> None:
    base = save_model("llama", dtype=torch.float16)
    save_adapter(tmp_path / "adapter", base, replace(SPEC, alpha=1e6))
    with pytest.raises(UserError, match=r"layers\.0\..*\.weight with the adapter is not finite in torch\.float16"):
        merge_adapter(base, tmp_path / "adapter", tmp_path / "merged")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter", "base"]


def test_a_link_leads_to_the_folder_that_it_names(save_model: SaveModel, tmp_path: Path) -> None:
    base = save_model("llama")
    save_adapter(tmp_path / "adapter", base)
    (tmp_path / "empty").mkdir()
    for name, target in (("to_empty", "empty"), ("dangling", "later/new")):
        (tmp_path / name).symlink_to(tmp_path / target)
        merge_adapter(base, tmp_path / "adapter", tmp_path / name)
        assert (tmp_path / name).is_symlink()
        assert {file.name for file in (tmp_path / target).iterdir()} == {file.name for file in base.iterdir()}
    (tmp_path / "loop").symlink_to("loop")
    with pytest.raises(UserError, match=r"--output: .*loop exists"):
        merge_adapter(base, tmp_path / "adapter", tmp_path / "loop")


def test_an_empty_folder_is_filled_where_it_is(
    save_model: SaveModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As a mount point must be: nothing may be renamed onto it or from beside it."""
    base = save_model("llama")
    save_adapter(tmp_path / "adapter", base)
    (tmp_path / "disk").mkdir()
    moved: list[str] = []
    replace_file, usage = os.replace, shutil.disk_usage

    def move(source: Path, target: Path) -> None:
        assert source.is_file()
        assert source.is_relative_to(tmp_path / "disk")
        replace_file(source, target)
        moved.append(target.name)

    monkeypatch.setattr(os, "replace", move)
    asked: list[Path] = []
    monkeypatch.setattr("shutil.disk_usage", lambda path: asked.append(path) or usage(path))
    merge_adapter(base, tmp_path / "adapter", tmp_path / "disk")
    assert moved[-1] == "config.json"
    assert all(path.is_relative_to(tmp_path / "disk") for path in asked)
    assert {file.name for file in (tmp_path / "disk").iterdir()} == {file.name for file in base.iterdir()}


def test_names_up_to_the_limit_are_written_and_longer_ones_refused(save_model: SaveModel, tmp_path: Path) -> None:
    base = save_model("llama")
    save_adapter(tmp_path / "adapter", base)
    merge_adapter(base, tmp_path / "adapter", tmp_path / ("ä" * 127))
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(UserError, match=r"--output: .* can't be written \(File name too long\)"):
        merge_adapter(base, tmp_path / "adapter", tmp_path / "new" / ("n" * 300))
    with pytest.raises(UserError, match="--output: /proc/x can't be written"):
        merge_adapter(base, tmp_path / "adapter", "/proc/x")
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize("umask", [0o002, 0o077])
def test_rights_are_what_the_umask_leaves(save_model: SaveModel, tmp_path: Path, umask: int) -> None:
    base = save_model("llama")
    before = os.umask(umask)
    try:
        save_adapter(tmp_path / "adapter", base)
        merge_adapter(base, tmp_path / "adapter", tmp_path / "merged")
    finally:
        os.umask(before)
    for folder in (tmp_path / "adapter", tmp_path / "merged"):
        assert folder.stat().st_mode & 0o777 == 0o777 & ~umask
        assert {file.stat().st_mode & 0o777 for file in folder.iterdir()} == {0o666 & ~umask}


def test_what_a_killed_process_left_is_removed(save_model: SaveModel, tmp_path: Path) -> None:
    base = save_model("llama")
    save_adapter(tmp_path / "adapter", base)
    code = (
        "import os, sys; from pathlib import Path; from lorafusion_megatron.models.files import temporary_folder\n"
        "with temporary_folder(Path(sys.argv[1])) as folder: (folder / 'half').touch(); os._exit(9)"
    )
    outputs = [tmp_path / "beside", tmp_path / "inside"]
    outputs[1].mkdir()
    for output in outputs:
        subprocess.run([sys.executable, "-c", code, str(output)], check=False, timeout=60)
    assert len([*tmp_path.glob(".beside.*"), *outputs[1].glob(".inside.*")]) == 2
    stale, fresh = tmp_path / ".beside.elsewhere-0-1.0123abcd", tmp_path / ".beside.elsewhere-0-1.0123abce"
    for folder in (stale, fresh, tmp_path / ".beside.other"):
        folder.mkdir()
    os.utime(stale, (1.0, 1.0))
    with files.temporary_folder(outputs[0]) as running:
        for output in outputs:
            merge_adapter(base, tmp_path / "adapter", output)
        assert running.is_dir()
    assert {path.name for path in tmp_path.glob(".*")} == {fresh.name, ".beside.other"}
    assert {file.name for file in outputs[1].iterdir()} == {file.name for file in base.iterdir()}


@pytest.mark.parametrize(
    ("named", "other"),
    [
        ("{base}", False),
        ("{base}/../base", False),
        ("{copy}", True),
        ("/gone/base", False),
        ("owner/base", False),
        ("owner/Model", True),
        ("", False),
    ],
)
def test_another_base_model_than_the_adapters_is_said(
    save_model: SaveModel, tmp_path: Path, capsys: pytest.CaptureFixture[str], named: str, other: bool
) -> None:
    base = save_model("llama")
    shutil.copytree(base, tmp_path / "copy" / "base")
    named = named.format(base=base, copy=tmp_path / "copy" / "base")
    write_adapter(tmp_path / "adapter", SPEC, named, random_tensors(read_model_spec(base), SPEC))
    words = ["--base", str(base), "--adapter", str(tmp_path / "adapter"), "--output", str(tmp_path / "merged")]
    assert main(["merge", *words]) == 0
    note = f"note: the adapter names {named!r} as its base model, and was merged into {base}"
    assert (note in capsys.readouterr().out) is other


def test_a_model_of_the_hubs_cache_is_known_by_its_folder(save_model: SaveModel, tmp_path: Path) -> None:
    snapshot = tmp_path / "models--owner--Model" / "snapshots" / "abc"
    shutil.copytree(save_model("llama"), snapshot)
    write_adapter(tmp_path / "adapter", SPEC, "owner/Model", random_tensors(read_model_spec(snapshot), SPEC))
    assert merge_adapter(snapshot, tmp_path / "adapter", tmp_path / "merged") is None
