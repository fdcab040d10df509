"""Answers in OpenAI's shapes: whole, and as server-sent events."""

from __future__ import annotations

import json
import time
import uuid
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from lora.errors import CodedError
from text.detokenise import HALF, Detokeniser
from text.generation import Generation
from text.sampling import Chosen
from worker.failures import OutOfMemory, unexpected
from worker.parts import Answer
from worker.stop import Cancelled
from worker.text.input import TextRequest
from worker.text.parameters import CHAT

DONE = "data: [DONE]\n\n"


def raise_first(texts: Sequence[Generation]) -> None:
    """Raises: the first error of a text, as one with a code."""
    for error in (text.error for text in texts):
        if isinstance(error, torch.OutOfMemoryError):
            raise OutOfMemory("the device's memory did not suffice", "Ask for a shorter text.")
        if isinstance(error, CodedError):
            raise error
        if isinstance(error, Exception):
            raise unexpected(error) from error
        if error is not None:
            raise Cancelled("the worker ends")


class Writer:
    """Writes the answer of one request, whose texts are under way."""

    def __init__(
        self, request: TextRequest, texts: Sequence[Generation], model: str, tokenizer: Any
    ) -> None:
        self._request, self._texts, self._model, self._tokenizer = request, texts, model, tokenizer
        self._chat = request.kind == CHAT
        self._head = {
            "id": f"{'chatcmpl' if self._chat else 'cmpl'}-{uuid.uuid4().hex}",
            "object": "chat.completion" if self._chat else "text_completion",
            "created": int(time.time()),
            "model": model,
        }
        self._begun = [False] * len(texts)
        self._ended = [False] * len(texts)
        self._told = [0] * len(texts)
        """Characters of each text so far, for completions' offsets."""

    def whole(self, extras: Mapping[str, Any]) -> Answer:
        """The answer as one object, once all texts have ended."""
        choices = []
        for index, text in enumerate(self._texts):
            pieces = text.pieces()
            words = self._echo() + "".join(piece.text for piece in pieces)
            tokens = [chosen for piece in pieces for chosen in piece.tokens]
            choice: dict[str, Any] = {"index": index}
            if self._chat:
                choice["message"] = {"role": "assistant", "content": words}
            else:
                choice["text"] = words
            choice["logprobs"] = self._logprobs(index, tokens)
            choices.append({**choice, "finish_reason": text.finish, "stop_reason": text.stopped_by})
        return {**self._head, "choices": choices, "usage": self.usage(), **extras}

    def events(self, extras: Mapping[str, Any]) -> str:
        """What came since the last call, as server-sent events; empty for nothing.

        `extras` stand in the last event before `[DONE]`.
        """
        made = [event for index in range(len(self._texts)) for event in self._news(index)]
        if made and all(self._ended):
            if self._request.usage:
                made.append({"choices": [], "usage": self.usage(), **extras})
            else:
                made[-1].update(extras)
        kind = "chat.completion.chunk" if self._chat else "text_completion"
        text = "".join(_event({**self._head, "object": kind, **event}) for event in made)
        return text + (DONE if made and all(self._ended) else "")

    def _news(self, index: int) -> list[dict[str, Any]]:
        text = self._texts[index]
        finish = text.finish  # before the pieces: what comes later is in the next call
        pieces = text.pieces()
        made = []
        if not self._begun[index]:
            self._begun[index] = True
            if self._chat:
                made.append(self._chunk(index, {"role": "assistant", "content": ""}))
            elif echo := self._echo():
                made.append(self._chunk(index, echo))
        words = "".join(piece.text for piece in pieces)
        tokens = [chosen for piece in pieces for chosen in piece.tokens]
        if words or (tokens and text.sampling.logprobs is not None):
            told = self._logprobs(index, tokens)
            made.append(self._chunk(index, {"content": words} if self._chat else words, told))
        if finish is not None and not self._ended[index]:
            self._ended[index] = True
            last = self._chunk(index, {} if self._chat else "")
            last["choices"][0] |= {"finish_reason": finish, "stop_reason": text.stopped_by}
            made.append(last)
        return made

    def _chunk(self, index: int, content: Any, logprobs: Any = None) -> dict[str, Any]:
        part = "delta" if self._chat else "text"
        choice = {"index": index, part: content, "logprobs": logprobs, "finish_reason": None}
        return {"choices": [choice]}

    def _echo(self) -> str:
        prompt = self._request.prompt
        if self._chat or not self._request.rules["echo"]:
            return ""
        return prompt if isinstance(prompt, str) else str(self._tokenizer.decode(list(prompt)))

    def usage(self) -> dict[str, int]:
        """Tokens of the prompt, of all texts, and their sum."""
        prompt = len(self._texts[0].prompt)
        made = sum(len(text.tokens) for text in self._texts)
        return {
            "prompt_tokens": prompt,
            "completion_tokens": made,
            "total_tokens": prompt + made,
        }

    def _logprobs(self, index: int, tokens: Sequence[Chosen]) -> Any:
        if self._texts[index].sampling.logprobs is None:
            return None
        if self._chat:
            return {
                "content": [
                    {
                        **self._named(chosen.token, chosen.logprob),
                        "top_logprobs": [self._named(*pair) for pair in chosen.likeliest],
                    }
                    for chosen in tokens
                ]
            }
        words = [self._word(chosen.token) for chosen in tokens]
        offsets = []
        for word in words:
            offsets.append(self._told[index])
            self._told[index] += len(word)
        return {
            "tokens": words,
            "token_logprobs": [chosen.logprob for chosen in tokens],
            "top_logprobs": [
                {self._word(token): value for token, value in chosen.likeliest} for chosen in tokens
            ],
            "text_offset": offsets,
        }

    def _named(self, token: int, logprob: float | None) -> dict[str, Any]:
        word = self._word(token)
        return {"token": word, "logprob": logprob, "bytes": list(word.encode())}

    def _word(self, token: int) -> str:
        words = Detokeniser(self._tokenizer, special=True)
        word = words.push(token) + words.finish()
        return f"token_id:{token}" if HALF in word else word  # as vLLM names tokens without words


def _event(value: Mapping[str, Any]) -> str:
    return f"data: {json.dumps(value, ensure_ascii=False)}\n\n"
