"""What each kind of row becomes, token by token. The tiny tokenizer's ids are the bytes of the text."""

import gzip
import json
import os
from pathlib import Path
from typing import Any

import pytest

from lorafusion_megatron.data import DataSource, JobDataset, load_dataset
from lorafusion_megatron.errors import UserError
from tests.unit.fuzzing import fuzz_rows
from tests.unit.tiny_inputs import (
    BOS,
    CHATML,
    EOS,
    START,
    VOCABULARY,
    byte_ids,
    write_model,
    write_rows,
    write_tokenizer,
)


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return write_tokenizer(write_model(tmp_path / "base"))


def load(model: Path, *rows: Any, **changes: Any) -> JobDataset:
    """The data set of these rows."""
    path = write_rows(model.parent / "rows.jsonl", rows)
    return load_dataset(DataSource(path=path, key="k", model=model, vocab_size=VOCABULARY, **changes))


def tokens(dataset: JobDataset, row: int = 0) -> tuple[list[int], list[int]]:
    """Ids of a row, and its labels."""
    ids = dataset.ids(row)
    return ids.tolist(), ids[dataset.label_mask(row)].tolist()


def test_tokenized_rows_need_no_tokenizer(tmp_path: Path) -> None:
    dataset = load(
        tmp_path, {"prompt_ids": [5, 6], "completion_ids": [7]}, {"prompt_ids": [], "completion_ids": [8, 9]}
    )
    assert tokens(dataset, 0) == ([5, 6, 7], [7])
    assert tokens(dataset, 1) == ([8, 9], [8, 9])
    assert dataset.lengths.tolist() == [3, 2]
    assert dataset.label_tokens.tolist() == [1, 1], "nothing predicts the first token of a row"


def test_prompt_and_completion(model: Path) -> None:
    ids, labels = tokens(load(model, {"prompt": "Q: é", "completion": " yes", "source": "ignored"}))
    assert ids == [*byte_ids("Q: é yes"), EOS]
    assert labels == [*byte_ids(" yes"), EOS]


def test_text(model: Path) -> None:
    dataset = load(model, {"text": "ab"})
    assert tokens(dataset) == ([97, 98, EOS], [97, 98, EOS])
    assert dataset.label_tokens.tolist() == [2]


def test_alpaca_prompts(model: Path) -> None:
    dataset = load(
        model,
        {"instruction": "Add.", "input": "1 2", "output": "3"},
        {"instruction": "Say hi.", "input": "", "output": "hi"},
        {"instruction": "Say hi.", "output": "hi"},
    )
    ids, labels = tokens(dataset, 0)
    assert bytes(ids[:-1]).decode() == (
        "Below is an instruction that describes a task, paired with an input that provides further context. "
        "Write a response that appropriately completes the request.\n\n"
        "### Instruction:\nAdd.\n\n### Input:\n1 2\n\n### Response:\n3"
    )
    assert labels == [*byte_ids("3"), EOS]
    ids, labels = tokens(dataset, 1)
    assert bytes(ids[:-1]).decode() == (
        "Below is an instruction that describes a task. Write a response that appropriately completes the request."
        "\n\n### Instruction:\nSay hi.\n\n### Response:\nhi"
    )
    assert tokens(dataset, 1) == tokens(dataset, 2)


def test_braces_in_an_instruction_are_text(model: Path) -> None:
    ids, _ = tokens(load(model, {"instruction": "{output}", "output": "x"}))
    assert "{output}" in bytes(ids[:-1]).decode()


ADDS_BOS = {
    "type": "TemplateProcessing",
    "single": [{"SpecialToken": {"id": "<s>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}],
    "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 0}}],
    "special_tokens": {"<s>": {"id": "<s>", "ids": [BOS], "tokens": ["<s>"]}},
}


def edit(path: Path, **changes: Any) -> None:
    """Change keys of a JSON file."""
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_beginning_of_sequence_where_the_tokenizer_adds_it(model: Path) -> None:
    edit(model / "tokenizer.json", post_processor=ADDS_BOS)
    assert tokens(load(model, {"prompt": "a", "completion": "b"})) == ([BOS, 97, 98, EOS], [98, EOS])
    assert tokens(load(model, {"text": "a"})) == ([BOS, 97, EOS], [97, EOS])
    assert BOS not in tokens(load(model, CONVERSATION))[0], "a chat template writes it itself"


@pytest.mark.parametrize(("config_id", "ends"), [(EOS, [EOS]), ([EOS, 1], [EOS]), (None, [])])
def test_end_of_sequence_from_config_json_or_none(model: Path, config_id: Any, ends: list[int]) -> None:
    (model / "tokenizer_config.json").write_text("{}")
    edit(model / "config.json", eos_token_id=config_id)
    assert tokens(load(model, {"prompt": "a", "completion": "b"}))[0] == [97, 98, *ends]


def test_limits_written_into_the_tokenizer_are_lifted(model: Path) -> None:
    limit = {"direction": "Right", "max_length": 2, "strategy": "LongestFirst", "stride": 0}
    edit(model / "tokenizer.json", truncation=limit)
    assert load(model, {"text": "abcdef"}).lengths.tolist() == [7]


def test_rows_are_cut_and_counted(model: Path) -> None:
    rows = [{"prompt_ids": [5] * n, "completion_ids": [6] * 4} for n in (2, 4, 9)]
    dataset = load(model, *rows, max_length=6, truncate=True)
    assert dataset.lengths.tolist() == [6, 6, 6]
    assert dataset.label_tokens.tolist() == [4, 2, 0]
    assert (dataset.rows_truncated, dataset.rows_without_labels) == (2, 1)
    with pytest.raises(UserError, match=r"rows\.jsonl:2 has 8 tokens, max_length is 6"):
        load(model, *rows, max_length=6)


def test_other_containers(model: Path, tmp_path: Path) -> None:
    rows = [{"prompt_ids": [n], "completion_ids": [n + 1]} for n in range(3)]
    lines = "\n\n".join(map(json.dumps, rows)) + "\n"
    contents = {
        "a.jsonl": lines.encode(),
        "b.json": json.dumps(rows, indent=1).encode(),
        "c.json": lines.encode(),
        "d.jsonl.gz": gzip.compress(lines.encode()),
        "e.json.gz": gzip.compress(json.dumps(rows).encode()),
        "f.jsonl": b"\xef\xbb\xbf" + lines.replace("\n", "\r\n").encode(),
        "g.txt": lines.encode(),
    }
    for name, content in contents.items():
        (tmp_path / name).write_bytes(content)
        source = DataSource(path=tmp_path / name, key="k", model=model, vocab_size=VOCABULARY)
        dataset = load_dataset(source)
        assert [dataset.ids(row).tolist() for row in range(len(dataset))] == [[0, 1], [1, 2], [2, 3]], name


def test_errors_count_blank_lines(model: Path) -> None:
    with pytest.raises(UserError, match=r"rows\.jsonl:4 is not JSON"):
        load(model, {"text": "a"}, "", "", "nonsense")


def test_a_million_tokens_take_five_bytes_each(tmp_path: Path) -> None:
    row = {"prompt_ids": [1] * 500, "completion_ids": [2] * 500}
    dataset = load(tmp_path, *[row] * 1000)
    assert dataset.total_tokens == 1_000_000
    held = sum(part.nbytes for part in vars(dataset).values() if hasattr(part, "nbytes"))
    assert held == 5 * 1_000_000 + 8 * 1001 + 2 * 8 * 1000


CONVERSATION = {
    "messages": [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Hé?"},
        {"role": "assistant", "content": "Yes 😀."},
        {"role": "user", "content": "Sure?"},
        {"role": "assistant", "content": "No."},
    ]
}


def test_messages_through_the_template(model: Path) -> None:
    ids, labels = tokens(load(model, CONVERSATION))
    expected: list[int] = []
    for turn in CONVERSATION["messages"]:
        expected += [START, *byte_ids(f"{turn['role']}\n{turn['content']}"), EOS, *byte_ids("\n")]
    assert ids == expected
    assert labels == [*byte_ids("Yes 😀."), EOS, *byte_ids("No."), EOS]


def test_tokenizers_that_trim_white_space_off_their_spans_lose_no_label(model: Path) -> None:
    trims = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    edit(model / "tokenizer.json", post_processor=trims)
    turns = [{"role": "user", "content": " "}, {"role": "assistant", "content": "  a  b "}]
    assert tokens(load(model, {"messages": turns}))[1] == [*byte_ids("  a  b "), EOS]


def test_generation_marks_decide_where_a_template_has_them(model: Path) -> None:
    template = (
        "{% for m in messages %}{{ '<|im_start|>' + m.role + ':' }}{% if m.role == 'assistant' %}"
        "{% generation %}{{ m.content }}{% endgeneration %}{{ '<|im_end|>' }}{% else %}{{ m.content }}{% endif %}"
        "{% endfor %}"
    )
    ids, labels = tokens(load(model, CONVERSATION, chat_template=template))
    assert labels == byte_ids("Yes 😀.No."), "the end of a turn lies outside of the marks"
    assert ids[:7] == [START, *byte_ids("system")]


def test_templates_without_an_end_token_label_the_whole_turn(model: Path) -> None:
    template = (
        "{% for m in messages %}{{ '[' + m.role + ']' + m.content + '\\n' }}{% endfor %}"
        "{% if add_generation_prompt %}[assistant]{% endif %}"
    )
    _, labels = tokens(load(model, CONVERSATION, chat_template=template))
    assert labels == byte_ids("Yes 😀.\nNo.\n")


def test_tools_reach_the_template(model: Path) -> None:
    template = "{{ tools | tojson }}" + CHATML
    ids, _ = tokens(load(model, CONVERSATION | {"tools": [{"name": "é<"}]}, chat_template=template))
    assert bytes(ids[:17]).decode() == '[{"name": "é<"}]'


def test_half_a_surrogate_pair_in_a_field_that_only_the_template_reads_is_refused(model: Path) -> None:
    template = "{{ tools | tojson }}" + CHATML
    with pytest.raises(UserError, match="half of a surrogate pair"):
        load(model, CONVERSATION | {"tools": [{"name": "x\ud800"}]}, chat_template=template)


def test_generated_files_load_or_are_refused_in_one_line(tmp_path: Path) -> None:
    seen: list[str] = []
    fuzz_rows(tmp_path, 200, count=seen.append)
    # How many of each depends on the constants of whatever modules are loaded, which Hypothesis draws from: 21 to 40.
    assert seen.count("loaded") >= 10
    assert seen.count("refused") >= 100


def test_a_template_that_writes_the_date_writes_that_of_the_data_file(model: Path) -> None:
    """Rows must be the same on every rank and at every start, also over midnight."""
    path = write_rows(model.parent / "rows.jsonl", [{"messages": [{"role": "assistant", "content": "a"}]}])
    os.utime(path, (1_732_492_799, 1_732_492_799))  # 24 November 2024, 23:59:59 UTC
    source = DataSource(
        path=path,
        key="k",
        model=model,
        vocab_size=VOCABULARY,
        chat_template="{{ strftime_now('%d %b %Y') }}{% generation %}{{ messages[0]['content'] }}{% endgeneration %}",
    )
    assert tokens(load_dataset(source)) == (byte_ids("24 Nov 2024a"), byte_ids("a"))


TOOLS = [{"type": "function", "function": {"name": "f"}}]
TOOL_TEMPLATE = (
    "{% for t in tools or [] %}{{ t | tojson }}{% endfor %}{% for m in messages %}[{{ m['role'] }}]"
    "{% for c in m.tool_calls or [] %}{{ c['function'] | tojson }}{% endfor %}{{ m['content'] or '' }};{% endfor %}"
    "{% if add_generation_prompt %}[assistant]{% endif %}"
)


def chat(*messages: dict[str, Any], **more: Any) -> dict[str, Any]:
    """A row of messages."""
    return {"messages": list(messages), **more}


USER, ASSISTANT = {"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}


@pytest.mark.parametrize("tools", [TOOLS, json.dumps(TOOLS)], ids=["list", "text"])
def test_tools_may_be_json_text_as_tables_hold_them(model: Path, tools: Any) -> None:
    dataset = load(model, chat(USER, ASSISTANT, tools=tools), chat_template=TOOL_TEMPLATE)
    assert bytes(tokens(dataset)[0]).decode() == f"{json.dumps(TOOLS[0])}[user]q;[assistant]a;"


@pytest.mark.parametrize("tools", ["no JSON", "{}", {"name": "f"}, ["f"], 3], ids=str)
def test_tools_of_another_kind_are_refused(model: Path, tools: Any) -> None:
    with pytest.raises(UserError, match="tools is not a list of objects"):
        load(model, chat(USER, ASSISTANT, tools=tools), chat_template=TOOL_TEMPLATE)


@pytest.mark.parametrize("where", ["config", "files"])
def test_rows_with_tools_take_the_template_for_them(model: Path, where: str) -> None:
    plain = f"<{TOOL_TEMPLATE}"
    (model / "chat_template.jinja").unlink()
    if where == "config":
        named = [{"name": "default", "template": plain}, {"name": "tool_use", "template": TOOL_TEMPLATE}]
        edit(model / "tokenizer_config.json", chat_template=named)
    else:
        (model / "chat_template.jinja").write_text(plain)
        (model / "additional_chat_templates").mkdir()
        (model / "additional_chat_templates" / "tool_use.jinja").write_text(TOOL_TEMPLATE)
    dataset = load(model, chat(USER, ASSISTANT), chat(USER, ASSISTANT, tools=[]))
    assert [bytes(tokens(dataset, row)[0]).decode()[0] for row in (0, 1)] == ["<", "["]
    given = load(model, chat(USER, ASSISTANT, tools=[]), chat_template=plain)
    assert bytes(tokens(given)[0]).decode()[0] == "<", "the job's own serves for all"


def test_a_turn_of_tool_calls_needs_no_content_where_the_template_knows_them(model: Path) -> None:
    calls = {"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "f"}}]}
    labels = tokens(load(model, chat(USER, calls), chat_template=TOOL_TEMPLATE))[1]
    assert bytes(labels).decode() == '{"name": "f"};'
    for content in (None, "", "\n"):
        with pytest.raises(UserError, match=r"rows.jsonl:2: .* knows nothing of tool_calls"):
            load(model, chat(USER, ASSISTANT), chat(USER, calls | {"content": content}))
    with pytest.raises(UserError, match="not a list of turns"):
        load(model, chat(USER, {"role": "assistant", "content": None, "tool_calls": []}), chat_template=TOOL_TEMPLATE)


def test_what_the_template_never_mentions_is_known_of_the_data_set(model: Path) -> None:
    thought = ASSISTANT | {"reasoning_content": "hm"}
    called = ASSISTANT | {"tool_calls": [{"function": {"name": "f"}}]}
    rows = [chat(USER, ASSISTANT), chat(USER, thought), chat(USER, called, tools=TOOLS), chat(USER, thought)]
    assert load(model, *rows).unread == ("reasoning_content", "tool_calls", "tools")
    assert load(model, *rows, chat_template=TOOL_TEMPLATE).unread == ("reasoning_content",)
    assert load(model, chat(USER, ASSISTANT | {"reasoning_content": None, "tool_calls": None}, tools=[])).unread == ()
    assert load(model, {"text": "x", "tools": TOOLS}).unread == ()


@pytest.mark.parametrize(
    "template",
    [
        "{% set x %}{% generation %}{{ messages[1]['content'] }}{% endgeneration %}{% endset %}long{{ x }}",
        "{% macro m() %}{% generation %}{{ messages[1]['content'] }}{% endgeneration %}{% endmacro %}{{ 'x' + m() }}",
        "long{% filter upper %}{% generation %}{{ messages[1]['content'] }}{% endgeneration %}{% endfilter %}",
    ],
    ids=["set", "macro", "filter"],
)
def test_marks_whose_place_can_not_be_known_are_refused(model: Path, template: str) -> None:
    with pytest.raises(UserError, match="within a macro, a set block or a filter"):
        load(model, chat(USER, ASSISTANT), chat_template=template)


def test_a_template_that_takes_no_beginning_alone_is_told_as_that(model: Path) -> None:
    template = "{{ messages[0]['role'] }}{% for m in messages %}{{ m['content'] }}{% endfor %}"
    with pytest.raises(UserError, match="not what stands before message 0 alone"):
        load(model, chat(ASSISTANT), chat_template=template)


def test_a_pipe_is_no_data_file(model: Path) -> None:
    path = model.parent / "rows.jsonl"
    os.mkfifo(path)
    with pytest.raises(UserError, match="is a pipe"):
        load_dataset(DataSource(path=path, key="k", model=model, vocab_size=VOCABULARY))


def test_columns_that_a_table_filled_up_with_null_make_no_second_kind(model: Path) -> None:
    dataset = load(model, {"text": "ab", "messages": None, "prompt": None, "completion": None})
    assert tokens(dataset)[0] == [*byte_ids("ab"), EOS]
    with pytest.raises(UserError, match="text is not text"):
        load(model, {"text": None})
