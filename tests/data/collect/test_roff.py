"""Man pages as plain text."""

from phase8.data.collect.roff import text_of_man_page

PAGE = r"""'\" t
.\" a comment
.TH THING 1 "2026" "Things"
.SH NAME
thing \- does \fIthings\fP \(em and \[aq]more\[aq]
.de XX
.  hidden
..
.SH "SEE ALSO"
.PP
.BR other (1),
.B bold words
.TP
.Fl a
A line with a back\eslash\" and a comment
.Nd described
"""


def test_requests_and_escapes_go_and_text_stays():
    assert text_of_man_page(PAGE).strip("\n") == (
        "NAME\nthing - does things -- and 'more'\n\nSEE ALSO\n\nother(1),\nbold words\n\n-a\nA line with a back\\slash\ndescribed"
    )


def test_a_text_without_roff_stays_as_it_is():
    assert text_of_man_page("one\ntwo") == "one\ntwo"
