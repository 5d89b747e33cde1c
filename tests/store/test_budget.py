"""Ranks under a budget against every possible choice on small cases, and against equal ranks on random ones."""

import itertools

import numpy as np
import pytest

from prep.store.budget import Directions

ORDERS = {
    "descending": lambda t: np.sort(t)[::-1],
    "ascending": np.sort,  # as of `bottom`
    "any": lambda t: t,  # as of power 1 and `activation`
    "flat": lambda t: np.full(len(t), t[0]),
    "zeros": lambda t: np.sort(np.where(t >= np.median(t), t, 0))[::-1],
}


def made(rng, order, layers=4, longest=5):
    """Layers of 1 to `longest` directions that together keep at most 1, of different costs."""
    kept = {}
    for i in range(layers):
        t = ORDERS[order](rng.pareto(0.8, rng.integers(1, longest + 1)) + 1e-3)
        kept[f"l{i}"] = t / t.sum() * rng.uniform(0.3, 1)
    return Directions(kept, {layer: int(rng.choice([3, 5, 8])) for layer in kept})


def every(of):
    """(parameters, share, ranks) of all choices."""
    for ranks in itertools.product(*(range(1, len(t) + 1) for t in of.kept.values())):
        chosen = dict(zip(of.kept, ranks, strict=True))
        parameters = sum(rank * of.costs[layer] for layer, rank in chosen.items())
        share = np.mean([of.kept[layer][:rank].sum() for layer, rank in chosen.items()])
        yield parameters, float(share), chosen


@pytest.mark.parametrize("order", ORDERS)
def test_against_every_choice(order):
    """Never over the budget; the best there is at the budgets that end a side, elsewhere within what one side keeps."""
    rng, exact, gaps = np.random.default_rng(3), 0, []
    for _ in range(12):
        of = made(rng, order)
        choices = list(every(of))
        sides = [(of._sums[layer][b] - of._sums[layer][a]) / len(of.kept) for layer, a, b in of._sides()]
        for budget in sorted({parameters for parameters, _, _ in choices}):
            ranks = of.within(budget)
            best = max(share for parameters, share, _ in choices if parameters <= budget)
            assert of.parameters(ranks) <= budget
            assert of.share(ranks) <= best + 1e-12
            assert of.share(ranks) >= best - max(sides, default=0) - 1e-12
            gaps.append(best - of.share(ranks))
            exact += gaps[-1] < 1e-12
        assert_best_at_the_ends_of_sides(of, choices)
    assert exact > 0.6 * len(gaps) and np.mean(gaps) < 0.01


def assert_best_at_the_ends_of_sides(of, choices):
    ranks = of.least
    for layer, first, last in of._sides():
        assert ranks[layer] == first  # in order, without gaps
        ranks[layer] = last
        budget = of.parameters(ranks)
        best = max(share for parameters, share, _ in choices if parameters <= budget)
        assert of.share(ranks) == pytest.approx(best, abs=1e-12)
        assert of.share(of.within(budget)) == pytest.approx(best, abs=1e-12)


@pytest.mark.parametrize("order", ORDERS)
def test_never_worse_than_equal_ranks(order):
    """For the parameters of every equal rank, and one more or fewer; for a share, no dearer than the equal rank."""
    rng = np.random.default_rng(5)
    for _ in range(8):
        of = made(rng, order, layers=30, longest=40)
        for rank in (1, 2, 7, 20, 40):
            equal = of.equal(rank)
            for budget in (of.parameters(equal), of.parameters(equal) + 1):
                ranks = of.within(budget)
                assert of.parameters(ranks) <= budget
                assert of.share(ranks) >= of.share(equal) - 1e-12
                assert all(1 <= rank <= len(of.kept[layer]) for layer, rank in ranks.items())
            assert of.equal(of.equal_within(of.parameters(equal))) == equal
            share = of.share(equal) - 1e-9
            assert of.share(of.keeping(share)) >= share - 1e-12
            assert of.parameters(of.keeping(share)) <= of.parameters(equal)


@pytest.mark.parametrize("order", ORDERS)
def test_the_fewest_parameters_for_a_share(order):
    """Reached; and the cheapest choice that reaches it is at most one side cheaper."""
    rng = np.random.default_rng(7)
    for _ in range(12):
        of = made(rng, order)
        choices = list(every(of))
        dearest = max((b - a) * of.costs[layer] for layer, a, b in [*of._sides(), ("l0", 0, 1)])
        for share in np.linspace(of.share(of.least), of.share(of.most), 7):
            ranks = of.keeping(share)
            assert of.share(ranks) >= share - 1e-12
            cheapest = min(parameters for parameters, kept, _ in choices if kept >= share - 1e-12)
            assert cheapest <= of.parameters(ranks) <= cheapest + dearest


def test_a_long_side_is_not_taken_by_its_first_direction():
    """a's second direction is worth nothing, and its third most of all: b's are worth more only each by itself."""
    of = Directions({"a": np.array([0.1, 0, 0.9]), "b": np.array([0.3, 0.2, 0.1])}, {"a": 1, "b": 1})
    assert of.within(3) == {"a": 1, "b": 2}
    assert of.within(4) == {"a": 3, "b": 1}
    assert of.within(5) == {"a": 3, "b": 2}
    assert of.keeping(0.65) == {"a": 3, "b": 1}
    assert of.keeping(0.66) == {"a": 3, "b": 2}


def test_what_costs_more_must_keep_more():
    of = Directions({"a": np.array([0.5, 0.2]), "b": np.array([0.5, 0.3])}, {"a": 1, "b": 2})
    assert of.within(4) == {"a": 2, "b": 1}
    assert of.within(6) == {"a": 2, "b": 2}


def test_directions_that_keep_nothing_are_not_bought():
    of = Directions({"a": np.array([1.0, 0, 0]), "b": np.array([0.0, 0])}, {"a": 1, "b": 1})
    assert of.within(5) == of.keeping(0.5) == {"a": 1, "b": 1}
    assert of.equal_within(1) == 0
