"""The direction of imports between the package's folders, the size of its files, and what starts without torch."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "lorafusion_megatron"

BELOW = {
    "types": set(),
    "errors": set(),
    "config": {"types", "errors"},
    "scheduler": {"types", "errors"},
    "data": {"types", "errors"},
    "models": {"types", "errors"},
    "kernels": set(),
    "lora": {"kernels", "types", "errors"},
    "mcore": {"lora", "kernels", "types", "errors"},
    "training": {"config", "scheduler", "data", "models", "mcore", "lora", "kernels", "types", "errors"},
}
"""Folder or module -> those of ours that it may import. An integration may import all of them; so may cli."""
BELOW["integrations"] = BELOW["training"] | {"training"}
BELOW["cli"] = BELOW["integrations"] | {"integrations"}
BELOW["train"] = {"cli"}

MEGATRON_MAY = {"mcore", "integrations"}
NO_TORCH = ["config", "scheduler", "data", "models/config.py", "models/projections.py", "types.py", "errors.py"]
MAX_LINES = 500


def _files() -> list[Path]:
    return sorted(path for path in PACKAGE.rglob("*.py") if path.parent != PACKAGE or path.stem != "__init__")


def _layer(module: str) -> str:
    return module.split(".")[1] if "." in module else ""


def _imports(path: Path) -> Iterator[tuple[int, str]]:
    """(line, absolute module) of every import in a file, those inside functions too; a name imported from a package
    counts as a module of it where it is one."""
    package = path.relative_to(ROOT).with_suffix("").parts[:-1]
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = list(package[: len(package) - node.level + 1]) if node.level else []
            module = ".".join([*base, *([node.module] if node.module else [])])
            for alias in node.names:
                inner = ROOT.joinpath(*module.split("."), alias.name)
                is_module = inner.with_suffix(".py").is_file() or inner.is_dir()
                yield node.lineno, f"{module}.{alias.name}" if is_module else module


def _wrong_direction(path: Path) -> list[str]:
    layer = _layer(".".join(path.relative_to(ROOT).with_suffix("").parts))
    found = []
    for line, module in _imports(path):
        other = _layer(module) if module.startswith("lorafusion_megatron.") else ""
        if other and other != layer and other not in BELOW[layer]:
            found.append(f"{path.relative_to(ROOT)}:{line}: {layer} imports {module}")
    return found


def test_layers_import_only_what_lies_below_them():
    assert [fault for path in _files() for fault in _wrong_direction(path)] == []


def test_an_import_of_a_sibling_is_found(monkeypatch):
    file = PACKAGE / "scheduler" / "probe_of_the_test.py"
    monkeypatch.setattr(Path, "read_text", lambda self: "def f():\n    from ..data import order\n")
    assert _wrong_direction(file) == [
        "lorafusion_megatron/scheduler/probe_of_the_test.py:2: scheduler imports lorafusion_megatron.data.order"
    ]


def test_every_folder_has_a_place_in_the_layers():
    folders = {path.name for path in PACKAGE.iterdir() if path.is_dir() and any(path.glob("*.py"))}
    modules = {path.stem for path in PACKAGE.glob("*.py")} - {"__init__", "__main__"}
    assert folders | modules <= set(BELOW)


def test_only_mcore_and_integrations_import_megatron():
    found = [
        f"{path.relative_to(ROOT)}:{line}"
        for path in _files()
        for line, module in _imports(path)
        if module.split(".")[0] == "megatron" and path.relative_to(PACKAGE).parts[0] not in MEGATRON_MAY
    ]
    assert found == []


def test_kernels_know_torch_and_triton_only():
    allowed = set(sys.stdlib_module_names) | {"torch", "triton", "lorafusion_megatron"}
    found = [
        f"{path.relative_to(ROOT)}:{line}: {module}"
        for path in sorted((PACKAGE / "kernels").rglob("*.py"))
        for line, module in _imports(path)
        if module.split(".")[0] not in allowed
    ]
    assert found == []


def test_files_are_short_enough_to_read():
    lengths = {str(path.relative_to(ROOT)): len(path.read_text().splitlines()) for path in _files()}
    assert {name: length for name, length in lengths.items() if length > MAX_LINES} == {}


def test_planning_checking_and_the_command_line_start_without_torch():
    modules = []
    for entry in [*NO_TORCH, "cli/main.py", "cli/validate.py", "cli/plan.py", "training/checks.py"]:
        path = PACKAGE / entry
        files = sorted(path.rglob("*.py")) if path.is_dir() else [path]
        modules += [".".join(file.relative_to(ROOT).with_suffix("").parts) for file in files if file.is_file()]
    script = (
        "import importlib, sys\n"
        f"for name in {modules!r}:\n"
        "    importlib.import_module(name.removesuffix('.__init__'))\n"
        "    for heavy in ('torch', 'megatron', 'transformers'):\n"
        "        assert heavy not in sys.modules, f'{name} imports {heavy}'\n"
    )
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert len(modules) > 25
