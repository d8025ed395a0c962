"""Feed generated run files and data files to the loaders; a traceback other than a one-line refusal is a fault.

    python scripts/fuzz_inputs.py [--cases 10000]

Takes about a minute per 10,000 cases; half of them go to the run-file loader, half to the row reader.
"""

import argparse
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from tests.unit.fuzzing import fuzz_rows, fuzz_run_files


def main() -> None:
    """Run both halves and print how many cases were loaded and refused."""
    parser = argparse.ArgumentParser(description="Fuzz the run-file loader and the row reader.")
    parser.add_argument("--cases", type=int, default=10_000, help="cases over both (default 10000)")
    cases = parser.parse_args().cases
    for name, fuzz in (("run files", fuzz_run_files), ("data files", fuzz_rows)):
        outcomes: Counter[str] = Counter()
        started = time.monotonic()
        with tempfile.TemporaryDirectory() as folder:
            fuzz(Path(folder), cases // 2, count=lambda outcome, outcomes=outcomes: outcomes.update([outcome]))
        print(f"{name}: {outcomes.total()} cases, {dict(outcomes)}, {time.monotonic() - started:.0f} s, no fault")


if __name__ == "__main__":
    main()
