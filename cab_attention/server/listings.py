"""What the server has: its model, attention implementations, eviction methods, and prompts to try."""

import time
from dataclasses import MISSING, fields
from typing import Any, Literal, get_type_hints

from fastapi import APIRouter
from pydantic import BaseModel, Field, TypeAdapter

from cab_attention.attention_switch import CAN_EVICT, SWITCHABLE, why_not_on
from cab_attention.method_options import method_classes
from cab_attention.methods import Method
from cab_attention.server.examples import Example, examples
from cab_attention.server.settings import Settings
from cab_attention.text_generation import TextGenerator


class Model(BaseModel):
    id: str
    object: Literal["model"] = "model"
    created: int = Field(description="When the server was started.")
    owned_by: Literal["cab-attention"] = "cab-attention"
    context_length: int | None = Field(description="Tokens of prompt and answer together; null: not known.")
    device: str
    dtype: str


class Implementation(BaseModel):
    id: str
    object: Literal["attention_implementation"] = "attention_implementation"
    available: bool
    reason: str | None = Field(description="Why it is not available.")
    can_evict: bool = Field(description="Eviction methods work with it; with the others the cache is full.")


class Option(BaseModel):
    name: str
    default: int | float | bool | str | None
    json_schema: dict[str, Any]


class EvictionMethod(BaseModel):
    id: str
    object: Literal["eviction_method"] = "eviction_method"
    options: list[Option]


class Models(BaseModel):
    object: Literal["list"] = "list"
    data: list[Model]


class Implementations(BaseModel):
    object: Literal["list"] = "list"
    data: list[Implementation]


class EvictionMethods(BaseModel):
    object: Literal["list"] = "list"
    data: list[EvictionMethod]


class Examples(BaseModel):
    object: Literal["list"] = "list"
    data: list[Example]


def listing_routes(generator: TextGenerator, settings: Settings) -> APIRouter:
    """The lists; made once, since nothing in them changes."""
    model = Model(
        id=settings.model_name,
        created=int(time.time()),
        context_length=generator.context_length,
        device=str(generator.model.device),
        dtype=str(generator.model.dtype).removeprefix("torch."),
    )
    implementations = [_implementation(generator, name) for name in SWITCHABLE]
    methods = [EvictionMethod(id=name, options=_options(kind)) for name, kind in method_classes().items()]
    prompts = examples()
    router = APIRouter()

    @router.get("/v1/models")
    async def list_models() -> Models:
        return Models(data=[model])

    @router.get("/v1/attention_implementations")
    async def list_attention_implementations() -> Implementations:
        return Implementations(data=implementations)

    @router.get("/v1/methods")
    async def list_methods() -> EvictionMethods:
        return EvictionMethods(data=methods)

    @router.get("/v1/examples")
    async def list_examples() -> Examples:
        return Examples(data=prompts)

    return router


def _implementation(generator: TextGenerator, name: str) -> Implementation:
    reason = why_not_on(generator.model, name)
    return Implementation(id=name, available=reason is None, reason=reason, can_evict=name in CAN_EVICT)


def _options(kind: type[Method]) -> list[Option]:
    """But the budget; the method's own before those of every method."""
    types = get_type_hints(kind)
    of_all = {option.name for option in fields(Method)}
    return [
        Option(
            name=option.name,
            default=None if option.default is MISSING else option.default,
            json_schema=TypeAdapter(types[option.name]).json_schema(),
        )
        for option in sorted(fields(kind), key=lambda option: option.name in of_all)
        if option.name != "budget"
    ]
