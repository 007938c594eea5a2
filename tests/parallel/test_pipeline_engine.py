"""The engine on real ranks: whatever the schedule, losses and gradients are those of one process, and no stage holds more than it should."""

import dataclasses
import functools
import os
import weakref

import pytest
import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

from phase8.config.load import load_config
from phase8.distributed.channels import Channels, MessageForm, Route, open_channels
from phase8.distributed.collectives import ALONE
from phase8.distributed.mesh import build_mesh
from phase8.errors import CommunicationError, ConfigError
from phase8.kernels.rotary import rotary_angles
from phase8.model.block import Block
from phase8.pipeline_parallel.engine import Engine, Place
from phase8.pipeline_parallel.lowering import Compute, channels_of, lower
from phase8.pipeline_parallel.partition import partition_layers
from phase8.pipeline_parallel.schedules import Action, Kind, build_forward_only, build_schedule, peak_held, virtual_stage
from phase8.topology import build_topology

TOLERANCE = 1e-12
CPU = torch.device("cpu")
WIDTH, NUM_LAYERS = 6, 5
SECTION = (
    "model.d_model=24", "model.num_layers=5", "model.num_heads=4", "model.vocab_size=61", "model.sequence_length=24", "model.ffn_size=40",
    "model.local_window_size=5",
)  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Case:
    """A pipeline and what goes through it; microbatches differ in length, and so do steps."""

    schedule: str
    P: int
    M: int
    V: int = 1
    steps: int = 1
    recompute: bool = False
    evaluate: bool = False
    receives_ahead: int = 1
    model: str = "toy"
    replicas: int = 1
    auxiliary: bool = False

    def __str__(self):
        return "-".join(str(value) for value in dataclasses.astuple(self))

    def lengths(self, step):
        return [3 + (2 * m + step) % 4 + 5 * step for m in range(self.M)]


class Watched(torch.autograd.Function):
    """The identity, whose place in a graph can be seen to be alive."""

    @staticmethod
    def forward(ctx, x, alive):
        ctx.sign = Sign()
        alive.add(ctx.sign)
        return x.view_as(x)

    @staticmethod
    def backward(ctx, gradient):
        return gradient, None


class Sign:
    """What can be referred to weakly."""


class Toy:
    """Linear layers with tanh; the first takes data, the last is followed by a loss. Layers are named by their number in the model."""

    def __init__(self):
        generator = torch.Generator().manual_seed(0)
        self.parameters = {
            f"layers.{layer}.{name}": torch.randn(shape, generator=generator, dtype=torch.float64).requires_grad_()
            for layer in range(NUM_LAYERS)
            for name, shape in (("weight", (WIDTH, WIDTH)), ("bias", (WIDTH,)))
        }

    def data(self, length, seed):
        return torch.randn(2, length, WIDTH, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)

    def shape(self, length):
        return (length, WIDTH)

    def first(self, data):
        return data[0]

    def layer(self, layer, x):
        return torch.tanh(F.linear(x, self.parameters[f"layers.{layer}.weight"], self.parameters[f"layers.{layer}.bias"]))

    def loss(self, x, data):
        return ((x - data[1]) ** 2).sum()


class Blocks:
    """Real blocks between the same ends."""

    def __init__(self):
        self.section = load_config(os.devnull, SECTION).model
        self.blocks = torch.nn.ModuleList(Block(self.section, layer, axis=ALONE) for layer in range(NUM_LAYERS)).double()
        generator = torch.Generator().manual_seed(0)
        with torch.no_grad():
            for parameter in self.blocks.parameters():
                parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator))
        self.parameters = dict(self.blocks.named_parameters())

    def data(self, length, seed):
        return torch.randn(2, 2, length, 24, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)

    def shape(self, length):
        return (2, length, 24)

    def first(self, data):
        return data[0]

    def layer(self, layer, x):
        angles = rotary_angles(x.shape[1], self.section.head_width, base=self.section.rope_base, first_position=0, device=CPU)
        return self.blocks[layer](x, angles)[0]

    def loss(self, x, data):
        return ((x - data[1]) ** 2).sum()


MODELS = {"toy": Toy, "blocks": Blocks}


class Chunks:
    """The part of a model that a stage has, called as the engine does."""

    def __init__(self, case, stage, replica=0):
        self.case, self.stage, self.model = case, stage, MODELS[case.model]()
        self.parts = partition_layers([1.0] * NUM_LAYERS, num_stages=case.P, num_chunks=case.V)
        self.replica, self.step, self.alive = replica, 0, weakref.WeakSet()
        self.output = lambda: None  # the last one, as long as it is there

    def __call__(self, chunk, microbatch, x):
        position = virtual_stage(self.stage, chunk, num_stages=self.case.P)
        lengths = self.case.lengths(self.step)
        data = self.model.data(lengths[microbatch], seed=1000 * self.replica + 100 * self.step + microbatch)
        assert (x is None) == (position == 0)
        x, losses = self.model.first(data) if x is None else x, {}
        for layer in self.parts[position]:
            x = checkpoint(self.model.layer, layer, x, use_reentrant=False) if self.case.recompute else self.model.layer(layer, x)
            if self.case.auxiliary and layer != NUM_LAYERS - 2:
                name = ("even", "odd")[layer % 2]
                losses[name] = losses.get(name, 0.0) + (1 + layer) * (x**4).sum() / sum(lengths)
        if torch.is_grad_enabled():
            x = Watched.apply(x, self.alive)
        x = self.model.loss(x, data) / sum(lengths) if position == len(self.parts) - 1 else x
        self.output = weakref.ref(x)
        return x, losses

    def form(self):
        return MessageForm(tuple(self.model.shape(length) for length in self.case.lengths(self.step)), torch.float64, CPU)

    def taken_gradients(self):
        """The gradients of the parameters that have one; they are emptied."""
        found = {name: p.grad for name, p in self.model.parameters.items() if p.grad is not None}
        for parameter in self.model.parameters.values():
            parameter.grad = None
        return found


def schedules_of(case):
    sizes = {"num_stages": case.P, "num_microbatches": case.M, "num_chunks": case.V}
    return build_schedule(case.schedule, **sizes), build_forward_only(**sizes)


def open_for(case):
    """Mesh, engines of training and of evaluation."""
    topology = build_topology(
        world_size=case.P * case.replicas, pipeline_parallel_size=case.P, context_parallel_size=1, tensor_parallel_size=1
    )
    mesh = build_mesh(topology, device_type="cpu", shard_size=1)
    programs = [lower(schedule, receives_ahead=case.receives_ahead) for schedule in schedules_of(case)]
    channels = open_channels([Route(*channel) for channel in channels_of(programs[0])], mesh)
    place = Place(mesh.pp.index, case.P, case.V)
    return mesh, *(Engine(program[place.stage], place, channels) for program in programs)


def run_stage(case):
    """Losses and gradients of each step, and for each step how many graphs were alive at most, and at the end."""
    mesh, training, evaluation = open_for(case)
    chunks = Chunks(case, mesh.pp.index, replica=mesh.data_parallel_index)
    results = []
    for chunks.step in range(case.steps):
        counts, last, losses = [], [], []
        if case.evaluate:
            kept = []
            losses.append(evaluation.run(chunks, chunks.form(), on_action=lambda *_, kept=kept: kept.append(chunks.output()))[0])
            assert kept == [None] * (case.M * case.V) and not chunks.alive and not chunks.taken_gradients()

        def on_action(kind, microbatch, chunk, counts=counts, last=last):
            counts.append(len(chunks.alive))
            last += [(microbatch, chunk)] if training.is_last_backward(kind, microbatch, chunk) else []

        loss, auxiliary = training.run(chunks, chunks.form(), on_action=on_action)
        losses.append(loss)
        assert sorted(last) == [(case.M - 1, chunk) for chunk in range(case.V)]
        assert len(counts) == 2 * case.M * case.V
        results.append((losses, chunks.taken_gradients(), max(counts), len(chunks.alive), auxiliary))
    return results


@functools.cache
def one_process(case, replica=0):
    """The same without a pipeline: microbatch after microbatch."""
    whole = Chunks(dataclasses.replace(case, P=1, V=1, recompute=False), 0, replica)
    results = []
    for whole.step in range(case.steps):
        total, auxiliary = 0.0, {}
        for microbatch in range(case.M):
            loss, losses = whole(0, microbatch, None)
            (loss + sum(losses.values())).backward()
            total = total + loss.detach()
            auxiliary = {name: auxiliary.get(name, 0.0) + value.detach() for name, value in losses.items()}
        results.append((total, whole.taken_gradients(), auxiliary))
    return results


def difference(found, expected):
    return ((found - expected).abs().max() / expected.abs().max()).item()


CASES = [
    *(Case(name, P, M) for name in ("gpipe", "1f1b") for P in (2, 4) for M in (4, 8)),
    Case("1f1b", 4, 2),
    Case("1f1b", 4, 1),
    Case("gpipe", 1, 4),
    Case("1f1b", 1, 4, recompute=True, evaluate=True),
    *(Case("interleaved", 2, M, 2) for M in (4, 8)),
    Case("interleaved", 1, 4, 3, steps=2, evaluate=True),
    Case("interleaved", 2, 4, 2, receives_ahead=0),
    Case("1f1b", 4, 8, steps=3, receives_ahead=2),
    Case("1f1b", 2, 4, steps=2, recompute=True, evaluate=True),
    Case("gpipe", 2, 4, steps=2, evaluate=True),
    Case("interleaved", 2, 4, 2, steps=3, recompute=True, evaluate=True, receives_ahead=3),
    Case("1f1b", 2, 5, replicas=2),
    Case("1f1b", 2, 3, model="blocks", steps=2, evaluate=True),
    Case("interleaved", 2, 2, 2, model="blocks", recompute=True),
    Case("1f1b", 2, 4, steps=2, auxiliary=True),
    Case("interleaved", 2, 4, 2, recompute=True, evaluate=True, auxiliary=True),
]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_equals_one_process_and_holds_what_the_schedule_says(pool, case):
    ranks = pool.run(run_stage, case, world_size=case.P * case.replicas)
    training, _ = schedules_of(case)
    for replica in range(case.replicas):
        stages = ranks[replica :: case.replicas]
        for step, (expected_loss, expected_gradients, expected_auxiliary) in enumerate(one_process(case, replica)):
            losses, gradients, peaks, left, auxiliary = zip(*(stage[step] for stage in stages), strict=True)
            assert all(loss is None for stage in losses[:-1] for loss in stage)
            assert len(losses[-1]) == 1 + case.evaluate
            assert all(difference(loss, expected_loss) < TOLERANCE and not loss.requires_grad for loss in losses[-1])
            assert sum(len(own) for own in gradients) == len(expected_gradients)  # every parameter, on one stage only
            for name, gradient in {name: value for own in gradients for name, value in own.items()}.items():
                assert difference(gradient, expected_gradients[name]) < TOLERANCE, name
            assert list(peaks) == [peak_held(training, stage)[0] for stage in range(case.P)]
            assert set(left) == {0}
            assert set().union(*auxiliary) == set(expected_auxiliary) == ({"even", "odd"} if case.auxiliary else set())
            for name, expected in expected_auxiliary.items():
                assert difference(sum(own[name] for own in auxiliary if name in own), expected) < TOLERANCE


def test_all_schedules_give_the_same_bits(pool):
    found = []
    for case in (Case("gpipe", 4, 4), Case("1f1b", 4, 4), Case("interleaved", 2, 4, 2), Case("interleaved", 1, 4, 4)):
        stages = [stage[0] for stage in pool.run(run_stage, case, world_size=case.P)]
        found.append((stages[-1][0][0], {name: gradient for stage in stages for name, gradient in stage[1].items()}))
    for loss, gradients in found[1:]:
        assert torch.equal(loss, found[0][0])
        assert all(torch.equal(gradients[name], value) for name, value in found[0][1].items())


def run_with_a_fault(case, fault):
    """A step in which something is wrong on stage 1."""
    mesh, training, _ = open_for(case)
    chunks = Chunks(case, mesh.pp.index)
    form = chunks.form()
    if mesh.pp.index == 1 and fault == "other shapes":
        form = dataclasses.replace(form, shapes=(*form.shapes[:-1], (1, WIDTH)))
    if mesh.pp.index == 1 and fault == "other dtype":
        form = dataclasses.replace(form, dtype=torch.float32)

    def call(chunk, microbatch, x):
        if mesh.pp.index == 1 and microbatch == 2 and fault == "raises":
            raise ConfigError("stage 1 has had enough.")
        return chunks(chunk, microbatch, x)

    training.run(call, form)


FAULTS = {
    "raises": (ConfigError, "stage 1 has had enough"),
    "other shapes": (CommunicationError, "announces another step than stage"),
    "other dtype": (CommunicationError, "announces another step than stage"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_ends_the_step_with_its_reason_and_poisons_nothing(expendable_pool, fault):
    error, message = FAULTS[fault]
    case = Case("1f1b", 2, 4)
    with pytest.raises(error, match=message):
        expendable_pool.run(run_with_a_fault, case, fault, world_size=2, timeout_seconds=30)
    loss = expendable_pool.run(run_stage, case, world_size=2)[-1][0][0][0]
    assert difference(loss, one_process(case)[0][0]) < TOLERANCE


def test_a_chunk_that_breaks_its_promise_is_told():
    """Two chunks of a single stage."""
    _, training, _ = open_for(case := Case("interleaved", 1, 4, 2))
    chunks = Chunks(case, 0)
    for call, message in {
        lambda c, m, x: chunks(c, m, None if x is None else x.detach()): "chunk 1 of pipeline stage 0 does not use its input",
        lambda c, m, x: (chunks(c, m, x)[0][:-1], {}): r"torch.float64 of shape \(2, 6\) for microbatch 0, .* torch.float64 of shape \(3, 6\)",
        lambda c, m, x: (chunks(c, m, x)[0].float(), {}): r"returns torch.float32 of shape \(3, 6\)",
        lambda c, m, x: chunks(0, m, None): r"shape \(3, 6\) for microbatch 0, but it must return a loss",
    }.items():
        with pytest.raises(CommunicationError, match=message):
            training.run(call, chunks.form())


def test_a_program_for_another_number_of_microbatches_is_refused():
    _, training, _ = open_for(case := Case("gpipe", 1, 4))
    chunks = Chunks(case, 0)
    form = chunks.form()
    with pytest.raises(CommunicationError, match="shapes of 3 microbatches, but its program has 4"):
        training.run(chunks, dataclasses.replace(form, shapes=form.shapes[:-1]))


def open_different_routes():
    topology = build_topology(world_size=2, pipeline_parallel_size=2, context_parallel_size=1, tensor_parallel_size=1)
    mesh = build_mesh(topology, device_type="cpu", shard_size=1)
    open_channels([Route(0, 1, "activation"), Route(1, 0, "activation" if mesh.rank else "gradient")], mesh)


def test_ranks_that_open_different_channels_are_told(expendable_pool):
    with pytest.raises(CommunicationError, match="announces another step"):
        expendable_pool.run(open_different_routes, world_size=2)


def test_backwards_out_of_order_and_split_backwards_are_refused():
    def program(*actions):
        return tuple(Compute(Action(kind, microbatch)) for kind, microbatch in [(Kind.FORWARD, 0), (Kind.FORWARD, 1), *actions])

    with pytest.raises(ConfigError, match=r"order \[1, 0\]"):
        Engine(program((Kind.BACKWARD, 1), (Kind.BACKWARD, 0)), Place(0, 1), Channels({}))
    with pytest.raises(ConfigError, match="backward_input action"):
        Engine(program((Kind.BACKWARD_INPUT, 0)), Place(0, 1), Channels({}))


class SlowSend:
    """A transfer that ends when it is told to, and has ended once it was waited for."""

    def __init__(self, tensor):
        self.tensor, self.ended, self.awaited = weakref.ref(tensor), False, False

    def is_completed(self):
        return self.ended

    def wait(self):
        self.awaited = True


class SlowEnd:
    """The sending end of a channel."""

    sends = True

    def __init__(self):
        self.started = []

    def start(self, tensor):
        self.started.append(SlowSend(tensor))
        return self.started[-1]


def test_what_is_sent_stays_alive_until_it_has_left_and_nobody_waits_before_the_flush():
    route, end = Route(0, 1, "activation"), SlowEnd()
    channels = Channels({route: end})
    for number in range(3):
        channels.send(route, torch.full((4,), float(number)))
    assert [(send.tensor().sum().item(), send.awaited) for send in end.started] == [(0.0, False), (4.0, False), (8.0, False)]
    end.started[0].ended = True
    channels.send(route, torch.zeros(4))
    assert [send.tensor() is None for send in end.started] == [True, False, False, False]
    channels.flush()
    assert all(send.awaited and send.tensor() is None for send in end.started)


def test_the_engine_waits_for_its_sends_at_the_end_only():
    schedule = build_forward_only(num_stages=2, num_microbatches=3)
    programs = lower(schedule)
    (channel,) = channels_of(programs)
    end = SlowEnd()
    engine = Engine(programs[0], Place(0, 2), Channels({Route(*channel): end}))
    awaited = []

    def note(kind, microbatch, chunk):
        awaited.extend(send.awaited for send in end.started[1:])  # after that by which the stages agree

    engine.run(lambda chunk, microbatch, x: (torch.ones(2, WIDTH), {}), MessageForm(((2, WIDTH),) * 3, torch.float32, CPU), on_action=note)
    assert awaited == [False] * 3 and len(end.started) == 4
    assert all(send.awaited for send in end.started)
