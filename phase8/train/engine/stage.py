"""A rank's stage of the pipeline, with its chunks of the model, which runs the microbatches of a step through them.

One process is a pipeline of one stage. When the embedding is tied to the head, first and last stage hold a copy each: both copies start equal
and get the sum of both gradients, so they stay equal.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn

from phase8.config.pipeline import Pipeline
from phase8.config.schema import ZeroSection
from phase8.data.microbatch import Microbatch
from phase8.distributed.channels import MessageForm, Route, open_channels
from phase8.distributed.mesh import Mesh, first_and_last_stage
from phase8.distributed.placement import held_part
from phase8.model.mixture_of_experts import ROUTING
from phase8.model.model import LanguageModel, OnLosses
from phase8.pipeline_parallel.engine import Backward, Engine, Place
from phase8.pipeline_parallel.lowering import channels_of, lower
from phase8.pipeline_parallel.schedules import Kind, build_forward_only, build_schedule
from phase8.zero.fsdp import sum_gradients_after

EMBEDDING = "embedding.weight"
# Receives are posted one action ahead, so that a message travels while the action before the one that needs it is computed.
_RECEIVES_AHEAD = 1


class StageShares(NamedTuple):
    """This rank's shares of what a step measures.

    Args:
        loss: Share of the mean loss without auxiliary losses, on the stage where the model ends; zero on other stages.
        auxiliary: Shares of the auxiliary losses [n] in the order of their names; None: the model has none.
        routing: What layers with experts measure [layers of the whole model, E + 3], zero for those of other stages; None: there are none.
    """

    loss: Tensor
    auxiliary: Tensor | None
    routing: Tensor | None


class Stage:
    """The chunks of one rank and the engines that run them.

    Args:
        chunks: Chunks in the order of the model, divided over the data-parallel ranks.
        pipeline: Schedule, number of stages and chunks per stage.
        mesh: Mesh of the ranks, which all make their stages at the same time.
        zero: ZeRO section, by which data-parallel ranks divide the chunks.
        device: Device on which the chunks compute.
        backward: Function that computes gradients.
    """

    def __init__(
        self,
        chunks: Sequence[LanguageModel],
        pipeline: Pipeline,
        mesh: Mesh,
        *,
        zero: ZeroSection,
        device: torch.device,
        backward: Backward = torch.autograd.backward,
    ):
        self.chunks, self.pipeline, self.mesh, self.zero, self.device = tuple(chunks), pipeline, mesh, zero, device
        self._backward = backward
        self.module = joined(chunks)
        self._place = Place(mesh.pp.index, pipeline.num_stages, pipeline.num_chunks)
        name, P, V = pipeline
        programs = lower(build_schedule(name, num_stages=P, num_microbatches=P, num_chunks=V))
        self._channels = open_channels([Route(*channel) for channel in channels_of(programs)], mesh)
        self._engines: dict[tuple[int, bool], Engine] = {}
        is_tied = P > 1 and chunks[0].section.tie_embeddings
        self._holders_of_embedding = first_and_last_stage(mesh) if is_tied else None

    @property
    def auxiliary_losses(self) -> tuple[str, ...]:
        """Names of the auxiliary losses of the whole model, the same on every stage."""
        return self.chunks[0].auxiliary_losses

    @cached_property
    def routed_layers(self) -> tuple[int, ...]:
        """The layers of the whole model that have experts."""
        return tuple(layer for layer, is_routed in enumerate(self.chunks[0].section.has_experts) if is_routed)

    def learn_from_routing(self, routing: Tensor, is_valid: Tensor) -> None:
        """Makes the routers of this stage take account of a step.

        Args:
            routing: The sum of all ranks' shares of the routing.
            is_valid: Scalar on the device; False: the step does not count.
        """
        blocks = {int(layer): block for chunk in self.chunks for layer, block in chunk.blocks.items()}
        for measured, layer in zip(routing, self.routed_layers, strict=True):
            if layer in blocks:
                blocks[layer].learn_from_routing(measured, is_valid)

    @property
    def copies(self) -> frozenset[str]:
        """The names of parameters that another stage has too and counts in the gradient norm."""
        is_last = self._place.stage == self._place.num_stages - 1
        return frozenset({EMBEDDING} if self._holders_of_embedding is not None and is_last else ())

    def train(
        self,
        microbatches: Sequence[Microbatch],
        num_targets: int | Tensor,
        *,
        report: Callable[[str], None] | None = None,
    ) -> StageShares:
        """Adds the gradients of the mean loss, auxiliary losses included, to those of the parameters.

        Args:
            microbatches: Microbatches of this rank's pipeline, the same on all of its stages.
            num_targets: Divisor of the sum of the losses.
            report: Function that is called with a text before every forward and backward.
        """
        engine = self._engine(len(microbatches), trains=True)
        routing = self._no_routing()

        def forward(chunk: int, number: int, x: Tensor | None) -> tuple[Tensor, Mapping[str, Tensor]]:
            losses: dict[str, Tensor] = {}

            def add(layer: int, found: Mapping[str, Tensor]) -> None:
                for name, value in found.items():
                    if name != ROUTING:
                        losses[name] = losses[name] + value if name in losses else value
                    elif routing is not None:
                        routing[self.routed_layers.index(layer)] += value.detach()

            output = self._call(chunk, microbatches[number], x, add)
            losses = {name: loss / num_targets for name, loss in losses.items()}
            return (output / num_targets if self._place.is_last(chunk) else output), losses

        def before(kind: Kind, number: int, chunk: int) -> None:
            if report is not None:
                report(f"{kind} of microbatch {number}" + (f" in chunk {chunk}" if len(self.chunks) > 1 else ""))
            if kind is Kind.BACKWARD:
                sum_gradients_after(self.chunks[chunk], self.zero, is_last=engine.is_last_backward(kind, number, chunk))

        loss, auxiliary = engine.run(forward, self._form(microbatches), on_action=before)
        self._sum_gradients_of_copies()
        names, dtype = self.auxiliary_losses, torch.get_default_dtype()
        assert auxiliary.keys() <= set(names)  # blocks return what they declare
        shares = torch.stack([self._or_zero(auxiliary.get(name), dtype) for name in names]) if names else None
        return StageShares(self._or_zero(loss, dtype), shares, routing)

    def loss_sum(self, microbatches: Sequence[Microbatch]) -> Tensor:
        """The sum of the losses of all targets, float64, on the stage where the model ends, zero on other stages; without gradients."""

        def forward(chunk: int, number: int, x: Tensor | None) -> tuple[Tensor, Mapping[str, Tensor]]:
            output = self._call(chunk, microbatches[number], x)
            return (output.double() if self._place.is_last(chunk) else output), {}

        loss, _ = self._engine(len(microbatches), trains=False).run(forward, self._form(microbatches))
        return self._or_zero(loss, torch.float64)

    def _no_routing(self) -> Tensor | None:
        num_layers, size = len(self.routed_layers), self.chunks[0].section.numbers_of_routing
        return torch.zeros(num_layers, size, dtype=torch.float64, device=self.device) if num_layers else None

    def _or_zero(self, loss: Tensor | None, dtype: torch.dtype) -> Tensor:
        """The loss, or zero where there is none, in the same dtype on all stages, which are about to add them."""
        return torch.zeros((), device=self.device, dtype=dtype) if loss is None else loss.to(dtype)

    def _call(self, chunk: int, microbatch: Microbatch, x: Tensor | None, on_losses: OnLosses | None = None) -> Tensor:
        """Runs a chunk; returns the sum of the losses of the last chunk, or the residual stream of any other."""
        model = self.chunks[chunk]
        tokens, starts = self._moved(microbatch.tokens) if model.begins else None, self._moved(microbatch.starts)
        if model.ends:
            return model.loss_sum(tokens, self._moved(microbatch.targets), starts, x, on_losses)
        return model(tokens, starts, x=x, sequence_length=microbatch.tokens.shape[1], on_losses=on_losses)[0]

    def _moved(self, x: Tensor | None) -> Tensor | None:
        """A tensor of a microbatch, copied to the device in stream order."""
        return None if x is None else x.to(self.device, non_blocking=True)

    def _engine(self, num_microbatches: int, *, trains: bool) -> Engine:
        """The pipeline engine for a number of microbatches, for training or evaluation; each is made once."""
        key = (num_microbatches, trains)
        if key not in self._engines:
            name, P, V = self.pipeline
            sizes = {"num_stages": P, "num_microbatches": num_microbatches, "num_chunks": V}
            schedule = build_schedule(name, **sizes) if trains else build_forward_only(**sizes)
            program = lower(schedule, receives_ahead=_RECEIVES_AHEAD)[self._place.stage]
            self._engines[key] = Engine(program, self._place, self._channels, backward=self._backward)
        return self._engines[key]

    def _form(self, microbatches: Sequence[Microbatch]) -> MessageForm:
        """The form of the residual stream between chunks: [B, T, D], or with several tensor-parallel ranks the own tokens [n, D].

        Where blocks add the embedding's output, it travels with the stream [2, ...].
        """
        model = self.chunks[0]
        width, num_ranks = model.section.d_model, self.mesh.tp.size
        streams = (model.section.num_streams,) if model.section.num_streams > 1 else ()
        shapes = tuple(
            (*streams, *each.tokens.shape, width) if num_ranks == 1 else (*streams, each.tokens.numel() // num_ranks, width) for each in microbatches
        )
        return MessageForm(shapes, model.dtype, self.device)

    @torch.no_grad()
    def _sum_gradients_of_copies(self) -> None:
        """Replaces the gradients of the embeddings of the first and the last stage by their sum."""
        is_holder = self._place.stage in (0, self._place.num_stages - 1)
        if self._holders_of_embedding is None or not is_holder:
            return
        gradient = dict(self.module.named_parameters())[EMBEDDING].grad
        assert gradient is not None  # both uses of the embedding have a gradient for all of it
        dist.all_reduce(held_part(gradient), group=self._holders_of_embedding)


def joined(chunks: Sequence[LanguageModel]) -> nn.Module:
    """A module that holds all parameters of a stage's chunks under their names in the whole model; a single chunk is returned itself."""
    if len(chunks) == 1:
        return chunks[0]
    whole, blocks = nn.Module(), nn.ModuleDict()
    for chunk in chunks:
        for name, child in chunk.named_children():
            if name == "blocks":
                blocks.update(chunk.blocks.items())
            else:
                whole.add_module(name, child)
    whole.add_module("blocks", blocks)
    return whole
