"""Each rank's parameters against an independent conversion of the whole model."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from lorafusion_megatron.errors import UserError
from lorafusion_megatron.models import load
from lorafusion_megatron.models.checkpoint import check_base_weights, weights_fingerprint
from lorafusion_megatron.models.config import read_model_spec
from lorafusion_megatron.models.load import load_base_weights
from tests.unit.models.conftest import FAMILIES, SaveModel, biases


def hf_state(folder: Path) -> dict[str, torch.Tensor]:
    return {key: value for file in folder.glob("*.safetensors") for key, value in load_file(file).items()}


def shard(full: torch.Tensor, dim: int, tp_rank: int, tp_size: int) -> torch.Tensor:
    return full.chunk(tp_size, dim)[tp_rank]


def expected_parameters(folder: Path, tp_rank: int, tp_size: int) -> dict[str, torch.Tensor]:
    """The rank's shard of every parameter, cut out of whole tensors in Megatron's layout."""
    config = json.loads((folder / "config.json").read_text())
    hf, groups = hf_state(folder), config["num_key_value_heads"]
    embedding = hf["model.embed_tokens.weight"]
    out = {
        "embedding.word_embeddings.weight": shard(embedding, 0, tp_rank, tp_size),
        "output_layer.weight": shard(hf.get("lm_head.weight", embedding), 0, tp_rank, tp_size),
        "decoder.final_layernorm.weight": hf["model.norm.weight"],
    }
    for i in range(config["num_hidden_layers"]):
        source, target = f"model.layers.{i}.", f"decoder.layers.{i}."
        for kind in ("weight", "bias"):
            if f"{source}self_attn.q_proj.{kind}" in hf:
                heads = [hf[f"{source}self_attn.{n}_proj.{kind}"].unflatten(0, (groups, -1)) for n in "qkv"]
                out[f"{target}self_attention.linear_qkv.{kind}"] = shard(
                    torch.cat(heads, 1).flatten(0, 1), 0, tp_rank, tp_size
                )
            if f"{source}mlp.up_proj.{kind}" in hf:
                gate, up = (shard(hf[f"{source}mlp.{n}_proj.{kind}"], 0, tp_rank, tp_size) for n in ("gate", "up"))
                out[f"{target}mlp.linear_fc1.{kind}"] = torch.cat([gate, up])
        for module, linear in (("self_attn.o_proj", "self_attention.linear_proj"), ("mlp.down_proj", "mlp.linear_fc2")):
            out[f"{target}{linear}.weight"] = shard(hf[f"{source}{module}.weight"], 1, tp_rank, tp_size)
            if f"{source}{module}.bias" in hf:
                out[f"{target}{linear}.bias"] = hf[f"{source}{module}.bias"]
        for module, norm in (
            ("input_layernorm", "input_layernorm"),
            ("post_attention_layernorm", "pre_mlp_layernorm"),
            ("self_attn.q_norm", "self_attention.q_layernorm"),
            ("self_attn.k_norm", "self_attention.k_layernorm"),
        ):
            if f"{source}{module}.weight" in hf:
                out[f"{target}{norm}.weight"] = hf[f"{source}{module}.weight"]
    return out


def empty_like(parameters: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: torch.full(value.shape, float("nan")) for name, value in parameters.items()}


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_every_shard_equals_the_slice_of_the_whole_model_to_the_last_bit(
    save_model: SaveModel, family: str, tied: bool
) -> None:
    folder = save_model(family, tie_word_embeddings=tied, vocab_size=248, max_shard_size="60KB", **biases(family))
    assert len(list(folder.glob("*.safetensors"))) > 3
    assert ("lm_head.weight" in hf_state(folder)) is not tied
    for tp_size in (1, 2, 4):
        for tp_rank in range(tp_size):
            expected = expected_parameters(folder, tp_rank, tp_size)
            got = empty_like(expected)
            load_base_weights(folder, read_model_spec(folder), got, tp_rank=tp_rank, tp_size=tp_size)
            for name, value in expected.items():
                assert torch.equal(got[name], value), (tp_size, tp_rank, name)


def test_every_tensor_of_the_checkpoint_is_in_some_parameter(save_model: SaveModel) -> None:
    folder = save_model("llama", **biases("llama"))
    whole = expected_parameters(folder, 0, 1)
    assert sum(value.numel() for value in whole.values()) == sum(value.numel() for value in hf_state(folder).values())


def test_transformer_engine_names_are_the_norms(save_model: SaveModel) -> None:
    folder = save_model("qwen3")
    got = {
        "decoder.layers.2.self_attention.linear_qkv.layer_norm_weight": torch.empty(48),
        "decoder.layers.1.mlp.linear_fc1.layer_norm_weight": torch.empty(48),
    }
    load_base_weights(folder, read_model_spec(folder), got, tp_rank=0, tp_size=1)
    hf = hf_state(folder)
    assert torch.equal(got.popitem()[1], hf["model.layers.1.post_attention_layernorm.weight"])
    assert torch.equal(got.popitem()[1], hf["model.layers.2.input_layernorm.weight"])


def test_vocabulary_rows_past_the_end_are_zero(save_model: SaveModel) -> None:
    folder = save_model("llama", vocab_size=130, tie_word_embeddings=True)
    embedding = hf_state(folder)["model.embed_tokens.weight"]
    # 4 x 64 rows for a vocabulary of 130: rank 2 has two rows of it, rank 3 starts past the end.
    for tp_rank in range(4):
        names = ("embedding.word_embeddings.weight", "output_layer.weight")
        got = {name: torch.full((64, 48), float("nan")) for name in names}
        load_base_weights(folder, read_model_spec(folder), got, tp_rank=tp_rank, tp_size=4)
        expected = torch.cat([embedding, torch.zeros(126, 48)])[64 * tp_rank : 64 * (tp_rank + 1)]
        for name in names:
            assert torch.equal(got[name], expected), (tp_rank, name)


def test_values_are_cast_to_the_dtype_of_the_parameter_and_keep_its_storage(save_model: SaveModel) -> None:
    folder = save_model("mistral", dtype=torch.bfloat16)
    stored = hf_state(folder)["model.layers.0.mlp.down_proj.weight"]
    assert stored.dtype == torch.bfloat16
    weight = torch.nn.Parameter(torch.empty(48, 96), requires_grad=True)
    pointer = weight.data_ptr()
    load_base_weights(
        folder, read_model_spec(folder), {"decoder.layers.0.mlp.linear_fc2.weight": weight}, tp_rank=0, tp_size=1
    )
    assert weight.data_ptr() == pointer
    assert torch.equal(weight, stored.float())


def test_a_rank_reads_its_share_and_no_more(save_model: SaveModel, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = save_model("llama", vocab_size=248, **biases("llama"))
    read: list[tuple[str, int]] = []

    class Counted:
        def __init__(self, name: str, inner: object) -> None:
            self.name, self.inner = name, inner

        def __getitem__(self, index: object) -> torch.Tensor:
            value = self.inner[index]
            read.append((self.name, value.numel()))
            return value

    class Opened:
        def __init__(self, *args: object, **kwargs: object) -> None:
            self.inner = safe_open(*args, **kwargs)

        def __enter__(self) -> "Opened":
            self.opened = self.inner.__enter__()
            return self

        def __exit__(self, *args: object) -> None:
            self.inner.__exit__(*args)

        def get_slice(self, name: str) -> Counted:
            return Counted(name, self.opened.get_slice(name))

    safe_open = load.safe_open
    monkeypatch.setattr(load, "safe_open", Opened)
    wanted = {k: v for k, v in expected_parameters(folder, 1, 4).items() if ".layers.1." in k}
    load_base_weights(folder, read_model_spec(folder), empty_like(wanted), tp_rank=1, tp_size=4)
    assert sum(count for _, count in read) == sum(value.numel() for value in wanted.values())
    assert all(".layers.1." in name for name, _ in read)


PEAK = """
import sys, torch
from lorafusion_megatron.models.checkpoint import check_base_weights, weights_fingerprint
from lorafusion_megatron.models.config import read_model_spec
from lorafusion_megatron.models.load import load_base_weights
torch.set_num_threads(1)
folder, layers = sys.argv[1], int(sys.argv[2])
shapes = {"self_attention.linear_qkv.weight": (768, 512), "self_attention.linear_proj.weight": (512, 256),
          "mlp.linear_fc1.weight": (4096, 512), "mlp.linear_fc2.weight": (512, 2048)}
parameters = {f"decoder.layers.{i}.{k}": torch.zeros(v) for i in range(layers) for k, v in shapes.items()}
for value in parameters.values():
    value.fill_(1.0)
def peak():
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmHWM"))
small = {"decoder.layers.0.mlp.linear_fc2.weight": parameters["decoder.layers.0.mlp.linear_fc2.weight"]}
load_base_weights(folder, read_model_spec(folder), small, tp_rank=1, tp_size=2)
open("/proc/self/clear_refs", "w").write("5")
before = peak()
load_base_weights(folder, read_model_spec(folder), parameters, tp_rank=1, tp_size=2)
print(peak() - before)
"""


def test_host_memory_grows_by_no_more_than_one_tensor(tmp_path: Path) -> None:
    layers, hidden, ffn = 12, 512, 4096
    shapes = {"embed_tokens.weight": (64, hidden), "norm.weight": (hidden,)}
    for i in range(layers):
        for name in ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj"):
            shapes[f"layers.{i}.{name}.weight"] = (hidden, hidden)
        for name in ("gate_proj", "up_proj"):
            shapes[f"layers.{i}.mlp.{name}.weight"] = (ffn, hidden)
        shapes[f"layers.{i}.mlp.down_proj.weight"] = (hidden, ffn)
        for name in ("input_layernorm", "post_attention_layernorm"):
            shapes[f"layers.{i}.{name}.weight"] = (hidden,)
    save_file({f"model.{name}": torch.ones(shape) for name, shape in shapes.items()}, tmp_path / "model.safetensors")
    size = (tmp_path / "model.safetensors").stat().st_size
    assert size > 300e6
    config = {
        "model_type": "llama", "vocab_size": 64, "hidden_size": hidden, "intermediate_size": ffn,
        "num_hidden_layers": layers, "num_attention_heads": 8, "tie_word_embeddings": True,
    }  # fmt: skip
    (tmp_path / "config.json").write_text(json.dumps(config))
    done = subprocess.run(
        [sys.executable, "-c", PEAK, str(tmp_path), str(layers)], capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    # The rank's share is 170 MB; one whole tensor is 8 MiB, in pages of the file. 8 MiB of slack for the allocator.
    assert int(done.stdout) * 1024 < (8 << 20) + (8 << 20), done.stdout


def rewrite(folder: Path, change: object) -> None:
    """Apply ``change`` to the tensors of an unsharded model."""
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda t: t.pop("model.layers.1.mlp.up_proj.weight"), "model.layers.1.mlp.up_proj.weight is missing"),
        (lambda t: t.pop("lm_head.weight"), "lm_head.weight is missing"),
        (lambda t: t.update({"model.extra": torch.ones(1)}), "model.safetensors: tensor model.extra is not part"),
        (lambda t: t.update({"model.norm.weight": torch.ones(47)}), "model.norm.weight has shape [47]"),
        (lambda t: t.update({"model.norm.weight": torch.ones(48).to(torch.float8_e4m3fn)}), "is F8_E4M3"),
    ],
)
def test_a_checkpoint_that_does_not_fit_is_an_error_that_names_the_tensor(
    save_model: SaveModel, change: object, words: str
) -> None:
    folder = save_model("llama")
    rewrite(folder, change)
    with pytest.raises(UserError) as caught:
        load_base_weights(folder, read_model_spec(folder), {}, tp_rank=0, tp_size=1)
    assert words in str(caught.value)
    assert str(caught.value).startswith("base_model.path: ")


def test_a_truncated_file_is_an_error(save_model: SaveModel) -> None:
    folder = save_model("llama")
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(UserError, match=r"model\.safetensors can't be read"):
        load_base_weights(folder, read_model_spec(folder), {}, tp_rank=0, tp_size=1)


def test_heads_that_do_not_divide_are_an_error(save_model: SaveModel) -> None:
    folder = save_model("llama", num_attention_heads=6, num_key_value_heads=3)
    with pytest.raises(UserError, match="2 tensor-parallel ranks for 3 key/value heads"):
        load_base_weights(folder, read_model_spec(folder), {}, tp_rank=0, tp_size=2)


@pytest.mark.parametrize(
    ("name", "shape"),
    [
        ("decoder.layers.3.mlp.linear_fc2.weight", (48, 96)),
        ("decoder.layers.0.mlp.linear_fc2.bias", (48,)),
        ("decoder.layers.0.mlp.linear_fc2.weight", (48, 95)),
        ("embedding.word_embeddings.weight", (249, 48)),
    ],
)
def test_parameters_that_the_model_does_not_have_raise(
    save_model: SaveModel, name: str, shape: tuple[int, ...]
) -> None:
    folder = save_model("llama")
    with pytest.raises(ValueError, match=r"has no parameter|on this rank|rows"):
        load_base_weights(folder, read_model_spec(folder), {name: torch.empty(shape)}, tp_rank=0, tp_size=1)


def test_old_rotary_buffers_and_a_stored_tied_head_are_passed_over(save_model: SaveModel) -> None:
    folder = save_model("llama", tie_word_embeddings=True)
    head = hf_state(folder)["model.embed_tokens.weight"].clone()
    extra = {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(5), "lm_head.weight": head}
    rewrite(folder, lambda tensors: tensors.update(extra))
    got = {"output_layer.weight": torch.empty(250, 48)}
    load_base_weights(folder, read_model_spec(folder), got, tp_rank=0, tp_size=1)
    assert torch.equal(got["output_layer.weight"], hf_state(folder)["model.embed_tokens.weight"])


def test_a_tied_head_that_is_not_the_embedding_is_refused(save_model: SaveModel) -> None:
    folder = save_model("llama", tie_word_embeddings=True)
    head = hf_state(folder)["model.embed_tokens.weight"] + 1
    rewrite(folder, lambda tensors: tensors.update({"lm_head.weight": head}))
    with pytest.raises(UserError, match=r"lm_head\.weight in .* differs from the embedding; .* ties"):
        check_base_weights(folder, read_model_spec(folder))


def test_a_fingerprint_tells_weights_and_not_files_apart(save_model: SaveModel) -> None:
    folder = save_model("llama")
    spec = read_model_spec(folder)
    first = weights_fingerprint(check_base_weights(folder, spec))
    tensors = dict(sorted(hf_state(folder).items()))
    half = len(tensors) // 2
    names = [dict(list(tensors.items())[:half]), dict(list(tensors.items())[half:])]
    (folder / "model.safetensors").unlink()
    for number, part in enumerate(names):
        save_file(part, folder / f"part{number}.safetensors")
    weight_map = {name: f"part{number}.safetensors" for number, part in enumerate(names) for name in part}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    assert weights_fingerprint(check_base_weights(folder, spec)) == first
    names[0][next(iter(names[0]))].view(-1)[-1] += 1
    save_file(names[0], folder / "part0.safetensors")
    assert weights_fingerprint(check_base_weights(folder, spec)) != first
