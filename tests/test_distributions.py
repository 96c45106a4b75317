"""How a budget is spread: hand-worked densities, and integers that always add up."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rarefy import er, erk, uniform
from rarefy.distributions import exact_counts

RULES = {"uniform": uniform, "er": er, "erk": erk}


def test_erk_by_hand():
    """(10 + 100) / 1000 = .11 and (50 + 50) / 2500 = .04, scaled by c = 700 / (110 + 100) to keep 700 of 3500."""
    found = erk({"a": (10, 100), "b": (50, 50)}, 0.2)
    assert found == pytest.approx({"a": 0.11 * 700 / 210, "b": 0.04 * 700 / 210})
    assert 1000 * found["a"] + 2500 * found["b"] == pytest.approx(700)


def test_erk_caps_at_one_and_spreads_the_rest():
    """b would get (204 / 122) * .6 = 1.003; capped, it leaves 204 - 20 of 1000 to a."""
    assert erk({"a": (10, 100), "b": (10, 2)}, 0.2) == pytest.approx({"a": 0.184, "b": 1.0})


def test_erk_caps_in_several_rounds():
    """At first only c passes 1 (c = 1010.6 / 228, b gets .985); with its excess b does too (985.6 / 218, 1.005)."""
    shapes = {"a": (100, 100), "b": (9, 9), "c": (5, 5)}
    wanted = 0.1 * (10_000 + 81 + 25)
    assert erk(shapes, 0.1) == pytest.approx({"a": (wanted - 81 - 25) / 10_000, "b": 1.0, "c": 1.0})


def test_er_and_erk_differ_for_convolutions_only():
    shapes = {"conv": (64, 3, 3, 3), "linear": (100, 64)}
    share = {"conv": (64 + 3) / (64 * 3), "linear": 164 / 6400}
    kernel_share = {"conv": (64 + 3 + 3 + 3) / (64 * 27), "linear": 164 / 6400}
    for found, wanted in ((er(shapes, 0.05), share), (erk(shapes, 0.05), kernel_share)):
        assert found["conv"] / found["linear"] == pytest.approx(wanted["conv"] / wanted["linear"])
        assert 1728 * found["conv"] + 6400 * found["linear"] == pytest.approx(0.05 * 8128)
    matrices = {"a": (10, 40), "b": (30, 30)}
    assert er(matrices, 0.3) == erk(matrices, 0.3)


def test_power_moves_towards_uniform():
    shapes = {"a": (10, 100), "b": (50, 50)}
    assert erk(shapes, 0.2, power=0.0) == pytest.approx(uniform(shapes, 0.2))
    assert erk(shapes, 0.2)["a"] > erk(shapes, 0.2, power=0.5)["a"] > 0.2


@pytest.mark.parametrize("rule", RULES.values())
def test_bad_input(rule):
    for density in (0.0, -0.1, 1.1, float("nan")):
        with pytest.raises(ValueError, match=r"density must lie in \(0, 1\], got"):
            rule({"a": (3, 3)}, density)
    with pytest.raises(ValueError, match="shapes is empty"):
        rule({}, 0.5)


SHAPES = st.dictionaries(
    st.text("abc", min_size=1, max_size=4), st.tuples(st.integers(1, 60), st.integers(1, 60)), min_size=1, max_size=7
)
DENSITIES = st.floats(0.001, 1.0)


@given(SHAPES, DENSITIES, st.sampled_from(sorted(RULES)))
def test_densities_are_densities(shapes, density, rule):
    found = RULES[rule](shapes, density)
    assert list(found) == list(shapes)
    assert all(0 < value <= 1 for value in found.values())
    total = sum(out * inputs for out, inputs in shapes.values())
    kept = sum(found[name] * out * inputs for name, (out, inputs) in shapes.items())
    assert kept == pytest.approx(density * total)


@given(SHAPES, DENSITIES, st.sampled_from(sorted(RULES)), st.sampled_from([1, 2, 4]))
def test_counts_are_exact(shapes, density, rule, block):
    """In blocks too: the densities come from the entries, the counts from the units."""
    shapes = {name: (out * block, inputs * block) for name, (out, inputs) in shapes.items()}
    sizes = {name: out * inputs // block**2 for name, (out, inputs) in shapes.items()}
    densities = RULES[rule](shapes, density)
    counts = exact_counts(densities, sizes, density)
    total = round(density * sum(sizes.values()))
    assert sum(counts.values()) == total and list(counts) == list(sizes)
    assert all(0 <= counts[name] <= sizes[name] for name in sizes)
    if total >= len(sizes):
        assert min(counts.values()) >= 1
    given_away = sum(counts[name] == 1 and densities[name] * sizes[name] < 1 for name in sizes)
    for name in sizes:
        assert abs(counts[name] - densities[name] * sizes[name]) <= 1 + given_away


def test_counts_go_to_the_largest_remainder():
    """Ideal 2.5, 2.3, 1.2 of 10 each: total 6, so 2 + 2 + 1 and one more for the first."""
    assert exact_counts({"a": 0.25, "b": 0.23, "c": 0.12}, dict.fromkeys("abc", 10), 0.2) == {"a": 3, "b": 2, "c": 1}


def test_equal_remainders_go_to_the_earlier_layer():
    assert exact_counts(dict.fromkeys("abcd", 0.25), dict.fromkeys("abcd", 2), 0.25) == {"a": 1, "b": 1, "c": 0, "d": 0}


def test_counts_repair_densities_that_miss_the_total():
    assert sum(exact_counts({"a": 0.9, "b": 0.9}, {"a": 10, "b": 10}, 0.1).values()) == 2
    assert exact_counts({"a": 0.1, "b": 0.1}, {"a": 10, "b": 3}, 1.0) == {"a": 10, "b": 3}
