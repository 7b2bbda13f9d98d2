"""What the documentation says of published checkpoints runs as it is printed."""

import re
import shlex
from pathlib import Path

import pytest

from clipflow.cli import main
from clipflow.testing import __main__ as testing
from clipflow.testing import write_unilip_folder

ROOT = Path(__file__).resolve().parents[1]
# Page -> the title whose section is run.
TITLES = {
    "docs/checkpoints.md": "Use a published checkpoint",
    "README.md": "Use a published checkpoint",
    "docs/blip3o.md": "BLIP3-o and BLIP3o-NEXT",
}
FENCE = re.compile(r"^```(python|sh)\n(.*?)^```", re.M | re.S)
FOLDER = re.compile(r"\bUniLIP-(?:tiny|1B|3B)\b")


def sections():
    """Page -> its text below that title, up to the next title that is not below it."""
    found = {}
    for page, wanted in TITLES.items():
        inside, level, is_code = [], 0, False
        for line in (ROOT / page).read_text().splitlines(keepends=True):
            is_code ^= line.startswith("```")
            title = None if is_code else re.match(r"(#+) (.*)", line)
            if level and title and len(title[1]) <= level:
                break
            if level:
                inside.append(line)
            elif title and title[2] == wanted:
                level = len(title[1])
        if level:
            found[page] = "".join(inside)
    return found


def test_the_pages_are_there():
    assert list(sections()) == list(TITLES)


@pytest.mark.parametrize("page", sections())
def test_every_block_runs(page, tmp_path, monkeypatch, capsys):
    """In order and in one folder, as somebody would copy them; small folders stand for large."""
    text = sections()[page]
    monkeypatch.chdir(tmp_path)
    blocks = FENCE.findall(text)
    assert {kind for kind, _ in blocks} == {"python", "sh"}
    made = re.findall(r"python -m clipflow\.testing (\S+)", text)
    for name in {*FOLDER.findall(text)} - {Path(name).name for name in made}:
        write_unilip_folder(name)
    values = {}
    for kind, code in blocks:
        if kind == "python":
            exec(compile(code, page, "exec"), values)
        else:
            for line in code.splitlines():
                run_line(line, page)
    assert list(tmp_path.glob("*.png"))


def run_line(line, page):
    """A command of clipflow, in this process."""
    words = shlex.split(line, comments=True)
    if not words or words[0] in ("pip", "git", "huggingface-cli", "hf", "make"):
        return
    if words[:3] == ["python", "-m", "clipflow.testing"]:
        assert testing.main([*words[3:]]) == 0, line
        return
    assert words[0] == "clipflow", f"{page}: {line}"
    assert main(words[1:]) == 0, line
