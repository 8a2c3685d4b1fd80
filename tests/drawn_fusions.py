"""Hypothesis strategies for the fields of fusions: layers each once, as recipes must have them."""

from typing import Any

from hypothesis import strategies as st

__all__ = ["dci_fields", "sparse_fields"]


def sparse_fields(deepest: int, most_layers: int) -> st.SearchStrategy[dict[str, Any]]:
    """Base and layers of a sci or an sti fusion over layers 0..deepest."""
    distinct = st.lists(st.integers(0, deepest), min_size=2, max_size=1 + most_layers, unique=True)
    return distinct.map(lambda layers: {"base": layers[0], "layers": tuple(layers[1:])})


def dci_fields(deepest: int, most_groups: int) -> st.SearchStrategy[dict[str, Any]]:
    """Base and groups of a dci fusion over layers 0..deepest; groups may overlap."""
    layers = st.integers(0, deepest)
    group = st.tuples(layers, layers).map(lambda pair: (min(pair), max(pair)))
    fields = st.fixed_dictionaries({"base": layers, "groups": st.lists(group, min_size=1, max_size=most_groups, unique=True).map(tuple)})
    return fields.filter(lambda drawn: (drawn["base"], drawn["base"]) not in drawn["groups"])
