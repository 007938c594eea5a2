"""Runs a stage's program for one step. It knows no schedules or models: it executes instructions in order and calls chunks by number.

    N  tokens of this rank in a microbatch        D  width of the residual stream

    forward    waits for the input [N, D], calls the chunk, keeps (input, output) until the backward
    backward   waits for the gradient of the output, runs autograd from output to input, frees both, sends the gradient of the input

The backward of a chunk also takes the gradients of the chunk's auxiliary losses, whose values stay on the stage.

A chunk never sees another chunk's graph, because its input is a leaf. So a stage holds exactly the activations that its schedule implies, and a
chunk may recompute activations without the engine knowing. A single stage passes results from chunk to chunk without messages.

The result is the same to the last bit with every schedule: the gradients of a chunk accumulate in the order of the microbatches, and losses are
added in this order.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from phase8.distributed.channels import Channels, MessageForm, Route
from phase8.errors import CommunicationError, ConfigError
from phase8.pipeline_parallel.lowering import Compute, Payload, Program, Receive, Send, matching_receive
from phase8.pipeline_parallel.schedules import Kind, virtual_stage


class Forward(Protocol):
    """The function by which the engine calls the model."""

    def __call__(self, chunk: int, microbatch: int, x: Tensor | None, /) -> tuple[Tensor, Losses]:
        """Returns the output of a chunk [N, D] and its auxiliary losses.

        The output of the last virtual stage is the loss, a scalar. Loss and auxiliary losses are divided by the global number of targets.

        Args:
            chunk: Number of the chunk in this stage.
            microbatch: Number of the microbatch.
            x: Output of the previous virtual stage [N, D]; None for the first virtual stage.
        """


OnAction = Callable[[Kind, int, int], None]
# Computes gradients of what depends on some outputs, given the outputs and the gradient of each, or None for a scalar to minimise.
Backward = Callable[[tuple[Tensor, ...], tuple[Tensor | None, ...]], None]
Losses = Mapping[str, Tensor]  # scalars by name
_Key = tuple[int, int]  # microbatch, chunk


@dataclass(frozen=True)
class Place:
    """The place of a stage in the pipeline.

    Args:
        stage: Number of the stage.
        num_stages: Number of stages P.
        num_chunks: Number of chunks per stage V.
    """

    stage: int
    num_stages: int
    num_chunks: int = 1

    def is_first(self, chunk: int) -> bool:
        """Whether the model begins with a chunk."""
        return virtual_stage(self.stage, chunk, num_stages=self.num_stages) == 0

    def is_last(self, chunk: int) -> bool:
        """Whether the model ends with a chunk."""
        return virtual_stage(self.stage, chunk, num_stages=self.num_stages) == self.num_stages * self.num_chunks - 1


class Engine:
    """A program with its channels, which an engine for training and one for evaluation may share.

    Args:
        program: Program of this stage, with backwards or, for evaluation, without.
        place: Place of this stage.
        channels: Channels opened for `channels_of` the programs of all stages; a single stage has none.
        backward: Function that computes gradients.

    Raises:
        ConfigError: The backwards of a chunk are not in the order of the microbatches, or are split.
    """

    def __init__(self, program: Program, place: Place, channels: Channels, *, backward: Backward = torch.autograd.backward):
        self.program, self.place, self.channels, self.compute_gradients = program, place, channels, backward
        actions = [instruction.action for instruction in program if isinstance(instruction, Compute)]
        self._backwards: dict[int, list[int]] = {}  # chunk -> microbatches of its backwards, in order
        for action in actions:
            if action.kind in (Kind.BACKWARD_INPUT, Kind.BACKWARD_WEIGHT):
                raise ConfigError(f"the schedule has a {action.kind} action, but the engine runs whole backwards only; choose another schedule.")
            if action.kind is Kind.BACKWARD:
                self._backwards.setdefault(action.chunk, []).append(action.microbatch)
        for chunk, microbatches in self._backwards.items():
            if microbatches != sorted(microbatches):
                raise ConfigError(
                    f"stage {place.stage} runs the backwards of its chunk {chunk} in the order {microbatches}, but gradients are only "
                    "reproducible in the order of the microbatches; correct the schedule."
                )
        self.num_microbatches = 1 + max(action.microbatch for action in actions)

    @property
    def trains(self) -> bool:
        """Whether the program has backwards; a program without them runs with gradients disabled."""
        return bool(self._backwards)

    def is_last_backward(self, kind: Kind, microbatch: int, chunk: int) -> bool:
        """Whether an action completes the gradients of a chunk; the arguments are those of `on_action`."""
        return kind is Kind.BACKWARD and microbatch == self._backwards[chunk][-1]

    def run(self, forward: Forward, form: MessageForm, *, on_action: OnAction | None = None) -> tuple[Tensor | None, Losses]:
        """Runs the program, which adds gradients to those of the chunks' parameters.

        Args:
            forward: Function that calls a chunk.
            form: Form of the messages, with the shape of each microbatch.
            on_action: Function that is called before each computation with its kind, microbatch and chunk.

        Returns:
            The sum of the losses on the stage with the last chunk, None on other stages; and the sums of this stage's auxiliary losses.
            They have no graph.

        Raises:
            CommunicationError: Stages were given different microbatches, or the output of a chunk does not have the shape and dtype of
                the form.
        """
        if len(form.shapes) != self.num_microbatches:
            raise CommunicationError(
                f"the pipeline is given the shapes of {len(form.shapes)} microbatches, but its program has {self.num_microbatches}; "
                "build the program for as many as there are."
            )
        place = self.place
        name = "training" if self.trains else "evaluation"
        self.channels.agree(form, f"{name} with {place.num_stages} stages of {place.num_chunks} chunks")
        run = _Run(self, forward, form)
        with torch.set_grad_enabled(self.trains):
            for instruction in self.program:
                if isinstance(instruction, Receive):
                    run.receive(instruction)
                elif isinstance(instruction, Send):
                    run.send(instruction)
                else:
                    action = instruction.action
                    if on_action is not None:
                        on_action(action.kind, action.microbatch, action.chunk)
                    (run.forward if action.kind is Kind.FORWARD else run.backward)(action.microbatch, action.chunk)
        self.channels.flush()
        return run.loss(), run.auxiliary_losses()

    def is_kept(self, microbatch: int, chunk: int) -> bool:
        """Whether a forward has a backward, for which its graph is kept."""
        return microbatch in self._backwards.get(chunk, ())


class _Run:
    """The tensors that a stage holds during one step."""

    def __init__(self, engine: Engine, forward: Forward, form: MessageForm):
        self._engine, self._place, self._channels = engine, engine.place, engine.channels
        self._call, self._form = forward, form
        self._held: dict[_Key, tuple[Tensor | None, Tensor, Losses]] = {}  # input, output and auxiliary losses
        self._coming: dict[tuple[Payload, _Key], Callable[[], Tensor]] = {}  # receives posted and not consumed
        self._going: dict[tuple[Payload, _Key], Tensor] = {}  # messages computed and not sent
        self._losses: dict[int, Tensor] = {}
        self._auxiliary: dict[_Key, Losses] = {}

    def receive(self, receive: Receive) -> None:
        """Posts the receive of a message."""
        route = Route(receive.peer, self._place.stage, receive.payload)
        message = self._channels.receive(route, self._form, receive.microbatch)
        self._coming[receive.payload, (receive.microbatch, receive.chunk)] = message

    def send(self, send: Send) -> None:
        """Starts the send of a message."""
        message = self._going.pop((send.payload, (send.microbatch, send.chunk)))
        self._channels.send(Route(self._place.stage, send.peer, send.payload), message)

    def forward(self, microbatch: int, chunk: int) -> None:
        """Runs the forward of a chunk; keeps its input and output for the backward, and passes the output on."""
        key, x = (microbatch, chunk), None
        if not self._place.is_first(chunk):
            x = self._take(Payload.ACTIVATION, key)
            if self._engine.is_kept(*key):
                x.requires_grad_()
        output, losses = self._call(chunk, microbatch, x)
        if self._engine.is_kept(*key):
            self._held[key] = (x, output, losses)
        if losses:
            self._auxiliary[key] = {name: loss.detach() for name, loss in losses.items()}
        if self._place.is_last(chunk):
            self._check(output.dim() == 0, output, key, "a loss, which is a scalar")
            self._losses[microbatch] = output.detach()
        else:
            self._check(self._form.fits(output, microbatch), output, key, f"{self._form.dtype} of shape {self._form.shapes[microbatch]}")
            self._pass_on(Payload.ACTIVATION, key, output.detach())

    def backward(self, microbatch: int, chunk: int) -> None:
        """Runs autograd from the output of a chunk to its parameters and its input."""
        key = (microbatch, chunk)
        gradient = None if self._place.is_last(chunk) else self._take(Payload.GRADIENT, key)
        x, output, losses = self._held.pop(key)
        self._engine.compute_gradients((output, *losses.values()), (gradient, *(None for _ in losses)))
        if x is None:
            return
        if x.grad is None:
            raise CommunicationError(
                f"chunk {chunk} of pipeline stage {self._place.stage} does not use its input, so the stage before gets no gradient; "
                "correct the model."
            )
        self._pass_on(Payload.GRADIENT, key, x.grad)

    def loss(self) -> Tensor | None:
        """The sum of the losses; None on a stage without the last chunk."""
        in_order = [self._losses[microbatch] for microbatch in sorted(self._losses)]
        return sum(in_order[1:], in_order[0]) if in_order else None

    def auxiliary_losses(self) -> Losses:
        """The sums of the auxiliary losses by name."""
        sums: dict[str, Tensor] = {}
        for key in sorted(self._auxiliary):
            for name, loss in self._auxiliary[key].items():
                sums[name] = sums[name] + loss if name in sums else loss
        return sums

    def _take(self, payload: Payload, key: _Key) -> Tensor:
        """Waits for a message and returns it."""
        return self._coming.pop((payload, key))()

    def _pass_on(self, payload: Payload, key: _Key, message: Tensor) -> None:
        """Keeps a result for the send that follows or, with a single stage, for the chunk that consumes it."""
        if self._place.num_stages > 1:
            self._going[payload, key] = message
            return
        consumer = matching_receive(Send(payload, *key, peer=0), 0, num_stages=1)
        self._coming[payload, (consumer.microbatch, consumer.chunk)] = lambda: message

    def _check(self, fits: bool, output: Tensor, key: _Key, expected: str) -> None:
        if not fits:
            raise CommunicationError(
                f"chunk {key[1]} of pipeline stage {self._place.stage} returns {output.dtype} of shape {tuple(output.shape)} for microbatch "
                f"{key[0]}, but it must return {expected}; give the pipeline the shape that its chunks keep."
            )
