"""Kills a run again and again and holds what is left against an undisturbed one, bit for bit.

    python -m scripts.fault_campaign [--kills 50] [--seed 0] [--topology PP2|TP2|DP2] [--folder DIR]

One run of three jobs with dropout is started over and over; each time a random rank gets SIGKILL at a random moment,
and every third time inside the writing of a checkpoint or an adapter, after half of the file. In the end it is left
alone. Its adapters, losses and metrics must be those of a run that nobody touched: no step twice, none missing.
CPU only; the numbers are deterministic there. About 5 s a kill on two cores.
"""

import argparse
import json
import os
import random
import signal
import tempfile
import time
from pathlib import Path

from tests import launch, tiny

TOPOLOGIES = {
    "PP2": ["model.pipeline_model_parallel_size=2"],
    "TP2": ["model.tensor_model_parallel_size=2", "model.sequence_parallel=true"],
    "DP2": [],
}
STEPS = {"a": 150, "b": 120, "c": 150}


def main() -> int:
    """Run the campaign; 0 where every bit is the same."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--topology", choices=TOPOLOGIES, default="PP2")
    parser.add_argument("--folder", type=Path)
    args = parser.parse_args()
    folder = args.folder or Path(tempfile.mkdtemp(prefix="fault_campaign."))
    run_file = write_run(folder)
    words = [str(run_file), *TOPOLOGIES[args.topology], "checkpoint.save_interval=4"]
    wanted, out = folder / "wanted", folder / "out"
    launch.train(*words, f"checkpoint.save={wanted}", world=2, timeout=600.0)
    rng = random.Random(args.seed)
    words.append(f"checkpoint.save={out}")
    done = 0
    for kill in range(args.kills):
        how, lines = disturb(words, folder, out, rng, inside_write=kill % 3 == 2)
        print(f"kill {kill + 1}/{args.kills}: {how}, {lines} steps in the metrics", flush=True)
        done = max(done, lines)
        if lines >= sum(STEPS.values()):
            break
    finished = launch.train(*words, world=2, timeout=600.0)
    print(next((line for line in finished.outputs[0].splitlines() if "resuming" in line), "nothing to resume"))
    return report(out, wanted)


def write_run(folder: Path) -> Path:
    """The run file, its model and its data."""
    tiny.write_base(folder / "base")
    jobs = [
        tiny.job(folder, "a", steps=STEPS["a"], batch=4, seed=1, lora_dropout=0.1),
        tiny.job(folder, "b", steps=STEPS["b"], batch=2, r=8, seed=2, target_modules=["q_proj", "v_proj"]),
        tiny.job(folder, "c", steps=STEPS["c"], batch=3, r=2, seed=3, lora_dropout=0.2),
    ]
    return tiny.write_run(folder, jobs, max_window_microbatches=64)


def disturb(words: list[str], folder: Path, out: Path, rng: random.Random, *, inside_write: bool) -> tuple[str, int]:
    """Start the run, kill one rank, wait for the end of the other; (what was done, steps in the metrics)."""
    before = count(out)
    if inside_write:
        target, arguments = train_until_half_a_file, (words, rng.randrange(1, 12))
    else:
        target, arguments = launch.command, (["train", *words],)
    ranks = launch.Ranks(target, arguments, world=2, folder=folder / "logs")
    how = "rank 0 inside a write"
    if not inside_write:
        rank = rng.randrange(2)
        deadline = time.monotonic() + 60.0
        goal = before + rng.randrange(0, 12)
        while count(out) < goal and time.monotonic() < deadline and ranks.processes[0].is_alive():
            time.sleep(0.002)
        time.sleep(rng.uniform(0.0, 0.05))
        if ranks.processes[rank].is_alive():
            os.kill(ranks.processes[rank].pid, signal.SIGKILL)
        how = f"rank {rank} after {count(out) - before} more steps"
    ranks.wait(120.0)
    return how, count(out)


def train_until_half_a_file(words: list[str], which: int) -> int:
    """Train until the ``which``-th file of tensors is half written, then die as by SIGKILL."""
    import lorafusion_megatron.models.adapter as adapter
    import lorafusion_megatron.training.state as state

    left = [which]
    for module in (adapter, state):
        save = module.save_file

        def dying(tensors, path, *args, save=save, **kwargs):
            save(tensors, path, *args, **kwargs)
            left[0] -= 1
            if left[0] == 0:
                content = Path(path).read_bytes()
                Path(path).write_bytes(content[: len(content) // 2])
                os.kill(os.getpid(), signal.SIGKILL)

        module.save_file = dying
    return launch.command(["train", *words])


def count(out: Path) -> int:
    """Lines of the metrics so far."""
    metrics = out / "metrics.jsonl"
    return len(metrics.read_bytes().splitlines()) if metrics.exists() else 0


def report(out: Path, wanted: Path) -> int:
    """Compare and print; 0 where all is equal."""
    wrong = 0
    steps: dict[str, list[int]] = {}
    for line in (out / "metrics.jsonl").read_text().splitlines():
        value = json.loads(line)
        steps.setdefault(value["job"], []).append(value["step"])
    for name, total in STEPS.items():
        same = tiny.same_bits(tiny.adapter(out, name), tiny.adapter(wanted, name))
        losses = tiny.losses(out, name) == tiny.losses(wanted, name)
        once = steps.get(name) == list(range(1, total + 1))
        wrong += not (same and losses and once)
        print(f"{name}: adapter {'same bits' if same else 'DIFFERS'}, losses {'same' if losses else 'DIFFER'}, "
              f"steps {'each once' if once else 'NOT each once'}")  # fmt: skip
    print("every bit is the same" if not wrong else f"{wrong} jobs differ")
    return 1 if wrong else 0


if __name__ == "__main__":
    raise SystemExit(main())
