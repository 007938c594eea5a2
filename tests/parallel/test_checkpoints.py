"""Checkpoints written by all ranks, each its parts, and read by any others: weights and optimizer bit for bit, training goes on as before."""

import itertools
import os
import shutil

import pytest
import safetensors.torch
import torch
import torch.distributed as dist

from phase8.checkpoint.background import BackgroundSaver
from phase8.checkpoint.load import open_checkpoint
from phase8.checkpoint.save import save_checkpoint
from phase8.checkpoint.state import flat_state, restore_state
from phase8.config.auto import without_auto
from phase8.config.load import load_config
from phase8.distributed.placement import collected, held_part
from phase8.errors import CheckpointCorruptError, StorageError
from tests.parallel.test_parity import BLOCKS, INTERLEAVED, OFFLOADED, ranks
from tests.parallel.training import MODEL, new_train_state, take_step

BLOCK = (*BLOCKS["deep-tied"], "model.low_rank_rank=5", "model.num_layers=4", "model.global_path=delta")
TOPOLOGIES = {
    "one": ranks(),
    "pp2 interleaved": ranks(pp=2, more=INTERLEAVED),
    "dp4 zero 1": ranks(dp=4, stage=1),
    "tp2": ranks(tp=2),
    "tp2 dp2 zero 3": ranks(tp=2, dp=2, stage=3),
    "tp2 dp3 zero 3": ranks(tp=2, dp=3, stage=3, more=("train.global_batch_size=6",)),  # the vocabulary's parts of parts differ in size
    "pp2 dp2 zero 0": ranks(pp=2, dp=2),
    "dp4 zero 3 in pairs": ranks(dp=4, stage=3, more=("zero.shard_size=2",)),
    "dp2 zero 3 offloaded": ranks(dp=2, more=OFFLOADED),
    "tp2 pp2 dp2 zero 2": ranks(tp=2, pp=2, dp=2, stage=2),
    "cp2 tp2 zero 3": ranks(cp=2, tp=2, stage=3),
    "tp4 pp2": ranks(tp=4, pp=2),
    "dp2 zero 2, optimizer offloaded": ranks(dp=2, stage=2, more=("zero.offload_optimizer=cpu",)),
}
EXPERTS = ("model.ffn=moe", "model.num_experts=4", "model.expert_ffn_size=16", "model.router_bias_rate=0.01", "model.first_dense_layers=1")
WITH_EXPERTS = {
    "ep4 zero 1": ranks(dp=4, ep=4, stage=1, more=EXPERTS),
    "one with experts": ranks(more=EXPERTS),
    "ep2 tp2 pp2 zero 0": ranks(dp=2, tp=2, pp=2, ep=2, more=EXPERTS),
    "ep2 dp4 zero 3": ranks(dp=4, ep=2, stage=3, more=EXPERTS),
    "dp2 zero 3, all experts on each": ranks(dp=2, stage=3, more=EXPERTS),
}
MUON = ("optim.name=muon",)
WITH_MUON = {"tp2 dp2 zero 3 muon": ranks(tp=2, dp=2, stage=3, more=MUON), "pp2 dp2 zero 1 muon": ranks(pp=2, dp=2, stage=1, more=MUON)}
SHORT = ("optim.state_dtype=bf16",)
WITH_SHORT_MOMENTS = {
    "tp2 dp2 zero 3 bf16": ranks(tp=2, dp=2, stage=3, more=SHORT),
    "pp2 offloaded bf16": ranks(pp=2, stage=1, more=(*SHORT, "zero.offload_optimizer=cpu")),
}
FP8 = ("optim.state_dtype=fp8",)
WITH_FP8_MOMENTS = {"tp2 dp2 zero 3 fp8": ranks(tp=2, dp=2, stage=3, more=FP8), "pp2 fp8": ranks(pp=2, stage=1, more=FP8)}
SHARED = ("model.block=transformer", "model.num_kv_heads=2", "model.convolution_size=4", "model.rope_scaling.type=linear")
WITH_SHARED_KEYS = {
    "dp4 zero 1, shared keys": ranks(dp=4, stage=1, more=SHARED),
    "tp2 dp2 zero 3, shared keys": ranks(tp=2, dp=2, stage=3, more=SHARED),
}
ANY = TOPOLOGIES | WITH_EXPERTS | WITH_MUON | WITH_SHORT_MOMENTS | WITH_FP8_MOMENTS | WITH_SHARED_KEYS
# The rings have one layout of each kind, with two layers: -m full takes every layout to every other. Those of eight ranks are saved and loaded by
# test_the_next_loss_is_that_of_one_process; interleaved stages need more layers, and tests/parallel/test_resharded.py loads into them.
RING_SETTINGS = ("model.num_layers=2",)
RINGS = {
    "dense": [
        "one", "pp2 dp2 zero 0", "dp4 zero 1", "tp2 dp2 zero 3", "dp4 zero 3 in pairs", "tp2 dp3 zero 3", "dp2 zero 3 offloaded", "cp2 tp2 zero 3",
    ],
    "experts": list(WITH_EXPERTS),
    "muon": list(WITH_MUON),
    "bf16 moments": list(WITH_SHORT_MOMENTS),
    "fp8 moments": list(WITH_FP8_MOMENTS),
}
PAIRS = [pair for names in (TOPOLOGIES, WITH_EXPERTS, WITH_MUON, WITH_SHORT_MOMENTS, WITH_SHARED_KEYS) for pair in itertools.permutations(names, 2)]


def start(settings, world_size):
    config = without_auto(load_config(os.devnull, [*MODEL, *BLOCK, *settings]))
    return config, new_train_state(config, world_size, device_type="cpu", dtype=torch.float32)


def state_of(train_state):
    return flat_state(train_state.stage.module, train_state.optimizer, train_state.shards.parts)


def restore(train_state, path):
    restore_state(
        open_checkpoint(path), train_state.stage.module, train_state.optimizer, train_state.shards.parts, is_part=train_state.mesh.pp.size > 1
    )
    train_state.shards.read_again()


def save(train_state, root, *, step, **options):
    return save_checkpoint(root, step=step, tensors=state_of(train_state), metadata={}, attachments={}, **options)


def train_and_save(settings, world_size, root):
    """A step and a save, as the second one; then what was saved, and the loss of the next step."""
    config, train_state = start(settings, world_size)
    take_step(train_state, config, 1)
    save(train_state, root, step=2)
    saved = {name: tensor.clone() for name, tensor in collected(state_of(train_state), train_state.mesh).items()}
    return saved, take_step(train_state, config, 2).loss


def load_and_save(settings, world_size, path, root):
    _, train_state = start(settings, world_size)
    restore(train_state, path)
    save(train_state, root, step=2)


def load_and_go_on(settings, world_size, path):
    config, train_state = start(settings, world_size)
    restore(train_state, path)
    return take_step(train_state, config, 2).loss


def pass_on(settings, world_size, path, root):
    """Loads a checkpoint and saves it, takes a step and saves that; the loss of the step, twice: once more after the checkpoint was loaded again."""
    config, train_state = start(settings, world_size)
    restore(train_state, path)
    save(train_state, root / "as loaded", step=2)
    loss = take_step(train_state, config, 2).loss
    save(train_state, root / "after a step", step=2)
    restore(train_state, path)
    return loss, take_step(train_state, config, 2).loss


def there_and_back(pool, here, there, directory):
    """Saved here, loaded and saved there, loaded here again: what differs from the first, and the losses of the next step."""
    (saved, loss), *_ = pool.run(train_and_save, *ANY[here][::-1], directory / "a", world_size=ANY[here][0])
    first = directory / "a" / "step-0000000002"
    pool.run(load_and_save, *ANY[there][::-1], first, directory / "b", world_size=ANY[there][0])
    second = directory / "b" / "step-0000000002"
    resumed, *_ = pool.run(load_and_go_on, *ANY[here][::-1], second, world_size=ANY[here][0])
    checkpoint = open_checkpoint(second)
    checkpoint.verify()
    assert set(checkpoint.tensor_names) == saved.keys() and any(name.endswith("exp_avg_sq") for name in saved)
    return [name for name, tensor in saved.items() if not torch.equal(checkpoint.read(name), tensor)], loss, resumed


@pytest.mark.parametrize("ring", RINGS)
def test_every_layout_goes_on_from_the_one_before(pool, tmp_path, ring):
    layouts = {name: (world_size, (*settings, *RING_SETTINGS)) for name in RINGS[ring] for world_size, settings in [ANY[name]]}
    first, *others = layouts
    (saved, _), *_ = pool.run(train_and_save, *layouts[first][::-1], tmp_path, world_size=layouts[first][0])
    path = tmp_path / "step-0000000002"
    for name in (*others, first):
        world_size, settings = layouts[name]
        losses = pool.run(pass_on, settings, world_size, path, tmp_path / name, world_size=world_size)
        found = open_checkpoint(tmp_path / name / "as loaded" / path.name)
        found.verify()
        assert set(found.tensor_names) == saved.keys() and any(each.endswith("exp_avg_sq") for each in saved)
        assert [each for each, tensor in saved.items() if not torch.equal(found.read(each), tensor)] == [], name
        assert all(loss == again for loss, again in losses), name
        path = tmp_path / name / "after a step" / path.name
        after = open_checkpoint(path)
        saved = {each: after.read(each) for each in saved}


@pytest.mark.full
@pytest.mark.parametrize(("here", "there"), PAIRS)
def test_every_way_there_and_back_is_bit_equal(pool, tmp_path, here, there):
    different, loss, resumed = there_and_back(pool, here, there, tmp_path)
    assert not different and resumed == loss


def test_the_next_loss_is_that_of_one_process(pool, tmp_path):
    pool.run(train_and_save, *TOPOLOGIES["tp2 pp2 dp2 zero 2"][::-1], tmp_path, world_size=8)
    losses = [
        pool.run(load_and_go_on, *TOPOLOGIES[name][::-1], tmp_path / "step-0000000002", world_size=TOPOLOGIES[name][0])[0]
        for name in ("one", "tp4 pp2", "dp4 zero 3 in pairs")
    ]
    assert losses[1:] == pytest.approx([losses[0]] * 2, rel=1e-6)


def test_every_element_is_written_once_and_by_several_ranks(pool, tmp_path):
    world_size, settings = TOPOLOGIES["tp2 dp2 zero 3"]
    pool.run(train_and_save, settings, world_size, tmp_path, world_size=world_size)
    path = tmp_path / "step-0000000002"
    manifest = open_checkpoint(path).manifest
    num_bytes = sum(entry.size_bytes for entry in manifest.tensors.values())
    headers = sum(8 + int.from_bytes((path / name).read_bytes()[:8], "little") for name in manifest.files)
    sizes = {name: entry.size_bytes for name, entry in manifest.files.items()}
    assert sum(sizes.values()) == num_bytes + headers
    by_rank = [sum(size for name, size in sizes.items() if f"rank{rank:05d}" in name) for rank in range(4)]
    assert min(by_rank) > 0.2 * sum(by_rank)
    # A part has its offsets in its name, and any reader of safetensors finds it.
    entry = next(entry for entry in manifest.tensors.values() if len(entry.slices) > 1)
    part = entry.slices[-1]
    found = safetensors.torch.load_file(path / part.file)[part.key]
    assert part.key.endswith("@" + ",".join(map(str, part.offsets))) and list(found.shape) == part.shape


def save_aside(settings, world_size, root):
    """Saves step 2 on a thread of each rank while the ranks train on; what there was when it began."""
    config, train_state = start(settings, world_size)
    group, background = dist.new_group(backend="gloo"), BackgroundSaver(torch.device("cpu"))
    take_step(train_state, config, 1)
    expected = {name: tensor.clone() for name, tensor in collected(state_of(train_state), train_state.mesh).items()}
    copies = background.copy(state_of(train_state))
    background.start(copies, lambda copies: save_checkpoint(root, step=2, tensors=copies, metadata={}, attachments={}, group=group))
    for step in range(2, 4):
        take_step(train_state, config, step)
    background.finished(wait=True)
    background.close()
    return expected


@pytest.mark.parametrize("name", ["dp4 zero 3 in pairs", "pp2 interleaved", "dp2 zero 3 offloaded"])
def test_ranks_save_aside_while_they_train(pool, tmp_path, name):
    world_size, settings = TOPOLOGIES[name]
    expected, *_ = pool.run(save_aside, settings, world_size, tmp_path, world_size=world_size)
    checkpoint = open_checkpoint(tmp_path / "step-0000000002")
    assert set(checkpoint.tensor_names) == expected.keys()
    assert all(torch.equal(checkpoint.read(name), tensor) for name, tensor in expected.items())


def load_damaged(settings, world_size, path, good):
    """What this rank says, and whether a good checkpoint leaves nothing of the damaged one."""
    _, fresh = start(settings, world_size)
    restore(fresh, good)
    _, train_state = start(settings, world_size)
    found = None
    try:
        restore(train_state, path)
    except CheckpointCorruptError as error:
        found = str(error)
    restore(train_state, good)
    parts, expected = ({name: held_part(tensor) for name, tensor in state_of(each).items()} for each in (train_state, fresh))
    return found, parts.keys() == expected.keys() and all(torch.equal(parts[name], part) for name, part in expected.items())


def test_a_damaged_part_is_refused_by_the_ranks_that_need_it(pool, tmp_path):
    world_size, settings = TOPOLOGIES["dp4 zero 1"]
    pool.run(train_and_save, settings, world_size, tmp_path, world_size=world_size)
    pool.run(train_and_save, (*settings, "optim.learning_rate=1e-1"), world_size, tmp_path / "good", world_size=world_size)
    path = tmp_path / "step-0000000002"
    file = next(path.glob("model-rank00002-*.safetensors"))
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    found = pool.run(load_damaged, settings, world_size, path, tmp_path / "good" / path.name, world_size=world_size)
    assert any(error is not None and f"{file.name} is altered" in error for error, _ in found)
    assert all(is_good for _, is_good in found)


def save_where_one_rank_cannot(settings, world_size, root):
    """The second rank's disk is full."""
    from phase8.checkpoint import writer

    _, train_state = start(settings, world_size)
    write = writer.write_tensor_file

    def full(path, tensors):
        if train_state.mesh.rank == 1:
            raise OSError(28, "No space left on device", str(path))
        return write(path, tensors)

    writer.write_tensor_file = full
    try:
        save(train_state, root, step=1)
    except StorageError as error:
        return str(error)
    finally:
        writer.write_tensor_file = write
    return None


def test_a_full_disk_of_one_rank_is_told_to_all_and_leaves_nothing(pool, tmp_path):
    world_size, settings = TOPOLOGIES["dp4 zero 1"]
    found = pool.run(save_where_one_rank_cannot, settings, world_size, tmp_path, world_size=world_size)
    assert all(error is not None and "No space left on device" in error for error in found)
    assert list(tmp_path.iterdir()) == []


def test_a_missing_file_of_a_rank_is_refused(pool, tmp_path):
    world_size, settings = TOPOLOGIES["tp2"]
    pool.run(train_and_save, settings, world_size, tmp_path / "whole", world_size=world_size)
    for file in sorted((tmp_path / "whole" / "step-0000000002").iterdir()):
        copy = tmp_path / "copy" / "step-0000000002"
        shutil.copytree(tmp_path / "whole" / "step-0000000002", copy)
        (copy / file.name).unlink()
        with pytest.raises(CheckpointCorruptError):
            open_checkpoint(copy)
        shutil.rmtree(copy)
