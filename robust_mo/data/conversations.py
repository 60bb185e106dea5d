"""Conversations as a model reads them: messages -> token ids, loss mask, prompt ids; token ids -> answer.

Promises
* Ids come from the model's own chat template, and nothing is added to what the template renders (so BOS is
  there exactly as often as the template writes it).
* What the sampler feeds is what training saw: `encode(messages).tokens` begins with `prompt(messages[:-1])`.
  The whole text is tokenized at once, as `apply_chat_template(tokenize=True)` does it, except where a token
  would span the end of a prompt (an answer that begins with a newline can do that): there both sides are
  tokenized apart.
* The loss mask covers every assistant turn: its tokens and its end-of-turn token, and nothing else.
* A rendering is the same on every day: templates that write a date get DATE.
* No model thinks before it answers: templates that ask whether it is to (Qwen3's) are told no.
* A message cannot forge control tokens.  Text such as "<|eot_id|>" inside a message is tokenized as the
  characters it is made of; only the template writes control tokens.
* Padding is never a token that ends an answer.

Knows nothing of files of conversations (prompts.py), of batches, or of a model beyond its tokenizer folder.
"""

import dataclasses
import datetime
import json
import pathlib
import re
from collections.abc import Iterable, Sequence

import jinja2
import numpy as np

from robust_mo.errors import InputError, first_line

Message = dict[str, str]  # {"role": one of ROLES, "content": text}
ROLES = ("system", "user", "assistant")

# "Today" in every template that writes a date.  26 Jul 2024 is the constant in Llama 3.1's own template; one
# that would ask the clock (Llama 3.2) gets it too, or the same command would train on other text tomorrow.
DATE = datetime.date(2024, 7, 26)
_NO_THOUGHTS = "{%- set enable_thinking = false %}"
_ASKS_THE_CLOCK = re.compile(r"""strftime_now\(\s*(["'])(.*?)\1\s*\)""")  # strftime_now("%d %b %Y")


@dataclasses.dataclass(frozen=True, eq=False)
class Example:
    """One tokenized conversation."""

    tokens: np.ndarray  # int32 [length]
    loss_mask: np.ndarray  # bool [length], True on the tokens that the model must learn to produce


def fit(example: Example, length: int, over_long: str) -> Example | None:
    """The example if it has at most `length` tokens; else None ("drop") or its first `length` ones ("cut").

    Also None where the cut leaves nothing to learn.  Raises InputError for another `over_long`.
    """
    if over_long not in ("drop", "cut"):
        raise InputError(f"over_long is {over_long!r}; give 'drop' or 'cut'")
    if len(example.tokens) <= length:
        return example
    if over_long == "drop" or not example.loss_mask[:length].any():
        return None
    return Example(example.tokens[:length], example.loss_mask[:length])


def with_system(messages: list[Message], system: str) -> list[Message]:
    """The messages behind a system message, unless it is empty or they have one of their own."""
    if not system or (messages and messages[0]["role"] == "system"):
        return messages
    return [{"role": "system", "content": system}, *messages]


def check_messages(messages: Sequence[Message]) -> None:
    """Raises InputError unless `messages` is a list of {"role", "content"} that does not open with an answer.

    Fields beside role and content are allowed, and ignored everywhere.
    """
    if not isinstance(messages, list | tuple) or not messages:
        raise InputError(f"messages must be a list of at least one message, not {_shorten(messages)}")
    for number, message in enumerate(messages, start=1):
        if not isinstance(message, dict) or not {"role", "content"} <= message.keys():
            raise InputError(f"message {number} must be an object with 'role' and 'content', not {_shorten(message)}")
        role, content = message["role"], message["content"]
        if role not in ROLES:
            raise InputError(f"message {number} has the role {_shorten(role)}; use one of {', '.join(ROLES)}")
        if not isinstance(content, str):
            raise InputError(f"message {number} has the content {_shorten(content)}; it must be a string")
        try:
            content.encode("utf-8")
        except UnicodeEncodeError as error:
            raise InputError(
                f"message {number} holds half a surrogate pair (character {error.start + 1} of its content), "
                "which no tokenizer can read; repair that text"
            ) from None
    if messages[0]["role"] == "assistant":
        raise InputError("message 1 is an assistant message; begin with the user message that it answers")


class ChatFormat:
    """A tokenizer with its chat template.

    Attributes:
      tokenizer: the Hugging Face tokenizer.
      template: its chat template, with DATE in place of a question to the clock, and thinking switched off.
      end_of_turn_id: the token that the template writes after an assistant's answer.
      stop_ids: ascending ids of the tokens that end an answer; `end_of_turn_id` is one of them.
      pad_id: what fills up batches; no stop id and not BOS.
    """

    def __init__(self, tokenizer, declared_stop_ids: Iterable[int], vocab_size: int | None = None):
        """`declared_stop_ids` are those that the model's own files name, `vocab_size` how many tokens it knows, where
        that is known; `from_folder` reads them.

        Raises InputError where the tokenizer has no chat template, where the template does not end an answer
        with a special token, and where no token is left for padding.
        """
        self.tokenizer, self._vocab_size = tokenizer, vocab_size
        try:
            template = tokenizer.get_chat_template()
        except ValueError:
            raise InputError(
                f"{self._source} has no chat template; take the instruct version of the model, or put the "
                "template it was trained with into chat_template.jinja beside tokenizer.json"
            ) from None
        self.template = _ASKS_THE_CLOCK.sub(lambda call: repr(DATE.strftime(call[2])), template)
        if "strftime_now(" in self.template:
            raise InputError(
                f"the chat template of {self._source} writes the date of today, so no run can be repeated; "
                "put a constant in place of strftime_now(...)"
            )
        if "enable_thinking" in self.template and not self.template.startswith(_NO_THOUGHTS):
            # Training shows no thoughts, and thoughts of many tokens would be graded in an answer's place.
            self.template = _NO_THOUGHTS + self.template

        declared = set(declared_stop_ids) | ({tokenizer.eos_token_id} - {None})
        added = tokenizer.added_tokens_decoder
        self._control_ids = {id for id, token in added.items() if token.special or id in declared}
        # Longest first: where one control token begins with another, tokenizers take the longer one.
        texts = sorted((added[id].content for id in self._control_ids), key=len, reverse=True)
        self._control = re.compile("(" + ("|".join(map(re.escape, texts)) or "(?!)") + ")")

        probe = [{"role": "user", "content": "Question"}, {"role": "assistant", "content": "Answer"}]
        rendered = self._render(probe)
        before_answer, _, after_answer = rendered.rpartition("Answer")
        end_of_turn = self._control.search(after_answer)
        if not before_answer or end_of_turn is None:
            raise InputError(
                f"the chat template of {self._source} does not write an answer's text followed by a special "
                "token, so a model trained with it could not learn to stop; use another chat template"
            )
        self.end_of_turn_id = tokenizer.convert_tokens_to_ids(end_of_turn[0])
        self.stop_ids = tuple(sorted(declared | {self.end_of_turn_id}))
        self.pad_id = self._choose_padding(rendered)

    @classmethod
    def from_folder(cls, folder: str | pathlib.Path, model: str | pathlib.Path | None = None) -> "ChatFormat":
        """Reads a Hugging Face folder: tokenizer, chat template, and the stop ids that generation_config.json
        names or, where that names none, config.json; the configs from `model`, where that is another folder.

        No code in the folder is run, nothing is fetched.  Raises InputError for missing or unreadable parts.
        """
        folder = pathlib.Path(folder)
        if not folder.is_dir():
            raise InputError(f"{folder} is not a folder; give a Hugging Face folder with a tokenizer")
        model = folder if model is None else pathlib.Path(model)
        declared = _stop_ids(model / "generation_config.json") or _stop_ids(model / "config.json")
        # The class that tokenizer_config.json names may make itself anew from vocabulary and merges alone, and lose how
        # tokenizer.json splits text: SmolLM2's digits.  Imported here because it takes seconds, and most of what
        # imports this module does not need it.
        if (folder / "tokenizer.json").is_file():
            from transformers import PreTrainedTokenizerFast as Tokenizer
        else:  # which takes three times as long where torch is installed
            from transformers import AutoTokenizer as Tokenizer
        try:
            tokenizer = Tokenizer.from_pretrained(folder, trust_remote_code=False, local_files_only=True)
        except Exception as error:  # the library passes on what its parsers raise, bare Exception included
            raise InputError(
                f"{folder} holds no tokenizer that can be read without running its code; it needs "
                f"tokenizer.json and tokenizer_config.json ({first_line(error)})"
            ) from error
        return cls(tokenizer, declared, _read(model / "config.json").get("vocab_size"))

    def encode(self, messages: Sequence[Message]) -> Example:
        """A conversation to train on, with loss on every assistant turn.

        Raises InputError where `check_messages` does, where there is no assistant message, and where the
        template renders a message differently once others follow it (some cut the reasoning out of earlier
        answers): the model would be trained on other text than it is asked for.
        """
        messages, mark = self._without_control_tokens(messages)
        turns = [index for index, message in enumerate(messages) if message["role"] == "assistant"]
        if not turns:
            raise InputError("the conversation has no assistant message to learn from; add the answer")
        text = self._render(messages)
        for turn in turns:
            if not text.startswith(self._render(messages[: turn + 1])):
                raise InputError(
                    f"the chat template of {self._source} rewrites message {turn + 1} once others follow, so "
                    "training would see another answer than the model gives; end conversations there"
                )
        tokens, answers = self._tokenize_in_parts(messages, text, mark, strict=True)
        loss_mask = np.zeros(len(tokens), dtype=bool)
        for start in answers:
            # The first one is the end of this answer, because no content can produce one.
            loss_mask[start : tokens.index(self.end_of_turn_id, start) + 1] = True
        return Example(self._known(tokens), loss_mask)

    def prompt(self, messages: Sequence[Message]) -> np.ndarray:
        """int32 [length]: the conversation so far and the header of the answer that is asked for.

        Raises InputError where `check_messages` does, and where the conversation already ends with an answer.
        """
        messages, mark = self._without_control_tokens(messages)
        if messages[-1]["role"] == "assistant":
            raise InputError("the prompt ends with an assistant message; end it with the one to be answered")
        tokens, _ = self._tokenize_in_parts(messages, self._render(messages, ask=True), mark, strict=False)
        return self._known(tokens)

    def _known(self, tokens: list[int]) -> np.ndarray:
        """int32 [length].  Raises InputError where the model has no embedding for a token."""
        largest = max(tokens, default=0)
        if self._vocab_size is not None and largest >= self._vocab_size:
            token = self.tokenizer.convert_ids_to_tokens(largest)
            raise InputError(
                f"the token {token!r} has id {largest} in {self._source}, and the model knows {self._vocab_size} "
                "(vocab_size in its config.json): take it out of the text, or resize the model's embeddings"
            )
        return np.array(tokens, dtype=np.int32)

    def decode(self, tokens: Iterable[int]) -> str:
        """Text of an answer: all before the first stop token, without special tokens, spaces untouched."""
        answer = []
        for token in tokens:
            if token in self.stop_ids:
                break
            answer.append(int(token))
        return self.tokenizer.decode(answer, skip_special_tokens=True, clean_up_tokenization_spaces=False)

    @property
    def _source(self) -> str:
        return self.tokenizer.name_or_path or "the tokenizer"

    def _choose_padding(self, rendered: str) -> int:
        """The tokenizer's own padding if that ends nothing; Llama 3.1's; or else a special token that the
        template does not write, a reserved one first."""
        added = self.tokenizer.added_tokens_decoder
        ids = {token.content: id for id, token in added.items()}
        spare = [id for id, token in added.items() if token.special and token.content not in rendered]
        spare.sort(key=lambda id: ("reserved" not in added[id].content, id))
        unusable = {None, self.tokenizer.bos_token_id, *self.stop_ids}
        first = (self.tokenizer.pad_token_id, ids.get("<|finetune_right_pad_id|>"))
        usable = [id for id in (*first, *spare) if id not in unusable]
        # Those that the model knows go first; of a tokenizer that is another model's it may know none.
        usable.sort(key=lambda id: self._vocab_size is not None and id >= self._vocab_size)
        if usable:
            return usable[0]
        raise InputError(
            f"{self._source} has no special token left for padding: each one ends an answer or is written by "
            "the chat template; add a padding token to tokenizer.json and tokenizer_config.json"
        )

    def _without_control_tokens(self, messages: Sequence[Message]) -> tuple[list[Message], str]:
        """Checked messages in whose contents no control token can be found, and the mark that achieves it.

        The mark is a character that no content holds.  It is put behind each character of a control token,
        and `_tokenize` takes it out again: "<|eot|>" -> "<+|+e+o+t+|+>+" -> ids of plain "<|eot|>".  It is ""
        where no content holds a control token, which is nearly always.
        """
        check_messages(messages)
        messages = [{"role": message["role"], "content": message["content"]} for message in messages]
        everything = "\n".join(message["content"] for message in messages)
        if not self._control.search(everything):
            return messages, ""
        private_use = map(chr, range(0xE000, 0xF900))
        mark = next((character for character in private_use if character not in everything), "")
        for message in messages:
            content = self._control.sub(lambda found: mark.join(found[0]) + mark, message["content"])
            if forged := self._control.search(content):
                raise self._cannot_be_plain(forged[0])
            message["content"] = content
        return messages, mark

    def _cannot_be_plain(self, token: str) -> InputError:
        return InputError(
            f"a message holds the text {token!r}, which {self._source} can only read as a control token; remove it"
        )

    def _render(self, messages: Sequence[Message], ask: bool = False) -> str:
        """The template's text; with `ask`, the header of the next answer behind it."""
        try:
            return self.tokenizer.apply_chat_template(
                messages,
                chat_template=self.template,
                tokenize=False,
                add_generation_prompt=ask,
                date_string=DATE.strftime("%d %b %Y"),
            )
        except Exception as error:  # the template is a program: it may also divide by zero
            if type(error) is jinja2.TemplateError:  # what a template's own raise_exception(...) becomes
                system = "; if it takes no system message, set --config.system_prompt= (in sample, leave --system out)"
                raise InputError(
                    f"the chat template of {self._source} refuses the conversation ({first_line(error)}); "
                    f"change its roles or their order{system * (messages[0]['role'] == 'system')}"
                ) from error
            raise InputError(
                f"the chat template of {self._source} cannot be rendered ({type(error).__name__}: "
                f"{first_line(error)}); mend it, or take the one that the model was trained with"
            ) from error

    def _tokenize_in_parts(
        self, messages: Sequence[Message], text: str, mark: str, strict: bool
    ) -> tuple[list[int], list[int]]:
        """Ids of the rendered `text`, and the positions in them at which the assistant messages begin; unless `strict`,
        without those before which other text stands than asked for them."""
        cuts = []
        for index, message in enumerate(messages):
            if message["role"] == "assistant":
                prompt = self._render(messages[:index], ask=True)
                if not text.startswith(prompt):
                    if not strict:
                        continue
                    raise InputError(
                        f"the chat template of {self._source} asks for message {index + 1} with other text "
                        "than it writes before it, so training would not see what the model is asked; use "
                        "another chat template"
                    )
                cuts.append(len(prompt))
        tokens, done, answers = [], 0, []
        for cut in (*cuts, len(text)):
            together = self._tokenize(text[:cut], mark)
            if together[: len(tokens)] == tokens:
                tokens = together
            else:
                tokens = tokens + self._tokenize(text[done:cut], mark)
            done = cut
            answers.append(len(tokens))
        return tokens, answers[:-1]

    def _tokenize(self, text: str, mark: str) -> list[int]:
        if not mark or mark not in text:
            return self.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        # As the tokenizer does it: split at the control tokens (now only the template's), then the rest.
        tokens = []
        for index, piece in enumerate(self._control.split(text)):
            if index % 2:
                tokens.append(self.tokenizer.convert_tokens_to_ids(piece))
            elif piece:
                plain = piece.replace(mark, "")
                ids = self.tokenizer(plain, add_special_tokens=False, split_special_tokens=True)["input_ids"]
                if forged := self._control_ids.intersection(ids):
                    raise self._cannot_be_plain(self.tokenizer.convert_ids_to_tokens(forged.pop()))
                tokens += ids
        return tokens


def _read(path: pathlib.Path) -> dict:
    """A config file; {} where it is not there."""
    if not path.is_file():
        return {}
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except ValueError:
        values = None
    if not isinstance(values, dict):
        raise InputError(f"{path} is not a JSON object; fetch the file again")
    return values


def _stop_ids(path: pathlib.Path) -> set[int]:
    """`eos_token_id` of a config file: absent, a number or a list."""
    declared = _read(path).get("eos_token_id")
    ids = declared if isinstance(declared, list) else [declared]
    if not all(id is None or type(id) is int for id in ids):
        raise InputError(f"{path} has eos_token_id {_shorten(declared)}; give a number or a list of numbers")
    return set(ids) - {None}


def _shorten(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."
