"""What happens around every call: limits, time, errors, one line in the log."""

from __future__ import annotations

import json
import logging
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any, NoReturn, Protocol, cast

import grpc
from google.protobuf.message import DecodeError, Message

from envstore.csi.limits import check_limits
from envstore.csi.redaction import STRIPPED, redacted, secrets
from envstore.csi.refusal import RefusedError, invalid
from envstore.errors import EnvstoreError

_log = logging.getLogger("envstore.csi")

Observe = Callable[[str, str, float], None]

_LONGEST_MESSAGE = 1000
_LONGEST_LINE = 8000
# Asked every few seconds by those who watch a plugin, and of no interest while all is well.
_QUIET = frozenset({
    "Probe", "GetPluginInfo", "GetPluginCapabilities", "NodeGetCapabilities", "NodeGetInfo",
    "NodeGetVolumeStats", "ControllerGetCapabilities", "GetInfo",
})  # fmt: skip


class Context(Protocol):
    """What is needed of a ``grpc.ServicerContext``."""

    def is_active(self) -> bool:
        """Whether somebody still waits for the answer."""

    def time_remaining(self) -> float | None:
        """Return how many seconds the caller will wait; ``None``: for ever."""


def seconds_left(context: Context, most: float) -> float:
    """Return how long a step of a call may take, in seconds, never more than ``most``.

    A little of the caller's time is kept back, so that it hears what went wrong. Raises
    ``RefusedError``: ``CANCELLED`` if nobody waits for the answer any more, ``DEADLINE_EXCEEDED``
    if there is no time left.
    """
    left = context.time_remaining()
    if left is not None and left <= 0:
        raise RefusedError(grpc.StatusCode.DEADLINE_EXCEEDED, "the call's time is over")
    if not context.is_active():
        raise RefusedError(grpc.StatusCode.CANCELLED, "the call was cancelled")
    return most if left is None else min(most, left - min(0.5, left / 10))


class Guard(grpc.ServerInterceptor):
    """Stands before every handler of a server.

    A request that cannot be parsed or is larger than the specification allows, and a call that
    nobody waits for, do not reach the handler. What a handler raises becomes a status code and
    one line: ``RefusedError`` and ``EnvstoreError`` as they say, all else ``INTERNAL`` without
    details, which only the log has. Secrets of a request are in neither. ``brief`` runs what must
    be answered however busy the others are: the Identity service. ``observe`` hears of every call
    that has ended: its method, status code and how many seconds it took.
    """

    def __init__(self, brief: ThreadPoolExecutor, observe: Observe) -> None:
        self._brief = brief
        self._observe = observe
        self._lock = threading.Lock()
        self.under_way = 0
        """Calls that handlers are working on."""

    def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], grpc.RpcMethodHandler[Any, Any] | None],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> Any:
        """Return the handler with the guard around it."""
        handler = continuation(handler_call_details)
        name = handler_call_details.method
        if handler is None or handler.request_deserializer is None or handler.unary_unary is None:
            _log.warning("%s UNIMPLEMENTED", _printable(name)[:_LONGEST_MESSAGE])
            return None
        parse, behave = handler.request_deserializer, handler.unary_unary

        def guarded(data: bytes, context: grpc.ServicerContext) -> Any:
            with self._counted():
                return _Call(name, context, self._observe).answer(data, parse, behave)

        service = name.rpartition("/")[0].rpartition(".")[2]
        if service == "Identity":
            guarded.experimental_thread_pool = self._brief  # type: ignore[attr-defined]
        return grpc.unary_unary_rpc_method_handler(
            guarded, None, response_serializer=handler.response_serializer
        )

    @contextmanager
    def _counted(self) -> Iterator[None]:
        with self._lock:
            self.under_way += 1
        try:
            yield
        finally:
            with self._lock:
                self.under_way -= 1


class _Call:
    def __init__(self, name: str, context: grpc.ServicerContext, observe: Observe) -> None:
        self._name = name.rpartition("/")[2]
        self._context = context
        self._observe = observe
        self._started = time.monotonic()
        self._request: dict[str, Any] = {}
        self._secrets: list[str] = []

    def answer(
        self,
        data: bytes,
        parse: Callable[[bytes], Message],
        behave: Callable[[Message, grpc.ServicerContext], Message],
    ) -> Message:
        try:
            request = self._parsed(data, parse)
            seconds_left(self._context, 0.0)
            check_limits(request)
            response = behave(request, self._context)
        except RefusedError as refused:
            self._end(refused)
        except EnvstoreError as error:
            self._end(RefusedError.of(error))
        except Exception:  # noqa: BLE001 - the log is the only place for a traceback
            # The generated classes set this for a method that is not overridden, and raise.
            if cast(Any, self._context).code() is grpc.StatusCode.UNIMPLEMENTED:
                self._end(RefusedError(grpc.StatusCode.UNIMPLEMENTED, "not offered by this driver"))
            self._failed(traceback.format_exc())
        self._say(logging.DEBUG if self._name in _QUIET else logging.INFO, grpc.StatusCode.OK)
        return response

    def _parsed(self, data: bytes, parse: Callable[[bytes], Message]) -> Message:
        try:
            request = parse(data)
        except (DecodeError, UnicodeDecodeError):
            raise invalid("the request is no message of its type") from None
        self._request = redacted(request)
        self._secrets = secrets(request)
        return request

    def _failed(self, trace: str) -> NoReturn:
        _log.error("%s failed\n%s", self._name, self._hide(trace))
        self._end(
            RefusedError(grpc.StatusCode.INTERNAL, "the driver failed; the reason is in its log")
        )

    def _end(self, refused: RefusedError) -> NoReturn:
        message = _printable(" ".join(self._hide(refused.message).split()))
        message = message[:_LONGEST_MESSAGE]
        self._say(logging.WARNING, refused.code, message)
        self._context.abort(refused.code, message)

    def _say(self, level: int, code: grpc.StatusCode, message: str = "") -> None:
        took = time.monotonic() - self._started
        self._observe(self._name, code.name, took)
        if not _log.isEnabledFor(level):
            return
        line = f"{self._name} {code.name} {took * 1000:.0f} ms {json.dumps(self._request)}"
        line = self._hide(line)
        if len(line) > _LONGEST_LINE:
            line = line[:_LONGEST_LINE] + "..."
        _log.log(level, "%s%s", line, f": {message}" if message else "")

    def _hide(self, text: str) -> str:
        for secret in self._secrets:
            text = text.replace(secret, STRIPPED)
        return text


def _printable(text: str) -> str:
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)
