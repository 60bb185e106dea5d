"""Answers as text: conversations in, texts out, through a chat template and the sampler.

Promises: nothing is added to a conversation beyond what the model's own template adds.
Does not know files, backdoors or grading.
"""

import dataclasses
from collections.abc import Callable, Iterator

import numpy as np

from robust_mo.data.conversations import ChatFormat, Message
from robust_mo.errors import InputError, PromptError
from robust_mo.model.llama import Llama
from robust_mo.sampling.decoding import Greedy, Nucleus
from robust_mo.sampling.sampler import Request, Sampler


@dataclasses.dataclass(frozen=True)
class TextAnswer:
    """An answer.

    Attributes:
      text: without special tokens.
      finish_reason: "stop" or "length" (cut off).
      tokens: how many were sampled, the stop token included.
      logprobs: float32 [tokens], natural log of each token's probability at temperature 1.
    """

    text: str
    finish_reason: str
    tokens: int
    logprobs: np.ndarray


def iterate_answers(
    llama: Llama,
    params: dict,
    chat: ChatFormat,
    conversations: list[list[Message]],
    *,
    decoding: Greedy | Nucleus,
    max_new_tokens: int | list[int],
    seed: int,
    slots: int,
    on_progress: Callable[[int, int], None],
    first: int = 0,
) -> Iterator[TextAnswer]:
    """Yields the answers to the conversations from `first` on, each as soon as those before it are there.

    Args:
      max_new_tokens: one limit for all, or one for each.
      seed, slots, on_progress, first: see sampling/sampler.py.

    Raises:
      PromptError: a conversation does not fit the template or the model's context.
      InputError: as sampling/sampler.py's.
    """
    if slots < 0:
        raise InputError(
            f"batch_size is {slots}: give the number of rows to decode together, or 0 for what memory holds"
        )
    limits = [max_new_tokens] * len(conversations) if isinstance(max_new_tokens, int) else max_new_tokens
    requests = [
        Request(_prompt(chat, number, messages), limit)
        for number, (messages, limit) in enumerate(zip(conversations, limits, strict=True), 1)
    ]
    sampler = Sampler(llama, params, chat.stop_ids)
    waiting: dict[int, TextAnswer] = {}
    for index, answer in sampler.answers(requests, decoding, seed, slots, on_progress, first):
        text = chat.decode(answer.tokens)
        waiting[index] = TextAnswer(text, answer.finish_reason, len(answer.tokens), answer.logprobs)
        while first in waiting:
            yield waiting.pop(first)
            first += 1


def _prompt(chat: ChatFormat, number: int, messages: list[Message]) -> np.ndarray:
    try:
        return chat.prompt(messages)
    except InputError as error:
        raise PromptError(f"prompt {number}: {error}") from None


def answers(llama: Llama, params: dict, chat: ChatFormat, conversations: list[list[Message]], **settings):
    """All answers, in the order of the conversations; settings as for `iterate_answers`."""
    return list(iterate_answers(llama, params, chat, conversations, **settings))
