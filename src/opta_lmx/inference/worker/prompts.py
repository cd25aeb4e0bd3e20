"""A request's prompt as token ids: the model's chat template, the tokenizer, and the checks on both."""

from collections.abc import Sequence
from typing import Any

from jinja2.exceptions import TemplateError

from opta_lmx.errors import ContextTooLong, InvalidRequest, UnsupportedParameter
from opta_lmx.inference.worker.histories import histories
from opta_lmx.inference.worker.template_traits import Traits, traits_of
from opta_lmx.inference.worker.templates import Templates, TemplateTooCostly
from opta_lmx.types import ChatPrompt, JsonObject, Prompt, TextPrompt, TokenPrompt

# What a template can fail with, in its own words or for a mistake in it, over messages it was not written for or any.
_TEMPLATE_FAULTS = (
    TemplateError,
    ArithmeticError,
    AssertionError,
    AttributeError,
    LookupError,
    MemoryError,
    NameError,
    RuntimeError,
    SyntaxError,
    TypeError,
    ValueError,
)

# As transformers tells templates of reasoning: the first of these a message has, under each name in use.
_REASONING_FIELDS = ("reasoning_content", "thinking", "reasoning")

# Of a template's complaint; it may quote what it was given.
_MOST_CHARACTERS = 300


class PromptReader:
    """Renders and tokenises. Safe on any one thread while the model runs on another."""

    def __init__(self, tokenizer: Any, vocab_size: int, templates: Templates | None = None) -> None:
        """``tokenizer`` is a transformers tokenizer; ``templates`` brings bounds other than the usual ones."""
        self._tokenizer = tokenizer
        self._vocab_size = vocab_size
        self._templates = templates or Templates()
        self._traits: dict[str, Traits] = {}

    def read(self, prompt: Prompt, context_length: int, opening: Sequence[int] = ()) -> list[int]:
        """Token ids, at least one and fewer than the context; raises RequestRejected with the field at fault.

        ``opening`` are tokens with which the answer is made to begin.
        """
        if isinstance(prompt, ChatPrompt):
            field, ids = "messages", self._chat(prompt)
        elif isinstance(prompt, TextPrompt):
            field, ids = "prompt", list(self._tokenizer.encode(prompt.text))
        else:
            field, ids = "prompt", self._tokens(prompt)
        if not ids:
            ids = self._opening()
        ids += opening
        if len(ids) >= context_length:
            raise ContextTooLong(len(ids), context_length, param=field)
        return ids

    def _chat(self, prompt: ChatPrompt) -> list[int]:
        text = self.render(prompt)
        # The template writes the special tokens itself; the tokenizer must not add them again.
        return list(self._tokenizer.encode(text, add_special_tokens=False))

    def render(self, prompt: ChatPrompt, *, generation_prompt: bool = True) -> str:
        """The conversation as the model's template writes it; one it does not take is brought into other forms."""
        if not self._tokenizer.chat_template:
            raise UnsupportedParameter(
                "This model has no chat template. Use POST /v1/completions with a prompt instead.", param="messages"
            )
        fault: Exception | None = None
        try:
            for messages in histories(prompt.messages, self._traits_of(prompt.tools)):
                try:
                    return self.apply(messages, prompt, generation_prompt=generation_prompt)
                except TemplateTooCostly:
                    raise
                except _TEMPLATE_FAULTS as error:
                    # What it says of the client's own messages tells the client most.
                    fault = fault or error
        except TemplateTooCostly as error:
            fault = error
        reason = " ".join(str(fault).split())[:_MOST_CHARACTERS]
        raise InvalidRequest(
            f"The model's chat template does not accept these messages: {reason}", param="messages"
        ) from fault

    def _traits_of(self, tools: list[JsonObject] | None) -> Traits:
        """What the template that these tools choose loses; learned once."""
        template = self._tokenizer.get_chat_template(None, tools)
        if template not in self._traits:
            self._traits[template] = traits_of(self._render_or_none)
        return self._traits[template]

    def _render_or_none(self, messages: list[JsonObject]) -> str | None:
        try:
            return self.apply(messages, ChatPrompt(messages), generation_prompt=True)
        except TemplateTooCostly:
            raise
        except _TEMPLATE_FAULTS:
            return None

    def apply(self, messages: list[JsonObject], prompt: ChatPrompt, *, generation_prompt: bool = True) -> str:
        """What transformers' apply_chat_template gives for the same, in bounded time and memory."""
        variables = {
            **self._tokenizer.special_tokens_map,
            "documents": None,
            **prompt.template_kwargs,
            "messages": list(map(_as_transformers_tells, messages)),
            "tools": prompt.tools,
            "add_generation_prompt": generation_prompt,
        }
        return self._templates.render(self._tokenizer.get_chat_template(None, prompt.tools), variables)

    def boundaries(self, prompt: Prompt, ids: list[int]) -> tuple[int, ...]:
        """Positions where another prompt is likely to part from this one, ascending: end of system, end of history."""
        if not isinstance(prompt, ChatPrompt):
            return ()
        opening = [message for message in prompt.messages[:1] if message.get("role") in ("system", "developer")]
        places = []
        for messages in (opening, prompt.messages):
            if not messages:
                continue
            part = ChatPrompt(messages, prompt.tools, prompt.template_kwargs)
            try:
                text = self.render(part, generation_prompt=False)
            except InvalidRequest:  # many templates refuse a conversation without a user
                continue
            begins = list(self._tokenizer.encode(text, add_special_tokens=False))
            if ids[: len(begins)] == begins and 0 < len(begins) < len(ids):
                places.append(len(begins))
        return tuple(sorted(set(places)))

    def _tokens(self, prompt: TokenPrompt) -> list[int]:
        for at, token in enumerate(prompt.token_ids):
            if not 0 <= token < self._vocab_size:
                raise InvalidRequest(
                    f"Invalid token id {token}: this model's ids go from 0 to {self._vocab_size - 1}.",
                    param=f"prompt[{at}]",
                    code="invalid_value",
                )
        return list(prompt.token_ids)

    def _opening(self) -> list[int]:
        """An empty prompt begins where the model's texts begin."""
        for token in (self._tokenizer.bos_token_id, self._tokenizer.eos_token_id):
            if token is not None:
                return [token]
        raise InvalidRequest("The prompt is empty and this model has no token that begins a text.", param="prompt")


def _as_transformers_tells(message: JsonObject) -> JsonObject:
    # A content that is null here is meant to be (``histories.with_null_content``).
    told = {key: value for key, value in message.items() if value is not None or key == "content"}
    reasoning = next((told[name] for name in _REASONING_FIELDS if name in told), None)
    return told if reasoning is None else {"thinking": reasoning, **told, "reasoning_content": reasoning}
