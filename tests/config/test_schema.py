import ast
import inspect
from collections import defaultdict
from pathlib import Path

import pytest

from phase8.config import model_section, schema, validate
from phase8.config.describe import iterate_keys
from phase8.config.model_section import ModelSection
from phase8.config.schema import OptimSection

ROOT = Path(__file__).parents[2]


def attribute_reads(path: Path) -> set[tuple[str, str]]:
    """(receiver, attribute) of every `receiver.attribute`, the receiver by its last name."""
    reads = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Attribute) and isinstance(node.value, (ast.Name, ast.Attribute)):
            receiver = node.value.id if isinstance(node.value, ast.Name) else node.value.attr
            reads.add((receiver, node.attr))
    return reads


def keys_refused_until_built() -> set[str]:
    source = ast.parse(inspect.getsource(validate._not_built_yet))
    return {node.value for node in ast.walk(source) if isinstance(node, ast.Constant) and isinstance(node.value, str)}


def readers_inside_the_schema() -> dict[str, set[str]]:
    """Which properties and methods of sections read a key, by the key's last name."""
    readers = defaultdict(set)
    nodes = (node for file in (schema, model_section) for node in ast.walk(ast.parse(inspect.getsource(file))))
    for function in (node for node in nodes if isinstance(node, ast.FunctionDef)):
        for node in ast.walk(function):
            if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "self":
                readers[node.attr].add(function.name)
    return readers


def unread_keys(names) -> list[str]:
    """Keys that no code reads: neither as `section.key` nor through a property of the section."""
    rules_only = {ROOT / f"phase8/config/{name}.py" for name in ("schema", "model_section", "validate")}
    files = {path for folder in ("phase8", "launch", "tools") for path in (ROOT / folder).rglob("*.py")} - rules_only
    reads = set().union(*map(attribute_reads, files))
    refused, readers = keys_refused_until_built(), readers_inside_the_schema()

    def is_read(name: str) -> bool:
        section, leaf = name.split(".")[-2:]
        # A function may receive its section alone, then it is called `section`.
        return any((receiver, attribute) in reads for receiver in (section, "section") for attribute in {leaf, *readers[leaf]})

    return [name for name in names if name not in refused and not is_read(name)]


def test_every_key_is_read_somewhere():
    assert unread_keys(name for name, _ in iterate_keys()) == []


def test_the_search_for_dead_keys_finds_one():
    assert unread_keys(["train.warp_factor"]) == ["train.warp_factor"]


@pytest.mark.parametrize(("d_model", "width"), [(192, 512), (512, 1408), (768, 2048), (1000, 2688), (4096, 10944)])
def test_feed_forward_width_is_eight_thirds_rounded_up(d_model, width):
    assert ModelSection(d_model=d_model).feed_forward_width == width
    assert width % 64 == 0 and 0 <= width - 8 * d_model / 3 < 64


def test_derived_model_sizes():
    default = ModelSection(d_model=256, num_heads=8)
    assert (default.head_width, default.attention_width, default.convolution_taps) == (32, 256, 4)
    own = ModelSection(block="transformer", d_model=256, num_heads=3, head_size=10, ffn_size=7)
    assert (own.head_width, own.attention_width, own.feed_forward_width, own.convolution_taps) == (10, 30, 7, 1)
    assert ModelSection(block="transformer", convolution_size=3).convolution_taps == 3


@pytest.mark.parametrize(
    ("settings", "has_path", "scalars"),
    [
        ({"global_gate": "scalar"}, True, 2),
        ({"global_gate": "scalar", "chain": "gate"}, True, 3),
        ({"global_gate": "scalar", "global_path": "delta"}, True, 3),
        ({"global_gate": "scalar", "global_path": "delta", "chain": "both"}, True, 4),
        ({}, True, 1),
        ({"low_rank_rank": 5}, True, 2),
        ({"low_rank_rank": 5, "global_gate": "channel"}, True, 1),
        ({"global_path": "delta", "chain": "both"}, True, 3),
        ({"global_path": "none"}, False, 0),
        ({"block": "transformer", "global_path": "delta", "chain": "both"}, False, 0),
    ],
)
def test_scalars_of_the_global_path(settings, has_path, scalars):
    model = ModelSection(**settings)
    assert (model.has_global_path, model.scalars_per_head) == (has_path, scalars)


def test_final_decay_is_a_tenth_unless_given():
    assert [OptimSection().final_decay_steps(n) for n in (1, 9, 10, 205)] == [1, 1, 1, 20]
    assert OptimSection(decay_steps=7).final_decay_steps(205) == 7
