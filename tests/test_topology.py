import math
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from phase8.errors import TopologyError
from phase8.topology import AXES, COPIES, EVERYBODY, HOLDERS, LOSS, STAGE, TOKENS, AxisName, Topology, build_topology

untimed = settings(deadline=None)
TOPOLOGIES = st.builds(Topology, *(st.integers(1, 4) for _ in AXES))


def degrees(tensor=1, context=1, pipeline=1, expert=1):
    return {
        "tensor_parallel_size": tensor,
        "context_parallel_size": context,
        "pipeline_parallel_size": pipeline,
        "expert_parallel_size": expert,
    }


@untimed
@given(TOPOLOGIES)
def test_coordinates_are_a_bijection(topology):
    positions = [tuple(topology.coordinates(rank).values()) for rank in range(topology.world_size)]
    assert len(set(positions)) == topology.world_size
    for position in positions:
        assert all(0 <= index < degree for index, degree in zip(position, topology.degrees.values(), strict=True))


@untimed
@given(TOPOLOGIES)
def test_ranks_vary_fastest_along_tp_then_cp_dp_pp(topology):
    """Sorting ranks by (pp, dp, cp, tp) is the order of the ranks themselves."""
    assert list(topology.coordinates(0)) == list(AXES) == ["pp", "dp", "cp", "tp"]
    ranks = range(topology.world_size)
    assert sorted(ranks, key=lambda rank: tuple(topology.coordinates(rank).values())) == list(ranks)


@untimed
@given(TOPOLOGIES, st.sampled_from(AXES))
def test_groups_of_an_axis_partition_the_world(topology, axis):
    groups = {tuple(topology.group(rank, axis)) for rank in range(topology.world_size)}
    assert sorted(rank for group in groups for rank in group) == list(range(topology.world_size))
    assert {len(group) for group in groups} == {topology.degrees[axis]}


@untimed
@given(TOPOLOGIES, st.sampled_from(AXES), st.data())
def test_a_group_holds_the_rank_and_varies_along_its_axis_only(topology, axis, data):
    rank = data.draw(st.integers(0, topology.world_size - 1))
    own = topology.coordinates(rank)
    group = topology.group(rank, axis)
    assert group[own[axis]] == rank
    assert [topology.coordinates(member) for member in group] == [{**own, axis: index} for index in range(topology.degrees[axis])]


def test_a_worked_example():
    topology = build_topology(world_size=120, **degrees(tensor=2, context=3, pipeline=5))
    assert topology.degrees == {"pp": 5, "dp": 4, "cp": 3, "tp": 2}
    assert topology.coordinates(47) == {"pp": 1, "dp": 3, "cp": 2, "tp": 1}
    assert topology.group(47, "tp") == [46, 47]
    assert topology.group(47, "cp") == [43, 45, 47]
    assert topology.group(47, "dp") == [29, 35, 41, 47]
    assert topology.group(47, "pp") == [23, 47, 71, 95, 119]


@untimed
@given(TOPOLOGIES)
def test_a_position_has_its_rank(topology):
    for rank in range(topology.world_size):
        own = topology.coordinates(rank)
        assert topology.rank(own) == rank
        assert topology.rank({"tp": own["tp"], "pp": own["pp"]}) == topology.rank({**own, "dp": 0, "cp": 0})


@untimed
@given(TOPOLOGIES, st.integers(1, 3), st.integers(1, 3))
def test_finer_axes_divide_the_ranks_that_read_different_tokens(topology, shard_size, expert):
    dp = topology.data_parallel_size * shard_size * expert
    topology = replace(topology, data_parallel_size=dp, expert_parallel_size=expert)
    sizes = topology.axis_sizes(shard_size=shard_size)
    assert list(sizes) == [axis for axis in AxisName if axis not in ("cp", "ep")] and math.prod(sizes.values()) == topology.world_size
    assert math.prod(sizes[axis] for axis in TOKENS) == dp * topology.degrees["cp"] == topology.num_token_ranks
    assert sizes[AxisName.SHARD] == shard_size and all(sizes[axis] == topology.degrees[axis] for axis in ("pp", "tp"))
    for whole in (shard_size * expert, 1):  # those that divide all else, or nobody
        sizes = topology.expert_axis_sizes(shard_size=whole)
        assert list(sizes) == [axis for axis in AxisName if axis != "cp"] and math.prod(sizes.values()) == topology.world_size
        assert sizes[AxisName.EXPERT] == expert and sizes[AxisName.SHARD] == max(whole // expert, 1)


def test_sets_of_axes_name_an_axis_once_and_miss_none():
    for axes in (TOKENS, LOSS, HOLDERS, COPIES, STAGE, EVERYBODY):
        assert len(set(axes)) == len(axes)
    among_others = {AxisName.CONTEXT, AxisName.EXPERT}
    assert set(EVERYBODY) == set(AxisName) - among_others == {*STAGE, AxisName.PIPELINE} == {*LOSS, AxisName.TENSOR} == {*HOLDERS, *COPIES}
    assert AxisName.REPLICATE not in HOLDERS, "ranks along it hold the same parts"


def test_an_unknown_axis_is_a_key_error():
    with pytest.raises(KeyError):
        Topology().group(0, "ep")


@untimed
@given(st.integers(1, 4), st.integers(1, 4), st.integers(1, 4), st.integers(1, 4))
def test_data_parallel_size_is_what_remains(tensor, context, pipeline, data_parallel):
    world_size = tensor * context * pipeline * data_parallel
    topology = build_topology(world_size=world_size, **degrees(tensor, context, pipeline))
    assert topology.data_parallel_size == data_parallel and topology.world_size == world_size


@untimed
@given(st.integers(-2, 40), st.integers(1, 3), st.integers(1, 3), st.integers(1, 3))
def test_a_misfit_names_the_nearest_sizes_that_fit(world_size, tensor, context, pipeline):
    model_ranks = tensor * context * pipeline
    fitting = [size for size in range(1, 100) if size % model_ranks == 0]
    if world_size in fitting:
        return
    with pytest.raises(TopologyError) as caught:
        build_topology(world_size=world_size, **degrees(tensor, context, pipeline))
    below, above = [size for size in fitting if size < world_size][-1:], [size for size in fitting if size > world_size][:1]
    nearest, planned = (" or ".join(f"{option}{size}" for size in below + above) for option in ("", "--world-size "))
    assert caught.value.problems == [
        f"world size {world_size} is not a positive multiple of parallel.tensor_parallel_size {tensor} x parallel.context_parallel_size {context} x "
        f"parallel.pipeline_parallel_size {pipeline} = {model_ranks}; start {nearest} processes (torchrun --nproc_per_node starts them, {planned} "
        "plans for them) or change the degrees."
    ]
    assert caught.value.exit_code == 2


@pytest.mark.parametrize(("suiting", "named"), [({2, 12, 48}, (12, 48)), ({48}, (48,)), ({2}, (2,)), (set(), (20, 22))])
def test_a_misfit_names_sizes_that_suit_the_rest_of_a_config_or_else_multiples(suiting, named):
    with pytest.raises(TopologyError) as caught:
        build_topology(world_size=21, **degrees(tensor=2), suits=lambda size: size in suiting)
    sizes, planned = " or ".join(map(str, named)), " or ".join(f"--world-size {size}" for size in named)
    said = f" = 2; start {sizes} processes (torchrun --nproc_per_node starts them, {planned} plans for them) or change the degrees."
    assert str(caught.value).endswith(said)


def test_experts_must_divide_the_data_parallel_ranks():
    assert build_topology(world_size=12, **degrees(tensor=2, expert=3)).data_parallel_size == 6
    with pytest.raises(TopologyError) as caught:
        build_topology(world_size=12, **degrees(tensor=2, expert=4))
    assert caught.value.problems == [
        "parallel.expert_parallel_size 4 does not divide the data-parallel size 6 (world size 12 / 2); choose a divisor."
    ]
