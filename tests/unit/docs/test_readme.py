"""The README's run file loads, its commands and links exist."""

import re
from pathlib import Path

from lorafusion_megatron.cli.main import COMMANDS
from lorafusion_megatron.config import load_run

ROOT = Path(__file__).parents[3]
PAGE = (ROOT / "README.md").read_text()


def test_the_run_file_loads(tmp_path):
    (block,) = re.findall(r"```yaml\n(.*?)```", PAGE, re.DOTALL)
    (tmp_path / "run.yaml").write_text(block)
    run = load_run(tmp_path / "run.yaml", [])
    assert [job.name for job in run.jobs] == ["summaries", "grammar"]
    assert run.jobs[0].peft.lora_dropout == 0.05


def test_the_commands_exist():
    named = set(re.findall(r"lorafusion-megatron (\w+)", PAGE))
    assert {"validate", "plan"} <= named <= set(COMMANDS)


def test_the_links_lead_somewhere():
    links = [link for link in re.findall(r"\]\(([^)]+)\)", PAGE) if not link.startswith("http")]
    assert len(links) >= 5
    assert [link for link in links if not (ROOT / link).is_file()] == []


def test_make_has_the_two_commands_at_the_top():
    makefile = (ROOT / "Makefile").read_text()
    for target in re.findall(r"^    make (\w+)", PAGE, re.MULTILINE):
        assert f"\n{target}: " in makefile
    assert PAGE.index("make demo") < PAGE.index("make test") < 600
