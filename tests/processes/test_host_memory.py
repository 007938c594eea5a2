import os

import pytest

from phase8.processes import host_memory


@pytest.fixture
def host(tmp_path, monkeypatch):
    """Files of a host with 64 MiB, half of it available, and of a control group without a limit."""
    (tmp_path / "meminfo").write_text("MemTotal:       65536 kB\nMemFree:   1 kB\nMemAvailable:   32768 kB\n")
    (tmp_path / "memory.max").write_text("max\n")
    monkeypatch.setattr(host_memory, "MEMORY_OF_HOST", tmp_path / "meminfo")
    monkeypatch.setattr(host_memory, "CONTROL_GROUP", tmp_path)
    return tmp_path


def test_what_the_system_says_is_plausible():
    total = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    assert 0 < host_memory.used_bytes() < total and 0 < host_memory.available_bytes() <= total


def test_without_a_control_group_the_host_decides(host):
    assert host_memory.available_bytes() == host_memory.used_bytes() == 32 << 20
    (host / "memory.max").unlink()
    assert host_memory.available_bytes() == 32 << 20


def test_a_control_group_may_leave_less(host):
    (host / "memory.max").write_text(f"{20 << 20}\n")
    (host / "memory.current").write_text(f"{16 << 20}\n")
    (host / "memory.stat").write_text(f"anon 5\ninactive_file {6 << 20}\n")
    assert host_memory.available_bytes() == 10 << 20
    (host / "memory.max").write_text(f"{100 << 20}\n")
    assert host_memory.available_bytes() == 32 << 20


def test_nothing_is_known_of_other_systems(tmp_path, monkeypatch):
    monkeypatch.setattr(host_memory, "MEMORY_OF_HOST", tmp_path / "meminfo")
    monkeypatch.setattr(host_memory, "CONTROL_GROUP", tmp_path)
    assert host_memory.available_bytes() is host_memory.used_bytes() is None
