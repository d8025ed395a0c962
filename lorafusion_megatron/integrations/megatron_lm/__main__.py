"""``python -m lorafusion_megatron.integrations.megatron_lm RUN.yaml [key=value …]``: Megatron's options for it."""

import argparse
import shlex
import sys

from ...config import load_run
from ...errors import UserError
from ...models.config import read_model_spec
from .model_options import command_line


def main() -> int:
    """Print the options in one line, to be pasted or substituted."""
    parser = argparse.ArgumentParser(
        prog="python -m lorafusion_megatron.integrations.megatron_lm",
        description="Print the options that a Megatron-LM script needs to build the base model of a run file.",
    )
    parser.add_argument("run_file", metavar="RUN.yaml")
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    given = parser.parse_args()
    try:
        run = load_run(given.run_file, given.overrides)
        print(shlex.join(command_line(read_model_spec(run.base_model.path), run)))
    except UserError as error:
        print(f"lorafusion-megatron: error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
