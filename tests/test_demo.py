"""The demo: its data, its score, and a quick run of the whole job."""

from veneer.demo.score import Score, score
from veneer.demo.words import Word, dictionary, split


def test_score_counts_edits_over_phonemes_and_exact_words():
    pairs = [(["K", "AE", "T"], ("K", "AE", "T")), (["D", "AO"], ("D", "AO", "G"))]
    assert score(pairs) == Score(error_rate=1 / 6, exact=1 / 2)


def test_a_rambling_word_counts_at_most_three_times_its_length():
    assert score([(["X"] * 50, ["K", "AE"])]).error_rate == 3.0


def test_dictionary_drops_stress_and_keeps_the_first_pronunciation():
    words = {word.spelling: word for word in dictionary()}
    assert words["cat"].phonemes == ("K", "AE", "T")
    assert words["read"].phonemes == ("R", "EH", "D")  # listed before R IY D
    assert len({p for word in words.values() for p in word.phonemes}) == 39  # the phoneme set of the dictionary
    assert len(words) > 100_000


def test_a_row_is_the_spelled_word_and_its_phonemes():
    assert Word("cat", ("K", "AE", "T")).row() == {"prompt": "c a t ->", "completion": " K AE T"}


def test_no_held_out_word_is_trained_on_and_the_seed_decides():
    train, held = split(200, seed=0)
    assert len(held) == 200 and not {w.spelling for w in held} & {w.spelling for w in train}
    assert split(200, seed=0)[1] == held
    assert split(200, seed=1)[1] != held
