from functools import partial

import pytest
import torch

from phase8.config.model_section import ModelSection
from phase8.kernels import mixer_inputs
from phase8.kernels.reference.cross_entropy import IGNORED_TARGET
from phase8.kernels.rotary import rotary_angles
from phase8.model import mixer
from phase8.model.mixer import LorentzScore
from phase8.model.parameters import initialise
from phase8.model.recomputation import _slice_of_block, apply_recomputation
from tests.model.oracle import hidden_states
from tests.model.small import LENGTH, VARIANT_IDS, VARIANT_SECTIONS, document_starts, perturbed_model, random_tokens, scaled_down

every_variant = pytest.mark.parametrize("section", VARIANT_SECTIONS, ids=VARIANT_IDS)
both_blocks = pytest.mark.parametrize("block", ["phase8", "transformer"])

every_kind = pytest.mark.parametrize(
    "kind",
    [{}, {"global_path": "delta"}, {"block": "transformer"}, {"ffn": "moe", "shared_experts": 1}],
    ids=["phase8", "delta", "transformer", "experts"],
)


def next_token_loss(model, tokens, starts=None):
    return model.loss_sum(tokens[:, :-1], tokens[:, 1:], None if starts is None else starts[:, :-1])


@every_variant
def test_equals_the_independent_oracle(section):
    model, tokens = perturbed_model(section), random_tokens()
    hidden, _ = model(tokens)
    # Angles are fp32 in the model: their rounding is all that may differ.
    torch.testing.assert_close(hidden, hidden_states(model, tokens), rtol=1e-5, atol=1e-5)


@every_variant
def test_all_parameters_may_be_in_bf16_as_those_of_deepspeed_are(section):
    model = perturbed_model(section, dtype=torch.bfloat16)
    loss = next_token_loss(model, random_tokens())
    loss.backward()
    exact = next_token_loss(perturbed_model(section), random_tokens())
    assert loss.item() == pytest.approx(exact.item(), rel=0.02)
    assert all(parameter.grad.dtype == torch.bfloat16 and parameter.grad.isfinite().all() for parameter in model.parameters())


@every_variant
@pytest.mark.parametrize("packed", [False, True])
def test_every_parameter_gets_a_gradient(section, packed):
    model = perturbed_model(section)
    starts = document_starts(0, 11) if packed else None
    next_token_loss(model, random_tokens(), starts).backward()
    without = [name for name, p in model.named_parameters() if p.grad is None or not p.grad.abs().max() > 0]
    assert not without


@every_variant
@pytest.mark.parametrize("packed", [False, True])
def test_no_position_sees_a_later_token(section, packed):
    model, tokens = perturbed_model(section), random_tokens()
    starts = document_starts(0, 11) if packed else None
    for position in (1, 12, LENGTH - 1):
        changed = tokens.clone()
        changed[:, position] = (changed[:, position] + 1) % section.vocab_size
        before, after = (model(x, starts)[0] for x in (tokens, changed))
        torch.testing.assert_close(after[:, :position], before[:, :position], rtol=1e-10, atol=1e-10)
        assert ((after[:, position] - before[:, position]).abs().amax(-1) > 1e-6).all()


@every_variant
def test_no_document_sees_another(section):
    model, tokens, starts = perturbed_model(section), random_tokens(), document_starts(0, 11, 13)
    whole, _ = model(tokens, starts)
    for begin, end in ((0, 11), (11, 13), (13, LENGTH)):
        changed = (tokens + 1) % section.vocab_size
        changed[:, begin:end] = tokens[:, begin:end]
        torch.testing.assert_close(model(changed, starts)[0][:, begin:end], whole[:, begin:end], rtol=1e-10, atol=1e-10)


def test_no_decay_is_below_the_floor():
    path = perturbed_model(scaled_down(ModelSection(global_path="delta", decay_floor=-0.7, chain="both"))).blocks["0"].mixer.global_path
    scalars = 30 * torch.randn(2, LENGTH, path.num_heads, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    log_decay = path._modulation(scalars, None, None, None).log_decay
    assert -0.7 <= log_decay.min() < -0.69 and -1e-3 < log_decay.max() <= 0


@both_blocks
def test_without_global_tokens_a_packed_document_equals_the_document_alone(block):
    model, tokens = perturbed_model(scaled_down(ModelSection(block=block, global_tokens=0))), random_tokens()
    packed, _ = model(tokens, document_starts(0, 11))
    # Rotary positions differ by the offset, which relative scores do not see but fp32 angles round.
    for part in (slice(0, 11), slice(11, LENGTH)):
        torch.testing.assert_close(packed[:, part], model(tokens[:, part])[0], rtol=1e-5, atol=1e-5)


@every_variant
@pytest.mark.parametrize(
    ("pieces", "begins"), [([1] * LENGTH, None), ([7, 1, 20, 1], None), ([7, 1, 20, 1], (0, 6, 9, 26))], ids=["one by one", "pieces", "documents"]
)
def test_decoding_equals_the_whole_sequence(section, pieces, begins):
    model, tokens = perturbed_model(section), random_tokens()
    starts = None if begins is None else document_starts(*begins)
    whole, _ = model(tokens, starts)
    states, outputs, position = model.empty_states(2), [], 0
    for place, piece in enumerate(tokens.split(pieces, dim=1)):
        own_starts = None if starts is None else starts.split(pieces, dim=1)[place]
        hidden, states = model(piece, own_starts, states=states, first_position=position)
        outputs.append(hidden)
        position += piece.shape[1]
    torch.testing.assert_close(torch.cat(outputs, 1), whole, rtol=1e-9, atol=1e-9)


SLICED = {
    "linear": {"local_qk_norm": True, "global_activation": "silu", "value_activation": "silu", "global_gate": "channel"},
    "delta": {"global_path": "delta", "chain": "both", "global_tokens": 3, "score": "lorentz"},
    "window": {"global_path": "none", "convolution_size": 1},
    "hybrid": {"global_path": "delta", "local_window_size": (0, 9)},
    "experts": {"ffn": "moe", "shared_experts": 1},
    "embedding scalars": {"embedding_scalars": True},
}


@pytest.mark.parametrize("begins", [(), (0, 5, 11, 23)], ids=["one document", "documents"])
@pytest.mark.parametrize("kind", SLICED)
def test_recomputation_in_slices_equals_the_whole_sequence(kind, begins):
    section, starts = scaled_down(ModelSection(), **SLICED[kind]), document_starts(*begins) if begins else None
    weights = torch.randn(2, LENGTH, section.d_model, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    results = []
    for slice_tokens in (None, 6):  # the last slice has five tokens; the windows are 6 and 14
        model = perturbed_model(section)
        if slice_tokens is not None:
            apply_recomputation(model, "slices", slice_tokens=slice_tokens)
        hidden, _ = model(random_tokens(), starts)
        (hidden * weights).sum().backward()
        results.append((hidden, {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}))
    torch.testing.assert_close(*results, rtol=1e-8, atol=1e-9)


@pytest.mark.parametrize("mode", ["none", "selective"])
@pytest.mark.parametrize("begins", [(), (0, 5, 11, 23)], ids=["one document", "documents"])
@pytest.mark.parametrize("taps", [4, 1])
def test_the_operator_activates_values_as_plain_operations_do(taps, begins, mode, monkeypatch):
    section, starts = scaled_down(ModelSection(value_activation="silu", convolution_size=taps)), document_starts(*begins) if begins else None
    results = []
    for function in (mixer.mixer_inputs, partial(mixer_inputs._by_operator, initial_state=None)):
        monkeypatch.setattr(mixer, "mixer_inputs", function)
        model = perturbed_model(section)
        apply_recomputation(model, mode)
        loss = next_token_loss(model, random_tokens(), starts)
        loss.backward()
        results.append((loss.detach(), [parameter.grad for parameter in model.parameters()]))
    torch.testing.assert_close(*results, rtol=1e-5, atol=1e-5)  # angles are fp32, so a turn back is not quite the inverse


# Graphs and their breaks are made before any backend sees them. Of the graphs of forward and backward, those of a plan (tests/plan) and of divided
# blocks (tests/parallel/test_compiled.py) are made in every run; here for the full tests.
backends = pytest.mark.parametrize("backend", ["eager", pytest.param("aot_eager", marks=pytest.mark.full)])


@backends
def test_compiled_blocks_recompute_slices_of_one_sequence(backend):
    """Graphs for other slices are made between a slice's forward and its recomputation, for the last slice here, which is shorter."""
    section, results = scaled_down(ModelSection(), num_layers=1), []
    for compiles in (False, True):
        model = perturbed_model(section, dtype=torch.float32)
        apply_recomputation(model, "slices", slice_tokens=15)  # of 29
        for block in model.blocks.values() if compiles else ():
            block.compile(backend=backend)
        loss = next_token_loss(model, random_tokens()[:1])
        loss.backward()
        results.append((loss.detach(), [parameter.grad for parameter in model.parameters()]))
    torch.testing.assert_close(*results, rtol=1e-4, atol=1e-5)


def test_blocks_that_add_the_embedding_are_one_graph():
    """The first one gets the embedding twice, which the compiler would notice."""
    graphs = []

    def count(graph, inputs):
        graphs.append(graph)
        return graph

    section = scaled_down(ModelSection(), num_layers=3, local_window_size=6, embedding_scalars=True)
    model = perturbed_model(section, dtype=torch.float32)
    expected, _ = model(random_tokens())
    torch.compiler.reset()
    for block in model.blocks.values():
        block.compile(backend=count, fullgraph=True)
    found, _ = model(random_tokens())
    torch.compiler.reset()
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    assert len(graphs) == 1


def test_the_embedding_is_added_before_every_block_and_by_none_at_first():
    section = scaled_down(ModelSection(), num_layers=3, embedding_scalars=True)
    model, without = (perturbed_model(each) for each in (section, section.model_copy(update={"embedding_scalars": False})))
    names = [name for name, _ in model.named_parameters() if "embedding_scalar" in name]
    assert names == [f"blocks.{layer}.embedding_scalar.weight" for layer in range(3)]
    without.load_state_dict({name: value for name, value in model.state_dict().items() if name not in names})
    expected, _ = without(random_tokens())
    initialise(model, seed=0)
    assert all(model.get_parameter(name).item() == 0 for name in names)
    model.load_state_dict({**without.state_dict(), **{name: torch.zeros(1, dtype=torch.float64) for name in names}})
    assert torch.equal(model(random_tokens())[0], expected)
    next_token_loss(model, random_tokens()).backward()
    assert all(model.get_parameter(name).grad.item() != 0 for name in names)  # they leave zero with the first step


def test_the_state_after_a_slice_keeps_nothing_else_alive():
    """Parts of the state that a layer returns are views of all its keys and inputs."""
    model = perturbed_model(scaled_down(ModelSection(chain="both"), num_layers=1))
    block, x = model.blocks["0"], torch.randn(2, 20, 24, dtype=torch.float64)
    angles = rotary_angles(20, 6, base=1e4, first_position=0, device=x.device)
    _, state, _ = _slice_of_block(block, x, angles, None, block.mixer.empty_state(2, dtype=x.dtype, device=x.device), None)
    tensors = [part for each in (state, state.window, state.global_path) for part in vars(each).values() if isinstance(part, torch.Tensor)]
    assert len(tensors) == 9 and all(part.untyped_storage().nbytes() == part.nbytes for part in tensors)


@pytest.mark.parametrize("options", [{"mode": "full"}, {"mode": "selective"}, {"mode": "full", "every_n_layers": 2}])
@every_kind
def test_recomputation_changes_no_bit(kind, options):
    section, tokens = scaled_down(ModelSection(**kind)), random_tokens()
    plain, recomputed = (perturbed_model(section, dtype=torch.float32) for _ in range(2))
    apply_recomputation(recomputed, **options)
    losses = [next_token_loss(model, tokens) for model in (plain, recomputed)]
    for loss in losses:
        loss.backward()
    assert torch.equal(*losses)
    for (name, expected), actual in zip(plain.named_parameters(), recomputed.parameters(), strict=True):
        assert torch.equal(actual.grad, expected.grad), name


def test_recomputation_really_drops_activations():
    def saved_bytes(mode):
        model, total, seen = perturbed_model(scaled_down(ModelSection()), dtype=torch.float32), [], set()
        apply_recomputation(model, mode)

        def remember(x):
            if x.untyped_storage().data_ptr() not in seen:
                seen.add(x.untyped_storage().data_ptr())
                total.append(x.untyped_storage().nbytes())
            return x

        with torch.autograd.graph.saved_tensors_hooks(remember, lambda x: x):
            next_token_loss(model, random_tokens())
        return sum(total)

    assert saved_bytes("full") < saved_bytes("selective") < 0.6 * saved_bytes("none")


@every_kind
def test_bf16_stays_close_to_fp32(kind):
    section, tokens = scaled_down(ModelSection(**kind)), random_tokens()
    exact = perturbed_model(section, dtype=torch.float32)
    rounded = perturbed_model(section, dtype=torch.float32)
    rounded.embedding.dtype = torch.bfloat16
    hidden, expected = rounded(tokens)[0], exact(tokens)[0]
    assert hidden.dtype == torch.bfloat16
    # eps of bf16 is 2^-8 a rounding; a few dozen roundings in sequence.
    assert (hidden.float() - expected).norm() < 2**-4 * expected.norm()
    next_token_loss(rounded, tokens).backward()
    assert all(p.grad.dtype == torch.float32 for p in rounded.parameters())


def test_ignored_targets_do_not_count():
    model, tokens = perturbed_model(scaled_down(ModelSection())), random_tokens()
    targets = tokens.roll(-1, 1)
    ignored = targets.clone()
    ignored[:, 20:] = IGNORED_TARGET
    torch.testing.assert_close(model.loss_sum(tokens, ignored), model.loss_sum(tokens[:, :20], targets[:, :20]))


def test_tied_embeddings_share_one_parameter():
    tied, untied = (perturbed_model(scaled_down(ModelSection(tie_embeddings=tie))) for tie in (True, False))
    assert tied.head_weight is tied.embedding.weight and untied.head_weight is not untied.embedding.weight
    assert len(list(tied.parameters())) == len(list(untied.parameters())) - 1


@pytest.mark.slow
@backends
@every_kind
def test_compiles_without_a_graph_break(kind, backend):
    torch.compiler.reset()  # of one function only so many graphs are made, and other tests of the process have made some
    model, tokens = perturbed_model(scaled_down(ModelSection(**kind)), dtype=torch.float32), random_tokens()
    expected = next_token_loss(model, tokens)
    for layer in model.blocks.values():
        layer.compile(fullgraph=True, backend=backend)
    loss = next_token_loss(model, tokens)
    loss.backward()
    torch.testing.assert_close(loss, expected)


def test_a_score_that_has_become_too_sharp_keeps_weights_above_underflow():
    """Kernels without a running maximum divide by the sum of the weights."""
    score = LorentzScore(4)
    with torch.no_grad():
        score.radius_raw.copy_(torch.tensor([4.0, 30.0, 1000.0, 4.0]))
        score.beta_raw.copy_(torch.tensor([2.0, 40.0, 40.0, 500.0]))
        farthest = (2 + 4 * score.radius.double() ** 2) ** -score.beta.double()
    assert (farthest > torch.finfo(torch.float32).tiny).all()
    torch.testing.assert_close(score.beta[0], torch.nn.functional.softplus(torch.tensor(2.0)))
