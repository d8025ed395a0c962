"""Writes the files that are made from the package's own code: batch scripts and reference pages.

python scripts/generate.py            # write what has changed
python scripts/generate.py --check    # write nothing; exit status 1 where a file is not current
"""

import argparse
import sys
from collections.abc import Callable, Mapping
from pathlib import Path

from lorafusion_megatron.cli.slurm import SlurmJob, script
from scripts.reference_pages import commands_page, run_file_page

ROOT = Path(__file__).resolve().parent.parent


def batch_script(launcher: str) -> str:
    """A batch script for two nodes of eight GPUs that takes the run file as its argument."""
    job = SlurmJob(
        nodes=2,
        processes_per_node=8,
        gpus_per_node=8,
        cpus_per_process=4,
        launcher=launcher,
        time="24:00:00",
        warn_seconds=180,
    )
    return script(job)


GENERATED: Mapping[str, Callable[[], str]] = {
    "scripts/slurm/train.sbatch": lambda: batch_script("torchrun"),
    "scripts/slurm/train_srun.sbatch": lambda: batch_script("srun"),
    "docs/reference/run_file.md": run_file_page,
    "docs/reference/commands.md": commands_page,
}
"""Path from the root -> its content."""


def stale() -> list[str]:
    """Paths of files that are missing or not what the code says."""
    return [
        path
        for path, content in GENERATED.items()
        if not (ROOT / path).is_file() or (ROOT / path).read_text() != content()
    ]


def main() -> int:
    """Write, or check; the exit status."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--check", action="store_true", help="write nothing")
    check = parser.parse_args().check
    found = stale()
    for path in found:
        print(path)
        if not check:
            (ROOT / path).write_text(GENERATED[path]())
    return int(check and bool(found))


if __name__ == "__main__":
    sys.exit(main())
