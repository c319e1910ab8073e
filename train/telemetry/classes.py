"""Token classes by the text of a piece alone: rules that hold for most programming languages, and for prose where words are words.

In this order, after blanks around the piece are taken off; the first rule that fits decides:

    whitespace  nothing is left
    comment     holds #, //, /*, */, <!--, --> or is made of dashes
    string      holds a quotation mark or a backquote
    number      begins with a digit, or with a dot and a digit
    keyword     is in KEYWORDS
    identifier  has a letter (of any script) or an underscore: names and words
    operator    is made of printable ASCII punctuation
    other       marks such as the end of a document, parts of a character, other symbols
"""

import re
from collections.abc import Callable

CLASSES = ("identifier", "keyword", "number", "string", "operator", "whitespace", "comment", "other")

_WORDS = """
abstract and as assert async await bool boolean break byte case catch char class const continue def default defer del delete do
double elif else elsif end enum except export extends extern False false final finally float fn for from func function global go
goto if impl implements import in include inline instanceof int interface is lambda let long loop match mod module mut namespace
new nil None not null or override package pass private protected pub public raise return short signed sizeof static
struct super switch template this throw throws trait True true try type typedef typeof union unless unsigned until use using var
virtual void volatile where while with yield SELECT FROM WHERE INSERT UPDATE DELETE JOIN GROUP ORDER BY CREATE TABLE
"""
KEYWORDS = frozenset(_WORDS.split())
"""Reserved words of C, C++, Go, Java, JavaScript, Python, Ruby, Rust and SQL that are one piece in many tokenizers."""

_COMMENT = re.compile(r"#|//|/\*|\*/|<!--|-->|^-{2,}$")
_NUMBER = re.compile(r"\.?\d")
_OPERATOR = re.compile(r"[!-/:-@\[-`{-~]+")


def token_class(text: str, mark: bool = False) -> str:
    """One of CLASSES. `mark`: the token stands for no text at all."""
    word = text.strip()
    if mark:
        return "other"
    if not word:
        return "whitespace"
    if _COMMENT.search(word):
        return "comment"
    if any(quote in word for quote in "\"'`"):
        return "string"
    if _NUMBER.match(word):
        return "number"
    if word in KEYWORDS:
        return "keyword"
    if any(character.isalpha() or character == "_" for character in word):
        return "identifier"
    return "operator" if _OPERATOR.fullmatch(word) else "other"


def piece_text(decode: Callable[[list[int]], str], token: int) -> tuple[str, bool]:
    """The text of one token, and whether it is a mark. Some tokenizers drop the first blank of a text, so empty is asked twice."""
    text = decode([token])
    if not text:
        text = decode([token, token])
    return text, not text
