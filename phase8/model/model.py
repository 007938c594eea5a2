"""The language model: embedding, blocks, final norm, head with its loss."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from phase8.config.model_section import ModelSection
from phase8.distributed.collectives import ALONE, Axis, gather_tokens
from phase8.exchanges import NO_EXCHANGES, Exchanges, gathered
from phase8.kernels.rotary import rotary_angles, rotary_frequencies
from phase8.model.block import Block, BlockState
from phase8.model.decoding import ModelStep
from phase8.model.norm import RMSNorm
from phase8.model.parameters import materialise
from phase8.precision.formats import OPERAND_DTYPE, NumberFormat
from phase8.tensor_parallel.cross_entropy import loss_exchanges, parallel_cross_entropy
from phase8.tensor_parallel.embedding import VocabularyParallelEmbedding, first_id
from phase8.tensor_parallel.linear import ColumnParallelLinear, PreparedLinear, for_few_tokens
from phase8.tensor_parallel.parameters import local

# Called with the number of a layer and what its block returns beside the stream.
OnLosses = Callable[[int, Mapping[str, Tensor]], None]


class LanguageModel(nn.Module):
    """A stack of blocks between an embedding and an output head, or a chunk of it: consecutive layers under their names in the whole model.

    The first chunk begins with the embedding. The last one ends with final norm and head, and holds the embedding too where it is tied.

    Args:
        model: Model section of the config.
        dtype: Dtype of the residual stream and of the matmuls.
        axis: Axis of tensor parallelism.
        number_format: Format that computes the products of the linear layers of blocks.
        plain_layers: Blocks at either end of the whole model that compute them in the dtype of their operands instead.
        layers: Layers of the chunk; None: all layers.
        context: Axis of the ranks that share each sequence: each is given its slice, in their order.
        expert: Axis of the ranks that share the experts of each layer.
    """

    def __init__(
        self,
        model: ModelSection,
        *,
        dtype: torch.dtype,
        axis: Axis = ALONE,
        number_format: NumberFormat = OPERAND_DTYPE,
        plain_layers: int = 0,
        layers: range | None = None,
        context: Axis = ALONE,
        expert: Axis = ALONE,
    ):
        super().__init__()
        layers = range(model.num_layers) if layers is None else layers
        self.section, self.axis, self.context, self.dtype = model, axis, context, dtype
        self.begins, self.ends = layers.start == 0, layers.stop == model.num_layers
        self.auxiliary_losses = Block.auxiliary_losses(model)
        self.embedding = (
            VocabularyParallelEmbedding(model.vocab_size, model.d_model, std=model.init_std, dtype=dtype, axis=axis)
            if self.begins or (self.ends and model.tie_embeddings)
            else None
        )
        inner = range(plain_layers, model.num_layers - plain_layers)
        formats = {layer: number_format if layer in inner else OPERAND_DTYPE for layer in layers}
        options = {"axis": axis, "context": context, "expert": expert}
        self.blocks = nn.ModuleDict({str(layer): Block(model, layer, number_format=formats[layer], **options) for layer in layers})
        self.norm = RMSNorm(model.d_model, eps=model.norm_eps) if self.ends else None
        self.head = ColumnParallelLinear(model.d_model, model.vocab_size, std=model.init_std) if self.ends and not model.tie_embeddings else None

    @property
    def head_weight(self) -> nn.Parameter:
        """Weight of the output head [V, D]; it is that of the embedding where the two are tied."""
        owner = self.embedding if self.head is None else self.head
        assert owner is not None  # a chunk that does not end the model has no head
        return owner.weight

    def exchanges(self, *, recompute: str, is_divided: bool, recompute_every_n_layers: int) -> Exchanges:
        """The exchanges of embedding, blocks, final hidden states and loss.

        Args:
            recompute: Mode, as in `Block.exchanges`.
            is_divided: As in `Block.exchanges`.
            recompute_every_n_layers: Distance n of the recomputed layers 0, n, 2n, ...
        """
        recomputed = range(0, self.section.num_layers, recompute_every_n_layers)
        found = self.embedding.exchanges() if self.begins and self.embedding is not None else NO_EXCHANGES
        for layer, block in self.blocks.items():
            found = found.then(block.exchanges(recompute=recompute if int(layer) in recomputed else "none", is_divided=is_divided))
        return found.then(gathered(self.section.d_model)).then(loss_exchanges()) if self.ends else found

    def empty_states(self, batch_size: int) -> list[BlockState]:
        """The state of every block before the first token."""
        device = self.head_weight.device
        return [block.mixer.empty_state(batch_size, dtype=self.dtype, device=device) for block in self.blocks.values()]

    def forward(
        self,
        tokens: Tensor | None,
        starts: Tensor | None = None,
        states: Sequence[BlockState] | None = None,
        first_position: int = 0,
        x: Tensor | None = None,
        sequence_length: int | None = None,
        on_losses: OnLosses | None = None,
    ) -> tuple[Tensor, list[BlockState] | None]:
        """Final hidden states of a sequence, or of a piece of one.

        Args:
            tokens: Token ids [B, T]; None: another chunk has embedded them.
            starts: Mask that is True where a token begins a document that sees nothing before it [B, T]; None: one document.
            states: States after the earlier pieces, one per block; None: the sequence begins here and no states are returned.
            first_position: Position of the first token, for a piece of a sequence.
            x: Result of the previous chunk; None: this is the first one.
            sequence_length: Number of tokens T, needed where `tokens` is None.
            on_losses: Function that is called with the layer and the auxiliary losses of each block that has some, and with what it measures.

        Returns:
            Normalised hidden states [B, T, D], with several tensor-parallel ranks those of the own tokens [n, D] (before the norm where
            another chunk follows, and then with the embedding's output beside them [2, ...] if blocks add it); and the states for the next
            piece (None without `states`).
        """
        x, embedded = self._input(tokens, x)
        sequence_length = tokens.shape[1] if self.begins else sequence_length
        first_position += self.context.index * sequence_length
        section = self.section
        angles = rotary_angles(
            sequence_length,
            section.head_width,
            base=section.rope_base,
            rope_scaling=section.rope_scaling,
            first_position=first_position,
            device=x.device,
        )
        carried = []
        for place, (layer, block) in enumerate(self.blocks.items()):
            if states is None:
                x, _, losses = block.run_outside(block, x, angles, starts, None, embedded)
            else:
                # This runs `forward`, not the call, for block and norm: a compiled module would be compiled again for every length of its state.
                x, state, losses = block.forward(x, angles, starts, states[place], embedded)
                carried.append(state)
            if losses and on_losses is not None:
                on_losses(int(layer), losses)
        if self.norm is not None:
            x = self.norm(x) if states is None else self.norm.forward(x)
        elif embedded is not None:
            x = torch.stack([x, embedded])
        return x, None if states is None else carried

    def _input(self, tokens: Tensor | None, x: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """The residual stream before the first block, and the output of the embedding where blocks add it."""
        if self.begins:
            x = self.embedding(tokens)
            # A view, because torch.compile would make another graph for a block that gets the same tensor twice.
            return x, x.view_as(x) if self.section.embedding_scalars else None
        return x.unbind() if self.section.embedding_scalars else (x, None)

    def loss_sum(
        self,
        tokens: Tensor | None,
        targets: Tensor,
        starts: Tensor | None = None,
        x: Tensor | None = None,
        on_losses: OnLosses | None = None,
    ) -> Tensor:
        """Sum of the cross-entropies of all valid targets in nats, the same on every tensor-parallel rank.

        Args:
            tokens: As in `forward`.
            targets: Token ids to predict [B, T]; IGNORED_TARGET where there is none.
            starts: As in `forward`.
            x: As in `forward`.
            on_losses: As in `forward`.
        """
        # This runs `forward`, not the call: FSDP's hooks surround this method already, and those of the call would free the head before the loss.
        hidden, _ = self.forward(tokens, starts, x=x, sequence_length=targets.shape[1], on_losses=on_losses)
        hidden = gather_tokens(hidden.flatten(0, -2), self.axis)
        first = first_id(self.section.vocab_size, self.axis)
        return parallel_cross_entropy(hidden, local(self.head_weight), targets.flatten(), first_id=first, axis=self.axis)

    @torch.no_grad()
    def prepared(self, *, capacity: int) -> ModelStep:
        """The whole model on one rank for decoding; `capacity` as for `ModelStep`."""
        assert self.embedding is not None and self.norm is not None
        blocks = tuple(block.prepared(self.dtype, capacity=capacity) for block in self.blocks.values())
        embedding = self.embedding.weight.detach().to(self.dtype)
        head = PreparedLinear(for_few_tokens(embedding)) if self.head is None else self.head.prepared(self.dtype)
        section = self.section
        frequencies = rotary_frequencies(
            section.head_width, base=section.rope_base, rope_scaling=section.rope_scaling, device=embedding.device
        )
        return ModelStep(section.head_width, frequencies, capacity, embedding, blocks, self.norm.prepared(), head)

    def logits(self, hidden: Tensor) -> Tensor:
        """Logits of hidden states, fp32 [..., V]."""
        return F.linear(hidden, self.head_weight.to(hidden.dtype)).float()


def build_model(
    model: ModelSection,
    *,
    dtype: torch.dtype,
    device: torch.device,
    axis: Axis = ALONE,
    expert: Axis = ALONE,
    **options: Any,
) -> LanguageModel:
    """Builds a model or a chunk with uninitialised parameters on a device (`meta`: shapes only); `parameters.initialise` fills them.

    The other arguments are those of `LanguageModel`.
    """
    with torch.device("meta"):
        built = LanguageModel(model, dtype=dtype, axis=axis, expert=expert, **options)
    if device.type != "meta":
        materialise(built, device=device, axis=axis, expert=expert)
    return built
