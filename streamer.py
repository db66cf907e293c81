"""streamer: watch a MetaGPT team work, live, in a browser or by hand. This file is all there is.

    POST /api/tasks → Supervisor → Execution → Run (worker thread) → Broker (per task)
                    → Subscription (per client) → WebSocket | SSE | AI SDK | AG-UI

Sections, bottom-up, nothing used before it is defined: Settings, Errors, Events, Tasks, Store,
Memory, SQLite, Redis, Broker, Runs, MetaGPT: configuration, MetaGPT: loading, Model requests,
MetaGPT: mendings, MetaGPT: the team, Execution, Supervisor, Routes, Protocols, Application, Page.
What it promises, and refers to below by number:

 1. Order. A task's events are numbered 1, 2, 3 … without a hole; every client sees them in
    that order, each once, whenever it connects.
 2. End. The last event of a run is its terminal event, the terminal state follows it, then
    the stream ends. Nothing emitted before it is lost.
 3. Independence. A run does not depend on who watches; all watchers see the same events.
 4. Slow clients. A client that reads slowly delays nobody and costs bounded memory: it is fed
    from the log again, and a send blocked for `send_timeout` ends its stream.
 5. Fast runners. A runner that emits faster than the loop publishes is held back at `emit`.
 6. Cancel. After a cancel no new model call starts, the run ends TASK_CANCELLED, and a late
    success does not overwrite it. A thread that does not stop within `grace` is abandoned.
 7. Honesty. A failed run is FAILED with a reason to act on; SUCCEEDED means that the team ended
    and that every answer of its models was whole. Secrets reach no event and no log.
 8. Isolation. Concurrent tasks share no prompt, cost, model client, file or token. What a model
    says or names never runs on the host, unless `run_tests` was allowed.
 9. Restart. An event is stored before any client sees it. With SQLite or Redis the log outlives
    the process, and a run that was cut off ends FAILED "interrupted".
10. Bad input. Any input gets a clear 4xx or `error`; a payload JSON cannot carry is made to fit.
"""

# What `uv run` installs: requirements.txt without pytest, and MetaGPT without its own pins.
# /// script
# requires-python = ">=3.11"
# dependencies = [
#   "aiofiles==25.1.0", "aiohappyeyeballs==2.7.1", "aiohttp==3.14.5", "aiosignal==1.4.0",
#   "annotated-types==0.8.0", "anthropic==2.14.0", "anyio==4.16.0",
#   "async-timeout==5.0.1; python_full_version < '3.11.3'", "attrs==26.1.0",
#   "certifi==2026.10.19.post1", "chardet==7.7.0", "charset-normalizer==3.5.3", "click==8.5.1",
#   "cloudpickle==3.1.3", "docstring_parser==0.18.0", "Farama-Notifications==0.0.6",
#   "frozenlist==1.8.0", "gitdb==4.0.12", "gitignore_parser==0.1.13", "GitPython==3.2.1",
#   "gymnasium==1.4.0", "h11==0.16.0", "httpcore2==2.16.2", "httptools==0.9.0", "httpx2==2.16.2",
#   "idna==3.20", "jiter==0.19.0", "loguru==0.7.3", "markdown-it-py==4.3.0", "mdurl==0.1.2",
#   "metagpt==0.8.2", "multidict==7.2.1", "numpy==2.4.6; python_version < '3.12'",
#   "numpy==2.5.5; python_version >= '3.12'", "openai==3.57.0", "opentelemetry-api==1.45.2",
#   "pillow==13.0.0", "propcache==0.5.4", "pydantic==2.14.4", "pydantic_core==2.50.5",
#   "Pygments==2.21.0", "python-dotenv==1.2.4", "PyYAML==6.0.4", "redis==8.1.0",
#   "regex==2026.11.19", "requests==2.34.2", "rich==15.0.0", "smmap==5.0.3", "sniffio==1.3.1",
#   "socksio==1.0.0",
#   "starlette==1.10.0", "tenacity==9.2.1", "tiktoken==0.14.0", "tree-sitter==0.26.1",
#   "tree-sitter-python==0.25.0", "truststore==0.10.5", "typing-inspection==0.4.5",
#   "typing_extensions==4.16.0", "urllib3==2.8.0", "uvicorn==0.54.0", "uvloop==0.23.0",
#   "watchfiles==1.3.0", "websockets==17.4", "yarl==1.25.1",
# ]
#
# [[tool.uv.dependency-metadata]]
# name = "metagpt"
# version = "0.8.2"
# requires-dist = []
# ///

from __future__ import annotations

import sys

if sys.version_info < (3, 11):  # noqa: UP036 - said before an import fails on an older Python
    if __name__ != "__main__":
        raise ImportError("streamer needs Python 3.11, 3.12 or 3.13")
    sys.stderr.write(
        f"streamer: needs Python 3.11, 3.12 or 3.13, not {sys.version.split()[0]}; type, with the "
        "one that you have: python3.11 -m venv .venv && .venv/bin/pip install --no-deps "
        "--ignore-requires-python -r requirements.txt && .venv/bin/python streamer.py\n"
    )
    sys.exit(2)

import abc
import argparse
import ast
import asyncio
import builtins
import codecs
import contextlib
import copy
import ctypes
import difflib
import errno
import fcntl
import functools
import hmac
import importlib
import importlib.machinery
import importlib.util
import inspect
import io
import json
import logging
import math
import multiprocessing
import operator
import os
import queue
import re
import resource
import select
import shlex
import shutil
import signal
import socket
import sqlite3
import stat
import struct
import subprocess
import tempfile
import textwrap
import threading
import time
import types
import unicodedata
import uuid
import warnings
import zipfile
from collections import Counter, defaultdict, deque
from collections.abc import (
    AsyncGenerator,
    AsyncIterable,
    AsyncIterator,
    Awaitable,
    Callable,
    Collection,
    Generator,
    Iterable,
    Iterator,
    Mapping,
    Sequence,
)
from contextvars import ContextVar
from dataclasses import asdict, dataclass, field, fields, replace
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from enum import StrEnum
from functools import partial
from http import HTTPStatus
from itertools import islice
from pathlib import Path
from typing import Any, ClassVar, NamedTuple, NoReturn, Protocol, TypeVar, get_args, get_type_hints
from urllib.parse import unquote, urlsplit
from urllib.request import getproxies

LOCK = Path(__file__).resolve().with_name("requirements.txt")
PIP_INSTALL = ("-m", "pip", "install", "--no-deps", "--ignore-requires-python", "-r")
INSTALL = shlex.join((sys.executable, *PIP_INSTALL, str(LOCK)))

try:
    import anyio
    import anyio.abc
    import anyio.lowlevel
    import anyio.to_thread
    import httptools
    import uvicorn
    from starlette.applications import Starlette
    from starlette.datastructures import MutableHeaders, QueryParams
    from starlette.exceptions import HTTPException
    from starlette.middleware import Middleware
    from starlette.middleware.cors import CORSMiddleware
    from starlette.requests import ClientDisconnect, HTTPConnection, Request
    from starlette.responses import (
        FileResponse,
        HTMLResponse,
        JSONResponse,
        PlainTextResponse,
        Response,
        StreamingResponse,
    )
    from starlette.routing import Match, Route, WebSocketRoute
    from starlette.types import ASGIApp, Message, Receive, Scope, Send
    from starlette.websockets import WebSocket, WebSocketDisconnect, WebSocketDisconnected
    from uvicorn.config import STARTUP_FAILURE
    from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol
    from uvicorn.protocols.utils import ClientDisconnected
    from uvicorn.protocols.websockets.websockets_sansio_impl import WebSocketsSansIOProtocol
    from websockets.protocol import State
except ImportError as missing:
    if __name__ != "__main__":
        raise
    sys.stderr.write(f"streamer: {missing}; type: {INSTALL}\n")
    sys.exit(2)

__all__ = ["EventType", "Run", "Settings", "create_app", "run_metagpt", "run_scripted", "serve"]

__version__ = "1.0.0"

logger = logging.getLogger("streamer")


# -----------------------------------------------------------------------------
# Settings
# -----------------------------------------------------------------------------


class SettingsError(ValueError):
    """A setting that does not parse or makes no sense; the message names it."""


def _setting(
    default: Any, help: str, low: float | None = None, secret: bool = False, group: str = ""
) -> Any:
    """`group` is the heading that begins here in the command line's help."""
    metadata = {"help": help, "low": low, "group": group}
    return field(default=default, metadata=metadata, repr=not secret)


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What an operator can set: STREAMER_<FIELD> in the environment, --<field> as a flag.

    Raises SettingsError, which names the field, for a value out of its range.
    """

    host: str = _setting(
        "127.0.0.1", "address to listen on; one that others reach needs a token", group="Serving"
    )
    port: int = _setting(8000, "port to listen on; 0 takes a free one", low=0)
    test_mode: bool = _setting(False, "play a scripted team: no MetaGPT, no key")
    teams: tuple[str, ...] = _setting((), "teams of your own: name=module:function,…")
    price: tuple[float, ...] = _setting(
        (),
        "$ for a million prompt and completion tokens, if unknown: 1.25,10",
        group="Models",
    )
    token: str = _setting(
        "", "what clients must show: Authorization: Bearer …", secret=True, group="Access"
    )
    allowed_origins: tuple[str, ...] = _setting(
        (), "origins of web pages that may use it, besides its own page's"
    )
    allowed_hosts: tuple[str, ...] = _setting(
        (), "host names it is reached by, besides loopback ones"
    )
    allow_run_tests: bool = _setting(
        False, "allow the option run_tests, which executes what a model wrote"
    )
    max_running: int = _setting(4, "tasks that run at once", low=1, group="Limits")
    max_waiting: int = _setting(100, "started tasks that wait for a free slot", low=0)
    max_tasks: int = _setting(
        1000, "tasks kept; beyond it the oldest that do not run are forgotten", low=1
    )
    max_events: int = _setting(
        20000, "events kept of a task; beyond it the oldest are dropped", low=10
    )
    max_event_bytes: int = _setting(
        65536, "bytes of an event's payload; a larger one is cut", low=256
    )
    max_prompt: int = _setting(32000, "characters of a prompt", low=1)
    max_sockets: int = _setting(1000, "clients that watch at once, over WebSocket and SSE", low=1)
    subscriber_buffer: int = _setting(
        256, "events a client may lag before it is fed from the log", low=1
    )
    heartbeat: float = _setting(15.0, "seconds of silence after which a state is sent", low=0.05)
    send_timeout: float = _setting(20.0, "seconds a client may stay blocked", low=0.05)
    grace: float = _setting(10.0, "seconds a cancelled run gets to stop", low=0.1)
    task_timeout: float = _setting(3600.0, "seconds a task may run", low=0.05)
    model_timeout: float = _setting(
        300.0, "seconds a model may stay silent before it is asked again", low=0.05
    )
    answer_timeout: float = _setting(
        86400.0, "seconds a person has to answer a question of the team", low=0.05
    )
    max_age: float = _setting(
        604800.0, "seconds until a task that does not run is forgotten", low=1
    )
    workspace: Path = _setting(
        Path("workspace"), "folder of the tasks' files, one folder a task", group="Storage"
    )
    db: str = _setting("", "SQLite file of the tasks and their logs, instead of memory")
    redis_url: str = _setting(
        "", "Redis of the tasks and their logs: redis://host:6379", secret=True
    )
    lease: float = _setting(
        15.0, "seconds until a replica that is not heard from loses its tasks", low=0.5
    )

    def __post_init__(self) -> None:
        for item in fields(self):
            value = getattr(self, item.name)
            low = item.metadata["low"]
            if low is not None and not low <= value < math.inf:
                words = f"a number of at least {low:g}"
                raise SettingsError(f"{item.name} must be {words}, not {value!r}")
        if self.port > 65535:
            raise SettingsError(f"port must be at most 65535, not {self.port}")
        if not is_loopback(self.host) and not self.token:
            how = "set STREAMER_TOKEN, for example to what `openssl rand -hex 16` prints"
            reached = f"host {self.host!r} can be reached from other machines"
            raise SettingsError(f"{reached}, so a token is needed: {how}")
        if self.token and not re.fullmatch(r"[!-~]{8,}", self.token):
            raise SettingsError("token must be at least 8 characters, ASCII without blanks")
        if self.price and (len(self.price) != 2 or not all(0 <= x < math.inf for x in self.price)):
            given = ",".join(map(str, self.price))
            raise SettingsError(f"price must be {PRICE_WORDS}, not {given}")
        for origin in self.allowed_origins:
            if (
                parse_origin(origin) is None
                or origin != origin.lower()
                or re.search("(http:.*:80|https:.*:443)$", origin)
            ):
                form = "in lower case, without the scheme's own port"
                raise SettingsError(
                    "allowed_origins must be as browsers send them: "
                    f"https://example.com, {form}, not {origin!r}"
                )
        for host in self.allowed_hosts:
            if parse_host(host) != (host.strip("[]").lower(), None):
                words = "names or addresses without a port"
                raise SettingsError(f"allowed_hosts must be {words}, not {host!r}")
        self._check_teams()
        if self.db and self.redis_url:
            raise SettingsError("db and redis_url are two places for the same log: set one of them")
        try:  # MetaGPT's git library changes the process's current folder while it works
            object.__setattr__(self, "workspace", Path(self.workspace).expanduser().absolute())
        except RuntimeError as error:
            given = str(self.workspace)
            raise SettingsError(f"workspace must be a folder, not {given!r}: {error}") from None

    def _check_teams(self) -> None:
        names = [team.partition("=")[0] for team in self.teams]
        form = r"[A-Za-z][\w-]*=[A-Za-z_][\w.]*:[A-Za-z_]\w*"
        formed = all(re.fullmatch(form, team) for team in self.teams)
        if not formed or len(set(names)) < len(names):
            words = "name=module:function,…, each name once"
            raise SettingsError(f"teams must be {words}, not {','.join(self.teams)}")

    @functools.cached_property
    def names(self) -> frozenset[str]:
        """The hosts, besides loopback ones, that this service is."""
        return frozenset(host.strip("[]").lower() for host in (*self.allowed_hosts, self.host))

    @functools.cached_property
    def origins(self) -> frozenset[tuple[str, str, int] | None]:
        return frozenset(map(parse_origin, self.allowed_origins))

    @classmethod
    def from_environ(
        cls, environ: Mapping[str, str] | None = None, **flags: str | None
    ) -> Settings:
        """Reads `environ`, by default os.environ; a flag that is not None wins.

        An empty variable is one that is not set; one that is no setting is warned of, unless it is
        Kubernetes'. Raises SettingsError.
        """
        given = os.environ if environ is None else environ
        environ = {k: v for k, v in given.items() if not KUBERNETES.fullmatch(f"{k}={v}")}
        kinds = get_type_hints(cls)
        variables = {name: f"STREAMER_{name.upper()}" for name in kinds}
        for variable in environ:
            if variable.startswith("STREAMER_") and variable not in variables.values():
                logger.warning("%s", unknown_name(variable, variables.values()))
        values: dict[str, Any] = {}
        for name, kind in kinds.items():
            source = flag_of(name)
            text = flags.get(name)
            if text is None:
                source = variables[name]
                text = environ.get(source) or None
            if text is not None:
                try:
                    values[name] = PARSERS.get(kind, kind)(text)
                except ValueError:
                    words = PARSED_FROM[kind]
                    raise SettingsError(f"{source} must be {words}, not {text!r}") from None
        return cls(**values)


def flag_of(name: str) -> str:
    """The command line's flag for a setting or an option."""
    return f"--{name.replace('_', '-')}"


def unknown_name(name: str, known: Iterable[str]) -> str:
    """Says that `name` is not among the known ones, and which of them is most like it."""
    likely = difflib.get_close_matches(name, known, n=1, cutoff=0.8)
    return f"{name} is unknown" + (f" (did you mean {likely[0]}?)" if likely else "")


def parse_bool(text: str) -> bool:
    """Raises ValueError for anything but true, false, yes, no, on, off, 1 and 0."""
    if text.lower() in ("true", "yes", "on", "1"):
        return True
    if text.lower() in ("false", "no", "off", "0"):
        return False
    raise ValueError(text)


def parse_names(text: str) -> tuple[str, ...]:
    """Comma-separated."""
    return tuple(filter(None, map(str.strip, text.split(","))))


def parse_numbers(text: str) -> tuple[float, ...]:
    """Comma-separated. Raises ValueError for what is no number."""
    return tuple(map(float, parse_names(text)))


PARSERS: Mapping[Any, Callable[[str], Any]] = {
    bool: parse_bool,
    tuple[str, ...]: parse_names,
    tuple[float, ...]: parse_numbers,
}
PRICE_WORDS = "US dollars for a million prompt and completion tokens, as 1.25,10"
PARSED_FROM: Mapping[Any, str] = {  # what a setting's text must be, by its type
    int: "a whole number",
    float: "a number",
    bool: "true or false",
    tuple[float, ...]: PRICE_WORDS,
}


# What Kubernetes sets for a Service named streamer, or streamer-…, as STREAMER_PORT=tcp://10.0.0.1.
KUBERNETES = re.compile(
    r"STREAMER_(\w+_)?(SERVICE_(HOST|PORT)\w*=.*|PORT=\w+://.*|PORT_\d+_(TCP|UDP|SCTP)\w*=.*)"
)
DEFAULT_PORTS = {"http": 80, "https": 443}


def parse_origin(text: str) -> tuple[str, str, int] | None:
    """RFC 6454: scheme, host and port; None for what is no web page's origin, as `null`."""
    scheme, _, rest = text.lower().partition("://")
    default_port = DEFAULT_PORTS.get(scheme)
    parsed = parse_host(rest)
    if parsed is None or default_port is None:
        return None
    host, port = parsed
    return scheme, host, port or default_port


def parse_host(text: str) -> tuple[str, int | None] | None:
    """RFC 9110, 7.2: the host of a Host header, without brackets, and its port."""
    found = re.fullmatch(r"(\[[0-9a-f:.]+\]|[a-z0-9._-]+)(?::(\d{0,5}))?", text.lower())
    if found is None:
        return None
    return found[1].strip("[]"), int(found[2]) if found[2] else None


def is_loopback(host: str) -> bool:
    if host.lower() in ("localhost", "::1"):
        return True
    return re.fullmatch(r"127(\.\d{1,3}){3}", host) is not None


# -----------------------------------------------------------------------------
# Errors
# -----------------------------------------------------------------------------


class StreamerError(Exception):
    """A condition a client is told of, with a message for people.

    It has a code in what is answered, an HTTP status, a WebSocket's close code, and the seconds
    after which to try again.
    """

    code: ClassVar[str] = "internal_error"
    status: ClassVar[int] = 500
    close_code: ClassVar[int] = 1011
    retry_after: ClassVar[int | None] = None

    def __init_subclass__(
        cls, code: str, status: int = 500, close_code: int = 1011, retry_after: int | None = None
    ) -> None:
        cls.code = code
        cls.status = status
        cls.close_code = close_code
        cls.retry_after = retry_after

    def as_dict(self) -> dict[str, str]:
        return {"code": self.code, "message": str(self)}


# fmt: off
class InvalidRequest(StreamerError, code="invalid_request", status=400, close_code=1008): ...
class Unauthorized(StreamerError, code="unauthorized", status=401, close_code=1008): ...
class Forbidden(StreamerError, code="forbidden", status=403, close_code=1008): ...
class TaskNotFound(StreamerError, code="task_not_found", status=404, close_code=4404): ...
class PathNotFound(StreamerError, code="not_found", status=404, close_code=4404): ...
class ArtifactNotFound(StreamerError, code="artifact_not_found", status=404, close_code=4404): ...
class RequestTimeout(StreamerError, code="request_timeout", status=408, close_code=1008): ...
class TaskEnded(StreamerError, code="task_ended", status=409, close_code=1008): ...
class QuestionClosed(StreamerError, code="question_closed", status=409, close_code=1008): ...
class TaskExists(StreamerError, code="task_exists", status=409, close_code=1008): ...
class PayloadTooLarge(StreamerError, code="payload_too_large", status=413, close_code=1009): ...
class UnsupportedMediaType(
    StreamerError, code="unsupported_media_type", status=415, close_code=1008): ...
class MisdirectedRequest(
    StreamerError, code="misdirected_request", status=421, close_code=1008): ...
class IdempotencyConflict(
    StreamerError, code="idempotency_conflict", status=422, close_code=1008): ...
class TooManyTasks(
    StreamerError, code="too_many_tasks", status=429, close_code=1013, retry_after=5): ...
class TooManyClients(
    StreamerError, code="too_many_clients", status=503, close_code=1013, retry_after=5): ...
class SlowClient(StreamerError, code="slow_client", status=503, close_code=1013): ...
class FileChanged(StreamerError, code="file_changed", status=503, retry_after=5): ...
class OutOfResources(StreamerError, code="out_of_resources", status=503, retry_after=5): ...
class ServerClosing(
    StreamerError, code="server_closing", status=503, close_code=1001, retry_after=5): ...
class StoreUnavailable(
    StreamerError, code="store_unavailable", status=503, close_code=1013, retry_after=5): ...
class StoreDamaged(
    StoreUnavailable, code="store_unavailable", status=503, close_code=1013, retry_after=5):
    """What is stored is not what a streamer writes, and stays so."""
class EventsMissing(StreamerError, code="events_missing", status=503, close_code=1013):
    """The store has lost events; the stream goes on behind them."""
class TaskDeleted(TaskNotFound, code="task_not_found", status=404, close_code=4404):
    """On purpose: the store says so, which may also have lost a task."""
class LeaseLost(StreamerError, code="lease_lost", status=503, close_code=1013):
    """Another process may have the task now."""
class IllegalTransition(StreamerError, code="illegal_transition"):
    """A fault of this program, never of a client."""
class RunFailed(StreamerError, code="run_failed"):
    """The message is a reason a person can act on."""
# fmt: on


class RunCancelled(BaseException):
    """Raised in a runner's thread by `Run.check_cancelled`; no `except Exception` swallows it.

    A runner that raises it ends its task CANCELLED, with the text as the reason.
    """


# -----------------------------------------------------------------------------
# Events
# -----------------------------------------------------------------------------


class EventType(StrEnum):
    TASK_START = "TASK_START"
    AGENT_START = "AGENT_START"
    AGENT_COMPLETE = "AGENT_COMPLETE"
    MESSAGE = "MESSAGE"
    TOKEN = "TOKEN"
    REASONING = "REASONING"
    QUESTION = "QUESTION"
    ANSWER = "ANSWER"
    ARTIFACT = "ARTIFACT"
    LOG = "LOG"
    ERROR = "ERROR"
    RESULT = "RESULT"
    TASK_COMPLETE = "TASK_COMPLETE"
    TASK_ERROR = "TASK_ERROR"
    TASK_CANCELLED = "TASK_CANCELLED"


# What a runner may emit; the others are the supervisor's, or come of `Run.ask`.
RUNNER_TYPES = {
    kind.value: kind
    for kind in EventType
    if not kind.startswith("TASK_") and kind not in (EventType.QUESTION, EventType.ANSWER)
}

encode = json.JSONEncoder(ensure_ascii=False, allow_nan=False, separators=(",", ":")).encode


def envelope(kind: str, data: Mapping[str, Any] | str) -> str:
    """A message to a client; `data` is a mapping, or the JSON text of one."""
    text = data if isinstance(data, str) else encode(data)
    return f'{{"type":"{kind}","data":{text}}}'


def _frame_head(size: int) -> bytes:
    """RFC 6455, 5.2: what a server sends is not masked, so that one frame does for all clients."""
    if size < 126:
        return struct.pack("!BB", 0x81, size)
    if size < 65536:
        return struct.pack("!BBH", 0x81, 126, size)
    return struct.pack("!BBQ", 0x81, 127, size)


def text_frame(message: str) -> bytes:
    """One message, as it is written to every client."""
    payload = message.encode()
    return _frame_head(len(payload)) + payload


EVENT_START, EVENT_END = envelope("event", "|").encode().split(b"|")


@functools.lru_cache(maxsize=4096)
def _event_head(size: int) -> bytes:
    """What is before an event's data in its frame."""
    return _frame_head(len(EVENT_START) + size + len(EVENT_END)) + EVENT_START


class Event(NamedTuple):
    """One entry of a task's log: its number, its type, and the JSON that clients get, in UTF-8."""

    id: int
    type: EventType
    data: bytes

    @property
    def message(self) -> str:
        return envelope("event", self.data.decode())


class Batch(tuple[Event, ...]):
    """Events in a row; what is sent of them is made once for all clients that are handed them."""

    _frames: bytes | None = None
    _server_sent: str | None = None

    @property
    def frames(self) -> bytes:
        if self._frames is None:
            parts: list[bytes] = []
            for event in self:
                parts += (_event_head(len(event.data)), event.data, EVENT_END)
            self._frames = b"".join(parts)
        return self._frames

    @property
    def server_sent(self) -> str:
        if self._server_sent is None:
            texts = [f"id: {event.id}\ndata: {event.message}\n\n" for event in self]
            self._server_sent = "".join(texts)
        return self._server_sent


class Draft(NamedTuple):
    """An event without a number: what crosses from the runner's thread to the loop."""

    type: EventType
    agent_role: str | None
    timestamp: str
    message: str  # for a person, as in the state's last_message
    payload: str  # JSON

    def numbered(self, event_id: int, task_id: str) -> Event:
        role = "null" if self.agent_role is None else encode(self.agent_role)
        data = (
            f'{{"event_id":{event_id},"task_id":"{task_id}","timestamp":"{self.timestamp}",'
            f'"agent_role":{role},"event_type":"{self.type.value}","payload":{self.payload}}}'
        )
        return Event(event_id, self.type, data.encode())


def now(at: float | None = None) -> str:
    """RFC 3339 in UTC, to the millisecond; `at`: seconds since the epoch."""
    at = time.time() if at is None else at
    return f"{_second(math.floor(at))}.{int(at % 1 * 1000):03d}Z"


DATES = (-62135596800, 253402300799)  # seconds since the epoch: the years 1 to 9999


@functools.lru_cache(maxsize=16)
def _second(at: int) -> str:
    """The nearest that can be written: a file's time may be any."""
    return datetime.fromtimestamp(min(max(at, DATES[0]), DATES[1]), UTC).isoformat()[:19]


def encode_payload(payload: Mapping[str, Any], max_bytes: int, secrets: Sequence[str] = ()) -> str:
    """JSON of at most `max_bytes` without `secrets`, whatever it holds (guarantees 7, 10).

    What JSON cannot carry is replaced by its text. What is too long is cut, key by key, and
    `truncated` and `original_bytes` are added.
    """
    try:
        text = encode(payload)
        size = len(text) if text.isascii() else len(text.encode())
        plain = not any(secret in text for secret in secrets)
    except BaseException:  # what is no plain JSON may run somebody's code
        plain = False
    if not plain:
        fitted = jsonable(payload, secrets=secrets)
        payload = fitted if isinstance(fitted, dict) else {"message": fitted}
        text = encode(payload)
        size = len(text.encode())
    if size <= max_bytes:
        return text
    kept = list({"message": payload.get("message", ""), **payload}.items())[:20]
    for longest in (max_bytes // 4, max_bytes // 32):  # a character has 4 bytes; many keys
        cut = {key: jsonable(value, longest) for key, value in kept}
        text = encode({**cut, "truncated": True, "original_bytes": size})
        if len(text.encode()) <= max_bytes:
            return text
    beginning = text[: max_bytes // 16]
    return encode({"message": beginning, "truncated": True, "original_bytes": size})


def jsonable(value: Any, longest: int | None = None, secrets: Sequence[str] = ()) -> Any:
    """`value` as JSON can carry it, without `secrets`; texts are cut to `longest` characters."""
    left = 50_000  # values: what branches and shares its branches would not end otherwise

    def walk(value: Any, above: tuple[int, ...]) -> Any:
        nonlocal left
        left -= 1
        if value is None or isinstance(value, bool):
            return value
        if isinstance(value, str):
            text = value.encode(errors="replace").decode()  # a lone surrogate becomes "?"
            text = redact(text, secrets)
            return text if longest is None or len(text) <= longest else text[:longest] + "…"
        try:
            if isinstance(value, int | float) and math.isfinite(value):
                text = str(value)
                return type(value)(value) if redact(text, secrets) == text else "***"
            if id(value) in above or len(above) > 32 or left < 0:
                return "…"
            above = (*above, id(value))
            if isinstance(value, Mapping):
                items = list(value.items())
                return {walk(str(key), above): walk(item, above) for key, item in items}
            if isinstance(value, list | tuple | set | frozenset | deque):
                return [walk(item, above) for item in list(value)]
            dump = getattr(value, "model_dump", None)  # pydantic's
            return walk(dump() if dump else repr(value), above)
        except BaseException:  # somebody's __repr__ ran; an event must not fail because of it
            return f"<{type(value).__name__}>"

    return walk(value, ())


def redact(text: str, secrets: Sequence[str]) -> str:
    for secret in secrets:
        if secret in text:
            text = text.replace(secret, "***")
    return text


def error_text(error: BaseException) -> str:
    """The text of an error whose __str__ may itself fail."""
    try:
        return str(jsonable(str(error)))
    except BaseException:
        return f"<{type(error).__name__}>"


def reason_of(error: BaseException) -> str:
    """Why something failed: the text alone where it was written for a person."""
    if isinstance(error, StreamerError | SettingsError):
        return error_text(error)
    return f"{type(error).__name__}: {error_text(error)}"


# -----------------------------------------------------------------------------
# Tasks
# -----------------------------------------------------------------------------


class TaskStatus(StrEnum):
    PENDING = "PENDING"
    RUNNING = "RUNNING"
    SUCCEEDED = "SUCCEEDED"
    FAILED = "FAILED"
    CANCELLED = "CANCELLED"


ENDED = frozenset({TaskStatus.SUCCEEDED, TaskStatus.FAILED, TaskStatus.CANCELLED})
RESTARTABLE = frozenset({TaskStatus.FAILED, TaskStatus.CANCELLED})
TRANSITIONS: Mapping[TaskStatus, frozenset[TaskStatus]] = {
    TaskStatus.PENDING: RESTARTABLE | {TaskStatus.RUNNING},
    TaskStatus.RUNNING: ENDED,
    TaskStatus.SUCCEEDED: frozenset(),
    TaskStatus.FAILED: frozenset({TaskStatus.PENDING}),
    TaskStatus.CANCELLED: frozenset({TaskStatus.PENDING}),
}


class Origin(NamedTuple):
    """The message of another protocol's conversation that began a task."""

    conversation: str  # the protocol, and the client's id
    message_id: str  # of its text and the client's id
    run_id: str | None = None  # of AG-UI


NOT_SENT = ("origin", "waiting", "answers")  # the fields of a task and a state for the server alone


@dataclass(frozen=True, kw_only=True)
class Task:
    """One request for work, as clients see it."""

    id: str
    title: str | None  # None where none was given
    input_prompt: str
    status: TaskStatus = TaskStatus.PENDING
    mode: str
    options: Mapping[str, Any]
    created_at: str = field(default_factory=now)
    updated_at: str = field(default_factory=now)
    result_summary: str | None = None
    origin: Origin | None = None

    @property
    def headline(self) -> str:
        return self.title or self.input_prompt.strip().splitlines()[0][:80]

    def as_dict(self) -> dict[str, Any]:
        """As clients see it."""
        return {name: value for name, value in asdict(self).items() if name not in NOT_SENT}

    def to(self, status: TaskStatus, result_summary: str | None = None) -> Task:
        """The task in its next status. Raises IllegalTransition for one outside TRANSITIONS."""
        if status not in TRANSITIONS[self.status]:
            raise IllegalTransition(f"task {self.id} cannot go from {self.status} to {status}")
        return replace(self, status=status, updated_at=now(), result_summary=result_summary)


# US dollars; total_cost is None while no price is known for a model that was used.
NO_COST: Mapping[str, Any] = {
    "prompt_tokens": 0,
    "completion_tokens": 0,
    "total_cost": 0.0,
    "max_budget": 0.0,
    "by_role": {},  # the first three of each
}


def add_costs(earlier: Mapping[str, Any], cost: Mapping[str, Any]) -> Mapping[str, Any]:
    """What both came to, unknown where one of them is; the budget is the second's."""
    total = dict(cost)
    if "by_role" in cost:
        total["by_role"] = dict(earlier.get("by_role", {}))
        for role, own in cost["by_role"].items():
            before = total["by_role"].get(role)
            total["by_role"][role] = add_costs(before, own) if before else own
    for name in ("prompt_tokens", "completion_tokens"):
        total[name] = earlier[name] + cost[name]
    if None in (earlier["total_cost"], cost["total_cost"]):
        total["total_cost"] = None
    else:
        total["total_cost"] = round(earlier["total_cost"] + cost["total_cost"], 6)
    return total


def price_text(dollars: object, budget: float | None = None) -> str:
    """Dollars for a person."""
    if not isinstance(dollars, int | float):
        return "price unknown"
    return f"${dollars:.4f}" if budget is None else f"${dollars:.4f} of ${budget:.2f}"


MOST_ANSWERS = 100  # of a task's, its state keeps the newest


class TaskState(NamedTuple):
    """Where a task is now: the `state` message."""

    task_id: str
    status: TaskStatus = TaskStatus.PENDING
    progress: float = 0.0
    current_agent: str | None = None
    last_message: str | None = None
    last_event_id: int = 0
    started_at: str | None = None
    completed_at: str | None = None
    error_message: str | None = None
    final_result: Mapping[str, Any] | None = None
    cost: Mapping[str, Any] = NO_COST  # of all of the task's runs
    waiting: tuple[str, str | None, float] | None = None  # on a model: role, action, time.time()
    question: Mapping[str, Any] | None = None  # that a person is asked
    answers: Mapping[str, int] = {}  # a message_id → the event of the question that it answered

    def after(
        self, drafts: Sequence[Draft], changes: Mapping[str, Any], last_event_id: int
    ) -> TaskState:
        """The state that these events lead to, and these changes beside them."""
        values: dict[str, Any] = {"last_event_id": last_event_id}
        question = self.question
        answers = self.answers
        for event_id, draft in enumerate(drafts, start=last_event_id - len(drafts) + 1):
            if draft.type is EventType.AGENT_START:
                values["current_agent"] = draft.agent_role
            elif draft.type is EventType.QUESTION:
                asked = json.loads(draft.payload)
                asked["message"] = asked["message"][:4000]  # a state is sent often
                question = {**asked, "agent_role": draft.agent_role, "event_id": event_id}
            elif draft.type is EventType.ANSWER and question is not None:
                message_id = json.loads(draft.payload).get("message_id")
                if message_id is not None:
                    known = [*answers.items(), (message_id, question["event_id"])]
                    answers = dict(known[-MOST_ANSWERS:])
                question = None
            if draft.type not in (EventType.TOKEN, EventType.REASONING, EventType.LOG):
                values["last_message"] = draft.message
        values |= {"question": question, "answers": answers, **changes}
        if "progress" in changes:  # never falls while a run lasts
            progress = round(min(changes["progress"], 1.0), 3)
            values["progress"] = max(self.progress, progress)
        return self._replace(**values)

    @property
    def waiting_on(self) -> Mapping[str, Any] | None:
        """Who waits for a model, from the first second on: every request takes some time."""
        if self.waiting is None or time.time() < self.waiting[2] + 1:
            return None
        role, action, since = self.waiting
        seconds = round(time.time() - since, 1)
        return {"agent_role": role, "action": action, "seconds": seconds}

    def as_dict(self) -> dict[str, Any]:
        data = {name: value for name, value in self._asdict().items() if name not in NOT_SENT}
        if self.question is None:
            del data["question"]
        if self.waiting_on is not None:
            data["waiting_on"] = self.waiting_on
        return data


JSON_KINDS: Mapping[str, tuple[type, ...]] = {
    "boolean": (bool,),
    "integer": (int,),
    "number": (int, float),
    "string": (str,),
    "array": (list,),
}
KEYWORDS: Mapping[str, Callable[[Any, Any], bool]] = {  # of JSON schemas, in which type is first
    "type": lambda value, kind: type(plain(value)) in JSON_KINDS[kind],
    "enum": lambda value, values: value in values,
    "minimum": operator.ge,
    "maximum": operator.le,
    "exclusiveMinimum": operator.gt,
    "exclusiveMaximum": operator.lt,
    "minLength": lambda value, least: len(value) >= least,
    "maxLength": lambda value, most: len(value) <= most,
    "maxItems": lambda value, most: len(value) <= most,
    "pattern": lambda value, pattern: re.fullmatch(pattern, value) is not None,
    "items": lambda value, schema: all(fits(item, schema) for item in value),
}
TEXT_PARSERS: Mapping[str, Callable[[str], Any]] = {  # what cannot be read stays text
    "boolean": parse_bool,
    "integer": lambda text: int(text) if text.isascii() and text.isdigit() else text,
    "array": lambda text: text.split(",") if text else [],
}


def plain(value: Any) -> Any:
    """A whole number where a float is one: JSON does not tell them apart."""
    return int(value) if type(value) is float and value.is_integer() else value


def fits(value: Any, schema: Mapping[str, Any]) -> bool:
    """Whether a value is what a schema of KEYWORDS says."""
    return all(KEYWORDS[keyword](value, wanted) for keyword, wanted in schema.items())


class Parameter(NamedTuple):
    """What a client may set: its default, what it must be in words, and as a JSON schema."""

    default: Any
    words: str
    schema: Mapping[str, Any]

    def check(self, value: Any) -> bool:
        return fits(value, self.schema)

    def parse(self, text: str) -> Any:
        """What the text of a query or a header says. Raises ValueError."""
        value = TEXT_PARSERS.get(self.schema["type"], str)(text)
        if not self.check(value):
            raise ValueError(text)
        return value

    def described(self) -> dict[str, Any]:
        default = {} if self.default is None else {"default": self.default}
        return {**self.schema, **default, "description": self.words}


def whole_number(default: int | None, low: int = 0, high: int = 2**53) -> Parameter:
    """The default bounds are those of an event id: what a JavaScript client can count to."""
    schema = {"type": "integer", "minimum": low, "maximum": high}
    return Parameter(default, f"a whole number from {low} to {high}", schema)


def switch(default: bool) -> Parameter:
    return Parameter(default, "true or false", {"type": "boolean"})


def amount(default: float | None, unit: str) -> Parameter:
    schema = {"type": "number", "exclusiveMinimum": 0, "exclusiveMaximum": 1e9}
    return Parameter(default, f"a number of {unit} above 0", schema)


NAME = {"type": "string", "minLength": 1, "maxLength": 64}
# The actions of the software company, after which a person can be asked.
APPROVABLE = ("WritePRD", "WriteDesign", "WriteTasks", "WriteCode", "WriteTest")

OPTIONS: Mapping[str, Parameter] = {
    "n_round": whole_number(5, 1, 50),
    "investment": amount(3.0, "US dollars"),
    "token_budget": Parameter(
        None, "a whole number of tokens from 1", {"type": "integer", "minimum": 1}
    ),
    "code_review": switch(True),
    "run_tests": switch(False),
    "implement": switch(True),
    "project_name": Parameter(
        None,
        "a letter, then up to 63 letters, digits and underscores",
        {"type": "string", "pattern": "^[A-Za-z][A-Za-z0-9_]{0,63}$"},
    ),
    "timeout": amount(None, "seconds"),  # the setting task_timeout
    "team": Parameter(None, "the name of a team", NAME),
    "approve": Parameter(
        [],
        f"a list of actions, of {', '.join(APPROVABLE)}",
        {"type": "array", "maxItems": 50, "items": NAME},
    ),
}


def refuse_unknown(given: Iterable[str], known: Iterable[str], place: str) -> None:
    """Raises InvalidRequest where something else than what is known was given."""
    unknown = sorted(set(given).difference(known))
    if unknown:
        names = ", ".join(known) or "none"
        raise InvalidRequest(f"{place}: {quoted(unknown[0])} is unknown; there are: {names}")


def parse_options(
    given: Any,
    task_timeout: float,
    named: Callable[[str], str] = "options.{}".format,
    teams: Collection[str] = (),
) -> dict[str, Any]:
    """All of OPTIONS, with defaults. Raises InvalidRequest, which names the option by `named`."""
    if not isinstance(given, dict):
        raise InvalidRequest(f"options must be an object, not {kind_of(given)}")
    refuse_unknown(given, OPTIONS, "options")
    options = {name: option.default for name, option in OPTIONS.items()}
    options["timeout"] = task_timeout
    for name, value in given.items():
        option = OPTIONS[name]
        if value is None:  # which is how a task shows that none was given
            continue
        if not option.check(value):
            raise InvalidRequest(f"{named(name)} must be {option.words}, not {kind_of(value)}")
        options[name] = plain(value) if option.schema["type"] == "integer" else value
    if options["timeout"] > task_timeout:
        limit = f"{task_timeout:g} s, the server's task_timeout"
        raise InvalidRequest(f"{named('timeout')} must be at most {limit}")
    team = options["team"]
    if team is not None and team not in teams:
        known = f"one of {', '.join(teams)}" if teams else "left out: the setting teams names none"
        raise InvalidRequest(f"{named('team')} must be {known}, not {quoted(team)}")
    for action in options["approve"]:
        if team is None and action not in APPROVABLE:  # those of others are known when they run
            known = f"the actions are {', '.join(APPROVABLE)}"
            raise InvalidRequest(f"{named('approve')}: {quoted(action)} is unknown; {known}")
    return options


def chosen(question: Mapping[str, Any], answer: str) -> str:
    """The choice that an answer means, or the answer where it may be any text.

    Raises InvalidRequest, which names the choices.
    """
    choices = question["choices"] or ()
    for choice in choices:
        if choice.casefold() == answer.strip().casefold():
            return str(choice)
    if choices and not question["free_text"]:
        known = ", ".join(choices)
        raise InvalidRequest(f"answer must be one of {known}, not {quoted(answer)}")
    return answer


def kind_of(value: Any) -> str:
    """What a JSON value is, with the value where it is short."""
    if value is None:
        return "null"
    if isinstance(value, dict):
        return "an object"
    if isinstance(value, list):
        return "an array"
    noun = {str: "string", bool: "boolean"}.get(type(value), "number")
    text = json.dumps(value)
    return f"the {noun} {text}" if len(text) <= 64 else f"a {noun}"


def quoted(text: str) -> str:
    return repr(text if len(text) <= 64 else text[:64] + "…")


# -----------------------------------------------------------------------------
# Store
# -----------------------------------------------------------------------------


class Record(NamedTuple):
    """What is kept of a task beside its log."""

    task: Task
    state: TaskState
    first_event_id: int = 1  # of the events that are kept


def _dump(value: Task | TaskState) -> str:
    return encode(vars(value) if isinstance(value, Task) else value._asdict())


def _load(task_text: str, state_text: str, *, first_event_id: int = 1) -> Record:
    try:
        task = json.loads(task_text)
        state = json.loads(state_text)
        task["status"] = TaskStatus(task["status"])
        if task["origin"] is not None:
            task["origin"] = Origin(*task["origin"])
        state["status"] = TaskStatus(state["status"])
        if state["waiting"] is not None:
            state["waiting"] = tuple(state["waiting"])
        return Record(Task(**task), TaskState(**state), first_event_id)
    except (ValueError, TypeError, KeyError) as error:
        cause = f"perhaps another version of streamer wrote it: {error}"
        raise StoreDamaged(f"a task cannot be read, {cause}") from None


class ClaimLost(NamedTuple):
    """What is stored is not what its holder left: nothing can be written any more."""

    error: StreamerError


class CancelAsked(NamedTuple):
    """Another process was asked to cancel the task."""


class AnswerGiven(NamedTuple):
    """A person answered a question."""

    question_id: str
    text: str
    message_id: str | None = None  # an Origin's, where the answer is a message


ClaimMessage = ClaimLost | CancelAsked | AnswerGiven


class Claim:
    """The right to write to a task: while it is held, nobody else writes, in any process.

    Its holder listens to what it is told meanwhile: that the claim is lost, or what is asked.
    """

    def __init__(self, store: Store, record: Record, log_end: int = 0) -> None:
        self.record = record  # as it was when it was claimed
        self.log_end = log_end  # the number of the last event in its log
        self.lost: StreamerError | None = None  # why, where it ended otherwise than by its holder
        self._store = store
        self._listener: Callable[[ClaimMessage], bool] | None = None

    async def write(
        self, state: TaskState, events: Sequence[Event] = (), task: Task | None = None
    ) -> None:
        """Stores all of it, or nothing; a status that is final ends the claim.

        It comes right after what was written before, or is refused. Raises LeaseLost where it is
        not held any more, StoreUnavailable.
        """
        await self._store.write(self, state, events, task)

    async def release(self) -> None:
        """Ends the claim without a word in the log."""
        await self._store.release(self)

    def listen(self, listener: Callable[[ClaimMessage], bool]) -> None:
        """`listener` is called at once, and returns whether it does what it is asked."""
        self._listener = listener

    def tell(self, message: ClaimMessage) -> bool:
        return self._listener is not None and self._listener(message)


class Sweep(NamedTuple):
    """What `Store.sweep` found: ids of tasks."""

    orphans: Sequence[str] = ()  # started, and whoever ran them is gone
    expired: Sequence[str] = ()  # forgotten for their age


class Store(abc.ABC):
    """Where tasks and their logs live. Clients see an event only once it is stored (guarantee 9).

    Any method may raise StoreUnavailable. What follows `sweep` matters where several processes
    share a store.
    """

    LOST = "the store has lost it (flushed, evicted, past max_age, or gone in a failure)"

    error: str | None = None  # what a write meets, while it cannot be done
    warning: str | None = None  # what an operator should change, while it works

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._claims: dict[str, Claim] = {}
        self._notify: Callable[[str | None], None] = lambda error: None

    @contextlib.asynccontextmanager
    async def opened(self, notify: Callable[[str | None], None]) -> AsyncIterator[None]:
        """The time it is used; `notify` is told when `error` comes, and when it goes."""
        self._notify = notify
        yield

    @abc.abstractmethod
    async def create(self, task: Task) -> Sequence[str]:
        """Adds a task; returns the ids of those that were forgotten to make room for it.

        Raises TaskExists, TooManyTasks.
        """

    @abc.abstractmethod
    async def load(self, task_id: str) -> Record:
        """Raises TaskNotFound."""

    @abc.abstractmethod
    async def page(
        self, status: TaskStatus | None, offset: int, limit: int
    ) -> tuple[list[Task], int]:
        """Tasks newest first, and how many there are in all."""

    @abc.abstractmethod
    async def count(self) -> Mapping[TaskStatus, int]: ...

    @abc.abstractmethod
    async def latest(self, conversation: str) -> str | None:
        """The id of a conversation's newest task."""

    @abc.abstractmethod
    async def forget(self, task_id: str) -> None: ...

    @abc.abstractmethod
    async def read(self, task_id: str, after: int, limit: int) -> Sequence[Event]:
        """At most `limit` events, from the first that is numbered above `after` and kept, up to
        where one is missing.
        """

    @abc.abstractmethod
    async def claim(self, task_id: str, statuses: Collection[TaskStatus]) -> Claim | None:
        """None where the task's status is another, or somebody has it."""

    @abc.abstractmethod
    async def write(
        self, claim: Claim, state: TaskState, events: Sequence[Event], task: Task | None
    ) -> None:
        """For `Claim.write`."""

    @abc.abstractmethod
    async def release(self, claim: Claim) -> None:
        """For `Claim.release`."""

    @abc.abstractmethod
    async def sweep(self) -> Sweep:
        """Called often: says that this process lives, and looks what has to be done."""

    async def pause(self, seconds: float) -> None:
        """Until the next sweep is due, or is worth it."""
        await anyio.sleep(seconds)

    async def cancel(self, task_id: str) -> bool:
        """Asks the process that runs a task to cancel it; False where there is no other."""
        await anyio.sleep(0.02)  # the claim that was in the way is about to become a run
        return False

    async def answer(self, task_id: str, answer: AnswerGiven) -> bool:
        """Hands an answer to the process that runs a task; False where nobody takes it."""
        return False

    async def changes(self, task_id: str) -> AsyncGenerator[None, None]:
        """Yields whenever another process may have written to the task."""
        for _ in ():
            yield

    def state_data(self, state: TaskState) -> dict[str, Any]:
        """What clients get of it: also why nothing is stored, where that holds up its task."""
        data = state.as_dict()
        if self.error is not None and state.status not in ENDED:
            data["error_message"] = self.error
        return data

    def _set_error(self, error: str | None) -> None:
        before = self.error
        self.error = error
        if (before is None) != (error is None):
            self._notify(error)

    def _set_warning(self, warning: str | None) -> None:
        if (warning is None) != (self.warning is None):
            logger.warning("store warning=%r", warning)
        self.warning = warning

    def _check(self, claim: Claim) -> None:
        task_id = claim.record.task.id
        if self._claims.get(task_id) is not claim:
            raise claim.lost or LeaseLost(f"task {task_id} is not claimed here any more")

    def _end(self, claim: Claim) -> None:
        task_id = claim.record.task.id
        if self._claims.get(task_id) is claim:
            del self._claims[task_id]

    def _not_found(self, task_id: str) -> TaskNotFound:
        why = "never created here, deleted, or forgotten since"
        return TaskNotFound(f"task {quoted(task_id)} not found: {why}")

    def deleted(self, task_id: str) -> TaskDeleted:
        return TaskDeleted(f"task {quoted(task_id)} not found: it was deleted")

    def _to_forget(
        self, excess: int, ended: Sequence[str], unstarted: Sequence[str]
    ) -> Sequence[str]:
        """The oldest; tasks that nobody starts go first where they are more than half of all, so
        that they push out no results. Raises TooManyTasks.
        """
        limit = self._settings.max_tasks
        many = max(0, len(unstarted) - limit // 2)
        idle = [*unstarted[:many], *ended, *unstarted[many:]]
        if len(idle) < excess:
            raise TooManyTasks(f"{limit} tasks run or wait, the limit (max_tasks); delete some")
        return idle[:excess]


# -----------------------------------------------------------------------------
# Memory
# -----------------------------------------------------------------------------


class MemoryStore(Store):
    """The embedded default: forgets at exit."""

    def __init__(self, settings: Settings) -> None:
        super().__init__(settings)
        self._records: dict[str, Record] = {}
        self._logs: dict[str, list[Event]] = defaultdict(list)
        self._changing = asyncio.Lock()  # which tasks there are

    async def create(self, task: Task) -> Sequence[str]:
        async with self._changing:
            if task.id in self._records:
                raise TaskExists(f"task {task.id} exists")
            excess = len(self._records) + 1 - self._settings.max_tasks
            forgotten: Sequence[str] = []
            if excess > 0:
                idle = self._idle()
                ended = [task.id for task in idle if task.status in ENDED]
                unstarted = [task.id for task in idle if task.status is TaskStatus.PENDING]
                forgotten = self._to_forget(excess, ended, unstarted)
            await self._change(Record(task, TaskState(task_id=task.id)), forgotten=forgotten)
            return forgotten

    async def load(self, task_id: str) -> Record:
        if task_id not in self._records:
            raise self._not_found(task_id)
        task, state, first = self._records[task_id]
        return Record(task, state, max(first, state.last_event_id - self._settings.max_events + 1))

    async def page(
        self, status: TaskStatus | None, offset: int, limit: int
    ) -> tuple[list[Task], int]:
        tasks = [record.task for record in self._records.values()]
        if status is not None:
            tasks = [task for task in tasks if task.status is status]
        return tasks[::-1][offset : offset + limit], len(tasks)

    async def count(self) -> Mapping[TaskStatus, int]:
        return Counter(record.task.status for record in self._records.values())

    async def latest(self, conversation: str) -> str | None:
        newest_first = (record.task for record in reversed(self._records.values()))
        for task in newest_first:
            if task.origin is not None and task.origin.conversation == conversation:
                return task.id
        return None

    async def forget(self, task_id: str) -> None:
        async with self._changing:
            await self._change(forgotten=[task_id] if task_id in self._records else ())

    async def claim(self, task_id: str, statuses: Collection[TaskStatus]) -> Claim | None:
        record = await self.load(task_id)
        if task_id in self._claims or record.task.status not in statuses:
            return None
        claim = self._claims[task_id] = Claim(self, record)
        try:
            await self._journal(record, (), ())  # that it was started
        except StoreUnavailable:
            self._end(claim)
            raise
        return claim

    async def write(
        self, claim: Claim, state: TaskState, events: Sequence[Event], task: Task | None
    ) -> None:
        self._check(claim)
        before = self._records[state.task_id]
        await self._change(Record(task or before.task, state, before.first_event_id), events)
        if state.status in ENDED:
            self._end(claim)

    async def release(self, claim: Claim) -> None:
        self._end(claim)
        record = self._records.get(claim.record.task.id)
        if record is not None and record.task.status is TaskStatus.PENDING:
            await self._journal(record, (), ())  # that it was not

    async def read(self, task_id: str, after: int, limit: int) -> Sequence[Event]:
        log = self._logs.get(task_id)
        if not log:
            return ()
        start = max(after + 1 - log[0].id, len(log) - self._settings.max_events, 0)
        return log[start : start + limit]

    async def sweep(self) -> Sweep:
        oldest = now(time.time() - self._settings.max_age)
        async with self._changing:
            idle = self._idle()
            orphans = [task.id for task in idle if task.status is TaskStatus.RUNNING]
            old = [task for task in idle if task.updated_at < oldest]
            expired = [task.id for task in old if task.status is not TaskStatus.RUNNING]
            if expired:
                await self._change(forgotten=expired)
        return Sweep(orphans, expired)

    def _idle(self) -> list[Task]:
        return [record.task for id, record in self._records.items() if id not in self._claims]

    async def _change(
        self,
        record: Record | None = None,
        events: Sequence[Event] = (),
        forgotten: Sequence[str] = (),
    ) -> None:
        """One change, whole or not at all."""
        for task_id in forgotten:  # from now on nobody writes to them, nor claims them
            self._claims[task_id] = Claim(self, self._records[task_id])
        try:
            await self._journal(record, events, forgotten)
        finally:
            for task_id in forgotten:
                del self._claims[task_id]
        for task_id in forgotten:
            del self._records[task_id]
        if record is not None:
            self._records[record.task.id] = record

    async def _journal(
        self, record: Record | None, events: Sequence[Event], forgotten: Sequence[str]
    ) -> None:
        """What is kept of a change before it takes effect: here the logs."""
        for task_id in forgotten:
            self._logs.pop(task_id, None)
        if record is None or not events:
            return
        log = self._logs[record.task.id]
        log.extend(events)
        excess = len(log) - self._settings.max_events
        if excess > self._settings.max_events // 8:  # in strides: each moves the rest of the list
            del log[:excess]


# -----------------------------------------------------------------------------
# SQLite
# -----------------------------------------------------------------------------


T = TypeVar("T")
Change = tuple[Record | None, Sequence[Event], Sequence[str]]  # the last: tasks that are forgotten


class SqliteStore(MemoryStore):
    """The memory store with a journal, a file that outlives the process, however that ends.

    One server has the file at a time: tasks live in memory, only logs are read back. Raises
    SettingsError for a file that cannot be used.
    """

    PAGE_BYTES = 1 << 20  # of events read at once
    WAL_BYTES = 16 << 20  # of the file `-wal`, which has 4 MB where nobody holds it up
    SCHEMA = """
    PRAGMA journal_mode = WAL;
    PRAGMA synchronous = NORMAL;
    PRAGMA secure_delete = FAST;  -- else a deletion writes all that it frees, as zeros
    BEGIN IMMEDIATE;
    CREATE TABLE IF NOT EXISTS tasks (
        number INTEGER PRIMARY KEY, id TEXT NOT NULL UNIQUE, status TEXT NOT NULL,
        updated_at TEXT NOT NULL, task TEXT NOT NULL, state TEXT NOT NULL
    );
    CREATE INDEX IF NOT EXISTS tasks_by_status ON tasks (status, number);
    CREATE TABLE IF NOT EXISTS events (
        task_id TEXT NOT NULL, event_id INTEGER NOT NULL, event_type TEXT NOT NULL,
        data TEXT NOT NULL, PRIMARY KEY (task_id, event_id)
    ) WITHOUT ROWID;
    CREATE TABLE IF NOT EXISTS started (task_id TEXT NOT NULL UNIQUE);
    PRAGMA user_version = 1;
    COMMIT;
    """
    FAULTS: Mapping[str, str] = {  # what to do about an error when the file is opened
        "SQLITE_BUSY": "another streamer uses it; give each its own file, "
        "or all of them one redis_url",
        "SQLITE_CANTOPEN": "its folder must exist and be writable",
        "SQLITE_NOTADB": "it is another kind of file",
    }
    SAVE = """
    INSERT INTO tasks (id, status, updated_at, task, state) VALUES (?, ?, ?, ?, ?)
    ON CONFLICT (id) DO UPDATE SET status = excluded.status, updated_at = excluded.updated_at,
        task = excluded.task, state = excluded.state
    """

    def __init__(self, settings: Settings) -> None:
        super().__init__(settings)
        self._path = Path(settings.db).expanduser().resolve()
        self._one_reader = anyio.CapacityLimiter(1)
        self._pending: list[Change] = []
        self._next_commit: asyncio.Task[None]
        self._committing = asyncio.Lock()
        self._started: list[str] = []  # by the server before this one, and not yet by this
        self._files: dict[Path, os.stat_result] = {}  # as they were opened
        with self._connected():  # or it is an error now
            pass

    @contextlib.contextmanager
    def _connected(self) -> Iterator[None]:
        with contextlib.ExitStack() as stack:

            def connect(path: str, timeout: float) -> sqlite3.Connection:
                connection = sqlite3.connect(
                    path, timeout, isolation_level=None, check_same_thread=False
                )
                return stack.enter_context(contextlib.closing(connection))

            try:
                lock = stack.enter_context(open(f"{self._path}.lock", "ab"))
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)  # while this process has the file
                self._writer = connect(str(self._path), 0)
                self._wait_for_locks(self._settings.lease)
                self._reader = connect(str(self._path), self._settings.lease)
                self._load_tasks()
                paths = [Path(f"{self._path}{end}") for end in ("", "-wal", "-shm", ".lock")]
                self._files = {path: path.stat() for path in paths}
                self._hold(stack)
            except StoreUnavailable as error:
                raise SettingsError(f"db {self._path} cannot be used: {error}") from None
            except (OSError, sqlite3.Error) as error:
                name = getattr(error, "sqlite_errorname", "SQLITE_CANTOPEN")
                if isinstance(error, BlockingIOError):
                    name = "SQLITE_BUSY"
                why = self.FAULTS.get(name, "is it a SQLite file that may be written?")
                raise SettingsError(f"db {self._path} cannot be used: {error}; {why}") from None
            yield

    def _load_tasks(self) -> None:
        (version,) = self._writer.execute("PRAGMA user_version").fetchone()
        if version not in (0, 1):
            has = f"has schema version {version}"
            raise SettingsError(f"db {self._path} {has}, and this streamer knows 1")
        self._writer.executescript(self.SCHEMA)
        rows = self._writer.execute("SELECT task, state FROM tasks ORDER BY number")
        # 0: the first event is looked up when it is asked for.
        records = [_load(task, state, first_event_id=0) for task, state in rows]
        self._records = {record.task.id: record for record in records}
        started = self._writer.execute("SELECT task_id FROM started ORDER BY rowid")
        self._started = [task_id for (task_id,) in started]

    def _hold(self, stack: contextlib.ExitStack) -> None:
        """Keeps other programs from deleting the write-ahead log while this one writes to it.

        SQLite's own locks do that until anything in this process closes the same file, as a backup
        does: POSIX locks end then. Linux has locks that do not, over the same bytes: SQLite's
        SHARED lock, and that of whoever uses `-shm`. Elsewhere `_check_files` finds it out.
        """
        if sys.platform != "linux":
            return
        for end, start, length in (("", 0x40000002, 510), ("-shm", 128, 1)):
            file = os.open(f"{self._path}{end}", os.O_RDONLY)
            stack.callback(os.close, file)
            lock = struct.pack("hhqqi4x", fcntl.F_RDLCK, os.SEEK_SET, start, length, 0)
            with contextlib.suppress(OSError):  # a file system without them
                fcntl.fcntl(file, fcntl.F_OFD_SETLK, lock)

    def _check_files(self) -> None:
        """What is written to a file that was replaced, or deleted, is lost at the end."""
        for path, opened in self._files.items():
            if not path.exists() or not os.path.samestat(path.stat(), opened):
                why = "was deleted or replaced while it was in use; start the server again"
                raise sqlite3.OperationalError(f"{path.name} {why}")

    def _wait_for_locks(self, seconds: float) -> None:
        """How long a write waits for a lock that somebody's shell holds."""
        self._writer.execute(f"PRAGMA busy_timeout = {int(1000 * seconds)}")

    @contextlib.asynccontextmanager
    async def opened(self, notify: Callable[[str | None], None]) -> AsyncIterator[None]:
        with self._connected():
            async with super().opened(notify):
                yield

    async def load(self, task_id: str) -> Record:
        record = self._records.get(task_id)
        if record is not None and record.first_event_id == 0:
            query = "SELECT coalesce(min(event_id), 1) FROM events WHERE task_id = ?"
            (first,) = await self._read(lambda db: db.execute(query, (task_id,)).fetchone())
            newest = self._records.get(task_id)
            if newest is not None:
                self._records[task_id] = newest._replace(first_event_id=first)
        return await super().load(task_id)

    async def read(self, task_id: str, after: int, limit: int) -> Sequence[Event]:
        query = """
        SELECT event_id, event_type, CAST(data AS BLOB) FROM events
        WHERE task_id = ? AND event_id > ? ORDER BY event_id
        """

        def read(db: sqlite3.Connection) -> list[Event]:
            found = []
            size = 0
            for event_id, event_type, data in islice(db.execute(query, (task_id, after)), limit):
                found.append(Event(event_id, EventType(event_type), data))
                size += len(data)
                if size > self.PAGE_BYTES:
                    break
            return found

        return await self._read(read)

    async def _read(self, query: Callable[[sqlite3.Connection], T]) -> T:
        try:
            return await anyio.to_thread.run_sync(query, self._reader, limiter=self._one_reader)
        except (OSError, sqlite3.Error) as error:
            raise self._unavailable(error) from None

    async def sweep(self) -> Sweep:
        async with self._changing:
            await self._change()  # does it work, still or again?
        async with self._committing:
            await self._read(self._shrink_wal)
        orphans, expired = await super().sweep()
        records = [self._records[each] for each in self._started if each in self._records]
        waiting = [record.task.id for record in records if record.task.status is TaskStatus.PENDING]
        self._started = [task_id for task_id in waiting if task_id not in self._claims]
        return Sweep([*orphans, *self._started], expired)

    def _shrink_wal(self, reader: sqlite3.Connection) -> None:
        """Gives back what the write-ahead log grew by while another program held it up."""
        log = f"{self._path}-wal"
        if os.stat(log).st_size > self.WAL_BYTES:  # neither connection is in use meanwhile
            self._wait_for_locks(0)
            self._writer.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchall()
        size = os.stat(log).st_size
        warning = f"{self._path.name}-wal has grown to {size >> 20} MB, as another program, perhaps"
        warning += " a shell, reads in a transaction that it does not end"
        self._set_warning(warning if size > self.WAL_BYTES else None)

    async def _journal(
        self, record: Record | None, events: Sequence[Event], forgotten: Sequence[str]
    ) -> None:
        """What comes while one transaction is written shares the next one."""
        self._pending.append((record, events, forgotten))
        if len(self._pending) == 1:
            self._next_commit = asyncio.create_task(self._commit_pending())
        with anyio.CancelScope(shield=True):  # what is stored takes effect
            await asyncio.shield(self._next_commit)

    async def _commit_pending(self) -> None:
        async with self._committing:
            changes = self._pending
            self._pending = []
            try:
                await anyio.to_thread.run_sync(self._commit, changes)
            except (OSError, sqlite3.Error) as error:
                self._set_error(str(self._unavailable(error)))
                raise self._unavailable(error) from None
            self._set_error(None)

    def _commit(self, changes: Sequence[Change]) -> None:
        # While it fails nobody waits again: who comes next would wait for all before it.
        self._wait_for_locks(0 if self.error else self._settings.lease)
        with self._writer as db:
            db.execute("BEGIN IMMEDIATE")
            if self.error:
                db.execute("PRAGMA user_version = 1")  # something that is written: is there room?
            for change in changes:
                self._save(db, *change)
            runs = (record and record.task.status is TaskStatus.RUNNING for record, _, _ in changes)
            if self.error or not all(runs):  # while a run goes on, the sweep looks
                self._check_files()

    def _save(
        self,
        db: sqlite3.Connection,
        record: Record | None,
        events: Sequence[Event],
        forgotten: Sequence[str],
    ) -> None:
        for task_id in forgotten:
            db.execute("DELETE FROM events WHERE task_id = ?", (task_id,))
            db.execute("DELETE FROM tasks WHERE id = ?", (task_id,))
            db.execute("DELETE FROM started WHERE task_id = ?", (task_id,))
        if record is None:
            return
        task, state, _ = record
        known = self._records.get(task.id)
        if known is not None and known.task is task:  # whose prompt may be long
            db.execute("UPDATE tasks SET state = ? WHERE id = ?", (_dump(state), task.id))
        else:
            saved = (task.id, task.status, task.updated_at, _dump(task), _dump(state))
            db.execute(self.SAVE, saved)
        if task.status is TaskStatus.PENDING:  # what is claimed before it runs was started
            query = "DELETE FROM started WHERE task_id = ?"
            if task.id in self._claims:
                query = "INSERT OR IGNORE INTO started VALUES (?)"
            db.execute(query, (task.id,))
        rows = [(task.id, event.id, event.type, event.data.decode()) for event in events]
        db.executemany("INSERT INTO events VALUES (?, ?, ?, ?)", rows)
        dropped = state.last_event_id - self._settings.max_events
        if dropped > 0:
            query = "DELETE FROM events WHERE task_id = ? AND event_id <= ?"
            db.execute(query, (task.id, dropped))

    def _unavailable(self, error: Exception) -> StoreUnavailable:
        return StoreUnavailable(f"the log in {self._path.name} cannot be used: {error}")


# -----------------------------------------------------------------------------
# Redis
# -----------------------------------------------------------------------------


class RedisLink:
    """The way to a Redis that may be away.

    Calls are tried again until `lease` seconds after its last write; `notify` is told why it
    does not take a write, and None when it does. Raises SettingsError where it cannot be reached
    now.
    """

    # It is no primary, or one that lacks its replicas; in Redis 6 a script's error holds the code.
    DEMOTED = "ReadOnly|READONLY|MasterDown|MASTERDOWN|NOREPLICAS"

    warning: str | None = None  # what its administrator should change

    def __init__(self, settings: Settings, notify: Callable[[str | None], None]) -> None:
        self._settings = settings
        self._lease = settings.lease
        self._notify = notify
        self._errors = importlib.import_module("redis").exceptions
        # A connection that closes under a command is a RuntimeError of uvloop's.
        self._unreached = (
            self._errors.ConnectionError,
            self._errors.TimeoutError,
            OSError,
            RuntimeError,
        )
        self._options: dict[str, Any] = {
            "socket_timeout": min(5.0, self._lease),
            "decode_responses": True,
            "encoding_errors": "replace",  # what others may have written
        }
        try:
            parts = urlsplit(settings.redis_url)
            port = f":{parts.port}" if parts.port else ""
            # Without user and password.
            self._url = f"{parts.scheme}://{parts.hostname or ''}{port}{parts.path}"
            client = importlib.import_module("redis").Redis
            with client.from_url(settings.redis_url, **self._options) as redis:
                redis.ping()
                policy = "unknown"
                with contextlib.suppress(self._errors.NoPermissionError):
                    policy = redis.info("memory").get("maxmemory_policy", policy)
        except self._errors.RedisError as error:
            raise SettingsError(f"the Redis at {self._url} cannot be used: {error}") from None
        except (ValueError, TypeError):  # whose text may hold the password
            form = "redis://[[user]:password@]host[:port][/number], the password with % escapes"
            raise SettingsError(f"redis_url must be {form}") from None
        if policy != "noeviction":
            risk = "when its memory is full it drops tasks and logs; set it to noeviction"
            self.warning = f"the Redis at {self._url} has maxmemory-policy {policy}: {risk}"

    @contextlib.asynccontextmanager
    async def opened(self) -> AsyncIterator[None]:
        asyncio_redis = importlib.import_module("redis.asyncio")
        pool = asyncio_redis.BlockingConnectionPool.from_url(
            self._settings.redis_url, max_connections=32, **self._options
        )
        self._last_write = time.monotonic()
        async with asyncio_redis.Redis.from_pool(pool) as self.redis:
            yield

    async def call(self, command: Callable[[], Awaitable[Any]], writes: bool = False) -> Any:
        """Raises StoreUnavailable.

        Only what `writes` shows that Redis is there: a primary that was demoted answers reads.
        """
        while True:
            try:
                answer = await command()
            except (*self._unreached, self._errors.RedisError) as error:
                await self._wait(error)
            else:
                if writes:
                    self._last_write = time.monotonic()
                    self._notify(None)
                return answer

    async def _wait(self, error: Exception) -> None:
        """Until the next try. Raises StoreUnavailable where that is of no use."""
        silent = time.monotonic() - self._last_write
        if isinstance(error, self._unreached):
            fault = "cannot be reached"
        elif re.search(self.DEMOTED, f"{type(error).__name__} {error}"):
            fault = "takes no writes"
            await self._renew_connections()
        else:
            fault = "refused"
            silent = math.inf
        reason = f"the Redis at {self._url} {fault}: {error}"
        self._notify(reason)
        if silent > self._lease:
            away = f", for longer than lease ({self._lease:g} s)" if silent < math.inf else ""
            raise StoreUnavailable(reason + away) from None
        await anyio.sleep(0.2)

    async def _renew_connections(self) -> None:
        """Another Redis may have the name by now: those in use are made again, and the last that
        was used, as `pool.disconnect` would close one that somebody takes meanwhile.
        """
        self._resubscribe = True
        pool = self.redis.connection_pool
        with contextlib.suppress(*self._unreached):
            await pool.update_active_connections_for_reconnect()
            connection = await pool.get_connection()
            connection.mark_for_reconnect()
            await pool.release(connection)

    async def pipelined(self, fill: Callable[[Any], object], transaction: bool = False) -> Any:
        """The answers to the commands that `fill` gives a pipeline, sent in one go."""

        async def execute() -> Any:
            async with self.redis.pipeline(transaction) as pipe:
                fill(pipe)
                return await pipe.execute()

        return await self.call(execute)

    async def for_each(self, names: Sequence[str], add: Callable[[Any, str], object]) -> Any:
        """The answers to one command for each name."""

        def fill(pipe: Any) -> None:
            for name in names:
                add(pipe, name)

        return await self.pipelined(fill) if names else ()

    async def changed(self, change: Callable[[Any], Awaitable[T]], *keys: str) -> T:
        """Looks and changes in one step: again where a key changed meanwhile.

        `change` reads, then calls `multi` and writes, or `unwatch`.
        """
        transaction = partial(self.redis.transaction, change, *keys, value_from_callable=True)
        result: T = await self.call(transaction)
        return result

    async def listen(self, channel: str, hear: Callable[[str | None], object]) -> None:
        """Has `hear` called with each message; with None where some may have got lost."""

        async def subscribed() -> None:
            async with self.redis.pubsub() as pubsub:
                self._resubscribe = False
                await pubsub.subscribe(channel)
                while not self._resubscribe:
                    message = await pubsub.get_message(timeout=self._lease / 2)
                    if message is None:
                        return  # a connection that not even this replica's own beats come through
                    hear(message["data"] if message["type"] == "message" else None)

        while True:
            with contextlib.suppress(self._errors.RedisError, *self._unreached):
                await subscribed()
            await anyio.sleep(0.2)


class RedisStore(Store):
    """A Redis that several replicas share.

    Each changes its beat while it lives; the tasks of one whose beat stood still for a while can
    be claimed by another, and then no longer be written to by it. That while is measured by the
    clock of who looks, and nothing of this expires: a Redis that evicts, or whose clock is set,
    ends no run.
    """

    TASK = "streamer:task:"  # a hash: status, task, state, and while it is claimed its owner
    LOG = "streamer:log:"  # a stream: the task's events, by their numbers
    CONVERSATION = "streamer:conversation:"  # its latest task
    TASKS = "streamer:tasks"  # sorted by creation: all tasks, and with a status behind it those
    CLAIMED = "streamer:claimed"  # a set: the tasks that have an owner
    CANCELS = "streamer:cancels"  # a hash: a request to the owner of a task, or "accepted"
    DELETED = "streamer:deleted:"  # for some time: a task was deleted, and not lost
    REPLICAS = "streamer:replicas"  # a hash: the beat of each replica
    LEFT = "left"  # the beat of one that was stopped
    PATIENCE = 0.6  # of a lease; the pauses before and after, of a sixth each, make it one
    ANSWERS = "streamer:answers:"  # a list: answers for the tasks of a replica
    TAKEN = "streamer:taken:"  # whether an answer was taken
    # A channel: the task that was written to, or the replica that lives; nothing asks for a sweep.
    NEWS = "streamer:news"
    WRITE = """
    local task, log, tasks, claimed, cancels = unpack(KEYS)
    local id, replica, after, status, record, state, max_events, max_age, channel =
      unpack(ARGV, 1, 9)
    local first_event = 10  -- then three values for each: number, type, data
    local newest = redis.call('XREVRANGE', log, '+', '-', 'COUNT', 1)[1]
    local last = newest and string.match(newest[1], '%d+') or '0'
    if ARGV[first_event] and last == ARGV[#ARGV - 2] and newest[2][4] == ARGV[#ARGV] then
      return 1  -- this call was here before, and its answer got lost
    end
    -- What does not follow exactly what is stored would hide that something was lost.
    if redis.call('HGET', task, 'owner') ~= replica or last ~= after then return 0 end
    for i = first_event, #ARGV, 3 do
      local number, type, data = unpack(ARGV, i, i + 2)
      redis.call('XADD', log, 'MAXLEN', max_events, number .. '-0', 'type', type, 'data', data)
    end
    redis.call('HSET', task, 'state', state)  -- where Redis refuses an event, it is not counted
    if status ~= '' then
      redis.call('ZREM', tasks .. ':' .. redis.call('HGET', task, 'status'), id)
      local created = redis.call('ZSCORE', tasks, id) or 0  -- where the list was lost
      redis.call('ZADD', tasks, created, id)
      redis.call('ZADD', tasks .. ':' .. status, created, id)
      redis.call('HSET', task, 'status', status, 'task', record)
      if status ~= 'PENDING' and status ~= 'RUNNING' then
        redis.call('HDEL', task, 'owner')
        redis.call('SREM', claimed, id)
        redis.call('HDEL', cancels, id)
        redis.call('EXPIRE', task, max_age)
        redis.call('EXPIRE', log, max_age)
      end
    end
    redis.call('PUBLISH', channel, id)
    return 1
    """
    ACCEPT = """
    if redis.call('HGET', KEYS[1], ARGV[1]) == ARGV[2] then
      redis.call('HSET', KEYS[1], ARGV[1], 'accepted')
    end
    """
    PAGE = 256  # events read at once, and about
    PAGE_BYTES = 1 << 20  # of them

    def __init__(self, settings: Settings) -> None:
        super().__init__(settings)
        self._lease = settings.lease
        self._max_age = math.ceil(settings.max_age)
        # From the last look at it on: its task may wait for an answer, and is kept after that.
        self._conversation_age = self._max_age + math.ceil(settings.answer_timeout)
        self._replica = uuid.uuid4().hex
        self._claiming: set[str] = set()
        self._page = self.PAGE
        self._news: dict[str, set[asyncio.Event]] = defaultdict(set)  # task → who waits for it
        self._attention = asyncio.Event()
        self._beats: dict[str, tuple[str | None, float]] = {}  # replica → its beat, and since when
        self._gone: set[str] = set()  # replicas, at the last sweep
        self._link = RedisLink(settings, self._hear_of_link)

    @contextlib.asynccontextmanager
    async def opened(self, notify: Callable[[str | None], None]) -> AsyncIterator[None]:
        async with self._link.opened(), super().opened(notify):
            self._write = self._link.redis.register_script(self.WRITE)
            self._accept = self._link.redis.register_script(self.ACCEPT)
            self._set_warning(self._link.warning)
            await self._beat(uuid.uuid4().hex)
            async with anyio.create_task_group() as group:
                group.start_soon(self._link.listen, self.NEWS, self._hear)
                yield
                group.cancel_scope.cancel()
            with anyio.move_on_after(1, shield=True), contextlib.suppress(StoreUnavailable):
                await self._beat(self.LEFT)  # so that another goes on at once

    def _hear_of_link(self, error: str | None) -> None:
        if (error is None) != (self.error is None):
            self._beats.clear()  # others cannot change theirs either
            self._gone.clear()
            self._attention.set()  # the sweep's beat shows whether it is over
        self._set_error(error)

    def _hear(self, news: str | None) -> None:
        """What other replicas tell: a task was written to, or a sweep is asked for."""
        if news is None:
            told = {self._attention}.union(*self._news.values())
        elif news:
            told = self._news.get(news, set())
        else:
            told = {self._attention}
        for event in told:
            event.set()

    async def _beat(self, beat: str) -> None:
        redis = self._link.redis
        write = partial(redis.hset, self.REPLICAS, self._replica, beat)
        await self._link.call(write, writes=True)
        await self._link.call(partial(redis.publish, self.NEWS, self._replica))

    def _unlist(self, pipe: Any, task_id: str) -> None:
        pipe.zrem(self.TASKS, task_id)
        for status in TaskStatus:
            pipe.zrem(f"{self.TASKS}:{status}", task_id)
        self._disown(pipe, task_id)

    def _remove(self, pipe: Any, task_id: str) -> None:
        pipe.delete(self.TASK + task_id, self.LOG + task_id)
        pipe.set(self.DELETED + task_id, "", ex=math.ceil(10 * self._lease))
        self._unlist(pipe, task_id)

    def _disown(self, pipe: Any, task_id: str) -> None:
        pipe.srem(self.CLAIMED, task_id)
        pipe.hdel(self.CANCELS, task_id)

    async def create(self, task: Task) -> Sequence[str]:
        key = self.TASK + task.id
        text = _dump(task)

        async def create(pipe: Any) -> Sequence[str]:
            known = await pipe.hget(key, "task")
            if known is not None:
                if known != text:
                    raise TaskExists(f"task {task.id} exists")
                await pipe.unwatch()  # this call was here before, and its answer got lost
                return ()
            forgotten = await self._make_room(pipe)
            pipe.multi()
            pipe.delete(self.LOG + task.id)  # of a task whose record was lost
            for task_id in forgotten:
                self._remove(pipe, task_id)
            created = {task.id: time.time_ns() // 1000}
            pipe.zadd(self.TASKS, created)
            pipe.zadd(f"{self.TASKS}:{task.status}", created)
            state = _dump(TaskState(task_id=task.id))
            pipe.hset(key, mapping={"status": task.status, "task": text, "state": state})
            pipe.expire(key, self._max_age)
            if task.origin is not None:
                conversation = self.CONVERSATION + task.origin.conversation
                pipe.set(conversation, task.id, ex=self._conversation_age)
            return forgotten

        return await self._link.changed(create, key, self.TASKS, self.CLAIMED)

    async def _make_room(self, pipe: Any) -> Sequence[str]:
        """The oldest tasks that do not run, as many as there are too many with one more."""
        excess = await pipe.zcard(self.TASKS) + 1 - self._settings.max_tasks
        if excess <= 0:
            return []
        ended: list[tuple[float, str]] = []
        for status in ENDED:
            key = f"{self.TASKS}:{status}"
            oldest = await pipe.zrange(key, 0, excess - 1, withscores=True)
            ended += [(created, task_id) for task_id, created in oldest]
        claimed = await pipe.smembers(self.CLAIMED)
        pending = await pipe.zrange(f"{self.TASKS}:{TaskStatus.PENDING}", 0, -1)
        unstarted = [task_id for task_id in pending if task_id not in claimed]
        return self._to_forget(excess, [task_id for _, task_id in sorted(ended)], unstarted)

    async def load(self, task_id: str) -> Record:
        (task, state), oldest, deleted = await self._link.pipelined(
            lambda pipe: (
                pipe.hmget(self.TASK + task_id, "task", "state")
                .xrange(self.LOG + task_id, count=1)
                .exists(self.DELETED + task_id)
            )
        )
        if task is None:
            raise self.deleted(task_id) if deleted else self._not_found(task_id)
        return self._record(task, state, oldest)

    def _record(self, task: str, state: str, oldest: Sequence[tuple[str, Any]]) -> Record:
        record = _load(task, state)
        first = self._number(oldest) or record.state.last_event_id + 1
        return record._replace(first_event_id=first)

    @staticmethod
    def _number(entries: Sequence[tuple[str, Any]]) -> int:
        return int(entries[0][0].partition("-")[0]) if entries else 0

    async def page(
        self, status: TaskStatus | None, offset: int, limit: int
    ) -> tuple[list[Task], int]:
        key = self.TASKS if status is None else f"{self.TASKS}:{status}"
        last = offset + limit - 1
        total, ids = await self._link.pipelined(
            lambda pipe: pipe.zcard(key).zrevrange(key, offset, last)
        )

        found = await self._link.for_each(
            ids, lambda pipe, task_id: pipe.hmget(self.TASK + task_id, "task", "state")
        )
        tasks = []
        for task_id, texts in zip(ids, found, strict=True):
            try:
                tasks += [_load(*texts).task] if texts[0] else []
            except StoreDamaged as error:
                logger.warning("task id=%s unlisted=%r", task_id, str(error))
        return tasks, total

    async def count(self) -> Mapping[TaskStatus, int]:
        statuses = list(TaskStatus)
        counts = await self._link.for_each(
            statuses, lambda pipe, status: pipe.zcard(f"{self.TASKS}:{status}")
        )
        return {status: n for status, n in zip(statuses, counts, strict=True) if n}

    async def latest(self, conversation: str) -> str | None:
        key = self.CONVERSATION + conversation
        task_id, _ = await self._link.pipelined(
            lambda pipe: pipe.get(key).expire(key, self._conversation_age)
        )
        return str(task_id) if task_id else None

    async def forget(self, task_id: str) -> None:
        def forget(pipe: Any) -> None:
            self._remove(pipe, task_id)
            pipe.publish(self.NEWS, task_id)

        await self._link.pipelined(forget, transaction=True)

    async def claim(self, task_id: str, statuses: Collection[TaskStatus]) -> Claim | None:
        if task_id in self._claims or task_id in self._claiming:
            return None
        key = self.TASK + task_id
        log = self.LOG + task_id

        async def claim(pipe: Any) -> Claim | None:
            status, owner, task, state = await pipe.hmget(key, "status", "owner", "task", "state")
            free = owner in (None, self._replica, *self._gone)
            if not free or status not in statuses:
                await pipe.unwatch()
                return None
            record = self._record(task, state, await pipe.xrange(log, count=1))
            last = self._number(await pipe.xrevrange(log, count=1))
            pipe.multi()
            self._disown(pipe, task_id)
            pipe.hset(key, "owner", self._replica)
            pipe.sadd(self.CLAIMED, task_id)
            pipe.persist(key)
            pipe.persist(log)
            # Numbers are used once, also where the log is not what the record says.
            state = record.state._replace(last_event_id=max(last, record.state.last_event_id))
            return Claim(self, record._replace(state=state), last)

        self._claiming.add(task_id)
        try:
            claimed = await self._link.changed(claim, key)
            if claimed is not None:
                self._claims[task_id] = claimed
            return claimed
        finally:
            self._claiming.discard(task_id)

    async def write(
        self, claim: Claim, state: TaskState, events: Sequence[Event], task: Task | None
    ) -> None:
        self._check(claim)
        task_id = state.task_id
        keys = [self.TASK + task_id, self.LOG + task_id, self.TASKS, self.CLAIMED, self.CANCELS]
        values: list[Any] = [task_id, self._replica, claim.log_end]
        values += [task.status, _dump(task)] if task else ["", ""]
        values += [_dump(state), self._settings.max_events, self._max_age, self.NEWS]
        for event in events:
            values += (event.id, event.type, event.data)
        if not await self._link.call(partial(self._write, keys, values), writes=True):
            raise await self._lose(claim)
        if events:
            claim.log_end = events[-1].id
        if state.status in ENDED:
            self._end(claim)

    async def _lose(self, claim: Claim) -> StreamerError:
        """Something else is stored than its holder has written: its holder is told what; that is
        returned, too.
        """
        task_id = claim.record.task.id
        (owner, task), newest, deleted = await self._link.pipelined(
            lambda pipe: (
                pipe.hmget(self.TASK + task_id, "owner", "task")
                .xrevrange(self.LOG + task_id, count=1)
                .exists(self.DELETED + task_id)
            )
        )
        last = self._number(newest)
        lost = f"task {task_id} is not this replica's any more"
        if task is None:
            claim.lost = LeaseLost(f"{lost}: {'it was deleted' if deleted else self.LOST}")
        elif last < claim.log_end or (last == claim.log_end and owner is None):
            older = f"at event {last}, of {claim.log_end} that were stored"
            claim.lost = StoreUnavailable(f"Redis has lost what was stored: it is {older}")
        elif owner == self._replica:
            late = "a write that came late or in part, or somebody else's"
            newer = f"at event {last}, and {claim.log_end} were known to be stored"
            claim.lost = StoreUnavailable(
                f"Redis holds more than was written: {late}; it is {newer}"
            )
        else:
            claim.lost = LeaseLost(f"{lost}: another took it over")
        self._end(claim)
        claim.tell(ClaimLost(claim.lost))
        return claim.lost

    async def release(self, claim: Claim) -> None:
        self._end(claim)
        task_id = claim.record.task.id
        key = self.TASK + task_id

        async def release(pipe: Any) -> None:
            status, owner = await pipe.hmget(key, "status", "owner")
            # A run that did not end is for this replica to end: it knows why.
            if owner != self._replica or status == TaskStatus.RUNNING:
                await pipe.unwatch()
                return
            pipe.multi()
            self._disown(pipe, task_id)
            pipe.hdel(key, "owner")
            pipe.expire(key, self._max_age)
            pipe.expire(self.LOG + task_id, self._max_age)

        await self._link.changed(release, key)

    async def read(self, task_id: str, after: int, limit: int) -> Sequence[Event]:
        start = f"{after + 1}-0"
        count = min(limit, self._page)
        found = await self._link.call(
            partial(self._link.redis.xrange, self.LOG + task_id, start, count=count)
        )
        events: list[Event] = []
        for each in found:
            key, entry = each
            number = self._number([each])
            if events and number != events[-1].id + 1:
                break
            try:
                event = Event(number, EventType(entry["type"]), entry["data"].encode())
            except (KeyError, ValueError):
                if events:
                    break
                what = f"entry {key} of {self.LOG}{task_id} is no event of a streamer's"
                raise StoreDamaged(f"{what}: delete the task") from None
            events.append(event)
        if events:  # so that the next page has about PAGE_BYTES
            average = sum(len(event.data) for event in events) / len(events)
            self._page = max(1, min(self.PAGE, int(self.PAGE_BYTES / average)))
        return events

    async def sweep(self) -> Sweep:
        held = dict(self._claims)
        await self._beat(uuid.uuid4().hex)
        expired = await self._expired()
        orphans = []
        for task_id, status, owner in await self._started(held):
            claim = self._claims.get(task_id)
            if claim is not None:
                if claim is held.get(task_id) and owner != self._replica:
                    await self._lose(claim)
            elif task_id in held or task_id in self._claiming:  # that is newer than what was read
                continue
            elif owner is None:
                orphans += [task_id] if status == TaskStatus.RUNNING else []
            elif owner in self._gone or owner == self._replica:
                orphans.append(task_id)
        await self._pass_on_cancels()
        await self._pass_on_answers()
        return Sweep(orphans, expired)

    async def _started(self, held: Collection[str]) -> list[tuple[str, Any, Any]]:
        """The tasks that were started or are held: status and owner; looks which owners live."""
        asked = time.monotonic()
        running, claimed, beats = await self._link.pipelined(
            lambda pipe: (
                pipe.zrange(f"{self.TASKS}:{TaskStatus.RUNNING}", 0, -1)
                .smembers(self.CLAIMED)
                .hgetall(self.REPLICAS)
            )
        )
        started = sorted({*running, *claimed, *held})
        tasks = await self._link.for_each(
            started, lambda pipe, task_id: pipe.hmget(self.TASK + task_id, "status", "owner")
        )
        owners = {owner for _, owner in tasks if owner}
        before = self._beats
        self._beats = {each: (beats.get(each), time.monotonic()) for each in {*beats, *owners}}
        for replica, (beat, _) in self._beats.items():
            if replica in before and before[replica][0] == beat:
                self._beats[replica] = before[replica]
        self._gone = {
            replica
            for replica, (beat, since) in self._beats.items()
            if beat == self.LEFT or asked - since > self.PATIENCE * self._lease
        }
        await self._link.for_each(
            [*self._gone - owners], lambda pipe, replica: pipe.hdel(self.REPLICAS, replica)
        )
        return [(task_id, *found) for task_id, found in zip(started, tasks, strict=True)]

    async def _pass_on_cancels(self) -> None:
        cancels = await self._link.call(partial(self._link.redis.hgetall, self.CANCELS))
        for task_id, asked in cancels.items():
            claim = self._claims.get(task_id)
            if asked != "accepted" and claim is not None and claim.tell(CancelAsked()):
                accept = partial(self._accept, [self.CANCELS], [task_id, asked])
                await self._link.call(accept)

    async def _pass_on_answers(self) -> None:
        key = self.ANSWERS + self._replica
        answers, _ = await self._link.pipelined(
            lambda pipe: pipe.lrange(key, 0, -1).delete(key), transaction=True
        )
        for text in answers:
            task_id, number, *answer = json.loads(text)
            claim = self._claims.get(task_id)
            taken = claim is not None and claim.tell(AnswerGiven(*answer))
            tell = partial(self._link.redis.set, self.TAKEN + number, int(taken), nx=True, ex=60)
            await self._link.call(tell)

    async def _expired(self) -> list[str]:
        """The tasks whose hash has expired; takes them out of the lists."""
        latest = time.time_ns() // 1000 - 1_000_000 * self._max_age
        old = await self._link.call(partial(self._link.redis.zrangebyscore, self.TASKS, 0, latest))
        exist = await self._link.for_each(
            old, lambda pipe, task_id: pipe.exists(self.TASK + task_id)
        )
        expired = []
        for task_id in (task_id for task_id, exists in zip(old, exist, strict=True) if not exists):
            (first, *_) = await self._link.pipelined(partial(self._unlist, task_id=task_id))
            if first:  # by this replica, and not by another
                expired.append(task_id)
        return expired

    async def pause(self, seconds: float) -> None:
        with anyio.move_on_after(seconds):
            await self._attention.wait()
        self._attention.clear()

    async def cancel(self, task_id: str) -> bool:
        end = time.monotonic() + 2 * self._lease  # by then its owner answers, or is none any more
        await self._link.pipelined(
            lambda pipe: pipe.hsetnx(self.CANCELS, task_id, uuid.uuid4().hex).publish(self.NEWS, "")
        )
        while time.monotonic() < end:
            answer, owner = await self._link.pipelined(
                lambda pipe: pipe.hget(self.CANCELS, task_id).hget(self.TASK + task_id, "owner")
            )
            if answer == "accepted":
                return True
            if answer is None or owner is None:
                break
            await anyio.sleep(0.02)
        await self._link.call(partial(self._link.redis.hdel, self.CANCELS, task_id))
        return False

    async def answer(self, task_id: str, answer: AnswerGiven) -> bool:
        owner = await self._link.call(partial(self._link.redis.hget, self.TASK + task_id, "owner"))
        if owner is None:
            return False
        key = self.ANSWERS + owner
        number = uuid.uuid4().hex
        text = encode([task_id, number, *answer])
        await self._link.pipelined(
            lambda pipe: (
                pipe.rpush(key, text).expire(key, math.ceil(2 * self._lease)).publish(self.NEWS, "")
            )
        )
        end = time.monotonic() + 2 * self._lease  # by then its owner takes it, or is none any more
        while time.monotonic() < end:
            taken = await self._link.call(partial(self._link.redis.get, self.TAKEN + number))
            if taken is not None:
                return bool(int(taken))
            await anyio.sleep(0.02)
        raise StoreUnavailable(f"whoever runs task {task_id} does not answer; see its state")

    async def changes(self, task_id: str) -> AsyncGenerator[None, None]:
        event = asyncio.Event()
        self._news[task_id].add(event)
        try:
            while True:
                yield
                with anyio.move_on_after(self._lease / 3):  # news may get lost
                    await event.wait()
                event.clear()
        finally:
            self._news[task_id].discard(event)
            if not self._news[task_id]:
                del self._news[task_id]


def open_store(settings: Settings) -> Store:
    """The store that the settings name. Raises SettingsError where it cannot be used."""
    if settings.redis_url:
        return RedisStore(settings)
    if settings.db:
        return SqliteStore(settings)
    return MemoryStore(settings)


# -----------------------------------------------------------------------------
# Broker
# -----------------------------------------------------------------------------


class Delivery(NamedTuple):
    """What a client is sent next: what is missing, events, then the state where it changed."""

    events: Batch
    state: str | None
    cursor: str = ""  # an SSE id: one who gets some types of events resumes from his last state
    gap: EventsMissing | None = None  # in front of the events

    @property
    def error(self) -> list[str]:
        return [envelope("error", self.gap.as_dict())] if self.gap else []

    @property
    def frames(self) -> bytes:
        error = b"".join(map(text_frame, self.error))
        return error + self.events.frames + (text_frame(self.state) if self.state else b"")

    @property
    def messages(self) -> list[str]:
        events = [event.message for event in self.events]
        return self.error + events + ([self.state] if self.state else [])

    @property
    def server_sent(self) -> str:
        error = "".join(f"data: {message}\n\n" for message in self.error)
        state = f"{self.cursor}data: {self.state}\n\n" if self.state else ""
        return error + self.events.server_sent + state


NO_EVENTS = Batch()


class News(NamedTuple):
    """What a broker hands over to its subscriptions."""

    events: Batch
    frames: bytes  # of the events, and of the state where that changed
    after: int  # the event before it
    newest: int  # its last event
    state_version: int
    at: float  # the loop's time


class Broker:
    """One per task: numbers events, stores them, hands them to every client, holds the state.

    It writes while it has the task's claim; without it, it follows what another process stores.
    """

    def __init__(self, record: Record, store: Store, settings: Settings) -> None:
        self.task = record.task
        self.state = record.state
        self.store = store
        self.settings = settings
        self.claim: Claim | None = None
        self.subscriptions: set[Subscription] = set()
        self.state_version = 0  # a subscription compares it to know that the state changed
        self.closing: StreamerError | None = None
        self._oldest = record.first_event_id
        self._following: anyio.CancelScope | None = None
        self._moving = anyio.Lock(fast_acquire=True)  # the place in the log moves
        self._loop = asyncio.get_running_loop()
        self._beats: asyncio.TimerHandle | None = None
        self._encoded = (-1, -1, "")
        self._wait_is_told = False  # the last state that was made for clients says who waits

    @property
    def ended(self) -> bool:
        return self.task.status in ENDED

    @property
    def unused(self) -> bool:
        """Nobody watches, nobody writes, and nobody is about to."""
        return not self.subscriptions and self.claim is None and not self._moving.locked()

    @property
    def first_event_id(self) -> int:
        """The number of the oldest event that the log keeps."""
        return max(self._oldest, self.state.last_event_id - self.settings.max_events + 1)

    # Writing

    async def hold(self, claim: Claim) -> None:
        """From now on this broker writes; first it hands over what others have stored."""
        async with self._moving:
            await self._follow_to(claim.record)
            self.claim = claim

    async def let_go(self, release: bool = True) -> None:
        """Follows again. What is not released is taken over once this process is gone."""
        if self.claim is not None and release:
            with contextlib.suppress(StreamerError):  # without the store it runs out by itself
                await self.claim.release()
        self.claim = None

    async def publish(
        self,
        drafts: Sequence[Draft] = (),
        task: Task | None = None,
        *,
        again: bool = False,
        **values: Any,
    ) -> None:
        """Stores events and the state they lead to, then hands both over; waits for no client
        (guarantees 3, 4, 9).

        `again`: the task begins anew, on the same log. Raises what `Claim.write` does; then
        nothing has changed.
        """
        async with self._moving:
            if self.claim is None:
                raise LeaseLost(f"task {self.task.id} is not claimed here any more")
            last = self.state.last_event_id
            events = Batch(
                draft.numbered(number, self.task.id)
                for number, draft in enumerate(drafts, start=last + 1)
            )
            before = self.state
            if again:
                before = TaskState(
                    task_id=self.task.id, cost=self.state.cost, answers=self.state.answers
                )
            state = before.after(drafts, values, last + len(events))
            if task or state != self.state:
                await self.claim.write(state, events, task)
                self._adopt(state, events, task or self.task)

    # Following

    async def catch_up(self) -> None:
        """Hands over what another process has stored by now. Raises TaskNotFound."""
        async with self._moving:
            if self.claim is None:
                await self._follow_to(await self.store.load(self.task.id))

    async def follow(self) -> None:
        """Catches up with every change, while anybody watches and another process may write.

        Raises TaskNotFound where it was deleted.
        """
        if self._following is not None:
            return
        with anyio.CancelScope() as self._following:
            try:
                async with contextlib.aclosing(self.store.changes(self.task.id)) as changes:
                    async for _ in changes:
                        if self.claim or self.ended or self.closing:
                            return
                        with contextlib.suppress(StoreUnavailable):  # it comes back, or is lost
                            await self.catch_up()
            finally:
                self._following = None

    def stop_following(self) -> None:
        if self._following is not None:
            self._following.cancel()

    async def _follow_to(self, record: Record) -> None:
        last = record.state.last_event_id
        if last < self.state.last_event_id:  # what its clients have seen is not stored any more
            older = f"its log ends at event {last}, and {self.state.last_event_id} were there"
            again = f"the store has lost what was stored: {older}; connect again"
            self.close(StoreUnavailable(again))
            raise StoreUnavailable(again)
        self._oldest = record.first_event_id
        while self.state.last_event_id < record.state.last_event_id:
            last = self.state.last_event_id
            try:
                events = Batch(await self.store.read(self.task.id, last, Subscription.PAGE))
            except StoreDamaged as error:
                self.close(error)  # nobody comes past it
                raise
            newest = events[-1].id if events else record.state.last_event_id
            state = self.state._replace(last_event_id=newest)
            if events and events[0].id != last + 1:  # each client finds what it misses
                events = NO_EVENTS
            self._adopt(state, events, self.task)
        state = record.state._replace(last_event_id=self.state.last_event_id)
        self._adopt(state, NO_EVENTS, record.task)

    # Handing over

    def _adopt(self, state: TaskState, events: Batch, task: Task) -> None:
        unchanged = self.state._replace(last_event_id=state.last_event_id)
        if not self._wait_is_told and state.waiting_on is None:
            unchanged = unchanged._replace(waiting=state.waiting)
        changed = state != unchanged or task.status != self.task.status
        self.task = task
        self.state = state
        if self.ended and self.claim is not None:
            self.claim = None  # which ended with the status
        if changed:
            self.state_version += 1
        if self.subscriptions and (events or changed):
            newest = state.last_event_id
            after = newest - len(events)
            frames = Delivery(events, self.state_message() if changed else None).frames
            news = News(events, frames, after, newest, self.state_version, self._loop.time())
            for subscription in self.subscriptions:
                subscription.offer(news)
        if self.ended:
            self._wake_all()

    def show_store(self) -> None:
        """Sends the state again, which says why the store does not answer, or no more."""
        self.state_version += 1
        self._wake_all()

    def close(self, reason: StreamerError) -> None:
        """Ends every subscription before its task has ended, once it has sent all there is."""
        self.closing = reason
        self._wake_all()

    def _wake_all(self) -> None:
        for subscription in self.subscriptions:
            subscription.wake()

    def state_message(self, fresh: bool = False) -> str:
        """Encoded once for all clients; `fresh` renews the seconds it counts."""
        key = (self.state_version, self.state.last_event_id)
        if fresh or self._encoded[:2] != key:
            data = self.store.state_data(self.state)
            self._encoded = (*key, envelope("state", data))
            self._wait_is_told = "waiting_on" in data
        return self._encoded[2]

    def subscribe(self, after: int = 0, types: frozenset[EventType] | None = None) -> Subscription:
        subscription = Subscription(self, after, types)
        self.subscriptions.add(subscription)
        if self._beats is None:
            self._beat()
        return subscription

    def _beat(self) -> None:
        """Wakes clients that were sent nothing for long, or have not been told of a wait.

        One timer for all of a task's clients.
        """
        self._beats = None
        if self.subscriptions:
            if self.state.waiting_on is not None and not self._wait_is_told:
                self.state_version += 1
                self._wake_all()
            for subscription in self.subscriptions:
                if subscription.overdue:
                    subscription.wake()
            self._beats = self._loop.call_later(self.settings.heartbeat / 4, self._beat)


class Subscription:
    """One client's place in a task's log: replay, then live, without a gap or a duplicate
    (guarantee 1).

    A memory object stream wakes the client and hands over what is new; the log is the buffer. What
    would make the client lag by more than `subscriber_buffer` events is not handed over: the client
    reads on from the log where its cursor stands (guarantee 4). To a client that has caught up what
    is new is written at once, where the server offers that, and nobody is woken.
    """

    PAGE = 512  # events read from the log at once

    def __init__(self, broker: Broker, after: int, types: frozenset[EventType] | None) -> None:
        self.broker = broker
        self.types = types
        self.first_event_id = broker.first_event_id
        self.recovered = self.first_event_id - 1 <= after <= broker.state.last_event_id
        self.cursor = after if self.recovered else self.first_event_id - 1  # the last delivered
        self.delivered = 0
        self._loop = asyncio.get_running_loop()
        self._last_sent = self._loop.time()
        self._state_version_sent = -1
        self._waiting = False  # for what is new: all there was is delivered
        self._replaying = False  # until then a replay begins where the log does by now
        self._write: Callable[[bytes], bool] | None = None
        self._received: Batch = NO_EVENTS
        self._gap: EventsMissing | None = None  # to be told
        size = broker.settings.subscriber_buffer + 1
        self._send, self._receive = anyio.create_memory_object_stream[Batch](size)

    async def begin(self) -> None:
        """Reads the first page; where events behind the cursor are missing it starts after them."""
        self._received = await self._logged(begins=True)

    def write_directly(self, write: Callable[[bytes], bool]) -> None:
        """Has frames written by `write` while the client waits; it returns False where the
        transport takes no more.
        """
        if self.types is None:
            self._write = write

    def offer(self, news: News) -> None:
        """Hands over, without waiting, what the client has room for."""
        events = news.events
        waits_for_it = self._waiting and self.cursor == news.after
        if waits_for_it and self._write is not None and self._write(news.frames):
            self.cursor = news.newest
            self.delivered += len(events)
            self._state_version_sent = news.state_version
            self._last_sent = news.at
        elif self._waiting:
            self.wake(events)
        elif events and news.newest - self.cursor <= self.broker.settings.subscriber_buffer:
            with contextlib.suppress(anyio.WouldBlock):
                self._send.send_nowait(events)

    def wake(self, events: Batch = NO_EVENTS) -> None:
        """Has a client that waits look at what is new; one that does not wait will look anyway."""
        if self._waiting:
            self._waiting = False
            self._send.send_nowait(events)

    def close(self) -> None:
        self.broker.subscriptions.discard(self)
        self._send.close()
        self._receive.close()

    async def __aiter__(self) -> AsyncIterator[Delivery]:
        """Deliveries, the first of them the state, until the task ended and all was sent.

        Raises what the broker was closed with, and SlowClient where retention was faster.
        """
        broker = self.broker
        yield self._delivery(NO_EVENTS, fresh=True)
        while True:
            events = self._handed_over() or await self._logged()
            if events:
                self.cursor = events[-1].id
                delivery = self._delivery(events)
                if delivery.events or delivery.state or delivery.gap:
                    yield delivery
            elif self._gap or self._state_version_sent != broker.state_version:
                yield self._delivery(NO_EVENTS)
            elif broker.closing is not None:
                raise broker.closing
            elif broker.ended:
                return
            elif self.overdue:
                yield self._delivery(NO_EVENTS, fresh=True)
            else:
                # Nothing was awaited since the checks above, so nothing was missed.
                self._waiting = True
                self._received = await self._receive.receive()

    @property
    def overdue(self) -> bool:
        """Nothing was sent for nearly `heartbeat` seconds: the broker looks each quarter of it."""
        return self._loop.time() >= self._last_sent + 0.75 * self.broker.settings.heartbeat

    def _delivery(self, events: Batch, fresh: bool = False) -> Delivery:
        broker = self.broker
        if self.types is not None:
            events = Batch(event for event in events if event.type in self.types)
            fresh = fresh or (not events and self.overdue)
        caught_up = self.cursor >= broker.state.last_event_id
        state = None
        if fresh or (caught_up and self._state_version_sent != broker.state_version):
            state = broker.state_message(fresh)
            # One that has not caught up is sent it once more when it has.
            self._state_version_sent = broker.state_version if caught_up else -1
        gap = self._gap
        self._gap = None
        if events or state or gap:
            self.delivered += len(events)
            self._last_sent = self._loop.time()
        cursor = "" if self.types is None else f"id: {self.cursor}\n"
        return Delivery(events, state, cursor, gap)

    def _handed_over(self) -> Batch:
        """The next batch, where it follows the cursor; what the log gave already is passed over."""
        batch = self._received
        self._received = NO_EVENTS
        try:
            batch = batch or self._receive.receive_nowait()
        except anyio.WouldBlock:
            return NO_EVENTS
        if not batch:
            return NO_EVENTS
        known = self.cursor + 1 - batch[0].id
        if known < 0:  # there was no room for one before it
            return NO_EVENTS
        return Batch(batch[known:]) if known else batch

    async def _logged(self, begins: bool = False) -> Batch:
        """From the log, up to what the broker has handed over: what is stored beyond that is on
        its way.
        """
        broker = self.broker
        while self.cursor < broker.state.last_event_id:
            await anyio.lowlevel.checkpoint()  # a long replay lets others have their turn
            events = await broker.store.read(broker.task.id, self.cursor, self.PAGE)
            first = events[0].id if events else broker.state.last_event_id + 1
            if first != self.cursor + 1:
                if not begins and (self.recovered or self._replaying):
                    self._gap = await self._missing(first)
                else:
                    self.recovered = False
                    self.first_event_id = first
                self.cursor = first - 1
                continue
            beyond = max(0, events[-1].id - broker.state.last_event_id)
            if beyond < len(events):
                self._replaying = True
                return Batch(events[: len(events) - beyond])
        return NO_EVENTS

    async def _missing(self, first: int) -> EventsMissing:
        """What the log lacks before event `first`. Raises TaskNotFound where there is none, and
        SlowClient where retention was faster.
        """
        broker = self.broker
        if broker.closing is not None:
            raise broker.closing
        newest = (await broker.store.load(broker.task.id)).state.last_event_id
        missing = f"events {self.cursor + 1} to {first - 1}"
        if first > newest - broker.settings.max_events + 1:
            return EventsMissing(
                f"{missing} are missing in the log; the stream goes on behind them"
            )
        resume = f"connect again with after={self.cursor}"
        raise SlowClient(f"{missing} were dropped before you read them; {resume}")


class Brokers:
    """The one broker of each task that runs or is watched."""

    def __init__(self, store: Store, settings: Settings) -> None:
        self._store = store
        self._settings = settings
        self._brokers: dict[str, Broker] = {}

    def __iter__(self) -> Iterator[Broker]:
        return iter(list(self._brokers.values()))

    async def get(self, task_id: str) -> Broker:
        """Once it has handed over all that was stored before this. Raises TaskNotFound."""
        broker = self._current(task_id)
        if broker is None:
            record = await self._store.load(task_id)
            broker = self._current(task_id)
            if broker is None:
                return self._new(record)
        try:
            await broker.catch_up()
        except StreamerError:
            self.drop_unused(broker)
            raise
        return broker

    async def claim(self, task_id: str, statuses: Collection[TaskStatus]) -> Broker | None:
        """Of a task that is this process's to run; None where its status is another, or somebody
        has it.
        """
        claim = await self._store.claim(task_id, statuses)
        if claim is None:
            return None
        broker = self._current(task_id) or self._new(claim.record)
        try:
            await broker.hold(claim)
        except StreamerError:
            with contextlib.suppress(StreamerError):  # without the store it runs out by itself
                await claim.release()
            self.drop_unused(broker)
            raise
        return broker

    def drop_unused(self, broker: Broker) -> None:
        task_id = broker.task.id
        if broker.unused and self._brokers.get(task_id) is broker:
            del self._brokers[task_id]
            broker.stop_following()

    def close(self, task_id: str, reason: StreamerError) -> None:
        """Ends the clients of a task that is gone."""
        broker = self._brokers.pop(task_id, None)
        if broker is not None:
            broker.close(reason)

    def _current(self, task_id: str) -> Broker | None:
        broker = self._brokers.get(task_id)
        return None if broker is None or broker.closing else broker

    def _new(self, record: Record) -> Broker:
        broker = Broker(record, self._store, self._settings)
        self._brokers[record.task.id] = broker
        return broker


# -----------------------------------------------------------------------------
# Runs
# -----------------------------------------------------------------------------


class Outcome(NamedTuple):
    """How a call of somebody else's code ended."""

    result: Any = None
    error: BaseException | None = None
    abandoned: bool = False  # its thread goes on


def guarded(call: Callable[..., Any], *args: Any) -> Outcome:
    """The boundary to a runner: whatever it raises, SystemExit too, is a result here."""
    try:
        return Outcome(call(*args))
    except BaseException as error:
        return Outcome(error=error)


Report = Draft | dict[str, Any]  # an event, or new values of the state


class Outbox:
    """What a run's threads report, until the loop takes it.

    A thread appends, and wakes the loop where that does not know yet that something waits: it makes
    no round trip, and is held back only while the outbox is full (guarantee 5).
    """

    MAX_REPORTS = 4096
    MAX_CHARS = 1 << 20  # of their payloads
    BATCH = 256  # reports that are taken before others on the loop get a turn

    def __init__(self) -> None:
        self.finished = False
        self._reports: deque[Report] = deque()
        self._chars = 0
        self._lock = threading.Lock()
        self._room = threading.Condition(self._lock)
        self._wake: Callable[[], object] = lambda: None
        self._awake = False  # whoever takes knows that there is something
        self._taker = 0  # its thread

    def attach(self, wake: Callable[[], object]) -> None:
        """Has `wake` called, in any thread, when there is something to take in this one."""
        with self._lock:
            self._wake = wake
            self._awake = True
            self._taker = threading.get_ident()
        wake()

    def put(self, report: Report) -> None:
        size = len(report.payload) if isinstance(report, Draft) else 0
        with self._lock:
            # Who empties it must not wait for itself: a callback of a cancel may report too.
            while self._full and not self.finished and threading.get_ident() != self._taker:
                self._room.wait()
            if self.finished:
                return
            self._reports.append(report)
            self._chars += size
            if self._awake:
                return
            self._awake = True
        self._call_wake()

    def take(self) -> list[Report]:
        """The next reports, in order; where there are none, `wake` tells of more."""
        with self._lock:
            was_full = self._full
            taken = [self._reports.popleft() for _ in range(min(self.BATCH, len(self._reports)))]
            self._chars -= sum(len(item.payload) for item in taken if isinstance(item, Draft))
            if not taken:
                self._awake = False
            if was_full:
                self._room.notify_all()
        return taken

    def finish(self) -> None:
        """What is reported from now on goes nowhere."""
        with self._lock:
            self.finished = True
            self._room.notify_all()
        self._call_wake()

    @property
    def _full(self) -> bool:
        return len(self._reports) >= self.MAX_REPORTS or self._chars >= self.MAX_CHARS

    def _call_wake(self) -> None:
        with contextlib.suppress(RuntimeError):  # the loop has closed: nobody is left to see it
            self._wake()


class Run:
    """What a runner gets: its task, and the ways to report."""

    def __init__(
        self,
        task: Task,
        settings: Settings,
        secrets: Sequence[str] = (),
        earlier_cost: Mapping[str, Any] = NO_COST,
    ) -> None:
        self.price = settings.price
        self.earlier_cost = earlier_cost  # of the task's runs before this one
        self.own_cost: Mapping[str, Any] = NO_COST
        self.task_id = task.id
        self.prompt = task.input_prompt
        self.options = task.options
        self.workspace = settings.workspace / task.id
        self.secrets = secrets
        self.outbox = Outbox()
        self.max_event_bytes = settings.max_event_bytes
        self.model_timeout = settings.model_timeout
        self.answer_timeout = settings.answer_timeout
        self.progress = 0.0  # as it was reported last
        self._asking = threading.Condition()
        self._is_asking = False  # a thread is, and others wait for it
        self._question_id = ""  # of the question that can be answered now
        self._answer: AnswerGiven | None = None
        self._last_answer: AnswerGiven | None = None  # a message may bring it again
        self._cancelled = threading.Event()
        self._callbacks: list[Callable[[], object]] = []
        self._files: dict[str, tuple[int, int]] = {}

    # For the runner's threads

    def emit(
        self,
        event_type: EventType | str,
        payload: Mapping[str, Any] | None = None,
        agent_role: str | None = None,
    ) -> None:
        """Adds an event to the task's log. `payload["message"]` is its text for a person.

        Raises ValueError for a type that is unknown, or the server's own like TASK_START.
        """
        kind = RUNNER_TYPES.get(event_type)
        if kind is None:
            known = ", ".join(RUNNER_TYPES)
            raise ValueError(f"event_type must be one of {known}, not {event_type!r}")
        self.outbox.put(self.draft(kind, payload or {}, agent_role))

    @property
    def cost(self) -> Mapping[str, Any]:
        """What the task has cost up to now, its earlier runs included: the state's `cost`."""
        return add_costs(self.earlier_cost, self.own_cost)

    def update(
        self, *, progress: float | None = None, cost: Mapping[str, Any] | None = None
    ) -> None:
        """Sets the state's `progress` (0 to 1; it never falls), and what this run has cost.

        `cost` is like NO_COST; what is missing is 0, a total_cost of None is an unknown price.

        Raises ValueError for a progress that is no finite number.
        """
        if progress is not None and not math.isfinite(progress):
            raise ValueError(f"progress must be a number from 0 to 1, not {progress}")
        given: dict[str, Any] = {}
        if progress is not None:
            self.progress = given["progress"] = progress
        if cost is not None:
            roles = cost.get("by_role", {}).items()
            by_role = {str(jsonable(role)): self._whole_cost(own) for role, own in roles}
            self.own_cost = {**self._whole_cost(cost, "max_budget"), "by_role": by_role}
            given["cost"] = self.cost
        self.outbox.put(given)

    @staticmethod
    def _whole_cost(cost: Mapping[str, Any], *more: str) -> dict[str, Any]:
        names = ("prompt_tokens", "completion_tokens", "total_cost", *more)
        numbers = {name: cost.get(name, 0) or 0 for name in names}
        whole = {name: value if math.isfinite(value) else 0 for name, value in numbers.items()}
        if cost.get("total_cost", 0) is None:
            whole["total_cost"] = None
        return whole

    def ask(
        self,
        question: str,
        choices: Sequence[str] | None = None,
        agent_role: str | None = None,
        *,
        free_text: bool = False,
    ) -> str:
        """Asks the people who watch, and waits for the first answer; the clock of the task stands.

        It is one of `choices`, or with `free_text` any other text too. Threads that ask at once
        wait for one another. Raises RunCancelled, and RunFailed after `answer_timeout` seconds.
        """
        most = self.max_event_bytes // 32
        if choices and (max(map(len, choices)) > most or len("".join(choices)) > 4 * most):
            words = f"at most {most} characters each, and {4 * most} in all"
            raise ValueError(f"choices must have {words} (max_event_bytes)")
        question_id = uuid.uuid4().hex[:8]  # too short to be cut by max_event_bytes
        asked = {
            "message": str(question),
            "question_id": question_id,
            "choices": [*map(str, choices)] if choices else None,
            "free_text": free_text or not choices,
        }
        with self._open_question(question_id):
            self.outbox.put(self.draft(EventType.QUESTION, asked, agent_role))
            answer = self._wait_for_answer()
            if answer is None:
                self.outbox.put({"question": None})
                self.check_cancelled()
                seconds = f"{self.answer_timeout:g} s, the setting answer_timeout"
                raise RunFailed(f"nobody answered within {seconds}: {quoted(str(question))}")
            answered = {"message": answer.text, "question_id": question_id}
            if answer.message_id is not None:
                answered["message_id"] = answer.message_id
            self.outbox.put(self.draft(EventType.ANSWER, answered))
        return answer.text

    @contextlib.contextmanager
    def _open_question(self, question_id: str) -> Iterator[None]:
        """Waits until no other question is open."""
        with self._asking:
            self._asking.wait_for(lambda: not self._is_asking or self._cancelled.is_set())
            self.check_cancelled()
            self._is_asking = True
            self._question_id = question_id
        try:
            yield
        finally:
            with self._asking:
                self._is_asking = False
                self._question_id = ""
                self._asking.notify_all()

    def _wait_for_answer(self) -> AnswerGiven | None:
        """None where nobody answered, and nobody can any more."""
        ended = self._cancelled.is_set
        with self._asking:
            self._asking.wait_for(lambda: self._answer or ended(), self.answer_timeout)
            answer = self._answer
            self._answer = None
            self._question_id = ""
        return answer

    def waits_for_model(
        self, agent_role: str | None = None, action: str | None = None, since: float | None = None
    ) -> None:
        """Shows that the agent waits for its model, since a time or from now on; or none does."""
        since = time.time() if since is None else since
        waiting = (jsonable(agent_role), jsonable(action), since) if agent_role else None
        self.outbox.put({"waiting": waiting})

    def check_cancelled(self) -> None:
        """Raises RunCancelled once the task was cancelled, has timed out, or the server stops."""
        if self._cancelled.is_set():
            raise RunCancelled

    def wait(self, seconds: float) -> None:
        """Sleeps; raises RunCancelled as soon as the run is cancelled."""
        self._cancelled.wait(seconds)
        self.check_cancelled()

    def on_cancel(self, callback: Callable[[], object]) -> None:
        """Has `callback` called when the run is cancelled, in the server's thread; now if it is."""
        self._callbacks.append(callback)
        if self._cancelled.is_set():
            callback()

    def report_files(self, agent_role: str | None = None) -> list[str]:
        """Emits an ARTIFACT for each file written or deleted since the last call; returns the
        paths there are.
        """
        found = {path: (size, modified) for path, size, modified in list_files(self.workspace)}
        for path in sorted(found.keys() | self._files.keys()):
            if found.get(path) == self._files.get(path):
                continue
            change = "modified"
            if path not in self._files:
                change = "created"
            elif path not in found:
                change = "deleted"
            size = found[path][0] if path in found else 0
            message = f"{change} {path} ({size} bytes)"
            payload = {"message": message, "path": path, "size": size, "change": change}
            self.emit(EventType.ARTIFACT, payload, agent_role)
        self._files = found
        return list(found)

    def redact(self, text: str) -> str:
        """`text` without the secrets this process knows (guarantee 7)."""
        return redact(text, self.secrets)

    # For its execution

    def answer(self, answer: AnswerGiven) -> bool:
        """Whether it answers the open question, or is the last answer taken, come again."""
        with self._asking:
            if answer.message_id is not None and answer == self._last_answer:
                return True
            if answer.question_id != self._question_id or self._cancelled.is_set():
                return False
            self._question_id = ""
            self._answer = answer
            self._last_answer = answer
            self._asking.notify_all()
            return True

    def draft(
        self, kind: EventType, payload: Mapping[str, Any], agent_role: str | None = None
    ) -> Draft:
        message = payload.get("message")
        if not isinstance(message, str):
            message = kind.value if message is None else str(jsonable(message))
            payload = {**payload, "message": message}
        text = redact(message if message.isascii() else jsonable(message), self.secrets)[:300]
        if agent_role is not None:
            plain = type(agent_role) is str and agent_role.isascii() and len(agent_role) < 64
            agent_role = agent_role if plain else str(jsonable(agent_role, 64, self.secrets))
        encoded = encode_payload(payload, self.max_event_bytes, self.secrets)
        return Draft(kind, agent_role, now(), text, encoded)

    def cancel(self) -> None:
        self._cancelled.set()
        with self._asking:
            self._asking.notify_all()
        for callback in self._callbacks:
            guarded(callback)


class Runner(Protocol):
    """A plain function, called in a worker thread; what it returns is the task's result."""

    def __call__(self, run: Run, /) -> Mapping[str, Any] | None: ...


UNKNOWN = frozenset(  # errors that do not tell whether a file is there
    {errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.ENOSPC, errno.EDQUOT, errno.EIO}
)


def pass_over(error: OSError) -> None:
    """Of a file that is not there, or not ours to read; raises an error that is another."""
    if error.errno in UNKNOWN:
        raise error


def is_shown(name: str) -> bool:
    """Whether a file, or a folder, is seen: not a hidden one, nor one whose name has a control
    character, breaks a line or is no UTF-8, as no address or line of text can hold it.
    """
    return re.search("^[.]|[\x00-\x1f\x7f-\x9f\u2028\u2029\ud800-\udfff]", name) is None


def list_files(root: Path) -> Iterator[tuple[str, int, int]]:
    """Path from `root`, bytes and mtime in ns of the regular files below it that are shown; no
    links. Raises OSError where it cannot be known, as without a descriptor left.
    """
    for folder, folders, names in os.walk(root, onerror=pass_over):
        folders[:] = sorted(filter(is_shown, folders))
        for name in sorted(filter(is_shown, names)):
            path = Path(folder, name)
            with contextlib.suppress(FileNotFoundError, NotADirectoryError, PermissionError):
                status = path.lstat()
                if stat.S_ISREG(status.st_mode):
                    yield str(path.relative_to(root)), status.st_size, status.st_mtime_ns


# What the scripted team of test mode writes.
PRD = """\
# Requirements

> {prompt}

Test mode: a script plays the team, and builds a to-do list whatever is asked.

| Who | Wants | So that | |
|---|---|---|---|
| Anybody | to note an entry in one line | nothing is forgotten | P0 |
| Anybody | to tick an entry off | the list shows what is left | P0 |
| A program | to read the list by itself | others can build on it | P1 |

```mermaid
flowchart LR
    Person -->|add, done, list| App[src/app.py]
    App -->|reads, writes| File[(todo.json)]
```
"""
DESIGN = """\
# Design

One module, `src/app.py`, with the standard library only.

| Part | Holds | Does |
|---|---|---|
| `Entry` | a text, and whether it is done | |
| `TodoList` | the entries | adds, ticks off, loads, saves |
| `main` | | the command line |

A list is saved beside the old one, then renamed: a crash loses nothing.
"""
TASKS = """\
# Tasks

1. `src/app.py`: `Entry`, then `TodoList` with its file, then `main`.
2. `tests/test_app.py`: an entry outlives a restart.

No packages are needed, and nothing is unclear.
"""
CODE = """\
# A to-do list: `python app.py add "read the PRD"`, `done 1`, or `list`.

import argparse
import json
import os
from dataclasses import asdict, dataclass
from pathlib import Path


@dataclass
class Entry:
    text: str
    done: bool = False

    def __str__(self) -> str:
        return f"[{'x' if self.done else ' '}] {self.text}"


class TodoList:
    def __init__(self, path: Path) -> None:
        self.path = path
        self.entries: list[Entry] = []
        if path.exists():
            entries = json.loads(path.read_text())
            self.entries = [Entry(**entry) for entry in entries]

    def add(self, text: str) -> None:
        self.entries.append(Entry(text))
        self.save()

    def finish(self, number: int) -> None:
        if not 1 <= number <= len(self.entries):
            raise SystemExit(f"{number} is none of {len(self.entries)} entries")
        self.entries[number - 1].done = True
        self.save()

    def save(self) -> None:
        new = self.path.with_suffix(".new")
        entries = [asdict(entry) for entry in self.entries]
        new.write_text(json.dumps(entries, indent=2))
        os.replace(new, self.path)


def main() -> None:
    parser = argparse.ArgumentParser()
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("add").add_argument("text")
    commands.add_parser("done").add_argument("number", type=int)
    commands.add_parser("list")
    arguments = parser.parse_args()
    todo = TodoList(Path("todo.json"))
    if arguments.command == "add":
        todo.add(arguments.text)
    if arguments.command == "done":
        todo.finish(arguments.number)
    for number, entry in enumerate(todo.entries, start=1):
        print(number, entry)


if __name__ == "__main__":
    main()
"""
TEST = """\
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "src"))
from app import TodoList


def test_an_entry_outlives_a_restart(tmp_path):
    todo = TodoList(tmp_path / "todo.json")
    todo.add("read the PRD")
    todo.finish(1)
    again = TodoList(tmp_path / "todo.json")
    assert [str(entry) for entry in again.entries] == ["[x] read the PRD"]
"""
# Role, action, start and length in an agent's time, the file it writes, its text.
SCRIPT: Sequence[tuple[str, str, float, float, str, str]] = (
    ("ProductManager", "WritePRD", 0.0, 1.0, "docs/prd.md", PRD),
    ("Architect", "WriteDesign", 1.05, 1.0, "docs/system_design.md", DESIGN),
    ("ProjectManager", "WriteTasks", 1.3, 1.0, "docs/task.md", TASKS),
    ("Engineer", "WriteCode", 1.55, 1.6, "src/app.py", CODE),
    ("Engineer", "WriteCode", 3.2, 0.6, "tests/test_app.py", TEST),
    ("QaEngineer", "WriteTest", 2.1, 1.8, "tests/test_app.py", TEST),
)


def ask_approval(run: Run, action: str, role: str, free_text: bool = True) -> str:
    """What a person remarks on an action, nothing where it is approved.

    Raises RunCancelled, with the person's word, where it is to stop.
    """
    ways = "continue, stop, or say what should be different" if free_text else "continue or stop"
    question = f"{role} finished {action}: {ways}"
    answer = run.ask(question, ("continue", "stop"), role, free_text=free_text)
    if re.fullmatch(r"\s*stop\s*(:.*)?", answer, re.DOTALL | re.IGNORECASE):
        raise RunCancelled(f"stopped by a person after {action}: {answer}")
    return "" if answer == "continue" else answer


def run_scripted(run: Run, seconds: float = 2.4) -> Mapping[str, Any]:
    """Test mode: the roles, events and state changes of a real run, without MetaGPT.

    An agent takes `seconds`, the Engineer twice that; three of them overlap. The test is the QA
    engineer's where there is one.
    """
    needs = {"Engineer": "implement", "QaEngineer": "run_tests"}
    wanted = [part for part in SCRIPT if run.options.get(needs.get(part[0], ""), True)]
    team = list({part[4]: part for part in wanted}.values())  # one part for each file
    run.emit("LOG", {"message": "test mode: a scripted team, not MetaGPT", "level": "INFO"})
    run.update(cost={"max_budget": run.options["investment"]})
    remarks: list[str] = []
    turns = []
    start = 0.0
    for index, (role, action, earliest, length, path, text) in enumerate(team):
        start = max(start, earliest)
        turns.append((start, index, _play(run, remarks, role, action, length, path, text)))
        if action in run.options["approve"]:  # who comes next waits for a person's word
            start += length + 0.05
    clock = 0.0
    while turns:
        at, index, play = turns.pop(turns.index(min(turns)))
        run.wait((at - clock) * seconds)
        clock = at
        pause = next(play, None)
        if pause is not None:
            turns.append((at + pause, index, play))
        else:
            run.update(progress=1 - len(turns) / len(team))
    result = {"mode": "test", "end_reason": "idle", "rounds": len(team)}
    return {**result, "files": run.report_files(), "cost": run.cost}


def _play(
    run: Run, remarks: list[str], role: str, action: str, length: float, path: str, text: str
) -> Iterator[float]:
    """An agent's events; yields the time to the next, in an agent's time.

    It takes up a person's remark on what was done before it, and asks for one where that is wanted.
    """
    text = text.replace("{prompt}", run.prompt.replace("\n", "\n> "))
    if remarks:
        text += f"\n# As a person remarked: {remarks.pop()}\n"  # a comment, too
    call = {"action": action, "call_id": uuid.uuid4().hex[:12]}
    run.emit("AGENT_START", {"message": f"{role} starts {action}", "action": action}, role)
    run.waits_for_model(role, action)
    yield 0.2
    run.waits_for_model()
    run.emit("REASONING", {"message": f"What belongs into {path}?", **call}, role)
    reply = f"```python\n{text}```\n" if path.endswith(".py") else text  # as a model writes code
    size = max(120, len(reply) // 8)
    phrases = re.findall(rf"(?s:.{{0,{size}}}\n)|.{{1,2000}}", reply)  # whole lines, if they fit
    for phrase in phrases:
        run.emit("TOKEN", {"message": phrase, **call}, role)
        yield (length - 0.2) / len(phrases)
    target = run.workspace / path
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_text(text, encoding="utf-8")
    cost = run.own_cost
    words = len(text.split())
    tokens = cost["completion_tokens"] + words
    by_role = {**cost["by_role"], role: {"completion_tokens": words}}
    run.update(cost={**cost, "completion_tokens": tokens, "by_role": by_role})
    run.report_files(role)
    message = {"message": f"{role} to <all>: {path}", "content": text, "cause_by": action}
    run.emit("MESSAGE", {**message, "sent_from": role, "send_to": ["<all>"]}, role)
    run.emit("AGENT_COMPLETE", {"message": f"{role} finished {action}", "action": action}, role)
    if action in run.options["approve"]:
        remark = ask_approval(run, action, role)
        remarks.extend([remark] if remark else [])


# -----------------------------------------------------------------------------
# MetaGPT: configuration
# -----------------------------------------------------------------------------

# What is said of MetaGPT here is true of 0.8.2, and was seen by running it.

# What MetaGPT needs for an `llm.api_type`: its module in metagpt.provider, the module of the
# vendor's SDK, the package that has it. Types that are not listed are served by OPENAI.
OPENAI = ("openai_api", "openai", "openai")
VENDORS: Mapping[str, tuple[str, str, str]] = {
    "anthropic": ("anthropic_api", "anthropic", "anthropic"),
    "claude": ("anthropic_api", "anthropic", "anthropic"),
    "azure": ("azure_openai_api", "openai", "openai"),
    "ollama": ("ollama_api", "aiohttp", "aiohttp"),
    "metagpt": ("metagpt_api", "openai", "openai"),
    "gemini": ("google_gemini_api", "google.generativeai", "google-generativeai"),
    "zhipuai": ("zhipuai_api", "zhipuai", "zhipuai"),
    "spark": ("spark_api", "sparkai", "spark-ai-python"),
    "qianfan": ("qianfan_api", "qianfan", "qianfan"),
    "dashscope": ("dashscope_api", "dashscope", "dashscope"),
    "bedrock": ("bedrock_api", "boto3", "boto3"),
    "ark": ("ark_api", "volcenginesdkarkruntime", "volcengine-python-sdk[ark]"),
}
NO_MODEL = (
    "no model is configured. Set OPENAI_API_KEY (and OPENAI_BASE_URL, OPENAI_MODEL where they are "
    "not OpenAI's and gpt-4o), or ANTHROPIC_API_KEY and ANTHROPIC_MODEL, or write MetaGPT's "
    "~/.metagpt/config2.yaml, or see a scripted team with --test-mode"
)
# The server of each api_type, so that it is never the default of MetaGPT, OpenAI's for all of them.
# Empty: the vendor's SDK knows it.
VENDOR_URLS: Mapping[str, str] = {
    "openai": "https://api.openai.com/v1",
    "anthropic": "https://api.anthropic.com",
    "claude": "https://api.anthropic.com",
    "openrouter": "https://openrouter.ai/api/v1",
    "mistral": "https://api.mistral.ai/v1",
    "fireworks": "https://api.fireworks.ai/inference/v1",
    "ark": "https://ark.cn-beijing.volces.com/api/v3",
    "gemini": "",
    "zhipuai": "",
    "qianfan": "",
    "dashscope": "",
    "bedrock": "",
}
# An example for those that have none of their own, or several.
EXAMPLE_URLS: Mapping[str, str] = {
    "azure": "https://<resource>.openai.azure.com",
    "ollama": "http://127.0.0.1:11434/api",
    "ollama.generate": "http://127.0.0.1:11434/api",
    "open_llm": "http://127.0.0.1:8000/v1",
    "moonshot": "https://api.moonshot.ai/v1",
    "yi": "https://api.lingyiwanwu.com/v1",
    "spark": "wss://spark-api.xf-yun.com/v4.0/chat",
    "metagpt": "https://<its address>/v1",
}
# What is added to a base URL, and so must not be in it.
URL_PATHS = re.compile("/(chat/completions|completions|responses|messages|api/(chat|generate))/?$")
NUMBERS = ("max_token", "timeout", "temperature", "top_p")


def vendor_of(config: Any) -> str:
    return str(getattr(config.api_type, "value", config.api_type))


def setting_name(config: Any, field: str) -> str:
    """Where a person sets `field` of a model: in config2.yaml, and for some in the environment."""
    vendor = vendor_of(config)
    if vendor in ("openai", "anthropic"):
        return f"{vendor.upper()}_{field.upper()} or llm.{field}"
    return f"llm.{field}"


def _vendor_modules(api_type: str) -> tuple[str, str, str]:
    return VENDORS.get(api_type.partition(".")[0], OPENAI)  # "ollama.generate" is one of ollama's


def _installed(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except (ModuleNotFoundError, ValueError):  # its parent is missing; it is deferred, and missing
        return False


def _api_types(config: Mapping[str, Any]) -> set[str]:
    """Those of `llm` and of `models`, which single roles and actions may be given."""
    models = config.get("models")
    each = [config["llm"], *(models.values() if isinstance(models, Mapping) else [])]
    return {str(model.get("api_type", "openai")) for model in each if isinstance(model, Mapping)}


def _read_config(path: Path) -> dict[str, Any]:
    """What a config2.yaml holds; nothing where there is none."""
    if not path.exists():
        return {}
    yaml = importlib.import_module("yaml")
    try:
        loaded = yaml.safe_load(path.read_text(encoding="utf-8")) or {}
    except yaml.MarkedYAMLError as error:  # its own text quotes the line, which may hold a key
        line = error.problem_mark.line + 1
        raise SettingsError(f"{path} cannot be read: line {line}: {error.problem}") from None
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise SettingsError(f"{path} cannot be read: {error}") from error
    if not isinstance(loaded, dict) or not isinstance(loaded.get("llm", {}), dict):
        raise SettingsError(f"{path} must hold a mapping, and `llm` in it another one")
    return loaded


def _check_key(model: dict[str, Any], name: str) -> None:
    """A key goes into a header of HTTP, which carries no line break and little beside ASCII."""
    key = model.get("api_key")
    if not key:
        model.pop("api_key", None)  # MetaGPT has a key for servers that need none
        return
    if not isinstance(key, str):
        raise SettingsError(f"{name} must be text, in quotes")
    wrong = re.search("[^!-~]", key)
    if wrong:
        what = {"\n": "a line break", "\r": "a line break", " ": "a blank"}.get(
            wrong[0], repr(wrong[0])
        )
        raise SettingsError(f"{name} holds {what}, which no key has: copy it again")


def _check_url_form(url: Any, name: str) -> None:
    """Raises SettingsError for a base URL that no request can be sent to."""
    try:
        parts = urlsplit(url)
        scheme = parts.scheme in ("http", "https", "ws", "wss")
        if not scheme or not parts.hostname or parts.port == 0 or re.search("[^!-~]", url):
            raise ValueError
    except (ValueError, TypeError, AttributeError):
        raise SettingsError(
            f"{name} must have the form https://api.openai.com/v1, not {url!r}"
        ) from None
    added = URL_PATHS.search(parts.path)
    if added:
        raise SettingsError(f"{name} must end before {added[0]}, which is added to it")


def _check_model(model: dict[str, Any], name: Callable[[str], str]) -> None:
    """Completes a model's base URL. Raises SettingsError for what cannot work."""
    vendor = str(model.get("api_type", "openai"))
    if vendor not in VENDOR_URLS and vendor not in EXAMPLE_URLS:
        known = ", ".join((*VENDOR_URLS, *EXAMPLE_URLS))
        raise SettingsError(f"{name('api_type')} must be one of {known}, not {vendor!r}")
    if not model.get("model"):
        raise SettingsError(f"{name('model')} is missing: the name of a model of {vendor}")
    if not isinstance(model["model"], str) or not model["model"].strip():
        raise SettingsError(f"{name('model')} must be the name of a model of {vendor}")
    if model.get("base_url"):
        _check_url_form(model["base_url"], name("base_url"))
    elif vendor in EXAMPLE_URLS:
        raise SettingsError(f"{name('base_url')} is missing, for example {EXAMPLE_URLS[vendor]}")
    else:
        model["base_url"] = VENDOR_URLS[vendor]
        if VENDOR_URLS[vendor] and not model.get("api_key"):
            raise SettingsError(f"{name('api_key')} is missing")
    if vendor == "azure" and not model.get("api_version"):
        raise SettingsError(f"{name('api_version')} is missing, for example 2024-10-21")
    _check_key(model, name("api_key"))
    for key in NUMBERS:
        try:
            float(model.get(key, 0))
        except (TypeError, ValueError):
            raise SettingsError(f"{name(key)} must be a number, not {model[key]!r}") from None


def _check_proxies(model: Mapping[str, Any], environ: Mapping[str, str]) -> None:
    """Raises SettingsError for a proxy that the model's client cannot use, whoever set it."""
    proxies = {"llm.proxy": model.get("proxy")}
    for name in ("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY"):
        for variable in (name, name.lower()):
            url = environ.get(variable)
            proxies[variable] = url if not url or "://" in url else f"http://{url}"
    # Ollama's models are asked without a proxy, as MetaGPT does.
    if str(model.get("api_type")).startswith("ollama"):
        proxies = {}
        if model.get("proxy"):
            raise SettingsError("llm.proxy has no effect with ollama: remove it")
    for name, url in proxies.items():
        scheme, _, rest = str(url or "http://none").partition("://")
        if scheme not in ("http", "https", "socks5", "socks5h") or not rest:
            raise SettingsError(f"{name} must have the form http://host:8080 or socks5://host:1080")


def model_config(environ: Mapping[str, str]) -> dict[str, Any]:
    """MetaGPT's configuration: its config2.yaml files, merged as it does, or the keys of `environ`.

    The files are $METAGPT_PROJECT_ROOT/config/config2.yaml and ~/.metagpt/config2.yaml; the second
    wins. Raises SettingsError, which names the setting, for a model that cannot work.
    """
    config: dict[str, Any] = {}
    source = None
    root = Path(environ.get("METAGPT_PROJECT_ROOT") or ".").absolute()
    home = Path(os.path.expanduser("~"))  # which stays `~` where neither HOME nor passwd says it
    for path in (root / "config" / "config2.yaml", home / ".metagpt" / "config2.yaml"):
        loaded = _read_config(path)
        config.update(loaded)
        source = path if "llm" in loaded else source
    if config.get("llm", {}).get("api_key") == "YOUR_API_KEY":  # MetaGPT's example, as it wrote it
        del config["llm"]
    names: dict[str, str] = {}
    for vendor, default in (("openai", {"model": "gpt-4o"}), ("anthropic", {})):
        prefix = vendor.upper()
        if "llm" not in config and environ.get(f"{prefix}_API_KEY"):
            names = {key: f"{prefix}_{key.upper()}" for key in ("api_key", "base_url", "model")}
            given = {key: environ[name] for key, name in names.items() if environ.get(name)}
            config["llm"] = {"api_type": vendor, **default, **given}
    if "llm" not in config:
        raise SettingsError(NO_MODEL)
    _check_model(config["llm"], lambda key: names.get(key, f"llm.{key} in {source}"))
    _check_proxies(config["llm"], environ)
    for api_type in _api_types(config):
        _, module, package = _vendor_modules(api_type)
        if not _installed(module):
            raise SettingsError(f"llm.api_type {api_type} needs a package: pip install '{package}'")
    return config


def check_git(environ: Mapping[str, str]) -> None:
    """Raises SettingsError where there is no git, in which MetaGPT keeps every project."""
    program = environ.get("GIT_PYTHON_GIT_EXECUTABLE") or "git"
    if shutil.which(program, path=environ.get("PATH")) is None:
        how = "apt-get install git, or brew install git"
        raise SettingsError(
            f"{program} is not on PATH, and MetaGPT needs it. Install it ({how}), or see a "
            "scripted team with --test-mode"
        )


# Secrets

SECRET_NAME = re.compile(r"key|token|secret|passw(or)?d|pwd|credential", re.IGNORECASE)
URL_PASSWORD = re.compile(r"://[^\s/?#:]*:([^\s/?#]+)@")
# Of such words are the keys made that stand where a server asks for none, and passwords that all
# know. To redact them would hide words of the prompt.
PLACEHOLDER_WORDS = frozenset(
    {
        *("api", "key", "your", "my", "sk", "no", "none", "not", "needed", "required", "unused"),
        *("empty", "dummy", "fake", "test", "local", "localhost", "placeholder", "anything"),
        *("lm", "studio", "lmstudio", "ollama", "llama", "cpp", "vllm"),
        *("password", "changeme", "example", "postgres"),
    }
)


def _is_secret(text: str) -> bool:
    """Whether `text` is long enough, and more than PLACEHOLDER_WORDS."""
    return len(text) >= 8 and not PLACEHOLDER_WORDS.issuperset(re.split(r"[-_. ]", text.casefold()))


def known_secrets(environ: Mapping[str, str]) -> list[str]:
    """What no event or log may hold, as it is and as JSON escapes it.

    That is what environment and configuration call a key, and the passwords in their URLs.
    """
    found: set[str] = set()

    def search(name: str, value: Any) -> None:
        if isinstance(value, Mapping):
            for key, item in value.items():
                search(str(key), item)
        elif isinstance(value, list):
            for item in value:
                search(name, item)
        else:
            text = str(value)
            passwords = URL_PASSWORD.findall(text)
            found.update(f":{password}@" for password in passwords)  # however short
            named = SECRET_NAME.search(name) and name not in ("PWD", "OLDPWD")
            texts = [*passwords, *map(unquote, passwords), *([text] if named else [])]
            found.update(filter(_is_secret, texts))

    search("", environ)
    with contextlib.suppress(SettingsError):
        search("", model_config(environ))
    return sorted(found | {encode(text)[1:-1] for text in found}, key=len, reverse=True)


# What another program needs of the environment, secrets being anything else.
PROGRAM_VARIABLES = frozenset(
    {
        *("PATH", "HOME", "USER", "LOGNAME", "SHELL", "LANG", "LANGUAGE", "TZ"),
        *("TMPDIR", "TEMP", "TMP", "LD_LIBRARY_PATH", "DYLD_LIBRARY_PATH", "VIRTUAL_ENV"),
        *("PYTHONPATH", "PYTHONHOME", "PYTHONUTF8", "PYTHONIOENCODING"),
    }
)


def program_environ(environ: Mapping[str, str]) -> dict[str, str]:
    return {
        name: value
        for name, value in environ.items()
        if name in PROGRAM_VARIABLES or name.startswith("LC_")
    }


# -----------------------------------------------------------------------------
# MetaGPT: loading
# -----------------------------------------------------------------------------

ENGINE_NAMES: Mapping[str, str] = {
    "Action": "metagpt.actions",
    "ActionNode": "metagpt.actions.action_node",
    "RunCode": "metagpt.actions.run_code",
    "config": "metagpt.config2",
    "Context": "metagpt.context",
    "Environment": "metagpt.environment",
    "HumanProvider": "metagpt.provider",
    "HumanInteraction": "metagpt.utils.human_interaction",
    "set_llm_stream_logfunc": "metagpt.logs",
    "LLM_REGISTRY": "metagpt.provider.llm_provider_registry",
    "openai_api": "metagpt.provider",
    "BaseLLM": "metagpt.provider.base_llm",
    "Team": "metagpt.team",
    "roles": "metagpt",
    "CostManager": "metagpt.utils.cost_manager",
    "FileRepository": "metagpt.utils.file_repository",
    "GitRepository": "metagpt.utils.git_repository",
    "Timeout": "openai",
    "TransportError": "httpx2",  # of what the SDKs of OpenAI and Anthropic are built on
}
# These packages only pass on what their modules hold, of which the software company needs a part.
LAZY_PACKAGES = ("metagpt.actions", "metagpt.environment", "metagpt.provider", "metagpt.tools.libs")
# MetaGPT imports these where it may use them, and the software company never does.
DEFERRED_MODULES = ("anthropic", "docx", "pandas")


class _LazyPackage(importlib.machinery.SourceFileLoader):
    """Finds and loads one of LAZY_PACKAGES: what it passes on is imported when it is asked for."""

    @classmethod
    def find_spec(cls, name: str, path: Any = None, target: Any = None) -> Any:
        if name not in LAZY_PACKAGES:
            return None
        spec = importlib.machinery.PathFinder.find_spec(name, path, target)
        if spec is not None and spec.origin is not None:
            spec.loader = cls(name, spec.origin)
        return spec

    def exec_module(self, module: types.ModuleType) -> None:
        body = ast.parse(self.get_data(self.path)).body
        homes = {
            alias.name: node.module
            for node in body
            if isinstance(node, ast.ImportFrom) and node.module not in (None, self.name)
            for alias in node.names
        }
        own = {"__all__", *(node.name for node in body if isinstance(node, ast.ClassDef))}

        def load(name: str) -> Any:
            if name in homes:
                return getattr(importlib.import_module(homes[name]), name)
            if name in own:
                super(_LazyPackage, self).exec_module(module)
                return vars(module)[name]
            raise AttributeError(f"module {self.name!r} has no attribute {name!r}")

        vars(module)["__getattr__"] = load


_deferred_lock = threading.Lock()


class _DeferredModule(types.ModuleType):
    """Stands for a module that is imported when something in it is first used."""

    def __getattr__(self, name: str) -> Any:
        with _deferred_lock:  # two threads may ask for it at once
            if sys.modules.get(self.__name__) is self:
                del sys.modules[self.__name__]
        return getattr(importlib.import_module(self.__name__), name)


@contextlib.contextmanager
def _light_imports() -> Iterator[None]:
    """Leaves out of MetaGPT's import what is not used, three quarters of its time."""
    deferred = [_DeferredModule(name) for name in DEFERRED_MODULES if name not in sys.modules]
    for module in deferred:
        module.__spec__ = importlib.util.find_spec(module.__name__)
        sys.modules[module.__name__] = module
    sys.meta_path.insert(0, _LazyPackage)
    try:
        yield
    finally:
        sys.meta_path.remove(_LazyPackage)
        for module in deferred:
            if sys.modules.get(module.__name__) is module:
                del sys.modules[module.__name__]


def _subclasses(kind: Any) -> Iterator[Any]:
    for subclass in kind.__subclasses__():
        yield subclass
        yield from _subclasses(subclass)


@contextlib.contextmanager
def _unfinished_models() -> Iterator[None]:
    """Lets two models of MetaGPT name each other before both exist, which pydantic 2.10 refuses."""
    model = importlib.import_module("pydantic").BaseModel
    rebuild = model.__dict__["model_rebuild"]
    model.model_rebuild = classmethod(partial(rebuild.__func__, raise_errors=False))
    try:
        yield
    finally:
        model.model_rebuild = rebuild
    for kind in _subclasses(model):  # now that all names are known, and not in some run's thread
        if kind.__module__.startswith("metagpt.") and not kind.__pydantic_complete__:
            kind.model_rebuild()


class _Providers(dict[Any, Any]):
    """MetaGPT's model classes by api_type; the module that registers one is imported for it."""

    def __missing__(self, api_type: Any) -> Any:
        importlib.import_module(f"metagpt.provider.{_vendor_modules(api_type.value)[0]}")
        return dict(self)[api_type]


@contextlib.contextmanager
def _given_config(config: Mapping[str, Any]) -> Iterator[None]:
    """MetaGPT reads its configuration when it is imported: from here, instead of from its files."""
    model = importlib.import_module("metagpt.utils.yaml_model").YamlModel
    read_yaml = model.read_yaml
    model.read_yaml = classmethod(lambda cls, path, encoding="utf-8": dict(config))
    try:
        yield
    finally:
        model.read_yaml = read_yaml


def _import_metagpt(folder: Path, config: Mapping[str, Any]) -> types.SimpleNamespace:
    if os.path.expanduser("~") == "~":
        os.environ["HOME"] = str(folder)  # MetaGPT asks for one when it is imported
    loguru = importlib.import_module("loguru").logger
    root = os.environ.get("METAGPT_PROJECT_ROOT")
    os.environ["METAGPT_PROJECT_ROOT"] = str(folder)
    try:
        loguru.remove()
        with _light_imports(), _unfinished_models():
            importlib.import_module("metagpt.logs")  # which adds handlers: stderr, and a file
            loguru.remove()
            with _given_config(config):
                importlib.import_module("metagpt.provider.openai_api")
                found = {
                    name: getattr(importlib.import_module(path), name)
                    for name, path in ENGINE_NAMES.items()
                }
    finally:
        os.environ.pop("METAGPT_PROJECT_ROOT")
        if root is not None:
            os.environ["METAGPT_PROJECT_ROOT"] = root
    registry = found["LLM_REGISTRY"]
    registry.providers = _Providers(registry.providers)
    registry.get_provider(found["config"].llm.api_type)
    return types.SimpleNamespace(**found, loguru=loguru)


def refused_field(error: ValueError) -> str:
    """pydantic's error about a configuration fills a page; the field and what is wrong with it."""
    details = error.errors()[0] if hasattr(error, "errors") else None
    if details is None:
        return error_text(error)
    where = ".".join(map(str, details["loc"]))
    return f"{where} in config2.yaml is not what MetaGPT takes: {details['msg']}"


def model_price(
    engine: types.SimpleNamespace, config: Any, price: tuple[float, ...]
) -> Mapping[str, float] | None:
    """US dollars for a thousand tokens of a model, by MetaGPT or else by the setting `price`."""
    if config.api_type.value in ("ollama", "open_llm"):  # a server of one's own, MetaGPT says: free
        return {"prompt": 0.0, "completion": 0.0}
    known: Mapping[str, Mapping[str, float]] = engine.CostManager().token_costs
    plan = config.pricing_plan or config.model
    if plan not in known and price:
        return {"prompt": price[0] / 1000, "completion": price[1] / 1000}
    return known.get(plan)


# -----------------------------------------------------------------------------
# Model requests
# -----------------------------------------------------------------------------

# Model faults


class _GiveUp(BaseException):
    """Ends a run from inside MetaGPT, which tries six times, for minutes, after any Exception."""


class _RoleFailed(_GiveUp):
    """A role could not go on; its ERROR was emitted."""


def server_words(body: object, levels: int = 6) -> str:
    """What an error's body says: OpenAI's form, Gemini's list, FastAPI's `detail`, text, a page."""
    if isinstance(body, str):
        title = re.search(r"<title>([^<]{1,300})", body[:20_000], re.IGNORECASE)
        return title[1] if title else re.sub(r"<[^<>]{1,300}>", " ", body[:20_000])
    if isinstance(body, list) and levels:
        return "; ".join(server_words(item, levels - 1) for item in body[:3])
    if body and isinstance(body, Mapping) and levels:
        name = next(
            (name for name in ("error", "message", "detail", "msg") if body.get(name)), None
        )
        if name is None:
            return encode(jsonable(body))
        place = ".".join(map(str, body.get("loc") or ()))  # FastAPI: the field that is wrong
        words = server_words(body[name], levels - 1)
        metadata = body.get("metadata")  # OpenRouter: its provider's words, as they were
        raw = metadata.get("raw") if isinstance(metadata, Mapping) else None
        return ": ".join(filter(None, (place, words, raw and str(raw))))
    return str(jsonable(body, 300)) if body else ""


class ServerError(Exception):
    """An error object where a completion was expected: inside a stream, or with a status of 200."""

    def __init__(
        self, body: object, status_code: int | None = None, headers: Mapping[str, str] | None = None
    ) -> None:
        super().__init__(server_words(body))
        self.body = body
        self.status_code = status_code
        self.headers = headers or {}


class NotACompletion(Exception):
    """An answer with status 200 that is no completion, as a web page; its text is what came."""


class PartialAnswer(Exception):
    """An answer that is not whole: `retry` where asking again may help, `cut` at a limit."""

    def __init__(self, reason: str, *, retry: bool = False, cut: bool = False) -> None:
        super().__init__(reason)
        self.retry = retry
        self.cut = cut


class ModelFault(NamedTuple):
    """Why a model request failed, for a person, and what can be done."""

    reason: str
    retry: bool
    wait: float | None  # seconds the server asked for, where it did


LONGEST_WAIT = (
    120.0  # seconds a run waits because a server asks; one that asks for more means hours
)
# What an error object without a status says of itself. Any other may pass, as a 500 does.
STATUS_BY_NAME: Mapping[str, int] = {
    "invalid_request_error": 400,
    "context_length_exceeded": 400,
    "authentication_error": 401,
    "invalid_api_key": 401,
    "billing_error": 402,
    "insufficient_quota": 402,
    "permission_error": 403,
    "not_found_error": 404,
    "model_not_found": 404,
    "rate_limit_error": 429,
    "rate_limit_exceeded": 429,
    "overloaded_error": 529,
}
TOO_LONG = re.compile("context.?(length|window|size)|prompt is too long", re.IGNORECASE)
NO_CREDIT = re.compile(
    "current quota|credit balance|insufficient (balance|credit|quota)", re.IGNORECASE
)
BAD_KEY = re.compile(
    "api.?key (is )?(not valid|invalid)|(invalid|incorrect) (x-)?api.?key", re.IGNORECASE
)
# Names of error classes of openai, anthropic, httpx and aiohttp, so that none is loaded for this.
TIMEOUT_ERRORS = {"APITimeoutError", "TimeoutException", "TimeoutError"}
BROKEN_OFF_ERRORS = {
    "RemoteProtocolError",
    "ReadError",
    "ClientPayloadError",
    "ServerDisconnectedError",
}
DECODE_ERRORS = {"JSONDecodeError", "UnicodeDecodeError"}
CONNECTION_ERRORS = {
    "APIConnectionError",
    "TransportError",
    "ClientConnectionError",
    "ConnectionError",
}


def _class_names(error: BaseException) -> set[str]:
    return {kind.__name__ for kind in type(error).__mro__}


def _one_line(body: object, secrets: Sequence[str]) -> str:
    """What the server said, on one line, without secrets, at most 300 characters."""
    text = " ".join(redact(server_words(body), secrets).split())
    return text if len(text) <= 300 else f"{text[:299]}…"


def _server(config: Any) -> str:
    """The server by its address, without a password in it."""
    parts = urlsplit(config.base_url or "")
    address = (
        f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}{parts.path}"
        if parts.netloc
        else vendor_of(config)
    )
    return f"the model API at {address}"


def _check_url(config: Any) -> str:
    """Where to look when a server has no API at its base URL."""
    name = setting_name(config, "base_url")
    vendor = vendor_of(config)
    example = EXAMPLE_URLS.get(vendor) or VENDOR_URLS.get(vendor)
    if re.search(r"/v\d\w*(/openai)?/?$", str(config.base_url)) or not example:
        return f"check {name}"
    advice = "does it end in /v1?" if example.endswith("/v1") else f"as {example}"
    return f"check {name} ({advice})"


def _error_object(body: object) -> Mapping[str, Any]:
    """OpenAI's SDK takes `error` out of the body, Anthropic's does not, and Gemini sends a list."""
    for _ in range(3):
        if isinstance(body, list):
            body = body[0] if body else {}
        if isinstance(body, Mapping) and isinstance(body.get("error"), Mapping | list):
            body = body["error"]
    return body if isinstance(body, Mapping) else {}


def _deduced_status(found: Mapping[str, Any], words: str) -> int:
    """The status of an error object that came without one; 500 where it does not say."""
    for name in ("code", "status", "type"):
        value = str(found.get(name) or "")
        if re.fullmatch(r"[45]\d\d", value):
            return int(value)
        if value in STATUS_BY_NAME:
            return STATUS_BY_NAME[value]
    return 404 if "endpoint or method" in words else 500  # LM Studio's answer to an unknown path


def _asked_wait(error: BaseException, body: object) -> float | None:
    """Seconds to wait: retry-after-ms, retry-after (seconds or a date), or Gemini's retryDelay."""
    headers = getattr(getattr(error, "response", error), "headers", None) or {}
    millis = str(headers.get("retry-after-ms") or "")
    text = str(headers.get("retry-after") or "")
    if re.fullmatch(r"\d{1,9}(\.\d+)?", millis):
        return float(millis) / 1000
    if re.fullmatch(r"\d{1,9}(\.\d+)?", text):
        return float(text)
    if text:
        with contextlib.suppress(ValueError):
            return max(0.0, parsedate_to_datetime(text).timestamp() - time.time())
    delay = re.search(
        r"'retryDelay': '(\d{1,9}(?:\.\d+)?)s'", str(_error_object(body).get("details"))
    )
    return float(delay[1]) if delay else None


def _refusal(
    body: object, status: object, wait: float | None, config: Any, secrets: Sequence[str]
) -> ModelFault:
    """What an error object means, and the setting to change."""
    found = _error_object(body)
    code = str(found.get("code") or found.get("type") or "")
    words = _one_line(body, secrets)
    server = _server(config)
    status_text = f" ({status})"
    if not isinstance(status, int) or status < 400:
        status_text = ""
        status = _deduced_status(found, words)
    key = setting_name(config, "api_key")
    model = setting_name(config, "model")

    def final(problem: str, advice: str) -> ModelFault:
        return ModelFault(f"{server} {problem}{status_text}: {advice}. {words}", False, None)

    if TOO_LONG.search(f"{code} {words}"):
        smaller = f", or a smaller llm.max_token (now {config.max_token})"
        more = smaller if "completion" in words else ""
        advice = f"take a model with a larger context ({model}){more}"
        return final("finds the prompt too long", advice)
    no_credit = wait is None and NO_CREDIT.search(words)
    if status == 402 or code == "insufficient_quota" or no_credit:
        return final("says that no credit is left", f"add some, or change {key}")
    if status == 401 or BAD_KEY.search(words):
        return final("rejected the key", f"check {key}")
    if status == 403:
        return final("refused access", f"check that {key} may use {config.model!r} ({model})")
    about = f"model|deployment|{re.escape(config.model)}"
    if status == 404 and re.search(about, f"{code} {words}", re.IGNORECASE):
        return final(f"has no model {config.model!r}", f"check {model}")
    if status in (404, 405):
        return final("has nothing at this address", _check_url(config))
    if wait and wait > LONGEST_WAIT:
        advice = f"a run waits {LONGEST_WAIT:.0f} s at most"
        return final(f"wants no request for {wait:.0f} s", advice)
    retry = status in (408, 409, 425, 429) or status >= 500
    reason = f"{server} answered {status}: {words or 'without a word'}"
    return ModelFault(reason, retry, wait if retry else None)


def _broken(error: BaseException, config: Any, secrets: Sequence[str]) -> str:
    """The reason where no whole answer came: the first cause, without Python's names."""
    names = _class_names(error)
    cause = error
    for _ in range(10):
        inner = cause.__cause__ or cause.__context__
        if inner is None or isinstance(inner, asyncio.CancelledError):
            break
        cause = inner
        names |= _class_names(cause)
    text = error_text(cause)
    if isinstance(cause, ConnectionError) and cause.errno:
        text = os.strerror(cause.errno)
    text = _one_line(re.sub(r"bytearray\(b'(.*?)'\)|^\[Errno -?\d+\] ", r"\1", text), secrets)
    server = _server(config)
    proxy = ", and llm.proxy or HTTPS_PROXY" if config.proxy or getproxies() else ""
    if names & DECODE_ERRORS:
        return f"{server} sent what is no valid answer: {text}"
    if names & TIMEOUT_ERRORS and "ConnectTimeout" not in names:
        return f"{server} did not answer in time{f': {text}' if text else ''}"
    if names & BROKEN_OFF_ERRORS:
        return f"{server} broke off the connection: {text}"
    text = text or "it does not answer (http or https?)"
    return f"{server} cannot be reached: {text}. Check {setting_name(config, 'base_url')}{proxy}"


def model_fault(error: BaseException, config: Any, secrets: Sequence[str]) -> ModelFault | None:
    """What a failed model request means; None where it is not the request that failed."""
    names = _class_names(error)
    body = getattr(error, "body", None)
    status = getattr(error, "status_code", getattr(error, "status", None))
    if names & {"NotACompletion", "APIResponseValidationError"}:
        words = _one_line(body or error_text(error), secrets)
        return ModelFault(
            f"{_server(config)} sent no completion: {_check_url(config)}. {words}", False, None
        )
    if isinstance(status, int) and 300 <= status < 400:
        advice = f"set {setting_name(config, 'base_url')} to where it points"
        reason = f"{_server(config)} redirects ({status}): {advice}. {_one_line(body, secrets)}"
        return ModelFault(reason, False, None)
    if isinstance(status, int) or isinstance(error, ServerError) or ("APIError" in names and body):
        told = body if hasattr(error, "body") else error_text(error)
        return _refusal(told, status, _asked_wait(error, body), config, secrets)
    if names & (TIMEOUT_ERRORS | BROKEN_OFF_ERRORS | DECODE_ERRORS | CONNECTION_ERRORS):
        return ModelFault(_broken(error, config, secrets), True, None)
    return None


# Answers


class Chunk(NamedTuple):
    """A piece of an answer, as any vendor's server sends it."""

    text: str = ""
    reasoning: str = ""  # of the model's thinking, no part of the answer
    finish_reason: str = ""
    usage: Mapping[str, int] = {}


def _parsed(text: str) -> Any:
    """The JSON document that `text` is, or else the text."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return text


def _broken_off(piece: str) -> PartialAnswer:
    return PartialAnswer(f"the model's answer broke off, in {quoted(piece[-60:])}", retry=True)


def _endless() -> PartialAnswer:
    advice = "check llm.model, which may repeat itself, and its server"
    return PartialAnswer(f"the model's answer does not end: {advice}")


def _checked(document: Any, event: str) -> Any:
    """`document`, unless it is an error."""
    if event == "error":
        raise ServerError(document)
    if not isinstance(document, Mapping):
        raise NotACompletion(encode(jsonable(document)))
    if document.get("error") or "error" in (document.get("object"), document.get("type")):
        raise ServerError(document)
    return document


class _BodyReader:
    """Takes the body of an answer apart into JSON documents; `[DONE]` is None.

    They come as server-sent events, as lines, or as one document where a server does not stream.
    Raises ServerError for an error among them, PartialAnswer for half a document, and
    NotACompletion for anything else.
    """

    def __init__(self) -> None:
        self._line = bytearray()  # one that has not ended
        self._event = ""
        self._data: list[str] = []
        self._plain = ""  # lines that are no server-sent event
        self._done = False

    def feed(self, piece: bytes) -> Iterator[Any]:
        head, newline, tail = piece.rpartition(b"\n")
        if newline:
            lines = (self._line + head).split(b"\n")
            self._line.clear()
            for line in lines:
                yield from self._take(line.decode(errors="replace").strip("\r\ufeff"))
        self._line += tail

    def end(self) -> Iterator[Any]:
        yield from self.feed(b"\n\n")
        if self._plain.startswith(("{", "[")):
            raise _broken_off(self._plain)
        if self._plain:
            raise NotACompletion(self._plain)

    def _take(self, line: str) -> Iterator[Any]:
        name, _, value = line.partition(":")
        value = value.removeprefix(" ")
        if self._done or name in ("id", "retry") or (not name and line):  # a comment has no name
            return
        if name == "event":
            self._event = value
        elif name == "data":
            self._data.append(value)
        elif name == "error":  # as llama.cpp wrote before 2025
            raise ServerError(_parsed(value))
        elif line:
            self._plain += f"{line}\n"
            if line.endswith(("}", "]")) and _parsed(self._plain) != self._plain:
                yield _checked(_parsed(self._plain), "")
                self._plain = ""
        elif self._data:
            data = "\n".join(self._data)
            event = self._event
            self._data.clear()
            self._event = ""
            self._done = data.startswith("[DONE]")
            document = None if self._done else _parsed(data)
            if document == data:
                raise _broken_off(data)
            if event != "ping":  # the server is alive, but its model says nothing
                yield document if document is None else _checked(document, event)


MOST_BYTES = 1 << 26  # of an answer's body; an answer of 100,000 tokens has half of it
COMPRESSION = 100  # a packed body may be this much shorter, and unpack to ten times MOST_BYTES


@functools.cache
def _tls() -> Any:
    """Loading the certificates is most of what it takes to make a client; once is enough."""
    return importlib.import_module("httpx2").create_ssl_context()


def _http_client(**options: Any) -> Any:
    """An HTTP client for model servers.

    It follows no redirect, as a prompt is for the server that was configured, and reads no more
    than MOST_BYTES of an answer.
    """
    httpx = importlib.import_module("httpx2")  # what the SDKs of OpenAI and Anthropic are built on

    class Bounded(httpx.AsyncByteStream):  # type: ignore[misc, name-defined]
        def __init__(self, stream: Any, most: int) -> None:
            self._stream = stream
            self._left = most

        async def __aiter__(self) -> AsyncIterator[bytes]:
            async for piece in self._stream:
                self._left -= len(piece)
                if self._left < 0:
                    raise _endless()
                yield piece

        async def aclose(self) -> None:
            await self._stream.aclose()

    async def bound(response: Any) -> None:
        packed = "content-encoding" in response.headers
        response.stream = Bounded(
            response.stream, MOST_BYTES // COMPRESSION if packed else MOST_BYTES
        )

    headers = {"Accept-Encoding": "identity"}
    hooks = {"response": [bound]}
    return httpx.AsyncClient(verify=_tls(), headers=headers, event_hooks=hooks, **options)


async def _documents(response: Any) -> AsyncGenerator[Any, None]:
    """The JSON documents of a body as they come; the response is closed behind them."""
    reader = _BodyReader()
    left = MOST_BYTES  # of what was unpacked
    try:
        async for piece in response.aiter_bytes():
            left -= len(piece)
            if left < 0:
                raise _endless()
            for document in reader.feed(piece):
                yield document
        for document in reader.end():
            yield document
    finally:
        await response.aclose()


MOST_TOKENS = 100_000_000  # of a request; a server that counts more is wrong


def _counts(usage: Any, prompt: str, completion: str) -> dict[str, int]:
    """What a server counts; what can be no count is left out, and then estimated."""
    counts = {}
    for name, key in {"prompt_tokens": prompt, "completion_tokens": completion}.items():
        count = usage.get(key) if isinstance(usage, Mapping) else None
        if isinstance(count, int | float) and 0 < count < MOST_TOKENS:
            counts[name] = int(count)
    return counts


def _content(content: Any) -> tuple[str, str]:
    """The text and the thinking in a message's content, which is a text or a list of blocks."""
    if not isinstance(content, list):
        return content or "", ""
    text = "".join(block.get("text") or "" for block in content)
    return text, "".join(text for block in content for text in _content(block.get("thinking")))


def estimate_tokens(text: str) -> int:
    return -(-len(text) // 4)


# Vendors


class _ModelAPI(NamedTuple):
    """How models of one vendor are asked."""

    arguments: Callable[[Any, Any, bool], dict[str, Any]]  # of (model, messages, stream)
    send: Callable[[Any, dict[str, Any], Any], AsyncGenerator[Any, None]]  # and with timeouts
    chunk: Callable[[Any], Chunk]  # of what `send` yields
    own_method: bool = False  # MetaGPT's, which books what it cost


async def _send(
    create: Callable[..., Awaitable[Any]], arguments: Mapping[str, Any]
) -> AsyncGenerator[Any, None]:
    """Sends by the method of an SDK; a stream is read past it, as it hides how one ends."""
    answer = await create(**arguments)
    if arguments.get("stream"):
        async with contextlib.aclosing(_documents(answer.response)) as documents:
            async for document in documents:
                yield document
    elif hasattr(answer, "to_dict"):
        yield _checked(answer.to_dict(warnings=False), "")
    else:
        raise NotACompletion(answer if isinstance(answer, str) else encode(jsonable(answer)))


def _openai_arguments(model: Any, messages: Any, stream: bool) -> dict[str, Any]:
    more = {"stream": True, "stream_options": {"include_usage": True}} if stream else {}
    return {**model._cons_kwargs(messages), **more}


def _openai_send(model: Any, arguments: dict[str, Any], timeouts: Any) -> AsyncGenerator[Any, None]:
    client = model.aclient
    client.max_retries = 0  # it would try again in silence
    return _send(client.chat.completions.create, {**arguments, "timeout": timeouts})


def _openai_chunk(document: Any) -> Chunk:
    choices = [choice for choice in document.get("choices") or () if not choice.get("index")]
    choice = choices[0] if choices else {}
    message = choice.get("delta") or choice.get("message") or {}
    text, reasoning = _content(message.get("content"))
    reasoning = message.get("reasoning_content") or message.get("reasoning") or reasoning
    finish_reason = choice.get("finish_reason") or ""
    if message.get("refusal"):
        text += message["refusal"]
        finish_reason = "refusal"
    elif "message" in choice and text:  # not streamed, so it is all there
        finish_reason = finish_reason or "stop"
    groq = document.get("x_groq") or {}
    usage = document.get("usage") or choice.get("usage") or groq.get("usage")  # Moonshot's, Groq's
    counts = _counts(usage, "prompt_tokens", "completion_tokens")
    return Chunk(text, reasoning, finish_reason, counts)


def _anthropic_arguments(model: Any, messages: Any, stream: bool) -> dict[str, Any]:
    return dict(model._const_kwargs(messages, stream))


def _anthropic_send(
    model: Any, arguments: dict[str, Any], timeouts: Any
) -> AsyncGenerator[Any, None]:
    model.aclient.max_retries = 0
    return _send(model.aclient.messages.create, {**arguments, "timeout": timeouts})


def _anthropic_chunk(document: Any) -> Chunk:
    parts = [document.get(name) for name in ("delta", "content_block", "message")]
    message = next(filter(None, parts), document)
    text, reasoning = _content(message.get("content"))
    text += message.get("text") or ""
    reasoning += message.get("thinking") or ""
    usage = document.get("usage") or message.get("usage")
    counts = _counts(usage, "input_tokens", "output_tokens")
    return Chunk(text, reasoning, message.get("stop_reason") or "", counts)


def _ollama_arguments(model: Any, messages: Any, stream: bool) -> dict[str, Any]:
    return dict(model.ollama_message.apply(messages=messages))


async def _ollama_send(
    model: Any, arguments: dict[str, Any], timeouts: Any
) -> AsyncGenerator[Any, None]:
    """Sends without MetaGPT's client for it, which never looks at the status."""
    url = f"{model.config.base_url}{model.ollama_message.api_suffix}"
    body = json.dumps(arguments)
    headers = {"Content-Type": "application/json"}
    client = _http_client(timeout=timeouts, trust_env=False)  # MetaGPT's asks no proxy either
    async with client, client.stream("POST", url, content=body, headers=headers) as response:
        if response.status_code != 200:
            text = (await response.aread()).decode(errors="replace")
            raise ServerError(_parsed(text), response.status_code, response.headers)
        async with contextlib.aclosing(_documents(response)) as documents:
            async for document in documents:
                yield document


def _ollama_chunk(document: Any) -> Chunk:
    message = document.get("message") or document
    text = message.get("content") or message.get("response") or ""
    finish_reason = (document.get("done_reason") or "stop") if document.get("done") else ""
    counts = _counts(document, "prompt_eval_count", "eval_count")
    return Chunk(text, message.get("thinking") or "", finish_reason, counts)


# MetaGPT's class → how its models are asked. Azure's and others inherit from OpenAI's.
MODEL_APIS: Mapping[str, _ModelAPI] = {
    "OpenAILLM": _ModelAPI(_openai_arguments, _openai_send, _openai_chunk),
    "AnthropicLLM": _ModelAPI(_anthropic_arguments, _anthropic_send, _anthropic_chunk),
    "OllamaLLM": _ModelAPI(_ollama_arguments, _ollama_send, _ollama_chunk),
}


def _other_api(own_method: Callable[[], Awaitable[str]], stream: bool) -> _ModelAPI:
    """One whose SDK the user has installed: MetaGPT's own method, whose tokens come by its hook."""

    async def send(*_: Any) -> AsyncGenerator[Any, None]:
        text = await own_method()
        yield Chunk("" if stream else text, finish_reason="stop")

    return _ModelAPI(lambda *_: {}, send, lambda chunk: chunk, own_method=True)


# Requests: what is asked is MetaGPT's own; whether the answer is whole is settled here.


@dataclass
class _Speaker:
    """Who speaks in this coroutine: roles run concurrently, each in a context of its own."""

    team: _Team
    role: str | None = None  # None: the team itself, before and between its roles' turns
    action: str | None = None
    call: _ModelCall | None = None
    answer: str = ""  # its model's last
    acted: Any = None  # the action that it did last


_speaker: ContextVar[_Speaker | None] = ContextVar("_speaker", default=None)


class _ModelCall:
    """One attempt at a model request: what was said up to now. The text of 50 ms is one event."""

    def __init__(self, speaker: _Speaker, on_output: Callable[[], None]) -> None:
        self.speaker = speaker
        self.action = speaker.action
        self.id = uuid.uuid4().hex[:12]
        self.finish_reason = ""
        self.usage: dict[str, int] = {}
        self.characters = 0
        self.on_output = on_output
        kinds = (EventType.TOKEN, EventType.REASONING)
        self._pieces: dict[EventType, list[str]] = {kind: [] for kind in kinds}
        # A server may cut a character into two surrogates: the first waits for the second here.
        decoder = codecs.getincrementaldecoder("utf-16-le")
        self._joined = {kind: decoder("replace") for kind in kinds}
        self._kind = EventType.TOKEN
        self._unsent = ""
        self._timer: asyncio.TimerHandle | None = None

    @property
    def text(self) -> str:
        return "".join(self._pieces[EventType.TOKEN])

    @property
    def reasoning(self) -> str:
        return "".join(self._pieces[EventType.REASONING])

    def take(self, chunk: Chunk) -> None:
        self.finish_reason = self.finish_reason or chunk.finish_reason.lower()
        self.usage.update(chunk.usage)
        self.characters += len(chunk.text) + len(chunk.reasoning)
        self._add(EventType.REASONING, chunk.reasoning)
        self._add(EventType.TOKEN, chunk.text)
        if chunk != Chunk():  # one that says nothing is no sign of life
            self.on_output()

    def _add(self, kind: EventType, text: str, last: bool = False) -> None:
        text = self._joined[kind].decode(text.encode("utf-16-le", "surrogatepass"), last)
        if not text:
            return
        if kind is not self._kind:
            self.flush()
            self._kind = kind
        self._pieces[kind].append(text)
        self._unsent += text
        if self._timer is None:
            self._timer = asyncio.get_running_loop().call_later(0.05, self.flush)

    def flush(self) -> None:
        """Emits what is not emitted yet, in events that are short enough not to be cut."""
        if self._timer:
            self._timer.cancel()
            self._timer = None
        text = self._unsent
        self._unsent = ""
        run = self.speaker.team.run
        payload = {"message": "", "action": self.action, "call_id": self.id}
        room = run.max_event_bytes - len(encode(payload).encode())
        size = max(1, room // 6)  # in JSON a character takes at most six bytes
        for start in range(0, len(text), size):
            payload["message"] = text[start : start + size]
            run.emit(self._kind, payload, self.speaker.role)

    def close(self) -> None:
        for kind in self._pieces:
            self._add(kind, "", last=True)
        self.flush()


class _RequestForm:
    """The arguments of a model request, changed as its server's refusals and cut answers teach.

    MetaGPT sends those of 2024: OpenAI's models that think refuse two of them, and other servers
    the question for the usage. The form that brought an answer is kept for the process.
    """

    LIMITS = ("max_tokens", "max_completion_tokens")
    ADAPTABLE = (*LIMITS, "temperature", "stream_options")
    TOO_MANY = re.compile("too large|at most|maximum|less than|<=|range|exceed", re.IGNORECASE)
    LEAST_FOR_THINKING = 32768  # tokens, where those of the model's thinking count
    LARGER = 4  # times the limit that cut an answer
    CHARACTERS = 64  # for each token of the limit: who sends more does not keep it
    MOST_ENLARGED = 2  # times

    _kept: ClassVar[dict[tuple[str, str], tuple[Mapping[str, str], int | None]]] = {}

    def __init__(self, model: Any) -> None:
        self._config = model.config
        self._key = (str(model.config.base_url), str(model.model))
        # An argument → its other name, or nothing where it is left out.
        self._changes, self._most_tokens = self._kept.get(self._key, ({}, None))
        self._sent: Mapping[str, Any] = {}
        self._limit: int | None = None  # of tokens, in what was sent
        self._larger_limit = 0
        self._enlarged = 0  # times
        self._cut_at = 0  # tokens

    def fit(self, arguments: Mapping[str, Any]) -> dict[str, Any]:
        names = {name: self._changes.get(name, name) for name in arguments}
        fitted = {names[name]: value for name, value in arguments.items() if names[name]}
        self._limit = None
        for name in self.LIMITS:
            if name in fitted:
                least = 0
                if name == "max_completion_tokens" and not self._limit_is_users:
                    least = self.LEAST_FOR_THINKING
                wanted = max(fitted[name], least, self._larger_limit)
                self._limit = fitted[name] = min(wanted, self._most_tokens or wanted)
        self._sent = fitted
        return fitted

    def keep(self) -> None:
        """Has the process's next requests begin in this form."""
        changes, most_tokens = self._kept.get(self._key, ({}, None))
        kept = ({**changes, **self._changes}, self._most_tokens or most_tokens)
        self._kept[self._key] = kept

    def adapt(self, error: Exception) -> str:
        """What is changed, where the server refused an argument that can be; else nothing."""
        if getattr(error, "status_code", None) not in (400, 422):
            return ""
        text = error_text(error)
        param = getattr(error, "param", None)
        name = self._refused(param, text)
        if self.TOO_MANY.search(text) and (name in self.LIMITS or not (name or param)):
            return self._lower(text)
        other = "max_completion_tokens" if name == "max_tokens" else ""
        if not name or (name in self.LIMITS and other not in text):
            return ""
        self._changes = {**self._changes, name: other}
        how = f"{other} is sent instead" if other else "it is left out"
        return f"the model server does not take {name}: {how}"

    def _refused(self, param: Any, text: str) -> str:
        """The argument that a refusal is about: it says which, or names it in its text."""
        sent = [name for name in self.ADAPTABLE if name in self._sent]
        if param:
            sent = [name for name in sent if name == re.split(r"[.\[]", str(param))[0]]
            return "".join(sent)
        return next((name for name in sent if re.search(rf"\b{name}\b", text)), "")

    def _lower(self, text: str) -> str:
        """As many tokens as the server allows, where they were more than MetaGPT asks for."""
        least = self._config.max_token
        if not self._limit or self._limit <= least:
            return ""
        numbers = [int(number) for number in re.findall(r"\d{2,9}", text)]
        most = max((number for number in numbers if least <= number < self._limit), default=least)
        self._limit = self._most_tokens = most
        if most <= self._cut_at:
            raise _GiveUp(self.cut_reason("length"))
        return f"the model server allows an answer of {most} tokens"

    def enlarge(self) -> str:
        """What is changed, where a larger limit may help an answer that was cut; else nothing."""
        if self._limit is None or self._limit_is_users or self._enlarged == self.MOST_ENLARGED:
            return ""
        larger = self._limit * self.LARGER
        larger = min(larger, self._most_tokens or larger)
        if larger <= self._limit:
            return ""
        self._cut_at = self._limit
        self._larger_limit = larger
        self._enlarged += 1
        return f"the model's answer was cut at {self._cut_at} tokens, the next may have {larger}"

    @property
    def most_characters(self) -> int:
        return self.CHARACTERS * (self._limit or 2 * self.LEAST_FOR_THINKING)

    @property
    def _limit_is_users(self) -> bool:
        """Whether the user has set the limit of an answer, so that it is the user's to change."""
        return "max_token" in self._config.model_fields_set

    def cut_reason(self, finish_reason: str) -> str:
        if self._limit is None:
            advice = "the server's own limit, or its context is full (for Ollama: num_ctx)"
            return f"the model's answer was cut ({finish_reason}) at {advice}"
        advice = "a larger one allows longer answers"
        if self._limit == self._most_tokens:
            advice = "the server allows no more; another llm.model may"
        return f"the model's answer was cut at llm.max_token={self._limit}: {advice}"


class _ModelRequest:
    """One question to a model, asked until its answer is whole or nothing helps.

    An answer that is broken off, empty, or silent for `model_timeout` is asked for three times; a
    server that cannot be reached five times, in 15 s; one that answers with an error that may
    pass seven times, in a minute or when it says.
    """

    PARTIAL = 3  # attempts
    UNREACHED = 5
    REFUSED = 7
    MOST_REQUESTS = 20  # with those whose form is changed, which are no attempts
    SILENCE = 1.0  # seconds after which a model is waited for again in the middle of an answer
    LINGER = 2.0  # seconds for what follows a finish reason, as the usage
    CONNECT = 10.0  # seconds

    # What finish reasons mean, of OpenAI, Anthropic, Ollama, Mistral, DeepSeek, vLLM and Zhipu.
    CUT = frozenset({"length", "max_tokens", "model_length", "model_context_window_exceeded"})
    WITHHELD = frozenset({"content_filter", "refusal", "safety", "sensitive"})
    WHOLE = frozenset(
        {
            *("stop", "end_turn", "stop_sequence", "eos", "eos_token", "end", "complete"),
            *("completed", "finished", "done"),
        }
    )

    def __init__(
        self, speaker: _Speaker, api: _ModelAPI, model: Any, messages: Any, stream: bool
    ) -> None:
        self.speaker = speaker
        self.action = speaker.action
        self.team = speaker.team
        self.heard_at = time.time()
        self.silent = True
        self._api = api
        self._model = model
        self._messages = messages
        self._stream = stream
        self._form = _RequestForm(model)
        self._call = _ModelCall(speaker, self.on_output)
        self._watch: asyncio.Timeout | None = None
        self._timer: asyncio.TimerHandle | None = None

    async def answer(self) -> str:
        """The whole answer. Raises _GiveUp with the reason where there is none."""
        failed = 0
        self.team.requests.append(self)
        self.team.show_waiting()
        try:
            for _ in range(self.MOST_REQUESTS):
                try:
                    return await self._attempt()
                except Exception as error:  # every vendor's SDK has errors of its own
                    wait = 0.0
                    if not self._change_form(error):
                        failed += 1
                        wait = self._wait(error, failed)
                await asyncio.sleep(wait)
            server = _server(self._model.config)
            raise _GiveUp(
                f"{server} refused {self.MOST_REQUESTS} requests in a row, whatever was sent"
            )
        finally:
            if self._timer:
                self._timer.cancel()
            self.team.requests.remove(self)
            self.team.show_waiting()

    async def _attempt(self) -> str:
        self.team.run.check_cancelled()
        self.team.costs.check_budget()
        patience = self.team.run.model_timeout
        read = max(self._model.get_timeout(0), patience + self.LINGER)
        timeout = self.team.engine.Timeout(read, connect=self.CONNECT)
        arguments = self._api.arguments(self._model, self._messages, self._stream)
        answer = self._api.send(self._model, self._form.fit(arguments), timeout)
        call = self._call = self.speaker.call = _ModelCall(self.speaker, self.on_output)
        try:
            async with asyncio.timeout(patience) as watch, contextlib.aclosing(answer) as documents:
                self._watch = watch
                async for document in documents:
                    self._take(document)
        except (TimeoutError, self.team.engine.TransportError):
            if watch.expired() and not call.finish_reason:
                silent = f"the model said nothing for {patience:g} s, the setting model_timeout"
                raise PartialAnswer(silent, retry=True) from None
            if not call.finish_reason:  # else only the usage or the body's end is missing
                raise
        finally:
            call.close()
            self.speaker.call = None
            self._book()
        self._check(call)
        self._form.keep()
        text = call.text.removesuffix("\n") if self._api.own_method else call.text
        self.speaker.answer = text
        return text

    def _take(self, document: Any) -> None:
        try:
            done = document is None
            chunk = Chunk(finish_reason="stop") if done else self._api.chunk(document)
            if not all(isinstance(text, str) for text in chunk[:3]):
                raise TypeError
        except (AttributeError, TypeError, ValueError):  # it has the form of no vendor
            raise NotACompletion(encode(jsonable(document))) from None
        self._call.take(chunk)
        if self._call.characters > self._form.most_characters:
            raise _endless()

    def on_output(self) -> None:
        """Called for each chunk: the model is not silent, and has its time again."""
        loop = asyncio.get_running_loop()
        self.heard_at = time.time()
        patience = self.LINGER if self._call.finish_reason else self.team.run.model_timeout
        if self._watch:
            self._watch.reschedule(loop.time() + patience)
        if self.silent:
            self.silent = False
            self.team.show_waiting()
            self._timer = loop.call_later(self.SILENCE, self._listen)

    def _listen(self) -> None:
        """Shows that the model is waited for again, once it was silent for SILENCE."""
        left = self.heard_at + self.SILENCE - time.time()
        self.silent = left <= 0
        if self.silent:
            self.team.show_waiting()
        else:
            self._timer = asyncio.get_running_loop().call_later(left, self._listen)

    def _check(self, call: _ModelCall) -> None:
        """Raises PartialAnswer unless the answer is whole."""
        reason = call.finish_reason
        if reason in self.CUT:
            raise PartialAnswer(self._form.cut_reason(reason), cut=True)
        if reason in self.WITHHELD:
            text = quoted(call.text[-60:])
            advice = f"another prompt or llm.model may pass. The answer ends in {text}"
            raise PartialAnswer(f"the model's answer was withheld ({reason}): {advice}")
        server = _server(self._model.config)
        if reason not in self.WHOLE:
            how = f"({reason})" if reason else "without a finish reason"
            advice = f"{server}, or a proxy before it, ended it early"
            raise PartialAnswer(f"the model's answer broke off {how}: {advice}", retry=True)
        if not call.text.strip():
            advice = f"another llm.model at {server} may answer"
            raise PartialAnswer(f"the model's answer was empty ({reason}): {advice}", retry=True)

    def _change_form(self, error: Exception) -> bool:
        """Whether the next request is another one, so that it can be sent at once."""
        was_cut = isinstance(error, PartialAnswer) and error.cut
        change = self._form.enlarge() if was_cut else self._form.adapt(error)
        if change:
            self.team.log("WARNING", change, call_id=self._call.id)
        return bool(change)

    def _wait(self, error: Exception, failed: int) -> float:
        """Seconds until the next attempt. Raises where none can help."""
        attempts = self.UNREACHED
        if isinstance(error, PartialAnswer):
            attempts = self.PARTIAL
            fault: ModelFault | None = ModelFault(str(error), error.retry, None)
        else:
            fault = model_fault(error, self._model.config, self.team.run.secrets)
            if isinstance(getattr(error, "status_code", None), int) or type(error) is ServerError:
                attempts = self.REFUSED
        if fault is None:
            raise error
        if not fault.retry or failed >= attempts:
            after = f" (attempt {failed} of {attempts})" if failed > 1 else ""
            raise _GiveUp(fault.reason + after) from error
        wait = 2.0 ** (failed - 1)
        if fault.wait is not None:
            wait = fault.wait if failed == 1 else max(wait, fault.wait)
        attempt = f"attempt {failed} of {attempts}, the next in {wait:.3g} s"
        self.team.log("WARNING", f"{fault.reason} ({attempt})", call_id=self._call.id)
        return wait

    def _book(self) -> None:
        """Books what an attempt has used, a failed one too; estimated where no server says it."""
        call = self._call
        text = call.reasoning + call.text
        usage = dict(call.usage)
        if self._api.own_method:
            return
        if text:
            estimate = estimate_tokens(text)
            usage.setdefault("prompt_tokens", estimate_tokens(str(self._messages)))
            usage.setdefault("completion_tokens", estimate)
            if not call.finish_reason:  # what a server counts before the end is its beginning
                usage["completion_tokens"] = max(usage["completion_tokens"], estimate)
        self.team.costs.book(self.speaker.role, self._model.config, usage)


# -----------------------------------------------------------------------------
# MetaGPT: mendings
# -----------------------------------------------------------------------------


def _patch(target: Any, name: str, around: Callable[..., Any]) -> None:
    """Puts `around(original, self, …)` in the place of a method, for all instances of a class."""
    setattr(target, name, functools.partialmethod(partial(around, getattr(target, name))))


# Whatever the user, the system or a model configured, git runs no program of theirs.
GIT_CONFIG: Mapping[str, str] = {
    "core.hooksPath": os.devnull,
    "core.fsmonitor": "false",
    "core.excludesFile": os.devnull,
    "core.attributesFile": os.devnull,
    "commit.gpgSign": "false",
}


def git_environ(environ: Mapping[str, str]) -> dict[str, str]:
    """The environment of git: no configuration but GIT_CONFIG, no repository but `.git`."""
    own = {
        **program_environ(environ),
        "HOME": os.devnull,
        "XDG_CONFIG_HOME": os.devnull,
        "GIT_CONFIG_GLOBAL": os.devnull,
        "GIT_CONFIG_NOSYSTEM": "1",
        "GIT_ATTR_NOSYSTEM": "1",
        "GIT_TEMPLATE_DIR": "",  # it may hold hooks
        "GIT_DIR": ".git",  # of the current folder: it is not looked for in those above
        "GIT_CONFIG_COUNT": str(len(GIT_CONFIG)),
    }
    for number, (key, value) in enumerate(GIT_CONFIG.items()):
        own[f"GIT_CONFIG_KEY_{number}"] = key
        own[f"GIT_CONFIG_VALUE_{number}"] = value
    for person in ("AUTHOR", "COMMITTER"):  # else it asks passwd, where the user id may be missing
        own[f"GIT_{person}_NAME"] = "streamer"
        own[f"GIT_{person}_EMAIL"] = "streamer@localhost"
    return own


def _mend_git_lock(engine: types.SimpleNamespace) -> None:
    """GitPython changes the process's current folder while it indexes, and leaves two processes of
    git for each repository: one at a time is used, and closed.
    """
    lock = threading.RLock()

    def locked(method: Callable[..., Any], repository: Any, *args: Any, **kwargs: Any) -> Any:
        with lock:
            before = repository._repository
            try:
                return method(repository, *args, **kwargs)
            finally:
                for used in filter(None, (before, repository._repository)):
                    used.close()

    for name in ("open", "add_change", "commit", "_init", "rename_root", "delete_repository"):
        _patch(engine.GitRepository, name, locked)
    # Where Python looks for modules in the current folder, that must not become the model's.
    sys.path[:] = map(os.path.abspath, sys.path)


def _mend_git_environ(engine: types.SimpleNamespace) -> None:
    """It lets git read the user's environment and configuration, and run the hooks named there."""
    module = types.ModuleType("os")
    environ = git_environ(os.environ)
    vars(module).update(vars(os), environ=environ, getenv=environ.get)
    for name in [name for name in sys.modules if name.partition(".")[0] == "git"]:
        if getattr(sys.modules[name], "os", None) is os:
            vars(sys.modules[name])["os"] = module  # GitPython reads os.environ in six modules
    git = importlib.import_module("git")
    git.Repo.config_level = ("repository",)  # what GitPython reads itself
    git.index.base.run_commit_hook = lambda *args: None


def _mend_file_names(engine: types.SimpleNamespace) -> None:
    """It writes, reads and deletes whatever path the model names: only in the workspace now."""

    async def contained(
        method: Callable[..., Any], files: Any, filename: Any, *args: Any, **kwargs: Any
    ) -> Any:
        speaker = _speaker.get()
        if speaker:
            speaker.team.check_inside(files.workdir / filename)
        result = await method(files, filename, *args, **kwargs)
        if speaker and method.__name__ != "get":
            speaker.team.run.report_files(speaker.role)
        return result

    def renamed(method: Callable[..., Any], repository: Any, name: str) -> Any:
        speaker = _speaker.get()
        if speaker:
            speaker.team.check_inside(repository.workdir.parent / name)
        if Path(name).name != name:
            raise _GiveUp(f"a project name must be the name of a folder, not {name[:200]!r}")
        return method(repository, name)

    for name in ("save", "get", "delete"):
        _patch(engine.FileRepository, name, contained)
    _patch(engine.GitRepository, "rename_root", renamed)


def _mend_dependency_file() -> None:
    """It takes JSON's backslashes for those of Windows, which garbles names in other scripts."""
    module = importlib.import_module("metagpt.utils.dependency_file")

    async def load(file: Any) -> None:
        if file.exists:
            file._dependencies = json.loads(await module.aread(file._filename))

    module.DependencyFile.load = load


# MetaGPT's patterns for a model's answer, and the same in linear time: what stands in `(?>…)` is
# found once. Where the first start of what is searched has no end behind it, no later one has.
LINEAR_PATTERNS: Mapping[str, str] = {
    # The last bracket that closes, back to the last one that opens, or without `=` to the first.
    r"\s*(.*=.*)?(\[.*\])": r"\A([^=]*+=.*(?=\[[^\[]*\])|[^\[]*+)(\[.*\])",
    r"(.*?```python.*?\s+)?(?P<code>.*)(```.*?)": (
        r"\A((?>.*?```python)(?>.*?\s+))?(?P<code>.*)(```)"
    ),
    r"(.*?```python.*?\s+)?(?P<code>.*)": r"\A((?>.*?```python)(?>.*?\s+))?(?P<code>.*)",
    r"\[CONTENT\]([\s\S]*)\[/CONTENT\]": r"\A(?>[\s\S]*?\[CONTENT\])([\s\S]*)\[/CONTENT\]",
}


def linear_pattern(pattern: str) -> str:
    """One of LINEAR_PATTERNS, or `a.*?b(.*?)c` with a and b found once."""
    before, group, after = pattern.partition("(.*?)")
    if pattern in LINEAR_PATTERNS or not group:
        return LINEAR_PATTERNS.get(pattern, pattern)
    pieces = "".join(f"(?>.*?{piece})" for piece in before.split(".*?"))
    return rf"\A{pieces}{group}{after}"


class _LinearSearch:
    """The module `re` for MetaGPT's parsers of answers."""

    def __init__(self, module: types.ModuleType) -> None:
        self._module = module

    def __getattr__(self, name: str) -> Any:
        return getattr(self._module, name)

    def search(self, pattern: str, text: str, flags: int = 0) -> Any:
        return self._module.search(linear_pattern(pattern), text, flags)

    def findall(self, pattern: str, text: str, flags: int = 0) -> Any:
        return self._module.findall(LINEAR_PATTERNS.get(pattern, pattern), text, flags)


def _mend_searches() -> None:
    """Its patterns take minutes for an answer that is cut, and it evaluates answers as Python."""
    for name in ("utils.common", "utils.repair_llm_raw_output", "actions.action_node"):
        parser = importlib.import_module(f"metagpt.{name}")
        vars(parser)["re"] = _LinearSearch(vars(parser)["re"])
    vars(importlib.import_module("metagpt.actions.action_node"))["eval"] = ast.literal_eval


def _mend_action_names(engine: types.SimpleNamespace) -> None:
    """It runs actions inside actions in silence: the speaker says which, and counts the ended."""

    async def named(method: Callable[..., Any], action: Any, *args: Any, **kwargs: Any) -> Any:
        speaker = _speaker.get()
        if speaker:
            speaker.action = _action_name(action)
        result = await method(action, *args, **kwargs)
        if speaker:
            speaker.team.finished(_action_name(action))
        return result

    def watch(kind: Any) -> None:
        if inspect.iscoroutinefunction(vars(kind).get("run")):
            _patch(kind, "run", named)

    for action in (engine.Action, *_subclasses(engine.Action)):
        watch(action)
    engine.Action.__pydantic_init_subclass__ = classmethod(lambda kind, **kwargs: watch(kind))


def _mend_contexts(engine: types.SimpleNamespace) -> None:
    """It makes a context of its own, with other costs and folders, for whoever is given none."""

    def context(*args: Any, **kwargs: Any) -> Any:
        speaker = _speaker.get()
        if speaker and not args and not kwargs:
            return speaker.team.context
        return engine.Context(*args, **kwargs)

    for name in ("context_mixin", "team", "llm"):
        vars(importlib.import_module(f"metagpt.{name}"))["Context"] = context


def _mend_messages(engine: types.SimpleNamespace) -> None:
    """It hands messages on in silence."""

    def published(
        method: Callable[..., bool], env: Any, message: Any, *args: Any, **kw: Any
    ) -> Any:
        speaker = _speaker.get()
        if speaker:
            speaker.team.show_message(speaker, message)
        return method(env, message, *args, **kw)

    _patch(engine.Environment, "publish_message", published)


def _mend_questions(engine: types.SimpleNamespace) -> None:
    """It reads standard input where a person is to answer: the run asks, here and in any role."""
    read_line = builtins.input

    def ask(prompt: object = "") -> str:
        speaker = _speaker.get()
        if speaker is None:
            return read_line(prompt)
        answer = speaker.team.run.ask(str(prompt), agent_role=speaker.role)
        for request in speaker.team.requests:  # the loop stood still, and heard no model
            request.on_output()
        return answer

    async def answered(method: Any, model: Any, asked: Any, *args: Any, **kwargs: Any) -> Any:
        speaker = _speaker.get()
        if speaker is None:
            return await method(model, asked, *args, **kwargs)
        question = asked if isinstance(asked, str) else asked[-1]["content"]
        answer = await asyncio.to_thread(speaker.team.run.ask, question, None, speaker.role)
        if answer in ("exit", "quit"):  # MetaGPT's words
            raise SystemExit
        return answer

    builtins.input = ask
    for name in ("aask", "acompletion_text"):
        _patch(engine.HumanProvider, name, answered)
    # It would read lines until the input ends.
    engine.HumanInteraction.multilines_input = lambda self, prompt="Enter: ": ask(prompt)


def _copy_node(node: Any) -> Any:
    copied = copy.copy(node)
    copied.children = {key: _copy_node(child) for key, child in node.children.items()}
    return copied


def _mend_shared_nodes(engine: types.SimpleNamespace) -> None:
    """It keeps the model and its answer on nodes that all runs share: each fill has a copy."""

    async def copied(method: Callable[..., Any], node: Any, *args: Any, **kwargs: Any) -> Any:
        return await method(_copy_node(node), *args, **kwargs)

    _patch(engine.ActionNode, "fill", copied)


def _mend_package_installs(engine: types.SimpleNamespace) -> None:
    """It installs the packages that a model names into the service's own environment."""
    engine.RunCode._install_dependencies = staticmethod(lambda working_directory, env: None)


class _Program(subprocess.Popen[bytes]):
    """A program of the team; whatever it has started ends with it, or with a cancel of the run.

    That is its group of processes, and on Linux all that have its mark in their environment.
    """

    def __init__(self, command: Sequence[str], env: Mapping[str, str], **options: Any) -> None:
        self._mark = uuid.uuid4().hex
        self._over = False
        environ = {**env, "STREAMER_PROGRAM": self._mark}
        super().__init__(command, env=environ, start_new_session=True, **options)
        speaker = _speaker.get()
        if speaker is not None:
            speaker.team.run.on_cancel(self.kill)

    def communicate(self, input: Any = None, timeout: float | None = None) -> tuple[bytes, bytes]:
        try:
            return super().communicate(input, timeout or 1.0)  # of one that is ended, the rest
        finally:
            self.kill()

    def kill(self) -> None:
        if self._over:  # its number may be another's by now
            return
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.pid, signal.SIGKILL)
        self._over = self.returncode is not None
        for _ in range(3):  # one that is ended may have started another meanwhile
            for folder in Path("/proc").glob("[0-9]*"):
                with contextlib.suppress(OSError):  # it has ended, or is another user's
                    if self._mark.encode() in (folder / "environ").read_bytes():
                        os.kill(int(folder.name), signal.SIGKILL)


def _mend_programs(engine: types.SimpleNamespace) -> None:
    """It waits for whoever has a program's output open, and leaves what a program has started."""
    module = sys.modules[engine.RunCode.__module__]
    vars(module)["subprocess"] = types.SimpleNamespace(**{**vars(subprocess), "Popen": _Program})


def _mend_token_counts(engine: types.SimpleNamespace) -> None:
    """It counts by tiktoken where an answer has no `usage`, which downloads its tables first."""
    engine.openai_api.count_output_tokens = lambda text, model: estimate_tokens(text)
    engine.openai_api.count_input_tokens = lambda messages, model: estimate_tokens(str(messages))


def _mend_costs(engine: types.SimpleNamespace) -> None:
    """It books to whatever a model was made with, and says so in a line of the log."""

    def booked(method: Callable[..., None], model: Any, usage: Any, *args: Any, **kw: Any) -> None:
        speaker = _speaker.get()
        if speaker is None:
            method(model, usage, *args, **kw)
        elif usage:
            counts = usage.model_dump() if hasattr(usage, "model_dump") else usage
            speaker.team.costs.book(speaker.role, model.config, counts)

    _patch(engine.BaseLLM, "_update_costs", booked)


def _mend_model_requests(engine: types.SimpleNamespace) -> None:
    """It believes whatever a model's server sends; `_ModelRequest` does not."""

    async def asked(
        method: Callable[..., Any], model: Any, messages: Any, stream: bool = False, **kwargs: Any
    ) -> Any:
        speaker = _speaker.get()
        if speaker is None:
            return await method(model, messages, stream=stream, **kwargs)
        model = speaker.team.own_model(model)
        own_method = partial(method, model, messages, stream=stream, **kwargs)
        kinds = [kind for kind in type(model).__mro__ if "_achat_completion_stream" in vars(kind)]
        api = MODEL_APIS.get(kinds[0].__name__) or _other_api(own_method, stream)
        return await _ModelRequest(speaker, api, model, messages, stream).answer()

    for kind in (engine.BaseLLM, *_subclasses(engine.BaseLLM)):
        if "acompletion_text" in vars(kind) and kind is not engine.HumanProvider:
            _patch(kind, "acompletion_text", asked)


def _mend(engine: types.SimpleNamespace) -> None:
    """Mends what a server of many runs cannot live with in MetaGPT (guarantees 7 and 8)."""
    _mend_git_lock(engine)
    _mend_git_environ(engine)
    _mend_file_names(engine)
    _mend_dependency_file()
    _mend_searches()
    _mend_action_names(engine)
    _mend_contexts(engine)
    _mend_messages(engine)
    _mend_questions(engine)
    _mend_shared_nodes(engine)
    _mend_package_installs(engine)
    _mend_programs(engine)
    _mend_token_counts(engine)
    _mend_costs(engine)
    _mend_model_requests(engine)


async def _raw_answer(model: Any, name: str, *args: Any, **kwargs: Any) -> Any:
    """A model's `acompletion` or `aask_code`: what its SDK gives is handed on, and shown."""
    speaker = _speaker.get()
    own = speaker.team.own_model(model) if speaker else model
    method = partial(getattr(type(model), name), own, *args, **kwargs)
    if speaker is None or speaker.call is not None:  # it is part of a request that is shown
        return await method()
    answers = []

    async def text() -> str:
        answer = await method()
        answers.append(answer)
        choices = getattr(answer, "choices", None)
        return (choices and choices[0].message.content) or encode(jsonable(answer))

    await _ModelRequest(speaker, _other_api(text, False), own, args, False).answer()
    return answers[-1]


def _connect(model: Any) -> None:
    """Gives a model connections of its own, by the proxy that its settings name."""
    if hasattr(model.aclient, "with_options"):
        http = _http_client(proxy=model.config.proxy or None)
        model.aclient = model.aclient.with_options(http_client=http)


def _address_models(engine: types.SimpleNamespace) -> None:
    """Sends what is asked of a model to its own vendor, by the proxy that its settings name."""
    get_provider = engine.LLM_REGISTRY.get_provider

    def make(api_type: Any, config: Any) -> Any:
        vendor = vendor_of(config)
        if "base_url" not in config.model_fields_set:  # then it is OpenAI's, whatever the vendor
            if vendor in EXAMPLE_URLS:
                example = EXAMPLE_URLS[vendor]
                raise _GiveUp(f"base_url of a model of {vendor} is missing, for example {example}")
            config.base_url = VENDOR_URLS[vendor]
        config.calc_usage = True  # else its tokens count for nothing, and no budget holds
        model = get_provider(api_type)(config)
        _connect(model)
        if vendor != "openai" and hasattr(getattr(model, "aclient", None), "organization"):
            model.aclient.organization = None  # OpenAI's own, from OPENAI_ORG_ID
            model.aclient.project = None
        for name in ("acompletion", "aask_code"):
            setattr(model, name, partial(_raw_answer, model, name))
        return model

    engine.LLM_REGISTRY.get_provider = lambda api_type: partial(make, api_type)
    # It would hand the proxy to the SDK under a name that the SDK does not know any more.
    engine.openai_api.OpenAILLM._get_proxy_params = lambda llm: {"verify": _tls()}


def _route_output(engine: types.SimpleNamespace) -> None:
    """Sends tokens and log records, which MetaGPT prints, to the task that they come from."""

    def log(message: Any) -> None:
        speaker = _speaker.get()
        if speaker is not None:
            speaker.team.log(message.record["level"].name, message.record["message"])

    def token(text: str) -> None:
        speaker = _speaker.get()
        if speaker is not None and speaker.call is not None:
            speaker.call.take(Chunk(text))

    engine.loguru.add(log, level="INFO", format="{message}", backtrace=False, diagnose=False)
    engine.set_llm_stream_logfunc(token)


# Imported once for the process, as MetaGPT's hooks are the process's own.
_engine: types.SimpleNamespace | None = None
_engine_lock = threading.Lock()


def load_metagpt(workspace: Path) -> types.SimpleNamespace:
    """Imports MetaGPT (2-4 s, so in a worker thread) and mends what its runs share.

    Its own log folder goes below `workspace`. Raises SettingsError without a model.
    """
    global _engine
    with _engine_lock:
        if _engine is None:
            try:
                engine = _import_metagpt(workspace / ".metagpt", model_config(os.environ))
            except ModuleNotFoundError as error:
                raise SettingsError(f"{error}; type: {INSTALL}") from error
            except ValueError as error:
                raise SettingsError(refused_field(error)) from error
            _route_output(engine)
            _mend(engine)
            _address_models(engine)
            _engine = engine
    return _engine


MakeTeam = Callable[[Any, str], Any]  # of MetaGPT's context and the prompt: a team, or its roles
Teams = Mapping[str, str | MakeTeam]  # name → function, or where it is: module:function


def load_team(name: str, made: str | MakeTeam) -> MakeTeam:
    """Imports what is not imported yet, after MetaGPT. Raises SettingsError, which names it."""
    if not isinstance(made, str):
        return made
    module, _, function = made.partition(":")
    imported = guarded(importlib.import_module, module)
    found: MakeTeam | None = getattr(imported.result, function, None)
    if callable(found):
        return found
    why = reason_of(imported.error) if imported.error else f"{module} has no function {function}"
    raise SettingsError(f"the team {name!r} ({made}) cannot be imported: {why}")


def warm_up_metagpt(settings: Settings, teams: Teams) -> None:
    """Loads MetaGPT and the teams before a task needs them; warns where the model's price is
    unknown.
    """
    engine = load_metagpt(settings.workspace)
    for name, made in teams.items():
        load_team(name, made)
    config = engine.config.llm
    if model_price(engine, config, settings.price) is None:
        logger.warning(
            "no price is known for model=%r: costs are unknown, and the option investment stops "
            "nothing (token_budget does); set --price 1.25,10 (US dollars for a million prompt and "
            "completion tokens), or llm.pricing_plan to a model whose price MetaGPT knows",
            config.pricing_plan or config.model,
        )


# -----------------------------------------------------------------------------
# MetaGPT: the team
# -----------------------------------------------------------------------------

STRONGER_MODEL = "a stronger model (llm.model) may keep to the form asked"


def _plain_text(error: BaseException) -> str:
    """An error without what is of Python: pydantic's page, a path's folders, a traceback."""
    if "ValidationError" in _class_names(error) and hasattr(error, "errors"):
        first, *others = error.errors()
        more = f" (and {len(others)} more)" if others else ""
        where = ".".join(map(str, first["loc"]))
        message = re.sub(r"[{}']|^Value error, ", "", first["msg"])
        return f"{where}: {message}{more}" if where else message
    if isinstance(error, OSError) and error.strerror:
        name = f"the file {Path(error.filename).name}" if error.filename else "a file"
        return f"{name} cannot be used: {error.strerror}"
    return error_text(error).strip().rpartition("\n")[2]  # of a traceback, the error itself


def failure_reason(error: BaseException, answer: str = "") -> str:
    """Why MetaGPT could not go on, in a line for a person; `answer` is what its model said last."""
    attempts = 0
    for _ in range(5):  # MetaGPT's retries, one around the other
        last = getattr(error, "last_attempt", None)
        if last is not None:
            attempts = attempts or last.attempt_number
            error = last.exception()
    if isinstance(error, _GiveUp | StreamerError | SettingsError):
        return error_text(error)
    beginning = quoted(" ".join(answer.split())[:60])
    text = " ".join(_plain_text(error).split())[:120]
    if attempts or _class_names(error) & {"ValidationError", "JSONDecodeError"}:
        after = f"after {attempts} attempts " if attempts else ""
        form = f"{after}the model's answer has not the form asked; {STRONGER_MODEL}"
        return f"{form}. It begins {beginning}. {text}"
    if isinstance(error, OSError) and error.strerror:
        return text
    came = f", perhaps for the model's answer, which begins {beginning}" if answer else ""
    return f"MetaGPT could not go on{came}: {type(error).__name__}: {text}"


def _action_name(action: Any) -> str:
    return str(action.name or type(action).__name__)


def _class_name(path: str) -> str:
    """MetaGPT writes metagpt.roles.architect.Architect; `<all>` stays as it is."""
    return str(path).rsplit(".", 1)[-1]


def _project_name(prompt: str) -> str:
    return "_".join(re.findall(r"[a-z][a-z0-9]*", prompt.lower())[:5])[:40].strip("_") or "project"


def _is_git_name(part: str) -> bool:
    """Whether a file system may take `part` for `.git`, by the rules of git's own verify_path.

    HFS+ ignores case and invisible characters. NTFS ignores case, blanks and dots at the end and
    what follows a colon, and knows `.git` as `git~1` too.
    """
    text = unicodedata.normalize("NFKC", part)
    visible = "".join(char for char in text if unicodedata.category(char) != "Cf")
    name = visible.casefold().partition(":")[0].rstrip(". ")
    return name == ".git" or re.fullmatch(r"git~\d+", name) is not None


def _hide_memory() -> None:
    """Closes this process's memory and environment to other programs of its user, where Linux can.

    Whoever may trace every process, as root may, still reads them.
    """
    if sys.platform == "linux":
        set_dumpable = 4  # PR_SET_DUMPABLE of <linux/prctl.h>
        ctypes.CDLL(None).prctl(set_dumpable, 0, 0, 0, 0)


CLOSE_SECONDS = 2.0  # for the connections of a run that has ended


class _Costs:
    """What a run's models have cost, by role; MetaGPT's own count, which roles may ask, follows."""

    def __init__(self, engine: types.SimpleNamespace, run: Run) -> None:
        self._engine = engine
        self._run = run
        self._by_role: dict[str, dict[str, Any]] = {}
        self.manager = engine.CostManager(max_budget=run.options["investment"])

    def book(self, role: str | None, config: Any, usage: Mapping[str, Any]) -> None:
        """Counts the tokens of a request to the model of `config`."""
        prompt = int(usage.get("prompt_tokens") or 0)
        completion = int(usage.get("completion_tokens") or 0)
        empty = {"prompt_tokens": 0, "completion_tokens": 0, "total_cost": 0.0}
        cost = self._by_role.setdefault(role or "Team", empty)
        cost["prompt_tokens"] += prompt
        cost["completion_tokens"] += completion
        self.manager.total_prompt_tokens += prompt
        self.manager.total_completion_tokens += completion
        price = model_price(self._engine, config, self._run.price)
        if price is None:
            cost["total_cost"] = None
        else:
            dollars = (prompt * price["prompt"] + completion * price["completion"]) / 1000
            self.manager.total_cost += dollars
            if cost["total_cost"] is not None:
                cost["total_cost"] += dollars
        self.report()

    def report(self) -> Mapping[str, Any]:
        """Shows what this run has cost; returns what the task has."""
        known = all(cost["total_cost"] is not None for cost in self._by_role.values())
        total = self.manager.total_cost
        cost = {
            "prompt_tokens": self.manager.total_prompt_tokens,
            "completion_tokens": self.manager.total_completion_tokens,
            "total_cost": round(total, 6) if known else None,
            "max_budget": self._run.options["investment"],
            "by_role": {role: add_costs(NO_COST, cost) for role, cost in self._by_role.items()},
        }
        self._run.update(cost=cost)
        return self._run.cost

    def check_budget(self) -> None:
        """Ends the run once the task, with its earlier runs, has spent what its options allow."""
        options = self._run.options
        cost = self._run.cost
        dollars = (self._run.earlier_cost["total_cost"] or 0) + self.manager.total_cost
        tokens = cost["prompt_tokens"] + cost["completion_tokens"]
        token_budget = options.get("token_budget")
        if dollars >= options["investment"]:
            spent = f"${dollars:.4f} of ${options['investment']:g}"
            option = "investment"
        elif token_budget is not None and tokens >= token_budget:
            spent = f"{tokens} of {token_budget} tokens"
            option = "token_budget"
        else:
            return
        raise _GiveUp(f"the budget is spent: {spent}; a larger options.{option} allows more")


def _wrap(target: Any, name: str, around: Callable[..., Any]) -> None:
    """Puts `around(original, …)` in the place of a method, on this instance alone."""
    vars(target).pop(name, None)  # an earlier run's, where several share what they observe
    object.__setattr__(target, name, partial(around, getattr(target, name)))  # past pydantic


class _Team:
    """A team of MetaGPT's at work on one task; everything it does is reported to the run."""

    UNREAD: frozenset[str] = frozenset()  # actions whose message comes into nobody's prompt

    def __init__(self, engine: types.SimpleNamespace, run: Run) -> None:
        self.engine = engine
        self.run = run
        self.costs = _Costs(engine, run)
        self.requests: list[_ModelRequest] = []  # that are not answered
        self._observed: set[Any] = set()  # roles
        self.context = engine.Context(config=engine.config.model_copy(deep=True))
        self._models: dict[int, tuple[Any, Any]] = {}  # id → the model, and this team's copy
        self._has_prompt = False
        self._shown_waiting: tuple[Any, ...] = ()
        self._prepare(self.context)

    def _prepare(self, context: Any) -> None:
        config = context.config
        # Without a name MetaGPT takes the model's, and deletes the folder that has it.
        project_name = self.run.options["project_name"] or _project_name(self.run.prompt)
        config.update_via_cli("", project_name, False, "", 0)
        config.workspace.path = self.run.workspace
        config.mermaid.engine = "none"  # it starts a program, by a shell, with names in the command
        context.cost_manager = self.costs.manager
        context.kwargs.set("run", self.run)  # for roles that know streamer
        _wrap(context, "new_environ", self._clean_environ)

    def make(self) -> Any:
        """MetaGPT's Team, with its roles."""
        raise NotImplementedError

    def name_of(self, role: Any) -> str:
        return str(role.name or role.profile or type(role).__name__)

    def finished(self, action: str) -> None:
        """Called when an action has ended, also one inside another."""

    # Its work

    async def work(self) -> Mapping[str, Any]:
        """Drives the rounds itself: Team.run swallows every error."""
        loop = asyncio.get_running_loop()
        task = asyncio.current_task()
        assert task is not None

        def stop() -> None:
            with contextlib.suppress(RuntimeError):  # the loop is closed: the work has ended
                loop.call_soon_threadsafe(task.cancel)

        self.run.on_cancel(stop)
        self.costs.report()
        _speaker.set(_Speaker(self))
        done, idle = await self._play(self.make())
        result = {"mode": "metagpt", "end_reason": "idle" if idle else "rounds", "rounds": done}
        return {**result, "files": self.run.report_files(), "cost": self.costs.report()}

    async def _play(self, team: Any) -> tuple[int, bool]:
        """How many rounds it took, and whether the team had nothing left to do."""
        env = team.env
        if env.context is not self.context:  # the user's own
            self._prepare(env.context)
        if not self._has_prompt:
            team.run_project(self.run.prompt)
        rounds = self.run.options["n_round"]
        if self.run.options["run_tests"]:
            rounds = max(rounds, 8)  # MetaGPT's own rule
        done = 0
        shown = self.run.progress
        while done < rounds and not env.is_idle:
            for role in env.roles.values():
                self._observe(role)
            await env.run()
            done += 1
            if self.run.progress == shown:  # the team reports none of its own
                shown = done / rounds
                self.run.update(progress=shown)
        # `is_idle` looks at messages of the last round, this at those a next one would find.
        idle = not any([await role._observe() for role in env.roles.values()])
        env.archive()
        return done, idle

    def _observe(self, role: Any) -> None:
        if role in self._observed:
            return
        self._observed.add(role)
        speaker = _Speaker(self, self.name_of(role))
        _wrap(role, "_observe", partial(self._speaking, speaker))
        _wrap(role, "react", partial(self._speaking, speaker))
        _wrap(role, "_act", partial(self._act, speaker, role))
        if hasattr(role, "_parse_tasks"):
            _wrap(role, "_parse_tasks", self._tasks)

    async def close(self) -> None:
        models = [own for _, own in self._models.values()]
        closes = [getattr(model.aclient, "close", None) for model in models]
        await asyncio.gather(*(close() for close in closes if close is not None))

    async def _speaking(
        self, speaker: _Speaker, original: Callable[..., Awaitable[Any]], *args: Any
    ) -> Any:
        """Whatever stops a role, while it reads, decides or acts, is an ERROR and ends the run."""
        _speaker.set(speaker)
        try:
            return await original(*args)
        except SystemExit as error:
            if error.code is None:  # MetaGPT's way to end, where a person answers "exit"
                raise RunCancelled("stopped by a person, who answered exit") from error
            raise
        except (Exception, _GiveUp) as error:
            reason = failure_reason(error, self.run.redact(speaker.answer))
            action = f" in {speaker.action}" if speaker.action else ""
            reason = f"{speaker.role} failed{action}: {reason}"
            payload = {"message": reason, "action": speaker.action}
            self.run.emit(EventType.ERROR, payload, speaker.role)
            raise _RoleFailed(reason) from error

    async def _act(
        self, speaker: _Speaker, role: Any, original: Callable[..., Awaitable[Any]], *args: Any
    ) -> Any:
        name = str(speaker.role)
        todo = role.rc.todo
        action = speaker.action = _action_name(todo) if todo else "its turn"
        speaker.acted = todo
        started = time.monotonic()
        payload = {"message": f"{name} starts {action}", "action": action}
        self.run.emit(EventType.AGENT_START, payload, name)
        result = await original(*args)
        self.run.report_files(name)
        seconds = round(time.monotonic() - started, 1)
        payload = {"message": f"{name} finished {action} in {seconds} s", "action": action}
        self.run.emit(EventType.AGENT_COMPLETE, {**payload, "seconds": seconds}, name)
        if action in self.run.options["approve"]:
            is_read = action not in self.UNREAD and hasattr(result, "instruct_content")
            remark = await asyncio.to_thread(ask_approval, self.run, action, name, is_read)
            if remark:
                await self._add_remark(role, result, remark)
        speaker.action = None
        return result

    async def _add_remark(self, role: Any, message: Any, remark: str) -> None:
        """Into what the next role reads: the documents that a message names, or the message."""
        content = message.instruct_content
        documents = getattr(content, "docs", None)
        if documents:
            for document in documents.values():
                body = {**json.loads(document.content), REMARK: remark}
                document.content = json.dumps(body, ensure_ascii=False)
                files = role.git_repo.new_file_repository(document.root_path)
                await files.save(document.filename, document.content)
            message.content = content.model_dump_json()
            return
        message.content += f"\n\n{REMARK}: {remark}"
        if content is not None:  # which prompts hold instead of the text
            kind = type(content)
            create_model = importlib.import_module("pydantic").create_model
            richer = create_model(kind.__name__, __base__=kind, remark_of_the_user=(str, remark))
            message.instruct_content = richer(**content.model_dump())

    def _tasks(self, original: Callable[[Any], list[str]], document: Any) -> list[str]:
        names = original(document)
        if not names:
            raise _GiveUp(f"the model's list of tasks names no file; {STRONGER_MODEL}")
        return names

    # What its parts report

    def show_message(self, speaker: _Speaker, message: Any) -> None:
        self._has_prompt = True
        sender = speaker.role or "Human"
        to = sorted(_class_name(name) for name in message.send_to)
        cause = _class_name(message.cause_by)
        if speaker.acted is not None and cause == type(speaker.acted).__name__:
            cause = _action_name(speaker.acted)
        documents = dict.fromkeys(re.findall(r'"filename":"([^"]+)"', message.content))
        about = ", ".join(documents) or self.run.redact(message.content)[:200]
        payload = {
            "message": f"{sender} to {', '.join(to)}: {about}",
            "content": message.content,
            "cause_by": cause,
            "sent_from": sender,
            "send_to": to,
        }
        self.run.emit(EventType.MESSAGE, payload, speaker.role)

    def log(self, level: str, message: str, **details: Any) -> None:
        speaker = _speaker.get()
        if speaker and speaker.call:
            speaker.call.flush()  # what was said before this line comes before it
        message = message.replace(f"{self.run.workspace}{os.sep}", "")
        message = re.sub(r"<Future at 0x\w+ state=finished raised (\w+)>", r"\1", message)
        payload = {"message": message, "level": level, **details}
        self.run.emit(EventType.LOG, payload, speaker.role if speaker else None)

    def check_inside(self, path: Path) -> None:
        """A model chooses file names: none may leave the task's workspace, or be git's own."""
        longest = max(len(part.encode(errors="replace")) for part in path.parts)
        if longest > 255 or "\0" in str(path):
            raise _GiveUp(f"the model named a file that cannot be: {quoted(path.name[:100])}")
        workspace = self.run.workspace.resolve()
        inside = os.path.relpath(path.resolve(), workspace)
        parts = re.split(r"[\\/]", inside)
        if parts[0] == "..":
            reason = "the model named a file outside the task's workspace"
            raise _GiveUp(f"{reason}: {str(path)[-200:]}")
        # A folder with a HEAD may be a repository, whose configuration git would follow.
        if any(map(_is_git_name, parts)) or parts[-1].casefold() == "head":
            raise _GiveUp(f"the model named a file of git's own: {inside[-200:]!r}")

    def own_model(self, model: Any) -> Any:
        """This team's copy of a model, which others may have too: its connections are of one loop,
        and its costs of one task.
        """
        if id(model) not in self._models:
            own = copy.copy(model)
            own.cost_manager = self.costs.manager  # some vendors' modules book past `_update_costs`
            _connect(own)
            self._models[id(model)] = (model, own)
        return self._models[id(model)][1]

    def _clean_environ(self, original: Callable[[], dict[str, str]]) -> dict[str, str]:
        """The environment of a program that the team runs: without this process's secrets."""
        _hide_memory()
        environ = program_environ(original())
        return {name: value for name, value in environ.items() if self.run.redact(value) == value}

    def show_waiting(self) -> None:
        """Shows who waits for a model: of several the one that has heard nothing for longest."""
        silent = [request for request in self.requests if request.silent]
        waiting: tuple[Any, ...] = ()
        if silent:
            longest = min(silent, key=lambda request: request.heard_at)
            waiting = (longest.speaker.role, longest.action, longest.heard_at)
        if waiting != self._shown_waiting:
            self._shown_waiting = waiting
            self.run.waits_for_model(*waiting)


# The progress when an action is done; writing code goes from 0.5 to 0.9, file by file.
STAGES: Mapping[str, float] = {
    "PrepareDocuments": 0.02,
    "WritePRD": 0.2,
    "WriteDesign": 0.4,
    "WriteTasks": 0.5,
}
REMARK = "Remark of the user, which comes first"


class _Company(_Team):
    """MetaGPT's software company."""

    UNREAD = frozenset({"WriteCode", "WriteTest"})
    files_coded = 0

    def make(self) -> Any:
        options = self.run.options
        roles = self.engine.roles
        hired = [roles.ProductManager(), roles.Architect(), roles.ProjectManager()]
        if options["implement"]:
            self._engineer = roles.Engineer(n_borg=5, use_code_review=options["code_review"])
            hired.append(self._engineer)
        if options["implement"] and options["run_tests"]:
            hired.append(roles.QaEngineer())
        team = self.engine.Team()
        for role in hired:
            team.hire([role])
        return team

    def name_of(self, role: Any) -> str:
        return type(role).__name__

    def finished(self, action: str) -> None:
        if action == ("WriteCodeReview" if self.run.options["code_review"] else "WriteCode"):
            self.files_coded += 1
            files = len(self._engineer.code_todos) or 1
            self.run.update(progress=0.5 + 0.4 * min(1.0, self.files_coded / files))
        elif action in STAGES:
            self.run.update(progress=STAGES[action])


class _OwnTeam(_Team):
    """A team that a function of the user's makes."""

    def __init__(self, engine: types.SimpleNamespace, run: Run, function: MakeTeam) -> None:
        super().__init__(engine, run)
        self._function = function

    def make(self) -> Any:
        name = self.run.options["team"]
        made = guarded(self._function, self.context, self.run.prompt)
        if made.error is not None:
            raise RunFailed(f"the function of {name!r} raised {reason_of(made.error)}")
        team = made.result
        role = self.engine.roles.Role
        if isinstance(team, role):
            team = [team]
        if isinstance(team, Sequence) and team and all(isinstance(each, role) for each in team):
            roles = team
            team = self.engine.Team()
            team.hire(roles)
        if not isinstance(team, self.engine.Team):
            came = type(team).__name__
            raise RunFailed(
                f"the function of {name!r} must return MetaGPT's Team, or roles, not {came}"
            )
        roles = team.env.roles.values()
        actions = {_action_name(action) for role in roles for action in role.actions}
        for action in self.run.options["approve"]:
            if action not in actions:
                known = f"its actions are {', '.join(sorted(actions))}"
                reason = f"options.approve: the team {name!r} has no action {quoted(action)}"
                raise RunFailed(f"{reason}; {known}")
        return team


def _close(run: Run, runner: asyncio.Runner, team: _Team) -> None:
    """Closes the team's connections and its loop; what never returns does not hold up the run."""

    def close() -> None:
        with runner:
            runner.run(team.close())

    outcomes = [Outcome(error=TimeoutError(f"it took more than {CLOSE_SECONDS:g} s"))]
    thread = threading.Thread(target=lambda: outcomes.append(guarded(close)), daemon=True)
    thread.start()
    thread.join(CLOSE_SECONDS)
    error = outcomes[-1].error
    if error is not None:
        message = f"a model's client could not be closed: {error_text(error)}"
        run.emit(EventType.LOG, {"message": message, "level": "WARNING"})


def run_metagpt(run: Run, teams: Teams = types.MappingProxyType({})) -> Mapping[str, Any]:
    """The real team. Raises RunFailed with the reason for whatever ends it early (guarantee 7)."""
    engine = load_metagpt(run.workspace.parent)
    run.workspace.mkdir(parents=True, exist_ok=True)
    name = run.options["team"]
    try:
        team = (
            _OwnTeam(engine, run, load_team(name, teams[name])) if name else _Company(engine, run)
        )
        runner = asyncio.Runner()
        try:
            return runner.run(team.work())
        finally:
            _close(run, runner, team)
    except asyncio.CancelledError:
        run.check_cancelled()
        raise
    except _RoleFailed as error:
        raise RunFailed(str(error)) from error
    except (Exception, _GiveUp) as error:  # outside of any role: MetaGPT's set-up, or its archive
        reason = run.redact(f"the team failed: {failure_reason(error)}")
        run.emit(EventType.ERROR, {"message": reason})
        raise RunFailed(reason) from error


# -----------------------------------------------------------------------------
# Execution
# -----------------------------------------------------------------------------


class Engine:
    """What all runs of this process share: the runner, which is loaded once, and their slots."""

    def __init__(
        self,
        settings: Settings,
        runner: Runner,
        warm_up: Callable[[], object] | None,
        secrets: Sequence[str],
        teams: Collection[str] = (),
        mode: str = "custom",
    ) -> None:
        self.settings = settings
        self.runner = runner
        self.secrets = secrets
        self.teams = teams  # the names that the option `team` takes
        self.mode = mode  # of a task, for those who watch it
        self.error: str | None = None
        self.ready = anyio.Event()
        self.slots = anyio.Semaphore(settings.max_running)
        # The slots are the limit: an abandoned thread holds none.
        self.threads = anyio.CapacityLimiter(math.inf)
        self._warm_up = warm_up

    @property
    def status(self) -> str:
        if self.error is not None:
            return self.error
        return "ready" if self.ready.is_set() else "loading"

    async def load(self) -> None:
        """Loads what the runner needs in a thread, so that the first task does not wait for it."""
        if self._warm_up is not None:
            warm_up = partial(guarded, self._warm_up)
            outcome = await anyio.to_thread.run_sync(warm_up, abandon_on_cancel=True)
            if outcome.error is not None:
                reason = redact(reason_of(outcome.error), self.secrets)
                self.error = f"MetaGPT could not be loaded: {reason}"
                logger.error("engine error=%r", self.error)
        self.ready.set()


# A run's cost → what it is counted as.
COSTS = {
    "prompt_tokens": "model_prompt_tokens",
    "completion_tokens": "model_completion_tokens",
    "total_cost": "model_cost_dollars",
}


class StopReason(StrEnum):
    CANCEL = "cancelled by a client"
    SHUTDOWN = "cancelled: the server is shutting down"
    TIMEOUT = "timed out"
    STORE = "its events could not be stored"


class Execution:
    """The life of one started task, in a broker that holds its claim."""

    def __init__(self, broker: Broker, engine: Engine) -> None:
        self.broker = broker
        self.task_id = broker.task.id
        self.run = Run(broker.task, engine.settings, engine.secrets, broker.state.cost)
        self.running = False  # it has a slot and a thread
        self.abandoned = False  # its thread goes on though the run has ended
        self.done = anyio.Event()
        self.error: StreamerError | None = None  # why an event could not be stored
        self.untold: str | None = None  # how it ended, where that could not be stored
        self._engine = engine
        self._scope = anyio.CancelScope()  # of the wait for its turn, then of that for its thread
        self._stop_reason: StopReason | None = None
        self._decided = False  # how it ends, or that it goes on elsewhere: a cancel is too late
        self._published = 0
        self._timer: asyncio.TimerHandle  # of its timeout
        self._seconds_left = 0.0  # while it is not counted
        if broker.claim is not None:
            broker.claim.listen(self._on_message)

    @property
    def totals(self) -> Mapping[str, float]:
        """What it has published, and cost as far as that is known."""
        cost = self.run.own_cost
        spent = {name: cost[key] or 0 for key, name in COSTS.items()}
        return {"events": self._published, **spent}

    def stop(self, reason: StopReason, grace: float | None = None) -> bool:
        """Asks the run to end; False where it is decided already how it ends.

        A thread that goes on after `grace` seconds is abandoned (guarantee 6).
        """
        if self._decided:
            return False
        if self._stop_reason in (None, StopReason.TIMEOUT, StopReason.SHUTDOWN):
            self._stop_reason = reason
        seconds = 0.0
        if self.running:
            seconds = self._engine.settings.grace if grace is None else grace
        latest = asyncio.get_running_loop().time() + seconds
        self._scope.deadline = min(self._scope.deadline, latest)
        self.run.cancel()
        return True

    def _on_message(self, message: ClaimMessage) -> bool:
        if isinstance(message, ClaimLost):
            self._fail(message.error)
            return True
        if isinstance(message, AnswerGiven):
            return self.run.answer(message)
        return self.stop(StopReason.CANCEL)

    def _fail(self, error: StreamerError) -> None:
        self.error = self.error or error
        self.stop(StopReason.STORE)

    async def live(self, outcome: Outcome | None = None) -> None:
        """Its turn, its thread, its end. `outcome`: of a run that another process began.

        Where its end could not be stored the task is not ended, and `error` says why.
        """
        async with contextlib.AsyncExitStack() as slot:
            try:
                if outcome is None and await self._has_turn(slot):
                    outcome = await self._work()
            except StreamerError as error:
                self.error = error
            except Exception:  # a fault of this program ends this run, and no other
                logger.exception("task id=%s fault", self.task_id)
                outcome = Outcome(error=RunFailed("the server failed; its log says why"))
            self._decided = True
            if outcome is not None:
                await self._conclude(outcome)
        if not self.broker.ended:
            logger.warning("task id=%s left=%r", self.task_id, str(self.error or self._stop_reason))
            # At a shutdown whoever comes next takes it over as it is.
            await self.broker.let_go(release=self._stop_reason is not StopReason.SHUTDOWN)
        self.done.set()

    async def _has_turn(self, slot: contextlib.AsyncExitStack) -> bool:
        """Waits for the engine and a slot. False where the run was stopped before it began, and
        is another's to run.
        """
        engine = self._engine
        with self._scope:
            if not engine.ready.is_set():
                await self.broker.publish(last_message="loading MetaGPT")
                await engine.ready.wait()
            if not engine.slots.value:
                await self.broker.publish(last_message="waiting for a free slot (max_running)")
            await slot.enter_async_context(engine.slots)
        return self._stop_reason not in (StopReason.SHUTDOWN, StopReason.STORE)

    async def _work(self) -> Outcome:
        """Runs the runner in a thread, and publishes what it reports, to the last of it."""
        engine = self._engine
        run = self.run
        if self._stop_reason is not None:
            return Outcome()
        if engine.error is not None:
            return Outcome(error=RunFailed(engine.error))
        self.running = True
        self._scope = anyio.CancelScope()
        task = replace(self.broker.task.to(TaskStatus.RUNNING), mode=engine.mode)
        start = run.draft(EventType.TASK_START, {"message": task.headline, "mode": engine.mode})
        await self._publish([start], task, status=task.status, started_at=start.timestamp)
        outcome = Outcome(abandoned=True)
        async with anyio.create_task_group() as group:
            group.start_soon(self._pump)
            loop = asyncio.get_running_loop()
            self._timer = loop.call_later(run.options["timeout"], self.stop, StopReason.TIMEOUT)
            try:
                with self._scope:
                    outcome = await anyio.to_thread.run_sync(
                        partial(guarded, engine.runner, run),
                        abandon_on_cancel=True,
                        limiter=engine.threads,
                    )
            finally:  # also where publishing fails: no thread waits at `emit` for ever
                self._timer.cancel()
                run.outbox.finish()
        return outcome

    def _keep_time(self) -> None:
        """The seconds that a person takes for an answer do not count as the task's."""
        loop = asyncio.get_running_loop()
        asking = self.broker.state.question is not None
        if asking and not self._timer.cancelled():
            self._seconds_left = self._timer.when() - loop.time()
            self._timer.cancel()
        elif not asking and self._timer.cancelled():
            self._timer = loop.call_later(self._seconds_left, self.stop, StopReason.TIMEOUT)

    async def _pump(self) -> None:
        """Publishes the runner's reports until it has ended, and those that are left then."""
        outbox = self.run.outbox
        loop = asyncio.get_running_loop()
        news = asyncio.Event()
        outbox.attach(partial(loop.call_soon_threadsafe, news.set))
        ended = False
        while not ended:
            await news.wait()
            news.clear()
            ended = outbox.finished  # before it is emptied: nothing comes in any more
            reports = outbox.take()
            while reports:
                await self._publish_reports(reports)
                await anyio.lowlevel.checkpoint()  # others get a turn
                reports = outbox.take()

    async def _publish_reports(self, reports: Sequence[Report]) -> None:
        """In order: events that lead to the same state as one batch."""
        drafts: list[Draft] = []
        try:
            for report in reports:
                if isinstance(report, Draft):
                    drafts.append(report)
                elif self.error is None:
                    await self._publish(drafts, **report)
                    drafts = []
            if drafts and self.error is None:
                await self._publish(drafts)
            if not self.run.outbox.finished:
                self._keep_time()
        except StreamerError as error:  # the run cannot be told of any further
            self._fail(error)

    async def _publish(
        self, drafts: Sequence[Draft], task: Task | None = None, **values: Any
    ) -> None:
        await self.broker.publish(drafts, task, **values)
        self._published += len(drafts)
        if task is not None:
            log_task(task)

    async def _conclude(self, outcome: Outcome) -> None:
        """Decides how it ended, once, and publishes that (guarantees 2, 6, 7)."""
        settings = self._engine.settings
        mode = self._engine.mode
        status, kind, message = self._verdict(outcome)
        values: dict[str, Any] = {"status": status, "current_agent": None, "waiting": None}
        values |= {"question": None, "completed_at": now()}
        drafts: list[Draft] = []
        if status is TaskStatus.SUCCEEDED:
            text = encode_payload(
                outcome.result or {}, settings.max_event_bytes, self._engine.secrets
            )
            result = json.loads(text)
            message = str(result.get("message") or _summary(result))
            drafts.append(self.run.draft(EventType.RESULT, {"message": message, **result}))
            values |= {"final_result": result, "progress": 1.0}
        if outcome.abandoned:
            self.abandoned = True
            message += f"; its thread did not stop within {settings.grace:g} s and was abandoned"
        drafts.append(self.run.draft(kind, {"message": message, "mode": mode}))
        message = drafts[-1].message
        if status is TaskStatus.FAILED:
            values["error_message"] = message
        try:
            await self._publish(drafts, self.broker.task.to(status, message), **values)
        except StreamerError as error:
            if self.error is None or isinstance(error, LeaseLost):
                self.error = error
            self.untold = message

    def _verdict(self, outcome: Outcome) -> tuple[TaskStatus, EventType, str]:
        """The status, the terminal event's type, and its message."""
        reason = self._stop_reason
        error = outcome.error
        if reason in (StopReason.CANCEL, StopReason.SHUTDOWN):
            return TaskStatus.CANCELLED, EventType.TASK_CANCELLED, reason.value
        if reason is None and isinstance(error, RunCancelled):
            word = error_text(error) or "cancelled by its runner"
            return TaskStatus.CANCELLED, EventType.TASK_CANCELLED, word
        if reason is StopReason.TIMEOUT:
            seconds = self.run.options["timeout"]
            error = RunFailed(f"timed out after {seconds:g} s (options.timeout)")
        elif reason is StopReason.STORE:
            error = RunFailed(f"the run was stopped: {self.error or reason.value}")
        elif error is None and not isinstance(outcome.result, Mapping | None):
            came = type(outcome.result).__name__
            error = RunFailed(f"the runner must return a mapping or None, not {came}")
        if error is None:
            return TaskStatus.SUCCEEDED, EventType.TASK_COMPLETE, ""
        message = reason_of(error)
        logger.info("task id=%s failed=%s", self.task_id, ascii(self.run.redact(message)))
        return TaskStatus.FAILED, EventType.TASK_ERROR, message


def log_task(task: Task) -> None:
    logger.info("task id=%s status=%s mode=%s", task.id, task.status, task.mode)


def _summary(result: Mapping[str, Any]) -> str:
    parts = [f"{len(result['files'])} files"] if isinstance(result.get("files"), list) else []
    parts += [f"{result['rounds']} rounds"] if "rounds" in result else []
    cost = result.get("cost")
    if isinstance(cost, dict) and cost.get("total_cost", 0) != 0:  # None: unknown
        parts.append(price_text(cost["total_cost"]))
    return ", ".join(parts) or "done"


# -----------------------------------------------------------------------------
# Supervisor
# -----------------------------------------------------------------------------


def task_id_of(key: str) -> str:
    """Of a request that may come again."""
    return uuid.uuid5(uuid.NAMESPACE_OID, key).hex


class Supervisor:
    """The registry of tasks: creates, starts, stops and forgets them, and knows who watches."""

    CANCEL_TRIES = 100  # a task that is about to change hands; each try takes 20 ms or longer

    def __init__(
        self,
        settings: Settings,
        store: Store,
        runner: Runner,
        warm_up: Callable[[], object] | None = None,
        secrets: Sequence[str] = (),
        teams: Collection[str] = (),
        mode: str = "custom",
    ) -> None:
        self.settings = settings
        self.store = store
        self.clients = 0
        self.abandoned = 0  # threads that went on when their run had ended
        self._totals: Counter[str] = Counter(
            dict.fromkeys(("events", "deliveries", "clients", "slow_clients", *COSTS.values()), 0)
        )
        self.engine = Engine(settings, runner, warm_up, secrets, teams, mode)
        self._brokers = Brokers(store, settings)
        self._active: dict[str, Execution] = {}
        self._untold: dict[str, str] = {}  # how a run ended, where that could not be stored
        self._deleting: set[str] = set()
        self._restarting = 0  # ended tasks that are about to be active
        self._client_left = anyio.Event()
        self._closing = False
        self._group: anyio.abc.TaskGroup

    @contextlib.asynccontextmanager
    async def open(self) -> AsyncIterator[None]:
        """The time the service lives; at its end every run is stopped and every client told.

        Comes once.
        """
        if self._closing:
            raise RuntimeError("this application has been closed; create_app makes another")
        async with self.store.opened(self._on_store), anyio.create_task_group() as self._group:
            self._group.start_soon(self.engine.load)
            self._group.start_soon(self._sweep)
            try:
                yield
            finally:
                await self.close()
                self._group.cancel_scope.cancel()

    async def close(self) -> None:
        """Cancels the runs and tells the clients, in about `grace` seconds; what waits for its
        turn stays PENDING.
        """
        if self._closing:
            return
        self._closing = True
        grace = self.settings.grace
        executions = list(self._active.values())
        for execution in executions:
            execution.stop(StopReason.SHUTDOWN, 0.7 * grace)
        with anyio.move_on_after(0.9 * grace):  # the store may be away
            for execution in executions:
                await execution.done.wait()
        for broker in self._brokers:
            resume = f"connect again with after={broker.state.last_event_id}"
            reason = f"the server is shutting down; {resume} when it is back"
            broker.close(ServerClosing(reason))
        with anyio.move_on_after(0.2 * grace):
            while self.clients:
                self._client_left = anyio.Event()
                await self._client_left.wait()

    def _on_store(self, error: str | None) -> None:
        logger.log(logging.INFO if error is None else logging.ERROR, "store error=%r", error)
        for broker in self._brokers:
            broker.show_store()

    async def _sweep(self) -> None:
        """Ends what other processes, or an earlier one, left unfinished (guarantee 9)."""
        logged = ""
        while True:
            try:
                sweep = await self.store.sweep()
                for task_id in sweep.expired:
                    self._group.start_soon(self._close_and_remove_files, task_id)
                for task_id in sweep.orphans:
                    if task_id not in self._active and not self._closing:
                        await self._take_over(task_id)
                logged = ""
            except StreamerError as error:
                if str(error) != logged:
                    logger.error("sweep error=%r", str(error))
                logged = str(error)
            await self.store.pause(self.settings.lease / 6)

    async def _take_over(self, task_id: str) -> None:
        """An orphan: a run that was cut off is FAILED; what waited for its turn gets one here."""
        cut_off = "interrupted by a restart or a failure of the server that ran it"
        reason = self._untold.get(task_id, cut_off)
        try:
            broker = await self._brokers.claim(task_id, {TaskStatus.RUNNING})
            if broker is None:
                await self.start(task_id)
            else:
                outcome = Outcome(error=RunFailed(reason))
                await self._execute(self._activate(broker), outcome)
        except (TooManyTasks, TaskEnded, TaskNotFound):
            return  # the next sweep sees it
        except StoreDamaged as error:  # of this task, and not of the others
            logger.error("task id=%s left=%r", task_id, str(error))

    @property
    def running(self) -> int:
        return sum(execution.running for execution in self._active.values())

    @property
    def waiting(self) -> int:
        return len(self._active) - self.running

    @property
    def totals(self) -> Mapping[str, float]:
        """What was counted since the start; costs as far as they are known."""
        totals = Counter(self._totals)
        for broker in self._brokers:
            for subscription in broker.subscriptions:
                totals["deliveries"] += subscription.delivered
        for execution in self._active.values():
            totals.update(execution.totals)
        return totals

    # What clients ask for. All of it raises TaskNotFound.

    async def submit(
        self,
        prompt: str,
        title: str | None,
        options: Mapping[str, Any],
        key: str | None = None,
        origin: Origin | None = None,
    ) -> tuple[Task, bool]:
        """A PENDING task, and whether it is new: a key that was used gives its task again.

        Raises IdempotencyConflict where the key came with another request, TooManyTasks.
        """
        self._refuse_if_closing()
        task_id = uuid.uuid4().hex if key is None else task_id_of(key)
        task = Task(
            id=task_id,
            title=title,
            input_prompt=prompt,
            mode=self.engine.mode,
            options=options,
            origin=origin,
        )
        try:
            forgotten = await self.store.create(task)
        except TaskExists:
            task = await self.get(task_id)
            if (task.input_prompt, task.title, task.options) != (prompt, title, options):
                conflict = "this Idempotency-Key was used for a different request"
                raise IdempotencyConflict(conflict) from None
            return task, False
        log_task(task)
        for each in forgotten:
            await self._close_and_remove_files(each)
        return task, True

    async def start(self, task_id: str, restart: bool = False) -> Task:
        """Starts a PENDING task; does nothing to a started one. `restart` runs a FAILED or
        CANCELLED one again.

        Raises TaskEnded, TooManyTasks.
        """
        execution = self._active.get(task_id)
        if execution is not None:
            return execution.broker.task
        startable = {TaskStatus.PENDING, *(RESTARTABLE if restart else ())}
        with anyio.CancelScope(shield=True):  # a claim that nobody takes up would stay
            broker = await self._brokers.claim(task_id, startable)
            if broker is not None:
                await self._start_claimed(broker)
                return broker.task
        task = await self.get(task_id)
        if task.status in ENDED and task.status not in startable:
            again = "; POST …/run?restart=true runs it again" if task.status in RESTARTABLE else ""
            raise TaskEnded(f"task {task_id} has ended ({task.status}){again}")
        return task  # it runs, or somebody is about to start it

    async def _start_claimed(self, broker: Broker) -> None:
        try:
            self._check_room(broker.task.id)
            if broker.ended:
                self._restarting += 1
                try:
                    await broker.publish(task=broker.task.to(TaskStatus.PENDING), again=True)
                finally:
                    self._restarting -= 1
                self._check_room(broker.task.id)  # it may be deleted meanwhile
        except StreamerError:
            await broker.let_go()
            self._follow(broker)
            self._brokers.drop_unused(broker)
            raise
        self._group.start_soon(self._execute, self._activate(broker))

    def _check_room(self, task_id: str) -> None:
        self._refuse_if_closing()
        if task_id in self._deleting:
            raise TaskNotFound(f"task {task_id} not found: it is being deleted")
        started = len(self._active) + self._restarting
        if started >= self.settings.max_running + self.settings.max_waiting:
            limit = f"{self.waiting} tasks wait for a slot, as many as max_waiting allows"
            raise TooManyTasks(f"{limit}; try again later")

    async def cancel(self, task_id: str) -> Task:
        """Stops a task, started or not, wherever it runs. Raises TaskEnded."""
        asked = False
        for _ in range(self.CANCEL_TRIES):
            execution = self._active.get(task_id)
            task = await self.get(task_id)
            if execution is not None:
                if execution.stop(StopReason.CANCEL):
                    return task
                await execution.done.wait()  # its end is stored, or another is to run it
                continue
            self._refuse_if_closing()
            if asked and task.status is TaskStatus.CANCELLED:
                return task
            if task.status in ENDED:
                ended = f"task {task_id} has ended ({task.status})"
                raise TaskEnded(f"{ended}: there is nothing to cancel")
            with anyio.CancelScope(shield=True):
                broker = await self._brokers.claim(task_id, {TaskStatus.PENDING})
                if broker is not None:
                    return await self._cancel_claimed(broker)
            if self.store.error is not None:
                raise StoreUnavailable(self.store.error)
            if await self.store.cancel(task_id):
                return await self.get(task_id)
            asked = True
        raise StoreUnavailable(f"whoever runs task {task_id} does not answer; try again")

    async def _cancel_claimed(self, broker: Broker) -> Task:
        execution = self._activate(broker)
        execution.stop(StopReason.CANCEL)
        self._group.start_soon(self._execute, execution, Outcome())
        await execution.done.wait()
        if execution.error is not None:
            raise execution.error
        return broker.task

    async def answer(
        self, task_id: str, question_id: str, text: str, message_id: str | None = None
    ) -> int:
        """Answers the question that a task asks now, wherever it runs; the number of its event.

        Raises QuestionClosed, and InvalidRequest where its choices are others.
        """
        question = (await self.state(task_id)).question
        if question is not None and question["question_id"] == question_id:
            answer = AnswerGiven(question_id, chosen(question, text), message_id)
            execution = self._active.get(task_id)
            if execution is not None:
                taken = execution.run.answer(answer)
            else:
                taken = await self.store.answer(task_id, answer)
            if taken:
                return int(question["event_id"])
        ways = "it was answered, or the run that asked it has ended"
        raise QuestionClosed(
            f"question {quoted(question_id)} of task {task_id} is not open: {ways}"
        )

    async def delete(self, task_id: str) -> None:
        """Stops a task, forgets it, its log and its workspace, and tells its clients."""
        task = await self.get(task_id)
        self._deleting.add(task_id)  # no restart comes between the end of its run and this
        try:
            execution = self._active.get(task_id)
            if execution is not None:
                execution.stop(StopReason.CANCEL)
                await execution.done.wait()
            elif task.status is TaskStatus.RUNNING:
                await self.store.cancel(task_id)
            await self._remove_files(task_id)  # a full disk may need its room to forget it
            await self.store.forget(task_id)
            await self._close_and_remove_files(task_id)
        finally:
            self._deleting.discard(task_id)

    async def get(self, task_id: str) -> Task:
        return (await self.record(task_id)).task

    async def state(self, task_id: str) -> TaskState:
        return (await self.record(task_id)).state

    async def record(self, task_id: str) -> Record:
        """As its run has it here, or else as it is stored."""
        execution = self._active.get(task_id)
        if execution is None:
            return await self.store.load(task_id)
        broker = execution.broker
        return Record(broker.task, broker.state, broker.first_event_id)

    def check_clients(self) -> None:
        """Whether one more can watch. Raises TooManyClients, ServerClosing."""
        self._refuse_if_closing()
        if self.clients >= self.settings.max_sockets:
            limit = f"{self.clients} clients watch already, the limit (max_sockets)"
            raise TooManyClients(f"{limit}; try again later")

    @contextlib.asynccontextmanager
    async def watch(
        self, task_id: str, after: int = 0, types: frozenset[EventType] | None = None
    ) -> AsyncIterator[Subscription]:
        """A client's subscription while it is connected. Raises TooManyClients."""
        self.check_clients()
        self.clients += 1
        try:
            broker = await self._brokers.get(task_id)
            try:
                execution = self._active.get(task_id)
                if execution is not None and execution.error is not None:
                    uncertain = f"{execution.error}; try again"  # what it has stored
                    raise StoreUnavailable(uncertain)
                subscription = broker.subscribe(after, types)
                with self._counted(subscription, after):
                    await subscription.begin()
                    self._follow(broker)
                    yield subscription
            finally:
                self._brokers.drop_unused(broker)
        finally:
            self.clients -= 1
            self._client_left.set()

    @contextlib.contextmanager
    def _counted(self, subscription: Subscription, after: int) -> Iterator[None]:
        self._totals["clients"] += 1
        outcome = "left"
        try:
            yield
            outcome = "served"
        except StreamerError as error:
            outcome = error.code
            self._totals["slow_clients"] += isinstance(error, SlowClient)
            raise
        finally:
            subscription.close()
            self._totals["deliveries"] += subscription.delivered
            text = "client task=%s after=%d events=%d outcome=%s"
            task_id = subscription.broker.task.id
            logger.info(text, task_id, after, subscription.delivered, outcome)

    def _refuse_if_closing(self) -> None:
        if self._closing:
            raise ServerClosing("the server is shutting down; try again when it is back")

    def _activate(self, broker: Broker) -> Execution:
        execution = Execution(broker, self.engine)
        self._active[broker.task.id] = execution
        self._untold.pop(broker.task.id, None)
        return execution

    async def _execute(self, execution: Execution, outcome: Outcome | None = None) -> None:
        broker = execution.broker
        try:
            await execution.live(outcome)
        finally:
            del self._active[execution.task_id]
            self._totals.update(execution.totals)
            self.abandoned += execution.abandoned
        error = execution.error
        if isinstance(error, LeaseLost | TaskNotFound):
            self._follow(broker)  # its end is somebody else's to tell
        elif error is not None and not broker.ended:
            if execution.untold is not None:
                self._untold[execution.task_id] = execution.untold
            resume = f"connect again with after={broker.state.last_event_id}"
            broker.close(StoreUnavailable(f"the run was stopped: {error}; {resume}"))
        self._brokers.drop_unused(broker)

    def _follow(self, broker: Broker) -> None:
        if broker.subscriptions and broker.claim is None and not broker.ended:
            self._group.start_soon(self._following, broker)

    async def _following(self, broker: Broker) -> None:
        try:
            await broker.follow()
        except TaskDeleted:
            await self._close_and_remove_files(broker.task.id)
        except TaskNotFound:
            lost = f"task {broker.task.id} not found: {self.store.LOST}; its files are kept"
            self._brokers.close(broker.task.id, TaskNotFound(lost))

    async def _close_and_remove_files(self, task_id: str) -> None:
        """Of a task that is forgotten."""
        self._untold.pop(task_id, None)
        self._brokers.close(task_id, self.store.deleted(task_id))
        await self._remove_files(task_id)

    async def _remove_files(self, task_id: str) -> None:
        folder = self.settings.workspace / task_id
        await anyio.to_thread.run_sync(partial(shutil.rmtree, folder, ignore_errors=True))
        if folder.exists():  # as without a descriptor left
            logger.warning("task id=%s files left=%s", task_id, ascii(str(folder)))


# -----------------------------------------------------------------------------
# Routes
# -----------------------------------------------------------------------------


class JSONLine(JSONResponse):
    """JSON that ends its line, so that a shell's prompt does not stand behind it."""

    def render(self, content: Any) -> bytes:
        return super().render(content) + b"\n"


def _supervisor(connection: HTTPConnection) -> Supervisor:
    supervisor: Supervisor = connection.app.state.supervisor
    return supervisor


TASK_PATH = "/api/tasks/{task_id}"
NO_PATH = "/{path:path}"  # any other than those there are
MOST_TITLE = 200  # characters
MOST_QUESTION_ID = 64
NOTHING: Mapping[str, Parameter] = {}
PATH_PART = Parameter(None, "part of the path", {"type": "string"})
EVENT_TYPES = Parameter(
    [],
    f"some of {','.join(EventType)}",
    {"type": "array", "items": {"type": "string", "enum": [*EventType]}},
)
STREAM = {"after": whole_number(0), "types": EVENT_TYPES}
SOCKET = {**STREAM, "start": switch(True)}
EVENTS = {**STREAM, "limit": whole_number(1000, 1, 1000), "start": switch(False)}
LOG_TYPES = ("application/json", "text/event-stream")
FILE_TYPES = ("text/plain", "application/octet-stream")
IDEMPOTENCY = {
    "Idempotency-Key": Parameter(None, "1 to 255 characters", {"type": "string", "maxLength": 255})
}
PAGING = {
    "page": whole_number(1, 1, 10**9),
    "page_size": whole_number(10, 1, 100),
    "status": Parameter(
        None, f"one of {', '.join(TaskStatus)}", {"type": "string", "enum": [*TaskStatus]}
    ),
}


def parse_query(params: QueryParams, known: Mapping[str, Parameter]) -> dict[str, Any]:
    """Raises InvalidRequest. The token is no parameter: who lets clients in has looked at it."""
    refuse_unknown(set(params) - {"token"}, known, "query")
    return parse_texts(params, known)


def parse_texts(given: Mapping[str, str], known: Mapping[str, Parameter]) -> dict[str, Any]:
    """Each parameter's value, or its default where nothing came. Raises InvalidRequest."""
    values = {}
    for name, parameter in known.items():
        values[name] = parameter.default
        text = given.get(name)
        if text is None:
            continue
        try:
            values[name] = parameter.parse(text)
        except ValueError:
            raise InvalidRequest(f"{name} must be {parameter.words}, not {quoted(text)}") from None
    return values


def wanted_types(names: Sequence[str]) -> frozenset[EventType] | None:
    """None for all."""
    return frozenset(map(EventType, names)) or None


class Operation(NamedTuple):
    """A route of the API: it hands its handler the parameters, and /openapi.json describes it."""

    method: str
    path: str
    handler: Callable[..., Awaitable[Response]]
    statuses: Sequence[int] = (200,)
    answer: type | None = None  # the class of what it answers, where it has one
    query: Mapping[str, Parameter] = NOTHING
    headers: Mapping[str, Parameter] = NOTHING
    body: Callable[[Supervisor], Mapping[str, Any]] | None = None  # the schema of what it takes
    media_types: Sequence[str] = ("application/json",)

    def route(self) -> Route:
        name = self.handler.__name__
        return Route(self.path, self.respond, methods=[self.method], name=name)

    async def respond(self, request: Request) -> Response:
        values = parse_query(request.query_params, self.query)
        for name, value in parse_texts(request.headers, self.headers).items():
            values[name.lower().replace("-", "_")] = value
        return await self.handler(request, **values)

    def described(self, supervisor: Supervisor) -> dict[str, Any]:
        """By OpenAPI 3.1."""
        path = dict.fromkeys(re.findall(r"{(\w+)", self.path), PATH_PART)
        places = {"path": path, "query": self.query, "header": self.headers}
        parameters = [
            {
                "name": name,
                "in": place,
                "required": place == "path",
                "schema": parameter.described(),
                "explode": False,
            }
            for place, known in places.items()
            for name, parameter in known.items()
        ]
        schema = schema_of(self.answer) if self.answer else {}
        content = {each: {"schema": schema} for each in self.media_types}
        responses: dict[str, Any] = {"default": {"description": "an error: its code and message"}}
        for status in self.statuses:
            given = {} if status == 204 else content
            responses[str(status)] = {"description": HTTPStatus(status).phrase, "content": given}
        operation: dict[str, Any] = {
            "operationId": self.handler.__name__,
            "description": inspect.getdoc(self.handler),
            "parameters": parameters,
            "responses": responses,
        }
        if self.body is not None:
            taken = {"application/json": {"schema": self.body(supervisor)}}
            operation["requestBody"] = {"required": True, "content": taken}
        return operation


def schema_of(kind: type) -> dict[str, Any]:
    """Of what clients are sent of a class, by its annotations."""
    names = {each: name for name, (*_, each) in JSON_KINDS.items()}
    names |= {TaskStatus: "string", Mapping[str, Any]: "object", types.NoneType: "null"}
    properties = {}
    for name, hint in get_type_hints(kind).items():
        if name not in NOT_SENT:
            kinds = [hint] if hint in names else get_args(hint)
            properties[name] = {"type": [names[each] for each in kinds]}
    return {"type": "object", "title": kind.__name__, "properties": properties}


def check_access(connection: HTTPConnection) -> None:
    """Who may come in: by this service's names, from pages it knows, with the token.

    Web pages anywhere can make a browser on this machine send requests here: `Host` stops those
    whose own name was made to point here (DNS rebinding), `Origin` all others. Raises
    MisdirectedRequest, Forbidden, Unauthorized.
    """
    settings = _supervisor(connection).settings
    host = _check_host(connection, settings)
    _check_origin(connection, settings, host)
    if settings.token:
        _check_token(connection, settings.token)


def _check_host(connection: HTTPConnection, settings: Settings) -> tuple[str, int | None]:
    hosts = connection.headers.getlist("host")
    host = parse_host(hosts[0]) if len(hosts) == 1 else None
    if _path(connection) == "/healthz":  # Kubernetes asks by an address that nobody knows before
        return host or ("", None)
    if host is None or not (is_loopback(host[0]) or host[0] in settings.names):
        name = quoted(", ".join(hosts))
        raise MisdirectedRequest(
            f"Host {name} is not a name of this service; allowed_hosts names them"
        )
    return host


def _path(connection: HTTPConnection) -> str:
    path: str = connection.scope["path"]
    return path.removeprefix(connection.scope.get("root_path", ""))


def _check_origin(
    connection: HTTPConnection, settings: Settings, host: tuple[str, int | None]
) -> None:
    for text in connection.headers.getlist("origin"):
        origin = parse_origin(text)
        if origin in settings.origins:
            continue
        if origin is None or origin[1:] != (host[0], host[1] or DEFAULT_PORTS[origin[0]]):
            raise Forbidden(
                f"Origin {quoted(text)} is not allowed; allowed_origins names those that are"
            )


def _check_token(connection: HTTPConnection, token: str) -> None:
    path = _path(connection)
    if path in ("/", "/healthz"):
        return
    scheme, _, given = connection.headers.get("authorization", "").partition(" ")
    # A browser opens sockets and event streams without a header.
    opened = connection.scope["type"] == "websocket"
    opened = opened or re.fullmatch("/api/tasks/[^/]+/events", path) is not None
    if opened and "token" in connection.query_params:
        scheme = "bearer"
        given = connection.query_params["token"]
    if scheme.lower() != "bearer" or not hmac.compare_digest(given.encode(), token.encode()):
        ways = "the header `Authorization: Bearer …`, or `?token=` in a browser"
        raise Unauthorized(f"a token is needed: {ways}")


async def _json_object(
    request: Request, settings: Settings, most_bytes: int | None = None
) -> dict[str, Any]:
    """Raises UnsupportedMediaType, PayloadTooLarge, RequestTimeout, InvalidRequest."""
    media_type = request.headers.get("content-type", "").split(";")[0].strip().lower()
    if media_type != "application/json":
        raise UnsupportedMediaType(
            f"Content-Type must be application/json, not {quoted(media_type)}"
        )
    # JSON may take twelve bytes for a character: two escaped surrogates.
    most_bytes = most_bytes or 12 * settings.max_prompt + 65536
    body = await _read_body(request, most_bytes, settings.send_timeout)
    try:
        value = json.loads(body, parse_constant=_refuse_constant)
    except (ValueError, RecursionError) as error:
        raise InvalidRequest(f"the body must be JSON: {str(error)[:200]}") from None
    if not isinstance(value, dict):
        raise InvalidRequest(f"the body must be an object, not {kind_of(value)}")
    return value


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is none")


async def _read_body(request: Request, limit: int, seconds: float) -> bytes:
    body = bytearray()
    try:
        with anyio.fail_after(seconds):
            async for chunk in request.stream():
                body += chunk
                if len(body) > limit:
                    raise PayloadTooLarge(f"the body must be at most {limit} bytes")
    except TimeoutError:
        raise RequestTimeout(f"the body did not come within {seconds:g} s") from None
    except ClientDisconnect:
        raise InvalidRequest("the client went away before its body had come") from None
    return bytes(body)


def parse_text(body: Mapping[str, Any], name: str, longest: int) -> str:
    """Raises InvalidRequest."""
    if name not in body:
        raise InvalidRequest(f"{name} is missing")
    value = body[name]
    if not isinstance(value, str):
        raise InvalidRequest(f"{name} must be a string, not {kind_of(value)}")
    if not value.strip() or len(value) > longest:
        words = f"1 to {longest} characters, not only blanks"
        raise InvalidRequest(f"{name} must be {words}; it has {len(value)}")
    if not value.isascii() and re.search("[\ud800-\udfff]", value):
        raise InvalidRequest(f"{name} must be Unicode text; it holds an unpaired surrogate")
    return value


def text_schema(longest: int) -> dict[str, Any]:
    """Of what parse_text takes."""
    return {"type": "string", "minLength": 1, "maxLength": longest, "pattern": r"\S"}


def object_schema(properties: Mapping[str, Any], *required: str) -> dict[str, Any]:
    closed = {"type": "object", "additionalProperties": False}
    return {**closed, "properties": properties, "required": required}


def task_schema(supervisor: Supervisor) -> dict[str, Any]:
    settings = supervisor.settings
    teams = supervisor.engine.teams
    options = {
        name: {**option.described(), "type": [option.schema["type"], "null"]}
        for name, option in OPTIONS.items()
    }
    options["timeout"]["maximum"] = settings.task_timeout
    options["team"]["enum"] = [*teams, None]
    if not teams:
        options["approve"]["items"] = {"type": "string", "enum": APPROVABLE}
    fields = {
        "input_prompt": text_schema(settings.max_prompt),
        "title": {**text_schema(MOST_TITLE), "type": ["string", "null"]},
        "options": object_schema(options),
    }
    return object_schema(fields, "input_prompt")


def parse_task(
    body: Mapping[str, Any], settings: Settings, teams: Collection[str]
) -> tuple[str, str | None, dict[str, Any]]:
    """Prompt, title and options. Raises InvalidRequest, Forbidden."""
    refuse_unknown(body, ("input_prompt", "title", "options"), "body")
    prompt = parse_text(body, "input_prompt", settings.max_prompt)
    title = None
    if body.get("title") is not None:
        title = parse_text(body, "title", MOST_TITLE)
    options = parse_options(body.get("options", {}), settings.task_timeout, teams=teams)
    if options["run_tests"] and not settings.allow_run_tests:
        how = "a server started with --allow-run-tests does it"
        raise Forbidden(f"options.run_tests executes what the model wrote; {how}")
    return prompt, title, options


def answer_schema(supervisor: Supervisor) -> dict[str, Any]:
    answer = text_schema(supervisor.settings.max_prompt)
    fields = {"question_id": text_schema(MOST_QUESTION_ID), "answer": answer}
    return object_schema(fields, *fields)


def parse_answer(body: Mapping[str, Any], settings: Settings) -> tuple[str, str]:
    """The question's id, and the text. Raises InvalidRequest."""
    question_id = parse_text(body, "question_id", MOST_QUESTION_ID)
    return question_id, parse_text(body, "answer", settings.max_prompt)


async def create_task(request: Request, idempotency_key: str | None) -> Response:
    """Creates a task, which is not started. The same Idempotency-Key gives the same task again."""
    supervisor = _supervisor(request)
    body = await _json_object(request, supervisor.settings)
    prompt, title, options = parse_task(body, supervisor.settings, supervisor.engine.teams)
    task, created = await supervisor.submit(prompt, title, options, idempotency_key)
    location = request.url_for("get_task", task_id=task.id).path
    return JSONLine(task.as_dict(), 201 if created else 200, {"Location": location})


async def list_tasks(request: Request, page: int, page_size: int, status: str | None) -> Response:
    """Tasks, newest first."""
    wanted = None if status is None else TaskStatus(status)
    first = (page - 1) * page_size
    tasks, total = await _supervisor(request).store.page(wanted, first, page_size)
    answer = {
        "items": [task.as_dict() for task in tasks],
        "total": total,
        "page": page,
        "page_size": page_size,
        "total_pages": math.ceil(total / page_size),
    }
    return JSONLine(answer)


async def get_task(request: Request) -> Response:
    """A task."""
    task = await _supervisor(request).get(request.path_params["task_id"])
    return JSONLine(task.as_dict())


async def delete_task(request: Request) -> Response:
    """Cancels a task and deletes it, with its log and its files."""
    await _supervisor(request).delete(request.path_params["task_id"])
    return Response(status_code=204)


async def get_state(request: Request) -> Response:
    """Where a task is now."""
    supervisor = _supervisor(request)
    state = await supervisor.state(request.path_params["task_id"])
    return JSONLine(supervisor.store.state_data(state))


async def run_task(request: Request, restart: bool) -> Response:
    """Starts a task; `restart` runs one again that has failed or was cancelled."""
    task = await _supervisor(request).start(request.path_params["task_id"], restart)
    return JSONLine(task.as_dict(), 202)


async def cancel_task(request: Request) -> Response:
    """Stops a task."""
    task = await _supervisor(request).cancel(request.path_params["task_id"])
    return JSONLine(task.as_dict(), 202)


async def answer_question(request: Request) -> Response:
    """Answers the question that the team asks; the first answer counts."""
    supervisor = _supervisor(request)
    task_id = request.path_params["task_id"]
    body = await _json_object(request, supervisor.settings)
    refuse_unknown(body, ("question_id", "answer"), "body")
    await supervisor.answer(task_id, *parse_answer(body, supervisor.settings))
    return JSONLine((await supervisor.get(task_id)).as_dict(), 202)


async def get_events(
    request: Request, after: int, types: Sequence[str], limit: int, start: bool
) -> Response:
    """A page of the log, which says what is `missing` where events are not kept any more; the live
    stream for a client that accepts text/event-stream, which with `start` runs a task that was not
    started, and goes on after the header Last-Event-ID.
    """
    resume = request.headers.get("last-event-id")
    if resume:
        after = parse_texts({"after": resume}, STREAM)["after"]
    supervisor = _supervisor(request)
    task_id = request.path_params["task_id"]
    kinds = wanted_types(types)
    state = await supervisor.state(task_id)
    if "text/event-stream" in request.headers.get("accept", ""):
        if request.method == "HEAD":
            return Response(media_type=EventStream.media_type)
        if start and state.status is TaskStatus.PENDING:
            await supervisor.start(task_id)
        # Any status but 200 keeps an EventSource from connecting again; other clients of its kind
        # do so until they have read a stream to its end, which a 204 would not be.
        has_all = state.status in ENDED and after >= state.last_event_id
        status = 208 if resume and has_all else 200
        return EventStream(supervisor.watch(task_id, after, kinds), status_code=status)
    events = await supervisor.store.read(task_id, after, limit)
    last = events[-1].id if events else state.last_event_id
    wanted = [event.data for event in events if kinds is None or event.type in kinds]
    more = encode(last < state.last_event_id)
    found = b",".join(wanted).decode()
    text = f'{{"events":[{found}],"last_event_id":{last},"has_more":{more}'
    first = events[0].id if events else last + 1
    if first > after + 1:  # dropped, or lost by the store
        text += f',"missing":[{after + 1},{first - 1}]'
    return Response(text + "}\n", media_type="application/json")


async def list_artifacts(request: Request) -> Response:
    """The files that the team wrote, without hidden ones and links."""
    supervisor = _supervisor(request)
    task = await supervisor.get(request.path_params["task_id"])
    root = supervisor.settings.workspace / task.id
    files = await anyio.to_thread.run_sync(list, list_files(root))
    answer = [
        {"path": path, "size": size, "modified": now(modified / 1e9)}
        for path, size, modified in files
    ]
    return JSONLine(answer)


async def get_artifact(request: Request) -> Response:
    """One file the team wrote: as plain text where it is text, as a download where not."""
    supervisor = _supervisor(request)
    task = await supervisor.get(request.path_params["task_id"])
    path = request.path_params["path"]
    root = supervisor.settings.workspace / task.id
    file = await anyio.to_thread.run_sync(open_inside, root, path)
    if file is None:
        what_is = f"GET /api/tasks/{task.id}/artifacts lists what is"
        raise ArtifactNotFound(f"artifact {quoted(path)} not found; {what_is}")
    if _is_text(file):
        return OpenedFile(file, media_type="text/plain; charset=utf-8")
    return OpenedFile(file, filename=Path(path).name, media_type="application/octet-stream")


def _is_text(file: SizedFile) -> bool:
    try:
        codecs.getincrementaldecoder("utf-8")().decode(os.pread(file.fileno(), 65536, 0))
    except UnicodeDecodeError:
        return False
    return True


async def get_zip(request: Request) -> Response:
    """All that the team wrote."""
    supervisor = _supervisor(request)
    task = await supervisor.get(request.path_params["task_id"])
    file = await anyio.to_thread.run_sync(zip_files, supervisor.settings.workspace / task.id)
    return OpenedFile(file, filename=f"{task.id}.zip", media_type="application/zip")


class SizedFile(io.FileIO):
    """A file that ends where it ended when it was opened, whatever is written to it since."""

    def __init__(self, file: Path | int) -> None:
        # A FIFO would be waited for; a terminal would become this process's.
        flags = os.O_NONBLOCK | os.O_NOCTTY
        super().__init__(file, opener=lambda path, mode: os.open(path, mode | flags))
        self.status = os.fstat(self.fileno())

    def read(self, size: int | None = -1, /) -> bytes:
        """Raises FileChanged where it became shorter."""
        left = max(0, self.status.st_size - self.tell())
        wanted = left if size is None or size < 0 else min(size, left)
        data: bytes = super().read(wanted)
        if len(data) < wanted:
            raise FileChanged("the file became shorter while it was read; try again")
        return data


class OpenedFile(FileResponse):
    """A file that is open already: whatever its name means by now, this is what was looked at."""

    def __init__(self, file: SizedFile, **kwargs: Any) -> None:
        self._file = file
        modified = min(max(file.status.st_mtime, DATES[0]), DATES[1])
        status: Any = types.SimpleNamespace(st_size=file.status.st_size, st_mtime=modified)
        super().__init__(f"/dev/fd/{file.fileno()}", stat_result=status, **kwargs)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        with self._file:
            try:
                await super().__call__(scope, receive, send)
            except FileChanged as error:  # its length was told
                logger.warning("download path=%s cut=%r", ascii(scope["path"]), str(error))
                await cut_off(scope, receive)

    @contextlib.asynccontextmanager
    async def _open_file(self) -> AsyncIterator[anyio.AsyncFile[bytes]]:
        """What Starlette reads from."""
        yield anyio.wrap_file(self._file)


def open_inside(root: Path, path: str) -> SizedFile | None:
    """A regular file below `root` that is shown.

    None for what is not, and for a link, even if it is swapped meanwhile. Raises OSError where it
    cannot be known, as without a descriptor left.
    """
    if Path(path).is_absolute() or not all(map(is_shown, Path(path).parts)):
        return None
    with contextlib.ExitStack() as stack:
        try:
            file = stack.enter_context(SizedFile(root / path))
            named = Path(os.path.realpath(root / path, strict=True))
            same = os.path.samestat(file.status, named.lstat())
            if same and named == root.resolve() / path and stat.S_ISREG(file.status.st_mode):
                stack.pop_all()
                return file
        except OSError as error:
            pass_over(error)
    return None


def zip_files(root: Path) -> SizedFile:
    """The files below `root`, as a zip in a file without a name, which goes when it is closed."""
    root.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryFile(dir=root.parent) as made:
        with zipfile.ZipFile(made, "w") as archive:
            for path, _, modified in list_files(root):
                file = open_inside(root, path)
                if file is None:  # deleted since it was listed
                    continue
                # A zip's time is from 1980 to 2107.
                seconds = min(max(modified / 1e9, 315532800), 4354819198)
                entry = zipfile.ZipInfo(path, time.gmtime(seconds)[:6])
                entry.compress_type = zipfile.ZIP_DEFLATED
                with file, archive.open(entry, "w", force_zip64=True) as target:
                    shutil.copyfileobj(file, target)
        made.seek(0)
        return SizedFile(os.dup(made.fileno()))


async def _count(store: Store) -> Mapping[TaskStatus, int]:
    """How many tasks there are by status; none where the store is away or slow to say."""
    with anyio.move_on_after(1), contextlib.suppress(StoreUnavailable):
        return await store.count()
    return {}


async def get_health(request: Request) -> Response:
    """Whether the server, its engine and its store work, and how much there is to do."""
    supervisor = _supervisor(request)
    tasks = await _count(supervisor.store)
    healthy = not supervisor.engine.error and not supervisor.store.error
    answer = {
        "status": "ok" if healthy else "error",
        "mode": supervisor.engine.mode,
        "store": supervisor.store.error or supervisor.store.warning or "ok",
        "engine": supervisor.engine.status,
        "teams": list(supervisor.engine.teams),
        "running": supervisor.running,
        "waiting": supervisor.waiting,
        "clients": supervisor.clients,
        "abandoned": supervisor.abandoned,
        "tasks": dict(tasks),
    }
    return JSONLine(answer, 200 if healthy else 503)


async def get_metrics(request: Request) -> Response:
    """Prometheus text exposition format 0.0.4."""
    supervisor = _supervisor(request)
    tasks = await _count(supervisor.store)
    lines = ["# TYPE streamer_tasks gauge"]
    for status in TaskStatus:
        lines.append(f'streamer_tasks{{status="{status}"}} {tasks.get(status, 0)}')
    gauges = {
        "running": supervisor.running,
        "waiting": supervisor.waiting,
        "clients": supervisor.clients,
        "store_up": int(supervisor.store.error is None),
    }
    for name, value in gauges.items():
        lines += [f"# TYPE streamer_{name} gauge", f"streamer_{name} {value}"]
    for name, total in supervisor.totals.items():
        lines += [f"# TYPE streamer_{name}_total counter", f"streamer_{name}_total {total}"]
    return PlainTextResponse("\n".join(lines) + "\n", media_type="text/plain; version=0.0.4")


async def get_page(request: Request) -> Response:
    nonce = uuid.uuid4().hex
    headers = {"Content-Security-Policy": PAGE_POLICY.replace("NONCE", nonce)}
    return HTMLResponse(PAGE.replace("NONCE", nonce), headers=headers)


def connected_message(subscription: Subscription, starts: bool = False) -> str:
    """`starts`: its client is about to start a task that was not."""
    broker = subscription.broker
    task = broker.task
    note = " (test mode: a scripted team)" if task.mode == "test" else ""
    state = broker.state
    untouched = broker.claim is None and state.last_message is None and not state.last_event_id
    if untouched and not starts and task.status is TaskStatus.PENDING:
        note += f"; not started: POST /api/tasks/{task.id}/run, or connect with start=true"
    data = {
        "task_id": task.id,
        "message": f"watching {quoted(task.headline)}{note}",
        "mode": task.mode,
        "status": task.status,
        "first_event_id": subscription.first_event_id,
        "last_event_id": state.last_event_id,
        "recovered": subscription.recovered,
    }
    return envelope("connected", data)


FRAMES = "streamer.frames"  # the ASGI extension of FrameProtocol
ABORT = "streamer.abort"  # the one of AbortProtocol


def _extension(scope: Scope, name: str) -> Mapping[str, Callable[..., Any]]:
    """What the server offers by that name: nothing, where it is another server."""
    offered: Mapping[str, Callable[..., Any]] = scope.get("extensions", {}).get(name, {})
    return offered


async def cut_off(scope: Scope, receive: Receive) -> None:
    """Ends a connection in the middle of an answer, where the server offers that."""
    abort = _extension(scope, ABORT).get("abort")
    if abort is not None:
        abort()
        with anyio.move_on_after(1):  # until the server sees it, and misses no answer
            while (await receive())["type"] != "http.disconnect":
                pass


class EventStream(StreamingResponse):
    """The SSE twin of the socket: the same messages, and events with the id to resume from."""

    media_type = "text/event-stream"
    # no-transform: a proxy that compresses would hold back what is too little to be worth it.
    HEADERS: ClassVar[Mapping[str, str]] = {
        "Cache-Control": "no-cache, no-transform",
        "X-Accel-Buffering": "no",
    }

    def __init__(
        self,
        watching: contextlib.AbstractAsyncContextManager[Subscription],
        headers: Mapping[str, str] | None = None,
        status_code: int = 200,
    ) -> None:
        self._watching = watching
        super().__init__((), status_code, {**self.HEADERS, **(headers or {})})

    async def stream_response(self, send: Send) -> None:
        async with self._watching as subscription:
            self.body_iterator = self._messages(subscription)
            await super().stream_response(send)

    async def _messages(self, subscription: Subscription) -> AsyncIterator[str]:
        yield f"data: {connected_message(subscription)}\n\n"
        try:
            async for delivery in subscription:
                yield delivery.server_sent
        except StreamerError as error:
            yield f"data: {envelope('error', error.as_dict())}\n\n"


class SocketStream:
    """A Starlette endpoint: a task's stream to one WebSocket client, and what the client says.

    Refusals accept first, since a browser cannot read the status of a failed handshake.
    """

    def __init__(self, scope: Scope, receive: Receive, send: Send) -> None:
        self._websocket = WebSocket(scope, receive, send)
        self._supervisor = _supervisor(self._websocket)
        self._frames = _extension(scope, FRAMES)
        self._subscription: Subscription

    def __await__(self) -> Generator[Any, None, None]:
        return self._serve().__await__()

    async def _serve(self) -> None:
        refusal: StreamerError | None = None
        try:
            # While there are headers, and by another object: an idle socket keeps none.
            check_access(HTTPConnection(self._websocket.scope))
        except StreamerError as error:
            refusal = error
        # A browser ends a connection where it offered subprotocols, and none was chosen.
        offered = self._websocket.scope.get("subprotocols", ())
        await self._websocket.accept(next(iter(offered), None))
        try:
            if refusal is not None:
                raise refusal
            await self._stream()
            status = self._subscription.broker.task.status
            await self._websocket.close(1000, f"the task has ended: {status}")
        except (WebSocketDisconnect, WebSocketDisconnected):  # seen by who listens, or who sends
            return
        except StreamerError as error:
            await self._end(error)

    async def _stream(self) -> None:
        start, watching = self._parse()
        async with watching as self._subscription:
            await self._converse(start)

    def _parse(self) -> tuple[bool, contextlib.AbstractAsyncContextManager[Subscription]]:
        connection = HTTPConnection(self._websocket.scope)  # an idle socket keeps no query
        if "task_id" not in connection.path_params:
            raise PathNotFound(f"{quoted(connection.url.path)} not found; {paths_text(connection)}")
        query = parse_query(connection.query_params, SOCKET)
        task_id = connection.path_params["task_id"]
        watching = self._supervisor.watch(task_id, query["after"], wanted_types(query["types"]))
        return query["start"], watching

    async def _end(self, error: StreamerError) -> None:
        message = envelope("error", error.as_dict())
        reason = str(error).encode()[:123].decode(errors="ignore")  # no close frame holds more
        if isinstance(error, SlowClient) and self._frames:
            seconds = self._supervisor.settings.send_timeout
            close = self._frames["close_then_abort"]
            close(text_frame(message), error.close_code, reason, seconds)
            return
        gone = (WebSocketDisconnect, WebSocketDisconnected)
        with contextlib.suppress(*gone), anyio.move_on_after(1):  # one that stalls takes neither
            await self._websocket.send_text(message)
            await self._websocket.close(error.close_code, reason)

    async def _converse(self, start: bool) -> None:
        """Until the task has ended. Raises WebSocketDisconnect when the client goes, and
        StreamerError for what ends the stream early."""
        with anyio.CancelScope() as scope:  # a task group would cost each idle client 4 KB
            listener = asyncio.create_task(self._listen())
            listener.add_done_callback(lambda _: scope.cancel())
            try:
                await self._deliver_all(start)
            finally:
                listener.cancel()
        if scope.cancelled_caught:
            await listener

    async def _deliver_all(self, start: bool) -> None:
        broker = self._subscription.broker
        await self._websocket.send_text(connected_message(self._subscription, start))
        if self._frames:
            self._subscription.write_directly(self._frames["write"])
        deliveries = aiter(self._subscription)
        await self._deliver(await anext(deliveries))
        if start and broker.task.status is TaskStatus.PENDING:
            await self._supervisor.start(broker.task.id)
        async for delivery in deliveries:
            await self._deliver(delivery)

    async def _deliver(self, delivery: Delivery) -> None:
        if self._frames:
            message = {"type": "websocket.send", "frames": delivery.frames}
            await self._websocket.send(message)
            return
        for text in delivery.messages:
            await self._websocket.send_text(text)

    async def _listen(self) -> None:
        """Does what the client says, until it goes. Raises WebSocketDisconnect, SlowClient."""
        while True:
            message = await self._websocket.receive()
            if message["type"] == "websocket.disconnect":
                raise WebSocketDisconnect(message.get("code", 1005))
            try:
                await self._obey(message.get("text"))
            except SlowClient:
                raise
            except StreamerError as error:
                await self._websocket.send_text(envelope("error", error.as_dict()))

    async def _obey(self, text: str | None) -> None:
        task_id = self._subscription.broker.task.id
        try:
            request = json.loads(text or "")
        except (ValueError, RecursionError):
            request = None
        kind = request.get("type") if isinstance(request, dict) else None
        if kind == "ping":
            await self._websocket.send_text(envelope("pong", {"task_id": task_id}))
        elif kind == "cancel":
            await self._supervisor.cancel(task_id)
        elif kind == "answer":
            answer = parse_answer(request, self._supervisor.settings)
            await self._supervisor.answer(task_id, *answer)
        else:
            came = "a binary frame" if text is None else quoted(text)
            expected = '{"type": "ping"}, {"type": "cancel"} or {"type": "answer", …}'
            raise InvalidRequest(f"expected {expected}, not {came}")


def paths_text(connection: HTTPConnection) -> str:
    """What there is, for a client that asked for something else."""
    root = connection.scope.get("root_path", "")
    paths = (route.path_format for route in connection.app.routes if route.path != NO_PATH)
    return f"the paths are {', '.join(root + path for path in dict.fromkeys(paths))}"


async def get_openapi(request: Request) -> Response:
    """This description of the API, by OpenAPI 3.1."""
    supervisor = _supervisor(request)
    paths: dict[str, dict[str, Any]] = defaultdict(dict)
    for operation in request.app.state.operations:
        path = operation.path.replace(":path", "")
        paths[path][operation.method.lower()] = operation.described(supervisor)
    document = {
        "openapi": "3.1.0",
        "info": {"title": "streamer", "version": __version__},
        "servers": [{"url": request.scope.get("root_path") or "/"}],
        "paths": paths,
        "components": {"securitySchemes": {"token": {"type": "http", "scheme": "bearer"}}},
        "security": [{"token": []}] if supervisor.settings.token else [],
    }
    return JSONLine(document)


OPERATIONS = [
    Operation("GET", "/openapi.json", get_openapi),
    Operation("GET", "/healthz", get_health, (200, 503)),
    Operation("GET", "/metrics", get_metrics, media_types=["text/plain"]),
    Operation("POST", "/api/tasks", create_task, (201, 200), Task, {}, IDEMPOTENCY, task_schema),
    Operation("GET", "/api/tasks", list_tasks, query=PAGING),
    Operation("GET", TASK_PATH, get_task, answer=Task),
    Operation("DELETE", TASK_PATH, delete_task, (204,)),
    Operation("GET", f"{TASK_PATH}/state", get_state, answer=TaskState),
    Operation("POST", f"{TASK_PATH}/run", run_task, (202,), Task, {"restart": switch(False)}),
    Operation("POST", f"{TASK_PATH}/cancel", cancel_task, (202,), Task),
    Operation("POST", f"{TASK_PATH}/answers", answer_question, (202,), Task, body=answer_schema),
    Operation(
        "GET", f"{TASK_PATH}/events", get_events, (200, 208), query=EVENTS, media_types=LOG_TYPES
    ),
    Operation("GET", f"{TASK_PATH}/artifacts", list_artifacts),
    Operation("GET", f"{TASK_PATH}/artifacts.zip", get_zip, media_types=["application/zip"]),
    Operation("GET", f"{TASK_PATH}/artifacts/{{path:path}}", get_artifact, media_types=FILE_TYPES),
]
SOCKET_ROUTES = [
    WebSocketRoute("/ws/tasks/{task_id}", SocketStream),
    WebSocketRoute(NO_PATH, SocketStream),
]


# -----------------------------------------------------------------------------
# Protocols
# -----------------------------------------------------------------------------

# What front ends speak: each is a translator of a task's log, which an event stream sends. A
# conversation is a series of tasks, one for each message of its user.

MOST_HISTORY = 1 << 22  # bytes of a body: these clients send the whole conversation each time
MOST_ID = 255  # characters of an id that a client chose

JSONObject = Mapping[str, Any]
AGENT_STATUS: Mapping[EventType, str] = {
    EventType.AGENT_START: "working",
    EventType.AGENT_COMPLETE: "done",
    EventType.ERROR: "failed",
}


class Part(NamedTuple):
    """What a role's model says in one call, as a client shows it."""

    id: str
    kind: EventType
    call_id: str | None
    role: str | None
    action: str | None


class Translator(abc.ABC):
    """Tells a task's log in another protocol's messages, each a JSON object.

    Roles speak at once, each in one part at a time. A task that ran several times ends where its
    last run did.
    """

    headers: Mapping[str, str] = {}
    trailer = ""  # what follows the last message
    part_types = frozenset({EventType.TOKEN})  # what parts are made of

    def __init__(self, task_id: str) -> None:
        self.task_id = task_id
        self._parts: dict[str | None, Part] = {}
        self._last: JSONObject = {}  # event

    def event(self, event: JSONObject) -> Iterator[JSONObject]:
        """Of an event as the log has it."""
        self._last = event
        role = event["agent_role"]
        kind = EventType(event["event_type"])
        if kind in self.part_types:
            yield from self._add_to_part(event, kind)
            return
        if kind in AGENT_STATUS:
            yield from self._close(role)
        yield from self._tell(kind, role, event)

    def end(self) -> Iterator[JSONObject]:
        for role in list(self._parts):
            yield from self._close(role)
        yield self._ending(self._last.get("event_type"), self._last.get("payload", {}))

    @abc.abstractmethod
    def start(self) -> Iterator[JSONObject]: ...

    @abc.abstractmethod
    def state(self, state: JSONObject) -> Iterator[JSONObject]:
        """Of the `state` message's data."""

    @abc.abstractmethod
    def failed(self, error: StreamerError) -> JSONObject:
        """The stream ends before its turn has."""

    @abc.abstractmethod
    def _tell(self, kind: EventType, role: str | None, event: JSONObject) -> Iterator[JSONObject]:
        """Of an event that no part is made of."""

    @abc.abstractmethod
    def _ending(self, kind: str | None, payload: JSONObject) -> JSONObject: ...

    @abc.abstractmethod
    def _part(self, part: Part, stage: str, text: str = "") -> JSONObject:
        """One that is opened, says `text`, or is closed: the stages start, delta and end."""

    def _add_to_part(self, event: JSONObject, kind: EventType) -> Iterator[JSONObject]:
        role = event["agent_role"]
        payload = event["payload"]
        part = self._parts.get(role)
        call_id = payload.get("call_id")
        if part is None or (part.kind, part.call_id) != (kind, call_id):
            yield from self._close(role)
            part_id = f"{self.task_id}-{event['event_id']}"
            part = Part(part_id, kind, call_id, role, payload.get("action"))
            self._parts[role] = part
            yield self._part(part, "start")
        if payload["message"]:
            yield self._part(part, "delta", payload["message"])

    def _close(self, role: str | None) -> Iterator[JSONObject]:
        part = self._parts.pop(role, None)
        if part is not None:
            yield self._part(part, "end")


class AISDKTranslator(Translator):
    """The UI message stream of the AI SDK, version 1 (sdk.vercel.ai, `useChat`)."""

    headers: Mapping[str, str] = {"x-vercel-ai-ui-message-stream": "v1"}
    trailer = "data: [DONE]\n\n"
    part_types = frozenset({EventType.TOKEN, EventType.REASONING})

    def __init__(self, task_id: str, message_id: str) -> None:
        super().__init__(task_id)
        self._message_id = message_id
        self._agents: dict[str | None, str] = {}  # role → id of the part that shows it at work

    def start(self) -> Iterator[JSONObject]:
        metadata = {"task_id": self.task_id}
        yield {"type": "start", "messageId": self._message_id, "messageMetadata": metadata}

    def state(self, state: JSONObject) -> Iterator[JSONObject]:
        yield {"type": "data-state", "data": state, "transient": True}

    def failed(self, error: StreamerError) -> JSONObject:
        return {"type": "error", "errorText": str(error)}

    def _tell(self, kind: EventType, role: str | None, event: JSONObject) -> Iterator[JSONObject]:
        data = {"agent_role": role, **event["payload"]}
        if kind is EventType.AGENT_START:
            self._agents[role] = str(event["event_id"])
        if kind is EventType.LOG:
            yield {"type": "data-log", "data": data, "transient": True}
        elif kind in AGENT_STATUS and role in self._agents:  # its last state replaces its first
            data["status"] = AGENT_STATUS[kind]
            yield {"type": "data-agent", "id": self._agents[role], "data": data}
        elif kind not in (EventType.ANSWER, EventType.RESULT) and not kind.startswith("TASK_"):
            yield {"type": f"data-{kind.lower()}", "data": data}

    def _ending(self, kind: str | None, payload: JSONObject) -> JSONObject:
        if kind == EventType.TASK_ERROR:
            return {"type": "error", "errorText": payload["message"]}
        if kind == EventType.TASK_CANCELLED:
            return {"type": "abort", "reason": payload["message"]}
        return {"type": "finish", "finishReason": "stop"}

    def _part(self, part: Part, stage: str, text: str = "") -> JSONObject:
        noun = "text" if part.kind is EventType.TOKEN else "reasoning"
        more: JSONObject = {}
        if stage == "start":
            speaker = {"agent_role": part.role, "action": part.action}
            more = {"providerMetadata": {"streamer": speaker}}
        elif stage == "delta":
            more = {"delta": text}
        return {"type": f"{noun}-{stage}", "id": part.id, **more}


class AGUITranslator(Translator):
    """AG-UI (docs.ag-ui.com), by the event types that its clients before 1.0 know too."""

    def __init__(
        self, task_id: str, thread_id: str, run_id: str, history: Sequence[Any] | None
    ) -> None:
        super().__init__(task_id)
        self._ids = {"threadId": thread_id, "runId": run_id}
        self._history = history  # replaces the client's, which may hold a part of this run
        self._steps: dict[str | None, str] = {}  # role → name of its step
        self._result: JSONObject = {}

    def start(self) -> Iterator[JSONObject]:
        yield {"type": "RUN_STARTED", **self._ids}
        if self._history is not None:
            yield {"type": "MESSAGES_SNAPSHOT", "messages": self._history}

    def state(self, state: JSONObject) -> Iterator[JSONObject]:
        yield {"type": "STATE_SNAPSHOT", "snapshot": state}

    def failed(self, error: StreamerError) -> JSONObject:
        return {"type": "RUN_ERROR", "message": str(error), "code": error.code}

    def end(self) -> Iterator[JSONObject]:
        for role in list(self._steps):
            yield from self._close(role)
            yield from self._finish_step(role)
        yield from super().end()

    def _tell(self, kind: EventType, role: str | None, event: JSONObject) -> Iterator[JSONObject]:
        payload = event["payload"]
        if kind in AGENT_STATUS:
            yield from self._finish_step(role)
        if kind is EventType.AGENT_START:
            name = f"{role}: {payload.get('action', 'work')}"
            if name in self._steps.values():  # of another role, whose name has a colon
                name += f" ({event['event_id']})"
            self._steps[role] = name
            yield {"type": "STEP_STARTED", "stepName": name}
        elif kind is EventType.RESULT:
            self._result = payload
        elif kind is not EventType.AGENT_COMPLETE and not kind.startswith("TASK_"):
            yield {"type": "CUSTOM", "name": kind, "value": {"agent_role": role, **payload}}

    def _finish_step(self, role: str | None) -> Iterator[JSONObject]:
        if role in self._steps:
            yield {"type": "STEP_FINISHED", "stepName": self._steps.pop(role)}

    def _ending(self, kind: str | None, payload: JSONObject) -> JSONObject:
        if kind in (EventType.TASK_ERROR, EventType.TASK_CANCELLED):
            return {"type": "RUN_ERROR", "message": payload["message"], "code": kind}
        return {"type": "RUN_FINISHED", **self._ids, "result": self._result}

    def _part(self, part: Part, stage: str, text: str = "") -> JSONObject:
        if stage == "start":
            name = {} if part.role is None else {"name": part.role}
            return {"type": "TEXT_MESSAGE_START", "messageId": part.id, "role": "assistant", **name}
        if stage == "delta":
            return {"type": "TEXT_MESSAGE_CONTENT", "messageId": part.id, "delta": text}
        return {"type": "TEXT_MESSAGE_END", "messageId": part.id}


class Turn(NamedTuple):
    """What answers one message of a conversation's user: a task, or what follows their answer to
    its question. These clients let nobody write before a stream has ended, and so it ends where
    somebody is asked.
    """

    task_id: str
    after: int = 0  # the event before it: the question that the message answers
    is_new: bool = True

    @property
    def id(self) -> str:
        return f"{self.task_id}-{self.after}" if self.after else self.task_id


class TranslatedStream(EventStream):
    """A turn in another protocol: up to an open question, a message's answer, or the task's end."""

    def __init__(self, supervisor: Supervisor, turn: Turn, translator: Translator) -> None:
        super().__init__(supervisor.watch(turn.task_id, turn.after), translator.headers)
        self._translator = translator

    async def _messages(self, subscription: Subscription) -> AsyncIterator[str]:
        translator = self._translator
        asked = 0  # the event of this turn's last question; 0 also at the answer that began it
        is_answered = False
        is_told = True  # what the state is now
        yield self._lines(translator.start())
        try:
            async for delivery in subscription:
                if delivery.gap is not None:
                    raise delivery.gap  # for which these protocols have no message
                for each in delivery.events:
                    event = json.loads(each.data)
                    if asked and each.type is EventType.ANSWER and "message_id" in event["payload"]:
                        is_answered = True  # by a message, which has a turn of its own
                        break
                    if each.type is EventType.QUESTION:
                        asked = each.id
                    yield self._lines(translator.event(event))
                broker = subscription.broker
                question = broker.state.question
                is_open = question is not None and question["event_id"] == asked
                has_all = subscription.cursor == broker.state.last_event_id
                is_told = is_told and delivery.state is None
                if is_open or (has_all and not is_told and not is_answered):
                    is_told = True  # not while it replays: the state may be that of a later turn
                    yield self._lines(translator.state(json.loads(broker.state_message())["data"]))
                if is_open or is_answered:
                    break
            yield self._lines(translator.end())
        except StreamerError as error:
            yield self._lines([translator.failed(error)])
        yield translator.trailer

    def _lines(self, messages: Iterable[JSONObject]) -> str:
        return "".join(f"data: {encode(message)}\n\n" for message in messages)


class UserMessage(NamedTuple):
    """The last message of a conversation's user, and what their client had shown before it."""

    origin: Origin
    text: str
    history: Sequence[Any]  # the client's messages up to this one
    follows: str | None  # the id of the message right before it, where that is the user's too
    is_edited: bool = False
    shown_task: str | None = None  # the task shown last; None where the client does not say
    shown_question: str | None = None  # the last question shown of that task


def _string_at(value: Any, *path: str | int) -> str | None:
    """The string at that place of what a client sent; None where there is none."""
    for step in path:
        try:
            value = value[step]
        except (LookupError, TypeError):
            return None
    return value if isinstance(value, str) else None


def _text_of(message: JSONObject) -> str | None:
    content = message.get("parts") or message.get("content")
    if isinstance(content, list):
        texts = (_string_at(part, "text") for part in content)
        content = "\n".join(text for text in texts if text is not None)
    return content if isinstance(content, str) else None


def _message_id(conversation: str, message: JSONObject) -> str:
    """Another one once its text is edited, for which a client may keep its own id."""
    return task_id_of(json.dumps([conversation, _string_at(message, "id"), _text_of(message)]))


def _user_message(body: JSONObject, conversation: str, run_id: str | None = None) -> UserMessage:
    """Raises InvalidRequest where there is none."""
    messages = body.get("messages")
    if not isinstance(messages, list):
        raise InvalidRequest(f"messages must be an array, not {kind_of(messages)}")
    users = [index for index, each in enumerate(messages) if _string_at(each, "role") == "user"]
    if not users:
        raise InvalidRequest("messages must hold one whose role is user: its text is the prompt")
    *before, message = messages[: users[-1] + 1]
    parse_text(message, "id", MOST_ID)
    text = _text_of(message)
    if text is None:
        raise InvalidRequest("the user's last message must have a content or parts with text")
    follows = None
    if before and _string_at(before[-1], "role") == "user":
        follows = _message_id(conversation, before[-1])
    origin = Origin(conversation, _message_id(conversation, message), run_id)
    return UserMessage(origin, text, [*before, message], follows)


async def _find(supervisor: Supervisor, task_id: str | None) -> Record | None:
    try:
        return None if task_id is None else await supervisor.record(task_id)
    except TaskNotFound:
        return None


def _latest_turn(record: Record) -> Turn:
    return Turn(record.task.id, max(record.state.answers.values(), default=0), is_new=False)


def _turn_of(message_id: str, record: Record) -> Turn | None:
    """The turn of a task that a message began: as an answer, or as the prompt."""
    after = record.state.answers.get(message_id, 0)
    origin = record.task.origin
    if after or (origin is not None and origin.message_id == message_id):
        return Turn(record.task.id, after, is_new=False)
    return None


def _existing_turn(message_id: str, records: Sequence[Record], again: bool) -> Turn | None:
    """A message's turn in a live task; in one that has ended, an answer's, but not `again`."""
    for record in records:
        turn = _turn_of(message_id, record)
        is_live = record.state.status not in ENDED
        if turn is not None and (is_live or (turn.after and not again)):
            return turn
    return None


def _question_for(
    message: UserMessage, shown: Record | None, latest: Record | None
) -> tuple[str, str] | None:
    """The task and the id of the question that a message answers, be it open or not.

    That is the one which the client has shown. One that shows no history may mean the open one.
    """
    if message.shown_task is None:
        if latest is None or latest.state.question is None or message.is_edited:
            return None
        return latest.task.id, latest.state.question["question_id"]
    if message.shown_question is None:
        return None
    # Where the message before was refused, the user knows that the question is closed.
    if message.follows is not None and task_id_of(message.follows) != message.shown_task:
        if shown is None:
            return None
        question = shown.state.question
        is_open = question is not None and question["question_id"] == message.shown_question
        if not is_open and _turn_of(message.follows, shown) is None:
            return None
    return message.shown_task, message.shown_question


async def _answer(
    supervisor: Supervisor, message: UserMessage, task_id: str, question_id: str
) -> Turn:
    """The turn behind an answer, which may come by several connections at once."""
    message_id = message.origin.message_id
    try:
        asked = await supervisor.answer(task_id, question_id, message.text, message_id)
    except QuestionClosed:
        turn = _existing_turn(message_id, [await supervisor.record(task_id)], again=False)
        if turn is None:
            raise
        return turn
    return Turn(task_id, asked)


async def _start(supervisor: Supervisor, turn: Turn) -> Turn:
    """Starts its task where that is PENDING."""
    with contextlib.suppress(TaskEnded):  # then it is a replay
        await supervisor.start(turn.task_id)
    return turn


async def _submit(
    supervisor: Supervisor, prompt: str, options: JSONObject, key: str, origin: Origin
) -> Turn:
    """The turn of the task of that key, which is created where there is none."""
    try:
        task, is_new = await supervisor.submit(prompt, None, options, key, origin)
    except IdempotencyConflict:
        raise IdempotencyConflict("this message came before, with other options") from None
    try:
        return await _start(supervisor, Turn(task.id, is_new=is_new))
    except TooManyTasks:
        if is_new:  # what is refused leaves nothing
            await supervisor.delete(task.id)
        raise


async def _next_turn(
    supervisor: Supervisor, message: UserMessage, given: Any, again: bool = False
) -> Turn:
    """What answers a message: what did already, what follows a question, or a new task.

    `given` are its options. `again` asks for another task where that of the message has ended; so
    does another run of the same message. Raises QuestionClosed, TaskNotFound, IdempotencyConflict,
    TooManyTasks, InvalidRequest.
    """
    supervisor.check_clients()  # nothing begins that could not be shown
    name = "the text of the user's last message"
    prompt = parse_text({name: message.text}, name, supervisor.settings.max_prompt)
    body = {"input_prompt": prompt, "options": given or {}}
    _, _, options = parse_task(body, supervisor.settings, supervisor.engine.teams)
    origin = message.origin
    key = origin.message_id
    own = await _find(supervisor, task_id_of(key))
    if again or own is None or own.task.origin != origin:
        latest_id = await supervisor.store.latest(origin.conversation)
        latest = await _find(supervisor, latest_id)
        shown = latest
        if message.shown_task != latest_id:
            shown = await _find(supervisor, message.shown_task)
        records = [record for record in (own, shown, latest) if record is not None]
        turn = _existing_turn(origin.message_id, records, again)
        if turn is not None:
            return await _start(supervisor, turn)
        if again and latest is not None and latest.state.status not in ENDED:
            return _latest_turn(latest)
        answered = [each for each in records if origin.message_id in each.state.answers]
        if own is None and not answered:
            question = _question_for(message, shown, latest)
            if question is not None:
                return await _answer(supervisor, message, *question)
        if again:
            key += f" after {latest_id}"
        elif own is not None:
            key += f" run {origin.run_id}"
        if answered:
            prompt = answered[0].task.input_prompt  # with its answers, all is asked again
    return await _submit(supervisor, prompt, options, key, origin)


def _shown_in_chat(history: Sequence[Any]) -> tuple[str | None, str | None]:
    """The task of the last answer to a user, and the id of its last question."""
    for message in reversed(history):
        task_id = _string_at(message, "metadata", "task_id")
        if task_id is not None:
            parts = message.get("parts")
            for part in reversed(parts if isinstance(parts, list) else []):
                if _string_at(part, "type") == "data-question":
                    return task_id, _string_at(part, "data", "question_id")
            return task_id, None
    return None, None


async def post_chat(request: Request) -> Response:
    """The AI SDK's: answers a message of a conversation's user."""
    supervisor = _supervisor(request)
    body = await _json_object(request, supervisor.settings, MOST_HISTORY)
    message = _user_message(body, "ai-sdk:" + parse_text(body, "id", MOST_ID))
    again = body.get("trigger") == "regenerate-message"
    shown_task, shown_question = _shown_in_chat(message.history)
    message = message._replace(
        is_edited=not again and body.get("messageId") is not None,
        shown_task=shown_task,
        shown_question=shown_question,
    )
    turn = await _next_turn(supervisor, message, body.get("options"), again)
    return TranslatedStream(supervisor, turn, AISDKTranslator(turn.task_id, turn.id))


async def get_chat(request: Request) -> Response:
    """What runs in a conversation, from the start of its last turn; 204 where nothing does."""
    supervisor = _supervisor(request)
    conversation = "ai-sdk:" + request.path_params["conversation"]
    latest = await _find(supervisor, await supervisor.store.latest(conversation))
    if latest is None or latest.state.status in ENDED:
        return Response(status_code=204)
    if request.method == "HEAD":
        return Response(media_type=EventStream.media_type)
    turn = await _start(supervisor, _latest_turn(latest))
    return TranslatedStream(supervisor, turn, AISDKTranslator(turn.task_id, turn.id))


AGUI_MESSAGE_ID = re.compile("([0-9a-f]{32})-[0-9]+")  # of a part: its task's, and its event's


async def post_ag_ui(request: Request) -> Response:
    """AG-UI's: runs a team on the message of a thread's user."""
    supervisor = _supervisor(request)
    body = await _json_object(request, supervisor.settings, MOST_HISTORY)
    thread_id = parse_text(body, "threadId", MOST_ID)
    run_id = parse_text(body, "runId", MOST_ID)
    message = _user_message(body, f"ag-ui:{thread_id}", run_id)
    shown_task = _string_at(body, "state", "task_id")
    shown_question = _string_at(body, "state", "question", "question_id")
    before = AGUI_MESSAGE_ID.fullmatch(_string_at(message.history[-2:-1], 0, "id") or "")
    if before and before[1] != shown_task:  # a history that was cut: the state is of later
        shown_task = before[1]
        shown_question = None
    message = message._replace(shown_task=shown_task, shown_question=shown_question)
    forwarded = body.get("forwardedProps") or {}
    if not isinstance(forwarded, dict):
        raise InvalidRequest(f"forwardedProps must be an object, not {kind_of(forwarded)}")
    turn = await _next_turn(supervisor, message, forwarded.get("options"))
    # A lone surrogate, which JSON can escape, cannot be sent as UTF-8.
    history = None if turn.is_new else [jsonable(each) for each in message.history]
    translator = AGUITranslator(turn.task_id, thread_id, run_id, history)
    return TranslatedStream(supervisor, turn, translator)


def conversation_schema(supervisor: Supervisor) -> dict[str, Any]:
    """A part of the body: its protocol says the rest."""
    messages = {"type": "array", "items": {"type": "object"}}
    return {"type": "object", "required": ["messages"], "properties": {"messages": messages}}


STREAMED = [EventStream.media_type]
CHAT_STREAM = "/api/chat/{conversation:path}/stream"
PROTOCOL_OPERATIONS = [
    Operation("POST", "/api/chat", post_chat, body=conversation_schema, media_types=STREAMED),
    Operation("GET", CHAT_STREAM, get_chat, (200, 204), media_types=STREAMED),
    Operation("POST", "/ag-ui", post_ag_ui, body=conversation_schema, media_types=STREAMED),
]


# -----------------------------------------------------------------------------
# Application
# -----------------------------------------------------------------------------


SAFE_HEADERS = {
    "Cache-Control": "no-store",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
}


def error_response(error: StreamerError) -> Response:
    headers = {}
    if error.retry_after is not None:
        headers["Retry-After"] = str(error.retry_after)
    if isinstance(error, Unauthorized):
        headers["WWW-Authenticate"] = "Bearer"
    return JSONLine({"error": error.as_dict()}, error.status, headers)


async def _on_http_exception(request: Request, error: Exception) -> Response:
    """Starlette's own errors (404, 405), as JSON."""
    assert isinstance(error, HTTPException)
    code = error.detail.lower().replace(" ", "_")
    message = f"{request.method} {quoted(request.url.path)}: {error.detail}"
    if error.status_code == 404:
        message += f"; {paths_text(request)}"
    answer = {"error": {"code": code, "message": message}}
    headers = dict(error.headers or {})
    if error.status_code == 405:  # Starlette names the methods of the first route of several
        found = [
            each for each in request.app.routes if each.matches(request.scope)[0] is not Match.NONE
        ]
        allowed = {name for each in found if isinstance(each, Route) for name in each.methods or ()}
        headers["Allow"] = ", ".join(sorted(allowed))
    return JSONLine(answer, error.status_code, headers)


async def _on_fault(request: Request, error: Exception) -> Response:
    """A fault of this program: Starlette raises it again, and the server logs it."""
    fault = {"code": "internal_error", "message": "the server failed; its log says why"}
    return JSONLine({"error": fault}, 500, SAFE_HEADERS)  # it is past the middleware


def without_token(record: logging.LogRecord) -> bool:
    """A logging filter: takes the query, where the token may be, out of logged addresses."""
    if isinstance(record.args, tuple):
        hide = partial(re.sub, r"\?\S*", "?***")
        record.args = tuple(hide(arg) if isinstance(arg, str) else arg for arg in record.args)
    return True


WARNED: dict[str, tuple[float, int]] = {}  # by text: when it last passed, how many did not since


def once_a_second(record: logging.LogRecord) -> bool:
    """A logging filter: as any stranger can cause uvicorn's warnings, each passes once a second."""
    if record.levelno != logging.WARNING:
        return True
    passed, left_out = WARNED.get(record.msg, (0.0, 0))
    if abs(record.created - passed) < 1:
        WARNED[record.msg] = (passed, left_out + 1)
        return False
    WARNED[record.msg] = (record.created, 0)
    if left_out:
        record.msg += f" And {left_out} more since this was last logged"
    return True


class Guard:
    """ASGI middleware, the edge of the application: who comes in, and how long a send may take.

    It answers what was refused, and keeps browsers from guessing what an answer is; a socket tells
    its client itself.
    """

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await self.app(scope, receive, send)
            return
        seconds = _supervisor(HTTPConnection(scope)).settings.send_timeout

        async def send_in_time(message: Message) -> None:
            """The one way to a client, over HTTP, SSE and WebSocket. Raises SlowClient."""
            if message["type"] == "http.response.start":
                headers = MutableHeaders(scope=message)
                for name, value in SAFE_HEADERS.items():
                    headers.setdefault(name, value)
            with anyio.move_on_after(seconds) as deadline:
                await send(message)
            if deadline.cancelled_caught:
                resume = "connect again with after=, the last event_id you have"
                raise SlowClient(f"a send was blocked for {seconds:g} s; {resume}")

        answer = self.app if scope["type"] == "websocket" else self._answer
        try:
            await answer(scope, receive, send_in_time)
        except SlowClient:  # nothing can be said any more
            await cut_off(scope, receive)

    async def _answer(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            check_access(HTTPConnection(scope))
            await self.app(scope, receive, send)
        except SlowClient:
            raise
        except StreamerError as error:
            await error_response(error)(scope, receive, send)
        except OSError as error:
            if error.errno not in UNKNOWN:
                raise
            logger.warning("request path=%s error=%r", ascii(scope["path"]), str(error))
            why = f"the server cannot open or write a file now: {error.strerror}; try again later"
            await error_response(OutOfResources(why))(scope, receive, send)


def _middleware(settings: Settings) -> list[Middleware]:
    guard = Middleware(Guard)
    if not settings.allowed_origins:
        return [guard]
    cors = Middleware(
        CORSMiddleware,
        allow_origins=settings.allowed_origins,
        allow_methods=["GET", "POST", "DELETE"],
        allow_headers=["*"],
        allow_credentials=True,  # fetch with credentials: "include"; none of ours is a cookie
        allow_private_network=True,  # a page of the internet that is allowed asks this machine
        expose_headers=["Location", "Retry-After"],
    )
    return [cors, guard]


def refuse_second_process(folder: Path) -> None:
    """Raises SettingsError where another process of uvicorn's or gunicorn's has the folder; holds
    it until this one ends.
    """
    server = os.environ.get("SERVER_SOFTWARE", "")
    if multiprocessing.parent_process() is None and "gunicorn" not in server:
        return
    folder.mkdir(parents=True, exist_ok=True)
    lock = os.open(folder / ".lock", os.O_RDWR | os.O_CREAT)
    try:
        fcntl.lockf(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        problem = "each of several processes (--workers) would have tasks of its own in memory"
        advice = "leave it at one, or set redis_url, which they share"
        raise SettingsError(f"{problem}: {advice}") from None


def create_app(
    settings: Settings | None = None,
    runner: Runner | None = None,
    store: Store | None = None,
    teams: Mapping[str, MakeTeam] | None = None,
) -> Starlette:
    """An ordinary ASGI application.

    Settings come from the environment by default, the runner is MetaGPT or in test mode the
    scripted team, the store what the settings say; `teams` are MetaGPT's of one's own, besides
    those of the settings. Raises SettingsError, also where MetaGPT has no model.
    """
    try:
        return _create_app(settings or Settings.from_environ(), runner, store, teams or {})
    except SettingsError as error:
        if settings is not None or multiprocessing.parent_process() is None:
            raise
        logger.error("%s", error)
        sys.exit(STARTUP_FAILURE)  # else uvicorn starts its process again and again


def _check_modules(teams: Mapping[str, str]) -> None:
    """Raises SettingsError for a team whose module is not there."""
    for name, function in teams.items():
        if not _installed(re.split("[.:]", function)[0]):
            where = "the current folder, that of streamer.py, or PYTHONPATH"
            raise SettingsError(f"teams: the module of {name!r}, {function}, is not in {where}")


def _create_app(
    settings: Settings, runner: Runner | None, store: Store | None, teams: Mapping[str, MakeTeam]
) -> Starlette:
    runner = runner or (run_scripted if settings.test_mode else run_metagpt)
    modes: Mapping[Runner, str] = {run_scripted: "test", run_metagpt: "metagpt"}
    mode = modes.get(runner, "custom")
    named = {team.partition("=")[0]: team.partition("=")[2] for team in settings.teams}
    known: Teams = {**named, **teams}
    warm_up = None
    if runner is run_metagpt:
        if not _installed("metagpt"):
            raise SettingsError(f"MetaGPT is not installed; type: {INSTALL}")
        check_git(os.environ)
        model_config(os.environ)
        _check_modules(named)
        runner = partial(run_metagpt, teams=known)
        warm_up = partial(warm_up_metagpt, settings, known)
    store = store or open_store(settings)
    given = {"redis_url": settings.redis_url, "streamer_token": settings.token}
    secrets = known_secrets({**os.environ, **given})
    supervisor = Supervisor(settings, store, runner, warm_up, secrets, tuple(known), mode)

    @contextlib.asynccontextmanager
    async def lifespan(app: Starlette) -> AsyncIterator[None]:
        for name in ("uvicorn.error", "uvicorn.access"):  # both log addresses with their query
            logging.getLogger(name).addFilter(without_token)
        logging.getLogger("uvicorn.error").addFilter(once_a_second)
        if type(store) is MemoryStore:
            refuse_second_process(settings.workspace)
        async with supervisor.open():
            yield

    operations = [*OPERATIONS, *PROTOCOL_OPERATIONS]
    app = Starlette(
        routes=[Route("/", get_page), *(each.route() for each in operations), *SOCKET_ROUTES],
        exception_handlers={HTTPException: _on_http_exception, Exception: _on_fault},
        lifespan=lifespan,
        middleware=_middleware(settings),
    )
    app.router.redirect_slashes = False  # a redirect would repeat the token
    app.state.supervisor = supervisor
    app.state.operations = operations
    return app


class FrameProtocol(WebSocketsSansIOProtocol):
    """uvicorn's protocol, which also takes ready frames: the ASGI extension `streamer.frames`.

    `write` writes frames without waiting, or returns False where the client is behind or gone. A
    `websocket.send` message may hold `frames`, and waits as usual. `close_then_abort` ends a client
    that does not read: it gets some seconds to take what is on its way, then it is cut off.

    What comes is parsed in slices: a message waits until those before it are taken, and a client
    whose frames are no messages is cut off.
    """

    SLICE = 128  # bytes; the smallest frame has 6
    MAX_FRAMES = 1000  # in ten seconds, of pings and parts of messages

    def connection_made(self, transport: Any) -> None:
        super().connection_made(transport)
        self._unparsed = bytearray()
        self._frames = 0
        self._frames_since = self.loop.time()

    def data_received(self, data: bytes) -> None:
        self._unparsed += data
        while self._unparsed and not self.read_paused and not self.transport.is_closing():
            piece = bytes(self._unparsed[: self.SLICE])
            del self._unparsed[: self.SLICE]
            super().data_received(piece)
        if not self.read_paused:
            self.transport.resume_reading()

    def handle_connect(self, event: Any) -> None:
        super().handle_connect(event)
        if self.response.status_code == 101:
            offer: Any = {"write": self.write, "close_then_abort": self.close_then_abort}
            self.scope["extensions"][FRAMES] = offer

    def handle_events(self) -> None:
        if self.loop.time() > self._frames_since + 10:
            self._frames = 0
            self._frames_since = self.loop.time()
        self._frames += len(self.conn.events)
        super().handle_events()
        if self._frames > self.MAX_FRAMES:
            self._break_off(1008, "too many pings, or parts of a message")

    def send_receive_event_to_app(self) -> None:
        if not self.close_sent:
            self._frames -= 1
        try:
            if self.curr_msg_data_type == "text":
                b"".join(self.frames).decode()
            super().send_receive_event_to_app()
        except UnicodeDecodeError:  # uvicorn would log a traceback
            self._break_off(1007, "invalid UTF-8")

    def _break_off(self, code: int, reason: str) -> None:
        if self.conn.state is State.OPEN:
            self.conn.send_close(code, reason)
            self.handle_parser_exception()
        else:
            self.transport.abort()

    def write(self, frames: bytes) -> bool:
        if not self.writable.is_set() or self.close_sent or self.transport.is_closing():
            return False
        self.transport.write(frames)
        return True

    def close_then_abort(self, frames: bytes, code: int, reason: str, seconds: float) -> None:
        payload = struct.pack("!H", code) + reason.encode()
        self.transport.write(frames + bytes((0x88, len(payload))) + payload)  # a close frame
        self.close_sent = True
        self.transport.close()
        self.loop.call_later(seconds, self.transport.abort)

    async def run_asgi(self) -> None:
        await super().run_asgi()
        if not self.disconnected:  # one that never reads would keep its connection
            self.loop.call_later(2 * self.close_timeout, self.transport.abort)

    async def receive(self) -> Any:
        message = await super().receive()
        if self._unparsed and not self.read_paused:
            self.transport.pause_reading()
            await asyncio.sleep(0)  # others get a turn
            self.data_received(b"")
        return message

    async def send(self, message: Any) -> None:
        if "frames" in message:
            await self.writable.wait()
            if self.disconnected:
                raise ClientDisconnected
            if not self.close_sent:
                self.transport.write(message["frames"])
            return
        if self.close_sent:  # the client broke the protocol meanwhile
            raise ClientDisconnected
        if message["type"] == "websocket.close" and message.get("code") != 1000:
            self.close_timeout = 1.0  # seconds that a client which was refused may take
        await super().send(message)
        if message["type"] == "websocket.accept":  # an idle connection keeps no headers
            del self.request, self.response
            self.scope["headers"] = []
        elif message["type"] == "websocket.close":
            self.data_received(b"")


class AbortProtocol(HttpToolsProtocol):
    """uvicorn's protocol, which also lets an answer abort its connection, where the client does not
    read: the ASGI extension `streamer.abort`. It aborts by itself where what a client sends does
    not come to an end: a head in bytes, a request in time.

    What comes is parsed in slices, and not while a request waits for the answer to one before it.
    An offer to speak another protocol is passed over, and HTTP/1.0 gets no chunks.
    """

    SLICE = 1024  # bytes; the smallest request has 18
    MAX_HEAD = 65536  # bytes between a request's start and the end of its head
    PATIENCE = 20.0  # seconds a connection may be neither answered nor come to its next request

    def connection_made(self, transport: Any) -> None:
        super().connection_made(transport)
        if len(self.connections) > 1.1 * (self.limit_concurrency or math.inf):
            transport.abort()  # beyond the limit it is not even told so: descriptors run out
        self._unparsed = bytearray()
        self._head_size = 0  # since the last head, or the last part of a body, was complete
        self._head_again = b""  # of a request that offered to speak another protocol
        self._answering: Any = None  # the request; uvicorn knows the one that came last
        self._answered: Any = None  # the request that was answered when it was last looked at
        self._look_later()

    def _look_later(self) -> None:
        self._timer = self.loop.call_later(self.PATIENCE, self._look)

    def _look(self) -> None:
        """Aborts where the last request was answered at the last look already."""
        if self.cycle is not None and not self.cycle.response_complete:
            self._answered = None
        elif self.cycle is self._answered:
            self.transport.abort()
            return
        else:
            self._answered = self.cycle
        self._look_later()

    def connection_lost(self, exc: Exception | None) -> None:
        self._timer.cancel()
        super().connection_lost(exc)
        if self._answering is not None:
            self._answering.disconnected = True
            self._answering.message_event.set()

    def handle_websocket_upgrade(self) -> None:
        self._timer.cancel()
        super().handle_websocket_upgrade()

    def data_received(self, data: bytes) -> None:
        self._unset_keepalive_if_required()
        self._unparsed += data
        while self._unparsed and not self.pipeline and not self.transport.is_closing():
            piece = bytes(self._unparsed[: self.SLICE])
            del self._unparsed[: self.SLICE]
            self._parse(piece)
        if len(self._unparsed) > self.MAX_HEAD:
            self.transport.pause_reading()
            self.flow.read_paused = False  # else each answer would resume it
        elif self.pipeline or not self.flow.read_paused:
            self.flow.read_paused = False  # only who reads sees that the client goes
            self.transport.pause_reading()  # others have a turn: uvloop reads megabytes at once
            self.loop.call_soon(self.transport.resume_reading)

    def _parse(self, data: bytes) -> None:
        self._head_size += len(data)
        try:
            self.parser.feed_data(data)
        except httptools.HttpParserUpgrade as upgrade:
            if self._should_upgrade():
                self._unparsed.clear()
                self.handle_websocket_upgrade()
                return
            self._unparsed[:0] = self._head_again + data[upgrade.args[0] :]
            self._head_again = b""
        except httptools.HttpParserError:
            self.send_400_response("Invalid HTTP request received.")
        if self._head_size > self.MAX_HEAD:
            self.transport.abort()

    def on_headers_complete(self) -> None:
        self._head_size = 0
        method = self.parser.get_method()
        if self.parser.should_upgrade() and method != b"CONNECT" and not self._should_upgrade():
            # RFC 9110, 7.8: a server may pass over it. The parser ends here, so the head is parsed
            # again, without it.
            version = self.parser.get_http_version().encode()
            lines = [b"%s %s HTTP/%s" % (method, self.url, version)]
            lines += [b"%s: %s" % header for header in self.headers if header[0] != b"upgrade"]
            self._head_again = b"\r\n".join((*lines, b"", b""))
            return
        super().on_headers_complete()
        extensions: Any = self.scope.setdefault("extensions", {})
        extensions[ABORT] = {"abort": self.transport.abort}

    def on_body(self, body: bytes) -> None:
        self._head_size = 0
        super().on_body(body)

    def on_message_complete(self) -> None:
        if not self._head_again:
            super().on_message_complete()

    def on_response_complete(self) -> None:
        super().on_response_complete()
        if self._unparsed:
            self.data_received(b"")

    def _start_asgi_task(self, cycle: Any, app: Any) -> None:
        self._answering = cycle
        if cycle.scope["http_version"] == "1.0":
            cycle.chunked_encoding = False
            cycle.send = partial(send_unchunked, cycle, cycle.send)
        super()._start_asgi_task(cycle, app)


async def send_unchunked(cycle: Any, send: Send, message: Message) -> None:
    """As HTTP/1.0 has it, where the end of the connection may be the end of an answer."""
    cycle.expected_content_length = len(message.get("body", b""))
    await send(message)


BASE_FILES = 24  # descriptors of a process that serves nobody
REDIS_FILES = 32  # its connections to Redis
TEAM_FILES = 20  # of a MetaGPT run: pipes of git, connections to its model; another run has 2
CLIENT_FILES = 2  # a connection, and the file that it downloads


def connections(settings: Settings, run_files: int) -> int:
    """How many there are descriptors for: as many as are wanted, if the system lets this process
    open so many files. Raises SettingsError where there is room for next to none.
    """
    wanted = settings.max_sockets + 1000
    base = BASE_FILES + run_files * settings.max_running
    base += REDIS_FILES if settings.redis_url else 0
    needed = base + CLIENT_FILES * wanted
    unlimited = resource.RLIM_INFINITY
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != unlimited and soft < needed:
        more = needed if hard == unlimited else min(needed, hard)
        with contextlib.suppress(ValueError, OSError):
            resource.setrlimit(resource.RLIMIT_NOFILE, (more, hard))
        soft = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    room = wanted if soft == unlimited else min(wanted, (soft - base) // CLIENT_FILES)
    asked = f"{settings.max_running} runs (max_running) and {wanted} connections need {needed}"
    if room < 10:
        raise SettingsError(f"`ulimit -n` is {soft}, too few to serve anything; {asked}")
    if room < wanted:
        text = "`ulimit -n` is %d, so that it serves %d connections at once; %s"
        logger.warning(text, soft, room, asked)
    return room


class Server(uvicorn.Server):
    """uvicorn, but runs are stopped and clients told before it closes their connections."""

    def __init__(self, app: Starlette, settings: Settings) -> None:
        self.supervisor: Supervisor = app.state.supervisor
        run_files = TEAM_FILES if self.supervisor.engine.mode == "metagpt" else 2
        config = uvicorn.Config(
            app,
            host=settings.host,
            port=settings.port,
            http=AbortProtocol,
            ws=FrameProtocol,
            ws_max_size=65536,  # clients have little to say
            limit_concurrency=connections(settings, run_files),
            ws_per_message_deflate=False,
            log_config=None,
            access_log=False,
            server_header=False,
            timeout_graceful_shutdown=2 + int(0.1 * settings.grace),
        )
        super().__init__(config)

    async def shutdown(self, sockets: Any = None) -> None:
        for server in self.servers:
            server.close()
        await self.supervisor.close()
        seconds = max(1, 0.1 * self.supervisor.settings.grace)
        asyncio.get_running_loop().call_later(seconds, self._cut_off)
        await super().shutdown(sockets)

    def _cut_off(self) -> None:
        """Ends requests that are not at their end, as a client does that leaves."""
        for connection in list(self.server_state.connections):
            connection.transport.abort()

    async def startup(self, sockets: Any = None) -> None:
        """Says on stderr which address to open, once it is served."""
        await super().startup(sockets)
        host, port = self.servers[0].sockets[0].getsockname()[:2]
        host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)
        address = f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"
        if self.supervisor.settings.token:
            address += "/?token=…"
        mode = " in test mode, a scripted team" if self.supervisor.engine.mode == "test" else ""
        with contextlib.suppress(OSError):  # nobody reads it
            print(f"streamer is at {address}{mode}; Ctrl-C stops it", file=sys.stderr, flush=True)


def serve(app: Starlette, settings: Settings) -> None:
    """Serves what `create_app` made, until SIGINT or SIGTERM.

    Raises SettingsError where it cannot listen.
    """
    with listen(settings.host, settings.port) as listener, contextlib.suppress(KeyboardInterrupt):
        Server(app, settings).run([listener])


def listen(host: str, port: int) -> socket.socket:
    """Raises SettingsError, which says why not."""
    try:
        family = min(each[0] for each in socket.getaddrinfo(host, port))  # IPv4, where there is one
        return socket.create_server((host, port), family=family)
    except (OSError, UnicodeError) as error:
        reason = str(error)
        if isinstance(error, OSError) and error.errno == errno.EADDRINUSE:
            reason = "it is in use; port 0 (--port 0) takes a free one"
        elif isinstance(error, OSError) and error.errno == errno.EACCES:
            reason = "not allowed; ports below 1024 are the administrator's"
        raise SettingsError(f"cannot listen on port {port} of {host}: {reason}") from None


class LogThread(logging.Handler):
    """Has a thread write the log to stderr, so that nobody waits for whoever reads it.

    Beyond a thousand lines that wait they are dropped; the next line says how many.
    """

    def __init__(self) -> None:
        super().__init__()
        self._lines: queue.Queue[bytes] = queue.Queue(1000)
        self._dropped = 0
        self._thread = threading.Thread(target=self._write, daemon=True)
        self._thread.start()

    def _write(self) -> None:
        for line in iter(self._lines.get, b""):
            left = line
            while left:
                select.select([], [2], [])  # whose writes may be set not to wait
                left = left[os.write(2, left) :]

    def emit(self, record: logging.LogRecord) -> None:
        line = f"{self.format(record)}\n"
        if self._dropped:
            line = f"{self._dropped} lines of the log were dropped: nobody read them\n{line}"
        try:
            self._lines.put_nowait(line.encode(errors="backslashreplace"))
            self._dropped = 0
        except queue.Full:
            self._dropped += 1

    def close(self) -> None:
        """Waits for what is not written yet, but not for a reader who does not come."""
        with contextlib.suppress(queue.Full):
            self._lines.put_nowait(b"")
        self._thread.join(1.0)
        super().close()


def leave_threads(supervisor: Supervisor, code: int) -> None:
    """Ends the process where a thread that cannot be stopped would keep it.

    That is an abandoned run, MetaGPT's import, or a print that nobody reads.
    """
    flush = threading.Thread(target=sys.stdout.flush, daemon=True)
    flush.start()
    flush.join(1.0)
    if flush.is_alive() or supervisor.abandoned or supervisor.engine.status == "loading":
        logging.shutdown()
        os._exit(code)


HELP = """\
usage: streamer.py [--<setting> …]                        serves, until Ctrl-C
       streamer.py run "what to build" [--<option> …]     one task, here in the terminal

{settings}
Run      {options}
         --json prints the messages, one a line; - reads the prompt from standard input
Other    --version, --help; flags stand anywhere; --no-… for false

examples:
  python streamer.py --test-mode                          a scripted team, no key needed
  OPENAI_API_KEY=sk-… python streamer.py --port 9000      a real team
  python streamer.py run "Build a todo app" --n-round 3
  python streamer.py run - --json < prompt.txt | jq .

A setting is a variable, too: --max-running is STREAMER_MAX_RUNNING.
Exit codes: 0, 1 the task failed, 2 wrong usage or settings, 3 the start failed, 130 interrupted."""


def help_text() -> str:
    """One screen: each flag with its default, the settings in groups."""
    settings = []
    for item in fields(Settings):
        flag = flag_usage(item.name, item.default)
        settings.append(f"{item.metadata['group']:8} {flag:24} {item.metadata['help']}")
    options = [flag_usage(name, option.default) for name, option in OPTIONS.items()]
    indented = textwrap.wrap(", ".join(options), 90, break_on_hyphens=False)
    return HELP.format(settings="\n".join(settings), options=f"\n{'':9}".join(indented))


def flag_usage(name: str, default: Any) -> str:
    """A flag as one would type it."""
    if type(default) is bool:
        return flag_of(f"no_{name}" if default else name)
    if default in ("", (), [], None):
        return f"{flag_of(name)}={name.split('_')[-1].upper()}"
    shown = f"{default:g}" if type(default) is float else default
    return f"{flag_of(name)}={shown}"


class ArgumentParser(argparse.ArgumentParser):
    """argparse's, whose complaints end like those about settings."""

    def error(self, message: str) -> NoReturn:
        raise SettingsError(f"{message}; see --help")


def parse_arguments(argv: Sequence[str]) -> argparse.Namespace:
    """The words, and the text of each flag that was given; flags stand anywhere.

    Raises SettingsError.
    """
    defaults = {item.name: item.default for item in fields(Settings)}
    defaults |= {name: option.default for name, option in OPTIONS.items()}
    parser = ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("words", nargs="*")
    parser.add_argument("-h", "--help", action="store_true")
    parser.add_argument("--version", action="store_true")
    parser.add_argument("--json", action="store_true")
    switches = {}
    for name, default in defaults.items():
        parser.add_argument(flag_of(name))
        if type(default) is bool:
            switches[flag_of(name)] = f"{flag_of(name)}=true"
            switches[flag_of(f"no_{name}")] = f"{flag_of(name)}=false"
    words = [switches.get(word, word) for word in argv]
    arguments, unknown = parser.parse_known_intermixed_args(words)
    if unknown:
        known = [*map(flag_of, defaults), *switches, "--help", "--version", "--json"]
        parser.error(unknown_name(unknown[0].partition("=")[0], known))
    return arguments


def parse_option_flags(arguments: argparse.Namespace) -> dict[str, Any]:
    """A task's options, as JSON would give them: text where an option takes it, or what it says."""
    options: dict[str, Any] = {}
    for name, option in OPTIONS.items():
        text = getattr(arguments, name)
        if text is not None:
            options[name] = text
            if type(option.default) is list:
                options[name] = list(parse_names(text))
            elif not option.check(text):
                with contextlib.suppress(ValueError):
                    options[name] = json.loads(text)
    return options


def check_workspace(folder: Path) -> None:
    """Raises SettingsError where no file can be written below `folder`."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        reason = f"cannot be written ({error.strerror})"
        if isinstance(error, FileExistsError | NotADirectoryError):
            reason = "is a file, or below one, and must be a folder"
        raise SettingsError(f"workspace {str(folder)!r} {reason}; set --workspace") from error


def _prepare_process() -> None:
    """Signals, streams and warnings, before anything is opened."""
    if signal.getsignal(signal.SIGHUP) is signal.SIG_DFL:  # behind nohup it is ignored
        signal.signal(signal.SIGHUP, lambda *_: signal.raise_signal(signal.SIGTERM))
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:  # closed, as by `>&-`: whatever is opened next would be it
            setattr(sys, name, open(os.devnull, mode))  # noqa: SIM115
    # Python hides these warnings of libraries, but shows those about what a script calls.
    warnings.simplefilter("ignore", DeprecationWarning)


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; returns its exit code, which HELP explains."""
    _prepare_process()
    if sys.version_info >= (3, 14):
        print("streamer: tried on Python 3.11, 3.12 and 3.13; this one is newer", file=sys.stderr)
    try:
        arguments = parse_arguments(sys.argv[1:] if argv is None else argv)
        if arguments.help or arguments.version:
            print(help_text() if arguments.help else f"streamer {__version__}")
            return 0
        command, *prompts = arguments.words or ["serve"]
        if command not in ("serve", "run"):
            known = 'serve (the default) and run "what to build"'
            raise SettingsError(f"{command!r} is no command; the commands are {known}")
        if command == "serve" and prompts:
            raise SettingsError(f"serve takes no {quoted(prompts[0])}; flags begin with --")
        if command == "run" and len(prompts) != 1:
            example = quoted(" ".join(prompts) or "Build a todo app")
            raise SettingsError(f"run takes one prompt, not {len(prompts)}: run {example}")
        settings = Settings.from_environ(
            **{item.name: getattr(arguments, item.name) for item in fields(Settings)}
        )
        check_workspace(settings.workspace)
        if settings.teams:
            sys.path.append(os.getcwd())
        options = parse_option_flags(arguments)
        if command == "run":
            return _run(settings, prompts[0], options, arguments.json)
        if options:
            flag = flag_of(min(options))
            raise SettingsError(f"{flag} is for a task: use it with run, or POST it")
        return _serve(settings)
    except (SettingsError, InvalidRequest) as error:
        print(f"streamer: {error}", file=sys.stderr)
        return 2
    except ModuleNotFoundError as error:
        print(f"streamer: {error}; type: {INSTALL}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130


def _serve(settings: Settings) -> int:
    form = "%(asctime)s %(levelname)s %(name)s %(message)s"
    logging.basicConfig(format=form, handlers=[LogThread()])
    logger.setLevel(logging.INFO)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)  # whatever a team runs, nothing waits for an input
    app = create_app(settings)
    serve(app, settings)
    leave_threads(app.state.supervisor, 0)
    return 0


def _run(settings: Settings, prompt: str, given: Mapping[str, Any], as_json: bool) -> int:
    teams = [team.partition("=")[0] for team in settings.teams]
    options = parse_options(given, settings.task_timeout, flag_of, teams)
    if prompt == "-":
        if sys.stdin.isatty():
            print("Type the prompt, then Ctrl-D on a line of its own:", file=sys.stderr)
        with open(0, encoding="utf-8", errors="surrogateescape", closefd=False) as stdin:
            prompt = stdin.read(settings.max_prompt + 1).strip()
    prompt = parse_text({"prompt": prompt}, "prompt", settings.max_prompt)
    if sys.stdout.isatty() and not as_json:
        settings = replace(settings, heartbeat=1.0)  # the last line is renewed by states
    supervisor = create_app(settings, store=MemoryStore(settings)).state.supervisor
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")
    transcript = _Raw() if as_json else Transcript()
    try:
        status = anyio.run(_run_here, supervisor, prompt, options, transcript)
        code = 0 if status is TaskStatus.SUCCEEDED else 1
    except (KeyboardInterrupt, asyncio.CancelledError):
        code = 130
    with output_may_end():
        sys.stdout.flush()
    leave_threads(supervisor, code)
    return code


@contextlib.contextmanager
def output_may_end() -> Iterator[None]:
    """A task goes on where what is shown of it cannot be written any more."""
    try:
        yield
    except OSError as error:
        if not isinstance(error, BrokenPipeError):  # `run … | head` is no fault
            logger.warning("the output cannot be written: %s", error)
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, sys.stdout.fileno())
        try:
            sys.stderr.flush()
        except OSError:
            os.dup2(nowhere, sys.stderr.fileno())


async def _run_here(
    supervisor: Supervisor, prompt: str, options: Mapping[str, Any], transcript: Transcript
) -> TaskStatus:
    this = asyncio.current_task()
    assert this is not None
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, this.cancel)
    async with supervisor.open():
        task, _ = await supervisor.submit(prompt, prompt[:80], options)
        try:
            async with supervisor.watch(task.id) as subscription:
                await supervisor.start(task.id)
                try:
                    await _show(supervisor, subscription, transcript)
                except asyncio.CancelledError:
                    with output_may_end():
                        transcript.line("interrupted: cancelling the run")
                    with contextlib.suppress(TaskEnded):
                        await supervisor.cancel(task.id)
                    await _show(supervisor, subscription, transcript)
                    raise
        finally:
            with output_may_end():
                transcript.end(supervisor.settings.workspace / task.id)
        return subscription.broker.task.status


async def _show(supervisor: Supervisor, subscription: Subscription, transcript: Transcript) -> None:
    """Shows what comes, to the end, and asks here what the team asks."""
    question: Mapping[str, Any] | None = None
    send, receive = anyio.create_memory_object_stream[Mapping[str, Any]](math.inf)
    async with send, receive, anyio.create_task_group() as group:
        group.start_soon(_ask_here, supervisor, subscription.broker, transcript, receive)
        async for delivery in subscription:
            for message in delivery.messages:
                with output_may_end():
                    transcript.show(json.loads(message))
            before = question
            question = subscription.broker.state.question
            if question is not None and question != before:
                send.send_nowait(question)
        group.cancel_scope.cancel()


async def _ask_here(
    supervisor: Supervisor,
    broker: Broker,
    transcript: Transcript,
    questions: AsyncIterable[Mapping[str, Any]],
) -> None:
    """The next line of standard input is the answer; where there is none the task is cancelled."""
    lines = _input_lines()
    async for question in questions:
        while broker.state.question == question:
            with output_may_end():
                transcript.ask(question)
            given = {**question, "answer": await anext(lines, None)}
            try:
                if given["answer"] is None:
                    with output_may_end():
                        transcript.line("standard input has ended: nobody can answer")
                    await supervisor.cancel(broker.task.id)
                    return
                answer = parse_answer(given, supervisor.settings)
                await supervisor.answer(broker.task.id, *answer)
                break
            except (InvalidRequest, QuestionClosed, TaskEnded) as error:
                with output_may_end():
                    transcript.line(str(error))


async def _input_lines() -> AsyncIterator[str]:
    """Standard input; no thread waits for it, so that the wait can be given up."""
    unread = b""
    while True:
        with contextlib.suppress(PermissionError):  # of a file, which is always readable
            await anyio.wait_readable(0)
        data = os.read(0, 65536)
        if not data:
            return
        *lines, unread = (unread + data).split(b"\n")
        for line in lines:
            yield line.decode(errors="replace")


class Transcript:
    """Shows a task's messages to a person, as lines; what a model says runs on as it comes.

    Of roles at work at once one has the floor, and what the others do is kept until it is done, or
    silent. A terminal has colours, and a last line: how far, who is at work, at which cost.
    """

    PATIENCE = 3.0  # seconds until a silent role loses the floor
    ROLE_STYLES = ("1;36", "1;35", "1;32", "1;33", "1;34")
    STYLES: Mapping[str, tuple[str, str]] = {  # of what has no role's: style, first word
        EventType.REASONING: ("2;3", ""),
        EventType.ANSWER: ("", "answered: "),
        EventType.ERROR: ("31", ""),
        EventType.TASK_ERROR: ("1;31", "failed: "),
        EventType.TASK_COMPLETE: ("1;32", "done: "),
    }

    def __init__(self) -> None:
        self._terminal = sys.stdout.isatty() and os.environ.get("TERM") != "dumb"
        self._roles: dict[str, str] = {"": ""}  # role → style
        self._at_work: dict[str, None] = {}  # roles, as an ordered set
        self._floor = ""  # the role that has it
        self._heard = 0.0  # when it did something
        self._kept: dict[str, list[Mapping[str, Any]]] = {}  # role → events
        self._heading = ""  # what the text that comes next is known to be
        self._text: tuple[Any, ...] = ()  # whose text the open line holds
        self._told = ""  # the last error or notice
        self._percent = 0
        self._status = ""

    def show(self, message: Mapping[str, Any]) -> None:
        data = message["data"]
        if message["type"] == "state":
            self._show_state(data)
        elif message["type"] == "event":
            self._take(data)
        else:
            self.line(data.get("message", ""))
        if self._status and not self._text:  # not wrapped where it is too long
            print(f"\r\x1b[K\x1b[?7l{self._styled(self._status, '2')}\x1b[?7h", end="", flush=True)

    def line(self, text: str, role: str = "", style: str = "") -> None:
        self._end_line()
        text = printable(text)
        role = printable(role)
        if role and not text.startswith(role):
            text = f"{role}: {text}"
        if self._terminal:
            width = shutil.get_terminal_size().columns
            wrapper = textwrap.TextWrapper(width, subsequent_indent="  ")
            wrapper.break_long_words = wrapper.break_on_hyphens = False  # a path stays whole
            text = "\n".join(map(wrapper.fill, text.split("\n")))
        name = role if text.startswith(role) else ""
        style_of_role = self.ROLE_STYLES[len(self._roles) % len(self.ROLE_STYLES)]
        style_of_role = self._roles.setdefault(role, style_of_role)
        print(
            self._styled(name, style_of_role) + self._styled(text[len(name) :], style), flush=True
        )
        self._heading = ""

    def ask(self, question: Mapping[str, Any]) -> None:
        """Says what may be typed as the answer."""
        ways = [*(question["choices"] or ()), *(["any text"] if question["free_text"] else [])]
        self.line(f"answer ({', '.join(ways)}):")

    def end(self, folder: Path) -> None:
        self._status = ""
        for path, size, _ in list_files(folder):
            self.line(f"{size:>9,} bytes  {path}")
        self.line(f"files: {folder}")

    def _take(self, event: Mapping[str, Any]) -> None:
        """Shows an event, or keeps it while another role has the floor."""
        role = event["agent_role"] or ""
        kind = event["event_type"]
        if kind == EventType.AGENT_START:
            self._at_work[role] = None
        elif kind in (EventType.AGENT_COMPLETE, EventType.ERROR):
            self._at_work.pop(role, None)
        elif kind.startswith("TASK_"):
            self._at_work.clear()
        if kind in (EventType.ERROR, EventType.QUESTION):
            self._floor = role
        if role:
            self._kept.setdefault(role, []).append(event)
        self._go_on()
        if not role:
            self._show_event(event)

    def _go_on(self) -> None:
        while True:  # with one role less each time
            for event in self._kept.pop(self._floor, ()):
                self._heard = time.monotonic()
                self._show_event(event)
            silent = time.monotonic() > self._heard + self.PATIENCE
            if not self._kept or (self._floor in self._at_work and not silent):
                return
            self._floor = next(iter(self._kept))

    def _show_event(self, event: Mapping[str, Any]) -> None:
        role = event["agent_role"] or ""
        kind = event["event_type"]
        payload = event["payload"]
        heading = f"{role} {payload.get('action') or ''}".strip()
        text = payload["message"]
        if kind in (EventType.TOKEN, EventType.REASONING):
            self._write(text, kind, role, heading, payload.get("call_id"))
            return
        if (
            (kind == EventType.LOG and payload.get("level") in ("DEBUG", "INFO"))
            or (kind == EventType.RESULT and not role)  # the task's last event says the same
            or payload.get("sent_from") == "Human"  # its first one does
        ):
            return
        if kind == EventType.TASK_START and payload.get("mode") == "test":
            text += " (test mode: a scripted team)"
        elif kind == EventType.TASK_ERROR and self._terminal and text == self._told:
            text = "see above"
        elif kind == EventType.ERROR:
            self._told = text
        if kind != EventType.QUESTION:
            text = text[:1000].replace("\n", " ")
        style, first_word = self.STYLES.get(kind, ("", ""))
        self.line(first_word + text, role, style)
        if kind == EventType.AGENT_START:
            self._heading = heading

    def _write(self, text: str, kind: str, role: str, heading: str, call_id: object) -> None:
        if kind == EventType.REASONING and not self._terminal:
            return  # nothing would tell it from the answer
        if heading != self._heading:
            self.line(heading, role)
            self._heading = heading
        if self._text != (kind, call_id):
            self._end_line()
        style, _ = self.STYLES.get(kind, ("", ""))
        print(self._styled(printable(text), style), end="", flush=True)
        self._text = () if text.endswith("\n") else (kind, call_id)

    def _end_line(self) -> None:
        """Ends the text that has an open line, or wipes the status away."""
        if self._text:
            print()
        elif self._terminal:
            print("\r\x1b[K", end="")
        self._text = ()

    def _show_state(self, data: Mapping[str, Any]) -> None:
        self._go_on()
        ended = data["status"] in ENDED
        notice = data["last_message" if data["status"] == TaskStatus.PENDING else "error_message"]
        if notice and notice != self._told and not ended:
            self._told = notice
            self.line(notice)
        percent = int(100 * data["progress"])
        about = [f"{percent}%"]
        cost = data["cost"]
        tokens = cost["prompt_tokens"] + cost["completion_tokens"]
        if tokens:
            about += [f"{tokens:,} tokens", price_text(cost["total_cost"], cost["max_budget"])]
        if self._terminal:
            if "waiting_on" in data:
                about.insert(1, f"silent for {data['waiting_on']['seconds']:.0f} s")
            about[1:1] = self._at_work
            text = printable(", ".join(about))[: shutil.get_terminal_size().columns - 1]
            self._status = "" if ended or "question" in data else text
        elif percent != self._percent and not ended and self._floor not in self._at_work:
            self._percent = percent
            self.line(", ".join(about))

    def _styled(self, text: str, style: str) -> str:
        if not text or not style or not self._terminal or os.environ.get("NO_COLOR"):
            return text
        return f"\x1b[{style}m{text}\x1b[0m"


class _Raw(Transcript):
    """`--json`: the messages as they are, for other programs."""

    def show(self, message: Mapping[str, Any]) -> None:
        print(encode(message), flush=True)

    def line(self, text: str, role: str = "", style: str = "") -> None:
        print(printable(text), file=sys.stderr)

    def ask(self, question: Mapping[str, Any]) -> None: ...

    def end(self, folder: Path) -> None: ...


def printable(text: str) -> str:
    """Without the control characters that steer a terminal: the text is a model's."""
    return re.sub(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]", "�", text)


# -----------------------------------------------------------------------------
# Page
# -----------------------------------------------------------------------------


# Only what holds the nonce of the answer it came with is a style or a script of the page.
PAGE_POLICY = (
    "default-src 'none'; style-src 'nonce-NONCE'; script-src 'nonce-NONCE'; "
    "connect-src 'self'; img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)

# One document, no framework, nothing from elsewhere. All text goes in as text, never as HTML.
PAGE = r"""<!doctype html>
<html lang="en"><head><meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>streamer</title><link rel="icon" href="data:image/svg+xml,
<svg xmlns='http://www.w3.org/2000/svg' viewBox='0 0 24 24' fill='none' stroke='white'>
<rect width='24' height='24' rx='7' fill='%234f5bea' stroke='none'/>
<path stroke-width='2' d='M6 8q3-3 6 0t6 0M6 13q3-3 6 0t6 0M6 18h6'/></svg>">
<style nonce="NONCE">
:root {
  color-scheme: light dark;
  --back: light-dark(#f5f5f8, #0c0d10);
  --card: light-dark(#fff, #15171b);
  --text: light-dark(#1b1c21, #e8e9ed);
  --dim: light-dark(#5c6270, #9ba1ad);
  --line: light-dark(#e4e5ea, #2a2d35);
  --accent: light-dark(#4351d6, #a6b1ff);
  --good: light-dark(#17733b, #7ed6a0);
  --bad: light-dark(#b8261d, #ff958c);
  --mono: 12.5px/1.6 ui-monospace, Menlo, Consolas, "Liberation Mono", monospace;
  font: 14px/1.55 -apple-system, "Segoe UI", Roboto, "Helvetica Neue", Arial, sans-serif;
}
* { box-sizing: border-box; accent-color: var(--accent); }
[hidden], .card:empty, .mark:empty, section:has(#feed:empty) { display: none !important; }
.watching #home, body:not(.watching) #task { display: none; }
body { margin: 0; display: grid; grid: auto minmax(0, 1fr) / 17rem minmax(0, 1fr); height: 100dvh; }
body, dialog { background: var(--back); color: var(--text); }
header, nav { overflow: auto; padding: .75rem; }
main { grid-area: 1 / 2 / 3; overflow: auto; margin: .5rem .5rem .5rem 0; padding: 0 2rem; }
main, .card { background: var(--card); border: 1px solid var(--line); border-radius: 12px; }
.card { padding: .75rem 1.1rem; }
.row { display: flex; flex-wrap: wrap; gap: .4rem .75rem; align-items: center; }
.grow { flex: 1; min-width: 0; }
.tiles { display: grid; grid-template-columns: repeat(auto-fit, minmax(11rem, 1fr)); gap: .75rem; }
.stack, .md { display: grid; grid-template-columns: minmax(0, 1fr); gap: .75rem; }
h1, h2, h3, h4, p, pre, ul, ol, figure, blockquote { margin: 0; overflow-wrap: anywhere; }
h1, h3, h4 { font-size: 1rem; }
h2 { font-size: 1.4rem; line-height: 1.3; letter-spacing: -.015em; }
ul[id], ol[id] { list-style: none; padding: 0; }
.link { padding: 0; min-height: 24px; border: 0; color: var(--accent); }
.dim, small, time, summary { color: var(--dim); }
.bad, .ERROR { color: var(--bad); }
a { display: block; color: inherit; text-decoration: none; }
a, button, select, summary { cursor: pointer; }
button, select, input, textarea { font: inherit; color: inherit; background: var(--card); }
select { max-width: 9rem; }
button, select, input, textarea, nav > a { padding: .3rem .8rem; min-height: 2rem; }
button, select, input, textarea, nav > a { border: 1px solid var(--line); border-radius: 8px; }
button:hover:enabled, nav > a:hover { border-color: var(--dim); }
.primary, #question button:first-of-type { background: var(--accent); color: var(--card); }
:disabled { opacity: .5; cursor: default; }
textarea, input { border-color: var(--dim); vertical-align: middle; }
textarea, input:not([type=checkbox]), progress { width: 100%; }
progress { height: 6px; }
:focus-visible { outline: 2px solid var(--accent); outline-offset: 2px; }
#notice { position: fixed; inset: auto 0 1rem; z-index: 2; width: fit-content; margin: auto; }
#tasks a { padding: .5rem .8rem; margin-top: .25rem; border-radius: 8px; }
#tasks a:hover, [aria-current=true] { background: light-dark(#e9eaf0, #1d2027); }
.title { display: block; overflow: hidden; text-overflow: ellipsis; white-space: nowrap; }
.mark::before { content: "○ "; }
.RUNNING::before { content: "● "; color: var(--accent); }
.SUCCEEDED::before, .TASK_COMPLETE::before { content: "✓ "; color: var(--good); }
.FAILED::before, .TASK_ERROR::before { content: "✕ "; color: var(--bad); }
.CANCELLED::before, .TASK_CANCELLED::before { content: "■ "; }
#home { max-width: 46rem; margin: 12vh auto 2rem; }
#home h2 { font-size: 2.2rem; }
#box, #question { border-color: var(--accent); box-shadow: 0 8px 30px #0001; }
#box > .row, #login .row { padding: .25rem 1rem .75rem; align-items: end; }
#prompt { height: 8rem; padding: 1rem; border: 0; outline: 0; resize: none; background: none; }
#task { display: grid; grid: auto 1fr/minmax(0, 67rem) 19rem; gap: 0 2rem; place-content: center; }
#top { position: sticky; top: 0; z-index: 1; max-height: 65vh; overflow: auto; }
#top { padding: 1.5rem 0 1rem; background: var(--card); }
.role { --role: light-dark(oklch(47% .14 var(--hue)), oklch(80% .11 var(--hue))); }
.name, .avatar { color: var(--role); font-weight: 600; }
.avatar { display: grid; place-items: center; width: 2rem; height: 2rem; border-radius: 50%; }
.avatar { background: var(--role, var(--dim)); color: var(--card); font-size: .75rem; }
.card.bad, #now > li { border-color: var(--role, currentColor); }
.tail { display: flex; flex-direction: column-reverse; height: 8rem; overflow: hidden; }
.tail { font: var(--mono); mask-image: linear-gradient(transparent, #000 3rem); }
aside { grid-area: 1 / 2 / 3; position: sticky; top: 0; align-self: start; max-height: 96dvh; }
aside { overflow: auto; padding: 1.6rem 0; }
#team > li { display: grid; grid: auto / 2rem 1fr auto; gap: 0 .75rem; align-content: start; }
#team .avatar { grid-row: span 2; }
.doing, .track { grid-column: 2 / -1; }
.track { position: relative; height: 4px; margin-top: .4rem; background: var(--line); }
.track i { position: absolute; height: 100%; min-width: 3px; background: var(--role); }
#feed, #lines { margin: 1.25rem 0 2rem; }
#feed > li { display: grid; grid-template-columns: 2rem minmax(0, 1fr); gap: 0 1rem; }
#feed > li { padding-bottom: 2rem; content-visibility: auto; contain-intrinsic-size: auto 28rem; }
#feed > li { background: linear-gradient(var(--line) 0 0) 1rem 2.4rem / 1px 100% no-repeat; }
#feed p + * { margin-top: .5rem; }
li:not(.note) .told:not(.ARTIFACT) { width: 100%; }
.doc, #box { padding: 0; overflow: hidden; }
.doc > .md { padding: 1rem 1.1rem; max-height: 22rem; overflow: hidden; }
.doc > .md { mask-image: linear-gradient(#000 17rem, transparent 22rem); }
.doc > footer { padding: .3rem 1.1rem; border-top: 1px solid var(--line); }
.said, .md p, .tail, #lines { white-space: pre-wrap; overflow-wrap: anywhere; }
.md ul, .md ol { padding-left: 1.4em; }
.md li ul { padding: 0; list-style: none; }
blockquote { padding-left: 1rem; border-left: 3px solid var(--line); color: var(--dim); }
pre, code, #lines { font: var(--mono); }
table { border-collapse: collapse; }
th, td { padding: .4rem 1.5rem .4rem 0; border-bottom: 1px solid var(--line); }
th, td { text-align: left; vertical-align: top; overflow-wrap: normal; }
.scroll { overflow: auto; }
.code { display: flex; gap: 1.25rem; }
.code > .dim { text-align: right; user-select: none; }
.code b { color: var(--accent); font-weight: normal; }
.code q { color: var(--good); quotes: none; }
.md > figure:only-child { border: 0; padding: 0; }
#lines > div { content-visibility: auto; contain-intrinsic-size: auto 40rem; }
#latest { position: sticky; bottom: 1rem; grid-column: 1; justify-self: center; }
#viewer { width: min(64rem, 94vw); padding: 0; }
#viewer > .row { position: sticky; top: 0; padding: .75rem 1.25rem; background: var(--back); }
#content { padding: 1.25rem; }
#content > .md > figure:only-child > figcaption { display: none; }
@media (max-width: 72em) {
  #task { display: block; }
  aside { position: static; padding: 0 0 1.5rem; }
}
@media (max-width: 48em) {
  body { grid: auto minmax(0, 1fr) auto / minmax(0, 1fr); }
  main { grid-area: 2 / 1; margin: 0; padding: 0 1rem; border-width: 1px 0; border-radius: 0; }
  nav { max-height: 35dvh; }
  #top { position: static; max-height: none; }
  #title { flex-basis: 100%; }
  .watching nav { display: none; }
}
@media (prefers-reduced-motion: no-preference) { #now .avatar { animation: pulse 1.5s infinite; } }
@keyframes pulse { from { box-shadow: 0 0 0 0 var(--role); } to { box-shadow: 0 0 0 8px #0000; } }
</style></head><body>
<header class=row><h1><a class=row href="#"><img id=mark alt="" width=24 height=24>
streamer</a></h1><small id=mode title="a scripted team, not MetaGPT"></small>
<small id=link role=status></small></header>
<nav aria-label=Tasks><a href="#">+ New task</a><ul id=tasks></ul>
<div class=row><button id=newer hidden>Newer</button> <button id=older hidden>Older</button></div>
</nav><main><form id=home class=stack><h2><label for=prompt>What shall the team build?</label></h2>
<p class=dim>A team of AI agents plans, designs and writes it while you watch.</p>
<div id=box class=card><textarea id=prompt required dir=auto></textarea>
<div class=row><details class=grow><summary>Options</summary><div id=options class=tiles>
<label id=teams hidden>Who works on it <select name=team>
<option value="">the software company</option></select></label>
<label>Rounds at most <input name=n_round type=number min=1 max=50 value=5></label>
<label>US dollars at most <input name=investment type=number min=0.01 step=any value=3></label>
<label>Seconds at most <input name=timeout type=number min=1 step=any></label>
<label>Project name <input name=project_name pattern="[A-Za-z][A-Za-z0-9_]*" maxlength=64></label>
<label>Wait for my word after <input name=approve placeholder="WritePRD, WriteDesign"></label>
</div><p class=row><label><input name=implement type=checkbox checked> Write the code</label>
<label><input name=code_review type=checkbox checked> Review the code</label>
<label><input name=run_tests type=checkbox> Test it: runs what the model wrote</label></p>
</details><button type=button id=start class=primary title="Ctrl+Enter">Start</button></div>
</div><div id=examples class=row><button type=button>A to-do list for the terminal</button>
<button type=button>A snake game for the browser</button>
<button type=button>A web page that converts units</button></div></form>
<article id=task><div id=top class=stack><div class=row><h2 id=title class="grow title" dir=auto>
</h2><button id=run class=primary></button><button id=cancel>Stop</button>
<button id=more class="link dim" popovertarget=sure>Delete …</button></div>
<div id=sure class=card popover>Its log and its files go too.<button id=delete class=bad>
Delete it</button></div><p><span id=status role=status></span> <span id=facts class=dim></span></p>
<progress id=progress max=1 aria-label=Progress></progress><div id=question class="card stack"
aria-live=polite></div><div id=failure class="card stack bad" role=alert></div>
<ul id=now class=tiles aria-label="At work"></ul></div>
<aside class=stack aria-label="Team and files"><ul id=team class=tiles aria-label=Team></ul>
<details id=made><summary>Files</summary><div class=stack>
<ul id=files></ul><button id=zip>Download all</button></div></details></aside>
<section aria-label=Story><div class=row><h3 class=grow>Story</h3>
<select id=who aria-label=Whose><option value="">everybody</option></select>
<select id=kind aria-label=What><option value="">everything</option>
<option value=TOKEN>texts</option><option value=MESSAGE>messages</option>
<option value=ARTIFACT>files</option><option value=ERROR>errors</option></select>
<label><input type=checkbox id=log> Log</label></div><ol id=feed></ol><div id=lines></div></section>
<button id=latest hidden>Jump to the latest ↓</button></article></main>
<p id=notice class="card bad" role=alert></p>
<dialog id=login class=card aria-label=Token><form method=dialog class=row>
<label>This server's token <input type=password id=token autocomplete=off required></label>
<button class=primary>Open</button></form></dialog>
<dialog id=viewer class=card aria-labelledby=name><div class=row>
<h3 id=name class=grow></h3><button id=copy>Copy</button>
<button id=save>Download</button><form method=dialog><button>Close</button></form></div>
<div id=content></div></dialog>
<script nonce="NONCE">
"use strict";
const ACTIONS = {
  PrepareDocuments: "prepares the folder",
  WritePRD: "writes the requirements",
  WriteDesign: "designs the system",
  WriteTasks: "plans the work",
  WriteCode: "writes code",
  WriteCodeReview: "reviews code",
  WriteTest: "writes tests",
};
const ADVICE = "What was made until then is kept. Mend what the reason names, and run it again.";
const $ = id => document.getElementById(id);
const main = document.querySelector("main");
const roles = [];  // each has a colour by its index
const filters = new CSSStyleSheet();
const token = new URLSearchParams(location.search).get("token") || sessionStorage.getItem("token");
let view = null;  // the task that is shown
let page = 1;  // of the list
let skew = 0;  // of this clock to the server's, in ms
let offline = 0;  // seconds until a server that is away is tried again
let seconds = 0;  // since the page was opened
let follow = false;  // the latest stays in sight

// What turns the direction of text could hide what a file or an address says.
const visible = text => String(text).replace(/[\u202a-\u202e\u2066-\u2069]/g,
  char => `[U+${char.codePointAt().toString(16).toUpperCase()}]`);
// el("p.dim", {title}, "text", child): text goes in as text, never as HTML.
function el(name, ...inside) {
  const [tag, ...classes] = name.split(".");
  const made = document.createElement(tag);
  const properties = {className: classes.join(" ")};
  for (const each of inside.flat(Infinity)) {
    if (each instanceof Node) made.append(each);
    else if (typeof each === "object") Object.assign(properties, each);
    else made.append(visible(each));
  }
  return Object.assign(made, properties);  // last: with dir="auto" each child costs
}
function put(element, text) {  // what has not changed is not read out again
  if (element.textContent !== visible(text)) element.textContent = visible(text);
}
const spaced = name => name.replace("Qa", "QA").replace(/(?<=[a-z]|^QA)(?=[A-Z])|_/g, " ");
const words = action => ACTIONS[action] || spaced(action || "works").toLowerCase();
const joined = (...facts) => facts.flat().filter(Boolean).join(" · ");
const isLive = status => status === "PENDING" || status === "RUNNING";
const isBusy = ({bars}) => bars.length > 0 && !bars.at(-1).to;
function clock(ms) {
  const seconds = Math.max(0, Math.floor(ms / 1000));
  return `${Math.floor(seconds / 60)}:${String(seconds % 60).padStart(2, "0")}`;
}
function age(at) {
  const minutes = Math.max(0, Math.floor((Date.now() - skew - Date.parse(at)) / 60000));
  if (minutes < 60) return minutes ? `${minutes} min ago` : "just now";
  if (minutes < 2880) return `${Math.floor(minutes / 60)} h ago`;
  return `${Math.floor(minutes / 1440)} days ago`;
}
function money({total_cost: dollars, prompt_tokens, completion_tokens}) {
  const tokens = prompt_tokens + completion_tokens;
  const price = dollars === null ? "price unknown" : dollars && `$${dollars.toFixed(4)}`;
  return [price, tokens && `${tokens.toLocaleString()} tokens`];
}

// Documents: Markdown, JSON and code as elements
const DIAGRAM = /^\s*(graph|flowchart|sequenceDiagram|classDiagram|erDiagram|quadrantChart)\b/;
const INLINE = /(`[^`\n]+`|\*\*[^*\n]+\*\*|\*[^*\s](?:[^*\n]*[^*\s])?\*)/;
const KEYWORDS = "async|await|class|const|def|elif|else|for|from|function|if|import|in|let|return";
const SYNTAX = RegExp(`("[^"\\n]*"|'[^'\\n]*'|(?:#|//)[ !].*|\\b(?:${KEYWORDS})\\b)`);
const BLOCKS = [
  [/^\s*$/, () => []],
  [/^#{1,6}\s/, lines => lines.map(line => el("h4", inline(line.replace(/^#+\s+/, ""))))],
  [/^\s*\|/, table],
  [/^>/, lines => el("blockquote", lines.map(line => el("p", inline(line.slice(1).trim()))))],
  [/^\s*\d+[.)]\s/, lines => el("ol", lines.map(entry))],
  [/^\s*[-*+]\s/, lines => el("ul", lines.map(entry))],
  [/^/, lines => el("p", {dir: "auto"}, inline(lines.join("\n")))],
];
const marked = (text, pattern, make) =>  // what the pattern finds becomes elements
  text.split(pattern).map((part, index) => index % 2 ? make(part) : part);
function inline(text) {
  return marked(text, INLINE, part => {
    if (part[0] === "`") return el("code", part.slice(1, -1));
    return part[1] === "*" ? el("strong", part.slice(2, -2)) : el("em", part.slice(1, -1));
  });
}
function entry(line) {
  const [, indent, text] = /^(\s*)\S+\s(.*)/.exec(line);
  return el("li", {dir: "auto", style: `margin-left: ${indent.length / 2}em`}, inline(text));
}
function table(lines) {
  const rows = lines.filter(line => /[^\s|:-]/.test(line)).map((line, index) => {
    const cells = line.trim().replace(/^\||\|$/g, "").split("|");
    return el("tr", cells.map(cell => el(index ? "td" : "th", inline(cell.trim()))));
  });
  return el("div.scroll", {tabIndex: 0}, el("table", rows));
}
function blocks(text) {
  const groups = [];
  for (const line of text.split("\n")) {
    const kind = BLOCKS.find(([pattern]) => pattern.test(line));
    if (groups.at(-1)?.kind === kind) groups.at(-1).lines.push(line);
    else groups.push({kind, lines: [line]});
  }
  return groups.map(({kind, lines}) => kind[1](lines));
}
function markdown(text) {  // prose, language, code, nothing, prose, language, …
  const parts = text.split(/^[ \t]*```([^`\n]*)$/m);
  return parts.map((part, index) => {
    if (index % 4 === 2) return code(part.replace(/^\n|\n$/g, ""), parts[index - 1]);
    return index % 4 === 0 ? blocks(part) : [];
  });
}
function code(text, language) {
  const isDiagram = language === "mermaid" || DIAGRAM.test(text);
  const numbers = text.split("\n").map((line, index) => index + 1).join("\n");
  const tag = part => /^\w/.test(part) ? "b" : /^["']/.test(part) ? "q" : "i.dim";
  const copy = el("button.link", {onclick: () => copyTo(copy, text)}, "Copy");
  const label = el("span.dim.grow", isDiagram ? "Diagram (Mermaid)" : language);
  const colored = isDiagram ? text : marked(text, SYNTAX, part => el(tag(part), part));
  return el("figure.card", el("figcaption.row", label, copy), el("div.code.scroll",
    {tabIndex: 0}, el("pre.dim", {ariaHidden: true}, numbers), el("pre", colored)));
}
async function copyTo(button, text) {  // a browser has no clipboard for http: of another machine
  const copied = await navigator.clipboard?.writeText(text).then(() => true, () => false);
  put(button, copied ? "Copied" : "Copying needs https");
}
function prose(value) {
  if (typeof value === "string" && DIAGRAM.test(value)) return code(value.trim(), "mermaid");
  if (value === null || typeof value !== "object") return markdown(String(value));
  if (Array.isArray(value)) return el("ul", value.map(each => el("li", prose(each))));
  const filled = Object.entries(value).filter(([, inner]) => inner !== "" && inner?.length !== 0);
  return filled.map(([key, inner]) => [el("h4", spaced(key)), prose(inner)]);
}
// What a model or a file says; without a type it is JSON or Markdown.
function rendered(text, type = "md") {
  if (text.length > 200000) return el("pre.said", text);
  if (!/^(md|txt|json)$/i.test(type)) return el("div.md", code(text, type));
  try {
    const body = text.replace(/^\s*(\[CONTENT\]|```json)|(\[\/CONTENT\]|```)\s*$/g, "");
    return el("div.md", prose(JSON.parse(body)));
  } catch {  // it is not JSON
    return el("div.md", markdown(text));
  }
}
function present(name, text, type, blob = new Blob([text])) {
  put($("name"), name);
  put($("copy"), "Copy");
  $("content").replaceChildren(rendered(text, type));
  $("copy").onclick = () => copyTo($("copy"), text);
  $("save").onclick = () => save(blob, name.split("/").at(-1));
  $("viewer").showModal();
}
const save = (blob, name) => el("a", {href: URL.createObjectURL(blob), download: name}).click();
const opener = (label, onclick) => el("button.link", {onclick}, label);

// The server, and its list of tasks
const path = (id, rest = "") => `api/tasks/${encodeURIComponent(id)}${rest}`;
const json = async (where, set) => (await api(where, set)).json();
const post = (where, body) => api(where, {method: "POST", body: body && JSON.stringify(body)});
async function api(where, set = {}) {
  const headers = token ? {Authorization: "Bearer " + token} : {};
  if (set.body) headers["Content-Type"] = "application/json";
  const answer = await fetch(where, {...set, headers}).catch(() => setOffline(5));
  if (!answer) throw new Error("the server cannot be reached");
  skew = Date.now() - (Date.parse(answer.headers.get("Date")) || Date.now());
  if (answer.ok) return answer;
  const {error} = await answer.json().catch(() => ({}));
  if (answer.status === 401 && !$("login").open) $("login").showModal();
  const message = error?.message || "HTTP " + answer.status;
  throw Object.assign(new Error(message), {status: answer.status});
}
const notify = text => put($("notice"), text);
function setOffline(left) {
  offline = left;
  notify(left ? `The server cannot be reached. Trying again in ${left} s.` : "");
  for (const button of document.querySelectorAll("#top button, #start")) button.disabled = !!left;
}
async function retry() {
  setOffline(5);
  await list();
  if (view && !view.over) load(view);
}
async function list(step = 0) {
  page += step;
  try {
    const found = await json(`api/tasks?page_size=50&page=${page}`);
    const focused = document.activeElement.hash;
    if (offline && (!view || view.over)) setOffline(0);
    if (!view || view.over) put($("link"), "");
    $("newer").hidden = page === 1;
    $("older").hidden = page >= found.total_pages;
    $("tasks").replaceChildren(...found.items.map(item));
    if (focused) $("tasks").querySelector(`[href="${focused}"]`)?.focus();
    const isNew = ({id, status}) => id === view.id && status !== view.state.status;
    if (view?.over && seconds > view.heard && found.items.some(isNew)) connect(view);  // run again
  } catch (error) {
    put($("link"), error.status === 401 ? "" : error.message);  // which is asked for
  }
}
function item({id, title, input_prompt, status, created_at, updated_at, result_summary}) {
  const name = title || input_prompt.slice(0, 80);
  const lasted = !isLive(status) && clock(Date.parse(updated_at) - Date.parse(created_at));
  const price = /\$[\d.]+/.exec(result_summary);
  return el("li", el("a", {href: "#" + id, title: name, ariaCurrent: id === view?.id},
    el("span.title", {dir: "auto"}, name),
    el("small.mark." + status, joined(status.toLowerCase(), age(created_at), lasted, price))));
}

// The stream of a task
function open(id) {
  view?.socket?.close();
  $("viewer").close();
  $("sure").hidePopover();
  view = id ? {id, last: 0, queue: [], log: [], state: {}, members: new Map()} : null;
  follow = false;
  empty("title status facts question failure now team feed lines");
  $("who").length = 1;
  $("made").open = innerWidth > 1150;
  document.body.classList.toggle("watching", !!id);
  document.title = "streamer";
  main.scrollTop = 0;
  filter();
  list();
  if (id) load(view);
  else $("prompt").focus();
}
async function load(mine) {
  try {
    mine.task = await json(path(mine.id));
    if (mine !== view) return;
    put($("title"), mine.task.title || mine.task.input_prompt);
    document.title = $("title").textContent.slice(0, 80) + " - streamer";
    expect(mine);
    await recall(mine);
    connect(mine);
  } catch (error) {
    if (mine !== view) return;
    if (error.status < 500) gone(error.message);
    else setOffline(5);
  }
}
async function recall(mine) {  // what happened until now: by the thousand, ten times as fast
  for (let more = true; more && mine === view; flush(mine)) {
    const found = await json(path(mine.id, `/events?limit=1000&after=${mine.last}`));
    mine.queue.push(...found.events.map(data => ({type: "event", data})));
    more = found.has_more;
  }
}
function connect(mine) {
  const url = new URL(`ws/tasks/${mine.id}?start=false&after=${mine.last}`,
    location.href.replace("http", "ws"));
  if (token) url.searchParams.set("token", token);
  mine.socket?.close();
  const socket = new WebSocket(url);
  const receive = message => {
    if (socket !== mine.socket) return;
    mine.heard = seconds;
    if (mine.queue.push(message) === 1) setTimeout(flush, 30, mine);
  };
  Object.assign(mine, {socket, heard: seconds, over: false});
  socket.onmessage = ({data}) => receive(JSON.parse(data));
  socket.onclose = ({code}) => receive({type: "closed", data: {code}});
}
function flush(mine) {
  mine.added = document.createDocumentFragment();
  for (const {type, data} of mine.queue.splice(0)) {
    if (mine === view) RECEIVE[type]?.(mine, data);
  }
  if (mine !== view) return;
  $("feed").append(mine.added);
  draw(mine);
  drawLog(mine);
  if (follow) main.scrollTop = main.scrollHeight;
}
const RECEIVE = {
  connected(mine, {recovered}) {
    if (!recovered && mine.last) open(mine.id);
    else if (isLive(mine.state.status)) note(mine, `connected again, after event ${mine.last}`);
    setOffline(0);
    put($("link"), "live");
  },
  state(mine, state) {
    if (state.status === "RUNNING" && mine.state.status !== "RUNNING") follow = innerWidth > 760;
    mine.state = state;
  },
  event(mine, event) {
    const {event_id: id} = event;
    if (id <= mine.last) return;
    if (!mine.last && id > 1) note(mine, `events before ${id} are not kept any more`);
    mine.last = id;
    try {
      tell(mine, event);
    } catch {  // a runner of somebody's own may say anything
      note(mine, event.payload.message);
    }
  },
  error(mine, {code, message}) {
    if (code === "events_missing") note(mine, message);
    else mine.refusal = message;
  },
  closed(mine, {code}) {
    put($("link"), "");
    mine.over = code === 1000;
    if (code === 1008 || code === 4404) gone(mine.refusal);
    else if (!mine.over) setOffline(5);
    files(mine);
    list();
  },
};
function empty(names) {
  for (const name of names.split(" ")) $(name).replaceChildren();
  for (const name of ["run", "cancel", "more", "progress", "made"]) $(name).hidden = true;
}
function gone(message) {
  Object.assign(view, {over: true, state: {}, heard: Infinity});
  setOffline(0);
  empty("status question now");
  fail("This task cannot be shown", message);
}
const fail = (title, reason, advice = "") => $("failure").replaceChildren(
  el("strong", title), el("p", reason), el("p.dim", advice));

// The team
function expect(mine) {  // the company's members, before they begin
  const company = ["ProductManager", "Architect", "ProjectManager", "Engineer", "QaEngineer"];
  const {mode, options: {implement, run_tests, team}} = mine.task;
  const size = 3 + implement + (implement && run_tests);
  if (mode !== "custom" && !team) company.slice(0, size).forEach(role => member(mine, role));
}
function member(mine, role) {
  if (mine.members.has(role)) return mine.members.get(role);
  const who = {role, bars: [], calls: new Map(), text: "", does: "", end: ""};
  for (const part of ["worked", "doing", "track", "task", "tail"]) who[part] = el("div." + part);
  const head = () => [avatar(role), el("strong.name", spaced(role))];
  who.live = tint(role, el("li.card", el("div.row", head(), who.task), who.tail));
  mine.members.set(role, who);
  $("team").append(tint(role, el("li", head(), who.worked, who.doing, who.track)));
  $("now").append(who.live);
  $("who").append(el("option", {value: roles.indexOf(role)}, spaced(role)));
  return who;
}
function avatar(role) {
  const capitals = role === "ProjectManager" ? "PJ" : role.replace(/[^A-Z]/g, "");  // PM is taken
  return el("span.avatar", {ariaHidden: true}, (capitals[1] ? capitals : role).slice(0, 3));
}
function tint(role, element) {
  if (!role) return element;
  if (!roles.includes(role)) roles.push(role);
  const index = roles.indexOf(role);
  element.classList.add("role", "r" + index);
  element.style.setProperty("--hue", (264 + 137.5 * index) % 360);
  return element;
}
function begin(mine, who, at, action) {
  stop(mine, who, at);
  who.bars.push({from: at});
  who.does = words(action);
  if (mine.turn?.who === who) mine.turn = null;
}
function stop(mine, who, at, end = "done") {
  finish(mine, who, at);
  if (!isBusy(who)) return;
  who.bars.at(-1).to = at;
  who.end = end;
}
function drawMember(who, {waiting_on: waits, cost}, began, now) {
  const busy = isBusy(who);
  const spent = cost.by_role?.[who.role];
  const worked = who.bars.reduce((sum, {from, to}) => sum + (to || now) - from, 0);
  const doing = busy ? who.does : who.end || "waits";
  const silent = waits?.agent_role === who.role && clock(1000 * waits.seconds);
  put(who.worked, worked ? clock(worked) : "");
  put(who.doing, joined(doing, spent && money(spent)));
  put(who.task, joined(doing, silent && `waits for the model: ${silent}`));
  put(who.tail, who.text.slice(-1500));
  who.live.hidden = !busy;
  const part = ms => 100 * ms / (now - began + 1);
  who.track.replaceChildren(...who.bars.map(({from, to}) => el("i", {
    style: `left: ${part(from - began)}%; width: ${part((to || now) - from)}%`,
  })));
}

// The story
const when = (mine, at) => el("time", {title: new Date(at)}, "+" + clock(at - mine.began));
const file = (path, change = "") => el("button", {title: path, onclick: () => attempt(show(path))},
  change + path.split("/").slice(-2).join("/"));
function note(mine, ...inside) {  // a row of nobody's
  mine.turn = null;
  mine.added.append(el("li.note.dim", el("span"), el("div.row", inside)));
}
function tell(mine, event) {
  const {event_type: type, agent_role: role, payload} = event;
  const at = Date.parse(event.timestamp);
  const streams = type === "TOKEN" || type === "REASONING";
  const who = role || streams ? member(mine, role || "Team") : null;
  // The prompt stands above already; nobody wants to read an empty message, or one to oneself.
  const {sent_from, content, send_to} = payload;
  const isNews = sent_from !== "Human" && content !== "" && String(send_to) !== role;
  mine.latest = at;
  if (type === "AGENT_START") begin(mine, who, at, payload.action);
  else if (type === "AGENT_COMPLETE") stop(mine, who, at);
  else if (streams) grow(mine, who, at, type, payload);
  else if (type === "RESULT") mine.result = payload;
  else if (type === "ANSWER") person(mine, at, "answered", payload.message);
  else if (type === "TASK_START") start(mine, at);
  else if (type.startsWith("TASK_")) end(mine, at, type, payload);
  else if (type === "LOG" || !isNews) mine.log.push({at, role, payload});
  else place(mine, who, at, type, payload);
}
function grow(mine, who, at, type, {call_id, action, message}) {
  if (!isBusy(who)) begin(mine, who, at, action);
  who.does = words(action);
  if (!who.calls.has(call_id)) who.calls.set(call_id, {action, TOKEN: "", REASONING: ""});
  who.text = who.calls.get(call_id)[type] += message;
}
function finish(mine, who, at) {  // what was said is whole: a document
  for (const {action, TOKEN: text, REASONING: thoughts} of who.calls.values()) {
    const type = /^Write(Code|Test)$/.test(action) && !text.includes("```") ? "code" : "md";
    const title = `${spaced(who.role)} ${words(action)}`;
    const open = (label, said) => said ? opener(label, () => present(title, said, type)) : "";
    const buttons = el("footer.row", open("Open", text), open("Thoughts", thoughts));
    const kind = text ? "TOKEN" : "REASONING";
    const doc = el("div.doc.card.told." + kind, text ? rendered(text, type) : "", buttons);
    rows(mine, who, at, words(action)).append(doc);
  }
  who.calls.clear();
  who.text = "";
}
// Where the next row of a role goes: its turn lasts until another has something to tell.
function rows(mine, who, at, does) {
  if (mine.turn?.who === who && (!does || does === mine.turn.does)) return mine.turn.rows;
  const what = el("span.dim.grow", does || who.does);
  const head = el("p.row", el("strong.name", spaced(who.role)), " ", what, when(mine, at));
  mine.turn = {who, does, rows: el("div.row")};
  mine.added.append(tint(who.role, el("li", avatar(who.role), el("div", head, mine.turn.rows))));
  return mine.turn.rows;
}
function place(mine, who, at, type, {message, path, change, content, action}) {
  const named = who && message.startsWith(who.role + " ");  // it stands above already
  const text = (named ? message.slice(who.role.length + 1) : message).replace("<all>", "everybody");
  if (who) finish(mine, who, at);
  const [, to, name] = /^to (.+): (?:.*\/)?(.+)$/.exec(text) || [];
  const made = name && who && rows(mine, who, at).querySelector(`[title$="${CSS.escape(name)}"]`);
  if (made) {  // the message hands over what was made just now
    made.append(` → ${to}`);
    return made.parentNode.classList.add(type);
  }
  let told = content ? opener(text, () => present(text, content)) : text;
  if (type === "ARTIFACT") mine.filesDue = true;
  if (type === "ARTIFACT" && change !== "deleted") told = file(path, change + " ");
  const row = el("p.told." + type, told);
  if (type === "ERROR") mine.failed = joined(who && spaced(who.role), words(action));
  if (!who) return note(mine, row, when(mine, at));
  if (type === "ERROR") stop(mine, who, at, "failed");
  rows(mine, who, at).append(row);
}
function start(mine, at) {
  Object.assign(mine, {began: at, ended: 0, failed: "", result: null, turn: null});
  $("failure").replaceChildren();
  for (const who of mine.members.values()) Object.assign(who, {bars: [], end: ""});
  person(mine, at, "asked", mine.task.input_prompt);
}
const person = (mine, at, does, text) =>
  rows(mine, {role: "You", does}, at).append(el("p.said", {dir: "auto"}, text));
function end(mine, at, type, payload) {
  const {files = [], message, cost, mode, rounds, end_reason, ...rest} = mine.result || {};
  const good = type === "TASK_COMPLETE";
  mine.ended = at;
  for (const who of mine.members.values()) {
    stop(mine, who, at, good ? "done" : "stopped");
    who.end ||= "did not begin";
  }
  const how = type === "TASK_ERROR" ? "failed" : payload.message;  // why stands on top
  const head = el("strong.mark." + type, joined(how, clock(at - mine.began)));
  const made = good ? [prose(rest), el("p.row", files.slice(0, 30).map(path => file(path)))] : [];
  mine.added.append(el("li", el("span"), el("div.card.md", head, made)));
}
function drawLog(mine) {  // only while it is looked at, and a part at a time
  if (mine !== view || !mine?.log.length || !$("log").checked) return;
  const lines = mine.log.splice(0, 1000).map(({at, role, payload}) => {
    const name = role ? el("span.name", spaced(role) + " ") : [];
    return tint(role, el("p", when(mine, at), " ", name, payload.message));
  });
  $("lines").append(el("div", lines));
  setTimeout(drawLog, 0, mine);
}
function filter() {
  const kind = $("kind").value;
  const role = $("who").value;
  const hidden = [$("log").checked ? "#feed" : "#lines"];
  if (kind) hidden.push(`#feed .told:not(.${kind})`, `#feed > li:has(.told):not(:has(.${kind}))`);
  if (role) hidden.push(`#feed > li:not(.r${role})`, `#lines p:not(.r${role})`);
  filters.replaceSync(hidden.join(", ") + " { display: none }");
  drawLog(view);
}

// What stands on top
function draw(mine) {
  const {status, progress, cost, last_message, error_message: error, question} = mine.state;
  if (!status) return;
  const now = mine.ended || Math.max(Date.now() - skew, mine.latest || 0);
  const queued = status === "PENDING" && last_message;
  for (const who of mine.members.values()) drawMember(who, mine.state, mine.began, now);
  put($("status"), queued ? "queued" : status.toLowerCase());
  put($("facts"), joined(queued, mine.began && clock(now - mine.began), money(cost)));
  put($("run"), status === "PENDING" ? "Run" : "Run again");
  $("status").className = "mark " + status;
  $("progress").value = progress;
  $("progress").hidden = !isLive(status);
  $("run").hidden = !!queued || status === "RUNNING" || status === "SUCCEEDED";
  $("cancel").hidden = !isLive(status);
  $("more").hidden = false;
  if (error && !$("failure").firstChild) fail(joined("It failed", mine.failed), error, ADVICE);
  if (question?.question_id !== mine.asked) ask(mine, question);
  if (mine.filesDue) files(mine);
}
function ask(mine, question) {
  mine.asked = question?.question_id;
  if (!question) return $("question").replaceChildren();
  const {question_id, agent_role, message, choices, free_text} = question;
  const asker = spaced(agent_role || "The team");
  const send = answer => {
    if (mine.answered === question_id) return;  // one answer, however often one clicks
    mine.answered = question_id;
    const posted = post(path(mine.id, "/answers"), {question_id, answer});
    attempt(posted.catch(error => {
      mine.answered = "";
      throw error;
    }));
  };
  const field = el("textarea", {id: "answer", placeholder: "Your answer, in your own words"});
  const free = [field, el("button", {onclick: () => send(field.value)}, "Answer")];
  const buttons = (choices || []).map(each => el("button", {onclick: () => send(each)}, each));
  $("question").replaceChildren(el("strong", asker + " asks you"),
    el("div.md", markdown(message.replaceAll(agent_role || asker, asker))),
    el("div.row", buttons, choices && !free_text ? [] : free));
}
async function files(mine) {
  mine.filesDue = false;
  const found = await json(path(mine.id, "/artifacts")).catch(() => []);
  if (mine !== view) return;
  let folder = "";
  const lines = found.flatMap(({path}) => {  // those of a folder come one after the other
    const [, within = "", name] = /^(.*\/)?(.*)$/s.exec(path);
    const head = within === folder ? [] : el("li.dim", within);
    folder = within;
    return [head, el("li", {style: "margin-left: 1rem"}, opener(name, () => attempt(show(path))))];
  });
  $("files").replaceChildren(...lines.flat());
  $("made").hidden = !found.length;
}
async function show(file) {
  const name = file.split("/").map(encodeURIComponent).join("/");
  const blob = await (await api(path(view.id, "/artifacts/" + name))).blob();
  if (!blob.type.startsWith("text/plain")) save(blob, file.split("/").at(-1));
  else present(file, await blob.text(), /\.(\w+)$/.exec(file)?.[1], blob);
}

// What a person does, by the button
const ACTS = {
  newer: () => list(-1),
  older: () => list(1),
  latest: () => main.scrollTo(0, main.scrollHeight),
  cancel: () => post(path(view.id, "/cancel")),
  async start() {
    if (!$("home").reportValidity()) return;
    const body = {input_prompt: $("prompt").value, options: options()};
    const task = await (await post("api/tasks", body)).json();
    $("prompt").value = "";
    location.hash = task.id;  // before it runs, which may be refused
    await post(path(task.id, "/run"));
  },
  async run() {
    await post(path(view.id, "/run?restart=" + !isLive(view.state.status)));
    if (view.over) connect(view);
  },
  async delete() {
    await api(path(view.id), {method: "DELETE"});
    location.hash = "";
  },
  zip: async () =>
    save(await (await api(path(view.id, "/artifacts.zip"))).blob(), view.id + ".zip"),
};
onclick = async ({target}) => {
  if (!Object.hasOwn(ACTS, target.id)) return;
  target.disabled = true;
  await attempt(ACTS[target.id]());
  target.disabled = false;
};
async function attempt(work) {
  if (!offline) notify("");
  await work?.catch(error => notify(error.message));
}
main.onscroll = () => {
  follow = main.scrollHeight - main.scrollTop - main.clientHeight < 60;
  $("latest").hidden = follow;
};
for (const name of ["who", "kind", "log"]) $(name).onchange = filter;
$("examples").onclick = ({target}) => {
  if (target.type === "button") $("prompt").value = target.textContent;
  $("prompt").focus();
};
$("prompt").onkeydown = ({key, ctrlKey, metaKey}) => {
  if (key === "Enter" && (ctrlKey || metaKey)) $("start").click();
};
function options() {
  const given = {};
  for (const {name, type, value, checked} of $("home").querySelectorAll("[name]")) {
    if (type === "checkbox") given[name] = checked;
    else if (value) given[name] = type === "number" ? Number(value) : value;
  }
  if (given.approve) given.approve = given.approve.split(/[\s,]+/);
  return given;
}
$("login").onclose = () => {
  sessionStorage.setItem("token", $("token").value);
  location.reload();
};
function tick() {
  seconds++;
  if (offline === 1) retry();
  else if (offline) setOffline(offline - 1);
  else if (seconds % 5 === 0) list();
  if (!view || view.over || offline) return;
  draw(view);
  // The server speaks every 15 s, or answers a ping: after 45 s of silence it is away.
  if (seconds % 15 === 0 && view.socket?.readyState === 1) view.socket.send('{"type": "ping"}');
  if (seconds - view.heard > 45) retry();
}
async function greet() {
  const {mode, teams = []} = await json("healthz");
  if (mode === "test") put($("mode"), "test mode");
  $("teams").hidden = !teams.length;
  $("teams").lastElementChild.append(...teams.map(name => el("option", name)));
}
if (token) sessionStorage.setItem("token", token);
if (location.search) history.replaceState(null, "", location.pathname + location.hash);
for (const input of $("home").querySelectorAll("[name]")) input.title = input.name;
$("mark").src = document.querySelector("[rel=icon]").href;
document.adoptedStyleSheets = [filters];
onhashchange = () => open(location.hash.slice(1));
setInterval(tick, 1000);
attempt(greet());
onhashchange();
</script></body></html>
"""


if __name__ == "__main__":
    sys.exit(main())
