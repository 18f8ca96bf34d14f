"""The body of a completion request: OpenAI's fields, and which attention and eviction method answer it."""

from typing import Annotated, Any, Literal, cast

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    WithJsonSchema,
    model_validator,
)

from cab_attention.attention_switch import SWITCHABLE
from cab_attention.budget import LARGEST, Budget
from cab_attention.method_options import method_classes
from cab_attention.text_generation import check_unicode

Name = Annotated[str, Field(max_length=200)]
StopString = Annotated[str, Field(min_length=1, max_length=200)]
TokenId = Annotated[int, Field(ge=0)]


def _known_budget(budget: Any) -> Any:
    Budget.parse(budget)
    return budget


def _at_most(limit: int) -> BeforeValidator:
    """Of an object's entries, counted before any is looked at: an error for each would take far more than the body."""

    def check(given: Any) -> Any:
        if isinstance(given, dict) and len(given) > limit:
            raise ValueError(f"at most {limit} entries are allowed")
        return given

    return BeforeValidator(check)


# The first error in a list is enough: a body may hold a million.
TokenIds = Annotated[list[TokenId], Field(min_length=1, fail_fast=True)]
# A list of one: a few more are refused with a message of their own.
ONE = Field(min_length=1, max_length=1000, fail_fast=True, json_schema_extra={"maxItems": 1})
Prompt = str | TokenIds | Annotated[list[str], ONE] | Annotated[list[TokenIds], ONE]
BudgetField = Annotated[
    int | float | str,
    AfterValidator(_known_budget),
    WithJsonSchema(
        {
            "anyOf": [
                {"type": "integer", "minimum": 1, "maximum": LARGEST},
                {"type": "number", "exclusiveMinimum": 0, "exclusiveMaximum": 1},
                {"const": "full"},
            ]
        }
    ),
]


class StreamOptions(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid", hide_input_in_errors=True)

    include_usage: bool | None = False


class CompletionRequest(BaseModel):
    """Null stands for the default. What OpenAI offers beyond it may be given only as what asks for nothing."""

    model_config = ConfigDict(strict=True, extra="forbid", hide_input_in_errors=True, allow_inf_nan=False)

    model: Name | None = Field(None, description="The model's id, as /v1/models says. Default: the one that is served.")
    prompt: Prompt = Field(description="Text, or token ids.")
    max_tokens: Annotated[int, Field(ge=1)] | None = Field(16, description="Of the answer, at most.")
    temperature: Annotated[float, Field(ge=0, le=2)] | None = Field(1.0, description="0: the most likely token.")
    top_p: Annotated[float, Field(gt=0, le=1)] | None = Field(
        1.0, description="Of the most likely tokens, those that together have this probability."
    )
    top_k: Annotated[int, Field(ge=0)] | None = Field(0, description="So many of the most likely tokens; 0: all.")
    seed: Annotated[int, Field(ge=0, lt=2**63)] | None = Field(
        None, description="Default: drawn, and told in the answer."
    )
    stop: StopString | Annotated[list[StopString], Field(max_length=4, fail_fast=True)] | None = Field(
        None, description="Strings that end the answer."
    )
    stream: bool | None = Field(False, description="Server-sent events, ended by `data: [DONE]`.")
    stream_options: Annotated[StreamOptions, _at_most(32)] | None = Field(None, description="With `stream` only.")
    user: Name | None = Field(None, description="Not looked at.")

    attention_implementation: Name | None = Field("cab", json_schema_extra={"enum": [*SWITCHABLE, None]})
    method: Name | None = Field(
        None, description="Eviction method. Default: full.", json_schema_extra={"enum": [*method_classes(), None]}
    )
    budget: BudgetField | None = Field(
        None,
        description="Tokens that a method keeps a layer and KV head, a fraction of the prompt, or full. Default: 128.",
    )
    method_options: Annotated[dict[Name, int | float | bool | Name | None], _at_most(32)] | None = Field(
        None, description="As /v1/methods lists them."
    )
    return_kept: bool | None = Field(
        False, description="Answer with the positions that were kept, and the prompt's text token by token."
    )

    n: Literal[1] | None = Field(1, description="Not supported.")
    best_of: Literal[1] | None = Field(1, description="Not supported.")
    echo: Literal[False] | None = Field(False, description="Not supported.")
    logprobs: None = Field(None, description="Not supported.")
    suffix: None = Field(None, description="Not supported.")
    logit_bias: Annotated[dict[str, float], Field(max_length=0), _at_most(0)] | None = Field(
        None, description="Not supported."
    )
    presence_penalty: Annotated[float, Field(ge=0, le=0)] | None = Field(0, description="Not supported.")
    frequency_penalty: Annotated[float, Field(ge=0, le=0)] | None = Field(0, description="Not supported.")

    @model_validator(mode="before")
    @classmethod
    def _one_unknown_parameter(cls, given: Any) -> Any:
        """Of unknown parameters the first is enough to refuse it; each would be an error of its own."""
        if not isinstance(given, dict):
            return given
        known = cls.model_fields
        first = next((name for name in given if name not in known), None)
        return {name: value for name, value in given.items() if name == first or name in known}

    @property
    def one_prompt(self) -> str | list[int]:
        """The text or the token ids. Raises ValueError for several prompts, or a text that is no Unicode."""
        prompt = self.prompt
        if isinstance(prompt, list) and not isinstance(prompt[0], int):
            if len(prompt) > 1:
                raise ValueError("several prompts in one request are not supported, send one request for each")
            prompt = prompt[0]
        if isinstance(prompt, str):
            check_unicode(prompt)
        return cast(str | list[int], prompt)

    @property
    def wants_usage_chunk(self) -> bool:
        """A stream whose last chunk tells the usage."""
        return self.stream_options is not None and bool(self.stream_options.include_usage)


NOT_SUPPORTED = {
    name for name, field in CompletionRequest.model_fields.items() if field.description == "Not supported."
}
