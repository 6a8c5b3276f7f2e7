"""Draw the pictures of docs/predict.md: ``python scripts/draw_predict_pictures.py [--check]``.

Standard library alone, the same bytes at every run. As in draw_cache_pictures.py the curves are those of the
document's tables, each below a comment ``<!-- table: NAME -->``; these come from
``python -m server.predict.reuse.experiment``. ``--check`` writes nothing, and ends with 1 if a picture is not
what would be drawn.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Sequence
from pathlib import Path

from draw_cache_pictures import GREY, IMAGES, LINES, ROOT, Picture, Table, read_table

DOCUMENT = ROOT / "docs" / "predict.md"

PANELS = (
    ("hit rate", "rows whose encoding is reused, %"),
    ("changed", "reuses with another prediction, %"),
    ("CPU us", "mean processor time, µs"),
)
WIDTH, HEIGHT, TOP = 250, 220, 60


def draw_panels(title: str, table: Table) -> Picture:
    """Draw hit rate, risk and latency side by side, against the lifetime, with a curve for each name."""
    (_, xs), *columns = table.items()
    picture = Picture(3 * WIDTH + 100, TOP + HEIGHT + 60, title)
    names: list[str] = []
    for number, (measure, label) in enumerate(PANELS):
        curves = {name.split(", ", 1)[1]: ys for name, ys in columns if name.startswith(f"{measure}, ")}
        names = list(curves)
        left = 50 + number * (WIDTH + 20)
        draw_panel(picture, left, label, xs, list(curves.values()))
    for number, name in enumerate(names):
        x = 50 + 130 * number
        picture.line((x, 20), (x + 24, 20), stroke=LINES[number], width=3)
        picture.text(x + 32, 24, name)
    return picture


def draw_panel(
    picture: Picture, left: float, label: str, xs: Sequence[float], curves: Sequence[Sequence[float]]
) -> None:
    """Draw one panel; x is logarithmic, y begins at 0."""
    right, bottom = left + WIDTH - 40, TOP + HEIGHT
    most = round_up(max(max(ys) for ys in curves))

    def place(x: float, y: float) -> tuple[float, float]:
        across = (math.log(x) - math.log(xs[0])) / (math.log(xs[-1]) - math.log(xs[0]))
        return left + across * (right - left), bottom - y / most * (bottom - TOP)

    for step in range(5):
        _, y = place(xs[0], most * step / 4)
        picture.line((left, y), (right, y), stroke="#e4e7eb", width=1)
        picture.text(left - 6, y + 4, f"{most * step / 4:g}", anchor="end", fill=GREY)
    for tick in xs:
        x, _ = place(tick, 0.0)
        picture.line((x, bottom), (x, bottom + 5), stroke=GREY)
        picture.text(x, bottom + 20, f"{tick:g}", anchor="middle", fill=GREY)
    picture.line((left, TOP), (left, bottom), (right, bottom), stroke=GREY)
    picture.text((left + right) / 2, bottom + 42, "lifetime (TTL), s", anchor="middle")
    picture.text(left - 20, TOP - 14, label)
    for number, ys in enumerate(curves):
        points = [place(x, y) for x, y in zip(xs, ys, strict=True)]
        picture.line(*points, stroke=LINES[number], width=2)


def round_up(value: float) -> float:
    """Return the next of 1, 2, 4, 6, 8 times a power of ten: four steps of it are easy to read."""
    power = 10.0 ** math.floor(math.log10(max(value, 1e-9)))
    return next(power * step for step in (1, 2, 4, 6, 8, 10) if power * step >= value)


def draw_all(document: Path) -> dict[str, str]:
    """Return the pictures by the names of their files."""
    text = document.read_text(encoding="utf-8")
    pictures = {
        "predict-reuse-speed.svg": draw_panels(
            "Reuse against its lifetime, by speed of drift", read_table(text, "reuse-speed")
        ),
        "predict-reuse-prefix.svg": draw_panels(
            "Reuse against its lifetime, by length of the key", read_table(text, "reuse-prefix")
        ),
    }
    return {name: picture.to_text() for name, picture in pictures.items()}


def main() -> int:
    """Write the pictures, or compare them."""
    parser = argparse.ArgumentParser(description="Draw the pictures of docs/predict.md.")
    parser.add_argument("--check", action="store_true", help="only say whether they are up to date")
    parser.add_argument("--document", type=Path, default=DOCUMENT, help="where the tables are")
    chosen = parser.parse_args()
    stale = []
    for name, text in draw_all(chosen.document).items():
        path = IMAGES / name
        if path.exists() and path.read_text(encoding="utf-8") == text:
            continue
        stale.append(name)
        if not chosen.check:
            path.parent.mkdir(exist_ok=True)
            path.write_text(text, encoding="utf-8")
    print(f"{'out of date' if chosen.check else 'drawn'}: {', '.join(stale) or 'nothing'}")
    return 1 if chosen.check and stale else 0


if __name__ == "__main__":
    sys.exit(main())
