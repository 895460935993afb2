"""Which places of a model a pattern names, and what is known about their channels."""

from collections import OrderedDict

import pytest
from torch import nn

from esper.surgery.sites import Site, find_sites, input_features, output_channels


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc1, self.act, self.fc2 = nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 4)


def model():
    parts = [("blocks", nn.ModuleList(Block() for _ in range(3))), ("head", nn.Linear(4, 2))]
    root = nn.Module()
    for name, part in parts:
        root.add_module(name, part)
    return root


def test_a_path_names_one_module():
    assert find_sites(model(), "blocks.1.fc1", "chunk") == [
        Site("blocks.1.fc1", "blocks.1.fc1", "blocks.1.fc1")
    ]


@pytest.mark.parametrize(
    ("pattern", "names"),
    [
        ("blocks.*.fc1", ["blocks.0.fc1", "blocks.1.fc1", "blocks.2.fc1"]),
        ("blocks.1.fc*", ["blocks.1.fc1", "blocks.1.fc2"]),
        ("*.2.*2", ["blocks.2.fc2"]),
        # a star stands for one part of a path
        ("*", ["blocks", "head"]),
        ("hea.", None),
    ],
)
def test_a_star_is_part_of_one_part_of_a_path(pattern, names):
    if names is None:
        with pytest.raises(ValueError, match="matches none"):
            find_sites(model(), pattern, "chunk")
    else:
        assert [s.name for s in find_sites(model(), pattern, "chunk")] == names


def test_the_stars_of_a_span_stand_for_the_same_on_both_sides():
    sites = find_sites(model(), "blocks.*.fc1 -> blocks.*.fc2", "span")
    assert sites == [
        Site(f"blocks.{i}.fc1->blocks.{i}.fc2", f"blocks.{i}.fc1", f"blocks.{i}.fc2")
        for i in range(3)
    ]


def test_a_module_alone_is_a_span_from_its_input_to_its_output():
    assert find_sites(model(), "head", "span") == [Site("head->head", "head", "head")]


def test_the_lattice_itself_is_no_site():
    host = nn.Sequential(OrderedDict(fc=nn.Linear(2, 2)))
    host.fc.add_module("kasmina", nn.Linear(2, 2))
    assert [s.name for s in find_sites(host, "fc*", "chunk")] == ["fc"]
    with pytest.raises(ValueError, match=r"its modules are: fc\.$"):
        find_sites(host, "fc.*", "chunk")


@pytest.mark.parametrize(
    ("pattern", "geometry", "match"),
    [
        ("blocks.*.fc3", "chunk", r"matches none; its modules are: blocks, blocks\.0, .*, head\.$"),
        ("blocks.*.fc1->blocks.*.fc9", "span", "matches none"),
        ("blocks.0.fc1->blocks.0.fc2", "chunk", r'one module for chunk seeds.*geometry="span"'),
        ("blocks.*.fc1->head", "span", "as many stars left as right"),
        ("blocks.0.fc1->blocks.1.fc2", "span", "inside one parent module"),
        ("blocks.0.fc1->head", "span", "inside one parent module"),
    ],
)
def test_wrong_patterns_are_refused(pattern, geometry, match):
    with pytest.raises(ValueError, match=match):
        find_sites(model(), pattern, geometry)


@pytest.mark.parametrize(
    ("module", "channels", "axis"),
    [
        (nn.Linear(2, 5), 5, -1),
        (nn.Conv1d(2, 5, 3), 5, -2),
        (nn.Conv2d(2, 5, 3), 5, -3),
        (nn.Conv3d(2, 5, 3), 5, -4),
        (nn.LayerNorm((3, 5)), 5, -1),
        (nn.RMSNorm(5), 5, -1),
        (nn.BatchNorm1d(5), 5, 1),
        (nn.BatchNorm2d(5), 5, -3),
        (nn.BatchNorm3d(5), 5, -4),
        (nn.GroupNorm(1, 5), 5, 1),
        (nn.Embedding(9, 5), 5, -1),
        (nn.MultiheadAttention(6, 2), 6, -1),
    ],
)
def test_channels_of_known_modules(module, channels, axis):
    assert output_channels(module) == (channels, axis)


def test_channels_of_other_modules_are_not_guessed():
    assert output_channels(nn.ReLU()) is None
    assert output_channels(nn.Sequential(nn.Linear(2, 2))) is None
    assert input_features(nn.ReLU()) is None
    assert input_features(nn.GroupNorm(1, 5)) is None


def test_inputs_of_known_modules():
    modules = (nn.Linear(3, 5), nn.Conv1d(3, 5, 3), nn.Conv2d(3, 5, 3), nn.LayerNorm(3))
    assert [input_features(m) for m in modules] == [3, 3, 3, 3]
