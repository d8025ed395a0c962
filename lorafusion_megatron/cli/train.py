"""``train``: run the jobs of a run file, on the ranks that torchrun started or on this process alone."""

import argparse
import os


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of the command."""
    parser.add_argument("run_file", metavar="RUN.yaml", help="the run file")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="override a key of the run file")


def run(args: argparse.Namespace) -> int:
    """Train; 0 when every job ended."""
    from ..config import load_run
    from ..training.run import train_run

    os.environ.setdefault("OMP_NUM_THREADS", "1")
    return train_run(load_run(args.run_file, args.overrides))
