"""Judge the demo's adapters with Transformers and PEFT alone: nothing here knows the program that trained them.

    python scripts/demo/evaluate.py BASE_DIR RUN_DIR [--json FILE]

Prints the held-out loss of the base model and of each adapter on each job's data, and one answer per job before and
after. Exit status 1 where an adapter is not the best on its own job, or less than 25 % under the base model there.
"""

import argparse
import json
import sys
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from rich.text import Text
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils.logging import disable_progress_bar

JOBS = ("pirate", "orders", "telegram")
DATA = Path(__file__).parent / "data"
LEAST_GAIN = 0.25
BASE = "base model"

Messages = list[dict[str, str]]


def read_held_out(job: str) -> list[Messages]:
    """The conversations of a job that were never trained on."""
    lines = (DATA / f"{job}.held_out.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line)["messages"] for line in lines]


def prompt_ids(tokenizer: PreTrainedTokenizerBase, messages: Messages) -> list[int]:
    """Tokens up to the place where the assistant answers."""
    text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    return tokenizer(text, add_special_tokens=False)["input_ids"]


def encode(tokenizer: PreTrainedTokenizerBase, messages: Messages) -> tuple[list[int], int]:
    """Tokens of a conversation and the index of its first answer token; the end-of-turn token is the last."""
    prompt = prompt_ids(tokenizer, messages[:-1])
    answer = tokenizer(messages[-1]["content"], add_special_tokens=False)["input_ids"]
    return [*prompt, *answer, tokenizer.eos_token_id], len(prompt)


@torch.inference_mode()
def held_out_loss(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, rows: list[Messages]) -> float:
    """Cross-entropy per answer token over all rows together.

    Rows go through in one right-padded batch: under causal attention the padding behind a row does not reach it.
    """
    encoded = [encode(tokenizer, row) for row in rows]
    width = max(len(ids) for ids, _ in encoded)
    batch = torch.full((len(rows), width), tokenizer.pad_token_id)
    labels = torch.full((len(rows), width), -100)
    for row, (ids, first) in enumerate(encoded):
        batch[row, : len(ids)] = torch.tensor(ids)
        labels[row, first : len(ids)] = batch[row, first : len(ids)]
    logits = model(input_ids=batch).logits[:, :-1].float()
    return torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels[:, 1:].flatten()).item()


@torch.inference_mode()
def answer(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, messages: Messages) -> str:
    """The likeliest answer, cut at 48 tokens."""
    ids = torch.tensor([prompt_ids(tokenizer, messages[:-1])])
    out = model.generate(
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=48,
        do_sample=False,
        pad_token_id=tokenizer.pad_token_id,
    )
    return tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True).strip()


def measure(base_dir: Path, run_dir: Path, console: Console) -> dict[str, Any]:
    """Losses by (row, job), and per job a question with the answers before and after."""
    tokenizer = AutoTokenizer.from_pretrained(base_dir)
    held_out = {job: read_held_out(job) for job in JOBS}
    losses: dict[str, dict[str, float]] = {}
    answers: dict[str, dict[str, str]] = {
        job: {"question": rows[0][0]["content"], "expected": rows[0][1]["content"]} for job, rows in held_out.items()
    }
    with Progress(console=console, transient=True) as progress:
        task = progress.add_task("loading", total=len(JOBS) * (len(JOBS) + 1) + 2 * len(JOBS))
        base = AutoModelForCausalLM.from_pretrained(base_dir, dtype=torch.float32)
        model = PeftModel.from_pretrained(base, run_dir / JOBS[0], adapter_name=JOBS[0])
        for job in JOBS[1:]:
            model.load_adapter(run_dir / job, adapter_name=job)
        model.eval()
        for name in (BASE, *JOBS):
            losses[name] = {}
            if name != BASE:
                model.set_adapter(name)
            with model.disable_adapter() if name == BASE else nullcontext():
                for job in JOBS:
                    progress.update(task, description=f"{name} on {job}")
                    losses[name][job] = held_out_loss(model, tokenizer, held_out[job])
                    progress.advance(task)
                    if name in (BASE, job):
                        text = answer(model, tokenizer, held_out[job][0])
                        answers[job]["before" if name == BASE else "after"] = text
                        progress.advance(task)
    return {"losses": losses, "answers": answers}


def judge(losses: dict[str, dict[str, float]]) -> dict[str, dict[str, Any]]:
    """Per job: how far its adapter is under the base model, and whether it is the best one there."""
    return {
        job: {
            "gain": 1 - losses[job][job] / losses[BASE][job],
            "best": losses[job][job] == min(row[job] for row in losses.values()),
        }
        for job in JOBS
    }


def show(console: Console, result: dict[str, Any]) -> None:
    """Print both tables and the verdict."""
    matrix = Table(title="Held-out loss per answer token (lower is better)")
    matrix.add_column("adapter \\ data")
    for job in JOBS:
        matrix.add_column(job, justify="right")
    for name, row in result["losses"].items():
        cells = [Text(f"{row[job]:.3f}", style="bold green" if name == job else "") for job in JOBS]
        matrix.add_row(name, *cells, end_section=name == BASE)
    console.print(matrix)
    for job, texts in result["answers"].items():
        table = Table(title=f"{job}: {texts['question']}", show_header=False, min_width=60, title_justify="left")
        table.add_row("before", Text(texts["before"]))
        table.add_row("after", Text(texts["after"], style="green"))
        console.print(table)
    for job, verdict in result["verdict"].items():
        good = verdict["best"] and verdict["gain"] >= LEAST_GAIN
        text = (
            f"{job}: {verdict['gain']:.0%} under the base model, {'' if verdict['best'] else 'not '}the best on its job"
        )
        console.print(text, style="green" if good else "bold red", highlight=False)


def main() -> int:
    """Evaluate, print, and write the JSON file; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("base", type=Path, metavar="BASE_DIR", help="base model, a Hugging Face directory")
    parser.add_argument("run", type=Path, metavar="RUN_DIR", help="folder of the run, with one adapter per job")
    parser.add_argument("--json", type=Path, metavar="FILE", help="where to write all figures")
    args = parser.parse_args()
    disable_progress_bar()
    console = Console()
    result = measure(args.base, args.run, console)
    result["verdict"] = judge(result["losses"])
    show(console, result)
    if args.json:
        args.json.write_text(json.dumps(result, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    good = all(verdict["best"] and verdict["gain"] >= LEAST_GAIN for verdict in result["verdict"].values())
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
