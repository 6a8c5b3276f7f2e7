"""The model that the services serve: its name, limits and tokenizer, and whether it takes calls."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from concurrent.futures import Executor
from dataclasses import dataclass
from functools import partial
from typing import TypeVar

from server.engine.interface import Engine, EngineState
from server.engine.messages import EngineReady
from server.rpc.errors import ModelNotFound, ModelNotLoaded, Unavailable
from server.rpc.requests import ModelLimits, Prompt, TokenPrompt
from server.rpc.tokenizer import ModelTokenizer
from server.rpc.validation import Violations

__all__ = ["LoadedModel", "ServedModel"]

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class LoadedModel:
    """What is derived from one load of the model."""

    ready: EngineReady
    limits: ModelLimits


class ServedModel:
    """Shared by the services. All methods run on the event loop; tokenizer work runs in ``executor``."""

    def __init__(self, engine: Engine, tokenizer: ModelTokenizer, *, name: str, executor: Executor) -> None:
        self.engine = engine
        self.tokenizer = tokenizer
        self.name = name
        self._executor = executor
        self._loaded: LoadedModel | None = None
        self._draining = False

    def drain(self) -> None:
        """Let services refuse new calls from now on."""
        self._draining = True

    def check_name(self, name: str) -> None:
        """Raise :class:`ModelNotFound` unless ``name`` is the model's or empty.

        What cannot be a name is left to the reading of the request, which reports all that is wrong with it.
        """
        if name not in ("", self.name) and Violations().model_name("model", name):
            raise ModelNotFound("no such model is served here")

    def loaded(self, name: str) -> LoadedModel:
        """Return the model that a client names; empty is the only one.

        Raises :class:`ModelNotFound`, :class:`ModelNotLoaded` or :class:`Unavailable`.
        """
        self.check_name(name)
        ready = self.engine.ready
        if ready is None:
            if self.engine.state is EngineState.UNLOADED:
                raise ModelNotLoaded("the model is not loaded")
            raise Unavailable("the model is being loaded", reason="LOADING", retry_after_s=1.0)
        if self._loaded is None or self._loaded.ready is not ready:
            self.tokenizer.detokenizers.cover(ready.vocab_size)
            self._loaded = LoadedModel(ready, ModelLimits.of(ready))
        return self._loaded

    def check_taking_requests(self) -> None:
        """Raise :class:`Unavailable` or :class:`ModelNotLoaded` while the engine takes nothing new."""
        state = self.engine.state
        if self._draining or state is EngineState.DRAINING:
            raise Unavailable("the server is shutting down", reason="DRAINING")
        if state is EngineState.UNLOADED:
            raise ModelNotLoaded("the model is not loaded")
        if state is EngineState.LOADING:
            raise Unavailable("the model is being loaded", reason="LOADING", retry_after_s=1.0)
        if state is EngineState.DEAD:
            raise Unavailable(
                "the engine was lost and is being restarted", reason="ENGINE_LOST", retry_after_s=1.0
            )

    async def tokenize(
        self, prompt: Prompt, limits: ModelLimits, *, add_special_tokens: bool = True
    ) -> list[int]:
        """Return a prompt's token ids. Raises :class:`InvalidArgument`."""
        if isinstance(prompt, TokenPrompt):
            return prompt.token_ids
        return await self.in_pool(
            partial(
                self.tokenizer.encode,
                prompt,
                max_model_length=limits.max_model_length,
                add_special_tokens=add_special_tokens,
            )
        )

    async def in_pool(self, work: Callable[[], T]) -> T:
        """Run tokenizer work off the event loop."""
        return await asyncio.get_running_loop().run_in_executor(self._executor, work)
