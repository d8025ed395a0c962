"""``lorafusion-megatron merge``: an adapter merged into its base model."""

import argparse


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's arguments."""
    parser.add_argument("--base", required=True, metavar="DIR", help="base model, a Hugging Face directory")
    parser.add_argument("--adapter", required=True, metavar="DIR", help="adapter, a folder in PEFT's format")
    parser.add_argument("--output", required=True, metavar="DIR", help="directory to write, new or empty")


def run(args: argparse.Namespace) -> int:
    """Merge and say where the model is; returns the exit status.

    Raises:
        UserError: see `models.merge.merge_adapter`.
    """
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn

    from lorafusion_megatron.config.rules import printable
    from lorafusion_megatron.models.merge import merge_adapter

    columns = (TextColumn("merging"), BarColumn(), DownloadColumn(), TimeRemainingColumn())
    console = Console(stderr=True)
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
        task = progress.add_task("merging", total=None)
        other = merge_adapter(
            args.base,
            args.adapter,
            args.output,
            progress=lambda written, total: progress.update(task, completed=written, total=total),
        )
    print(f"merged model: {printable(args.output)}")
    if other:
        print(f"note: the adapter names {other!r} as its base model, and was merged into {printable(args.base)}")
    return 0
