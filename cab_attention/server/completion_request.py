"""The body of a completion request: OpenAI's fields, and which attention and eviction method answer it."""

from typing import Annotated, Any, Literal, cast

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, WithJsonSchema

from cab_attention.attention_switch import SWITCHABLE
from cab_attention.budget import Budget
from cab_attention.method_options import method_classes

Name = Annotated[str, Field(max_length=200)]
StopString = Annotated[str, Field(min_length=1, max_length=200)]
TokenId = Annotated[int, Field(ge=0)]


def _known_budget(budget: Any) -> Any:
    Budget.parse(budget)
    return budget


TokenIds = Annotated[list[TokenId], Field(min_length=1)]
# A list of one: more are refused with a message of their own.
ONE = Field(min_length=1, json_schema_extra={"maxItems": 1})
Prompt = str | TokenIds | Annotated[list[str], ONE] | Annotated[list[TokenIds], ONE]
BudgetField = Annotated[
    int | float | str,
    AfterValidator(_known_budget),
    WithJsonSchema(
        {
            "anyOf": [
                {"type": "integer", "minimum": 1},
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
    stop: StopString | Annotated[list[StopString], Field(max_length=4)] | None = Field(
        None, description="Strings that end the answer."
    )
    stream: bool | None = Field(False, description="Server-sent events, ended by `data: [DONE]`.")
    stream_options: StreamOptions | None = Field(None, description="With `stream` only.")
    user: Name | None = Field(None, description="Not looked at.")

    attention_implementation: Name | None = Field("cab", json_schema_extra={"enum": [*SWITCHABLE, None]})
    method: Name | None = Field(
        None, description="Eviction method. Default: full.", json_schema_extra={"enum": [*method_classes(), None]}
    )
    budget: BudgetField | None = Field(
        None,
        description="Tokens that a method keeps a layer and KV head, a fraction of the prompt, or full. Default: 128.",
    )
    method_options: dict[Name, int | float | bool | Name | None] | None = Field(
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
    logit_bias: Annotated[dict[str, float], Field(max_length=0)] | None = Field(None, description="Not supported.")
    presence_penalty: Annotated[float, Field(ge=0, le=0)] | None = Field(0, description="Not supported.")
    frequency_penalty: Annotated[float, Field(ge=0, le=0)] | None = Field(0, description="Not supported.")

    @property
    def one_prompt(self) -> str | list[int]:
        """The text or the token ids. Raises ValueError for several prompts, or a text that is no Unicode."""
        prompt = self.prompt
        if isinstance(prompt, list) and not isinstance(prompt[0], int):
            if len(prompt) > 1:
                raise ValueError("several prompts in one request are not supported, send one request for each")
            prompt = prompt[0]
        if isinstance(prompt, str) and any("\ud800" <= character <= "\udfff" for character in prompt):
            raise ValueError("the prompt is not valid Unicode: it has half of a surrogate pair")
        return cast(str | list[int], prompt)

    @property
    def wants_usage_chunk(self) -> bool:
        """A stream whose last chunk tells the usage."""
        return self.stream_options is not None and bool(self.stream_options.include_usage)


NOT_SUPPORTED = {
    name for name, field in CompletionRequest.model_fields.items() if field.description == "Not supported."
}
