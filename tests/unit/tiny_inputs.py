"""A whole small run on disk, made without torch: base model, tokenizer, data, adapter, run file."""

import json
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from safetensors.numpy import save_file
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

from lorafusion_megatron.config.targets import HF_TARGETS
from lorafusion_megatron.models.config import read_model_spec
from lorafusion_megatron.models.families import hf_tensors
from lorafusion_megatron.models.projections import adapter_shapes

VOCABULARY = 300
EOS, START, BOS = 256, 257, 258
CONFIG = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": VOCABULARY,
    "max_position_embeddings": 128,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "tie_word_embeddings": True,
    "hidden_act": "silu",
}
CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\\n' + m['content'] + '<|im_end|>' + '\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)


def byte_ids(text: str) -> list[int]:
    """Token ids of plain text under the tiny tokenizer: its UTF-8 bytes."""
    return list(text.encode())


def write_model(folder: Path, **changes: Any) -> Path:
    """A base model of 4 layers with random weights."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(CONFIG | changes))
    (folder / "model.safetensors").touch()
    rng = np.random.default_rng(0)
    tensors = {
        name: rng.standard_normal(shape, dtype=np.float32) * 0.1 for name, shape in hf_tensors(read_model_spec(folder))
    }
    save_file(tensors, folder / "model.safetensors")
    return folder


def write_tokenizer(folder: Path, *, chat_template: str | None = CHATML) -> Path:
    """A tokenizer of one token a byte (the byte's value) and three special ones."""
    letters = pre_tokenizers.ByteLevel.alphabet()
    # ByteLevel's own table: printable bytes stand for themselves, the rest follow from U+0100 on.
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = (byte for byte in range(256) if byte not in printable)
    to_letter = {byte: chr(byte) for byte in printable} | {byte: chr(256 + n) for n, byte in enumerate(others)}
    assert set(to_letter.values()) == set(letters)
    tokenizer = Tokenizer(models.BPE(vocab={letter: byte for byte, letter in to_letter.items()}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(text, normalized=False) for text in ("<|im_end|>", "<|im_start|>", "<s>")])
    assert tokenizer.token_to_id("<s>") == BOS
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {"eos_token": "<|im_end|>", "bos_token": "<s>", "tokenizer_class": "PreTrainedTokenizerFast"}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    if chat_template is not None:
        (folder / "chat_template.jinja").write_text(chat_template)
    return folder


def write_adapter(folder: Path, model: Path, *, rank: int = 4, alpha: float = 8.0, **changes: Any) -> Path:
    """An adapter in PEFT's format on every linear of the model."""
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(1)
    shapes = adapter_shapes(read_model_spec(model), HF_TARGETS, rank)
    save_file(
        {name: rng.standard_normal(shape, dtype=np.float32) for name, shape in shapes.items()},
        folder / "adapter_model.safetensors",
    )
    config = {
        "peft_type": "LORA",
        "r": rank,
        "lora_alpha": alpha,
        "lora_dropout": 0.0,
        "use_rslora": False,
        "target_modules": list(HF_TARGETS),
    }
    (folder / "adapter_config.json").write_text(json.dumps(config | changes))
    return folder


def write_rows(path: Path, rows: Iterable[Any]) -> Path:
    """A JSONL file; rows that are text are written as they are."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return path


def id_rows(count: int, *, seed: int = 0) -> list[dict[str, list[int]]]:
    """Tokenized rows of 3 to 20 tokens."""
    rng = np.random.default_rng(seed)
    return [
        {
            "prompt_ids": rng.integers(3, VOCABULARY, rng.integers(1, 8)).tolist(),
            "completion_ids": rng.integers(3, VOCABULARY, rng.integers(2, 13)).tolist(),
        }
        for _ in range(count)
    ]


@dataclass
class Case:
    """A run on disk that a test can spoil before it writes the run file."""

    folder: Path
    run: dict[str, Any] = field(default_factory=dict)

    @property
    def model(self) -> Path:
        return self.folder / "base"

    @property
    def rows(self) -> Path:
        """Data of job ``first``."""
        return self.folder / "data" / "first.jsonl"

    @property
    def adapter(self) -> Path:
        return self.folder / "adapter"

    def write(self) -> Path:
        """Write the run file and return its path."""
        path = self.folder / "run.yaml"
        path.write_text(yaml.safe_dump(self.run, sort_keys=False))
        return path

    def edit_json(self, file: Path, change: Callable[[dict[str, Any]], Any]) -> None:
        """Change a JSON file in place."""
        content = json.loads(file.read_text())
        change(content)
        file.write_text(json.dumps(content))


def make_case(folder: Path) -> Case:
    """Two jobs of tokenized rows, the first one starting from an adapter."""
    case = Case(folder)
    write_tokenizer(write_model(case.model))
    write_adapter(case.adapter, case.model)
    write_rows(case.rows, id_rows(7))
    write_rows(folder / "data" / "second.jsonl", id_rows(5, seed=1))
    case.run = {
        "base_model": {"path": str(case.model), "dtype": "float32"},
        "runtime": {"token_capacity": 64, "seed": 7, "device": "cpu"},
        "jobs": [
            {
                "name": "first",
                "dataset": {"path": str(case.rows), "shuffle": False},
                "peft": {"r": 4, "lora_alpha": 8.0, "init_from": str(case.adapter)},
                "train": {"global_batch_size": 3, "train_iters": 4},
            },
            {
                "name": "second",
                "dataset": {"path": str(folder / "data" / "second.jsonl")},
                "peft": {"r": 2, "lora_alpha": 4.0, "target_modules": ["q_proj", "v_proj"]},
                "scheduler": {"lr_decay_style": "cosine", "lr_warmup_iters": 1},
                "train": {"global_batch_size": 2, "epochs": 2},
            },
        ],
        "checkpoint": {"save": str(folder / "out")},
    }
    return case
