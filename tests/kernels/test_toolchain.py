"""The choice of the assembler: every row of the table of Triton's releases, and Triton itself as it is installed here."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from phase8.kernels import toolchain
from phase8.kernels.toolchain import Assembler, choose_assembler, prepare_toolchain

ROOT = Path(__file__).parents[2]
OLD, NEW = "/wheel/ptxas", "/wheel/ptxas-blackwell"
# Triton: what it runs for Hopper and for Blackwell, and what becomes of that.
RELEASES = {
    "3.6.0": (("12.8", OLD), ("12.9", NEW), False, None),
    "3.7.1": (("12.8", OLD), ("13.1", NEW), True, NEW),
    "3.8.0": (("12.9", OLD), ("13.3", NEW), True, NEW),
    "3.9.0": (("13.4", NEW), ("13.4", NEW), True, NEW),
}


def assembler(version_and_path):
    version, path = version_and_path
    return Assembler(path=path, version=version)


@pytest.mark.parametrize("release", RELEASES)
def test_every_release_of_triton(release):
    used, newer, usable, path = RELEASES[release]
    chosen = choose_assembler(assembler(used), assembler(newer), variable="VARIABLE", given_path=None)
    assert chosen.usable is usable
    assert chosen.assembler.path == (path or OLD)
    assert used[0] in chosen.reason and (newer[0] in chosen.reason) == usable
    if not usable:
        assert "VARIABLE" in chosen.reason and "13.1" in chosen.reason


@pytest.mark.parametrize(("version", "good"), [("12.8", False), ("12.9", False), ("13.0", False), ("13.1", True), ("13.10", True), ("14.0", True)])
def test_versions_compare_as_numbers(version, good):
    assert Assembler("ptxas", version).is_good is good


@pytest.mark.parametrize(
    ("used", "given", "usable", "words"),
    [
        (("13.1", "/mine"), "/mine", True, "ptxas 13.1"),
        (("12.8", "/mine"), "/mine", False, "with VARIABLE set to /mine; name"),
        (("12.8", OLD), "/typo", False, "with VARIABLE set to /typo, which Triton cannot run and ignores; name"),
    ],
)
def test_what_the_user_names_is_kept_good_or_bad(used, given, usable, words):
    chosen = choose_assembler(assembler(used), Assembler(NEW, "13.1"), variable="VARIABLE", given_path=given)
    assert (chosen.usable, chosen.assembler) == (usable, assembler(used))
    assert words in chosen.reason


class FakeTriton:
    """Answers as Triton does: by the environment variable if it names a program that runs."""

    def __init__(self, hopper, blackwell, programs):
        self.default = {90: assembler(hopper), 100: assembler(blackwell)}
        self.programs = programs

    def assembler(self, architecture):
        named = os.environ.get("TRITON_PTXAS_PATH") if architecture == 90 else None
        return Assembler(named, self.programs[named]) if named in self.programs else self.default[architecture]


@pytest.fixture
def fake(monkeypatch):
    pytest.importorskip("triton")
    monkeypatch.setenv("TRITON_PTXAS_PATH", "")  # restored whatever the code under test does with it
    monkeypatch.delenv("TRITON_PTXAS_PATH")
    monkeypatch.delenv("TRITON_PTXAS_BLACKWELL_PATH", raising=False)

    def install(hopper, blackwell, programs):
        monkeypatch.setattr(toolchain, "_assembler", FakeTriton(hopper, blackwell, programs).assembler)

    return install


def test_a_better_assembler_of_the_wheel_is_selected_for_this_process_and_its_children(fake):
    fake(("12.8", OLD), ("13.1", NEW), {NEW: "13.1"})
    prepared = prepare_toolchain((9, 0))
    assert prepared.usable and prepared.assembler == Assembler(NEW, "13.1")
    assert os.environ["TRITON_PTXAS_PATH"] == NEW
    again = prepare_toolchain((9, 0))
    assert again.usable and again.assembler == prepared.assembler


def test_a_selection_that_triton_ignores_is_noticed_and_undone(fake):
    fake(("12.8", OLD), ("13.1", NEW), {})
    prepared = prepare_toolchain((9, 0))
    assert not prepared.usable and prepared.assembler == Assembler(OLD, "12.8")
    assert NEW in prepared.reason and "TRITON_PTXAS_PATH" not in os.environ


def test_a_path_given_by_the_user_is_never_overridden(fake, monkeypatch):
    fake(("12.8", OLD), ("13.1", NEW), {"/mine": "12.9", NEW: "13.1"})
    monkeypatch.setenv("TRITON_PTXAS_PATH", "/mine")
    prepared = prepare_toolchain((9, 0))
    assert not prepared.usable and "/mine" in prepared.reason and os.environ["TRITON_PTXAS_PATH"] == "/mine"


def test_since_3_9_the_other_variable_decides(fake, monkeypatch):
    fake(("12.9", "/mine"), ("12.9", "/mine"), {})
    monkeypatch.setenv("TRITON_PTXAS_BLACKWELL_PATH", "/mine")
    prepared = prepare_toolchain((9, 0))
    assert not prepared.usable and "TRITON_PTXAS_BLACKWELL_PATH set to /mine" in prepared.reason


@pytest.mark.parametrize("capability", [(8, 0), (8, 9), (10, 0), (12, 0)])
def test_only_hopper_is_guarded(capability, fake):
    fake(("12.8", OLD), ("12.9", NEW), {})
    prepared = prepare_toolchain(capability)
    assert prepared.usable and prepared.assembler is None and "TRITON_PTXAS_PATH" not in os.environ


@pytest.mark.parametrize("error", [RuntimeError("Cannot find ptxas"), PermissionError("not executable")])
def test_no_assembler_at_all(error, fake, monkeypatch):
    def fail(architecture):
        raise error

    monkeypatch.setattr(toolchain, "_assembler", fail)
    prepared = prepare_toolchain((9, 0))
    assert not prepared.usable and str(error) in prepared.reason


def test_no_triton(monkeypatch):
    monkeypatch.setitem(sys.modules, "triton", None)
    prepared = prepare_toolchain((9, 0))
    assert not prepared.usable and "triton cannot be imported" in prepared.reason


def test_the_installed_triton_is_asked_and_obeys():
    """In a process of its own, as before a run: what Triton would run afterwards is what was promised."""
    pytest.importorskip("triton")
    code = (
        "from phase8.kernels.toolchain import prepare_toolchain\n"
        "from triton.backends.nvidia.compiler import get_ptxas\n"
        "prepared = prepare_toolchain((9, 0))\n"
        "print(prepared.usable, prepared.assembler.version, get_ptxas(90).version, prepared.assembler.path == get_ptxas(90).path)\n"
    )
    environment = {key: value for key, value in os.environ.items() if key not in ("TRITON_INTERPRET", "TRITON_PTXAS_PATH")}
    usable, promised, taken, same_path = subprocess.check_output([sys.executable, "-c", code], text=True, env=environment, cwd=ROOT).split()
    assert promised == taken and same_path == "True"
    assert (usable == "True") == (tuple(map(int, taken.split("."))) >= (13, 1))
