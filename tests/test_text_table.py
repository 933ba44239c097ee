"""Tables of text, for a terminal and in Markdown."""

from megatron_lowbit.text_table import aligned, markdown

HEAD, ROWS = ["codec", "bits"], [["a", "16.00"], ["bf16-alike", "4"]]


def test_texts_begin_at_the_left_and_numbers_end_at_the_right():
    assert aligned([HEAD, *ROWS]) == ["codec        bits", "a           16.00", "bf16-alike      4"]
    assert aligned(ROWS, left=0, gap="|") == ["         a|16.00", "bf16-alike|    4"]


def test_markdown_says_on_which_side_a_column_is():
    assert markdown(HEAD, ROWS, left=1).splitlines() == [
        "| codec      |  bits |",
        "| ---        |  ---: |",
        "| a          | 16.00 |",
        "| bf16-alike |     4 |",
    ]
    assert markdown(HEAD, [["a", "b"]]).splitlines()[1] == "| ---   | ---  |"
