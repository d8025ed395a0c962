"""The same token ids and the same assistant masks as Transformers, for every kind of tokenizer file."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, processors

from lorafusion_megatron.data import DataSource
from lorafusion_megatron.data.rows import RowTokenizer
from lorafusion_megatron.data.tokenizer import TextTokenizer
from lorafusion_megatron.errors import UserError
from tests.unit.data.test_rows import ADDS_BOS, CONVERSATION, edit
from tests.unit.tiny_inputs import write_model, write_tokenizer

MARKED = (
    "{{ bos_token }}{% for m in messages %}{{ '[' + m['role'] + '] ' }}{% if m['role'] == 'assistant' %}"
    "{% generation %}{{ m['content'] + eos_token }}{% endgeneration %}{% else %}{{ m['content'] }}{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}{{ '[assistant] ' }}{% endif %}"
)
UNMARKED = MARKED.replace("{% generation %}", "").replace("{% endgeneration %}", "")
TEXTS = ("a b a", " a", "é 😀\n\n <s>x</s> y<|im_end|> z", "a")


def write_sentencepiece(folder: Path) -> Path:
    """A tokenizer of the kind that Llama 2 and Mistral have."""
    letters = "▁abcdefghijklmnopqrstuvwxyz.?!\n"
    words = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *letters, "▁a"]
    vocabulary = {word: index for index, word in enumerate(words)}
    model = models.BPE(vocab=vocabulary, merges=[("▁", "a")], unk_token="<unk>", byte_fallback=True, fuse_unk=True)
    tokenizer = Tokenizer(model)
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    tokenizer.add_special_tokens([AddedToken(text, normalized=False) for text in words[:3]])
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A <s> $B", special_tokens=[("<s>", 1)]
    )
    folder.mkdir(parents=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "config.json").write_text(json.dumps({"model_type": "llama"}))
    names = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "tokenizer_class": "LlamaTokenizer"}
    (folder / "tokenizer_config.json").write_text(json.dumps(names))
    return folder


def compare(folder: Path) -> None:
    """Plain text and conversations, ours against Transformers'."""
    from transformers import AutoTokenizer

    theirs = AutoTokenizer.from_pretrained(folder)
    ours = TextTokenizer(folder, trust_remote_code=False, key="k")
    for text in TEXTS:
        assert ours.bos_ids + ours.encode(text) == theirs(text)["input_ids"], text
    assert ours.eos_id == theirs.eos_token_id
    expected = theirs.apply_chat_template(
        CONVERSATION["messages"], chat_template=MARKED, return_dict=True, return_assistant_tokens_mask=True
    )
    assert any(expected["assistant_masks"])
    for template in (MARKED, UNMARKED):
        source = DataSource(path=folder, key="k", model=folder, vocab_size=300, chat_template=template)
        ids, labels = RowTokenizer(source).tokens(CONVERSATION, "rows.jsonl:1")
        assert ids == expected["input_ids"]
        assert labels == [bool(one) for one in expected["assistant_masks"]]


TRIMS = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}


@pytest.mark.parametrize("processor", [None, TRIMS, ADDS_BOS, {"type": "Sequence", "processors": [TRIMS, ADDS_BOS]}])
@pytest.mark.parametrize("tokenizer_class", [None, "PreTrainedTokenizerFast", "Qwen2Tokenizer", "LlamaTokenizerFast"])
@pytest.mark.parametrize("add_bos_token", [None, True, False])
def test_byte_level(
    processor: dict[str, Any] | None, tokenizer_class: str | None, add_bos_token: bool | None, tmp_path: Path
) -> None:
    folder = write_tokenizer(write_model(tmp_path / "base"))
    edit(folder / "tokenizer.json", post_processor=processor)
    names: dict[str, Any] = {"eos_token": "<|im_end|>", "bos_token": {"content": "<s>", "__type": "AddedToken"}}
    if tokenizer_class is not None:
        names["tokenizer_class"] = tokenizer_class
    if add_bos_token is not None:
        names["add_bos_token"] = add_bos_token
    (folder / "tokenizer_config.json").write_text(json.dumps(names))
    compare(folder)


@pytest.mark.parametrize("tokenizer_class", ["LlamaTokenizer", "LlamaTokenizerFast", "PreTrainedTokenizerFast"])
def test_sentencepiece(tokenizer_class: str, tmp_path: Path) -> None:
    folder = write_sentencepiece(tmp_path / "base")
    edit(folder / "tokenizer_config.json", tokenizer_class=tokenizer_class)
    compare(folder)


def test_a_tokenizer_that_needs_transformers_leaves_this_process_without_torch(tmp_path: Path) -> None:
    folder = write_sentencepiece(tmp_path / "base")
    program = (
        "import sys; from pathlib import Path; from lorafusion_megatron.data.tokenizer import TextTokenizer; "
        "ours = TextTokenizer(Path(sys.argv[1]), trust_remote_code=False, key='k'); "
        "print(ours.bos_ids, ours.encode('a <s>a'), ours.eos_id, 'torch' in sys.modules, 'transformers' in sys.modules)"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, str(folder)], capture_output=True, text=True, timeout=120, env=dict(os.environ)
    )
    assert done.returncode == 0, done.stderr
    ours = TextTokenizer(folder, trust_remote_code=False, key="k")
    assert done.stdout.split("\n")[0] == f"{ours.bos_ids} {ours.encode('a <s>a')} {ours.eos_id} False False"


def test_code_in_the_folder_runs_only_if_asked(tmp_path: Path) -> None:
    folder = write_tokenizer(write_model(tmp_path / "base"))
    (folder / "tokenizer.json").rename(folder / "hidden.json")
    (folder / "own.py").write_text(
        "from pathlib import Path\n"
        "from transformers import PreTrainedTokenizerFast\n"
        f"Path({str(tmp_path / 'ran')!r}).touch()\n"
        "class Own(PreTrainedTokenizerFast):\n"
        "    def __init__(self, *args, **kwargs):\n"
        f"        super().__init__(tokenizer_file={str(folder / 'hidden.json')!r}, bos_token='<s>')\n"
    )
    edit(folder / "tokenizer_config.json", tokenizer_class="Own", auto_map={"AutoTokenizer": [None, "own.Own"]})
    with pytest.raises(UserError, match=r"custom code.*base_model\.trust_remote_code: true"):
        TextTokenizer(folder, trust_remote_code=False, key="k")
    assert not (tmp_path / "ran").exists()
    trusted = TextTokenizer(folder, trust_remote_code=True, key="k")
    assert (tmp_path / "ran").exists()
    assert trusted.encode("a") == [97]


@pytest.mark.parametrize(
    "declared",
    [
        {"tokenizer_config.json": {"eos_token": "<|tool|>"}},
        {"tokenizer_config.json": {"extra_special_tokens": ["<|tool|>"]}},
        {"tokenizer_config.json": {"additional_special_tokens": ["<|tool|>"]}},
        {"added_tokens.json": {"<|tool|>": 259}},
        {"special_tokens_map.json": {"eos_token": "<|im_start|>"}},
    ],
    ids=["eos", "extra", "additional", "added", "map"],
)
def test_tokens_that_other_files_declare_are_those_of_transformers(tmp_path: Path, declared: dict[str, Any]) -> None:
    from transformers import AutoTokenizer

    folder = write_tokenizer(write_model(tmp_path / "base"))
    for name, values in declared.items():
        path = folder / name
        path.write_text(json.dumps((json.loads(path.read_text()) if path.exists() else {}) | values))
    theirs = AutoTokenizer.from_pretrained(folder)
    ours = TextTokenizer(folder, trust_remote_code=False, key="k")
    assert ours.eos_id == theirs.eos_token_id
    for text in ("a<|tool|>b", *TEXTS):
        assert ours.bos_ids + ours.encode(text) == theirs(text)["input_ids"], text
