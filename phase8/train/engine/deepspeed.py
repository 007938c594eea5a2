"""The engine that leaves dividing, offloading and updating to DeepSpeed; the model, its loss and its checkpoints are those of the fsdp engine."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from phase8.accelerator import is_accelerator
from phase8.checkpoint.load import Checkpoint
from phase8.config.batch import batch_shape
from phase8.config.pipeline import pipeline_of
from phase8.config.schema import RunConfig
from phase8.data.microbatch import Microbatch
from phase8.distributed.mesh import Mesh
from phase8.distributed.placement import collected
from phase8.model.model import LanguageModel, OnLosses
from phase8.model.parameters import decayed_parameter_names, first_buffers, iterate_specs, materialise
from phase8.optim.adamw import build_optimizer
from phase8.plan.whole_config import shapes_only
from phase8.precision.policy import compute_dtype
from phase8.train.device import name_device_for_deepspeed
from phase8.train.engine.compilation import compile_modules
from phase8.train.engine.deepspeed_state import DeepSpeedState
from phase8.train.engine.measured import StepNumbers, count_targets, evaluate, step_result, sum_shares, targets_of_all
from phase8.train.engine.protocol import Replicas, StepResult
from phase8.train.engine.stage import Stage
from phase8.train.engine.train_state import build_chunk, model_with
from phase8.zero.async_io import load_async_io, require_async_io
from phase8.zero.deepspeed import (
    TensorParallelUnit,
    deepspeed_config,
    free_engine,
    hold_parts,
    import_deepspeed,
    make_plain,
    register_outside_blocks,
)
from phase8.zero.swap import Swap, fresh_swap_directory, swapped_bytes


class LossSum(nn.Module):
    """The module that DeepSpeed calls, whose output is the sum of the losses; the model computes other outputs without it.

    Args:
        model: Whole model, or this rank's part of it.
    """

    def __init__(self, model: LanguageModel):
        super().__init__()
        self.model = model

    def forward(
        self, tokens: Tensor, targets: Tensor, starts: Tensor | None = None, x: Tensor | None = None, on_losses: OnLosses | None = None
    ) -> Tensor:
        """`LanguageModel.loss_sum`."""
        return LanguageModel.loss_sum(self.model, tokens, targets, starts, x, on_losses)


class DeepSpeedEngine:
    """An engine over DeepSpeed's ZeRO stages 1 to 3; `TrainingEngine` documents its methods.

    Args:
        config: Config without `auto` settings.
        mesh: Mesh of the ranks, which all build their engines at the same time.
        device: Device on which the model computes.
    """

    def __init__(self, config: RunConfig, *, mesh: Mesh, device: torch.device):
        self.mesh, self.device, self._config = mesh, device, config
        name_device_for_deepspeed(device)
        deepspeed, mpu = import_deepspeed(), TensorParallelUnit(mesh) if mesh.tp.size > 1 else None
        deepspeed.init_distributed(dist_backend=None, auto_mpi_discovery=False, verbose=False)
        shape = batch_shape(config.train, config.parallel, data_parallel_size=mesh.topology.data_parallel_size)
        is_bf16 = config.precision.dtype == "bf16"
        theirs = deepspeed_config(
            config.zero,
            shape,
            is_bf16=is_bf16,
            gradient_clip_norm=config.optim.gradient_clip_norm,
            is_on_gpu=is_accelerator(device.type),
            swap=_swap(config, num_ranks=mesh.topology.world_size),
        )
        model = build_chunk(config, range(config.model.num_layers), mesh=mesh, dtype=compute_dtype(config.precision))
        specs, decayed_names = {name: (parameter.shape, spec) for name, parameter, spec in iterate_specs(model)}, decayed_parameter_names(model)
        shapes: dict[str, torch.Size] = {}
        divided: dict[str, DTensor] = {}
        swapper = None
        # One block after the other, so that the memory of a device holds what it has to hold in training and no more.
        for prefix, part in (*((f"blocks.{layer}", block) for layer, block in model.blocks.items()), ("", model)):
            materialise(part, device=device, axis=mesh.tp)
            divided |= make_plain(part, mesh.tp, prefix=prefix)
            own = dict(part.named_parameters(prefix=prefix))
            shapes |= {name: parameter.shape for name, parameter in own.items() if name not in shapes}
            if is_bf16:
                for parameter in own.values():
                    parameter.data = parameter.data.to(torch.bfloat16)
            swapper = hold_parts(deepspeed, part, theirs, mpu, swapper=swapper)
        root = LossSum(model)
        register_outside_blocks(deepspeed, root, model.blocks)
        compile_modules([model], config, are_calls_hooked=True)
        self._engine, *_ = deepspeed.initialize(
            model=root,
            optimizer=build_optimizer(dict(model.named_parameters()), config.optim, decayed_names=decayed_names),
            mpu=mpu,
            dist_init_required=False,
            config=theirs,
        )
        # As FSDP's hooks do, DeepSpeed's surround this method.
        model.loss_sum = lambda *arguments: self._engine(*arguments)  # type: ignore[method-assign]
        self._zero: Any = self._engine.optimizer
        self._stage = Stage([model], pipeline_of(config.parallel), mesh, zero=config.zero, device=device, backward=self._backward)
        self._state = DeepSpeedState(self._zero, model, shapes, divided, mesh, device=device)
        self._may_count, self._norm, self._num_backwards_left = True, math.nan, 0
        self._look: Callable[[Mapping[str, Tensor]], None] | None = None
        self._intercept_norm()
        self._state.initialise(specs, buffers=first_buffers(model), seed=config.train.seed)

    @property
    def num_slow_updates(self) -> int:
        """The number of first updates in which DeepSpeed learns the order of the parameters and makes the optimizer's state."""
        return 2

    def update(
        self,
        microbatches: Sequence[Microbatch],
        *,
        learning_rate: float,
        gradient_clip_norm: float,
        largest_loss: float = math.inf,
        stop: bool = False,
        unreadable: bool = False,
        report: Callable[[str], None] | None = None,
    ) -> StepResult:
        """Updates the weights once."""
        for group in self._zero.param_groups:
            group["lr"] = learning_rate
        self._zero.clip_grad = gradient_clip_norm
        numbers, num_ranks = StepNumbers(count_targets(microbatches), largest_loss, stop, unreadable), self.mesh.topology.num_token_ranks
        self._num_backwards_left = len(microbatches)
        # DeepSpeed takes the mean of the gradients of all ranks.
        shares = self._stage.train(microbatches, targets_of_all(numbers.num_targets, self._stage) / num_ranks, report=report)
        shares = shares._replace(
            loss=shares.loss / num_ranks, auxiliary=None if shares.auxiliary is None else shares.auxiliary / num_ranks
        )
        sums = sum_shares(shares, numbers, self._stage)
        self._may_count = bool(sums.may_count(numbers))
        if self._look is not None:
            self._look(self._state.gradients())
        self._norm = math.nan  # of gradients in bf16 that are not all finite, stages 1 and 2 take none
        self._engine.step()
        counts = torch.tensor(self._may_count and math.isfinite(self._norm), device=self.device)
        if sums.routing is not None:
            self._stage.learn_from_routing(sums.routing, counts)
        return step_result(sums.measured(torch.tensor(self._norm), counts).tolist(), self._stage)

    def evaluate(self, microbatches: Iterable[Microbatch]) -> tuple[float, int]:
        """Returns the mean loss and the number of targets."""
        return evaluate(self._stage, microbatches)

    def state(self) -> dict[str, Tensor]:
        """The tensors of model and optimizer: live ones where one rank has them whole, or else copies of this rank's rows in host memory."""
        return self._state.tensors()

    def state_sizes(self) -> list[int]:
        """The bytes of this rank's part of each tensor of `state`."""
        return self._state.sizes()

    def restore(self, checkpoint: Checkpoint, *, weights_only: bool = False) -> None:
        """Puts a checkpoint's tensors into model and optimizer."""
        self._state.restore(checkpoint, whole=shapes_only(self._config), weights_only=weights_only)

    def replicas(self) -> Replicas:
        """The weights with which ranks compute: whole on every data-parallel rank below stage 3."""
        return self._state.replicas()

    def whole_model(self) -> Callable[[], LanguageModel] | None:
        """Gathers the whole model on the first rank."""
        tensors = collected(self._state.weights(), self.mesh)
        return partial(model_with, tensors, self._config, self.device) if self.mesh.rank == 0 else None

    def watch_gradients(self, look: Callable[[Mapping[str, Tensor]], None]) -> None:
        """Calls `look` with the gradients between backward and optimizer step; each is gathered whole on every rank."""
        self._look = look

    def close(self) -> None:
        """Does nothing: DeepSpeed keeps its buffers for the next update."""

    def end(self) -> None:
        """Frees what DeepSpeed would keep until the process ends."""
        free_engine(self._engine)

    def _backward(self, outputs: tuple[Tensor, ...], _: tuple[Tensor | None, ...]) -> None:
        """Adds the gradients of the loss and of the auxiliary losses to those that DeepSpeed holds."""
        self._num_backwards_left -= 1
        self._engine.set_gradient_accumulation_boundary(self._num_backwards_left == 0)
        self._engine.backward(sum(outputs[1:], outputs[0]), scale_wrt_gas=False)

    def _intercept_norm(self) -> None:
        """Makes DeepSpeed skip a step that must not count.

        DeepSpeed skips a step, and clears what it has accumulated for it, where the norm of the gradients is no number. It knows no other reason, and
        forgets the norm then.
        """
        is_divided = hasattr(self._zero, "_get_norm_groups")
        name = "_get_norm_groups" if is_divided else "scaled_global_norm"
        original = getattr(self._zero, name)

        def norm() -> Any:
            found = original()
            norms = torch.stack([torch.as_tensor(each).float() for each in (found if is_divided else [found])])
            self._norm = float(norms.norm()) if bool((norms >= 0).all()) else math.nan  # DeepSpeed writes -1 for a norm that is not finite
            if self._may_count:
                return found
            return [torch.full_like(torch.as_tensor(each), math.nan) for each in found] if is_divided else math.nan

        setattr(self._zero, name, norm)


def _swap(config: RunConfig, *, num_ranks: int) -> Swap | None:
    """The place for what is offloaded to NVMe; None: nothing is."""
    if config.zero.nvme_path is None:
        return None
    require_async_io()
    load_async_io(speaks=dist.get_node_local_rank(0) == 0)
    sizes = [parameter.numel() for parameter in shapes_only(config).parameters()]
    num_bytes = swapped_bytes(config.zero, sum(sizes) // num_ranks, is_bf16=config.precision.dtype == "bf16")
    return Swap(fresh_swap_directory(Path(config.zero.nvme_path), config.run.name, num_bytes=num_bytes), max(sizes))


def build_deepspeed_engine(config: RunConfig, *, mesh: Mesh, device: torch.device) -> DeepSpeedEngine:
    """Builds the engine of a config with its first weights.

    Args:
        config: Config without `auto` settings.
        mesh: Mesh of the ranks, which all build their engines at the same time.
        device: Device on which the model computes.
    """
    return DeepSpeedEngine(config, mesh=mesh, device=device)
