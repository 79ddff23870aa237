"""Markdown pages as readers see them: headings, tables, links, what is code and what is stressed."""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from markdown_it import MarkdownIt
from markdown_it.token import Token


@dataclass(frozen=True)
class Text:
    """One paragraph, heading or cell: what is read, its code marks, and what it stresses."""

    plain: str
    codes: tuple[str, ...]
    strong: tuple[str, ...]
    italic: tuple[str, ...]
    stars: bool  # a star that stresses nothing is shown as a star


@dataclass(frozen=True)
class Page:
    headings: list[tuple[int, str]]
    items: int
    tables: list[list[list[Text]]]
    texts: list[Text]
    images: dict[str, str]  # what they show, by address
    links: list[str]

    @property
    def codes(self) -> set[str]:
        return {code for text in self.texts for code in text.codes}

    @property
    def messages(self) -> list[str]:
        """Quoted in bold: what a node says when something is wrong."""
        return [each.strip('"') for text in self.texts for each in text.strong if each.startswith('"')]

    @property
    def italic(self) -> set[str]:
        return {name for text in self.texts for name in text.italic}

    @property
    def numbers(self) -> set[str]:
        return {number for text in self.texts for number in re.findall(r"\d+(?:\.\d+)?", text.plain)}


def _text(inline: Token) -> Text:
    stressed: dict[str, list[str]] = {"strong": [], "em": []}
    open_marks: list[tuple[str, int]] = []
    codes: list[str] = []
    plain, stars = "", False
    for child in inline.children or ():
        kind, _, end = child.type.rpartition("_")
        if kind in stressed and end == "open":
            open_marks.append((kind, len(plain)))
        elif kind in stressed and end == "close":
            mark, start = open_marks.pop()
            stressed[mark].append(plain[start:])
        elif child.type == "softbreak":
            plain += " "
        else:
            plain += child.content
            stars |= child.type == "text" and "*" in child.content
            codes += [child.content] if child.type == "code_inline" else []
    return Text(plain, tuple(codes), tuple(stressed["strong"]), tuple(stressed["em"]), stars)


@cache
def parsed(path: Path) -> Page:
    tokens = MarkdownIt("commonmark").enable("table").parse(path.read_text(encoding="utf-8"))
    found = Page([], sum(token.type == "list_item_open" for token in tokens), [], [], {}, [])
    for before, token in zip(tokens, tokens[1:], strict=False):
        if before.type == "table_open":
            found.tables.append([])
        elif before.type == "tr_open":
            found.tables[-1].append([])
        if token.type == "inline":
            found.texts.append(_text(token))
            found.images.update(
                (str(child.attrs["src"]), child.content) for child in token.children or () if child.type == "image"
            )
            found.links.extend(str(child.attrs["href"]) for child in token.children or () if child.type == "link_open")
            if before.type == "heading_open":
                found.headings.append((int(before.tag[1]), found.texts[-1].plain))
            elif before.type in ("th_open", "td_open"):
                found.tables[-1][-1].append(found.texts[-1])
    return found
