"""The documentation: every command is known, quoted messages exist, generated pages are current, the site builds."""

import argparse
import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from lorafusion_megatron.cli.main import COMMANDS, build_parser
from scripts import generate

ROOT = Path(__file__).parents[3]
DOCS = ROOT / "docs"
PAGES = sorted(DOCS.rglob("*.md"))
PROGRAMS = ("lorafusion-megatron", "torchrun", "sbatch", "srun", "python", "pip", "make", "hf", "vllm", "scripts/")
MARKER = re.compile(r"<!-- (run|gpu|setup|by hand|test)(?:: (.+?))? -->")


@dataclass(frozen=True, kw_only=True)
class Block:
    """A block of commands or Python."""

    page: str
    line: int
    language: str
    marker: str
    detail: str
    text: str

    @property
    def commands(self) -> list[str]:
        """The commands of a console block; a backslash at a line's end joins the next one."""
        joined = re.sub(r"\\\n\s*", "", self.text)
        return [line.removeprefix("$ ") for line in joined.splitlines() if line.startswith("$ ")]


def blocks(path: Path) -> Iterator[Block]:
    """The console, shell and Python blocks of a page; a marker stands on the line above one."""
    lines = path.read_text().splitlines()
    start: int | None = None
    for number, line in enumerate(lines):
        if not line.strip().startswith("```"):
            continue
        if start is None:
            start = number
            continue
        language = lines[start].strip().removeprefix("```").strip()
        found = MARKER.fullmatch(lines[start - 1].strip()) if start else None
        if language in ("console", "bash", "sh", "shell", "python"):
            yield Block(
                page=str(path.relative_to(DOCS)),
                line=start + 1,
                language=language,
                marker=found[1] if found else "",
                detail=(found[2] or "") if found else "",
                text="\n".join(line.strip() for line in lines[start + 1 : number])
                if language != "python"
                else "\n".join(lines[start + 1 : number]),
            )
        start = None


ALL = [block for page in PAGES for block in blocks(page)]


def test_every_block_of_commands_says_how_it_is_tried() -> None:
    """Run by a test of the pages, held by a test that is named, for GPUs, or for a person with a reason."""
    assert len(ALL) > 12
    unknown = [f"{block.page}:{block.line}" for block in ALL if not block.marker]
    assert unknown == [], "put <!-- run -->, <!-- gpu --> or <!-- test: path::name --> on the line above"
    assert [f"{b.page}:{b.line}" for b in ALL if b.marker == "by hand" and not b.detail] == []
    for block in ALL:
        if block.language != "python":
            assert block.language == "console", f"{block.page}:{block.line}: use console and '$ command'"
            assert block.commands, f"{block.page}:{block.line}"
            assert all(command.startswith(PROGRAMS) for command in block.commands), block.text


def test_named_tests_exist() -> None:
    for block in ALL:
        if block.marker == "test":
            path, _, name = block.detail.partition("::")
            assert f"def {name}(" in (ROOT / path).read_text(), f"{block.page}:{block.line}: {block.detail}"


def options(parser: argparse.ArgumentParser) -> Iterator[str]:
    """Every option of a parser and of the commands within it."""
    for action in parser._actions:
        yield from action.option_strings
        if isinstance(action, argparse._SubParsersAction):
            for inner in action.choices.values():
                yield from options(inner)


def test_commands_and_options_that_pages_mention_exist() -> None:
    mentioned = [
        (page.name, match[1], match[2])
        for page in PAGES
        for match in re.finditer(r"lorafusion-megatron ([a-z]+)\b([^`\n]*)", page.read_text())
    ]
    assert len(mentioned) > 15
    for page, command, rest in mentioned:
        assert command in COMMANDS, f"{page}: {command}"
        known = set(options(build_parser(command)))
        assert [word for word in re.findall(r"--[a-z][a-z-]+", rest) if word not in known] == [], f"{page}: {command}"


def test_quoted_messages_are_those_of_the_program() -> None:
    said = " ".join(
        " ".join(
            part.value for part in ast.walk(node) if isinstance(part, ast.Constant) and isinstance(part.value, str)
        )
        for path in (ROOT / "lorafusion_megatron").rglob("*.py")
        for node in ast.parse(path.read_text()).body
    )
    said = " ".join((said + (ROOT / "scripts/slurm/train.sbatch").read_text()).split())
    titles = re.findall(r"^### (.*)$", (DOCS / "troubleshooting.md").read_text(), re.MULTILINE)
    assert len(titles) > 20
    for title in titles:
        if "(torchrun)" in title or "CUDA out of memory" in title:
            continue
        for quoted in re.findall(r"`([^`]+)`", title):
            for piece in filter(None, (piece.strip(" ,;=…") for piece in quoted.split("…"))):
                assert piece in said, f"nothing says {piece!r}"


def test_generated_pages_are_current() -> None:
    assert generate.stale() == [], "run: python -m scripts.generate"


@pytest.mark.timeout(120)
def test_the_site_builds_without_a_warning(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path / "site")],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert (tmp_path / "site" / "reference" / "run_file.html").stat().st_size > 10_000
