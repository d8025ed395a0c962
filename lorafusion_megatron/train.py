"""``torchrun … -m lorafusion_megatron.train RUN.yaml [key=value …]``: the same as ``lorafusion-megatron train``."""

import signal
import sys

from lorafusion_megatron.cli.main import main

if __name__ == "__main__":
    status = main(["train", *sys.argv[1:]])
    # All is said and saved; a signal while the interpreter ends would only hide the exit status (SLURM would start a
    # run again that is done).
    for number in (signal.SIGTERM, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)
    sys.exit(status)
