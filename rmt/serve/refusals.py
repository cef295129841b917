"""What the server answers instead of a result."""


class Refused(Exception):
    """An answer that is an error. status: of HTTP. reason: one word, `error` of the body and label of the metrics.

    retry_after: seconds. id: stands in the server's log beside the traceback.
    """

    def __init__(
        self, status: int, reason: str, message: str, *, retry_after: int | None = None, id: str | None = None
    ) -> None:
        super().__init__(message)
        self.status, self.reason, self.retry_after, self.id = status, reason, retry_after, id

    @property
    def body(self) -> dict[str, str]:
        """As JSON: `rmt.serve.schemas.Error`."""
        return {"error": self.reason, "detail": str(self)} | ({"id": self.id} if self.id else {})

    @property
    def headers(self) -> dict[str, str]:
        """Besides the usual ones."""
        return {} if self.retry_after is None else {"Retry-After": str(self.retry_after)}
