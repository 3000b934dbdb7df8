"""Agreement with a reference."""

from hypothesis import given
from hypothesis import strategies as st

from evaluation.agreement import common_prefix, mean_agreement, measure_agreement, token_agreement

TOKENS = st.lists(st.integers(0, 2), max_size=6)


def test_measures_by_hand() -> None:
    measured = measure_agreement([[1, 2, 3], [1, 9, 3], [1, 2, 3, 4], []], reference=[1, 2, 3])
    assert measured.equal == 1 / 4
    assert measured.common_prefix == (3 + 1 + 3 + 0) / 4
    assert measured.token_agreement == (1 + 2 / 3 + 3 / 4 + 0) / 4
    assert measured.reference_tokens == 3


def test_two_empty_answers_agree() -> None:
    assert measure_agreement([[]], []).to_json() == {
        "equal": 1.0,
        "common_prefix": 0.0,
        "token_agreement": 1.0,
        "reference_tokens": 0.0,
    }


def test_mean_is_over_prompts() -> None:
    mean = mean_agreement([measure_agreement([[1], [1]], [1]), measure_agreement([[2]], [1, 1])])
    assert (mean.equal, mean.common_prefix, mean.token_agreement, mean.reference_tokens) == (0.5, 0.5, 0.5, 1.5)


@given(TOKENS, TOKENS)
def test_prefix_is_common_and_longest(first: list[int], second: list[int]) -> None:
    length = common_prefix(first, second)
    assert first[:length] == second[:length]
    assert length == min(len(first), len(second)) or first[length] != second[length]


@given(TOKENS, TOKENS)
def test_token_agreement_is_symmetric_and_full_for_equal_texts_only(first: list[int], second: list[int]) -> None:
    assert token_agreement(first, second) == token_agreement(second, first)
    assert (token_agreement(first, second) == 1.0) == (first == second)
