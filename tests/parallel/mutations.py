"""Mistakes that corrupt without an error, each put into the running code for the time of a job: parity has to notice every one."""

from contextlib import contextmanager

import torch
import torch.distributed as dist
from torch.distributed.tensor import Replicate

from phase8.context_parallel import fetch, green, linear_attention, slices
from phase8.distributed import collectives
from phase8.expert_parallel import exchange
from phase8.kernels import state_map
from phase8.model import convolution, global_path, mixer, mixture_of_experts, model, norm
from phase8.optim import whole_matrices
from phase8.pipeline_parallel import engine
from phase8.pipeline_parallel.lowering import Payload
from phase8.precision import fp8
from phase8.tensor_parallel import cross_entropy, embedding, linear, products
from phase8.train.engine import measured, shards, stage, step
from phase8.zero import fsdp

READERS = (convolution, global_path, mixer, norm, embedding, linear)


@contextmanager
def replaced(*places, by):
    """Attributes of modules or classes replaced for a while; `by` makes the new one from the old one."""
    old = [(owner, name, vars(owner)[name]) for owner, name in places]
    for owner, name, value in old:
        setattr(owner, name, by(value))
    try:
        yield
    finally:
        for owner, name, value in old:
            setattr(owner, name, value)


def no_reduction_in_scatter():
    """A row-parallel layer keeps its own contribution."""
    own = lambda old: lambda x, axis: lambda: x.chunk(axis.size)[axis.index].contiguous()  # noqa: E731
    return replaced((collectives, "start_scatter"), (products, "start_scatter"), by=own)


def swapped_neighbours():
    """Gathered tokens come in another order of ranks."""
    swapped = lambda old: lambda x, axis: lambda: torch.cat(old(x, axis)().chunk(axis.size)[::-1])  # noqa: E731
    return replaced((collectives, "start_gather"), (products, "start_gather"), by=swapped)


def sum_is_local():
    """No number is summed over ranks: counts of targets, norms, normalisers of the softmax."""
    return replaced(*((module, "sum_over") for module in (measured, shards, cross_entropy)), by=lambda old: lambda x, *axes: x)


def local_count_of_targets():
    """Each rank divides by its own number of targets."""
    return replaced((step, "targets_of_all"), by=lambda old: lambda num_targets, stage: max(num_targets, 1))


def norm_counts_replicas_twice():
    """Parameters that every tensor-parallel rank has whole count once for each of them."""
    return replaced((shards.Shards, "_is_whole_on_tensor_axis"), by=lambda old: lambda self, parameter: False)


def norm_of_one_shard():
    """The gradient norm is that of this rank's parts."""
    return replaced((shards, "sum_over"), by=lambda old: lambda x, *axes: x)


def scalars_of_the_neighbour():
    """The global path of a rank takes the scalars of another rank's heads."""
    def rolled(old):
        def begin(x, axis):
            end = old(x, axis)
            return lambda: (found := end()).roll(found.shape[-1] // axis.size, -1)

        return begin

    return replaced((global_path, "begin_to_gather"), by=rolled)


def gate_of_one_rank_has_its_gradient():
    """The bottleneck of a gate per channel is gathered, but its gradient is not summed over the ranks that read it."""
    class Careless(linear.JointColumnLinear):
        def bottlenecks(self, x):
            found = super().bottlenecks(x)
            own = torch.zeros_like(found)
            own.chunk(self.axis.size)[self.axis.index].fill_(1)
            if found.requires_grad:
                found.register_hook(lambda gradient: gradient * own)
            return found

    return replaced((global_path, "JointColumnLinear"), by=lambda old: Careless)


def lengths_of_the_neighbour():
    """A rank scales the queries and keys of its heads to the lengths of another rank's heads."""
    return replaced((norm.QueryKeyNorm, "radius"), by=lambda old: property(lambda self: lengths_of_other_heads(self)))


def lengths_of_other_heads(module):
    whole = module.weight.full_tensor()
    return whole.roll(len(whole) // 2)[: len(module.weight.to_local())] * module.head_size**0.5


def plain_to_local():
    """A replicated parameter is read without saying that its gradient is a summand."""
    def careless(old):
        return lambda parameter: parameter.to_local() if hasattr(parameter, "to_local") else parameter

    return replaced(*((module, "local") for module in READERS if "local" in vars(module)), by=careless)


def average_over_data_ranks():
    """Gradients are means over the replicas, as FSDP has it by default."""
    def averaging(old):
        def shard(model, zero, mesh, **how):
            old(model, zero, mesh, **how)
            for module in model.modules():
                if isinstance(module, fsdp.FSDPModule):
                    module.set_gradient_divide_factor(float(mesh.topology.data_parallel_size))
                    module.set_force_sum_reduction_for_comms(False)

        return shard

    from phase8.train.engine import train_state

    return replaced((train_state, "shard_model"), by=averaging)


def never_synchronised():
    """Gradients of data-parallel ranks are never summed."""
    def off(old):
        def sum_gradients_after(model, zero, *, is_last):
            if isinstance(model, fsdp.FSDPModule):
                model.set_requires_gradient_sync(is_last and False)

        return sum_gradients_after

    return replaced((stage, "sum_gradients_after"), by=off)


def same_data_everywhere():
    """Every data-parallel rank reads the sequences of the first."""
    from phase8.distributed.mesh import Mesh

    return replaced((Mesh, "data_parallel_index"), by=lambda old: property(lambda self: 0))


def another_ranks_part():
    """Initial weights: a rank takes the part of its neighbour."""
    from phase8.model import parameters

    def shifted(old):
        def own_part(value, spec, axis, expert):
            parts = [value] if "tp" not in spec.divided or axis.size == 1 else value.chunk(axis.size, spec.divided["tp"])
            return parts[(axis.index + 1) % len(parts)] if len({part.shape for part in parts}) == 1 else old(value, spec, axis, expert)

        return own_part

    return replaced((parameters, "own_part"), by=shifted)


def largest_logit_is_local():
    """The softmax of each rank is shifted by its own largest logit."""
    return replaced((cross_entropy, "maximum_over"), by=lambda old: lambda x, axis: x)


def gradient_stays_a_summand():
    """Gradients of replicated parameters are not summed over tensor-parallel ranks."""
    def careless(old):
        def take(self):
            for parameter in self.whole.values():
                gradient = parameter.grad
                if gradient is not None and hasattr(gradient, "placements") and gradient.placements != parameter.placements:
                    local = gradient.to_local()
                    parameter.grad = type(gradient).from_local(local, gradient.device_mesh, [Replicate()], run_check=False)
            old(self)

        return take

    return replaced((shards.Shards, "take_gradients"), by=careless)


def embedding_of_one_rank():
    """The embedding is not summed over the vocabulary's ranks."""
    return replaced((embedding, "scatter_tokens"), by=lambda old: lambda x, axis: x.flatten(0, -2).chunk(axis.size)[axis.index])


def first_id_of_the_first():
    """Every rank takes its share of the vocabulary for the first one."""
    from phase8.model import model

    return replaced((embedding, "first_id"), (model, "first_id"), by=lambda old: lambda vocab_size, axis: 0)


def extra_all_reduce():
    """Gradients of replicated parameters are summed once more over the tensor-parallel ranks."""
    def doubled(old):
        def take(self):
            old(self)
            for name, whole in self.whole.items():
                if whole.placements[-1].is_replicate():
                    dist.all_reduce(self.parts[name].grad, group=self.tensor_axis.group)

        return take

    return replaced((shards.Shards, "take_gradients"), by=doubled)


def copies_not_summed():
    """The embedding of the first stage and its copy on the last get their own gradients only."""
    return replaced((stage.Stage, "_sum_gradients_of_copies"), by=lambda old: lambda self: None)


def copies_counted_twice():
    """A copy of the embedding counts in the gradient norm."""
    return replaced((stage.Stage, "copies"), by=lambda old: property(lambda self: frozenset()))


def gradient_of_another_microbatch():
    """A stage goes backward with the gradient that came before, from the second microbatch on."""
    def late(old):
        def take(self, payload, key):
            message = old(self, payload, key)
            if payload is not Payload.GRADIENT:
                return message
            earlier, self.earlier = vars(self).get("earlier", message), message
            return earlier

        return take

    return replaced((engine._Run, "_take"), by=late)


def synchronised_too_early():
    """Gradients are summed over the data-parallel ranks after the first microbatch instead of the last."""
    return replaced((engine.Engine, "is_last_backward"), by=lambda old: lambda self, kind, microbatch, chunk: microbatch == 0)


def state_begins_anew():
    """The memory of the recurrence does not cross the border of a slice."""
    return replaced((linear_attention._Attend, "forward"), by=lambda old: staticmethod(lambda *given: old(*given[:10], 0 * given[10], given[11])))


def gradient_of_the_memory_stays():
    """The gradient of the memory does not cross the border of a slice."""
    return replaced((linear_attention, "wait_for"), by=lambda old: lambda pending: 0 * old(pending))


def memory_of_the_delta_rule_begins_anew():
    """The memory of the delta rule does not cross the border of a slice."""
    return replaced((slices.EarlierSlices, "entering_state"), by=lambda old: lambda self, own: (end := old(self, own)) and (lambda: 0 * end()))


def decay_of_slices_is_forgotten():
    """A slice adds to the memory that enters it, and leaves the rest as it was."""
    return replaced((state_map.DecayMap, "__call__"), by=lambda old: lambda self, state: state + self.added)


def tokens_one_too_early():
    """A slice fetches the tokens before those that it needs."""
    def earlier(old):
        def wanted(length, num_ranks, *, before, first=0):
            found = old(length, num_ranks, before=before, first=first)
            return [[range(max(last.start - 1, 0), max(last.start - 1, 0) + len(last)), first] for last, first in found]

        return wanted

    return replaced((slices, "wanted_tokens"), by=earlier)


def gradients_of_fetched_tokens_stay():
    """What other ranks fetched of a slice gets no gradient from them."""
    home = lambda old: staticmethod(lambda ctx, grad: (0 * old.__func__(ctx, grad)[0], None))  # noqa: E731
    return replaced((fetch._ChosenTokens, "backward"), by=home)


def every_slice_begins_at_zero():
    """Each slice counts its positions from its own first token."""
    def without_slices(old):
        def angles(*arguments, first_position, **rest):
            return old(*arguments, first_position=0, **rest)

        return angles

    return replaced((model, "rotary_angles"), by=without_slices)


def documents_end_with_slices():
    """A document does not go on in the next slice."""
    def ended(old):
        def numbers(self, starts, wanted, length):
            return [found - 1 for found in old(self, starts, wanted, length)]

        return numbers

    return replaced((slices.EarlierSlices, "_documents"), by=ended)


def chain_without_gradient_of_later_slices():
    """No gradient of the Green function comes back over the border of a slice."""
    return replaced((green, "gradient_before_slices"), by=lambda old: lambda added, factors: 0 * old(added, factors))


def rows_of_another_rank():
    """What comes from the ranks of experts is taken for the rows of another rank."""
    def rolled(old):
        def begin(x, num_sent, num_received, axis):
            end = old(x, num_sent, num_received, axis)
            return lambda: (rows := end()).roll(len(rows) // axis.size, 0)

        return begin

    return replaced((exchange, "begin_to_exchange"), by=rolled)


def rows_of_another_expert():
    """Where counts differ, rows that arrive are given to the experts in the order of ranks."""
    return replaced((exchange, "_order_by_expert"), by=lambda old: lambda counts, num_rows: torch.arange(num_rows))


def counts_are_not_told():
    """The rows that arrive are taken to fill as many slots as those that were sent."""
    return replaced((exchange, "start_exchange"), by=lambda old: lambda counts, num_sent, num_received, axis: lambda: counts)


def gradients_of_rows_stay():
    """The gradients of rows that were sent are not sent home."""
    stay = staticmethod(lambda ctx, grad: (None, grad, None, None, None))
    return replaced((collectives._EndExchange, "backward"), by=lambda old: stay)


def norm_without_experts_of_others():
    """The gradient norm has the experts of one rank only."""
    return replaced((shards, "is_of_divided_experts"), by=lambda old: lambda parameter: False)


def routers_learn_from_own_tokens():
    """The choices of other ranks do not change the shares and biases of a router."""
    return replaced((measured, "sum_over"), by=lambda old: lambda x, *axes: x if x.ndim == 2 else old(x, *axes))


def experts_of_another_rank():
    """Initial weights: a rank takes the experts of its neighbour."""
    from phase8.model import parameters

    def shifted(old):
        return lambda value, spec, axis, expert: old(value.roll(len(value) // 2, 0) if "ep" in spec.divided else value, spec, axis, expert)

    return replaced((parameters, "own_part"), by=shifted)


def router_of_one_tensor_rank():
    """The gradient that the outputs of experts give to the router's weights is that of one rank's part of their width."""
    def careless(old):
        def gather(x, axis):
            found = old(x, axis)
            own = torch.zeros_like(found)
            own.chunk(axis.size)[axis.index].fill_(1)
            if found.requires_grad and found.shape[-1] == 4:  # choices and weights
                found.register_hook(lambda gradient: gradient * own)
            return found

        return gather

    return replaced((mixture_of_experts, "gather_tokens"), by=careless)


def room_of_experts_begins_anew():
    """In each slice of a sequence, experts have as much room as in the first one."""
    own = lambda old: lambda counts, axis: lambda: torch.zeros_like(counts).repeat(axis.size, 1, 1)  # noqa: E731
    return replaced((mixture_of_experts, "start_gather"), by=own)


# name -> what to apply; and the settings on which it must show.
def parts_are_orthogonalised():
    """Muon takes the part of a rank for the matrix."""
    return replaced((whole_matrices, "_axes_that_divide"), by=lambda old: lambda matrix: frozenset())


def elements_arrive_one_too_late():
    """On the way to the owner of a matrix, and back."""
    return replaced((whole_matrices, "_exchange"), by=lambda old: lambda *arguments: old(*arguments).roll(1))


MUTATIONS = {
    function.__name__: function
    for function in (
        no_reduction_in_scatter, swapped_neighbours, sum_is_local, local_count_of_targets, norm_counts_replicas_twice, norm_of_one_shard,
        plain_to_local, average_over_data_ranks, never_synchronised, same_data_everywhere, another_ranks_part, largest_logit_is_local,
        gradient_stays_a_summand, embedding_of_one_rank, first_id_of_the_first, extra_all_reduce,
        copies_not_summed, copies_counted_twice, gradient_of_another_microbatch, synchronised_too_early,
        scalars_of_the_neighbour, gate_of_one_rank_has_its_gradient, lengths_of_the_neighbour,
        state_begins_anew, gradient_of_the_memory_stays, memory_of_the_delta_rule_begins_anew,
        decay_of_slices_is_forgotten, tokens_one_too_early, gradients_of_fetched_tokens_stay, every_slice_begins_at_zero,
        documents_end_with_slices, chain_without_gradient_of_later_slices,
        rows_of_another_rank, rows_of_another_expert, counts_are_not_told, gradients_of_rows_stay, norm_without_experts_of_others,
        routers_learn_from_own_tokens, experts_of_another_rank, router_of_one_tensor_rank, room_of_experts_begins_anew,
        parts_are_orthogonalised, elements_arrive_one_too_late,
    )
}  # fmt: skip


def scale_of_the_first_row():
    """The largest number of a matrix is looked for in its first row, and what is larger elsewhere is cut off."""
    return replaced((fp8, "scale_of"), by=lambda old: lambda x, dtype, *, dim: old(x if dim == 0 else x[:1], dtype, dim=dim))


def largest_number_of_one_tensor_rank():
    """Each tensor-parallel rank rounds by its own largest number, but the scale of the first rank, as if it were reduced, is in the results."""
    def of_first_rank(factor):
        scale = factor.scale.contiguous()
        dist.broadcast(scale, src=0)
        return factor._replace(scale=scale)

    return replaced((fp8, "product"), by=lambda old: lambda left, right, dtype: old(of_first_rank(left), of_first_rank(right), dtype))


MUTATIONS_OF_FP8 = {function.__name__: function for function in (scale_of_the_first_row, largest_number_of_one_tensor_rank)}
