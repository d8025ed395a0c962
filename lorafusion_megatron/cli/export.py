"""``lorafusion-megatron export``: a job's adapter taken out of a run's folder."""

import argparse


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's arguments."""
    parser.add_argument("run_dir", metavar="RUN_DIR", help="folder of the run (checkpoint.save)")
    parser.add_argument("job", metavar="JOB", help="name of the job")
    parser.add_argument("--step", type=int, metavar="N", help="a kept step; without it the latest adapter")
    parser.add_argument("--output", required=True, metavar="DIR", help="folder to write in PEFT's format, new or empty")


def run(args: argparse.Namespace) -> int:
    """Export and say where the adapter is; returns the exit status.

    Raises:
        UserError: see `models.export.export_adapter`.
    """
    from lorafusion_megatron.config.rules import printable
    from lorafusion_megatron.models.export import export_adapter

    checked = export_adapter(args.run_dir, args.job, args.output, step=args.step)
    note = "" if checked else " (its base model can't be reached on this machine, so it was checked by itself alone)"
    print(f"adapter: {printable(args.output)}{note}")
    return 0
