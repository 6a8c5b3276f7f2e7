"""``kvctl predict`` and ``kvctl embed``: ask a predict model about texts or rows of features."""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Iterable, Sequence
from typing import Any

import kvserve
from kvserve._cli.feature_input import read_features
from kvserve._cli.output import harmless, note, plain, say, table, write_json
from kvserve._cli.parsers import CommandParser
from kvserve._cli.units import show_seconds

__all__ = ["add_parser"]

_EPILOG = """\
examples:
  kvctl predict sentiment "What a day." "What a mess."
  kvctl predict sentiment --top-k 0 --jsonl < lines.txt
  kvctl predict same-meaning --pair "It rains." "Water falls from the sky."
  kvctl predict risk --features 0.1,0.7,0.3,0.9
  kvctl predict risk --features rows.csv --json"""
_NUM_SHOWN = 6


def add_parser(subparsers: Any, common: argparse.ArgumentParser) -> None:
    """Add the two subcommands."""
    predict = subparsers.add_parser(
        "predict",
        parents=[common],
        allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        help="classify texts, or predict from rows of features",
        description="Ask a predict model about texts (arguments, or lines of standard input) or features.",
        epilog=_EPILOG,
    )
    _add_inputs(predict)
    predict.add_argument(
        "--pair",
        action="store_true",
        help="texts are pairs: two arguments each, or lines with a tab between the two",
    )
    predict.add_argument(
        "--features",
        metavar="ROW|FILE",
        action="append",
        help='a row of numbers, a file of CSV or JSON lines, or "-" for standard input; may be repeated',
    )
    predict.add_argument(
        "--top-k", type=int, metavar="K", help="so many of the likeliest labels; 0: all (default: 1)"
    )
    predict.add_argument(
        "--no-reuse",
        dest="reuse",
        action="store_const",
        const=False,
        help="reuse nothing that was computed for other inputs, and leave nothing behind",
    )
    predict.set_defaults(run=_predict)

    embed = subparsers.add_parser(
        "embed",
        parents=[common],
        allow_abbrev=False,
        help="turn texts into vectors",
        description="Turn texts (arguments, or lines of standard input) into vectors.",
    )
    _add_inputs(embed)
    embed.set_defaults(run=_embed)


def _add_inputs(parser: CommandParser) -> None:
    parser.is_intermixed = True
    parser.add_argument("model", help="the model's name")
    parser.add_argument("texts", nargs="*", metavar="TEXT", help="texts; none: lines of standard input")
    parser.add_argument("--version", metavar="VERSION", help="a version, or an alias such as canary")
    parser.add_argument(
        "--truncate",
        action="store_const",
        const=True,
        help="cut what is longer than the model's limit instead of refusing it",
    )
    shape = parser.add_argument_group("output")
    shape.add_argument("--json", action="store_true", help="write the whole answer as one line of JSON")
    shape.add_argument("--jsonl", action="store_true", help="write a line of JSON for each input")
    shape.add_argument("--stats", action="store_true", help="tokens and times, on standard error")


def _predict(parsed: argparse.Namespace, client: kvserve.Client) -> int:
    options = kvserve.PredictOptions(
        version=parsed.version, truncate=parsed.truncate, top_k=parsed.top_k, reuse=parsed.reuse
    )
    result: kvserve.PredictResult[kvserve.Prediction]
    asked: list[tuple[str, ...]]
    if parsed.features is not None:
        if parsed.texts or parsed.pair:
            raise ValueError("give texts or --features, not both")
        rows = [row for source in parsed.features for row in read_features(source)]
        result = client.predict_features(rows, model=parsed.model, **options)
        asked = [(f"row {number}",) for number in range(1, len(rows) + 1)]
    elif parsed.pair:
        pairs = _pairs(parsed.texts)
        result = client.predict(pairs, model=parsed.model, **options)
        asked = list(pairs)
    else:
        texts = parsed.texts or _lines()
        result = client.predict(texts, model=parsed.model, **options)
        asked = [(text,) for text in texts]
    if parsed.json:
        write_json(result)
    elif parsed.jsonl:
        for parts, prediction in zip(asked, result, strict=True):
            write_json({"input": parts[0] if len(parts) == 1 else parts, **plain(prediction)})
    else:
        say(_prediction_table(result, asked))
    if parsed.stats:
        tokens = f"{result.num_tokens:,} tokens, " if result.num_tokens else ""
        facts = f"{tokens}{result.num_truncated:,} truncated, {result.num_cache_hits:,} reused"
        _note_stats(result, facts)
    return 0


def _embed(parsed: argparse.Namespace, client: kvserve.Client) -> int:
    texts = parsed.texts or _lines()
    result = client.embed(texts, model=parsed.model, version=parsed.version, truncate=parsed.truncate)
    if parsed.json:
        write_json(result)
    elif parsed.jsonl:
        for text, vector in zip(texts, result, strict=True):
            write_json({"input": text, "vector": vector})
    else:
        rows = [
            (str(len(vector)), _length_of(vector), _few(vector), text)
            for text, vector in zip(texts, result, strict=True)
        ]
        say(table((">DIMENSIONS", ">LENGTH", "VECTOR", "TEXT"), rows))
    if parsed.stats:
        _note_stats(result, f"{result.num_tokens:,} tokens, {result.num_truncated:,} truncated")
    return 0


def _lines() -> list[str]:
    """Return the lines of standard input, without what ends them. Raises ValueError if there are none."""
    lines = [line for line in sys.stdin.read().splitlines() if line]
    if not lines:
        raise ValueError("no text: give some as arguments, or as lines of standard input")
    return lines


def _pairs(texts: Sequence[str]) -> list[tuple[str, str]]:
    if texts:
        if len(texts) % 2:
            raise ValueError(f"--pair takes texts two by two; {len(texts)} given")
        return list(zip(texts[::2], texts[1::2], strict=True))
    pairs = []
    for number, line in enumerate(_lines(), start=1):
        text, tab, pair = line.partition("\t")
        if not tab:
            raise ValueError(f"line {number}: has no tab between the two texts of a pair")
        pairs.append((text, pair))
    return pairs


def _prediction_table(
    result: kvserve.PredictResult[kvserve.Prediction], asked: Sequence[tuple[str, ...]]
) -> str:
    rows = [
        (*cells, " | ".join(parts) if position == 0 else "")
        for parts, prediction in zip(asked, result, strict=True)
        for position, cells in enumerate(_cells(prediction, parts))
    ]
    header: tuple[str, ...]
    match result[0]:
        case kvserve.Classification():
            header = ("LABEL", ">SCORE", "TEXT")
        case kvserve.TokenClassification():
            header = ("TOKEN", "LABEL", ">SCORE", "TEXT")
        case kvserve.Regression():
            header = ("VALUES", "TEXT")
        case kvserve.Embedding():
            header = (">DIMENSIONS", "VECTOR", "TEXT")
        case _:
            header = (">PREDICTION", "REUSED", "INPUT")
    return table(header, rows)


def _cells(prediction: kvserve.Prediction, parts: tuple[str, ...]) -> list[tuple[str, ...]]:
    """Return the lines of a prediction: one, or one for each label that was asked for."""
    match prediction:
        case kvserve.Classification():
            if len(prediction.scores) > 1:
                return [(each.label, f"{each.score:.4f}") for each in prediction.scores]
            return [(", ".join(prediction.labels) or prediction.label, f"{prediction.score:.4f}")]
        case kvserve.TokenClassification():
            return [
                (parts[token.part][token.start : token.end], token.label, f"{token.score:.4f}")
                for token in prediction.tokens
            ] or [("", "", "")]
        case kvserve.Regression():
            return [(" ".join(f"{value:.6g}" for value in prediction.values),)]
        case kvserve.Embedding():
            return [(str(len(prediction.vector)), _few(prediction.vector))]
        case kvserve.FeaturePrediction():
            return [(f"{prediction.prediction:.6f}", "yes" if prediction.cache_hit else "no")]
        case _:
            return [("?", "")]


def _few(values: Sequence[float]) -> str:
    more = " ..." if len(values) > _NUM_SHOWN else ""
    return " ".join(f"{value:.4f}" for value in values[:_NUM_SHOWN]) + more


def _length_of(vector: Iterable[float]) -> str:
    return f"{math.hypot(*vector):.4f}"


def _note_stats(result: kvserve.PredictResult[Any] | kvserve.EmbedResult, facts: str) -> None:
    timings = result.timings
    calls = f" in {result.num_calls} calls" if result.num_calls > 1 else ""
    load = f"load {show_seconds(timings.load_s)}, " if timings.load_s else ""
    note(
        f"[{harmless(f'{result.model} {result.version}')} | {len(result):,} inputs{calls}, {facts}"
        f" | batch of {timings.batch_size:,} | {load}queue {timings.queue_s * 1000:.1f} ms,"
        f" compute {timings.compute_s * 1000:.1f} ms, total {timings.total_s * 1000:.1f} ms]"
    )
