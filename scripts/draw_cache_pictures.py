"""Draw the pictures of docs/cache.md: ``python scripts/draw_cache_pictures.py [--check]``.

Standard library alone, the same bytes at every run. The curves are those of the tables in docs/cache.md
(each below a comment ``<!-- table: NAME -->``), so that picture and table cannot disagree. ``--check``
writes nothing, and ends with 1 if a picture is not what would be drawn.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Callable, Mapping, Sequence
from html import escape
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
DOCUMENT = ROOT / "docs" / "cache.md"
IMAGES = ROOT / "docs" / "images"

INK, GREY, PAPER = "#1f2933", "#7b8794", "#ffffff"
DEVICE, HOST, DISK, REDIS, TAIL = "#cfe3ff", "#d9f2dc", "#fdebc8", "#f9d5d3", "#ece2f7"
LINES = ("#1f5fbf", "#c0392b", "#2e8b57", "#b8860b", "#7d3c98", "#5d6d7e", "#d35400", "#111111")

Table = dict[str, list[float]]
"""First the column of x, then one for each curve, by their headings."""


class Picture:
    """An SVG under construction. Coordinates are pixels from the top left."""

    def __init__(self, width: int, height: int, title: str) -> None:
        size = f'viewBox="0 0 {width} {height}" width="{width}" height="{height}"'
        font = f'font-family="system-ui, sans-serif" font-size="13" fill="{INK}"'
        tip = 'id="tip" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="7" markerHeight="7" orient="auto"'
        self._parts = [
            f'<svg xmlns="http://www.w3.org/2000/svg" {size} {font}>',
            f"<title>{escape(title)}</title>",
            f'<defs><marker {tip}><path d="M0 0 8 4 0 8z" fill="{INK}"/></marker></defs>',
            f'<rect width="{width}" height="{height}" fill="{PAPER}"/>',
        ]

    def box(self, x: float, y: float, width: float, height: float, fill: str, *lines: str) -> None:
        """Draw a box with lines of text in its middle."""
        self._parts.append(
            f'<rect x="{x:g}" y="{y:g}" width="{width:g}" height="{height:g}" rx="4" fill="{fill}"'
            f' stroke="{INK}" stroke-width="1"/>'
        )
        top = y + height / 2 - 8 * (len(lines) - 1) + 4.5
        for number, line in enumerate(lines):
            self.text(x + width / 2, top + 16 * number, line, anchor="middle")

    def text(self, x: float, y: float, text: str, *, anchor: str = "start", fill: str = INK) -> None:
        """Write one line."""
        self._parts.append(
            f'<text x="{x:g}" y="{y:g}" text-anchor="{anchor}" fill="{fill}">{escape(text)}</text>'
        )

    def line(
        self, *points: tuple[float, float], stroke: str = INK, width: float = 1.2, extra: str = ""
    ) -> None:
        """Draw a line through points."""
        path = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
        self._parts.append(
            f'<polyline points="{path}" fill="none" stroke="{stroke}" stroke-width="{width:g}"{extra}/>'
        )

    def arrow(self, *points: tuple[float, float], dashed: bool = False) -> None:
        """Draw a line with a tip."""
        dashes = ' stroke-dasharray="5 4"' if dashed else ""
        self.line(*points, extra=f'{dashes} marker-end="url(#tip)"')

    def to_text(self) -> str:
        return "\n".join([*self._parts, "</svg>", ""])


def draw_tree() -> Picture:
    """The tree on the device, runs, tails, and copies below."""
    picture = Picture(860, 420, "A prefix tree on the device, and copies of its blocks in tiers")
    picture.text(20, 24, "device: one tree per namespace; a box is one block of 16 tokens")
    picture.box(20, 92, 60, 30, PAPER, "root")
    for number, x in enumerate((110, 180, 250)):
        picture.box(x, 92, 60, 30, DEVICE, f"{number + 1}")
        picture.line((x - (30 if number == 0 else 10), 107), (x, 107))
    picture.text(215, 82, "system prompt: one run of three blocks", anchor="middle", fill=GREY)
    picture.line((310, 107), (350, 62))
    picture.line((310, 107), (350, 162))
    for number, x in enumerate((350, 420)):
        picture.box(x, 47, 60, 30, DEVICE, f"{number + 4}")
    picture.line((410, 62), (420, 62))
    picture.line((480, 62), (500, 62))
    picture.box(500, 47, 60, 30, DEVICE, "6, open")
    picture.text(415, 98, "conversation A", anchor="middle", fill=GREY)
    picture.box(350, 147, 60, 30, DEVICE, "7, open")
    picture.text(380, 196, "conversation B", anchor="middle", fill=GREY)
    picture.line((560, 62), (600, 62), extra=' stroke-dasharray="2 3"')
    picture.box(600, 42, 236, 40, TAIL, "tail: last logits of prompt A", "(a repeat computes nothing)")
    picture.line((410, 162), (600, 162), extra=' stroke-dasharray="2 3"')
    picture.box(600, 142, 236, 40, TAIL, "tail: last logits of prompt B,", "which ends within block 7")
    rows = (
        ("host", HOST, "what was evicted from the device", (8, 9)),
        ("disk", DISK, "full blocks and tails; survives a restart", (1, 2, 3, 4, 5, 8, 9)),
        ("Redis", REDIS, "the same objects, shared by servers", (1, 2, 3, 4, 5, 8, 9)),
    )
    for row, (name, fill, what, blocks) in enumerate(rows):
        y = 236 + 60 * row
        picture.line((20, y - 14), (840, y - 14), stroke=GREY, width=0.6)
        picture.text(20, y + 19, name)
        for number, block in enumerate(blocks):
            picture.box(110 + 46 * number, y, 38, 30, fill, f"{block}")
        if row:
            picture.box(
                110 + 46 * 7,
                y,
                38,
                30,
                TAIL,
                "A",
            )
            picture.box(110 + 46 * 8, y, 38, 30, TAIL, "B")
        picture.text(550, y + 19, what, fill=GREY)
    return picture


def draw_path() -> Picture:
    """The way of a block down and up."""
    picture = Picture(860, 380, "The way of a block down to the tiers and up again")
    picture.text(20, 24, "down")
    picture.box(20, 40, 150, 44, DEVICE, "block is full", "(stored)")
    picture.box(20, 110, 150, 44, DEVICE, "block is evicted", "(capacity, quota)")
    picture.box(240, 75, 170, 44, PAPER, "worth a write?", "else: forgotten")
    picture.box(470, 75, 170, 44, PAPER, "copied out of memory", "at the start of a step")
    picture.box(700, 40, 140, 36, HOST, "host")
    picture.box(700, 84, 140, 36, DISK, "disk")
    picture.box(700, 128, 140, 36, REDIS, "Redis")
    picture.arrow((170, 62), (238, 90))
    picture.arrow((170, 132), (238, 104))
    picture.arrow((410, 97), (468, 97))
    picture.arrow((640, 90), (698, 60))
    picture.arrow((640, 97), (698, 102))
    picture.arrow((640, 104), (698, 144))
    picture.text(
        205,
        170,
        "host takes what is evicted; disk and Redis also what is full",
        fill=GREY,
    )
    picture.line((20, 192), (840, 192), stroke=GREY, width=0.6)
    picture.text(20, 216, "up")
    picture.box(20, 232, 150, 44, DEVICE, "request waits", "in the queue")
    picture.box(220, 232, 170, 44, PAPER, "tiers are asked for", "the blocks that follow")
    picture.box(440, 232, 170, 44, PAPER, "fetch or recompute?", "the faster of the two")
    picture.box(660, 232, 180, 44, DISK, "read, checked, decoded", "in a tier's own threads")
    picture.box(660, 320, 180, 44, DEVICE, "into a free block, in order,", "between two steps")
    picture.box(
        340, 320, 250, 44, DEVICE, "cached like any other block;", "the request is admitted behind it"
    )
    picture.box(20, 320, 250, 44, DEVICE, "computed: nothing was found,", "not worth it, late or damaged")
    for start, end in ((170, 218), (390, 438), (610, 658)):
        picture.arrow((start, 254), (end, 254))
    picture.arrow((750, 276), (750, 318))
    picture.arrow((660, 342), (592, 342))
    picture.arrow((525, 276), (525, 298), (145, 298), (145, 318), dashed=True)
    picture.arrow((700, 276), (700, 298), (527, 298), dashed=True)
    return picture


def draw_crossover(table: Table) -> Picture:
    """Time to first token, computed against fetched, by length."""
    (_, lengths), *curves = table.items()
    return draw_curves(
        "First token of a prompt, computed or fetched from disk",
        lengths,
        dict(curves),
        x_label="prompt tokens",
        y_label="ms to the first token",
        y_ticks=(1, 10, 100, 1000),
        scale=math.log,
    )


def draw_policies(table: Table) -> Picture:
    """Token hit rate against cache size."""
    (_, sizes), *curves = table.items()
    return draw_curves(
        "Token hit rate of the policies by cache size",
        sizes,
        dict(curves),
        x_label="million tokens of cache",
        y_label="token hit rate, %",
        y_ticks=(0, 10, 20, 30, 40, 50, 60, 70),
        scale=float,
    )


def draw_curves(
    title: str,
    xs: Sequence[float],
    curves: Mapping[str, Sequence[float]],
    *,
    x_label: str,
    y_label: str,
    y_ticks: Sequence[float],
    scale: Callable[[float], float],
) -> Picture:
    """Draw curves over a logarithmic x; ``scale`` is that of y."""
    picture = Picture(760, 400, title)
    left, right, top, bottom = 70, 590, 40, 340

    def place(x: float, y: float) -> tuple[float, float]:
        across = (math.log(x) - math.log(xs[0])) / (math.log(xs[-1]) - math.log(xs[0]))
        up = (scale(y) - scale(y_ticks[0])) / (scale(y_ticks[-1]) - scale(y_ticks[0]))
        return left + across * (right - left), bottom - up * (bottom - top)

    for tick in y_ticks:
        _, y = place(xs[0], tick)
        picture.line((left, y), (right, y), stroke="#e4e7eb", width=1)
        picture.text(left - 8, y + 4, f"{tick:g}", anchor="end", fill=GREY)
    for tick in xs:
        x, _ = place(tick, y_ticks[0])
        picture.line((x, bottom), (x, bottom + 5), stroke=GREY)
        picture.text(x, bottom + 20, f"{tick:g}", anchor="middle", fill=GREY)
    picture.line((left, top), (left, bottom), (right, bottom), stroke=GREY)
    picture.text((left + right) / 2, bottom + 42, x_label, anchor="middle")
    picture.text(left - 50, top - 16, y_label)
    for number, (name, ys) in enumerate(curves.items()):
        colour = LINES[number % len(LINES)]
        picture.line(*(place(x, y) for x, y in zip(xs, ys, strict=True)), stroke=colour, width=2)
        picture.line((610, 52 + 24 * number), (634, 52 + 24 * number), stroke=colour, width=3)
        picture.text(642, 56 + 24 * number, name)
    return picture


def read_table(document: str, name: str) -> Table:
    """Return the table below ``<!-- table: name -->``, figures without stars and thousands separators."""
    marker = f"<!-- table: {name} -->"
    if document.count(marker) != 1:
        raise ValueError(f"{DOCUMENT.name} has no table {name!r}, or several")
    rows = []
    for line in document.split(marker)[1].lstrip().splitlines():
        if not line.startswith("|"):
            break
        rows.append([cell.strip(" *`") for cell in line.strip("| ").split("|")])
    heads, _, *body = rows
    columns = zip(*body, strict=True)
    return {
        head: [float(cell.replace(",", "")) for cell in column]
        for head, column in zip(heads, columns, strict=True)
    }


def draw_all() -> dict[str, str]:
    """Return the pictures by the names of their files."""
    document = DOCUMENT.read_text(encoding="utf-8")
    pictures = {
        "cache-tree.svg": draw_tree(),
        "cache-path.svg": draw_path(),
        "cache-crossover.svg": draw_crossover(read_table(document, "crossover")),
        "cache-policies.svg": draw_policies(read_table(document, "policies")),
    }
    return {name: picture.to_text() for name, picture in pictures.items()}


def main() -> int:
    """Write the pictures, or compare them."""
    parser = argparse.ArgumentParser(description="Draw the pictures of docs/cache.md.")
    parser.add_argument("--check", action="store_true", help="only say whether they are up to date")
    only_check = parser.parse_args().check
    stale = []
    for name, text in draw_all().items():
        path = IMAGES / name
        if path.exists() and path.read_text(encoding="utf-8") == text:
            continue
        stale.append(name)
        if not only_check:
            path.parent.mkdir(exist_ok=True)
            path.write_text(text, encoding="utf-8")
    print(f"{'out of date' if only_check else 'drawn'}: {', '.join(stale) or 'nothing'}")
    return 1 if only_check and stale else 0


if __name__ == "__main__":
    sys.exit(main())
