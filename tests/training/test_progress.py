"""What a terminal shows of a run."""

from bmtk.training.progress import evaluation_line


def test_an_evaluation_is_a_line_in_words_and_counts_are_whole():
    line = evaluation_line(20, {"validation/bits_per_byte": 2.19494, "validation/tokens": 55989, "x": float("nan")})
    assert line == "step 20: validation bits per byte 2.1949, validation tokens 55,989, x nan"
    assert evaluation_line(1, {"rank": 1500.25}) == "step 1: rank 1500.2500"
