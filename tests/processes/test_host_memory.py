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
    monkeypatch.setattr(host_memory, "OWN_GROUPS", tmp_path / "own")
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


def of_version_2(directory, limit, current, cached):
    directory.mkdir(parents=True, exist_ok=True)
    for name, text in (("memory.max", limit), ("memory.current", current), ("memory.stat", f"anon 5\ninactive_file {cached}\n")):
        (directory / name).write_text(f"{text}\n")


def of_version_1(directory, limit, current, cached):
    directory.mkdir(parents=True, exist_ok=True)
    statistics = f"inactive_file 1\ntotal_inactive_file {cached}\n"
    for name, text in (("memory.limit_in_bytes", limit), ("memory.usage_in_bytes", current), ("memory.stat", statistics)):
        (directory / name).write_text(f"{text}\n")


def test_the_group_of_a_job_within_those_of_the_system_decides(host):
    (host / "own").write_text("0::/system.slice/job_1/step_0\n")
    of_version_2(host / "system.slice/job_1/step_0", "max", 12 << 20, 0)
    of_version_2(host / "system.slice/job_1", 20 << 20, 12 << 20, 1 << 20)
    of_version_2(host / "system.slice", "max", 40 << 20, 0)
    assert host_memory.available_bytes() == 9 << 20
    of_version_2(host / "system.slice/job_1/step_0", 15 << 20, 12 << 20, 0)
    assert host_memory.available_bytes() == 3 << 20
    (host / "own").write_text("0::/system.slice/other\n")
    assert host_memory.available_bytes() == 32 << 20


@pytest.mark.parametrize("own", ["0::/", "0::/../job_1", "0::/docker/7f"], ids=["its own names", "beside them", "those of the host"])
def test_a_container_finds_its_group_at_the_top(host, own):
    (host / "own").write_text(f"{own}\n")
    of_version_2(host, 20 << 20, 12 << 20, 0)
    of_version_2(host.parent / "job_1", 2 << 20, 1 << 20, 0)  # nothing outside is read
    assert host_memory.available_bytes() == 8 << 20


def test_groups_of_version_1_have_other_files(host):
    (host / "own").write_text("9:name=systemd:/\n4:cpu,memory:/slurm/job_1\n0::/\n")
    of_version_1(host / "memory", 2**63 - 4096, 30 << 20, 0)
    assert host_memory.available_bytes() == 32 << 20
    of_version_1(host / "memory/slurm/job_1", 20 << 20, 16 << 20, 6 << 20)
    assert host_memory.available_bytes() == 10 << 20


def test_nothing_is_known_of_other_systems(tmp_path, monkeypatch):
    monkeypatch.setattr(host_memory, "MEMORY_OF_HOST", tmp_path / "meminfo")
    monkeypatch.setattr(host_memory, "CONTROL_GROUP", tmp_path)
    monkeypatch.setattr(host_memory, "OWN_GROUPS", tmp_path / "own")
    assert host_memory.available_bytes() is host_memory.used_bytes() is None
