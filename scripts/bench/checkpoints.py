"""What checkpoints cost: the same run without any, and with one every few optimizer steps.

    python -m scripts.bench.checkpoints [--ranks 2] [--layers 8] [--jobs 6] [--rank 256] [--intervals 0,8]

Each microbatch is one optimizer step of one job, so that steps come as close together as they can. Prints, for each
interval (0: none), the second of two windows in seconds, the bytes of a checkpoint, how many the run asked for, and how
long after the last window the process went on writing. With GPUs one stage runs on each; on the CPU, where a layer of
this width takes a while, give ``--hidden 64 --rank 16``.
"""

import argparse
import json
import math
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
import yaml

from tests import tiny

STEPS = 48
"""Of each job, half of them in the window that is timed."""
TOKENS = 2048
"""Of a microbatch."""
ROWS = 4


def main() -> None:
    """Write a model and data, run each interval, print a line each."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--hidden", type=int, default=2048)
    parser.add_argument("--jobs", type=int, default=6)
    parser.add_argument("--rank", type=int, default=256)
    parser.add_argument("--intervals", default="0,8")
    parser.add_argument("--folder", type=Path, help="where to; by default the one for temporary files")
    args = parser.parse_args()
    folder = Path(tempfile.mkdtemp(prefix="checkpoints.", dir=args.folder))
    try:
        run_file = write_run(folder, args)
        for interval in map(int, args.intervals.split(",")):
            print(measure(run_file, folder / f"every{interval}", args, interval), flush=True)
    finally:
        shutil.rmtree(folder)


def write_run(folder: Path, args: argparse.Namespace) -> Path:
    """The run file, its model and its data; adapters begin as PEFT's do."""
    heads = args.hidden // 64 or 1
    tiny.write_base(
        folder / "base",
        hidden_size=args.hidden,
        intermediate_size=4 * args.hidden,
        num_hidden_layers=args.layers,
        num_attention_heads=heads,
        num_key_value_heads=math.gcd(heads, 8),
        max_position_embeddings=TOKENS,
    )
    length = TOKENS // ROWS
    lengths = {"prompt": (length // 2, length // 2 + 1), "completion": (length // 2, length // 2 + 1)}
    jobs = [
        tiny.job(folder, f"job{i}", r=args.rank, rows=16, batch=ROWS, steps=STEPS, seed=i, start=False, lengths=lengths)
        for i in range(args.jobs)
    ]
    path = tiny.write_run(folder, jobs, token_capacity=TOKENS, max_window_microbatches=args.jobs * STEPS // 2)
    run = yaml.safe_load(path.read_text())
    run["runtime"]["device"] = "auto"
    run["base_model"]["dtype"] = "bfloat16" if torch.cuda.is_available() else "float32"
    run["model"] = {"pipeline_model_parallel_size": args.ranks}
    path.write_text(yaml.safe_dump(run))
    return path


def measure(run_file: Path, out: Path, args: argparse.Namespace, interval: int) -> str:
    """Run once; the line to print."""
    words = [str(run_file), f"checkpoint.save={out}", "logger.log_format=json", "checkpoint.keep=2"]
    words += [f"checkpoint.save_interval={interval}"] if interval else []
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={args.ranks}"]
    process = subprocess.Popen(
        [*launcher, "-m", "lorafusion_megatron.train", *words],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    assert process.stdout is not None
    windows, ended, text = [], 0.0, []
    for line in process.stdout:
        text.append(line)
        event = read_event(line)
        if event.get("event") == "window_done":
            windows.append(event["seconds"])
            ended = time.monotonic()
    if process.wait() or len(windows) < 2:
        raise SystemExit("".join(text[-40:]))
    after = time.monotonic() - ended
    # The last one is of the end, when no job is left.
    size = max(sum(file.stat().st_size for file in path.iterdir()) for path in (out / "state").iterdir())
    asked = STEPS // interval if interval else 0
    behind = sum("wait to be written" in line for line in text)
    shutil.rmtree(out)
    return (
        f"save_interval {interval or 'none'}: second window {windows[1]:.2f} s, {size / 1e9:.2f} GB a checkpoint, "
        f"{asked} asked for, told {behind} times that the disk is behind, {after:.1f} s from the last window to the end"
    )


def read_event(line: str) -> dict[str, Any]:
    """A line of the log as JSON; empty where it is another program's."""
    try:
        value = json.loads(line)
    except ValueError:
        return {}
    return value if isinstance(value, dict) else {}


if __name__ == "__main__":
    main()
