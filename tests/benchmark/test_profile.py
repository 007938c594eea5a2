import re

import pytest
import torch

from phase8.benchmark.profile import MAX_ROWS, KernelTime, profile_steps, write_profile
from phase8.errors import StorageError


def test_operators_of_the_steps_with_their_calls():
    def take_steps():
        for _ in range(6):
            torch.ones(64, 64) @ torch.ones(64, 64)

    rows = profile_steps(take_steps, device=torch.device("cpu"), num_steps=3)
    times = [row.seconds_per_step for row in rows]
    assert times == sorted(times, reverse=True) and 0 < times[0] < 1
    assert {row.name: row.calls_per_step for row in rows}["aten::mm"] == 2.0


@pytest.mark.gpu
def test_kernels_of_a_gpu_and_nothing_of_the_host():
    x = torch.ones(2048, 2048, device="cuda")

    def take_steps():
        for _ in range(4):
            x @ x

    rows = profile_steps(take_steps, device=torch.device("cuda", 0), num_steps=4)
    assert not any(row.name.startswith(("aten::", "cuda")) for row in rows)
    assert rows[0].calls_per_step == 1.0 and 0 < rows[0].seconds_per_step < 0.1


def test_the_table_holds_the_longest_and_the_sum_of_the_rest(tmp_path):
    rows = [KernelTime("longest" + "x" * 500, 0.5, 3), *(KernelTime(f"short{i}", 0.1 / (MAX_ROWS + 1), 1) for i in range(MAX_ROWS + 1))]
    write_profile(tmp_path / "new" / "table.txt", rows, title="title", step_seconds=0.8)
    lines = (tmp_path / "new" / "table.txt").read_text().splitlines()
    assert lines[0] == "title" and lines[1].startswith("600.00 ms in kernels per step of 800.00 ms") and "(75 %)" in lines[1]
    assert re.fullmatch(r" 83\.3 %   500\.000        3\.0  longestx+", lines[4]) and len(lines[4]) < 160
    assert len(lines) == 4 + MAX_ROWS + 1 and "(2 more)" in lines[-1]
    assert sum(float(line.split()[2]) for line in lines[4:]) == pytest.approx(600, abs=0.1)


def test_a_place_that_cannot_be_written_is_one_sentence(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageError, match="cannot write"):
        write_profile(tmp_path / "file" / "table.txt", [], title="title", step_seconds=1.0)
