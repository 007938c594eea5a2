"""What one file gives: its text, its docstrings, or the reason why it is left out."""

import gzip

import pytest

from phase8.data.collect.documents import MAX_FILE_BYTES, NotADocumentError, docstrings, document_of, is_wanted

LONG = "A sentence that says nothing much but is long enough. " * 4


@pytest.mark.parametrize(
    ("kind", "path", "wanted"),
    [
        ("python", "/a/b.py", True),
        ("python", "/a/b.pyi", False),
        ("c", "/a/b.cuh", True),
        ("c", "/a/b.py", False),
        ("prose", "/a/b.py", True),
        ("prose", "/a/b.txt.gz", True),
        ("prose", "/usr/share/man/man3/printf.3.gz", True),
        ("prose", "/usr/share/man/de/man1/ls.1", True),
        ("prose", "/usr/lib/libz.so.1", False),
        ("prose", "/a/x.dist-info/METADATA", True),
    ],
)
def test_names_decide_which_files_are_read(kind, path, wanted):
    assert is_wanted(kind, path) is wanted


def test_docstrings_of_a_module_its_classes_and_functions_in_order():
    method = '        async def f(self):\n            "Method."\n'
    source = f'"""Module."""\nif True:\n    class A:\n        """Class.\n\n        More.\n        """\n{method}x = "none"\n'
    assert docstrings(source) == "Module.\n\nClass.\n\nMore.\n\nMethod."


@pytest.mark.parametrize("head", ["try:\n    pass\nexcept E:", "try:\n    pass\nfinally:", "match x:\n  case 1:", "with a as b:"])
def test_docstrings_below_any_statement_are_found(head):
    """Those of a function that a handler of `ImportError` defines were left out."""
    assert docstrings(f'{head}\n    def f():\n        "Function."\n') == "Function."


def test_a_document_has_no_trailing_spaces(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbf\n\nfirst  \r\n  second\t\n" + LONG.encode() + b"\n\n")
    assert document_of("prose", tmp_path / "a.txt") == f"first\n  second\n{LONG.rstrip()}"


def test_man_pages_and_descriptions_of_packages(tmp_path):
    page = tmp_path / "man1" / "x.1.gz"
    page.parent.mkdir()
    page.write_bytes(gzip.compress(f".SH NAME\n.B {LONG}".encode()))
    (tmp_path / "METADATA").write_text(f"Name: x\nVersion: 1\n\n{LONG}")
    assert document_of("prose", page) == f"NAME\n{LONG.rstrip()}"
    assert document_of("prose", tmp_path / "METADATA") == LONG.rstrip()


@pytest.mark.parametrize(
    ("name", "content", "reason"),
    [
        ("a.txt", b"\0" + LONG.encode(), "binary"),
        ("a.txt", b"\xff" + LONG.encode(), "not UTF-8"),
        ("a.txt", b"short", "below 128 bytes"),
        ("a.txt", b"a " * MAX_FILE_BYTES, "above 1,000,000 bytes"),
        ("a.txt", b"a " * 5000, "lines of more than 5,000 characters"),
        ("a.txt", b"0x1234, 0x5678\n" * 50, "mostly numbers or symbols"),
        ("a.txt.gz", LONG.encode(), "unreadable"),
        ("a.py", b"def (:\n" + LONG.encode(), "Python that cannot be parsed"),
        ("a.py", b'"""' + LONG.encode() + b'\\ud800"""', "not UTF-8"),
        ("missing.txt", None, "unreadable"),
    ],
)
def test_what_is_left_out_has_a_reason(tmp_path, name, content, reason):
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(NotADocumentError, match=reason):
        document_of("prose", tmp_path / name)
