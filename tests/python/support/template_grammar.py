"""Draws small chat templates from a grammar, for comparison with transformers.

`templates(seed, count)` draws the same list on every machine. They use the variables of
template_fragments.VARIABLES, and all of Jinja2 that a chat template could plausibly use: the words
of template_grammar.txt, in which `$name` stands for something drawn.

Known and not drawn, as the daemon renders them otherwise: slices of ranges; floats as indices; `<`
between lists of different kinds; a macro's argument that is given but undefined where it has a
default (the default counts); a macro's `arguments`; `{:,}` with a bool; the order of "ß" in `sort`;
hyphens in `wordwrap`; `{:9}` beyond ASCII; operators and methods of what `safe` and `escape`
return; `else` after a loop of which `continue` left every item.
"""

from __future__ import annotations

import random
import re
from pathlib import Path


def words() -> dict[str, list[str]]:
    """Returns the lists of template_grammar.txt by name."""
    lists: dict[str, list[str]] = {}
    for line in Path(__file__).with_suffix(".txt").read_text(encoding="utf-8").split("\n"):
        if re.fullmatch(r"\[\w+\]", line):
            current = lists[line[1:-1]] = []
        elif line:
            current.append(line)
    return lists


class Grammar:
    """Draws from a seed."""

    def __init__(self, seed: int) -> None:
        self.random = random.Random(seed)
        self.words = words()

    def chance(self, percent: int) -> bool:
        return self.random.randrange(100) < percent

    def pick(self, options: list):
        return options[self.random.randrange(len(options))]

    def one(self, name: str) -> str:
        """Draws a word, and what it names."""
        return re.sub(r"\$(\w+)", lambda match: self.named(match[1]), self.pick(self.words[name]))

    def named(self, name: str) -> str:
        match name:
            case "none":
                return ""
            case "newline":
                return "\n"
            case "value":
                return self.expression(1 + self.random.randrange(2))
            case "space":
                return self.one("spaces")
            case "atom" | "text" | "list" | "map":
                return getattr(self, name)()
            case _:
                return self.one(name)

    def template(self) -> str:
        return self.pick(
            [self.printed] * 10 + [self.loop] * 4 + [self.statement] * 6 + [self.spaced] * 2
        )()

    # Values.

    def text(self) -> str:
        return self.one(self.pick(["texts", "text_literals"]))

    def number(self) -> str:
        return self.one(self.pick(["integers", "floats"]))

    def list(self) -> str:
        return self.one("lists")

    def map(self) -> str:
        return self.one("maps")

    def atom(self) -> str:
        kinds = [self.text, self.number, self.list, self.map, lambda: self.one("others")]
        return self.pick(kinds)()

    def expression(self, depth: int = 2) -> str:
        if depth == 0:
            return self.atom()
        kinds = [
            self.operation,
            self.compared,
            self.filtered,
            self.tested,
            self.called,
            self.indexed,
        ]
        kinds += [
            self.operation,
            self.filtered,
            self.filtered,
            self.called,
            self.signed,
            self.chosen,
        ]
        return self.pick([*kinds, self.literal, self.formatted, lambda _: self.atom()])(depth - 1)

    def inner(self, depth: int) -> str:
        """An expression, in brackets if it needs them."""
        drawn = self.expression(depth)
        is_simple = drawn.isidentifier() or (drawn[-1:] in "'])" and " " not in drawn)
        return drawn if is_simple else f"({drawn})"

    def operation(self, depth: int) -> str:
        operator = self.one(self.pick(["operators", "operators", "comparisons"]))
        left, right = self.inner(depth), self.inner(depth)
        if self.chance(50):
            alike = self.pick([self.text, self.number, self.number, self.list])
            left, right = alike(), alike()
        lists = self.words["lists"]
        if operator[0] in "<>" and left in lists and right in lists:
            operator = "=="
        return f"{left} {operator} {right}"

    def compared(self, depth: int) -> str:
        left, right = self.one("comparisons"), self.one("comparisons")
        return f"{self.number()} {left} {self.inner(depth)} {right} {self.number()}"

    def filtered(self, depth: int) -> str:
        kind = self.pick(["text", "number", "list", "map"])
        value = getattr(self, kind)() if self.chance(75) else self.inner(depth)
        return f"{value} | {self.one(kind + '_filters')}"

    def tested(self, depth: int) -> str:
        return f"{self.inner(depth)} is {'not ' if self.chance(20) else ''}{self.one('tests')}"

    def called(self, depth: int) -> str:
        kind = self.pick(["text", "list", "map"])
        value = getattr(self, kind)() if self.chance(85) else self.inner(depth)
        return f"{value}.{self.one(kind + '_methods')}"

    def indexed(self, _: int) -> str:
        if self.chance(50):
            value = self.pick([self.text, self.list, self.list, self.map])()
            return f"{value}[{self.one(self.pick(['bounds', 'names']))}]"
        start, stop = ("" if self.chance(20) else self.one("bounds") for _ in range(2))
        step = f":{self.pick(['', '1', '2', '-1', '-2', '0'])}" if self.chance(40) else ""
        listed = " | list" if self.chance(30) else ""
        return f"{self.pick([self.text, self.list])()}[{start}:{stop}{step}]{listed}"

    def signed(self, depth: int) -> str:
        if self.chance(40):
            return "not " + self.inner(depth)
        return self.pick(["-", "+", "- -"]) + (
            self.number() if self.chance(80) else self.inner(depth)
        )

    def chosen(self, depth: int) -> str:
        rest = f" else {self.inner(depth)}" if self.chance(70) else ""
        return f"{self.inner(depth)} if {self.inner(depth)}{rest}"

    def literal(self, depth: int) -> str:
        items = [self.expression(depth) for _ in range(self.random.randrange(4))]
        kind = self.random.randrange(3)
        if kind == 0:
            return "[" + ", ".join(items) + "]"
        if kind == 1:
            return "(" + "".join(f"{item}, " for item in items).rstrip(" ") + ")"
        keys = ["'a'", "'b'", "1", "n", "s", "none", "true"]
        return "{" + ", ".join(f"{self.pick(keys)}: {item}" for item in items) + "}"

    def formatted(self, _: int) -> str:
        values = [self.atom() for _ in range(1 + self.random.randrange(2))]
        joined = ", ".join(values)
        if self.chance(50):
            right = values[0] if self.chance(50) else f"({joined})"
            return f"'{self.one('formats')}' % {right}"
        if self.chance(30):
            return f"'{self.one('formats')}' | format({joined})"
        text = self.text().replace("u", "s").replace("é", "e")
        joined = ", ".join(
            self.pick([text, self.number(), self.list(), self.map(), "none"]) for _ in values
        )
        return f"'{self.one('braces')}'.format({joined}{', a=1' if self.chance(20) else ''})"

    # Templates.

    def printed(self) -> str:
        return "{{ " + self.named("value") + " }}"

    def statement(self) -> str:
        return self.one("statements")

    def loop(self) -> str:
        over = self.one(self.pick(["lists", "maps", "texts", "iterables"]))
        if self.chance(25):
            over = self.expression(1)
        elif over != "u" and self.chance(10):
            over += self.one("loop_filters")
        target = "x" if self.chance(80) else "x, y"
        if self.chance(10):
            over += " if " + self.one("loop_conditions")
        items = ("x" if self.chance(40) else "loop." + self.one("loop") for _ in range(2))
        body = "".join("{{ " + item + " }}," for item in items)
        other = "{% else %}none" if self.chance(20) else ""
        if self.chance(15):
            leaves = self.pick(["break"] if other else ["break", "continue"])
            body += "{% if x == " + self.atom() + " %}{% " + leaves + " %}{% endif %}."
        if self.chance(15):
            within = (
                "{% for x in " + self.list() + " %}{{ loop." + self.one("loop") + " }}{% endfor %}"
            )
            body += within + "{{ loop.index }}"
        after = "{{ x }}{{ loop }}" if self.chance(5) else ""
        return "{% for " + target + " in " + over + " %}" + body + other + "{% endfor %}" + after

    def spaced(self) -> str:
        """Tags and comments between white space, with every mark that trims it or keeps it."""
        out = self.one("spaces")
        opened: list[str] = []
        for _ in range(2 + self.random.randrange(4)):
            left, right = (self.pick(["", "", "", "-", "+"]) for _ in range(2))
            begin, end = "{%" + left, right + "%}"
            match self.random.randrange(6):
                case 0:
                    out += "{{" + left.replace("+", "") + " 'v' " + right.replace("+", "") + "}}"
                case 1:
                    out += "{#" + left + " c " + right + "#}"
                case 2:
                    out += f"{begin} set q = 1 {end}"
                case 3 if opened:
                    out += f"{begin} {opened.pop()} {end}"
                case 4:
                    out += f"{begin} for x in l {end}"
                    opened.append("endfor")
                case _:
                    out += f"{begin} if yes {end}"
                    opened.append("endif")
            out += self.one("spaces")
        while opened:
            out += "{%" + self.pick(["", "-", "+"]) + f" {opened.pop()} %}}" + self.one("spaces")
        return out


def templates(seed: int, count: int) -> list[str]:
    """Returns `count` different templates."""
    grammar = Grammar(seed)
    drawn: dict[str, None] = {}
    while len(drawn) < count:
        drawn[grammar.template()] = None
    return [*drawn]
