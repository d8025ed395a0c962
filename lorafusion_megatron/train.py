"""``torchrun … -m lorafusion_megatron.train RUN.yaml [key=value …]``: the same as ``lorafusion-megatron train``."""

import sys

from lorafusion_megatron.cli.main import main

if __name__ == "__main__":
    sys.exit(main(["train", *sys.argv[1:]]))
