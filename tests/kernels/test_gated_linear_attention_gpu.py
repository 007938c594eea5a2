"""The Triton kernels: in the interpreter on small shapes, on a GPU on real ones, and their machine code."""

import pytest
import torch

from phase8.kernels import gated_linear_attention as operator
from phase8.kernels.reference import gated_linear_attention as reference
from tests.kernels.offline import OfflineKernel, compile_offline
from tests.kernels.recurrence_kernels import TOLERANCE, VARIANTS, RecurrenceKernelTests, exact_fp32_products, moved  # noqa: F401  (a fixture for all tests here)

pytest.importorskip("triton")


class TestGatedLinearAttention(RecurrenceKernelTests):
    operator, reference = operator, reference

    @pytest.mark.gpu
    @pytest.mark.parametrize("dtype", TOLERANCE)
    @pytest.mark.parametrize("variant", VARIANTS)
    def test_a_long_sequence_equals_the_reference(self, variant, dtype, kernel_device, poisoned_memory):
        self.check((1, 70001, 1, 64, 64), variant, dtype, kernel_device)

    @pytest.mark.parametrize("variant", VARIANTS)
    def test_segments_equal_the_reference(self, variant, kernel_device, poisoned_memory):
        self.check((1, 330, 1, 16, 16), variant, torch.float32, kernel_device, segment_chunks=2)

    @pytest.mark.parametrize("segment_chunks", [2, 99, None])
    @pytest.mark.parametrize("backwards", [False, True])
    def test_what_a_piece_adds_equals_the_reference(self, backwards, segment_chunks, kernel_device, poisoned_memory):
        from phase8.kernels.gpu.gated_linear_attention import added_state

        (q, k, v, log_decay, starts, _), dy, _ = self.problem((2, 330, 2, 16, 16), "packed with a state")
        arguments = (q, dy, log_decay, starts) if backwards else (k, v, log_decay, starts)
        found = added_state(*moved(arguments, torch.float32, kernel_device), backwards=backwards, segment_chunks=segment_chunks)
        expected = reference.added_state(*arguments, backwards=backwards)
        assert found.dtype == torch.float32 and found.shape == expected.shape
        torch.testing.assert_close(found.cpu().double(), expected, rtol=1e-4, atol=1e-5)

    @pytest.mark.parametrize("segment_chunks", [4, None])
    def test_sequences_with_several_borders_equal_the_reference(self, segment_chunks, kernel_device, poisoned_memory):
        """From border to border, 512 tokens, the gradient of the decay is summed."""
        self.check((1, 600, 1, 16, 16), "packed with a state", torch.float32, kernel_device, segment_chunks=segment_chunks)


def test_segments_are_cut_only_where_programs_do_not_fill_the_gpu():
    from phase8.kernels.gpu.gated_linear_attention import MIN_SEGMENT_CHUNKS, choose_segment_chunks

    assert choose_segment_chunks(256, 64, 132) == choose_segment_chunks(66, 64, 132) == 64
    for programs, chunks in ((32, 64), (32, 2048), (1, 16384), (65, 2048), (1, 9), (1, 1)):
        segment = choose_segment_chunks(programs, chunks, 132)
        segments = -(-chunks // segment)
        # Two programs on each processor at most, and nearly as many unless the segments would be too short.
        assert segment >= MIN_SEGMENT_CHUNKS and programs * segments <= 2 * 132
        assert programs * segments >= 0.9 * 2 * 132 or segment == MIN_SEGMENT_CHUNKS


T, H = 4096, 32
HOPPER_SHARED_BYTES = 227 * 1024
MODULE = "phase8.kernels.gpu.gated_linear_attention"
WALKS = [("forward", 64), ("forward", 128), ("gradients", 64), ("gradients", 128), ("states", 128), ("packed gradients", 128)]
OTHERS = [("gradients", 32), ("gradients", 256)]


def offline_kernel(name, size):
    """A kernel as it runs in bf16 for heads of a size."""
    from phase8.kernels.gpu.gated_linear_attention import block_size, walk_tiles

    tiles, packed = walk_tiles(size, size, 2), name.startswith("packed")
    strides = {
        f"{tensor}_{dim}": stride
        for tensor in {"forward": ("q", "k", "v"), "states": ("key", "value")}.get(name, ("q", "k", "v", "dy"))
        for dim, stride in (("b", T * H * size), ("t", H * size), ("h", size))
    }
    decays = {"decay": "*fp32", "decay_b": T * H, "decay_t": H, "decay_h": 1, "starts": "*u8" if packed else None, "length": T, "scale": 0.125}
    segments = {"num_heads": H, "segment_chunks": 64, "num_segments": 4}
    constants = {"COLUMNS": tiles.columns, "FAST": True, "PRECISION": "tf32"}
    walked = {**strides, **decays, **segments, **constants, "INNER": size, "OUTER": size, "BLOCK_INNER": block_size(size)}
    options = {"num_warps": tiles.num_warps, "num_stages": tiles.num_stages}
    if name == "forward":
        arguments = {**strides, **decays, **segments, **constants, "K": size, "V": size, "BLOCK_K": block_size(size)}
        tensors = {**dict.fromkeys("qkvy", "*bf16"), "entering": None, "final": "*fp32"}
        return OfflineKernel(f"{MODULE}:_forward_kernel", {**arguments, **tensors}, **options)
    if name == "states":
        tensors = {"key": "*bf16", "value": "*bf16", "states": "*fp32", "shares": "*fp32"}
        return OfflineKernel(f"{MODULE}:_states_kernel", {**walked, **tensors, "TURN": -1}, **options)
    blocks = -(-size // tiles.columns)
    crossing = {**dict.fromkeys(("borders", "dborders"), "*bf16"), **dict.fromkeys(("read", "written"), "*fp32"), "batch_size": 8, "num_borders": 8}
    if name == "decay gradient":
        sizes = {"num_heads": H, "SIZE": size * size, "BLOCK": min(size * size, 4096), "BLOCKS": blocks}
        return OfflineKernel(f"{MODULE}_backward:_decay_gradient_kernel", {**decays, **crossing, **sizes, "dlog_decay": "*fp32"})
    tensors = {**dict.fromkeys(("q", "k", "v", "dy", "dq", "dk", "dv"), "*bf16"), "dinitial": "*fp32"}
    states = dict.fromkeys(("states", "dstates"), "*fp32" if packed else None)
    roles = {"first_role": 0, "ROLES": 3, "BLOCKS": blocks}
    return OfflineKernel(f"{MODULE}_backward:_gradients_kernel", {**walked, **tensors, **states, **crossing, **roles}, **options)


@pytest.fixture(scope="module")
def compiled():
    kernels = [*WALKS, *OTHERS, ("decay gradient", 128)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("triton.knobs.runtime.interpret", False)  # tiles are not those of the interpreter
        request = {f"{name} {size}": offline_kernel(name, size) for name, size in kernels}
    return compile_offline(request)


@pytest.mark.parametrize(("name", "size"), WALKS)
def test_machine_code_has_a_pipeline_of_loads_matrix_products_and_no_spills(name, size, compiled):
    code = compiled[f"{name} {size}"]
    code.check(contains=("HGMMA", "LDGSTS", "MUFU.EX2"))
    # k-steps of 16 for the scores, for what they weight, and for what the state carries; 4 for each 64 rows of what the state adds.
    reads = 0 if name == "states" else size // 16 + 4 + size // 16
    assert code.count("HGMMA") == reads + 4 * (size // 64)
    assert 2 * code.shared <= HOPPER_SHARED_BYTES  # two programs on a processor
    # A thread has 32 scores of a chunk, and some of its tokens.
    loop = max(code.loops, key=lambda opcodes: sum(opcodes.values()))
    assert sum(number for opcode, number in loop.items() if opcode.startswith("MUFU")) <= 40
    assert sum(loop.values()) < 1300


@pytest.mark.parametrize(("name", "size"), OTHERS)
def test_machine_code_of_other_sizes_neither_spills_nor_exceeds_shared_memory(name, size, compiled):
    compiled[f"{name} {size}"].check(contains=("HGMMA", "LDGSTS"))
    assert compiled[f"{name} {size}"].shared <= HOPPER_SHARED_BYTES


def test_machine_code_of_the_decay_gradient_does_not_spill(compiled):
    compiled["decay gradient 128"].check(max_registers=128, lacks=("HGMMA",))
