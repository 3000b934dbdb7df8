from hypothesis import given
from hypothesis import strategies as st

from training.html_text import html_to_text


def test_paragraphs_are_apart_by_an_empty_line_and_lines_inside_them_are_joined() -> None:
    assert html_to_text("<p>One\n  line.</p>\n<p>Another <b>bold</b>, <i>line</i>.</p>") == (
        "One line.\n\nAnother bold, line."
    )


def test_head_scripts_and_styles_are_no_text() -> None:
    page = "<html><head><title>No</title><style>p {}</style></head><body><script>no()</script><p>Yes</p></body></html>"
    assert html_to_text(page) == "Yes"


def test_character_references_are_decoded() -> None:
    assert html_to_text("<p>&lt;p&gt; &amp;&nbsp;caf&eacute; &#8217;</p>") == "<p> & café ’"


def test_list_items_get_a_bullet_even_around_a_block() -> None:
    assert html_to_text("<ul><li>one</li><li><div>two</div><div>more</div></li><li></li><li>three</ul>") == (
        "- one\n- two\n\nmore\n\n- three"
    )


def test_preformatted_text_keeps_its_lines_and_indentation() -> None:
    page = "<p>Run:</p><pre>if <b>a</b>:\n    b   c\n</pre><p>Then.</p>"
    assert html_to_text(page) == "Run:\n\nif a:\n    b   c\n\nThen."


def test_cells_of_a_row_share_a_line() -> None:
    assert html_to_text("<table><tr><td>a</td><td>b</td></tr><tr><td>c</td></tr></table>") == "a b\nc"


def test_named_elements_are_left_out_with_all_that_is_in_them() -> None:
    page = '<div class="nav top">Home <div>Up</div><p>Next</div><p id="nav">Kept</p><p id="foot">Left out</p>End'
    assert html_to_text(page, skip=(".nav", "#foot")) == "Kept\n\nEnd"


def test_a_void_element_that_is_left_out_hides_nothing_else() -> None:
    assert html_to_text('a<img class="x">b', skip=(".x",)) == "ab"


def test_text_without_markup_comes_back() -> None:
    assert html_to_text("a < b and c > d") == "a < b and c > d"


@given(st.text(alphabet="<>/ap&;\n \"'=!-prediv", max_size=60))
def test_any_input_gives_stripped_text(page: str) -> None:
    text = html_to_text(page, skip=(".a",))
    assert text == text.strip()
    assert "\n\n\n" not in text
