"""Plans 10 million samples of 1,000 jobs for 16 stages and 64 replicas, window by window, in bounded memory.

    python scripts/bench/planner_scale.py                      # the whole, under an hour
    python scripts/bench/planner_scale.py --samples 200000     # a part of it

Prints samples planned, time per sample and peak memory after each window. Nothing of earlier windows is kept.
"""

import argparse
import resource
import time
from collections.abc import Iterator

import numpy as np
from planner_workloads import LOGNORMAL, draw_lengths, make_batch

from lorafusion_megatron.scheduler.build import PlanOptions, build_schedule
from lorafusion_megatron.types import GlobalBatch


def stream_windows(samples: int, jobs: int, batch: int, window: int) -> Iterator[list[list[GlobalBatch]]]:
    """Windows of about ``window`` samples: the next step of some of the jobs in turn, drawn as they are needed."""
    rng = np.random.default_rng(0)
    names = list(LOGNORMAL)
    step, planned = 1, 0
    while planned < samples:
        for first in range(0, jobs, max(1, window // batch)):
            part = range(first, min(jobs, first + max(1, window // batch)))
            yield [[make_batch(job, step, draw_lengths(rng, names[job % 3], batch))] for job in part]
            planned += batch * len(part)
            if planned >= samples:
                return
        step += 1


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--samples", type=int, default=10_000_000)
    parser.add_argument("--jobs", type=int, default=1000)
    parser.add_argument("--batch", type=int, default=256)
    parser.add_argument("--window", type=int, default=65_536, help="samples of a window")
    parser.add_argument("--stages", type=int, default=16)
    parser.add_argument("--replicas", type=int, default=64)
    args = parser.parse_args()
    options = PlanOptions(token_capacity=8192, padding_multiple=64, stages=args.stages, replicas=args.replicas)
    done, busy = 0, 0.0
    for index, batches in enumerate(stream_windows(args.samples, args.jobs, args.batch, args.window)):
        started = time.process_time()
        schedule = build_schedule(batches, options)
        busy += time.process_time() - started
        done += sum(len(batch.samples) for job in batches for batch in job)
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
        print(
            f"window {index}: {schedule.num_microbatches} positions; {done} samples, {1e6 * busy / done:.0f} us each, "
            f"peak {peak:.2f} GiB",
            flush=True,
        )


if __name__ == "__main__":
    main()
