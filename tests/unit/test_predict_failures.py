"""Exceptions of the predict process, told over the link and raised again in the front end."""

from __future__ import annotations

import pytest

from server.predict import errors
from server.predict.failures import call_failed, error_of, is_out_of_memory, kind_of, op_failed
from server.predict.messages import FailureKind

ERRORS = [
    error(f"because of {name}", retry_after_s=1.5) if error is not errors.InputError else error("bad")
    for name, error in ((name, getattr(errors, name)) for name in errors.__all__)
]


@pytest.mark.parametrize("error", ERRORS, ids=lambda error: type(error).__name__)
def test_every_error_comes_back_as_it_was(error: errors.PredictError):
    for failed in (call_failed(7, error), op_failed(7, error)):
        again = error_of(failed)
        assert again is not error
        assert (type(again), again.reason, again.retry_after_s) == (
            type(error),
            error.reason,
            error.retry_after_s,
        )


def test_every_kind_has_an_error():
    assert {kind_of(error) for error in ERRORS} == set(FailureKind)


def test_the_place_of_a_bad_input_comes_along():
    error = errors.InputError("is not finite", index=3, part="values[2]")
    again = error_of(call_failed(1, error))
    assert isinstance(again, errors.InputError)
    assert (again.index, again.part) == (3, "values[2]")
    of_op = error_of(op_failed(1, errors.InputError("must be between 0 and 1", part="traffic_share")))
    assert isinstance(of_op, errors.InputError)
    assert (of_op.reason, of_op.part) == ("must be between 0 and 1", "traffic_share")


def test_what_nobody_has_foreseen_tells_nothing_of_itself(caplog: pytest.LogCaptureFixture):
    error = OSError("/srv/models/secret.bin: no such file")
    failed = call_failed(1, error)
    assert failed.kind is kind_of(error) is FailureKind.INTERNAL
    assert "/" not in failed.reason
    assert type(error_of(failed)) is errors.PredictError
    assert "secret.bin" in caplog.text  # the operator's log says all


class OutOfMemoryError(RuntimeError):
    """As torch's is called."""


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        OutOfMemoryError("CUDA out of memory: 0x7f"),
        RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 1 byte"),
    ],
    ids=lambda error: type(error).__name__,
)
def test_a_lack_of_memory_is_no_fault_of_the_call_and_may_be_over_in_a_second(error: Exception):
    failed = call_failed(1, error, index=2)
    assert (failed.kind, failed.retry_after_s, failed.index) == (FailureKind.OVERLOADED, 1.0, 2)
    assert str(error) == "" or str(error) not in failed.reason


def test_other_errors_that_speak_of_memory_are_none_of_that():
    for error in (ValueError("can't allocate memory"), RuntimeError("memory is fine")):
        assert not is_out_of_memory(error)
        assert call_failed(1, error).kind is FailureKind.INTERNAL
