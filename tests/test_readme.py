"""The README says only what is there."""

import os
import re

import pytest

from tests.documented_commands import ROOT, TRAIN, check_options, commands_of, config_of

README = (ROOT / "README.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("target", sorted(set(re.findall(r"\]\(([^)]+)\)", README))))
def test_every_link_leads_to_a_file(target):
    assert (ROOT / target).exists()


@pytest.mark.parametrize("command", commands_of(README), ids=str)
def test_every_command_names_a_door_and_options_that_exist(command, monkeypatch, capfd):
    if command.words[0] == "source":
        return
    if command.door is None:
        assert os.access(ROOT / command.words[0], os.X_OK)
        return
    assert (ROOT / command.door).is_file() and command.words[0] in ("python", "torchrun")
    check_options(command, monkeypatch, capfd)
    if command.door == TRAIN and "--help" not in command.words:
        config_of(command)


def test_fits_one_screen():
    assert len(README.splitlines()) <= 60
