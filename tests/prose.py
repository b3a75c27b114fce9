"""What a machine can check of the prose: `python -m tests.prose [PAGE ...]`.

The rules are those of CONTRIBUTING.md, "The prose": sentences of 25 words at most, no
banned word, no term that the page neither explains nor links, no difference called a
gain whose interval holds 0. Code, tables, formulas and generated parts are left out.
"""

import pathlib
import re
import sys
from collections.abc import Iterator, Sequence

ROOT = pathlib.Path(__file__).parents[1]
LONGEST = 25
GLOSSARY = "will-it-help.md#glossary"

BANNED = {
    r"(?<!in )turns?|turned|turning": "say that the sign or the direction changes",
    r"rooms?": "a module",
    r"walls?": "no figure of speech",
    r"ties?|tied": "a loss equal to b; not told apart",
    r"surely": "the interval leaves out 0",
    r"as published": "without band or averaging",
    r"as it stands|as they stand|of which": "normal word order",
    r"readouts?": "last or averaged weights",
    r"(rate|share) of (flips|flipped labels)|rate of wrong labels": (
        "share of wrong labels"
    ),
    r"disasters?|coins?": "no figure of speech",
    r"regulariz\w+|behavior\w*|colors?|favor\w*|centers?|labeled|modeling": "British",
}
# a page that uses one of these words explains it, *so*, links it, or links the glossary
TERMS = (
    *("band", "stroke", "window", "noise floor", "stop and flood", "raw loss"),
    *("sweep", "plain run", "last weights", "not told apart"),
)
CLAIMS = r"\b(adds?|gains?|gained|better|ahead|worth|makes up)\b"
MINUS = "\N{MINUS SIGN}"
INTERVAL = re.compile(rf"([+{MINUS}-]?\d+(?:\.\d+)?) ± (\d+(?:\.\d+)?)")

LEFT_OUT = [
    re.compile(r"^(`{3,}|~{3,}).*?^\1$", re.DOTALL | re.MULTILINE),
    re.compile(r"<!-- table:([\w-]+) -->.*?<!-- /table:\1 -->", re.DOTALL),
    re.compile(r"<!--.*?-->", re.DOTALL),
    re.compile(r"\$\$.*?\$\$", re.DOTALL),
    re.compile(r"^\s*\|.*$", re.MULTILINE),
    re.compile(r"^ {4}\S.*$", re.MULTILINE),  # code by its indent
    re.compile(r"^!\[.*$", re.MULTILINE),
    re.compile(r"</?(details|summary)[^>]*>"),
]
BLOCK = re.compile(r"\n(?=\s*\n)|\n(?=\s*(?:[*+-]|\d+\.)\s)")
ENDS = re.compile(r"(?<=[.!?])[)\"*_”]*\s+(?=[^a-z\s])")


def prose(text: str) -> str:
    """The text without what is no prose; every line stays on its line."""
    for pattern in LEFT_OUT:
        text = pattern.sub(lambda match: "\n" * match[0].count("\n"), text)
    return text


def plain(text: str) -> str:
    """The words as a reader sees them; code is one word."""
    text = re.sub(r"\{[\w:]+\}`[^`]*`|``.*?``|`[^`]*`", "code", text, flags=re.DOTALL)
    text = re.sub(r"\$[^$]+\$", "formula", text)
    text = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", text)
    return re.sub(r"[*_]{1,3}(?=\S)|(?<=\S)[*_]{1,3}", "", text)


def sentences(text: str) -> Iterator[tuple[int, str]]:
    """Each sentence, with the number of its line."""
    position = 0
    for block in BLOCK.split(text):
        start = text.index(block, position)
        position = start + len(block)
        if not block.strip() or block.lstrip().startswith("#"):
            continue
        within = start
        for sentence in ENDS.split(block):
            at = text.index(sentence, within)
            within = at + len(sentence)
            yield (
                text.count("\n", 0, at + len(sentence) - len(sentence.lstrip())),
                (" ".join(plain(sentence).split())),
            )


def words(sentence: str) -> int:
    """How many there are; a number is one, a dash is none."""
    return sum(bool(re.search(r"\w", word)) for word in sentence.split())


def faults(text: str) -> Iterator[tuple[int, str]]:
    """What is wrong with a page: the number of the line, from 1, and the fault."""
    body = prose(text)
    for line, sentence in sentences(body):
        if (count := words(sentence)) > LONGEST:
            yield line + 1, f"{count} words: {sentence[:60]}..."
        for pattern, instead in BANNED.items():
            if found := re.search(rf"\b({pattern})\b", sentence, re.IGNORECASE):
                yield line + 1, f"{found[0]!r}: {instead}"
        for mean, half in INTERVAL.findall(sentence):
            holds = abs(float(mean.replace(MINUS, "-"))) <= float(half)
            if holds and re.search(CLAIMS, sentence):
                yield line + 1, f"{mean} ± {half} holds 0: say 'not told apart'"
        if found := re.search(r"(?<![\w-])-\d", sentence):
            yield line + 1, f"{found[0]!r}: the minus is {MINUS}"
        if found := re.search(r"\d%", sentence):
            yield line + 1, f"{found[0]!r}: a space before %"
    if GLOSSARY in text or "\n## Glossary\n" in text:
        return
    shown = plain(body).lower()
    for term in TERMS:
        word = rf"\b{term}s?\b"
        explained = rf"(\*|\[|^#)[^*\]\n]*{word}"
        if (used := re.search(word, shown)) and not re.search(
            explained, body, re.IGNORECASE | re.MULTILINE
        ):
            line = shown.count("\n", 0, used.start())
            yield line + 1, f"{term!r} is neither explained nor linked on this page"


def pages() -> list[pathlib.Path]:
    """What is checked if nothing is named."""
    docs = ROOT / "docs"
    return [ROOT / "README.md", *docs.glob("*.md"), *docs.glob("evidence/*.md")]


def wrong(names: Sequence[str] = ()) -> list[str]:
    """Every fault of these pages, or of all."""
    return [
        f"{page}:{line}: {fault}"
        for page in [pathlib.Path(name) for name in names] or sorted(pages())
        for line, fault in faults(page.read_text(encoding="utf-8"))
    ]


if __name__ == "__main__":
    if lines := wrong(sys.argv[1:]):
        sys.exit("\n".join(lines))
