"""``bench``: measure kernels, whole blocks and whole steps on this machine; a sub-command each."""

import argparse
import importlib
from importlib.util import find_spec

BENCHMARKS = {
    "linear": "one LoRA linear against the frozen one and other implementations",
    "layer": "a whole transformer block with adapters",
    "e2e": "training steps of four jobs against the ways in which others train them",
}
"""Benchmark -> what it measures; each has a module ``bench_NAME`` beside this one."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of the command: those of each benchmark under its name.

    Note: every benchmark's module is imported here, torch with them, which the command needs anyway.
    """
    kinds = parser.add_subparsers(dest="benchmark", metavar="BENCHMARK", required=True, title="benchmarks")
    for name, summary in BENCHMARKS.items():
        module = f"lorafusion_megatron.cli.bench_{name}"
        if find_spec(module) is None:
            continue
        sub = kinds.add_parser(name, help=summary, description=f"Measure {summary}.")
        found = importlib.import_module(module)
        found.add_arguments(sub)
        sub.set_defaults(run_benchmark=found.run)


def run(args: argparse.Namespace) -> int:
    """Run the chosen benchmark; 0 unless it says otherwise."""
    status: int = args.run_benchmark(args)
    return status
