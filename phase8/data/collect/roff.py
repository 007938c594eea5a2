"""Plain text of man pages: requests and escapes of roff (the man and mdoc macros) are removed crudely, line by line."""

from __future__ import annotations

import re

_COMMENT = re.compile(r'\s*\\["#].*')
_REQUEST = re.compile(r"[.'][ \t]*([A-Za-z]{1,8})?[ \t]*(.*)")
_HEADINGS = {"SH", "SS", "Sh", "Ss"}
_BLANK = {"PP", "P", "LP", "Pp", "TP", "sp", "IP", "It", "HP", "TQ"}
# Requests whose arguments are no text.
_TITLES_AND_DEFINITIONS = {"TH", "Dd", "Dt", "Os", "so", "de", "ds", "nr", "if", "ie", "el", "tr"}
_LAYOUT = {"hy", "ad", "ft", "ta", "in", "ti", "ne", "nf", "fi", "ce", "br", "na", "nh", "RS", "RE", "EX", "EE", "Bl", "El", "Bd", "Ed"}
_WITHOUT_TEXT = _TITLES_AND_DEFINITIONS | _LAYOUT
_SPECIAL = {"aq": "'", "cq": "'", "oq": "'", "dq": '"', "lq": '"', "rq": '"', "bu": "*", "em": "--", "en": "-", "hy": "-", "co": "(C)", "ha": "^"}
_SPECIAL |= {"ti": "~", "rs": "\\", "mi": "-", "ga": "`", "bv": "|", "or": "|", "<=": "<=", ">=": ">=", "->": "->", "mu": "x", "di": "/"}
_ESCAPE = re.compile(
    r"\\(?:\((?P<two>..)|\[(?P<long>[^\]]*)\]|[f*n](?:\((?:..)|\[[^\]]*\]|.)|s[+-]?\d{1,2}|[hvwlLDo]'[^']*'|(?P<one>.))", re.DOTALL
)
_SINGLE = {"-": "-", "e": "\\", "\\": "\\", " ": " ", "~": " ", "0": " ", "'": "'", "`": "`", ".": "."}


def text_of_man_page(source: str) -> str:
    """The text of a man page: headings, paragraphs and arguments of font requests stay, everything else of roff goes."""
    lines: list[str] = []
    inside_definition = False
    for line in source.split("\n"):
        if inside_definition:
            inside_definition = not line.startswith("..")
            continue
        kept, inside_definition = _text_of_line(_COMMENT.sub("", line)), line.startswith((".de ", ".ig"))
        for part in () if kept is None else kept.split("\n"):
            if part or (lines and lines[-1]):  # one blank line in a row
                lines.append(part)
    return "\n".join(lines)


def _text_of_line(line: str) -> str | None:
    """The text of one line; an empty one begins a paragraph, and None is nothing at all."""
    if not line.startswith((".", "'")):
        return _without_escapes(line)
    found = _REQUEST.fullmatch(line)
    if found is None:
        return None
    name, arguments = found[1], found[2]
    if name is None or name in _WITHOUT_TEXT:
        return None
    words = [quoted or bare for quoted, bare in re.findall(r'"([^"]*)"|(\S+)', arguments)]
    text = _without_escapes(("" if re.fullmatch("[BIR]{2}", name) else " ").join(words))
    if name in _HEADINGS:
        return f"\n{text}"
    if name in _BLANK:
        return f"\n{text}" if text and name in ("IP", "It") else ""
    if name == "Fl":
        text = f"-{text}"
    return text or None


def _without_escapes(text: str) -> str:
    def replacement(match: re.Match[str]) -> str:
        special = match["two"] or match["long"]
        return _SPECIAL.get(special, "") if special else _SINGLE.get(match["one"] or "", "")

    return _ESCAPE.sub(replacement, text) if "\\" in text else text
