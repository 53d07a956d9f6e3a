"""Scores against scikit-learn, scipy and the textbook table of edit distance."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from veneer.data import metrics
from veneer.errors import UserError

classes = st.lists(st.tuples(st.integers(0, 3), st.integers(0, 3)), min_size=1, max_size=40)
numbers = st.lists(st.tuples(st.integers(-5, 5), st.integers(-5, 5)), min_size=3, max_size=30)
words = st.lists(st.sampled_from("abc"), max_size=12)


@pytest.mark.filterwarnings("ignore:A single label")
@given(classes)
@settings(deadline=None, max_examples=60)
def test_class_scores_equal_scikit_learn(pairs):
    from sklearn.metrics import accuracy_score, f1_score, matthews_corrcoef

    references, predictions = zip(*pairs)
    assert metrics.accuracy(references, predictions) == pytest.approx(accuracy_score(references, predictions))
    assert metrics.macro_f1(references, predictions) == pytest.approx(
        f1_score(references, predictions, average="macro")
    )
    assert metrics.matthews(references, predictions) == pytest.approx(matthews_corrcoef(references, predictions))


@given(numbers)
@settings(deadline=None, max_examples=60)
def test_correlations_equal_scipy(pairs):
    from scipy.stats import pearsonr, spearmanr

    x, y = map(list, zip(*pairs))
    if len(set(x)) == 1 or len(set(y)) == 1:
        assert metrics.pearson(x, y) == metrics.spearman(x, y) == 0.0
    else:
        assert metrics.pearson(x, y) == pytest.approx(pearsonr(x, y)[0], abs=1e-12)
        assert metrics.spearman(x, y) == pytest.approx(spearmanr(x, y)[0], abs=1e-12)


def table_distance(one, other):
    """Wagner and Fischer (1974), the whole table."""
    table = np.zeros((len(one) + 1, len(other) + 1), int)
    table[:, 0], table[0] = range(len(one) + 1), range(len(other) + 1)
    for i, a in enumerate(one, 1):
        for j, b in enumerate(other, 1):
            table[i, j] = min(table[i - 1, j] + 1, table[i, j - 1] + 1, table[i - 1, j - 1] + (a != b))
    return table[-1, -1]


@given(words, words)
@settings(deadline=None, max_examples=200)
def test_edit_distance_equals_the_whole_table(one, other):
    assert metrics.edit_distance(one, other) == table_distance(one, other)


def test_edit_distance_beyond_a_machine_word():
    generator = np.random.default_rng(0)
    one, other = generator.integers(0, 4, 150).tolist(), generator.integers(0, 4, 170).tolist()
    assert metrics.edit_distance(one, other) == table_distance(one, other)
    assert metrics.edit_distance("kitten", "sitting") == 3


def test_error_rate_caps_a_row_and_weighs_by_length():
    assert metrics.error_rate([["a", "b"], ["c"] * 8], [["a", "x"], ["c"] * 8]) == 1 / 10
    assert metrics.error_rate(["ab", "cdefghij"], ["x" * 50, "cdefghij"]) == 2 * 3.0 / 10
    assert metrics.error_rate(["ab"], ["x" * 50], cap=1.0) == 1.0
    assert metrics.error_rate(["", "ab"], ["xyz", "ab"]) == 0.0  # an empty reference has no length to count against


def test_exact_match_ignores_only_white_space():
    assert metrics.exact_match(["a  b\n", "A", "c"], ["a b", "a", "c"]) == pytest.approx(2 / 3)


def test_perplexity():
    assert metrics.perplexity(math.log(7)) == pytest.approx(7)
    assert metrics.perplexity(1e4) == math.inf


@pytest.mark.parametrize("score", [metrics.accuracy, metrics.matthews, metrics.spearman, metrics.error_rate])
def test_sides_of_different_length_are_refused(score):
    with pytest.raises(UserError, match="2 references and 1 predictions"):
        score([[1], [2]], [[1]])
    with pytest.raises(UserError, match="at least one"):
        score([], [])
    with pytest.raises(UserError, match="every reference is empty"):
        metrics.error_rate([""], ["a"])
