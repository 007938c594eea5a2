"""The README says only what is there."""

import os
import re
import runpy
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
COMMANDS = [line.split(" #")[0].strip() for block in re.findall(r"```bash\n(.*?)```", README, re.S) for line in block.splitlines()]


@pytest.mark.parametrize("target", sorted(set(re.findall(r"\]\(([^)]+)\)", README))))
def test_every_link_leads_to_a_file(target):
    assert (ROOT / target).exists()


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_names_a_door_and_options_that_exist(command, monkeypatch, capfd):
    words = command.split()
    if words[0] == "source":
        return
    if words[0] == "torchrun":  # its own options come before the script
        words = ["python", *words[words.index("launch/pretrain.py") :]]
    script = ROOT / (words[1] if words[0] == "python" else words[0])
    assert script.is_file()
    if words[0] == "python":
        subcommand = [words[2]] if len(words) > 2 and words[1] == "tools/plan.py" else []
        monkeypatch.setattr(sys, "argv", [str(script), *subcommand, "--help"])
        with pytest.raises(SystemExit) as exit_of_parser:
            runpy.run_path(str(script), run_name="__main__")
        shown = capfd.readouterr().out
        assert exit_of_parser.value.code == 0 and all(word in shown for word in words if word.startswith("--"))
    else:
        assert os.access(script, os.X_OK)


def test_fits_one_screen():
    assert len(README.splitlines()) <= 60
