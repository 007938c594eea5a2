import json
import subprocess
import sys
from pathlib import Path

import pytest
import safetensors.torch
import torch

from phase8.checkpoint.coverage import coverage_problem
from phase8.checkpoint.load import open_checkpoint
from phase8.checkpoint.reshard.compare import compare_checkpoints
from phase8.checkpoint.reshard.rank_regions import TensorForm, regions_by_rank
from phase8.checkpoint.reshard.reshard import ConsolidatedForm, consolidate, reshard
from phase8.checkpoint.reshard.rewrite import WORK_PREFIX
from phase8.checkpoint.save import save_checkpoint
from phase8.division import DividedShape, Region
from phase8.errors import CheckpointCorruptError, CheckpointError, CheckpointMismatchError, StorageError
from phase8.optim.state import adamw_state
from phase8.topology import Topology

ROOT = Path(__file__).parents[3]
ROWS, COLUMNS = {"tp": 0}, {"tp": 1}
FIRST = {
    "embedding.weight": DividedShape((7, 4), ROWS), "blocks.0.rows": DividedShape((6, 10), ROWS), "blocks.0.columns": DividedShape((5, 9), COLUMNS)
}  # fmt: skip
LAST = {"embedding.weight": DividedShape((7, 4), ROWS), "blocks.1.norm": DividedShape((5,)), "blocks.1.rows": DividedShape((3, 2), ROWS)}
STAGES = (FIRST, LAST)
LAYOUT = Topology(pipeline_parallel_size=2, data_parallel_size=2, tensor_parallel_size=2)


def quiet(*_):
    pass


@pytest.fixture
def source(tmp_path):
    generator = torch.Generator().manual_seed(0)
    tensors = {}
    for name, division in (FIRST | LAST).items():
        dtype = torch.bfloat16 if name.endswith("norm") else torch.float32
        tensors[f"model.{name}"] = torch.randn(division.shape, generator=generator).to(dtype)
        tensors[f"optimizer.{name}.exp_avg"] = torch.randn(division.shape, generator=generator)
        tensors[f"optimizer.{name}.step"] = torch.tensor(3.0)
    tokenizer = tmp_path / "tokenizer.model"
    tokenizer.write_bytes(b"words")
    metadata = {"config": {"model": {"d_model": 4}}, "name": "a"}
    path = save_checkpoint(tmp_path / "c", step=7, tensors=tensors, metadata=metadata, attachments={"tokenizer.model": tokenizer.read_bytes()})
    return open_checkpoint(path)


def run(source, destination, *, topology=LAYOUT, stages=STAGES, on_progress=quiet):
    return reshard(source, destination, stages=stages, topology=topology, declare=adamw_state, on_progress=on_progress)


def content(directory):
    return {path.name: (path.read_bytes(), path.stat().st_mtime_ns) for path in directory.iterdir()}


def same(first, second):
    second.verify()
    return not list(compare_checkpoints(first, second)) and first.metadata == second.metadata and first.step == second.step


def test_parts_are_cut_as_torch_chunks_them_and_tile_every_tensor():
    forms = {name: TensorForm(name, list(division.shape)) for name, division in (FIRST | LAST).items()}
    topology = Topology(pipeline_parallel_size=2, data_parallel_size=3, tensor_parallel_size=2)
    found = regions_by_rank(forms, STAGES, topology)
    for name, division in (FIRST | LAST).items():
        value = torch.arange(torch.Size(division.shape).numel()).view(division.shape)
        regions = []
        for rank, parts in found.items():
            if name in parts:
                at = topology.coordinates(rank)
                assert at["pp"] == (0 if name in FIRST else 1)
                own = value.chunk(2, division.divided["tp"])[at["tp"]] if division.divided else value
                region = parts[name]
                cut = value[tuple(slice(o, o + n) for o, n in zip(region.offsets, region.shape, strict=True))]
                assert torch.equal(cut, own.chunk(3, 0)[at["dp"]])
                assert division.divided or at["tp"] == 0
                regions.append(region)
        assert coverage_problem(division.shape, regions) is None


def test_scalars_and_tensors_without_elements_stay_whole_with_the_first_rank():
    forms = {"step": TensorForm("blocks.0.rows", []), "empty": TensorForm("e", [0, 3])}
    found = regions_by_rank(forms, ({**FIRST, "e": DividedShape((0, 3), ROWS)},), Topology(data_parallel_size=2))
    assert found == {0: {"step": Region([], []), "empty": Region([0, 0], [0, 3])}}


def test_there_and_back_is_bit_equal_and_one_file_per_rank_and_group(source, tmp_path):
    before = content(source.path)
    there = run(source, tmp_path / "there")
    assert same(source, there)
    assert set(there.manifest.files) == {f"{group}-rank{rank:05d}-00000.safetensors" for group in ("model", "optimizer") for rank in range(8)} - {
        # nothing of stage 1 is divided by tensor parallelism but rows of 3: two and one, and one cannot be divided again
        "model-rank00007-00000.safetensors", "optimizer-rank00007-00000.safetensors",
    }  # fmt: skip
    assert there.attachment("tokenizer.model").read_bytes() == b"words"
    back = run(there, tmp_path / "back", topology=Topology(), stages=({**FIRST, **LAST},))
    assert same(source, back) and sorted(back.manifest.files) == ["model-00000.safetensors", "optimizer-00000.safetensors"]
    assert content(source.path) == before and not list(tmp_path.glob(".*"))


class Stopped(Exception):
    pass


def test_an_interrupted_call_is_finished_by_the_next_which_keeps_what_was_complete(source, tmp_path):
    def stop(stage, completed, total):
        if stage == "writing" and completed > total / 2:
            raise Stopped

    with pytest.raises(Stopped):
        run(source, tmp_path / "d", on_progress=stop)
    assert not (tmp_path / "d").exists()
    work = tmp_path / f"{WORK_PREFIX}d"
    complete = {path.stem for path in (work / "written").iterdir()}
    assert 1 < len(complete) < 14
    damaged = min(complete)
    data = bytearray((work / "content" / damaged).read_bytes())
    data[-1] ^= 1
    (work / "content" / damaged).write_bytes(data)
    inodes = {name: (work / "content" / name).stat().st_ino for name in complete}
    (work / "content" / "model-half.safetensors").write_bytes(b"half")
    copy = run(source, tmp_path / "d")
    assert same(source, copy) and not work.exists()
    mtimes = {name for name in complete if (tmp_path / "d" / name).stat().st_ino == inodes[name]}
    assert mtimes >= complete - {damaged}


def test_what_another_call_began_for_other_ranks_is_not_used(source, tmp_path):
    def stop(stage, *_):
        if stage == "verifying":
            raise Stopped

    with pytest.raises(Stopped):
        run(source, tmp_path / "d", on_progress=stop)
    copy = run(source, tmp_path / "d", topology=Topology(tensor_parallel_size=2), stages=({**FIRST, **LAST},))
    assert same(source, copy) and len(copy.manifest.files) == 4


def test_two_calls_at_once_are_refused(source, tmp_path):
    def again(stage, *_):
        run(source, tmp_path / "d")

    with pytest.raises(StorageError, match="another call is writing"):
        run(source, tmp_path / "d", on_progress=again)


def test_what_was_not_written_as_it_should_is_found_and_written_again(source, tmp_path):
    def damage(stage, completed, total):
        if stage == "writing" and completed == total:
            path = tmp_path / f"{WORK_PREFIX}d" / "content" / "model-rank00000-00000.safetensors"
            data = bytearray(path.read_bytes())
            data[-1] ^= 1
            path.write_bytes(data)

    with pytest.raises(StorageError, match="is not as it was written"):
        run(source, tmp_path / "d", on_progress=damage)
    assert not (tmp_path / "d").exists()
    assert same(source, run(source, tmp_path / "d"))


def test_a_damaged_original_leaves_nothing_under_the_destination(source, tmp_path):
    path = source.path / "model-00000.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    with pytest.raises(CheckpointCorruptError, match="is altered"):
        run(source, tmp_path / "d")
    assert not (tmp_path / "d").exists()


def test_destinations_that_cannot_be(source, tmp_path):
    (tmp_path / "there").mkdir()
    for destination in (source.path, tmp_path / "there", source.path / "inside", tmp_path / "step-0000000009"):
        before = content(source.path)
        with pytest.raises(CheckpointError):
            run(source, destination)
        assert content(source.path) == before


def test_a_tensor_of_no_parameter_or_of_another_shape_is_refused(source, tmp_path):
    with pytest.raises(CheckpointMismatchError, match="belongs to no parameter"):
        run(source, tmp_path / "d", stages=(FIRST, {}))
    with pytest.raises(CheckpointMismatchError, match="has shape"):
        run(source, tmp_path / "d", stages=({**FIRST, "embedding.weight": DividedShape((7, 5), ROWS)}, LAST))


@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
def test_consolidated_weights_are_read_by_the_safetensors_library(source, tmp_path, dtype):
    divided = run(source, tmp_path / "divided")
    path = consolidate(divided, tmp_path / "one", form=ConsolidatedForm({"d_model": 4}), dtype=dtype, on_progress=quiet)
    found = safetensors.torch.load_file(path)
    assert found.keys() == (FIRST | LAST).keys()
    for name, tensor in found.items():
        expected = source.read(f"model.{name}")
        assert torch.equal(tensor, expected if dtype is None else expected.to(dtype)) and tensor.dtype == (dtype or expected.dtype)
    assert json.loads((tmp_path / "one" / "config.json").read_text()) == {"d_model": 4}
    assert sorted(path.name for path in (tmp_path / "one").iterdir()) == ["config.json", "model.safetensors", "tokenizer.model"]


MEASURED = """
import sys
from pathlib import Path
from phase8.checkpoint import direct_writer
from phase8.checkpoint.load import open_checkpoint
from phase8.checkpoint.reshard.reshard import ConsolidatedForm, consolidate, reshard
from phase8.division import DividedShape
from phase8.optim.state import adamw_state
from phase8.topology import Topology

direct_writer.BUFFER_BYTES = 2**20  # two of them, whatever the tensors: no part of what is measured
root = Path(sys.argv[1])
stages = ({f"w{i}": DividedShape((5000, 1024), {"tp": i % 2}) for i in range(10)},)
def peak():  # of this program, unlike getrusage, which begins with what its parent used
    return next(int(line.split()[1]) * 1024 for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
def measured(work):
    Path("/proc/self/clear_refs").write_text("5")
    before = peak()
    work()
    print(peak() - before)
quiet = lambda *_: None
divided = Topology(tensor_parallel_size=2, data_parallel_size=2)
# Once unmeasured: the code itself is read into memory when it first runs.
small = ({"w": DividedShape((4, 4), {"tp": 1})},)
reshard(open_checkpoint(root / "small/step-0000000001"), root / "warm", stages=small, topology=divided, declare=adamw_state, on_progress=quiet)
source = open_checkpoint(root / "step-0000000001")
measured(lambda: reshard(source, root / "a", stages=stages, topology=divided, declare=adamw_state, on_progress=quiet))
measured(lambda: reshard(open_checkpoint(root / "a"), root / "b", stages=stages, topology=Topology(), declare=adamw_state, on_progress=quiet))
measured(lambda: consolidate(open_checkpoint(root / "a"), root / "c", form=ConsolidatedForm({}), dtype=None, on_progress=quiet))
"""


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="peak memory is read from Linux's /proc")
def test_memory_stays_below_twice_the_largest_tensor(tmp_path):
    tensors = {f"model.w{i}": torch.full((5000, 1024), float(i)) for i in range(10)}
    save_checkpoint(tmp_path, step=1, tensors=tensors, metadata={"config": {}}, attachments={})
    save_checkpoint(tmp_path / "small", step=1, tensors={"model.w": torch.ones(4, 4)}, metadata={}, attachments={})
    largest, constant = 5000 * 1024 * 4, 12 * 2**20
    # glibc keeps freed blocks of up to 32 MiB for later, as chance will have it; with a fixed threshold it gives them back at once.
    environment = {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "MALLOC_MMAP_THRESHOLD_": "1000000"}
    result = subprocess.run([sys.executable, "-c", MEASURED, tmp_path], capture_output=True, text=True, cwd=ROOT, check=True, env=environment)
    peaks = [int(line) for line in result.stdout.split()]
    assert len(peaks) == 3 and max(peaks) < 2 * largest + constant, f"peaks {peaks}, largest tensor {largest}"
