"""One line per record, whatever a client managed to put into it."""

from __future__ import annotations

import io
import json
import logging

import pytest

from server.logs import configure_logs

HOSTILE = "a\nERROR forged\r\x1b[31mred\u2028\u202ex\x85\0"


@pytest.mark.parametrize("format_name", ["text", "json"])
def test_hostile_values_stay_in_their_line(format_name: str) -> None:
    stream = io.StringIO()
    root = logging.getLogger()
    before, level = root.handlers[:], root.level
    try:
        configure_logs(format_name=format_name, level="info", stream=stream)
        log = logging.getLogger("test")
        try:
            raise ValueError(HOSTILE)
        except ValueError:
            log.exception("failed %s", HOSTILE, extra={"request_id": HOSTILE, "count": 3})
        log.info("x" * 100_000)
        log.debug("not shown")
    finally:
        root.handlers[:] = before
        root.setLevel(level)
    text = stream.getvalue()
    lines = text.split("\n")
    assert len(lines) == 3
    assert lines[-1] == ""
    assert all(line.isprintable() for line in lines)
    assert len(lines[1]) < 10_000
    assert "count" in lines[0]
    if format_name == "json":
        entry = json.loads(lines[0])
        assert (entry["request_id"], entry["count"], entry["level"]) == (HOSTILE, 3, "error")
        assert "ValueError" in entry["exception"]


@pytest.mark.parametrize("format_name", ["text", "json"])
def test_every_line_has_the_fields_of_its_process(format_name: str) -> None:
    stream = io.StringIO()
    root = logging.getLogger()
    before, level = root.handlers[:], root.level
    try:
        configure_logs(format_name=format_name, level="info", stream=stream, fields={"engine_pid": 7})
        logging.getLogger("test").info("loaded", extra={"count": 3})
    finally:
        root.handlers[:] = before
        root.setLevel(level)
    line = stream.getvalue()
    if format_name == "json":
        entry = json.loads(line)
        assert (entry["engine_pid"], entry["count"]) == (7, 3)
    else:
        assert line.endswith("loaded engine_pid=7 count=3\n")
