"""Recipes: sums of names, completed and checked."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from veneer.core import registry
from veneer.core.recipe import parse
from veneer.errors import UserError


def test_a_sum_is_read_with_fields_and_offers():
    recipe = parse("lora(rank=4, alpha=8.0)", rank=16, dropout=0.1)
    fields = recipe.part("delta").fields
    assert fields == {"rank": 4, "alpha": 8.0, "dropout": 0.1}  # what the text says wins over the offer


def test_the_canonical_text_reads_back_to_the_same_recipe():
    recipe = parse("lora(alpha=4, rank=2)")
    assert str(parse(str(recipe))) == str(recipe)


@pytest.mark.parametrize(
    "text, says",
    [
        ("lroa", 'did you mean "lora"'),
        ("", "not a name"),
        ("lora+rslora", "at most one delta"),
        ("lora+lora", "at most one delta"),
        ("lora(rank=0)", "at least 1"),
        ("lora(rank=2.5)", "a whole number"),
        ("lora(rnk=2)", 'did you mean "rank"'),
        ("lora(8)", "name=value"),
        ("lora(rank=", "not a name"),
        ("lora(rank=open('x'))", "name=value"),
        ("lora(dropout=1.0)", "less than 1"),
    ],
)
def test_a_bad_recipe_gets_one_sentence(text, says):
    with pytest.raises(UserError, match=says.replace("(", r"\(")) as error:
        parse(text)
    assert "\n" not in str(error.value)


def test_an_offer_that_nothing_takes_is_an_error():
    with pytest.raises(UserError, match="nothing in"):
        parse("bitfit", rank=3)


@given(st.text(max_size=30))
def test_any_text_is_read_or_refused(text):
    try:
        parse(text)
    except UserError as error:
        assert str(error)


def test_every_method_says_what_it_is():
    for m in registry.methods():
        assert m.summary.endswith("."), m.name
        assert m.axis in registry.AXES


def test_a_name_registers_once():
    with pytest.raises(ValueError, match="registered twice"):

        @registry.method("lora", axis="delta")
        class Other:
            """Not LoRA."""
