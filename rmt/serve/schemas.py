"""What goes in and what comes out, as OpenAPI tells it. Imported with FastAPI only."""

from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field

MAX_IMAGES, MAX_TASKS, MAX_TOP = 16, 1024, 5
Name = Annotated[str, Field(min_length=1, max_length=200)]
# A task that is loaded over HTTP is named so that a URL can name it.
PLAIN_NAME = r"^[A-Za-z0-9][A-Za-z0-9._ -]*$"
HUB_ID = r"^[A-Za-z0-9][A-Za-z0-9._-]*/[A-Za-z0-9][A-Za-z0-9._-]*(@[A-Za-z0-9._-]+)?$"
_STRICT = ConfigDict(extra="forbid", strict=True)


class ClassifyRequest(BaseModel):
    """Images in base64, and the tasks to answer: all that are loaded where `tasks` is left out."""

    model_config = _STRICT
    images: list[Annotated[str, Field(min_length=1, json_schema_extra={"contentEncoding": "base64"})]] = Field(
        min_length=1, max_length=MAX_IMAGES
    )
    tasks: list[Name] | None = Field(None, min_length=1, max_length=MAX_TASKS)
    top_k: int = Field(1, ge=1, le=MAX_TOP)


class Ranked(BaseModel):
    """A class and its probability."""

    class_name: str = Field(alias="class")
    probability: float = Field(ge=0, le=1)


class Answer(Ranked):
    """One task's answer about one image. top: the best top_k classes, the best first."""

    task: str
    top: list[Ranked] = Field(min_length=1, max_length=MAX_TOP)


class ImageAnswers(BaseModel):
    """In the order of the tasks that were asked for."""

    answers: list[Answer]


class ClassifyResponse(BaseModel):
    """In the order of the images."""

    images: list[ImageAnswers]


class TaskInfo(BaseModel):
    """A loaded task. bytes: of its bits in memory; off, weights: of its masks."""

    name: str
    classnames: list[str]
    template: str | None
    bytes: int
    off: int
    weights: int
    percent_off: float


class TaskList(BaseModel):
    """base: whether `__base__`, the model without a mask, has classes and can be asked."""

    tasks: list[TaskInfo]
    base: bool


class LoadRequest(BaseModel):
    """Exactly one of `path`, below a folder that the server was started with, and `hub`, a repository's id."""

    model_config = _STRICT | ConfigDict(json_schema_extra={"oneOf": [{"required": ["path"]}, {"required": ["hub"]}]})
    path: str | None = Field(None, min_length=1, max_length=1000)
    hub: str | None = Field(None, max_length=200, pattern=HUB_ID)
    name: str | None = Field(None, min_length=1, max_length=100, pattern=PLAIN_NAME)
    replace: bool = False


class Health(BaseModel):
    """status: ok, or stopping."""

    status: str
    tasks: int


class Error(BaseModel):
    """error: one word. detail: what was expected and what came. id: of a fault of the server's, as in its log."""

    error: str
    detail: str
    id: str | None = None


MULTIPART: dict[str, Any] = {
    "type": "object",
    "description": "The same as a form: files named `images`, and fields.",
    "required": ["images"],
    "properties": {
        "images": {
            "type": "array", "minItems": 1, "maxItems": MAX_IMAGES,
            "items": {"type": "string", "contentMediaType": "application/octet-stream", "format": "binary"},
        },
        "tasks": {"type": "array", "items": {"type": "string", "minLength": 1, "maxLength": 200}},
        "top_k": {"type": "integer", "minimum": 1, "maximum": MAX_TOP, "default": 1},
    },
}  # fmt: skip
REQUEST_BODY = {
    "required": True,
    "content": {
        "multipart/form-data": {"schema": MULTIPART},
        "application/json": {"schema": ClassifyRequest.model_json_schema()},
    },
}
