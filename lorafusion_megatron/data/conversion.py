"""A tokenizer as Transformers loads it, in the form of the `tokenizers` library.

    python -m lorafusion_megatron.data.conversion FOLDER [--trust-remote-code]

prints it as one line of JSON.
"""

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

TIMEOUT_SECONDS = 300


def convert(folder: Path, *, trust_remote_code: bool) -> dict[str, Any]:
    """What `transformers.AutoTokenizer` makes of a folder; imports torch.

    Args:
        folder: the model folder.
        trust_remote_code: whether Python code in the folder may run.

    Returns:
        ``tokenizer``: the JSON text of a `tokenizers.Tokenizer`; ``special_tokens``: name -> text.

    Raises:
        ValueError: Transformers can't load it, or it has no fast form.
    """
    try:
        from transformers import AutoTokenizer

        loaded = AutoTokenizer.from_pretrained(str(folder), trust_remote_code=trust_remote_code, local_files_only=True)
        names = loaded.special_tokens_map
    except Exception as error:  # whatever a folder makes Transformers raise: OSError, ValueError, ImportError, …
        raise ValueError(str(error).strip().split("\n")[0][:160]) from None
    backend = getattr(loaded, "backend_tokenizer", None)
    if backend is None:
        raise ValueError(f"{type(loaded).__name__} has no fast form")
    return {
        "tokenizer": backend.to_str(),
        "special_tokens": {name: text for name, text in names.items() if isinstance(text, str)},
    }


def same_imports() -> dict[str, str]:
    """Environment in which a process started with ``-P`` imports from where this one does."""
    return os.environ | {"PYTHONPATH": os.pathsep.join(os.path.abspath(path) for path in sys.path)}


def convert_apart(folder: Path, *, trust_remote_code: bool) -> dict[str, Any]:
    """`convert`, in a process of its own where this one has not imported torch yet.

    Raises:
        ValueError: as `convert`.

    Note: commands that promise to start without torch keep their promise; the other process takes 5 to 10 s.
    """
    if "torch" in sys.modules:
        return convert(folder, trust_remote_code=trust_remote_code)
    words = [sys.executable, "-P", "-m", __name__, str(folder), *(["--trust-remote-code"] if trust_remote_code else [])]
    try:
        done = subprocess.run(
            words,
            capture_output=True,
            text=True,
            timeout=TIMEOUT_SECONDS,
            stdin=subprocess.DEVNULL,
            env=same_imports() | {"HF_HUB_OFFLINE": "1"},
        )
    except subprocess.TimeoutExpired:
        raise ValueError(f"Transformers took more than {TIMEOUT_SECONDS} s") from None
    lines = done.stdout.splitlines() or done.stderr.splitlines() or [f"exit status {done.returncode}"]
    if done.returncode:
        raise ValueError(lines[-1][:160])
    # The last line: code that the folder brings along may print too.
    converted: dict[str, Any] = json.loads(lines[-1])
    return converted


def main() -> int:
    """Convert the folder that the command line names."""
    parser = argparse.ArgumentParser(description="Print a tokenizer in the form of the tokenizers library.")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--trust-remote-code", action="store_true")
    args = parser.parse_args()
    try:
        print(json.dumps(convert(args.folder, trust_remote_code=args.trust_remote_code)))
    except ValueError as error:
        print(error)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
