"""Decoding token by token gives the numbers of whole sequences, for every kind of block."""

import pytest
import torch

from phase8.config.model_section import ModelSection
from phase8.generate import decode
from phase8.generate.continuations import Request, continue_prompts
from phase8.generate.decode import Decoder, DecodingLoop
from phase8.generate.sampling import SamplingOptions
from phase8.model import mixer
from phase8.model.mixer_step import JointProjections
from phase8.model.quantized_layers import QuantizedExperts, QuantizedLinear, hold_quantized
from phase8.precision.int4 import Int4
from phase8.precision.int8 import Int8
from phase8.tensor_parallel import linear
from tests.model.small import VARIANT_IDS, VARIANT_SECTIONS, perturbed_model, random_tokens, scaled_down

GREEDY = SamplingOptions(temperature=0.0)
_MIXTURE = ModelSection(ffn="moe", shared_experts=1, top_k=2, expert_ffn_size=16)
OF_FEW_BITS = {
    "delta": scaled_down(ModelSection(global_path="delta")),
    "low-rank": scaled_down(ModelSection(ffn="low_rank_swiglu"), low_rank_rank=12),
    "all experts of two tokens": scaled_down(_MIXTURE),
    "chosen experts of two tokens": scaled_down(_MIXTURE, num_experts=8),
}


@torch.no_grad()
def logits_of_steps(model, tokens, read):
    """Logits of the tokens after the first ones, which were read in pieces: as many in each row as `read` says. {(row, position): logits}"""
    step = model.prepared(capacity=tokens.shape[1])
    states, found = step.empty_states(len(tokens)), {}
    for row, length in enumerate(read):
        decoder = Decoder(model)
        for piece in tokens[row : row + 1, :length].split(5, dim=1) if length else ():
            decoder.feed(piece)
        for state, block, carried in zip(states, step.blocks, decoder.states, strict=True):
            block.mixer.fill(state, torch.tensor([row]), carried.as_window())
    rows, position = torch.arange(len(tokens)), torch.tensor(read)
    for _ in range(tokens.shape[1] - max(read)):
        logits = step(tokens[rows, position], position, states)
        found |= {(row, int(at)): logits[row] for row, at in enumerate(position)}
        position = position + 1
    return found


@pytest.mark.parametrize("section", VARIANT_SECTIONS, ids=VARIANT_IDS)
@pytest.mark.parametrize("read", [(0, 9), (17, 2)], ids=str)
def test_steps_give_the_logits_of_the_whole_at_positions_of_their_own(section, read):
    model, tokens = perturbed_model(section), random_tokens()
    with torch.no_grad():
        expected = model.logits(model(tokens)[0])
    found = logits_of_steps(model, tokens, read)
    assert len(found) == 2 * (tokens.shape[1] - max(read))
    for (row, position), logits in found.items():
        torch.testing.assert_close(logits, expected[row, position], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("options", [{}, {"global_path": "delta", "global_gate": "scalar", "chain": "both"}, {"score": "lorentz"}], ids=str)
def test_one_product_before_the_mixer(options, monkeypatch):
    """What a GPU computes at once."""
    monkeypatch.setattr(mixer, "uses_triton", lambda x: True)
    model, tokens = perturbed_model(scaled_down(ModelSection(**options))).requires_grad_(False), random_tokens()
    with torch.no_grad():
        expected = model.logits(model(tokens)[0])
    assert isinstance(model.prepared(capacity=8).blocks[0].mixer.project, JointProjections)
    for (row, position), logits in logits_of_steps(model, tokens, (0, 9)).items():
        torch.testing.assert_close(logits, expected[row, position], rtol=1e-5, atol=1e-5)


@pytest.mark.gpu
@pytest.mark.parametrize("batch", [1, 3, 40])
def test_a_gpu_draws_tokens_that_are_the_likeliest_of_the_whole(batch):
    """Recorded and overlapping kernels, past the end of a window and of a ring: a token that bf16 has not moved to the top is far from it."""
    device, section = torch.device("cuda"), ModelSection(d_model=1024, num_layers=5, num_heads=8, vocab_size=8192, local_window_size=(64, 320))
    model = perturbed_model(section, dtype=torch.bfloat16).to(device).requires_grad_(False)
    prompts = torch.randint(8192, (batch, 60), generator=torch.Generator().manual_seed(1)).to(device)
    loop = DecodingLoop(model, batch_size=batch, options=GREEDY, num_ids=8192, most_at_once=8)
    drawn = loop.admit(range(batch), prompts, range(batch)).wait()
    for _ in range(40):
        drawn += loop.advance(8).wait()
    drawn = torch.tensor(drawn, device=device).T
    with torch.inference_mode():
        hidden, _ = model(torch.cat((prompts, drawn), dim=1)[:, :-1])
        logits = model.logits(hidden[:, 59:])
    behind = logits.amax(-1) - logits.gather(-1, drawn[..., None])[..., 0]
    share = (behind > 0.1 * logits.std()).double().mean().item()
    assert share <= 0.02 and behind.max() <= 0.6 * logits.std(), f"{share:.3f} of the tokens, at most {behind.max() / logits.std():.2f} behind"


@pytest.mark.parametrize("weight_format", [Int8(is_dynamic=False), Int8(is_dynamic=True), Int4()], ids=str)
@pytest.mark.parametrize("kind", OF_FEW_BITS)
def test_layers_of_few_bits(weight_format, kind):
    model, tokens = perturbed_model(OF_FEW_BITS[kind], dtype=torch.float32), random_tokens()
    hold_quantized(model, weight_format)
    generator = torch.Generator().manual_seed(3)
    for layer in (each for each in model.modules() if isinstance(each, QuantizedLinear | QuantizedExperts)):
        for name, values in layer.named_buffers():
            if name.endswith("scale"):
                values.uniform_(0.25 / 2**weight_format.bits, 0.75 / 2**weight_format.bits, generator=generator)
            else:
                values.random_(*((-127, 128) if weight_format.bits == 8 else (0, 256)), generator=generator)
    with torch.no_grad():
        expected = model.logits(model(tokens)[0])
    for (row, position), logits in logits_of_steps(model, tokens, (0, 4)).items():
        torch.testing.assert_close(logits, expected[row, position], rtol=1e-3, atol=1e-3)


def test_bf16_is_as_far_from_fp32_as_whole_sequences_are():
    section, tokens = scaled_down(ModelSection()), random_tokens()
    exact = perturbed_model(section)
    rounded = perturbed_model(section, dtype=torch.bfloat16).float()
    with torch.no_grad():
        expected, whole = exact.logits(exact(tokens)[0]), rounded.logits(rounded(tokens)[0])
    steps = torch.stack([logits for _, logits in sorted(logits_of_steps(rounded, tokens, (0, 0)).items())]).view_as(whole)
    assert rounded.dtype == torch.bfloat16 and (steps - expected).norm() <= 1.2 * (whole - expected).norm() + 1e-6


def test_pieces_of_a_prompt_give_the_logits_of_the_whole(monkeypatch):
    model, tokens = perturbed_model(scaled_down(ModelSection())), random_tokens()
    with torch.no_grad():
        expected = model.logits(model(tokens)[0][:, -1])
    monkeypatch.setattr(decode, "CPU_PIECE_TOKENS", 14)
    monkeypatch.setattr(decode, "SHORTEST_CPU_PIECE", 5)
    torch.testing.assert_close(Decoder(model, 2).feed(tokens), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("batch_size", "expected"), [(1, [512, 512, 76]), (4, [128] * 8 + [76]), (16, [64] * 17 + [12])])
def test_pieces_on_a_cpu_fit_into_its_caches(batch_size, expected, monkeypatch):
    model, lengths = perturbed_model(scaled_down(ModelSection())), []
    forward = model.forward
    monkeypatch.setattr(model, "forward", lambda piece, **options: lengths.append(piece.shape[1]) or forward(piece, **options))
    Decoder(model, batch_size).feed(random_tokens(batch=batch_size, length=1100))
    assert lengths == expected


def drawn_by(loop, prompts, *, count, seeds=(0,)):
    first = loop.admit(range(len(seeds)), prompts, seeds).wait()
    return [first[0], *(row for _ in range(count - 1) for row in loop.advance(1).wait())]


@pytest.mark.parametrize("block", ["phase8", "transformer"])
def test_the_likeliest_tokens_are_those_of_the_whole_and_a_transformer_gets_room(block, monkeypatch):
    monkeypatch.setattr(decode, "_CAPACITY_STEP", 4)
    model, tokens = perturbed_model(scaled_down(ModelSection(block=block))), random_tokens(batch=1, length=6)
    found = drawn_by(DecodingLoop(model, options=GREEDY, num_ids=61), tokens, count=20)
    for (token,) in found:
        with torch.no_grad():
            assert model.logits(model(tokens)[0][:, -1]).argmax().item() == token
        tokens = torch.cat((tokens, torch.tensor([[token]])), 1)


def test_a_transformer_has_room_for_its_longest_sequence_not_for_all_that_rows_have_seen(monkeypatch):
    monkeypatch.setattr(decode, "_CAPACITY_STEP", 4)
    model = perturbed_model(scaled_down(ModelSection(block="transformer")))
    loop = DecodingLoop(model, batch_size=2, options=GREEDY, num_ids=61)
    found = {}
    requests = [Request(number, (1, 2, 3), seed=0) for number in range(30)]
    continue_prompts(loop, requests, max_tokens=9, take=lambda number, token: found.setdefault(number, []).append(token) is None)
    assert loop._step.capacity == 16 and found == {number: found[0] for number in range(30)}  # twice the room for 8, where 12 are needed


def test_state_is_written_in_place_and_weights_are_held_once():
    model = perturbed_model(scaled_down(ModelSection(global_tokens=3))).requires_grad_(False)
    loop = DecodingLoop(model, options=GREEDY, num_ids=61)
    addresses = [part.data_ptr() for state in loop._states for part in vars(state).values() if part is not None]
    drawn_by(loop, random_tokens(batch=1, length=40), count=30)
    assert addresses == [part.data_ptr() for state in loop._states for part in vars(state).values() if part is not None]
    mixer = model.blocks["0"].mixer
    assert mixer.k.weight.untyped_storage().data_ptr() == loop._step.blocks[0].mixer.project.qkv.weight.untyped_storage().data_ptr()


@pytest.mark.parametrize("rank", [0, 5])
def test_prompts_are_read_from_the_joined_weights(rank, monkeypatch):
    model, tokens = perturbed_model(scaled_down(ModelSection(low_rank_rank=rank))).requires_grad_(False), random_tokens()
    expected = Decoder(model, 2).feed(tokens)
    model.prepared(capacity=64)
    cat, joined = torch.cat, []
    monkeypatch.setattr(linear.torch, "cat", lambda parts, *rest, **named: joined.append(parts) or cat(parts, *rest, **named))
    torch.testing.assert_close(Decoder(model, 2).feed(tokens), expected)
    assert not [parts for parts in joined if parts[0].dim() == 2 and parts[0].shape[1] == model.section.d_model]


def test_weights_in_training_stay_where_they_are():
    """A recorded training step finds them by their address."""
    model = perturbed_model(scaled_down(ModelSection()), dtype=torch.float32)
    before = {name: (x.data_ptr(), x.stride()) for name, x in model.named_parameters()}
    drawn_by(DecodingLoop(model, options=GREEDY, num_ids=61), random_tokens(batch=1), count=3)
    assert before == {name: (x.data_ptr(), x.stride()) for name, x in model.named_parameters()}


def test_the_baseline_keeps_as_many_heads_as_keys_have():
    sizes = []
    for heads in (None, 1):
        model = perturbed_model(scaled_down(ModelSection(block="transformer", num_kv_heads=heads)))
        (state, _), capacity = model.prepared(capacity=20).empty_states(3), 20
        sizes.append(state.keys.nbytes + state.values.nbytes)
        read = Decoder(model)
        read.feed(random_tokens(batch=1, length=20))
        assert read.states[0].keys.shape[2:] == state.keys.shape[2:]
    assert sizes[0] == 4 * sizes[1] == 3 * 2 * capacity * 24 * 8
