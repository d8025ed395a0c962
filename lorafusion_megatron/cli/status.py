"""``status``: a table of a running or finished run, from its files alone."""

import argparse
import time
from pathlib import Path


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of the command."""
    parser.add_argument("run_dir", type=Path, metavar="RUN_DIR", help="the run's checkpoint.save folder")
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of the table")


def run(args: argparse.Namespace) -> int:
    """Print the table; 0."""
    import dataclasses

    from lorafusion_megatron.training.output import strict_json
    from lorafusion_megatron.training.status import read_status

    status = read_status(args.run_dir)
    if args.json:
        print(strict_json(dataclasses.asdict(status)))
        return 0
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    from lorafusion_megatron.training.status import sparkline

    # As text: rich would read brackets of a path or a reason as markup.
    table = Table(title=Text(f"{args.run_dir}: {status.state}", style="table.title"), title_justify="left")
    for column in ("job", "state", "step", "loss", "curve", "eta"):
        table.add_column(column, justify="right" if column in ("step", "loss", "eta") else "left")
    for job in status.jobs:
        eta = job.eta_seconds() if status.state == "running" else None
        table.add_row(
            Text(job.name),
            Text(f"{job.status}: {job.reason}" if job.reason else job.status),
            f"{job.step}/{job.num_steps}",
            f"{job.losses[-1]:.4f}" if job.losses else "",
            sparkline(job.losses),
            "" if eta is None else _duration(eta),
        )
    console = Console()
    console.print(table)
    console.print(Text(f"last checkpoint: {status.last_checkpoint or 'none'}"))
    if status.bubble_share is not None:
        console.print(f"bubble share of the last window: {status.bubble_share:.1%}", highlight=False)
    console.print(f"last sign of life: {_duration(time.time() - status.updated)} ago", highlight=False)
    return 0


def _duration(seconds: float) -> str:
    minutes, rest = divmod(int(max(0.0, seconds)), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"
