import pytest

from sarathi_jax.scheduling.plan import Demand, FillToEdge, TokenBudget


def test_budget_clamps_once():
    budget = TokenBudget(5)
    assert [budget.take(3), budget.take(-2), budget.take(4), budget.take(1)] == [3, 0, 2, 0]
    assert budget.left == 0
    assert TokenBudget(-4).take(1) == 0


@pytest.mark.parametrize(
    ("num_decodes", "num_prefill_tokens", "limit"),
    [
        (0, 1, 64),  # below the smallest bucket: padded
        (10, 100, 128),  # 110 of 128 is full enough: padded
        (0, 150, 128),  # 150 of 256 is not: 128 now, 22 next
        (30, 150, 128),  # likewise: 98 of the prefill now
        (90, 80, 256),  # 128 would leave 38 tokens for a prefill of 80: it would drip
        (128, 1, 256),  # 128 would leave none
        (128, 0, 128),
        (129, 0, 256),  # decodes alone do not fit the lower one
        (5, 191, 256),
        (5, 5000, 512),  # more than enough work for the largest
        (512, 5000, 512),
    ],
)
def test_fill_to_the_edge(num_decodes, num_prefill_tokens, limit):
    assert FillToEdge((64, 128, 256, 512))(Demand(num_decodes, ((0, num_prefill_tokens),))) == limit


def test_small_steps_are_not_split():
    assert FillToEdge((8, 16, 32, 64, 128))(Demand(0, ((0, 33),))) == 64
    assert FillToEdge((8, 16, 32, 64, 128), flat_tokens=0)(Demand(0, ((0, 33),))) == 32
    assert FillToEdge((8, 16, 32, 64, 128))(Demand(0, ((0, 65),))) == 64
