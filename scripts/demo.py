"""Stream three questions that share one long system prompt, and show what the shared prefix saves.

    make demo            a server must run (make run); KVSERVE_TARGET says where, if it is not localhost:50051

The first question computes the system prompt; the others find it in the cache, so that only their own few
tokens are computed. Run it again, and each question was asked before: nothing of its prompt is computed.
"""

from __future__ import annotations

import argparse
import asyncio
import sys
import textwrap
import time
from dataclasses import dataclass

import kvserve

SYSTEM_PROMPT = """\
You help people who read and write the documentation of Python. Your answers sound like the
reference pages of the standard library: short, exact, in the present tense, and free of praise.
Follow these rules.

Say first what a thing is. A function returns something or changes something; begin with the verb
that says which. A class is described by what one of its objects stands for, and only then by how it
is made. A module is described by the task that it takes off the reader's hands.

Then name the arguments. Give each one by its name, say what kind of value it takes, and say what
happens when it is left out. If an argument is a callable, say when it is called and with what. If
an argument is an iterable, say whether it is read at once or one item at a time, and whether it may
be infinite. If two arguments exclude each other, say so where the first of them is described, and
name the exception that is raised when both are given.

Then say what is returned. If the result is a new object, say so; if it is a view that follows later
changes of the original, say that instead. If the order of the items is defined, define it. If
nothing is returned, there is no need to mention it, unless a reader might expect something, as with
methods that sort or reverse a list in place.

Then name the exceptions, each with the condition that raises it. A missing key raises KeyError, an
index outside the sequence raises IndexError, a value of the right type that makes no sense raises
ValueError, and a value of the wrong type raises TypeError. An operation of the system that fails
raises OSError or one of its subclasses, and the name of the file belongs in the message. Do not
list exceptions that any code may raise, such as MemoryError.

Mention cost where it is surprising. A membership test takes linear time in a list and constant
time, on average, in a set or a dictionary. Adding strings in a loop copies what was there before;
joining a list of strings does not. Reading a large file as one string needs as much memory as the
file is long; iterating over its lines does not.

Mention threads, processes and the event loop where they matter. A function that blocks should not
be called from a coroutine; say which other function to await instead. An object that may be used by
one thread only should say so, and a lock that can be taken again by its owner should say that too.
A process that is started should also be waited for.

Mention changes between versions last. One line for each: the version, then what was added, changed
or removed. If a name is deprecated, say what takes its place, and say in which version it is going
to disappear if that is known.

Examples are short and can be run as they stand. They import what they use, they print what matters,
and their output is what the reader will see. An example that needs a file creates it first, and
removes it at the end. Prefer names from everyday life to foo and bar, and prefer one example that
shows the common case to three that show rare ones.

If you are not sure whether something is true, leave it out. If a question cannot be answered from
the documentation, say which page comes nearest to it. Do not repeat the question, do not apologise,
and stop when the answer is complete.
"""

QUESTIONS = (
    "What does textwrap.fill do?",
    "When does a dictionary raise KeyError?",
    "What is the class collections.OrderedDict?",
)


@dataclass(frozen=True, slots=True)
class Measured:
    """One question's figures. Times are in seconds and start when the call is opened."""

    question: str
    usage: kvserve.Usage
    first_token_s: float
    server_first_token_s: float
    total_s: float

    @property
    def tokens_per_s(self) -> float:
        """Return the speed of the whole call, waiting for the first token included."""
        return self.usage.generated_tokens / self.total_s


async def ask(client: kvserve.AsyncClient, question: str, max_new_tokens: int, *, chat: bool) -> Measured:
    """Stream one answer to the terminal."""
    if chat:
        messages = [kvserve.ChatMessage("system", SYSTEM_PROMPT), kvserve.ChatMessage("user", question)]
        stream = client.generate(messages=messages, max_new_tokens=max_new_tokens)
    else:
        prompt = f"{SYSTEM_PROMPT}\nQuestion: {question}\nAnswer:"
        stream = client.generate(prompt, max_new_tokens=max_new_tokens)
    opened_at_s = time.perf_counter()
    async with stream:
        async for event in stream:
            print(event.text, end="", flush=True)
    total_s = time.perf_counter() - opened_at_s
    result = stream.result
    return Measured(
        question=question,
        usage=result.usage,
        first_token_s=stream.first_token_s or total_s,
        server_first_token_s=result.timings.first_token_s,
        total_s=total_s,
    )


def describe(measured: Measured) -> str:
    """Return the line under an answer."""
    usage = measured.usage
    here_ms, server_ms = measured.first_token_s * 1000, measured.server_first_token_s * 1000
    return (
        f"[{usage.prompt_tokens} prompt tokens, {usage.cached_tokens} of them cached"
        f" | first token {here_ms:.1f} ms here, {server_ms:.1f} ms in the server"
        f" | {usage.generated_tokens} tokens at {measured.tokens_per_s:.0f}/s]"
    )


def table(rows: list[Measured]) -> str:
    """Return all figures side by side."""
    heads = ("prompt", "cached", "first token", "(server)", "tokens/s")
    lines = ["question".ljust(44) + "".join(head.rjust(13) for head in heads)]
    for row in rows:
        cells = (
            f"{row.usage.prompt_tokens}",
            f"{row.usage.cached_tokens}",
            f"{row.first_token_s * 1000:.1f} ms",
            f"{row.server_first_token_s * 1000:.1f} ms",
            f"{row.tokens_per_s:.0f}",
        )
        lines.append(textwrap.shorten(row.question, 43).ljust(44) + "".join(cell.rjust(13) for cell in cells))
    return "\n".join(lines)


async def run(target: str | None, *, wait_s: float, max_new_tokens: int) -> None:
    """Ask the questions one after the other."""
    async with kvserve.AsyncClient(target) as client:
        try:
            await client.wait_ready(wait_s)
        except kvserve.DeadlineExceeded as error:
            sys.exit(f"demo: no server is ready at {client.target} ({error}). Start one with: make run")
        info = await client.model_info()
        print(f"{info.name}: {info.num_parameters:,} parameters, {info.dtype} on {info.device}\n")
        rows = []
        for question in QUESTIONS:
            print(f"> {question}")
            measured = await ask(client, question, max_new_tokens, chat=info.has_chat_template)
            rows.append(measured)
            print(f"\n{describe(measured)}\n")
        print(table(rows))


def main() -> None:
    """Run the demo."""
    parser = argparse.ArgumentParser(
        description="Stream three questions that share one long system prompt, and show what sharing saves."
    )
    parser.add_argument("--target", metavar="HOST:PORT", help="default: KVSERVE_TARGET, then localhost:50051")
    parser.add_argument(
        "--max-new-tokens", type=int, default=64, metavar="N", help="for each answer (default: 64)"
    )
    parser.add_argument(
        "--wait", type=float, default=5.0, metavar="SECONDS", help="for the server (default: 5)"
    )
    arguments = parser.parse_args()
    try:
        asyncio.run(run(arguments.target, wait_s=arguments.wait, max_new_tokens=arguments.max_new_tokens))
    except kvserve.Error as error:
        sys.exit(f"demo: {error}")
    except KeyboardInterrupt:
        sys.exit(130)


if __name__ == "__main__":
    main()
