"""Mistakes of users, one a row: what they do, the key that the message must name, and words that it must hold."""

import gzip
import json
import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import load_file, save_file

from tests.unit.tiny_inputs import CHATML, Case, id_rows, write_model, write_rows

type Spoil = Callable[[Case], object]


@dataclass(frozen=True)
class Bad:
    """One mistake."""

    name: str
    key: str
    says: str
    spoil: Spoil | None = None
    """What is done to the files and the run file's data beforehand."""
    overrides: tuple[str, ...] = ()


def _touch(path: Path) -> None:
    path.parent.mkdir()
    path.touch()


def _link(path: Path) -> None:
    path.parent.mkdir()
    path.symlink_to("nowhere")


def linked_jobs(case: Case) -> None:
    """The second job's folder is a link to the first one's."""
    (case.folder / "out" / "first").mkdir(parents=True)
    (case.folder / "out" / "second").symlink_to("first")


def keys(path: str, value: Any) -> Spoil:
    """Set a key of the run file."""

    def spoil(case: Case) -> None:
        node: Any = case.run
        *parents, last = (int(part) if part.isdigit() else part for part in path.split("."))
        for part in parents:
            node = node[part] if isinstance(part, int) else node.setdefault(part, {})
        node[last] = value

    return spoil


def text(content: str | bytes) -> Spoil:
    """Replace the run file as a whole."""

    def spoil(case: Case) -> None:
        case.write = lambda: _write(case, content)  # type: ignore[method-assign]

    return spoil


def _write(case: Case, content: str | bytes) -> Any:
    path = case.folder / "run.yaml"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def rows(*content: Any) -> Spoil:
    """Replace the first job's data."""
    return lambda case: write_rows(case.rows, content)


def raw_rows(content: bytes, name: str = "first.jsonl") -> Spoil:
    """Replace the first job's data by these bytes, in a file of this name."""

    def spoil(case: Case) -> None:
        (case.rows.parent / name).write_bytes(content)
        case.run["jobs"][0]["dataset"]["path"] = str(case.rows.parent / name)

    return spoil


def model(**changes: Any) -> Spoil:
    """Change the base model's config.json."""
    return lambda case: case.edit_json(case.model / "config.json", lambda config: config.update(changes))


def adapter(**changes: Any) -> Spoil:
    """Change the adapter's adapter_config.json."""
    return lambda case: case.edit_json(case.adapter / "adapter_config.json", lambda config: config.update(changes))


def removed(name: str) -> Spoil:
    """Delete a file of the case."""
    return lambda case: (case.folder / name).unlink()


def truncated(name: str) -> Spoil:
    """Cut a file of the case in half."""

    def spoil(case: Case) -> None:
        path = case.folder / name
        os.truncate(path, path.stat().st_size // 2)

    return spoil


def both(*spoils: Spoil) -> Spoil:
    """One after the other."""

    def spoil(case: Case) -> None:
        for each in spoils:
            each(case)

    return spoil


def tensors(name: str, change: Callable[[dict[str, Any]], Any]) -> Spoil:
    """Change a safetensors file."""

    def spoil(case: Case) -> None:
        content = dict(load_file(case.folder / name))
        change(content)
        save_file(content, case.folder / name)

    return spoil


def tool_calls(content: str | None) -> dict[str, Any]:
    """A conversation whose assistant calls a tool."""
    calls = [{"function": {"name": "f", "arguments": {}}}]
    turns = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": content, "tool_calls": calls}]
    return {"messages": turns}


CHAT = {"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yes"}]}
TWO_TURNS = {"messages": CHAT["messages"] * 2}
REWRITES = CHATML.replace("m['content']", "(m['content'] if loop.last else '...')")
DATA = "jobs[0].dataset.path"
LONG = {"prompt_ids": [5], "completion_ids": [6] * 29}

RUN_FILE = (
    Bad(
        "file is missing",
        "run.yaml",
        "cannot be read",
        lambda case: setattr(case, "write", lambda: case.folder / "run.yaml"),
    ),
    Bad(
        "file is a folder", "data", "cannot be read", lambda case: setattr(case, "write", lambda: case.folder / "data")
    ),
    Bad("file is empty", "run.yaml", "section of keys", text("")),
    Bad("file is a list", "run.yaml", "section of keys", text("- a\n- b\n")),
    Bad("file is not UTF-8", "run.yaml", "not UTF-8", text(b"\xff\xfe\x00")),
    Bad("file is not YAML", "run.yaml", "line 2", text("a: [1,\nb: 2")),
    Bad("key comes twice", "run.yaml", "comes twice at line 2", text("runtime: {}\nruntime: {}\n")),
    Bad("merge comes twice", "run.yaml", "'<<' comes twice at line 3", text("a: &a {}\nb:\n  {<<: *a, <<: *a}\n")),
    Bad("python object", "run.yaml", "plain YAML", text("base_model: !!python/object/apply:os.system ['true']\n")),
    Bad("two documents", "run.yaml", "plain YAML", text("a: 1\n---\nb: 2\n")),
    Bad("nested too deep", "run.yaml", "plain YAML", text("a: " + "[" * 5000)),
    Bad("control characters", "run.yaml", "plain YAML", text("a: \x00\n")),
    Bad("unknown section", "runtme", "did you mean runtime?", keys("runtme", {})),
    Bad("unknown key", "runtime.token_capasity", "did you mean token_capacity?", keys("runtime.token_capasity", 64)),
    Bad(
        "unknown key in a job", "jobs[1].peft.lora_alpah", "did you mean lora_alpha?", keys("jobs.1.peft.lora_alpah", 1)
    ),
    Bad("key is not text", "runtime.8192", "unknown key", keys("runtime", {8192: 1})),
    Bad("no base model", "base_model", "missing", lambda case: case.run.pop("base_model")),
    Bad("no jobs", "jobs", "at least one", keys("jobs", [])),
    Bad("jobs is a section", "jobs", "must be a list", keys("jobs", {"a": 1})),
    Bad("job is text", "jobs[1]", "section of keys", keys("jobs.1", "second")),
    Bad("section is a number", "runtime", "section of keys", keys("runtime", 3)),
    Bad("no name", "jobs[0].name", "missing", lambda case: case.run["jobs"][0].pop("name")),
    Bad("same name", "jobs[1].name", "jobs[0]", keys("jobs.1.name", "first")),
    Bad("same name in capitals", "jobs[1].name", "upper and lower case", keys("jobs.1.name", "FIRST")),
    Bad("name leaves the folder", "jobs[0].name", "becomes a folder", keys("jobs.0.name", "../first")),
    Bad("name looks like an option", "jobs[0].name", "becomes a folder", keys("jobs.0.name", "-x")),
    Bad("name is empty", "jobs[0].name", "becomes a folder", keys("jobs.0.name", "")),
    Bad("name begins with a dot", "jobs[0].name", "becomes a folder", keys("jobs.0.name", ".hidden")),
    Bad("name is state", "jobs[0].name", "none of state", keys("jobs.0.name", "State")),
    Bad("name is a file of the run", "jobs[0].name", "metrics.jsonl", keys("jobs.0.name", "metrics.jsonl")),
    Bad("name is a number", "jobs[0].name", "must be text", keys("jobs.0.name", 7)),
    Bad("name ends the line", "jobs[0].name", "becomes a folder", keys("jobs.0.name", "first\n")),
    Bad("rank 0", "jobs[0].peft.r", "at least 1", keys("jobs.0.peft.r", 0)),
    Bad("rank 2048", "jobs[0].peft.r", "at most 1024", keys("jobs.0.peft.r", 2048)),
    Bad("rank is a fraction", "jobs[0].peft.r", "whole number", keys("jobs.0.peft.r", 4.5)),
    Bad("rank is true", "jobs[0].peft.r", "got true", keys("jobs.0.peft.r", True)),
    Bad("rank twice", "jobs[0].peft.dim", "two spellings", keys("jobs.0.peft.dim", 8)),
    Bad("alpha 0", "jobs[0].peft.lora_alpha", "above 0", keys("jobs.0.peft.lora_alpha", 0)),
    Bad("alpha is not a number", "jobs[0].peft.lora_alpha", "finite", keys("jobs.0.peft.lora_alpha", float("nan"))),
    Bad("dropout 1", "jobs[0].peft.lora_dropout", "below 1", keys("jobs.0.peft.lora_dropout", 1.0)),
    Bad(
        "target matches nothing",
        "jobs[1].peft.target_modules",
        "q_proj, k_proj",
        keys("jobs.1.peft.target_modules", ["q_porj"]),
    ),
    Bad(
        "target is the output layer",
        "jobs[1].peft.target_modules",
        "output layer",
        keys("jobs.1.peft.target_modules", ["lm_head"]),
    ),
    Bad(
        "target twice", "jobs[1].peft.target_modules", "given twice", keys("jobs.1.peft.target_modules", ["q_proj"] * 2)
    ),
    Bad(
        "targets overlap",
        "jobs[1].peft.target_modules",
        "linear_qkv",
        keys("jobs.1.peft.target_modules", ["q_proj", "linear_qkv"]),
    ),
    Bad("no target", "jobs[1].peft.target_modules", "at least one", keys("jobs.1.peft.target_modules", [])),
    Bad(
        "layer twice", "jobs[1].peft.layers_to_transform", "each once", keys("jobs.1.peft.layers_to_transform", [0, 0])
    ),
    Bad("learning rate 0", "jobs[0].optimizer.lr", "above 0", keys("jobs.0.optimizer.lr", 0)),
    Bad("learning rate is a word", "jobs[0].optimizer.lr", "must be a number", keys("jobs.0.optimizer.lr", "fast")),
    Bad("learning rate is endless", "jobs[0].optimizer.lr", "finite", keys("jobs.0.optimizer.lr", float("inf"))),
    Bad("beta 1", "jobs[0].optimizer.adam_beta2", "below 1", keys("jobs.0.optimizer.adam_beta2", 1)),
    Bad(
        "negative clipping", "jobs[0].optimizer.clip_grad", "0 for no clipping", keys("jobs.0.optimizer.clip_grad", -1)
    ),
    Bad("min_lr above lr", "jobs[0].scheduler.min_lr", "peak", keys("jobs.0.scheduler", {"min_lr": 1.0})),
    Bad(
        "unknown decay",
        "jobs[0].scheduler.lr_decay_style",
        "did you mean cosine?",
        keys("jobs.0.scheduler", {"lr_decay_style": "cosin"}),
    ),
    Bad(
        "warmup without end",
        "jobs[0].scheduler.lr_warmup_iters",
        "before the job",
        keys("jobs.0.scheduler", {"lr_warmup_iters": 4}),
    ),
    Bad(
        "warmup longer than the epochs",
        "jobs[1].scheduler.lr_warmup_iters",
        "job of 5",
        keys("jobs.1.scheduler.lr_warmup_iters", 5),
    ),
    Bad("batch of 0", "jobs[0].train.global_batch_size", "at least 1", keys("jobs.0.train.global_batch_size", 0)),
    Bad(
        "batch of 2^31",
        "jobs[0].train.global_batch_size",
        "at most 65536",
        keys("jobs.0.train.global_batch_size", (1 << 31) - 1),
    ),
    Bad(
        "steps beyond 31 bits",
        "jobs[1].train.epochs",
        "5000000000 optimizer steps; a job has at most 2147483647",
        both(
            lambda case: write_rows(case.folder / "data" / "second.jsonl", id_rows(5000)),
            keys("jobs.1.train", {"global_batch_size": 1, "epochs": 1e6}),
        ),
    ),
    Bad("no batch", "jobs[0].train.global_batch_size", "missing", keys("jobs.0.train", {"train_iters": 3})),
    Bad("no length", "jobs[0].train.train_iters", "needs a length", keys("jobs.0.train", {"global_batch_size": 3})),
    Bad("two lengths", "jobs[0].train.epochs", "both given", keys("jobs.0.train.epochs", 2)),
    Bad("negative seed", "jobs[0].seed", "at least 0", keys("jobs.0.seed", -1)),
    Bad("seed beyond 63 bits", "runtime.seed", "beyond 64 bits", keys("runtime.seed", 1 << 70)),
    Bad("max_length 1", "jobs[0].max_length", "at least 2", keys("jobs.0.max_length", 1)),
    Bad("evaluation without a path", "jobs[0].eval.interval", "needs rows", keys("jobs.0.eval", {"interval": 5})),
    Bad("evaluation without an interval", "jobs[0].eval.interval", "when", keys("jobs.0.eval", {"path": "x.jsonl"})),
    Bad("no folder to save", "checkpoint.save", "missing", keys("checkpoint", {})),
    Bad("keep nothing", "checkpoint.keep", "at least 1", keys("checkpoint.keep", 0)),
    Bad("unknown device", "runtime.device", "auto, cuda, cpu", keys("runtime.device", "tpu")),
    Bad("unknown dtype", "base_model.dtype", "bfloat16, float32", keys("base_model.dtype", "int8")),
    Bad("path is half a character", DATA, "half of a surrogate pair", keys("jobs.0.dataset.path", "\ud800")),
    Bad("output is half a character", "checkpoint.save", "half of a surrogate pair", keys("checkpoint.save", "\udfff")),
    Bad("text is half a character", "logger.wandb_project", "surrogate pair", keys("logger.wandb_project", "a\ud800")),
    Bad("path is a number", "base_model.path", "must be a path", keys("base_model.path", 5)),
    Bad("capacity below the padding", "runtime.padding_multiple", "fit", keys("runtime.padding_multiple", 128)),
    Bad(
        "no time for collectives",
        "runtime.distributed_timeout_minutes",
        "above 0",
        keys("runtime.distributed_timeout_minutes", 0),
    ),
    Bad("override without value", "override 'runtime'", "key=value", overrides=("runtime",)),
    Bad("override of an unknown key", "runtime.sed", "did you mean seed?", overrides=("runtime.sed=1",)),
    Bad("override of an unknown job", "override", "did you mean second?", overrides=("jobs.secnod.seed=1",)),
    Bad("override of a job too far", "override", "2 entries", overrides=("jobs[2].seed=1",)),
    Bad("override inside a number", "override", "only sections", overrides=("runtime.seed.low=1",)),
    Bad("override is not YAML", "override", "plain YAML", overrides=("runtime.seed=[1",)),
    Bad("override with a broken key", "override", "not a key", overrides=("jobs[x].seed=1",)),
)

LAYOUT = (
    Bad(
        "heads not divisible",
        "model.tensor_model_parallel_size",
        "attention heads",
        keys("model.tensor_model_parallel_size", 3),
    ),
    Bad(
        "query groups not divisible",
        "model.tensor_model_parallel_size",
        "key/value heads",
        keys("model.tensor_model_parallel_size", 4),
    ),
    Bad(
        "features not divisible",
        "model.tensor_model_parallel_size",
        "MLP features",
        both(lambda case: write_model(case.model, intermediate_size=25), keys("model.tensor_model_parallel_size", 2)),
    ),
    Bad(
        "tensor parallel 0",
        "model.tensor_model_parallel_size",
        "at least 1",
        keys("model.tensor_model_parallel_size", 0),
    ),
    Bad(
        "more stages than layers",
        "model.pipeline_model_parallel_size",
        "4 layers",
        keys("model.pipeline_model_parallel_size", 5),
    ),
    Bad(
        "more chunks than layers",
        "model.pipeline_model_parallel_size",
        "4 layers",
        keys("model", {"pipeline_model_parallel_size": 2, "virtual_pipeline_model_parallel_size": 3}),
    ),
    Bad(
        "chunks on one stage",
        "model.virtual_pipeline_model_parallel_size",
        "two stages",
        keys("model.virtual_pipeline_model_parallel_size", 2),
    ),
    Bad(
        "layout of too few stages",
        "model.pipeline_layout",
        "2 numbers",
        keys("model", {"pipeline_model_parallel_size": 2, "pipeline_layout": [4]}),
    ),
    Bad(
        "layout of too many layers",
        "model.pipeline_layout",
        "has 4",
        keys("model", {"pipeline_model_parallel_size": 2, "pipeline_layout": [3, 2]}),
    ),
    Bad("context parallel", "model.context_parallel_size", "not supported yet", keys("model.context_parallel_size", 2)),
    Bad(
        "expert parallel",
        "model.expert_model_parallel_size",
        "not supported",
        keys("model.expert_model_parallel_size", 2),
    ),
    Bad(
        "layer beyond the model",
        "jobs[1].peft.layers_to_transform[0]",
        "0 to 3",
        keys("jobs.1.peft.layers_to_transform", [4]),
    ),
    Bad("max_length beyond the positions", "jobs[0].max_length", "128", keys("jobs.0.max_length", 129)),
    Bad(
        "max_length beyond the window",
        "jobs[0].max_length",
        "sliding_window",
        both(
            model(model_type="mistral", architectures=["MistralForCausalLM"], sliding_window=32),
            keys("jobs.0.max_length", 33),
        ),
    ),
)

FOLDERS = (
    Bad("two jobs write one folder", "jobs.second.name", "a folder of its own", linked_jobs),
    Bad("rates that are none", "runtime.cost_model", "cost model", keys("runtime.cost_model", "nowhere.json")),
    Bad("model is missing", "base_model.path", "not a directory", lambda case: shutil.rmtree(case.model)),
    Bad("model without config.json", "base_model.path", "config.json", removed("base/config.json")),
    Bad("config.json is broken", "base_model.path", "config.json", truncated("base/config.json")),
    Bad("model of another family", "base_model.path", "bert", model(model_type="bert")),
    Bad("model with experts", "base_model.path", "experts", model(num_local_experts=8)),
    Bad("model without weights", "base_model.path", "safetensors", removed("base/model.safetensors")),
    Bad("weights are cut off", "base_model.path", "model.safetensors", truncated("base/model.safetensors")),
    Bad(
        "weights lack a tensor",
        "base_model.path",
        "missing",
        tensors("base/model.safetensors", lambda found: found.pop("model.norm.weight")),
    ),
    Bad("weights of another size", "base_model.path", "shape", model(intermediate_size=48)),
    Bad("adapter is missing", "jobs[0].peft.init_from", "is not a directory", lambda case: shutil.rmtree(case.adapter)),
    Bad(
        "adapter without settings",
        "jobs[0].peft.init_from",
        "adapter_config.json",
        removed("adapter/adapter_config.json"),
    ),
    Bad(
        "adapter without weights",
        "jobs[0].peft.init_from",
        "adapter_model.safetensors",
        removed("adapter/adapter_model.safetensors"),
    ),
    Bad(
        "adapter is cut off",
        "jobs[0].peft.init_from",
        "adapter_model.safetensors",
        truncated("adapter/adapter_model.safetensors"),
    ),
    Bad("adapter of another rank", "jobs[0].peft.init_from", "r is 4", keys("jobs.0.peft.r", 8)),
    Bad("adapter of another alpha", "jobs[0].peft.init_from", "lora_alpha", keys("jobs.0.peft.lora_alpha", 16)),
    Bad("adapter with rsLoRA", "jobs[0].peft.init_from", "use_rslora", adapter(use_rslora=True)),
    Bad(
        "adapter of other targets",
        "jobs[0].peft.init_from",
        "target_modules",
        keys("jobs.0.peft.target_modules", ["q_proj"]),
    ),
    Bad("adapter is not LoRA", "jobs[0].peft.init_from", "peft_type", adapter(peft_type="IA3")),
    Bad(
        "adapter with DoRA",
        "jobs[0].peft.init_from",
        "use_dora is True; use_dora is not supported",
        adapter(use_dora=True),
    ),
    Bad("adapter with biases", "jobs[0].peft.init_from", "bias is 'all'", adapter(bias="all")),
    Bad("adapter with biases of its own", "jobs[0].peft.init_from", "lora_bias is True", adapter(lora_bias=True)),
    Bad(
        "adapter with modules",
        "jobs[0].peft.init_from",
        "modules_to_save is ['lm_head']",
        adapter(modules_to_save=["lm_head"]),
    ),
    Bad(
        "adapter with ranks by pattern",
        "jobs[0].peft.init_from",
        "rank_pattern is",
        adapter(rank_pattern={"q_proj": 2}),
    ),
    Bad(
        "adapter with scales by pattern",
        "jobs[0].peft.init_from",
        "alpha_pattern is",
        adapter(alpha_pattern={"q_proj": 2}),
    ),
    Bad(
        "adapter that changed its base",
        "jobs[0].peft.init_from",
        "init_lora_weights 'pissa'",
        adapter(init_lora_weights="pissa"),
    ),
    Bad(
        "adapter of doubled layers",
        "jobs[0].peft.init_from",
        "layer_replication is",
        adapter(layer_replication=[[0, 2], [1, 3]]),
    ),
    Bad(
        "adapter with left out modules",
        "jobs[0].peft.init_from",
        "exclude_modules is",
        adapter(exclude_modules=["lm_head"]),
    ),
    Bad(
        "adapter of bare parameters",
        "jobs[0].peft.init_from",
        "target_parameters is",
        adapter(target_parameters=["mlp.weight"]),
    ),
    Bad(
        "adapter of other layers",
        "jobs[0].peft.init_from",
        "layers_to_transform is (0, 1); the job that starts from it has None",
        adapter(layers_to_transform=[1, 0]),
    ),
    Bad(
        "adapter of integers",
        "jobs[0].peft.init_from",
        "is I32; weights are float64, float32, float16 or bfloat16",
        tensors(
            "adapter/adapter_model.safetensors",
            lambda found: found.update({key: value.astype(np.int32) for key, value in found.items()}),
        ),
    ),
    Bad(
        "adapter lacks a layer",
        "jobs[0].peft.init_from",
        "is missing; the adapter is on 4 layers",
        tensors(
            "adapter/adapter_model.safetensors",
            lambda found: [found.pop(key) for key in list(found) if ".layers.3." in key],
        ),
    ),
    Bad(
        "adapter tensor of another rank",
        "jobs[0].peft.init_from",
        "shape",
        tensors(
            "adapter/adapter_model.safetensors",
            lambda found: found.update({next(iter(found)): np.zeros((3, 3), np.float32)}),
        ),
    ),
    Bad("output is a file", "checkpoint.save", "no folder", lambda case: (case.folder / "out").touch()),
    Bad("output's name is too long", "checkpoint.save", "too long", keys("checkpoint.save", "x" * 300)),
    Bad("a job's folder is a file", "jobs[0].name", "is no folder", lambda case: _touch(case.folder / "out" / "first")),
    Bad("a job's folder leads nowhere", "jobs[1].name", "no folder", lambda c: _link(c.folder / "out" / "second")),
    Bad(
        "output inside a file",
        "checkpoint.save",
        "no folder",
        lambda case: keys("checkpoint.save", str(case.rows / "out"))(case),
    ),
)

ROWS = (
    Bad("data is missing", DATA, "cannot be read", removed("data/first.jsonl")),
    Bad("data is a folder", DATA, "cannot be read", lambda case: keys("jobs.0.dataset.path", str(case.model))(case)),
    Bad("data is empty", DATA, "no row", rows()),
    Bad("data is not UTF-8", DATA, "not UTF-8", raw_rows(b'{"text": "\xff"}\n')),
    Bad(
        "data is cut off",
        DATA,
        "cannot be read",
        raw_rows(gzip.compress(json.dumps(id_rows(3)).encode())[:-9], "a.jsonl.gz"),
    ),
    Bad("data is not gzip", DATA, "cannot be read", raw_rows(b"{}\n", "a.jsonl.gz")),
    Bad("row is not JSON", DATA, "first.jsonl:2 is not JSON", rows(id_rows(1)[0], '{"text": ')),
    Bad("row is a list", DATA, "first.jsonl:1", rows(["a"])),
    Bad("row is nested too deep", DATA, "first.jsonl:1", rows('{"text": ' + "[" * 100000)),
    Bad("array of text", DATA, "a.json[1]", raw_rows(json.dumps([id_rows(1)[0], "x"]).encode(), "a.json")),
    Bad("row of no kind", DATA, "first.jsonl:1 has the fields prompt", rows({"prompt": "x"})),
    Bad("row of two kinds", DATA, "completion and text", rows({"prompt": "x", "completion": "y", "text": "z"})),
    Bad("rows of two kinds", DATA, "first.jsonl:3 is of kind text", rows(*id_rows(2), {"text": "x"})),
    Bad("ids are text", DATA, "first.jsonl:1: completion_ids", rows({"prompt_ids": [1], "completion_ids": ["2"]})),
    Bad("ids are true", DATA, "first.jsonl:1: prompt_ids", rows({"prompt_ids": [True], "completion_ids": [2]})),
    Bad(
        "id beyond the vocabulary",
        DATA,
        "first.jsonl:2 holds token id 300",
        rows(*id_rows(1), {"prompt_ids": [3], "completion_ids": [300]}),
    ),
    Bad("id below 0", DATA, "token id -1", rows({"prompt_ids": [-1], "completion_ids": [3]})),
    Bad("id beyond 32 bits", DATA, "token id 1099511627776", rows({"prompt_ids": [1 << 40], "completion_ids": [3]})),
    Bad(
        "row without tokens",
        DATA,
        "first.jsonl:2 has no token",
        rows(*id_rows(1), {"prompt_ids": [], "completion_ids": []}),
    ),
    Bad(
        "row beyond max_length",
        DATA,
        "first.jsonl:8 has 30 tokens, max_length is 20",
        both(lambda case: write_rows(case.rows, [*id_rows(7), LONG]), keys("jobs.0.max_length", 20)),
    ),
    Bad(
        "row beyond the capacity",
        DATA,
        "first.jsonl:3 has 30 tokens; a microbatch holds token_capacity = 29",
        both(rows(*id_rows(2), LONG), keys("runtime.token_capacity", 29)),
    ),
    Bad(
        "padded row beyond the capacity",
        DATA,
        "multiple of 16",
        both(rows(LONG), keys("runtime", {"token_capacity": 31, "padding_multiple": 16})),
    ),
    Bad(
        "row beyond the positions",
        DATA,
        "first.jsonl:1 has 129 tokens",
        both(rows({"prompt_ids": [5], "completion_ids": [6] * 128}), keys("runtime.token_capacity", 4096)),
    ),
    Bad("no label token", DATA, "none of the 2 rows", rows(*[{"prompt_ids": [5, 6], "completion_ids": []}] * 2)),
    Bad("only first tokens are labels", DATA, "has a label token", rows({"prompt_ids": [], "completion_ids": [5]})),
    Bad(
        "labels are cut away",
        DATA,
        "cut to max_length",
        both(
            rows({"prompt_ids": [5] * 20, "completion_ids": [6]}),
            keys("jobs.0.max_length", 20),
            keys("jobs.0.dataset.truncate", True),
        ),
    ),
    Bad("prompt is a number", DATA, "first.jsonl:1: prompt is not text", rows({"prompt": 1, "completion": "x"})),
    Bad("text with half a character", DATA, "first.jsonl:1: text is not text", rows('{"text": "\\ud800"}')),
    Bad("instruction is a list", DATA, "instruction is not text", rows({"instruction": [], "output": "x"})),
    Bad("messages is text", DATA, "not a list of turns", rows({"messages": "hi"})),
    Bad("turn without role", DATA, "not a list of turns", rows({"messages": [{"content": "hi"}]})),
    Bad("turn of tool calls alone", DATA, "knows nothing of tool_calls", rows(tool_calls(""))),
    Bad("turn of tool calls and white space", DATA, "knows nothing of tool_calls", rows(tool_calls(" \n"))),
    Bad("turn of tool calls and null", DATA, "knows nothing of tool_calls", rows(tool_calls(None))),
    Bad("no assistant turn", DATA, "assistant turns", rows({"messages": CHAT["messages"][:1]})),
    Bad(
        "no tokenizer",
        DATA,
        "tokenizer.json",
        both(rows({"text": "hi"}), removed("base/tokenizer.json"), removed("base/tokenizer_config.json")),
    ),
    Bad("tokenizer is broken", DATA, "tokenizer.json", both(rows({"text": "hi"}), truncated("base/tokenizer.json"))),
    Bad(
        "no chat template",
        "jobs[0].dataset.chat_template",
        "no chat template",
        both(rows(CHAT), removed("base/chat_template.jinja")),
    ),
    Bad(
        "chat template is missing",
        "jobs[0].dataset.chat_template",
        "cannot be read",
        both(rows(CHAT), keys("jobs.0.dataset.chat_template", "no.jinja")),
    ),
    Bad(
        "chat template is broken",
        "jobs[0].dataset.chat_template",
        "Jinja",
        both(rows(CHAT), keys("jobs.0.dataset.chat_template", "{% if %}")),
    ),
    Bad(
        "chat template refuses",
        DATA,
        "roles must alternate",
        both(rows(CHAT), keys("jobs.0.dataset.chat_template", "{{ raise_exception('roles must alternate') }}")),
    ),
    Bad(
        "chat template breaks out",
        DATA,
        "does not take",
        both(rows(CHAT), keys("jobs.0.dataset.chat_template", "{{ ''.__class__.__mro__ }}")),
    ),
    Bad(
        "chat template rewrites",
        DATA,
        "{% generation %}",
        both(rows(TWO_TURNS), keys("jobs.0.dataset.chat_template", REWRITES)),
    ),
    Bad(
        "validation is missing",
        "jobs[1].eval.path",
        "cannot be read",
        keys("jobs.1.eval", {"path": "none.jsonl", "interval": 1}),
    ),
)

BAD_INPUTS = RUN_FILE + LAYOUT + FOLDERS + ROWS
