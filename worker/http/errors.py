"""What the server refuses before a job begins."""

from __future__ import annotations

from lora.errors import CodedError


class NotReady(CodedError):
    """The server still loads its models, or ends."""

    code = "NOT_READY"


class Busy(CodedError):
    """As many requests as the server takes are under way and wait."""

    code = "BUSY"

    def __init__(self, sentence: str, after: int) -> None:
        """`after`: the seconds after which to ask again."""
        self.after = after
        super().__init__(sentence, f"Ask again in {after} s.")


class Unauthorized(CodedError):
    """The request does not have the server's key."""

    code = "UNAUTHORIZED"


class BodyTooLarge(CodedError):
    """The request's body is over WORKER_MAX_BODY_MB."""

    code = "BODY_TOO_LARGE"


class NoSuchRoute(CodedError):
    """The server has no such path, or not with this method."""

    code = "NO_SUCH_ROUTE"


def ending() -> NotReady:
    """The error for whoever comes or waits while the server ends."""
    return NotReady("the server ends", "Send the request again.")
