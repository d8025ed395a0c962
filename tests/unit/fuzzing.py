"""Generated inputs for the run-file loader and the row reader, used by the tests and by scripts/fuzz_inputs.py.

A case passes if it loads, or ends in a `UserError` of one line; any other exception is a fault.
"""

import copy
import gzip
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import yaml
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from lorafusion_megatron.config import RunConfig, load_run
from lorafusion_megatron.config.run import JobConfig
from lorafusion_megatron.data import DataSource, JobDataset, load_dataset
from lorafusion_megatron.data.rows import KINDS
from lorafusion_megatron.errors import UserError
from tests.unit.tiny_inputs import CHATML, VOCABULARY, make_case

EDGES = [
    *("", " ", "null", "~", "2e-4", "1e999", "-1", "0x1F", "010", "1:30", "nan", ".inf", "yes", "../x", "/", "a\x00b"),
    *("\ud800", "\n", "{}", "[1", "{{ x }}", "all-linear", "q_proj", "linear_qkv", "auto", "state", "&a [*a]"),
    *("!!python/name:os.system", "!!int x", "!!bool 7", "!!timestamp 3", "!!set {a}", "!!binary =", "<<: 1", "="),
    *("? {a: 1}\n: 2", "x" * 300, 0, -1, 1, 2**31, 2**63, 2**64, 2**200, True, False, None, 0.0, -0.0, 0.5, 1e308),
    *(float("nan"), float("inf"), [], {}, [[]], [{}], {"": {}}),
]
values = st.recursive(
    st.sampled_from(EDGES) | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)


def paths(node: Any, here: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Every place in plain data."""
    inner = node.items() if isinstance(node, dict) else enumerate(node) if isinstance(node, list) else ()
    return [here, *(path for key, value in inner for path in paths(value, (*here, key)))]


@st.composite
def run_files(draw: st.DrawFn, good: dict[str, Any]) -> bytes:
    """A run file: a good one with a few places replaced, removed or added to; or with bytes changed; or anything."""
    kind = draw(st.sampled_from(["data"] * 7 + ["text", "bytes"]))
    if kind == "bytes":
        return draw(st.binary(max_size=60))
    run = copy.deepcopy(good)
    for _ in range(draw(st.integers(0, 2))):
        *parents, last = draw(st.sampled_from(paths(run)[1:]))
        node = run
        for key in parents:
            node = node[key]
        if draw(st.booleans()):
            node[last] = draw(values)
        elif isinstance(node, dict):
            node[draw(st.text(max_size=6) | st.sampled_from(["dim", "alpha", "epochs", "seed", "r"]))] = draw(values)
        else:
            del node[last]
        if not paths(run)[1:]:
            break
    text = yaml.safe_dump(run, sort_keys=False, allow_unicode=draw(st.booleans()))
    if kind == "text":
        at = draw(st.integers(0, len(text)))
        text = (
            text[:at] + str(draw(st.sampled_from(EDGES) | st.text(max_size=4))) + text[at + draw(st.integers(0, 9)) :]
        )
    return text.encode(errors="surrogatepass")


_words = st.sampled_from(
    ["jobs", "jobs[0]", "jobs[9]", "first", "peft", "r", "dim", "runtime", "seed", "name", "", "[0]", "x"]
)
_good = st.builds(
    lambda key, value: f"{key}={value}",
    st.sampled_from(["runtime.seed", "jobs[1].peft.r", "jobs.first.optimizer.lr", "jobs.second.train.epochs"]),
    st.integers(1, 9) | st.sampled_from(["1e0", "8.0", "0x7"]),
)
overrides = st.lists(_good, max_size=2) | st.lists(
    st.builds(
        lambda keys, equals, value: ".".join(keys) + equals + str(value),
        st.lists(_words | st.text(max_size=4), min_size=1, max_size=4),
        st.sampled_from(["=", "=", "=", "", "=="]),
        st.sampled_from(EDGES) | st.text(max_size=5),
    ),
    max_size=2,
)

_good_ids = st.lists(st.integers(0, VOCABULARY - 1), min_size=1, max_size=12)
_bad_ids = st.lists(st.integers(-1, VOCABULARY + 1) | st.sampled_from([True, None, "1", 2**40, 1.0]), max_size=12)
_ids = st.one_of(_good_ids, _good_ids, _good_ids, _bad_ids)
_strings = st.text(max_size=12) | st.sampled_from(["", "<|im_end|>", "a\ud800", "\x00", "é" * 9])
_turns = st.lists(
    st.fixed_dictionaries({"role": st.sampled_from(["user", "assistant", "system", "x"]) | values, "content": _strings})
    | values,
    max_size=4,
)
_fields = st.sampled_from([field for fields in KINDS.values() for field in fields] + ["input", "tools", "other"])
_good_rows = st.one_of(
    st.fixed_dictionaries({"prompt_ids": _good_ids, "completion_ids": _good_ids}),
    st.fixed_dictionaries({"prompt_ids": _ids, "completion_ids": _ids}),
    st.fixed_dictionaries({"messages": _turns}),
    st.fixed_dictionaries({"prompt": _strings, "completion": _strings}),
    st.fixed_dictionaries({"instruction": _strings, "output": _strings}, optional={"input": _strings | st.none()}),
    st.fixed_dictionaries({"text": _strings}),
)
_rows = _good_rows | st.dictionaries(_fields, values | _strings | _ids | _turns, max_size=3) | values


@st.composite
def data_files(draw: st.DrawFn) -> tuple[str, bytes]:
    """Name and content of a data file."""
    name = draw(st.sampled_from(["a.jsonl", "a.jsonl", "a.json", "a.txt", "a.jsonl.gz", "a.json.gz"]))
    if draw(st.integers(0, 4)) == 0:
        content = draw(st.binary(max_size=80))
    else:
        one = draw(_good_rows)
        rows = draw(st.lists(st.just(one), min_size=1, max_size=3)) + draw(st.lists(_rows, max_size=1))
        text = json.dumps(rows) if ".json" in name and draw(st.booleans()) else "\n".join(map(json.dumps, rows))
        content = text.encode(errors="surrogatepass")
    if name.endswith(".gz"):
        content = gzip.compress(content)[: draw(st.sampled_from([None, None, 5, 20, -3]))]
    return name, content


def one_line(error: UserError) -> None:
    """A message is one line that a terminal can show."""
    message = str(error)
    assert message
    assert len(message.splitlines()) == 1, message
    assert len(message) < 2000, len(message)


def fuzz_run_files(folder: Path, cases: int, *, count: Callable[[str], object] = lambda outcome: None) -> None:
    """Feed ``cases`` run files to `load_run`.

    Args:
        folder: an empty folder to work in.
        cases: how many.
        count: is told of each case whether it was ``loaded`` or ``refused``.
    """
    case = make_case(folder)
    path = case.write()

    @settings(
        max_examples=cases,
        deadline=None,
        database=None,
        derandomize=True,
        phases=[Phase.generate, Phase.shrink],
        suppress_health_check=list(HealthCheck),
    )
    @given(content=run_files(case.run), trailing=overrides)
    def check(content: bytes, trailing: list[str]) -> None:
        path.write_bytes(content)
        try:
            run = load_run(path, trailing)
        except UserError as error:
            one_line(error)
            count("refused")
        else:
            assert isinstance(run, RunConfig)
            assert all(isinstance(job, JobConfig) for job in run.jobs)
            assert all(run.adapter_spec(index).scaling > 0 for index in range(len(run.jobs)))
            count("loaded")

    check()


def fuzz_rows(folder: Path, cases: int, *, count: Callable[[str], object] = lambda outcome: None) -> None:
    """Feed ``cases`` data files to `load_dataset`; arguments as `fuzz_run_files`."""
    model = make_case(folder).model

    @settings(
        max_examples=cases,
        deadline=None,
        database=None,
        derandomize=True,
        phases=[Phase.generate, Phase.shrink],
        suppress_health_check=list(HealthCheck),
    )
    @given(file=data_files(), truncate=st.booleans(), template=st.sampled_from([None, CHATML, "{{ messages[0].x.y }}"]))
    def check(file: tuple[str, bytes], truncate: bool, template: str | None) -> None:
        path = folder / file[0]
        path.write_bytes(file[1])
        source = DataSource(
            path=path,
            key="k",
            model=model,
            vocab_size=VOCABULARY,
            max_length=20,
            truncate=truncate,
            chat_template=template,
        )
        try:
            dataset = load_dataset(source)
        except UserError as error:
            one_line(error)
            count("refused")
        else:
            check_dataset(dataset)
            count("loaded")

    check()


def check_dataset(dataset: JobDataset) -> None:
    """What holds for every data set that was let in."""
    assert len(dataset) >= 1
    assert 0 <= dataset.rows_without_labels < len(dataset)
    for row in range(len(dataset)):
        ids, mask = dataset.ids(row), dataset.label_mask(row)
        assert 1 <= len(ids) == len(mask) == dataset.lengths[row] <= 20
        assert ids.min() >= 0
        assert ids.max() < VOCABULARY
        assert mask[1:].sum() == dataset.label_tokens[row]
